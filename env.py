"""
The gymnasium environment of heads x layers, what evaluates an architecture in it, and the table of all 64 architectures.

    python env.py                       # trains each of the 64 on every shard with every seed; goes on where it was stopped
    python env.py --n_envs=2            # in two processes of one thread each, the fastest on two cores
    python env.py --evaluator=supernet --table=out/supernet.csv --against=assets/heads_layers.csv   # how well inherited weights rank
    python env.py --help                # every key with its default

Action a stands for a // 8 + 1 heads and a % 8 + 1 layers, with n_embd = heads * head_size. Writes the file `table`, a row for every
number of entries, architecture and seed: loss and ppl on the shards' test split, time in seconds a training sample. An entry is one
training sequence of block_size tokens. A reward needs {"loss", "ppl", "time"} and no more.
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
from types import SimpleNamespace

import gymnasium
import numpy as np
import torch
from tqdm import tqdm

from configurator import as_list, check_range, check_whole, defaults
from data import load_data, load_meta, load_shards, micro_batches
from model import build
from prepare import cut_shards
from run import Log, silenced, init_out_dir, load_checkpoint, load_model, main, read_json, rng, save, setup
from run import atomic_write, write_json
from train import backward, configure_optimizer, estimate_all, loop, train, train_step, update
from train import * # noqa: F403 (every key of train.py, and the functions that all runs share)
from prepare import prepare_own
from train import check_run

TRAIN_KEYS = tuple(defaults(globals()))
# -----------------------------------------------------------------------------
# the keys of train.py but those of the network's size, and:
del n_layer, n_head, n_embd # noqa: F821 (what the agent picks)
out_dir = 'out/table'
table = 'assets/heads_layers.csv'
cache_dir = 'out/cache' # what has been trained is not trained again
evaluator = 'train' # 'supernet'
against = '' # a table: Kendall's tau between its losses and these
shards = 5 # of prepare.py, which makes them at first use
entries = [20, 2000] # of the smallest and the largest shard
test_entries = 256 # of the test split
seeds = [1, 2, 3] # of the trainings
n_envs = 1 # processes
time_from = 'measured' # 'flops': repeatable, at flops_per_second
flops_per_second = 2e10 # of a training step, forward and backward
supernet_iters = 300 # steps of a supernet, one for each shard; many overfit a small one
# a training, of some seconds on one core
head_size = 16
batch_size = 4
block_size = 64
max_iters = 100
warmup_iters = 10
learning_rate = 1e-3
min_lr = 1e-3
# -----------------------------------------------------------------------------

N = 8 # heads and layers are 1 to N
COLUMNS = {"entries": int, "n_head": int, "n_layer": int, "seed": int, "loss": float, "ppl": float, "time": float, "params": int,
           "flops": int}
PLACES = ("out_dir", "overwrite", "data_dir", "dataset", "init_from", "wandb_log", "wandb_project", "tensorboard", "log_interval",
          "eval_interval", "eval_iters", "save_interval", "save_minutes", "backend", "timeout_minutes") # change no result


# ---- rewards

def seed_reward(metrics, trade_off=None):
    """exp(10 - loss) + exp(2 - t / 6) + 10000 / (ppl + 1) less 0.8 times the mean absolute deviation of the three from their mean;
    t in milliseconds a sample. The one of the published system: below a loss of about 5 the first and the last term drown the time."""
    terms = math.exp(10 - metrics["loss"]), math.exp(2 - 1000 * metrics["time"] / 6), 10000 / (metrics["ppl"] + 1)
    mean = sum(terms) / 3
    return sum(terms) - 0.8 * sum(abs(term - mean) for term in terms) / 3


def balance_reward(metrics, trade_off=0.1):
    """-loss - trade_off * ln(time / 1 ms): a network of e times the time a sample must have a loss that is lower by trade_off nats."""
    return -metrics["loss"] - trade_off * math.log(1000 * metrics["time"])


REWARDS = {"seed": seed_reward, "balance": balance_reward}


# ---- architectures

def arch_of(action):
    """{"n_head", "n_layer"} of an action, 0 to 63."""
    return {"n_head": int(action) // N + 1, "n_layer": int(action) % N + 1}


def sizes_of(arch, config):
    """The keys of train.py for the network of an arch."""
    return {**arch, "n_embd": arch["n_head"] * config["head_size"]}


def measure_times(archs, config, rounds=20):
    """The seconds a sample of a training step of each arch: the median of interleaved rounds, after one that does not count."""
    config = SimpleNamespace(**config | {"overwrite": True, "init_from": "scratch"})
    check_run(config)
    run = setup(config)
    prepare_own(config, run)
    tokens, _, facts = load_data(config, run)
    vars(config).update(facts)
    nets = [build(vars(config) | sizes_of(arch, vars(config))).to(run.device) for arch in archs]
    optimizers = [configure_optimizer(net, config, run) for net in nets]
    seconds = [[] for _ in archs]
    for i in tqdm(range(rounds + 1), desc="time", unit="round", disable=len(archs) == 1):
        for net, optimizer, taken in zip(nets, optimizers, seconds, strict=True):
            clock = time.perf_counter()
            loss = backward(net, micro_batches(tokens, config, run, "time", i), run)
            update(net, optimizer, loss, config, run, SimpleNamespace(step=i, skipped=0))
            taken.append((time.perf_counter() - clock) / config.batch_size)
    return [statistics.median(taken[1:]) for taken in seconds]


def with_time(found, config):
    """The metrics of an evaluation, from {"loss", "seconds", "params", "flops"}; forward and backward cost three forwards."""
    time = found["seconds"] if config["time_from"] == "measured" else 3 * found["flops"] / config["flops_per_second"]
    return {"loss": found["loss"], "ppl": math.exp(found["loss"]), "time": time, "params": found["params"], "flops": found["flops"]}


# ---- evaluators: evaluate(arch, shard) -> {"loss", "ppl", "time", "params", "flops"}. shard: one of shards_of(), with a "seed".

def cached(kind, config, shard, **settings):
    """(the settings of a training, its path in cache_dir without an ending): the same settings, data and seed have the same name."""
    settings = {key: config[key] for key in TRAIN_KEYS if key in config and key not in PLACES} | settings | {"seed": shard["seed"]}
    meta = load_meta(config["data_dir"], shard["dataset"])
    data = {"entries": shard["entries"], "train": meta["train_sha256"], "test": meta["val_sha256"]}
    name = hashlib.sha256(json.dumps([settings, data], sort_keys=True).encode()).hexdigest()[:32]
    path = os.path.join(config["cache_dir"], kind + name)
    job = {**config, **settings, "dataset": shard["dataset"], "out_dir": f"{path}.{os.getpid()}.run", "overwrite": True,
           "init_from": "scratch", "save_minutes": 0.0, "eval_interval": settings["max_iters"], "eval_iters": 1,
           "wandb_log": False, "tensorboard": False} # the agent's run is logged, not each of its evaluations
    return settings, path, job


def train_evaluator(config):
    """Trains the network on the shard with train.py, once: the result stays in cache_dir."""
    def evaluate(arch, shard):
        settings, path, job = cached("", config, shard, **sizes_of(arch, config))
        if not os.path.exists(f"{path}.json"):
            with silenced():
                result = train(job, test=True)
            found = {"loss": result["test_loss"], "flops": result["flops"], "params": result["params"],
                     "seconds": result["seconds"] / job["max_iters"] / job["batch_size"]}
            done = os.path.join(job["out_dir"], "evaluation.json") # not by write_json: another process may end the same training now
            write_json(done, {"arch": arch, "shard": shard, "settings": settings, **found})
            os.replace(done, f"{path}.json")
            shutil.rmtree(job["out_dir"])
        return with_time(read_json(f"{path}.json"), config)
    return evaluate


def supernet_evaluator(config):
    """Weights inherited from one supernet for each shard and seed, trained at its first use and kept in cache_dir."""
    nets, seconds = {}, {} # time depends on the arch alone

    def evaluate(arch, shard):
        key = shard["dataset"], shard["seed"]
        if key not in nets:
            nets[key] = load_supernet(config, shard)
        net, tokens, config_, run = nets[key]
        small = net.extract(diagonal(arch, config))
        if config["time_from"] == "measured" and str(arch) not in seconds:
            with silenced():
                seconds[str(arch)] = measure_times([arch], {**config, "dataset": shard["dataset"]})[0]
        loss = estimate_all(small, tokens, config_, run)["loss"]
        return with_time({"loss": loss, "seconds": seconds.get(str(arch)), **small.cost()}, config)
    return evaluate


def diagonal(arch, config):
    """The arch in the supernet's space, where width and heads are choices of their own: all widths n_embd = n_head * head_size."""
    sizes = sizes_of(arch, config)
    return {**sizes, "n_head": [sizes["n_head"]] * sizes["n_layer"], "mlp_ratio": [config["mlp_ratio"]] * sizes["n_layer"]}


