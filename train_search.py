"""
Searches an architecture: trains one supernet by gradient (DARTS, DrNAS, GDAS) or by sampling (SPOS) and reads it off.

    python train_search.py                                      # a laptop: the quick search on pydocs, some minutes
    python train_search.py config/search_toy_cell_digits.py config/drnas.py     # a laptop: a space of search_spaces/, on images
    python train_search.py config/search_shakespeare_char.py config/drnas.py                         # one GPU
    python train_search.py config/search_gpt2.py --target_params=80_000_000     # one GPU: a pretrained GPT-2 is cut to a budget
    python train_search.py config/shrink_mobilenetv3_digits.py  # progressive shrinking of a network that config/ tells how to train
    torchrun --standalone --nproc_per_node=4 train_search.py config/search_tinystories.py config/drnas.py    # one node of 4 GPUs
    torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=10.0.0.1 --master_port=1234 train_search.py config/search_owt.py
    torchrun --nproc_per_node=8 --nnodes=2 --node_rank=1 --master_addr=10.0.0.1 --master_port=1234 train_search.py config/search_owt.py
    python train_search.py --help                               # every key with its default

A list of sizes is a choice: --n_embd=[64,96,128]. The weights learn on the first train_portion of the training data, the alphas on
the rest; val is only reported. Progressive shrinking starts with the largest network and unlocks smaller options phase by phase, each with
a schedule of its own and, where it says so, other settings: 'kernel_size=3, depth=3 share=0.2 learning_rate=2e-3, depth=2'.
For --target_latency, `python bench.py latency` with the same config measures a table on the machine that the network is for.
With --init_from=gpt2, gpt2-medium, gpt2-large, gpt2-xl or a folder, the largest network of the supernet starts as that GPT-2, reordered:
the smaller options are its most important heads, neurons and channels.
Writes to out_dir: run.json, log.jsonl, arch_traj.jsonl (the architecture at every evaluation), arch.json (the best of them by the loss
on the alphas' part, all that train_base.py needs), ckpt.pt, result.json and search.png; of --optimizer=spos also arch_search.jsonl (what it
evaluated with inherited weights), and with --arch_search=pareto pareto.json.
"""
import json
import math
import os
import re
import shlex
import time
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch.nn import functional as F
from tqdm import tqdm

from budget import Benchmark, nondominated_sort, pareto_rank
from configurator import check_range, defaults
from data import check_split, cut, load_data, micro_batches
from fused_ops import use_fused_ops
from model import OPTIONS
from optim_nas import arch_key, best_of, entropy, evolutionary_search, method_class
from optim_nas import random_search, uniform, unrolled_gradient
from pretrained import load_gpt2
from run import Log, append, all_reduce_mean, init_out_dir, check_same_network, fault, content_hash, load_checkpoint
from run import load_model, main, origin, pretrained, read_lines, resume, resumes, rng, save
from run import add_checksum, setup, all_gather_scalar, signals, stop_if_signaled, verify_checksum, atomic_write, write_json
from search_spaces import build, describe, space_module, with_space
from search_spaces.cells import widen
from supernet import extremes
from train import backward, calibrate, check_resolutions, configure_optimizer, estimate, get_lr
from train import loop, train_step
from train import * # noqa: F403 (every key of train.py, and the functions that all runs share)
from budget import load_latency, make_budget, with_latency
from prepare import prepare_own
from run import draw_figures
from search_spaces import network_keys
from train import check_run

