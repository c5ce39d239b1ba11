"""Entangled convolutions and BatchNorms, which several spaces share."""
import torch
from torch.nn import functional as F
import contextlib
import itertools
import math
import torch.nn as nn
from fused_ops import depthwise
from supernet import Size, check_arch, extract, measure_cost, straight_through, take


ENTANGLEMENTS = ("weights", "outputs", "none")


def check_entanglement(entanglement):
    if entanglement not in ENTANGLEMENTS:
        raise SystemExit(f"entanglement={entanglement!r} is not one of {', '.join(ENTANGLEMENTS)}.")


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
        S_i, S_o = (s.coverage[:, None, None] if s is not None and s.mixed else None for s in (i, o))
        if isinstance(k, torch.Tensor) and k.dim():
            M = (k @ self.window.flatten(1)).view(self.window.shape[1:]) # (K, K)
            M = M if S_o is None else M * S_o.unsqueeze(-1) # (out, 1, K, K)
            M = M if S_i is None else M * S_i
            return self.conv(x, self.weight * M, self.bias if self.bias is None or S_o is None else self.bias * o.coverage)
        joint = i is not None and o is not None and i.p is o.p and i.p is not None
        if joint and i.mixed:
            M = (o.p[:, None] * o.mask).T @ i.mask # (out, in)
            return self.conv(x, self.take(k=k)["weight"] * M[:, :, None, None], self.bias if self.bias is None else self.bias * o.coverage)
        if S_i is not None or S_o is not None:
            y = self.conv(x if S_i is None else x * S_i.to(x.dtype), **self.take(k=k))
            return y if S_o is None else y * S_o.to(y.dtype)
        if i is not None and i.weighted and not joint: # joint: p counts once, in what goes out
            x = straight_through(x, i.coverage)
        slices = self.take(i, o, k)
        if isinstance(k, tuple): # the bias belongs to no kernel
            y = straight_through(self.conv(x, slices["weight"]), k[1])
            y = y if slices["bias"] is None else y + slices["bias"][:, None, None]
        else:
            y = self.conv(x, **slices)
        return straight_through(y, o.coverage) if o is not None and o.weighted else y


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
                    return straight_through(one, weight)
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
            scale = c.coverage if scale is None else c.coverage * scale
        if scale is not None:
            scale = scale.to(slices["running_mean"].dtype).expand_as(slices["running_mean"]).contiguous() # PyTorch reads it as if it were
            slices["weight"] = scale if self.weight is None else slices["weight"] * scale
            slices["bias"] = self.bias if self.bias is None else slices["bias"] * scale
        y = F.batch_norm(x, training=self.training, momentum=self.momentum, eps=self.eps, **slices)
        return straight_through(y, c.coverage) if c is not None and c.weighted else y


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


def drop_path(x, p):
    """x: (B, ...) with every sample's part set to 0 with probability p, the others scaled by 1 / (1 - p) (Larsson et al. 2017)."""
    if not p:
        return x
    return x * ((torch.rand((len(x), *[1] * (x.dim() - 1)), device=x.device) >= p).to(x.dtype) / (1 - p)) # one pass over x


class ImageNetwork(nn.Module):
    has_plain_kernels = True
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
