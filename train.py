"""
Trains a GPT of fixed sizes on prepared data; its functions also run the searches and train_base.py.

    python train.py config/train_pydocs.py                      # a laptop, some minutes
    python train.py config/train_gpt2.py                        # one GPU
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py               # one node of 8 GPUs
    torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=10.0.0.1 --master_port=1234 train.py config/train_gpt2.py
    torchrun --nproc_per_node=8 --nnodes=2 --node_rank=1 --master_addr=10.0.0.1 --master_port=1234 train.py config/train_gpt2.py
    python train.py --help                                      # every key with its default

Writes to out_dir: run.json (what was run), log.jsonl (one object a printed line), ckpt.pt (the newest state) and ckpt.prev.pt (the
one before it), best.pt (the weights of the lowest validation loss, of images of the highest accuracy or PSNR) and result.json. SIGTERM
or Ctrl-C ends a run after its step with a checkpoint; with --init_from=resume it goes on as if nothing had happened, on any number of
processes. With --init_from=gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder with such a config.json and model.safetensors, it starts
with the weights of that GPT-2.
"""
import contextlib
import importlib.util
import math
import os
import shlex
import sys
import time
from types import SimpleNamespace

import torch
import torch.distributed as dist
from tqdm import tqdm

from configurator import as_list, check_range
from data import sides, Images, Pairs, sequential_batches, check_recipe, check_split, cut, draw, fidelity
from data import get_images, image_batches, load_data, micro_batches, pair_batches, quality
from fused_ops import use_fused_ops
from prepare import prepare_own
from pretrained import check_init_from
from run import Log, all_reduce_mean, init_out_dir, fault, finite, load_checkpoint, load_model, main, origin
from run import pretrained, resume, resumes, rng, save, setup, all_gather_scalar, signals, stop_if_signaled
from run import write_json
from search_spaces import build, network_keys, with_space
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
init_from = 'scratch' # 'resume': from ckpt.pt, 'previous': from the checkpoint before it; 'gpt2' or a folder: pretrained weights
wandb_log = False
wandb_project = 'nas'
tensorboard = False
# data
dataset = 'pydocs'
data_dir = 'data'
val_portion = 0.0 # the share of train.bin, at its end, that validates; 0: val.bin validates
gradient_accumulation_steps = 1 # micro-batches a step, over all processes
batch_size = 16 # sequences a micro-batch
block_size = 128
crop = 0 # images: a random crop after padding with so many pixels of zeros
flip = False # images: left and right at random; pairs of super-resolution: turned and mirrored in one of 8 ways
cutout = 0 # images: the side of a square of zeros at a random place (DeVries & Taylor 2017)
resized_crop = 0.0 # images: a random box of at least this share of the area, in full size; 0: off
rand_augment = 0 # images: the magnitude of two random operations, to 10 (RandAugment, Cubuk et al. 2020); needs kornia
color_jitter = 0.0 # images: how far brightness, contrast and saturation are changed; needs kornia
random_erasing = 0.0 # images: the probability that a box becomes noise (Zhong et al. 2020)
repeated_augmentation = 1 # images: how often each is in a batch, changed in different ways (Hoffer et al. 2020)
label_smoothing = 0.0 # images: the share of a label that goes to all classes
mixup = 0.0 # images: alpha of Beta(alpha, alpha), the weights that two are mixed with (Zhang et al. 2018)
cutmix = 0.0 # images: alpha of the area that one gets from another (Yun et al. 2019)
mix_prob = 1.0 # of a batch to be mixed, where one of the two is on
mix_switch = 0.5 # of cutmix, where both are
resolutions = [0] # images: sizes to which training batches are resized at random; 0: the data's own, which evaluation has
bn_batches = 20 # training batches that the statistics of BatchNorms are measured on, before every evaluation
# model
space = 'gpt' # or a file of search_spaces/, whose keys then take the place of the GPT's: --space=nb201 --help
n_layer = 4
n_head = 4
n_embd = 128
mlp_ratio = 4.0
head_size = 0 # channels a head; 0: n_embd / n_head
dropout = 0.0
bias = False
norm = 'layernorm' # 'rmsnorm', 'partial_rmsnorm'
prmsnorm_pct = 0.0625 # of partial_rmsnorm: the share of the channels that its RMS is estimated from
position = 'learned' # 'sinusoidal', 'rope'
activation = 'gelu' # GPT-2's, by tanh; 'exact_gelu', 'relu', 'silu', 'mish', or gated: 'geglu', 'swiglu', 'reglu', their c_fc twice as wide
residual = 'pre' # 'post', 'branch', 'parallel'
n_expert = 0 # MLPs a layer, of which each token takes top_k (mixture of experts); 0: one MLP
top_k = 2
router_aux_loss_coef = 0.1 # what the uneven use of the experts adds to the training loss
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
milestones = [0] # in the place of the cosine: the steps from which the learning rate is halved; [0]: none
skip_nonfinite = 0 # pass over up to so many steps whose loss or gradient is not finite
zero_stage = 0 # 1: every process keeps a share of the optimizer's state (ZeRO, Rajbhandari et al. 2020)
early_stopping = 0 # stop after so many evaluations without a better one on the validation data; 0: never
# system
seed = 1337
backend = '' # of torchrun's processes: '' is nccl on cuda and gloo elsewhere
timeout_minutes = 30.0 # after which processes give up on one that no longer answers
device = 'auto' # 'cpu', 'cuda', 'cuda:1', 'mps'; auto: the fastest there is
dtype = 'auto' # 'float32', 'bfloat16', 'float16'; auto: bfloat16 where cuda has it, float16 on older cuda, else float32
fused = True # on a CPU: mixtures and depthwise convolutions in the kernels of fused_ops.cpp, compiled at first use; False: PyTorch's
compile = False # torch.compile: a minute or two at the start, faster from then on
# -----------------------------------------------------------------------------


