"""The trainers: the whole path on real text, and the laws of seeds, splits, resuming and keeping
the best."""
import functools
import itertools
import json
import math
import shlex
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, TINY_SEARCH, fails, flags, succeeds
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.tensorflow_stub.io.gfile import LocalFileSystem

import sample
import train
import train_base
import train_search
from configurator import defaults
from data import Tokens, bytes_hash, get_batch, load_tokens
from model import build
from optim_nas import METHODS
from run import read_json, read_lines, add_checksum, write_json
import run as runs
import optim_nas

OPTIMIZERS = {"darts": dict(optimizer="darts"), "darts2": dict(optimizer="darts", order=2),
              "drnas": dict(optimizer="drnas"),
              "gdas": dict(optimizer="gdas"), "spos": dict(optimizer="spos")}


def search_config(data_dir, out_dir, **rest):
    places = dict(data_dir=data_dir, out_dir=str(out_dir))
    return defaults(vars(train_search)) | TINY_SEARCH | places | rest


def train_config(data_dir, out_dir, **rest):
    sizes = dict(n_layer=2, n_head=2, n_embd=16, mlp_ratio=2.0)
    places = dict(data_dir=data_dir, out_dir=str(out_dir))
    return defaults(vars(train)) | TINY | sizes | places | rest


def base_config(data_dir, out_dir, found, **rest):
    places = dict(data_dir=data_dir, out_dir=str(out_dir), arch=str(found))
    return defaults(vars(train_base)) | TINY | places | rest


def with_other_val(data_dir, other):
    """A copy of the data whose val.bin is shuffled, as if it had been prepared so."""
    shutil.copytree(data_dir, other)
    meta = read_json(other / "pydocs/meta.json")
    tokens = np.fromfile(other / "pydocs/val.bin", meta["dtype"])
    tokens = np.random.default_rng(0).permutation(tokens)
    tokens.tofile(other / "pydocs/val.bin")
    write_json(other / "pydocs/meta.json", meta | {"val_sha256": bytes_hash(tokens)})
    return other


def losses(out_dir):
    """Every logged number but the times."""
    times = ("ms", "tokens_per_s")
    return [{key: value for key, value in line.items() if key not in times}
            for line in read_lines(Path(out_dir) / "log.jsonl")]


