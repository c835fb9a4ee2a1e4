"""A Llama-style decoder, its key-value cache, and how a model is read from and written to disk.

In speculative decoding a small model, the drafter, guesses a few tokens, and the large one, the
target (SmolLM2, TinyLlama, Llama 2 and 3, Mistral, Qwen2.5), checks them all in one pass. The same
few lines are both; only Config and weights differ. Tokens go in, logits come out:

    tokens (B, T) -> embedding (B, T, D) -> several Blocks -> norm -> head -> logits (B, T, V)

B is the number of rows in the batch, T of tokens in a row, D the width, V the vocabulary's size.
The other scripts import this one; by itself it does nothing. A first look from Python:

    import torch, model
    llama = model.load("models/smollm2-135m-instruct")
    llama(torch.tensor([[1, 2, 3]])).shape          # (1, 3, 49152)

Source of the architecture: Llama 2 (Touvron et al., 2023, arXiv 2307.09288), section 2; RMSNorm
(arXiv 1910.07467), rotary positions (arXiv 2104.09864), grouped-query attention (arXiv
2305.13245), SwiGLU (arXiv 2002.05202).
"""

import json
import math
import platform
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from data import files

# ---- The decoder -------------------------------------------------------------------------------

class Block(nn.Module):
    """One layer: attention, then MLP. Each reads a normalised copy of the residual stream x
    (B, T, D), the vector of each token that every layer adds to, and adds to it.

    rotary: (cos, sin) of rotary_tables. mask: 0 or -inf, added to the scores (Llama.hidden makes
    both). cache: a KVCache, or None. layer: this one's number in it.
    """

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, rotary, mask, cache, layer):
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nn.Module):
    """Each token looks at itself and the tokens before it: softmax(q k^T / sqrt(d)) v, in several
    heads.

    Grouped-query attention: `group` query heads share each key-value head. The three projections
    are one matrix, qkv_proj: its rows are the queries', then the keys', then the values'. Qwen2
    adds a bias to them; Llama has none.
    """

    def __init__(self, config):
        super().__init__()
        self.heads, self.kv = config.num_attention_heads, config.num_key_value_heads
        self.d = config.head_dim
        rows = (self.heads + 2 * self.kv) * self.d
        self.qkv_proj = nn.Linear(config.hidden_size, rows, bias=config.attention_bias)
        self.o_proj = nn.Linear(self.heads * self.d, config.hidden_size, bias=False)

    def forward(self, x, rotary, mask, cache, layer):
        (B, T, _), heads, kv, d = x.shape, self.heads, self.kv, self.d
        group = heads // kv
        qk, v = self.qkv_proj(x).view(B, T, heads + 2 * kv, d).split((heads + kv, kv), 2)
        q, k = rotate(qk, *rotary).split((heads, kv), 2)
        k, v = k.transpose(1, 2), v.transpose(1, 2)                               # (B, kv, T, d)
        if cache is not None:
            k, v = cache.append(layer, k, v)                               # (B, kv, past + T, d)
        # The query heads that share a key head are neighbours. They become rows of one matrix: row
        # t * group + g is token t in the g-th of them. So one product serves them all; to repeat
        # keys and values for each query head would copy the whole cache at every step.
        q = q.reshape(B, T, kv, group * d).transpose(1, 2).reshape(B * kv, T * group, d)
        k, v = k.flatten(0, 1), v.flatten(0, 1)                           # (B * kv, past + T, d)
        # mask + q k^T / sqrt(d), (B * kv, T * group, past + T). scaled_dot_product_attention is the
        # same, no faster in fp32 on a CPU, and hides what happens.
        scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=d ** -0.5)
        weights = torch.softmax(scores, -1, dtype=torch.float32).to(v.dtype)
        y = torch.bmm(weights, v).view(B, kv, T, group * d)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, heads * d))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). gate and up are one matrix, in this order."""

    def __init__(self, config):
        super().__init__()
        width = config.intermediate_size
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, the mean over the last dimension, in fp32."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return torch.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotary_tables(config, positions):
    """cos and sin, (B, T, 1, head_dim), of every pair's angle at these positions (B, T).

    Pair i turns by position * theta^(-2i / head_dim). In fp32: at position 8,000 bf16 could not
    even tell neighbours apart. The first half of sin has a minus: see rotate.
    """
    even = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32)
    speed = 1 / config.rope_theta ** (even / config.head_dim)          # radians per token, (d / 2,)
    if config.rope_scaling:
        speed = slowed(speed, config.rope_scaling)
    angle = positions.float()[..., None, None] * speed
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def slowed(speed, scaling):
    """Llama 3.1's scaling of the rotary speeds (d / 2,), rope_type "llama3", for a context longer
    than the original one, which it was pretrained on (arXiv 2407.21783; the rule is Meta's code's).

    A pair that turned high_freq_factor times or more in the original context keeps its speed: it
    tells near tokens apart. One that turned low_freq_factor times or less goes `factor` times
    slower, and so meets no angle that it has not seen. Between the two it is a mixture.
    """
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / (2 * math.pi / speed)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * speed / scaling["factor"] + kept * speed


def rotate(x, cos, sin):
    """Turn each pair of x (B, T, heads, d) by its angle. Pair i is (x[i], x[i + d / 2]).

    (a, b) -> (a cos - b sin, b cos + a sin). To roll by half swaps a and b, so this is
    (a, b) * cos + (b, a) * (-sin, sin).
    """
    y = x.float()
    return torch.addcmul(y * cos, y.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


@dataclass
class Config:
    """The keys of Hugging Face's LlamaConfig that matter: shape, arithmetic, special tokens."""

    vocab_size: int = 32000                  # V
    hidden_size: int = 256                   # D, the width of the residual stream
    intermediate_size: int = 704             # width inside the MLP; Llama takes about 8/3 D
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None   # None: one for each attention head
    head_dim: int | None = None              # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048      # the context the model was made for, in tokens
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None         # None, or rope_type llama3 and its numbers
    attention_bias: bool = False             # whether q, k and v have one, as in Qwen2
    tie_word_embeddings: bool = True         # the head is the embedding, transposed
    bos_token_id: int | None = None
    eos_token_id: int | list | None = None
    pad_token_id: int | None = None

    def __post_init__(self):
        heads = self.num_attention_heads
        self.num_key_value_heads = self.num_key_value_heads or heads
        self.head_dim = self.head_dim or self.hidden_size // heads
        if heads % self.num_key_value_heads:
            raise ValueError(f"num_attention_heads {heads} is no multiple of num_key_value_heads "
                             f"{self.num_key_value_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary positions turn pairs")


