"""Generation: ragged rows, whole records, exact resume. Fine-tuning: the right positions, the exact
gradient, resume."""

import json
import os
import random
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TARGET, assert_refused, run_process, run_script, tiny_llama

import distill
import losses
import model
import speculate
import train
from data import files, report, tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory, sentencepiece_folder):
    """A random target and a random drafter on disk, and a prompts file."""
    root = tmp_path_factory.mktemp("distill")
    vocab = tokenizer.load(sentencepiece_folder).vocab_size
    for name, seed, layers in (("target", 1, 2), ("draft", 2, 1)):
        llama = tiny_llama(seed, vocab=vocab, layers=layers, hidden=16, context=256, std=0.25)
        model.save(llama, root / name)
        for file in ("tokenizer.model", "tokenizer_config.json"):
            shutil.copy(sentencepiece_folder / file, root / name / file)
    files.write_jsonl(root / "prompts.jsonl", [
        {"task": "ab"[i % 2], "prompt": "count " + "on and " * (i % 5) + f"to {i}"}
        for i in range(24)])
    return root


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NANODRAFT_CACHE", str(tmp_path / "cache"))


def frozen_target(folders):
    return model.load(folders / "target").requires_grad_(False)


def loaded(folders):
    """The tokenizer, the target (which gets no gradient) and the drafter."""
    tok = tokenizer.load(folders / "target")
    return tok, frozen_target(folders), model.load(folders / "draft")


def call(monkeypatch, *arguments):
    """distill.py with these arguments, in this process; bad input is a ValueError."""
    argv = ["distill.py", *map(str, arguments), "--device", "cpu", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", argv)
    distill.main()


def generate(monkeypatch, folders, out, *more):
    call(monkeypatch, "generate", "--target", folders / "target",
         "--prompts", folders / "prompts.jsonl", "--out", out,
         "--max-new-tokens", 12, "--batch-size", 7, *more)


# ---- Generate ----------------------------------------------------------------------------------

@pytest.mark.parametrize("batch_size", [1, 3, 24, 100])
def test_a_ragged_batch_gives_each_row_what_it_would_get_alone(folders, batch_size):
    target = frozen_target(folders)
    generator = torch.Generator().manual_seed(0)
    lengths = (3, 14, 8, 1, 9, 5, 2, 11) * 5
    prompts = [torch.randint(4, target.config.vocab_size, (n,), generator=generator).tolist()
               for n in lengths]
    alone = [speculate.autoregressive_generate(target, torch.tensor([p]), 20, 0.0, 1.0).tokens
             for p in prompts]
    # Some rows end early, so rows leave the batch at different times.
    stops = {alone[0][4], alone[3][9], alone[5][2]}
    answers = distill.answer_prompts(target, prompts, [0.0] * 40, 0.95, 20, stops, generator,
                                     batch_size)
    found = {row: answer for row, *answer in answers}
    for row, tokens in enumerate(alone):
        cut = next((i for i, token in enumerate(tokens) if token in stops), None)
        ids, ended, states = found[row]
        assert (ids, ended) == (tokens[:cut], cut is not None)       # [:None] is all of them
        # The states are those that each token was drawn from, the stop token included.
        text = torch.tensor([prompts[row] + tokens[:len(ids) + ended]])
        expected = target.hidden(text)[0, len(prompts[row]) - 1:-1]
        torch.testing.assert_close(states.float(), expected, rtol=2e-3, atol=2e-3)
    assert len({len(ids) for ids, _, _ in found.values()}) > 3


def test_prompts_are_read_without_padding_and_without_what_each_shares_with_the_one_before(folders):
    target = frozen_target(folders)
    read, hidden = [], target.hidden

    def counted(tokens, cache):
        read.append(tuple(tokens.shape))
        return hidden(tokens, cache)

    target.hidden = counted
    prompts = [[5, 6, 7], [5, 6, 7, 8, 9], [5, 6, 7, 8, 9], [5, 6, 7, 8], [4], [4, 6]]
    cache, states = distill.read_prompts(target, prompts, 2)
    assert read == [(1, 3), (1, 2), (1, 1), (1, 1), (1, 1), (1, 1)]
    for row, prompt in enumerate(prompts):
        torch.testing.assert_close(states[row], hidden(torch.tensor([prompt]))[0, -1])
    following = hidden(torch.full((6, 1), 3), cache)[:, -1]
    for row, prompt in enumerate(prompts):
        torch.testing.assert_close(following[row], hidden(torch.tensor([prompt + [3]]))[0, -1])


@pytest.mark.parametrize("lengths", [(3, 14, 8, 1, 9), (6, 6, 6), (1,)])
def test_a_gpus_one_padded_pass_over_the_prompts_gives_the_same(folders, lengths):
    target, generator = frozen_target(folders), torch.Generator().manual_seed(1)
    prompts = [torch.randint(4, 300, (n,), generator=generator).tolist() for n in lengths]
    (one, expected), (whole, states) = (distill.read_prompts(target, prompts, 2, padded)
                                        for padded in (False, True))
    torch.testing.assert_close(states, expected)
    assert whole.length == one.length == max(lengths)
    following = torch.arange(len(lengths))[:, None] + 5
    torch.testing.assert_close(target.hidden(following, whole), target.hidden(following, one))


def test_a_batch_without_padding_says_so_and_a_damaged_target_is_called_that(folders, monkeypatch):
    target, starts, real = frozen_target(folders), [], model.Llama.hidden

    def watched(llama, tokens, cache=None):
        starts.append(cache.start)
        return real(llama, tokens, cache)

    def answers(prompts):
        return [ids for _, ids, *_ in distill.generate_batch(
            target, prompts, [0.0] * len(prompts), 1.0, 5, set(), torch.Generator())]

    monkeypatch.setattr(model.Llama, "hidden", watched)
    alone = answers([[5, 9, 30]])
    assert answers([[5, 9, 30]] * 2) == alone * 2 and starts == [None] * 11
    assert alone[0] in answers([[5, 9, 30], [7]]) and starts[-1].tolist() == [0, 2]
    target.norm.weight[0] = float("inf")
    with pytest.raises(ValueError, match="not finite"):
        answers([[5, 9, 30]])


def test_sampled_waves_follow_the_nucleus_distribution_of_their_own_temperature(folders):
    target = frozen_target(folders)
    prompt = [5, 9, 30]
    logits = target(torch.tensor([prompt]))[:, -1]
    for temperature in (0.5, 1.0):
        p = model.probabilities(logits, temperature, 0.8)[0]
        generator = torch.Generator().manual_seed(1)
        wave = distill.answer_prompts(target, [prompt, prompt[:2]] * 2000,
                                      [temperature, 0.0] * 2000, 0.8, 1, set(), generator, 500)
        first = torch.tensor([ids[0] for row, ids, *_ in wave if row % 2 == 0])
        share = first.bincount(minlength=len(p)) / 2000
        assert share[p == 0].sum() == 0 and (share - p).abs().max() < 0.05


def test_records_are_whole_and_temperatures_are_dealt_in_turn(folders, tmp_path, monkeypatch):
    generate(monkeypatch, folders, tmp_path / "out.jsonl", "--per-prompt", 2)
    rows = sorted(files.read_jsonl(tmp_path / "out.jsonl"), key=lambda row: row["id"])
    assert len(rows) == 48 and len({row["id"] for row in rows}) == 48
    assert [row["temperature"] for row in rows] == [0, 0.3, 0.7, 1.0] * 12
    tok = tokenizer.load(folders / "target")
    for row in rows:
        assert set(row) == {"id", "task", "messages", "response", "response_ids", "temperature",
                            "ended"}
        assert row["response"] == tok.decode(row["response_ids"])
        assert tok.eos_id not in row["response_ids"]
        assert len(row["response_ids"]) == 12 or row["ended"]


def test_kept_states_spare_finetune_the_targets_pass(folders, tmp_path, monkeypatch):
    generate(monkeypatch, folders, tmp_path / "out.jsonl", "--keep-states")
    tok, target, _ = loaded(folders)
    examples = train.read_examples(tmp_path / "out.jsonl", tok, 512)
    states = distill.TargetStates(target, folders / "target", torch.float32)
    tokens, answer = train.collate(examples, "cpu")
    expected = target.hidden(tokens)[answer]
    monkeypatch.setattr(target, "hidden", None)          # nothing is computed again
    # generate rounds the weights to fp16.
    torch.testing.assert_close(states.read(examples), expected, rtol=0, atol=0.01)


def test_resume_yields_exactly_the_missing_records_and_touches_none_of_the_others(
        folders, tmp_path, monkeypatch):
    def ids_of(lines):
        return sorted(json.loads(line)["id"] for line in lines)

    out = tmp_path / "out.jsonl"
    generate(monkeypatch, folders, out)
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:9]) + lines[9][:40])         # killed in the middle of a line
    with pytest.raises(ValueError, match="give --resume"):
        generate(monkeypatch, folders, out)
    generate(monkeypatch, folders, out, "--resume")
    again = out.read_bytes().splitlines(keepends=True)
    assert again[:9] == lines[:9]
    assert ids_of(again) == ids_of(lines)
    files.write_jsonl(tmp_path / "other.jsonl", [{"task": "a", "prompt": "another prompt"}])
    with pytest.raises(ValueError, match="answers another prompt"):
        generate(monkeypatch, folders, out, "--resume", "--prompts", tmp_path / "other.jsonl")
    assert out.read_bytes() == b"".join(again)


