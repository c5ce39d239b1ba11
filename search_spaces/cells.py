"""What several spaces share: the operations, edges and nodes of cells, their genotypes, and a stem
for large images."""
import re

import torch
import torch.nn as nn
from torch.nn import functional as F

from configurator import ConfigError
from search_spaces.convs import (
    BatchNorm2d, Conv2d, ImageNetwork, check_entanglement, drop_path, measure_cost,
)
from supernet import ALL, Choice, Sampled, one_hot, set_choices, straight_through

# -----------------------------------------------------------------------------
# genotypes: the published text of two cells

def to_genotype(cells, concat):
    """The text of a normal and a reduction cell, in the format of DARTS.

    cells: {"normal", "reduce"}: [(operation, source)]. concat: the nodes that make the output.
    """
    nodes = f"range({concat[0]}, {concat[-1] + 1})"
    parts = [f"{name}={list(cells[name])}, {name}_concat={nodes}" for name in ("normal", "reduce")]
    return f"Genotype({', '.join(parts)})"


def from_genotype(space, text, concat, primitives):
    """{"normal", "reduce"}: [(operation, source)] of such a text. Raises ConfigError if it is not a
    genotype of this space."""
    nodes = f"range({concat[0]}, {concat[-1] + 1})"
    pair = r"\('(\w+)', (\d+)\)"
    ends = f"(?:{re.escape(nodes)}|{re.escape(str(list(concat)))})"
    parts = [rf"{name}=\[((?:{pair}(?:, )?)*)\], {name}_concat={ends}"
             for name in ("normal", "reduce")]
    match = re.fullmatch(rf"Genotype\({', '.join(parts)}\)", text)
    if not match:
        raise ConfigError(f"'{text}' is not a genotype of {space}: write Genotype(normal="
                          f"[('{primitives[-1]}', 0), ...], normal_concat={nodes}, and the same "
                          "for reduce).")
    cells = {name: [(op, int(source)) for op, source in re.findall(pair, match[group])]
             for name, group in (("normal", 1), ("reduce", 4))}
    for op, _ in cells["normal"] + cells["reduce"]:
        if op not in primitives:
            raise ConfigError(f"The genotype has '{op}', which is not an operation of {space}: "
                              f"{', '.join(primitives)}.")
    return cells

# -----------------------------------------------------------------------------
# operations: (x, its ReLU r, k, scale) -> a tensor of x's shape, or smaller by the stride. k is the
# kernel, as in Conv2d; scale: None, or what the output is multiplied by.

def scaled(x, scale):
    return x if scale is None else x * scale.to(x.dtype)


class ReLUConvBN(nn.Module):
    def __init__(self, i, o, kernels, stride=1, affine=True):
        super().__init__()
        self.conv, self.norm = Conv2d(i, o, kernels, stride), BatchNorm2d(o, affine=affine)

    def forward(self, x, r, k=ALL, scale=None):
        return self.norm(self.conv(r, None, None, k), None, scale)


class DilConv(nn.Module):
    """ReLU, depthwise with dilation 2, pointwise, norm."""
    def __init__(self, i, o, kernels, stride=1, affine=True):
        super().__init__()
        self.depthwise = Conv2d(i, i, kernels, stride, dilation=2, groups=i)
        self.pointwise, self.norm = Conv2d(i, o, 1), BatchNorm2d(o, affine=affine)

    def forward(self, x, r, k=ALL, scale=None):
        return self.norm(self.pointwise(self.depthwise(r, None, None, k)), None, scale)


