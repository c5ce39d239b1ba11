"""
Draws the figures of a run from the files that it wrote, also while it runs, and prints a summary.

    python analyze.py --out_dir=out/search      # of train_search.py
    python analyze.py --out_dir=out/base        # of train.py or train_base.py
    python analyze.py --out_dir=out/rl          # of train_rl.py
    python analyze.py --out_dir=out/base_swinir_samples --images=sr_samples     # PSNR and SSIM
    python analyze.py --out_dir=out/rl --compare=numbers:out/rl_numbers_*,random:out/rl_random_*

Writes to out_dir: search.png (losses, gap, weights of the options) for a search, loss.png for a
training; aggregate.png, frames.png, two.png, regret.png and surface.png for train_rl.py. With
--images=NAME it writes NAME.png, pictures beside those of bicubic interpolation; with --compare a
regret.png of groups of train_rl.py runs. train_search.py and train_rl.py end with this script.
"""
import glob
import os

import numpy as np
from tqdm import tqdm

from budget import nondominated_sort
from configurator import as_list, configure
from optim_nas import METHODS
from run import (add_checksum, atomic_write, load_checkpoint, load_model, pick_device, read_json,
                 read_lines)
from search_spaces import build, data_kind, describe

# -----------------------------------------------------------------------------
out_dir = 'out/search' # of the run
compare = '' # label:pattern,label:pattern: groups of train_rl.py runs, whose regrets are compared
images = '' # a data set of pairs of images, such as set5, on whose val split a network is scored
# -----------------------------------------------------------------------------

# safe for colour-blind readers (Okabe & Ito 2008)
BLUE, RED, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "0.75"
STYLE = {"font.size": 9, "axes.titlesize": 9, "legend.fontsize": 8.5, "legend.frameon": False,
         "lines.linewidth": 1.4, "lines.markersize": 3, "axes.linewidth": 0.6,
         "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 140}
STAR = {"marker": "*", "color": RED, "mec": "black", "mew": 0.5, "ls": "none", "clip_on": False,
        "zorder": 9}
MANY_OPTIONS = 100 # above it, search.png shows only the last weights
LOSSES = ("arch_loss", "mixture_loss", "gap", "val_arch_loss", "train_loss", "val_loss", "val_acc",
          "val_psnr") # the columns of the summary
COSTS = {"params": "parameters", "flops": "FLOPs", "kv_cache": "bytes of KV cache",
         "latency": "latency, ms"}
RL_QUANTITIES = {"reward": "reward", "loss": "loss", "ppl": "perplexity",
                 "time": "time, ms a sample", "value": "value (normalised)"}

# -----------------------------------------------------------------------------
# what the logs hold

def read_evaluations(path, key):
    """The lines of a .jsonl file that hold key, at least one; SystemExit if there is none yet."""
    lines = [line for line in read_lines(path) if key in line]
    if not lines:
        raise SystemExit(f"{path} holds no evaluation yet: wait for the run's first one.")
    return lines


def by_step(lines):
    """The last line of each step, in order; a resumed run logs some steps a second time."""
    newest = {line["step"]: line for line in lines}
    return [newest[step] for step in sorted(newest)]


def best_evaluation(lines):
    """The evaluation that a run keeps.

    Of a search the one with the lowest loss of the architecture. Of a training the one with the
    highest validation accuracy or PSNR, else the lowest validation loss, else the last.
    """
    def score(line):
        for key, sign in (("arch_loss", 1), ("val_acc", -1), ("val_psnr", -1), ("val_loss", 1)):
            if key in line:
                return sign * line[key]
        return -line["step"]
    return min(lines, key=score)


def kept_evaluation(out_dir, lines):
    """The evaluation in arch.json; the best of the lines while there is no such file.

    The two differ for a progressive search, which keeps the best of its second half.
    """
    path = os.path.join(out_dir, "arch.json")
    kept = add_checksum(read_json(path)) if os.path.exists(path) else None
    return next((line for line in lines if line == kept), best_evaluation(lines))


def choice_rows(line):
    """(choice, name, weights, used) of every row of weights with two or more options.

    name: such as n_embd, or n_head.0 for layer 0. used: False for layers beyond the depth.
    """
    for choice, weights in line["weights"].items():
        per_layer = isinstance(weights[0], list)
        for layer, row in enumerate(weights if per_layer else [weights]):
            if len(row) > 1:
                name = f"{choice}.{layer}" if per_layer else choice
                yield choice, name, row, not per_layer or layer < len(line["arch"][choice])


def weight_history(lines, config):
    """Labels such as "n_head.0 4", and the weights (len(labels), len(lines)) of these options.

    lines: of arch_traj.jsonl. config: the run's, for lines without "options". Options that neither
    lists are labelled by index.
    """
    labels = []
    for choice, name, row, _ in choice_rows(lines[0]):
        options = lines[0].get("options", config).get(choice)
        if not isinstance(options, list) or len(options) != len(row):
            options = range(len(row))
        labels += [f"{name} {option}" for option in options]
    weights = [[weight for _, _, row, _ in choice_rows(line) for weight in row] for line in lines]
    return labels, np.array(weights).T

# -----------------------------------------------------------------------------
# what all figures share

def save_figure(path, height, draw, width=9):
    """Calls draw(figure), then writes the figure, `width` by `height` inches; returns path."""
    # imported late, so that a script which draws only at its end starts fast; no pyplot, which
    # would change the backend and the open figures of a notebook
    import matplotlib
    from matplotlib.figure import Figure
    with matplotlib.rc_context(STYLE):
        figure = Figure((width, height), layout="constrained")
        draw(figure)
        atomic_write(path, lambda file: figure.savefig(file, format="png"))
    return path


def draw_curves(ax, lines, curves):
    """One curve for each (key, color, style, label) that some of the lines hold."""
    for key, color, style, label in curves:
        found = by_step(line for line in lines if key in line)
        if found:
            steps, values = [line["step"] for line in found], [line[key] for line in found]
            ax.plot(steps, values, style, color=color, label=label,
                    linewidth=1.4 if "o" in style else 0.7, markersize=min(3, 150 / len(found)))


def draw_legend(ax):
    """A legend above the panel, where it hides no curve."""
    return ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0.2)


