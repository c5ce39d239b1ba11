"""Samples against their distributions, the unrolled gradient against its closed form, and searches
against the list of all architectures."""
import itertools
import math

import pytest
import torch

import optim_nas
from budget import architectures
from optim_nas import METHODS, arch_key, argmax_arch, best_of, crossover, dirichlet, discretize
from optim_nas import entropy, evolutionary_search, gumbel, kl_to_uniform, method_class, mutate
from optim_nas import random_search, space_size, sparsemax, uniform, unrolled_gradient
from supernet import straight_through_arch, Choice, check_arch, one_hot

CHOICES = {"n_layer": Choice((1, 2, 3)), "n_embd": Choice((8, 16)),
           "n_head": Choice((1, 2, 4), repeat=3, depth="n_layer")}
SETTINGS = [("darts", {}), ("darts", {"normalize": "sparsemax"}), ("drnas", {}),
            ("drnas", {"regularizer": "kl"}), ("gdas", {})]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_dirichlet_has_the_moments_and_the_gradient_of_its_mean():
    """Mean c/C and variance c(C-c)/(C^2(C+1)); the pathwise gradients average to the mean's."""
    alpha = torch.tensor([-1.0, 0.0, 1.5], requires_grad=True)
    w = dirichlet(alpha.expand(200_000, 3), generator())
    c = (torch.nn.functional.elu(alpha) + 1).double()
    C = c.sum()
    torch.testing.assert_close(w.mean(0).double(), c / C, atol=3e-3, rtol=0)
    variance = c * (C - c) / (C * C * (C + 1))
    torch.testing.assert_close(w.var(0).double(), variance, atol=2e-3, rtol=0)
    for k in range(3):
        sampled, = torch.autograd.grad(w[:, k].mean(), alpha, retain_graph=True)
        exact, = torch.autograd.grad((c / C)[k], alpha, retain_graph=True)
        torch.testing.assert_close(sampled, exact, atol=4e-3, rtol=0)


def test_dirichlet_of_tiny_concentrations_is_finite():
    w = dirichlet(torch.full((1000, 4), -8.0, requires_grad=True), generator())
    assert w.isfinite().all() and torch.allclose(w.sum(-1), torch.ones(1000))
    w.square().sum().backward()


def test_kl_in_closed_form():
    """sum_k (c_k - 1) (digamma(c_k) - digamma(C)) + lgamma(C) - sum_k lgamma(c_k) - lgamma(K)"""
    c = torch.tensor([[0.3, 1.0, 2.5], [1.0, 1.0, 1.0]], dtype=torch.float64, requires_grad=True)
    C = c.sum(-1)
    exact = ((c - 1) * (c.digamma() - C.digamma().unsqueeze(-1))).sum(-1)
    exact = (exact + C.lgamma() - c.lgamma().sum(-1) - math.lgamma(3)).sum()
    assert kl_to_uniform(c).item() == pytest.approx(exact.item(), rel=1e-12)
    assert torch.autograd.gradcheck(kl_to_uniform, c)


@pytest.mark.parametrize("tau", [0.1, 10.0])
def test_gumbel_draws_softmax_whatever_tau(tau):
    alpha = torch.tensor([0.0, 1.0, -1.0, 2.0])
    w = gumbel(alpha.expand(100_000, 4), tau, generator())
    one = torch.tensor([0.0, 0.0, 0.0, 1.0]).expand_as(w)
    assert torch.equal(w.sort(-1).values, one), "not exactly one-hot"
    torch.testing.assert_close(w.mean(0), alpha.softmax(-1), atol=6e-3, rtol=0)


def test_gumbel_gradient_at_the_limits_of_tau():
    """Large tau: the gradient of a nearly uniform softmax, small; small tau: 0 almost surely."""
    for tau, lower, upper in ((10.0, 1e-3, 0.2), (1e-4, 0.0, 1e-6)):
        alpha = torch.zeros(4, requires_grad=True)
        gumbel(alpha, tau, generator())[0].backward()
        assert lower <= alpha.grad.abs().max() <= upper


