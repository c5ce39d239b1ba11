"""
Weight-entangled layers: every option of a size is a prefix of one shared weight.

A layer's forward takes, after its input, the Size of each of its dimensions:
    None             all channels: the plain layer, at the plain layer's cost
    Size(n)          hard: the first n channels, by slicing, at the cost of the small layer
    Size(n, ..., p)  a mixture: option k uses n[k] channels and has weight p[k]; differentiable in p
With one-hot weights a mixture computes what slicing computes (the law of exactness): every channel
that an option does not use is exactly zero, and never enters a norm, a softmax or a scale.

Weight superposition is from TangleNAS (Sukthanker et al. 2023): sum_k p_k pad(W[:o_k, :i_k]).
For option sizes s_k, S(i) = sum of p_k with s_k > i is the total weight of the options that use
channel i, here called the coverage. Most of these sums become a product with S.
"""
import itertools
import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch.nn import functional as F

from configurator import ConfigError
from fused_ops import mixed_linear, mixed_norm

# -----------------------------------------------------------------------------
# choices and architectures

@dataclass(frozen=True)
class Choice:
    """One decision of a search space.

    options: what can be chosen, in increasing order if they are numbers.
    repeat: None, or the number of rows: how many layers (or edges) each make this choice.
    depth: the name of the choice, such as "n_layer", that says how many of the rows are in use.
    inputs, keep: the rows are the edges into the nodes of a cell: inputs=(2, 3) if the first two
        enter one node and the next three another. Each node keeps `keep` of its edges in the end;
        the others become 'none', which is one of the options.
    Weights and alphas have the shape (len(options),) or (repeat, len(options)).
    """
    options: tuple
    repeat: int | None = None
    depth: str | None = None
    inputs: tuple = ()
    keep: int = 0

    @property
    def shape(self):
        k = len(self.options)
        return (k,) if self.repeat is None else (self.repeat, k)

    def units(self, used):
        """The rows that are chosen together, as ranges: a node's edges, or every row on its own."""
        ends = list(itertools.accumulate(self.inputs or (1,) * used, initial=0))
        return [range(*pair) for pair in itertools.pairwise(ends)]


def options_of(value, name, whole=True):
    """The options of a config value: one number, or those of a list. Raises ConfigError unless they
    are positive numbers, whole ones if `whole`, in increasing order."""
    options = tuple(value) if isinstance(value, list | tuple) else (value,)
    numbers = all(type(o) is int or (type(o) is float and not whole) for o in options)
    if not options or not numbers or list(options) != sorted(set(options)) or options[0] <= 0:
        kind = "whole numbers" if whole else "numbers"
        raise ConfigError(f"{name}={value} must be one or more different positive {kind} in "
                          f"increasing order, such as {name}=[2, 4].")
    return options


def kinds_of(value, name, allowed):
    """The options of a config value: one word, or those of a list. Raises ConfigError unless they
    are different words of `allowed`."""
    options = tuple(value) if isinstance(value, list | tuple) else (value,)
    known = list(allowed)
    wrong = [o for o in options if o not in known]
    if wrong or len(set(options)) < len(options):
        what = f"{wrong[0]!r}, which is not one of" if wrong else "one twice: choose different"
        raise ConfigError(f"{name}={value!r} has {what} {', '.join(map(str, known))}.")
    return options


def counts_of(value, name):
    """The options of a count where 0 stands for all, such as n_kv_head and window. Raises
    ConfigError unless they increase; 0 is the largest and stands last."""
    options = tuple(value) if isinstance(value, list | tuple) else (value,)
    whole = all(type(o) is int and o >= 0 for o in options)
    if not whole or list(options) != sorted(set(options), key=lambda o: o or math.inf):
        raise ConfigError(f"{name}={value!r} must be whole numbers in increasing order, where 0 "
                          f"stands for all and comes last, such as {name}=[2, 4, 0].")
    return options


