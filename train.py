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
import hashlib
import importlib.util
import io
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import model
from configurator import as_list, check_range, defaults, given
from prepare import Images, Pairs, blocks, check_length, draw_index, get_batch, get_images, get_patches, image_batches, load_images
from prepare import load_meta, load_pairs, load_tokens, pair_batches, prepare, read_json, rng, write, write_json
from recipes import change_batch, change_pixels, check_recipe, sides
from supernet import batch_norms, measure_norms, use_fused_ops

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

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LOGS = ("log.jsonl", "arch_traj.jsonl")
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "L40S": 362e12, "4090": 165e12, "V100": 112e12} # dense 16 bit


def space_module(space):
    """The file of a search space, with its build(); of the GPT model.py. SystemExit if there is none of that name."""
    there = sorted(path.stem for path in Path(__file__).parent.glob("search_spaces/*.py"))
    if space != "gpt" and space not in there:
        raise SystemExit(f"space='{space}' is not gpt or a file of search_spaces/: {', '.join(there)}.")
    return model if space == "gpt" else importlib.import_module(f"search_spaces.{space}")


def with_space(namespace, space=None, found=None):
    """A script's globals(), where the keys of another space than the GPT stand in the place of the GPT's, and found in that of defaults.
    space: None for the one that the command line names."""
    space = space or given("space") or namespace["space"]
    if space == "gpt":
        return namespace
    module, gpt = space_module(space), {field.name for field in fields(model.GPTConfig)}
    keys = {name: value for name, value in namespace.items() if name not in gpt} | {"space": space, "__space__": module}
    if keys["dataset"] == "pydocs":
        keys["dataset"] = own_data(module)
    return keys | defaults(vars(module)) | (found or {})


def own_data(module):
    """The data set of a space that needs no network."""
    return "sr_samples" if hasattr(module, "scale") else "digits"


def build(config, arch=None):
    """The network of a config (a dict) in its space, or of one of the space's architectures."""
    net = space_module(config["space"]).build(config, arch)
    return net.to(memory_format=torch.channels_last) # in which convolutions are fastest


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