def draw_shared_legend(figure, ax):
    """A legend above all panels of a figure, with the labels of one of them."""
    return figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=4)

# -----------------------------------------------------------------------------
# search.png

def draw_search_losses(ax, log, lines, best):
    """Losses of the supernet and of the architecture read off it; a star at the best one."""
    draw_curves(ax, [line for line in log if "loss" in line], [("loss", GREY, "-", "training")])
    draw_curves(ax, lines, [("mixture_loss", BLUE, "o-", "supernet"),
                            ("arch_loss", RED, "o-", "architecture"),
                            ("val_arch_loss", GREEN, "o--", "architecture, val")])
    star, = ax.plot(best["step"], best["arch_loss"], markersize=11, **STAR)
    sizes = {name: value for name, value in best["arch"].items() if not isinstance(value, list)}
    facts = [describe(sizes), f"{best['cost']['params']:,} parameters"]
    text = "best: " + ", ".join(filter(None, facts))
    ax.figure.legend([star], [text], loc="outside upper right")
    draw_legend(ax)
    ax.set_ylabel("loss")


def draw_gap(ax, lines):
    """The architecture's loss minus the supernet's."""
    ax.axhline(0, color="0.3", linewidth=0.6)
    draw_curves(ax, lines, [("gap", PURPLE, "o-", None)])
    ax.set_ylabel("gap")


def draw_benchmark(ax, lines):
    """The accuracy that a table of trained architectures gives the ones that were found."""
    draw_curves(ax, lines, [("table_accuracy", GREEN, "o-", "architecture, in the table")])
    top = lines[-1]["table_accuracy"] + lines[-1]["table_regret"]
    label = f"best of {lines[-1]['table_of']:,}"
    ax.axhline(top, color="0.3", linewidth=0.8, ls="--", label=label)
    draw_legend(ax)
    ax.set_ylabel("accuracy, %")


