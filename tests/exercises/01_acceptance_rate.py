"""Exercise 1: the acceptance rate of p and q. (15 minutes)

The drafter draws a token x from its own distribution q. The target, whose distribution is p, keeps
it with probability min(1, p(x) / q(x)). How likely is it that the token is kept?

Write it as a sum over the vocabulary. What is it where p = q? Where no token is in both?

Grade: python tests/exercises/grade.py 01
"""


def acceptance_rate(p, q):
    """The probability that a token drawn from q is kept, a number from 0 to 1.

    p, q: (V,) fp64, probabilities, each summing to 1. Either may hold zeros.
    """
    raise NotImplementedError
