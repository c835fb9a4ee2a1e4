"""Stage 4: speculative decoding. The drafter guesses, the target checks.

    python speculate.py --target models/smollm2-135m-instruct --draft data/smollm2-drafter \
                        --prompt "Why is the sky blue?"            (or --chat)
    python speculate.py --target models/smollm2-135m-instruct --draft data/smollm2-drafter \
                        --bench data/prompts/dev.jsonl --gamma 2 3 5

Plain decoding loads all weights of the target from memory once for each token; the arithmetic is
nearly free beside it. So one pass over several tokens costs little more than a pass over one. Let a
small drafter write gamma tokens, let the target read them all in one pass, and keep as many as a
random test allows (verify_token). The text is then a sample from the target's own distribution,
whatever the drafter wrote (Leviathan et al., 2023, arXiv 2211.17192; Chen et al., 2023, arXiv
2302.01318). A bad drafter costs time, never correctness.

p is the target's distribution of the next token, q the drafter's, V the vocabulary's size; alpha
is the share of examined guesses that were kept, tau (block efficiency) the number of new tokens per
pass of the target.
"""

import contextlib
import itertools
import math
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import losses
import model
from data import files, report, tokenizer, viewer

# ---- The loop ----------------------------------------------------------------------------------

@torch.inference_mode()
def speculative_stream(target, draft, tokens, max_new_tokens, gamma, temperature, top_p,
                       eos_ids=(), generator=None, verify="token", choose=None):
    """Speculative decoding; yields the Generation, grown by one block at a time.

    `text` is the prompt and all new tokens, as ids. Between blocks each cache holds the beginning
    of it, so what a model must read next is text[cache.length:]. This is all the index arithmetic
    there is. It also works when all guesses were kept: then the drafter has two tokens to read, its
    own last guess and the target's token.

    Text, guesses and distributions stay on the models' device. To ask a GPU for a number is to wait
    until it has done all that was given to it before: this loop asks once a block, in step 4.
    """
    check_inputs(target, draft, tokens, max_new_tokens, gamma, temperature, top_p)
    text = tokens[0]
    target_cache, draft_cache = (room_for(llama, len(text) + max_new_tokens, tokens.device)
                                 for llama in (target, draft))

    def read(llama, cache, text, places, words=None):
        return distributions(llama, cache, text, places, temperature, top_p, words)

    # Of a prompt's words the drafter may guess those, too, that its list lacks (see Llama.head).
    ids = draft.draft_vocabulary
    words = None if ids is None else text[~torch.isin(text, ids)].unique()
    p = read(target, target_cache, text, 1)
    text = torch.cat([text, model.sample(p, generator)])
    made = Generation(tokens=model.fetch(text[-1:], p.sum(-1))[0], kinds=["target"])
    yield made
    while not made.ended(max_new_tokens, eos_ids):
        # (1) The drafter writes its guesses, keeping q at each. They are fewer than the tokens
        #     that are still wanted, because the target adds one of its own.
        guesses, q = text[:0], []
        length = gamma if choose is None else choose(made.blocks)
        for _ in range(min(length, max_new_tokens - len(made.tokens) - 1)):
            q.append(read(draft, draft_cache, torch.cat([text, guesses]), 1, words))
            guesses = torch.cat([guesses, model.sample(q[-1], generator)])

        # (2) The target reads them all in one pass: p[i] is what it would draw guess i from, and
        #     the last row what it would draw after all of them.
        p = read(target, target_cache, torch.cat([text, guesses]), len(q) + 1)    # (guesses + 1, V)
        q = torch.cat([*q, p[:0]])      # (guesses, V); p[:0], no rows, is for a block of no guesses

        # (3) Verify: how many guesses are kept, and what the token after them is drawn from.
        coins = torch.rand(len(guesses), dtype=p.dtype, device=p.device, generator=generator)
        kept, follow = VERIFY[verify](guesses, q, p, coins)

        # (4) The text grows by both. After an end token nothing counts. `add` fetches the numbers.
        following = model.sample(follow[None], generator)
        kept = made.add(guesses, kept, following, q, p, eos_ids)
        text = torch.cat([text, guesses[:kept], following])

        # (5) Each cache forgets what was not kept. The newest token is still to be read by both.
        #     The drafter may have read less: it never reads its own last guess, and nothing in a
        #     block without guesses. A length must never grow here.
        target_cache.length = len(text) - 1
        draft_cache.length = min(draft_cache.length, len(text) - 1)
        yield made


