"""
Trains an architecture that a search found, and measures its test loss on data that nothing else has
touched.

    python train_base.py --arch=out/search/arch.json                  # the best architecture of a search
    python train_base.py --arch_traj=out/search/arch_traj.jsonl       # the last one of its trajectory
    python train_base.py --arch=out/search_gpt2/arch.json --init_from=out/search_gpt2      # from the weights that it has in the supernet
    python train_base.py --space=nb201 --genotype="|nor_conv_3x3~0|+|none~0|nor_conv_3x3~1|+|skip_connect~0|none~1|nor_conv_3x3~2|"
    python train_base.py config/table_conv_macro_digits.py            # every architecture of a small space, into a table
    python train_base.py config/table_pydocs.py --arch=out/search/arch.json      # random ones of that search's space
    torchrun --standalone --nproc_per_node=4 train_base.py config/base_tinystories.py --arch=out/search/arch.json
    torchrun --nproc_per_node=4 --nnodes=2 --node_rank=0 --master_addr=10.0.0.1 --master_port=1234 train_base.py --arch=...
    torchrun --nproc_per_node=4 --nnodes=2 --node_rank=1 --master_addr=10.0.0.1 --master_port=1234 train_base.py --arch=...
    python train_base.py --help                                       # every key with its default

It starts from scratch, or from the out_dir that --init_from names: that of a search of the GPT,
from the weights that it has in that supernet, or that of a training of the same architecture. The
last val_portion of the train split validates; val is read once, at the end. A network of
search_spaces/ is that of the search, unless a key of its space says otherwise, such as the number
of cells. Writes what train.py writes.
""" # noqa: E501 (the commands stay on one line)
import contextlib
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

from tqdm import tqdm

from budget import architectures, columns_of, read_table
from configurator import (ConfigError, as_list, at_least, check_limits, configure, given, WHOLE)
from optim_nas import space_size, uniform
from prepare import prepare_own
from run import (content_hash, lock_file, main, read_json, read_lines, resumed_run, rng, silenced,
                 verify_checksum)
from search_spaces import (build, check_recorded, data_kind, recorded_keys, space_module,
                           with_space)
from train import * # noqa: F403 (every key of train.py)
from train import train

# -----------------------------------------------------------------------------
# the keys of train.py, and:
arch = '' # an arch.json, or
arch_traj = '' # an arch_traj.jsonl, whose last line counts, or
genotype = '' # the text form of an architecture of a space
table = '' # a .csv: trains architectures of the space, a row each, and can be resumed
bands = [0] # of the table: numbers of parameters, near which networks are drawn; [0]: all networks
n_archs = 40 # random networks a band
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

RESULTS = ("test_acc", "test_loss", "train_loss", "params", "flops") # columns of a table


def read_arch(arch, arch_traj, genotype="", space="gpt"):
    """What a search found, {"space", "arch", "model", "dataset", "data_dir", ...}, from exactly one
    of the two files or from a genotype. SystemExit if it is damaged."""
    if sum(map(bool, (arch, arch_traj, genotype))) != 1:
        how = "several" if arch or arch_traj or genotype else "neither"
        raise SystemExit("Give the architecture by one of --arch=out/search/arch.json, "
                         "--arch_traj=out/search/arch_traj.jsonl and --genotype=..., not by "
                         f"{how}.")
    if genotype:
        return read_genotype(genotype, space)
    path = arch or arch_traj
    lines = [read_json(arch)] if arch else read_lines(arch_traj)
    if not lines:
        raise SystemExit(f"The trajectory {path} is empty: its search has not evaluated an "
                         "architecture yet.")
    found = verify_checksum(lines[-1], path)
    found |= {"space": found.get("space", "gpt")}
    wrong = check_recorded(found)
    if wrong:
        raise SystemExit(f"The architecture {path} is damaged: {wrong} is missing or of the wrong "
                         "type.")
    return found


def read_genotype(genotype, space):
    """The same of a genotype."""
    module = space_module(space)
    if not hasattr(module, "arch_of"):
        raise SystemExit(f"genotype='{genotype}' is for the spaces of search_spaces/: name one by "
                         "--space, or give an --arch.")
    try:
        arch = module.arch_of(genotype)
    except ConfigError as error:
        raise SystemExit(str(error)) from None
    return {"space": space, "arch": arch, "model": {}, "data_dir": "data",
            "dataset": data_kind(space).default_dataset}


def with_found(namespace):
    """The keys of this script with those of the search's space, whose defaults are the search's."""
    names, (out_dir, own) = ("arch", "arch_traj", "genotype"), resumed_run(namespace)
    if any(map(given, names)): # the command names the architecture, and not the run that it resumes
        own = {key: value for key, value in own.items() if key not in names}
    files = [given(key) or own.get(key, "") for key in names[:2]]
    if not any(files) or "" not in files:
        return with_space(namespace, run=(out_dir, own))
    path, found = files[0] or files[1], read_arch(*files)
    if given("space") not in (None, found["space"]):
        raise SystemExit(f"space='{given('space')}' is not {found['space']}, that of {path}: leave "
                         "it out.")
    return with_space(namespace, found["space"], found["model"], path, (out_dir, own))


