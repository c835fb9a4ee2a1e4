"""Claims about train.py, on tiny models and token files made here."""

import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
import torch.nn.functional as F

import train
from data import files, pretrain_text
from data import tokenizer as tokenizers
from model import Config, KVCache, Llama, load, read_config, save

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--threads", "1", "--steps", "12", "--batch-size", "4", "--context", "16",
         "--save-every", "5", "--eval-every", "4"]
SHAPE = dict(hidden_size=32, intermediate_size=48, num_attention_heads=2)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    """A SentencePiece tokenizer of 200 pieces, trained here on a few sentences."""
    folder = tmp_path_factory.mktemp("tokenizer")
    words = ("the a red green old small river stone bird tree runs sings falls waits under over "
             "near by morning night").split()
    choose = np.random.default_rng(0)
    sentences = [" ".join(choose.choice(words, 8)) + "." for _ in range(300)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_prefix=str(folder / "tokenizer"), vocab_size=200,
        model_type="bpe", hard_vocab_limit=False, minloglevel=2)
    (folder / "tokenizer.vocab").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
         "unk_token": "<unk>", "model_max_length": 512}))
    return folder


def write_data(folder, tokenizer_folder, train_tokens, eval_tokens=None):
    folder.mkdir()
    tokenizer = tokenizers.load(tokenizer_folder)
    eval_tokens = train_tokens if eval_tokens is None else eval_tokens
    np.asarray(train_tokens, "<u2").tofile(folder / "train.bin")
    np.asarray(eval_tokens, "<u2").tofile(folder / "eval.bin")
    (folder / "meta.json").write_text(json.dumps(
        {"vocab_size": tokenizer.vocab_size, "tokenizer_fingerprint": tokenizer.fingerprint}))
    return folder


@pytest.fixture(scope="module")
def random_data(tmp_path_factory, tokenizer_folder):
    size = tokenizers.load(tokenizer_folder).vocab_size
    drawn = np.random.default_rng(1).integers(0, size, 6000)
    folder = tmp_path_factory.mktemp("random") / "data"
    return write_data(folder, tokenizer_folder, drawn[:4000], drawn[4000:])


@pytest.fixture
def run(tokenizer_folder, random_data, tmp_path):
    """Call main() with small settings; later flags win. Returns the rows of log.jsonl."""
    def run(*flags, data=random_data, out=tmp_path / "out", start=("--model", "tiny-drafter")):
        train.main([*start, "--data", str(data), "--tokenizer", str(tokenizer_folder),
                    "--out", str(out), *SMALL, *flags])
        return files.read_jsonl(out / "log.jsonl")
    return run


@pytest.fixture
def refused(run, capsys):
    """Run where one sentence on stderr and exit code 2 are expected; returns the sentence."""
    def refused(*flags, **options):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            files.run(lambda: run(*flags, **options))
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
        return said
    return refused