def verify_token(guesses, q, p, coins):
    """Keep guess x with probability min(1, p(x) / q(x)), one after the other; stop at the first
    refusal, and draw what follows from what q left over of p. (Leviathan et al., algorithm 1.)

    guesses (gamma,) int64; q (gamma, V), p (gamma + 1, V) probabilities; coins (gamma,) uniform in
    [0, 1). Returns kept, 0 to gamma, and follow (V,), which sums to 1. Nothing in here is random.

    Why it is lossless. The token x comes out as a kept guess with probability
    q(x) min(1, p(x) / q(x)) = min(p(x), q(x)). A guess is refused with probability
    1 - sum min(p, q) = sum max(0, p - q), and then x is drawn with max(0, p(x) - q(x)) over that
    same sum. Together: min(p(x), q(x)) + max(0, p(x) - q(x)) = p(x). Greedy decoding is no special
    case: its p and q are one-hot.
    """
    places = torch.arange(len(guesses), device=p.device)
    ratios = p[places, guesses] / q[places, guesses]        # q > 0: the drafter drew the guess
    # Strictly less: a coin may be 0, and a guess with p = 0 must not be kept.
    kept = (coins < ratios).long().cumprod(0).sum()
    return kept, leftover(row(p, kept), row(q, kept))


def verify_block(guesses, q, p, coins):
    """Judge the block as a whole: keeps at least as many on average. Arguments and results are as
    in verify_token; the same rule where gamma is 1, or p and q are one-hot. (Sun et al., 2024,
    arXiv 2403.10444.)

    w[i] is the chance that at least i guesses are kept: a guess that p likes better than q makes up
    for an earlier one that p likes less. h[i] is the chance to keep i guesses if no more are kept,
    chosen so that the token drawn next, from max(0, w p - q), adds exactly what is missing of p.
    After the last guess there is no more, so h = w there. Each i has its own coin, and the last i
    whose coin is below h wins: a refusal in the middle need not end the block. The proof is in the
    paper; tests/test_speculate.py enumerates it.
    """
    places, w = torch.arange(len(guesses), device=p.device), [p.new_ones(())]
    for ratio in p[places, guesses] / q[places, guesses]:
        w.append((w[-1] * ratio).clamp(max=1))
    w = torch.stack(w)                                                              # (gamma + 1,)
    left = (w[1:-1, None] * p[1:-1] - q[1:]).clamp_(min=0).sum(-1)                  # (gamma - 1,)
    total = left + (1 - w[1:-1])
    # 0 / 0: then w is 1 and p = q, and the next guess is sure to be kept, too.
    h = torch.cat([torch.where(total > 0, left / total, 1), w[-1:]])                # (gamma,)
    kept = torch.cat([guesses.new_zeros(1), (places + 1) * (coins < h)]).amax()
    return kept, leftover(row(w[:, None] * p, kept), row(q, kept))


VERIFY = {"token": verify_token, "block": verify_block}


def row(x, i):
    """x[i] for an i on the device: nobody waits to learn it. Zeros behind the last row: after the
    last guess there is no q, and all of p is left."""
    return torch.cat([x, x.new_zeros(1, x.shape[1])])[i[None]][0]


def leftover(p, q):
    """max(0, p - q) over its sum; p where nothing is left, since then p = q up to rounding."""
    rest = (p - q).clamp(min=0)
    rest = torch.where(rest.sum() > 0, rest, p)
    return rest / rest.sum()


def distributions(llama, cache, text, places, temperature, top_p, words=None):
    """Read what is new of the text; p (or q) after each of its last `places` tokens: (places, V).

    Temperature and top-p shape p and q in the same way, before they are compared.
    """
    hidden = llama.hidden(text[None, cache.length:], cache)[0, -places:]
    return model.probabilities(llama.head(hidden, words), temperature, top_p)


