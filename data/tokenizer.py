"""One tokenizer interface over the kinds that Llama-style models come with.

`tokenizer.json` holds byte-level BPE (SmolLM2, Llama 3) or SentencePiece's kind written out
(TinyLlama); `tokenizer.model` is SentencePiece itself (Llama 2). `load(folder)` takes whichever the
folder has, and reads special tokens, end tokens and the chat template from all files beside it.

- Ids and text are those of transformers 5 on the same folder. What is rare is refused, in one
  sentence that names the file and the key, never done in another way.
- Text is text. A user who types "<|im_end|>" gets those characters, never the control token: only
  the chat template may write control tokens, or a user could forge the assistant's turn.
- Decoding goes over bytes. One character may span several tokens, so a stream prints a character
  when its last byte has come, and never half of one.

    python data/tokenizer.py models/smollm2-135m-instruct "Some text"    shows how a text is cut
    python data/tokenizer.py --train data/tiny_world/*.jsonl.gz --out out/tiny/tokenizer
"""

import codecs
import functools
import hashlib
import io
import json
import re
import sys
import traceback
from datetime import datetime
from pathlib import Path

from jinja2 import nodes, sandbox, visitor  # torch needs jinja2, so it is there

if not __package__:  # run as a script: sys.path[0] is data/, the root is one up
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from data import files

# Half a surrogate pair is no text, so nothing from outside holds this character. Inside this file
# it stands before what was typed and looks like a control token.
TYPED = "\ud800"
# Many templates write '<|' + role + '|>', so that a free choice of role could forge control tokens.
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
# What the two kinds of tokenizer files below are made of: the fixed parts of a tokenizer.json as
# LlamaTokenizer has it, and the markers and the config of a tokenizer that is trained here.
FORMS = Path(__file__).with_name("tokenizer_forms.json")