class SepConv(nn.Module):
    """ReLU, depthwise, pointwise, norm, twice; the stride is in the first."""
    def __init__(self, i, o, kernels, stride=1, affine=True):
        super().__init__()
        self.depthwise_1 = Conv2d(i, i, kernels, stride, groups=i)
        self.pointwise_1, self.norm_1 = Conv2d(i, i, 1), BatchNorm2d(i, affine=affine)
        self.depthwise_2 = Conv2d(i, i, kernels, groups=i)
        self.pointwise_2, self.norm_2 = Conv2d(i, o, 1), BatchNorm2d(o, affine=affine)

    def forward(self, x, r, k=ALL, scale=None):
        x = F.relu(self.norm_1(self.pointwise_1(self.depthwise_1(r, None, None, k))))
        return self.norm_2(self.pointwise_2(self.depthwise_2(x, None, None, k)), None, scale)


class Pool(nn.Module):
    """Over 3 x 3; an average leaves out the padding. norm: a BatchNorm follows.

    Pools of the same input compute the same: the first one keeps its output in `shared`, a dict of
    that input, for the others.
    """
    def __init__(self, pool, C, stride=1, norm=False):
        super().__init__()
        self.pool, self.stride = pool, stride
        self.norm = BatchNorm2d(C, affine=False) if norm else None

    def forward(self, x, r, k=ALL, scale=None, shared=None):
        evaluation = self.norm is not None and not self.norm.training
        if shared is None or evaluation: # in evaluation each norm has its own statistics
            return scaled(self.pooled(x), scale)
        key = self.pool, self.stride
        if key not in shared:
            shared[key] = self.pooled(x), self.norm
        y, norm = shared[key]
        if norm is not self.norm: # .data: training reads neither, so autograd need not know
            self.norm.running_mean.data.copy_(norm.running_mean)
            self.norm.running_var.data.copy_(norm.running_var)
        return scaled(y, scale)

    def pooled(self, x):
        if self.pool == "avg":
            y = F.avg_pool2d(x, 3, self.stride, 1, count_include_pad=False)
        else:
            y = F.max_pool2d(x, 3, self.stride, 1)
        return y if self.norm is None else self.norm(y)


class Skip(nn.Module):
    def forward(self, x, r, k=ALL, scale=None):
        return scaled(x, scale)


