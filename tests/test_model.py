"""The decoder equals transformers' LlamaForCausalLM, in every way it is called.

Its cache can forget tokens. Its files can be written, read again and read by others.
"""

import itertools
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import TARGET, run_script, tiny_llama
from safetensors.torch import load_file, save_file

import model

SHAPES = [dict(heads=4, kv_heads=4, layers=1, tied=True, rope_theta=10000.0),
          dict(heads=4, kv_heads=2, layers=3, tied=False, rope_theta=100000.0),
          dict(heads=6, kv_heads=1, layers=2, tied=True, rope_theta=500.0),
          dict(heads=9, kv_heads=3, layers=4, tied=False, rope_theta=100000.0, head_dim=16)]


def random_llama(shape):
    # A deviation of 0.2: at the usual 0.02 attention is nearly uniform, and no test would notice a
    # missing rotary.
    hidden = 72 if shape["heads"] == 9 else 48
    return tiny_llama(7, vocab=61, hidden=hidden, std=0.2, **shape)


def close(ours, theirs):
    """Within 5e-5 of the largest logit."""
    return (ours - theirs).abs().max() <= 5e-5 * theirs.abs().max()


def reference(folder):
    transformers = pytest.importorskip("transformers",
                                       reason="pip install -r requirements-real.txt")
    llama = transformers.LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager",
                                                          dtype=torch.float32)
    return llama.eval()


@pytest.mark.real
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers_whole_in_chunks_padded_and_after_a_rollback(shape, tmp_path):
    llama = random_llama(shape)
    model.save(llama, tmp_path)
    theirs = reference(tmp_path)
    tokens = torch.randint(61, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        whole = theirs(tokens).logits
        assert close(llama(tokens), whole)
        for chunk in (1, 4, 8):
            cache = model.KVCache(llama.config, 2, 24)
            parts = [llama(part, cache) for part in tokens.split(chunk, 1)]
            assert close(torch.cat(parts, 1), whole)
        # Rollback: read on with wrong tokens, forget them, read the right ones.
        cache = model.KVCache(llama.config, 2, 24)
        llama(tokens[:, :10], cache)
        llama(torch.flip(tokens[:, 10:17], [1]), cache)
        cache.length = 10
        assert close(llama(tokens[:, 10:], cache), whole[:, 10:])
        # Ragged rows, padded on the left; transformers is told the same by a mask and positions.
        starts = torch.tensor([0, 9])
        padded = torch.where(torch.arange(24) < starts[:, None], 5, tokens)
        mask = (torch.arange(24) >= starts[:, None]).long()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        ragged = theirs(padded, attention_mask=mask, position_ids=positions).logits
        cache = model.KVCache(llama.config, 2, 24)
        cache.start = starts
        parts = padded[:, :20], padded[:, 20:21], padded[:, 21:]
        ours = torch.cat([llama(part, cache) for part in parts], 1)
        assert close(ours[0], ragged[0]) and close(ours[1, 9:], ragged[1, 9:])


@pytest.mark.parametrize("shape", SHAPES)
def test_ragged_rows_equal_single_rows(shape):
    llama = random_llama(shape)
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(61, (1, n), generator=generator) for n in (5, 11, 8)]
    cache = model.KVCache(llama.config, 3, 14)
    cache.start = torch.tensor([11 - row.shape[1] for row in rows])
    padded = torch.full((3, 11), 60)
    for i, row in enumerate(rows):
        padded[i, cache.start[i]:] = row
    more = torch.randint(61, (3, 3), generator=generator)
    before = torch.cat((llama(padded, cache)[:, -1:], llama(more[:, :1], cache)), 1)
    stay = [2, 0]                                   # rows leave the batch, and the order changes
    cache.keep(torch.tensor(stay))
    after = llama(more[stay, 1:], cache)
    for i, row in enumerate(rows):
        alone = llama(torch.cat((row, more[i:i + 1]), 1))[0, row.shape[1] - 1:]
        torch.testing.assert_close(before[i], alone[:2], rtol=1e-4, atol=1e-5)
        if i in stay:
            torch.testing.assert_close(after[stay.index(i)], alone[2:], rtol=1e-4, atol=1e-5)


