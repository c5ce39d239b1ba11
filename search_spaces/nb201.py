"""
NAS-Bench-201 (Dong & Yang 2020): one cell of 4 nodes and 6 edges with 5 operations each, 15,625 architectures.

The cell is used 3 * n_cell times, with a residual block of stride 2 after each third but the last. The rows of an architecture's
`cell` are the edges 1<-0, 2<-0, 2<-1, 3<-0, 3<-1, 3<-2, as in its genotype |op~0|+|op~0|op~1|+|op~0|op~1|op~2|.
"""
import functools
import itertools
import random
import re
from types import SimpleNamespace

import torch.nn as nn
from torch.nn import functional as F

from configurator import check_range, defaults
from search_spaces.cells import CellNetwork, Edge, Pool, ReLUConvBN, Skip, nodes, partial
from search_spaces.convs import BatchNorm2d, Conv2d
from supernet import Choice, Linear, check_arch, check_names

# -----------------------------------------------------------------------------
init_channels = 16 # of the first third of the cells; doubled twice
n_cell = 5 # cells a third
primitives = ['none', 'skip_connect', 'nor_conv_1x1', 'nor_conv_3x3', 'avg_pool_3x3'] # the operations to choose from
entanglement = 'weights' # of the 1 x 1 and the 3 x 3 convolution, as they are mixed; 'outputs': each runs; 'none': each has its own weights
group_weight = True # mixed weights count with their total, behind their BatchNorm; False: as in the literature
partial_channels = 1 # k: an edge's operations are of 1/k of the channels, the others go around them
affine = True # weight and bias in the BatchNorms of cells; searches do without
# -----------------------------------------------------------------------------

PRIMITIVES = tuple(primitives)


class Cell(nn.Module):
    name = "cell"

    def __init__(self, C, rows, c):
        """rows: the operations to choose from, of each of the 6 edges."""
        super().__init__()
        n = partial(C, c.partial_channels)
        ops = {"skip_connect": lambda kernels, stride: Skip(), "avg_pool": lambda kernels, stride: Pool("avg", n, stride),
               "nor_conv": lambda kernels, stride: ReLUConvBN(n, n, kernels, stride, c.affine)}
        self.edges = nn.ModuleList([Edge(row, ops, 1, c.entanglement, c.group_weight, c.partial_channels) for row in rows])

    def forward(self, x, w):
        return nodes([x], self.edges, w)[-1]


class ResidualBlock(nn.Module):
    """Two ReLU-convolution-norms, the first of stride 2, beside a pooled 1 x 1 convolution."""
    def __init__(self, i, o):
        super().__init__()
        self.conv_1, self.conv_2, self.shortcut = ReLUConvBN(i, o, 3, 2), ReLUConvBN(o, o, 3), Conv2d(i, o, 1)

    def forward(self, x, w=None):
        y = self.conv_1(x, F.relu(x))
        return self.shortcut(F.avg_pool2d(x, 2, ceil_mode=True)) + self.conv_2(y, F.relu(y))


class NB201(CellNetwork):

    def __init__(self, c, arch=None):
        super().__init__()
        self.config = c
        check_range(c, 1, "init_channels", "n_cell")
        check_names("primitives", c.primitives, PRIMITIVES)
        if list(c.primitives) == ["none"]:
            raise SystemExit("primitives=['none'] of nb201 must have another operation, or nothing reaches the output.")
        self.choices = {"cell": Choice(tuple(c.primitives), repeat=6)}
        rows = [c.primitives] * 6
        if arch is not None: # nothing is left to choose
            rows, self.choices = [[op] for op in check_arch(self.choices, arch)["cell"]], {}
        C = c.init_channels
        self.stem = nn.Sequential(Conv2d(c.in_channels, C, 3), BatchNorm2d(C))
        cells = []
        for third in range(3):
            cells += [Cell(C << third, rows, c) for _ in range(c.n_cell)]
            cells += [ResidualBlock(C << third, 2 * C << third)] if third < 2 else []
        self.cells = nn.ModuleList(cells)
        self.norm, self.classifier = BatchNorm2d(4 * C), Linear(4 * C, c.num_classes)

    def forward(self, x, targets=None, arch=None):
        """x: (B, in_channels, H, W), targets: (B,) classes or None -> logits (B, num_classes), loss or None. arch: None for a
        stand-alone network, else an architecture, or weights for a mixture."""
        assert arch is not None or not self.choices, "a supernet needs weights or an architecture as its third argument"
        w = [None] * 6 if arch is None else arch["cell"]
        x = self.stem(x)
        for cell in self.cells:
            x = cell(x, w)
        x = F.relu(self.norm(x)).mean((2, 3)) # (B, 4C)
        logits = self.classifier(x)
        return logits, None if targets is None else F.cross_entropy(logits, targets)


def genotype(arch):
    """The published text of an architecture."""
    ops = iter(arch["cell"])
    return "+".join("|" + "".join(f"{next(ops)}~{j}|" for j in range(n)) for n in (1, 2, 3))


def columns(arch):
    """The columns of a benchmark table that say which architecture a row is about."""
    return {"genotype": genotype(arch)}


def arch_of(text):
    """The architecture of a genotype; SystemExit if it is none."""
    if not re.fullmatch(r"\|\w+~0\|\+\|\w+~0\|\w+~1\|\+\|\w+~0\|\w+~1\|\w+~2\|", text):
        raise SystemExit(f"'{text}' is no genotype of nb201: write |op~0|+|op~0|op~1|+|op~0|op~1|op~2| with operations of "
                         f"{', '.join(PRIMITIVES)}.")
    return check_arch({"cell": Choice(PRIMITIVES, repeat=6)}, {"cell": re.findall(r"\|(\w+)~", text)})


@functools.cache
def order():
    """All cells in the order of the benchmark's indices, which its authors shuffled with seed 88."""
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
    """A network from a dict of the keys above, with img_size, in_channels and num_classes; other keys are left alone."""
    known = defaults(globals()) | {"img_size": 32, "in_channels": 3, "num_classes": 10}
    return NB201(SimpleNamespace(**known | {name: value for name, value in config.items() if name in known}), arch)


DATA = "images"
