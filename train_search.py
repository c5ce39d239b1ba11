"""
Searches an architecture: trains one supernet by gradient (DARTS, DrNAS, GDAS) or by sampling (SPOS)
and reads the architecture off it.

    python train_search.py                                      # a laptop: the quick search on pydocs, some minutes
    python train_search.py config/search_toy_cell_digits.py config/drnas.py     # a laptop: a space of search_spaces/, on images
    python train_search.py config/search_shakespeare_char.py config/drnas.py    # one GPU
    python train_search.py config/search_gpt2.py --target_params=80_000_000     # one GPU: a pretrained GPT-2 is cut to a budget
    python train_search.py config/shrink_mobilenetv3_digits.py  # progressive shrinking of a network that config/ tells how to train
    torchrun --standalone --nproc_per_node=4 train_search.py config/search_tinystories.py config/drnas.py    # one node of 4 GPUs
    torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=10.0.0.1 --master_port=1234 train_search.py config/search_owt.py
    torchrun --nproc_per_node=8 --nnodes=2 --node_rank=1 --master_addr=10.0.0.1 --master_port=1234 train_search.py config/search_owt.py
    python train_search.py --help                               # every key with its default

A list is a choice, of sizes or of words: --n_embd=[64,96,128] --norm=['layernorm','rmsnorm']. The weights learn on the first train_portion of
the train split, the alphas on the rest; val is only reported.

With --init_from=gpt2 (or another, or a folder) the supernet's largest network starts as that GPT-2,
ordered by importance: smaller options keep its most important heads, neurons and channels.

Progressive shrinking (--shrink) starts with the largest network and unlocks smaller options phase
by phase, each with a schedule of its own and, where it says so, other settings:
'kernel_size=3, depth=3 share=0.2 learning_rate=2e-3, depth=2'.

Writes to out_dir: run.json, log.jsonl, arch_traj.jsonl (the architecture at every evaluation),
arch.json (the best of them by the loss on the alphas' part: all that train_base.py needs), ckpt.pt,
result.json and search.png; SPOS also arch_search.jsonl (what it evaluated with inherited weights),
and with --arch_search=pareto pareto.json.
""" # noqa: E501 (the commands stay on one line)
import json
import math
import os
import re
import shlex
import time
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch.nn import functional as F
from tqdm import tqdm

from budget import (COSTS, Benchmark, Ranking, load_latency, make_budget, nondominated_sort,
                    pareto_rank, with_latency)
from configurator import at_least, configure, one_of
from fused_ops import use_fused_ops
from optim_nas import (METHODS, arch_key, best_of, entropy, evolutionary_search, is_of_words,
                       random_search, sandwich_archs, uniform, unrolled_gradient)
from prepare import prepare_own
from pretrained import init_supernet, load_gpt2, load_trained, sort_by_importance
from run import (Log, add_checksum, all_gather_scalar, all_reduce_mean, append, atomic_write,
                 check_resumed_data, check_same_network, content_hash, draw_figures, init_out_dir,
                 is_pretrained, is_resuming, load_checkpoint, main, original_init_from, read_lines,
                 resume, resumed_run, rng, save, save_is_due, setup, signals, skip_nonfinite_step,
                 stop_if_signaled, verify_checksum, write_json)
from search_spaces import (build, data_kind, network_keys, recorded_keys, space_module, text_of,
                           with_space)
from search_spaces.cells import widen
from supernet import extremes
from train import * # noqa: F403 (every key of train.py)
from train import (backward, calibrate, check_config, check_max_iters, check_resolutions,
                   configure_optimizer, estimate, get_lr, micro_batches, train_step)