# -----------------------------------------------------------------------------
# the keys of train.py but two, and:
del val_portion, early_stopping # noqa: F821 (a search splits by train_portion, and runs to its end)
out_dir = 'out/search'
# search space: lists of sizes
n_layer = [2, 3, 4]
n_head = [2, 4, 8]
n_embd = [64, 96, 128]
mlp_ratio = [1, 2, 4]
# search
optimizer = 'drnas' # 'darts', 'drnas', 'gdas' or 'spos'
order = 1 # 2: darts with the unrolled step
train_portion = 0.5 # the share of train.bin that trains the weights; the rest trains the alphas
arch_learning_rate = 1e-2 # the published 3e-4 is for searches of thousands of steps
arch_weight_decay = 1e-3
normalize = 'softmax' # of darts: or 'sparsemax'
regularizer = 'l2' # of drnas: or 'kl', to Dirichlet(1)
tau_max = 10.0 # gdas: the temperature falls linearly to
tau_min = 0.1
arch_search = 'evolution' # after spos: over the inherited weights; 'random'; or 'pareto', by evolution towards small loss and small
pareto_cost = 'params' # or 'flops', 'latency'
arch_evals = 200 # architectures that it evaluates
population = 50
parents = 10
mutate_prob = 0.2 # of each layer's entries
depth_mutate_prob = 0.4 # of the other choices
prune_keep = 0 # progressive search (DrNAS): from half of the steps on every row of a cell keeps so many operations; 0: all
widen_to = 0 # and its edges compute 1 / widen_to of the channels, in the place of 1 / partial_channels; 0: as before
arch_warmup_iters = 0 # steps at the start, and after the half of a progressive search, in which the alphas rest
target_params = 0 # a budget for the architecture that is found: never more, within 5 % less where there is one; 0: none
target_flops = 0 # of a forward pass of one sequence of block_size tokens, or of one image; 2 a multiply-add
target_latency = 0.0 # milliseconds, by
latency_table = '' # latency.json of `python bench.py latency`; it is reported with or without a target
latency_of = 'prefill' # or 'decode', of one token
latency_batch_size = 1
latency_length = 0 # tokens of the prefill, or that a decoded token sees; 0: block_size
budget_penalty = 1.0 # weight of log(expected cost / target)^2 in the alphas' loss
shrink = '' # progressive shrinking (spos): 'kernel_size=3, depth=2, expand=3', phases that each go down to an option; '': all at once
subnets_per_step = 1 # draws whose gradients a step of the weights averages: so many sizes learn from one batch
sandwich = False # of spos: the first of these draws is the largest architecture, the last the smallest (Yu & Huang 2019)
inplace_distill = False # of sandwich: all but the largest learn from its answers to the batch, in the place of labels
inherit = '' # the out_dir of a training of the largest network, whose weights the supernet starts with
teacher = '' # such an out_dir: the weights are also trained towards what its network answers,
distill = 1.0 # by the cross-entropy to that, times this
benchmark = '' # a table of the space's trained architectures, .csv, .json or an official file: logs accuracy, rank and regret
# the quick search on pydocs
eval_interval = 100
max_iters = 500
learning_rate = 2e-3
min_lr = 2e-4
# -----------------------------------------------------------------------------

IMPORTANCE_STEPS = 8
PHASE_KEYS = {"share": float, "learning_rate": float, "warmup_iters": int, "subnets_per_step": int} # a phase may have its own
UNITS = {"acc": "%", "psnr": " dB"} # of what images have besides a loss


def split_data(config, run):
    """{"train", "search", "val"}: what trains the weights, what trains the alphas, and what is only reported; config gets what the
    network must know of the data."""
    if not 0 < config.train_portion < 1:
        raise SystemExit(f"train_portion={config.train_portion} must be above 0 and below 1: both the weights and the alphas need data.")
    prepare_own(config, run)
    train, val, facts = load_data(config, run)
    vars(config).update(facts)
    middle = int(config.train_portion * len(train))
    splits = {"train": cut(train, 0, middle), "search": cut(train, middle, len(train)), "val": val}
    for name, data in splits.items():
        check_split(data, config, name)
    return splits


def arch_step(net, forward, arch_optimizer, splits, config, run, state):
    """One step of the alphas on the search split, the weights frozen (or, for order 2, unrolled and put back)."""
    step = state.step
    weights = arch_optimizer.sample(step / config.max_iters, rng(config.seed, "sample", "arch", step))
    leaves = to_device(weights, run, requires_grad=True)

    def grad_of(split, tensors):
        # the same dropout in all evaluations: order 2 takes differences of gradients
        torch.manual_seed(rng(config.seed, "dropout", "arch", step, run.rank).initial_seed())
        backward(forward, micro_batches(splits[split], config, run, split, step), run, (arch_optimizer.run_with(leaves),))
        grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in tensors]
        for t in [*leaves.values(), *net.parameters()]:
            t.grad = None
        all_reduce_mean(grads, run)
        return grads

    if config.order == 2:
        grads = unrolled_gradient(list(net.parameters()), list(leaves.values()), lambda tensors: grad_of("train", tensors),
                                  lambda tensors: grad_of("search", tensors), get_lr(step, config))
    else:
        net.requires_grad_(False)
        grads = grad_of("search", leaves.values())
        net.requires_grad_(True)
    grads = {name: g.cpu() / run.scaler.get_scale() for name, g in zip(leaves, grads, strict=True)}
    sick = [name for name, g in grads.items() if not g.isfinite().all()]
    if not sick:
        arch_optimizer.step(weights, grads)
    elif not run.scaler.is_enabled(): # float16 overflows now and then, and the weight step of this iteration lowers its scale
        fault(f"in the gradient to the weights of {', '.join(sick)}", config, state)