def test_future_tokens_do_not_change_the_past():
    llama = random_llama(SHAPES[1])
    tokens = torch.arange(12)[None]
    changed = torch.cat((tokens[:, :7], tokens[:, 7:] + 20), 1)
    torch.testing.assert_close(llama(tokens)[:, :7], llama(changed)[:, :7])


def test_a_parameter_changed_in_place_changes_the_output():
    llama = random_llama(SHAPES[0])
    before = llama(torch.arange(5)[None])
    llama.layers[0].mlp.gate_up_proj.weight.mul_(1.5)
    assert not torch.allclose(before, llama(torch.arange(5)[None]))


# ---- For decoding: fp16 weights, fp32 arithmetic -----------------------------------------------

def decoding_pair(**keys):
    """A model whose weights fp16 holds exactly, and its form for decoding."""
    llama = tiny_llama(0, vocab=130, layers=2, hidden=64, heads=4, kv_heads=2, context=600, **keys)
    for weight in llama.parameters():
        weight.copy_(weight.half())
    if not model.fbgemm_works():
        pytest.skip("FBGEMM does not work on this processor: for_decoding gives the model itself")
    return llama, llama.for_decoding()


def test_the_result_of_a_row_does_not_depend_on_how_many_rows_are_in_the_pass():
    """Bitwise with AVX-512: a verified block then gives exactly the text of plain decoding.

    (Only rounding in attention may still differ.) FBGEMM's AVX2 kernels add in an order that
    depends on the number of rows: there the results are equal up to rounding.
    """
    _, fast = decoding_pair()
    linear = fast.layers[0].mlp.gate_up_proj
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([linear(row[None]) for row in x])
    bitwise = torch.backends.cpu.get_cpu_capability() == "AVX512"
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 63, 119, 120, 121, 122, 240, 241, 500):
        y = linear(x[:rows])
        assert linear(x[None, :rows])[0].equal(y)
        error = (y - alone[:rows]).abs().max()
        assert error == 0 if bitwise or rows == 1 else error <= 1e-6 * alone.abs().max(), rows


@pytest.mark.parametrize("tied", [True, False])
def test_one_pass_over_many_tokens_equals_many_passes_over_one_and_the_fp32_model(tied):
    llama, fast = decoding_pair(tied=tied, std=0.2)
    assert fast is not llama and fast.parameter_count() == llama.parameter_count()
    tokens = torch.randint(130, (1, 500), generator=torch.Generator().manual_seed(1))
    expected = llama(tokens)
    cache = model.KVCache(llama.config, 1, 500)
    one_by_one = torch.cat([fast(tokens[:, i:i + 1], cache) for i in range(500)], 1)
    assert expected.std() > 0.5
    for width in (1, 2, 4, 8, 119, 120, 121, 122, 500):
        cache = model.KVCache(llama.config, 1, 500)
        two_passes = tokens[:, :2 * width].split(width, 1)
        logits = torch.cat([fast(part, cache) for part in two_passes], 1)
        for reference in (one_by_one, expected):
            assert (logits - reference[:, :2 * width]).abs().max() <= 1e-5 * expected.abs().max()


def test_decoding_shares_norms_and_embedding_and_leaves_the_original_as_it_was(tmp_path):
    llama = tiny_llama(0, vocab=130, layers=2, hidden=64, heads=4, kv_heads=2)
    before = {name: weight.clone() for name, weight in llama.named_parameters()}
    fast = llama.for_decoding()
    if fast is llama:
        pytest.skip("FBGEMM does not work on this processor")
    assert fast.norm is llama.norm and fast.embed_tokens is llama.embed_tokens
    assert all(weight.equal(before[name]) for name, weight in llama.named_parameters())
    with pytest.raises(ValueError, match="for_decoding cannot be saved"):
        model.save(fast, tmp_path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 7e4, -7e4])
