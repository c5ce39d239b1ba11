"""
How an architecture is chosen: DARTS, DrNAS, GDAS and SPOS, then random and evolutionary search.

This file knows tensors and Choices, and no network. In each step a method samples arch_weights
(choice -> rows that sum to 1) or an architecture. The caller computes a loss with them and returns
the gradient to the arch_weights, through which it reaches the alphas.
A new method is a new class with an entry in METHODS.
"""
import itertools
import json
import math
from dataclasses import replace

import torch
from torch.distributions import Dirichlet, kl_divergence
from torch.nn import functional as F

from supernet import check_arch, straight_through_arch

# -----------------------------------------------------------------------------
# from alphas (..., K) to weights (..., K)

def sparsemax(alpha):
    """The Euclidean projection of alpha onto the simplex (Martins & Astudillo 2016)."""
    z = alpha.sort(-1, descending=True).values
    k = torch.arange(1, z.size(-1) + 1, dtype=z.dtype)
    support = 1 + k * z > z.cumsum(-1)
    threshold = ((z * support).sum(-1, keepdim=True) - 1) / support.sum(-1, keepdim=True)
    return (alpha - threshold).clamp_min(0)


def dirichlet(alpha, generator):
    """A sample of Dirichlet(elu(alpha) + 1), differentiable: Gamma samples over their sum."""
    concentration = (F.elu(alpha) + 1).double() # in float32, small concentrations would sample 0
    gamma = torch._standard_gamma(concentration, generator=generator)
    gamma = gamma.clamp_min(torch.finfo(torch.float64).tiny)
    return (gamma / gamma.sum(-1, keepdim=True)).to(alpha.dtype)


def gumbel(alpha, tau, generator):
    """A one-hot sample of softmax(alpha), with the gradient of the Gumbel-softmax at tau."""
    noise = -torch.empty_like(alpha).exponential_(generator=generator).log()
    soft = ((alpha.log_softmax(-1) + noise) / tau).softmax(-1)
    hard = F.one_hot(soft.argmax(-1), alpha.size(-1)).to(alpha.dtype)
    return hard + (soft - soft.detach()) # exactly one-hot in the forward pass


def kl_to_uniform(concentration):
    """KL(Dirichlet(concentration) || Dirichlet(1)), summed over rows, in float64."""
    c = concentration.double()
    flat = Dirichlet(torch.ones_like(c), validate_args=False)
    return kl_divergence(Dirichlet(c, validate_args=False), flat).sum()


def entropy(arch_weights):
    """{choice: (...,)}: the entropy of every row over its maximum: 1 is undecided, 0 decided."""
    return {name: -torch.special.xlogy(w, w).sum(-1) / math.log(w.size(-1))
            for name, w in arch_weights.items() if w.size(-1) > 1}

# -----------------------------------------------------------------------------
# from weights to an architecture

def argmax_arch(choices, arch_weights):
    """The architecture of the largest weight in every row."""
    arch = {}
    for name, choice in choices.items():
        best = arch_weights[name].argmax(-1).tolist() # a list if the choice repeats
        options = choice.options
        arch[name] = [options[k] for k in best] if choice.repeat else options[best]
    return check_arch(choices, arch)


def discretize(choices, arch_weights):
    """argmax_arch(), where each node of a cell keeps its top-k edges; the others become 'none'."""
    kept = {name: top_edges(c, arch_weights[name]) for name, c in choices.items() if c.keep}
    return argmax_arch(choices, arch_weights) | kept


def top_edges(choice, weights):
    """The best operation of each of a node's top-k edges, and 'none' for the others.

    weights: (edges, K). An edge ranks by its best operation other than 'none' (DARTS, sec. 2.4).
    """
    operations = [k for k, option in enumerate(choice.options) if option != "none"]
    best, index = weights[:, operations].max(-1) # (edges,)
    edges = ["none"] * len(best)
    for node in choice.units(len(best)):
        for i in best[list(node)].topk(choice.keep).indices.tolist():
            edges[node[i]] = choice.options[operations[index[node[i]]]]
    return edges

# -----------------------------------------------------------------------------
# the methods

