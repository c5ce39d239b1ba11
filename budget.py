"""
What an architecture may cost, how fast it runs, and how good a published table says it is.

    Budget               bounds on params, flops, KV cache and latency
    latency_predictor()  from an architecture to milliseconds, by a table of bench.py latency
    Benchmark            the accuracies of a space's trained architectures
    Ranking              how a supernet ranks some trained networks of its space
"""
import bisect
import csv
import gzip
import heapq
import itertools
import os
import zlib

import torch
from scipy.stats import kendalltau
from tqdm import tqdm

from optim_nas import arch_key, discretize, uniform
from run import read_json, rng
from supernet import SIZES, check_arch, extremes, one_hot

COSTS = ("params", "flops", "kv_cache", "latency") # kinds of cost, each with a key target_...
MIN_UTILIZATION = 0.95 # an architecture in a budget uses at least so much of it
PRICES = (1, 8, 64, 512, 4096) # of a violation, in units of log likelihood

# -----------------------------------------------------------------------------
# budgets

class Budget:
    """Bounds on what an architecture costs.

    An architecture is in the budget if no kind of cost is above its target, and one of them is at
    least `floor` times its target. floor is MIN_UTILIZATION, or less where the space has no
    architecture so close to its targets.

    cost(arch_weights) -> {"params": (), "flops": (), ...}, float64, linear in each row of the
    weights, and exact at one-hot ones. targets: kind of cost -> bound. strength: of the penalty.
    drawn: the choices without the options that the search never draws. SystemExit where no
    architecture of the space meets the targets.

    Architectures in the budget are found by hill climbing. hill_climb() changes one row at a time,
    or one node of a cell, to the option of the highest score, until no change improves it. The cost
    is linear in every row, so one backward pass gives the exact cost of all such changes
    (costs_near()). The score is the cost itself for the bounds of the space, minus the violation in
    repair(), and the log likelihood minus a price times the violation in project().

    Inside this class an architecture has entries for all layers. Unused ones cost nothing.
    """
    def __init__(self, choices, cost, targets, strength=1.0, drawn=None):
        self.choices, self.cost, self.targets, self.strength = choices, cost, targets, strength
        self.drawn = drawn or choices
        generator = torch.Generator().manual_seed(0)
        start = self.with_all_layers(uniform(self.drawn, generator))
        for kind, target in targets.items():
            low, high = (self.extreme_cost(kind, sign) for sign in (-1, 1))
            if not low <= target <= high / MIN_UTILIZATION:
                raise SystemExit(f"target_{kind}={target:,} is out of reach: the {kind} of this "
                                 f"space's architectures are {low:,.10g} to {high:,.10g}.")
        self.smallest = self.hill_climb(start, lambda arch, cost: -self.utilization(cost))
        if self.utilization(self.cost_of(self.smallest)) > 1:
            raise SystemExit(f"No architecture of this space meets all of {targets}: the closest "
                             f"costs {self.cost_of(self.smallest)}.")
        self.floor = MIN_UTILIZATION
        repaired = [self.repair(self.smallest, generator) for _ in range(3)]
        used = max(self.utilization(self.cost_of(arch)) for arch in repaired)
        self.floor = min(MIN_UTILIZATION, used)

    def extreme_cost(self, kind, sign):
        """The highest cost of this kind that hill climbing finds, from the first options of all
        choices and from the last; the lowest for sign=-1."""
        ends = [self.hill_climb(self.with_all_layers(start), lambda arch, cost: sign * cost[kind])
                for start in extremes(self.drawn)]
        return sign * max(sign * self.cost_of(end)[kind] for end in ends)

    def with_all_layers(self, arch, arch_weights=None):
        """The arch with entries for all layers: the likeliest options, or the first ones."""
        whole = {}
        for name, choice in self.drawn.items():
            if not choice.repeat:
                whole[name] = arch[name]
                continue
            best = arch_weights[name].argmax(-1).tolist() if arch_weights else [0] * choice.repeat
            unused = [choice.options[k] for k in best[len(arch[name]):]]
            whole[name] = [*arch[name], *unused]
        return whole

    def cost_of(self, arch):
        """{kind: number}, the cost of one architecture."""
        arch = self.with_all_layers(arch)
        return self.costs_near(arch)(arch)

    def costs_near(self, arch):
        """A function from an architecture to its cost, exact if it differs from arch in one row.

        The cost is linear in that row, so changing an option changes it by a derivative.
        """
        leaves = {name: w.requires_grad_() for name, w in one_hot(self.choices, arch).items()}
        cost, slopes = self.cost(leaves), {} # slopes: kind -> choice -> [row][option]
        for kind in self.targets:
            grads = torch.autograd.grad(cost[kind], leaves.values(), retain_graph=True,
                                        materialize_grads=True)
            slopes[kind] = {name: grad.view(-1, grad.shape[-1]).tolist()
                            for name, grad in zip(leaves, grads, strict=True)}
        base = {kind: cost[kind].item() for kind in self.targets}

        def cost_of(new):
            total = dict(base)
            for name, choice in self.choices.items():
                if new[name] == arch[name]:
                    continue
                rows = zip(rows_of(choice, new[name]), rows_of(choice, arch[name]), strict=True)
                for i, (option, before) in enumerate(rows):
                    if option == before:
                        continue
                    k, k_before = choice.options.index(option), choice.options.index(before)
                    for kind in total:
                        slope = slopes[kind][name][i]
                        total[kind] += slope[k] - slope[k_before]
            return total
        return cost_of

    def utilization(self, cost):
        """The share of the budget that a cost uses: the largest over the targets."""
        rounding = 1e-12
        return max(cost[kind] / target for kind, target in self.targets.items()) - rounding

    def violation(self, cost):
        """0 in the budget, above 1 for a cost above it, between them for one below the floor."""
        used = self.utilization(cost)
        return used if used > 1 else max(1 - used / self.floor, 0.0)

    def gradient(self, arch_weights):
        """The gradient to the weights of strength * sum_kind log(expected cost / target)^2."""
        leaves = {name: w.detach().requires_grad_() for name, w in arch_weights.items()}
        cost = self.cost(leaves)
        misses = [(cost[kind] / target).log() ** 2 for kind, target in self.targets.items()]
        grads = torch.autograd.grad(self.strength * sum(misses), leaves.values(),
                                    materialize_grads=True)
        return dict(zip(leaves, grads, strict=True))

    def hill_climb(self, arch, score, generator=None, frozen=()):
        """The local optimum of score(arch, cost) that single changes lead to from arch.

        The layers' rows change first, then what the whole network shares, each in the order of the
        space, or in a random order with a generator. The choices in frozen stay.
        """
        units = [[(name, unit) for name, choice in self.choices.items()
                  if bool(choice.repeat) == per_layer and name not in frozen
                  for unit in choice.units(choice.repeat or 1)] for per_layer in (True, False)]
        cost = self.costs_near(arch)
        best, before = score(arch, cost(arch)), None
        while best != before:
            before = best
            if generator:
                units = [shuffled(group, generator) for group in units]
            for name, unit in itertools.chain(*units):
                scores = [(score(new, cost(new)), new)
                          for new in neighbors(self.drawn, arch, name, unit)]
                value, new = max(scores, key=lambda pair: pair[0], default=(best, arch))
                if value > best:
                    arch, best, cost = new, value, self.costs_near(new)
        return arch

    def repair(self, arch, generator):
        """An architecture in the budget near this one; the closest to the budget if none is found.

        Climbs from arch towards the budget, and if that ends outside, from up to 10 random ones,
        the smallest and the largest.
        """
        found = []
        random = (uniform(self.drawn, generator) for _ in range(10))
        for start in itertools.chain([arch], random, extremes(self.drawn)):
            start = self.with_all_layers(start)
            end = self.hill_climb(start, lambda arch, cost: -self.violation(cost), generator)
            found.append(end)
            if self.violation(self.cost_of(end)) == 0:
                break
        closest = min([*found, self.smallest], key=lambda a: self.violation(self.cost_of(a)))
        return check_arch(self.choices, closest)

    def project(self, arch_weights):
        """The likeliest architecture in the budget that is found.

        What the whole network shares, such as its width and depth, takes one combination of options
        after another, the likeliest first. For each of them the layers' rows climb in likelihood at
        a rising price of a violation. This ends where no later combination can be likelier than the
        best architecture so far.
        """
        logs = {name: w.clamp_min(1e-30).log().view(-1, w.shape[-1]).tolist()
                for name, w in arch_weights.items()}
        shared = [name for name, choice in self.choices.items() if not choice.repeat]
        prices = PRICES if len(shared) < len(self.choices) else ()
        found = {} # arch_key -> (violation, -log likelihood, arch)

        def likelihood(arch):
            return log_likelihood(self.choices, arch, logs)

        def add(arch):
            found[arch_key(arch)] = self.violation(self.cost_of(arch)), -likelihood(arch), arch

        def best():
            return min(found.values(), key=lambda entry: entry[:2])

        def climb(arch, price, frozen=()):
            def score(arch, cost):
                return likelihood(arch) - price * self.violation(cost)
            return self.hill_climb(arch, score, frozen=frozen)

        likeliest = self.with_all_layers(discretize(self.choices, arch_weights), arch_weights)
        rows = [(logs[name][0], self.choices[name].options) for name in shared]
        add(self.smallest)
        for options in itertools.islice(combinations_by_likelihood(rows), 500):
            arch = likeliest | dict(zip(shared, options, strict=True))
            violation, minus_likelihood, _ = best()
            if violation == 0 and likelihood(arch) <= -minus_likelihood:
                break
            for price in prices:
                arch = climb(arch, price, frozen=shared)
            add(arch)
        if best()[0] > 0: # single changes led nowhere: climb from inside the budget
            repaired = self.repair(likeliest, torch.Generator().manual_seed(0))
            add(climb(self.with_all_layers(repaired, arch_weights), PRICES[-1]))
        return check_arch(self.choices, best()[2])


