"""Runs that survive: killed, stopped, damaged, out of room, on one process or many, they lose
nothing and never go on wrongly."""
import run as runs
import json
import math
import os
import pickle
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (ROOT, TINY, TINY_IMAGES, TINY_LARGEST, TINY_SEARCH, TINY_SPACES, TINY_STAGES,
                      fails, flags, run, script, stops, succeeds)
from test_train import OPTIMIZERS, base_config, search_config, train_config, with_other_val

import train
import train_base
import train_search
from data import (PYDOCS_SOURCE, PYDOCS_TRAIN, Images, Pairs, bytes_hash, check_pydocs, identity,
                  load_tokens)
from run import read_json, read_lines, write_json

LONG = dict(max_iters=20, lr_decay_iters=20, eval_interval=10, dropout=0.1)


def state_of(out_dir):
    """Everything a checkpoint and the logs hold but times: two runs that did the same have the
    same."""
    checkpoint = torch.load(Path(out_dir) / "ckpt.pt", weights_only=True)
    for key in ("config", "sha256", "logs"):
        checkpoint.pop(key)
    checkpoint["state"].pop("seconds")
    times = ("ms", "tokens_per_s", "images_per_s", "seconds", "sha256")
    logs, searched = ([{k: v for k, v in line.items() if k not in times}
                       for line in read_lines(path)] if path.exists() else []
                      for path in (Path(out_dir) / "log.jsonl",
                                   Path(out_dir) / "arch_search.jsonl"))
    files = {name: (Path(out_dir) / name).read_bytes() for name in ("arch.json", "arch_traj.jsonl")
             if (Path(out_dir) / name).exists()}
    return runs.content_hash(checkpoint), [line for line in logs
                                           if line.get("step")], searched, files


def killed_early(whole, out_dir):
    """The out_dir of a run like that in whole, killed before its first checkpoint: what begin()
    wrote, and a log."""
    os.makedirs(out_dir)
    for name in ("run.json", "log.jsonl"):
        shutil.copy(Path(whole) / name, out_dir)
    return {"out_dir": str(out_dir), "init_from": "resume"}


def searched(data_dir, tmp_path):
    train_search.search(search_config(data_dir, tmp_path / "searched"))
    return tmp_path / "searched/arch.json"


def starter(name, data_dir, tmp_path):
    """A function (out_dir, **options) that runs one of the five searches or train_base."""
    if name == "train_base":
        found = searched(data_dir, tmp_path)
        return lambda out, **rest: train_base.train_found(
            base_config(data_dir, out, found, **LONG | rest))
    return lambda out, **rest: train_search.search(
        search_config(data_dir, out, **OPTIMIZERS[name], **LONG | rest))


@pytest.mark.parametrize("name", [*OPTIMIZERS, "train_base"])
def test_twenty_steps_are_ten_and_ten(name, data_dir, tmp_path):
    """Stopped by a signal after step 10 and resumed: losses, alphas, architecture and checkpoint
    are those of one run."""
    go, step = starter(name, data_dir, tmp_path), train.train_step
    go(tmp_path / "whole")

    def step_then_signal(*args):
        loss = step(*args)
        if args[6].step == 9: # the tenth step is being finished
            os.kill(os.getpid(), signal.SIGTERM)
        return loss
    train.train_step = train_search.train_step = step_then_signal
    try:
        with pytest.raises(SystemExit) as e:
            go(tmp_path / "parts")
    finally:
        train.train_step = train_search.train_step = step
    assert e.value.code == 128 + signal.SIGTERM
    assert torch.load(tmp_path / "parts/ckpt.pt", weights_only=True)["state"]["step"] == 10
    go(tmp_path / "parts", init_from="resume")
    assert state_of(tmp_path / "whole") == state_of(tmp_path / "parts")


KILLER = """
import os, random, signal, sys
sys.path[:0] = [{root!r}, {tests!r}]
import matplotlib.figure, torch
import train_search
from test_train import search_config
torch.set_num_threads(1)
def no_links(*names):
    raise OSError("this disk has none")
if {optimizer!r} == "spos":
    os.link = no_links
# imports what the children would import, one after the other
torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
def go(out, init_from):
    sys.stdout = open(os.devnull, "w")
    train_search.search(search_config({data!r}, out, optimizer={optimizer!r}, max_iters=30,
                                      lr_decay_iters=30, eval_interval=10, save_interval=1,
                                      dropout=0.1, arch_evals=30, population=8,
                                      init_from=init_from))
def attempt(out, calls=0):
    began, (read, write) = os.path.exists(out + "/run.json"), os.pipe()
    child = os.fork()
    if not child:
        count = 0
        # of every call and return, also of C functions: the same moment on a fast machine and a
        # busy one
        def watch(*event):
            nonlocal count
            count += 1
            if count == calls:
                os.kill(os.getpid(), signal.SIGKILL)
        try:
            sys.setprofile(watch)
            go(out, "resume" if began else "scratch")
            sys.setprofile(None)
            os.write(write, str(count).encode())
            os._exit(0)
        except (Exception, SystemExit) as e:
            print(e, file=sys.stderr)
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    os.close(write)
    counted = os.read(read, 100)
    os.close(read)
    assert status in (0, signal.SIGKILL), status
    return int(counted or 0)
def progress(out):
    path, lines = out + "/ckpt.pt", out + "/arch_search.jsonl"
    searched = sum(1 for _ in open(lines)) if os.path.exists(lines) else 0
    if not os.path.exists(path):
        return 0
    return torch.load(path, weights_only=True)["state"]["step"] + searched
calls = attempt({out!r} + "/whole")
dice, kills, run, moments = random.Random(5), 0, 0, set()
while kills < 20 or not finished:
    out = {out!r} + f"/killed{{run}}"
    # mostly early: the figures of the end are calls, too
    finished = attempt(out, int(calls * dice.random() ** 2) if kills < 20 else 0) > 0
    kills += not finished
    run += finished
    moments.add(progress(out))
print(sorted(moments), file=sys.stderr)
print(run, len(moments))
"""


