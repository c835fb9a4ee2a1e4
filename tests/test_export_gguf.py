"""The GGUF file holds the same model: tensors, rotary order, one token for each row. What the
format cannot hold is refused."""

import importlib.util
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, TARGET, assert_refused, run_script, tiny_llama
from llama_cpp_process import llama_cpp
from safetensors.torch import load_file
from test_tokenizer import FAMILIES, TEXTS, sentencepiece_model, write

import model
import speculate
from data import export_gguf, files, smollm2, tokenizer

gguf = pytest.importorskip("gguf", reason="pip install -r requirements-real.txt")


def export(folder, out):
    done = run_script("data/export_gguf.py", folder, "--out", out)
    assert done.returncode == 0, done.stderr
    reader = gguf.GGUFReader(out)
    tensors = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
               for tensor in reader.tensors}
    return tensors, {field.name: field.contents() for field in reader.fields.values()}


@pytest.mark.parametrize("shape", [
    dict(heads=4, kv_heads=1, hidden=32),
    dict(heads=6, kv_heads=2, hidden=48, head_dim=10),
    dict(heads=2, kv_heads=2, hidden=16, head_dim=24, tied=True)])
def test_tensors_rotary_order_and_sizes_of_unusual_shapes(shape, sentencepiece_folder, tmp_path):
    tok = tokenizer.load(sentencepiece_folder)
    rows = tok.vocab_size + 7                    # an embedding padded beyond the tokenizer
    llama = tiny_llama(0, vocab=rows, layers=2, rope_theta=777.0, **shape)
    model.save(llama, tmp_path / "model")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(sentencepiece_folder / name, tmp_path / "model" / name)
    tensors, fields = export(tmp_path / "model", tmp_path / "x.gguf")
    saved, config = load_file(tmp_path / "model" / "model.safetensors"), llama.config
    assert len(tensors) == len(saved)
    assert ("output.weight" in tensors) == (not config.tie_word_embeddings)
    heads = {".attn_q.": config.num_attention_heads, ".attn_k.": config.num_key_value_heads}
    for name, weight in tensors.items():
        expected = saved[smollm2.hugging_face_name(name)].half().float().numpy()
        for part, count in heads.items():
            if part in name:                     # the way back is tested against transformers
                assert not np.array_equal(weight, expected)
                weight = smollm2.undo_rotary_permutation(weight, count)
        assert np.array_equal(weight, expected), name
    assert fields["llama.attention.head_count_kv"] == config.num_key_value_heads
    rotary = fields["llama.rope.dimension_count"]
    assert fields["llama.attention.key_length"] == rotary == config.head_dim
    assert fields["llama.rope.freq_base"] == 777.0 and fields["tokenizer.ggml.model"] == "llama"
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    scores = fields["tokenizer.ggml.scores"]
    assert len(tokens) == len(types) == len(scores) == rows == fields["llama.vocab_size"]
    assert tokens[:tok.vocab_size] == tok._pieces and set(types[tok.vocab_size:]) == {5}
    assert types[tok.controls["<|end|>"]] == 3
    assert fields["tokenizer.ggml.eos_token_id"] == tok.eos_id
    assert "<|" in fields["tokenizer.chat_template"]


@pytest.mark.real
def test_the_targets_export_is_the_packages_own_file_up_to_fp16(tmp_path):
    tensors, fields = export(TARGET, tmp_path / "target.gguf")
    theirs = gguf.GGUFReader(smollm2.fetch_gguf())
    expected = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type)
                for tensor in theirs.tensors}
    assert tensors.keys() == expected.keys()
    for name, weight in tensors.items():
        bound = np.abs(expected[name]) * 2.0 ** -11 + 2.0 ** -25     # half of fp16's last bit
        assert (np.abs(weight - expected[name]) <= bound).all(), name
    for field in theirs.fields.values():
        compared = field.name.startswith(("llama.", "tokenizer."))
        if compared and field.name != "tokenizer.ggml.unknown_token_id":
            assert fields[field.name] == field.contents(), field.name


BYTES = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": False}


@pytest.mark.real
@pytest.mark.parametrize("change", [
    {"type": "Whitespace"},
    BYTES | {"add_prefix_space": True},
    {"type": "Sequence", "pretokenizers": [DIGITS, BYTES | {"add_prefix_space": False}]}])
def test_a_tokenizer_that_has_no_name_is_refused(change, tmp_path):
    folder, out = tmp_path / "model", tmp_path / "x.gguf"
    left_out = shutil.ignore_patterns("*.png", "README.md")
    shutil.copytree(ROOT / "data" / "smollm2-drafter", folder, ignore=left_out)
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(content | {"pre_tokenizer": change}))
    done = run_script("data/export_gguf.py", folder, "--out", out)
    assert_refused(done, "tokenizer.json", "pre_tokenizer")
    assert not list(tmp_path.glob("x.gguf*"))


