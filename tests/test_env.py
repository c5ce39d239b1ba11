"""The environment, its rewards and evaluators, and the shards, on real data."""
import json
import math
import subprocess
import sys
import warnings

import gymnasium.utils.env_checker
import numpy as np
import pytest
import stable_baselines3.common.env_checker
import torch
from conftest import ROOT, TINY

import configurator
import data
import env
import prepare
import train
import train_rl
from env import ArchEnv, arch_of, balance_reward, regret, seed_reward

TABLE = str(ROOT / "assets/heads_layers.csv")
SHARDS = dict(shards=4, entries=[5, 60], test_entries=20, block_size=16)
TINY_TRAINING = TINY | SHARDS | dict(max_iters=2, head_size=2)


@pytest.fixture
def config(data_dir, tmp_path):
    places = dict(data_dir=data_dir, cache_dir=str(tmp_path), time_from="flops")
    return configurator.defaults(vars(env)) | TINY_TRAINING | places


def on_table(**changes):
    return configurator.defaults(vars(env)) | dict(evaluator="table", table=TABLE) | changes


def make(config, reward=balance_reward, seeds=(1, 2, 3)):
    return ArchEnv(env.table_evaluator(config), reward, env.shards_of(config), list(seeds))


# ---- rewards

@pytest.mark.parametrize("loss, ppl, time, reward", [
    (8.839887619018555, 7034.92626953125, 0.004516353805115756, 7.411774764733801),
    (8.461454391479492, 4793.56787109375, 0.009195513195461698, 7.3377557761501135)])
def test_seed_reward_is_the_published_one(loss, ppl, time, reward):
    assert seed_reward({"loss": loss, "ppl": ppl, "time": time}) == pytest.approx(reward, rel=1e-12)


@pytest.mark.parametrize("trade_off", [0.0, 0.1, 2.0])
def test_balance_reward_trades_time_for_loss_at_the_stated_rate(trade_off):
    a = {"loss": 3.0, "ppl": 20.0, "time": 0.002}
    b = {"loss": 3.0 - trade_off, "ppl": 20.0, "time": 0.002 * math.e}
    assert balance_reward(a, trade_off) == pytest.approx(balance_reward(b, trade_off))
    assert balance_reward(a, trade_off) > balance_reward(a | {"loss": 3.1}, trade_off)


# ---- two processes

RACE = """
import json, multiprocessing, sys
sys.path[:0] = [{root!r}]
import torch
import env
torch.set_num_threads(1)
def evaluate(config, barrier):
    train, shards = env.train, env.shards_of(config)
    def together(*args, **kwargs):
        result = train(*args, **kwargs)
        barrier.wait()
        return result
    env.train = together
    for seed in range(15):
        for shard in shards[:2]:
            env.train_evaluator(config)(env.arch_of(0), {{**shard, "seed": seed}})
if __name__ == "__main__":
    fork = multiprocessing.get_context("fork")
    config, barrier = json.loads({config!r}), fork.Barrier(2, timeout=60)
    env.shards_of(config) # cuts them
    both = [fork.Process(target=evaluate, args=(config, barrier)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    print([process.exitcode for process in both])
"""


def test_two_environments_may_end_the_same_training_at_once(config, tmp_path):
    """As they do that step together: neither destroys what the other writes."""
    program = RACE.format(root=str(ROOT), config=json.dumps(config | {"max_iters": 1}))
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True,
                          text=True, timeout=300)
    assert done.stdout.splitlines()[-1] == "[0, 0]", done.stderr[-2000:]
    left = [path.name for path in tmp_path.iterdir()]
    assert len(left) == 30 and all(name.endswith(".json") for name in left), left


# ---- the environment

def test_the_actions_are_all_heads_times_layers():
    pairs = [(arch["n_head"], arch["n_layer"]) for arch in map(arch_of, range(64))]
    assert sorted(pairs) == [(h, layer) for h in range(1, 9) for layer in range(1, 9)]


def test_the_checkers_of_gymnasium_and_stable_baselines3_pass():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stable_baselines3.common.env_checker.check_env(make(on_table()))
        warnings.filterwarnings("ignore", message=".*render.*|.*spec.*|.*wrapped.*")
        gymnasium.utils.env_checker.check_env(make(on_table()), skip_render_check=True)


def test_an_episode_walks_once_through_all_shards():
    world = make(on_table())
    sizes = [shard["entries"] for shard in world.shards]
    for seed in (0, 1):
        observed, _ = world.reset(seed=seed)
        seen, done, total = [], False, 0
        while not done:
            before = float(observed[0])
            observed, reward, done, _, info = world.step(9)
            seen.append(info["entries"])
            low, high = sizes[0], sizes[-1]
            assert before == pytest.approx(math.log(info["entries"] / low) / math.log(high / low),
                                           abs=1e-6), "the shard that was shown"
            assert reward == balance_reward(info) and (info["n_head"], info["n_layer"]) == (2, 2)
            total += 1
        assert sorted(seen) == sizes and total == len(sizes)


