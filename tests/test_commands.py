"""Every command that the README, docs/, a script or a config shows runs, at tiny size.

The keys of every config file are real.
"""
import json
import importlib
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import (NOT_OF_PAIRS, ROOT, TINY, TINY_EVALS, TINY_IMAGES, TINY_LARGEST, TINY_SEARCH,
                      TINY_KINDS, TINY_SPACES, TINY_STAGES, flags, run, succeeds)
from conftest import script as run_here
from test_pretrained import SPACE, save_gpt2
from test_train import train_config
from test_vision import FOUR, search_config, space_config

import configurator
import train
import train_base
import train_search
from data import load_meta
from optim_nas import space_size, uniform
from run import rng
from search_spaces import build, with_space

SCRIPTS = ("train.py", "train_search.py", "train_base.py", "bench.py", "sample.py", "export.py",
           "analyze.py", "prepare.py", "env.py",
           "train_rl.py", "report.py")
TINY_RL = dict(budget=12, updates=12, eval_interval=4, learning_starts=4, shards=3, entries=[5, 40],
               test_entries=10, block_size=16,
               head_size=2, batch_size=2, max_iters=1, supernet_iters=2, seeds=[1])
OPTIMIZERS = ("darts", "darts2", "drnas", "gdas", "spos")


def commands(text):
    """The command lines in a text, without prompts, comments, and what follows # or two spaces on
    their line."""
    found = re.findall(r"^[\s#]*((?:python|torchrun) .*?)(?:[ \t]{2,}|[ \t]+#|$)", text, re.M)
    return [command.strip() for command in found if "x.py" not in command
            and "--help" not in command and "FILE" not in command]


def shown():
    """(where, command) of every command shown anywhere, once."""
    texts = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    places = [*texts, *(ROOT / name for name in SCRIPTS), *sorted((ROOT / "config").glob("*.py"))]
    seen = {}
    for place in places:
        text = place.read_text()
        for command in commands(text if place.suffix == ".md" or place.parent.name == "config"
                                else text.split('"""')[1]):
            seen.setdefault(command, place.name)
    return [(where, command) for command, where in seen.items()]


def space_of(words):
    """The space that a command is about: of its --space, or of its config, or of the search that
    its --arch or config is named after."""
    named = re.search(f"(?:search|base)_({'|'.join(TINY_SPACES)})", " ".join(words))
    words = [str(ROOT / word) if word.startswith("config/") else word for word in words]
    return configurator.given("space", words) or (named[1] if named else "gpt")


def shrink_space(words, script, space, digits_dir, out):
    """What makes the command of a space of search_spaces/ small."""
    evals = TINY_EVALS if script in ("train_search.py", "bench.py") else {}
    sizes = TINY_IMAGES | dict(repeated_augmentation=1)
    if space == "swinir":
        sizes = {key: value for key, value in sizes.items() if key not in NOT_OF_PAIRS}
    sizes |= TINY_SPACES[space] | evals
    if "progressive" in " ".join(words):
        sizes |= TINY_STAGES
    if script == "bench.py":
        sizes |= dict(rounds=2, warmup=1, latency_heldout=2, latency_samples=8)
        sizes |= dict(img_size=8) if configurator.given("img_size", words) else {}
    elif script == "train.py":
        sizes |= TINY_LARGEST
    elif "shrink" in " ".join(words):
        largest = out.parent / "largest"
        train.train(space_config(train, space, digits_dir, largest, **TINY_LARGEST))
        sizes |= dict(shrink="kernel_size=3,depth=1,expand=2", inherit=largest, teacher=largest)
    elif configurator.given("genotype", words): # of any operations; of sizes that are tiny
        sizes.pop("primitives", None)
        words = ["--genotype=8: 1x2" if word.startswith("--genotype=autoformer") else word
                 for word in words]
    elif configurator.given("benchmark", words): # of the networks that are in the table
        sizes = {key: value for key, value in sizes.items() if key not in TINY_SPACES[space]}
    elif any("table" in word for word in words):
        sizes |= FOUR | dict(seeds=[1])
        words = [*words, f"--table={out}.csv"]
    elif script == "train_base.py":
        if not (out.parent / "s/arch.json").exists():
            train_search.search(search_config(space, digits_dir, out.parent / "s"))
        words = [f"--arch={out.parent}/s/arch.json" if word.startswith("--arch=") else word
                 for word in words]
        sizes |= dict(val_portion=0.1) if space == "swinir" else {} # of 18 regions
    return words, [f"--data_dir={digits_dir}", f"--out_dir={out}", *flags(sizes)]


