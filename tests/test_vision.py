"""Searches and trainings in search_spaces/, on real images: the whole path, and the laws of
splits, BatchNorms, resuming and tables."""
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (NOT_OF_PAIRS, ROOT, TINY_EVALS, TINY_IMAGES, TINY_SPACES, TINY_STAGES, flags,
                      script, stops, succeeds)
from test_survival import state_of
from test_train import OPTIMIZERS

import data
import run as runs
import search_spaces
import train
import train_base
import train_search
from analyze import search_figure
from budget import read_table
from configurator import ConfigError, defaults, usage
from data import load_images
from budget import architectures
from optim_nas import uniform
from prepare import prepare
from run import read_json, read_lines, rng, add_checksum, verify_checksum
from search_spaces import build, space_module, with_space

# networks, of toy_conv_macro
FOUR = dict(channels_1=[2, 4], channels_2=[4, 8], channels_3=4, channels_4=4, kernel_size=3)


def space_config(module, space, data_dir, out_dir, **rest):
    """The keys of a script for a space, at tiny size, on digits."""
    evals = TINY_EVALS if module is train_search else {}
    return (defaults(with_space(dict(vars(module)), space)) | TINY_IMAGES | TINY_SPACES[space] |
            evals |
            dict(data_dir=data_dir, out_dir=str(out_dir)) | rest)


def search_config(space, *places, **rest):
    return space_config(train_search, space, *places, **rest)


def parts(config):
    """What a search works with: its config, run and splits, and the supernet."""
    config = SimpleNamespace(**config)
    run = runs.setup(config)
    splits, _ = train_search.split_data(config, run)
    return config, run, splits, build(vars(config))


@contextlib.contextmanager
def signalled(module, name, when):
    """SIGTERM after the call of module.name for whose arguments when() is true, as a user would
    send it; the run must end by it."""
    def call(*args, **rest):
        result = real(*args, **rest)
        if when(*args):
            os.kill(os.getpid(), signal.SIGTERM)
        return result
    real = getattr(module, name)
    setattr(module, name, call)
    try:
        with pytest.raises(SystemExit) as e:
            yield
    finally:
        setattr(module, name, real)
    assert e.value.code == 128 + signal.SIGTERM

# ---- the whole path

@pytest.mark.parametrize("method", OPTIMIZERS)
@pytest.mark.parametrize("space", TINY_SPACES)
def test_every_method_searches_every_space(space, method, digits_dir, tmp_path):
    """Each writes its files, and train_base.py trains what it found: the network of the search,
    from scratch."""
    result = train_search.search(search_config(space, digits_dir, tmp_path / "s",
                                               **OPTIMIZERS[method]))
    found, lines = read_json(tmp_path / "s/arch.json"), read_lines(tmp_path / "s/arch_traj.jsonl")
    assert [line["step"] for line in lines] == [0, 2, 4, *([4] if method == "spos" else [])]
    # sealed, and whole
    assert all(line == add_checksum(verify_checksum(line, "")) for line in lines)
    best = min(lines, key=lambda line: line["arch_loss"])
    assert verify_checksum(best, "") == found
    assert found["space"] == space and result["arch"] == found["arch"]
    quality = "psnr" if space == "swinir" else "acc"
    assert all(0 <= line[f"{part}_{quality}"] <= 100
               for line in lines for part in ("arch", "val_arch"))
    assert (read_json(tmp_path / "s/result.json") == result
            and Path(search_figure(str(tmp_path / "s"))).stat().st_size > 10000)
    assert not list(tmp_path.rglob("*.tmp"))

    not_its = NOT_OF_PAIRS if space == "swinir" else ("dataset",)
    tiny = {key: value for key, value in TINY_IMAGES.items() if key not in not_its}
    script("train_base.py", f"--arch={tmp_path}/s/arch.json", f"--out_dir={tmp_path}/b",
           *flags(tiny))
    trained = read_json(tmp_path / "b/result.json")
    config, cost = read_json(tmp_path / "b/run.json")["config"], found["cost"]
    assert (trained["params"], trained["flops"]) == (cost["params"], cost["flops"])
    assert trained["arch"] == found["arch"]
    assert (0 <= trained[f"test_{quality}"] <= 100 and 0 <= trained[f"best_val_{quality}"] <= 100
            and trained["steps"] == 4)
    assert {key: config[key] for key in found["model"]} == found["model"]
    assert config["data_dir"] == digits_dir


def test_a_key_of_the_space_overrides_the_search(digits_dir, tmp_path):
    train_search.search(search_config("nb201", digits_dir, tmp_path / "s", max_iters=2))
    script("train_base.py", f"--arch_traj={tmp_path}/s/arch_traj.jsonl", "--n_cell=2",
           f"--out_dir={tmp_path}/b", *flags(TINY_IMAGES))
    config = read_json(tmp_path / "b/run.json")["config"]
    last = read_lines(tmp_path / "s/arch_traj.jsonl")[-1]
    assert (config["n_cell"], config["init_channels"]) == (2, 4)
    assert read_json(tmp_path / "b/result.json")["arch"] == last["arch"]


def test_a_network_of_images_writes_no_text(digits_dir, tmp_path):
    train_base.train_found(space_config(train_base, "nb201", digits_dir, tmp_path,
                                        genotype=GENOTYPE.replace("none", "skip_connect")))
    said = stops("sample.py", f"--out_dir={tmp_path}")
    assert "holds a network of nb201, which writes no text" in said