def make_budget(net, config, cost, drawn=None):
    """The Budget of config's targets, or None without targets. drawn: as in Budget."""
    # the searches of older versions lack some of these keys
    targets = {kind: getattr(config, f"target_{kind}", 0) for kind in COSTS}
    targets = {kind: target for kind, target in targets.items() if target}
    if not targets:
        return None
    known = cost({name: torch.full(c.shape, 1 / len(c.options))
                  for name, c in net.choices.items()})
    for kind in targets.keys() - known.keys():
        raise SystemExit(f"target_{kind}={targets[kind]} is for other spaces: the networks of "
                         f"space={config.space} have {', '.join(known)}.")
    return Budget(net.choices, cost, targets, config.budget_penalty, drawn)


def rows_of(choice, value):
    """A choice's value in an architecture as a list of rows."""
    return value if choice.repeat else [value]


def shuffled(values, generator):
    return [values[i] for i in torch.randperm(len(values), generator=generator).tolist()]


def neighbors(choices, arch, name, unit):
    """The architectures that differ from arch in this row.

    In a node of a cell one edge gets another operation, or passes it to an edge that is 'none'.
    """
    choice = choices[name]
    if not choice.repeat:
        yield from (arch | {name: option} for option in choice.options if option != arch[name])
        return
    kept = [i for i in unit if arch[name][i] != "none"] if choice.keep else unit
    for old, new in itertools.product(kept, unit if choice.keep else [None]):
        if choice.keep and new != old and new in kept:
            continue
        for option in choice.options:
            rows = list(arch[name])
            if choice.keep:
                rows[old] = "none"
            rows[old if new is None else new] = option
            if rows != list(arch[name]) and not (choice.keep and option == "none"):
                yield arch | {name: rows}


