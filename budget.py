"""What an architecture may cost, and what tables say of it: budgets, latency, accuracy."""
import torch
import bisect
import csv
import gzip
import heapq
import itertools
import os
from tqdm import tqdm
import zlib
from optim_nas import arch_key, discretize, uniform
from run import read_json, rng
from supernet import check_arch, one_hot


CLOSE = 0.95 # an architecture uses at least so much of its budget


class Budget:
    """
    Bounds on what an architecture costs: never above one, and within 5 % of the tightest where the space has such an architecture, else
    as close as was found: a share of `floor`.

    cost(weights) -> {"params": (), "flops": (), ...}, float64, linear in each row of the weights and exact at one-hot ones. targets:
    name -> bound. strength: of the penalty. drawn: the choices without the options that the search never draws. SystemExit if one is
    out of the space's reach, or all of them together.

    Inside, an arch has entries for all layers; those that it does not use cost nothing.
    """
    def __init__(self, choices, cost, targets, strength=1.0, drawn=None):
        self.choices, self.cost, self.targets, self.strength, self.drawn = choices, cost, targets, strength, drawn or choices
        generator = torch.Generator().manual_seed(0)
        start = self.whole(uniform(self.drawn, generator))
        for name, target in targets.items():
            low, high = (self.of(self.hill_climb(start, lambda arch, cost, name=name, sign=sign: sign * cost[name]))[name] for sign in (-1, 1))
            if not low <= target <= high / CLOSE:
                raise SystemExit(f"target_{name}={target:,} is out of reach: the {name} of this space's architectures are {low:,.10g} to "
                                 f"{high:,.10g}.")
        self.smallest = self.hill_climb(start, lambda arch, cost: -self.utilization(cost))
        if self.utilization(self.of(self.smallest)) > 1:
            raise SystemExit(f"No architecture of this space meets all of {targets}: the closest costs {self.of(self.smallest)}.")
        self.floor = CLOSE # some spaces have nothing so close to the target
        self.floor = min(CLOSE, max(self.utilization(self.of(self.repair(self.smallest, generator))) for _ in range(3)))

    def whole(self, arch, weights=None):
        """The arch with entries for all layers, those that it does not use from weights, or the first option."""
        def rest(name, c):
            rows = weights[name].argmax(-1).tolist() if weights else [0] * c.repeat
            return [c.options[k] for k in rows[len(arch[name]):]]
        return {name: [*arch[name], *rest(name, c)] if c.repeat else arch[name] for name, c in self.drawn.items()}

    def of(self, arch):
        """{name: number}, the cost of one architecture."""
        return self.around(self.whole(arch))(self.whole(arch))

    def around(self, arch):
        """A function from an architecture to its cost, exact for this arch and for all that differ in one row: what an option adds is
        the derivative, for cost is linear in every row."""
        leaves = {name: w.requires_grad_() for name, w in one_hot(self.choices, arch).items()}
        at, cost = {}, self.cost(leaves)
        for name in self.targets:
            grads = torch.autograd.grad(cost[name], leaves.values(), retain_graph=True, materialize_grads=True)
            at[name] = {key: g.view(-1, g.shape[-1]).tolist() for key, g in zip(leaves, grads, strict=True)}
        base = {name: cost[name].item() for name in self.targets}

        def cost_of(new):
            total = dict(base)
            for key, c in self.choices.items():
                if new[key] != arch[key]:
                    rows = zip(new[key], arch[key], strict=True) if c.repeat else [(new[key], arch[key])]
                    for i, (value, old) in enumerate(rows):
                        for name in total if value != old else ():
                            g = at[name][key][i]
                            total[name] += g[c.options.index(value)] - g[c.options.index(old)]
            return total
        return cost_of

    def utilization(self, cost):
        """The share of the budget that a cost uses: of that target of which it uses most."""
        return max(cost[name] / target for name, target in self.targets.items()) - 1e-12 # rounding

    def violation(self, cost):
        """0 in the budget, up to 1 for what uses too little of it, and more for what is above."""
        used = self.utilization(cost)
        return used if used > 1 else max(1 - used / self.floor, 0.0)

    def gradient(self, weights):
        """The gradient to the weights of strength * sum over targets of log(expected cost / target)^2."""
        leaves = {name: w.detach().requires_grad_() for name, w in weights.items()}
        cost = self.cost(leaves)
        penalty = self.strength * sum((cost[name] / target).log() ** 2 for name, target in self.targets.items())
        return dict(zip(leaves, torch.autograd.grad(penalty, leaves.values(), materialize_grads=True), strict=True))

    def hill_climb(self, arch, score, generator=None, frozen=()):
        """Walks over the rows, or the nodes of cells, and takes an option whose score(arch, cost) is higher, until there is none; first
        over those of layers, then over what the whole network shares, each in random order with a generator; not over what is frozen."""
        units = [[(name, unit) for name, c in self.choices.items() if bool(c.repeat) == of_layers and name not in frozen
                  for unit in c.units(c.repeat or 1)] for of_layers in (True, False)]
        cost = self.around(arch)
        best, before = score(arch, cost(arch)), None
        while best != before:
            before = best
            if generator:
                units = [[group[i] for i in torch.randperm(len(group), generator=generator).tolist()] for group in units]
            for name, unit in itertools.chain(*units):
                values = [(score(new, cost(new)), new) for new in changed(self.drawn, arch, name, unit)]
                value, new = max(values, key=lambda pair: pair[0], default=(best, arch))
                if value > best:
                    arch, best, cost = new, value, self.around(new)
        return arch

    def repair(self, arch, generator):
        """An architecture in the budget, by changes of single rows of this one, in random order, each of which brings it closer; if they
        lead nowhere, of random ones; of the closest if there is none."""
        found = []
        for start in itertools.chain([arch], (uniform(self.drawn, generator) for _ in range(10))):
            found.append(self.hill_climb(self.whole(start), lambda arch, cost: -self.violation(cost), generator))
            if self.violation(self.of(found[-1])) == 0:
                break
        return check_arch(self.choices, min([*found, self.smallest], key=lambda arch: self.violation(self.of(arch))))

    def project(self, weights):
        """
        The likeliest architecture in the budget that is found: for what the whole network shares, from the likeliest combination on, the
        layers' rows are changed one at a time at a rising price of a miss, until no further combination could be likelier.
        """
        logs = {name: w.clamp_min(1e-30).log().view(-1, w.shape[-1]).tolist() for name, w in weights.items()}
        shared = [name for name, c in self.choices.items() if not c.repeat]
        arch, found = self.whole(discretize(self.choices, weights), weights), {}

        def likely(arch):
            return likelihood(self.choices, arch, logs)

        def add(arch):
            found[arch_key(arch)] = self.violation(self.of(arch)), -likely(arch), arch
        add(self.smallest)
        for values in itertools.islice(best_first([(logs[name][0], self.choices[name].options) for name in shared]), 500):
            new = arch | dict(zip(shared, values, strict=True))
            miss, less_likely, _ = min(found.values(), key=lambda entry: entry[:2])
            if miss == 0 and likely(new) <= -less_likely:
                break
            for price in (1, 8, 64, 512, 4096) if len(shared) < len(self.choices) else ():
                new = self.hill_climb(new, lambda a, cost, price=price: likely(a) - price * self.violation(cost), frozen=shared)
            add(new)
        if min(found.values(), key=lambda entry: entry[:2])[0] > 0: # single changes led nowhere: from where the budget is met
            start = self.whole(self.repair(arch, torch.Generator().manual_seed(0)), weights)
            add(self.hill_climb(start, lambda a, cost: likely(a) - 4096 * self.violation(cost)))
        return check_arch(self.choices, min(found.values(), key=lambda entry: entry[:2])[2])


