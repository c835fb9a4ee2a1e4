"""A Llama-style decoder, its key-value cache, and how a model is read from and written to disk.

The same few lines are the target (SmolLM2-135M-Instruct, TinyLlama, Llama 2...) and the drafter; only Config differs.
Tokens go in, logits come out:

    tokens (B, T) -> embedding (B, T, D) -> N x [ + attention(norm(x)), + mlp(norm(x)) ] -> norm -> head (B, T, V)

Nothing to run here; `train.py`, `distill.py` and `speculate.py` import it. A first look from a Python prompt:

    import torch, model
    llama = model.load("models/smollm2-135m-instruct")
    llama(torch.tensor([[1, 2, 3]])).shape          # (1, 3, 49152)

Source of the architecture: Llama 2 (Touvron et al., 2023, arXiv 2307.09288), section 2; RMSNorm (arXiv 1910.07467),
rotary positions (arXiv 2104.09864), grouped-query attention (arXiv 2305.13245), SwiGLU (arXiv 2002.05202).
"""

import ctypes
import json
import os
import platform
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn


# ---- Configuration ---------------------------------------------------------------------------------------------------

@dataclass
class Config:
    """The keys of Hugging Face's LlamaConfig that decide the shape and the arithmetic."""

    vocab_size: int = 32000
    hidden_size: int = 256                   # D, the width of the residual stream
    intermediate_size: int = 704             # width inside the MLP; Llama takes about 8/3 D
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None   # fewer than heads: grouped-query attention; None: as many
    head_dim: int | None = None              # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048      # the context the model was made for, in tokens
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = True         # the head is the embedding, transposed
    bos_token_id: int | None = None
    eos_token_id: int | list | None = None
    pad_token_id: int | None = None

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"{self.num_attention_heads} attention heads cannot share {self.num_key_value_heads} key-value "
                             f"heads evenly; choose a divisor")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary positions turn pairs, so it must be even")


# ---- The cache -------------------------------------------------------------------------------------------------------

class KVCache:
    """Keys and values of all tokens read so far, preallocated and filled in place.

    Column j holds the j-th token of every row. `length` columns are in use; to forget the last n tokens, write
    `cache.length -= n`: nothing is copied, later tokens overwrite the columns. Rows of a batch whose prompts
    differ in length are padded on the left, and `start[row]` is the row's first real column: what lies before
    is never attended to, and a token's position is its column minus start.
    """

    def __init__(self, config, batch, max_len, device="cpu", dtype=torch.float32):
        """Room for `max_len` tokens in each of `batch` rows."""
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, max_len, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0
        self.max_len = max_len
        self.start = torch.zeros(batch, dtype=torch.int64, device=device)

    def keep(self, rows):
        """Keep only these rows (an index tensor), so that rows that have ended stop costing time."""
        self.k, self.v, self.start = self.k[:, rows], self.v[:, rows], self.start[rows]

    def forget_columns(self, count):
        """Forget the first `count` columns and move the others to the left, when there is no room on the right."""
        for kept in (self.k, self.v):
            kept[:, :, :, :self.length - count] = kept[:, :, :, count:self.length].clone()
        self.length -= count
        self.start = (self.start - count).clamp(min=0)


# ---- Products of weights with few tokens -----------------------------------------------------------------------------

# A pass over few tokens hardly computes: it waits for the weights to come from memory, 538 MB of them for SmolLM2-135M,
# so it should cost the same for 1 token as for 8. nn.Linear's matrix product does not do that on a CPU: for one token it
# reads at half the memory's speed, for several it copies each weight into another order first, on every call. What to do
# instead depends on the number of tokens (README.md, "Where the time goes", has the measurements):
# - one: the weight as it is, seen as blocks of up to 192 rows, one batched product of blocks and token. A block fits into a
#   core's cache, and a core reads many rows at once, which is what keeps the memory busy.
# - two to six: the weight as it is, times the tokens as columns. Two cost 1.05 to 1.4 times what one does, four 1.35 to 1.8,
#   six 1.9 to 2.4. (The columns must be rows seen transposed: for columns that lie so in memory the library takes three times as long.)
# - more: oneDNN's own order (64 outputs of an input side by side), made once instead of at every call. From 3 to 12 tokens it
#   costs 1.3 to 1.5 times what one token does in the first form, for one or two tokens no less.