class Llama(nn.Module):
    """The decoder: embedding, layers, norm, and the output head, which gives the logits."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.draft_vocabulary = None          # (K,) a drafter's list, see head, or None: all
        self.decoding_head, self.packed_count = None, 0           # set by for_decoding alone
        for name, weight in self.named_parameters():
            if weight.dim() == 2 and not weight.is_meta:     # meta: a shape alone, that load fills
                # GPT-2's start: standard deviation 0.02. Matrices whose results are added to the
                # residual stream start smaller, by the root of the number of additions: after all
                # of them the stream then has about the same size, whatever the depth.
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                depth = 2 * config.num_hidden_layers
                nn.init.normal_(weight, std=0.02 / depth ** 0.5 if residual else 0.02)

    def forward(self, tokens, cache=None):
        """tokens (B, T) int64 -> logits (B, T, V)."""
        return self.head(self.hidden(tokens, cache))

    def hidden(self, tokens, cache=None):
        """tokens (B, T) int64 -> hidden states (B, T, D) after the last norm.

        With a cache the tokens continue what it holds, and are appended to it. ValueError if they
        do not fit into it.
        """
        positions, mask = self.positions_and_mask(tokens, cache)
        rotary = rotary_tables(self.config, positions)
        x = self.embed_tokens(tokens)                                                   # (B, T, D)
        for layer, block in enumerate(self.layers):
            x = block(x, rotary, mask, cache, layer)
        if cache is not None:
            cache.length += tokens.shape[1]
        return self.norm(x)

    def positions_and_mask(self, tokens, cache):
        """Positions of the tokens, (B, T), and the mask that is added to their scores: 0 where they
        may look, -inf elsewhere, (B * kv heads, T * group, past + T). Without padding both are the
        same for all rows of the batch, and their first dimension is 1; for a single token so is the
        mask's second one.

            may look       key 0  1  2        (two tokens after one in the cache)
            token 1            x  x
            token 2            x  x  x
        """
        B, T = tokens.shape
        past, start = (cache.length, cache.start) if cache is not None else (0, None)
        if cache is not None and past + T > cache.max_len:
            raise ValueError(f"{past} tokens in the cache and {T} more exceed its {cache.max_len} "
                             f"columns: shorten the prompt or the answer")
        config, device, dtype = self.config, tokens.device, self.norm.weight.dtype
        columns = torch.arange(past, past + T, device=device)
        if T == 1 and start is None:                  # a single new token may look at everything
            return columns[None], torch.zeros(1, 1, past + 1, device=device, dtype=dtype)
        keys = torch.arange(past + T, device=device)
        positions, visible = columns[None], (keys <= columns[:, None])[None]     # causal
        if start is not None:
            positions = (columns - start[:, None]).clamp(min=0)        # padding's does not matter
            # A padding column may see itself, only so that its softmax is not 0 / 0.
            visible = visible & ((keys >= start[:, None, None]) | (keys == columns[:, None]))
            visible = visible.repeat_interleave(config.num_key_value_heads, 0)    # for all kv heads
        mask = torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, float("-inf"))
        group = config.num_attention_heads // config.num_key_value_heads
        return positions, mask.repeat_interleave(group, 1)        # each token is `group` rows of q

    def head(self, hidden, words=None):
        """hidden (..., D) -> logits (..., V). Take only the positions you need: (B, T, V) is large.

        With a draft vocabulary all other tokens have the logit -inf: the drafter never guesses
        them. Decoding stays lossless, for the target can still choose them. What is gained: a head
        of 8,192 rows instead of 49,152 (FR-Spec, arXiv 2502.14856). What is lost are rare words,
        names above all. Many of them stand in the prompt: `words` (K,) are ids to add to the list.
        """
        ids = self.draft_vocabulary
        if self.decoding_head is not None:
            logits = self.decoding_head(hidden)
        else:
            logits = F.linear(hidden, self.head_weight(ids))
        if ids is None:
            return logits
        whole = logits.new_full((*logits.shape[:-1], self.config.vocab_size), float("-inf"))
        if words is not None:
            whole[..., words] = F.linear(hidden, self.head_weight(words))
        return whole.scatter_(-1, ids.expand_as(logits), logits)

    def head_weight(self, ids=None):
        """(V, D), tied or not; with ids (K,) only their rows (K, D)."""
        tied = self.config.tie_word_embeddings
        weight = self.embed_tokens.weight if tied else self.lm_head.weight
        return weight if ids is None else weight[ids]

    def outside_list(self):
        """The ids of the tokens that the draft vocabulary leaves out, on the CPU."""
        ids, chosen = torch.arange(self.config.vocab_size), self.draft_vocabulary
        return ids[:0] if chosen is None else ids[~torch.isin(ids, chosen.cpu())]

    def keep_layers(self, numbers):
        """Let all layers but these go; returns the model. Of a target it leaves a start for a
        drafter that knows the words already. ValueError if there is no such layer."""
        if max(numbers) >= len(self.layers) or len(set(numbers)) < len(numbers):
            raise ValueError(f"layers {numbers}: give each once, from 0 to {len(self.layers) - 1}")
        self.layers = nn.ModuleList(self.layers[i] for i in numbers)
        self.config.num_hidden_layers = len(numbers)
        return self

    def parameter_count(self):
        """Number of parameters; a tied head is counted once."""
        return sum(weight.numel() for weight in self.parameters()) + self.packed_count

    def for_decoding(self):
        """A model for decoding that shares norms and embedding with this one: see below."""
        return decoding_copy(self)


class Embedding(nn.Embedding):
    """nn.Embedding, which on the meta device would import torch's compiler: 1.3 seconds."""

    def reset_parameters(self):
        if not self.weight.is_meta:
            super().reset_parameters()


