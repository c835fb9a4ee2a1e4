r"""Stages 2 and 3: let the target write the distillation data, then align the drafter with the target on it.

    python distill.py generate --target models/smollm2-135m-instruct --self-instruct 1000 --out out/records.jsonl
    python distill.py finetune --target models/smollm2-135m-instruct --draft out/drafter-base --data out/records.jsonl \
                               --loss tvd++ --pretrain-data out/pretrain --out out/drafter

Why the target writes its own data: the drafter must predict what *this* model says after chat tuning, and the data
it was tuned on is rarely public. Its own answers are free, and they are exactly the texts that the drafter will
have to guess (Goel et al., 2024, arXiv 2403.00858, section 3).
"""

import argparse
import contextlib
import dataclasses
import hashlib
import io
import json
import math
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
from data import files, report, tokenizer


# ---- Stage 2: the target writes --------------------------------------------------------------------------------------

@torch.inference_mode()
def generate_batch(target, prompts, temperatures, top_p, max_new_tokens, stop_ids, generator):
    """Sample one answer to each prompt, all together; yields (row, response_ids, ended, states) as answers end.

    prompts: lists of ids. temperatures: one a prompt. ended: whether a stop token came (it is not in response_ids)
    before max_new_tokens. states (N, D), half precision: the last hidden states that the answer's N tokens, and the
    stop token, were drawn from.
    """
    device, dtype = target.embed_tokens.weight.device, target.embed_tokens.weight.dtype
    rows, lengths = list(range(len(prompts))), torch.tensor([len(prompt) for prompt in prompts], device=device)
    width, answers = int(lengths.max()), [[] for _ in prompts]
    # Prompts are padded on the left, so that all rows write their next token into the same column.
    tokens = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    cache = model.KVCache(target.config, len(prompts), width + max_new_tokens, device, dtype)
    cache.start = width - lengths
    states = torch.empty(len(prompts), max_new_tokens, target.config.hidden_size, dtype=torch.float16, device=device)
    temperatures = torch.tensor([float(t) for t in temperatures], device=device)
    for step in range(max_new_tokens):
        hidden = target.hidden(tokens, cache)[:, -1]                                               # (B, D)
        states[:, step] = hidden
        p, ids = model.nucleus(model.tempered(target.head(hidden), temperatures), top_p)
        tokens = ids.gather(1, model.sample(p, generator)[:, None])                                # (B, 1)
        for i, token in enumerate(tokens[:, 0].tolist()):
            if rows[i] is None:
                continue
            ended = token in stop_ids
            if not ended:
                answers[rows[i]].append(token)
            if ended or step == max_new_tokens - 1:
                yield rows[i], answers[rows[i]], ended, states[i, :step + 1]
                rows[i] = None
        if rows.count(None) >= len(rows) / 8:     # finished rows leave, some at a time: leaving copies the cache
            keep = torch.tensor([i for i, row in enumerate(rows) if row is not None], dtype=torch.int64, device=device)
            if not len(keep):
                return
            cache.keep(keep)
            tokens, temperatures, states = tokens[keep], temperatures[keep], states[keep]
            rows = [row for row in rows if row is not None]