def test_gdas_temperature_falls_linearly():
    search = METHODS["gdas"]({"op": Choice((0, 1))}, generator(), tau_max=10.0, tau_min=0.1)
    for progress, tau in ((0.0, 10.0), (0.5, 5.05), (1.0, 0.1)):
        a = search.sample(progress, generator(5))["op"]
        b = gumbel(search.alphas["op"], tau, generator(5))
        ga, gb = (torch.autograd.grad(w[0], search.alphas["op"])[0] for w in (a, b))
        assert torch.allclose(ga, gb)


def test_sparsemax_is_the_projection_onto_the_simplex():
    z = torch.randn(500, 5, generator=generator(), dtype=torch.float64).requires_grad_()
    w = sparsemax(z)
    assert torch.allclose(w.sum(-1), torch.ones(500).double()) and (w >= 0).all() and (w == 0).any()
    other = torch.rand(500, 5, generator=generator(1), dtype=torch.float64).softmax(-1)
    def distance(point):
        return (z - point).square().sum(-1)
    assert (distance(w) <= distance(other)).all() # nothing on the simplex is nearer
    for _ in range(50): # projected gradient descent arrives there too
        other = sparsemax(other - 0.5 * (other - z))
    assert torch.allclose(other, w, atol=1e-6)
    assert torch.autograd.gradcheck(sparsemax, z[:5].detach().requires_grad_())


def test_spos_is_uniform_in_every_row():
    g = generator()
    draws = [uniform(CHOICES, g) for _ in range(6000)]
    for name, choice in CHOICES.items():
        for i in range(choice.repeat or 1):
            rows = [d[name][i] if choice.repeat else d[name] for d in draws
                    if not choice.repeat or i < d["n_layer"]]
            for option in choice.options:
                p = 1 / len(choice.options)
                deviation = math.sqrt(p * (1 - p) / len(rows))
                assert abs(rows.count(option) / len(rows) - p) < 4.5 * deviation


@pytest.mark.parametrize("name", ["darts", "drnas", "gdas", "spos"])
def test_samples_are_decided_by_the_generator(name):
    search = METHODS[name](CHOICES, generator())
    a, b, c = (search.sample(0.3, generator(seed)) for seed in (1, 1, 2))

    def equal(v, w):
        return torch.equal(v, w) if isinstance(v, torch.Tensor) else v == w
    same, other = ([equal(a[k], d[k]) for k in CHOICES] for d in (b, c))
    assert all(same) and (name == "darts" or not all(other))
    for key, w in a.items():
        if isinstance(w, torch.Tensor):
            assert w.shape == CHOICES[key].shape
            assert torch.allclose(w.sum(-1), torch.ones(w.shape[:-1]))


@pytest.mark.parametrize("name", METHODS)
def test_what_a_step_trains_and_what_an_evaluation_runs(name):
    """A mixture for darts and drnas; for gdas the argmax of a sample, for spos an architecture."""
    method = METHODS[name](CHOICES, generator())
    sampled = method.sample(0.3, generator(1))
    trained = method.sample_weights_arch(0.3, generator(1))
    evaluated = method.eval_arch(generator(1))
    if name in ("darts", "drnas"):
        assert all(torch.equal(trained[key], sampled[key]) for key in CHOICES)
        assert all(torch.equal(evaluated[key], method.mean()[key]) for key in CHOICES)
    else:
        arch = argmax_arch(CHOICES, sampled) if name == "gdas" else sampled
        assert trained == arch and check_arch(CHOICES, evaluated) == evaluated
    assert method.is_hard == (name in ("gdas", "spos"))
    assert bool(method.alphas) == method.has_alphas == (name != "spos")


def test_gdas_runs_what_it_sampled_and_the_others_a_mixture():
    for name in ("darts", "drnas", "gdas"):
        method = METHODS[name](CHOICES, generator())
        leaves = method.sample(0.3, generator(1))
        expected = straight_through_arch(CHOICES, leaves) if name == "gdas" else leaves
        assert str(method.run_with(leaves)) == str(expected)


