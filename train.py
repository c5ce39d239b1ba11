"""
Trains a GPT of fixed sizes on prepared data; its functions also run the searches and train_base.py.

    python train.py config/train_pydocs.py                      # a laptop, some minutes
    python train.py config/train_gpt2.py                        # one GPU
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py               # one node of 8 GPUs
    torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=10.0.0.1 --master_port=1234 train.py config/train_gpt2.py
    torchrun --nproc_per_node=8 --nnodes=2 --node_rank=1 --master_addr=10.0.0.1 --master_port=1234 train.py config/train_gpt2.py
    python train.py --help                                      # every key with its default

Writes to out_dir: run.json (what was run), log.jsonl (one object a printed line), ckpt.pt (the newest state),
best.pt (the weights of the lowest validation loss) and result.json.
"""
import contextlib
import hashlib
import inspect
import json
import math
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from model import build
from prepare import blocks, check_length, get_batch, load_meta, load_tokens, prepare

# -----------------------------------------------------------------------------
# I/O
out_dir = 'out/train'
overwrite = False # start anew in an out_dir that holds a run, and replace its files
eval_interval = 250
log_interval = 10
eval_iters = 20 # batches an evaluation
init_from = 'scratch' # 'scratch' or 'resume'
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
# model
n_layer = 4
n_head = 4
n_embd = 128
mlp_ratio = 4.0
head_size = 0 # channels a head; 0: n_embd / n_head
dropout = 0.0
bias = False
# optimizer
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
early_stopping = 0 # stop after so many evaluations without a lower validation loss; 0: never
# system
seed = 1337
backend = '' # of torchrun's processes: '' is nccl on cuda and gloo elsewhere
device = 'auto' # 'cpu', 'cuda', 'cuda:1', 'mps'; auto: the fastest there is
dtype = 'auto' # 'float32', 'bfloat16', 'float16'; auto: bfloat16 where cuda has it, float16 on older cuda, else float32
compile = False # torch.compile: a minute or two at the start, faster from then on
# -----------------------------------------------------------------------------

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "L40S": 362e12, "4090": 165e12, "V100": 112e12} # dense 16 bit