def draw_weight_history(ax, labels, weights, lines, best, column):
    """A heat map of the weights over the steps, white lines between choices, stars at the best.

    labels, weights: of weight_history(). column: the width of the first and last one, in steps.
    """
    steps = np.array([line["step"] for line in lines])
    middles = (steps[1:] + steps[:-1]) / 2
    edges = np.concatenate([[steps[0] - column / 2], middles, [steps[-1] + column / 2]])
    mesh = ax.pcolormesh(edges, np.arange(len(labels) + 1), weights, vmin=0, vmax=1)
    shrink = min(1, 30 / len(labels))
    ax.figure.colorbar(mesh, ax=ax, label="weight", pad=0.01, fraction=0.03, aspect=30,
                       shrink=shrink, anchor=(0, 1))

    start, previous, names = 0, None, {} # names: {height: name of a row}
    for choice, name, row, used in choice_rows(best):
        if start:
            ax.axhline(start, color="white", linewidth=0.6 if choice == previous else 2.5)
        if used:
            place = start + chosen_index(best, choice, name, row) + 0.5
            ax.plot(best["step"], place, markersize=6, **STAR)
        names[start + len(row) / 2] = name
        start, previous = start + len(row), choice

    options = [label.split(" ", 1)[1] for label in labels]
    ax.set_yticks(np.arange(len(labels)) + 0.5, options, minor=True, fontsize=6.5)
    ax.set_yticks(list(names), list(names.values()), fontsize=7.5)
    ax.yaxis.remove_overlapping_locs = False # a name and an option may have the same height
    ax.tick_params(axis="y", which="both", length=0, pad=2)
    left_of_options = 8 + 4 * max(map(len, options)) # points
    ax.tick_params(axis="y", which="major", pad=left_of_options)
    ax.set_ylim(len(labels), 0)
    ax.spines[:].set_visible(False)


def chosen_index(best, choice, name, row):
    """The index of the option that the architecture takes in a row of choice_rows().

    With a budget that is not always the largest weight.
    """
    options, chosen = best.get("options", {}).get(choice), best["arch"][choice]
    if not options: # in trajectories of older searches
        return np.argmax(row)
    if isinstance(chosen, list):
        chosen = chosen[int(name.rpartition(".")[2])]
    return options.index(chosen)