@pytest.mark.parametrize("name, rest", SETTINGS)
def test_each_finds_the_best_option_of_a_linear_loss(name, rest):
    """loss = sum of weight times badness: in the end alphas prefer the least bad option."""
    search = METHODS[name](CHOICES, generator(), learning_rate=0.05, **rest)
    bad = {key: torch.rand(c.shape, generator=generator(3)) for key, c in CHOICES.items()}
    before = sum(h.sum() for h in entropy(search.mean()).values())
    for step in range(300):
        weights = search.sample(step / 300, generator(100 + step))
        search.step(weights, bad)
    assert search.arch() == discretize(CHOICES, {key: -b for key, b in bad.items()})
    assert sum(h.sum() for h in entropy(search.mean()).values()) < before


def test_settings_of_the_arch_optimizer():
    """alphas 1e-3 N(0, 1); Adam 3e-4, betas (0.5, 0.999), weight decay 1e-3, but 0 with kl."""
    choices = {"op": Choice(tuple(range(50)), repeat=40)}
    for name, rest, decay in (("darts", {}, 1e-3), ("drnas", {}, 1e-3),
                              ("drnas", {"regularizer": "kl"}, 0.0), ("gdas", {}, 1e-3)):
        search = METHODS[name](choices, generator(), **rest)
        group, alpha = search.optimizer.param_groups[0], search.alphas["op"]
        assert (group["lr"], group["betas"], group["weight_decay"]) == (3e-4, (0.5, 0.999), decay)
        assert 0.9e-3 < alpha.std() < 1.1e-3 and abs(alpha.mean()) < 1e-4


def test_kl_regularizer_pulls_towards_the_flat_dirichlet():
    """With a constant loss kl brings alpha back to 0, and l2 with a weight decay of 0 does not."""
    for rest, moved in (({"regularizer": "kl"}, True), ({"weight_decay": 0.0}, False)):
        choices = {"op": Choice((0, 1, 2))}
        search = METHODS["drnas"](choices, generator(), learning_rate=0.02, **rest)
        search.alphas["op"].data.fill_(2.0)
        for step in range(300):
            search.step(search.sample(0, generator(step)), {"op": torch.full((3,), 1e-12)})
        assert (search.alphas["op"].abs().max() < 0.5) == moved


def test_the_mean_is_what_is_sampled_on_average():
    for name, rest in (("drnas", {}), ("gdas", {}), ("darts", {"normalize": "sparsemax"})):
        search = METHODS[name]({"op": Choice((0, 1, 2))}, generator(), **rest)
        search.alphas["op"].data.copy_(torch.tensor([0.4, -0.3, 0.1]))
        g = generator()
        mean = torch.stack([search.sample(0.5, g)["op"].detach() for _ in range(4000)]).mean(0)
        torch.testing.assert_close(mean, search.mean()["op"].detach(), atol=0.025, rtol=0)
    assert torch.equal(search.mean()["op"], sparsemax(search.alphas["op"]))


def test_mutation_changes_what_its_probabilities_say_and_crossover_what_the_parents_have():
    choices = {"n_layer": Choice((20,)), "n_embd": Choice((8, 16)),
               "op": Choice(tuple(range(10)), repeat=20, depth="n_layer")}
    a, b = ({"n_layer": 20, "n_embd": e, "op": [o] * 20} for e, o in ((8, 3), (16, 7)))
    g = generator()
    assert mutate(choices, a, g, 0.0, 0.0) == a
    children = [mutate(choices, a, g, 0.3, 0.5) for _ in range(400)]
    changed = sum(v != 3 for c in children for v in c["op"]) / 8000
    assert changed == pytest.approx(0.3 * 0.9, abs=0.025)
    assert sum(c["n_embd"] != 8 for c in children) / 400 == pytest.approx(0.25, abs=0.08)
    children = [crossover(choices, a, b, g) for _ in range(200)]
    assert {v for c in children for v in c["op"]} == {3, 7}
    assert {c["n_embd"] for c in children} == {8, 16}
    assert sum(v == 3 for c in children for v in c["op"]) / 4000 == pytest.approx(0.5, abs=0.05)


