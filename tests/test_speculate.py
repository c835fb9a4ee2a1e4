"""Speculative decoding is lossless: the one claim that must never break.

The texts of a tiny world (3 tokens, 7 places, 2,187 possible texts) are sampled by the loop. A
chi-square test compares them with their exact probabilities, which are enumerated with whole passes
of the target, without a cache.
"""

import argparse
import itertools
import json
import math
import os
import re
from collections import Counter

import pytest
import torch
from conftest import assert_refused, run_process, run_script, tiny_llama
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import model
import speculate
from data import files, report

PROMPT, LENGTH, SAMPLES = [1, 0, 2], 7, 350
KINDS = ("accepted", "corrected", "bonus")


def exact_distribution(target, temperature, top_p):
    """{text: probability} of every text of LENGTH tokens, by brute force and without a cache."""
    texts = torch.tensor(list(itertools.product(range(target.config.vocab_size), repeat=LENGTH)))
    prompt = torch.tensor(PROMPT).expand(len(texts), -1)
    logits = target(torch.cat((prompt, texts), 1))[:, len(PROMPT) - 1:-1]    # (texts, LENGTH, V)
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
    """Upper tail of chi-square; cells that expect fewer than 5 are pooled.

    A text that cannot occur fails the test at once.
    """
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
    """A drafter that bets on what the target likes least: its q is 0 or 1 after rounding."""
    draft = model.Llama(target.config).requires_grad_(False)
    draft.load_state_dict(target.state_dict())
    draft.lm_head.weight.mul_(-60)
    return draft


TARGET = tiny_llama(0, std=0.6)
DRAFTERS = {"equal": TARGET, "unrelated": tiny_llama(1, std=0.6), "adversarial": adversary(TARGET)}
SHAPES = [(1.0, 1.0), (0.6, 1.0), (1.5, 0.8)]
SETTINGS = list(itertools.product(DRAFTERS, (1, 3, 5), SHAPES))


def measure(generate, drafter, gamma, temperature, top_p, seed=0, samples=SAMPLES):
    """(p-value, kinds) of `samples` texts: the first against their exact distribution.

    kinds: a Counter of how often each kind of token occurred.
    """
    generator = torch.Generator().manual_seed(seed)
    counts, kinds = Counter(), Counter()
    for _ in range(samples):
        made = generate(TARGET, DRAFTERS[drafter], torch.tensor([PROMPT]), LENGTH, gamma,
                        temperature, top_p, (), generator)
        counts[tuple(made.tokens)] += 1
        kinds.update(made.kinds)
    return chi_square_p_value(counts, exact_distribution(TARGET, temperature, top_p)), kinds


@pytest.mark.parametrize("drafter, gamma, shape", SETTINGS)
def test_speculative_sampling_matches_the_target_distribution(drafter, gamma, shape):
    p_value, kinds = measure(speculate.speculative_generate, drafter, gamma, *shape)
    print(f"p-value {p_value:.4f}", end=" ")   # pytest -rP lists them
    # A run proves nothing if nothing was drafted, or if one of the loop's branches was never taken.
    if drafter == "equal":
        assert kinds["accepted"] > 0.4 * SAMPLES * LENGTH, kinds
        assert kinds["corrected"] == 0 and kinds["bonus"] > 0, kinds
    elif drafter == "unrelated":
        assert min(kinds[kind] for kind in KINDS) > 100, kinds
    else:
        assert kinds["corrected"] > 0.3 * SAMPLES * LENGTH, kinds
    # Bonferroni: with a correct loop, one seed in a hundred fails one of these 27 tests.
    assert p_value * len(SETTINGS) > 0.01


def test_a_drafter_with_a_vocabulary_of_its_own_changes_no_probability(monkeypatch):
    draft = model.Llama(TARGET.config).requires_grad_(False)
    draft.load_state_dict(DRAFTERS["unrelated"].state_dict())
    draft.draft_vocabulary = torch.tensor([2, 0])      # it can never propose token 1
    monkeypatch.setitem(DRAFTERS, "part", draft)
    monkeypatch.setitem(globals(), "PROMPT", [0, 2, 0])
    assert (model.probabilities(draft(torch.tensor([PROMPT]))[0])[:, 1] == 0).all()
    p_value, kinds = measure(speculate.speculative_generate, "part", 3, 1.0, 1.0)
    assert min(kinds[kind] for kind in KINDS) > 100, kinds
    assert p_value > 0.001


@pytest.mark.parametrize("gamma, temperature", [(1, 1.0), (3, 1.0), (3, 0.0), (8, 0.7)])
def test_the_drafter_guesses_from_its_list_and_the_words_of_the_prompt(
        gamma, temperature, monkeypatch):
    target, draft = (tiny_llama(seed, vocab=50, layers=1) for seed in (5, 6))
    draft.draft_vocabulary, blocks = torch.tensor([9, 3, 40]), []

    def remember(guesses, q, p, coins):
        blocks.append((guesses, q))
        return speculate.verify_token(guesses, q, p, coins)

    monkeypatch.setitem(speculate.VERIFY, "token", remember)
    prompt = torch.tensor([[11, 3, 30]])
    made = speculate.speculative_generate(target, draft, prompt, 30, gamma, temperature, 1.0,
                                          generator=torch.Generator().manual_seed(0))
    text, at, words = prompt[0].tolist(), 1, 0
    for (guesses, q), (_, kept) in zip(blocks, made.blocks, strict=True):
        for i, row in enumerate(q):
            read = text + made.tokens[:at] + guesses[:i].tolist()
            logits = (draft.head_weight() @ draft.hidden(torch.tensor([read]))[0, -1])[None]
            allowed = torch.zeros(1, 50, dtype=torch.bool)
            allowed[0, [9, 3, 40, *text]] = True
            expected = model.probabilities(logits.masked_fill(~allowed, -math.inf), temperature)
            torch.testing.assert_close(row, expected[0])
            words += guesses[i].item() in (11, 30)
        at += kept + 1
    assert len(blocks) > 5 and (words > 0 or temperature == 0)