class KVCache:
    """Keys and values of all tokens read so far, preallocated and filled in place.

    Column j holds the j-th token of every row, padding included. `length` columns are in use; to
    forget the last n tokens, write `cache.length -= n`: nothing is copied, later tokens overwrite
    the columns. Where rows of a batch have prompts of different lengths, they are padded on the
    left, and `start`
    (batch,) int64 holds each row's first real column: what lies before it is never looked at, and
    a token's position is its column minus start. None: no padding.
    """

    def __init__(self, config, batch, max_len, device="cpu", dtype=torch.float32):
        """Room for `max_len` tokens in each of `batch` rows."""
        shape = (batch, config.num_key_value_heads, max_len, config.head_dim)
        self.k, self.v = ([torch.zeros(shape, device=device, dtype=dtype)
                           for _ in range(config.num_hidden_layers)] for _ in range(2))
        self.length, self.max_len, self.start = 0, max_len, None

    def append(self, layer, k, v):
        """Write a layer's k and v (B, kv, T, d) behind its others; returns all, as views."""
        T, end = k.shape[2], self.length + k.shape[2]
        self.k[layer].narrow(2, self.length, T).copy_(k)
        self.v[layer].narrow(2, self.length, T).copy_(v)
        return self.k[layer].narrow(2, 0, end), self.v[layer].narrow(2, 0, end)

    def put(self, row, one):
        """Copy what another cache of one row holds into this row: it ends at column `length`."""
        columns = slice(self.length - one.length, self.length)
        for whole, part in zip(self.k + self.v, one.k + one.v):
            whole[row, :, columns] = part[0, :, :one.length]

    def keep(self, rows):
        """Keep only these rows (an index tensor): rows that have ended stop costing time."""
        for both in (self.k, self.v):
            for layer, kept in enumerate(both):       # one by one: two caches may not fit
                both[layer] = kept[rows]
        self.start = self.start[rows] if self.start is not None else None


