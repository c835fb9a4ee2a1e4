"""Stage 1: pretraining by next-token prediction, for the drafter and for the tiny target.

    python train.py --model small-drafter --data out/pretrain --out out/drafter-base

A drafter must guess the words of one particular chat model, yet it first has to know what words
are: the paper (Goel et al., 2024, arXiv 2403.00858, section 2) pretrains it as any language model
is, on plain text, before distill.py aligns it with the target. --data is the folder that
`python data/pretrain_text.py` writes, --tokenizer the target's folder; --out becomes a model folder
that transformers opens, with `training.pt` (all that --resume needs) and `log.jsonl` (the curves)
beside it. With --chat FILE the same loop is chat tuning: instructions and answers, one conversation
a row, the loss on the answer only. That is how the tiny world's target becomes a chat model:

    python train.py --init out/tiny/target-base --chat out/tiny/chat.jsonl \
                    --tokenizer out/tiny/tokenizer --out out/tiny/target
"""

import contextlib
import dataclasses
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import distributed

import model
from data import files, pretrain_text, tokenizer

# {name: shape}; vocabulary, end tokens and context come from the tokenizer.
PRESETS = files.read_json(Path(__file__).parent / "data" / "presets.json")["shapes"]
EVAL_WINDOWS = 64  # or prompts: the same at every evaluation and in every run with this data


# ---- The loss ----------------------------------------------------------------------------------

def next_token_loss(llama, tokens, answer=None):
    """Mean cross-entropy in nats of each token given those before it: a scalar.

    tokens (B, T) int64; answer (B, T) bool: True where the next token counts; None: everywhere.
    """
    answer = torch.ones_like(tokens, dtype=torch.bool) if answer is None else answer
    hidden = llama.hidden(tokens[:, :-1])[answer[:, :-1]]                                 # (N, D)
    logits = F.linear(hidden, llama.head_weight())           # also outside a draft vocabulary
    return F.cross_entropy(logits.float(), tokens[:, 1:][answer[:, :-1]])


def backward_in_chunks(hidden, head, chunk, loss_at):
    """The same gradients as loss.backward() where the loss is a sum over positions, with the logits
    of `chunk` positions in memory at a time. Returns the loss, detached.

    hidden (N, D), head (V, D): what logits are made of. loss_at(logits, rows) -> the sum (a scalar)
    over a chunk; rows is the slice of positions that the logits (n, V) belong to.

    Logits are large: with SmolLM2's V = 49,152, 2,048 positions take 400 MB, and as much again for
    their softmax and for their gradient. But the head treats every position by itself, so the chain
    rule may be cut at the hidden states: run the head's forward and backward for some positions,
    keep d loss / d hidden, let the logits go, and at the end send the whole gradient back through
    the layers once. The same sums; only the order of additions differs.
    """
    # The same numbers without a history (leaves of the graph): backward() stops at their .grad.
    hidden_leaf, head_leaf = (x.detach().requires_grad_() for x in (hidden, head))
    total = 0.0
    for at in range(0, max(len(hidden), 1), chunk):           # of no positions: a gradient of zeros
        rows = slice(at, at + chunk)
        loss = loss_at(F.linear(hidden_leaf[rows], head_leaf), rows)
        loss.backward()
        total = total + loss.detach()
    # Go on from the cut: hidden's gradient runs through the layers, head's into the weight, or into
    # those rows of it that were taken.
    torch.autograd.backward([hidden, head], [hidden_leaf.grad, head_leaf.grad])
    return total


def next_token_loss_backward(llama, tokens, answer=None, scale=1.0, chunk=512):
    """Add the gradient of scale * next_token_loss to the parameters; return that loss, detached.

    Of many processes each reads its own rows, and adds and returns their part of both sums.
    """
    answer = torch.ones_like(tokens, dtype=torch.bool) if answer is None else answer
    mine, count = own(len(tokens)), int(answer[:, :-1].sum())
    hidden = llama.hidden(tokens[mine, :-1])[answer[mine, :-1]]
    following = tokens[mine, 1:][answer[mine, :-1]]                                          # (N,)

    def loss_at(logits, rows):
        loss = F.cross_entropy(logits.float(), following[rows], reduction="sum")
        return scale * loss / count

    return backward_in_chunks(hidden, llama.head_weight(), chunk, loss_at) / scale