@dataclass
class Generation:
    """What a decoding loop made, and what it took."""

    tokens: list = field(default_factory=list)   # the new ones; an end token is the last of them
    # Of each: target (plain), accepted (a guess), corrected (drawn after a refusal) or bonus (drawn
    # where all guesses were kept).
    kinds: list = field(default_factory=list)
    blocks: list = field(default_factory=list)   # (guesses written, guesses kept) of each block
    target_calls: int = 0                        # passes of the target after the prompt's
    accepted: int = 0                            # guesses that were kept
    drafted: int = 0                             # guesses examined, up to the first refusal
    overlap: float = 0.0                         # sum of sum_x min(p, q) over the examined places
    cut: bool = False                            # the last block ended at a guess: an end token

    def ended(self, max_new_tokens, eos_ids):
        return len(self.tokens) >= max_new_tokens or self.tokens[-1] in eos_ids

    def add(self, guesses, kept, following, q, p, eos_ids):
        """Append a verified block, up to its first end token, and count; returns kept, an int."""
        (*guesses, following, kept), overlaps = model.fetch(
            torch.cat([guesses, following, torch.as_tensor(kept, device=p.device).view(1)]),
            torch.cat([torch.minimum(p[:-1], q).sum(-1), p.sum(-1)]))
        block = guesses[:kept] + [following]
        kinds = ["accepted"] * kept + ["bonus" if kept == len(guesses) else "corrected"]
        # How many tokens of the block count: all, or those up to the first end token.
        end = next((i for i, token in enumerate(block, 1) if token in eos_ids), len(block))
        self.cut = end <= kept
        self.tokens += block[:end]
        self.kinds += kinds[:end]
        self.blocks.append((len(guesses), kept))
        examined = min(end, len(guesses))
        self.target_calls += 1
        self.accepted += min(kept, end)
        self.drafted += examined
        self.overlap += sum(overlaps[:examined])
        return kept

    @property
    def tau(self):
        """Block efficiency; the prompt's pass gave the first token, so that one is out."""
        return (len(self.tokens) - 1) / self.target_calls if self.target_calls else math.nan


@torch.inference_mode()
def autoregressive_stream(target, tokens, max_new_tokens, temperature, top_p, eos_ids=(),
                          generator=None):
    """Plain decoding, one token per pass: what speculation is compared with. Yields the growing
    Generation."""
    check_inputs(target, None, tokens, max_new_tokens, 0, temperature, top_p)
    text = tokens[0]
    cache = room_for(target, len(text) + max_new_tokens, tokens.device)
    made = Generation(target_calls=-1)            # the prompt's own pass is not counted
    while not (made.tokens and made.ended(max_new_tokens, eos_ids)):
        p = distributions(target, cache, text, 1, temperature, top_p)
        text = torch.cat([text, model.sample(p, generator)])
        made.tokens += model.fetch(text[-1:], p.sum(-1))[0]
        made.kinds.append("target")
        made.target_calls += 1
        yield made


def speculative_generate(target, draft, tokens, max_new_tokens, gamma, temperature, top_p,
                         eos_ids=(), generator=None, verify="token", choose=None):
    """Speculative decoding of tokens (1, T) int64 -> Generation, distributed as the target's own.

    gamma: guesses per block; 0 is plain decoding. temperature 0 is greedy. eos_ids end the text; if
    it is empty nothing does. generator: a torch.Generator on the tokens' device, None the global
    one. verify: a name in VERIFY. choose: a function that takes the place of gamma. It is called
    before each block with the past blocks of this text, a list of (guesses, kept), and returns the
    number of guesses. It must not see guesses of the block that it chooses for: a choice that
    depends on them would favour some texts over others.
    ValueError: another vocabulary, or no room in the target's context.
    """
    *_, made = speculative_stream(target, draft, tokens, max_new_tokens, gamma, temperature, top_p,
                                  eos_ids, generator, verify, choose)
    return made


def autoregressive_generate(target, tokens, max_new_tokens, temperature, top_p, eos_ids=(),
                            generator=None):
    """Plain decoding of tokens (1, T) -> Generation. Arguments as in speculative_generate."""
    *_, made = autoregressive_stream(target, tokens, max_new_tokens, temperature, top_p, eos_ids,
                                     generator)
    return made


def room_for(llama, length, device):
    """An empty cache of this model for so many tokens."""
    return model.KVCache(llama.config, 1, length, device, llama.norm.weight.dtype)


