"""Exercise 7: two gradients by hand. (40 minutes)

At one position let q = softmax(draft logits) and p = softmax(target logits), and consider

    KL(p || q) = sum_x p(x) (log p(x) - log q(x))
    TVD(p, q)  = (1/2) sum_x |p(x) - q(x)| = sum_x max(p(x) - q(x), 0)

Derive the gradient of each in the draft logits on paper, then write it with a few operations on p
and q. Automatic differentiation is switched off while your functions run, and checks them after.

What you need: the derivative of q(x) in logit y is q(x) ([x = y] - q(y)). Wherever p(x) > q(x), x
counts in TVD; let r(x) = 1 there and 0 elsewhere. There are no ties p(x) = q(x) in what is graded.

Grade: python tests/exercises/grade.py 07
"""

import torch


def kl_gradient(draft_logits, target_logits):
    """The gradient of each position's KL(p || q) in its draft logits: (N, V) fp64.

    draft_logits, target_logits: (N, V) fp64.
    """
    # Only -sum_x p(x) log q(x) depends on q; log q(x) has the derivative [x = y] - q(y).
    return torch.softmax(draft_logits, -1) - torch.softmax(target_logits, -1)


def tvd_gradient(draft_logits, target_logits):
    """The gradient of each position's TVD(p, q) in its draft logits: (N, V) fp64.

    draft_logits, target_logits: (N, V) fp64.
    """
    # -sum_x r(x) q(x) ([x = y] - q(y)) = q(y) (E_q[r] - r(y)); r itself is constant between ties.
    q, p = torch.softmax(draft_logits, -1), torch.softmax(target_logits, -1)
    r = (p > q).double()
    return q * ((q * r).sum(-1, keepdim=True) - r)
