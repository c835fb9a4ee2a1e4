"""This project's decoding beside other programs', on the clock: same weights, same prompts.

    python tests/against_transformers.py --limit 4

Greedy. Every prompt goes through all ways of decoding. Every second prompt goes through the list
backwards, so that a machine that slows down favours no way. Rates are new tokens over wall time,
prompt included. Intervals are bootstrapped over prompts. Texts are compared token by token with
transformers' plain greedy text. transformers runs in fp32 or bfloat16, whichever is faster for it
here. llama.cpp (pip install xllamacpp) reads the same fp16 weights, written by data/export_gguf.py,
and the 4-bit file that the weights come from.

Prints a table for data/RESULTS.md. Writes out/against.json, out/bench.png and out/passes.png, which
shows the cost of a pass against the number of tokens in it. Needs requirements-real.txt; not
collected by pytest.
"""

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from llama_cpp_process import Text, llama_cpp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import distill  # noqa: E402
import model  # noqa: E402
import speculate  # noqa: E402
from data import export_gguf, files, report, smollm2, tokenizer  # noqa: E402

FP32 = "transformers float32, plain"                   # whose texts the others are compared with


def ways_of(args, device):
    """{name: function(prompt ids) -> (new ids, target calls or None)}: all that is compared."""
    tok = tokenizer.load(args.target)
    target, draft = (model.load(folder, device).for_decoding()
                     for folder in (args.target, args.draft))
    rest = (args.max_new_tokens, 0.0, 1.0, tok.eos_ids)

    def plain(ids):
        made = speculate.autoregressive_generate(target, torch.tensor([ids], device=device), *rest)
        return made.tokens, made.target_calls

    def speculative(gamma, choose=None):
        def run(ids):
            made = speculate.speculative_generate(target, draft, torch.tensor([ids], device=device),
                                                  rest[0], gamma, *rest[1:], choose=choose)
            return made.tokens, made.target_calls
        return run

    ways = {"nanodraft, plain": plain}
    ways |= {f"nanodraft, gamma {gamma}": speculative(gamma) for gamma in args.gamma}
    ways["nanodraft, gamma auto"] = speculative(0, speculate.measured_gamma(target, draft))
    if args.ours:
        return ways, tok, target
    ways |= transformers_ways(args, device, tok)
    if importlib.util.find_spec("xllamacpp"):
        folder, q4 = files.cache_dir("gguf"), smollm2.fetch_gguf()
        for name in ("target", "draft"):
            export_gguf.export(getattr(args, name), folder / f"{name}.gguf")
        gamma, limits = args.llama_gamma, (args.max_new_tokens, torch.get_num_threads())
        ways["llama.cpp F16, plain"] = llama_cpp(folder / "target.gguf", *limits)
        ways[f"llama.cpp F16, gamma {gamma}, this drafter"] = llama_cpp(
            folder / "target.gguf", *limits, folder / "draft.gguf", gamma)
        ways["llama.cpp Q4_1, plain"] = llama_cpp(q4, *limits)
    else:
        print("no rows of llama.cpp: pip install xllamacpp")
    return ways, tok, target


def transformers_ways(args, device, tok):
    """transformers' generate: plain, assisted by the same drafter, and with prompt lookup."""
    import transformers
    transformers.logging.set_verbosity_error()

    def load(folder, dtype):
        llama = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
        # Only what is set here decides, nothing from generation_config.json.
        llama.generation_config = transformers.GenerationConfig(
            eos_token_id=list(tok.eos_ids), pad_token_id=tok.pad_id, do_sample=False)
        return llama.eval()

    both = {name: load(args.target, getattr(torch, name)) for name in ("float32", "bfloat16")}

    def seconds(name):
        tokens, begin = torch.ones(1, 64, dtype=torch.int64, device=device), time.perf_counter()
        both[name].generate(tokens, attention_mask=tokens, max_new_tokens=args.max_new_tokens)
        return time.perf_counter() - begin

    faster = min(both, key=seconds)
    print(f"transformers' other ways run in {faster}, the faster one here")
    assistant = load(args.draft, getattr(torch, faster))

    def generate(name=faster, before=None, **options):
        def run(ids):
            if before:
                before()
            tokens = torch.tensor([ids], device=device)
            made = both[name].generate(tokens, attention_mask=torch.ones_like(tokens),
                                       max_new_tokens=args.max_new_tokens, **options)
            return made[0, len(ids):].tolist(), None
        return run

    def schedule(count, confidence):
        def set_it():            # transformers adapts the confidence and keeps it: set it again
            settings = assistant.generation_config
            settings.num_assistant_tokens = count
            settings.num_assistant_tokens_schedule = "constant"
            settings.assistant_confidence_threshold = confidence
        return set_it

    ways = {f"transformers {name}, plain": generate(name) for name in both}
    # Its default schedule: up to 20 tokens, fewer once the drafter's confidence is below 0.4.
    for name, count, confidence in (("default schedule", 20, 0.4), ("constant 3", 3, 0.0)):
        ways[f"transformers {faster}, assisted, {name}"] = generate(
            before=schedule(count, confidence), assistant_model=assistant)
    ways[f"transformers {faster}, prompt lookup 3"] = generate(prompt_lookup_num_tokens=3)
    return ways