@torch.no_grad()
def evaluate(llama, batches):
    """Mean next-token loss in nats, a float, over (tokens, answer) batches, small ones."""
    losses = [next_token_loss(llama, *batch).item() for batch in batches]
    return float(np.average(losses, weights=[int(answer[:, :-1].sum()) for _, answer in batches]))


# ---- Conversations -----------------------------------------------------------------------------

@dataclasses.dataclass
class Example:
    """One conversation, ready to train on: `tokens`, of which tokens[first:] are the answer."""

    tokens: list
    first: int

    @property
    def count(self):
        """Positions whose next token is the answer's: the last prompt token to the last but one."""
        return len(self.tokens) - self.first


def read_examples(path, tok, context, task=None):
    """Records of `distill.py generate`, of one task or of all -> Examples of at most `context`
    tokens.

    The target's answers are used as they were sampled (response_ids: their text encoded again may
    differ). The end-of-turn token follows only where the answer ended by itself: after an answer
    that was cut off at the length limit the target would have gone on, and the drafter must not
    learn to stop there. Records with a text alone, such as a chat corpus, are encoded here; they
    end, unless they say "ended": false.
    """
    examples, cut = [], 0
    for number, record in enumerate(files.read_jsonl(path), 1):
        if task is not None and record.get("task") != task:
            continue
        ids, ended = record.get("response_ids"), record.get("ended", True)
        messages = files.messages_of(record)
        if ids is None and isinstance(record.get("response"), str) and isinstance(messages, list):
            ids = tok.answer_ids(messages, record["response"])
        if not (isinstance(ids, list) and isinstance(ended, bool) and isinstance(messages, list)):
            raise ValueError(f"{path}, record {number}: needs messages (role, content) and "
                             f"response_ids (with ended) or response, as distill.py generate "
                             f"writes them")
        if any(not isinstance(i, int) or not 0 <= i < tok.vocab_size for i in ids):
            raise ValueError(f"{path}, record {number}: response_ids hold what is no token of "
                             f"{tok.folder}")
        # No messages: a text that the target wrote from its bare start, the document token.
        prompt = tok.chat_prompt(messages) if messages else [tok.document_id]
        tokens = prompt + ids + ([tok.eos_id] if ended else [])
        if len(prompt) < min(len(tokens), context):
            cut += len(tokens) > context
            examples.append(Example(tokens[:context], len(prompt)))
    if not examples:
        raise ValueError(f"{path}: no record with an answer that fits into --context {context}")
    print(f"{path}: {len(examples)} records, {sum(e.count for e in examples):,} answer positions"
          + (f", {cut} cut at {context} tokens" if cut else ""))
    return examples


def collate(batch, device):
    """Examples -> tokens (B, T), padded on the right (causal attention never looks there), and
    answer (B, T), True at the positions whose next token is the answer's:

        tokens    p p p a a a 0 0            p the prompt's, a the answer's, first = 3
        answer    . . x x x . . .

    T is a multiple of 64: with few different widths, memory that was freed fits the next batch.
    """
    width = math.ceil(max((len(e.tokens) for e in batch), default=1) / 64) * 64
    rows = [e.tokens + [0] * (width - len(e.tokens)) for e in batch]
    tokens = torch.tensor(rows, dtype=torch.int64, device=device).view(-1, width)
    first = torch.tensor([e.first for e in batch], device=device)[:, None]
    end = torch.tensor([len(e.tokens) for e in batch], device=device)[:, None]
    column = torch.arange(1, width + 1, device=device)                 # that of the next token
    return tokens, (column >= first) & (column < end)


