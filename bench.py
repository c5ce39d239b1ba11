"""
Measures what one search iteration costs against two plain training steps of the largest network,
or how fast the networks of a space run on this machine.

    python bench.py                                    # the TinyStories space; some minutes
    python bench.py config/search_shakespeare_char.py --batch_size=16 --dropout=0.0 --compile=False
    python bench.py config/search_shakespeare_char.py --batch_size=16 --dropout=0.0 --head_size=64
    python bench.py config/search_tinystories.py --device=cuda --dtype=bfloat16  # one GPU, compiled
    python bench.py --space=toy_cell --batch_size=64   # a space of search_spaces/, random images
    python bench.py --space=mobilenetv3 --img_size=128 --batch_size=8
    python bench.py --growth=True                      # the ratio over options and layers, a figure
    python bench.py latency config/search_shakespeare_char.py --out_dir=out/latency   # a minute
    python bench.py latency --space=nb201 --dataset=cifar10 --latency_batch_size=[1,32]
    python bench.py --help                             # every key with its default

A search iteration is that of train_search.py, with both optimizers. A plain step is that of
train.py, of the largest network alone. All run in one process and take turns, so that whatever
else the machine does slows all of them alike. The data is random: the speed does not depend on it.
On a CPU PyTorch has a fused attention only for dropout=0.0.
Prints a table and, as its last line, one JSON object, and writes the same to bench.json in out_dir.

`latency` writes latency.json to out_dir, for --latency_table of train_search.py. It has the
milliseconds, without gradients, of a forward pass over a prompt (prefill) and of one more token
with cached keys and values (decode), for every latency_batch_size and latency_length. A GPT is
timed part by part; in other spaces a linear function is fitted to the times of random networks.
Either predicts random networks that it has not seen: the errors are printed, and are in the file.
"""
import itertools
import json
import os
import statistics
import sys
import time
from types import SimpleNamespace
os.environ.setdefault("KINETO_LOG_LEVEL", "99") # silences the memory profiler

import numpy as np
import torch
from scipy.optimize import nnls
from tqdm import tqdm

from analyze import save_figure
from budget import has_parts, latency_features, latency_key, latency_predictor, network_id
from configurator import WHOLE, as_list, at_least, at_least_below, check_limits, configure
from data import Images, Pairs, Tokens, load_meta, padded_vocab_size
from fused_ops import use_fused_ops
from optim_nas import discretize, method_class, random_search
from prepare import prepare_own
from run import peak_flops, pick_device, rng, setup, write_json
from search_spaces import build, data_kind, with_space
from supernet import one_hot
from train import TrainState, check_config, configure_optimizer, train_step
from train_search import SearchState, arch_step, compiled, train_archs
from train_search import * # noqa: F403 (every key of a search)

# -----------------------------------------------------------------------------
# the keys of train_search.py but one, and:
del optimizer # noqa: F821 (methods takes its place)
methods = ['drnas', 'darts', 'gdas', 'spos']
rounds = 10
warmup = 2 # rounds that are not counted, before the others
growth = False # measure instead how the ratio of DrNAS grows with the options and the layers
growth_options = [2, 3, 5, 9] # options of each choice, at most 9
growth_layers = [6, 12, 24]
latency = False # measure instead the latency table; `python bench.py latency` for short
latency_batch_size = [1] # one or several
latency_length = [0] # tokens, one or several; 0: block_size
latency_samples = 150 # other spaces than the GPT: networks that the linear function is fitted to
latency_heldout = 20 # networks that the predictions are compared with
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
head_size = 0
norm = ['layernorm']
position = ['learned']
qk_norm = [False]
activation = ['gelu']
n_kv_head = [0]
window = [0]
batch_size = 4
block_size = 224
# -----------------------------------------------------------------------------

INTEGERS = ("growth_options", "growth_layers", "latency_batch_size", "latency_length")
LIMITS = {
    **dict.fromkeys(("max_iters", "latency_batch_size", "latency_samples", "latency_heldout"),
                    at_least(1)),
    **dict.fromkeys(("warmup", "latency_length", "img_size"), at_least(0)),
    "growth_options": at_least_below(2, 10),
    "growth_layers": at_least(3)} # for three options of n_layer
