"""Speculative decoding is lossless: the one claim that must never break.

The texts of a tiny world (3 tokens, 7 places, 2,187 possible texts) are sampled by the loop and compared, by
chi-square, with their exact probabilities, which are enumerated with whole, uncached passes of the target.
"""

import inspect
import itertools
import json
from collections import Counter

import pytest
import torch

import model
import speculate
from conftest import assert_refused, run_process, run_script, tiny_llama
from data import files

PROMPT, LENGTH, SAMPLES = [1, 0, 2], 7, 350


def exact_distribution(target, temperature, top_p):
    """{text: probability} of every text of LENGTH tokens, by brute force and without a cache."""
    texts = torch.tensor(list(itertools.product(range(target.config.vocab_size), repeat=LENGTH)))
    prompt = torch.tensor(PROMPT).expand(len(texts), -1)
    logits = target(torch.cat((prompt, texts), 1))[:, len(PROMPT) - 1:-1]                # (texts, LENGTH, V)
    p = independent_shape(logits.double(), temperature, top_p)
    chosen = p.gather(-1, texts[..., None])[..., 0].prod(1)
    return {tuple(text): value for text, value in zip(texts.tolist(), chosen.tolist())}


def independent_shape(logits, temperature, top_p):
    """Temperature, then top-p, written again in the plainest way: a full sort."""
    p = torch.softmax(logits / temperature, -1)
    values, order = p.sort(dim=-1, descending=True, stable=True)
    values = values * ((values.cumsum(-1) - values) < top_p)
    p = torch.zeros_like(p).scatter(-1, order, values)
    return p / p.sum(-1, keepdim=True)


def chi_square_p_value(counts, expected):
    """Upper tail of chi-square; cells that expect fewer than 5 are pooled. An impossible text is a failure outright."""
    assert all(expected[text] > 0 for text in counts), "a text of probability 0 was generated"
    total = sum(counts.values())
    cells = [(counts.get(text, 0), total * p) for text, p in expected.items() if p > 0]
    large = [cell for cell in cells if cell[1] >= 5]
    small = [cell for cell in cells if cell[1] < 5]
    if small:
        large.append((sum(c for c, _ in small), sum(e for _, e in small)))
    statistic = sum((c - e) ** 2 / e for c, e in large)
    degrees = len(large) - 1
    return torch.special.gammaincc(torch.tensor(degrees / 2, dtype=torch.float64),
                                   torch.tensor(statistic / 2, dtype=torch.float64)).item()


def adversary(target):
    """A drafter that puts all but nothing on what the target likes least: its q is 0 or 1 after rounding."""
    draft = model.Llama(target.config).requires_grad_(False)
    draft.load_state_dict(target.state_dict())
    draft.lm_head.weight.mul_(-60)
    return draft


TARGET = tiny_llama(0, std=0.6)
DRAFTERS = {"equal": TARGET, "unrelated": tiny_llama(1, std=0.6), "adversarial": adversary(TARGET)}
SHAPES = [(1.0, 1.0), (0.6, 1.0), (1.5, 0.8)]
SETTINGS = list(itertools.product(DRAFTERS, (1, 3, 5), SHAPES))


def measure(generate, drafter, gamma, temperature, top_p, seed=0, samples=SAMPLES):
    """p-value of `samples` texts against the exact distribution, and how often each kind of token occurred."""
    generator = torch.Generator().manual_seed(seed)
    counts, kinds = Counter(), Counter()
    for _ in range(samples):
        made = generate(TARGET, DRAFTERS[drafter], torch.tensor([PROMPT]), LENGTH, gamma, temperature, top_p, (), generator)
        counts[tuple(made.tokens)] += 1
        kinds.update(made.kinds)
    return chi_square_p_value(counts, exact_distribution(TARGET, temperature, top_p)), kinds


