"""
What every run shares: files, out_dir, processes, checkpoints, resume, signals and the log.

A run is described by its config, a SimpleNamespace of the script's keys. It lives in
config.out_dir: run.json says what was started, log.jsonl has one object a printed line, ckpt.pt is
the newest state and ckpt.prev.pt the one before it. Every file is written under a temporary name
and renamed, so it is there whole or not at all. run.lock is empty, and locked while a run lasts.
Knows nothing of networks or data.
"""
import contextlib
import hashlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
import weakref
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from configurator import ConfigError, as_list, given

try:
    import fcntl
except ImportError: # Windows has no such locks
    fcntl = None

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LOGS = ("log.jsonl", "arch_traj.jsonl") # a checkpoint remembers how long they were
RUN_FILES = (*LOGS, "arch_search.jsonl", "pareto.json", "arch.json", "result.json",
             "ckpt.pt", "ckpt.prev.pt", "best.pt")
TRAINERS = ("train.py", "train_search.py", "train_base.py", "train_rl.py")
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "L40S": 362e12, "4090": 165e12,
              "V100": 112e12} # dense 16 bit, a second
LOCKS = weakref.WeakValueDictionary() # of this process: {path: the open file that is locked}

# -----------------------------------------------------------------------------
# randomness

def rng(*keys):
    """A torch.Generator that the keys alone decide, such as rng(seed, "train", step).

    Everything random in a run is drawn from one of these, so an exact resume has no random state
    to restore.
    """
    digest = hashlib.sha256(repr(keys).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)

# -----------------------------------------------------------------------------
# files

