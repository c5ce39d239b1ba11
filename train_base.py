"""
Trains an architecture that a search found, and measures its test loss on data that nothing else has touched.

    python train_base.py --arch=out/search/arch.json                  # the best architecture of a search
    python train_base.py --arch_traj=out/search/arch_traj.jsonl       # the last one of its trajectory
    python train_base.py --arch=out/search_gpt2/arch.json --init_from=out/search_gpt2      # from the weights that it has in the supernet
    python train_base.py --space=nb201 --genotype="|nor_conv_3x3~0|+|none~0|nor_conv_3x3~1|+|skip_connect~0|none~1|nor_conv_3x3~2|"
    python train_base.py config/table_conv_macro_digits.py            # every architecture of a small space, into a table
    torchrun --standalone --nproc_per_node=4 train_base.py config/base_tinystories.py --arch=out/search/arch.json
    torchrun --nproc_per_node=4 --nnodes=2 --node_rank=0 --master_addr=10.0.0.1 --master_port=1234 train_base.py --arch=...
    torchrun --nproc_per_node=4 --nnodes=2 --node_rank=1 --master_addr=10.0.0.1 --master_port=1234 train_base.py --arch=...
    python train_base.py --help                                       # every key with its default

It starts from scratch, or, with the out_dir of a search of the GPT as --init_from, from the weights that it has in that supernet.
The last val_portion of the training data validates; val.bin, or val.npy, is read once, at the end. A network of search_spaces/ is
that of the search, unless a key of its space says otherwise, such as the number of cells. Writes what train.py writes.
"""
import contextlib
import os
import shutil
from types import SimpleNamespace

from tqdm import tqdm

from budget import architectures, read_table
from configurator import as_list, check, check_whole, defaults, given
from model import GPTConfig, OPTIONS
from optim_nas import space_size
from run import silenced, main, read_json, read_lines, verify_checksum
from search_spaces import build, own_data, space_module, with_space
from train import train
from train import * # noqa: F403 (every key of train.py)

# -----------------------------------------------------------------------------
# the keys of train.py, and:
arch = '' # an arch.json, or
arch_traj = '' # an arch_traj.jsonl, whose last line counts, or
genotype = '' # of a space of cells, in its published text form
table = '' # a .csv: instead train every architecture of the space, and add each as a row; goes on where it was stopped
seeds = [1, 2] # of each architecture in the table
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
COLUMNS = ("test_acc", "test_loss", "train_loss", "params", "flops") # of a table, behind the architecture and the seed
OPTIONAL = {name: type(getattr(GPTConfig, name)) for name in OPTIONS} # which older searches did not have


def read_arch(arch, arch_traj, genotype="", space="gpt"):
    """What a search found, {"space", "arch", "model", "dataset", "data_dir", ...}, from exactly one of the two files or from a genotype;
    SystemExit if it is damaged."""
    if sum(map(bool, (arch, arch_traj, genotype))) != 1:
        raise SystemExit("Give the architecture by one of --arch=out/search/arch.json, --arch_traj=out/search/arch_traj.jsonl and "
                         f"--genotype=..., not by {'several' if arch or arch_traj or genotype else 'neither'}.")
    if genotype:
        module = space_module(space)
        if not hasattr(module, "arch_of"):
            raise SystemExit(f"genotype='{genotype}' is for the spaces of search_spaces/: name one by --space, or give an --arch.")
        return {"space": space, "arch": module.arch_of(genotype), "model": {}, "dataset": own_data(module), "data_dir": "data"}
    path = arch or arch_traj
    lines = [read_json(arch)] if arch else read_lines(arch_traj)
    if not lines:
        raise SystemExit(f"The trajectory {path} is empty: its search has not evaluated an architecture yet.")
    found = verify_checksum(lines[-1], path)
    space = found.get("space", "gpt")
    parts = {"arch": (dict, {**dict.fromkeys(NUMBERS, int), **dict.fromkeys(LISTS, list)}),
             "model": (dict, {"head_size": int, "bias": bool, "block_size": int, **OPTIONAL}), "dataset": (str, {}), "data_dir": (str, {})}
    keys = {} if space == "gpt" else defaults(vars(space_module(space)))
    if space != "gpt":
        kinds = {key: type(value) for key, value in keys.items()}
        parts |= {"arch": (dict, {}), "model": (dict, {key: (int, float, list) if of is list else of for key, of in kinds.items()})}
    for name, (kind, fields) in parts.items():
        inside = found.get(name)
        wrong = [name] if type(inside) is not kind else [
            key for key, of in fields.items() if not isinstance(inside.get(key), of) and (key in inside or key not in OPTIONAL)]
        if name == "model" and not wrong: # what a list may hold
            wrong = [key for key, default in keys.items() if not check(inside[key], default)[0]]
        if wrong:
            raise SystemExit(f"The architecture {path} is damaged: {wrong[0]} is missing or of the wrong type.")
    return found | {"space": space}