def archs_of_table(config, net):
    """The architectures of a table: those of bands, in turn, or all of the space."""
    bands = [band for band in as_list(config["bands"]) if band]
    if bands:
        drawn = [list(archs_near(net, band, config["n_archs"])) for band in bands]
        return [arch for of_bands in zip(*drawn, strict=True) for arch in of_bands]
    if (n := space_size(net.choices)) > 1_000_000:
        raise SystemExit(f"table='{config['table']}': space={config['space']} has {n:.3g} "
                         "architectures, too many to train: give it fewer options, or --bands.")
    return list(architectures(net.choices))


def archs_near(net, params, n):
    """n different random architectures of 95 to 100 % of so many parameters."""
    found, key = {}, None
    for i in tqdm(range(20_000), desc=f"{params:,} parameters", unit=" drawn", leave=False):
        arch = uniform(net.choices, rng("table", params, i))
        key = str(arch)
        if 0.95 * params < net.cost(arch)["params"] <= params:
            found[key] = arch
        if len(found) == n:
            return found.values()
    raise SystemExit(f"bands={params}: only {len(found)} of 20,000 random networks have 95 to 100 "
                     f"% of so many parameters, and n_archs={n}: choose another number.")


def train_table(config):
    """Trains architectures of the space, once a seed, into the table config["table"].

    Of bands, every third has all seeds and the others the first. The test split is not looked at
    before the end of each training. Any number of processes may work on one table.
    """
    path, space, kind = config["table"], config["space"], data_kind(config["space"])
    if kind.metric not in ("acc", None) or (kind.metric is None and not config["arch"]):
        raise SystemExit(f"table='{path}' is for spaces that classify and for language models: "
                         "name one by --space, or by a search's --arch, whose space it is.")
    if config["arch"]:
        found = read_arch(config["arch"], "")
        config = {**config, **found["model"], "dataset": config["dataset"] or found["dataset"]}
    config |= {"dataset": config["dataset"] or kind.default_dataset,
               "data_dir": config["data_dir"] or "data"}
    check_limits(SimpleNamespace(**config), {"seeds": WHOLE, "n_archs": at_least(1),
                                             "bands": at_least(0)})
    seeds, banded = as_list(config["seeds"]), any(as_list(config["bands"]))
    facts = {}
    if banded: # the data decide how many parameters an embedding has
        data = SimpleNamespace(**config)
        prepare_own(data, SimpleNamespace(master=True, world=1))
        facts = kind.load(data)[1]
    archs = archs_of_table(config, build(config | facts))
    module = space_module(space)
    rows = [(columns_of(module, arch), arch, seed) for i, arch in enumerate(archs)
            for seed in (seeds[:1] if banded and i // len(as_list(config["bands"])) % 3 else seeds)]
    if not banded: # seed by seed
        rows.sort(key=lambda row: seeds.index(row[2]))
    results = [name for name in RESULTS if kind.metric or name != "test_acc"]
    head = [*rows[0][0], "seed", *results]
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        # of several processes one writes the head
        with contextlib.suppress(FileExistsError), open(path, "x") as f:
            f.write(",".join(head) + "\n")
    except OSError as e:
        raise SystemExit(f"table='{path}' cannot be written ({e.strerror}): choose another "
                         "--table.") from None
    for columns, arch, seed in tqdm(rows, desc=path, unit=" networks"):
        row = (*map(str, columns.values()), str(seed))
        if row in rows_done(path, head, len(row)):
            continue
        lock = f"{path}.{content_hash(row)[:12]}.lock"
        with contextlib.suppress(BlockingIOError): # another process trains it
            with lock_file(lock) or contextlib.nullcontext():
                try:
                    if row not in rows_done(path, head, len(row)):
                        write_row(path, row, arch, seed, results, config)
                finally:
                    Path(lock).unlink(missing_ok=True)


def rows_done(path, head, n):
    """The first n columns of the rows of a table, which may have grown. SystemExit for another
    table."""
    done = read_table(path)
    if done and list(done[0]) != head:
        raise SystemExit(f"table='{path}' has not the columns {','.join(head)} of this space: "
                         "choose another --table.")
    return {tuple(row.values())[:n] for row in done}


def write_row(path, row, arch, seed, results, config):
    """Trains one network of a table, and adds its row."""
    job = {**config, "seed": seed, "out_dir": f"{path}.{os.getpid()}.run", "overwrite": True,
           "eval_interval": config["max_iters"] or 1}
    try:
        with silenced():
            result = train(job, arch, test=True)
    finally:
        shutil.rmtree(job["out_dir"], ignore_errors=True)
    row = [*row, *(round(result[key], 4) for key in results)]
    cells = [f'"{v}"' if "," in str(v) else str(v) for v in row]
    with open(path, "a") as f: # one write a row
        f.write(",".join(cells) + "\n")


def train_found(config):
    """Trains what config["arch"], ["arch_traj"] or ["genotype"] names; returns train.py's result,
    with "test_loss"."""
    if config["table"]:
        return train_table(config)
    found = read_arch(config["arch"], config["arch_traj"], config["genotype"], config["space"])
    data = {name: config[name] or found[name] for name in ("dataset", "data_dir")}
    network = {}
    if "block_size" in recorded_keys(found["space"]):
        block_size = config["block_size"] or found["model"]["block_size"]
        network = found["model"] | {"block_size": block_size}
    return train({**config, **network, **data}, found["arch"], test=True)


if __name__ == "__main__":
    main(train_found, configure(with_found(globals())))