def check_arch(choices, arch):
    """The architecture without the entries of layers that it does not use. Raises ConfigError if it
    is not one of these choices."""
    if not isinstance(arch, dict) or set(arch) != set(choices):
        found = sorted(arch) if isinstance(arch, dict) else arch
        raise ConfigError(f"The architecture names {found}, but this search space chooses "
                          f"{sorted(choices)}.")
    checked = {}
    for name, choice in choices.items():
        values = arch[name] if choice.repeat else [arch[name]]
        used = arch[choice.depth] if choice.depth else choice.repeat or 1
        known = isinstance(values, list | tuple) and isinstance(used, int)
        if not known or len(values) < used:
            raise ConfigError(f"The architecture's {name}={arch[name]} needs a list of at least "
                              f"{used} entries, one a layer.")
        for value in values[:used]:
            if value not in choice.options:
                raise ConfigError(f"The architecture's {name} has {value}, which is not one of "
                                  f"{list(choice.options)}.")
        # the option itself: 3 where the file has 3.0
        found = [choice.options[choice.options.index(value)] for value in values[:used]]
        checked[name] = found if choice.repeat else found[0]
    return checked


def one_hot(choices, arch):
    """The weights that put everything on `arch`: {name: (K,) or (repeat, K)}. Layers that it does
    not use get their first option."""
    weights = {}
    for name, choice in choices.items():
        values, rows = arch[name] if choice.repeat else [arch[name]], choice.repeat or 1
        index = [choice.options.index(value) for value in values[:rows]]
        index = torch.tensor(index + [0] * (rows - len(index)))
        weights[name] = F.one_hot(index, len(choice.options)).float().view(choice.shape)
    return weights


def extremes(choices):
    """The smallest and the largest architecture: the first and the last option of every choice."""
    archs = ({name: [c.options[i]] * c.repeat if c.repeat else c.options[i]
              for name, c in choices.items()} for i in (0, -1))
    return [check_arch(choices, arch) for arch in archs]

# -----------------------------------------------------------------------------
# what was sampled for one forward pass

class Sampled(NamedTuple):
    """What one choice is in one forward pass. Four cases, by what is set:

                          option   weights  weight
        everything                                  a layer without a choice
        hard              chosen                    the chosen option runs alone, by slicing
        straight-through  chosen   (K,)     ()      the same, and the weights get gradients
        mixture                    (K,)             all options run, each with its weight

    weights: of all K options. weight: that of the chosen option, which is 1.
    """
    options: tuple = ()
    option: Any = None
    weights: torch.Tensor | None = None
    weight: torch.Tensor | None = None

    @property
    def is_mixture(self):
        return self.weights is not None and self.option is None

    def of(self, options):
        """The option that runs; of a layer without a choice the last of its `options`."""
        return options[-1] if self.option is None else self.option

    @property
    def pairs(self):
        """[(option, its weight or None)] of the options that run."""
        if self.is_mixture:
            return list(zip(self.options, self.weights, strict=True))
        return [] if self.option is None else [(self.option, self.weight)]

    def size(self, sizes, mask, last=None):
        """The Size of a dimension of which option k uses the first sizes[k] channels, see Size."""
        if self.is_mixture:
            return Size(sizes, mask=mask, p=self.weights, last=last)
        if self.option is None:
            return None
        return Size(sizes[self.options.index(self.option)], p=self.weight)


ALL = Sampled() # a layer without a choice uses all of itself


def set_choices(net, choices, arch=None):
    """Sets net.choices, which the stand-alone network of an architecture has none of, and net.rows:
    how many rows each choice has, or None. Returns the checked architecture, or None."""
    if arch is None:
        net.choices, net.rows = choices, {name: c.repeat for name, c in choices.items()}
        return None
    arch, net.choices = check_arch(choices, arch), {}
    net.rows = {name: len(arch[name]) if c.repeat else None for name, c in choices.items()}
    return arch


def sampled(net, arch):
    """{choice: its Sampled, or a list of one a row}. Every network's forward begins with it.
    arch: an architecture, weights for a mixture, what straight_through_arch() returns, or None for
    a network that has nothing to choose."""
    if arch is None:
        undecided = {name: c.options for name, c in net.choices.items() if len(c.options) > 1}
        assert not undecided, ("a supernet needs weights or an architecture as its third argument: "
                               f"it has {undecided}")
        return {name: ALL if rows is None else [ALL] * rows for name, rows in net.rows.items()}

    def of(choice, value):
        if isinstance(value, torch.Tensor):
            return Sampled(choice.options, weights=value)
        return value if isinstance(value, Sampled) else Sampled(choice.options, value)
    return {name: [of(c, row) for row in arch[name]] if c.repeat else of(c, arch[name])
            for name, c in net.choices.items()}


