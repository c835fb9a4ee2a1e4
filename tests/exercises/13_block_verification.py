"""Exercise 13: block verification. (60 minutes)

Token by token, an early refusal ends the block even where the later guesses are excellent. Judged
as a whole, a block keeps more on average and is just as lossless (Sun et al., 2024, arXiv
2403.10444). For guesses x_1 ... x_gamma, where p_i and q_i are the distributions x_i was judged by:

    w_0 = 1,   w_i = min(1, w_(i-1) p_i(x_i) / q_i(x_i))
    Z_i = sum_x max(0, w_i p_(i+1)(x) - q_(i+1)(x))                for i < gamma
    h_i = Z_i / (Z_i + 1 - w_i)   (1 where that is 0 / 0),         h_gamma = w_gamma

Each i from 1 to gamma has a coin of its own, and the *largest* i whose coin is below h_i is how
many guesses are kept; 0 where there is none. If all were kept the next token is drawn from the last
p, otherwise from what q left over of w p: max(0, w_kept p_(kept+1) - q_(kept+1)), over its sum.

Here the coins are integrated out: say how likely each count is. The grader enumerates all guesses
and proves that the text is distributed as the target's own, and that more is kept than by the token
rule. Mind gamma 1, where the two rules are one, and p = q.

Grade: python tests/exercises/grade.py 13
"""


def keep_probabilities(guesses, q, p):
    """The probability that exactly 0, 1, ..., gamma guesses are kept: (gamma + 1,) fp64.

    guesses (gamma,) int64, gamma at least 1; q (gamma, V), p (gamma + 1, V) fp64, probabilities,
    q above 0 at each guess.
    """
    raise NotImplementedError


def follow(guesses, q, p, kept):
    """What the token behind `kept` guesses (an int, 0 to gamma) is drawn from: (V,) fp64, summing
    to 1. Never asked for where this count has probability 0."""
    raise NotImplementedError