# -----------------------------------------------------------------------------
# the keys of train.py but two, and:
del val_portion, early_stopping # noqa: F821 (a search splits by train_portion, and runs to its end)
out_dir = 'out/search'
# search space: lists of sizes, and of kinds of block
n_layer = [2, 3, 4]
n_head = [2, 4, 8]
n_embd = [64, 96, 128]
mlp_ratio = [1, 2, 4]
head_size = 16
norm = ['layernorm', 'rmsnorm']
position = ['learned', 'rope']
qk_norm = [False, True]
residual = ['pre']
activation = ['gelu', 'relu2', 'swiglu'] # one a layer, as are the next two
n_kv_head = [1, 2, 0]
window = [32, 0]
# search
optimizer = 'drnas' # 'darts', 'drnas', 'gdas' or 'spos'
order = 1 # 2: darts with the unrolled step
train_portion = 0.5 # share of the train split that trains the weights; the rest trains the alphas
arch_learning_rate = 1e-2 # the published 3e-4 is for searches of thousands of steps
arch_weight_decay = 1e-3
normalize = 'softmax' # of darts: or 'sparsemax'
regularizer = 'l2' # of drnas: or 'kl', to Dirichlet(1)
tau_max = 10.0 # of gdas: the temperature falls linearly from this
tau_min = 0.1 # to this
arch_search = 'evolution' # of spos, over inherited weights: 'random'; 'pareto': small loss and cost
pareto_cost = 'params' # 'flops', 'kv_cache', 'latency'
arch_evals = 200 # architectures that it evaluates
population = 50
parents = 10
mutate_prob = 0.2 # of each layer's entries
depth_mutate_prob = 0.4 # of the other choices
prune_keep = 0 # progressive DrNAS: at half of the steps each row of a cell keeps so many operations
widen_to = 0 # its edges then compute 1 / widen_to of the channels, not 1 / partial_channels
arch_warmup_iters = 0 # steps at the start (and after that half) in which the alphas rest
target_params = 0 # a budget: never more, at most 5 % less if the space has such a network
target_flops = 0 # of a forward pass of one sequence or image; 2 a multiply-add
target_kv_cache = 0 # bytes of a GPT's keys and values of block_size tokens, in 16 bits
target_latency = 0.0 # milliseconds, predicted from latency_table
latency_table = '' # latency.json of `python bench.py latency`; reported with or without a target
latency_of = 'prefill' # or 'decode', of one token
latency_batch_size = 1
latency_length = 0 # tokens of the prefill, or that a decoded token sees; 0: block_size
budget_penalty = 1.0 # weight of log(expected cost / target)^2 in the alphas' loss
shrink = '' # of spos: phases of progressive shrinking, 'kernel_size=3, depth=2, expand=3'
subnets_per_step = 1 # architectures a step of the weights, whose gradients are averaged
sandwich = False # of spos: the first is the largest, the last the smallest (Yu & Huang 2019)
inplace_distill = False # of sandwich: all but the largest learn from its answers, not from labels
inherit = '' # out_dir of a training of the largest network, whose weights the supernet starts with
teacher = '' # out_dir of a training: the weights also learn from its network's answers
distill = 1.0 # weight of the cross-entropy to the teacher's answers
benchmark = '' # a table of trained architectures (.csv, .json, official): logs rank and regret
benchmark_iters = 2 # of a GPT: batches on which each network of that table is evaluated
# the quick search on pydocs
eval_interval = 100
max_iters = 500
learning_rate = 2e-3
min_lr = 2e-4
# -----------------------------------------------------------------------------

IMPORTANCE_STEPS = 8
PHASE_KEYS = {"share": float, "learning_rate": float, "warmup_iters": int,
              "subnets_per_step": int} # settings that a phase of progressive shrinking may have
LIMITS = LIMITS | { # those of train.py, and
    **dict.fromkeys(("subnets_per_step", "arch_evals", "population", "parents",
                     "benchmark_iters"), at_least(1)),
    **dict.fromkeys(("arch_learning_rate", "arch_weight_decay", "budget_penalty", "distill"),
                    at_least(0)),
    "optimizer": one_of(*METHODS), "arch_search": one_of("evolution", "random", "pareto"),
    "pareto_cost": one_of(*COSTS),
    "latency_of": one_of("prefill", "decode")}
RULES = [
    *RULES, # those of train.py, and
    (lambda c: not 0 < c.train_portion < 1,
     "train_portion={train_portion} must be above 0 and below 1: both the weights and the alphas "
     "need data."),
    (lambda c: c.order not in (1, *[2] * METHODS[c.optimizer].has_second_order),
     "order={order} is for optimizer=darts alone (1 or 2); optimizer is {optimizer}."),
    (lambda c: c.arch_search == "pareto" and METHODS[c.optimizer].has_alphas,
     "arch_search='pareto' is what optimizer=spos ends with, and optimizer is {optimizer}: use "
     "spos."),
    (lambda c: not 0 < c.tau_min <= c.tau_max,
     "tau_max={tau_max} and tau_min={tau_min}: the temperature falls from the one to the other, "
     "which must be above 0."),
    (lambda c: (c.teacher or c.inplace_distill) and data_kind(c.space).metric == "psnr",
     "teacher and inplace_distill need classes or tokens, which super-resolution does not have: "
     "leave them out."),
    (lambda c: c.prune_keep and any(getattr(c, f"target_{kind}") for kind in COSTS),
     "prune_keep={prune_keep} may take out what the budget needs: leave out prune_keep, or the "
     "targets."),
    (lambda c: (c.teacher or c.inherit) and not data_kind(c.space).metric,
     "teacher and inherit are for the spaces of search_spaces/; space is {space}."),
    (lambda c: c.shrink and METHODS[c.optimizer].has_alphas,
     "shrink='{shrink}' says what is drawn, and optimizer={optimizer} draws no architectures: use "
     "spos.")]


