"""
NATS-Bench's size space (Dong et al. 2021): the widths of a fixed network's 5 stages, 8 options
each, 32,768 architectures.

    stem to c0, cell c0 to c0, residual block c0 to c1, cell c1 to c2, residual block c2 to c3,
    cell c3 to c4, norm, mean over pixels, classifier

The cell is that of NAS-Bench-201's
|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|skip_connect~0|nor_conv_3x3~1|nor_conv_3x3~2|.
A skip between different widths is a 1 x 1 convolution and a norm. The genotype is c0:c1:c2:c3:c4.
"""
import re
from itertools import product

import torch
import torch.nn as nn
from torch.nn import functional as F

from configurator import ConfigError
from search_spaces.convs import (
    BatchNorm2d, Conv2d, Entangled, ImageNetwork, check_entanglement, settings, with_loss,
)
from supernet import (
    ALL, Choice, check_arch, options_of, prefix_masks, sampled, set_choices, straight_through,
)

# -----------------------------------------------------------------------------
channels = [8, 16, 24, 32, 40, 48, 56, 64] # of each stage
entanglement = 'weights' # of the widths: 'weights', 'outputs' or 'none', see Entangled
affine = True # weight and bias in the BatchNorms of cells; searches do without
# -----------------------------------------------------------------------------

DATA = "images" # the kind of data it takes
CHANNELS = tuple(channels)
# in and out of cell, residual block, cell, residual block, cell
STAGES = ((0, 0), (0, 1), (1, 2), (2, 3), (3, 4))


class ConvNorm(nn.Module):
    """A convolution and its norm. The weights of a mixture over widths are multiplied behind the
    norm. kernels=(0,): the norm alone."""
    def __init__(self, i, o, kernels, stride=1, affine=True):
        super().__init__()
        self.conv = Conv2d(i, o, kernels, stride) if kernels != (0,) else None
        self.norm = BatchNorm2d(o, affine=affine)

    def forward(self, x, i=None, o=None, k=ALL):
        y = x if self.conv is None else self.conv(x, i, o and o.unweighted)
        return self.norm(y, o)


class Skip(nn.Module):
    """The identity between equal widths, else a 1 x 1 convolution and norm, each with the weight of
    the pairs of widths for which it stands."""
    def __init__(self, pairs, c):
        super().__init__()
        self.entanglement = c.entanglement
        different = [(a, b, 1) for a, b in pairs if a != b]

        def make(*args):
            return ConvNorm(*args, affine=c.affine)
        self.change = Entangled(make, different, c.entanglement) if different else None

    def forward(self, x, i=None, o=None):
        if self.change is None or i is None:
            return x if self.change is None else self.change(x)
        if not o.is_mixture and i.n == o.n:
            return straight_through(x, i.p * o.p if o.is_straight_through else None)
        different = o
        if self.entanglement == "weights": # one convolution for all pairs of different widths
            if o.is_mixture:
                different = o._replace(p=o.p * (i.p.sum() - i.p))
            elif o.is_straight_through:
                different = o._replace(p=i.p * o.p)
        y = self.change(x, i, different)
        if not o.is_mixture:
            return y
        equal = (i.p * o.p) @ o.mask # (N,): the coverage of pairs of equal widths
        return x * equal[:, None, None].to(x.dtype) + y


