"""
How an architecture is chosen: DARTS, DrNAS, GDAS and SPOS by gradient or by sampling, then random and evolutionary search.

Knows tensors and Choices, and no network: a search draws weights (name -> rows that sum to 1) or an arch, the caller
computes a loss with them, and the gradient comes back through the weights to the alphas.

    darts   softmax(alpha), or sparsemax; order 2 adds the unrolled step             Liu et al. 2019, eq. 7 and 8
    drnas   a draw from Dirichlet(elu(alpha) + 1), reparameterised                   Chen et al. 2021, eq. 4
    gdas    one-hot argmax of (log softmax(alpha) + Gumbel) / tau, straight-through  Dong & Yang 2019, eq. 3
    spos    one architecture a step, uniformly; no alphas                            Guo et al. 2020
"""
import itertools
import json
import math

import torch
from torch.nn import functional as F

from supernet import check_arch, straight_through_arch as picked # noqa: F401

OPTIMIZERS = ("darts", "drnas", "gdas", "spos")

# -----------------------------------------------------------------------------
# from alphas (..., K) to weights (..., K)

def sparsemax(alpha):
    """The Euclidean projection of alpha (..., K) onto the simplex: weights that can be exactly 0 (Martins & Astudillo 2016)."""
    z = alpha.sort(-1, descending=True).values
    k = torch.arange(1, z.size(-1) + 1, dtype=z.dtype)
    support = 1 + k * z > z.cumsum(-1)
    n = support.sum(-1, keepdim=True)
    threshold = ((z * support).sum(-1, keepdim=True) - 1) / n
    return (alpha - threshold).clamp_min(0)


def dirichlet(alpha, generator):
    """A draw from Dirichlet(elu(alpha) + 1), with its pathwise gradient: Gamma draws over their sum."""
    concentration = (F.elu(alpha) + 1).double() # float64: small concentrations draw numbers that float32 calls 0
    gamma = torch._standard_gamma(concentration, generator=generator).clamp_min(torch.finfo(torch.float64).tiny)
    return (gamma / gamma.sum(-1, keepdim=True)).to(alpha.dtype)


def gumbel(alpha, tau, generator):
    """A one-hot draw from softmax(alpha) whose gradient is that of softmax((log softmax(alpha) + Gumbel) / tau)."""
    noise = -torch.empty_like(alpha).exponential_(generator=generator).log()
    soft = ((alpha.log_softmax(-1) + noise) / tau).softmax(-1)
    hard = F.one_hot(soft.argmax(-1), alpha.size(-1)).to(alpha.dtype)
    return hard + (soft - soft.detach()) # exactly one-hot in the forward pass


def draw(choice, n, generator):
    """n rows, uniformly and independently; where a node keeps some of its rows: those uniformly, and their operations."""
    if not choice.keep:
        return [choice.options[i] for i in torch.randint(len(choice.options), (n,), generator=generator).tolist()]
    rows, operations = ["none"] * n, [o for o in choice.options if o != "none"]
    for unit in choice.units(n):
        for i in torch.randperm(len(unit), generator=generator)[:choice.keep].tolist():
            rows[unit[i]] = operations[torch.randint(len(operations), (), generator=generator).item()]
    return rows


def uniform(choices, generator):
    """One architecture, every choice drawn uniformly and independently."""
    arch = {name: draw(c, c.repeat or 1, generator) for name, c in choices.items()}
    return check_arch(choices, {name: arch[name] if c.repeat else arch[name][0] for name, c in choices.items()})


def argmax_arch(choices, weights):
    """The architecture of the largest weight in every row."""
    def pick(choice, row):
        return choice.options[row.argmax().item()]
    return check_arch(choices, {name: [pick(c, row) for row in weights[name]] if c.repeat else pick(c, weights[name])
                                for name, c in choices.items()})


def discretize(choices, weights):
    """rowwise(), and where a node keeps some of its rows: those of the largest weight but for 'none', 'none' in the others."""
    return argmax_arch(choices, weights) | {name: top_edges(c, weights[name]) for name, c in choices.items() if c.keep}


def top_edges(choice, weights):
    """The rows of weights: (rows, K) that stay, each with its best operation, and 'none'."""
    operations = [k for k, option in enumerate(choice.options) if option != "none"]
    best, k = weights[:, operations].max(-1) # (rows,)
    rows = ["none"] * len(best)
    for unit in choice.units(len(best)):
        for i in best[list(unit)].topk(choice.keep).indices.tolist():
            rows[unit[i]] = choice.options[operations[k[unit[i]]]]
    return rows


def entropy(weights):
    """{name: (...,)}: the entropy of every row over its largest possible value; 1 is undecided, 0 decided."""
    return {name: -torch.special.xlogy(w, w).sum(-1) / math.log(w.size(-1)) for name, w in weights.items() if w.size(-1) > 1}