def load_supernet(config, shard):
    """The supernet of a shard, trained if it is not in cache_dir: (net, the test split's tokens, config, run)."""
    numbers = list(range(1, N + 1))
    space = {"n_layer": numbers, "n_head": numbers, "n_embd": [n * config["head_size"] for n in numbers]}
    _, path, job = cached("supernet_", config, shard, **space, max_iters=config["supernet_iters"])
    job, name = SimpleNamespace(**job), f"{path}.pt"
    with silenced():
        check_run(job)
        run = setup(job)
        prepare_own(job, run)
        tokens, test, facts = load_data(job, run)
        vars(job).update(facts)
        net = build(vars(job)).to(run.device)
        if not os.path.exists(name):
            train_supernet(net, tokens, job, run)
            save(job, run, "supernet.pt", net)
            os.replace(os.path.join(job.out_dir, "supernet.pt"), name)
            shutil.rmtree(job.out_dir)
    job.batch_size = 64 # of evaluations
    return load_model(net, load_checkpoint(name, run.device), name), test, job, run


def train_supernet(net, tokens, config, run):
    """SPOS (Guo et al. 2019) on the 64 networks: every step trains one, all as likely, by slicing, at its own cost."""
    init_out_dir(config, run)
    optimizer = configure_optimizer(net, config, run)
    state = SimpleNamespace(step=0, evaluated=-1, stop=False, skipped=0, seconds=0.0)

    def step(lr):
        arch = arch_of(torch.randint(N * N, (), generator=rng(config.seed, "sample", state.step)))
        return train_step(net, net, optimizer, tokens, config, run, state, lr, (diagonal(arch, vars(config)),))

    with Log(config, run) as log:
        loop(config, run, state, log, 0, step, lambda: False, lambda: None)


