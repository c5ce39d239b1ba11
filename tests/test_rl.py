"""Agents that choose heads and layers: they learn, resume exactly, and leave files that hold no
pickle."""
import inspect
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, flags, run, succeeds
from stable_baselines3.common.vec_env import DummyVecEnv

import configurator
import env
import train_rl
from analyze import analyze
from run import load_checkpoint, read_json, read_lines
from train_rl import learn

TABLE = str(ROOT / "assets/heads_layers.csv")
SMALL = dict(table=TABLE, budget=40, updates=40, eval_interval=10, learning_starts=8)


def settings(out, **changes):
    places = dict(out_dir=str(out), overwrite=True)
    return configurator.defaults(vars(train_rl)) | SMALL | places | changes


def log_of(out):
    lines = read_lines(str(Path(out) / "log.jsonl"))
    return ([line for line in lines if "reward" in line],
            [line for line in lines if "actions" in line])


def expected_regret():
    """Of an architecture drawn at random."""
    rewards = env.reward_table(env.balance_reward, settings(""))
    return np.mean([env.regret(rewards, np.full(len(rewards), a)) for a in range(64)])


@pytest.mark.parametrize("changes", [dict(q_network="numbers"), dict(q_network="outputs"),
                                     dict(algo="ppo"), dict(algo="a2c")])
