"""
A GPT, after nanoGPT, whose keys may be lists: sizes (n_layer, n_head, n_embd, mlp_ratio) and kinds
(norm, position, qk_norm, activation, n_kv_head, window).

    build({"n_embd": 384})              one network, with nanoGPT's parameter names
    build({"n_embd": [192, 288, 384],   a supernet that holds all three, with shared weights,
           "norm": ["layernorm", "rmsnorm"]})    and both norms
    net(x, y, weights)                  a mixture of all its networks, differentiable in the weights
    net(x, y, arch)                     one of them, by slicing, at its own cost
    net.extract(arch)                   the same as a network of its own

To read a plain GPT, skip the arguments of every forward() behind x: they say how much of a layer is
in use, and which kind of it. By default it is all of it, and the only kind.

Attention heads follow one of two conventions:
    head_size=0   GPT-2's: every head has n_embd / n_head channels. With h heads, head j owns the
                  channels from j*E/h on (E the largest n_embd), and a width e uses the first e/h.
    head_size=64  fixed: n_head heads of 64 channels, whatever n_embd is; fewer are the first ones.
                  Where n_embd or n_head is a list, rope, n_kv_head and qk_norm need it.

What a mixture of kinds computes, p the weight of the option named; each is one pass:
    norm          sum_k p_k norm_k(x)
    position      the embedding times its weight; queries and keys turn by p_rope * angle
    qk_norm       q * (1 - p + p / RMS(q)), k alike
    residual      sums of what the options send into attention and MLP, and make of their outputs
    activation    sum_k p_k act_k(gate); a gated option's term is multiplied by the up-projection
    n_kv_head     query head i reads sum_k p_k K[i mod n_k], V alike: the heads are mixed
    window        the softmax's terms times the share of the windows that reach so far
"""
import itertools
import math
from dataclasses import dataclass, fields
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from configurator import ConfigError, check_range
from fused_ops import (
    causal_attention, mixed_activation, mixed_attention, mixed_heads, norm_heads, rotate, rotation,
)
from supernet import (
    ALL, NORMS, Embedding, Linear, Norm, Sampled, Sinusoidal, Size, check_arch, counts_of, extract,
    kinds_of, one_hot, options_of, prefix_masks, run_blocks, straight_through, transformer_choices,
    transformer_sizes,
)

DATA = "tokens" # the kind of data it takes


@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304 # GPT-2's 50257, rounded up to a multiple of 64 for speed
    n_layer: int | list = 12
    n_head: int | list = 12
    n_embd: int | list = 768
    mlp_ratio: float | list = 4
    head_size: int = 0 # 0: n_embd / n_head
    n_kv_head: int | list = 0 # heads of keys and values; 0: n_head
    window: int | list = 0 # tokens that a token sees, with itself; 0: all before it
    dropout: float = 0.0
    bias: bool = True # in Linears and LayerNorms, as in GPT-2; False is a bit better and faster
    norm: str | list = "layernorm" # a key of NORMS
    prmsnorm_pct: float = 0.0625 # partial_rmsnorm: the share of the channels that its RMS is of
    position: str | list = "learned" # a key of POSITIONS
    qk_norm: bool | list = False # queries and keys over their RMS in every head
    activation: str | list = "gelu" # a key of ACTIVATIONS
    residual: str | list = "pre" # one of RESIDUALS
    n_expert: int = 0 # MLPs a layer; each token goes through top_k of them
    top_k: int = 2
    router_aux_loss_coef: float = 0.1 # weight of the loss for an uneven use of the experts
    loss_chunk: int = 0 # tokens whose logits the loss computes at a time, to save memory; 0: all

    def __post_init__(self):
        for name in (*KINDS, "n_kv_head", "window"): # a list of one is no choice
            value = getattr(self, name)
            if isinstance(value, list | tuple) and len(value) == 1:
                setattr(self, name, value[0])


POSITIONS = {
    "learned": Embedding, # GPT-2
    "sinusoidal": lambda block_size, n: Sinusoidal(n), # Vaswani et al. 2017
    "rope": None, # attention turns queries and keys (Su et al. 2021)
    "none": None, # causal attention alone can tell positions (Haviv et al. 2022)
}
GELU = partial(F.gelu, approximate="tanh") # Hendrycks & Gimpel 2016, as in GPT-2
GATED = {"geglu": GELU, "swiglu": F.silu, "reglu": F.relu} # act(W x) * (V x) (Shazeer 2020)
ACTIVATIONS = {"gelu": GELU, "exact_gelu": F.gelu, "relu": F.relu,
               "relu2": lambda x: F.relu(x).square(), # So et al. 2021
               "silu": F.silu, "mish": F.mish, **GATED} # Elfwing et al. 2017, Misra 2019