# tokens of data sets that need not be prepared
VOCAB_SIZE = {"pydocs": 96, "this_python": 96, "shakespeare_char": 65, "tinystories": 50257,
              "openwebtext": 50257}
REPEATS = 3 # measurements of the parts of a step
COLUMNS = { # key of the results -> head of the table's column
    "ratio": "ratio", "low": "from", "high": "to", "ms": "ms", "arch_ms": "arch ms",
    "forward_ms": "forward", "backward_ms": "backward", "optimizer_ms": "optimizer",
    "saved_mb": "saved MB", "saved_ratio": "x plain", "peak_mb": "peak MB", "peak_ratio": "x plain",
    "samples_per_s": "samples/s", "mfu": "MFU"}

# -----------------------------------------------------------------------------
# what is measured: the plain largest network, and supernets in search

def largest(net):
    """The architecture with the most FLOPs.

    Of each choice it has the option with the largest gradient of the expected FLOPs, the last one
    of equals.
    """
    weights = {name: torch.full(c.shape, 1 / len(c.options), requires_grad=True)
               for name, c in net.choices.items()}
    net.cost(weights)["flops"].backward()
    gains = {}
    for name, w in weights.items():
        gain = torch.zeros(w.shape) if w.grad is None else w.grad
        gains[name] = gain + 1e-3 * torch.arange(w.shape[-1])
    return discretize(net.choices, gains)


def vocab_size_of(config):
    """The vocab_size of a search's networks: the key's, or that of the data set.

    SystemExit if the data set is not prepared and not in VOCAB_SIZE.
    """
    if config.vocab_size:
        return config.vocab_size
    size = None if is_prepared(config) else VOCAB_SIZE.get(config.dataset)
    if size is None:
        size = load_meta(config.data_dir, config.dataset, "text")["vocab_size"]
    return padded_vocab_size(size, config)


def is_prepared(config):
    return os.path.exists(os.path.join(config.data_dir, config.dataset, "meta.json"))


def random_data(net, config):
    """Random data of the kind that the network takes, for some batches."""
    kind, random = data_kind(config.space), np.random.default_rng(config.seed)
    if kind is Tokens:
        ids = random.integers(0, config.vocab_size, 100 * config.block_size, dtype=np.uint32)
        return Tokens(ids)
    if kind is Pairs:
        sides, s = np.full((config.batch_size, 2), net.config.patch), net.config.scale
        sizes = 3 * sides.prod(1) * (1 + s * s)
        pixels = random.integers(0, 256, sizes.sum(), dtype=np.uint8)
        return Pairs(pixels, sides, sizes.cumsum() - sizes, s)
    c, n = net.config, 4 * config.batch_size
    shape = n, c.img_size, c.img_size, c.in_channels
    pixels = random.integers(0, 256, shape, dtype=np.uint8)
    labels = random.integers(0, c.num_classes, n)
    mean, std = np.full((2, c.in_channels), 100, np.float32)
    return Images(pixels, labels, mean, std, c.num_classes)