def best_first(rows):
    """Every combination of one option a row, in the order of the sum of their logarithms. rows: [(logarithms, options)]"""
    rows = [sorted(zip(logs, options, strict=True), key=lambda pair: -pair[0]) for logs, options in rows]

    def entry(place):
        return -sum(row[i][0] for row, i in zip(rows, place, strict=True)), place
    heap = [entry((0,) * len(rows))]
    seen = {heap[0][1]}
    while heap:
        _, place = heapq.heappop(heap)
        yield [row[i][1] for row, i in zip(rows, place, strict=True)]
        for n in range(len(rows)):
            new = (*place[:n], place[n] + 1, *place[n + 1:])
            if new[n] < len(rows[n]) and new not in seen:
                seen.add(new)
                heapq.heappush(heap, entry(new))


def likelihood(choices, arch, logs):
    """The sum of the logarithms of an architecture's options, name -> [row of them]; rows that a node does not keep do not count."""
    return sum(row[c.options.index(value)] for name, c in choices.items()
               for row, value in zip(logs[name], arch[name] if c.repeat else [arch[name]], strict=True) if not (c.keep and value == "none"))


def changed(choices, arch, name, unit):
    """Every architecture that differs in this row, or in one of the operations that a node keeps, at its edge or at another."""
    c = choices[name]
    if not c.repeat:
        yield from (arch | {name: option} for option in c.options if option != arch[name])
        return
    stay = [i for i in unit if arch[name][i] != "none"] if c.keep else unit
    for old, new in itertools.product(stay, unit if c.keep else [None]):
        if c.keep and new != old and new in stay:
            continue
        for option in c.options:
            rows = list(arch[name])
            if c.keep:
                rows[old] = "none"
            rows[old if new is None else new] = option
            if rows != list(arch[name]) and not (c.keep and option == "none"):
                yield arch | {name: rows}