@pytest.mark.parametrize("optimizer", ["drnas", "spos"])
def test_killed_at_twenty_random_moments(optimizer, data_dir, tmp_path):
    """SIGKILL at any call, also within the saves that follow every step: every resume ends in the
    same state. The disk of spos has no hard links."""
    places = dict(root=str(ROOT), tests=str(ROOT / "tests"), data=data_dir, out=str(tmp_path))
    program = KILLER.format(**places, optimizer=optimizer)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    runs, moments = map(int, done.stdout.split()[-2:])
    assert moments >= 8, f"the kills fell at {moments} different moments only"
    whole = state_of(tmp_path / "whole")
    for i in range(runs):
        assert state_of(tmp_path / f"killed{i}") == whole, f"run {i} of {runs}"


def start(*command):
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def wait_for(process, words):
    for line in process.stdout:
        if words in line:
            return
    raise AssertionError(f"ended without {words!r}")


def test_ctrl_c_before_the_first_step_ends_without_a_traceback():
    def interrupted(config):
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as stopped:
        runs.main(interrupted, {})
    assert stopped.value.code == 128 + signal.SIGINT


def test_ctrl_c_saves_and_a_second_one_ends_at_once(data_dir, tmp_path):
    options = [*flags(TINY_SEARCH | {"max_iters": 100000, "eval_interval": 50000}),
               f"--data_dir={data_dir}"]
    process = start("train_search.py", *options, f"--out_dir={tmp_path}/a")
    wait_for(process, "step 5/")
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGINT and "Traceback" not in output
    again = shlex.split(re.search("all is saved: go on by python (.*)", output)[1])
    assert again == ["train_search.py", "--init_from=resume", f"--out_dir={tmp_path}/a"]
    stopped = torch.load(tmp_path / "a/ckpt.pt", weights_only=True)["state"]["step"]
    assert stopped >= 5
    out = succeeds(*again, f"--max_iters={stopped + 2}")
    assert f"step {stopped + 1}/" in out and f"step {stopped}/" not in out


