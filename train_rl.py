"""
Learns how many heads and layers suit a number of entries (training sequences), by DQN, PPO or A2C.

    python train_rl.py                         # on the table of all 64 networks: half a minute
    python train_rl.py --evaluator=train --shards=10 --budget=100 --n_envs=2 --seeds=[1]  # minutes
    python train_rl.py --evaluator=supernet    # inherited weights, of one supernet for each shard
    python train_rl.py --algo=ppo              # or a2c, or random: the best of random draws
    python train_rl.py --n_iterations=10       # alternates between the two halves of the shards
    python train_rl.py --mode=1                # on one half alone
    python train_rl.py --help                  # every key with its default

Writes to out_dir: run.json (what was run), log.jsonl (a line for each evaluation, and one for the
policy every eval_interval evaluations), ckpt.pt after every iteration, result.json (the policy and
its regret) and the figures of analyze.py. With --init_from=resume a run goes on from its last
iteration, also to a higher --n_iterations.

The header of env.py defines entry, shard, evaluation, reward and regret. Here there are besides:

    policy      the action that the agent takes for each number of entries when it does not explore
    update      of the agent: a gradient step of DQN or A2C, a pass of PPO over its newest rollout
    iteration   `budget` evaluations on one half of the shards, or on all; then a checkpoint

The agents are those of stable-baselines3, with these deviations from its defaults (in brackets).
With them an agent learns from 1,000 evaluations, and not from a million steps. The numbers are
those of --budget=1000 --n_envs=1; agent_settings() has the rest.

    all   gamma 0 (0.99): an action has no influence on which shard comes next. So no agent looks
          ahead, and DQN's target network has no effect. Rewards are normalised by their running
          mean and standard deviation (VecNormalize leaves the mean, and clips). On the CPU.
    dqn   learning_rate 0.001 (0.0001), learning_starts 16 (100), train_freq 1 (4),
          exploration_final_eps 0.1 (0.05), buffer_size 1001 (1000000), which keeps every
          evaluation. Recorder spreads the gradient steps, `updates` in all, evenly. With
          --q_network=outputs exploration_fraction 0.5 (0.1); else NumbersNet and the exploration
          of NumbersPolicy.
    ppo   learning_rate 0.003 (0.0003), n_steps 64 (2048), batch_size 16 (64), ent_coef 0.02 (0).
    a2c   learning_rate 0.003 (0.0007), n_steps 8 (5), ent_coef 0.02 (0). The rollouts of both have
          as many evaluations for any n_envs, and end with the budget: rollout_lengths() has theirs.
"""
import os
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.torch_layers import create_mlp
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize
from stable_baselines3.dqn.policies import DQNPolicy

from configurator import above, as_list, at_least, check_limits, configure
from data import bytes_hash, identity
from env import * # noqa: F403 (its keys, with their comments)
from env import (ArchEnv, EVALUATORS, N_OPTIONS, REWARDS, TRAIN_DEFAULTS, all_archs, arch_of,
                 check_env, check_options, regret, reward_table, shards_of)
from run import (Log, Run, check_resumed_data, draw_figures, init_out_dir, is_resuming, main,
                 read_json, resume, resumed_run, rng, save, setup, signals, stop_if_signaled,
                 write_json)
from search_spaces import OF_DATA, network_keys
from train import check_config

del against # noqa: F821 (only env.py compares tables)
# -----------------------------------------------------------------------------
# the other keys of env.py, and:
# I/O
out_dir = 'out/rl'
overwrite = False # start anew in an out_dir that holds a run, and replace its files
init_from = 'scratch' # 'resume': from ckpt.pt; 'previous': from the checkpoint before it
eval_interval = 25 # evaluations between two log lines of the policy
wandb_log = False
wandb_project = 'nas'
wandb_run_name = '' # '': out_dir
tensorboard = False
# evaluations
evaluator = 'table' # 'train', 'supernet'
reward = 'balance' # 'seed': of the published system, see env.py
trade_off = 0.1 # of balance: the nats of loss that e times the time is worth
mode = 0 # 1, 2: one half of the shards; 0: all, or 1 first where iterations alternate
# agent
algo = 'dqn' # 'ppo', 'a2c', 'random'
q_network = 'numbers' # of dqn: heads and layers are inputs; 'outputs': every action is an output
budget = 1000 # evaluations an iteration, a multiple of n_envs
n_iterations = 1 # in all, with those before --init_from=resume
learning_starts = 0 # of dqn: evaluations before the first update; 0: 16, or half of a small budget
updates = 4000 # of dqn: in an iteration, for any budget and n_envs: an evaluation costs much more
temperature = 0.2 # of numbers: how much it explores; in standard deviations of the reward
rl_learning_rate = 0.0 # 0: the algorithm's, see agent_settings()
# -----------------------------------------------------------------------------

