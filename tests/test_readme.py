"""The README's commands are those of `make demo`, and what it links to exists."""

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT

import train
from data import files, tokenizer

README = (ROOT / "README.md").read_text()
CHAIN = (ROOT / "data" / "README.md").read_text()


def commands(text):
    """Commands of a shell text, one line each, without what only make needs."""
    text = re.sub(r"\\\n\s*", " ", text).replace(".venv/bin/python", "python")
    text = text.replace(" || exit 2", "").replace(" --resume", "")
    return [" ".join(line.split()) for line in text.splitlines()
            if re.match(r"\s*(python|for) ", line)]


def test_the_tiny_worlds_commands_are_those_of_make_demo():
    dry = subprocess.run(["make", "-n", "D=out/nowhere", "demo"],
                         cwd=ROOT, capture_output=True, text=True)
    assert dry.returncode == 0, dry.stderr
    run = [line.replace("out/nowhere", "out/tiny").replace(" --check", "")
           for line in commands(dry.stdout) if " -m venv" not in line and " -m pip" not in line]
    start = CHAIN.index("### Its stages, one by one")
    section = CHAIN[start:CHAIN.index("## The released drafter's records")]
    assert len(run) == 11 and sorted(run) == sorted(commands(section))


@pytest.mark.parametrize("page", ["README.md", "data/README.md", "data/RESULTS.md",
                                  "data/RECIPES.md", "data/smollm2-drafter/README.md"])
def test_every_file_that_a_page_links_to_exists(page):
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text())
    folder = (ROOT / page).parent
    assert all(link.startswith("http") or (folder / link).exists() for link in links)


def test_the_readme_is_a_lesson_and_not_a_manual():
    assert len(README.splitlines()) <= 150 and len(README.encode()) <= 12_000


def test_the_records_that_another_engine_samples_are_read_as_they_were_sampled(
        sentencepiece_folder, tmp_path, monkeypatch):
    """The example in RECIPES.md, with a stand-in for vLLM: one answer ends, the other is cut."""
    recipes = (ROOT / "data" / "RECIPES.md").read_text()
    code = re.search(r"```python\n(import json\nfrom vllm.*?)```", recipes, re.DOTALL)[1]
    tok, asked = tokenizer.load(sentencepiece_folder), []

    def generate(prompts, parameters):
        asked.extend(zip(prompts, parameters))
        whole = SimpleNamespace(token_ids=(7, 9, tok.eos_id), finish_reason="stop")
        cut = SimpleNamespace(token_ids=(8, 8, 8), finish_reason="length")
        return [SimpleNamespace(outputs=[answer]) for answer in (whole, cut)]

    engine = SimpleNamespace(LLM=lambda folder, **_: SimpleNamespace(generate=generate),
                             SamplingParams=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "vllm", engine)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    files.write_jsonl("out/everyday.jsonl", [{"task": "open", "prompt": p} for p in ("a", "b")])
    exec(code.replace("models/llama-2-7b-chat", str(sentencepiece_folder)), {})
    prompts = [tok.chat_prompt([{"role": "user", "content": text}]) for text in ("a", "b")]
    assert [prompt["prompt_token_ids"] for prompt, _ in asked] == prompts
    assert [parameters.temperature for _, parameters in asked] == [0.0, 0.3]
    whole, cut = train.read_examples("out/records.jsonl", tok, 100)
    assert whole.tokens == prompts[0] + [7, 9, tok.eos_id] and whole.first == len(prompts[0])
    assert cut.tokens == prompts[1] + [8, 8, 8]


def test_the_drafters_card_has_the_fields_that_a_hub_reads():
    hub = pytest.importorskip("huggingface_hub")
    fields = hub.ModelCard.load(ROOT / "data" / "smollm2-drafter" / "README.md").data.to_dict()
    for name in ("license", "base_model", "tags", "datasets", "metrics", "model-index"):
        assert fields[name], name
