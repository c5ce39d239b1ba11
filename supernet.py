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
import contextlib
import hashlib
import itertools
import math
import os
import platform
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

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


def write_genotype(cells, concat):
    """The text of a normal and a reduction cell, as DARTS wrote it first. cells: name -> [(operation, source)]; concat: the nodes."""
    return "Genotype(" + ", ".join(f"{name}={list(cells[name])}, {name}_concat=range({concat[0]}, {concat[-1] + 1})"
                                   for name in ("normal", "reduce")) + ")"


def read_genotype(space, text, concat, primitives):
    """{"normal", "reduce"}: [(operation, source)] of such a text; SystemExit if it is none of this space."""
    pair = r"\('(\w+)', (\d+)\)"
    ends = rf"(?:range\({concat[0]}, {concat[-1] + 1}\)|{re.escape(str(list(concat)))})"
    match = re.fullmatch(", ".join(rf"{name}=\[((?:{pair}(?:, )?)*)\], {name}_concat={ends}" for name in ("normal", "reduce"))
                         .join((r"Genotype\(", r"\)")), text)
    if not match:
        raise SystemExit(f"'{text}' is no genotype of {space}: write Genotype(normal=[('{primitives[-1]}', 0), ...], "
                         f"normal_concat=range({concat[0]}, {concat[-1] + 1}), and the same for reduce).")
    cells = {name: [(op, int(source)) for op, source in re.findall(pair, match[i])] for name, i in (("normal", 1), ("reduce", 4))}
    for op, _ in cells["normal"] + cells["reduce"]:
        if op not in primitives:
            raise SystemExit(f"The genotype has '{op}', which is not an operation of {space}: {', '.join(primitives)}.")
    return cells


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
    share: torch.Tensor | None = None
    p: torch.Tensor | None = None
    last: torch.Tensor | None = None

    @property
    def mixed(self):
        return self.p is not None and self.p.dim() == 1

    @property
    def weighted(self):
        return self.p is not None and self.p.dim() == 0

    @property
    def S(self):
        """(N,): the total weight of the options that use each channel; of a hard size: its weight."""
        return self.p @ self.share if self.mixed else self.p if self.share is None else self.p * self.share

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
        return self._replace(n=both, share=self.share.repeat(1, 2), last=torch.cat((self.last, N + self.last)))


def size_of(value, n, share, last=None):
    """The Size of a choice among the sizes n, from its value: None, an option, an option and its weight, or the weights of all, (K,).
    share, last: of a mixture, as in Size."""
    if isinstance(value, torch.Tensor):
        return Size(n, share=share, p=value, last=last)
    option, p = value if isinstance(value, tuple) else (value, None)
    return None if option is None else Size(option, p=p)


def prefixes(n, N, groups=1):
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

FLAGS = ["-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros"]
fused = False # whether CPU mixtures run in fused_ops.cpp


def use_fused_ops(wanted=True):
    """Turns the kernels of fused_ops.cpp on, or off; compiles them first where this machine has not yet done so. Without a
    compiler the same is computed by PyTorch, after one line that says so."""
    global fused
    fused = wanted and (hasattr(torch.ops.nas, "attention") or compile_fused_ops())


def compile_fused_ops():
    from torch.utils import cpp_extension
    file = os.path.join(os.path.dirname(os.path.abspath(__file__)), "fused_ops.cpp")
    with open(file) as f: # a build is for one source, one PyTorch and one kind of processor
        identity = repr((f.read(), FLAGS, torch.__version__, platform.machine(), torch.backends.cpu.get_cpu_capability(), processor()))
    name, start = "nas_" + hashlib.sha256(identity.encode()).hexdigest()[:12], time.perf_counter()
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    library = os.path.join(root, f"{name}.so")

    def say(line):
        if os.environ.get("RANK", "0") == "0": # once, not by every process of torchrun
            print(line, flush=True)

    try:
        if os.path.exists(library):
            torch.ops.load_library(library)
        else: # in a folder of its own: PyTorch's lock on a shared one outlives a process that is killed, and all later ones wait for it
            say("compiling fused_ops.cpp, once on this machine, about 35 s ...")
            os.environ["PATH"] += os.pathsep + os.path.dirname(sys.executable) # ninja, of a virtual environment that is not activated
            os.makedirs(root, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=root, ignore_cleanup_errors=True) as folder:
                cpp_extension.load(name, [file], extra_cflags=FLAGS, build_directory=folder, is_python_module=False)
                os.replace(os.path.join(folder, f"{name}.so"), library)
            say(f"compiled fused_ops.cpp in {time.perf_counter() - start:.0f} s")
    except (RuntimeError, OSError, ImportError, SystemError) as e: # no compiler, no ninja, no room, a library that does not load
        say(f"fused_ops.cpp is not in use, PyTorch computes the same more slowly ({str(e).strip().splitlines()[0]}).")
        return False
    register_fused_ops()
    return True


