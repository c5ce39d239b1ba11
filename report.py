"""
Trains what a search found and its rivals of equal budget, and says whether the search paid.

    python report.py out/search       # a laptop, about half an hour; it prints an estimate first
    python report.py out/search_pydocs_drnas config/base_pydocs.py --seeds=[1,2,3,4,5]
    python report.py --help           # every key with its default

OUT_DIR is that of a finished train_search.py. The rivals are the network that uses most of the
budget, nanoGPT's proportions (for GPTs), random networks, and the best of more random networks by
the supernet's inherited weights. The budget is the search's target, or else the number of
parameters of what it found. All are trained alike, by the keys of train_base.py.

Writes to OUT_DIR/report: report.html (one file with its figures inside), report.md with its figures
beside it, report.json (the numbers), inherited.jsonl (losses with the supernet's weights) and runs/
(the trainings). Nothing is done twice: a report that was stopped goes on, and one with more seeds
adds to what is there.
"""
import base64
import contextlib
import html
import itertools
import json
import math
import os
import platform
import re
import shlex
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from scipy.stats import kendalltau, spearmanr, ttest_ind
from tqdm import tqdm

from train_base import * # noqa: F403 (its keys; first, so that the names below win)
from analyze import BLUE, GREY, RED, save_figure, search_figure
from budget import Budget, load_latency, make_budget, with_latency
from configurator import (WHOLE, as_list, at_least, check_limits, check_rules, configure, given)
from fused_ops import use_fused_ops
from optim_nas import METHODS, arch_key, best_of, random_search, uniform
from run import (add_checksum, append, atomic_write, content_hash, is_resuming, load_checkpoint,
                 load_model, main, read_json, read_lines, rng, setup, silenced, verify_checksum,
                 write_json)
from search_spaces import build, data_kind, text_of, with_space
from supernet import check_arch, extremes
from train import check_config
from train_base import read_arch, train_found
from train_search import read_phases, score, split_data

# -----------------------------------------------------------------------------
# the keys of train_base.py but four, and:
del arch, arch_traj, genotype, table # noqa: F821 (a report itself says what it trains)
out_dir = 'out/search' # of the search
seeds = [1, 2, 3] # of every network's trainings
latency_table = '' # '': the search's, if it had one
n_random = 3 # random networks of equal budget
n_pick = 50 # random networks, of which the best with inherited weights is a rival; 0: none
n_rank = 20 # random networks of any size, on which the supernet's ranking is measured; 0: none
max_iters = 300
warmup_iters = 30
# -----------------------------------------------------------------------------

LIMITS = {"seeds": WHOLE, "max_iters": at_least(1),
          **dict.fromkeys(("n_random", "n_pick", "n_rank"), at_least(0))}
RULES = [
    (lambda c: len(set(as_list(c.seeds))) < max(2, len(as_list(c.seeds))),
     "seeds={seeds} must be two or more different ones, such as --seeds=[1,2,3]."),
    (is_resuming,
     "init_from='{init_from}' continues a training, which a report does by itself: leave it out."),
    (lambda c: c.n_rank in (1, 2),
     "n_rank={n_rank} networks have no order to speak of: take 3 or more, or 0."),
    (lambda c: not c.val_portion,
     "val_portion=0.0 leaves nothing to choose the strongest rival by: give a share, such as "
     "--val_portion=0.1."),
    (lambda c: not os.path.exists(os.path.join(c.out_dir, "result.json")),
     "{out_dir} holds no finished search: end it by python train_search.py --init_from=resume "
     "--out_dir={out_dir}, or name another OUT_DIR.")]

NOT_OF_A_TRAINING = ("out_dir", "overwrite", "seed", "seeds", "latency_table", "n_random", "n_pick",
                     "n_rank", "wandb_run_name") # keys of a report that change no training
SIGNIFICANCE = 0.05 # two networks count as different if p is below it
DESCRIPTIONS = {"found": "found by the search", "largest": "uses most of the budget",
                "standard": "nanoGPT's proportions, GPT-2's block",
                "modern": "nanoGPT's proportions, the modern block", "random": "drawn at random",
                "picked": "the best of {n_pick} random ones by inherited weights"}
METRICS = {"loss": ("test loss", 1), "acc": ("test accuracy in %", -1),
           "psnr": ("test PSNR in dB", -1)} # name, and 1 where small is good
# of the networks of nanoGPT's proportions: mlp_ratio, and the kinds of block
STANDARD = {
    "standard": (4, {"norm": "layernorm", "position": "learned", "activation": "gelu"}),
    "modern": (8 / 3, {"norm": "rmsnorm", "position": "rope", "activation": "swiglu"})}