@pytest.mark.parametrize("where", ["layers.1.self_attn.qkv_proj", "layers.0.self_attn.o_proj",
                                   "layers.1.mlp.gate_up_proj", "layers.0.mlp.down_proj",
                                   "lm_head"])
def test_a_weight_that_fp16_cannot_hold_is_refused_by_name_and_nothing_is_changed(bad, where):
    llama, _ = decoding_pair()
    llama.get_submodule(where).weight[3, 5] = bad
    before = {name: weight.clone() for name, weight in llama.named_parameters()}
    with pytest.raises(ValueError, match="the head" if where == "lm_head" else where):
        llama.for_decoding()
    for name, weight in llama.named_parameters():
        assert torch.equal(weight.nan_to_num(), before[name].nan_to_num())


def test_what_fp16_changes_and_where_it_does_not_serve_is_said_in_one_line(capsys, monkeypatch):
    llama, _ = decoding_pair()
    assert capsys.readouterr().out == ""                       # exact: nothing to say
    weight = llama.layers[1].mlp.down_proj.weight
    weight[0, 0] = 65504.0
    weight[0, 1] = 2049.0                                      # halfway between two numbers of fp16
    llama.for_decoding()
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and f"{1 / 65504:.1e}" in said
    assert llama.bfloat16().for_decoding() is llama
    assert "bfloat16" in capsys.readouterr().out
    llama.float()
    monkeypatch.setattr(model.platform, "machine", lambda: "aarch64")
    assert llama.for_decoding() is llama
    assert capsys.readouterr().out.count("\n") == 1