def batch_at(examples, batch_size, seed, number):
    """The number-th batch of examples, counted over epochs, each epoch in an order of its own.

    It follows from seed and number alone, so that a resumed run sees what an unbroken one would
    have seen. Batches hold examples of similar length: little padding, and still random.
    """
    epoch, index = divmod(number, math.ceil(len(examples) / batch_size))
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2 ** 63)
    order = torch.randperm(len(examples), generator=generator)
    lengths = torch.tensor([len(e.tokens) for e in examples])
    batches = []                  # all of the epoch, made anew for each: cheap beside a step
    for group in order.split(16 * batch_size):             # 16 batches at a time, sorted by length
        batches += group[lengths[group].argsort(stable=True)].split(batch_size)
    chosen = batches[torch.randperm(len(batches), generator=generator)[index]]
    return [examples[i] for i in chosen]


def hold_out(examples, count):
    """(training, held out): every ceil(n / count)-th of the n prompts is held out, so `count` of
    them at most. All answers to a prompt go to one side: a drafter that saw one has half seen the
    others."""
    prompts = {}              # what begins with the document token has no prompt: each by itself
    for e in examples:
        key = tuple(e.tokens[:e.first] if e.first > 1 else e.tokens)
        prompts.setdefault(key, []).append(e)
    if len(prompts) <= count:
        raise ValueError(f"{len(prompts)} prompts with usable records, of which {count} would be "
                         f"held out: give more, or lower --eval-records")
    held_out = list(prompts.values())[::math.ceil(len(prompts) / count)]
    held = {id(e) for group in held_out for e in group}
    return [e for e in examples if id(e) not in held], [e for e in examples if id(e) in held]


def fingerprint(*parts):
    """files.fingerprint of these lists of Examples."""
    return files.fingerprint(*([(e.tokens, e.first) for e in part] for part in parts))


# ---- Optimiser and schedule --------------------------------------------------------------------

def make_optimiser(llama, learning_rate, weight_decay=0.1, beta2=0.95):
    """AdamW (Loshchilov and Hutter, 2019, arXiv 1711.05101) that decays matrices, not norms.

    Decay pulls weights towards zero. For a matrix that is a mild preference for small functions;
    for the scale of a norm, a vector around 1, zero is no meaningful place to be pulled to.
    beta2 0.95 rather than 0.999: the second moment then forgets in 20 steps, which a short run
    needs.
    """
    matrices = [p for p in llama.parameters() if p.dim() >= 2]
    vectors = [p for p in llama.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, beta2), fused=True)


def learning_rate_at(step, steps, peak, floor, warm_up):
    """Linear warm-up to peak over the first warm_up steps, then half a cosine down to floor.

    Warm-up: Adam's second moment rests on few gradients at first, so its early steps are too bold.
    """
    if step < warm_up:
        return peak * (step + 1) / warm_up
    progress = min(1.0, (step - warm_up) / max(1, steps - warm_up))
    return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2


# ---- What both trainings share: steps, log, checkpoints ----------------------------------------

