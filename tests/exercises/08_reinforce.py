"""Exercise 8: TVD as REINFORCE. (45 minutes)

With the reward r(x) = 1 where p(x) > q(x), else 0, the gradient of TVD in the draft logits is

    grad TVD(p, q) = -E_{x~q}[ r(x) grad log q(x) ]

That is a policy gradient: the drafter is the policy, a token is an action. So it can be estimated
from a few tokens x_1 ... x_K drawn from q, without a sum over the vocabulary. Write the surrogate,
a loss whose gradient is this estimate. Its value does not matter.

The grader enumerates instead of sampling: your gradient, averaged over every possible draw with its
probability, must equal the exact gradient of TVD. Use no baseline here; exercise 9 is about them.

Traps: the reward is a number, no gradient flows through it, nor into the target; the estimate is
a mean over the K tokens; keep fp64.

Grade: python tests/exercises/grade.py 08
"""


def surrogate(draft_logits, target_logits, tokens):
    """A loss of each position, (N,) fp64, whose gradient in draft_logits is the estimate.

    draft_logits, target_logits: (N, V) fp64; tokens: (N, K) int64, drawn from q at each position.
    """
    raise NotImplementedError
