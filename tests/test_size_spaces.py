"""Spaces of channels and kernels: the law of exactness, mixtures as the padded sums that they
stand for, costs and genotypes."""
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from configurator import ConfigError
from optim_nas import uniform
from search_spaces import nats_size, toy_conv_macro
from search_spaces.convs import Conv2d, ENTANGLEMENTS, Entangled
from supernet import Sampled, Size, extremes, one_hot, prefix_masks, straight_through_arch

SMALL = dict(img_size=8, in_channels=2, num_classes=3)
SPACES = { # a reduced version of each, with lists of different lengths
    "toy_conv_macro": (toy_conv_macro, SMALL | dict(
        channels_1=[2, 3, 5], channels_2=[4, 6], channels_3=[3, 4], channels_4=[2, 5, 6],
        kernel_size=[3, 5, 7],
        last_channels=6, last_kernel_size=3, last_padding=1, fc=8, dropout=0.0)),
    "nats_size": (nats_size, SMALL | dict(channels=[2, 3, 4])),
    "nats_size, affine=False": (nats_size, SMALL | dict(channels=[2, 4], affine=False)),
}
FEWER = {"toy_conv_macro": dict(channels_1=[2, 3], channels_2=6, channels_3=3, channels_4=[2, 6],
                                kernel_size=[1, 3]),
         "nats_size": dict(channels=[2, 5])}


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request):
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


def supernet(name, **rest):
    """A supernet whose weights and statistics are all different, so that no wrong slice is
    hidden."""
    torch.manual_seed(1)
    space, config = SPACES[name]
    net = space.build(config | rest).to(torch.get_default_dtype())
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(0, 0.3)
        for norm in net.modules():
            if isinstance(norm, torch.nn.BatchNorm2d):
                norm.running_mean.normal_(0, 0.3)
                norm.running_var.uniform_(0.5, 2)
    return net


def images(B=3):
    g = torch.Generator().manual_seed(0)
    return torch.randn(B, 2, 8, 8, generator=g), torch.randint(3, (B,), generator=g)


def agree(a, b, what):
    scale, worst = b.abs().max().clamp_min(1e-12).item(), (a - b).abs().max().item()
    assert worst <= (1e-5 if a.dtype is torch.float32
                     else 1e-12) * scale, f"{what}: differ by {worst:.2e}, largest {scale:.2e}"


def some_archs(net):
    g = torch.Generator().manual_seed(0)
    return [*extremes(net.choices), *(uniform(net.choices, g) for _ in range(2))]


def weights_of(net, dtype=torch.float32):
    g = torch.Generator().manual_seed(3)
    return {name: torch.rand(c.shape, generator=g, dtype=dtype).softmax(-1).requires_grad_()
            for name, c in net.choices.items()}


def one_hots(net, arch):
    return {name: w.to(torch.get_default_dtype()).requires_grad_()
            for name, w in one_hot(net.choices, arch).items()}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("entanglement", ENTANGLEMENTS)
@pytest.mark.parametrize("name", SPACES)
def test_law_of_exactness(name, entanglement, training, dtype):
    net, (x, y) = supernet(name, entanglement=entanglement).train(training), images()
    state = {key: t.clone() for key, t in net.state_dict().items()}
    for arch in some_archs(net)[:4 if dtype is torch.float64 else 2]:
        net.load_state_dict(state) # statistics move in training
        small = net.extract(arch).train(training)
        alone, loss = small(x, y)
        loss.backward()
        straight_through = straight_through_arch(net.choices, one_hots(net, arch))
        for form, third in (("one-hot", one_hots(net, arch)), ("hard", arch),
                            ("straight-through", straight_through)):
            net.load_state_dict(state)
            net.zero_grad()
            logits, loss = net(x, y, third)
            loss.backward()
            agree(logits, alone, f"{form} logits of {arch}")
            shared = gradients_as_weights(name, net, entanglement).extract(arch)
            scale = max(q.grad.abs().max().item() for q in small.parameters())
            for (key, p), q in zip(shared.named_parameters(), small.parameters(), strict=True):
                worst = (p - q.grad).abs().max().item()
                assert worst <= (1e-5 if dtype is torch.float32
                                 else 1e-12) * scale, f"{form} gradient of {key} of {arch}: {worst}"
            outside = sum(p.grad.abs().sum() for p in net.parameters() if p.grad is not None)
            agree(outside, sum(p.grad.abs().sum() for p in small.parameters()),
                  f"{form} gradient outside the slices of {arch}")