def load(folder):
    """The tokenizer of a model folder. ValueError if it has none, or one that cannot be read."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected a model folder with a tokenizer "
                         f"(python data/smollm2.py writes models/smollm2-135m-instruct)")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise ValueError(f"{folder}: holds neither tokenizer.json nor tokenizer.model; "
                         f"copy the target's tokenizer files there")
    try:
        return Tokenizer(folder)
    except (AttributeError, KeyError, TypeError) as error:  # a key is absent or of another type
        raise ValueError(f"{folder}: a file of its tokenizer is not as transformers writes it "
                         f"({type(error).__name__}: {error}); copy the files again") from error


def load_pair(target, draft):
    """The tokenizer that two model folders share. ValueError if they do not."""
    tok, other = load(target), load(draft)
    if tok.fingerprint != other.fingerprint:
        raise ValueError(f"{draft} has another tokenizer than {target}: they must share one")
    return tok


def copy(source, folder):
    """Copy the tokenizer's files from one model folder into another, which then opens in
    transformers by itself."""
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "vocab.json",
                 "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
                 "merges.txt", "generation_config.json"):
        path, other = Path(source) / name, Path(folder) / name
        if path.is_file() and path.resolve() != other.resolve():
            with files.atomic(other) as temporary:
                temporary.write_bytes(path.read_bytes())


class Tokenizer:
    """Text to ids and back. Ids are ints in [0, vocab_size).

    eos_ids: tokens that end a turn. eos_id, the first of them, is the one that the chat template
    writes after an answer, or the folder's own end token where the template writes none.
    document_id separates plain documents. context: the tokens that the folder says it is made for,
    2048 if it says nothing. controls: {text: id} of the tokens that no typed text
    becomes. fingerprint: equal for two tokenizers exactly if every id means the same in both.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        config = optional_json(self.folder / "tokenizer_config.json")
        in_json = (self.folder / "tokenizer.json").is_file()
        self._path = self.folder / ("tokenizer.json" if in_json else "tokenizer.model")
        (self._read_json if in_json else self._read_sentencepiece)(config)
        named, self.added = added_tokens(self.folder, config, self._vocab, self._listed)
        added = {text: token["id"] for text, token in self.added.items()}
        ids = self._vocab | added
        self._pieces, self.vocab_size = sorted(ids, key=ids.get), len(ids)
        if [ids[piece] for piece in self._pieces] != list(range(len(ids))):
            raise ValueError(f"{self._path}: with the added tokens, the ids of its {len(ids)} "
                             f"tokens are not 0 to {len(ids) - 1}; copy the folder's files again")
        self.fingerprint = hashlib.sha256(json.dumps(self._pieces).encode()).hexdigest()[:16]
        stated = config.get("model_max_length") or 10 ** 30           # 10^30 stands for "unknown"
        self.context = int(stated) if stated < 10 ** 6 else 2048
        self._template = ChatTemplate(self.folder, config, named)
        self.chat_template = self._template.source

        # No typed text becomes a special token, an end token or what the template puts around a
        # turn. The end of a turn is what it writes after an answer: Llama 3's eos_token is not.
        around, after_answer = self._template.around()
        special = {text for text, token in self.added.items() if token.get("special")}
        markers = special.union(text for text in added if re.fullmatch(r"[<\[].+[>\]]", text))
        end = re.search(any_of(markers), after_answer)
        ends = end_ids(self.folder, added, named.get("eos_token"))
        self.eos_ids = tuple(dict.fromkeys(([added[end[0]]] if end else []) + ends))
        self.eos_id = next(iter(self.eos_ids), None)
        self.controls = {text: i for text, i in added.items() if text in special
                         or i in self.eos_ids or text in markers and text in around}
        self.bos_id = added.get(named.get("bos_token"))
        self.pad_id = added.get(named.get("pad_token"), self.eos_id)
        self.document_id = added.get("<|endoftext|>", (ends or self.eos_ids or [None])[0])
        self._forbidden = {*self.controls.values()} - {added.get(named.get("unk_token"))}
        hidden = {*self.eos_ids, *map(added.get, special)}  # no part of a decoded text
        self._bytes = [b"" if i in hidden else self._piece_bytes(piece)
                       for i, piece in enumerate(self._pieces)]
        self._typed = re.compile(any_of(self.controls))
        self._marks = re.compile(f"{TYPED}(?:{any_of(self.controls)})|({any_of(added)})")

    def encode(self, text):
        """Ids of a plain text, without a token for its beginning; markers are only characters.
        ValueError for half a surrogate pair."""
        return self._encode(self._hide(text))

    def _hide(self, value, mark=TYPED):
        """A text, or all texts in a list or dict, with a mark before what looks like a control."""
        if isinstance(value, dict):  # transformers leaves out what is None
            return {key: self._hide(item, mark) for key, item in value.items() if item is not None}
        if not isinstance(value, str):
            return [self._hide(item, mark) for item in value] if isinstance(value, list) else value
        return self._typed.sub(rf"{mark}\g<0>", value.encode("utf-8").decode("utf-8"))

    def _encode(self, text):
        """Ids of a text in which TYPED stands before what only looks like a control token."""
        ids, begin = [], 0
        for match in [*(m for m in self._marks.finditer(text) if m[1]), None]:
            part = text[begin:match.start() if match else None].replace(TYPED, "")
            cut = self._cut(part, begin == 0) if part else []
            if not self._forbidden.isdisjoint(cut):
                raise ValueError(f"{self._path}: this tokenizer cannot tell a control token from "
                                 f"its letters; leave it out of {part[:99]!r}")
            ids += cut + ([self.added[match[1]]["id"]] if match else [])
            begin = match and match.end()
        return ids

    def piece(self, token):
        """The bytes of one token; b"" for a control token. ValueError outside the vocabulary."""
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"token {token} is outside the vocabulary of {self.vocab_size}: "
                             f"the wrong tokenizer?")
        return self._bytes[token]

    @functools.cached_property
    def byte_ids(self):
        """The tokens of one byte each: with them any text can be written."""
        return [token for token in range(self.vocab_size) if len(self.piece(token)) == 1]

    def stream(self):
        """A decoder for tokens that come one by one."""
        return Stream(self)

    def decode(self, ids):
        """The text of ids; control tokens are left out, bytes that are no character become U+FFFD
        (how many, may differ from transformers after tokens <0x00> to <0xFF>)."""
        stream = self.stream()
        return "".join(map(stream.push, ids)) + stream.flush()

    def chat_prompt(self, messages, add_generation_prompt=True):
        """Ids of a conversation, ready for the assistant's answer.

        messages: [{"role": "system" | "user" | "assistant", "content": text}, ...]. Equal to
        transformers' apply_chat_template, except that markers inside a message stay text.
        ValueError if the template refuses the messages, or a role is none of ROLES.
        """
        for role in (message["role"] for message in messages):
            if role not in ROLES:
                raise ValueError(f"the role {role!r} is none of {', '.join(ROLES)}")
        text, plain = (self._template.render(self._hide(messages, mark), add_generation_prompt)
                       for mark in (TYPED, ""))
        if text.replace(TYPED, "") != plain:
            raise ValueError(f"{self._template.origin}: a control token typed into a message "
                             f"changes what the template writes around it; leave it out")
        return self._encode(text)

    def answer_ids(self, messages, answer):
        """Ids of an assistant's answer as the template writes it behind chat_prompt(messages), up
        to the turn's end; where it writes the answer otherwise there, the ids of its text alone.

        encode(answer) may differ: it does not know what stands before the text's first letter.
        """
        if not messages:
            return self.encode(answer)
        prompt = self.chat_prompt(messages)
        whole = self.chat_prompt([*messages, {"role": "assistant", "content": answer}], False)
        if whole[:len(prompt)] != prompt or self.eos_id not in whole[len(prompt):]:
            return self.encode(answer)
        return whole[len(prompt):len(whole) - 1 - whole[::-1].index(self.eos_id)]

    # ---- the two kinds: _vocab {piece: id}, _listed added tokens, _cut(text, whether first) -> ids

    def _read_json(self, config):
        """tokenizer.json, cut by the package tokenizers, without truncation and padding in it."""
        import tokenizers

        document = files.read_json(self._path)
        model, self._listed = document["model"], document.get("added_tokens") or []
        steps = json.dumps([document.get("decoder"), document.get("pre_tokenizer")])
        if is_llama(config) and model["type"] == "BPE" and "ByteLevel" not in steps:
            document = llama_document(document, llama_prefix(config))
        text = json.dumps(document | {"added_tokens": [], "truncation": None, "padding": None})
        # Only the start of a text has a space put before it, where the scheme is "first".
        inner = text.replace('"prepend_scheme": "first"', '"prepend_scheme": "never"')
        try:
            made = {form: tokenizers.Tokenizer.from_str(form) for form in {text, inner}}
            first, rest = made[text], made[inner]
            decode = first.decoder.decode
        except Exception as error:  # the library raises bare Exception for a damaged file
            raise ValueError(f"{self._path}: not readable ({error}); copy it again") from None
        self._vocab = first.get_vocab(with_added_tokens=False)
        self._byte_level = decode(["\u0120"]) == " "
        self._start = {"": "token", " ": "space"}.get(decode(["\u2581\u2581"]), "")

        def cut(text, begins):
            return (first if begins else rest).encode(text, add_special_tokens=False).ids

        self._cut = cut
        # Whatever else the file asks for would change ids or text.
        pieces = [piece for piece in self._vocab if not BYTE.fullmatch(piece) or piece == "<0x41>"]
        data = b"".join(self._piece_bytes(piece, not i) for i, piece in enumerate(pieces))
        normalized = any(token.get("normalized") for token in self._listed)
        cleaned_up = model["type"] != "BPE" and config.get("clean_up_tokenization_spaces")
        refused = {"model.dropout": model.get("dropout"),
                   "clean_up_tokenization_spaces (tokenizer_config.json)": cleaned_up,
                   "decoder": data.decode("utf-8", "replace") != decode(pieces),
                   "added_tokens.normalized": document.get("normalizer") and normalized}
        for key in filter(refused.get, refused):
            raise ValueError(f"{self._path}: {key} is not of a kind that is known here")

    def _read_sentencepiece(self, config):
        """tokenizer.model, with spaces put before texts as transformers' LlamaTokenizer does it.

        The rest is the model's: its normalisation (transformers 5 leaves it out), its way to cut
        (it takes each for BPE), and <unk> for what it cannot write (which it drops).
        """
        import sentencepiece

        if config.get("tokenizer_class") and not is_llama(config):
            raise ValueError(f"{self.folder / 'tokenizer_config.json'}: tokenizer_class "
                             f"{config['tokenizer_class']} needs a tokenizer.json")
        model, prefix = self._path.read_bytes(), llama_prefix(config)
        # In a protocol buffer the last one of two fields counts: these bytes set add_dummy_prefix
        # (field 3) of normalizer_spec (field 3), which is the space before a text.
        try:
            bare, spaced = (sentencepiece.SentencePieceProcessor(model_proto=model + field)
                            for field in (b"\x1a\x02\x18\x00", b"\x1a\x02\x18\x01"))
        except Exception as error:  # RuntimeError or OSError, by version
            raise ValueError(f"{self._path}: not a readable SentencePiece model ({error}); "
                             f"copy the file again") from None
        self._vocab = {bare.id_to_piece(i): i for i in range(bare.vocab_size())}
        self._byte_level, self._start = False, "space" if prefix != "never" else ""
        self._listed, normal = [], bare.normalize(" \n \ufb01 ") == "\u2581\n\u2581\ufb01\u2581"
        for piece, i in self._vocab.items():
            special, data = bare.is_control(i) or bare.is_unknown(i), piece.encode("utf-8")
            # A user defined symbol, as the file writes one: its text, the score 0, the type 4.
            if special or bytes([len(data) % 256]) + data + b"\x15\0\0\0\0\x18\x04" in model:
                self._listed.append({"content": piece, "id": i, "special": special})

        def cut(text, first):
            space = prefix == "always" or prefix == "first" and first
            if normal:
                space = space and text[0] not in " \u2581"
            else:  # a model that normalises drops a space at the beginning
                space = space or text[0].isspace()
            return (spaced if space else bare).encode(text)

        self._cut = cut

    def _piece_bytes(self, piece, first=False):
        """The bytes that a piece stands for; first: at the beginning of a text, where the space
        that encoding puts there goes."""
        if self._byte_level:
            known = BYTE_LEVEL.keys() >= set(piece)
            return bytes(map(BYTE_LEVEL.get, piece)) if known else piece.encode("utf-8")
        space = "" if first and self._start == "token" else " "
        data = (bytes.fromhex(piece[3:5]) if BYTE.fullmatch(piece) else
                piece.replace("\u2581", space).encode("utf-8"))
        return data.removeprefix(b" ") if first and self._start == "space" else data


