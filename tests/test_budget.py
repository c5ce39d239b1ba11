"""Budgets: never above the target and at most 5 % below it, for every method and space; and Pareto
fronts."""
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY_EVALS, TINY_IMAGES, TINY_SEARCH, TINY_SPACES, flags, script, stops

import analyze
import train_search
from budget import Budget, architectures, log_likelihood, make_budget, nondominated_sort
from budget import pareto_rank
from model import build
from optim_nas import METHODS, discretize, random_search, uniform
from search_spaces import space_module
from supernet import one_hot
from test_train import search_config

CHARS = build(dict(n_layer=[4, 5, 6], n_head=[2, 4, 6], n_embd=[96, 192, 384],
                   mlp_ratio=[2, 3, 4], bias=False, vocab_size=65, block_size=256))


KINDS = build(dict(
    n_layer=[2, 3, 4], n_head=[2, 4, 8], n_embd=[64, 96, 128], mlp_ratio=[1, 2, 4], head_size=16,
    norm=["layernorm", "rmsnorm"], position=["learned", "rope"], activation=["gelu", "swiglu"],
    qk_norm=[False, True], n_kv_head=[1, 2, 0], window=[32, 0], vocab_size=96, block_size=128))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(choices, seed):
    """Weights of a decided search."""
    g = generator(seed)
    return {name: (2 * torch.randn(c.shape, generator=g)).softmax(-1)
            for name, c in choices.items()}


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("net, name, targets", [
    (CHARS, "params", (0.6e6, 1.6e6, 2.5e6, 5.5e6, 9e6)),
    (CHARS, "flops", (0.5e9, 1.2e9, 1.7e9, 4e9, 6e9)),
    (KINDS, "params", (0.06e6, 0.2e6, 0.4e6, 0.7e6, 1e6)),
    (KINDS, "kv_cache", (4_200, 12_500, 33_000, 100_000, 230_000))])
def test_five_targets_of_each_kind(net, name, targets):
    for target in targets:
        budget = Budget(net.choices, net.cost, {name: target})
        for seed in range(3 if net is CHARS else 1):
            random = uniform(net.choices, generator(seed))
            projected = budget.project(drawn(net.choices, seed))
            for arch in (projected, budget.repair(random, generator(seed))):
                assert 0.95 * target <= net.cost(arch)[name] <= target, (target, arch)


def test_a_kv_cache_is_what_generation_keeps():
    """Bytes of the cache of block_size tokens, which is in float32 here and counted in 16 bits."""
    for seed in range(10):
        arch, cache = uniform(KINDS.choices, generator(seed)), [{} for _ in range(4)]
        tokens = torch.randint(96, (1, 128), generator=generator(seed))
        for part in tokens.split(64, dim=1)[:1] + tokens[:, 64:].split(1, dim=1):
            KINDS(part, arch=arch, cache=cache)
        kept = sum(layer[name].nbytes for layer in cache if layer for name in "kv")
        assert KINDS.cost(arch)["kv_cache"] == kept / 2


def test_a_kv_cache_of_another_space_is_one_sentence(digits_dir, tmp_path):
    options = TINY_IMAGES | TINY_SPACES["toy_cell"] | dict(target_kv_cache=1000)
    said = stops("train_search.py", "--space=toy_cell", f"--data_dir={digits_dir}",
                 f"--out_dir={tmp_path}/o", *flags(options))
    assert "target_kv_cache=1000" in said and "params, flops" in said


def test_the_projection_is_likely_among_all_that_fit():
    """Against all architectures: the likeliest that fits in half of the cases, and one of the
    likeliest 5 % on average."""
    net = build(dict(n_layer=[1, 2, 3], n_head=[1, 2], n_embd=[16, 32], mlp_ratio=[1, 2, 4],
                     vocab_size=65, block_size=16))
    everything, ranks = list(architectures(net.choices)), []
    for seed in range(12):
        weights = drawn(net.choices, seed)
        logs = {name: w.log().view(-1, w.shape[-1]).tolist() for name, w in weights.items()}
        target = net.cost(uniform(net.choices, generator(seed)))["params"]
        budget = Budget(net.choices, net.cost, {"params": target})

        def likely(arch, logs=logs, weights=weights, budget=budget):
            return log_likelihood(net.choices, budget.with_all_layers(arch, weights), logs)
        fitting = torch.tensor([likely(arch) for arch in everything
                                if 0.95 * target <= net.cost(arch)["params"] <= target])
        ranks.append((fitting > likely(budget.project(weights)) + 1e-6).double().mean())
    assert sum(rank == 0 for rank in ranks) >= 6 and sum(ranks) / len(ranks) < 0.05, ranks


def test_what_is_in_the_budget_anyway_stays():
    weights = drawn(CHARS.choices, 0)
    arch = discretize(CHARS.choices, weights)
    budget = Budget(CHARS.choices, CHARS.cost, {"params": 1.02 * CHARS.cost(arch)["params"]})
    assert budget.project(weights) == arch and budget.repair(arch, generator()) == arch