def setup(config):
    """Joins torchrun's processes, seeds, and checks the numbers and out_dir.

    Returns the run: rank, world, master (rank 0), device, device_type, dtype, amp (a context), scaler, control, signal (that arrived).
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    check_numbers(config)
    check_recipe(config)
    if config.gradient_accumulation_steps % world:
        raise SystemExit(f"gradient_accumulation_steps={config.gradient_accumulation_steps} does not divide over {world} processes: "
                         f"make it a multiple of {world}.")
    device = pick_device(config.device)
    device_type = device.split(":")[0]
    timeout = timedelta(minutes=config.timeout_minutes)
    if world > 1:
        if device_type == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        if not dist.is_initialized(): # by an earlier run in this process
            dist.init_process_group(config.backend or ("nccl" if device_type == "cuda" else "gloo"), timeout=timeout)
    torch.manual_seed(config.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    dtype = pick_dtype(config.dtype, device_type)
    amp = contextlib.nullcontext() if dtype == "float32" else torch.amp.autocast(device_type, DTYPES[dtype])
    scaler = torch.amp.GradScaler(device_type, enabled=dtype == "float16")
    if config.zero_stage not in (0, 1) or (config.zero_stage and world == 1):
        raise SystemExit(f"zero_stage={config.zero_stage} is not 0, or 1 with several processes (here: {world}), started by torchrun.")
    control = dist.new_group(backend="gloo", timeout=timeout) if world > 1 else None # flags go between the CPUs, and no GPU waits for them
    run = SimpleNamespace(rank=rank, world=world, master=rank == 0, device=device, device_type=device_type, dtype=dtype, amp=amp,
                          scaler=scaler, control=control, signal=0)
    check_out_dir(config, run)
    return run


def pick_device(device):
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    cards = ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))] if torch.cuda.is_available() else []
    there = ["cpu", *cards, *["mps"] * torch.backends.mps.is_available()]
    if device not in there:
        raise SystemExit(f"device='{device}' is not on this machine: use one of {', '.join(there)}, or auto.")
    return device


def pick_dtype(dtype, device_type):
    if dtype == "auto":
        return "float32" if device_type != "cuda" else "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    if dtype not in DTYPES:
        raise SystemExit(f"dtype='{dtype}' is not one of {', '.join(DTYPES)} or auto.")
    return dtype


def resumes(config):
    return config.init_from in ("resume", "previous")


def pretrained(init_from):
    """Whether it names weights to start with."""
    return init_from not in ("scratch", "resume", "previous")


def origin(config):
    """init_from, or that with which a run began that goes on before its first checkpoint: it starts with the same weights again."""
    if config.init_from != "resume" or os.path.exists(os.path.join(config.out_dir, "ckpt.pt")):
        return config.init_from
    return read_json(os.path.join(config.out_dir, "run.json"))["config"]["init_from"]


def check_out_dir(config, run):
    """SystemExit if out_dir holds a run that would be lost, or none to go on with."""
    if pretrained(config.init_from) and config.init_from not in model.GPT2 and not os.path.isdir(config.init_from):
        raise SystemExit(f"init_from='{config.init_from}' is not 'scratch', 'resume' or 'previous', nor a pretrained network: "
                         f"{', '.join(model.GPT2)}, or a folder with such a config.json and model.safetensors.")
    if pretrained(config.init_from) and vars(config).get("space") != "gpt":
        raise SystemExit(f"init_from='{config.init_from}' is for the GPT alone.")
    held = os.path.exists(os.path.join(config.out_dir, "run.json"))
    if resumes(config) and not held:
        raise SystemExit(f"out_dir={config.out_dir} holds no run to resume: leave out --init_from, or name the run's --out_dir.")
    if not resumes(config) and held and not config.overwrite:
        raise SystemExit(f"out_dir={config.out_dir} holds another run: choose another --out_dir, go on with it by "
                         "--init_from=resume, or replace it by --overwrite=True.")
    if run.world > 1:
        dist.barrier() # every rank has looked before rank 0 writes


def begin(config, run):
    """Makes out_dir and writes run.json: the data and the network are there, what follows is work that must not be lost."""
    if not run.master or resumes(config):
        return
    try:
        os.makedirs(config.out_dir, exist_ok=True)
    except OSError as e:
        raise SystemExit(f"out_dir={config.out_dir} cannot be made ({e.strerror}): choose another --out_dir.") from None
    for name in (*LOGS, "arch_search.jsonl", "pareto.json", "arch.json", "result.json", "ckpt.pt", "ckpt.prev.pt", "best.pt"):
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(config.out_dir, name))
    here, commit = os.path.dirname(os.path.abspath(__file__)), ""
    with contextlib.suppress(FileNotFoundError): # no git
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=here).stdout.strip()
    write_json(os.path.join(config.out_dir, "run.json"), {
        "argv": sys.argv, "config": vars(config), "commit": commit, "seed": config.seed, "world": run.world,
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__},
        "device": torch.cuda.get_device_name(run.device) if run.device_type == "cuda" else run.device, "dtype": run.dtype})


def append(path, data):
    """One more line of JSON at the end of a log."""
    try:
        with open(path, "a") as f:
            f.write(json.dumps(data) + "\n")
    except OSError as e:
        raise SystemExit(f"{path} cannot be written ({e.strerror}): make room; the run goes on from its last checkpoint by "
                         "--init_from=resume.") from None


def fingerprint(value):
    """The hash of nested dicts, lists, tensors and plain values."""
    digest = hashlib.sha256()
    def feed(v):
        digest.update(type(v).__name__.encode())
        if isinstance(v, torch.Tensor):
            digest.update(f"{v.dtype}{tuple(v.shape)}".encode())
            digest.update(v.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        elif isinstance(v, dict):
            feed(list(v.items()))
        elif isinstance(v, list | tuple):
            digest.update(str(len(v)).encode())
            for part in v:
                feed(part)
        else:
            digest.update(repr(v).encode())
    feed(value)
    return digest.hexdigest()


def load_checkpoint(path, device):
    """The dict in a checkpoint. Nothing is unpickled that could run code; SystemExit if it is missing or damaged."""
    previous = os.path.join(os.path.dirname(path), "ckpt.prev.pt")
    other = "take another"
    if path.endswith("ckpt.pt") and os.path.exists(previous):
        other = "go on from the one before it by --init_from=previous"
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        whole = checkpoint.pop("sha256") == fingerprint(checkpoint)
    except FileNotFoundError:
        raise SystemExit(f"There is no checkpoint {path}: name the out_dir of a run that has saved one.") from None
    except Exception as e: # torch.load raises whatever the damaged bytes lead it to
        raise SystemExit(f"The checkpoint {path} is damaged or not one of ours ({type(e).__name__}): {other}.") from None
    if not whole:
        raise SystemExit(f"The checkpoint {path} is damaged, its content does not have the hash that it was saved with: {other}.")
    return checkpoint


def load_model(net, checkpoint, path):
    """net with the checkpoint's weights; SystemExit, with the first difference, if their shapes differ."""
    own, other = net.state_dict(), checkpoint["model"]
    for name in [*own, *other]:
        a, b = (tuple(state[name].shape) if name in state else None for state in (own, other))
        if a != b:
            raise SystemExit(f"The checkpoint {path} is of another shape: its {name} is {b}, this network's is {a}. "
                             "Use the sizes that it was trained with.")
    net.load_state_dict(other)
    return net


