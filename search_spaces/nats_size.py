"""
NATS-Bench's size space (Dong et al. 2021): the widths of a fixed network's 5 stages, 8 options each, 32,768 architectures.

The cell is |nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|skip_connect~0|nor_conv_3x3~1|nor_conv_3x3~2| of NAS-Bench-201, used
three times: stem to c0, cell c0 to c0, residual block c0 to c1, cell c1 to c2, residual block c2 to c3, cell c3 to c4. A skip between
different widths is a 1 x 1 convolution and a norm. The genotype is c0:c1:c2:c3:c4.
"""
import re
from itertools import product
from types import SimpleNamespace

import torch
import torch.nn as nn
from torch.nn import functional as F

from configurator import defaults
from search_spaces.convs import BatchNorm2d, Conv2d, Entangled, ImageNetwork, check_entanglement
from supernet import Choice, check_arch, options_of, prefix_masks, size_of, straight_through

# -----------------------------------------------------------------------------
channels = [8, 16, 24, 32, 40, 48, 56, 64] # of each stage
entanglement = 'weights' # mixed weights; 'outputs': every combination of in and out runs; 'none': each has its own weights
affine = True # weight and bias in the BatchNorms of cells; searches do without
# -----------------------------------------------------------------------------

CHANNELS = tuple(channels)
NATS_BENCH = "sss", "90" # this space's name in NATS-Bench, and the epochs that its networks were trained for
STAGES = ((0, 0), (0, 1), (1, 2), (2, 3), (3, 4)) # in and out of cell, residual block, cell, residual block, cell


class ConvNorm(nn.Module):
    """A convolution and its norm; the weights of a mixture over widths count behind the norm. kernel 0: the norm alone."""
    def __init__(self, i, o, kernels, stride=1, affine=True):
        super().__init__()
        self.conv = Conv2d(i, o, kernels, stride) if kernels != (0,) else None
        self.norm = BatchNorm2d(o, affine=affine)

    def forward(self, x, i=None, o=None, k=None):
        return self.norm(x if self.conv is None else self.conv(x, i, o and o.unweighted), o)


class Skip(nn.Module):
    """The identity between equal widths, else a 1 x 1 convolution and norm, each with the weight of those pairs of widths."""
    def __init__(self, pairs, c):
        super().__init__()
        self.entanglement, different = c.entanglement, [(a, b, 1) for a, b in pairs if a != b]
        self.change = Entangled(lambda *args: ConvNorm(*args, affine=c.affine), different, c.entanglement) if different else None

    def forward(self, x, i=None, o=None):
        if self.change is None or i is None:
            return x if self.change is None else self.change(x)
        if not o.mixed and i.n == o.n:
            return straight_through(x, i.p * o.p if o.weighted else None)
        if self.entanglement == "weights": # one convolution for all pairs: the weight of out is that of its pairs
            different = o._replace(p=o.p * (i.p.sum() - i.p) if o.mixed else i.p * o.p if o.weighted else None)
        y = self.change(x, i, different if self.entanglement == "weights" else o)
        return x * ((i.p * o.p) @ o.mask)[:, None, None].to(x.dtype) + y if o.mixed else y


class Cell(nn.Module):

    def __init__(self, pairs, c):
        """pairs: the widths of in and out together."""
        super().__init__()
        inside = [(b, b) for b in sorted({b for _, b in pairs})]

        def conv(pairs):
            return Entangled(lambda *args: ConvNorm(*args, affine=c.affine), [(a, b, 3) for a, b in pairs], c.entanglement)
        self.conv_10, self.conv_20, self.skip_30 = conv(pairs), conv(pairs), Skip(pairs, c)
        self.conv_21, self.conv_31, self.conv_32 = conv(inside), conv(inside), conv(inside)

    def forward(self, x, i, o):
        r = F.relu(x)
        r_1 = F.relu(self.conv_10(r, i, o))
        r_2 = F.relu(self.conv_20(r, i, o) + self.conv_21(r_1, o, o))
        return self.skip_30(x, i, o) + self.conv_31(r_1, o, o) + self.conv_32(r_2, o, o)


class ResidualBlock(nn.Module):
    """Two ReLU-convolution-norms, the first of stride 2, beside a pooled 1 x 1 convolution."""
    def __init__(self, pairs, c):
        super().__init__()
        inside = [(b, b, 3) for b in sorted({b for _, b in pairs})]
        self.conv_1 = Entangled(lambda *args: ConvNorm(*args, stride=2), [(a, b, 3) for a, b in pairs], c.entanglement)
        self.conv_2 = Entangled(ConvNorm, inside, c.entanglement)
        self.shortcut = Entangled(Conv2d, [(a, b, 1) for a, b in pairs], c.entanglement)

    def forward(self, x, i, o):
        y = self.conv_2(F.relu(self.conv_1(F.relu(x), i, o)), o, o)
        return self.shortcut(F.avg_pool2d(x, 2, ceil_mode=True), i, o) + y