class Contender:
    """The plain largest network (no method) or a supernet in search, with what its steps need."""

    def __init__(self, config, run, method=""):
        net = build(vars(config))
        data = random_data(net, config)
        self.splits = {"train": data, "search": data}
        self.method, self.config, self.run = method or "plain", config, run
        if method:
            self.net = net.to(run.device)
            self.forward = compiled(self.net, config)
            self.arch_optimizer = method_class(method)(net.choices, rng(config.seed, "alphas"),
                                                       learning_rate=config.arch_learning_rate)
            self.state = SearchState()
        else:
            self.net = build(vars(config), largest(net)).to(run.device)
            self.forward = torch.compile(self.net) if config.compile else self.net
            self.arch_optimizer, self.state = None, TrainState()
        self.optimizer = configure_optimizer(self.net, config, run)
        self.seconds, self.ratios = [], [] # of a step or iteration; over two plain steps

    @property
    def has_alphas(self):
        return self.arch_optimizer is not None and self.arch_optimizer.has_alphas

    @property
    def draws_a_round(self):
        """Iterations a round: a method that draws single architectures has larger and smaller."""
        return 2 if self.arch_optimizer.is_hard else 1

    def step(self):
        """One plain training step, or one iteration of the search."""
        if self.has_alphas:
            self.arch_step()
        archs = self.archs(self.state) if self.arch_optimizer else (None,)
        train_step(self.net, self.forward, self.optimizer, self.splits["train"], self.config,
                   self.run, self.state, self.config.learning_rate, archs)

    def advance(self, times=1):
        for _ in range(times):
            self.step()
            self.state.step += 1

    def arch_step(self):
        """The step of the alphas alone."""
        arch_step(self.net, self.forward, self.arch_optimizer, self.splits, self.config, self.run,
                  self.state)

    def archs(self, state):
        """What the weights of the supernet are trained as."""
        return train_archs(self.arch_optimizer, self.config, self.run, state)

    def inputs(self, i):
        """The arguments of the network in the i-th weight step."""
        x, y = self.splits["train"].batch(self.config, "train", i, device=self.run.device)
        return (x, y, self.archs(SearchState(step=i))[0]) if self.arch_optimizer else (x, y)

# -----------------------------------------------------------------------------
# ratios

def clock(function, run):
    """The seconds that function() takes, the device's work included."""
    def wait():
        if run.device_type == "cuda":
            torch.cuda.synchronize()

    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def interleave(plain, searches, config, run, label="rounds"):
    """Fills the seconds of all and the ratios of the searches.

    A ratio is that of an iteration over the two plain steps just before and just after it.
    """
    for i in tqdm(range(config.warmup + config.rounds), desc=label, leave=False):
        before = clock(plain.advance, run)
        for c in searches:
            draws = c.draws_a_round
            seconds = clock(lambda c=c, draws=draws: c.advance(draws), run) / draws
            after = clock(plain.advance, run)
            if i >= config.warmup:
                c.seconds.append(seconds)
                c.ratios.append(seconds / (before + after))
                plain.seconds.append(after)
            before = after


def quartiles(ratios):
    low, median, high = statistics.quantiles(ratios, n=4)
    return {"ratio": median, "low": low, "high": high}

# -----------------------------------------------------------------------------
# parts of a step

def parts(c, config, run):
    """Median milliseconds of the forward pass, the backward pass and the optimizer in a weight
    step, and of the step of the alphas."""
    times = {"forward_ms": [], "backward_ms": [], "optimizer_ms": [], "arch_ms": []}
    loss = None

    def forward(inputs):
        nonlocal loss
        with run.amp:
            loss = c.forward(*inputs)[1]

    def optimize():
        torch.nn.utils.clip_grad_norm_(c.net.parameters(), config.grad_clip or torch.inf)
        c.optimizer.step()
        c.optimizer.zero_grad(set_to_none=True)

    for i in range(REPEATS):
        inputs = c.inputs(i)
        times["forward_ms"].append(clock(lambda inputs=inputs: forward(inputs), run))
        times["backward_ms"].append(clock(loss.backward, run))
        times["optimizer_ms"].append(clock(optimize, run))
        if c.has_alphas:
            times["arch_ms"].append(clock(c.arch_step, run))
    return {name: 1000 * statistics.median(seconds) for name, seconds in times.items() if seconds}

# -----------------------------------------------------------------------------
# memory

def memory(c, run):
    """Megabytes of a step: what the forward pass keeps for the backward pass, parameters aside, and
    what is allocated at the peak. Of a search, the larger of its two steps."""
    inputs = c.inputs(0)
    kept = {} # address of a storage -> bytes
    own = {t.untyped_storage().data_ptr()
           for t in (*c.net.parameters(), *c.net.buffers(), *inputs[:2])}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    def saved(function):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            function()
        return sum(size for pointer, size in kept.items() if pointer not in own)

    with run.amp:
        saved_bytes = [saved(lambda: c.net(*inputs))]
    peaks = [peak(c.step, run)]
    if c.has_alphas:
        peaks.append(peak(c.arch_step, run))
        saved_bytes.append(saved(c.arch_step))
    return {"saved_mb": max(saved_bytes) / 1e6, "peak_mb": max(peaks) / 1e6}


