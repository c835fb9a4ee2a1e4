"""One tokenizer interface over the two kinds that Llama-style models come with.

`tokenizer.model` is SentencePiece (Llama 2, TinyLlama); `tokenizer.json` is byte-level BPE (SmolLM2, Llama 3).
`load(folder)` takes whichever the folder has, with `tokenizer_config.json` for the special tokens and the
chat template. Two rules hold throughout:

- Text is text. A user who types "<|im_end|>" gets those characters, never the control token: only the chat
  template may write control tokens, or a user could forge the assistant's turn.
- Decoding goes over bytes. One character may span several tokens, so a stream prints a character when its last
  byte has come, and never half of one.

    python data/tokenizer.py models/smollm2-135m-instruct "Some text"        shows how a text is cut
    python data/tokenizer.py --train data/tiny_world/*.jsonl.gz --out out/tiny/tokenizer   trains the tiny world's
"""

import argparse
import codecs
import functools
import hashlib
import io
import json
import re
import sys
from pathlib import Path

if not __package__:  # run as a script: sys.path[0] is data/, the root is one up
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from data import files


def load(folder):
    """The tokenizer of a model folder. ValueError if the folder has none, or one that cannot be read."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected a model folder with a tokenizer "
                         f"(python data/smollm2.py writes models/smollm2-135m-instruct)")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise ValueError(f"{folder}: holds neither tokenizer.json nor tokenizer.model; copy the target's tokenizer files there")
    return Tokenizer(folder)


def byte_level_alphabet():
    """Byte-level BPE writes each of the 256 bytes as one visible character; this is that table, {character: byte}.

    Printable bytes stand for themselves, the other 68 for the characters from 256 up (GPT-2's convention).
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{chr(byte): byte for byte in printable}, **{chr(256 + i): byte for i, byte in enumerate(others)}}


def load_pair(target, draft):
    """The tokenizer that two model folders share. ValueError if they do not."""
    tok, other = load(target), load(draft)
    if tok.fingerprint != other.fingerprint:
        raise ValueError(f"{draft} has another tokenizer than {target} ({other.vocab_size} and "
                         f"{tok.vocab_size} tokens, not the same ones): a drafter must share its "
                         f"target's tokenizer")
    return tok


