"""
Measures what one search iteration costs against two plain training steps of the largest network, side by side in one process.

    python bench.py                                             # the TinyStories space, 4 sequences of 224 tokens; some minutes
    python bench.py config/search_shakespeare_char.py --batch_size=16 --dropout=0.0 --compile=False
    python bench.py config/search_shakespeare_char.py --batch_size=16 --dropout=0.0 --compile=False --head_size=64
    python bench.py config/search_tinystories.py --device=cuda --dtype=bfloat16             # one GPU, compiled
    python bench.py --space=toy_cell --batch_size=64            # a space of search_spaces/, on random images of its usual size
    python bench.py --space=mobilenetv3 --img_size=128 --batch_size=8
    python bench.py --growth=True                               # how the ratio grows with the options and the layers, as a figure
    python bench.py --help                                      # every key with its default

An iteration is train_search.py's own, with both optimizers; a plain step is train.py's, of the same GPT without choices. Rounds
interleave them, so that whatever else the machine does meets all alike. The tokens are random: the speed does not depend on them.
On a CPU, PyTorch has a fused attention for dropout=0.0 alone.
Prints a table for people and, as its last line, one JSON object; the same goes to bench.json in out_dir.
"""
import itertools
import json
import os
import statistics
import time
os.environ.setdefault("KINETO_LOG_LEVEL", "99") # the memory profiler is silent
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

from analyze import save_figure
from optim_nas import ArchOptimizer, likeliest
from prepare import Images, Pairs, rng, write_json
from supernet import use_fused_ops
from train import build, configure_optimizer, draw, peak_flops, pick_device, setup, train_step, update, with_space
from train_search import * # noqa: F403 (every key of a search)
from train_search import arch_step, bilevel_step, weight_arch

# -----------------------------------------------------------------------------
# the keys of train_search.py but one, and:
del optimizer # noqa: F821 (methods takes its place)
methods = ['drnas', 'darts', 'gdas', 'spos']
rounds = 10
warmup = 2 # rounds before the first that counts
growth = False # instead: how DrNAS' ratio grows with
growth_options = [2, 3, 5, 9] # so many options of each choice, at most 9
growth_layers = [6, 12, 24]
vocab_size = 0 # 0: the dataset's
img_size = 0 # pixels a side, in a space of search_spaces/; 0: the space's usual size
out_dir = 'out/bench'
overwrite = True
# the TinyStories space
dataset = 'tinystories'
n_layer = [5, 6, 7]
n_head = [6, 8, 12]
n_embd = [384, 576, 768]
mlp_ratio = [2, 3, 4]
batch_size = 4
block_size = 224
# -----------------------------------------------------------------------------

VOCAB_SIZE = {"pydocs": 97, "shakespeare_char": 65, "tinystories": 50304, "openwebtext": 50304}
DRAWS = {"gdas": 2, "spos": 2} # iterations a round of the methods that draw large and small networks by turns
REPEATS = 3 # measurements of a step's parts
NUMBERS = {"ratio": "ratio", "low": "from", "high": "to", "ms": "ms", "arch_ms": "arch ms", "forward_ms": "forward",
           "backward_ms": "backward", "optimizer_ms": "optimizer", "saved_mb": "saved MB", "saved_ratio": "x plain", "peak_mb": "peak MB",
           "peak_ratio": "x plain", "samples_per_s": "samples/s", "mfu": "MFU"} # of the JSON object, and their heads in the table


def largest(net):
    """The architecture of the most parameters: of every choice the option that adds the most to their expectation, the last of equals."""
    weights = {name: torch.full(c.shape, 1 / len(c.options), requires_grad=True) for name, c in net.choices.items()}
    net.cost(weights)["params"].backward()
    gain = {name: torch.zeros(w.shape) if w.grad is None else w.grad for name, w in weights.items()}
    return likeliest(net.choices, {name: g + 1e-3 * torch.arange(g.shape[-1]) for name, g in gain.items()})


def random_data(net, config):
    """Tokens for some batches, or images, or pairs of images."""
    if config.space == "gpt":
        return torch.randint(config.vocab_size, (100 * config.block_size,), generator=rng(config.seed, "bench")).numpy().astype("uint16")
    if hasattr(net.config, "scale"):
        sides, s = np.full((config.batch_size, 2), net.config.patch), net.config.scale
        sizes = 3 * sides.prod(1) * (1 + s * s)
        pixels = np.random.default_rng(config.seed).integers(0, 256, sizes.sum(), dtype=np.uint8)
        return Pairs(pixels, sides, sizes.cumsum() - sizes, s)
    c, random, n = net.config, np.random.default_rng(config.seed), 4 * config.batch_size
    pixels = random.integers(0, 256, (n, c.img_size, c.img_size, c.in_channels), dtype=np.uint8)
    return Images(pixels, random.integers(0, c.num_classes, n), *np.full((2, c.in_channels), 100, np.float32), c.num_classes)