# -----------------------------------------------------------------------------

class ArchOptimizer:
    """The alphas of a search space, how weights are drawn from them, and their Adam.

    choices: name -> Choice. Alphas live on the CPU, start at 1e-3 N(0, 1) and exist where there is something to choose.
    `name` is one of OPTIMIZERS. normalize (darts): "softmax" or "sparsemax". regularizer (drnas): "l2" is Adam's weight decay,
    "kl" adds weight_decay * KL(Dirichlet(elu(alpha) + 1) || Dirichlet(1)) to the loss instead. budget: a Budget, whose penalty the
    alphas also learn from, and in which arch() is.
    """
    def __init__(self, name, choices, generator, learning_rate=3e-4, weight_decay=1e-3, betas=(0.5, 0.999), tau_max=10.0, tau_min=0.1,
                 normalize="softmax", regularizer="l2", budget=None):
        for value, allowed in ((name, OPTIMIZERS), (normalize, ("softmax", "sparsemax")), (regularizer, ("l2", "kl"))):
            if value not in allowed:
                raise SystemExit(f"'{value}' is not one of {', '.join(allowed)}.")
        self.name, self.choices, self.normalize, self.budget = name, choices, normalize, budget
        self.tau_max, self.tau_min = tau_max, tau_min
        self.kl_scale = weight_decay if name == "drnas" and regularizer == "kl" else 0.0
        self.alphas = {key: torch.nn.Parameter(1e-3 * torch.randn(choice.shape, generator=generator))
                       for key, choice in choices.items() if len(choice.options) > 1 and name != "spos"}
        self.optimizer = torch.optim.Adam(self.alphas.values(), lr=learning_rate, betas=betas,
                                          weight_decay=0.0 if self.kl_scale else weight_decay) if self.alphas else None
        self.open = choices # of spos: those that it draws from, perhaps with fewer options
        self.idle = {} # choice -> steps in a row without a gradient
        self.mask = {} # choice -> (..., K), True for what prune() took out: its alpha and its weight are 0

    def sample(self, progress, generator):
        """What the network runs with in one step: weights, or for spos an arch. progress: 0 at the start, 1 at the end."""
        if self.name == "spos":
            return uniform(self.open, generator)
        if self.name == "darts":
            return self.mean()
        if self.name == "drnas":
            return self.complete({key: self.share(key, dirichlet(alpha, generator)) for key, alpha in self.alphas.items()})
        tau = self.tau_max + (self.tau_min - self.tau_max) * progress
        return self.complete({key: gumbel(self.left(key), tau, generator) for key in self.alphas})

    def mean(self):
        """The weights that the alphas stand for: the mean of what is sampled."""
        if self.name == "drnas":
            return self.complete({key: self.share(key, F.normalize(F.elu(alpha) + 1, p=1, dim=-1)) for key, alpha in self.alphas.items()})
        turn = sparsemax if self.normalize == "sparsemax" and self.name == "darts" else lambda alpha: alpha.softmax(-1)
        return self.complete({key: turn(self.left(key)) for key in self.alphas})

    def left(self, key):
        """The alphas of a choice, those of pruned options so low that their weight is 0."""
        return self.alphas[key].masked_fill(self.mask[key], -1e9) if self.mask else self.alphas[key]

    def share(self, key, weights):
        """The weights of a choice without pruned options."""
        return F.normalize(weights.masked_fill(self.mask[key], 0.0), p=1, dim=-1) if self.mask else weights

    def prune(self, keep):
        """Leaves the `keep` options of the largest mean weight in every row, or all where there are no more (DrNAS, Chen et al. 2021)."""
        if keep < 2:
            raise SystemExit(f"{keep} options a row leave nothing to search: keep at least 2.")
        mean = self.mean()
        for key, alpha in self.alphas.items():
            best = mean[key].topk(min(keep, alpha.size(-1))).indices
            self.mask[key] = torch.ones_like(alpha, dtype=torch.bool).scatter(-1, best, False)
            alpha.data.masked_fill_(self.mask[key], 0.0)

    def complete(self, weights):
        """Adds weight 1 for choices of one option, and uniform weights for all choices of spos."""
        return {key: weights[key] if key in weights else torch.full(c.shape, 1 / len(c.options)) for key, c in self.choices.items()}

    def arch(self):
        """The likeliest option of every choice, or the likeliest architecture in the budget."""
        return self.budget.project(self.mean()) if self.budget else discretize(self.choices, self.mean())

    def step(self, weights, grads):
        """One Adam step. weights: what sample() returned; grads: name -> the gradient of the loss to them.

        RuntimeError if a choice gets no gradient: it cannot be learned. gdas, whose draw may leave a choice without one, gets 20 steps."""
        dearer = self.budget.gradient(weights) if self.budget else {}
        for key, alpha in self.alphas.items():
            grad = grads.get(key)
            self.idle[key] = 0 if grad is not None and grad.any() else self.idle.get(key, 0) + 1
            if grad is None or self.idle[key] >= (20 if self.name == "gdas" else 1):
                raise RuntimeError(f"the weights of {key} got no gradient: nothing in the network depends on them")
            if not grad.isfinite().all():
                raise RuntimeError(f"the gradient of the weights of {key} is not finite: {grad}")
            weights[key].backward((grad + dearer.get(key, 0.0)).to(alpha))
            if self.kl_scale:
                rows = alpha[~self.mask[key]].unflatten(0, (*alpha.shape[:-1], -1)) if self.mask else alpha
                (self.kl_scale * kl_to_uniform(F.elu(rows) + 1)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for key, mask in self.mask.items():
            self.alphas[key].data.masked_fill_(mask, 0.0) # what momentum was left

    def state_dict(self):
        return {"alphas": {key: alpha.detach().clone() for key, alpha in self.alphas.items()},
                "mask": dict(self.mask), "optimizer": self.optimizer.state_dict() if self.alphas else {}}

    def load_state_dict(self, state):
        self.mask = dict(state["mask"])
        for key, alpha in self.alphas.items():
            alpha.data.copy_(state["alphas"][key])
        if self.alphas:
            ours = self.optimizer.state_dict()["param_groups"] # the settings of this command
            self.optimizer.load_state_dict(state["optimizer"] | {"param_groups": ours})


def kl_to_uniform(concentration):
    """KL(Dirichlet(concentration) || Dirichlet(1)), summed over rows: concentration (..., K), float64 inside."""
    c = concentration.double()
    total, ones = c.sum(-1), torch.ones_like(c)
    return (total.lgamma() - c.lgamma().sum(-1) - ones.sum(-1).lgamma()
            + ((c - 1) * (c.digamma() - total.digamma().unsqueeze(-1))).sum(-1)).sum()


def unrolled_gradient(params, alphas, train_grad, val_grad, learning_rate, radius=0.01):
    """The gradient of L_val(w - learning_rate * dL_train/dw, alpha) to the alphas (DARTS eq. 7), a list like alphas.

    train_grad(tensors), val_grad(tensors): the gradients of the two losses, at the current params, to those tensors.
    The second derivative is a central difference along dL_val/dw', of eps = radius / its norm (eq. 8).
    params are as before when it returns.
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
    return [d - learning_rate * (a - b) / (2 * eps.to(d.device)) for d, a, b in zip(d_alpha, plus, minus, strict=True)]

# -----------------------------------------------------------------------------
# a budget: what an architecture may cost


# -----------------------------------------------------------------------------
# after a supernet is trained: search over its inherited weights

def arch_key(arch):
    """The same string for the same architecture."""
    return json.dumps(arch, sort_keys=True)


def space_size(choices):
    """How many different architectures there are; entries of layers beyond the depth do not count."""
    size = 1
    depths = {c.depth for c in choices.values() if c.depth}
    for name, choice in choices.items():
        if choice.keep:
            size *= math.prod(math.comb(n, choice.keep) * (len(choice.options) - 1) ** choice.keep for n in choice.inputs)
        elif name in depths:
            per_layer = math.prod(len(c.options) for c in choices.values() if c.depth == name)
            size *= sum(per_layer ** d for d in choice.options)
        elif not choice.depth:
            size *= len(choice.options) ** (choice.repeat or 1)
    return size


def architectures(choices):
    """Every architecture of the space, once."""
    free = [name for name, c in choices.items() if not c.depth]
    for values in itertools.product(*(row_lists(choices[n]) for n in free)):
        arch = {name: list(v) if choices[name].repeat else v[0] for name, v in zip(free, values, strict=True)}
        layered = [name for name in choices if name not in arch]
        for rows in itertools.product(*(itertools.product(choices[n].options, repeat=arch[choices[n].depth]) for n in layered)):
            found = arch | {name: list(row) for name, row in zip(layered, rows, strict=True)}
            yield {name: found[name] for name in choices}


def row_lists(choice):
    """Every list of rows that a choice allows."""
    if not choice.keep:
        return itertools.product(choice.options, repeat=choice.repeat or 1)
    operations = [o for o in choice.options if o != "none"]
    nodes = [[tuple(ops[stay.index(i)] if i in stay else "none" for i in range(n))
              for stay in itertools.combinations(range(n), choice.keep) for ops in itertools.product(operations, repeat=choice.keep)]
             for n in choice.inputs]
    return (sum(rows, ()) for rows in itertools.product(*nodes))


def unseen(choices, seen, generator, budget=None, tries=1000):
    """A uniform draw that is not in `seen` (a container of key_of), brought into the budget if there is one; None when the space is
    exhausted, or 50 draws end at what was seen already of a budget."""
    for _ in range(50 if budget else tries):
        arch = uniform(choices, generator)
        arch = budget.repair(arch, generator) if budget else arch
        if arch_key(arch) not in seen:
            return arch
    if budget:
        return None
    rest = [arch for arch in architectures(choices) if arch_key(arch) not in seen] if len(seen) < space_size(choices) else []
    return rest[torch.randint(len(rest), (), generator=generator).item()] if rest else None


def random_search(choices, evaluate, n, generator, budget=None):
    """evaluate(arch) -> loss, for n different architectures, or all there are: [(loss, arch)] in the order of evaluation."""
    history, seen = [], set()
    while len(history) < n and (arch := unseen(choices, seen, generator, budget)):
        seen.add(arch_key(arch))
        history.append((evaluate(arch), arch))
    return history


def mutate(choices, arch, generator, prob, depth_prob):
    """A copy in which every per-layer entry, or all rows of a node, is redrawn with prob and every other choice with depth_prob."""
    def flip(p):
        return torch.rand((), generator=generator).item() < p
    new = uniform(choices, generator)
    child = {name: arch[name] if c.repeat or not flip(depth_prob) else new[name] for name, c in choices.items()}
    return fill(choices, child, lambda name, unit: arch[name] if unit[-1] < len(arch[name]) and not flip(prob) else None, generator)


def crossover(choices, a, b, generator):
    """A child whose every entry comes from either parent, as do all rows of a node."""
    def side():
        return (a, b)[torch.randint(2, (), generator=generator).item()]
    child = {name: side()[name] for name in choices}
    def parent(name, unit):
        parents = [p for p in (a, b) if unit[-1] < len(p[name])]
        return parents[torch.randint(len(parents), (), generator=generator).item()][name] if parents else None
    return fill(choices, child, parent, generator)


def fill(choices, child, parent, generator):
    """Per-layer lists of the child's own depth, from the list parent(name, rows), or a draw where that is None."""
    for name, c in choices.items():
        if c.repeat:
            rows = draw(c, child[c.depth] if c.depth else c.repeat, generator)
            for unit in c.units(len(rows)):
                inherited = parent(name, unit)
                if inherited is not None:
                    rows[unit.start:unit.stop] = inherited[unit.start:unit.stop]
            child[name] = rows
    return child


def evolutionary_search(choices, evaluate, n, generator, population=50, parents=10, prob=0.2, depth_prob=0.4, budget=None, rank=None):
    """Mutation and crossover of the best architectures so far (Guo et al. 2020, algorithm 1).

    evaluate(arch) -> loss. The first `population` architectures are random; every later generation is half mutations and
    half crossovers of the `parents` best so far, filled up at random. No architecture is evaluated twice; it ends after n
    evaluations or when the space is exhausted. budget: a Budget into which every architecture is brought. rank(history): the history
    with the best first, by loss where it is None. Returns [(loss, arch)] in the order of evaluation.
    """
    rank = rank or (lambda history: sorted(history, key=lambda entry: entry[0]))

    def draw(best):
        return best[torch.randint(len(best), (), generator=generator).item()][1]

    def child_of(best, i):
        for _ in range(50 if best else 0):
            child = (mutate(choices, draw(best), generator, prob, depth_prob) if i % 2 else
                     crossover(choices, draw(best), draw(best), generator))
            child = budget.repair(child, generator) if budget else child
            if arch_key(child) not in seen:
                return child
        return unseen(choices, seen, generator, budget)

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


def nondominated_sort(points):
    """The indices of points, tuples to be small in everything, in layers: those that no other is better than, those that only these
    are better than, and so on (non-dominated sorting: Deb et al. 2002)."""
    left, layers = list(range(len(points))), []

    def better(a, b):
        return a != b and all(x <= y for x, y in zip(a, b, strict=True))
    while left:
        layers.append([i for i in left if not any(better(points[j], points[i]) for j in left)])
        left = [i for i in left if i not in layers[-1]]
    return layers


def by_front(history, cost):
    """The history of a search for small loss and small cost(arch) together: front by front, each in order of its cost and thinned to
    every second entry again and again, so that its first ones are spread over it."""
    order = []
    for front in nondominated_sort([(loss, cost(arch)) for loss, arch in history]):
        line = sorted(front, key=lambda i: cost(history[i][1]))
        step = 1 << max(len(line) - 1, 0).bit_length()
        while step:
            order += [i for i in line[::step] if i not in order]
            step //= 2
    return [history[i] for i in order]


def best_of(history):
    """(loss, arch) of the lowest loss; the first of equals."""
    return min(history, key=lambda entry: entry[0])