@pytest.mark.parametrize("theirs", [[9, 3, 40], [9, 3, 7]])
@pytest.mark.parametrize("verify", ["token", "block"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_target_with_a_list_keeps_its_own_distribution(temperature, verify, theirs, monkeypatch):
    """The prompt's words are the drafter's alone: plain decoding can never write them here."""
    target, draft = (tiny_llama(seed, vocab=50, layers=1) for seed in (5, 6))
    target.draft_vocabulary = torch.tensor([9, 3, 40])
    draft.draft_vocabulary = torch.tensor(theirs)
    prompt, arguments = torch.tensor([[11, 3, 30]]), (30, 3, temperature, 1.0)
    blocks = []

    def remember(guesses, q, p, coins, rule=speculate.VERIFY[verify]):
        blocks.append(q)
        return rule(guesses, q, p, coins)

    monkeypatch.setitem(speculate.VERIFY, verify, remember)
    made = speculate.speculative_generate(target, draft, prompt, *arguments, verify=verify,
                                          generator=torch.Generator().manual_seed(0))
    assert set(made.tokens) <= {9, 3, 40}
    if temperature == 0:
        plain = speculate.autoregressive_generate(target, prompt, 30, 0.0, 1.0)
        assert made.tokens == plain.tokens
    else:                                       # but the drafter does guess the prompt's words
        assert all((q[:, [11, 30]] > 0).all() for q in blocks)


# ---- A vocabulary above 256, peaked and flat places, top-p -------------------------------------

def bigram(table):
    """A model without layers, whose logits after token x are table[x].

    So the table gives its exact distribution.
    """
    V = len(table)
    llama = tiny_llama(0, vocab=V, layers=0, hidden=V, heads=1, context=8192)
    llama.embed_tokens.weight.copy_(torch.eye(V))
    # The norm gives a one-hot vector the length root V.
    llama.lm_head.weight.copy_((table / V ** 0.5).T)
    return llama


@pytest.mark.parametrize("temperature, top_p, gamma",
                         [(1.0, 0.95, 3), (0.7, 0.9, 1), (1.1, 0.9, 2)])
def test_large_vocabularies_with_peaked_and_flat_places_keep_the_targets_distribution(
        temperature, top_p, gamma):
    """After an even token four tokens are likely, the first and the last among them.

    After an odd token nearly all are likely.
    """
    V, generator = 600, torch.Generator().manual_seed(5)
    table = 0.3 * torch.randn(V, V, generator=generator)
    table[::2, 0], table[::2, V - 1], table[::2, 7], table[::2, 8] = 9.0, 8.5, 8.0, 8.3
    target, draft = bigram(table), bigram(table + 0.7 * torch.randn(V, V, generator=generator))
    made = speculate.speculative_generate(target, draft, torch.tensor([[0]]), 3000, gamma,
                                          temperature, top_p, (), generator)
    assert min(made.kinds.count(kind) for kind in KINDS) > 100
    p = independent_shape(table.double(), temperature, top_p)
    nucleus = (p > 0).sum(-1)
    assert nucleus[::2].max() <= 4 and nucleus[1::2].min() > 200 and nucleus[1::2].max() > 256
    # Two tests: one of what follows the even tokens, one of what follows the odd ones. Given the
    # tokens before, the counts of what follows are a sum of multinomials.
    # Cells: each of the four likely tokens, and the others by the dozen.
    cell = torch.arange(V) // 12 + V
    cell[[0, 7, 8, V - 1]] = torch.tensor([0, 7, 8, V - 1])
    text = [0, *made.tokens]
    counts = Counter(), Counter()
    expected = torch.zeros(2, 2 * V, dtype=torch.float64)
    for x, following in zip(text, text[1:]):
        counts[x % 2][cell[following].item()] += 1
        expected[x % 2].index_add_(0, cell, p[x])
    for kind in (0, 1):
        cells = dict(enumerate((expected[kind] / expected[kind].sum()).tolist()))
        assert chi_square_p_value(counts[kind], cells) > 0.001


# ---- Planted bugs ------------------------------------------------------------------------------

def verify_with(leftover=speculate.leftover, bonus=None, keeps=None):
    """verify_token with one part replaced."""
    def verify(guesses, q, p, coins):
        kept, follow = speculate.verify_token(guesses, q, p, coins)
        kept = len(guesses) if keeps == "all" else kept
        if kept < len(guesses):
            follow = leftover(p[kept], q[kept])
        elif bonus == "q" and kept:
            follow = q[-1]
        elif keeps == "all":
            follow = p[kept]
        return kept, follow
    return verify


def all_of_p(p, q):
    """The wrong leftover: q is not subtracted."""
    return p


BUGS = {"leftover from p": verify_with(leftover=all_of_p),
        "bonus from q": verify_with(bonus="q"),
        "accepts all": verify_with(keeps="all")}


@pytest.mark.parametrize("bug", BUGS)
def test_the_losslessness_test_sees_planted_bugs(bug, monkeypatch):
    monkeypatch.setitem(speculate.VERIFY, "token", BUGS[bug])
    p_value, _ = measure(speculate.speculative_generate, "unrelated", 3, 1.0, 1.0, samples=700)
    print(f"p-value {p_value:.1e}", end=" ")
    assert p_value < 1e-6


def test_a_loop_that_drafts_nothing_is_seen():
    def nothing(*arguments):
        return speculate.speculative_generate(*arguments, choose=lambda blocks: 0)
    _, kinds = measure(nothing, "unrelated", 3, 1.0, 1.0, samples=20)
    assert kinds["accepted"] == 0  # what the assertions on kinds above refuse


# ---- The two rules, enumerated -----------------------------------------------------------------

def random_tables(seed, V, gamma):
    """A target p and a drafter q over V tokens: {prefix: (V,)}, in double precision.

    Their distributions depend on all tokens before.
    """
    generator = torch.Generator().manual_seed(seed)
    sharp = (0.5, 1.0, 3.0)[seed % 3]
    prefixes = []
    for length in range(gamma + 1):
        prefixes += itertools.product(range(V), repeat=length)

    def random_distribution():
        return torch.softmax(sharp * torch.randn(V, generator=generator, dtype=torch.float64), -1)

    def without(distribution, token):
        impossible = torch.arange(V) == token
        return torch.softmax(distribution.log().masked_fill(impossible, -torch.inf), -1)

    p = {prefix: random_distribution() for prefix in prefixes}
    q = {prefix: random_distribution() for prefix in prefixes}
    for prefix in prefixes[seed % 5::5]:            # some tokens have p = 0, some q = 0
        p[prefix] = without(p[prefix], seed % V)
        q[prefix[::-1]] = without(q[prefix[::-1]], (seed + 1) % V)
    if seed % 4 == 0:
        q[()] = p[()]                               # and at some places p = q
    return p, q


def keep_probabilities(rule, guesses, q, p):
    """[(probability, kept, follow)] over all coins, exactly, by asking the rule itself.

    A coin decides only by which side of a threshold it falls on. So the cube of all coins is cut
    into boxes, and inside a box the answer is always the same. Bisection finds the thresholds of
    one coin, while each of the other coins is at one end: below every threshold, or above.
    """
    gamma, smallest, largest = len(guesses), 0.0, 1 - 2 ** -53

    def answer(coins):
        return speculate.VERIFY[rule](guesses, q, p, torch.tensor(coins, dtype=torch.float64))

    def threshold(before, after):
        """Where the number of kept guesses changes with the coin between these; None: nowhere."""
        def kept(coin):
            return int(answer([*before, coin, *after])[0])

        low, high = smallest, largest
        below = kept(low)
        if below == kept(high):
            return None
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if kept(middle) == below else (low, middle)
        return high

    intervals = []                                  # of each coin: [(low, high)]
    for i in range(gamma):
        cuts = {0.0, 1.0}
        for others in itertools.product((smallest, largest), repeat=gamma - 1):
            cut = threshold(others[:i], others[i:])
            if cut is not None:
                cuts.add(cut)
        intervals.append(list(itertools.pairwise(sorted(cuts))))
    boxes = []
    for box in itertools.product(*intervals):
        size = math.prod(high - low for low, high in box)
        if size > 0:
            boxes.append((size, *answer([(low + high) / 2 for low, high in box])))
    return boxes


def enumerate_rule(rule, p, q, V, gamma):
    """({text of gamma + 1 tokens: probability}, expected number of kept guesses), exactly.

    A block that ends early is completed with plain draws from the target. The next blocks would add
    tokens of the same distribution.
    """
    texts, expected_kept = Counter(), 0.0
    for guesses in itertools.product(range(V), repeat=gamma):
        prefixes = [guesses[:i] for i in range(gamma + 1)]
        chance = 1.0
        for i, x in enumerate(guesses):
            chance *= q[guesses[:i]][x].item()
        if chance == 0:
            continue
        q_rows = torch.stack([q[prefix] for prefix in prefixes[:-1]])
        p_rows = torch.stack([p[prefix] for prefix in prefixes])
        for size, kept, follow in keep_probabilities(rule, torch.tensor(guesses), q_rows, p_rows):
            assert abs(follow.sum().item() - 1) < 1e-12 and follow.min() >= 0
            expected_kept += chance * size * kept
            for rest in itertools.product(range(V), repeat=gamma - kept + 1):
                value = chance * size * follow[rest[0]].item()
                for i in range(1, len(rest)):
                    value *= p[guesses[:kept] + rest[:i]][rest[i]].item()
                texts[guesses[:kept] + rest] += value
    return texts, expected_kept


def target_texts(p, V, gamma):
    texts = {}
    for text in itertools.product(range(V), repeat=gamma + 1):
        texts[text] = 1.0
        for i, x in enumerate(text):
            texts[text] *= p[text[:i]][x].item()
    return texts


def worst_error(rule, seed, V, gamma):
    p, q = random_tables(seed, V, gamma)
    texts, _ = enumerate_rule(rule, p, q, V, gamma)
    return max(abs(texts[text] - value) for text, value in target_texts(p, V, gamma).items())


SIZES = [(2, 1), (2, 2), (2, 3), (3, 2)]


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("V, gamma", SIZES)
def test_both_rules_are_lossless_by_enumeration(rule, V, gamma):
    for seed in range(12):
        assert worst_error(rule, seed, V, gamma) < 1e-12


def test_block_keeps_on_average_at_least_as_many_as_token():
    gains = []
    for seed in range(60):
        V, gamma = SIZES[seed % 4]
        p, q = random_tables(seed, V, gamma)
        _, token = enumerate_rule("token", p, q, V, gamma)
        _, block = enumerate_rule("block", p, q, V, gamma)
        assert block >= token - 1e-12
        gains.append(block / token - 1 if gamma > 1 and token else 0)
    assert max(gains) > 0.03 and sum(gains) > 0                 # from gamma 2 on the rules differ


def test_a_coin_of_exactly_zero_keeps_no_guess_that_the_target_never_writes():
    p = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.5, 0.5]])
    q = torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    for rule in speculate.VERIFY.values():
        kept, follow = rule(torch.tensor([1, 0]), q, p, torch.zeros(2))
        assert kept == 0 and follow.tolist() == [1.0, 0.0]
        assert rule(torch.tensor([0, 0]), q, p, torch.zeros(2))[0] == 2