def test_projections_are_joined_on_load_and_split_on_save_under_hugging_faces_names(tmp_path):
    llama = tiny_llama(0, vocab=30, layers=2, hidden=24, heads=6, kv_heads=2, head_dim=8)
    model.save(llama, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    attention, mlp = llama.layers[1].self_attn, llama.layers[1].mlp
    qkv, gate_up = attention.qkv_proj.weight, mlp.gate_up_proj.weight
    for part, rows in (("q", slice(0, 48)), ("k", slice(48, 64)), ("v", slice(64, 80))):
        assert weights[f"model.layers.1.self_attn.{part}_proj.weight"].equal(qkv[rows])
    for part, rows in (("gate", slice(0, 48)), ("up", slice(48, 96))):
        assert weights[f"model.layers.1.mlp.{part}_proj.weight"].equal(gate_up[rows])
    assert not any("qkv" in name or "gate_up" in name for name in weights)
    assert model.load(tmp_path).layers[1].self_attn.qkv_proj.weight.equal(qkv)


@pytest.mark.parametrize("tied", [True, False])
def test_a_draft_vocabulary_is_kept_on_disk_and_leaves_no_probability_elsewhere(tied, tmp_path):
    llama = tiny_llama(0, vocab=50, layers=1, tied=tied)
    tokens = torch.tensor([[4, 7, 7]])
    whole = llama(tokens)
    llama.draft_vocabulary = torch.tensor([9, 3, 40])
    model.save(llama, tmp_path)
    for weight in llama.parameters():
        weight.copy_(weight.half())
    whole = F.linear(llama.hidden(tokens), llama.head_weight())
    model.save(llama, tmp_path)
    for loaded in (model.load(tmp_path), model.load(tmp_path).for_decoding()):
        logits = loaded(tokens)
        torch.testing.assert_close(logits[..., [3, 9, 40]], whole[..., [3, 9, 40]])
        assert torch.isinf(logits).sum() == 3 * 47
        assert model.probabilities(logits[0]).sum(-1).allclose(torch.ones(3))
        # Words of the prompt: some once, some twice, one of the list.
        words = torch.tensor([11, 3, 11, 7, 49])
        logits, allowed = loaded.head(loaded.hidden(tokens), words), [3, 7, 9, 11, 40, 49]
        torch.testing.assert_close(logits[..., allowed], whole[..., allowed])
        assert torch.isinf(logits).sum() == 3 * 44
        logits = loaded.head(loaded.hidden(tokens), words[:0])
        torch.testing.assert_close(logits, loaded(tokens))
    for content in ("[1, 50]", "[]", "{}", "[1", '["a"]'):
        (tmp_path / "draft_vocabulary.json").write_text(content)
        with pytest.raises(ValueError, match="draft_vocabulary.json: expected a list"):
            model.load(tmp_path)


def test_a_full_cache_is_refused_in_one_sentence():
    llama = random_llama(SHAPES[0])
    with pytest.raises(ValueError, match="exceed its 4 columns"):
        llama(torch.arange(5)[None], model.KVCache(llama.config, 1, 4))


# ---- Distributions -----------------------------------------------------------------------------

@pytest.mark.parametrize("vocab, scale", [(50, 3.0), (300, 0.1), (6000, 0.05), (6000, 4.0)])
def test_nucleus_equals_the_full_sort(vocab, scale):
    """Peaked and flat rows: the 256 largest are enough, or 4,096 are, or all are needed."""
    generator = torch.Generator().manual_seed(vocab)
    logits = scale * torch.randn(12, vocab, generator=generator, dtype=torch.float64)
    for top_p in (0.1, 0.5, 0.95, 0.999):
        p = torch.softmax(logits.float() / 0.7, -1)
        values, order = p.sort(dim=-1, descending=True)
        values = values * (values.double().cumsum(-1) - values < top_p)
        expected = torch.zeros_like(p).scatter(-1, order, values)
        expected /= expected.sum(-1, keepdim=True)
        ours = model.probabilities(logits.float(), 0.7, top_p)
        # Sums of thousands of numbers round differently: one token, at the edge of the nucleus, may
        # differ, and nothing else.
        assert ((ours > 0) != (expected > 0)).sum(-1).max() <= 1
        torch.testing.assert_close(ours, expected, rtol=2e-3, atol=1e-6)


def nucleus_by_definition(logits, temperature, top_p):
    """One row (V,), in double precision.

    Sort everything, keep every token with less than top_p before it, divide by the sum.
    """
    if temperature:
        p = torch.softmax(logits.double() / temperature, -1)
    else:
        p = (logits == logits.max()).double()
    values, order = p.sort(descending=True, stable=True)
    p = torch.zeros_like(p).scatter(0, order, values * (values.cumsum(0) - values < top_p))
    return p / p.sum()


@pytest.mark.parametrize("seed", range(40))
def test_every_row_of_a_batch_equals_itself_alone(seed):
    """A row's distribution may not depend on its neighbours, nor on how they are padded.

    Peaked and flat rows stand side by side, over vocabularies on both sides of 256 and 4,096. The
    first and the last token are among the likely ones.
    """
    generator = torch.Generator().manual_seed(seed)

    def choose(*options):
        return options[torch.randint(len(options), (), generator=generator)]

    vocab = choose(3, 255, 257, 1000, 4095, 4097, 9000)
    rows = choose(2, 3, 8)
    top_p = choose(0.1, 0.5, 0.9, 0.95, 0.999, 1.0)
    spread = torch.tensor([choose(0.0, 0.01, 1.0, 6.0) for _ in range(rows)])
    logits = spread[:, None] * torch.randn(rows, vocab, generator=generator)
    likely = [choose([], [0], [vocab - 1], [0, vocab - 1], [0, 1]) for _ in range(rows)]
    for row, ids in enumerate(likely):
        for rank, token in enumerate(ids):
            logits[row, token] = 3 * spread[row] + 12 - rank
    one_a_row = torch.tensor([choose(0.0, 0.6, 1.0, 2.0) for _ in range(rows)])
    temperature = choose(0.0, 0.3, 1.0, 2.0, one_a_row)
    p = model.probabilities(logits, temperature, top_p)
    for row in range(rows):
        its_own = temperature[row].item() if isinstance(temperature, torch.Tensor) else temperature
        alone = model.probabilities(logits[row:row + 1], its_own, top_p)[0]
        torch.testing.assert_close(p[row], alone, rtol=1e-5, atol=1e-9)
        # Compared in order of size, because any of several equal tokens may be kept. Where a sum
        # rounds to the other side of top_p, one token at the edge may be kept or not.
        expected = nucleus_by_definition(logits[row], its_own, top_p).sort(descending=True).values
        ours = p[row].double().sort(descending=True).values
        assert (ours - expected).abs().sum() <= 2 * expected[expected > 0].min() + 1e-5
        kept, dropped = logits[row, p[row] > 0], logits[row, p[row] == 0]
        assert not len(dropped) or dropped.max() <= kept.min() + 1e-4   # the most likely are kept


def test_a_flat_row_takes_nothing_from_its_peaked_neighbour():
    """A fault that was found: the padding of the peaked row had id 0.

    So a zero was written over the probability of the real token 0.
    """
    logits = torch.zeros(2, 1000)
    logits[0, 0], logits[0, 1] = 12.0, 11.0
    p = model.probabilities(logits, 1.0, 0.95)
    torch.testing.assert_close(p.sum(-1), torch.ones(2))
    second = 1 / (1 + torch.e)
    torch.testing.assert_close(p[0, :2], torch.tensor([1 - second, second]), rtol=1e-4, atol=0)
    values, ids = model.nucleus(torch.softmax(logits, -1), 0.95)
    assert values.shape[1] == 1000
    assert (ids[0, 256:] == 1000).all()
    assert ids[1].sort().values.equal(torch.arange(1000))


def test_the_token_that_crosses_top_p_is_kept():
    whole = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    two = torch.tensor([[0.625, 0.375, 0, 0]])
    three = torch.tensor([[0.5, 0.3, 0.15, 0]]) / 0.95
    for top_p, expected in ((0.79, two), (0.81, three), (1.0, whole)):
        torch.testing.assert_close(model.probabilities(whole.log(), 1.0, top_p), expected)


def test_temperature_per_row_and_zero_is_one_hot():
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    p = model.probabilities(logits, torch.tensor([0.0, 0.5, 2.0]), 0.9)
    assert p[0].tolist() == torch.nn.functional.one_hot(logits[0].argmax(), 40).tolist()
    torch.testing.assert_close(p[1:2], model.probabilities(logits[1:2], 0.5, 0.9))
    torch.testing.assert_close(p[2:3], model.probabilities(logits[2:3], 2.0, 0.9))


def test_sample_follows_p_and_never_draws_what_has_no_probability():
    p = torch.tensor([[0.0, 0.2, 0.0, 0.5, 0.3, 0.0]]).expand(20000, -1)
    counts = model.sample(p, torch.Generator().manual_seed(3)).bincount(minlength=6) / 20000
    assert counts[[0, 2, 5]].sum() == 0
    assert (counts - p[0]).abs().max() < 4 * (0.25 / 20000) ** 0.5


# ---- Files -------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load_return_the_same_weights(dtype, tied, tmp_path):
    llama = tiny_llama(3, vocab=30, tied=tied, layers=2).to(dtype)
    model.save(llama, tmp_path)
    model.save(tiny_llama(3, vocab=30, tied=tied, layers=2), tmp_path / "asked", dtype=dtype)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "asked" / name).read_bytes() == (tmp_path / name).read_bytes()
    again = model.load(tmp_path)
    assert again.config == llama.config and again.norm.weight.dtype == torch.float32
    for before, after in itertools.zip_longest(llama.parameters(), again.parameters()):
        assert torch.equal(before.float(), after)


