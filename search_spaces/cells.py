"""The operations, edges and nodes of cells, which several spaces share."""
import torch
from torch.nn import functional as F
import torch.nn as nn
import re
from search_spaces.convs import BatchNorm2d, Conv2d, ENTANGLEMENTS, ImageNetwork, drop_path
from supernet import measure_cost, one_hot, straight_through


def to_genotype(cells, concat):
    """The text of a normal and a reduction cell, as DARTS wrote it first. cells: name -> [(operation, source)]; concat: the nodes."""
    return "Genotype(" + ", ".join(f"{name}={list(cells[name])}, {name}_concat=range({concat[0]}, {concat[-1] + 1})"
                                   for name in ("normal", "reduce")) + ")"


def from_genotype(space, text, concat, primitives):
    """{"normal", "reduce"}: [(operation, source)] of such a text; SystemExit if it is none of this space."""
    pair = r"\('(\w+)', (\d+)\)"
    ends = rf"(?:range\({concat[0]}, {concat[-1] + 1}\)|{re.escape(str(list(concat)))})"
    match = re.fullmatch(", ".join(rf"{name}=\[((?:{pair}(?:, )?)*)\], {name}_concat={ends}" for name in ("normal", "reduce"))
                         .join((r"Genotype\(", r"\)")), text)
    if not match:
        raise SystemExit(f"'{text}' is no genotype of {space}: write Genotype(normal=[('{primitives[-1]}', 0), ...], "
                         f"normal_concat=range({concat[0]}, {concat[-1] + 1}), and the same for reduce).")
    cells = {name: [(op, int(source)) for op, source in re.findall(pair, match[i])] for name, i in (("normal", 1), ("reduce", 4))}
    for op, _ in cells["normal"] + cells["reduce"]:
        if op not in primitives:
            raise SystemExit(f"The genotype has '{op}', which is not an operation of {space}: {', '.join(primitives)}.")
    return cells


def scaled(x, scale):
    return x if scale is None else x * scale.to(x.dtype)


class ReLUConvBN(nn.Module):
    def __init__(self, i, o, kernels, stride=1, affine=True):
        super().__init__()
        self.conv, self.norm = Conv2d(i, o, kernels, stride), BatchNorm2d(o, affine=affine)

    def forward(self, x, r, k=None, scale=None):
        return self.norm(self.conv(r, None, None, k), None, scale)


class DilConv(nn.Module):
    """ReLU, depthwise with dilation 2, pointwise, norm."""
    def __init__(self, i, o, kernels, stride=1, affine=True):
        super().__init__()
        self.depthwise, self.pointwise = Conv2d(i, i, kernels, stride, dilation=2, groups=i), Conv2d(i, o, 1)
        self.norm = BatchNorm2d(o, affine=affine)

    def forward(self, x, r, k=None, scale=None):
        return self.norm(self.pointwise(self.depthwise(r, None, None, k)), None, scale)


class SepConv(nn.Module):
    """ReLU, depthwise, pointwise, norm, twice; the stride is in the first."""
    def __init__(self, i, o, kernels, stride=1, affine=True):
        super().__init__()
        self.depthwise_1, self.pointwise_1 = Conv2d(i, i, kernels, stride, groups=i), Conv2d(i, i, 1)
        self.norm_1 = BatchNorm2d(i, affine=affine)
        self.depthwise_2, self.pointwise_2 = Conv2d(i, i, kernels, groups=i), Conv2d(i, o, 1)
        self.norm_2 = BatchNorm2d(o, affine=affine)

    def forward(self, x, r, k=None, scale=None):
        x = F.relu(self.norm_1(self.pointwise_1(self.depthwise_1(r, None, None, k))))
        return self.norm_2(self.pointwise_2(self.depthwise_2(x, None, None, k)), None, scale)


