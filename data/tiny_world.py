"""A tiny world: a small, real language that a model of a few million parameters learns in minutes on a laptop.

Seven topics of thirty words each; passages about the words, and questions about them with answers, all written by the
real chat model in short, simple sentences. The corpus is committed (data/tiny_world/); how it was made:

    python data/tiny_world.py prompts                                        -> out/tiny-corpus/prompts.jsonl
    python distill.py generate --target models/smollm2-135m-instruct --prompts out/tiny-corpus/prompts.jsonl \\
                      --temperatures 0.2 0.4 0.6 0.5 0.6 0.7 --per-prompt 6 --max-new-tokens 56 --batch-size 192 --dtype bfloat16 \\
                      --out out/tiny-corpus/records.jsonl
    python data/tiny_world.py filter                                         -> data/tiny_world/*.jsonl.gz

and what `make demo` makes of it:

    python data/tiny_world.py prepare                                        -> out/tiny/

Every fifth word of each topic is held out: questions about it are in no training set, though passages about it are in
the pretraining text (a reader meets words before being asked about them). Questions about JOBS are answered by the chat
target, but they are in no distillation prompt: the drafter's out-of-distribution task.
"""

import argparse
import collections
import itertools
import random
import re
import sys
from pathlib import Path

if not __package__:  # run as a script: sys.path[0] is data/, the root is one up
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from data import files, splits

FOLDER = Path(__file__).resolve().parent / "tiny_world"
OUT_OF_DISTRIBUTION = "jobs"

# Topic: (its words as they stand in a sentence, the questions asked about each). No question has seven words before or
# after its word, so that two of them share no run of 8 words (data/splits.py).
TOPICS = {
    "animals": ("""a dog, a cat, a horse, a cow, a sheep, a goat, a pig, a hen, a duck, a rabbit, a mouse, a fox, a bear, a wolf,
        a lion, a tiger, an elephant, a monkey, a whale, a frog, a bee, an ant, a spider, an owl, an eagle, a penguin, a snake,
        a turtle, a deer, a fish""",
        ["What does {} look like?", "What does {} eat?", "Where does {} live?", "How does {} move?", "What does {} do all day?",
         "Is {} big or small?"]),
    "food": ("""bread, butter, cheese, milk, an egg, an apple, a banana, an orange, a lemon, a strawberry, a carrot, a potato,
        a tomato, an onion, corn, rice, pasta, soup, salad, honey, sugar, salt, chocolate, a cake, pizza, tea, orange juice,
        a sandwich, ice cream, yogurt""",
        ["What does {} taste like?", "What does {} look like?", "How do people eat {}?", "Where does {} come from?",
         "What can you make with {}?", "Is {} good for you?"]),
    "nature": ("""the sun, the moon, a star, a cloud, rain, snow, the wind, a storm, a rainbow, a river, a lake, the sea, a beach,
        an island, a mountain, a forest, a desert, a tree, a flower, grass, a leaf, a seed, a stone, sand, ice, fire, spring,
        summer, autumn, winter""",
        ["What does {} look like?", "Why is {} important?", "When do we see {}?", "How does {} make people feel?",
         "What happens to {} at night?", "What can you do near {}?"]),
    "things": ("""a chair, a table, a bed, a lamp, a door, a window, a clock, a book, a pen, a cup, a spoon, a knife, a plate,
        a bag, a pillow, a blanket, a broom, an umbrella, a mirror, a key, a box, a ball, a kite, a doll, a bicycle, a car, a train,
        a boat, a phone, a candle""",
        ["What does {} look like?", "What is {} used for?", "What is {} made of?", "Where do you keep {}?", "Who needs {}?",
         "How do you clean {}?"]),
    "places": ("""a school, a library, a park, a garden, a farm, a market, a hospital, a kitchen, a bakery, a shop, a castle,
        a bridge, a museum, a zoo, a train station, an airport, a harbor, a church, a theater, a bank, a hotel, a village, a city,
        a playground, a restaurant, a factory, a post office, a lighthouse, a swimming pool, a bus stop""",
        ["What does {} look like?", "What can you do at {}?", "What do you see at {}?", "Who works at {}?",
         "Why do people go to {}?", "What do you hear at {}?"]),
    "clothes": ("""a shirt, a dress, a sock, a glove, a scarf, a sweater, a jacket, a boot, a belt, a skirt, a cap, a raincoat,
        a ring, a necklace, a watch, a button, a pocket, a helmet, a uniform, a sandal, a tie, a vest, a costume, a backpack,
        an apron, a coat, a hat, a shoe, a swimsuit, a crown""",
        ["What does {} look like?", "What is {} made of?", "When do people wear {}?", "Who wears {}?", "How do you clean {}?",
         "Is {} soft or hard?"]),
    "jobs": ("""a doctor, a nurse, a teacher, a farmer, a baker, a cook, a driver, a pilot, a sailor, a painter, a singer, a dancer,
        a writer, a carpenter, a plumber, a gardener, a fisherman, a firefighter, a police officer, a dentist, a vet, a tailor,
        a shopkeeper, a builder, a mechanic, a librarian, a mail carrier, a scientist, an astronaut, a waiter""",
        ["What does {} do?", "Where does {} work?", "What tools does {} use?", "Why do people need {}?",
         "How do you become {}?", "What does {} wear?"]),
}
EVERY_TOPIC = ["What is {}?", "Tell me about {}.", "Why do people like {}?", "Write a short story about {}."]
PASSAGES = ["Write a short, simple paragraph about {}.", "Describe {} in simple words.", "Write a few simple facts about {}.",
            "Tell a child about {}.", "What should a child know about {}?"]
