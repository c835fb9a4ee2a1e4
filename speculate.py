"""Stage 4: speculative decoding. The drafter guesses, the target checks, the text is exactly the target's.

    python speculate.py --target models/smollm2-135m-instruct --draft out/drafter --prompt "Why is the sky blue?"
    python speculate.py --target models/smollm2-135m-instruct --draft out/drafter --chat
    python speculate.py --target models/smollm2-135m-instruct --draft out/drafter --bench data/prompts/dev.jsonl --gamma 3 5

Plain decoding reads all weights of the target once for each token; the arithmetic is nearly free beside it. Reading
gamma + 1 tokens in one pass costs little more than one. So let a small drafter write gamma tokens, let the target
read them in one pass, and keep as many as an honest coin allows: the rule of Leviathan et al. (2023, arXiv 2211.17192)
and Chen et al. (2023, arXiv 2302.01318) makes the kept text a sample from the target, whatever the drafter wrote.
A bad drafter costs time, never correctness.

The trace of --prompt colours each token by where it came from: accepted from the drafter, corrected by the target
after a refusal, bonus (the target's own after gamma acceptances).
"""

import argparse
import json
import os
import platform
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import losses
import model
from data import files, tokenizer


@dataclass
class Generation:
    """What a decoding loop made, and what it took."""

    tokens: list = field(default_factory=list)   # the new tokens; an end token that stopped it is the last of them
    kinds: list = field(default_factory=list)    # where each came from: target, accepted, corrected or bonus
    target_calls: int = 0                        # passes of the target after the prompt's
    accepted: int = 0                            # drafted tokens that were kept
    drafted: int = 0                             # drafted tokens that were examined: up to the first refusal
    overlap: float = 0.0                         # sum of sum_x min(p, q) over the examined places

    @property
    def tau(self):
        """Block efficiency: tokens a target pass gave. The prompt's pass gave the first token, so that one is out."""
        return (len(self.tokens) - 1) / self.target_calls if self.target_calls else float("nan")


# ---- How many tokens to draft ----------------------------------------------------------------------------------------

class AutoGamma:
    """Chooses gamma before each block from the costs of the passes on this machine and the acceptance rate so far.

    All costs are in plain steps (one target pass over one token): draft_cost one drafter step, verify_costs[T] a target
    pass over T tokens. A block of gamma costs gamma * draft_cost + verify_costs[gamma + 1] and gives, if tokens are
    accepted independently at rate alpha, losses.implied_tau(alpha, gamma) tokens: the best ratio wins, gamma 0 included.

    A useless drafter must not cost much: `excess` is what was spent beyond plain decoding of the same tokens, and no
    block is drafted whose worst case (all refused) would take it above 3 steps and 1.5 % of the tokens made. So 256
    tokens never cost more than 1.03 times plain decoding, whatever the drafter writes.
    """

    def __init__(self, draft_cost, verify_costs):
        self.draft_cost, self.verify_costs = draft_cost, verify_costs
        self.accepted, self.drafted = 1.0, 2.0    # before anything is known: one in two
        self.excess, self.tokens, self.idle = 0.0, 0, 0

    def cost(self, gamma):
        """Of one block, in plain steps."""
        return gamma * self.draft_cost + self.verify_costs[gamma + 1]

    def choose(self):
        """gamma of the next block."""
        alpha = min(self.accepted / self.drafted, 0.99)
        gammas = range(len(self.verify_costs) - 1)
        gamma = max(gammas, key=lambda gamma: float(losses.implied_tau(alpha, gamma)) / self.cost(gamma))
        if gamma == 0 and self.idle >= 16:        # the text may have become easier: look again now and then
            gamma = 1
        allowed = 3 + 0.015 * self.tokens
        while gamma and self.excess + self.cost(gamma) - 1 > allowed:
            gamma -= 1
        return gamma

    def update(self, gamma, accepted, drafted, new_tokens):
        """Learn from a block: `accepted` of `drafted` examined guesses were kept, which made new_tokens."""
        self.accepted, self.drafted = 0.97 * self.accepted + accepted, 0.97 * self.drafted + drafted    # newer blocks count more
        self.excess += self.cost(gamma) - new_tokens
        self.tokens += new_tokens
        self.idle = 0 if gamma else self.idle + 1