def check_inputs(target, draft, tokens, max_new_tokens, gamma, temperature, top_p):
    """ValueError, in one sentence, for what neither loop can do."""
    context, sizes = target.config.max_position_embeddings, tuple(tokens.shape)
    if sizes[0] != 1 or sizes[1] < 1:
        raise ValueError(f"the prompt must be one row of at least one token, got shape {sizes}")
    if sizes[1] + max_new_tokens > context:
        raise ValueError(f"a prompt of {sizes[1]} tokens and {max_new_tokens} new ones exceed the "
                         f"target's context of {context}: shorten it or lower --max-new-tokens")
    if max_new_tokens < 1 or gamma < 0 or not (temperature >= 0 and 0 < top_p <= 1):
        raise ValueError(f"max_new_tokens {max_new_tokens} must be 1 or more, gamma {gamma} and "
                         f"temperature {temperature} 0 or more, top_p {top_p} in (0, 1]")
    if draft is not None and draft.config.vocab_size != target.config.vocab_size:
        raise ValueError(f"{draft.config.vocab_size} and {target.config.vocab_size} tokens: a "
                         f"drafter must share its target's tokenizer")


# ---- gamma chosen block by block ---------------------------------------------------------------

def auto_gamma(draft_cost, pass_costs):
    """A `choose` for speculative_generate: the gamma with the most expected tokens for its cost.

    Costs are in plain steps of the target: draft_cost of one drafter step, pass_costs[n] of a pass
    over n tokens. Each block takes the gamma with the most expected tokens per cost, if guesses are
    kept independently with probability alpha. alpha is measured on this text and fades back to 1/2
    over some twenty blocks, so a drafter that was given up may be tried again.

    A useless drafter must cost next to nothing. `lost` is what its blocks cost beyond plain
    decoding, in steps. A token pays for itself, one step, and for 0.015 of the debt, and no block
    is chosen that could bring the debt above 3. It never falls below 0: what earlier blocks saved
    is no credit.
    """
    def cost(gamma):
        return gamma * draft_cost + pass_costs[gamma + 1]

    def choose(blocks):
        accepted, examined, lost = 1.0, 2.0, 0.0
        for guesses, kept in blocks:
            # Both sums fade by 5 % per block, towards one of two.
            accepted = 0.05 + 0.95 * accepted + kept
            examined = 0.1 + 0.95 * examined + min(kept + 1, guesses)
            lost = max(0.0, lost + cost(guesses) - 1.015 * (kept + 1))
        alpha = accepted / examined
        # Even if none is kept, a block gives one token, which is worth one step.
        allowed = [gamma for gamma in range(len(pass_costs) - 1) if lost + cost(gamma) - 1 <= 3]
        return max(allowed, key=lambda n: losses.implied_tau(alpha, n) / cost(n), default=0)
    return choose


def measured_gamma(target, draft, largest=8):
    """auto_gamma with costs measured on this machine (0.7 s for SmolLM2-135M on two cores)."""
    passes = [pass_seconds(target, width, repeats=2) for width in range(1, largest + 2)]
    return auto_gamma(pass_seconds(draft, 1) / passes[0], [0.0] + [s / passes[0] for s in passes])


@torch.inference_mode()
def pass_seconds(llama, width, context=128, repeats=5):
    """Median seconds of one pass over `width` tokens after `context` others, head included."""
    tokens = torch.zeros(1, width, dtype=torch.int64, device=llama.norm.weight.device)
    cache, seconds = room_for(llama, context + width, tokens.device), []
    for _ in range(repeats + 1):                  # the first one warms up
        cache.length = context                    # as if so many had been read: it holds zeros
        begin = time.perf_counter()
        # As in the loop, with some words of a prompt. item() waits for a GPU to finish.
        llama.head(llama.hidden(tokens, cache), tokens.new_zeros(32))[0, -1, 0].item()
        seconds.append(time.perf_counter() - begin)
    return float(np.median(seconds[1:]))


# ---- One answer, and chat ----------------------------------------------------------------------

MARKS = {"colour": {"accepted": ("\033[32m", "\033[0m"), "corrected": ("\033[31m", "\033[0m"),
                    "bonus": ("\033[36m", "\033[0m")},
         "brackets": {"accepted": ("[", "]")},
         "plain": {}}                             # by where a token came from


def trace_style(choice):
    """auto: colour on a terminal, brackets where colour is unwanted, plain in a pipe."""
    no_colour = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    best = "plain" if not sys.stdout.isatty() else "brackets" if no_colour else "colour"
    return best if choice == "auto" else choice


