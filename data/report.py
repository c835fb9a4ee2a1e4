"""Pictures and tables of what was measured: the tiny world's stages side by side, and the curves of a comparison of losses.

    python data/report.py --dir out/tiny --out out/demo.png                        what `make demo` ends with
    python data/report.py --runs out/kld out/tvd++ --out out/alpha.png             acceptance rate against positions seen

distill.py compare draws its curves with draw_curves().
"""

import argparse
import json
import math
import platform
import sys
from pathlib import Path

import numpy as np
import torch

if not __package__:  # run as a script: sys.path[0] is data/, the root is one up
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from data import files

DRAFTERS = {"base": "before: pretrained only", "more": "control: next-token loss, as many steps", "aligned": "after: aligned with the target"}


def report(args):
    """Table and picture of a folder with the logs and benchmarks of `make demo`."""
    rows = {}                                     # (drafter, task, temperature, gamma) -> a row of the benchmark
    for name in DRAFTERS:
        for path in sorted(args.dir.glob(f"bench-{name}-*.json")):
            for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
                if row["task"] != "all":
                    rows[name, row["task"], row["temperature"], row["gamma"]] = row
    logs = {name: files.read_jsonl(args.dir / name / "log.jsonl")
            for name in ("target-base", "target", "drafter-base", "drafter-more", "drafter-aligned")}
    cases = list(dict.fromkeys(key[1:] for key in rows))
    if not all(("base", *case) in rows and ("aligned", *case) in rows for case in cases) or not cases:
        raise ValueError(f"{args.dir}: holds no benchmarks of the same tasks for base and aligned (bench-base-*.json, bench-aligned-*.json): "
                         f"run make demo, or the benchmarks as README.md shows them")
    for task, temperature, gamma in cases:
        print(f"\n{task}; temperature {temperature:g}, gamma {gamma}, {rows['base', task, temperature, gamma]['prompts']} prompts")
        for name, label in DRAFTERS.items():
            if row := rows.get((name, task, temperature, gamma)):
                print(f"  {label:40} tau {row['tau']:.2f}  alpha {row['alpha']:.3f} ({row['alpha_low']:.3f} to {row['alpha_high']:.3f})  "
                      f"speed-up {row['speedup']:.2f} ({row['speedup_low']:.2f} to {row['speedup_high']:.2f})")
    draw(args.out, logs, rows, cases)
    print(f"\nwrote {args.out}")
    base, aligned = rows["base", *cases[0]], rows["aligned", *cases[0]]
    if args.check and not aligned["alpha_low"] > base["alpha_high"]:
        raise ValueError(f"alignment did not raise alpha beyond its interval: {base['alpha']:.3f} (to {base['alpha_high']:.3f}) before, "
                         f"{aligned['alpha']:.3f} (from {aligned['alpha_low']:.3f}) after")


