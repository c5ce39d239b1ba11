"""
The convolutional space of DARTS (Liu et al. 2019): a normal and a reduction cell of 4 nodes,
1.08e18 architectures.

A cell has two inputs, the outputs of the two cells before it. Its first node has 2 edges, one from
each state before it; the next nodes have 3, 4 and 5. `normal` and `reduce` of an architecture are
the 14 edges of a cell, in increasing order of their sources within a node. Each node keeps two of
its edges; the others are 'none'. A third and two thirds through the network the cell is a
reduction, which doubles the channels.

Large images pass ImageNet's stem first, as published: three convolutions of stride 2, of which the
first cell gets the second's output and the third's. It is in the supernet, too.
"""
import torch
import torch.nn as nn
from torch.nn import functional as F

from configurator import ConfigError, check_range
from search_spaces.cells import (
    CellNetwork, DilConv, Edge, FactorizedReduce, Pool, ReLUConvBN, SepConv, Skip, from_genotype,
    has_imagenet_stem, imagenet_stem, nodes, partial, to_genotype,
)
from search_spaces.convs import BatchNorm2d, Conv2d, settings
from supernet import Linear, sampled

# -----------------------------------------------------------------------------
init_channels = 16 # of a node in the first third; published: 36, for ImageNet 48
n_layer = 8 # cells; published: 20, for ImageNet 14
stem = '' # before the cells: 'cifar', or 'imagenet' of stride 8; '': imagenet from 96 pixels on
primitives = ['none', 'max_pool_3x3', 'avg_pool_3x3', 'skip_connect', 'sep_conv_3x3',
              'sep_conv_5x5', 'dil_conv_3x3', 'dil_conv_5x5'] # the operations to choose from
stem_multiplier = 3 # channels of the stem over init_channels; published trainings on ImageNet: 1
entanglement = 'weights' # of 3 x 3 and 5 x 5 convolutions: 'weights', 'outputs' or 'none', see Edge
group_weight = True # the total of mixed weights is multiplied behind their BatchNorm, see Edge
partial_channels = 1 # k: an edge's operations are of 1/k of the channels, the others go around them
affine = True # weight and bias in the BatchNorms of cells; searches do without
pool_norm = True # a BatchNorm behind every pool, as in searches; the published networks have none
# of networks without a choice, in training
auxiliary = 0.0 # weight of a second classifier's loss, two thirds through; published: 0.4
drop_path = 0.0 # probability that a sample skips an operation at the end; it rises linearly
# -----------------------------------------------------------------------------

DATA = "images" # the kind of data it takes
PRIMITIVES = tuple(primitives)
INPUTS, CONCAT = (2, 3, 4, 5), (2, 3, 4, 5) # edges into each node; nodes that make the output
EDGES = sum(INPUTS)
GENOTYPES = { # published
    "DARTS_V1":
        "Genotype(normal=[('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('skip_connect', 0), "
        "('sep_conv_3x3', 1), ('skip_connect', 0), ('sep_conv_3x3', 1), "
        "('sep_conv_3x3', 0), ('skip_connect', 2)], normal_concat=[2, 3, 4, 5], "
        "reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1), ('skip_connect', 2), "
        "('max_pool_3x3', 0), ('max_pool_3x3', 0), ('skip_connect', 2), "
        "('skip_connect', 2), ('avg_pool_3x3', 0)], reduce_concat=[2, 3, 4, 5])",
    "DARTS_V2":
        "Genotype(normal=[('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), "
        "('sep_conv_3x3', 1), ('sep_conv_3x3', 1), ('skip_connect', 0), "
        "('skip_connect', 0), ('dil_conv_3x3', 2)], normal_concat=[2, 3, 4, 5], "
        "reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1), ('skip_connect', 2), "
        "('max_pool_3x3', 1), ('max_pool_3x3', 0), ('skip_connect', 2), "
        "('skip_connect', 2), ('max_pool_3x3', 1)], reduce_concat=[2, 3, 4, 5])",
    "PC_DARTS_cifar":
        "Genotype(normal=[('sep_conv_3x3', 1), ('skip_connect', 0), ('sep_conv_3x3', 0), "
        "('dil_conv_3x3', 1), ('sep_conv_5x5', 0), ('sep_conv_3x3', 1), "
        "('avg_pool_3x3', 0), ('dil_conv_3x3', 1)], normal_concat=range(2, 6), "
        "reduce=[('sep_conv_5x5', 1), ('max_pool_3x3', 0), ('sep_conv_5x5', 1), "
        "('sep_conv_5x5', 2), ('sep_conv_3x3', 0), ('sep_conv_3x3', 3), "
        "('sep_conv_3x3', 1), ('sep_conv_3x3', 2)], reduce_concat=range(2, 6))",
    "PC_DARTS_image":
        "Genotype(normal=[('skip_connect', 1), ('sep_conv_3x3', 0), ('sep_conv_3x3', 0), "
        "('skip_connect', 1), ('sep_conv_3x3', 1), ('sep_conv_3x3', 3), "
        "('sep_conv_3x3', 1), ('dil_conv_5x5', 4)], normal_concat=range(2, 6), "
        "reduce=[('sep_conv_3x3', 0), ('skip_connect', 1), ('dil_conv_5x5', 2), "
        "('max_pool_3x3', 1), ('sep_conv_3x3', 2), ('sep_conv_3x3', 1), "
        "('sep_conv_5x5', 0), ('sep_conv_3x3', 3)], reduce_concat=range(2, 6))",
}