def without_time(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


# ---- The loss ----------------------------------------------------------------------------------

@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunked_loss_and_gradient_equal_cross_entropy_in_one_piece(tied, chunk, monkeypatch):
    torch.manual_seed(0)
    shape = SHAPE | {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = Llama(Config(vocab_size=61, num_hidden_layers=2, tie_word_embeddings=tied, **shape))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    tokens = torch.randint(61, (3, 10))
    whole = F.cross_entropy(model(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:])
    (0.25 * whole).backward()
    expected = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    rows_at_once, linear = [], F.linear

    def watched(x, weight, *bias):
        if len(weight) == 61:
            rows_at_once.append(len(x))
        return linear(x, weight, *bias)

    monkeypatch.setattr(train.F, "linear", watched)
    loss = train.next_token_loss_backward(model, tokens, scale=0.25, chunk=chunk)
    assert not loss.requires_grad and loss.item() == pytest.approx(whole.item(), rel=1e-6)
    for weight, gradient in zip(model.parameters(), expected):
        torch.testing.assert_close(weight.grad, gradient, rtol=1e-4, atol=1e-6)
    # No more logits than those of one chunk exist at once.
    assert max(rows_at_once) <= chunk and sum(rows_at_once) == 27
    monkeypatch.undo()
    everywhere = torch.ones(1, 10, dtype=torch.bool)
    batches = [(row[None], everywhere) for row in tokens]
    assert train.next_token_loss(model, tokens).item() == pytest.approx(whole.item(), rel=1e-6)
    assert train.evaluate(model, batches) == pytest.approx(whole.item(), rel=1e-6)


def test_gradients_of_several_passes_add_up():
    torch.manual_seed(0)
    model = Llama(Config(vocab_size=61, num_hidden_layers=1, **SHAPE))
    tokens = torch.randint(61, (4, 9))
    train.next_token_loss_backward(model, tokens)
    expected = model.embed_tokens.weight.grad.clone()
    model.zero_grad()
    for half in tokens.split(2):
        train.next_token_loss_backward(model, half, scale=0.5)
    torch.testing.assert_close(model.embed_tokens.weight.grad, expected, rtol=1e-4, atol=1e-7)


LLAMA_2_7B = {  # config.json of Llama 2 Chat 7B as its makers publish it, as far as it is read
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "rope_scaling": None,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pretraining_tp": 1}


def test_the_papers_pair_has_its_sizes_and_one_pass_of_the_target_its_shapes(tmp_path):
    """Without memory: meta tensors have a shape and no numbers.

    The paper calls its drafter 115M and 1.64 %, which is 115 over 7,000. The shape that it lists
    has 116.9 M, which is 1.74 % of what the target has.
    """
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_2_7B))
    with torch.device("meta"):
        target = Llama(read_config(tmp_path)).to(torch.bfloat16)
        draft = Llama(Config(vocab_size=32000, **train.PRESETS["paper-drafter"]))
        tokens = torch.zeros(2, 16, dtype=torch.int64)
    count, layer = draft.parameter_count(), 4 * 1024 ** 2 + 3 * 1024 * 2816 + 2 * 1024
    assert target.parameter_count() == 6_738_415_616
    assert count == 2 * 32000 * 1024 + 4 * layer + 1024 == 116_925_440
    assert round(100 * count / target.parameter_count(), 2) == 1.74 and 115 / 7000 < 0.01645
    assert target(tokens).shape == draft(tokens).shape == (2, 16, 32000)
    caches = [KVCache(llama.config, 2, 20, "meta", llama.norm.weight.dtype)
              for llama in (target, draft)]
    for llama, cache in zip((target, draft), caches):
        assert llama(tokens, cache).is_meta and cache.length == 16
    size = sum(k.numel() + v.numel() for k, v in zip(caches[0].k, caches[0].v))
    assert size == 2 * 20 * 2 * 32 * 4096               # half a MB a token in 2 bytes each


def test_the_papers_drafter_takes_a_training_step():
    torch.manual_seed(0)
    draft = Llama(Config(vocab_size=32000, **train.PRESETS["paper-drafter"]))
    tokens, optimiser = torch.randint(32000, (1, 32)), train.make_optimiser(draft, 1e-3)
    before = train.next_token_loss_backward(draft, tokens)
    optimiser.step()
    assert before.item() == pytest.approx(math.log(32000), abs=0.5)
    with torch.no_grad():
        assert train.next_token_loss(draft, tokens) < before - 0.5


def test_an_untrained_model_scores_the_logarithm_of_its_vocabulary(run, tokenizer_folder):
    size = tokenizers.load(tokenizer_folder).vocab_size
    first = run("--steps", "1")[0]
    assert first["loss"] == pytest.approx(math.log(size), abs=0.1)
    assert first["eval_loss"] == pytest.approx(math.log(size), abs=0.1)


def test_a_predictable_sequence_is_learnt_and_random_tokens_are_not(
        run, tokenizer_folder, tmp_path):
    cycle = write_data(tmp_path / "cycle", tokenizer_folder, np.tile(np.arange(5, 12), 200))
    flags = ("--steps", "120", "--learning-rate", "0.01", "--eval-every", "200")
    learnt = run(*flags, data=cycle, out=tmp_path / "learnt")
    assert learnt[-1]["eval_loss"] < 0.05
    # If the model saw the answer, or were asked for the token that it reads, it would learn random
    # tokens too.
    random = run(*flags, out=tmp_path / "random")
    assert random[-1]["eval_loss"] > random[0]["eval_loss"] - 0.05


def test_windows_lie_inside_the_file_and_reach_both_ends():
    tokens = np.arange(21, dtype="<u2")
    batch = pretrain_text.sample(tokens, 400, 4, torch.Generator().manual_seed(0))
    assert batch.shape == (400, 5)
    assert torch.equal(batch - batch[:, :1], torch.arange(5).expand(400, 5))
    assert batch.min() == 0 and batch.max() == 20
    windows = pretrain_text.spread(tokens, 4, 64)
    assert windows[:, 0].tolist() == [0, 4, 8, 12, 16]
    assert pretrain_text.spread(tokens, 4, 2)[:, 0].tolist() == [0, 16]
    assert pretrain_text.spread(tokens[:5], 4, 64).tolist() == [[0, 1, 2, 3, 4]]


# ---- Optimiser and schedule --------------------------------------------------------------------

def test_weight_decay_shrinks_matrices_only():
    model = Llama(Config(vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2))
    optimiser = train.make_optimiser(model, 0.1, weight_decay=0.5, beta2=0.9)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimiser.step()
    for name, weight in model.named_parameters():
        shrunk = before[name] * (0.95 if weight.dim() == 2 else 1)
        torch.testing.assert_close(weight.detach(), shrunk)
    assert [group["betas"] for group in optimiser.param_groups] == [(0.9, 0.9)] * 2


def test_learning_rate_at_its_corners():
    rate = [train.learning_rate_at(step, 110, 1.0, 0.2, 10) for step in range(130)]
    assert rate[0] == 0.1 and rate[9] == rate[10] == 1.0 and rate[60] == pytest.approx(0.6)
    assert rate[110] == rate[129] == pytest.approx(0.2)
    assert all(a > b for a, b in zip(rate[10:110], rate[11:111]))
    assert train.learning_rate_at(0, 10, 1.0, 0.2, 0) == 1.0  # no warm-up
    assert train.learning_rate_at(1, 2, 1.0, 0.2, 2) == 1.0  # nothing but warm-up


@pytest.fixture
def steps_taken(monkeypatch):
    """Two lists: the gradient's global norm at each optimiser step, and the learning rates that
    its groups of weights had there."""
    norms, rates, step = [], [], torch.optim.AdamW.step

    def watched(self, *rest):
        weights = [weight for group in self.param_groups for weight in group["params"]]
        norms.append(torch.cat([weight.grad.flatten() for weight in weights]).norm().item())
        rates.extend({group["lr"] for group in self.param_groups})
        return step(self, *rest)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    return norms, rates


def test_each_step_uses_the_learning_rate_that_the_log_shows(run, steps_taken):
    rows = run("--learning-rate", "0.5", "--min-learning-rate", "0.1", "--warm-up", "3")
    assert steps_taken[1] == [row["lr"] for row in rows[:12]]
    assert steps_taken[1] == [train.learning_rate_at(step, 12, 0.5, 0.1, 3) for step in range(12)]


def test_the_gradient_is_clipped_to_the_given_norm(run, steps_taken, tmp_path):
    norms = steps_taken[0]
    run("--steps", "3", "--clip", "0.01", out=tmp_path / "clipped")
    run("--steps", "3", "--clip", "0", out=tmp_path / "free")
    assert norms[:3] == pytest.approx([0.01] * 3, rel=1e-3) and min(norms[3:]) > 0.05


def test_accumulated_batches_train_as_one_large_batch(run, steps_taken, tmp_path):
    norms, flags = steps_taken[0], ("--clip", "0", "--batch-size")
    large = run(*flags, "4", out=tmp_path / "large")
    small = run(*flags, "2", "--accumulate", "2", out=tmp_path / "small")
    counts = [row["tokens"] for row in large]
    assert [row["tokens"] for row in small] == counts == [64 * step for step in range(13)]
    expected = [row["loss"] for row in large[:12]]
    assert [row["loss"] for row in small[:12]] == pytest.approx(expected, abs=2e-3)
    # Adam would hide a gradient of twice the size.
    assert norms[12:] == pytest.approx(norms[:12], rel=1e-2)


def test_bfloat16_keeps_the_weights_in_float32(run, tmp_path):
    exact = run("--steps", "5", out=tmp_path / "float32")
    rounded = run("--steps", "5", "--dtype", "bfloat16", out=tmp_path / "bfloat16")
    assert 0 < abs(rounded[-1]["eval_loss"] - exact[-1]["eval_loss"]) < 0.02
    weights = torch.load(tmp_path / "bfloat16" / "training.pt", weights_only=True)["weights"]
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert json.loads((tmp_path / "bfloat16" / "config.json").read_text())["dtype"] == "float32"


# ---- Where a model starts ----------------------------------------------------------------------

def test_embed_from_keeps_the_best_approximation_of_its_rank():
    E = torch.randn(50, 12, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 2, 12)
    U, S, V = torch.linalg.svd(E, full_matrices=False)
    best = U[:, :5] * S[:5] @ V[:5]  # no matrix of rank 5 is nearer to E (Eckart and Young)
    rows, share = train.leading_directions(E, 5)
    energy = (S[:5] ** 2).sum().item() / (S ** 2).sum().item()
    assert rows.shape == (50, 5) and share == pytest.approx(energy, rel=1e-5)
    torch.testing.assert_close(rows @ rows.T, best @ best.T, rtol=1e-4, atol=1e-4)
    # The best that can be made of E from these columns.
    nearest = rows @ torch.linalg.lstsq(rows, E).solution
    torch.testing.assert_close(nearest, best, rtol=1e-4, atol=1e-4)


def test_embed_from_and_init_are_what_training_starts_from(
        run, refused, tokenizer_folder, tmp_path, capsys):
    size = tokenizers.load(tokenizer_folder).vocab_size
    torch.manual_seed(3)
    target = Llama(Config(vocab_size=size, hidden_size=64, intermediate_size=64,
                          num_hidden_layers=1, num_attention_heads=2))
    save(target, tmp_path / "target")
    tokenizers.copy(tokenizer_folder, tmp_path / "target")
    # A learning rate this small leaves the weights as they were.
    run("--embed-from", str(tmp_path / "target"), "--learning-rate", "1e-12",
        out=tmp_path / "drafter")
    rows, share = train.leading_directions(target.embed_tokens.weight.detach(), 48)
    assert f"{share:.1%} of its energy" in capsys.readouterr().out
    started = load(tmp_path / "drafter").embed_tokens.weight.detach()
    scale = started.std() / rows.std()
    assert started.std().item() == pytest.approx(0.02, rel=0.05)
    torch.testing.assert_close(started @ started.T, rows @ rows.T * scale ** 2,
                               rtol=1e-3, atol=1e-6)

    trained = ("--init", str(tmp_path / "drafter"))
    last = files.read_jsonl(tmp_path / "drafter" / "log.jsonl")[-1]
    again = run("--steps", "1", out=tmp_path / "again", start=trained)
    assert again[0]["eval_loss"] == last["eval_loss"]
    # A preset or a folder, not both.
    both = refused(start=(*trained, "--model", "tiny-drafter"), out=tmp_path / "both")
    assert "not allowed with argument --init" in both

    def saved(name, vocab_size, hidden_size):
        config = Config(vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=8,
                        num_hidden_layers=1)
        save(Llama(config), tmp_path / name)
        tokenizers.copy(tokenizer_folder, tmp_path / name)
        return str(tmp_path / name)

    # An embedding that was padded to a round number of rows is cut to the tokenizer's size.
    padded = saved("padded", size + 24, 48)
    run("--steps", "1", out=tmp_path / "from-padded", start=("--init", padded))
    assert load(tmp_path / "from-padded").config.vocab_size == size
    # As many tokens, but others: its rows mean other words.
    other = Path(saved("other", size, 48))
    pieces = (other / "tokenizer.model").read_bytes()
    (other / "tokenizer.model").write_bytes(pieces.replace(b"the", b"tho"))
    assert "another tokenizer than" in refused("--embed-from", str(other))
    assert "another tokenizer than" in refused(start=("--init", str(other)))
    few = saved("few", size - 1, 48)
    assert f"model of {size - 1} tokens" in refused(start=("--init", few))
    assert "cannot start from it" in refused("--embed-from", saved("narrow", size, 32))


# ---- Resume ------------------------------------------------------------------------------------

def test_the_same_seed_gives_the_same_run_and_another_seed_another(run, tmp_path):
    losses = [without_time(run("--seed", seed, out=tmp_path / f"out{i}"))
              for i, seed in enumerate("112")]
    assert losses[0] == losses[1] != losses[2]


def killed(tokenizer_folder, data, out, at, where):
    """Run train.py in a process of its own that is killed (SIGKILL) at the `at`-th call of the
    function `where`."""
    program = f"""
import os, signal, train
calls, function = [], train.{where}
def watched(*given):
    calls.append(1)
    if len(calls) == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*given)
train.{where} = watched
train.main()"""
    argv = ["--model", "tiny-drafter", "--data", str(data), "--tokenizer", str(tokenizer_folder),
            "--out", str(out), *SMALL]
    ended = subprocess.run([sys.executable, "-c", program, *argv], cwd=ROOT, capture_output=True,
                           text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr


def test_a_killed_run_resumes_to_the_losses_of_an_unbroken_one(
        run, tokenizer_folder, random_data, tmp_path):
    unbroken = run(out=tmp_path / "unbroken")
    broken = tmp_path / "broken"
    # In step 8, three after the save.
    killed(tokenizer_folder, random_data, broken, at=9, where="next_token_loss_backward")
    assert [row["step"] for row in files.read_jsonl(broken / "log.jsonl")] == list(range(8))
    with open(broken / "log.jsonl", "a") as log:
        log.write('{"step": 8, "lo')  # half a line, as a kill may leave it
    resumed = run("--resume", out=broken)
    assert without_time(resumed) == without_time(unbroken)  # bit for bit, each step once
    seconds = [row["seconds"] for row in resumed]
    assert seconds == sorted(seconds)
    for name in ("model.safetensors", "config.json"):
        assert (broken / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes()


def test_a_kill_between_the_two_files_of_a_checkpoint_does_no_harm(
        run, tokenizer_folder, random_data, tmp_path):
    unbroken = run(out=tmp_path / "unbroken")
    broken = tmp_path / "broken"
    # Then training.pt is of step 10, and the model of step 5.
    killed(tokenizer_folder, random_data, broken, at=2, where="model.save")
    assert torch.load(broken / "training.pt", weights_only=True)["step"] == 10
    assert without_time(run("--resume", out=broken)) == without_time(unbroken)


def test_a_failing_save_leaves_the_last_good_checkpoint(run, refused, monkeypatch, tmp_path):
    def disk_full(state, path):
        if state["step"] < 10:
            return write(state, path)
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    unbroken, write = run(out=tmp_path / "unbroken"), torch.save
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", disk_full)
        assert "No space left" in refused()
    out = tmp_path / "out"
    assert torch.load(out / "training.pt", weights_only=True)["step"] == 5
    assert not list(out.glob("*.tmp"))
    assert without_time(run("--resume")) == without_time(unbroken)


def test_resuming_a_finished_run_changes_nothing_and_completes_its_folder(run, tmp_path):
    finished = run()
    trained = tmp_path / "out" / "model.safetensors"
    before = trained.read_bytes()
    trained.unlink()  # as if killed between the two files of the last checkpoint
    assert without_time(run("--resume")) == without_time(finished)
    assert trained.read_bytes() == before


def test_resume_refuses_settings_that_would_change_the_result(
        run, refused, tmp_path, tokenizer_folder):
    run()
    assert "learning_rate was 0.001, now 0.002" in refused("--resume", "--learning-rate", "0.002")
    assert "hidden_size was 48, now 128" in refused("--resume", "--model", "tiny-target")
    other = write_data(tmp_path / "other", tokenizer_folder, np.arange(60, 160))
    assert "data was " in refused("--resume", data=other)
    assert "accumulate was 1, now 2" in refused("--resume", "--accumulate", "2")
    run("--resume", "--save-every", "3", "--eval-every", "100")  # these decide nothing
    (tmp_path / "out" / "training.pt").write_bytes(b"half")
    assert "not a readable checkpoint" in refused("--resume")


def test_a_start_of_the_same_name_and_other_content_is_another_start(
        run, refused, tmp_path, tokenizer_folder):
    """--init and --embed-from are what their files hold, wherever they lie."""
    size = tokenizers.load(tokenizer_folder).vocab_size

    def write(seed):
        torch.manual_seed(seed)
        save(Llama(Config(vocab_size=size, num_hidden_layers=1, **SHAPE | {"hidden_size": 48})),
             tmp_path / "start")
        tokenizers.copy(tokenizer_folder, tmp_path / "start")

    for name, model in (("init", ()), ("embed_from", ("--model", "tiny-drafter"))):
        flags = {"start": (*model, f"--{name.replace('_', '-')}", str(tmp_path / "start")),
                 "out": tmp_path / name}
        write(1)
        run(**flags)
        write(2)
        assert f"({name} was content " in refused("--resume", **flags)
        write(1)
        moved = (tmp_path / "start").rename(tmp_path / f"moved-{name}")
        run("--resume", **flags | {"start": (*model, flags["start"][-2], str(moved))})


def test_text_to_evaluate_on_is_a_part_of_what_is_trained_on(run, refused, tmp_path, random_data):
    data = shutil.copytree(random_data, tmp_path / "data")
    run(data=data)
    with open(data / "eval.bin", "r+b") as file:
        file.write(b"\x01\x00")
    assert "(data was " in refused("--resume", data=data)


def test_other_conversations_or_another_template_are_refused(
        chat_folder, sentencepiece_folder, tmp_path):
    chat = shutil.copy(chat_folder, tmp_path / "chat.jsonl")
    tok = shutil.copytree(sentencepiece_folder, tmp_path / "tok")
    tune(chat, tok, tmp_path / "out")
    rows = files.read_jsonl(chat)
    files.write_jsonl(chat, [rows[0] | {"response": "another"}, *rows[1:]])
    with pytest.raises(ValueError, match="chat was "):
        tune(chat, tok, tmp_path / "out", "--resume")
    files.write_jsonl(chat, rows)
    config = json.loads((tok / "tokenizer_config.json").read_text())
    config["chat_template"] += "<|end|>"
    (tok / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="chat was "):
        tune(chat, tok, tmp_path / "out", "--resume")


def test_the_largest_seed_orders_batches():
    examples = [train.Example([1, 2], 1)] * 5
    assert len(train.batch_at(examples, 2, 9 * 10 ** 18, 7)) in (1, 2)


# ---- Bad input ---------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("flags", [(), ("--resume",)])
def test_a_model_that_no_training_made_is_left_alone(refused, tmp_path, name, flags):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("precious")
    said = refused(*flags)
    assert f"{out} already holds a model: --resume goes on with one that has its training" in said
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [(name, "precious")]


def test_an_existing_model_is_not_overwritten(run, refused, tmp_path):
    rows = run()
    assert "--resume goes on" in refused()
    assert files.read_jsonl(tmp_path / "out" / "log.jsonl") == rows


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_checkpoint(
        run, refused, monkeypatch, tmp_path):
    assert "is nan at step 1" in refused("--learning-rate", "1e25", out=tmp_path / "hot")
    assert not (tmp_path / "hot" / "training.pt").exists()

    losses, real = [], train.next_token_loss_backward

    def fails_at_step_8(*given):
        losses.append(real(*given))
        return losses[-1] * (math.nan if len(losses) == 9 else 1)

    monkeypatch.setattr(train, "next_token_loss_backward", fails_at_step_8)
    said = refused()
    for part in ("nan at step 8", "lower --learning-rate", "is from before"):
        assert part in said
    assert torch.load(tmp_path / "out" / "training.pt", weights_only=True)["step"] == 5


def test_bad_input_is_one_sentence(refused, tokenizer_folder, tmp_path, random_data):
    assert "no such file; python data/pretrain_text.py writes" in refused(data=tmp_path / "none")
    # eval.bin holds exactly 2000: one too few.
    assert "lower --context" in refused("--context", "2000")
    assert "--steps is 0; expected a whole number at least 1" in refused("--steps", "0")
    assert "float16" in refused("--dtype", "float16")

    wrong = write_data(tmp_path / "wrong", tokenizer_folder, np.arange(100))
    (wrong / "meta.json").write_text('{"tokenizer_fingerprint": "another"}')
    assert "was written with tokenizer another" in refused(data=wrong)
    (wrong / "meta.json").write_text("[")
    assert "meta.json" in refused(data=wrong)
    large = write_data(tmp_path / "large", tokenizer_folder, np.arange(1000))
    assert "outside the tokenizer's" in refused(data=large)


def test_the_script_itself_exits_with_2_and_no_traceback(tmp_path):
    ended = subprocess.run([sys.executable, "train.py", "--tokenizer", str(tmp_path / "none"),
                            "--out", str(tmp_path / "out")],
                           cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ") and "Traceback" not in ended.stderr


# ---- What comes out ----------------------------------------------------------------------------

def test_the_log_and_the_folder_hold_what_they_should(run, tokenizer_folder, tmp_path, capsys):
    rows = run()
    assert [row["step"] for row in rows] == list(range(13))
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 4, 5, 8, 10, 12]
    assert all(set(row) >= {"step", "loss", "lr", "tokens", "seconds"} for row in rows)
    assert rows[-1]["loss"] is None and rows[-1]["lr"] == pytest.approx(1e-4)
    config = load(tmp_path / "out").config
    # The tokenizer came along.
    assert config.vocab_size == tokenizers.load(tmp_path / "out").vocab_size
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)
    assert config.max_position_embeddings == 512
    said = capsys.readouterr().out
    assert "12/12 steps" in said and "tokens/s" in said
    assert said.splitlines()[-1].startswith("next: python distill.py generate --target")


@pytest.mark.real
def test_a_trained_folder_opens_in_transformers(run, tmp_path):
    import transformers

    chat_model = ROOT / "models" / "smollm2-135m-instruct"
    data = write_data(tmp_path / "data", chat_model, np.arange(1000, 1200))
    run("--tokenizer", str(chat_model), "--steps", "3", "--learning-rate", "0.03", data=data)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": "user", "content": "Name three rivers."}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert prompt == tokenizers.load(tmp_path / "out").chat_prompt(messages)
    tokens = torch.tensor([prompt])
    with torch.no_grad():
        ours = load(tmp_path / "out")(tokens)
        torch.testing.assert_close(ours, theirs(tokens).logits, rtol=1e-4, atol=1e-4)
    end = tokenizer.eos_token_id
    assert theirs.generation_config.eos_token_id == theirs.config.eos_token_id == end


# ---- Chat tuning -------------------------------------------------------------------------------

def conversation(question, answer):
    return {"messages": [{"role": "user", "content": question}], "response": answer}


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory, sentencepiece_folder):
    """Conversations whose answer is the question's first word twice, with a tokenizer that has
    chat markers."""
    path = tmp_path_factory.mktemp("chat") / "chat.jsonl"
    words = ("quick brown fox jumps lazy dog small models draft large check count ten hello there "
             "answer now").split()
    files.write_jsonl(path, [conversation(f"{word} {other}", f"{word} {word}")
                             for word in words for other in words])
    return path


def tune(chat, tokenizer_folder, out, *flags):
    train.main(["--model", "tiny-drafter", "--chat", str(chat), "--tokenizer",
                str(tokenizer_folder), "--out", str(out), *SMALL, *flags])
    return files.read_jsonl(out / "log.jsonl")


def test_chat_tuning_counts_the_loss_of_the_answer_alone(
        chat_folder, sentencepiece_folder, tmp_path):
    tok = tokenizers.load(sentencepiece_folder)
    examples = train.read_examples(chat_folder, tok, 64)[:5]
    tokens, is_answer = train.collate(examples, "cpu")
    torch.manual_seed(0)
    model = Llama(Config(vocab_size=tok.vocab_size, num_hidden_layers=1, **SHAPE))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    # Each conversation by itself, its answer and the end token cut out by hand.
    alone = []
    for example in examples:
        logits = model(torch.tensor([example.tokens]))[0, example.first - 1:-1]
        answer = tok.encode(tok.decode(example.tokens[example.first:-1])) + [tok.eos_id]
        assert answer == example.tokens[example.first:]
        alone.append(F.cross_entropy(logits, torch.tensor(answer), reduction="none"))
    expected = torch.cat(alone).mean()
    gradient = torch.autograd.grad(expected, model.embed_tokens.weight)[0]
    loss = train.next_token_loss_backward(model, tokens, is_answer, chunk=3)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(model.embed_tokens.weight.grad, gradient, rtol=1e-4, atol=1e-6)
    halves = [train.collate(examples[:2], "cpu"), train.collate(examples[2:], "cpu")]
    assert train.evaluate(model, halves) == pytest.approx(expected.item(), rel=1e-5)


def test_chat_tuning_learns_to_answer_and_resumes_exactly(
        chat_folder, sentencepiece_folder, tmp_path, monkeypatch):
    def tuned(name, *flags):
        return tune(chat_folder, sentencepiece_folder, tmp_path / name, *flags)

    rows = tuned("whole", "--steps", "80", "--learning-rate", "0.01", "--eval-every", "100",
                 "--batch-size", "16")
    assert rows[-1]["eval_loss"] < 0.6 * rows[0]["eval_loss"]
    unbroken = without_time(tuned("unbroken", "--save-every", "4"))

    def killed(loss, step, out, check=train.require_finite):
        check(loss, step, out)
        if step == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "require_finite", killed)
        tuned("broken", "--save-every", "4")
    assert without_time(tuned("broken", "--save-every", "4", "--resume")) == unbroken