class Cell(nn.Module):

    def __init__(self, pairs, c):
        """pairs: the widths of in and out together."""
        super().__init__()
        inside = [(b, b) for b in sorted({b for _, b in pairs})]

        def conv(pairs):
            def make(*args):
                return ConvNorm(*args, affine=c.affine)
            return Entangled(make, [(a, b, 3) for a, b in pairs], c.entanglement)
        # conv_21 is the edge from node 1 to node 2, and so on
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

        def halve(*args):
            return ConvNorm(*args, stride=2)
        self.conv_1 = Entangled(halve, [(a, b, 3) for a, b in pairs], c.entanglement)
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
        # (options, channels)
        self.register_buffer("mask", prefix_masks(self.n, self.n[-1]), persistent=False)
        arch = set_choices(self, {"channels": Choice(self.n, repeat=5)}, arch)
        n = [self.n] * 5 if arch is None else [(width,) for width in arch["channels"]]
        self.stem = Entangled(ConvNorm, product([c.in_channels], n[0], [3]), c.entanglement)
        self.stages = nn.ModuleList()
        for stage, (i, o) in enumerate(STAGES):
            pairs = list(zip(n[i], n[o], strict=True)) if i == o else list(product(n[i], n[o]))
            self.stages.append(ResidualBlock(pairs, c) if stage % 2 else Cell(pairs, c))
        self.norm = Entangled(ConvNorm, [(o, o, 0) for o in n[4]], c.entanglement)

        def linear(*args):
            return Conv2d(*args, bias=True)
        classes = product(n[4], [c.num_classes], [1])
        self.classifier = Entangled(linear, classes, c.entanglement)

    def forward(self, x, targets=None, arch=None):
        """See ImageNetwork."""
        sizes = [stage.size(self.n, self.mask) for stage in sampled(self, arch)["channels"]]
        x = self.stem(x, None, sizes[0])
        for stage, (i, o) in zip(self.stages, STAGES, strict=True):
            x = stage(x, sizes[i], sizes[o])
        x = F.relu(self.norm(x, sizes[4], sizes[4])).mean((2, 3), keepdim=True) # (B, c4, 1, 1)
        return with_loss(self.classifier(x, sizes[4]).flatten(1), targets)

    def expected_cost(self, arch):
        c, w, n = self.config, arch["channels"].double().cpu(), torch.tensor(self.n).double()
        mean, square, side = w @ n, w @ n ** 2, c.img_size
        convolutions, norms = [(9 * c.in_channels * mean[0], side)], 2 * (mean[0] + mean[4])
        for stage, (i, o) in enumerate(STAGES):
            # the widths of two stages are independent
            io = square[i] if i == o else mean[i] * mean[o]
            if stage % 2:
                side = -(-side // 2)
                convolutions.append((10 * io + 9 * square[o], side))
                norms = norms + 4 * mean[o]
            else:
                # of each width: the chance that the skip keeps it
                equal = w[i] if i == o else w[i] * w[o]
                convolutions.append((18 * io + 27 * square[o] + io - equal @ n ** 2, side))
                norms = norms + c.affine * (10 * mean[o] + 2 * (mean[o] - equal @ n))
        convolutions.append((mean[4] * c.num_classes, 1))
        params = norms + c.num_classes + sum(weights for weights, _ in convolutions)
        flops = sum(2 * side * side * weights for weights, side in convolutions)
        return {"params": params, "flops": flops}


def columns(arch):
    """The columns of an architecture in a table of all."""
    return {"genotype": genotype(arch)}


def genotype(arch):
    """The published text of an architecture."""
    return ":".join(str(n) for n in arch["channels"])


def arch_of(text):
    """The architecture of a genotype. Raises ConfigError if it is not one of this space."""
    if not re.fullmatch(r"[0-9]+(:[0-9]+){4}", text):
        raise ConfigError(f"'{text}' is not a genotype of nats_size: write 5 widths of "
                          f"{', '.join(map(str, CHANNELS))}, such as 8:8:40:32:40.")
    widths = [int(n) for n in text.split(":")]
    return check_arch({"channels": Choice(CHANNELS, repeat=5)}, {"channels": widths})


def index(arch):
    """The number of an architecture in the benchmark: base 8, the first stage's digit first."""
    return int("".join(str(CHANNELS.index(n)) for n in arch["channels"]), 8)


def arch_at(index):
    """The architecture of a number in the benchmark. Raises ConfigError if there is none."""
    if index not in range(len(CHANNELS) ** 5):
        raise ConfigError(f"{index} is not an architecture of nats_size: choose a whole number "
                          f"from 0 to {len(CHANNELS) ** 5 - 1}.")
    return {"channels": [CHANNELS[int(digit)] for digit in f"{index:05o}"]}


def build(config, arch=None):
    """A network from a dict of the keys above, with img_size, in_channels and num_classes."""
    known = settings(config, globals(), img_size=32, in_channels=3, num_classes=10)
    return NATSSize(known, arch)