def test_regret_is_0_for_the_best_and_1_for_the_worst():
    rewards = np.random.default_rng(0).normal(size=(5, 64))
    assert regret(rewards, rewards.argmax(1)) == pytest.approx(np.zeros(5))
    assert regret(rewards, rewards.argmin(1)) == pytest.approx(np.ones(5))


# ---- shards

def tokens_of(data_dir, name, split):
    return np.array(data.load_tokens(data_dir, name, split))


def test_shards_are_disjoint_parts_of_train_and_test_on_val(config, data_dir):
    shards = env.shards_of(config)
    sizes, block = [shard["entries"] for shard in shards], SHARDS["block_size"]
    assert len(set(sizes)) == len(sizes) == 4 and (sizes[0], sizes[-1]) == (5, 60)
    whole, start = tokens_of(data_dir, "pydocs", "train"), 0
    for shard in shards:
        tokens, test = (tokens_of(data_dir, shard["dataset"], split) for split in ("train", "val"))
        assert len(tokens) == shard["entries"] * block + 1
        assert (tokens == whole[start:start +
                                len(tokens)]).all(), "each begins where the one before it ends"
        start += len(tokens)
        assert (test == tokens_of(data_dir, "pydocs", "val")[:20 * block + 1]).all()
        assert test.tobytes() not in tokens.tobytes()
    halves = [[shard["entries"] for shard in env.shards_of(config, mode)] for mode in (1, 2)]
    assert sorted(halves[0] + halves[1]) == sizes and abs(len(halves[0]) - len(halves[1])) <= 1


@pytest.mark.parametrize("change, words", [
    (dict(entries=[5, 6]), "all different"), (dict(entries=[5, 6000]), "tokens of train.bin"),
    (dict(shards=1), "two shards"), (dict(entries=[0, 6]), "two shards"),
    (dict(test_entries=9999), "of val.bin"), (dict(mode=3), "mode=3")])
def test_impossible_shards_are_one_sentence(config, change, words):
    with pytest.raises(SystemExit, match=words):
        env.shards_of(config | {"shards": 7} | change, change.get("mode", 0))


@pytest.mark.parametrize("key", ["n_envs", "max_iters", "supernet_iters"])
def test_a_table_of_nothing_is_one_sentence(key, tmp_path):
    with pytest.raises(SystemExit, match=f"^{key}=0 must be 1 or more.$"):
        env.make_table(configurator.defaults(vars(env)) | {
            key: 0, "data_dir": str(tmp_path), "table": str(tmp_path / "t.csv"), "seeds": 1})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change, words", [
    (dict(evaluator="table"), "evaluator='table' is not one of train, supernet"),
    (dict(time_from="clock"), "time_from='clock' is not one"),
    (dict(seeds=[1, 2.5]), r"seeds=\[1, 2.5\] must be whole numbers"),
    (dict(flops_per_second=-1.0), "flops_per_second=-1.0 must be above"),
    (dict(against="none.csv"), "none.csv cannot be read"),
    (dict(against=TABLE), "lacks a row of 5 entries, 1 heads and 1 layers")])
def test_a_mistake_is_one_sentence_before_anything_is_trained(config, change, words, tmp_path):
    with pytest.raises(SystemExit, match=words) as e:
        env.make_table(config | {"table": str(tmp_path / "t.csv")} | change)
    assert "\n" not in str(e.value) and not list(tmp_path.iterdir())


def test_a_table_of_one_number_of_entries_has_no_scale(tmp_path):
    lines = (ROOT / "assets/heads_layers.csv").read_text().splitlines()
    (tmp_path / "t.csv").write_text("\n".join(line for line in lines
                                              if line.startswith(("entries", "20,"))))
    with pytest.raises(SystemExit,
                       match=r"t.csv has 1 number of entries, and an agent needs two or more"):
        env.shards_of(on_table(table=str(tmp_path / "t.csv")))


def test_the_next_command_is_about_the_shards_that_were_cut(data_dir, tmp_path, capsys):
    cuts = dict(shards=3, entries=[4, 40], test_entries=10, block_size=8)
    prepare.prepare(dataset="text", name="pydocs", path=f"{data_dir}/text.txt",
                    data_dir=str(tmp_path), **cuts)
    _, _, script, *argv = capsys.readouterr().out.splitlines()[-1].split()
    found = configurator.configure(dict(vars(train_rl)), argv)
    assert script == "train_rl.py" and [shard["entries"]
                                        for shard in env.shards_of(found)] == [4, 13, 40]


def test_other_shards_do_not_replace_those_there_are(config):
    env.shards_of(config)
    with pytest.raises(SystemExit, match="holds shards of 5 to 60 entries of 16 tokens"):
        env.shards_of(config | {"entries": [5, 50]})


# ---- evaluators

