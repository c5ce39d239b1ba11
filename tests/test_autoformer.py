"""AutoFormer: published counts, relative positions as the (N, N, head_size) sums that they stand
for, drop path, decay, texts, export."""
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY_IMAGES, TINY_SPACES, flags, script, stops

import train_base
import train_search
from configurator import ConfigError, configure
from optim_nas import space_size, uniform
from run import read_json
from search_spaces import autoformer, with_space
from supernet import extremes, one_hot
from train import configure_optimizer

TINY = TINY_SPACES["autoformer"] | dict(img_size=8, in_channels=1, num_classes=10)


def config_of(kind, letter):
    """The keys of a config file; kind: search or base."""
    module = {"search": train_search, "base": train_base}[kind]
    return configure(with_space(dict(vars(module)), "autoformer"),
                     [f"{ROOT}/config/{kind}_autoformer_{letter}.py"])


def params_of(*args):
    with torch.device("meta"):
        return sum(p.numel() for p in autoformer.build(*args).parameters())


@pytest.mark.parametrize("letter, C, published, smallest, largest", [
    ("t", 1000, 5_867_944, 5_366_056, 10_517_272), ("t", 100, None, 5_192_356, 10_300_372),
    ("t", 10, 5_676_874, 5_174_986, 10_278_682),
    ("s", 1000, 22_891_432, 13_057_320, 34_790_440),
    ("b", 1000, 53_691_688, 41_687_896, 76_882_264)])
def test_published_parameter_counts(letter, C, published, smallest, largest):
    """Of the three published networks, by the config files that train them, and of the spaces'
    ends; the supernet is as large."""
    arch = autoformer.arch_of(f"autoformer_{letter}")
    base = config_of("base", letter) | {"num_classes": C}
    assert published is None or params_of(base, arch) == published
    config = config_of("search", letter) | {"num_classes": C}
    with torch.device("meta"):
        ends = extremes(autoformer.build(config).choices)
    assert [params_of(config, arch) for arch in ends] == [smallest, largest]
    assert params_of(config) == largest


def test_published_sizes_of_the_spaces():
    with torch.device("meta"):
        sizes = [space_size(autoformer.build(config_of("search", letter)).choices)
                 for letter in "tsb"]
    assert sizes == [1_056_964_608, 77_103_263_459_313, 10_108_977_168_384]


@pytest.mark.parametrize("letter, published", [("t", 1.344e9), ("s", 4.892e9), ("b", 11.237e9)])
def test_cost_beside_the_published_formula(letter, published):
    """The products of the published network but for relative positions, and what the formula adds
    to them: see the module's docstring."""
    arch = autoformer.arch_of(f"autoformer_{letter}")
    e, C, N, plain, formula = arch["n_embd"], 1000, 197, 0, 0
    for h, r in zip(arch["n_head"], arch["mlp_ratio"], strict=True):
        weights, n = 4 * 64 * h * e + 2 * int(r * e) * e, 64 * h
        plain += N * weights + 2 * N * N * n
        formula += (N + 1) * (weights + 2 * e) + (N + 1) ** 2 * (2 * n + 28.5) + (N + 1) * n / 2
    formula += e + N * 768 * e + N * e / 2 + (N + 1) * e * C
    plain += (N - 1) * 768 * e + e * C
    assert formula == pytest.approx(published, abs=1e6)
    flops = autoformer.build(config_of("base", letter), arch).cost()["flops"]
    # both tables, and 32 more channels
    relative = sum(2 * N * 60 * 64 * h + 2 * N * N * 32 * h for h in arch["n_head"])
    assert flops == 2 * (plain + relative)
    words = " ".join(autoformer.__doc__.split())
    assert f"{flops / 2e9:.3f} G" in words and f"{plain / 1e9:.3f} G" in words


@pytest.mark.parametrize("side, clip, n_head", [(1, 1, 1), (2, 1, 2), (4, 2, 3), (4, 14, 2),
                                                (8, 3, 2)])
