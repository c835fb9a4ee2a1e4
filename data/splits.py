"""Three splits that must not touch: is a held-out prompt, or a near copy, in the training data?

    python data/splits.py                                          dev prompts against test prompts
    python data/splits.py --train out/records.jsonl                training records against both
    python data/splits.py --train out/records.jsonl --drop out/clean.jsonl
                                                           writes the records without near copies

A near copy: equal after normalising (case, punctuation, spaces), or a shared run of 8 words in the
instruction, or of 13 words in the answer. Results on prompts that the drafter saw in training would
flatter it.
"""

import sys
import unicodedata
from pathlib import Path

if not __package__:  # run as a script: sys.path[0] is data/, the root is one up
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from data import files

INSTRUCTION_WORDS, ANSWER_WORDS = 8, 13
STANDARD = [Path("data/prompts/test.jsonl"), Path("data/prompts/dev.jsonl")]


def normalise(text):
    """The words of a text as a tuple: compatibility forms and case folded, letters and digits."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return tuple("".join(c if c.isalnum() else " " for c in text).split())


def runs(words, length):
    """Every run of `length` words of a tuple, as a set of tuples."""
    return {words[i:i + length] for i in range(len(words) - length + 1)}


def texts(row):
    """(instructions, answer) of a prompt or record: the user's turns and the response, as words."""
    instructions = [m["content"] for m in files.messages_of(row) if m["role"] == "user"]
    return [normalise(text) for text in instructions], normalise(row.get("response", ""))


def marks(row, held_out):
    """What a row is known by: {(kind, words)}. A training row and a held-out one that share a mark
    are near copies. A held-out prompt must not be in an answer, either."""
    instructions, response = texts(row)
    found = {("equal", words) for words in instructions}
    found |= {("instruction", run) for one in instructions for run in runs(one, INSTRUCTION_WORDS)}
    answers = [*instructions, response] if held_out else [response]
    return found | {("answer", run) for words in answers for run in runs(words, ANSWER_WORDS)}


def overlaps(training, held_out):
    """[(training index, held-out index, kind, words)] of all near copies; rows are prompts or
    records (dicts).

    kind: "equal", "instruction" (8 words shared) or "answer" (13 words shared by a training answer
    and a held-out prompt or answer).
    """
    known, findings = {}, []                                            # known: {mark: index}
    for index, row in enumerate(held_out):
        for mark in marks(row, held_out=True):
            known.setdefault(mark, index)
    for index, row in enumerate(training):
        # One finding a row, always the same one: equal before all others.
        found = [(mark[0] != "equal", known[mark], *mark)
                 for mark in marks(row, held_out=False) if mark in known]
        if found:
            _, match, kind, words = min(found)
            findings.append((index, match, kind, " ".join(words)))
    return findings


def read(path):
    """[(path, row number, row)] of a file of prompts or records.

    ValueError names a row that has no text to compare: it would pass as clean.
    """
    def has_text(row):
        messages = files.messages_of(row)
        if messages is None or not isinstance(row.get("response", ""), str):
            return False
        instructions, answer = texts(row)
        # Without messages it is a document, written from a bare start: only its text is compared.
        return instructions or answer and not messages

    rows = files.read_rows(path, "row", has_text, 'a text "prompt" or "messages" with a user\'s '
                           'turn, and in a record a text "response"; mend or delete it')
    return [(path, number, row) for number, row in enumerate(rows, 1)]


def main():
    parser = files.Parser(description=__doc__)
    parser.add_argument("--train", type=Path, nargs="+", default=STANDARD[1:],
                        help="prompts or records (default: dev)")
    parser.add_argument("--held-out", type=Path, nargs="+",
                        help="prompts (default: test, and dev where --train is not dev)")
    parser.add_argument("--drop", type=Path, metavar="OUT",
                        help="write the training rows without the offenders")
    args = parser.parse_args()
    trained = {path.resolve() for path in args.train}
    held_paths = args.held_out or [path for path in STANDARD if path.resolve() not in trained]
    if not held_paths:
        raise ValueError("--train names every standard split: give --held-out FILE to compare with")
    held_out = [entry for path in held_paths for entry in read(path)]
    training = [entry for path in args.train for entry in read(path)]
    findings = overlaps([row for *_, row in training], [row for *_, row in held_out])
    for index, match, kind, words in findings:
        (path, number, _), (other, its, _) = training[index], held_out[match]
        print(f"{path} row {number} ~ {other} row {its}: {kind}: {words}")
    print(f"{len(training)} training rows, {len(held_out)} held out: {len(findings)} near copies")
    if args.drop:
        offenders = {index for index, *_ in findings}
        kept = [row for index, (*_, row) in enumerate(training) if index not in offenders]
        files.write_jsonl(args.drop, kept)
        print(f"wrote {args.drop}: {len(kept)} rows")
    elif findings:
        sys.exit(1)


if __name__ == "__main__":
    files.run(main)
