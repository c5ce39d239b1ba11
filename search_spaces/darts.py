"""
The convolutional space of DARTS (Liu et al. 2019): a normal and a reduction cell of 4 nodes, 1.08e18 architectures.

A cell has two inputs, the outputs of the two cells before it; its first node has 2 edges, one from each state before it, the next
3, 4 and 5. Two a node stay in an architecture: the 14 rows of its `normal` and `reduce`, sources in increasing order within a node,
are 'none' in the others. A third and two thirds through the network the cell is a reduction, which doubles the channels.
"""
from types import SimpleNamespace

import torch
import torch.nn as nn
from torch.nn import functional as F

from configurator import check_range, defaults
from search_spaces.cells import CellNetwork, DilConv, Edge, FactorizedReduce, Pool, ReLUConvBN
from search_spaces.cells import SepConv, Skip, nodes, partial, from_genotype, to_genotype
from search_spaces.convs import BatchNorm2d, Conv2d
from supernet import Choice, Linear, check_arch, check_names

# -----------------------------------------------------------------------------
init_channels = 16 # of a node in the first third; 36 in the published networks
n_layer = 8 # cells; 20 in the published networks
primitives = ['none', 'max_pool_3x3', 'avg_pool_3x3', 'skip_connect', 'sep_conv_3x3', 'sep_conv_5x5', 'dil_conv_3x3',
              'dil_conv_5x5'] # the operations to choose from, 'none' among them
stem_multiplier = 3 # channels of the stem over init_channels
entanglement = 'weights' # of the 3 x 3 and 5 x 5 convolutions, as they are mixed; 'outputs': each runs; 'none': each has its own weights
group_weight = True # mixed weights count with their total, behind their BatchNorm; False: as in the literature
partial_channels = 1 # k: an edge's operations are of 1/k of the channels, the others go around them
affine = True # weight and bias in the BatchNorms of cells; searches do without
pool_norm = True # a BatchNorm behind every pool, as in searches; the published networks have none
# of networks without a choice, in training
auxiliary = 0.0 # weight of the loss of a second classifier two thirds through the network; 0.4 for the published results
drop_path = 0.0 # probability that a sample skips an operation, at the end of training; it rises linearly
# -----------------------------------------------------------------------------

PRIMITIVES = tuple(primitives)
INPUTS, CONCAT = (2, 3, 4, 5), (2, 3, 4, 5) # edges into each node; nodes that the output is made of
GENOTYPES = {
    "DARTS_V1": "Genotype(normal=[('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('skip_connect', 0), ('sep_conv_3x3', 1), "
                "('skip_connect', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('skip_connect', 2)], normal_concat=[2, 3, 4, 5], "
                "reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1), ('skip_connect', 2), ('max_pool_3x3', 0), "
                "('max_pool_3x3', 0), ('skip_connect', 2), ('skip_connect', 2), ('avg_pool_3x3', 0)], reduce_concat=[2, 3, 4, 5])",
    "DARTS_V2": "Genotype(normal=[('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('sep_conv_3x3', 1), "
                "('sep_conv_3x3', 1), ('skip_connect', 0), ('skip_connect', 0), ('dil_conv_3x3', 2)], normal_concat=[2, 3, 4, 5], "
                "reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1), ('skip_connect', 2), ('max_pool_3x3', 1), "
                "('max_pool_3x3', 0), ('skip_connect', 2), ('skip_connect', 2), ('max_pool_3x3', 1)], reduce_concat=[2, 3, 4, 5])",
}


class Cell(nn.Module):

    def __init__(self, name, i, C, halve, rows, c):
        """i: the channels of both inputs, of which the first is twice as large an image if `halve`. rows: the operations to choose
        from, of each of the 14 edges. A reduction has stride 2 on what leaves the inputs."""
        super().__init__()
        self.name = name
        self.preprocess_0 = FactorizedReduce(i[0], C, c.affine) if halve else ReLUConvBN(i[0], C, 1, affine=c.affine)
        self.preprocess_1 = ReLUConvBN(i[1], C, 1, affine=c.affine)
        m = partial(C, c.partial_channels)
        ops = {"skip_connect": lambda kernels, stride: Skip() if stride == 1 else FactorizedReduce(m, m, c.affine),
               "max_pool": lambda kernels, stride: Pool("max", m, stride, c.pool_norm),
               "avg_pool": lambda kernels, stride: Pool("avg", m, stride, c.pool_norm),
               "sep_conv": lambda kernels, stride: SepConv(m, m, kernels, stride, c.affine),
               "dil_conv": lambda kernels, stride: DilConv(m, m, kernels, stride, c.affine)}
        self.edges = nn.ModuleList()
        for n in INPUTS:
            node = rows[len(self.edges):len(self.edges) + n]
            for source, row in enumerate(node):
                unused = list(row) == ["none"] and any(list(other) != ["none"] for other in node) and c.partial_channels == 1
                edge = Edge(row, ops, 2 if name == "reduce" and source < 2 else 1, c.entanglement, c.group_weight, c.partial_channels)
                self.edges.append(None if unused else edge)

    def forward(self, x_0, x_1, w, drop):
        states = [self.preprocess_0(x_0, F.relu(x_0)), self.preprocess_1(x_1, F.relu(x_1))]
        return torch.cat(nodes(states, self.edges, w, drop), 1) # (B, 4C, H, W)


