"""The README's commands are those of `make demo`, and what it links to exists."""

import re
import subprocess

from conftest import ROOT

README = (ROOT / "README.md").read_text()


def commands(text):
    """Commands of a shell text, one line each, without what only make needs."""
    text = re.sub(r"\\\n\s*", " ", text).replace(".venv/bin/python", "python").replace(" || exit 2", "").replace(" --resume", "")
    return [" ".join(line.split()) for line in text.splitlines() if re.match(r"\s*(python|for) ", line)]


def test_the_tiny_worlds_commands_are_those_of_make_demo():
    dry = subprocess.run(["make", "-n", "D=out/nowhere", "demo"], cwd=ROOT, capture_output=True, text=True)
    assert dry.returncode == 0, dry.stderr
    run = [line.replace("out/nowhere", "out/tiny").replace(" --check", "") for line in commands(dry.stdout) if " -m venv" not in line and " -m pip" not in line]
    section = README[README.index("## The tiny world"):README.index("## A real chat model")]
    assert len(run) == 11 and sorted(run) == sorted(commands(section))


def test_every_file_that_the_readme_links_to_exists():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("http")]
    assert len(links) > 5 and all((ROOT / link).exists() for link in links)
