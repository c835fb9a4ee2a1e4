"""The overlap test finds what was planted, and the committed splits do not touch."""

from collections import Counter

import pytest
from conftest import ROOT, assert_refused, run_script

from data import files, splits

PROMPTS = ROOT / "data" / "prompts"
BOAT = "Please describe how a small paper boat floats across the pond."
TWELVE = "one two three four five six seven eight nine ten eleven twelve"
HELD_OUT = [
    {"task": "open", "prompt": BOAT},
    {"task": "open", "messages": [{"role": "user", "content": "Hi"},
                                  {"role": "assistant", "content": "Hello"},
                                  {"role": "user", "content": f"{TWELVE} thirteen fourteen"}]}]


@pytest.mark.parametrize("row, kind", [
    ({"prompt": BOAT}, "equal"),
    ({"prompt": "PLEASE describe, how a small paper-boat floats across the pond"}, "equal"),
    # A wide P, and one sign for f and l together.
    ({"prompt": "\uff30lease describe how a small paper boat \ufb02oats across the pond"}, "equal"),
    # Of a prompt, eight words in a row are a copy, seven are not.
    ({"prompt": "Now: how a small paper boat floats across, the why?"}, "instruction"),
    ({"prompt": "Now: a small paper boat floats across the sea"}, None),
    ({"messages": [{"role": "user", "content": "say two three four five six seven eight nine"}]},
     "instruction"),
    # Of an answer, thirteen words are a copy, twelve are not. A document has no messages.
    ({"prompt": "x", "response": f"so {TWELVE} thirteen"}, "answer"),
    ({"prompt": "x", "response": f"so {TWELVE}"}, None),
    ({"messages": [], "response": f"{TWELVE} thirteen"}, "answer"),
    ({"messages": [{"role": "assistant", "content": BOAT}, {"role": "user", "content": "go on"}]},
     None),
])
def test_planted_copies_are_found_and_near_misses_are_not(row, kind):
    found = splits.overlaps([{"prompt": "something else"}, row], HELD_OUT)
    assert [f[2] for f in found] == ([kind] if kind else [])
    assert not found or found[0][0] == 1


def test_a_whole_short_prompt_counts_although_it_has_fewer_than_eight_words():
    assert splits.overlaps([{"prompt": "hi!"}], HELD_OUT)[0][1:3] == (1, "equal")


def test_a_held_out_answer_is_found_in_a_training_answer_by_the_script_too(tmp_path):
    words = "a b c d e f g h i j k l m"
    for name, prompt, response in (("train", "first", f"so {words}"),
                                   ("held", "second", f"{words} n")):
        files.write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": prompt, "response": response}])
    held_out = tmp_path / "held.jsonl"
    process = run_script("data/splits.py", "--train", tmp_path / "train.jsonl",
                         "--held-out", held_out)
    assert process.returncode == 1
    assert f"train.jsonl row 1 ~ {held_out} row 1: answer: {words}" in process.stdout


@pytest.mark.parametrize("row", [
    {"prompt": None}, {"prompt": 3}, {"other": 1}, {"messages": "hi"}, {"messages": []},
    {"messages": [], "response": 3}, {"messages": [{"content": "hi"}]},
    {"prompt": "hi", "response": None}])
def test_a_row_without_text_to_compare_is_refused(tmp_path, row):
    files.write_jsonl(tmp_path / "train.jsonl", [{"prompt": "fine"}, row])
    process = run_script("data/splits.py", "--train", tmp_path / "train.jsonl")
    assert_refused(process, "train.jsonl, row 2", "expected a text")


def test_the_committed_splits_are_complete_and_do_not_touch():
    rows = {name: files.read_prompts(PROMPTS / f"{name}.jsonl") for name in ("dev", "test")}
    for name, least in (("dev", 40), ("test", 60)):
        assert len(rows[name]) >= least
        assert set(Counter(row["task"] for row in rows[name]).values()) == {len(rows[name]) // 5}
        assert len({str(row["messages"]) for row in rows[name]}) == len(rows[name])
    assert splits.overlaps(rows["dev"], rows["test"]) == []


def test_the_script_reports_drops_and_refuses(tmp_path):
    planted = tmp_path / "train.jsonl"
    test_row = files.read_jsonl(PROMPTS / "test.jsonl")[0]
    files.write_jsonl(planted, [{"prompt": "an innocent question"}, test_row])
    process = run_script("data/splits.py", "--train", planted)
    assert process.returncode == 1
    assert "train.jsonl row 2 ~ " in process.stdout and "1 near copies" in process.stdout
    clean = tmp_path / "clean.jsonl"
    assert run_script("data/splits.py", "--train", planted, "--drop", clean).returncode == 0
    assert files.read_jsonl(clean) == [{"prompt": "an innocent question"}]
    missing = tmp_path / "none.jsonl"
    assert_refused(run_script("data/splits.py", "--train", missing), "no such file")
    planted.write_text('{"prompt": "fine"}\n{"prompt": \n')
    assert_refused(run_script("data/splits.py", "--train", planted), "line 2", "not JSON")


def test_no_committed_record_is_a_near_copy_of_a_held_out_prompt():
    held_out = [row for name in ("dev", "test")
                for row in files.read_prompts(PROMPTS / f"{name}.jsonl")]
    records = [row for name in ("records", "everyday", "open", "fresh")
               for row in files.read_jsonl(ROOT / "data" / f"smollm2-{name}.jsonl.gz")]
    assert len(records) > 24_100 and splits.overlaps(records, held_out) == []
