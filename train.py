"""
Trains one network on prepared data: a GPT of fixed sizes, or one of a space of search_spaces/.

    python train.py config/train_pydocs.py                      # a laptop, some minutes
    python train.py config/train_gpt2.py                        # one GPU
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py    # one node of 8 GPUs
    torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=10.0.0.1 --master_port=1234 train.py config/train_gpt2.py
    torchrun --nproc_per_node=8 --nnodes=2 --node_rank=1 --master_addr=10.0.0.1 --master_port=1234 train.py config/train_gpt2.py
    python train.py --help                                      # every key with its default

Writes to out_dir: run.json (what was started), log.jsonl (one object a printed line), ckpt.pt (the
newest state) and ckpt.prev.pt (the one before it), best.pt (the best weights on the validation
data) and result.json. SIGTERM or Ctrl-C ends a run after its step, with a checkpoint;
--init_from=resume --out_dir=OUT_DIR goes on with the run's own keys as if nothing had happened, on
any number of processes. --init_from=OUT_DIR starts from the best weights of another training.
""" # noqa: E501 (the commands stay on one line)
import contextlib
import importlib.util
import math
import os
import shlex
import sys
import time
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
import torch.distributed as dist
from tqdm import tqdm

from configurator import (as_list, at_least, at_least_below, check_limits, check_rules, configure,
                          one_of)
from fused_ops import use_fused_ops
from prepare import prepare_own
from pretrained import check_init_from, load_pretrained
from run import (Log, all_gather_scalar, all_reduce_mean, check_resumed_data, finite, init_out_dir,
                 is_pretrained, is_resuming, load_checkpoint, load_model, main, original_init_from,
                 resume, resumed_run, rng, save, save_is_due, setup, signals, skip_nonfinite_step,
                 stop_if_signaled, write_json)
from search_spaces import build, data_kind, network_keys, with_space
from search_spaces.convs import batch_norms, measure_norms

# -----------------------------------------------------------------------------
# I/O
out_dir = 'out/train'
overwrite = False # start anew in an out_dir that holds a run, and replace its files
eval_interval = 250
log_interval = 10
eval_iters = 20 # batches an evaluation
save_interval = 0 # steps between checkpoints, besides those at evaluations; 0: none
save_minutes = 10.0 # a checkpoint also whenever so much time has passed; 0: never
init_from = 'scratch' # 'resume', 'previous'; or weights: 'gpt2', a folder, a training's out_dir
wandb_log = False
wandb_project = 'nas'
wandb_run_name = '' # '': out_dir
tensorboard = False
# data
dataset = 'pydocs'
data_dir = 'data'
val_portion = 0.0 # share of the train split, at its end, that validates; 0: val does
gradient_accumulation_steps = 1 # micro-batches a step, over all processes
batch_size = 16 # sequences a micro-batch
block_size = 128 # tokens a sequence
# model
space = 'gpt' # or a file of search_spaces/, whose keys replace the GPT's: --space=nb201 --help
n_layer = 4
n_head = 4
n_embd = 128
mlp_ratio = 4.0
head_size = 0 # channels a head; 0: n_embd / n_head
n_kv_head = 0 # heads of keys and values, which as many query heads share; 0: n_head
window = 0 # tokens that a token sees, with itself; 0: all before it
dropout = 0.0
bias = False
norm = 'layernorm' # 'rmsnorm', 'partial_rmsnorm'
prmsnorm_pct = 0.0625 # of partial_rmsnorm: share of the channels that its RMS is estimated from
position = 'learned' # 'sinusoidal', 'rope', 'none'
qk_norm = False # queries and keys over their RMS in every head
activation = 'gelu' # or exact_gelu, relu, relu2, silu, mish; gated: geglu, swiglu, reglu
residual = 'pre' # where the norms stand: 'post', 'branch', 'parallel'
n_expert = 0 # MLPs a layer, of which each token takes top_k (mixture of experts); 0: one MLP
top_k = 2
router_aux_loss_coef = 0.1 # weight of the load-balancing loss of the experts
loss_chunk = 0 # tokens whose logits the loss holds at a time, to save memory; 0: all
# optimizer
weight_optimizer = 'adamw' # 'adam', 'sgd'
momentum = 0.9 # of sgd
nesterov = False # of sgd
learning_rate = 1e-3
max_iters = 2000
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.99
grad_clip = 1.0 # 0: off
decay_lr = True
warmup_iters = 100
lr_decay_iters = 0 # 0: max_iters
min_lr = 1e-4
milestones = [0] # instead of the cosine: steps at which the learning rate is halved; [0]: none
skip_nonfinite = 0 # pass over up to so many steps whose loss or gradient is not finite
zero_stage = 0 # 1: processes share the optimizer's state (ZeRO, Rajbhandari et al. 2020)
early_stopping = 0 # stop after so many evaluations without a better one; 0: never
# system
seed = 1337
backend = '' # of torchrun's processes; '': nccl on cuda, gloo elsewhere
timeout_minutes = 30.0 # after which processes give up on one that no longer answers
device = 'auto' # 'cpu', 'cuda', 'cuda:1', 'mps'; auto: the fastest there is
dtype = 'auto' # 'float32', 'bfloat16', 'float16'; auto: bfloat16 where cuda has it
fused = True # on a CPU, mixtures and depthwise convolutions run in fused_ops.cpp
compile = False # torch.compile: a minute or two at the start, faster from then on
# -----------------------------------------------------------------------------