def check_run(config):
    """SystemExit for keys that no run can have."""
    check_numbers(config)
    check_recipe(config)
    check_init_from(config)


def check_numbers(config):
    """SystemExit for a number that no run can have, and for a log whose package is not there."""
    check_range(config, 1, "eval_interval", "log_interval", "eval_iters", "batch_size", "gradient_accumulation_steps",
                *["block_size"] * (config.space == "gpt"))
    check_range(config, 0, "max_iters", "learning_rate", "min_lr", "weight_decay", "grad_clip", "warmup_iters", "lr_decay_iters",
                "milestones", "save_interval", "save_minutes", "skip_nonfinite", "crop", "cutout", "bn_batches")
    check_range(config, -2**63, "seed", below=2**63) # what PyTorch takes
    for key, package in (("wandb_log", "wandb"), ("tensorboard", "tensorboard")):
        if getattr(config, key) and importlib.util.find_spec(package) is None:
            raise SystemExit(f"{key}=True needs a package that is not installed: pip install {package}, or leave it off.")
    check_range(config, 0, "beta1", "beta2", "momentum", below=1)
    if config.weight_optimizer == "sgd" and config.nesterov and not config.momentum:
        raise SystemExit("nesterov=True needs a momentum above 0, and momentum=0: raise it, such as --momentum=0.9, or leave nesterov out.")


def load_pretrained(net, arch, source, run):
    """Fills net from what init_from names: a GPT-2, or the out_dir of a search, whose supernet has weights for this architecture."""
    path = os.path.join(source, "ckpt.pt")
    if not os.path.exists(path):
        return pretrained.load_gpt2(net, source, arch)
    checkpoint = load_checkpoint(path, run.device)
    kind, of = ("search", source) if "chooser" in checkpoint else ("training", "OUT_DIR")
    if kind == "training" or arch is None:
        raise SystemExit(f"init_from='{source}' is the out_dir of a {kind}, and of our own runs only a search has weights to start with, "
                         f"those of one of its architectures: python train_base.py --arch={of}/arch.json --init_from={of}.")
    whole = load_model(build(checkpoint["config"]).to(run.device), checkpoint, path)
    return load_model(net, {"model": whole.extract(arch).state_dict()}, path)


