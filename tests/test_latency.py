"""Latency tables: how one is measured, what it predicts, and a search that ends within a target."""
import json
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import (TINY, TINY_IMAGES, TINY_SEARCH, TINY_SPACES, flags, script, stops,
                      succeeds)
from test_budget import CHARS, drawn, generator

import bench
import train_search
from budget import Budget, latency_features, latency_predictor, load_latency, network_id
from configurator import defaults
from data import load_meta
from model import build
from optim_nas import uniform
from run import write_json
from search_spaces import space_module
from supernet import one_hot

KEY = "prefill 1 x 16"
# milliseconds of 256 tokens on one core of a server, rounded
PREFILL = {"rest": [[0.3] * 3, [0.4] * 3, [1.0] * 3],
           "attention": [[0.75, 0.85, 0.94], [1.84, 1.91, 1.97], [5.22, 5.24, 5.4]],
           "mlp": [[0.4, 0.57, 0.73], [1.19, 1.74, 2.26], [4.12, 5.91, 7.96]]}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """latency.json of the Shakespeare-char space on this machine, measured once, in haste."""
    out = tmp_path_factory.mktemp("latency")
    names = ("block_size", "n_layer", "n_head", "n_embd", "mlp_ratio", "bias")
    sizes = {name: getattr(CHARS.config, name) for name in names}
    bench.measure_latency(defaults(vars(bench)) | sizes | dict(
        dataset="shakespeare_char", data_dir=str(out), out_dir=str(out), device="cpu",
        vocab_size=65, latency_length=[16], rounds=1, warmup=0, latency_heldout=3))
    return out / "latency.json"


def test_five_latency_targets():
    predict = latency_predictor(CHARS, PREFILL)
    for target in (6, 9, 16, 45, 70):
        budget = Budget(CHARS.choices, lambda weights: {"latency": predict(weights)},
                        {"latency": target})
        for seed in range(3):
            random = uniform(CHARS.choices, generator(seed))
            projected = budget.project(drawn(CHARS.choices, seed))
            for arch in (projected, budget.repair(random, generator(seed))):
                assert 0.95 * target <= predict(arch) <= target, (target, arch)


def test_the_prediction_is_the_sum_of_the_tables_entries(measured):
    table, choices = json.loads(measured.read_text()), CHARS.choices
    for key in (KEY, "decode 1 x 16"):
        ms, held = table["latencies"][key]["ms"], table["latencies"][key]["heldout"]
        predict = latency_predictor(CHARS, ms)
        for seed in range(5):
            arch = uniform(choices, generator(seed))

            def at(name, arch=arch):
                values = arch[name] if choices[name].repeat else [arch[name]]
                return [choices[name].options.index(value) for value in values]
            e, depth = at("n_embd")[0], at("n_layer")[0]
            total = ms["rest"][e][depth]
            total += sum(ms["attention"][e][h] for h in at("n_head"))
            total += sum(ms["mlp"][e][m] for m in at("mlp_ratio"))
            expected = pytest.approx(total, rel=1e-12)
            assert predict(arch) == predict(one_hot(choices, arch)).item() == expected
        assert len(held) == 3 and all(row["measured"] > 0 for row in held)
        assert all(row["predicted"] == predict(row["arch"]) for row in held)


@pytest.mark.parametrize("space", ["gpt", *sorted(TINY_SPACES)])
def test_features_are_linear_in_each_row_and_their_gradient_is_that_of_finite_differences(space):
    images = dict(img_size=8, in_channels=1, num_classes=10)
    config = TINY_IMAGES | TINY_SPACES.get(space, {}) | images
    net = CHARS if space == "gpt" else space_module(space).build(config)
    arch = uniform(net.choices, generator(1))
    features = latency_features(net, one_hot(net.choices, arch))
    ms = {name: torch.rand(f.shape, generator=generator()).tolist() for name, f in features.items()}
    predict, weights = latency_predictor(net, ms), drawn(net.choices, 3)
    weights = {name: w.double().requires_grad_() for name, w in weights.items()}
    gradients = torch.autograd.grad(predict(weights), weights.values())
    gradients = dict(zip(weights, gradients, strict=True))
    for name, c in net.choices.items():
        index = (c.repeat - 1, 0) if c.repeat else (0,)
        w = [weights[name].detach().clone() for _ in range(2)]
        w[0][index] += 0.5
        w[1][index] -= 0.5
        plus, minus = (predict(weights | {name: v}).item() for v in w)
        assert plus - minus == pytest.approx(gradients[name][index].item(), rel=1e-6), name
    assert predict(arch) == predict(one_hot(net.choices, arch)).item()


