"""A model folder as a GGUF file, for llama.cpp: the target, and the drafter beside it.

    python data/export_gguf.py models/smollm2-135m-instruct --out out/target.gguf
    python data/export_gguf.py data/smollm2-drafter --out out/drafter.gguf

Matrices become fp16, norms fp32. llama.cpp turns neighbouring rows of q and k as rotary pairs, so
they are permuted, each by its own number of heads; Llama 3.1's rotary scaling becomes a tensor,
rope_freqs. How text is split before the merges is a name in GGUF; a tokenizer whose way has no name
here is refused, since llama.cpp would make other ids of a text, and nobody would notice. A draft
vocabulary is left out: llama.cpp's drafter uses the whole head. Needs the package gguf
(requirements-real.txt).
"""

import math
import sys
from pathlib import Path

import torch

if not __package__:  # run as a script: sys.path[0] is data/, the root is one up
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
import model  # noqa: E402
from data import files, tokenizer

# What stands before the merges in a tokenizer.json, in order, each by its type or its pattern, and
# GGUF's name for it.
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
PRE_TOKENIZERS = {("Digits", "ByteLevel"): "smollm", ("ByteLevel",): "gpt-2",
                  (LLAMA3_SPLIT, "ByteLevel"): "llama-bpe"}


def interleave(weight, heads):
    """Rows of q or k (heads * head_dim, D): the pair (i, i + head_dim / 2) becomes (2i, 2i + 1)."""
    rows, width = weight.shape
    return weight.view(heads, 2, rows // heads // 2, width).transpose(1, 2).reshape(rows, width)


def rotary_factors(rope, theta, head_dim):
    """(head_dim / 2,) fp32: what llama.cpp divides each rotary pair's speed by, for rope_type
    llama3. The rule stands in model.slowed."""
    speed = theta ** -(torch.arange(0, head_dim, 2) / head_dim)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] / (2 * math.pi / speed)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - kept) / rope["factor"] + kept)


def gguf_tensor(names, name, weight, heads):
    """(GGUF's name, numpy array) of a tensor of the Hugging Face layout.

    names: the package gguf's table of names; heads: how many attn_q and attn_k have.
    """
    ours = names.get_name(name, [".weight"])
    if not ours:
        raise ValueError(f"the tensor {name} has no place in a Llama GGUF file")
    part = ours.split(".")[-2]
    if part in heads:
        weight = interleave(weight, heads[part])
    weight = weight.float() if weight.dim() == 1 else weight.half()
    if not weight.isfinite().all():
        raise ValueError(f"{name}: a weight is not finite, or too large for fp16")
    return ours, weight.numpy()


def pre_tokenizer_name(path, content):
    """GGUF's name for how a tokenizer.json splits a text before the merges. ValueError if none."""
    before = content["pre_tokenizer"] or {}
    parts = before.get("pretokenizers", [before])
    name = PRE_TOKENIZERS.get(tuple(part.get("pattern", {}).get("Regex", part.get("type"))
                                    for part in parts))
    # Where a pattern splits, GPT-2's own does not split again, and whole words need no merges.
    split, model = name == "llama-bpe", content["model"]
    usual = all(part.get("use_regex", not split) != split and part.get("individual_digits", True)
                and part.get("behavior", "Isolated") == "Isolated" and not part.get("invert")
                and not part.get("add_prefix_space") for part in parts)
    usual = usual and bool(model.get("ignore_merges")) == split
    if content["model"]["type"] != "BPE" or not name or not usual or content["normalizer"]:
        raise ValueError(f"{path}: llama.cpp has no name known here for its pre_tokenizer or "
                         f"normalizer (known: {', '.join(PRE_TOKENIZERS.values())})")
    return name