def test_sharded_files_and_either_place_of_theta_are_read(tmp_path):
    llama = tiny_llama(3, vocab=30, layers=2, rope_theta=777.0)
    model.save(llama, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    weight_map = {}
    for shard, its_names in shards.items():
        save_file({name: tensors[name] for name in its_names}, tmp_path / shard)
        weight_map |= dict.fromkeys(its_names, shard)
    (tmp_path / "model.safetensors").unlink()
    index = json.dumps({"weight_map": weight_map})
    (tmp_path / "model.safetensors.index.json").write_text(index)
    config = json.loads((tmp_path / "config.json").read_text())
    rest = {k: v for k, v in config.items() if k not in ("rope_theta", "rope_parameters")}
    for theta in ({"rope_theta": 777.0},
                  {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}}):
        (tmp_path / "config.json").write_text(json.dumps(rest | theta))
        again = model.load(tmp_path)
        assert again.config.rope_theta == 777.0
        assert all(torch.equal(a, b) for a, b in zip(llama.parameters(), again.parameters()))


def test_damaged_folders_are_refused_in_one_sentence(tmp_path):
    llama = tiny_llama(3, vocab=30)
    model.save(llama, tmp_path / "good")

    def spoiled(name):
        shutil.copytree(tmp_path / "good", tmp_path / name)
        return tmp_path / name

    with pytest.raises(ValueError, match="config.json: no such file"):
        model.load(tmp_path / "nowhere")
    cut = spoiled("cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged or cut short"):
        model.load(cut.parent)
    (spoiled("missing") / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="incomplete"):
        model.load(tmp_path / "missing")
    llama3 = {"rope_type": "llama3", "rope_theta": 1.0}
    for name, keys, message in [("shape", {"hidden_size": 16}, "do not match config.json"),
                                ("scaled", {"rope_parameters": llama3}, "rope_scaling"),
                                ("kind", {"model_type": "gpt2"}, "model_type")]:
        path = spoiled(name) / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))
        with pytest.raises(ValueError, match=message):
            model.load(path.parent)