class Stream:
    """Incremental decoding: push(id) returns the characters that this token completed."""

    def __init__(self, tokenizer):
        self._tokenizer, self._begun = tokenizer, False
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token):
        """New whole characters, often none or several. ValueError outside the vocabulary."""
        data = self._tokenizer.piece(token)
        if data and not self._begun:
            self._begun = True
            data = self._tokenizer._piece_bytes(self._tokenizer._pieces[token], first=True)
        return self._decoder.decode(data)

    def flush(self):
        """What is left at the end: U+FFFD if the last character never became whole, else ""."""
        return self._decoder.decode(b"", final=True)


# ---- what a folder's files say ----

BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
# Byte-level BPE writes each byte as one visible character, printable bytes as themselves and the
# other 68 as the characters from 256 up (GPT-2's way): {character: byte}.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
BYTE_LEVEL = {chr(b): b for b in PRINTABLE} | {chr(256 + i): b for i, b in enumerate(OTHERS)}


def optional_json(path):
    return files.read_json(path) if path.is_file() else {}


def any_of(texts):
    """A regular expression that finds any of these, the longest first; nothing if there is none."""
    return "|".join(map(re.escape, sorted(filter(None, texts), key=len, reverse=True))) or "(?!)"


def is_llama(config):
    return (config.get("tokenizer_class") or "").removesuffix("Fast") == "LlamaTokenizer"