def test_a_genotype_is_trained(digits_dir, tmp_path):
    text = "|nor_conv_3x3~0|+|none~0|nor_conv_1x1~1|+|skip_connect~0|none~1|nor_conv_3x3~2|"
    script("train_base.py", "--space=nb201", f"--genotype={text}", f"--out_dir={tmp_path}/b",
           f"--data_dir={digits_dir}",
           *flags(TINY_IMAGES | TINY_SPACES["nb201"]))
    cell = ["nor_conv_3x3", "none", "nor_conv_1x1", "skip_connect", "none", "nor_conv_3x3"]
    assert read_json(tmp_path / "b/result.json")["arch"] == {"cell": cell}


@pytest.fixture(scope="module")
def large_images(tmp_path_factory):
    """Digits of 96 x 96."""
    folder = tmp_path_factory.mktemp("large")
    prepare(dataset="digits", data_dir=str(folder), img_size=96)
    return str(folder)


@pytest.mark.parametrize("space", ["darts", "nb201"])
def test_large_images_pass_imagenets_stem(space, large_images, digits_dir, tmp_path):
    """Without a word, from the search to the export; what was found there has the other stem on
    small images. Its file of before there were stems is whole."""
    train_search.search(search_config(space, large_images, tmp_path / "s"))
    found = read_json(tmp_path / "s/arch.json")
    for data_dir in (large_images, digits_dir):
        script("train_base.py", f"--arch={tmp_path}/s/arch.json", f"--data_dir={data_dir}",
               f"--out_dir={tmp_path}/b", "--overwrite=True", *flags(TINY_IMAGES))
        checkpoint = torch.load(tmp_path / "b/best.pt", weights_only=True)
        net = build(checkpoint["config"], checkpoint["arch"])
        net.load_state_dict(checkpoint["model"])
        strides = [m.stride[0] for m in net.stem.modules() if isinstance(m, torch.nn.Conv2d)]
        assert set(strides) == {2 if data_dir == large_images else 1}
        if data_dir == large_images:
            assert net.cost() == found["cost"] and checkpoint["config"]["stem"] == ""
            if space == "nb201": # whose export is short
                script("export.py", f"--out_dir={tmp_path}/b")
            del found["model"]["stem"]
            (tmp_path / "old.json").write_text(json.dumps(found))
            assert train_base.read_arch(f"{tmp_path}/old.json", "")["arch"] == found["arch"]


@pytest.mark.parametrize("space", TINY_SPACES)
@pytest.mark.parametrize("name", ["train", "train_search", "train_base"])
def test_help_of_a_space_lists_its_keys(name, space):
    module, keys = {"train": train, "train_search": train_search,
                    "train_base": train_base}[name], vars(space_module(space))
    lines = usage(with_space(dict(vars(module)), space)).splitlines()
    for key, value in defaults(keys).items():
        line = next(line for line in lines if line.startswith(f"{key} = "))
        assert str(value) in line, line
        assert "  #" in line or key.startswith(("channels_", "last_")), line
    names = [line.split(" = ")[0] for line in lines]
    assert (f"space = '{space}'" in "\n".join(lines) and "residual" not in names
            and "block_size" not in names)

# ---- resuming, and several processes

STOPS = {"swinir drnas": ("swinir", dict(optimizer="drnas"), 5),
         "nb201 drnas": ("nb201", dict(optimizer="drnas"), 5),
         "darts gdas": ("darts", dict(optimizer="gdas"), 3),
         "before stage 2": ("nb201", dict(optimizer="drnas", **TINY_STAGES), 3),
         "at stage 2": ("nb201", dict(optimizer="drnas", **TINY_STAGES), 4),
         "in stage 2": ("nb201", dict(optimizer="drnas", **TINY_STAGES), 6)}
LONG = dict(max_iters=8, eval_interval=4, crop=1, flip=True, weight_optimizer="sgd")


@pytest.mark.parametrize("stop", STOPS)
def test_a_resumed_search_is_one_that_was_not_stopped(stop, digits_dir, tmp_path):
    """Stopped by a signal after some steps: losses, alphas, statistics, architecture and
    checkpoint are those of one run."""
    space, options, steps = STOPS[stop]
    config = search_config(space, digits_dir, tmp_path / "whole", **LONG | options)
    train_search.search(config)
    with signalled(train_search, "train_step", lambda *args: args[6].step == steps - 1):
        train_search.search(config | {"out_dir": str(tmp_path / "parts")})
    assert torch.load(tmp_path / "parts/ckpt.pt", weights_only=True)["state"]["step"] == steps
    train_search.search(config | {"out_dir": str(tmp_path / "parts"), "init_from": "resume"})
    assert state_of(tmp_path / "whole") == state_of(tmp_path / "parts")


def test_a_search_over_inherited_weights_is_resumed(digits_dir, tmp_path):
    config = search_config("nats_size", digits_dir, tmp_path / "whole", optimizer="spos")
    train_search.search(config)
    with signalled(train_search, "append", lambda path, line: line.get("evaluation") == 3):
        train_search.search(config | {"out_dir": str(tmp_path / "parts")})
    assert len(read_lines(tmp_path / "parts/arch_search.jsonl")) == 3
    train_search.search(config | {"out_dir": str(tmp_path / "parts"), "init_from": "resume"})
    assert state_of(tmp_path / "whole") == state_of(tmp_path / "parts")


def test_a_resumed_training_is_one_that_was_not_stopped(digits_dir, tmp_path):
    arch = uniform(build(search_config("darts", "", "")).choices, rng(0))
    config = space_config(train, "darts", digits_dir, tmp_path / "whole", **LONG, drop_path=0.5)
    train.train(config, arch)
    with signalled(train, "train_step", lambda *args: args[6].step == 4):
        train.train(config | {"out_dir": str(tmp_path / "parts")}, arch)
    train.train(config | {"out_dir": str(tmp_path / "parts"), "init_from": "resume"}, arch)
    assert state_of(tmp_path / "whole") == state_of(tmp_path / "parts")