def answer_prompts(target, prompts, temperatures, top_p, max_new_tokens, stop_ids, generator, batch_size):
    """generate_batch for any number of prompts, `batch_size` of like length at a time; the row is the prompt's number."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for at in range(0, len(order), batch_size):
        batch = order[at:at + batch_size]
        for row, *answer in generate_batch(target, [prompts[i] for i in batch], [temperatures[i] for i in batch], top_p,
                                           max_new_tokens, stop_ids, generator):
            yield batch[row], *answer


def self_instruct(target, tok, count, out, args, generator):
    """Let the target write `count` instructions into the prompts file `out`; goes on where an earlier run stopped.

    A chat model answers its own template: given the start of a user's turn it writes what a user would ask, and
    ends the turn (the idea of Magpie, Xu et al., 2024, arXiv 2406.08464). Dropped and counted: instructions that
    are empty (under 3 words), repeated (equal but for case and spaces), or do not end within the limit.
    """
    turn = tok.chat_prompt([{"role": "user", "content": ""}], add_generation_prompt=False)
    if tok.eos_id not in turn:
        raise ValueError("this model's chat template does not end the user's turn with the end-of-turn token, so it cannot "
                         "write instructions by itself; give --prompts FILE.jsonl")
    turn = turn[:len(turn) - 1 - turn[::-1].index(tok.eos_id)]       # everything up to the end of the empty user turn
    # Left alone it writes mostly "I'm planning..." and "Can you...". First words, dealt in turn, make it vary.
    openings = files.read_openings(args.openings) if args.openings else [{"task": "open", "opening": ""}]
    files.trim_partial_line(out)
    kept = files.read_jsonl(out) if out.is_file() else []
    seen = {" ".join(row["prompt"].lower().split()) for row in kept}
    generator.manual_seed(args.seed + len(kept))                     # a resumed run must not write the same ones again
    dropped = {"empty": 0, "repeated": 0, "over-long": 0}
    progress, begun = files.Progress(count - len(kept), "instructions"), len(kept)
    fruitless, tried = 0, len(kept)
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "a", encoding="utf-8") as file:
        while len(kept) < count:
            before = len(kept)
            chosen = [openings[(tried + i) % len(openings)] for i in range(count - len(kept) + 8)]
            tried += len(chosen)
            starts = [tok.encode(opening["opening"]) for opening in chosen]
            written = answer_prompts(target, [turn + start for start in starts], [args.instruction_temperature] * len(chosen),
                                     args.top_p, args.max_instruction_tokens, tok.eos_ids, generator, args.batch_size)
            for row, ids, ended, _ in written:
                text = tok.decode(starts[row] + ids).strip()
                key = " ".join(text.lower().split())
                reason = ("over-long" if not ended else "empty" if len(key.split()) < 3 else
                          "repeated" if key in seen else None)
                if reason:
                    dropped[reason] += 1
                elif len(kept) < count:
                    seen.add(key)
                    kept.append({"task": chosen[row]["task"], "prompt": text})
                    file.write(json.dumps(kept[-1], ensure_ascii=False) + "\n")
                    file.flush()
                    progress.update(len(kept) - begun, f"dropped {dropped}")
            fruitless = fruitless + 1 if len(kept) == before else 0
            if fruitless == 20:
                raise ValueError(f"20 batches in a row gave no new instruction ({len(kept)} kept, dropped {dropped}): raise "
                                 f"--instruction-temperature or --max-instruction-tokens, or ask for fewer")
    print(f"{len(kept)} instructions in {out}; dropped in this run: {dropped}")


def generate(args):
    """Answer prompts (or self-written instructions, or bare starts) and append one record a line to args.out."""
    device, dtype = files.set_up(args)
    if args.batch_size < 1 or args.max_new_tokens < 1 or args.per_prompt < 1:
        raise ValueError("--batch-size, --max-new-tokens and --per-prompt must be at least 1")
    if min(args.temperatures) < 0 or not 0 < args.top_p <= 1:
        raise ValueError("--temperatures must be 0 or more, --top-p above 0 and at most 1")
    if args.out.is_file() and not args.resume:
        raise ValueError(f"{args.out} exists: give --resume to go on with it, or another --out")
    prompts = files.read_prompts(args.prompts) if args.prompts else None
    tok = tokenizer.load(args.target)
    target = model.load(args.target, device, dtype).for_decoding()
    print(f"target {args.target}: {target.parameter_count() / 1e6:.1f} M parameters")
    generator = torch.Generator(device).manual_seed(args.seed)
    stop_ids = set(tok.eos_ids)
    if args.self_instruct:
        instructions = args.out.with_suffix(".instructions.jsonl")
        if instructions.is_file() and not args.resume:
            raise ValueError(f"{instructions} exists: give --resume to go on with it, or another --out")
        self_instruct(target, tok, args.self_instruct, instructions, args, generator)
        prompts = files.read_prompts(instructions)[:args.self_instruct]
    elif args.documents:
        # The bare start: only the token that separates documents; what comes is what the model was pretrained on.
        prompts = [{"task": "document", "messages": []}] * args.documents
        stop_ids.add(tok.document_id)

    # One item an answer. Temperatures are dealt in turn, so that each has its share of every kind of prompt.
    items = []
    for number, prompt in enumerate(prompts):
        prompt_ids = tok.chat_prompt(prompt["messages"]) if prompt["messages"] else [tok.document_id]
        if len(prompt_ids) + args.max_new_tokens > target.config.max_position_embeddings:
            raise ValueError(f"prompt {number + 1} has {len(prompt_ids)} tokens; with {args.max_new_tokens} new ones it "
                             f"exceeds the model's context of {target.config.max_position_embeddings}: shorten it, or "
                             f"lower --max-new-tokens")
        for k in range(args.per_prompt):
            items.append({"id": f"{number:05d}.{k}", "task": prompt["task"], "messages": prompt["messages"],
                          "prompt_ids": prompt_ids, "temperature": args.temperatures[len(items) % len(args.temperatures)]})
    files.trim_partial_line(args.out)
    done = {row["id"]: row for row in files.read_jsonl(args.out)} if args.out.is_file() else {}
    for item in items:
        if item["id"] in done and done[item["id"]]["messages"] != item["messages"]:
            raise ValueError(f"{args.out}: record {item['id']} answers another prompt than the one given now; choose another --out")
    missing = [item for item in items if item["id"] not in done]
    print(f"{len(items)} answers wanted, {len(items) - len(missing)} already in {args.out}")
    generator.manual_seed(args.seed + len(done))
    states = TargetStates(target, args.target, dtype) if args.keep_states else None
    progress, count, new_tokens, begin = files.Progress(len(missing), "records"), 0, 0, time.monotonic()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, "a", encoding="utf-8") as file:
        for number, ids, ended, hidden in answer_prompts(target, [item["prompt_ids"] for item in missing], [item["temperature"] for item in missing],
                                                  args.top_p, args.max_new_tokens, stop_ids, generator, args.batch_size):
            item = missing[number]
            if states:
                example = train.Example(item["prompt_ids"] + ids + ([tok.eos_id] if ended else []), len(item["prompt_ids"]))
                states.add([example], hidden)
            record = {"id": item["id"], "task": item["task"], "messages": item["messages"], "response": tok.decode(ids),
                      "response_ids": ids, "temperature": item["temperature"], "ended": ended}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()                                              # a kill from here on loses only unfinished answers
            count, new_tokens = count + 1, new_tokens + len(ids)
            progress.update(count, f"{new_tokens / (time.monotonic() - begin):.0f} tokens/s")
    print(f"{args.out}: {count} new records, {new_tokens} tokens")
    print(f"next: python distill.py finetune --target {args.target} --draft out/drafter-base --data {args.out} "
          f"--loss tvd++ --out out/drafter")


# ---- Stage 3: align the drafter --------------------------------------------------------------------------------------

class TargetStates:
    """The target's last hidden states at the answers' positions, computed when they are first asked for.

    p = softmax(head(state)), so a state of 576 half-precision numbers stands for a distribution over 49,152: after
    the first pass over the data the target costs only its head. Kept on disk under the cache folder, in a folder named
    after all that decides them: the target's weights, its config.json, and the dtype. Each run appends the records that
    it computes to a file of its own: their name, their count of positions, their states. What a killed run left half
    written at its file's end is not read.
    """

    def __init__(self, target, folder, dtype):
        self.target, self.width, self.dtype, self.own = target, target.config.hidden_size, dtype, None
        key = hashlib.sha256(str(dtype).encode())                # with bfloat16 the states carry its rounding
        for path in [Path(folder) / "config.json", *sorted(Path(folder).glob("*.safetensors"))]:
            with open(path, "rb") as content:
                key.update(hashlib.file_digest(content, "sha256").digest())
        self.folder, self.place = files.cache_dir("target-states", key.hexdigest()[:20]), {}       # name -> (file, offset)
        for path in self.folder.iterdir():
            file, at, size = open(path, "rb", buffering=0), 0, path.stat().st_size
            while at + 24 <= size:
                file.seek(at)
                name, count = file.read(16), int.from_bytes(file.read(8), "little")
                at += 24 + count * self.width * 2
                if at <= size:
                    self.place[name] = file, at - count * self.width * 2

    @staticmethod
    def name(example):
        """16 bytes that tell this record from any other."""
        return hashlib.blake2b(json.dumps([example.tokens, example.first]).encode(), digest_size=16).digest()

    def add(self, examples, states):
        """Append the states (N, D) at the positions of these examples."""
        if self.own is None:
            self.own = open(self.folder / f"{time.time_ns()}-{os.getpid()}", "x+b", buffering=0)
        for e, part in zip(examples, states.half().cpu().split([e.count for e in examples])):
            block = self.name(e) + e.count.to_bytes(8, "little") + part.numpy().tobytes()
            at = self.own.seek(0, os.SEEK_END)
            if self.own.write(block) != len(block):
                raise OSError(f"{self.own.name}: the disk is full; make room and go on with --resume")
            self.place[self.name(e)] = self.own, at + 24

    def read(self, batch, device):
        """States (N, D) at the answer positions of these examples, in their order."""
        if missing := [e for e in batch if self.name(e) not in self.place]:
            tokens, where = train.collate(missing, device)
            with torch.no_grad(), torch.autocast(torch.device(device).type, self.dtype, enabled=self.dtype != torch.float32):
                self.add(missing, self.target.hidden(tokens)[where])
        stored, begin = np.empty((sum(e.count for e in batch), self.width), np.float16), 0
        for e in batch:
            file, at = self.place[self.name(e)]
            file.seek(at)
            file.readinto(stored[begin:begin + e.count].data)
            begin += e.count
        return torch.from_numpy(stored).to(device, self.target.embed_tokens.weight.dtype)


def draft_vocabulary(examples, size, tok):
    """The `size` tokens that the target's answers use most, and those that end a turn: (K,) ids, the most frequent first."""
    counts = np.zeros(tok.vocab_size, dtype=np.int64)
    for e in examples:
        np.add.at(counts, e.tokens[e.first:], 1)
    counts[list(tok.eos_ids)] = counts.max() + 1
    return torch.from_numpy(np.argsort(-counts, kind="stable")[:size].copy())


