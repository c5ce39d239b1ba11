"""The protocol of a search space, and how one is found by its name."""
from pathlib import Path
from dataclasses import fields
import importlib
import model
import torch
from configurator import ConfigError, defaults, given

SHARED = ("__init__", "cells", "convs") # files that are no space


def describe(arch):
    """n_layer=3 n_head=4,4,8 ..., for people."""
    return " ".join(f"{name}={','.join(map(str, value)) if isinstance(value, list) else value}" for name, value in arch.items())


def space_module(space):
    """The file of a search space, with its build(); of the GPT model.py. SystemExit if there is none of that name."""
    there = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in SHARED)
    if space != "gpt" and space not in there:
        raise SystemExit(f"space='{space}' is not gpt or a file of search_spaces/: {', '.join(there)}.")
    return model if space == "gpt" else importlib.import_module(f"search_spaces.{space}")


def with_space(namespace, space=None, found=None):
    """A script's globals(), where the keys of another space than the GPT stand in the place of the GPT's, and found in that of defaults.
    space: None for the one that the command line names."""
    space = space or given("space") or namespace["space"]
    if space == "gpt":
        return namespace
    module, gpt = space_module(space), {field.name for field in fields(model.GPTConfig)}
    keys = {name: value for name, value in namespace.items() if name not in gpt} | {"space": space, "__space__": module}
    if keys["dataset"] == "pydocs":
        keys["dataset"] = own_data(module)
    return keys | defaults(vars(module)) | (found or {})


def own_data(module):
    """The data set of a space that needs no network."""
    return "sr_samples" if hasattr(module, "scale") else "digits"


def build(config, arch=None):
    """The network of a config (a dict) in its space, or of one of the space's architectures.
    SystemExit if it cannot be built."""
    try:
        net = space_module(config["space"]).build(config, arch)
    except ConfigError as e:
        raise SystemExit(str(e)) from None
    return net.to(memory_format=torch.channels_last) # in which convolutions are fastest


def network_keys(space):
    """The keys of a space that say which network it is: a run that goes on must have them as they were."""
    if space == "gpt":
        own = {field.name for field in fields(model.GPTConfig)}
        return own - {"block_size", "vocab_size", "dropout", "router_aux_loss_coef", "loss_chunk"} # what may change, or shapes tell
    own = set(defaults(vars(space_module(space)))) # partial_channels changes within a progressive search
    return own - {"dropout", "drop_path", "auxiliary", "patch", "tile", "partial_channels"}