CSS = """:root{color-scheme:light}
body{max-width:60rem;margin:0 auto;padding:1rem 1rem 3rem;font:16px/1.55 system-ui,sans-serif;
color:#222;background:#fff}
h1{font-size:1.6rem;line-height:1.25}h2{font-size:1.2rem;margin:2.2rem 0 .6rem}
.verdict{padding:.8rem 1rem;border-left:5px solid #0072B2;background:#f3f6f9;font-size:1.1rem}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .5rem;border-bottom:1px solid #ddd;text-align:right;vertical-align:top}
th:first-child,td:first-child,.text th,.text td{text-align:left}
.numbers td{white-space:nowrap}.text td,code{overflow-wrap:anywhere}
code{font-size:.9em;background:#f3f6f9}
figure{margin:1rem 0}img{max-width:100%;height:auto}figcaption{font-size:.9rem;color:#555}
@media(max-width:44rem){thead{display:none}table,tbody,tr{display:block}
tr{padding:.5rem 0;border-bottom:1px solid #ccc}
td{display:flex;justify-content:space-between;gap:1rem;padding:.1rem 0;border:0}
td:first-child{font-weight:600}
td+td::before{content:attr(data-label);color:#666;flex:none}
td:empty{display:none}.text td{display:block}.text td::before{display:none}}"""

# -----------------------------------------------------------------------------
# the search, and its supernet's inherited weights

def load_supernet(config):
    """The finished search in config["out_dir"]: (its config, its supernet, its data, loss_of).

    loss_of(arch): the loss with the supernet's weights on the alphas' part of the data.
    """
    path = os.path.join(config["out_dir"], "ckpt.pt")
    checkpoint = load_checkpoint(path, "cpu")
    pruned = checkpoint["chooser"]["mask"]
    if pruned and (config["n_pick"] or config["n_rank"]):
        raise SystemExit("This progressive search has pruned operations, so that its supernet has "
                         "weights for few networks: give --n_pick=0 --n_rank=0.")
    ours = {key: config[key] for key in ("device", "data_dir", "latency_table") if config[key]}
    ours |= {"out_dir": config["out_dir"], "zero_stage": 0}
    ours["init_from"] = "resume" # a GPT-2's vocabulary is not rounded up
    search = SimpleNamespace(**checkpoint["config"] | ours)
    check_config(search)
    run = setup(search)
    if run.world > 1:
        raise SystemExit(f"A report is made by one process, not by {run.world}: start it by "
                         "python, without torchrun.")
    splits, _ = split_data(search, run)
    net = build(vars(search)).to(run.device)
    use_fused_ops(search.fused and run.device_type == "cpu" and net.has_plain_kernels)
    if pruned:
        net.prune(pruned)
    load_model(net, checkpoint, path)

    def loss_of(arch):
        return score(net, net, arch, splits, search, run)[0]["loss"]
    memory = os.path.join(config["out_dir"], "report", "inherited.jsonl")
    return search, net, splits, remembered(loss_of, content_hash(checkpoint["model"])[:12], memory)


def remembered(loss_of, supernet, path):
    """loss_of(arch), which looks up in the file `path`, and adds to it, what was computed before.

    supernet: the hash of its weights; losses with other weights do not count.
    """
    lines = []
    if os.path.exists(path):
        lines = [verify_checksum(line, path) for line in read_lines(path)]
        text = "".join(json.dumps(add_checksum(line)) + "\n" for line in lines)
        atomic_write(path, lambda file: file.write(text.encode())) # without a line cut off
    known = {arch_key(line["arch"]): line["loss"] for line in lines if line["supernet"] == supernet}

    def known_loss_of(arch):
        key = arch_key(arch)
        if key not in known:
            known[key] = loss_of(arch)
            line = {"supernet": supernet, "arch": arch, "loss": known[key]}
            append(path, add_checksum(line))
        return known[key]
    return known_loss_of

# -----------------------------------------------------------------------------
# the rivals

def search_budget(net, search, found):
    """(the Budget of the rivals, whether it is only what the found network costs)."""
    predict = load_latency(net, search)
    drawn = read_phases(net.choices, search)[-1].choices # what progressive shrinking draws last
    budget = make_budget(net, search, lambda arch: with_latency(net, arch, predict), drawn)
    if budget:
        return budget, False
    params = {"params": net.cost(found["arch"])["params"]}
    return Budget(net.choices, net.cost, params, drawn=drawn), True


def has_standard(space):
    """Whether nanoGPT's proportions mean something in a space: in those that take tokens."""
    return data_kind(space).units == "tokens"


def largest_in_budget(choices, budget, generator, text=arch_key, other_than=None):
    """The architecture that uses most of the budget, of the ends of 20 climbs from random ones.

    other_than: an architecture that it must not be, by its text(); None if all ends are that one.
    """
    def used(arch, cost):
        share = budget.utilization(cost)
        return share if share <= 1 else -share

    ends = []
    for _ in range(20):
        start = budget.with_all_layers(uniform(choices, generator))
        ends.append(check_arch(choices, budget.hill_climb(start, used, generator)))
    excluded = [text(other_than)] if other_than else []
    allowed = [arch for arch in ends if text(arch) not in excluded]
    return max(allowed, key=lambda arch: used(arch, budget.cost_of(arch)), default=None)


