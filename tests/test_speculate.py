"""Speculative decoding is lossless: the one claim that must never break.

The texts of a tiny world (3 tokens, 7 places, 2,187 possible texts) are sampled by the loop and compared, by
chi-square, with their exact probabilities, which are enumerated with whole, uncached passes of the target.
"""

import inspect
import itertools
import math
from collections import Counter

import pytest
import torch

import model
import speculate
from conftest import tiny_llama

PROMPT, LENGTH, SAMPLES = [1, 0, 2], 7, 1500


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
def test_speculative_sampling_matches_the_target_distribution(drafter, gamma, shape, record_property):
    p_value, kinds = measure(speculate.speculative_generate, drafter, gamma, *shape)
    record_property("p_value", p_value)
    # Nothing is proved where nothing was drafted, or where one of the loop's branches was never taken.
    if drafter == "equal":
        assert kinds["accepted"] > 0.4 * SAMPLES * LENGTH and kinds["corrected"] == 0 and kinds["bonus"] > 0
    elif drafter == "unrelated":
        assert min(kinds[kind] for kind in ("accepted", "corrected", "bonus")) > 100, kinds
    else:
        assert kinds["corrected"] > 0.3 * SAMPLES * LENGTH, kinds
    assert p_value > 0.01


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
    p_value, _ = measure(mutant(*BUGS[bug]), "unrelated", 3, 1.0, 1.0)
    assert p_value < 1e-6


def test_a_loop_that_drafts_nothing_is_seen():
    broken = mutant("for _ in range(min(gamma, max_new_tokens - len(made.tokens) - 1)):", "for _ in range(0):")
    _, kinds = measure(broken, "unrelated", 3, 1.0, 1.0, samples=20)
    assert kinds["accepted"] == 0  # what the assertions on kinds above refuse