LIMITS = {
    **dict.fromkeys(("eval_interval", "log_interval", "eval_iters", "batch_size",
                     "gradient_accumulation_steps"), at_least(1)),
    **dict.fromkeys(("max_iters", "learning_rate", "min_lr", "weight_decay", "grad_clip",
                     "warmup_iters", "lr_decay_iters", "milestones", "save_interval",
                     "save_minutes", "skip_nonfinite", "early_stopping"), at_least(0)),
    **dict.fromkeys(("beta1", "beta2", "momentum", "val_portion"), at_least_below(0, 1)),
    "seed": at_least_below(-2**63, 2**63), # what PyTorch takes
    "weight_optimizer": one_of("adamw", "adam", "sgd")}
RULES = [
    (lambda c: c.weight_optimizer == "sgd" and c.nesterov and not c.momentum,
     "nesterov=True needs a momentum above 0, and momentum=0: raise it, such as --momentum=0.9, or "
     "leave nesterov out.")]
PACKAGES = {"wandb_log": "wandb", "tensorboard": "tensorboard"} # keys that need a package


def check_config(config, limits=LIMITS, rules=RULES):
    """SystemExit with one sentence for keys that no run can have."""
    kind = data_kind(config.space)
    check_limits(config, limits | kind.keys.LIMITS)
    check_rules(config, rules)
    check_init_from(config)
    kind.keys.check(config)
    for key, package in PACKAGES.items():
        if getattr(config, key) and importlib.util.find_spec(package) is None:
            raise SystemExit(f"{key}=True needs a package that is not installed: pip install "
                             f"{package}, or leave it off.")


@dataclass
class TrainState:
    """Where a training is. Part of every checkpoint."""
    step: int = 0 # steps made
    evaluated: int = -1 # the step of the last evaluation
    stop: bool = False # early stopping has ended the run
    skipped: int = 0 # steps passed over because they were not finite
    seconds: float = 0.0
    losses: dict = field(default_factory=dict) # of the last evaluation
    best: float = math.inf # of the evaluations: the loss, or minus the kind's metric
    best_step: int = 0
    bad_evals: int = 0 # evaluations since the best one

# -----------------------------------------------------------------------------
# one step of the weights

def get_lr(step, config):
    """The learning rate of a step."""
    # 1) linear warmup
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    # 2) halved at the milestones, where there are some
    milestones = as_list(config.milestones)
    if any(milestones):
        return config.learning_rate * 0.5 ** sum(step >= m for m in milestones)
    # 3) cosine decay to min_lr, and min_lr from then on
    end = config.lr_decay_iters or config.max_iters
    if not config.decay_lr or end <= config.warmup_iters:
        return config.learning_rate
    ratio = min(1.0, (step - config.warmup_iters) / (end - config.warmup_iters))
    coeff = 0.5 * (1.0 + math.cos(math.pi * ratio)) # 1 to 0
    return config.min_lr + coeff * (config.learning_rate - config.min_lr)


def configure_optimizer(net, config, run):
    """AdamW, Adam or SGD.

    Under AdamW biases, norms (one dimension) and net.no_weight_decay do not decay. Under the others
    all do, unless the network says decays_norms = False.
    """
    adamw, sgd = config.weight_optimizer == "adamw", config.weight_optimizer == "sgd"
    groups = [{"params": list(net.parameters()), "weight_decay": config.weight_decay}]
    if adamw or not getattr(net, "decays_norms", True):
        names = getattr(net, "no_weight_decay", ())
        exempt = {p for name, p in net.named_parameters()
                  if p.dim() < 2 or name.split(".")[-1] in names}
        decayed = [p for p in net.parameters() if p not in exempt]
        exempt = [p for p in net.parameters() if p in exempt]
        groups = [{"params": decayed, "weight_decay": config.weight_decay},
                  {"params": exempt, "weight_decay": 0.0}]
    options = dict(lr=config.learning_rate, fused=run.device_type == "cuda")
    if sgd:
        options |= dict(momentum=config.momentum, nesterov=config.nesterov)
    else:
        options |= dict(betas=(config.beta1, config.beta2))
    cls = torch.optim.SGD if sgd else torch.optim.AdamW if adamw else torch.optim.Adam
    if config.zero_stage:
        from torch.distributed.optim import ZeroRedundancyOptimizer
        return ZeroRedundancyOptimizer([g for g in groups if g["params"]], cls, **options)
    return cls(groups, **options)


