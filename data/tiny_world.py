"""A tiny world: a small, real language that a model of a few million parameters learns in minutes.

Seven topics of thirty words each; passages about the words, and questions about them with answers,
all written by the real chat model in short, simple sentences. The corpus is committed
(data/tiny_world/); how it was made:

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

# Topic: (its words as they stand in a sentence, the questions asked about each). No question has
# seven words before or after its word, so that two of them share no run of 8 words
# (data/splits.py).
TOPICS = {
    "animals": ("""a dog, a cat, a horse, a cow, a sheep, a goat, a pig, a hen, a duck, a rabbit,
        a mouse, a fox, a bear, a wolf, a lion, a tiger, an elephant, a monkey, a whale, a frog,
        a bee, an ant, a spider, an owl, an eagle, a penguin, a snake, a turtle, a deer, a fish""",
        ["What does {} look like?", "What does {} eat?", "Where does {} live?", "How does {} move?",
         "What does {} do all day?", "Is {} big or small?"]),
    "food": ("""bread, butter, cheese, milk, an egg, an apple, a banana, an orange, a lemon,
        a strawberry, a carrot, a potato, a tomato, an onion, corn, rice, pasta, soup, salad, honey,
        sugar, salt, chocolate, a cake, pizza, tea, orange juice, a sandwich, ice cream, yogurt""",
        ["What does {} taste like?", "What does {} look like?", "How do people eat {}?",
         "Where does {} come from?", "What can you make with {}?", "Is {} good for you?"]),
    "nature": ("""the sun, the moon, a star, a cloud, rain, snow, the wind, a storm, a rainbow,
        a river, a lake, the sea, a beach, an island, a mountain, a forest, a desert, a tree,
        a flower, grass, a leaf, a seed, a stone, sand, ice, fire, spring, summer, autumn,
        winter""",
        ["What does {} look like?", "Why is {} important?", "When do we see {}?",
         "How does {} make people feel?", "What happens to {} at night?",
         "What can you do near {}?"]),
    "things": ("""a chair, a table, a bed, a lamp, a door, a window, a clock, a book, a pen, a cup,
        a spoon, a knife, a plate, a bag, a pillow, a blanket, a broom, an umbrella, a mirror,
        a key, a box, a ball, a kite, a doll, a bicycle, a car, a train, a boat, a phone,
        a candle""",
        ["What does {} look like?", "What is {} used for?", "What is {} made of?",
         "Where do you keep {}?", "Who needs {}?", "How do you clean {}?"]),
    "places": ("""a school, a library, a park, a garden, a farm, a market, a hospital, a kitchen,
        a bakery, a shop, a castle, a bridge, a museum, a zoo, a train station, an airport,
        a harbor, a church, a theater, a bank, a hotel, a village, a city, a playground,
        a restaurant, a factory, a post office, a lighthouse, a swimming pool, a bus stop""",
        ["What does {} look like?", "What can you do at {}?", "What do you see at {}?",
         "Who works at {}?", "Why do people go to {}?", "What do you hear at {}?"]),
    "clothes": ("""a shirt, a dress, a sock, a glove, a scarf, a sweater, a jacket, a boot, a belt,
        a skirt, a cap, a raincoat, a ring, a necklace, a watch, a button, a pocket, a helmet,
        a uniform, a sandal, a tie, a vest, a costume, a backpack, an apron, a coat, a hat, a shoe,
        a swimsuit, a crown""",
        ["What does {} look like?", "What is {} made of?", "When do people wear {}?",
         "Who wears {}?", "How do you clean {}?", "Is {} soft or hard?"]),
    "jobs": ("""a doctor, a nurse, a teacher, a farmer, a baker, a cook, a driver, a pilot,
        a sailor, a painter, a singer, a dancer, a writer, a carpenter, a plumber, a gardener,
        a fisherman, a firefighter, a police officer, a dentist, a vet, a tailor, a shopkeeper,
        a builder, a mechanic, a librarian, a mail carrier, a scientist, an astronaut, a waiter""",
        ["What does {} do?", "Where does {} work?", "What tools does {} use?",
         "Why do people need {}?", "How do you become {}?", "What does {} wear?"]),
}
EVERY_TOPIC = ["What is {}?", "Tell me about {}.", "Why do people like {}?",
               "Write a short story about {}."]
PASSAGES = ["Write a short, simple paragraph about {}.", "Describe {} in simple words.",
            "Write a few simple facts about {}.", "Tell a child about {}.",
            "What should a child know about {}?"]
HEADINGS = ["About {}.", "Some words on {}.", "Let us talk about {}.",
            "This is about {}, as we know it.", "{}, in simple words."]
# One example says more about style to so small a model than any instruction. What mentions the
# example's word is dropped.
SYSTEM = "Use short sentences and easy words."
EXAMPLES = {
    "pair": ("What is a ladder used for?", "A ladder is used to climb to high places. You put it "
             "against a wall and step up slowly."),
    "passage": ("Tell a child about a ladder.", "A ladder has two long sides and many steps. It is "
                "made of wood or metal. People use it to reach high places, like a roof or the top "
                "of a tree."),
}


# ---- Prompts for the real chat model -----------------------------------------------------------

def words_of(topic):
    """[(word, held out)] of a topic."""
    words = [" ".join(word.split()) for word in TOPICS[topic][0].split(",")]
    return [(word, i % 5 == 4) for i, word in enumerate(words)]


def all_prompts():
    """[{"topic", "kind": "passage" | "pair", "word", "held_out", "prompt"}] in a fixed order."""
    rows = []
    for topic, (_, questions) in TOPICS.items():
        templates = [("pair", template) for template in questions + EVERY_TOPIC]
        templates += [("passage", template) for template in PASSAGES]
        for word, held_out in words_of(topic):
            rows += [{"topic": topic, "kind": kind, "word": word, "held_out": held_out,
                      "prompt": template.format(word)} for kind, template in templates]
    return rows


def prompts(args):
    """Write the prompts for the real chat model."""
    rows = []
    for row in all_prompts():
        question, answer = EXAMPLES[row["kind"]]
        turns = (("system", SYSTEM), ("user", question), ("assistant", answer),
                 ("user", row["prompt"]))
        rows.append({"task": row["topic"], "messages": [
            {"role": role, "content": content} for role, content in turns]})
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


def filter_records(args):
    """Records of the real chat model -> the committed corpus; counts what was dropped and why."""
    dropped, rows, records = collections.Counter(), [], files.read_jsonl(args.records)
    source = {row["prompt"]: row for row in all_prompts()}
    for number, record in enumerate(records, 1):
        messages = files.messages_of(record)
        row = source.get(messages[-1]["content"]) if messages else None
        if row is None:
            raise ValueError(f"{args.records}, record {number}: answers none of the prompts made "
                             f"here; generate it from {args.prompts}")
        text, reason = cleaned(record["response"], row)
        if reason:
            dropped[reason] += 1
        else:
            rows.append({**row, "response": text, "id": record["id"]})
    rows.sort(key=lambda row: row["id"])          # the order in which a batch ends decides nothing
    common = without_rare_words(rows, args.rarest)
    dropped["rare word"] = len(rows) - len(common)

    # Near duplicates: answers to one prompt that share half of their runs of four words with an
    # earlier one.
    seen, unique = collections.defaultdict(list), []
    for row in common:
        runs, earlier = splits.runs(splits.normalise(row["response"]), 4), seen[row["prompt"]]
        if any(len(runs & other) >= len(runs) / 2 for other in earlier):
            dropped["near duplicate"] += 1
        else:
            earlier.append(runs)
            unique.append(row)

    # No training answer near a held-out one.
    passages = [row for row in unique if row["kind"] == "passage"]
    pairs = [row for row in unique if row["kind"] == "pair"]
    training, held_out = ([row for row in pairs if row["held_out"] is out] for out in (False, True))
    near = {index for index, *_ in splits.overlaps([as_record(row) for row in training],
                                                   [as_record(row) for row in held_out])}
    dropped["near a held-out pair"] += len(near)
    training = [row for i, row in enumerate(training) if i not in near]
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
    documents = [f"{HEADINGS[i % len(HEADINGS)].format(row['word'])} {row['response']}"
                 for i, row in enumerate(passages)]
    counts = pretrain_text.write_tokens(args.out / "pretrain", [tok.encode(d) for d in documents],
                                        source, tok, 0.05, args.seed)
    # Conversations to tune on, and the passages again, so that words which no question names are
    # not forgotten.
    training = [row for row in pairs if not row["held_out"]]
    files.write_jsonl(args.out / "chat.jsonl", [as_record(row) for row in training] + [
        {"task": "passage", "messages": [], "response": d, "ended": False} for d in documents])
    # Distillation prompts: the training questions, without the topic that is kept out.
    questions = list(dict.fromkeys((row["topic"], row["prompt"]) for row in training
                                   if row["topic"] != OUT_OF_DISTRIBUTION))
    files.write_jsonl(args.out / "prompts.jsonl", [
        {"task": topic, "prompt": prompt} for topic, prompt in questions])
    # Evaluation: all questions about held-out words, half of the words for development and half for
    # test.
    asked = [row for row in all_prompts() if row["kind"] == "pair"]
    for name, parity in (("dev", 0), ("test", 1)):
        half = {topic: [w for w, out in words_of(topic) if out][parity::2] for topic in TOPICS}
        rows = [{"task": "kept out: jobs" if row["topic"] == OUT_OF_DISTRIBUTION else "topics",
                 "prompt": row["prompt"]} for row in asked if row["word"] in half[row["topic"]]]
        random.Random(args.seed).shuffle(rows)               # so that --limit takes of every topic
        files.write_jsonl(args.out / f"{name}.jsonl", rows)
    print(f"{args.out}: {counts['train_tokens']:,} tokens to pretrain on, {len(training)} "
          f"conversations to tune on, {len(questions)} prompts to distill from, {len(rows)} to "
          f"test with")


def main():
    parser = files.Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    corpus, tiny = Path("out/tiny-corpus"), Path("out/tiny")

    sub = commands.add_parser("prompts", help="write the prompts for the real chat model")
    sub.set_defaults(function=prompts)
    sub.add_argument("--prompts", type=Path, default=corpus / "prompts.jsonl")

    sub = commands.add_parser("filter", help="its answers -> the committed corpus")
    sub.set_defaults(function=filter_records)
    sub.add_argument("--prompts", type=Path, default=corpus / "prompts.jsonl")
    sub.add_argument("--records", type=Path, default=corpus / "records.jsonl")
    sub.add_argument("--out", type=Path, default=FOLDER)
    files.add_flags(sub, ("rarest", 3, "[1, inf)", "texts that a word must occur in"))

    sub = commands.add_parser("prepare", help="the committed corpus -> token files, conversations "
                              "and prompts")
    sub.set_defaults(function=prepare)
    sub.add_argument("--tokenizer", type=Path, default=tiny / "tokenizer")
    sub.add_argument("--out", type=Path, default=tiny)
    files.add_flags(sub, ("seed", 0, "[0, 9e18]", "same seed, same files"))
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    files.run(main)
