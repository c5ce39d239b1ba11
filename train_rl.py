"""
Learns which number of heads and of layers suits a number of entries (training sequences): DQN, PPO or A2C over env.py.

    python train_rl.py                                          # on the table of all 64 networks: seconds
    python train_rl.py --evaluator=train --shards=10 --budget=100 --n_envs=2 --seeds=[1]     # real training: minutes, on two cores
    python train_rl.py --evaluator=supernet                     # inherited weights of one supernet for each shard
    python train_rl.py --algo=ppo                               # or a2c, or random: the best of random draws
    python train_rl.py --n_iterations=10                        # alternates between the two halves of the shards
    python train_rl.py --mode=1                                 # one half alone
    python train_rl.py --help                                   # every key with its default

Every agent has gamma = 0: what an architecture is worth on a shard has no part in which shard comes next. Writes to out_dir: run.json,
log.jsonl, ckpt.pt after every iteration (a run goes on from it by --init_from=resume, also to a higher --n_iterations), result.json
with the policy and its regret, and the figures of analyze.py.
"""
import os
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

from configurator import as_list, check_range
from env import ArchEnv, EVALUATORS, N, REWARDS, arch_of, check as check_env, check_known, regret
from env import reward_table, shards_of
from run import Log, init_out_dir, main, read_json, resume, resumes, rng, save, setup, signals
from run import stop_if_signaled, write_json
from env import * # noqa: F403 (every key of env.py)
from run import draw_figures
from search_spaces import network_keys
from train import check_run

# -----------------------------------------------------------------------------
# the keys of env.py, and:
out_dir = 'out/rl'
evaluator = 'table' # 'train', 'supernet'
reward = 'balance' # or 'seed', see env.py
trade_off = 0.1 # of balance: nats of loss that a factor e in time is worth
mode = 0 # 1, 2: one half of the shards; 0: all, or 1 first where iterations alternate
algo = 'dqn' # 'ppo', 'a2c', 'random'
q_network = 'numbers' # of dqn: sees heads and layers as numbers, and so learns across neighbours; 'outputs': one output an action
budget = 1000 # evaluations an iteration
n_iterations = 1 # in all, also with those before --init_from=resume
learning_starts = 0 # of dqn: evaluations before the first update; 0: 16, or half of a budget that is smaller
updates = 4000 # of dqn, an iteration: as many whatever the budget, for an evaluation costs more than an update
temperature = 0.2 # of numbers: it draws actions from softmax(Q / temperature), Q in standard deviations of the reward
rl_learning_rate = 0.0 # 0: the algorithm's, below
eval_interval = 25 # evaluations between two looks at the policy
# -----------------------------------------------------------------------------

ALGOS = {"dqn": DQN, "ppo": PPO, "a2c": A2C}
SHOWN = ("loss", "ppl", "time") # of the metrics of an evaluation