def test_a_batch_is_one_mean_however_many_passes_it_takes(
        tmp_path, sentencepiece_folder, steps_taken, monkeypatch):
    """Answers of 2 to 30 tokens: each pass must count by its positions, not as one of four or of
    sixteen."""
    def in_order(examples, size, seed, number):
        return examples[number * size:(number + 1) * size]

    rows = [conversation(f"count {i}", "on and " * (1 if i % 4 else 12) + "stop")
            for i in range(200)]
    files.write_jsonl(tmp_path / "chat.jsonl", rows)
    monkeypatch.setattr(train, "batch_at", in_order)
    norms, logs = steps_taken[0], []
    for batch, accumulate in ((16, 1), (4, 4), (1, 16)):
        logs.append(tune(tmp_path / "chat.jsonl", sentencepiece_folder, tmp_path / f"out{batch}",
                         "--batch-size", str(batch), "--accumulate", str(accumulate),
                         "--clip", "0", "--context", "96", "--steps", "3"))
    losses, counts = ([row[key] for row in logs[0]] for key in ("loss", "tokens"))
    for pieces, log in enumerate(logs):
        assert norms[3 * pieces:3 * pieces + 3] == pytest.approx(norms[:3], rel=1e-3)
        assert [row["loss"] for row in log[:3]] == pytest.approx(losses[:3], rel=1e-4)
        assert [row["tokens"] for row in log] == counts


