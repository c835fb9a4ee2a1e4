"""This project's decoding beside transformers' own, on the clock: same weights, same prompts, alternated.

    python tests/against_transformers.py --draft data/smollm2-drafter --limit 4

Greedy. Every prompt goes through all ways of decoding, every second prompt through the same list backwards, so that a
drift of the machine favours nobody. One gamma holds for all prompts; of transformers' assisted generation the default
schedule and a constant one of each gamma are timed, with the same drafter. Rates are new tokens over wall time, prompt
included; intervals are bootstrapped over prompts. Texts are compared token by token with transformers' plain greedy text.

Prints the table of README.md, writes out/against.json, out/bench.png and, with the cost of a pass against the number of
tokens in it, out/passes.png. Needs requirements-real.txt; not collected by pytest.
"""

import argparse
import importlib.util
import json
import multiprocessing
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import distill  # noqa: E402
import model  # noqa: E402
import speculate  # noqa: E402
from data import files, tokenizer  # noqa: E402


def ways_of(args, device):
    """{name: function(prompt ids) -> (new ids, target calls or None)}: all ways of decoding that are compared."""
    import transformers
    transformers.logging.set_verbosity_error()
    tok = tokenizer.load(args.target)
    target, verifiers = speculate.load_verifiers(args.target, args.gamma, device, torch.float32)
    draft = model.load(args.draft, device).pack()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.float32).to(device).eval()
    assistant = transformers.AutoModelForCausalLM.from_pretrained(args.draft, dtype=torch.float32).to(device).eval()
    for llama in (theirs, assistant):             # only what is set here decides, nothing from generation_config.json
        llama.generation_config = transformers.GenerationConfig(eos_token_id=list(tok.eos_ids), pad_token_id=tok.pad_id, do_sample=False)
    auto = speculate.measured_gamma(target, draft)
    print("costs in plain steps that auto measured: drafter step {:.3f}, passes over 1, 2, ... tokens {}".format(
        auto.draft_cost, " ".join(f"{cost:.2f}" for cost in auto.verify_costs[1:])))

    def plain(ids):
        made = speculate.autoregressive_generate(target, torch.tensor([ids]), args.max_new_tokens, 0.0, 1.0, tok.eos_ids)
        return made.tokens, made.target_calls

    def speculative(gamma):
        def run(ids):
            made = speculate.speculative_generate(verifiers.get(gamma, target), draft, torch.tensor([ids]), args.max_new_tokens, gamma, 0.0, 1.0, tok.eos_ids)
            return made.tokens, made.target_calls
        return run

    def transformers_generate(before=None, **options):
        def run(ids):
            if before:
                before()
            tokens = torch.tensor([ids])
            made = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=args.max_new_tokens, **options)
            return made[0, len(ids):].tolist(), None
        return run

    def schedule(count, confidence):
        def set_it():                             # transformers adapts the confidence as it goes and keeps it: start it anew
            assistant.generation_config.num_assistant_tokens = count
            assistant.generation_config.num_assistant_tokens_schedule = "constant"
            assistant.generation_config.assistant_confidence_threshold = confidence
        return set_it

    ways = {"nanodraft, plain": plain}
    ways |= {f"nanodraft, gamma {gamma}": speculative(gamma) for gamma in args.gamma}
    ways["nanodraft, gamma auto"] = speculative(auto)
    ways["transformers, plain"] = transformers_generate()
    # Its defaults (transformers 5): up to 20 tokens, fewer as soon as the drafter's confidence falls below 0.4, adapted.
    ways["transformers, assisted, default schedule"] = transformers_generate(schedule(20, 0.4), assistant_model=assistant)
    for gamma in args.gamma:
        ways[f"transformers, assisted, constant {gamma}"] = transformers_generate(schedule(gamma, 0.0), assistant_model=assistant)
    ways["transformers, prompt lookup 3"] = transformers_generate(prompt_lookup_num_tokens=3)
    if importlib.util.find_spec("xllamacpp"):
        ways["llama.cpp (compiled), plain"] = llama_cpp(args)
    else:
        print("no row of llama.cpp: pip install xllamacpp")
    return ways, tok, target


