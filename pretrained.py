"""Weights of pretrained language models, in."""
import json
import math
import os
from model import SIZES
from run import is_pretrained, load_checkpoint, load_model
from search_spaces import build, data_kind
from supernet import extremes


GPT2 = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl") # on the Hugging Face hub
GPT2_CONFIG = {"activation_function": {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "exact_gelu", # as we call them
                                       "relu": "relu", "silu": "silu"},
               "layer_norm_epsilon": {1e-5: 1e-5}, "scale_attn_weights": {True: True}, "scale_attn_by_inverse_layer_idx": {False: False},
               "tie_word_embeddings": {True: True}}


def read_gpt2(source):
    """A pretrained GPT-2 (Radford et al. 2019): its sizes, under the names of GPTConfig, and its weights, {our name: tensor}.

    source: one of GPT2, or a folder with a config.json and a model.safetensors in the format of transformers. SystemExit if it cannot
    be had, or computes something that our GPT does not.
    """
    try:
        from huggingface_hub import hf_hub_download
        from safetensors.torch import load_file
        config, weights = (os.path.join(source, name) if os.path.isdir(source) else hf_hub_download(f"openai-community/{source}", name)
                           for name in ("config.json", "model.safetensors"))
        with open(config, encoding="utf-8") as f:
            config = {"activation_function": "gelu_new"} | json.load(f)
        sizes = {name: config[name] for name in ("n_layer", "n_head", "n_embd", "vocab_size")} | {"block_size": config["n_positions"]}
        weights = load_file(weights)
    except Exception as e: # the hub, the network, the packages and damaged files have errors of every kind
        reason = str(e).strip().splitlines()[0] if str(e).strip() else ""
        raise SystemExit(f"init_from='{source}' cannot be loaded ({type(e).__name__}: {reason}): name a folder with a GPT-2's config.json "
                         f"and model.safetensors, or one of {', '.join(GPT2)} where the Hugging Face hub can be reached.") from None
    for key, known in GPT2_CONFIG.items():
        if key in config and config[key] not in known:
            raise SystemExit(f"init_from='{source}' has {key}={config[key]}, and this GPT can only have {', '.join(map(str, known))}.")
    inner = config.get("n_inner") or 4 * config["n_embd"]
    ratio = inner / config["n_embd"]
    if int(ratio * config["n_embd"]) < inner: # rounded down
        ratio = math.nextafter(ratio, math.inf)
    sizes |= {"mlp_ratio": ratio, "activation": GPT2_CONFIG["activation_function"][config["activation_function"]]}
    sizes |= {"bias": True, "norm": "layernorm", "position": "learned", "residual": "pre", "n_expert": 0}
    renamed = {}
    for name, t in weights.items():
        name = "transformer." + name.removeprefix("transformer.")
        if not name.endswith((".attn.bias", ".attn.masked_bias", "lm_head.weight")): # masks, and what is tied to wte
            matrix = ".h." in name and t.dim() == 2 # transformers has them the other way round
            renamed[name] = t.T if matrix else t
    return sizes, renamed


def load_gpt2(net, source, arch=None):
    """Fills net, a GPT or a supernet of which it is the largest network, with the weights of a pretrained GPT-2; of its positions it
    takes the first block_size. arch: that of a net without choices. SystemExit, with the first key that differs, if it is another."""
    sizes, weights = read_gpt2(source)
    arch = arch or extremes(net.choices)[1]
    own = vars(net.config) | {name: arch[name] for name in SIZES[:2]}
    own |= {name: next((v for v in arch[name] if v != sizes[name]), sizes[name]) for name in SIZES[2:]}
    own["block_size"] = max(sizes["block_size"], net.config.block_size) # a shorter one is right
    for name, value in sizes.items():
        if own[name] != value:
            raise SystemExit(f"init_from='{source}' has {name}={value}, and this network, at its largest, {own[name]}: set " + (
                f"--{name}={value}, or a list that ends there." if name in SIZES else f"--{name}={value}." if name != "vocab_size" else
                "--dataset to one prepared with its tokens, such as by prepare.py --tokenizer=gpt2."))
    if net.config.head_size not in (0, sizes["n_embd"] // sizes["n_head"]):
        raise SystemExit(f"init_from='{source}' has heads of {sizes['n_embd'] // sizes['n_head']} channels: set --head_size to that or 0.")
    weights = {name: t[:net.config.block_size] if name == "transformer.wpe.weight" else t for name, t in weights.items()}
    wanted, there = ({name: tuple(t.shape) for name, t in state.items()} for state in (net.state_dict(), weights))
    del wanted["lm_head.weight"] # wte
    if wrong := sorted(name for name in wanted.keys() | there.keys() if wanted.get(name) != there.get(name)):
        raise SystemExit(f"init_from='{source}' is not the GPT-2 of its config.json: {wrong[0]} is {there.get(wrong[0])} in the place of "
                         f"{wanted.get(wrong[0])}.")
    net.load_state_dict(weights | {"lm_head.weight": weights["transformer.wte.weight"]})


def check_init_from(config):
    """SystemExit unless init_from names something that a run can start with."""
    source = config.init_from
    if not is_pretrained(source):
        return
    if source not in GPT2 and not os.path.isdir(source):
        raise SystemExit(f"init_from='{source}' is not 'scratch', 'resume' or 'previous', nor a "
                         f"pretrained network: {', '.join(GPT2)}, or a folder with such a "
                         "config.json and model.safetensors.")
    if data_kind(config.space).metric:
        raise SystemExit(f"init_from='{source}' is for the GPT alone.")


def load_pretrained(net, arch, source, run):
    """Fills net from what init_from names: a GPT-2, or the out_dir of a search, whose supernet has
    weights for this architecture."""
    path = os.path.join(source, "ckpt.pt")
    if not os.path.exists(path):
        return load_gpt2(net, source, arch)
    checkpoint = load_checkpoint(path, run.device)
    kind, of = ("search", source) if "chooser" in checkpoint else ("training", "OUT_DIR")
    if kind == "training" or arch is None:
        raise SystemExit(f"init_from='{source}' is the out_dir of a {kind}, and of our own runs "
                         "only a search has weights to start with, those of one of its "
                         f"architectures: python train_base.py --arch={of}/arch.json "
                         f"--init_from={of}.")
    whole = load_model(build(checkpoint["config"]).to(run.device), checkpoint, path)
    return load_model(net, {"model": whole.extract(arch).state_dict()}, path)