def make_budget(net, config, cost, drawn=None):
    """The Budget that config's targets say, of what a progressive shrinking draws in the end; or None."""
    targets = {name: getattr(config, f"target_{name}") for name in ("params", "flops", "latency") if getattr(config, f"target_{name}")}
    return Budget(net.choices, cost, targets, config.budget_penalty, drawn) if targets else None


def network_of(net, config):
    """What two runs agree in whose networks are the same: the space, its choices, and what some of its architectures cost."""
    return {"space": config.space, "choices": {name: list(c.options) for name, c in net.choices.items()},
            "costs": [net.cost(uniform(net.choices, rng("network", i))) for i in range(3)]}


def latency_key(config, of, batch_size, length):
    """What is measured, in words that are its key in a latency table; length 0 is block_size. An image has no length."""
    return f"{of} {batch_size} x {length or config.block_size}" if config.space == "gpt" else f"{of} {batch_size}"


def latency_features(net, weights):
    """What the latency of a network is a linear function of, {name: float64 tensor}, itself linear in each row of the weights: of a GPT how
    often it has each part, (n_embd, options); of others params, flops and how often each option is there, in all
    rows and in each."""
    weights = {name: w.double().cpu() for name, w in weights.items()}
    shares = dict(weights)
    for name, c in net.choices.items():
        if c.depth: # what a layer chooses counts with the chance that it runs
            runs = torch.tensor(net.choices[c.depth].options) > torch.arange(c.repeat).unsqueeze(-1) # (repeat, depths)
            shares[name] = (runs.double() @ weights[c.depth]).unsqueeze(-1) * weights[name]
    if hasattr(net, "latency_parts"):
        return net.latency_parts(shares)
    cost = net.cost(weights)
    counts = {f"all {name}": share.sum(0) for name, share in shares.items() if share.dim() == 2}
    return {"constant": torch.ones(()).double(), "params": cost["params"], "flops": cost["flops"], **counts, **shares}


def latency(net, ms):
    """A function from weights, or an architecture, to milliseconds: float64 and linear in each row of the weights. ms: {name of a feature:
    the milliseconds of each}."""
    ms = {name: torch.tensor(values, dtype=torch.float64) for name, values in ms.items()}

    def predict(arch):
        mixed = all(torch.is_tensor(w) for w in arch.values())
        found = latency_features(net, arch if mixed else one_hot(net.choices, arch))
        total = sum((ms[name] * feature).sum() for name, feature in found.items())
        return total if mixed else total.item()
    return predict


def load_latency(net, config):
    """The latency() that config's table predicts, or None. SystemExit if the table is of another space or lacks what config asks for."""
    path, key = config.latency_table, latency_key(config, config.latency_of, config.latency_batch_size, config.latency_length)
    if not path:
        if config.target_latency or (config.arch_search == "pareto" and config.pareto_cost == "latency"):
            raise SystemExit("A target or a front of latency needs a --latency_table: measure it by python bench.py latency.")
        return None
    table = read_json(path)
    if table.get("network") != network_of(net, config):
        raise SystemExit(f"latency_table='{path}' is of another space, or of other sizes in it: run python bench.py "
                         "latency with this search's config.")
    if key not in table["latencies"]:
        raise SystemExit(f"latency_table='{path}' has no {key}, but {', '.join(table['latencies'])}: choose one of these by latency_of, "
                         "latency_batch_size and latency_length, or measure it by python bench.py latency.")
    return latency(net, table["latencies"][key]["ms"])