# ---- From logits to a distribution -------------------------------------------------------------

def probabilities(logits, temperature=1.0, top_p=1.0):
    """logits (N, V) -> the distribution (N, V) that is sampled from, in fp32.

    Temperature first, then top-p: the smallest set of most probable tokens whose mass reaches
    top_p, the token that crosses kept, renormalised; 1 cuts nothing. temperature: a number, or one
    for each row (N,); 0 is greedy, one-hot. Target and drafter both go through here: their
    distributions are shaped in the same way before they are compared.
    """
    p = tempered(logits, temperature)
    if top_p >= 1:
        return p
    values, ids = nucleus(p, top_p)
    whole = torch.zeros(len(p), p.shape[1] + 1, device=p.device).scatter_(-1, ids, values)
    return whole[:, :-1]                               # the last column took the padding ids


def tempered(logits, temperature):
    """softmax(logits / temperature), (N, V); one-hot where the temperature is 0. NaN where the
    logits are not finite: see fetch."""
    logits = logits.float()
    top, best = logits.max(-1, keepdim=True)
    # top * 0 + 1 is 1, but NaN where the largest logit is infinite or NaN.
    one_hot = torch.zeros(logits.shape, device=logits.device).scatter_(-1, best, top * 0 + 1)
    if isinstance(temperature, (int, float)):             # one below 1e-6 would divide by nearly 0
        return torch.softmax(logits / max(temperature, 1e-6), -1) if temperature > 0 else one_hot
    t = temperature.view(-1, 1)                                                             # (N, 1)
    return torch.where(t > 0, torch.softmax(logits / t.clamp(min=1e-6), -1), one_hot)