def interval(tokens, seconds, base, picks):
    """{way: (ratio, low, high)}: the ratio of each way's total rate to that of `base`.

    low and high: the 95 % interval over prompts. tokens, seconds: {way: (prompts,) array}.
    """
    def rate(way, rows):
        return tokens[way][rows].sum(-1) / seconds[way][rows].sum(-1)

    whole, ratios = np.arange(picks.shape[1]), {}
    for way in tokens:
        resampled = rate(way, picks) / rate(base, picks)
        ratios[way] = rate(way, whole) / rate(base, whole), *np.percentile(resampled, [2.5, 97.5])
    return ratios


def measure(ways, ids, tok):
    """Tokens, seconds, texts unlike the reference and target calls: each {way: one a prompt}."""
    for run in ways.values():                     # warms up, not counted
        run(ids[0])
    tokens, seconds, unequal, calls = ({way: [] for way in ways} for _ in range(4))
    progress = files.Progress(len(ids), "prompts")
    for number, prompt in enumerate(ids):
        made = {}
        for way in list(ways) if number % 2 == 0 else list(ways)[::-1]:
            begin = time.perf_counter()
            made[way], its_calls = ways[way](prompt)
            seconds[way].append(time.perf_counter() - begin)
            tokens[way].append(made[way].count if isinstance(made[way], Text) else len(made[way]))
            calls[way].append(its_calls)
        for way in ways:
            reference = made.get(FP32, made["nanodraft, plain"])
            if isinstance(made[way], Text):
                reference = tok.decode([token for token in reference if token not in tok.eos_ids])
            unequal[way].append(made[way] != reference)
        progress.update(number + 1)
    tokens = {way: np.array(counts, dtype=float) for way, counts in tokens.items()}
    seconds = {way: np.array(times, dtype=float) for way, times in seconds.items()}
    return tokens, seconds, unequal, calls


def compare(args):
    device, _ = files.set_up(args)
    ways, tok, target = ways_of(args, device)
    prompts = files.read_prompts(args.prompts)
    tasks = [prompt["task"] for prompt in prompts]
    prompts = [prompt for i, prompt in enumerate(prompts)
               if tasks[:i].count(prompt["task"]) < args.limit]
    ids = [tok.chat_prompt(prompt["messages"]) for prompt in prompts]
    tokens, seconds, unequal, calls = measure(ways, ids, tok)
    picks = np.random.default_rng(args.seed).integers(len(ids), size=(2000, len(ids)))
    bases = {"fp32": FP32, "bf16": "transformers bfloat16, plain", "plain": "nanodraft, plain"}
    ratios = {name: interval(tokens, seconds, base, picks) for name, base in bases.items()
              if base in ways}
    rows = []
    print(f"\n{report.machine()}; {len(ids)} prompts of {args.prompts}, at most "
          f"{args.max_new_tokens} new tokens, greedy\n")
    print("| way | tokens/s | " + "".join(f"over {bases[name]} (95 %) | " for name in ratios)
          + "tau | texts unlike |\n" + "|---" * (len(ratios) + 4) + "|")
    for way in ways:
        known = [count for count in calls[way] if count is not None]
        tau = (tokens[way].sum() - len(ids)) / sum(known) if known else None
        rows.append({"way": way, "tokens_per_s": tokens[way].sum() / seconds[way].sum(),
                     **{f"over_{name}": ratio[way] for name, ratio in ratios.items()},
                     "tau": tau, "unequal": sum(unequal[way]),
                     "seconds": seconds[way].tolist(), "tokens": tokens[way].tolist()})
        print("| {} | {:.1f} | ".format(way, rows[-1]["tokens_per_s"])
              + "".join("{:.2f} ({:.2f} to {:.2f}) | ".format(*rows[-1][f"over_{name}"])
                        for name in ratios)
              + f"{f'{tau:.2f}' if known else ''} | {sum(unequal[way])} of {len(ids)} |")
    costs = passes(args, target, device)
    with files.atomic(args.json) as temporary:
        result = {"machine": report.machine(), "target": str(args.target), "draft": str(args.draft),
                  "prompts": len(ids), "tasks": [prompt["task"] for prompt in prompts],
                  "rows": rows, "passes": costs}
        temporary.write_text(json.dumps(result, indent=1) + "\n")
    if not args.ours:
        draw(args, rows, costs)
    print(f"\nwrote {args.json}" + ("" if args.ours else f" and two pictures in {args.out}"))


