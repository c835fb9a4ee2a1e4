"""Grade the exercises: points for each check that holds, a hint for each that does not.

    python tests/exercises/grade.py                 exercises 1 to 14, in seconds
    python tests/exercises/grade.py 03 07           these two
    python tests/exercises/grade.py 15 16 --slow    those that train: minutes, after `make demo`

Write your functions into tests/exercises/NN_name.py, which says what is asked and what is given.
Exit code 0: every point of what was graded. The checks are in checks_*.py. solutions/ holds one
solution of each exercise; no check looks at them.
"""

import argparse
import functools
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(HERE)]

import checks_decoding  # noqa: E402  (after the path is set)
import checks_losses  # noqa: E402
import checks_training  # noqa: E402

import losses  # noqa: E402

# Exercise -> rows of (points, claim, check, hint); TRAINED: its checks train in the tiny world.
CHECKS = checks_decoding.CHECKS | checks_losses.CHECKS | checks_training.CHECKS
TRAINED = checks_losses.TRAINED | checks_training.TRAINED


@dataclass
class Result:
    """One check of one exercise."""

    points: int
    claim: str
    hint: str
    problem: str | None              # None: it holds


def load(number, folder=HERE):
    """The functions of an exercise, as a module, compiled from the file's text: Python's own cache
    of compiled modules misses an edit within the same second."""
    path = min(folder.glob(f"{number:02}_*.py"), default=None)
    if path is None:
        raise FileNotFoundError(f"there is no {number:02}_*.py in {folder}")
    its = sys.modules[path.stem] = types.ModuleType(path.stem)         # dataclasses look for it
    its.__file__ = str(path)
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), vars(its))
    its.load_again = functools.partial(load, number, folder)     # for a check that needs it anew
    return its


def examine(number, load, world=None):
    """The Results of an exercise; load() gives its functions anew for each check. Only with a
    world, a folder, the checks that train there are made, too."""
    rows = list(CHECKS[number])
    if world is not None:
        rows += [(points, claim, functools.partial(check, world=world), hint)
                 for points, claim, check, hint in TRAINED.get(number, [])]
    return [Result(points, claim, hint, problem(check, load))
            for points, claim, check, hint in rows]


def problem(check, load):
    """None if the check holds, otherwise why not, in one line.

    It holds if it returns True, and in no other way. Whatever an exercise does is its own fault
    alone: a syntax error, an exception, sys.exit, another default dtype, a loss entered in LOSSES.
    """
    try:
        with (torch.random.fork_rng(), torch.enable_grad(), mock.patch.dict(losses.LOSSES),
              mock.patch.dict(losses.BASELINES)):
            return None if check(load()) is True else "it does not hold"
    except (Exception, SystemExit) as error:
        return " ".join(f"{type(error).__name__}: {error}".split())[:200].rstrip(": ")
    finally:
        torch.set_default_dtype(torch.float32)


def grade(number, folder=HERE, world=None):
    """The Results of the exercise's file in the folder."""
    return examine(number, functools.partial(load, number, Path(folder)), world)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", type=int, metavar="NN",
                        help="exercises (default: all that are graded)")
    parser.add_argument("--slow", action="store_true", help="also those that train, 15 and 16")
    parser.add_argument("--folder", type=Path, default=HERE,
                        help="where the exercises' files are (default: beside this script)")
    parser.add_argument("--world", type=Path, default=ROOT / "out" / "tiny",
                        help="--slow: the tiny world's folder (default: that of `make demo`)")
    args = parser.parse_args()
    available = [n for n in sorted(CHECKS) if args.slow or n not in TRAINED]
    numbers = args.numbers or available
    for number in numbers:
        if number not in CHECKS:
            parser.error(f"there is no exercise {number}; they are 1 to {max(CHECKS)}")
        if number not in available:
            parser.error(f"exercise {number} trains for minutes: add --slow")
    trains = bool({*numbers} & {*TRAINED})
    if trains and not (args.world / "records.jsonl").is_file():
        parser.error(f"{args.world} holds no tiny world: run `make demo`, or give --world DIR")
    torch.set_num_threads(1)                      # tiny models: a second thread only adds waiting
    earned = possible = 0
    for number in numbers:
        print(f"exercise {number:02}", flush=True)
        for r in grade(number, args.folder, args.world):
            print(f"  {'ok  ' if r.problem is None else 'FAIL'} {r.points:2}  {r.claim}")
            if r.problem is not None:
                print(f"           hint: {r.hint}\n           ({r.problem})")
            earned += r.points if r.problem is None else 0
            possible += r.points
    print(f"{earned} of {possible} points")
    sys.exit(earned != possible)


if __name__ == "__main__":
    main()
