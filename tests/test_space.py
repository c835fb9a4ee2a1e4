"""Bad input of every kind, over spaces of it: whatever comes in, it works, or one sentence says why
not. Never another exception, never a hang."""

import gzip
import json
import math
import shutil
import sys

import pytest
import torch
from conftest import tiny_llama

import distill
import losses
import model
import speculate
import train
from data import files, tokenizer

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies
five_hundred = hypothesis.settings(max_examples=500, deadline=None, database=None, derandomize=True)

NUMBERS = st.one_of(st.integers(-3, 3), st.integers(), st.floats(),
                    st.sampled_from([10 ** 7, 1e308, 2 ** 63]))
JSON = st.recursive(st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=5)),
                    lambda inner: st.lists(inner, max_size=3)
                    | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=6)


def works_or_says_why(function, *args):
    """What function(*args) returns; None where it refuses, in a sentence of one line or few."""
    try:
        return function(*args)
    except (ValueError, OSError) as error:
        assert str(error).strip() and len(str(error)) < 2000, repr(error)
        return None


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a small model, to be spoiled in a copy of its own."""
    folder = tmp_path_factory.mktemp("saved")
    model.save(tiny_llama(0, vocab=12, layers=2), folder)
    return folder


def spoil(folder, copy, name, content):
    """A copy of the folder in which the file `name` has another content."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    (copy / name).write_bytes(content)
    return copy


def test_any_config_json_loads_and_runs_or_is_refused(saved, tmp_path):
    keys = json.loads((saved / "config.json").read_text())
    names = st.sampled_from([*keys, "rope_scaling", "rope_theta", "vocab_size"])

    @five_hundred
    @hypothesis.given(st.dictionaries(names, JSON, min_size=1, max_size=2),
                      st.lists(st.sampled_from([*keys]), max_size=1))
    def check(changed, dropped):
        config = {key: value for key, value in (keys | changed).items() if key not in dropped}
        folder = spoil(saved, tmp_path / "copy", "config.json", json.dumps(config).encode())
        if (llama := works_or_says_why(model.load, folder)) is not None:
            assert llama(torch.tensor([[1, 2, 3]])).shape == (1, 3, llama.config.vocab_size)

    check()


def test_any_damage_to_a_file_of_weights_is_refused_or_harmless(saved, tmp_path):
    whole = (saved / "model.safetensors").read_bytes()

    @five_hundred
    @hypothesis.given(st.integers(0, len(whole)), st.binary(max_size=8), st.booleans())
    def check(at, more, cut):
        content = whole[:at] + more + (b"" if cut else whole[at + len(more):])
        folder = spoil(saved, tmp_path / "copy", "model.safetensors", content)
        llama = works_or_says_why(model.load, folder)
        if llama is not None:
            works_or_says_why(model.probabilities, llama(torch.tensor([[1, 2]]))[0])

    check()


def test_any_index_of_shards_is_refused_or_harmless(saved, tmp_path):
    @five_hundred
    @hypothesis.given(JSON | st.fixed_dictionaries({"weight_map": JSON}))
    def check(index):
        name = "model.safetensors.index.json"
        works_or_says_why(model.load, spoil(saved, tmp_path / "copy", name,
                                            json.dumps(index).encode()))

    check()


ROWS = st.fixed_dictionaries({}, optional={
    "id": JSON, "task": JSON, "prompt": JSON, "messages": JSON | st.lists(st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "<|end|>"]), "content": JSON}) |
        st.sampled_from(["hi", {"from": "human", "value": "hi"}, {"role": "user"}]), max_size=3),
    "response": JSON | st.just("yes\ud800"),
    "response_ids": JSON | st.lists(NUMBERS, max_size=4), "temperature": JSON, "ended": JSON})
LINES = st.one_of(ROWS.map(lambda row: json.dumps(row).encode()), JSON.map(
    lambda row: json.dumps(row, ensure_ascii=True).encode()), st.binary(max_size=20),
    st.just(b"[" * 100_000), st.just('{"prompt": "gr\u00fc\u00df"}'.encode("latin-1")),
    st.just(b'{"prompt": "\\ud83d"}'))


