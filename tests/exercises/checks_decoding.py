"""Checks of the exercises on decoding: 1 to 6, 13 and 14."""

import itertools
from collections import Counter

import torch
import torch.nn.functional as F
from checks import add, call, lossless, near, p_and_q, randoms, same, seeded, tiny_llama, vector

import model
import speculate

CHECKS = {}


# ---- 1: the acceptance rate --------------------------------------------------------------------

def rate_is_the_sum(its):
    for seed in range(5):
        p, q = p_and_q(seed, 7)
        expected = sum(b * min(1, a / b) for a, b in zip(p.tolist(), q.tolist()))
        if not near(call(its.acceptance_rate, p, q), expected):
            return False
    return True


def equal_are_always_kept(its):
    p, _ = p_and_q(5, 7)
    sparse = vector(0, 0.25, 0.75, 0)
    rate = call(its.acceptance_rate, sparse, sparse)
    return near(call(its.acceptance_rate, p, p), 1) and near(rate, 1)


def disjoint_are_never_kept(its):
    p, q = vector(0.5, 0.5, 0, 0), vector(0, 0, 0.25, 0.75)
    half = vector(0.5, 0, 0.5, 0)
    rates = call(its.acceptance_rate, p, q), call(its.acceptance_rate, half, p)
    return near(rates[0], 0) and near(rates[1], 0.5)


CHECKS[1] = [
    (4, "it is the sum over x of q(x) min(1, p(x) / q(x))", rate_is_the_sum,
     "x is drawn with q(x), and kept with min(1, p(x) / q(x)); both must hold"),
    (3, "1 where p = q, also where tokens have probability 0", equal_are_always_kept,
     "0 / 0 is NaN; q(x) min(1, p(x) / q(x)) can be written without a division"),
    (3, "0 where no token is in both", disjoint_are_never_kept,
     "a token with q = 0 is never drawn, one with p = 0 never kept")]


# ---- 2: the leftover distribution --------------------------------------------------------------

PAIRS = [p_and_q(seed, 7) for seed in range(5)] + [
    [vector(0.5, 0.5, 0), vector(0, 0.25, 0.75)], [vector(0, 1, 0), vector(1, 0, 0)]]


def kept_and_refused_make_p(its):
    for p, q in PAIRS:
        kept = torch.minimum(p, q)
        if not same(kept + (1 - kept.sum()) * call(its.leftover, p, q), p):
            return False
    return True


def it_is_a_distribution(its):
    for p, q in PAIRS:
        rest = call(its.leftover, p, q)
        if not near(rest.sum(), 1) or rest.min() < 0:
            return False
    return True


def equal_distributions_leave_p(its):
    nudge = torch.zeros(7, dtype=torch.float64)
    nudge[3] = 1e-16
    for p, _ in PAIRS:
        close = call(its.leftover, p + nudge[:len(p)], p)
        if not same(call(its.leftover, p, p), p) or not near(close.sum(), 1) or close.min() < 0:
            return False
    return True


CHECKS[2] = [
    (5, "what is kept and what follows a refusal make p together, to 1e-12",
     kept_and_refused_make_p, "solve min(p, q) + P(refused) f = p for f"),
    (2, "it sums to 1", it_is_a_distribution, "divide by the sum of what is left over"),
    (3, "p where p = q; never NaN", equal_distributions_leave_p,
     "where nothing is left over its sum is 0, and 0 / 0 is NaN")]


# ---- 3: verify one block -----------------------------------------------------------------------

# (q, p) of three tokens. Where p < q, p / q is a multiple of 1/8, so eight coins in the middles of
# the eighths stand for all: exactly the share p / q of them lies below p / q. No ratio is rounded.
EIGHTHS = [(vector(4, 2, 2) / 8, vector(2, 4, 2) / 8),
           (vector(8, 16, 8) / 32, vector(1, 10, 21) / 32),
           (vector(8, 8, 0) / 16, vector(3, 0, 13) / 16),
           (vector(8, 8, 48) / 64, vector(7, 27, 30) / 64),
           (vector(1, 1, 2) / 4, vector(1, 1, 2) / 4),
           (vector(0, 1, 0), vector(0, 0, 1))]