CHANGES = [("--temperatures", "0.5"), ("--temperatures", "0", "0.3", "0.7"), ("--top-p", "0.9"),
           ("--max-new-tokens", "13"), ("--per-prompt", "2"), ("--seed", "1"),
           ("--dtype", "bfloat16"), ("--instruction-temperature", "1"),
           ("--max-instruction-tokens", "9")]


@pytest.mark.parametrize("change", CHANGES, ids=" ".join)
def test_records_are_not_mixed_with_those_of_other_settings(
        folders, tmp_path, monkeypatch, change):
    out = tmp_path / "out.jsonl"
    generate(monkeypatch, folders, out)
    whole = out.read_bytes()
    nine = b"".join(whole.splitlines(keepends=True)[:9])
    out.write_bytes(nine)
    name = change[0].removeprefix("--").replace("-", "_")
    with pytest.raises(ValueError, match=rf"settings \({name} was .*, now ") as caught:
        generate(monkeypatch, folders, out, "--resume", *change)
    assert "\n" not in str(caught.value) and ";" not in str(caught.value).split("):")[0]
    assert out.read_bytes() == nine
    generate(monkeypatch, folders, out, "--resume", "--batch-size", 3)      # this decides nothing
    assert len(files.read_jsonl(out)) == 24


def test_any_one_changed_option_is_refused_and_named(folders, tmp_path):
    """A space of settings, each changed in one place, through the check that generate makes."""
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    share, count = st.floats(0.01, 1), st.integers(1, 99)
    drawn = st.fixed_dictionaries({
        "temperatures": st.lists(st.floats(0, 2), min_size=1, max_size=4), "top_p": share,
        "max_new_tokens": count, "per_prompt": count, "seed": count,
        "dtype": st.sampled_from(["float32", "bfloat16"]), "instruction_temperature": share,
        "max_instruction_tokens": count,
        "openings": st.sampled_from([None, folders / "prompts.jsonl"]),
        "target": st.sampled_from([folders / "target", folders / "draft"])})
    out, rest = tmp_path / "out.jsonl", {"prompts": "p", "self_instruct": None, "documents": None}

    @hypothesis.settings(max_examples=500, deadline=None, database=None, derandomize=True)
    @hypothesis.given(drawn, drawn, st.data())
    def check(first, second, data):
        name = data.draw(st.sampled_from(sorted(first)))
        changed = first | {name: second[name]}
        out.unlink(missing_ok=True)
        distill.claim(SimpleNamespace(out=out, resume=False, **first, **rest), out)
        out.touch()
        again = SimpleNamespace(out=out, resume=True, **changed, **rest)
        if changed == first:
            return distill.claim(again, out)
        with pytest.raises(ValueError, match=rf"settings \({name} was "):
            distill.claim(again, out)
        distill.claim(SimpleNamespace(out=out, resume=True, **first, **rest), out)

    check()


