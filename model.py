"""
A GPT, after nanoGPT, whose sizes may be lists: n_layer, n_head, n_embd and mlp_ratio.

    build({"n_embd": 384})                  one network, with nanoGPT's parameter names
    build({"n_embd": [192, 288, 384]})      a supernet that holds all three, with shared weights
    net(x, y, weights)                      a mixture of all its networks, differentiable in the weights
    net(x, y, arch)                         one of them, by slicing, at its own cost
    net(x, y, picked(net.choices, weights)) the same, differentiable in the weights of what was picked
    net.extract(arch)                       the same as a network of its own

Attention heads follow one of two conventions:
    head_size=0     GPT-2's: every head has n_embd / n_head channels. The supernet nests the layouts: with h heads, head j
                    owns the channels from j*E/h on (E the largest n_embd), of which a width e uses the first e/h.
    head_size=64    fixed: n_head heads of 64 channels each, whatever n_embd is; fewer heads are the first ones.
"""
import math
from dataclasses import dataclass, fields
from functools import partial

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from configurator import check_range
from fused_ops import causal_attention, mixed_attention
from supernet import Choice, Embedding, LayerNorm, Linear, RMSNorm, Sinusoidal, Size, check_arch
from supernet import extract, one_hot, options_of, prefix_masks, ranking, reorder, size_of, straight_through
from supernet import take


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
    prmsnorm_pct: float = 0.0625 # of partial_rmsnorm: the share of the channels, the first ones, that its RMS is estimated from
    position: str = "learned" # a key of POSITIONS
    activation: str = "gelu" # a key of ACTIVATIONS
    residual: str = "pre" # a key of RESIDUALS
    n_expert: int = 0 # MLPs a layer; each token goes through top_k of them (noisy top-k gating, Shazeer et al. 2017)
    top_k: int = 2
    router_aux_loss_coef: float = 0.1 # what the uneven use of the experts adds to the training loss
    loss_chunk: int = 0 # tokens whose logits the loss holds at a time, and computes again in its backward pass; 0: all


NORMS = {"layernorm": lambda n, config: LayerNorm(n, bias=config.bias), # Ba et al. 2016
         "rmsnorm": lambda n, config: RMSNorm(n), # neither mean nor bias (Zhang & Sennrich 2019)
         "partial_rmsnorm": lambda n, config: RMSNorm(n, config.prmsnorm_pct)} # the same paper's pRMSNorm
POSITIONS = {"learned": Embedding, # GPT-2
             "sinusoidal": lambda block_size, n: Sinusoidal(n), # Vaswani et al. 2017
             "rope": lambda block_size, n: None} # queries and keys turn with their positions (Su et al. 2021)
GELU = partial(F.gelu, approximate="tanh") # Hendrycks & Gimpel 2016, as in GPT-2; silu: Elfwing et al. 2017, mish: Misra 2019
GATED = {"geglu": GELU, "swiglu": F.silu, "reglu": F.relu} # act(W x) * (V x), each of mlp_ratio * n_embd channels (Shazeer 2020)
ACTIVATIONS = {"gelu": GELU, "exact_gelu": F.gelu, "relu": F.relu, "silu": F.silu, "mish": F.mish, **GATED}
RESIDUALS = ("pre", "post", "branch", "parallel") # where the norms stand, see Block
OPTIONS = {"norm": NORMS, "prmsnorm_pct": (), "position": POSITIONS, "activation": ACTIVATIONS, "residual": RESIDUALS} # of a network