ALGOS = {"dqn": DQN, "ppo": PPO, "a2c": A2C}
LOGGED_METRICS = ("loss", "ppl", "time")
N_ACTIONS = N_OPTIONS * N_OPTIONS


@dataclass
class State:
    """How far a run is; part of every checkpoint."""
    step: int = 0 # evaluations
    iteration: int = 0 # complete iterations
    seen: list = field(default_factory=list) # [entries, action, reward] of every evaluation


@dataclass
class Search:
    """A run: what all of its iterations share, and its state."""
    config: SimpleNamespace
    run: Run
    env: ArchEnv # with all shards, to look at the policy; an agent learns in its own
    rewards: np.ndarray | None # (S, 64) of the table; None where they are not known
    state: State = field(default_factory=State)
    log: Log | None = None


# ---- the agents

def agent_settings(config):
    """The arguments of stable-baselines3's class; the header lists which are not its defaults."""
    common = {"gamma": 0.0, "seed": config.seed, "device": "cpu"}
    if config.algo == "dqn":
        return common | dqn_settings(config)
    settings = {"policy": "MlpPolicy", "learning_rate": config.rl_learning_rate or 3e-3,
                "n_steps": max(1, rollout_size(config) // config.n_envs), "ent_coef": 0.02}
    if config.algo == "ppo":
        settings |= {"batch_size": max(4, rollout_size(config) // 4), "n_epochs": 10}
    return common | settings


def rollout_size(config):
    """The evaluations of a rollout of PPO or A2C, whatever n_envs: an eighth of a small budget."""
    longest = 16 if config.algo == "ppo" else 2
    return 4 * max(1, min(longest, config.budget // 32))


def rollout_lengths(config):
    """The steps of every rollout of PPO or A2C in an iteration; a step is n_envs evaluations.

    They differ by one at most, and use the budget to the number, where stable-baselines3 would end
    with a whole rollout of n_steps.
    """
    n_steps = config.budget // config.n_envs
    n_rollouts = min(n_steps, -(-config.budget // rollout_size(config)))
    return [len(part) for part in np.array_split(np.arange(n_steps), n_rollouts)]


def dqn_settings(config):
    """Those of DQN alone."""
    numbers = config.q_network == "numbers"
    total = config.budget * config.n_iterations
    policy = {"net_arch": [64, 64]}
    if numbers:
        policy["temperature"] = config.temperature
    return {
        "policy": NumbersPolicy if numbers else DQNPolicy, "policy_kwargs": policy,
        "learning_rate": config.rl_learning_rate or 1e-3, "batch_size": 32, "train_freq": 1,
        "buffer_size": total + config.n_envs, # never full
        "learning_starts": config.learning_starts or min(16, config.budget // 2),
        "exploration_fraction": 0.1 if numbers else 0.5, "exploration_final_eps": 0.1}


class NumbersNet(torch.nn.Module):
    """Q of all actions, (B, F) -> (B, 64), with heads and layers as inputs.

    `net` maps (features, heads, layers) to Q, so that an evaluation also teaches about similar
    sizes. `rest` adds an output for each action, for what is not smooth in them; it starts at 0.
    Heads and layers enter as logarithms, scaled to lie from -1 to 1.
    """
    def __init__(self, n_features, net_arch, activation_fn):
        super().__init__()
        sizes = torch.tensor([[arch["n_head"], arch["n_layer"]] for arch in all_archs()]) # (64, 2)
        scaled = 2 * sizes.float().log2() / np.log2(N_OPTIONS) - 1
        self.register_buffer("sizes", scaled, persistent=False)
        self.net = torch.nn.Sequential(*create_mlp(n_features + 2, 1, net_arch, activation_fn))
        self.rest = torch.nn.Sequential(*create_mlp(n_features, N_ACTIONS, net_arch, activation_fn))
        torch.nn.init.zeros_(self.rest[-1].weight)
        torch.nn.init.zeros_(self.rest[-1].bias)

    def forward(self, features):
        B, A = len(features), len(self.sizes)
        features_of_each = features.unsqueeze(1).expand(B, A, -1) # (B, 64, F)
        inputs = torch.cat([features_of_each, self.sizes.expand(B, A, -1)], dim=2) # (B, 64, F + 2)
        return self.net(inputs).squeeze(2) + self.rest(features)


class NumbersPolicy(DQNPolicy):
    """DQN's policy with a NumbersNet. Where DQN does not act at random, it takes the best action;
    this one explores there too, by drawing from softmax(Q / temperature)."""
    def __init__(self, *args, temperature, **kwargs):
        self.temperature = temperature
        super().__init__(*args, **kwargs)

    def make_q_net(self):
        q_net = super().make_q_net()
        q_net.q_net = NumbersNet(q_net.features_dim, self.net_arch, self.activation_fn)
        return q_net.to(self.device)

    def _predict(self, obs, deterministic=True):
        q = self.q_net(obs)
        if not deterministic: # the Gumbel-max trick
            q = q - self.temperature * torch.empty_like(q).exponential_().log()
        return q.argmax(1)


def greedy_actions(model, observed):
    return model.predict(observed, deterministic=True)[0]


def expected_rewards(model, observed, actions):
    """(n_envs,) The normalised rewards that the agent expects: Q of the actions, or V."""
    with torch.no_grad():
        observed = torch.as_tensor(observed)
        if isinstance(model, DQN):
            actions = torch.as_tensor(actions).long().reshape(-1, 1)
            return model.q_net(observed).gather(1, actions).reshape(-1).tolist()
        return model.policy.predict_values(observed).reshape(-1).tolist()


# ---- the environments

class NormalizedRewards(VecNormalize):
    """Rewards less their running mean, over their running standard deviation. VecNormalize keeps
    both of the discounted return, which is the reward where gamma is 0."""
    def normalize_reward(self, reward):
        centred = reward - self.ret_rms.mean
        return (centred / np.sqrt(self.ret_rms.var + self.epsilon)).astype(np.float32)


def mode_of(config, iteration):
    """The mode of an iteration: config.mode, or 1 and 2 in turn where there are several."""
    if config.n_iterations == 1:
        return config.mode
    return (max(config.mode, 1) - 1 + iteration) % 2 + 1


def seed_of(config, *keys):
    """A seed that the keys decide, in the range that gymnasium and NumPy take."""
    return rng(config.seed, *keys).initial_seed() % 2**32


def reward_function(config):
    return partial(REWARDS[config.reward], trade_off=config.trade_off)


def build_env(config, mode=0):
    shards = shards_of(vars(config))
    limits = shards[0]["entries"], shards[-1]["entries"] # the same for both halves
    half = [shard for shard in shards if mode in (0, shard["mode"])]
    evaluate = EVALUATORS[config.evaluator](vars(config))
    return ArchEnv(evaluate, reward_function(config), half, config.seeds, limits)


def build_envs(config, mode):
    """n_envs environments with normalised rewards; several run in as many processes."""
    builders = [partial(build_env, config, mode)] * config.n_envs
    if config.n_envs > 1:
        envs = SubprocVecEnv(builders, start_method="spawn")
    else:
        envs = DummyVecEnv(builders)
    return NormalizedRewards(envs, norm_obs=False, gamma=0.0)


# ---- the log

def log_evaluation(search, info, episode, value=None):
    """Counts and logs an evaluation. info: of ArchEnv.step(); value: the reward expected."""
    state = search.state
    state.step += 1
    state.seen.append([info["entries"], info["action"], info["reward"]])
    search.log.bar.update()
    logged = ("entries", "n_head", "n_layer", *LOGGED_METRICS, "reward")
    search.log("", step=state.step, iteration=state.iteration + 1, episode=episode, value=value,
               **{key: info[key] for key in logged})


def policy_actions(search, policy):
    """The action of the policy for each shard. policy: observations (S, 1) -> actions (S,)."""
    env = search.env
    observed = np.stack([env.observe(shard) for shard in env.shards])
    return [int(action) for action in policy(observed)]


def log_policy(search, policy):
    """The line of the policy: its actions, and their regret where the rewards are known."""
    config, state = search.config, search.state
    actions = policy_actions(search, policy)
    recent = np.mean([reward for *_, reward in state.seen[-config.eval_interval:]])
    line = f"step {state.step}/{config.budget * config.n_iterations} | reward {recent:.4f}"
    values = {"actions": actions}
    if search.rewards is not None:
        values["regret"] = regret(search.rewards, actions).tolist()
        line += f" | regret {100 * np.mean(values['regret']):.1f}%"
    search.log(line, step=state.step, **values)


class Recorder(BaseCallback):
    """Logs every evaluation of an agent, and its policy every eval_interval evaluations; says how
    many updates of DQN are due."""
    def __init__(self, search, model):
        super().__init__()
        self.search = search
        self.n_envs = search.config.n_envs
        self.episodes = list(range(1, self.n_envs + 1)) # the number of each environment's episode
        # of DQN: the evaluations and the updates before this iteration
        self.began, self.updates_before = model.num_timesteps, model._n_updates

    def _on_step(self):
        search, interval = self.search, self.search.config.eval_interval
        before = search.state.step
        values = expected_rewards(self.model, self.model._last_obs, self.locals["actions"])
        for i, (info, value) in enumerate(zip(self.locals["infos"], values, strict=True)):
            log_evaluation(search, info, self.episodes[i], value)
            self.episodes[i] += self.n_envs * int(self.locals["dones"][i])
        if before // interval < search.state.step // interval:
            log_policy(search, partial(greedy_actions, self.model))
        stop_if_signaled(search.run, lambda: None) # a resume starts this iteration anew
        return True

    def _on_rollout_end(self):
        """DQN updates after every step: `updates` in all by the end of the budget, spread evenly
        over the evaluations that follow learning_starts. PPO and A2C do not read it."""
        model, config = self.model, self.search.config
        if not isinstance(model, DQN):
            return
        start = max(self.began, model.learning_starts)
        seen, all_of_them = model.num_timesteps - start, self.began + config.budget - start
        due = config.updates * max(0, seen) // all_of_them
        model.gradient_steps = due - (model._n_updates - self.updates_before)


# ---- an iteration

def iterate_agent(search, model):
    """The agent learns from `budget` evaluations."""
    config, state = search.config, search.state
    try:
        envs = build_envs(config, mode_of(config, state.iteration))
        envs.ret_rms = model.get_env().ret_rms # the running mean and variance go on
        model.get_env().close()
        model.set_env(envs)
        model.set_random_seed(seed_of(config, "iteration", state.iteration))
        recorder = Recorder(search, model)
        if config.algo == "dqn":
            model.learn(config.budget, recorder, reset_num_timesteps=False)
            return
        for n_steps in rollout_lengths(config):
            model.n_steps = model.rollout_buffer.buffer_size = n_steps
            model.learn(n_steps * config.n_envs, recorder, reset_num_timesteps=False)
    except (EOFError, ConnectionError):
        stop_if_signaled(search.run, lambda: None) # Ctrl-C reaches all processes
        raise SystemExit("An environment's process has ended: see its message above.") from None


def iterate_random(search):
    """Random search: for each shard all 64 networks in a random order, again and again."""
    config, state, shards = search.config, search.state, search.env.shards
    draw = np.random.default_rng(seed_of(config, "random", state.iteration))
    env = build_env(config, mode_of(config, state.iteration))
    env.reset(seed=seed_of(config, "iteration", state.iteration))
    guesses = draw.integers(N_ACTIONS, size=len(shards)).tolist()
    not_drawn, episode = {}, 1 # {entries: actions}
    for _ in range(config.budget):
        entries = env.shards[env.order[env.position]]["entries"]
        if not not_drawn.get(entries):
            not_drawn[entries] = draw.permutation(N_ACTIONS).tolist()
        *_, done, _, info = env.step(not_drawn[entries].pop())
        log_evaluation(search, info, episode)
        if done:
            env.reset()
            episode += 1
        if state.step % config.eval_interval == 0:
            log_policy(search, lambda _: best_seen(shards, state.seen, guesses))
        stop_if_signaled(search.run, lambda: None)


def best_seen(shards, seen, guesses):
    """For each shard the action of the highest reward so far; its guess where there is none."""
    actions = []
    for shard, guess in zip(shards, guesses, strict=True):
        found = [(reward, action) for entries, action, reward in seen
                 if entries == shard["entries"]]
        actions.append(max(found)[1] if found else guess)
    return actions


# ---- checkpoints: tensors and numbers, for stable-baselines3's own files are pickles

BUFFER = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")


def agent_state(model):
    """What an agent needs to go on, beside its weights and their optimizer."""
    rms = model.get_env().ret_rms
    agent = {"num_timesteps": model.num_timesteps, "n_updates": model._n_updates,
             "normalizer": [float(rms.mean), float(rms.var), float(rms.count)]}
    if isinstance(model, DQN):
        buffer = model.replay_buffer
        agent["buffer"] = {name: torch.from_numpy(getattr(buffer, name)[:buffer.pos].copy())
                           for name in BUFFER}
    return agent


def load_agent(model, agent):
    """Puts back what agent_state() has returned."""
    rms = model.get_env().ret_rms
    model.num_timesteps, model._n_updates = agent["num_timesteps"], agent["n_updates"]
    rms.mean, rms.var, rms.count = map(np.float64, agent["normalizer"])
    if isinstance(model, DQN):
        load_buffer(model, agent["buffer"])


def load_buffer(model, saved):
    """Gives the model a replay buffer with the saved steps, {name: (steps, n_envs, ...)}.

    Its own may be too small for them, for the iterations before may have had a larger budget.
    """
    old, (n_seen, n_envs) = model.replay_buffer, saved["rewards"].shape
    if n_envs != old.n_envs:
        raise SystemExit(f"n_envs={old.n_envs} differs from the n_envs={n_envs} that this agent "
                         f"has learned with: give --n_envs={n_envs}.")
    size = (n_seen + old.buffer_size) * n_envs
    spaces = old.observation_space, old.action_space
    buffer = model.replay_buffer = ReplayBuffer(size, *spaces, old.device, n_envs)
    for name, rows in saved.items():
        getattr(buffer, name)[:n_seen] = rows.numpy()
    buffer.pos = n_seen


def restore(search, model):
    """Goes on with the run in out_dir. SystemExit if this config cannot."""
    config, state = search.config, search.state
    before = read_json(os.path.join(config.out_dir, "run.json"))["config"]["algo"]
    if before != config.algo:
        raise SystemExit(f"algo='{config.algo}' cannot go on with what {before} has learned: give "
                         f"--algo={before}, or another --out_dir.")
    learned = (model.policy, model.policy.optimizer) if model else (None, None)
    checkpoint = resume(config, search.run, *learned, state, network_keys(config.space))
    if state.iteration > config.n_iterations:
        raise SystemExit(f"n_iterations={config.n_iterations} is below the {state.iteration} that "
                         f"this run has made: give --n_iterations={state.iteration} or more, or "
                         "start anew with --overwrite=True.")
    if checkpoint:
        load_agent(model, checkpoint["agent"])


# ---- the run

RL_LIMITS = {**dict.fromkeys(("budget", "n_iterations", "eval_interval", "updates"), at_least(1)),
             **dict.fromkeys(("learning_starts", "rl_learning_rate"), at_least(0)),
             "temperature": above(0)}


def check(config):
    """SystemExit for a value of this script's keys that is not allowed."""
    check_options(config, {"init_from": ["scratch", "resume", "previous"],
                           "algo": [*ALGOS, "random"], "reward": list(REWARDS),
                           "q_network": ["numbers", "outputs"], "mode": [0, 1, 2]})
    check_env(config, list(EVALUATORS))
    check_limits(config, RL_LIMITS)
    if config.algo == "dqn" and config.learning_starts >= config.budget:
        raise SystemExit(f"learning_starts={config.learning_starts} must be below budget="
                         f"{config.budget}: the agent would never learn.")
    if config.algo != "random" and (rest := config.budget % config.n_envs):
        below, above_it = config.budget - rest, config.budget - rest + config.n_envs
        fix = f"{below} or {above_it}" if below else above_it
        raise SystemExit(f"budget={config.budget} does not divide over n_envs={config.n_envs}, "
                         f"which evaluate together: give --budget={fix}, or other --n_envs.")


def with_run(namespace):
    """globals(), with the keys of the run that the command resumes, for configure()."""
    hidden = OF_DATA | TRAIN_DEFAULTS.keys() - namespace.keys() # in run.json, but no keys here
    out_dir, own = resumed_run(namespace)
    return namespace | {"__run__": (out_dir, {key: value for key, value in own.items()
                                              if key not in hidden})}


def identity_of(config):
    """data.identity() of what the evaluations come from: a data set, or a table."""
    if config.evaluator != "table":
        return identity(config.data_dir, config.dataset)
    with open(config.table, "rb") as f:
        return {"meaning": {}, "content": {"table": bytes_hash(f.read())}}


def learn(config):
    """Runs all iterations of config, a dict; returns what it writes to result.json."""
    config = SimpleNamespace(**TRAIN_DEFAULTS | config | {"seeds": as_list(config["seeds"])})
    check(config)
    check_config(config)
    run, env, rewards = setup(config), build_env(config), None
    config.identity = identity_of(config)
    check_resumed_data(config)
    if config.evaluator == "table":
        rewards = reward_table(reward_function(config), vars(config))
    search = Search(config, run, env, rewards)
    state = search.state

    # the agent, from scratch or from a checkpoint; random search has none
    model = None
    if config.algo != "random":
        envs = build_envs(config, mode_of(config, state.iteration))
        model = ALGOS[config.algo](env=envs, **agent_settings(config))
    if is_resuming(config):
        restore(search, model)
    init_out_dir(config, run)

    # the iterations, with a progress bar of their evaluations
    total = config.budget * config.n_iterations
    log_config = SimpleNamespace(**vars(config) | {"max_iters": total})
    with Log(log_config, run, state.step) as search.log, signals(run):
        while state.iteration < config.n_iterations:
            if model:
                iterate_agent(search, model)
            else:
                iterate_random(search)
            state.iteration += 1
            if model: # random search needs no checkpoint: it starts anew, to the same result
                save(config, run, "ckpt.pt", model.policy, model.policy.optimizer,
                     state=vars(state), agent=agent_state(model))
    search.log.bar.close()

    # what it has learned
    if model is None:
        return report(search, lambda _: best_seen(env.shards, state.seen, [0] * len(env.shards)), 0)
    model.get_env().close()
    return report(search, partial(greedy_actions, model), model._n_updates)


def report(search, policy, updates):
    """Prints the policy and its regret; writes and returns result.json."""
    config, known = search.config, search.rewards is not None
    actions = policy_actions(search, policy)
    rows = [policy_row(search, i, action) for i, action in enumerate(actions)]
    print(" ".join(f"{key:>9}" for key in rows[0]))
    for row in rows:
        print(" ".join(f"{value:9.4f}" if isinstance(value, float) else f"{value:9d}"
                       for value in row.values()))
    result = {"out_dir": config.out_dir, "algo": config.algo, "evaluations": search.state.step,
              "updates": updates, "policy": rows,
              "regret": float(np.mean([row["regret"] for row in rows])),
              "against": config.table if known else "best seen",
              "surface": search.rewards.tolist() if known else seen_rewards(search)}
    write_json(os.path.join(config.out_dir, "result.json"), result)
    print(f"{updates} updates, mean regret {100 * result['regret']:.1f}% of the range of the "
          f"rewards, against {'the best of the table' if known else 'the best seen'}")
    return result


def policy_row(search, i, action):
    """The policy's network for shard i: its means over the seeds, and its regret against the table,
    or else against the best that this run has seen on the shard."""
    env, shard = search.env, search.env.shards[i]
    evaluations = [env.evaluate(arch_of(action), {**shard, "seed": seed})
                   for seed in search.config.seeds]
    means = {key: float(np.mean([metrics[key] for metrics in evaluations]))
             for key in LOGGED_METRICS}
    reward = float(np.mean([env.reward(metrics) for metrics in evaluations]))
    if search.rewards is not None:
        lost = regret(search.rewards[[i]], [action])[0]
    else:
        seen = [r for entries, _, r in search.state.seen if entries == shard["entries"]] + [reward]
        lost = (np.max(seen) - reward) / ((np.max(seen) - np.min(seen)) or 1.0)
    return {"entries": shard["entries"], **arch_of(action), **means, "reward": reward,
            "regret": float(lost)}


def seen_rewards(search):
    """The mean rewards seen, [of each shard [of every action]]; None where there is none."""
    found = {}
    for entries, action, reward in search.state.seen:
        found.setdefault((entries, action), []).append(reward)
    means = {key: float(np.mean(rewards)) for key, rewards in found.items()}
    return [[means.get((shard["entries"], action)) for action in range(N_ACTIONS)]
            for shard in search.env.shards]


if __name__ == "__main__":
    draw_figures(main(learn, configure(with_run(globals())))["out_dir"])