def test_a_target_or_openings_of_the_same_name_and_other_content_are_refused(
        folders, tmp_path, monkeypatch):
    target, out = shutil.copytree(folders / "target", tmp_path / "target"), tmp_path / "out.jsonl"
    openings = tmp_path / "openings.jsonl"
    openings.write_text('{"task": "a", "opening": "count"}\n')
    flags = ("--target", target, "--openings", openings)
    generate(monkeypatch, folders, out, *flags)
    whole = out.read_bytes()
    openings.write_text('{"task": "a", "opening": "count to"}\n')
    with pytest.raises(ValueError, match="openings was content"):
        generate(monkeypatch, folders, out, "--resume", *flags)
    openings.write_text('{"task": "a", "opening": "count"}\n')
    generate(monkeypatch, folders, out, "--resume", *flags, "--target", folders / "target")
    model.save(model.load(folders / "draft"), target)
    with pytest.raises(ValueError, match="target was content"):
        generate(monkeypatch, folders, out, "--resume", *flags)
    with pytest.raises(ValueError, match="record 00000.0 answers another prompt"):
        call(monkeypatch, "generate", "--target", folders / "target", "--documents", 3,
             "--out", out, "--resume", "--openings", openings, "--max-new-tokens", 12)
    assert out.read_bytes() == whole


@pytest.mark.parametrize("flags", [(), ("--resume",)])
@pytest.mark.parametrize("name", ["notes.txt", "notes.instructions.jsonl"])
def test_a_file_that_generate_did_not_write_is_left_alone(
        folders, tmp_path, monkeypatch, name, flags):
    notes = tmp_path / name
    notes.write_text('{"id": "00000.0"}\nmy notes')
    with pytest.raises(ValueError, match=f"{name} has no notes.txt.settings.json beside it"):
        call(monkeypatch, "generate", "--target", folders / "target", "--self-instruct", 3,
             "--out", tmp_path / "notes.txt", *flags)
    assert notes.read_text() == '{"id": "00000.0"}\nmy notes'
    assert sorted(os.listdir(tmp_path)) == [name]