def answer(pair, messages, args, style):
    """Print one answer as its blocks arrive, whole characters only, then its figures in a line;
    returns the text."""
    target, draft, tok, device, choose = pair
    tokens, begin = torch.tensor([tok.chat_prompt(messages)], device=device), time.perf_counter()
    decoder, shown, answered = tok.stream(), 0, ""
    for made in speculative_stream(target, draft, tokens, args.max_new_tokens, args.gamma[0],
                                   args.temperature, args.top_p, tok.eos_ids, None, args.verify,
                                   choose):
        new = zip(made.kinds[shown:], made.tokens[shown:])
        for kind, run in itertools.groupby(new, key=lambda kind_and_token: kind_and_token[0]):
            piece = "".join(decoder.push(token) for _, token in run)
            before, after = MARKS[style].get(kind, ("", "")) if piece else ("", "")
            print(before + piece + after, end="", flush=True)
            answered += piece
        shown = len(made.tokens)
    print(rest := decoder.flush())
    seconds = time.perf_counter() - begin
    legend = "".join(f"{before}{kind}{after} " for kind, (before, after) in MARKS[style].items())
    kept = f"{made.accepted / made.drafted:.2f}" if made.drafted and args.verify == "token" else "-"
    print(f"--- {legend}{shown} tokens in {seconds:.1f} s ({shown / seconds:.1f}/s)  "
          f"gamma {'auto' if choose else args.gamma[0]}  tau {made.tau:.2f}  alpha {kept}",
          file=sys.stderr if style == "plain" else sys.stdout)
    return answered + rest


def first_minute(pair, args, style):
    """One question to the pair, traced; the same text by plain decoding; what to try next."""
    tok, messages = pair[2], [{"role": "user", "content": "What does a rabbit look like?"}]
    timed(pair, args, tok.chat_prompt(messages), args.gamma[0], 0)                   # warms up
    print(f"\n{messages[0]['content']}")
    text = answer(pair, messages, args, style)
    made, seconds, _ = timed(pair, args, tok.chat_prompt(messages), None, 0)
    same = tok.decode([token for token in made.tokens if token not in tok.eos_ids]) == text
    print(f"    plain decoding: {len(made.tokens)} tokens in {seconds:.1f} s "
          f"({len(made.tokens) / seconds:.1f}/s), {'the same text' if same else 'another text'}\n"
          f"    tau: tokens per pass of the target; alpha: share of the guesses that were kept\n"
          f"next: python speculate.py --chat      ask this pair about animals, food, tools...\n"
          f"      python losses.py                the losses' noise: a table and a picture\n"
          f"      make demo                       train this pair from nothing, twelve minutes")


def chat(pair, args, style):
    """A conversation in the terminal; when the context is full, the oldest turns are forgotten."""
    target, tok = pair[0], pair[2]
    messages = []
    print("type your message; an empty line or Ctrl-D ends")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            line = ""
        if not line:
            return
        messages.append({"role": "user", "content": line})
        room = target.config.max_position_embeddings - args.max_new_tokens
        if len(tok.chat_prompt(messages[-1:])) > room:
            print(f"(too long: at most {room} tokens fit; send less, or lower --max-new-tokens)")
            del messages[-1]
            continue
        while len(messages) > 1 and len(tok.chat_prompt(messages)) > room:
            del messages[:2]
            print("(the context is full: the oldest exchange is forgotten)")
        messages.append({"role": "assistant", "content": answer(pair, messages, args, style)})


# ---- Benchmark ---------------------------------------------------------------------------------