def measured_gamma(target, draft):
    """An AutoGamma with the costs on this machine, measured in under a second here."""
    largest = 4 if target.packed_head else 8      # wider passes cost too much in the form that plain decoding needs
    step = pass_seconds(target, 1, repeats=3)
    verify = [1.0, 1.0] + [pass_seconds(target, width, repeats=3) / step for width in range(2, largest + 2)]
    return AutoGamma(pass_seconds(draft, 1) / step, verify)


def load_verifiers(folder, gammas, device, dtype):
    """(target, {gamma: target}): for plain decoding and small gammas one in the form for few tokens, for larger ones a second
    copy in the form for many, if any gamma needs it and the machine has such forms; so each is timed at its best."""
    target = model.load(folder, device, dtype).pack()
    many = [gamma for gamma in gammas if gamma + 1 > model.MAX_UNPACKED_TOKENS and target.packed_head]
    wide = model.load(folder, device, dtype).pack(max(many) + 1) if many else None
    return target, {gamma: wide if gamma in many else target for gamma in gammas}


# ---- The two loops ---------------------------------------------------------------------------------------------------

def check_inputs(target, draft, tokens, max_new_tokens, gamma, temperature, top_p):
    """ValueError, in one sentence, for what neither loop can do."""
    context = target.config.max_position_embeddings
    if tokens.shape[0] != 1 or tokens.shape[1] < 1:
        raise ValueError(f"the prompt must be one row of at least one token, got shape {tuple(tokens.shape)}")
    if tokens.shape[1] + max_new_tokens > context:
        raise ValueError(f"a prompt of {tokens.shape[1]} tokens and {max_new_tokens} new ones exceed the target's context of "
                         f"{context}: shorten the prompt or lower --max-new-tokens")
    if max_new_tokens < 1 or (isinstance(gamma, int) and gamma < 0) or temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"max_new_tokens {max_new_tokens} must be at least 1, gamma {gamma} and temperature {temperature} at least "
                         f"0, top_p {top_p} above 0 and at most 1")
    if draft is not None and draft.config.vocab_size != target.config.vocab_size:
        raise ValueError(f"draft vocabulary {draft.config.vocab_size} does not match target vocabulary "
                         f"{target.config.vocab_size}: a drafter must share its target's tokenizer")


@torch.inference_mode()
def autoregressive_stream(target, tokens, max_new_tokens, temperature, top_p, eos_ids=(), generator=None):
    """Plain decoding, one token a pass: what speculation is compared with. Yields the growing Generation."""
    check_inputs(target, None, tokens, max_new_tokens, 0, temperature, top_p)
    cache = model.KVCache(target.config, 1, tokens.shape[1] + max_new_tokens, tokens.device, target.embed_tokens.weight.dtype)
    made = Generation(target_calls=-1)            # the prompt's own pass is not counted
    while len(made.tokens) < max_new_tokens and not (made.tokens and made.tokens[-1] in eos_ids):
        logits = target.head(target.hidden(tokens, cache)[:, -1])                     # (1, V)
        tokens = model.sample(model.probabilities(logits, temperature, top_p), generator)[:, None]
        made.tokens.append(tokens.item())
        made.kinds.append("target")
        made.target_calls += 1
        yield made