def gradients_as_weights(name, net, entanglement):
    other = supernet(name, entanglement=entanglement)
    with torch.no_grad():
        for p, q in zip(other.parameters(), net.parameters(), strict=True):
            p.copy_(torch.zeros_like(q) if q.grad is None else q.grad)
    return other


@pytest.mark.parametrize("entanglement", ENTANGLEMENTS)
@pytest.mark.parametrize("name", SPACES)
def test_straight_through_options_have_the_gradients_of_the_mixture(name, entanglement, dtype):
    """GDAS: one network runs, and its weights, which are 1, get the gradients that they have in
    the mixture of all."""
    net, (x, y) = supernet(name, entanglement=entanglement), images()
    for arch in some_archs(net):
        mixed, hard = one_hots(net, arch), one_hots(net, arch)
        for third in (mixed, straight_through_arch(net.choices, hard)):
            net(x, y, third)[1].backward()
        for key, w in mixed.items():
            chosen = w.detach() > 0
            agree(hard[key].grad[chosen], w.grad[chosen], f"gradient of {key} of {arch}")
            assert not hard[key].grad[~chosen].any()


@pytest.mark.parametrize("name", SPACES)
def test_every_weight_of_a_mixture_has_a_gradient(name):
    for entanglement in ENTANGLEMENTS:
        net, (x, y) = supernet(name, entanglement=entanglement), images()
        weights = weights_of(net)
        net(x, y, weights)[1].backward()
        assert all(w.grad.abs().min() > 0 for w in weights.values()), weights


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mixed", list(itertools.product([True, False], repeat=3)))
def test_convolution_is_its_padded_sum(mixed, bias):
    """sum over in, out and kernel, 27 where all are chosen, of a_i b_j c_t pad(conv of a slice),
    by "weights" and by "outputs"."""
    torch.manual_seed(0)
    sizes, kernels = ((2, 4, 5), (3, 4, 6)), (3, 5, 7)
    x = torch.randn(2, 5, 6, 6).double().requires_grad_()
    entangled = Entangled(lambda *args: Conv2d(*args, bias=bias),
                          itertools.product(*sizes, kernels), "outputs").double()
    conv, alphas = entangled.op, [torch.randn(3).double().requires_grad_() for _ in range(3)]
    # rows sum to 1: gradients are compared behind the softmax
    p = [alpha.softmax(-1) for alpha in alphas]
    i, o = (Size(n, mask=prefix_masks(n, n[-1]).double(), p=w) if m else None for n, w,
            m in zip(sizes, p, mixed, strict=False))
    k = Sampled(kernels, weights=p[2]) if mixed[2] else Sampled()
    options = [list(zip(n, w, strict=True)) if m else [(n[-1], 1)] for n, w,
               m in zip((*sizes, kernels), p, mixed, strict=True)]
    padded = 0
    for (a, wa), (b, wb), (c, wc) in itertools.product(*options):
        cut = (7 - c) // 2
        slices = conv.weight[:b, :a, cut:7 - cut, cut:7 - cut], conv.bias[:b] if bias else None
        padded = padded + wa * wb * wc * F.pad(F.conv2d(x[:, :a], *slices, padding=c // 2),
                                               (0, 0, 0, 0, 0, 6 - b))
    of_mixed = [alpha for alpha, m in zip(alphas, mixed, strict=True) if m]
    direction, inputs = torch.randn_like(padded), [x, *conv.parameters(), *of_mixed]
    for y in (conv(x, i, o, k), entangled(x, i, o, k)):
        agree(y, padded, "output")
        for g, g0 in zip(*(torch.autograd.grad((out * direction).sum(), inputs, retain_graph=True)
                           for out in (y, padded)), strict=True):
            agree(g, g0, "gradient")


def mixed_sizes(*options):
    """Softmaxes of random alphas, which are returned too, as Sizes."""
    alphas = [torch.randn(len(n)).double().requires_grad_() for n in options]
    return alphas, [Size(n, mask=prefix_masks(n, n[-1]).double(), p=w.softmax(-1))
                    for n, w in zip(options, alphas, strict=True)]


@pytest.mark.parametrize("joint", [False, True])
def test_combinations_with_weights_of_their_own(joint):
    """Every pair of in and out has its own convolution; of the same choice there are no other
    pairs than the equal ones."""
    torch.manual_seed(0)
    n, x = (2, 3, 5), torch.randn(2, 5, 4, 4).double()
    pairs = [(a, a) for a in n] if joint else list(itertools.product(n, n))
    entangled = Entangled(lambda *args: Conv2d(*args, bias=True), [(*pair, 3) for pair in pairs],
                          "none").double()
    alphas, (i, o) = mixed_sizes(n, n)
    o = i if joint else o
    padded = 0
    for a, b in pairs:
        conv = entangled.ops[f"{a}_{b}_3"]
        weight = i.p[n.index(a)] * (1 if joint else o.p[n.index(b)])
        assert conv.weight.shape == (b, a, 3, 3)
        padded = padded + weight * F.pad(F.conv2d(x[:, :a], conv.weight, conv.bias, padding=1),
                                         (0, 0, 0, 0, 0, 5 - b))
    y, direction = entangled(x, i, o), torch.randn_like(padded)
    inputs = [*alphas[:2 - joint], *entangled.parameters()]
    agree(y, padded, "output")
    for g, g0 in zip(*(torch.autograd.grad((out * direction).sum(), inputs, retain_graph=True)
                       for out in (y, padded)), strict=True):
        agree(g, g0, "gradient")


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("entanglement", ENTANGLEMENTS)
def test_skip_is_an_identity_between_equal_widths(entanglement, training):
    """sum over in k and out l of a_k b_l times x[:k] where k = l, else the convolved and normed x,
    padded."""
    torch.manual_seed(0)
    n, x = (2, 3, 5), torch.randn(4, 5, 4, 4).double()
    skip = nats_size.Skip(list(itertools.product(n, n)),
                          SimpleNamespace(entanglement=entanglement,
                                          affine=True)).double().train(training)
    alphas, (i, o) = mixed_sizes(n, n)
    change, padded = skip.change, 0
    for (k, a), (m, b) in itertools.product(zip(n, i.p, strict=True), zip(n, o.p, strict=True)):
        if k == m:
            one = x[:, :k]
        elif entanglement == "weights": # x comes weighted by its own widths: all of it is read
            one = change.op(x, None, Size(m))
        elif entanglement == "outputs":
            one = change.op(x[:, :k], Size(k), Size(m))
        else:
            one = change.ops[f"{k}_{m}_1"](x[:, :k])
        padded = padded + a * b * F.pad(one, (0, 0, 0, 0, 0, 5 - m))
    y, direction, inputs = skip(x, i, o), torch.randn_like(padded), [*alphas, *skip.parameters()]
    agree(y, padded, "output")
    for g, g0 in zip(*(torch.autograd.grad((out * direction).sum(), inputs, retain_graph=True)
                       for out in (y, padded)), strict=True):
        agree(g, g0, "gradient")


@pytest.mark.parametrize("name", SPACES)
def test_expected_cost_is_the_mean_over_architectures(name):
    """The sum over all architectures of probability times exact cost, and the exact cost where
    everything is on one."""
    space, config = SPACES[name]
    net = space.build(config | FEWER.get(name, {}))
    weights = weights_of(net, torch.float64)
    rows = [row for name, c in net.choices.items()
            for row in (weights[name] if c.repeat else [weights[name]])]
    total = {"params": 0, "flops": 0}
    for index in itertools.product(*(range(len(row)) for row in rows)):
        i, arch, p = iter(index), {}, 1
        for key, c in net.choices.items():
            values = [c.options[next(i)] for _ in range(c.repeat or 1)]
            arch[key] = values if c.repeat else values[0]
        for row, k in zip(rows, index, strict=True):
            p = p * row[k]
        cost = net.cost(arch)
        of_weights = net.cost(one_hot(net.choices, arch))
        assert {key: v.item() for key, v in of_weights.items()} == cost, arch
        total = {key: total[key] + p * cost[key] for key in total}
    for key, value in net.cost(weights).items():
        agree(value, total[key], key)
        for a, b in zip(*(torch.autograd.grad(v, list(weights.values()), retain_graph=True)
                          for v in (value, total[key])), strict=True):
            # along weights that keep their sum
            a, b = (g - g.mean(-1, keepdim=True) for g in (a, b))
            agree(a, b, f"gradient of {key}")


def test_conv_macro():
    """The published supernet's weights, the best architecture's text and columns, and their way
    back."""
    with torch.device("meta"):
        net = toy_conv_macro.build({})
        assert sum(p.numel() for p in net.parameters()) == 7_725_450
    text = "[[32, 64, 128, 128], [3, 7, 5, 7]]"
    arch = toy_conv_macro.arch_of(text)
    assert toy_conv_macro.genotype(arch) == text
    columns = toy_conv_macro.columns(arch)
    assert list(columns.values()) == [*itertools.chain(*json.loads(text))]
    assert list(columns) == ["c1", "c2", "c3", "c4", "k1", "k2", "k3", "k4"]


@pytest.mark.parametrize("number, text, params", [
    (0, "8:8:8:8:8", 11_714), (11, "8:8:8:16:32", 49_202), (284, "8:8:40:32:40", 144_834),
    (12, "8:8:8:16:40", 67_378), (8 ** 5 - 1, "64:64:64:64:64", 713_674)])
def test_nats_size(number, text, params):
    """Published texts, numbers and parameter counts."""
    arch = nats_size.arch_of(text)
    assert nats_size.genotype(arch) == text and nats_size.columns(arch) == {"genotype": text}
    assert nats_size.index(arch) == number and nats_size.arch_at(number) == arch
    small = nats_size.build({}, arch)
    net = nats_size.build({})
    assert sum(p.numel() for p in small.parameters()) == net.cost(arch)["params"] == params
    of_weights = net.cost(one_hot(net.choices, arch))
    assert {key: v.item() for key, v in of_weights.items()} == net.cost(arch)


@pytest.mark.parametrize("make, text", [(nats_size.arch_of, ""), (nats_size.arch_of, "8:8:8:8"),
                                        (nats_size.arch_of, "8:8:8:8:9"),
                                        (nats_size.arch_of, "8:8:8:8:x"), (nats_size.arch_at, -1),
                                        (nats_size.arch_at, 8 ** 5)])
def test_what_is_no_genotype_of_nats_size(make, text):
    with pytest.raises(ConfigError) as error:
        make(text)
    one_sentence(error)


@pytest.mark.parametrize("text", ["", "[[32, 64, 128], [3, 7, 5, 7]]",
                                  "[[32, 64, 128, 128], [3, 7, 5, 4]]", "[[32, 64, 128, 128], 3]",
                                  "{}", "7", "[[32, 64, 128, 128], [3, 7, 5]]", "__import__('os')",
                                  "[[[], 64, 128, 128], [3, 7, 5, 7]]"])
def test_what_is_no_genotype_of_conv_macro(text):
    with pytest.raises(ConfigError) as error:
        toy_conv_macro.build({}, toy_conv_macro.arch_of(text))
    one_sentence(error)


def one_sentence(error):
    message = str(error.value)
    assert message.endswith(".") and "\n" not in message and message.count(". ") == 0, message


@pytest.mark.parametrize("name, config, words", [
    ("toy_conv_macro", dict(channels_1=[8, 4]), "channels_1"),
    ("toy_conv_macro", dict(channels_4=0), "channels_4"),
    ("toy_conv_macro", dict(kernel_size=[3, 4]), "odd"),
    ("toy_conv_macro", dict(last_kernel_size=7), "img_size"),
    ("toy_conv_macro", dict(img_size=3), "img_size"),
    ("nats_size", dict(channels=[3, 2]), "channels"),
    ("nats_size", dict(entanglement="weight"), "entanglement"),
    ("toy_conv_macro", dict(entanglement="some"), "entanglement"),
    ("toy_conv_macro", dict(fc=2), "fc=2 must be 4 or more"),
    ("toy_conv_macro", dict(last_channels=0), "last_channels=0 must be 1"),
    ("toy_conv_macro", dict(last_kernel_size=0), "last_kernel_size=0 must be 1"),
    ("toy_conv_macro", dict(dropout=1.0), "dropout=1.0 must"),
    ("toy_conv_macro", dict(last_padding=-1, last_kernel_size=1),
     "last_padding=-1 must be 0 or more"),
])
def test_wrong_keys(name, config, words):
    with pytest.raises((ConfigError, SystemExit), match=words) as error:
        supernet(name, **config)
    one_sentence(error)


def test_numbers_are_a_plain_network():
    x, y = images()
    space, config = SPACES["toy_conv_macro"]
    net = space.build(config | dict(channels_1=3, channels_2=4, channels_3=3, channels_4=6,
                                    kernel_size=5))
    arch = {name: [5] * 4 if c.repeat else c.options[0] for name, c in net.choices.items()}
    assert torch.equal(net(x, y)[0], net(x, y, arch)[0]) and net.cost() == net.cost(arch)
    assert net.cost()["params"] == sum(p.numel() for p in net.parameters())