class NATSSize(ImageNetwork):

    def __init__(self, c, arch=None):
        super().__init__()
        self.config = c
        check_entanglement(c.entanglement)
        self.n = options_of(c.channels, "channels")
        self.choices = {"channels": Choice(self.n, repeat=5)}
        self.register_buffer("mask", prefix_masks(self.n, self.n[-1]), persistent=False) # (options, channels)
        n = [self.n] * 5
        if arch is not None: # nothing is left to choose
            n, self.choices = [(o,) for o in check_arch(self.choices, arch)["channels"]], {}
        self.stem = Entangled(ConvNorm, product([c.in_channels], n[0], [3]), c.entanglement)
        pairs = [list(zip(n[i], n[o], strict=True)) if i == o else list(product(n[i], n[o])) for i, o in STAGES]
        self.stages = nn.ModuleList([(ResidualBlock if stage % 2 else Cell)(pairs[stage], c) for stage in range(5)])
        self.norm = Entangled(ConvNorm, [(o, o, 0) for o in n[4]], c.entanglement)
        self.classifier = Entangled(lambda *args: Conv2d(*args, bias=True), product(n[4], [c.num_classes], [1]), c.entanglement)

    def forward(self, x, targets=None, arch=None):
        """x: (B, in_channels, H, W), targets: (B,) classes or None -> logits (B, num_classes), loss or None. arch: None for a
        network without choices, else an architecture, or weights for a mixture."""
        open_choices = any(len(c.options) > 1 for c in self.choices.values())
        assert arch is not None or not open_choices, "a supernet needs weights or an architecture as its third argument"
        sizes = [size_of(value, self.n, self.mask) for value in ([None] * 5 if arch is None else arch["channels"])]
        x = self.stem(x, None, sizes[0])
        for stage, (i, o) in zip(self.stages, STAGES, strict=True):
            x = stage(x, sizes[i], sizes[o])
        x = F.relu(self.norm(x, sizes[4], sizes[4])).mean((2, 3), keepdim=True) # (B, c4, 1, 1)
        logits = self.classifier(x, sizes[4]).flatten(1)
        return logits, None if targets is None else F.cross_entropy(logits, targets)

    def expected_cost(self, arch):
        c, w, n = self.config, arch["channels"].double().cpu(), torch.tensor(self.n).double()
        mean, square, side = w @ n, w @ n ** 2, c.img_size
        convolutions, norms = [(9 * c.in_channels * mean[0], side)], 2 * (mean[0] + mean[4])
        for stage, (i, o) in enumerate(STAGES):
            io = square[i] if i == o else mean[i] * mean[o] # widths are independent, apart from themselves
            if stage % 2:
                side = -(-side // 2)
                convolutions.append((10 * io + 9 * square[o], side))
                norms = norms + 4 * mean[o]
            else:
                equal = w[i] if i == o else w[i] * w[o] # of each width: the chance that the skip keeps it
                convolutions.append((18 * io + 27 * square[o] + io - equal @ n ** 2, side))
                norms = norms + c.affine * (10 * mean[o] + 2 * (mean[o] - equal @ n))
        convolutions.append((mean[4] * c.num_classes, 1))
        return {"params": norms + c.num_classes + sum(weights for weights, _ in convolutions),
                "flops": sum(2 * side * side * weights for weights, side in convolutions)}


def columns(arch):
    """The columns of an architecture in a table of all."""
    return {"genotype": genotype(arch)}


def genotype(arch):
    """The published text of an architecture."""
    return ":".join(str(n) for n in arch["channels"])


def arch_of(text):
    """The architecture of a genotype; SystemExit if it is none."""
    if not re.fullmatch(r"[0-9]+(:[0-9]+){4}", text):
        raise SystemExit(f"'{text}' is no genotype of nats_size: write 5 widths of {', '.join(map(str, CHANNELS))}, such as 8:8:40:32:40.")
    return check_arch({"channels": Choice(CHANNELS, repeat=5)}, {"channels": [int(n) for n in text.split(":")]})


def index(arch):
    """The number of an architecture in the benchmark: base 8, the first stage's digit first."""
    return int("".join(str(CHANNELS.index(n)) for n in arch["channels"]), 8)


def arch_at(index):
    """The architecture of a number in the benchmark; SystemExit if it is none."""
    if index not in range(len(CHANNELS) ** 5):
        raise SystemExit(f"{index} is no architecture of nats_size: choose a whole number from 0 to {len(CHANNELS) ** 5 - 1}.")
    return {"channels": [CHANNELS[int(digit)] for digit in f"{index:05o}"]}


def build(config, arch=None):
    """A network from a dict of the keys above, with img_size, in_channels and num_classes; other keys are left alone."""
    known = defaults(globals()) | {"img_size": 32, "in_channels": 3, "num_classes": 10}
    return NATSSize(SimpleNamespace(**known | {name: value for name, value in config.items() if name in known}), arch)


DATA = "images"