class ArchOptimizer:
    """What all methods share: the alphas of a search space and the Adam that trains them.

    choices: name -> Choice. A choice of two or more options has alphas, on the CPU, which start at
    1e-3 N(0, 1). budget: a Budget. Its penalty is added to the alphas' loss, and arch() meets it.

    A method defines, for the weights of one choice, (K,) or (repeat, K), differentiable in alphas:
    sample_choice(name, progress, generator), what one step uses, and mean_choice(name), their mean.
    """
    keys = () # the keys of train_search.py that only this method has
    has_alphas = True
    has_second_order = False # whether order=2, the unrolled step, is possible
    is_hard = False # whether the weights are trained as one sampled architecture
    max_idle_steps = 1 # after so many steps in a row without a gradient a choice raises an error

    def __init__(self, choices, generator, *, learning_rate=3e-4, weight_decay=1e-3,
                 betas=(0.5, 0.999), budget=None):
        self.choices, self.budget = choices, budget
        self.alphas = {name: torch.nn.Parameter(1e-3 * torch.randn(c.shape, generator=generator))
                       for name, c in choices.items() if self.has_alphas and len(c.options) > 1}
        settings = {"lr": learning_rate, "betas": betas, "weight_decay": weight_decay}
        self.optimizer = torch.optim.Adam(self.alphas.values(), **settings) if self.alphas else None
        self.open = choices # what SPOS draws from: fewer options during progressive shrinking
        self.idle_steps = {} # choice -> steps in a row without a gradient
        self.mask = {} # choice -> (..., K), True for pruned options: alpha and weight stay 0

    def mean(self):
        """The arch_weights that the alphas stand for: the mean of sample()."""
        return self.with_single_options({name: self.mean_choice(name) for name in self.alphas})

    def sample(self, progress, generator):
        """The arch_weights of one step. progress: 0 at the start of the search, 1 at its end."""
        return self.with_single_options({name: self.sample_choice(name, progress, generator)
                                         for name in self.alphas})

    def sample_weights_arch(self, progress, generator):
        """What one step trains the network's weights as: arch_weights, or an architecture."""
        return self.sample(progress, generator)

    def eval_arch(self, generator):
        """What an evaluation of the supernet itself runs: arch_weights, or an architecture."""
        return self.sample_weights_arch(1.0, generator) if self.is_hard else self.mean()

    def run_with(self, arch_weights):
        """What the network's forward takes so that these arch_weights get their gradient."""
        return arch_weights

    def arch(self):
        """The likeliest option of every choice, or the likeliest architecture in the budget."""
        if self.budget:
            return self.budget.project(self.mean())
        return discretize(self.choices, self.mean())

    def with_single_options(self, arch_weights):
        """Adds uniform weights for the choices without alphas, which is 1 for a single option."""
        return {name: arch_weights.get(name, torch.full(c.shape, 1 / len(c.options)))
                for name, c in self.choices.items()}

    def step(self, arch_weights, grads):
        """One Adam step. arch_weights: what sample() returned. grads: the loss's gradient to them.

        RuntimeError if a gradient is not finite, or if a choice gets none and so cannot learn.
        """
        penalty_grads = self.budget.gradient(arch_weights) if self.budget else {}
        for name, alpha in self.alphas.items():
            grad = grads.get(name)
            is_idle = grad is None or not grad.any()
            self.idle_steps[name] = self.idle_steps.get(name, 0) + 1 if is_idle else 0
            if grad is None or self.idle_steps[name] >= self.max_idle_steps:
                raise RuntimeError(f"the weights of {name} got no gradient: "
                                   "nothing in the network depends on them")
            if not grad.isfinite().all():
                raise RuntimeError(f"the gradient of the weights of {name} is not finite: {grad}")
            arch_weights[name].backward((grad + penalty_grads.get(name, 0.0)).to(alpha))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for name, mask in self.mask.items():
            self.alphas[name].data.masked_fill_(mask, 0.0) # Adam's momentum moved them

    def prune(self, keep):
        """Keeps the `keep` options of the largest mean weight in every row (progressive DrNAS)."""
        if keep < 2:
            raise SystemExit(f"{keep} options a row leave nothing to search: keep at least 2.")
        mean = self.mean()
        for name, alpha in self.alphas.items():
            best = mean[name].topk(min(keep, alpha.size(-1))).indices
            pruned = torch.ones_like(alpha, dtype=torch.bool)
            self.mask[name] = pruned.scatter(-1, best, False)
            alpha.data.masked_fill_(self.mask[name], 0.0)

    def pruned_alphas(self, name):
        """The alphas of a choice, with such low ones for pruned options that their weight is 0."""
        alpha = self.alphas[name]
        return alpha.masked_fill(self.mask[name], -1e9) if self.mask else alpha

    def renormalize(self, name, weights):
        """The weights of a choice with 0 for pruned options, scaled to sum to 1 again."""
        if not self.mask:
            return weights
        return F.normalize(weights.masked_fill(self.mask[name], 0.0), p=1, dim=-1)

    def state_dict(self):
        return {"alphas": {name: alpha.detach().clone() for name, alpha in self.alphas.items()},
                "mask": dict(self.mask),
                "optimizer": self.optimizer.state_dict() if self.alphas else {}}

    def load_state_dict(self, state):
        self.mask = dict(state["mask"])
        for name, alpha in self.alphas.items():
            alpha.data.copy_(state["alphas"][name])
        if self.alphas: # the moments of the checkpoint, the learning rate and so on of this command
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict(state["optimizer"] | {"param_groups": groups})