def test_a_whole_last_record_without_its_newline_is_kept(folders, tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    generate(monkeypatch, folders, out)
    whole = out.read_bytes()
    out.write_bytes(whole[:-1])
    generate(monkeypatch, folders, out, "--resume")
    assert out.read_bytes() == whole


def test_the_target_writes_its_own_instructions(folders, tmp_path, monkeypatch):
    out = tmp_path / "self.jsonl"
    arguments = ("generate", "--target", folders / "target", "--max-new-tokens", 6,
                 "--batch-size", 32, "--instruction-temperature", 1.5, "--out", out,
                 "--self-instruct")
    call(monkeypatch, *arguments, 10)
    rows = files.read_jsonl(out)
    instructions = [row["messages"][0]["content"] for row in rows]
    assert len(rows) == len(set(instructions)) == 10
    assert all(len(text.split()) >= 3 for text in instructions)
    call(monkeypatch, *arguments, 15, "--resume")        # asked for more: the first ten stay
    more = files.read_jsonl(out)
    assert [row["messages"] for row in more[:10]] == [row["messages"] for row in rows]
    assert len(more) == 15


def test_documents_start_from_nothing(folders, tmp_path, monkeypatch):
    out = tmp_path / "documents.jsonl"
    call(monkeypatch, "generate", "--target", folders / "target", "--documents", 3,
         "--temperatures", 1, "--max-new-tokens", 9, "--out", out)
    assert [row["messages"] for row in files.read_jsonl(out)] == [[]] * 3


# ---- Finetune ----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def records(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("records") / "records.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        generate(patch, folders, out, "--per-prompt", 3)
    return out


def finetune(monkeypatch, folders, records, out, *more):
    call(monkeypatch, "finetune", "--target", folders / "target", "--draft", folders / "draft",
         "--data", records, "--out", out, "--batch-size", 8, "--warm-up", 2, "--eval-records", 8,
         "--pretrain-fraction", 0, *more)


def log_of(out):
    rows = files.read_jsonl(out / "log.jsonl")
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def make_loss(name):
    """The loss, with a generator of its own where it draws."""
    generator = torch.Generator().manual_seed(1) if "sampled" in name else None
    return losses.choose(name, generator=generator)


def take_gradients(llama):
    """Copies of the gradients; the model's own are cleared."""
    gradients = [weight.grad.clone() for weight in llama.parameters()]
    llama.zero_grad()
    return gradients


@pytest.mark.parametrize("listed", [None, [9, 3, 40]])
@pytest.mark.parametrize("lengths", [(3,), (256, 257, 1), (5, 600)])
def test_the_acceptance_rate_is_that_of_the_loops_own_p_and_q(lengths, listed):
    """Token by token, each from the text before it; also where an answer is longer than a chunk."""
    target, draft = (tiny_llama(seed, vocab=50, context=1024) for seed in (5, 6))
    draft.draft_vocabulary = None if listed is None else torch.tensor(listed)
    draw, overlaps = random.Random(0), []
    examples = [train.Example([draw.randrange(50) for _ in range(4 + n)], 4) for n in lengths]
    for e in examples:
        text, caches = torch.tensor(e.tokens), [speculate.room_for(x, 1024, "cpu")
                                                for x in (target, draft)]
        for place in range(e.first, len(text)):
            p, q = (speculate.distributions(llama, cache, text[:place], 1, 1.0, 1.0, words)
                    for llama, cache, words in zip((target, draft), caches, (None, text[:4])))
            overlaps.append(torch.minimum(p, q).sum())
    states = SimpleNamespace(read=lambda batch: torch.cat(
        [target.hidden(torch.tensor([e.tokens]))[0, e.first - 1:-1] for e in batch]))
    found = distill.acceptance(draft, target, states, examples)
    assert found == pytest.approx(torch.stack(overlaps).mean().item(), abs=1e-5)


def test_the_end_token_is_trained_only_where_the_answer_ended_by_itself(folders, tmp_path):
    tok = tokenizer.load(folders / "target")
    messages = [{"role": "user", "content": "hello"}]
    given = [([20, 21, 22], True), ([20, 21, 22], False), ([], True), ([], False),
             (list(range(10, 90)), True)]
    rows = [{"id": i, "messages": messages, "response_ids": ids, "ended": ended}
            for i, (ids, ended) in enumerate(given)]
    files.write_jsonl(tmp_path / "records.jsonl", rows)
    prompt = tok.chat_prompt(messages)
    examples = train.read_examples(tmp_path / "records.jsonl", tok, context=len(prompt) + 10)
    answers = [e.tokens[e.first:] for e in examples]
    # The answer that is empty and cut off is left out, the long one is cut to the context.
    assert answers == [[20, 21, 22, tok.eos_id], [20, 21, 22], [tok.eos_id], list(range(10, 20))]
    assert [e.count for e in examples] == [4, 3, 1, 10]
    tokens, answer = train.collate(examples, "cpu")
    following = tokens.roll(-1, 1)
    assert [following[i][answer[i]].tolist() for i in range(4)] == answers


@pytest.mark.parametrize("name", losses.LOSSES)
def test_the_fast_form_equals_the_five_lines_for_every_loss_and_chunk(folders, records, name):
    tok, target, draft = loaded(folders)
    batch = train.read_examples(records, tok, 512)[3:8]
    tokens, answer = train.collate(batch, "cpu")
    N = int(answer.sum())

    def read(batch):
        """The target's states, which half precision did not round."""
        return target.hidden(tokens)[answer]

    found = []
    for chunk in (None, 1, 7, N - 1, N, N + 1):
        loss = make_loss(name)
        if chunk is None:
            value = distill.distillation_loss(draft, target, tokens, answer, loss)
            value.backward()
        else:
            value, _ = distill.distillation_backward(draft, target, SimpleNamespace(read=read),
                                                     batch, loss, 1.0, chunk)
        found.append((float(torch.as_tensor(value).detach()), take_gradients(draft)))
    for value, gradients in found[1:]:
        assert value == pytest.approx(found[0][0], rel=1e-4)
        for ours, expected in zip(gradients, found[0][1]):
            torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 7, 4096])
@pytest.mark.parametrize("name", losses.LOSSES)
def test_the_chunked_backward_equals_whole_logits(folders, records, name, chunk):
    tok, target, draft = loaded(folders)
    examples = train.read_examples(records, tok, 512)
    states = distill.TargetStates(target, folders / "target", torch.float32)
    batch = examples[3:8]
    value, alpha = distill.distillation_backward(draft, target, states, batch, make_loss(name), 0.7,
                                                 chunk)
    gradients = take_gradients(draft)
    q, p = [], []
    for e in batch:                              # one row at a time, whole logits, no padding
        text = torch.tensor([e.tokens])
        q.append(draft(text)[0, e.first - 1:-1])
        kept = target.hidden(text)[0, e.first - 1:-1].half().float()     # in half precision on disk
        p.append(target.head(kept))
    q, p = torch.cat(q), torch.cat(p)
    expected = make_loss(name)(q, p).mean()
    (0.7 * expected).backward()
    overlap = torch.minimum(q.softmax(-1), p.softmax(-1)).sum(-1).mean().item()
    assert value == pytest.approx(expected.item(), rel=1e-3)
    assert alpha == pytest.approx(overlap, rel=1e-3)
    for ours, weight in zip(gradients, draft.parameters()):
        torch.testing.assert_close(ours, weight.grad, rtol=1e-3, atol=2e-6)


def test_batches_have_few_different_widths_so_that_freed_memory_fits_the_next(records, folders):
    examples = train.read_examples(records, tokenizer.load(folders / "target"), 512)
    for seed in range(20):
        odd_one = train.Example(list(range(1, 2 + 29 * seed)), 1)
        rows = random.Random(seed).sample(examples, 5) + [odd_one]
        tokens, answer = train.collate(rows, "cpu")
        assert tokens.shape == answer.shape and tokens.shape[1] % 64 == 0
        longest = max(len(e.tokens) for e in rows)
        assert longest <= tokens.shape[1] < longest + 64
        assert answer.sum(1).tolist() == [e.count for e in rows]
        assert not answer[:, longest - 1:].any()