def contender(config, run, method=""):
    """The plain largest network (no method), or a supernet in search: all that their steps need, and step()."""
    net = build(vars(config))
    tokens = random_data(net, config)
    if not method:
        net = build(vars(config), largest(net))
    net = net.to(run.device)
    compiled = type(net).compile_parts if method and config.space == "gpt" else torch.compile
    c = SimpleNamespace(net=net, forward=compiled(net) if config.compile else net, optimizer=configure_optimizer(net, config, run),
                        state=SimpleNamespace(step=0, skipped=0, stage=1), method=method or "plain",
                        splits={"train": tokens, "search": tokens},
                        config=SimpleNamespace(**vars(config) | {"optimizer": method}), arch_step=None, seconds=[], ratios=[])
    c.step = lambda: train_step(net, c.forward, c.optimizer, tokens, config, run, c.state, config.learning_rate)
    if method:
        c.chooser = ArchOptimizer(method, net.choices, rng(config.seed, "alphas"), config.arch_learning_rate)
        c.step = lambda: bilevel_step(net, c.forward, c.chooser, c.optimizer, c.splits, c.config, run, c.state, config.learning_rate)
        if c.chooser.alphas:
            c.arch_step = lambda: arch_step(net, c.forward, c.chooser, c.splits, c.config, run, c.state)
    return c


def clock(function, run):
    """Seconds that function() takes, the device's work included."""
    wait = torch.cuda.synchronize if run.device_type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def advance(c, times=1):
    for _ in range(times):
        c.step()
        c.state.step += 1


def interleave(plain, searches, config, run, label="rounds"):
    """Fills c.seconds and c.ratios of every search: an iteration over the two plain steps just before and just after it."""
    for i in tqdm(range(config.warmup + config.rounds), desc=label, leave=False):
        before = clock(lambda: advance(plain), run)
        for c in searches:
            draws = DRAWS.get(c.method, 1)
            seconds = clock(lambda c=c, draws=draws: advance(c, draws), run) / draws
            after = clock(lambda: advance(plain), run)
            if i >= config.warmup:
                c.seconds.append(seconds)
                c.ratios.append(seconds / (before + after))
                plain.seconds.append(after)
            before = after


def parts(c, config, run):
    """Median milliseconds of the forward pass, the backward pass and the optimizer in a weight step, and of an arch step."""
    times = {"forward_ms": [], "backward_ms": [], "optimizer_ms": [], "arch_ms": []}
    loss = None

    def forward(x, y, third):
        nonlocal loss
        with run.amp:
            loss = c.forward(x, y, *third)[1]

    for i in range(REPEATS):
        times["forward_ms"].append(clock(lambda i=i: forward(*inputs(c, config, run, i)), run))
        times["backward_ms"].append(clock(loss.backward, run))
        times["optimizer_ms"].append(clock(lambda: update(c.net, c.optimizer, loss.detach(), config, run, c.state), run))
        if c.arch_step:
            times["arch_ms"].append(clock(c.arch_step, run))
    return {name: 1000 * statistics.median(seconds) for name, seconds in times.items() if seconds}


def inputs(c, config, run, i):
    """x, y and a supernet's third argument, as in a weight step."""
    x, y = draw(c.splits["train"], config, run, "train", i)
    return x, y, () if c.method == "plain" else (weight_arch(c.net, c.chooser, c.config, run, i / REPEATS, rng(config.seed, i)),)


def memory(c, config, run):
    """Megabytes that the forward pass of a step keeps for its backward pass, parameters aside, and that a step allocates at its peak:
    the larger of the arch step's and the weight step's."""
    x, y, third = inputs(c, config, run, 0)
    kept, own = {}, {t.untyped_storage().data_ptr() for t in (*c.net.parameters(), *c.net.buffers(), x, y)}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    def saved(function):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            function()
        return sum(size for pointer, size in kept.items() if pointer not in own)
    with run.amp:
        savings = [saved(lambda: c.net(x, y, *third))]
    peaks = [peak(c.step, run)]
    if c.arch_step:
        peaks.append(peak(c.arch_step, run))
        savings.append(saved(c.arch_step))
    return {"saved_mb": max(savings) / 1e6, "peak_mb": max(peaks) / 1e6}