@dataclass
class SearchState:
    """Where a search is. Part of every checkpoint."""
    step: int = 0 # steps made
    evaluated: int = -1 # the step of the last evaluation
    skipped: int = 0 # steps passed over because they were not finite
    seconds: float = 0.0
    best_loss: float = math.inf # of the architectures read off so far, on the alphas' part
    best_arch: dict | None = None
    stage: int = 1 # 2: the second half of a progressive search
    began: int = 0 # the step at which this stage began


def split_data(config, run):
    """{"train", "search", "val"}: what trains the weights, what trains the alphas, and what is only
    reported; and the class of the data. config gets what the network must know of the data."""
    kind = data_kind(config.space)
    prepare_own(config, run)
    found, facts = kind.load(config)
    vars(config).update(facts)
    check_resumed_data(config)
    whole = found["train"]
    middle = int(config.train_portion * len(whole))
    splits = {"train": whole.part(0, middle), "search": whole.part(middle, len(whole)),
              "val": found["val"]}
    for name, data in splits.items():
        data.check(config, name)
    return splits, kind


def to_device(arch, run, requires_grad=False):
    """Architecture weights as leaves on the network's device; an architecture as it is."""
    if not all(isinstance(w, torch.Tensor) for w in arch.values()):
        return arch
    return {name: w.detach().to(run.device).requires_grad_(requires_grad)
            for name, w in arch.items()}

# -----------------------------------------------------------------------------
# one step of the alphas, and what the weights learn from

def arch_step(net, forward, arch_optimizer, splits, config, run, state):
    """One step of the alphas on the search split, with frozen weights (order 2: unrolled ones)."""
    step = state.step
    progress, generator = step / config.max_iters, rng(config.seed, "sample", "arch", step)
    arch_weights = arch_optimizer.sample(progress, generator)
    leaves = to_device(arch_weights, run, requires_grad=True)

    def grad_of(split, tensors):
        """The gradient of this split's loss to these tensors."""
        # the same dropout every time: order 2 takes differences of gradients
        seed = rng(config.seed, "dropout", "arch", step, run.rank).initial_seed()
        torch.manual_seed(seed)
        arch = arch_optimizer.run_with(leaves)
        batches = micro_batches(splits[split], config, run, split, step)
        backward(forward, ((x, y, arch) for x, y in batches), run)
        grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in tensors]
        for t in [*leaves.values(), *net.parameters()]:
            t.grad = None
        all_reduce_mean(grads, run)
        return grads

    if config.order == 2:
        grads = unrolled_gradient(list(net.parameters()), list(leaves.values()),
                                  lambda tensors: grad_of("train", tensors),
                                  lambda tensors: grad_of("search", tensors),
                                  get_lr(step, config))
    else:
        net.requires_grad_(False)
        grads = grad_of("search", leaves.values())
        net.requires_grad_(True)
    scale = run.scaler.get_scale()
    grads = {name: g.cpu() / scale for name, g in zip(leaves, grads, strict=True)}
    sick = [name for name, g in grads.items() if not g.isfinite().all()]
    if not sick:
        arch_optimizer.step(arch_weights, grads)
    elif not run.scaler.is_enabled(): # of float16 the weights' step that follows lowers the scale
        what = f"in the gradient to the weights of {', '.join(sick)}"
        skip_nonfinite_step(what, config, state)


def train_archs(arch_optimizer, config, run, state):
    """The architectures (or mixtures) that this step of the weights trains."""
    progress = state.step / config.max_iters
    generator = rng(config.seed, "sample", "weights", state.step)
    archs = [to_device(arch_optimizer.sample_weights_arch(progress, generator), run)
             for _ in range(config.subnets_per_step)]
    if config.sandwich:
        archs[-1], archs[0] = sandwich_archs(arch_optimizer.open, generator)
    return archs


def with_teacher(forward, teacher, distill):
    """forward(x, y, arch), to whose loss distill * cross-entropy to the teacher's answers is added
    (Hinton et al. 2015)."""
    batch, answers = None, None # the teacher answers once for all architectures of a batch

    def forward_with_teacher(x, y, arch):
        nonlocal batch, answers
        if batch is not x:
            with torch.no_grad():
                batch, answers = x, teacher(x)[0].softmax(-1)
        logits, loss = forward(x, y, arch)
        return logits, loss + distill * F.cross_entropy(logits, answers)
    return forward_with_teacher