def test_any_lines_are_read_as_prompts_records_and_openings_or_refused(tmp_path,
                                                                       sentencepiece_folder):
    tok = tokenizer.load(sentencepiece_folder)

    @five_hundred
    @hypothesis.given(st.lists(LINES, max_size=3), st.booleans(), st.integers(0, 30))
    def check(lines, packed, cut):
        path = tmp_path / ("rows.jsonl.gz" if packed else "rows.jsonl")
        content = b"\n".join(lines)
        path.write_bytes(gzip.compress(content)[:-cut or None] if packed else content)
        prompts = works_or_says_why(files.read_prompts, path)
        if prompts is not None:
            for prompt in prompts:
                works_or_says_why(tok.chat_prompt, prompt["messages"])
            files.write_jsonl(tmp_path / "again.jsonl", prompts)
        works_or_says_why(files.read_openings, path)
        examples = works_or_says_why(train.read_examples, path, tok, 32)
        for e in examples or []:
            assert 0 < e.first < len(e.tokens) <= 32
            assert all(0 <= token < tok.vocab_size for token in e.tokens)

    check()


def test_a_line_without_an_end_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LONGEST", 1000)
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "' + b"a" * 10 ** 6 + b'"}\n'))
    with pytest.raises(ValueError, match="bomb.jsonl.gz, line 1: .*longer than 64 MB"):
        files.read_jsonl(path)


def test_any_checkpoint_is_read_or_refused(tmp_path):
    torch.save({"settings": {"steps": 1}, "step": 0, "weights": {}}, tmp_path / "training.pt")
    whole = (tmp_path / "training.pt").read_bytes()

    @five_hundred
    @hypothesis.given(st.integers(0, len(whole)), st.binary(max_size=8), st.booleans())
    def check(at, more, cut):
        content = whole[:at] + more + (b"" if cut else whole[at + len(more):])
        (tmp_path / "training.pt").write_bytes(content)
        works_or_says_why(train.read_checkpoint, tmp_path, {"steps": 1})

    check()


# ---- Flags -------------------------------------------------------------------------------------

VALUES = st.one_of(NUMBERS.map(str), st.sampled_from(
    ["nan", "inf", "-inf", "1e-38", "1e400", "", "auto", "kld", "٣", "0x10", "1_000", "-0", " 1"]),
    st.text(max_size=4))
SCRIPTS = {
    "train.py": (train.parse, []),
    "generate": (distill.make_parser().parse_args,
                 ["generate", "--target", "T", "--documents", "1", "--out", "O"]),
    "finetune": (distill.make_parser().parse_args,
                 ["finetune", "--target", "T", "--draft", "D", "--data", "R", "--out", "O"]),
    "compare": (distill.make_parser().parse_args, ["compare"])}


def flags_of(parse, given, capsys):
    """The names of all flags that a parser knows, from its usage."""
    with pytest.raises(SystemExit):
        parse([*given, "--help"])
    words = capsys.readouterr().out.replace("[", " ").replace("]", " ").split()
    return sorted({word for word in words if word.startswith("--") and word != "--help"})


@pytest.mark.parametrize("script", SCRIPTS)
def test_any_value_of_any_flag_is_a_number_within_bounds_or_refused(script, capsys, monkeypatch,
                                                                    tmp_path):
    monkeypatch.chdir(tmp_path)
    parse, given = SCRIPTS[script]
    names = flags_of(parse, given, capsys)
    assert len(names) > 15

    @five_hundred
    @hypothesis.given(st.sampled_from(names), VALUES)
    def check(name, value):
        args = works_or_says_why(parse, [*given, f"{name}={value}"])
        found = getattr(args, name[2:].replace("-", "_"), None)
        for number in found if isinstance(found, list) else [found]:
            if isinstance(number, (int, float)):
                assert math.isfinite(number) and number >= 0

    check()


def test_any_flag_of_speculate_is_within_bounds_or_refused(monkeypatch):
    names = ["--gamma", "--temperature", "--top-p", "--max-new-tokens", "--limit", "--seed",
             "--threads", "--verify", "--trace", "--dtype", "--device"]

    @five_hundred
    @hypothesis.given(st.sampled_from(names), VALUES)
    def check(name, value):
        monkeypatch.setattr(sys, "argv", ["speculate.py", f"{name}={value}"])
        args = works_or_says_why(speculate.parse)
        if args is not None:
            assert args.temperature >= 0 and 0 < args.top_p <= 1 and args.max_new_tokens >= 1
            assert 0 <= args.threads <= 1024 and 0 <= args.seed < 2 ** 63

    check()


# ---- Numbers inside ----------------------------------------------------------------------------