def never_proposed(draft):
    """The ids of the tokens that the drafter's draft vocabulary leaves out."""
    outside = torch.ones(draft.config.vocab_size, dtype=torch.bool)
    outside[draft.draft_vocabulary.cpu()] = False
    return outside.nonzero().flatten()


def distillation_backward(draft, target, states, batch, loss_function, scale, chunk, device, generator):
    """Add the gradient of scale * mean loss over the batch's answer positions to the drafter; returns (loss, alpha).

    Logits are made for the answer's positions only, and for `chunk` of them at a time: the head's backward runs chunk
    by chunk into the hidden states, then goes through the layers once (train.next_token_loss_backward says why that
    is exact). alpha: mean sum min(p, q), the acceptance rate before this step.

    With a draft vocabulary both distributions are taken over it alone, and over an eighth as many other tokens, drawn
    anew: without them nothing would keep the other logits small, and the whole head, which other programs use, would
    propose tokens that were never trained. (finetune leaves the others' rows of the head alone; the hidden states learn
    to keep away from them.)
    """
    tokens, where = train.collate(batch, device)
    target_states = states.read(batch, device)                                          # (N, D of the target)
    hidden = draft.hidden(tokens)[where]                                                # (N, D of the drafter)
    ids = draft.draft_vocabulary
    if ids is not None:
        others = never_proposed(draft)
        ids = torch.cat([ids, others[torch.randperm(len(others), generator=generator)[:len(ids) // 8]].to(device)])
    target_head = target.head_weight(ids)                                               # (K, D of the target)
    draft_head = draft.head_weight(ids)                                                 # (K, D of the drafter)
    head = draft_head.detach().requires_grad_()   # a leaf: its gradient gathers over the chunks, then goes on once

    def logits(rows, target_rows):
        return F.linear(rows, head), F.linear(target_rows, target_head)                 # (n, K) and (n, K)

    pieces = list(zip(hidden.detach().split(chunk), target_states.split(chunk)))
    total, alpha, gradients, count = 0.0, 0.0, [], len(hidden)
    for (rows, target_rows), options in zip(pieces, losses.step_options(loss_function, pieces, logits)):
        rows.requires_grad_()
        draft_logits, target_logits = logits(rows, target_rows)
        loss = loss_function(draft_logits, target_logits, **options).sum() / count
        (scale * loss).backward()
        gradients.append(rows.grad)
        total += loss.item()
        alpha += losses.overlap(draft_logits.detach(), target_logits).sum().item() / count
    torch.autograd.backward([hidden, draft_head], [torch.cat(gradients), head.grad])
    return total, alpha


@torch.no_grad()
def acceptance(draft, target, states, examples, chunk, device):
    """Analytic acceptance rate E[sum min(p, q)] over the answers' positions, at temperature 1 and without top-p."""
    total, count = 0.0, 0
    for at in range(0, len(examples), 8):
        batch = examples[at:at + 8]
        tokens, where = train.collate(batch, device)
        rows = zip(draft.hidden(tokens)[where].split(chunk), states.read(batch, device).split(chunk))
        for draft_rows, target_rows in rows:
            total += losses.overlap(draft.head(draft_rows), target.head(target_rows)).sum().item()
            count += len(draft_rows)
    return total / count


def finetune(args):
    """Train the drafter on the target's own distributions at the positions of the target's own answers."""
    for name in ("steps", "batch_size", "learning_rate", "eval_every", "save_every", "chunk", "eval_records"):
        if not getattr(args, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; expected a number above 0")
    if not 0 <= args.pretrain_fraction < 1:
        raise ValueError(f"--pretrain-fraction is {args.pretrain_fraction}; expected at least 0 and below 1")
    generator = torch.Generator().manual_seed(args.seed)
    loss_function = losses.choose(args.loss, args.samples, args.baseline, generator)
    if args.dtype == "float16":
        raise ValueError("--dtype float16 loses small gradients without loss scaling; train in float32 or bfloat16")
    if not args.resume and (args.out / "config.json").is_file():
        raise ValueError(f"--out {args.out} already holds a model: add --resume to go on with it, or give another folder")
    device, dtype = files.set_up(args)
    tok, draft_tok = tokenizer.load(args.target), tokenizer.load(args.draft)
    if tok.fingerprint != draft_tok.fingerprint:
        raise ValueError(f"{args.draft} has another tokenizer than {args.target} ({draft_tok.vocab_size} and {tok.vocab_size} tokens, "
                         f"not the same ones): a drafter must share its target's tokenizer")
    target = model.load(args.target, device).requires_grad_(False)
    draft = model.load(args.draft, device)                # fp32 weights even where --dtype is bfloat16: see train.py
    if draft.config.vocab_size != target.config.vocab_size:
        raise ValueError(f"draft vocabulary {draft.config.vocab_size} does not match target vocabulary "
                         f"{target.config.vocab_size}: a drafter must share its target's tokenizer")
    examples = train.read_examples(args.data, tok, args.context)
    states = TargetStates(target, args.target, dtype)
    training, held_out = train.hold_out(examples, args.eval_records)
    if args.draft_vocabulary:
        draft.draft_vocabulary = draft_vocabulary(training, min(args.draft_vocabulary, draft.config.vocab_size), tok).to(device)
    pretraining = None
    if args.pretrain_fraction and args.pretrain_data:
        pretraining, _ = train.read_data(args.pretrain_data, tok, args.pretrain_context)
    elif args.pretrain_fraction:
        print("no --pretrain-data: training on the target's answers alone")
    share = args.pretrain_fraction if pretraining is not None else 0.0
    # The paper mixes 9 : 1. With the default batch of 9 that is one pretraining window a step, weighted 0.1.
    windows = max(1, round(args.batch_size * share / (1 - share))) if share else 0
    optimiser = train.make_optimiser(draft, args.learning_rate, args.weight_decay)
    settings = {name: getattr(args, name) for name in ("loss", "samples", "baseline", "steps", "batch_size", "learning_rate", "warm_up", "weight_decay",
                "context", "chunk", "seed", "dtype", "pretrain_context", "eval_records", "draft_vocabulary")} | {
                "share": share, "records": f"{len(examples)} records, {sum(e.count for e in examples)} positions", **dataclasses.asdict(draft.config)}
    step, seconds, positions, out = 0, 0.0, 0, args.out
    memory = getattr(loss_function, "keywords", {}).get("baseline")
    memory = vars(memory) if isinstance(memory, losses.RunningMean) else {}              # what a baseline remembers of earlier steps
    if args.resume and (out / "training.pt").is_file():
        state = train.read_checkpoint(out, settings)
        draft.load_state_dict(state["weights"])
        optimiser.load_state_dict(state["optimiser"])
        generator.set_state(state["generator"])
        memory.update(state.get("baseline", {}))
        step, seconds, positions = state["step"], state["seconds"], state["positions"]
        print(f"resuming {out} at step {step}")
    if draft.draft_vocabulary is not None:
        # The head's rows of all other tokens (with a tied head also what is read of them) stay as they are: they come up too
        # seldom to be learnt, Adam would take large steps on them all the same, and decay would wear them away.
        others = never_proposed(draft).to(device)
        kept = draft.head_weight().detach()[others]
    train.copy_tokenizer(args.draft, out)
    train.keep_log_until(out / "log.jsonl", step)
    per_epoch = math.ceil(len(training) / args.batch_size)
    print(f"drafter {args.draft}: {draft.parameter_count() / 1e6:.2f} M parameters, {args.loss}; {len(training)} records for training, "
          f"{len(held_out)} held out; {args.steps} steps of {args.batch_size} are {args.steps / per_epoch:.1f} epochs; "
          f"pretraining share {share}")
    began, begin_step, begin_positions, printed = time.monotonic() - seconds, step, positions, 0.0
    loss = alpha = held_alpha = math.nan
    with open(out / "log.jsonl", "a", encoding="utf-8") as log:
        while True:
            # `step` updates are done.
            rate = train.learning_rate_at(step, args.steps, args.learning_rate, args.learning_rate / 10, args.warm_up)
            for group in optimiser.param_groups:
                group["lr"] = rate
            row = {"step": step, "positions": positions, "loss": None, "lr": rate}
            due = step == args.steps or step % args.save_every == 0
            if due or step % args.eval_every == 0:
                row["held_out_alpha"] = held_alpha = acceptance(draft, target, states, held_out, args.chunk, device)
                train.require_finite(held_alpha, step, out)
            if due and step > 0:
                train.save_checkpoint(out, draft, {"optimiser": optimiser.state_dict(), "generator": generator.get_state(), "step": step,
                                                   "positions": positions, "seconds": time.monotonic() - began, "settings": settings, "baseline": dict(memory)})
            if step < args.steps:
                batch = train.batch_at(training, args.batch_size, args.seed, step)
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    loss, alpha = distillation_backward(draft, target, states, batch, loss_function, 1 - share, args.chunk, device, generator)
                    if windows:
                        text = train.sample_batch(pretraining, windows, args.pretrain_context, generator).to(device)
                        row["pretrain_loss"] = train.next_token_loss_backward(draft, text, scale=share).item()
                if draft.draft_vocabulary is not None:
                    draft.head_weight().grad[others] = 0
                norm = torch.nn.utils.clip_grad_norm_(draft.parameters(), args.clip)
                train.require_finite(loss + norm.item(), step, out)
                optimiser.step()
                optimiser.zero_grad()
                if draft.draft_vocabulary is not None:
                    draft.head_weight().data[others] = kept
                positions += sum(e.count for e in batch)
                row |= {"loss": loss, "alpha": alpha}
            row["seconds"] = round(time.monotonic() - began, 3)
            log.write(json.dumps(row) + "\n")
            log.flush()
            if "held_out_alpha" in row or time.monotonic() - printed > 10:
                printed, done = time.monotonic(), step - begin_step
                took = row["seconds"] - seconds
                left = f"{(positions - begin_positions) / took:,.0f} positions/s  {files.duration((args.steps - step) * took / done)} left" if done else ""
                print(f"step {step}/{args.steps}  loss {loss:.4f}  alpha {alpha:.3f}  held out: alpha {held_alpha:.4f}, implying tau "
                      f"{losses.implied_tau(held_alpha, 3):.2f} at gamma 3  lr {rate:.1e}  {left}", flush=True)
            if step == args.steps:
                break
            step += 1
    print(f"wrote {out}: held-out acceptance rate {held_alpha:.4f} at temperature 1 (implied tau: gamma 3 "
          f"{losses.implied_tau(held_alpha, 3):.2f}, gamma 5 {losses.implied_tau(held_alpha, 5):.2f}; independence assumed)")
    print(f"next: python speculate.py --target {args.target} --draft {out} --bench data/prompts/dev.jsonl --gamma 3")


# ---- Compare: which loss is better? ------------------------------------------------------------------------------------

# Student's t at 97.5 % for 1, 2, ... degrees of freedom: three seeds say little, and the interval must say so.
STUDENT = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26]


def mean_and_interval(values):
    """Mean and the half width of its 95 % interval (nan for one value), as floats."""
    n = len(values)
    half = STUDENT[min(n - 1, len(STUDENT)) - 1] * float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    return float(np.mean(values)), half


def compare(args):
    """Train one drafter with each loss: same start, same batches in the same order, same steps; then measure them alike.

    A loss's learning rate is chosen from --learning-rates on the development prompts with the first seed, since losses
    differ in scale; results are on test prompts, over all seeds. Everything trained is kept and in the JSON.
    """
    out, parser = args.out, make_parser()
    out.mkdir(parents=True, exist_ok=True)
    machine = ["--device", args.device, "--threads", str(args.threads)]
    for name in args.losses:
        losses.choose(name, args.samples if name.endswith("-sampled") else 1, args.baseline if name.endswith("-sampled") else None)

    def quietly(*flags):
        """distill.py with these flags, in this process, its printing kept in a log."""
        options = parser.parse_args([*map(str, flags), *machine])
        with open(out / "output.log", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
            options.function(options)

    device, _ = files.set_up(args)
    tok, target = tokenizer.load(args.target), model.load(args.target, device).requires_grad_(False)
    sets = {}                                     # (split, task) -> examples and their target states
    for split in ("dev", "test"):
        path = out / f"{split}-answers.jsonl"     # the target's answers, on which alpha is computed exactly
        quietly("generate", "--target", args.target, "--prompts", getattr(args, split), "--max-new-tokens", 64, "--out", path, "--resume")
        rows = sorted(files.read_jsonl(path), key=lambda row: row["id"])
        for task in dict.fromkeys(row["task"] for row in rows):
            files.write_jsonl(out / "part.jsonl", [row for row in rows if row["task"] == task])
            with contextlib.redirect_stdout(io.StringIO()):
                examples = train.read_examples(out / "part.jsonl", tok, 512)
                sets[split, task] = examples, TargetStates(target, args.target, torch.float32)
    tasks = [task for split, task in sets if split == "test"]
    tune_on = sets["dev", tasks[0]]               # the first task: what is kept out of training is kept out of tuning, too

    def trained(name, rate, seed):
        """The drafter trained so, and its log; of a run that is there already only the last evaluation is done again."""
        folder = out / re.sub(r"[^\w+-]", "_", f"{name}-{rate:g}-{seed}")
        sampled = ["--samples", args.samples, *(["--baseline", args.baseline] if args.baseline else [])] if name.endswith("-sampled") else []
        quietly("finetune", "--target", args.target, "--draft", args.draft, "--data", args.data, "--pretrain-data", args.pretrain_data,
                "--pretrain-fraction", args.pretrain_fraction, "--loss", name, *sampled, "--learning-rate", rate, "--steps", args.steps,
                "--batch-size", args.batch_size, "--eval-every", max(1, args.steps // 12), "--seed", seed, "--out", folder, "--resume")
        return model.load(folder, device), files.read_jsonl(folder / "log.jsonl")

    def measure(draft):
        """Analytic alpha at temperature 1 and greedy tau at each gamma, by task."""
        row = {}
        for task in tasks:
            row[f"alpha, {task}"] = acceptance(draft, target, sets["test", task][1], sets["test", task][0], 256, device)
            chosen = [p for p in files.read_prompts(args.test) if p["task"] == task][:args.prompts]
            for gamma in args.gamma:
                made = [speculate.speculative_generate(target, draft, torch.tensor([tok.chat_prompt(p["messages"])], device=device),
                                                       64, gamma, 0.0, 1.0, tok.eos_ids) for p in chosen]
                row[f"tau {gamma}, {task}"] = sum(len(m.tokens) - 1 for m in made) / max(1, sum(m.target_calls for m in made))
        return row

    runs, curves, best = [], {}, {}
    before = measure(model.load(args.draft, device))
    print("before:  " + "  ".join(f"{key} {value:.3f}" for key, value in before.items()), flush=True)
    for name in args.losses:
        for rate in args.learning_rates:
            draft, log = trained(name, rate, 0)
            alpha = acceptance(draft, target, tune_on[1], tune_on[0], 256, device)
            runs.append({"loss": name, "learning_rate": rate, "seed": 0, "dev_alpha": alpha})
            print(f"{name}: learning rate {rate:g}, development alpha {alpha:.4f}", flush=True)
        best[name] = max((run for run in runs if run["loss"] == name), key=lambda run: run["dev_alpha"])["learning_rate"]
        for seed in range(args.seeds):
            draft, log = trained(name, best[name], seed)
            runs.append({"loss": name, "learning_rate": best[name], "seed": seed, **measure(draft)})
            curves.setdefault(name, []).append([(row["step"], row["held_out_alpha"]) for row in log if "held_out_alpha" in row])
            with files.atomic(out / "compare.json") as temporary:
                temporary.write_text(json.dumps({"settings": {k: str(v) for k, v in vars(args).items() if k != "function"}, "before": before,
                                                 "runs": runs, "curves": curves}, indent=1) + "\n")
    print(f"\nmean over {args.seeds} seeds, half width of its 95 % interval; below it the difference from {args.losses[0]}, paired by seed")
    for name in args.losses:
        results, reference = ([run for run in runs if run["loss"] == which and "dev_alpha" not in run] for which in (name, args.losses[0]))
        print(f"{name} (learning rate {best[name]:g})")
        for key in before:
            values = [run[key] for run in results]
            line = "  {:28} {:.4f} ± {:.4f}".format(key, *mean_and_interval(values))
            if name != args.losses[0]:
                line += "   difference {:+.4f} ± {:.4f}".format(*mean_and_interval([a - b[key] for a, b in zip(values, reference)]))
            print(line.replace(" ± nan", ""))     # one seed has no interval
    report.draw_curves(out / "compare.png", curves)
    print(f"wrote {out / 'compare.json'} and {out / 'compare.png'}")


# ---- Command line ----------------------------------------------------------------------------------------------------

def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    sub = commands.add_parser("generate", help="the target answers prompts, or writes them too")
    sub.set_defaults(function=generate)
    sub.add_argument("--target", type=Path, required=True, help="the chat model's folder")
    source = sub.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompts", type=Path, help='JSON lines of {"task", "prompt"} or {"task", "messages"}')
    source.add_argument("--self-instruct", type=int, metavar="N", help="the target writes N instructions, then answers them")
    source.add_argument("--documents", type=int, metavar="N", help="the target writes N documents from its bare start")
    sub.add_argument("--out", type=Path, required=True, help="JSON lines of records, appended to")
    sub.add_argument("--temperatures", type=float, nargs="+", default=[0, 0.3, 0.7, 1.0], help="dealt in turn (default: the paper's)")
    sub.add_argument("--top-p", type=float, default=0.95)
    sub.add_argument("--max-new-tokens", type=int, default=256, help="tokens an answer at most (default 256)")
    sub.add_argument("--per-prompt", type=int, default=1, metavar="K", help="answers a prompt (default 1)")
    sub.add_argument("--batch-size", type=int, default=96, help="rows decoded together (default 96)")
    sub.add_argument("--keep-states", action="store_true",
                     help="keep the target's states for finetune, which then need not be computed again (2 bytes a token and width)")
    sub.add_argument("--openings", type=Path, metavar="FILE", help='--self-instruct: JSON lines of {"task", "opening"}, first words dealt in turn')
    sub.add_argument("--instruction-temperature", type=float, default=0.8)
    sub.add_argument("--max-instruction-tokens", type=int, default=160, help="longer instructions are dropped (default 160)")
    sub.add_argument("--resume", action="store_true", help="go on with an existing --out: only missing records are made")
    files.machine_flags(sub)

    sub = commands.add_parser("finetune", help="align the drafter with the target")
    sub.set_defaults(function=finetune)
    sub.add_argument("--target", type=Path, required=True, help="the chat model's folder")
    sub.add_argument("--draft", type=Path, required=True, help="the drafter to start from, of the same tokenizer")
    sub.add_argument("--data", type=Path, required=True, help="records of distill.py generate")
    sub.add_argument("--out", type=Path, required=True, help="folder of the aligned drafter")
    sub.add_argument("--loss", default="tvd++", help=f"one of {', '.join(losses.LOSSES)}, or your own: FILE.py:FUNCTION (default tvd++)")
    sub.add_argument("--samples", type=int, default=1, metavar="K", help="sampled losses: tokens drawn a position (default 1)")
    sub.add_argument("--baseline", help=f"sampled losses: one of {', '.join(losses.BASELINES)} (default: none for tvd-sampled, batch for tvd++-sampled)")
    sub.add_argument("--steps", type=int, default=600, help="optimiser steps (default 600)")
    sub.add_argument("--batch-size", type=int, default=9, help="records a step (default 9)")
    sub.add_argument("--learning-rate", type=float, default=1e-3, help="its peak; a cosine takes it to a tenth (default 1e-3)")
    sub.add_argument("--warm-up", type=int, default=30, help="steps of rising learning rate (default 30)")
    sub.add_argument("--weight-decay", type=float, default=0.1)
    sub.add_argument("--clip", type=float, default=1.0, help="largest global norm of the gradient (default 1)")
    sub.add_argument("--context", type=int, default=512, help="tokens of prompt and answer at most (default 512)")
    sub.add_argument("--chunk", type=int, default=256, help="positions whose logits live at once (default 256)")
    sub.add_argument("--draft-vocabulary", type=int, default=0, metavar="K",
                     help="propose only the K tokens that the answers use most: cheaper to train and to draft (default 0: all, or as --draft has it)")
    sub.add_argument("--pretrain-data", type=Path, metavar="D", help="token files of data/pretrain_text.py, mixed in")
    sub.add_argument("--pretrain-fraction", type=float, default=0.1, help="weight and share of rows of that text (default 0.1, the paper's)")
    sub.add_argument("--pretrain-context", type=int, default=256)
    sub.add_argument("--eval-records", type=int, default=32, help="records held out for the acceptance rate (default 32)")
    sub.add_argument("--eval-every", type=int, default=50, help="steps between evaluations (default 50)")
    sub.add_argument("--save-every", type=int, default=100, help="steps between checkpoints (default 100)")
    sub.add_argument("--resume", action="store_true", help="go on exactly from the checkpoint in --out")
    files.machine_flags(sub)

    sub = commands.add_parser("compare", help="train one drafter with several losses and measure which is better")
    sub.set_defaults(function=compare)
    sub.add_argument("--losses", nargs="+", default=["kld", "tvd", "tvd++", "tvd-sampled", "tvd++-sampled"], metavar="LOSS",
                     help="names, or FILE.py:FUNCTION (default: kld, and TVD and TVD++ in both forms)")
    sub.add_argument("--seeds", type=int, default=3, help="runs a loss (default 3)")
    for name, default, text in (("target", "out/tiny/target", "the target"), ("draft", "out/tiny/drafter-base", "where all start"),
                                ("data", "out/tiny/records.jsonl", "records to train on"), ("pretrain-data", "out/tiny/pretrain", "mixed in"),
                                ("dev", "out/tiny/dev.jsonl", "prompts for the learning rate"), ("test", "out/tiny/test.jsonl", "prompts for results"),
                                ("out", "out/compare", "folder of all runs, compare.json and compare.png")):
        sub.add_argument(f"--{name}", type=Path, default=Path(default), help=f"{text} (default {default})")
    sub.add_argument("--steps", type=int, default=200, help="of each training (default 200)")
    sub.add_argument("--batch-size", type=int, default=32)
    sub.add_argument("--learning-rates", type=float, nargs="+", default=[3e-3, 1e-2, 3e-2], help="the grid each loss is tuned on")
    sub.add_argument("--pretrain-fraction", type=float, default=0.1)
    sub.add_argument("--gamma", type=int, nargs="+", default=[3, 5])
    sub.add_argument("--prompts", type=int, default=20, help="test prompts a task for tau; alpha takes all (default 20)")
    sub.add_argument("--samples", type=int, default=1, help="of the sampled losses")
    sub.add_argument("--baseline", help="of the sampled losses (default: each one's own)")
    files.machine_flags(sub)
    return parser


def main():
    args = make_parser().parse_args()
    args.function(args)


if __name__ == "__main__":
    files.run(main)
