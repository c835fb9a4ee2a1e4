"""Pictures and tables of what was measured: decoding, the tiny world's stages, and losses compared.

    python data/report.py --dir out/tiny --out out/demo.png          what `make demo` ends with
    python data/report.py --runs out/kld out/tvd++ --out out/alpha.png
                                                         acceptance rate against positions seen

speculate.py --bench and distill.py compare print and draw their results with it, too.
"""

import platform
import re
import sys
from pathlib import Path

import numpy as np
import torch

if not __package__:  # run as a script: sys.path[0] is data/, the root is one up
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from data import files

DRAFTERS = {"base": "before: pretrained only", "more": "control: next-token loss, same steps",
            "aligned": "after: aligned with the target"}
STAGES = {"target-base": "target, pretraining", "target": "target, chat tuning (loss on answers)",
          "drafter-base": "drafter, pretraining",
          "drafter-more": "drafter, control (loss on answers)"}


# ---- The tiny world's stages -------------------------------------------------------------------

def report(args):
    """Table and picture of a folder with the logs and benchmarks of `make demo`."""
    rows = {name: {} for name in DRAFTERS}   # rows[drafter][task, temperature, gamma]: its figures
    for name in DRAFTERS:
        for path in sorted(args.dir.glob(f"bench-{name}-*.json")):
            for row in files.read_json(path)["rows"]:
                if row["task"] != "all":
                    rows[name][row["task"], row["temperature"], row["gamma"]] = row
    logs = {name: files.read_jsonl(args.dir / name / "log.jsonl")
            for name in (*STAGES, "drafter-aligned")}
    cases = list(rows["base"])
    if not cases or not rows["base"].keys() <= rows["aligned"].keys():
        raise ValueError(f"{args.dir}: holds no benchmarks of the same tasks in bench-base-*.json "
                         f"and bench-aligned-*.json: run make demo")
    for case, row in rows["base"].items():
        print("\n{}; temperature {:g}, gamma {}, {prompts} prompts".format(*case, **row))
        for name, label in DRAFTERS.items():
            if case in rows[name]:
                print("  {:40} tau {tau:.2f}  alpha {alpha:.3f} ({alpha_low:.3f} to "
                      "{alpha_high:.3f})  speed-up {speedup:.2f} ({speedup_low:.2f} to "
                      "{speedup_high:.2f})".format(label, **rows[name][case]))
    draw(args.out, logs, rows, cases)
    print(f"\nwrote {args.out}")
    before, after = rows["base"][cases[0]]["alpha_high"], rows["aligned"][cases[0]]["alpha_low"]
    if args.check and not after > before:
        raise ValueError(f"alignment did not raise alpha beyond its interval: up to {before:.3f} "
                         f"before, from {after:.3f} after")


def draw(path, logs, rows, cases):
    """Three panels: losses of all trainings, the held-out acceptance rate during alignment, block
    efficiency by task."""
    drawing, (losses_panel, alpha_panel, tau_panel) = figure(15, 4.2, panels=3)
    for name, label in STAGES.items():
        seen, losses = curve(logs[name], "tokens", "eval_loss")
        losses_panel.plot(seen / 1e6, losses, label=label)
    losses_panel.set(xlabel="million tokens seen in that stage", title="Next-token training",
                     ylabel="evaluation loss, nats a token")
    losses_panel.set_ylim(top=min(losses_panel.get_ylim()[1], 6.0))
    losses_panel.legend()
    alpha_panel.plot(*curve(logs["drafter-aligned"], "step", "held_out_alpha"), marker="o",
                     markersize=3)
    alpha_panel.set(xlabel="fine-tuning steps", ylabel="E[sum min(p, q)], held-out answers",
                    title="Alignment", ylim=(0, 1))
    gamma = min(case[2] for case in cases)              # one gamma: taus of two do not compare
    shown = [case for case in cases if case[2] == gamma]
    present = [name for name in DRAFTERS if rows[name]]
    for k, name in enumerate(present):
        at = np.arange(len(shown)) + (k - (len(present) - 1) / 2) * 0.27
        taus = [rows[name][case]["tau"] for case in shown]
        bars = tau_panel.bar(at, taus, 0.25, label=DRAFTERS[name])
        tau_panel.bar_label(bars, fmt="%.2f", fontsize=8)
    tau_panel.axhline(1, color="grey", linewidth=0.8)
    tau_panel.set_xticks(range(len(shown)), [f"{task}\nT = {t:g}" for task, t, _ in shown])
    tau_panel.set(ylabel=f"tau at gamma {gamma}", title="Block efficiency by task",
                  ylim=(0, gamma + 1))
    tau_panel.legend(fontsize=8)
    save(drawing, path)