def check_same(config, checkpoint, path, *keys):
    """SystemExit where a run would go on as another network, of which the shapes need not tell: a forgotten --norm or --n_head has the
    same. keys: others of config that must be what they were."""
    if config.space == "gpt":
        own = {field.name for field in fields(model.GPTConfig)}
        own -= {"block_size", "vocab_size", "dropout", "router_aux_loss_coef", "loss_chunk"} # what may change, or shapes tell
    else: # partial_channels changes within a progressive search
        own = set(defaults(vars(space_module(config.space))))
        own -= {"dropout", "drop_path", "auxiliary", "patch", "tile", "partial_channels"}
    for key in (*keys, *sorted(own & vars(config).keys())): # agents have a few of them
        ours = getattr(config, key)
        theirs = checkpoint["config"].get(key, None if key in keys else ours) # older runs had fewer
        if as_list(theirs) != as_list(ours):
            raise SystemExit(f"{path} is of a run with {key}={theirs}, and this one has {key}={ours}: it goes on with what it began with.")


def load_pretrained(net, arch, source, run):
    """Fills net from what init_from names: a GPT-2, or the out_dir of a search, whose supernet has weights for this architecture."""
    path = os.path.join(source, "ckpt.pt")
    if not os.path.exists(path):
        return model.load_gpt2(net, source, arch)
    checkpoint = load_checkpoint(path, run.device)
    kind, of = ("search", source) if "chooser" in checkpoint else ("training", "OUT_DIR")
    if kind == "training" or arch is None:
        raise SystemExit(f"init_from='{source}' is the out_dir of a {kind}, and of our own runs only a search has weights to start with, "
                         f"those of one of its architectures: python train_base.py --arch={of}/arch.json --init_from={of}.")
    whole = load_model(build(checkpoint["config"]).to(run.device), checkpoint, path)
    return load_model(net, {"model": whole.extract(arch).state_dict()}, path)