def test_evolution_mutates_and_crosses(monkeypatch):
    used = []
    for name in ("mutate", "crossover"):
        real = getattr(optim_nas, name)

        def spy(*args, name=name, real=real):
            used.append(name)
            return real(*args)
        monkeypatch.setattr(optim_nas, name, spy)
    evolutionary_search(CHOICES, loss_of, 40, generator(), population=10, parents=4)
    assert 10 < used.count("mutate") and 10 < used.count("crossover")


def test_a_choice_without_gradient_stops_the_search():
    search = METHODS["darts"](CHOICES, generator())
    weights = search.sample(0, None)
    grads = {key: torch.rand(c.shape) for key, c in CHOICES.items()} | {"n_embd": None}
    with pytest.raises(RuntimeError, match="n_embd got no gradient"):
        search.step(weights, grads)
    with pytest.raises(RuntimeError, match="not finite"):
        search.step(search.sample(0, None), grads | {"n_embd": torch.tensor([math.nan, 0.0])})
    with pytest.raises(RuntimeError, match="n_embd got no gradient"):
        search.step(search.sample(0, None), grads | {"n_embd": torch.zeros(2)})


def test_gdas_may_draw_what_has_no_gradient_for_a_while():
    """'none' on every edge: legitimate, but not 20 times in a row."""
    search, grad = METHODS["gdas"]({"op": Choice((0, 1))}, generator()), torch.tensor([1.0, 0.0])

    def steps(n, grad):
        for i in range(n):
            search.step(search.sample(0.5, generator(i)), {"op": grad})
    for _ in range(2):
        steps(19, 0 * grad)
        steps(1, grad)
    steps(19, 0 * grad)
    with pytest.raises(RuntimeError, match="op got no gradient"):
        steps(1, 0 * grad)
    with pytest.raises(RuntimeError, match="op got no gradient"):
        another = METHODS["gdas"]({"op": Choice((0, 1))}, generator())
        another.step(search.sample(0.5, generator()), {})


def test_one_option_has_no_alpha():
    search = METHODS["drnas"](CHOICES | {"n_embd": Choice((8,))}, generator())
    assert set(search.alphas) == {"n_layer", "n_head"}
    assert search.sample(0, generator())["n_embd"].tolist() == [1.0]
    assert search.arch()["n_embd"] == 8


@pytest.mark.parametrize("name, rest", [("dart", {}), ("darts", {"normalize": "relu"}),
                                        ("drnas", {"regularizer": "l1"})])
def test_unknown_names_are_one_sentence(name, rest):
    with pytest.raises(SystemExit, match="is not one of"):
        method_class(name)(CHOICES, generator(), **rest)


def test_unrolled_gradient_in_closed_form():
    """L_train = |w - A a|^2 / 2 and L_val = |w - b|^2 / 2 with weights w, alphas a.

    w' = w - r (w - A a), so that dL_val(w')/da = r A^T (w' - b). Both losses are quadratic, and so
    the central difference is exact."""
    g = generator()

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)
    A, b, w = normal(6, 3), normal(6), normal(6).requires_grad_()
    a, r = normal(3).requires_grad_(), 0.3
    start = w.detach().clone()

    def grad_of(loss):
        return lambda tensors: list(torch.autograd.grad(loss(), tensors, materialize_grads=True))
    train_grad = grad_of(lambda: (w - A @ a).square().sum() / 2)
    val_grad = grad_of(lambda: (w - b).square().sum() / 2)
    found, = unrolled_gradient([w], [a], train_grad, val_grad, r)
    unrolled = start - r * (start - A @ a.detach())
    torch.testing.assert_close(found, r * A.T @ (unrolled - b), rtol=1e-9, atol=1e-12)
    assert torch.equal(w, start), "the weights were not put back"


@pytest.mark.parametrize("sick", ["train", "val"])
def test_an_unrolled_gradient_that_is_not_finite_leaves_the_weights(sick):
    """The search may pass over such a step, and goes on with the weights that it had."""
    w, a = torch.tensor([0.7, -0.3]), torch.tensor([0.4])

    def grad_of(split):
        value = math.inf if split == sick else 1.0
        return lambda tensors: [torch.full_like(t, value) for t in tensors]
    found, = unrolled_gradient([w], [a], grad_of("train"), grad_of("val"), 0.3)
    assert torch.equal(w, torch.tensor([0.7, -0.3])) and not found.isfinite().all()


