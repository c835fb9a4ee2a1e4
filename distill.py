r"""Stages 2 and 3: let the target write the distillation data, then align the drafter with it.

    python distill.py generate --target models/smollm2-135m-instruct --self-instruct 1000 \
                               --out out/records.jsonl
    python distill.py finetune --target models/smollm2-135m-instruct --draft out/drafter-base \
                               --data out/records.jsonl --loss tvd++ --pretrain-data out/pretrain \
                               --out out/drafter

Stage 1 (train.py) pretrained the drafter. Stage 3 stands first here, because it is the method.

Why the target writes its own data: the drafter must predict what *this* model says after chat
tuning, and the data it was tuned on is rarely public. Its own answers cost only time, and they are
the kind of text that the drafter will have to guess (Goel et al., 2024, arXiv 2403.00858).

p is the target's distribution of the next token, q the drafter's. Shapes: B rows of T tokens, N
answer positions among them (n in a chunk), V tokens in the vocabulary (K of them chosen), D a
model's width. alpha = sum min(p, q) is the acceptance rate, tau the number of new tokens per pass
of the target when decoding speculatively.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import glob
import itertools
import json
import os
import re
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import losses
import model
import speculate
import train
from data import files, pretrain_text, report, tokenizer

# ---- Stage 3: the distillation loss ------------------------------------------------------------

def distillation_loss(draft, target, tokens, answer, loss):
    """The method: at each position of the target's answer, how far is q from p? A scalar.

    tokens (B, T) int64; answer (B, T) bool, True where the next token is the answer's; loss a
    function of losses.LOSSES. Prompts are read, not learnt: nobody guesses them. This is the plain
    form; training takes the next function, and a test holds the two equal.
    """
    draft_logits = draft(tokens)[answer]                                                 # (N, V)
    with torch.no_grad():
        target_logits = target(tokens)[answer]                                           # (N, V)
    return loss(draft_logits, target_logits).mean()


def distillation_backward(draft, target, states, batch, loss, scale=1.0, chunk=256, generator=None):
    """Add the gradient of scale * distillation_loss to the drafter; returns (loss, alpha).

    The same numbers, but with logits for `chunk` positions at a time (train.backward_in_chunks),
    and with the target's hidden states from `states`. alpha: the mean of sum min(p, q), the
    acceptance rate before this step.

    With a draft vocabulary both distributions are taken over its tokens, those of the batch's texts
    (the loop adds its prompt's: see Llama.head), and a sample of others, an eighth as many as it
    has, drawn anew at each step (so this alpha is a little too high). Of all tokens outside the
    list the rows of the head do not change (see align); but the hidden states learn to keep their
    logits low. Without this, a token that was never trained could win in other programs, which use
    the whole head.
    """
    tokens, answer = train.collate(batch, draft.embed_tokens.weight.device)
    mine = train.own(len(batch))            # all rows, unless several processes share the batch
    first, count = int(answer[:mine.start].sum()), int(answer.sum())
    # The last hidden states of both models at the answers' positions, (N, D).
    hidden, target_states = draft.hidden(tokens[mine])[answer[mine]], states.read(batch[mine])
    ids = draft.draft_vocabulary
    if ids is not None:
        others = draft.outside_list()
        some = torch.randperm(len(others), generator=generator)[:len(ids) // 8]
        ids = torch.cat([ids, tokens.flatten(), others[some].to(ids.device)]).unique()
    head, target_head = draft.head_weight(ids), target.head_weight(ids)                  # (K, D)

    def logits(rows):
        return F.linear(hidden[rows], head), F.linear(target_states[rows], target_head)

    # What a loss must know of all positions before it is given some; tvd++ needs the mean reward.
    options = losses.step_options(loss, len(hidden), chunk, logits, first, count, train.mean)
    alphas = []

    def loss_at(draft_logits, rows):
        target_logits = F.linear(target_states[rows], target_head)                       # (n, K)
        alphas.append(losses.overlap(draft_logits.detach(), target_logits))
        value = loss(draft_logits, target_logits, **options[rows.start // chunk])
        if value.shape != (len(draft_logits),):
            raise ValueError(f"the loss has shape {tuple(value.shape)} for {len(draft_logits)} "
                             f"positions: it must be one number for each")
        return scale * value.sum() / count

    total = train.backward_in_chunks(hidden, head, chunk, loss_at)
    return total.item() / scale, (torch.cat(alphas).sum() / count).item()


@torch.no_grad()
def acceptance(draft, target, states, examples):
    """The acceptance rate to expect, E[sum min(p, q)], over the answers' positions; temperature 1,
    no top-p. A draft vocabulary is widened by the prompt's tokens, as in the loop."""
    found = []
    for e in examples:
        tokens, answer = train.collate([e], draft.embed_tokens.weight.device)
        hidden, words = draft.hidden(tokens)[answer].split(256), tokens[0, :e.first]
        for some, state in zip(hidden, states.read([e]).split(256)):
            found.append(losses.overlap(draft.head(some, words), target.head(state)))
    return torch.cat(found).mean().item()


# ---- Stage 3: the loop -------------------------------------------------------------------------

def align(draft, target, states, training, held_out, pretraining, tok, args):
    """Train the drafter on the target's distributions at the positions of the target's answers,
    from the checkpoint in args.out if --resume says so; returns the held-out acceptance rate."""
    device, generator = draft.embed_tokens.weight.device, torch.Generator().manual_seed(args.seed)
    loss = losses.choose(args.loss, args.samples, args.baseline, generator)
    if args.draft_vocabulary:
        draft.draft_vocabulary = draft_vocabulary(training, args.draft_vocabulary, tok).to(device)
    settings = deciding(args, training, held_out)
    # losses.choose gives the sampled losses as functools.partial. A running mean as their baseline
    # has a state, which is a part of the checkpoint.
    baseline = getattr(loss, "keywords", {}).get("baseline")
    memory = vars(baseline) if isinstance(baseline, losses.RunningMean) else {}
    autocast = torch.autocast(device.type, states.dtype, enabled=states.dtype != torch.float32)
    run = train.Run(args, draft, tok, settings, "positions", "held_out_alpha",
                    lambda: acceptance(draft, target, states, held_out), generator, memory)
    # The loss is (1 - share) * distillation + share * plain text, and rows are in the same ratio.
    # The paper mixes 9 : 1. With the default batch of 9 that is one window of text per step.
    share = args.pretrain_fraction if pretraining is not None else 0.0
    windows = max(1, round(args.batch_size * share / (1 - share))) if share else 0
    # The head's rows of tokens outside the draft vocabulary stay as they are (if head and embedding
    # are one matrix, these tokens' embeddings stay, too): they come too seldom to be learnt.
    # But Adam divides a gradient by its usual size, so even a small and rare one makes a full step,
    # and weight decay shrinks a row without any gradient: hence the rows are written back.
    fixed = draft.outside_list().to(device)
    kept = draft.head_weight().detach()[fixed]        # a copy

    for step in run.steps():
        batch, more = train.batch_at(training, args.batch_size, args.seed, step), {}
        with autocast:
            value, alpha = distillation_backward(draft, target, states, batch, loss, 1 - share,
                                                 args.chunk, generator)
            if windows:
                text = pretrain_text.sample(pretraining, windows, args.pretrain_context, generator)
                text_loss = train.next_token_loss_backward(draft, text.to(device), scale=share)
                more["pretrain_loss"] = text_loss.item()
        draft.head_weight().grad[fixed] = 0           # else it would count in the clipping
        run.update(value, sum(e.count for e in batch), alpha=alpha, **more)
        draft.head_weight().data[fixed] = kept
    return run.value


def deciding(args, training, held_out):
    """All that a fine-tuning's result depends on, as a dict. If it is not the same, --resume
    refuses to go on, and compare trains again. (--threads and --device only change rounding.)"""
    names = (*train.DECIDING, "target", "draft", "layers", "loss", "samples", "baseline", "chunk",
             "draft_vocabulary", "pretrain_data", "pretrain_fraction", "pretrain_context")
    return files.settings(args, *names) | {
        "data": train.fingerprint(training, held_out),
        "loss's file": files.fingerprint(losses.file_of(args.loss))}


def load_pair(args):
    """(tok, target, draft) of --target and --draft. The target's weights are in --dtype, for it
    only answers; those of the drafter, which is trained, are in fp32."""
    device, dtype = files.set_up(args)
    tok = tokenizer.load_pair(args.target, args.draft)
    # What is to be divided is read into the CPU's memory: it need not fit into one GPU's.
    divided = args.shard_target and files.world() > 1
    target = model.load(args.target, "cpu" if divided else device, dtype, tok.vocab_size)
    target = train.shard(target.requires_grad_(False)) if divided else target.requires_grad_(False)
    draft = model.load(args.draft, device, vocab_size=tok.vocab_size)
    return tok, target, draft.keep_layers(args.layers) if args.layers else draft


def read_training(args, tok):
    """(training, held out, pretraining tokens or None) of --data and --pretrain-data."""
    training, held_out = train.hold_out(train.read_examples(args.data, tok, args.context),
                                        args.eval_records)
    if args.pretrain_fraction and args.pretrain_data:
        text, _ = pretrain_text.read(args.pretrain_data, tok, args.pretrain_context)
        return training, held_out, text
    if args.pretrain_fraction:
        print("no --pretrain-data: training on the target's answers alone")
    return training, held_out, None


def finetune(args):
    """Read the pair and the records, and align the drafter."""
    train.fill_in(args)
    losses.choose(args.loss, args.samples, args.baseline)
    tok, target, draft = load_pair(args)
    training, held_out, pretraining = read_training(args, tok)
    states = TargetStates(target, args.target, getattr(torch, args.dtype))
    print(f"drafter of {draft.parameter_count() / 1e6:.2f} M parameters; {len(training)} records, "
          f"{len(held_out)} held out; {args.steps * args.batch_size / len(training):.1f} epochs")
    alpha = align(draft, target, states, training, held_out, pretraining, tok, args)
    print(f"wrote {args.out}: held-out acceptance rate {alpha:.4f} at temperature 1 (implied tau: "
          f"gamma 3 {losses.implied_tau(alpha, 3):.2f}, if guesses were kept independently)")
    print(f"next: python speculate.py --target {args.target} --draft {args.out} "
          f"--bench data/prompts/dev.jsonl --gamma 3")


# ---- Stage 3: the draft vocabulary, and the target's states on disk ----------------------------

def draft_vocabulary(examples, size, tok):
    """(K,) ids that the drafter may propose, beside its prompt's: always the end tokens and every
    byte, so that no text is impossible, then those that the target's answers use most, `size` in
    all."""
    counts = np.zeros(tok.vocab_size, dtype=np.int64)
    for e in examples:
        np.add.at(counts, e.tokens[e.first:], 1)
    always = list({*tok.eos_ids, *tok.byte_ids})
    counts[always] += counts.max() + 1
    return torch.from_numpy(np.argsort(-counts, kind="stable")[:max(size, len(always))].copy())


class TargetStates:
    """The target's last hidden states at the answers' positions, computed when first asked for.

    p = softmax(head(state)), so a state of 576 half-precision numbers stands for a distribution
    over 49,152: after the first pass over the data the target costs only its head. Kept in the
    cache folder, one file per record, named after the record's tokens, in a folder named after all
    else that decides them: the content of the target's folder, and the dtype.
    """

    def __init__(self, target, folder, dtype):
        self.target, self.dtype = target, dtype
        # With the dtype: bfloat16 leaves its rounding in them.
        self.folder = files.cache_dir("target-states", files.fingerprint(Path(folder), str(dtype)))
        files.remove_leftovers(self.folder)

    def path(self, example):
        return self.folder / f"{files.fingerprint(dataclasses.astuple(example))}.npy"

    def add(self, examples, states):
        """Keep the states (N, D) at the positions of these examples."""
        for e, part in zip(examples, states.half().cpu().split([e.count for e in examples])):
            with files.atomic(self.path(e)) as temporary, open(temporary, "wb") as file:
                np.save(file, part.numpy())

    def read(self, batch):
        """States (N, D) at the answer positions of these examples, in their order."""
        weight, paths = self.target.embed_tokens.weight, [self.path(e) for e in batch]
        missing = [e for e, path in zip(batch, paths) if not path.is_file()]
        # If any process misses one all call the target: a divided one works only together.
        if train.add_up([torch.zeros(1)], len(missing))[0]:
            tokens, answer = train.collate(missing, weight.device)
            with torch.no_grad():
                self.add(missing, self.target.hidden(tokens)[answer])
        none = np.empty((0, weight.shape[1]), np.float16)             # for an empty batch
        states = np.concatenate([none, *map(np.load, paths)])
        return torch.from_numpy(states).to(weight.device, weight.dtype)


# ---- Stage 2: the target writes ----------------------------------------------------------------

@torch.inference_mode()
def generate_batch(target, prompts, temperatures, top_p, max_new_tokens, stop_ids, generator):
    """Sample one answer to each prompt, all together; yields (the prompt's number, response_ids,
    ended, states) as answers end.

    prompts: lists of ids. temperatures: one each. ended: whether a stop token came (it is not
    in response_ids) before max_new_tokens. states (N, D), half precision: the last hidden states
    that the answer's tokens, and the stop token, were drawn from.
    """
    answers = [[] for _ in prompts]
    rows = list(range(len(prompts)))              # each row's prompt; None: it has ended
    cache, hidden = read_prompts(target, prompts, max_new_tokens)
    states = torch.empty(len(prompts), max_new_tokens, target.config.hidden_size,
                         dtype=torch.float16, device=hidden.device)
    temperatures = torch.tensor([float(t) for t in temperatures], device=hidden.device)
    for step in range(max_new_tokens):
        states[:, step] = hidden
        p, ids = model.nucleus(model.tempered(target.head(hidden), temperatures), top_p)
        tokens = ids.gather(1, model.sample(p, generator)[:, None])                       # (B, 1)
        for i, token in enumerate(model.fetch(tokens[:, 0], p.sum(-1))[0]):
            if rows[i] is None:
                continue
            ended = token in stop_ids
            if not ended:
                answers[rows[i]].append(token)
            if ended or step == max_new_tokens - 1:
                yield rows[i], answers[rows[i]], ended, states[i, :step + 1]
                rows[i] = None
        # Rows that have ended leave, an eighth or more at a time: each time the cache is copied.
        if rows.count(None) >= len(rows) / 8:
            going_on = [i for i, row in enumerate(rows) if row is not None]
            if not going_on:
                return
            rows, keep = [rows[i] for i in going_on], torch.tensor(going_on, device=p.device)
            tokens, temperatures, states = tokens[keep], temperatures[keep], states[keep]
            cache.keep(keep)
        hidden = target.hidden(tokens, cache)[:, -1]


def read_prompts(target, prompts, room, padded=False):
    """The prompts' cache, with room for `room` tokens more, and the last hidden states (B, D).

    Its rows are padded on the left, so that all of them write their next token into the same
    column. But the prompts are read one by one: no padding is computed, and what a prompt shares
    with the one before it, such as the system's turn, is not read again. (1.6 times the rate of
    one padded pass, for answers of 64 tokens to prompts of 40 to 119.) A GPU, for which a pass over
    one prompt is much too small, reads them in one padded pass.
    """
    device, dtype = target.norm.weight.device, target.norm.weight.dtype
    width, hidden = max(map(len, prompts)), []
    starts = [width - len(prompt) for prompt in prompts]
    cache = model.KVCache(target.config, len(prompts), width + room, device, dtype)
    cache.start = torch.tensor(starts, device=device) if any(starts) else None
    if padded or device.type == "cuda":
        rows = [[0] * start + prompt for start, prompt in zip(starts, prompts)]
        return cache, target.hidden(torch.tensor(rows, device=device), cache)[:, -1]
    cache.length, one = width, model.KVCache(target.config, 1, width, device, dtype)
    for row, (prompt, before) in enumerate(zip(prompts, [[], *prompts])):
        one.length = min(len(os.path.commonprefix([prompt, before])), len(prompt) - 1)
        hidden += target.hidden(torch.tensor([prompt[one.length:]], device=device), one)[:, -1]
        cache.put(row, one)
    return cache, torch.stack(hidden)


def answer_prompts(target, prompts, temperatures, top_p, max_new_tokens, stop_ids, generator,
                   batch_size):
    """generate_batch for any number of prompts, `batch_size` of similar length at a time; the row
    is the prompt's number."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for at in range(0, len(order), batch_size):
        batch = order[at:at + batch_size]
        made = generate_batch(target, [prompts[i] for i in batch], [temperatures[i] for i in batch],
                              top_p, max_new_tokens, stop_ids, generator)
        for row, *answer in made:
            yield batch[row], *answer


def write_records(target, tok, prompts, out, seed, temperatures=(0, 0.3, 0.7, 1.0), per_prompt=1,
                  top_p=0.95, max_new_tokens=256, batch_size=64, stop_ids=(), states=None):
    """Append a record, one line, to `out` for each answer that it lacks. The temperatures are taken
    in turn. states: a TargetStates, which keeps what the answers were drawn from."""
    items, limit = [], target.config.max_position_embeddings
    for number, prompt in enumerate(prompts):
        ids = tok.chat_prompt(prompt["messages"]) if prompt["messages"] else [tok.document_id]
        if len(ids) + max_new_tokens > limit:
            raise ValueError(f"prompt {number + 1}, {len(ids)} tokens and {max_new_tokens} new, "
                             f"exceeds the model's context of {limit}: lower --max-new-tokens")
        for k in range(per_prompt):
            temperature = temperatures[len(items) % len(temperatures)]
            items.append((ids, {"id": f"{number:05d}.{k}", **prompt, "temperature": temperature}))
    merge_parts(out)
    done = {row.get("id"): row for row in files.read_jsonl(out)} if out.is_file() else {}
    for key, item in ((key, item) for _, item in items for key in item):
        if done.get(item["id"], item).get(key) != item[key]:
            raise ValueError(f"{out}: record {item['id']} answers another prompt than today's (its "
                             f"{key} differs); choose another --out")
    missing = [item for item in items if item[1]["id"] not in done]
    print(f"{len(items)} answers wanted, {len(items) - len(missing)} already in {out}")
    missing, seed = missing[files.rank()::files.world()], seed + len(done) + 10**6 * files.rank()
    generator = torch.Generator(target.embed_tokens.weight.device).manual_seed(seed)
    progress, count, written = files.Progress(len(missing), "records"), 0, 0
    part = out.with_name(f"{out.name}.part{files.rank()}") if files.world() > 1 else out
    made = answer_prompts(target, [ids for ids, _ in missing],
                          [item["temperature"] for _, item in missing], top_p, max_new_tokens,
                          {*tok.eos_ids, *stop_ids}, generator, batch_size)
    with open(part, "a", encoding="utf-8") as file:
        for number, ids, ended, hidden in made:
            prompt_ids, item = missing[number]
            if states:
                tokens = prompt_ids + ids + [tok.eos_id] * ended
                states.add([train.Example(tokens, len(prompt_ids))], hidden)
            record = item | {"response": tok.decode(ids), "response_ids": ids, "ended": ended}
            # Flushed: a kill loses only unfinished answers.
            print(json.dumps(record, ensure_ascii=False), file=file, flush=True)
            count, written = count + 1, written + len(ids)
            progress.update(count, f"{written / (time.monotonic() - progress.begin):.0f} tokens/s")
    count, written = train.add_up([torch.zeros(1).double()], count, written)   # once all have ended
    merge_parts(out)
    print(f"{out}: {count:.0f} new records, {written:.0f} tokens")


def parts_of(out):
    """The files beside `out` that processes have written, and nobody has merged yet."""
    return sorted(out.parent.glob(f"{glob.escape(out.name)}.part[0-9]*"))


def merge_parts(out):
    """Put their records into `out`, each once; all processes wait for it."""
    if not files.rank():
        files.trim_partial_line(out)
        for part in parts_of(out):
            files.trim_partial_line(part)
            rows = (files.read_jsonl(out) if out.is_file() else []) + files.read_jsonl(part)
            files.write_jsonl(out, {row["id"]: row for row in rows}.values())
            part.unlink()
    train.add_up([torch.zeros(1)])


def self_instruct(target, tok, count, out, args):
    """Let the target write `count` instructions into the prompts file `out`; goes on where an
    earlier run stopped.

    A chat model answers its own template: given the start of a user's turn it writes what a user
    would ask, and ends the turn (the idea of Magpie, Xu et al., 2024, arXiv 2406.08464). Dropped
    and counted: instructions that are empty (under 3 words), repeated (equal, ignoring case and
    spaces), or do not end within the limit.
    """
    turn = tok.chat_prompt([{"role": "user", "content": ""}], add_generation_prompt=False)
    if tok.eos_id not in turn:
        raise ValueError("this chat template does not end a user's turn with an end token, so the "
                         "model cannot write instructions: give --prompts FILE.jsonl")
    # "...<|im_start|>user\n<|im_end|>\n" becomes "...<|im_start|>user\n": cut at the last end
    # token, since a system's turn before it ends with one, too.
    turn = turn[:len(turn) - 1 - turn[::-1].index(tok.eos_id)]
    # Left alone it writes mostly "I'm planning..." and "Can you...". First words make it vary.
    openings = itertools.cycle(files.read_openings(args.openings) if args.openings else
                               [{"task": "open", "opening": ""}])
    files.trim_partial_line(out)
    kept = files.read_jsonl(out) if out.is_file() else []
    seen, begun, fruitless = {words(row["prompt"]) for row in kept}, len(kept), 0
    # A resumed run must not write the same ones again.
    generator = torch.Generator(target.embed_tokens.weight.device).manual_seed(args.seed + begun)
    progress, dropped = files.Progress(count - begun, "instructions"), collections.Counter()
    with open(out, "a", encoding="utf-8") as file:
        while len(kept) < count:
            before, chosen = len(kept), list(itertools.islice(openings, count - len(kept) + 8))
            starts = [tok.encode(opening["opening"]) for opening in chosen]
            written = answer_prompts(
                target, [turn + start for start in starts], [args.instruction_temperature] *
                len(chosen), args.top_p, args.max_instruction_tokens, tok.eos_ids, generator,
                args.batch_size)
            for row, ids, ended, _ in written:
                text = tok.decode(starts[row] + ids).strip()
                reason = ("over-long" if not ended else "empty" if len(text.split()) < 3 else
                          "repeated" if words(text) in seen else None)
                if reason:
                    dropped[reason] += 1
                elif len(kept) < count:
                    seen.add(words(text))
                    kept.append({"task": chosen[row]["task"], "prompt": text})
                    print(json.dumps(kept[-1], ensure_ascii=False), file=file, flush=True)
                    progress.update(len(kept) - begun, f"dropped {dict(dropped)}")
            fruitless = fruitless + 1 if len(kept) == before else 0
            if fruitless == 20:
                raise ValueError(f"20 rounds gave no new instruction (dropped {dict(dropped)}): "
                                 f"raise --instruction-temperature or --max-instruction-tokens")
    print(f"{len(kept)} instructions in {out}; dropped in this run: {dict(dropped)}")


def words(text):
    """What makes two instructions the same: their words, ignoring case and spaces."""
    return " ".join(text.lower().split())


def claim(args, *written):
    """Refuse to mix what other settings gave into the files `written`, or to touch what generate
    did not write. What decides the records is kept beside them: all but the prompts, which are in
    the records, and --batch-size, which decides what fits into memory."""
    kept = Path(f"{args.out}.settings.json")
    settings = files.settings(args, "target", "temperatures", "top_p", "max_new_tokens",
                              "per_prompt", "seed", "dtype", "instruction_temperature",
                              "max_instruction_tokens", "openings")
    for path in filter(Path.exists, written):
        if not kept.is_file():
            raise ValueError(f"{path} has no {kept.name} beside it, so how it was made is unknown: "
                             f"give another --out")
        if not args.resume:
            raise ValueError(f"{path} exists: give --resume to go on with it, or another --out")
        files.require_same(path, files.read_json(kept), settings)
    files.write_json(kept, settings)


def generate(args):
    """Answer prompts, or self-written instructions, or write documents from an empty prompt."""
    instructions = args.out.with_suffix(".instructions.jsonl")
    if not files.rank():
        claim(args, args.out, *parts_of(args.out), *[instructions] * bool(args.self_instruct))
    prompts = files.read_prompts(args.prompts) if args.prompts else None
    device, dtype = files.set_up(args)
    tok = tokenizer.load(args.target)
    target = model.load(args.target, device, dtype, tok.vocab_size).for_decoding()
    print(f"target {args.target}: {target.parameter_count() / 1e6:.1f} M parameters")
    if args.self_instruct:
        if not files.rank():         # the others wait: two would write the same instruction twice
            with files.locked(instructions):
                self_instruct(target, tok, args.self_instruct, instructions, args)
        train.add_up([torch.zeros(1)])
        prompts = files.read_prompts(instructions)[:args.self_instruct]
    elif args.documents:
        # Only the token that separates documents: what comes is like what it was pretrained on.
        prompts = [{"task": "document", "messages": []}] * args.documents
    stop_ids = [tok.document_id] if args.documents else ()
    states = TargetStates(target, args.target, dtype) if args.keep_states else None
    write_records(target, tok, prompts, args.out, args.seed, args.temperatures, args.per_prompt,
                  args.top_p, args.max_new_tokens, args.batch_size, stop_ids, states)
    print(f"next: python distill.py finetune --target {args.target} --draft out/drafter-base "
          f"--data {args.out} --loss tvd++ --out out/drafter")


# ---- Compare: which loss is better? ------------------------------------------------------------

def compare(args):
    """Train one drafter with each loss: same start, same records in the same order, same steps.
    Then measure them in the same way.

    A loss's learning rate is chosen from --learning-rates with the first seed, since losses differ
    in scale: on the development prompts of the first task. Results are on test prompts, over all
    seeds. Everything trained is kept and in the JSON; what is there already is not trained again.
    """
    args.out.mkdir(parents=True, exist_ok=True)
    args.losses = list(dict.fromkeys(args.losses))
    for name in args.losses:
        losses.choose(name, **options_of(name, args))
    tok, target, draft = load_pair(args)
    states = TargetStates(target, args.target, getattr(torch, args.dtype))
    training, held_out, pretraining = read_training(args, tok)
    answers = {path: read_answers(target, tok, path, args) for path in (args.dev, args.test)}
    tune_on = next(iter(answers[args.dev].values()))      # the task of the training
    prompts = files.read_prompts(args.test)

    def trained(name, rate, seed):
        """The drafter trained so, and its log."""
        options = argparse.Namespace(**{**vars(args), **options_of(name, args), "loss": name,
                                        "learning_rate": rate, "seed": seed, "resume": True})
        train.fill_in(options)
        key = files.fingerprint(deciding(options, training, held_out))[:8]
        options.out = args.out / re.sub(r"[^\w+-]", "_", f"{name}-{rate:g}-{seed}-{key}")
        one = model.load(args.draft, target.embed_tokens.weight.device, vocab_size=tok.vocab_size)
        with (open(args.out / "output.log", "a") as log, contextlib.redirect_stdout(log),
              files.locked(options.out, folder=True)):
            align(one, target, states, training, held_out, pretraining, tok, options)
        return one, files.read_jsonl(options.out / "log.jsonl")

    measured = functools.partial(measure, target, tok, states, answers[args.test], prompts, args)
    runs, curves, before = [], {}, measured(draft)
    print("before:  " + "  ".join(f"{k} {v:.3f}" for k, v in before.items()), flush=True)
    for name in args.losses:
        for rate in args.learning_rates:
            alpha = acceptance(trained(name, rate, args.seed)[0], target, states, tune_on)
            runs.append({"loss": name, "learning_rate": rate, "seed": args.seed,
                         "dev_alpha": alpha})
            print(f"{name}: learning rate {rate:g}, development alpha {alpha:.4f}", flush=True)
        best = max((r["dev_alpha"], r["learning_rate"]) for r in runs if r["loss"] == name)[1]
        for seed in range(args.seed, args.seed + args.seeds):
            one, log = trained(name, best, seed)
            runs.append({"loss": name, "learning_rate": best, "seed": seed, **measured(one)})
            curves.setdefault(name, []).append([(row["step"], row["held_out_alpha"]) for row in log
                                                if "held_out_alpha" in row])
            settings = {k: str(v) for k, v in vars(args).items() if k != "function"}
            files.write_json(args.out / "compare.json", {"settings": settings, "before": before,
                                                         "runs": runs, "curves": curves})
    report.print_comparison(args.losses, runs)
    report.draw_curves(args.out / "compare.png", curves)
    print(f"wrote {args.out / 'compare.json'} and {args.out / 'compare.png'}")


def measure(target, tok, states, answers, prompts, args, draft):
    """Acceptance rate at temperature 1, and tau, greedy and at temperature 1, by task: a dict."""
    row = {}
    for task, examples in answers.items():
        row[f"alpha, {task}"] = acceptance(draft, target, states, examples)
        chosen = [p for p in prompts if p["task"] == task][:args.prompts]
        for gamma in args.gamma:
            row[f"tau {gamma}, {task}"] = mean_tau(target, draft, tok, chosen, gamma, 0.0)
            row[f"tau {gamma} at T = 1, {task}"] = mean_tau(target, draft, tok, chosen, gamma, 1.0)
    return row


def options_of(name, args):
    """--samples and --baseline, for the losses that take them; if none does, they are refused."""
    sampled = [name for name in args.losses if name.endswith("-sampled")]
    chosen = (args.samples, args.baseline) if name in sampled or not sampled else (1, None)
    return dict(zip(("samples", "baseline"), chosen))


def read_answers(target, tok, path, args):
    """{task: Examples} of the target's answers to the prompts in `path`, written to --out once."""
    prompts, key = files.read_prompts(path), files.fingerprint(args.target, path)[:8]
    out = args.out / f"{path.stem}-answers-{key}.jsonl"
    write_records(target, tok, prompts, out, 0, max_new_tokens=64)
    tasks = dict.fromkeys(prompt["task"] for prompt in prompts)
    return {task: train.read_examples(out, tok, 512, task) for task in tasks}


def mean_tau(target, draft, tok, prompts, gamma, temperature):
    """Block efficiency of speculative decoding over these prompts, 64 tokens each. The first token
    of a text came from the pass over its prompt, which is not counted."""
    device = target.embed_tokens.weight.device
    generator = torch.Generator(device).manual_seed(0)
    made = [speculate.speculative_generate(
        target, draft, torch.tensor([tok.chat_prompt(p["messages"])], device=device), 64, gamma,
        temperature, 1.0, tok.eos_ids, generator) for p in prompts]
    return sum(len(m.tokens) - 1 for m in made) / max(1, sum(m.target_calls for m in made))


# ---- Command line ------------------------------------------------------------------------------

def make_parser():
    parser = files.Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    sub = commands.add_parser("generate", help="the target answers prompts, or writes them too")
    sub.set_defaults(function=generate)
    sub.add_argument("--target", type=Path, required=True, help="the chat model's folder")
    number, source = files.between("[1, inf)", int), sub.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompts", type=Path, help='JSON lines with "prompt" or "messages"')
    source.add_argument("--self-instruct", type=number, metavar="N",
                        help="the target writes N instructions, then answers them")
    source.add_argument("--documents", type=number, metavar="N",
                        help="the target writes N documents from an empty prompt")
    sub.add_argument("--out", type=Path, required=True, help="JSON lines of records, appended to")
    sub.add_argument("--temperatures", type=files.between("[0, inf)"), nargs="+",
                     default=[0, 0.3, 0.7, 1.0], help="taken in turn (default: the paper's)")
    files.add_flags(
        sub, ("top-p", 0.95, "(0, 1]", "share of the mass that is sampled from"),
        ("max-new-tokens", 256, "[1, inf)", "tokens an answer at most"),
        ("per-prompt", 1, "[1, 1e6]", "answers to each prompt"),
        ("batch-size", 64, "[1, inf)", "rows decoded together"),
        ("instruction-temperature", 0.8, "[0, inf)", "--self-instruct: of the instructions"),
        ("max-instruction-tokens", 160, "[1, inf)", "--self-instruct: longer ones are dropped"))
    sub.add_argument("--openings", type=Path, metavar="FILE", help="--self-instruct: first words, "
                     'taken in turn: JSON lines of {"task", "opening"}')
    sub.add_argument("--keep-states", action="store_true", help="keep the target's states for "
                     "finetune (in the cache folder; 2 bytes times its width for each token)")
    sub.add_argument("--resume", action="store_true", help="make only what --out lacks")
    files.machine_flags(sub)

    sub = commands.add_parser("finetune", help="align the drafter with the target")
    sub.set_defaults(function=finetune)
    sub.add_argument("--loss", default="tvd++", help=f"one of {', '.join(losses.LOSSES)}, or your "
                     f"own: FILE.py:FUNCTION (default tvd++)")
    files.add_flags(
        sub, ("target", None, Path, "the chat model's folder"),
        ("draft", None, Path, "the drafter to start from, of the same tokenizer"),
        ("data", None, Path, "records of distill.py generate"),
        ("out", None, Path, "folder of the aligned drafter"),
        ("draft-vocabulary", 0, "[0, inf)", "propose the most frequent; 0: --draft's list, or all"))
    sub.add_argument("--layers", type=files.between("[0, inf)", int), nargs="+", metavar="N",
                     help="keep only these layers of --draft, which may be the target itself")
    sub.add_argument("--shard-target", action="store_true", help="divide it among processes")
    distillation_flags(sub, steps=600, batch_size=9, learning_rate=1e-3, eval_every=50)

    sub = commands.add_parser("compare", help="train a drafter with several losses: which is best?")
    sub.set_defaults(function=compare)
    compare_flags(sub)
    return parser


def compare_flags(sub):
    """The flags of compare; what it trains on and towards is the tiny world's unless said."""
    sub.add_argument("--losses", nargs="+", metavar="LOSS", help="names, or FILE.py:FUNCTION",
                     default=["kld", "tvd", "tvd++", "tvd-sampled", "tvd++-sampled"])
    sub.add_argument("--learning-rates", type=files.between("(0, inf)"), nargs="+",
                     default=[3e-3, 1e-2, 3e-2, 1e-1], help="the grid each loss is tuned on")
    sub.add_argument("--gamma", type=files.between("[1, 64]", int), nargs="+", default=[3, 5])
    files.add_flags(
        sub, ("target", Path("out/tiny/target"), Path, "the target"),
        ("draft", Path("out/tiny/drafter-base"), Path, "where all start"),
        ("data", Path("out/tiny/records.jsonl"), Path, "records to train on"),
        ("dev", Path("out/tiny/dev.jsonl"), Path, "prompts for the learning rate"),
        ("test", Path("out/tiny/test.jsonl"), Path, "prompts for results"),
        ("out", Path("out/compare"), Path, "folder of all runs, compare.json and compare.png"),
        ("seeds", 3, "[1, inf)", "runs a loss"),
        ("prompts", 20, "[1, inf)", "test prompts a task for tau; alpha takes all"))
    distillation_flags(sub, steps=200, batch_size=32, eval_every=16)
    sub.set_defaults(pretrain_data=Path("out/tiny/pretrain"), draft_vocabulary=0,
                     layers=None, min_learning_rate=None, shard_target=False)


def distillation_flags(parser, **defaults):
    """The flags that finetune and compare share."""
    parser.add_argument("--baseline", help=f"sampled losses: {', '.join(losses.BASELINES)} "
                        f"(default: none for tvd-sampled, batch for tvd++-sampled)")
    parser.add_argument("--pretrain-data", type=Path, metavar="D",
                        help="token files of data/pretrain_text.py, mixed in")
    files.add_flags(
        parser, ("samples", 1, "[1, inf)", "sampled losses: tokens drawn a position"),
        ("chunk", 256, "[1, inf)", "positions whose logits live at once"),
        ("pretrain-fraction", 0.1, "[0, 0.9]", "weight and share of rows of that text"),
        ("pretrain-context", 256, "[2, inf)", "tokens in a window of it"),
        ("eval-records", 32, "[1, inf)", "prompts held out for the acceptance rate"))
    train.training_flags(parser, context=512, **defaults)


def main():
    args = make_parser().parse_args()
    with files.locked(args.out, folder=args.function is not generate):
        args.function(args)


if __name__ == "__main__":
    files.run(main, train.processes, alone=["compare"])