class Cell(nn.Module):

    def __init__(self, name, i, C, halve, rows, c):
        """i: the channels of both inputs; `halve`: the first is twice as large an image. rows: the
        operations to choose from, of each of the 14 edges. In a reduction the edges that leave the
        inputs have stride 2."""
        super().__init__()
        self.name = name
        if halve:
            self.preprocess_0 = FactorizedReduce(i[0], C, c.affine)
        else:
            self.preprocess_0 = ReLUConvBN(i[0], C, 1, affine=c.affine)
        self.preprocess_1 = ReLUConvBN(i[1], C, 1, affine=c.affine)
        m = partial(C, c.partial_channels)

        def skip(kernels, stride):
            return Skip() if stride == 1 else FactorizedReduce(m, m, c.affine)
        ops = {"skip_connect": skip,
               "max_pool": lambda kernels, stride: Pool("max", m, stride, c.pool_norm),
               "avg_pool": lambda kernels, stride: Pool("avg", m, stride, c.pool_norm),
               "sep_conv": lambda kernels, stride: SepConv(m, m, kernels, stride, c.affine),
               "dil_conv": lambda kernels, stride: DilConv(m, m, kernels, stride, c.affine)}
        self.edges = nn.ModuleList()
        for n in INPUTS:
            node = [list(row) for row in rows[len(self.edges):len(self.edges) + n]]
            for source, row in enumerate(node):
                stride = 2 if name == "reduce" and source < 2 else 1
                edge = Edge(row, ops, stride, c.entanglement, c.group_weight, c.partial_channels)
                # an edge of nothing is left out, unless the node or its other channels need it
                only_none = row == ["none"] and any(other != ["none"] for other in node)
                self.edges.append(None if only_none and c.partial_channels == 1 else edge)

    def forward(self, x_0, x_1, choices, drop):
        x_0, x_1 = self.preprocess_0(x_0, F.relu(x_0)), self.preprocess_1(x_1, F.relu(x_1))
        return torch.cat(nodes([x_0, x_1], self.edges, choices, drop), 1) # (B, 4C, H, W)


class AuxiliaryHead(nn.Module):
    """ReLU, a pool, two convolutions and a classifier. `imagenet`: as published for ImageNet, where
    the pool has another stride, and no norm follows the second convolution."""
    def __init__(self, C, num_classes, imagenet):
        super().__init__()
        self.stride = 2 if imagenet else 3
        self.conv_1, self.norm_1 = Conv2d(C, 128, 1), BatchNorm2d(128)
        self.conv_2 = Conv2d(128, 768, 2, padding=0)
        self.norm_2 = nn.Identity() if imagenet else BatchNorm2d(768)
        self.classifier = Linear(768, num_classes)

    def forward(self, x):
        x = F.avg_pool2d(F.relu(x), 5, self.stride) # 2 x 2 are left of 224 x 224 and of 32 x 32
        x = F.relu(self.norm_1(self.conv_1(x)))
        x = F.relu(self.norm_2(self.conv_2(x)))
        return self.classifier(x.mean((2, 3))) # of 1 x 1


