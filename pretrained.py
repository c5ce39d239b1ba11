"""What a network starts with: a pretrained GPT-2, a search, or a training; and the order of heads,
neurons and channels that a cut should keep."""
import json
import math
import os
from functools import partial

import torch

from run import (check_same_data, check_same_network, different_data, is_pretrained,
                 load_checkpoint, load_model)
from search_spaces import build, data_kind, network_keys
from supernet import SIZES, Norm, extremes, ranking, reorder

GPT2 = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl") # on the Hugging Face hub
GPT2_SIZES = {"n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd",
              "vocab_size": "vocab_size", "n_positions": "block_size"} # its config.json's: ours
GPT2_CONFIG = { # key of its config.json -> {its values: ours}
    "activation_function": {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "exact_gelu",
                            "relu": "relu", "silu": "silu"},
    "layer_norm_epsilon": {1e-5: 1e-5},
    "scale_attn_weights": {True: True},
    "scale_attn_by_inverse_layer_idx": {False: False},
    "tie_word_embeddings": {True: True},
}


def read_gpt2(source):
    """A pretrained GPT-2 (Radford et al. 2019): its sizes, under the names of GPTConfig, and its
    weights, {our name: tensor}.

    source: one of GPT2, or a folder with a config.json and a model.safetensors in the format of
    transformers. Raises SystemExit if it cannot be loaded, or computes what our GPT does not.
    """
    try:
        from huggingface_hub import hf_hub_download
        from safetensors.torch import load_file
        config, weights = (
            os.path.join(source, name) if os.path.isdir(source)
            else hf_hub_download(f"openai-community/{source}", name)
            for name in ("config.json", "model.safetensors"))
        with open(config, encoding="utf-8") as f:
            config = {"activation_function": "gelu_new"} | json.load(f)
        is_gpt2 = config.get("model_type", "gpt2") == "gpt2" and GPT2_SIZES.keys() <= config.keys()
        weights = load_file(weights) if is_gpt2 else {}
    except Exception as e: # the hub, the network, packages, damaged files: errors of every kind
        reason = str(e).strip().splitlines()[0] if str(e).strip() else ""
        raise SystemExit(
            f"init_from='{source}' cannot be loaded ({type(e).__name__}: {reason}): name a folder "
            f"with a GPT-2's config.json and model.safetensors, or one of {', '.join(GPT2)} where "
            "the Hugging Face hub can be reached.") from None
    if not is_gpt2:
        names = [*(config.get("architectures") or ()), config.get("model_type"), "nameless network"]
        raise SystemExit(f"init_from='{source}' is a {next(filter(None, names))} by its "
                         "config.json, and only a GPT-2 can be loaded, with "
                         f"{', '.join(GPT2_SIZES)}: name a folder with one, or one of "
                         f"{', '.join(GPT2)}.")
    sizes = {ours: config[theirs] for theirs, ours in GPT2_SIZES.items()}
    for key, known in GPT2_CONFIG.items():
        if key in config and config[key] not in known:
            raise SystemExit(f"init_from='{source}' has {key}={config[key]}, but this GPT can only "
                              f"have {', '.join(map(str, known))}.")
    inner = config.get("n_inner") or 4 * config["n_embd"]
    ratio = inner / config["n_embd"]
    if int(ratio * config["n_embd"]) < inner: # the division was rounded down
        ratio = math.nextafter(ratio, math.inf)
    sizes["mlp_ratio"] = ratio
    sizes["activation"] = GPT2_CONFIG["activation_function"][config["activation_function"]]
    sizes |= {"bias": True, "norm": "layernorm", "position": "learned", "residual": "pre"}
    sizes["n_expert"] = 0
    renamed = {}
    for name, t in weights.items():
        name = "transformer." + name.removeprefix("transformer.")
        # left out: causal masks, and lm_head, which is tied to wte
        if not name.endswith((".attn.bias", ".attn.masked_bias", "lm_head.weight")):
            is_matrix = ".h." in name and t.dim() == 2 # transformers stores its transpose
            renamed[name] = t.T if is_matrix else t
    return sizes, renamed


