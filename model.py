"""
A GPT, after nanoGPT, whose sizes may be lists: n_layer, n_head, n_embd and mlp_ratio.

    build({"n_embd": 384})              one network, with nanoGPT's parameter names
    build({"n_embd": [192, 288, 384]})  a supernet that holds all three, with shared weights
    net(x, y, weights)                  a mixture of all its networks, differentiable in the weights
    net(x, y, arch)                     one of them, by slicing, at its own cost
    net.extract(arch)                   the same as a network of its own

To read a plain GPT, skip the arguments e, n_head and mlp_ratio of every forward(): they say how
much of a layer is in use, and by default it is all of it.

Attention heads follow one of two conventions:
    head_size=0   GPT-2's: every head has n_embd / n_head channels. With h heads, head j owns the
                  channels from j*E/h on (E the largest n_embd), and a width e uses the first e/h.
    head_size=64  fixed: n_head heads of 64 channels, whatever n_embd is; fewer are the first ones.
"""
import itertools
import math
from dataclasses import dataclass, fields
from functools import partial

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from configurator import ConfigError, check_range
from fused_ops import causal_attention, mixed_attention, mixed_rotary_attention, rotary
from supernet import (
    ALL, Embedding, LayerNorm, Linear, RMSNorm, Sinusoidal, Size, check_arch, extract, one_hot,
    prefix_masks, run_blocks, straight_through, transformer_choices, transformer_sizes,
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
    dropout: float = 0.0
    bias: bool = True # in Linears and LayerNorms, as in GPT-2; False is a bit better and faster
    norm: str = "layernorm" # a key of NORMS
    prmsnorm_pct: float = 0.0625 # partial_rmsnorm: the share of the channels that its RMS is of
    position: str = "learned" # a key of POSITIONS
    activation: str = "gelu" # a key of ACTIVATIONS
    residual: str = "pre" # one of RESIDUALS
    n_expert: int = 0 # MLPs a layer; each token goes through top_k of them
    top_k: int = 2
    router_aux_loss_coef: float = 0.1 # weight of the loss for an uneven use of the experts
    loss_chunk: int = 0 # tokens whose logits the loss computes at a time, to save memory; 0: all


NORMS = {
    "layernorm": lambda n, config: LayerNorm(n, bias=config.bias), # Ba et al. 2016
    "rmsnorm": lambda n, config: RMSNorm(n), # neither mean nor bias (Zhang & Sennrich 2019)
    "partial_rmsnorm": lambda n, config: RMSNorm(n, config.prmsnorm_pct), # in the same paper
}
POSITIONS = {
    "learned": Embedding, # GPT-2
    "sinusoidal": lambda block_size, n: Sinusoidal(n), # Vaswani et al. 2017
    "rope": lambda block_size, n: None, # attention rotates queries and keys (Su et al. 2021)
}
GELU = partial(F.gelu, approximate="tanh") # Hendrycks & Gimpel 2016, as in GPT-2
GATED = {"geglu": GELU, "swiglu": F.silu, "reglu": F.relu} # act(W x) * (V x) (Shazeer 2020)
ACTIVATIONS = {"gelu": GELU, "exact_gelu": F.gelu, "relu": F.relu,
               "silu": F.silu, "mish": F.mish, **GATED} # Elfwing et al. 2017, Misra 2019
RESIDUALS = ("pre", "post", "branch", "parallel") # where the norms stand, see Block
OPTIONS = {"norm": NORMS, "prmsnorm_pct": (), "position": POSITIONS, "activation": ACTIVATIONS,
           "residual": RESIDUALS} # what a block is made of, beside its sizes


class CausalSelfAttention(nn.Module):
    def __init__(self, config, n_embd, n_head):
        """n_embd, n_head: their options, of a plain network one of each."""
        super().__init__()
        self.n_embd, self.n_head, self.head_size = n_embd, n_head, config.head_size
        self.dropout, self.rope = config.dropout, config.position == "rope"
        for e, h in itertools.product(n_embd, n_head):
            size = self.head_size or e // h
            if not self.head_size and e % h:
                raise ConfigError(f"n_embd={e} is not divisible by n_head={h}: choose widths and "
                                  "head counts that divide.")
            if self.rope and size % 2:
                raise ConfigError(f"position='rope' needs heads of an even size, but n_embd={e}, "
                                  f"n_head={h} and head_size={self.head_size} make {size}.")
        inner = n_head[-1] * config.head_size or n_embd[-1]
        self.c_attn = Linear(n_embd[-1], 3 * inner, bias=config.bias) # query, key, value
        self.c_proj = Linear(inner, n_embd[-1], bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        # for a mixture, of each head count: the channels in use, and 1 / sqrt of the head size
        if config.head_size:
            mask = prefix_masks([h * config.head_size for h in n_head], inner) # (n_head, inner)
            scale = torch.full((1, inner), config.head_size ** -0.5)
        else: # (n_head, n_embd, inner)
            mask = torch.stack([prefix_masks(n_embd, inner, groups=h) for h in n_head])
            scale = torch.tensor([[(e / h) ** -0.5 for e in n_embd] for h in n_head])
            scale = mask * scale.unsqueeze(-1)
        self.register_buffer("mask", mask, persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, x, e=None, n_head=ALL, cache=None):
        """x: (B, T, n_embd) -> the same. cache: {"k", "v"} of the tokens before, for generate()."""
        if n_head.is_mixture:
            return self.mixture(x, e, n_head.weights)
        h, weight = n_head.option or self.n_head[-1], n_head.weight
        n = h * self.head_size or (e.n if e else self.n_embd[-1])
        groups = 1 if self.head_size else h
        plain = e is None and n_head.option is None
        qkv = self.c_attn(x, e, None if plain else Size(3 * n, 3 * groups))
        if self.rope:
            qkv = rotary(qkv, h, past=cache["k"].size(1) if cache else 0)
        q, k, v = qkv.chunk(3, dim=2) # (B, T, n)
        if cache is not None:
            if cache:
                k, v = torch.cat((cache["k"], k), 1), torch.cat((cache["v"], v), 1)
            cache.update(k=k, v=v)
        if weight is not None and not self.head_size: # as often as in the mixture below
            q = straight_through(q, e.p if self.rope else e.p * e.p)
            weight = weight * e.p * e.p
        is_causal = cache is None or q.size(1) == k.size(1) # one new token sees the whole cache
        dropout = self.dropout if self.training else 0.0
        y = straight_through(causal_attention(q, k, v, h, dropout, is_causal=is_causal), weight)
        return self.resid_dropout(self.c_proj(y, None if plain else Size(n, groups), e))

    def mixture(self, x, e, a):
        """a: (n_head,) weights. Every head count attends in its own layout, at its true head size.

        The width is mixed once by each projection: in the rows of query, key and value, and in the
        columns of c_proj. Masks are linear in what they multiply, so the key's moves onto the query
        and the value's behind the attention. Heads of a fixed size are nested: one attention, whose
        head i is multiplied by S(i).
        """
        qkv, dropout = self.c_attn(x, e), self.dropout if self.training else 0.0 # (B, T, 3 inner)
        if self.head_size:
            qkv = rotary(qkv, self.n_head[-1]) if self.rope else qkv
            y_scale = (a @ self.mask).unsqueeze(0)
            y = mixed_attention(qkv, self.scale, y_scale, self.n_head[-1:], dropout)
        else:
            S, scale = e.p @ self.mask, e.p @ self.scale # (n_head, inner)
            y_scale = a.unsqueeze(-1) * S * S
            if self.rope:
                y = mixed_rotary_attention(qkv, self.n_embd, e.p, y_scale, self.n_head, dropout)
            else:
                y = mixed_attention(qkv, S * scale, y_scale, self.n_head, dropout)
        return self.resid_dropout(self.c_proj(y, None, e))


class MLP(nn.Module):
    def __init__(self, config, n_embd, mlp_ratio):
        """n_embd, mlp_ratio: their options, of a plain network one of each."""
        super().__init__()
        self.n_embd, self.mlp_ratio = n_embd, mlp_ratio
        n_hidden = [[int(m * e) for m in mlp_ratio] for e in n_embd] # (n_embd, mlp_ratio)
        N = n_hidden[-1][-1] # of the largest network
        if n_hidden[0][0] < 1:
            raise ConfigError(f"mlp_ratio={mlp_ratio[0]} of n_embd={n_embd[0]} is less than one "
                              "neuron: choose a larger one.")
        self.act, self.gated = ACTIVATIONS[config.activation], config.activation in GATED
        self.c_fc = Linear(n_embd[-1], (1 + self.gated) * N, bias=config.bias)
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
        n = int((mlp_ratio.option or self.mlp_ratio[-1]) * (e.n if e else self.n_embd[-1]))
        return Size(n, mask=mlp_ratio.weight, p=e.p if e else None)

    def forward(self, x, e=None, mlp_ratio=ALL):
        """x: (..., n_embd) -> the same."""
        hidden = self.hidden(e, mlp_ratio)
        if self.gated:
            gate, x = self.c_fc(x, e, hidden and hidden.doubled).chunk(2, dim=-1)
            x = self.act(gate) * x
        else:
            x = self.act(self.c_fc(x, e, hidden))
        return self.dropout(self.c_proj(x, hidden, e))


class MoE(nn.Module):
    """Every token through top_k of n_expert MLPs, their outputs weighted by the softmax of their
    logits (Shazeer et al. 2017).

    In training the logits are noisy, and aux_loss is CV(importance)^2 + CV(load)^2. CV is the
    standard deviation over the mean. An expert's importance is the sum of its weights; its load the
    expected number of tokens if its noise were drawn again, sum Phi((clean - threshold) / scale).
    """
    def __init__(self, config, n_embd, mlp_ratio):
        super().__init__()
        self.top_k, n = config.top_k, config.n_expert
        self.experts = nn.ModuleList([MLP(config, n_embd, mlp_ratio) for _ in range(n)])
        self.router = Linear(n_embd[-1], 2 * n, bias=False) # clean logits, and their noise's scale

    def forward(self, x, e=None, mlp_ratio=ALL):
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
            out = expert(tokens[rows], e, mlp_ratio) * gates[rows, i, None]
            y = y.index_add(0, rows, out.to(y.dtype))
        return y.view_as(x)


class Block(nn.Module):
    def __init__(self, config, n_embd, n_head, mlp_ratio):
        super().__init__()
        self.residual = config.residual
        self.ln_1 = NORMS[config.norm](n_embd[-1], config)
        self.attn = CausalSelfAttention(config, n_embd, n_head)
        if config.residual != "parallel":
            self.ln_2 = NORMS[config.norm](n_embd[-1], config)
        self.mlp = (MoE if config.n_expert else MLP)(config, n_embd, mlp_ratio)

    def forward(self, x, e=None, n_head=ALL, mlp_ratio=ALL, cache=None):
        if self.residual == "pre": # GPT-2
            x = x + self.attn(self.ln_1(x, e), e, n_head, cache)
            return x + self.mlp(self.ln_2(x, e), e, mlp_ratio)
        if self.residual == "post": # Vaswani et al. 2017
            x = self.ln_1(x + self.attn(x, e, n_head, cache), e)
            return self.ln_2(x + self.mlp(x, e, mlp_ratio), e)
        if self.residual == "branch": # Swin V2 (Liu et al. 2022)
            x = x + self.ln_1(self.attn(x, e, n_head, cache), e)
            return x + self.ln_2(self.mlp(x, e, mlp_ratio), e)
        y = self.ln_1(x, e) # parallel: GPT-J (Wang & Komatsuzaki 2021)
        return x + self.attn(y, e, n_head, cache) + self.mlp(y, e, mlp_ratio)


def compiled(function):
    """function(x, e, ...) compiled with symbols for the sizes; with numbers for mixtures, whose
    sizes never change. They need half as many kernels, and Triton 3.6 fails on one with symbols, in
    the backward pass of mixed_norm() (triton-lang/triton issue 8257)."""
    symbols, numbers = (torch.compile(function, dynamic=dynamic) for dynamic in (True, False))
    return lambda x, e, *args: (numbers if e and e.is_mixture else symbols)(x, e, *args)


class GPT(nn.Module):
    has_plain_kernels = False # only its mixtures have kernels in fused_ops.cpp

    def __init__(self, config, arch=None):
        """config: GPTConfig. arch: the sizes of a stand-alone network, where config has lists."""
        super().__init__()
        self.config = config
        self.n_layer, self.n_embd, layers = transformer_choices(self, config, arch)
        self.check_config()
        E = self.n_embd[-1]
        self.transformer = nn.ModuleDict(dict(
            wte=Embedding(config.vocab_size, E),
            wpe=POSITIONS[config.position](config.block_size, E),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList([Block(config, self.n_embd, *layer) for layer in layers]),
            ln_f=NORMS[config.norm](E, config),
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

    def check_config(self):
        """Raises ConfigError if a key of the blocks has a value that it cannot have."""
        c = self.config
        for name, allowed in OPTIONS.items():
            if allowed and (value := getattr(c, name)) not in list(allowed):
                raise ConfigError(f"{name}={value!r} is not one of {', '.join(allowed)}.")
        check_range(c, 0, "head_size", "loss_chunk", "router_aux_loss_coef")
        check_range(c, 0, "dropout", below=1)
        if not 0 < c.prmsnorm_pct <= 1:
            raise ConfigError(f"prmsnorm_pct={c.prmsnorm_pct} must be above 0 and at most 1, such "
                              "as 0.0625.")
        if c.n_expert < 0 or (c.n_expert and not 0 < c.top_k < c.n_expert):
            raise ConfigError(f"n_expert={c.n_expert} must be 0 or above top_k={c.top_k}, and "
                              "top_k at least 1.")
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
        T, past = idx.size(1), cache[0]["k"].size(1) if cache and cache[0] else 0
        block_size = self.config.block_size
        assert past + T <= block_size, f"{past + T} tokens, but block_size is {block_size}"
        e, n_layer, layers = transformer_sizes(self, arch)
        pos = torch.arange(past, past + T, device=idx.device)
        x = self.transformer.wte(idx, e) # (B, T, n_embd)
        if self.config.position != "rope":
            x = x + self.transformer.wpe(pos, e)
        x = self.transformer.drop(x)
        args = [(e, *layer, cache[i] if cache else None) for i, layer in enumerate(layers)]
        x = run_blocks(self.transformer.h, x, n_layer, args)
        logits, loss = self.head(x, e, targets)
        if loss is not None and self.config.n_expert and self.training:
            aux_loss = sum(block.mlp.aux_loss for block in self.transformer.h)
            loss = loss + self.config.router_aux_loss_coef * aux_loss
        return logits, loss

    def head(self, x, e, targets):
        """(logits, loss) of the last block's output, as forward() returns them."""
        x = self.transformer.ln_f(x, e)
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
        """{"params", "flops"} of an architecture: whole numbers; of weights: the differentiable
        expectations, in float64.

        flops: of one forward pass over block_size tokens, 2 a multiply-add in a matrix product,
        with all scores of attention; of n_expert MLPs the params of all and the flops of top_k.
        """
        c, T = self.config, self.config.block_size
        e = torch.tensor(self.n_embd, dtype=torch.float64) # (n_embd,)
        bias, gated = int(c.bias), c.activation in GATED
        norm = (1 + (c.bias and c.norm == "layernorm")) * e # parameters of one
        norms = 1 if c.residual == "parallel" else 2 # of a block
        n_expert, top_k = (c.n_expert, c.top_k) if c.n_expert else (1, 1)
        params = c.vocab_size * e + (c.position == "learned") * T * e + norm # wte, wpe, ln_f
        flops = 2 * T * c.vocab_size * e # lm_head
        weights = self.expectation(arch)
        layers = zip(self.transformer.h, weights["n_head"], weights["mlp_ratio"], strict=True)
        for i, (block, heads, ratios) in enumerate(layers):
            # the chance that this layer runs
            used = sum(weights["n_layer"][k] for k, n in enumerate(self.n_layer) if n > i)
            options = (block.mlp.experts[0] if c.n_expert else block.mlp).mlp_ratio
            hidden = torch.tensor([[int(r * n) for r in options] for n in self.n_embd])
            hidden = hidden.double() @ ratios # (n_embd,)
            n_head = torch.tensor(block.attn.n_head).double() @ heads
            inner = c.head_size * n_head if c.head_size else e
            attention, router = 4 * inner * e, 2 * c.n_expert * e # the entries of the matrices
            mlp, mlp_bias = (2 + gated) * hidden * e, bias * ((1 + gated) * hidden + e)
            of_layer = norms * norm + attention + bias * (3 * inner + e) + router
            params = params + used * (of_layer + n_expert * (mlp + mlp_bias))
            flops = flops + used * 2 * T * (attention + top_k * mlp + router + 2 * T * inner)
        cost = {"params": weights["n_embd"] @ params, "flops": weights["n_embd"] @ flops}
        if arch and isinstance(arch["n_layer"], torch.Tensor):
            return cost
        return {name: round(value.item()) for name, value in cost.items()}

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
                 vocab_size=None):
        """idx: (B, T) -> (B, T + max_new_tokens). temperature=0 takes the likeliest token; ids from
        vocab_size on are never drawn. Keys and values are cached until block_size is full; from
        then on, and for a mixture always, the whole window is computed for every token."""
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
        return idx


def build(config, arch=None):
    """A GPT from a dict with GPTConfig's keys. arch: that of a stand-alone network."""
    known = {field.name for field in fields(GPTConfig)}
    return GPT(GPTConfig(**{key: value for key, value in config.items() if key in known}), arch)