def with_inplace_distillation(forward):
    """forward(x, y, arch), where a batch's first architecture learns from y, and the others only
    from its answers (in-place distillation, Yu & Huang 2019).

    Their loss is the cross-entropy to its softmax, which has no gradient.
    """
    batch, answers = None, None

    def forward_distilled(x, y, arch):
        nonlocal batch, answers
        logits, loss = forward(x, y, arch)
        if batch is x:
            return logits, F.cross_entropy(logits.flatten(0, -2), answers)
        batch, answers = x, logits.detach().flatten(0, -2).softmax(-1)
        return logits, loss
    return forward_distilled

# -----------------------------------------------------------------------------
# what a supernet starts with

def importance(net, data, config, run):
    """{parameter: (weight * gradient)^2 of the largest network, summed over some batches}.

    To first order the square of how the loss would change without that entry (Molchanov et al.
    2019, equation 8).
    """
    largest = extremes(net.choices)[1]
    total = {p: torch.zeros_like(p) for p in net.parameters()}
    net.eval() # no dropout
    for step in range(IMPORTANCE_STEPS):
        batches = micro_batches(data, config, run, "train", step)
        backward(net, ((x, y, largest) for x, y in batches), run)
        all_reduce_mean([p.grad for p in total], run)
        for p, score in total.items():
            score += (p.detach() * p.grad).square()
            p.grad = None
    net.train()
    return total

# -----------------------------------------------------------------------------
# phases of progressive shrinking (Cai et al. 2020), and stages of a progressive search

@dataclass
class Phase:
    """start: its first step. old, choices: what is drawn before it and in it. config: its keys."""
    start: int
    old: dict
    choices: dict
    config: SimpleNamespace


def read_phases(choices, config):
    """The phases that config.shrink says, or one of the whole run."""
    if not config.shrink:
        return [Phase(0, choices, choices, config)]
    lowest = {name: len(c.options) - 1 for name, c in choices.items()} # index of the first drawn

    def drawn():
        return {name: replace(c, options=c.options[lowest[name]:]) for name, c in choices.items()}

    phases, total = [], 0.0
    for text in config.shrink.split(","):
        old, settings = drawn(), {"share": 1.0}
        for part in text.split():
            key, _, value = part.partition("=")
            names = [name for name in choices if key in (name, re.sub(r"_\d+$", "", name))]
            try:
                for name in names:
                    lowest[name] = [str(o) for o in choices[name].options].index(value)
                if not names:
                    settings[key] = PHASE_KEYS[key](value)
                    zero_allowed = key == "warmup_iters"
                    if not 0 <= settings[key] < math.inf or not (settings[key] or zero_allowed):
                        raise ValueError
            except (KeyError, ValueError):
                raise SystemExit(f"shrink='{config.shrink}' has '{part}', which is no option of a "
                                 "choice, such as kernel_size=3, and no positive number for one of "
                                 f"{', '.join(PHASE_KEYS)}.") from None
        phases.append(Phase(total, old, drawn(), settings))
        total += settings["share"]
    ends = [*(phase.start for phase in phases[1:]), total]
    for phase, end in zip(phases, ends, strict=True):
        phase.start, end = (round(config.max_iters * s / total) for s in (phase.start, end))
        own = {"max_iters": end - phase.start, "lr_decay_iters": 0}
        phase.config = SimpleNamespace(**vars(config) | phase.config | own)
        if config.max_iters and end == phase.start: # its options would be drawn untrained
            raise SystemExit(f"shrink='{config.shrink}' has a phase without a step, its share of "
                             f"max_iters={config.max_iters} is too small: raise max_iters or that "
                             "share.")
    return phases


def phase_of(phases, step):
    return [phase for phase in phases if phase.start <= step][-1]


def check_sandwich(choices, phases, config):
    """SystemExit unless the sandwich rule and in-place distillation are possible, if asked for."""
    loss_chunk = getattr(config, "loss_chunk", 0)
    fewest = min(phase.config.subnets_per_step for phase in phases)
    if config.inplace_distill and (not config.sandwich or loss_chunk):
        raise SystemExit(f"inplace_distill=True needs sandwich=True (it is {config.sandwich}), to "
                         f"have the largest's answers, and loss_chunk=0 (it is {loss_chunk}), to "
                         "have answers at all.")
    if config.sandwich and (METHODS[config.optimizer].has_alphas or fewest < 2):
        raise SystemExit("sandwich=True draws the largest and the smallest in every step: it needs "
                         f"optimizer=spos (it is {config.optimizer}) and in every phase "
                         f"subnets_per_step of 2 or more (it is {fewest}).")
    if config.sandwich and all(map(is_of_words, choices.values())):
        raise SystemExit(f"sandwich=True needs a space of sizes: {config.space} chooses "
                         "operations, of which none is the largest.")