def bilevel_step(net, forward, arch_optimizer, optimizer, splits, config, run, state, lr, teacher=None):
    """One iteration: the alphas on the search split, then the weights on the train split. Returns the weights' loss."""
    if arch_optimizer.has_alphas and state.step >= state.began + config.arch_warmup_iters:
        arch_step(net, forward, arch_optimizer, splits, config, run, state)
    generator = rng(config.seed, "sample", "weights", state.step)
    archs = [weight_arch(arch_optimizer, run, state.step / config.max_iters, generator) for _ in range(config.subnets_per_step)]
    if config.sandwich:
        archs[-1], archs[0] = extremes(arch_optimizer.open)
    forward = with_inplace_distillation(forward) if config.inplace_distill else forward
    forward = with_teacher(forward, teacher, config.distill) if teacher else forward
    return train_step(net, forward, optimizer, splits["train"], config, run, state, lr, archs)


def weight_arch(arch_optimizer, run, progress, generator):
    """The architecture (or mixture) that this step trains."""
    return to_device(arch_optimizer.sample_weights_arch(progress, generator), run)


def with_teacher(forward, teacher, distill):
    """forward(x, y, arch), to whose loss distill * cross-entropy to the teacher's answers is added (Hinton et al. 2015)."""
    known, answers = None, None # the teacher answers once for all architectures of a batch

    def loss_of(x, y, arch):
        nonlocal known, answers
        if known is not x:
            with torch.no_grad():
                known, answers = x, teacher(x)[0].softmax(-1)
        logits, loss = forward(x, y, arch)
        return logits, loss + distill * F.cross_entropy(logits, answers)
    return loss_of


def with_inplace_distillation(forward):
    """forward(x, y, arch), whose first architecture of a batch learns from y, and all others from its answers alone: their loss is the
    cross-entropy to its softmax, which has no gradient (in-place distillation, Yu & Huang 2019)."""
    known, answers = None, None

    def loss_of(x, y, arch):
        nonlocal known, answers
        logits, loss = forward(x, y, arch)
        if known is x:
            return logits, F.cross_entropy(logits.flatten(0, -2), answers)
        known, answers = x, logits.detach().flatten(0, -2).softmax(-1)
        return logits, loss
    return loss_of


def importance(net, data, config, run):
    """{parameter: (weight * gradient)^2 of the largest network, summed over IMPORTANCE_STEPS batches}: to first order, the square of how
    the loss would change without that entry (Molchanov et al. 2019, equation 8)."""
    largest, total = extremes(net.choices)[1], {p: torch.zeros_like(p) for p in net.parameters()}
    net.eval() # no dropout
    for step in range(IMPORTANCE_STEPS):
        backward(net, micro_batches(data, config, run, "train", step), run, (largest,))
        all_reduce_mean([p.grad for p in total], run)
        for p, score in total.items():
            score += (p.detach() * p.grad).square()
            p.grad = None
    net.train()
    return total


def trained(out_dir, key, config, run):
    """The network of a finished training, for evaluation; SystemExit if it is one for other data. key: that names it."""
    path = os.path.join(out_dir, "best.pt")
    checkpoint = load_checkpoint(path, run.device)
    for name in ("space", "in_channels", "num_classes"):
        theirs = checkpoint["config"].get(name)
        if theirs != getattr(config, name, None):
            raise SystemExit(f"{key}='{out_dir}' has {name}={theirs}, and this search {getattr(config, name, None)}: name a training of "
                             "the search's space, on its data.")
    return load_model(build(checkpoint["config"], checkpoint["arch"]).to(run.device), checkpoint, path).eval()


def init_supernet(net, config, run):
    """Fills the supernet from config.inherit; what that does not have, such as matrices between kernels, stays."""
    theirs, own = trained(config.inherit, "inherit", config, run).state_dict(), net.state_dict()
    wrong = [name for name, t in theirs.items() if name not in own or own[name].shape != t.shape]
    if wrong:
        raise SystemExit(f"inherit='{config.inherit}' is not the largest network of this space, in its {wrong[0]}: train that one, with "
                         "the largest option of everything.")
    net.load_state_dict(theirs, strict=False)