def processor():
    """The model of this processor, for code that was compiled for it alone."""
    try:
        with open("/proc/cpuinfo") as f:
            return next((line for line in f if line.startswith("model name")), "")
    except OSError:
        return platform.processor()


def register_fused_ops():
    """The shapes of what the kernels return."""
    library = torch.library

    library.register_fake("nas::layer_norm")(lambda x, weight, bias, p, n, eps: torch.empty_like(x, memory_format=torch.contiguous_format))
    library.register_fake("nas::layer_norm_backward")(lambda g, x, weight, p, n, eps: (
        torch.empty_like(x, memory_format=torch.contiguous_format), *(small(x, t.shape) for t in (weight, weight, p))))
    library.register_fake("nas::block_linear")(lambda x, W, bias, M, o, i: x.new_empty((*x.shape[:-1], W.shape[0])))
    library.register_fake("nas::block_linear_backward")(lambda g, x, W, M, o, i, need_W, need_bias, need_M: (
        torch.empty_like(x, memory_format=torch.contiguous_format), W.new_empty(W.shape if need_W else 0),
        small(x, W.shape[:1] if need_bias else 0), small(x, M.shape if need_M else 0)))
    library.register_fake("nas::attention")(lambda qkv, q_scale, y_scale, n_head, bias=None, mask=None: qkv.new_empty(
        (*qkv.shape[:2], qkv.shape[2] // 3)))
    library.register_fake("nas::attention_backward")(lambda g, qkv, q_scale, y_scale, n_head, bias=None, mask=None, need_bias=False: (
        torch.empty_like(qkv, memory_format=torch.contiguous_format), small(qkv, q_scale.shape), small(qkv, y_scale.shape),
        small(qkv, bias.shape if need_bias else (0, *2 * qkv.shape[1:2]))))
    library.register_fake("nas::depthwise")(lambda x, weight, stride, padding, dilation: torch.empty(
        (*x.shape[:2], *((n + 2 * padding - dilation * (weight.shape[2] - 1) - 1) // stride + 1 for n in x.shape[2:])),
        dtype=x.dtype, device=x.device, memory_format=torch.channels_last))
    library.register_fake("nas::depthwise_backward")(lambda g, x, weight, stride, padding, dilation, need_x, need_w: (
        torch.empty_like(x, memory_format=torch.channels_last) if need_x else x.new_empty(0),
        weight.new_empty(weight.shape if need_w else 0)))

    def small(x, shape): # what the kernels sum up is float32, or float64
        return x.new_empty(shape, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def mixed_norm(x, weight, bias, p, n, eps):
    """weight * sum_k p_k pad((x[:n_k] - mean_k) / std_k) + bias: x (..., N), n increasing options, p their weights -> (..., N).

    Each block of channels between two options is reduced once; the blocks' means and squared deviations are merged
    into those of every prefix (Chan et al. 1979), which stays exact where E[x^2] - mean^2 would cancel.
    """
    if fused and x.is_cpu:
        return torch.ops.nas.layer_norm(x, weight, bias, p, n, eps)
    x, dtype = x.to(p.dtype), x.dtype # float32, as PyTorch's autocast does its norms
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
    y = weight * torch.cat([block * sum(scales[k:]) - sum(shifts[k:]) for k, block in enumerate(blocks)], dim=-1)
    y = y if bias is None else y + bias
    return y if torch.is_autocast_enabled("cuda") else y.to(dtype) # the norms of a single size stay in float32 there


def mixed_linear(x, W, bias, M, o, i):
    """x @ (W * M).T + bias: M (len(o), len(i)) is constant on the blocks that the row ends o and the column ends i cut W into.

    Frozen weights get no gradient, and that of M comes at no more than the price of the gradient to x: by block rows r,
    y_r = W_r (M_r * x), the products with W_r are what the gradient to x is made of.
    """
    if fused and x.is_cpu:
        if torch.is_autocast_enabled("cpu"): # which knows torch's own operations alone
            x, W = (t.to(torch.get_autocast_dtype("cpu")) for t in (x, W))
        return torch.ops.nas.block_linear(x, W, bias, M, o, i)
    rows, columns = ([b - a for a, b in zip((0, *n[:-1]), n, strict=True)] for n in (o, i))
    M = torch.cat([M.to(W.dtype)[:, [k]].expand(-1, size) for k, size in enumerate(columns)], dim=1) # (len(o), in)
    if W.requires_grad or not M.requires_grad:
        return F.linear(x, W * torch.cat([M[[k]].expand(size, -1) for k, size in enumerate(rows)]), bias)
    y = torch.cat([F.linear(x * m, W_r) for m, W_r in zip(M, W.split(rows), strict=True)], dim=-1)
    return y if bias is None else y + bias


def depthwise(x, weight, stride, padding, dilation):
    """A convolution of every channel by itself: x (B, C, H, W), weight (C, 1, k, k) -> (B, C, H', W'), of the kernel channels_last."""
    if fused and x.is_cpu:
        if torch.is_autocast_enabled("cpu"):
            x, weight = (t.to(torch.get_autocast_dtype("cpu")) for t in (x, weight))
        return torch.ops.nas.depthwise(x, weight, stride, padding, dilation)
    return F.conv2d(x, weight, None, stride, padding, dilation, weight.shape[0])


def window_attention(qkv, q_scale, y_scale, n_head, bias, mask=None):
    """mixed_attention() within windows, not causal: qkv (B * M, T, 3n), bias (heads, T, T) on the scores, those of a head count the
    first; mask: (M, T, T), of which window i has the i % M-th."""
    if fused and qkv.is_cpu:
        return torch.ops.nas.attention(qkv, q_scale, y_scale, n_head, bias, mask)
    y, B = 0, len(qkv)
    for j, h in enumerate(n_head):
        b, (q, k, v) = bias[None, :h], (t.unflatten(2, (h, -1)).transpose(1, 2) for t in qkv.chunk(3, dim=2)) # (B M, h, T, n / h)
        q = q * q_scale[j].view(h, 1, -1).to(q.dtype)
        if qkv.is_cpu: # where PyTorch has no fused attention that learns a bias
            scores = q @ k.transpose(2, 3)
            scores = scores + b if mask is None else (scores.unflatten(0, (-1, len(mask))) + (b + mask[:, None])).flatten(0, 1)
            out = scores.softmax(-1) @ v
        else:
            if mask is not None: # the windows of an image as its heads
                b, (q, k, v) = (b + mask[:, None]).flatten(0, 1)[None], (t.unflatten(0, (-1, len(mask))).flatten(1, 2) for t in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, b.to(q.dtype), scale=1.0).reshape(B, h, *v.shape[2:])
        y = y + out.transpose(1, 2).flatten(2) * y_scale[j].to(q.dtype)
    return y


def causal_attention(q, k, v, n_head, dropout=0.0, scale=None, is_causal=True):
    """(B, T, n) each -> (B, T, n): n_head heads of n / n_head channels side by side."""
    q, k, v = (t.unflatten(2, (n_head, -1)).transpose(1, 2) for t in (q, k, v)) # (B, n_head, T, n / n_head)
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale, is_causal=is_causal)
    return y.transpose(1, 2).flatten(2)


def mixed_attention(qkv, q_scale, y_scale, n_head, dropout=0.0):
    """sum_j y_scale_j * attention of n_head[j] heads on (q_scale_j * q, k, v). qkv: (B, T, 3n), scales: (len(n_head), n)."""
    if fused and qkv.is_cpu and not dropout:
        return torch.ops.nas.attention(qkv, q_scale, y_scale, n_head)
    q, k, v = qkv.chunk(3, dim=2)
    q_scale, y_scale = q_scale.to(q.dtype), y_scale.to(q.dtype) # else they would undo autocast
    return sum(causal_attention(q * q_scale[j], k, v, h, dropout, scale=1.0) * y_scale[j] for j, h in enumerate(n_head))


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


class Straight(torch.autograd.Function):
    """x * w for a scalar w that is 1: x itself, though not its gradient."""
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g, torch.dot(g.flatten().to(w.dtype), x.flatten().to(w.dtype))


def straight(x, w):
    """x * w, where w is the weight 1 of a chosen option, or None."""
    if w is None or not w.requires_grad:
        return x
    return x * w.to(x.dtype) if torch.compiler.is_compiling() else Straight.apply(x, w) # a compiler makes as little of the product

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
            M = (o.p[:, None] * o.share[:, o.last]).T @ i.share[:, i.last] # (len(o.n), len(i.n))
            return mixed_linear(x, self.weight, self.bias if self.bias is None else self.bias * o.S, M, o.n, i.n)
        if mix_i or mix_o:
            y = F.linear(x * i.S.to(x.dtype) if mix_i else x, self.weight, self.bias)
            return y * o.S.to(y.dtype) if mix_o else y
        if i is not None and i.weighted:
            x = straight(x, i.share if joint else i.S) # joint: p counts once, in what goes out
        y = F.linear(x, **self.take(i, o))
        return straight(y, o.S) if o is not None and o.weighted else y


class Embedding(nn.Embedding):
    """idx: (...) -> (..., dim). Mixture: sum_k p_k pad(E[idx, :e_k]) = E[idx] * S."""
    def take(self, e=None):
        return {"weight": take(self.weight, 1, e)}

    def forward(self, idx, e=None):
        if e is not None and e.mixed:
            return F.embedding(idx, self.weight) * e.S
        y = F.embedding(idx, **self.take(e))
        return straight(y, e.S) if e is not None and e.weighted else y


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
        return straight(y, e.S) if e is not None and e.weighted else y


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
            return mixed_norm(x, self.weight, self.bias if self.bias is None else self.bias * e.S, e.p, e.n, self.eps)
        slices = self.take(e)
        y = F.layer_norm(x, slices["weight"].shape, **slices, eps=self.eps)
        return straight(y, e.S) if e is not None and e.weighted else y


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
        return straight(y, e.S) if e is not None and e.weighted else y

# -----------------------------------------------------------------------------
# convolutions, x: (B, C, H, W): channels are prefixes, a kernel is the centred window of the largest

ENTANGLEMENTS = ("weights", "outputs", "none")


class Conv2d(nn.Conv2d):
    """x: (B, in, H, W) -> (B, out, H', W'). kernels: one size or more, all odd or all even. padding: of the largest kernel; None: the
    half of it, so that stride 1 keeps H and W. Depthwise, with groups = in = out: `o` is the size of both.

    k says which kernel: None for the largest, a size, a size and its weight, or the weights of all, (K,).
    Mixture, sizes and kernel chosen independently: sum_ijt a_i b_j c_t pad(W[:o_j, :c_i, window_t]) = W * m_out * m_in * m_kernel,
    and where no kernel is mixed S_out * (W @ (S_in * x)), which needs no gradient to W. In and out of the same choice:
    sum_k p_k pad(W[:o_k, :c_k]) = W * M, as in Linear.
    """
    def __init__(self, i, o, kernels, stride=1, dilation=1, groups=1, bias=False, padding=None):
        self.kernels = (kernels,) if isinstance(kernels, int) else tuple(kernels)
        K = self.kernels[-1]
        assert all(k % 2 == K % 2 for k in self.kernels), f"kernels {self.kernels} have no common centre"
        super().__init__(i, o, K, stride, dilation * (K // 2) if padding is None else padding, dilation, groups, bias)
        ring = (torch.arange(K) - K // 2).abs()
        ring = torch.maximum(ring[:, None], ring) # (K, K): how far a tap is from the centre
        window = torch.stack([ring <= k // 2 for k in self.kernels]).float()
        self.register_buffer("window", window, persistent=False) # (kernels, K, K)

    def take(self, i=None, o=None, k=None):
        k = self.kernels[-1] if k is None else k[0] if isinstance(k, tuple) else k
        cut = (self.kernels[-1] - k) // 2
        w = take(self.weight if self.groups > 1 else take(self.weight, 1, i), 0, o)
        return {"weight": w[..., cut:cut + k, cut:cut + k] if cut else w, "bias": self.bias if self.bias is None else take(self.bias, 0, o)}

    def conv(self, x, weight, bias=None):
        padding = self.padding[0] - self.dilation[0] * ((self.kernels[-1] - weight.shape[-1]) // 2)
        if self.groups == 1:
            return F.conv2d(x, weight, bias, self.stride, padding, self.dilation)
        y = depthwise(x, weight, self.stride[0], padding, self.dilation[0])
        return y if bias is None else y + bias.to(y.dtype)[:, None, None]

    def forward(self, x, i=None, o=None, k=None):
        S_i, S_o = (s.S[:, None, None] if s is not None and s.mixed else None for s in (i, o))
        if isinstance(k, torch.Tensor) and k.dim():
            M = (k @ self.window.flatten(1)).view(self.window.shape[1:]) # (K, K)
            M = M if S_o is None else M * S_o.unsqueeze(-1) # (out, 1, K, K)
            M = M if S_i is None else M * S_i
            return self.conv(x, self.weight * M, self.bias if self.bias is None or S_o is None else self.bias * o.S)
        joint = i is not None and o is not None and i.p is o.p and i.p is not None
        if joint and i.mixed:
            M = (o.p[:, None] * o.share).T @ i.share # (out, in)
            return self.conv(x, self.take(k=k)["weight"] * M[:, :, None, None], self.bias if self.bias is None else self.bias * o.S)
        if S_i is not None or S_o is not None:
            y = self.conv(x if S_i is None else x * S_i.to(x.dtype), **self.take(k=k))
            return y if S_o is None else y * S_o.to(y.dtype)
        if i is not None and i.weighted and not joint: # joint: p counts once, in what goes out
            x = straight(x, i.S)
        slices = self.take(i, o, k)
        if isinstance(k, tuple): # the bias belongs to no kernel
            y = straight(self.conv(x, slices["weight"]), k[1])
            y = y if slices["bias"] is None else y + slices["bias"][:, None, None]
        else:
            y = self.conv(x, **slices)
        return straight(y, o.S) if o is not None and o.weighted else y


class BatchNorm2d(nn.BatchNorm2d):
    """x: (B, C, H, W) -> the same (Ioffe & Szegedy 2015). Every channel has its own statistics, so a mixture over widths is S * norm(x).

    It also removes the scale of what comes in, and with it that of an entangled group of operations: `scale`, the group's total
    weight, is multiplied behind it, at no cost, as a part of its weight and bias.
    """
    def take(self, c=None, scale=None):
        return {name: None if t is None else take(t, 0, c) for name, t in (("weight", self.weight), ("bias", self.bias),
                ("running_mean", self.running_mean), ("running_var", self.running_var))}

    def forward(self, x, c=None, scale=None):
        if self.training and x.numel() == x.shape[1]:
            raise SystemExit("A BatchNorm in training needs more than one value a channel, and has one image of 1 x 1: give a larger "
                             "batch_size, or larger images or smaller strides.")
        mixed = c is not None and c.mixed
        slices = self.take(None if mixed else c)
        if mixed:
            scale = c.S if scale is None else c.S * scale
        if scale is not None:
            scale = scale.to(slices["running_mean"].dtype).expand_as(slices["running_mean"]).contiguous() # PyTorch reads it as if it were
            slices["weight"] = scale if self.weight is None else slices["weight"] * scale
            slices["bias"] = self.bias if self.bias is None else slices["bias"] * scale
        y = F.batch_norm(x, training=self.training, momentum=self.momentum, eps=self.eps, **slices)
        return straight(y, c.S) if c is not None and c.weighted else y


class Entangled(nn.Module):
    """An operation (x, i, o, k), as Conv2d is one, whose channels or kernel are chosen. make(i, o, kernels) makes it; combinations:
    [(i, o, kernel)] of the options.

    entanglement: "weights", one operation on mixed weights (weight superposition); "outputs", every combination runs on its slice of
    the shared weights (weight entanglement); "none", every combination has its own weights, and runs (weight sharing). The outputs of
    those that run are padded with zeros and mixed with the product of their weights; in and out of the same choice count once.
    """
    def __init__(self, make, combinations, entanglement="weights"):
        super().__init__()
        self.combinations, self.entanglement = list(combinations), entanglement
        self.options = [tuple(sorted(set(n))) for n in zip(*self.combinations, strict=True)] # of i, o and k
        i, o, kernels = self.options
        if entanglement == "none":
            self.ops = nn.ModuleDict({self.name(*c): make(*c[:2], c[2:]) for c in self.combinations})
        else:
            self.op = make(i[-1], o[-1], kernels)

    @staticmethod
    def name(i, o, k):
        return f"{i}_{o}_{k}"

    def forward(self, x, i=None, o=None, k=None):
        if self.entanglement == "weights": # the channels of x were weighted by what made them: once more would make rare ones rarer
            return self.op(x, i and i.unweighted, o, k)
        N, joint, y = self.options[1][-1], i is not None and o is not None and i.p is o.p, 0
        parts = [each(*part) for part in zip((i, o, k), self.options, strict=True)]
        for (a, p), (b, q), (c, r) in itertools.product(*parts):
            if (a, b, c) in self.combinations:
                one = self.ops[self.name(a, b, c)](x[:, :a]) if self.entanglement == "none" else self.op(x[:, :a], Size(a), Size(b), c)
                weights = [w for w in (p, None if joint else q, r) if w is not None]
                weight = math.prod(weights) if weights else None
                if all(len(part) == 1 for part in parts):
                    return straight(one, weight)
                y = y + F.pad(one * weight.to(one.dtype), (0, 0, 0, 0, 0, N - one.shape[1]))
        return y


def each(chosen, options):
    """[(option, its weight or None)] of what a Size has, or a kernel as in Conv2d."""
    if isinstance(chosen, Size):
        n, p = chosen.n, chosen.p
    elif isinstance(chosen, torch.Tensor):
        n, p = options, chosen
    else:
        n, p = chosen if isinstance(chosen, tuple) else (chosen or options[-1], None)
    return list(zip(n, p, strict=True)) if isinstance(n, tuple) else [(n, p)]


def check_entanglement(entanglement):
    if entanglement not in ENTANGLEMENTS:
        raise SystemExit(f"entanglement={entanglement!r} is not one of {', '.join(ENTANGLEMENTS)}.")


@contextlib.contextmanager
def batch_norms(net):
    """Evaluation, but for the BatchNorms, which take the statistics of the batch and keep none; gives them as a list."""
    norms, training = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)], net.training
    net.eval()
    for norm in norms:
        norm.momentum = 0.0
        norm.train()
    yield norms
    for norm in norms:
        norm.momentum = 0.1
    net.train(training)


@torch.no_grad()
def measure_norms(net, forward, n):
    """Sets the statistics of every BatchNorm to the mean over n batches; forward(i) runs the network on the i-th, without dropout."""
    with batch_norms(net) as norms:
        for i in range(n if norms else 0):
            for norm in norms:
                norm.momentum = 1 / (i + 1)
            forward(i)


# -----------------------------------------------------------------------------
# operations of a cell: x, its ReLU, k as in Conv2d, and a scale that the output is multiplied with or None

def scaled(x, scale):
    return x if scale is None else x * scale.to(x.dtype)


class ReLUConvBN(nn.Module):
    def __init__(self, i, o, kernels, stride=1, affine=True):
        super().__init__()
        self.conv, self.norm = Conv2d(i, o, kernels, stride), BatchNorm2d(o, affine=affine)

    def forward(self, x, r, k=None, scale=None):
        return self.norm(self.conv(r, None, None, k), None, scale)


class DilConv(nn.Module):
    """ReLU, depthwise with dilation 2, pointwise, norm."""
    def __init__(self, i, o, kernels, stride=1, affine=True):
        super().__init__()
        self.depthwise, self.pointwise = Conv2d(i, i, kernels, stride, dilation=2, groups=i), Conv2d(i, o, 1)
        self.norm = BatchNorm2d(o, affine=affine)

    def forward(self, x, r, k=None, scale=None):
        return self.norm(self.pointwise(self.depthwise(r, None, None, k)), None, scale)


class SepConv(nn.Module):
    """ReLU, depthwise, pointwise, norm, twice; the stride is in the first."""
    def __init__(self, i, o, kernels, stride=1, affine=True):
        super().__init__()
        self.depthwise_1, self.pointwise_1 = Conv2d(i, i, kernels, stride, groups=i), Conv2d(i, i, 1)
        self.norm_1 = BatchNorm2d(i, affine=affine)
        self.depthwise_2, self.pointwise_2 = Conv2d(i, i, kernels, groups=i), Conv2d(i, o, 1)
        self.norm_2 = BatchNorm2d(o, affine=affine)

    def forward(self, x, r, k=None, scale=None):
        x = F.relu(self.norm_1(self.pointwise_1(self.depthwise_1(r, None, None, k))))
        return self.norm_2(self.pointwise_2(self.depthwise_2(x, None, None, k)), None, scale)


class Pool(nn.Module):
    """Over 3 x 3; an average leaves out the padding. norm: a BatchNorm behind it. Pools of the same node compute the same: shared, a
    dict of the node, keeps it for the next."""
    def __init__(self, pool, C, stride=1, norm=False):
        super().__init__()
        self.pool, self.stride = pool, stride
        self.norm = BatchNorm2d(C, affine=False) if norm else None

    def forward(self, x, r, k=None, scale=None, shared=None):
        if shared is None or not (self.norm is None or self.norm.training): # in evaluation each norm has its own statistics
            return scaled(self.pooled(x), scale)
        if (self.pool, self.stride) not in shared:
            shared[self.pool, self.stride] = self.pooled(x), self.norm
        y, norm = shared[self.pool, self.stride]
        if norm is not self.norm:
            self.norm.running_mean.data.copy_(norm.running_mean) # autograd must not mind: training reads neither
            self.norm.running_var.data.copy_(norm.running_var)
        return scaled(y, scale)

    def pooled(self, x):
        if self.pool == "avg":
            y = F.avg_pool2d(x, 3, self.stride, 1, count_include_pad=False)
        else:
            y = F.max_pool2d(x, 3, self.stride, 1)
        return y if self.norm is None else self.norm(y)


class Skip(nn.Module):
    def forward(self, x, r, k=None, scale=None):
        return scaled(x, scale)


class FactorizedReduce(nn.Module):
    """ReLU, half of the channels from the even and half from the odd rows and columns by 1 x 1 convolutions of stride 2, norm."""
    def __init__(self, i, o, affine=True):
        super().__init__()
        if o % 2:
            raise SystemExit(f"A skip of stride 2 makes its {o} channels in two halves: choose an even number, by init_channels or "
                             "partial_channels.")
        self.conv_1, self.conv_2 = Conv2d(i, o // 2, 1, 2), Conv2d(i, o // 2, 1, 2)
        self.norm = BatchNorm2d(o, affine=affine)

    def forward(self, x, r, k=None, scale=None):
        odd = F.pad(r, (0, 1, 0, 1))[:, :, 1:, 1:]
        return self.norm(torch.cat((self.conv_1(r), self.conv_2(odd)), 1), None, scale)


def kernel_of(primitive):
    """("sep_conv", 5) of sep_conv_5x5, ("skip_connect", None) of skip_connect."""
    name, _, size = primitive.rpartition("_")
    return (name, int(size.split("x")[0])) if size[:1].isdigit() else (primitive, None)


class Edge(nn.Module):
    """One operation between two nodes of a cell, or a choice of some.

    ops: name, such as "sep_conv" -> a function of (kernels, stride) that makes the module of an operation. entanglement: "weights",
    operations that differ in their kernel alone share weights, and their mixture is one operation on mixed weights (weight
    superposition); "outputs", they share weights, and each runs (weight entanglement); "none", each has its own weights, and runs
    (weight sharing). group_weight: mixed weights are followed by their total weight, which a BatchNorm has removed; without it, as in
    the literature, the group as a whole gets no gradient. partial_channels: k, the operations are of the first C / k channels, and the
    others go around them, pooled where the stride is 2; all are shuffled, so that the next edge sees others (PC-DARTS, Xu et al. 2020).
    """
    def __init__(self, primitives, ops, stride=1, entanglement="weights", group_weight=True, partial_channels=1):
        super().__init__()
        self.primitives, self.stride, self.entanglement, self.group_weight = tuple(primitives), stride, entanglement, group_weight
        self.partial_channels, self.pruned = partial_channels, () # pruned: places of what is no longer an option
        if entanglement not in ENTANGLEMENTS:
            raise SystemExit(f"entanglement='{entanglement}' is not one of {', '.join(ENTANGLEMENTS)}.")
        self.identity = self.primitives == ("skip_connect",) and stride == 1
        self.groups = {} # name -> (its places in primitives, its kernels)
        for place, primitive in sorted(enumerate(primitives), key=lambda item: kernel_of(item[1])[1] or 0):
            name, kernel = kernel_of(primitive)
            places, kernels = self.groups.setdefault(primitive if entanglement == "none" else name, ([], []))
            places.append(place)
            kernels.append(kernel)
        self.ops = nn.ModuleDict({name: ops[kernel_of(primitives[places[0]])[0]](tuple(kernels), stride)
                                  for name, (places, kernels) in self.groups.items() if name != "none"})

    def forward(self, x, r, w=None, shared=None):
        """x: (B, C, H, W), r: its ReLU. w: None where there is one operation, an operation, one and its weight, or weights (K,). shared:
        a dict for what the edges from x have in common."""
        k, n = self.partial_channels, x.shape[1] // self.partial_channels
        if k == 1:
            return self.operate(x, r, w, shared)
        y, rest = self.operate(x[:, :n], r[:, :n], w, shared), x[:, n:]
        y = torch.cat((y, rest if self.stride == 1 else F.max_pool2d(rest, 2, ceil_mode=True)), 1)
        return y.unflatten(1, (k, n)).transpose(1, 2).flatten(1, 2)

    def run(self, name, x, r, k, scale, shared):
        op = self.ops[name]
        return op(x, r, k, scale, shared) if isinstance(op, Pool) else op(x, r, k, scale)

    def operate(self, x, r, w, shared=None):
        if isinstance(w, torch.Tensor):
            return self.mixture(x, r, w, shared)
        primitive, p = w if isinstance(w, tuple) else (w or self.primitives[0], None)
        if primitive == "none":
            return torch.zeros_like(x[:, :, ::self.stride, ::self.stride])
        name, kernel = (primitive, None) if primitive in self.ops else kernel_of(primitive)
        if self.groups[name][1] == [kernel]:
            kernel = None # there is no other
        mixing = kernel and p is not None and self.entanglement == "weights"
        y = self.run(name, x, r, (kernel, p) if mixing else kernel, None, shared)
        return straight(y, None if mixing and not self.group_weight else p)

    def mixture(self, x, r, w, shared):
        y = 0
        for name, (places, kernels) in self.groups.items():
            if name != "none" and self.entanglement == "weights" and len(kernels) > 1:
                p, total = w[places], w[places].sum()
                scale = total if self.group_weight else (total > 0).to(total.dtype) # a norm of 0 is not 0
                y = y + self.run(name, x, r, p, scale, shared)
            elif name != "none":
                for place, kernel in zip(places, kernels, strict=True):
                    if place not in self.pruned:
                        y = y + self.run(name, x, r, kernel if len(kernels) > 1 else None, w[place], shared)
        return y

    def prune(self, mask):
        """No longer runs the operations where mask: (K,) is True, whose weights are 0 from here on; a shared weight stays as large."""
        self.pruned = tuple(mask.nonzero().flatten().tolist())
        for name, (places, _) in list(self.groups.items()):
            if set(places) <= set(self.pruned):
                del self.groups[name]
                if name in self.ops:
                    del self.ops[name]


def partial(C, partial_channels):
    """The channels of an edge's operations, in a cell of C channels a node."""
    if partial_channels < 1 or C % partial_channels:
        raise SystemExit(f"partial_channels={partial_channels} does not divide the {C} channels of a node: change it or init_channels.")
    return C // partial_channels


def drop_path(x, p):
    """x: (B, ...) with every sample's part set to 0 with probability p, the others scaled by 1 / (1 - p) (Larsson et al. 2017)."""
    if not p:
        return x
    return x * ((torch.rand((len(x), *[1] * (x.dim() - 1)), device=x.device) >= p).to(x.dtype) / (1 - p)) # one pass over x


def nodes(states, edges, w, drop=0.0):
    """The nodes of a cell: each is the sum of its edges from all states before it, in the order of those.

    states: the cell's inputs, (B, C, H, W) each; edges: of the first node, of the second, ..., an Edge or None; w: what each runs
    with. drop: the probability of drop_path() for all edges but identities, in networks without a choice.
    """
    states, edges, inputs, i = [(x, F.relu(x), {}) for x in states], list(edges), len(states), 0
    while i < len(edges):
        y = 0
        for edge, (x, r, shared), choice in zip(edges[i:], states, w[i:], strict=False): # as many as there are states
            if edge is not None:
                term = edge(x, r, choice, shared)
                y = y + (term if edge.identity else drop_path(term, drop))
        i += len(states)
        states.append((y, F.relu(y), {}))
    return [x for x, *_ in states[inputs:]]


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

    global fused
    kernels, fused = fused, False # PyTorch's counter knows its own operations alone
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        each_read(net, run, count)
    fused = kernels
    return {"params": sum(read.values()), "flops": counter.get_total_flops()}


class EdgeCosts:
    """The cost of a network whose edges choose their operations: the sum over its edges, and a constant.

    edges: [(Edge, the name of its choice, row)]; run(arch): the network's hard forward of one image.
    """
    def __init__(self, net, edges, run):
        shapes, known = {}, {}
        arch = {name: [None] * choice.repeat for name, choice in net.choices.items()}
        for edge, choice, row in edges:
            arch[choice][row] = next(primitive for i, primitive in enumerate(edge.primitives) if i not in edge.pruned)
        hooks = [edge.register_forward_pre_hook(lambda edge, args: shapes.update({edge: args[0].shape})) for edge, *_ in edges]
        base = measure_cost(net, lambda: run(arch))
        for hook in hooks:
            hook.remove()

        def cost_of(edge, primitive):
            key = (shapes[edge], edge.stride, primitive)
            if key not in known:
                x = next(net.parameters()).new_zeros(shapes[edge])
                known[key] = list(measure_cost(edge, lambda: edge(x, x, primitive)).values())
            return known[key]

        self.rows = {} # (choice, row) -> (K, 2), summed over the cells that share it
        for edge, choice, row in edges:
            table = [[0, 0] if i in edge.pruned else cost_of(edge, primitive) for i, primitive in enumerate(edge.primitives)]
            table = torch.tensor(table).double()
            self.rows[choice, row] = self.rows.get((choice, row), 0) + table
        self.base = torch.tensor(list(base.values())).double() - self(one_hot(net.choices, arch), 0)

    def __call__(self, weights, base=None):
        """(2,): params and flops, of weights their expectations."""
        return sum(weights[choice][row].double().cpu() @ table for (choice, row), table in self.rows.items()) + (
            self.base if base is None else base)


class ImageNetwork(nn.Module):
    """What the networks of search_spaces/ have in common; each has its config, its choices and expected_cost(weights)."""

    def run(self, arch=None):
        """One image through it, of whatever content."""
        c = self.config
        return self(next(self.parameters()).new_zeros(1, c.in_channels, c.img_size, c.img_size), None, arch)

    def extract(self, arch):
        """The stand-alone network of an architecture, with the weights it has here."""
        arch = check_arch(self.choices, arch)
        return extract(self, type(self)(self.config, arch).to(next(self.parameters())), lambda: self.run(arch))

    def cost(self, arch=None):
        """{"params", "flops"} of an architecture: whole numbers, flops of one image; of weights: the differentiable expectations."""
        mixed = arch is not None and all(torch.is_tensor(w) for w in arch.values())
        return self.expected_cost(arch) if mixed else measure_cost(self, lambda: self.run(arch))


class CellNetwork(ImageNetwork):
    """One whose cells, in self.cells, have edges that choose their operations: cell.name is the choice, and the places of cell.edges are
    its rows."""

    def expected_cost(self, weights):
        if not hasattr(self, "costs"):
            self.costs = EdgeCosts(self, self.edges(), self.run)
        return dict(zip(("params", "flops"), self.costs(weights), strict=True))

    def edges(self):
        """[(Edge, its choice, its row)]"""
        return [(edge, cell.name, i) for cell in self.cells if hasattr(cell, "edges") for i, edge in enumerate(cell.edges)]

    def prune(self, mask):
        """Drops the operations of which nothing is left, for good. mask: choice -> (rows, K), True for what is no longer an option."""
        for edge, choice, row in self.edges():
            edge.prune(mask[choice][row])


def widen(old, new, generator, optimizers=()):
    """Fills `new` from `old`, a network with all its names and smaller shapes: where a dimension grew, the rest of it are copies of
    others drawn at random, the same ones for all that grew so (after Net2WiderNet, Chen et al. 2016). optimizers: that of old and that of
    new, whose state is filled likewise. Returns new."""
    drawn = {}

    def grow(t, shape):
        for dim, (a, b) in enumerate(zip(t.shape, shape, strict=True)):
            if b > a:
                if (a, b) not in drawn:
                    drawn[a, b] = torch.cat((torch.arange(a), torch.randint(a, (b - a,), generator=generator)))
                t = t.index_select(dim, drawn[a, b].to(t.device))
        return t

    theirs = old.state_dict()
    new.load_state_dict({name: grow(theirs[name], t.shape) for name, t in new.state_dict().items()})
    if optimizers:
        theirs = dict(old.named_parameters())
        for name, q in new.named_parameters():
            p = theirs[name]
            optimizers[1].state[q] = {key: grow(t, q.shape) if isinstance(t, torch.Tensor) and t.shape == p.shape else t
                                      for key, t in optimizers[0].state[p].items()}
    return new