MAX_UNPACKED_TOKENS = 2      # in a pass, up to which the weights stay as they are


class Packed:
    """The weights (out_i, in) of Linears that read the same input, as one matrix in the form that is fast for few tokens."""

    def __init__(self, *weights, tokens):
        """tokens: how many a pass will usually have at most."""
        self.sizes = [len(weight) for weight in weights]
        weight = torch.cat([weight.detach() for weight in weights]) if len(weights) > 1 else weights[0].detach()
        self.count, self.as_it_is = weight.numel(), tokens <= MAX_UNPACKED_TOKENS
        if self.as_it_is:
            rows = max(n for n in range(1, min(192, len(weight)) + 1) if len(weight) % n == 0)
            self.weight, self.blocks = weight, weight.view(-1, rows, weight.shape[1])
        else:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, tokens)

    def __call__(self, x):
        """x (..., in) -> a list of (..., out_i)."""
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        if not self.as_it_is:
            y = torch.ops.mkldnn._linear_pointwise(rows, self.weight, None, "none", [], "")
        elif len(rows) == 1:
            y = torch.bmm(self.blocks, rows.t().expand(len(self.blocks), -1, -1)).view(1, -1)
        elif len(rows) <= 6:
            y = (self.weight @ rows.t()).t()
        else:
            y = F.linear(rows, self.weight)
        return y.view(*x.shape[:-1], -1).split(self.sizes, -1)


def products(x, *linears):
    """x times the weight of each of these Linears: a list. One product where pack() has made them one."""
    packed = getattr(linears[0], "packed", None)
    return packed(x) if packed else [linear(x) for linear in linears]


# ---- The decoder -----------------------------------------------------------------------------------------------------