def nucleus(p, top_p):
    """p (N, V) -> (values, ids), both (N, K), the largest first: the tokens that top-p keeps, and
    their probabilities, rescaled to sum to 1. The other columns hold the value 0, and an id that
    does not count: V, which is no token, or one that was cut. K is 256, 4,096 or V.

    To sort 49,152 entries in each row costs more than the model's pass on a CPU, and the largest
    256 nearly always reach top_p. A row where they do not is tried again with 4,096, and then with
    all V. A GPU sorts a few rows at once, since to ask whether 256 are enough is to wait for it.
    """
    V = p.shape[-1]
    values, ids = p.topk(min(256, V) if p.device.type == "cpu" or len(p) > 64 else V)
    for width in (min(4096, V), V):
        if values.shape[-1] == V or not (unfinished := values.sum(-1) < top_p).any():
            break
        more = width - values.shape[-1]
        values, ids = F.pad(values, (0, more)), F.pad(ids, (0, more), value=V)
        values[unfinished], ids[unfinished] = p[unfinished].topk(width)
    # A token is kept if the mass before it is below top_p.
    values = values * (values.cumsum(-1) - values < top_p)
    return values / values.sum(-1, keepdim=True), ids


def sample(p, generator=None):
    """One token for each row (N,) from p (N, V), which need not sum to 1: the inverse of its
    cumulative sum, in double precision.

    The token is the first whose sum exceeds u times the total, u uniform in [0, 1), so a token of
    probability 0 is never drawn: with p = (0.2, 0, 0.8) the sums are 0.2, 0.2, 1, and u = 0.2 gives
    token 2.
    """
    double = torch.float32 if p.device.type == "mps" else torch.float64   # Apple's GPU has no other
    total = p.cumsum(-1, dtype=double)
    u = torch.rand(p.shape[0], 1, dtype=double, device=p.device, generator=generator)
    token = torch.searchsorted(total, u * total[:, -1:], right=True).squeeze(-1)
    return token.clamp(max=p.shape[1] - 1)        # NaN gives V, which no embedding may be asked for


def fetch(tokens, sums):
    """(tokens as ints, sums as floats), two lists, in one transfer: a loop's only wait for a GPU.

    tokens (n,) int64, all below 2^24, which fp32 holds exactly; sums (m,) of probabilities.
    ValueError if one of them is NaN, which is what tempered makes of logits that are not finite: to
    ask after each pass would be a wait each time.
    """
    values = torch.cat([tokens, sums]).tolist()
    if not sum(values) >= 0:                                # asked in this way, NaN is refused
        raise ValueError("the model's logits are not finite: its weights are damaged, or too large "
                         "for this --dtype; try --dtype float32")
    return [int(value) for value in values[:len(tokens)]], values[len(tokens):]


# ---- For decoding: fp16 weights, fp32 arithmetic -----------------------------------------------

# A pass over few tokens hardly computes: it waits for the weights to come from memory, 538 MB of
# them for SmolLM2-135M in fp32. FBGEMM, a library inside torch, keeps them in fp16, which is half
# of that, in the order in which its kernel reads them, and computes in fp32. nn.Linear reads fp32,
# for one token at half the memory's speed, and for several it first copies each weight into
# another order, on every call. (data/RESULTS.md has the milliseconds for 1 to 16 tokens.)

