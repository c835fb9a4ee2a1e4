"""Kill train, finetune and generate again and again, go on with --resume, and compare with a run
that nobody killed: weights byte for byte, log lines and records one by one.

    python tests/soak.py [--kills 20] [--jobs train finetune generate] [--demo]

Each job is killed before and after every rename that it makes, then at --kills random moments. It
takes about two minutes on two cores. --demo kills `make demo FAST=1` too (ten minutes more).
A killed process is a fork of this one, which spares it the seconds that imports take (so not on
Windows).
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jinja2.sandbox  # noqa: F401  (what else the scripts import late)
import numpy as np
import sentencepiece  # noqa: F401
import torch
import torch._dynamo

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import distill  # noqa: E402  (after the path is set)
import train  # noqa: E402
from data import files, tokenizer  # noqa: E402

TARGET, DRAFT = (ROOT / "data" / "tiny_world" / name for name in ("target", "drafter-base"))


# ---- The jobs ----------------------------------------------------------------------------------

def write_inputs(work):
    """Prompts, records and a text, for the tiny world's pair."""
    tok, choose = tokenizer.load(TARGET), np.random.default_rng(0)
    prompts = [{"task": "a", "prompt": f"What does animal {i} look like?"} for i in range(24)]
    files.write_jsonl(work / "prompts.jsonl", prompts)
    files.write_jsonl(work / "data.jsonl", [
        {"id": str(i), "messages": [{"role": "user", "content": prompt["prompt"]}], "ended": True,
         "response_ids": choose.integers(20, 900, int(choose.integers(3, 40))).tolist()}
        for i, prompt in enumerate(prompts * 2)])
    (work / "text").mkdir()
    for name in ("train", "eval"):
        choose.integers(20, 900, 4000).astype("<u2").tofile(work / "text" / f"{name}.bin")
    files.write_json(work / "text" / "meta.json", {"tokenizer_fingerprint": tok.fingerprint})


def job(name, work, out):
    """(main, its arguments) of a job that writes into the folder `out`, or goes on there."""
    training = ("--steps", 12, "--save-every", 3, "--eval-every", 4, "--batch-size", 4,
                "--threads", 1, "--device", "cpu", "--resume", "--out", out)
    if name == "train":
        return train.main, ("train.py", "--model", "tiny-drafter", "--tokenizer", TARGET,
                            "--data", work / "text", "--context", 32, *training)
    if name == "finetune":
        return distill.main, (
            "distill.py", "finetune", "--target", TARGET, "--draft", DRAFT,
            "--data", work / "data.jsonl", "--loss", "tvd++-sampled", "--baseline", "running",
            "--draft-vocabulary", 600, "--pretrain-data", work / "text", "--eval-records", 4,
            "--pretrain-context", 32, *training)
    # At temperature 0: what a resumed run samples above it may differ.
    return distill.main, (
        "distill.py", "generate", "--target", TARGET, "--prompts", work / "prompts.jsonl",
        "--temperatures", 0, "--max-new-tokens", 24, "--batch-size", 5, "--threads", 1,
        "--device", "cpu", "--resume", "--out", out / "records.jsonl")


def result(out):
    """All that a job left in its folder, as a dict to compare; what the clock decides left out."""
    found = {path.name: path.read_bytes() for path in out.iterdir()}
    found.pop("training.pt", None)               # its bytes hold the seconds; its content is below
    if (out / "log.jsonl").is_file():
        rows = files.read_jsonl(out / "log.jsonl")
        found["log.jsonl"] = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
        state = torch.load(out / "training.pt", weights_only=True)
        found["training.pt"] = state["step"], state["settings"]
    if (out / "records.jsonl").is_file():        # answers come as they end, in any order
        rows = files.read_jsonl(out / "records.jsonl")
        found["records.jsonl"] = sorted(rows, key=lambda row: row["id"])
    return found


# ---- Killing -----------------------------------------------------------------------------------

