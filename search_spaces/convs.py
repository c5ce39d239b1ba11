"""What several spaces share: entangled convolutions and BatchNorms, the base of image networks."""
import contextlib
import itertools
import math
from types import SimpleNamespace

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fused_ops
from configurator import ConfigError, defaults
from fused_ops import depthwise
from supernet import (
    ALL, Sampled, Size, check_arch, extract, slice_dim, straight_through, times_weight,
    visit_slices,
)

ENTANGLEMENTS = ("weights", "outputs", "none") # see Entangled


def check_entanglement(entanglement):
    if entanglement not in ENTANGLEMENTS:
        allowed = ", ".join(ENTANGLEMENTS)
        raise ConfigError(f"entanglement={entanglement!r} is not one of {allowed}.")


class Conv2d(nn.Conv2d):
    """x: (B, in, H, W) -> (B, out, H', W').

    kernels: one size, or the options, all odd or all even; a smaller kernel is the centred window
    of the largest. padding: that of the largest kernel; None is half of it, so that stride 1 keeps
    H and W. Depthwise, with groups = in = out: `o` is the Size of both.

    Mixture, sizes and kernel chosen independently with weights a, b and c:
        sum_ijt a_i b_j c_t pad(W[:o_j, :c_i, window_t]) = W * m_out * m_in * m_kernel
    The same without a mixture of kernels: S_out * (W @ (S_in * x)), which needs no gradient to W.
    Mixture, in and out of the same choice: sum_k p_k pad(W[:o_k, :c_k]) = W * M, as in Linear.
    """
    def __init__(self, i, o, kernels, stride=1, dilation=1, groups=1, bias=False, padding=None):
        self.kernels = (kernels,) if isinstance(kernels, int) else tuple(kernels)
        K = self.kernels[-1]
        same_centre = all(k % 2 == K % 2 for k in self.kernels)
        assert same_centre, f"kernels {self.kernels} have no common centre"
        padding = dilation * (K // 2) if padding is None else padding
        super().__init__(i, o, K, stride, padding, dilation, groups, bias)
        ring = (torch.arange(K) - K // 2).abs()
        ring = torch.maximum(ring[:, None], ring) # (K, K): how far an entry is from the centre
        window = torch.stack([ring <= k // 2 for k in self.kernels]).float()
        self.register_buffer("window", window, persistent=False) # (kernels, K, K)

    def slice_params(self, i=None, o=None, k=ALL):
        kernel = k.option or self.kernels[-1]
        cut = (self.kernels[-1] - kernel) // 2
        w = self.weight if self.groups > 1 else slice_dim(self.weight, 1, i)
        w = slice_dim(w, 0, o)
        return {"weight": w[..., cut:cut + kernel, cut:cut + kernel] if cut else w,
                "bias": self.bias if self.bias is None else slice_dim(self.bias, 0, o)}

    def conv(self, x, weight, bias=None):
        cut = (self.kernels[-1] - weight.shape[-1]) // 2
        padding = self.padding[0] - self.dilation[0] * cut
        if self.groups == 1:
            if weight.shape[-1] == 1 and self.stride[0] > 1 and padding == 0:
                # the same by a slice: oneDNN writes past its workspace in the gradient of a strided
                # 1 x 1 convolution of few channels, and gives wrong ones (oneDNN issue 6035)
                x = x[..., ::self.stride[0], ::self.stride[1]]
                return F.conv2d(x, weight, bias)
            return F.conv2d(x, weight, bias, self.stride, padding, self.dilation)
        y = depthwise(x, weight, self.stride[0], padding, self.dilation[0])
        return y if bias is None else y + bias.to(y.dtype)[:, None, None]

    def forward(self, x, i=None, o=None, k=ALL):
        """i, o: the Sizes of in and out; k: Sampled, the kernel."""
        if k.is_mixture or (i and i.is_mixture) or (o and o.is_mixture):
            return self.mixture(x, i, o, k)
        joint = i and o and i.p is o.p # of the same choice: p counts once, in what goes out
        if i and i.is_straight_through and not joint:
            x = straight_through(x, i.coverage)
        slices = self.slice_params(i, o, k)
        if k.weight is None:
            y = self.conv(x, **slices)
        else: # the bias belongs to no kernel
            y = straight_through(self.conv(x, slices["weight"]), k.weight)
            y = y if slices["bias"] is None else y + slices["bias"][:, None, None]
        return times_weight(y, o)

    def mixture(self, x, i, o, k):
        S_i, S_o = (s.coverage[:, None, None] if s and s.is_mixture else None for s in (i, o))
        weighted_bias = self.bias if self.bias is None or S_o is None else self.bias * o.coverage
        if k.is_mixture:
            M = (k.weights @ self.window.flatten(1)).view(self.window.shape[1:]) # (K, K)
            M = M if S_o is None else M * S_o.unsqueeze(-1) # (out, 1, K, K)
            M = M if S_i is None else M * S_i # (out, in, K, K)
            return self.conv(x, self.weight * M, weighted_bias)
        if i and o and i.p is o.p:
            M = (o.p[:, None] * o.mask).T @ i.mask # (out, in)
            weight = self.slice_params(k=k)["weight"] * M[:, :, None, None]
            return self.conv(x, weight, weighted_bias)
        y = self.conv(x if S_i is None else x * S_i.to(x.dtype), **self.slice_params(k=k))
        return y if S_o is None else y * S_o.to(y.dtype)


class Entangled(nn.Module):
    """An operation (x, i, o, k) such as Conv2d, whose channels or kernel are chosen.

    make: a function (i, o, kernels) that makes the operation. combinations: [(i, o, kernel)], those
    of the options that may occur. entanglement:
        weights    one operation on mixed weights (weight superposition)
        outputs    every combination runs on its slice of the shared weights (weight entanglement)
        none       every combination has its own weights, and runs (weight sharing)
    The outputs of those that run are padded with zeros and mixed with the product of their weights;
    in and out of the same choice count once.
    """
    def __init__(self, make, combinations, entanglement="weights"):
        super().__init__()
        self.combinations, self.entanglement = list(combinations), entanglement
        # of i, o and k
        self.options = [tuple(sorted(set(n))) for n in zip(*self.combinations, strict=True)]
        i, o, kernels = self.options
        if entanglement == "none":
            self.ops = nn.ModuleDict({self.name(i, o, k): make(i, o, (k,))
                                      for i, o, k in self.combinations})
        else:
            self.op = make(i[-1], o[-1], kernels)

    @staticmethod
    def name(i, o, k):
        return f"{i}_{o}_{k}"

    def forward(self, x, i=None, o=None, k=ALL):
        if self.entanglement == "weights": # the layer before applied the weights of i to x
            return self.op(x, i and i.unweighted, o, k)
        widest = [options[-1] for options in self.options]
        parts = [i.pairs if i else [(widest[0], None)], o.pairs if o else [(widest[1], None)],
                 k.pairs or [(widest[2], None)]]
        joint, y = i and o and i.p is o.p, 0
        for (a, p), (b, q), (c, r) in itertools.product(*parts):
            if (a, b, c) not in self.combinations:
                continue
            if self.entanglement == "none":
                one = self.ops[self.name(a, b, c)](x[:, :a])
            else:
                one = self.op(x[:, :a], Size(a), Size(b), Sampled((c,), c))
            weights = [w for w in (p, None if joint else q, r) if w is not None]
            weight = math.prod(weights) if weights else None
            if all(len(part) == 1 for part in parts):
                return straight_through(one, weight)
            rest = widest[1] - one.shape[1]
            y = y + F.pad(one * weight.to(one.dtype), (0, 0, 0, 0, 0, rest))
        return y


class BatchNorm2d(nn.BatchNorm2d):
    """x: (B, C, H, W) -> the same (Ioffe & Szegedy 2015).

    Every channel has its own statistics, so a mixture over widths is S * norm(x). A norm also
    removes the scale of what comes in, and with it the weight of an entangled group of operations.
    So `scale`, the group's total weight, is multiplied behind the norm, as a part of its weight and
    bias, which costs nothing.
    """
    def slice_params(self, c=None, scale=None):
        names = ("weight", "bias", "running_mean", "running_var")
        params = {name: getattr(self, name) for name in names}
        return {name: None if t is None else slice_dim(t, 0, c) for name, t in params.items()}

    def forward(self, x, c=None, scale=None):
        if self.training and x.numel() == x.shape[1]:
            raise ConfigError("A BatchNorm in training needs more than one value a channel, but it "
                              "has one image of 1 x 1: give a larger batch_size, larger images or "
                              "smaller strides.")
        mixed = c and c.is_mixture
        slices = self.slice_params(None if mixed else c)
        if mixed:
            scale = c.coverage if scale is None else c.coverage * scale
        if scale is not None:
            mean = slices["running_mean"]
            # PyTorch reads it as if it were contiguous
            scale = scale.to(mean.dtype).expand_as(mean).contiguous()
            slices["weight"] = scale if self.weight is None else slices["weight"] * scale
            slices["bias"] = self.bias if self.bias is None else slices["bias"] * scale
        y = F.batch_norm(x, training=self.training, momentum=self.momentum, eps=self.eps, **slices)
        return times_weight(y, c)


@contextlib.contextmanager
def batch_norms(net):
    """Evaluation, in which the BatchNorms use the statistics of the batch, and keep none; yields
    them as a list."""
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    training = net.training
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
    """Sets the statistics of every BatchNorm to the mean over n batches; forward(i) runs the
    network on batch i, without dropout."""
    with batch_norms(net) as norms:
        for i in range(n if norms else 0):
            for norm in norms:
                norm.momentum = 1 / (i + 1)
            forward(i)


def drop_path(x, p):
    """x: (B, ...) with every sample set to 0 with probability p, and the others scaled by
    1 / (1 - p) (Larsson et al. 2017)."""
    if not p:
        return x
    kept = torch.rand((len(x), *[1] * (x.dim() - 1)), device=x.device) >= p
    return x * (kept.to(x.dtype) / (1 - p)) # one pass over x


# -----------------------------------------------------------------------------
# image networks

def measure_cost(net, run):
    """{"params", "flops"} of the hard forward run(): the weights that it reads, and 2 FLOPs a
    multiply-add in products and convolutions."""
    read = {}

    def count(name, module, key, value):
        if isinstance(getattr(module, key), nn.Parameter):
            read[name, key] = value.numel()

    # PyTorch's counter knows its own operations alone
    kernels, fused_ops.enabled = fused_ops.enabled, False
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        visit_slices(net, run, count)
    fused_ops.enabled = kernels
    return {"params": sum(read.values()), "flops": counter.get_total_flops()}


class ImageNetwork(nn.Module):
    has_plain_kernels = True # fused_ops.cpp has some for its plain layers, too
    """The base of the networks of search_spaces/.

    Each has config (a namespace), choices, rows (see set_choices), expected_cost(weights), and

    forward(x, targets=None, arch=None): x (B, in_channels, H, W), targets (B,) classes or None
        -> logits (B, num_classes), loss or None. arch: None for a network that has nothing to
        choose, else an architecture, or weights for a mixture.
    """

    def run(self, arch=None):
        """A forward pass of one image; what is in it does not matter."""
        c = self.config
        image = next(self.parameters()).new_zeros(1, c.in_channels, c.img_size, c.img_size)
        return self(image, None, arch)

    def extract(self, arch):
        """The stand-alone network of an architecture, with the weights it has here."""
        arch = check_arch(self.choices, arch)
        small = type(self)(self.config, arch).to(next(self.parameters()))
        return extract(self, small, lambda: self.run(arch))

    def cost(self, arch=None):
        """{"params", "flops"} of an architecture: whole numbers, flops of one image; of weights:
        the differentiable expectations."""
        if arch is not None and all(torch.is_tensor(w) for w in arch.values()):
            return self.expected_cost(arch)
        return measure_cost(self, lambda: self.run(arch))


def with_loss(logits, targets):
    """What forward() of a classifier returns."""
    return logits, None if targets is None else F.cross_entropy(logits, targets)


def settings(config, namespace, **of_data):
    """The keys of a space, as a namespace: their values in the dict `config`, or the defaults.

    namespace: globals() of the space's file. of_data: the defaults of img_size, in_channels and
    num_classes, which the data set decides. Other keys of config are ignored.
    """
    known = defaults(namespace) | of_data
    return SimpleNamespace(**known | {key: config[key] for key in known if key in config})