def test_with_a_draft_vocabulary_both_are_renormalised_over_it_and_some_others(folders, records):
    tok, target, draft = loaded(folders)
    examples = train.read_examples(records, tok, 512)
    always = {*tok.eos_ids, *tok.byte_ids}
    fewer = distill.draft_vocabulary(examples, 24, tok)          # fewer than are always in it
    assert len(always) > 250 and set(fewer.tolist()) == always
    ids = distill.draft_vocabulary(examples, len(always) + 24, tok)
    vocabulary = set(ids.tolist())
    assert len(vocabulary) == len(always) + 24 and always <= vocabulary
    answers = torch.tensor([t for e in examples for t in e.tokens[e.first:]])
    counts = answers.bincount(minlength=tok.vocab_size)
    chosen = [i for i in ids.tolist() if i not in always]
    others = [i for i in range(tok.vocab_size) if i not in vocabulary]
    assert counts[chosen].min() >= counts[others].max() and counts[chosen].max() > 0

    draft.draft_vocabulary = ids
    states = distill.TargetStates(target, folders / "target", torch.float32)
    batch, kld = examples[3:8], losses.LOSSES["kld"]
    value, _ = distill.distillation_backward(draft, target, states, batch, kld, 1.0, 7,
                                             torch.Generator().manual_seed(3))
    gradients = take_gradients(draft)
    shuffled = torch.randperm(len(others), generator=torch.Generator().manual_seed(3))
    tokens, answer = train.collate(batch, "cpu")
    some = torch.tensor(others)[shuffled[:len(ids) // 8]]
    ids = torch.tensor(sorted({*ids.tolist(), *some.tolist(), *tokens.flatten().tolist()}))
    assert vocabulary < set(ids.tolist()) and len(ids) < tok.vocab_size
    q = F.linear(draft.hidden(tokens)[answer], draft.head_weight(ids))
    p = target.head(target.hidden(tokens)[answer].half().float())[:, ids]
    expected = kld(q, p).mean()
    expected.backward()
    assert value == pytest.approx(expected.item(), rel=1e-3)
    for ours, weight in zip(gradients, draft.parameters()):
        torch.testing.assert_close(ours, weight.grad, rtol=1e-3, atol=2e-6)


def test_target_states_are_computed_once_and_survive_in_the_cache(
        folders, records, tmp_path, monkeypatch):
    tok, target, _ = loaded(folders)
    examples = train.read_examples(records, tok, 512)
    collate, computed = train.collate, []

    def opened(folder=folders / "target", dtype=torch.float32):
        return distill.TargetStates(target, folder, dtype)

    def open_again():
        states = opened()
        computed.clear()
        return states

    def collate_watched(new, device):
        computed.extend(new)
        return collate(new, device)

    def expected(batch):
        tokens, answer = collate(batch, "cpu")
        return target.hidden(tokens)[answer]

    batch = examples[:4]
    first = opened().read(batch)
    torch.testing.assert_close(first, expected(batch), rtol=1e-3, atol=1e-3)
    monkeypatch.setattr(distill.train, "collate", collate_watched)
    again = open_again()
    assert again.read(batch).equal(first) and not computed
    # Other records, in another order: only those that are new are computed.
    mixed = [examples[9], examples[2], examples[5]]
    states = again.read(mixed)
    assert computed == [examples[9], examples[5]]
    torch.testing.assert_close(states, expected(mixed), rtol=1e-3, atol=1e-3)

    # A kill while a record is written leaves it out; a full disk loses nothing that was there.
    def full(file, array):
        file.write(b"half")
        raise OSError("No space left on device")

    more = examples[20:21]
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(np, "save", full)
        again.read(more)
    again = open_again()
    assert again.read(mixed).equal(states) and not computed
    assert not list(again.folder.glob("*.tmp"))
    assert len(again.read(more)) == more[0].count and computed == more
    # Whatever changes the states changes the folder: each shard's content, config.json, the dtype.
    names = {again.folder, opened(dtype=torch.bfloat16).folder}
    copy = tmp_path / "copy"
    shutil.copytree(folders / "target", copy)
    assert opened(copy).folder in names
    for name, old, new in (("config.json", b"10000.0", b"500000.0"),
                           ("model-2.safetensors", b"", b"a second shard"),
                           ("model-2.safetensors", b"second", b"2nd"),
                           ("model.safetensors", b"norm", b"Norm")):
        path = copy / name
        content = path.read_bytes() if path.is_file() else b""
        assert old in content
        path.write_bytes(content.replace(old, new) if old else new)
        names.add(opened(copy).folder)
    assert len(names) == 6


def test_rows_outside_the_draft_vocabulary_keep_their_values(
        folders, records, tmp_path, monkeypatch):
    finetune(monkeypatch, folders, records, tmp_path / "out", "--draft-vocabulary", 300,
             "--steps", 5, "--learning-rate", 0.02)
    before, after = (model.load(folder) for folder in (folders / "draft", tmp_path / "out"))
    same = (before.head_weight() == after.head_weight()).all(-1)
    changed = (~same).nonzero().flatten().tolist()
    assert sorted(changed) == sorted(after.draft_vocabulary.tolist())


def test_a_drafter_can_start_from_some_of_the_targets_layers(
        folders, records, tmp_path, monkeypatch):
    out, target = tmp_path / "out", model.load(folders / "target")
    flags = ("--draft", folders / "target", "--layers", 1, 0, "--draft-vocabulary", 300,
             "--steps", 3, "--learning-rate", 1e-3)
    finetune(monkeypatch, folders, records, out, *flags)
    start, after = model.load(folders / "target").keep_layers([1, 0]), model.load(out)
    assert after.config == start.config and after.config.num_hidden_layers == 2
    rest = after.outside_list()
    assert torch.equal(after.head_weight(rest), target.head_weight(rest)) and len(rest)
    for mine, source in zip(after.layers, (target.layers[1], target.layers[0])):
        distance = (mine.mlp.down_proj.weight - source.mlp.down_proj.weight).abs().max()
        assert 0 < distance < 0.01
    with pytest.raises(ValueError, match="layers was .1, 0., now .0."):
        finetune(monkeypatch, folders, records, out, *flags, "--layers", 0, "--resume")
    with pytest.raises(ValueError, match="layers .0, 12.: give each once, from 0 to"):
        finetune(monkeypatch, folders, records, tmp_path / "x", *flags, "--layers", 0, 12)
    with pytest.raises(ValueError, match="layers .1, 1.: give each once"):
        start.keep_layers([1, 1])


@pytest.mark.parametrize("name", ["kld", "tvd", "tvd++"])
def test_finetuning_raises_the_acceptance_rate_on_held_out_answers(
        folders, records, tmp_path, monkeypatch, name):
    out = tmp_path / "out"
    finetune(monkeypatch, folders, records, out, "--loss", name, "--steps", 60,
             "--learning-rate", 0.02)
    rates = [row["held_out_alpha"] for row in log_of(out) if "held_out_alpha" in row]
    assert rates[-1] > rates[0] + 0.05, rates
    before, after = (model.load(folder) for folder in (folders / "draft", out))
    assert before.config == after.config
    assert tokenizer.load(out).fingerprint == tokenizer.load(folders / "target").fingerprint


def test_finetune_keeps_the_target_in_its_dtype_and_trains_the_drafter_in_fp32(
        folders, records, tmp_path, monkeypatch):
    align, seen, rates = distill.align, [], []

    def watched(draft, target, *more):
        seen.append([{weight.dtype for weight in llama.parameters()} for llama in (target, draft)])
        return align(draft, target, *more)

    monkeypatch.setattr(distill, "align", watched)
    for dtype in ("float32", "bfloat16"):
        finetune(monkeypatch, folders, records, tmp_path / dtype, "--steps", 20, "--dtype", dtype,
                 "--learning-rate", 0.02, "--eval-every", 20)
        rates.append([row["held_out_alpha"] for row in log_of(tmp_path / dtype)
                      if "held_out_alpha" in row])
    single, half = {torch.float32}, {torch.bfloat16}
    assert seen == [[single, single], [half, single]]
    assert model.load(tmp_path / "bfloat16").norm.weight.dtype == torch.float32
    assert json.loads((tmp_path / "bfloat16" / "config.json").read_text())["dtype"] == "float32"
    # The same start up to bfloat16's rounding, and the same gain.
    assert rates[0] == pytest.approx(rates[1], abs=0.01) and rates[1][-1] > rates[1][0] + 0.02
    states = distill.TargetStates(frozen_target(folders), folders / "target", torch.bfloat16)
    kept = np.load(next(states.folder.glob("*.npy")))
    assert kept.dtype == np.float16


@pytest.mark.parametrize("loss", [("--loss", "tvd++"),
                                  ("--loss", "tvd-sampled", "--baseline", "running")])
def test_resume_goes_on_exactly(loss, folders, records, tmp_path, monkeypatch):
    settings = ("--steps", 12, "--save-every", 4, "--eval-every", 3)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finetune(monkeypatch, folders, records, whole, *loss, *settings)

    def killed(loss, step, out, check=distill.train.require_finite):
        check(loss, step, out)
        if step == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(distill.train, "require_finite", killed)
        finetune(monkeypatch, folders, records, broken, *loss, *settings)
    with pytest.raises(ValueError, match="--resume"):
        finetune(monkeypatch, folders, records, broken, *loss, *settings)
    finetune(monkeypatch, folders, records, broken, *loss, *settings, "--resume")
    assert log_of(broken) == log_of(whole)
    one, other = model.load(whole), model.load(broken)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))
    with pytest.raises(ValueError, match="loss was tvd"):
        finetune(monkeypatch, folders, records, broken, "--loss", "kld", *settings, "--resume")