def read_phases(choices, config):
    """The phases of progressive shrinking (Cai et al. 2020), or one of the whole run: each one's first step, its choices and those of the
    phase before, and its config. SystemExit if config.shrink says none."""
    if not config.shrink:
        return [SimpleNamespace(start=0, old=choices, choices=choices, config=config)]
    if method_class(config.optimizer).has_alphas:
        raise SystemExit(f"shrink='{config.shrink}' says what is drawn, and optimizer={config.optimizer} draws no architectures: use spos.")
    low, phases, total = {name: len(c.options) - 1 for name, c in choices.items()}, [], 0.0 # low: the place of the first option drawn

    def drawn():
        return {name: replace(c, options=c.options[low[name]:]) for name, c in choices.items()}
    for text in config.shrink.split(","):
        old, keys = drawn(), {"share": 1.0}
        for part in text.split():
            key, _, value = part.partition("=")
            names = [name for name in choices if key in (name, re.sub(r"_\d+$", "", name))]
            try:
                for name in names:
                    low[name] = [str(o) for o in choices[name].options].index(value)
                if not names:
                    keys[key] = PHASE_KEYS[key](value)
                    if not 0 <= keys[key] < math.inf or (keys[key] == 0 and key != "warmup_iters"):
                        raise ValueError
            except (KeyError, ValueError):
                raise SystemExit(f"shrink='{config.shrink}' has '{part}', which is no option of a choice, such as kernel_size=3, and no "
                                 f"positive number for one of {', '.join(PHASE_KEYS)}.") from None
        phases.append(SimpleNamespace(start=total, old=old, choices=drawn(), config=keys))
        total += keys["share"]
    for phase, end in zip(phases, [*(phase.start for phase in phases[1:]), total], strict=True):
        phase.start, end = (round(config.max_iters * share / total) for share in (phase.start, end))
        phase.config = SimpleNamespace(**vars(config) | phase.config | {"max_iters": end - phase.start, "lr_decay_iters": 0})
        if config.max_iters and end == phase.start: # what it unlocks would be drawn without ever having been trained
            raise SystemExit(f"shrink='{config.shrink}' has a phase without a step, its share of max_iters={config.max_iters} is too "
                             "small: raise max_iters or that share.")
    return phases


def phase_of(phases, step):
    return [phase for phase in phases if phase.start <= step][-1]


def to_device(weights, run, requires_grad=False):
    """Weights as leaves on the network's device; an architecture as it is."""
    return {name: w.detach().to(run.device).requires_grad_(requires_grad) if isinstance(w, torch.Tensor) else w
            for name, w in weights.items()}


def score(net, forward, arch, splits, config, run, names=("search",)):
    """estimate() of the architecture with inherited weights, on each split, after its BatchNorms' statistics are measured."""
    calibrate(net, forward, splits["train"], config, run, (arch,))
    found = [estimate(forward, splits[name], config, run, name, lambda i: arch) for name in names]
    return found if len(found) > 1 else found[0]


def evaluate(net, forward, arch_optimizer, cost, splits, config, run, state, log, table):
    """The losses of the supernet and of the architecture read off it, with inherited weights; logs, and keeps the best."""
    if not arch_optimizer.has_alphas: # the best of a few draws
        history = random_search(arch_optimizer.open, lambda arch: score(net, forward, arch, splits, config, run)["loss"], 8,
                                rng(config.seed, "spos", state.step), arch_optimizer.budget)
        arch = best_of(history)[1]
    else:
        arch = arch_optimizer.arch()
    mixture = estimate(forward, splits["search"], config, run, "search", lambda i: to_device(arch_optimizer.eval_arch(rng(config.seed, "eval", i)), run),
                       own_norms=True) # the architectures of a mixture have no statistics in common
    entropies = {name: h.tolist() for name, h in entropy(arch_optimizer.mean()).items()}
    weights = {name: w.tolist() for name, w in arch_optimizer.mean().items()}
    found, val = score(net, forward, arch, splits, config, run, ("search", "val"))
    record(net, cost(arch), arch, found, mixture["loss"], val, config, run, state, log, table, entropy=entropies, weights=weights,
           options={name: list(choice.options) for name, choice in net.choices.items()})