class AuxiliaryHead(nn.Module):
    """ReLU, a pool, two convolutions and a classifier."""
    def __init__(self, C, num_classes):
        super().__init__()
        self.conv_1, self.norm_1 = Conv2d(C, 128, 1), BatchNorm2d(128)
        self.conv_2, self.norm_2 = Conv2d(128, 768, 2, padding=0), BatchNorm2d(768)
        self.classifier = Linear(768, num_classes)

    def forward(self, x):
        x = F.avg_pool2d(F.relu(x), 5, 3)
        x = F.relu(self.norm_1(self.conv_1(x)))
        x = F.relu(self.norm_2(self.conv_2(x)))
        return self.classifier(x.mean((2, 3))) # of 32 x 32 images this is the only one


class DARTS(CellNetwork):

    def __init__(self, c, arch=None):
        super().__init__()
        check_range(c, 1, "init_channels", "stem_multiplier")
        check_range(c, 1 if arch else 3, "n_layer") # with fewer all cells are reductions, and `normal` chooses nothing
        check_range(c, 0, "auxiliary")
        check_range(c, 0, "drop_path", below=1)
        if arch is None:
            c.auxiliary = 0.0 # nor has an extracted network such a head
        self.config, self.progress = c, 0.0 # progress: of the training, from 0 to 1, told by who trains
        check_names("primitives", c.primitives, PRIMITIVES)
        if "none" not in c.primitives or len(c.primitives) < 2:
            raise SystemExit(f"primitives={list(c.primitives)} of darts must have 'none', for edges that are not used, and another.")
        cell = Choice(tuple(c.primitives), repeat=14, inputs=INPUTS, keep=2)
        self.choices = {"normal": cell, "reduce": cell}
        rows = {name: [c.primitives] * 14 for name in self.choices}
        if arch is not None: # nothing is left to choose
            rows = {name: [[op] for op in ops] for name, ops in check_arch(self.choices, arch).items()}
            self.choices = {}
        C, i, size, halve = c.init_channels, [c.stem_multiplier * c.init_channels] * 2, c.img_size, False
        self.stem = nn.Sequential(Conv2d(c.in_channels, i[0], 3), BatchNorm2d(i[0]))
        self.cells, self.auxiliary, self.fork = nn.ModuleList(), None, 2 * c.n_layer // 3
        for n in range(c.n_layer):
            name = "reduce" if n in (c.n_layer // 3, self.fork) else "normal"
            if name == "reduce":
                C, size = 2 * C, (size + 1) // 2
            self.cells.append(Cell(name, i, C, halve, rows[name], c))
            i, halve = [i[1], 4 * C], name == "reduce"
            if n == self.fork and c.auxiliary:
                if size < 8:
                    raise SystemExit(f"auxiliary={c.auxiliary} needs larger images, or 0: its classifier pools at least 8 x 8 pixels, and "
                                     f"img_size={c.img_size} leaves {size} x {size}.")
                self.auxiliary = AuxiliaryHead(4 * C, c.num_classes)
        self.classifier = Linear(4 * C, c.num_classes)

    def forward(self, x, targets=None, arch=None):
        """x: (B, in_channels, H, W), targets: (B,) classes or None -> logits (B, num_classes), loss or None. arch: None for a
        stand-alone network, else an architecture, or weights for a mixture. The loss has that of the auxiliary head, in training."""
        assert arch is not None or not self.choices, "a supernet needs weights or an architecture as its third argument"
        training = self.training and not self.choices
        drop, loss = self.config.drop_path * self.progress if training else 0.0, 0.0
        x_0 = x_1 = self.stem(x)
        for n, cell in enumerate(self.cells):
            x_0, x_1 = x_1, cell(x_0, x_1, [None] * 14 if arch is None else arch[cell.name], drop)
            if n == self.fork and self.auxiliary is not None and training and targets is not None:
                loss = self.config.auxiliary * F.cross_entropy(self.auxiliary(x_1), targets)
        logits = self.classifier(x_1.mean((2, 3))) # (B, 4C) -> (B, num_classes)
        return logits, None if targets is None else loss + F.cross_entropy(logits, targets)


def genotype(arch):
    """The published text of an architecture; SystemExit if a node does not have two operations."""
    cells = {}
    for name, rows in arch.items():
        cells[name] = []
        for n, first in zip(INPUTS, (0, 2, 5, 9), strict=True):
            pairs = [(op, source) for source, op in enumerate(rows[first:first + n]) if op != "none"]
            if len(pairs) != 2:
                raise SystemExit(f"A genotype of darts has two operations a node, and this {name} has {len(pairs)} at node {n}: {rows}.")
            cells[name] += pairs
    return to_genotype(cells, CONCAT)


def columns(arch):
    """The columns of a benchmark table that say which architecture a row is about."""
    return {"genotype": genotype(arch)}


def arch_of(text):
    """The architecture of a genotype, or of the name of one in GENOTYPES; SystemExit if it is none."""
    arch = {}
    for name, pairs in from_genotype("darts", GENOTYPES.get(text, text), CONCAT, PRIMITIVES).items():
        arch[name] = ["none"] * 14
        for n, first in zip(INPUTS, (0, 2, 5, 9), strict=True):
            node = pairs[2 * n - 4:2 * n - 2]
            if len(pairs) != 8 or len({source for _, source in node}) < 2 or max(source for _, source in node) >= n:
                raise SystemExit(f"The genotype's {name} needs two operations a node, from different sources before it: {pairs}.")
            for op, source in node:
                arch[name][first + source] = op
    return arch


def build(config, arch=None):
    """A network from a dict of the keys above, with img_size, in_channels and num_classes; other keys are left alone."""
    known = defaults(globals()) | {"img_size": 32, "in_channels": 3, "num_classes": 10}
    return DARTS(SimpleNamespace(**known | {name: value for name, value in config.items() if name in known}), arch)


DATA = "images"