@torch.inference_mode()
def speculative_stream(target, draft, tokens, max_new_tokens, gamma, temperature, top_p, eos_ids=(), generator=None):
    """Speculative decoding; yields the Generation, grown by one block at a time.

    `text` is the prompt and all that was kept. Both caches always hold a prefix of it, so each model's next input
    is simply what it has not read yet: text[cache.length:]. That one invariant replaces all index arithmetic. It
    also covers the trap that after a fully accepted block the drafter has never read its own last token.
    """
    check_inputs(target, draft, tokens, max_new_tokens, gamma, temperature, top_p)
    device, room = tokens.device, tokens.shape[1] + max_new_tokens
    target_cache = model.KVCache(target.config, 1, room, device, target.embed_tokens.weight.dtype)
    draft_cache = model.KVCache(draft.config, 1, room, device, draft.embed_tokens.weight.dtype)

    def distribution(llama, cache, ids, places):
        """p or q after each of the last `places` of these ids: (places, V). Temperature and top-p shape both alike."""
        hidden = llama.hidden(torch.tensor([ids], device=device), cache)[0, -places:]
        return model.probabilities(llama.head(hidden), temperature, top_p)

    text = tokens[0].tolist()
    first = model.sample(distribution(target, target_cache, text, 1), generator).item()
    text.append(first)
    made = Generation(tokens=[first], kinds=["target"])
    yield made
    while len(made.tokens) < max_new_tokens and made.tokens[-1] not in eos_ids:
        # (1) The drafter writes its tokens, keeping q at each. One fewer than what is left to write, since the
        #     block adds one token of the target's: so nothing runs past max_new_tokens or the caches' room.
        guesses, q = [], []
        width = min(gamma if isinstance(gamma, int) else gamma.choose(), max_new_tokens - len(made.tokens) - 1)
        for _ in range(width):
            q.append(distribution(draft, draft_cache, (text + guesses)[draft_cache.length:], 1)[0])
            guesses.append(model.sample(q[-1][None], generator).item())

        # (2) The target reads them all in one pass: p at each guess, and at the place after the last.
        p = distribution(target, target_cache, (text + guesses)[target_cache.length:], len(guesses) + 1)
        made.target_calls += 1

        # (3) Walk left to right; keep guess x with probability min(1, p(x) / q(x)). Greedy needs no case of its
        #     own: there p and q are one-hot, so the ratio is 1 or 0.
        kept, refused = 0, False
        while kept < len(guesses) and not refused and not (kept and guesses[kept - 1] in eos_ids):
            x = guesses[kept]
            made.overlap += torch.minimum(p[kept], q[kept]).sum().item()
            u = torch.rand((), generator=generator, device=device)
            refused = not bool(u < p[kept, x] / q[kept][x])
            kept += not refused
            made.drafted += 1
        made.accepted += kept
        block, kinds = guesses[:kept], ["accepted"] * kept

        # (4) After a refusal, draw from what q left over of p: max(0, p - q). Together with (3) this gives exactly
        #     p(x): q(x) min(1, p/q) + P(refused) max(0, p - q) / sum max(0, p - q). If all was accepted, the last
        #     place's p gives a bonus token. An accepted end token ends the text with neither.
        if refused:
            leftover = (p[kept] - q[kept]).clamp(min=0)
            # p = q up to rounding is refused only by rounding, too, and then may leave nothing: p itself is right.
            leftover = leftover if leftover.sum() > 0 else p[kept]
            block.append(model.sample(leftover[None], generator).item())
            kinds.append("corrected")
        elif not (block and block[-1] in eos_ids):
            block.append(model.sample(p[-1:], generator).item())
            kinds.append("bonus")

        # (5) Keep the block, and let both caches forget what was not kept. The newest token has been read by
        #     neither; a drafter that stopped early may lack one more.
        if not isinstance(gamma, int):
            gamma.update(width, kept, kept + refused, len(block))
        text += block
        made.tokens += block
        made.kinds += kinds
        target_cache.length = len(text) - 1
        draft_cache.length = min(draft_cache.length, len(text) - 1)
        yield made


def last(stream):
    """The final value of a stream that is not watched on its way."""
    for value in stream:
        pass
    return value


def autoregressive_generate(target, tokens, max_new_tokens, temperature, top_p, eos_ids=(), generator=None):
    """Plain decoding of tokens (1, T) -> Generation. See speculative_generate for the arguments."""
    return last(autoregressive_stream(target, tokens, max_new_tokens, temperature, top_p, eos_ids, generator))


