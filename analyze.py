"""
Redraws the figure of any run from its files, at any time, also while it runs, and prints its best and its last evaluation.

    python analyze.py --out_dir=out/search      # of train_search.py: losses, gap and weights -> search.png
    python analyze.py --out_dir=out/base        # of train.py or train_base.py: losses -> loss.png
    python analyze.py --out_dir=out/base_swinir_samples --images=sr_samples     # PSNR and SSIM on pairs of images -> sr_samples.png
    python analyze.py --out_dir=out/rl          # of train_rl.py: aggregate.png, frames.png, two.png, regret.png, surface.png
    python analyze.py --out_dir=out/rl --compare=numbers:out/rl_numbers_*,random:out/rl_random_*    # regret.png of groups of runs
"""
import glob
import os

import numpy as np
from tqdm import tqdm

from data import load_pairs, pair_batches
from budget import nondominated_sort
from run import read_json, read_lines, add_checksum, atomic_write
from search_spaces import describe
import run as runs
import data
import search_spaces

# -----------------------------------------------------------------------------
out_dir = 'out/search' # of the run
compare = '' # label:pattern,label:pattern: the regret of groups of train_rl.py runs, each a curve; written to out_dir
images = '' # a data set of pairs of images, such as set5: PSNR and SSIM on its val split of what train_base.py trained, beside bicubic's
# -----------------------------------------------------------------------------

BLUE, RED, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "0.75" # for the colour-blind too (Okabe & Ito)
STYLE = {"font.size": 9, "legend.fontsize": 8.5, "legend.frameon": False, "lines.linewidth": 1.4, "lines.markersize": 3,
         "axes.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 140}
STAR = {"marker": "*", "color": RED, "mec": "black", "mew": 0.5, "ls": "none", "clip_on": False, "zorder": 9}


def by_step(lines):
    """The lines in the order of their steps, of each step the last: a resumed run logs again what followed its checkpoint."""
    newest = {line["step"]: line for line in lines}
    return [newest[step] for step in sorted(newest)]


def groups(line):
    """(choice, name, row, used) for every row of weights with two or more options; a layer beyond the depth is not used."""
    for choice, weights in line["weights"].items():
        layered = isinstance(weights[0], list)
        for layer, row in enumerate(weights if layered else [weights]):
            if len(row) > 1:
                yield choice, f"{choice}.{layer}" if layered else choice, row, not layered or layer < len(line["arch"][choice])


def heat_map(lines, config):
    """labels, such as "n_head.0 4", and the weights (len(labels), len(lines)) of every option at every evaluation.

    lines: of arch_traj.jsonl; config: the run's. A choice that is not a list of that many values there is labelled by index.
    """
    labels = []
    for choice, name, row, _ in groups(lines[0]):
        options = lines[0].get("options", config).get(choice)
        if not isinstance(options, list) or len(options) != len(row):
            options = range(len(row))
        labels += [f"{name} {option}" for option in options]
    return labels, np.array([[weight for _, _, row, _ in groups(line) for weight in row] for line in lines]).T


def draw_curves(ax, lines, curves):
    """A curve for each (key, color, style, label) that some of the lines hold."""
    for key, color, style, label in curves:
        found = by_step(line for line in lines if key in line)
        if found:
            ax.plot([line["step"] for line in found], [line[key] for line in found], style, color=color, label=label,
                    linewidth=1.4 if "o" in style else 0.7, markersize=min(3, 150 / len(found)))


def draw_legend(ax):
    return ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0.2) # above the panel: hides no curve


def draw_search_losses(ax, log, lines, best):
    draw_curves(ax, [line for line in log if "loss" in line], [("loss", GREY, "-", "training")])
    draw_curves(ax, lines, [("mixture_loss", BLUE, "o-", "supernet"), ("arch_loss", RED, "o-", "architecture"),
                            ("val_arch_loss", GREEN, "o--", "architecture, val")])
    sizes = describe({name: value for name, value in best["arch"].items() if not isinstance(value, list)})
    star, = ax.plot(best["step"], best["arch_loss"], markersize=11, **STAR)
    text = ", ".join(filter(None, ["best: " + sizes, f"{best['cost']['params']:,} parameters"])).replace("best: , ", "best: ")
    ax.add_artist(ax.legend([star], [text], loc="upper right", borderaxespad=0))
    draw_legend(ax)
    ax.set_ylabel("loss")