def draw_last_weights(ax, last, best):
    """In the place of ax, for every choice a heat map (rows, options) of the last weights.

    For spaces with too many rows to show their history. Stars: the best architecture.
    """
    figure, columns = ax.figure, min(5, len(last["weights"]))
    grid = ax.get_subplotspec().subgridspec(-(-len(last["weights"]) // columns), columns)
    ax.remove()
    axes = [figure.add_subplot(grid[divmod(i, columns)]) for i in range(len(last["weights"]))]
    for ax, (name, weights) in zip(axes, last["weights"].items(), strict=True):
        weights, options = np.atleast_2d(weights), last["options"][name]
        mesh = ax.pcolormesh(weights, vmin=0, vmax=1)
        for row, option in enumerate(as_list(best["arch"][name])):
            ax.plot(options.index(option) + 0.5, row + 0.5, markersize=6, **STAR)
        names = {"rotation": 35, "ha": "right"} if isinstance(options[0], str) else {}
        ax.set_xticks(np.arange(len(options)) + 0.5, options, fontsize=7, **names)
        ax.set_yticks(np.arange(len(weights)) + 0.5, range(len(weights)), fontsize=7)
        ax.tick_params(length=0, pad=2)
        ax.set(title=f"{name}, step {last['step']}", ylim=(len(weights), 0))
        ax.spines[:].set_visible(False)
    figure.colorbar(mesh, ax=axes, label="weight", fraction=0.05, aspect=30)


def draw_front(ax, searched, cost):
    """Loss over cost of every architecture that was evaluated, and the Pareto front."""
    points = [(line["cost"], line["loss"]) for line in searched]
    front = sorted(points[i] for i in nondominated_sort(points)[0])
    ax.plot(*zip(*points, strict=True), "o", color=BLUE, label="evaluated")
    ax.step(*zip(*front, strict=True), "o-", where="post", color=RED, label="front")
    ax.set(xlabel=COSTS[cost], ylabel="loss")
    draw_legend(ax)


def draw_arch_search(ax, searched):
    """The losses of the search over inherited weights that follows spos, and the best so far."""
    losses = {line["evaluation"]: line["loss"] for line in searched}
    counts = sorted(losses)
    values = [losses[count] for count in counts]
    ax.plot(counts, values, "o", color=BLUE, label="evaluated")
    ax.step(counts, np.minimum.accumulate(values), where="post", color=RED, label="best so far")
    ax.set(xlabel="architectures evaluated with the inherited weights", ylabel="loss",
           xlim=(0, counts[-1] + 1))
    draw_legend(ax)


def search_figure(out_dir):
    """Draws search.png of a train_search.py run, returns its path."""
    config = read_json(os.path.join(out_dir, "run.json"))["config"]
    log = read_lines(os.path.join(out_dir, "log.jsonl"))
    evaluations = read_evaluations(os.path.join(out_dir, "arch_traj.jsonl"), "arch_loss")
    best = kept_evaluation(out_dir, evaluations)
    lines = by_step(line for line in evaluations if "weights" in line) # the result of spos has none
    benchmark = by_step(line for line in evaluations if "table_accuracy" in line)
    path = os.path.join(out_dir, "arch_search.jsonl")
    searched = read_lines(path) if os.path.exists(path) else []
    labels, weights = [], None
    if METHODS[config["optimizer"]].has_alphas: # else the weights stay uniform
        labels, weights = weight_history(lines, config)

    # panels over the steps, each a height in inches and what draws it
    panels = [(3.2, lambda ax: draw_search_losses(ax, log, lines, best)),
              (1.1, lambda ax: draw_gap(ax, lines))]
    if benchmark:
        panels.append((1.6, lambda ax: draw_benchmark(ax, benchmark)))
    if 0 < len(labels) <= MANY_OPTIONS:
        panels.append((max(1, 0.125 * len(labels)), lambda ax: draw_weight_history(
            ax, labels, weights, lines, best, config["eval_interval"])))
    over_steps = len(panels)

    # a last panel over something else
    if len(labels) > MANY_OPTIONS:
        panels.append((4.5, lambda ax: draw_last_weights(ax, lines[-1], best)))
    elif searched and all("cost" in line for line in searched):
        front = os.path.join(out_dir, "pareto.json") # of a resumed run, perhaps with another cost
        cost = read_json(front)["cost"] if os.path.exists(front) else config["pareto_cost"]
        panels.append((2.2, lambda ax: draw_front(ax, searched, cost)))
    elif searched:
        panels.append((2.2, lambda ax: draw_arch_search(ax, searched)))

    heights = [height for height, _ in panels]

    def draw(figure):
        from matplotlib.ticker import MaxNLocator
        axes = figure.subplots(len(panels), height_ratios=heights)
        for ax in axes[1:over_steps]:
            ax.sharex(axes[0])
        for ax, (_, draw_panel) in zip(axes, panels, strict=True):
            draw_panel(ax)
        for ax in axes[:over_steps - 1]:
            ax.tick_params(labelbottom=False)
        axes[over_steps - 1].set_xlabel("step")
        axes[0].xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
        axes[0].xaxis.set_major_formatter(lambda step, _: f"{step:.0f}" if step >= 0 else "")
    return save_figure(os.path.join(out_dir, "search.png"), sum(heights) + 1.2, draw)

# -----------------------------------------------------------------------------
# loss.png

def draw_training(ax, log, best):
    """Losses and, on a light second axis, the learning rate."""
    right = ax.twinx()
    draw_curves(right, log, [("lr", PURPLE, "-", None)])
    draw_curves(ax, log, [("loss", GREY, "-", "training"),
                          ("train_loss", BLUE, "o-", "train split"),
                          ("val_loss", RED, "o-", "val split")])
    for loss in [line["test_loss"] for line in log if "test_loss" in line][-1:]:
        label = f"test {loss:.4f}, weights of step {best['step']}"
        ax.plot(best["step"], loss, markersize=11, label=label, **STAR)
    draw_legend(ax)
    ax.set(xlabel="step", ylabel="loss", zorder=2) # above the learning rate
    ax.patch.set_visible(False)
    right.set_ylabel("learning rate", color=PURPLE)
    right.set_ylim(bottom=0)
    right.tick_params(axis="y", colors=PURPLE, length=0)
    right.ticklabel_format(axis="y", scilimits=(0, 0))
    right.locator_params(axis="y", nbins=4)


def train_figure(out_dir):
    """Draws loss.png of a training, returns its path."""
    path = os.path.join(out_dir, "log.jsonl")
    log, best = read_lines(path), best_evaluation(read_evaluations(path, "train_loss"))
    return save_figure(os.path.join(out_dir, "loss.png"), 4.2,
                       lambda figure: draw_training(figure.subplots(), log, best))

# -----------------------------------------------------------------------------
# the figures of reinforcement learning

def read_rl_log(out_dir):
    """(evaluations, with their time in ms; policies: lines with the greedy actions at a step)."""
    path = os.path.join(out_dir, "log.jsonl")
    evaluations = read_evaluations(path, "reward")
    policies = [line for line in read_lines(path) if "actions" in line]
    return [line | {"time": 1000 * line["time"]} for line in evaluations], policies


def rl_panels(figure, evaluations, by_entries=True):
    """Yields (ax, key) for every quantity of a run; random search has no values of actions."""
    keys = [key for key in RL_QUANTITIES if evaluations[0][key] is not None]
    entries = sorted({line["entries"] for line in evaluations})
    ticks = entries[::-(-len(entries) // 5)] # at most 5
    for ax, key in zip(figure.subplots(1, len(keys)), keys, strict=True):
        ax.set_title(RL_QUANTITIES[key])
        yield ax, key
        ax.set_xlabel("entries" if by_entries else "evaluation")
        if by_entries:
            ax.set_xscale("log")
            ax.set_xticks(ticks, ticks, fontsize=7)
            ax.set_xticks([], minor=True)


def episodes_of(evaluations):
    """The evaluations of every episode, each in order of their entries."""
    episodes = {}
    for line in evaluations:
        episodes.setdefault((line["iteration"], line["episode"]), []).append(line)
    return [sorted(lines, key=lambda line: line["entries"]) for lines in episodes.values()]


def draw_aggregate(figure, evaluations):
    """aggregate.png: every quantity over all evaluations, and its mean over the last 50."""
    steps, window = np.array([line["step"] for line in evaluations]), min(50, len(evaluations))
    for ax, key in rl_panels(figure, evaluations, by_entries=False):
        values = np.array([line[key] for line in evaluations])
        means = np.convolve(values, np.ones(window) / window, "valid")
        ax.plot(steps, values, ".", color=GREY, markersize=2, label="an evaluation")
        ax.plot(steps[window - 1:], means, color=RED, label=f"mean of the last {window}")
    draw_shared_legend(figure, ax)


def draw_episodes(figure, evaluations):
    """frames.png: a line an episode over the number of entries, from dark to light in time."""
    episodes = episodes_of(evaluations)
    labels = {0: "first episode", len(episodes) - 1: "last episode"}
    for ax, key in rl_panels(figure, evaluations):
        for i, episode in enumerate(episodes):
            age = i / len(episodes)
            color = (0.1 + 0.8 * age, 0.2 + 0.5 * age, 0.6 - 0.5 * age) # dark blue to yellow
            ax.plot([line["entries"] for line in episode], [line[key] for line in episode],
                    linewidth=0.5, alpha=0.6, color=color, label=labels.get(i))
    for line in draw_shared_legend(figure, ax).get_lines():
        line.set(linewidth=1.4, alpha=1)


def draw_first_and_last(figure, evaluations):
    """two.png: the first and the last tenth of the episodes, mean and deviation for each entry."""
    episodes = episodes_of(evaluations)
    tenth = -(-len(episodes) // 10)
    parts = ((episodes[:tenth], BLUE, "first tenth of the episodes", 0.95),
             (episodes[-tenth:], RED, "last tenth", 1.05)) # shifts, so that no bar hides another
    for ax, key in rl_panels(figure, evaluations):
        for part, color, label, shift in parts:
            values = {}
            for line in (line for episode in part for line in episode):
                values.setdefault(line["entries"], []).append(line[key])
            entries = sorted(values)
            means, stds = ([f(values[n]) for n in entries] for f in (np.mean, np.std))
            ax.errorbar(shift * np.array(entries), means, stds, color=color, label=label,
                        marker="o", capsize=2, linewidth=1)
    draw_shared_legend(figure, ax)


def draw_regret(figure, groups):
    """The regret of the greedy policy, a mean over the numbers of entries.

    groups: {label: [policies of a run, ...]}; each is a curve, the mean over its runs, and a band
    of one standard deviation.
    """
    ax, colors = figure.subplots(), (RED, BLUE, "0.4", GREEN, PURPLE)
    for (label, runs), color in zip(groups.items(), colors, strict=False):
        by_run = [{line["step"]: np.mean(line["regret"]) for line in policies} for policies in runs]
        steps = sorted(set.intersection(*map(set, by_run)))
        regrets = 100 * np.array([[regret[step] for step in steps] for regret in by_run])
        mean, std = regrets.mean(0), regrets.std(0, ddof=min(1, len(runs) - 1))
        label = f"{label}, {len(runs)} runs" if len(runs) > 1 else label
        ax.plot(steps, mean, color=color, label=label)
        ax.fill_between(steps, np.maximum(mean - std, 0), mean + std, color=color, alpha=0.15,
                        linewidth=0)
    ax.axhline(0, color="black", linewidth=0.8, linestyle=":", label="oracle")
    ax.set(xlabel="evaluations", ylabel="regret, % of the range of the rewards", ylim=(-1, None))
    ax.legend()


def draw_surface(figure, result):
    """The rewards of heads x layers for up to 10 numbers of entries, and the policy's choice."""
    shown = np.unique(np.linspace(0, len(result["policy"]) - 1, 10).round().astype(int))
    rows, columns = -(-len(shown) // 5), min(5, len(shown))
    axes = np.atleast_1d(figure.subplots(rows, columns, sharex=True, sharey=True)).flat
    edges, sizes = np.arange(9) + 0.5, range(1, 9)
    for ax, i in zip(axes, shown, strict=False):
        policy = result["policy"][i]
        surface = np.array(result["surface"][i], dtype=float).reshape(8, 8) # (heads, layers)
        known = np.isfinite(surface).any()
        low, high = np.nanpercentile(surface, (10, 100)) if known else (0, 1)
        mesh = ax.pcolormesh(edges, edges, surface, vmin=low, vmax=high)
        figure.colorbar(mesh, ax=ax, location="bottom", pad=0.02, aspect=25)
        if known:
            head, layer = np.unravel_index(np.nanargmax(surface), surface.shape)
            ax.plot(layer + 1, head + 1, "o", markersize=13, mfc="none", mec="black", mew=1.2,
                    label="largest reward")
        ax.plot(policy["n_layer"], policy["n_head"], markersize=9, label="the policy's choice",
                **STAR)
        ax.set(title=f"{policy['entries']:,} entries", xlabel="layers", ylabel="heads",
               xticks=sizes, yticks=sizes, aspect="equal")
        ax.label_outer()
    draw_shared_legend(figure, ax)


def rl_figures(out_dir):
    """Draws the figures of a train_rl.py run, returns their paths."""
    evaluations, policies = read_rl_log(out_dir)
    figures = [("aggregate", 2.4, lambda figure: draw_aggregate(figure, evaluations)),
               ("frames", 2.4, lambda figure: draw_episodes(figure, evaluations)),
               ("two", 2.4, lambda figure: draw_first_and_last(figure, evaluations))]
    if policies and "regret" in policies[0]:
        groups = {"greedy policy": [policies]}
        figures.append(("regret", 3.2, lambda figure: draw_regret(figure, groups)))
    path = os.path.join(out_dir, "result.json")
    if os.path.exists(path):
        result = read_json(path)
        height = 0.2 + 2.6 * -(-min(10, len(result["policy"])) // 5)
        figures.append(("surface", height, lambda figure: draw_surface(figure, result)))
    return [save_figure(os.path.join(out_dir, f"{name}.png"), height, draw)
            for name, height, draw in figures]


def compare_figure(out_dir, patterns):
    """Draws regret.png of groups of runs, "label:out/a_*,label:out/b_*"; returns its path."""
    if patterns.count(",") > 4:
        raise SystemExit(f"compare='{patterns}' has more than 5 groups, and so many curves cannot "
                         "be told apart: draw fewer.")
    groups = {}
    for pattern in patterns.split(","):
        label, _, folders = pattern.rpartition(":")
        label = label or folders
        runs = [read_rl_log(folder)[1] for folder in sorted(glob.glob(folders))]
        if not runs or not all(policies and "regret" in policies[0] for policies in runs):
            raise SystemExit(f"{folders} names no runs that know their regret: give the out_dirs "
                             "of train_rl.py --evaluator=table.")
        last = np.mean([np.mean(policies[-1]["regret"]) for policies in runs])
        print(f"{label}: regret after the last evaluation {100 * last:.2f}%")
        groups[label] = runs
    return save_figure(os.path.join(out_dir, "regret.png"), 3.2,
                       lambda figure: draw_regret(figure, groups))

# -----------------------------------------------------------------------------
# super-resolution

def upscale(out_dir, dataset):
    """The val split of a data set of pairs, upscaled by bicubic interpolation and by the network.

    Returns a dict for each image: "bicubic", "network" and "truth" are images (H, W, 3) of 0 to 1;
    "scores" is {"bicubic": {"psnr_y": ...}, "network": ...}, PSNR and SSIM as papers measure them.
    """
    import torch
    from data import Pairs, image_quality, load_pairs, pair_batches

    path, device = os.path.join(out_dir, "best.pt"), pick_device("auto")
    checkpoint = load_checkpoint(path, device)
    config = checkpoint["config"]
    if data_kind(config["space"]) is not Pairs:
        raise SystemExit(f"out_dir={out_dir} holds a network of {config['space']}, which does not "
                         f"upscale images: leave out --images={dataset}.")
    net = build(config, checkpoint["arch"]).to(device)
    net = load_model(net, checkpoint, path).eval()
    scale = config["scale"]
    pairs = load_pairs(config["data_dir"], dataset, "val", scale)
    batches = pair_batches(pairs, range(len(pairs)), device)
    found = []
    for x, y in tqdm(batches, desc=dataset, total=len(pairs), unit=" images"):
        with torch.no_grad():
            bicubic = torch.nn.functional.interpolate(x, scale_factor=scale, mode="bicubic",
                                                      antialias=True)
            upscaled = {"bicubic": bicubic, "network": net(x)[0]}
        scores = {name: image_quality(image, y, scale, structure=True)
                  for name, image in upscaled.items()}
        arrays = {name: image[0].permute(1, 2, 0).clamp(0, 1).cpu().numpy() # (H, W, 3)
                  for name, image in (upscaled | {"truth": y}).items()}
        found.append({"scores": scores, **arrays})
    return found


def draw_upscaled(figure, found, side):
    """A row for each image: the whole, then a square of it as bicubic, network and truth have it.

    side: of the square in pixels. It lies where bicubic interpolation has the largest error.
    """
    axes_of = figure.subplots(len(found), 4, squeeze=False, width_ratios=(1.3, 1, 1, 1))
    for image, axes in zip(found, axes_of, strict=True):
        # errors of all squares from sums over rectangles at the corner
        errors = ((image["bicubic"] - image["truth"]) ** 2).sum(2).cumsum(0).cumsum(1)
        squares = errors[side:, side:] - errors[:-side, side:]
        squares = squares - errors[side:, :-side] + errors[:-side, :-side]
        top, left = (int(i) + 1 for i in np.unravel_index(squares.argmax(), squares.shape))
        bottom, right = top + side, left + side
        axes[0].imshow(image["truth"])
        axes[0].plot([left, right, right, left, left], [top, top, bottom, bottom, top], color=RED)
        for ax, name in zip(axes[1:], ("bicubic", "network", "truth"), strict=True):
            ax.imshow(image[name][top:bottom, left:right], interpolation="nearest")
            title = name
            if name in image["scores"]:
                title += f", {image['scores'][name]['psnr_y']:.2f} dB"
            ax.set_title(title)
        for ax in axes:
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)


def upscale_figure(out_dir, dataset):
    """Prints the PSNR and SSIM, on Y and on RGB, of bicubic interpolation and of the network.

    Draws the first three images of the data set to out_dir/<dataset>.png; returns its path.
    """
    found = upscale(out_dir, dataset)
    keys = list(found[0]["scores"]["network"])
    print("  ".join(["image".rjust(5), "".rjust(7), *(key.rjust(8) for key in keys)]))
    for number, images in [*((i, [image]) for i, image in enumerate(found)), ("mean", found)]:
        for name in ("bicubic", "network"):
            means = [np.mean([image["scores"][name][key] for image in images]) for key in keys]
            cells = [f"{mean:8.{2 if 'psnr' in key else 4}f}"
                     for key, mean in zip(keys, means, strict=True)]
            print("  ".join([str(number).rjust(5), name, *cells]))
    shown = found[:3]
    side = min(64, *(min(image["truth"].shape[:2]) // 2 for image in found))
    return save_figure(os.path.join(out_dir, f"{dataset}.png"), 2.1 * len(shown),
                       lambda figure: draw_upscaled(figure, shown, side))

# -----------------------------------------------------------------------------
# the script

def summary(best, last, cost, arch=None):
    """The losses of the best and of the last evaluation in columns, then what the network is."""
    keys = [key for key in LOSSES if key in last]
    rows = [["", "step", *keys]]
    for name, line in (("best", best), ("last", last)):
        rows.append([name, str(line["step"]), *(f"{line[key]:.4f}" for key in keys)])
    widths = [max(len(key), 7) for key in rows[0]]
    found = ["  ".join(cell.rjust(n) for n, cell in zip(widths, row, strict=True)) for row in rows]
    name = describe(arch) + ": " if arch else ""
    found.append(f"{name}{cost['params']:,} parameters, {cost['flops'] / 1e9:.3g} GFLOPs")
    return "\n".join(found)


def analyze(out_dir, compare="", images=""):
    """Draws the figures of the run in out_dir; prints a summary of it and their paths."""
    trajectory, log = (os.path.join(out_dir, name) for name in ("arch_traj.jsonl", "log.jsonl"))
    if compare:
        paths = [compare_figure(out_dir, compare)]
    elif images:
        paths = [upscale_figure(out_dir, images)]
    elif "algo" in read_json(os.path.join(out_dir, "run.json"))["config"]:
        paths = rl_figures(out_dir)
    elif os.path.exists(trajectory):
        paths, lines = [search_figure(out_dir)], read_evaluations(trajectory, "arch_loss")
        best = kept_evaluation(out_dir, lines)
        print(summary(best, lines[-1], best["cost"], best["arch"]))
    else:
        paths, lines = [train_figure(out_dir)], read_evaluations(log, "train_loss")
        print(summary(best_evaluation(lines), lines[-1], read_lines(log)[0]))
    for path in paths:
        print(f"figure: {path}")


if __name__ == "__main__":
    analyze(**configure(globals()))
