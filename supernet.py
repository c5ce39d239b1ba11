"""
Weight-entangled layers: every option of a size is a prefix of one shared weight.

A layer's forward takes, after its input, the Size of each of its dimensions:
    None              all channels: the plain layer, at the plain layer's cost
    Size(n)           hard: the first n channels, by slicing, at the cost of the small layer
    Size(n, share, p) mixture: option k uses n[k] channels and has weight p[k]; differentiable in p
With one-hot weights a mixture computes what slicing computes (the law of exactness), because every channel that an
option does not use is exactly zero, and never enters a norm, a softmax or a scale.

Weight superposition: TangleNAS (Sukthanker et al. 2023), `sum_k p_k pad(W[:o_k, :i_k])`. For option sizes s_k,
S(i) = sum of p_k with s_k > i is the share of the options that use channel i: most sums collapse to a product with S.
"""
import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fused_ops
from fused_ops import mixed_linear, mixed_norm

# -----------------------------------------------------------------------------
# choices and architectures

@dataclass(frozen=True)
class Choice:
    """One decision of a search space.

    options: list of what can be chosen. repeat: None, or how many layers choose for themselves.
    depth: the name of the choice (such as "n_layer") that says how many of those layers are in use.
    inputs, keep: the rows are the edges into the nodes of a cell, (2, 3) the first two into one, the next three into another; of each
    node's, `keep` stay in the end, and the others are 'none', which is one of the options.
    is_depth: it is a number of blocks, though it is the depth of no other choice.
    Its weights, and its alphas, have the shape (len(options),) or (repeat, len(options)).
    """
    options: tuple
    repeat: int | None = None
    depth: str | None = None
    inputs: tuple = ()
    keep: int = 0
    is_depth: bool = False

    @property
    def shape(self):
        k = len(self.options)
        return (k,) if self.repeat is None else (self.repeat, k)

    def units(self, used):
        """The rows that are chosen together, as ranges, of the first `used` rows: those of a node, or every row on its own."""
        ends = list(itertools.accumulate(self.inputs or (1,) * used, initial=0))
        return [range(*pair) for pair in itertools.pairwise(ends)]


def options_of(value, name, whole=True):
    """The options of one config value: a number is one option, a list is a Choice. Raises SystemExit on a bad list."""
    options = tuple(value) if isinstance(value, list | tuple) else (value,)
    numbers = all(type(o) is int or (type(o) is float and not whole) for o in options)
    if not options or not numbers or list(options) != sorted(set(options)) or options[0] <= 0:
        kind = "whole numbers" if whole else "numbers"
        raise SystemExit(f"{name}={value} must be one or more different positive {kind} in increasing order, such as {name}=[2, 4].")
    return options


def check_names(key, values, allowed):
    """SystemExit unless the values of a key are different ones of those allowed."""
    for value in values:
        if value not in allowed or len(set(values)) < len(values):
            raise SystemExit(f"{key}={list(values)} must be one or more different ones of {', '.join(allowed)}.")


def check_arch(choices, arch):
    """The arch with its unused per-layer entries dropped; SystemExit if it is not one of this space."""
    if not isinstance(arch, dict) or set(arch) != set(choices):
        got = sorted(arch) if isinstance(arch, dict) else arch
        raise SystemExit(f"The architecture names {got}, but this search space chooses {sorted(choices)}.")
    checked = {}
    for name, choice in choices.items():
        values = arch[name] if choice.repeat else [arch[name]]
        used = arch[choice.depth] if choice.depth else choice.repeat or 1
        if not isinstance(values, list | tuple) or not isinstance(used, int) or len(values) < used:
            raise SystemExit(f"The architecture's {name}={arch[name]} needs a list of at least {used} entries, one a layer.")
        for value in values[:used]:
            if value not in choice.options:
                raise SystemExit(f"The architecture's {name} has {value}, which is not one of {list(choice.options)}.")
        checked[name] = [choice.options[choice.options.index(value)] for value in values[:used]] # 3 in the place of 3.0
        checked[name] = checked[name] if choice.repeat else checked[name][0]
    return checked


