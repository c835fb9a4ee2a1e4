"""What all tests share: the import path, tiny models, the ways to run a script, and the markers.

Tests marked `real` need the real chat model; they are skipped where it is missing.
"""

import contextlib
import hashlib
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import model  # noqa: E402  (after the path is set)
from data import files, tokenizer  # noqa: E402

TARGET = ROOT / "models" / "smollm2-135m-instruct"


def pytest_configure(config):
    config.addinivalue_line("markers", "real: needs the chat model in models/ and the packages of "
                                       "requirements-real.txt")
    config.addinivalue_line("markers", "trained: trains the tiny world's smallest useful models "
                                       "first, in half a minute, and keeps them in the cache")
    torch.set_num_threads(1)  # the models are tiny: a second thread only adds waiting


def pytest_collection_modifyitems(items):
    reason = None
    try:
        import gguf  # noqa: F401
        import tokenizers  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        reason = f"needs {error.name}: pip install -r requirements-real.txt"
    if reason is None and not (TARGET / "provenance.json").is_file():
        reason = "needs the chat model: python data/smollm2.py"
    for item in items:
        if {"trained_world", "compared"}.intersection(item.fixturenames):
            item.add_marker(pytest.mark.trained)
    if reason:
        for item in items:
            if item.get_closest_marker("real"):
                item.add_marker(pytest.mark.skip(reason=reason))


def tiny_llama(seed, vocab=3, layers=1, std=0.5, hidden=8, heads=2, kv_heads=1, context=64,
               tied=False, **keys):
    """A random model, small enough for thousands of texts.

    Its weights are large enough that its choices matter.
    """
    config = model.Config(vocab_size=vocab, hidden_size=hidden, intermediate_size=2 * hidden,
                          num_hidden_layers=layers, num_attention_heads=heads,
                          num_key_value_heads=kv_heads, max_position_embeddings=context,
                          tie_word_embeddings=tied, **keys)
    llama = model.Llama(config)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in llama.named_parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=std, generator=generator)
    return llama.requires_grad_(False)


def run_process(*arguments, **options):
    """Run `python ARGUMENTS` from the repository's root. Returns the finished process."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, **options)


def run_script(script, *arguments, input=""):
    """The same inside this process: saves the seconds that importing torch takes.

    Returns a finished process with returncode, stdout and stderr.
    """
    main = importlib.import_module(script.removesuffix(".py").replace("/", ".")).main
    before = sys.argv, sys.stdin
    code, out, err = 0, io.StringIO(), io.StringIO()
    sys.argv = [script, *map(str, arguments)]
    sys.stdin = io.StringIO(input)
    try:
        with (contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
              contextlib.chdir(ROOT)):
            files.run(main)
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv, sys.stdin = before
    return subprocess.CompletedProcess([script, *arguments], code, out.getvalue(), err.getvalue())


def assert_refused(process, *words):
    """Bad input: exit code 2, one sentence on stderr with all these words in it, no traceback."""
    assert process.returncode == 2, process.stderr
    assert "Traceback" not in process.stderr
    lines = [line for line in process.stderr.splitlines()
             if line.startswith("error: ") or ": error: " in line]
    assert len(lines) == 1, process.stderr
    for word in words:
        assert str(word) in lines[0], lines[0]


TEMPLATE = ("{% for m in messages %}"
            "{{ '<|' + m['role'] + '|>' }}{{ ' ' + m['content'] }}{{ '<|end|>' }}"
            "{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory):
    """A SentencePiece tokenizer with byte fallback, trained in a second.

    Its chat markers are control symbols.
    """
    import sentencepiece

    folder = tmp_path_factory.mktemp("sentencepiece")
    lines = ["the quick brown fox jumps over the lazy dog",
             "small models draft and large models check", "we count to ten",
             "hello there and what is the answer now", "grüße aus köln"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "tokenizer"), vocab_size=400,
        model_type="bpe", byte_fallback=True, hard_vocab_limit=False, pad_id=3, minloglevel=2,
        control_symbols=["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"])
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"bos_token": "<s>", "eos_token": "<|end|>", "unk_token": "<unk>", "pad_token": "<pad>",
         "chat_template": TEMPLATE, "model_max_length": 512}))
    return folder


@pytest.fixture(scope="session")
def trained_world():
    """The tiny world in its smallest useful form.

    A folder with target, drafter-base, records, pretrain, dev and test. Its training takes about 20
    seconds. It is kept in the cache folder, under a name made from everything that decides it.
    """
    code = ("model.py", "train.py", "distill.py", "data/tiny_world.py", "data/tiny_world.json",
            "data/tokenizer.py", "data/tokenizer_forms.json", "tests/conftest.py")
    texts = [ROOT / "data" / "tiny_world" / name
             for name in ("pairs.jsonl.gz", "passages.jsonl.gz")]
    content = b"".join(path.read_bytes() for path in [*(ROOT / name for name in code), *texts])
    key = hashlib.sha256(content + torch.__version__.encode()).hexdigest()[:16]
    folder = files.cache_dir("tests") / key
    if not (folder / "records.jsonl").is_file():
        work = folder.with_name(f"{key}.{os.getpid()}")
        train_tiny_world(work, texts)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(work, folder)
    return folder


def train_tiny_world(work, texts):
    """Fill the folder `work`: a tokenizer, the data, a target, a drafter, the target's answers."""
    train = ("train.py", "--tokenizer", work / "tokenizer", "--context", 96, "--batch-size", 16,
             "--threads", 1, "--learning-rate", 5e-3)

    def stage(*arguments):
        done = run_script(*arguments)
        assert done.returncode == 0, done.stderr

    stage("data/tokenizer.py", "--train", *texts, "--out", work / "tokenizer")
    stage("data/tiny_world.py", "prepare", "--tokenizer", work / "tokenizer", "--out", work)
    tok = tokenizer.load(work / "tokenizer")
    torch.manual_seed(0)
    config = model.Config(vocab_size=tok.vocab_size, hidden_size=64, intermediate_size=176,
                          num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=512,
                          eos_token_id=tok.eos_id)
    model.save(model.Llama(config), work / "start")
    tokenizer.copy(work / "tokenizer", work / "start")
    stage(*train, "--init", work / "start", "--chat", work / "chat.jsonl", "--steps", 300,
          "--out", work / "target")
    stage(*train, "--model", "tiny-drafter", "--data", work / "pretrain", "--steps", 200,
          "--out", work / "drafter-base")
    prompts = work / "prompts.jsonl"
    every_fourth = prompts.read_text().splitlines(keepends=True)[::4]
    prompts.write_text("".join(every_fourth))
    stage("distill.py", "generate", "--target", work / "target", "--prompts", prompts,
          "--max-new-tokens", 48, "--threads", 1, "--out", work / "records.jsonl")