def check_stages(net, config):
    """SystemExit unless a progressive search is possible, if one is asked for."""
    options = max((len(c.options) for c in net.choices.values()), default=0)
    possible = hasattr(net, "prune") and METHODS[config.optimizer].has_alphas
    if config.prune_keep and not (possible and 1 < config.prune_keep <= options):
        raise SystemExit(f"prune_keep={config.prune_keep} is for a space of cells, 2 to its "
                         f"{options} operations, and not for optimizer=spos, which has no alphas "
                         "to prune by.")
    k = getattr(config, "partial_channels", 1)
    if config.widen_to and (not config.prune_keep or not 0 < config.widen_to <= k):
        raise SystemExit(f"widen_to={config.widen_to} needs prune_keep, and may be 1 to "
                         f"partial_channels={k}.")
    if config.widen_to and config.zero_stage:
        raise SystemExit(f"widen_to={config.widen_to} copies the optimizer's state, of which "
                         f"zero_stage={config.zero_stage} leaves every process a share: leave one "
                         "of them out.")
    if config.widen_to: # a number that it does not divide is told now, not after half of the steps
        with torch.device("meta"):
            build(vars(config) | {"partial_channels": config.widen_to})


def second_stage(net, optimizer, arch_optimizer, config, run):
    """The network of a progressive search's second half, and its optimizer.

    It has no operations that arch_optimizer pruned, and is wider if widen_to says so.
    """
    if not config.widen_to:
        net.prune(arch_optimizer.mask)
        return net, optimizer
    config.partial_channels = config.widen_to
    wide = build(vars(config)).to(run.device)
    wide.prune(arch_optimizer.mask)
    wide_optimizer = configure_optimizer(wide, config, run)
    return widen(net, wide, rng(config.seed, "widen"), (optimizer, wide_optimizer)), wide_optimizer

# -----------------------------------------------------------------------------
# evaluation

def score(net, forward, arch, splits, config, run, names=("search",)):
    """estimate() of the architecture with inherited weights, on each of the named splits.

    Before that, the statistics of its BatchNorms are measured.
    """
    calibrate(net, forward, splits["train"], config, run, arch)
    return [estimate(forward, splits[name], config, run, name, lambda i: arch) for name in names]


def evaluate(net, forward, arch_optimizer, cost, splits, config, run, state, log, table):
    """The losses of the supernet, and of the architecture read off it with inherited weights."""
    if arch_optimizer.has_alphas:
        arch = arch_optimizer.arch()
    else: # the best of a few draws
        def loss_of(arch):
            return score(net, forward, arch, splits, config, run)[0]["loss"]
        history = random_search(arch_optimizer.open, loss_of, 8,
                                rng(config.seed, "spos", state.step), arch_optimizer.budget)
        arch = best_of(history)[1]

    def supernet_arch(i): # what the supernet is trained as, for batch i
        return to_device(arch_optimizer.eval_arch(rng(config.seed, "eval", i)), run)
    # a mixture's architectures have no BatchNorm statistics in common: each batch has its own
    mixture = estimate(forward, splits["search"], config, run, "search", supernet_arch,
                       own_norms=True)
    mean = arch_optimizer.mean()
    found, val = score(net, forward, arch, splits, config, run, ("search", "val"))
    record(net, cost(arch), arch, found, mixture["loss"], val, config, run, state, log, table,
           entropy={name: h.tolist() for name, h in entropy(mean).items()},
           weights={name: w.tolist() for name, w in mean.items()},
           options={name: list(choice.options) for name, choice in net.choices.items()})


def record(net, cost, arch, found, mixture_loss, val, config, run, state, log, table, **rest):
    """One line of the trajectory and of the log; arch.json if this loss is the lowest so far.

    cost: the architecture's. found, val: its estimate() on the search split and on val.
    """
    kind, loss = data_kind(config.space), found["loss"]
    values = {"arch_loss": loss, "mixture_loss": mixture_loss, "gap": loss - mixture_loss,
              "val_arch_loss": val["loss"]}
    if kind.metric:
        values[f"arch_{kind.metric}"] = found[kind.metric]
        values[f"val_arch_{kind.metric}"] = val[kind.metric]
    if table:
        values |= {f"table_{key}": value for key, value in table(arch).items()}
    line = {"space": config.space, "step": state.step, "arch": arch, "cost": cost, **values, **rest,
            "optimizer": config.optimizer, "seed": config.seed,
            "model": {key: getattr(net.config, key) for key in recorded_keys(config.space)},
            "dataset": config.dataset, "data_dir": config.data_dir}
    if run.master:
        append(os.path.join(config.out_dir, "arch_traj.jsonl"), add_checksum(line))
    if loss < state.best_loss:
        state.best_loss, state.best_arch = loss, arch
        if run.master:
            write_json(os.path.join(config.out_dir, "arch.json"), line)
    text = [f"step {state.step}/{config.max_iters}", f"mixture {mixture_loss:.4f}",
            f"arch {loss:.4f}", f"gap {values['gap']:+.4f}", f"val {val['loss']:.4f}"]
    if kind.metric:
        text += [f"{kind.metric} {found[kind.metric]:.2f}{kind.metric_unit}",
                 f"val {kind.metric} {val[kind.metric]:.2f}{kind.metric_unit}"]
    if table:
        text.append(table.in_words(values))
    text += [text_of(arch, config.space), f"{cost['params'] / 1e6:.3g}M params"]
    log(" | ".join(text), step=state.step, arch=arch, **values, **cost)