class RMSNorm(nn.Module):
    """Divide by the root mean square, then scale by a learned weight. In fp32 whatever the dtype, as Llama does."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.square().sum(-1, keepdim=True) / y.shape[-1] + self.eps)       # mean() takes longer than sum()
        return self.weight * y.to(x.dtype)


def rotary_tables(config, positions):
    """cos and sin, (B, T, 1, head_dim), of every pair's angle at these positions (B, T); sin negative in the first half.

    Pair i turns by position * theta^(-2i / head_dim). Computed once a pass, in fp32: at position 8,000 bf16
    could not even tell neighbours apart.
    """
    half = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32)
    angle = positions.float()[:, :, None, None] / config.rope_theta ** (half / config.head_dim)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x, cos, sin):
    """Turn each pair of x (B, T, heads, head_dim) by its angle. Pair i is (x[i], x[i + head_dim / 2]): "rotate half".

    (a, b) -> (a cos - b sin, b cos + a sin); rolling by half the width puts each b where its a is, and the reverse.
    """
    y = x.float()
    return torch.addcmul(y * cos, y.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention: G = heads / kv heads queries share each key and value."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        c, d = config, config.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * d, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * d, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * d, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * d, c.hidden_size, bias=False)

    def forward(self, x, cos, sin, mask, cache, layer):
        B, T, _ = x.shape
        kv, d = self.config.num_key_value_heads, self.config.head_dim
        group = self.config.num_attention_heads // kv
        q, k, v = products(x, self.q_proj, self.k_proj, self.v_proj)
        q = rotate(q.view(B, T, kv * group, d), cos, sin)
        k = rotate(k.view(B, T, kv, d), cos, sin).transpose(1, 2)                      # (B, kv, T, d)
        v = v.view(B, T, kv, d).transpose(1, 2)
        if cache is not None:
            end = cache.length + T
            cache.k[layer, :, :, cache.length:end] = k
            cache.v[layer, :, :, cache.length:end] = v
            k, v = cache.k[layer, :, :, :end], cache.v[layer, :, :, :end]              # views: nothing is copied
        # The queries of one group are stacked along the time axis of their shared key head. Repeating keys and
        # values over the heads instead would copy the whole cache at every step (3x slower at batch 96).
        q = q.view(B, T, kv, group, d).permute(0, 2, 3, 1, 4).reshape(B, kv, group * T, d)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        y = y.view(B, kv, group, T, d).permute(0, 3, 1, 2, 4).reshape(B, T, kv * group * d)
        return products(y, self.o_proj)[0]


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        gate, up = products(x, self.gate_proj, self.up_proj)
        return products(F.silu(gate) * up, self.down_proj)[0]


class Block(nn.Module):
    """One layer: attention, then MLP, each reading a normalised copy and adding to the residual stream."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, mask, cache, layer):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """The decoder. Attribute names are those of LlamaForCausalLM, so the files on disk need no translation."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.packed_head = None
        self.draft_vocabulary = None              # (K,) ids, or None: all. A drafter that proposes only these is cheaper
        for name, weight in self.named_parameters():
            if weight.dim() == 2 and not weight.is_meta:
                # GPT-2's start: deviation 0.02, and what adds to the residual stream smaller by the root of the
                # number of additions, so that the stream's size does not depend on depth.
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=0.02 / (2 * config.num_hidden_layers) ** 0.5 if residual else 0.02)

    def hidden(self, tokens, cache=None):
        """tokens (B, T) int64 -> hidden states (B, T, D) after the last norm; appends to the cache if one is given.

        With a cache, the tokens continue what it holds. ValueError if they do not fit into it.
        """
        B, T = tokens.shape
        past = cache.length if cache is not None else 0
        if cache is not None and past + T > cache.max_len:
            raise ValueError(f"{past} tokens in the cache and {T} more exceed its {cache.max_len} columns: "
                             f"shorten the prompt or the answer")
        columns = torch.arange(past, past + T, device=tokens.device)
        padded = cache is not None and bool(cache.start.any())
        positions = columns.expand(B, T)
        mask = None
        if T > 1 or padded:
            keys = torch.arange(past + T, device=tokens.device)
            mask = keys <= columns[:, None]                                            # (T, keys): causal
            if padded:
                real = keys >= cache.start[:, None, None]                              # (B, 1, keys)
                # A padding column may see itself, only so that its softmax is not 0 / 0; no real token sees it.
                mask = mask & (real | (keys == columns[:, None]))                      # (B, T, keys)
                positions = (columns - cache.start[:, None]).clamp(min=0)
            group = self.config.num_attention_heads // self.config.num_key_value_heads
            mask = mask.view(-1, 1, 1, T, past + T).expand(-1, 1, group, T, past + T).flatten(2, 3)
            # What is added to the scores: made once, where a mask of booleans would be turned into it in each layer.
            mask = torch.zeros(mask.shape, device=tokens.device, dtype=self.embed_tokens.weight.dtype).masked_fill(~mask, float("-inf"))
        cos, sin = rotary_tables(self.config, positions)
        x = self.embed_tokens(tokens)                                                  # (B, T, D)
        for layer, block in enumerate(self.layers):
            x = block(x, cos, sin, mask, cache, layer)
        if cache is not None:
            cache.length = past + T
        return self.norm(x)

    def head_weight(self, ids=None):
        """(V, D), tied or not; with ids (K,) only their rows (K, D)."""
        weight = self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight
        return weight if ids is None else weight[ids]

    def whole_head(self, hidden):
        """hidden (..., D) -> logits (..., V) of all tokens, also of those outside a draft vocabulary."""
        return F.linear(hidden, self.head_weight())

    def head(self, hidden):
        """hidden (..., D) -> logits (..., V). Take only the positions you need: (B, T, V) is large.

        With a draft vocabulary the logits of all other tokens are -inf, so their probability is exactly 0: no harm to
        losslessness, which allows q = 0, and a head of 8,192 rows instead of 49,152 (FR-Spec, arXiv 2502.14856).
        """
        ids = self.draft_vocabulary
        logits = self.packed_head(hidden)[0] if self.packed_head else F.linear(hidden, self.head_weight(ids))
        if ids is None:
            return logits
        full = logits.new_full((*logits.shape[:-1], self.config.vocab_size), float("-inf"))
        return full.scatter(-1, ids.expand_as(logits), logits)

    def forward(self, tokens, cache=None):
        """tokens (B, T) int64 -> logits (B, T, V)."""
        return self.head(self.hidden(tokens, cache))

    def parameter_count(self):
        """Number of parameters; a tied head is counted once."""
        packed = [linear.packed for linear in self.modules() if getattr(linear, "packed", None)]
        if self.packed_head and not self.config.tie_word_embeddings:
            packed.append(self.packed_head)
        return sum(weight.numel() for weight in self.parameters()) + sum(weights.count for weights in packed)

    def pack(self, tokens=MAX_UNPACKED_TOKENS, at_least=8_000_000):
        """Make passes over few tokens cheaper on a CPU, for decoding only; returns self. The one switch of it.

        tokens: how many a pass will usually have at most: 1 for plain decoding, gamma + 1 for verification. It decides in
        which form the weights are kept; passes over other numbers of tokens give the same, only slower.

        The layers' weights are replaced by packed ones, which cannot be trained, changed or saved. The embedding, whose
        rows are looked up, stays; above MAX_UNPACKED_TOKENS a tied head is therefore there twice (113 of 538 MB for
        SmolLM2-135M), and with a draft vocabulary the head's rows are in any case.

        No effect on other processors than x86, on a GPU, where nn.Linear is at the memory's limit already, or on models of
        fewer than at_least parameters, whose weights stay in the processor's cache: there it costs 5 to 25 % (tiny world).
        """
        if self.embed_tokens.weight.dtype == torch.float16:      # oneDNN's order needs a processor with fp16 arithmetic
            tokens = min(tokens, MAX_UNPACKED_TOKENS)
        x86 = platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()
        if self.embed_tokens.weight.device.type != "cpu" or not x86 or self.parameter_count() < at_least:
            return self
        self.requires_grad_(False)
        for block in self.layers:
            attention, mlp = block.self_attn, block.mlp
            for linears in ((attention.q_proj, attention.k_proj, attention.v_proj), (attention.o_proj,),
                            (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,)):
                packed = Packed(*(linear.weight for linear in linears), tokens=tokens)
                for linear in linears:
                    linear.weight = None          # frees the plain copy at once: never two of the whole model
                linears[0].packed = packed
        self.packed_head = Packed(self.head_weight(self.draft_vocabulary), tokens=tokens)
        if not self.config.tie_word_embeddings:
            self.lm_head.weight = None
        return self


