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


def gradient_cosine(loss_a, loss_b, draft_logits, target_logits):
    """The cosine of the angle between the gradients of two losses, a number from -1 to 1.

    loss_a, loss_b: functions of draft and target logits (N, V) that return (N,), as in
    losses.LOSSES; the gradient is that of the mean over the batch, in all draft logits at once.
    """
    raise NotImplementedError


def with_text(loss, tokens):
    """A loss function like those above: 0.9 loss + 0.1 cross-entropy of `tokens`, (N,).

    tokens (N,) int64: the next token of a text at each position.
    """
    raise NotImplementedError


def unequal_batch():
    """draft_logits, target_logits (N, V): here tvd and tvd++-position have a cosine below 0.99."""
    raise NotImplementedError


def mixed_batch():
    """draft_logits, target_logits (N, V), tokens (N,): here with_text(tvd, tokens) and
    with_text(tvd++, tokens) have a cosine below 0.99."""
    raise NotImplementedError
