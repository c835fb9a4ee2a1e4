"""What the checks of all exercises share. checks_decoding.py, checks_losses.py and
checks_training.py hold them; grade.py runs them.

CHECKS, in each: exercise -> rows of (points, claim, check, hint). A check takes `its`, the
student's functions, and returns True if the claim holds. It compares with what was not taken from a
solution: a sum over every case, automatic differentiation, a loop without caches, the project's own
code. Random inputs have a seed, and no expected number comes out of a random generator.
"""

from collections import Counter

import torch

import model


def call(function, *arguments):
    """function(*arguments) with copies of the tensors: what it changes in place is its own."""
    return function(*(x.clone() if isinstance(x, torch.Tensor) else x for x in arguments))


def same(result, expected, tolerance=1e-12):
    """Whether result is a tensor of expected's shape, equal up to the tolerance; NaN never is."""
    if not isinstance(result, torch.Tensor) or result.shape != expected.shape:
        return False
    return bool(((result.detach().double() - expected.double()).abs() <= tolerance).all())


def near(result, expected, tolerance=1e-12):
    """The same for one number: a float, an int or a tensor of one element."""
    result = result.item() if isinstance(result, torch.Tensor) else float(result)
    return abs(result - expected) <= tolerance


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def randoms(generator, *shape, scale=2.0):
    """Logits of this shape, fp64."""
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def p_and_q(seed, *shape):
    """p and q of this shape, fp64."""
    generator = seeded(seed)
    return [torch.softmax(randoms(generator, *shape), -1) for _ in range(2)]


def vector(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def gradient(loss, draft_logits, *others):
    """The gradient of the summed loss in the draft logits."""
    leaf = draft_logits.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(leaf, *others).sum(), leaf)[0]


def plain_tvd(draft_logits, target_logits):
    """TVD at each position, by operations that automatic differentiation knows."""
    return torch.relu(torch.softmax(target_logits, -1) - torch.softmax(draft_logits, -1)).sum(-1)


def tiny_llama(seed, vocab=8, std=0.5):
    """A random model of one layer, with weights large enough that its choices matter."""
    llama = model.Llama(model.Config(
        vocab_size=vocab, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=512, tie_word_embeddings=False))
    generator = seeded(seed)
    for weight in llama.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=std, generator=generator)
    return llama.requires_grad_(False)


def interval(values):
    """Mean and half width of the 95 % interval of three numbers: Student's t, 2 degrees."""
    values = torch.tensor(values, dtype=torch.float64)
    return values.mean().item(), 4.303 * values.std().item() / 3 ** 0.5


# ---- Losslessness by enumeration ---------------------------------------------------------------

# mass: {beginning of a text, a tuple: probability}. p_after(text): the target's V probabilities.

def add(mass, weight, guesses, kept, follow):
    """Enter a block that kept so many guesses and then draws a token from follow (V,)."""
    for x, probability in enumerate(follow.tolist()):
        mass[*guesses[:kept], x] += weight * probability


def spread(mass, p_after, length):
    """{text: probability} of whole texts: the target continues each beginning to this length."""
    mass = Counter(mass)
    for size in range(length):
        for text in [text for text in mass if len(text) == size]:
            share = mass.pop(text)
            for x, probability in enumerate(p_after(text)):
                mass[*text, x] += share * probability
    return mass


def lossless(mass, p_after, length):
    """Whether these beginnings become, to 1e-12, what the target writes by itself."""
    ours, plain = spread(mass, p_after, length), spread({(): 1.0}, p_after, length)
    return all(abs(ours[text] - plain[text]) <= 1e-12 for text in {*ours, *plain})