def record(net, cost, arch, found, mixture_loss, val, config, run, state, log, table, **rest):
    """One line of the trajectory and of the log, and arch.json if this architecture's loss is the lowest so far. cost: the
    architecture's; found, val: its estimate() on the search split and on val."""
    loss, space = found["loss"], space_module(config.space)
    keys = [*net.choices, "head_size", "bias", "block_size", *OPTIONS] if config.space == "gpt" else defaults(vars(space))
    values = {"arch_loss": loss, "mixture_loss": mixture_loss, "gap": loss - mixture_loss, "val_arch_loss": val["loss"]}
    values |= {f"{prefix}_{key}": there[key] for prefix, there in (("arch", found), ("val_arch", val)) for key in UNITS if key in there}
    if table:
        values |= {f"table_{key}": value for key, value in table(arch).items()}
    line = {"space": config.space, "step": state.step, "arch": arch, "cost": cost, **values, **rest, "optimizer": config.optimizer,
            "seed": config.seed, "model": {key: getattr(config, key) for key in keys}, "dataset": config.dataset,
            "data_dir": config.data_dir}
    if run.master:
        append(os.path.join(config.out_dir, "arch_traj.jsonl"), add_checksum(line))
    if loss < state.best_loss:
        state.best_loss, state.best_arch = loss, arch
        if run.master:
            write_json(os.path.join(config.out_dir, "arch.json"), line)
    accuracy = "".join(f" | {key} {found[key]:.2f}{unit} | val {key} {val[key]:.2f}{unit}" for key, unit in UNITS.items() if key in val)
    if table:
        accuracy += " | table {table_accuracy:.2f}%, rank {table_rank} of {table_of}, regret {table_regret:.2f}%".format(**values)
    log(f"step {state.step}/{config.max_iters} | mixture {mixture_loss:.4f} | arch {loss:.4f} | gap {values['gap']:+.4f} | "
        f"val {val['loss']:.4f}{accuracy} | {text_of(arch, config)} | {cost['params'] / 1e6:.3g}M params", step=state.step, arch=arch,
        **values, **cost)


def text_of(arch, config):
    """The architecture in the text form of its space."""
    return getattr(space_module(config.space), "genotype", describe)(arch)


def check_stages(net, config):
    """SystemExit unless a progressive search is possible, if one is asked for."""
    options = max((len(c.options) for c in net.choices.values()), default=0)
    if not (config.prune_keep or config.widen_to or config.arch_warmup_iters):
        return
    possible = hasattr(net, "prune") and method_class(config.optimizer).has_alphas and 1 < config.prune_keep <= options
    if config.prune_keep and not possible:
        raise SystemExit(f"prune_keep={config.prune_keep} is for a space of cells, 2 to its {options} operations, and not for "
                         "optimizer=spos, which has no alphas to prune by.")
    k = getattr(config, "partial_channels", 1)
    if config.widen_to and (not config.prune_keep or not 0 < config.widen_to <= k):
        raise SystemExit(f"widen_to={config.widen_to} needs prune_keep, and may be 1 to partial_channels={k}.")
    if config.widen_to and config.zero_stage:
        raise SystemExit(f"widen_to={config.widen_to} copies the optimizer's state, of which zero_stage={config.zero_stage} leaves every "
                         "process a share: leave one of them out.")
    if config.widen_to:
        with torch.device("meta"):
            build(vars(config) | {"partial_channels": config.widen_to}) # what it does not divide is told now, not after half of the steps


def second_stage(net, optimizer, arch_optimizer, config, run):
    """The network of a progressive search's second half: without the operations that chooser pruned, and widened; and its optimizer."""
    if not config.widen_to:
        net.prune(arch_optimizer.mask)
        return net, optimizer
    config.partial_channels = config.widen_to
    wide = build(vars(config)).to(run.device)
    wide.prune(arch_optimizer.mask)
    wide_optimizer = configure_optimizer(wide, config, run)
    return widen(net, wide, rng(config.seed, "widen"), (optimizer, wide_optimizer)), wide_optimizer


def resume_search(net, optimizer, arch_optimizer, config, run, state):
    """Goes back to the checkpoint, of whichever stage; returns the network and the optimizer of that stage."""
    path = os.path.join(config.out_dir, "ckpt.pt" if config.init_from == "resume" else "ckpt.prev.pt")
    if os.path.exists(path):
        checkpoint = load_checkpoint(path, run.device)
        check_same_network(config, checkpoint, path, network_keys(config.space), ("optimizer",))
        arch_optimizer.load_state_dict(checkpoint["chooser"])
        if checkpoint["state"].get("stage", 1) == 2:
            net, optimizer = second_stage(net, optimizer, arch_optimizer, config, run)
    resume(config, run, net, optimizer, state, network_keys(config.space))
    if run.master and state.best_loss < math.inf: # arch.json may be of steps, or of a search, that are made anew, perhaps otherwise
        path = os.path.join(config.out_dir, "arch_traj.jsonl")
        for line in (verify_checksum(line, path) for line in read_lines(path)):
            if line["arch_loss"] == state.best_loss:
                write_json(os.path.join(config.out_dir, "arch.json"), line)
                break # of equal ones the first was kept
    return net, optimizer