# ---- The real chat model -----------------------------------------------------------------------

PROSE = ("The water cycle describes how water moves around the Earth. The sun heats the water in "
         "rivers, lakes and oceans, and some of it turns into vapor and rises into the air. This "
         "process is called evaporation. As the vapor rises, it cools and forms tiny drops of "
         "water, which come together to make clouds. This is called condensation. When the drops "
         "become too heavy, they fall back to the ground as rain or snow. The water then flows "
         "into rivers and streams, and the cycle begins again.")


def prose_loss(llama, tokens):
    return torch.nn.functional.cross_entropy(llama(tokens)[0, :-1], tokens[0, 1:]).item()


@pytest.mark.real
def test_the_chat_model_gives_transformers_logits_and_greedy_text():
    import speculate
    from data import tokenizer
    transformers = pytest.importorskip("transformers")
    theirs, llama = reference(TARGET), model.load(TARGET).requires_grad_(False)
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(TARGET)
    tok = tokenizer.load(TARGET)
    tokens = torch.tensor([tok.encode(PROSE)])
    with torch.inference_mode():
        expected = theirs(tokens).logits
        assert close(llama(tokens), expected)
        messages = [{"role": "user", "content": "What is the capital of France?"}]
        prompt = torch.tensor([tok.chat_prompt(messages)])
        text = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24,
                               do_sample=False)
        answer = text[0, prompt.shape[1]:]
        made = speculate.autoregressive_generate(llama, prompt, 24, 0.0, 1.0, tok.eos_ids)
    assert made.tokens == answer.tolist()
    assert "Paris" in tok.decode(made.tokens) and "Paris" in hf_tokenizer.decode(answer)


@pytest.mark.real
def test_plain_english_scores_below_two_nats_and_above_three_without_the_rotary_permutation():
    from data import smollm2, tokenizer
    llama = model.load(TARGET).requires_grad_(False)
    tokens = torch.tensor([tokenizer.load(TARGET).encode(PROSE)])
    with torch.inference_mode():
        assert prose_loss(llama, tokens) < 2
        for block in llama.layers:
            q, k, _ = block.self_attn.qkv_proj.weight.split((9 * 64, 3 * 64, 3 * 64))
            for weight, heads in ((q, 9), (k, 3)):
                undone_again = smollm2.undo_rotary_permutation(weight.numpy(), heads).copy()
                permuted = torch.from_numpy(undone_again)
                assert not torch.equal(permuted, weight)
                weight.copy_(permuted)      # undone twice is as wrong as not undone
        assert prose_loss(llama, tokens) > 3


