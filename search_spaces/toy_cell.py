"""
The toy cell space of TangleNAS (Sukthanker et al. 2023): a normal and a reduction cell of 2 nodes
and 3 edges, 4,096 architectures.

Three cells on the bare image, the first and the third of them reductions, then a small classifier.
The rows of an architecture's `normal` and `reduce` are the edges node 1 <- input, node 2 <- input,
node 2 <- node 1; both reductions are alike.
"""
import torch
import torch.nn as nn
from torch.nn import functional as F

from configurator import ConfigError, check_range
from search_spaces.cells import (
    CellNetwork, DilConv, Edge, ReLUConvBN, SepConv, from_genotype, nodes, to_genotype,
)
from search_spaces.convs import settings, with_loss
from supernet import Linear, sampled

# -----------------------------------------------------------------------------
init_channels = 32 # of a node in the first two cells; doubled in the third
primitives = ['sep_conv_3x3', 'sep_conv_5x5', 'dil_conv_3x3',
              'dil_conv_5x5'] # the operations to choose from
entanglement = 'weights' # of 3 x 3 and 5 x 5 convolutions: 'weights', 'outputs' or 'none', see Edge
group_weight = True # the total of mixed weights is multiplied behind their BatchNorm, see Edge
affine = False # weight and bias in the BatchNorms
dropout = 0.2 # behind every cell and before the last layer
# -----------------------------------------------------------------------------

DATA = "images" # the kind of data it takes
PRIMITIVES = tuple(primitives)
SOURCES, CONCAT = (0, 0, 1), (1, 2) # of each edge; nodes that make the output


class Cell(nn.Module):

    def __init__(self, name, i, C, rows, c):
        """rows: the operations to choose from, of each of the 3 edges. In a reduction the edges
        that leave the input have stride 2."""
        super().__init__()
        self.name = name
        self.preprocess = ReLUConvBN(i, C, 1, affine=c.affine)
        ops = {"sep_conv": lambda kernels, stride: SepConv(C, C, kernels, stride, c.affine),
               "dil_conv": lambda kernels, stride: DilConv(C, C, kernels, stride, c.affine)}
        strides = [2 if name == "reduce" and source == 0 else 1 for source in SOURCES]
        self.edges = nn.ModuleList([Edge(row, ops, stride, c.entanglement, c.group_weight)
                                    for row, stride in zip(rows, strides, strict=True)])

    def forward(self, x, choices):
        x = self.preprocess(x, F.relu(x))
        return torch.cat(nodes([x], self.edges, choices), 1) # (B, 2C, H, W)


class ToyCell(CellNetwork):

    def __init__(self, c, arch=None):
        super().__init__()
        self.config = c
        check_range(c, 1, "init_channels")
        check_range(c, 0, "dropout", below=1)
        edges = dict(repeat=len(SOURCES))
        rows = self.choose(c.primitives, PRIMITIVES, arch, normal=edges, reduce=edges)
        # two reductions round up, the pool rounds down
        C, size = c.init_channels, (c.img_size + 3) // 4 // 2
        if size < 1:
            raise ConfigError(f"img_size={c.img_size} leaves nothing to classify in toy_cell: "
                              "prepare images of at least 5 pixels a side.")
        self.cells = nn.ModuleList([Cell("reduce", c.in_channels, C, rows["reduce"], c),
                                    Cell("normal", 2 * C, C, rows["normal"], c),
                                    Cell("reduce", 2 * C, 2 * C, rows["reduce"], c)])
        self.hidden = Linear(4 * C * size * size, 128)
        self.classifier = Linear(128, c.num_classes)

    def forward(self, x, targets=None, arch=None):
        """See ImageNetwork."""
        now = sampled(self, arch)
        for cell in self.cells:
            x = self.drop(cell(x, now[cell.name]))
        x = F.relu(self.hidden(F.max_pool2d(x, 2).flatten(1))) # (B, 128)
        return with_loss(self.classifier(self.drop(x)), targets)

    def drop(self, x):
        return F.dropout(x, self.config.dropout, self.training)


def genotype(arch):
    """The published text of an architecture."""
    cells = {name: zip(ops, SOURCES, strict=True) for name, ops in arch.items()}
    return to_genotype(cells, CONCAT)


def columns(arch):
    """The columns of a benchmark table that say which architecture a row is about."""
    return {f"{name[0]}{edge}": op for name in ("normal", "reduce")
            for edge, op in zip(("01", "02", "12"), arch[name], strict=True)}


def arch_of(text):
    """The architecture of a genotype. Raises ConfigError if it is not one of this space."""
    cells = from_genotype("toy_cell", text, CONCAT, PRIMITIVES)
    if any(tuple(source for _, source in pairs) != SOURCES for pairs in cells.values()):
        raise ConfigError(f"'{text}' is not a genotype of toy_cell: the sources of both cells are "
                          f"{', '.join(map(str, SOURCES))}.")
    return {name: [op for op, _ in pairs] for name, pairs in cells.items()}


def build(config, arch=None):
    """A network from a dict of the keys above, with img_size, in_channels and num_classes."""
    known = settings(config, globals(), img_size=28, in_channels=1, num_classes=10)
    return ToyCell(known, arch)