def speculative_generate(target, draft, tokens, max_new_tokens, gamma, temperature, top_p, eos_ids=(), generator=None):
    """Speculative decoding of tokens (1, T) int64 -> Generation, whose text is distributed as the target's own.

    gamma: tokens drafted a block, 0 is plain decoding; or an AutoGamma, which chooses it block by block. temperature 0 is greedy. eos_ids end the text; empty, nothing
    does. generator: a torch.Generator on the tokens' device, None the global one. ValueError: another vocabulary, or
    no room in the target's context.
    """
    return last(speculative_stream(target, draft, tokens, max_new_tokens, gamma, temperature, top_p, eos_ids, generator))


# ---- Showing it ------------------------------------------------------------------------------------------------------

COLOURS = {"target": "", "accepted": "\033[32m", "corrected": "\033[31m", "bonus": "\033[36m"}
MARKS = {"target": ("", ""), "accepted": ("", ""), "corrected": ("[", "]"), "bonus": ("{", "}")}


def trace_style(choice):
    """How tokens are told apart: by colour on a terminal, by brackets where colour is unwanted, not at all in a pipe."""
    if choice != "auto":
        return choice
    if not sys.stdout.isatty():
        return "plain"
    return "brackets" if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" else "colour"


def print_stream(stream, tok, style):
    """Print tokens as blocks arrive, whole characters only; returns the finished Generation and the text."""
    decoder, shown, text, made = tok.stream(), 0, "", None
    for made in stream:
        for token, kind in zip(made.tokens[shown:], made.kinds[shown:]):
            piece = decoder.push(token)
            text += piece
            if piece and style == "colour" and COLOURS[kind]:
                piece = COLOURS[kind] + piece + "\033[0m"
            elif piece and style == "brackets":
                piece = MARKS[kind][0] + piece + MARKS[kind][1]
            print(piece, end="", flush=True)
        shown = len(made.tokens)
    rest = decoder.flush()
    print(rest)
    return made, text + rest


def answer(pair, messages, args, style):
    """Stream one answer, then its figures in one line; returns the text."""
    target, draft, tok, device = pair
    tokens = torch.tensor([tok.chat_prompt(messages)], device=device)
    begin = time.perf_counter()
    gamma = args.gamma[0]
    made, text = print_stream(speculative_stream(target, draft, tokens, args.max_new_tokens, gamma, args.temperature,
                                                 args.top_p, tok.eos_ids), tok, style)
    seconds = time.perf_counter() - begin
    legend = {"colour": " ".join(f"{COLOURS[kind]}{kind}\033[0m" for kind in COLOURS) + "  ",
              "brackets": "accepted [corrected] {bonus}  "}.get(style, "")
    alpha = f"{made.accepted / made.drafted:.2f}" if made.drafted else "none drafted"
    tau = f"{made.tau:.2f}" if made.target_calls else "no block"
    print(f"--- {legend}{len(made.tokens)} tokens in {seconds:.1f} s ({len(made.tokens) / seconds:.1f}/s)  "
          f"gamma {gamma if isinstance(gamma, int) else 'auto'}  tau {tau}  alpha {alpha}", file=sys.stderr if style == "plain" else sys.stdout)
    return text


def chat(pair, args, style):
    """A conversation in the terminal; the history is kept until the context is full, then the oldest turns go."""
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
        while len(messages) > 1 and len(tok.chat_prompt(messages)) > room:
            del messages[:2]
            print("(the context is full: the oldest exchange is forgotten)")
        messages.append({"role": "assistant", "content": answer(pair, messages, args, style)})


# ---- Measuring it ----------------------------------------------------------------------------------------------------

@torch.inference_mode()
def pass_seconds(llama, tokens_in_flight, context=128, repeats=5):
    """Median seconds of one pass over `tokens_in_flight` tokens after `context` others, head included."""
    device = llama.embed_tokens.weight.device
    cache = model.KVCache(llama.config, 1, context + tokens_in_flight, device, llama.embed_tokens.weight.dtype)
    seconds = []
    for _ in range(repeats + 1):                  # the first one warms up
        cache.length = context                    # of zeros, which take as long to read as any others
        begin = time.perf_counter()
        logits = llama(torch.zeros(1, tokens_in_flight, dtype=torch.int64, device=device), cache)
        logits[0, -1, 0].item()                   # waits for a GPU to finish
        seconds.append(time.perf_counter() - begin)
    return float(np.median(seconds[1:]))


