"""Exercise 2: the leftover distribution. (20 minutes)

A token from q is kept with probability min(1, p(x) / q(x)). So x comes out as a kept guess with
probability min(p(x), q(x)), and the guess is refused with probability 1 - sum min(p, q). After a
refusal the next token is drawn from a third distribution. Which one makes the whole come out as p?

Two traps. Where p = q nothing is ever refused, and yet the function is called: by rounding a
refusal can happen, so answer with p. And where p and q differ by rounding alone, a distribution
must come out, too.

Grade: python tests/exercises/grade.py 02
"""


def leftover(p, q):
    """What the token after a refusal is drawn from: (V,) fp64, summing to 1; p where p = q.

    p, q: (V,) fp64, probabilities, each summing to 1. Either may hold zeros.
    """
    raise NotImplementedError