def log_likelihood(choices, arch, logs):
    """The sum of the logarithms of an architecture's options. logs: choice -> [row][option].

    The edges that a node of a cell does not keep do not count.
    """
    total = 0
    for name, choice in choices.items():
        for log, value in zip(logs[name], rows_of(choice, arch[name]), strict=True):
            if not (choice.keep and value == "none"):
                total += log[choice.options.index(value)]
    return total


def combinations_by_likelihood(rows):
    """Every combination of one option a row, the likeliest first. rows: [(logarithms, options)]"""
    rows = [sorted(zip(logs, options, strict=True), key=lambda pair: -pair[0])
            for logs, options in rows]

    def entry(ranks):
        return -sum(row[rank][0] for row, rank in zip(rows, ranks, strict=True)), ranks
    heap = [entry((0,) * len(rows))]
    seen = {heap[0][1]}
    while heap:
        _, ranks = heapq.heappop(heap)
        yield [row[rank][1] for row, rank in zip(rows, ranks, strict=True)]
        for n in range(len(rows)): # the next likely ones: one row goes down one rank
            new = (*ranks[:n], ranks[n] + 1, *ranks[n + 1:])
            if new[n] < len(rows[n]) and new not in seen:
                seen.add(new)
                heapq.heappush(heap, entry(new))