def with_latency(net, arch, predict):
    """net.cost(), with the latency in milliseconds where there is a load_latency() that predicts it."""
    return net.cost(arch) | ({"latency": predict(arch)} if predict else {})


def read_table(path):
    """The rows of a table, dicts: of a .csv or .csv.gz with a header, or of a .json, {genotype: accuracy or {column: value}}."""
    try:
        if path.endswith(".json"):
            rows = read_json(path).items()
            return [{"genotype": text, **(row if isinstance(row, dict) else {"test_acc": row})} for text, row in rows]
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", newline="") as f:
            return list(csv.DictReader(f))
    except (OSError, EOFError, UnicodeDecodeError, zlib.error, csv.Error, AttributeError) as e:
        raise SystemExit(f"The table {path} cannot be read ({e}): give a .csv, .csv.gz or .json of architectures and accuracies.") from None


def official_rows(path, space, dataset):
    """The rows of an official benchmark file, by its own Python package, which unpickles it: of NAS-Bench-201, a .pth, by nas_201_api,
    of NATS-Bench by nats_bench. Test accuracies after 200 epochs, of the sizes after 90; the mean over the seeds that there are."""
    try:
        if path.endswith(".pth"):
            from nas_201_api import NASBench201API
            api = NASBench201API(path, verbose=False)
        else:
            from nats_bench import create
            api = create(path, "sss" if space == "nats_size" else "tss", fast_mode=os.path.isdir(path), verbose=False)
    except ImportError as e:
        raise SystemExit(f"benchmark={path} needs the package of that benchmark ({e}): pip install nats_bench or nas-bench-201, or give "
                         "a .csv, .csv.gz or .json.") from None
    name, hp = {"imagenet16_120": "ImageNet16-120"}.get(dataset, dataset), "90" if space == "nats_size" else "200"
    return [{"genotype": api.arch(i), "test_acc": api.get_more_info(i, name, hp=hp, is_random=False)["test-accuracy"]}
            for i in tqdm(range(len(api)), desc="benchmark", unit=" architectures")]


class Benchmark:
    """The accuracies, in %, of trained architectures of a space: of its rows' column test_acc, the mean over the rows of one architecture.

    Rows: see read_table() and official_rows(). module: the space's, whose columns() tell architectures apart, or in their place a
    column `genotype`; arch: any of its architectures.
    """
    def __init__(self, path, module, arch, dataset=""):
        self.path, self.module, found = path, module, {}
        tables = path.endswith((".csv", ".csv.gz", ".json"))
        rows = read_table(path) if tables else official_rows(path, module.__name__.split(".")[-1], dataset)
        self.names = ["genotype"] if rows and "genotype" in rows[0] else list(module.columns(arch))
        for number, row in enumerate(rows, 1):
            try:
                found.setdefault(self.key(row), []).append(float(row["test_acc"]))
            except (KeyError, TypeError, ValueError) as e:
                raise SystemExit(f"The table {path} has no test_acc, or not the columns of this space, in row {number} ({e}).") from None
        if not found:
            raise SystemExit(f"The table {path} is empty: give one that holds architectures and their accuracies.")
        self.accuracies = {key: sum(values) / len(values) for key, values in found.items()}
        self.sorted = sorted(self.accuracies.values(), reverse=True)

    def key(self, row):
        return tuple(str(row[name]) for name in self.names)

    def __call__(self, arch):
        """{"accuracy", "rank", "of", "percentile", "regret"}: rank 1 is the best of the table, regret what the best has more; in %."""
        text = self.module.genotype(arch)
        accuracy = self.accuracies.get(self.key({"genotype": text, **self.module.columns(arch)}))
        if accuracy is None:
            raise SystemExit(f"The table {self.path} lacks the architecture {text}: give this space's table, or leave out --benchmark.")
        better, of = bisect.bisect_left(self.sorted, -accuracy, key=lambda value: -value), len(self.sorted)
        return {"accuracy": accuracy, "rank": better + 1, "of": of, "percentile": 100 * (1 - better / of),
                "regret": self.sorted[0] - accuracy}

    def random_best(self, draws):
        """The expected accuracy of the best of so many different architectures drawn at random: sum_i accuracy_i P(it is the best)."""
        n, draws = len(self.sorted), min(draws, len(self.sorted))
        best, left = 0.0, 1.0 # the chance that none of the i better ones is drawn
        for i, accuracy in enumerate(self.sorted):
            first = left * draws / (n - i)
            best, left = best + first * accuracy, left - first
        return best