class PackedLinear(nn.Module):
    """The product of an nn.Linear whose weight (out, in) is kept as FBGEMM reads it; a bias, where
    there is one, stays in fp32.

    The result of a row does not depend on the other rows of the pass, so a pass over several tokens
    finds what passes over one would: to the last bit on processors with AVX-512 instructions, up to
    rounding with AVX2. No gradient comes out. ValueError for a weight that fp16 cannot hold.
    """

    def __init__(self, weight, name, bias=None):
        super().__init__()
        largest = weight.abs().max()
        if not largest <= 65504:                            # asked in this way, NaN is refused, too
            raise ValueError(f"{name} has a weight that is NaN, infinite or above 65,504, fp16's "
                             f"largest: decode this model with --dtype bfloat16")
        weight = weight.detach().clone()                    # since packing may change what it gets
        self.change = ((weight.half().float() - weight).abs().max() / largest).nan_to_num().item()
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)

    def forward(self, x):
        return torch.ops.quantized.linear_dynamic_fp16.default(x, self.packed)


def fbgemm_works():
    """Whether this processor can: x86 with AVX2, without which torch does not list the engine.
    (Builds for ARM list it and crash.)"""
    x86 = platform.machine() in ("x86_64", "AMD64")
    return x86 and "fbgemm" in torch.backends.quantized.supported_engines


def decoding_copy(llama):
    """Llama.for_decoding(): the same model, its Linears and head replaced by PackedLinear.

    Norms and embedding (and an untied head, of which a draft vocabulary needs some rows) are
    shared, the original is untouched; the new model is never trained or
    saved. It serves every number of tokens, prompts included. Where FBGEMM does not serve (another
    processor, a GPU, bf16 or fp16 arithmetic) the model itself comes back, and a line says so.
    """
    weight = llama.norm.weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not fbgemm_works():
        print(f"decoding with nn.Linear: {platform.machine()} {weight.device.type}, {weight.dtype}")
        return llama
    with torch.device("meta"):
        copy = Llama(llama.config)                                         # the structure alone
    for name, module in llama.named_modules():
        if isinstance(module, (nn.Embedding, RMSNorm)):
            copy.set_submodule(name, module)
        elif isinstance(module, nn.Linear) and name != "lm_head":
            copy.set_submodule(name, PackedLinear(module.weight, name, module.bias))
    ids = copy.draft_vocabulary = llama.draft_vocabulary
    copy.lm_head = None if ids is None else getattr(llama, "lm_head", None)  # for rows of words
    copy.decoding_head = PackedLinear(llama.head_weight(ids), "the head")
    change = max(part.change for part in copy.modules() if isinstance(part, PackedLinear))
    if change:
        print(f"fp16 holds these weights with a change of at most {change:.1e} of the largest "
              f"weight of the same matrix")
    copy.packed_count = llama.parameter_count() - copy.parameter_count()
    return copy


# ---- On disk: the Hugging Face layout ----------------------------------------------------------

# On disk q, k, v and gate, up are matrices of their own; here each group is one, in this order.
JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# The model_types that this decoder computes, and the keys that would change its arithmetic.
FAMILIES = files.read_json(Path(__file__).parent / "data" / "families.json")
LLAMA3 = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}


def names_on_disk(name):
    """LlamaForCausalLM's names of what is the parameter `name` here."""
    matrix = name.split(".")[-2]
    prefix = "" if matrix == "lm_head" else "model."
    return [prefix + name.replace(matrix, part) for part in JOINED.get(matrix, (matrix,))]


def split_weights(llama):
    """The parameters as they are on disk: {name: tensor}."""
    config, result = llama.config, {}
    d, kv, width = config.head_dim, config.num_key_value_heads, config.intermediate_size
    # By the number of parts: q, k, v are 3, gate and up are 2; all else stays whole.
    sizes = {3: (config.num_attention_heads * d, kv * d, kv * d), 2: (width, width)}
    for name, weight in llama.named_parameters():
        names = names_on_disk(name)
        result |= zip(names, weight.split(sizes.get(len(names), len(weight))))
    return result