# -----------------------------------------------------------------------------
# loss against cost, in the search for a Pareto front

def nondominated_sort(points):
    """The indices of points in fronts, the best front first (Deb et al. 2002).

    points: tuples to be minimised. No point is dominated by one of its own or of a later front.
    """
    def dominates(a, b):
        return a != b and all(x <= y for x, y in zip(a, b, strict=True))
    remaining, fronts = list(range(len(points))), []
    while remaining:
        fronts.append([i for i in remaining
                       if not any(dominates(points[j], points[i]) for j in remaining)])
        remaining = [i for i in remaining if i not in fronts[-1]]
    return fronts


def pareto_rank(history, cost):
    """The history of a search for small loss and small cost(arch), front by front.

    The first entries of a front are spread over it: it is ordered by its cost and thinned to every
    second entry again and again.
    """
    order = []
    for front in nondominated_sort([(loss, cost(arch)) for loss, arch in history]):
        by_cost = sorted(front, key=lambda i: cost(history[i][1]))
        stride = 1 << max(len(by_cost) - 1, 0).bit_length()
        while stride:
            order += [i for i in by_cost[::stride] if i not in order]
            stride //= 2
    return [history[i] for i in order]

# -----------------------------------------------------------------------------
# latency, predicted from a table

def network_id(net, config):
    """What two runs on the same networks have in common: the space, its choices, some costs."""
    choices = {name: list(choice.options) for name, choice in net.choices.items()}
    costs = [net.cost(uniform(net.choices, rng("network", i))) for i in range(3)]
    return {"space": config.space, "choices": choices, "costs": costs}


def latency_key(net, of, batch_size, length):
    """The key of a measurement in a latency table, such as 'prefill 1 x 256'.

    length: in tokens, 0 for the network's block_size. Networks of images have no length.
    """
    block_size = getattr(net.config, "block_size", None)
    return f"{of} {batch_size} x {length or block_size}" if block_size else f"{of} {batch_size}"


def has_parts(net):
    """Whether latency tables measure a network part by part: a GPT whose sizes alone are chosen."""
    return hasattr(net, "latency_parts") and net.choices.keys() <= set(SIZES)


def latency_features(net, arch_weights):
    """The features that the latency is a linear function of: {name: float64 tensor}.

    With net.latency_parts(): how often the network has each part. Without: params, flops and how
    often each option is in use, over all rows and in each row. Each is linear in each weights' row.
    """
    arch_weights = {name: w.double().cpu() for name, w in arch_weights.items()}
    shares = dict(arch_weights)
    for name, choice in net.choices.items():
        if choice.depth: # a layer's choice counts with the chance that the layer runs
            depths = torch.tensor(net.choices[choice.depth].options)
            runs = depths > torch.arange(choice.repeat).unsqueeze(-1) # (repeat, depths)
            chance = runs.double() @ arch_weights[choice.depth] # (repeat,)
            shares[name] = chance.unsqueeze(-1) * arch_weights[name]
    if has_parts(net):
        return net.latency_parts(shares)
    cost = net.cost(arch_weights)
    counts = {f"all {name}": share.sum(0) for name, share in shares.items() if share.dim() == 2}
    totals = {"constant": torch.ones((), dtype=torch.float64),
              "params": cost["params"], "flops": cost["flops"]}
    return totals | counts | shares