RESIDUALS = ("pre", "post", "branch", "parallel") # where the norms stand, see Block
# what a block is made of, beside its sizes: {key: the words that it may be}
KINDS = {"norm": NORMS, "position": POSITIONS, "qk_norm": (False, True), "residual": RESIDUALS,
         "activation": ACTIVATIONS}
PER_LAYER = ("activation", "n_kv_head", "window") # the others are one for the network
BLOCK_KEYS = (*KINDS, "n_kv_head", "window", "prmsnorm_pct")
TINY = 1e-30 # in the place of 0 in a logarithm


class Now(NamedTuple):
    """What one layer is in one forward pass; by default it has nothing to choose."""
    e: Size | None = None # of n_embd
    n_head: Sampled = ALL
    mlp_ratio: Sampled = ALL
    norm: Sampled = ALL
    position: Sampled = ALL
    qk_norm: Sampled = ALL
    residual: Sampled = ALL
    activation: Sampled = ALL
    n_kv_head: Sampled = ALL
    window: Sampled = ALL
    rope: tuple | None = None # rotation()'s (cos, sin)


PLAIN = Now()


class CausalSelfAttention(nn.Module):
    def __init__(self, config, n_embd, n_head, n_kv_head=(0,), window=(0,), qk_norm=(False,),
                 head_size=0):
        """n_embd, n_head and so on: their options, of a plain network one of each."""
        super().__init__()
        self.n_embd, self.n_head, self.head_size = n_embd, n_head, head_size
        self.n_kv_head, self.window, self.qk_norm = n_kv_head, window, qk_norm
        self.dropout = config.dropout
        for e, h in itertools.product(n_embd, n_head):
            if not head_size and e % h:
                raise ConfigError(f"n_embd={e} is not divisible by n_head={h}: choose widths and "
                                  "head counts that divide.")
        for h, kv in itertools.product(n_head, n_kv_head):
            if kv and h % kv:
                raise ConfigError(f"n_head={h} is not divisible by n_kv_head={kv}: choose head "
                                  "counts that divide.")
        H, KV = n_head[-1], n_kv_head[-1] or n_head[-1]
        inner, of_kv = (H * head_size, KV * head_size) if head_size else (n_embd[-1], n_embd[-1])
        self.sizes = inner, of_kv, of_kv # of queries, keys and values
        self.c_attn = Linear(n_embd[-1], inner + 2 * of_kv, bias=config.bias)
        self.c_proj = Linear(inner, n_embd[-1], bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        # for a mixture, of each head count: the channels in use, and 1 / sqrt of the head size
        if head_size:
            mask = prefix_masks([h * head_size for h in n_head], inner) # (n_head, inner)
            scale = torch.full((1, inner), head_size ** -0.5)
        else: # (n_head, n_embd, inner)
            mask = torch.stack([prefix_masks(n_embd, inner, groups=h) for h in n_head])
            scale = torch.tensor([[(e / h) ** -0.5 for e in n_embd] for h in n_head])
            scale = mask * scale.unsqueeze(-1)
        # of each count of keys and values: the one that a query head reads, (n_kv_head, H, KV)
        reads = torch.stack([F.one_hot(torch.arange(H) % (kv or H), KV) for kv in n_kv_head])
        # of each window: whether it reaches so many tokens back
        reach = torch.stack([torch.arange(config.block_size) < (w or config.block_size)
                             for w in window]) if any(window) else torch.ones(1, 1)
        for name, t in (("mask", mask), ("scale", scale), ("reads", reads), ("reach", reach)):
            self.register_buffer(name, t.float(), persistent=False)

    def forward(self, x, now=PLAIN, cache=None):
        """x: (B, T, n_embd) -> the same. cache, for generate(): {} at the start, then
        {"past": the number of tokens before, "k", "v": theirs, or of the last ones in a window}."""
        if now.n_head.is_mixture:
            return self.mixture(x, now)
        e, h, weight = now.e, now.n_head.of(self.n_head), now.n_head.weight
        kv, window = now.n_kv_head.of(self.n_kv_head) or h, now.window.of(self.window)
        is_whole = e is None and now.n_head.option is None and now.n_kv_head.option is None
        if self.head_size:
            n, m, groups = h * self.head_size, kv * self.head_size, 1
            N, M, _ = self.sizes
            rows = Size(n + 2 * m, parts=((0, n), (N, m), (N + M, m)))
        else: # each head has its own share of the channels
            n = m = e.n if e else self.n_embd[-1]
            groups, rows = h, Size(3 * n, 3 * h)
        q, k, v = self.c_attn(x, e, None if is_whole else rows).split((n, m, m), dim=2) # (B, T, n)
        q, k = self.normed_and_turned(q, now), self.normed_and_turned(k, now)
        k, v = (straight_through(t, now.n_kv_head.weight) for t in (k, v))
        is_first = not cache # one new token sees the whole cache, or the last `window` of it
        if cache:
            k, v = (torch.cat((cache[name], t), 1)[:, -window:] for name, t in (("k", k), ("v", v)))
        if cache is not None:
            past = cache.get("past", 0) + x.size(1)
            cache.update(k=k[:, -window:], v=v[:, -window:], past=past)
        if weight is not None and not self.head_size: # as often as in the mixture below
            q, weight = straight_through(q, e.p * e.p), weight * e.p * e.p
        distance = self.distance(now.window, x.size(1)) if now.window.weights is not None else None
        y = causal_attention(q, k, v, h, self.dropout if self.training else 0.0,
                             is_causal=is_first, window=window, distance=distance)
        y = straight_through(y, weight)
        return self.resid_dropout(self.c_proj(y, None if is_whole else Size(n, groups), e))

    def mixture(self, x, now):
        """Every head count attends in its own layout, at its true head size.

        The width is mixed once by each projection: in the rows of query, key and value, and in the
        columns of c_proj. Masks are linear in what they multiply, so the key's moves onto the query
        and the value's behind the attention. Heads of a fixed size are nested: one attention, whose
        head i is multiplied by S(i).
        """
        e, a = now.e, now.n_head.weights # (n_head,)
        qkv, dropout = self.c_attn(x, e), self.dropout if self.training else 0.0
        distance = self.distance(now.window, x.size(1)) if any(self.window) else None
        if self.head_size:
            qkv = self.all_heads(qkv, now) # (B, T, 3 inner)
            y_scale = (a @ self.mask).unsqueeze(0)
            y = mixed_attention(qkv, self.scale, y_scale, self.n_head[-1:], dropout, distance)
        else:
            S, scale = e.p @ self.mask, e.p @ self.scale # (n_head, inner)
            y_scale = a.unsqueeze(-1) * S * S
            y = mixed_attention(qkv, S * scale, y_scale, self.n_head, dropout, distance)
        return self.resid_dropout(self.c_proj(y, None, e))

    def all_heads(self, qkv, now):
        """Queries, keys and values, all with as many heads as there are of queries:
        (B, T, 3 inner)."""
        H, G = (n // self.head_size for n in self.sizes[:2])
        norm = reads = None
        if any(self.qk_norm):
            weights = dict(now.qk_norm.pairs) or {False: qkv.new_zeros(()), True: qkv.new_ones(())}
            norm = torch.stack((weights[False], weights[True]))
        if now.n_kv_head.is_mixture:
            reads = torch.einsum("k,kij->ij", now.n_kv_head.weights, self.reads)
        if H == G and norm is None and reads is None and now.rope is None:
            return qkv
        return mixed_heads(qkv, self.head_size, H, G, norm, now.rope, reads)

    def normed_and_turned(self, t, now):
        """Queries or keys of a network: (B, T, heads * head_size) -> the same."""
        if now.qk_norm.of(self.qk_norm):
            t = norm_heads(t, self.head_size, (0.0, 1.0))
        t = straight_through(t, now.qk_norm.weight)
        return t if now.rope is None else rotate(t, *now.rope)

    def distance(self, window, T):
        """(T,): the logarithm of the share of the windows that reach so many tokens back."""
        share = self.reach[0, :T] if window.weights is None else window.weights @ self.reach[:, :T]
        return (share + TINY).log()


class MLP(nn.Module):
    def __init__(self, config, n_embd, mlp_ratio, activation):
        """n_embd, mlp_ratio, activation: their options, of a plain network one of each."""
        super().__init__()
        self.n_embd, self.mlp_ratio, self.activation = n_embd, mlp_ratio, activation
        n_hidden = [[int(m * e) for m in mlp_ratio] for e in n_embd] # (n_embd, mlp_ratio)
        N = n_hidden[-1][-1] # of the largest network
        if n_hidden[0][0] < 1:
            raise ConfigError(f"mlp_ratio={mlp_ratio[0]} of n_embd={n_embd[0]} is less than one "
                              "neuron: choose a larger one.")
        self.has_gate = any(name in GATED for name in activation)
        self.c_fc = Linear(n_embd[-1], (1 + self.has_gate) * N, bias=config.bias)
        self.c_proj = Linear(N, n_embd[-1], bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        # for a mixture: (n_embd, mlp_ratio, N), and every number of neurons that occurs
        self.register_buffer("mask", prefix_masks(n_hidden, N), persistent=False)
        self.n_hidden = tuple(sorted({n for row in n_hidden for n in row}))
        self.register_buffer("last", torch.tensor(self.n_hidden) - 1, persistent=False)

    def hidden(self, e, mlp_ratio):
        """The Size of the hidden dimension, n_embd * mlp_ratio."""
        if mlp_ratio.is_mixture:
            mask = torch.einsum("m,emh->eh", mlp_ratio.weights, self.mask) # (n_embd, N)
            return Size(self.n_hidden, mask=mask, p=e.p, last=self.last)
        if e is None and mlp_ratio.option is None:
            return None
        n = int(mlp_ratio.of(self.mlp_ratio) * (e.n if e else self.n_embd[-1]))
        return Size(n, mask=mlp_ratio.weight, p=e.p if e else None)

    def forward(self, x, e=None, mlp_ratio=ALL, activation=ALL):
        """x: (..., n_embd) -> the same."""
        hidden, name = self.hidden(e, mlp_ratio), activation.of(self.activation)
        if activation.is_mixture:
            x = self.c_fc(x, e, hidden.doubled if self.has_gate else hidden)
            kinds = [(name, ACTIVATIONS[name], name in GATED) for name in self.activation]
            x = mixed_activation(x, activation.weights, kinds)
        elif name in GATED:
            gate, up = self.c_fc(x, e, hidden and hidden.doubled).chunk(2, dim=-1)
            x = straight_through(ACTIVATIONS[name](gate) * up, activation.weight)
        else: # of a layer that could be gated, the first half of c_fc
            x = ACTIVATIONS[name](self.c_fc(x, e, hidden))
            x = straight_through(x, activation.weight)
        return self.dropout(self.c_proj(x, hidden, e))


class MoE(nn.Module):
    """Every token through top_k of n_expert MLPs, their outputs weighted by the softmax of their
    logits (Shazeer et al. 2017).

    In training the logits are noisy, and aux_loss is CV(importance)^2 + CV(load)^2. CV is the
    standard deviation over the mean. An expert's importance is the sum of its weights; its load the
    expected number of tokens if its noise were drawn again, sum Phi((clean - threshold) / scale).
    """
    def __init__(self, config, *options):
        super().__init__()
        self.top_k, n = config.top_k, config.n_expert
        self.experts = nn.ModuleList([MLP(config, *options) for _ in range(n)])
        n_embd = options[0]
        self.router = Linear(n_embd[-1], 2 * n, bias=False) # clean logits, and their noise's scale

    def forward(self, x, e=None, *now):
        tokens = x.flatten(0, 1) # (B * T, n_embd)
        clean, scale = self.router(tokens, e).float().chunk(2, dim=-1) # (B * T, n_expert)
        scale = F.softplus(scale)
        logits = clean + torch.randn_like(clean) * scale if self.training else clean
        top, chosen = logits.topk(self.top_k + 1)
        gates = torch.zeros_like(logits).scatter(1, chosen[:, :-1], top[:, :-1].softmax(-1))
        if self.training:
            # what an expert must exceed to be chosen: the k-th largest logit of the others
            threshold = torch.where(logits > top[:, [-1]], top[:, [-1]], top[:, [-2]])
            both = gates.sum(0), torch.special.ndtr((clean - threshold) / scale).sum(0)
            self.aux_loss = sum(t.var(correction=0) / t.mean().square() for t in both)
        y = torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            rows = (chosen[:, :-1] == i).any(1).nonzero().squeeze(1)
            out = expert(tokens[rows], e, *now) * gates[rows, i, None]
            y = y.index_add(0, rows, out.to(y.dtype))
        return y.view_as(x)


def make_norm(config, layer):
    """A norm over n_embd, of the layer's kinds. layer: {choice: its options in this layer}."""
    return Norm(layer["n_embd"][-1], config.bias, layer["norm"], config.prmsnorm_pct)


class Block(nn.Module):
    def __init__(self, config, layer, head_size):
        """layer: {choice: its options in this layer}."""
        super().__init__()
        self.residual = layer["residual"]
        self.ln_1 = make_norm(config, layer)
        names = "n_embd", "n_head", "n_kv_head", "window", "qk_norm"
        self.attn = CausalSelfAttention(config, *(layer[name] for name in names), head_size)
        if self.residual != ("parallel",):
            self.ln_2 = make_norm(config, layer)
        of_mlp = layer["n_embd"], layer["mlp_ratio"], layer["activation"]
        self.mlp = (MoE if config.n_expert else MLP)(config, *of_mlp)

    def forward(self, x, now=PLAIN, cache=None):
        if now.residual.weights is not None:
            return self.mixture(x, now)
        e, norm, of_mlp = now.e, now.norm, (now.e, now.mlp_ratio, now.activation)
        residual = now.residual.of(self.residual)
        if residual == "pre": # GPT-2
            x = x + self.attn(self.ln_1(x, e, norm), now, cache)
            return x + self.mlp(self.ln_2(x, e, norm), *of_mlp)
        if residual == "post": # Vaswani et al. 2017
            x = self.ln_1(x + self.attn(x, now, cache), e, norm)
            return self.ln_2(x + self.mlp(x, *of_mlp), e, norm)
        if residual == "branch": # Swin V2 (Liu et al. 2022)
            x = x + self.ln_1(self.attn(x, now, cache), e, norm)
            return x + self.ln_2(self.mlp(x, *of_mlp), e, norm)
        y = self.ln_1(x, e, norm) # parallel: GPT-J (Wang & Komatsuzaki 2021)
        return x + self.attn(y, now, cache) + self.mlp(y, *of_mlp)

    def mixture(self, x, now):
        """One attention and one MLP for all options: each gets the sum of what the options would
        send in, and the residual stream the sum of what they would make of its output."""
        p = dict(zip(self.residual, now.residual.weights, strict=True))

        def ln_1(x):
            return self.ln_1(x, now.e, now.norm)

        def ln_2(x):
            return self.ln_2(x, now.e, now.norm)

        def mixed(**values):
            """The sum of each option's value, a function, times its weight."""
            return sum(p[name] * value() for name, value in values.items() if name in p)
        a = self.attn(mixed(pre=lambda: ln_1(x), post=lambda: x, branch=lambda: x,
                            parallel=lambda: ln_1(x)), now)
        y = mixed(pre=lambda: x + a, post=lambda: ln_1(x + a), branch=lambda: x + ln_1(a),
                  parallel=lambda: x + a)
        m = self.mlp(mixed(pre=lambda: ln_2(y), post=lambda: y, branch=lambda: y,
                           parallel=lambda: ln_1(x)), now.e, now.mlp_ratio, now.activation)
        return mixed(pre=lambda: y + m, post=lambda: ln_2(y + m), branch=lambda: y + ln_2(m),
                     parallel=lambda: y + m)


def compiled(function):
    """function(x, now, ...) compiled with symbols for the sizes; with numbers for mixtures, whose
    sizes never change. They need half as many kernels, and Triton 3.6 fails on one with symbols, in
    the backward pass of mixed_norm() (triton-lang/triton issue 8257)."""
    symbols, numbers = (torch.compile(function, dynamic=dynamic) for dynamic in (True, False))
    return lambda x, now, *args: (numbers if now.n_head.is_mixture else symbols)(x, now, *args)


class GPT(nn.Module):
    has_plain_kernels = False # only its mixtures have kernels in fused_ops.cpp

    def __init__(self, config, arch=None):
        """config: GPTConfig. arch: the choices of a stand-alone network, where config has lists."""
        super().__init__()
        self.config = config
        self.check_config()
        kinds = {name: kinds_of(getattr(config, name), name, KINDS[name]) for name in KINDS}
        kinds |= {name: counts_of(getattr(config, name), name) for name in ("n_kv_head", "window")}
        of_layer = {name: kinds.pop(name) for name in PER_LAYER}
        self.n_layer, layers = transformer_choices(self, config, arch, kinds, of_layer)
        self.n_embd, self.position = layers[0]["n_embd"], layers[0]["position"]
        self.head_size = self.fixed_head_size(kinds, of_layer)
        self.check_choices(of_layer)
        E = self.n_embd[-1]
        # the tables of positions: {option: the name of its module}
        self.tables = {name: {"learned": "wpe"}.get(name, name) for name in self.position
                       if POSITIONS[name]}
        tables = {of: POSITIONS[name](config.block_size, E) for name, of in self.tables.items()}
        self.transformer = nn.ModuleDict(dict(
            wte=Embedding(config.vocab_size, E),
            **tables,
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList([Block(config, layer, self.head_size) for layer in layers]),
            ln_f=make_norm(config, layers[0]),
        ))
        self.lm_head = Linear(E, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight # weight tying
        # for a mixture of widths
        self.register_buffer("mask", prefix_masks(self.n_embd, E), persistent=False) # (n_embd, E)
        self.register_buffer("last", torch.tensor(self.n_embd) - 1, persistent=False)

        self.apply(self._init_weights)
        # scaled init of the residual projections, per the GPT-2 paper
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, mean=0.0, std=0.02 / math.sqrt(2 * len(layers)))

    def fixed_head_size(self, kinds, of_layer):
        """The channels of every head, or 0 where n_embd / n_head says it layer by layer. Raises
        ConfigError if a kind needs the former."""
        c = self.config
        n_embd, n_head = (options_of(getattr(c, name), name) for name in ("n_embd", "n_head"))
        size = c.head_size
        if not size and len(n_embd) == len(n_head) == 1 and n_embd[0] % n_head[0] == 0:
            size = n_embd[0] // n_head[0]
        for name, is_used in (("position='rope'", "rope" in kinds["position"]),
                              ("n_kv_head", any(of_layer["n_kv_head"])),
                              ("qk_norm", any(kinds["qk_norm"]))):
            if is_used and not size:
                raise ConfigError(f"{name} needs heads of one size, and n_embd={c.n_embd} with "
                                  f"n_head={c.n_head} makes several: set head_size, such as "
                                  "--head_size=16.")
        if "rope" in kinds["position"] and size % 2:
            raise ConfigError(f"position='rope' needs heads of an even size, and theirs is {size}: "
                              "choose another head_size, n_embd or n_head.")
        return size

    def check_config(self):
        """Raises ConfigError if a key of the blocks has a value that it cannot have."""
        c = self.config
        check_range(c, 0, "head_size", "loss_chunk", "router_aux_loss_coef")
        check_range(c, 0, "dropout", below=1)
        if not 0 < c.prmsnorm_pct <= 1:
            raise ConfigError(f"prmsnorm_pct={c.prmsnorm_pct} must be above 0 and at most 1, such "
                              "as 0.0625.")
        if c.n_expert < 0 or (c.n_expert and not 0 < c.top_k < c.n_expert):
            raise ConfigError(f"n_expert={c.n_expert} must be 0 or above top_k={c.top_k}, and "
                              "top_k at least 1.")

    def check_choices(self, of_layer):
        """Raises ConfigError if the choices do not go together."""
        c = self.config
        if (w := max(of_layer["window"])) > c.block_size:
            raise ConfigError(f"window={w} is above block_size={c.block_size}: choose 0, all "
                              "tokens, or fewer.")
        if c.n_expert and any(len(choice.options) > 1 for choice in self.choices.values()):
            raise ConfigError(f"n_expert={c.n_expert} is for fixed sizes, without lists: a mixture "
                              "would route its tokens as none of its networks does.")

    def _init_weights(self, module):
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, idx, targets=None, arch=None, cache=None):
        """idx, targets: (B, T) token ids, of which -1 is ignored -> logits (B, T, vocab_size), or
        None with loss_chunk, and the loss. Without targets: logits (B, 1, vocab_size) of the last
        position, and None. arch: None for a network without choices, else an architecture, or
        weights for a mixture. cache: a dict a layer, for generate()."""
        T, past = idx.size(1), cache[0].get("past", 0) if cache else 0
        block_size = self.config.block_size
        assert past + T <= block_size, f"{past + T} tokens, but block_size is {block_size}"
        e, n_layer, layers = transformer_sizes(self, arch)
        layers = [Now(e, **layer) for layer in layers]
        x = self.transformer.wte(idx, e) # (B, T, n_embd)
        # the weight of each kind of position: 1 of the only one, or those of a choice
        position, rope = layers[0].position, None
        weights = {position.of(self.position): 1.0}
        if position.weights is not None:
            weights = dict(zip(self.position, position.weights, strict=True))
        pos = torch.arange(past, past + T, device=idx.device)
        for name, of in self.tables.items():
            if name in weights:
                x = x + weights[name] * self.transformer[of](pos, e)
        if "rope" in weights:
            rope = rotation(self.head_size, pos, weights["rope"])
            layers = [now._replace(rope=rope) for now in layers]
        x = self.transformer.drop(x)
        args = [(now, cache[i] if cache else None) for i, now in enumerate(layers)]
        x = run_blocks(self.transformer.h, x, n_layer, args)
        logits, loss = self.head(x, layers[0], targets)
        if loss is not None and self.config.n_expert and self.training:
            aux_loss = sum(block.mlp.aux_loss for block in self.transformer.h)
            loss = loss + self.config.router_aux_loss_coef * aux_loss
        return logits, loss

    def head(self, x, now, targets):
        """(logits, loss) of the last block's output, as forward() returns them."""
        e, x = now.e, self.transformer.ln_f(x, now.e, now.norm)
        if targets is None:
            return self.lm_head(x[:, [-1], :], e), None
        if self.config.loss_chunk:
            return None, self.chunked_loss(x, e, targets)
        logits = self.lm_head(x, e)
        flat = logits.view(-1, logits.size(-1)) # (B * T, vocab_size)
        return logits, F.cross_entropy(flat, targets.reshape(-1), ignore_index=-1)

    def chunked_loss(self, x, e, targets):
        """The same loss from the logits of loss_chunk tokens at a time, which the backward pass
        computes again."""
        def loss(x, y):
            return F.cross_entropy(self.lm_head(x, e), y, ignore_index=-1, reduction="sum")
        n = self.config.loss_chunk
        chunks = zip(x.flatten(0, 1).split(n), targets.flatten().split(n), strict=True)
        keys = dict(use_reentrant=False, preserve_rng_state=False)
        total = sum(checkpoint(loss, x, y, **keys) for x, y in chunks)
        return total / (targets != -1).sum()

    def compile_parts(self):
        """Compiles what all layers and architectures share: one block and the head. All
        architectures need the same few graphs: for mixtures, for full and part widths, with and
        without gradients."""
        torch._dynamo.config.recompile_limit = 32
        # its keys leave out the sizes that a graph is for: wrong numbers (pytorch issue 194001)
        torch._functorch.config.enable_autograd_cache = False
        for block in self.transformer.h:
            block.forward = compiled(block.forward)
        self.head = compiled(self.head)
        return self

    def extract(self, arch):
        """The stand-alone network of an architecture, with the weights it has here."""
        arch = check_arch(self.choices, arch)
        device = self.lm_head.weight.device
        token = torch.zeros(1, 1, dtype=torch.long, device=device)
        return extract(self, GPT(self.config, arch).to(device), lambda: self(token, token, arch))

    def cost(self, arch=None):
        """{"params", "flops", "kv_cache"} of an architecture: whole numbers; of weights: the
        differentiable expectations, in float64.

        flops: of one forward pass over block_size tokens, 2 a multiply-add in a matrix product,
        with all scores of attention in a window; of n_expert MLPs the params of all and the flops
        of top_k. kv_cache: bytes of the keys and values of block_size tokens in 16 bits; a layer
        with a window keeps only the last ones.
        """
        c, T = self.config, self.config.block_size
        e, bias = torch.tensor(self.n_embd, dtype=torch.float64), int(c.bias) # (n_embd,)
        weights, L = self.expectation(arch), len(self.transformer.h)

        def mean(name, value):
            """The expectation of value(option) over a choice: (), or (n_layer,) of every layer."""
            is_shared = name in ("norm", "position", "residual")
            options = [self.options_in(name, i) for i in range(1 if is_shared else L)]
            values = torch.tensor([[value(o) for o in row] for row in options], dtype=e.dtype)
            means = (values * weights[name]).sum(-1) if name in weights else values.sum(-1)
            return means[0] if is_shared else means

        # the chance that each layer runs
        runs = torch.tensor([[n > i for n in self.n_layer] for i in range(L)]).double()
        used = runs @ weights["n_layer"] # (n_layer,)
        seen = mean("window", lambda w: w or T) # tokens that a token sees
        gated = mean("activation", lambda name: name in GATED).unsqueeze(-1)
        ratios = [[[int(r * n) for r in self.options_in("mlp_ratio", i)] for n in self.n_embd]
                  for i in range(L)]
        hidden = (torch.tensor(ratios).double() @ weights["mlp_ratio"].unsqueeze(-1)).squeeze(-1)
        inner = of_kv = e.expand(L, -1) # (n_layer, n_embd)
        if self.head_size:
            n_head = mean("n_head", int)
            n_kv_head = mean("n_kv_head", int) + mean("n_kv_head", lambda n: n == 0) * n_head
            inner, of_kv = (self.head_size * n.unsqueeze(-1) for n in (n_head, n_kv_head))

        norm = e + bias * mean("norm", lambda name: name == "layernorm") * e # parameters of one
        norms = mean("residual", lambda name: 1 if name == "parallel" else 2) # of a block
        n_expert, top_k = (c.n_expert, c.top_k) if c.n_expert else (1, 1)
        router, attention = 2 * c.n_expert * e, 2 * (inner + of_kv) * e # entries of the matrices
        mlp, mlp_bias = (2 + gated) * hidden * e, bias * ((1 + gated) * hidden + e)
        of_layer = norms * norm + attention + bias * (inner + 2 * of_kv + e) + router
        learned = mean("position", lambda name: name == "learned")
        params = c.vocab_size * e + learned * T * e + norm # wte, wpe, ln_f
        params = params + used @ (of_layer + n_expert * (mlp + mlp_bias))
        scores = 2 * seen.unsqueeze(-1) * inner
        flops = 2 * T * (c.vocab_size * e + used @ (attention + top_k * mlp + router + scores))
        kv_cache = (used * seen) @ (2 * 2 * of_kv + 0 * e)
        cost = {"params": params, "flops": flops, "kv_cache": kv_cache}
        cost = {name: weights["n_embd"] @ value for name, value in cost.items()}
        if arch and isinstance(arch["n_layer"], torch.Tensor):
            return cost
        return {name: round(value.item()) for name, value in cost.items()}

    def options_in(self, name, i=0):
        """The options in layer i of a choice, or of a key that is none."""
        if name in ("norm", "position"):
            return self.transformer.ln_f.kinds if name == "norm" else self.position
        block = self.transformer.h[i]
        if name == "residual":
            return block.residual
        if name in ("mlp_ratio", "activation"):
            return getattr(block.mlp.experts[0] if self.config.n_expert else block.mlp, name)
        return getattr(block.attn, name)

    def expectation(self, arch):
        """`arch` as float64 weights; None: of the only option of every choice."""
        if not arch:
            weights = {name: torch.ones((n, 1) if n else 1) for name, n in self.rows.items()}
        elif isinstance(arch["n_layer"], torch.Tensor):
            weights = arch
        else:
            weights = one_hot(self.choices, arch)
        return {name: w.double().cpu() for name, w in weights.items()}

    def latency_parts(self, shares):
        """{name: (n_embd, options)}: how often this GPT has each part; its latency is linear in it.
        shares: the weights of its choices, those of a layer times the chance that it runs."""
        parts = {"rest": shares["n_layer"], "attention": shares["n_head"].sum(0),
                 "mlp": shares["mlp_ratio"].sum(0)}
        return {name: torch.outer(shares["n_embd"], share) for name, share in parts.items()}

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, arch=None, generator=None,
                 vocab_size=None, until=None):
        """idx: (B, T) -> (B, T + max_new_tokens), or shorter once until(idx) holds. temperature=0
        takes the likeliest token; ids from vocab_size on are never drawn. Keys and values are
        cached until block_size is full; from then on, and for a mixture always, the whole window is
        computed for every token."""
        cache, mixed = None, bool(arch) and isinstance(arch["n_layer"], torch.Tensor)
        for _ in range(max_new_tokens):
            if idx.size(1) <= self.config.block_size and not mixed:
                new = idx if cache is None else idx[:, -1:]
                cache = cache or [{} for _ in self.transformer.h]
                logits, _ = self(new, arch=arch, cache=cache)
            else:
                logits, _ = self(idx[:, -self.config.block_size:], arch=arch)
            logits = logits[:, -1, :vocab_size].float()
            if top_k is not None:
                kth = logits.topk(min(top_k, logits.size(-1))).values[:, [-1]]
                logits = logits.masked_fill(logits < kth, -math.inf)
            if temperature < 1e-30: # 0, or so small that float32 cannot divide by it
                idx_next = logits.argmax(-1, keepdim=True)
            else:
                probs = F.softmax(logits / temperature, dim=-1)
                idx_next = torch.multinomial(probs, 1, generator=generator)
            idx = torch.cat((idx, idx_next), dim=1)
            if until is not None and until(idx):
                break
        return idx


def build(config, arch=None):
    """A GPT from a dict with GPTConfig's keys. arch: that of a stand-alone network."""
    known = {field.name for field in fields(GPTConfig)}
    return GPT(GPTConfig(**{key: value for key, value in config.items() if key in known}), arch)