def peak(function, run):
    """The bytes that function() allocates at its peak, above what was allocated before."""
    if run.device_type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events) # freed bytes are negative
    return max(itertools.accumulate(size for _, size in changes))

# -----------------------------------------------------------------------------
# all of these, as a table

def measure(config):
    """{"plain": {...}, "drnas": {"ratio": ..., ...}, ...}: all that the table shows."""
    config = SimpleNamespace(**config)
    check_config(config)
    run = setup(config)
    if data_kind(config.space) is Tokens:
        config.vocab_size = vocab_size_of(config)
    config.gradient_accumulation_steps = 1
    config.arch_warmup_iters = 0 # the alphas move in every iteration
    use_fused_ops(config.fused and run.device_type == "cpu")
    plain, *searches = (Contender(config, run, method) for method in ("", *config.methods))
    interleave(plain, searches, config, run)
    results = {}
    for c in tqdm((plain, *searches), desc="parts and memory", leave=False):
        seconds = statistics.median(c.seconds)
        r = {"ms": 1000 * seconds, "samples_per_s": config.batch_size / seconds}
        r |= parts(c, config, run) | memory(c, run)
        if c.ratios:
            r |= quartiles(c.ratios)
            for name in ("saved", "peak"):
                r[f"{name}_ratio"] = r[f"{name}_mb"] / results["plain"][f"{name}_mb"]
        elif flops_per_s := peak_flops(run): # of the plain network: backward costs two forwards
            flops = 3 * c.net.cost()["flops"] * config.batch_size
            r["mfu"] = flops / seconds / flops_per_s
        results[c.method] = {name: round(value, 4) for name, value in r.items()}
    return results


def table(results):
    """The results as lines of text, with a column for each of COLUMNS that has a number."""
    def cell(value):
        return "" if value is None else f"{value:.3g}" if value < 10 else f"{value:,.0f}"

    names = ["", *results]
    columns = [names]
    for key, head in COLUMNS.items():
        cells = [cell(r.get(key)) for r in results.values()]
        if any(cells):
            columns.append([head, *cells])
    widths = [max(map(len, column)) for column in columns]
    padded = [[text.rjust(width) for text in column]
              for column, width in zip(columns, widths, strict=True)]
    return "\n".join("  ".join(row) for row in zip(*padded, strict=True))

# -----------------------------------------------------------------------------
# growth: the ratio over the number of options, and of layers

def measure_growth(config):
    """The ratio of DrNAS, {series: {size: {"ratio", "low", "high"}}}. Draws growth.png.

    The series are options of each choice, on 9 layers, and layers, with 3 options of each choice;
    each with heads of n_embd / n_head channels, and with heads of 48.
    """
    results = {}
    axes = {"options": config["growth_options"], "layers": config["growth_layers"]}
    for head_size in (0, 48):
        for axis, sizes in axes.items():
            series = f"{axis}, {'heads of 48' if head_size else 'n_embd / n_head'}"
            results[series] = {}
            for size in sizes:
                K, L = (size, 9) if axis == "options" else (3, size)
                space = growth_space(K, L, head_size)
                found = growth_ratio(config | space, f"{series}: {size}")
                results[series][size] = found
                spread = f"{found['low']:.3f} to {found['high']:.3f}"
                print(f"{series}: {size} -> {found['ratio']:.3f} ({spread})", flush=True)
    print(f"figure: {growth_figure(results, config['out_dir'])}")
    return results