# ---- From logits to a distribution -----------------------------------------------------------------------------------

def candidates(logits, temperature=1.0, top_p=1.0):
    """logits (N, V) -> (p, ids), both (N, K): the tokens that may be sampled and their probabilities, in fp32.

    Temperature first, then top-p: the smallest set of most probable tokens whose mass reaches top_p, the token that
    crosses kept, renormalised; 1 cuts nothing. temperature: a number, or one a row (N,); 0 is greedy, one-hot.
    K is as large as the widest row needs. What a narrower row does not need has p = 0 and the id V, which is no token.
    """
    if isinstance(temperature, (int, float)) and temperature == 0:      # a short cut: no softmax where nothing is weighed
        ids = logits.argmax(-1, keepdim=True)
        return torch.ones(ids.shape, device=ids.device), ids
    temperature = torch.as_tensor(temperature, dtype=torch.float32, device=logits.device).expand(len(logits))
    greedy = temperature == 0
    # A greedy row's temperature is put to 1 only to keep the division finite: its result is overwritten below.
    p = torch.softmax(logits.float() / torch.where(greedy, 1.0, temperature)[:, None], dim=-1)
    if greedy.any():
        p[greedy] = F.one_hot(logits[greedy].argmax(-1), p.shape[-1]).float()
    if top_p >= 1:
        return p, torch.arange(p.shape[-1], device=p.device).expand_as(p)
    # Sorting 49,152 entries a row costs more than the model. The largest 256 nearly always reach top_p; rows where
    # they do not look further, in the end at all, so the result is exact.
    V = p.shape[-1]
    values, ids = p.topk(min(256, V))
    for width in (min(4096, V), V):
        short = values.sum(-1) < top_p
        if not short.any():
            break
        values, ids = (F.pad(x, (0, width - x.shape[-1]), value=padding) for x, padding in ((values, 0), (ids, V)))
        values[short], ids[short] = p[short].topk(width)
    values = values * (values.cumsum(-1) - values < top_p)   # kept if the mass before it is still below top_p
    return values / values.sum(-1, keepdim=True), ids