class Pool(nn.Module):
    """Over 3 x 3; an average leaves out the padding. norm: a BatchNorm behind it. Pools of the same node compute the same: shared, a
    dict of the node, keeps it for the next."""
    def __init__(self, pool, C, stride=1, norm=False):
        super().__init__()
        self.pool, self.stride = pool, stride
        self.norm = BatchNorm2d(C, affine=False) if norm else None

    def forward(self, x, r, k=None, scale=None, shared=None):
        if shared is None or not (self.norm is None or self.norm.training): # in evaluation each norm has its own statistics
            return scaled(self.pooled(x), scale)
        if (self.pool, self.stride) not in shared:
            shared[self.pool, self.stride] = self.pooled(x), self.norm
        y, norm = shared[self.pool, self.stride]
        if norm is not self.norm:
            self.norm.running_mean.data.copy_(norm.running_mean) # autograd must not mind: training reads neither
            self.norm.running_var.data.copy_(norm.running_var)
        return scaled(y, scale)

    def pooled(self, x):
        if self.pool == "avg":
            y = F.avg_pool2d(x, 3, self.stride, 1, count_include_pad=False)
        else:
            y = F.max_pool2d(x, 3, self.stride, 1)
        return y if self.norm is None else self.norm(y)


class Skip(nn.Module):
    def forward(self, x, r, k=None, scale=None):
        return scaled(x, scale)