def one_hot(choices, arch):
    """The weights, name -> (K,) or (repeat, K), that put everything on `arch`; layers that it does not use get option 0."""
    weights = {}
    for name, choice in choices.items():
        values = arch[name] if choice.repeat else [arch[name]]
        index = [choice.options.index(v) for v in values[:choice.repeat or 1]]
        index += [0] * ((choice.repeat or 1) - len(index))
        weights[name] = F.one_hot(torch.tensor(index), len(choice.options)).float().view(choice.shape)
    return weights


def extremes(choices):
    """The space's smallest and largest architecture: the first and the last option of everything."""
    return [check_arch(choices, {name: [c.options[i]] * c.repeat if c.repeat else c.options[i] for name, c in choices.items()})
            for i in (0, -1)]

# -----------------------------------------------------------------------------
# sizes

class Size(NamedTuple):
    """The part of a dimension of N channels that is in use: the first n/groups channels of each of `groups` equal parts.

    A mixture has p: (K,), the weights of its options, share: (K, N), how much of every channel option k uses (0 or 1, or
    between them where a second choice mixes inside the dimension), and n: the sizes where that changes, as numbers and as
    `last`: (len(n),), the last channel before each. A hard size whose option carries a weight (gdas) has it as p, and that of
    a second choice as share, both scalars.
    """
    n: int | tuple
    groups: int = 1
    mask: torch.Tensor | None = None
    p: torch.Tensor | None = None
    last: torch.Tensor | None = None

    @property
    def mixed(self):
        return self.p is not None and self.p.dim() == 1

    @property
    def weighted(self):
        return self.p is not None and self.p.dim() == 0

    @property
    def coverage(self):
        """(N,): the total weight of the options that use each channel; of a hard size: its weight."""
        return self.p @ self.mask if self.mixed else self.p if self.mask is None else self.p * self.mask

    @property
    def unweighted(self):
        """For a layer whose input, or whose next layer's output, has the weights already: of a mixture, all channels."""
        return None if self.mixed else Size(self.n, self.groups)

    @property
    def twice(self):
        """The Size of two such dimensions side by side."""
        if not self.mixed:
            return self._replace(n=2 * self.n, groups=2)
        both, N = (*self.n, *(self.n[-1] + n for n in self.n)), self.n[-1]
        return self._replace(n=both, mask=self.mask.repeat(1, 2), last=torch.cat((self.last, N + self.last)))


def size_of(value, n, mask, last=None):
    """The Size of a choice among the sizes n, from its value: None, an option, an option and its weight, or the weights of all, (K,).
    share, last: of a mixture, as in Size."""
    if isinstance(value, torch.Tensor):
        return Size(n, mask=mask, p=value, last=last)
    option, p = value if isinstance(value, tuple) else (value, None)
    return None if option is None else Size(option, p=p)