def machine():
    """One line that says what the figures were measured on."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
        name = names[0] if names else name
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {torch.get_num_threads()} threads{gpu}, torch {torch.__version__}"


def report_mismatch(target, prompt, plain, spec, number, gamma):
    """Greedy texts differ: say where, and the target's logits of both choices there. A tie is the only good reason."""
    same = next((i for i, (a, b) in enumerate(zip(plain, spec)) if a != b), min(len(plain), len(spec)))
    if same == min(len(plain), len(spec)):
        raise RuntimeError(f"prompt {number}, gamma {gamma}: one greedy text is a prefix of the other: a bug in the loop")
    with torch.inference_mode():
        text = torch.tensor([prompt + plain[:same]], device=target.embed_tokens.weight.device)
        logits = target.head(target.hidden(text)[0, -1]).float()
    a, b = logits[plain[same]].item(), logits[spec[same]].item()
    print(f"  greedy mismatch: prompt {number}, gamma {gamma}, new token {same}: plain chose {plain[same]} (logit {a:.6f}), "
          f"speculative {spec[same]} (logit {b:.6f}), apart {abs(a - b):.1e}")
    return {"prompt": number, "gamma": gamma, "position": same, "plain": [plain[same], a], "speculative": [spec[same], b]}


def summarise(task, gamma, runs, args, size_ratio, seed):
    """One row of figures over these prompts. runs: (plain Generation, its seconds, speculative Generation, its seconds)."""
    # Columns: plain tokens, plain seconds, speculative tokens, speculative seconds, accepted, drafted; one row a prompt.
    cost = np.array([[len(a.tokens), s, len(b.tokens), t, b.accepted, b.drafted] for a, s, b, t in runs])

    def speedup(total):
        return (total[..., 2] / total[..., 3]) / (total[..., 0] / total[..., 1])

    # Bootstrap: draw prompts with replacement, 2,000 times; what other prompts of the same kind would have given.
    picks = np.random.default_rng(seed).integers(len(runs), size=(2000, len(runs)))
    total, drawn = cost.sum(0), cost[picks].sum(1)
    low, high = np.percentile(speedup(drawn), [2.5, 97.5])
    calls, drafted = sum(b.target_calls for _, _, b, _ in runs), total[5]
    tau = (total[2] - len(runs)) / calls if calls else None
    alpha = total[4] / drafted if drafted else None
    drawn = drawn[drawn[:, 5] > 0]
    alpha_low, alpha_high = np.percentile(drawn[:, 4] / drawn[:, 5], [2.5, 97.5]).tolist() if drafted else (None, None)
    greedy = args.temperature == 0
    return {"task": task, "gamma": gamma, "temperature": args.temperature, "top_p": args.top_p, "prompts": len(runs),
            "new_tokens": int(total[2]), "tau": tau, "alpha": alpha, "alpha_low": alpha_low, "alpha_high": alpha_high,
            "alpha_analytic": sum(b.overlap for _, _, b, _ in runs) / drafted if drafted else None,
            "tau_implied": float(losses.implied_tau(alpha, gamma)) if drafted else None,
            "mbsu": tau / (size_ratio * gamma + 1) if calls else None,
            "plain_tokens_per_s": total[0] / total[1], "speculative_tokens_per_s": total[2] / total[3],
            "speedup": float(speedup(total)), "speedup_low": float(low), "speedup_high": float(high),
            "greedy_mismatches": sum(a.tokens != b.tokens for a, _, b, _ in runs) if greedy else None}


