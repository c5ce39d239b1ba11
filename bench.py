"""
Measures what one search iteration costs against two plain training steps of the largest network, side by side in one process; or how
fast the networks of a space run on this machine.

    python bench.py                                             # the TinyStories space, 4 sequences of 224 tokens; some minutes
    python bench.py config/search_shakespeare_char.py --batch_size=16 --dropout=0.0 --compile=False
    python bench.py config/search_shakespeare_char.py --batch_size=16 --dropout=0.0 --compile=False --head_size=64
    python bench.py config/search_tinystories.py --device=cuda --dtype=bfloat16             # one GPU, compiled
    python bench.py --space=toy_cell --batch_size=64            # a space of search_spaces/, on random images of its usual size
    python bench.py --space=mobilenetv3 --img_size=128 --batch_size=8
    python bench.py --growth=True                               # how the ratio grows with the options and the layers, as a figure
    python bench.py latency config/search_shakespeare_char.py --out_dir=out/latency         # a table for --target_latency; a minute
    python bench.py latency --space=nb201 --dataset=cifar10 --latency_batch_size=[1,32] --out_dir=out/latency_nb201
    python bench.py --help                                      # every key with its default

An iteration is train_search.py's own, with both optimizers; a plain step is train.py's, of the same GPT without choices. Rounds
interleave them, so that whatever else the machine does meets all alike. The tokens are random: the speed does not depend on them.
On a CPU, PyTorch has a fused attention for dropout=0.0 alone.
Prints a table for people and, as its last line, one JSON object; the same goes to bench.json in out_dir.

`latency` writes latency.json to out_dir: milliseconds, without gradients, of a forward pass over a prompt (prefill) and of one more token
with keys and values cached (decode), for every batch size and length asked for. Of a GPT every part is timed inside of networks; of other
spaces random networks are, and a linear function with no negative coefficients is fitted to them. Either predicts random networks that it
has not seen; how well is printed, and stays in the file.
"""
import itertools
import json
import os
import statistics
import sys
import time
os.environ.setdefault("KINETO_LOG_LEVEL", "99") # the memory profiler is silent
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

from analyze import save_figure
from budget import latency_features, latency_key, latency_predictor, network_id
from configurator import as_list, check_range, check_whole
from data import Images, Pairs, draw, load_data, load_meta, vocabulary
from fused_ops import use_fused_ops
from optim_nas import discretize, method_class, random_search
from run import peak_flops, pick_device, rng, setup, write_json
from search_spaces import build, with_space
from supernet import one_hot
from train import configure_optimizer, train_step, update
from train_search import arch_step, bilevel_step, weight_arch
from train_search import * # noqa: F403 (every key of a search)
from prepare import prepare_own
from train import check_run

# -----------------------------------------------------------------------------
# the keys of train_search.py but one, and:
del optimizer # noqa: F821 (methods takes its place)
methods = ['drnas', 'darts', 'gdas', 'spos']
rounds = 10
warmup = 2 # rounds before the first that counts
growth = False # instead: how DrNAS' ratio grows with
growth_options = [2, 3, 5, 9] # so many options of each choice, at most 9
growth_layers = [6, 12, 24]
latency = False # instead: the latency table of this machine; `python bench.py latency` for short
latency_batch_size = [1] # one or several
latency_length = [0] # tokens, one or several; 0: block_size
latency_samples = 150 # networks that the function for other spaces than the GPT is fitted to
latency_heldout = 20 # networks that the prediction is compared with
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

VOCAB_SIZE = {"pydocs": 96, "this_python": 96, "shakespeare_char": 65,
              "tinystories": 50257, "openwebtext": 50257} # tokens of data sets
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
    return discretize(net.choices, {name: g + 1e-3 * torch.arange(g.shape[-1]) for name, g in gain.items()})


def vocab_size_of(config):
    """That of the networks of a search: of data that is not prepared the usual one. SystemExit if nothing is known of it."""
    prepared = os.path.exists(os.path.join(config.data_dir, config.dataset, "meta.json"))
    size = None if prepared else VOCAB_SIZE.get(config.dataset)
    return config.vocab_size or vocabulary(size or load_meta(config.data_dir, config.dataset, "text")["vocab_size"], config)


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
                        state=SimpleNamespace(step=0, skipped=0, began=0), method=method or "plain",
                        splits={"train": tokens, "search": tokens},
                        config=SimpleNamespace(**vars(config) | {"optimizer": method}), arch_step=None, seconds=[], ratios=[])
    c.step = lambda: train_step(net, c.forward, c.optimizer, tokens, config, run, c.state, config.learning_rate)
    if method:
        c.arch_optimizer = method_class(method)(net.choices, rng(config.seed, "alphas"), learning_rate=config.arch_learning_rate)
        c.step = lambda: bilevel_step(net, c.forward, c.arch_optimizer, c.optimizer, c.splits, c.config, run, c.state, config.learning_rate)
        if c.arch_optimizer.has_alphas:
            c.arch_step = lambda: arch_step(net, c.forward, c.arch_optimizer, c.splits, c.config, run, c.state)
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
    return x, y, () if c.method == "plain" else (weight_arch(c.arch_optimizer, run, i / REPEATS, rng(config.seed, i)),)