def load_table(net, config):
    """The Benchmark that config names, or None. It must hold some architectures of the space, or it is that of another."""
    if not config.benchmark:
        return None
    if config.space == "gpt":
        raise SystemExit(f"benchmark='{config.benchmark}' is for the spaces of search_spaces/, of which there are tables; space is gpt.")
    table = Benchmark(config.benchmark, space_module(config.space), extremes(net.choices)[0], config.dataset)
    for i in range(8):
        table(uniform(net.choices, rng("benchmark", i)))
    return table


def check(config):
    """SystemExit where the keys of a search do not go together."""
    Method = method_class(config.optimizer)
    if config.order not in (1, 2) or (config.order == 2 and not Method.has_second_order):
        raise SystemExit(f"order={config.order} is for optimizer=darts alone (1 or 2); optimizer is {config.optimizer}.")
    if config.compile and config.space != "gpt" and Method.is_hard:
        raise SystemExit(f"compile=True would compile every architecture that {config.optimizer} draws in {config.space}: leave it out.")
    for key, allowed in (("arch_search", ("evolution", "random", "pareto")), ("pareto_cost", ("params", "flops", "latency")),
                         ("latency_of", ("prefill", "decode"))):
        if getattr(config, key) not in allowed:
            raise SystemExit(f"{key}='{getattr(config, key)}' is not one of {', '.join(allowed)}.")
    if config.arch_search == "pareto" and Method.has_alphas:
        raise SystemExit(f"arch_search='pareto' is what optimizer=spos ends with, and optimizer is {config.optimizer}: use spos.")
    check_range(config, 1, "subnets_per_step", "arch_evals", "population", "parents")
    check_range(config, 0, "arch_learning_rate", "arch_weight_decay", "budget_penalty", "distill")
    if not 0 < config.tau_min <= config.tau_max:
        raise SystemExit(f"tau_max={config.tau_max} and tau_min={config.tau_min}: the temperature falls from the one to the other, which "
                         "must be above 0.")
    if hasattr(space_module(config.space), "scale") and (config.teacher or config.inplace_distill):
        raise SystemExit("teacher and inplace_distill need classes or tokens, which super-resolution does not have: leave them out.")
    if config.prune_keep and (config.target_params or config.target_flops or config.target_latency):
        raise SystemExit(f"prune_keep={config.prune_keep} may take out what the budget needs: leave out prune_keep, or the targets.")
    if config.space == "gpt" and (config.teacher or config.inherit):
        raise SystemExit("teacher and inherit are for the spaces of search_spaces/; space is gpt.")


def check_sandwich(choices, phases, config):
    """SystemExit unless the sandwich rule and in-place distillation are possible, if they are asked for."""
    loss_chunk, fewest = getattr(config, "loss_chunk", 0), min(phase.config.subnets_per_step for phase in phases)
    if config.inplace_distill and (not config.sandwich or loss_chunk):
        raise SystemExit(f"inplace_distill=True needs sandwich=True (it is {config.sandwich}), to have the largest's answers, and "
                         f"loss_chunk=0 (it is {loss_chunk}), to have answers at all.")
    if config.sandwich and (method_class(config.optimizer).has_alphas or fewest < 2):
        raise SystemExit(f"sandwich=True draws the largest and the smallest in every step: it needs optimizer=spos (it is "
                         f"{config.optimizer}) and in every phase subnets_per_step of 2 or more (it is {fewest}).")
    if config.sandwich and any(isinstance(choice.options[0], str) for choice in choices.values()):
        raise SystemExit(f"sandwich=True needs a space of sizes: {config.space} chooses operations, of which none is the largest.")