class Run:
    """One training from its first step, or from its last checkpoint, to its end.

        run = Run(args, llama, tok, settings, "tokens", "eval_loss", evaluate, generator)
        for step in run.steps():                # evaluates, saves and logs between the steps
            ...                                 # the caller's batch, loss and gradients
            run.update(loss, tokens_seen)       # the optimiser's step

    args: the flags of training_flags. tok: the tokenizer, whose files --out gets, too. settings:
    all that decides the result; --resume refuses others. unit: what is counted as seen. metric: the
    name of what evaluate() returns. memory: a dict, changed in place, of what the loss remembers
    from step to step (a running mean does).
    """

    def __init__(self, args, llama, tok, settings, unit, metric, evaluate, generator, memory=None):
        self.args, self.llama, self.settings, self.unit = args, llama, settings, unit
        self.metric, self.evaluate, self.value = metric, evaluate, math.nan
        self.generator, self.memory = generator, {} if memory is None else memory
        self.out, self.step, self.seen, self.seconds = Path(args.out), 0, 0, 0.0
        self.optimiser = make_optimiser(llama, args.learning_rate, args.weight_decay, args.beta2)
        if args.resume and (self.out / "training.pt").is_file():
            state = read_checkpoint(self.out, settings)
            llama.load_state_dict(state["weights"])
            self.optimiser.load_state_dict(state["optimiser"])
            generator.set_state(state["generator"])
            self.memory.update(state["memory"])
            self.step, self.seen, self.seconds = state["step"], state["seen"], state["seconds"]
            print(f"resuming {self.out} at step {self.step}")
        elif args.resume:
            print(f"{self.out / 'training.pt'}: no such file, so training starts at step 0")
        if not files.rank():
            keep_log_until(self.out / "log.jsonl", self.step)
            tokenizer.copy(tok.folder, self.out)

    def steps(self):
        """Yield the number s of each step that is to be done, 0 to args.steps - 1.

        One turn: evaluate and save, where that is due, what s updates have made; yield, where the
        caller makes its batch, its gradients and the update; write a row of the log, with the
        evaluation before the update and the loss of its batch. A last turn evaluates, saves and
        logs, without an update.
        """
        args, began = self.args, time.monotonic() - self.seconds
        begin, seen = self.step, self.seen
        progress = files.Progress(args.steps - begin, "steps")
        with contextlib.nullcontext() if files.rank() else open(self.out / "log.jsonl", "a") as log:
            while True:
                rate = learning_rate_at(self.step, args.steps, args.learning_rate,
                                        args.min_learning_rate, args.warm_up)
                for group in self.optimiser.param_groups:
                    group["lr"] = rate
                self.row = {"step": self.step, self.unit: self.seen, "loss": None, "lr": rate}
                last = self.step == args.steps
                save = last or self.step % args.save_every == 0
                if save or self.step % args.eval_every == 0:
                    self.row[self.metric] = self.value = self.evaluate()
                    require_finite(self.value, self.step, self.out)
                if save and self.step > 0 and not files.rank():
                    self.save(time.monotonic() - began)
                if not last:
                    yield self.step                       # here the body of the caller's loop runs
                self.row["seconds"] = round(time.monotonic() - began, 3)
                print(json.dumps(self.row), file=log, flush=True)
                speed = (self.seen - seen) / (time.monotonic() - progress.begin)
                shown = {**self.row, self.metric: self.value}
                progress.update(self.step - begin, f"{speed:,.0f} {self.unit}/s  " + "  ".join(
                    f"{name} {shown[name]:.4g}" for name in ("loss", "alpha", self.metric, "lr")
                    if shown.get(name) is not None))
                if last:
                    return
                self.step += 1

    def update(self, loss, seen, **more):
        """Clip, step, and log `loss` and whatever else is given; refuse what is not finite.

        Of many processes each gives its part of these sums, and of the gradients; seen: of all."""
        loss, *others = add_up([w.grad for w in self.llama.parameters()], loss, *more.values())
        norm = torch.nn.utils.clip_grad_norm_(self.llama.parameters(), self.args.clip or math.inf)
        require_finite(loss + norm.item(), self.step, self.out)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.seen += seen
        self.row |= {"loss": loss, **dict(zip(more, others))}

    def save(self, seconds):
        """Write training.pt, then the model folder.

        training.pt holds the weights too, although model.safetensors has them: then one rename
        replaces the whole state at once, and no kill can leave the optimiser of one step beside
        the weights of another.
        """
        with files.atomic(self.out / "training.pt") as temporary:
            torch.save({"weights": self.llama.state_dict(), "step": self.step, "seen": self.seen,
                        "optimiser": self.optimiser.state_dict(), "seconds": seconds,
                        "generator": self.generator.get_state(), "settings": self.settings,
                        "memory": dict(self.memory)}, temporary)
        model.save(self.llama, self.out)


def read_checkpoint(folder, settings):
    """What Run.save wrote. ValueError if it is damaged, or if its settings were not these."""
    path = folder / "training.pt"
    try:
        # Data only: other files of this format may run code when they are read.
        state = torch.load(path, map_location="cpu", weights_only=True)
        made_with = state["settings"]
    except Exception as error:  # torch raises any of five kinds for a damaged file
        raise ValueError(f"{path}: not a readable checkpoint ({repr(error).splitlines()[0]}); "
                         f"move {folder} away and start again") from None
    files.require_same(path, made_with, settings)
    return state


def keep_log_until(path, step):
    """Cut log.jsonl back to the lines before `step`: what a killed run did after its checkpoint is
    done again."""
    files.trim_partial_line(path)
    rows = files.read_jsonl(path) if path.is_file() else []
    files.write_jsonl(path, [row for row in rows if row.get("step", step) < step])


