"""What every run shares: processes, device, out_dir, log, checkpoints, resume, signals."""
import torch
from pathlib import Path
from types import SimpleNamespace
import contextlib
import torch.distributed as dist
import hashlib
import io
import json
import math
import numpy as np
import os
import re
import shutil
import signal
import subprocess
from contextlib import suppress
import sys
import time
from datetime import timedelta
from tqdm import tqdm
from configurator import as_list


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


def atomic_write(path, save):
    """save(file) into a temporary file, then rename: path is there whole or not at all. SystemExit if the disk says no."""
    tmp = f"{path}.tmp"
    try:
        with open(tmp, "wb") as f:
            save(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        raise SystemExit(f"{path} cannot be written ({getattr(error, 'strerror', None) or 'the disk is full?'}): "
                         "make room or choose another folder; what was there before is whole") from None
    finally:
        with suppress(OSError):  # of a whole one the name is gone
            os.remove(tmp)


def add_checksum(data):
    """data with the hash of its content: unseal() then tells a changed file from the one that was written."""
    return {**data, "sha256": hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()}


def verify_checksum(data, path):
    """data without its seal; SystemExit if it is no object or the seal is wrong. A file without one is taken as written by hand."""
    if not isinstance(data, dict):
        raise SystemExit(f"{path} is damaged: it holds {str(data)[:40]!r} where a JSON object is expected")
    content = {key: value for key, value in data.items() if key != "sha256"}
    renamed = any(re.fullmatch("[0-9a-f]{64}", str(value)) and not key.endswith("_sha256") for key, value in content.items())
    if renamed or ("sha256" in data and add_checksum(content) != data):
        raise SystemExit(f"{path} is not what was written: take an undamaged copy, or remove its \"sha256\" if you changed it yourself")
    return content


def write_json(path, data):
    atomic_write(path, lambda f: f.write(json.dumps(add_checksum(data), indent=2).encode()))


def read_json(path):
    """The object in a file of write_json(), or one written by hand. SystemExit if it is missing or damaged."""
    try:
        data = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise SystemExit(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise SystemExit(f"{path} is damaged, it is not JSON: {error}") from None
    return verify_checksum(data, path)


def rng(*keys):
    """A generator that the keys alone decide, such as rng(seed, "train", step): nothing needs saving for an exact resume."""
    digest = hashlib.sha256(repr(keys).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LOGS = ("log.jsonl", "arch_traj.jsonl")
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "L40S": 362e12, "4090": 165e12, "V100": 112e12} # dense 16 bit


def setup(config):
    """Joins torchrun's processes, seeds, and checks the numbers and out_dir.

    Returns the run: rank, world, master (rank 0), device, device_type, dtype, amp (a context), scaler, control, signal (that arrived).
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
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
    check_resumable(config, run)
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


def check_resumable(config, run):
    """SystemExit if out_dir holds a run that would be lost, or none to go on with."""
    held = os.path.exists(os.path.join(config.out_dir, "run.json"))
    if resumes(config) and not held:
        raise SystemExit(f"out_dir={config.out_dir} holds no run to resume: leave out --init_from, or name the run's --out_dir.")
    if not resumes(config) and held and not config.overwrite:
        raise SystemExit(f"out_dir={config.out_dir} holds another run: choose another --out_dir, go on with it by "
                         "--init_from=resume, or replace it by --overwrite=True.")
    if run.world > 1:
        dist.barrier() # every rank has looked before rank 0 writes


def init_out_dir(config, run):
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


def content_hash(value):
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
        whole = checkpoint.pop("sha256") == content_hash(checkpoint)
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


def check_same_network(config, checkpoint, path, keys, must=()):
    """SystemExit where a run would go on as another network, of which the shapes need not tell: a forgotten --norm or --n_head has the
    same. keys: those of the network; must: others that must be what they were."""
    for key in (*must, *sorted(keys & vars(config).keys())): # agents have a few of them
        ours = getattr(config, key)
        theirs = checkpoint["config"].get(key, None if key in must else ours) # older runs had fewer
        if as_list(theirs) != as_list(ours):
            raise SystemExit(f"{path} is of a run with {key}={theirs}, and this one has {key}={ours}: it goes on with what it began with.")


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
    checkpoint["sha256"] = content_hash(checkpoint)
    path = os.path.join(config.out_dir, name)
    if name == "ckpt.pt" and os.path.exists(path):
        link = os.path.join(config.out_dir, "ckpt.prev.pt")
        with contextlib.suppress(FileNotFoundError):
            os.remove(link + ".tmp")
        os.link(path, link + ".tmp") # the new name first, so that there is a ckpt.pt at every moment
        os.replace(link + ".tmp", link)
    atomic_write(path, lambda f: torch.save(checkpoint, f))


def resume(config, run, net, optimizer, state, keys, arch=None):
    """Puts everything back to the moment of the checkpoint, the logs too; returns the checkpoint. A run that was stopped before
    its first one starts from the beginning, which is the same; then it returns None. arch: that of a training."""
    path = os.path.join(config.out_dir, "ckpt.pt" if config.init_from == "resume" else "ckpt.prev.pt")
    checkpoint = {"logs": {}}
    if os.path.exists(path) or config.init_from == "previous":
        checkpoint = load_checkpoint(path, run.device)
        load_model(net, checkpoint, path)
        check_same_network(config, checkpoint, path, keys, ("weight_optimizer",))
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
            atomic_write(os.path.join(config.out_dir, "ckpt.pt"), lambda f: shutil.copyfileobj(whole, f))
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


def stop_if_signaled(run, checkpoint, due=False):
    """checkpoint() if it is due on any process; if one got a signal, checkpoint() and the end of all, with 128 + the signal's number."""
    words = [int(word) for word in all_gather_scalar(256 * bool(due) + run.signal, run)]
    signum = max(word % 256 for word in words)
    if signum or max(words) >= 256:
        checkpoint()
    if signum:
        if run.master:
            tqdm.write(f"stopped by {signal.Signals(signum).name}, all is saved: go on by --init_from=resume")
        raise SystemExit(128 + signum)
    return max(words) >= 256


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
        all_reduce_mean([loss], self.run)
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


def all_reduce_mean(tensors, run):
    """The mean of each tensor over all processes, in place; one message."""
    if run.world == 1 or not tensors:
        return
    flat = torch.cat([t.reshape(-1) for t in tensors])
    dist.all_reduce(flat)
    flat /= run.world
    for t, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        t.copy_(mean.view_as(t))


def all_gather_scalar(number, run):
    """[the number of every process], the same list on all of them."""
    numbers = torch.zeros(run.world, dtype=torch.float64)
    numbers[run.rank] = number
    if run.world > 1:
        dist.all_reduce(numbers, group=run.control)
    return numbers.tolist()


def fault(what, config, state):
    """Counts a step that is passed over; FloatingPointError if there were too many."""
    state.skipped += 1
    if state.skipped > config.skip_nonfinite:
        raise FloatingPointError(f"step {state.step}: not finite {what}; try a lower learning_rate or dtype=float32, or pass over up to N "
                                 "such steps by --skip_nonfinite=N")


def finite(value, what):
    if not math.isfinite(value):
        raise FloatingPointError(f"{what} is {value}: try a lower learning_rate or dtype=float32")
    return value


def draw_figures(out_dir):
    """Runs analyze.py on the run in out_dir and prints where its figures are; on rank 0 alone."""
    if os.environ.get("RANK", "0") == "0":
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "analyze.py")
        command = [sys.executable, script, f"--out_dir={out_dir}"]
        output = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True).stdout
        print("\n".join(line for line in output.splitlines() if line.startswith("figure: ")))


@contextlib.contextmanager
def silenced():
    """For a training inside an evaluation: nothing printed, and PyTorch's generator, which it seeds, put back. An agent that draws
    its actions from the same generator would repeat itself."""
    quiet = io.StringIO()
    with torch.random.fork_rng(), contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        yield


def main(function, config):
    """Runs a script's function; a number that is not finite, or the end of another process, ends it with a sentence, and Ctrl-C without
    one."""
    try:
        return function(config)
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