def with_found(namespace):
    """The keys of this script, where a network of another space than the GPT is that of the search unless the command says otherwise."""
    files = [given(key) or "" for key in ("arch", "arch_traj")]
    if not any(files) or "" not in files:
        return with_space(namespace)
    found = read_arch(*files)
    if given("space") not in (None, found["space"]):
        raise SystemExit(f"space='{given('space')}' is not {found['space']}, that of {files[0] or files[1]}: leave it out.")
    for key, value in found["model"].items() if found["space"] == "gpt" else ():
        if key != "block_size" and (given(key) or str(value)).replace(" ", "") != str(value).replace(" ", ""):
            raise SystemExit(f"{key}={given(key)} is not {value}, that of {files[0] or files[1]}: leave it out.")
    return with_space(namespace, found["space"], found["model"])


def train_table(config):
    """Trains every architecture of the space once a seed, without a look at the test split before the end, into config["table"]."""
    path, module = config["table"], space_module(config["space"])
    config["dataset"] = config["dataset"] or own_data(module)
    if config["space"] == "gpt" or hasattr(module, "scale"):
        raise SystemExit(f"table='{path}' is for the spaces of search_spaces/ that classify: name one by --space.")
    check_whole(SimpleNamespace(**config), "seeds")
    choices = build(config).choices
    if (n := space_size(choices)) > 1_000_000:
        raise SystemExit(f"table='{path}': space={config['space']} has {n:.3g} architectures, too many to train: give it fewer options.")
    rows = [(module.columns(arch), arch, seed) for seed in as_list(config["seeds"]) for arch in architectures(choices)]
    head = [*rows[0][0], "seed", *COLUMNS]
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with contextlib.suppress(FileExistsError), open(path, "x") as f: # of several processes one writes the head
            f.write(",".join(head) + "\n")
    except OSError as e:
        raise SystemExit(f"table='{path}' cannot be written ({e.strerror}): choose another --table.") from None
    done = read_table(path)
    if done and list(done[0]) != head:
        raise SystemExit(f"table='{path}' has not the columns {','.join(head)} of this space: choose another --table.")
    done = {tuple(row.values())[:len(rows[0][0]) + 1] for row in done}
    for columns, arch, seed in tqdm(rows, desc=path, unit=" networks"):
        if (*map(str, columns.values()), str(seed)) in done:
            continue
        job = {**config, "seed": seed, "out_dir": f"{path}.{os.getpid()}.run", "overwrite": True, "eval_interval": config["max_iters"] or 1}
        try:
            with silenced():
                result = train({**job, "data_dir": config["data_dir"] or "data"}, arch, test=True)
        finally:
            shutil.rmtree(job["out_dir"], ignore_errors=True)
        row = [*columns.values(), seed, *(round(result[key], 4) for key in COLUMNS)]
        with open(path, "a") as f: # one write a row: several processes may take a seed each
            f.write(",".join(f'"{v}"' if "," in str(v) else str(v) for v in row) + "\n")


def train_found(config):
    """Trains what config["arch"], config["arch_traj"] or config["genotype"] names; returns train.py's result, with "test_loss"."""
    if config["table"]:
        return train_table(config)
    found = read_arch(config["arch"], config["arch_traj"], config["genotype"], config["space"])
    data = {name: config[name] or found[name] for name in ("dataset", "data_dir")}
    if found["space"] != "gpt":
        return train({**config, **data}, found["arch"], test=True)
    network = found["model"] | {"block_size": config["block_size"] or found["model"]["block_size"]}
    return train({**config, **network, **data}, found["arch"], test=True)


if __name__ == "__main__":
    from configurator import configure
    main(train_found, configure(with_found(globals())))