class DARTS(ArchOptimizer):
    """softmax(alpha), without sampling (Liu et al. 2019, eq. 2). normalize: or "sparsemax"."""
    keys = ("normalize",)
    has_second_order = True

    def __init__(self, *args, normalize="softmax", **kwargs):
        super().__init__(*args, **kwargs)
        check_value("normalize", normalize, ("softmax", "sparsemax"))
        self.normalize = sparsemax if normalize == "sparsemax" else torch.nn.Softmax(-1)

    def mean_choice(self, name):
        return self.normalize(self.pruned_alphas(name))

    def sample_choice(self, name, progress, generator):
        return self.mean_choice(name)


class DrNAS(ArchOptimizer):
    """Samples of Dirichlet(elu(alpha) + 1), reparameterised (Chen et al. 2021, eq. 4).

    regularizer: "l2" is Adam's weight decay. "kl" is KL(Dirichlet(elu(alpha) + 1) || Dirichlet(1))
    in the loss, times weight_decay.
    """
    keys = ("regularizer",)

    def __init__(self, *args, weight_decay=1e-3, regularizer="l2", **kwargs):
        check_value("regularizer", regularizer, ("l2", "kl"))
        self.kl_scale = weight_decay if regularizer == "kl" else 0.0
        super().__init__(*args, weight_decay=weight_decay - self.kl_scale, **kwargs)

    def mean_choice(self, name):
        concentration = F.elu(self.alphas[name]) + 1
        return self.renormalize(name, F.normalize(concentration, p=1, dim=-1))

    def sample_choice(self, name, progress, generator):
        return self.renormalize(name, dirichlet(self.alphas[name], generator))

    def step(self, arch_weights, grads):
        for name, alpha in self.alphas.items() if self.kl_scale else ():
            rows = alpha[~self.mask[name]].view(*alpha.shape[:-1], -1) if self.mask else alpha
            (self.kl_scale * kl_to_uniform(F.elu(rows) + 1)).backward()
        super().step(arch_weights, grads)


class GDAS(ArchOptimizer):
    """One-hot samples of softmax(alpha), straight-through (Dong & Yang 2019, eq. 3).

    The temperature of the gradient falls linearly from tau_max to tau_min.
    """
    keys = ("tau_max", "tau_min")
    is_hard = True
    max_idle_steps = 20 # a sample of 'none' for every edge has no gradient, but not 20 in a row

    def __init__(self, *args, tau_max=10.0, tau_min=0.1, **kwargs):
        super().__init__(*args, **kwargs)
        self.tau_max, self.tau_min = tau_max, tau_min

    def mean_choice(self, name):
        return self.pruned_alphas(name).softmax(-1)

    def sample_choice(self, name, progress, generator):
        tau = self.tau_max + (self.tau_min - self.tau_max) * progress
        return gumbel(self.pruned_alphas(name), tau, generator)

    def sample_weights_arch(self, progress, generator):
        return argmax_arch(self.choices, self.sample(progress, generator))

    def run_with(self, arch_weights):
        return straight_through_arch(self.choices, arch_weights)