def peak(function, run):
    """Bytes that function() allocates at its peak, above what there was before."""
    if run.device_type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = sorted((e.start_ns(), e.nbytes()) for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")
    return max(itertools.accumulate(size for _, size in events))


def measure(config):
    """{"drnas": {"ratio": ..., ...}, ..., "plain": {...}}, all that the table shows."""
    config = SimpleNamespace(**config)
    run = setup(config)
    if config.space == "gpt":
        config.vocab_size = config.vocab_size or VOCAB_SIZE[config.dataset]
    if not config.img_size:
        del config.img_size
    config.gradient_accumulation_steps, config.arch_warmup_iters = 1, 0 # the alphas move in every iteration
    use_fused_ops(config.fused and run.device_type == "cpu")
    plain, *searches = (contender(config, run, method) for method in ("", *config.methods))
    interleave(plain, searches, config, run)
    results = {}
    for c in tqdm((plain, *searches), desc="parts and memory", leave=False):
        seconds = statistics.median(c.seconds)
        r = {"ms": 1000 * seconds, "samples_per_s": config.batch_size / seconds, **parts(c, config, run), **memory(c, config, run)}
        if c.ratios:
            low, _, high = statistics.quantiles(c.ratios, n=4)
            r |= {"ratio": statistics.median(c.ratios), "low": low, "high": high}
            r |= {f"{name}_ratio": r[f"{name}_mb"] / results["plain"][f"{name}_mb"] for name in ("saved", "peak")}
        elif peak_flops(run):
            r["mfu"] = 3 * c.net.cost()["flops"] * config.batch_size / seconds / peak_flops(run)
        results[c.method] = {name: round(value, 4) for name, value in r.items()}
    return results


def table(results):
    """The numbers that there are as lines of text, a column for each head in NUMBERS."""
    rows = [["", *NUMBERS.values()]]
    for method, r in results.items():
        rows.append([method, *("" if r.get(k) is None else f"{r[k]:.3g}" if r[k] < 10 else f"{r[k]:,.0f}" for k in NUMBERS)])
    rows = list(zip(*[column for column in zip(*rows, strict=True) if any(column[1:])], strict=True))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def measure_growth(config):
    """The ratio of DrNAS, {series: {size: {...}}}: options of each choice on 9 layers, then layers with 3 options of each choice; with
    heads of n_embd / n_head channels, then of 48. Draws growth.png."""
    widths, heads, ratios = range(48, 433, 48), [1, 2, 3, 4, 6, 8, 12, 16, 24], [1 + 3 * i / 8 for i in range(9)]
    results = {}
    for head_size in (0, 48):
        heads = list(range(1, 10)) if head_size else heads
        for axis, sizes in (("options", config["growth_options"]), ("layers", config["growth_layers"])):
            for size in sizes:
                K, L = (size, 9) if axis == "options" else (3, size)
                some = [round(8 * i / (K - 1)) for i in range(K)] # evenly, with the first and the last
                space = {"n_layer": list(range(L - K + 1, L + 1)), "n_embd": [widths[i] for i in some], "n_head": [heads[i] for i in some],
                         "mlp_ratio": [ratios[i] for i in some], "head_size": head_size}
                options = SimpleNamespace(**config | space | {"vocab_size": 256, "gradient_accumulation_steps": 1})
                run = setup(options)
                use_fused_ops(options.fused and run.device_type == "cpu")
                plain, search = contender(options, run), contender(options, run, "drnas")
                label = f"{axis}, {'heads of 48' if head_size else 'n_embd / n_head'}"
                interleave(plain, [search], options, run, f"{label}: {size}")
                low, _, high = statistics.quantiles(search.ratios, n=4)
                results.setdefault(label, {})[size] = {"ratio": statistics.median(search.ratios), "low": low, "high": high}
                print(f"{label}: {size} -> {results[label][size]['ratio']:.3f} ({low:.3f} to {high:.3f})", flush=True)
    print(f"figure: {growth_figure(results, config['out_dir'])}")
    return results


def growth_figure(results, out_dir):
    def draw(figure):
        for ax, axis in zip(figure.subplots(1, 2, sharey=True), ("options", "layers"), strict=True):
            for label, points in results.items():
                if label.startswith(axis):
                    x, r = list(points), list(points.values())
                    errors = [[p["ratio"] - p["low"] for p in r], [p["high"] - p["ratio"] for p in r]]
                    ax.errorbar(x, [p["ratio"] for p in r], errors, marker="o", label=label.split(", ")[1])
            ax.axhline(1, color="0.6", lw=0.8, ls="--")
            ax.set(xlabel={"options": "options of each choice", "layers": "layers"}[axis], xticks=x, ylim=(0, None))
            ax.legend(frameon=False, title="head size")
        figure.axes[0].set_ylabel("search iteration / two plain steps")
    return save_figure(os.path.join(out_dir, "growth.png"), 3, draw)


def main(config):
    os.makedirs(config["out_dir"], exist_ok=True)
    results = measure_growth(config) if config["growth"] else measure(config)
    on_cuda = pick_device(config["device"]).startswith("cuda")
    where = torch.cuda.get_device_name() if on_cuda else f"CPU, {torch.get_num_threads()} threads"
    if not config["growth"]:
        of = f"{config['batch_size']} x {config['block_size']} tokens" if config["space"] == "gpt" else f"{config['batch_size']} images"
        print(f"{of} on {where}; ratio: an iteration over two plain steps of the largest "
              "network, median and quartiles")
        print(table(results))
    write_json(os.path.join(config["out_dir"], "bench.json"), {"config": config, "where": where, "results": results})
    print(json.dumps(results))


if __name__ == "__main__":
    from configurator import configure
    main(configure(with_space(globals())))