def atomic_write(path, save):
    """save(file) into a temporary file, then rename. SystemExit if the disk says no."""
    tmp = f"{path}.tmp"
    try:
        with open(tmp, "wb") as f:
            save(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except (OSError, RuntimeError) as error: # torch.save turns a full disk into a RuntimeError
        reason = getattr(error, "strerror", None) or "the disk is full?"
        raise SystemExit(f"{path} cannot be written ({reason}): make room or choose another "
                         "folder; what was there before is whole") from None
    finally:
        with contextlib.suppress(OSError): # after the rename there is none
            os.remove(tmp)


def atomic_copy(path, target):
    """Makes target a copy of the file at path, whole or not at all."""
    with open(path, "rb") as source:
        atomic_write(target, lambda f: shutil.copyfileobj(source, f))


def add_checksum(data):
    """data with the hash of its content, which verify_checksum() compares."""
    content = json.dumps(data, sort_keys=True).encode()
    return {**data, "sha256": hashlib.sha256(content).hexdigest()}


def verify_checksum(data, path):
    """data without its checksum. A file without one counts as written by hand.

    SystemExit if data is no object, or its content is not what was written.
    """
    if not isinstance(data, dict):
        raise SystemExit(f"{path} is damaged: it holds {str(data)[:40]!r} where a JSON object is "
                         "expected")
    content = {key: value for key, value in data.items() if key != "sha256"}
    # a damaged key can hide the checksum under another name
    renamed = any(re.fullmatch("[0-9a-f]{64}", str(value)) and not key.endswith("_sha256")
                  for key, value in content.items())
    if renamed or ("sha256" in data and add_checksum(content) != data):
        raise SystemExit(f"{path} is not what was written: take an undamaged copy, or remove its "
                         "\"sha256\" if you changed it yourself")
    return content


def write_json(path, data):
    atomic_write(path, lambda f: f.write(json.dumps(add_checksum(data), indent=2).encode()))


def read_json(path):
    """The object in a file of write_json(), or in one written by hand.

    SystemExit if the file is missing or damaged.
    """
    try:
        data = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise SystemExit(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise SystemExit(f"{path} is damaged, it is not JSON ({error}): take an undamaged "
                         "copy") from None
    return verify_checksum(data, path)


def append(path, data):
    """Adds one line of JSON to a log."""
    try:
        with open(path, "a") as f:
            f.write(json.dumps(data) + "\n")
    except OSError as e:
        raise SystemExit(f"{path} cannot be written ({e.strerror}): make room; the run goes on "
                         "from its last checkpoint by --init_from=resume.") from None


def read_lines(path):
    """The objects of a .jsonl file, a list of dicts.

    A last line that was cut off by a kill is left out. SystemExit on other damage.
    """
    try:
        with open(path, "rb") as f:
            lines = f.read().split(b"\n")
    except OSError as e:
        raise SystemExit(f"{path} cannot be read: {e.strerror}; name the out_dir of a "
                         "run.") from None
    found = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except ValueError: # not JSON, or not UTF-8
            if number == len(lines): # what follows the last newline: nothing, or a part of a line
                break
            value = None
        if not isinstance(value, dict):
            raise SystemExit(f"{path} is damaged: its line {number} is not a JSON object; mend or "
                             "delete that line.")
        found.append(value)
    return found

# -----------------------------------------------------------------------------
# processes and devices

@dataclass
class Run:
    """This process's part of a run. amp: the autocast context. signal: the number that arrived.
    keys: those of the command, {key: value}, which the run may change as it goes on."""
    rank: int
    world: int
    device: str
    device_type: str
    dtype: str
    amp: object
    scaler: object
    control: object # process group of the CPUs: no GPU waits for a flag
    signal: int = 0
    lock: object = None # of out_dir, as long as this Run is in use
    keys: dict = field(default_factory=dict)

    @property
    def master(self):
        return self.rank == 0


def setup(config):
    """Joins torchrun's processes, seeds PyTorch, checks out_dir; returns the Run."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if config.gradient_accumulation_steps % world:
        raise SystemExit(f"gradient_accumulation_steps={config.gradient_accumulation_steps} does "
                         f"not divide over {world} processes: make it a multiple of {world}.")
    if config.zero_stage not in (0, 1) or (config.zero_stage and world == 1):
        raise SystemExit(f"zero_stage={config.zero_stage} is not 0, or 1 with several processes "
                         f"(here: {world}), started by torchrun.")
    device = pick_device(config.device)
    device_type = device.split(":")[0]
    timeout, control = timedelta(minutes=config.timeout_minutes), None
    if world > 1:
        if device_type == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        if not dist.is_initialized(): # an earlier run in this process may have done so
            default = "nccl" if device_type == "cuda" else "gloo"
            dist.init_process_group(config.backend or default, timeout=timeout)
        control = dist.new_group(backend="gloo", timeout=timeout)
    torch.manual_seed(config.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    dtype = pick_dtype(config.dtype, device_type)
    amp = contextlib.nullcontext()
    if dtype != "float32":
        amp = torch.amp.autocast(device_type, DTYPES[dtype])
    scaler = torch.amp.GradScaler(device_type, enabled=dtype == "float16")
    run = Run(rank, world, device, device_type, dtype, amp, scaler, control)
    check_resumable(config)
    if world > 1:
        dist.barrier() # every rank has looked before rank 0 writes
    run.keys = dict(vars(config))
    return run


def pick_device(device):
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if device == "auto":
        return "cuda" if cuda else "mps" if mps else "cpu"
    allowed = ["cpu"]
    if cuda:
        allowed += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if mps:
        allowed.append("mps")
    if device not in allowed:
        raise SystemExit(f"device='{device}' is not on this machine: use one of "
                         f"{', '.join(allowed)}, or auto.")
    return device


def pick_dtype(dtype, device_type):
    if dtype == "auto":
        if device_type != "cuda":
            return "float32"
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    if dtype not in DTYPES:
        raise SystemExit(f"dtype='{dtype}' is not one of {', '.join(DTYPES)} or auto.")
    return dtype


def all_reduce_mean(tensors, run):
    """The mean of each tensor over all processes, in place, in one message."""
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

# -----------------------------------------------------------------------------
# out_dir

def is_resuming(config):
    return config.init_from in ("resume", "previous")


def is_pretrained(init_from):
    """Whether init_from names weights to start with."""
    return init_from not in ("scratch", "resume", "previous")


def original_init_from(config):
    """The original init_from, also when resuming before the first checkpoint."""
    first = os.path.join(config.out_dir, "ckpt.pt")
    if config.init_from != "resume" or os.path.exists(first):
        return config.init_from
    return read_run(config.out_dir)["config"]["init_from"]


def read_run(out_dir):
    """The run.json of the run in out_dir. SystemExit if there is none, or a damaged one."""
    path = os.path.join(out_dir, "run.json")
    if not os.path.exists(path):
        raise SystemExit(f"out_dir={out_dir} holds no run to resume: leave out --init_from, or "
                         "name the run's --out_dir.")
    begun = read_json(path)
    if type(begun.get("config")) is not dict:
        raise SystemExit(f"{path} is damaged, it has no config: take an undamaged copy")
    return begun


def resumed_run(namespace):
    """(out_dir, {key: value}) of the run that the command line resumes, with the keys of its
    run.json; ("", {}) where it resumes none. namespace: a trainer's globals().

    configure() begins with these keys, so that --init_from=resume and --out_dir say all.
    """
    config = {key: given(key) or namespace[key] for key in ("init_from", "out_dir")}
    if not is_resuming(SimpleNamespace(**config)):
        return "", {}
    begun = read_run(config["out_dir"])
    theirs, ours = (os.path.basename(argv[0]) for argv in (begun.get("argv") or [""], sys.argv))
    if theirs in TRAINERS and ours in TRAINERS and theirs != ours:
        raise SystemExit(f"out_dir={config['out_dir']} holds a run of {theirs}, with which {ours} "
                         f"cannot go on: use {theirs}, or name another --out_dir.")
    return config["out_dir"], {key: value for key, value in begun["config"].items()
                               if key not in (*config, "overwrite")}


def check_resumable(config):
    """SystemExit if out_dir holds a run that would be lost, or none to resume."""
    if is_resuming(config):
        read_run(config.out_dir)
    elif os.path.exists(os.path.join(config.out_dir, "run.json")) and not config.overwrite:
        raise SystemExit(f"out_dir={config.out_dir} holds another run: choose another --out_dir, "
                         "go on with it by --init_from=resume, or replace it by --overwrite=True.")


def lock_file(path, wait=False):
    """Keeps other processes from this lock until the returned file is closed or this process ends,
    however it ends. None where there are no locks.

    BlockingIOError if another process has it, unless this one is to wait.
    """
    if fcntl is None:
        return None
    file = open(path, "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.close()
        raise
    except OSError: # a file system without locks
        pass
    return file


def lock_out_dir(config, run):
    """Keeps other processes' runs out of out_dir. SystemExit if one is there.

    An earlier run of this process may hold the lock still, which it then shares.
    """
    if not run.master:
        return
    path = os.path.realpath(os.path.join(config.out_dir, "run.lock"))
    run.lock = LOCKS.get(path)
    try:
        run.lock = run.lock or lock_file(path)
    except BlockingIOError:
        raise SystemExit(f"out_dir={config.out_dir} is in use by another run, which has not ended: "
                         "wait for it, or choose another --out_dir.") from None
    except OSError: # no files can be made there: the first one of the run says so
        return
    if run.lock:
        LOCKS[path] = run.lock


def init_out_dir(config, run):
    """Makes out_dir, removes the files of an earlier run, and writes run.json; of a run that is
    resumed run.json gets the keys that it goes on with.

    Called when data and network are there: what follows is work that must not be lost.
    """
    if not run.master:
        return
    path = os.path.join(config.out_dir, "run.json")
    if is_resuming(config):
        begun = read_run(config.out_dir)
        now = vars(config) | run.keys | {"init_from": begun["config"]["init_from"]}
        if now != begun["config"]:
            write_json(path, begun | {"config": now})
        return
    try:
        os.makedirs(config.out_dir, exist_ok=True)
    except OSError as e:
        raise SystemExit(f"out_dir={config.out_dir} cannot be made ({e.strerror}): choose another "
                         "--out_dir.") from None
    lock_out_dir(config, run)
    check_resumable(config) # another run may have begun, and ended, since setup() looked
    for name in RUN_FILES:
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(config.out_dir, name))
    here, commit = os.path.dirname(os.path.abspath(__file__)), ""
    with contextlib.suppress(FileNotFoundError): # no git
        git = ["git", "rev-parse", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, cwd=here).stdout.strip()
    device = torch.cuda.get_device_name(run.device) if run.device_type == "cuda" else run.device
    write_json(path, {
        "argv": sys.argv, "config": vars(config), "commit": commit, "seed": config.seed,
        "world": run.world, "device": device, "dtype": run.dtype,
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__,
                     "numpy": np.__version__}})

# -----------------------------------------------------------------------------
# checkpoints

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
    """The dict in a checkpoint. SystemExit if it is missing or damaged. Nothing is unpickled."""
    previous = os.path.join(os.path.dirname(path), "ckpt.prev.pt")
    fix = "take another"
    if path.endswith("ckpt.pt") and os.path.exists(previous):
        fix = "go on from the one before it by --init_from=previous"
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        whole = checkpoint.pop("sha256") == content_hash(checkpoint)
    except FileNotFoundError:
        raise SystemExit(f"There is no checkpoint {path}: name the out_dir of a run that has saved "
                         "one.") from None
    except Exception as e: # torch.load raises whatever the damaged bytes lead it to
        raise SystemExit(f"The checkpoint {path} is damaged or not one of ours "
                         f"({type(e).__name__}): {fix}.") from None
    if not whole:
        raise SystemExit(f"The checkpoint {path} is damaged, its content does not have the hash "
                         f"that it was saved with: {fix}.")
    return checkpoint


def load_model(net, checkpoint, path):
    """net with the checkpoint's weights; SystemExit with the first difference of the shapes."""
    own, other = net.state_dict(), checkpoint["model"]
    for name in [*own, *other]:
        a, b = (tuple(state[name].shape) if name in state else None for state in (own, other))
        if a != b:
            raise SystemExit(f"The checkpoint {path} is of another shape: its {name} is {b}, this "
                             f"network's is {a}. Use the sizes that it was trained with.")
    net.load_state_dict(other)
    return net


def check_resumed_data(config):
    """SystemExit where a run that goes on began on other data; config has the data's identity."""
    if is_resuming(config):
        began = read_run(config.out_dir)["config"]
        check_same_data(config, began, f"the run in out_dir={config.out_dir}")


def check_same_data(config, before, where, parts=("meaning", "content"), fix=""):
    """SystemExit where what was learned on some data would go on with other data.

    config.identity says what a data set is, see data.identity(): shapes cannot tell it. before: the
    config of what has learned, which `where` names; an older version's has no identity. parts:
    which of the identity must be the same.
    """
    if difference := different_data(config, before, parts):
        theirs, ours = (os.path.join(c["data_dir"], c["dataset"]) for c in (before, vars(config)))
        fix = fix or ("go on with the data that it has learned on, or start anew in another "
                      "--out_dir")
        raise SystemExit(f"{where} has learned on {theirs}, from which {ours} as it is now differs "
                         f"in its {difference}: {fix}.")


def different_data(config, before, parts):
    """The first name in these parts of the identity in which the data of two runs differ, or
    None."""
    for part in parts if "identity" in before else ():
        theirs, ours = before["identity"][part], config.identity[part]
        for name in theirs:
            if ours.get(name, theirs[name]) != theirs[name]: # another version may have other names
                return name
    return None


def check_same_network(config, checkpoint, path, keys, must=(),
                       fix="it goes on with what it began with"):
    """SystemExit where a run would go on as another network of the same shapes.

    A forgotten --norm or --n_head does not change a shape. keys: those that say which network it
    is; must: others that must be what they were.
    """
    for key in (*must, *sorted(keys & vars(config).keys())): # agents have few of the network's
        ours = getattr(config, key)
        theirs = checkpoint["config"].get(key, None if key in must else ours)
        if as_list(theirs) != as_list(ours):
            raise SystemExit(f"{path} is of a run with {key}={theirs}, and this one has "
                             f"{key}={ours}: {fix}.")


def save(config, run, name, net, optimizer=None, **rest):
    """Writes a checkpoint, with its hash and the current lengths of the logs.

    The ckpt.pt before it becomes ckpt.prev.pt.
    """
    if optimizer and config.zero_stage:
        optimizer.consolidate_state_dict(to=0)
    if not run.master:
        return
    paths = {log: os.path.join(config.out_dir, log) for log in LOGS}
    sizes = {log: os.path.getsize(path) for log, path in paths.items() if os.path.exists(path)}
    checkpoint = {"model": net.state_dict(), "config": vars(config), "logs": sizes, **rest}
    if optimizer:
        checkpoint |= {"optimizer": optimizer.state_dict(), "scaler": run.scaler.state_dict()}
    checkpoint["sha256"] = content_hash(checkpoint)
    path = os.path.join(config.out_dir, name)
    if name == "ckpt.pt" and os.path.exists(path):
        previous = os.path.join(config.out_dir, "ckpt.prev.pt")
        with contextlib.suppress(FileNotFoundError):
            os.remove(previous + ".tmp")
        try:
            os.link(path, previous + ".tmp") # a second name: there is a ckpt.pt at every moment
        except OSError: # exFAT, FUSE and cloud drives have none
            atomic_copy(path, previous)
        else:
            os.replace(previous + ".tmp", previous)
    atomic_write(path, lambda f: torch.save(checkpoint, f))


def resume(config, run, net, optimizer, state, keys, arch=None):
    """Puts network, optimizer, state and logs back to the checkpoint; returns the checkpoint.

    A run that was stopped before its first checkpoint starts from the beginning, which is the
    same; then it returns None. keys: see check_same_network(). arch: the architecture in training.
    """
    lock_out_dir(config, run)
    name = "ckpt.pt" if config.init_from == "resume" else "ckpt.prev.pt"
    path, checkpoint = os.path.join(config.out_dir, name), {"logs": {}}
    if os.path.exists(path) or config.init_from == "previous":
        checkpoint = load_checkpoint(path, run.device)
        load_model(net, checkpoint, path)
        check_same_network(config, checkpoint, path, keys, ("weight_optimizer",))
        if checkpoint.get("arch") != arch:
            raise SystemExit(f"{path} is of a run of the architecture {checkpoint.get('arch')}, "
                             f"and not of {arch}: name that, or another --out_dir.")
        # the weight decay and betas of this command count; every step sets its own lr
        saved, groups = checkpoint["optimizer"], []
        for theirs, ours in zip(saved["param_groups"], optimizer.param_groups, strict=True):
            settings = {k: v for k, v in ours.items() if k not in ("params", "lr")}
            groups.append(theirs | settings)
        optimizer.load_state_dict(saved | {"param_groups": groups})
        if checkpoint["scaler"]: # with dtype=float16
            run.scaler.load_state_dict(checkpoint["scaler"])
        vars(state).update(checkpoint["state"])
    if run.world > 1:
        dist.barrier()
    if run.master and config.init_from == "previous":
        # else the next save would make the damaged ckpt.pt the previous one
        atomic_copy(path, os.path.join(config.out_dir, "ckpt.pt"))
    if run.master:
        for log in LOGS:
            path, size = os.path.join(config.out_dir, log), checkpoint["logs"].get(log, 0)
            if os.path.exists(path) and os.path.getsize(path) > size:
                with open(path, "rb") as f:
                    kept = f.read(size)
                atomic_write(path, lambda f, kept=kept: f.write(kept)) # not all disks truncate
    return checkpoint if "model" in checkpoint else None

# -----------------------------------------------------------------------------
# signals, faults and the end of a run

@contextlib.contextmanager
def signals(run):
    """SIGTERM and SIGINT are noted in run.signal; the same one again ends the process at once."""
    def note(signum, frame):
        if run.signal == signum:
            os._exit(128 + signum)
        run.signal = signum
    before = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def stop_if_signaled(run, checkpoint, due=False):
    """Calls checkpoint() if it is due on any process; returns whether it was.

    If any process got a signal: calls checkpoint() and ends all of them with 128 + its number.
    """
    words = [int(word) for word in all_gather_scalar(256 * bool(due) + run.signal, run)]
    signum = max(word % 256 for word in words)
    due = max(words) >= 256
    if signum or due:
        checkpoint()
    if signum:
        if run.master:
            script = os.path.basename(sys.argv[0])
            again = shlex.join([script, "--init_from=resume", f"--out_dir={run.keys['out_dir']}"])
            tqdm.write(f"stopped by {signal.Signals(signum).name}, all is saved: go on by "
                       f"{'python' if run.world == 1 else 'torchrun ...'} {again}")
        raise SystemExit(128 + signum)
    return due


def save_is_due(config, step, saved):
    """Whether a checkpoint is due between evaluations. saved: time.perf_counter() of the last."""
    minutes = (time.perf_counter() - saved) / 60
    by_steps = config.save_interval and step % config.save_interval == 0
    return by_steps or (config.save_minutes and minutes > config.save_minutes)


def finite(value, what):
    if not np.isfinite(value):
        raise FloatingPointError(f"{what} is {value}: try a lower learning_rate or dtype=float32")
    return value


def skip_nonfinite_step(what, config, state):
    """Counts a step that is passed over; FloatingPointError if there were too many."""
    state.skipped += 1
    if state.skipped > config.skip_nonfinite:
        raise FloatingPointError(f"step {state.step}: not finite {what}; try a lower learning_rate "
                                 "or dtype=float32, or pass over up to N such steps by "
                                 "--skip_nonfinite=N")


@contextlib.contextmanager
def silenced():
    """For a training inside an evaluation: prints nothing, and restores PyTorch's random state.

    The training seeds PyTorch; an agent that draws its actions there would repeat itself.
    """
    quiet = io.StringIO()
    with (torch.random.fork_rng(), contextlib.redirect_stdout(quiet),
          contextlib.redirect_stderr(quiet)):
        yield


def draw_figures(out_dir):
    """Runs analyze.py on the run in out_dir, and prints the paths of its figures; on rank 0.

    In this process, which has imported PyTorch already. The run has ended well whatever happens.
    """
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "analyze.py")
    if os.environ.get("RANK", "0") != "0" or not os.path.exists(script):
        return
    said, argv, sys.argv = io.StringIO(), sys.argv, [script, f"--out_dir={out_dir}"]
    try:
        with contextlib.redirect_stdout(said):
            runpy.run_path(script, run_name="__main__")
    except (Exception, SystemExit) as e: # no matplotlib, no evaluation yet, a full disk
        print(f"no figure of {out_dir}: {e}", file=sys.stderr)
    finally:
        sys.argv = argv
    print("\n".join(line for line in said.getvalue().splitlines() if line.startswith("figure: ")))


def main(function, config):
    """function(config) of a script. Ends it with one sentence for a ConfigError, for a number that
    is not finite and where another process has ended, and without one after Ctrl-C."""
    try:
        return function(config)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (FloatingPointError, ConfigError) as e:
        raise SystemExit(str(e)) from None
    except RuntimeError as e:
        if "gloo" not in str(e): # gloo has no error class of its own
            raise
        raise SystemExit("Another process has ended, or not answered for timeout_minutes; if it "
                         "has ended, it has said why.") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()

# -----------------------------------------------------------------------------
# the log

class Log:
    """Prints lines below a progress bar, and writes their values to log.jsonl, and to wandb and
    TensorBoard if asked for. kind: the class of the data, whose unit a speed is in."""

    def __init__(self, config, run, start=0, kind=None):
        self.config, self.run, self.kind = config, run, kind
        self.wandb = self.board = None
        self.bar = tqdm(total=config.max_iters, initial=start, unit="step", leave=False,
                        disable=not run.master or not sys.stderr.isatty())
        if run.master and config.wandb_log:
            import wandb
            self.wandb = wandb.init(project=config.wandb_project, config=vars(config),
                                    name=config.wandb_run_name or config.out_dir,
                                    id=wandb_id(config.out_dir), resume="allow")
        if run.master and config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(config.out_dir)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """Waits for both writers: their threads must not write into a folder that is gone."""
        if self.wandb:
            self.wandb.finish()
        if self.board:
            self.board.close()

    def __call__(self, line, **values):
        """One line, and its values."""
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
        """The line of a training step. loss: this process's, a tensor. clock: when the last `steps`
        steps began. flops: of one sample, forward. extra: more values of the line."""
        loss = loss.detach().clone().reshape(1)
        all_reduce_mean([loss], self.run)
        loss = loss.item() # waits for the device; not finite only in a step that was passed over
        seconds = (time.perf_counter() - clock) / steps
        config, kind = self.config, self.kind
        samples = config.batch_size * config.gradient_accumulation_steps
        speed = samples * kind.units_per_sample(config) / seconds
        values = {"step": step, "loss": loss, "lr": lr, "ms": 1000 * seconds,
                  f"{kind.units}_per_s": speed}
        line = (f"step {step}/{config.max_iters} | loss {loss:.4f} | lr {lr:.2e} | "
                f"{1000 * seconds:.1f} ms | {speed:,.0f} {kind.unit}/s")
        if peak := peak_flops(self.run):
            # a backward pass costs two forward passes
            values["mfu"] = 3 * flops * samples / seconds / peak / self.run.world
            line += f" | mfu {100 * values['mfu']:.1f}%"
        self(line + "".join(f" | {key} {value}" for key, value in extra.items()), **values)


def wandb_id(out_dir):
    """The id of this run at wandb, which run.json keeps: a resumed run goes on in the same one."""
    begun = read_run(out_dir)
    if "wandb_id" not in begun:
        begun["wandb_id"] = uuid.uuid4().hex
        write_json(os.path.join(out_dir, "run.json"), begun)
    return begun["wandb_id"]


def peak_flops(run):
    """What the card can do in 16 bit, FLOPs a second; 0 where it is not known."""
    name = torch.cuda.get_device_name(run.device) if run.device_type == "cuda" else ""
    return next((peak for card, peak in PEAK_FLOPS.items() if card in name), 0)