class SPOS(ArchOptimizer):
    """One uniform random architecture a step (Guo et al. 2020).

    It has no alphas: a search over the inherited weights finds the architecture.
    """
    has_alphas = False
    is_hard = True

    def sample(self, progress, generator):
        return uniform(self.open, generator)


METHODS = {"darts": DARTS, "drnas": DrNAS, "gdas": GDAS, "spos": SPOS}


def method_class(name):
    """The class of a method; SystemExit if there is none of that name."""
    check_value("optimizer", name, METHODS)
    return METHODS[name]


def check_value(key, value, allowed):
    if value not in allowed:
        raise SystemExit(f"{key}='{value}' is not one of {', '.join(allowed)}.")


def unrolled_gradient(params, alphas, train_grad, val_grad, learning_rate, radius=0.01):
    """The gradient of L_val(w - learning_rate * dL_train/dw, alpha) to the alphas (DARTS eq. 7).

    train_grad(tensors), val_grad(tensors): the gradients of the two losses at the current params to
    those tensors. The second derivative is a central difference along dL_val/dw', of
    eps = radius / its norm (eq. 8). Returns a list like alphas, and leaves params as they were.
    """
    start = [p.detach().clone() for p in params]

    @torch.no_grad()
    def move(direction, size):
        for p, p0, d in zip(params, start, direction, strict=True):
            p.copy_(p0 + size * d)

    move(train_grad(params), -learning_rate)
    grads = val_grad([*alphas, *params])
    d_alpha, d_w = grads[:len(alphas)], grads[len(alphas):]
    eps = radius / torch.stack([d.norm() for d in d_w]).norm().clamp_min(1e-12)
    move(d_w, eps)
    plus = train_grad(alphas)
    move(d_w, -eps)
    minus = train_grad(alphas)
    move(start, 0.0) # back, also where d_w is not finite
    return [d - learning_rate * (a - b) / (2 * eps.to(d.device))
            for d, a, b in zip(d_alpha, plus, minus, strict=True)]

# -----------------------------------------------------------------------------
# the architectures of a space

def arch_key(arch):
    """The same string for the same architecture."""
    return json.dumps(arch, sort_keys=True)


def random_rows(choice, n, generator):
    """n uniform options; of a cell, `keep` uniform edges of every node with uniform operations."""
    if not choice.keep:
        index = torch.randint(len(choice.options), (n,), generator=generator)
        return [choice.options[i] for i in index.tolist()]
    rows, operations = ["none"] * n, [o for o in choice.options if o != "none"]
    for node in choice.units(n):
        for i in torch.randperm(len(node), generator=generator)[:choice.keep].tolist():
            rows[node[i]] = random_element(operations, generator)
    return rows


def random_element(values, generator):
    return values[torch.randint(len(values), (), generator=generator).item()]


def uniform(choices, generator):
    """One architecture, every choice drawn uniformly and independently."""
    rows = {name: random_rows(c, c.repeat or 1, generator) for name, c in choices.items()}
    return check_arch(choices, {name: rows[name] if c.repeat else rows[name][0]
                                for name, c in choices.items()})


def is_of_words(choice):
    """Whether a choice is among words, or yes and no: none of these is the largest."""
    return isinstance(choice.options[0], str | bool)


def sandwich_archs(choices, generator):
    """A smallest and a largest architecture, for the sandwich rule (Yu & Huang 2019): the first and
    the last option of every size, and uniform draws of what is_of_words()."""
    for end in (slice(1), slice(-1, None)):
        sizes = {name: c if is_of_words(c) else replace(c, options=c.options[end])
                 for name, c in choices.items()}
        yield check_arch(choices, uniform(sizes, generator))


def space_size(choices):
    """The number of different architectures; entries of layers beyond the depth do not count."""
    size = 1
    depths = {c.depth for c in choices.values() if c.depth}
    for name, choice in choices.items():
        if choice.keep:
            operations = (len(choice.options) - 1) ** choice.keep
            size *= math.prod(math.comb(n, choice.keep) * operations for n in choice.inputs)
        elif name in depths:
            per_layer = math.prod(len(c.options) for c in choices.values() if c.depth == name)
            size *= sum(per_layer ** d for d in choice.options)
        elif not choice.depth:
            size *= len(choice.options) ** (choice.repeat or 1)
    return size