def latency_predictor(net, ms):
    """A function from an architecture to milliseconds, or from arch_weights to their expectation.

    ms: {feature: the milliseconds of each entry of it}. The expectation is float64, and linear in
    each row of the weights.
    """
    ms = {name: torch.tensor(values, dtype=torch.float64) for name, values in ms.items()}

    def predict(arch):
        is_mixture = all(torch.is_tensor(value) for value in arch.values())
        features = latency_features(net, arch if is_mixture else one_hot(net.choices, arch))
        total = sum((ms[name] * feature).sum() for name, feature in features.items())
        return total if is_mixture else total.item()
    return predict


def load_latency(net, config):
    """The latency_predictor() of config.latency_table, or None without one.

    SystemExit if the table is of another space, or lacks what config asks for.
    """
    path = config.latency_table
    if not path:
        if config.target_latency:
            raise SystemExit(f"target_latency={config.target_latency} needs a --latency_table: "
                             "measure one with python bench.py latency.")
        if config.arch_search == "pareto" and config.pareto_cost == "latency":
            raise SystemExit("pareto_cost='latency' needs a --latency_table: "
                             "measure one with python bench.py latency.")
        return None
    table = read_json(path)
    if table.get("network") != network_id(net, config):
        raise SystemExit(f"latency_table='{path}' is of another space, or of other sizes in it: "
                         "run python bench.py latency with this search's config.")
    key = latency_key(net, config.latency_of, config.latency_batch_size, config.latency_length)
    if key not in table["latencies"]:
        measured = ", ".join(table["latencies"])
        raise SystemExit(f"latency_table='{path}' has no {key}, but {measured}: "
                         "choose one of these with latency_of, latency_batch_size and "
                         "latency_length, or measure it with python bench.py latency.")
    return latency_predictor(net, table["latencies"][key]["ms"])


def with_latency(net, arch, predict):
    """net.cost(arch), with the latency in milliseconds if predict is a latency_predictor()."""
    return net.cost(arch) | ({"latency": predict(arch)} if predict else {})

# -----------------------------------------------------------------------------
# tables of trained architectures

def architectures(choices):
    """Every architecture of the space, once."""
    free = [name for name, c in choices.items() if not c.depth]
    layered = [name for name, c in choices.items() if c.depth]
    for values in itertools.product(*(all_rows(choices[name]) for name in free)):
        arch = {name: list(rows) if choices[name].repeat else rows[0]
                for name, rows in zip(free, values, strict=True)}
        layers = (itertools.product(choices[name].options, repeat=arch[choices[name].depth])
                  for name in layered)
        for values_of_layers in itertools.product(*layers):
            found = arch | dict(zip(layered, map(list, values_of_layers), strict=True))
            yield {name: found[name] for name in choices}


def all_rows(choice):
    """Every tuple of rows that a choice without depth allows."""
    if not choice.keep:
        return itertools.product(choice.options, repeat=choice.repeat or 1)
    operations = [o for o in choice.options if o != "none"]

    def rows_of_node(n):
        for edges in itertools.combinations(range(n), choice.keep):
            for kept in itertools.product(operations, repeat=choice.keep):
                by_edge = dict(zip(edges, kept, strict=True))
                yield tuple(by_edge.get(i, "none") for i in range(n))
    return (sum(nodes, ()) for nodes in itertools.product(*map(rows_of_node, choice.inputs)))


def columns_of(module, arch):
    """What tells an architecture of this module's space apart in a table: {column: value}."""
    if hasattr(module, "columns"):
        return module.columns(arch)
    return {name: " ".join(map(str, rows)) if isinstance(rows, list) else rows
            for name, rows in arch.items()}