def standard_shape(choices, budget, head_size=0, mlp_ratio=4, block=None):
    """nanoGPT's proportions, or the closest that the space has; None if none fits the budget.

    All layers are alike, with heads of 64 channels. Of the depths and widths that use at least nine
    tenths of what the largest uses, it has the width closest to 64 a layer. block: its kinds, where
    the space chooses them; others are plain attention's. None if the space lacks one of them.
    """
    kinds = {"qk_norm": False, "n_kv_head": 0, "window": 0} | (block or {})
    kinds = {name: value for name, value in kinds.items() if name in choices}
    if any(value not in choices[name].options for name, value in kinds.items()):
        return None
    def closest(name, value): # by ratio
        return min(choices[name].options, key=lambda option: abs(math.log(option / value)))

    fitting = [] # (share of the budget, how far from 64 channels a layer, architecture)
    for depth, width in itertools.product(choices["n_layer"].options, choices["n_embd"].options):
        heads = closest("n_head", width / (head_size or 64))
        arch = {"n_layer": depth, "n_embd": width, "n_head": [heads] * depth,
                "mlp_ratio": [closest("mlp_ratio", mlp_ratio)] * depth}
        arch |= {name: [value] * depth if choices[name].repeat else value
                 for name, value in kinds.items()}
        arch = {name: arch[name] for name in choices} # in the space's order
        used = budget.utilization(budget.cost_of(arch))
        if used <= 1:
            fitting.append((used, abs(math.log(width / depth / 64)), arch))
    most = max((used for used, _, _ in fitting), default=0)
    large = [entry for entry in fitting if entry[0] >= 0.9 * most]
    return min(large, key=lambda entry: entry[1])[2] if large else None


def networks_of(net, found, budget, loss_of, config, own=False):
    """{name: architecture} of the found network and its rivals.

    Equal networks have equal architectures. own: the budget is what the found network costs, so
    that it is the largest by definition.
    """
    def draw(evaluate, n, purpose):
        generator = rng(config["seed"], purpose)
        return random_search(budget.drawn, evaluate, n, generator, budget) # [(loss, arch)]

    text = partial(text_of, space=found["space"])
    archs = {"found": found["arch"]}
    archs["largest"] = largest_in_budget(budget.drawn, budget, rng(config["seed"], "largest"), text,
                                         found["arch"] if own else None)
    if has_standard(found["space"]):
        for name, (mlp_ratio, block) in STANDARD.items():
            if name == "standard" or block.keys() & net.choices.keys():
                archs[name] = standard_shape(net.choices, budget, found["model"]["head_size"],
                                             mlp_ratio, block)
    if config["n_pick"]:
        archs["picked"] = best_of(draw(loss_of, config["n_pick"], "pick"))[1]
    for i, (_, arch) in enumerate(draw(lambda arch: 0.0, config["n_random"], "random"), 1):
        archs[f"random {i}"] = arch
    first = {} # text -> the first architecture that has it
    return {name: first.setdefault(text(arch), arch) for name, arch in archs.items() if arch}


def choose_networks(net, search, found, loss_of, config):
    """What is compared and what is ranked.

    Returns the Budget, {name: architecture} of networks_of(), and [(loss with inherited weights,
    architecture)] of n_rank random ones.
    """
    budget, own = search_budget(net, search, found)
    total = config["n_pick"] + config["n_rank"]
    with tqdm(desc="inherited weights", unit=" networks", total=total) as bar:
        def counted_loss_of(arch):
            bar.update()
            return loss_of(arch)
        archs = networks_of(net, found, budget, counted_loss_of, config, own)
        generator = rng(config["seed"], "rank")
        ranked = random_search(budget.drawn, counted_loss_of, config["n_rank"], generator)
    return budget, archs, ranked

# -----------------------------------------------------------------------------
# the trainings

def run_folder(arch, seed, found, config):
    """The folder of a training; its name is a hash of every setting."""
    settings = {key: value for key, value in config.items() if key not in NOT_OF_A_TRAINING}
    identity = [arch_key(arch), found["model"], found["dataset"], found["data_dir"], settings, seed]
    return os.path.join(config["out_dir"], "report", "runs", content_hash(identity)[:12])