def llama_cpp(args):
    """A compiled program on the same weights, for honesty's sake: function(prompt ids) -> (text, None), its tokens counted by it.

    Writes them as an fp32 GGUF into the cache folder: the chat model's own file with every tensor dequantised. It runs in a
    process of its own, asleep unless asked: its threads would be counted with torch's by the OpenMP library that both share,
    which, seeing more threads than cores, no longer lets them wait awake; every small operation then costs more (27 ms a
    token of plain decoding became 39).
    """
    import gguf
    path = files.cache_dir("smollm2") / "fp32.gguf"
    if not path.is_file():
        source = gguf.GGUFReader(path.with_name("SmolLM2-135M-Instruct.Q4_1.gguf"))
        with files.atomic(path) as temporary:
            writer = gguf.GGUFWriter(temporary, "llama")
            for field in source.fields.values():
                if not field.name.startswith("GGUF.") and field.name not in ("general.architecture", "general.file_type", "general.quantization_version"):
                    kind = field.types[0]
                    writer.add_key_value(field.name, field.contents(), kind, field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None)
            writer.add_file_type(0)
            for tensor in source.tensors:
                writer.add_tensor(tensor.name, np.ascontiguousarray(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
    here, there = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve_llama_cpp, args=(there, str(path), torch.get_num_threads()), daemon=True)
    server.start()
    there.close()

    def run(ids):
        try:
            if not server.is_alive():             # files.run lets a write to a closed pipe end the program without a word
                raise EOFError
            here.send({"prompt": ids, "n_predict": args.max_new_tokens, "temperature": 0, "cache_prompt": False})
            said = here.recv()
        except EOFError:
            raise ValueError("llama.cpp's process has ended, for the reason above; without xllamacpp its row is left out") from None
        return Text(said["choices"][0]["text"], said["usage"]["completion_tokens"]), None
    return run


def serve_llama_cpp(connection, path, threads):
    """The other process: answers requests until the first one hangs up."""
    import xllamacpp
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.verbosity = path, 2048, 1, 0
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(settings)
    try:
        while True:
            connection.send(server.handle_completions(connection.recv()))
    except EOFError:
        pass


class Text(str):
    """A text and the number of tokens it was made of."""

    def __new__(cls, text, count):
        self = super().__new__(cls, text)
        self.count = count
        return self


def interval(tokens, seconds, base, picks):
    """Ratio of total rates of two ways, and its 95 % interval over prompts. tokens, seconds: {way: (prompts,) array}."""
    def ratio(way, rows):
        return tokens[way][rows].sum(-1) / seconds[way][rows].sum(-1)
    whole = np.arange(picks.shape[1])
    return {way: (ratio(way, whole) / ratio(base, whole), *np.percentile(ratio(way, picks) / ratio(base, picks), [2.5, 97.5]))
            for way in tokens}


def compare(args):
    device, _ = model.set_up(args)
    ways, tok, target = ways_of(args, device)
    prompts = files.read_prompts(args.prompts)
    tasks = [prompt["task"] for prompt in prompts]
    prompts = [prompt for i, prompt in enumerate(prompts) if tasks[:i].count(prompt["task"]) < args.limit]
    ids = [tok.chat_prompt(prompt["messages"]) for prompt in prompts]
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
            reference = made["transformers, plain"]
            if isinstance(made[way], Text):
                reference = tok.decode([token for token in reference if token not in tok.eos_ids])
            unequal[way].append(made[way] != reference)
        progress.update(number + 1)
    tokens, seconds = ({way: np.array(values, dtype=float) for way, values in table.items()} for table in (tokens, seconds))
    picks = np.random.default_rng(args.seed).integers(len(ids), size=(2000, len(ids)))
    theirs, ours = (interval(tokens, seconds, base, picks) for base in ("transformers, plain", "nanodraft, plain"))
    rows = []
    print(f"\n{speculate.machine()}; {len(ids)} prompts of {args.prompts}, {args.max_new_tokens} new tokens at most, greedy\n")
    print("| way | tokens/s | over transformers, plain (95 %) | over nanodraft, plain (95 %) | tau | texts unlike transformers' |")
    print("|---|---|---|---|---|---|")
    for way in ways:
        known = [c for c in calls[way] if c is not None]
        tau = (tokens[way].sum() - len(ids)) / sum(known) if known else None
        rows.append({"way": way, "tokens_per_s": tokens[way].sum() / seconds[way].sum(), "over_transformers": theirs[way], "over_plain": ours[way],
                     "tau": tau, "unequal": sum(unequal[way]), "seconds": seconds[way].tolist(), "tokens": tokens[way].tolist()})
        print("| {} | {:.1f} | {:.2f} ({:.2f} to {:.2f}) | {:.2f} ({:.2f} to {:.2f}) | {} | {} of {} |".format(
            way, rows[-1]["tokens_per_s"], *theirs[way], *ours[way], f"{tau:.2f}" if known else "", sum(unequal[way]), len(ids)))
    costs = passes(args, target, device)
    with files.atomic(args.json) as temporary:
        temporary.write_text(json.dumps({"machine": speculate.machine(), "target": str(args.target), "draft": str(args.draft),
                                         "prompts": len(ids), "tasks": [p["task"] for p in prompts], "rows": rows, "passes": costs}, indent=1) + "\n")
    draw(args, rows, costs)
    print(f"\nwrote {args.json}, {args.out / 'bench.png'} and {args.out / 'passes.png'}")


@torch.inference_mode()
def passes(args, target, device, widths=(1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16), repeats=15):
    """Median milliseconds of one pass over `width` tokens after 200 others: both forms of pack(), and nn.Linear, alternated."""
    models = {"weights as they are": target, "packed for more": model.load(args.target, device).pack(8),
              "nn.Linear": model.load(args.target, device)}
    costs = {name: [] for name in models}
    for width in widths:
        tokens, cache = torch.zeros(1, width, dtype=torch.int64), model.KVCache(target.config, 1, 220)
        seconds = {name: [] for name in models}
        for _ in range(repeats + 1):
            for name, llama in models.items():
                cache.length = 200
                begin = time.perf_counter()
                llama.head(llama.hidden(tokens, cache)[0])
                seconds[name].append(time.perf_counter() - begin)
        for name in models:
            costs[name].append(float(np.median(seconds[name][1:])) * 1e3)
    print(f"\n{'pass over':29}" + " ".join(f"{width:6d}" for width in widths) + "  tokens")
    for name in models:
        print(f"{name:26} ms" + " ".join(f"{ms:6.1f}" for ms in costs[name]))
    return {"widths": list(widths), **costs}


def generation(args):
    """Tokens a second of distill.py generate and of transformers' generate in batches: same prompts, same sampling."""
    import transformers
    transformers.logging.set_verbosity_error()
    device, dtype = model.set_up(args)
    tok, target = tokenizer.load(args.target), model.load(args.target, device, dtype)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(args.target, dtype=dtype).to(device).eval()
    prompts = [tok.chat_prompt(prompt["messages"]) for prompt in files.read_prompts(args.prompts)]
    prompts = [prompts[i % len(prompts)] for i in range(args.generation)]
    rates = {}

    def ours(batch):
        made = distill.generate_batch(target, prompts, [0.7] * len(prompts), 0.95, args.max_new_tokens, set(tok.eos_ids),
                                      torch.Generator(device).manual_seed(args.seed), batch)
        return sum(len(ids) + ended for _, ids, ended in made)

    def transformers_batches(batch):
        count, ordered = 0, sorted(prompts, key=len)         # like lengths together: little padding
        for at in range(0, len(ordered), batch):
            rows = ordered[at:at + batch]
            width = max(map(len, rows))
            tokens = torch.tensor([[tok.pad_id] * (width - len(row)) + row for row in rows], device=device)
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
            made = theirs.generate(tokens, attention_mask=mask, max_new_tokens=args.max_new_tokens, do_sample=True, temperature=0.7, top_p=0.95,
                                   top_k=0, repetition_penalty=1.0, eos_token_id=list(tok.eos_ids), pad_token_id=tok.pad_id)[:, width:]
            for row in made.tolist():
                count += next((i + 1 for i, token in enumerate(row) if token in tok.eos_ids), len(row))
        return count

    for batch in args.batch_sizes:
        for name, run in (("distill.py generate", ours), ("transformers", transformers_batches)):
            if batch > len(prompts):
                continue
            begin = time.perf_counter()
            count = run(batch)
            rates.setdefault(name, {})[batch] = count / (time.perf_counter() - begin)
            print(f"{name:20} batch {batch:4d}: {count} tokens, {rates[name][batch]:.1f} tokens/s", flush=True)
    best = {name: max(values.values()) for name, values in rates.items()}
    print(f"best against best: {best['distill.py generate'] / best['transformers']:.2f} times ({args.dtype})")


def draw(args, rows, costs):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    args.out.mkdir(parents=True, exist_ok=True)
    figure, axes = pyplot.subplots(figsize=(9, 0.42 * len(rows) + 1.4), layout="constrained")
    shown = rows[::-1]
    ratios = np.array([row["over_transformers"] for row in shown])
    bars = axes.barh([row["way"] for row in shown], ratios[:, 0], xerr=(ratios[:, 0] - ratios[:, 1], ratios[:, 2] - ratios[:, 0]),
                     color=["C0" if row["way"].startswith("nanodraft") else "C7" for row in shown], capsize=2)
    axes.bar_label(bars, [f"{row['tokens_per_s']:.0f} tokens/s" for row in shown], padding=8, fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.margins(x=0.15)
    axes.set(xlabel="token rate over transformers' plain generate", title="Greedy decoding on two CPU cores" if not torch.cuda.is_available() else "Greedy decoding")
    figure.savefig(args.out / "bench.png", dpi=110)
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name in [name for name in costs if name != "widths"]:
        axes.plot(costs["widths"], costs[name], marker="o", label=name)
    axes.set(xlabel="tokens in the pass", ylabel="milliseconds, median", title="Cost of one pass of the target", ylim=(0, None))
    axes.legend()
    figure.savefig(args.out / "passes.png", dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, default=Path("models/smollm2-135m-instruct"))
    parser.add_argument("--draft", type=Path, default=Path("data/smollm2-drafter"))
    parser.add_argument("--prompts", type=Path, default=Path("data/prompts/test.jsonl"))
    parser.add_argument("--limit", type=int, default=12, help="prompts of each task (default 12: all)")
    parser.add_argument("--gamma", type=int, nargs="+", default=[1, 3, 5, 7])
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--json", type=Path, default=Path("out/against.json"))
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the pictures (default out)")
    parser.add_argument("--generation", type=int, metavar="N", help="instead: batch generation of N answers, for --batch-sizes")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 64, 128, 256])
    model.machine_flags(parser)
    args = parser.parse_args()
    generation(args) if args.generation else compare(args)


if __name__ == "__main__":
    files.run(main)