def table_evaluator(config):
    """Looks up the rows of config["table"]."""
    rows = {(row["entries"], row["n_head"], row["n_layer"], row["seed"]): row for row in read_table(config["table"])}
    wanted = {(n, *arch_of(a).values(), seed) for n, *_ in rows for a in range(N * N) for seed in config["seeds"]}
    for n, head, layer, seed in sorted(wanted - set(rows))[:1]:
        raise SystemExit(f"The table {config['table']} lacks a row of {n} entries, {head} heads, {layer} layers and seed {seed}: finish it "
                         "by python env.py, or choose other --seeds.")

    def evaluate(arch, shard):
        row = rows[shard["entries"], arch["n_head"], arch["n_layer"], shard["seed"]]
        return with_time(row | {"seconds": row["time"]}, config)
    return evaluate


EVALUATORS = {"train": train_evaluator, "supernet": supernet_evaluator, "table": table_evaluator}


def shards_of(config, mode=0):
    """[{"entries", "mode", ...}] in order of size: of the table if that evaluates, else of the data, cut at first use."""
    if config.get("evaluator") == "table":
        sizes = sorted({row["entries"] for row in read_table(config["table"])})
        if len(sizes) < 2:
            raise SystemExit(f"The table {config['table']} has {len(sizes)} number of entries, and an agent needs two or more.")
        return [{"entries": n, "mode": i % 2 + 1} for i, n in enumerate(sizes) if mode in (0, i % 2 + 1)]
    prepare_own(SimpleNamespace(**config), SimpleNamespace(master=True, world=1))
    meta, cuts = load_meta(config["data_dir"], config["dataset"]), ("shards", "entries", "test_entries", "block_size")
    cut_shards(config["data_dir"], config["dataset"], meta, *(config[key] for key in cuts))
    return load_shards(config["data_dir"], config["dataset"], config["shards"], mode)