def probabilities(logits, temperature=1.0, top_p=1.0):
    """logits (N, V) -> the distribution (N, V) that is sampled from, shaped as candidates() says.

    Both target and drafter go through here, so that p and q are shaped alike before they are compared.
    """
    p, ids = candidates(logits, temperature, top_p)
    if p.shape == logits.shape and top_p >= 1:
        return p
    N, V = logits.shape
    return torch.zeros(N, V + 1, device=p.device).scatter_(-1, ids, p)[:, :V]      # column V takes the padding ids


def sample(p, generator=None):
    """One token a row from p (N, V), which need not sum to 1: the inverse of its cumulative sum, in double precision.

    A token of probability 0 is never drawn: the first column whose cumulative sum exceeds u has p > 0.
    """
    total = p.double().cumsum(-1)
    u = torch.rand(p.shape[0], 1, dtype=torch.float64, device=p.device, generator=generator) * total[:, -1:]
    return torch.searchsorted(total, u, right=True).squeeze(-1)


# ---- On disk: the Hugging Face layout --------------------------------------------------------------------------------

def load(folder, device="cpu", dtype=torch.float32):
    """Read a model folder: config.json and model.safetensors, or shards listed in model.safetensors.index.json.

    The weights may be fp32, fp16 or bf16 on disk. ValueError says which file is missing, damaged or of another kind.
    """
    folder = Path(folder)
    config = read_config(folder)
    index = folder / "model.safetensors.index.json"
    names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    tensors = {}
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: no such file; the model folder is incomplete, copy or make it again")
        try:
            tensors.update(load_file(folder / name))
        except SafetensorError as error:
            raise ValueError(f"{folder / name}: damaged or cut short ({error}); copy or make it again") from None
    with torch.device("meta"):
        llama = Llama(config)                            # shapes only: no memory, no random numbers
    # Inside LlamaForCausalLM all but the head lives under "model."; very old files also hold tables we compute.
    tensors = {name.removeprefix("model."): tensor.to(device=device, dtype=dtype) for name, tensor in tensors.items()
               if not name.endswith("rotary_emb.inv_freq") and not (name == "lm_head.weight" and config.tie_word_embeddings)}
    expected = {name: tuple(weight.shape) for name, weight in llama.named_parameters()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wrong := sorted(set(expected.items()) ^ set(found.items())):
        raise ValueError(f"{folder}: weights do not match config.json, first at {wrong[0][0]} (config says "
                         f"{expected.get(wrong[0][0], 'none')}, the file has {found.get(wrong[0][0], 'none')})")
    llama.load_state_dict(tensors, assign=True)
    if (folder / "draft_vocabulary.json").is_file():
        try:
            ids = torch.tensor(json.loads((folder / "draft_vocabulary.json").read_text()), dtype=torch.int64, device=device)
            sound = ids.dim() == 1 and len(ids) and 0 <= int(ids.min()) and int(ids.max()) < config.vocab_size
        except (ValueError, TypeError):
            sound = False
        if not sound:
            raise ValueError(f"{folder / 'draft_vocabulary.json'}: expected a list of token ids below {config.vocab_size}; copy it again, "
                             f"or delete it to draft with all tokens")
        llama.draft_vocabulary = ids
    return llama


def read_config(folder):
    """The Config of a model folder. ValueError if it is missing, damaged, or describes what this decoder cannot do."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a model folder (python data/smollm2.py makes the chat model's, "
                         f"python train.py a drafter's)")
    try:
        keys = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error.msg}); copy the file again") from None
    rope = keys.get("rope_parameters") or keys.get("rope_scaling") or {}   # transformers 5, and the older name
    unlike = {"model_type": ("llama",), "hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)}
    for key, allowed in unlike.items():
        if keys.get(key, allowed[0]) not in allowed:
            raise ValueError(f"{path}: {key} is {keys[key]!r}; this decoder reads Llama models with {key} {allowed[0]!r}")
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ValueError(f"{path}: rotary scaling {rope.get('rope_type', rope.get('type'))!r} is not supported, only 'default'")
    known = {field.name: keys[field.name] for field in fields(Config) if field.name in keys}
    # LlamaConfig's defaults differ from ours where a file leaves a key out.
    known.setdefault("tie_word_embeddings", False)
    known.setdefault("rms_norm_eps", 1e-6)
    known["rope_theta"] = float(rope.get("rope_theta", keys.get("rope_theta", 10000.0)))
    return Config(**known)


def save(llama, folder):
    """Write config.json and model.safetensors, in the model's dtype, so that transformers opens the folder.

    Each file is written under another name and renamed: a kill leaves the last good one.
    """
    if llama.packed_head:
        raise ValueError(f"{folder}: a packed model cannot be saved; load it again and save that")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    keys = asdict(llama.config)
    dtype = str(llama.norm.weight.dtype).removeprefix("torch.")
    keys |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "dtype": dtype,
             "torch_dtype": dtype, "attention_bias": False, "mlp_bias": False, "initializer_range": 0.02,
             "rope_parameters": {"rope_type": "default", "rope_theta": llama.config.rope_theta}}
    tensors = {name if name == "lm_head.weight" else "model." + name: weight.detach().cpu().contiguous()
               for name, weight in llama.named_parameters()}
    save_file(tensors, folder / "model.safetensors.tmp", metadata={"format": "pt"})
    (folder / "config.json.tmp").write_text(json.dumps(keys, indent=2) + "\n")
    names = ["model.safetensors", "config.json"]
    if llama.draft_vocabulary is not None:        # which tokens this project drafts; other programs use the whole head
        (folder / "draft_vocabulary.json.tmp").write_text(json.dumps(llama.draft_vocabulary.tolist()) + "\n")
        names.append("draft_vocabulary.json")
    for name in names:
        os.replace(folder / f"{name}.tmp", folder / name)


# ---- What every script shares on its command line --------------------------------------------------------------------

def machine_flags(parser):
    """Add --seed, --device, --dtype and --threads to an argparse parser."""
    parser.add_argument("--seed", type=int, default=0, help="random seed; same seed, same machine, same result (default 0)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="default float32")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: one a core)")


def set_up(args):
    """Seed torch, set the threads, print what was resolved; returns (device, dtype)."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        # glibc hands each freed tensor of some MB back to the kernel, which gives the next one as empty pages, one
        # fault for every 4 KB. Logits are hundreds of MB, made and freed many times a step: keeping the memory made
        # a fine-tuning step on two cores 3 times faster. The numbers are M_MMAP_MAX, M_TRIM_THRESHOLD and M_TOP_PAD.
        for option, value in ((-4, 0), (-1, 2 ** 31 - 1), (-2, 2 ** 28)):
            ctypes.CDLL(None).mallopt(option, value)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    try:
        device = torch.device(args.device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device}: not usable here ({str(error).splitlines()[0]}); use --device cpu") from None
    print(f"device {device}, {args.dtype}, {torch.get_num_threads()} threads, seed {args.seed}, torch {torch.__version__}")
    return device, getattr(torch, args.dtype)