def read_table(path):
    """The rows of a table as dicts.

    path: a .csv or .csv.gz with a header, or a .json of {genotype: accuracy or {column: value}}.
    """
    try:
        if path.endswith(".json"):
            rows = read_json(path).items()
            return [{"genotype": text, **(row if isinstance(row, dict) else {"test_acc": row})}
                    for text, row in rows]
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", newline="") as f:
            return list(csv.DictReader(f))
    except (OSError, EOFError, UnicodeDecodeError, zlib.error, csv.Error, AttributeError) as e:
        raise SystemExit(f"The table {path} cannot be read ({e}): give a .csv, .csv.gz or .json of "
                         "architectures and accuracies.") from None


def official_rows(path, module, dataset):
    """The rows of an official benchmark file, read by its own Python package, which unpickles it.

    A .pth is NAS-Bench-201, read by nas_201_api; others are NATS-Bench, read by nats_bench.
    module: the space's. Its NATS_BENCH, if it has one, names its part of NATS-Bench and the epochs
    of the trainings. Accuracies are means over the seeds on the test set.
    """
    part, epochs = getattr(module, "NATS_BENCH", ("tss", "200"))
    try:
        if path.endswith(".pth"):
            from nas_201_api import NASBench201API
            api = NASBench201API(path, verbose=False)
        else:
            from nats_bench import create
            api = create(path, part, fast_mode=os.path.isdir(path), verbose=False)
    except ImportError as e:
        raise SystemExit(f"benchmark={path} needs the package of that benchmark ({e}): "
                         "pip install nats_bench or nas-bench-201, or give a .csv, .csv.gz or "
                         ".json.") from None
    name, rows = {"imagenet16_120": "ImageNet16-120"}.get(dataset, dataset), []
    for i in tqdm(range(len(api)), desc="benchmark", unit=" architectures"):
        info = api.get_more_info(i, name, hp=epochs, is_random=False)
        rows.append({"genotype": api.arch(i), "test_acc": info["test-accuracy"]})
    return rows


class Benchmark:
    """The accuracies of a space's trained architectures, in %; the mean where one has several rows.

    path: of a table for read_table() or official_rows(), with a column test_acc. module: the
    space's, whose columns(arch) tell architectures apart unless the table has a column `genotype`.
    arch: any architecture of the space.
    """
    def __init__(self, path, module, arch, dataset=""):
        self.path, self.module = path, module
        if path.endswith((".csv", ".csv.gz", ".json")):
            rows = read_table(path)
        else:
            rows = official_rows(path, module, dataset)
        has_genotypes = bool(rows) and "genotype" in rows[0]
        self.columns = ["genotype"] if has_genotypes else list(module.columns(arch))
        found = {}
        for number, row in enumerate(rows, 1):
            try:
                found.setdefault(self.row_key(row), []).append(float(row["test_acc"]))
            except (KeyError, TypeError, ValueError) as e:
                raise SystemExit(f"The table {path} has no test_acc, or not the columns of this "
                                 f"space, in row {number} ({e}).") from None
        if not found:
            raise SystemExit(f"The table {path} is empty: give one with architectures.")
        self.accuracies = {key: sum(values) / len(values) for key, values in found.items()}
        self.sorted = sorted(self.accuracies.values(), reverse=True)

    def row_key(self, row):
        return tuple(str(row[name]) for name in self.columns)

    def __call__(self, arch):
        """{"accuracy", "rank", "of", "percentile", "regret"} of an architecture.

        Rank 1 is the best of the table. regret: by how many % the best is more accurate.
        """
        genotype = self.module.genotype(arch)
        key = self.row_key({"genotype": genotype, **self.module.columns(arch)})
        if key not in self.accuracies:
            raise SystemExit(f"The table {self.path} lacks the architecture {genotype}: "
                             "give this space's table, or leave out --benchmark.")
        accuracy, of = self.accuracies[key], len(self.sorted)
        better = bisect.bisect_left(self.sorted, -accuracy, key=lambda value: -value)
        return {"accuracy": accuracy, "rank": better + 1, "of": of,
                "percentile": 100 * (1 - better / of), "regret": self.sorted[0] - accuracy}

    def random_best(self, draws):
        """The expected accuracy of the best of so many different random architectures.

        The sum over architectures of the accuracy times the chance that it is the best one drawn.
        """
        n, draws = len(self.sorted), min(draws, len(self.sorted))
        expected, none_better = 0.0, 1.0 # none_better: the chance that no better one is drawn
        for i, accuracy in enumerate(self.sorted):
            is_best = none_better * draws / (n - i)
            expected, none_better = expected + is_best * accuracy, none_better - is_best
        return expected

    def in_words(self, found):
        """A call's answer, {"table_" + key: value}, for a line of the log."""
        return ("table {table_accuracy:.2f}%, rank {table_rank} of {table_of}, regret "
                "{table_regret:.2f}%".format(**found))

    def summary(self, found):
        """The same at the end of a search, beside the best of random draws."""
        draws = ", ".join(f"of {n} {self.random_best(n):.2f}%" for n in (1, 10, 100))
        return (f"in the table: {found['table_accuracy']:.2f}%, rank {found['table_rank']} of "
                f"{found['table_of']}; the best of random draws, in the mean: {draws}")


