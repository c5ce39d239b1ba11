"""Once-for-all's space: its published counts, chains of kernels, the order of channels, and
progressive shrinking with a teacher."""
import os
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_IMAGES, TINY_LARGEST, TINY_SPACES, flags, stops
from test_survival import killed_early, state_of
from test_vision import search_config, signalled, space_config

from configurator import ConfigError
import train
import train_search
from fused_ops import use_fused_ops
from optim_nas import space_size, uniform
from run import read_lines, rng
from search_spaces import mobilenetv3
from supernet import Sampled, check_arch, extremes, one_hot, straight_through_arch
from train_search import phase_of, read_phases, with_teacher
import run as runs
import search_spaces

SMALL = dict(depth=[1, 2, 3], kernel_size=[3, 5, 7], expand=[2, 3, 4], stem_channels=8,
             stem_stride=1, widths=[8, 16], strides=[1, 2],
             se=[0, 1], hswish=[1, 0], last_channels=16, mix_channels=16, img_size=9, in_channels=2,
             num_classes=3)


@pytest.fixture(autouse=True)
def kernels_off():
    """A search turns them on."""
    yield
    use_fused_ops(False)


def uniform_net(k, e, d, stages=5):
    """The architecture with the same options everywhere."""
    return mobilenetv3.arch_of(str([[[k, e]] * d] * stages))


def supernet(**rest):
    """A supernet in float64 in which no weight is 0 or 1, and no statistic."""
    torch.manual_seed(0)
    net = mobilenetv3.build(SMALL | rest).double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
        for norm in net.modules():
            if isinstance(norm, torch.nn.BatchNorm2d):
                norm.running_mean.normal_(0, 0.3)
                norm.running_var.uniform_(0.5, 2)
    return net


def images(B=4, side=9):
    g = torch.Generator().manual_seed(0)
    return torch.randn(B, 2, side, side, generator=g).double(), torch.randint(3, (B,), generator=g)


def agree(a, b, tolerance=1e-10):
    assert a.shape == b.shape
    difference = (a - b).abs().max()
    assert difference <= tolerance * max(b.abs().max().item(), 1e-3), difference

# ---- published numbers

@pytest.mark.parametrize("k, e, d, params, macs, macs_160, params_wide", [
    (7, 6, 4, 7_664_760, 566.17, 291.32, 10_701_632),
    (5, 4, 3, 4_551_792, 250.75, 129.55, 6_245_312),
    (7, 6, 2, 4_837_928, 282.63, 145.95, 6_654_768),
    (3, 6, 4, 7_299_960, 433.14, 223.45, 10_258_112),
    (3, 3, 4, 4_371_928, 226.19, 116.95, 5_986_008),
    (3, 3, 2, 3_410_792, 121.28, 63.24, 4_602_456)])
def test_published_counts(k, e, d, params, macs, macs_160, params_wide):
    """Of the extracted network, which is measured, and of the supernet's formula."""
    arch = uniform_net(k, e, d)
    for size, published in ((224, macs), (160, macs_160)):
        with torch.device("meta"):
            net, small = (mobilenetv3.build({"img_size": size}, a) for a in (None, arch))
            cost = small.cost()
        assert cost["params"] == params
        assert cost["flops"] / 2e6 == pytest.approx(published, abs=0.006)
        assert net.cost(arch) == cost
        of_weights = net.cost(one_hot(net.choices, arch))
        assert {key: value.item() for key, value in of_weights.items()} == cost
    with torch.device("meta"):
        wide = mobilenetv3.build({"width_mult": 1.2}, arch)
        assert sum(p.numel() for p in wide.parameters()) == params_wide


