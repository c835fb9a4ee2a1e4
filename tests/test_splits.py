"""The overlap test finds what was planted, and the committed splits do not touch."""

from collections import Counter

import pytest
from conftest import ROOT, assert_refused, run_script

from data import files, splits

HELD_OUT = [{"task": "open", "prompt": "Please describe how a small paper boat floats across the pond."},
            {"task": "open", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"},
                                          {"role": "user", "content": "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"}]}]


@pytest.mark.parametrize("row, kind", [
    ({"prompt": "Please describe how a small paper boat floats across the pond."}, "equal"),
    ({"prompt": "PLEASE describe, how a small paper-boat floats across the pond"}, "equal"),
    ({"prompt": "\uff30lease describe how a small paper boat \ufb02oats across the pond"}, "equal"),  # wide P, fl ligature
    ({"prompt": "Now: how a small paper boat floats across, the why?"}, "instruction"),          # 8 words
    ({"prompt": "Now: a small paper boat floats across the sea"}, None),                         # 7 words
    ({"messages": [{"role": "user", "content": "say two three four five six seven eight nine"}]}, "instruction"),
    ({"prompt": "x", "response": "so one two three four five six seven eight nine ten eleven twelve thirteen"}, "answer"),   # 13
    ({"prompt": "x", "response": "so one two three four five six seven eight nine ten eleven twelve"}, None),                # 12
    ({"messages": [], "response": "one two three four five six seven eight nine ten eleven twelve thirteen"}, "answer"),     # a document
    ({"messages": [{"role": "assistant", "content": HELD_OUT[0]["prompt"]}, {"role": "user", "content": "go on"}]}, None),
])
def test_planted_copies_are_found_and_near_misses_are_not(row, kind):
    found = splits.overlaps([{"prompt": "something else"}, row], HELD_OUT)
    assert [f[2] for f in found] == ([kind] if kind else [])
    assert not found or found[0][0] == 1


def test_a_whole_short_prompt_counts_although_it_has_fewer_than_eight_words():
    assert splits.overlaps([{"prompt": "hi!"}], HELD_OUT)[0][1:3] == (1, "equal")


def test_a_held_out_answer_is_found_in_a_training_answer_by_the_script_too(tmp_path):
    words = "a b c d e f g h i j k l m"
    for name, prompt, response in (("train", "first", f"so {words}"), ("held", "second", f"{words} n")):
        files.write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": prompt, "response": response}])
    process = run_script("data/splits.py", "--train", tmp_path / "train.jsonl", "--held-out", tmp_path / "held.jsonl")
    assert process.returncode == 1 and f"train.jsonl row 1 ~ {tmp_path}/held.jsonl row 1: answer: {words}" in process.stdout


@pytest.mark.parametrize("row", [{"prompt": None}, {"prompt": 3}, {"other": 1}, {"messages": "hi"}, {"messages": []}, {"messages": [], "response": 3},
                                 {"messages": [{"content": "hi"}]}, {"prompt": "hi", "response": None}])
def test_a_row_without_text_to_compare_is_refused(tmp_path, row):
    files.write_jsonl(tmp_path / "train.jsonl", [{"prompt": "fine"}, row])
    assert_refused(run_script("data/splits.py", "--train", tmp_path / "train.jsonl"), "train.jsonl, row 2", "expected a text")


def test_the_committed_splits_are_complete_and_do_not_touch():
    rows = {name: files.read_prompts(ROOT / "data" / "prompts" / f"{name}.jsonl") for name in ("dev", "test")}
    for name, least in (("dev", 40), ("test", 60)):
        assert len(rows[name]) >= least
        assert set(Counter(row["task"] for row in rows[name]).values()) == {len(rows[name]) // 5}
        assert len({str(row["messages"]) for row in rows[name]}) == len(rows[name])
    assert splits.overlaps(rows["dev"], rows["test"]) == []


def test_the_script_reports_drops_and_refuses(tmp_path):
    planted = tmp_path / "train.jsonl"
    test_row = files.read_jsonl(ROOT / "data" / "prompts" / "test.jsonl")[0]
    files.write_jsonl(planted, [{"prompt": "an innocent question"}, test_row])
    process = run_script("data/splits.py", "--train", planted)
    assert process.returncode == 1 and "train.jsonl row 2 ~ " in process.stdout and "1 near copies" in process.stdout
    assert run_script("data/splits.py", "--train", planted, "--drop", tmp_path / "clean.jsonl").returncode == 0
    assert files.read_jsonl(tmp_path / "clean.jsonl") == [{"prompt": "an innocent question"}]
    assert_refused(run_script("data/splits.py", "--train", tmp_path / "none.jsonl"), "no such file")
    planted.write_text('{"prompt": "fine"}\n{"prompt": \n')
    assert_refused(run_script("data/splits.py", "--train", planted), "line 2", "not JSON")


def test_nothing_that_the_released_drafter_was_trained_on_is_a_near_copy_of_a_held_out_prompt():
    held_out = [row for name in ("dev", "test") for row in files.read_prompts(ROOT / "data" / "prompts" / f"{name}.jsonl")]
    records = [row for name in ("records", "everyday", "open") for row in files.read_jsonl(ROOT / "data" / f"smollm2-{name}.jsonl.gz")]
    assert len(records) > 10_700 and splits.overlaps(records, held_out) == []