@pytest.mark.parametrize("drafter, gamma, shape", SETTINGS)
def test_speculative_sampling_matches_the_target_distribution(drafter, gamma, shape):
    p_value, kinds = measure(speculate.speculative_generate, drafter, gamma, *shape)
    print(f"p-value {p_value:.4f}", end=" ")   # pytest -rP lists them
    # Nothing is proved where nothing was drafted, or where one of the loop's branches was never taken.
    if drafter == "equal":
        assert kinds["accepted"] > 0.4 * SAMPLES * LENGTH and kinds["corrected"] == 0 and kinds["bonus"] > 0
    elif drafter == "unrelated":
        assert min(kinds[kind] for kind in ("accepted", "corrected", "bonus")) > 100, kinds
    else:
        assert kinds["corrected"] > 0.3 * SAMPLES * LENGTH, kinds
    assert p_value * len(SETTINGS) > 0.01      # Bonferroni: 27 true hypotheses fail this together once in a hundred seeds


def test_a_drafter_with_a_vocabulary_of_its_own_changes_no_probability(monkeypatch):
    draft = model.Llama(TARGET.config).requires_grad_(False)
    draft.load_state_dict(DRAFTERS["unrelated"].state_dict())
    draft.draft_vocabulary = torch.tensor([2, 0])                 # it can never propose token 1
    monkeypatch.setitem(DRAFTERS, "part", draft)
    assert (model.probabilities(draft(torch.tensor([PROMPT]))[0])[:, 1] == 0).all()
    p_value, kinds = measure(speculate.speculative_generate, "part", 3, 1.0, 1.0)
    assert min(kinds[kind] for kind in ("accepted", "corrected", "bonus")) > 100 and p_value > 0.001, (kinds, p_value)


# ---- A vocabulary above 256, peaked and flat places, top-p -----------------------------------------------------------

def bigram(table):
    """A target without layers, whose logits after token x are table[x]: the exact distribution stands in the table."""
    V = len(table)
    llama = tiny_llama(0, vocab=V, layers=0, hidden=V, heads=1, context=8192)
    llama.embed_tokens.weight.copy_(torch.eye(V))
    llama.lm_head.weight.copy_((table / V ** 0.5).T)             # the norm makes a one-hot vector root V long
    return llama


@pytest.mark.parametrize("temperature, top_p, gamma", [(1.0, 0.95, 3), (0.7, 0.9, 1), (1.1, 0.9, 2)])
def test_large_vocabularies_with_peaked_and_flat_places_keep_the_targets_distribution(temperature, top_p, gamma):
    """After an even token few others are likely, the first and the last among them; after an odd one nearly all are."""
    V, generator = 600, torch.Generator().manual_seed(5)
    table = 0.3 * torch.randn(V, V, generator=generator)
    table[::2, 0], table[::2, V - 1], table[::2, 7], table[::2, 8] = 9.0, 8.5, 8.0, 8.3
    target, draft = bigram(table), bigram(table + 0.7 * torch.randn(V, V, generator=generator))
    made = speculate.speculative_generate(target, draft, torch.tensor([[0]]), 3000, gamma, temperature, top_p, (), generator)
    assert min(made.kinds.count(kind) for kind in ("accepted", "corrected", "bonus")) > 100
    p = torch.stack([independent_shape(row[None].double(), temperature, top_p)[0] for row in table])
    nucleus = (p > 0).sum(-1)
    assert nucleus[::2].max() <= 4 and nucleus[1::2].min() > 200 and nucleus[1::2].max() > 256
    # Given which tokens came before, what followed them is a sum of multinomials: one for the even, one for the odd ones.
    # Cells: the four likely tokens, and the others by the dozen.
    cell = torch.arange(V) // 12 + V
    cell[[0, 7, 8, V - 1]] = torch.tensor([0, 7, 8, V - 1])
    text, counts, expected = [0, *made.tokens], (Counter(), Counter()), torch.zeros(2, 2 * V, dtype=torch.float64)
    for x, following in zip(text, text[1:]):
        counts[x % 2][cell[following].item()] += 1
        expected[x % 2].index_add_(0, cell, p[x])
    for kind in (0, 1):
        cells = dict(enumerate((expected[kind] / expected[kind].sum()).tolist()))
        assert chi_square_p_value(counts[kind], cells) > 0.001