def test_what_a_shrinking_never_draws_is_not_in_the_budget():
    """mlp_ratio 2 and 4 layers stay locked: no architecture has them, and a budget that only they
    would meet is out of reach."""
    phases = "n_layer=6 mlp_ratio=4 n_embd=384 n_head=6, n_layer=5 mlp_ratio=3 n_embd=96 n_head=2"
    config = SimpleNamespace(target_params=2_500_000, target_flops=0, target_latency=0,
                             budget_penalty=1.0, optimizer="spos", max_iters=10, shrink=phases)
    drawn = train_search.read_phases(CHARS.choices, config)[-1].choices
    budget = make_budget(CHARS, config, CHARS.cost, drawn)
    for seed in range(5):
        arch = budget.repair(uniform(budget.drawn, generator(seed)), generator(seed))
        assert arch["n_layer"] >= 5 and min(arch["mlp_ratio"]) >= 3
        assert CHARS.cost(arch)["params"] <= config.target_params
    smallest = {"n_layer": 5, "n_embd": 96, "n_head": [2] * 5, "mlp_ratio": [3] * 5}
    smallest = CHARS.cost(smallest)["params"]
    config.target_params = smallest - 1
    with pytest.raises(SystemExit, match=f"{smallest:,} to"):
        make_budget(CHARS, config, CHARS.cost, drawn)


def test_several_targets_hold_together():
    largest = CHARS.cost(dict(n_layer=6, n_embd=384, n_head=[6] * 6, mlp_ratio=[4] * 6))
    targets = {"params": 0.8 * largest["params"], "flops": 0.7 * largest["flops"]}
    cost = CHARS.cost(Budget(CHARS.choices, CHARS.cost, targets).project(drawn(CHARS.choices, 1)))
    assert cost["params"] <= targets["params"]
    assert 0.95 * targets["flops"] <= cost["flops"] <= targets["flops"]


@pytest.mark.parametrize("target", [300_000, 12_000_000])
def test_a_target_out_of_reach_names_the_smallest_and_the_largest(target):
    words = r"target_params=\d\d?[\d,]+ is out of reach: .* 326,592 to 10,745,088"
    with pytest.raises(SystemExit, match=words):
        Budget(CHARS.choices, CHARS.cost, {"params": target})


@pytest.mark.parametrize("space", sorted(TINY_SPACES))
def test_every_space_takes_a_budget(space):
    config = TINY_IMAGES | TINY_SPACES[space] | dict(img_size=8, in_channels=1, num_classes=10)
    net = space_module(space).build(config)
    for seed in range(3):
        target = net.cost(uniform(net.choices, generator(seed)))["params"]
        budget = Budget(net.choices, net.cost, {"params": target})
        arch = budget.project(drawn(net.choices, seed))
        used = net.cost(arch)["params"] / target
        assert budget.floor <= used + 1e-9 and used <= 1, (space, target, used)
        (_, drawn_arch), = random_search(net.choices, lambda arch: 0.0, 1, generator(seed), budget)
        assert net.cost(drawn_arch)["params"] <= target


def test_the_penaltys_gradient_by_finite_differences():
    budget = Budget(CHARS.choices, CHARS.cost, {"params": 3e6, "flops": 4e9}, strength=0.7)
    weights = {name: w.double() for name, w in drawn(CHARS.choices, 3).items()}

    def penalty(name, index, step):
        w = weights[name].clone()
        w[index] += step
        cost = CHARS.cost(weights | {name: w})
        return 0.7 * (math.log(cost["params"] / 3e6) ** 2 + math.log(cost["flops"] / 4e9) ** 2)
    gradient = budget.gradient(weights)
    for name, index in (("n_embd", (1,)), ("n_layer", (0,)), ("n_head", (2, 1)),
                        ("mlp_ratio", (5, 2))):
        slope = (penalty(name, index, 1e-6) - penalty(name, index, -1e-6)) / 2e-6
        assert gradient[name][index].item() == pytest.approx(slope, rel=1e-5, abs=1e-9), name


def test_the_penalty_alone_leads_the_alphas_to_the_target():
    for target in (1e6, 8e6):
        budget = Budget(CHARS.choices, CHARS.cost, {"params": target})
        arch_optimizer = METHODS["darts"](CHARS.choices, generator(), learning_rate=0.1,
                                          weight_decay=0.0, budget=budget)
        for _ in range(150):
            weights = arch_optimizer.sample(0.0, generator())
            grads = {name: torch.full_like(w, 1e-12) for name, w in weights.items()}
            arch_optimizer.step(weights, grads)
        assert CHARS.cost(arch_optimizer.mean())["params"].item() == pytest.approx(target, rel=0.1)