def shrink(command, data_dir, digits_dir, finished, out):
    """The same command on tiny data, in its own out_dir, on two local processes at the most."""
    words = shlex.split(command)
    script = next(word for word in words if word.endswith(".py") and not word.startswith("config"))
    if "--init_from=resume" in words: # the run has its own keys
        shutil.copytree(finished / "s", out)
        return [f"--out_dir={out}" if word.startswith("--out_dir") else word for word in words[1:]]
    extra, space = [f"--data_dir={data_dir}", f"--out_dir={out}"], space_of(words)
    if space != "gpt" and script != "analyze.py":
        words, extra = shrink_space(words, script, space, digits_dir, out)
    elif script == "train_search.py":
        has_kinds = "config/search" not in command or "kinds.py" in command
        sizes = TINY_SEARCH | (TINY_KINDS if has_kinds else {})
        if configurator.given("benchmark", words): # of the networks that are in the table
            sizes = TINY | TINY_EVALS | dict(block_size=32, eval_interval=4, benchmark_iters=1)
        extra += ["--dataset=pydocs", *flags(sizes)]
        # of tiny networks
        small = {"--target_params=400000": "--target_params=3000",
                 "--target_kv_cache=12000": "--target_kv_cache=400"}
        words = [small.get(word, word) for word in words]
        if "--latency_table" in command:
            small = [*extra, *flags(dict(out_dir=out.parent / "latency", rounds=2, warmup=1,
                                         latency_heldout=2))]
            run_here("bench.py", "latency", *(word for word in words
                                              if word.startswith("config/search")), *small)
            table = json.loads((out.parent / "latency/latency.json").read_text())
            reached = next(iter(table["latencies"].values()))["heldout"][0]["predicted"]
            words = [word for word in words if "latency" not in word]
            extra += [f"--latency_table={out.parent}/latency/latency.json",
                      f"--target_latency={reached}"]
        if "search_gpt2" in command: # a budget between the smallest and the largest
            extra += [*flags(SPACE), f"--init_from={finished}/gpt2", "--target_params=20_000"]
    elif script == "bench.py":
        tiny = TINY_SEARCH | dict(rounds=2, warmup=1, dataset="pydocs", head_size=4
                                  if "head_size" in command else 0, growth_options=[2],
                                  growth_layers=[3], latency_heldout=2)
        extra += flags(tiny)
    elif script == "train_base.py":
        option, file = ("--arch_traj",
                        "arch_traj.jsonl") if "--arch_traj" in command else ("--arch", "arch.json")
        words = [word for word in words if not word.startswith("--arch")]
        words = [f"--init_from={finished}/s" if word.startswith("--init_from") else word
                 for word in words]
        extra += ["--dataset=pydocs", *flags(TINY), f"{option}={finished}/s/{file}"]
        if "table" in command:
            params = json.loads((finished / "s/arch.json").read_text())["cost"]["params"]
            extra += [f"--table={out}.csv", "--n_archs=1", "--seeds=[1]", f"--bands=[{params}]"]
    elif script == "train.py":
        extra += ["--dataset=pydocs", *flags(TINY), "--n_layer=1", "--n_head=2", "--n_embd=8"]
    elif script == "sample.py":
        words = [word for word in words if not word.startswith("--out_dir")]
        extra = [f"--out_dir={finished}/b", "--max_new_tokens=5", "--device=cpu"]
    elif script == "export.py":
        if "nanogpt" in command: # whose layers are alike
            train.train(train_config(data_dir, out, n_layer=1, n_embd=8))
        words = [f"--out_dir={out if 'nanogpt' in command else finished / 'b'}"
                 if word.startswith("--out_dir") else word for word in words]
        extra = []
    elif script == "train_rl.py":
        words = [word for word in words if not word.startswith("--out_dir")]
        extra += [*flags(TINY_RL), f"--cache_dir={out}/cache"]
    elif script == "analyze.py" and "--images" in command:
        train_search.search(search_config("swinir", digits_dir, out.parent / "s"))
        sizes = {key: value for key, value in TINY_IMAGES.items() if key not in NOT_OF_PAIRS}
        run_here("train_base.py", f"--arch={out.parent}/s/arch.json", f"--out_dir={out}",
                 *flags(sizes))
        words, extra = ["python", "analyze.py"], [f"--out_dir={out}", "--images=sr_samples"]
    elif script == "report.py":
        words = [f"{finished}/s" if word.startswith("out/") else word for word in words]
        extra = [*flags(TINY | dict(n_pick=3, n_rank=3)), f"--data_dir={data_dir}"]
    elif script == "analyze.py":
        extra = []
        words = [f"--out_dir={finished}/{'b' if 'base' in word else 'r' if 'rl' in word else 's'}"
                 if word.startswith("--out_dir") else
                 f"--compare=a:{finished}/r,b:{finished}/r" if word.startswith("--compare")
                 else word for word in words]
    if words[0] == "torchrun":
        nodes = "--nnodes=2" in words
        extra.append("--gradient_accumulation_steps=2")
        words = [f"--nproc_per_node={1 if nodes else 2}" if word.startswith("--nproc") else word
                 for word in words]
        words = ["--master_addr=127.0.0.1" if word.startswith("--master_addr") else word
                 for word in words]
    return words[0 if words[0] == "torchrun" else 1:] + extra


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    """A search, a training from its architecture, a policy, and a pretrained GPT-2, which later
    commands start from."""
    out = tmp_path_factory.mktemp("finished")
    run_here("train_search.py", f"--data_dir={data_dir}", f"--out_dir={out}/s", *flags(TINY_SEARCH))
    run_here("train_base.py", f"--arch={out}/s/arch.json", f"--out_dir={out}/b", *flags(TINY))
    run_here("train_rl.py", f"--out_dir={out}/r", *flags(TINY_RL))
    save_gpt2(out / "gpt2", load_meta(data_dir, "pydocs")["vocab_size"])
    return out