MIDDLES = (torch.arange(8, dtype=torch.float64) + 0.5) / 8


def blocks(first):
    """Every block of two guesses and two coins: (guesses, q, p, coins, its probability), where q
    and p behind a text are a pair of EIGHTHS, another one for each text; and that p."""
    def pair(text):
        return EIGHTHS[(first + len(text) + 2 * sum(text)) % len(EIGHTHS)]

    def every():
        for x, y in itertools.product(range(3), repeat=2):
            (q1, p1), (q2, p2), (_, p3) = pair(()), pair((x,)), pair((x, y))
            if (weight := (q1[x] * q2[y]).item()) > 0:
                q, p = torch.stack([q1, q2]), torch.stack([p1, p2, p3])
                for coins in itertools.product(MIDDLES.tolist(), repeat=2):
                    yield torch.tensor([x, y]), q, p, vector(*coins), weight / 64
    return every(), lambda text: pair(text)[1].tolist()


def verifying_is_lossless(its):
    for first in range(len(EIGHTHS)):
        mass, (every, p_after) = Counter(), blocks(first)
        for guesses, q, p, coins, weight in every:
            kept, follow = call(its.verify, guesses, q, p, coins)
            if follow.shape != (3,):
                return False
            add(mass, weight, guesses.tolist(), int(kept), follow)
        if not lossless(mass, p_after, 3):
            return False
    return True


def each_guess_has_its_coin(its):
    for first in range(3):
        for guesses, q, p, coins, _ in blocks(first)[0]:
            below = [coins[i] < p[i, x] / q[i, x] for i, x in enumerate(guesses)]
            if int(call(its.verify, guesses, q, p, coins)[0]) != (*below, False).index(False):
                return False
    return True


def coins_of_zero_and_empty_blocks(its):
    q, p = vector(0.5, 0.5, 0)[None], torch.stack([vector(0.5, 0, 0.5), vector(0, 0, 1)])
    kept, follow = call(its.verify, torch.tensor([1]), q, p, vector(0))
    empty = call(its.verify, torch.tensor([], dtype=torch.int64), q[:0], p[:1], vector())
    return (int(kept) == 0 and same(follow, vector(0, 0, 1))
            and int(empty[0]) == 0 and same(empty[1], p[0]))


CHECKS[3] = [
    (5, "the text is distributed as the target's own: all guesses and coins, 3 tokens, gamma 2",
     verifying_is_lossless, "which distribution follows a refusal, and which a block kept whole?"),
    (3, "a guess is kept where its own coin is below p / q, up to the first refusal",
     each_guess_has_its_coin, "behind a refusal nothing counts, whatever the later coins say"),
    (2, "a coin of 0 keeps no guess with p = 0, and a block may be empty",
     coins_of_zero_and_empty_blocks, "strictly below; without guesses the next token is p[0]'s")]


# ---- 4: one coin a position --------------------------------------------------------------------