@torch.inference_mode()
def passes(args, target, device, widths=(1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16), repeats=15):
    """Median milliseconds of one pass over `width` tokens after 200 others, both forms in turn.

    Then of one token after 2,000, and of a drafter's step.
    """
    draft = model.load(args.draft, device).for_decoding()
    models = {"for_decoding": target, "nn.Linear": model.load(args.target, device)}
    costs = {name: [] for name in models}
    for width in widths:
        tokens = torch.zeros(1, width, dtype=torch.int64, device=device)
        cache = model.KVCache(target.config, 1, 220, device)
        seconds = {name: [] for name in models}
        for _ in range(repeats + 1):
            for name, llama in models.items():
                cache.length = 200
                begin = time.perf_counter()
                llama.head(llama.hidden(tokens, cache)[0])
                seconds[name].append(time.perf_counter() - begin)
        for name in models:
            costs[name].append(float(np.median(seconds[name][1:])) * 1e3)
    near, far, step = [], [], []
    for _ in range(20):
        near.append(speculate.pass_seconds(target, 1, 200, repeats=1))
        far.append(speculate.pass_seconds(target, 1, 2000, repeats=1))
        step.append(speculate.pass_seconds(draft, 1, 200, repeats=1))
    near, far, step = (float(np.median(seconds)) * 1e3 for seconds in (near, far, step))
    print(f"\none token after 2,000: {far:.1f} ms, after 200: {near:.1f} ms, "
          f"ratio {far / near:.2f}; a drafter's step {step:.2f} ms, ratio {step / near:.3f}")
    print(f"\n{'pass over':29}" + " ".join(f"{width:6d}" for width in widths) + "  tokens")
    for name in models:
        print(f"{name:26} ms" + " ".join(f"{ms:6.1f}" for ms in costs[name]))
    return {"widths": list(widths), "after_2000": far, "after_200": near, "draft": step,
            "ms": costs}