def test_fronts_by_exhaustion():
    points = [tuple(row) for row in torch.randint(8, (60, 2), generator=generator()).tolist()]

    def beaten(i, by):
        return any(points[j] != points[i] and points[j][0] <= points[i][0]
                   and points[j][1] <= points[i][1] for j in by)
    layers = nondominated_sort(points)
    assert sorted(itertools.chain(*layers)) == list(range(60))
    for n, layer in enumerate(layers):
        assert not any(beaten(i, list(itertools.chain(*layers[n:]))) for i in layer)
        assert all(beaten(i, layers[n - 1]) for i in layer) or n == 0
    history = [(float(loss), cost) for loss, cost in points]
    ranked = pareto_rank(history, lambda cost: cost)
    assert sorted(ranked) == sorted(history)
    smallest = {min(p[0] for p in points), min(p[1] for p in points)}
    assert smallest >= {min(h[1] for h in ranked[:2])}


@pytest.mark.parametrize("optimizer", ["darts", "drnas", "gdas", "spos"])
def test_a_search_ends_in_its_budget(optimizer, data_dir, tmp_path):
    net = build(TINY_SEARCH | dict(vocab_size=100))
    costs = sorted(net.cost(arch)["flops"] for arch in architectures(net.choices))
    target = costs[len(costs) // 2] + 10
    options = TINY_SEARCH | dict(optimizer=optimizer, data_dir=data_dir, out_dir=tmp_path)
    vocab_size = json.loads((Path(data_dir) / "pydocs/meta.json").read_text())["vocab_size"]
    target += 2 * 16 * 16 * (vocab_size - 100)
    script("train_search.py", *flags(options), f"--target_flops={target}")
    for line in read_lines(tmp_path / "arch_traj.jsonl"):
        assert 0.9 * target <= line["cost"]["flops"] <= target


def test_a_finished_search_goes_on_within_a_budget(data_dir, tmp_path):
    """Its best architecture so far may cost more, and must not stay; nor may its losses, which are
    those of other weights."""
    options = TINY_SEARCH | dict(optimizer="spos", data_dir=data_dir, out_dir=tmp_path)
    script("train_search.py", *flags(options))
    costs = sorted(line["cost"]["params"] for line in read_lines(tmp_path / "arch_traj.jsonl"))
    script("train_search.py", *flags(options | dict(max_iters=6)), "--init_from=resume",
           f"--target_params={costs[0] - 1}")
    assert json.loads((tmp_path / "arch.json").read_text())["cost"]["params"] < costs[0]
    assert {line["step"] for line in read_lines(tmp_path / "arch_search.jsonl")} == {6}


def test_evolution_towards_small_loss_and_small_cost(data_dir, tmp_path):
    options = TINY_SEARCH | TINY_EVALS | dict(optimizer="spos", arch_search="pareto", arch_evals=12,
                                              data_dir=data_dir, out_dir=tmp_path)
    script("train_search.py", *flags(options))
    tried = read_lines(tmp_path / "arch_search.jsonl")
    front = json.loads((tmp_path / "pareto.json").read_text())["front"]
    assert len(tried) == 12 and min(line["loss"] for line in tried) == front[0]["loss"]
    for a in front:
        others = [b for b in front if b != a]
        assert not any(b["loss"] <= a["loss"] and b["params"] <= a["params"] for b in others)


def test_a_search_for_both_goes_on_with_another_cost(data_dir, tmp_path, monkeypatch):
    """What was evaluated before has that cost, too: in its log, in the front and in the figure."""
    config = search_config(data_dir, tmp_path, optimizer="spos", arch_search="pareto",
                           pareto_cost="flops")
    train_search.search(config)
    figures = []
    monkeypatch.setattr(analyze, "draw_front", lambda ax, *drawn: figures.append(drawn))
    train_search.search(config | dict(init_from="resume", pareto_cost="params", arch_evals=8))
    analyze.search_figure(str(tmp_path))
    (searched, cost), = figures
    net = build(json.loads((tmp_path / "run.json").read_text())["config"])
    assert cost == "params" and len(searched) == 8
    assert all(line["cost"] == net.cost(line["arch"])["params"] for line in searched)


def test_a_front_needs_spos(data_dir, tmp_path):
    words = "arch_search='pareto' is what optimizer=spos ends with, and optimizer is drnas"
    with pytest.raises(SystemExit, match=words):
        train_search.search(search_config(data_dir, tmp_path / "o", arch_search="pareto"))
    assert not (tmp_path / "o").exists()


def test_a_budget_out_of_reach_stops_a_search(data_dir, tmp_path):
    options = TINY_SEARCH | dict(data_dir=data_dir, out_dir=tmp_path, target_params=10)
    said = stops("train_search.py", *flags(options))
    assert "target_params=10 is out of reach" in said


def test_one_hot_cost_is_the_cost():
    for seed in range(5):
        arch = uniform(CHARS.choices, generator(seed))
        cost = CHARS.cost(one_hot(CHARS.choices, arch))
        assert {k: v.item() for k, v in cost.items()} == CHARS.cost(arch)