def train_one(folder, arch, seed, found, config):
    """The result.json of a training: one that is there, or that of a new or a continued one."""
    result = os.path.join(folder, "result.json")
    if not os.path.exists(result):
        network = {key: found[key] for key in ("space", "model", "dataset", "data_dir")}
        write_json(f"{folder}.json", network | {"arch": arch})
        began = os.path.exists(os.path.join(folder, "run.json"))
        job = {"arch": f"{folder}.json", "arch_traj": "", "genotype": "", "table": "", "seed": seed,
               "out_dir": folder, "overwrite": False,
               "init_from": "resume" if began else config["init_from"]}
        with silenced():
            train_found(config | job)
        for name in ("ckpt.pt", "ckpt.prev.pt"): # best.pt stays
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(folder, name))
    return read_json(result)


def train_all(archs, ranked, found, minutes_of, config):
    """{(arch_key, seed): result.json}: archs with every seed, the ranked ones with the first.

    minutes_of(architectures): an estimate, which is printed.
    """
    seeds = as_list(config["seeds"])
    jobs = [*itertools.product(archs.values(), seeds), *((arch, seeds[0]) for _, arch in ranked)]
    folders = {run_folder(arch, seed, found, config): (arch, seed) for arch, seed in jobs}
    left = [arch for folder, (arch, _) in folders.items()
            if not os.path.exists(os.path.join(folder, "result.json"))]
    print(f"{len(folders)} trainings of {config['max_iters']} steps, of which {len(left)} are "
          f"left: about {minutes_of(left):.0f} minutes at the speed of the search")
    bar = tqdm(folders.items(), desc="report", unit=" trainings")
    return {(arch_key(arch), seed): train_one(folder, arch, seed, found, config)
            for folder, (arch, seed) in bar}


def training_flops(flops, config):
    """Of a training; flops: of one sample, forward. Backward costs two forward passes."""
    samples = config["batch_size"] * config["gradient_accumulation_steps"] * config["max_iters"]
    return 3 * flops * samples


def batch_flops(net, choices, search):
    """FLOPs of the forward pass of a batch in a search, a mean over what it draws from `choices`.

    A hard method computes an architecture, a mixture of sizes the largest, one of operations all.
    """
    options = [option for c in net.choices.values() for option in c.options]
    weights = {}
    if METHODS[search.optimizer].is_hard:
        for name, c in net.choices.items():
            row = torch.tensor([float(option in choices[name].options) for option in c.options])
            weights[name] = (row / row.sum()).expand(c.shape)
    elif all(isinstance(option, str) for option in options):
        weights = {name: torch.ones(c.shape) for name, c in net.choices.items()}
    else:
        weights = extremes(net.choices)[1]
    return float(net.cost(weights)["flops"]) * search.batch_size


def search_flops(net, search, evaluated, first=None):
    """FLOPs of a search: of its steps and of its `evaluated` networks with inherited weights.

    first: the network of the first half of a progressive search. In forward passes, a step of the
    weights costs three, and one more with a teacher, which counts as a network of this kind. A step
    of the alphas costs two, for it needs no gradient of the weights; of second order twelve. What
    was trained before the search is not counted.
    """
    phases = read_phases(net.choices, search)
    parts = [(net, phase.choices, phase.config.subnets_per_step, phase.config.max_iters)
             for phase in phases]
    if first:
        half, subnets = search.max_iters // 2, search.subnets_per_step
        parts = [(first, first.choices, subnets, half),
                 (net, net.choices, subnets, search.max_iters - half)]

    alphas_cost = 0
    if METHODS[search.optimizer].has_alphas:
        alphas_cost = 12 if search.order == 2 else 2
    passes = evaluated * search.eval_iters
    total = passes * batch_flops(net, phases[-1].choices, search)
    for part, choices, subnets, steps in parts:
        passes = (3 * subnets + bool(search.teacher)) * steps
        passes += alphas_cost * max(0, steps - search.arch_warmup_iters)
        passes *= search.gradient_accumulation_steps
        total += passes * batch_flops(part, choices, search)
    return total


def search_cost(net, search, out):
    """{"before", "search_hours", "search_flops"} of the finished search in the folder `out`.

    before: names of what had been trained before it.
    """
    began = read_json(os.path.join(out, "run.json"))["config"]
    path = os.path.join(out, "arch_search.jsonl") # of spos
    evaluated = len(read_lines(path)) if os.path.exists(path) else 0
    first = None
    if search.prune_keep:
        first = build(vars(search) | {"partial_channels": began.get("partial_channels", 1)})
    sources = dict.fromkeys((search.inherit, search.teacher, began["init_from"]))
    return {"before": [name for name in sources if name not in ("", "scratch")],
            "search_hours": read_json(os.path.join(out, "result.json"))["seconds"] / 3600,
            "search_flops": search_flops(net, search, evaluated, first)}

# -----------------------------------------------------------------------------
# the numbers

def metric_of(config):
    """(key, name, sign) of what is compared: accuracy, PSNR or loss. sign: 1 if small is good."""
    key = data_kind(config["space"]).metric or "loss"
    return key, *METRICS[key]