def prefix_masks(n, N, groups=1):
    """(K, N) of 0 and 1: the channels that each option of n: (K,) uses, the first n/groups of each of `groups` equal parts."""
    inside = torch.arange(N // groups) < torch.tensor(n).unsqueeze(-1) // groups
    return inside.float().repeat(*[1] * (inside.dim() - 1), groups)


def take(w, dim, size):
    """The slice of w along dim that a hard size uses; a view wherever one part is asked for."""
    if size is None or (size.n == w.shape[dim] and not torch.compiler.is_compiling()): # a compiler would make this two graphs
        return w
    if size.groups == 1:
        return w.narrow(dim, 0, size.n)
    assert w.shape[dim] % size.groups == 0 and size.n % size.groups == 0, (w.shape, dim, size)
    return w.unflatten(dim, (size.groups, -1)).narrow(dim + 1, 0, size.n // size.groups).flatten(dim, dim + 1)


def ranking(importance, ends=None):
    """The places of importance: (n,), the largest first; with ends those of each band that they end stay in it."""
    ends = ends or [len(importance)]
    return torch.cat([start + importance[start:end].argsort(descending=True, stable=True) for start, end in itertools.pairwise([0, *ends])])


def reorder(tensors, order):
    """Each tensor's rows in that order, in place."""
    for t in tensors:
        t.copy_(t[order])

# -----------------------------------------------------------------------------
# mixing, and depthwise convolution: each in PyTorch, which says what is computed, and for a CPU in fused_ops.cpp


class StraightThrough(torch.autograd.Function):
    """x * w for a scalar w that is 1: x itself, though not its gradient."""
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g, torch.dot(g.flatten().to(w.dtype), x.flatten().to(w.dtype))


def straight_through(x, w):
    """x * w, where w is the weight 1 of a chosen option, or None."""
    if w is None or not w.requires_grad:
        return x
    return x * w.to(x.dtype) if torch.compiler.is_compiling() else StraightThrough.apply(x, w) # a compiler makes as little of the product

# -----------------------------------------------------------------------------
# layers: the plain torch layers, whose sizes may be chosen or mixed

class Linear(nn.Linear):
    """x: (..., in) -> (..., out).

    Mixture: in or out alone, or chosen independently, sum_ij a_i b_j pad(W[:o_j, :c_i]) = S_out * (W @ (S_in * x));
    in and out of the same choice, sum_k p_k pad(W[:o_k, :c_k]) = (W * M) @ x, M = sum_k p_k 1[row < o_k] 1[column < c_k].
    """
    def take(self, i=None, o=None):
        w, (first, second) = self.weight, ((0, o), (1, i)) if i is not None and i.groups > 1 else ((1, i), (0, o))
        return {"weight": take(take(w, *first), *second), # the one in parts last: it makes a copy
                "bias": self.bias if self.bias is None else take(self.bias, 0, o)}

    def forward(self, x, i=None, o=None):
        mix_i, mix_o = i is not None and i.mixed, o is not None and o.mixed
        joint = i is not None and o is not None and i.p is o.p
        if mix_i and mix_o and joint:
            M = (o.p[:, None] * o.mask[:, o.last]).T @ i.mask[:, i.last] # (len(o.n), len(i.n))
            return mixed_linear(x, self.weight, self.bias if self.bias is None else self.bias * o.coverage, M, o.n, i.n)
        if mix_i or mix_o:
            y = F.linear(x * i.coverage.to(x.dtype) if mix_i else x, self.weight, self.bias)
            return y * o.coverage.to(y.dtype) if mix_o else y
        if i is not None and i.weighted:
            x = straight_through(x, i.mask if joint else i.coverage) # joint: p counts once, in what goes out
        y = F.linear(x, **self.take(i, o))
        return straight_through(y, o.coverage) if o is not None and o.weighted else y


class Embedding(nn.Embedding):
    """idx: (...) -> (..., dim). Mixture: sum_k p_k pad(E[idx, :e_k]) = E[idx] * S."""
    def take(self, e=None):
        return {"weight": take(self.weight, 1, e)}

    def forward(self, idx, e=None):
        if e is not None and e.mixed:
            return F.embedding(idx, self.weight) * e.coverage
        y = F.embedding(idx, **self.take(e))
        return straight_through(y, e.coverage) if e is not None and e.weighted else y


class Sinusoidal(nn.Module):
    """pos: (T,) -> (T, dim): sin and cos of pos * 10000^(-2i/dim) in channels 2i and 2i + 1 (Vaswani et al. 2017).

    Mixture: sum_k p_k pad(table of width e_k), whose frequencies are those of that width.
    """
    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def forward(self, pos, e=None):
        if e is not None and e.mixed:
            return sum(p * F.pad(self(pos, Size(n)), (0, self.dim - n)) for p, n in zip(e.p, e.n, strict=True))
        n = self.dim if e is None else e.n
        i = torch.arange(n, device=pos.device)
        angle = pos.unsqueeze(1) * 10000 ** (-(i - i % 2) / n)
        y = torch.where(i % 2 == 0, angle.sin(), angle.cos())
        return straight_through(y, e.coverage) if e is not None and e.weighted else y


class LayerNorm(nn.Module):
    """x: (..., N) -> (..., N); bias is optional (PyTorch's has no such switch before 2.1).

    Mixture: sum_k p_k pad(norm(x[:e_k]) * weight[:e_k] + bias[:e_k]); no option ever sees another's channels.
    """
    def __init__(self, ndim, bias, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))
        self.bias = nn.Parameter(torch.zeros(ndim)) if bias else None
        self.eps = eps

    def take(self, e=None):
        return {"weight": take(self.weight, 0, e), "bias": self.bias if self.bias is None else take(self.bias, 0, e)}

    def forward(self, x, e=None):
        if e is not None and e.mixed:
            return mixed_norm(x, self.weight, self.bias if self.bias is None else self.bias * e.coverage, e.p, e.n, self.eps)
        slices = self.take(e)
        y = F.layer_norm(x, slices["weight"].shape, **slices, eps=self.eps)
        return straight_through(y, e.coverage) if e is not None and e.weighted else y


class RMSNorm(nn.Module):
    """x: (..., N) -> (..., N): x / RMS(x) * weight (Zhang & Sennrich 2019); pRMSNorm with portion < 1: RMS of the first channels.

    Mixture: sum_k p_k pad(norm(x[:e_k]) * weight[:e_k]), with the first portion of each e_k.
    """
    def __init__(self, ndim, portion=1.0, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))
        self.portion, self.eps = portion, eps

    def take(self, e=None):
        return {"weight": take(self.weight, 0, e)}

    def scale(self, x, n):
        """(..., 1): 1 / RMS of a width of n channels, at least in float32: in float16 small squares vanish, and gradients overflow."""
        x = x[..., :max(1, int(self.portion * n))].to(torch.promote_types(x.dtype, torch.float32))
        return torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)

    def forward(self, x, e=None):
        if e is not None and e.mixed:
            scales = [p * self.scale(x, n) for p, n in zip(e.p, e.n, strict=True)]
            blocks = x.split([b - a for a, b in zip((0, *e.n[:-1]), e.n, strict=True)], dim=-1) # block k is in every option from k on
            return self.weight * torch.cat([block * sum(scales[k:]) for k, block in enumerate(blocks)], dim=-1)
        y = x * self.scale(x, x.shape[-1]) * self.take(e)["weight"]
        return straight_through(y, e.coverage) if e is not None and e.weighted else y