class CausalSelfAttention(nn.Module):

    def __init__(self, config, n_embd, n_head):
        super().__init__()
        self.n_embd, self.n_head, self.head_size, self.dropout = n_embd, n_head, config.head_size, config.dropout
        self.rope = config.position == "rope"
        inner = n_head[-1] * config.head_size or n_embd[-1]
        self.c_attn = Linear(n_embd[-1], 3 * inner, bias=config.bias) # query, key, value
        self.c_proj = Linear(inner, n_embd[-1], bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        # what a mixture multiplies with, for each head count j: the channels that each width uses, and 1/sqrt of its head size
        if config.head_size:
            mask = prefix_masks([h * config.head_size for h in n_head], inner) # (n_head, inner)
            scale = torch.full((1, inner), config.head_size ** -0.5)
        else:
            mask = torch.stack([prefix_masks(n_embd, inner, groups=h) for h in n_head]) # (n_head, n_embd, inner)
            scale = mask * torch.tensor([[(e / h) ** -0.5 for e in n_embd] for h in n_head]).unsqueeze(-1)
        self.register_buffer("mask", mask, persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, x, e=None, n_head=None, cache=None):
        if isinstance(n_head, torch.Tensor):
            return self.mixture(x, e, n_head)
        h, a = n_head if isinstance(n_head, tuple) else (n_head or self.n_head[-1], None)
        n = h * self.head_size or (self.n_embd[-1] if e is None else e.n)
        groups = 1 if self.head_size else h
        plain = e is None and n_head is None
        qkv = self.c_attn(x, e, None if plain else Size(3 * n, 3 * groups))
        if self.rope:
            qkv = rotary(qkv, h, past=cache["k"].size(1) if cache else 0)
        q, k, v = qkv.chunk(3, dim=2) # (B, T, n)
        if cache is not None: # of generate(): the keys and values of all tokens before these
            k, v = (torch.cat((cache[name], new), 1) if cache else new for name, new in (("k", k), ("v", v)))
            cache.update(k=k, v=v)
        if a is not None and not self.head_size: # the weights as in the mixture below
            q, a = straight_through(q, e.p if self.rope else e.p * e.p), a * e.p * e.p
        is_causal = cache is None or q.size(1) == k.size(1) # one new token sees the whole cache
        y = straight_through(causal_attention(q, k, v, h, self.dropout if self.training else 0.0, is_causal=is_causal), a)
        return self.resid_dropout(self.c_proj(y, None if plain else Size(n, groups), e))

    def heads(self):
        """What can be ordered here, each as a function like MLP.neurons(): the heads, or with head_size 0 the channels inside each."""
        h = self.n_head[-1]

        def parts(of):
            """[(3, head, channel, ...)] of query, key and value, and (head, channel, n_embd) of what reads them"""
            return [of(p).unflatten(0, (3, h, -1)) for p in self.c_attn.parameters()], of(self.c_proj.weight).T.unflatten(0, (h, -1))

        def whole(of):
            qkv, read = parts(of)
            return [*(t.transpose(0, 1) for t in qkv), read]

        def values(of, i):
            qkv, read = parts(of)
            return [*(t[2, i] for t in qkv), read[i]]

        def keys(of, i):
            return [t[:2, i].transpose(0, 1) for t in parts(of)[0]]
        if self.head_size:
            return [whole]
        return [partial(f, i=i) for i in range(h) for f in (values, keys)[:1 if self.rope else 2]]

    def mixture(self, x, e, a):
        """a: (n_head,) weights. Every head count attends in its own layout, with the scale of its true head size.

        The width is mixed once by each projection: in the rows of query, key and value, and in the columns of c_proj.
        Masks are linear in what they multiply, so the key's moves onto the query and the value's behind the attention.
        Heads of a fixed size are nested: one attention, head i times S(i).
        """
        qkv, dropout = self.c_attn(x, e), self.dropout if self.training else 0.0 # (B, T, 3 inner)
        if self.head_size:
            qkv = rotary(qkv, self.n_head[-1]) if self.rope else qkv
            y = mixed_attention(qkv, self.scale, (a @ self.mask).unsqueeze(0), self.n_head[-1:], dropout)
        else:
            S, scale = e.p @ self.mask, e.p @ self.scale # (n_head, inner)
            y_scale = a.unsqueeze(-1) * S * S
            y = mixed_rotary_attention(qkv, self.n_embd, e.p, y_scale, self.n_head, dropout) if self.rope else \
                mixed_attention(qkv, S * scale, y_scale, self.n_head, dropout)
        return self.resid_dropout(self.c_proj(y, None, e))


class MLP(nn.Module):

    def __init__(self, config, n_embd, mlp_ratio):
        super().__init__()
        self.n_embd, self.mlp_ratio = n_embd, mlp_ratio
        n_hidden = [[int(m * e) for m in mlp_ratio] for e in n_embd] # (n_embd, mlp_ratio)
        if n_hidden[0][0] < 1:
            raise SystemExit(f"mlp_ratio={mlp_ratio[0]} of n_embd={n_embd[0]} is less than one neuron: choose a larger one.")
        self.act, self.gated = ACTIVATIONS[config.activation], config.activation in GATED
        self.c_fc = Linear(n_embd[-1], (1 + self.gated) * n_hidden[-1][-1], bias=config.bias)
        self.c_proj = Linear(n_hidden[-1][-1], n_embd[-1], bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        self.register_buffer("mask", prefix_masks(n_hidden, n_hidden[-1][-1]), persistent=False) # (n_embd, mlp_ratio, hidden)
        self.n_hidden = tuple(sorted({n for row in n_hidden for n in row}))
        self.register_buffer("last", torch.tensor(self.n_hidden) - 1, persistent=False)

    def neurons(self, of):
        """of(parameter), for those with hidden neurons, each as (neuron, ...)."""
        return [*(of(p).unflatten(0, (1 + self.gated, -1)).transpose(0, 1) for p in self.c_fc.parameters()), of(self.c_proj.weight).T]

    def hidden(self, e, m):
        """The Size of the hidden dimension, n_embd * mlp_ratio."""
        if isinstance(m, torch.Tensor):
            return Size(self.n_hidden, mask=torch.einsum("m,emh->eh", m, self.mask), p=e.p, last=self.last)
        if m is None and e is None:
            return None
        m, weight = m if isinstance(m, tuple) else (m or self.mlp_ratio[-1], None)
        return Size(int(m * (self.n_embd[-1] if e is None else e.n)), mask=weight, p=None if e is None else e.p)

    def forward(self, x, e=None, mlp_ratio=None):
        hidden = self.hidden(e, mlp_ratio)
        if self.gated:
            gate, x = self.c_fc(x, e, hidden and hidden.twice).chunk(2, dim=-1)
            x = self.act(gate) * x
        else:
            x = self.act(self.c_fc(x, e, hidden))
        return self.dropout(self.c_proj(x, hidden, e))


class MoE(nn.Module):
    """Every token through top_k of n_expert MLPs, their outputs weighted by the softmax of their logits (Shazeer et al. 2017).

    In training the logits are noisy and aux_loss is CV(importance)^2 + CV(load)^2, with CV the standard deviation over the mean of the
    experts' summed weights, and of their expected numbers of tokens if the noise were drawn anew: P = Phi((clean - threshold) / scale).
    """
    def __init__(self, config, n_embd, mlp_ratio):
        super().__init__()
        self.top_k = config.top_k
        self.experts = nn.ModuleList([MLP(config, n_embd, mlp_ratio) for _ in range(config.n_expert)])
        self.router = Linear(n_embd[-1], 2 * config.n_expert, bias=False) # clean logits, and the scale of their noise

    def forward(self, x, e=None, mlp_ratio=None):
        tokens = x.flatten(0, 1) # (B * T, n_embd)
        clean, scale = self.router(tokens, e).float().chunk(2, dim=-1) # (B * T, n_expert)
        scale = F.softplus(scale)
        logits = clean + torch.randn_like(clean) * scale if self.training else clean
        top, chosen = logits.topk(self.top_k + 1)
        gates = torch.zeros_like(logits).scatter(1, chosen[:, :-1], top[:, :-1].softmax(-1))
        if self.training:
            threshold = torch.where(logits > top[:, [-1]], top[:, [-1]], top[:, [-2]]) # the k-th largest of the others
            load = torch.special.ndtr((clean - threshold) / scale)
            self.aux_loss = sum(t.var(correction=0) / t.mean().square() for t in (gates.sum(0), load.sum(0)))
        y = torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            rows = (chosen[:, :-1] == i).any(1).nonzero().squeeze(1)
            y = y.index_add(0, rows, (expert(tokens[rows], e, mlp_ratio) * gates[rows, i, None]).to(y.dtype))
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

    def forward(self, x, e=None, n_head=None, mlp_ratio=None, cache=None):
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


def check_options(config):
    """SystemExit if an option of the blocks is none of those there are."""
    for name, allowed in OPTIONS.items():
        if allowed and getattr(config, name) not in list(allowed):
            raise SystemExit(f"{name}={getattr(config, name)!r} is not one of {', '.join(allowed)}.")
    if config.n_expert < 0 or (config.n_expert and not 0 < config.top_k < config.n_expert):
        raise SystemExit(f"n_expert={config.n_expert} must be 0, or above top_k={config.top_k}, which must be at least 1.")
    if not 0 < config.prmsnorm_pct <= 1:
        raise SystemExit(f"prmsnorm_pct={config.prmsnorm_pct} must be above 0 and at most 1: the share of the channels, such as 0.0625.")
    check_range(config, 0, "head_size", "loss_chunk", "router_aux_loss_coef")
    check_range(config, 0, "dropout", below=1)


SIZES = ("n_layer", "n_embd", "n_head", "mlp_ratio") # of a transformer; the last two of every layer


def transformer_choices(config, arch=None):
    """(choices, the options of n_layer, of n_embd, and [(of n_head, of mlp_ratio) of every layer]); of an architecture of that config,
    which leaves nothing to choose, if there is one."""
    options = {name: options_of(getattr(config, name), name, whole=name != "mlp_ratio") for name in SIZES}
    L = options["n_layer"][-1]
    choices = {name: Choice(options[name]) for name in SIZES[:2]}
    choices |= {name: Choice(options[name], repeat=L, depth="n_layer") for name in SIZES[2:]}
    if arch is None:
        return choices, options["n_layer"], options["n_embd"], [tuple(options[name] for name in SIZES[2:])] * L
    arch = check_arch(choices, arch)
    return {}, (arch["n_layer"],), (arch["n_embd"],), [((h,), (m,)) for h, m in zip(arch["n_head"], arch["mlp_ratio"], strict=True)]


def mixture_sizes(net, arch, L):
    """(the Size of n_embd, n_layer, [(n_head, mlp_ratio) of every layer]) of an architecture, of weights, or, arch None, of a network
    without choices, whose L layers know their own."""
    if arch is None:
        open_choices = {name: list(c.options) for name, c in net.choices.items() if len(c.options) > 1}
        assert not open_choices, f"a supernet needs weights or an architecture as its third argument: it has {open_choices}"
        return None, L, [(None, None)] * L
    layers = list(zip(arch["n_head"], arch["mlp_ratio"], strict=False))
    return size_of(arch["n_embd"], net.n_embd, net.mask, net.last), arch["n_layer"], layers


def run_blocks(blocks, x, n_layer, depths, args):
    """x behind n_layer of the blocks, called with their args; n_layer is one of the depths, or says how they mix:

    weights p (len(depths),): sum_d p_d x_d, x_d the output of the d-th block.
    (a depth, p): the same for a p that is 1 there and 0 elsewhere. The norm that follows hides the scale of what was picked, so the
    other depths must have gradients too, or none would learn: the blocks behind the depth run forward alone.
    """
    mixed = isinstance(n_layer, torch.Tensor)
    depth, p = (depths[-1], n_layer) if mixed else n_layer if isinstance(n_layer, tuple) else (n_layer, None)
    if p is None:
        for block, arg in zip(blocks[:depth], args, strict=False):
            x = block(x, *arg)
        return x
    out, deeper = 0, x
    for i, (block, arg) in enumerate(zip(blocks, args, strict=True), 1):
        with torch.set_grad_enabled(torch.is_grad_enabled() and i <= depth):
            deeper = block(deeper, *arg)
        if i == depth:
            x = deeper
        if i in depths:
            weight = p[depths.index(i)]
            out = out + (deeper * weight if mixed else deeper.detach() * (weight - weight.detach()))
    return out if mixed else x + out


def compiled(function):
    """function(x, e, ...) compiled with the sizes as symbols; for mixtures, whose sizes never change, as numbers: half as many kernels,
    and Triton 3.6 fails on one with symbols, in the backward pass of mixed_norm() (triton-lang/triton issue 8257)."""
    symbols, numbers = (torch.compile(function, dynamic=dynamic) for dynamic in (True, False))
    return lambda x, e, *args: (numbers if e is not None and e.mixed else symbols)(x, e, *args)


class GPT(nn.Module):
    has_plain_kernels = False # only its mixtures have kernels in fused_ops.cpp

    def __init__(self, config, arch=None):
        """config: GPTConfig. arch: the sizes of a stand-alone network, where config has lists."""
        super().__init__()
        self.config = config
        check_options(config)
        self.choices, self.n_layer, self.n_embd, layers = transformer_choices(config, arch)
        if config.n_expert and any(len(c.options) > 1 for c in self.choices.values()):
            raise SystemExit(f"n_expert={config.n_expert} is for fixed sizes, without lists: a mixture of networks would route its tokens "
                             "as none of them does.")
        for e in self.n_embd:
            for h in sorted({h for n_head, _ in layers for h in n_head}):
                if not config.head_size and e % h:
                    raise SystemExit(f"n_embd={e} is not divisible by n_head={h}: choose widths and head counts that "
                                     "divide, or heads of a fixed size with head_size.")
                if config.position == "rope" and (config.head_size or e // h) % 2:
                    raise SystemExit(f"position='rope' turns pairs of channels: a head's, {config.head_size or e // h} of n_embd={e} with "
                                     f"n_head={h} and head_size={config.head_size}, must be an even number.")
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
        self.register_buffer("mask", prefix_masks(self.n_embd, E), persistent=False) # (n_embd, E)
        self.register_buffer("last", torch.tensor(self.n_embd) - 1, persistent=False)

        self.apply(self._init_weights)
        for name, p in self.named_parameters(): # scaled init of the residual projections, per the GPT-2 paper
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, mean=0.0, std=0.02 / math.sqrt(2 * len(layers)))

    def _init_weights(self, module):
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, idx, targets=None, arch=None, cache=None):
        """idx, targets: (B, T) token ids -> logits (B, T, vocab_size), or None with loss_chunk, loss. Without targets: logits
        (B, 1, vocab_size) of the last position, None. arch: None for a network without choices, else an architecture, or weights
        for a mixture. targets of -1 are ignored."""
        T, past = idx.size(1), cache[0]["k"].size(1) if cache and cache[0] else 0
        assert past + T <= self.config.block_size, f"{past + T} tokens, but block_size is {self.config.block_size}"
        e, n_layer, layers = mixture_sizes(self, arch, len(self.transformer.h))
        pos = torch.arange(past, past + T, device=idx.device)
        x = self.transformer.wte(idx, e) # (B, T, n_embd)
        if self.config.position != "rope":
            x = x + self.transformer.wpe(pos, e)
        x = self.transformer.drop(x)
        x = run_blocks(self.transformer.h, x, n_layer, self.n_layer,
                       [(e, *layer, cache[i] if cache else None) for i, layer in enumerate(layers)])
        logits, loss = self.head(x, e, targets)
        if loss is not None and self.config.n_expert and self.training:
            loss = loss + self.config.router_aux_loss_coef * sum(block.mlp.aux_loss for block in self.transformer.h)
        return logits, loss

    def head(self, x, e, targets):
        x = self.transformer.ln_f(x, e)
        if targets is None:
            return self.lm_head(x[:, [-1], :], e), None
        if self.config.loss_chunk:
            return None, self.chunked_loss(x, e, targets)
        logits = self.lm_head(x, e)
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1), ignore_index=-1)

    def chunked_loss(self, x, e, targets):
        """The cross-entropy of head(), from the logits of loss_chunk tokens at a time."""
        def loss(x, y):
            return F.cross_entropy(self.lm_head(x, e), y, ignore_index=-1, reduction="sum")
        chunks = zip(x.flatten(0, 1).split(self.config.loss_chunk), targets.flatten().split(self.config.loss_chunk), strict=True)
        total = sum(checkpoint(loss, x, y, use_reentrant=False, preserve_rng_state=False) for x, y in chunks)
        return total / (targets != -1).sum()

    def compile_parts(self):
        """Compiles what all layers and all architectures share: one block and the head. Any number of architectures then needs no
        more than a few graphs: for mixtures, for full and part widths, with and without gradients."""
        torch._dynamo.config.recompile_limit = 32
        # its keys leave out for which sizes a graph is right, and another run gets wrong numbers (pytorch/pytorch issue 194001)
        torch._functorch.config.enable_autograd_cache = False
        for block in self.transformer.h:
            block.forward = compiled(block.forward)
        self.head = compiled(self.head)
        return self

    def extract(self, arch):
        """The stand-alone network of an architecture, with the weights it has here."""
        arch = check_arch(self.choices, arch)
        small = GPT(self.config, arch).to(self.lm_head.weight.device)
        one = torch.zeros(1, 1, dtype=torch.long, device=self.lm_head.weight.device)
        return extract(self, small, lambda: self(one, one, arch))

    @torch.no_grad()
    def sort(self, score):
        """Orders neurons, heads and channels by importance, the largest first, so that a smaller option keeps what matters most; the
        largest network computes what it did. score: a parameter -> how much each of its entries matters, (the parameter's shape).

        neurons     of every MLP
        heads       of a fixed head_size. Else all head counts use all channels, and what a smaller n_embd cuts off are the last channels
                    of every head of the largest count: those of the values are ordered, and with them, apart, those of queries and
                    keys, but not under rope, where each has a frequency of its own
        channels    of n_embd, in all layers alike; but where a channel's place counts they stay: in sinusoidal positions, and in
                    partial_rmsnorm
        """
        assert not self.config.n_expert, "experts have fixed sizes, and nothing to order"

        def order(units):
            reorder(units(lambda p: p), ranking(sum(t.reshape(len(t), -1).sum(1) for t in units(score))))
        for block in self.transformer.h:
            order(block.mlp.neurons)
            for units in block.attn.heads():
                order(units)
        if self.config.position != "sinusoidal" and self.config.norm != "partial_rmsnorm":
            order(self.channels)

    def channels(self, of):
        """of(parameter), for those with channels of n_embd, each as (channel, ...)."""
        t = self.transformer
        columns = [t.wte.weight, *([t.wpe.weight] if self.config.position == "learned" else [])]
        rows = [p for module in self.modules() if isinstance(module, LayerNorm | RMSNorm) for p in module.parameters()]
        for block in t.h:
            columns += [block.attn.c_attn.weight, block.mlp.c_fc.weight]
            rows += [*block.attn.c_proj.parameters(), *block.mlp.c_proj.parameters()]
        return [of(p) for p in rows] + [of(p).T for p in columns]

    def cost(self, arch=None):
        """{"params", "flops"} of an architecture: whole numbers; of weights: the differentiable expectations, float64.

        flops: of one forward pass over one sequence of block_size tokens, 2 a multiply-add in a matrix product, attention counted in
        full; of n_expert MLPs the params of all and the flops of top_k.
        """
        c, T = self.config, self.config.block_size
        e = torch.tensor(self.n_embd, dtype=torch.float64) # (n_embd,)
        bias, norm, norms = int(c.bias), (1 + (c.bias and c.norm == "layernorm")) * e, 1 if c.residual == "parallel" else 2
        parts, n_expert, top_k = 2 if c.activation in GATED else 1, c.n_expert or 1, c.top_k if c.n_expert else 1
        params, flops = c.vocab_size * e + (c.position == "learned") * T * e + norm, 2 * T * c.vocab_size * e # wte, wpe, ln_f
        p, depth, layers = self.expectation(arch)
        for i, (block, (a, m)) in enumerate(zip(self.transformer.h, layers, strict=True)):
            used = sum(depth[k] for k, n in enumerate(self.n_layer) if n > i) # the chance that this layer runs
            ratios = (block.mlp.experts[0] if c.n_expert else block.mlp).mlp_ratio
            hidden = torch.tensor([[int(r * n) for r in ratios] for n in self.n_embd]).double() @ m # (n_embd,)
            inner = c.head_size * (torch.tensor(block.attn.n_head).double() @ a) if c.head_size else e
            attention, mlp, router = 4 * inner * e, (parts + 1) * hidden * e, 2 * c.n_expert * e # matrices
            params = params + used * (norms * norm + attention + bias * (3 * inner + e) + router)
            params = params + used * n_expert * (mlp + bias * (parts * hidden + e))
            flops = flops + used * (2 * T * (attention + top_k * mlp + router) + 4 * T * T * inner)
        cost = {"params": p @ params, "flops": p @ flops}
        exact = not arch or not isinstance(arch["n_layer"], torch.Tensor)
        return {name: round(value.item()) for name, value in cost.items()} if exact else cost

    def latency_parts(self, shares):
        """What the latency of this GPT is a linear function of: how often it has each part, {name: (n_embd, options)}. shares: the
        weights of its choices, those of a layer times the chance that it runs."""
        parts = {"rest": shares["n_layer"], "attention": shares["n_head"].sum(0), "mlp": shares["mlp_ratio"].sum(0)}
        return {name: torch.outer(shares["n_embd"], mask) for name, mask in parts.items()}

    def expectation(self, arch):
        """mixture_sizes() as float64 weights, for cost()."""
        if not arch: # the only option of everything
            return torch.ones(1).double(), torch.ones(1), [(torch.ones(1).double(), torch.ones(1).double())] * len(self.transformer.h)
        weights = arch if isinstance(arch["n_layer"], torch.Tensor) else one_hot(self.choices, arch)
        weights = {name: w.double().cpu() for name, w in weights.items()}
        return weights["n_embd"], weights["n_layer"], list(zip(weights["n_head"], weights["mlp_ratio"], strict=True))

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, arch=None, generator=None, vocab_size=None):
        """idx: (B, T) -> (B, T + max_new_tokens). temperature=0 takes the likeliest token; ids from vocab_size on are never
        drawn. Keys and values are cached until block_size is full; from there on the window slides and is computed anew, as it
        is from the start for a mixture, whose attention keeps none."""
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
            if temperature < 1e-30: # 0, or what float32 can divide nothing by
                idx_next = logits.argmax(-1, keepdim=True)
            else:
                idx_next = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1, generator=generator)
            idx = torch.cat((idx, idx_next), dim=1)
        return idx