def test_sgd_decays_neither_norms_nor_biases():
    net = supernet()
    options = SimpleNamespace(weight_decay=3e-5, learning_rate=0.1, momentum=0.9, nesterov=True,
                              zero_stage=0, weight_optimizer="sgd")
    decaying, others = train.configure_optimizer(net, options,
                                                 SimpleNamespace(device_type="cpu")).param_groups
    names = {id(p): name for name, p in net.named_parameters()}
    of = {group["weight_decay"]: {names[id(p)] for p in group["params"]}
          for group in (decaying, others)}
    plain = {name for name in names.values() if "norm" in name or "bias" in name}
    assert of[0.0] == plain and of[3e-5] == {*names.values()} - plain and len(plain) > 20


def test_published_space():
    with torch.device("meta"):
        net = mobilenetv3.build({})
    assert space_size(net.choices) == (9 ** 2 + 9 ** 3 + 9 ** 4) ** 5 == 21_758_655_492_572_485_851
    # the matrices between kernels
    assert sum(p.numel() for p in net.parameters()) == 7_664_760 + 14_120
    # 135 alphas
    assert [torch.empty(c.shape).numel() for c in net.choices.values()] == [3, 12, 12] * 5


def test_genotypes():
    for seed in range(5):
        arch = uniform(supernet().choices, rng(seed))
        assert mobilenetv3.arch_of(mobilenetv3.genotype(arch)) == arch
        assert mobilenetv3.columns(arch) == {"genotype": mobilenetv3.genotype(arch)}
    assert mobilenetv3.genotype(uniform_net(3, 6, 2, 1)) == "[[[3, 6], [3, 6]]]"
    floats = mobilenetv3.arch_of("[[[3.0, 2.0]], [[3, 2]]]")
    assert mobilenetv3.genotype(check_arch(supernet().choices, floats)) == "[[[3, 2]], [[3, 2]]]"
    for text in ("k7", "[[3, 6]]", "7", "[[[3, 6, 1]]]", "[" * 100_000):
        with pytest.raises(ConfigError, match="is not a genotype of mobilenetv3: write"):
            mobilenetv3.arch_of(text)


@pytest.mark.parametrize("rest, message", [
    (dict(kernel_size=[2, 4]), "must be odd"),
    (dict(se=[0, 1, 1]), "se=.* needs one entry a stage, and widths=.* has 2"),
    (dict(depth=[2, 1]), "increasing order"),
    (dict(strides=2), r"strides=\[2\] needs one entry a stage"), (dict(hswish=1), "hswish="),
    *((dict([(key, 0)]), f"^{key}=0 must be 1 or more.$")
      for key in ("last_channels", "mix_channels", "stem_channels", "stem_stride")),
    (dict(strides=[1.5, 2]), r"^strides=\[1.5, 2\] must be whole numbers"),
    (dict(strides=[2.0, 1]), "must be whole numbers"),
    (dict(widths=[8.5, 16]), "widths=.* must be whole numbers"),
    (dict(se=[0.5, 1]), "se=.* must be whole numbers"),
    (dict(hswish=[0, 2]), "hswish=.* must be at least 0 and below 2"),
    (dict(se=[-1, 1]), "se=.* must be at least 0 and below 2"),
    (dict(mix_channels=-3), "^mix_channels=-3 must be 1 or more.$"),
    (dict(widths=[8, 0]), r"^widths=\[8, 0\] must be 1 or more.$"),
    (dict(dropout=1.0), "dropout=1.0 must be at least 0 and below 1"),
    (dict(width_mult=0.0), "width_mult=0.0 must be above 0")])
def test_errors_are_one_sentence(rest, message):
    with pytest.raises((ConfigError, SystemExit), match=message) as e:
        mobilenetv3.build(SMALL | rest)
    assert "\n" not in str(e.value)


def test_a_number_is_a_list_of_one_stage():
    one = dict(widths=16, strides=2, se=1, hswish=0)
    lists = {key: [value] for key, value in one.items()}
    net, same = (mobilenetv3.build(SMALL | keys) for keys in (one, lists))
    assert str(net) == str(same) and net.choices == same.choices