def growth_space(K, L, head_size):
    """A space of K options of each choice, evenly from nine, and up to L layers."""
    places = [round(8 * i / (K - 1)) for i in range(K)]
    widths, ratios = range(48, 433, 48), [1 + 3 * i / 8 for i in range(9)]
    heads = list(range(1, 10)) if head_size else [1, 2, 3, 4, 6, 8, 12, 16, 24]
    return {"n_layer": list(range(L - K + 1, L + 1)), "n_embd": [widths[i] for i in places],
            "n_head": [heads[i] for i in places], "mlp_ratio": [ratios[i] for i in places],
            "head_size": head_size, "vocab_size": 256}


def growth_ratio(config, label):
    config = SimpleNamespace(**config | {"gradient_accumulation_steps": 1})
    check_config(config)
    run = setup(config)
    use_fused_ops(config.fused and run.device_type == "cpu")
    plain, search = Contender(config, run), Contender(config, run, "drnas")
    interleave(plain, [search], config, run, label)
    return quartiles(search.ratios)


def growth_figure(results, out_dir):
    def draw_axis(ax, axis, label):
        for series, points in results.items():
            if series.startswith(axis):
                found = list(points.values())
                below = [p["ratio"] - p["low"] for p in found]
                above = [p["high"] - p["ratio"] for p in found]
                ax.errorbar(list(points), [p["ratio"] for p in found], [below, above], marker="o",
                            label=series.split(", ")[1])
                ax.set_xticks(list(points))
        ax.axhline(1, color="0.6", lw=0.8, ls="--")
        ax.set(xlabel=label, ylim=(0, None))
        ax.legend(frameon=False, title="head size")

    def draw_figure(figure):
        left, right = figure.subplots(1, 2, sharey=True)
        draw_axis(left, "options", "options of each choice")
        draw_axis(right, "layers", "layers")
        left.set_ylabel("search iteration / two plain steps")
    return save_figure(os.path.join(out_dir, "growth.png"), 3, draw_figure)

# -----------------------------------------------------------------------------
# latency: timing networks

def facts_of(config, run):
    """What the networks must know of the data: of prepared data the facts in its meta.json; of
    other data the usual vocabulary, or nothing, which leaves the space's usual images."""
    kind = data_kind(config.space)
    if kind is Tokens:
        return {"vocab_size": vocab_size_of(config)}
    if config.dataset == "digits":
        prepare_own(config, run)
    facts = kind.load(config)[1] if is_prepared(config) else {}
    if "img_size" in vars(config):
        facts = facts | {"img_size": config.img_size}
    return facts


def stand_alone(config, arch, pool):
    """The network of an architecture, whose parameters are in the pool, a flat tensor.

    The networks share the pool, as they never run at the same time.
    """
    net, start = build(vars(config), arch).eval(), 0
    for p in net.parameters():
        p.data = pool.as_strided(p.shape, p.stride(), start)
        start += -(-p.numel() // 16) * 16 # whole cache lines
    return net.to(pool.device)


def stand_alone_networks(config, archs, device):
    with torch.device("meta"): # counts the parameters without any memory
        counted = [build(vars(config), arch) for arch in archs]
    sizes = [sum(p.numel() + 16 for p in net.parameters()) for net in counted]
    pool = 0.02 * torch.randn(max(sizes), device=device)
    return [stand_alone(config, arch, pool) for arch in tqdm(archs, desc="networks", leave=False)]


def forward_pass(net, config, of, batch_size, length, run):
    """ready() for one measurement: it prepares the inputs and returns run(), one forward pass.

    A GPT runs as in generate(): on a prompt of `length` tokens, or, for decode, on one token with
    the cached keys and values of those before it.
    """
    if data_kind(config.space) is not Tokens:
        sized = SimpleNamespace(**vars(config) | {"batch_size": batch_size})
        x, _ = random_data(net, config).batch(sized, "latency", 0, device=run.device)
        return lambda: lambda: net(x)
    n = length if of == "prefill" else 1
    x = torch.randint(config.vocab_size, (batch_size, n), device=run.device)
    layers = [block.attn for block in net.transformer.h]

    def kept(attn): # keys or values of the tokens before
        tokens = min(attn.window[-1] or length, length)
        return torch.randn(batch_size, tokens, attn.sizes[1], device=run.device)
    cache = [{"k": kept(attn), "v": kept(attn), "past": length - n} for attn in layers]

    def ready():
        # frees what the last pass added to the cache, as generate() does: freeing takes time
        for layer, attn in zip(cache, layers, strict=True):
            tokens = min(attn.window[-1] or length, length)
            layer.update({name: layer[name][:, -tokens:] for name in "kv"}, past=length - n)
        return lambda: net(x, cache=cache if length > n else [{} for _ in layers])
    return ready


class Stopwatch:
    """mark(), and stop() for the seconds between the marks since the last stop().

    On a GPU it is the GPU's own clock. On a CPU with one thread it is the processor time, which
    leaves out what other processes take; with more threads it is the wall clock.
    """
    def __init__(self, run):
        self.cuda, self.marks = run.device_type == "cuda", []
        self.now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def mark(self):
        if self.cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(self.now())

    def stop(self):
        pairs, self.marks = list(itertools.pairwise(self.marks)), []
        if self.cuda:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1000 for a, b in pairs]
        return [b - a for a, b in pairs]


