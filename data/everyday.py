"""Everyday instructions for the drafter's training data, made from the lists in everyday.json.

    python data/everyday.py --count 2400                              -> out/everyday.jsonl
    python data/everyday.py --count 2000 --tasks open --seed 1 --out out/everyday-open.jsonl
    python data/everyday.py --count 300 --follow-up data/smollm2-everyday.jsonl.gz \\
                            --out out/follow-ups.jsonl
    python data/splits.py --train out/everyday.jsonl --drop out/everyday-clean.jsonl
    python distill.py generate --target DIR --prompts out/everyday-clean.jsonl \\
                               --out out/records-3.jsonl

Instructions that a small chat model writes itself ask for odd and long-winded things. People ask
shorter and plainer ones, and a drafter that has never seen the answers to those guesses them badly.
A form, such as "How does {machine} work?", is filled from the list of that name. Five tasks, as in
data/prompts. The passages to summarise are the tiny world's, which the chat model wrote. People
also ask again: --follow-up makes second turns from records of `distill.py generate`. Same seed,
same prompts.
"""

import random
import re
import sys
from pathlib import Path

if not __package__:  # run as a script: sys.path[0] is data/, the root is one up
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from data import files

SHARES = {"open": 0.48, "summarisation": 0.13, "translation": 0.13, "reasoning": 0.13, "code": 0.13}
LISTS = files.read_json(Path(__file__).with_suffix(".json"))
FORMS, FILL, FOLLOW_UPS = LISTS["forms"], LISTS["fill"], LISTS["follow_ups"]


def passages(rng):
    """Texts to summarise: four of the tiny world's passages on one topic each, without end."""
    topics = {}
    for row in files.read_jsonl(Path(__file__).parent / "tiny_world" / "passages.jsonl.gz"):
        topics.setdefault(row["word"], []).append(row["response"])
    words = sorted(word for word, texts in topics.items() if len(texts) >= 4)
    while True:
        yield " ".join(rng.sample(topics[rng.choice(words)], 4))


def prompts(count, seed, tasks):
    """`count` different prompts of these tasks, drawn in the proportions of SHARES.

    A prompt that is there already is drawn again: the more are asked for, the fewer of them are
    open questions and code, which run out first. ValueError if 1,000 draws give nothing new.
    """
    rng, rows, repeated = random.Random(seed), {}, 0                       # rows: {prompt: task}
    texts = passages(rng)
    while len(rows) < count:
        task = rng.choices(tasks, [SHARES[task] for task in tasks])[0]
        b = rng.randint(2, 12)
        # What a form names twice is the same both times.
        chosen = {"a": str(b * rng.randint(2, 12)), "b": str(b)}
        form = rng.choice(FORMS[task])
        for name in re.findall(r"\{(\w+)\}", form):
            if name not in chosen:
                chosen[name] = next(texts) if name == "passage" else rng.choice(FILL[name])
        text = form.format(**chosen)
        repeated = repeated + 1 if text in rows else 0
        if repeated == 1000:
            raise ValueError(f"--count {count}: only {len(rows)} are different; ask for fewer")
        rows.setdefault(text, task)
    return [{"task": task, "prompt": text} for text, task in rows.items()]


def follow_ups(records, count, seed):
    """`count` second turns: what was asked and answered in a record of an open question with a
    short answer, and a question about it."""
    rng = random.Random(seed)
    short = [row for row in records if row.get("task") == "open" and row.get("ended")
             and files.messages_of(row) and 0 < len((row.get("response") or "").split()) <= 150]
    if len(short) < count:
        raise ValueError(f"--count {count}: the records hold only {len(short)} open questions with "
                         f"a short answer; ask for fewer")
    return [{"task": "open", "messages": [
        *files.messages_of(row), {"role": "assistant", "content": row["response"]},
        {"role": "user", "content": rng.choice(FOLLOW_UPS)}]} for row in rng.sample(short, count)]


def main():
    parser = files.Parser(description=__doc__)
    files.add_flags(parser, ("count", 2400, "[1, inf)", "instructions"),
                    ("seed", 0, "[0, 9e18]", "same seed, same instructions"),
                    ("out", Path("out/everyday.jsonl"), Path, "JSON lines to write"))
    parser.add_argument("--tasks", nargs="+", default=[*SHARES], choices=SHARES, help="default all")
    parser.add_argument("--follow-up", type=Path, metavar="RECORDS", help="second turns to these")
    args = parser.parse_args()
    if args.follow_up:
        rows = follow_ups(files.read_jsonl(args.follow_up), args.count, args.seed)
    else:
        rows = prompts(args.count, args.seed, args.tasks)
    files.write_jsonl(args.out, rows)
    counts = (f"{sum(row['task'] == task for row in rows)} {task}" for task in SHARES)
    print(f"wrote {args.out}: {len(rows)} instructions: {', '.join(counts)}")
    print(f"next: python data/splits.py --train {args.out} --drop "
          f"{args.out.with_stem(args.out.stem + '-clean')}")


if __name__ == "__main__":
    files.run(main)