def test_what_gguf_cannot_hold_is_refused_in_one_sentence(sentencepiece_folder, tmp_path):
    tok = tokenizer.load(sentencepiece_folder)

    def export_from(folder):
        return run_script("data/export_gguf.py", folder, "--out", tmp_path / "x.gguf")

    def folder(name, rows):
        llama = tiny_llama(0, vocab=rows)
        if name == "nan":
            llama.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
        model.save(llama, tmp_path / name)
        for file in ("tokenizer.model", "tokenizer_config.json"):
            shutil.copy(sentencepiece_folder / file, tmp_path / name / file)
        return tmp_path / name

    assert_refused(export_from(tmp_path), "config.json: no such file")
    assert_refused(export_from(folder("small", tok.vocab_size - 1)), "embedding only")
    assert_refused(export_from(folder("nan", tok.vocab_size)), "down_proj", "not finite")
    lost = folder("lost", tok.vocab_size)
    (lost / "model.safetensors").rename(lost / "model-00001-of-00002.safetensors")
    (lost / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {
        "a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}))
    assert_refused(export_from(lost), "model-00002-of-00002.safetensors: no such file")
    qwen = folder("qwen", tok.vocab_size)
    config = json.loads((qwen / "config.json").read_text())
    linear = {"rope_scaling": {"type": "linear", "factor": 2.0}}
    for change, words in (({"model_type": "qwen2"}, "model_type qwen2"),
                          (linear, "rope_type linear")):
        (qwen / "config.json").write_text(json.dumps(config | change))
        assert_refused(export_from(qwen), words)


def test_a_folder_with_both_tokenizer_files_is_written_from_tokenizer_model(tmp_path):
    """As Llama 2 and TinyLlama are published; tokens that were added stand in tokenizer.json."""
    case, _ = FAMILIES["Llama 2 Chat"]
    write(tmp_path / "m", **case | {"markers": ("<|extra|>",)})
    (tmp_path / "m" / "tokenizer.model").write_bytes(sentencepiece_model())
    tok = tokenizer.load(tmp_path / "m")
    model.save(tiny_llama(0, vocab=tok.vocab_size), tmp_path / "m")
    _, fields = export(tmp_path / "m", tmp_path / "x.gguf")
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.tokens"] == tok._pieces and tok._pieces[-1] == "<|extra|>"
    kinds = fields["tokenizer.ggml.token_type"]
    assert [kinds[0], kinds[1], kinds[2], kinds[-1]] == [2, 3, 3, 3]        # unknown, then control


# ---- llama.cpp, which reads these files ---------------------------------------------------------

needs_llama_cpp = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None,
                                     reason="pip install -r requirements-real.txt: xllamacpp")


def greedy(llama, tok, prompt, count):
    tokens = torch.tensor([prompt])
    return speculate.autoregressive_generate(llama, tokens, count, 0.0, 1.0, tok.eos_ids).tokens


def assert_same_text(text, made, llama, tok, prompt):
    """llama.cpp's text is that of our tokens, up to a place where two of them are nearly as likely:
    its products round otherwise."""
    if text != tok.decode(made):
        same = [text.startswith(tok.decode(made[:i])) for i in range(len(made) + 1)].index(False)
        two = llama(torch.tensor([prompt + made[:same - 1]]))[0, -1].topk(2).values
        assert two[0] - two[1] < 0.1, f"{text!r} instead of {tok.decode(made)!r}"


@pytest.mark.real
@needs_llama_cpp
def test_llama_cpp_writes_our_greedy_text_with_and_without_the_drafter(tmp_path):
    draft = ROOT / "data" / "smollm2-drafter"
    for folder, name in ((TARGET, "target"), (draft, "draft")):
        export_gguf.export(folder, tmp_path / f"{name}.gguf")
    ways = [llama_cpp(tmp_path / "target.gguf", 24, 1),
            llama_cpp(tmp_path / "target.gguf", 24, 1, tmp_path / "draft.gguf", 3)]
    tok, llama = tokenizer.load(TARGET), model.load(TARGET).requires_grad_(False).for_decoding()
    for row in files.read_prompts(ROOT / "data" / "prompts" / "dev.jsonl")[::12][:3]:
        prompt = tok.chat_prompt(row["messages"])
        made = greedy(llama, tok, prompt, 24)
        for run in ways:
            text, _ = run(prompt)
            assert_same_text(text, made, llama, tok, prompt)
            assert text.prompt_tokens == len(prompt) and (text.drafted > 0) == (run is ways[1])


@needs_llama_cpp
def test_llama_cpp_computes_llama_3s_rotary_scaling_and_cuts_texts_as_its_tokenizer(tmp_path):
    case, _ = FAMILIES["Llama 3.1 Instruct"]
    folder = write(tmp_path / "model", **case)
    tok, scaling = tokenizer.load(folder), {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256}
    llama = tiny_llama(0, vocab=tok.vocab_size, layers=2, std=0.1, hidden=256, heads=4, kv_heads=1,
                       context=1024, rope_theta=500000.0, rope_scaling=scaling)
    for weight in llama.parameters():
        weight.copy_(weight.half())
    model.save(llama, folder)
    tensors, _ = export(folder, tmp_path / "x.gguf")
    factors = tensors["rope_freqs.weight"]
    assert factors.min() == 1 and factors.max() == 32 and len(set(factors.tolist())) > 2
    run = llama_cpp(tmp_path / "x.gguf", 12, 1)
    prompt = torch.randint(3, 300, (700,), generator=torch.Generator().manual_seed(0)).tolist()
    text, _ = run(prompt)
    assert_same_text(text, greedy(llama, tok, prompt, 12), llama, tok, prompt)
    llama.config.rope_scaling = None                           # the test would see it left out
    assert not text.startswith(tok.decode(greedy(llama, tok, prompt, 12))[:4])
    for text in filter(None, TEXTS):
        assert run(text)[0].prompt_tokens == len(tok.encode(text)), text