def load_gpt2(net, source, arch=None):
    """Fills a GPT, or the largest network of a supernet, with the weights of a pretrained GPT-2. Of
    its positions it takes the first block_size.

    arch: the architecture of a net without choices. Raises SystemExit, which names the first key
    that differs, unless both are the same network.
    """
    if holds_run(source): # a search has nothing to do with it
        raise SystemExit(f"init_from='{source}' is the out_dir of a run, and a search of the GPT "
                         f"starts from a GPT-2: {', '.join(GPT2)}, or a folder with its "
                         "config.json and model.safetensors; a space of images has --inherit.")
    sizes, weights = read_gpt2(source)
    arch = arch or extremes(net.choices)[1]
    own = vars(net.config) | {name: arch[name] for name in SIZES[:2]}
    for name in SIZES[2:]: # of every layer: one that differs, if there is one
        own[name] = next((value for value in arch[name] if value != sizes[name]), sizes[name])
    own["block_size"] = max(sizes["block_size"], net.config.block_size) # a shorter one is right
    for name, value in sizes.items():
        if own[name] != value:
            fix = f"--{name}={value}"
            if name in SIZES:
                fix += ", or a list that ends there"
            if name == "vocab_size":
                fix = ("--dataset to one prepared with its tokens, such as by prepare.py "
                       "--tokenizer=gpt2")
            raise SystemExit(f"init_from='{source}' has {name}={value}, and this network, at its "
                              f"largest, {own[name]}: set {fix}.")
    head_size = sizes["n_embd"] // sizes["n_head"]
    if net.config.head_size not in (0, head_size):
        raise SystemExit(f"init_from='{source}' has heads of {head_size} channels: set --head_size "
                          "to that or 0.")
    weights = {name: t[:net.config.block_size] if name == "transformer.wpe.weight" else t
               for name, t in weights.items()}
    shapes = {name: tuple(t.shape) for name, t in weights.items()}
    wanted = {name: tuple(t.shape) for name, t in net.state_dict().items()}
    del wanted["lm_head.weight"] # tied to wte
    names = wanted.keys() | shapes.keys()
    if wrong := sorted(name for name in names if wanted.get(name) != shapes.get(name)):
        raise SystemExit(f"init_from='{source}' is not the GPT-2 of its config.json: {wrong[0]} is "
                          f"{shapes.get(wrong[0])} in the place of {wanted.get(wrong[0])}.")
    net.load_state_dict(weights | {"lm_head.weight": weights["transformer.wte.weight"]})


def holds_run(source):
    """Whether init_from names the out_dir of a run, and not a GPT-2."""
    return any(os.path.exists(os.path.join(source, name))
               for name in ("run.json", "best.pt", "ckpt.pt"))


def check_init_from(config):
    """SystemExit unless init_from names something that a run can start with."""
    source = config.init_from
    if not is_pretrained(source):
        return
    if source not in GPT2 and not os.path.isdir(source):
        raise SystemExit(f"init_from='{source}' is not 'scratch', 'resume' or 'previous', nor a "
                         f"pretrained network: {', '.join(GPT2)}, a folder with such a "
                         "config.json and model.safetensors, or the out_dir of a training.")
    if os.path.realpath(source) == os.path.realpath(config.out_dir):
        raise SystemExit(f"init_from='{source}' is this run's own out_dir, whose files it would "
                         "replace: go on with that run by --init_from=resume, or choose another "
                         "--out_dir.")
    if data_kind(config.space).metric and not os.path.exists(os.path.join(source, "best.pt")):
        raise SystemExit(f"init_from='{source}' is for the GPT alone: a network of {config.space} "
                         "starts from scratch, or from the out_dir of a training with a best.pt.")


def load_pretrained(net, arch, source, config, run):
    """Fills net from what init_from names: a GPT-2; the out_dir of a training of the same network,
    whose best weights count; or that of a search, whose supernet has weights for this
    architecture."""
    best, newest = (os.path.join(source, name) for name in ("best.pt", "ckpt.pt"))
    if not holds_run(source):
        return load_gpt2(net, source, arch)
    if os.path.exists(best):
        return load_same_network(net, arch, source, load_checkpoint(best, run.device), config, run)
    checkpoint = load_checkpoint(newest, run.device)
    if "chooser" not in checkpoint or arch is None:
        kind = "search" if "chooser" in checkpoint else "run without a best.pt"
        raise SystemExit(f"init_from='{source}' is the out_dir of a {kind}: train.py starts from "
                         "the out_dir of a training, and one of a search's architectures from the "
                         "search, by python train_base.py --arch=OUT_DIR/arch.json "
                         "--init_from=OUT_DIR.")
    check_learned(config, checkpoint["config"], f"init_from='{source}'", run)
    whole = load_model(build(checkpoint["config"]).to(run.device), checkpoint, newest)
    return load_model(net, {"model": whole.extract(arch).state_dict()}, newest)


def load_same_network(net, arch, source, checkpoint, config, run):
    """net with the weights in a training's checkpoint. SystemExit if it is of another network."""
    before, where = checkpoint["config"], f"init_from='{source}'"
    theirs, ours = before.get("space", "gpt"), config.space
    if theirs != ours or checkpoint["arch"] != arch:
        theirs, ours = (f"the architecture {found} of {space}" if found else f"a {space}"
                        for found, space in ((checkpoint["arch"], theirs), (arch, ours)))
        raise SystemExit(f"{where} has trained {theirs}, and this is {ours}: name a training of "
                         "the same network, or give its --arch to train_base.py.")
    check_learned(config, before, where, run)
    # the architecture says the sizes, whatever the lists that it was chosen from
    check_same_network(config, checkpoint, where, network_keys(ours) - (arch or {}).keys(),
                       fix="its weights are for the same network alone")
    return load_model(net, checkpoint, os.path.join(source, "best.pt"))