class Tokenizer:
    """Text to ids and back. Ids are ints in [0, vocab_size).

    eos_ids: tokens that end a turn; eos_id the first of them. document_id separates plain documents.
    fingerprint: equal for two tokenizers exactly if every id means the same in both.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        config = self._json("tokenizer_config.json")
        if (self.folder / "tokenizer.json").is_file():
            self._load_bpe()
        else:
            self._load_sentencepiece()
        self.vocab_size = len(self._bytes)
        self.chat_template = config.get("chat_template")
        if (self.folder / "chat_template.jinja").is_file():  # where transformers 5 puts it when it saves
            self.chat_template = (self.folder / "chat_template.jinja").read_text(encoding="utf-8")
        named = {name: self._named(config.get(f"{name}_token")) for name in ("bos", "eos", "pad", "unk")}
        self._special_text = {name: self._pieces[i] for name, i in named.items() if i is not None}
        self.bos_id, self.eos_id = named["bos"], named["eos"]
        self.pad_id = named["pad"] if named["pad"] is not None else self.eos_id
        # generation_config.json may list several end tokens (Llama 3 does): all of them end a turn.
        listed = self._json("generation_config.json").get("eos_token_id")
        listed = [] if listed is None else listed if isinstance(listed, list) else [listed]
        self.eos_ids = tuple(dict.fromkeys(([] if self.eos_id is None else [self.eos_id]) + listed))
        self.document_id = self.controls.get("<|endoftext|>", self.eos_id)
        # Only markers that stand for control tokens split a rendered chat; longest first, so none hides in another.
        markers = sorted(self.controls, key=len, reverse=True)
        self._markers = re.compile("|".join(map(re.escape, markers)) or r"(?!)")
        self.fingerprint = hashlib.sha256(json.dumps(self._pieces).encode()).hexdigest()[:16]

    def _json(self, name):
        path = self.folder / name
        if not path.is_file():
            return {}
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: not valid JSON ({error.msg}); copy the file again") from None

    def _named(self, token):
        text = token.get("content") if isinstance(token, dict) else token  # older files write a dict
        return self._ids.get(text)

    def _load_bpe(self):
        try:
            import tokenizers
        except ImportError:
            raise ValueError("tokenizer.json needs the package tokenizers: pip install -r requirements-real.txt") from None
        path = self.folder / "tokenizer.json"
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for a damaged file
            raise ValueError(f"{path}: not a readable tokenizer ({error}); copy the file again") from None
        backend.encode_special_tokens = True  # markers in a text are cut like any other characters
        added = backend.get_added_tokens_decoder()
        self._ids = backend.get_vocab(with_added_tokens=True)
        self._pieces = [None] * (max(self._ids.values()) + 1)
        for piece, i in self._ids.items():
            self._pieces[i] = piece
        self.controls = {token.content: i for i, token in added.items() if token.special}
        alphabet = byte_level_alphabet()
        control_ids = set(self.controls.values())
        self._bytes = [b"" if piece is None or i in control_ids
                       else bytes(map(alphabet.get, piece)) if all(c in alphabet for c in piece)
                       else piece.encode("utf-8") for i, piece in enumerate(self._pieces)]
        self._encode = lambda text, first: backend.encode(text, add_special_tokens=False).ids
        self._leading_space = False

    def _load_sentencepiece(self):
        import sentencepiece

        path = self.folder / "tokenizer.model"
        try:
            backend = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except Exception as error:  # RuntimeError or OSError, by version
            raise ValueError(f"{path}: not a readable SentencePiece model ({error}); copy the file again") from None
        self._pieces = [backend.id_to_piece(i) for i in range(backend.vocab_size())]
        self._ids = {piece: i for i, piece in enumerate(self._pieces)}
        self.controls = {piece: i for i, piece in enumerate(self._pieces) if backend.is_control(i)}
        self._bytes = [b"" if backend.is_control(i) else bytes([int(piece[3:5], 16)]) if backend.is_byte(i)
                       else " \u2047 ".encode() if backend.is_unknown(i)
                       else piece.replace("\u2581", " ").encode("utf-8") for i, piece in enumerate(self._pieces)]
        # Many SentencePiece models put a space before the text ("dummy prefix"): decoding takes it away again, and
        # inside a chat only a text that opens the prompt gets one, as transformers does it (legacy=False).
        self._leading_space = backend.encode("a", out_type=str)[0].startswith("\u2581")
        anchor = self._pieces.index("<0x0A>") if "<0x0A>" in self._ids else None
        prefix = backend.encode("\n") if anchor is not None else []

        def encode(text, first):
            if first or not self._leading_space or not prefix:
                return backend.encode(text)
            return backend.encode("\n" + text)[len(prefix):]  # a newline takes the dummy prefix, then both go

        self._encode = encode

    def encode(self, text):
        """Ids of a plain text; no beginning-of-sequence token, and markers in the text are only characters."""
        return self._encode(text, True)

    def decode(self, ids):
        """The text of ids; control tokens are left out, bytes that are no character become U+FFFD.

        A SentencePiece text loses the one space that encoding put before it.
        """
        stream = self.stream()
        return "".join(map(stream.push, ids)) + stream.flush()

    def stream(self, continuing=False):
        """A decoder for tokens that come one by one; `continuing`: text stands before it, keep a leading space."""
        return Stream(self._bytes, drop_space=self._leading_space and not continuing)

    def piece(self, token):
        """The bytes one token stands for; b"" for a control token."""
        return self._bytes[token]

    @functools.cached_property
    def byte_ids(self):
        """The tokens of one byte each: with them any text can be written."""
        return [token for token in range(self.vocab_size) if len(self.piece(token)) == 1]

    @functools.cached_property
    def _template(self):
        if not self.chat_template:
            raise ValueError(f"{self.folder}: its tokenizer_config.json has no chat_template, so it is not a chat model")
        # A chat template is a program that came with the weights: it runs in jinja2's sandbox (jinja2 comes with
        # torch), with the options and the two helpers that transformers gives it.
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

        def raise_exception(message):
            raise ValueError(f"the chat template refuses these messages: {message}")

        environment.globals["raise_exception"] = raise_exception
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        return environment.from_string(self.chat_template)

    def chat_prompt(self, messages, add_generation_prompt=True):
        """Ids of a conversation, ready for the assistant's answer.

        messages: [{"role": "system" | "user" | "assistant", "content": text}, ...]. Equal to transformers'
        apply_chat_template(messages, add_generation_prompt=True), except that markers inside a content stay text.
        ValueError if the template refuses the messages.
        """
        contents = "".join(message["content"] for message in messages)
        # A marker inside a content is hidden behind one character that occurs in no content while the template
        # runs, then put back into the text between the template's own markers.
        hidden = {}
        for marker in self._markers.findall(contents):
            if marker not in hidden.values():
                spare = (chr(code) for code in range(0xE000, 0xF900))  # Unicode's private use area
                hidden[next(c for c in spare if c not in contents and c not in hidden)] = marker

        def hide(text):
            for character, marker in hidden.items():
                text = text.replace(marker, character)
            return text

        safe = [{**message, "content": hide(message["content"])} for message in messages]
        rendered = self._template.render(messages=safe, add_generation_prompt=add_generation_prompt,
                                         **{f"{name}_token": text for name, text in self._special_text.items()})
        ids, end, first = [], 0, True
        for match in [*self._markers.finditer(rendered), None]:
            text = rendered[end:match.start() if match else len(rendered)]
            for character, marker in hidden.items():
                text = text.replace(character, marker)
            if text:
                ids += self._encode(text, first)
            if match:
                ids.append(self.controls[match.group()])
                end, first = match.end(), False
        return ids


class Stream:
    """Incremental decoding: push(id) returns the characters that this token completed, often none or several."""

    def __init__(self, pieces, drop_space):
        self._pieces, self._drop_space = pieces, drop_space
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token):
        """New whole characters after this token. ValueError if the id is outside the vocabulary."""
        if not 0 <= token < len(self._pieces):
            raise ValueError(f"token {token} is outside the vocabulary of {len(self._pieces)}: the wrong tokenizer?")
        text = self._decoder.decode(self._pieces[token])
        if self._drop_space and text:
            self._drop_space = False
            text = text.removeprefix(" ")
        return text

    def flush(self):
        """What is left at the end: U+FFFD if the last character never became whole, else nothing."""
        return self._decoder.decode(b"", final=True)


def train(texts, folder, vocab_size):
    """Train a SentencePiece tokenizer with chat markers on an iterable of texts and write its folder.

    Byte fallback: any character can be written, if need be byte by byte, so there is no unknown token in practice. One
    thread and no sampling: same texts, same bytes.
    """
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=vocab_size, byte_fallback=True, num_threads=1,
        character_coverage=1.0, unk_id=0, bos_id=-1, eos_id=-1, pad_id=-1, control_symbols=CONTROLS, minloglevel=2)
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": False, "unk_token": "<unk>", "eos_token": "<|end|>",
              "pad_token": "<|endoftext|>", "chat_template": CHAT_TEMPLATE, "model_max_length": 512}
    for name, content in (("tokenizer.model", model.getvalue()), ("tokenizer_config.json", (json.dumps(config, indent=1) + "\n").encode())):
        with files.atomic(Path(folder) / name) as temporary:
            temporary.write_bytes(content)


CONTROLS = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
CHAT_TEMPLATE = ("{% for message in messages %}{{ '<|' + message['role'] + '|> ' + message['content'] + '<|end|>' }}{% endfor %}"
                 "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("show", nargs="*", metavar="FOLDER TEXT", help="show how this folder's tokenizer cuts a text")
    parser.add_argument("--train", type=Path, nargs="+", metavar="FILE", help='JSON lines of {"prompt", "response"}: train a tokenizer on them')
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--out", type=Path, default=Path("out/tiny/tokenizer"))
    args = parser.parse_args()
    if args.train:
        texts = [row[key] for path in args.train for row in files.read_jsonl(path) for key in ("prompt", "response") if key in row]
        train(texts, args.out, args.vocab_size)
        digest = hashlib.sha256((args.out / "tokenizer.model").read_bytes()).hexdigest()
        print(f"wrote {args.out}: {load(args.out).vocab_size} pieces from {len(texts)} texts, tokenizer.model sha256 {digest[:16]}")
    elif len(args.show) == 2:
        tokenizer = load(args.show[0])
        ids = tokenizer.encode(args.show[1])
        for token in ids:
            print(f"{token:6d}  {tokenizer.piece(token)!r}")
        print(f"{len(ids)} tokens; decoded again: {tokenizer.decode(ids)!r}")
    else:
        raise ValueError('give a FOLDER and "some text", or --train FILE...')


if __name__ == "__main__":
    files.run(main)