@pytest.mark.parametrize("space, method", [("nb201", "drnas"), ("nb201", "gdas"),
                                           ("darts", "darts")])
def test_the_second_stage_keeps_some_operations_and_widens(space, method, digits_dir, tmp_path):
    train_search.search(search_config(space, digits_dir, tmp_path / "s", optimizer=method,
                                      **TINY_STAGES))
    lines = read_lines(tmp_path / "s/arch_traj.jsonl")
    for line in lines:
        second = line["step"] > 2 # the switch is after the evaluation at half of the steps
        assert line["model"]["partial_channels"] == (1 if second else 2)
        for name, weights in line["weights"].items():
            left = torch.tensor(weights) > 0
            assert (left.sum(-1) == (2 if second else left.size(-1))).all()
            for row, op in zip(left, line["arch"][name], strict=True):
                assert op == "none" or row[line["options"][name].index(op)], f"{op} has been pruned"
    checkpoint = torch.load(tmp_path / "s/ckpt.pt", weights_only=True)
    net = build(checkpoint["config"])
    measured = {name: net.state_dict()[name].shape for name in checkpoint["model"]}
    assert measured == {name: value.shape for name, value in checkpoint["model"].items()}
    assert len(measured) < len(net.state_dict())
    assert read_json(tmp_path / "s/arch.json")["step"] > 2


def test_the_alphas_of_a_second_stage_rest_once(digits_dir, tmp_path):
    """A progressive search that goes on for more steps is in its second half already, and does not
    wait for half of the new ones."""
    config = search_config("nb201", digits_dir, tmp_path, **TINY_STAGES)
    alphas = []
    for steps, start in ((4, "scratch"), (16, "resume")):
        train_search.search(config | dict(max_iters=steps, init_from=start))
        chooser = torch.load(tmp_path / "ckpt.pt", weights_only=True)["chooser"]
        alphas.append(chooser["optimizer"]["state"][0]["step"].item())
    assert alphas[0] == 4 - 2 * config["arch_warmup_iters"] and alphas[1] == alphas[0] + 12


RANKS = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import train, train_search, train_base
from test_vision import TWO, search_config, space_config
import run as runs
import data
import data
import search_spaces
train_search.search(search_config("nb201", {data!r}, {out!r} + "/s", **TWO))
train_base.train_found(space_config(train_base, "nb201", {data!r}, {out!r} + "/b", arch={found!r},
                                    **TWO))