def require_finite(value, step, out):
    """ValueError if a loss, or its gradient, is infinite or no number. Asked before each step and
    each save, so what is saved is sound."""
    if not math.isfinite(value):
        raise ValueError(f"the loss or its gradient is {value} at step {step}; a checkpoint in "
                         f"{out} is from before; start again with a lower --learning-rate")


# ---- Many processes ----------------------------------------------------------------------------

# `torchrun --nproc-per-node 8 train.py ...` starts this script eight times, one process a GPU. Each
# holds the whole model, and draws the same batches with the same random numbers. Of each batch it
# takes its own rows, and gives their part of the step's sums, of gradients and losses. These parts
# are added up in one message just before the optimiser's step. So all processes take the same step,
# and it is the one that a single process would have taken, up to rounding. Nothing in a checkpoint
# depends on their number. Each evaluates the whole; process 0 alone prints and writes.

@contextlib.contextmanager
def processes():
    """The block runs together with the other processes that torchrun has started.

    An error in one is the end of all, and the first that fails says why. It leaves, so the messages
    that others wait for break off (on GPUs torchrun ends who waits). They come to the same place,
    see that they are not the first, and leave without a word.
    """
    store, rank, world = next(distributed.rendezvous("env://"))
    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())
    # A day: in generate some wait long for the others.
    distributed.init_process_group(store=store, rank=rank, world_size=world,
                                   timeout=48 * distributed.default_pg_timeout)
    try:
        with contextlib.redirect_stdout(None) if rank else contextlib.nullcontext():
            yield
    except Exception:
        if store.add("failed", 1) == 1:
            raise
        time.sleep(1)               # torchrun ends all when one leaves: let the first one speak
        raise SystemExit(2) from None
    distributed.destroy_process_group()