def draw(path, logs, rows, cases):
    """Three panels: losses of all trainings, the held-out acceptance rate during alignment, block efficiency by task."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (losses_panel, alpha_panel, tau_panel) = pyplot.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    labels = {"target-base": "target, pretraining", "target": "target, chat tuning (loss on answers)",
              "drafter-base": "drafter, pretraining", "drafter-more": "drafter, control (loss on answers)"}
    for name, label in labels.items():
        points = [(row["tokens"] / 1e6, row["eval_loss"]) for row in logs[name] if "eval_loss" in row]
        losses_panel.plot(*zip(*points), label=label)
    losses_panel.set(xlabel="million tokens seen in that stage", ylabel="evaluation loss, nats a token", title="Next-token training")
    losses_panel.set_ylim(top=min(losses_panel.get_ylim()[1], 6.0))
    losses_panel.legend()
    points = [(row["step"], row["held_out_alpha"]) for row in logs["drafter-aligned"] if "held_out_alpha" in row]
    alpha_panel.plot(*zip(*points), marker="o", markersize=3)
    alpha_panel.set(xlabel="fine-tuning steps", ylabel="E[sum min(p, q)], held-out answers", title="Alignment", ylim=(0, 1))
    shown = [case for case in cases if case[2] == min(c[2] for c in cases)]      # one gamma: taus of two do not compare
    present = [name for name in DRAFTERS if any(key[0] == name for key in rows)]
    for k, name in enumerate(present):
        heights = [rows[name, *case]["tau"] for case in shown]
        bars = tau_panel.bar([i + (k - (len(present) - 1) / 2) * 0.27 for i in range(len(shown))], heights, 0.25, label=DRAFTERS[name])
        tau_panel.bar_label(bars, fmt="%.2f", fontsize=8)
    tau_panel.axhline(1, color="grey", linewidth=0.8)
    tau_panel.set_xticks(range(len(shown)), [f"{task}\nT = {temperature:g}" for task, temperature, _ in shown])
    tau_panel.set(ylabel=f"tau at gamma {shown[0][2]}", title="Block efficiency by task", ylim=(0, shown[0][2] + 1))
    tau_panel.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def bench_row(task, gamma, runs, args, verify_cost, draft_cost, size):
    """One row of figures over these prompts; runs: (plain, speculative) results of timed()."""
    # One row a prompt; columns: plain tokens and seconds, speculative tokens and seconds, accepted,
    # drafted, and the seconds behind the prompt, plain and speculative.
    table = np.array([[len(a.tokens), s, len(b.tokens), t, b.accepted, b.drafted, s - s0, t - t0]
                      for (a, s, s0), (b, t, t0) in runs])
    # Bootstrap: prompts drawn with replacement, 2,000 times: what other such prompts would give.
    picks = np.random.default_rng(args.seed).integers(len(runs), size=(2000, len(runs)))
    total, drawn, texts = table.sum(0), table[picks].sum(1), [b for _, (b, _, _) in runs]
    plain, speculative = total[0] / total[1], total[2] / total[3]
    speedups = (drawn[:, 2] / drawn[:, 3]) / (drawn[:, 0] / drawn[:, 1])
    calls, whole = sum(b.target_calls for b in texts), np.zeros(gamma + 1, int)
    for b in texts:                               # whole blocks: neither cut nor shortened
        for drafted, kept in b.blocks[:-1] if b.cut else b.blocks:
            whole[kept] += drafted == gamma
    tau = (total[2] - len(runs)) / calls if calls else None
    row = {"task": task, "gamma": gamma, "temperature": args.temperature, "top_p": args.top_p,
           "prompts": len(runs), "new_tokens": int(total[2]), "tau": tau, "alpha": None,
           "alpha_low": None, "alpha_high": None, "alpha_analytic": None,
           "mbsu": tau and tau / (size * gamma + 1),
           "plain_tokens_per_s": plain, "speculative_tokens_per_s": speculative,
           "speedup": speculative / plain, "speedup_low": float(np.percentile(speedups, 2.5)),
           "speedup_high": float(np.percentile(speedups, 97.5)), "decoding_speedup": None,
           "speedup_predicted": tau and tau / (gamma * draft_cost + verify_cost),
           "greedy_mismatches": None, "kept_histogram": whole.tolist()}
    if calls:                                     # the prompt's pass gave each first token
        first = len(runs)
        row["decoding_speedup"] = (total[2] - first) / total[7] / ((total[0] - first) / total[6])
    if args.verify == "token" and total[5]:       # the block rule knows no first refusal
        alphas = drawn[drawn[:, 5] > 0]
        low, high = np.percentile(alphas[:, 4] / alphas[:, 5], [2.5, 97.5]).tolist()
        row |= {"alpha": total[4] / total[5], "alpha_low": low, "alpha_high": high,
                "alpha_analytic": sum(b.overlap for b in texts) / total[5]}
    if args.temperature == 0:
        row["greedy_mismatches"] = sum(a.tokens != b.tokens for (a, *_), (b, *_) in runs)
    return row


def print_bench(result, args):
    """The table, and acceptance by position."""
    keys = ("task", "gamma", "prompts", "tau", "alpha", "alpha_analytic", "mbsu",
            "plain_tokens_per_s", "speculative_tokens_per_s", "speedup", "speedup_low",
            "speedup_high", "decoding_speedup", "speedup_predicted", "greedy_mismatches")
    print(f"{result['machine']}; drafter / target parameters c = {result['size_ratio']:.3f}; "
          f"temperature {args.temperature}, top-p {args.top_p}, rule {args.verify}")
    print("| " + " | ".join(keys).replace("_", " ") + " |\n" + "|---" * len(keys) + "|")
    for row in result["rows"]:
        cells = (f"{row[key]:.2f}" if isinstance(row[key], float) else row[key] for key in keys)
        print("| " + " | ".join("-" if cell is None else str(cell) for cell in cells) + " |")
    for row in result["rows"][-len(args.gamma):]:
        # at_least[k]: whole blocks that kept k guesses or more.
        at_least = np.array(row["kept_histogram"])[::-1].cumsum()[::-1]
        if at_least[0]:
            reached = " ".join(f"{n / at_least[0]:.2f}" for n in at_least[1:])
            after = " ".join(f"{b / a:.2f}" if a else "-" for a, b in zip(at_least, at_least[1:]))
            print(f"gamma {row['gamma']}, {at_least[0]} whole blocks; guess 1, 2, ... was kept in "
                  f"{reached} of all blocks, and in {after} of those that kept all before it")
    if args.json:
        print(f"wrote {args.json}")


def machine():
    """One line that says what the figures were measured on."""
    name, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.is_file() and "model name" in (text := info.read_text()):
        name = text.split("model name", 1)[1].splitlines()[0].split(":")[1].strip()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {torch.get_num_threads()} threads{gpu}, torch {torch.__version__}"


# Student's t at 97.5 % for 1, 2, ... degrees of freedom: three seeds say little, and the interval
# must say so.
STUDENT = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26]


def mean_and_interval(values):
    """Mean and the half width of its 95 % interval (nan for one value), as floats."""
    n, half = len(values), math.nan
    if n > 1:
        student = STUDENT[min(n - 1, len(STUDENT)) - 1]
        half = student * float(np.std(values, ddof=1)) / math.sqrt(n)
    return float(np.mean(values)), half


def print_comparison(names, runs):
    """Each loss's results on test prompts, mean and half width over its seeds, and the difference
    from the first loss, paired by seed. runs: those of compare.json."""
    final = {name: [run for run in runs if run["loss"] == name and "dev_alpha" not in run]
             for name in names}
    print(f"\nmean over {len(final[names[0]])} seeds, half width of its 95 % interval; then the "
          f"difference from {names[0]}, paired by seed")
    for name in names:
        print(f"{name} (learning rate {final[name][0]['learning_rate']:g})")
        for key in [key for key in final[name][0] if key.startswith(("alpha", "tau"))]:
            values = [run[key] for run in final[name]]
            line = "  {:28} {:.4f} ± {:.4f}".format(key, *mean_and_interval(values))
            if name != names[0]:
                differences = [a - run[key] for a, run in zip(values, final[names[0]])]
                line += "   difference {:+.4f} ± {:.4f}".format(*mean_and_interval(differences))
            print(line.replace(" ± nan", ""))                    # one seed has no interval


def draw_curves(path, curves):
    """Held-out acceptance rate against steps, one line a loss (mean over seeds), its seeds faintly behind it."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for k, (name, seeds) in enumerate(curves.items()):
        for points in seeds:
            axes.plot(*zip(*points), color=f"C{k}", alpha=0.2)
        axes.plot([step for step, _ in seeds[0]], np.mean([[a for _, a in points] for points in seeds], 0), color=f"C{k}", label=name)
    axes.set(xlabel="fine-tuning steps", ylabel="E[sum min(p, q)] on held-out answers", title="Which loss is better?")
    figure.legend(loc="outside right center")
    figure.savefig(path, dpi=110)


