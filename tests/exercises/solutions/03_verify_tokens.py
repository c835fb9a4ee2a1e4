"""Exercise 3: verify one block, token by token. (45 minutes)

The drafter wrote gamma guesses: guess i was drawn from q[i]. The target read them all in one pass
and gives p[i] at each guess, and p[gamma] behind the last one. Decide from left to right: keep
guess x = guesses[i] where coins[i] is below p[i, x] / q[i, x], and stop at the first refusal. Say
how many are kept, and what the token behind them is drawn from: after a refusal the leftover
distribution of that place (exercise 2), after a block that was kept whole the last p.

Nothing in here is random: the coins come in as numbers. Who enumerates guesses and coins can
therefore prove that the text is distributed as the target's own, whatever q is. The grader does.
With this function in speculate.VERIFY, `speculate.py --verify` uses it.

Traps: a coin can be 0, and a guess with p = 0 must not be kept even then; a block may be empty.

Grade: python tests/exercises/grade.py 03
"""


def verify(guesses, q, p, coins):
    """(kept, follow): how many guesses are kept, 0 to gamma, and the next token's distribution.

    guesses (gamma,) int64; q (gamma, V), p (gamma + 1, V) fp64, probabilities; coins (gamma,)
    uniform in [0, 1). kept: an int; follow (V,) fp64, summing to 1.
    """
    kept = 0
    for x in guesses.tolist():
        # q > 0: the drafter drew x. Strictly below: a coin may be 0.
        if not coins[kept] < p[kept, x] / q[kept, x]:
            return kept, leftover(p[kept], q[kept])
        kept += 1
    return kept, p[kept]


def leftover(p, q):
    """max(0, p - q) over its sum; p where rounding left nothing."""
    rest = (p - q).clamp(min=0)
    total = rest.sum()
    return rest / total if total > 0 else p