def draw_weights(figure, ax, labels, matrix, lines, best, width):
    """The heat map, its groups parted by white lines; stars: the best architecture. width: of the outer columns, in steps."""
    steps = np.array([line["step"] for line in lines])
    edges = np.concatenate([[steps[0] - width / 2], (steps[1:] + steps[:-1]) / 2, [steps[-1] + width / 2]])
    mesh = ax.pcolormesh(edges, np.arange(len(labels) + 1), matrix, vmin=0, vmax=1)
    shrink = min(1, 30 / len(labels))
    figure.colorbar(mesh, ax=ax, label="weight", pad=0.01, fraction=0.03, aspect=30, shrink=shrink, anchor=(0, 1))
    start, previous, names = 0, None, {}
    for choice, name, row, used in groups(best):
        if start:
            ax.axhline(start, color="white", linewidth=0.6 if choice == previous else 2.5)
        if used: # in a budget it is not always the largest weight
            chosen, options = best["arch"][choice], best.get("options", {}).get(choice)
            chosen = chosen[int(name.rpartition(".")[2])] if isinstance(chosen, list) else chosen
            place = options.index(chosen) if options else np.argmax(row)
            ax.plot(best["step"], start + place + 0.5, markersize=6, **STAR)
        names[start + len(row) / 2] = name
        start, previous = start + len(row), choice
    options = [label.split(" ", 1)[1] for label in labels]
    ax.set_yticks(np.arange(len(labels)) + 0.5, options, minor=True, fontsize=6.5)
    ax.set_yticks(list(names), list(names.values()), fontsize=7.5)
    ax.yaxis.remove_overlapping_locs = False # a name and an option may share a height
    ax.tick_params(axis="y", which="both", length=0, pad=2)
    ax.tick_params(axis="y", which="major", pad=8 + 4 * max(map(len, options))) # points: left of the options
    ax.set_ylim(len(labels), 0)
    ax.spines[:].set_visible(False)


def draw_rows(figure, ax, lines, best):
    """In the place of ax: of every choice the weights of its rows at the last evaluation, and the best architecture, where there are
    too many rows to show how they came about."""
    spec = ax.get_subplotspec().subgridspec(1, len(best["weights"]))
    ax.remove()
    for i, (name, rows) in enumerate(lines[-1]["weights"].items()):
        ax, options = figure.add_subplot(spec[i]), lines[-1]["options"][name]
        mesh = ax.pcolormesh(rows, vmin=0, vmax=1)
        for row, option in enumerate(best["arch"][name]):
            ax.plot(options.index(option) + 0.5, row + 0.5, markersize=6, **STAR)
        ax.set_xticks([k + 0.5 for k in range(len(options))], options, rotation=35, ha="right", fontsize=7)
        ax.set_yticks([row + 0.5 for row in range(len(rows))], range(len(rows)), fontsize=7)
        ax.tick_params(length=0, pad=2)
        ax.set(title=f"{name}, step {lines[-1]['step']}", ylim=(len(rows), 0))
        ax.spines[:].set_visible(False)
    figure.colorbar(mesh, ax=ax, label="weight", fraction=0.05)


def draw_table(ax, lines):
    """What a table says of the architectures: their accuracy after a training of their own."""
    draw_curves(ax, lines, [("table_accuracy", GREEN, "o-", "architecture, in the table")])
    top = lines[-1]["table_accuracy"] + lines[-1]["table_regret"]
    ax.axhline(top, color="0.3", linewidth=0.8, ls="--", label=f"best of {lines[-1]['table_of']:,}")
    draw_legend(ax)
    ax.set_ylabel("accuracy, %")


