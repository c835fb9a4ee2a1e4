"""Many processes: whatever their number, the same steps; one alone writes; nobody waits for ever.

Run as a script, this file starts the processes: it imports the scripts once and forks for each one,
which saves the seconds that importing torch takes. One test goes through torchrun itself.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_refused, run_script, tiny_llama
from torch import distributed

import model
from data import files, tokenizer

SMALL = ["--steps", 6, "--batch-size", 4, "--save-every", 3, "--eval-every", 2, "--device", "cpu",
         "--threads", 1]
LOSS = '''
import os
import losses

calls = 0


def mine(draft_logits, target_logits, mu=None, sigma=None):
    """tvd++. FAULT=raise or nan: process 1 fails in the fifth step."""
    global calls
    calls += draft_logits.shape[-1] > 7              # not the try on a small case
    loss = losses.tvd_plus_plus(draft_logits, target_logits, mu, sigma)
    if calls == 5 and os.environ["RANK"] == "1" and "FAULT" in os.environ:
        if os.environ["FAULT"] == "raise":
            raise ValueError("no such luck")
        loss = loss * float("nan")
    return loss
'''
# What runs in each process before main(). `said` goes to stderr.
WATCH_MESSAGES = '''
all_reduce = train.distributed.all_reduce
def watched(message):
    said(f"message of {message.numel()}")
    all_reduce(message)
train.distributed.all_reduce = watched
'''
WATCH_SHARDS = '''
shard = train.shard
def watched(target):
    before = sum(w.numel() for w in target.parameters())
    target = shard(target)
    said(f"holds {sum(w.to_local().numel() for w in target.parameters())} of {before}")
    return target
train.shard = watched
'''
OWN_MEAN = "import torch; train.mean = torch.mean"          # a planted bug


@pytest.fixture(scope="module")
def folders(tmp_path_factory, sentencepiece_folder):
    """A tokenizer, a random pair, text, 12 records (two prompts are held out), 70 conversations
    and 11 prompts."""
    root = tmp_path_factory.mktemp("processes")
    tok = tokenizer.load(shutil.copytree(sentencepiece_folder, root / "tokenizer"))
    for name, seed, layers in (("target", 1, 2), ("draft", 2, 1)):
        llama = tiny_llama(seed, vocab=tok.vocab_size, layers=layers, hidden=16, context=512,
                           std=0.25)
        model.save(llama, root / name)
        tokenizer.copy(root / "tokenizer", root / name)
    draw = np.random.default_rng(0)

    def words(n):
        return " ".join(draw.choice("the quick brown fox jumps over a lazy dog".split(), n))

    def conversations(count):
        return [{"messages": [{"role": "user", "content": f"{i} {words(3)}"}],
                 "response": words(1 + 2 * i % 9)} for i in range(count)]

    files.write_jsonl(root / "records.jsonl", conversations(12))
    files.write_jsonl(root / "chat.jsonl", conversations(70))
    files.write_jsonl(root / "prompts.jsonl", [{"prompt": f"{i} {words(i % 5)}"}
                                               for i in range(11)])
    (root / "text").mkdir()
    for name, size in (("train", 4000), ("eval", 1500)):
        draw.integers(4, tok.vocab_size, size).astype("<u2").tofile(root / "text" / f"{name}.bin")
    files.write_json(root / "text" / "meta.json", {"tokenizer_fingerprint": tok.fingerprint})
    (root / "loss.py").write_text(LOSS)
    return root


@pytest.fixture(scope="module")
def done(folders):
    """All runs, by name: {"codes", "said"} of each, said being what every process printed."""
    text = ["train.py", "--model", "tiny-drafter", "--tokenizer", folders / "tokenizer",
            "--context", 16, "--data", folders / "text", *SMALL]
    chat = ["train.py", "--model", "tiny-drafter", "--tokenizer", folders / "tokenizer",
            "--context", 64, "--chat", folders / "chat.jsonl", "--accumulate", 2, *SMALL]
    finetune = ["distill.py", "finetune", "--target", folders / "target", "--draft",
                folders / "draft", "--data", folders / "records.jsonl", "--eval-records", 2, *SMALL]
    mixed = [*finetune, "--loss", "tvd++", "--chunk", 3, "--pretrain-data", folders / "text",
             "--pretrain-context", 16, "--draft-vocabulary", 300]
    sampled = [*finetune, "--loss", "tvd++-sampled", "--baseline", "running", "--chunk", 3]
    generate = ["distill.py", "generate", "--target", folders / "target", "--prompts",
                folders / "prompts.jsonl", "--temperatures", 0, "--device", "cpu", "--threads", 1]
    answers, long = ["--max-new-tokens", 9], ["--max-new-tokens", 120, "--batch-size", 1]
    mine = [*finetune, "--loss", folders / "loss.py:mine"]
    jobs = []

    def run(name, world, arguments, out=None, **options):
        jobs.append({"name": name, "world": world, **options,
                     "arguments": [*map(str, arguments), "--out", str(folders / (out or name))]})

    for world in (1, 2, 3):
        run(f"text {world}", world, text)
        run(f"chat {world}", world, chat, before=WATCH_MESSAGES)
        run(f"mixed {world}", world, mixed)
        if world != 2:
            run(f"sampled {world}", world, sampled)
            run(f"answers {world}", world, [*generate, *answers])
    run("planted", 2, mixed, before=OWN_MEAN)
    run("mine", 1, mine, environment={"RANK": "0"})
    for fault in ("nan", "raise"):
        run(fault, 2, mine, environment={"FAULT": fault})
    run("raise, resumed", 3, [*mine, "--resume"], out="raise")
    # Process 0 finds all of the target's states in its cache, process 1 none.
    caches = [str(folders / "cache" / name) for name in ("mixed 1", "another")]
    run("sharded", 2, [*mixed, "--shard-target"], before=WATCH_SHARDS, caches=caches)
    run("killed", 3, [*generate, *long], kill=str(folders / "killed.part1"))
    run("killed, resumed", 2, [*generate, *long, "--resume"], out="killed")
    run("locked", 2, text, lock=str(folders / "locked"))

    command = [sys.executable, __file__, str(folders / "cache")]
    found = subprocess.run(command, input=json.dumps(jobs), capture_output=True, text=True,
                           cwd=ROOT, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


def differences(folders, one, other):
    """{name: the largest difference} between the logs of two runs, seconds left out."""
    logs = [files.read_jsonl(folders / name / "log.jsonl") for name in (one, other)]
    assert [row["step"] for row in logs[0]] == [row["step"] for row in logs[1]] == list(range(7))
    found = {}
    for row, same in zip(*logs):
        assert row.keys() == same.keys()
        for name in row.keys() - {"seconds"}:
            if row[name] is not None:
                found[name] = max(found.get(name, 0), abs(row[name] - same[name]))
    return found


@pytest.mark.parametrize("kind, world", [
    ("text", 2), ("text", 3), ("chat", 2), ("chat", 3), ("mixed", 2), ("mixed", 3), ("sampled", 3)])
def test_several_processes_train_as_one_does(folders, done, kind, world):
    # 3 processes and a last batch of 2 records: one has none. One window of text: one has it.
    assert done[f"{kind} {world}"]["codes"] == [0] * world, done[f"{kind} {world}"]["said"]
    apart = differences(folders, f"{kind} 1", f"{kind} {world}")
    assert max(apart.values()) < 1e-5 and apart["loss"] < 1e-5
    weights = [model.load(folders / f"{kind} {n}").state_dict() for n in (1, world)]
    assert all((weights[0][name] - weights[1][name]).abs().max() < 1e-4 for name in weights[0])


def test_a_reward_baseline_of_each_process_by_itself_would_be_noticed(folders, done):
    assert done["planted"]["codes"] == [0, 0]
    assert differences(folders, "mixed 1", "planted")["loss"] > 1e-4


def test_gradients_travel_once_a_step_in_one_message(folders, done):
    parameters = model.load(folders / "chat 1").parameter_count()
    for said in done["chat 2"]["said"]:              # two passes a step, six steps
        sizes = [line for line in said.splitlines() if line.startswith("message")]
        assert sizes == [f"message of {parameters + 1}"] * 6


def test_process_0_alone_prints_and_the_same_as_without_the_others(done):
    said, (first, second, third) = done["text 1"]["said"][0], done["text 3"]["said"]
    assert second == third == ""
    assert first.splitlines()[0] == said.splitlines()[0] and "wrote" in first


@pytest.mark.parametrize("fault, sentence", [("nan", "error: the loss or its gradient is nan at "
                                              "step 4"), ("raise", "error: no such luck")])
def test_a_failure_in_one_process_ends_all_with_one_sentence(folders, done, fault, sentence):
    assert done[fault]["codes"] == [2, 2] and done[fault]["seconds"] < 20
    said = "".join(done[fault]["said"])
    assert sentence in said and said.count("error: ") == 1 and "Traceback" not in said


def test_a_run_goes_on_with_another_number_of_processes(folders, done):
    assert done["raise, resumed"]["codes"] == [0, 0, 0], done["raise, resumed"]["said"]
    assert "resuming" in done["raise, resumed"]["said"][0]
    assert max(differences(folders, "mine", "raise").values()) < 1e-5


def test_a_sharded_target_teaches_the_same_and_each_process_holds_a_part(folders, done):
    assert done["sharded"]["codes"] == [0, 0], done["sharded"]["said"]
    assert max(differences(folders, "mixed 1", "sharded").values()) < 1e-5
    for said in done["sharded"]["said"]:
        line = next(line for line in said.splitlines() if line.startswith("holds"))
        part, whole = int(line.split()[1]), int(line.split()[3])
        assert part < 0.51 * whole


def test_answers_are_divided_and_merged(folders, done):
    assert done["answers 3"]["codes"] == [0, 0, 0], done["answers 3"]["said"]
    one, three = (sorted((folders / f"answers {n}").read_text().splitlines()) for n in (1, 3))
    assert one == three and len(one) == 11
    assert "11 new records, 99 tokens" in done["answers 3"]["said"][0]
    assert not list(folders.glob("answers 3.part*"))


def test_a_kill_loses_only_unfinished_answers(folders, done):
    assert done["killed"]["codes"] == [-signal.SIGKILL] * 3
    kept = done["killed"]["kept"]
    assert kept and done["killed, resumed"]["codes"] == [0, 0], done["killed, resumed"]["said"]
    assert f"{len(kept)} already in" in done["killed, resumed"]["said"][0]
    lines = (folders / "killed").read_text().splitlines()
    assert set(kept) < set(lines)
    assert sorted(json.loads(line)["id"] for line in lines) == [f"{i:05d}.0" for i in range(11)]
    assert not list(folders.glob("killed.part*"))


def test_a_folder_that_another_run_writes_is_refused_by_all(done):
    assert done["locked"]["codes"] == [2, 2]
    said = "".join(done["locked"]["said"])
    assert "is being written by another process" in said and said.count("error: ") == 1


@pytest.mark.parametrize("script, command", [("distill.py", "compare"), ("speculate.py", "--chat"),
                                             ("data/splits.py", "--help")])
def test_a_command_that_cannot_be_divided_refuses_several_processes(script, command, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    if script == "distill.py":                       # run_script knows nothing of the last line
        import distill
        import train
        with pytest.raises(SystemExit) as stop:
            monkeypatch.setattr(sys, "argv", [script, command])
            files.run(distill.main, train.processes, alone=["compare"])
        assert stop.value.code == 2
    else:
        assert_refused(run_script(script, command), "start it with python, not torchrun")


def test_torchrun_itself(folders, done):
    torchrun = Path(sys.executable).with_name("torchrun")
    out = folders / "torchrun"
    found = subprocess.run(
        [torchrun, "--nproc-per-node", "2", "--master-port", str(free_port()), "train.py",
         "--model", "tiny-drafter", "--tokenizer", folders / "tokenizer", "--context", "16",
         "--data", folders / "text", *map(str, SMALL), "--out", out],
        cwd=ROOT, capture_output=True, text=True, timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert found.returncode == 0, found.stderr
    assert found.stdout.count(f"wrote {out}") == 1
    assert max(differences(folders, "text 1", "torchrun").values()) < 1e-5


# ---- Starting the processes --------------------------------------------------------------------

def free_port():
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        return any_port.getsockname()[1]


def start(job, rank, port, cache, output):
    """Fork a process that runs the job's script, with stdout and stderr in the file `output`."""
    if process := os.fork():
        return process
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if job["world"] > 1:
        os.environ |= {"WORLD_SIZE": str(job["world"]), "RANK": str(rank), "LOCAL_RANK": str(rank),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                       "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    os.environ |= {"NANODRAFT_CACHE": cache, **job.get("environment", {})}
    import distill
    import train

    def said(text):
        print(text, file=sys.stderr, flush=True)

    exec(job.get("before", ""), {"train": train, "said": said})
    sys.argv = job["arguments"]
    script = {"train.py": train, "distill.py": distill}[sys.argv[0]]
    code = 0
    try:
        files.run(script.main, train.processes, alone=["compare"])
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException as error:
        said(f"Traceback: {error!r}")
        code = 1
    sys.stdout.flush()
    os._exit(code)


def perform(job, cache):
    """Run all processes of a job to their end: {"codes", "said", "seconds", "kept"}. The store in
    which they find each other is here, as it is torchrun's."""
    began, world = time.monotonic(), job["world"]
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    caches = job.get("caches", [cache] * world)
    outputs = [f"{cache}.{rank}" for rank in range(world)]
    processes = [start(job, rank, store.port, caches[rank], outputs[rank])
                 for rank in range(world)]
    while "kill" in job and not (os.path.exists(job["kill"]) and os.path.getsize(job["kill"])):
        time.sleep(0.002)
    for process in processes if "kill" in job else ():
        os.kill(process, signal.SIGKILL)
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    kept = [line.decode() for part in Path(job.get("kill", cache)).parent.glob("killed.part*")
            for line in part.read_bytes().split(b"\n")[:-1]]
    return {"codes": codes, "said": [Path(output).read_text() for output in outputs],
            "seconds": time.monotonic() - began, "kept": kept}


if __name__ == "__main__":
    import torch.distributed.fsdp  # noqa: F401  (all imports come before the forks, and only once)

    import distill  # noqa: F401

    warm = torch.nn.Parameter(torch.zeros(2, 2))           # an optimiser imports more
    torch.optim.AdamW([warm], fused=True).zero_grad()

    results = {}
    for job in json.loads(sys.stdin.read()):
        cache = str(Path(sys.argv[1], job["name"]))
        Path(cache).mkdir(parents=True)
        held = files.locked(Path(job["lock"]), folder=True) if "lock" in job else None
        with held or contextlib.nullcontext():
            results[job["name"]] = perform(job, cache)
    print(json.dumps(results))