HEADINGS = ["About {}.", "Some words on {}.", "Let us talk about {}.", "This is about {}, as we know it.", "{}, in simple words."]
# One example says more about style to so small a model than any instruction. What mentions the example's word is dropped.
SYSTEM = "Use short sentences and easy words."
EXAMPLES = {"pair": ("What is a ladder used for?", "A ladder is used to climb to high places. You put it against a wall and step up slowly."),
            "passage": ("Tell a child about a ladder.", "A ladder has two long sides and many steps. It is made of wood or metal. "
                        "People use it to reach high places, like a roof or the top of a tree.")}


def words_of(topic):
    """[(word, held out)] of a topic."""
    words = [" ".join(word.split()) for word in TOPICS[topic][0].split(",")]
    return [(word, i % 5 == 4) for i, word in enumerate(words)]


def all_prompts():
    """[{"topic", "kind": "passage" | "pair", "word", "held_out", "prompt"}] in a fixed order."""
    rows = []
    for topic, (_, questions) in TOPICS.items():
        for word, held_out in words_of(topic):
            rows += [{"topic": topic, "kind": kind, "word": word, "held_out": held_out, "prompt": template.format(word)}
                     for kind, templates in (("pair", questions + EVERY_TOPIC), ("passage", PASSAGES)) for template in templates]
    return rows


def prompts(args):
    """Write the prompts for the real chat model."""
    rows = all_prompts()
    files.write_jsonl(args.prompts, [{"task": row["topic"], "messages": [
        {"role": "system", "content": SYSTEM}, {"role": "user", "content": EXAMPLES[row["kind"]][0]},
        {"role": "assistant", "content": EXAMPLES[row["kind"]][1]}, {"role": "user", "content": row["prompt"]}]} for row in rows])
    print(f"wrote {args.prompts}: {len(rows)} prompts")


def sentences(text):
    """Whole sentences of a text on one line; what follows the last full stop is left out."""
    return re.findall(r"[^.!?]*[^.!?\s][^.!?]*[.!?]+[\"']?", " ".join(text.split()))


def grams(words, n):
    return [tuple(words[i:i + n]) for i in range(len(words) - n + 1)]


def stem(word):
    """What a text about a word must contain: its last word, without a plural's ending."""
    return re.sub(r"(ies|y|es|s|e)$", "", word.split()[-1])