def test_the_rules_are_the_same_at_gamma_one_and_when_greedy():
    generator = torch.Generator().manual_seed(0)

    def rows(count, temperature):
        """Random distributions (count, 5)."""
        return model.probabilities(torch.randn(count, 5, generator=generator), temperature)

    for seed in range(200):
        p, q = rows(2, 1.0), rows(1, 1.0)
        greedy_p, greedy_q = rows(4, 0.0), rows(3, 0.0)
        for guesses, q, p in ((torch.tensor([seed % 5]), q, p),
                              (greedy_q.argmax(-1), greedy_q, greedy_p)):
            coins = torch.rand(len(guesses), generator=generator)
            kept, follow = speculate.VERIFY["token"](guesses, q, p, coins)
            kept_block, follow_block = speculate.VERIFY["block"](guesses, q, p, coins)
            assert kept == kept_block
            torch.testing.assert_close(follow, follow_block)


def block_with(leftover_of_token=False, strict=True):
    """verify_block with a planted mistake."""
    def verify(guesses, q, p, coins):
        if not strict:                  # u <= h is the same as: u < the next number after h
            coins = torch.nextafter(coins, torch.tensor(-1.0, dtype=coins.dtype))
        kept, follow = speculate.verify_block(guesses, q, p, coins)
        if leftover_of_token and kept < len(guesses):
            follow = speculate.leftover(p[kept], q[kept])
        return kept, follow
    return verify


def test_planted_mistakes_in_the_block_rule_are_seen(monkeypatch):
    monkeypatch.setitem(speculate.VERIFY, "block", block_with(leftover_of_token=True))
    assert max(worst_error("block", seed, 3, 2) for seed in range(6)) > 1e-3
    monkeypatch.setitem(speculate.VERIFY, "block", block_with(strict=False))
    with pytest.raises(AssertionError):
        test_a_coin_of_exactly_zero_keeps_no_guess_that_the_target_never_writes()


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("length", [1, 2, 4])
def test_the_whole_loop_is_lossless_with_either_rule_at_any_length(rule, length):
    """The first `length` tokens against the enumerated texts.

    Also at lengths where max_new_tokens makes the blocks shorter.
    """
    exact = Counter()
    for text, value in exact_distribution(TARGET, 1.0, 1.0).items():
        exact[text[:length]] += value
    generator, counts, lengths = torch.Generator().manual_seed(length), Counter(), Counter()
    for _ in range(500):
        made = speculate.speculative_generate(TARGET, DRAFTERS["unrelated"], torch.tensor([PROMPT]),
                                              length, 3, 1.0, 1.0, (), generator, rule)
        counts[tuple(made.tokens)] += 1
        lengths[len(made.tokens)] += 1
    assert lengths == {length: 500} and chi_square_p_value(counts, exact) > 0.001


def test_block_in_the_whole_loop_is_lossless_on_long_texts():
    def generate(*arguments):
        return speculate.speculative_generate(*arguments, verify="block")
    p_value, kinds = measure(generate, "unrelated", 3, 1.0, 1.0, samples=700)
    assert p_value > 0.001 and min(kinds[kind] for kind in KINDS) > 100