@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 0.7, torch.tensor([0.0, 0.7])])
def test_logits_that_are_not_finite_are_called_that(value, temperature):
    logits = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    logits[1] = value
    for top_p in (1.0, 0.9):
        p = model.probabilities(logits, temperature, top_p)
        tokens = model.sample(p)
        assert p[0].isfinite().all() and 0 <= tokens.min() <= tokens.max() < 9
        assert model.fetch(tokens[:1], p[:1].sum(-1))[0] == tokens[:1].tolist()
        with pytest.raises(ValueError, match="not finite"):
            model.fetch(tokens, p.sum(-1))


def test_the_smallest_temperatures_are_greedy_decoding():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    for temperature in (1e-38, 1e-45, 1e-9, torch.tensor([1e-38, 1e-9, 1e-30, 0.0])):
        torch.testing.assert_close(model.probabilities(logits, temperature),
                                   model.probabilities(logits, 0.0))


BODIES = ["raise SystemExit(3)", "return None", "return draft_logits.sum()", "return 3.0",
          "return draft_logits.sum(-1) * float('nan')", "return draft_logits.detach().sum(-1)",
          "return (draft_logits - target_logits).sum(-1)", "import nothing_of_this_name",
          "return draft_logits[:, :3]", "return draft_logits.sum(-1).long()", "assert False",
          "return (x for x in ())", "raise KeyboardInterrupt"[:0] or "1 / 0"]


@pytest.mark.parametrize("body", BODIES)
def test_any_students_loss_is_refused_in_a_sentence(body, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(f"def mine(draft_logits, target_logits):\n    {body}\n")
    with pytest.raises(ValueError, match="mine.py"):
        losses.choose(f"{path}:mine")


def test_a_students_file_may_hold_a_dataclass_and_may_not_end_the_program(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from dataclasses import dataclass\n\n@dataclass\nclass Settings:\n"
                    "    power: 'float' = 2.0\n\n"
                    "def mine(draft_logits, target_logits):\n"
                    "    gap = draft_logits.float() - target_logits.detach().float()\n"
                    "    return gap.abs().pow(Settings().power).sum(-1)\n")
    assert losses.choose(f"{path}:mine")(torch.ones(2, 3), torch.zeros(2, 3)).tolist() == [3, 3]
    path.write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(ValueError, match="fails when read"):
        losses.choose(f"{path}:mine")


def test_a_loss_that_is_a_scalar_later_on_is_refused_then():
    """It passed the first try, on 64 positions; a scalar would be summed in silence."""
    class States:
        def read(self, batch):
            return torch.randn(sum(e.count for e in batch), 8)

    def fickle(draft_logits, target_logits):
        loss = (draft_logits - target_logits.detach()).pow(2).sum(-1)
        return loss if len(loss) == 64 else loss.mean()

    losses.check(fickle, "mine.py:fickle")
    target, draft = tiny_llama(0, vocab=7), tiny_llama(1, vocab=7).requires_grad_()
    batch = [train.Example([1, 2, 3, 4, 5], 2)]
    with pytest.raises(ValueError, match="one number for each"):
        distill.distillation_backward(draft, target, States(), batch, fickle)


def test_options_of_the_sampled_losses_are_refused_where_none_is_compared(capsys, tmp_path):
    for flags in (["--baseline", "batch"], ["--samples", "4"]):
        args = distill.make_parser().parse_args(["compare", "--losses", "kld", "tvd", *flags,
                                                 "--out", str(tmp_path / "out")])
        with pytest.raises(ValueError, match="for the sampled losses, not for kld"):
            distill.compare(args)


# ---- Two sizes ---------------------------------------------------------------------------------

def test_any_padding_of_an_embedding_is_left_out_and_any_tokenizer_too_large_refused(tmp_path):
    tokens = torch.tensor([[0, 2, 1]])

    @five_hundred
    @hypothesis.given(st.integers(3, 20), st.integers(0, 9), st.booleans(), st.integers(0, 5))
    def check(size, padding, tied, seed):
        whole = tiny_llama(seed, vocab=size + padding, tied=tied)
        model.save(whole, tmp_path)
        loaded = model.load(tmp_path, vocab_size=size)
        assert loaded.config.vocab_size == size == len(loaded.head_weight())
        torch.testing.assert_close(loaded(tokens), whole(tokens)[..., :size])
        with pytest.raises(ValueError, match="tokenizer"):
            model.load(tmp_path, vocab_size=size + padding + 1)

    check()