def load(folder, device="cpu", dtype=torch.float32, vocab_size=None):
    """Read a model folder: config.json and model.safetensors, or the shards that
    model.safetensors.index.json lists; fp32, fp16 or bf16 on disk.

    vocab_size: the tokenizer's. Embeddings are often padded to a round number of rows; those behind
    it stand for no token, and are left out here, so that sizes agree everywhere else.

    ValueError says which file is missing, damaged or of another kind.
    """
    folder = Path(folder)
    config = read_config(folder)
    index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.is_file():
        names = files.read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
            raise ValueError(f"{index}: has no weight_map; copy the file again")
        names = sorted(set(names.values()))
    weights = {}
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: no such file: the model is incomplete")
        try:
            weights.update(load_file(folder / name))
        except SafetensorError as error:
            raise ValueError(f"{folder / name}: damaged or cut short ({error})") from None
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    if config.tie_word_embeddings and head in weights:    # one matrix, under either name or both
        if not torch.equal(weights.setdefault(embedding, weights[head]), weights[head]):
            raise ValueError(f"{folder}: config.json has tie_word_embeddings true, but {head} is "
                             f"not {embedding}; set it to false")
    # Very old files also hold tables that are computed here; a tied head is the embedding.
    unused = ("rotary_emb.inv_freq", "lm_head.weight" if config.tie_word_embeddings else "-")
    weights = {name: weight.to(device=device, dtype=dtype) for name, weight in weights.items()
               if not name.endswith(unused)}
    if vocab_size is not None:
        if vocab_size > config.vocab_size:
            raise ValueError(f"{folder}: a model of {config.vocab_size} tokens with a tokenizer of "
                             f"{vocab_size}: the tokenizer is another model's; copy it again")
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            if name in weights and len(weights[name]) == config.vocab_size > vocab_size:
                weights[name] = weights[name][:vocab_size].clone()
        config.vocab_size = vocab_size
    # Before a million layers are built, even without memory.
    layers = len({name.split(".")[2] for name in weights if name.startswith("model.layers.")})
    if layers != config.num_hidden_layers:
        raise ValueError(f"{folder}: num_hidden_layers is {config.num_hidden_layers} in "
                         f"config.json, but the weights hold {layers}")
    with torch.device("meta"):
        llama = Llama(config)                            # shapes only: no memory, no random numbers
    expected = {name: tuple(weight.shape) for name, weight in split_weights(llama).items()}
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    if wrong := sorted(set(expected.items()) ^ set(found.items())):          # in one, not in both
        name = wrong[0][0]
        raise ValueError(f"{folder}: weights do not match config.json, first at {name} (config "
                         f"says {expected.get(name)}, the file has {found.get(name)})")
    llama.load_state_dict({name: torch.cat([weights.pop(part) for part in names_on_disk(name)])
                           for name, _ in llama.named_parameters()}, assign=True)
    llama.draft_vocabulary = read_draft_vocabulary(folder, config.vocab_size, device)
    return llama


def read_draft_vocabulary(folder, vocab_size, device):
    """The ids (K,) of folder's draft_vocabulary.json; None where there is no such file."""
    path = folder / "draft_vocabulary.json"
    if not path.is_file():
        return None
    try:
        ids = torch.tensor(json.loads(path.read_text()), dtype=torch.int64, device=device)
        sound = ids.dim() == 1 and len(ids) and ids.min() >= 0 and ids.max() < vocab_size
    except (ValueError, TypeError, OverflowError):
        sound = False
    if not sound:
        raise ValueError(f"{path}: expected a list of token ids below {vocab_size}; copy it again")
    return ids