@pytest.mark.parametrize("rule", ["token", "block"])
def test_a_coin_used_both_for_the_decision_and_for_the_draw_is_seen(rule, monkeypatch):
    """The target writes six tokens at random; the drafter writes mostly the first.

    A coin that refuses a guess is large. The draw made with the same coin would be large too.
    """
    table = torch.zeros(6, 6)
    target, draft = bigram(table), bigram(table + torch.tensor([3.0, 0, 0, 0, 0, 0]))

    def p_value():
        generator = torch.Generator().manual_seed(0)
        made = speculate.speculative_generate(target, draft, torch.tensor([[0]]), 4000, 2, 1.0, 1.0,
                                              (), generator, rule)
        return chi_square_p_value(Counter(made.tokens), {token: 1 / 6 for token in range(6)})

    assert p_value() > 0.001
    tossed, honest, sample = [], speculate.VERIFY[rule], model.sample

    def remember(guesses, q, p, coins):
        kept, follow = honest(guesses, q, p, coins)
        looked_at = coins[kept:kept + 1] if rule == "token" else coins[-1:]
        tossed[:] = looked_at.tolist()
        return kept, follow

    def reuse(p, generator=None):
        if not tossed:
            return sample(p, generator)
        total = p.double().cumsum(-1)
        return torch.searchsorted(total, total[:, -1:] * tossed.pop(), right=True).squeeze(-1)

    monkeypatch.setitem(speculate.VERIFY, rule, remember)
    monkeypatch.setattr(model, "sample", reuse)
    assert p_value() < 1e-6


# ---- Greedy, and the traps ---------------------------------------------------------------------

BIG = [tiny_llama(seed, vocab=50, layers=2, std=0.25, hidden=16) for seed in (10, 11)]
# A drafter that is right often but not always: the target with a little noise.
NEAR = model.Llama(BIG[0].config).requires_grad_(False)
NEAR.load_state_dict(BIG[0].state_dict())
for weight in NEAR.parameters():
    seeded = torch.Generator().manual_seed(weight.numel())
    weight.add_(0.03 * torch.randn(weight.shape, generator=seeded))
PAIRS = {"equal": BIG[0], "near": NEAR, "unrelated": BIG[1]}
PROMPTS = [torch.randint(50, (1, n), generator=torch.Generator().manual_seed(n)) for n in (1, 4, 9)]


def tokens_and_counts(made):
    """What greedy_simulation returns, of a Generation."""
    return made.tokens, made.target_calls, made.accepted, made.drafted


def greedy_simulation(target, draft, prompt, max_new_tokens, gamma, eos_ids=()):
    """Greedy speculation without any cache: (tokens, target calls, accepted, drafted).

    Every pass reads the whole text.
    """
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
    """Also the trap of full acceptance: the drafter's cache may lack the drafter's last token.

    Then its next guesses would differ.
    """
    target, draft = BIG[0], PAIRS[drafter]
    for prompt in PROMPTS:
        for length in (1, 2, 5, 17):
            made = speculate.speculative_generate(target, draft, prompt, length, gamma, 0.0, 1.0)
            expected = greedy_simulation(target, draft, prompt, length, gamma)
            plain = speculate.autoregressive_generate(target, prompt, length, 0.0, 1.0)
            assert tokens_and_counts(made) == expected
            assert made.tokens == plain.tokens
            assert len(made.kinds) == len(made.tokens) == length


class StubbornCache(model.KVCache):
    """A cache that is never rolled back."""

    @property
    def length(self):
        return self.columns

    @length.setter
    def length(self, value):
        self.columns = max(value, getattr(self, "columns", 0))


@pytest.mark.parametrize("bug", ["drafter cache never rolled back",
                                 "target cache never rolled back", "drafter skips its last token"])
def test_the_simulation_sees_broken_caches(bug, monkeypatch):
    real_room, real_read = speculate.room_for, speculate.distributions

    def stubborn(llama, tokens, device):
        broken = (llama is BIG[0]) == (bug == "target cache never rolled back")
        if broken:
            return StubbornCache(llama.config, 1, tokens + 40, device)
        return real_room(llama, tokens, device)

    def skipping(llama, cache, text, *shape):
        if llama is not BIG[0] and cache.length:
            cache.length = len(text) - 1                            # reads the newest token only
        return real_read(llama, cache, text, *shape)

    if bug == "drafter skips its last token":
        monkeypatch.setattr(speculate, "distributions", skipping)
    else:
        monkeypatch.setattr(speculate, "room_for", stubborn)
    # The same weights as the target's, but another object.
    equal = model.Llama(BIG[0].config).requires_grad_(False)
    equal.load_state_dict(BIG[0].state_dict())
    differ = False
    for drafter in (equal, NEAR):
        try:
            made = speculate.speculative_generate(BIG[0], drafter, PROMPTS[1], 17, 3, 0.0, 1.0)
        except (IndexError, ValueError, RuntimeError):
            return
        expected = greedy_simulation(BIG[0], drafter, PROMPTS[1], 17, 3)
        differ |= tokens_and_counts(made) != expected
    assert differ


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.5, 0.9), (1.3, 0.7), (0.0, 1.0)])
def test_a_drafter_equal_to_its_target_is_never_refused(temperature, top_p):
    """It would be, if temperature or top-p shaped only one of p and q.

    Or if the q that was kept were not the q that was sampled from.
    """
    generator = torch.Generator().manual_seed(0)
    made = speculate.speculative_generate(BIG[0], BIG[0], PROMPTS[1], 50, 4, temperature, top_p,
                                          (), generator)
    assert made.drafted == made.accepted > 30
    assert made.overlap == pytest.approx(made.drafted, rel=1e-4)
    assert made.tau == pytest.approx(49 / 10) and made.target_calls == 10


def test_an_unshaped_q_is_seen_by_that_test(monkeypatch):
    real, drafter = speculate.distributions, model.Llama(BIG[0].config).requires_grad_(False)
    drafter.load_state_dict(BIG[0].state_dict())

    def unshaped(llama, cache, text, places, temperature, top_p, words):
        if llama is drafter:
            return real(llama, cache, text, places, 1.0, 1.0, words)
        return real(llama, cache, text, places, temperature, top_p, words)

    monkeypatch.setattr(speculate, "distributions", unshaped)
    generator = torch.Generator().manual_seed(0)
    made = speculate.speculative_generate(BIG[0], drafter, PROMPTS[1], 50, 4, 1.3, 0.7,
                                          (), generator)
    assert made.accepted < made.drafted