def micro_batches(data, config, run, name, step):
    """This process's (x, y) of a step's micro-batches: the same data for any world size."""
    for micro in range(run.rank, config.gradient_accumulation_steps, run.world):
        yield data.batch(config, name, step, micro, run.device)


def backward(forward, batches, run):
    """Adds to .grad the gradient of the mean loss over batches of (x, y, arch); returns that loss.

    arch: what a supernet runs with, None for a plain network.
    """
    total, batches = 0.0, list(batches)
    for x, y, arch in batches:
        with run.amp:
            loss = forward(x, y, arch)[1] / len(batches)
        run.scaler.scale(loss).backward()
        total = total + loss.detach()
    return total


def train_step(net, forward, optimizer, data, config, run, state, lr, archs=(None,)):
    """One step of the weights; returns this process's loss, a tensor.

    Micro-batches, backward, clip, step: everything that a step does is here. archs: what a
    supernet's weights are trained as in this step; their gradients are averaged.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    batches = [(x, y, arch) for x, y in micro_batches(data, config, run, "train", state.step)
               for arch in archs]
    loss = backward(forward, batches, run)

    # pass over a step that is not finite on any process
    params = [p for p in net.parameters() if p.grad is not None]
    grads = [p.grad for p in params]
    norm = torch.nn.utils.get_total_norm(grads)
    # the scaler of float16 deals with infinite gradients itself
    healthy = loss.isfinite() and (norm.isfinite() or run.scaler.is_enabled())
    sick = [rank for rank, bad in enumerate(all_gather_scalar(not healthy, run)) if bad]
    if sick:
        names = [name for name, p in net.named_parameters()
                 if p.grad is not None and not p.grad.isfinite().all()]
        optimizer.zero_grad(set_to_none=True)
        skip_nonfinite_step(
            f"on rank {', '.join(map(str, sick))} (on rank {run.rank} the loss is {loss.item()}, "
            f"and the first gradients that are not finite are those of "
            f"{', '.join(names[:3]) or 'none'})", config, state)
        return loss

    # average over the processes, clip, step
    all_reduce_mean(grads, run)
    run.scaler.unscale_(optimizer)
    if config.grad_clip:
        if run.world > 1 or run.scaler.is_enabled(): # else the norm from above is right
            norm = torch.nn.utils.get_total_norm(grads)
        torch.nn.utils.clip_grads_with_norm_(params, config.grad_clip, norm)
    run.scaler.step(optimizer)
    run.scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return loss

# -----------------------------------------------------------------------------
# evaluation

def calibrate(net, forward, data, config, run, arch=None):
    """Measures the statistics of net's BatchNorms, as this architecture, on bn_batches batches.

    Every process takes the same batches, so that the statistics depend neither on what ran before
    nor on the number of processes. The images are cropped and flipped, but not mixed or resized:
    such ones have other statistics than those of an evaluation.
    """
    def run_batch(i):
        with run.amp:
            forward(data.batch(config, "train", i, 0, run.device, augment=False)[0], None, arch)
    measure_norms(net, run_batch, getattr(config, "bn_batches", 0))


def tally(forward, data, batches, run):
    """Sums over batches of (x, y, arch): (loss, metric, answers), float64 (3,)."""
    total = torch.zeros(3, dtype=torch.float64)
    for x, y, arch in batches:
        with run.amp:
            logits, loss = forward(x, y, arch)
        n, metric = data.score(x, y, logits)
        total += torch.tensor([loss.item() * n, metric, n])
    return total


@torch.no_grad()
def estimate(net, data, config, run, name, arch_of=None, own_norms=False):
    """{"loss", and the kind's metric} over eval_iters batches of a split, always the same ones,
    shared between the processes.

    arch_of(i): what a supernet runs with on batch i. own_norms: BatchNorms take the statistics of
    each batch, as in training. FloatingPointError if the loss is not finite.
    """
    def batches():
        for i in range(run.rank, data.n_eval_batches(config, own_norms), run.world):
            x, y = data.eval_batch(config, name, i, run.device)
            yield x, y, arch_of(i) if arch_of else None

    training = net.training
    net.eval()
    with batch_norms(net) if own_norms else contextlib.nullcontext():
        sums = tally(net, data, batches(), run)
    net.train(training)
    return means(data, [sum(all_gather_scalar(t, run)) for t in sums], f"the {name} loss")


@torch.no_grad()
def estimate_all(net, data, config, run):
    """estimate() over a whole split, once: every token in blocks without overlap, every image."""
    net.eval()
    batches = tqdm(data.sweep(config, run.device), desc="test", unit="batch", leave=False,
                   total=data.n_sweep_batches(config), disable=not sys.stderr.isatty())
    sums = tally(net, data, ((x, y, None) for x, y in batches), run)
    return means(data, sums.tolist(), "the test loss")


def means(data, sums, what):
    loss, metric, n = sums
    found = {"loss": finite(loss / n, what)}
    return found | ({data.metric: metric / n} if data.metric else {})


def evaluate(net, forward, splits, config, run, state, log):
    """Logs the losses of train and val, and keeps count of the best evaluation.

    Without validation data the newest weights count as the best.
    """
    calibrate(net, forward, splits["train"], config, run)
    state.losses = {f"{name}_{key}": value for name, data in splits.items() if name != "test"
                    for key, value in estimate(forward, data, config, run, name).items()}
    score = state.losses.get("val_loss", -state.step)
    if f"val_{splits['train'].metric}" in state.losses:
        score = -state.losses[f"val_{splits['train'].metric}"] # the higher the better
    state.bad_evals += 1
    if score < state.best:
        state.best, state.best_step, state.bad_evals = score, state.step, 0
    state.stop = bool(config.early_stopping) and state.bad_evals >= config.early_stopping
    text = " | ".join(f"{key} {value:.4f}" for key, value in state.losses.items())
    log(f"step {state.step}/{config.max_iters} | {text}", step=state.step, **state.losses)

# -----------------------------------------------------------------------------
# a training

def split_data(config, run, test):
    """{"train", "val", "test"}: the splits that this run has, and the class of the data.

    config gets what the network must know of the data.
    """
    if config.early_stopping and test and not config.val_portion:
        raise SystemExit("early_stopping needs a validation loss: set val_portion, such as "
                         "--val_portion=0.1.")
    kind = data_kind(config.space)
    prepare_own(config, run)
    found, facts = kind.load(config)
    vars(config).update(facts)
    check_resumed_data(config)
    train, val = found["train"], found["val"]
    middle = len(train) - int(config.val_portion * len(train))
    splits = {"train": train.part(0, middle)}
    if config.val_portion:
        splits["val"] = train.part(middle, len(train))
    elif not test:
        splits["val"] = val
    if test:
        splits["test"] = val
    for name, data in splits.items():
        data.check(config, name)
    return splits, kind


def check_resolutions(net, config, run, arch=None):
    """SystemExit unless the network takes images of every size that it is to be trained on."""
    training = net.training
    for side in filter(None, as_list(getattr(config, "resolutions", []))):
        x = torch.zeros(1, config.in_channels, side, side, device=run.device)
        try:
            with torch.no_grad():
                net.eval()(x, None, arch)
        except (AssertionError, RuntimeError):
            raise SystemExit(f"resolutions={config.resolutions}: a network of {config.space} for "
                             f"images of {config.img_size} pixels takes none of {side}: leave it "
                             "out, or the key.") from None
    net.train(training)


def resume_training(net, optimizer, config, run, state, arch):
    """Puts everything back to the checkpoint."""
    resume(config, run, net, optimizer, state, network_keys(config.space), arch)
    path = os.path.join(config.out_dir, "best.pt")
    if os.path.exists(path) and load_checkpoint(path, "cpu")["step"] > state.step:
        # best.pt is of steps that are made again, perhaps with another result
        state.best, state.evaluated = math.inf, min(state.evaluated, config.max_iters - 1)
    state.stop = bool(config.early_stopping) and state.bad_evals >= config.early_stopping


def check_max_iters(config, state):
    if state.step > config.max_iters:
        raise SystemExit(f"max_iters={config.max_iters} is below the {state.step} steps that this "
                         f"run has made: give --max_iters={state.step} or more, or start anew with "
                         "--overwrite=True.")


def train(config, arch=None, test=False):
    """Trains the network of config (a dict), or of arch in config's space; returns result.json.

    test: val is kept for one pass at the end, with the best weights, and val_portion of the train
    split validates.
    """
    config = SimpleNamespace(**config)
    check_config(config)
    run = setup(config)
    splits, kind = split_data(config, run, test)
    net = build(vars(config), arch).to(run.device)
    use_fused_ops(config.fused and run.device_type == "cpu" and net.has_plain_kernels)
    check_plain(net, arch, config)
    check_resolutions(net, config, run)
    if is_pretrained(original_init_from(config)):
        load_pretrained(net, arch, original_init_from(config), config, run)
    cost, optimizer, state = net.cost(), configure_optimizer(net, config, run), TrainState()
    if is_resuming(config):
        resume_training(net, optimizer, config, run, state, arch)
    check_max_iters(config, state)
    init_out_dir(config, run)
    forward = torch.compile(net) if config.compile else net

    def checkpoint():
        save(config, run, "ckpt.pt", net, optimizer, arch=arch, state=vars(state))

    with Log(config, run, state.step, kind) as log, signals(run):
        log(f"{cost['params']:,} parameters, {cost['flops'] / 1e9:.3g} GFLOPs {kind.sample}, on "
            f"{run.device} in {run.dtype}", **cost)
        clock, timed, saved = time.perf_counter(), 0, time.perf_counter()
        while True:
            # evaluate, and keep the best weights
            done = state.step == config.max_iters
            due = state.step % config.eval_interval == 0 or done
            if due and state.evaluated < state.step:
                state.seconds += time.perf_counter() - clock
                evaluate(net, forward, splits, config, run, state, log)
                if state.best_step == state.step:
                    save(config, run, "best.pt", net, arch=arch, step=state.step,
                         losses=state.losses)
                state.evaluated = state.step
                checkpoint()
                clock, timed, saved = time.perf_counter(), 0, time.perf_counter()
            if done or state.stop:
                break

            # one step; every step seeds its dropout, so that a resumed run draws the same
            torch.manual_seed(rng(config.seed, "dropout", state.step, run.rank).initial_seed())
            net.progress = state.step / config.max_iters # some regularisation grows with it
            lr = get_lr(state.step, config)
            loss = train_step(net, forward, optimizer, splits["train"], config, run, state, lr)
            state.step, timed = state.step + 1, timed + 1

            # log
            log.bar.update()
            if state.step % config.log_interval == 0:
                log.step(state.step, loss, lr, clock, timed, cost["flops"])
                state.seconds += time.perf_counter() - clock
                clock, timed = time.perf_counter(), 0

            # save in between, and stop where a signal says so
            if stop_if_signaled(run, checkpoint, save_is_due(config, state.step, saved)):
                saved = time.perf_counter()
        log.bar.close()
        return finish(net, splits, config, run, state, cost, arch, log)


def check_plain(net, arch, config):
    """SystemExit if a space of images leaves something to choose."""
    if arch is None and net.choices and any(len(c.options) > 1 for c in net.choices.values()):
        raise SystemExit(f"space={config.space} leaves {', '.join(net.choices)} open: train one of "
                         "its architectures by train_base.py.")


def finish(net, splits, config, run, state, cost, arch, log):
    """result.json, with the test loss of the best weights if a test split was kept."""
    kind = type(splits["train"])
    result = {"out_dir": config.out_dir, "arch": arch, **cost, "steps": state.step,
              "seconds": state.seconds, "best_step": state.best_step, **state.losses}
    if f"val_{kind.metric}" in state.losses:
        result[f"best_val_{kind.metric}"] = -state.best
    elif "val_loss" in state.losses:
        result["best_val_loss"] = state.best
    if run.world > 1:
        dist.barrier() # best.pt is written
    if "test" in splits:
        path = os.path.join(config.out_dir, "best.pt")
        load_model(net, load_checkpoint(path, run.device), path)
        found = estimate_all(net, splits["test"], config, run)
        tests = {f"test_{key}": value for key, value in found.items()}
        text = ", ".join(f"test {key} {value:.4f}" for key, value in found.items())
        log(f"{text} on all {len(splits['test']):,} {kind.test_name}, weights of step "
            f"{state.best_step}", step=state.step, **tests)
        result |= tests
    if run.master:
        write_json(os.path.join(config.out_dir, "result.json"), result)
        if kind.unit == "tok":
            print("next: python sample.py " + shlex.quote(f"--out_dir={config.out_dir}"))
    return result


if __name__ == "__main__":
    hint = "train.py trains one network, train_search.py searches over a list of sizes"
    keys = with_space(globals(), run=resumed_run(globals()))
    main(train, configure(keys, list_hint=hint))