def add_tokenizer(folder, writer, rows):
    """Write the tokens, one for each of the embedding's rows."""
    from gguf import SentencePieceVocab, TokenType

    tok, path = tokenizer.load(folder), folder / "tokenizer.json"
    if not (folder / "tokenizer.model").is_file():
        content = files.read_json(path)
        name, merges = pre_tokenizer_name(path, content), content["model"]["merges"]
        tokens = {i: (text, TokenType.NORMAL) for text, i in content["model"]["vocab"].items()}
        writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    else:
        name, pieces = "default", list(SentencePieceVocab(folder).sentencepiece_tokens())
        tokens = {i: (text, kind) for i, (text, _, kind) in enumerate(pieces)}
        unused = [-1e6] * (rows - len(pieces))
        writer.add_token_scores([score for _, score, _ in pieces] + unused)
    for text, token in tok.added.items():
        kind = TokenType.CONTROL if token.get("special") else TokenType.USER_DEFINED
        if tokens.get(token["id"], (text, None))[1] != TokenType.UNKNOWN:
            tokens[token["id"]] = (text, kind)
    if max(tokens) >= rows:
        raise ValueError(f"{folder}: {max(tokens) + 1} tokens, the embedding only {rows} rows")
    tokens = [tokens.get(i, (f"[PAD{i}]", TokenType.UNUSED)) for i in range(rows)]
    writer.add_tokenizer_model("llama" if name == "default" else "gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list([text for text, _ in tokens])
    writer.add_token_types([kind for _, kind in tokens])
    for add, token in ((writer.add_bos_token_id, tok.bos_id), (writer.add_eos_token_id, tok.eos_id),
                       (writer.add_pad_token_id, tok.pad_id)):
        if token is not None:
            add(token)
    writer.add_add_bos_token(False)               # the chat template writes it where there is one
    writer.add_add_space_prefix(name == "default")
    if tok.chat_template:
        writer.add_chat_template(tok.chat_template)


def export(folder, out):
    """Write the GGUF file `out`. ValueError says what the folder holds that GGUF would lose."""
    import gguf

    config = files.read_json(folder / "config.json")
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind, scaling = config.get("model_type"), rope.get("rope_type", rope.get("type", "default"))
    if kind != "llama" or scaling not in ("default", "llama3"):
        raise ValueError(f"{folder}: model_type {kind} with rope_type {scaling} cannot be written, "
                         f"only llama with default or llama3")
    weights = model.split_weights(model.load(folder).requires_grad_(False))
    rows = len(weights["model.embed_tokens.weight"])
    heads = {"attn_q": config["num_attention_heads"]}
    heads["attn_k"] = config.get("num_key_value_heads") or heads["attn_q"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads["attn_q"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    theta = rope.get("rope_theta") or config.get("rope_theta", 10000.0)
    fields = {"file_type": gguf.LlamaFileType.MOSTLY_F16, "vocab_size": rows,
              "context_length": config["max_position_embeddings"],
              "embedding_length": config["hidden_size"],
              "feed_forward_length": config["intermediate_size"],
              "block_count": config["num_hidden_layers"], "head_count": heads["attn_q"],
              "head_count_kv": heads["attn_k"], "key_length": head_dim, "value_length": head_dim,
              "rope_dimension_count": head_dim, "rope_freq_base": theta,
              "layer_norm_rms_eps": config.get("rms_norm_eps", 1e-6)}
    with files.atomic(out) as temporary:
        writer = gguf.GGUFWriter(temporary, "llama")
        for name, value in fields.items():        # the writer has a function for each
            getattr(writer, f"add_{name}")(value)
        add_tokenizer(folder, writer, rows)
        if scaling == "llama3":
            factors = rotary_factors(rope, theta, head_dim)
            writer.add_tensor("rope_freqs.weight", factors.numpy())
        for name, weight in weights.items():
            writer.add_tensor(*gguf_tensor(names, name, weight, heads))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def main():
    parser = files.Parser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the model's folder")
    files.add_flags(parser, ("out", None, Path, "the GGUF file to write"))
    args = parser.parse_args()
    export(args.folder, args.out)
    print(f"wrote {args.out} ({args.out.stat().st_size / 1e6:.0f} MB)")


if __name__ == "__main__":
    files.run(main)