def bench(pair, args):
    """Time every prompt of a file, plainly and with each gamma, alternated prompt by prompt."""
    target, draft, tok, device, _ = pair
    prompts = files.read_prompts(args.bench)
    if args.limit:
        tasks = [prompt["task"] for prompt in prompts]
        prompts = [prompt for i, prompt in enumerate(prompts)
                   if tasks[:i].count(prompt["task"]) < args.limit]
    prompt_ids = [tok.chat_prompt(prompt["messages"]) for prompt in prompts]
    longest = torch.zeros(1, max(map(len, prompt_ids)))
    check_inputs(target, draft, longest, args.max_new_tokens, 1, args.temperature, args.top_p)
    step, size = pass_seconds(target, 1), draft.parameter_count() / target.parameter_count()
    draft_cost = pass_seconds(draft, 1) / step
    verify_costs = {gamma: pass_seconds(target, gamma + 1) / step for gamma in args.gamma}
    print(f"target step {step * 1e3:.1f} ms; in such steps a drafter step {draft_cost:.3f}, a pass "
          "over " + ", ".join(f"{g + 1} tokens {cost:.2f}" for g, cost in verify_costs.items()))
    for gamma in (None, args.gamma[0]):           # warms up, not counted
        timed(pair, args, prompt_ids[0], gamma, 0)
    runs = {gamma: [] for gamma in args.gamma}
    progress, mismatches, result = files.Progress(len(prompts), "prompts"), [], None
    for number, ids in enumerate(prompt_ids):
        # Every second prompt goes through the list backwards: a drift of the machine favours none.
        order = [None, *args.gamma] if number % 2 == 0 else [*args.gamma[::-1], None]
        made = {gamma: timed(pair, args, ids, gamma, number) for gamma in order}
        for gamma in args.gamma:
            runs[gamma].append((made[None], made[gamma]))
            plain, speculative = made[None][0].tokens, made[gamma][0].tokens
            if args.temperature == 0 and plain != speculative:
                mismatches.append(report_mismatch(target, ids, plain, speculative, number, gamma))
        progress.update(number + 1)
        tasks = [prompt["task"] for prompt in prompts[:number + 1]]
        rows = []
        for task, gamma in itertools.product([*dict.fromkeys(tasks), "all"], args.gamma):
            chosen = [run for run, of in zip(runs[gamma], tasks) if task == "all" or task == of]
            rows.append(report.bench_row(task, gamma, chosen, args, verify_costs[gamma], draft_cost,
                                         size))
        result = {"target": str(args.target), "draft": str(args.draft), "machine": report.machine(),
                  "size_ratio": size, "verify": args.verify, "rows": rows, "mismatches": mismatches}
        if args.json:         # after every prompt: a kill leaves what there is, and an earlier OUT
            files.write_json(f"{args.json}.part", result)
    if args.json:
        os.replace(f"{args.json}.part", args.json)
    report.print_bench(result, args)


def timed(pair, args, ids, gamma, number):
    """One prompt decoded, plainly if gamma is None: (Generation, seconds, of them the prompt's)."""
    target, draft, tok, device, _ = pair
    tokens = torch.tensor([ids], device=device)
    generator = torch.Generator(device).manual_seed((args.seed * 100_003 + number) % 2 ** 63)
    shape = (args.temperature, args.top_p, tok.eos_ids, generator)
    if gamma is None:
        stream = autoregressive_stream(target, tokens, args.max_new_tokens, *shape)
    else:
        stream = speculative_stream(target, draft, tokens, args.max_new_tokens, gamma, *shape,
                                    args.verify)
    begin = time.perf_counter()
    made = next(stream)                           # the first token: the prompt has been read
    prompt_seconds = time.perf_counter() - begin
    list(stream)                                  # made grows to its end
    return made, time.perf_counter() - begin, prompt_seconds


def report_mismatch(target, prompt, plain, spec, number, gamma):
    """Greedy texts differ: say where, and the target's logits of both choices there. The only good
    reason is a tie, up to the rounding of passes of different width."""
    same = len(os.path.commonprefix([plain, spec]))
    assert same < min(len(plain), len(spec)), "one text is the other's beginning"
    with torch.inference_mode():
        tokens = torch.tensor([prompt + plain[:same]], device=target.norm.weight.device)
        logits = target.head(target.hidden(tokens)[0, -1]).float()
    (x, a), (y, b) = ([text[same], logits[text[same]].item()] for text in (plain, spec))
    print(f"  greedy mismatch: prompt {number}, gamma {gamma}, new token {same}: plain chose {x} "
          f"(logit {a:.6f}), speculative {y} (logit {b:.6f}), apart {abs(a - b):.1e}")
    return {"prompt": number, "gamma": gamma, "position": same, "plain": [x, a],
            "speculative": [y, b]}


# ---- Command line ------------------------------------------------------------------------------

TINY = Path("data/tiny_world")                   # a trained pair that comes with the code


def gamma_flag(text):
    return text if text == "auto" else files.between("[1, 64]", int)(text)