def bench(pair, verifiers, args):
    """Time every prompt of a file with plain decoding and with each gamma, alternated prompt by prompt in this process.

    verifiers: {gamma: the target in the form for it} (load_verifiers); plain decoding takes the pair's.
    """
    target, draft, tok, device = pair
    prompts = files.read_prompts(args.bench)
    if args.limit:
        tasks = [prompt["task"] for prompt in prompts]
        prompts = [prompt for i, prompt in enumerate(prompts) if tasks[:i].count(prompt["task"]) < args.limit]
    prompt_ids = [tok.chat_prompt(prompt["messages"]) for prompt in prompts]
    for number, ids in enumerate(prompt_ids, 1):
        try:
            check_inputs(target, draft, torch.zeros(1, len(ids)), args.max_new_tokens, max(args.gamma), args.temperature, args.top_p)
        except ValueError as error:
            raise ValueError(f"{args.bench}, prompt {number}: {error}") from None
    size_ratio = draft.parameter_count() / target.parameter_count()
    step = pass_seconds(target, 1)
    draft_step = pass_seconds(draft, 1) / step
    verify = {gamma: pass_seconds(verifiers[gamma], gamma + 1) / step for gamma in args.gamma}
    print(f"target step {step * 1e3:.1f} ms; over it, a drafter step is {draft_step:.3f}, verification "
          + ", ".join(f"{ratio:.2f} (gamma {gamma})" for gamma, ratio in verify.items()))

    def timed(gamma, number):
        """One prompt decoded: gamma None is plain. Returns (Generation, seconds)."""
        generator = torch.Generator(device).manual_seed(args.seed * 100_003 + number)
        tokens = torch.tensor([prompt_ids[number]], device=device)
        rest = (args.temperature, args.top_p, tok.eos_ids, generator)
        begin = time.perf_counter()
        if gamma is None:
            made = autoregressive_generate(target, tokens, args.max_new_tokens, *rest)
        else:
            made = speculative_generate(verifiers[gamma], draft, tokens, args.max_new_tokens, gamma, *rest)
        return made, time.perf_counter() - begin

    for gamma in (None, args.gamma[0]):           # warms up, not counted
        timed(gamma, 0)
    runs = {gamma: [] for gamma in args.gamma}
    progress, mismatches, result = files.Progress(len(prompts), "prompts"), [], None
    for number, prompt in enumerate(prompts):
        # Every second prompt goes through the same list backwards, so that a drift of the machine favours nobody.
        order = [None, *args.gamma] if number % 2 == 0 else [*args.gamma[::-1], None]
        outcome = {gamma: timed(gamma, number) for gamma in order}
        for gamma in args.gamma:
            runs[gamma].append((*outcome[None], *outcome[gamma]))
            if args.temperature == 0 and outcome[gamma][0].tokens != outcome[None][0].tokens:
                mismatches.append(report_mismatch(target, prompt_ids[number], outcome[None][0].tokens,
                                                  outcome[gamma][0].tokens, number, gamma))
        progress.update(number + 1)
        tasks = [p["task"] for p in prompts[:number + 1]]
        rows = []
        for task in [*dict.fromkeys(tasks), "all"]:
            for gamma in args.gamma:
                chosen = [run for run, its_task in zip(runs[gamma], tasks) if task in (its_task, "all")]
                rows.append(summarise(task, gamma, chosen, args, size_ratio, args.seed))
                tau = rows[-1]["tau"]
                rows[-1]["speedup_predicted"] = tau / (gamma * draft_step + verify[gamma]) if tau else None
        result = {"target": str(args.target), "draft": str(args.draft), "machine": machine(), "size_ratio": size_ratio,
                  "rows": rows, "mismatches": mismatches}
        if args.json:                             # rewritten whole after every prompt: a kill leaves what was measured
            with files.atomic(args.json) as temporary:
                temporary.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['machine']}; drafter / target parameters c = {size_ratio:.3f}; temperature {args.temperature}, top-p {args.top_p}")
    print(f"{'task':14} gamma prompts    tau  alpha  (analytic)   MBSU  plain/s   spec/s  speed-up  95 % interval  predicted"
          + ("  mismatches" if args.temperature == 0 else ""))
    for row in result["rows"]:
        shown = {key: float("nan") if value is None else value for key, value in row.items()}
        print("{task:14} {gamma:5d} {prompts:7d} {tau:6.2f} {alpha:6.3f}     ({alpha_analytic:.3f}) {mbsu:7.2f} {plain_tokens_per_s:8.1f} "
              "{speculative_tokens_per_s:8.1f} {speedup:9.2f}   {speedup_low:.2f} to {speedup_high:.2f} {speedup_predicted:10.2f}"
              .format(**shown) + (f"{row['greedy_mismatches']:12d}" if args.temperature == 0 else ""))
    if args.json:
        print(f"wrote {args.json}")