# these have tests of their own; that of --n_envs is in test_rl.py
LOCAL = [(where, c) for where, c in shown()
         if not re.search("prepare.py|env.py|--nnodes|--n_envs", c)]
TWO_NODES = [(where, c) for where, c in shown() if "--node_rank=0" in c]


def distinct_runs(cases):
    """One case for each script and way of starting it: configs are all checked below, and take the
    same road. test_train.py runs every method's config, test_vision.py every method in every
    space."""
    roads = {}
    for where, command in cases:
        words = shlex.split(command)
        # what the options do, the commands of one process show
        options = tuple(sorted(word.split("=")[0] for word in words if word.startswith("--")
                               and not word.startswith("--seed=") and words[0] == "python"))
        script = next(word for word in words if word.endswith(".py")
                      and not word.startswith("config"))
        images = space_of(words) != "gpt" and script != "analyze.py"
        kind = re.search("table|progressive|shrink|format=[a-z]+", command)
        roads.setdefault((script, words[0], options, images, kind and kind[0]), (where, command))
    return list(roads.values())


@pytest.mark.parametrize("where, command", distinct_runs(LOCAL))
def test_shown_command_runs(where, command, data_dir, digits_dir, finished, tmp_path):
    """Those of one process in this one: --help below starts every script as its own."""
    words = shrink(command, data_dir, digits_dir, finished, tmp_path / "out")
    if words[0] == "torchrun":
        succeeds(*words)
    else:
        run_here(*words)