def test_any_image_size():
    net, arch = supernet().eval(), uniform(supernet().choices, rng(0))
    weights = {name: w.double() for name, w in one_hot(net.choices, arch).items()}
    for side in (5, 16, 23):
        x = images(side=side)[0]
        agree(net(x, None, arch)[0], net(x, None, weights)[0])

# ---- kernels

def plain_chain(w, matrices):
    """{k: (C, 1, k, k)}, row by row: the centre of the next larger kernel, as a vector, through
    the matrix."""
    kernels = {w.shape[-1]: w}
    for k, matrix in matrices.items():
        large = w[:, :, 1:-1, 1:-1]
        w = torch.stack([(matrix @ channel.reshape(-1)).reshape(1, k, k) for channel in large])
        kernels[k] = w
    return kernels


@pytest.mark.parametrize("stride", [1, 2])
def test_chain_of_kernels(stride):
    """Each option, hard and one-hot, and a mixture, which is the sum of the options' outputs; with
    gradients to all that is shared."""
    torch.manual_seed(0)
    conv = mobilenetv3.Depthwise(4, (3, 5, 7), stride, True).double()
    for k in (5, 3):
        assert torch.equal(conv.matrices[str(k)], torch.eye(k * k)) # at first the centre
        conv.matrices[str(k)].data.normal_()
    x, p = torch.randn(2, 4, 9, 9).double(), torch.tensor([0.2, 0.5, 0.3]).double().requires_grad_()
    kernels = plain_chain(conv.weight, {k: conv.matrices[str(k)] for k in (5, 3)})
    outputs = [F.conv2d(x, kernels[k], None, stride, k // 2, 1, 4) for k in (3, 5, 7)]
    shared = [conv.weight, *conv.matrices.values()]

    def same(y, expected, tensors):
        agree(y, expected)
        for a, b in zip(*(torch.autograd.grad(t.square().sum(), tensors, retain_graph=True,
                                              materialize_grads=True)
                          for t in (y, expected)), strict=True):
            agree(a, b)
    options = (3, 5, 7)
    for i, k in enumerate(options):
        one = F.one_hot(torch.tensor(i), 3).double()
        same(conv(x, None, None, Sampled(options, k)), outputs[i], shared)
        same(conv(x, None, None, Sampled(options, weights=one)), outputs[i], shared)
    mixture = sum(w * y for w, y in zip(p, outputs, strict=True))
    same(conv(x, None, None, Sampled(options, weights=p)), mixture, [*shared, p])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_law_of_exactness_with_matrices(training):
    """The gradients to a kernel of the extracted network reach the largest one and the matrices by
    the chain rule."""
    net, (x, y) = supernet(dropout=0.0).train(training), images()
    state = {key: t.clone() for key, t in net.state_dict().items()}
    for arch in (*extremes(net.choices), uniform(net.choices, rng(1))):
        net.load_state_dict(state)
        small = net.extract(arch).train(training)
        assert not any("matrices" in name for name, _ in small.named_parameters())
        alone, loss = small(x, y)
        loss.backward()
        weights = {name: w.double().requires_grad_()
                   for name, w in one_hot(net.choices, arch).items()}
        for third in (arch, weights, straight_through_arch(net.choices, weights)):
            net.load_state_dict(state)
            net.zero_grad()
            logits, loss = net(x, y, third)
            loss.backward()
            agree(logits, alone)
            for s, blocks in enumerate(small.stages):
                for n, block in enumerate(blocks):
                    full, g = net.stages[s][n].depthwise, block.depthwise.weight.grad
                    matrices = {k: full.matrices[str(k)] for k in (5, 3)}
                    kernel = plain_chain(full.weight, matrices)[g.shape[-1]][:len(g)]
                    expected = torch.autograd.grad(kernel, [full.weight, *matrices.values()], g,
                                                   materialize_grads=True)
                    for p, wanted in zip([full.weight, *matrices.values()], expected, strict=True):
                        agree(torch.zeros_like(p) if p.grad is None else p.grad, wanted, 1e-8)


def test_every_weight_of_a_mixture_has_a_gradient():
    net, (x, y) = supernet(), images()
    weights = {name: torch.rand(c.shape).double().softmax(-1).requires_grad_()
               for name, c in net.choices.items()}
    net(x, y, weights)[1].backward()
    assert all(w.grad.abs().min() > 0 for w in weights.values())


def test_a_mixture_runs_one_depthwise_convolution_a_block():
    net, calls = supernet(), []
    for module in net.modules():
        if isinstance(module, mobilenetv3.Depthwise):
            def counted(x, weight, bias=None, conv=module.conv):
                calls.append(weight.shape)
                return conv(x, weight)
            module.conv = counted
    net.run({name: torch.full(c.shape, 1 / 3).double() for name, c in net.choices.items()})
    assert len(calls) == 7 # with the fixed block
    assert all(shape[-1] == 7 for shape in calls[1:])

# ---- the order of channels

def test_sorted_channels_leave_what_was_trained_as_it_was():
    """First the largest expansion alone, then the two larger ones; the small ones get the channels
    of the largest norms."""
    net, x = supernet().eval(), images()[0]
    first, second, _ = [{name: SimpleNamespace(options=options) for name in net.choices}
                        for options in ((4,), (3, 4), (2, 3, 4))]
    archs = {e: [uniform_net(k, e, d, 2) for k, d in ((7, 3), (3, 2))] for e in (2, 3, 4)}

    def outputs(*expansions):
        return [net(x, None, arch)[0] for e in expansions for arch in archs[e]]
    for old, new, kept, changed in ((first, second, (4,), (2, 3)),
                                         (second, {name: None for name in second}, (3, 4), (2,))):
        for block in (block for blocks in net.stages for block in blocks): # trained since
            block.project.weight.data.normal_(0, 0.3)
        before, small = outputs(*kept), outputs(*changed)
        net.unlock(old, old)
        # nothing to do
        assert all(torch.equal(a, b) for a, b in zip(outputs(*kept, *changed), before + small,
                                                     strict=True))
        net.unlock(old, new)
        for a, b in zip(outputs(*kept), before, strict=True):
            agree(a, b, 1e-5)
        assert all((a - b).abs().max() > 1e-3
                   for a, b in zip(outputs(*changed), small, strict=True))
        for block in (block for blocks in net.stages for block in blocks):
            ends = [0, *(n for n, e in zip(block.mid, block.expands, strict=True)
                         if e in kept)]
            for start, end in pairwise(ends):
                norms = block.project.weight[:, start:end].abs().sum((0, 2, 3))
                assert torch.equal(norms, norms.sort(descending=True).values)

# ---- progressive shrinking

SHRINK = ("kernel_size=3, depth=1 share=0.5 learning_rate=0.05 warmup_iters=0, "
          "expand=2 subnets_per_step=2 share=2.5")


@pytest.fixture(scope="module")
def largest(digits_dir, tmp_path_factory):
    """The out_dir of a training of the largest network."""
    out_dir = str(tmp_path_factory.mktemp("largest") / "t")
    train.train(space_config(train, "mobilenetv3", digits_dir, out_dir, **TINY_LARGEST,
                             max_iters=20, eval_interval=20, seed=7))
    return out_dir


def shrink_config(digits_dir, out_dir, largest, **rest):
    options = dict(optimizer="spos", shrink=SHRINK, inherit=largest, teacher=largest, max_iters=8,
                   eval_interval=3, weight_optimizer="sgd",
                   learning_rate=0.1)
    return search_config("mobilenetv3", digits_dir, out_dir, **options | rest)


def test_phases_draw_only_what_they_unlocked(digits_dir, tmp_path, largest, monkeypatch):
    """In 8 steps of shares 1, 0.5 and 2.5: steps 0 and 1, step 2, the other five with two draws
    each; with the schedule of each."""
    drawn, real = [], train_search.train_archs
    unlocked, unlock = [], mobilenetv3.MobileNetV3.unlock
    monkeypatch.setattr(train_search, "train_archs",
                        lambda *args: drawn.extend(found := real(*args)) or found)
    monkeypatch.setattr(mobilenetv3.MobileNetV3, "unlock",
                        lambda *args: unlocked.append((len(drawn), *args[1:])) or unlock(*args))
    train_search.search(shrink_config(digits_dir, tmp_path / "s", largest, log_interval=1))
    assert len(drawn) == 3 + 2 * 5

    def seen(archs, name):
        values = [arch[f"{name}_{s}"] for arch in archs for s in (1, 2)]
        return {v for value in values for v in (value if isinstance(value, list) else [value])}
    for archs, d, e in ((drawn[:2], {2}, {3}), (drawn[2:3], {1, 2}, {3}),
                        (drawn[3:], {1, 2}, {2, 3})):
        assert seen(archs, "kernel_size") <= {3, 5}
        assert seen(archs, "depth") <= d and seen(archs, "expand") <= e
    assert seen(drawn, "kernel_size") == {3, 5}
    assert seen(drawn, "depth") == {1, 2} and seen(drawn, "expand") == {2, 3}
    expansions = [(draws, old["expand_1"].options, new["expand_1"].options) for draws, old,
                  new in unlocked]
    assert expansions == [(0, (3,), (3,)), (2, (3,), (3,)), (3, (3,), (2, 3))]
    rates = [line["lr"] for line in read_lines(tmp_path / "s/log.jsonl") if "lr" in line]
    # warmup of one step, then cosines from where each phase starts
    assert rates[:4] == pytest.approx([0.05, 0.1, 0.05, 0.05])
    evaluated = [line["arch"] for line in read_lines(tmp_path / "s/arch_traj.jsonl")][:2]
    assert seen(evaluated[:1], "depth") == {2} and seen(evaluated, "expand") == {3}


@pytest.fixture(scope="module")
def shrunk(digits_dir, tmp_path_factory, largest):
    """What a shrinking that was not stopped leaves."""
    out_dir = tmp_path_factory.mktemp("shrunk") / "s"
    train_search.search(shrink_config(digits_dir, out_dir, largest))
    return state_of(out_dir)


@pytest.mark.parametrize("stop", [2, 3, 5]) # before a phase, after its first step, inside one
def test_a_resumed_shrinking_is_one_that_was_not_stopped(stop, digits_dir, tmp_path, largest,
                                                         shrunk):
    config = shrink_config(digits_dir, tmp_path, largest)
    with signalled(train_search, "train_step", lambda *args: args[6].step == stop - 1):
        train_search.search(config)
    train_search.search(config | {"init_from": "resume"})
    assert state_of(tmp_path) == shrunk


def test_killed_before_its_first_checkpoint_it_inherits_again(digits_dir, tmp_path, largest):
    config = shrink_config(digits_dir, tmp_path / "whole", largest)
    train_search.search(config)
    train_search.search(config | killed_early(tmp_path / "whole", tmp_path / "again"))
    assert state_of(tmp_path / "again") == state_of(tmp_path / "whole")


def test_without_shrinking_everything_is_drawn_from_the_start():
    config = SimpleNamespace(shrink="", max_iters=7)
    phase, = read_phases(choices := supernet().choices, config)
    assert phase.choices is choices and phase.config is config and phase_of([phase], 6) is phase


@pytest.mark.parametrize("shrink, message", [
    ("depth=1 share=nan, expand=2", "has 'share=nan', which is no option"),
    ("depth=1 share=inf, expand=2", "has 'share=inf'"),
    ("depth=1, expand=2 share=0.1",
     "has a phase without a step, its share of max_iters=4 is too small")])
def test_phases_that_cannot_be_are_one_sentence(shrink, message):
    with pytest.raises(SystemExit, match=message):
        read_phases(supernet().choices, SimpleNamespace(shrink=shrink, optimizer="spos",
                                                        max_iters=4))


def test_the_supernet_starts_as_the_largest_network(digits_dir, tmp_path, largest):
    """Before a step it has its loss, at the largest options."""
    config = shrink_config(digits_dir, tmp_path, largest)
    run = runs.setup(SimpleNamespace(**config))
    config = SimpleNamespace(**config)
    splits, _ = train_search.split_data(config, run)
    net = search_spaces.build(vars(config))
    train_search.init_supernet(net, config, run)
    alone, x = train_search.load_trained(largest, "teacher", config,
                                         run), splits["val"].batch(config, "val", 0)[0]
    torch.testing.assert_close(net.eval()(x, None, uniform_net(5, 3, 2, 2))[0], alone(x)[0])


def test_the_teacher_adds_the_cross_entropy_to_its_answers():
    """And answers once a batch, without a gradient of its own."""
    net, (x, y), calls = supernet().eval(), images(), []
    teacher = net.extract(extremes(net.choices)[1]).eval()
    lesson = with_teacher(net, lambda x: calls.append(x) or teacher(x), 0.7)
    for arch in extremes(net.choices):
        logits, loss = lesson(x, y, arch)
        q, p = teacher(x)[0].softmax(-1), logits.softmax(-1)
        agree(loss, -p[range(4), y].log().mean() - 0.7 * (q * p.log()).sum(1).mean())
    loss.backward()
    assert len(calls) == 1 and all(p.grad is None for p in teacher.parameters())


def test_several_draws_average_their_gradients(digits_dir, tmp_path):
    config = SimpleNamespace(**search_config("mobilenetv3", digits_dir, tmp_path))
    run, state = runs.setup(config), SimpleNamespace(step=0, skipped=0)
    splits, _ = train_search.split_data(config, run)
    net = search_spaces.build(vars(config)).eval() # statistics that do not move
    archs, grads = extremes(net.choices), []
    for arch in archs:
        micro_batches = train.micro_batches(splits["train"], config, run, "train", 0)
        train.backward(net, [(x, y, arch) for x, y in micro_batches], run)
        grads.append([torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters()])
        net.zero_grad()
    before = [p.detach().clone() for p in net.parameters()]
    config.grad_clip = 0.0
    train.train_step(net, net, torch.optim.SGD(net.parameters(), 1.0), splits["train"], config, run,
                     state, 0.5, archs)
    for p, old, a, b in zip(net.parameters(), before, *grads, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.5 * (a + b) / 2, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("options, message", [
    (dict(shrink="kernel_size=4"), "has 'kernel_size=4', which is no option"),
    (dict(shrink="depth"), "has 'depth', which is no option"),
    (dict(shrink="depth=1 share=0"), "has 'share=0', which is no option"),
    (dict(shrink="epochs=3"), "has 'epochs=3'"),
    (dict(shrink="depth=1", optimizer="drnas"), "optimizer=drnas draws no architectures: use spos"),
    (dict(subnets_per_step=0), "subnets_per_step=0 must be 1 or more"),
    (dict(population=0), "population=0 must be 1 or more"),
    (dict(arch_evals=0), "arch_evals=0 must be 1 or more"),
    (dict(teacher="out/nowhere"), "There is no checkpoint"),
    (dict(inherit="LARGEST", expand=[2, 4]),
     "is not the largest network of this space, in its stages.0.0.expand.weight"),
    (dict(teacher="LARGEST", space="nb201"), "has space=mobilenetv3, and this search nb201")])
def test_mistakes_are_one_sentence(options, message, digits_dir, tmp_path, largest):
    options = dict(space="mobilenetv3", optimizer="spos") | options
    sizes = TINY_IMAGES | TINY_SPACES[options["space"]]
    options |= {key: largest for key in ("inherit", "teacher") if options.get(key) == "LARGEST"}
    assert message in stops("train_search.py", *flags({"data_dir": digits_dir,
                                                       "out_dir": tmp_path / "s"} | sizes),
                            *(f"--{key}={value}" for key, value in options.items()))
    assert not os.path.exists(tmp_path / "s")
