"""Exercise 6: block efficiency, and the best gamma. (25 minutes)

Suppose that each guess is kept with probability alpha, independently of all others, and that the
first refusal ends the block. tau is the expected number of tokens that a block of gamma guesses
gives, the target's own token counted.

A block costs gamma drafter steps and one pass of the target over gamma + 1 tokens. Choose the gamma
that gives the most expected tokens for its cost. gamma 0 is plain decoding, and it may win.

Traps: alpha 1, where the usual formula is 0 / 0; gamma 0; two gammas that are equally good.

Grade: python tests/exercises/grade.py 06
"""


def implied_tau(alpha, gamma):
    """Expected tokens of a block, a number from 1 to gamma + 1. alpha: 0 to 1; gamma: an int >= 0.
    """
    # Token k + 1 comes out where the first k guesses are all kept.
    return sum(alpha ** k for k in range(gamma + 1))


def best_gamma(alpha, draft_cost, pass_costs, largest):
    """The gamma from 0 to `largest`, both included, with the most tokens per cost; of equally good
    ones the smallest. An int.

    Costs are in plain steps of the target: draft_cost, a number, of one drafter step; pass_costs[n]
    of a target pass over n tokens, a list of at least largest + 2 numbers.
    """
    def tokens_per_cost(gamma):
        return implied_tau(alpha, gamma) / (gamma * draft_cost + pass_costs[gamma + 1])
    return max(range(largest + 1), key=tokens_per_cost)      # max takes the first of equal ones
