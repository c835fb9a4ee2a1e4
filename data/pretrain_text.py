"""Pretraining text: plain documents, not chat, as one file of token ids.

    python distill.py generate --target models/smollm2-135m-instruct --documents 192 \\
                      --temperatures 1 --out out/documents.jsonl
    python data/pretrain_text.py --documents out/documents.jsonl
                                                -> out/pretrain/train.bin, eval.bin, meta.json

Two kinds of text, neither of which needs a download. Documentation: the docstrings of packages that
requirements.txt brings along anyway (and of Python itself), read from their source files without
importing them: several million tokens of English with code among it, under BSD-like licences. And
documents that the target writes from its bare start, the token that separates documents: samples of
what it was pretrained on itself.

Format: raw little-endian ids, uint16, or uint32 where the tokenizer has more than 65,536 tokens
(Llama 3: 128,256), documents separated by the tokenizer's document token; meta.json says which,
which tokenizer wrote it and where the text comes from. Same packages, same seed: same bytes.
"""

import ast
import importlib.metadata
import platform
import re
import sys
import sysconfig
from pathlib import Path
from pydoc_data import topics  # Python's language reference, as help() prints it

import numpy as np
import torch

if not __package__:  # run as a script: sys.path[0] is data/, the root is one up
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from data import files, tokenizer

# packages: each with its licence as its own metadata states it; sympy and networkx come with torch.
# markup: that of reStructuredText, in the order in which it goes, with what stays of each pattern.
SOURCES = files.read_json(Path(__file__).with_suffix(".json"))
DTYPES = {"uint16": "<u2", "uint32": "<u4"}
SHORTEST = 40  # words; below that a docstring is a label, not a document


def docstrings(root):
    """Docstrings of all .py files under root, by sorted path; nothing is imported or run."""
    for path in sorted(root.rglob("*.py")):
        folders = path.relative_to(root).parts[:-1]
        if set(SOURCES["skipped_folders"]) & set(folders) or path.name.startswith("test_"):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):        # templates and files for other Python versions
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                if text := ast.get_docstring(node):
                    yield text


def clean(text):
    """A docstring in reStructuredText -> plain prose and code: markup goes, words stay."""
    for markup in SOURCES["markup"]:
        text = re.sub(markup["pattern"], markup["stays"], text)
    text = "\n".join(line.rstrip() for line in text.splitlines())
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def without_seen_paragraphs(text, seen):
    """The paragraphs of a document that no earlier one had (up to case, digits and spaces); adds
    them to `seen`.

    Docstrings repeat themselves (the same parameter explained in forty functions), and a model
    shown the same paragraph forty times learns that paragraph.
    """
    kept = []
    for paragraph in text.split("\n\n"):
        key = " ".join(re.sub(r"[\W\d_]+", " ", paragraph.lower()).split())
        if key not in seen:
            seen.add(key)
            kept.append(paragraph)
    return "\n\n".join(kept)


def mostly_words(text):
    """Whether a document is text rather than tables, formulas or symbols."""
    letters = sum(c.isalpha() or c.isspace() for c in text)
    return len(text.split()) >= SHORTEST and letters >= 0.7 * len(text)


def documentation():
    """Yield (source name, licence, texts) for Python and for each package."""
    python, library = f"Python {platform.python_version()}", Path(sysconfig.get_path("stdlib"))
    reference = [topics.topics[name] for name in sorted(topics.topics)]
    yield f"{python}: language reference (pydoc topics)", "PSF-2.0", reference
    yield f"{python}: docstrings", "PSF-2.0", docstrings(library)
    for package, licence in SOURCES["packages"].items():
        found = importlib.metadata.distribution(package)
        texts = docstrings(Path(found.locate_file(package)))
        yield f"{package} {found.version}: docstrings", licence, texts


def written_by_target(paths, tok):
    """Token lists of the documents in records of `distill.py generate --documents`, as sampled.

    ValueError for a record without them, or a file without records.
    """
    def is_whole(record):
        ids = record.get("response_ids")
        return isinstance(ids, list) and all(
            isinstance(i, int) and 0 <= i < tok.vocab_size for i in ids)

    expected = f"response_ids below {tok.vocab_size}, as distill.py generate --documents writes"
    records = [record for path in paths
               for record in files.read_rows(path, "record", is_whole, expected)]
    return [r["response_ids"] for r in records if len(r["response_ids"]) >= SHORTEST]


def encoded(tok, paths):
    """Yield (source name, licence, documents as lists of ids) of the documentation, then of the
    records in `paths`."""
    seen = set()
    for name, licence, texts in documentation():
        prose = (without_seen_paragraphs(clean(text), seen) for text in texts)
        yield name, licence, [tok.encode(text) for text in prose if mostly_words(text)]
    if paths:
        yield ("written by the target from its bare start", "that of the target's text",
               written_by_target(paths, tok))