def sixty_fourths(seed, tokens):
    """p and q whose entries are multiples of 1/64, some of them 0: 64 coins stand for all."""
    generator = seeded(seed)
    draws = [torch.randint(tokens, (64,), generator=generator).square() // tokens for _ in range(2)]
    return [torch.bincount(drawn, minlength=tokens).double() / 64 for drawn in draws]


LATTICE = [(i + 0.5) / 64 for i in range(64)]
COUPLES = [sixty_fourths(seed, tokens) for seed, tokens in enumerate((3, 3, 4, 5, 8))]
COUPLES += [[vector(2, 1, 1) / 4, vector(1, 1, 2) / 4], [vector(0, 1, 0), vector(0, 0, 1)]]


def tokens_own_intervals(its):
    for p in itertools.chain(*COUPLES):
        owners = [x for x, share in enumerate(p.tolist()) for _ in range(round(64 * share))]
        if [int(call(its.token_at, p, coin)) for coin in LATTICE] != owners:
            return False
    tenths = torch.tensor([0.1] * 10 + [0], dtype=torch.float64)     # their sum is below 1
    return int(its.token_at(vector(0, 1), 0.0)) == 1 and int(its.token_at(tenths, 1 - 2**-53)) == 9


def random_table(seed, tokens):
    """A model: its distribution behind a text depends on the last two tokens."""
    table = torch.softmax(randoms(seeded(seed), tokens, tokens, tokens), -1)
    return lambda text: table[text[-2], text[-1]].clone()


def text_is_plain_decodings(its):
    for seed, tokens in enumerate((3, 5)):
        target, prompt = random_table(seed, tokens), [1, 0]
        text = list(prompt)
        while len(text) < 42:
            sums = itertools.accumulate(target(text).tolist())
            coin = its.coin(seed, len(text))
            text.append(next((x for x, total in enumerate(sums) if coin < total), tokens - 1))
        uniform = torch.full((tokens,), 1 / tokens, dtype=torch.float64)
        stubborn = F.one_hot(torch.tensor(1), tokens).double()
        drafters = (target, random_table(9, tokens), lambda _: uniform, lambda _: stubborn)
        for draft, gamma in itertools.product(drafters, (1, 2, 4)):
            if its.generate(target, draft, prompt, 40, gamma, seed) != text[2:]:
                return False
    return True


def acceptance_is_the_overlap(its):
    for p, q in COUPLES:
        kept = 0
        for coin in LATTICE:
            guess = call(its.token_at, q, coin)
            kept += call(its.verify, [guess, guess], torch.stack([p, p, p]), [coin] * 3)[0]
        starts = [torch.cat([vector(0), d.cumsum(0)]) for d in (p, q)]
        overlap = sum(max(0.0, float(min(p1, q1) - max(p0, q0))) for p0, p1, q0, q1
                      in zip(starts[0], starts[0][1:], starts[1], starts[1][1:]))
        bound = torch.minimum(p, q).sum().item()
        mine = call(its.acceptance, p, q)
        if not near(kept / 128, overlap) or not near(mine, overlap) or float(mine) > bound + 1e-12:
            return False
    return True


CHECKS[4] = [
    (3, "each token owns its interval of the cumulative sum, and a token with p = 0 none",
     tokens_own_intervals, "the first token whose sum is above the coin; a coin can be above all"),
    (4, "the text is plain decoding's with the same coins, whatever the drafter",
     text_is_plain_decodings, "the token that follows is the target's own at that position's coin"),
    (3, "a guess is kept as often as the intervals overlap, at most sum min(p, q)",
     acceptance_is_the_overlap,
     "token x's two intervals share what lies between the larger start and the smaller end")]


# ---- 5: roll back the caches -------------------------------------------------------------------

PROMPT, NEW_TOKENS = [1, 0, 2], 20


def models_5():
    """(target, draft, gamma): a drafter that is mostly right, one that is equal, and a stranger."""
    for seed, gamma in ((0, 1), (1, 3)):
        similar = tiny_llama(seed)
        similar.lm_head.weight.add_(0.3 * torch.randn(8, 8, generator=seeded(seed)))
        for draft in (similar, tiny_llama(seed), tiny_llama(seed + 9)):
            yield tiny_llama(seed), draft, gamma


@torch.inference_mode()
def without_caches(target, draft, gamma):
    """(tokens, blocks) of greedy speculative decoding that reads the whole text each time."""
    text, guessed, end = list(PROMPT), [], len(PROMPT) + NEW_TOKENS
    while len(text) < end:
        guesses = []
        for _ in range(gamma):
            guesses.append(draft(torch.tensor([text + guesses]))[0, -1].argmax().item())
        choices = target(torch.tensor([text + guesses]))[0, -gamma - 1:].argmax(-1).tolist()
        kept = [a == b for a, b in zip(guesses + [None], choices)].index(False)
        text += choices[:kept + 1]
        guessed.append(guesses)
    return text[len(PROMPT):end], guessed


def text_is_that_without_caches(its):
    return all(its.generate(target, draft, PROMPT, NEW_TOKENS, gamma)[0]
               == without_caches(target, draft, gamma)[0] for target, draft, gamma in models_5())


def guesses_are_those_without_caches(its):
    return all(its.generate(target, draft, PROMPT, NEW_TOKENS, gamma)
               == without_caches(target, draft, gamma) for target, draft, gamma in models_5())


def nothing_is_read_twice(its):
    for target, draft, gamma in models_5():
        reads = {target: [], draft: []}           # tokens in each pass

        def count(llama, given, reads=reads):
            reads[llama].append(given[0].shape[1])

        target.register_forward_pre_hook(count)
        draft.register_forward_pre_hook(count)
        rounds = len(its.generate(target, draft, PROMPT, NEW_TOKENS, gamma)[1])
        # The drafter has two tokens to read after a block that was kept whole, else one.
        if (reads[target] != [len(PROMPT) + gamma] + [gamma + 1] * (rounds - 1)
                or len(reads[draft]) != gamma * rounds or max(reads[draft][1:]) > 2):
            return False
    return True


CHECKS[5] = [
    (3, "greedy text equals that of a loop without caches", text_is_that_without_caches,
     "the columns of refused guesses must not stay in use, nor may a token be left unread"),
    (4, "each block's guesses equal those without caches, also after a block kept whole",
     guesses_are_those_without_caches, "after a full block the drafter has read one token less"),
    (3, "no token of the text is read twice", nothing_is_read_twice,
     "roll back what was refused and the newest token, which nobody has read; nothing else")]


# ---- 6: tau and the best gamma -----------------------------------------------------------------

COSTS = [0, 1, 1.1, 1.2, 1.35, 1.5, 1.6, 1.9]


def brute_tau(alpha, gamma):
    """Expected tokens over all 2^gamma outcomes of gamma independent guesses."""
    total = 0.0
    for kept in itertools.product((True, False), repeat=gamma):
        probability = alpha ** sum(kept) * (1 - alpha) ** (gamma - sum(kept))
        total += probability * ((*kept, False).index(False) + 1)
    return total


def tau_is_the_expectation(its):
    return all(near(its.implied_tau(alpha, gamma), brute_tau(alpha, gamma), 1e-9)
               for alpha in (0.05, 0.5, 0.8, 0.99) for gamma in range(7))


def tau_at_the_ends(its):
    return all(near(its.implied_tau(0, gamma), 1) and near(its.implied_tau(1.0, gamma), gamma + 1)
               for gamma in range(7))


def best_is_the_best_of_all(its):
    for alpha, draft_cost, largest in itertools.product((0.0, 0.1, 0.4, 0.7, 0.9, 1.0),
                                                        (0.01, 0.2, 0.6), range(6)):
        values = [brute_tau(alpha, gamma) / (gamma * draft_cost + COSTS[gamma + 1])
                  for gamma in range(largest + 1)]
        if its.best_gamma(alpha, draft_cost, list(COSTS), largest) != values.index(max(values)):
            return False
    return True


def smallest_of_equal_ones(its):
    # alpha 0: one token whatever gamma; alpha 1: gamma + 1 tokens at gamma + 1 steps; alpha 1/2:
    # 1, 1.5, 1.75 tokens at cost 2, 1.5, 1.75. All are equal without rounding.
    cases = [(0.0, [1] * 6, 4, 0), (1.0, [*range(6)], 4, 0), (0.5, [0, 2, 1.5, 1.75, 4], 3, 1)]
    return all(its.best_gamma(alpha, 0.0, pass_costs, largest) == expected
               for alpha, pass_costs, largest, expected in cases)


CHECKS[6] = [
    (3, "tau is the mean over all outcomes of gamma guesses", tau_is_the_expectation,
     "token k + 1 of a block comes out if the first k guesses were all kept"),
    (2, "tau is 1 at alpha 0, and gamma + 1 at alpha 1", tau_at_the_ends,
     "write the sum, not the fraction"),
    (3, "the best gamma is that of trying all, from 0 to the largest", best_is_the_best_of_all,
     "tokens over gamma draft_cost + pass_costs[gamma + 1]; gamma 0 and the largest are included"),
    (2, "of equally good ones the smallest", smallest_of_equal_ones,
     "max with a key takes the first of equal ones")]


# ---- 13: block verification --------------------------------------------------------------------

def tables(tokens, gamma, seed):
    """All guesses: (guesses, q, p, their probability), the distributions behind each text at
    random; and the target's."""
    generator, known = seeded(seed), {}

    def pair(text):
        if text not in known:
            known[text] = torch.softmax(randoms(generator, 2, tokens, scale=1.5), -1)
        return known[text]

    every = []
    for guesses in itertools.product(range(tokens), repeat=gamma):
        pairs = [pair(guesses[:i]) for i in range(gamma + 1)]
        q, p = torch.stack([q for q, _ in pairs[:-1]]), torch.stack([p for _, p in pairs])
        weight = q[range(gamma), list(guesses)].prod().item()
        every.append((torch.tensor(guesses), q, p, weight))
    return every, lambda text: pair(text)[1].tolist()


SIZES = [(2, 1), (2, 3), (3, 2), (3, 3)]         # tokens, gamma


def block_is_lossless(its):
    for (tokens, gamma), seed in itertools.product(SIZES, range(2)):
        mass, (every, p_after) = Counter(), tables(tokens, gamma, seed)
        for guesses, q, p, weight in every:
            keep = call(its.keep_probabilities, guesses, q, p)
            if keep.shape != (gamma + 1,) or not near(keep.sum(), 1) or keep.min() < -1e-12:
                return False
            for kept, chance in enumerate(keep.tolist()):
                if chance > 1e-15:                # below it is rounding's
                    follow = call(its.follow, guesses, q, p, kept)
                    add(mass, weight * chance, guesses.tolist(), kept, follow)
        if not lossless(mass, p_after, gamma + 1):
            return False
    return True


def kept_on_average(its, tokens, gamma, seed):
    """The mean number of kept guesses: the student's, and the token rule's."""
    ours = theirs = 0.0
    for guesses, q, p, weight in tables(tokens, gamma, seed)[0]:
        keep = call(its.keep_probabilities, guesses, q, p)
        ours += weight * (keep * torch.arange(gamma + 1)).sum().item()
        ratios = p[range(gamma), guesses] / q[range(gamma), guesses]
        theirs += weight * ratios.clamp(max=1).cumprod(0).sum().item()
    return ours, theirs


def keeps_more(its):
    kept = {(*size, seed): kept_on_average(its, *size, seed) for size in SIZES for seed in range(3)}
    for (_, gamma, _), (ours, theirs) in kept.items():
        if ours < theirs - 1e-12 or gamma == 1 and not near(ours, theirs):
            return False
    ours, theirs = zip(*kept.values())
    return sum(ours) > 1.02 * sum(theirs)


def equal_drafters_are_kept_whole(its):
    p = p_and_q(13, 4, 5)[0]
    guesses = torch.tensor([4, 0, 2])
    keep = call(its.keep_probabilities, guesses, p[:3], p)
    return same(keep, vector(0, 0, 0, 1)) and same(call(its.follow, guesses, p[:3], p, 3), p[3])


CHECKS[13] = [
    (5, "the text is distributed as the target's own, to 1e-12: all guesses", block_is_lossless,
     "k is kept where its coin is below h_k and no later coin below its own; w belongs in follow"),
    (3, "more is kept than by the token rule; the same at gamma 1", keeps_more,
     "w_i can recover: w_(i-1) p / q, and only then at most 1"),
    (2, "an equal drafter is kept whole, without NaN", equal_drafters_are_kept_whole,
     "h_i is 1 where it is 0 / 0")]


# ---- 14: adaptive gamma ------------------------------------------------------------------------

DRAFT_COST, PASS_COSTS, LENGTH = 0.1, [0, 1, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3, 1.35, 1.4], 256


def contrary(llama):
    """A drafter whose favourite is the token that this model likes least."""
    draft = model.Llama(llama.config).requires_grad_(False)
    draft.load_state_dict(llama.state_dict())
    draft.lm_head.weight.mul_(-1)
    return draft


def chooser(its):
    choose = its.make_choose(DRAFT_COST, list(PASS_COSTS))

    def checked(blocks):
        gamma = choose(list(blocks))
        if gamma not in range(len(PASS_COSTS) - 1):
            raise ValueError(f"gamma {gamma} is not from 0 to {len(PASS_COSTS) - 2}")
        return int(gamma)
    return checked


def made_with(its, draft, target):
    """The Generation of a greedy text."""
    return speculate.speculative_generate(target, draft, torch.tensor([PROMPT]), LENGTH, 0, 0.0,
                                          1.0, choose=chooser(its))


def play(choose, right):
    """The blocks of a drafter whose guess of token i is kept if right(i), without any model."""
    played, made = [], 1
    while made < LENGTH:
        gamma = min(choose(played), LENGTH - made - 1)
        kept = next((i for i in range(gamma) if not right(made + i)), gamma)
        played.append((gamma, kept))
        made += kept + 1
    return played


def cost(played):
    """Over plain decoding's: the prompt's pass gives the first token of either."""
    return sum(n * DRAFT_COST + PASS_COSTS[n + 1] for n, _ in played) / (LENGTH - 1)


def useless_costs_little(its):
    target = tiny_llama(0)
    made = made_with(its, contrary(target), target)
    return made.accepted == 0 and len(made.tokens) == LENGTH and cost(made.blocks) <= 1.03


def equal_drafts_long(its):
    target = tiny_llama(0)
    made = made_with(its, target, target).blocks
    later = [n for n, _ in made[len(made) // 2:-1]]          # the last block may lack room
    return sum(later) >= 6 * len(later)


def late_gets_its_chance(its):
    return cost(play(chooser(its), lambda i: i >= 64)) <= 0.85


def follows_from_the_past(its):
    """A fresh chooser, shown the blocks so far, answers as the one that has seen them happen."""
    for right in (lambda i: i % 5 > 0, lambda i: i >= 64, lambda i: (i // 40) % 2 == 0):
        played = play(chooser(its), right)
        for i in range(0, len(played) - 9, 7):    # the last blocks may lack room
            if chooser(its.load_again())(played[:i]) != played[i][0]:
                return False
    return True


CHECKS[14] = [
    (3, "a useless drafter costs at most 1.03 of plain decoding", useless_costs_little,
     "gamma 0 costs nothing; what trying again costs is cost(1) - 1 = 0.15 a time"),
    (3, "an equal drafter writes long blocks", equal_drafts_long,
     "where all is kept alpha must come near 1 within a few blocks"),
    (2, "a drafter that becomes right later gets its chance", late_gets_its_chance,
     "with gamma 0 nothing is learnt: try a guess now and then, and forget the distant past"),
    (2, "the choice follows from the past blocks alone", follows_from_the_past,
     "no memory of your own, no random numbers: the same blocks, the same answer")]
