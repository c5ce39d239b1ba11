"""
The toy cell space of TangleNAS (Sukthanker et al. 2023): a normal and a reduction cell of 2 nodes and 3 edges, 4,096 architectures.

Three cells on the bare image, the first and the third of them reductions, then a small classifier. The rows of an architecture's
`normal` and `reduce` are the edges node 1 <- input, node 2 <- input, node 2 <- node 1; both reductions are alike.
"""
from types import SimpleNamespace

import torch
import torch.nn as nn
from torch.nn import functional as F

from configurator import check_range, defaults
from search_spaces.cells import CellNetwork, DilConv, Edge, ReLUConvBN, SepConv, nodes
from search_spaces.cells import from_genotype, to_genotype
from supernet import Choice, Linear, check_arch, check_names

# -----------------------------------------------------------------------------
init_channels = 32 # of a node in the first two cells; doubled in the third
primitives = ['sep_conv_3x3', 'sep_conv_5x5', 'dil_conv_3x3', 'dil_conv_5x5'] # the operations to choose from
entanglement = 'weights' # of the 3 x 3 and 5 x 5 convolutions, as they are mixed; 'outputs': each runs; 'none': each has its own weights
group_weight = True # mixed weights count with their total, behind their BatchNorm; False: as in the literature
affine = False # weight and bias in the BatchNorms
dropout = 0.2 # behind every cell and before the last layer
# -----------------------------------------------------------------------------

PRIMITIVES = tuple(primitives)
SOURCES, CONCAT = (0, 0, 1), (1, 2)


class Cell(nn.Module):

    def __init__(self, name, i, C, rows, c):
        """rows: the operations to choose from, of each of the 3 edges. A reduction has stride 2 on what leaves the input."""
        super().__init__()
        self.name = name
        self.preprocess = ReLUConvBN(i, C, 1, affine=c.affine)
        ops = {"sep_conv": lambda kernels, stride: SepConv(C, C, kernels, stride, c.affine),
               "dil_conv": lambda kernels, stride: DilConv(C, C, kernels, stride, c.affine)}
        self.edges = nn.ModuleList([Edge(row, ops, 2 if name == "reduce" and source == 0 else 1, c.entanglement, c.group_weight)
                                    for row, source in zip(rows, SOURCES, strict=True)])

    def forward(self, x, w):
        return torch.cat(nodes([self.preprocess(x, F.relu(x))], self.edges, w), 1) # (B, 2C, H, W)


class ToyCell(CellNetwork):

    def __init__(self, c, arch=None):
        super().__init__()
        self.config = c
        check_range(c, 1, "init_channels")
        check_range(c, 0, "dropout", below=1)
        check_names("primitives", c.primitives, PRIMITIVES)
        self.choices = {name: Choice(tuple(c.primitives), repeat=3) for name in ("normal", "reduce")}
        rows = {name: [c.primitives] * 3 for name in self.choices}
        if arch is not None: # nothing is left to choose
            rows = {name: [[op] for op in ops] for name, ops in check_arch(self.choices, arch).items()}
            self.choices = {}
        C, size = c.init_channels, (c.img_size + 3) // 4 // 2 # two reductions round up, the pool rounds down
        if size < 1:
            raise SystemExit(f"img_size={c.img_size} leaves nothing to classify in toy_cell: its images have at least 5 pixels a side.")
        self.cells = nn.ModuleList([Cell("reduce", c.in_channels, C, rows["reduce"], c), Cell("normal", 2 * C, C, rows["normal"], c),
                                    Cell("reduce", 2 * C, 2 * C, rows["reduce"], c)])
        self.hidden, self.classifier = Linear(4 * C * size * size, 128), Linear(128, c.num_classes)

    def forward(self, x, targets=None, arch=None):
        """x: (B, in_channels, H, W), targets: (B,) classes or None -> logits (B, num_classes), loss or None. arch: None for a
        stand-alone network, else an architecture, or weights for a mixture."""
        assert arch is not None or not self.choices, "a supernet needs weights or an architecture as its third argument"
        for cell in self.cells:
            x = self.drop(cell(x, [None] * 3 if arch is None else arch[cell.name]))
        x = F.relu(self.hidden(F.max_pool2d(x, 2).flatten(1))) # (B, 128)
        logits = self.classifier(self.drop(x))
        return logits, None if targets is None else F.cross_entropy(logits, targets)

    def drop(self, x):
        return F.dropout(x, self.config.dropout, self.training)


def genotype(arch):
    """The published text of an architecture."""
    return to_genotype({name: zip(ops, SOURCES, strict=True) for name, ops in arch.items()}, CONCAT)


def columns(arch):
    """The columns of a benchmark table that say which architecture a row is about."""
    return {f"{name[0]}{edge}": op for name in ("normal", "reduce") for edge, op in zip(("01", "02", "12"), arch[name], strict=True)}


def arch_of(text):
    """The architecture of a genotype; SystemExit if it is none."""
    cells = from_genotype("toy_cell", text, CONCAT, PRIMITIVES)
    if any(tuple(source for _, source in pairs) != SOURCES for pairs in cells.values()):
        raise SystemExit(f"'{text}' is no genotype of toy_cell: the sources of both cells are {', '.join(map(str, SOURCES))}.")
    return {name: [op for op, _ in pairs] for name, pairs in cells.items()}


def build(config, arch=None):
    """A network from a dict of the keys above, with img_size, in_channels and num_classes; other keys are left alone."""
    known = defaults(globals()) | {"img_size": 28, "in_channels": 1, "num_classes": 10}
    return ToyCell(SimpleNamespace(**known | {name: value for name, value in config.items() if name in known}), arch)


DATA = "images"
