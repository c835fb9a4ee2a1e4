"""Checks of the exercises on training: 11, 12 and 15."""

import json
import tempfile
from pathlib import Path
from unittest import mock

import torch
from checks import interval, near, plain_tvd, randoms, same, seeded, tiny_llama

import losses
import model
import train
from data import tokenizer

CHECKS, TRAINED = {}, {}


# ---- 11: which positions count -----------------------------------------------------------------

class Numbers:
    """A tokenizer of texts such as "5 7 9"."""
    eos_id, eos_ids, vocab_size, document_id, folder = 1, (1,), 100, 0, "none"

    def chat_prompt(self, messages):
        return [int(word) for word in messages[0]["content"].split()]


def as_in_training(its, *records):
    """Whether positions agrees with train.py on these (prompt ids, response ids, ended, context).
    """
    keeps = {"messages": [{"role": "user", "content": "2"}], "response_ids": [3], "ended": True}
    for prompt, response, ended, context in records:
        asked = [{"role": "user", "content": " ".join(map(str, prompt))}]
        row = {"messages": asked, "response_ids": response, "ended": ended}
        with tempfile.TemporaryDirectory() as folder, mock.patch("builtins.print"):
            path = Path(folder) / "records.jsonl"
            path.write_text(json.dumps(row) + "\n" + json.dumps(keeps) + "\n")
            *examples, _ = train.read_examples(path, Numbers(), context)
        expected = ([], [])
        if examples:
            tokens, answer = (x[0, :len(examples[0].tokens)].tolist()
                              for x in train.collate(examples, "cpu"))
            expected = (tokens, answer)
        tokens, answer = its.positions(list(prompt), list(response), ended, context, 1)
        if ([int(x) for x in tokens], [bool(x) for x in answer]) != expected:
            return False
    return True


def whole_answers(its):
    return as_in_training(its, ([5, 6, 7], [8, 9], True, 20), ([5], [8], True, 20),
                          ([5, 6], [], True, 20))


def cut_off_answers(its):
    return as_in_training(its, ([5, 6, 7], [8, 9], False, 20), ([5, 6], [8], False, 20))


def long_records(its):
    return as_in_training(its, ([5, 6, 7], [8, 9, 10], True, 5), ([5, 6, 7], [8, 9], True, 5),
                          ([5, 6, 7], [8, 9], True, 6), ([5, 6, 7], [8, 9], False, 5))


def dropped_records(its):
    return as_in_training(its, ([5, 6], [], False, 20), ([5, 6, 7], [8, 9], True, 3),
                          ([5, 6, 7], [8], True, 4), ([5, 6, 7], [8], True, 2))


CHECKS[11] = [
    (3, "an answer that ended by itself: from the last prompt token to the last but one",
     whole_answers, "position i counts where token i + 1 is the answer's, end token included"),
    (2, "an answer that was cut off has no end token", cut_off_answers,
     "the target would have gone on: the drafter must not learn to stop there"),
    (3, "a record is cut at the context", long_records,
     "cut first, then ask which positions count"),
    (2, "a record where nothing counts is dropped", dropped_records,
     "no answer, or a prompt that fills the context: ([], [])")]


# ---- 12: the head in chunks --------------------------------------------------------------------

CHUNK, WIDTH, VOCAB = 5, 4, 37


class Step12:
    """backward_in_chunks on so many positions, and what could be seen of it."""

    def __init__(self, its, count):
        generator = seeded(12)
        inputs = randoms(generator, count, 3)
        self.layers, self.head = (randoms(generator, *shape).requires_grad_()
                                  for shape in ((3, WIDTH), (VOCAB, WIDTH)))
        self.target = randoms(generator, count, VOCAB)
        # In one piece, what it must equal.
        layers, head = (x.detach().clone().requires_grad_() for x in (self.layers, self.head))
        whole = plain_tvd(torch.tanh(inputs @ layers) @ head.T, self.target).mean()
        whole.backward()
        self.expected = whole.item(), layers.grad, head.grad

        # Rows of logits: most asked of the target, in one saved tensor, and alive at once.
        self.asked, self.widest, self.most, self.through = 0, 0, 0, 0
        alive = []

        class Saved:
            def __init__(self, tensor):
                self.tensor = tensor
                alive.append(len(tensor))

            def __del__(self):
                alive.remove(len(self.tensor))

        def pack(tensor):
            if tensor.shape[-1:] != (VOCAB,):
                return tensor
            saved = Saved(tensor)
            self.widest, self.most = max(self.widest, len(tensor)), max(self.most, sum(alive))
            return saved

        def unpack(saved):
            return saved.tensor if isinstance(saved, Saved) else saved

        def target_logits(begin, end):
            self.asked = max(self.asked, end - begin)
            return self.target[begin:end].clone()

        def through(_):
            self.through += 1

        hidden = torch.tanh(inputs @ self.layers)
        hidden.register_hook(through)
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            self.value = its.backward_in_chunks(hidden, self.head, target_logits, plain_tvd, CHUNK)


