"""Exercise 15: on-policy distillation, the drafter writes the prefixes. (240 minutes, it trains)

distill.py trains on the target's answers: offline. In decoding, though, the drafter reads its own
guesses. On-policy distillation lets the drafter continue the prompts itself, then the target says
at each position what it would have written there, and the drafter learns that (Agarwal et al.,
2024, arXiv 2306.13649; Zhou et al., 2024, arXiv 2310.08461).

Write `write`, by which the drafter continues prompts, and `distil`, the training. A step is given.
No gradient flows through the sampling: a text is data, whoever wrote it.

What is graded: the prefixes come from q, of the drafter as it is at that step; the loss falls; and,
with --slow, in the tiny world over three seeds the mean acceptance rate on the target's held-out
answers is not worse by 0.02 than after the same number of steps on the target's own answers: the
lower end of the 95 % interval of the difference, paired by seed, lies above -0.02.

Grade: python tests/exercises/grade.py 15 --slow      (after make demo; or --world DIR)
"""

import torch

import losses
import model
import train


def write(draft, prompts, new_tokens, end_id, generator):
    """Let the drafter continue each prompt: (tokens, answer), both (B, T), padded on the right.

    prompts: a list of B lists of ints, of any lengths. Every token is drawn from q = softmax(draft
    logits), temperature 1, with the generator, until end_id was drawn, which is the last token
    then, or new_tokens were. tokens int64, padded with 0; answer bool, True at the positions whose
    next token was written by the drafter.
    """
    # Padded on the left while it is written, so that all rows write into the same column.
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    width = int(lengths.max())
    cache = model.KVCache(draft.config, len(prompts), width + new_tokens)
    cache.start = width - lengths
    tokens = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    texts, ended = [list(prompt) for prompt in prompts], [False] * len(prompts)
    with torch.no_grad():
        for _ in range(new_tokens):
            q = torch.softmax(draft.head(draft.hidden(tokens, cache)[:, -1]), -1)       # (B, V)
            tokens = model.sample(q, generator)[:, None]                                # (B, 1)
            for row, token in enumerate(tokens[:, 0].tolist()):
                if not ended[row]:
                    texts[row].append(token)
                    ended[row] = token == end_id
    longest = max(len(text) for text in texts)
    column = torch.arange(longest)
    end = torch.tensor([[len(text)] for text in texts])
    answer = (column >= lengths[:, None] - 1) & (column < end - 1)
    return torch.tensor([text + [0] * (longest - len(text)) for text in texts]), answer


def distil(draft, target, prompts, new_tokens, end_id, steps, batch_size, learning_rate, seed):
    """Train the drafter in place for `steps` steps of `batch_size` prompts; the losses, a list.

    In each step the drafter, as it is now, continues prompts drawn from the list; then `step`, with
    the rate of rate_at, whose peak is learning_rate. Same seed, same result. prompts: a list of
    lists of ints, perhaps fewer than steps * batch_size.
    """
    generator, optimiser = torch.Generator().manual_seed(seed), make_optimiser(draft)
    values, queue = [], []
    for number in range(steps):
        while len(queue) < batch_size:                             # another epoch, in a new order
            order = torch.randperm(len(prompts), generator=generator).tolist()
            queue += [prompts[i] for i in order]
        batch, queue = queue[:batch_size], queue[batch_size:]
        tokens, answer = write(draft, batch, new_tokens, end_id, generator)
        rate = rate_at(number, steps, learning_rate)
        values.append(step(draft, target, tokens, answer, optimiser, rate))
    return values


# ---- Given -------------------------------------------------------------------------------------

def step(draft, target, tokens, answer, optimiser, rate):
    """One step on KL(p || q) at the positions where answer is True, with this learning rate; the
    loss before it, a float."""
    optimiser.param_groups[0]["lr"] = rate
    with torch.no_grad():
        target_logits = target.head(target.hidden(tokens)[answer])
    loss = losses.kld(draft.head(draft.hidden(tokens)[answer]), target_logits).mean()
    optimiser.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
    optimiser.step()
    return loss.item()


def make_optimiser(draft):
    return torch.optim.AdamW(draft.parameters(), betas=(0.9, 0.95))


def rate_at(number, steps, peak):
    """The learning rate of step `number`, from 0: ten steps up, half a cosine down to a tenth."""
    return train.learning_rate_at(number, steps, peak, peak / 10, 10)