def test_unrolled_gradient_where_the_validation_loss_sees_the_alphas():
    """A nonlinear problem, against the finite difference of the unrolled validation loss itself."""
    w, a = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.7, 0.4))

    def train():
        return (w * a.sin() - 1) ** 2 + w ** 4

    def val():
        return (w ** 2 * a - 0.5) ** 2 + a ** 3

    def unrolled_loss(value):
        with torch.no_grad():
            old = a.item()
            a.fill_(value)
        d, = torch.autograd.grad(train(), w)
        with torch.no_grad():
            kept = w.item()
            w.sub_(0.4 * d)
        loss = val().item()
        with torch.no_grad():
            w.fill_(kept)
            a.fill_(old)
        return loss
    expected = (unrolled_loss(0.4 + 1e-5) - unrolled_loss(0.4 - 1e-5)) / 2e-5

    def grad_of(loss):
        return lambda tensors: list(torch.autograd.grad(loss(), tensors, materialize_grads=True))
    found, = unrolled_gradient([w], [a], grad_of(train), grad_of(val), 0.4)
    assert found.item() == pytest.approx(expected, rel=1e-3)
    first_order = torch.autograd.grad(val(), a)[0].item()
    assert abs(found.item() - first_order) > 0.05 # so that a missing second term would be noticed


@pytest.mark.parametrize("n_layer, n_embd, n_head, size", [
    ((5, 6, 7), (384, 576, 768), (6, 8, 12), 16_120_377),
    ((4, 5, 6), (96, 192, 384), (2, 4, 6), 1_791_153),
    ((10, 11, 12), (192, 384, 768), (6, 8, 12), 951_892_141_473)])
def test_published_sizes_of_the_spaces(n_layer, n_embd, n_head, size):
    L = max(n_layer)
    choices = {"n_layer": Choice(n_layer), "n_embd": Choice(n_embd),
               "n_head": Choice(n_head, L, "n_layer"), "mlp_ratio": Choice((2, 3, 4), L, "n_layer")}
    assert space_size(choices) == size


def test_architectures_lists_the_whole_space_once():
    found = [arch_key(arch) for arch in architectures(CHOICES)]
    assert len(found) == len(set(found)) == space_size(CHOICES) == 2 * (3 + 9 + 27)


SEARCHES = {"random": lambda evaluate, n: random_search(CHOICES, evaluate, n, generator()),
            "evolution": lambda evaluate, n: evolutionary_search(
                CHOICES, evaluate, n, generator(), population=10, parents=4)}


def loss_of(arch):
    heads = sum(abs(h - 2) for h in arch["n_head"])
    return abs(arch["n_layer"] - 2) + (arch["n_embd"] - 8) / 8 + heads


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("n", [1, 25, 78, 1000])
def test_no_architecture_twice_and_a_clean_end(name, n):
    calls = []
    history = SEARCHES[name](lambda arch: calls.append(arch_key(arch)) or loss_of(arch), n)
    assert len(calls) == len(set(calls)) == len(history) == min(n, 78)
    if n >= 78:
        assert best_of(history) == (0, {"n_layer": 2, "n_embd": 8, "n_head": [2, 2]})


@pytest.mark.parametrize("name", SEARCHES)
def test_the_generator_decides_a_search(name):
    """So that an interrupted one can be replayed."""
    history = SEARCHES[name](loss_of, 40)
    assert SEARCHES[name](loss_of, 40) == history and SEARCHES[name](loss_of, 17) == history[:17]


def test_evolution_beats_random_search_on_a_smooth_loss():
    choices = {"n_layer": Choice((8,)), "op": Choice(tuple(range(6)), repeat=8, depth="n_layer")}

    def smooth(arch):
        return sum((v - 2) ** 2 for v in arch["op"])
    wins = 0
    for seed in range(5):
        evolved = evolutionary_search(choices, smooth, 300, generator(seed), population=30)
        drawn = random_search(choices, smooth, 300, generator(seed))
        wins += best_of(evolved)[0] < best_of(drawn)[0]
    assert wins >= 4