def mean_entropy(arch_optimizer):
    """Of all rows of the weights: 1 is undecided, 0 decided."""
    rows = [h.reshape(-1) for h in entropy(arch_optimizer.mean()).values()]
    return round(torch.cat(rows or [torch.zeros(1)]).mean().item(), 4)

# -----------------------------------------------------------------------------
# a search

def resume_search(net, optimizer, arch_optimizer, config, run, state):
    """Goes back to the checkpoint, of whichever stage; returns that stage's network and
    optimizer."""
    keys = network_keys(config.space)
    name = "ckpt.pt" if config.init_from == "resume" else "ckpt.prev.pt"
    path = os.path.join(config.out_dir, name)
    if os.path.exists(path):
        checkpoint = load_checkpoint(path, run.device)
        check_same_network(config, checkpoint, path, keys, ("optimizer",))
        arch_optimizer.load_state_dict(checkpoint["chooser"])
        if checkpoint["state"].get("stage", 1) == 2:
            net, optimizer = second_stage(net, optimizer, arch_optimizer, config, run)
    resume(config, run, net, optimizer, state, keys)
    if run.master and state.best_loss < math.inf:
        # arch.json may be of steps that are made again, perhaps with another result
        path = os.path.join(config.out_dir, "arch_traj.jsonl")
        for line in (verify_checksum(line, path) for line in read_lines(path)):
            if line["arch_loss"] == state.best_loss:
                write_json(os.path.join(config.out_dir, "arch.json"), line)
                break # of equal ones the first was kept
    budget = arch_optimizer.budget
    if budget and state.best_arch and budget.utilization(budget.cost_of(state.best_arch)) > 1:
        state.best_loss, state.evaluated = math.inf, -1 # the search had no budget before
    return net, optimizer


def load_benchmark(net, splits, config, run):
    """The Benchmark or Ranking that config names, or None. SystemExit if it is that of another
    space."""
    if not config.benchmark:
        return None
    module = space_module(config.space)
    if not hasattr(module, "columns"):
        short = SimpleNamespace(**vars(config) | {"eval_iters": config.benchmark_iters})
        return Ranking(config.benchmark, net.choices,
                       lambda arch: score(net, net, arch, splits, short, run)[0]["loss"])
    table = Benchmark(config.benchmark, module, extremes(net.choices)[0], config.dataset)
    for i in range(8): # it must hold some architectures of the space
        table(uniform(net.choices, rng("benchmark", i)))
    return table


def make_arch_optimizer(net, config, cost, phases):
    method = METHODS[config.optimizer]
    own = {key: getattr(config, key) for key in method.keys}
    return method(net.choices, rng(config.seed, "alphas"),
                  learning_rate=config.arch_learning_rate, weight_decay=config.arch_weight_decay,
                  budget=make_budget(net, config, cost, phases[-1].choices), **own)


def compiled(net, config):
    """The network that runs in steps: net, compiled if config says so."""
    if not config.compile:
        return net
    return net.compile_parts() if hasattr(net, "compile_parts") else torch.compile(net)


def check_compile(net, config):
    if config.compile and METHODS[config.optimizer].is_hard and not hasattr(net, "compile_parts"):
        raise SystemExit(f"compile=True would compile every architecture that {config.optimizer} "
                         f"draws in {config.space}: leave it out.")