def get_lr(step, config):
    """Linear warmup, cosine decay to min_lr, min_lr from then on; or halved at the milestones."""
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    milestones = as_list(config.milestones)
    if any(milestones):
        return config.learning_rate * 0.5 ** sum(step >= milestone for milestone in milestones)
    end = config.lr_decay_iters or config.max_iters
    if not config.decay_lr or end <= config.warmup_iters:
        return config.learning_rate
    ratio = min(1.0, (step - config.warmup_iters) / (end - config.warmup_iters))
    return config.min_lr + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (config.learning_rate - config.min_lr)


def configure_optimizer(net, config, run):
    """AdamW, under which biases and norms, of one dimension, and what the network names in no_weight_decay do not decay; or Adam or
    SGD, under which everything does but in a network that says decays_norms = False."""
    params, sgd = list(net.parameters()), config.weight_optimizer == "sgd"
    kinds = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}
    if config.weight_optimizer not in kinds:
        raise SystemExit(f"weight_optimizer='{config.weight_optimizer}' is not one of {', '.join(kinds)}.")
    groups = [{"params": params, "weight_decay": config.weight_decay}]
    if config.weight_optimizer == "adamw" or not getattr(net, "decays_norms", True):
        exempt = {p for name, p in net.named_parameters() if p.dim() < 2 or name.split(".")[-1] in getattr(net, "no_weight_decay", ())}
        groups = [{"params": [p for p in params if p not in exempt], "weight_decay": config.weight_decay},
                  {"params": [p for p in params if p in exempt], "weight_decay": 0.0}]
    options = dict(momentum=config.momentum, nesterov=config.nesterov) if sgd else dict(betas=(config.beta1, config.beta2))
    options |= dict(lr=config.learning_rate, fused=run.device_type == "cuda")
    if config.zero_stage:
        from torch.distributed.optim import ZeroRedundancyOptimizer
        return ZeroRedundancyOptimizer([g for g in groups if g["params"]], kinds[config.weight_optimizer], **options)
    return kinds[config.weight_optimizer](groups, **options)


def check_resolutions(net, config, run, *arch):
    """SystemExit unless the network, or this architecture of it, takes images of every size that it is to be trained on."""
    training = net.training
    for side in filter(None, sides(config)) if hasattr(config, "num_classes") else (): # neither tokens nor pairs of images
        try:
            with torch.no_grad():
                net.eval()(torch.zeros(1, config.in_channels, side, side, device=run.device), None, *arch)
        except (AssertionError, RuntimeError):
            raise SystemExit(f"resolutions={config.resolutions}: a network of {config.space} for images of {config.img_size} pixels takes "
                             f"none of {side}: leave it out, or the key.") from None
    net.train(training)


def backward(net, batches, run, arch=()):
    """Adds the gradient of the mean loss over this process's micro-batches, (x, y) or (x, y, a supernet's third argument), to .grad;
    returns that loss, a tensor."""
    total, batches = 0.0, list(batches)
    for x, y, *third in batches:
        with run.amp:
            loss = net(x, y, *third, *arch)[1] / len(batches)
        run.scaler.scale(loss).backward()
        total = total + loss.detach()
    return total


def update(net, optimizer, loss, config, run, state):
    """One step of the weights on .grad, averaged over the processes and clipped; none if the loss or a gradient is not finite."""
    params = [p for p in net.parameters() if p.grad is not None]
    grads = [p.grad for p in params]
    norm = torch.nn.utils.get_total_norm(grads)
    # float16 has infinite gradients now and then, which its scaler sees to
    healthy = loss.isfinite() and (norm.isfinite() or run.scaler.is_enabled())
    sick = [rank for rank, flag in enumerate(all_gather_scalar(not healthy, run)) if flag]
    if sick:
        names = [name for name, p in net.named_parameters() if p.grad is not None and not p.grad.isfinite().all()][:3]
        optimizer.zero_grad(set_to_none=True)
        return fault(f"on rank {', '.join(map(str, sick))} (on rank {run.rank} the loss is {loss.item()}, and the first gradients that are "
                     f"not finite are those of {', '.join(names) or 'none'})", config, state)
    all_reduce_mean(grads, run)
    run.scaler.unscale_(optimizer)
    if config.grad_clip:
        if run.world > 1 or run.scaler.is_enabled(): # else it is the norm from above
            norm = torch.nn.utils.get_total_norm(grads)
        torch.nn.utils.clip_grads_with_norm_(params, config.grad_clip, norm)
    run.scaler.step(optimizer)
    run.scaler.update()
    optimizer.zero_grad(set_to_none=True)


