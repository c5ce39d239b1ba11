"""Every vision space: mixture, hard architecture and extracted network agree in value and
gradient; costs, genotypes, published counts."""
import copy
import functools
import importlib
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from configurator import ConfigError, defaults
from optim_nas import METHODS, uniform
from search_spaces import darts, nb201, toy_cell
from search_spaces.cells import (DilConv, Edge, FactorizedReduce, Pool, ReLUConvBN, SepConv, Skip,
                                 nodes, widen)
from search_spaces.convs import BatchNorm2d, Conv2d, ENTANGLEMENTS, drop_path, measure_norms
from supernet import ALL, Sampled, check_arch, extremes, one_hot, straight_through_arch

SPACES = {"nb201": dict(init_channels=4, n_cell=1), "toy_cell": dict(init_channels=4),
          "darts": dict(init_channels=4, n_layer=3),
          "mobilenetv3": dict(depth=[1, 2, 3], expand=[2, 3], stem_channels=8, stem_stride=1,
                              widths=[8, 16], strides=[2, 1], se=[0, 1],
                              hswish=[1, 0], last_channels=16, mix_channels=16,
                              kernel_transform=False),
          "autoformer": dict(patch_size=2, n_embd=[4, 6, 9], n_layer=[1, 2, 3], n_head=[1, 2, 4],
                             mlp_ratio=[1, 2.5], head_size=4,
                             rel_pos_clip=2, drop_path=0.3)}
TINY = dict(img_size=8, in_channels=2, num_classes=3)


def entanglements(name):
    return (ENTANGLEMENTS
            if "entanglement" in defaults(vars(importlib.import_module(f"search_spaces.{name}")))
            else ("weights",))


CASES = [(name, entanglement) for name in SPACES for entanglement in entanglements(name)]
PARTIAL = {"nb201": dict(init_channels=4, n_cell=1, partial_channels=2),
           "darts": dict(init_channels=8, n_layer=3, partial_channels=4)}
CELLS = [name for name in SPACES if len(entanglements(name)) > 1]
STEMS = {"nb201": dict(stem="imagenet", img_size=33),
         "darts": dict(stem="imagenet", img_size=33, stem_multiplier=1)}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make(name, **rest):
    """A tiny supernet in which no weight is 0 or 1."""
    torch.manual_seed(0)
    space = importlib.import_module(f"search_spaces.{name}")
    net = space.build(TINY | SPACES[name] | rest).to(torch.get_default_dtype())
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net


def batch(B=6, seed=0, side=TINY["img_size"]):
    c = TINY
    x = torch.randn(B, c["in_channels"], side, side, generator=generator(seed))
    return x, torch.randint(c["num_classes"], (B,), generator=generator(seed))


def run(net, *args):
    """The forward pass with the same dropout every time."""
    torch.manual_seed(1)
    return net(*args)


def weights_of(net, arch, **rest):
    return {name: w.to(torch.get_default_dtype()).requires_grad_(**rest)
            for name, w in one_hot(net.choices, arch).items()}


def mixed(net, seed=0):
    """Weights of a mixture, as leaves."""
    return {name: torch.randn(c.shape, generator=generator(seed)).softmax(-1).requires_grad_()
            for name, c in net.choices.items()}


def close(a, b, tolerance=1e-9):
    assert a.shape == b.shape
    difference = (a - b).abs().max()
    assert difference <= tolerance * max(b.abs().max().item(), 1e-3), f"{difference:.2e}"


