"""A tiny world: a small, real language that a model of a few million parameters learns in minutes.

Seven topics of thirty words each (data/tiny_world.json); passages about the words, and questions
about them with answers, all written by the real chat model in short, simple sentences. The corpus
is committed (data/tiny_world/); how it was made:

    python data/tiny_world.py prompts                             -> out/tiny-corpus/prompts.jsonl
    python distill.py generate --target models/smollm2-135m-instruct \\
                      --prompts out/tiny-corpus/prompts.jsonl --per-prompt 6 \\
                      --temperatures 0.2 0.4 0.6 0.5 0.6 0.7 --max-new-tokens 56 \\
                      --batch-size 192 --dtype bfloat16 --out out/tiny-corpus/records.jsonl
    python data/tiny_world.py filter                              -> data/tiny_world/*.jsonl.gz

and what `make demo` makes of it:

    python data/tiny_world.py prepare                             -> out/tiny/

Every fifth word of each topic is held out: questions about it are in no training set, though
passages about it are in the pretraining text (a reader meets words before being asked about them).
Questions about JOBS are answered by the chat target, but they are in no distillation prompt: the
drafter's out-of-distribution task.
"""

import collections
import itertools
import random
import re
import sys
from pathlib import Path

if not __package__:  # run as a script: sys.path[0] is data/, the root is one up
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from data import files, pretrain_text, splits, tokenizer

FOLDER = Path(__file__).resolve().parent / "tiny_world"
OUT_OF_DISTRIBUTION = "jobs"

# Each topic's words as they stand in a sentence, and the questions asked about them. No question
# has seven words before or after its word, so that two share no run of 8 words (data/splits.py).
WORLD = files.read_json(Path(__file__).with_suffix(".json"))
TOPICS = WORLD["topics"]                         # {topic: {"words": [...], "questions": [...]}}


# ---- Prompts for the real chat model -----------------------------------------------------------

def words_of(topic):
    """[(word, held out)] of a topic."""
    return [(word, i % 5 == 4) for i, word in enumerate(TOPICS[topic]["words"])]


def all_prompts():
    """[{"topic", "kind": "passage" | "pair", "word", "held_out", "prompt"}] in a fixed order."""
    rows = []
    for topic in TOPICS:
        templates = [("pair", form) for form in TOPICS[topic]["questions"] + WORLD["every_topic"]]
        templates += [("passage", form) for form in WORLD["passages"]]
        for word, held_out in words_of(topic):
            rows += [{"topic": topic, "kind": kind, "word": word, "held_out": held_out,
                      "prompt": form.format(word)} for kind, form in templates]
    return rows


def prompts(args):
    """Write the prompts for the real chat model.

    Each follows an example: one says more about style to so small a model than any instruction.
    What mentions the example's word is dropped.
    """
    rows, roles = [], ("system", "user", "assistant", "user")
    for row in all_prompts():
        example = WORLD["examples"][row["kind"]]
        texts = (WORLD["system"], example["question"], " ".join(example["answer"]), row["prompt"])
        rows.append({"task": row["topic"], "messages": [
            {"role": role, "content": text} for role, text in zip(roles, texts)]})
    files.write_jsonl(args.prompts, rows)
    print(f"wrote {args.prompts}: {len(rows)} prompts")


# ---- Its answers -> the committed corpus -------------------------------------------------------

def sentences(text):
    """Whole sentences of a text on one line; what follows the last full stop is left out."""
    found = re.findall(r"[^.!?]*[^.!?\s][^.!?]*[.!?]+[\"']?", " ".join(text.split()))
    return [sentence.strip() for sentence in found]


def mentions(text, word):
    """Whether a text has the stem of a word in it."""
    return re.search(rf"\b{stem(word)}", text.lower())


def stem(word):
    """What a text about a word must contain: its last word, without a plural's ending."""
    return re.sub(r"(ies|y|es|s|e)$", "", word.split()[-1])


