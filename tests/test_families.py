"""Each family of chat models, from the folder as its makers publish it: logits are transformers'.

The configurations are the published ones with every key, their sizes reduced; weights are random.
"""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import model

transformers = pytest.importorskip("transformers", reason="pip install -r requirements-real.txt")

# ---- The published config.json of each ----------------------------------------------------------

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
         "initializer_range": 0.02, "pretraining_tp": 1, "use_cache": True, "rms_norm_eps": 1e-05,
         "tie_word_embeddings": False, "rope_scaling": None}
LLAMA2 = LLAMA | {
    "_name_or_path": "meta-llama/Llama-2-7b-chat-hf", "bos_token_id": 1, "eos_token_id": 2,
    "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 4096,
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
    "torch_dtype": "float16", "transformers_version": "4.32.0.dev0", "vocab_size": 32000}
TINYLLAMA = LLAMA | {
    "attention_bias": False, "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 2048,
    "intermediate_size": 5632, "max_position_embeddings": 2048, "num_attention_heads": 32,
    "num_hidden_layers": 22, "num_key_value_heads": 4, "rope_theta": 10000.0,
    "torch_dtype": "bfloat16", "transformers_version": "4.35.0", "vocab_size": 32000}
LLAMA3 = LLAMA | {
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": 128009, "hidden_size": 4096, "intermediate_size": 14336,
    "max_position_embeddings": 8192, "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "rope_theta": 500000.0, "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0.dev0", "vocab_size": 128256}
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 8192, "rope_type": "llama3"}
LLAMA31 = LLAMA3 | {"eos_token_id": [128001, 128008, 128009], "max_position_embeddings": 131072,
                    "mlp_bias": False, "rope_scaling": SCALING}
LLAMA32 = LLAMA31 | {"head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192,
                     "num_hidden_layers": 16, "tie_word_embeddings": True,
                     "rope_scaling": SCALING | {"factor": 32.0}}
SMOLLM2 = LLAMA | {
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_size": 576, "initializer_range": 0.041666666666666664, "intermediate_size": 1536,
    "is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False,
    "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "pad_token_id": 2,
    "rope_interleaved": False, "rope_theta": 100000, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "transformers_version": "4.42.3", "vocab_size": 49152,
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}}}
MISTRAL = {
    "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.42.0.dev0",
    "use_cache": True, "vocab_size": 32768}
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
    "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 21,
    "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936}
FAMILIES = {
    "Llama 2 Chat": LLAMA2, "TinyLlama Chat": TINYLLAMA, "Llama 3 Instruct": LLAMA3,
    "Llama 3.1 Instruct": LLAMA31, "Llama 3.2 Instruct": LLAMA32, "SmolLM2 135M": SMOLLM2,
    "SmolLM2 360M": SMOLLM2 | {"hidden_size": 960, "num_attention_heads": 15,
                               "num_key_value_heads": 5},
    "SmolLM2 1.7B": SMOLLM2 | {"hidden_size": 2048, "num_attention_heads": 32,
                               "num_key_value_heads": 32, "rope_theta": 130000},
    "Mistral 7B Instruct": MISTRAL, "Qwen2.5 0.5B Instruct": QWEN2,
    "Qwen2.5 7B Instruct": QWEN2 | {
        "hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4,
        "max_window_layers": 28, "sliding_window": 131072, "tie_word_embeddings": False,
        "vocab_size": 152064}}


def scaled_down(published):
    """The same keys; heads of the published size, as many to a key head, but one or two of these;
    a context of 256 tokens before a rotary scaling."""
    heads, kv = published["num_attention_heads"], published["num_key_value_heads"]
    group, few = heads // kv, 1 + (heads == kv)
    small = {"hidden_size": published["hidden_size"] // heads * group * few, "vocab_size": 97,
             "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": group * few,
             "num_key_value_heads": few}
    if published.get("rope_scaling"):
        small["rope_scaling"] = published["rope_scaling"] | {
            "original_max_position_embeddings": 256}
    special = {key: 3 for key in published if key.endswith("_token_id")}
    return published | small | special


def publish(config, folder):
    """Write a folder as its makers do: config.json with these keys, random weights with
    transformers' names. Returns transformers' model."""
    kind = transformers.AutoConfig.for_model(**json.loads(json.dumps(config)))
    theirs = transformers.AutoModelForCausalLM.from_config(kind, attn_implementation="eager")
    theirs = theirs.float().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for weight in theirs.parameters():          # large enough that attention is far from uniform
        weight.normal_(0.0, 0.1, generator=generator)
        if weight.dim() == 1 and len(weight) == config["hidden_size"]:
            weight.add_(1.0)
    folder.mkdir()
    tensors = {name: tensor.clone() for name, tensor in theirs.state_dict().items()
               if not (name == "lm_head.weight" and config["tie_word_embeddings"])}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return theirs