def test_all_answers_to_a_prompt_are_held_out_together():
    for per_prompt, count in ((1, 9), (2, 9), (3, 32)):
        examples = [train.Example([1, prompt, 2, 10 + k], 3)
                    for prompt in range(100) for k in range(per_prompt)]
        training, held_out = train.hold_out(examples, count)
        assert len(training) + len(held_out) == len(examples)
        sides = [{tuple(e.tokens[:e.first]) for e in side} for side in (training, held_out)]
        assert not sides[0] & sides[1]
        assert len(sides[1]) == math.ceil(100 / math.ceil(100 / count))
        assert len(held_out) == per_prompt * len(sides[1])
    # Documents begin with nothing but the start token: they have no prompt in common.
    documents = [train.Example([1, 5 + i, 7], 1) for i in range(40)]
    assert len(train.hold_out(documents, 10)[1]) == 10
    with pytest.raises(ValueError, match="100 prompts"):
        train.hold_out(examples, 100)


def test_every_conversation_comes_once_an_epoch(chat_folder, sentencepiece_folder):
    examples = train.read_examples(chat_folder, tokenizers.load(sentencepiece_folder), 64)[:100]
    numbers = range(math.ceil(100 / 7))

    def epoch(k):
        batches = [train.batch_at(examples, 7, 0, k * len(numbers) + i) for i in numbers]
        return [id(e) for batch in batches for e in batch]

    first, second = epoch(0), epoch(1)
    assert sorted(first) == sorted(second) == sorted(id(e) for e in examples)
    assert first != second
    training, held_out = train.hold_out(examples, 9)
    assert not {id(e) for e in training} & {id(e) for e in held_out}
    assert len(training) + len(held_out) == 100
    assert 8 <= len(held_out) <= 9
