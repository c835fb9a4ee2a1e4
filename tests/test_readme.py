"""The README's commands are those of `make demo`, and what it links to exists."""

import re
import subprocess

import pytest
from conftest import ROOT

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