def opened(folder):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager")
    return theirs.eval().requires_grad_(False)


def difference(ours, theirs):
    """The largest difference, as a share of the largest logit."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def random_tokens(count):
    return torch.randint(97, (1, count), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers_as_published_and_after_a_save_by_either(family, tmp_path):
    config = scaled_down(FAMILIES[family])
    theirs, tokens = publish(config, tmp_path / "published"), random_tokens(300)
    expected = theirs(tokens).logits
    llama = model.load(tmp_path / "published").requires_grad_(False)
    assert difference(llama(tokens), expected) < 1e-4
    # transformers saves it in today's spelling of the keys; this project saves both spellings.
    theirs.save_pretrained(tmp_path / "theirs")
    assert "rope_parameters" in json.loads((tmp_path / "theirs" / "config.json").read_text())
    model.save(llama, tmp_path / "ours")
    for folder in ("theirs", "ours"):
        again = model.load(tmp_path / folder).requires_grad_(False)
        assert dataclasses.asdict(again.config) == dataclasses.asdict(llama.config)
        assert torch.equal(again(tokens), llama(tokens))
    assert difference(opened(tmp_path / "ours")(tokens).logits, expected) < 1e-6
    saved, before = (load_file(tmp_path / folder / "model.safetensors")
                     for folder in ("ours", "published"))
    assert saved.keys() == before.keys() and all(saved[k].equal(before[k]) for k in before)


def test_biases_count_in_every_way_of_reading(tmp_path):
    theirs, tokens = publish(scaled_down(QWEN2), tmp_path / "qwen"), random_tokens(60)
    for weight in theirs.parameters():
        weight.copy_(weight.half())             # what fp16 holds, so that packing changes nothing
    theirs.save_pretrained(tmp_path / "half")
    llama, expected = model.load(tmp_path / "half").requires_grad_(False), theirs(tokens).logits
    fast = llama.for_decoding()
    assert fast.parameter_count() == llama.parameter_count()
    for one in (llama, fast):
        cache = model.KVCache(one.config, 1, 60)
        parts = [one(part, cache) for part in tokens.split([20, 1, 4, 35], 1)]
        assert difference(torch.cat(parts, 1), expected) < 1e-4
    for block in llama.layers:
        block.self_attn.qkv_proj.bias.zero_()
    assert difference(llama(tokens), expected) > 0.05          # the test would see a lost bias


def test_rotary_scaling_equals_transformers_at_positions_behind_the_original_context(tmp_path):
    config = scaled_down(LLAMA32) | {"num_hidden_layers": 1}
    theirs, tokens = publish(config, tmp_path / "published"), random_tokens(1500)
    llama = model.load(tmp_path / "published").requires_grad_(False)
    expected, cache = theirs(tokens).logits, model.KVCache(llama.config, 1, 1500)
    parts = [llama(part, cache) for part in tokens.split(500, 1)]
    assert difference(torch.cat(parts, 1), expected) < 1e-4
    llama.config.rope_scaling = None
    assert difference(llama(tokens), expected) > 0.02


@pytest.mark.parametrize("published", [LLAMA2, LLAMA31, LLAMA32])
def test_angles_equal_transformers_up_to_the_last_position(published, tmp_path):
    """The published numbers themselves: all three bands of speeds, positions up to 131,071."""
    (tmp_path / "config.json").write_text(json.dumps(published))
    kind = transformers.AutoConfig.for_model(**json.loads(json.dumps(published)))
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(kind)
    last = published["max_position_embeddings"] - 1
    positions = torch.tensor([[0, 1, 77, 2047, 4095, last // 3, last - 1, last]])
    cos, sin = model.rotary_tables(model.read_config(tmp_path), positions)
    for ours, expected in zip((cos, sin.abs()), rotary(torch.zeros(1), positions)):
        expected = expected if ours is cos else expected.abs()     # ours has its sign elsewhere
        torch.testing.assert_close(ours[:, :, 0], expected, rtol=0, atol=1e-4)


# ---- What is refused ----------------------------------------------------------------------------

@pytest.mark.parametrize("published, change, words", [
    (LLAMA2, {"model_type": "gemma"}, ["model_type", "gemma"]),
    (LLAMA2, {"model_type": ["llama"]}, ["model_type"]),
    (LLAMA2, {"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
    (LLAMA2, {"attention_bias": True}, ["attention_bias", "True"]),
    (LLAMA2, {"mlp_bias": True}, ["mlp_bias", "True"]),
    (LLAMA2, {"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
    (LLAMA2, {"rope_interleaved": True}, ["rope_interleaved"]),
    (LLAMA2, {"sliding_window": 1024}, ["sliding_window", "1024"]),
    (LLAMA2, {"attention_multiplier": 0.0078125}, ["attention_multiplier", "0.0078125"]),
    (LLAMA2, {"embedding_multiplier": 12.0}, ["embedding_multiplier"]),
    (LLAMA2, {"residual_multiplier": 0.22}, ["residual_multiplier"]),
    (LLAMA2, {"logits_scaling": 8.0}, ["logits_scaling"]),
    (LLAMA2, {"final_logit_softcapping": 30.0}, ["final_logit_softcapping"]),
    (LLAMA2, {"quantization_config": {"quant_method": "fp8"}}, ["quantization_config", "fp8"]),
    (LLAMA2, {"rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope_scaling", "linear"]),
    (LLAMA2, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["rope_scaling", "dynamic"]),
    (LLAMA2, {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, ["rope_scaling", "yarn"]),
    (LLAMA2, {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
     ["rope_scaling", "partial_rotary_factor"]),
    (LLAMA2, {"rope_scaling": "linear"}, ["rope_scaling", "linear"]),
    (LLAMA2, {"rope_scaling": {"rope_type": ["llama3"]}}, ["rope_scaling"]),
    (LLAMA31, {"rope_scaling": SCALING | {"factor": "8"}}, ["rope_scaling", "'8'"]),
    (LLAMA31, {"rope_scaling": SCALING | {"high_freq_factor": 1.0}}, ["high_freq_factor"]),
    (LLAMA31, {"rope_scaling": SCALING | {"attention_factor": 2.0}}, ["attention_factor"]),
    (LLAMA31, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["rope_scaling"]),
    (LLAMA31, {"original_max_position_embeddings": 4096}, ["original_max_position_embeddings"]),
    (MISTRAL, {"sliding_window": 4096}, ["sliding_window", "4096"]),
    (MISTRAL, {"sliding_window": ...}, ["sliding_window", "4096"]),
    (MISTRAL, {"attention_bias": True}, ["attention_bias"]),
    (QWEN2, {"use_sliding_window": True}, ["use_sliding_window"]),
    (QWEN2, {"attention_bias": False}, ["attention_bias", "False"])])
def test_what_would_be_computed_otherwise_is_refused_by_key_and_value(published, change, words,
                                                                      tmp_path):
    keys = {key: value for key, value in (published | change).items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(keys))
    with pytest.raises(ValueError) as error:
        model.read_config(tmp_path)
    assert all(word in str(error.value) for word in (str(tmp_path), *words)), error.value


# What changes no logit: notes, training, caches; layer_types and max_window_layers count in Qwen2
# only where use_sliding_window is true, which is refused.
HARMLESS = {"initializer_range", "use_cache", "pretraining_tp", "attention_dropout",
            "rope_parameters", "layer_types", "max_window_layers"}


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2"])
def test_no_key_of_transformers_configuration_is_forgotten(kind):
    theirs = getattr(transformers, f"{kind}Config")
    keys = set(theirs.__annotations__) - {"model_type", "base_model_tp_plan", "base_model_pp_plan",
                                          "keys_to_ignore_at_inference"}
    read = {field.name for field in dataclasses.fields(model.Config)}
    assert keys <= read | HARMLESS | model.FAMILIES["neutral"].keys()


def test_of_an_odd_value_under_any_key_only_a_sentence_comes_out(tmp_path):
    odd = [None, True, -1, 0, 2.5, 10 ** 40, "", "llama3", [], [1, None], {}, {"rope_type": None},
           {"rope_type": {}}, {"type": []}, {"rope_type": "llama3", "factor": []},
           SCALING | {"low_freq_factor": None}, SCALING | {"rope_theta": "x"}]
    path = tmp_path / "config.json"
    for published in (LLAMA31, MISTRAL, QWEN2):
        for key in ("rope_scaling", "rope_parameters", "rope_theta", "model_type", "sliding_window",
                    "attention_bias"):
            for value in odd:
                path.write_text(json.dumps(published | {key: value}))
                try:
                    model.read_config(tmp_path)
                except ValueError as error:
                    assert "\n" not in str(error)
