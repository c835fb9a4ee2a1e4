"""What every script needs besides its idea: files, flags, the progress line. Nothing to run here.

JSON lines are read with a sentence about what is wrong in them, files are written so that nothing
already written is lost, and `run` turns bad input into one sentence and exit code 2.
"""

import argparse
import ctypes
import gzip
import hashlib
import json
import math
import os
import re
import signal
import sys
import time
import zlib
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path


def run(main, together=None, alone=()):
    """Call main(); bad input (ValueError, OSError) becomes one sentence on stderr and exit code 2,
    and so does a package that is not installed.

    together: train.processes, for a script that divides its work among the processes of torchrun,
    except for the subcommands `alone`. Else several are refused: each would do the whole work, and
    write the same files. Set NANODRAFT_TRACEBACK=1 to see the traceback, too.
    """
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `python X.py | head` ends quietly
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):             # a terminal without é shows ? in its place
            stream.reconfigure(errors="replace")
    try:
        if world() > 1 and (together is None or set(alone) & set(sys.argv[1:2])):
            raise ValueError("this command runs in one process: start it with python, not torchrun")
        with together() if world() > 1 else nullcontext():
            main()
    except KeyboardInterrupt:
        print("\ninterrupted: what was saved is whole; a script that has --resume goes on from "
              "there", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if os.environ.get("NANODRAFT_TRACEBACK"):
            raise
        if isinstance(error, ModuleNotFoundError):
            error = f"{error.name} is missing: pip install -r requirements-real.txt"
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def world():
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank():
    """Which of them this one is, from 0. What they share process 0 alone prints, locks, writes."""
    return int(os.environ.get("RANK", 0)) % world()


@contextmanager
def atomic(path):
    """Yield a temporary path beside `path`: renamed onto it if the block succeeds, else removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.umask(mask := os.umask(0))
        os.chmod(temporary, 0o666 & ~mask)    # as open() does; safetensors lets only the owner read
        os.replace(temporary, path)      # in one step: a reader sees the old file or the new one
    except (ValueError, ModuleNotFoundError):
        raise
    except Exception as error:           # if the disk is full each library has a kind of its own
        raise OSError(f"{path}: could not be written ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(path, folder=False):
    """Let no other process write to `path`, a file or a folder, while the block runs.

    ValueError if one does already, or if `path` is of the other kind. The operating system holds
    the lock, so a killed process leaves none; the temporary files that it left are removed. With
    torchrun process 0 holds it for all.
    """
    if rank():
        yield
        return
    if path.exists() and path.is_dir() != folder:
        raise ValueError(f"{path} is a {'file' if folder else 'folder'}: give the name of a "
                         f"{'folder' if folder else 'file'} to write")
    lock = Path(f"{path.resolve()}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "a") as file:
        if taken(file):
            raise ValueError(f"{path} is being written by another process: wait for its end, or "
                             f"give another name")
        remove_leftovers(path if folder else path.parent)
        try:
            yield
        finally:
            with suppress(OSError):      # Windows removes no open file
                lock.unlink()


def taken(file):
    """Whether another process holds the lock of this open file. If not, this one does now, until it
    closes the file or ends."""
    try:
        if os.name == "nt":
            import msvcrt
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:             # some network file systems have no locks: go on without
        return isinstance(error, (BlockingIOError, PermissionError))
    return not os.fstat(file.fileno()).st_nlink       # removed just now by the one that held it


def remove_leftovers(folder):
    """Remove the temporary files of `atomic` in this folder whose process is gone."""
    for path in folder.glob("*.tmp"):
        process = re.fullmatch(r".+\.(\d{1,9})\.tmp", path.name)
        if process and os.name != "nt" and is_gone(int(process[1])):
            path.unlink(missing_ok=True)


def is_gone(process):
    """Whether no process has this number. Not for Windows, which has no signal that only asks."""
    try:
        os.kill(process, 0)
    except OSError as error:             # PermissionError: it runs, as another user's
        return isinstance(error, ProcessLookupError)


def read_jsonl(path):
    """All rows of a JSON lines file, or of one compressed to .gz, as dicts.

    ValueError names the file and the line that is not a JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the path of a JSON lines file")
    rows, number, opened = [], 1, gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as lines:
            while line := lines.readline(LONGEST):
                if len(line) == LONGEST:
                    raise ValueError("longer than 64 MB")
                row = json.loads(line.decode("utf-8")) if line.strip() else None
                if row is not None and not isinstance(row, dict):
                    raise ValueError(f"expected a JSON object, got {type(row).__name__}")
                if b"\\ud" in line.lower():            # half of a pair is no character of UTF-8
                    json.dumps(row, ensure_ascii=False).encode("utf-8")
                rows += [] if row is None else [row]
                number += 1
    except (ValueError, RecursionError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}, line {number}: not JSON in UTF-8 ({error}); mend or delete "
                         f"that line") from None
    return rows