class Ranking:
    """How a supernet ranks trained networks of its space: the space has too many for a table to
    hold the one that a search finds.

    path: a .csv with a column for every choice, lists as words between spaces, and with test_loss
    and params. Networks whose params differ by less than 10 % are a band, and are compared with
    each other alone. loss_of(arch): the loss with inherited weights.
    """
    def __init__(self, path, choices, loss_of):
        self.path, self.loss_of, losses, sizes, self.archs = path, loss_of, {}, {}, {}
        for number, row in enumerate(read_table(path), 1):
            try:
                arch = {name: self.read(choice, row[name]) for name, choice in choices.items()}
                key = arch_key(check_arch(choices, arch))
                losses.setdefault(key, []).append(float(row["test_loss"]))
                self.archs[key], sizes[key] = arch, int(row["params"])
            except (AssertionError, KeyError, TypeError, ValueError) as e:
                raise SystemExit(f"The table {path} has no network of this space in row {number} "
                                 f"({e}): give this space's table, or leave out "
                                 "--benchmark.") from None
        self.losses = {key: sum(values) / len(values) for key, values in losses.items()}
        self.bands, top = [], 0
        for key in sorted(sizes, key=sizes.get):
            if sizes[key] > 1.1 * top:
                self.bands.append([])
                top = sizes[key]
            self.bands[-1].append(key)
        if not self.bands or min(map(len, self.bands)) < 2:
            raise SystemExit(f"The table {path} has bands of {[len(b) for b in self.bands]} "
                             "networks: give one with two or more in each.")

    @staticmethod
    def read(choice, text):
        """The option of a cell, or the list of options, one a layer."""
        known = {str(option): option for option in choice.options}
        found = [known[word] for word in text.split()]
        return found if choice.repeat else found[0]

    def __call__(self, arch):
        """{"tau", "regret", "taus", "regrets"}: means over the bands, and of each.

        tau: Kendall's, between inherited and trained losses. regret: how much worse the network
        with the lowest inherited loss is than the band's best, in % of the band's range. arch, the
        one that the search would take, does not matter.
        """
        taus, regrets = [], []
        for band in self.bands:
            trained = [self.losses[key] for key in band]
            inherited = [self.loss_of(self.archs[key]) for key in band]
            taus.append(float(kendalltau(trained, inherited).statistic))
            chosen = trained[inherited.index(min(inherited))]
            regrets.append(100 * (chosen - min(trained)) / (max(trained) - min(trained)))
        return {"tau": sum(taus) / len(taus), "regret": sum(regrets) / len(regrets),
                "taus": taus, "regrets": regrets}

    def in_words(self, found):
        """A call's answer, {"table_" + key: value}, for a line of the log."""
        return "table tau {table_tau:.2f}, regret {table_regret:.1f}%".format(**found)

    def summary(self, found):
        """The same at the end of a search, band by band."""
        each = ", ".join(f"{tau:.2f} and {regret:.1f}%" for tau, regret in
                         zip(found["table_taus"], found["table_regrets"], strict=True))
        return (f"in the table of {len(self.archs)} networks, Kendall's tau and regret in "
                f"{len(self.bands)} bands of parameters: {each}")