def mutant(old, new):
    """speculative_generate with one line of the loop replaced: a planted bug."""
    source = inspect.getsource(speculate.speculative_stream)
    assert source.count(old) == 1, f"the loop no longer holds {old!r}: plant this bug anew"
    namespace = dict(vars(speculate))
    exec(source.replace(old, new), namespace)
    return lambda *arguments: speculate.last(namespace["speculative_stream"](*arguments))


BUGS = {
    "leftover from p": ("leftover = (p[kept] - q[kept]).clamp(min=0)", "leftover = p[kept]"),
    "bonus from q": ("model.sample(p[-1:], generator)", "model.sample((q or p[None])[-1][None] if q else p[-1:], generator)"),
    "accepts all": ("refused = not bool(u < p[kept, x] / q[kept][x])", "refused = False"),
    "drafter cache never rolled back": ("draft_cache.length = min(draft_cache.length, len(text) - 1)",
                                        "draft_cache.length = len(text) - 1"),
    "target cache never rolled back": ("target_cache.length = len(text) - 1\n", "pass\n"),
    "q not shaped as p": ("q.append(distribution(draft, draft_cache, (text + guesses)[draft_cache.length:], 1)[0])",
                          "q.append(torch.softmax(draft(torch.tensor([text + guesses]))[0, -1], -1))"),
}


@pytest.mark.parametrize("bug", ["leftover from p", "bonus from q", "accepts all"])
def test_the_losslessness_test_sees_planted_bugs(bug):
    p_value, _ = measure(mutant(*BUGS[bug]), "unrelated", 3, 1.0, 1.0, samples=700)
    print(f"p-value {p_value:.1e}", end=" ")
    assert p_value < 1e-6


def test_a_loop_that_drafts_nothing_is_seen():
    broken = mutant("for _ in range(width):", "for _ in range(0):")
    _, kinds = measure(broken, "unrelated", 3, 1.0, 1.0, samples=20)
    assert kinds["accepted"] == 0  # what the assertions on kinds above refuse


# ---- Greedy, and the traps -------------------------------------------------------------------------------------------

BIG = [tiny_llama(seed, vocab=50, layers=2, std=0.25, hidden=16) for seed in (10, 11)]
# A drafter that is right often but not always: the target with a little noise.
NEAR = model.Llama(BIG[0].config).requires_grad_(False)
NEAR.load_state_dict(BIG[0].state_dict())
for weight in NEAR.parameters():
    weight.add_(0.03 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())))
PAIRS = {"equal": BIG[0], "near": NEAR, "unrelated": BIG[1]}
PROMPTS = [torch.randint(50, (1, n), generator=torch.Generator().manual_seed(n)) for n in (1, 4, 9)]


def greedy_simulation(target, draft, prompt, max_new_tokens, gamma, eos_ids=()):
    """Greedy speculation without any cache: (tokens, target calls, accepted, drafted). Every pass reads the whole text."""
    def best(llama, text):
        return llama(torch.tensor([text]))[0, -1].argmax().item()

    text = prompt[0].tolist()
    new, calls, accepted, drafted = [best(target, text)], 0, 0, 0
    while len(new) < max_new_tokens and new[-1] not in eos_ids:
        calls, guesses = calls + 1, []
        for _ in range(min(gamma, max_new_tokens - len(new) - 1)):
            guesses.append(best(draft, text + new + guesses))
        stopped = False
        for guess in guesses:
            drafted += 1
            right = best(target, text + new)
            new.append(right)
            if guess != right:
                stopped = True
                break
            accepted += 1
            if guess in eos_ids:
                stopped = True
                break
        if not stopped:
            new.append(best(target, text + new))
    return new, calls, accepted, drafted


@pytest.mark.parametrize("drafter", PAIRS)
@pytest.mark.parametrize("gamma", [0, 1, 3, 5])
def test_greedy_text_and_counts_equal_a_simulation_without_caches(drafter, gamma):
    """Also the trap of full acceptance: a drafter whose cache lacks its own last token would guess differently."""
    for prompt in PROMPTS:
        for length in (1, 2, 5, 17):
            made = speculate.speculative_generate(BIG[0], PAIRS[drafter], prompt, length, gamma, 0.0, 1.0)
            tokens, calls, accepted, drafted = greedy_simulation(BIG[0], PAIRS[drafter], prompt, length, gamma)
            assert (made.tokens, made.target_calls, made.accepted, made.drafted) == (tokens, calls, accepted, drafted)
            assert made.tokens == speculate.autoregressive_generate(BIG[0], prompt, length, 0.0, 1.0).tokens
            assert len(made.kinds) == len(made.tokens) == length