LONGEST = 2 ** 26                       # bytes of a line; a .gz of a few KB can hold a line of GBs


def write_jsonl(path, rows):
    """Write rows as JSON lines, all or nothing, compressed where the name ends in .gz.

    Same rows, same bytes.
    """
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8")
    if Path(path).suffix == ".gz":
        content = gzip.compress(content, mtime=0)
    with atomic(path) as temporary:
        temporary.write_bytes(content)


def read_json(path):
    """The JSON object of a file, as a dict. ValueError names a file that is missing or damaged."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; copy it, or make it again")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); copy the file again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def write_json(path, content, indent=1):
    """Write one JSON file, all or nothing."""
    text = json.dumps(content, ensure_ascii=False, indent=indent) + "\n"
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def trim_partial_line(path):
    """Cut off the half of a last line that a killed writer leaves behind. A line that lacks its
    newline alone gets it. ValueError for a compressed file."""
    path = Path(path)
    if path.suffix == ".gz":
        raise ValueError(f"{path}: nothing can be appended to a .gz; choose another name")
    if path.is_file():
        with open(path, "r+b") as file:
            content = file.read()
            begin = content.rfind(b"\n") + 1
            try:
                json.loads(content[begin:])          # no half of an object parses
                file.write(b"\n")
            except (ValueError, RecursionError):
                file.truncate(begin)


def messages_of(row):
    """The messages of a prompt or record, {"prompt": text} being one turn of the user's.

    None where they are not a list of {"role": text, "content": text}.
    """
    messages = row.get("messages", [{"role": "user", "content": row.get("prompt")}])
    whole = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages)
    return messages if whole else None


def read_rows(path, kind, is_whole, expected):
    """All rows of a JSON lines file. ValueError for one that is not whole, which says what was
    expected, and for a file without rows. kind: what a row is called, "prompt" or the like."""
    rows = read_jsonl(path)
    for number, row in enumerate(rows, 1):
        if not is_whole(row):
            raise ValueError(f"{path}, {kind} {number}: expected {expected}")
    if not rows:
        raise ValueError(f"{path}: no {kind}s in it")
    return rows


def read_prompts(path):
    """Rows {"task", "messages"} of a prompts file, whose lines are {"task", "prompt": text} or
    {"task", "messages": [...]}.

    ValueError for a row without either, an empty prompt, or messages that do not end with a user's
    turn.
    """
    def asks(row):
        messages = messages_of(row) or [{"role": "nobody"}]
        return messages[-1]["role"] == "user" and messages[-1]["content"].strip()

    rows = read_rows(path, "prompt", asks, '{"task": "...", "prompt": "some text"} or "messages" '
                                           "that end with a user's turn that is not empty")
    return [{"task": str(row.get("task", "open")), "messages": messages_of(row)} for row in rows]


def read_openings(path):
    """Rows {"task", "opening"} of a file of first words. ValueError if a row lacks them, or there
    is none."""
    def is_whole(row):
        return isinstance(row.get("task"), str) and isinstance(row.get("opening"), str)

    return read_rows(path, "opening", is_whole, '{"task": "...", "opening": "first words"}')


def cache_dir(*parts):
    """A folder under $NANODRAFT_CACHE (default ~/.cache/nanodraft), made if missing. What lies
    there may vanish."""
    root = os.environ.get("NANODRAFT_CACHE") or Path.home() / ".cache" / "nanodraft"
    folder = Path(root, *parts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# What is read of a model's, a tokenizer's or a text's folder.
READ = ("*config.json", "*.index.json", "*.safetensors", "draft_vocabulary.json", "*.bin",
        "tokenizer.json", "tokenizer.model", "chat_template.jinja")


def fingerprint(*parts):
    """20 hex digits that change with any part: a path counts by its content (a folder by what is
    read of it), anything else by its JSON; never by a name."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            folder = [path for name in READ for path in sorted(part.glob(name))]
            for path in folder if part.is_dir() else [part]:
                with open(path, "rb") as content:
                    digest.update(hashlib.file_digest(content, "sha256").digest())
        else:
            digest.update(json.dumps(part).encode() + b"\n")
    return digest.hexdigest()[:20]