def compare(found, rival, sign):
    """How much better found is than a rival, paired by seed.

    Returns {"gain", "std", "p" (Welch's t-test), "words"}. sign: 1 for losses, -1 for accuracies.
    """
    found, rival = np.array(found), np.array(rival)
    differences = sign * (rival - found)
    if np.ptp(found) == np.ptp(rival) == 0: # no variance, for which the test is not defined
        p = float(not differences.any())
    else:
        p = float(ttest_ind(found, rival, equal_var=False).pvalue)
    words = "better" if differences.mean() > 0 else "worse"
    if not p < SIGNIFICANCE:
        words = "not told apart"
    return {"gain": differences.mean(), "std": differences.std(ddof=1), "p": p, "words": words}


def verdict(networks, bought, sign, metric="test loss"):
    """(a sentence that says whether the search paid, the name of the strongest rival).

    Rivals are those that need no search, and as many random ones as the search's cost would have
    trained, and one more. The strongest is the best in validation; it is compared on the test data.
    networks: {name: {"val": [a value a seed], "test": [...]}}.
    """
    draws = [name for name in networks if name.startswith("random")][:1 + int(bought)]
    rivals = [name for name in networks if name in ("largest", *STANDARD, *draws)]
    if not rivals:
        return "Nothing can be said: no other network of the space has the same budget.", None
    best = min(rivals, key=lambda name: sign * np.mean(networks[name]["val"]))
    if networks[best]["arch"] == networks["found"]["arch"]:
        return f"The search did not pay: what it found is {best}, which needs no search.", best
    found = compare(networks["found"]["test"], networks[best]["test"], sign)
    seeds, difference = len(networks["found"]["test"]), number(abs(found["gain"]), metric)
    test = f"in {metric} (Welch's t-test, p = {found['p']:.2g}, {seeds} seeds)"
    rival = f"{best}, the strongest rival of equal budget that needs no search"
    if found["words"] == "not told apart":
        return ("Whether the search paid cannot be told with these seeds: the found network cannot "
                f"be told apart from {rival}; they differ by {difference} {test}."), best
    paid = "paid" if found["gain"] > 0 else "did not pay"
    return (f"The search {paid}: the found network is {found['words']} than {rival}, "
            f"by {difference} {test}."), best


def rank_correlations(predictors, trained):
    """{predictor: {"tau", "tau_p", "rho", "rho_p"}}: Kendall's and Spearman's correlation.

    With `trained`, where small is good. A predictor that says the same of all is left out.
    """
    found = {}
    for name, values in predictors.items():
        if len(set(values)) > 1 and len(set(trained)) > 1:
            tau, rho = kendalltau(values, trained), spearmanr(values, trained)
            found[name] = {"tau": float(tau.statistic), "tau_p": float(tau.pvalue),
                           "rho": float(rho.statistic), "rho_p": float(rho.pvalue)}
    return found


def network_numbers(archs, results, budget, config):
    """{name: its architecture, costs, and a validation and a test value for each seed}.

    Those of rivals also have what compare() says. archs: "found" is the first.
    """
    key, _, sign = metric_of(config)
    numbers = {}
    for name, arch in archs.items():
        runs = [results[arch_key(arch), seed] for seed in as_list(config["seeds"])]
        line = {"arch": arch, "params": runs[0]["params"], "flops": runs[0]["flops"],
                "used": budget.utilization(budget.cost_of(arch)),
                "hours": np.mean([run["seconds"] for run in runs]) / 3600,
                "val": [run[f"best_val_{key}"] for run in runs],
                "test": [run[f"test_{key}"] for run in runs]}
        if numbers:
            line |= compare(numbers["found"]["test"], line["test"], sign)
        numbers[name] = line
    return numbers


def training_costs(networks, cost, config):
    """Hours and FLOPs of a training of the found and of a random network, and "bought".

    bought: how many trainings of random networks have the FLOPs of the search.
    """
    random = [line for name, line in networks.items() if name.startswith("random")]
    costs = {}
    for name, lines in (("found", [networks["found"]]), ("random", random or networks.values())):
        costs[f"{name}_hours"] = np.mean([line["hours"] for line in lines])
        flops = np.mean([line["flops"] for line in lines])
        costs[f"{name}_flops"] = training_flops(flops, config)
    return costs | {"bought": cost["search_flops"] / costs["random_flops"]}


def rank_numbers(ranked, results, config):
    """"ranked" and "ranks" of report.json: the networks, and how well two predictors order them."""
    key, _, sign = metric_of(config)
    runs = [results[arch_key(arch), as_list(config["seeds"])[0]] for _, arch in ranked]
    lines = [{"arch": arch, "inherited": loss, "trained": run[f"test_{key}"]}
             for (loss, arch), run in zip(ranked, runs, strict=True)]
    predictors = {"loss with inherited weights": [line["inherited"] for line in lines],
                  "number of parameters": [-run["params"] for run in runs]}
    trained = [sign * line["trained"] for line in lines]
    return {"ranked": lines, "ranks": rank_correlations(predictors, trained) if lines else {}}


