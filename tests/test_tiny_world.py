"""The tiny world's corpus: its splits do not touch, its filter keeps what it says, and its
tokenizer is made again byte for byte."""

import re

import pytest
from conftest import assert_refused, run_script

from data import files, splits, tiny_world, tokenizer

CORPUS = [tiny_world.FOLDER / f"{name}.jsonl.gz" for name in ("passages", "pairs")]
PASSAGES, PAIRS = (files.read_jsonl(path) for path in CORPUS)
TRAINING = [row for row in PAIRS if row["held_out"] is False]
HELD_OUT = [row for row in PAIRS if row["held_out"] is True]


def values(rows, key):
    return {row[key] for row in rows}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """What `make demo` makes first: tokenizer, token files, conversations and prompts."""
    folder = tmp_path_factory.mktemp("tiny")
    done = run_script("data/tokenizer.py", "--train", *CORPUS, "--out", folder / "tokenizer")
    assert done.returncode == 0
    done = run_script("data/tiny_world.py", "prepare", "--tokenizer", folder / "tokenizer",
                      "--out", folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_no_held_out_question_or_near_copy_is_trained_on():
    assert len(TRAINING) > 1000 and len(HELD_OUT) > 200
    training, held_out = (list(map(tiny_world.as_record, rows)) for rows in (TRAINING, HELD_OUT))
    assert not splits.overlaps(training, held_out)
    assert not values(TRAINING, "word") & values(HELD_OUT, "word")


def test_every_topic_has_its_texts_and_held_out_words_occur_in_the_passages():
    for rows in (TRAINING, HELD_OUT, PASSAGES):
        assert values(rows, "topic") == set(tiny_world.TOPICS)
    told, held_out = values(PASSAGES, "word"), values(HELD_OUT, "word")
    assert len(held_out & told) > 0.9 * len(held_out)


def test_evaluation_asks_about_held_out_words_distillation_never_about_the_kept_out_topic(prepared):
    dev, test, prompts, chat = (files.read_jsonl(prepared / f"{name}.jsonl")
                                for name in ("dev", "test", "prompts", "chat"))
    chat = [row for row in chat if row["messages"]]
    trained = {row["messages"][0]["content"] for row in chat}
    asked = values(prompts, "prompt")
    assert asked < trained and not trained & values(dev + test, "prompt")
    assert not values(dev, "prompt") & values(test, "prompt")
    kept_out = values(chat, "task") - values(prompts, "task")
    assert kept_out == {tiny_world.OUT_OF_DISTRIBUTION}
    jobs = "|".join(word for word, _ in tiny_world.words_of("jobs"))
    assert not [row for row in prompts if re.search(rf"\b({jobs})\b", row["prompt"])]
    for rows in (dev, test):
        assert values(rows, "task") == {"topics", "kept out: jobs"}


def test_the_tokenizer_is_remade_byte_for_byte_and_writes_any_text(prepared, tmp_path):
    again = tmp_path / "again"
    run_script("data/tokenizer.py", "--train", *CORPUS, "--out", again)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        assert (again / name).read_bytes() == (prepared / "tokenizer" / name).read_bytes()
    tok = tokenizer.load(prepared / "tokenizer")
    assert tok.vocab_size == 2048 and tok.eos_ids == (tok.controls["<|end|>"],)
    for text in ("A fox is a small animal.", "Grüße 🦊 <|end|> \\ 12"):
        ids = tok.encode(text)
        assert tok.decode(ids) == text and not set(ids) & set(tok.controls.values())
    words = sum(len(row["response"].split()) for row in PASSAGES)
    tokens = sum(len(tok.encode(row["response"])) for row in PASSAGES)
    assert tokens < 1.4 * words                  # mostly whole words


@pytest.mark.real
def test_transformers_opens_the_tiny_tokenizer_and_cuts_chats_alike(prepared):
    import transformers

    ours = tokenizer.load(prepared / "tokenizer")
    theirs = transformers.AutoTokenizer.from_pretrained(prepared / "tokenizer")
    question = [{"role": "user", "content": "What is a fox?"}]
    second_turn = [{"role": "system", "content": "Be brief."},
                   {"role": "user", "content": "Hi"},
                   {"role": "assistant", "content": "Hello."},
                   {"role": "user", "content": "Tell me about the sea."}]
    for messages in (question, second_turn):
        expected = theirs.apply_chat_template(messages, add_generation_prompt=True,
                                              return_dict=False)
        assert ours.chat_prompt(messages) == list(expected)


ROW = {"kind": "pair", "word": "a fox", "prompt": "What does a fox eat?"}


@pytest.mark.parametrize("text, kept", [
    # Two sentences an answer.
    ("A fox eats mice. It hunts at night. It sleeps all day.",
     "A fox eats mice. It hunts at night."),
    # Runs in circles.
    ("A fox eats mice. It is a fox is a fox.", "A fox eats mice."),
    # Says it again.
    ("A fox eats small mice at night. They eat small mice at night.",
     "A fox eats small mice at night."),
    ("A fox eats mice and then", "no whole sentence"),
    ("The dog eats mice.", "off topic"),
    ("A fox is a small fox.", "repetition"),
    ("A fox eats very very much.", "repetition"),
    ("1. A fox eats mice.", "characters"),
    ("Foxes eat.", "length"),
    ("I think a fox eats mice.", "speaks of itself or of the example"),
    ("A fox climbs a ladder to eat.", "speaks of itself or of the example")])
def test_the_filter_keeps_the_first_good_sentences(text, kept):
    assert kept in tiny_world.cleaned(text, ROW)


def test_filter_counts_what_it_drops(tmp_path):
    def filtered(answered):
        """The filter's process, given these prompts and answers."""
        records = [{"id": f"{i:03d}", "response": answer,
                    "messages": [{"role": "user", "content": prompt}]}
                   for i, (prompt, answer) in enumerate(answered)]
        files.write_jsonl(tmp_path / "records.jsonl", records)
        return run_script("data/tiny_world.py", "filter", "--out", tmp_path,
                          "--records", tmp_path / "records.jsonl")

    rows = [row for row in tiny_world.all_prompts() if row["kind"] == "pair"][:40]
    prompts = [row["prompt"] for row in rows]
    answers = [f"{row['word'][0].upper()}{row['word'][1:]} is a kind animal that people know."
               for row in rows]
    answers[3] = "It is here and there."
    answers[5] = answers[5].replace("kind", "zorky")
    done = filtered([*zip(prompts, answers), (prompts[0], answers[0])])
    assert done.returncode == 0, done.stderr
    for part in ("41 records", "off topic 1", "rare word 1", "near duplicate 1"):
        assert part in done.stdout
    assert len(files.read_jsonl(tmp_path / "pairs.jsonl.gz")) == 38
    assert_refused(filtered([("?", "")]), "record 1", "answers none")


def test_bad_input_is_one_sentence(tmp_path):
    missing = tmp_path / "none"
    done = run_script("data/tiny_world.py", "prepare", "--tokenizer", missing)
    assert_refused(done, "no such folder")
    done = run_script("data/tokenizer.py", "--train", f"{missing}.jsonl", "--out", tmp_path)
    assert_refused(done, "no such file")
    assert_refused(run_script("data/tokenizer.py"), "give a FOLDER")