# -----------------------------------------------------------------------------
# search over the inherited weights of a trained supernet
# A history is [(loss, arch)], in the order of evaluation.

def random_unseen_arch(choices, seen, generator, budget=None):
    """A random architecture whose arch_key is not in `seen`, or None if none is left.

    With a budget each one is repaired, and after 50 repeated ones in a row none counts as left.
    """
    if not budget and len(seen) >= space_size(choices):
        return None
    for _ in range(50) if budget else itertools.count():
        arch = uniform(choices, generator)
        arch = budget.repair(arch, generator) if budget else arch
        if arch_key(arch) not in seen:
            return arch
    return None


def random_search(choices, evaluate, n, generator, budget=None):
    """The history of n different random architectures, or of all. evaluate(arch) -> loss."""
    history, seen = [], set()
    while len(history) < n and (arch := random_unseen_arch(choices, seen, generator, budget)):
        seen.add(arch_key(arch))
        history.append((evaluate(arch), arch))
    return history


def mutate(choices, arch, generator, prob, depth_prob):
    """A copy that redraws each layer's entries, or node's edges, with probability prob, and each
    choice of the whole network with depth_prob."""
    def is_redrawn(p):
        return torch.rand((), generator=generator).item() < p

    def inherited(name, unit):
        return arch[name] if unit[-1] < len(arch[name]) and not is_redrawn(prob) else None
    new = uniform(choices, generator)
    child = {name: arch[name] if c.repeat or not is_redrawn(depth_prob) else new[name]
             for name, c in choices.items()}
    return inherit_rows(choices, child, inherited, generator)


def crossover(choices, a, b, generator):
    """A child that takes every choice, every layer's entries and every node's edges from a or b."""
    def inherited(name, unit):
        parents = [p for p in (a, b) if unit[-1] < len(p[name])]
        return random_element(parents, generator)[name] if parents else None
    child = {name: random_element((a, b), generator)[name] for name in choices}
    return inherit_rows(choices, child, inherited, generator)


def inherit_rows(choices, child, inherited, generator):
    """The child with rows for its own depth: those of inherited(name, unit), or random ones."""
    for name, c in choices.items():
        if c.repeat:
            rows = random_rows(c, child[c.depth] if c.depth else c.repeat, generator)
            for unit in c.units(len(rows)):
                parent = inherited(name, unit)
                if parent is not None:
                    rows[unit.start:unit.stop] = parent[unit.start:unit.stop]
            child[name] = rows
    return child


def evolutionary_search(choices, evaluate, n, generator, population=50, parents=10, prob=0.2,
                        depth_prob=0.4, budget=None, rank=None):
    """The history of n evaluations by evolution, or of all (Guo et al. 2020, algorithm 1).

    The first `population` architectures are random. After them, mutations and crossovers of the
    `parents` best alternate. No architecture is evaluated twice. evaluate(arch) -> loss. budget: a
    Budget that repairs every child. rank(history): best first; by loss where it is None.
    """
    rank = rank or (lambda history: sorted(history, key=lambda entry: entry[0]))

    def random_parent(best):
        return random_element(best, generator)[1]

    def child_of(best, i):
        for _ in range(50 if best else 0):
            if i % 2:
                child = mutate(choices, random_parent(best), generator, prob, depth_prob)
            else:
                child = crossover(choices, random_parent(best), random_parent(best), generator)
            child = budget.repair(child, generator) if budget else child
            if arch_key(child) not in seen:
                return child
        return random_unseen_arch(choices, seen, generator, budget)

    history, seen = [], set()
    while len(history) < n:
        best = rank(history)[:parents]
        for i in range(min(population, n - len(history))):
            child = child_of(best, i)
            if child is None:
                return history
            seen.add(arch_key(child))
            history.append((evaluate(child), child))
    return history


def best_of(history):
    """(loss, arch) of the lowest loss; the first of equals."""
    return min(history, key=lambda entry: entry[0])