def fast_times(passes, watch, config, label):
    """The milliseconds between the marks of each pass of forward_pass(), an array each, with one
    mark before and one after the pass.

    Every round runs all passes in random order. The result is the lowest decile over the rounds:
    whatever else the machine does can only add to a time.
    """
    times, generator = [[] for _ in passes], rng(config.seed, label)
    for i in tqdm(range(config.warmup + config.rounds), desc=label, leave=False):
        for j in torch.randperm(len(passes), generator=generator).tolist():
            passes[j]()() # fills the processor's caches
            start = time.perf_counter()
            while time.perf_counter() - start < 0.02: # short ones several times
                function = passes[j]()
                watch.stop()
                watch.mark()
                function()
                watch.mark()
                if i >= config.warmup:
                    times[j].append(watch.stop())
    return [1000 * np.quantile(t, 0.1, axis=0) for t in times]

# -----------------------------------------------------------------------------
# latency: the parts of a GPT

def archs_of_parts(choices):
    """Two lists of architectures for each n_embd: of the largest depth, with every n_head and
    mlp_ratio, the same in all layers; and as many of each other depth, whose layers differ."""
    (*depths, deepest), widths = choices["n_layer"].options, choices["n_embd"].options
    layered = {name: choices[name].options for name in ("n_head", "mlp_ratio")}
    rows = range(max(map(len, layered.values())))

    def arch(e, L, j, step):
        """Layer i has option j + step * i of both, modulo their number."""
        layers = {name: [options[(j + step * i) % len(options)] for i in range(L)]
                  for name, options in layered.items()}
        return {"n_layer": L, "n_embd": e} | layers

    alike = [arch(e, deepest, j, 0) for e in widths for j in rows]
    mixed = [arch(e, L, j, 1) for e in widths for L in depths for j in rows]
    return alike, mixed


def mark_parts(net, mark):
    """Lets a GPT call mark() before each attention, each MLP and the last norm."""
    layers = [module for block in net.transformer.h for module in (block.attn, block.mlp)]
    for module in (*layers, net.transformer.ln_f):
        module.register_forward_pre_hook(lambda *args: mark())