class Log:
    """Lines to the terminal below a progress bar, the same as objects to log.jsonl, and to wandb and TensorBoard if asked for."""
    def __init__(self, config, run, start=0):
        self.config, self.run, self.wandb, self.board = config, run, None, None
        self.bar = tqdm(total=config.max_iters, initial=start, unit="step", leave=False, disable=not run.master or not sys.stderr.isatty())
        if run.master and config.wandb_log:
            import wandb
            self.wandb = wandb.init(project=config.wandb_project, name=config.out_dir, config=vars(config))
        if run.master and config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(config.out_dir)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """Waits until all is written: both writers have threads of their own, that might write into a folder that is gone."""
        if self.wandb:
            self.wandb.finish()
        if self.board:
            self.board.close()

    def __call__(self, line, **values):
        if not self.run.master:
            return
        if line:
            tqdm.write(line)
        append(os.path.join(self.config.out_dir, "log.jsonl"), values)
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float)}
        if self.wandb:
            self.wandb.log(numbers)
        if self.board:
            for k, v in numbers.items():
                self.board.add_scalar(k, v, values.get("step", 0))

    def step(self, step, loss, lr, clock, steps, flops, **extra):
        """The line of a training step. loss: this process's, a tensor; clock: when the last `steps` steps began; flops: forward,
        of one sample. extra: more values of the line."""
        loss = loss.detach().clone().reshape(1)
        average([loss], self.run)
        loss = loss.item() # not finite only in a step that was passed over
        ms = (time.perf_counter() - clock) / steps * 1000
        samples, text = self.config.batch_size * self.config.gradient_accumulation_steps, self.config.space == "gpt"
        speed = samples * (self.config.block_size if text else 1) / ms * 1000
        values = {"step": step, "loss": loss, "lr": lr, "ms": ms, "tokens_per_s" if text else "images_per_s": speed}
        line = f"step {step}/{self.config.max_iters} | loss {loss:.4f} | lr {lr:.2e} | {ms:.1f} ms | {speed:,.0f} "
        line += "tok/s" if text else "img/s"
        if peak := peak_flops(self.run):
            values["mfu"] = 3 * flops * samples / ms * 1000 / peak / self.run.world # backward costs two forwards
            line += f" | mfu {100 * values['mfu']:.1f}%"
        self(line + "".join(f" | {key} {value}" for key, value in extra.items()), **values)


def peak_flops(run):
    """What the card can do in 16 bit, FLOPs a second; 0 where it is not known."""
    name = torch.cuda.get_device_name(run.device) if run.device_type == "cuda" else ""
    return next((peak for card, peak in PEAK_FLOPS.items() if card in name), 0)


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


def load_data(config, run):
    """The data of train and of val, and what the network must know of it: {"vocab_size"} of tokens, or of images {"img_size",
    "in_channels", "num_classes"}. A space with a scale has pairs of images."""
    scale = vars(config).get("scale")
    # they need no network: made at first use
    own = {"pydocs", "this_python", "digits", "sr_samples"} & {config.dataset}
    folder = f"{config.dataset}_x{scale}" if scale else config.dataset
    if own and run.master and not os.path.exists(os.path.join(config.data_dir, folder, "meta.json")):
        prepare(dataset=config.dataset, data_dir=config.data_dir, **{"scale": scale} if scale else {})
    if run.world > 1:
        dist.barrier()
    if scale:
        return *(load_pairs(config.data_dir, config.dataset, split, scale) for split in ("train", "val")), {}
    if config.space != "gpt":
        train, val = (load_images(config.data_dir, config.dataset, split) for split in ("train", "val"))
        return train, val, {"img_size": train.pixels.shape[1], "in_channels": train.pixels.shape[3], "num_classes": train.num_classes}
    train, val = (load_tokens(config.data_dir, config.dataset, split) for split in ("train", "val"))
    return train, val, {"vocab_size": vocabulary(load_meta(config.data_dir, config.dataset)["vocab_size"], config)}