def read_config(folder):
    """The Config of a model folder. ValueError if it is missing, damaged, or describes what this
    decoder cannot do."""
    path = Path(folder) / "config.json"
    keys = files.read_json(path)
    kind, biased = keys.get("model_type", "llama"), FAMILIES["attention_bias"]
    if kind not in [*biased]:
        raise ValueError(f"{path}: model_type is {kind!r}; this decoder reads {[*biased]}")
    # Where Mistral has no such key 4,096 is meant; Qwen2's counts only with use_sliding_window.
    keys = {"mistral": {"sliding_window": 4096} | keys,
            "qwen2": keys | {"sliding_window": None}}.get(kind, keys)
    for key, value in {**FAMILIES["neutral"], "attention_bias": biased[kind]}.items():
        if keys.get(key) not in (None, value):
            raise ValueError(f"{path}: {key} is {keys[key]!r}, which changes what a model computes;"
                             f" this decoder knows {key} {value!r} alone")
    # transformers 5 writes rope_parameters, older ones rope_scaling and a rope_theta of its own;
    # where there are both, rope_scaling counts, as in transformers.
    rope = keys.get("rope_scaling") or keys.get("rope_parameters") or {}
    rope = rope if isinstance(rope, dict) else {"rope_type": rope}
    scaling = {"rope_type": rope.get("type", "default")} | rope
    scaling = {key: scaling[key] for key in scaling if key not in ("type", "rope_theta")}
    known = {field.name: keys[field.name] for field in fields(Config) if field.name in keys}
    known["rope_theta"] = rope.get("rope_theta", keys.get("rope_theta", 10000.0))
    known["rope_scaling"] = None if scaling == {"rope_type": "default"} else scaling
    known["attention_bias"] = biased[kind]
    for key, value in known.items():
        if not valid(key, value):
            raise ValueError(f"{path}: {key} is {value!r}: damaged, or not known to this decoder")
    # What LlamaConfig means where a file leaves these out. (A missing size shows in the weights.)
    known.setdefault("tie_word_embeddings", False)
    known.setdefault("rms_norm_eps", 1e-6)
    return Config(**known)


def valid(key, value):
    """Whether a value of config.json is what its key must be: a count, a number, an id."""
    if key == "rope_scaling":
        return value is None or value["rope_type"] == "llama3" and (
            value.keys() - {"rope_type"} == LLAMA3 and all(valid("rope_theta", value[k])
            for k in LLAMA3) and value["low_freq_factor"] < value["high_freq_factor"])
    if key in ("tie_word_embeddings", "attention_bias"):
        return isinstance(value, bool)
    if key in ("rms_norm_eps", "rope_theta"):
        return isinstance(value, (int, float)) and 0 < value < 1e30
    if key.endswith("_token_id"):
        ids = value if isinstance(value, list) else [] if value is None else [value]
        return all(type(i) is int and i >= 0 for i in ids)
    optional = value is None and key in ("num_key_value_heads", "head_dim")
    limit = 2 ** 31 if key in ("vocab_size", "max_position_embeddings") else 2 ** 18
    return optional or (type(value) is int and 0 < value < limit)


def save(llama, folder, dtype=None):
    """Write config.json and model.safetensors in this dtype (None: the model's own), so that
    transformers opens the folder.

    Each file is written under another name and renamed: if the program is killed, the old file is
    still there.
    """
    if llama.decoding_head is not None:
        raise ValueError("a model made by for_decoding cannot be saved; save the original")
    folder, dtype = Path(folder), dtype or llama.norm.weight.dtype
    name = str(dtype).removeprefix("torch.")
    keys, rope = asdict(llama.config), llama.config.rope_scaling or {"rope_type": "default"}
    kind = ("qwen2", "Qwen2") if llama.config.attention_bias else ("llama", "Llama")
    keys |= {"model_type": kind[0], "architectures": [kind[1] + "ForCausalLM"],
             "hidden_act": "silu", "mlp_bias": False, "dtype": name, "torch_dtype": name,
             "rope_parameters": rope | {"rope_theta": llama.config.rope_theta}}
    weights = {name: weight.detach().to("cpu", dtype).contiguous()
               for name, weight in split_weights(llama).items()}
    with files.atomic(folder / "model.safetensors") as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})
    files.write_json(folder / "config.json", keys)
    if llama.draft_vocabulary is not None:            # other programs use the whole head
        files.write_json(folder / "draft_vocabulary.json", llama.draft_vocabulary.tolist(), None)
