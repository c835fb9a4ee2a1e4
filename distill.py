"""Stages 2 and 3: let the target write the distillation data, then align the drafter with the target on it.

    python distill.py generate --target models/smollm2-135m-instruct --self-instruct 1000 --out out/records.jsonl
    python distill.py generate --target models/smollm2-135m-instruct --prompts data/prompts/dev.jsonl --out out/dev.jsonl

Why the target writes its own data: the drafter must predict what *this* model says after chat tuning, and the data
it was tuned on is rarely public. Its own answers are free, and they are exactly the texts that the drafter will
have to guess (Goel et al., 2024, arXiv 2403.00858, section 3).
"""

import argparse
import json
import time
from pathlib import Path

import torch

import model
from data import files, tokenizer


# ---- Stage 2: the target writes --------------------------------------------------------------------------------------

@torch.inference_mode()
def generate_wave(target, prompts, temperatures, top_p, max_new_tokens, stop_ids, generator):
    """Sample one answer to each prompt in one ragged batch; yields (row, response_ids, ended) as rows finish.

    prompts: lists of ids, of any lengths. temperatures: one a row. ended: whether a stop token came (it is not in
    response_ids) before max_new_tokens.
    """
    device = target.embed_tokens.weight.device
    lengths = [len(prompt) for prompt in prompts]
    width = max(lengths)
    cache = model.KVCache(target.config, len(prompts), width + max_new_tokens, device, target.embed_tokens.weight.dtype)
    cache.start = torch.tensor([width - n for n in lengths], device=device)       # padded on the left: all end together
    tokens = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)            # (B, width)
    temperatures = torch.tensor(temperatures, device=device)
    rows = list(range(len(prompts)))              # rows[i]: the prompt that row i of the batch answers
    answers = [[] for _ in prompts]
    finished = [False] * len(prompts)
    for _ in range(max_new_tokens):
        logits = target.head(target.hidden(tokens, cache)[:, -1])                                  # (B, V)
        p, ids = model.candidates(logits, temperatures, top_p)
        drawn = ids.gather(1, model.sample(p, generator)[:, None])                                 # (B, 1)
        for row, token in zip(rows, drawn[:, 0].tolist()):
            if finished[row]:
                continue
            if token in stop_ids:
                finished[row] = True
                yield row, answers[row], True
            else:
                answers[row].append(token)
        alive = [i for i, row in enumerate(rows) if not finished[row]]
        if not alive:
            return
        tokens = drawn
        # A finished row costs as much as a live one, but leaving copies the cache: worth it for every eighth row.
        if len(alive) <= 7 / 8 * len(rows):
            keep = torch.tensor(alive, device=device)
            cache.keep(keep)
            tokens, temperatures, rows = tokens[keep], temperatures[keep], [rows[i] for i in alive]
    for row in rows:
        if not finished[row]:
            yield row, answers[row], False


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
    files.trim_partial_line(out)
    kept = files.read_jsonl(out) if out.is_file() else []
    seen = {" ".join(row["prompt"].lower().split()) for row in kept}
    generator.manual_seed(args.seed + len(kept))                     # a resumed run must not write the same ones again
    dropped = {"empty": 0, "repeated": 0, "over-long": 0}
    progress, begun = files.Progress(count - len(kept), "instructions"), len(kept)
    fruitless = 0
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "a", encoding="utf-8") as file:
        while len(kept) < count:
            before = len(kept)
            batch = min(args.batch_size, count - len(kept) + 8)
            wave = generate_wave(target, [turn] * batch, [args.instruction_temperature] * batch, args.top_p,
                                 args.max_instruction_tokens, tok.eos_ids, generator)
            for _, ids, ended in wave:
                text = tok.decode(ids).strip()
                key = " ".join(text.lower().split())
                reason = ("over-long" if not ended else "empty" if len(key.split()) < 3 else
                          "repeated" if key in seen else None)
                if reason:
                    dropped[reason] += 1
                elif len(kept) < count:
                    seen.add(key)
                    kept.append({"task": "open", "prompt": text})
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
    device, dtype = model.set_up(args)
    if args.batch_size < 1 or args.max_new_tokens < 1 or args.per_prompt < 1:
        raise ValueError("--batch-size, --max-new-tokens and --per-prompt must be at least 1")
    if min(args.temperatures) < 0 or not 0 < args.top_p <= 1:
        raise ValueError("--temperatures must be 0 or more, --top-p above 0 and at most 1")
    if args.out.is_file() and not args.resume:
        raise ValueError(f"{args.out} exists: give --resume to go on with it, or another --out")
    prompts = files.read_prompts(args.prompts) if args.prompts else None
    tok = tokenizer.load(args.target)
    target = model.load(args.target, device, dtype)
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
    # Waves of like prompt length waste little padding.
    missing = sorted((item for item in items if item["id"] not in done), key=lambda item: len(item["prompt_ids"]))
    print(f"{len(items)} answers wanted, {len(items) - len(missing)} already in {args.out}")
    generator.manual_seed(args.seed + len(done))
    progress, count, new_tokens, begin = files.Progress(len(missing), "records"), 0, 0, time.monotonic()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, "a", encoding="utf-8") as file:
        for at in range(0, len(missing), args.batch_size):
            wave = missing[at:at + args.batch_size]
            for row, ids, ended in generate_wave(target, [item["prompt_ids"] for item in wave],
                                                 [item["temperature"] for item in wave], args.top_p, args.max_new_tokens,
                                                 stop_ids, generator):
                item = wave[row]
                record = {"id": item["id"], "task": item["task"], "messages": item["messages"], "response": tok.decode(ids),
                          "response_ids": ids, "temperature": item["temperature"], "ended": ended}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                file.flush()                                          # a kill from here on loses only unfinished answers
                count, new_tokens = count + 1, new_tokens + len(ids)
                progress.update(count, f"{new_tokens / (time.monotonic() - begin):.0f} tokens/s")
    print(f"{args.out}: {count} new records, {new_tokens} tokens")
    print(f"next: python distill.py finetune --target {args.target} --draft out/drafter-base --data {args.out} "
          f"--loss tvd++ --out out/drafter")


# ---- Command line ----------------------------------------------------------------------------------------------------

def main():
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
    sub.add_argument("--instruction-temperature", type=float, default=0.8)
    sub.add_argument("--max-instruction-tokens", type=int, default=160, help="longer instructions are dropped (default 160)")
    sub.add_argument("--resume", action="store_true", help="go on with an existing --out: only missing records are made")
    model.machine_flags(sub)

    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    files.run(main)