def cleaned(text, row):
    """(text, None), cut after its last good sentence, or (None, why it is dropped).

    So small a chat model says one or two sensible things and then goes round in circles: the first
    sentences are kept, up to the first that repeats a run of four words, or three within itself, or
    its noun, or a word at once.
    """
    limit = 3 if row["kind"] == "passage" or "story" in row["prompt"] else 2
    kept, seen, reason = [], set(), "no whole sentence"
    for sentence in sentences(text)[:limit]:
        words = tuple(re.findall(r"[a-z0-9']+", sentence.lower()))
        if reason := fault(sentence, words, seen, stem(row["word"])):
            break
        kept.append(sentence)
        seen |= splits.runs(words, 4)
    if not kept:
        return None, reason
    text = " ".join(kept)
    return (text, None) if mentions(text, row["word"]) else (None, "off topic")


def fault(sentence, words, seen, noun):
    """Why a sentence is not kept, or None. seen: the runs of four words before it."""
    if not re.fullmatch(r"[A-Z][A-Za-z ,.'!?;-]+", sentence):
        return "characters"
    if not 4 <= len(words) <= 30:
        return "length"
    if (len(splits.runs(words, 3)) < len(words) - 2 or seen & splits.runs(words, 4)
            or any(a == b for a, b in zip(words, words[1:]))
            or sum(word.startswith(noun) for word in words) > 1):
        return "repetition"
    if {"i", "i'm", "my", "ai", "ladder", "ladders", "wall", "step", "steps", "sides"} & set(words):
        return "speaks of itself or of the example"


def as_record(row):
    return {"task": row["topic"], "messages": [{"role": "user", "content": row["prompt"]}],
            "response": row["response"]}


def without_rare_words(rows, rarest):
    """The rows, each text cut before its first sentence with a word that fewer than `rarest` texts
    have; rows whose text then no longer mentions their word are left out.

    A word that few texts have is one that a tiny model cannot learn, and often a slip of the pen.
    Cutting makes other words rare, so it is done again until nothing changes.
    """
    while True:
        count = collections.Counter()             # word: texts that have it
        for row in rows:
            count.update(set(splits.normalise(row["response"])))

        def common(sentence):
            return all(count[word] >= rarest for word in splits.normalise(sentence))

        texts = (" ".join(itertools.takewhile(common, sentences(row["response"]))) for row in rows)
        cut = [{**row, "response": text} for row, text in zip(rows, texts)
               if mentions(text, row["word"])]
        if cut == rows:
            return rows
        rows = cut


def without_near_duplicates(rows):
    """The rows, less those that share half of their runs of four words with an earlier answer to
    the same prompt."""
    seen, unique = collections.defaultdict(list), []
    for row in rows:
        runs, earlier = splits.runs(splits.normalise(row["response"]), 4), seen[row["prompt"]]
        if all(len(runs & other) < len(runs) / 2 for other in earlier):
            earlier.append(runs)
            unique.append(row)
    return unique


def filter_records(args):
    """Records of the real chat model -> the committed corpus; counts what was dropped and why."""
    dropped, rows, records = collections.Counter(), [], files.read_jsonl(args.records)
    source = {row["prompt"]: row for row in all_prompts()}
    for number, record in enumerate(records, 1):
        messages = files.messages_of(record)
        row = source.get(messages[-1]["content"]) if messages else None
        if row is None:
            raise ValueError(f"{args.records}, record {number}: answers none of the prompts that "
                             f"data/tiny_world.py prompts writes; generate it from them")
        text, reason = cleaned(record["response"], row)
        if reason:
            dropped[reason] += 1
        else:
            rows.append({**row, "response": text, "id": record["id"]})
    rows.sort(key=lambda row: row["id"])          # the order in which a batch ends decides nothing
    common = without_rare_words(rows, args.rarest)
    unique = without_near_duplicates(common)
    # No training answer near a held-out one.
    held_out = [row for row in unique if row["kind"] == "pair" and row["held_out"]]
    training = [row for row in unique if row["kind"] == "pair" and not row["held_out"]]
    passages = [row for row in unique if row["kind"] == "passage"]
    near = {i for i, *_ in splits.overlaps(map(as_record, training), map(as_record, held_out))}
    training = [row for i, row in enumerate(training) if i not in near]
    dropped.update({"rare word": len(rows) - len(common), "near a held-out pair": len(near),
                    "near duplicate": len(common) - len(unique)})
    print(f"{len(records)} records; dropped: " + ", ".join(
        f"{reason} {n}" for reason, n in dropped.most_common()))
    for name, part, keys in (
            ("passages", passages, ("topic", "word", "response")),
            ("pairs", training + held_out, ("topic", "word", "held_out", "prompt", "response"))):
        path = args.out / f"{name}.jsonl.gz"
        files.write_jsonl(path, [{key: row[key] for key in keys} for row in part])
        words = [w for row in part for w in splits.normalise(row["response"])]
        print(f"{path}: {len(part)} texts, {len(words)} words, {len(set(words))} different")