def test_p_equal_to_q_leaves_nothing_over_and_still_draws_from_p(monkeypatch):
    """Where p = q only rounding can refuse a guess, and then p - q is all zero.

    This test refuses every guess.
    """
    def refuse_all(guesses, q, p, coins):
        return (0, speculate.leftover(p[0], q[0])) if len(guesses) else (0, p[0])

    monkeypatch.setitem(speculate.VERIFY, "token", refuse_all)
    made = speculate.speculative_generate(BIG[0], BIG[0], PROMPTS[1], 20, 3, 0.0, 1.0)
    plain = speculate.autoregressive_generate(BIG[0], PROMPTS[1], 20, 0.0, 1.0)
    assert made.accepted == 0 and made.kinds[1:] == ["corrected"] * 18 + ["bonus"]
    assert made.tokens == plain.tokens


def test_an_end_token_inside_an_accepted_run_ends_the_text_there():
    plain = speculate.autoregressive_generate(BIG[0], PROMPTS[1], 30, 0.0, 1.0).tokens
    ends = 0
    for position in range(1, 12):
        eos = plain[position]
        first = plain.index(eos)
        for drafter in PAIRS.values():
            made = speculate.speculative_generate(BIG[0], drafter, PROMPTS[1], 30, 5, 0.0, 1.0,
                                                  (eos,))
            expected = greedy_simulation(BIG[0], drafter, PROMPTS[1], 30, 5, (eos,))
            assert made.tokens == plain[:first + 1]
            assert tokens_and_counts(made) == expected
            ends += made.kinds[-1] == "accepted"
    assert ends > 3                             # the case did occur


def test_texts_that_end_early_have_the_targets_distribution_too():
    """With token 2 as the end, texts of every length up to LENGTH occur."""
    exact = Counter()
    for text, p in exact_distribution(TARGET, 1.0, 1.0).items():
        exact[text[:text.index(2) + 1] if 2 in text else text] += p
    generator, counts = torch.Generator().manual_seed(1), Counter()
    for _ in range(SAMPLES):
        made = speculate.speculative_generate(TARGET, DRAFTERS["unrelated"], torch.tensor([PROMPT]),
                                              LENGTH, 3, 1.0, 1.0, (2,), generator)
        counts[tuple(made.tokens)] += 1
    assert chi_square_p_value(counts, exact) > 0.01


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_runs_past_max_new_tokens_or_the_context(temperature):
    """A prompt and an answer that fill the context exactly: one column more would be refused."""
    draft = tiny_llama(2, vocab=50)
    for length in range(1, 12):
        target = tiny_llama(1, vocab=50, context=4 + length)
        for gamma in (1, 3, 7):
            made = speculate.speculative_generate(target, draft, PROMPTS[1], length, gamma,
                                                  temperature, 1.0)
            assert len(made.tokens) == length
    with pytest.raises(ValueError, match="exceed the target's context"):
        speculate.speculative_generate(target, target, PROMPTS[1], 12, 1, 0.0, 1.0)


def test_wrong_arguments_are_refused_in_one_sentence():
    call = speculate.speculative_generate
    with pytest.raises(ValueError, match="must share its target's tokenizer"):
        call(BIG[0], TARGET, PROMPTS[0], 5, 3, 0.0, 1.0)
    for arguments in ((0, 3, 0.0, 1.0), (5, -1, 0.0, 1.0), (5, 3, -1.0, 1.0), (5, 3, 1.0, 0.0),
                      (5, 3, 1.0, 1.1)):
        with pytest.raises(ValueError, match="must be"):
            call(BIG[0], BIG[1], PROMPTS[0], *arguments)
    with pytest.raises(ValueError, match="at least one token"):
        call(BIG[0], BIG[1], torch.zeros(1, 0, dtype=torch.int64), 5, 3, 0.0, 1.0)


def test_the_same_seed_gives_the_same_text_and_the_global_generator_serves_too():
    def run(generator):
        made = speculate.speculative_generate(BIG[0], BIG[1], PROMPTS[2], 20, 3, 1.0, 0.9,
                                              (), generator)
        return made.tokens

    assert run(torch.Generator().manual_seed(4)) == run(torch.Generator().manual_seed(4))
    torch.manual_seed(4)
    first = run(None)
    torch.manual_seed(4)
    assert run(None) == first


def test_a_greedy_mismatch_is_reported_with_both_logits(capsys):
    plain = speculate.autoregressive_generate(BIG[0], PROMPTS[1], 8, 0.0, 1.0).tokens
    other = plain[:5] + [(plain[5] + 1) % 50] + plain[6:]
    mismatch = speculate.report_mismatch(BIG[0], PROMPTS[1][0].tolist(), plain, other, 3, 5)
    logits = BIG[0](torch.cat((PROMPTS[1], torch.tensor([plain[:5]])), 1))[0, -1]
    assert mismatch["position"] == 5
    assert mismatch["plain"] == [plain[5], pytest.approx(logits.max().item(), rel=1e-5)]
    assert mismatch["speculative"][1] == pytest.approx(logits[other[5]].item(), rel=1e-4)
    assert "new token 5" in capsys.readouterr().out


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_damaged_target_or_drafter_is_called_that_and_writes_no_token(temperature):
    damaged = model.Llama(BIG[0].config).requires_grad_(False)
    damaged.load_state_dict(BIG[0].state_dict())
    damaged.lm_head.weight[7] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        speculate.autoregressive_generate(damaged, PROMPTS[1], 5, temperature, 1.0)
    for target, draft in ((damaged, BIG[0]), (BIG[0], damaged)):
        for rule in speculate.VERIFY:
            with pytest.raises(ValueError, match="not finite"):
                speculate.speculative_generate(target, draft, PROMPTS[1], 9, 3, temperature, 0.9,
                                               verify=rule)


# ---- Waits for a GPU ---------------------------------------------------------------------------

class Operators(TorchDispatchMode):
    """Counts the operators that would wait for a GPU: a number read by Python, a result whose size
    depends on the data, and what Python's numbers are made a tensor of (it is copied to the GPU).
    """

    waiting = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select",
               "unique2", "lift_fresh")

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name, options = function.overloadpacket.__name__, options or {}
        mask = name.startswith("index") and len(arguments) > 1 and any(
            getattr(i, "dtype", None) in (torch.bool, torch.uint8)
            for i in (arguments[1] if isinstance(arguments[1], (list, tuple)) else ()))
        moved = name == "_to_copy" and options.get("device") is not None
        self.count[name] += name in self.waiting or mask or moved
        return function(*arguments, **options)