def setup(config):
    """Joins torchrun's processes, seeds, and checks out_dir.

    Returns the run: rank, world, master (rank 0), device, device_type, amp (a context), scaler.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if config.gradient_accumulation_steps % world:
        raise SystemExit(f"gradient_accumulation_steps={config.gradient_accumulation_steps} does not divide over {world} processes: "
                         f"make it a multiple of {world}.")
    device = pick_device(config.device)
    device_type = device.split(":")[0]
    if world > 1:
        if device_type == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        dist.init_process_group(config.backend or ("nccl" if device_type == "cuda" else "gloo"))
    torch.manual_seed(config.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    dtype = pick_dtype(config.dtype, device_type)
    amp = contextlib.nullcontext() if dtype == "float32" else torch.amp.autocast(device_type, DTYPES[dtype])
    scaler = torch.amp.GradScaler(device_type, enabled=dtype == "float16")
    run = SimpleNamespace(rank=rank, world=world, master=rank == 0, device=device, device_type=device_type, dtype=dtype, amp=amp,
                          scaler=scaler)
    check_out_dir(config, run)
    return run


def pick_device(device):
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(device.split(":")[0]):
        raise SystemExit(f"device='{device}' is not on this machine: use one of {', '.join(d for d in there if there[d])}, or auto.")
    return device


def pick_dtype(dtype, device_type):
    if dtype == "auto":
        return "float32" if device_type != "cuda" else "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    if dtype not in DTYPES:
        raise SystemExit(f"dtype='{dtype}' is not one of {', '.join(DTYPES)} or auto.")
    return dtype


def check_out_dir(config, run):
    """SystemExit if out_dir holds a run that would be lost, or none to go on with."""
    if config.init_from not in ("scratch", "resume"):
        raise SystemExit(f"init_from='{config.init_from}' is not 'scratch' or 'resume'.")
    held = os.path.exists(os.path.join(config.out_dir, "run.json"))
    if config.init_from == "resume" and not held:
        raise SystemExit(f"out_dir={config.out_dir} holds no run to resume: leave out --init_from, or name the run's --out_dir.")
    if config.init_from == "scratch" and held and not config.overwrite:
        raise SystemExit(f"out_dir={config.out_dir} holds another run: choose another --out_dir, go on with it by "
                         "--init_from=resume, or replace it by --overwrite=True.")
    if run.world > 1:
        dist.barrier() # every rank has looked before rank 0 writes


def begin(config, run):
    """Makes out_dir and writes run.json: the data and the network are there, what follows is work that must not be lost."""
    if not run.master or config.init_from == "resume":
        return
    os.makedirs(config.out_dir, exist_ok=True)
    for name in ("log.jsonl", "arch_traj.jsonl", "arch.json", "result.json", "ckpt.pt", "best.pt"):
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(config.out_dir, name))
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=os.path.dirname(os.path.abspath(__file__)))
    write_json(os.path.join(config.out_dir, "run.json"), {
        "argv": sys.argv, "config": vars(config), "commit": git.stdout.strip(), "seed": config.seed, "world": run.world,
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__},
        "device": torch.cuda.get_device_name(run.device) if run.device_type == "cuda" else run.device, "dtype": run.dtype})


def write(path, save):
    """save(temporary path), then rename: the file is there whole or not at all."""
    save(path + ".tmp")
    os.replace(path + ".tmp", path)


def write_json(path, data):
    def save(tmp):
        with open(tmp, "w") as f:
            json.dump(data, f, indent=2)
    write(path, save)


def read_json(path, what):
    """The object in a JSON file; SystemExit if it is missing or damaged. what: the file's name in the message."""
    try:
        with open(path) as f:
            data = json.load(f)
    except OSError as e:
        raise SystemExit(f"{what} {path} cannot be read: {e.strerror}.") from None
    except ValueError as e: # json and utf-8 errors
        raise SystemExit(f"{what} {path} is damaged, not JSON: {e}.") from None
    if not isinstance(data, dict):
        raise SystemExit(f"{what} {path} is damaged: it holds {str(data)[:40]!r} where an object is expected.")
    return data