@pytest.mark.real
def test_weights_equal_transformers_own_gguf_loader():
    transformers = pytest.importorskip("transformers")
    from data import smollm2
    gguf = smollm2.fetch_gguf()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name,
                                                               dtype=torch.float32)
    expected = theirs.state_dict()
    ours = load_file(TARGET / "model.safetensors")
    for name, weight in ours.items():
        assert weight.dtype == torch.float16
        # Rounded to fp16: by 2^-11 of the weight at most, and by 2^-25 where it is very small.
        torch.testing.assert_close(weight.float(), expected[name].float(), rtol=2 ** -11,
                                   atol=2 ** -25, msg=name)


@pytest.mark.real
def test_a_folder_of_the_older_fp32_conversion_is_made_again(tmp_path, monkeypatch):
    from data import smollm2
    shutil.copytree(TARGET, tmp_path / "chat")
    assert smollm2.complete(tmp_path / "chat")
    note = json.loads((tmp_path / "chat" / "provenance.json").read_text())
    note.pop("dtype")                        # the older conversion, to fp32, did not write it
    (tmp_path / "chat" / "provenance.json").write_text(json.dumps(note))
    made = []
    monkeypatch.setattr(smollm2, "convert", lambda gguf, out: made.append(out))
    monkeypatch.setattr(smollm2, "fetch_gguf", lambda: None)
    done = run_script("data/smollm2.py", "--out", tmp_path / "chat")
    assert done.returncode == 0 and made == [tmp_path / "chat"]
    assert "older conversion" in done.stdout


def test_a_tied_head_is_read_under_either_name_and_another_one_is_refused(tmp_path):
    llama = tiny_llama(3, vocab=30, tied=True)
    model.save(llama, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    embedding = weights.pop("model.embed_tokens.weight")
    for extra in ({"lm_head.weight": embedding}, {"model.embed_tokens.weight": embedding,
                                                  "lm_head.weight": embedding.clone()}):
        save_file(weights | extra, tmp_path / "model.safetensors")
        assert torch.equal(model.load(tmp_path).embed_tokens.weight, llama.embed_tokens.weight)
    save_file(weights | extra | {"lm_head.weight": embedding + 1}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="tie_word_embeddings true, but lm_head.weight is not"):
        model.load(tmp_path)


# ---- Padded embeddings -------------------------------------------------------------------------

@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("padding", [0, 1, 27])
def test_padding_rows_of_the_embedding_are_left_out_and_nothing_else_changes(tmp_path, tied,
                                                                             padding):
    """The tokenizer's size is the size of the vocabulary: later rows stand for no token."""
    padded = tiny_llama(3, vocab=37 + padding, layers=2, tied=tied)
    model.save(padded, tmp_path / "padded")
    loaded = model.load(tmp_path / "padded", vocab_size=37)
    assert loaded.config.vocab_size == 37 and loaded.embed_tokens.weight.shape == (37, 8)
    tokens = torch.randint(37, (2, 9), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loaded(tokens), padded(tokens)[..., :37])
    model.save(loaded, tmp_path / "again")        # a model trained from it keeps the smaller size
    assert model.load(tmp_path / "again").config.vocab_size == 37
    assert model.load(tmp_path / "padded").config.vocab_size == 37 + padding
    with pytest.raises(ValueError, match="a tokenizer of 99"):
        model.load(tmp_path / "padded", vocab_size=99)


def test_rows_that_neither_config_nor_tokenizer_state_are_refused(tmp_path):
    model.save(tiny_llama(3, vocab=40), tmp_path / "m")
    keys = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(keys | {"vocab_size": 39}))
    with pytest.raises(ValueError, match="do not match config.json"):
        model.load(tmp_path / "m", vocab_size=37)
