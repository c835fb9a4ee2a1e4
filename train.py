"""Stage 1: pretraining by next-token prediction, for the drafter and for the tiny target.

    python train.py --model small-drafter --data out/pretrain --out out/drafter-base

A drafter must guess the words of one particular chat model, yet it first has to know what words are: the paper
(Goel et al., 2024, arXiv 2403.00858, section 2) pretrains it as any language model is, on plain text, before
distill.py aligns it with the target. One loop, flat and in full view: schedule, evaluate, checkpoint, accumulate,
clip, step, log. --data is the folder that `python data/pretrain_text.py` writes, --tokenizer the target's folder;
--out becomes a model folder that transformers opens, with `training.pt` (all that --resume needs) and `log.jsonl`
(the curves) beside it. With --chat FILE the same loop is chat tuning: instructions and answers, one conversation a row,
the loss on the answer only. That is how the tiny world's target becomes a chat model:

    python train.py --init out/tiny/target-base --chat out/tiny/chat.jsonl --tokenizer out/tiny/tokenizer --out out/tiny/target
"""

import argparse
import dataclasses
import json
import math
import shutil
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import files, tokenizer as tokenizers
from model import Config, Llama, load as load_model, save as save_model

# Shapes only: vocabulary, end tokens and reach come from the tokenizer. The vocabulary counted with in brackets.
PRESETS = {
    # The paper's drafter for Llama 2 Chat 7B [32,000]: 117 M, 1.7 % of its target. Untied, as Llama 2 is.
    "paper-drafter": dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=8,
                          tie_word_embeddings=False),
    # For SmolLM2-135M [49,152]: 15.0 M, of which the tied embedding is 12.6 M: a large vocabulary is the dear part.
    "small-drafter": dict(hidden_size=256, intermediate_size=704, num_hidden_layers=3, num_attention_heads=4),
    # The same, cheaper to train and to draft with [49,152]: 10.3 M. For trying things out.
    "smaller-drafter": dict(hidden_size=192, intermediate_size=512, num_hidden_layers=2, num_attention_heads=3),
    # The tiny world's target [2,048]: 2.7 M. Deep and thin, because a pass at this size costs its layers' overhead:
    # depth makes the target's step dear, and so leaves something for a drafter to save.
    "tiny-target": dict(hidden_size=128, intermediate_size=352, num_hidden_layers=12, num_attention_heads=4),
    # The tiny world's drafter [2,048]: 0.13 M, a twentieth of its target in parameters, a twelfth in layers.
    "tiny-drafter": dict(hidden_size=48, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2),
}
EVAL_WINDOWS = 64  # the same at every evaluation and in every run with this data and context, so that losses compare
CHUNK = 512  # positions whose logits live at once: 512 x 49,152 x 4 bytes = 100 MB; also the fastest of 64 to 2,048


# ---- data ----