def budget_text(budget):
    units = {"params": "{:,} parameters", "flops": "{:,} FLOPs",
             "kv_cache": "{:,} bytes of KV cache", "latency": "{:.3g} ms"}
    return " and ".join(units[name].format(bound) for name, bound in budget.targets.items())


def provenance(config, search, splits, run):
    """{what: text}: commands, commit, machine, data and settings. run: run.json of a training."""
    first = read_json(os.path.join(config["out_dir"], "run.json"))
    keys = ("batch_size", "gradient_accumulation_steps", "learning_rate", "min_lr", "warmup_iters",
            "weight_decay", "val_portion")
    processor = platform.processor() or platform.machine()
    commits = dict.fromkeys(one["commit"] or "unknown" for one in (first, run))
    unit = data_kind(config["space"]).units
    uses = ("for the supernet's weights", "for its alphas", "of test")
    sizes = [f"{len(data):,} {use}" for data, use in zip(splits.values(), uses, strict=True)]
    return {"search": f"`python {shlex.join(first['argv'])}`",
            "report": f"`python {shlex.join(sys.argv)}`",
            "commit": " and ".join(commits),
            "machine": f"{run['device']} in {run['dtype']}, {processor}, PyTorch threads: "
                       f"{torch.get_num_threads()}",
            "versions": ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
            "data": f"{search.dataset}, {unit}: {', '.join(sizes)}",
            "seeds": f"{search.seed} of the search, {', '.join(map(str, config['seeds']))} of the "
                     "trainings",
            "trainings": ", ".join(f"{key} {run['config'][key]}" for key in keys)}

# -----------------------------------------------------------------------------
# figures

def draw_networks(figure, networks, metric):
    """A row for each network: a dot for each seed, a bar at their mean."""
    ax = figure.subplots()
    for y, (name, network) in enumerate(networks.items()):
        color, mean = RED if name == "found" else BLUE, np.mean(network["test"])
        ax.plot(network["test"], [y] * len(network["test"]), "o", color=color, markersize=5,
                alpha=0.6, mew=0)
        ax.plot([mean, mean], [y - 0.3, y + 0.3], color=color, linewidth=2)
    ax.axvline(np.mean(networks["found"]["test"]), color=GREY, linewidth=0.8, zorder=0)
    ax.set_yticks(range(len(networks)), list(networks))
    ax.set(ylim=(len(networks) - 0.5, -0.5), xlabel=metric)


def draw_ranks(figure, ranked, params, metric):
    """Each network's loss with inherited weights against its metric when trained."""
    ax = figure.subplots()
    inherited, trained = ([line[key] for line in ranked] for key in ("inherited", "trained"))
    dots = ax.scatter(inherited, trained, c=np.array(params) / 1e6, s=28)
    figure.colorbar(dots, ax=ax, label="parameters, millions")
    ax.set(xlabel="loss with inherited weights", ylabel=f"{metric} when trained")


def report_figures(numbers, params, out):
    """Draws the figures of the report on the search in the folder `out`; returns {name: path}."""
    networks, ranked, metric = (numbers[key] for key in ("networks", "ranked", "metric"))
    folder = os.path.join(out, "report")
    figures = {"search": search_figure(out)}
    figures["networks"] = save_figure(
        os.path.join(folder, "networks.png"), 0.8 + 0.28 * len(networks),
        lambda figure: draw_networks(figure, networks, metric), width=5)
    if ranked:
        figures["ranks"] = save_figure(
            os.path.join(folder, "ranks.png"), 3.2,
            lambda figure: draw_ranks(figure, ranked, params, metric), width=5)
    return figures

# -----------------------------------------------------------------------------
# the page: blocks (kind, content, ...), as Markdown and as HTML

def number(value, metric, sign="-"):
    """As text: a loss with four decimals, an accuracy or dB with two. sign: "+" always shows it."""
    return f"{value:{sign}.{4 if 'loss' in metric else 2}f}"


def mean_and_std(values, metric):
    return f"{number(np.mean(values), metric)} ± {number(np.std(values, ddof=1), metric)}"