def test_parts_add_up_to_the_networks_that_they_were_timed_in():
    """With made-up times, layers that take longer in deep networks, and marks that take time."""
    net = build(dict(n_layer=[1, 2, 4], n_head=[2, 4], n_embd=[16, 32], mlp_ratio=[1, 2, 4],
                     vocab_size=65, block_size=16))

    def layers(arch, dearer):
        rows = zip(arch["n_head"], arch["mlp_ratio"], strict=True)
        return torch.tensor([[h * arch["n_embd"] * dearer, m * arch["n_embd"] * dearer]
                             for h, m in rows]).flatten()

    def total(arch):
        return layers(arch, 1.0).sum().item() + arch["n_layer"] ** 2
    alike, mixed = bench.archs_of_parts(net.choices)
    first, last = torch.tensor([3.0]), torch.tensor([5.0])
    marked = [torch.cat((first, layers(arch, 1.0), last)).numpy() for arch in alike]
    totals = [total(arch) for arch in (*alike, *mixed)]
    table = bench.table_of_parts(net.choices, alike, mixed, marked, totals)
    predict = latency_predictor(net, table)
    for seed in range(20):
        arch = uniform(net.choices, generator(seed))
        assert predict(arch) == pytest.approx(total(arch), rel=1e-6)


def test_the_fit_finds_a_function_with_no_negative_coefficients():
    config = dict(img_size=8, in_channels=1, last_kernel_size=3, last_padding=1)
    net = space_module("toy_conv_macro").build(config)
    archs = [uniform(net.choices, generator(seed)) for seed in range(120)]
    features = [latency_features(net, one_hot(net.choices, arch)) for arch in archs]
    scale = {"params": 1e-6, "flops": 1e-7}
    true = {name: scale.get(name, 1) * torch.rand(f.shape, generator=generator())
            for name, f in features[0].items()}
    ms = [sum((true[name] * f).sum().item() for name, f in row.items()) for row in features]
    found = bench.fit(features[20:], ms[20:])
    assert all(torch.tensor(values).min() >= 0 for values in found.values())
    for arch, t in zip(archs[:20], ms[:20], strict=True):
        assert latency_predictor(net, found)(arch) == pytest.approx(t, rel=0.08)


def test_a_search_ends_in_its_latency(data_dir, tmp_path):
    tiny = TINY_SEARCH | dict(data_dir=data_dir)
    measure = dict(dataset="pydocs", out_dir=tmp_path / "l", rounds=3, latency_heldout=4)
    printed = succeeds("bench.py", "latency", *flags(tiny | measure))
    errors = json.loads(printed.splitlines()[-1])
    table = json.loads((tmp_path / "l/latency.json").read_text())
    assert list(errors) == [KEY, "decode 1 x 16"] and table["threads"] == 1 and table["machine"]
    held = sorted(row["predicted"] for row in table["latencies"]["decode 1 x 16"]["heldout"])
    target, path = held[2] + 1e-9, tmp_path / "l/latency.json"
    within = dict(out_dir=tmp_path / "s", latency_table=path, latency_of="decode",
                  target_latency=target)
    script("train_search.py", *flags(tiny | within))
    for line in (tmp_path / "s/arch_traj.jsonl").read_text().splitlines():
        assert 0 < json.loads(line)["cost"]["latency"] <= target
    result, arch = (json.loads((tmp_path / f"s/{name}.json").read_text())
                    for name in ("result", "arch"))
    assert result["latency"] == arch["cost"]["latency"] and {"params", "flops"} < set(arch["cost"])
    front = dict(out_dir=tmp_path / "p", latency_table=path, optimizer="spos",
                 arch_search="pareto", pareto_cost="latency")
    script("train_search.py", *flags(tiny | front))
    found = json.loads((tmp_path / "p/pareto.json").read_text())
    assert found["cost"] == "latency" and all(point["latency"] > 0 for point in found["front"])

    path.rename(tmp_path / "moved.json") # a report without the search's table is told where it is
    few = dict(n_rank=0, n_pick=0, n_random=1, seeds=[1, 2], data_dir=data_dir)
    report = ["report.py", str(tmp_path / "s"), *flags(TINY | few)]
    assert "l/latency.json" in stops(*report)
    script(*report, f"--latency_table={tmp_path}/moved.json")
    page, told = ((tmp_path / f"s/report/report.{kind}").read_text() for kind in ("md", "json"))
    assert f"at most {target:.3g} ms" in page
    assert all(0 < network["used"] <= 1 for network in json.loads(told)["networks"].values())