def gradients(net, loss):
    return torch.autograd.grad(loss, list(net.parameters()), materialize_grads=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name, entanglement", CASES)
def test_law_of_exactness(name, entanglement, dtype):
    """One-hot mixture, hard architecture and extracted network: logits, loss, and the gradient of
    everything that they share."""
    torch.set_default_dtype(dtype)
    net = make(name, entanglement=entanglement)
    options = [{choice: c.options[min(i, len(c.options) - 1)] for choice, c in net.choices.items()}
               for i in range(max(len(c.options) for c in net.choices.values()))]
    everywhere = [check_arch(net.choices, {choice: [option[choice]] * c.repeat if c.repeat
                                           else option[choice]
                                           for choice, c in net.choices.items()})
                  for option in options]
    drawn = [uniform(net.choices, generator(seed)) for seed in range(1 if name in CELLS else 3)]
    check_law(net, [*drawn, *(everywhere if dtype == torch.float64 else everywhere[1:3])])


@pytest.mark.parametrize("name", PARTIAL)
def test_law_of_exactness_of_partial_channels(name):
    """Also 'none' leaves the way around an edge."""
    net = make(name, **PARTIAL[name])
    check_law(net, [uniform(net.choices, generator()), extremes(net.choices)[0]])


@pytest.mark.parametrize("name", STEMS)
def test_laws_of_imagenets_stem(name):
    """Exactness and costs, also of a side that 2 does not divide."""
    net = make(name, **STEMS[name])
    archs = [uniform(net.choices, generator()), extremes(net.choices)[1]]
    check_law(net, archs, functools.partial(batch, side=33))
    for arch in archs:
        cost = net.cost(arch)
        assert cost == net.extract(arch).cost()
        assert {key: value.item() for key, value in net.cost(weights_of(net, arch)).items()} == cost


@pytest.mark.parametrize("name", STEMS)
def test_the_stem_follows_the_size_of_the_images(name):
    """From 96 pixels on the maps of the cells are an eighth, unless the key says otherwise."""
    for side, stem, stride in ((32, "", 1), (95, "", 1), (96, "", 8), (224, "", 8),
                               (224, "cifar", 1), (32, "imagenet", 8)):
        net, sides = make(name, img_size=side, stem=stem).eval(), []
        net.cells[0].edges[-1].register_forward_hook(
            lambda module, args, y, sides=sides: sides.append(y.shape[-1]))
        net.run(extremes(net.choices)[1])
        # the first of 3 cells of darts is a normal one
        assert sides == [-(-side // stride)], (side, stem)
        assert net.config.stem == stem # another data set may have other images


def check_law(net, archs, batch=batch):
    tolerance, (x, y) = 1e-9 if torch.get_default_dtype() == torch.float64 else 1e-5, batch()
    of_net = copy.deepcopy(net) # its parameters will be gradients
    for arch in archs:
        net.train()
        small = net.extract(arch)
        names = {n for n, _ in small.named_parameters()}
        assert not small.choices and names <= {n for n, _ in net.named_parameters()}
        for training in (True, False):
            if not training:
                measure_norms(net, lambda i, arch=arch: net(batch(seed=i)[0], None, arch), 3)
                measure_norms(small, lambda i, small=small: small(batch(seed=i)[0]), 3)
                for (_, a), (_, b) in zip(small.named_buffers(), net.extract(arch).named_buffers(),
                                          strict=True):
                    close(a, b, tolerance)
            net.train(training)
            small.train(training)
            alone, hard = run(small, x, y), run(net, x, y, arch)
            mixture = run(net, x, y, weights_of(net, arch))
            for found in (hard, mixture):
                close(found[0], alone[0], tolerance)
                close(found[1], alone[1], tolerance)
            expected = gradients(small, alone[1])
            of_hard, of_mixture = gradients(net, hard[1]), gradients(net, mixture[1])
            scale = 10 * tolerance * max(g.abs().max().item() for g in expected)
            # also 0 where the architecture does not reach
            for a, b in zip(of_mixture, of_hard, strict=True):
                assert (a - b).abs().max() <= scale
            for p, g in zip(of_net.parameters(), of_hard, strict=True):
                p.data = g
            for a, b in zip(of_net.extract(arch).parameters(), expected, strict=True):
                assert (a - b).abs().max() <= scale


@pytest.mark.parametrize("group_weight", [True, False])
@pytest.mark.parametrize("name, entanglement", CASES)
def test_an_option_that_carries_its_weight(name, entanglement, group_weight):
    """gdas: the forward pass of the architecture, and to the drawn option's weight the gradient of
    the mixture; of depth to all."""
    net, (x, y) = make(name, entanglement=entanglement, group_weight=group_weight), batch()
    for seed in range(1 + (entanglement == "weights")):
        arch = uniform(net.choices, generator(seed))
        hard, soft = (weights_of(net, arch, requires_grad=True) for _ in range(2))
        loss = run(net, x, y, straight_through_arch(net.choices, hard))[1]
        close(loss, run(net, x, y, arch)[1])
        found = torch.autograd.grad(loss, list(hard.values()), materialize_grads=True)
        expected = torch.autograd.grad(run(net, x, y, soft)[1], list(soft.values()))
        depths = {c.depth for c in net.choices.values()} # all of these get gradients
        for a, b, (choice, w) in zip(found, expected, soft.items(), strict=True):
            close(a, b * (1 if choice in depths else w), 1e-6)
        assert any(g.any() for g in found)
        # with statistics of all operations, also of those that the architecture does not have
        net.eval()
        close(run(net, x, y, soft)[1], run(net, x, y, arch)[1])
        net.train()


@pytest.mark.parametrize("name", CELLS)
def test_options_that_share_nothing_mix_alike(name):
    """One kernel an operation: mixed weights and mixed outputs are the same."""
    kernels = {"nb201": ["none", "skip_connect", "nor_conv_3x3"],
               "toy_cell": ["sep_conv_3x3", "dil_conv_5x5"],
               "darts": ["none", "max_pool_3x3", "skip_connect", "sep_conv_5x5", "dil_conv_3x3"]}
    x, y = batch()
    losses, grads = [], []
    for entanglement in ("weights", "outputs"):
        net = make(name, primitives=kernels[name], entanglement=entanglement)
        weights = mixed(net)
        losses.append(run(net, x, y, weights)[1])
        grads.append(torch.autograd.grad(losses[-1], list(weights.values())))
    close(*losses)
    for a, b in zip(*grads, strict=True):
        close(a, b)


def test_mixed_weights_are_mixed_outputs_where_nothing_normalises():
    """A convolution is linear in its weight: what differs between the entanglements is the norm
    alone."""
    torch.manual_seed(0)
    ops = {"nor_conv": lambda kernels, stride: ReLUConvBN(4, 4, kernels, stride)}
    edges = [Edge(("nor_conv_3x3", "nor_conv_1x1"), ops, 1, entanglement, False).double()
             for entanglement in ("weights", "outputs")]
    edges[1].load_state_dict(edges[0].state_dict())
    x, w = torch.randn(2, 4, 5, 5), torch.tensor([0.3, 0.7], requires_grad=True)
    for edge in edges:
        edge.ops["nor_conv"].norm.forward = lambda x, c=None, scale=None: x * scale
    found = [edge(x, F.relu(x), Sampled(edge.primitives, weights=w)) for edge in edges]
    close(*found)
    close(*(torch.autograd.grad(y.square().sum(), w)[0] for y in found))


@pytest.mark.parametrize("name", CELLS)
def test_group_weight_gives_a_group_its_gradient(name):
    """Behind a BatchNorm the size of mixed weights does not matter, so that without it only their
    ratio is learned."""
    x, y = batch(12)
    along = {}
    for group_weight in (True, False):
        net = make(name, group_weight=group_weight, affine=False)
        for p in net.cells.parameters():
            p.data.mul_(10) # then a norm's eps is nothing
        weights = mixed(net)
        grads = torch.autograd.grad(run(net, x, y, weights)[1], list(weights.values()))
        edge = next(edge for cell in net.cells if hasattr(cell, "edges") for edge in cell.edges)
        for group, (places, kernels) in edge.groups.items():
            if len(kernels) > 1: # the derivative to the size of the group, in every row
                products = [g * w for g, w in zip(grads, weights.values(), strict=True)]
                along[group, group_weight] = torch.cat([t[:, places].sum(1) for t in products])
    for group in {group for group, _ in along}:
        with_weight, without = along[group, True].abs(), along[group, False].abs()
        assert with_weight.min() > 1e-5 and without.max() < 0.02 * with_weight.max(), (
            group, with_weight, without)


def flops_of(net):
    net.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        net(torch.zeros(1, TINY["in_channels"], TINY["img_size"], TINY["img_size"]))
    return counter.get_total_flops()


@pytest.mark.parametrize("name, entanglement", CASES)
def test_cost_is_that_of_the_extracted_network(name, entanglement):
    """Exact for an architecture and for one-hot weights, and the expectation of weights, by every
    combination of a few options."""
    net = make(name, entanglement=entanglement)
    a, b = (uniform(net.choices, generator(seed)) for seed in (3, 4))
    for arch in (a, *extremes(net.choices)):
        small, cost = net.extract(arch), net.cost(arch)
        assert cost == {"params": sum(p.numel() for p in small.parameters()),
                        "flops": flops_of(small)} == small.cost()
        assert {key: value.item() for key, value in net.cost(weights_of(net, arch)).items()} == cost
    one, other = weights_of(net, a), weights_of(net, b)

    def rows_of(weights, key):
        return weights[key].view(-1, weights[key].shape[-1])
    places = [(key, i) for key, w in one.items() for i in range(len(w) if w.dim() > 1 else 1)]
    places = [(key, i) for key, i in places
              if not torch.equal(rows_of(one, key)[i], rows_of(other, key)[i])]
    places = [places[i] for i in torch.linspace(0, len(places) - 1, 3).long()]

    def between(shares): # the share of the other's option at each of three places
        weights = {key: w.clone() for key, w in one.items()}
        for (key, i), t in zip(places, shares, strict=True):
            rows, others = rows_of(weights, key), rows_of(other, key)
            rows[i] = (1 - t) * rows[i] + t * others[i]
        return net.cost(weights)
    t = torch.tensor([0.2, 0.5, 0.9])
    corners = [(math.prod(t[i] if on else 1 - t[i] for i, on in enumerate(ons)),
                between([float(on) for on in ons]))
               for ons in itertools.product((0, 1), repeat=3)]
    for key, value in between(t).items():
        assert value.item() == pytest.approx(sum(p * cost[key] for p, cost in corners).item(),
                                             rel=1e-9)


@pytest.mark.parametrize("name", SPACES)
def test_gradient_of_the_alphas_is_the_finite_difference(name):
    net, (x, y) = make(name), batch()
    arch_optimizer = METHODS["darts"](net.choices, generator())
    alphas = list(arch_optimizer.alphas.values())
    for alpha in alphas:
        alpha.data.copy_(0.3 * torch.randn(alpha.shape, generator=generator(2)))
    directions = [torch.randn(alpha.shape, generator=generator(i))
                  for i, alpha in enumerate(alphas)]
    grads = torch.autograd.grad(run(net, x, y, arch_optimizer.mean())[1], alphas)
    slope = sum((g * d).sum() for g, d in zip(grads, directions, strict=True)).item()

    def loss(h):
        for alpha, d in zip(alphas, directions, strict=True):
            alpha.data.add_(h * d)
        found = run(net, x, y, arch_optimizer.mean())[1].item()
        for alpha, d in zip(alphas, directions, strict=True):
            alpha.data.sub_(h * d)
        return found
    assert slope == pytest.approx((loss(1e-5) - loss(-1e-5)) / 2e-5, rel=1e-4) and abs(slope) > 1e-4


# -----------------------------------------------------------------------------
# texts and published numbers

NB201 = "|{}~0|+|{}~0|{}~1|+|{}~0|{}~1|{}~2|"
TOY = ("Genotype(normal=[('{}', 0), ('{}', 0), ('{}', 1)], normal_concat=range(1, 3), "
       "reduce=[('{}', 0), ('{}', 0), ('{}', 1)], reduce_concat=range(1, 3))")


@pytest.mark.parametrize("name", CELLS)
def test_genotypes_round_trip(name):
    space, choices = importlib.import_module(f"search_spaces.{name}"), make(name).choices
    texts = set()
    for seed in range(20):
        arch = uniform(choices, generator(seed))
        assert space.arch_of(space.genotype(arch)) == check_arch(choices, arch) == arch
        texts.add(str(space.columns(arch)))
    assert len(texts) == 20


def test_genotypes_are_the_published_texts():
    ops = ["sep_conv_3x3", "dil_conv_5x5", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_3x3",
           "sep_conv_3x3"]
    assert toy_cell.genotype({"normal": ops[:3], "reduce": ops[3:]}) == TOY.format(*ops)
    edges, arch = ("n01", "n02", "n12", "r01", "r02", "r12"), toy_cell.arch_of(TOY.format(*ops))
    assert toy_cell.columns(arch) == dict(zip(edges, ops, strict=True))
    ops = ["avg_pool_3x3", "nor_conv_1x1", "skip_connect", "nor_conv_1x1", "skip_connect",
           "skip_connect"]
    assert nb201.genotype({"cell": ops}) == NB201.format(*ops)
    assert nb201.columns({"cell": ops})["genotype"] == NB201.format(*ops)
    text = darts.GENOTYPES["DARTS_V2"]
    arch = darts.arch_of("DARTS_V2")
    with_range = text.replace("[2, 3, 4, 5]", "range(2, 6)")
    assert arch == darts.arch_of(text) == darts.arch_of(with_range)
    assert arch == darts.arch_of(darts.genotype(arch))
    assert arch["normal"][:9] == ["sep_conv_3x3"] * 4 + ["none", "skip_connect", "sep_conv_3x3",
                                                         "none", "none"]
    assert arch["reduce"][9:] == ["none", "max_pool_3x3", "skip_connect", "none", "none"]
    assert darts.genotype(arch).startswith(
        "Genotype(normal=[('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ")
    assert darts.genotype(arch).endswith(
        "('max_pool_3x3', 1), ('skip_connect', 2)], reduce_concat=range(2, 6))")


V1 = darts.GENOTYPES["DARTS_V1"]


@pytest.mark.parametrize("call, message", [
    (lambda: nb201.arch_of("|conv~0|"), r"'\|conv~0\|' is not a genotype of nb201"),
    (lambda: nb201.arch_of(NB201.format(*["pool"] * 6)), "cell has pool, which is not one of"),
    (lambda: toy_cell.arch_of("__import__('os')"), "is not a genotype of toy_cell: write Genotype"),
    (lambda: toy_cell.arch_of(TOY.format(*["skip"] * 6)),
     "'skip', which is not an operation of toy_cell"),
    (lambda: toy_cell.arch_of(TOY.format(*["sep_conv_3x3"] * 6).replace("1)", "0)")),
     "the sources of both cells are 0, 0, 1"),
    (lambda: darts.arch_of("DARTS_V3"), "'DARTS_V3' is not a genotype of darts"),
    (lambda: darts.arch_of(V1.replace("('sep_conv_3x3', 1), ", "", 1)),
     "normal needs two operations a node"),
    (lambda: darts.arch_of(V1.replace("('max_pool_3x3', 1)", "('max_pool_3x3', 0)", 1)),
     "reduce needs .* different sources"),
    (lambda: darts.arch_of(V1.replace("('avg_pool_3x3', 0)", "('avg_pool_3x3', 5)", 1)),
     "reduce needs"),
    (lambda: darts.genotype({"normal": ["none"] * 14, "reduce": ["none"] * 14}),
     "this normal has 0 at node 2"),
    (lambda: make("nb201", primitives=["none", "conv"]),
     "primitives=.* must be one or more different ones of none, skip_connect"),
    (lambda: make("toy_cell", primitives=["sep_conv_3x3"] * 2),
     "primitives=.* must be one or more different ones"),
    (lambda: make("darts", primitives=["skip_connect"]), "must have 'none'"),
    (lambda: make("nb201", primitives=["none"]), "must have another operation"),
    (lambda: make("toy_cell", entanglement="weight"),
     "entanglement='weight' is not one of weights, outputs, none"),
    (lambda: make("toy_cell", img_size=4), "img_size=4 leaves nothing to classify"),
    (lambda: make("darts", init_channels=10, partial_channels=4),
     "partial_channels=4 does not divide the 10 channels"),
    (lambda: make("darts", init_channels=3, partial_channels=2),
     "partial_channels=2 does not divide the 3 channels"),
    (lambda: FactorizedReduce(3, 3), "its 3 channels in two halves: choose an even number"),
    (lambda: darts.build({"auxiliary": 0.4, "img_size": 28, "init_channels": 4, "n_layer": 3},
                         darts.arch_of("DARTS_V1")),
     "at least 8 x 8 pixels, and img_size=28 leaves 7 x 7"),
    (lambda: darts.build({"auxiliary": 0.4, "img_size": 192, "init_channels": 4, "n_layer": 3},
                         darts.arch_of("DARTS_V1")),
     "at least 7 x 7 pixels, and img_size=192 leaves 6 x 6"),
    (lambda: make("nb201", stem="resnet"), "stem='resnet' is not one of cifar and imagenet, or ''"),
    (lambda: make("darts", stem="imagenet", img_size=31),
     "stem='imagenet' is for images of 32 pixels and more, .* and img_size=31: leave it out"),
    *((functools.partial(make, name, **{key: value}), f"^{key}={value} must be {allowed}.$")
      for name, key, value, allowed in (
("darts", "init_channels", 0, "1 or more"), ("darts", "n_layer", 2, "3 or more"),
("darts", "stem_multiplier", -1, "1 or more"),
("darts", "auxiliary", -0.4, "0 or more"), ("darts", "drop_path", 1.0, "at least 0 and below 1"),
("darts", "drop_path", -0.1, "at least 0 and below 1"), ("nb201", "init_channels", -4, "1 or more"),
("nb201", "n_cell", 0, "1 or more"), ("toy_cell", "init_channels", 0, "1 or more"),
("toy_cell", "dropout", 1.0, "at least 0 and below 1"),
("toy_cell", "dropout", -0.1, "at least 0 and below 1"))),
    (lambda: make("nb201").extract({"cell": ["none"] * 5}), "needs a list of at least 6 entries")])
def test_errors_are_one_sentence(call, message):
    with pytest.raises((ConfigError, SystemExit), match=message) as error:
        call()
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


IMAGENET = dict(img_size=224, num_classes=1000, init_channels=48, n_layer=14, pool_norm=False,
                stem_multiplier=1)


@pytest.mark.parametrize("build, config, arch, params", [
    (toy_cell.build, dict(entanglement="weights"), None, 239_146),
    (toy_cell.build, dict(entanglement="none"), None, 304_810),
    # the published 1,528,186 and 1,692,826 have a bias before each norm of their cells, 16 + 32 +
    # 64 an edge, of no effect
    (nb201.build, dict(entanglement="weights", affine=False), None, 1_528_186 - 5 * 6 * 112),
    (nb201.build, dict(entanglement="none", affine=False), None, 1_692_826 - 2 * 5 * 6 * 112),
    (darts.build, dict(entanglement="weights", affine=False), None, 1_143_034),
    (darts.build, dict(entanglement="none", affine=False), None, 1_930_618),
    (darts.build, dict(init_channels=36, n_layer=20, pool_norm=False), darts.arch_of("DARTS_V1"),
     3_169_414),
    (darts.build, dict(init_channels=36, n_layer=20, pool_norm=False), darts.arch_of("DARTS_V2"),
     3_349_342),
    # as the official code prints it: 4.719 M
    (darts.build, IMAGENET, darts.arch_of("DARTS_V2"), 4_718_752),
    # its second classifier by hand, without a norm behind the second convolution
    (darts.build, IMAGENET | dict(auxiliary=0.4), darts.arch_of("DARTS_V2"),
     4_718_752 + 768 * 128 + 2 * 128 + 4 * 128 * 768 + 768 * 1000 + 1000),
    # PC-DARTS' supernet on ImageNet, in a published log: 0.956512 M
    (darts.build, dict(img_size=224, num_classes=1000, affine=False, entanglement="none",
                       partial_channels=2), None, 956_512),
    (toy_cell.build, {}, toy_cell.arch_of(TOY.format(*["dil_conv_3x3"] * 6)), 176_938),
    (toy_cell.build, {}, toy_cell.arch_of(TOY.format(*["sep_conv_5x5"] * 6)), 211_114)])
def test_published_parameter_counts(build, config, arch, params):
    with torch.device("meta"):
        assert sum(p.numel() for p in build(config, arch).parameters()) == params


@pytest.mark.parametrize("ops, params, mflops", [
    ("avg_pool_3x3 nor_conv_1x1 skip_connect nor_conv_1x1 skip_connect skip_connect", 129_306,
     15.647),
    ("nor_conv_3x3 nor_conv_3x3 avg_pool_3x3 none nor_conv_3x3 avg_pool_3x3", 802_426, 113.951),
    ("skip_connect skip_connect skip_connect none nor_conv_1x1 none", 101_306, 11.715),
    ("nor_conv_3x3 nor_conv_3x3 nor_conv_3x3 skip_connect nor_conv_3x3 nor_conv_3x3", 1_288_506,
     None)])
def test_published_costs_of_nb201(ops, params, mflops):
    """Its MFLOPs are millions of multiply-adds."""
    torch.set_default_dtype(torch.float32)
    cost = nb201.build({}, nb201.arch_of(NB201.format(*ops.split()))).cost()
    assert cost["params"] == params
    assert mflops is None or cost["flops"] / 2e6 == pytest.approx(mflops, abs=1e-3)


@pytest.mark.parametrize("name, published", [("DARTS_V2", 544.59), ("PC_DARTS_cifar", 586),
                                             ("PC_DARTS_image", 597)])
def test_published_multiply_adds_on_imagenet(name, published):
    """In millions: besides the products 2 for each value of a norm, and 1 for each that a ReLU or a
    pool takes. 544.59 is what others measured of DARTS' code; its paper says 574, which would be
    the products with 50 channels, the default there."""
    torch.set_default_dtype(torch.float32)
    net, others = darts.build(IMAGENET, darts.arch_of(name)).eval(), [7 * 7 * 768] # the last mean
    for module in net.modules():
        if type(module) in (Pool, torch.nn.ReLU, ReLUConvBN, FactorizedReduce, DilConv, SepConv):
            module.register_forward_pre_hook(lambda module, args: others.append(args[0].numel()))
        if type(module) in (BatchNorm2d, SepConv): # which has a ReLU within
            n = 1 + (type(module) is BatchNorm2d)
            module.register_forward_hook(lambda module, args, y, n=n: others.append(n * y.numel()))
    products = net.cost()["flops"] / 2
    assert (products + sum(others)) / 1e6 == pytest.approx(published, abs=0.5)


# -----------------------------------------------------------------------------
# training of the networks of darts

def test_drop_path_drops_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    y = drop_path(torch.ones(20_000, 2, 3), 0.3)
    assert (y == y[:, :1, :1]).all() and torch.allclose(y[y != 0], torch.tensor(1 / 0.7))
    assert (y[:, 0, 0] == 0).double().mean().item() == pytest.approx(0.3, abs=0.015)


def test_identities_are_never_dropped():
    ops = {"skip_connect": lambda kernels, stride: Skip(), "nor_conv": lambda kernels,
           stride: ReLUConvBN(3, 3, kernels)}
    x = torch.randn(4, 3, 5, 5)
    dropped = nodes([x, x], [Edge(["skip_connect"], ops), Edge(["nor_conv_3x3"], ops)], [ALL, ALL],
                    1 - 1e-12)
    assert len(dropped) == 1 and torch.equal(dropped[0], x)


def test_drop_path_rises_with_progress_and_is_for_training_alone():
    """A supernet, a network that is evaluated and one at the start of its training drop nothing."""
    arch, x = uniform(make("darts").choices, generator()), batch()[0]
    supernet, net = make("darts", drop_path=0.5), make("darts", drop_path=0.5)
    plain = make("darts").extract(arch)
    net = net.extract(arch)
    assert torch.equal(run(net, x)[0], run(plain, x)[0])
    net.progress = supernet.progress = 1.0
    assert not torch.equal(run(net, x)[0], run(plain, x)[0])
    assert torch.equal(run(supernet, x, None, arch)[0], run(plain, x)[0])
    net.load_state_dict(plain.state_dict())
    assert torch.equal(run(net.eval(), x)[0], run(plain.eval(), x)[0])


@pytest.mark.parametrize("side", [32, 224])
def test_the_auxiliary_head_counts_in_training_alone(side):
    """Of both sizes its pool leaves 2 x 2."""
    arch, (x, y) = darts.arch_of("DARTS_V2"), (torch.randn(4, 3, side, side),
                                               torch.tensor([0, 1, 2, 3]))
    torch.manual_seed(0)
    sizes = dict(init_channels=4, n_layer=3, img_size=side)
    net = darts.build(sizes | dict(auxiliary=0.4), arch)
    without = darts.build(sizes, arch)
    shapes = []
    net.auxiliary.conv_1.register_forward_hook(
        lambda module, args, y: shapes.append(y.shape))
    without.load_state_dict({name: t for name, t in net.state_dict().items()
                             if not name.startswith("auxiliary")})
    assert net.cost() == without.cost()
    head = []
    net.auxiliary.register_forward_hook(lambda module, args, logits: head.append(logits))
    (logits, loss), (expected, main) = net(x, y), without(x, y)
    close(logits, expected)
    close(loss, main + 0.4 * F.cross_entropy(head[0], y))
    assert all(g.any() for g in torch.autograd.grad(loss, list(net.auxiliary.parameters())))
    for a, b in zip(net.eval()(x, y), without.eval()(x, y), strict=True):
        close(a, b)
    assert len(head) == 1 and shapes == [(4, 128, 2, 2)]
    supernet = darts.build(sizes | dict(auxiliary=0.4))
    assert supernet.auxiliary is None and supernet.extract(arch).auxiliary is None


def test_a_network_of_darts_has_no_module_for_what_it_does_not_use():
    net = make("darts").extract(arch := darts.arch_of("DARTS_V1"))
    for cell in net.cells:
        assert [edge is not None for edge in cell.edges] == [op != "none" for op in arch[cell.name]]


# -----------------------------------------------------------------------------
# partial channels, pruning and widening

@pytest.mark.parametrize("stride", [1, 2])
def test_what_goes_around_an_edge(stride):
    """With identities, or nothing, for operations: the first half is that of the operation, the
    other passes; channels alternate."""
    ops = {"skip_connect": lambda kernels, stride: Skip()}
    x = torch.randn(2, 4, 5, 5)
    around = x[:, 2:] if stride == 1 else F.max_pool2d(x[:, 2:], 2, ceil_mode=True)
    y = Edge(["none"], ops, stride, partial_channels=2)(x, F.relu(x))
    assert torch.equal(y[:, 1::2], around) and not y[:, ::2].any()
    if stride == 1:
        weights = Sampled(weights=torch.tensor([0.25, 0.75]))
        y = Edge(["skip_connect", "none"], ops, partial_channels=2)(x, F.relu(x), weights)
        close(y, torch.stack((0.25 * x[:, 0], x[:, 2], 0.25 * x[:, 1], x[:, 3]), 1))


@pytest.mark.parametrize("name, entanglement", [case for case in CASES if case[0] in CELLS])
def test_pruning_changes_nothing_where_the_weight_is_zero(name, entanglement):
    net, (x, y) = make(name, entanglement=entanglement), batch()
    arch_optimizer = METHODS["drnas"](net.choices, generator())
    for i, alpha in enumerate(arch_optimizer.alphas.values()):
        alpha.data.copy_(torch.randn(alpha.shape, generator=generator(1 + i)))
    arch_optimizer.prune(2)
    arch, weights = arch_optimizer.arch(), arch_optimizer.sample(0, generator())
    results, size = [], sum(p.numel() for p in net.parameters())
    for _ in range(2): # before and after
        loss = run(net, x, y, weights)[1]
        grads = torch.autograd.grad(loss, list(weights.values()), retain_graph=True)
        products = [g * w for g, w in zip(grads, weights.values(), strict=True)]
        results.append([loss, run(net, x, y, arch)[1], *products, *net.cost(weights).values(),
                        torch.tensor(net.cost(arch)["params"])])
        net.prune(arch_optimizer.mask)
    for a, b in zip(*results, strict=True):
        close(a, b)
    assert sum(p.numel() for p in net.parameters()) < size
    assert net.extract(arch).cost() == net.cost(arch)
    with FlopCounterMode(display=False) as counter:
        net.run(weights)
    left = net.cost({key: (~mask).double() for key, mask in arch_optimizer.mask.items()})["flops"]
    assert entanglement == "weights" or counter.get_total_flops() == left, (
        "it runs what has no weight")


@pytest.mark.parametrize("name", PARTIAL)
def test_widening_copies_random_channels_with_their_momentum(name):
    """The same channels of every tensor; what had its size is as it was; the old channels come
    first, in their order."""
    old, new = (make(name, **PARTIAL[name] | {"partial_channels": k})
                for k in (PARTIAL[name]["partial_channels"], 1))
    x, y = batch()
    weights = mixed(old)
    mask = {key: torch.zeros_like(w, dtype=torch.bool) for key, w in weights.items()}
    for m in mask.values():
        m[:, -1] = True
    new.prune(mask) # the old one still has what went out
    optimizers = [torch.optim.SGD(net.parameters(), 0.1, momentum=0.9) for net in (old, new)]
    run(old, x, y, weights)[1].backward()
    optimizers[0].step()
    assert widen(old, new, generator(), optimizers) is new
    maps = {}
    for key, q in new.named_parameters():
        p = old.get_parameter(key)
        momentum = [optimizer.state[w]["momentum_buffer"]
                    for optimizer, w in zip(optimizers, (p, q), strict=True)]
        for a, b in ((p, q), momentum):
            assert torch.equal(b[tuple(slice(n) for n in a.shape)], a), key
        if q.shape[0] > p.shape[0] and p.dim() > 1:
            rows = q.flatten(1)[:, :1] == p.flatten(1)[:, 0]
            maps.setdefault((len(p), len(q)), set()).add(tuple(rows.int().argmax(1).tolist()))
            assert rows.any(1).all()
    assert maps and all(len(drawn) == 1 for drawn in maps.values())
    assert run(new, x, y, mixed(new))[1].isfinite()


def test_nb201_indices_are_the_benchmarks():
    """Of single cells that are published with their index, and back for all."""
    published = {0: "|avg_pool_3x3~0|+|nor_conv_1x1~0|skip_connect~1|"
                    "+|nor_conv_1x1~0|skip_connect~1|skip_connect~2|",
                 11: "|nor_conv_3x3~0|+|nor_conv_3x3~0|avg_pool_3x3~1|"
                     "+|none~0|nor_conv_3x3~1|avg_pool_3x3~2|",
                 284: "|skip_connect~0|+|skip_connect~0|skip_connect~1|"
                      "+|none~0|nor_conv_1x1~1|none~2|",
                 1462: "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|"
                       "+|nor_conv_3x3~0|nor_conv_3x3~1|nor_conv_3x3~2|",
                 1835: "|skip_connect~0|+|skip_connect~0|skip_connect~1|"
                       "+|skip_connect~0|skip_connect~1|skip_connect~2|",
                 9930: "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|"
                       "+|skip_connect~0|nor_conv_3x3~1|nor_conv_3x3~2|"}
    for i, text in published.items():
        assert nb201.genotype(nb201.arch_at(i)) == text and nb201.index(nb201.arch_of(text)) == i
    some = list(range(0, 15625, 625))
    assert [nb201.index(nb201.arch_at(i)) for i in some] == some


def test_a_strided_convolution_of_few_channels_has_its_gradient():
    """By the definition of a 1 x 1 convolution, in the memory format that searches use. oneDNN's
    own is wrong in most of these rounds, or ends the process."""
    torch.set_default_dtype(torch.float32)
    conv = Conv2d(4, 2, 1, stride=2)
    x = torch.randn(8, 4, 8, 8, generator=generator()).to(memory_format=torch.channels_last)
    expected = torch.einsum("bihw->i", x[..., ::2, ::2]).expand(2, 4)
    for _ in range(50):
        found, = torch.autograd.grad(conv(x).sum(), conv.weight)
        torch.testing.assert_close(found[..., 0, 0], expected, atol=1e-4, rtol=1e-4)