def straight_through_arch(choices, weights):
    """Of every row the option of the largest weight, as sampled() returns it, with gradients."""
    def largest(choice, row):
        k = row.argmax().item()
        return Sampled(choice.options, choice.options[k], row, row[k])
    return {name: [largest(c, row) for row in weights[name]] if c.repeat
            else largest(c, weights[name]) for name, c in choices.items()}

# -----------------------------------------------------------------------------
# sizes

class Size(NamedTuple):
    """How much of a dimension of N channels is in use. Four cases, as of Sampled:

        everything        None instead of a Size
        hard              n: the first n channels
        straight-through  n, and p: (), the weight of the chosen option
        mixture           p: (K,), the weights of the options; mask: (K, N), 1 where an option uses
                          a channel; n: the sizes, increasing; last: (len(n),), the same minus 1

    groups: the dimension has so many equal parts, such as heads, or query, key and value; the first
    n / groups channels of each part are in use. parts: of a dimension of unequal parts, the
    (start, length) of what is in use of each. Where a second choice mixes within the dimension,
    as mlp_ratio does in n_embd * mlp_ratio, n has every size that occurs, and the mask is between 0
    and 1; a straight-through size has the weight of the second choice as its mask: ().
    """
    n: int | tuple
    groups: int = 1
    mask: torch.Tensor | None = None
    p: torch.Tensor | None = None
    last: torch.Tensor | None = None
    parts: tuple = ()

    @property
    def is_mixture(self):
        return self.p is not None and self.p.dim() == 1

    @property
    def is_straight_through(self):
        return self.p is not None and self.p.dim() == 0

    @property
    def coverage(self):
        """S: (N,), the total weight of the options that use each channel. Straight-through: ()."""
        if self.is_mixture:
            return self.p @ self.mask
        return self.p if self.mask is None else self.p * self.mask

    @property
    def unweighted(self):
        """Without weights, of a mixture all channels: where a neighbouring layer applied them."""
        return None if self.is_mixture else Size(self.n, self.groups)

    @property
    def doubled(self):
        """The Size of two such dimensions side by side."""
        if not self.is_mixture:
            return self._replace(n=2 * self.n, groups=2)
        n, last = (*self.n, *(self.n[-1] + n for n in self.n)), self.last
        last = torch.cat((last, self.n[-1] + last))
        return self._replace(n=n, mask=self.mask.repeat(1, 2), last=last)

    @property
    def pairs(self):
        """[(size, its weight or None)] of the options that run."""
        return list(zip(self.n, self.p, strict=True)) if self.is_mixture else [(self.n, self.p)]