def table_of_parts(choices, alike, mixed, marked, whole):
    """The milliseconds of a GPT's parts, as latency_features() names them.

    alike, mixed: the two lists of archs_of_parts(). marked: the times between the marks in the
    networks of alike. whole: those of all networks without marks, as marks take time themselves.

    A part includes the norm that follows it. What a network takes beyond its parts is the "rest" of
    its width and depth: embeddings, last norm and head, and how much the speed of its layers
    differs from that in the deepest networks, as only a shallow network may fit into a cache.
    """
    places = {name: {option: i for i, option in enumerate(c.options)}
              for name, c in choices.items()}
    widths = len(places["n_embd"])
    rows = {"rest": "n_layer", "attention": "n_head", "mlp": "mlp_ratio"}
    ms = {part: np.zeros((widths, len(places[name]))) for part, name in rows.items()}

    for arch, times in zip(alike, marked, strict=True):
        e = places["n_embd"][arch["n_embd"]]
        ms["attention"][e, places["n_head"][arch["n_head"][0]]] = times[1:-1:2].mean()
        ms["mlp"][e, places["mlp_ratio"][arch["mlp_ratio"][0]]] = times[2:-1:2].mean()

    rests = {}
    for arch, total in zip([*alike, *mixed], whole, strict=True):
        e, depth = places["n_embd"][arch["n_embd"]], places["n_layer"][arch["n_layer"]]
        layers = sum(ms["attention"][e, places["n_head"][h]] for h in arch["n_head"])
        layers += sum(ms["mlp"][e, places["mlp_ratio"][m]] for m in arch["mlp_ratio"])
        rests.setdefault((e, depth), []).append(total - layers)
    for place, totals in rests.items():
        ms["rest"][place] = np.mean(totals)
    return {name: values.tolist() for name, values in ms.items()}

# -----------------------------------------------------------------------------
# latency: a linear function for the other spaces

def fit(features, ms):
    """The non-negative coefficients of the linear function with the least squared relative error.

    features: [{name: tensor}] of each network, ms: [its milliseconds].
    A ridge decides between features that say the same. It is larger for those of single rows, which
    add little to what all rows have in common.
    """
    first = features[0]
    A = torch.stack([torch.cat([f.flatten() for f in row.values()]) for row in features]).numpy()
    A = A / np.array(ms)[:, None] # the prediction is to be 1: (networks, features)
    scale = np.sqrt(np.square(A).mean(0)).clip(1e-30)
    ridge = np.concatenate([np.full(f.numel(), 100.0 if f.dim() == 2 else 0.1)
                            for f in first.values()])

    # min |A w - 1|^2 + sum ridge w^2, as one least squares problem
    rows = np.concatenate([A / scale, np.diag(np.sqrt(ridge))])
    target = np.concatenate([np.ones(len(A)), np.zeros(len(ridge))])
    w = torch.tensor(nnls(rows, target)[0] / scale)
    values = w.split([f.numel() for f in first.values()])
    return {name: value.view(f.shape).tolist()
            for (name, f), value in zip(first.items(), values, strict=True)}

# -----------------------------------------------------------------------------
# latency: the table

def comparison(net, coefficients, archs, measured):
    """What the coefficients predict for networks, beside the milliseconds that were measured."""
    predict = latency_predictor(net, coefficients)
    rows = [{"arch": arch, "measured": m, "predicted": predict(arch)}
            for arch, m in zip(archs, measured, strict=True)]
    errors = [abs(row["predicted"] / row["measured"] - 1) for row in rows]
    return {"ms": coefficients, "mean_error": statistics.mean(errors), "max_error": max(errors),
            "heldout": rows}