"""
TWO = dict(gradient_accumulation_steps=2, max_iters=6, crop=1, flip=True, cutout=2)


def test_two_processes_find_what_one_finds(digits_dir, tmp_path):
    """Half of the micro-batches each: losses, accuracies, alphas and the architecture, and the
    training of it."""
    train_search.search(search_config("nb201", digits_dir, tmp_path / "s", **TWO))
    places = dict(root=str(ROOT), tests=str(ROOT / "tests"), data=digits_dir,
                  found=str(tmp_path / "s/arch.json"))
    (tmp_path / "ranks.py").write_text(RANKS.format(**places, out=str(tmp_path / "two")))
    succeeds("torchrun", "--standalone", "--nproc_per_node=2", str(tmp_path / "ranks.py"))
    train_base.train_found(space_config(train_base, "nb201", digits_dir, tmp_path / "b",
                                        arch=places["found"], **TWO))
    for name in ("s/arch_traj.jsonl", "s/log.jsonl", "b/log.jsonl"):
        one, two = (read_lines(folder / name) for folder in (tmp_path, tmp_path / "two"))
        assert len(one) == len(two) and one
        for a, b in zip(one, two, strict=True):
            for key in a.keys() - {"ms", "images_per_s", "sha256"}:
                if isinstance(a[key], float):
                    expected = pytest.approx(b[key], abs=1e-5)
                    assert a[key] == expected, f"{name}: {key} at step {a['step']}"
                elif key in ("weights", "entropy"):
                    for choice, rows in a[key].items():
                        torch.testing.assert_close(torch.tensor(rows), torch.tensor(b[key][choice]),
                                                   atol=1e-5, rtol=0)
                else:
                    assert a[key] == b[key], f"{name}: {key}"

# ---- data

def spied(monkeypatch, go):
    """{size of a part of the data: (its images that the network saw, whether each batch was
    augmented)}."""
    seen, real = {}, data.get_images

    def spy(data, index, device="cpu", **change):
        x, y = real(data, index, device, **change)
        images, augmented = seen.setdefault(len(data), (set(), []))
        images |= {data.pixels[i].tobytes() for i in index.tolist()}
        augmented.append(not torch.equal(x, real(data, index)[0]))
        return x, y
    monkeypatch.setattr(data, "get_images", spy)
    go()
    return seen


def test_the_splits_share_no_image_and_only_train_is_augmented(digits_dir, tmp_path, monkeypatch):
    """In a search: the weights' images, the alphas', and those that are only reported; each epoch
    shows all but the last few."""
    config = search_config("toy_conv_macro", digits_dir, tmp_path / "s", train_portion=0.6,
                           batch_size=36, max_iters=60, crop=1, flip=True,
                           cutout=3, eval_interval=60)
    seen = spied(monkeypatch, lambda: train_search.search(config))
    whole = {image.tobytes() for image in load_images(digits_dir, "digits", "train").pixels}
    assert len(whole) == 1438 # all are different
    (weights, changed), (alphas, unchanged), (val, unchanged_too) = (
        seen[n] for n in (862, 576, 359))
    assert len(weights) > 850 and len(alphas) > 570 and not weights & alphas
    assert weights | alphas < whole and not val & whole
    assert all(changed) and len(changed) >= 60
    assert not any(unchanged + unchanged_too) and len(unchanged) >= 60


def test_train_base_augments_only_what_it_trains_on(digits_dir, tmp_path, monkeypatch):
    config = space_config(train, "nb201", digits_dir, tmp_path / "t", val_portion=0.25, crop=1,
                          flip=True)
    arch = {"cell": ["nor_conv_3x3"] * 6}
    seen = spied(monkeypatch, lambda: train.train(config, arch, test=True))
    (trained, changed), (val, unchanged) = (seen[n] for n in (1079, 359))
    assert not trained & val and any(changed) and not any(unchanged)


@pytest.fixture(scope="module")
def few_dir(tmp_path_factory):
    """Digits of which ten validate."""
    folder, draw = tmp_path_factory.mktemp("few"), np.random.default_rng(0)
    arrays = {}
    for split, n in (("train", 64), ("test", 10)):
        arrays[f"x_{split}"] = draw.integers(256, size=(n, 8, 8), dtype=np.uint8)
        arrays[f"y_{split}"] = np.arange(n) % 10
    np.savez(folder / "few.npz", **arrays)
    prepare(dataset="images", path=str(folder / "few.npz"), name="few", data_dir=str(folder))
    return str(folder)


def test_what_is_only_evaluated_may_be_smaller_than_a_batch(few_dir, tmp_path):
    """Ten images of val count once each; and so do those that val_portion leaves to val."""
    keys = dict(dataset="few", batch_size=16)
    train_search.search(search_config("nb201", few_dir, tmp_path / "s", **keys))
    for test in (False, True):
        config = space_config(train, "nb201", few_dir, tmp_path / f"t{test}",
                              val_portion=0.1 * test, **keys)
        result = train.train(config, {"cell": ["nor_conv_3x3"] * 6}, test=test)
    accuracy = result["test_acc"] / 10
    assert accuracy == pytest.approx(round(accuracy)) # of ten images


def test_a_split_without_a_whole_batch_is_named(few_dir, tmp_path):
    """And the batch_size that the sentence names is taken."""
    arch, words = {"cell": ["nor_conv_3x3"] * 6}, r"choose --batch_size=(\d+) or less"
    base = space_config(train, "nb201", few_dir, tmp_path / "t", dataset="few", batch_size=65)
    wide = search_config("nb201", few_dir, tmp_path / "s", dataset="few", batch_size=40,
                         train_portion=0.7)
    for go, config, name, n in ((lambda config: train.train(config, arch), base, "train", 64),
                                (train_search.search, wide, "search", 20)):
        with pytest.raises(SystemExit, match=f"The {name} split of few has {n} images and ") as e:
            go(config)
        size = int(re.search(words, str(e.value))[1])
        assert "\n" not in str(e.value) and size == n
        go(config | dict(batch_size=size))
    with pytest.raises(SystemExit, match="The val split of few has 0 images and needs 1"):
        train.train(base | dict(batch_size=8, val_portion=0.001, overwrite=True), arch)


def listed(sentence):
    return [int(n) for n in re.search("choose one of ([0-9, ]+)", sentence)[1].split(", ")]


def patch_sizes(sentence):
    return [dict(patch_size=n) for n in listed(sentence)]


def window_sizes(sentence):
    return [dict(window_size=n) for n in listed(sentence)]


@pytest.mark.parametrize("space, keys, fixes", [
    *(("autoformer", dict(img_size=n, patch_size=16), patch_sizes) for n in (1, 17, 24, 28, 49)),
    ("swinir", dict(window_size=1), window_sizes), ("swinir", dict(window_size=3), window_sizes),
    ("swinir", dict(window_size=16), window_sizes),
    ("swinir", dict(window_size=8, tile=12), window_sizes),
    ("swinir", dict(tile=7), lambda _: [dict(tile=8)]),
    ("swinir", dict(tile=-8), lambda _: [dict(tile=0)]),
    ("swinir", dict(patch=1), lambda _: [dict(patch=2, window_size=2)]),
    ("toy_cell", dict(img_size=4), lambda _: [dict(img_size=5)]),
    ("toy_conv_macro", dict(img_size=3), lambda _: [dict(img_size=4)]),
    *(("toy_conv_macro", dict(img_size=n, last_kernel_size=5),
       lambda _: [dict(last_kernel_size=3, last_padding=1)]) for n in (4, 8)),
    ("darts", dict(img_size=16, auxiliary=0.4), lambda _: [dict(auxiliary=0.0)]),
    ("nb201", dict(init_channels=3, partial_channels=2), lambda _: [dict(init_channels=4)])])
def test_the_fix_that_a_sentence_names_works(space, keys, fixes):
    """The network is built, trains and evaluates."""
    def go(**keys):
        keys = dict(space=space, img_size=8, in_channels=3, num_classes=10) | keys
        arch = uniform(build(keys | dict(auxiliary=0.0)).choices, rng(0))
        net = build(keys, arch)
        side = keys.get("patch", keys["img_size"])
        x = torch.rand(2, 3, side, side)
        y = torch.rand(2, 3, 2 * side, 2 * side) if space == "swinir" else torch.tensor([0, 1])
        net(x, y)[1].backward()
        net.eval()(x)
    keys = TINY_SPACES[space] | keys
    with pytest.raises(SystemExit) as e:
        go(**keys)
    assert "\n" not in str(e.value)
    for fix in fixes(str(e.value)):
        go(**keys | fix)

# ---- evaluation

@pytest.mark.parametrize("space", ["darts", "mobilenetv3", "nats_size", "nb201", "toy_cell"])
def test_a_score_does_not_depend_on_what_was_evaluated_before(space, digits_dir, tmp_path):
    """The statistics of the BatchNorms are measured anew for each architecture: they are the mean
    over training batches by hand."""
    config, run, splits, net = parts(search_config(space, digits_dir, tmp_path, batch_size=32))
    a, b = (uniform(net.choices, rng(i)) for i in range(2))
    before = train_search.score(net, net, a, splits, config, run)
    assert train_search.score(net, net, b, splits, config, run) != before
    assert train_search.score(net, net, a, splits, config, run) == before
    norms = [module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.running_mean.fill_(3.0)
        norm.running_var.fill_(7.0)
    assert train_search.score(net, net, a, splits, config, run) == before
    small = net.extract(a) # alone it has the same statistics, by their definition
    first = next(module for module in small.modules() if isinstance(module, torch.nn.BatchNorm2d))
    means, hook = [], first.register_forward_pre_hook(
        lambda module, args: means.append(args[0].mean((0, 2, 3))))
    measured = first.running_mean.clone()
    with torch.no_grad():
        for i in range(config.bn_batches):
            small.train()(splits["train"].batch(config, "train", i)[0])
    hook.remove()
    torch.testing.assert_close(measured, torch.stack(means).mean(0), atol=1e-5, rtol=1e-5)


def by_hand(net, images):
    """(loss, accuracy in %) over all images."""
    x = torch.from_numpy((images.pixels - images.mean) / images.std).permute(0, 3, 1, 2)
    with torch.no_grad():
        logits = net.eval()(x)[0].double().numpy()
    right = sum(logits[i].argmax() == label for i, label in enumerate(images.labels))
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return -np.log(chances[range(len(images)), images.labels]).mean(), 100 * right / len(images)


def test_accuracies_are_counts(digits_dir, tmp_path):
    """What train_base.py reports of val and test, and a search of an architecture, are what a
    count by hand gives."""
    arch = {"cell": ["nor_conv_3x3", "none", "skip_connect", "avg_pool_3x3", "nor_conv_1x1",
                     "nor_conv_3x3"]}
    config = space_config(train, "nb201", digits_dir, tmp_path / "t", max_iters=30,
                          eval_interval=15, val_portion=0.1, eval_iters=100,
                          learning_rate=1e-2)
    result = train.train(config, arch, test=True)
    checkpoint = torch.load(tmp_path / "t/best.pt", weights_only=True)
    net = build(checkpoint["config"], checkpoint["arch"])
    net.load_state_dict(checkpoint["model"])
    test, whole = (load_images(digits_dir, "digits", split) for split in ("val", "train"))
    loss, accuracy = by_hand(net, test)
    assert result["test_acc"] == pytest.approx(accuracy) and accuracy > 20
    assert result["test_loss"] == pytest.approx(loss, abs=1e-4)
    loss, accuracy = by_hand(net, whole.part(1438 - 143, 1438))
    assert (result["best_val_acc"] == pytest.approx(accuracy)
            and checkpoint["losses"]["val_loss"] == pytest.approx(loss, abs=1e-4))

    config, run, splits, net = parts(search_config("nb201", digits_dir, tmp_path, eval_iters=100))
    found = train_search.score(net, net, arch, splits, config, run)[0]
    loss, accuracy = by_hand(net.extract(arch), splits["search"])
    assert found == {"loss": pytest.approx(loss, abs=1e-4),
                     "acc": pytest.approx(accuracy)} and len(splits["search"]) == 719


def test_an_evaluation_never_drops_or_counts_the_second_classifier(tmp_path):
    """The published trainings of darts, on digits of 32 x 32: both change what is trained, and
    neither what is measured of it."""
    prepare(dataset="digits", data_dir=str(tmp_path), img_size=32)
    arch = uniform(build(search_config("darts", "", "")).choices, rng(0))
    states = {}
    for name, options in {"plain": {}, "auxiliary": dict(auxiliary=0.4),
                          "drop": dict(drop_path=0.9)}.items():
        result = train.train(space_config(train, "darts", str(tmp_path), tmp_path / name, **options,
                                          eval_iters=45), arch)
        checkpoint = torch.load(tmp_path / name / "ckpt.pt", weights_only=True)
        states[name], net = checkpoint["model"], build(checkpoint["config"], arch)
        net.load_state_dict(checkpoint["model"])
        loss = by_hand(net, load_images(str(tmp_path), "digits", "val"))[0]
        assert result["val_loss"] == pytest.approx(loss, abs=1e-4)
    heads = {key for key in states["auxiliary"] if key.startswith("auxiliary")}
    assert (heads and states["auxiliary"].keys() - heads == states["plain"].keys() ==
            states["drop"].keys())
    for other in ("auxiliary", "drop"):
        assert not torch.equal(states["plain"]["stem.0.weight"], states[other]["stem.0.weight"])


def test_a_supernet_neither_drops_nor_has_a_second_classifier(digits_dir, tmp_path):
    lines = []
    for i, options in enumerate(({}, dict(auxiliary=0.4, drop_path=0.5))):
        train_search.search(search_config("darts", digits_dir, tmp_path / str(i), max_iters=2,
                                          **options))
        lines.append([line["arch_loss"]
                      for line in read_lines(tmp_path / str(i) / "arch_traj.jsonl")])
    assert lines[0] == lines[1]

# ---- optimizers

@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_what_decays(name):
    """Every parameter is in one group. Under adamw biases and norms do not decay, under the others
    all do, as published for images."""
    config = SimpleNamespace(**search_config("nb201", "", "", weight_optimizer=name, nesterov=True,
                                             momentum=0.8, beta1=0.7, beta2=0.6,
                                             weight_decay=0.01, learning_rate=0.1))
    net = build(vars(config))
    optimizer = train.configure_optimizer(net, config, SimpleNamespace(device_type="cpu"))
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(decay)
    assert len(decay) == len(list(net.parameters()))
    for key, p in net.named_parameters():
        assert decay[p] == (0.0 if name == "adamw" and p.dim() < 2 else 0.01), key
    assert type(optimizer) is {"sgd": torch.optim.SGD, "adam": torch.optim.Adam,
                               "adamw": torch.optim.AdamW}[name]
    group = optimizer.param_groups[0]
    if name == "sgd":
        assert (group["momentum"], group["nesterov"]) == (0.8, True)
    else:
        assert group["betas"] == (0.7, 0.6)


def test_a_step_of_sgd_is_nesterovs(digits_dir, tmp_path):
    """v = m v + g + decay p; p = p - lr (g + decay p + m v), twice, on a real batch, the gradient
    clipped."""
    config, run, splits, net = parts(search_config("nb201", digits_dir, tmp_path,
                                                   weight_optimizer="sgd", nesterov=True,
                                                   momentum=0.8,
                                                   weight_decay=0.01, grad_clip=0.1))
    arch, v = uniform(net.choices, rng(0)), {}
    optimizer = train.configure_optimizer(net, config, run)
    state = SimpleNamespace(step=0, skipped=0)
    for state.step in range(2):
        expected = {}
        batches = train.micro_batches(splits["train"], config, run, "train", state.step)
        train.backward(net, [(x, y, arch) for x, y in batches], run)
        params = {name: p for name, p in net.named_parameters() if p.grad is not None}
        norm = sum(p.grad.square().sum() for p in params.values()).sqrt()
        assert norm > 0.1
        for name, p in params.items():
            g = p.grad * 0.1 / norm + 0.01 * p.detach()
            v[name] = 0.8 * v[name] + g if name in v else g
            expected[name] = p.detach() - 0.3 * (g + 0.8 * v[name])
        net.zero_grad()
        train.train_step(net, net, optimizer, splits["train"], config, run, state, 0.3, (arch,))
        for name, p in params.items():
            torch.testing.assert_close(p.detach(), expected[name], atol=1e-5, rtol=1e-4)

# ---- tables

def table_options(digits_dir, path, **rest):
    return ["--space=toy_conv_macro", *flags(TINY_IMAGES | TINY_SPACES["toy_conv_macro"] | FOUR |
                                             dict(max_iters=2, seeds=[1, 2]) | rest),
            f"--table={path}", f"--data_dir={digits_dir}"]


@pytest.fixture(scope="module")
def table(digits_dir, tmp_path_factory):
    """A table of four networks with two seeds each."""
    path = tmp_path_factory.mktemp("table") / "whole.csv"
    script("train_base.py", *table_options(digits_dir, path))
    return path


def test_a_table_holds_every_network_once_a_seed(table, digits_dir, tmp_path):
    config = space_config(train, "toy_conv_macro", digits_dir, tmp_path / "t", **FOUR)
    net, module, rows = build(config), space_module("toy_conv_macro"), read_table(str(table))
    archs = list(architectures(net.choices))
    wanted = {(*map(str, module.columns(arch).values()), str(seed)) for arch in archs
              for seed in (1, 2)}
    assert len(archs) == 4 and len(rows) == 8
    assert {tuple(row.values())[:9] for row in rows} == wanted
    columns = "c1 c2 c3 c4 k1 k2 k3 k4 seed test_acc test_loss train_loss params flops"
    assert list(rows[0]) == columns.split()
    row = next(row for row in rows if (row["c1"], row["c2"], row["seed"]) == ("4", "4", "2"))
    arch = {"channels_1": 4, "channels_2": 4, "channels_3": 4, "channels_4": 4,
            "kernel_size": [3] * 4}
    result = train.train(config | dict(seed=2, max_iters=2, val_portion=0.1, learning_rate=2e-3,
                                       min_lr=2e-4), arch, test=True)
    for key in ("test_acc", "test_loss", "train_loss", "params", "flops"):
        # a row is a plain training
        assert float(row[key]) == pytest.approx(result[key], abs=1e-4), key
    assert os.listdir(table.parent) == ["whole.csv"]


def test_an_interrupted_table_goes_on(table, digits_dir, tmp_path):
    steps = []
    # the fourth network
    with signalled(train, "train_step", lambda *args: steps.append(1) or len(steps) == 7):
        script("train_base.py", *table_options(digits_dir, tmp_path / "parts.csv"))
    assert len(read_table(str(tmp_path / "parts.csv"))) == 3
    assert os.listdir(tmp_path) == ["parts.csv"]
    script("train_base.py", *table_options(digits_dir, tmp_path / "parts.csv"))
    assert (tmp_path / "parts.csv").read_bytes() == table.read_bytes()
    assert os.listdir(tmp_path) == ["parts.csv"]
    steps.clear()
    # nothing is left to do
    script("train_base.py", *table_options(digits_dir, tmp_path / "parts.csv"))
    assert (tmp_path / "parts.csv").read_bytes() == table.read_bytes()


def test_two_processes_may_take_a_seed_each(table, digits_dir, tmp_path):
    command = [sys.executable, "train_base.py", *table_options(digits_dir, tmp_path / "two.csv")]
    both = [subprocess.Popen([*command, f"--seeds=[{seed}]"], cwd=ROOT, stderr=subprocess.PIPE,
                             text=True) for seed in (1, 2)]
    errors = [process.communicate(timeout=200)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    lines = (tmp_path / "two.csv").read_text().splitlines()
    assert (sorted(lines) == sorted(table.read_text().splitlines()) and lines[0].startswith("c1,")
            and os.listdir(tmp_path) == ["two.csv"])


def test_a_table_is_a_benchmark(table, digits_dir, tmp_path):
    """Its accuracies, ranks and regrets are in the log, the trajectory and the result of a search,
    and change nothing else."""
    for name, options in {"with": dict(benchmark=str(table)), "without": {}}.items():
        train_search.search(search_config("toy_conv_macro", digits_dir, tmp_path / name, **FOUR,
                                          **options))
    module, rows = space_module("toy_conv_macro"), read_table(str(table))
    for line in [*read_lines(tmp_path / "with/arch_traj.jsonl"),
                 read_json(tmp_path / "with/result.json")]:
        columns = {key: str(value) for key, value in module.columns(line["arch"]).items()}
        mean = np.mean([float(row["test_acc"]) for row in rows if row.items() >= columns.items()])
        assert (line["table_accuracy"] == pytest.approx(mean) and line["table_of"] == 4
                and line["table_regret"] >= 0)
    lines, others = (read_lines(tmp_path / name / "arch_traj.jsonl")
                     for name in ("with", "without"))
    for line, other in zip(lines, others, strict=True):
        assert line.keys() - other.keys() == {
            f"table_{key}" for key in ("accuracy", "rank", "of", "percentile", "regret")}
        assert all(line[key] == other[key] for key in other if key != "sha256")
    assert any("table_rank" in line for line in read_lines(tmp_path / "with/log.jsonl"))

# ---- mistakes

def test_one_image_has_no_statistics(digits_dir, tmp_path):
    """Where the maps end at 1 x 1: batches of one are one sentence, and one image that is left
    over is no batch of an evaluation."""
    options = dict(stem_stride=2, strides=[4, 1], max_iters=1, eval_iters=9)
    with pytest.raises(ConfigError,
                       match=r"more than one value a channel, .* give a larger batch_size"):
        train_search.search(search_config("mobilenetv3", digits_dir, tmp_path / "one", **options,
                                          batch_size=1))
    config = search_config("mobilenetv3", digits_dir, tmp_path / "left", **options, batch_size=359)
    assert len(parts(config)[2]["search"]) == 2 * 359 + 1
    assert train_search.search(config)["steps"] == 1


def test_a_share_of_the_optimizers_state_is_not_widened(digits_dir, tmp_path):
    """It was left behind without a word."""
    config = SimpleNamespace(**search_config("toy_cell", digits_dir, tmp_path, **TINY_STAGES))
    net = search_spaces.build(vars(config) | dict(img_size=8, in_channels=1, num_classes=10))
    train_search.check_stages(net, config)
    config.zero_stage = 1
    with pytest.raises(SystemExit, match=r"widen_to=1 copies .* zero_stage=1"):
        train_search.check_stages(net, config)


GENOTYPE = "|none~0|+|none~0|none~1|+|none~0|none~1|none~2|"
MISTAKES = {
    "unknown space": ("train_search.py", ["--space=nb301"], ["nb301", "nb201", "search_spaces/"]),
    "unknown space of a training": ("train.py", ["--space=nb301"], ["nb301", "nb201"]),
    "a key of the GPT": ("train_search.py", ["--space=nb201", "--n_head=4"], ["n_head"]),
    "a key of a space": ("train_search.py", ["--n_cell=4"], ["n_cell"]),
    "a space without its architecture": ("train.py", ["--space=nb201", "--batch_size=8"],
                                         ["space=nb201", "cell", "train_base.py"]),
    "unknown genotype": ("train_base.py", ["--space=nb201", "--genotype=all of them"],
                         ["all of them", "nor_conv_3x3"]),
    "unknown operation": ("train_base.py", ["--space=nb201", "--genotype=" +
                                            GENOTYPE.replace("none~2", "conv_7x7~2")],
                          ["conv_7x7"]),
    "unknown operation of darts": ("train_base.py", ["--space=darts", "--genotype=DARTS_V3"],
                                   ["DARTS_V3"]),
    "no space": ("train_base.py", [f"--genotype={GENOTYPE}"], ["--space"]),
    "two architectures": ("train_base.py", ["--arch=arch.json", "--arch_traj=arch_traj.jsonl"],
                          ["several"]),
    "pruning what has no operations": ("train_search.py",
                                       ["--space=toy_conv_macro", "--prune_keep=2"],
                                       ["prune_keep=2", "cells"]),
    "pruning without alphas": ("train_search.py", ["--space=nb201", "--prune_keep=2",
                                                   "--optimizer=spos"], ["prune_keep=2", "spos"]),
    "pruning all but one": ("train_search.py", ["--space=nb201", "--prune_keep=1"],
                            ["prune_keep=1", "5"]),
    "pruning more than there are": ("train_search.py", ["--space=nb201", "--prune_keep=6"],
                                    ["prune_keep=6", "5"]),
    "widening without pruning": ("train_search.py", ["--space=nb201", "--partial_channels=2",
                                                     "--widen_to=1"], ["widen_to=1 needs"]),
    "narrowing": ("train_search.py", ["--space=nb201", "--prune_keep=2", "--partial_channels=2",
                                      "--widen_to=4"], ["widen_to=4", "2"]),
    "channels that do not divide": ("train_search.py", ["--space=nb201", "--partial_channels=3"],
                                    ["partial_channels=3", "4 channels"]),
    "widening to what does not divide": ("train_search.py",
                                         ["--space=nb201", "--prune_keep=2", "--partial_channels=4",
                                          "--widen_to=3"],
                                         ["partial_channels=3", "4 channels"]),
    "a large batch": ("train_search.py", ["--space=nb201", "--batch_size=1000"],
                      ["batch_size=1000", "719"]),
    "text for a space": ("train_search.py", ["--space=nb201", "--dataset=words"],
                         ["words", "text", "images"]),
    "images for the GPT": ("train_search.py", ["--dataset=digits", "--batch_size=4"],
                           ["digits", "images", "text"]),
    "compiling every architecture": ("train_search.py",
                                     ["--space=nb201", "--compile=True", "--optimizer=gdas"],
                                     ["compile=True", "gdas"]),
    "a benchmark of the GPT": ("train_search.py", ["--dataset=words", "--benchmark=table.csv",
                                                   "--block_size=16", "--window=0"],
                               ["table.csv", "cannot be read"]),
    "a table of the GPT": ("train_base.py", ["--table=TABLE", "--dataset=words"],
                           ["table", "a search's --arch"]),
    "a table of half a seed": ("train_base.py", ["--space=toy_conv_macro", "--table=TABLE",
                                                 "--seeds=[1,2.5]"], ["seeds=[1, 2.5]"]),
    "a table without end": ("train_base.py", ["--space=darts", "--table=TABLE", "--n_layer=3"],
                            ["TABLE", "darts", "too many"]),
    "a table where none can be": ("train_base.py", ["--space=toy_conv_macro",
                                                    "--table=words/train.bin/x.csv"],
                                  ["words/train.bin/x.csv"]),
    "a table of something else": ("train_base.py", ["--space=toy_conv_macro", "--table=other.csv"],
                                  ["other.csv", "test_acc"]),
}


@pytest.fixture(scope="module")
def both_kinds(digits_dir, data_dir, tmp_path_factory):
    """A folder of images and of text."""
    folder = tmp_path_factory.mktemp("both")
    shutil.copytree(f"{digits_dir}/digits", folder / "digits")
    shutil.copytree(f"{data_dir}/pydocs", folder / "words")
    (folder / "other.csv").write_text("heads,layers,loss\n1,1,3.2\n")
    return folder


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_sentence_and_leaves_no_run(case, both_kinds, tmp_path, monkeypatch):
    name, args, words = MISTAKES[case]
    monkeypatch.chdir(both_kinds)
    files = sorted(both_kinds.rglob("*"))
    space = next((arg.split("=")[1] for arg in args if arg.startswith("--space")), "")
    tiny = {key: value for key, value in (TINY_IMAGES | TINY_SPACES.get(space, {})).items()
            if f"--{key}" not in " ".join(args)}
    if not space:
        tiny = dict(device="cpu", max_iters=2)
    message = stops(name, f"--data_dir={both_kinds}", f"--out_dir={tmp_path}/o", *flags(tiny),
                    *args)
    assert all(word in message for word in words), message
    assert not (tmp_path / "o").exists() and sorted(both_kinds.rglob("*")) == files


@pytest.mark.parametrize("change, words", [
    (lambda a: a | {"model": a["model"] | {"init_channels": "four"}}, ["init_channels"]),
    (lambda a: a | {"model": {key: value for key, value in a["model"].items() if key != "n_cell"}},
     ["n_cell"]),
    (lambda a: a | {"model": a["model"] | {"primitives": "none"}}, ["primitives"]),
    (lambda a: a | {"model": a["model"] | {"primitives": ["none", 3]}}, ["primitives"]),
    (lambda a: a | {"model": a["model"] | {"primitives": []}}, ["primitives"]),
    (lambda a: a | {"model": []}, ["model"]),
    (lambda a: a | {"space": "nb301"}, ["nb301"]),
    (lambda a: a | {"space": 3}, ["space"]),
    (lambda a: a | {"arch": {"cell": ["none"] * 5}}, ["cell"]),
    (lambda a: a | {"arch": {"cell": ["none"] * 5 + ["nor_conv_9x9"]}}, ["nor_conv_9x9"]),
    (lambda a: a | {"arch": {"normal": []}}, ["normal"])])
def test_a_damaged_architecture_is_one_sentence(change, words, digits_dir, tmp_path):
    keys = defaults(vars(space_module("nb201"))) | TINY_SPACES["nb201"]
    whole = {"space": "nb201", "arch": {"cell": ["none"] * 6}, "model": keys, "dataset": "digits",
             "data_dir": digits_dir}
    (tmp_path / "arch.json").write_text(json.dumps(change(whole)))
    message = stops("train_base.py", f"--arch={tmp_path}/arch.json", f"--out_dir={tmp_path}/o")
    assert all(word in message for word in words) and not (tmp_path / "o").exists(), message
    # a change after the fact is seen, too
    (tmp_path / "arch.json").write_text(json.dumps(add_checksum(whole) | change(whole)))
    assert "damaged" in stops("train_base.py", f"--arch={tmp_path}/arch.json",
                              f"--out_dir={tmp_path}/o")


def test_an_architecture_of_another_space_is_one_sentence(digits_dir, tmp_path):
    train_search.search(search_config("nb201", digits_dir, tmp_path / "s", max_iters=1))
    found = f"--arch={tmp_path}/s/arch.json"
    for space in ("darts", "gpt"):
        message = stops("train_base.py", found, f"--space={space}", f"--out_dir={tmp_path}/o",
                        *flags(TINY_IMAGES))
        assert f"space='{space}'" in message and "nb201" in message