def draw_front(ax, searched, cost):
    """Loss over cost of what a search for both has evaluated, and the front: what nothing else is better than in both."""
    points = [(line["cost"], line["loss"]) for line in searched]
    front = sorted(points[i] for i in nondominated_sort(points)[0])
    ax.plot(*zip(*points, strict=True), "o", color=BLUE, label="evaluated")
    ax.step(*zip(*front, strict=True), "o-", where="post", color=RED, label="front")
    ax.set(xlabel={"latency": "latency, ms"}.get(cost, cost), ylabel="loss")
    draw_legend(ax)


def draw_searched(ax, searched):
    """What the search over the inherited weights, after spos, has logged."""
    losses = {line["evaluation"]: line["loss"] for line in searched}
    counts = sorted(losses)
    values = [losses[count] for count in counts]
    ax.plot(counts, values, "o", color=BLUE, label="evaluated")
    ax.step(counts, np.minimum.accumulate(values), where="post", color=RED, label="best so far")
    ax.set(xlabel="architectures evaluated with the inherited weights", ylabel="loss", xlim=(0, counts[-1] + 1))
    draw_legend(ax)


def draw_training(ax, log, best):
    """Losses and, on a light second axis, the learning rate."""
    right = ax.twinx()
    draw_curves(right, log, [("lr", PURPLE, "-", None)])
    draw_curves(ax, log, [("loss", GREY, "-", "training"), ("train_loss", BLUE, "o-", "train split"),
                          ("val_loss", RED, "o-", "val split")])
    for loss in [line["test_loss"] for line in log if "test_loss" in line][-1:]:
        ax.plot(best["step"], loss, markersize=11, label=f"test {loss:.4f}, weights of step {best['step']}", **STAR)
    draw_legend(ax)
    ax.set(xlabel="step", ylabel="loss", zorder=2) # above the learning rate
    ax.patch.set_visible(False)
    right.set_ylabel("learning rate", color=PURPLE)
    right.set_ylim(bottom=0)
    right.tick_params(axis="y", colors=PURPLE, length=0)
    right.ticklabel_format(axis="y", scilimits=(0, 0))
    right.locator_params(axis="y", nbins=4)


def save_figure(path, height, draw, width=9):
    """draw(figure), then writes the figure, `width` by `height` inches, whole or not at all; returns path."""
    # here, for a search imports this file and draws only at its end; no pyplot, whose backend and figures are a notebook's
    import matplotlib
    from matplotlib.figure import Figure
    with matplotlib.rc_context(STYLE):
        figure = Figure((width, height), layout="constrained")
        draw(figure)
        atomic_write(path, lambda tmp: figure.savefig(tmp, format="png"))
    return path


def search_figure(out_dir):
    """Draws out_dir/search.png of a train_search.py run, returns its path; SystemExit if it has evaluated nothing yet."""
    config = read_json(os.path.join(out_dir, "run.json"))["config"]
    log = read_lines(os.path.join(out_dir, "log.jsonl"))
    found = evaluations(os.path.join(out_dir, "arch_traj.jsonl"), "arch_loss")
    lines, best = by_step(line for line in found if "weights" in line), top_edges(out_dir, found) # the result of spos has none
    labels, matrix = ([], None) if config["optimizer"] == "spos" else heat_map(lines, config) # of spos they stay uniform
    path = os.path.join(out_dir, "arch_search.jsonl")
    searched = read_lines(path) if os.path.exists(path) else []
    table, many = [line for line in found if "table_accuracy" in line], len(labels) > 100
    rows = 4.5 if many else max(1, 0.125 * len(labels))
    heights = [3.2, 1.1] + [1.6] * bool(table) + ([rows] if labels else [2.2] if searched else []) # inches

    def draw(figure):
        axes = figure.subplots(len(heights), height_ratios=heights, sharex=not (searched or many))
        draw_search_losses(axes[0], log, lines, best)
        axes[1].axhline(0, color="0.3", linewidth=0.6)
        draw_curves(axes[1], lines, [("gap", PURPLE, "o-", None)])
        axes[1].set_ylabel("gap")
        if table:
            draw_table(axes[2], by_step(table))
        if many:
            draw_rows(figure, axes[-1], lines, best)
        elif labels:
            draw_weights(figure, axes[-1], labels, matrix, lines, best, config["eval_interval"])
        elif searched and all("cost" in line for line in searched):
            front = os.path.join(out_dir, "pareto.json") # of a run that went on, perhaps with another cost
            draw_front(axes[-1], searched, read_json(front)["cost"] if os.path.exists(front) else config["pareto_cost"])
        elif searched:
            draw_searched(axes[-1], searched)
        axes[1 + bool(table) if searched or many else -1].set_xlabel("step")
    return save_figure(os.path.join(out_dir, "search.png"), sum(heights) + 1.2, draw)