def settings_of(config):
    """The arguments of stable-baselines3's class, for this budget. Its defaults are for a million steps: DQN's first update comes after
    100, epsilon falls over the first tenth and PPO collects 2,048 steps an update."""
    total = config.budget * config.n_iterations
    common = {"gamma": 0.0, "seed": config.seed, "device": "cpu"}
    if config.algo == "dqn":
        return common | {
            "learning_rate": config.rl_learning_rate or 1e-3, "buffer_size": total + config.n_envs * (config.n_iterations + 1), # never full
            "batch_size": 32, "train_freq": 1, "learning_starts": config.learning_starts or min(16, config.budget // 2),
            "gradient_steps": min(16, max(1, config.updates // config.budget)),
            "exploration_fraction": 0.1 if config.q_network == "numbers" else 0.5, "exploration_final_eps": 0.1,
            "policy_kwargs": {"net_arch": [64, 64]} | ({"temperature": config.temperature} if config.q_network == "numbers" else {}),
            "policy": {"numbers": NumbersPolicy, "outputs": DQNPolicy}[config.q_network]}
    n_steps = 4 * max(1, min(16 if config.algo == "ppo" else 2, config.budget // (32 * config.n_envs)))
    more = {"batch_size": max(4, n_steps * config.n_envs // 4), "n_epochs": 10} if config.algo == "ppo" else {}
    return common | more | {"policy": "MlpPolicy", "learning_rate": config.rl_learning_rate or 3e-3, "n_steps": n_steps, "ent_coef": 0.02}


class NumbersNet(torch.nn.Module):
    """Q of all actions: (B, F) -> (B, 64). A function of (observation, heads, layers) that one evaluation teaches about its neighbours,
    plus one output an action, at first zero, for what the neighbours do not tell. heads and layers: logarithms, from -1 to 1."""
    def __init__(self, n_features, net_arch, activation_fn):
        super().__init__()
        sizes = [[arch["n_head"], arch["n_layer"]] for arch in map(arch_of, range(N * N))]
        self.register_buffer("sizes", 2 * torch.tensor(sizes).float().log2() / np.log2(N) - 1, persistent=False) # (64, 2)
        self.net = torch.nn.Sequential(*create_mlp(n_features + 2, 1, net_arch, activation_fn))
        self.rest = torch.nn.Sequential(*create_mlp(n_features, N * N, net_arch, activation_fn))
        torch.nn.init.zeros_(self.rest[-1].weight)
        torch.nn.init.zeros_(self.rest[-1].bias)

    def forward(self, features):
        B, A = len(features), len(self.sizes)
        pairs = torch.cat([features.unsqueeze(1).expand(B, A, -1), self.sizes.expand(B, A, -1)], dim=2) # (B, 64, F + 2)
        return self.net(pairs).squeeze(2) + self.rest(features)


class NumbersPolicy(DQNPolicy):
    """Explores by drawing from softmax(Q / temperature): among what it takes for good, and not among all."""
    def __init__(self, *args, temperature, **kwargs):
        self.temperature = temperature
        super().__init__(*args, **kwargs)

    def make_q_net(self):
        q_net = super().make_q_net()
        q_net.q_net = NumbersNet(q_net.features_dim, self.net_arch, self.activation_fn)
        return q_net.to(self.device)

    def _predict(self, obs, deterministic=True):
        q = self.q_net(obs)
        if not deterministic:
            q = q - self.temperature * torch.empty_like(q).exponential_().log() # the Gumbel-max trick
        return q.argmax(1)


class Normalize(VecNormalize):
    """Rewards less their running mean, over their running standard deviation; gamma = 0 makes stable-baselines3's return the reward."""
    def normalize_reward(self, reward):
        return ((reward - self.ret_rms.mean) / np.sqrt(self.ret_rms.var + self.epsilon)).astype(np.float32)


def mode_of(config, iteration):
    return config.mode if config.n_iterations == 1 else (max(config.mode, 1) - 1 + iteration) % 2 + 1


def seed_of(config, *keys):
    return rng(config.seed, *keys).initial_seed() % 2**32 # what gymnasium and NumPy take


def reward_of(config):
    return partial(REWARDS[config.reward], trade_off=config.trade_off)


def build_env(config, mode=0):
    shards = shards_of(vars(config))
    limits = shards[0]["entries"], shards[-1]["entries"]
    return ArchEnv(EVALUATORS[config.evaluator](vars(config)), reward_of(config), [s for s in shards if mode in (0, s["mode"])],
                   config.seeds, limits)


def build_envs(config, mode):
    """n_envs environments, in as many processes, with normalised rewards."""
    envs = [partial(build_env, config, mode)] * config.n_envs
    return Normalize(SubprocVecEnv(envs, start_method="spawn") if config.n_envs > 1 else DummyVecEnv(envs), norm_obs=False, gamma=0.0)


def record(log, state, info, episode, value=None):
    """The log line of one evaluation."""
    state.step += 1
    state.seen.append([info["entries"], (info["n_head"] - 1) * N + info["n_layer"] - 1, info["reward"]])
    log.bar.update()
    log("", step=state.step, iteration=state.iteration + 1, episode=episode, value=value,
        **{key: info[key] for key in ("entries", "n_head", "n_layer", *SHOWN, "reward")})


def look(config, log, state, policy, env, rewards):
    """The line of the greedy policy: its actions for all shards, and their regret if rewards (S, 64) are known."""
    actions = [int(a) for a in policy(np.stack([env.observe(shard) for shard in env.shards]))]
    values = {"actions": actions} | ({} if rewards is None else {"regret": regret(rewards, actions).tolist()})
    recent = np.mean([reward for *_, reward in state.seen[-config.eval_interval:]])
    line = f"step {state.step}/{config.budget * config.n_iterations} | reward {recent:.4f}"
    log(line + (f" | regret {100 * np.mean(values['regret']):.1f}%" if "regret" in values else ""), step=state.step, **values)


class Recorder(BaseCallback):
    """Logs every evaluation, and the policy after every eval_interval of them."""
    def __init__(self, config, run, log, state, env, rewards):
        super().__init__()
        self.config, self.run, self.log, self.state, self.env, self.rewards = config, run, log, state, env, rewards
        self.episodes = list(range(1, config.n_envs + 1)) # the number of the one that each environment is in

    def _on_step(self):
        before = self.state.step
        values = value_of(self.model, self.model._last_obs, self.locals["actions"])
        for i, (info, value) in enumerate(zip(self.locals["infos"], values, strict=True)):
            record(self.log, self.state, info, self.episodes[i], value)
            self.episodes[i] += self.config.n_envs * int(self.locals["dones"][i])
        if before // self.config.eval_interval < self.state.step // self.config.eval_interval:
            look(self.config, self.log, self.state, partial(greedy, self.model), self.env, self.rewards)
        stop_if_signaled(self.run, lambda: None) # the last iteration's checkpoint counts
        return True


def greedy(model, observed):
    return model.predict(observed, deterministic=True)[0]


def value_of(model, observed, actions):
    """(n_envs,) The normalised reward that the agent expects: Q of the actions, or V."""
    with torch.no_grad():
        observed = torch.as_tensor(observed)
        if isinstance(model, DQN):
            return model.q_net(observed).gather(1, torch.as_tensor(actions).long().reshape(-1, 1)).reshape(-1).tolist()
        return model.policy.predict_values(observed).reshape(-1).tolist()


def iterate(config, run, log, state, model, env, rewards):
    """One iteration of an agent. SystemExit if it made no update: it would look like learning, and be none."""
    seed, before = seed_of(config, "iteration", state.iteration), model._n_updates
    envs = build_envs(config, mode_of(config, state.iteration))
    envs.ret_rms = model.get_env().ret_rms # the normaliser goes on
    model.get_env().close()
    model.set_env(envs)
    model.set_random_seed(seed)
    model.learn(config.budget, Recorder(config, run, log, state, env, rewards), reset_num_timesteps=False)
    if model._n_updates == before:
        raise SystemExit(f"The agent made no update in budget={config.budget} evaluations: raise --budget, or lower "
                         f"--learning_starts={config.learning_starts}.")


def iterate_random(config, run, log, state, env, rewards):
    """Random search: for each number of entries the 64 in a random order, again and again."""
    draw = np.random.default_rng(seed_of(config, "random", state.iteration))
    walk = build_env(config, mode_of(config, state.iteration))
    walk.reset(seed=seed_of(config, "iteration", state.iteration))
    left, episode, first = {}, 1, draw.integers(N * N, size=len(env.shards)).tolist()
    for _ in range(config.budget):
        entries = walk.shards[walk.order[walk.position]]["entries"]
        left[entries] = left.get(entries) or draw.permutation(N * N).tolist()
        *_, done, _, info = walk.step(left[entries].pop())
        record(log, state, info, episode)
        if done:
            walk.reset()
            episode += 1
        if state.step % config.eval_interval == 0:
            look(config, log, state, lambda _: best_observed(env.shards, state.seen, first), env, rewards)
        stop_if_signaled(run, lambda: None)


def best_observed(shards, seen, first):
    """For each shard the action of the highest reward so far; first[i]: for shard i while there is none."""
    actions = []
    for shard, action in zip(shards, first, strict=True):
        found = [(reward, a) for entries, a, reward in seen if entries == shard["entries"]]
        actions.append(max(found)[1] if found else action)
    return actions


def means_of(shard, seen):
    """{action: its mean reward on the shard} of the evaluations so far."""
    rewards = {}
    for entries, action, reward in seen:
        if entries == shard["entries"]:
            rewards.setdefault(action, []).append(reward)
    return {action: float(np.mean(values)) for action, values in rewards.items()}


# ---- checkpoints: tensors and numbers, for stable-baselines3's own files are pickles

BUFFER = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")


def agent_state(model):
    rms = model.get_env().ret_rms
    agent = {"num_timesteps": model.num_timesteps, "n_updates": model._n_updates,
             "normalizer": [float(rms.mean), float(rms.var), float(rms.count)]}
    if isinstance(model, DQN):
        buffer = model.replay_buffer
        agent["buffer"] = {name: torch.from_numpy(getattr(buffer, name)[:buffer.pos].copy()) for name in BUFFER}
    return agent


def load_agent(model, agent):
    rms = model.get_env().ret_rms
    model.num_timesteps, model._n_updates = agent["num_timesteps"], agent["n_updates"]
    rms.mean, rms.var, rms.count = map(np.float64, agent["normalizer"])
    if isinstance(model, DQN):
        buffer, (seen, n_envs) = model.replay_buffer, agent["buffer"]["rewards"].shape
        if n_envs != buffer.n_envs:
            raise SystemExit(f"The agent has learned in n_envs={n_envs}, and not in n_envs={buffer.n_envs}: take the --n_envs of before.")
        size = (seen + buffer.buffer_size) * n_envs # if the budget was larger before, the buffer for this one does not hold all
        model.replay_buffer = buffer = ReplayBuffer(size, buffer.observation_space, buffer.action_space, buffer.device, n_envs)
        for name, rows in agent["buffer"].items():
            getattr(buffer, name)[:seen] = rows.numpy()
        buffer.pos = seen


# ---- the run

def check(config):
    """SystemExit for a name that there is not, or a number that cannot be."""
    check_known(config, {"algo": [*ALGOS, "random"], "reward": list(REWARDS), "q_network": ["numbers", "outputs"], "mode": [0, 1, 2]})
    check_env(config, list(EVALUATORS))
    check_range(config, 1, "budget", "n_iterations", "eval_interval", "updates")
    check_range(config, 0, "learning_starts", "rl_learning_rate")
    if config.temperature <= 0:
        raise SystemExit(f"temperature={config.temperature} must be above 0.")


def learn(config):
    """Runs the iterations of config (a dict); returns what it writes to result.json."""
    config = SimpleNamespace(**config | {"seeds": as_list(config["seeds"])})
    check(config)
    check_run(config)
    run, state, model = setup(config), SimpleNamespace(step=0, iteration=0, seen=[]), None
    env, rewards = build_env(config), None
    if config.evaluator == "table":
        _, rewards = reward_table(config.table, reward_of(config), vars(config))
    if config.algo != "random":
        model = ALGOS[config.algo](env=build_envs(config, mode_of(config, 0)), **settings_of(config))
    if resumes(config):
        if (algo := read_json(os.path.join(config.out_dir, "run.json"))["config"]["algo"]) != config.algo:
            raise SystemExit(f"algo='{config.algo}' cannot go on with what {algo} has learned: give --algo={algo}, or another --out_dir.")
        checkpoint = resume(config, run, model and model.policy, model and model.policy.optimizer, state, network_keys(config.space))
        if state.iteration > config.n_iterations:
            raise SystemExit(f"n_iterations={config.n_iterations} is below the {state.iteration} that this run has made: give "
                             f"--n_iterations={state.iteration} or more, or start anew with --overwrite=True.")
        if checkpoint:
            load_agent(model, checkpoint["agent"])
    init_out_dir(config, run)
    with Log(SimpleNamespace(**vars(config) | {"max_iters": config.budget * config.n_iterations}), run, state.step) as log, signals(run):
        while state.iteration < config.n_iterations:
            if model:
                try:
                    iterate(config, run, log, state, model, env, rewards)
                except (EOFError, ConnectionError):
                    stop_if_signaled(run, lambda: None) # Ctrl-C reaches all processes
                    raise SystemExit("The process of an environment has ended; why, it has said above.") from None
            else:
                iterate_random(config, run, log, state, env, rewards)
            state.iteration += 1
            if model: # a random search starts anew, which is the same
                save(config, run, "ckpt.pt", model.policy, model.policy.optimizer, state=vars(state), agent=agent_state(model))
    log.bar.close()
    if model:
        model.get_env().close()
    policy = partial(greedy, model) if model else lambda _: best_observed(env.shards, state.seen, [0] * len(env.shards))
    return finish(config, state, policy, env, rewards, model._n_updates if model else 0)


def finish(config, state, policy, env, rewards, updates):
    """The policy as a table, with its regret: against the table, or against the best that the run has seen on that shard."""
    rows = []
    for i, (shard, action) in enumerate(zip(env.shards, policy(np.stack([env.observe(s) for s in env.shards])), strict=True)):
        found = [env.evaluate(arch_of(action), {**shard, "seed": seed}) for seed in config.seeds]
        reward = float(np.mean([env.reward(metrics) for metrics in found]))
        row = {"entries": shard["entries"], **arch_of(action), **{key: float(np.mean([m[key] for m in found])) for key in SHOWN}}
        seen = [r for entries, _, r in state.seen if entries == shard["entries"]] + [reward]
        span = (np.max(seen) - np.min(seen)) or 1.0
        lost = (np.max(seen) - reward) / span if rewards is None else regret(rewards[[i]], [int(action)])[0]
        rows.append(row | {"reward": reward, "regret": float(lost)})
    print(" ".join(f"{key:>9}" for key in rows[0]))
    for row in rows:
        print(" ".join(f"{value:9.4f}" if isinstance(value, float) else f"{value:9d}" for value in row.values()))
    surface = [means_of(shard, state.seen) for shard in env.shards] if rewards is None else [dict(enumerate(r)) for r in rewards.tolist()]
    result = {"out_dir": config.out_dir, "algo": config.algo, "evaluations": state.step, "updates": updates, "policy": rows,
              "regret": float(np.mean([row["regret"] for row in rows])), "against": "best seen" if rewards is None else config.table,
              "surface": [[means.get(a) for a in range(N * N)] for means in surface]} # rewards, None where they are not known
    write_json(os.path.join(config.out_dir, "result.json"), result)
    print(f"{updates} updates, mean regret {100 * result['regret']:.1f}% of the range of the rewards, against "
          f"{'the best seen' if rewards is None else 'the best of the table'}")
    return result


if __name__ == "__main__":
    from configurator import configure
    draw_figures(main(learn, configure(globals()))["out_dir"])