def load_checkpoint(path, device):
    """The dict in a checkpoint. Nothing is unpickled that could run code; SystemExit if it is missing or damaged."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise SystemExit(f"There is no checkpoint {path}: name the out_dir of a run that has saved one.") from None
    except Exception as e: # torch.load raises whatever the damaged bytes lead it to
        raise SystemExit(f"The checkpoint {path} is damaged or not a checkpoint ({type(e).__name__}): take another.") from None


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


def rng(*keys):
    """A generator that the keys alone decide, such as rng(seed, "train", step): nothing needs saving for an exact resume."""
    digest = hashlib.sha256(repr(keys).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class Log:
    """Lines to the terminal below a progress bar, the same as objects to log.jsonl, and to wandb and TensorBoard if asked for."""
    def __init__(self, config, run, start=0):
        self.config, self.run, self.wandb, self.board = config, run, None, None
        self.bar = tqdm(total=config.max_iters, initial=start, unit="step", leave=False, disable=not run.master or not sys.stderr.isatty())
        try:
            if run.master and config.wandb_log:
                import wandb
                self.wandb = wandb.init(project=config.wandb_project, name=config.out_dir, config=vars(config))
            if run.master and config.tensorboard:
                from torch.utils.tensorboard import SummaryWriter
                self.board = SummaryWriter(config.out_dir)
        except ImportError as e:
            raise SystemExit(f"wandb_log={config.wandb_log} and tensorboard={config.tensorboard} need packages of their own ({e}): "
                             "pip install wandb tensorboard, or leave them off.") from None

    def __call__(self, line, **values):
        if not self.run.master:
            return
        if line:
            tqdm.write(line)
        with open(os.path.join(self.config.out_dir, "log.jsonl"), "a") as f:
            f.write(json.dumps(values) + "\n")
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float)}
        if self.wandb:
            self.wandb.log(numbers)
        if self.board:
            for k, v in numbers.items():
                self.board.add_scalar(k, v, values.get("step", 0))

    def step(self, step, loss, lr, clock, steps, flops, **extra):
        """The line of a training step. loss: this process's, a tensor; clock: when the last `steps` steps began; flops: forward,
        of one sequence. extra: more values of the line."""
        loss = loss.detach().clone().reshape(1)
        average([loss], self.run)
        loss = finite(loss.item(), "the training loss")
        ms = (time.perf_counter() - clock) / steps * 1000
        sequences = self.config.batch_size * self.config.gradient_accumulation_steps
        speed = sequences * self.config.block_size / ms * 1000
        values = {"step": step, "loss": loss, "lr": lr, "ms": ms, "tokens_per_s": speed}
        line = f"step {step}/{self.config.max_iters} | loss {loss:.4f} | lr {lr:.2e} | {ms:.1f} ms | {speed:,.0f} tok/s"
        name = torch.cuda.get_device_name() if self.run.device_type == "cuda" else ""
        for peak in (peak for card, peak in PEAK_FLOPS.items() if card in name):
            values["mfu"] = 3 * flops * sequences / ms * 1000 / peak / self.run.world # backward costs two forwards
            line += f" | mfu {100 * values['mfu']:.1f}%"
        self(line + "".join(f" | {key} {value}" for key, value in extra.items()), **values)


def get_lr(step, config):
    """Linear warmup, cosine decay to min_lr, min_lr from then on."""
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    end = config.lr_decay_iters or config.max_iters
    if not config.decay_lr or end <= config.warmup_iters:
        return config.learning_rate
    ratio = min(1.0, (step - config.warmup_iters) / (end - config.warmup_iters))
    return config.min_lr + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (config.learning_rate - config.min_lr)


def configure_optimizer(net, config, device_type):
    """AdamW over the network's parameters; those of two or more dimensions decay, biases and norms do not."""
    params = list(net.parameters())
    groups = [{"params": [p for p in params if p.dim() >= 2], "weight_decay": config.weight_decay},
              {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}]
    fused = {"fused": True} if device_type == "cuda" and "fused" in inspect.signature(torch.optim.AdamW).parameters else {}
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), **fused)