# ---- Pictures ----------------------------------------------------------------------------------

def figure(width, height, panels=1):
    """A figure, in inches, and its panel, or panels side by side."""
    # Not pyplot, which may look for a screen.
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(width, height), layout="constrained")
    return drawing, drawing.subplots(1, panels)


def curve(log, x, y):
    """Columns x and y of the rows of a log that have y: an array (2, points)."""
    return np.array([(row[x], row[y]) for row in log if y in row]).reshape(-1, 2).T


def save(drawing, path):
    with files.atomic(path) as temporary:
        drawing.savefig(temporary, dpi=110, format=path.suffix[1:] or "png")


def draw_curves(path, curves):
    """Held-out acceptance rate against steps, one line a loss (mean over seeds), its seeds faintly
    behind it."""
    drawing, axes = figure(8, 5)
    for k, (name, seeds) in enumerate(curves.items()):
        lines = np.array(seeds)                                      # (seeds, points, 2)
        for points in lines:
            axes.plot(*points.T, color=f"C{k}", alpha=0.2)
        axes.plot(*lines.mean(0).T, color=f"C{k}", label=name)
    axes.set(xlabel="fine-tuning steps", ylabel="E[sum min(p, q)] on held-out answers",
             title="Which loss is better?")
    drawing.legend(loc="outside right center")
    save(drawing, path)


def draw_runs(path, folders):
    """Held-out acceptance rate against answer positions seen, of fine-tunings that each went on
    from the one before."""
    drawing, axes = figure(7, 4)
    before = 0
    for folder in folders:
        log = files.read_jsonl(folder / "log.jsonl")
        if "positions" not in (log or [{}])[-1]:
            raise ValueError(f"{folder}: no log of distill.py finetune; give such folders")
        seen, alphas = curve(log, "positions", "held_out_alpha")
        seen = (seen + before) / 1e6
        axes.plot(seen, alphas, marker="o", markersize=3, label=folder.name)
        print(f"{folder}: " + ", ".join(f"{a:.3f} ({x:.2f} M)" for x, a in zip(seen, alphas)))
        before += log[-1]["positions"]
    axes.set(xlabel="million answer positions seen", ylabel="E[sum min(p, q)], held-out answers")
    axes.legend()
    save(drawing, path)


# ---- Decoding, measured ------------------------------------------------------------------------

def interval(values):
    """The middle 95 % of the values: [low, high]."""
    return np.percentile(values, [2.5, 97.5]).tolist()


