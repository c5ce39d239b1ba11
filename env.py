"""
The environment of train_rl.py (which of 64 networks suits so much data?), and the table of all 64.

    python env.py                  # evaluates every network on every shard; a second run goes on
    python env.py --n_envs=2       # in two processes of one thread each, the fastest on two cores
    python env.py --evaluator=supernet --table=out/supernet.csv --against=assets/heads_layers.csv
    python env.py --help           # every key with its default

The networks are those of 1 to 8 heads and 1 to 8 layers. Writes the file `table`, a row for each
number of entries, network and seed, and keeps every training in cache_dir. With --against it prints
how alike two tables rank the networks: the third command asks that of inherited weights.

    entry        one training sequence of block_size tokens
    shard        a part of train.bin, with its number of entries; all have the same test split
    evaluation   the test loss and perplexity of a network trained on a shard with a seed, and the
                 time of its training step, a sample
    reward       an evaluation as one number, the higher the better
    regret       how far the reward of an action is below the best one on the shard, as a share of
                 the range from the worst to the best
"""
import csv
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace

import gymnasium
import numpy as np
import torch
from scipy.stats import kendalltau
from tqdm import tqdm

from configurator import WHOLE, above, as_list, at_least, check_limits, configure, defaults
from data import load_meta, load_shards
from model import build
from prepare import cut_shards, prepare_own
from run import (atomic_write, init_out_dir, load_checkpoint, load_model, main, read_json, rng,
                 save, setup, silenced, write_json)
from train import * # noqa: F403 (its keys, with their comments)
from search_spaces import data_kind
from train import check_config, configure_optimizer, estimate_all, get_lr, train, train_step

TRAIN_DEFAULTS = defaults(globals()) # every key of train.py
# Those that are not keys of env.py: the agent picks the network's size, an evaluation sets what its
# training writes and when, and the data is text.
HIDDEN_KEYS = set("""
    n_layer n_head n_embd
    out_dir overwrite init_from eval_interval eval_iters early_stopping log_interval save_interval
    save_minutes wandb_log wandb_project wandb_run_name tensorboard backend timeout_minutes
    zero_stage fused space
    """.split())
for _key in HIDDEN_KEYS & TRAIN_DEFAULTS.keys():
    del globals()[_key]
# The result of a training depends on these, and on the content of its data.
RESULT_KEYS = sorted(TRAIN_DEFAULTS.keys() - HIDDEN_KEYS - {"data_dir", "dataset"})
# -----------------------------------------------------------------------------
# the keys of train.py that are left, and:
table = 'assets/heads_layers.csv'
cache_dir = 'out/cache' # keeps every training, so that none is repeated
evaluator = 'train' # 'supernet': inherited weights
against = '' # a table: prints Kendall's tau between its losses and these
shards = 5 # number of shards; prepare.py cuts them at first use
entries = [20, 2000] # of the smallest and the largest shard
test_entries = 256 # of the test split
seeds = [1, 2, 3] # of the trainings
n_envs = 1 # processes
time_from = 'measured' # 'flops': repeatable, at flops_per_second
flops_per_second = 2e10 # of a training step, forward and backward
supernet_iters = 300 # steps of a supernet, one for each shard; many overfit a small one
# a training, of some seconds on one core
head_size = 16 # channels a head: n_embd = n_head * head_size
batch_size = 4
block_size = 64
max_iters = 100
warmup_iters = 10
learning_rate = 1e-3
min_lr = 1e-3
# -----------------------------------------------------------------------------

LIMITS = {**dict.fromkeys(("n_envs", "max_iters", "supernet_iters"), at_least(1)), "seeds": WHOLE,
          "flops_per_second": above(0)}
N_OPTIONS = 8 # heads and layers are 1 to N_OPTIONS
COLUMNS = {"entries": int, "n_head": int, "n_layer": int, "seed": int, # of the table
           "loss": float, "ppl": float, "time": float, "params": int, "flops": int}


# ---- rewards: reward(metrics, trade_off) -> float
# metrics: has the "loss" in nats, its "ppl", and the "time" in seconds a sample.

def seed_reward(metrics, trade_off=None):
    """The published system's: the sum of three terms less 0.8 times their mean absolute deviation.

    Below a loss of about 5 the terms of loss and ppl are so large that time hardly counts.
    """
    milliseconds = 1000 * metrics["time"]
    terms = [math.exp(10 - metrics["loss"]), math.exp(2 - milliseconds / 6),
             10000 / (metrics["ppl"] + 1)]
    mean = sum(terms) / 3
    deviation = sum(abs(term - mean) for term in terms) / 3
    return sum(terms) - 0.8 * deviation