class FactorizedReduce(nn.Module):
    """ReLU, two 1 x 1 convolutions of stride 2, each to half of the channels, of the even and of
    the odd rows and columns, norm."""
    def __init__(self, i, o, affine=True):
        super().__init__()
        if o % 2:
            raise ConfigError(f"A skip of stride 2 makes its {o} channels in two halves: choose an "
                              "even number, by init_channels or partial_channels.")
        self.conv_1, self.conv_2 = Conv2d(i, o // 2, 1, 2), Conv2d(i, o // 2, 1, 2)
        self.norm = BatchNorm2d(o, affine=affine)

    def forward(self, x, r, k=ALL, scale=None):
        odd = F.pad(r, (0, 1, 0, 1))[:, :, 1:, 1:]
        return self.norm(torch.cat((self.conv_1(r), self.conv_2(odd)), 1), None, scale)

# -----------------------------------------------------------------------------
# the stem for large images

def has_imagenet_stem(c):
    """Whether a network begins with ImageNet's stem, which divides the side of an image by 8.

    c.stem: 'imagenet', 'cifar', or '' for the one whose last maps, after two reductions, are closer
    to the published 8 x 8 of CIFAR-10 and 7 x 7 of ImageNet. Images of 64 pixels have 16 x 16 or
    2 x 2 there, and those of 96 pixels 24 x 24 or 3 x 3.
    """
    if c.stem not in ("", "cifar", "imagenet"):
        raise ConfigError(f"stem={c.stem!r} is not one of cifar and imagenet, or '' for imagenet "
                          "from 96 pixels on.")
    if c.stem == "imagenet" and c.img_size < 32:
        raise ConfigError("stem='imagenet' is for images of 32 pixels and more, because it and the "
                          f"cells divide the side by 32, and img_size={c.img_size}: leave it out, "
                          "or give 'cifar'.")
    return c.stem == "imagenet" or (not c.stem and c.img_size >= 96)


def imagenet_stem(i, C):
    """Three convolutions of stride 2, as two modules: the first makes C channels of an image and a
    quarter of its side, the second an eighth."""
    half = -(-C // 2)
    first = nn.Sequential(Conv2d(i, half, 3, 2), BatchNorm2d(half), nn.ReLU(),
                          Conv2d(half, C, 3, 2), BatchNorm2d(C))
    return first, nn.Sequential(nn.ReLU(), Conv2d(C, C, 3, 2), BatchNorm2d(C))

# -----------------------------------------------------------------------------
# edges and nodes

def kernel_of(primitive):
    """("sep_conv", 5) of sep_conv_5x5, ("skip_connect", None) of skip_connect."""
    name, _, size = primitive.rpartition("_")
    has_kernel = size[:1].isdigit()
    return (name, int(size.split("x")[0])) if has_kernel else (primitive, None)


class Edge(nn.Module):
    """One operation between two nodes of a cell, or a choice of several.

    primitives: the options. ops: {name, such as "sep_conv": a function of (kernels, stride) that
    makes the module}. entanglement, of operations that differ in their kernel alone, which are one
    group:
        weights    they share weights, and their mixture is one operation on mixed weights (weight
                   superposition)
        outputs    they share weights, and each runs (weight entanglement)
        none       each has its own weights, and runs (weight sharing)
    group_weight: the output of mixed weights is multiplied by the group's total weight, which its
        BatchNorm has removed. Without it, as in the literature, the group gets no gradient.
    partial_channels: k; the operations are of the first C / k channels. The others go around them,
        pooled where the stride is 2, and all are shuffled, so that the next edge operates on others
        (PC-DARTS, Xu et al. 2020).
    """
    def __init__(self, primitives, ops, stride=1, entanglement="weights", group_weight=True,
                 partial_channels=1):
        super().__init__()
        check_entanglement(entanglement)
        self.primitives, self.stride = tuple(primitives), stride
        self.entanglement, self.group_weight = entanglement, group_weight
        self.partial_channels = partial_channels
        self.pruned = () # indices of what is no longer an option
        self.identity = self.primitives == ("skip_connect",) and stride == 1
        self.groups = {} # name -> (indices in primitives, kernels)
        kernels = [kernel_of(primitive)[1] or 0 for primitive in primitives]
        for i in sorted(range(len(primitives)), key=kernels.__getitem__):
            name, kernel = kernel_of(primitives[i])
            group = primitives[i] if entanglement == "none" else name
            indices, kernels_of_group = self.groups.setdefault(group, ([], []))
            indices.append(i)
            kernels_of_group.append(kernel)
        self.ops = nn.ModuleDict({
            name: ops[kernel_of(primitives[indices[0]])[0]](tuple(kernels), stride)
            for name, (indices, kernels) in self.groups.items() if name != "none"})

    def forward(self, x, r, choice=ALL, shared=None):
        """x: (B, C, H, W), r: its ReLU. choice: Sampled. shared: a dict for what all edges from x
        have in common."""
        k = self.partial_channels
        if k == 1:
            return self.operate(x, r, choice, shared)
        n = x.shape[1] // k
        y, rest = self.operate(x[:, :n], r[:, :n], choice, shared), x[:, n:]
        rest = rest if self.stride == 1 else F.max_pool2d(rest, 2, ceil_mode=True)
        y = torch.cat((y, rest), 1)
        return y.unflatten(1, (k, n)).transpose(1, 2).flatten(1, 2)

    def run(self, name, x, r, k, scale, shared):
        op = self.ops[name]
        return op(x, r, k, scale, shared) if isinstance(op, Pool) else op(x, r, k, scale)

    def operate(self, x, r, choice, shared=None):
        if choice.is_mixture:
            return self.mixture(x, r, choice.weights, shared)
        primitive, p = choice.option or self.primitives[0], choice.weight
        if primitive == "none":
            return torch.zeros_like(x[:, :, ::self.stride, ::self.stride])
        name, kernel = (primitive, None) if primitive in self.ops else kernel_of(primitive)
        kernels = self.groups[name][1]
        if kernels == [kernel]: # it is the only one
            kernel = None
        if kernel is None:
            return straight_through(self.run(name, x, r, ALL, None, shared), p)
        if self.entanglement == "weights": # as in a mixture, p is the kernel's, and the group's too
            y = self.run(name, x, r, Sampled(kernels, kernel, weight=p), None, shared)
            return straight_through(y, p if self.group_weight else None)
        return straight_through(self.run(name, x, r, Sampled(kernels, kernel), None, shared), p)

    def mixture(self, x, r, weights, shared):
        """weights: (K,), of the primitives."""
        y = 0
        for name, (indices, kernels) in self.groups.items():
            if name == "none":
                continue
            if self.entanglement == "weights" and len(kernels) > 1:
                p, total = weights[indices], weights[indices].sum()
                # the norm of 0 is not 0
                scale = total if self.group_weight else (total > 0).to(total.dtype)
                k = Sampled(tuple(kernels), weights=p)
                y = y + self.run(name, x, r, k, scale, shared)
                continue
            for i, kernel in zip(indices, kernels, strict=True):
                if i not in self.pruned:
                    k = Sampled(kernels, kernel) if len(kernels) > 1 else ALL
                    y = y + self.run(name, x, r, k, weights[i], shared)
        return y

    def prune(self, mask):
        """Stops running the operations where mask: (K,) is True, whose weights are 0 from now on. A
        shared weight stays as large as it is."""
        self.pruned = tuple(mask.nonzero().flatten().tolist())
        for name, (indices, _) in list(self.groups.items()):
            if set(indices) <= set(self.pruned):
                del self.groups[name]
                if name in self.ops:
                    del self.ops[name]


def partial(C, partial_channels):
    """The channels of an edge's operations, in a cell of C channels a node."""
    if partial_channels < 1 or C % partial_channels:
        raise ConfigError(f"partial_channels={partial_channels} does not divide the {C} channels "
                          "of a node: change it or init_channels.")
    return C // partial_channels


def nodes(states, edges, choices, drop=0.0):
    """The nodes of a cell: each is the sum of its edges, one from every state before it.

    states: the cell's inputs, (B, C, H, W) each. edges: those of the first node, of the second, and
    so on, in the order of the states; an Edge or None. choices: the Sampled of each edge. drop: the
    probability of drop_path() for all edges but identities, in networks without a choice.
    """
    inputs, i = len(states), 0
    states, edges = [(x, F.relu(x), {}) for x in states], list(edges)
    while i < len(edges):
        y = 0
        for edge, choice, (x, r, shared) in zip(edges[i:], choices[i:], states, strict=False):
            if edge is not None:
                term = edge(x, r, choice, shared)
                y = y + (term if edge.identity else drop_path(term, drop))
        i += len(states)
        states.append((y, F.relu(y), {}))
    return [x for x, *_ in states[inputs:]]

# -----------------------------------------------------------------------------
# networks of cells

class EdgeCosts:
    """The cost of a network whose edges choose their operations: a constant, and a sum over edges.

    edges: [(Edge, the name of its choice, row)]. run(arch): a hard forward pass of one image.
    """
    def __init__(self, net, edges, run):
        shapes, known = {}, {}
        arch = {name: [None] * choice.repeat for name, choice in net.choices.items()}
        for edge, choice, row in edges:
            left = [op for i, op in enumerate(edge.primitives) if i not in edge.pruned]
            arch[choice][row] = left[0]
        hooks = [edge.register_forward_pre_hook(
            lambda edge, args: shapes.update({edge: args[0].shape})) for edge, *_ in edges]
        base = measure_cost(net, lambda: run(arch))
        for hook in hooks:
            hook.remove()

        def cost_of(edge, primitive):
            key = (shapes[edge], edge.stride, primitive)
            if key not in known:
                x = next(net.parameters()).new_zeros(shapes[edge])
                choice = Sampled(edge.primitives, primitive)
                known[key] = list(measure_cost(edge, lambda: edge(x, x, choice)).values())
            return known[key]

        self.rows = {} # (choice, row) -> (K, 2), summed over the cells that share it
        for edge, choice, row in edges:
            table = [[0, 0] if i in edge.pruned else cost_of(edge, primitive)
                     for i, primitive in enumerate(edge.primitives)]
            table = torch.tensor(table).double()
            self.rows[choice, row] = self.rows.get((choice, row), 0) + table
        of_edges = self(one_hot(net.choices, arch), 0)
        self.base = torch.tensor(list(base.values())).double() - of_edges

    def __call__(self, weights, base=None):
        """(2,): params and flops, of weights their expectations."""
        rows = sum(weights[choice][row].double().cpu() @ table
                   for (choice, row), table in self.rows.items())
        return rows + (self.base if base is None else base)


def check_names(key, values, allowed):
    """Raises ConfigError unless the values of a key are different ones of those allowed."""
    if len(set(values)) < len(values) or not set(values) <= set(allowed):
        raise ConfigError(f"{key}={list(values)} must be one or more different ones of "
                          f"{', '.join(allowed)}.")


class CellNetwork(ImageNetwork):
    """A network whose self.cells have edges that choose their operations: cell.name is the choice,
    and the indices of cell.edges are its rows."""

    def choose(self, primitives, allowed, arch, **of_choice):
        """Gives the network a choice of primitives for every row of `of_choice`, name -> Choice's
        keywords. Returns {name: the options of each row}, those of `arch` if there is one."""
        check_names("primitives", primitives, allowed)
        choices = {name: Choice(tuple(primitives), **kw) for name, kw in of_choice.items()}
        arch = set_choices(self, choices, arch)
        if arch is None:
            return {name: [primitives] * choice.repeat for name, choice in choices.items()}
        return {name: [[op] for op in ops] for name, ops in arch.items()}

    def expected_cost(self, weights):
        if not hasattr(self, "costs"):
            self.costs = EdgeCosts(self, self.edges(), self.run)
        return dict(zip(("params", "flops"), self.costs(weights), strict=True))

    def edges(self):
        """[(Edge, its choice, its row)]"""
        return [(edge, cell.name, i) for cell in self.cells if hasattr(cell, "edges")
                for i, edge in enumerate(cell.edges)]

    def prune(self, mask):
        """Drops the operations that are no longer an option, for good. mask: {choice: (rows, K)},
        True for those."""
        for edge, choice, row in self.edges():
            edge.prune(mask[choice][row])


def widen(old, new, generator, optimizers=()):
    """Fills `new` from `old`, a network with the same names and smaller shapes, and returns it.

    Where a dimension grew, its further channels are copies of others drawn at random, the same ones
    for all dimensions that grew alike (after Net2WiderNet, Chen et al. 2016). optimizers: that of
    old and that of new, whose state is filled likewise.
    """
    drawn = {}

    def grow(t, shape):
        for dim, (a, b) in enumerate(zip(t.shape, shape, strict=True)):
            if b > a:
                if (a, b) not in drawn:
                    copies = torch.randint(a, (b - a,), generator=generator)
                    drawn[a, b] = torch.cat((torch.arange(a), copies))
                t = t.index_select(dim, drawn[a, b].to(t.device))
        return t

    theirs = old.state_dict()
    grown = {name: grow(theirs[name], t.shape) for name, t in new.state_dict().items()}
    new.load_state_dict(grown)
    if optimizers:
        theirs = dict(old.named_parameters())
        for name, q in new.named_parameters():
            p, state = theirs[name], optimizers[0].state[theirs[name]]
            optimizers[1].state[q] = {
                key: grow(t, q.shape) if isinstance(t, torch.Tensor) and t.shape == p.shape else t
                for key, t in state.items()}
    return new