def own(count):
    """Which of a batch's `count` rows are this process's: a slice, empty where there are few."""
    rank, world = files.rank(), files.world()
    return slice(count * rank // world, count * (rank + 1) // world)


def add_up(tensors, *numbers):
    """Replace each tensor by its sum over all processes, and return the numbers' sums: one message.

    It is also how processes wait for each other. Without torchrun nothing changes.
    """
    if files.world() == 1:
        return numbers
    parts = [*tensors, tensors[0].new_tensor(numbers)]
    message = torch.nn.utils.parameters_to_vector(parts)
    distributed.all_reduce(message)
    torch.nn.utils.vector_to_parameters(message, parts)
    return parts[-1].tolist()


def mean(x):
    """The mean of the numbers x of all processes, a scalar tensor."""
    total = x.sum()
    return total / add_up([total], x.numel())[0]


def shard(llama):
    """Keep a part of the weights in each process; each layer is put together for the time of its
    pass (FSDP, Zhao et al., 2023, arXiv 2304.11277), embedding and head for all time. From here on
    all processes must call hidden and head_weight together. Returns the model."""
    from torch.distributed import fsdp

    for module in (*llama.layers, llama):
        fsdp.fully_shard(module, reshard_after_forward=module is not llama)
    for name in ("hidden", "head_weight"):
        fsdp.register_fsdp_forward_method(llama, name)
    return llama


# ---- Flags and defaults ------------------------------------------------------------------------

def training_flags(parser, steps, batch_size, context, eval_every, learning_rate=None):
    """Add the flags that all trainings have, with these defaults. No learning rate: the caller sets
    it, and whether to resume."""
    files.add_flags(
        parser, ("steps", steps, "[1, inf)", "optimiser steps"),
        ("batch-size", batch_size, "[1, inf)", "rows in one pass, of all processes together"),
        ("context", context, "[2, inf)", "tokens in one row at most"),
        ("weight-decay", 0.1, "[0, inf)", "AdamW's, on matrices"),
        ("beta2", 0.95, "(0, 1)", "AdamW's"),
        ("clip", 1.0, "[0, inf)", "largest global norm of the gradient, 0 for no limit"),
        ("eval-every", eval_every, "[1, inf)", "steps between evaluations"),
        ("save-every", 100, "[1, inf)", "steps between checkpoints"))
    parser.add_argument("--warm-up", type=files.between("[0, inf)", int),
                        help="steps of rising learning rate (default: a twentieth of --steps)")
    if learning_rate:
        files.add_flags(parser, ("learning-rate", learning_rate, "(0, inf)", "its peak"))
        parser.add_argument("--min-learning-rate", type=files.between("[0, inf)"),
                            help="where the cosine ends (default: a tenth of the peak)")
        parser.add_argument("--resume", action="store_true",
                            help="go on exactly from the checkpoint in --out")
    # float16 would lose small gradients: no loss scaling here.
    files.machine_flags(parser, dtypes=("float32", "bfloat16"))


def fill_in(args):
    """Set the flags whose default follows from others. ValueError if --out holds a model that is
    not to be gone on with, or that no training here has made."""
    held = [name for name in ("training.pt", "model.safetensors", "config.json")
            if (args.out / name).is_file()]
    if held and not (args.resume and held[0] == "training.pt"):
        raise ValueError(f"--out {args.out} already holds a model: --resume goes on with one that "
                         f"has its training.pt; or give another --out")
    args.warm_up = args.steps // 20 if args.warm_up is None else args.warm_up
    if args.min_learning_rate is None:
        args.min_learning_rate = args.learning_rate / 10


# The flags that decide a training's result.
DECIDING = ("steps", "batch_size", "context", "learning_rate", "min_learning_rate", "warm_up",
            "weight_decay", "beta2", "clip", "seed", "dtype")


# ---- Where a model starts ----------------------------------------------------------------------

def leading_directions(embedding, width):
    """embedding (V, D) -> (V, width), the numbers that tell most about its rows, and the share of
    their energy, the sum of squares, that is kept.

    With E = U S V^T, the best approximation of rank k is U_k S_k V_k^T (Eckart and Young, 1936).
    Its rows lie in a space of k dimensions, where V_k gives their coordinates: U_k S_k = E V_k. So
    tokens that the target treats as similar are similar for the drafter, too, from its first step.
    V_k are the eigenvectors of E^T E (D, D), a small matrix: no SVD of the large E is needed.
    """
    if width > embedding.shape[1]:
        raise ValueError(f"--embed-from has an embedding of width {embedding.shape[1]}: a model of "
                         f"width {width} cannot start from it, leave it out")
    E = embedding.double()
    energy, directions = torch.linalg.eigh(E.T @ E)        # ascending: the last are the largest
    return (E @ directions[:, -width:]).float(), (energy[-width:].sum() / energy.sum()).item()


def build(args, tok):
    """The model to train: a preset with the tokenizer's vocabulary, or the model of --init."""
    if given := args.init or args.embed_from:
        tokenizer.load_pair(args.tokenizer, given)
        source = model.load(given, vocab_size=tok.vocab_size)
        if args.init:
            return source
    eos = list(tok.eos_ids)
    llama = model.Llama(model.Config(
        vocab_size=tok.vocab_size, bos_token_id=tok.bos_id, pad_token_id=tok.pad_id,
        eos_token_id=eos if len(eos) > 1 else tok.eos_id,
        max_position_embeddings=max(args.context, tok.context),
        **PRESETS[args.model]))
    if args.embed_from:
        embedding = source.embed_tokens.weight.detach()
        rows, share = leading_directions(embedding, llama.config.hidden_size)
        print(f"embedding started from {given}: {rows.shape[1]} directions keep {share:.1%} of its "
              f"energy")
        # The directions are the target's, the size is this model's own. The head is the embedding,
        # too, and at first the hidden state is near the row of the token just read: with large rows
        # the model would start out sure that this token comes again.
        own = llama.embed_tokens.weight
        own.data.copy_(rows * (own.std() / rows.std()))
    return llama


# ---- Command line ------------------------------------------------------------------------------

def parse(argv):
    parser = files.Parser(description=__doc__, epilog="The defaults see 2 M tokens: about 35 "
                          "minutes on two free cores, 1 GB of memory.")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--model", choices=PRESETS, default="small-drafter",
                       help="shape (default small-drafter)")
    start.add_argument("--init", type=Path, metavar="DIR",
                       help="go on from the weights of this model folder, in its shape")
    parser.add_argument("--embed-from", type=Path, metavar="DIR", help="start the embedding from "
                        "that of this model (the target), reduced to this width by SVD")
    parser.add_argument("--chat", type=Path, metavar="FILE", help="tune on the answers of these "
                        "conversations (JSON lines of messages and response) instead of on --data")
    files.add_flags(
        parser, ("data", "out/pretrain", Path, "folder with train.bin, eval.bin and meta.json"),
        ("tokenizer", "models/smollm2-135m-instruct", Path, "folder with the tokenizer"),
        ("out", "out/drafter-base", Path, "model folder to write"),
        ("accumulate", 1, "[1, inf)", "passes that make one step"))
    training_flags(parser, steps=1000, batch_size=8, context=256, learning_rate=1e-3,
                   eval_every=100)
    args = parser.parse_args(argv)
    if args.init and args.embed_from:
        raise ValueError("--init brings its own embedding; leave --embed-from out")
    return args


