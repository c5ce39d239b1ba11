"""
Trains an architecture that a search found, from scratch, and measures its test loss on data that nothing else has touched.

    python train_base.py --arch=out/search/arch.json                  # the best architecture of a search
    python train_base.py --arch_traj=out/search/arch_traj.jsonl       # the last one of its trajectory
    torchrun --standalone --nproc_per_node=4 train_base.py config/base_tinystories.py --arch=out/search/arch.json
    torchrun --nproc_per_node=4 --nnodes=2 --node_rank=0 --master_addr=10.0.0.1 --master_port=1234 train_base.py --arch=...
    torchrun --nproc_per_node=4 --nnodes=2 --node_rank=1 --master_addr=10.0.0.1 --master_port=1234 train_base.py --arch=...
    python train_base.py --help                                       # every key with its default

The last val_portion of train.bin validates; val.bin is read once, at the end. Writes what train.py writes.
"""
from analyze import read_lines
from model import OPTIONS, GPTConfig
from prepare import read_json, unseal
from train import * # noqa: F403 (every key of train.py)
from train import main, train

# -----------------------------------------------------------------------------
# the keys of train.py, and:
arch = '' # an arch.json, or
arch_traj = '' # an arch_traj.jsonl, whose last line counts
out_dir = 'out/base'
dataset = '' # '': the search's
data_dir = '' # '': the search's
block_size = 0 # 0: the search's
val_portion = 0.1
max_iters = 1000
eval_interval = 100
learning_rate = 2e-3
min_lr = 2e-4
# -----------------------------------------------------------------------------

LISTS, NUMBERS = ("n_head", "mlp_ratio"), ("n_layer", "n_embd")
OPTIONAL = {name: type(getattr(GPTConfig, name)) for name in OPTIONS} # which older searches did not have


def read_arch(arch, arch_traj):
    """What a search found, {"arch", "model", "dataset", "data_dir", ...}, from exactly one of the two files; SystemExit if it is
    damaged."""
    if bool(arch) == bool(arch_traj):
        raise SystemExit("Give the architecture by one of --arch=out/search/arch.json and --arch_traj=out/search/arch_traj.jsonl, "
                         f"not by {'both' if arch else 'neither'}.")
    path = arch or arch_traj
    lines = [read_json(arch)] if arch else read_lines(arch_traj)
    if not lines:
        raise SystemExit(f"The trajectory {path} is empty: its search has not evaluated an architecture yet.")
    found = unseal(lines[-1], path)
    parts = {"arch": (dict, {**dict.fromkeys(NUMBERS, int), **dict.fromkeys(LISTS, list)}),
             "model": (dict, {"head_size": int, "bias": bool, "block_size": int, **OPTIONAL}), "dataset": (str, {}), "data_dir": (str, {})}
    for name, (kind, fields) in parts.items():
        inside = found.get(name)
        wrong = [name] if type(inside) is not kind else [
            key for key, of in fields.items() if type(inside.get(key)) is not of and (key in inside or key not in OPTIONAL)]
        if wrong:
            raise SystemExit(f"The architecture {path} is damaged: {wrong[0]} is missing or of the wrong type.")
    return found


def train_found(config):
    """Trains what config["arch"] or config["arch_traj"] names; returns train.py's result, with "test_loss"."""
    found = read_arch(config["arch"], config["arch_traj"])
    model = found["model"] | {"block_size": config["block_size"] or found["model"]["block_size"]}
    data = {name: config[name] or found[name] for name in ("dataset", "data_dir")}
    return train({**config, **model, **data}, found["arch"], test=True)


if __name__ == "__main__":
    from configurator import configure
    main(train_found, configure(globals()))