def prefix_masks(n, N, groups=1):
    """(K, N) of 0 and 1: which of N channels each of the sizes n: (K,) uses, the first n / groups
    of each of `groups` equal parts. Sizes (J, K) give (J, K, N)."""
    inside = torch.arange(N // groups) < torch.tensor(n).unsqueeze(-1) // groups
    return inside.float().repeat(*[1] * (inside.dim() - 1), groups)


def slice_dim(w, dim, size):
    """The slice of w along dim that a hard size uses; a view wherever one part is asked for."""
    # under torch.compile a full slice stays a slice: the shortcut would make two graphs of one
    if size is None or (size.n == w.shape[dim] and not torch.compiler.is_compiling()):
        return w
    if size.parts:
        return torch.cat([w.narrow(dim, start, n) for start, n in size.parts], dim)
    if size.groups == 1:
        return w.narrow(dim, 0, size.n)
    assert w.shape[dim] % size.groups == 0 and size.n % size.groups == 0, (w.shape, dim, size)
    parts = w.unflatten(dim, (size.groups, -1))
    return parts.narrow(dim + 1, 0, size.n // size.groups).flatten(dim, dim + 1)


def ranking(importance, ends=None):
    """Indices by descending importance: (n,); with `ends`, within each band of indices."""
    bands = itertools.pairwise([0, *(ends or [len(importance)])])
    return torch.cat([start + importance[start:end].argsort(descending=True, stable=True)
                      for start, end in bands])


def reorder(tensors, order):
    """Puts each tensor's rows in that order, in place."""
    for t in tensors:
        t.copy_(t[order])


class StraightThrough(torch.autograd.Function):
    """x * w for a scalar w that is 1: returns x itself, and gives w its gradient."""
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g, torch.dot(g.flatten().to(w.dtype), x.flatten().to(w.dtype))


def straight_through(x, w):
    """x * w, where w is None or the weight 1 of a chosen option."""
    if w is None or not w.requires_grad:
        return x
    if torch.compiler.is_compiling(): # a compiler fuses the product
        return x * w.to(x.dtype)
    return StraightThrough.apply(x, w)


def times_weight(x, size):
    """x times the weight of a straight-through size, x for any other."""
    return straight_through(x, size.coverage) if size and size.is_straight_through else x

# -----------------------------------------------------------------------------
# layers: those of torch, whose sizes may be chosen or mixed

class Linear(nn.Linear):
    """x: (..., in) -> (..., out).

    Mixture, in or out alone, or the two chosen independently with weights a and b:
        sum_ij a_i b_j pad(W[:o_j, :c_i]) = S_out * (W @ (S_in * x))
    Mixture, in and out of the same choice:
        sum_k p_k pad(W[:o_k, :c_k]) = (W * M) @ x, M = sum_k p_k 1[row < o_k] 1[column < c_k]
    """
    def slice_params(self, i=None, o=None):
        if i and i.groups > 1: # a slice in parts makes a copy: the smaller one if it comes last
            weight = slice_dim(slice_dim(self.weight, 0, o), 1, i)
        else:
            weight = slice_dim(slice_dim(self.weight, 1, i), 0, o)
        bias = self.bias if self.bias is None else slice_dim(self.bias, 0, o)
        return {"weight": weight, "bias": bias}

    def forward(self, x, i=None, o=None):
        mix_i, mix_o = i is not None and i.is_mixture, o is not None and o.is_mixture
        joint = i is not None and o is not None and i.p is o.p
        if mix_i and mix_o and joint:
            M = (o.p[:, None] * o.mask[:, o.last]).T @ i.mask[:, i.last] # (len(o.n), len(i.n))
            bias = self.bias if self.bias is None else self.bias * o.coverage
            return mixed_linear(x, self.weight, bias, M, o.n, i.n)
        if mix_i or mix_o:
            x = x * i.coverage.to(x.dtype) if mix_i else x
            y = F.linear(x, self.weight, self.bias)
            return y * o.coverage.to(y.dtype) if mix_o else y
        if i and i.is_straight_through: # of the same choice: p counts once, in what goes out
            x = straight_through(x, i.mask if joint else i.coverage)
        return times_weight(F.linear(x, **self.slice_params(i, o)), o)


class Embedding(nn.Embedding):
    """idx: (...) -> (..., dim). Mixture: sum_k p_k pad(E[idx, :e_k]) = E[idx] * S."""
    def slice_params(self, e=None):
        return {"weight": slice_dim(self.weight, 1, e)}

    def forward(self, idx, e=None):
        if e and e.is_mixture:
            return F.embedding(idx, self.weight) * e.coverage
        return times_weight(F.embedding(idx, **self.slice_params(e)), e)


class Sinusoidal(nn.Module):
    """pos: (T,) -> (T, dim): channels 2i and 2i + 1 are the sine and the cosine of
    pos * 10000^(-2i/dim) (Vaswani et al. 2017).

    Mixture: sum_k p_k pad(table of width e_k), whose frequencies are those of that width.
    """
    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def forward(self, pos, e=None):
        if e and e.is_mixture:
            return sum(p * F.pad(self(pos, Size(n)), (0, self.dim - n)) for n, p in e.pairs)
        n = e.n if e else self.dim
        i = torch.arange(n, device=pos.device)
        angle = pos.unsqueeze(1) * 10000 ** (-(i - i % 2) / n)
        return times_weight(torch.where(i % 2 == 0, angle.sin(), angle.cos()), e)


def layernorm(x, eps):
    """Ba et al. 2016: (x - mean) / standard deviation."""
    var, mean = torch.var_mean(x, -1, keepdim=True, correction=0)
    scale = torch.rsqrt(var + eps)
    return scale, scale * mean


def rmsnorm(x, eps, portion=1.0):
    """x / RMS(x) (Zhang & Sennrich 2019). portion < 1 is their pRMSNorm: the RMS is that of the
    first portion of the channels."""
    x = x[..., :max(1, int(portion * x.shape[-1]))]
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps), 0.0


# Each a function of x: (..., n) to (scale, shift), (..., 1) both; the norm is x * scale - shift.
NORMS = {
    "layernorm": layernorm,
    "rmsnorm": rmsnorm,
    "partial_rmsnorm": rmsnorm, # with Norm's portion
}


class Norm(nn.Module):
    """x: (..., N) -> (..., N): a norm times weight; a LayerNorm's bias is optional.

    kinds: keys of NORMS, of which forward's `kind` says which one is in use, or all with weights a.
    Mixture: sum_kj p_k a_j pad(norm_j(x[:e_k]) * weight[:e_k]); no option sees more.
    """
    def __init__(self, ndim, bias, kinds=("layernorm",), portion=1.0, eps=1e-5):
        super().__init__()
        self.kinds, self.portion, self.eps = kinds, portion, eps
        self.weight = nn.Parameter(torch.ones(ndim))
        self.bias = nn.Parameter(torch.zeros(ndim)) if bias and "layernorm" in kinds else None

    def slice_params(self, e=None, kind=ALL):
        has_bias = self.bias is not None and kind.of(self.kinds) == "layernorm"
        return {"weight": slice_dim(self.weight, 0, e),
                "bias": slice_dim(self.bias, 0, e) if has_bias else None}

    def statistics(self, x, kind):
        """(scale, shift) of x under a kind of norm."""
        if kind == "partial_rmsnorm":
            return NORMS[kind](x, self.eps, self.portion)
        return NORMS[kind](x, self.eps)

    def forward(self, x, e=None, kind=ALL):
        if (e and e.is_mixture) or kind.is_mixture:
            return self.mixture(x, e, kind)
        chosen, slices = kind.of(self.kinds), self.slice_params(e, kind)
        if chosen == "layernorm":
            y = F.layer_norm(x, slices["weight"].shape, **slices, eps=self.eps)
        else:
            # at least in float32: in float16 small squares vanish, and gradients overflow
            exact = x.to(torch.promote_types(x.dtype, torch.float32))
            scale, shift = self.statistics(exact, chosen)
            y = (x * scale - shift) * slices["weight"]
        return straight_through(times_weight(y, e), kind.weight)

    def mixture(self, x, e, kind):
        n = e.n if e else x.shape[-1:]
        p = e.p if e else self.weight.new_ones(1)
        a = dict(kind.pairs) if kind.is_mixture else {self.kinds[0]: 1.0}
        bias = self.bias
        if bias is not None:
            bias = bias * a["layernorm"] * (e.coverage if e else 1.0)
        if a.keys() <= {"layernorm", "rmsnorm"}: # one pass
            layer, rms = (p * a[name] if name in a else None for name in ("layernorm", "rmsnorm"))
            return mixed_norm(x, self.weight, bias, layer, rms, n, self.eps)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        scales, shifts = [], []
        for n_k, p_k in zip(n, p, strict=True):
            found = [(w * p_k, self.statistics(x[..., :n_k], name)) for name, w in a.items()]
            scales.append(sum(w * scale for w, (scale, _) in found))
            shifts.append(sum(w * shift for w, (_, shift) in found))
        blocks = x.split([b - a for a, b in itertools.pairwise((0, *n))], dim=-1)
        # block k of the channels is in every option from k on
        y = torch.cat([block * sum(scales[k:]) - sum(shifts[k:])
                       for k, block in enumerate(blocks)], dim=-1) * self.weight
        return y if bias is None else y + bias

# -----------------------------------------------------------------------------
# transformers: sizes, and depth

def run_blocks(blocks, x, n_layer, args):
    """x after n_layer of the blocks, each called with its args.

    Mixture: sum_d p_d x_d, where x_d is the output of block d.
    Straight-through: the same with all weight on one depth. The norm that follows hides the scale
    of that depth's output, so its weight alone would learn nothing: the weights of the others get
    gradients too, and the blocks after the chosen one run forward, without gradients of their own.
    """
    if n_layer.weights is None: # blocks[:None] are all of them
        for block, arg in zip(blocks[:n_layer.option], args, strict=False):
            x = block(x, *arg)
        return x
    weight_of = dict(zip(n_layer.options, n_layer.weights, strict=True))
    mixed, total, chosen = n_layer.is_mixture, 0, None
    for depth, (block, arg) in enumerate(zip(blocks, args, strict=True), 1):
        with torch.set_grad_enabled(torch.is_grad_enabled() and (mixed or depth <= n_layer.option)):
            x = block(x, *arg)
        if depth == n_layer.option:
            chosen = x
        if depth in weight_of:
            p = weight_of[depth]
            total = total + (x * p if mixed else x.detach() * (p - p.detach()))
    return total if mixed else chosen + total


SIZES = ("n_layer", "n_embd", "n_head", "mlp_ratio") # of a transformer; the last two of every layer


def transformer_choices(net, config, arch=None, shared=None, of_layer=None):
    """Sets a transformer's choices, see set_choices(). Returns the options of n_layer, and of every
    layer {choice: its options there}.

    shared, of_layer: {name: options} of what else is chosen, once for the network or once a layer;
    a single option is no choice.
    """
    sizes = {name: options_of(getattr(config, name), name, whole=name != "mlp_ratio")
             for name in SIZES}
    shared, of_layer = shared or {}, of_layer or {}
    whole = {name: sizes[name] for name in SIZES[:2]} | shared
    rows = {name: sizes[name] for name in SIZES[2:]} | of_layer
    L = sizes["n_layer"][-1]
    choices = {name: Choice(o) for name, o in whole.items() if name in SIZES or len(o) > 1}
    choices |= {name: Choice(o, repeat=L, depth="n_layer") for name, o in rows.items()
                if name in SIZES or len(o) > 1}
    arch = set_choices(net, choices, arch)
    if arch:
        whole |= {name: (arch[name],) for name in whole if name in arch}
        L = arch["n_layer"]

    def of(i, name):
        return (arch[name][i],) if arch and name in arch else rows[name]
    layers = [whole | {name: of(i, name) for name in rows} for i in range(L)]
    return whole["n_layer"], layers


def transformer_sizes(net, arch):
    """The Size of n_embd; and Sampled: n_layer, and {choice: what it is in this layer} of every
    layer."""
    now = sampled(net, arch)
    e, n_layer = now.pop("n_embd").size(net.n_embd, net.mask, net.last), now.pop("n_layer")
    rows = {name: now.pop(name) for name in list(now) if isinstance(now[name], list)}
    return e, n_layer, [now | dict(zip(rows, row, strict=True))
                        for row in zip(*rows.values(), strict=False)]

# -----------------------------------------------------------------------------
# stand-alone networks

def visit_slices(net, run, visit):
    """Calls visit(name, module, key, slice) for all that the layers read in the hard run()."""
    def read(name, module, args):
        for key, value in module.slice_params(*args[1:]).items():
            if value is not None:
                visit(name, module, key, value)

    hooks = [module.register_forward_pre_hook(partial(read, name))
             for name, module in net.named_modules() if hasattr(module, "slice_params")]
    training = net.training
    net.eval()
    with torch.no_grad():
        run()
    net.train(training)
    for hook in hooks:
        hook.remove()


def extract(net, small, run):
    """Copies into `small`, a stand-alone network, the slices of `net` that its hard forward run()
    reads, and returns it. What is copied is what is computed with, so the two cannot disagree."""
    theirs, filled = dict(small.named_modules()), set()

    def copy(name, module, key, value):
        getattr(theirs[name], key).copy_(value)
        filled.add(getattr(theirs[name], key))

    visit_slices(net, run, copy)
    missed = [name for name, p in small.named_parameters() if p not in filled]
    assert not missed, f"the hard forward read nothing for {missed}"
    return small