def test_one_hot_puts_everything_on_the_architecture():
    arch = {"n_layer": 2, "n_embd": 16, "n_head": [4, 1]}
    weights = one_hot(CHOICES, arch)
    assert discretize(CHOICES, weights) == arch
    assert all(h.abs().max() == 0 for h in entropy(weights).values())


KEPT = {"normal": Choice(("none", "skip", "conv"), repeat=5, inputs=(2, 3), keep=2),
        "n_embd": Choice((8, 16))}


def allowed(arch):
    """Exactly two of the first two and of the last three rows are not 'none'."""
    rows = arch["normal"]
    kept = [sum(op != "none" for op in node) for node in (rows[:2], rows[2:])]
    return len(rows) == 5 and kept == [2, 2]


def test_every_way_to_draw_keeps_the_rows_of_a_node_that_stay():
    g = generator()
    draws = [uniform(KEPT, g) for _ in range(4000)]
    mutants = [mutate(KEPT, draws[0], g, 0.4, 0.5) for _ in range(400)]
    children = [crossover(KEPT, a, b, g) for a, b in zip(draws[:200], draws[200:400], strict=True)]
    assert all(map(allowed, draws + mutants + children))
    every = [{"normal": list(rows), "n_embd": e}
             for rows in itertools.product(("none", "skip", "conv"), repeat=5) for e in (8, 16)]
    every = [arch_key(arch) for arch in every if allowed(arch)]
    assert sorted(every) == sorted(arch_key(arch) for arch in architectures(KEPT))
    assert space_size(KEPT) == len(every) == 1 * 4 * 3 * 4 * 2
    counts = [sum(arch_key(d) == key for d in draws) for key in every]
    # uniform over them all: chi-squared of 95 degrees of freedom
    assert sum((c - 4000 / 96) ** 2 / (4000 / 96) for c in counts) < 160


def test_a_node_is_inherited_whole():
    g = generator()
    a = {"normal": ["skip"] * 4 + ["none"], "n_embd": 8}
    b = {"normal": ["conv"] * 2 + ["none", "conv", "conv"], "n_embd": 8}
    children = [crossover(KEPT, a, b, g) for _ in range(50)]
    for node in (slice(0, 2), slice(2, 5)):
        inherited = {tuple(child["normal"][node]) for child in children}
        assert inherited == {tuple(parent["normal"][node]) for parent in (a, b)}
    assert mutate(KEPT, a, g, 0.0, 0.0) == a
    mutants = [mutate(KEPT, a, g, 0.3, 0.0) for _ in range(1000)]
    untouched = sum(mutant["normal"][2:] == a["normal"][2:] for mutant in mutants) / 1000
    assert untouched == pytest.approx(0.7 + 0.3 / 12, abs=0.045) # all rows at once, or none


def test_likeliest_keeps_the_best_rows_of_a_node_and_never_none():
    """As in DARTS: an edge's rank is that of its best operation other than 'none'."""
    weights = {"n_embd": torch.tensor([0.4, 0.6]), "normal": torch.tensor(
        [[0.9, 0.04, 0.06], [0.0, 0.3, 0.7], [0.1, 0.45, 0.45], [0.5, 0.0, 0.5], [0.3, 0.6, 0.1]])}
    kept, rowwise = discretize(KEPT, weights), argmax_arch(KEPT, weights)
    assert kept == {"n_embd": 16, "normal": ["conv", "conv", "none", "conv", "skip"]}
    assert rowwise == {"n_embd": 16, "normal": ["none", "conv", "skip", "none", "skip"]}
    for seed in range(20): # the largest product of weights of all that the space has
        weights = {name: torch.rand(c.shape, generator=generator(seed)).softmax(-1)
                   for name, c in KEPT.items()}

        def product(arch, weights=weights):
            cell = math.prod(weights["normal"][i, KEPT["normal"].options.index(op)].item()
                             for i, op in enumerate(arch["normal"]) if op != "none")
            return cell * weights["n_embd"][(8, 16).index(arch["n_embd"])].item()
        best = max(map(product, architectures(KEPT)))
        assert product(discretize(KEPT, weights)) == pytest.approx(best)