def cleaned(text, row):
    """(text, None), cut after its last good sentence, or (None, why it is dropped).

    So small a chat model says one or two sensible things and then goes round in circles: the first sentences are kept,
    up to the first that repeats a run of four words, or three within itself, or its noun, or a word at once.
    """
    limit = 3 if row["kind"] == "passage" or "story" in row["prompt"] else 2
    kept, seen = [], set()
    for sentence in sentences(text)[:limit]:
        sentence = sentence.strip()
        words = re.findall(r"[a-z0-9']+", sentence.lower())
        if not re.fullmatch(r"[A-Z][A-Za-z ,.'!?;-]+", sentence):
            reason = "characters"
        elif not 4 <= len(words) <= 30:
            reason = "length"
        elif (len(set(grams(words, 3))) < len(words) - 2 or any(a == b for a, b in zip(words, words[1:]))
              or seen.intersection(grams(words, 4)) or sum(w.startswith(stem(row["word"])) for w in words) > 1):
            reason = "repetition"
        elif {"i", "i'm", "my", "ai", "ladder", "ladders", "wall", "step", "steps", "sides"}.intersection(words):
            reason = "speaks of itself or of the example"
        else:
            kept.append(sentence)
            seen.update(grams(words, 4))
            continue
        break
    else:
        reason = "no whole sentence"
    if not kept:
        return None, reason
    text = " ".join(kept)
    return (text, None) if re.search(rf"\b{stem(row['word'])}", text.lower()) else (None, "off topic")


def as_record(row):
    return {"task": row["topic"], "messages": [{"role": "user", "content": row["prompt"]}], "response": row["response"]}


def filter_records(args):
    """Records of the real chat model -> the committed corpus; counts what was dropped and why."""
    dropped, rows = collections.Counter(), []
    source = {row["prompt"]: row for row in all_prompts()}
    for number, record in enumerate(files.read_jsonl(args.records), 1):
        row = source.get(record["messages"][-1]["content"])
        if row is None:
            raise ValueError(f"{args.records}, record {number}: answers none of the prompts made here; generate it from {args.prompts}")
        text, reason = cleaned(record["response"], row)
        if reason:
            dropped[reason] += 1
        else:
            rows.append({**row, "response": text, "id": record["id"]})
    total = number
    rows.sort(key=lambda row: row["id"])                     # the order of a batch's ends decides nothing

    # A word that few texts have is a word that a tiny model cannot learn, and often a slip of the pen: the text is cut
    # before its sentence. That makes other words rare in their turn, so again until nothing changes.
    while True:
        count = collections.Counter(w for row in rows for w in set(splits.normalise(row["response"])))
        kept = []
        for row in rows:
            good = list(itertools.takewhile(lambda s: all(count[w] >= args.rarest for w in splits.normalise(s)), sentences(row["response"])))
            text = " ".join(s.strip() for s in good)
            if re.search(rf"\b{stem(row['word'])}", text.lower()):
                kept.append({**row, "response": text})
        dropped["rare word"] += len(rows) - len(kept)
        if kept == rows:
            break
        rows = kept

    # Near duplicates: answers to one prompt that share half of their runs of four words with an earlier one.
    seen, unique = {}, []
    for row in rows:
        runs = set(grams(splits.normalise(row["response"]), 4))
        if any(len(runs & other) >= len(runs) / 2 for other in seen.setdefault(row["prompt"], [])):
            dropped["near duplicate"] += 1
        else:
            seen[row["prompt"]].append(runs)
            unique.append(row)

    # No training answer near a held-out one.
    held_out = [row for row in unique if row["kind"] == "pair" and row["held_out"]]
    training = [row for row in unique if row["kind"] == "pair" and not row["held_out"]]
    near = {index for index, *_ in splits.overlaps([as_record(row) for row in training], [as_record(row) for row in held_out])}
    dropped["near a held-out pair"] += len(near)
    training = [row for i, row in enumerate(training) if i not in near]
    passages = [row for row in unique if row["kind"] == "passage"]
    print(f"{total} records; dropped: " + ", ".join(f"{reason} {n}" for reason, n in dropped.most_common()))
    for name, part, keys in (("passages", passages, ("topic", "word", "response")),
                             ("pairs", training + held_out, ("topic", "word", "held_out", "prompt", "response"))):
        files.write_jsonl(args.out / f"{name}.jsonl.gz", [{key: row[key] for key in keys} for row in part])
        words = [w for row in part for w in splits.normalise(row["response"])]
        print(f"{args.out / name}.jsonl.gz: {len(part)} texts, {len(words)} words, {len(set(words))} different")