def search(config):
    """Runs the search of config (a dict); returns what it writes to result.json."""
    config = SimpleNamespace(**config)
    check(config)
    check_run(config)
    run = setup(config)
    if config.order == 2 and run.scaler.is_enabled():
        raise SystemExit("order=2 differentiates through the gradient, which dtype=float16 scales: use --dtype=bfloat16 or float32.")
    splits = split_data(config, run)
    use_fused_ops(config.fused and run.device_type == "cpu" and (config.space != "gpt" or not method_class(config.optimizer).is_hard))
    net = build(vars(config)).to(run.device)
    check_stages(net, config)
    check_resolutions(net, config, run, extremes(net.choices)[0])
    table, predict = load_table(net, config), load_latency(net, config)

    def cost(arch): # of the network of this stage
        return with_latency(net, arch, predict)
    Method = method_class(config.optimizer)
    arch_optimizer = Method(net.choices, rng(config.seed, "alphas"), learning_rate=config.arch_learning_rate,
                            weight_decay=config.arch_weight_decay,
                            budget=make_budget(net, config, cost, read_phases(net.choices, config)[-1].choices),
                            **{key: getattr(config, key) for key in Method.keys})
    phases, teacher = read_phases(net.choices, config), None
    check_sandwich(net.choices, phases, config)
    if pretrained(origin(config)):
        load_gpt2(net, origin(config))
        net.sort(importance(net, splits["train"], config, run).__getitem__)
    if config.inherit and origin(config) == "scratch":
        init_supernet(net, config, run)
    if config.teacher:
        teacher = trained(config.teacher, "teacher", config, run)
    optimizer = configure_optimizer(net, config, run)
    state = SimpleNamespace(step=0, evaluated=-1, stop=False, skipped=0, seconds=0.0, best_loss=math.inf, best_arch=None, stage=1, began=0)
    if resumes(config):
        net, optimizer = resume_search(net, optimizer, arch_optimizer, config, run, state)
        if arch_optimizer.budget and state.best_arch and arch_optimizer.budget.utilization(arch_optimizer.budget.cost_of(state.best_arch)) > 1: # of a search without it
            state.best_loss, state.evaluated = math.inf, -1
    init_out_dir(config, run)
    arch_optimizer.open = phase_of(phases, max(0, state.step - 1)).choices
    forward = (net.compile_parts() if config.space == "gpt" else torch.compile(net)) if config.compile else net

    def step(lr):
        nonlocal net, forward, optimizer
        if config.prune_keep and state.stage == 1 and state.step >= config.max_iters // 2:
            arch_optimizer.prune(config.prune_keep)
            state.stage, state.began, state.best_loss = 2, state.step, math.inf # the architectures of before may be out of reach
            net, optimizer = second_stage(net, optimizer, arch_optimizer, config, run)
            forward = torch.compile(net) if config.compile else net
        phase = phase_of(phases, state.step)
        arch_optimizer.open = phase.choices
        if config.shrink and state.step == phase.start:
            if hasattr(net, "unlock"):
                net.unlock(phase.old, phase.choices)
            optimizer = configure_optimizer(net, config, run)
        return bilevel_step(net, forward, arch_optimizer, optimizer, splits, phase.config, run, state, lr, teacher)

    def schedule(step, config):
        phase = phase_of(phases, step)
        return get_lr(step - phase.start, phase.config)

    def mean_entropy():
        rows = torch.cat([h.reshape(-1) for h in entropy(arch_optimizer.mean()).values()] or [torch.zeros(1)])
        return {"H": round(rows.mean().item(), 4)}

    def checkpoint():
        save(config, run, "ckpt.pt", net, optimizer, chooser=arch_optimizer.state_dict(), state=vars(state))

    with Log(config, run, state.step) as log, signals(run):
        log(f"{sum(p.numel() for p in net.parameters()):,} shared parameters, {config.optimizer} on {run.device} in {run.dtype}, choices " +
            " ".join(f"{name}={list(c.options)}" + (f"x{c.repeat}" if c.repeat else "") for name, c in net.choices.items()))
        loop(config, run, state, log, net.cost(arch_optimizer.mean())["flops"].item(), step,
             lambda: evaluate(net, forward, arch_optimizer, cost, splits, config, run, state, log, table), checkpoint, mean_entropy, schedule)
        if not arch_optimizer.has_alphas:
            start = time.perf_counter()
            search_inherited(net, forward, cost, arch_optimizer, splits, config, run, state, log, table)
            state.seconds += time.perf_counter() - start
    return finish(cost, config, run, state, table)