def test_an_agent_learns(changes, tmp_path):
    """Its regret ends far below that of chance, and it values what it takes above the average."""
    result = learn(settings(tmp_path, budget=300, updates=1500, eval_interval=50, **changes))
    assert result["updates"] > 0 and result["regret"] < 0.5 * expected_regret()
    evaluated, looks = log_of(tmp_path)
    rewards = [line["reward"] for line in evaluated]
    assert np.mean(rewards[-100:]) > np.mean(rewards[:100])
    # that updates once more
    regret = pytest.approx(result["regret"], abs=0.05)
    assert np.mean(looks[-1]["regret"]) == regret or changes.get("algo")
    analyze(str(tmp_path))
    for name in ("aggregate", "frames", "two", "regret", "surface"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000


@pytest.mark.parametrize("algo", train_rl.ALGOS)
@pytest.mark.parametrize("q_network", ["numbers", "outputs"])
def test_the_header_lists_every_deviation_from_stable_baselines3(algo, q_network):
    """Each number of ours that differs, with the library's own in brackets, and no other one."""
    changes = dict(algo=algo, q_network=q_network, budget=1000, updates=4000, learning_starts=0)
    config = SimpleNamespace(**settings("", **changes))
    ours = train_rl.agent_settings(config)
    defaults = inspect.signature(train_rl.ALGOS[algo]).parameters
    differing = {key: (ours[key], defaults[key].default) for key in ours.keys() & defaults.keys()
                 if isinstance(ours[key], int | float) and ours[key] != defaults[key].default}
    differing.pop("seed")
    paragraph = r"^    (all|dqn|ppo|a2c) (.*?)(?=^    \w|\Z)"
    paragraphs = re.findall(paragraph, train_rl.__doc__, re.M | re.S)
    text = " ".join(words for name, words in paragraphs if name in ("all", algo))
    numbers = re.findall(r"(\w+) ([\d.]+) \(([\d.]+)\)", text)
    listed = {key: (float(own), float(default)) for key, own, default in numbers}
    if q_network == "numbers":
        listed.pop("exploration_fraction", None)
    assert listed == differing


@pytest.fixture
def one_process(monkeypatch):
    """All environments in this process: others take seconds to start."""
    monkeypatch.setattr(train_rl, "SubprocVecEnv", lambda envs, start_method: DummyVecEnv(envs))


@pytest.mark.parametrize("changes, expected", [
    (dict(updates=128), 128), (dict(updates=50), 50), (dict(updates=7), 7),
    (dict(updates=50, learning_starts=15), 50), (dict(updates=80, budget=4), 80),
    (dict(algo="ppo"), 40), (dict(algo="a2c"), 4), (dict(algo="a2c", budget=100), 13),
    (dict(algo="ppo", budget=100), 90)])
def test_as_many_updates_and_evaluations_whatever_n_envs(changes, expected, tmp_path, one_process):
    """DQN makes those that are asked for, PPO and A2C one or ten a rollout; and each iteration uses
    its budget to the number. What is done in two iterations is done by a resume, too."""
    changes = dict(budget=16, learning_starts=0) | changes
    budget, counts = changes["budget"], []
    for n_envs in (1, 2, 4):
        out = tmp_path / str(n_envs)
        result = learn(settings(out, n_envs=n_envs, n_iterations=2, **changes))
        counts.append((result["updates"], result["evaluations"], len(log_of(out)[0])))
    assert counts == [(2 * expected, 2 * budget, 2 * budget)] * 3
    learn(settings(tmp_path / "r", n_envs=4, mode=1, **changes))
    more = dict(n_iterations=3, init_from="resume")
    result = learn(settings(tmp_path / "r", n_envs=4, **more, **changes))
    assert (result["updates"], result["evaluations"]) == (3 * expected, 3 * budget)


def test_the_updates_are_spread_over_the_evaluations(tmp_path, one_process):
    """None before learning_starts, then evenly: as many a step, up to one."""
    config = SimpleNamespace(**settings(tmp_path, budget=40, updates=100, n_envs=2,
                                        learning_starts=8))
    made, train = [], train_rl.DQN.train

    def counted(model, gradient_steps, batch_size):
        made.append((model.num_timesteps, gradient_steps))
        train(model, gradient_steps, batch_size)
    train_rl.DQN.train = counted
    try:
        learn(vars(config))
    finally:
        train_rl.DQN.train = train
    assert [seen for seen, _ in made] == list(range(10, 41, 2))
    assert {n for _, n in made} == {6, 7} and sum(n for _, n in made) == 100


@pytest.mark.parametrize("changes", [dict(q_network="numbers"), dict(algo="ppo"), dict(algo="a2c")])
def test_two_iterations_are_one_and_one_more(changes, tmp_path):
    """Bit for bit: weights, optimizer, normaliser, replay buffer and log. The modes alternate."""
    learn(settings(tmp_path / "a", n_iterations=2, mode=1, **changes))
    learn(settings(tmp_path / "b", n_iterations=1, mode=1, **changes))
    learn(settings(tmp_path / "b", n_iterations=2, mode=1, init_from="resume", **changes))
    # nothing is unpickled
    a, b = (load_checkpoint(str(tmp_path / out / "ckpt.pt"), "cpu") for out in "ab")
    assert flat(a) == flat(b)
    assert log_of(tmp_path / "a")[0] == log_of(tmp_path / "b")[0]
    halves = {line["entries"]: line["iteration"] for line in log_of(tmp_path / "a")[0]}
    assert halves == {shard["entries"]: shard["mode"] for shard in env.shards_of(settings(""))}
    if "buffer" in a["agent"]:
        assert len(a["agent"]["buffer"]["rewards"]) == 80


def flat(checkpoint):
    """The numbers of a checkpoint that an exact resume must bring back."""
    found = []
    def walk(value):
        if isinstance(value, dict):
            for key in value:
                walk(value[key])
        elif isinstance(value, list | tuple):
            for part in value:
                walk(part)
        else:
            found.append(value.tolist() if isinstance(value, torch.Tensor) else value)
    walk([checkpoint[key] for key in ("model", "optimizer", "agent", "state")])
    return found


def test_random_search_that_has_seen_all_of_one_seed_is_the_oracle(tmp_path):
    shards = env.shards_of(settings(""))
    result = learn(settings(tmp_path, algo="random", seeds=[1], budget=64 * len(shards)))
    assert result["regret"] == 0 and result["updates"] == 0
    evaluated, _ = log_of(tmp_path)
    assert len({(line["entries"], line["n_head"], line["n_layer"])
                for line in evaluated}) == 64 * len(shards)


def test_the_policy_table_says_what_the_environment_says(tmp_path):
    result = learn(settings(tmp_path, seeds=[2]))
    rows = {(row["entries"], row["n_head"], row["n_layer"], row["seed"]): row
            for row in env.read_table(TABLE)}
    for row in result["policy"]:
        found = rows[row["entries"], row["n_head"], row["n_layer"], 2]
        assert (row["loss"], row["time"]) == (found["loss"], found["time"])
        assert row["reward"] == env.balance_reward(found)
    assert result == read_json(tmp_path / "result.json")


def test_numbers_are_what_the_network_sees():
    """Before any update the value is a function of heads and layers alone, the same for equal
    sizes and smooth in them."""
    torch.manual_seed(0)
    net = train_rl.NumbersNet(1, [64, 64], torch.nn.ReLU)
    q = net(torch.tensor([[0.3]])).view(8, 8)
    assert (q.diff(dim=0).abs().max() < q.std() * 2) and (q.diff(dim=1).abs().max() < q.std() * 2)
    assert torch.equal(net.rest(torch.rand(5, 1)), torch.zeros(5, 64))
    sizes = net.sizes.view(8, 8, 2)
    assert sizes[0, 0].tolist() == [-1, -1] and sizes[7, 7].tolist() == [1, 1]


@pytest.mark.parametrize("changes, words", [
    (dict(algo="sac"), "algo='sac' is not one of dqn, ppo, a2c, random"),
    (dict(reward="x"), "reward='x'"), (dict(budget=0), "budget=0"),
    (dict(seeds=[9]), "lacks a row"), (dict(table="none.csv"), "cannot be read"),
    (dict(mode=5), "mode=5 is not one of 0, 1, 2"),
    (dict(updates=0), "updates=0 must be 1 or more"), (dict(temperature=0.0),
                                                       "temperature=0.0 must be above 0"),
    (dict(time_from="flop"), "time_from='flop' is not one of measured, flops"),
    (dict(seeds=1.5), r"seeds=\[1.5\] must be whole"),
    (dict(flops_per_second=0.0), "flops_per_second=0.0 must be above 0"),
    (dict(evaluator="x"), "evaluator='x' is not one of"),
    (dict(learning_starts=-1), "learning_starts=-1 must be 0"),
    (dict(learning_starts=40), "learning_starts=40 must be below budget=40: the agent would never"),
    (dict(n_envs=3), "budget=40 does not divide over n_envs=3.*give --budget=39 or 42, or other"),
    (dict(n_envs=64, algo="ppo"), "budget=40 does not divide over n_envs=64.*give --budget=64, or"),
    (dict(rl_learning_rate=-1), "rl_learning_rate=-1 must be 0 or more")])
def test_a_mistake_is_one_sentence(changes, words, tmp_path):
    with pytest.raises(SystemExit, match=words) as e:
        learn(settings(tmp_path / "o", **changes))
    assert "\n" not in str(e.value) and not (tmp_path / "o").exists()


def test_a_number_is_a_list_of_one_seed(tmp_path):
    number, listed = (learn(settings(tmp_path / str(i), seeds=seeds, algo="random"))
                      for i, seeds in enumerate((1, [1])))
    assert number | {"out_dir": ""} == listed | {"out_dir": ""}


@pytest.mark.parametrize("changes, words", [
    (dict(n_envs=1, n_iterations=3),
     "n_envs=1 differs from the n_envs=2 that this agent has learned with: give --n_envs=2"),
    (dict(n_envs=2, n_iterations=1),
     "n_iterations=1 is below the 2 that this run has made: give --n_iterations=2 or more")])
def test_a_resume_that_cannot_be_is_one_sentence(changes, words, tmp_path, one_process):
    learn(settings(tmp_path, n_envs=2, n_iterations=2))
    log = (tmp_path / "log.jsonl").read_bytes()
    with pytest.raises(SystemExit, match=words) as e:
        learn(settings(tmp_path, init_from="resume", **changes))
    assert "\n" not in str(e.value) and (tmp_path / "log.jsonl").read_bytes() == log


@pytest.mark.parametrize("n_envs, changes", [(4, {}), (1, dict(budget=9)), (1, dict(budget=70)),
                                             (4, dict(budget=12)), (4, dict(budget=68))])
def test_an_agent_that_goes_on_forgets_nothing(n_envs, changes, tmp_path, one_process):
    """Later iterations may be shorter or longer than the first."""
    learn(settings(tmp_path / "b", mode=1, n_envs=n_envs))
    learn(settings(tmp_path / "b", mode=1, n_envs=n_envs, n_iterations=3, init_from="resume",
                   **changes))
    evaluated, _ = log_of(tmp_path / "b")
    rewards = load_checkpoint(str(tmp_path / "b/ckpt.pt"), "cpu")["agent"]["buffer"]["rewards"]
    assert rewards.flatten().tolist() == pytest.approx([line["reward"] for line in evaluated])
    if not changes:
        learn(settings(tmp_path / "a", mode=1, n_envs=n_envs, n_iterations=3))
        whole, parts = (flat(load_checkpoint(str(tmp_path / out / "ckpt.pt"), "cpu"))
                        for out in ("a", "b"))
        assert whole == parts


def test_groups_of_runs_are_compared(tmp_path, capsys):
    for seed in (1, 2):
        learn(settings(tmp_path / f"r_{seed}", algo="random", seed=seed))
    analyze(str(tmp_path), f"draws:{tmp_path}/r_*,the first:{tmp_path}/r_1")
    assert (tmp_path / "regret.png").stat().st_size > 10_000
    last = [np.mean(log_of(tmp_path / f"r_{seed}")[1][-1]["regret"]) for seed in (1, 2)]
    words = f"draws: regret after the last evaluation {100 * np.mean(last):.2f}%"
    assert words in capsys.readouterr().out
    # it ends before its first look at the policy
    learn(settings(tmp_path / "short", algo="random", budget=8))
    for folders in ("none_*", "short"):
        with pytest.raises(SystemExit, match="names no runs"):
            analyze(str(tmp_path), f"x:{tmp_path}/{folders}")
    with pytest.raises(SystemExit, match="more than 5 groups"):
        analyze(str(tmp_path), ",".join([f"x:{tmp_path}/r_1"] * 6))


def test_what_ends_in_an_environments_process_is_said_without_a_traceback(data_dir, tmp_path):
    """There, where the training diverges, and by the script, which loses that environment."""
    options = dict(evaluator="train", data_dir=data_dir, cache_dir=tmp_path / "cache",
                   out_dir=tmp_path / "out", shards=3, entries=[5, 40],
                   test_entries=10, block_size=16, head_size=2, batch_size=2, max_iters=3,
                   warmup_iters=0, decay_lr=False, seeds=[1],
                   budget=12, n_envs=2, learning_rate=1e30)
    done = run("train_rl.py", *flags(options))
    assert (done.returncode == 1 and "Traceback" not in done.stderr
            and "try a lower learning_rate" in done.stderr), done.stderr
    ended = "An environment's process has ended: see its message above."
    assert ended in done.stderr.splitlines() # the other process may end later


def test_parallel_environments_train_for_real(data_dir, tmp_path):
    """Two processes, real training, TensorBoard: from nothing to a policy on shards cut at first
    use."""
    options = dict(evaluator="train", data_dir=data_dir, cache_dir=tmp_path / "cache",
                   out_dir=tmp_path / "out", shards=3, entries=[5, 40],
                   test_entries=10, block_size=16, head_size=2, batch_size=2, max_iters=1,
                   seeds=[1], budget=12, eval_interval=4, n_envs=2,
                   learning_starts=4, updates=50, tensorboard=True)
    out = succeeds("train_rl.py", *(f"--{key}={str(value).replace(' ', '')}"
                                    for key, value in options.items()))
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["evaluations"] == 12 and result["updates"] == 50 and "the best seen" in out
    assert [row["entries"] for row in result["policy"]] == [5, 14, 40]
    evaluated, _ = log_of(tmp_path / "out")
    networks = {(line["entries"], line["n_head"], line["n_layer"]) for line in evaluated}
    networks |= {(row["entries"], row["n_head"], row["n_layer"]) for row in result["policy"]}
    assert len(list((tmp_path / "cache").iterdir())) == len(networks)
    assert list((tmp_path / "out").glob("events.out.tfevents*"))