# ---- Command line ----------------------------------------------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True, help="the chat model's folder")
    parser.add_argument("--draft", type=Path, required=True, help="the drafter's folder; it must share the target's tokenizer")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="answer this and stop")
    what.add_argument("--chat", action="store_true", help="a conversation in the terminal")
    what.add_argument("--bench", type=Path, metavar="FILE", help="time all prompts of a JSON lines file against plain decoding")
    parser.add_argument("--gamma", type=lambda text: text if text == "auto" else int(text), nargs="+",
                        help="tokens drafted a block (default 3, --chat auto); several for --bench. auto measures the passes at start and "
                             "follows the acceptance rate; above temperature 0 a seed then fixes the text's distribution, not the text")
    parser.add_argument("--temperature", type=float, default=None, help="0 is greedy (default 0.6; --bench 0)")
    parser.add_argument("--top-p", type=float, default=None, help="nucleus mass, 1 cuts nothing (default 0.9; --bench 1)")
    parser.add_argument("--max-new-tokens", type=int, default=None, help="default 256; --bench 128")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="--bench: only the first N prompts of each task")
    parser.add_argument("--json", type=Path, metavar="OUT", help="--bench: write the figures there")
    parser.add_argument("--trace", default="auto", choices=["auto", "colour", "brackets", "plain"],
                        help="how tokens are told apart (auto: colour on a terminal, brackets with NO_COLOR, plain in a pipe)")
    model.machine_flags(parser)
    args = parser.parse_args()
    defaults = {"temperature": (0.6, 0.0), "top_p": (0.9, 1.0), "max_new_tokens": (256, 128)}
    for name, (ordinary, for_bench) in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, for_bench if args.bench else ordinary)
    args.gamma = args.gamma or ["auto" if args.chat else 3]
    if "auto" in args.gamma and args.bench:
        raise ValueError("--bench needs a fixed --gamma: what auto chooses depends on the clock, so no two runs would be alike")
    if "auto" not in args.gamma and min(args.gamma) < 1:
        raise ValueError(f"--gamma {min(args.gamma)}: a block drafts at least 1 token; for plain decoding see the column plain of --bench")
    if args.prompt is not None and not args.prompt.strip():
        raise ValueError("--prompt is empty: give the text to answer")
    tok, draft_tok = tokenizer.load(args.target), tokenizer.load(args.draft)
    if tok.fingerprint != draft_tok.fingerprint:
        raise ValueError(f"{args.draft} has another tokenizer than {args.target} ({draft_tok.vocab_size} and {tok.vocab_size} tokens, "
                         f"not the same ones): a drafter must share its target's tokenizer")
    style = trace_style(args.trace)
    if style == "plain":                          # in a pipe stdout carries the answer alone
        stdout, sys.stdout = sys.stdout, sys.stderr
    device, dtype = model.set_up(args)
    if args.bench:
        target, verifiers = load_verifiers(args.target, args.gamma, device, dtype)
    else:
        in_flight = model.MAX_UNPACKED_TOKENS if args.gamma[0] == "auto" else args.gamma[0] + 1
        target = model.load(args.target, device, dtype).pack(in_flight)
    draft = model.load(args.draft, device, dtype).pack()
    print(f"target {target.parameter_count() / 1e6:.1f} M parameters, drafter {draft.parameter_count() / 1e6:.1f} M")
    if style == "plain":
        sys.stdout = stdout
    pair = (target, draft, tok, device)
    if args.gamma[0] == "auto":
        args.gamma[0] = measured_gamma(target, draft)
    if args.bench:
        bench(pair, verifiers, args)
        print(f"next: python speculate.py --target {args.target} --draft {args.draft} --chat")
    elif args.chat:
        chat(pair, args, style)
    else:
        answer(pair, [{"role": "user", "content": args.prompt}], args, style)


if __name__ == "__main__":
    files.run(main)
