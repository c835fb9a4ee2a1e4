"""Files of other people's and of killed processes: locks, whole writes, whole lines, and what makes
two results the same."""

import json
import os
import signal
import stat
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_refused, run_process, tiny_llama

import model
from data import files

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies
posix = pytest.mark.skipif(os.name == "nt", reason="signals and permissions of POSIX")


def gone():
    """The number of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


# ---- Locks -------------------------------------------------------------------------------------

HOLD = """
import sys, pathlib
from data import files
with files.locked(pathlib.Path(sys.argv[1]), folder=sys.argv[2] == "folder"):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(path, kind="file"):
    """A process that holds the lock of `path` until its standard input is closed."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path), kind], cwd=ROOT, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_second_process_is_refused_until_the_first_has_ended(tmp_path, kind):
    path = tmp_path / "out"
    with holder(path, kind) as process:
        with pytest.raises(ValueError, match="out is being written by another process"):
            with files.locked(path, kind == "folder"):
                pass
        with files.locked(tmp_path / "out2"):            # another name is free
            pass
        process.communicate("")
    with files.locked(path, kind == "folder"):
        pass
    assert os.listdir(tmp_path) == []                    # no lock is left behind


@posix
def test_a_killed_process_leaves_no_lock(tmp_path):
    with holder(tmp_path / "out") as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with files.locked(tmp_path / "out"):
        pass


@posix
def test_a_lock_that_its_holder_is_removing_is_not_taken(tmp_path):
    """Opened before the holder removed it, locked after: a third process would lock a new file."""
    with open(tmp_path / "out.lock", "a") as file:
        (tmp_path / "out.lock").unlink()
        assert files.taken(file)


def test_a_lock_is_of_the_file_whatever_name_it_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with files.locked(tmp_path / "out"), pytest.raises(ValueError, match="another process"):
        with files.locked(Path("./out")):
            pass


def test_a_folder_in_place_of_a_file_is_refused_at_the_door_and_the_other_way_round(tmp_path):
    (tmp_path / "file").touch()
    for name, folder in (("", False), ("file", True)):
        with pytest.raises(ValueError, match=str(tmp_path / name)):
            with files.locked(tmp_path / name, folder):
                pass
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("script, kind, flags", [
    ("train.py", "folder", ()),
    ("distill.py", "folder", ("finetune", "--target", "t", "--draft", "d", "--data", "x")),
    ("distill.py", "folder", ("compare",)),
    ("distill.py", "file", ("generate", "--target", "t", "--prompts", "p")),
    ("speculate.py", "file", ("--bench", "p"))])
def test_each_script_that_writes_takes_the_lock(tmp_path, script, kind, flags):
    out = tmp_path / "out"
    with files.locked(out, kind == "folder"):
        process = run_process(script, *flags, "--json" if "--bench" in flags else "--out", out)
        assert_refused(process, f"{out} is being written by another process")
    assert os.listdir(tmp_path) == []


# ---- Whole writes ------------------------------------------------------------------------------

@posix
def test_leftovers_of_killed_writes_go_and_those_of_running_ones_stay(tmp_path):
    dead = gone()
    leftovers = {f"training.pt.{dead}.tmp", f"a.settings.json.{dead}.tmp"}
    others = {f"training.pt.{os.getpid()}.tmp", "1.tmp", "notes.tmp", f"notes.{10 ** 12}.tmp",
              f"a.{dead}.tmp.txt"}
    for folder in (True, False):
        for name in leftovers | others:
            (tmp_path / name).touch()
        with files.locked(tmp_path if folder else tmp_path / "out", folder):
            assert set(os.listdir(tmp_path)) - {"out.lock"} == others


@posix
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_weights_have_the_permissions_of_their_neighbours(tmp_path, umask):
    before = os.umask(umask)
    try:
        model.save(tiny_llama(0), tmp_path)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {0o666 & ~umask}


# ---- Whole lines -------------------------------------------------------------------------------

values = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=8),
                      lambda inner: st.lists(inner, max_size=3), max_leaves=5)
rows = st.lists(st.dictionaries(st.text(max_size=5), values, max_size=3), min_size=1, max_size=5)


@hypothesis.settings(max_examples=500, deadline=None, database=None, derandomize=True)
@hypothesis.given(rows, st.data())
def test_of_a_file_cut_at_any_byte_every_whole_record_survives(tmp_path_factory, rows, data):
    lines = [json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") for row in rows]
    content = b"".join(line + b"\n" for line in lines)
    cut = data.draw(st.integers(0, len(content)))
    ends = [len(b"\n".join(lines[:i + 1])) for i in range(len(lines))]      # without its newline
    whole = sum(end <= cut for end in ends)
    path = tmp_path_factory.getbasetemp() / "cut.jsonl"
    path.write_bytes(content[:cut])
    files.trim_partial_line(path)
    assert path.read_bytes() == b"".join(line + b"\n" for line in lines[:whole])


def test_nothing_is_appended_to_a_compressed_file_and_nothing_of_it_is_cut(tmp_path):
    path = tmp_path / "records.jsonl.gz"
    files.write_jsonl(path, [{"a": i} for i in range(500)])
    whole = path.read_bytes()
    with pytest.raises(ValueError, match="records.jsonl.gz: nothing can be appended"):
        files.trim_partial_line(path)
    assert path.read_bytes() == whole


# ---- What makes two results the same -----------------------------------------------------------

def test_a_fingerprint_follows_the_content_of_each_file_that_is_read_and_no_name(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    read = ("config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
            "model.safetensors.index.json", "draft_vocabulary.json", "tokenizer.json",
            "tokenizer.model", "tokenizer_config.json", "generation_config.json",
            "chat_template.jinja", "train.bin", "eval.bin")
    for name in read:
        (folder / name).write_text(name)
    first = files.fingerprint(folder)
    for name in ("log.jsonl", "training.pt", "README.md", "bench.json", "config.json.1.tmp"):
        (folder / name).write_text(name)
    folder = folder.rename(tmp_path / "renamed")
    assert files.fingerprint(folder) == first
    seen = {first}
    for name in read:
        (folder / name).write_text("changed")
        seen.add(files.fingerprint(folder))
    assert len(seen) == len(read) + 1


@hypothesis.settings(max_examples=500, deadline=None, database=None, derandomize=True)
@hypothesis.given(st.lists(values, max_size=4), st.lists(values, max_size=4))
def test_other_parts_have_another_fingerprint(one, other):
    same = json.dumps(one) == json.dumps(other)
    assert (files.fingerprint(*one) == files.fingerprint(*other)) == same


def test_parts_do_not_run_together():
    assert files.fingerprint(1, 2) != files.fingerprint(12)


@hypothesis.settings(max_examples=500, deadline=None, database=None, derandomize=True)
@hypothesis.given(st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 9), min_size=1),
                  st.data())
def test_a_changed_setting_is_refused_and_named_and_the_same_ones_are_not(kept, data):
    now = dict(kept)
    name = data.draw(st.sampled_from(sorted(kept)))
    now[name] += 1
    files.require_same("OUT", kept, json.loads(json.dumps(kept)))
    with pytest.raises(ValueError) as caught:
        files.require_same("OUT", kept, now)
    assert f"OUT was made with other settings ({name} was {kept[name]}, now {now[name]})" in str(
        caught.value)


def test_settings_hold_paths_by_content(tmp_path):
    path, other = tmp_path / "a", tmp_path / "b"
    path.write_text("x")
    other.write_text("x")
    both = [files.settings(Namespace(data=p, steps=3, ignored=p), "data", "steps")
            for p in (path, other)]
    assert both[0] == both[1] and both[0]["steps"] == 3 and set(both[0]) == {"data", "steps"}
    other.write_text("y")
    assert files.settings(Namespace(data=other), "data")["data"] != both[0]["data"]


def test_weights_count_by_every_number(tmp_path):
    llama = tiny_llama(0)
    model.save(llama, tmp_path)
    before = files.fingerprint(tmp_path)
    with torch.no_grad():
        llama.norm.weight[-1] += 2e-7
    model.save(llama, tmp_path)
    assert files.fingerprint(tmp_path) != before