def network_blocks(numbers, figure):
    """The verdict, the table of networks with its figure, and what each of them is."""
    networks, config, metric = (numbers[key] for key in ("networks", "config", "metric"))
    rows, kinds, random_means = [], [], []
    for name, line in networks.items():
        row = [name, f"{line['params']:,} ({100 * line['used']:.1f}%)",
               mean_and_std(line["val"], metric), mean_and_std(line["test"], metric)]
        if "gain" in line:
            gain = f"{number(line['gain'], metric, '+')} ± {number(line['std'], metric)}"
            rows.append([*row, gain, f"{line['p']:.2g}", line["words"]])
        else:
            rows.append([*row, "", "", ""])
        description = DESCRIPTIONS[name.split()[0]].format(**config)
        kinds.append([name, f"{description}: `{text_of(line['arch'], config['space'])}`"])
        if name.startswith("random"):
            random_means.append(np.mean(line["test"]))

    start = "scratch"
    if config["init_from"] != "scratch":
        start = f"the weights in {config['init_from']}"
    seeds = ", ".join(map(str, config["seeds"]))
    means = ""
    if len(random_means) > 1:
        mean = mean_and_std(random_means, metric)
        means = f" The mean over the {len(random_means)} random networks is {mean}."
    head = ["network", "parameters", f"val {metric[5:]}", metric, "found is better by", "p",
            "found is"]
    blocks = [
        ("h1", f"Did the search pay? Space {config['space']}, {numbers['dataset']}"),
        ("verdict", numbers["verdict"]),
        ("p", f"Every network costs at most {numbers['budget']}; the brackets show the share of "
              f"it that is used. All were trained alike, from {start}, for {config['max_iters']} "
              f"steps, once with each of the seeds {seeds}. Values are mean ± standard deviation."),
        ("table", head, rows),
        ("p", f"Differences are in {metric}, paired by seed. p is that of Welch's t-test, not "
              "corrected for the number of rivals; two networks are told apart if it is below "
              f"{SIGNIFICANCE}.{means}"),
        ("figure", figure, f"The {metric} of every training. Bars are means; the line is the mean "
                           "of the found network."),
        ("table", ["network", "what it is"], kinds)]
    if not has_standard(config["space"]):
        blocks.append(("p", "This space has no standard shape, so that rival is left out."))
    return blocks


def cost_blocks(numbers):
    """What the search cost, and how many trainings that would have paid for."""
    cost = numbers["cost"]
    n_random = sum(name.startswith("random") for name in numbers["networks"])
    names = {"search": "the search", "found": "a training of what it found",
             "random": "a training of a random network" if n_random else "a training, in the mean"}
    rows = [[name, f"{cost[f'{key}_hours']:.3g}", f"{cost[f'{key}_flops']:.3g}"]
            for key, name in names.items()]
    by_hours = cost["search_hours"] / cost["random_hours"]
    before = ""
    if cost["before"]:
        names = " and ".join(cost["before"])
        before = f" What had been trained before, {names}, is not counted."
    return [
        ("h2", "What the search cost"),
        ("table", ["what", "hours", "FLOPs"], rows),
        ("p", f"The FLOPs of the search would have trained {cost['bought']:.1f} networks of equal "
              f"budget, its hours {by_hours:.1f}; random ones trained here: {n_random}. Hours are "
              "those of steps, without evaluations. A step of the weights counts as three forward "
              "passes, a step of the alphas as two, or as twelve with order=2. A mixture of sizes "
              "counts as the largest network, a mixture of operations as all of them. What spos "
              f"evaluates after its training is in its hours and FLOPs.{before}")]


def rank_blocks(numbers, figure):
    """Whether the supernet's inherited weights rank networks."""
    keys = ("tau", "tau_p", "rho", "rho_p")
    rows = [[name, *(f"{found[key]:.2g}" for key in keys)]
            for name, found in numbers["ranks"].items()]
    head = ["order by", "Kendall's tau", "p of tau", "Spearman's rho", "p of rho"]
    return [
        ("h2", "Does the supernet rank networks?"),
        ("p", f"{len(numbers['ranked'])} random networks of any size were scored with inherited "
              "weights and trained once. 1 is the same order, 0 is none. A supernet that orders "
              "networks no better than their number of parameters does knows nothing but size."),
        ("table", head, rows),
        ("figure", figure, "Each network's loss with inherited weights and its "
                           f"{numbers['metric']} when trained.")]


def page_blocks(numbers, figures):
    """The blocks of the page, from the numbers of report.json and the paths of the figures."""
    blocks = network_blocks(numbers, figures["networks"]) + cost_blocks(numbers)
    if numbers["ranked"]:
        blocks += rank_blocks(numbers, figures["ranks"])
    return [
        *blocks,
        ("h2", "The search"),
        ("figure", figures["search"], "The losses of the search and how its choices were made."),
        ("h2", "How this was made"),
        ("table", ["what", "value"], list(numbers["made"].items()))]


def to_markdown(blocks, folder):
    """The page as Markdown; paths of figures are relative to folder."""
    def row(cells):
        return "| " + " | ".join(text.replace("|", "\\|") for text in cells) + " |"

    def block(kind, first, second=""):
        if kind == "figure":
            return f"![{second}]({os.path.relpath(first, folder)})\n\n{second}"
        if kind == "table":
            return "\n".join([row(first), "|" + " --- |" * len(first), *map(row, second)])
        return {"h1": "# ", "h2": "## ", "verdict": "> ", "p": ""}[kind] + first
    return "\n\n".join(block(*b) for b in blocks) + "\n"