def bench_row(task, gamma, runs, args, verify_cost, draft_cost, size):
    """One row of figures over these prompts; runs: (plain, speculative) results of timed()."""
    # One row a prompt; columns: tokens, seconds, seconds behind the prompt, plain and then
    # speculative, and guesses accepted and drafted.
    table = np.array([[len(a.tokens), s, s - s0, len(b.tokens), t, t - t0, b.accepted, b.drafted]
                      for (a, s, s0), (b, t, t0) in runs])
    plain, plain_s, plain_behind, new, new_s, new_behind, accepted, drafted = table.sum(0)
    # Bootstrap: prompts drawn with replacement, 2,000 times: what other such prompts would give.
    picks = np.random.default_rng(args.seed).integers(len(runs), size=(2000, len(runs)))
    drawn = table[picks].sum(1)
    speedup_low, speedup_high = interval((drawn[:, 3] / drawn[:, 4]) / (drawn[:, 0] / drawn[:, 1]))
    texts, first = [b for _, (b, _, _) in runs], len(runs)     # the prompt's pass gave each a token
    calls = sum(b.target_calls for b in texts)
    # How many guesses each whole block kept, one that was neither cut nor shortened.
    whole = [kept for b in texts for length, kept in (b.blocks[:-1] if b.cut else b.blocks)
             if length == gamma]
    tau = (new - first) / calls if calls else None
    decoding = (new - first) / new_behind / ((plain - first) / plain_behind) if calls else None
    alpha = analytic = alpha_low = alpha_high = None
    if args.verify == "token" and drafted:        # the block rule knows no first refusal
        alpha, analytic = accepted / drafted, sum(b.overlap for b in texts) / drafted
        some = drawn[drawn[:, 7] > 0]
        alpha_low, alpha_high = interval(some[:, 6] / some[:, 7])
    mismatches = sum(a.tokens != b.tokens for (a, *_), (b, *_) in runs)
    return {
        "task": task, "gamma": gamma, "temperature": args.temperature, "top_p": args.top_p,
        "prompts": len(runs), "new_tokens": int(new), "tau": tau, "alpha": alpha,
        "alpha_low": alpha_low, "alpha_high": alpha_high, "alpha_analytic": analytic,
        "mbsu": tau and tau / (size * gamma + 1), "plain_tokens_per_s": plain / plain_s,
        "speculative_tokens_per_s": new / new_s, "speedup": (new / new_s) / (plain / plain_s),
        "speedup_low": speedup_low, "speedup_high": speedup_high, "decoding_speedup": decoding,
        "speedup_predicted": tau and tau / (gamma * draft_cost + verify_cost),
        "greedy_mismatches": None if args.temperature else mismatches,
        "kept_histogram": [whole.count(kept) for kept in range(gamma + 1)]}


def print_bench(result, args):
    """The table, and acceptance by position."""
    hidden = ("temperature", "top_p", "new_tokens", "alpha_low", "alpha_high", "kept_histogram")
    keys = [key for key in result["rows"][0] if key not in hidden]
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
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", info.read_text()) if info.is_file() else None
    name = cpu.group(1) if cpu else platform.processor() or platform.machine()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {torch.get_num_threads()} threads{gpu}, torch {torch.__version__}"


# ---- Losses, compared --------------------------------------------------------------------------

# Student's t at 97.5 % for 1, 2, ... degrees of freedom: three seeds say little, and the interval
# must say so.
STUDENT = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26]


def mean_and_interval(values):
    """Mean and the half width of its 95 % interval (nan for one value), as floats."""
    if len(values) == 1:
        return float(values[0]), np.nan
    student = STUDENT[min(len(values) - 1, len(STUDENT)) - 1]
    return float(np.mean(values)), student * float(np.std(values, ddof=1)) / len(values) ** 0.5


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


def main():
    parser = files.Parser(description="Table and picture of what make demo measured.")
    files.add_flags(parser, ("dir", Path("out/tiny"), Path, "folder of the stages"),
                    ("out", Path("out/demo.png"), Path, "picture to write"))
    parser.add_argument("--check", action="store_true",
                        help="fail unless alignment raised alpha beyond its interval")
    parser.add_argument("--runs", type=Path, nargs="+", metavar="DIR",
                        help="instead: draw the acceptance rate along these fine-tunings")
    args = parser.parse_args()
    if args.runs:
        draw_runs(args.out, args.runs)
        print(f"wrote {args.out}")
    else:
        report(args)


if __name__ == "__main__":
    files.run(main)