class Calls(TorchFunctionMode):
    """Counts what never becomes an operator on a CPU: whole tensors read by Python."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_function__(self, function, types, arguments=(), options=None):
        name = getattr(function, "__name__", "")
        self.count[name] += name in ("tolist", "numpy", "cpu", "__array__")
        return function(*arguments, **options or {})


def waits(work):
    """How often work() would wait for a GPU."""
    with Calls() as calls, Operators() as operators:
        work()
    return sum((calls.count + operators.count).values())


def test_waits_are_counted():
    x = torch.arange(3.0)
    for work in (lambda: x.sum().item(), lambda: x.tolist(), lambda: bool(x[0] > 1),
                 lambda: x[x > 1], lambda: x[x.long()[1]], lambda: x.nonzero(), lambda: x.numpy(),
                 lambda: torch.tensor([1]), lambda: torch.equal(x, x), lambda: int(x[1])):
        assert waits(work) == 1
    assert waits(lambda: x[1:] + x[x.long()][:2].clamp(max=1).cumsum(0)) == 0


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("temperature, top_p", [(0.0, 1.0), (1.0, 1.0), (0.7, 0.9)])
def test_a_block_waits_once_for_a_gpu(rule, temperature, top_p, listed, monkeypatch):
    """Counted on the CPU. With 50 tokens top-p takes the way of a GPU, one sort of all."""
    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(NEAR, "draft_vocabulary", torch.arange(0, 50, 2) if listed else None)
    stream = speculate.speculative_stream(BIG[0], NEAR, PROMPTS[1], 40, 3, temperature, top_p, (),
                                          generator, rule)
    next(stream)
    with torch.inference_mode():
        counts = [waits(lambda: next(stream)) for _ in range(8)]
    assert counts == [1] * 8
    stream = speculate.autoregressive_stream(BIG[0], PROMPTS[1], 40, temperature, top_p)
    next(stream)
    with torch.inference_mode():
        assert [waits(lambda: next(stream)) for _ in range(8)] == [1] * 8


def test_a_rule_of_ones_own_may_answer_with_an_int_or_with_a_tensor(monkeypatch):
    """verify_token as a student writes it: the same texts."""
    def answers_with(kind):
        def verify(guesses, q, p, coins):
            kept = 0
            while kept < len(guesses):
                x = guesses[kept]
                if coins[kept] >= p[kept, x] / q[kept, x]:
                    return kind(kept), speculate.leftover(p[kept], q[kept])
                kept += 1
            return kind(kept), p[kept]
        return verify

    def texts():
        generator = torch.Generator().manual_seed(2)
        return [speculate.speculative_generate(BIG[0], NEAR, PROMPTS[1], 30, gamma, 1.0, 1.0, (),
                                               generator).tokens for gamma in (0, 1, 4)]

    expected = texts()
    for kind in (int, torch.tensor):
        monkeypatch.setitem(speculate.VERIFY, "token", answers_with(kind))
        assert texts() == expected


# ---- The script --------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folders(tmp_path_factory, sentencepiece_folder):
    """A target and a drafter on disk as the script expects them, with a real tokenizer.

    Their weights are random.
    """
    import shutil

    from data import tokenizer
    root = tmp_path_factory.mktemp("models")
    vocab = tokenizer.load(sentencepiece_folder).vocab_size
    for name, seed in (("target", 1), ("draft", 2)):
        model.save(tiny_llama(seed, vocab=vocab, context=128, std=0.3), root / name)
        for file in ("tokenizer.model", "tokenizer_config.json"):
            shutil.copy(sentencepiece_folder / file, root / name / file)
    return root


def script(folders, *arguments, run=run_script, **options):
    return run("speculate.py", "--target", folders / "target", "--draft", folders / "draft",
               "--device", "cpu", "--threads", 1, *arguments, **options)


def test_bench_writes_the_rows_that_design_promises(folders, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    files.write_jsonl(prompts, [{"task": task, "prompt": f"count to {i}"}
                                for task in ("b", "a") for i in range(3)])
    out = tmp_path / "bench.json"
    process = script(folders, "--bench", prompts, "--gamma", 1, 3, "--max-new-tokens", 12,
                     "--json", out)
    assert process.returncode == 0, process.stderr
    result = json.loads(out.read_text())
    rows = result["rows"]
    assert [(row["task"], row["gamma"]) for row in rows] == [
        ("b", 1), ("b", 3), ("a", 1), ("a", 3), ("all", 1), ("all", 3)]
    for row in rows:
        assert row["prompts"] == (6 if row["task"] == "all" else 3)
        assert 1 <= row["tau"] <= row["gamma"] + 1 and 0 <= row["alpha"] <= 1
        assert row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
        ratio = row["speculative_tokens_per_s"] / row["plain_tokens_per_s"]
        assert row["speedup"] == pytest.approx(ratio)
        assert row["mbsu"] == pytest.approx(row["tau"] / (result["size_ratio"] * row["gamma"] + 1))
        assert row["greedy_mismatches"] == 0
        assert len(row["kept_histogram"]) == row["gamma"] + 1 and row["decoding_speedup"] > 0
    assert "of those that kept all before it" in process.stdout
    assert rows[5]["new_tokens"] == sum(row["new_tokens"] for row in rows[1:4:2])


def test_a_killed_bench_leaves_the_earlier_result_and_its_own_beside_it(
        folders, tmp_path, monkeypatch):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "bench.json"
    files.write_jsonl(prompts, [{"task": "a", "prompt": f"count to {i}"} for i in range(4)])
    flags = ("--bench", prompts, "--max-new-tokens", 4, "--json", out)
    assert script(folders, *flags).returncode == 0
    earlier = out.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["bench.json", "prompts.jsonl"]

    def killed(*given, timed=speculate.timed):
        if given[-1] == 2:
            raise KeyboardInterrupt
        return timed(*given)

    with monkeypatch.context() as patch:
        patch.setattr(speculate, "timed", killed)
        assert script(folders, *flags).returncode == 130
    assert out.read_bytes() == earlier
    part = json.loads((tmp_path / "bench.json.part").read_text())
    assert [row["prompts"] for row in part["rows"]] == [2, 2]
    assert script(folders, *flags).returncode == 0
    assert not (tmp_path / "bench.json.part").exists()


def test_a_folder_for_json_is_refused_at_the_door(folders, tmp_path):
    assert_refused(script(folders, "--bench", tmp_path / "none", "--json", tmp_path),
                   f"{tmp_path} is a folder")


def test_the_largest_seed_times_prompts(folders, tmp_path):
    files.write_jsonl(tmp_path / "prompts.jsonl", [{"task": "a", "prompt": "count"}] * 2)
    process = script(folders, "--bench", tmp_path / "prompts.jsonl", "--max-new-tokens", 2,
                     "--seed", 9 * 10 ** 18)
    assert process.returncode == 0, process.stderr


def test_a_gamma_given_twice_counts_once_and_the_block_rule_has_no_acceptance_rate(folders,
                                                                                   tmp_path):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "bench.json"
    files.write_jsonl(prompts, [{"task": "a", "prompt": f"count to {i}"} for i in range(3)])
    process = script(folders, "--bench", prompts, "--gamma", 3, 3, "--max-new-tokens", 12,
                     "--temperature", 1, "--verify", "block", "--json", out)
    assert process.returncode == 0, process.stderr
    result = json.loads(out.read_text())
    rows = result["rows"]
    assert result["verify"] == "block"
    assert [(row["task"], row["gamma"], row["prompts"]) for row in rows] == [("a", 3, 3),
                                                                             ("all", 3, 3)]
    for row in rows:
        assert row["alpha"] is row["alpha_analytic"] is row["greedy_mismatches"] is None
        assert row["tau"] >= 1


def test_the_histogram_counts_whole_blocks_alone():
    """Blocks that the limit or an end token made shorter do not tell how many guesses are kept."""
    plain = speculate.autoregressive_generate(BIG[0], PROMPTS[1], 30, 0.0, 1.0).tokens
    args = argparse.Namespace(temperature=0.0, top_p=1.0, verify="token", seed=0)
    for eos, length in (((), 30), ((plain[7],), 30), ((), 12)):
        made = speculate.speculative_generate(BIG[0], NEAR, PROMPTS[1], length, 3, 0.0, 1.0, eos)
        not_cut = made.blocks[:-1] if made.cut else made.blocks
        whole = [kept for drafted, kept in not_cut if drafted == 3]
        row = report.bench_row("a", 3, [((made, 1.0, 0.1), (made, 1.0, 0.1))], args, 1.2, 0.05, 0.1)
        assert row["kept_histogram"] == [whole.count(k) for k in range(4)]
        assert sum(row["kept_histogram"]) == len(whole)
        assert made.cut == (made.tokens[-1] in eos and made.kinds[-1] == "accepted")


def test_a_piped_answer_is_plain_text_and_brackets_are_readable_without_colour(folders):
    plain = script(folders, "--prompt", "hello there", "--max-new-tokens", 20)
    assert plain.returncode == 0, plain.stderr
    assert "\033" not in plain.stdout and "tau" not in plain.stdout and "tau" in plain.stderr
    marked = script(folders, "--prompt", "hello there", "--max-new-tokens", 20,
                    "--trace", "brackets")
    colour = script(folders, "--prompt", "hello there", "--max-new-tokens", 20,
                    "--trace", "colour")
    assert "[accepted]" in marked.stdout and "]" in marked.stdout.split("---")[0]
    assert "\033[31m" in colour.stdout and "\033[0m" in colour.stdout


def test_an_answer_by_the_block_rule_prints_no_acceptance_rate(folders):
    for rule, expected in (("token", r"alpha [01]\.\d\d"), ("block", r"alpha -")):
        process = script(folders, "--prompt", "hello there", "--max-new-tokens", 20,
                         "--temperature", 1, "--verify", rule)
        assert re.search(expected, process.stderr), process.stderr


def test_chat_keeps_the_history_and_forgets_the_oldest_when_the_context_is_full(folders):
    process = script(folders, "--chat", "--max-new-tokens", 30, input="hello there\n" * 6 + "\n")
    assert process.returncode == 0, process.stderr
    assert "the oldest exchange is forgotten" in process.stdout
    assert process.stderr.count("tau") == 6


def test_chat_leaves_out_a_message_that_is_too_long_and_goes_on(folders):
    lines = "hello there\n" + "hello " * 300 + "\nhello there\n\n"
    process = script(folders, "--chat", "--max-new-tokens", 20, input=lines)
    assert process.returncode == 0, process.stderr
    assert "too long: at most 108 tokens fit" in process.stdout
    assert "forgotten" not in process.stdout and process.stderr.count("tau") == 2


def test_a_prompt_is_utf_8_even_where_the_terminal_is_said_to_be_ascii(folders):
    """Python hands its bytes over as halves of surrogate pairs there, and stdout cannot show é."""
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0"}
    process = run_process("speculate.py", "--target", folders / "target", "--draft",
                          folders / "draft", "--prompt", "gr\u00fc\u00dfe", "--max-new-tokens", 8,
                          env=environment)
    assert process.returncode == 0, process.stderr


def test_bad_input_is_one_sentence_and_exit_code_2(folders, tmp_path):
    assert_refused(script(folders, "--prompt", " ", run=run_process), "--prompt is empty")
    assert_refused(script(folders, "--prompt", "hello", "--gamma", 0), "--gamma is 0")
    assert_refused(script(folders, "--prompt", "hello " * 300),
                   "exceed the target's context of 128")
    assert_refused(script(folders, "--bench", tmp_path / "none.jsonl"), "no such file")
    (tmp_path / "empty.jsonl").write_text("")
    assert_refused(script(folders, "--bench", tmp_path / "empty.jsonl"), "no prompts")
    (tmp_path / "bad.jsonl").write_text('{"task": "a", "prompt": "x"}\n{"task": "a"')
    assert_refused(script(folders, "--bench", tmp_path / "bad.jsonl"), "line 2", "not JSON")
    (tmp_path / "empty_prompt.jsonl").write_text('{"task": "a", "prompt": ""}\n')
    assert_refused(script(folders, "--bench", tmp_path / "empty_prompt.jsonl"), "prompt 1")
    done = run_script("speculate.py", "--target", tmp_path / "x", "--draft", folders / "draft",
                      "--prompt", "a")
    assert_refused(done, "no such folder")
    assert_refused(script(folders, "--prompt", "a", "--device", "nonsense"), "use --device cpu")


def test_a_drafter_of_another_tokenizer_with_as_many_tokens_is_refused(folders, tmp_path):
    import shutil

    import sentencepiece
    draft = tmp_path / "draft"
    shutil.copytree(folders / "draft", draft)
    vocab = model.read_config(draft).vocab_size
    texts = ["another text has other pieces altogether"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(draft / "tokenizer"), vocab_size=vocab,
        model_type="bpe", byte_fallback=True, hard_vocab_limit=False, minloglevel=2, pad_id=3,
        control_symbols=["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"])
    done = run_script("speculate.py", "--target", folders / "target", "--draft", draft,
                      "--prompt", "a")
    assert_refused(done, "another tokenizer")


# ---- gamma auto --------------------------------------------------------------------------------

def costs(slope, draft_cost):
    """(passes, spent): passes[n] is the cost of a pass over n tokens, spent(blocks) their cost."""
    passes = [0.0] + [1 + slope * n for n in range(9)]

    def spent(blocks):
        return sum(drafted * draft_cost + passes[drafted + 1] for drafted, _ in blocks)
    return passes, spent


@pytest.mark.parametrize("draft_cost", [0.02, 0.05, 0.1, 0.5])
@pytest.mark.parametrize("slope", [0.0, 0.05, 0.1, 0.5])
def test_auto_with_a_useless_drafter_costs_at_most_three_per_cent(slope, draft_cost):
    """Over 256 tokens: from the start, or after up to 2,000 tokens at acceptance rate 0.95.

    The costs are counted, not measured with a clock.
    """
    passes, spent = costs(slope, draft_cost)
    choose = speculate.auto_gamma(draft_cost, passes)
    generator = torch.Generator().manual_seed(0)
    for good_tokens in (0, 300, 2000):
        blocks, made = [], 0
        while made < good_tokens:
            gamma = choose(blocks)
            coins = (torch.rand(gamma, generator=generator) < 0.95).long()
            blocks.append((gamma, int(coins.cumprod(0).sum())))
            made += blocks[-1][1] + 1
        before = len(blocks)
        for _ in range(256):                      # a useless drafter: one token a block
            blocks.append((choose(blocks), 0))
        assert spent(blocks[before:]) <= 1.03 * 256, good_tokens
        tries = any(drafted for drafted, _ in blocks[before:before + 40])
        assert tries or draft_cost + slope >= 0.5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_auto_in_the_loop_leaves_an_unrelated_drafter_and_keeps_the_text(temperature):
    passes, spent = costs(0.05, 0.05)
    choose, made = speculate.auto_gamma(0.05, passes), {}
    for drafter in ("equal", "unrelated"):
        generator = torch.Generator().manual_seed(0)
        made[drafter] = speculate.speculative_generate(
            BIG[0], PAIRS[drafter], PROMPTS[0], 60, 0, temperature, 1.0, (), generator,
            choose=choose)
        if temperature == 0:
            plain = speculate.autoregressive_generate(BIG[0], PROMPTS[0], 60, 0.0, 1.0)
            assert made[drafter].tokens == plain.tokens
    assert max(drafted for drafted, _ in made["equal"].blocks) == 8
    assert made["equal"].target_calls < 12
    assert spent(made["unrelated"].blocks) <= 1.03 * 60 + 3


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.6, 0.7, 0.8, 0.9])
def test_auto_comes_near_the_best_fixed_gamma(alpha):
    """Within 5 % of the best fixed gamma over 20,000 tokens.

    Every guess is accepted with probability alpha. The costs are like those of the real pair.
    """
    import losses
    passes = [0.0, 1.0, 1.08, 1.12, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7]
    draft_cost, generator = 0.06, torch.Generator().manual_seed(1)

    def block_cost(gamma):
        return gamma * draft_cost + passes[gamma + 1]

    choose, cost, tokens = speculate.auto_gamma(draft_cost, passes), 0.0, 0
    for _ in range(100):                          # texts of 200 tokens
        blocks, made = [], 0
        while made < 200:
            gamma = choose(blocks)
            kept = int((torch.rand(gamma, generator=generator) < alpha).long().cumprod(0).sum())
            blocks.append((gamma, kept))
            made += kept + 1
            cost += block_cost(gamma)
        tokens += made
    best = max(losses.implied_tau(alpha, gamma) / block_cost(gamma) for gamma in range(9))
    assert tokens / cost >= 0.95 * best


def test_measured_costs_are_those_of_the_passes(monkeypatch):
    target, draft = BIG
    seconds, given = [0.1, 0.11, 0.14, 0.14, 0.2, 0.21, 0.22, 0.23, 0.24], []

    def pass_seconds(llama, width, repeats=5):
        return 0.01 if llama is draft else seconds[width - 1]

    def auto_gamma(draft_cost, passes):
        given.extend((draft_cost, passes))

    monkeypatch.setattr(speculate, "pass_seconds", pass_seconds)
    monkeypatch.setattr(speculate, "auto_gamma", auto_gamma)
    speculate.measured_gamma(target, draft)
    draft_cost, passes = given
    assert draft_cost == pytest.approx(0.1)
    assert passes[1:] == pytest.approx([second / 0.1 for second in seconds])


def test_choose_is_told_the_past_blocks_alone():
    """Before each block: (drafted, kept) of the blocks before it, nothing of the block to come."""
    seen = []

    def choose(blocks):
        seen.append(list(blocks))
        return len(blocks) % 4

    generator = torch.Generator().manual_seed(3)
    made = speculate.speculative_generate(BIG[0], NEAR, PROMPTS[1], 30, 0, 1.0, 1.0, (), generator,
                                          choose=choose)
    assert len(seen) == made.target_calls
    assert [len(blocks) for blocks in seen] == list(range(len(seen)))
    whole = made.blocks[:-2]                      # the limit may shorten the last ones
    assert [drafted for drafted, _ in whole] == [i % 4 for i in range(len(whole))]
    assert sum(kept for _, kept in made.blocks) == made.accepted


# ---- The first minute --------------------------------------------------------------------------

def test_without_a_flag_the_tiny_pair_answers_traced_and_names_what_comes_next():
    done = run_process("speculate.py", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    shown, figures = done.stdout.split("\n---")
    answer = shown.splitlines()[-1]
    kept = re.findall(r"\[([^]]+)\]", answer)
    assert len(kept) >= 2 and len(answer.split()) > 5 and "\033" not in done.stdout
    tau = float(re.search(r"tau (\d\.\d\d)", figures).group(1))
    alpha = float(re.search(r"alpha (\d\.\d\d)", figures).group(1))
    assert 1.2 < tau <= 4 and 0.2 < alpha <= 1 and "the same text" in figures
    commands = re.findall(r"(?m)^(?:next:)? +((?:python|make) [\w. -]+?)(?:  |$)", figures)
    assert commands == ["python speculate.py --chat", "python losses.py", "make demo"]


def test_prompt_and_chat_take_the_tiny_pair_and_half_a_pair_is_refused():
    done = run_script("speculate.py", "--prompt", "What is a bridge?", "--device", "cpu")
    assert done.returncode == 0 and len(done.stdout.split()) > 3 and "tau" in done.stderr
    chat = run_script("speculate.py", "--chat", "--gamma", 3, "--device", "cpu",
                      input="What is a bridge?\n\n")
    assert chat.returncode == 0 and chat.stderr.count("tau") == 1
    for half in (("--target", "data/tiny_world/target"),
                 ("--draft", "data/tiny_world/drafter-aligned", "--chat")):
        assert_refused(run_script("speculate.py", *half), "belong together")
    assert_refused(run_script("speculate.py", "--prompt", "hi", "--json", "out/x.json"),
                   "--json needs --bench")
    # Another pair, named with both flags, is asked the same question.
    base = run_script("speculate.py", "--target", "data/tiny_world/target",
                      "--draft", "data/tiny_world/drafter-base", "--device", "cpu")
    assert base.returncode == 0 and "the same text" in base.stdout


@pytest.mark.parametrize("flags", [("--temperature", "nan"), ("--temperature", "-1"),
                                   ("--temperature", "inf"), ("--top-p", "0"), ("--top-p", "1.5"),
                                   ("--gamma", "65"), ("--gamma", "x"), ("--max-new-tokens", "0"),
                                   ("--threads", "-1"), ("--threads", "1000000"),
                                   ("--limit", "-1"), ("--seed", "-5")])
def test_a_number_outside_its_bounds_is_one_sentence(flags):
    name, value = flags
    assert_refused(run_script("speculate.py", "--prompt", "a", *flags),
                   f"{name} is {value}; expected")
