"""
The protocol of a search space, and how one is found by its name.

A space is a module with these names; model.py is the one called "gpt":

    its keys                       commented lower-case globals; the GPT's are fields of GPTConfig
    DATA                           the kind of data it takes: a key of data.KINDS
    build(config, arch=None)       config: a dict, published defaults where it is silent; a list is
                                   a choice. With an arch: that stand-alone network, untrained
    net.choices                    {"n_layer": Choice, ...}
    net(x, y, weights or arch)     -> logits, loss; a plain network takes no third argument
    net.extract(arch)              the stand-alone network with the inherited weights
    net.cost(weights or arch)      {"params", "flops"}; the GPT has "kv_cache" too
    genotype(arch), arch_of(text)  optional: the published text form
    columns(arch)                  optional: what tells architectures apart in a benchmark table
"""
import importlib
from dataclasses import fields
from pathlib import Path

import torch

import model
from configurator import ConfigError, check, defaults, given
from data import KINDS
from supernet import SIZES

SHARED = ("__init__", "cells", "convs") # files here that are no space
# keys of networks that may change when a run is resumed, or that its shapes tell apart
MAY_CHANGE = {"block_size", "vocab_size", "dropout", "router_aux_loss_coef", "loss_chunk",
              "drop_path", "auxiliary", "patch", "tile", "partial_channels"}

OF_DATA = {"vocab_size", "img_size", "in_channels", "num_classes", "identity"} # facts, no keys


def space_module(space):
    """The module of a search space. SystemExit if there is none of that name."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("*.py"))
    names = [name for name in names if name not in SHARED]
    if space not in ("gpt", *names):
        raise SystemExit(f"space='{space}' is not gpt or a file of search_spaces/: "
                         f"{', '.join(names)}.")
    return importlib.import_module({"gpt": "model"}.get(space, f"search_spaces.{space}"))


def data_kind(space):
    """The class of the data that a space takes: Tokens, Images or Pairs."""
    return KINDS[space_module(space).DATA]


def space_keys(space):
    """{key: default} of the keys that say which network of a space it is."""
    module = space_module(space)
    if module is model:
        return {field.name: field.default for field in fields(model.GPTConfig)}
    return defaults(vars(module))


def network_keys(space):
    """The keys that a resumed run must have as they were: they say which network it is."""
    return space_keys(space).keys() - MAY_CHANGE


def recorded_keys(space):
    """The keys of the network that arch.json records under "model"."""
    if space_module(space) is model:
        return [*SIZES, "head_size", "bias", "block_size", *model.BLOCK_KEYS]
    return list(space_keys(space))


def check_recorded(found):
    """The first of an arch.json's fields that is missing or of a wrong type, or None."""
    space = found["space"]
    types = {"arch": dict, "model": dict, "dataset": str, "data_dir": str}
    for name, of in types.items():
        if type(found.get(name)) is not of:
            return name
    if space_module(space) is model:
        sizes = {"n_layer": int, "n_embd": int, "n_head": list, "mlp_ratio": list}
        needed = {"head_size": int, "bias": bool, "block_size": int}
        kinds = {key: type(getattr(model.GPTConfig, key)) for key in model.BLOCK_KEYS
                 if key in found["model"]} # older searches had fewer
        wrong = [key for key, of in sizes.items() if not isinstance(found["arch"].get(key), of)]
        wrong += [key for key, of in (needed | kinds).items()
                  if not isinstance(found["model"].get(key), (of, list))]
    else:
        keys = {key: default for key, default in space_keys(space).items()
                if key != "stem" or key in found["model"]} # older searches had none
        wrong = [key for key, default in keys.items()
                 if key not in found["model"] or not check(found["model"][key], default)[0]]
    return wrong[0] if wrong else None


def with_space(namespace, space=None, found=None, path="", run=("", {})):
    """A script's globals(), with the keys of a space and of its kind of data.

    The GPT's keys are in the script already; another space's take their place. space: None for the
    one that the command line names. found: the keys of the space that a search recorded in the file
    `path`; they become the defaults, but a GPT is trained as it was searched: SystemExit if the
    command says otherwise. run: resumed_run(); its space and its keys are those of the run.
    """
    out_dir, own = run
    own = {key: value for key, value in own.items() if key not in OF_DATA}
    if given("space") not in (None, own.get("space", given("space"))):
        raise SystemExit(f"space={given('space')} is not {own['space']}, that of the run in "
                         f"out_dir={out_dir}: leave it out.")
    space = space or own.get("space") or given("space") or namespace["space"]
    module, kind = space_module(space), data_kind(space)
    keys, sources = dict(namespace), [kind.keys]
    if module is not model:
        sources.append(module)
        keys = {name: v for name, v in keys.items() if name not in space_keys("gpt")}
        keys |= space_keys(space)
        if keys["dataset"] == KINDS[model.DATA].default_dataset:
            keys["dataset"] = kind.default_dataset
        keys |= found or {}
    elif found:
        for key, value in found.items():
            ours = (given(key) or str(value)).replace(" ", "")
            if key != "block_size" and ours != str(value).replace(" ", ""):
                raise SystemExit(f"{key}={given(key)} is not {value}, that of {path}: leave it "
                                 "out.")
        own = {key: value for key, value in own.items() if key == "block_size" or key not in found}
    return keys | defaults(vars(kind.keys)) | {"space": space, "__sources__": sources,
                                               "__run__": (out_dir, own)}


def build(config, arch=None):
    """The network of a config (a dict) in its space, or of one of the space's architectures.

    SystemExit with one sentence for a config or an architecture that is none of the space.
    """
    try:
        net = space_module(config["space"]).build(config, arch)
    except ConfigError as error:
        raise SystemExit(str(error)) from None
    return net.to(memory_format=torch.channels_last) # convolutions are fastest so


def describe(arch):
    """n_layer=3 n_head=4,4,8 ..., for people."""
    def text(value):
        return ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return " ".join(f"{name}={text(value)}" for name, value in arch.items())


def text_of(arch, space):
    """The architecture in the text form of its space."""
    return getattr(space_module(space), "genotype", describe)(arch)