class ArchEnv(gymnasium.Env):
    """One step evaluates one architecture on one shard; an episode walks through the shards in a random order.

    Observation (1,): the shard's number of entries, its logarithm from 0 (limits[0]) to 1 (limits[1]). Action: 0 to 63, see arch_of().
    evaluate(arch, shard) -> {"loss", "ppl", "time"}; reward(metrics) -> float; shards: of shards_of(); seeds: an episode's trainings
    have one of them, drawn at its start.
    """
    def __init__(self, evaluate, reward, shards, seeds, limits=None):
        self.evaluate, self.reward, self.shards, self.seeds = evaluate, reward, shards, seeds
        self.limits = limits or (shards[0]["entries"], shards[-1]["entries"])
        self.observation_space = gymnasium.spaces.Box(0, 1, (1,))
        self.action_space = gymnasium.spaces.Discrete(N * N)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.order, self.position = self.np_random.permutation(len(self.shards)), 0
        self.seed = int(self.np_random.choice(self.seeds))
        return self.observe(self.shards[self.order[0]]), {}

    def observe(self, shard):
        low, high = self.limits
        return np.array([math.log(shard["entries"] / low) / math.log(high / low)], dtype=np.float32)

    def step(self, action):
        shard, arch = self.shards[self.order[self.position]], arch_of(action)
        try:
            metrics = self.evaluate(arch, {**shard, "seed": self.seed})
        except FloatingPointError as e: # in a process of its own nobody else would make a sentence of it
            raise SystemExit(str(e)) from None
        reward = self.reward(metrics)
        self.position += 1
        done = self.position == len(self.shards)
        following = shard if done else self.shards[self.order[self.position]]
        return self.observe(following), reward, done, False, {"entries": shard["entries"], **arch, **metrics, "reward": reward}


# ---- the table

def check_known(config, known):
    """SystemExit unless the keys of config have one of the values that there are. known: key -> values."""
    for key, values in known.items():
        if getattr(config, key) not in values:
            raise SystemExit(f"{key}={getattr(config, key)!r} is not one of {', '.join(map(str, values))}.")


def check(config, evaluators):
    """SystemExit for a key of this script that cannot be."""
    check_known(config, {"evaluator": evaluators, "time_from": ["measured", "flops"]})
    check_range(config, 1, "n_envs", "max_iters", "supernet_iters")
    check_whole(config, "seeds")
    if config.flops_per_second <= 0:
        raise SystemExit(f"flops_per_second={config.flops_per_second} must be above 0.")


def read_table(path):
    """The rows of a table: dicts of numbers. SystemExit if there is none, or it is damaged."""
    try:
        with open(path, newline="") as f:
            rows = list(csv.DictReader(f))
        if not rows:
            raise ValueError("it has no rows")
        return [{name: of(row[name]) for name, of in COLUMNS.items()} for row in rows]
    except OSError as e:
        raise SystemExit(f"The table {path} cannot be read ({e.strerror}): name one by --table, or make it by python env.py.") from None
    except (KeyError, TypeError, ValueError) as e:
        raise SystemExit(f"The table {path} is damaged ({e}): its columns must be {', '.join(COLUMNS)}, all numbers.") from None