COUNTS = (CHUNK, 4 * CHUNK, 4 * CHUNK + 2, 2)


def same_gradient(its):
    for count in COUNTS:
        step = Step12(its, count)
        value, layers, head = step.expected
        if not same(step.head.grad, head, 1e-10) or not same(step.layers.grad, layers, 1e-10):
            return False
    return True


def same_value(its):
    steps = [Step12(its, count) for count in COUNTS]
    return all(near(step.value, step.expected[0], 1e-10) for step in steps)


def few_rows_of_logits(its):
    """No saved tensor has more rows than a chunk, and what is alive at once is a chunk's share."""
    one, many = Step12(its, CHUNK), Step12(its, 6 * CHUNK)
    return (0 < many.widest <= CHUNK and many.asked <= CHUNK and many.most <= one.most
            and many.layers.grad is not None)


def once_through_the_layers(its):
    return Step12(its, 4 * CHUNK).through == 1


CHECKS[12] = [
    (4, "the gradients equal those in one piece, also where the last chunk is short", same_gradient,
     "divide by N, not by the chunk's length; send the hidden states' gradient on at the end"),
    (1, "it returns the mean loss", same_value, "the sum over all chunks, over N"),
    (3, "autograd never keeps more than one chunk of logits", few_rows_of_logits,
     "backward for each chunk at once: a sum of losses keeps all of their logits"),
    (2, "the layers' backward runs once", once_through_the_layers,
     "detach the chunk's hidden states, collect the leaves' gradients, then hidden.backward(them)")]


# ---- 15: on-policy distillation ----------------------------------------------------------------

def chain(shift, tokens=5, gap=12.0):
    """A model that adds `shift` to the last token; others are e^-gap as likely."""
    llama = model.Llama(model.Config(
        vocab_size=tokens, hidden_size=tokens, intermediate_size=4, num_hidden_layers=0,
        num_attention_heads=1, head_dim=2, max_position_embeddings=64, tie_word_embeddings=False))
    with torch.no_grad():
        llama.embed_tokens.weight.copy_(torch.eye(tokens))
        # The norm makes a one-hot vector root-of-tokens long.
        llama.lm_head.weight.copy_(gap / tokens ** 0.5 * torch.eye(tokens).roll(shift, 0))
    return llama


def the_drafter_continues_prompts(its):
    """A chain from prompts of three lengths; 4 ends it."""
    prompts = [[1, 0], [3, 3, 2], [2, 2, 2, 4, 0]]
    tokens, answer = its.write(chain(1), [list(p) for p in prompts], 3, 4, seeded(0))
    rows = [[1, 0, 1, 2, 3], [3, 3, 2, 3, 4], [2, 2, 2, 4, 0, 1, 2, 3]]
    if tokens.dtype != torch.int64 or answer.dtype != torch.bool or tokens.shape != answer.shape:
        return False
    for row, prompt, text, counts in zip(rows, prompts, tokens.tolist(), answer.tolist()):
        expected = [len(prompt) - 1 <= i < len(row) - 1 for i in range(len(text))]
        if text != row + [0] * (len(text) - len(row)) or counts != expected:
            return False
    return len(tokens) == 3