@pytest.mark.parametrize("bug", ["drafter cache never rolled back", "target cache never rolled back", "drafter skips its last token"])
def test_the_simulation_sees_broken_caches(bug):
    broken = mutant(*(BUGS | {"drafter skips its last token": (
        "(text + guesses)[draft_cache.length:], 1)", "(text + guesses)[-1 if draft_cache.length else 0:], 1)")})[bug])
    differ = False
    for drafter in ("equal", "near"):
        try:
            made = broken(BIG[0], PAIRS[drafter], PROMPTS[1], 17, 3, 0.0, 1.0)
        except (IndexError, ValueError):
            return
        expected = greedy_simulation(BIG[0], PAIRS[drafter], PROMPTS[1], 17, 3)
        differ |= (made.tokens, made.target_calls, made.accepted, made.drafted) != expected
    assert differ


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.5, 0.9), (1.3, 0.7), (0.0, 1.0)])
def test_a_drafter_equal_to_its_target_is_never_refused(temperature, top_p):
    """If temperature or top-p shaped only one of p and q, or another q were kept than was sampled from, it would be."""
    generator = torch.Generator().manual_seed(0)
    made = speculate.speculative_generate(BIG[0], BIG[0], PROMPTS[1], 50, 4, temperature, top_p, (), generator)
    assert made.drafted == made.accepted > 30
    assert made.overlap == pytest.approx(made.drafted, rel=1e-4)
    assert made.tau == pytest.approx(49 / 10) and made.target_calls == 10


def test_an_unshaped_q_is_seen_by_that_test():
    made = mutant(*BUGS["q not shaped as p"])(BIG[0], BIG[0], PROMPTS[1], 50, 4, 1.3, 0.7, (), torch.Generator().manual_seed(0))
    assert made.accepted < made.drafted


def test_p_equal_to_q_leaves_nothing_over_and_still_draws_from_p(monkeypatch):
    """A refusal where p = q can only come from rounding; then p - q is all zero. Refuse everything and see."""
    real = torch.rand
    monkeypatch.setattr(speculate.torch, "rand", lambda *size, **options: torch.ones(()) * 2 if size == ((),) else real(*size, **options))
    made = speculate.speculative_generate(BIG[0], BIG[0], PROMPTS[1], 20, 3, 0.0, 1.0)
    assert made.accepted == 0 and made.kinds[1:] == ["corrected"] * 18 + ["bonus"]
    assert made.tokens == speculate.autoregressive_generate(BIG[0], PROMPTS[1], 20, 0.0, 1.0).tokens


def test_an_end_token_inside_an_accepted_run_ends_the_text_there():
    plain = speculate.autoregressive_generate(BIG[0], PROMPTS[1], 30, 0.0, 1.0).tokens
    ends = 0
    for position in range(1, 12):
        eos = plain[position]
        first = plain.index(eos)
        for drafter in PAIRS.values():
            made = speculate.speculative_generate(BIG[0], drafter, PROMPTS[1], 30, 5, 0.0, 1.0, (eos,))
            assert made.tokens == plain[:first + 1]
            assert (made.tokens, made.target_calls, made.accepted, made.drafted) == greedy_simulation(
                BIG[0], drafter, PROMPTS[1], 30, 5, (eos,))
            ends += made.kinds[-1] == "accepted"
    assert ends > 3                             # the case did occur