# ---- The committed corpus -> what make demo reads ----------------------------------------------

def prepare(args):
    """The committed corpus -> what the stages of `make demo` read, under args.out."""
    tok = tokenizer.load(args.tokenizer)
    passages = files.read_jsonl(FOLDER / "passages.jsonl.gz")
    pairs = files.read_jsonl(FOLDER / "pairs.jsonl.gz")
    source = [{"name": "data/tiny_world/passages.jsonl.gz", "licence": "Apache-2.0 (the model's)",
               "documents": len(passages)}]
    # Each passage under a heading, as in an encyclopedia: that is where the target learns to write
    # about what was named, and so to answer about words that it was never asked about.
    documents = [f"{heading.format(row['word'])} {row['response']}"
                 for heading, row in zip(itertools.cycle(WORLD["headings"]), passages)]
    counts = pretrain_text.write_tokens(args.out / "pretrain", [tok.encode(d) for d in documents],
                                        source, tok, 0.05, args.seed)
    # Conversations to tune on, and the passages again, so that words which no question names are
    # not forgotten.
    training = [row for row in pairs if not row["held_out"]]
    files.write_jsonl(args.out / "chat.jsonl", [as_record(row) for row in training] + [
        {"task": "passage", "messages": [], "response": d, "ended": False} for d in documents])
    # Distillation prompts: the training questions, without the topic that is kept out.
    questions = {row["prompt"]: {"task": row["topic"], "prompt": row["prompt"]} for row in training
                 if row["topic"] != OUT_OF_DISTRIBUTION}
    files.write_jsonl(args.out / "prompts.jsonl", questions.values())
    # Evaluation: all questions about held-out words, half of the words for development and half for
    # test.
    asked = [row for row in all_prompts() if row["kind"] == "pair" and row["held_out"]]
    words = list(dict.fromkeys(row["word"] for row in asked))
    for name, half in (("dev", words[::2]), ("test", words[1::2])):
        rows = [{"task": "kept out: jobs" if row["topic"] == OUT_OF_DISTRIBUTION else "topics",
                 "prompt": row["prompt"]} for row in asked if row["word"] in half]
        random.Random(args.seed).shuffle(rows)               # so that --limit takes of every topic
        files.write_jsonl(args.out / f"{name}.jsonl", rows)
    print(f"{args.out}: {counts['train_tokens']:,} tokens to pretrain on, {len(training)} "
          f"conversations, {len(questions)} prompts to distill from, {len(rows)} to test with")


def main():
    parser = files.Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    sub = commands.add_parser("prompts", help="write the prompts for the real chat model")
    files.add_flags(sub, ("prompts", Path("out/tiny-corpus/prompts.jsonl"), Path, "file to write"))

    sub = commands.add_parser("filter", help="its answers -> the committed corpus")
    files.add_flags(sub, ("out", FOLDER, Path, "folder to write"),
                    ("records", Path("out/tiny-corpus/records.jsonl"), Path, "the answers"),
                    ("rarest", 3, "[1, inf)", "texts that a word must occur in"))

    sub = commands.add_parser("prepare", help="the committed corpus -> what make demo reads")
    files.add_flags(sub, ("out", Path("out/tiny"), Path, "folder to write"),
                    ("tokenizer", Path("out/tiny/tokenizer"), Path, "folder with the tokenizer"),
                    ("seed", 0, "[0, 9e18]", "same seed, same files"))
    args = parser.parse_args()
    functions = {"prompts": prompts, "filter": filter_records, "prepare": prepare}
    functions[args.command](args)


if __name__ == "__main__":
    files.run(main)
