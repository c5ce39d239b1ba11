import argparse
import inspect
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# the tests run in two processes; PyTorch reads this when it is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")
import fused_ops
from prepare import prepare

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("NAS_DATA") or ROOT.parent / "shared/data") # small real data
TINY = dict(device="cpu", compile=False, batch_size=4, block_size=16, gradient_accumulation_steps=1,
            max_iters=4, eval_interval=2,
            eval_iters=2, log_interval=1, warmup_iters=1)
TINY_SPACE = dict(n_layer=[1, 2], n_head=[1, 2], n_embd=[8, 16], mlp_ratio=[1, 2])
TINY_EVALS = dict(arch_evals=6, population=4, parents=2)
GPT2_BLOCK = dict(head_size=0, norm="layernorm", position="learned", qk_norm=False,
                  residual="pre", activation="gelu", n_kv_head=0, window=0)
TINY_KINDS = dict(head_size=4, norm=["layernorm", "rmsnorm"], position=["learned", "rope"],
                  qk_norm=[False, True], activation=["gelu", "swiglu"], n_kv_head=[1, 0],
                  window=[4, 0])
TINY_SEARCH = TINY | TINY_SPACE | GPT2_BLOCK | TINY_EVALS
TINY_IMAGES = {key: value for key, value in TINY.items()
               if key != "block_size"} | dict(dataset="digits", batch_size=8, bn_batches=2)
NOT_OF_PAIRS = ("dataset", "bn_batches", "repeated_augmentation") # of images with classes alone
TINY_SPACES = {
    "autoformer": TINY_SPACE | dict(patch_size=2, head_size=4, rel_pos_clip=2),
    "darts": dict(init_channels=4, n_layer=3, primitives=["none", "skip_connect", "sep_conv_3x3",
                                                          "sep_conv_5x5"], auxiliary=0.0, stem=""),
    "mobilenetv3": dict(depth=[1, 2], kernel_size=[3, 5], expand=[2, 3], stem_channels=8,
                        stem_stride=1, widths=[8, 16], strides=[2, 1],
                        se=[0, 1], hswish=[0, 1], last_channels=16, mix_channels=16),
    "nats_size": dict(channels=[4, 8]),
    "nb201": dict(init_channels=4, n_cell=1),
    "swinir": dict(dataset="sr_samples", n_embd=[4, 8], n_rstb=[1, 2], n_layer=[1, 2],
                   n_head=[1, 2], window_size=4, patch=8),
    "toy_cell": dict(init_channels=4),
    "toy_conv_macro": dict(channels_1=[2, 4], channels_2=[2, 4], channels_3=[4, 8],
                           channels_4=[4, 8], kernel_size=[3, 5],
                           last_channels=8, last_kernel_size=3, last_padding=1, fc=16)}
TINY_LARGEST = dict(depth=2, kernel_size=5, expand=3) # of mobilenetv3
TINY_STAGES = dict(partial_channels=2, widen_to=1, prune_keep=2, arch_warmup_iters=1)


WATCHED = """
import json, os, runpy, signal, sys
from glob import glob
def watch(frame, event, arg):
    if frame.f_code.co_name == {function!r} and ({condition}):
        sys.stdout.flush()
        os.kill(os.getpid(), {signum})
sys.argv = {command!r}
sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
sys.setprofile(watch)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def flags(options):
    return [f"--{key}={str(value).replace(' ', '')}" for key, value in options.items()]


def run(*command, cwd=ROOT, timeout=300, **env):
    """A script as a user runs it: the finished process, its output as text. command: train.py
    --key=val ..., or torchrun ..."""
    if command[0].endswith(".py"):
        command = [sys.executable, *command]
    else:
        command = [sys.executable, "-m", "torch.distributed.run", *command[1:]]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout,
                          env={**os.environ, **env})


def succeeds(*command, **kwargs):
    done = run(*command, **kwargs)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def fails(*command, **kwargs):
    """The one sentence with which it stops."""
    done = run(*command, **kwargs)
    said = f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert done.returncode == 1 and "Traceback" not in done.stderr, said
    return done.stderr.strip().splitlines()[-1]


def script(name, *args):
    """A script as it is run from the command line, in this process, which has imported PyTorch
    already."""
    argv, sys.argv = sys.argv, [name, *map(str, args)]
    try:
        runpy.run_path(str(ROOT / name), run_name="__main__")
    finally:
        sys.argv = argv


def stops(name, *args):
    """The one sentence with which script() stops."""
    with pytest.raises(SystemExit) as stopped:
        script(name, *args)
    assert isinstance(stopped.value.code, str) and "\n" not in stopped.value.code
    return stopped.value.code


def killed_in(function, condition, *command, cwd=ROOT, signum=signal.SIGKILL):
    """A script that ends itself by a signal within the first call of this function in which
    condition, a Python expression, holds: who watches from outside comes late on a busy machine.
    Returns what it had printed."""
    program = WATCHED.format(function=function, condition=condition, signum=int(signum),
                             command=list(map(str, command)))
    done = subprocess.run([sys.executable, "-c", program], cwd=cwd, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, text=True)
    assert done.returncode == (-signum if signum == signal.SIGKILL else 1), (
        f"{command} ended with {done.returncode} before {condition} in {function}")
    return done.stdout


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """Real text, prepared once by the script: a part of the standard library's own, under the name
    of the default data set."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text(Path(inspect.getsourcefile(argparse)).read_text()[:60_000])
    succeeds("prepare.py", "--dataset=text", f"--path={folder}/text.txt", "--name=pydocs",
             f"--data_dir={folder}")
    return str(folder)


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory):
    """Digits, and the photographs for super-resolution, prepared once."""
    folder = tmp_path_factory.mktemp("digits")
    for name in ("digits", "sr_samples"):
        prepare(dataset=name, data_dir=str(folder))
    return str(folder)


@pytest.fixture
def gpt2(tmp_path, monkeypatch):
    if (SHARED / "tiktoken").is_dir(): # a copy: tiktoken deletes a file that it takes for damaged
        shutil.copytree(SHARED / "tiktoken", tmp_path / "tiktoken", copy_function=shutil.copyfile)
        (tmp_path / "tiktoken").chmod(0o700)
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tiktoken"))
    import tiktoken
    try:
        tiktoken.get_encoding("gpt2")
    except OSError:
        pytest.skip("GPT-2's vocabulary is neither in a cache nor on the network")


@pytest.fixture(autouse=True)
def no_kernels():
    """A search in this process turns them on, and PyTorch's counter of FLOPs does not know them."""
    yield
    fused_ops.use_fused_ops(False)


def turn_kernels_on():
    """fused_ops.cpp in use from here on; the test is skipped where there is no compiler, and fails
    where it does not compile."""
    fused_ops.use_fused_ops()
    compiler = os.environ.get("CXX", "c++")
    if not fused_ops.enabled and shutil.which(compiler) is None:
        pytest.skip(f"there is no compiler {compiler} for fused_ops.cpp")
    assert fused_ops.enabled, "fused_ops.cpp does not compile here"


@pytest.fixture(params=[False, True], ids=["pytorch", "kernels"])
def implementation(request):
    """Mixtures by PyTorch, then by fused_ops.cpp."""
    if request.param:
        turn_kernels_on()
    yield
    fused_ops.use_fused_ops(False)