@pytest.mark.parametrize("where, command", TWO_NODES)
def test_two_node_command_runs(where, command, data_dir, digits_dir, finished, tmp_path):
    """Both nodes on this machine, one process each; rank 0 writes the result."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    words = [word for word in shrink(command, data_dir, digits_dir, finished, tmp_path / "out")
             if not word.startswith("--master_port")]
    assert words[0] == "torchrun"
    nodes = [subprocess.Popen([sys.executable, "-m", "torch.distributed.run",
                               f"--master_port={port}",
                               *(word.replace("--node_rank=0", f"--node_rank={rank}")
                                 for word in words[1:])],
                              cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
             for rank in (0, 1)]
    outputs = [node.communicate(timeout=200)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert (tmp_path / "out/result.json").exists() and outputs[1].count("step 4/4") == 0


def test_every_shown_script_and_config_exists():
    assert len(shown()) > 25
    for where, command in shown():
        for word in shlex.split(command):
            if word.endswith(".py") and "=" not in word:
                assert (ROOT / word).exists(), f"{where} shows {word}"


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.py")), ids=lambda path: path.name)
def test_config_keys_are_real_and_its_network_builds(path):
    stem = path.stem
    if stem in OPTIMIZERS:
        config = configurator.configure(dict(vars(train_search)),
                                        ["config/search_pydocs.py", str(path)])
        assert config["out_dir"] == f"out/search_pydocs_{stem}"
        assert config["optimizer"] == stem.rstrip("2")
        return
    if stem == "kinds": # behind every search of a GPT's sizes from scratch
        for task in ("pydocs", "shakespeare_char", "tinystories", "tinystories_laptop", "owt"):
            config = configurator.configure(dict(vars(train_search)),
                                            [f"config/search_{task}.py", str(path)])
            with torch.device("meta"):
                net = build(config | {"vocab_size": 50304})
            assert {"norm", "position", "activation", "window"} < net.choices.keys()
            assert net.head_size == max(config["n_embd"]) // max(config["n_head"])
        return
    kind, name = stem.split("_", 1)
    module = {"search": train_search, "shrink": train_search, "base": train_base,
              "table": train_base, "train": train}[kind]
    space = space_of([str(path)])
    # that of base is the search's
    named_space = configurator.given("space", [str(path)]) or "gpt"
    assert named_space == ("gpt" if kind == "base" else space)
    config = configurator.configure(with_space(dict(vars(module)), space), [str(path)])
    if kind == "table":
        assert config["table"] == f"assets/{name}.csv"
    else:
        assert config["out_dir"] == f"out/{stem}"
    sizes = {"digits": (8, 1), "fashion_mnist": (28, 1), "imagenet": (224, 3)}
    size, channels = sizes.get(config["dataset"], (32, 3))
    facts = {"vocab_size": 50304, "img_size": size, "in_channels": channels, "num_classes": 10}
    if kind not in ("base", "table") or space != "gpt": # whose search says what they are
        with torch.device("meta"):
            net = build(config | facts)
        arch = uniform(net.choices, rng(0))
        with torch.device("meta"):
            build(config | facts, arch)
        assert bool([c for c in net.choices.values() if len(c.options) > 1]) == (kind != "train")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_every_key(script):
    out = succeeds(script, "--help")
    assert f"python {script}" in out
    module = importlib.import_module(Path(script).stem)
    for key, value in configurator.defaults(vars(module)).items():
        assert re.search(rf"{key}\b.*{re.escape(str(value))}", out), key


@pytest.mark.parametrize("script", ["train_search.py", "bench.py"])
def test_help_of_a_space_lists_its_keys(script):
    out = succeeds(script, "--space=nb201", "--help")
    assert "space = 'nb201'" in out and "n_head = " not in out
    assert re.search(r"n_cell = 5 +# cells a third", out)


def test_python_of_the_readme_runs():
    """The example as it stands; it says how many networks its space has."""
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    x = torch.randint(65, (2, 8))
    names = {"x": x, "y": x}
    lines = example.splitlines()
    first_use = next(i for i, line in enumerate(lines) if "weights)" in line)
    exec("\n".join(lines[:first_use]), names)
    names["weights"] = names["one_hot"](names["net"].choices, names["arch"])
    exec("\n".join(lines[first_use:]), names)
    assert names["small"](x, x)[0].shape == names["logits"].shape
    assert f"all {space_size(names['net'].choices)} networks" in example


def test_ruff_is_clean():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_gradient_accumulation_that_does_not_divide_is_one_sentence(data_dir, tmp_path):
    options = [*flags(TINY), f"--data_dir={data_dir}", f"--out_dir={tmp_path}/o"]
    done = run("torchrun", "--standalone", "--nproc_per_node=2", "train.py", *options)
    assert (done.returncode
            and "gradient_accumulation_steps=1 does not divide over 2 processes" in done.stderr)