def text_of(folders, text, seed):
    """A folder of token files."""
    tok = tokenizer.load(folders / "target")
    text.mkdir(exist_ok=True)
    for name in ("train", "eval"):
        tokens = np.random.default_rng(seed).integers(10, 200, 3000)
        tokens.astype("<u2").tofile(text / f"{name}.bin")
    (text / "meta.json").write_text(json.dumps({"tokenizer_fingerprint": tok.fingerprint}))


def test_resume_refuses_all_that_would_change_the_result(folders, records, tmp_path, monkeypatch):
    """Each of what decides it by its content: a file of the same name and another content."""
    here, out, text = tmp_path / "folders", tmp_path / "out", tmp_path / "text"
    data, mine = tmp_path / "records.jsonl", tmp_path / "mine.py"
    body = "import losses\ndef mine(q, p):\n    return losses.LOSSES['tvd'](q, p)\n"

    def write():
        shutil.rmtree(here, ignore_errors=True)
        shutil.copytree(folders, here)
        shutil.copy(records, data)
        text_of(folders, text, 0)
        mine.write_text(body)

    def go_on(*more):
        finetune(monkeypatch, here, data, out, "--steps", 3, "--loss", f"{mine}:mine",
                 "--pretrain-data", text, "--pretrain-fraction", 0.3, "--pretrain-context", 32,
                 "--resume", *more)

    def refused(name, *more):
        with pytest.raises(ValueError, match=rf"[(]{name} was .*, now ") as caught:
            go_on(*more)
        assert ";" not in str(caught.value).split("):")[0]
        write()

    def other(folder):
        llama = model.load(here / folder)
        llama.norm.weight.data[0] += 0.01
        model.save(llama, here / folder)

    write()
    go_on()
    for folder in ("target", "draft"):
        other(folder)
        refused(folder)
    text_of(folders, text, 1)
    refused("pretrain_data")
    mine.write_text(body + "# edited\n")
    refused("loss's file")
    files.write_jsonl(data, [*files.read_jsonl(records)[1:], files.read_jsonl(records)[0]])
    refused("data")
    refused("data", "--eval-records", 12)
    refused("chunk", "--chunk", 7)
    refused("draft_vocabulary", "--draft-vocabulary", 300)
    refused("pretrain_fraction", "--pretrain-fraction", 0.2)
    refused("pretrain_context", "--pretrain-context", 16)
    go_on("--save-every", 2, "--eval-every", 2)                            # these decide nothing