def latency_archs(choices, config, by_parts):
    """The architectures to time: those held out, those that the table is made from, and those of
    the latter that are also timed part by part."""
    n = config.latency_heldout + (0 if by_parts else config.latency_samples)
    generator = rng(config.seed, "latency")
    archs = [arch for _, arch in random_search(choices, lambda arch: 0.0, n, generator)]
    if by_parts:
        alike, mixed = archs_of_parts(choices)
        return archs, [*alike, *mixed], alike
    n_heldout = min(config.latency_heldout, len(archs) // 2) # a small space has fewer architectures
    return archs[:n_heldout], archs[n_heldout:], []


def latency_lengths(config, tokens):
    """The lengths to time. SystemExit for one above block_size."""
    if not tokens:
        return [0] # an image has no length
    lengths = [length or config.block_size for length in as_list(config.latency_length)]
    if max(lengths) > config.block_size:
        raise SystemExit(f"latency_length={max(lengths)} is above block_size={config.block_size}, "
                         "the longest that the networks take: lower it, or raise block_size.")
    return lengths


def measure_latency(config):
    """Writes latency.json; returns the relative errors on the held-out networks,
    {key: {"mean_error", "max_error"}}."""
    config = SimpleNamespace(**config)
    check_config(config)
    run, tokens = setup(config), data_kind(config.space) is Tokens
    vars(config).update(facts_of(config, run))
    net, lengths = build(vars(config)), latency_lengths(config, tokens)
    use_fused_ops(config.fused and run.device_type == "cpu" and net.has_plain_kernels)
    heldout, fitted, marked = latency_archs(net.choices, config, has_parts(net))
    nets = stand_alone_networks(config, [*heldout, *fitted, *marked], run.device)
    unmarked, watch = len(heldout) + len(fitted), Stopwatch(run)
    for small in nets[unmarked:]:
        mark_parts(small, watch.mark)

    latencies = {}
    modes = ("prefill", "decode") if tokens else ("prefill",)
    batch_sizes = as_list(config.latency_batch_size)
    for of, batch_size, length in itertools.product(modes, batch_sizes, lengths):
        key = latency_key(net, of, batch_size, length)
        with torch.inference_mode(), run.amp:
            passes = [forward_pass(small, config, of, batch_size, length, run) for small in nets]
            times = fast_times(passes, watch, config, key)
        ms = [t.item() for t in times[:unmarked]]
        heldout_ms, fitted_ms = ms[:len(heldout)], ms[len(heldout):]
        if has_parts(net):
            mixed = fitted[len(marked):]
            coefficients = table_of_parts(net.choices, marked, mixed, times[unmarked:], fitted_ms)
        else:
            features = [latency_features(net, one_hot(net.choices, arch)) for arch in fitted]
            coefficients = fit(features, fitted_ms)
        found = latencies[key] = comparison(net, coefficients, heldout, heldout_ms)
        print(f"{key}: {min(heldout_ms):.3g} to {max(heldout_ms):.3g} ms; {len(heldout)} held-out "
              f"networks are predicted within {found['max_error']:.1%}, on average "
              f"{found['mean_error']:.1%}", flush=True)
    write_latency(net, config, run, latencies)
    return {key: {name: found[name] for name in ("mean_error", "max_error")}
            for key, found in latencies.items()}


def write_latency(net, config, run, latencies):
    path = os.path.join(config.out_dir, "latency.json")
    write_json(path, {"network": network_id(net, config), "latencies": latencies,
                      "machine": machine(config), "dtype": run.dtype,
                      "threads": torch.get_num_threads(), "torch": torch.__version__,
                      "config": vars(config)})
    print(f"table: {path}")

# -----------------------------------------------------------------------------

def machine(config):
    on_cuda = pick_device(config.device).startswith("cuda")
    return torch.cuda.get_device_name() if on_cuda else f"CPU, {torch.get_num_threads()} threads"


def main(config):
    c = SimpleNamespace(**config)
    check_limits(c, dict.fromkeys(INTEGERS, WHOLE))
    check_limits(c, LIMITS | {"rounds": at_least(1 if c.latency else 2)}) # quartiles need two
    os.makedirs(c.out_dir, exist_ok=True)
    if not c.img_size: # the space's usual size
        config = {name: value for name, value in config.items() if name != "img_size"}
    if c.latency:
        print(json.dumps(measure_latency(config)))
        return
    results = measure_growth(config) if c.growth else measure(config)
    if not c.growth:
        tokens = data_kind(c.space) is Tokens
        batch = f"{c.batch_size} x {c.block_size} tokens" if tokens else f"{c.batch_size} images"
        print(f"{batch} on {machine(c)}; ratio: an iteration over two plain steps of the largest "
              "network, median and quartiles")
        print(table(results))
    path = os.path.join(c.out_dir, "bench.json")
    write_json(path, {"config": config, "where": machine(c), "results": results})
    print(json.dumps(results))


if __name__ == "__main__":
    if sys.argv[1:2] == ["latency"]:
        sys.argv[1] = "--latency=True"
    main(configure(with_space(globals())))