def build(config, arch=None):
    """A GPT from a dict of GPTConfig's fields; other keys are left alone. arch: the sizes of a stand-alone network."""
    known = {field.name for field in fields(GPTConfig)}
    return GPT(GPTConfig(**{key: value for key, value in config.items() if key in known}), arch)


def rotary(qkv, n_head, past=0):
    """RoPE (Su et al. 2021): channels 2i and 2i + 1 of every head of q and k turn by position * 10000^(-2i/d). qkv: (B, T, 3n)."""
    T, n = qkv.shape[1], qkv.shape[2] // 3
    a, b = qkv[..., :2 * n].unflatten(2, (2 * n_head, -1, 2)).unbind(-1) # (B, T, 2 n_head, d / 2)
    i = torch.arange(a.shape[3], device=qkv.device)
    angle = torch.outer(torch.arange(past, past + T, device=qkv.device), 10000 ** (-i / a.shape[3])).unsqueeze(1) # (T, 1, d / 2)
    cos, sin = angle.cos(), angle.sin()
    turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(2)
    return torch.cat((turned.to(qkv.dtype), qkv[..., 2 * n:]), 2)


def mixed_rotary_attention(qkv, n, p, y_scale, n_head, dropout=0.0):
    """mixed_attention() with RoPE in heads of n_k / n_head[j] channels: the scores are sum_k p_k scores_k. Each width turns by
    frequencies of its own, so the queries and keys of all widths stand side by side."""
    y, v = 0.0, qkv.chunk(3, dim=2)[2]
    for j, h in enumerate(n_head):
        parts = [rotary(take(qkv, 2, Size(3 * e, 3 * h)), h).unflatten(2, (3, h, -1)).unbind(2) for e in n] # (B, T, h, e / h)
        q = torch.cat([part[0] * (w * (e / h) ** -0.5) for part, e, w in zip(parts, n, p, strict=True)], -1).flatten(2)
        k = torch.cat([part[1] for part in parts], -1).flatten(2)
        y = y + causal_attention(q, k, v, h, dropout, scale=1.0) * y_scale[j].to(v.dtype)
    return y


DATA = "tokens"