def vocabulary(size, config):
    """The vocab_size of the network for so many tokens: large ones in multiples of 64, for speed, but where it began as a pretrained
    one, whose logits are those of its tokens."""
    padded = size if size < 1000 else -(-size // 64) * 64
    path = os.path.join(config.out_dir if resumes(config) else config.init_from, "run.json")
    if os.path.exists(path): # of the run that goes on, or that the weights are from
        return size if read_json(path)["config"].get("vocab_size") == size else padded
    return size if pretrained(config.init_from) else padded


def cut(data, start, stop):
    """A part of the tokens or of the images of a split."""
    return data.part(start, stop) if isinstance(data, Images | Pairs) else data[start:stop]


def check_split(data, config, name):
    """SystemExit unless the data holds a batch."""
    if isinstance(data, Images):
        draw_index(len(data), config.batch_size, 0)
    elif isinstance(data, Pairs):
        least = min(data.shapes.min(1).tolist(), default=0)
        if least < (3 if name in ("val", "test") else config.patch): # PSNR leaves out a border of one pixel
            raise SystemExit(f"The {name} split of {config.dataset} has {len(data)} images or regions, the smallest of {least} pixels, and "
                             f"patch={config.patch}: choose a smaller patch, or prepare more images, or larger regions by --img_size.")
    else:
        check_length(data, config.block_size, f"the {name} split of {config.dataset}")


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


def draw(data, config, run, name, step, micro=0, recipe=True):
    """x, y of a micro-batch: random windows of tokens; images in random order, those of the train split augmented, and changed by the
    keys of recipes.py if recipe; crops of pairs."""
    if isinstance(data, Pairs):
        return get_patches(data, config.batch_size, config.patch, rng(config.seed, name, step, micro), run.device, config.flip)
    if not isinstance(data, Images):
        return get_batch(data, config.batch_size, config.block_size, rng(config.seed, name, step, micro), run.device)
    copies = config.repeated_augmentation if name == "train" and recipe else 1
    number = step * config.gradient_accumulation_steps + micro
    index = draw_index(len(data), config.batch_size // copies, number, config.seed, name).repeat_interleave(copies)
    if name != "train":
        return get_images(data, index, run.device)
    change = dict(generator=rng(config.seed, "augment", step, micro), crop=config.crop, flip=config.flip, cutout=config.cutout)
    if not recipe:
        return get_images(data, index, run.device, **change)
    generator = rng(config.seed, "recipe", step, micro)
    if config.resized_crop or config.rand_augment or config.color_jitter:
        change["change_pixels"] = lambda x, mean: change_pixels(x, mean, config, generator)
    x, y = get_images(data, index, run.device, **change)
    return change_batch(x, y, data.num_classes, config, generator)


def micro_batches(data, config, run, name, step):
    """This process's (x, y) of the step's gradient_accumulation_steps micro-batches; the same data for any world."""
    for micro in range(run.rank, config.gradient_accumulation_steps, run.world):
        yield draw(data, config, run, name, step, micro)


def average(tensors, run):
    """The mean of each tensor over all processes, in place; one message."""
    if run.world == 1 or not tensors:
        return
    flat = torch.cat([t.reshape(-1) for t in tensors])
    dist.all_reduce(flat)
    flat /= run.world
    for t, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        t.copy_(mean.view_as(t))


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
    sick = [rank for rank, flag in enumerate(share(not healthy, run)) if flag]
    if sick:
        names = [name for name, p in net.named_parameters() if p.grad is not None and not p.grad.isfinite().all()][:3]
        optimizer.zero_grad(set_to_none=True)
        return fault(f"on rank {', '.join(map(str, sick))} (on rank {run.rank} the loss is {loss.item()}, and the first gradients that are "
                     f"not finite are those of {', '.join(names) or 'none'})", config, state)
    average(grads, run)
    run.scaler.unscale_(optimizer)
    if config.grad_clip:
        if run.world > 1 or run.scaler.is_enabled(): # else it is the norm from above
            norm = torch.nn.utils.get_total_norm(grads)
        torch.nn.utils.clip_grads_with_norm_(params, config.grad_clip, norm)
    run.scaler.step(optimizer)
    run.scaler.update()
    optimizer.zero_grad(set_to_none=True)


def fault(what, config, state):
    """Counts a step that is passed over; FloatingPointError if there were too many."""
    state.skipped += 1
    if state.skipped > config.skip_nonfinite:
        raise FloatingPointError(f"step {state.step}: not finite {what}; try a lower learning_rate or dtype=float32, or pass over up to N "
                                 "such steps by --skip_nonfinite=N")


def train_step(net, forward, optimizer, tokens, config, run, state, lr, arch=()):
    """One step of the weights; returns this process's loss. arch: () or a supernet's third arguments, whose gradients are averaged."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    thirds = [(one,) for one in arch] or [()]
    batches = [(*batch, *third) for batch in micro_batches(tokens, config, run, "train", state.step) for third in thirds]
    loss = backward(forward, batches, run)
    update(net, optimizer, loss, config, run, state)
    return loss


def share(number, run):
    """[the number of every process], the same list on all of them."""
    numbers = torch.zeros(run.world, dtype=torch.float64)
    numbers[run.rank] = number
    if run.world > 1:
        dist.all_reduce(numbers, group=run.control)
    return numbers.tolist()


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


def luma(image):
    """Y of YCbCr as in ITU-R BT.601: (B, 3, H, W) of 0 to 255 -> (B, 1, H, W) of 16 to 235."""
    weights = image.new_tensor([65.481, 128.553, 24.966]).view(3, 1, 1)
    return 16 + (image * weights).sum(1, keepdim=True) / 255


def psnr(a, b):
    """10 log10(255^2 / mean squared error) of images of 0 to 255, in dB; at most 148, for no error."""
    return (20 * math.log10(255) - 10 * (a - b).square().mean().clamp_min(1e-10).log10()).item()


def ssim(a, b):
    """Structural similarity of images (B, C, H, W) of 0 to 255: eq. 13 of Wang et al. 2004 in windows of 11 x 11 that lie inside the
    image, weighted by a Gaussian of deviation 1.5, averaged."""
    t = torch.arange(-5, 6, dtype=a.dtype, device=a.device)
    window = torch.exp(-t.square() / 4.5)
    window = (window / window.sum()).view(1, 1, 11, 1)
    a, b = (x.flatten(0, 1).unsqueeze(1) for x in (a, b)) # (B * C, 1, H, W)
    mean_a, mean_b, aa, bb, ab = (torch.conv2d(torch.conv2d(x, window), window.mT) for x in (a, b, a * a, b * b, a * b))
    c_1, c_2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    likeness = (2 * mean_a * mean_b + c_1) * (2 * (ab - mean_a * mean_b) + c_2)
    return (likeness / ((mean_a ** 2 + mean_b ** 2 + c_1) * (aa - mean_a ** 2 + bb - mean_b ** 2 + c_2))).mean().item()


def fidelity(image, target, border, structure=False):
    """{"psnr_y", "psnr_rgb"} of images (B, 3, H, W) of 0 to 1, in dB, as papers of super-resolution measure it: rounded to 8 bits, without
    `border` pixels at the edges; with structure also {"ssim_y", "ssim_rgb"}."""
    a, b = ((255 * t.cpu().double()).round().clamp(0, 255)[:, :, border:-border, border:-border] for t in (image, target))
    found = {}
    for kind, (c, d) in {"y": (luma(a), luma(b)), "rgb": (a, b)}.items():
        found |= {f"psnr_{kind}": psnr(c, d)} | ({f"ssim_{kind}": ssim(c, d)} if structure else {})
    return found


def quality(data, right):
    """What estimates say besides the loss, from the right answers, or summed PSNR, of one answer in the mean."""
    return {"acc": 100 * right} if isinstance(data, Images) else {"psnr": right} if isinstance(data, Pairs) else {}


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
        total, right, n = (sum(share(t, run)) for t in tally(net, batches(), run))
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
        batches, size = (image_batches if images else blocks)(data, *shape, run.device), math.prod(shape)
    total, right, n = tally(net, tqdm(batches, desc="test", unit="batch", leave=False, total=-(-len(data) // size),
                                      disable=not sys.stderr.isatty()), run).tolist()
    return {"loss": finite(total / n, "the test loss"), **quality(data, right / n)}


def finite(value, what):
    if not math.isfinite(value):
        raise FloatingPointError(f"{what} is {value}: try a lower learning_rate or dtype=float32")
    return value


def split_data(config, run, test):
    """{"train", "val", "test"}: the data of each split that this run has; config gets what the network must know of it."""
    check_range(config, 0, "val_portion", below=1)
    check_range(config, 0, "early_stopping")
    if config.early_stopping and test and not config.val_portion:
        raise SystemExit("early_stopping needs a validation loss: set val_portion, such as --val_portion=0.1.")
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


def save(config, run, name, net, optimizer=None, **rest):
    """A checkpoint, with its hash and how long the logs are at this moment. The one before it becomes ckpt.prev.pt."""
    if optimizer and config.zero_stage:
        optimizer.consolidate_state_dict(to=0)
    if not run.master:
        return
    sizes = {log: os.path.getsize(path) for log in LOGS if os.path.exists(path := os.path.join(config.out_dir, log))}
    checkpoint = {"model": net.state_dict(), "config": vars(config), "logs": sizes, **rest}
    if optimizer:
        checkpoint |= {"optimizer": optimizer.state_dict(), "scaler": run.scaler.state_dict()}
    checkpoint["sha256"] = fingerprint(checkpoint)
    path = os.path.join(config.out_dir, name)
    if name == "ckpt.pt" and os.path.exists(path):
        link = os.path.join(config.out_dir, "ckpt.prev.pt")
        with contextlib.suppress(FileNotFoundError):
            os.remove(link + ".tmp")
        os.link(path, link + ".tmp") # the new name first, so that there is a ckpt.pt at every moment
        os.replace(link + ".tmp", link)
    write(path, lambda f: torch.save(checkpoint, f))


def resume(config, run, net, optimizer, state, arch=None):
    """Puts everything back to the moment of the checkpoint, the logs too; returns the checkpoint. A run that was stopped before
    its first one starts from the beginning, which is the same; then it returns None. arch: that of a training."""
    path = os.path.join(config.out_dir, "ckpt.pt" if config.init_from == "resume" else "ckpt.prev.pt")
    checkpoint = {"logs": {}}
    if os.path.exists(path) or config.init_from == "previous":
        checkpoint = load_checkpoint(path, run.device)
        load_model(net, checkpoint, path)
        check_same(config, checkpoint, path, "weight_optimizer")
        if checkpoint.get("arch") != arch:
            raise SystemExit(f"{path} is of a run of the architecture {checkpoint.get('arch')}, and not of {arch}: name that, or another "
                             "--out_dir.")
        saved = checkpoint["optimizer"] # of its settings, such as the weight decay, those of this command count; every step sets its lr
        groups = [theirs | {key: value for key, value in ours.items() if key not in ("params", "lr")}
                  for theirs, ours in zip(saved["param_groups"], optimizer.param_groups, strict=True)]
        optimizer.load_state_dict(saved | {"param_groups": groups})
        if checkpoint["scaler"]: # of dtype=float16
            run.scaler.load_state_dict(checkpoint["scaler"])
        vars(state).update(checkpoint["state"])
    if run.world > 1:
        dist.barrier()
    if run.master and config.init_from == "previous": # else the next save would put the damaged one in its place
        with open(path, "rb") as whole:
            write(os.path.join(config.out_dir, "ckpt.pt"), lambda f: shutil.copyfileobj(whole, f))
    for log in LOGS if run.master else ():
        if os.path.exists(path := os.path.join(config.out_dir, log)):
            os.truncate(path, checkpoint["logs"].get(log, 0))
    return checkpoint if "model" in checkpoint else None


@contextlib.contextmanager
def signals(run):
    """SIGTERM and SIGINT are noted in run.signal; the same one again ends the process at once."""
    def note(signum, frame):
        if run.signal == signum:
            os._exit(128 + signum)
        run.signal = signum
    before = {signum: signal.signal(signum, note) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def stop_if_told(run, checkpoint, due=False):
    """checkpoint() if it is due on any process; if one got a signal, checkpoint() and the end of all, with 128 + the signal's number."""
    words = [int(word) for word in share(256 * bool(due) + run.signal, run)]
    signum = max(word % 256 for word in words)
    if signum or max(words) >= 256:
        checkpoint()
    if signum:
        if run.master:
            tqdm.write(f"stopped by {signal.Signals(signum).name}, all is saved: go on by --init_from=resume")
        raise SystemExit(128 + signum)
    return max(words) >= 256


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
        if stop_if_told(run, checkpoint, due):
            saved = time.perf_counter()
    log.bar.close()


def train(config, arch=None, test=False):
    """Trains the network of config (a dict), or of arch in config's space; returns what it writes to result.json.

    test: val.bin is kept for one pass at the end, with the best weights, and val_portion of train.bin validates.
    """
    config = SimpleNamespace(**config)
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
    state = SimpleNamespace(step=0, evaluated=-1, stop=False, skipped=0, seconds=0.0, losses={}, best_step=0, best=math.inf, strikes=0)
    if resumes(config):
        resume(config, run, net, optimizer, state, arch)
        path = os.path.join(config.out_dir, "best.pt")
        if os.path.exists(path) and load_checkpoint(path, "cpu")["step"] > state.step: # of steps that are made anew, perhaps otherwise
            state.best, state.evaluated = math.inf, min(state.evaluated, config.max_iters - 1)
        state.stop = bool(config.early_stopping) and state.strikes >= config.early_stopping
    begin(config, run)
    forward = torch.compile(net) if config.compile else net
    sample = "a sequence" if config.space == "gpt" else "an image"

    def step(lr):
        net.progress = state.step / config.max_iters # some regularisation grows with it
        return train_step(net, forward, optimizer, splits["train"], config, run, state, lr)

    def evaluation():
        evaluate(net, forward, splits, config, run, state, log)
        if state.best_step == state.step:
            save(config, run, "best.pt", net, arch=arch, step=state.step, losses=state.losses)
        return config.early_stopping and state.strikes >= config.early_stopping

    def checkpoint():
        save(config, run, "ckpt.pt", net, optimizer, arch=arch, state=vars(state))

    with Log(config, run, state.step) as log:
        log(f"{cost['params']:,} parameters, {cost['flops'] / 1e9:.3g} GFLOPs {sample}, on {run.device} in {run.dtype}", **cost)
        with signals(run):
            loop(config, run, state, log, cost["flops"], step, evaluation, checkpoint)
        return finish(net, splits, config, run, state, cost, arch, log)


@contextlib.contextmanager
def aside():
    """For a training inside an evaluation: nothing printed, and PyTorch's generator, which it seeds, put back. An agent that draws
    its actions from the same generator would repeat itself."""
    quiet = io.StringIO()
    with torch.random.fork_rng(), contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        yield


def evaluate(net, forward, splits, config, run, state, log):
    """Logs the loss, and of images the accuracy or PSNR, of train and val, and counts in state how long the best of val has stood.
    Without validation data the newest weights are the best that can be told."""
    calibrate(net, forward, splits["train"], config, run)
    losses = {f"{name}_{key}": value for name, data in splits.items() if name != "test"
              for key, value in estimate(forward, data, config, run, name).items()}
    best = best_key(losses)
    score = -losses[best] if best else losses.get("val_loss", -state.step)
    state.losses, state.strikes = losses, 0 if score < state.best else state.strikes + 1
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


def main(function, config):
    """Runs a script's function; a number that is not finite, or the end of another process, ends it with a sentence, and Ctrl-C without
    one."""
    try:
        function(config)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except FloatingPointError as e:
        raise SystemExit(str(e)) from None
    except RuntimeError as e:
        if "gloo" not in str(e): # which has no error of its own
            raise
        raise SystemExit("Another process has ended, or not answered for timeout_minutes; if it has ended, it has said why.") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    from configurator import configure
    main(train, configure(with_space(globals()), list_hint="train.py trains one network, train_search.py searches over a list of sizes"))
