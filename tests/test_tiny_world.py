"""The tiny world's corpus: its splits do not touch, its filter keeps what it says, its tokenizer is remade byte for byte."""

import json
import re

import pytest
from conftest import assert_refused, run_script

from data import files, splits, tiny_world, tokenizer

PAIRS, PASSAGES = (files.read_jsonl(tiny_world.FOLDER / f"{name}.jsonl.gz") for name in ("pairs", "passages"))
TRAINING, HELD_OUT = ([row for row in PAIRS if row["held_out"] is out] for out in (False, True))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """What `make demo` makes first: tokenizer, token files, conversations and prompts."""
    folder = tmp_path_factory.mktemp("tiny")
    corpus = [tiny_world.FOLDER / f"{name}.jsonl.gz" for name in ("passages", "pairs")]
    assert run_script("data/tokenizer.py", "--train", *corpus, "--out", folder / "tokenizer").returncode == 0
    done = run_script("data/tiny_world.py", "prepare", "--tokenizer", folder / "tokenizer", "--out", folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_no_held_out_question_or_near_copy_is_trained_on():
    assert len(TRAINING) > 1000 and len(HELD_OUT) > 200
    assert not splits.overlaps([tiny_world.as_record(row) for row in TRAINING], [tiny_world.as_record(row) for row in HELD_OUT])
    assert not {row["word"] for row in TRAINING} & {row["word"] for row in HELD_OUT}


def test_every_topic_has_its_texts_and_held_out_words_occur_in_the_passages():
    for rows in (TRAINING, HELD_OUT, PASSAGES):
        assert {row["topic"] for row in rows} == set(tiny_world.TOPICS)
    told = {row["word"] for row in PASSAGES}
    assert len({row["word"] for row in HELD_OUT} & told) > 0.9 * len({row["word"] for row in HELD_OUT})


def test_evaluation_prompts_are_about_held_out_words_and_the_topic_kept_out_is_in_no_distillation_prompt(prepared):
    dev, test, prompts = (files.read_jsonl(prepared / f"{name}.jsonl") for name in ("dev", "test", "prompts"))
    chat = files.read_jsonl(prepared / "chat.jsonl")
    trained = {row["messages"][0]["content"] for row in chat if row["messages"]}
    asked = {row["prompt"] for row in prompts}
    assert asked < trained and not trained & {row["prompt"] for row in dev + test}
    assert not {row["prompt"] for row in dev} & {row["prompt"] for row in test}
    assert {row["task"] for row in chat if row["messages"]} - {row["task"] for row in prompts} == {tiny_world.OUT_OF_DISTRIBUTION}
    jobs = "|".join(word for word, _ in tiny_world.words_of("jobs"))
    assert not [row for row in prompts if re.search(rf"\b({jobs})\b", row["prompt"])]
    for rows in (dev, test):
        assert {row["task"] for row in rows} == {"topics", "kept out: jobs"}


def test_the_tokenizer_is_remade_byte_for_byte_and_writes_any_text(prepared, tmp_path):
    corpus = [tiny_world.FOLDER / f"{name}.jsonl.gz" for name in ("passages", "pairs")]
    run_script("data/tokenizer.py", "--train", *corpus, "--out", tmp_path / "again")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (prepared / "tokenizer" / name).read_bytes()
    tok = tokenizer.load(prepared / "tokenizer")
    assert tok.vocab_size == 2048 and tok.eos_ids == (tok.controls["<|end|>"],)
    for text in ("A fox is a small animal.", "Grüße 🦊 <|end|> \\ 12"):
        assert tok.decode(tok.encode(text)) == text and not set(tok.encode(text)) & set(tok.controls.values())
    words = sum(len(row["response"].split()) for row in PASSAGES)
    assert sum(len(tok.encode(row["response"])) for row in PASSAGES) < 1.4 * words      # mostly whole words


@pytest.mark.real
def test_transformers_opens_the_tiny_tokenizer_and_cuts_chats_alike(prepared):
    import transformers

    ours, theirs = tokenizer.load(prepared / "tokenizer"), transformers.AutoTokenizer.from_pretrained(prepared / "tokenizer")
    for messages in ([{"role": "user", "content": "What is a fox?"}],
                     [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."},
                      {"role": "user", "content": "Tell me about the sea."}]):
        assert ours.chat_prompt(messages) == list(theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


ROW = {"kind": "pair", "word": "a fox", "prompt": "What does a fox eat?"}


@pytest.mark.parametrize("text, kept", [
    ("A fox eats mice. It hunts at night. It sleeps all day.", "A fox eats mice. It hunts at night."),        # two sentences an answer
    ("A fox eats mice. It is a fox is a fox.", "A fox eats mice."),                                            # runs in circles
    ("A fox eats small mice at night. They eat small mice at night.", "A fox eats small mice at night."),      # says it again
    ("A fox eats mice and then", "no whole sentence"), ("The dog eats mice.", "off topic"), ("A fox is a small fox.", "repetition"),
    ("A fox eats very very much.", "repetition"), ("1. A fox eats mice.", "characters"), ("Foxes eat.", "length"),
    ("I think a fox eats mice.", "speaks of itself or of the example"), ("A fox climbs a ladder to eat.", "speaks of itself or of the example")])
def test_the_filter_keeps_the_first_good_sentences(text, kept):
    assert kept in tiny_world.cleaned(text, ROW)


def test_filter_counts_what_it_drops(tmp_path):
    rows = [row for row in tiny_world.all_prompts() if row["kind"] == "pair"][:40]
    answers = [f"{row['word'][0].upper()}{row['word'][1:]} is a kind animal that people know." for row in rows]
    answers[3] = "It is here and there."
    answers[5] = answers[5].replace("kind", "zorky")
    files.write_jsonl(tmp_path / "records.jsonl", [
        {"id": f"{i:03d}", "messages": [{"role": "user", "content": row["prompt"]}], "response": answer}
        for i, (row, answer) in enumerate([*zip(rows, answers), (rows[0], answers[0])])])
    done = run_script("data/tiny_world.py", "filter", "--records", tmp_path / "records.jsonl", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    for part in ("41 records", "off topic 1", "rare word 1", "near duplicate 1"):
        assert part in done.stdout
    assert len(files.read_jsonl(tmp_path / "pairs.jsonl.gz")) == 38
    (tmp_path / "other.jsonl").write_text(json.dumps({"id": "0", "messages": [{"role": "user", "content": "?"}], "response": ""}) + "\n")
    assert_refused(run_script("data/tiny_world.py", "filter", "--records", tmp_path / "other.jsonl", "--out", tmp_path), "record 1", "answers none")


def test_bad_input_is_one_sentence(tmp_path):
    assert_refused(run_script("data/tiny_world.py", "prepare", "--tokenizer", tmp_path / "none"), "no such folder")
    assert_refused(run_script("data/tokenizer.py", "--train", tmp_path / "none.jsonl", "--out", tmp_path), "no such file")
    assert_refused(run_script("data/tokenizer.py"), "give a FOLDER")