def search(config):
    """Runs the search of config (a dict); returns what it writes to result.json."""
    config = SimpleNamespace(**config)
    check_config(config, LIMITS, RULES)
    run = setup(config)
    if config.order == 2 and run.scaler.is_enabled():
        raise SystemExit("order=2 differentiates through the gradient, which dtype=float16 scales: "
                         "use --dtype=bfloat16 or float32.")
    splits, kind = split_data(config, run)
    net, method = build(vars(config)).to(run.device), METHODS[config.optimizer]
    use_fused_ops(config.fused and run.device_type == "cpu" and
                  (net.has_plain_kernels or not method.is_hard))
    check_compile(net, config)
    check_stages(net, config)
    check_resolutions(net, config, run, extremes(net.choices)[0])
    table, predict = load_benchmark(net, splits, config, run), load_latency(net, config)

    def cost(arch): # of the network of this stage
        return with_latency(net, arch, predict)

    phases = read_phases(net.choices, config)
    check_sandwich(net.choices, phases, config)
    arch_optimizer = make_arch_optimizer(net, config, cost, phases)

    # what the supernet starts with
    if is_pretrained(original_init_from(config)):
        load_gpt2(net, original_init_from(config))
        scores = importance(net, splits["train"], config, run)
        sort_by_importance(net, scores.__getitem__)
    if config.inherit and original_init_from(config) == "scratch":
        init_supernet(net, config, run)
    teacher = load_trained(config.teacher, "teacher", config, run) if config.teacher else None
    optimizer, state = configure_optimizer(net, config, run), SearchState()
    if is_resuming(config):
        net, optimizer = resume_search(net, optimizer, arch_optimizer, config, run, state)
    check_max_iters(config, state)
    init_out_dir(config, run)
    arch_optimizer.open = phase_of(phases, max(0, state.step - 1)).choices
    forward, flops = compiled(net, config), net.cost(arch_optimizer.mean())["flops"].item()

    def checkpoint():
        save(config, run, "ckpt.pt", net, optimizer, chooser=arch_optimizer.state_dict(),
             state=vars(state))

    with Log(config, run, state.step, kind) as log, signals(run):
        shared = sum(p.numel() for p in net.parameters())
        log(f"{shared:,} shared parameters, {config.optimizer} on {run.device} in {run.dtype}, "
            "choices " + " ".join(f"{name}={list(c.options)}" + (f"x{c.repeat}" if c.repeat else "")
                                  for name, c in net.choices.items()))
        clock, timed, saved = time.perf_counter(), 0, time.perf_counter()
        while True:
            # evaluate, and keep the best architecture
            done = state.step == config.max_iters
            due = state.step % config.eval_interval == 0 or done
            if due and state.evaluated < state.step:
                state.seconds += time.perf_counter() - clock
                evaluate(net, forward, arch_optimizer, cost, splits, config, run, state, log, table)
                state.evaluated = state.step
                checkpoint()
                clock, timed, saved = time.perf_counter(), 0, time.perf_counter()
            if done:
                break

            # the second half of a progressive search
            if config.prune_keep and state.stage == 1 and state.step >= config.max_iters // 2:
                arch_optimizer.prune(config.prune_keep)
                # the architectures of before may be out of reach
                state.stage, state.began, state.best_loss = 2, state.step, math.inf
                net, optimizer = second_stage(net, optimizer, arch_optimizer, config, run)
                forward = compiled(net, config)
            # the next phase of progressive shrinking
            phase = phase_of(phases, state.step)
            arch_optimizer.open = phase.choices
            if config.shrink and state.step == phase.start:
                if hasattr(net, "unlock"):
                    net.unlock(phase.old, phase.choices)
                optimizer = configure_optimizer(net, config, run)

            # the alphas on the search split; every step seeds its dropout
            torch.manual_seed(rng(config.seed, "dropout", state.step, run.rank).initial_seed())
            rests = state.step < state.began + phase.config.arch_warmup_iters
            if arch_optimizer.alphas and not rests:
                arch_step(net, forward, arch_optimizer, splits, phase.config, run, state)
            # then the weights on the train split
            lr = get_lr(state.step - phase.start, phase.config)
            archs = train_archs(arch_optimizer, phase.config, run, state)
            step_forward = forward
            if config.inplace_distill:
                step_forward = with_inplace_distillation(step_forward)
            if teacher:
                step_forward = with_teacher(step_forward, teacher, config.distill)
            loss = train_step(net, step_forward, optimizer, splits["train"], phase.config, run,
                              state, lr, archs)
            state.step, timed = state.step + 1, timed + 1

            # log
            log.bar.update()
            if state.step % config.log_interval == 0:
                log.step(state.step, loss, lr, clock, timed, flops, H=mean_entropy(arch_optimizer))
                state.seconds += time.perf_counter() - clock
                clock, timed = time.perf_counter(), 0

            # save in between, and stop where a signal says so
            if stop_if_signaled(run, checkpoint, save_is_due(config, state.step, saved)):
                saved = time.perf_counter()
        log.bar.close()
        if not arch_optimizer.has_alphas:
            start = time.perf_counter()
            search_inherited(net, forward, cost, arch_optimizer, splits, config, run, state, log,
                             table)
            state.seconds += time.perf_counter() - start
    return finish(cost, config, run, state, table)


