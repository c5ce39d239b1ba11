"""
Redraws the figure of any run from its files, at any time, also while it runs, and prints its best and its last evaluation.

    python analyze.py --out_dir=out/search      # of train_search.py: losses, gap and weights -> search.png
    python analyze.py --out_dir=out/base        # of train.py or train_base.py: losses -> loss.png
"""
import json
import os

import numpy as np

from prepare import read_json, write

# -----------------------------------------------------------------------------
out_dir = 'out/search' # of the run
# -----------------------------------------------------------------------------

BLUE, RED, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "0.75" # for the colour-blind too (Okabe & Ito)
STYLE = {"font.size": 9, "legend.fontsize": 8.5, "legend.frameon": False, "lines.linewidth": 1.4, "lines.markersize": 3,
         "axes.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 140}
STAR = {"marker": "*", "color": RED, "mec": "black", "mew": 0.5, "ls": "none", "clip_on": False, "zorder": 9}


def read_lines(path):
    """The objects of a .jsonl file, a list of dicts. A last line that a kill cut off is left out; SystemExit on other damage."""
    try:
        with open(path, "rb") as f:
            lines = f.read().split(b"\n")
    except OSError as e:
        raise SystemExit(f"{path} cannot be read: {e.strerror}; name the out_dir of a run.") from None
    found = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except ValueError: # of JSON or of utf-8
            if number == len(lines): # after the last newline: nothing, or a part of a line
                break
            value = None
        if not isinstance(value, dict):
            raise SystemExit(f"{path} is damaged: its line {number} is not a JSON object; mend or delete that line.")
        found.append(value)
    return found


def by_step(lines):
    """The lines in the order of their steps, of each step the last: a resumed run logs again what followed its checkpoint."""
    newest = {line["step"]: line for line in lines}
    return [newest[step] for step in sorted(newest)]


def describe(arch):
    """n_layer=3 n_head=4,4,8 ..., for people."""
    return " ".join(f"{name}={','.join(map(str, value)) if isinstance(value, list) else value}" for name, value in arch.items())


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
        options = config.get(choice)
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
                            ("val_arch_loss", GREEN, "o--", "architecture, val.bin")])
    sizes = describe({name: value for name, value in best["arch"].items() if not isinstance(value, list)})
    star, = ax.plot(best["step"], best["arch_loss"], markersize=11, **STAR)
    text = f"best: {sizes}, {best['cost']['params'] / 1e6:.2f}M params"
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
        if used:
            ax.plot(best["step"], start + np.argmax(row) + 0.5, markersize=6, **STAR)
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


def save_figure(path, height, draw):
    """draw(figure), then writes the figure, 9 by `height` inches, whole or not at all; returns path."""
    # here, for a search imports this file and draws only at its end; no pyplot, whose backend and figures are a notebook's
    import matplotlib
    from matplotlib.figure import Figure
    with matplotlib.rc_context(STYLE):
        figure = Figure((9, height), layout="constrained")
        draw(figure)
        write(path, lambda tmp: figure.savefig(tmp, format="png"))
    return path


def search_figure(out_dir):
    """Draws out_dir/search.png of a train_search.py run, returns its path; SystemExit if it has evaluated nothing yet."""
    config = read_json(os.path.join(out_dir, "run.json"))["config"]
    log = read_lines(os.path.join(out_dir, "log.jsonl"))
    found = evaluations(os.path.join(out_dir, "arch_traj.jsonl"), "arch_loss")
    lines, best = by_step(line for line in found if "weights" in line), best_of(found) # the result of spos has none
    labels, matrix = ([], None) if config["optimizer"] == "spos" else heat_map(lines, config) # of spos they stay uniform
    path = os.path.join(out_dir, "arch_search.jsonl")
    searched = read_lines(path) if os.path.exists(path) else []
    heights = [3.2, 1.1] + ([max(1, 0.125 * len(labels))] if labels else [2.2] if searched else []) # inches

    def draw(figure):
        axes = figure.subplots(len(heights), height_ratios=heights, sharex=not searched)
        draw_search_losses(axes[0], log, lines, best)
        axes[1].axhline(0, color="0.3", linewidth=0.6)
        draw_curves(axes[1], lines, [("gap", PURPLE, "o-", None)])
        axes[1].set_ylabel("gap")
        if labels:
            draw_weights(figure, axes[2], labels, matrix, lines, best, config["eval_interval"])
        elif searched:
            draw_searched(axes[2], searched)
        axes[1 if searched else -1].set_xlabel("step")
    return save_figure(os.path.join(out_dir, "search.png"), sum(heights) + 1.2, draw)


def train_figure(out_dir):
    """Draws out_dir/loss.png of a train.py or train_base.py run, returns its path; SystemExit if it has evaluated nothing yet."""
    path = os.path.join(out_dir, "log.jsonl")
    log, best = read_lines(path), best_of(evaluations(path, "train_loss"))
    return save_figure(os.path.join(out_dir, "loss.png"), 4.2, lambda figure: draw_training(figure.subplots(), log, best))


def evaluations(path, key):
    """The lines of a .jsonl file that hold key, at least one; SystemExit if there is none yet."""
    lines = [line for line in read_lines(path) if key in line]
    if not lines:
        raise SystemExit(f"{path} holds no evaluation yet: wait for the run's first one.")
    return lines


def best_of(lines):
    """The evaluation that a run keeps: of the lowest loss of the architecture, or of validation; without validation the last."""
    return min(lines, key=lambda line: line.get("arch_loss", line.get("val_loss", -line["step"])))


def table(lines):
    """The best and the last of evaluations, in columns."""
    keys = [key for key in ("arch_loss", "mixture_loss", "gap", "val_arch_loss", "train_loss", "val_loss") if key in lines[-1]]
    rows = [["", "step", *keys]]
    for name, line in (("best", best_of(lines)), ("last", lines[-1])):
        rows.append([name, str(line["step"]), *(f"{line[key]:.4f}" for key in keys)])
    return "\n".join("  ".join(cell.rjust(max(len(key), 7)) for key, cell in zip(rows[0], row, strict=True)) for row in rows)


def main(out_dir):
    """Draws the run's figure; prints the table, what the best architecture is and costs, and the figure's path."""
    traj, log = (os.path.join(out_dir, name) for name in ("arch_traj.jsonl", "log.jsonl"))
    if os.path.exists(traj):
        path, lines = search_figure(out_dir), evaluations(traj, "arch_loss")
        found, cost = describe(best_of(lines)["arch"]) + ": ", best_of(lines)["cost"]
    else:
        path, lines = train_figure(out_dir), evaluations(log, "train_loss")
        found, cost = "", read_lines(log)[0]
    print(table(lines))
    print(f"{found}{cost['params']:,} parameters, {cost['flops'] / 1e9:.3f} GFLOPs a sequence")
    print(f"figure: {path}")


if __name__ == "__main__":
    from configurator import configure
    main(configure(globals())["out_dir"])