def write_tokens(out, documents, sources, tok, eval_fraction, seed):
    """Shuffle documents (lists of ids), split them whole, and write train.bin, eval.bin and
    meta.json into `out`. Returns the number of tokens in each."""
    dtype = "uint16" if tok.vocab_size <= 2 ** 16 else "uint32"
    order = np.random.default_rng(seed).permutation(len(documents))
    held_out, counts = max(1, round(eval_fraction * len(documents))), {}
    (out / "meta.json").unlink(missing_ok=True)         # it vouches for both: first out, last in
    for name, part in (("eval", order[:held_out]), ("train", order[held_out:])):
        ids = np.concatenate([[*documents[i], tok.document_id] for i in part]).astype(DTYPES[dtype])
        counts[f"{name}_tokens"] = len(ids)
        with files.atomic(out / f"{name}.bin") as temporary:
            ids.tofile(temporary)
    made_with = {"vocab_size": tok.vocab_size, "tokenizer_fingerprint": tok.fingerprint,
                 "dtype": dtype}
    files.write_json(out / "meta.json", {**made_with, **counts, "seed": seed, "sources": sources})
    return counts


# ---- Reading it: what train.py and distill.py mix in -------------------------------------------

def read(folder, tok, context):
    """The tokens of folder's train.bin and eval.bin: two arrays, mapped from the files.

    ValueError or OSError if a file is missing, not of this tokenizer (ids mean nothing without it),
    or shorter than one window of context + 1 tokens.
    """
    meta = Path(folder, "meta.json")
    if not meta.is_file():
        raise ValueError(f"{meta}: no such file; python data/pretrain_text.py writes it")
    noted = files.read_json(meta)
    fingerprint, dtype = noted.get("tokenizer_fingerprint"), noted.get("dtype", "uint16")
    if fingerprint != tok.fingerprint:
        raise ValueError(f"{folder} was written with tokenizer {fingerprint}, but {tok.folder} is "
                         f"{tok.fingerprint}: write the token files again with this tokenizer")
    if dtype not in [*DTYPES]:                         # files without it are of the older kind
        raise ValueError(f"{meta}: dtype is {dtype!r}, not one of {[*DTYPES]}; copy it again")
    arrays, width = [], np.dtype(dtype).itemsize
    for path in (Path(folder, "train.bin"), Path(folder, "eval.bin")):
        size = path.stat().st_size
        if size % width or size // width <= context:
            raise ValueError(f"{path}: {size} bytes; expected {width} a token and more than "
                             f"--context {context} tokens: write it again, or lower --context")
        arrays.append(np.memmap(path, dtype=DTYPES[dtype], mode="r"))
        if arrays[-1].max() >= tok.vocab_size:
            raise ValueError(f"{path}: holds token {arrays[-1].max()}, outside the tokenizer's "
                             f"{tok.vocab_size}: write it again with this tokenizer")
    return arrays


def windows(tokens, offsets, context):
    """(len(offsets), context + 1) int64: all but the last are read, all but the first predicted."""
    return torch.from_numpy(np.stack([tokens[o:o + context + 1] for o in offsets]).astype("int64"))


def sample(tokens, batch_size, context, generator):
    """(batch_size, context + 1) int64 windows at random offsets. They run over document boundaries,
    as in GPT's training: the separating token says that one ended."""
    offsets = torch.randint(len(tokens) - context, (batch_size,), generator=generator).tolist()
    return windows(tokens, offsets, context)


def spread(tokens, context, count):
    """(at most count, context + 1) windows, evenly spread over the file; always the same ones."""
    count = min(count, (len(tokens) - 1) // context)
    last = len(tokens) - context - 1
    return windows(tokens, [i * last // max(1, count - 1) for i in range(count)], context)


def main():
    parser = files.Parser(description=__doc__)
    files.add_flags(parser, ("out", Path("out/pretrain"), Path, "folder to write"),
                    ("tokenizer", Path("models/smollm2-135m-instruct"), Path, "target's folder"),
                    ("eval-fraction", 0.01, "(0, 0.5]", "share of documents held out"),
                    ("seed", 0, "[0, 9e18]", "same packages, same seed, same bytes"))
    parser.add_argument("--documents", type=Path, nargs="*", default=[],
                        help="records of distill.py generate --documents, added")
    args = parser.parse_args()
    tok = tokenizer.load(args.tokenizer)
    documents, sources = [], []
    for name, licence, new in encoded(tok, args.documents):
        documents += new
        tokens = sum(map(len, new))
        sources.append({"name": name, "licence": licence, "documents": len(new), "tokens": tokens})
        print(f"{tokens:10,} tokens {len(new):6,} documents  {name}, {licence}", flush=True)
    counts = write_tokens(args.out, documents, sources, tok, args.eval_fraction, args.seed)
    print(f"wrote {args.out}: {counts['train_tokens']:,} training and {counts['eval_tokens']:,} "
          f"evaluation tokens")
    print(f"next: python train.py --model small-drafter --data {args.out} --tokenizer "
          f"{args.tokenizer} --embed-from {args.tokenizer} --out out/drafter-base")


if __name__ == "__main__":
    files.run(main)