def test_relative_positions_are_their_sums_over_pairs(side, clip, n_head):
    """logits (q k + q R_k) / sqrt(d), output a v + a R_v, with R (N, N, d) written out, in values
    and in all gradients."""
    torch.manual_seed(0)
    d, N = 4, side * side + 1
    c = SimpleNamespace(head_size=d, rel_pos_clip=clip, dropout=0.0)
    attn = autoformer.Attention(c, (6,), (n_head,), side).double()
    tables = [table for table in (attn.rel_pos_k, attn.rel_pos_v)]
    for table in tables:
        torch.nn.init.normal_(table)
    assert tables[0].shape == (2 * (2 * clip + 2), d)
    q, k, v = (torch.randn(2, n_head, N, d).double().requires_grad_() for _ in range(3))

    def entry(a, b):
        return 0 if a is None or b is None else max(-clip, min(clip, b - a)) + clip + 1
    places = [(None, None), *((i // side, i % side) for i in range(side * side))]
    rows, columns = (torch.tensor([[entry(a[axis], b[axis]) for b in places] for a in places])
                     for axis in (0, 1))
    R_k, R_v = (table[rows] + table[2 * clip + 2:][columns] for table in tables) # (N, N, d)
    logits = torch.einsum("bhid,bhjd->bhij", q, k) + torch.einsum("bhid,ijd->bhij", q, R_k)
    a = (logits / math.sqrt(d)).softmax(-1)
    expected = torch.einsum("bhij,bhjd->bhid", a, v) + torch.einsum("bhij,ijd->bhid", a, R_v)
    y, direction = attn.attend(q, k, v), torch.randn(2, n_head, N, d).double()
    inputs = (q, k, v, *tables)
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=1e-12)
    for g, g0 in zip(*(torch.autograd.grad((out * direction).sum(), inputs)
                       for out in (y, expected)), strict=True):
        torch.testing.assert_close(g, g0, atol=1e-11, rtol=1e-11)


def test_a_layer_drops_as_often_however_deep_its_network_is():
    """0 in the first layer to drop_path in the last of the deepest network; in training alone."""
    net = autoformer.build(TINY | dict(n_layer=[2, 3, 5], drop_path=0.4))
    assert [block.drop_path for block in net.blocks] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    small = net.extract(uniform(net.choices, torch.Generator()) | {"n_layer": 2})
    assert [block.drop_path for block in small.blocks] == pytest.approx([0, 0.1])
    x = torch.randn(64, 1, 8, 8)
    both = [small.train(training)(x)[0] for training in (True, True, False, False)]
    assert not torch.equal(*both[:2]) and torch.equal(*both[2:])


def test_positions_and_the_class_token_do_not_decay():
    net = autoformer.build(TINY)
    config = SimpleNamespace(weight_optimizer="adamw", weight_decay=0.05, beta1=0.9, beta2=0.999,
                             learning_rate=1e-3, zero_stage=0)
    groups = configure_optimizer(net, config, SimpleNamespace(device_type="cpu")).param_groups
    names = {p: name for name, p in net.named_parameters()}
    decays = {names[p] for group in groups if group["weight_decay"] for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(names)
    assert decays == {"embed.proj.weight", "classifier.weight",
                      *(f"blocks.{i}.{part}.weight" for i in range(2)
                        for part in ("attn.qkv", "attn.proj", "mlp.c_fc", "mlp.c_proj"))}


def test_only_patches_are_classified():
    """The mean leaves the class token out: a shift of what the last layer does to it alone changes
    nothing."""
    net, x = autoformer.build(TINY, uniform(autoformer.build(TINY).choices,
                                            torch.Generator())).eval(), torch.randn(2, 1, 8, 8)
    before = net(x)[0]
    net.blocks[-1].register_forward_hook(
        lambda block, args, y: torch.cat((y[:, :1] + 1, y[:, 1:]), 1))
    assert torch.equal(net(x)[0], before)


def test_genotypes_round_trip():
    net = autoformer.build(TINY | dict(mlp_ratio=[1, 2.5, 3]))
    for seed in range(10):
        arch = uniform(net.choices, torch.Generator().manual_seed(seed))
        text = autoformer.genotype(arch)
        assert (autoformer.arch_of(text) == arch and autoformer.columns(arch) == {"genotype": text}
                and not set(text) & set(",\"'"))
    arch = autoformer.arch_of("autoformer_s")
    assert (arch["n_layer"], arch["n_embd"]) == (13, 384)
    assert autoformer.genotype(arch) == autoformer.PUBLISHED["autoformer_s"]
    assert arch["n_head"] == [6, 6, 5, 7, 5, 5, 5, 6, 6, 7, 7, 6, 7]
    assert arch["mlp_ratio"] == [3, 3.5, 3, 3.5, *[4] * 7, 3.5, 4]


@pytest.mark.parametrize("call, words", [
    (lambda: autoformer.arch_of("autoformer_l"), "autoformer_l"),
    (lambda: autoformer.arch_of("192"), "heads x ratio"),
    (lambda: autoformer.build({}, autoformer.arch_of("autoformer_t")), "mlp_ratio has 3.0"),
    (lambda: autoformer.build(TINY | dict(patch_size=3)),
     "patch_size=3 does not divide img_size=8"),
    (lambda: autoformer.build(TINY | dict(drop_path=1.0)), "drop_path=1.0"),
    (lambda: autoformer.build(TINY | dict(n_head=[2, 1])), "n_head=.* in increasing order"),
    (lambda: autoformer.build(TINY | dict(rel_pos_clip=0)), "rel_pos_clip=0")])
def test_mistakes_are_one_sentence(call, words):
    with pytest.raises((ConfigError, SystemExit), match=words) as error:
        call()
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


def test_a_genotype_is_trained(digits_dir, tmp_path):
    tiny = [*flags(TINY_IMAGES | TINY_SPACES["autoformer"]), f"--data_dir={digits_dir}",
            f"--out_dir={tmp_path}/b"]
    assert "n_layer has 13" in stops("train_base.py", "--space=autoformer",
                                     "--genotype=autoformer_t", *tiny)
    script("train_base.py", "--space=autoformer", "--genotype=16: 1x2 2x1", *tiny)
    assert read_json(tmp_path / "b/result.json")["arch"] == {
        "n_embd": 16, "n_layer": 2, "n_head": [1, 2], "mlp_ratio": [2, 1]}


def test_it_learns():
    """Fifty steps on a batch of noise, and it knows it by heart; the mixture as well."""
    torch.manual_seed(0)
    x, y = torch.randn(16, 1, 8, 8), torch.randint(10, (16,))
    net = autoformer.build(TINY | dict(drop_path=0.0))
    weights = {name: torch.full(c.shape, 1 / len(c.options)) for name, c in net.choices.items()}
    for args in ((), (weights,)):
        net = autoformer.build(TINY | dict(drop_path=0.0), None if args
                               else extremes(net.choices)[1])
        optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
        for _ in range(50):
            optimizer.zero_grad()
            loss = net(x, y, *args)[1]
            loss.backward()
            optimizer.step()
        assert loss < 0.5


def test_an_extracted_network_is_exported():
    net = autoformer.build(TINY)
    small, x = net.extract(extremes(net.choices)[1]).eval(), torch.randn(2, 1, 8, 8)
    exported = torch.export.export(small, (x,)).module()
    torch.testing.assert_close(exported(x)[0], small(x)[0])


def test_expected_cost_has_the_gradient_of_its_differences():
    net = autoformer.build(TINY)
    weights = {name: torch.full(c.shape, 1 / len(c.options), dtype=torch.float64,
                                requires_grad=True) for name, c in net.choices.items()}
    one = one_hot(net.choices, extremes(net.choices)[0])
    cost = net.cost(weights)
    for key in ("params", "flops"):
        grads = torch.autograd.grad(cost[key], list(weights.values()), retain_graph=True)
        assert all((g.diff() > 0).all() for g in grads), "more of anything costs more"
    assert cost["params"] > net.cost(one)["params"]