def tokens_are_drawn_from_q(its):
    """4,000 first tokens, and the second ones behind each: within five deviations of q."""
    draft, count = tiny_llama(3, vocab=3), 4_000
    tokens, _ = its.write(draft, [[0, 2]] * count, 2, 99, seeded(1))
    for before in ([0, 2], [0, 2, 0], [0, 2, 1], [0, 2, 2]):
        drawn = tokens[(tokens[:, :len(before)] == torch.tensor(before)).all(1), len(before)]
        q = torch.softmax(draft(torch.tensor([before]))[0, -1], -1)
        deviation = (q * (1 - q) / len(drawn)).sqrt()
        if ((torch.bincount(drawn, minlength=3) / len(drawn) - q).abs() > 5 * deviation).any():
            return False
    return True


def train_a_chain(its):
    """Teach the chain +1 the target's +2: the losses, and the whole texts that the target read."""
    draft, target, seen = chain(1), chain(2).requires_grad_(False), []
    hidden = target.hidden

    def spy(tokens, *rest):
        if tokens.shape[1] >= 7:                  # a prompt of one token and six new ones
            seen.append(tokens[:, :7].clone())
        return hidden(tokens, *rest)

    target.hidden = spy
    values = its.distil(draft, target, [[0], [1], [2], [3], [4]], 6, 99, 40, 4, 0.3, 0)
    return values, seen


def prefixes_are_the_drafters(its):
    _, seen = train_a_chain(its)
    steps = [(tokens[:, 1:] - tokens[:, :-1]) % 5 for tokens in (seen[0], seen[-1])]
    # At first only +1, whatever the target likes; at the end what the drafter has learnt by then.
    return bool((steps[0] == 1).all()) and bool((steps[1] == 2).float().mean() > 0.8)


def the_loss_falls(its):
    values, _ = train_a_chain(its)
    return len(values) == 40 and sum(values[-5:]) < 0.5 * sum(values[:5])


CHECKS[15] = [
    (2, "the drafter continues prompts of any length, to its end token",
     the_drafter_continues_prompts,
     "pad on the right in the end; True from the last prompt token to the last but one"),
    (2, "tokens are drawn from q, not from its favourite", tokens_are_drawn_from_q,
     "softmax of the drafter's logits at temperature 1, each token behind those already drawn"),
    (2, "each step's prefixes come from the drafter as it is then", prefixes_are_the_drafters,
     "write anew in every step, with the drafter that is being trained"),
    (1, "the loss falls", the_loss_falls, "one optimiser for all steps; call step with it")]


@torch.no_grad()
def acceptance_in(draft, target, examples):
    """Mean sum min(p, q) at the answer positions of these examples."""
    tokens, answer = train.collate(examples, "cpu")
    logits = [llama.head(llama.hidden(tokens)[answer]) for llama in (draft, target)]
    return losses.overlap(*logits).mean().item()


def not_worse_than_offline(its, world):
    """Three seeds; the same start, steps, batch size, learning rate and loss for both."""
    tok = tokenizer.load(world / "target")
    target = model.load(world / "target").requires_grad_(False)
    examples, held_out = train.hold_out(train.read_examples(world / "records.jsonl", tok, 96), 64)
    prompts = [e.tokens[:e.first] for e in examples]
    steps, size, peak, differences = 300, 16, 1e-2, []
    for seed in range(3):
        own, offline = (model.load(world / "drafter-base") for _ in range(2))
        its.distil(own, target, prompts, 32, tok.eos_id, steps, size, peak, seed)
        optimiser = its.make_optimiser(offline)
        for number in range(steps):
            batch = train.collate(train.batch_at(examples, size, seed, number), "cpu")
            its.step(offline, target, *batch, optimiser, its.rate_at(number, steps, peak))
        a, b = (acceptance_in(draft, target, held_out) for draft in (own, offline))
        print(f"seed {seed}: acceptance rate {a:.4f} on-policy, {b:.4f} offline", flush=True)
        differences.append(a - b)
    mean, half = interval(differences)
    print(f"difference {mean:+.4f} ± {half:.4f}")
    return mean - half > -0.02


TRAINED[15] = [
    (3, "over three seeds not worse than offline by 0.02", not_worse_than_offline,
     "does the drafter's text end where the drafter ends it? Are all its positions learnt?")]