def test_tensorboard_has_every_number_at_the_end(data_dir, tmp_path, monkeypatch):
    """Its writer has a thread of its own, that must be done when train() returns: whoever then
    deletes the folder finds it whole."""
    append = LocalFileSystem.append
    # a slow disk
    monkeypatch.setattr(LocalFileSystem, "append", lambda *args, **kwargs: time.sleep(0.01)
                        or append(*args, **kwargs))
    train.train(train_config(data_dir, tmp_path, tensorboard=True))
    lines = [line for line in read_lines(tmp_path / "log.jsonl") if "lr" in line]
    logged = EventAccumulator(str(tmp_path)).Reload()
    for key in ("loss", "lr", "ms"):
        steps, values = [line["step"] for line in lines], [line[key] for line in lines]
        assert steps == list(range(1, TINY["max_iters"] + 1))
        assert [event.step for event in logged.Scalars(key)] == steps
        assert [event.value for event in logged.Scalars(key)] == pytest.approx(values, rel=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_whole_path(name, data_dir, tmp_path):
    """Search, retrain, sample: the commands of a user, with each optimizer, on real text."""
    out = succeeds("train_search.py", f"config/{name}.py", *flags(TINY_SEARCH),
                   f"--data_dir={data_dir}", f"--out_dir={tmp_path}/s")
    next_command = next(line for line in out.splitlines() if line.startswith("next: "))
    assert next_command == f"next: python train_base.py --arch={tmp_path}/s/arch.json"
    found = json.loads((tmp_path / "s/arch.json").read_text())
    out = succeeds(*next_command.split()[2:], *flags(TINY | {"block_size": 0}),
                   f"--out_dir={tmp_path}/b")
    result = json.loads((tmp_path / "b/result.json").read_text())
    assert result["params"] == found["cost"]["params"] and result["test_loss"] < 5
    assert "next: python sample.py" in out
    assert "---" in succeeds("sample.py", f"--out_dir={tmp_path}/b", "--max_new_tokens=12",
                             "--num_samples=1", "--device=cpu")
    for file in ("run.json", "log.jsonl", "arch_traj.jsonl", "ckpt.pt", "result.json",
                 "search.png"):
        assert (tmp_path / "s" / file).stat().st_size > 0
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_seed_decides_everything_and_best_is_kept(name, data_dir, tmp_path):
    results = [train_search.search(search_config(data_dir, tmp_path / str(i), seed=seed,
                                                 dropout=0.1, **OPTIMIZERS[name]))
               for i, seed in enumerate((1, 1, 2))]
    logs = [losses(tmp_path / str(i)) for i in range(3)]
    assert logs[0] == logs[1] and logs[0] != logs[2]
    trajectory = read_lines(tmp_path / "0/arch_traj.jsonl")
    best = min(trajectory, key=lambda line: line["arch_loss"])
    assert (json.loads((tmp_path / "0/arch.json").read_text()) == best ==
            add_checksum(read_json(tmp_path / "0/arch.json")))
    assert results[0]["arch"] == best["arch"]
    assert [line["step"] for line in trajectory][:3] == [0, 2, 4]
    for line in trajectory:
        assert line["gap"] == pytest.approx(line["arch_loss"] - line["mixture_loss"])
        assert math.isfinite(line["val_arch_loss"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_val_bin_decides_nothing(name, data_dir, tmp_path):
    """Another val.bin changes what is reported of it, and neither the weights nor the
    architecture."""
    other = with_other_val(data_dir, tmp_path / "data")
    for i, folder in enumerate((data_dir, other)):
        train_search.search(search_config(str(folder), tmp_path / str(i), **OPTIMIZERS[name]))
    (a, b), seen = ([[line for line in losses(tmp_path / str(i))] for i in (0, 1)]), set()
    for one, two in zip(a, b, strict=True):
        seen |= {key for key in one if one[key] != two[key]}
    assert seen == {"val_arch_loss"}


def test_train_base_tests_on_what_nothing_else_touched(data_dir, tmp_path):
    found = train_search.search(search_config(data_dir, tmp_path / "s"))
    assert found["arch"]
    other = with_other_val(data_dir, tmp_path / "data")
    results = [train_base.train_found(base_config(str(folder), tmp_path / str(i),
                                                  tmp_path / "s/arch.json"))
               for i, folder in enumerate((data_dir, other))]
    a, b = (torch.load(tmp_path / str(i) / "best.pt", weights_only=True)["model"] for i in (0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert (results[0]["val_loss"] == results[1]["val_loss"]
            and results[0]["test_loss"] != results[1]["test_loss"])


def test_test_loss_is_the_mean_over_every_token(data_dir, tmp_path):
    config = train_config(data_dir, tmp_path / "t", val_portion=0.1)
    result = train.train(config, test=True)
    checkpoint = torch.load(tmp_path / "t/best.pt", weights_only=True)
    net = build(checkpoint["config"])
    net.load_state_dict(checkpoint["model"])
    val = torch.from_numpy(load_tokens(data_dir, "pydocs", "val").astype(np.int64))
    n = (len(val) - 1) // 16 * 16
    with torch.no_grad():
        whole = net(val[:n].view(-1, 16), val[1:n + 1].view(-1, 16))[1] * n
        rest = net(val[None, n:-1],
                   val[None, n + 1:])[1] * (len(val) - 1 - n) if n < len(val) - 1 else 0
    assert result["test_loss"] == pytest.approx(((whole + rest) / (len(val) - 1)).item(), rel=1e-5)


def test_alphas_and_weights_never_meet(data_dir, tmp_path):
    """No alpha in the weight optimizer, no weight in the arch optimizer, and each step moves its
    own side alone."""
    config = SimpleNamespace(**search_config(data_dir, tmp_path / "s", optimizer="drnas"))
    run = runs.setup(config)
    splits, _ = train_search.split_data(config, run)
    net = build(vars(config))
    arch_optimizer = METHODS["drnas"](net.choices, runs.rng(0))
    weights, state = train.configure_optimizer(net, config, run), SimpleNamespace(step=0, skipped=0)
    in_weights = {id(p) for group in weights.param_groups for p in group["params"]}
    in_chooser = {id(p) for group in arch_optimizer.optimizer.param_groups for p in group["params"]}
    assert in_weights == {id(p) for p in net.parameters()}
    assert in_chooser == {id(a) for a in arch_optimizer.alphas.values()}
    assert not in_weights & in_chooser

    w0 = [p.clone() for p in net.parameters()]
    a0 = {k: a.clone() for k, a in arch_optimizer.alphas.items()}
    train_search.arch_step(net, net, arch_optimizer, splits, config, run, state)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), w0, strict=True))
    assert all(p.grad is None for p in net.parameters())
    for key, alpha in arch_optimizer.alphas.items():
        moved = (alpha != a0[key]).reshape(-1, alpha.shape[-1])
        assert moved.any(-1).all(), f"a row of {key} got no gradient: {moved}"
    a1 = {k: a.clone() for k, a in arch_optimizer.alphas.items()}
    sampled = train_search.to_device(arch_optimizer.sample(0, runs.rng(1)), run)
    train.train_step(net, net, weights, splits["train"], config, run, state, config.learning_rate,
                     [sampled])
    assert all(torch.equal(a, a1[k]) for k, a in arch_optimizer.alphas.items())
    assert not all(map(torch.equal, net.parameters(), w0))


@pytest.mark.parametrize("optimizer", ["darts", "drnas"])
def test_every_alpha_that_can_matter_gets_a_gradient(optimizer):
    """Row by row, for both head conventions: d loss / d weights is not zero for any layer and any
    choice."""
    for head_size in (0, 8):
        torch.manual_seed(0)
        space = dict(n_layer=[1, 2, 3], n_head=[1, 2], n_embd=[8, 16], mlp_ratio=[1, 2])
        net = build(dict(block_size=8, vocab_size=20, head_size=head_size) | space)
        arch_optimizer = METHODS[optimizer](net.choices, runs.rng(0))
        leaves = {k: w.detach().requires_grad_()
                  for k, w in arch_optimizer.sample(0, runs.rng(1)).items()}
        x = torch.randint(20, (4, 8))
        net(x, x.roll(-1, 1), leaves)[1].backward()
        for name, leaf in leaves.items():
            # a constant does not move a softmax
            spread = leaf.grad - leaf.grad.mean(-1, keepdim=True)
            assert (spread.abs().sum(-1) > 0).all(), f"{name}: {leaf.grad}"


def test_the_split_shares_out_train_bin(data_dir, tmp_path):
    config = SimpleNamespace(**search_config(data_dir, tmp_path / "s", train_portion=0.7))
    splits, _ = train_search.split_data(config, SimpleNamespace(master=True, world=1))
    whole = load_tokens(data_dir, "pydocs", "train")
    both = np.concatenate([splits["train"].ids, splits["search"].ids])
    assert np.array_equal(both, whole) and len(splits["train"]) == int(0.7 * len(whole))
    assert np.array_equal(splits["val"].ids, load_tokens(data_dir, "pydocs", "val"))
    assert config.vocab_size == read_json(f"{data_dir}/pydocs/meta.json")["vocab_size"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_step_sees_its_own_data_weights_and_rates(name, data_dir, tmp_path, monkeypatch):
    """The alphas learn on the search split with frozen weights, the weights on the train split;
    every draw has its own generator."""
    length = len(load_tokens(data_dir, "pydocs", "train"))
    split_of = {int(0.8 * length): "train", length - int(0.8 * length): "search",
                len(load_tokens(data_dir, "pydocs", "val")): "val"}
    batches, evaluated, draws, frozen, rates, choosers = [], [], [], [], [], []
    real_batches, real_estimate, real_backward = train.micro_batches, train.estimate, train.backward
    method = METHODS[OPTIMIZERS[name]["optimizer"]]
    real_sample, real_step, real_init = method.sample, train.train_step, method.__init__

    def spy_batches(tokens, *args):
        batches.append(split_of[len(tokens)])
        return real_batches(tokens, *args)

    def spy_estimate(net, tokens, *args, **rest):
        evaluated.append(split_of[len(tokens)])
        return real_estimate(net, tokens, *args, **rest)

    def spy_backward(net, *args):
        frozen.append(not any(p.requires_grad for p in net.parameters()))
        return real_backward(net, *args)

    def spy_sample(self, progress, generator):
        draws.append((progress, generator.initial_seed()))
        return real_sample(self, progress, generator)

    def spy_step(net, forward, optimizer, *args):
        loss = real_step(net, forward, optimizer, *args)
        rates.append(optimizer.param_groups[0]["lr"])
        return loss

    def spy_init(self, *args, **kwargs):
        real_init(self, *args, **kwargs)
        choosers.append((self, {k: a.detach().clone() for k, a in self.alphas.items()}))
    for module, attribute, spy in ((train_search, "micro_batches", spy_batches),
                                   (train, "micro_batches", spy_batches),
                                   (train_search, "backward", spy_backward),
                                   (train, "backward", spy_backward),
                                   (train_search, "estimate", spy_estimate),
                                   (train_search, "train_step", spy_step),
                                   (method, "sample", spy_sample), (method, "__init__", spy_init)):
        monkeypatch.setattr(module, attribute, spy)
    settings = dict(train_portion=0.8, arch_learning_rate=0.007, arch_weight_decay=0.002)
    config = search_config(data_dir, tmp_path / "s", **settings, **OPTIMIZERS[name])
    train_search.search(config)
    arch_steps = {"darts2": ["train", "search", "train", "train"], "spos": []}.get(name, ["search"])
    assert batches == [*arch_steps, "train"] * 4 and set(evaluated) == {"search", "val"}
    assert frozen == ([name != "darts2"] * len(arch_steps) + [False]) * 4
    assert rates == [train.get_lr(step, SimpleNamespace(**config)) for step in range(4)]
    arch_optimizer, before = choosers[0]
    assert all(not torch.equal(a, before[k]) for k, a in arch_optimizer.alphas.items())
    if name != "spos":
        group = arch_optimizer.optimizer.param_groups[0]
        assert (group["lr"], group["weight_decay"]) == (0.007, 0.002)
    in_steps = [d for d in draws if d[0] < 1.0]
    in_each = 1 if name == "spos" else 2
    assert [p for p, _ in in_steps] == [step / 4 for step in range(4) for _ in range(in_each)]
    assert len({seed for _, seed in in_steps}) == len(in_steps)


@pytest.mark.parametrize("arch_search, other", [("evolution", "random_search"),
                                                ("random", "evolutionary_search")])
def test_spos_ends_with_the_search_that_was_asked_for(arch_search, other, data_dir, tmp_path,
                                                      monkeypatch):
    config, real = search_config(data_dir, tmp_path / "s", optimizer="spos",
                                 arch_search=arch_search), getattr(train_search, other)
    calls = []
    monkeypatch.setattr(train_search, other, lambda *args: calls.append(len(args)) or real(*args))
    train_search.search(config)
    # three evaluations draw a few at random
    assert len(calls) == (3 if other == "random_search" else 0)
    assert len(read_lines(tmp_path / "s/arch_search.jsonl")) == 6


def test_the_seconds_of_spos_are_also_those_of_the_search_that_ends_it(
        data_dir, tmp_path, monkeypatch):
    """Also of evaluations that a run which goes on has not to repeat."""
    score = train_search.score
    monkeypatch.setattr(train_search, "score", lambda *args, **kwargs: time.sleep(0.2)
                        or score(*args, **kwargs))
    config = search_config(data_dir, tmp_path, optimizer="spos", max_iters=2, eval_interval=2,
                           arch_evals=6)
    assert train_search.search(config)["seconds"] >= 6 * 0.2
    lines = (tmp_path / "arch_search.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "arch_search.jsonl").write_text("".join(lines[:-1]))
    assert train_search.search(config | {"init_from": "resume"})["seconds"] >= 6 * 0.2


def test_what_other_weights_lost_is_not_looked_up(data_dir, tmp_path):
    """Gone on with from the checkpoint before, at another rate, the supernet is another after as
    many steps."""
    config = search_config(data_dir, tmp_path / "a", optimizer="spos")
    train_search.search(config)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b/arch_search.jsonl").unlink()
    for out in "ab":
        train_search.search(config | dict(out_dir=str(tmp_path / out), init_from="previous",
                                          learning_rate=0.1, min_lr=0.1))
    a, b = ([line["loss"] for line in read_lines(tmp_path / out / "arch_search.jsonl")]
            for out in "ab")
    assert a == b


def test_unrolled_step_of_a_real_network(data_dir, tmp_path, monkeypatch):
    """arch_step of order 2 against the central difference of L_val(w - lr dL_train/dw) in one
    weight, with dropout; float64, where the inner difference may be short."""
    monkeypatch.setattr(train_search, "unrolled_gradient",
                        functools.partial(optim_nas.unrolled_gradient, radius=1e-4))
    config = SimpleNamespace(**search_config(data_dir, tmp_path / "s", optimizer="darts", order=2,
                                             dropout=0.2, warmup_iters=0,
                                            learning_rate=0.3))
    run, state = runs.setup(config), SimpleNamespace(step=0, skipped=0)
    splits, _ = train_search.split_data(config, run)
    torch.manual_seed(0)
    net = build(vars(config)).double()
    arch_optimizer = METHODS["darts"](net.choices, runs.rng(0))
    for alpha in arch_optimizer.alphas.values():
        alpha.data = alpha.data.double()
    seen = {}
    arch_optimizer.step = lambda weights, grads: seen.update(weights=weights, grads=grads)
    train_search.arch_step(net, net, arch_optimizer, splits, config, run, state)
    params, start = list(net.parameters()), [p.detach().clone() for p in net.parameters()]

    def loss_at(name, change, split, grads=False):
        weights = {k: w.detach().clone() for k, w in seen["weights"].items()}
        weights[name].view(-1)[1] += change
        torch.manual_seed(runs.rng(config.seed, "dropout", "arch", 0, 0).initial_seed())
        micro_batches = train.micro_batches(splits[split], config, run, split, 0)
        loss = train.backward(net, [(x, y, weights) for x, y in micro_batches], run)
        found = [p.grad.clone() for p in params]
        net.zero_grad()
        return found if grads else loss.item()

    def unrolled(name, change, unrolled_at):
        with torch.no_grad():
            for p, g in zip(params, loss_at_with_grad(name, unrolled_at), strict=True):
                p -= config.learning_rate * g
        loss = loss_at(name, change, "search")
        with torch.no_grad():
            for p, p0 in zip(params, start, strict=True):
                p.copy_(p0)
        return loss

    def loss_at_with_grad(name, change):
        with torch.enable_grad():
            return loss_at(name, change, "train", grads=True)
    for name in ("n_layer", "n_embd", "mlp_ratio"):
        whole = (unrolled(name, 1e-4, 1e-4) - unrolled(name, -1e-4, -1e-4)) / 2e-4
        # without the part that comes through the weights
        first = (unrolled(name, 1e-4, 0) - unrolled(name, -1e-4, 0)) / 2e-4
        assert abs(seen["grads"][name].view(-1)[1].item() - whole) < 1e-3 * abs(first - whole), name


def test_micro_batches_sum_to_one_batch(data_dir):
    config = SimpleNamespace(**train_config(data_dir, "unused", gradient_accumulation_steps=3))
    run = SimpleNamespace(rank=0, world=1, device="cpu", amp=torch.autocast("cpu", enabled=False),
                          scaler=torch.amp.GradScaler("cpu", enabled=False))
    net = build(vars(config) | {"vocab_size": 128})
    batches = list(train.micro_batches(Tokens(load_tokens(data_dir, "pydocs", "train")), config,
                                       run, "train", 0))
    loss = train.backward(net, [(x, y, None) for x, y in batches], run)
    grads = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    x, y = (torch.cat(t) for t in zip(*batches, strict=True))
    assert x.shape == (12, 16) and len(torch.unique(x, dim=0)) == 12
    whole = net(x, y)[1]
    whole.backward()
    torch.testing.assert_close(loss, whole)
    for g, p in zip(grads, net.parameters(), strict=True):
        torch.testing.assert_close(g, p.grad, atol=1e-6, rtol=1e-4)


def test_learning_rate_schedule():
    config = SimpleNamespace(learning_rate=1.0, min_lr=0.1, warmup_iters=10, max_iters=110,
                             lr_decay_iters=0, decay_lr=True, milestones=[0])
    lrs = [train.get_lr(step, config) for step in range(130)]
    assert lrs[:10] == pytest.approx([(i + 1) / 11 for i in range(10)]) and lrs[10] == 1.0
    assert lrs[60] == pytest.approx(0.55) and lrs[110:] == pytest.approx([0.1] * 20)
    assert all(a >= b for a, b in itertools.pairwise(lrs[10:]))
    config.decay_lr = False
    assert train.get_lr(100, config) == 1.0


def test_optimizer_decays_matrices_alone():
    net = build(dict(block_size=8, vocab_size=20, n_layer=2, n_head=2, n_embd=8, bias=True))
    config = SimpleNamespace(weight_decay=0.1, learning_rate=1e-3, beta1=0.9, beta2=0.99,
                             zero_stage=0, weight_optimizer="adamw")
    groups = train.configure_optimizer(net, config, SimpleNamespace(device_type="cpu")).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    for name, p in net.named_parameters():
        assert (id(p) in decayed) == (not name.endswith("bias") and "ln_" not in name), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_trains(dtype, data_dir, tmp_path):
    config = dict(max_iters=40, eval_interval=40, log_interval=40, learning_rate=1e-2, dtype=dtype)
    result = train.train(train_config(data_dir, tmp_path / "t", **config))
    full = train.train(train_config(data_dir, tmp_path / "f", **config | {"dtype": "float32"}))
    assert result["val_loss"] == pytest.approx(full["val_loss"], abs=0.05) and full["val_loss"] < 4
    found = train_search.search(search_config(data_dir, tmp_path / "s", dtype=dtype))
    assert math.isfinite(found["arch_loss"])


def test_early_stopping_keeps_the_best(data_dir, tmp_path):
    """With a learning rate that spoils the network the run ends early and tests the weights of its
    best evaluation."""
    result = train.train(train_config(data_dir, tmp_path / "t", val_portion=0.1, early_stopping=2,
                                      learning_rate=1.0, max_iters=200,
                                      decay_lr=False), test=True)
    evaluations = [line for line in losses(tmp_path / "t") if "val_loss" in line]
    best = min(evaluations, key=lambda line: line["val_loss"])
    assert result["steps"] < 200 and result["best_step"] == best["step"] == result["steps"] - 4
    assert torch.load(tmp_path / "t/best.pt", weights_only=True)["step"] == best["step"]


@pytest.mark.parametrize("name", [*OPTIMIZERS, "train", "train_base"])
def test_resuming_changes_nothing(name, data_dir, tmp_path):
    """4 + 4 steps equal 8: every logged number and every weight."""
    def go(out, **rest):
        rest = dict(max_iters=8, lr_decay_iters=8, dropout=0.1) | rest
        if name == "train":
            return train.train(train_config(data_dir, out, **rest))
        if name == "train_base":
            return train_base.train_found(base_config(data_dir, out, tmp_path / "s/arch.json",
                                                      **rest))
        return train_search.search(search_config(data_dir, out, **OPTIMIZERS[name], **rest))
    if name == "train_base":
        train_search.search(search_config(data_dir, tmp_path / "s"))
    go(tmp_path / "whole")
    state = {}

    def killed_at_4(config, run, file, *args, **rest):
        original(config, run, file, *args, **rest)
        if file == "ckpt.pt" and rest["state"]["step"] == 4:
            state["killed"] = True
            raise KeyboardInterrupt
    original = train.save
    train.save = train_search.save = killed_at_4
    try:
        with pytest.raises(KeyboardInterrupt):
            go(tmp_path / "parts")
    finally:
        train.save = train_search.save = original
    assert state["killed"]
    go(tmp_path / "parts", init_from="resume")
    a, b = (torch.load(tmp_path / part / "ckpt.pt", weights_only=True)
            for part in ("whole", "parts"))
    assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])
    if "chooser" in a:
        assert all(torch.equal(a["chooser"]["alphas"][key], value)
                   for key, value in b["chooser"]["alphas"].items())
    whole, parts = ([line for line in losses(tmp_path / part) if line.get("step", 0)]
                    for part in ("whole", "parts"))
    assert whole == parts, "a resumed run says its header again, and nothing else"
    if (tmp_path / "whole/arch_traj.jsonl").exists():
        assert ((tmp_path / "whole/arch_traj.jsonl").read_bytes() ==
                (tmp_path / "parts/arch_traj.jsonl").read_bytes())


@pytest.fixture(scope="module")
def searched(data_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("searched") / "s"
    train_search.search(search_config(data_dir, out))
    return out


def damaged(searched, tmp_path, change):
    found = read_json(searched / "arch.json")
    path = tmp_path / "arch.json"
    path.write_text(change(found) if callable(change) else change)
    return path


@pytest.mark.parametrize("change, words", [
    ("{\"arch\": ", ["damaged", "not JSON"]),
    ("[1, 2]", ["damaged", "object"]),
    (lambda a: json.dumps({}), ["damaged", "arch"]),
    (lambda a: json.dumps(a | {"arch": a["arch"] | {"n_layer": 7}}), ["n_layer", "7", "[1, 2]"]),
    (lambda a: json.dumps(a | {"arch": a["arch"] | {"n_head": []}}), ["n_head"]),
    (lambda a: json.dumps(a | {"arch": a["arch"] | {"n_embd": "16"}}), ["n_embd"]),
    (lambda a: json.dumps(a | {"model": a["model"] | {"n_embd": "wide"}}), ["n_embd", "wide"]),
    (lambda a: json.dumps({k: v for k, v in a.items() if k != "model"}), ["model"]),
])
def test_a_damaged_architecture_is_one_sentence(change, words, searched, data_dir, tmp_path):
    path = damaged(searched, tmp_path, change)
    with pytest.raises(SystemExit) as e:
        train_base.train_found(base_config(data_dir, tmp_path / "b", path))
    message = str(e.value)
    assert all(word in message for word in words) and "\n" not in message, message


def test_mistakes_are_one_sentence_and_lose_nothing(searched, data_dir, tmp_path):
    """Real processes: nothing but a sentence, and the run that was there stays as it was."""
    before = {p.name: p.read_bytes() for p in searched.iterdir()}
    tiny, data = flags(TINY_SEARCH), f"--data_dir={data_dir}"
    message = fails("train_search.py", *tiny, data, f"--out_dir={searched}")
    assert (str(searched) in message and "--init_from=resume" in message
            and "--overwrite=True" in message)
    assert before == {p.name: p.read_bytes() for p in searched.iterdir()}
    assert "learning_rate" in fails("train_search.py", "--learnig_rate=1")
    assert "max_iters" in fails("train.py", "--max_iters=many")
    assert "train_search.py" in fails("train.py", "--n_embd=[64,128]")
    message = fails("train_search.py", *tiny, f"--data_dir={tmp_path}", "--dataset=tinystories",
                    f"--out_dir={tmp_path}/o")
    assert "python prepare.py --dataset=tinystories" in message
    for both in ([], [f"--arch={searched}/arch.json", f"--arch_traj={searched}/arch_traj.jsonl"]):
        message = fails("train_base.py", *both, data, f"--out_dir={tmp_path}/o")
        assert "--arch=" in message and "--arch_traj=" in message
    assert "cannot be read" in fails("train_base.py", "--arch=missing.json", data,
                                     f"--out_dir={tmp_path}/o")
    message = fails("train_search.py", *tiny, data, f"--out_dir={tmp_path}/o", "--n_head=[1,3]")
    assert "n_embd=8" in message and "n_head=3" in message
    message = fails("train.py", *flags(TINY | {"block_size": 10_000_000}), data,
                    f"--out_dir={tmp_path}/o2")
    assert "10,000,001" in message or "10000001" in message


@pytest.mark.parametrize("change, words", [
    (dict(optimizer="dart"), ["dart", "drnas"]), (dict(order=2), ["order=2", "darts"]),
    (dict(optimizer="darts", order=2, dtype="float16"), ["order=2", "float16"]),
    (dict(train_portion=1.0), ["train_portion"]),
    (dict(device="tpu"), ["tpu", "cpu"]), (dict(device="cpu:one"), ["cpu:one", "use one of cpu"]),
    (dict(dtype="float8"), ["float8"]), (dict(init_from="gpt5"), ["gpt5"]),
    (dict(init_from="resume"), ["holds no run"]), (dict(arch_search="luck"), ["luck"]),
    (dict(parents=0), ["parents=0 must be 1 or more"]),
    (dict(budget_penalty=-1.0), ["budget_penalty=-1.0 must be 0 or more"]),
    (dict(distill=-0.5), ["distill=-0.5 must be 0 or more"]),
    (dict(optimizer="gdas", tau_min=0.0), ["tau_min=0.0", "above 0"]),
    (dict(tau_max=1.0, tau_min=2.0), ["tau_max=1.0", "tau_min=2.0"]),
    (dict(arch_learning_rate=-1e-3), ["arch_learning_rate=-0.001 must be 0 or more"]),
    (dict(arch_weight_decay=-1), ["decay=-1"])])
def test_wrong_values_are_one_sentence(change, words, data_dir, tmp_path):
    with pytest.raises(SystemExit) as e:
        train_search.search(search_config(data_dir, tmp_path / "s", **change))
    assert all(word in str(e.value) for word in words) and "\n" not in str(e.value)
    assert not (tmp_path / "s").exists()


NONE_OR_MORE = ("max_iters", "learning_rate", "min_lr", "weight_decay", "grad_clip", "warmup_iters",
                "lr_decay_iters", "milestones",
                "save_interval", "save_minutes", "skip_nonfinite")
COUNTS = ("eval_interval", "log_interval", "eval_iters", "batch_size", "block_size",
          "gradient_accumulation_steps")


@pytest.mark.parametrize("change, words", [
    *((dict([(key, 0)]), "0 must be 1 or more") for key in COUNTS),
    (dict(block_size=-16), "-16 must be 1 or more"),
    *((dict([(key, -1)]), "-1 must be 0 or more") for key in NONE_OR_MORE),
    (dict(seed=2**63), f"{2**63} must be at least {-2**63} and below {2**63}"),
    *((dict([(key, value)]), f"{value} must be at least 0 and below 1")
      for key in ("beta1", "beta2", "momentum") for value in (-0.1, 1.0)),
    (dict(nesterov=True, momentum=0, weight_optimizer="sgd"),
     "True needs a momentum above 0, and momentum=0"),
    (dict(dropout=1.0), "1.0 must be at least 0 and below 1"),
    (dict(router_aux_loss_coef=-0.1), "-0.1 must be 0 or more"),
    (dict(head_size=-4), "-4 must be 0 or more")])
def test_numbers_out_of_range_are_one_sentence(change, words, searched, data_dir, tmp_path):
    """Of every trainer, which leaves nothing behind."""
    places, (key, value) = (data_dir, tmp_path / "o"), next(iter(change.items()))
    runs = [(train.train, train_config(*places, **change)),
            (train_search.search, search_config(*places, **change))]
    # train_base.py has those of the search
    if (key, value) not in (("block_size", 0), ("head_size", -4)):
        runs.append((train_base.train_found, base_config(*places, searched / "arch.json",
                                                         **change)))
    for function, config in runs:
        with pytest.raises(SystemExit) as e:
            function(config)
        assert f"{key}={words}" in str(e.value) and "\n" not in str(e.value)
        assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("change", [dict(top_k=-1), dict(temperature=-0.5), dict(num_samples=0),
                                    dict(max_new_tokens=0),
                                    dict(seed=2**64)])
def test_samples_out_of_range_are_one_sentence(change):
    (key, value), = change.items()
    allowed = (f"at least {-2**63} and below {2**63}" if key == "seed"
               else f"{'1' if value == 0 else '0'} or more")
    with pytest.raises(SystemExit, match=f"^{key}={value} must be {allowed}.$"):
        sample.main(defaults(vars(sample)) | change)


def test_checkpoint_of_another_shape(data_dir, tmp_path):
    train.train(train_config(data_dir, tmp_path / "t"))
    for rest, words in ((dict(n_embd=32), ["another shape", "wte"]),
                        (dict(n_layer=3), ["another shape", "h.2"])):
        with pytest.raises(SystemExit) as e:
            train.train(train_config(data_dir, tmp_path / "t", init_from="resume", max_iters=6,
                                     **rest))
        assert all(word in str(e.value) for word in words)
    (tmp_path / "t/ckpt.pt").write_bytes(b"no checkpoint")
    with pytest.raises(SystemExit, match="damaged"):
        train.train(train_config(data_dir, tmp_path / "t", init_from="resume"))


def test_a_training_starts_from_the_best_weights_of_another(searched, data_dir, tmp_path):
    """Not the newest, which an absurd rate spoils; train_base.py, whichever lists its architecture
    was chosen from. Its first evaluation is that of the best."""
    first = train_config(data_dir, tmp_path / "first", val_portion=0.1, learning_rate=1e-2)
    base = base_config(data_dir, tmp_path / "base", searched / "arch.json")
    chosen = read_json(searched / "arch.json")
    chosen["model"] |= {"n_embd": [*chosen["model"]["n_embd"], 24]}
    write_json(tmp_path / "arch.json", chosen)
    for go, config, more in ((train.train, first, {}),
                             (train_base.train_found, base, {"arch": str(tmp_path / "arch.json")})):
        go(config)
        go(config | dict(init_from="resume", max_iters=6, learning_rate=100.0, min_lr=100.0,
                         decay_lr=False))
        best = torch.load(f"{config['out_dir']}/best.pt", weights_only=True)
        assert best["step"] == 4
        go(config | more | dict(init_from=config["out_dir"], out_dir=str(tmp_path / "o"),
                                learning_rate=0.0, min_lr=0.0, overwrite=True))
        again = torch.load(tmp_path / "o/best.pt", weights_only=True)
        assert again["losses"] == best["losses"]
        assert all(torch.equal(w, again["model"][name]) for name, w in best["model"].items())


def test_weights_of_another_network_are_one_sentence(searched, data_dir, tmp_path):
    """Of another kind, shape, architecture or space; those of a search without an architecture, of
    a run that has none, and of the folder that the run would replace. Nothing is written."""
    config = train_config(data_dir, tmp_path / "t", dropout=0.1)
    train.train(config)
    base = base_config(data_dir, tmp_path / "base", searched / "arch.json", init_from=str(searched))
    train_base.train_found(base)
    other = read_json(searched / "arch.json")
    other["arch"] |= {"n_layer": 2, "n_head": [1, 1], "mlp_ratio": [1, 2]}
    write_json(tmp_path / "arch.json", other)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/run.json").write_text('{"config": {}}')
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/run.json").write_text("{}")
    new = dict(init_from=str(tmp_path / "t"), out_dir=str(tmp_path / "o"))
    search = search_config(data_dir, tmp_path / "s")
    of_base = base | new | dict(init_from=str(tmp_path / "base"))
    for go, change, words in (
            (train.train, dict(norm="rmsnorm"), "norm=layernorm, and this one has norm=rmsnorm"),
            (train.train, dict(n_head=4), "n_head=2, and this one has n_head=4: its weights are"),
            (train.train, dict(n_embd=32), "n_embd=16"), (train.train, dict(block_size=8), "wpe"),
            (train.train, dict(init_from=str(searched)), "is the out_dir of a search: .*--arch="),
            (train.train, dict(init_from=str(tmp_path / "base")), "has trained the architecture"),
            (train.train, dict(init_from=str(tmp_path / "empty")), "There is no checkpoint"),
            (train.train, dict(init_from=str(tmp_path / "damaged")), "damaged, it has no config"),
            (train.train, dict(out_dir=new["init_from"], overwrite=True), "this run's own out_dir"),
            (train_base.train_found, dict(of_base, arch=str(tmp_path / "arch.json")),
             "has trained the architecture .*, and this is the architecture"),
            (train_base.train_found, dict(base, **new), "has trained a gpt, and this is the arch"),
            (train_search.search, dict(search, **new), "a search of the GPT starts")):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*.pt")}
        with pytest.raises(SystemExit, match=words) as e:
            go(config | new | change)
        assert "\n" not in str(e.value) and not (tmp_path / "o").exists()
        assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.pt")}
    train.train(config | new | dict(dropout=0.2)) # which is not the network


def test_early_stopping_below_zero_is_one_sentence(data_dir, tmp_path):
    """It would end a run at its first evaluation, as if all had gone well."""
    with pytest.raises(SystemExit, match="early_stopping=-1 must be 0 or more"):
        train.train(train_config(data_dir, tmp_path / "t", early_stopping=-1))


def test_early_stopping_of_train_base_needs_validation_data(searched, data_dir, tmp_path):
    with pytest.raises(SystemExit, match="val_portion"):
        train_base.train_found(base_config(data_dir, tmp_path / "b", searched / "arch.json",
                                           early_stopping=2, val_portion=0.0))


@pytest.mark.parametrize("key, value", [("norm", "rmsnorm"), ("bias", "True"), ("n_layer", "3"),
                                        ("head_size", "8")])
def test_a_network_other_than_the_found_one_is_one_sentence(key, value, searched, monkeypatch,
                                                            tmp_path):
    """What an arch.json says of the GPT counts, and would silently take the place of what the
    command says."""
    monkeypatch.setattr("sys.argv", ["train_base.py", f"--arch={searched}/arch.json",
                                     f"--{key}={value}"])
    words = f"^{key}={value} is not .*, that of {searched}/arch.json: leave it out.$"
    with pytest.raises(SystemExit, match=words):
        train_base.with_found(vars(train_base))
    written = value if key != "norm" else repr(value)
    (tmp_path / "c.py").write_text(f"{key} = {written} # of another run")
    monkeypatch.setattr("sys.argv", ["train_base.py", str(tmp_path / "c.py"),
                                     f"--arch={searched}/arch.json"])
    with pytest.raises(SystemExit, match=f"^{key}={value} is not "):
        train_base.with_found(vars(train_base))
    own = read_json(searched / "arch.json")["model"][key]
    monkeypatch.setattr("sys.argv", ["train_base.py", f"--arch={searched}/arch.json",
                                     f"--{key}={own}", "--block_size=8"])
    train_base.with_found(vars(train_base))


def test_the_next_command_can_be_copied(data_dir, tmp_path, capsys):
    """Also that of an out_dir with a space in its name."""
    out = tmp_path / "my search"
    train_search.search(search_config(data_dir, out))
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert words == ["next:", "python", "train_base.py", f"--arch={out}/arch.json"]
    train_base.train_found(base_config(data_dir, tmp_path / "my base", out / "arch.json"))
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert words == ["next:", "python", "sample.py", f"--out_dir={tmp_path}/my base"]


def test_arch_traj_takes_the_last_line(searched, data_dir, tmp_path):
    last = read_lines(searched / "arch_traj.jsonl")[-1]
    result = train_base.train_found(base_config(data_dir, tmp_path / "b", "",
                                                arch_traj=str(searched / "arch_traj.jsonl")))
    assert result["arch"] == last["arch"] and result["params"] == last["cost"]["params"]


@pytest.mark.parametrize("key, package", [("wandb_log", "wandb"), ("tensorboard", "tensorboard")])
def test_a_package_that_is_missing_is_told_before_a_run_is_begun(
        key, package, data_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    words = (f"^{key}=True needs a package that is not installed: pip install {package}, "
             "or leave it off.$")
    with pytest.raises(SystemExit, match=words):
        train.train(train_config(data_dir, tmp_path / "t", **{key: True}))
    assert not (tmp_path / "t").exists()


def test_a_non_finite_loss_stops_before_anything_is_saved(data_dir, tmp_path):
    with pytest.raises(FloatingPointError, match=r"not finite|loss is"):
        train.train(train_config(data_dir, tmp_path / "t", learning_rate=1e20, grad_clip=0.0,
                                 max_iters=50))
    checkpoint = torch.load(tmp_path / "t/ckpt.pt", weights_only=True)
    assert all(v.isfinite().all() for v in checkpoint["model"].values())


def test_batches_are_windows_of_the_data(data_dir):
    tokens = load_tokens(data_dir, "pydocs", "train")
    x, y = get_batch(tokens, 4, 16, runs.rng(1, "a", 2))
    x2, _ = get_batch(tokens, 4, 16, runs.rng(1, "a", 2))
    assert torch.equal(x, x2) and torch.equal(x[:, 1:], y[:, :-1])
