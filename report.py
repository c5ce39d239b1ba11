"""
Trains what a search found and its rivals of equal budget, and says whether the search paid.

    python report.py out/search                          # a laptop, about half an hour; it prints its estimate first
    python report.py out/search_pydocs_drnas config/base_pydocs.py --seeds=[1,2,3,4,5]     # longer, hence surer
    python report.py --help                              # every key with its default

OUT_DIR is that of a finished train_search.py. The rivals: the largest network that fits, nanoGPT's shape that fits (of GPTs), random
ones, and the best of more random ones by the supernet's inherited weights. Equal budget: the search's targets, or else the
parameters of what it found. The keys of train_base.py set how all of them are trained. Writes to OUT_DIR/report: report.html, which
holds its figures, report.md, whose figures lie beside it, report.json (the numbers), inherited.jsonl (losses with the supernet's
weights) and runs/ (the trainings). Nothing is done twice: a report that was stopped goes on, one of more seeds adds to it.
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
from tqdm import tqdm

from analyze import BLUE, GREY, RED, save_figure, search_figure
from budget import Budget, load_latency, make_budget, with_latency
from configurator import as_list, check_range, check_whole, configure, given
from fused_ops import use_fused_ops
from optim_nas import best_of, arch_key, random_search, uniform
from run import append, silenced, content_hash, load_checkpoint, load_model, read_json, read_lines
from run import resumes, rng, add_checksum, setup, verify_checksum, atomic_write, write_json
from search_spaces import build, describe, space_module, with_space
from supernet import check_arch, extremes
from train_base import read_arch, train_found
from train_search import read_phases, score, split_data
from train_base import * # noqa: F403 (every key of train_base.py)
from run import main
from train import check_run

# -----------------------------------------------------------------------------
# the keys of train_base.py but four, and:
del arch, arch_traj, genotype, table # noqa: F821 (what a report trains is its own choice)
out_dir = 'out/search' # of the search
seeds = [1, 2, 3] # of every network's trainings
latency_table = '' # '': the search's, if it had one
n_random = 3 # random networks of equal budget
n_pick = 50 # random networks of equal budget, of which the best with inherited weights is a rival; 0: none
n_rank = 20 # random networks of any size, trained once, on which the supernet's ranking is measured; 0: none
max_iters = 300
warmup_iters = 30
# -----------------------------------------------------------------------------

OWN = ("out_dir", "overwrite", "seed", "seeds", "latency_table", "n_random", "n_pick", "n_rank") # no part of a training's settings
SURE = 0.05 # the chance of a difference by luck below which two networks are told apart
KINDS = {"found": "by the search", "largest": "what uses most of the budget", "standard": "nanoGPT's proportions", "random": "drawn",
         "picked": "of {n_pick} drawn ones the best with inherited weights"}
CSS = """:root{color-scheme:light}
body{max-width:60rem;margin:0 auto;padding:1rem 1rem 3rem;font:16px/1.55 system-ui,sans-serif;color:#222;background:#fff}
h1{font-size:1.6rem;line-height:1.25}h2{font-size:1.2rem;margin:2.2rem 0 .6rem}
.verdict{padding:.8rem 1rem;border-left:5px solid #0072B2;background:#f3f6f9;font-size:1.1rem}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .5rem;border-bottom:1px solid #ddd;text-align:right;vertical-align:top}
th:first-child,td:first-child,.text th,.text td{text-align:left}
.numbers td{white-space:nowrap}.text td,code{overflow-wrap:anywhere}code{font-size:.9em;background:#f3f6f9}
figure{margin:1rem 0}img{max-width:100%;height:auto}figcaption{font-size:.9rem;color:#555}
@media(max-width:44rem){thead{display:none}table,tbody,tr{display:block}tr{padding:.5rem 0;border-bottom:1px solid #ccc}
td{display:flex;justify-content:space-between;gap:1rem;padding:.1rem 0;border:0}td:first-child{font-weight:600}
td+td::before{content:attr(data-label);color:#666;flex:none}td:empty{display:none}.text td{display:block}.text td::before{display:none}}"""

# -----------------------------------------------------------------------------
# the rivals

def load_supernet(config):
    """The finished search in config["out_dir"]: its config, its network with the trained weights, its data, and score_of(arch) -> the loss
    with these weights on the alphas' part of the data, which report/inherited.jsonl remembers."""
    path = os.path.join(config["out_dir"], "ckpt.pt")
    checkpoint = load_checkpoint(path, "cpu")
    if checkpoint["chooser"]["mask"] and (config["n_pick"] or config["n_rank"]):
        raise SystemExit("This progressive search has pruned operations, so that its supernet has weights for a few networks alone: give "
                         "--n_pick=0 --n_rank=0.")
    own = {key: config[key] for key in ("device", "data_dir", "latency_table") if config[key]}
    own |= dict(out_dir=config["out_dir"], init_from="resume", zero_stage=0) # with the vocabulary that the run has
    search = SimpleNamespace(**checkpoint["config"] | own)
    check_run(search)
    run = setup(search)
    if run.world > 1:
        raise SystemExit(f"A report is made by one process, not by {run.world}: start it by python, without torchrun.")
    splits = split_data(search, run)
    use_fused_ops(search.fused and run.device_type == "cpu" and search.space != "gpt")
    net = build(vars(search)).to(run.device)
    if checkpoint["chooser"]["mask"]:
        net.prune(checkpoint["chooser"]["mask"])
    load_model(net, checkpoint, path)

    supernet, memory = content_hash(checkpoint["model"])[:12], os.path.join(config["out_dir"], "report", "inherited.jsonl")
    lines = [verify_checksum(line, memory) for line in read_lines(memory)] if os.path.exists(memory) else []
    if lines:
        atomic_write(memory, lambda f: f.write("".join(json.dumps(add_checksum(line)) + "\n" for line in lines).encode())) # without a line cut off
    known = {arch_key(line["arch"]): line["loss"] for line in lines if line["supernet"] == supernet}

    def score_of(arch):
        if arch_key(arch) not in known:
            known[arch_key(arch)] = score(net, net, arch, splits, search, run)["loss"]
            append(memory, add_checksum({"supernet": supernet, "arch": arch, "loss": known[arch_key(arch)]}))
        return known[arch_key(arch)]
    return search, net, splits, score_of


def text_of(arch, space):
    """The same words for the same network: an arch may also choose for blocks that it does not have."""
    return getattr(space_module(space), "genotype", describe)(arch)


def largest(choices, budget, generator, text=arch_key, other_than=None):
    """The architecture that uses most of the budget, of those that climbs from random ones end at. other_than: one that it is not to be,
    under the name that text() gives; None if all of them are that one."""
    def utilization(arch, cost):
        share = budget.utilization(cost)
        return share if share <= 1 else -share
    ends = [check_arch(choices, budget.hill_climb(budget.with_all_layers(uniform(choices, generator)), used, generator)) for _ in range(20)]
    taken = [text(arch) for arch in (other_than,) if arch]
    return max((arch for arch in ends if text(arch) not in taken), key=lambda arch: used(arch, budget.cost_of(arch)), default=None)


def standard(choices, budget, head_size=0):
    """nanoGPT's shape, all layers alike: heads of 64 channels, mlp_ratio 4 and 64 channels of width a layer, or what the space has closest
    to it; of all depths and widths those that use at least nine tenths of the budget that the best uses; None if none fits."""
    def nearest(name, value): # by its ratio
        return min(choices[name].options, key=lambda option: abs(math.log(option / value)))
    found = []
    for depth, width in itertools.product(choices["n_layer"].options, choices["n_embd"].options):
        rows = {"n_head": nearest("n_head", width / (head_size or 64)), "mlp_ratio": nearest("mlp_ratio", 4)}
        arch = {"n_layer": depth, "n_embd": width, **{name: [value] * depth for name, value in rows.items()}}
        found.append((budget.utilization(budget.cost_of(arch)), abs(math.log(width / depth / 64)), {name: arch[name] for name in choices}))
    fitting = [entry for entry in found if entry[0] <= 1]
    most = max((used for used, *_ in fitting), default=0)
    return min((entry[1:] for entry in fitting if entry[0] >= 0.9 * most), key=lambda entry: entry[0], default=(0, None))[1]


def networks_of(net, found, budget, score_of, config, own=False):
    """{name: architecture} of what is compared, equal ones for equal networks; all but the first are rivals. own: the budget is what the
    found network costs, which is then the largest by definition."""
    text, first = partial(text_of, space=found["space"]), {}
    other_than = found["arch"] if own else None
    rivals = {"found": found["arch"], "largest": largest(budget.drawn, budget, rng(config["seed"], "largest"), text, other_than)}
    if found["space"] == "gpt":
        rivals["standard"] = standard(net.choices, budget, found["model"]["head_size"])
    if config["n_pick"]:
        rivals["picked"] = best_of(random_search(budget.drawn, score_of, config["n_pick"], rng(config["seed"], "pick"), budget))[1]
    drawn = random_search(budget.drawn, lambda arch: 0.0, config["n_random"], rng(config["seed"], "random"), budget)
    rivals |= {f"random {i}": arch for i, (_, arch) in enumerate(drawn, 1)}
    return {name: first.setdefault(text(arch), arch) for name, arch in rivals.items() if arch}

# -----------------------------------------------------------------------------
# the trainings

def run_folder(arch, seed, found, config):
    """Where this training is: the name tells every setting, so that none is taken for another."""
    settings = {key: value for key, value in config.items() if key not in OWN}
    name = content_hash([arch_key(arch), found["model"], found["dataset"], found["data_dir"], settings, seed])[:12]
    return os.path.join(config["out_dir"], "report", "runs", name)


def train_one(folder, arch, seed, found, config):
    """The result.json of a training: of before, of the rest of one that was stopped, or of a new one."""
    if not os.path.exists(os.path.join(folder, "result.json")):
        write_json(f"{folder}.json", {key: found[key] for key in ("space", "model", "dataset", "data_dir")} | {"arch": arch})
        job = dict(arch=f"{folder}.json", arch_traj="", genotype="", table="", seed=seed, out_dir=folder, overwrite=False)
        job["init_from"] = "resume" if os.path.exists(os.path.join(folder, "run.json")) else config["init_from"]
        with silenced():
            train_found(config | job)
        for name in ("ckpt.pt", "ckpt.prev.pt"): # best.pt stays
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(folder, name))
    return read_json(os.path.join(folder, "result.json"))


def training_flops(flops, config):
    return 3 * flops * config["batch_size"] * config["gradient_accumulation_steps"] * config["max_iters"] # backward costs two forwards


def search_flops(net, search, evaluated, first=None):
    """FLOPs of a search: its steps, and its `evaluated` networks with inherited weights. first: the network of the first half of a
    progressive search.

    A mixture of sizes computes what the largest network does, one of operations all of them; gdas and spos compute an architecture. The
    step of the weights costs three forward passes; that of the alphas two, for it needs no weight gradients; of second order twelve.
    A teacher's answers count as one of this network. What was trained before the search, a teacher or a GPT-2, is not counted."""
    def flops_of(net, drawn):
        if search.optimizer in ("gdas", "spos"):
            weights = {name: torch.tensor([(o in drawn[name].options) / len(drawn[name].options) for o in c.options]).expand(c.shape)
                       for name, c in net.choices.items()}
        else:
            operations = all(isinstance(option, str) for c in net.choices.values() for option in c.options)
            weights = {name: torch.ones(c.shape) for name, c in net.choices.items()} if operations else extremes(net.choices)[1]
        return float(net.cost(weights)["flops"]) * search.batch_size
    phases, alphas = read_phases(net.choices, search), {"spos": 0}.get(search.optimizer, 12 if search.order == 2 else 2)
    parts = [(net, phase.choices, phase.config.subnets_per_step, phase.config.max_iters) for phase in phases]
    if first:
        half = search.max_iters // 2
        parts = [(net, net.choices, search.subnets_per_step, steps) for net, steps in ((first, half), (net, search.max_iters - half))]
    return evaluated * search.eval_iters * flops_of(net, phases[-1].choices) + sum(
        ((3 * draws + bool(search.teacher)) * steps + alphas * max(0, steps - search.arch_warmup_iters)) *
        search.gradient_accumulation_steps * flops_of(part, drawn) for part, drawn, draws, steps in parts)


def search_cost(net, search, out):
    """{"before": what had been trained, "search_hours", "search_flops"} of the finished search in the folder `out`."""
    began, evaluations = read_json(os.path.join(out, "run.json"))["config"], os.path.join(out, "arch_search.jsonl") # of spos
    first = build(vars(search) | {"partial_channels": began.get("partial_channels", 1)}) if search.prune_keep else None
    return {"before": [name for name in dict.fromkeys((search.inherit, search.teacher, began["init_from"])) if name not in ("", "scratch")],
            "search_hours": read_json(os.path.join(out, "result.json"))["seconds"] / 3600,
            "search_flops": search_flops(net, search, len(read_lines(evaluations)) if os.path.exists(evaluations) else 0, first)}

# -----------------------------------------------------------------------------
# the numbers

def compare(found, rival, sign):
    """How much better found is than a rival, paired by seed: {"gain", "std", "p" (Welch's t-test), "words"}. sign: 1 of losses, -1 of
    accuracies."""
    from scipy.stats import ttest_ind # it comes with scikit-learn
    found, rival = np.array(found), np.array(rival)
    differences = sign * (rival - found)
    constant = np.ptp(found) == np.ptp(rival) == 0
    p = float(not differences.any()) if constant else float(ttest_ind(found, rival, equal_var=False).pvalue)
    words = "not told apart" if not p < SURE else "better" if differences.mean() > 0 else "worse"
    return {"gain": differences.mean(), "std": differences.std(ddof=1), "p": p, "words": words}


def number(value, what, sign="-"):
    """As text: of a loss four decimals, of an accuracy or of dB two. sign: "+" shows it always."""
    return f"{value:{sign}.{4 if 'loss' in what else 2}f}"


def mean_of(values, what):
    return f"{number(np.mean(values), what)} ± {number(np.std(values, ddof=1), what)}"


def verdict(networks, bought, sign, what="test loss"):
    """(sentence that says whether the search paid, the name of the strongest rival): of the rivals that need no search, and of as many
    random ones as its cost would have trained besides, the best in validation, compared on the test data.

    networks: name -> {"val": [a value a seed], "test": [...]}."""
    draws = [name for name in networks if name.startswith("random")][:1 + int(bought)]
    rivals = [name for name in networks if name in ("largest", "standard", *draws)]
    if not rivals:
        return "Nothing can be said: no other network of the space has the same budget.", None
    best = min(rivals, key=lambda name: sign * np.mean(networks[name]["val"]))
    if networks[best]["arch"] == networks["found"]["arch"]:
        return f"The search did not pay: what it found is {best}, which needs no search.", best
    found = compare(networks["found"]["test"], networks[best]["test"], sign)
    test = f"in {what} (Welch's t-test, p = {found['p']:.2g}, {len(networks['found']['test'])} seeds)"
    rival = f"{best}, the strongest rival of equal budget that needs no search"
    if found["words"] == "not told apart":
        return ("Whether the search paid cannot be told with these seeds: the found network cannot be told apart from "
                f"{rival}; they differ by {number(abs(found['gain']), what)} {test}."), best
    if found["gain"] > 0:
        return f"The search paid: the found network is better than {rival}, by {number(found['gain'], what)} {test}.", best
    return f"The search did not pay: the found network is worse than {rival}, by {number(-found['gain'], what)} {test}.", best


def ranks(predictors, trained):
    """{predictor: {"tau", "tau_p", "rho", "rho_p"}}: Kendall's and Spearman's correlation with what small values of `trained` say; without
    a predictor that says the same of all."""
    from scipy.stats import kendalltau, spearmanr
    found = {}
    for name, values in ((name, values) for name, values in predictors.items() if len(set(values)) > 1 < len(set(trained))):
        tau, rho = kendalltau(values, trained), spearmanr(values, trained)
        found[name] = {"tau": float(tau.statistic), "tau_p": float(tau.pvalue), "rho": float(rho.statistic), "rho_p": float(rho.pvalue)}
    return found

# -----------------------------------------------------------------------------
# figures and pages

def draw_networks(figure, networks, what):
    """A row a network: a dot a seed, a bar at their mean."""
    ax = figure.subplots()
    for y, (name, network) in enumerate(networks.items()):
        color = RED if name == "found" else BLUE
        ax.plot(network["test"], [y] * len(network["test"]), "o", color=color, markersize=5, alpha=0.6, mew=0)
        ax.plot([np.mean(network["test"])] * 2, [y - 0.3, y + 0.3], color=color, linewidth=2)
    ax.axvline(np.mean(networks["found"]["test"]), color=GREY, linewidth=0.8, zorder=0)
    ax.set_yticks(range(len(networks)), list(networks))
    ax.set(ylim=(len(networks) - 0.5, -0.5), xlabel=what)


def draw_ranks(figure, inherited, trained, params, what):
    ax = figure.subplots()
    dots = ax.scatter(inherited, trained, c=np.array(params) / 1e6, s=28)
    figure.colorbar(dots, ax=ax, label="parameters, millions")
    ax.set(xlabel="loss with inherited weights", ylabel=f"{what} when trained")


def to_markdown(blocks, folder):
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
    def text(value):
        return re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(value))

    def row(names, cells):
        return "<tr>" + "".join(f'<td data-label="{html.escape(n)}">{text(c)}</td>' for n, c in zip(names, cells, strict=True)) + "</tr>\n"

    def block(kind, first, second=""):
        if kind == "figure":
            with open(first, "rb") as f:
                image = f"data:image/png;base64,{base64.b64encode(f.read()).decode()}"
            return f'<figure><img alt="{html.escape(second)}" src="{image}"><figcaption>{text(second)}</figcaption></figure>'
        if kind == "table":
            head, body = "".join(f"<th>{text(name)}</th>" for name in first), "".join(row(first, cells) for cells in second)
            kind = "text" if len(first) == 2 else "numbers"
            return f'<table class="{kind}"><thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table>'
        return f'<p class="verdict">{text(first)}</p>' if kind == "verdict" else f"<{kind}>{text(first)}</{kind}>"
    body = "\n".join(block(*b) for b in blocks)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(blocks[0][1])}</title>
<style>{CSS}</style></head>
<body>
{body}
</body></html>
"""


def pages(numbers, figures):
    """The blocks of the report, (kind, content, ...), from its numbers and the paths of its figures."""
    nets, cost, config, what = (numbers[key] for key in ("networks", "cost", "config", "metric"))
    rows = [[name, f"{n['params']:,} ({100 * n['used']:.1f}%)", mean_of(n["val"], what), mean_of(n["test"], what),
             *([f"{number(n['gain'], what, '+')} ± {number(n['std'], what)}", f"{n['p']:.2g}", n["words"]] if "gain" in n else 3 * [""])]
            for name, n in nets.items()]
    kinds = [[name, f"{KINDS[name.split()[0]].format(**config)}: `{text_of(n['arch'], config['space'])}`"] for name, n in nets.items()]
    drawn = [np.mean(n["test"]) for name, n in nets.items() if name.startswith("random")]
    start = "scratch" if config["init_from"] == "scratch" else f"the weights in {config['init_from']}"
    means = f" The means of the {len(drawn)} random ones: {mean_of(drawn, what)}." if len(drawn) > 1 else ""
    before = " What had been trained before, {}, is not.".format(" and ".join(cost["before"])) if cost["before"] else ""
    blocks = [
        ("h1", f"Did the search pay? Space {config['space']}, {numbers['dataset']}"),
        ("verdict", numbers["verdict"]),
        ("p", f"Every network costs at most {numbers['budget']} (in brackets: the share of that in use), and was trained alike, from "
              f"{start}, for {config['max_iters']} steps, with each of the seeds {', '.join(map(str, config['seeds']))}: mean ± standard "
              "deviation."),
        ("table", ["network", "parameters", f"val {what[5:]}", what, "found is better by", "p", "found is"], rows),
        ("p", f"The difference is that in {what}, paired by seed. p is of Welch's t-test, not corrected for the number of rivals; below "
              f"{SURE} two networks are told apart.{means}"),
        ("figure", figures["networks"], f"The {what} of every training; bars are means, the line is that of the found network."),
        ("table", ["network", "what it is"], kinds)]
    if config["space"] != "gpt":
        blocks.append(("p", "This space has no standard shape, so that rival is left out."))
    blocks += [
        ("h2", "What the search cost"),
        ("table", ["what", "hours", "FLOPs"], [[name, f"{cost[f'{key}_hours']:.3g}", f"{cost[f'{key}_flops']:.3g}"] for key, name in (
            ("search", "the search"), ("found", "a training of what it found"),
            ("random", "a training of a random network" if drawn else "a training, in the mean"))]),
        ("p", f"Its FLOPs would have trained {cost['bought']:.1f} networks of equal budget, its hours "
              f"{cost['search_hours'] / cost['random_hours']:.1f}; random ones trained here: {len(drawn)}. Hours are of steps, without "
              "evaluations. A step of the weights counts as three forward passes, one of the alphas as two, of second order as twelve; a "
              "mixture of sizes as the largest network, one of operations as all of them. The architectures that spos evaluates after its "
              f"training are in its hours and FLOPs.{before}")]
    if numbers["ranked"]:
        ranks = [[name, *(f"{r[key]:.2g}" for key in ("tau", "tau_p", "rho", "rho_p"))] for name, r in numbers["ranks"].items()]
        blocks += [
            ("h2", "Does the supernet rank networks?"),
            ("p", f"{len(numbers['ranked'])} random networks of any size, with inherited weights and trained once: 1 is the same "
                  "order, 0 none. A supernet that orders them no better than their number of parameters does knows nothing besides size."),
            ("table", ["order by", "Kendall's tau", "p of tau", "Spearman's rho", "p of rho"], ranks),
            ("figure", figures["ranks"], f"Each network's loss with inherited weights and its {what} when trained.")]
    return [*blocks, ("h2", "The search"), ("figure", figures["search"], "The losses of the search and how its choices were made."),
            ("h2", "How this was made"), ("table", ["what", "value"], list(numbers["made"].items()))]


def made_by(config, search, splits, run):
    """Commands, commit, machine, data and settings, in words. run: the run.json of one of the trainings."""
    first = read_json(os.path.join(config["out_dir"], "run.json"))
    keys = ("batch_size", "gradient_accumulation_steps", "learning_rate", "min_lr", "warmup_iters", "weight_decay", "val_portion")
    machine = f"{run['device']} in {run['dtype']}, {platform.processor() or platform.machine()}, PyTorch threads: {torch.get_num_threads()}"
    unit = "tokens" if config["space"] == "gpt" else "images"
    return {"search": f"`python {shlex.join(first['argv'])}`", "report": f"`python {shlex.join(sys.argv)}`",
            "commit": " and ".join(dict.fromkeys(r["commit"] or "unknown" for r in (first, run))), "machine": machine,
            "versions": ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
            "data": f"{search.dataset}, {unit}: " + ", ".join(f"{len(data):,} {use}" for data, use in zip(
                splits.values(), ("for the supernet's weights", "for its alphas", "of test"), strict=True)),
            "seeds": f"{search.seed} of the search, {', '.join(map(str, config['seeds']))} of the trainings",
            "trainings": ", ".join(f"{key} {run['config'][key]}" for key in keys)}


def report(config):
    """Writes the report of the search in config["out_dir"]; returns its numbers, those of report.json."""
    out, seeds = config["out_dir"], as_list(config["seeds"])
    folder = os.path.join(out, "report")
    check_whole(SimpleNamespace(**config), "seeds")
    if len(set(seeds)) < max(2, len(seeds)):
        raise SystemExit(f"seeds={seeds} must be two or more different ones, such as --seeds=[1,2,3].")
    if resumes(SimpleNamespace(**config)):
        raise SystemExit(f"init_from='{config['init_from']}' is how a training goes on, and a report does so by itself: leave it out.")
    check_range(SimpleNamespace(**config), 0, "n_random", "n_pick", "n_rank")
    check_range(SimpleNamespace(**config), 1, "max_iters")
    if config["n_rank"] in (1, 2):
        raise SystemExit(f"n_rank={config['n_rank']} networks have no order to speak of: take 3 or more, or 0.")
    if not config["val_portion"]:
        raise SystemExit("val_portion=0.0 leaves nothing to choose the strongest rival by: give a share, such as --val_portion=0.1.")
    if not os.path.exists(os.path.join(out, "result.json")):
        raise SystemExit(f"{out} holds no finished search: end it by python train_search.py --init_from=resume, or name another OUT_DIR.")
    found = read_arch(os.path.join(out, "arch.json"), "")
    search, net, splits, score_of = load_supernet(config)
    cost = search_cost(net, search, out)
    net = build(vars(search)) if search.prune_keep else net # rivals may have any operation
    os.makedirs(os.path.join(folder, "runs"), exist_ok=True)
    predict = load_latency(net, search)
    given = make_budget(net, search, lambda arch: with_latency(net, arch, predict), read_phases(net.choices, search)[-1].choices)
    budget = given or Budget(net.choices, net.cost, {"params": net.cost(found["arch"])["params"]},
                             drawn=read_phases(net.choices, search)[-1].choices)
    with tqdm(desc="inherited weights", unit=" networks", total=config["n_pick"] + config["n_rank"]) as bar:
        def scored(arch):
            bar.update()
            return score_of(arch)
        archs = networks_of(net, found, budget, scored, config, own=not given)
        history = random_search(budget.drawn, scored, config["n_rank"], rng(config["seed"], "rank"))
    inherited, ranked = [loss for loss, _ in history], [arch for _, arch in history]

    jobs = {run_folder(arch, seed, found, config): (arch, seed)
            for arch, seed in [*itertools.product(archs.values(), seeds), *((arch, seeds[0]) for arch in ranked)]}
    left = [arch for path, (arch, _) in jobs.items() if not os.path.exists(os.path.join(path, "result.json"))]
    tested = len(splits["val"]) / (search.block_size if config["space"] == "gpt" else 1)
    flops = sum(training_flops(f := net.cost(arch)["flops"], config) + f * tested for arch in left)
    minutes = 60 * cost["search_hours"] * flops / cost["search_flops"]
    print(f"{len(jobs)} trainings of {config['max_iters']} steps, of which {len(left)} are left: about {minutes:.0f} minutes at the "
          "speed of the search")
    results = {(arch_key(arch), seed): train_one(path, arch, seed, found, config)
               for path, (arch, seed) in tqdm(jobs.items(), desc="report", unit=" trainings")}

    key = next((key for key in ("acc", "psnr") if f"test_{key}" in next(iter(results.values()))), "loss")
    sign, what = 1 if key == "loss" else -1, {"acc": "test accuracy in %", "psnr": "test PSNR in dB", "loss": "test loss"}[key]
    nets = {}
    for name, arch in archs.items():
        runs = [results[arch_key(arch), seed] for seed in seeds]
        val, test = ([r[part] for r in runs] for part in (f"best_val_{key}", f"test_{key}"))
        nets[name] = {"arch": arch, "params": runs[0]["params"], "flops": runs[0]["flops"], "used": budget.utilization(budget.cost_of(arch)),
                      "hours": np.mean([r["seconds"] for r in runs]) / 3600, "val": val, "test": test,
                      **(compare(nets["found"]["test"], test, sign) if nets else {})}
    draws = [n for name, n in nets.items() if name.startswith("random")] or list(nets.values())
    for name, group in (("found", [nets["found"]]), ("random", draws)):
        cost |= {f"{name}_hours": np.mean([n["hours"] for n in group]),
                 f"{name}_flops": training_flops(np.mean([n["flops"] for n in group]), config)}
    cost["bought"] = cost["search_flops"] / cost["random_flops"]
    trained, params = ([results[arch_key(arch), seeds[0]][name] for arch in ranked] for name in (f"test_{key}", "params"))
    said, strongest = verdict(nets, cost["bought"], sign, what)
    units = {"params": "{:,} parameters", "flops": "{:,} FLOPs", "latency": "{:.3g} ms"}
    bounds = " and ".join(units[name].format(target) for name, target in budget.targets.items())
    numbers = {"verdict": said, "strongest": strongest, "metric": what, "dataset": search.dataset, "networks": nets, "cost": cost,
               "budget": bounds, "ranked": [{"arch": arch, "inherited": a, "trained": b} for arch, a, b in zip(
                   ranked, inherited, trained, strict=True)],
               "ranks": ranks({"loss with inherited weights": inherited, "number of parameters": [-n for n in params]},
                              sign * np.array(trained)) if ranked else {},
               "config": config, "made": made_by(config, search, splits, read_json(os.path.join(next(iter(jobs)), "run.json")))}
    write_json(os.path.join(folder, "report.json"), numbers)
    figures = {"search": search_figure(out), "networks": save_figure(
        os.path.join(folder, "networks.png"), 0.8 + 0.28 * len(nets), lambda figure: draw_networks(figure, nets, what), 5)}
    if ranked:
        figures["ranks"] = save_figure(os.path.join(folder, "ranks.png"), 3.2, lambda figure: draw_ranks(
            figure, inherited, trained, params, what), 5)
    blocks = pages(numbers, figures)
    for name, content in (("report.md", to_markdown(blocks, folder)), ("report.html", to_html(blocks))):
        atomic_write(os.path.join(folder, name), lambda f, content=content: f.write(content.encode()))
    print(f"{said}\nreport: {os.path.join(folder, 'report.html')}")
    return numbers


def keys(argv):
    """The keys of a report from the words of its command, OUT_DIR, config files and --key=value; of another space than the GPT's with that
    space's keys, as the search had them."""
    argv = sorted((arg if arg.startswith("-") or arg.endswith(".py") else f"--out_dir={arg}" for arg in argv),
                  key=lambda arg: arg.startswith("--out_dir=")) # last: config files name an out_dir of their own
    if "--help" in argv or "-h" in argv:
        return configure(globals(), argv)
    found = read_arch(os.path.join(given("out_dir", argv) or out_dir, "arch.json"), "")
    return configure(with_space(globals(), found["space"], found["model"]), argv)


if __name__ == "__main__":
    main(report, keys(sys.argv[1:]))