def test_texts_that_end_early_have_the_targets_distribution_too():
    """With token 2 as the end, texts of every length up to LENGTH occur."""
    exact = Counter()
    for text, p in exact_distribution(TARGET, 1.0, 1.0).items():
        exact[text[:text.index(2) + 1] if 2 in text else text] += p
    generator, counts = torch.Generator().manual_seed(1), Counter()
    for _ in range(SAMPLES):
        made = speculate.speculative_generate(TARGET, DRAFTERS["unrelated"], torch.tensor([PROMPT]), LENGTH, 3, 1.0, 1.0, (2,), generator)
        counts[tuple(made.tokens)] += 1
    assert chi_square_p_value(counts, exact) > 0.01


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_runs_past_max_new_tokens_or_the_context(temperature):
    """A prompt and an answer that fill the context exactly: one column more would be refused."""
    for length in range(1, 12):
        target = tiny_llama(1, vocab=50, context=4 + length)
        for gamma in (1, 3, 7):
            made = speculate.speculative_generate(target, tiny_llama(2, vocab=50), PROMPTS[1], length, gamma, temperature, 1.0)
            assert len(made.tokens) == length
    with pytest.raises(ValueError, match="exceed the target's context"):
        speculate.speculative_generate(target, target, PROMPTS[1], 12, 1, 0.0, 1.0)


def test_wrong_arguments_are_refused_in_one_sentence():
    call = speculate.speculative_generate
    with pytest.raises(ValueError, match="must share its target's tokenizer"):
        call(BIG[0], TARGET, PROMPTS[0], 5, 3, 0.0, 1.0)
    for arguments in ((0, 3, 0.0, 1.0), (5, -1, 0.0, 1.0), (5, 3, -1.0, 1.0), (5, 3, 1.0, 0.0), (5, 3, 1.0, 1.1)):
        with pytest.raises(ValueError, match="must be"):
            call(BIG[0], BIG[1], PROMPTS[0], *arguments)
    with pytest.raises(ValueError, match="at least one token"):
        call(BIG[0], BIG[1], torch.zeros(1, 0, dtype=torch.int64), 5, 3, 0.0, 1.0)


def test_the_same_seed_gives_the_same_text_and_the_global_generator_serves_too():
    def run(generator):
        return speculate.speculative_generate(BIG[0], BIG[1], PROMPTS[2], 20, 3, 1.0, 0.9, (), generator).tokens
    assert run(torch.Generator().manual_seed(4)) == run(torch.Generator().manual_seed(4))
    torch.manual_seed(4)
    first = run(None)
    torch.manual_seed(4)
    assert run(None) == first


def test_a_greedy_mismatch_is_reported_with_both_logits(capsys):
    plain = speculate.autoregressive_generate(BIG[0], PROMPTS[1], 8, 0.0, 1.0).tokens
    other = plain[:5] + [(plain[5] + 1) % 50] + plain[6:]
    report = speculate.report_mismatch(BIG[0], PROMPTS[1][0].tolist(), plain, other, 3, 5)
    logits = BIG[0](torch.cat((PROMPTS[1], torch.tensor([plain[:5]])), 1))[0, -1]
    assert report["position"] == 5 and report["plain"] == [plain[5], pytest.approx(logits.max().item(), rel=1e-5)]
    assert report["speculative"][1] == pytest.approx(logits[other[5]].item(), rel=1e-4)
    assert "new token 5" in capsys.readouterr().out


# ---- The script ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folders(tmp_path_factory, sentencepiece_folder):
    """A target and a drafter of random weights with a real tokenizer, as the script expects them on disk."""
    import shutil

    from data import tokenizer
    root = tmp_path_factory.mktemp("models")
    vocab = tokenizer.load(sentencepiece_folder).vocab_size
    for name, seed in (("target", 1), ("draft", 2)):
        model.save(tiny_llama(seed, vocab=vocab, context=128, std=0.3), root / name)
        for file in ("tokenizer.model", "tokenizer_config.json"):
            shutil.copy(sentencepiece_folder / file, root / name / file)
    return root


def script(folders, *arguments, **options):
    return options.pop("run", run_script)("speculate.py", "--target", folders / "target", "--draft", folders / "draft", "--device", "cpu",
                                          "--threads", 1, *arguments, **options)


