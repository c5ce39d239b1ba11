"""
NAS-Bench-201 (Dong & Yang 2020): one cell of 4 nodes and 6 edges with 5 operations each, 15,625
architectures.

The cell is used 3 * n_cell times, with a residual block of stride 2 after each third but the last.
The rows of an architecture's `cell` are the edges 1<-0, 2<-0, 2<-1, 3<-0, 3<-1, 3<-2, as in its
genotype |op~0|+|op~0|op~1|+|op~0|op~1|op~2|.

Large images pass ImageNet's stem of DARTS first. The benchmark has no such networks, so nothing
published says how well they do.
"""
import functools
import itertools
import random
import re

import torch.nn as nn
from torch.nn import functional as F

from configurator import ConfigError, check_range
from search_spaces.cells import (
    CellNetwork, Edge, Pool, ReLUConvBN, Skip, has_imagenet_stem, imagenet_stem, nodes, partial,
)
from search_spaces.convs import BatchNorm2d, Conv2d, settings, with_loss
from supernet import Choice, Linear, check_arch, sampled

# -----------------------------------------------------------------------------
init_channels = 16 # of the first third of the cells; doubled twice
n_cell = 5 # cells a third
stem = '' # before the cells: 'cifar', or 'imagenet' of stride 8; '': imagenet from 96 pixels on
primitives = ['none', 'skip_connect', 'nor_conv_1x1', 'nor_conv_3x3',
              'avg_pool_3x3'] # the operations to choose from
entanglement = 'weights' # of 1 x 1 and 3 x 3 convolutions: 'weights', 'outputs' or 'none', see Edge
group_weight = True # the total of mixed weights is multiplied behind their BatchNorm, see Edge
partial_channels = 1 # k: an edge's operations are of 1/k of the channels, the others go around them
affine = True # weight and bias in the BatchNorms of cells; searches do without
# -----------------------------------------------------------------------------

DATA = "images" # the kind of data it takes
PRIMITIVES = tuple(primitives)


class Cell(nn.Module):
    name = "cell"

    def __init__(self, C, rows, c):
        """rows: the operations to choose from, of each of the 6 edges."""
        super().__init__()
        n = partial(C, c.partial_channels)
        ops = {"skip_connect": lambda kernels, stride: Skip(),
               "avg_pool": lambda kernels, stride: Pool("avg", n, stride),
               "nor_conv": lambda kernels, stride: ReLUConvBN(n, n, kernels, stride, c.affine)}
        edges = [Edge(row, ops, 1, c.entanglement, c.group_weight, c.partial_channels)
                 for row in rows]
        self.edges = nn.ModuleList(edges)

    def forward(self, x, choices):
        return nodes([x], self.edges, choices)[-1]


class ResidualBlock(nn.Module):
    """Two ReLU-convolution-norms, the first of stride 2, beside a pooled 1 x 1 convolution."""
    def __init__(self, i, o):
        super().__init__()
        self.conv_1, self.conv_2 = ReLUConvBN(i, o, 3, 2), ReLUConvBN(o, o, 3)
        self.shortcut = Conv2d(i, o, 1)

    def forward(self, x, choices=None):
        y = self.conv_1(x, F.relu(x))
        return self.shortcut(F.avg_pool2d(x, 2, ceil_mode=True)) + self.conv_2(y, F.relu(y))


class NB201(CellNetwork):

    def __init__(self, c, arch=None):
        super().__init__()
        self.config = c
        check_range(c, 1, "init_channels", "n_cell")
        rows = self.choose(c.primitives, PRIMITIVES, arch, cell=dict(repeat=6))["cell"]
        if list(c.primitives) == ["none"]:
            raise ConfigError("primitives=['none'] of nb201 must have another operation, or "
                              "nothing reaches the output.")
        C = c.init_channels
        if has_imagenet_stem(c):
            self.stem = nn.Sequential(*imagenet_stem(c.in_channels, C))
        else:
            self.stem = nn.Sequential(Conv2d(c.in_channels, C, 3), BatchNorm2d(C))
        cells = []
        for third in range(3):
            cells += [Cell(C << third, rows, c) for _ in range(c.n_cell)]
            cells += [ResidualBlock(C << third, 2 * C << third)] if third < 2 else []
        self.cells = nn.ModuleList(cells)
        self.norm, self.classifier = BatchNorm2d(4 * C), Linear(4 * C, c.num_classes)

    def forward(self, x, targets=None, arch=None):
        """See ImageNetwork."""
        choices, x = sampled(self, arch)["cell"], self.stem(x)
        for cell in self.cells:
            x = cell(x, choices)
        x = F.relu(self.norm(x)).mean((2, 3)) # (B, 4C)
        return with_loss(self.classifier(x), targets)


def genotype(arch):
    """The published text of an architecture."""
    ops = iter(arch["cell"])
    return "+".join("|" + "".join(f"{next(ops)}~{j}|" for j in range(n)) for n in (1, 2, 3))


def columns(arch):
    """The columns of a benchmark table that say which architecture a row is about."""
    return {"genotype": genotype(arch)}


def arch_of(text):
    """The architecture of a genotype. Raises ConfigError if it is not one of this space."""
    if not re.fullmatch(r"\|\w+~0\|\+\|\w+~0\|\w+~1\|\+\|\w+~0\|\w+~1\|\w+~2\|", text):
        raise ConfigError(f"'{text}' is not a genotype of nb201: write "
                          "|op~0|+|op~0|op~1|+|op~0|op~1|op~2| with operations of "
                          f"{', '.join(PRIMITIVES)}.")
    cell = re.findall(r"\|(\w+)~", text)
    return check_arch({"cell": Choice(PRIMITIVES, repeat=6)}, {"cell": cell})


@functools.cache
def order():
    """All cells in the order of the benchmark's indices: its authors shuffled them with seed 88."""
    cells = list(itertools.product(PRIMITIVES, repeat=6))
    random.Random(88).shuffle(cells)
    return cells


def index(arch):
    """The index of an architecture in the benchmark, 0 to 15,624."""
    return order().index(tuple(arch["cell"]))


def arch_at(i):
    """The architecture of an index."""
    return {"cell": list(order()[i])}


def build(config, arch=None):
    """A network from a dict of the keys above, with img_size, in_channels and num_classes."""
    known = settings(config, globals(), img_size=32, in_channels=3, num_classes=10)
    return NB201(known, arch)