def memory(c, config, run):
    """Megabytes that the forward pass of a step keeps for its backward pass, parameters aside, and that a step allocates at its peak:
    the larger of the arch step's and the weight step's."""
    x, y, third = inputs(c, config, run, 0)
    top_edges, own = {}, {t.untyped_storage().data_ptr() for t in (*c.net.parameters(), *c.net.buffers(), x, y)}

    def pack(t):
        top_edges[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    def saved(function):
        top_edges.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            function()
        return sum(size for pointer, size in top_edges.items() if pointer not in own)
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
    check_run(config)
    run = setup(config)
    if config.space == "gpt":
        config.vocab_size = vocab_size_of(config)
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
                check_run(options)
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


# -----------------------------------------------------------------------------
# the latency of networks, and of the parts of a GPT

def facts_of(config, run):
    """What the networks must know of the data, where it is prepared; else its usual vocabulary, or the space's usual images."""
    if config.space == "gpt":
        return {"vocab_size": vocab_size_of(config)}
    prepared = os.path.exists(os.path.join(config.data_dir, config.dataset, "meta.json"))
    if config.dataset == "digits":
        prepare_own(config, run)
    facts = load_data(config, run)[2] if prepared or config.dataset == "digits" else {}
    return facts | {key: value for key, value in vars(config).items() if key == "img_size"}


def stand_alone(config, arch, pool):
    """The network of an architecture, its parameters in the pool, a flat tensor: no two of them run at the same time."""
    net, start = build(vars(config), arch).eval(), 0
    for p in net.parameters():
        p.data = pool.as_strided(p.shape, p.stride(), start)
        start += -(-p.numel() // 16) * 16 # whole lines of the cache
    return net.to(pool.device)


def forward_pass(net, config, of, batch_size, length, run):
    """A function that gets ready, and returns one that runs the network once, as generate() does: on a prompt, or on one token with the
    keys and values of those before it; or on images."""
    if config.space != "gpt":
        x, _ = draw(random_data(net, config), SimpleNamespace(**vars(config) | {"batch_size": batch_size}), run, "latency", 0)
        return lambda: lambda: net(x)
    n = length if of == "prefill" else 1
    x = torch.randint(config.vocab_size, (batch_size, n), device=run.device)
    widths = [block.attn.c_proj.weight.shape[1] for block in net.transformer.h]
    cache = [{name: torch.randn(batch_size, length, width, device=run.device) for name in "kv"} for width in widths]

    def ready():
        for layer in cache: # what it holds from the last time is freed where generate() frees it: memory has its price
            layer.update({name: t[:, n:] for name, t in layer.items()})
        return lambda: net(x, cache=cache if length > n else [{} for _ in widths])
    return ready


def stopwatch(run):
    """mark(), and stop() -> the seconds between the marks since the last stop(). On a CPU with one thread these are the processor's, which
    leave out what other processes took of it; with more threads the clock's; on a GPU its own."""
    now, marks = time.process_time if torch.get_num_threads() == 1 else time.perf_counter, []

    def mark():
        if run.device_type == "cuda":
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        else:
            marks.append(now())

    def stop():
        if run.device_type == "cuda":
            torch.cuda.synchronize()
        found = [a.elapsed_time(b) / 1000 if run.device_type == "cuda" else b - a for a, b in itertools.pairwise(marks)]
        marks.clear()
        return found
    return mark, stop


def fast_times(functions, mark, stop, config, label):
    """[milliseconds between the marks that each function makes, as one that starts and one that ends it]: the lowest tenth over rounds
    of all of them in random order: what else the machine does only ever adds."""
    times, generator = [[] for _ in functions], rng(config.seed, label)
    for i in tqdm(range(config.warmup + config.rounds), desc=label, leave=False):
        for j in torch.randperm(len(functions), generator=generator).tolist():
            functions[j]()() # the caches are as in use
            start = time.perf_counter()
            while time.perf_counter() - start < 0.02: # short ones several times
                function = functions[j]()
                stop()
                mark()
                function()
                mark()
                if i >= config.warmup:
                    times[j].append(stop())
    return [1000 * np.quantile(t, 0.1, axis=0) for t in times]


def archs_of_parts(choices):
    """Of each n_embd: the deepest networks, of every n_head and mlp_ratio, alike in all layers; then as many of each other depth, mixed."""
    (*depths, deepest), widths = choices["n_layer"].options, choices["n_embd"].options
    layered = {name: choices[name].options for name in ("n_head", "mlp_ratio")}
    rows = range(max(map(len, layered.values())))

    def arch(e, L, j, step):
        return {"n_layer": L, "n_embd": e} | {name: [o[(j + step * i) % len(o)] for i in range(L)] for name, o in layered.items()}
    return [arch(e, deepest, j, 0) for e in widths for j in rows], [arch(e, L, j, 1) for e in widths for L in depths for j in rows]


def mark_parts(net, mark):
    """Lets a GPT make a mark before each attention, each MLP and the last norm."""
    for module in (*(m for block in net.transformer.h for m in (block.attn, block.mlp)), net.transformer.ln_f):
        module.register_forward_pre_hook(lambda *args: mark())


def table_of_parts(choices, alike, mixed, marked, whole):
    """
    The milliseconds of a GPT's parts, as latency_features() has them. marked: those between the marks in the networks of alike; whole: of
    all networks of archs_of_parts() without marks, which cost time.

    A part has the norm behind it. The rest of a width and depth are embeddings, the last norm and the head, and what its layers take more,
    or less, than the deepest network's: there are caches that only a shallow one fits.
    """
    places = {name: {option: i for i, option in enumerate(c.options)} for name, c in choices.items()}
    ms = {name: np.zeros((len(places["n_embd"]), len(places[of]))) for name, of in
          (("rest", "n_layer"), ("attention", "n_head"), ("mlp", "mlp_ratio"))}
    for arch, times in zip(alike, marked, strict=True):
        i = places["n_embd"][arch["n_embd"]]
        ms["attention"][i, places["n_head"][arch["n_head"][0]]] = times[1:-1:2].mean()
        ms["mlp"][i, places["mlp_ratio"][arch["mlp_ratio"][0]]] = times[2:-1:2].mean()
    found = {}
    for arch, total in zip([*alike, *mixed], whole, strict=True):
        i, depth = places["n_embd"][arch["n_embd"]], places["n_layer"][arch["n_layer"]]
        layers = sum(ms["attention"][i, places["n_head"][h]] + ms["mlp"][i, places["mlp_ratio"][m]]
                     for h, m in zip(arch["n_head"], arch["mlp_ratio"], strict=True))
        found.setdefault((i, depth), []).append(total - layers)
    for place, totals in found.items():
        ms["rest"][place] = np.mean(totals)
    return {name: table.tolist() for name, table in ms.items()}


def fit(features, ms):
    """
    The coefficients, none negative, of the linear function of the features that has the smallest squared relative error, by coordinate
    descent; with a ridge, larger for what single rows add, which is little, to what all rows have in common.

    features: [{name: tensor}] of each network, ms: [its milliseconds].
    """
    A = torch.stack([torch.cat([f.flatten() for f in row.values()]) for row in features]) / torch.tensor(ms).double().unsqueeze(-1)
    scale = A.square().mean(0).sqrt().clamp_min(1e-30) # of relative errors: (features,)
    A = A / scale
    ridge = torch.cat([torch.full((f.numel(),), 100.0 if f.dim() == 2 else 0.1).double() for f in features[0].values()])
    G, b, w = A.T @ A + ridge.diag(), A.sum(0), torch.zeros(len(scale)).double()
    for _ in range(300):
        for i in range(len(w)):
            w[i] = (w[i] + (b[i] - G[i] @ w) / G[i, i]).clamp_min(0)
    values = (w / scale).split([f.numel() for f in features[0].values()])
    return {name: value.view(f.shape).tolist() for (name, f), value in zip(features[0].items(), values, strict=True)}


def predicted(net, ms, archs, measured):
    """What the coefficients ms say of networks, beside what was measured."""
    predict = latency_predictor(net, ms)
    rows = [{"arch": arch, "measured": m, "predicted": predict(arch)} for arch, m in zip(archs, measured, strict=True)]
    errors = [abs(row["predicted"] / row["measured"] - 1) for row in rows]
    return {"ms": ms, "mean_error": statistics.mean(errors), "max_error": max(errors), "heldout": rows}


def measure_latency(config):
    """Writes latency.json; returns {key: {"mean_error", "max_error"}}, relative, on the networks held out."""
    config = SimpleNamespace(**config)
    check_run(config)
    run, gpt = setup(config), config.space == "gpt"
    batch_sizes, lengths = map(as_list, (config.latency_batch_size, config.latency_length))
    vars(config).update(facts_of(config, run))
    use_fused_ops(config.fused and run.device_type == "cpu" and not gpt)
    net = build(vars(config))
    lengths = [length or config.block_size for length in lengths] if gpt else [0]
    if gpt and max(lengths) > config.block_size:
        raise SystemExit(f"latency_length={max(lengths)} is above block_size={config.block_size}: that many positions the networks have.")
    n = config.latency_heldout + (0 if gpt else config.latency_samples)
    archs = [arch for _, arch in random_search(net.choices, lambda arch: 0.0, n, rng(config.seed, "latency"))]
    alike, mixed = archs_of_parts(net.choices) if gpt else ([], [])
    held = min(config.latency_heldout, len(archs) if gpt else len(archs) // 2)
    networks = [*archs, *alike, *mixed, *alike]
    with torch.device("meta"): # no memory
        sizes = [sum(p.numel() + 16 for p in build(vars(config), arch).parameters()) for arch in networks]
    pool, (mark, stop) = 0.02 * torch.randn(max(sizes), device=run.device), stopwatch(run)
    nets = [stand_alone(config, arch, pool) for arch in tqdm(networks, desc="networks", leave=False)]
    first, last = len(archs), len(archs) + len(alike) + len(mixed) # of the networks of parts without marks
    for small in nets[last:]:
        mark_parts(small, mark)
    latencies = {}
    for of, batch_size, length in itertools.product(("prefill", "decode") if gpt else ("prefill",), batch_sizes, lengths):
        key = latency_key(net, of, batch_size, length)
        with torch.inference_mode(), run.amp:
            times = fast_times([forward_pass(small, config, of, batch_size, length, run) for small in nets], mark, stop, config, key)
        ms = [t.item() for t in times[:last]]
        found = table_of_parts(net.choices, alike, mixed, times[last:], ms[first:]) if gpt else \
            fit([latency_features(net, one_hot(net.choices, arch)) for arch in archs[held:]], ms[held:])
        latencies[key] = predicted(net, found, archs[:held], ms[:held])
        print("{}: {:.3g} to {:.3g} ms; {} networks held out are predicted within {:.1%}, in the mean {:.1%}".format(
            key, min(ms[:held]), max(ms[:held]), held, latencies[key]["max_error"], latencies[key]["mean_error"]), flush=True)
    path = os.path.join(config.out_dir, "latency.json")
    write_json(path, {"network": network_id(net, config), "latencies": latencies, "machine": where(config), "dtype": run.dtype,
                      "threads": torch.get_num_threads(), "torch": torch.__version__, "config": vars(config)})
    print(f"table: {path}")
    return {key: {name: found[name] for name in ("mean_error", "max_error")} for key, found in latencies.items()}


def where(config):
    on_cuda = pick_device(config.device).startswith("cuda")
    return torch.cuda.get_device_name() if on_cuda else f"CPU, {torch.get_num_threads()} threads"


def main(config):
    c = SimpleNamespace(**config)
    check_whole(c, "growth_options", "growth_layers", "latency_batch_size", "latency_length")
    check_range(c, 1 if c.latency else 2, "rounds") # quartiles need two
    check_range(c, 1, "max_iters", "latency_batch_size", "latency_samples", "latency_heldout")
    check_range(c, 0, "warmup", "latency_length", "img_size")
    check_range(c, 2, "growth_options", below=10)
    check_range(c, 3, "growth_layers") # three options of n_layer
    os.makedirs(config["out_dir"], exist_ok=True)
    if not config["img_size"]:
        del config["img_size"]
    if config["latency"]:
        print(json.dumps(measure_latency(config)))
        return
    results = measure_growth(config) if config["growth"] else measure(config)
    if not config["growth"]:
        of = f"{config['batch_size']} x {config['block_size']} tokens" if config["space"] == "gpt" else f"{config['batch_size']} images"
        print(f"{of} on {where(SimpleNamespace(**config))}; ratio: an iteration over two plain steps of the largest "
              "network, median and quartiles")
        print(table(results))
    write_json(os.path.join(config["out_dir"], "bench.json"), {
        "config": config, "where": where(SimpleNamespace(**config)), "results": results})
    print(json.dumps(results))


if __name__ == "__main__":
    from configurator import configure
    if sys.argv[1:2] == ["latency"]:
        sys.argv[1] = "--latency=True"
    main(configure(with_space(globals())))