def test_bench_writes_the_rows_that_design_promises(folders, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    files.write_jsonl(prompts, [{"task": task, "prompt": f"count to {i}"} for task in ("b", "a") for i in range(3)])
    out = tmp_path / "bench.json"
    process = script(folders, "--bench", prompts, "--gamma", 1, 3, "--max-new-tokens", 12, "--json", out)
    assert process.returncode == 0, process.stderr
    result = json.loads(out.read_text())
    rows = result["rows"]
    assert [(row["task"], row["gamma"]) for row in rows] == [(t, g) for t in ("b", "a", "all") for g in (1, 3)]
    for row in rows:
        assert row["prompts"] == (6 if row["task"] == "all" else 3)
        assert 1 <= row["tau"] <= row["gamma"] + 1 and 0 <= row["alpha"] <= 1
        assert row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
        assert row["speedup"] == pytest.approx(row["speculative_tokens_per_s"] / row["plain_tokens_per_s"])
        assert row["mbsu"] == pytest.approx(row["tau"] / (result["size_ratio"] * row["gamma"] + 1))
        assert row["greedy_mismatches"] == 0
    assert rows[5]["new_tokens"] == sum(row["new_tokens"] for row in rows[1:4:2])


def test_a_piped_answer_is_plain_text_and_brackets_are_readable_without_colour(folders):
    plain = script(folders, "--prompt", "hello there", "--max-new-tokens", 20)
    assert plain.returncode == 0, plain.stderr
    assert "\033" not in plain.stdout and "tau" not in plain.stdout and "tau" in plain.stderr
    marked = script(folders, "--prompt", "hello there", "--max-new-tokens", 20, "--trace", "brackets")
    colour = script(folders, "--prompt", "hello there", "--max-new-tokens", 20, "--trace", "colour")
    assert "[" in marked.stdout and "accepted [corrected] {bonus}" in marked.stdout
    assert "\033[31m" in colour.stdout and "\033[0m" in colour.stdout


def test_chat_keeps_the_history_and_forgets_the_oldest_when_the_context_is_full(folders):
    process = script(folders, "--chat", "--max-new-tokens", 30, input="hello there\n" * 6 + "\n")
    assert process.returncode == 0, process.stderr
    assert "the oldest exchange is forgotten" in process.stdout
    assert process.stderr.count("tau") == 6


def test_bad_input_is_one_sentence_and_exit_code_2(folders, tmp_path):
    assert_refused(script(folders, "--prompt", " ", run=run_process), "--prompt is empty")
    assert_refused(script(folders, "--prompt", "hello", "--gamma", 0), "--gamma 0")
    assert_refused(script(folders, "--prompt", "hello " * 300), "exceed the target's context of 128")
    assert_refused(script(folders, "--bench", tmp_path / "none.jsonl"), "no such file")
    (tmp_path / "empty.jsonl").write_text("")
    assert_refused(script(folders, "--bench", tmp_path / "empty.jsonl"), "no prompts")
    (tmp_path / "bad.jsonl").write_text('{"task": "a", "prompt": "x"}\n{"task": "a"')
    assert_refused(script(folders, "--bench", tmp_path / "bad.jsonl"), "line 2", "not JSON")
    (tmp_path / "empty_prompt.jsonl").write_text('{"task": "a", "prompt": ""}\n')
    assert_refused(script(folders, "--bench", tmp_path / "empty_prompt.jsonl"), "prompt 1")
    assert_refused(run_script("speculate.py", "--target", tmp_path / "x", "--draft", folders / "draft", "--prompt", "a"), "no such folder")
    assert_refused(script(folders, "--prompt", "a", "--device", "nonsense"), "use --device cpu")


def test_a_drafter_of_another_tokenizer_with_as_many_tokens_is_refused(folders, tmp_path):
    import shutil

    shutil.copytree(folders / "draft", tmp_path / "draft")
    import sentencepiece
    vocab = model.read_config(tmp_path / "draft").vocab_size
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["another text has other pieces altogether"] * 20), model_prefix=str(tmp_path / "draft" / "tokenizer"),
        vocab_size=vocab, model_type="bpe", byte_fallback=True, hard_vocab_limit=False, minloglevel=2)
    assert_refused(run_script("speculate.py", "--target", folders / "target", "--draft", tmp_path / "draft", "--prompt", "a"),
                   "another tokenizer")


# ---- gamma chosen by itself ------------------------------------------------------------------------------------------