def start(name, work, out, rename=-1, after=False):
    """Run a job in a fork, which kills itself at its rename-th rename in `out`, before or after it.
    Returns the fork's number."""
    child = os.fork()
    if child:
        return child
    try:
        calls, replace = [], os.replace

        def watched(*given):
            calls.extend([1] * Path(given[1]).is_relative_to(out))  # not those in the cache
            if len(calls) == rename and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*given)
            if len(calls) == rename:
                os.kill(os.getpid(), signal.SIGKILL)
            (work / "renames").write_text(str(len(calls)))

        os.replace = watched
        main, arguments = job(name, work, out)
        sys.argv = [str(argument) for argument in arguments]
        log = os.open(work / "output.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        files.run(main)
        os._exit(0)
    except SystemExit as stop:
        os._exit(stop.code or 0)
    finally:
        os._exit(70)


def ended(child):
    """Wait for a fork: its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def finish(name, work, out, expected):
    """Go on to the end. What is wrong then, in words; "" if nothing is."""
    if code := ended(start(name, work, out)):
        return f"--resume ended with exit code {code}: see {work / 'output.log'}"
    found = result(out)
    differing = sorted(key for key in {*found, *expected} if found.get(key) != expected.get(key))
    return f"differing: {', '.join(differing)}" if differing else ""


def fresh(work):
    """A folder for one round, and an empty cache: the target's states are computed again."""
    for folder in (work / "out", work / "cache"):
        shutil.rmtree(folder, ignore_errors=True)
    return work / "out"


def kill_at_renames(name, work, expected, count):
    """One round for each rename of an unbroken run, before it and after it."""
    for rename in range(1, count + 1):
        for after in (False, True):
            out = fresh(work)
            code = ended(start(name, work, out, rename, after))
            wrong = finish(name, work, out, expected)
            if code != -signal.SIGKILL:
                wrong = f"exit code {code} instead of the kill"
            yield 1, wrong and f"{'after' if after else 'before'} rename {rename}: {wrong}"


def kill_at_random(name, work, expected, kills, seconds, choose):
    """Up to three kills a round, each at a random moment; only what was still running counts."""
    while kills > 0:
        out, done, moments = fresh(work), 0, []
        for _ in range(min(kills, choose.randint(1, 3))):
            child = start(name, work, out)
            moments.append(choose.uniform(0, seconds))
            time.sleep(moments[-1])
            os.kill(child, signal.SIGKILL)
            done += ended(child) != 0
        kills -= done
        wrong = finish(name, work, out, expected)
        yield done, wrong and f"after {[round(moment, 3) for moment in moments]} s: {wrong}"


def soak(name, work, kills, choose):
    """Kill one job in both ways; prints a line for each and returns whether all was well."""
    out, began = fresh(work), time.monotonic()
    if code := ended(start(name, work, out)):
        raise SystemExit(f"{name}: exit code {code}\n{(work / 'output.log').read_text()}")
    seconds, expected = time.monotonic() - began, result(out)
    count = int((work / "renames").read_text())
    ways = {"each rename": kill_at_renames(name, work, expected, count),
            "random": kill_at_random(name, work, expected, kills, seconds, choose)}
    well = True
    for way, rounds in ways.items():
        rounds = list(rounds)
        wrong = [text for _, text in rounds if text]
        print(f"{name:10} {way:12} {len(rounds):7} {sum(done for done, _ in rounds):6} "
              f"{len(rounds) - len(wrong):6}", flush=True)
        for text in wrong:
            print(f"    {text}")
        well &= not wrong
    return well


# ---- make demo ---------------------------------------------------------------------------------

def soak_demo(work, kills, choose):
    """Kill `make demo FAST=1` at random, go on, and compare the two models that no sampled record
    decides with those of an unbroken run; of the records each must be there once."""
    def make(folder, seconds=None):
        process = subprocess.Popen(
            ["make", "-o", ".venv/ready", "demo", "FAST=1", f"D={folder}", f"RUN={sys.executable}"],
            cwd=ROOT, start_new_session=True, stdout=log, stderr=log)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return process.wait()

    whole, broken = work / "whole", work / "broken"
    with open(work / "demo.log", "a") as log:
        make(whole)
        done = sum(make(broken, choose.uniform(5, 40)) < 0 for _ in range(kills))
        code = make(broken)
    same = all((whole / name / "model.safetensors").read_bytes()
               == (broken / name / "model.safetensors").read_bytes()
               for name in ("target", "drafter-base"))
    ids = [[row["id"] for row in files.read_jsonl(folder / "records.jsonl")]
           for folder in (whole, broken)]
    well = code == 0 and same and sorted(ids[0]) == sorted(ids[1])
    print(f"{'demo':10} {'random':12} {1:7} {done:6} {int(well):6}")
    return well


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="random kills a job (default 20)")
    parser.add_argument("--jobs", nargs="+", default=["train", "finetune", "generate"])
    parser.add_argument("--demo", action="store_true", help="kill make demo FAST=1, too")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (default 0)")
    args = parser.parse_args()
    torch.set_num_threads(1)                     # a fork must not inherit a pool of threads
    choose, well, work = random.Random(args.seed), True, Path(tempfile.mkdtemp(prefix="soak"))
    os.environ["NANODRAFT_CACHE"] = str(work / "cache")
    write_inputs(work)
    print(f"{'job':10} {'killed at':12} {'rounds':>7} {'kills':>6} {'right':>6}")
    for name in args.jobs:
        well &= soak(name, work, args.kills, choose)
    if args.demo:
        well &= soak_demo(work, args.kills, choose)
    if not well:
        raise SystemExit(f"something differed; {work} is kept")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