def check_learned(config, before, where, run):
    """SystemExit if weights learned on data whose ids or labels mean something else than those of
    config's data; a line if only the content differs, which is fine-tuning."""
    fix = "give data whose ids and labels mean the same, or leave it out"
    check_same_data(config, before, where, ("meaning",), fix)
    if run.master and (difference := different_data(config, before, ("content",))):
        print(f"{where}: its weights have learned on other {difference}, "
              f"{os.path.join(before['data_dir'], before['dataset'])}")


def load_trained(out_dir, key, config, run):
    """The network of a finished training, in evaluation mode. key: the one that names it.

    SystemExit if it is a network for other data.
    """
    path = os.path.join(out_dir, "best.pt")
    checkpoint = load_checkpoint(path, run.device)
    for name in ("space", "in_channels", "num_classes"):
        theirs, ours = checkpoint["config"].get(name), getattr(config, name, None)
        if theirs != ours:
            raise SystemExit(f"{key}='{out_dir}' has {name}={theirs}, and this search {ours}: name "
                             "a training of the search's space, on its data.")
    check_learned(config, checkpoint["config"], f"{key}='{out_dir}'", run)
    net = build(checkpoint["config"], checkpoint["arch"]).to(run.device)
    return load_model(net, checkpoint, path).eval()


def init_supernet(net, config, run):
    """Fills the supernet with the weights of config.inherit.

    What that training does not have, such as matrices between kernels, stays as it is.
    """
    theirs = load_trained(config.inherit, "inherit", config, run).state_dict()
    own = net.state_dict()
    wrong = [name for name, t in theirs.items()
             if name not in own or own[name].shape != t.shape]
    if wrong:
        raise SystemExit(f"inherit='{config.inherit}' is not the largest network of this space, in "
                         f"its {wrong[0]}: train that one, with the largest option of everything.")
    net.load_state_dict(theirs, strict=False)

# -----------------------------------------------------------------------------
# the order of channels

@torch.no_grad()
def sort_by_importance(net, score):
    """Orders a GPT's neurons, heads and channels by importance, the largest first, so that a
    smaller option keeps what matters most. The largest network computes what it did before.

    score: a function of a parameter that says how much each of its entries matters, in its shape.

    neurons     of every MLP
    heads       those of a fixed head_size. With head_size=0 all head counts use all channels, and a
                smaller n_embd cuts off the last channels of every head of the largest count. So the
                channels within a head are ordered: those of its values, and apart from them those
                of its queries and keys
    channels    of n_embd, in all layers alike; but not where a channel's index has a meaning, as in
                sinusoidal positions and in partial_rmsnorm
    """
    config = net.config
    assert not config.n_expert, "experts have fixed sizes, and nothing to order"
    assert config.n_kv_head == 0, "heads that share keys and values are bound to their places"

    def order(units):
        importance = sum(t.reshape(len(t), -1).sum(1) for t in units(score))
        reorder(units(lambda p: p), ranking(importance))

    for block in net.transformer.h:
        order(partial(neurons, block.mlp))
        for units in parts_of_heads(block.attn):
            order(units)
    if config.position != "sinusoidal" and config.norm != "partial_rmsnorm":
        order(partial(channels, net))


# Each of these returns of(parameter), for all parameters that have the units, as (unit, ...): views
# of the parameters themselves or of their scores.

def neurons(mlp, of):
    """The hidden neurons of an MLP."""
    parts = 1 + mlp.has_gate
    rows = [of(p).unflatten(0, (parts, -1)).transpose(0, 1) for p in mlp.c_fc.parameters()]
    return [*rows, of(mlp.c_proj.weight).T]


def parts_of_heads(attn):
    """What can be ordered in an attention, a function of `of` each: its heads, or with head_size=0
    the channels within each head."""
    h = attn.n_head[-1]

    def parts(of):
        """[(3, head, channel, ...)] of query, key, value, and (head, channel, n_embd) of c_proj."""
        qkv = [of(p).unflatten(0, (3, h, -1)) for p in attn.c_attn.parameters()]
        return qkv, of(attn.c_proj.weight).T.unflatten(0, (h, -1))

    def heads(of):
        qkv, proj = parts(of)
        return [*(t.transpose(0, 1) for t in qkv), proj]

    def values(of, i):
        qkv, proj = parts(of)
        return [*(t[2, i] for t in qkv), proj[i]]

    def keys(of, i):
        return [t[:2, i].transpose(0, 1) for t in parts(of)[0]]

    if attn.head_size:
        return [heads]
    return [partial(units, i=i) for i in range(h) for units in (values, keys)]


def channels(net, of):
    """The channels of n_embd."""
    t = net.transformer
    rows = [p for module in net.modules() if isinstance(module, Norm)
            for p in module.parameters()]
    columns = [t.wte.weight]
    if net.config.position == "learned":
        columns.append(t.wpe.weight)
    for block in t.h:
        columns += [block.attn.c_attn.weight, block.mlp.c_fc.weight]
        rows += [*block.attn.c_proj.parameters(), *block.mlp.c_proj.parameters()]
    return [of(p) for p in rows] + [of(p).T for p in columns]