def main(argv=None):
    args = parse(argv)
    with files.locked(args.out, folder=True):
        train(args)


def train(args):
    fill_in(args)
    device, dtype = files.set_up(args)
    tok = tokenizer.load(args.tokenizer)
    generator = torch.Generator().manual_seed(args.seed)  # draws the windows; a checkpoint has it
    if args.chat:
        training, held_out = hold_out(read_examples(args.chat, tok, args.context), EVAL_WINDOWS)
        evaluation = [collate(held_out[i:i + 8], device) for i in range(0, len(held_out), 8)]
        size, text = sum(e.count for e in training), fingerprint(training, held_out)
    else:
        training, held_out = pretrain_text.read(args.data, tok, args.context)
        rows = pretrain_text.spread(held_out, args.context, EVAL_WINDOWS).to(device).split(1)
        evaluation = [(tokens, torch.ones_like(tokens, dtype=torch.bool)) for tokens in rows]
        size, text = len(training), files.fingerprint(args.data)
    llama = build(args, tok).to(device)
    settings = {**files.settings(args, *DECIDING, "accumulate", "model", "init", "embed_from"),
                **dataclasses.asdict(llama.config), "tokenizer": tok.fingerprint,
                "chat" if args.chat else "data": text}
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    def measure():
        with autocast:
            return evaluate(llama, evaluation)

    run = Run(args, llama, tok, settings, "tokens", "eval_loss", measure, generator)
    each = args.batch_size * args.accumulate * (size / len(training) if args.chat else args.context)
    print(f"{llama.parameter_count() / 1e6:.2f} M parameters; {args.steps} steps of {each:,.0f} "
          f"tokens: {args.steps * each / size:.2f} times over all {size:,}")

    for step in run.steps():
        batches, loss = [], 0.0
        for number in range(step * args.accumulate, (step + 1) * args.accumulate):
            if args.chat:
                batch = batch_at(training, args.batch_size, args.seed, number)
                batches.append(collate(batch, device))
            else:
                tokens = pretrain_text.sample(training, args.batch_size, args.context, generator)
                batches.append((tokens.to(device), torch.ones_like(tokens, device=device).bool()))
        # The step's gradient is one mean over all its positions, however many passes it takes: each
        # pass counts by its share of them.
        counts = [int(answer[:, :-1].sum()) for _, answer in batches]
        for (tokens, answer), count in zip(batches, counts):
            share = count / sum(counts)
            # bfloat16 for the products, while weights, gradients and Adam's moments stay fp32: an
            # update is often smaller than the last bit of a bfloat16 weight.
            with autocast:
                loss += share * next_token_loss_backward(llama, tokens, answer, share).item()
        run.update(loss, sum(counts))

    print(f"wrote {args.out}: evaluation loss {run.value:.4f} nats a token (perplexity "
          f"{math.exp(min(run.value, 700)):.1f})")
    source = f"{args.out} --prompts FILE" if args.chat else f"{args.tokenizer} --self-instruct 1000"
    print(f"next: python distill.py generate --target {source} --out out/records.jsonl")


if __name__ == "__main__":
    files.run(main, processes)