def settings(args, *names):
    """{name: value} of the flags that decide a result; of a path its fingerprint."""
    chosen = {name: getattr(args, name) for name in names}
    return {name: f"content {fingerprint(value)}" if isinstance(value, Path) else value
            for name, value in chosen.items()}


def require_same(path, old, new):
    """ValueError names what differs between the settings that `path` was made with and today's."""
    differing = [f"{name} was {old.get(name)}, now {new.get(name)}"
                 for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    if differing:
        raise ValueError(f"{path} was made with other settings ({'; '.join(differing)}): --resume "
                         f"needs the same ones; or give another --out to start a new run")


# ---- Flags -------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """argparse that keeps the lines of a description. A wrong flag is one sentence, as all bad
    input is."""

    def __init__(self, formatter_class=argparse.RawDescriptionHelpFormatter, **settings):
        super().__init__(formatter_class=formatter_class, **settings)

    def error(self, message):
        message = message.removeprefix("argument ").replace(": is ", " is ", 1)
        raise ValueError(f"{message} ({self.prog} --help lists the flags)")


def between(interval, kind=float):
    """An argparse type: a number in an interval such as "[1, inf)" or "(0, 1]"; never NaN."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    above, below = interval[0] == "(", interval[-1] == ")"             # whether an end is left out
    words = f"{'whole ' * (kind is int)}number {'above' if above else 'at least'} {low:g}"
    if high < math.inf:
        words += f" and {'below' if below else 'at most'} {high:g}"

    def read(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or (above and value == low) or (below and value == high):
            raise argparse.ArgumentTypeError(f"is {text}; expected a {words}")
        return value
    return read


def add_flags(parser, *rows):
    """Add a flag for each (name, default, kind, what it is). kind: an interval of numbers, as
    between() has it, or Path. It must be given where the default is None."""
    for name, default, kind, text in rows:
        kind = between(kind, type(default)) if isinstance(kind, str) else kind
        parser.add_argument(f"--{name}", type=kind, default=default, required=default is None,
                            help=text if default is None else f"{text} (default {default})")


def machine_flags(parser, dtypes=("float32", "bfloat16", "float16")):
    """Add --seed, --device, --dtype and --threads to an argparse parser: what all scripts share."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help=f"cpu or cuda (default {device})")
    parser.add_argument("--dtype", default="float32", choices=dtypes, help="default float32")
    add_flags(parser, ("seed", 0, "[0, 9e18]", "same seed, same machine, same result"),
                ("threads", 0, "[0, 1024]", "CPU threads; 0: one a core"))


def set_up(args):
    """Seed torch, set the threads, print what was resolved; returns (device, dtype)."""
    import torch

    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        # glibc hands each freed tensor of some MB back to the kernel, which gives the next one as
        # empty pages, one fault for every 4 KB. Logits are hundreds of MB, made and freed many
        # times a step: keeping the memory made a fine-tuning step on two cores 3 times faster.
        # The numbers are M_MMAP_MAX, M_TRIM_THRESHOLD and M_TOP_PAD.
        for option, value in ((-4, 0), (-1, 2 ** 31 - 1), (-2, 2 ** 28)):
            ctypes.CDLL(None).mallopt(option, value)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    try:
        device = torch.device(args.device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {args.device}: not usable here ({str(error).splitlines()[0]}); "
                         f"use --device cpu") from None
    print(f"device {device}, {args.dtype}, {torch.get_num_threads()} threads, seed {args.seed}, "
          f"torch {torch.__version__}")
    return device, getattr(torch, args.dtype)


def duration(seconds):
    """A span of time for people: 45s, 3m20s, 1h05m."""
    minutes, seconds = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
    return f"{minutes // 60}h{minutes % 60:02d}m"


class Progress:
    """A printed line with rate and time left, every few seconds: it reads well in a log, too."""

    def __init__(self, total, unit, every=5.0):
        self.total, self.unit, self.every = total, unit, every
        self.begin = self.last = time.monotonic()

    def update(self, done, extra=""):
        """Print a line if `every` seconds have passed, or at the end. done: units of this run."""
        now = time.monotonic()
        if now - self.last < self.every and done < self.total:
            return
        self.last = now
        rate = done / max(now - self.begin, 1e-9)
        ended = done >= self.total or not rate
        left = "done" if ended else f"{duration((self.total - done) / rate)} left"
        line = f"  {done}/{self.total} {self.unit}  {rate:.2f}/s  {left}  {extra}"
        print(line.rstrip(), flush=True)