@pytest.mark.parametrize("flags", [("--samples", 2), ("--baseline", "expected")])
def test_resume_refuses_other_options_of_a_sampled_loss(
        folders, records, tmp_path, monkeypatch, flags):
    settings = ("--steps", 2, "--loss", "tvd-sampled")
    finetune(monkeypatch, folders, records, tmp_path / "out", *settings)
    with pytest.raises(ValueError, match=f"{flags[0][2:]} was "):
        finetune(monkeypatch, folders, records, tmp_path / "out", *settings, *flags, "--resume")


def test_a_model_without_a_checkpoint_is_left_alone(folders, records, tmp_path, monkeypatch):
    out = shutil.copytree(folders / "draft", tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ValueError, match="out already holds a model: --resume goes on with"):
        finetune(monkeypatch, folders, records, out, "--steps", 2, "--resume")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_target_states_are_kept_by_content(folders, tmp_path):
    target = frozen_target(folders)
    folder = shutil.copytree(folders / "target", tmp_path / "target")

    def place(dtype=torch.float32):
        return distill.TargetStates(target, folder, dtype).folder

    places = [place(), place(torch.bfloat16)]
    for name in ("model.safetensors", "config.json", "model-00002-of-00002.safetensors",
                 "model.safetensors.index.json", "tokenizer.model"):
        with open(folder / name, "ab") as file:
            file.write(b" ")
        places.append(place())
    assert len(set(places)) == len(places)


def test_pretraining_text_is_mixed_in(folders, records, tmp_path, monkeypatch):
    text = tmp_path / "text"
    text_of(folders, text, 0)
    finetune(monkeypatch, folders, records, tmp_path / "out", "--steps", 3,
             "--pretrain-data", text, "--pretrain-fraction", 0.3, "--pretrain-context", 32)
    assert all(row["pretrain_loss"] > 1 for row in log_of(tmp_path / "out")[:3])


def test_bad_input_to_finetune_is_one_sentence(folders, records, tmp_path, monkeypatch):
    def refused(message, *more, data=records, draft="draft"):
        with pytest.raises(ValueError, match=message) as caught:
            call(monkeypatch, "finetune", "--target", folders / "target",
                 "--draft", folders / draft, "--data", data, "--out", tmp_path / "out",
                 "--pretrain-fraction", 0, *more)
        assert "\n" not in str(caught.value)

    bad = tmp_path / "bad.jsonl"
    refused("is none of kld", "--loss", "mse")
    refused("no such file", data=tmp_path / "none.jsonl")
    bad.write_text('{"id": "1"}\n{"id": ')
    refused("line 2: not JSON", data=bad)
    bad.write_text('{"id": "1"}\n')
    refused("record 1: needs messages", data=bad)
    bad.write_text('{"messages": [{"role": "user", "content": "a"}], "response_ids": [99999], '
                   '"ended": true}\n')
    refused("no token of", data=bad)
    refused("--learning-rate is 0; expected a number above 0", "--learning-rate", 0)
    refused("lower --learning-rate", "--eval-records", 8, "--learning-rate", 1e30,
            "--steps", 9, "--warm-up", 0)
    shutil.copytree(folders / "draft", folders / "other")
    (folders / "other" / "tokenizer.model").unlink()
    refused("neither tokenizer.json nor tokenizer.model", draft="other")


def test_the_script_exits_with_2_and_no_traceback(folders, tmp_path):
    def generated_from(prompts):
        return run_process("distill.py", "generate", "--target", folders / "target",
                           "--device", "cpu", "--prompts", prompts, "--out", tmp_path / "o.jsonl")

    bad, long = tmp_path / "bad.jsonl", tmp_path / "long.jsonl"
    bad.write_text('{"task": "a", "prompt": "  "}\n')
    assert_refused(generated_from(bad), "prompt 1")
    long.write_text(json.dumps({"task": "a", "prompt": "count " * 400}) + "\n")
    assert_refused(generated_from(long), "exceeds the model's context of 256")


@pytest.mark.real
def test_cached_states_give_the_targets_distributions_back():
    """A target in bfloat16 and its states in half precision on disk, its head's logits in bfloat16:
    the KL is about 1e-3, and alpha changes by less than that."""
    data = TARGET.parent.parent / "data"
    tok, target = tokenizer.load(TARGET), model.load(TARGET).requires_grad_(False)
    draft = model.load(data / "smollm2-drafter")
    examples = train.read_examples(data / "smollm2-records.jsonl.gz", tok, 512)[::900]
    kl, exact, cached, count = 0.0, 0.0, 0.0, 0
    half = model.load(TARGET, dtype=torch.bfloat16).requires_grad_(False)
    states = distill.TargetStates(half, TARGET, torch.bfloat16)
    for e in examples:
        tokens, answer = train.collate([e], "cpu")
        with torch.no_grad():
            p_logits = half.head(states.read([e])).float()
            truth = target.head(target.hidden(tokens)[answer])
            q_logits = draft.head(draft.hidden(tokens)[answer])
            kl += losses.kld(p_logits, truth).sum().item()
            exact += losses.overlap(q_logits, truth).sum().item()
            cached += losses.overlap(q_logits, p_logits).sum().item()
            count += e.count
    kl, exact, cached = kl / count, exact / count, cached / count
    print(f"{count} positions: KL {kl:.1e}, alpha {exact:.4f} against {cached:.4f}", end=" ")
    assert count > 500 and kl < 2e-3 and abs(exact - cached) < 1e-3


# ---- Report and compare, in the tiny world -----------------------------------------------------

FLAG_FILES = {"draft": "drafter-base", "pretrain-data": "pretrain", "data": "records.jsonl",
              "dev": "dev.jsonl", "test": "test.jsonl"}
HELLINGER = """import torch


def hellinger(draft_logits, target_logits):
    q = torch.softmax(draft_logits.float(), -1)
    p = torch.softmax(target_logits.detach().float(), -1)
    return 1 - (p * q + 1e-20).sqrt().sum(-1)
"""