def train_figure(out_dir):
    """Draws out_dir/loss.png of a train.py or train_base.py run, returns its path; SystemExit if it has evaluated nothing yet."""
    path = os.path.join(out_dir, "log.jsonl")
    log, best = read_lines(path), best_of(evaluations(path, "train_loss"))
    return save_figure(os.path.join(out_dir, "loss.png"), 4.2, lambda figure: draw_training(figure.subplots(), log, best))


RL_KEYS = {"reward": "reward", "loss": "loss", "ppl": "perplexity", "time": "time, ms a sample", "value": "value (normalised)"}


def rl_log(out_dir):
    """(the evaluations, with their time in ms, and the looks at the policy) in the log of a train_rl.py run."""
    lines = read_lines(os.path.join(out_dir, "log.jsonl"))
    return ([line | {"time": 1000 * line["time"]} for line in evaluations(os.path.join(out_dir, "log.jsonl"), "reward")],
            [line for line in lines if "actions" in line])


def rl_panels(figure, lines, by_entries=True):
    """(panel, key) for every quantity of a run; random search expects no value."""
    keys = [key for key in RL_KEYS if lines[0][key] is not None]
    entries = sorted({line["entries"] for line in lines})
    ticks = entries[::-(-len(entries) // 5)]
    for ax, key in zip(figure.subplots(1, len(keys)), keys, strict=True):
        ax.set_title(RL_KEYS[key], fontsize=9)
        yield ax, key
        ax.set_xlabel("entries" if by_entries else "evaluation")
        if by_entries:
            ax.set_xscale("log")
            ax.set_xticks(ticks, ticks, fontsize=7)
            ax.set_xticks([], minor=True)


def episodes_of(lines):
    """The evaluations of every episode, each in order of their entries."""
    found = {}
    for line in lines:
        found.setdefault((line["iteration"], line["episode"]), []).append(line)
    return [sorted(episode, key=lambda line: line["entries"]) for episode in found.values()]


def draw_aggregate(figure, lines):
    """Every quantity over all evaluations, and its mean over the last 50."""
    for ax, key in rl_panels(figure, lines, by_entries=False):
        values, width = np.array([line[key] for line in lines]), min(50, len(lines))
        steps = np.array([line["step"] for line in lines])
        ax.plot(steps, values, ".", color=GREY, markersize=2)
        ax.plot(steps[width - 1:], np.convolve(values, np.ones(width) / width, "valid"), color=RED)


def draw_frames(figure, lines):
    """Every episode a line over the number of entries, the early ones dark."""
    episodes = episodes_of(lines)
    for ax, key in rl_panels(figure, lines):
        for i, episode in enumerate(episodes):
            ax.plot([line["entries"] for line in episode], [line[key] for line in episode], linewidth=0.5, alpha=0.6,
                    color=(0.1 + 0.8 * i / len(episodes), 0.2 + 0.5 * i / len(episodes), 0.6 - 0.5 * i / len(episodes)))


def draw_two(figure, lines):
    """The first tenth of the episodes against the last: means for every number of entries, and standard deviations."""
    episodes = episodes_of(lines)
    tenth = -(-len(episodes) // 10)
    for ax, key in rl_panels(figure, lines):
        for part, color, label in ((episodes[:tenth], BLUE, "first tenth"), (episodes[-tenth:], RED, "last tenth")):
            values = {}
            for line in (line for episode in part for line in episode):
                values.setdefault(line["entries"], []).append(line[key])
            entries = sorted(values)
            ax.errorbar(entries, [np.mean(values[n]) for n in entries], [np.std(values[n]) for n in entries], color=color, label=label,
                        marker="o", capsize=2, linewidth=1)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=2)


def draw_regret(figure, groups):
    """The regret of the greedy policy, mean over the numbers of entries: mean and standard deviation over the runs of each group.

    groups: {label: [the looks of a run, ...]}."""
    ax = figure.subplots()
    for (label, runs), color in zip(groups.items(), (RED, BLUE, "0.4", GREEN, PURPLE), strict=False):
        steps = sorted(set.intersection(*({line["step"] for line in run} for run in runs)))
        curves = 100 * np.array([[np.mean({line["step"]: line["regret"] for line in run}[step]) for step in steps] for run in runs])
        mean, std = curves.mean(0), curves.std(0, ddof=min(1, len(runs) - 1))
        ax.plot(steps, mean, color=color, label=f"{label}, {len(runs)} runs" if len(runs) > 1 else label)
        ax.fill_between(steps, np.maximum(mean - std, 0), mean + std, color=color, alpha=0.15, linewidth=0)
    ax.axhline(0, color="black", linewidth=0.8, linestyle=":", label="oracle")
    ax.set(xlabel="evaluations", ylabel="regret, % of the range of the rewards", ylim=(-1, None))
    ax.legend()


def draw_surface(figure, result):
    """The rewards, heads x layers, for up to 10 numbers of entries; circle: the best, star: what the policy takes."""
    shown = np.unique(np.linspace(0, len(result["policy"]) - 1, 10).round().astype(int))
    axes = np.atleast_1d(figure.subplots(-(-len(shown) // 5), min(5, len(shown)), sharex=True, sharey=True)).flat
    for ax, i in zip(axes, shown, strict=False):
        row, surface = result["policy"][i], np.array(result["surface"][i], dtype=float).reshape(8, 8) # (heads, layers)
        low, high = (np.nanpercentile(surface, q) for q in (10, 100)) if np.isfinite(surface).any() else (0, 1)
        mesh = ax.pcolormesh(np.arange(9) + 0.5, np.arange(9) + 0.5, surface, vmin=low, vmax=high)
        figure.colorbar(mesh, ax=ax, location="bottom", pad=0.02, aspect=25)
        if np.isfinite(surface).any():
            head, layer = np.unravel_index(np.nanargmax(surface), surface.shape)
            ax.plot(layer + 1, head + 1, "o", markersize=13, mfc="none", mec="white", mew=1.2)
        ax.plot(row["n_layer"], row["n_head"], markersize=9, **STAR)
        ax.set(title=f"{row['entries']:,} entries", xlabel="layers", ylabel="heads", xticks=range(1, 9), yticks=range(1, 9), aspect="equal")
        ax.label_outer()


def rl_figures(out_dir):
    """Draws the figures of a train_rl.py run into out_dir, returns their paths; SystemExit if it has evaluated nothing yet."""
    lines, looks = rl_log(out_dir)
    draws = {"aggregate": (2.2, lambda f: draw_aggregate(f, lines)), "frames": (2.2, lambda f: draw_frames(f, lines)),
             "two": (2.4, lambda f: draw_two(f, lines))}
    if looks and "regret" in looks[0]:
        draws["regret"] = (3.2, lambda f: draw_regret(f, {"greedy policy": [looks]}))
    path = os.path.join(out_dir, "result.json")
    if os.path.exists(path):
        result = read_json(path)
        draws["surface"] = (2.6 * -(-min(10, len(result["policy"])) // 5), lambda f: draw_surface(f, result))
    return [save_figure(os.path.join(out_dir, f"{name}.png"), height, draw) for name, (height, draw) in draws.items()]


def compare_figure(out_dir, patterns):
    """Draws out_dir/regret.png of groups of runs, "label:out/a_*,label:out/b_*", each of them one curve; returns its path."""
    groups = {}
    if patterns.count(",") > 4:
        raise SystemExit(f"compare='{patterns}' has more than 5 groups, and so many curves cannot be told apart: draw fewer.")
    for pattern in patterns.split(","):
        label, _, folders = pattern.rpartition(":")
        found = sorted(glob.glob(folders))
        groups[label or folders] = [rl_log(folder)[1] for folder in found]
        if not found or not all(run and "regret" in run[0] for run in groups[label or folders]):
            raise SystemExit(f"{folders} names no runs that know their regret: give the out_dirs of train_rl.py --evaluator=table.")
        print(f"{label or folders}: regret after the last evaluation "
              f"{100 * np.mean([np.mean(run[-1]['regret']) for run in groups[label or folders]]):.2f}%")
    return save_figure(os.path.join(out_dir, "regret.png"), 3.2, lambda figure: draw_regret(figure, groups))


def enlarged(out_dir, dataset):
    """[{"bicubic", "network", "truth"}] of the val split of a data set of pairs: images (H, W, 3) of 0 to 1, and {"of bicubic",
    "of network"}: their PSNR and SSIM as in papers."""
    import torch

    path = os.path.join(out_dir, "best.pt")
    checkpoint = runs.load_checkpoint(path, device := runs.pick_device("auto"))
    config, found = checkpoint["config"], []
    if "scale" not in config:
        raise SystemExit(f"out_dir={out_dir} holds a network of {config['space']}, which enlarges no images: leave out --images={dataset}.")
    net = runs.load_model(search_spaces.build(config, checkpoint["arch"]).to(device), checkpoint, path).eval()
    pairs = load_pairs(config["data_dir"], dataset, "val", s := config["scale"])
    for x, y in tqdm(pair_batches(pairs, range(len(pairs)), device), desc=dataset, total=len(pairs), unit=" images"):
        with torch.no_grad():
            images = {"bicubic": torch.nn.functional.interpolate(x, scale_factor=s, mode="bicubic", antialias=True), "network": net(x)[0]}
        found.append({f"of {name}": data.fidelity(image, y, s, structure=True) for name, image in images.items()} |
                     {name: image[0].permute(1, 2, 0).clamp(0, 1).cpu().numpy() for name, image in (images | {"truth": y}).items()})
    return found


def draw_enlarged(figure, found, side):
    """An image a row: the whole, and of the square where bicubic interpolation errs most what each makes of it."""
    for row, axes in zip(found, figure.subplots(len(found), 4, squeeze=False, width_ratios=(1.3, 1, 1, 1)), strict=True):
        errors = ((row["bicubic"] - row["truth"]) ** 2).sum(2).cumsum(0).cumsum(1)
        places = errors[side:, side:] - errors[:-side, side:] - errors[side:, :-side] + errors[:-side, :-side]
        top, left = (int(i) + 1 for i in np.unravel_index(places.argmax(), places.shape))
        axes[0].imshow(row["truth"])
        axes[0].plot([left, left + side, left + side, left, left], [top, top, top + side, top + side, top], color=RED)
        for ax, name in zip(axes[1:], ("bicubic", "network", "truth"), strict=True):
            ax.imshow(row[name][top:top + side, left:left + side], interpolation="nearest")
            ax.set_title(name if name == "truth" else f"{name}, {row[f'of {name}']['psnr_y']:.2f} dB", fontsize=9)
        for ax in axes:
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)


def enlarged_figure(out_dir, dataset):
    """Prints the PSNR and SSIM, on Y and on RGB, of bicubic interpolation and of the network in out_dir, for every image and in the mean;
    draws the first three images of the data set to out_dir/<dataset>.png, returns its path."""
    found = enlarged(out_dir, dataset)
    keys = list(found[0]["of network"])
    numbers = {name: np.array([list(row[f"of {name}"].values()) for row in found]) for name in ("bicubic", "network")} # (images, keys)
    print("  ".join(["image".rjust(5), "".rjust(7), *(key.rjust(8) for key in keys)]))
    for i in [*range(len(found)), "mean"]:
        for name, values in numbers.items():
            values = values.mean(0) if i == "mean" else values[i]
            cells = [f"{v:8.2f}" if "psnr" in key else f"{v:8.4f}" for key, v in zip(keys, values, strict=True)]
            print("  ".join([str(i).rjust(5), name, *cells]))
    side = min(64, *(min(row["truth"].shape[:2]) // 2 for row in found))
    return save_figure(os.path.join(out_dir, f"{dataset}.png"), 2.1 * len(found[:3]), lambda figure: draw_enlarged(figure, found[:3], side))


def evaluations(path, key):
    """The lines of a .jsonl file that hold key, at least one; SystemExit if there is none yet."""
    lines = [line for line in read_lines(path) if key in line]
    if not lines:
        raise SystemExit(f"{path} holds no evaluation yet: wait for the run's first one.")
    return lines


def best_of(lines):
    """The evaluation that a run keeps: of the lowest loss of the architecture; of images in validation of the highest accuracy or PSNR, of
    text of the lowest loss; without validation the last."""
    def score(line):
        for key, sign in (("arch_loss", 1), ("val_acc", -1), ("val_psnr", -1), ("val_loss", 1)):
            if key in line:
                return sign * line[key]
        return -line["step"]
    return min(lines, key=score)


def top_edges(out_dir, lines):
    """The evaluation in a search's arch.json: the best, but of a progressive search only of its second half; until there is one, the
    best."""
    path = os.path.join(out_dir, "arch.json")
    found = add_checksum(read_json(path)) if os.path.exists(path) else None
    return next((line for line in lines if line == found), best_of(lines))


def table(lines, best):
    """The best and the last of evaluations, in columns."""
    keys = ("arch_loss", "mixture_loss", "gap", "val_arch_loss", "train_loss", "val_loss", "val_acc", "val_psnr")
    keys = [key for key in keys if key in lines[-1]]
    rows = [["", "step", *keys]]
    for name, line in (("best", best), ("last", lines[-1])):
        rows.append([name, str(line["step"]), *(f"{line[key]:.4f}" for key in keys)])
    return "\n".join("  ".join(cell.rjust(max(len(key), 7)) for key, cell in zip(rows[0], row, strict=True)) for row in rows)


def main(out_dir, compare="", images=""):
    """Draws the run's figure; prints the table, what the best architecture is and costs, and the figure's path."""
    traj, log = (os.path.join(out_dir, name) for name in ("arch_traj.jsonl", "log.jsonl"))
    if compare:
        print(f"figure: {compare_figure(out_dir, compare)}")
        return
    if images:
        print(f"figure: {enlarged_figure(out_dir, images)}")
        return
    if "algo" in read_json(os.path.join(out_dir, "run.json"))["config"]:
        for path in rl_figures(out_dir):
            print(f"figure: {path}")
        return
    if os.path.exists(traj):
        path, lines = search_figure(out_dir), evaluations(traj, "arch_loss")
        best = top_edges(out_dir, lines)
        found, cost = describe(best["arch"]) + ": ", best["cost"]
    else:
        path, lines = train_figure(out_dir), evaluations(log, "train_loss")
        best, found, cost = best_of(lines), "", read_lines(log)[0]
    print(table(lines, best))
    print(f"{found}{cost['params']:,} parameters, {cost['flops'] / 1e9:.3g} GFLOPs")
    print(f"figure: {path}")


if __name__ == "__main__":
    from configurator import configure
    main(**configure(globals()))