def test_the_train_evaluator_is_train_py_and_trains_once(config, tmp_path):
    shard, arch = {**env.shards_of(config)[2], "seed": 5}, {"n_head": 3, "n_layer": 2}
    before = torch.get_rng_state()
    first = env.train_evaluator(config)(arch, shard)
    assert torch.equal(torch.get_rng_state(), before), (
        "an agent's own random numbers go on as if there had been no training")
    files = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert env.train_evaluator(config | {"eval_interval": 3, "n_envs": 7})(arch, shard) == first
    assert {path.name: path.stat().st_mtime_ns
            for path in tmp_path.iterdir()} == files and len(files) == 1
    same = ("data_dir", "head_size", "learning_rate", "min_lr", "warmup_iters", "batch_size",
            "block_size")
    job = configurator.defaults(vars(train)) | TINY | {key: config[key] for key in same}
    job |= dict(n_head=3, n_layer=2, n_embd=6, max_iters=2, seed=5, dataset=shard["dataset"],
                out_dir=str(tmp_path / "alone"))
    alone = train.train(job, test=True)
    assert (first["loss"] == alone["test_loss"] and first["params"] == alone["params"]
            and first["ppl"] == math.exp(first["loss"]))
    assert first["time"] == 3 * alone["flops"] / config["flops_per_second"]
    for change in (dict(max_iters=3), dict(learning_rate=1.0)):
        assert env.train_evaluator(config | change)(arch, shard)["loss"] != first["loss"]
    assert env.train_evaluator(config)(arch, shard | {"seed": 6})["loss"] != first["loss"]


def test_the_supernet_holds_the_networks_that_are_trained(config):
    """The same sizes and cost; its loss is that of inherited weights, and training it helps."""
    shard, losses = {**env.shards_of(config)[3], "seed": 1}, []
    for iters in (1, 200):
        evaluate = env.supernet_evaluator(config | {"supernet_iters": iters, "learning_rate": 3e-3})
        found = [evaluate(arch_of(a), shard) for a in (0, 20, 63)]
        losses.append([metrics["loss"] for metrics in found])
    trained = env.train_evaluator(config)
    for metrics, a in zip(found, (0, 20, 63), strict=True):
        other = trained(arch_of(a), shard)
        for key in ("params", "flops", "time"):
            assert metrics[key] == other[key]
    assert np.all(np.array(losses[1]) < np.array(losses[0]) - 0.1), losses


def test_kendalls_tau_compares_tables(capsys):
    """Kendall's tau is 1 against itself, -1 against the reverse."""
    rows = [{"entries": n, **arch_of(a), "seed": s, "loss": (a * 37 % 64) + s + n} for n in (5, 9)
            for a in range(64) for s in (1, 2)]
    env.compare(rows, rows)
    env.compare(rows, [row | {"loss": -row["loss"]} for row in rows])
    last_words = [line.split()[-1] for line in capsys.readouterr().out.splitlines()]
    assert last_words == ["1.00", "1.00", "-1.00", "-1.00"]


def test_measured_times_grow_with_the_network(config):
    shard = env.shards_of(config)[3]
    small, large = env.measure_times([arch_of(0), arch_of(63)],
                                     config | {"dataset": shard["dataset"], "head_size": 16,
                                               "block_size": 64})
    assert 0 < small < large


# ---- the table

def test_the_table_is_complete_and_small():
    rows = env.read_table(TABLE)
    keys = {(row["entries"], row["n_head"], row["n_layer"], row["seed"]) for row in rows}
    entries, seeds = ({row[name] for row in rows} for name in ("entries", "seed"))
    assert (len(rows) == len(keys) == 64 * len(entries) * len(seeds) and len(entries) >= 5
            and len(seeds) >= 3)
    assert (ROOT / "assets/heads_layers.csv").stat().st_size < 300_000
    for row in rows:
        assert row["ppl"] == pytest.approx(math.exp(row["loss"]), rel=1e-3) and row["time"] > 0


def test_a_table_is_made_once(config, tmp_path, monkeypatch, capsys):
    """Every architecture for each number of entries, in two processes; a second run trains
    nothing, and the command that it names next asks for what is in the table. Nine networks, to be
    quick."""
    monkeypatch.setattr(env, "N_OPTIONS", 3)
    config |= dict(shards=2, seeds=[7], max_iters=1, n_envs=2, time_from="measured",
                   table=str(tmp_path / "t.csv"))
    env.make_table(config)
    rows = env.read_table(config["table"])
    assert [(row["entries"], row["n_head"], row["n_layer"]) for row in rows] == [
        (n, h, d) for n in (5, 60) for h in (1, 2, 3) for d in (1, 2, 3)]
    for row in rows: # the time depends on the architecture alone
        sizes = row["n_head"], row["n_layer"]
        assert row["time"] == next(r["time"] for r in rows
                                   if (r["n_head"], r["n_layer"]) == sizes)
    trained = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    assert len(trained) == 18
    env.make_table(config | {"n_envs": 1})
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")} == trained
    found = configurator.configure(dict(vars(train_rl)),
                                   capsys.readouterr().out.splitlines()[-1].split()[3:])
    env.table_evaluator(found)


@pytest.mark.parametrize("text", ["", "entries,n_head\n1,2\n", None])
def test_a_damaged_or_missing_table_is_one_sentence(text, tmp_path):
    if text is not None:
        (tmp_path / "t.csv").write_text(text)
    with pytest.raises(SystemExit, match=r"The table .* (cannot be read|is damaged)"):
        env.read_table(str(tmp_path / "t.csv"))