def reward_table(path, reward, config):
    """(the numbers of entries (S,), the rewards (S, 64), means over config["seeds"]) of a table."""
    evaluate, entries = table_evaluator({**config, "table": path}), sorted({row["entries"] for row in read_table(path)})
    return entries, np.array([[np.mean([reward(evaluate(arch_of(a), {"entries": n, "seed": seed})) for seed in config["seeds"]])
                               for a in range(N * N)] for n in entries])


def regret(rewards, actions):
    """(S,) What the actions (S,) lose against the best of rewards (S, 64), as a share of the range between the best and the worst."""
    best, worst = rewards.max(1), rewards.min(1)
    return (best - rewards[np.arange(len(rewards)), actions]) / (best - worst)


def start_worker(config):
    global _evaluate
    _evaluate = EVALUATORS[config["evaluator"]](config)


def run_job(arch, shard):
    clock = time.perf_counter()
    row = {"entries": shard["entries"], **arch, "seed": shard["seed"]} | _evaluate(arch, shard)
    return row | {"took": time.perf_counter() - clock}


def make_table(config):
    """Evaluates everything and writes the table; returns its rows."""
    config = config | {"seeds": as_list(config["seeds"])}
    check(SimpleNamespace(**config), ["train", "supernet"])
    others = read_table(config["against"]) if config["against"] else []
    archs = [arch_of(action) for action in range(N * N)]
    jobs = [(arch, {**shard, "seed": seed}) for seed in config["seeds"] for shard in shards_of(config) for arch in archs]
    wanted = {(shard["entries"], *arch.values()) for arch, shard in jobs} if others else set()
    for n, head, layer in sorted(wanted - {(row["entries"], row["n_head"], row["n_layer"]) for row in others})[:1]:
        raise SystemExit(f"The table against={config['against']} lacks a row of {n} entries, {head} heads and {layer} layers: name one of "
                         "the same --shards and --entries.")
    # the time of a training is that of whatever else ran beside it, so it is measured afterwards
    config, measured = config | {"time_from": "flops"}, config["time_from"] == "measured"
    with ProcessPoolExecutor(config["n_envs"], multiprocessing.get_context("spawn"), start_worker, (config,)) as pool:
        rows = list(tqdm(pool.map(run_job, *zip(*jobs, strict=True)), total=len(jobs), desc="table", unit="network"))
    if measured:
        seconds = dict(zip(map(str, archs), measure_times(archs, config), strict=True))
        rows = [row | {"time": seconds[str({"n_head": row["n_head"], "n_layer": row["n_layer"]})]} for row in rows]
    lines = [",".join(f"{row[name]:.5g}" if of is float else str(row[name]) for name, of in COLUMNS.items()) for row in rows]
    atomic_write(config["table"], lambda f: f.write("\n".join([",".join(COLUMNS), *lines, ""]).encode()))
    took = [row["took"] for row in rows]
    print(f"{config['table']}: {len(rows)} rows, {sum(took):.0f} s, {1000 * statistics.median(took):.1f} ms an evaluation (median)")
    if others:
        compare(rows, others)
    print(f"next: python train_rl.py --table={config['table']} --seeds={str(config['seeds']).replace(' ', '')}")
    return rows


def compare(rows, others):
    """Prints Kendall's tau between the losses of two tables over the 64 networks, means over the seeds, for each number of entries."""
    def losses(rows, entries):
        return np.array([np.mean([r["loss"] for r in rows if (r["entries"], r["n_head"], r["n_layer"]) == (entries, *arch_of(a).values())])
                         for a in range(N * N)])
    for entries in sorted({row["entries"] for row in rows}):
        a, b = losses(rows, entries), losses(others, entries)
        tau = (np.sign(a[:, None] - a) * np.sign(b[:, None] - b)).sum() / (len(a) * (len(a) - 1))
        print(f"{entries:6d} entries: Kendall's tau {tau:.2f}")


if __name__ == "__main__":
    from configurator import configure
    main(make_table, configure(globals()))