class FactorizedReduce(nn.Module):
    """ReLU, half of the channels from the even and half from the odd rows and columns by 1 x 1 convolutions of stride 2, norm."""
    def __init__(self, i, o, affine=True):
        super().__init__()
        if o % 2:
            raise SystemExit(f"A skip of stride 2 makes its {o} channels in two halves: choose an even number, by init_channels or "
                             "partial_channels.")
        self.conv_1, self.conv_2 = Conv2d(i, o // 2, 1, 2), Conv2d(i, o // 2, 1, 2)
        self.norm = BatchNorm2d(o, affine=affine)

    def forward(self, x, r, k=None, scale=None):
        odd = F.pad(r, (0, 1, 0, 1))[:, :, 1:, 1:]
        return self.norm(torch.cat((self.conv_1(r), self.conv_2(odd)), 1), None, scale)


def kernel_of(primitive):
    """("sep_conv", 5) of sep_conv_5x5, ("skip_connect", None) of skip_connect."""
    name, _, size = primitive.rpartition("_")
    return (name, int(size.split("x")[0])) if size[:1].isdigit() else (primitive, None)


class Edge(nn.Module):
    """One operation between two nodes of a cell, or a choice of some.

    ops: name, such as "sep_conv" -> a function of (kernels, stride) that makes the module of an operation. entanglement: "weights",
    operations that differ in their kernel alone share weights, and their mixture is one operation on mixed weights (weight
    superposition); "outputs", they share weights, and each runs (weight entanglement); "none", each has its own weights, and runs
    (weight sharing). group_weight: mixed weights are followed by their total weight, which a BatchNorm has removed; without it, as in
    the literature, the group as a whole gets no gradient. partial_channels: k, the operations are of the first C / k channels, and the
    others go around them, pooled where the stride is 2; all are shuffled, so that the next edge sees others (PC-DARTS, Xu et al. 2020).
    """
    def __init__(self, primitives, ops, stride=1, entanglement="weights", group_weight=True, partial_channels=1):
        super().__init__()
        self.primitives, self.stride, self.entanglement, self.group_weight = tuple(primitives), stride, entanglement, group_weight
        self.partial_channels, self.pruned = partial_channels, () # pruned: places of what is no longer an option
        if entanglement not in ENTANGLEMENTS:
            raise SystemExit(f"entanglement='{entanglement}' is not one of {', '.join(ENTANGLEMENTS)}.")
        self.identity = self.primitives == ("skip_connect",) and stride == 1
        self.groups = {} # name -> (its places in primitives, its kernels)
        for place, primitive in sorted(enumerate(primitives), key=lambda item: kernel_of(item[1])[1] or 0):
            name, kernel = kernel_of(primitive)
            places, kernels = self.groups.setdefault(primitive if entanglement == "none" else name, ([], []))
            places.append(place)
            kernels.append(kernel)
        self.ops = nn.ModuleDict({name: ops[kernel_of(primitives[places[0]])[0]](tuple(kernels), stride)
                                  for name, (places, kernels) in self.groups.items() if name != "none"})

    def forward(self, x, r, w=None, shared=None):
        """x: (B, C, H, W), r: its ReLU. w: None where there is one operation, an operation, one and its weight, or weights (K,). shared:
        a dict for what the edges from x have in common."""
        k, n = self.partial_channels, x.shape[1] // self.partial_channels
        if k == 1:
            return self.operate(x, r, w, shared)
        y, rest = self.operate(x[:, :n], r[:, :n], w, shared), x[:, n:]
        y = torch.cat((y, rest if self.stride == 1 else F.max_pool2d(rest, 2, ceil_mode=True)), 1)
        return y.unflatten(1, (k, n)).transpose(1, 2).flatten(1, 2)

    def run(self, name, x, r, k, scale, shared):
        op = self.ops[name]
        return op(x, r, k, scale, shared) if isinstance(op, Pool) else op(x, r, k, scale)

    def operate(self, x, r, w, shared=None):
        if isinstance(w, torch.Tensor):
            return self.mixture(x, r, w, shared)
        primitive, p = w if isinstance(w, tuple) else (w or self.primitives[0], None)
        if primitive == "none":
            return torch.zeros_like(x[:, :, ::self.stride, ::self.stride])
        name, kernel = (primitive, None) if primitive in self.ops else kernel_of(primitive)
        if self.groups[name][1] == [kernel]:
            kernel = None # there is no other
        mixing = kernel and p is not None and self.entanglement == "weights"
        y = self.run(name, x, r, (kernel, p) if mixing else kernel, None, shared)
        return straight_through(y, None if mixing and not self.group_weight else p)

    def mixture(self, x, r, w, shared):
        y = 0
        for name, (places, kernels) in self.groups.items():
            if name != "none" and self.entanglement == "weights" and len(kernels) > 1:
                p, total = w[places], w[places].sum()
                scale = total if self.group_weight else (total > 0).to(total.dtype) # a norm of 0 is not 0
                y = y + self.run(name, x, r, p, scale, shared)
            elif name != "none":
                for place, kernel in zip(places, kernels, strict=True):
                    if place not in self.pruned:
                        y = y + self.run(name, x, r, kernel if len(kernels) > 1 else None, w[place], shared)
        return y

    def prune(self, mask):
        """No longer runs the operations where mask: (K,) is True, whose weights are 0 from here on; a shared weight stays as large."""
        self.pruned = tuple(mask.nonzero().flatten().tolist())
        for name, (places, _) in list(self.groups.items()):
            if set(places) <= set(self.pruned):
                del self.groups[name]
                if name in self.ops:
                    del self.ops[name]


def partial(C, partial_channels):
    """The channels of an edge's operations, in a cell of C channels a node."""
    if partial_channels < 1 or C % partial_channels:
        raise SystemExit(f"partial_channels={partial_channels} does not divide the {C} channels of a node: change it or init_channels.")
    return C // partial_channels


def nodes(states, edges, w, drop=0.0):
    """The nodes of a cell: each is the sum of its edges from all states before it, in the order of those.

    states: the cell's inputs, (B, C, H, W) each; edges: of the first node, of the second, ..., an Edge or None; w: what each runs
    with. drop: the probability of drop_path() for all edges but identities, in networks without a choice.
    """
    states, edges, inputs, i = [(x, F.relu(x), {}) for x in states], list(edges), len(states), 0
    while i < len(edges):
        y = 0
        for edge, (x, r, shared), choice in zip(edges[i:], states, w[i:], strict=False): # as many as there are states
            if edge is not None:
                term = edge(x, r, choice, shared)
                y = y + (term if edge.identity else drop_path(term, drop))
        i += len(states)
        states.append((y, F.relu(y), {}))
    return [x for x, *_ in states[inputs:]]


class EdgeCosts:
    """The cost of a network whose edges choose their operations: the sum over its edges, and a constant.

    edges: [(Edge, the name of its choice, row)]; run(arch): the network's hard forward of one image.
    """
    def __init__(self, net, edges, run):
        shapes, known = {}, {}
        arch = {name: [None] * choice.repeat for name, choice in net.choices.items()}
        for edge, choice, row in edges:
            arch[choice][row] = next(primitive for i, primitive in enumerate(edge.primitives) if i not in edge.pruned)
        hooks = [edge.register_forward_pre_hook(lambda edge, args: shapes.update({edge: args[0].shape})) for edge, *_ in edges]
        base = measure_cost(net, lambda: run(arch))
        for hook in hooks:
            hook.remove()

        def cost_of(edge, primitive):
            key = (shapes[edge], edge.stride, primitive)
            if key not in known:
                x = next(net.parameters()).new_zeros(shapes[edge])
                known[key] = list(measure_cost(edge, lambda: edge(x, x, primitive)).values())
            return known[key]

        self.rows = {} # (choice, row) -> (K, 2), summed over the cells that share it
        for edge, choice, row in edges:
            table = [[0, 0] if i in edge.pruned else cost_of(edge, primitive) for i, primitive in enumerate(edge.primitives)]
            table = torch.tensor(table).double()
            self.rows[choice, row] = self.rows.get((choice, row), 0) + table
        self.base = torch.tensor(list(base.values())).double() - self(one_hot(net.choices, arch), 0)

    def __call__(self, weights, base=None):
        """(2,): params and flops, of weights their expectations."""
        return sum(weights[choice][row].double().cpu() @ table for (choice, row), table in self.rows.items()) + (
            self.base if base is None else base)


class CellNetwork(ImageNetwork):
    """One whose cells, in self.cells, have edges that choose their operations: cell.name is the choice, and the places of cell.edges are
    its rows."""

    def expected_cost(self, weights):
        if not hasattr(self, "costs"):
            self.costs = EdgeCosts(self, self.edges(), self.run)
        return dict(zip(("params", "flops"), self.costs(weights), strict=True))

    def edges(self):
        """[(Edge, its choice, its row)]"""
        return [(edge, cell.name, i) for cell in self.cells if hasattr(cell, "edges") for i, edge in enumerate(cell.edges)]

    def prune(self, mask):
        """Drops the operations of which nothing is left, for good. mask: choice -> (rows, K), True for what is no longer an option."""
        for edge, choice, row in self.edges():
            edge.prune(mask[choice][row])


def widen(old, new, generator, optimizers=()):
    """Fills `new` from `old`, a network with all its names and smaller shapes: where a dimension grew, the rest of it are copies of
    others drawn at random, the same ones for all that grew so (after Net2WiderNet, Chen et al. 2016). optimizers: that of old and that of
    new, whose state is filled likewise. Returns new."""
    drawn = {}

    def grow(t, shape):
        for dim, (a, b) in enumerate(zip(t.shape, shape, strict=True)):
            if b > a:
                if (a, b) not in drawn:
                    drawn[a, b] = torch.cat((torch.arange(a), torch.randint(a, (b - a,), generator=generator)))
                t = t.index_select(dim, drawn[a, b].to(t.device))
        return t

    theirs = old.state_dict()
    new.load_state_dict({name: grow(theirs[name], t.shape) for name, t in new.state_dict().items()})
    if optimizers:
        theirs = dict(old.named_parameters())
        for name, q in new.named_parameters():
            p = theirs[name]
            optimizers[1].state[q] = {key: grow(t, q.shape) if isinstance(t, torch.Tensor) and t.shape == p.shape else t
                                      for key, t in optimizers[0].state[p].items()}
    return new
