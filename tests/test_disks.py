"""Disks that have no hard links, no locks and cannot cut a file; and two runs that want the same
folder."""
import errno
import fcntl
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, flags
from test_survival import start, state_of, wait_for
from test_train import train_config

import run as runs
import train
from run import read_lines


def refuse(number):
    """A function of the system that a disk does not have."""
    def refused(*args):
        raise OSError(number, os.strerror(number))
    return refused


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_disk_without_links_and_locks_is_as_good(number, data_dir, tmp_path, monkeypatch):
    """exFAT, FUSE, cloud drives: a run, a resume and a resume from the checkpoint before it end in
    the state of a run elsewhere."""
    whole = train_config(data_dir, tmp_path / "whole", save_interval=1, max_iters=6,
                         lr_decay_iters=6)
    poor = whole | dict(out_dir=str(tmp_path / "poor"))
    train.train(whole)
    for module, name in ((os, "link"), (os, "truncate"), (fcntl, "flock")):
        monkeypatch.setattr(module, name, refuse(number))
    train.train(poor | dict(max_iters=4))
    train.train(poor | dict(init_from="resume"))
    assert state_of(tmp_path / "poor") == state_of(tmp_path / "whole")
    (tmp_path / "poor/ckpt.pt").write_bytes(b"damaged")
    train.train(poor | dict(init_from="previous"))
    assert state_of(tmp_path / "poor") == state_of(tmp_path / "whole")
    assert not list((tmp_path / "poor").glob("*.tmp"))


def test_a_checkpoint_is_written_once_where_there_are_links(data_dir, tmp_path):
    """The ckpt.pt before it gets a second name, and its bytes stay where they are."""
    config = train_config(data_dir, tmp_path, eval_interval=100, max_iters=1)
    train.train(config)
    number = (tmp_path / "ckpt.pt").stat().st_ino
    train.train(config | dict(init_from="resume", max_iters=2))
    assert (tmp_path / "ckpt.prev.pt").stat().st_ino == number
    step = [runs.load_checkpoint(str(tmp_path / name), "cpu")["state"]["step"]
            for name in ("ckpt.prev.pt", "ckpt.pt")]
    assert step == [1, 2]


def test_a_folder_in_use_takes_no_other_run(data_dir, tmp_path):
    """Not a new one, a resume, nor one that would replace it. Killed, it is gone on with."""
    options = flags(TINY | dict(max_iters=100000, eval_interval=50000, save_interval=5, n_layer=2,
                                n_head=2, n_embd=16, mlp_ratio=2.0, data_dir=data_dir,
                                out_dir=tmp_path / "o"))
    process = start("train.py", *options)
    try:
        wait_for(process, "step 10/")
        config = train_config(data_dir, tmp_path / "o")
        for changes, words in ((dict(init_from="resume"), "is in use by another run, which"),
                               (dict(init_from="previous"), "is in use by another run"),
                               (dict(overwrite=True), "is in use by another run"),
                               ({}, "holds another run")):
            with pytest.raises(SystemExit, match=words) as refused:
                train.train(config | changes)
            assert "\n" not in str(refused.value) and process.poll() is None
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    saved = runs.load_checkpoint(str(tmp_path / "o/ckpt.pt"), "cpu")["state"]["step"]
    train.train(config | dict(init_from="resume", max_iters=saved + 2))
    steps = [line["step"] for line in read_lines(tmp_path / "o/log.jsonl") if "lr" in line]
    assert steps == list(range(1, saved + 3))


AT_ONCE = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import train
from test_train import train_config
config = train_config({data!r}, {out!r}, max_iters=30)
print("ready", flush=True)
sys.stdin.readline()
train.train(config)
"""


def test_of_two_runs_that_start_at_once_one_is_refused(data_dir, tmp_path):
    """In one sentence; the other one's files are those of one run."""
    for attempt in range(3):
        out = tmp_path / str(attempt)
        program = AT_ONCE.format(root=str(ROOT), tests=str(ROOT / "tests"), data=data_dir,
                                 out=str(out))
        pair = [subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, text=True,
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
        for process in pair:
            assert process.stdout.readline() == "ready\n"
        for process in pair:
            process.stdin.write("go\n")
            process.stdin.flush()
        said = [process.communicate(timeout=120)[1].strip() for process in pair]
        codes = [process.returncode for process in pair]
        assert sorted(codes) == [0, 1], said
        sentence = said[codes.index(1)]
        assert "in use by another run" in sentence or "holds another run" in sentence
        assert "\n" not in sentence
        steps = [line["step"] for line in read_lines(out / "log.jsonl") if "lr" in line]
        assert steps == list(range(1, 31))