# -----------------------------------------------------------------------------
# convolutions, x: (B, C, H, W): channels are prefixes, a kernel is the centred window of the largest


# -----------------------------------------------------------------------------
# operations of a cell: x, its ReLU, k as in Conv2d, and a scale that the output is multiplied with or None


def each_read(net, run, visit):
    """visit(name, module, key, slice) of everything that the layers read in the hard forward run()."""
    def read(name, module, args):
        for key, value in module.take(*args[1:]).items():
            if value is not None:
                visit(name, module, key, value)

    hooks = [module.register_forward_pre_hook(lambda module, args, name=name: read(name, module, args))
             for name, module in net.named_modules() if hasattr(module, "take")]
    training = net.training
    net.eval()
    with torch.no_grad():
        run()
    net.train(training)
    for hook in hooks:
        hook.remove()


def extract(net, small, run):
    """Copy into `small` the slices of `net` that its hard forward `run()` reads, so that the two cannot disagree.

    small: a stand-alone network whose modules have the names of those in `net`. Returns small.
    """
    theirs, filled = dict(small.named_modules()), set()

    def copy(name, module, key, value):
        getattr(theirs[name], key).copy_(value)
        filled.add(getattr(theirs[name], key))

    each_read(net, run, copy)
    missed = [name for name, p in small.named_parameters() if p not in filled]
    assert not missed, f"the hard forward read nothing for {missed}"
    return small


def measure_cost(net, run):
    """{"params", "flops"} of the hard forward run(): the weights that it reads, and 2 FLOPs a multiply-add in products and convolutions."""
    read = {}

    def count(name, module, key, value):
        if isinstance(getattr(module, key), nn.Parameter):
            read[name, key] = value.numel()

    kernels, fused_ops.enabled = fused_ops.enabled, False # PyTorch's counter knows its own operations alone
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        each_read(net, run, count)
    fused_ops.enabled = kernels
    return {"params": sum(read.values()), "flops": counter.get_total_flops()}