def draw_runs(path, folders):
    """Held-out acceptance rate against answer positions seen, of fine-tunings that each went on from the one before."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    before = 0
    for folder in folders:
        rows = files.read_jsonl(folder / "log.jsonl")
        points = [((before + row["positions"]) / 1e6, row["held_out_alpha"]) for row in rows if "held_out_alpha" in row]
        axes.plot(*zip(*points), marker="o", markersize=3, label=folder.name)
        print(f"{folder}: " + ", ".join(f"{alpha:.3f} ({x:.2f} M)" for x, alpha in points))
        before += rows[-1]["positions"]
    axes.set(xlabel="million answer positions seen", ylabel="E[sum min(p, q)], held-out answers")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description="Table and picture of what make demo measured.")
    parser.add_argument("--dir", type=Path, default=Path("out/tiny"), help="folder of the stages (default out/tiny)")
    parser.add_argument("--out", type=Path, default=Path("out/demo.png"), help="picture to write (default out/demo.png)")
    parser.add_argument("--check", action="store_true", help="fail unless alignment raised alpha beyond its interval")
    parser.add_argument("--runs", type=Path, nargs="+", metavar="DIR", help="instead: draw the acceptance rate along these fine-tunings")
    args = parser.parse_args()
    if args.runs:
        draw_runs(args.out, args.runs)
        print(f"wrote {args.out}")
    else:
        report(args)


if __name__ == "__main__":
    files.run(main)