def balance_reward(metrics, trade_off=0.1):
    """A network that takes e times as long must have a loss that is lower by trade_off nats."""
    return -metrics["loss"] - trade_off * math.log(1000 * metrics["time"])


REWARDS = {"seed": seed_reward, "balance": balance_reward}


# ---- architectures and their times
# arch: {"n_head", "n_layer"}; the width of its network is n_embd = n_head * head_size.

def arch_of(action):
    """The arch of an action, 0 to 63."""
    return {"n_head": int(action) // N_OPTIONS + 1, "n_layer": int(action) % N_OPTIONS + 1}


def all_archs():
    """The arch of every action, in order."""
    return [arch_of(action) for action in range(N_OPTIONS * N_OPTIONS)]


def with_width(arch, config):
    """The arch with its n_embd: the keys of train.py for this network."""
    return {**arch, "n_embd": arch["n_head"] * config["head_size"]}


def open_data(config):
    """(run, train tokens, test tokens) of config, a namespace, which also gets the vocab_size."""
    check_config(config)
    run = setup(config)
    prepare_own(config, run)
    splits, facts = data_kind(config.space).load(config)
    vars(config).update(facts)
    return run, splits["train"], splits["val"]


def measure_times(archs, config, rounds=20):
    """The seconds a sample of a training step, one number for each arch.

    Every round runs one step of each network, so that what else the machine does slows all alike.
    The result is the median over the rounds; one more before them warms up and does not count.
    """
    config = TRAIN_DEFAULTS | config | {"overwrite": True, "init_from": "scratch"}
    config = SimpleNamespace(**config)
    run, tokens, _ = open_data(config)
    nets = [build({**vars(config), **with_width(arch, vars(config))}).to(run.device)
            for arch in archs]
    optimizers = [configure_optimizer(net, config, run) for net in nets]
    seconds = [[] for _ in archs]
    for i in tqdm(range(rounds + 1), desc="time", unit="round", disable=len(archs) == 1):
        for net, optimizer, measured in zip(nets, optimizers, seconds, strict=True):
            state = SimpleNamespace(step=i, skipped=0)
            clock = time.perf_counter()
            train_step(net, net, optimizer, tokens, config, run, state, config.learning_rate)
            measured.append((time.perf_counter() - clock) / config.batch_size)
    return [statistics.median(measured[1:]) for measured in seconds]


# ---- evaluators: evaluator(config) -> evaluate, and evaluate(arch, shard) -> metrics_of(...)
# config: a dict of the keys above. shard: one of shards_of(), with the "seed" of the training.

def metrics_of(loss, cost, seconds, config):
    """{"loss", "ppl", "time", "params", "flops"}. cost: has the last two; seconds: measured."""
    if config["time_from"] == "flops":
        seconds = 3 * cost["flops"] / config["flops_per_second"] # backward costs two forwards
    return {"loss": loss, "ppl": math.exp(loss), "time": seconds,
            "params": cost["params"], "flops": cost["flops"]}


@dataclass
class Training:
    """A training, and where cache_dir keeps its result."""
    settings: dict # what the result depends on, beside the data
    path: str # without an ending; the same settings and data have the same path
    config: dict # for train.py


def plan_training(prefix, config, shard, **changes):
    """The Training on a shard with these changes of config. prefix: of the name in cache_dir."""
    config = TRAIN_DEFAULTS | config
    settings = {key: config[key] for key in RESULT_KEYS} | changes | {"seed": shard["seed"]}
    meta = load_meta(config["data_dir"], shard["dataset"])
    data = {"entries": shard["entries"], "train": meta["train_sha256"], "test": meta["val_sha256"]}
    content = json.dumps([settings, data], sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()[:32]
    path = os.path.join(config["cache_dir"], prefix + digest)
    config = {**config, **settings, "dataset": shard["dataset"],
              "out_dir": f"{path}.{os.getpid()}.run", "overwrite": True, "init_from": "scratch",
              "save_minutes": 0.0, "eval_interval": settings["max_iters"], "eval_iters": 1,
              "wandb_log": False, "tensorboard": False} # which log the agent's run alone
    return Training(settings, path, config)


def train_evaluator(config):
    """Trains the network on the shard by train.py, unless cache_dir has its result."""
    def evaluate(arch, shard):
        training = plan_training("", config, shard, **with_width(arch, config))
        path, out_dir = f"{training.path}.json", training.config["out_dir"]
        if not os.path.exists(path):
            with silenced():
                result = train(training.config, test=True)
            samples = training.config["max_iters"] * training.config["batch_size"]
            # Written to this process's own folder: another one may end the same training just now.
            written = os.path.join(out_dir, "evaluation.json")
            write_json(written, {
                "arch": arch, "shard": shard, "settings": training.settings,
                "loss": result["test_loss"], "flops": result["flops"], "params": result["params"],
                "seconds": result["seconds"] / samples})
            os.replace(written, path)
            shutil.rmtree(out_dir)
        found = read_json(path)
        return metrics_of(found["loss"], found, found["seconds"], config)
    return evaluate


def supernet_evaluator(config):
    """Takes the weights from the shard's supernet, which is trained unless cache_dir has it."""
    supernets, seconds = {}, {} # the seconds of an arch are the same on every shard

    def evaluate(arch, shard):
        key = shard["dataset"], shard["seed"]
        if key not in supernets:
            supernets[key] = load_supernet(config, shard)
        supernet, test_loss = supernets[key]
        net = supernet.extract(supernet_arch(arch, config))
        if config["time_from"] == "measured" and str(arch) not in seconds:
            with silenced():
                there = {**config, "dataset": shard["dataset"]}
                seconds[str(arch)] = measure_times([arch], there)[0]
        return metrics_of(test_loss(net), net.cost(), seconds.get(str(arch)), config)
    return evaluate


def supernet_arch(arch, config):
    """The arch in the supernet's space, where each layer has its own heads and mlp_ratio."""
    depth = arch["n_layer"]
    return {**with_width(arch, config), "n_head": [arch["n_head"]] * depth,
            "mlp_ratio": [config["mlp_ratio"]] * depth}


def load_supernet(config, shard):
    """(The supernet of a shard, test_loss(net)), from cache_dir; trains it if it is not there."""
    options = list(range(1, N_OPTIONS + 1))
    widths = [n * config["head_size"] for n in options]
    training = plan_training("supernet_", config, shard, n_layer=options, n_head=options,
                             n_embd=widths, max_iters=config["supernet_iters"])
    config, path = SimpleNamespace(**training.config), f"{training.path}.pt"
    with silenced():
        run, train_tokens, test_tokens = open_data(config)
        net = build(vars(config)).to(run.device)
        if not os.path.exists(path):
            train_supernet(net, train_tokens, config, run)
            save(config, run, "supernet.pt", net)
            os.replace(os.path.join(config.out_dir, "supernet.pt"), path)
            run.lock = None # closed: NFS keeps a folder with an open file
            shutil.rmtree(config.out_dir)
    load_model(net, load_checkpoint(path, run.device), path)
    config.batch_size = 64 # of evaluations
    return net, lambda small: estimate_all(small, test_tokens, config, run)["loss"]


def train_supernet(net, tokens, config, run):
    """SPOS (Guo et al. 2019): every step trains one of the 64 networks, drawn uniformly."""
    init_out_dir(config, run)
    optimizer, state = configure_optimizer(net, config, run), SimpleNamespace(step=0, skipped=0)
    for state.step in range(config.max_iters):
        torch.manual_seed(rng(config.seed, "dropout", state.step, run.rank).initial_seed())
        generator = rng(config.seed, "sample", state.step)
        action = torch.randint(N_OPTIONS * N_OPTIONS, (), generator=generator)
        arch, lr = supernet_arch(arch_of(action), vars(config)), get_lr(state.step, config)
        train_step(net, net, optimizer, tokens, config, run, state, lr, [arch])


def table_evaluator(config):
    """Looks evaluations up in config["table"]. SystemExit if it lacks a network or a seed."""
    rows = {(row["entries"], row["n_head"], row["n_layer"], row["seed"]): row
            for row in read_table(config["table"])}
    sizes = {n for n, *_ in rows}
    wanted = {(n, arch["n_head"], arch["n_layer"], seed)
              for n in sizes for arch in all_archs() for seed in config["seeds"]}
    if missing := sorted(wanted - rows.keys()):
        n, head, layer, seed = missing[0]
        raise SystemExit(f"The table {config['table']} lacks a row of {n} entries, {head} heads, "
                         f"{layer} layers and seed {seed}: complete it by python env.py, or choose "
                         "other --seeds.")

    def evaluate(arch, shard):
        row = rows[shard["entries"], arch["n_head"], arch["n_layer"], shard["seed"]]
        return metrics_of(row["loss"], row, row["time"], config)
    return evaluate


EVALUATORS = {"train": train_evaluator, "supernet": supernet_evaluator, "table": table_evaluator}


# ---- the environment

def shards_of(config, mode=0):
    """[{"entries", "mode", ...}] of one half of the shards (mode 1 or 2) or all (0), by size.

    With evaluator='table' they are those of the table; else of the data, which is cut at first use.
    """
    if config.get("evaluator") == "table":
        sizes = sorted({row["entries"] for row in read_table(config["table"])})
        if len(sizes) < 2:
            raise SystemExit(f"The table {config['table']} has {len(sizes)} number of entries, and "
                             "an agent needs two or more: name another by --table.")
        listed = [{"entries": n, "mode": i % 2 + 1} for i, n in enumerate(sizes)]
        return [shard for shard in listed if mode in (0, shard["mode"])]
    data_dir, dataset = config["data_dir"], config["dataset"]
    prepare_own(SimpleNamespace(**config), SimpleNamespace(master=True, world=1))
    cuts = [config[key] for key in ("shards", "entries", "test_entries", "block_size")]
    cut_shards(data_dir, dataset, load_meta(data_dir, dataset), *cuts)
    return load_shards(data_dir, dataset, config["shards"], mode)


class ArchEnv(gymnasium.Env):
    """A step is one evaluation; an episode visits every shard once, in random order.

    Observation (1,): the logarithm of the shard's number of entries, scaled so that limits[0] is 0
    and limits[1] is 1. Action: 0 to 63, see arch_of(). The trainings of an episode have one of the
    seeds, drawn at its start.

    evaluate(arch, shard) -> metrics; reward(metrics) -> float; shards: those of shards_of();
    limits: (fewest, most) entries, by default those of the shards.
    """
    def __init__(self, evaluate, reward, shards, seeds, limits=None):
        self.evaluate, self.reward, self.shards, self.seeds = evaluate, reward, shards, seeds
        self.limits = limits or (shards[0]["entries"], shards[-1]["entries"])
        self.observation_space = gymnasium.spaces.Box(0, 1, (1,))
        self.action_space = gymnasium.spaces.Discrete(N_OPTIONS * N_OPTIONS)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.order, self.position = self.np_random.permutation(len(self.shards)), 0
        self.seed = int(self.np_random.choice(self.seeds))
        return self.observe(self.shards[self.order[0]]), {}

    def observe(self, shard):
        """The observation (1,) of a shard."""
        low, high = self.limits
        position = math.log(shard["entries"] / low) / math.log(high / low)
        return np.array([position], dtype=np.float32)

    def step(self, action):
        shard, arch = self.shards[self.order[self.position]], arch_of(action)
        try:
            metrics = self.evaluate(arch, {**shard, "seed": self.seed})
        except FloatingPointError as e: # not left to main(): it may be in another process
            raise SystemExit(str(e)) from None
        reward = self.reward(metrics)
        info = {"entries": shard["entries"], "action": int(action), **arch, **metrics,
                "reward": reward}
        self.position += 1
        done = self.position == len(self.shards)
        following = shard if done else self.shards[self.order[self.position]]
        return self.observe(following), reward, done, False, info


def regret(rewards, actions):
    """The regret (S,) of the actions (S,), one a shard. rewards (S, 64): of every action."""
    best, worst = rewards.max(1), rewards.min(1)
    taken = rewards[np.arange(len(rewards)), actions]
    return (best - taken) / (best - worst)


# ---- the table

def check_options(config, options):
    """SystemExit unless each key of config has one of its options. options: {key: [...]}."""
    for key, allowed in options.items():
        if getattr(config, key) not in allowed:
            raise SystemExit(f"{key}={getattr(config, key)!r} is not one of "
                             f"{', '.join(map(str, allowed))}.")


def check_env(config, evaluators):
    """SystemExit for a value of this script's keys that is not allowed. config: a namespace."""
    check_options(config, {"evaluator": evaluators, "time_from": ["measured", "flops"]})
    check_limits(config, LIMITS)


def read_table(path):
    """The rows of a table, dicts of numbers. SystemExit if it is missing or damaged."""
    try:
        with open(path, newline="") as f:
            rows = list(csv.DictReader(f))
        if not rows:
            raise ValueError("it has no rows")
        return [{name: kind(row[name]) for name, kind in COLUMNS.items()} for row in rows]
    except OSError as e:
        raise SystemExit(f"The table {path} cannot be read ({e.strerror}): name one by --table, or "
                         "make it by python env.py.") from None
    except (KeyError, TypeError, ValueError) as e:
        raise SystemExit(f"The table {path} is damaged ({e}): its columns must be "
                         f"{', '.join(COLUMNS)}, all numbers.") from None


def write_table(path, rows):
    """Writes the rows, dicts with the COLUMNS and perhaps more, as a CSV file."""
    lines = [",".join(COLUMNS)]
    for row in rows:
        lines.append(",".join(f"{row[name]:.5g}" if kind is float else str(row[name])
                              for name, kind in COLUMNS.items()))
    text = "\n".join(lines) + "\n"
    atomic_write(path, lambda f: f.write(text.encode()))


def reward_table(reward, config):
    """The rewards (S, 64) in config["table"], of every shard and action: means over the seeds."""
    evaluate, shards = table_evaluator(config), shards_of(config | {"evaluator": "table"})

    def mean_reward(arch, shard):
        evaluations = [evaluate(arch, {**shard, "seed": seed}) for seed in config["seeds"]]
        return np.mean([reward(metrics) for metrics in evaluations])
    return np.array([[mean_reward(arch, shard) for arch in all_archs()] for shard in shards])


def start_worker(config):
    """Makes this process's evaluator: a function cannot be sent to a process that is spawned."""
    global _evaluate
    _evaluate = EVALUATORS[config["evaluator"]](config)


def evaluate_row(arch, shard):
    """A row of the table, and under "took" the seconds that it took to make."""
    clock = time.perf_counter()
    metrics = _evaluate(arch, shard)
    return {"entries": shard["entries"], **arch, "seed": shard["seed"], **metrics,
            "took": time.perf_counter() - clock}


def evaluate_all(evaluations, config):
    """The rows of (arch, shard) pairs, made in n_envs processes.

    Processes slow each other down, so times are measured afterwards, in this one alone.
    """
    spawn = multiprocessing.get_context("spawn")
    workers = config | {"time_from": "flops"}
    with ProcessPoolExecutor(config["n_envs"], spawn, start_worker, (workers,)) as pool:
        found = pool.map(evaluate_row, *zip(*evaluations, strict=True))
        rows = list(tqdm(found, total=len(evaluations), desc="table", unit="network"))
    if config["time_from"] == "measured":
        archs = all_archs()
        seconds = dict(zip(map(str, archs), measure_times(archs, config), strict=True))
        for row, (arch, _) in zip(rows, evaluations, strict=True):
            row["time"] = seconds[str(arch)]
    return rows


def make_table(config):
    """Evaluates every network on every shard with every seed; returns the rows of the table."""
    config = config | {"seeds": as_list(config["seeds"])}
    check_env(SimpleNamespace(**config), ["train", "supernet"])
    others = read_table(config["against"]) if config["against"] else []
    evaluations = [(arch, {**shard, "seed": seed}) for seed in config["seeds"]
                   for shard in shards_of(config) for arch in all_archs()]
    if others:
        check_comparable(evaluations, others, config["against"])
    rows = evaluate_all(evaluations, config)
    write_table(config["table"], rows)
    seconds = [row["took"] for row in rows]
    print(f"{config['table']}: {len(rows)} rows, {sum(seconds):.0f} s, "
          f"{1000 * statistics.median(seconds):.1f} ms an evaluation (median)")
    if others:
        compare(rows, others)
    seeds = str(config["seeds"]).replace(" ", "")
    print(f"next: python train_rl.py --table={config['table']} --seeds={seeds}")
    return rows


def check_comparable(evaluations, others, path):
    """SystemExit unless others, the rows of the table at path, have all of these networks."""
    wanted = {(shard["entries"], arch["n_head"], arch["n_layer"]) for arch, shard in evaluations}
    there = {(row["entries"], row["n_head"], row["n_layer"]) for row in others}
    if missing := sorted(wanted - there):
        n, head, layer = missing[0]
        raise SystemExit(f"The table against={path} lacks a row of {n} entries, {head} heads and "
                         f"{layer} layers: name one of the same --shards and --entries.")


def compare(rows, others):
    """Prints Kendall's tau between the mean losses of two tables, for each number of entries."""
    def losses(rows, entries):
        found = {}
        for row in rows:
            if row["entries"] == entries:
                found.setdefault((row["n_head"], row["n_layer"]), []).append(row["loss"])
        return np.array([np.mean(found[arch["n_head"], arch["n_layer"]]) for arch in all_archs()])

    for entries in sorted({row["entries"] for row in rows}):
        a, b = losses(rows, entries), losses(others, entries)
        print(f"{entries:6d} entries: Kendall's tau {kendalltau(a, b).statistic:.2f}")


if __name__ == "__main__":
    main(make_table, configure(globals()))