class Recorded(speculate.AutoGamma):
    """Also keeps the gamma of each block that was decoded."""

    def update(self, gamma, accepted, drafted, new_tokens):
        self.gammas = getattr(self, "gammas", []) + [gamma]
        super().update(gamma, accepted, drafted, new_tokens)


@pytest.mark.parametrize("draft_cost", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("slope", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_auto_with_a_useless_drafter_costs_at_most_three_per_cent(draft_cost, slope, temperature):
    """Counted in passes times their costs, probing included: no clock."""
    auto = Recorded(draft_cost, [1.0] + [1 + slope * n for n in range(9)])
    made = speculate.speculative_generate(BIG[0], BIG[1], PROMPTS[1], 41, auto, temperature, 1.0, (), torch.Generator().manual_seed(0))
    for _ in range(6):                            # 6 times 40 tokens and the first: the chooser goes on from text to text, as in a chat
        more = speculate.speculative_generate(BIG[0], BIG[1], PROMPTS[2], 37, auto, temperature, 1.0, (), torch.Generator().manual_seed(1))
        made.target_calls += more.target_calls
    assert len(auto.gammas) == made.target_calls and auto.tokens == 40 + 6 * 36
    spent = sum(auto.cost(gamma) for gamma in auto.gammas)
    assert any(auto.gammas) and spent <= 1.03 * auto.tokens


def test_auto_takes_a_long_gamma_for_a_good_drafter_and_leaves_a_bad_one():
    costs = [1.0] + [1 + 0.05 * n for n in range(9)]
    chosen = {}
    for drafter in ("equal", "unrelated"):
        chosen[drafter] = Recorded(0.05, costs)
        made = speculate.speculative_generate(BIG[0], PAIRS[drafter], PROMPTS[0], 60, chosen[drafter], 0.0, 1.0)
        assert made.tokens == speculate.autoregressive_generate(BIG[0], PROMPTS[0], 60, 0.0, 1.0).tokens
    assert chosen["equal"].gammas[-3] == 8 and sum(chosen["equal"].gammas) > 40
    assert sum(chosen["unrelated"].gammas[-20:]) <= 3 and chosen["unrelated"].excess < 4


def test_each_gamma_is_verified_in_its_own_form_and_the_text_is_the_same(tmp_path, monkeypatch):
    """Models this small are not packed by themselves; here they are."""
    monkeypatch.setattr(model.Llama.pack, "__defaults__", (model.MAX_UNPACKED_TOKENS, 0))
    model.save(BIG[0], tmp_path)
    target, verifiers = speculate.load_verifiers(tmp_path, [1, 2, 7], "cpu", torch.float32)
    assert verifiers[1] is target and verifiers[2] is verifiers[7] is not target
    assert target.packed_head.as_it_is and not verifiers[7].packed_head.as_it_is
    plain = speculate.autoregressive_generate(BIG[0], PROMPTS[1], 40, 0.0, 1.0).tokens
    assert speculate.autoregressive_generate(target, PROMPTS[1], 40, 0.0, 1.0).tokens == plain
    for gamma, llama in verifiers.items():
        assert speculate.speculative_generate(llama, BIG[1], PROMPTS[1], 40, gamma, 0.0, 1.0).tokens == plain
    target, verifiers = speculate.load_verifiers(tmp_path, [1], "cpu", torch.float32)
    assert list(verifiers.values()) == [target]                         # no second copy where none is needed


def test_measured_costs_are_those_of_the_passes(monkeypatch):
    costs = [0.1, 0.11, 0.14, 0.14, 0.2, 0.21, 0.22, 0.23, 0.24]
    monkeypatch.setattr(speculate, "pass_seconds", lambda llama, width, repeats=5: 0.01 if llama is BIG[1] else costs[width - 1])
    auto = speculate.measured_gamma(BIG[0], BIG[1])
    assert auto.draft_cost == pytest.approx(0.1) and auto.verify_costs[1:] == pytest.approx([cost / 0.1 for cost in costs])
    monkeypatch.setattr(BIG[0], "packed_head", True)      # weights in the form for few tokens: no width beyond it
    assert len(speculate.measured_gamma(BIG[0], BIG[1]).verify_costs) == 6