def in_world(world, *names):
    """Flags of these names, each with its file or folder in the tiny world."""
    return [part for name in names
            for part in (f"--{name}", world / FLAG_FILES.get(name, name))]


@pytest.fixture(scope="module")
def compared(trained_world, tmp_path_factory):
    """Two losses, one seed, and a student's file, compared; returns (folder, standard output)."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "my_loss.py").write_text(HELLINGER)
    arguments = (
        "distill.py", "compare",
        *in_world(trained_world, "target", "draft", "data", "pretrain-data", "dev", "test"),
        "--losses", "kld", "tvd++-sampled", f"{folder / 'my_loss.py'}:hellinger", "--seeds", 1,
        "--steps", 24, "--learning-rates", 3e-3, 1e-2, "--prompts", 2, "--gamma", 3,
        "--samples", 2, "--eval-every", 2, "--baseline", "leave-one-out",
        "--threads", 1, "--device", "cpu", "--out", folder / "out")
    done = run_script(*arguments)
    assert done.returncode == 0, done.stderr
    return folder / "out", done.stdout, arguments


def test_compare_tunes_each_loss_and_keeps_every_run(compared):
    folder, said, _ = compared
    result = json.loads((folder / "compare.json").read_text())
    tuned = [run for run in result["runs"] if "dev_alpha" in run]
    final = [run for run in result["runs"] if "dev_alpha" not in run]
    assert len(tuned) == 6 and len(final) == 3
    assert (folder / "compare.png").stat().st_size > 10_000
    for run in final:
        rates = {r["learning_rate"]: r["dev_alpha"] for r in tuned if r["loss"] == run["loss"]}
        assert rates[run["learning_rate"]] == max(rates.values())
        assert run["alpha, topics"] > result["before"]["alpha, topics"]
        assert 1 <= run["tau 3, kept out: jobs"] <= 4
        assert run["loss"] in said and len(result["curves"][run["loss"]][0]) > 5


def test_compare_goes_on_where_it_stopped(compared):
    folder, said, arguments = compared

    def steps():
        """Each log's rows, with their seconds: a step trained again would take others."""
        return {path.parent.name: files.read_jsonl(path)[:-1]
                for path in folder.glob("*/log.jsonl")}

    before = steps()
    assert len(before) == 6 and all(len(rows) == 24 for rows in before.values())
    again = run_script(*arguments)
    assert again.returncode == 0
    assert again.stdout.splitlines()[-12:] == said.splitlines()[-12:]
    assert steps() == before


def test_compare_trains_again_what_an_edited_loss_gives(compared):
    """The edited file has the same length and the same time: neither its name nor its size nor its
    time tells that it changed."""
    folder, said, arguments = compared
    path = folder.parent / "my_loss.py"
    text, before = path.read_text(), os.stat(path)
    alphas = {}
    for version, edited in (("first", text), ("edited", text.replace("1 - (p", "1 + (p")),
                            ("first again", text)):
        path.write_text(edited)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert os.stat(path).st_size == before.st_size
        done = run_script(*arguments)
        assert done.returncode == 0, done.stderr
        rows = json.loads((folder / "compare.json").read_text())["runs"]
        alphas[version] = [run["alpha, topics"] for run in rows
                           if "hellinger" in run["loss"] and "dev_alpha" not in run]
    assert alphas["first"] == alphas["first again"]
    assert alphas["edited"][0] < alphas["first"][0] - 0.1
    # The edited loss at two rates; nothing else is trained again.
    assert len(list(folder.glob("*/log.jsonl"))) == 8


def test_intervals_over_seeds_are_students():
    mean, half = report.mean_and_interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 * 1 / 3 ** 0.5, rel=1e-3)
    assert np.isnan(report.mean_and_interval([1.0])[1])


def test_alignment_raises_alpha_beyond_its_interval_and_the_report_says_so(trained_world, tmp_path):
    world, picture = tmp_path / "world", tmp_path / "demo.png"
    shutil.copytree(trained_world, world)

    def reported(*flags):
        return run_script("data/report.py", "--dir", world, "--out", picture, *flags)

    done = run_script("distill.py", "finetune",
                      *in_world(world, "target", "draft", "data", "pretrain-data"),
                      "--loss", "tvd++", "--steps", 150, "--learning-rate", 1e-2,
                      "--batch-size", 16, "--threads", 1, "--device", "cpu",
                      "--out", world / "drafter-aligned")
    assert done.returncode == 0, done.stderr
    assert_refused(reported(), "no such file")
    for name, source in (("target-base", "target"), ("drafter-more", "drafter-base")):
        shutil.copytree(world / source, world / name)
    assert_refused(reported(), "holds no benchmarks")
    for name in ("base", "aligned"):
        done = run_script("speculate.py", "--target", world / "target",
                          "--draft", world / f"drafter-{name}", "--bench", world / "test.jsonl",
                          "--limit", 24, "--max-new-tokens", 32, "--threads", 1, "--device", "cpu",
                          "--temperature", 1, "--json", world / f"bench-{name}-1.json")
        assert done.returncode == 0, done.stderr
    done = reported("--check")
    assert done.returncode == 0, done.stderr
    assert "before: pretrained only" in done.stdout and picture.stat().st_size > 10_000
    # Its curve alone; and a log of another training has none.
    done = run_script("data/report.py", "--runs", world / "drafter-aligned", "--out", picture)
    assert done.returncode == 0 and "(0.00 M)" in done.stdout, done.stderr
    assert_refused(run_script("data/report.py", "--runs", world / "target", "--out", picture),
                   "no log of distill.py finetune")
    # Alignment that changed nothing.
    shutil.copy(world / "bench-base-1.json", world / "bench-aligned-1.json")
    assert_refused(reported("--check"), "did not raise alpha")