def prepare(args):
    """The committed corpus -> what the stages of `make demo` read, under args.out."""
    from data import pretrain_text, tokenizer

    tok = tokenizer.load(args.tokenizer)
    passages, pairs = (files.read_jsonl(FOLDER / f"{name}.jsonl.gz") for name in ("passages", "pairs"))
    source = [{"name": "data/tiny_world/passages.jsonl.gz", "licence": "Apache-2.0 (the model's)", "documents": len(passages)}]
    # Each passage under a heading, as in an encyclopedia: that is where the target learns to write about what was named,
    # and so to answer about words that it was never asked about.
    documents = [f"{HEADINGS[i % len(HEADINGS)].format(row['word'])} {row['response']}" for i, row in enumerate(passages)]
    counts = pretrain_text.write_tokens(args.out / "pretrain", [tok.encode(text) for text in documents], source, tok, 0.05, args.seed)
    # Conversations to tune on, and the passages again, so that words which no question names are not forgotten.
    training = [row for row in pairs if not row["held_out"]]
    files.write_jsonl(args.out / "chat.jsonl", [as_record(row) for row in training] + [
        {"task": "passage", "messages": [], "response": text, "ended": False} for text in documents])
    # Distillation prompts: the training questions, without the topic that is kept out.
    questions = list(dict.fromkeys((row["topic"], row["prompt"]) for row in training if row["topic"] != OUT_OF_DISTRIBUTION))
    files.write_jsonl(args.out / "prompts.jsonl", [{"task": topic, "prompt": prompt} for topic, prompt in questions])
    # Evaluation: all questions about held-out words, half of the words for development and half for test.
    for name, parity in (("dev", 0), ("test", 1)):
        rows = []
        for topic in TOPICS:
            held_out = [word for word, out in words_of(topic) if out][parity::2]
            rows += [{"task": "kept out: jobs" if topic == OUT_OF_DISTRIBUTION else "topics", "prompt": row["prompt"]}
                     for row in all_prompts() if row["topic"] == topic and row["kind"] == "pair" and row["word"] in held_out]
        random.Random(args.seed).shuffle(rows)               # so that --limit takes of every topic
        files.write_jsonl(args.out / f"{name}.jsonl", rows)
    print(f"{args.out}: {counts['train_tokens']:,} tokens to pretrain on, {len(training)} conversations to tune on, {len(questions)} "
          f"prompts to distill from, {len(rows)} to test with")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function, text in (("prompts", prompts, "write the prompts for the real chat model"),
                                 ("filter", filter_records, "its answers -> the committed corpus"),
                                 ("prepare", prepare, "the committed corpus -> token files, conversations and prompts")):
        sub = commands.add_parser(name, help=text)
        sub.set_defaults(function=function)
        if name != "prepare":
            sub.add_argument("--prompts", type=Path, default=Path("out/tiny-corpus/prompts.jsonl"))
        if name == "filter":
            sub.add_argument("--records", type=Path, default=Path("out/tiny-corpus/records.jsonl"))
            sub.add_argument("--rarest", type=int, default=3, help="texts that a word must occur in (default 3)")
            sub.add_argument("--out", type=Path, default=FOLDER)
        if name == "prepare":
            sub.add_argument("--tokenizer", type=Path, default=Path("out/tiny/tokenizer"))
            sub.add_argument("--out", type=Path, default=Path("out/tiny"))
            sub.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    files.run(main)