def read_data(folder, tokenizer, context):
    """The tokens of folder's train.bin and eval.bin, two uint16 arrays by memory map: only pages in use take memory.

    ValueError if a file is missing, not of this tokenizer (ids mean nothing without it), or shorter than one window of
    context + 1 tokens.
    """
    paths = [Path(folder) / name for name in ("meta.json", "train.bin", "eval.bin")]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path}: no such file; python data/pretrain_text.py writes the token files")
    try:
        written_with = json.loads(paths[0].read_text(encoding="utf-8"))["tokenizer_fingerprint"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(f"{paths[0]}: no JSON object with tokenizer_fingerprint; write the token files again") from None
    if written_with != tokenizer.fingerprint:
        raise ValueError(f"{folder} was written with tokenizer {written_with}, but --tokenizer {tokenizer.folder} is "
                         f"{tokenizer.fingerprint}: write the token files again with this tokenizer")
    arrays = []
    for path in paths[1:]:
        size = path.stat().st_size
        if size % 2 or size // 2 <= context:
            raise ValueError(f"{path}: {size} bytes; expected two a token and more than --context {context} tokens: "
                             f"write it again, or lower --context")
        arrays.append(np.memmap(path, dtype="<u2", mode="r"))
        if arrays[-1].max() >= tokenizer.vocab_size:
            raise ValueError(f"{path}: holds token {arrays[-1].max()}, outside the tokenizer's {tokenizer.vocab_size}: "
                             f"write it again with this tokenizer")
    return arrays


def sample_batch(tokens, batch_size, context, generator):
    """(batch_size, context + 1) int64 windows at random offsets: all but the last token are read, all but the first
    predicted.

    Windows run over document boundaries, as in GPT's training: the separating token says that one ended.
    """
    offsets = torch.randint(len(tokens) - context, (batch_size,), generator=generator).tolist()
    return torch.from_numpy(np.stack([tokens[o:o + context + 1] for o in offsets]).astype(np.int64))


def evaluation_windows(tokens, context, count=EVAL_WINDOWS):
    """(at most count, context + 1) int64 windows, evenly spread over the file; always the same ones."""
    count = min(count, (len(tokens) - 1) // context)
    offsets = [i * (len(tokens) - context - 1) // max(1, count - 1) for i in range(count)]
    return torch.from_numpy(np.stack([tokens[o:o + context + 1] for o in offsets]).astype(np.int64))


# ---- conversations ----

@dataclasses.dataclass
class Example:
    """One conversation, ready to train on: `tokens`, of which tokens[first:] are the answer."""

    tokens: list
    first: int

    @property
    def count(self):
        """Positions whose next token is the answer's: from the last prompt token to the last but one."""
        return len(self.tokens) - self.first


def read_examples(path, tok, context):
    """Records of `distill.py generate` -> Examples of at most `context` tokens.

    The target's answers are used as they were sampled (response_ids: their text encoded again may differ). The
    end-of-turn token follows only where the answer ended by itself: after an answer that was cut off at the length
    limit the target would have gone on, and the drafter must not learn to stop there. Records with a text alone, such
    as a chat corpus, are encoded here and end.
    """
    examples, cut = [], 0
    for number, record in enumerate(files.read_jsonl(path), 1):
        ids, ended, messages = record.get("response_ids"), record.get("ended", True), record.get("messages")
        if ids is None and isinstance(record.get("response"), str):
            ids = tok.encode(record["response"])
        if not isinstance(ids, list) or not isinstance(ended, bool) or not isinstance(messages, list):
            raise ValueError(f"{path}, record {number}: needs messages and response_ids (with ended) or response, as distill.py "
                             f"generate writes them")
        if any(not isinstance(i, int) or not 0 <= i < tok.vocab_size for i in ids):
            raise ValueError(f"{path}, record {number}: response_ids hold what is no token of {tok.folder}: another tokenizer's records?")
        prompt = tok.chat_prompt(messages) if messages else [tok.document_id]
        tokens = prompt + ids + ([tok.eos_id] if ended else [])
        cut += len(tokens) > context
        if len(prompt) < min(len(tokens), context):
            examples.append(Example(tokens[:context], len(prompt)))
    if not examples:
        raise ValueError(f"{path}: no record with an answer that fits into --context {context}")
    print(f"{path}: {len(examples)} records, {sum(e.count for e in examples):,} answer positions" + (f", {cut} cut at {context} tokens" if cut else ""))
    return examples


def collate(batch, device):
    """Examples -> tokens (B, T), padded on the right (causal attention never looks there), and where (B, T), True at
    the positions whose next token is the answer's."""
    width = math.ceil(max(len(e.tokens) for e in batch) / 64) * 64       # few different widths: freed memory fits the next batch
    tokens = torch.tensor([e.tokens + [0] * (width - len(e.tokens)) for e in batch], device=device)
    column = torch.arange(width, device=device)
    first, end = (torch.tensor(x, device=device)[:, None] - 1 for x in zip(*((e.first, len(e.tokens)) for e in batch)))
    return tokens, (column >= first) & (column < end)


def batch_at(examples, batch_size, seed, number):
    """The number-th batch of examples, counted over epochs, each epoch in an order of its own. It follows from seed and
    number alone, so that a resumed run sees what an unbroken one would have seen. Batches hold examples of like
    length: little padding, and still random."""
    epoch, index = divmod(number, math.ceil(len(examples) / batch_size))
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(examples), generator=generator).tolist()
    batches = []
    for at in range(0, len(order), 16 * batch_size):
        window = sorted(order[at:at + 16 * batch_size], key=lambda i: len(examples[i].tokens))
        batches += [window[i:i + batch_size] for i in range(0, len(window), batch_size)]
    return [examples[i] for i in batches[torch.randperm(len(batches), generator=generator)[index]]]


def hold_out(examples, count):
    """(training, held out): about `count` examples spread over the file, so that every kind of record has its share."""
    if len(examples) <= count:
        raise ValueError(f"{len(examples)} usable records; more than the {count} held out for evaluation are needed")
    every = math.ceil(len(examples) / count)
    return [e for i, e in enumerate(examples) if i % every], examples[::every]


# ---- the loss, without ever holding all logits ----

def states_and_answers(model, tokens, where):
    """Hidden states (N, D) and the token that follows each (N,), at the positions that count: all, or where (B, T)."""
    hidden, wanted = model.hidden(tokens[:, :-1]), tokens[:, 1:]
    if where is None:
        return hidden.flatten(0, 1), wanted.flatten()
    return hidden[where[:, :-1]], wanted[where[:, :-1]]


def next_token_loss_backward(model, tokens, where=None, scale=1.0, chunk=CHUNK):
    """Add the gradient of scale * loss to the parameters' .grad; return the loss, a detached scalar tensor.

    tokens: (B, T + 1) int64. The loss is the mean cross-entropy in nats of tokens[:, 1:] given what stands before;
    with `where` (B, T + 1) only of those that follow a True.

    Logits are (B, T, V): with SmolLM2's V = 49,152, 8 x 256 positions take 400 MB, and as much again for their
    softmax and for their gradient. But the head treats every position by itself, so the chain rule may be cut at
    the hidden states: run the head's forward and backward for a chunk of positions, keep d loss / d hidden,
    let the logits go, and at the end send the whole gradient back through the layers once. The same sums as in one
    piece, so the same gradient; only the order of additions differs.
    """
    hidden, wanted = states_and_answers(model, tokens, where)
    total, gradients = 0.0, []
    for rows, answers in zip(hidden.detach().split(chunk), wanted.split(chunk)):
        rows = rows.detach().requires_grad_()  # a leaf: backward stops here
        loss = F.cross_entropy(model.whole_head(rows).float(), answers, reduction="sum") / len(wanted)
        (scale * loss).backward()
        gradients.append(rows.grad)
        total = total + loss.detach()
    hidden.backward(torch.cat(gradients))
    return total


@torch.no_grad()
def evaluate(model, batches):
    """Mean next-token loss in nats, a float, over (tokens, where) batches, small ones: all logits of one live at once."""
    total, count = 0.0, 0
    for tokens, where in batches:
        hidden, wanted = states_and_answers(model, tokens, where)
        total += F.cross_entropy(model.whole_head(hidden).float(), wanted, reduction="sum").item()
        count += len(wanted)
    return total / count


# ---- optimiser and schedule ----

def make_optimiser(model, learning_rate, weight_decay=0.1, beta2=0.95):
    """AdamW (Loshchilov and Hutter, 2019, arXiv 1711.05101) that decays matrices and leaves norms alone.

    Decay pulls weights towards zero. For a matrix that is a mild preference for small functions; for the scale of
    a norm, a vector around 1, zero is no meaningful place to be pulled to.
    beta2 0.95 rather than 0.999: the second moment then forgets in 20 steps, which a short run needs.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
              {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, beta2), fused=True)


def learning_rate_at(step, steps, peak, floor, warm_up):
    """Linear warm-up to peak over the first warm_up steps, then half a cosine down to floor at `steps` and after.

    Warm-up: Adam's second moment rests on few gradients at first, so its early steps are too bold.
    """
    if step < warm_up:
        return peak * (step + 1) / warm_up
    progress = min(1.0, (step - warm_up) / max(1, steps - warm_up))
    return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2


# ---- where a model starts ----

def leading_directions(embedding, width):
    """embedding (V, D) -> (V, width), the numbers that tell most about its rows, and the share of energy they keep.

    With E = U S V^T, the best approximation of rank k is U_k S_k V_k^T (Eckart and Young, 1936). Its rows lie in a
    space of k dimensions, where V_k gives their coordinates: U_k S_k = E V_k. So tokens that the target takes for
    alike are alike from the drafter's first step. V_k are the eigenvectors of E^T E (D, D): E itself stays whole.
    """
    if width > embedding.shape[1]:
        raise ValueError(f"--embed-from has an embedding of width {embedding.shape[1]}, this model one of {width}: "
                         f"a wider model cannot start from it, leave --embed-from out")
    E = embedding.double()
    energy, directions = torch.linalg.eigh(E.T @ E)  # ascending
    return (E @ directions[:, -width:]).float(), (energy[-width:].sum() / energy.sum()).item()


def reach(folder):
    """The context in tokens that the tokenizer's folder states; 2048 where it states none."""
    path = Path(folder) / "tokenizer_config.json"
    stated = json.loads(path.read_text(encoding="utf-8")).get("model_max_length") if path.is_file() else None
    return int(stated) if stated and stated < 10 ** 6 else 2048  # transformers writes 10^30 for "unknown"


def build(args, tokenizer):
    """The model to train: a preset with the tokenizer's vocabulary, or the model in the folder of --init."""
    if given := args.init or args.embed_from:
        source = load_model(given)
        if source.config.vocab_size != tokenizer.vocab_size:
            raise ValueError(f"{given} has a vocabulary of {source.config.vocab_size}, --tokenizer {args.tokenizer} one of "
                             f"{tokenizer.vocab_size}: a model can only start from one of the same tokenizer")
        if args.init:
            return source
    eos = list(tokenizer.eos_ids)
    model = Llama(Config(vocab_size=tokenizer.vocab_size, bos_token_id=tokenizer.bos_id, pad_token_id=tokenizer.pad_id,
                         eos_token_id=eos if len(eos) > 1 else tokenizer.eos_id,
                         max_position_embeddings=max(args.context, reach(tokenizer.folder)), **PRESETS[args.model]))
    if args.embed_from:
        rows, share = leading_directions(source.embed_tokens.weight.detach(), model.config.hidden_size)
        print(f"embedding started from {given}: {rows.shape[1]} directions keep {share:.1%} of its energy")
        # The geometry is the target's, the size this model's own: with large rows a tied head starts out sure that
        # the token just read comes again.
        model.embed_tokens.weight.data.copy_(rows * (model.embed_tokens.weight.std() / rows.std()))
    return model


# ---- checkpoints ----

def copy_tokenizer(source, folder):
    """Copy the tokenizer's files from one model folder into another, which then opens in transformers by itself."""
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                 "added_tokens.json", "chat_template.jinja", "vocab.json", "merges.txt", "generation_config.json"):
        if (Path(source) / name).is_file() and Path(source).resolve() != Path(folder).resolve():
            with files.atomic(Path(folder) / name) as temporary:
                shutil.copyfile(Path(source) / name, temporary)


def save_checkpoint(folder, model, state):
    """Write training.pt, then the model folder.

    training.pt holds the weights too, although model.safetensors has them: then one rename replaces the whole state
    at once, and no kill can leave the optimiser of one step beside the weights of another.
    """
    with files.atomic(folder / "training.pt") as temporary:
        torch.save({"weights": model.state_dict(), **state}, temporary)
    save_model(model, folder)


def read_checkpoint(folder, settings):
    """What save_checkpoint wrote. ValueError if it is damaged, or if its settings were not these."""
    path = folder / "training.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # data only: a pickle could run programs
        made_with = state["settings"]
    except Exception as error:  # torch raises any of five kinds for a damaged file
        raise ValueError(f"{path}: not a readable checkpoint ({str(error).splitlines()[0]}); "
                         f"move {folder} away and start again") from None
    differing = [f"{name} was {made_with.get(name)}, now {settings.get(name)}" for name in sorted({*made_with, *settings})
                 if made_with.get(name) != settings.get(name)]
    if differing:
        raise ValueError(f"{path} was made with other settings ({'; '.join(differing)}): --resume needs the same ones; "
                         f"or give another --out to start a new run")
    return state


def keep_log_until(path, step):
    """Cut log.jsonl back to the lines before `step`: what a killed run did after its checkpoint is done again."""
    files.trim_partial_line(path)
    rows = files.read_jsonl(path) if path.is_file() else []
    files.write_jsonl(path, [row for row in rows if row["step"] < step])


def require_finite(loss, step, out):
    """ValueError if training has left the numbers: checked before each step and each save, so what is saved is sound."""
    if not math.isfinite(loss):
        kept = f"{out} keeps the last good checkpoint" if (out / "training.pt").is_file() else "nothing was saved yet"
        raise ValueError(f"the loss is {loss} at step {step}: training went out of bounds; {kept}; start again in another "
                         f"--out with a lower --learning-rate, a longer --warm-up or --clip 1")


# ---- the loop ----

def parse(argv):
    parser = argparse.ArgumentParser(
        description="Pretrain a model by next-token prediction on token files, or tune it on conversations.",
        epilog="The defaults see 2 M tokens: about 35 minutes on two free cores (1,000 tokens/s), 1 GB of memory.")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--model", choices=PRESETS, default="small-drafter", help="shape (default small-drafter)")
    start.add_argument("--init", metavar="DIR", help="go on from the weights of this model folder, in its shape")
    parser.add_argument("--embed-from", metavar="DIR",
                        help="start the embedding from that of this model (the target), reduced to this width by SVD")
    parser.add_argument("--chat", metavar="FILE", help="tune on the answers of these conversations (JSON lines of messages and "
                        "response) instead of on --data")
    for name, default, text in [
            ("--data", "out/pretrain", "folder with train.bin, eval.bin and meta.json"),
            ("--tokenizer", "models/smollm2-135m-instruct", "folder with the tokenizer, usually the target's"),
            ("--out", "out/drafter-base", "model folder to write"),
            ("--steps", 1000, "optimiser steps"),
            ("--batch-size", 8, "windows, or conversations, in one pass"),
            ("--context", 256, "tokens in one window, or of one conversation at most"),
            ("--accumulate", 1, "passes whose gradients make one step"),
            ("--learning-rate", 1e-3, "its peak"),
            ("--weight-decay", 0.1, "AdamW's, on matrices"),
            ("--beta2", 0.95, "AdamW's"),
            ("--clip", 1.0, "largest global norm of the gradient, 0 for no limit"),
            ("--eval-every", 100, "steps between evaluations"),
            ("--save-every", 100, "steps between checkpoints")]:
        parser.add_argument(name, type=type(default), default=default, help=f"{text} (default {default})")
    parser.add_argument("--warm-up", type=int, help="steps of rising learning rate (default: a twentieth of --steps)")
    parser.add_argument("--min-learning-rate", type=float, help="where the cosine ends (default: a tenth of the peak)")
    parser.add_argument("--resume", action="store_true", help="go on exactly from the checkpoint in --out")
    files.machine_flags(parser)
    args = parser.parse_args(argv)
    for name in ("steps", "batch_size", "context", "accumulate", "learning_rate", "eval_every", "save_every"):
        if not getattr(args, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; expected a number above 0")
    if args.dtype == "float16":
        raise ValueError("--dtype float16 loses small gradients without loss scaling; train in float32 or bfloat16")
    if args.init and args.embed_from:
        raise ValueError("--init brings its own embedding; leave --embed-from out")
    args.warm_up = args.steps // 20 if args.warm_up is None else args.warm_up
    args.min_learning_rate = args.learning_rate / 10 if args.min_learning_rate is None else args.min_learning_rate
    return args


def main(argv=None):
    args = parse(argv)
    out = Path(args.out)
    if not args.resume and any((out / name).is_file() for name in ("training.pt", "model.safetensors", "config.json")):
        raise ValueError(f"--out {out} already holds a model: add --resume to go on with it, or give another folder")
    device, dtype = files.set_up(args)

    tokenizer = tokenizers.load(args.tokenizer)
    if args.chat:
        train, held_out = hold_out(read_examples(args.chat, tokenizer, args.context), EVAL_WINDOWS)
        evaluation = [collate(held_out[i:i + 8], device) for i in range(0, len(held_out), 8)]
        size, checksum = sum(e.count for e in train), zlib.crc32(json.dumps([e.tokens for e in train]).encode())
    else:
        train, held_out = read_data(args.data, tokenizer, args.context)
        evaluation = [(window[None].to(device), None) for window in evaluation_windows(held_out, args.context)]
        size, checksum = len(train), zlib.crc32(train)
    model = build(args, tokenizer).to(device)
    optimiser = make_optimiser(model, args.learning_rate, args.weight_decay, args.beta2)
    generator = torch.Generator().manual_seed(args.seed)  # all the randomness there is from here on

    # All that decides the result must be the same on --resume; where files lie and how often to look decides nothing.
    settings = {name: value for name, value in vars(args).items() if name not in (
        "data", "chat", "tokenizer", "out", "resume", "eval_every", "save_every", "device", "threads")}
    settings |= {**dataclasses.asdict(model.config), "tokenizer": tokenizer.fingerprint,
                 "train.bin": f"{size} tokens, checksum {checksum:08x}"}
    step, seconds, seen = 0, 0.0, 0
    if args.resume and (out / "training.pt").is_file():
        state = read_checkpoint(out, settings)
        model.load_state_dict(state["weights"])
        optimiser.load_state_dict(state["optimiser"])
        generator.set_state(state["generator"])
        step, seconds, seen = state["step"], state["seconds"], state["seen"]
        print(f"resuming {out} at step {step}")
    elif args.resume:
        print(f"{out / 'training.pt'}: no such file, nothing to resume: starting at step 0")
    copy_tokenizer(args.tokenizer, out)
    keep_log_until(out / "log.jsonl", step)

    each = args.batch_size * args.accumulate * (size / len(train) if args.chat else args.context)
    print(f"{args.init or args.model}: {model.parameter_count() / 1e6:.2f} M parameters; {size:,} training tokens, "
          f"{args.steps} steps of {each:,.0f}: {args.steps * each / size:.2f} times over them")
    began, printed, begin_step, begin_seen = time.monotonic() - seconds, 0.0, step, seen
    loss = eval_loss = math.nan
    with open(out / "log.jsonl", "a", encoding="utf-8") as log:
        while True:
            # `step` updates are done; the losses logged under it are those of the weights after them.
            learning_rate = learning_rate_at(step, args.steps, args.learning_rate, args.min_learning_rate, args.warm_up)
            for group in optimiser.param_groups:
                group["lr"] = learning_rate
            row = {"step": step, "loss": None, "lr": learning_rate, "tokens": seen}

            due = step == args.steps or step % args.save_every == 0
            if due or step % args.eval_every == 0:
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    row["eval_loss"] = eval_loss = evaluate(model, evaluation)
                require_finite(eval_loss, step, out)
            if due and step > 0:
                save_checkpoint(out, model, {"optimiser": optimiser.state_dict(), "generator": generator.get_state(),
                                             "step": step, "seen": seen, "seconds": time.monotonic() - began,
                                             "settings": settings})

            if step < args.steps:
                loss = 0.0
                for number in range(step * args.accumulate, (step + 1) * args.accumulate):
                    if args.chat:
                        tokens, where = collate(batch_at(train, args.batch_size, args.seed, number), device)
                    else:
                        tokens, where = sample_batch(train, args.batch_size, args.context, generator).to(device), None
                    seen += tokens[:, 1:].numel() if where is None else int(where.sum())
                    # bfloat16 for the products, while weights, gradients and Adam's moments stay fp32: an update is
                    # often smaller than the last bit of a bfloat16 weight and would be rounded away.
                    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                        loss += next_token_loss_backward(model, tokens, where, 1 / args.accumulate).item() / args.accumulate
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip or math.inf)
                require_finite(loss + norm.item(), step, out)
                optimiser.step()
                optimiser.zero_grad()
                row["loss"] = loss

            row["seconds"] = round(time.monotonic() - began, 3)
            log.write(json.dumps(row) + "\n")
            log.flush()
            if "eval_loss" in row or time.monotonic() - printed > 10:
                printed = time.monotonic()
                done, took = step - begin_step, row["seconds"] - seconds
                rate = (f"{(seen - begin_seen) / took:,.0f} tokens/s  "
                        f"{files.duration((args.steps - step) * took / done)} left") if done else ""
                print(f"step {step}/{args.steps}  loss {loss:.4f}  eval {eval_loss:.4f}  "
                      f"lr {learning_rate:.2e}  {rate}", flush=True)
            if step == args.steps:
                break
            step += 1

    print(f"wrote {out}: evaluation loss {eval_loss:.4f} nats a token (perplexity {math.exp(eval_loss):.1f})")
    print(f"next: python distill.py generate --target {out} --prompts FILE --out out/records.jsonl" if args.chat else
          f"next: python distill.py generate --target {args.tokenizer} --self-instruct 1000 --out out/records.jsonl")


if __name__ == "__main__":
    files.run(main)