def train_step(net, forward, optimizer, tokens, config, run, state, lr, arch=()):
    """One step of the weights; returns this process's loss. arch: () or a supernet's third arguments, whose gradients are averaged."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    thirds = [(one,) for one in arch] or [()]
    batches = [(*batch, *third) for batch in micro_batches(tokens, config, run, "train", state.step) for third in thirds]
    loss = backward(forward, batches, run)
    update(net, optimizer, loss, config, run, state)
    return loss


def calibrate(net, forward, data, config, run, arch=()):
    """Measures the statistics of net's BatchNorms, as this architecture, on bn_batches batches of the train split, the same ones on
    every process: they depend neither on what ran before nor on the number of processes. The images are those of an evaluation, but
    for crop, flip and cutout: mixed ones, or those of another size, have other statistics."""
    def run_batch(i):
        with run.amp:
            forward(draw(data, config, run, "train", i, recipe=False)[0], None, *arch)
    measure_norms(net, run_batch, config.bn_batches)


def tally(net, batches, run):
    """(summed loss, right answers, answers) over batches of (x, y, *the rest of net's arguments), in evaluation. Unpredicted tokens,
    y < 0, do not count; an image in the place of an answer counts with its PSNR on Y."""
    total = torch.zeros(3, dtype=torch.float64)
    for x, y, *rest in batches:
        with run.amp:
            logits, loss = net(x, y, *rest)
        if y.dim() == 4:
            n, right = len(y), fidelity(logits, y, y.shape[3] // x.shape[3])["psnr_y"] * len(y)
        else:
            n, right = (y >= 0).sum(), 0 if logits is None or y.dim() > 1 else (logits.argmax(-1) == y).sum()
        total += torch.tensor([loss.item() * n, right, n])
    return total


@torch.no_grad()
def estimate(net, data, config, run, name, arch_of=None, own_norms=False):
    """{"loss"} over eval_iters batches of data, always the same ones, shared between the processes; of images also {"acc"}, in %; of
    pairs over eval_iters whole images, and {"psnr"}, on Y, in dB.
    FloatingPointError if the loss is not finite. arch_of(i): a supernet's third argument for batch i. own_norms: BatchNorms take the
    statistics of each batch, as in training."""
    def batches():
        for i in range(run.rank, count, run.world):
            if images:
                index = torch.arange(i * config.batch_size, min((i + 1) * config.batch_size, len(data)))
                x, y = get_images(data, index, run.device)
            else:
                x, y = next(pair_batches(data, [i], run.device)) if pairs else draw(data, config, run, "eval", name, i)
            yield x, y, *([arch_of(i)] if arch_of else [])

    training, images, pairs = net.training, isinstance(data, Images), isinstance(data, Pairs)
    count = config.eval_iters
    if images or pairs:
        rest = len(data) - (images and own_norms) # one image left over has no statistics
        count = min(count, max(1, -(-rest // (config.batch_size if images else 1))))
    net.eval()
    with batch_norms(net) if own_norms else contextlib.nullcontext():
        total, right, n = (sum(all_gather_scalar(t, run)) for t in tally(net, batches(), run))
    net.train(training)
    return {"loss": finite(total / n, f"the {name} loss"), **quality(data, right / n)}


@torch.no_grad()
def estimate_all(net, data, config, run):
    """estimate() of a whole split: every token predicted once, in blocks without overlap, or every image."""
    net.eval()
    if isinstance(data, Pairs):
        batches, size = pair_batches(data, range(len(data)), run.device), 1
    else:
        images = isinstance(data, Images)
        shape = (config.batch_size,) if images else (config.batch_size, config.block_size)
        batches, size = (image_batches if images else sequential_batches)(data, *shape, run.device), math.prod(shape)
    total, right, n = tally(net, tqdm(batches, desc="test", unit="batch", leave=False, total=-(-len(data) // size),
                                      disable=not sys.stderr.isatty()), run).tolist()
    return {"loss": finite(total / n, "the test loss"), **quality(data, right / n)}


def split_data(config, run, test):
    """{"train", "val", "test"}: the data of each split that this run has; config gets what the network must know of it."""
    check_range(config, 0, "val_portion", below=1)
    check_range(config, 0, "early_stopping")
    if config.early_stopping and test and not config.val_portion:
        raise SystemExit("early_stopping needs a validation loss: set val_portion, such as --val_portion=0.1.")
    prepare_own(config, run)
    train, val, facts = load_data(config, run)
    vars(config).update(facts)
    middle = len(train) - int(config.val_portion * len(train))
    splits = {"train": cut(train, 0, middle)}
    if config.val_portion:
        splits["val"] = cut(train, middle, len(train))
    elif not test:
        splits["val"] = val
    if test:
        splits["test"] = val
    for name, data in splits.items():
        check_split(data, config, name)
    return splits


def loop(config, run, state, log, flops, step, evaluate, checkpoint, line=dict, schedule=get_lr):
    """The steps from state.step to max_iters, with evaluations, checkpoints and log lines in between.

    step(lr) -> loss: one step. evaluate() -> whether to stop early. checkpoint(): saves everything. flops: of one sequence,
    forward. line() -> more values of a log line. schedule(step, config) -> the learning rate.
    """
    if state.step > config.max_iters:
        raise SystemExit(f"max_iters={config.max_iters} is below the {state.step} steps that this run has made: give "
                         f"--max_iters={state.step} or more, or start anew with --overwrite=True.")
    clock, timed, saved = time.perf_counter(), 0, time.perf_counter()
    while True:
        done = state.step == config.max_iters
        if (state.step % config.eval_interval == 0 or done) and state.evaluated < state.step:
            state.seconds += time.perf_counter() - clock
            state.stop = bool(evaluate())
            state.evaluated = state.step
            checkpoint()
            clock, timed, saved = time.perf_counter(), 0, time.perf_counter()
        if done or state.stop:
            break
        torch.manual_seed(rng(config.seed, "dropout", state.step, run.rank).initial_seed())
        lr = schedule(state.step, config)
        loss = step(lr)
        state.step, timed = state.step + 1, timed + 1
        log.bar.update()
        if state.step % config.log_interval == 0:
            log.step(state.step, loss, lr, clock, timed, flops, **line())
            state.seconds += time.perf_counter() - clock
            clock, timed = time.perf_counter(), 0
        due = config.save_interval and state.step % config.save_interval == 0
        due = due or (config.save_minutes and time.perf_counter() - saved > 60 * config.save_minutes)
        if stop_if_signaled(run, checkpoint, due):
            saved = time.perf_counter()
    log.bar.close()


def train(config, arch=None, test=False):
    """Trains the network of config (a dict), or of arch in config's space; returns what it writes to result.json.

    test: val.bin is kept for one pass at the end, with the best weights, and val_portion of train.bin validates.
    """
    config = SimpleNamespace(**config)
    check_run(config)
    run = setup(config)
    splits = split_data(config, run, test)
    use_fused_ops(config.fused and run.device_type == "cpu" and config.space != "gpt")
    net = build(vars(config), arch).to(run.device)
    if arch is None and config.space != "gpt" and any(len(c.options) > 1 for c in net.choices.values()):
        raise SystemExit(f"space={config.space} leaves {', '.join(net.choices)} open: train one of its architectures by train_base.py.")
    check_resolutions(net, config, run)
    if pretrained(origin(config)):
        load_pretrained(net, arch, origin(config), run)
    cost, optimizer = net.cost(), configure_optimizer(net, config, run)
    state = SimpleNamespace(step=0, evaluated=-1, stop=False, skipped=0, seconds=0.0, losses={}, best_step=0, best=math.inf, bad_evals=0)
    if resumes(config):
        resume(config, run, net, optimizer, state, network_keys(config.space), arch)
        path = os.path.join(config.out_dir, "best.pt")
        if os.path.exists(path) and load_checkpoint(path, "cpu")["step"] > state.step: # of steps that are made anew, perhaps otherwise
            state.best, state.evaluated = math.inf, min(state.evaluated, config.max_iters - 1)
        state.stop = bool(config.early_stopping) and state.bad_evals >= config.early_stopping
    init_out_dir(config, run)
    forward = torch.compile(net) if config.compile else net
    sample = "a sequence" if config.space == "gpt" else "an image"

    def step(lr):
        net.progress = state.step / config.max_iters # some regularisation grows with it
        return train_step(net, forward, optimizer, splits["train"], config, run, state, lr)

    def evaluation():
        evaluate(net, forward, splits, config, run, state, log)
        if state.best_step == state.step:
            save(config, run, "best.pt", net, arch=arch, step=state.step, losses=state.losses)
        return config.early_stopping and state.bad_evals >= config.early_stopping

    def checkpoint():
        save(config, run, "ckpt.pt", net, optimizer, arch=arch, state=vars(state))

    with Log(config, run, state.step) as log:
        log(f"{cost['params']:,} parameters, {cost['flops'] / 1e9:.3g} GFLOPs {sample}, on {run.device} in {run.dtype}", **cost)
        with signals(run):
            loop(config, run, state, log, cost["flops"], step, evaluation, checkpoint)
        return finish(net, splits, config, run, state, cost, arch, log)


def evaluate(net, forward, splits, config, run, state, log):
    """Logs the loss, and of images the accuracy or PSNR, of train and val, and counts in state how long the best of val has stood.
    Without validation data the newest weights are the best that can be told."""
    calibrate(net, forward, splits["train"], config, run)
    losses = {f"{name}_{key}": value for name, data in splits.items() if name != "test"
              for key, value in estimate(forward, data, config, run, name).items()}
    best = best_key(losses)
    score = -losses[best] if best else losses.get("val_loss", -state.step)
    state.losses, state.bad_evals = losses, 0 if score < state.best else state.bad_evals + 1
    if score < state.best:
        state.best, state.best_step = score, state.step
    log(" | ".join([f"step {state.step}/{config.max_iters}", *(f"{key} {value:.4f}" for key, value in losses.items())]),
        step=state.step, **losses)


def best_key(losses):
    """Of what is the better the higher, the one that tells the best weights; None where it is the loss."""
    return next((key for key in ("val_acc", "val_psnr") if key in losses), None)


def finish(net, splits, config, run, state, cost, arch, log):
    """The test loss of the best weights, if a test split was kept, and result.json."""
    result = {"out_dir": config.out_dir, "arch": arch, **cost, "steps": state.step, "seconds": state.seconds,
              "best_step": state.best_step, **state.losses}
    if "val_loss" in state.losses:
        best = best_key(state.losses)
        result |= {f"best_{best}": -state.best} if best else {"best_val_loss": state.best}
    if run.world > 1:
        dist.barrier() # best.pt is written
    if "test" in splits:
        path = os.path.join(config.out_dir, "best.pt")
        load_model(net, load_checkpoint(path, run.device), path)
        tests = {f"test_{key}": value for key, value in estimate_all(net, splits["test"], config, run).items()}
        unit = "tokens of val.bin" if config.space == "gpt" else "images of val"
        log(", ".join(f"test {key[5:]} {value:.4f}" for key, value in tests.items()) +
            f" on all {len(splits['test']):,} {unit}, weights of step {state.best_step}", step=state.step, **tests)
        result |= tests
    if run.master:
        write_json(os.path.join(config.out_dir, "result.json"), result)
        if config.space == "gpt":
            print("next: python sample.py " + shlex.quote(f"--out_dir={config.out_dir}"))
    return result


if __name__ == "__main__":
    from configurator import configure
    main(train, configure(with_space(globals()), list_hint="train.py trains one network, train_search.py searches over a list of sizes"))
