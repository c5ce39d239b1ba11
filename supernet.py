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
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.nn import functional as F

# -----------------------------------------------------------------------------
# choices and architectures

@dataclass(frozen=True)
class Choice:
    """One decision of a search space.

    options: list of what can be chosen. repeat: None, or how many layers choose for themselves.
    depth: the name of the choice (such as "n_layer") that says how many of those layers are in use.
    Its weights, and its alphas, have the shape (len(options),) or (repeat, len(options)).
    """
    options: tuple
    repeat: int | None = None
    depth: str | None = None

    @property
    def shape(self):
        k = len(self.options)
        return (k,) if self.repeat is None else (self.repeat, k)


def options_of(value, name, whole=True):
    """The options of one config value: a number is one option, a list is a Choice. Raises SystemExit on a bad list."""
    options = tuple(value) if isinstance(value, list | tuple) else (value,)
    numbers = all(type(o) is int or (type(o) is float and not whole) for o in options)
    if not options or not numbers or list(options) != sorted(set(options)) or options[0] <= 0:
        kind = "whole numbers" if whole else "numbers"
        raise SystemExit(f"{name}={value} must be one or more different positive {kind} in increasing order, such as {name}=[2, 4].")
    return options


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
        checked[name] = list(values[:used]) if choice.repeat else values[0]
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

    A mixture has n: (K,) options, p: (K,) their weights and share: (K, N), how much of every channel option k uses
    (0 or 1, or between them where a second choice mixes inside the dimension).
    """
    n: int | tuple
    groups: int = 1
    share: torch.Tensor | None = None
    p: torch.Tensor | None = None

    @property
    def mixed(self):
        return self.p is not None

    @property
    def S(self):
        """(N,): the total weight of the options that use each channel."""
        return self.p @ self.share


def prefixes(n, N, groups=1):
    """(K, N) of 0 and 1: the channels that each option of n: (K,) uses, the first n/groups of each of `groups` equal parts."""
    inside = torch.arange(N // groups) < torch.tensor(n).unsqueeze(-1) // groups
    return inside.float().repeat(*[1] * (inside.dim() - 1), groups)


def take(w, dim, size):
    """The slice of w along dim that a hard size uses; a view wherever one part is asked for."""
    if size is None or size.n == w.shape[dim]:
        return w
    assert w.shape[dim] % size.groups == 0 and size.n % size.groups == 0, (w.shape, dim, size)
    return w.unflatten(dim, (size.groups, -1)).narrow(dim + 1, 0, size.n // size.groups).flatten(dim, dim + 1)

# -----------------------------------------------------------------------------
# layers: the plain torch layers, whose sizes may be chosen or mixed

class Linear(nn.Linear):
    """x: (..., in) -> (..., out).

    Mixture: in or out alone, or chosen independently, sum_ij a_i b_j pad(W[:o_j, :c_i]) = S_out * (W @ (S_in * x));
    in and out of the same choice, sum_k p_k pad(W[:o_k, :c_k]) = (W * M) @ x, M = sum_k p_k 1[row < o_k] 1[column < c_k].
    """
    def take(self, i=None, o=None):
        return {"weight": take(take(self.weight, 0, o), 1, i), "bias": self.bias if self.bias is None else take(self.bias, 0, o)}

    def forward(self, x, i=None, o=None):
        mix_i, mix_o = i is not None and i.mixed, o is not None and o.mixed
        if not mix_i and not mix_o:
            return F.linear(x, **self.take(i, o))
        if mix_i and mix_o and i.p is o.p:
            M = (o.p[:, None] * o.share).T @ i.share # (out, in)
            return F.linear(x, self.weight * M, self.bias if self.bias is None else self.bias * o.S)
        y = F.linear(x * i.S if mix_i else x, self.weight, self.bias)
        return y * o.S if mix_o else y


class Embedding(nn.Embedding):
    """idx: (...) -> (..., dim). Mixture: sum_k p_k pad(E[idx, :e_k]) = E[idx] * S."""
    def take(self, e=None):
        return {"weight": take(self.weight, 1, e)}

    def forward(self, idx, e=None):
        if e is not None and e.mixed:
            return F.embedding(idx, self.weight) * e.S
        return F.embedding(idx, **self.take(e))


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
            y = mixed_norm(x, e.n, e.p, self.eps) * self.weight
            return y if self.bias is None else y + self.bias * e.S
        slices = self.take(e)
        return F.layer_norm(x, slices["weight"].shape, **slices, eps=self.eps)


def mixed_norm(x, n, p, eps):
    """sum_k p_k pad((x[:n_k] - mean_k) / std_k): x (..., N), n increasing options, p their weights -> (..., N).

    Each block of channels between two options is reduced once; the blocks' means and squared deviations are merged
    into those of every prefix (Chan et al. 1979), which stays exact where E[x^2] - mean^2 would cancel.
    """
    sizes = [b - a for a, b in zip((0, *n[:-1]), n, strict=True)]
    blocks = x.split(sizes, dim=-1)
    mean, m2, scales, shifts = 0.0, 0.0, [], []
    for k, (size, block) in enumerate(zip(sizes, blocks, strict=True)):
        var_b, mean_b = torch.var_mean(block, dim=-1, keepdim=True, correction=0) # (..., 1)
        delta = mean_b - mean
        m2 = m2 + var_b * size + delta * delta * ((n[k] - size) * size / n[k])
        mean = mean + delta * (size / n[k])
        scales.append(p[k] * torch.rsqrt(m2 / n[k] + eps))
        shifts.append(scales[-1] * mean)
    # block k is in every option from k on
    return torch.cat([block * sum(scales[k:]) - sum(shifts[k:]) for k, block in enumerate(blocks)], dim=-1)

# -----------------------------------------------------------------------------

def extract(net, small, run):
    """Copy into `small` the slices of `net` that its hard forward `run()` reads, so that the two cannot disagree.

    small: a stand-alone network whose modules have the names of those in `net`. Returns small.
    """
    theirs, filled = dict(small.named_modules()), set()

    @torch.no_grad()
    def copy(name, module, args):
        for key, value in module.take(*args[1:]).items():
            if value is not None:
                getattr(theirs[name], key).copy_(value)
                filled.add(getattr(theirs[name], key))

    hooks = [module.register_forward_pre_hook(lambda module, args, name=name: copy(name, module, args))
             for name, module in net.named_modules() if hasattr(module, "take")]
    training = net.training
    net.eval()
    with torch.no_grad():
        run()
    net.train(training)
    for hook in hooks:
        hook.remove()
    missed = [name for name, p in small.named_parameters() if p not in filled]
    assert not missed, f"the hard forward read nothing for {missed}"
    return small