def load_data(config, run):
    """The tokens of train.bin and of val.bin, and the vocabulary's size for the network."""
    meta = os.path.join(config.data_dir, config.dataset, "meta.json")
    if config.dataset == "pydocs" and run.master and not os.path.exists(meta): # needs no network: made at first use
        prepare(dataset="pydocs", data_dir=config.data_dir)
    if run.world > 1:
        dist.barrier()
    size = load_meta(config.data_dir, config.dataset)["vocab_size"]
    train, val = (load_tokens(config.data_dir, config.dataset, split) for split in ("train", "val"))
    return train, val, size if size < 1000 else -(-size // 64) * 64 # large ones in multiples of 64, for speed


def micro_batches(tokens, config, run, *keys):
    """This process's (x, y) of the gradient_accumulation_steps micro-batches that the keys name; the same data for any world."""
    for micro in range(run.rank, config.gradient_accumulation_steps, run.world):
        yield get_batch(tokens, config.batch_size, config.block_size, rng(config.seed, *keys, micro), run.device)


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
    """Adds the gradient of the mean loss over this process's micro-batches to .grad; returns that loss, a tensor."""
    total, batches = 0.0, list(batches)
    for x, y in batches:
        with run.amp:
            loss = net(x, y, *arch)[1] / len(batches)
        run.scaler.scale(loss).backward()
        total = total + loss.detach()
    return total


def update(net, optimizer, config, run):
    """One step of the weights on .grad, averaged over the processes and clipped."""
    average([p.grad for p in net.parameters() if p.grad is not None], run)
    run.scaler.unscale_(optimizer)
    if config.grad_clip:
        torch.nn.utils.clip_grad_norm_(net.parameters(), config.grad_clip)
    run.scaler.step(optimizer)
    run.scaler.update()
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def estimate_loss(net, tokens, config, run, name, arch_of=None):
    """The mean loss over eval_iters batches of tokens, always the same ones, shared between the processes. A float; RuntimeError
    if it is not finite. arch_of(i): a supernet's third argument for batch i."""
    training = net.training
    net.eval()
    total = torch.zeros(1, dtype=torch.float64)
    for i in range(run.rank, config.eval_iters, run.world):
        x, y = get_batch(tokens, config.batch_size, config.block_size, rng(config.seed, "eval", name, i), run.device)
        with run.amp:
            total += net(x, y, *([arch_of(i)] if arch_of else []))[1].cpu().double()
    net.train(training)
    total = total.to(run.device) if run.device_type == "cuda" else total
    if run.world > 1:
        dist.all_reduce(total)
    return finite(total.item() / config.eval_iters, f"the {name} loss")


@torch.no_grad()
def full_loss(net, tokens, config, run):
    """The mean loss over every token of a split, each predicted once, in blocks without overlap. A float."""
    net.eval()
    total, count = 0.0, 0
    for x, y in tqdm(blocks(tokens, config.batch_size, config.block_size, run.device), desc="test", unit="batch", leave=False,
                     total=-(-(len(tokens) - 1) // (config.batch_size * config.block_size)), disable=not sys.stderr.isatty()):
        n = (y >= 0).sum().item()
        with run.amp:
            total, count = total + net(x, y)[1].item() * n, count + n
    return finite(total / count, "the test loss")


def finite(value, what):
    if not math.isfinite(value):
        raise RuntimeError(f"{what} is {value}: try a lower learning_rate, or dtype=float32")
    return value


def split_data(config, run, test):
    """{"train", "val", "test"}: the tokens of each split that this run has, and the network's vocabulary size."""
    if not 0 <= config.val_portion < 1:
        raise SystemExit(f"val_portion={config.val_portion} must be at least 0 and below 1.")
    if config.early_stopping and test and not config.val_portion:
        raise SystemExit("early_stopping needs a validation loss: set val_portion, such as --val_portion=0.1.")
    train, val, vocab_size = load_data(config, run)
    cut = len(train) - int(config.val_portion * len(train))
    splits = {"train": train[:cut]}
    if config.val_portion:
        splits["val"] = train[cut:]
    elif not test:
        splits["val"] = val
    if test:
        splits["test"] = val
    for name, tokens in splits.items():
        check_length(tokens, config.block_size, f"the {name} split of {config.dataset}")
    return splits, vocab_size


def save(config, name, net, **rest):
    """A checkpoint, with how long the logs are at this moment."""
    paths = {log: os.path.join(config.out_dir, log) for log in ("log.jsonl", "arch_traj.jsonl")}
    logs = {log: os.path.getsize(path) for log, path in paths.items() if os.path.exists(path)}
    checkpoint = {"model": net.state_dict(), "config": vars(config), "logs": logs, **rest}
    write(os.path.join(config.out_dir, name), lambda tmp: torch.save(checkpoint, tmp))


def resume(config, run, net, optimizer, state):
    """Puts everything back to the moment of ckpt.pt, the logs too; returns the checkpoint."""
    path = os.path.join(config.out_dir, "ckpt.pt")
    checkpoint = load_checkpoint(path, run.device)
    load_model(net, checkpoint, path)
    optimizer.load_state_dict(checkpoint["optimizer"])
    run.scaler.load_state_dict(checkpoint["scaler"])
    vars(state).update(checkpoint["state"])
    for log, size in checkpoint["logs"].items() if run.master else ():
        os.truncate(os.path.join(config.out_dir, log), size)
    return checkpoint


def train(config, arch=None, test=False):
    """Trains the network of config (a dict), or of arch in config's space; returns what it writes to result.json.

    test: val.bin is kept for one pass at the end, with the best weights, and val_portion of train.bin validates.
    """
    config = SimpleNamespace(**config)
    run = setup(config)
    splits, config.vocab_size = split_data(config, run, test)
    net = build(vars(config), arch).to(run.device)
    cost, optimizer = net.cost(), configure_optimizer(net, config, run.device_type)
    state = SimpleNamespace(step=0, evaluated=-1, losses={}, best_step=0, best_loss=math.inf, strikes=0, seconds=0.0)
    if config.init_from == "resume":
        resume(config, run, net, optimizer, state)
    begin(config, run)
    forward = torch.compile(net) if config.compile else net
    log = Log(config, run, state.step)
    log(f"{cost['params']:,} parameters, {cost['flops'] / 1e9:.2f} GFLOPs a sequence, on {run.device} in {run.dtype}", **cost)

    clock, timed = time.perf_counter(), 0
    while True:
        done = state.step == config.max_iters
        if (state.step % config.eval_interval == 0 or done) and state.evaluated < state.step:
            state.seconds += time.perf_counter() - clock
            evaluate(forward, splits, config, run, state, log)
            if run.master:
                if state.best_step == state.step:
                    save(config, "best.pt", net, arch=arch, step=state.step, losses=state.losses)
                save(config, "ckpt.pt", net, arch=arch, optimizer=optimizer.state_dict(), scaler=run.scaler.state_dict(), state=vars(state))
            clock, timed = time.perf_counter(), 0
        if done or (config.early_stopping and state.strikes >= config.early_stopping):
            break
        for group in optimizer.param_groups:
            group["lr"] = get_lr(state.step, config)
        torch.manual_seed(rng(config.seed, "dropout", state.step, run.rank).initial_seed())
        loss = backward(forward, micro_batches(splits["train"], config, run, "train", state.step), run)
        update(net, optimizer, config, run)
        state.step, timed = state.step + 1, timed + 1
        log.bar.update()
        if state.step % config.log_interval == 0:
            log.step(state.step, loss, group["lr"], clock, timed, cost["flops"])
            state.seconds += time.perf_counter() - clock
            clock, timed = time.perf_counter(), 0
    log.bar.close()
    return finish(net, splits, config, run, state, cost, arch, log)


def evaluate(net, splits, config, run, state, log):
    """Logs the loss of train and val, and counts in state how long the best has stood. Without validation data the newest
    weights are the best that can be told."""
    losses = {f"{name}_loss": estimate_loss(net, tokens, config, run, name) for name, tokens in splits.items() if name != "test"}
    loss = losses.get("val_loss", -state.step)
    state.evaluated, state.losses = state.step, losses
    state.strikes = 0 if loss < state.best_loss else state.strikes + 1
    if loss < state.best_loss:
        state.best_loss, state.best_step = loss, state.step
    log(" | ".join([f"step {state.step}/{config.max_iters}", *(f"{key} {value:.4f}" for key, value in losses.items())]),
        step=state.step, **losses)


def finish(net, splits, config, run, state, cost, arch, log):
    """The test loss of the best weights, if a test split was kept, and result.json."""
    result = {"out_dir": config.out_dir, "arch": arch, **cost, "steps": state.step, "seconds": state.seconds,
              "best_step": state.best_step, **state.losses}
    if "val_loss" in state.losses:
        result["best_val_loss"] = state.best_loss
    if run.world > 1:
        dist.barrier() # best.pt is written
    if "test" in splits:
        path = os.path.join(config.out_dir, "best.pt")
        load_model(net, load_checkpoint(path, run.device), path)
        result["test_loss"] = full_loss(net, splits["test"], config, run)
        log(f"test loss {result['test_loss']:.4f} on all {len(splits['test']):,} tokens of val.bin, weights of step {state.best_step}",
            step=state.step, test_loss=result["test_loss"])
    if run.master:
        write_json(os.path.join(config.out_dir, "result.json"), result)
        print(f"next: python sample.py --out_dir={config.out_dir}")
    if run.world > 1:
        dist.destroy_process_group()
    return result


if __name__ == "__main__":
    from configurator import configure
    train(configure(globals(), list_hint="train.py trains one network, train_search.py searches over a list of sizes"))