def llama_prefix(config):
    """When transformers' LlamaTokenizer puts a space before a text: always, first or never."""
    prefix = "always" if config.get("legacy") else "first"
    return "never" if config.get("add_prefix_space") is False else prefix


def llama_document(document, prefix):
    """A tokenizer.json of SentencePiece's kind as transformers' LlamaTokenizer reads it: only
    vocabulary and merges are the file's."""
    form = files.read_json(FORMS)["llama"]
    form["model"] = document["model"] | form["model"]
    form["pre_tokenizer"]["prepend_scheme"] = prefix
    form["decoder"]["decoders"][-1]["start"] = int(prefix != "never")
    return document | form


def added_tokens(folder, config, vocab, listed):
    """({"bos_token": text, ...}, {text: token as tokenizer.json writes it, with its "id"}).

    Two more files count where tokenizer_config.json has no added_tokens_decoder, as in folders that
    older versions wrote. ValueError for a token that no file has.
    """
    def text_of(token):
        return token["content"] if isinstance(token, dict) else token

    tokens, decoder = {t["content"]: t for t in listed}, config.get("added_tokens_decoder")
    more = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    older = optional_json(folder / "special_tokens_map.json")
    if decoder is None:
        config, ids = config | older, optional_json(folder / "added_tokens.json")
        tokens = {text: {"content": text, "id": i} for text, i in ids.items()} | tokens
    else:
        config = {"eos_token": older.get("eos_token")} | config
        tokens |= {t["content"]: t | {"id": int(i)} for i, t in decoder.items()}
    usual = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}  # LlamaTokenizer's
    named = {key: text for key, text in usual.items() if is_llama(config) and text in vocab}
    named |= {key: text_of(value) for key, value in config.items() if key.endswith("_token")}
    named = {key: text for key, text in named.items() if text and isinstance(text, str)}
    for text in (*named.values(), *map(text_of, more.values() if isinstance(more, dict) else more)):
        if text in vocab or text in tokens:
            tokens[text] = {"id": vocab.get(text)} | tokens.get(text, {}) | {"special": True}
        elif text != named.get("pad_token"):
            raise ValueError(f"{folder / 'tokenizer_config.json'}: the special token {text!r} is "
                             f"no token of this folder; are its files of several tokenizers?")
    for text, token in tokens.items():
        for flag in filter(token.get, ("single_word", "lstrip", "rstrip")):
            raise ValueError(f"{folder}: the added token {text!r} is {flag}: not known here")
    return named, tokens


