"""Exercise 10: when does TVD++ differ from TVD? (30 minutes)

tvd++ (losses.py, exact form) divides the gradient of tvd by sigma, one number for the whole batch.
So over a batch the two gradients have the same direction: their cosine is 1. And yet trainings with
the two differ. Measure where the directions part:

  - tvd++-position divides each position's gradient by a sigma of its own, so it weighs positions
    anew. Give a batch that shows it: where are the sigmas of two positions very unequal?
  - distill.py mixes in text: 0.9 times the loss plus 0.1 times a cross-entropy, which sigma does
    not divide. (Here both are taken at the same positions.) Give a batch that shows that.

Look at losses.expected_reward: it is mu at each position, and sigma = sqrt(mu (1 - mu)).

Grade: python tests/exercises/grade.py 10
"""

import torch
import torch.nn.functional as F


def gradient_cosine(loss_a, loss_b, draft_logits, target_logits):
    """The cosine of the angle between the gradients of two losses, a number from -1 to 1.

    loss_a, loss_b: functions of draft and target logits (N, V) that return (N,), as in
    losses.LOSSES; the gradient is that of the mean over the batch, in all draft logits at once.
    """
    a, b = (gradient(loss, draft_logits, target_logits) for loss in (loss_a, loss_b))
    return torch.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


def gradient(loss, draft_logits, target_logits):
    """The gradient of the mean loss in the draft logits, (N, V)."""
    draft_logits = draft_logits.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(draft_logits, target_logits).mean(), draft_logits)[0]


def with_text(loss, tokens):
    """A loss function like those above: 0.9 loss + 0.1 cross-entropy of `tokens`, (N,).

    tokens (N,) int64: the next token of a text at each position.
    """
    def mixed(draft_logits, target_logits):
        text = F.cross_entropy(draft_logits, tokens, reduction="none")
        return 0.9 * loss(draft_logits, target_logits) + 0.1 * text
    return mixed


def unequal_batch():
    """draft_logits, target_logits (N, V): here tvd and tvd++-position have a cosine below 0.99."""
    # Position 1: the reward comes half of the time, sigma 0.5. Position 2: hardly ever, for q has
    # 0.99 on a token that p likes less; sigma is 0.1, and the gradient there counts five times.
    q = torch.tensor([[0.5, 0.3, 0.2], [0.01, 0.985, 0.005]])
    p = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1]])
    return q.log(), p.log()


def mixed_batch():
    """draft_logits, target_logits (N, V), tokens (N,): here with_text(tvd, tokens) and
    with_text(tvd++, tokens) have a cosine below 0.99."""
    # sigma is near 0.1: tvd++ has ten times tvd's gradient, while the text's stays as it is.
    q, p = torch.tensor([[0.01, 0.985, 0.005]]), torch.tensor([[0.6, 0.3, 0.1]])
    return q.log(), p.log(), torch.tensor([2])