class DARTS(CellNetwork):

    def __init__(self, c, arch=None):
        super().__init__()
        check_range(c, 1, "init_channels", "stem_multiplier")
        # with fewer than 3 cells all are reductions, and `normal` chooses nothing
        check_range(c, 1 if arch else 3, "n_layer")
        check_range(c, 0, "auxiliary")
        check_range(c, 0, "drop_path", below=1)
        if arch is None:
            c.auxiliary = 0.0 # a network extracted from a supernet has no such head either
        self.config = c
        self.progress = 0.0 # of the training, from 0 to 1; the trainer sets it
        cell = dict(repeat=EDGES, inputs=INPUTS, keep=2)
        rows = self.choose(c.primitives, PRIMITIVES, arch, normal=cell, reduce=cell)
        if "none" not in c.primitives or len(c.primitives) < 2:
            raise ConfigError(f"primitives={list(c.primitives)} of darts must have 'none', for "
                              "edges that are not used, and another.")
        C, size, imagenet = c.init_channels, c.img_size, has_imagenet_stem(c)
        i = [c.stem_multiplier * C] * 2 # channels of both inputs
        halve = imagenet # the stem has a stride between its two outputs
        if imagenet:
            size = -(-size // 8)
            self.stem, self.stem_1 = imagenet_stem(c.in_channels, i[0])
        else:
            self.stem = nn.Sequential(Conv2d(c.in_channels, i[0], 3), BatchNorm2d(i[0]))
            self.stem_1 = nn.Identity()
        self.cells, self.auxiliary = nn.ModuleList(), None
        self.fork = 2 * c.n_layer // 3 # the second reduction, behind which the auxiliary head is
        for n in range(c.n_layer):
            name = "reduce" if n in (c.n_layer // 3, self.fork) else "normal"
            if name == "reduce":
                C, size = 2 * C, (size + 1) // 2
            self.cells.append(Cell(name, i, C, halve, rows[name], c))
            i, halve = [i[1], 4 * C], name == "reduce"
            if n == self.fork and c.auxiliary:
                least = 7 if imagenet else 8
                if size < least:
                    raise ConfigError(
                        f"auxiliary={c.auxiliary} needs larger images, or 0: its classifier pools "
                        f"at least {least} x {least} pixels, and img_size={c.img_size} leaves "
                        f"{size} x {size}.")
                self.auxiliary = AuxiliaryHead(4 * C, c.num_classes, imagenet)
        self.classifier = Linear(4 * C, c.num_classes)

    def forward(self, x, targets=None, arch=None):
        """See ImageNetwork. In training the loss includes that of the auxiliary head."""
        now, loss = sampled(self, arch), 0.0
        alone = self.training and not self.choices
        drop = self.config.drop_path * self.progress if alone else 0.0
        x_0 = self.stem(x)
        x_1 = self.stem_1(x_0)
        for n, cell in enumerate(self.cells):
            x_0, x_1 = x_1, cell(x_0, x_1, now[cell.name], drop)
            if n == self.fork and self.auxiliary is not None and alone and targets is not None:
                loss = self.config.auxiliary * F.cross_entropy(self.auxiliary(x_1), targets)
        logits = self.classifier(x_1.mean((2, 3))) # (B, 4C) -> (B, num_classes)
        return logits, None if targets is None else loss + F.cross_entropy(logits, targets)


def genotype(arch):
    """The published text of an architecture. Raises ConfigError unless every node has two
    operations."""
    cells = {}
    for name, rows in arch.items():
        cells[name] = []
        for n, first in zip(INPUTS, (0, 2, 5, 9), strict=True):
            node = enumerate(rows[first:first + n])
            pairs = [(op, source) for source, op in node if op != "none"]
            if len(pairs) != 2:
                raise ConfigError(f"A genotype of darts has two operations a node, and this {name} "
                                  f"has {len(pairs)} at node {n}: {rows}.")
            cells[name] += pairs
    return to_genotype(cells, CONCAT)


def columns(arch):
    """The columns of a benchmark table that say which architecture a row is about."""
    return {"genotype": genotype(arch)}


def arch_of(text):
    """The architecture of a genotype, or of a name in GENOTYPES. Raises ConfigError if it is
    neither."""
    arch, text = {}, GENOTYPES.get(text, text)
    for name, pairs in from_genotype("darts", text, CONCAT, PRIMITIVES).items():
        arch[name] = ["none"] * EDGES
        for n, first in zip(INPUTS, (0, 2, 5, 9), strict=True):
            node = pairs[2 * n - 4:2 * n - 2]
            sources = {source for _, source in node}
            if len(pairs) != 8 or len(sources) < 2 or max(sources) >= n:
                raise ConfigError(f"The genotype's {name} needs two operations a node, from "
                                  f"different sources before it: {pairs}.")
            for op, source in node:
                arch[name][first + source] = op
    return arch


def build(config, arch=None):
    """A network from a dict of the keys above, with img_size, in_channels and num_classes."""
    known = settings(config, globals(), img_size=32, in_channels=3, num_classes=10)
    return DARTS(known, arch)