def end_ids(folder, added, eos):
    """The ids at which generate() of transformers stops, the eos_token first.

    ValueError for one that is no added token: it would be ordinary text.
    """
    ends = [added[eos]] if eos else []
    for path in (folder / "generation_config.json", folder / "config.json"):
        listed = optional_json(path).get("eos_token_id")
        listed = listed if isinstance(listed, list) else [] if listed is None else [listed]
        for i in (i for i in listed if i not in added.values()):
            raise ValueError(f"{path}: eos_token_id {i} is no special or added token")
        if listed:  # config.json counts where the other is silent
            return ends + listed
    return ends


# ---- chat templates ----

LIMIT = 10_000_000  # characters that a template may make for one prompt: many contexts full
STEP = 20           # what each value and each round of a loop counts besides


class ChatTemplate(sandbox.ImmutableSandboxedEnvironment):
    """A folder's chat template: a program that came with the weights, in jinja2's sandbox with what
    transformers gives it.

    What it makes is counted: forty doublings of a text would fill the memory, nested loops never
    end. A count works in every thread and on every system, where a signal does not. words:
    {"bos_token": text, ...}. source: its text, None where the folder has none; of several it is the
    one named default. ValueError, with file and row, for whatever goes wrong in it.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, folder, config, words):
        super().__init__(trim_blocks=True, lstrip_blocks=True, finalize=self.count,
                         extensions=["jinja2.ext.loopcontrols"])
        self.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
        self.filters |= {"tojson": functools.partial(json.dumps, ensure_ascii=False),
                         "counted": self.count, "rounds": self.rounds}
        path, self.words, self.made = folder / "chat_template.jinja", words, 0
        self.origin, self.source = folder / "tokenizer_config.json", config.get("chat_template")
        if path.is_file():  # where transformers 5 puts it when it saves
            self.origin, self.source = path, path.read_text(encoding="utf-8")
        if isinstance(self.source, list):
            named = {one["name"]: one["template"] for one in self.source}
            self.source = named.get("default", self.source)

    @functools.cached_property
    def template(self):
        # {% generation %} only tells transformers where an answer stands: a block, no more.
        form = r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})"
        return self.from_string(re.sub(form, r"\1\2with\3", self.source))

    def render(self, messages, add_generation_prompt):
        """The conversation as text."""
        if self.source is None:
            raise ValueError(f"{self.origin}: has no chat_template, so it is not a chat model's")
        self.made = 0
        try:
            return self.template.render(**self.words, messages=messages, tools=None, documents=None,
                                        add_generation_prompt=add_generation_prompt)
        except Exception as error:  # a template can raise anything, and jinja2 has its own kinds
            rows = [row for frame, row in traceback.walk_tb(error.__traceback__)
                    if frame.f_code.co_filename == "<template>"]
            row = getattr(error, "lineno", None) or (rows or [1])[-1]
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{self.origin}, chat_template, row {row}: {reason}") from None

    def around(self):
        """(all that it writes around a question and an answer, what it writes after an answer).

        Many templates refuse a system's turn: then it is left out; "" where all are refused.
        """
        talk = [{"role": role, "content": f"The {role}'s text."}
                for role in ("system", "user", "assistant")]
        for messages in (talk, talk[1:]):
            try:
                before, _, rest = self.render(messages, False).partition(talk[1]["content"])
            except ValueError:
                continue
            after = rest.partition(talk[2]["content"])[2]
            return before + after, after
        return "", ""

    def spend(self, amount):
        self.made += amount
        if self.made > LIMIT:
            raise ValueError(f"makes more than {LIMIT:,} characters, or its loops do not end")

    def count(self, value):
        self.spend(size(value))
        return value

    def rounds(self, items, characters):
        for item in items:
            self.spend(STEP + characters)
            yield item

    def call(self, context, function, /, *args, **options):
        self.count([*args, *options.values()])  # a width, or a number of copies
        return self.count(super().call(context, function, *args, **options))

    def call_binop(self, context, operator, left, right):
        if "*" in operator:  # does in one step what others need many for
            self.spend(size(left) * size(right))
        return self.count(super().call_binop(context, operator, left, right))

    def _parse(self, source, name, filename):
        return Counting().visit(super()._parse(source, name, filename)).set_environment(self)


class Counting(visitor.NodeTransformer):
    """Puts what counts into a template: at its filters, its loops, and at each a ~ b."""

    def visit_Filter(self, node):
        return filtered(self.generic_visit(node), "counted")

    def visit_Concat(self, node):
        return self.visit(filtered(nodes.List(node.nodes, lineno=node.lineno), "join"))

    def visit_For(self, node):
        written = sum(len(part.data) for part in node.find_all(nodes.TemplateData))
        node = self.generic_visit(node)
        node.iter = filtered(node.iter, "rounds", nodes.Const(written))
        return node


def filtered(node, name, *args):
    return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)


def size(value):
    """About the characters of a value when it is written, or a number itself; counts to LIMIT."""
    total, rest = 0, [value]
    while rest and total <= LIMIT:
        item = rest.pop()
        total += STEP + (len(item) if isinstance(item, str) else
                         abs(item) if isinstance(item, int) else 0)
        if isinstance(item, (list, tuple, dict)):
            rest += [*item, *item.values()] if isinstance(item, dict) else item
    return total


def raise_exception(message):
    raise ValueError(f"the chat template refuses these messages: {message}")


def strftime_now(form):
    return datetime.now().strftime(form)


# ---- training one ----

def train(texts, folder, vocab_size):
    """Train a SentencePiece tokenizer with chat markers on an iterable of texts; write its folder.

    Byte fallback: any character can be written, if need be byte by byte, so there is no unknown
    token in practice. One thread and no sampling: same texts, same bytes. ValueError if they are
    too few.
    """
    import sentencepiece

    model, form = io.BytesIO(), files.read_json(FORMS)["trained"]
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=model, model_type="bpe", num_threads=1,
            vocab_size=vocab_size, byte_fallback=True, character_coverage=1.0, unk_id=0, bos_id=-1,
            eos_id=-1, pad_id=-1, control_symbols=form["control_symbols"], minloglevel=2)
    except (RuntimeError, ValueError) as error:               # too little text, or no text at all
        raise ValueError(f"no tokenizer of {vocab_size} pieces from these texts: {error}") from None
    with files.atomic(Path(folder) / "tokenizer.model") as temporary:
        temporary.write_bytes(model.getvalue())
    # Without "bos_token": null transformers invents a token <s>, one more than the model has.
    files.write_json(Path(folder) / "tokenizer_config.json", form["config"])


def main():
    parser = files.Parser(description=__doc__)
    parser.add_argument("show", nargs="*", metavar="FOLDER TEXT", help="show how it cuts a text")
    parser.add_argument("--train", type=Path, nargs="+", metavar="FILE",
                        help='JSON lines of {"prompt", "response"}: train a tokenizer on them')
    parser.add_argument("--out", type=Path, default=Path("out/tiny/tokenizer"))
    args = parser.parse_args()
    if args.train:
        texts = [row[key] for path in args.train for row in files.read_jsonl(path)
                 for key in ("prompt", "response") if key in row]
        train(texts, args.out, 2048)
        digest = hashlib.sha256((args.out / "tokenizer.model").read_bytes()).hexdigest()[:16]
        print(f"wrote {args.out}: {load(args.out).vocab_size} pieces from {len(texts)} texts, "
              f"tokenizer.model sha256 {digest}")
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