def test_size_of_the_darts_space():
    cell = Choice(tuple(["none", *range(7)]), repeat=14, inputs=(2, 3, 4, 5), keep=2)
    assert space_size({"normal": cell}) == 1_037_664_180
    assert space_size({"normal": cell, "reduce": cell}) == 1_037_664_180 ** 2


def test_evolution_finds_the_best_of_a_constrained_space():
    def loss(arch):
        cell = sum(op != "conv" for op in arch["normal"]) + 3 * (arch["normal"][3] != "none")
        return cell + arch["n_embd"]
    best = {"n_embd": 8, "normal": ["conv", "conv", "conv", "none", "conv"]}
    for search in (random_search(KEPT, loss, 500, generator()),
                   evolutionary_search(KEPT, loss, 500, generator(), 10, 4)):
        assert len(search) == 96 and best_of(search) == (9, best)


OPEN = {"op": Choice(tuple("abcd"), repeat=3), "width": Choice((1, 2, 3, 4))}


@pytest.mark.parametrize("name, rest", SETTINGS)
def test_pruned_options_are_gone_for_good(name, rest):
    """Their weight and alpha are exactly 0 and the others' weights sum to 1, through steps,
    momentum, a checkpoint and a later pruning."""
    search = METHODS[name](OPEN, generator(), learning_rate=0.1, **rest)
    grads = {key: torch.randn(c.shape, generator=generator(1)) for key, c in OPEN.items()}
    for i in range(5):
        search.step(search.sample(0.5, generator(i)), grads)
    before = {key: w.detach() for key, w in search.mean().items()}
    search.prune(3)
    search.prune(2)
    restored = METHODS[name](OPEN, generator(9), learning_rate=0.1, **rest)
    restored.load_state_dict(search.state_dict())
    for arch_optimizer in (search, restored):
        for key, w in before.items():
            gone = w < w.topk(2).values[..., -1:]
            assert torch.equal(arch_optimizer.mask[key], gone) and gone.sum(-1).eq(2).all()
            for i in range(5):
                arch_optimizer.step(arch_optimizer.sample(0.5, generator(i)), grads)
                for weights in (arch_optimizer.sample(0.5, generator(i)), arch_optimizer.mean()):
                    assert not weights[key][gone].any()
                    assert torch.allclose(weights[key].sum(-1), torch.ones(w.shape[:-1]))
                alpha = arch_optimizer.alphas[key]
                assert not alpha[gone].any() and alpha[~gone].all()
            assert not one_hot(OPEN, arch_optimizer.arch())[key][gone].any()


def test_a_mask_leaves_the_ratios_of_the_others():
    """Of softmax and of the Dirichlet's mean; a Dirichlet sample that is renormalized has the
    Dirichlet distribution of the options that are left."""
    for name in ("darts", "drnas"):
        search = METHODS[name]({"op": Choice(tuple("abcd"))}, generator())
        search.alphas["op"].data.copy_(torch.tensor([0.5, 2.0, -0.3, 1.0]))
        before = search.mean()["op"].detach()
        search.prune(2)
        expected = torch.tensor([0.0, before[1], 0.0, before[3]]) / (before[1] + before[3])
        torch.testing.assert_close(search.mean()["op"].detach(), expected)
    g = generator()
    draws = torch.stack([search.sample(0, g)["op"].detach() for _ in range(3000)])
    a, b = 3.0, 2.0 # a beta distribution
    assert draws[:, 1].mean().item() == pytest.approx(a / (a + b), abs=0.012)
    variance = a * b / ((a + b) ** 2 * (a + b + 1))
    assert draws[:, 1].var().item() == pytest.approx(variance, abs=0.003)


def test_pruning_down_to_one_option_is_one_sentence():
    with pytest.raises(SystemExit, match="1 options a row leave nothing to search"):
        METHODS["darts"](OPEN, generator()).prune(1)