def search_inherited(net, forward, cost, arch_optimizer, splits, config, run, state, log, table):
    """Evolutionary or random search, by the loss on the search split with inherited weights.

    arch_search.jsonl keeps every evaluation: a resumed run draws the same architectures again, and
    looks them up. With arch_search=pareto, pareto.json gets the architectures that no other one
    beats in both loss and cost.
    """
    pareto, losses = config.arch_search == "pareto", []
    path = os.path.join(config.out_dir, "arch_search.jsonl")
    supernet, costs = content_hash(net.state_dict())[:12], {}

    def cost_of(arch):
        if arch_key(arch) not in costs:
            costs[arch_key(arch)] = cost(arch)[config.pareto_cost]
        return costs[arch_key(arch)]

    # the evaluations of before, of these weights
    lines = []
    if run.master:
        if is_resuming(config) and os.path.exists(path):
            lines = [verify_checksum(line, path) for line in read_lines(path)]
            lines = [line for line in lines if line.get("supernet") == supernet]
            if pareto: # perhaps with another pareto_cost than before
                lines = [line | {"cost": cost_of(line["arch"])} for line in lines]
        text = "".join(json.dumps(add_checksum(line)) + "\n" for line in lines)
        atomic_write(path, lambda f: f.write(text.encode())) # without a line that was cut off
        state.seconds += sum(line["seconds"] for line in lines)
    known = {arch_key(line["arch"]): line["loss"] for line in lines}

    def loss_of(arch):
        stop_if_signaled(run, lambda: None)
        loss = all_gather_scalar(known.get(arch_key(arch), math.nan), run)[0] # rank 0 knows
        if math.isnan(loss):
            start = time.perf_counter()
            loss = score(net, forward, arch, splits, config, run)[0]["loss"]
            line = {"evaluation": len(losses) + 1, "step": state.step, "supernet": supernet,
                    "arch": arch, "loss": loss}
            if pareto:
                line["cost"] = cost_of(arch)
            if run.master:
                seconds = time.perf_counter() - start
                append(path, add_checksum({**line, "seconds": seconds}))
        losses.append(loss)
        if run.master and (loss == min(losses) or len(losses) % 25 == 0):
            tqdm.write(f"{config.arch_search} {len(losses)}/{config.arch_evals} | arch {loss:.4f} "
                       f"| best {min(losses):.4f} | {text_of(arch, config.space)}")
        return loss

    generator, budget = rng(config.seed, "arch_search"), arch_optimizer.budget
    if config.arch_search == "random":
        history = random_search(arch_optimizer.open, loss_of, config.arch_evals, generator, budget)
    else:
        rank = (lambda history: pareto_rank(history, cost_of)) if pareto else None
        history = evolutionary_search(
            arch_optimizer.open, loss_of, config.arch_evals, generator, config.population,
            config.parents, config.mutate_prob, config.depth_mutate_prob, budget, rank)
    if pareto and run.master:
        points = [(loss, cost_of(arch)) for loss, arch in history]
        front = [history[i] for i in nondominated_sort(points)[0]]
        front = [{"arch": arch, "loss": loss, **cost(arch)} for loss, arch in front]
        write_json(os.path.join(config.out_dir, "pareto.json"),
                   {"space": config.space, "cost": config.pareto_cost,
                    "front": sorted(front, key=lambda point: point["loss"])})
    arch = best_of(history)[1]
    found, val = score(net, forward, arch, splits, config, run, ("search", "val"))
    record(net, cost(arch), arch, found, sum(losses) / len(losses), val, config, run, state, log,
           table)


def finish(cost, config, run, state, table):
    """result.json, what was found, and the next command."""
    arch = state.best_arch
    result = {"out_dir": config.out_dir, "arch": arch, **cost(arch), "steps": state.step,
              "seconds": state.seconds, "arch_loss": state.best_loss}
    if table:
        result |= {f"table_{key}": value for key, value in table(arch).items()}
    if not run.master:
        return result
    write_json(os.path.join(config.out_dir, "result.json"), result)
    speed = f", {result['latency']:.3g} ms" if "latency" in result else ""
    print(f"found: {text_of(arch, config.space)}, {result['params']:,} parameters{speed}, loss "
          f"{state.best_loss:.4f} with shared weights")
    if table:
        print(table.summary(result))
    print("next: python train_base.py " +
          shlex.quote(f"--arch={os.path.join(config.out_dir, 'arch.json')}"))
    return result


if __name__ == "__main__":
    keys = with_space(globals(), run=resumed_run(globals()))
    draw_figures(main(search, configure(keys))["out_dir"])