def to_html(blocks):
    """The page as one HTML file that holds its figures and loads nothing."""
    def text(value):
        return re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(value))

    def row(names, cells):
        cells = [f'<td data-label="{html.escape(name)}">{text(cell)}</td>'
                 for name, cell in zip(names, cells, strict=True)]
        return f"<tr>{''.join(cells)}</tr>\n"

    def block(kind, first, second=""):
        if kind == "figure":
            with open(first, "rb") as file:
                image = f"data:image/png;base64,{base64.b64encode(file.read()).decode()}"
            return (f'<figure><img alt="{html.escape(second)}" src="{image}">'
                    f"<figcaption>{text(second)}</figcaption></figure>")
        if kind == "table":
            head = "".join(f"<th>{text(name)}</th>" for name in first)
            body = "".join(row(first, cells) for cells in second)
            style = "text" if len(first) == 2 else "numbers"
            return (f'<table class="{style}"><thead><tr>{head}</tr></thead>\n'
                    f"<tbody>\n{body}</tbody></table>")
        if kind == "verdict":
            return f'<p class="verdict">{text(first)}</p>'
        return f"<{kind}>{text(first)}</{kind}>"

    body = "\n".join(block(*b) for b in blocks)
    viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">{viewport}
<title>{html.escape(blocks[0][1])}</title>
<style>{CSS}</style></head>
<body>
{body}
</body></html>
"""

# -----------------------------------------------------------------------------
# the script

def report(config):
    """Writes the report on the search in config["out_dir"]; returns its numbers (report.json)."""
    check_limits(SimpleNamespace(**config), LIMITS)
    check_rules(SimpleNamespace(**config), RULES)
    out, folder = config["out_dir"], os.path.join(config["out_dir"], "report")
    found = read_arch(os.path.join(out, "arch.json"), "")
    search, net, splits, loss_of = load_supernet(config)
    cost = search_cost(net, search, out)
    if search.prune_keep: # rivals may have any operation
        net = build(vars(search))
    os.makedirs(os.path.join(folder, "runs"), exist_ok=True)
    budget, archs, ranked = choose_networks(net, search, found, loss_of, config)

    def minutes_of(architectures):
        tested = len(splits["val"]) / splits["val"].units_per_sample(search)
        flops = [net.cost(arch)["flops"] for arch in architectures]
        total = sum(training_flops(one, config) + one * tested for one in flops)
        return 60 * cost["search_hours"] * total / cost["search_flops"]

    results = train_all(archs, ranked, found, minutes_of, config)
    networks = network_numbers(archs, results, budget, config)
    cost |= training_costs(networks, cost, config)
    _, metric, sign = metric_of(config)
    sentence, strongest = verdict(networks, cost["bought"], sign, metric)
    one_run = run_folder(found["arch"], as_list(config["seeds"])[0], found, config)
    run = read_json(os.path.join(one_run, "run.json"))
    numbers = {"verdict": sentence, "strongest": strongest, "metric": metric,
               "dataset": search.dataset, "networks": networks, "cost": cost,
               "budget": budget_text(budget), **rank_numbers(ranked, results, config),
               "config": config, "made": provenance(config, search, splits, run)}
    write_json(os.path.join(folder, "report.json"), numbers)

    params = [results[arch_key(arch), as_list(config["seeds"])[0]]["params"] for _, arch in ranked]
    blocks = page_blocks(numbers, report_figures(numbers, params, out))
    pages = {"report.md": to_markdown(blocks, folder), "report.html": to_html(blocks)}
    for name, text in pages.items():
        path = os.path.join(folder, name)
        atomic_write(path, lambda file, text=text: file.write(text.encode()))
    print(f"{sentence}\nreport: {os.path.join(folder, 'report.html')}")
    return numbers


def report_keys(argv):
    """The keys of a report, from OUT_DIR, config files and --key=value in argv.

    In a space other than the GPT's they include that space's keys, with the search's values.
    """
    argv = [arg if arg.startswith("-") or arg.endswith(".py") else f"--out_dir={arg}"
            for arg in argv]
    argv.sort(key=lambda arg: arg.startswith("--out_dir=")) # last: config files have an out_dir too
    if "--help" in argv or "-h" in argv:
        return configure(globals(), argv)
    path = os.path.join(given("out_dir", argv) or out_dir, "arch.json")
    found = read_arch(path, "")
    return configure(with_space(globals(), found["space"], found["model"], path), argv)


if __name__ == "__main__":
    main(report, report_keys(sys.argv[1:]))
