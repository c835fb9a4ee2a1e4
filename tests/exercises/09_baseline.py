"""Exercise 9: an unbiased baseline of your own. (45 minutes)

REINFORCE with a baseline b averages (r(x) - b) grad log q(x) over sampled tokens x. Since
E_q[grad log q] = 0, its mean is the same for every b that does not depend on x. Its noise is not:

    noise = E|g - Eg|^2 / |Eg|^2      (losses.exact_noise enumerates it for one token a position)

The paper takes for b the mean reward of the batch, one number for all positions, with the sample
itself in it: a little biased, and far from the best where positions differ. Find a baseline at each
position that is a function of p and q there, and never of what was drawn, with at most 0.85 of the
batch mean's noise. The positions that are graded mix overlaps sum min(p, q) from 0.1 to 0.98
(losses.example makes them).

A hint for the derivation: with s(x) = grad log q(x), minimise E_q[(r - b)^2 |s|^2] over b.

The baselines in losses.py raise an error while this is graded: write your own.

Grade: python tests/exercises/grade.py 09
"""


def baseline(rewards, p, q, mu):
    """b, to be subtracted from the rewards: a number, or a tensor that broadcasts to (N, K).

    rewards (N, K): 1 where p(x) > q(x) at the K tokens x drawn at each of N positions, else 0.
    p, q (N, V) probabilities; mu: the mean of all rewards, a scalar tensor. All fp64.
    """
    raise NotImplementedError