def test_the_vocabulary_is_that_of_the_search(data_dir, tmp_path):
    """Of data that is prepared, and of data that is not."""
    keys = dict(space="gpt", dataset="openwebtext", data_dir=str(tmp_path))
    config = SimpleNamespace(**defaults(vars(bench)) | keys)
    for config.init_from, size in (("scratch", 50304), ("gpt2", 50257)): # as after prepare.py
        assert bench.facts_of(config, None) == {"vocab_size": size}
    config.dataset, config.data_dir = "pydocs", data_dir
    size = load_meta(data_dir, "pydocs")["vocab_size"]
    assert bench.facts_of(config, None) == {"vocab_size": size}


def test_data_that_nothing_is_known_of_is_one_sentence(tmp_path):
    keys = TINY_SEARCH | dict(dataset="mine", data_dir=tmp_path, out_dir=tmp_path / "o")
    for mode in (["latency"], []):
        said = stops("bench.py", *mode, *flags(keys))
        assert "mine is not prepared: run python prepare.py --dataset=text" in said


@pytest.mark.parametrize("change, words", [
    (dict(rounds=1), "rounds=1 must be 2 or more"),
    (dict(rounds=0, latency=True), "rounds=0 must be 1 or more"),
    (dict(growth_options=[1, 2]), r"growth_options=\[1, 2\] must be at least 2 and below 10"),
    (dict(growth_layers=[2]), r"growth_layers=\[2\] must be 3 or more"),
    *((dict([(key, 5.5)]), f"{key}=5.5 must be whole numbers, such as 2 and not 2.0") for key in (
        "growth_options", "growth_layers", "latency_batch_size", "latency_length")),
    (dict(max_iters=0), "max_iters=0 must be 1 or more"),
    *((dict(latency=True) | {key: value}, f"{key}={re.escape(str(value))} must be {low} or more")
      for key, value, low in (
          ("latency_heldout", 0, 1), ("latency_samples", 0, 1), ("latency_batch_size", 0, 1),
          ("latency_batch_size", [1, 0], 1), ("latency_length", -1, 0), ("warmup", -1, 0),
          ("img_size", -1, 0)))])
def test_bad_numbers_are_one_sentence_before_anything_is_measured(change, words, tmp_path):
    with pytest.raises(SystemExit, match=f"^{words}.$"):
        keys = dict(dataset="pydocs", out_dir=str(tmp_path / "o"))
        bench.main(defaults(vars(bench)) | TINY_SEARCH | keys | change)
    assert not (tmp_path / "o").exists()


def test_a_table_that_does_not_fit_is_one_sentence(measured, data_dir, tmp_path):
    keys = dict(space="gpt", latency_table=str(measured), block_size=256)
    config = SimpleNamespace(**defaults(vars(train_search)) | keys)
    words = "has no prefill 1 x 256, but prefill 1 x 16, decode 1 x 16"
    with pytest.raises(SystemExit, match=words):
        load_latency(CHARS, config)
    config.latency_length = 16
    assert load_latency(CHARS, config)
    words = "is of another space, or of other sizes in it: run python bench"
    for change in (dict(n_embd=[96, 192, 480]), dict(n_layer=[4, 5]), dict(vocab_size=97),
                   dict(head_size=64)):
        with pytest.raises(SystemExit, match=words):
            load_latency(build(vars(CHARS.config) | change), config)
    other = network_id(CHARS, SimpleNamespace(space="other"))
    write_json(tmp_path / "other.json", {"network": other})
    config.latency_table = str(tmp_path / "other.json")
    with pytest.raises(SystemExit, match="is of another space"):
        load_latency(CHARS, config)
    tiny = flags(TINY_SEARCH | dict(data_dir=data_dir, out_dir=tmp_path / "o"))
    assert "needs a --latency_table" in stops("train_search.py", *tiny, "--target_latency=1.0")
    said = stops("bench.py", "latency", *tiny, "--dataset=pydocs", "--latency_length=17")
    assert "latency_length=17 is above block_size=16" in said
