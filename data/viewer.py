"""A page that replays a speculative decoding in the browser, block by block, with p and q.

    python speculate.py --prompt "What does a rabbit look like?" --html out/trace.html \
                        --beside data/tiny_world/drafter-base

The loop is watched from outside: what it guesses and decides goes through its rule of verification,
and every pass of a model through the model's first layer. The page is trace.html beside this file,
with the notes in it as JSON; it loads nothing else. p is the target's distribution of the next
token, q the drafter's.
"""

import json
import time
from pathlib import Path

import torch

from data import files, report

LATEST = 100                             # the last block of which the page has more than the words


def write(args, pair, drafters, speculative, plain, rules):
    """Decode args.prompt with each of the drafters, {folder: model}, and plainly; write args.html.

    speculative, plain and rules are speculate.py's two streams and its VERIFY.
    """
    target, _, tok, device, choose = pair
    ids = tok.chat_prompt([{"role": "user", "content": args.prompt}])
    tokens, shape = torch.tensor([ids], device=device), (args.temperature, args.top_p)
    watch, runs = Watch(tok, rules[args.verify]), {}
    for llama in (target, *drafters.values()):
        llama.layers[0].register_forward_pre_hook(watch.begin)
    rules["watched"] = watch.verify
    for folder, draft in drafters.items():
        for most in (min(4, args.max_new_tokens), args.max_new_tokens):     # the first one warms up
            runs[str(folder)] = watch.run(speculative(target, draft, tokens, most, args.gamma[0],
                                                      *shape, tok.eos_ids, None, "watched", choose))
    del rules["watched"]
    # As many tokens as the longest run has, past an end token, too: only their time is of interest.
    stream = plain(target, tokens, max(run["tokens"] for run in runs.values()), *shape)
    times = torch.tensor([time.perf_counter() for _ in stream], dtype=torch.float64) * 1e3
    trace = {"flags": {name: str(value) for name, value in vars(args).items()}, "runs": runs,
             "plain_ms": rounded(times.diff()), "machine": report.machine(), "names": tok.controls}
    with files.atomic(args.html) as temporary:
        temporary.write_text(page(trace), encoding="utf-8")


def page(trace):
    """The page with these notes. NaN and infinity are no JSON: ValueError. As ASCII it can hold
    half a surrogate pair, and without "<" no text in it ends the script element."""
    text = json.dumps(trace, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return Path(__file__).with_name("trace.html").read_text("utf-8").replace("{TRACE}", text)


class Watch:
    """Takes notes of decodings: of every block, and of when each pass of a model began."""

    def __init__(self, tok, rule):
        self.tok, self.rule, self.began, self.seen = tok, rule, [], None

    def begin(self, layer, inputs):
        inputs[0][0, 0, 0].item()                    # waits until a GPU has ended the pass before
        self.began.append(time.perf_counter())

    def verify(self, guesses, q, p, coins):
        self.seen = guesses, q, p, coins, *self.rule(guesses, q, p, coins)
        return self.seen[4:]

    def run(self, stream):
        """Follow a speculative stream to its end. Its first block is the prompt's own pass."""
        blocks, old, start, self.began = [], 0, time.perf_counter(), []
        for made in stream:
            # A pass ends where the next one begins, the target's with the block.
            times = torch.tensor([start, *self.began[1:], time.perf_counter()], dtype=torch.float64)
            tokens = made.tokens[old:]
            blocks.append({"ms": rounded(times.diff() * 1e3), "tokens": [*map(self.word, tokens)],
                           **(self.notes(tokens, len(blocks), *self.seen) if blocks else {})})
            old, start, self.began = len(made.tokens), time.perf_counter(), []
        tau = made.tau if made.blocks else None                  # no block: one token was wanted
        return {"blocks": blocks, "tokens": old, "accepted": made.accepted, "tau": tau}

    def notes(self, tokens, number, guesses, q, p, coins, kept, follow):
        """Of a block that gave these tokens. A place is that of a guess, or behind the last one if
        all were kept. It has rows: a token, its p, its q if a guess was made there, its chance to
        follow if the block ended there. What is behind a refusal was not looked at. Late in a long
        text a place has fewer rows, and at last none but the guess's word, or the page would be too
        large."""
        if number > LATEST:
            return {"kept": int(kept), "late": [self.word(x) for x in guesses.tolist()]}
        ids, places, at = guesses.tolist(), [], guesses.to(p.device)[:, None]       # at (gamma, 1)
        both, ratios = torch.minimum(p[:-1], q).sum(1), p[:-1].gather(1, at) / q.gather(1, at)
        for i in range(int(kept) + 1):
            figures = torch.stack([p[i], *q[i:i + 1], *([follow] if i == kept else [])])
            top = figures.amax(0).topk(min(p.shape[1], max(1, min(8, 400 // number))))
            # The guess, what came out (the same if it was kept), and the likely ones.
            rows = ids[i:i + 1] + tokens[i:i + 1] + top.indices[top.values > 0].tolist()
            places.append([[self.word(x), *rounded(figures[:, x])] for x in dict.fromkeys(rows)])
        return dict(kept=int(kept), coins=rounded(coins), ratios=rounded(ratios.clamp(max=1)[:, 0]),
                    both=rounded(both), places=places + [[[self.word(x)]] for x in ids[i + 1:]])

    def word(self, token):
        """A token's bytes, one character each: the page joins them to letters. A control token:
        [its id]."""
        return self.tok.piece(token).decode("latin-1") or [token]


def rounded(values):
    return [round(value, 5 if value < 1 else 2) for value in values.tolist()]