def test_a_checkpoint_without_room_is_one_sentence_and_keeps_the_last(data_dir, tmp_path):
    """The file size limit stands in for a full disk: the save fails in the middle, the checkpoint
    before it is whole."""
    config = train_config(data_dir, tmp_path / "t", save_interval=2, max_iters=40, eval_interval=40)
    train.train(config | {"max_iters": 4})
    before = (tmp_path / "t/ckpt.pt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(SystemExit) as e:
            train.train(config | {"init_from": "resume"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "ckpt.pt cannot be written" in str(e.value) and "\n" not in str(e.value)
    assert ((tmp_path / "t/ckpt.pt").read_bytes() == before
            and not list((tmp_path / "t").glob("*.tmp")))
    train.train(config | {"init_from": "resume"})


def test_an_out_dir_that_cannot_be_made_is_one_sentence(data_dir, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert "cannot be made" in fails("train.py", *flags(TINY), f"--data_dir={data_dir}",
                                     f"--out_dir={tmp_path}/file/out")


def test_a_damaged_checkpoint_offers_the_one_before(data_dir, tmp_path, monkeypatch):
    config = train_config(data_dir, tmp_path / "t", save_interval=1, max_iters=8)
    train.train(config)
    shutil.copytree(tmp_path / "t", tmp_path / "whole")
    damaged = bytearray((tmp_path / "t/ckpt.pt").read_bytes())
    # more than the padding between two tensors
    for i in range(len(damaged) // 2, len(damaged) // 2 + 256):
        damaged[i] ^= 1
    (tmp_path / "t/ckpt.pt").write_bytes(damaged)
    with pytest.raises(SystemExit, match="--init_from=previous"):
        train.train(config | {"init_from": "resume"})
    with monkeypatch.context() as patch: # killed within its first save
        patch.setattr(torch, "save", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train.train(config | {"init_from": "previous"})
    for name in ("ckpt.pt", "ckpt.prev.pt"):
        runs.load_checkpoint(str(tmp_path / "t" / name), "cpu")
    train.train(config | {"init_from": "previous"})
    assert state_of(tmp_path / "t") == state_of(tmp_path / "whole")


def test_the_best_weights_of_steps_that_are_made_otherwise_are_not_those_of_the_run(
        data_dir, tmp_path):
    """Gone on with from the checkpoint before, at a rate that spoils the network: best.pt is what
    the result says of it."""
    config = train_config(data_dir, tmp_path, val_portion=0.1, learning_rate=1e-2)
    assert train.train(config, test=True)["best_step"] == 4
    result = train.train(config | dict(init_from="previous", learning_rate=10.0, min_lr=10.0),
                         test=True)
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    assert (best["step"] == result["best_step"] and best["losses"]["val_loss"] ==
            result["best_val_loss"])


def test_the_checkpoint_before_may_be_the_end_of_a_run(data_dir, tmp_path):
    """Without further steps its own weights are the best that are left, and not those of the steps
    behind it."""
    config = train_config(data_dir, tmp_path, val_portion=0.1, learning_rate=1e-2)
    assert train.train(config, test=True)["best_step"] == 4
    before = torch.load(tmp_path / "ckpt.prev.pt", weights_only=True)
    result = train.train(config | dict(init_from="previous", max_iters=2), test=True)
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    assert best["step"] == result["best_step"] == before["state"]["step"] == 2
    assert (result["best_val_loss"] == best["losses"]["val_loss"] ==
            before["state"]["losses"]["val_loss"])


def test_the_architecture_of_steps_that_are_made_otherwise_is_not_that_of_the_run(
        data_dir, tmp_path):
    """As above: arch.json is what the result says."""
    config = search_config(data_dir, tmp_path, learning_rate=1e-2)
    train_search.search(config)
    assert read_json(tmp_path / "arch.json")["step"] == 4
    result = train_search.search(config | dict(init_from="previous", learning_rate=10.0,
                                               min_lr=10.0))
    found = read_json(tmp_path / "arch.json")
    assert (found["arch"], found["arch_loss"]) == (result["arch"], result["arch_loss"])


@pytest.mark.parametrize("module, config_of", [(train, train_config),
                                               (train_search, search_config)])
def test_fewer_steps_than_a_run_has_made_are_refused(module, config_of, data_dir, tmp_path):
    begin = module.train if module is train else module.search
    begin(config_of(data_dir, tmp_path / "o"))
    before = state_of(tmp_path / "o")
    with pytest.raises(SystemExit, match="max_iters=3 is below the 4 steps that this run has made"):
        begin(config_of(data_dir, tmp_path / "o", init_from="resume", max_iters=3))
    assert state_of(tmp_path / "o") == before


OTHERS = { # what has the same shapes, and what the optimizers cannot take over
    "train": [dict(n_head=1), dict(norm="rmsnorm"), dict(activation="relu"), dict(residual="post"),
              dict(weight_optimizer="sgd")],
    "search": [dict(n_embd=[4, 16]), dict(n_head=[1, 4]), dict(optimizer="gdas"),
               dict(optimizer="spos"), dict(n_layer=[2])],
    "spos": [dict(optimizer="drnas")]}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_run_goes_on_as_the_network_that_it_is(kind, data_dir, tmp_path):
    """Options that are forgotten on the command are one sentence, and nothing that is there
    changes; all others may change."""
    config_of = train_config if kind == "train" else search_config
    options = dict(optimizer="spos") if kind == "spos" else {}
    config = config_of(data_dir, tmp_path, **options)
    go = train.train if kind == "train" else train_search.search
    go(config)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for change in OTHERS[kind]:
        (key, value), = change.items()
        with pytest.raises(SystemExit) as e:
            go(config | change | dict(init_from="resume", max_iters=6))
        assert (f"{key}={config[key]}" in str(e.value) and f"{key}={value}" in str(e.value)
                and "\n" not in str(e.value))
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    go(config | dict(init_from="resume", max_iters=6, dropout=0.1, learning_rate=1e-4, batch_size=2,
                     loss_chunk=8))


def test_a_run_goes_on_with_the_optimizers_settings_of_its_command(data_dir, tmp_path):
    """What the command changes counts, of the weights and of the alphas, and not what the
    checkpoint was saved with."""
    config = search_config(data_dir, tmp_path, weight_optimizer="adam")
    train_search.search(config)
    train_search.search(config | dict(init_from="resume", max_iters=6, weight_decay=0.3, beta1=0.8,
                                      arch_learning_rate=0.05))
    checkpoint = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    weights, alphas = (found["param_groups"] for found in (checkpoint["optimizer"],
                                                           checkpoint["chooser"]["optimizer"]))
    assert all(group["weight_decay"] == 0.3 and group["betas"] == (0.8, 0.99) for group in weights)
    assert [group["lr"] for group in alphas] == [0.05]


def test_a_training_that_stopped_early_goes_on_with_more_patience(data_dir, tmp_path):
    config = train_config(data_dir, tmp_path, val_portion=0.1, early_stopping=2, learning_rate=1.0,
                          max_iters=40, decay_lr=False)
    steps = train.train(config, test=True)["steps"]
    assert steps < 40 and train.train(config | dict(init_from="resume"),
                                      test=True)["steps"] == steps
    assert train.train(config | dict(init_from="resume", early_stopping=3),
                       test=True)["steps"] == steps + config["eval_interval"]
    assert train.train(config | dict(init_from="resume", early_stopping=0),
                       test=True)["steps"] == 40


def test_a_training_does_not_go_on_with_a_search(data_dir, tmp_path):
    """Of whose largest architecture the network has all names and shapes."""
    config = search_config(data_dir, tmp_path)
    train_search.search(config)
    largest = {"n_layer": 2, "n_embd": 16, "n_head": [2, 2], "mlp_ratio": [2, 2]}
    with pytest.raises(SystemExit, match="name that, or another --out_dir"):
        train.train(config | dict(val_portion=0.1, early_stopping=0, init_from="resume",
                                  max_iters=6), largest)


def test_a_training_goes_on_with_its_architecture(data_dir, tmp_path):
    found = {"n_layer": 1, "n_embd": 8, "n_head": [2], "mlp_ratio": [1]}
    config = search_config(data_dir, tmp_path) | dict(val_portion=0.1, early_stopping=0)
    train.train(config, found)
    words = r"is of a run of the architecture .*: name that, or another --out_dir"
    with pytest.raises(SystemExit, match=words) as e:
        train.train(config | dict(init_from="resume", max_iters=6), found | {"n_head": [1]})
    assert "\n" not in str(e.value)
    train.train(config | dict(init_from="resume", max_iters=6), found)


@pytest.mark.parametrize("kind", ["train", "search"])
def test_a_run_goes_on_in_another_dtype(kind, data_dir, tmp_path):
    """As it does by itself on a device for which dtype=auto means another: float16 alone has a
    scaler, with a state."""
    config = (train_config if kind == "train" else search_config)(data_dir, tmp_path)
    go = train.train if kind == "train" else train_search.search
    go(config)
    for steps, dtype in ((6, "float16"), (8, "bfloat16"), (10, "float16")):
        assert go(config | dict(dtype=dtype, init_from="resume", max_iters=steps))["steps"] == steps
    assert runs.load_checkpoint(str(tmp_path / "ckpt.pt"), "cpu")["scaler"]["_growth_tracker"] == 2


class Bomb:
    def __reduce__(self):
        return os.system, ("touch " + os.environ["BOMB"],)


@pytest.mark.parametrize("save", [lambda obj, f: pickle.dump(obj, f), lambda obj,
                                  f: torch.save(obj, f)])
@pytest.mark.parametrize("name", ["ckpt.pt", "best.pt"])
def test_a_malicious_checkpoint_is_refused_and_does_not_run(save, name, data_dir, tmp_path,
                                                            monkeypatch):
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    train.train(train_config(data_dir, tmp_path / "t"))
    with open(tmp_path / "t" / name, "wb") as f:
        save({"model": Bomb(), "sha256": ""}, f)
    options = [f"--out_dir={tmp_path}/t"]
    message = (fails("sample.py", *options) if name == "best.pt" else
               fails("train.py", *flags(TINY | dict(n_layer=2, n_head=2, n_embd=16, mlp_ratio=2.0)),
                     *options, f"--data_dir={data_dir}",
                     "--init_from=resume"))
    assert "damaged or not one of ours" in message and not (tmp_path / "exploded").exists()


def test_five_hundred_damaged_files_never_make_a_wrong_run(data_dir, tmp_path):
    """Truncated anywhere or with any byte changed, each file gives the right content or one
    sentence: no traceback, nothing else."""
    train_search.search(search_config(data_dir, tmp_path / "s", save_interval=1))
    run_dir, data = tmp_path / "s", tmp_path / "data"
    shutil.copytree(data_dir, data)
    arch, last = read_json(run_dir / "arch.json"), read_lines(run_dir / "arch_traj.jsonl")
    readers = {
        run_dir / "arch.json": lambda p: train_base.read_arch(str(p), ""),
        run_dir / "arch_traj.jsonl": lambda p: train_base.read_arch("", str(p)),
        run_dir / "ckpt.pt": lambda p: runs.content_hash(runs.load_checkpoint(str(p), "cpu")),
        data / "pydocs/meta.json": lambda p: [bytes(load_tokens(str(data), "pydocs", split))
                                              for split in ("train", "val")],
        data / "pydocs/train.bin": lambda p: bytes(load_tokens(str(data), "pydocs", "train")),
        data / "pydocs/val.bin": lambda p: bytes(load_tokens(str(data), "pydocs", "val")),
    }
    dice, outcomes = random.Random(0), {"right": 0, "refused": 0}
    for path, read in readers.items():
        whole, right = path.read_bytes(), read(path)
        allowed = [right]
        # a last line that was cut off is as if it had not been written
        if path.name == "arch_traj.jsonl":
            allowed += [{k: v for k, v in line.items() if k != "sha256"} for line in last]
        for case in range(100):
            damaged = bytearray(whole)
            if case % 2:
                del damaged[dice.randrange(len(damaged)):]
            else:
                damaged[dice.randrange(len(damaged))] ^= 1 << dice.randrange(8)
            path.write_bytes(damaged)
            try:
                found = read(path)
                assert found in allowed, f"{path.name}, case {case}: read as something else"
                outcomes["right"] += 1
            except SystemExit as e:
                assert isinstance(e.code, str) and e.code and "\n" not in e.code, e.code
                outcomes["refused"] += 1
        path.write_bytes(whole)
        assert read(path) == right
    assert sum(outcomes.values()) >= 500 and outcomes["refused"] > 450, outcomes
    assert arch["arch"]


@pytest.mark.parametrize("skip", [0, 3])
def test_a_step_that_is_not_finite_is_named_or_passed_over(skip, data_dir, tmp_path):
    """A NaN in one layer's gradient at step 2: the run stops there with step, rank and tensor, or
    goes on without that step."""
    def spoiled(net, *args):
        loss = backward(net, *args)
        steps.append(1)
        if len(steps) == 3:
            net.transformer.h[1].mlp.c_fc.weight.grad[0, 0] = float("nan")
        return loss
    steps, backward = [], train.backward
    train.backward = spoiled
    config = train_config(data_dir, tmp_path / "t", skip_nonfinite=skip)
    try:
        if skip:
            train.train(config)
            checkpoint = torch.load(tmp_path / "t/ckpt.pt", weights_only=True)
            assert checkpoint["state"]["skipped"] == 1
            assert all(v.isfinite().all() for v in checkpoint["model"].values())
        else:
            with pytest.raises(FloatingPointError) as e:
                train.train(config)
            assert all(word in str(e.value) for word in ("step 2", "rank 0",
                                                         "transformer.h.1.mlp.c_fc.weight"))
    finally:
        train.backward = backward


def test_a_loss_that_is_passed_over_does_not_end_the_run_where_it_is_logged(
        data_dir, tmp_path, monkeypatch):
    """The loss of step 2 is not a number: its line says so, and the steps behind it follow."""
    steps, backward = [], train.backward

    def spoiled(*args):
        steps.append(1)
        return backward(*args) * (math.nan if len(steps) == 3 else 1)
    monkeypatch.setattr(train, "backward", spoiled)
    train.train(train_config(data_dir, tmp_path, skip_nonfinite=1))
    assert [math.isnan(line["loss"]) for line in read_lines(tmp_path / "log.jsonl")
            if "loss" in line] == [False, False, True, False]


def test_not_finite_is_one_sentence_for_the_user(data_dir, tmp_path):
    message = fails("train.py", *flags(TINY | {"max_iters": 50, "learning_rate": 1e30,
                                               "grad_clip": 0}), f"--data_dir={data_dir}",
                    f"--out_dir={tmp_path}/t")
    assert "finite" in message or "loss is" in message


# ---- many processes

def test_every_group_of_processes_gives_up_after_timeout_minutes(data_dir, tmp_path, monkeypatch):
    """Also that of the flags, at which all wait for each other in every step."""
    given = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("init_process_group", "new_group", "barrier"):
        monkeypatch.setattr(train.dist, name, lambda *args, name=name,
                            **rest: given.update({name: rest.get("timeout")}))
    runs.setup(SimpleNamespace(**train_config(data_dir, tmp_path, gradient_accumulation_steps=2,
                                              timeout_minutes=7.0)))
    assert given == {"init_process_group": timedelta(minutes=7), "new_group": timedelta(minutes=7),
                     "barrier": None}


RANKS = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch, torch.distributed as dist, train, train_search
from optim_nas import ArchOptimizer
from test_train import OPTIMIZERS, search_config, train_config
import run as runs
step, sizes = ArchOptimizer.step, []
def spy(self, weights, grads):
    step(self, weights, grads)
    mine = torch.cat([t.detach().reshape(-1) for t in (*self.alphas.values(), *weights.values())])
    every = [torch.zeros_like(mine) for _ in range(2)]
    dist.all_gather(every, mine)
    assert torch.equal(*every), "alphas or samples differ between the ranks"
ArchOptimizer.step = spy
for name, options in OPTIMIZERS.items():
    train_search.search(search_config({data!r}, {out!r} + "/" + name, max_iters=6,
                                      gradient_accumulation_steps=2, **options))
ready = train.configure_optimizer
def spy(net, config, run):
    optimizer = ready(net, config, run)
    update = optimizer.step
    def weigh(*args, **kwargs):
        update(*args, **kwargs)
        inner = getattr(optimizer, "optim", optimizer)
        held[config.zero_stage] = sum(t.numel() for s in inner.state.values() for t in s.values())
    optimizer.step = weigh
    return optimizer
held, train.configure_optimizer = {{}}, spy
for zero in (0, 1):
    config = train_config({data!r}, {out!r} + f"/zero{{zero}}", max_iters=6, zero_stage=zero,
                          gradient_accumulation_steps=2)
    train.train(config)
assert held[1] < 0.7 * held[0], held
train.configure_optimizer = ready
train.train(config | dict(max_iters=8, init_from="resume"))
"""


@pytest.fixture(scope="module")
def two_ranks(data_dir, tmp_path_factory):
    """All five searches, and a training with and without ZeRO, by two processes; the ranks' alphas
    and samples are compared on the way, and that ZeRO's share of the optimizer's state is about
    half."""
    out = tmp_path_factory.mktemp("ranks")
    program = out / "ranks.py"
    program.write_text(RANKS.format(root=str(ROOT), tests=str(ROOT / "tests"), data=data_dir,
                                    out=str(out)))
    succeeds("torchrun", "--standalone", "--nproc_per_node=2", str(program))
    return out


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_processes_are_one(name, two_ranks, data_dir, tmp_path):
    """Half of the micro-batches each: the curves, the alphas and the architecture of one process,
    up to rounding."""
    train_search.search(search_config(data_dir, tmp_path / name, gradient_accumulation_steps=2,
                                      max_iters=6, **OPTIMIZERS[name]))
    one, two = (read_lines(folder / name / "arch_traj.jsonl") for folder in (tmp_path, two_ranks))
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a["arch"] == b["arch"] and a["step"] == b["step"]
        for key in ("arch_loss", "mixture_loss", "val_arch_loss"):
            assert abs(a[key] - b[key]) < 2e-5
        for key in a.get("weights", {}):
            assert torch.allclose(torch.tensor(a["weights"][key]), torch.tensor(b["weights"][key]),
                                  atol=1e-5)
    one, two = ([line["loss"] for line in read_lines(folder / name / "log.jsonl") if "loss" in line]
                for folder in (tmp_path, two_ranks))
    assert one == pytest.approx(two, abs=2e-5)


def test_zero_gives_the_same_losses(two_ranks, data_dir, tmp_path):
    """With the optimizer's state shared out the losses stay; a run goes on with it, and on one
    process without it."""
    plain, zero = ([line for line in read_lines(two_ranks / name / "log.jsonl")
                    if 0 < line.get("step", 0) <= 6] for name in ("zero0", "zero1"))
    assert len(plain) == len(zero) > 6
    for a, b in zip(plain, zero, strict=True):
        for key in ("loss", "train_loss", "val_loss"):
            assert a.get(key) == pytest.approx(b.get(key), abs=1e-6)
    shutil.copytree(two_ranks / "zero0", tmp_path / "one")
    train.train(train_config(data_dir, tmp_path / "one", gradient_accumulation_steps=2, max_iters=8,
                             init_from="resume"))
    a, b = (torch.load(folder / "ckpt.pt", weights_only=True)["model"]
            for folder in (two_ranks / "zero1", tmp_path / "one"))
    assert all(torch.allclose(a[key], b[key], atol=1e-5) for key in a)


def test_a_rank_that_dies_ends_all_and_the_run_goes_on_with_another_number(data_dir, tmp_path):
    options = [*flags(TINY_SEARCH | {"gradient_accumulation_steps": 2, "save_interval": 1,
                                     "max_iters": 100000, "eval_interval": 50000}),
               f"--data_dir={data_dir}", f"--out_dir={tmp_path}/o"]
    process = start("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                    "train_search.py", *options)
    wait_for(process, "step 3/")
    workers = [int(pid) for pid in os.listdir("/proc")
               if pid.isdigit() and parent_of(pid) == process.pid]
    os.kill(max(workers), signal.SIGKILL)
    began = time.time()
    output = process.communicate(timeout=120)[0]
    assert process.returncode != 0 and time.time() - began < 90 and "Signal 9" in output
    step = torch.load(tmp_path / "o/ckpt.pt", weights_only=True)["state"]["step"]
    succeeds("train_search.py", *options, "--init_from=resume", f"--max_iters={step + 3}")
    assert read_json(tmp_path / "o/result.json")["steps"] == step + 3


def parent_of(pid):
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return None


def test_what_ends_one_process_is_said_without_a_traceback_of_the_others(data_dir, tmp_path):
    """An out_dir that the first one cannot make; the second waits for it. torchrun's own words
    follow."""
    (tmp_path / "file").write_text("in the way")
    done = run("torchrun", "--standalone", "--nproc_per_node=2", "train.py",
               *flags(TINY | {"gradient_accumulation_steps": 2}),
               f"--data_dir={data_dir}", f"--out_dir={tmp_path}/file/out")
    assert (done.returncode == 1 and "cannot be made" in done.stderr
            and "[rank1]: Traceback" not in done.stderr), done.stderr[-3000:]


def test_zero_on_one_process_is_one_sentence(data_dir, tmp_path):
    done = run("train.py", *flags(TINY), f"--data_dir={data_dir}", f"--out_dir={tmp_path}/o",
               "--zero_stage=1")
    assert done.returncode == 1 and "torchrun" in done.stderr and "Traceback" not in done.stderr


# ---- a run knows its own keys

OWN = { # trainer -> its options at tiny size, and what of them makes it longer
    "train.py": (TINY | dict(n_layer=2, n_head=2, n_embd=16, norm="rmsnorm"), "max_iters"),
    "train_search.py": (TINY_SEARCH | dict(optimizer="darts", norm=["rmsnorm"]), "max_iters"),
    "train_base.py": (TINY, "max_iters"),
    "train_search.py --space": (TINY_IMAGES | TINY_SPACES["toy_cell"] | dict(space="toy_cell"),
                                "max_iters"),
    "train_rl.py": (dict(budget=24, updates=24, algo="a2c", n_iterations=1, mode=1),
                    "n_iterations")}


@pytest.mark.parametrize("name", OWN)
def test_a_run_goes_on_by_its_out_dir_alone(name, data_dir, digits_dir, tmp_path, capsys):
    """With its own keys, space and data; what the command says wins, and stays said: the steps of
    one run, bit for bit."""
    options, key = OWN[name]
    trainer, more = name.split()[0], 2 * options[key]
    options = options | dict(data_dir=digits_dir if "space" in options else data_dir)
    if key == "max_iters":
        options |= dict(lr_decay_iters=more) # where the rate ends is the same
    if trainer == "train_base.py":
        options |= dict(arch=searched(data_dir, tmp_path))
    whole, parts = tmp_path / "whole", tmp_path / "its parts"
    script(trainer, *flags(options | {key: more}), f"--out_dir={whole}")
    script(trainer, *flags(options), f"--out_dir={parts}")
    alone = "--init_from=resume", f"--out_dir={parts}"
    script(trainer, *alone, f"--{key}={more}")
    for _ in range(2): # there is nothing left to do
        result = [read_json(out / "result.json") for out in (whole, parts)]
        for found in result:
            del found["out_dir"]
            found.pop("seconds", None)
        assert result[0] == result[1]
        if trainer != "train_rl.py": # test_rl.py knows how to compare an agent's
            assert state_of(whole) == state_of(parts)
        began = [read_json(out / "run.json")["config"] | {"out_dir": ""} for out in (whole, parts)]
        assert began[0] == began[1]
        script(trainer, *alone)
    assert "no longer a key" not in capsys.readouterr().out


def test_what_a_run_changes_of_its_keys_is_not_what_it_began_with(digits_dir, tmp_path):
    """A progressive search widens its network after half of the steps."""
    options = TINY_IMAGES | TINY_SPACES["darts"] | TINY_STAGES | dict(space="darts")
    script("train_search.py", *flags(options), f"--data_dir={digits_dir}", f"--out_dir={tmp_path}")
    begun = read_json(tmp_path / "run.json")
    for _ in range(2):
        script("train_search.py", "--init_from=resume", f"--out_dir={tmp_path}")
        assert read_json(tmp_path / "run.json") == begun
        assert runs.load_checkpoint(f"{tmp_path}/ckpt.pt", "cpu")["config"]["partial_channels"] == 1


def test_what_a_resumed_command_says_is_checked_as_ever(data_dir, digits_dir, tmp_path, capsys):
    """Keys, config files, and an out_dir that only running a config file would tell."""
    out, file = f"--out_dir={tmp_path}/t", tmp_path / "c.py"
    alone = "train.py", "--init_from=resume"
    script("train.py", *flags(TINY | dict(n_layer=2, n_head=2, n_embd=16)), out,
           f"--data_dir={data_dir}")
    before = {path.name: path.read_bytes() for path in (tmp_path / "t").iterdir()}
    assert "n_head=2, and this one has n_head=4" in stops(*alone, out, "--n_head=4")
    assert "max_iters=3 is below the 4 steps" in stops(*alone, out, "--max_iters=3")
    assert "space=nb201 is not gpt" in stops(*alone, out, "--space=nb201")
    assert "no key 'n_hed'" in stops(*alone, out, "--n_hed=4")
    assert "holds no run to resume" in stops(*alone, f"--out_dir={tmp_path}/u")
    for other in ("train_search.py", "train_base.py", "train_rl.py"):
        assert "holds a run of train.py, with which" in stops(other, alone[1], out)
    file.write_text("norm = 'rmsnorm'\n")
    assert "norm=layernorm, and this one has norm=rmsnorm" in stops(*alone, out, file)
    file.write_text(f"out_dir = str({str(tmp_path / 't')!r})\n")
    with pytest.MonkeyPatch.context() as patch: # else the default out_dir would hold no run
        patch.chdir(tmp_path)
        shutil.copytree(tmp_path / "t", tmp_path / "out/train")
        assert "give it as --out_dir=FOLDER" in stops(*alone, file)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "t").iterdir()}
    # a config file that says the folder and another key
    file.write_text(f"out_dir = {str(tmp_path / 't')!r}\nlearning_rate = 1e-4\n")
    script(*alone, file, "--max_iters=6")
    script("train.py", "--init_from=previous", out)
    assert read_json(tmp_path / "t/result.json")["steps"] == 6
    config = read_json(tmp_path / "t/run.json")["config"]
    assert (config["learning_rate"], config["max_iters"], config["init_from"]) == (1e-4, 6,
                                                                                   "scratch")


def test_the_command_names_the_architecture_of_a_resumed_training(data_dir, tmp_path):
    """By another of the three keys than it began with."""
    found, out = searched(data_dir, tmp_path), f"--out_dir={tmp_path}/b"
    script("train_base.py", *flags(TINY), f"--arch={found}", out)
    (tmp_path / "t.jsonl").write_text(json.dumps(json.loads(found.read_text())) + "\n")
    found.rename(tmp_path / "moved.json")
    alone = "train_base.py", "--init_from=resume", out, "--max_iters=6"
    assert "arch.json cannot be read" in stops(*alone)
    script(*alone, f"--arch_traj={tmp_path}/t.jsonl")
    script(*alone) # which then is the run's own
    assert read_json(tmp_path / "b/result.json")["steps"] == 6


def test_keys_of_another_version(data_dir, tmp_path, capsys):
    """One that is no more is told, and one of another type too, unless the command has it."""
    out = f"--out_dir={tmp_path}"
    script("train.py", *flags(TINY | dict(n_layer=2, n_head=2, n_embd=16)), out,
           f"--data_dir={data_dir}")
    begun = read_json(tmp_path / "run.json")
    begun["config"] |= {"of_old": 1, "grad_clip": "none"}
    del begun["config"]["momentum"], begun["config"]["identity"]
    write_json(tmp_path / "run.json", begun)
    assert "grad_clip takes a finite number" in stops("train.py", "--init_from=resume", out)
    capsys.readouterr()
    script("train.py", "--init_from=resume", out, "--grad_clip=1.0", "--max_iters=6")
    assert f"of_old: in {tmp_path}/run.json, but no longer a key\n" in capsys.readouterr().out
    config = read_json(tmp_path / "run.json")["config"]
    assert "of_old" not in config and config["momentum"] == 0.9 and config["identity"]


@pytest.mark.parametrize("content, words", [
    (None, "holds no run to resume"), ("{", "run.json is damaged, it is not JSON"),
    ('{"argv": []}', "run.json is damaged, it has no config"),
    ('{"config": {"norm": "layernorm"}, "sha256": "0"}', "run.json is not what was written")])
@pytest.mark.parametrize("trainer", ["train.py", "train_search.py", "train_base.py", "train_rl.py"])
def test_a_run_json_that_is_missing_or_damaged_is_one_sentence(trainer, content, words, tmp_path):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    assert words in stops(trainer, "--init_from=resume", f"--out_dir={tmp_path}")


def test_an_agent_starts_with_no_weights_of_others(tmp_path):
    """It would have gone on as if nothing had been asked for."""
    assert "init_from='gpt2' is not one of scratch, resume, previous" in stops(
        "train_rl.py", "--init_from=gpt2", f"--out_dir={tmp_path}/r")
    assert not (tmp_path / "r").exists()


# ---- the data of a run

def with_other_characters(data_dir, other):
    """A copy of the data with as many characters, of which each id means another."""
    shutil.copytree(data_dir, other)
    meta = read_json(other / "pydocs/meta.json")
    write_json(other / "pydocs/meta.json", meta | {"chars": meta["chars"][::-1]})
    return other


OTHER_DATA = {"characters": with_other_characters, "text": with_other_val}


@pytest.mark.parametrize("differs", OTHER_DATA)
def test_a_run_goes_on_with_its_own_data_alone(differs, data_dir, tmp_path):
    """Other data of the same shape are one sentence, for every trainer, before its first checkpoint
    and after it; a run of a version that knew no identity goes on."""
    other = OTHER_DATA[differs](data_dir, tmp_path / "other")
    found = searched(data_dir, tmp_path)
    runs = {"train": (train.train, train_config(data_dir, tmp_path / "train")),
            "search": (train_search.search, search_config(data_dir, tmp_path / "search")),
            "base": (train_base.train_found, base_config(data_dir, tmp_path / "base", found))}
    words = (f"has learned on {data_dir}/pydocs, from which {other}/pydocs as it is now differs in "
             f"its {differs}: ")
    for name, (go, config) in runs.items():
        go(config)
        early = killed_early(tmp_path / name, tmp_path / f"{name} early")
        for change in (dict(init_from="resume"), dict(init_from="previous"), early):
            config = config | change | dict(data_dir=str(other), max_iters=6)
            folder = Path(config["out_dir"])
            before = {path.name: path.read_bytes() for path in folder.iterdir()}
            with pytest.raises(SystemExit, match=re.escape(words)) as e:
                go(config)
            assert "\n" not in str(e.value)
            assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    moved = shutil.copytree(data_dir, tmp_path / "moved") # the same data in another place
    train.train(runs["train"][1] | dict(data_dir=str(moved), init_from="resume", max_iters=6))
    begun = read_json(tmp_path / "train/run.json")
    del begun["config"]["identity"]
    write_json(tmp_path / "train/run.json", begun)
    train.train(runs["train"][1] | dict(data_dir=str(other), init_from="resume", max_iters=8))


def test_an_agent_goes_on_with_its_own_data_alone(data_dir, tmp_path):
    """Of its evaluations: a data set, or a table."""
    options = dict(budget=4, updates=4, algo="a2c", evaluator="supernet", supernet_iters=2,
                   shards=2, entries=[5, 40], test_entries=10, block_size=16, head_size=2,
                   batch_size=2, seeds=[1], time_from="flops", cache_dir=tmp_path / "cache",
                   data_dir=shutil.copytree(data_dir, tmp_path / "data"), out_dir=tmp_path / "r")
    script("train_rl.py", *flags(options))
    alone = "train_rl.py", "--init_from=resume", f"--out_dir={tmp_path}/r", "--n_iterations=2"
    with_other_characters(tmp_path / "data", tmp_path / "other")
    assert "differs in its characters" in stops(*alone, f"--data_dir={tmp_path}/other")
    table = tmp_path / "table.csv"
    lines = (ROOT / "assets/heads_layers.csv").read_text().splitlines(keepends=True)
    table.write_text("".join(lines))
    script("train_rl.py", "--algo=random", "--budget=4", f"--out_dir={tmp_path}/t",
           f"--table={table}")
    table.write_text("".join([lines[0], *lines[:0:-1]]))
    assert "differs in its table" in stops("train_rl.py", "--init_from=resume",
                                           f"--out_dir={tmp_path}/t")


def test_weights_go_where_their_ids_mean_the_same(data_dir, tmp_path, capsys):
    """From a search, from a training, and into samples: other characters are one sentence, another
    text is fine-tuning, which is told."""
    letters = with_other_characters(data_dir, tmp_path / "letters")
    text = with_other_val(data_dir, tmp_path / "text")
    found = searched(data_dir, tmp_path)
    train.train(train_config(data_dir, tmp_path / "train"))
    for go, config in ((train_base.train_found,
                        base_config(data_dir, tmp_path / "o", found, init_from=str(found.parent))),
                       (train.train, train_config(data_dir, tmp_path / "o", max_iters=0,
                                                  init_from=str(tmp_path / "train")))):
        with pytest.raises(SystemExit, match="differs in its characters: give data whose ids") as e:
            go(config | {"data_dir": str(letters)})
        assert "\n" not in str(e.value) and not (tmp_path / "o").exists()
        capsys.readouterr()
        for folder, times in ((text, 1), (data_dir, 0)):
            go(config | {"data_dir": str(folder), "overwrite": True})
            line = f"its weights have learned on other text, {data_dir}/pydocs\n"
            assert capsys.readouterr().out.count(line) == times
        shutil.rmtree(tmp_path / "o")
    shutil.copytree(letters, tmp_path / "data") # the data set of a run is made anew in its place
    train.train(train_config(str(tmp_path / "data"), tmp_path / "o"))
    shutil.copy(f"{data_dir}/pydocs/meta.json", tmp_path / "data/pydocs/meta.json")
    assert "differs in its characters: prepare the data as" in stops("sample.py",
                                                                     f"--out_dir={tmp_path}/o")


def test_a_network_of_images_starts_from_a_training_too(digits_dir, tmp_path, capsys):
    """Where classes mean the same; so must those of a teacher, and of inherited weights."""
    options = TINY_IMAGES | TINY_SPACES["mobilenetv3"] | TINY_LARGEST
    options |= dict(data_dir=digits_dir, space="mobilenetv3")
    script("train.py", *flags(options), f"--out_dir={tmp_path}/a")
    script("train.py", *flags(options | dict(learning_rate=0, min_lr=0)), f"--out_dir={tmp_path}/b",
           f"--init_from={tmp_path}/a")
    a, b = (runs.load_checkpoint(f"{tmp_path}/{name}/best.pt", "cpu") for name in "ab")
    assert b["step"] == 0 and all(torch.equal(w, b["model"][name]) for name, w in a["model"].items()
                                  if "running" not in name and "num_batches" not in name)
    other = shutil.copytree(digits_dir, tmp_path / "data")
    meta = read_json(other / "digits/meta.json")
    write_json(other / "digits/meta.json", meta | {"classes": meta["classes"][::-1]})
    new = [*flags(options | dict(data_dir=other)), f"--out_dir={tmp_path}/c"]
    assert "differs in its classes" in stops("train.py", *new, f"--init_from={tmp_path}/a")
    for key in ("teacher", "inherit"):
        said = stops("train_search.py", *new, "--optimizer=spos", "--depth=[1,2]",
                     "--kernel_size=[3,5]", "--expand=[2,3]", f"--{key}={tmp_path}/a")
        assert f"{key}='{tmp_path}/a' has learned on" in said and "in its classes" in said
    assert "a space of images has --inherit" in stops(
        "train_search.py", *flags(options), f"--init_from={tmp_path}/a", f"--out_dir={tmp_path}/c")


@pytest.mark.parametrize("change, differs", [
    ({}, None), (dict(classes=["no", *map(str, range(1, 10))]), "classes"),
    (dict(img_size=16), "image size"), (dict(in_channels=3), "image size"),
    (dict(train_labels_sha256="0"), "images"), (dict(val_sha256="0"), "images")])
def test_the_identity_of_images(change, differs, digits_dir, tmp_path):
    check_identity(change, differs, digits_dir, "digits", tmp_path)


@pytest.mark.parametrize("change, differs", [({}, None), (dict(scale=3), "scale"),
                                             (dict(train_sha256="0"), "images")])
def test_the_identity_of_pairs(change, differs, digits_dir, tmp_path):
    check_identity(change, differs, digits_dir, "sr_samples_x2", tmp_path)


def check_identity(change, differs, data_dir, name, folder):
    (folder / name).mkdir()
    shutil.copy(f"{data_dir}/{name}/meta.json", folder / name)
    write_json(folder / name / "meta.json", read_json(folder / name / "meta.json") | change)
    ours = SimpleNamespace(identity=identity(str(folder), name))
    theirs = {"identity": json.loads(json.dumps(identity(data_dir, name)))}
    assert runs.different_data(ours, theirs, ("meaning", "content")) == differs


def test_the_identity_of_text_has_the_files_of_its_tokenizer(data_dir, tmp_path):
    data = shutil.copytree(data_dir, tmp_path / "data")
    for name in ("tokenizer.model", "tokenizer.json"):
        (data / "pydocs" / name).write_text("one")
    before = {"identity": identity(str(data), "pydocs")}
    for name in ("tokenizer.model", "tokenizer.json"):
        (data / "pydocs" / name).write_text("another")
        ours = SimpleNamespace(identity=identity(str(data), "pydocs"))
        assert runs.different_data(ours, before, ("meaning",)) == name
        (data / "pydocs" / name).write_text("one")


def test_every_kind_tells_a_run_its_identity(data_dir, digits_dir):
    for kind, config in ((Images, dict(data_dir=digits_dir, dataset="digits")),
                         (Pairs, dict(data_dir=digits_dir, dataset="sr_samples", scale=2))):
        facts = kind.load(SimpleNamespace(**config))[1]
        folder = config["dataset"] + ("_x2" if "scale" in config else "")
        assert facts["identity"] == identity(digits_dir, folder)


@pytest.mark.parametrize("change, right", [
    ({}, True), (dict(dataset="text", source="notes.txt (5 bytes)", train_sha256="0"), True),
    (dict(source="documentation of Python 3.12.3", train_sha256="0"), False),
    (dict(train_sha256="0"), False), # of a Python 3.11.7 that a distributor changed
    (dict(train_sha256="0", seed=1), True), (dict(train_sha256="0", val_fraction=0.2), True),
    (dict(train_sha256="0", tokenizer="gpt2"), True),
    (dict(source="documentation of Python 3.12.3", train_sha256="0", seed=1), False),
    (dict(dataset="this_python", source="documentation of Python 3.12.3"), True)])
def test_a_pydocs_of_an_older_version_is_not_used(change, right, data_dir, tmp_path):
    """It was made from the Python that ran; one of another seed, share or tokenizer, or one's own
    under that name, is legitimate."""
    data = shutil.copytree(data_dir, tmp_path / "data")
    meta = read_json(data / "pydocs/meta.json")
    meta |= dict(dataset="pydocs", source=PYDOCS_SOURCE, train_sha256=PYDOCS_TRAIN) | change
    write_json(data / "pydocs/meta.json", meta)
    for name in ("pydocs", "pydocs/5/00"):
        if right:
            check_pydocs(str(data), name)
            continue
        with pytest.raises(SystemExit, match=r"delete that folder, or .* --dataset=this_python"):
            check_pydocs(str(data), name)
    check_pydocs(str(data), "another")
    if not right:
        tokens = (data / "pydocs/train.bin").read_bytes()
        write_json(data / "pydocs/meta.json", meta | {"train_sha256": bytes_hash(tokens)})
        with pytest.raises(SystemExit, match="as this repository has it"):
            train.train(train_config(str(data), tmp_path / "t"))


# ---- wandb

WANDB = """
import json
class Run:
    def log(self, numbers): pass
    def finish(self): pass
def init(**kwargs):
    with open({path!r}, "a") as f:
        f.write(json.dumps(kwargs) + "\\n")
    return Run()
"""


def test_wandb_goes_on_in_the_same_run(data_dir, tmp_path, monkeypatch):
    """A resumed run has the id and the name of before, also one that asks for wandb only then; a
    new run in the same folder has another id. The module stands in for the package."""
    (tmp_path / "wandb.py").write_text(WANDB.format(path=str(tmp_path / "inits.jsonl")))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    config = train_config(data_dir, tmp_path / "t", wandb_log=True)
    train.train(config | dict(wandb_run_name="mine"))
    script("train.py", "--init_from=resume", f"--out_dir={tmp_path}/t", "--max_iters=6")
    train.train(config | dict(overwrite=True))
    train.train(config | dict(out_dir=str(tmp_path / "u"), wandb_log=False))
    for steps in (6, 8):
        train.train(config | dict(out_dir=str(tmp_path / "u"), init_from="resume",
                                  max_iters=steps))
    inits = read_lines(tmp_path / "inits.jsonl")
    assert all(found["resume"] == "allow" and found["project"] == "nas" for found in inits)
    assert [found["name"] for found in inits] == ["mine", "mine", f"{tmp_path}/t",
                                                  *[f"{tmp_path}/u"] * 2]
    a, b, c, d, e = [found["id"] for found in inits]
    assert a == b and d == e and len({a, c, d}) == 3
    monkeypatch.delitem(sys.modules, "wandb")


def test_no_json_of_ours_is_unsealed(data_dir, tmp_path):
    """What is written can be told from what was changed: run.json, arch.json, result.json,
    meta.json and every line of a trajectory."""
    train_search.search(search_config(data_dir, tmp_path / "s"))
    for path in (*(tmp_path / "s").glob("*.json"), Path(data_dir) / "pydocs/meta.json"):
        assert "sha256" in json.loads(path.read_text()), path
    assert all("sha256" in line for line in read_lines(tmp_path / "s/arch_traj.jsonl"))