def generation(args):
    """Tokens a second of two programs that answer in batches: same prompts, same sampling.

    The programs are distill.py generate and transformers' generate.
    """
    import transformers
    transformers.logging.set_verbosity_error()
    device, dtype = files.set_up(args)
    tok = tokenizer.load(args.target)
    target = model.load(args.target, device, dtype).for_decoding()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(args.target, dtype=dtype)
    theirs = theirs.to(device).eval()
    prompts = [tok.chat_prompt(prompt["messages"]) for prompt in files.read_prompts(args.prompts)]
    prompts = [prompts[i % len(prompts)] for i in range(args.generation)]
    temperature, top_p = 0.7, 0.95
    rates = {}

    def ours(batch):
        made = distill.answer_prompts(
            target, prompts, [temperature] * len(prompts), top_p, args.max_new_tokens,
            set(tok.eos_ids), torch.Generator(device).manual_seed(args.seed), batch)
        return sum(len(ids) + ended for _, ids, ended, _ in made)

    def length(row):
        """Tokens up to the first end token, which counts."""
        ends = (i + 1 for i, token in enumerate(row) if token in tok.eos_ids)
        return next(ends, len(row))

    def transformers_batches(batch):
        count = 0
        ordered = sorted(prompts, key=len)     # prompts of similar length together: little padding
        for at in range(0, len(ordered), batch):
            rows = ordered[at:at + batch]
            width = max(map(len, rows))
            padding = [width - len(row) for row in rows]
            tokens = [[tok.pad_id] * pad + row for pad, row in zip(padding, rows)]
            mask = [[0] * pad + [1] * len(row) for pad, row in zip(padding, rows)]
            made = theirs.generate(
                torch.tensor(tokens, device=device),
                attention_mask=torch.tensor(mask, device=device),
                max_new_tokens=args.max_new_tokens, do_sample=True, temperature=temperature,
                top_p=top_p, top_k=0, repetition_penalty=1.0, eos_token_id=list(tok.eos_ids),
                pad_token_id=tok.pad_id)
            count += sum(length(row) for row in made[:, width:].tolist())
        return count

    for batch in args.batch_sizes:
        for name, run in (("distill.py generate", ours), ("transformers", transformers_batches)):
            if batch > len(prompts):
                continue
            begin = time.perf_counter()
            count = run(batch)
            rates.setdefault(name, {})[batch] = count / (time.perf_counter() - begin)
            print(f"{name:20} batch {batch:4d}: {count} tokens, {rates[name][batch]:.1f} tokens/s",
                  flush=True)
    best = {name: max(values.values()) for name, values in rates.items()}
    ratio = best["distill.py generate"] / best["transformers"]
    print(f"best against best: {ratio:.2f} times ({args.dtype})")


def draw(args, rows, costs):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    args.out.mkdir(parents=True, exist_ok=True)
    figure, axes = pyplot.subplots(figsize=(9, 0.42 * len(rows) + 1.4), layout="constrained")
    shown = rows[::-1]
    ratios = np.array([row["over_fp32"] for row in shown])
    below, above = ratios[:, 0] - ratios[:, 1], ratios[:, 2] - ratios[:, 0]
    colours = ["C0" if row["way"].startswith("nanodraft") else "C7" for row in shown]
    bars = axes.barh([row["way"] for row in shown], ratios[:, 0], xerr=(below, above),
                     color=colours, capsize=2)
    rates = [f"{row['tokens_per_s']:.0f} tokens/s" for row in shown]
    axes.bar_label(bars, rates, padding=8, fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.margins(x=0.15)
    machine = "" if torch.cuda.is_available() else " on two CPU cores"
    axes.set(xlabel="token rate over transformers' plain generate in fp32",
             title=f"Greedy decoding{machine}")
    figure.savefig(args.out / "bench.png", dpi=110)
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, milliseconds in costs["ms"].items():
        axes.plot(costs["widths"], milliseconds, marker="o", label=name)
    axes.set(xlabel="tokens in the pass", ylabel="milliseconds, median",
             title="Cost of one pass of the target", ylim=(0, None))
    axes.legend()
    figure.savefig(args.out / "passes.png", dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, default=Path("models/smollm2-135m-instruct"))
    parser.add_argument("--draft", type=Path, default=Path("data/smollm2-drafter"))
    parser.add_argument("--prompts", type=Path, default=Path("data/prompts/test.jsonl"))
    parser.add_argument("--limit", type=int, default=12,
                        help="prompts of each task (default 12: all)")
    parser.add_argument("--gamma", type=int, nargs="+", default=[1, 2, 3, 5])
    parser.add_argument("--ours", action="store_true", help="only the ways of this project")
    parser.add_argument("--llama-gamma", type=int, default=3,
                        help="of llama.cpp with the drafter (default 3)")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--json", type=Path, default=Path("out/against.json"))
    parser.add_argument("--out", type=Path, default=Path("out"),
                        help="folder of the pictures (default out)")
    parser.add_argument("--generation", type=int, metavar="N",
                        help="instead: batch generation of N answers, for --batch-sizes")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 64, 128, 256])
    files.machine_flags(parser)
    args = parser.parse_args()
    if args.generation:
        generation(args)
    else:
        compare(args)


if __name__ == "__main__":
    files.run(main)