def search_inherited(net, forward, cost, arch_optimizer, splits, config, run, state, log, table):
    """Evolutionary or random search among what was trained, by the loss on the search split with the supernet's weights; for both loss
    and cost, pareto.json is what no other architecture is better than in both.

    arch_search.jsonl keeps every evaluation: a run that was stopped draws the same architectures again, and looks them up."""
    path, lines, losses, weights = os.path.join(config.out_dir, "arch_search.jsonl"), [], [], content_hash(net.state_dict())[:12]
    costs = {} # of a search for both

    def cost_of(arch):
        if arch_key(arch) not in costs:
            costs[arch_key(arch)] = cost(arch)[config.pareto_cost]
        return costs[arch_key(arch)]

    if run.master:
        if resumes(config) and os.path.exists(path):
            lines = [line for line in (verify_checksum(line, path) for line in read_lines(path)) if line.get("supernet") == weights]
            if config.arch_search == "pareto": # perhaps with another pareto_cost than before
                lines = [line | {"cost": cost_of(line["arch"])} for line in lines]
        atomic_write(path, lambda f: f.write("".join(json.dumps(add_checksum(line)) + "\n" for line in lines).encode())) # without a line cut off
        state.seconds += sum(line["seconds"] for line in lines)
    known = {arch_key(line["arch"]): line["loss"] for line in lines}

    def evaluate(arch):
        stop_if_signaled(run, lambda: None)
        loss = all_gather_scalar(known.get(arch_key(arch), math.nan), run)[0] # rank 0 knows
        if math.isnan(loss):
            start = time.perf_counter()
            loss = score(net, forward, arch, splits, config, run)["loss"]
            if run.master:
                both = {"cost": cost_of(arch)} if config.arch_search == "pareto" else {}
                append(path, add_checksum({"evaluation": len(losses) + 1, "step": state.step, "supernet": weights, "arch": arch, "loss": loss,
                                   **both, "seconds": time.perf_counter() - start}))
        losses.append(loss)
        if run.master and (loss == min(losses) or len(losses) % 25 == 0):
            count = f"{config.arch_search} {len(losses)}/{config.arch_evals}"
            tqdm.write(f"{count} | arch {loss:.4f} | best {min(losses):.4f} | {text_of(arch, config)}")
        return loss

    generator = rng(config.seed, "arch_search")
    if config.arch_search == "random":
        history = random_search(arch_optimizer.open, evaluate, config.arch_evals, generator, arch_optimizer.budget)
    else:
        rank = (lambda history: pareto_rank(history, cost_of)) if config.arch_search == "pareto" else None
        history = evolutionary_search(arch_optimizer.open, evaluate, config.arch_evals, generator, config.population, config.parents,
                                      config.mutate_prob, config.depth_mutate_prob, arch_optimizer.budget, rank)
        if rank and run.master:
            front = [history[i] for i in nondominated_sort([(loss, cost_of(arch)) for loss, arch in history])[0]]
            front = sorted(({"arch": arch, "loss": loss, **cost(arch)} for loss, arch in front), key=lambda point: point["loss"])
            write_json(os.path.join(config.out_dir, "pareto.json"), {"space": config.space, "cost": config.pareto_cost, "front": front})
    found, val = score(net, forward, best_of(history)[1], splits, config, run, ("search", "val"))
    record(net, cost(best_of(history)[1]), best_of(history)[1], found, sum(losses) / len(losses), val, config, run, state, log, table)


def finish(cost, config, run, state, table):
    """result.json, the figure and the next command."""
    result = {"out_dir": config.out_dir, "arch": state.best_arch, **cost(state.best_arch), "steps": state.step,
              "seconds": state.seconds, "arch_loss": state.best_loss}
    if table:
        result |= {f"table_{key}": value for key, value in table(state.best_arch).items()}
    if run.master:
        write_json(os.path.join(config.out_dir, "result.json"), result)
        speed = f", {result['latency']:.3g} ms" if "latency" in result else ""
        print(f"found: {text_of(state.best_arch, config)}, {result['params']:,} parameters{speed}, loss {state.best_loss:.4f} with shared "
              "weights")
        if table:
            draws = ", ".join(f"of {n} {table.random_best(n):.2f}%" for n in (1, 10, 100))
            print(f"in the table: {result['table_accuracy']:.2f}%, rank {result['table_rank']} of {result['table_of']}; the best of random "
                  f"draws, in the mean: {draws}")
        print("next: python train_base.py " + shlex.quote(f"--arch={os.path.join(config.out_dir, 'arch.json')}"))
    return result


if __name__ == "__main__":
    from configurator import configure
    draw_figures(main(search, configure(with_space(globals())))["out_dir"])
