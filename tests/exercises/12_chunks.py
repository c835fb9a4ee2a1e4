"""Exercise 12: the head in chunks. (60 minutes)

Logits are the largest thing in a training step: 4,096 positions of 49,152 tokens in fp32 are
800 MB, with their softmax and their gradient three times that. But the head treats each position by
itself. Add the gradient of the mean loss over N positions without ever holding more than `chunk`
rows of logits, and with one backward pass through the layers in front of the head.

The chain rule may be cut at the hidden states. For each chunk: detach its hidden states, make a
leaf of them, run head and loss, and backward to the leaf; its logits are then free. Keep the
leaves' gradients. At the end, hidden.backward(all of them) goes through the layers once.

Traps: the last chunk may be shorter, and the mean is over all N positions; a loss that is summed
over the chunks before one backward keeps every chunk's logits.

The grader looks at all that autograd saves (torch.autograd.graph.saved_tensors_hooks).

Grade: python tests/exercises/grade.py 12
"""


def backward_in_chunks(hidden, head, target_logits, loss, chunk):
    """Add the gradient of the mean loss to head.grad and to all that hidden was made from.

    hidden (N, D): the drafter's hidden states, with the graph of its layers behind them; head
    (V, D): a leaf that requires a gradient; logits are hidden @ head.T. target_logits(begin, end):
    a function that gives the target's logits (end - begin, V) at these positions. loss: a function
    of draft and target logits (n, V) that returns (n,). chunk: positions, an int. Returns the mean
    loss, a float.
    """
    raise NotImplementedError