def parse():
    parser = files.Parser(description=__doc__)
    add, number = parser.add_argument, files.between
    add("--target", type=Path, help="the chat model's folder (default: the tiny trained pair's)")
    add("--draft", type=Path, help="the drafter's folder, of the same tokenizer")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", help="answer this and stop")
    what.add_argument("--chat", action="store_true", help="a conversation in the terminal")
    what.add_argument("--bench", type=Path, metavar="FILE",
                      help="time all prompts of a JSON lines file against plain decoding")
    add("--gamma", type=gamma_flag, nargs="+", help="guesses per block (default 3, --chat: auto); "
        "several for --bench. auto measures time, so a seed does not fix a sampled text")
    add("--verify", default="token", choices=VERIFY, help="the rule (default token)")
    add("--temperature", type=number("[0, inf)"), help="0 is greedy (default 0.6; --bench 0)")
    add("--top-p", type=number("(0, 1]"), help="1 cuts nothing (default 0.9; --bench 1)")
    add("--max-new-tokens", type=number("[1, inf)", int), help="default 256; --bench 128")
    add("--limit", type=number("[0, inf)", int), default=0, metavar="N",
        help="--bench: N prompts of each task (default: all)")
    add("--json", type=Path, metavar="OUT", help="--bench: file of figures (OUT.part till its end)")
    add("--html", type=Path, metavar="PAGE", help="--prompt: a page that replays it step by step")
    add("--beside", type=Path, metavar="DRAFT", help="--html: a second drafter to compare with")
    add("--trace", default="auto", choices=["auto", *MARKS],
        help="how tokens are told apart (auto: brackets with NO_COLOR, plain in a pipe)")
    files.machine_flags(parser)
    args = parser.parse_args()
    if (args.target is None) != (args.draft is None):
        raise ValueError("--target and --draft belong together: give both, or neither")
    args.first = args.prompt is None and not args.chat and not args.bench
    if (args.html and args.prompt is None or args.beside and not args.html
            or args.json and not args.bench):
        raise ValueError("--html needs --prompt, --beside needs --html, --json needs --bench")
    if args.prompt is not None and not args.prompt.strip():
        raise ValueError("--prompt is empty: give the text to answer")
    if args.prompt:                              # UTF-8, also where the terminal says it is ASCII
        args.prompt = os.fsencode(args.prompt).decode("utf-8", "replace")
    if args.target is None:
        args.target, args.draft = TINY / "target", TINY / "drafter-aligned"
        args.threads = args.threads or 1         # for so small a model a second one would only wait
    greedy = args.bench or args.first
    for name, default in (("temperature", 0.0 if greedy else 0.6),
                          ("top_p", 1.0 if greedy else 0.9),
                          ("max_new_tokens", 128 if args.bench else 256)):
        if getattr(args, name) is None:
            setattr(args, name, default)
    args.gamma = list(dict.fromkeys(args.gamma or ["auto" if args.chat else 3]))
    if "auto" in args.gamma and args.bench:
        raise ValueError("--bench needs a fixed --gamma: what auto chooses depends on the clock")
    return args


def main():
    args = parse()
    out = args.json or args.html
    with files.locked(out) if out else contextlib.nullcontext():
        decode(args)


def decode(args):
    """Load the pair, and do what is asked of it."""
    tok, style = tokenizer.load_pair(args.target, args.draft), trace_style(args.trace)
    if args.beside:
        tokenizer.load_pair(args.target, args.beside)
    style = "brackets" if args.first and style == "plain" else style
    # In a pipe stdout carries what was asked for alone.
    with contextlib.redirect_stdout(sys.stderr if style == "plain" else sys.stdout):
        device, dtype = files.set_up(args)
        target, draft, *second = (model.load(folder, device, dtype, tok.vocab_size).for_decoding()
                                  for folder in (args.target, args.draft, args.beside) if folder)
        print(f"target {target.parameter_count() / 1e6:.1f} M parameters, drafter "
              f"{draft.parameter_count() / 1e6:.1f} M")
    choose = None
    if args.gamma[0] == "auto":
        args.gamma, choose = [0], measured_gamma(target, draft)
    pair = (target, draft, tok, device, choose)
    if args.bench:
        bench(pair, args)
        print(f"next: python speculate.py --target {args.target} --draft {args.draft} --chat")
    elif args.chat:
        chat(pair, args, style)
    elif args.html:
        drafters = dict(zip((args.draft, args.beside), (draft, *second)))
        viewer.write(args, pair, drafters, speculative_stream, autoregressive_stream, VERIFY)
        print(f"wrote {args.html}: open it in a browser")
    elif args.prompt:
        answer(pair, [{"role": "user", "content": args.prompt}], args, style)
    else:
        first_minute(pair, args, style)


if __name__ == "__main__":
    files.run(main)
