"""
Exports a trained network for other programs. A file is written only if another program that reads
it computes what the network computes.

    python export.py --out_dir=out/base                       # model.onnx, for ONNX Runtime, ...
    python export.py --out_dir=out/base --format=torch        # model.pt2, for torch.export.load()
    python export.py --out_dir=out/base --format=safetensors  # model.safetensors, with our names
    python export.py --out_dir=out/base --format=nanogpt      # nanogpt/ckpt.pt, to resume there
    python export.py --out_dir=out/base --format=huggingface  # huggingface/, for from_pretrained()

Reads best.pt in out_dir, the best weights in validation, and writes into out_dir.

model.onnx and model.pt2 have one input, x:
    images     float32 (batch, channels, img_size, img_size), as data.get_images() gives them:
               (pixel - mean) / std of meta.json
    tokens     int64 (batch, time), for a GPT
and one output, y: the logits, (batch, num_classes) or (batch, time, vocab_size), or, for
super-resolution, the larger image. The batch may have any size, and time is at most block_size;
images have the size that they are exported with.

model.safetensors holds every tensor once. Its metadata, in JSON, has "config", the training's keys
with the architecture as "arch", so that search_spaces.build(config, config["arch"]) is the network;
and "tied", {name: the name of the tensor that it shares}.

format=huggingface takes the first of these that holds the network; all need residual=pre and no
experts:
    GPT-2      layernorm, positions learned or sinusoidal, one activation without a gate
    Llama      rmsnorm, rope and swiglu, the same heads in all layers
    our code   the others. modeling_gpt_kinds.py comes with the weights, and
               AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True) loads both.
GPT-2 and Llama have neither windows nor qk_norm, and Llama alone has n_kv_head. Llama turns
channels i and i + d/2 of a head where we turn 2i and 2i + 1, and its query heads that read the same
key stand side by side: the rows of c_attn and the columns of c_proj change places. Llama and our
code have no dropout.

nanoGPT, GPT-2 and Llama have one MLP width in all layers, and one number of heads. A narrower layer
gets zeros, which change nothing. Sinusoidal positions become a table of learned ones. nanoGPT's
nn.GELU() is activation=exact_gelu; GPT-2's, our gelu, approximates it by tanh, and how much that
changes the logits is printed.

A tokenizer.json of Hugging Face's tokenizers comes beside every language model, and for
format=huggingface lies in the folder, so that AutoTokenizer.from_pretrained(path) finds it; for
tokenizer=sentencepiece it is a tokenizer.model, which sentencepiece reads. Ids behind those of the
tokenizer are padding.

A .pt2 file contains pickles, which may run code when they are loaded: load only files that you made
yourself. The others contain none, or only what torch.load(path, weights_only=True) reads.
"""
import contextlib
import importlib
import io
import json
import logging
import os
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn

from configurator import at_least, check_limits, configure, one_of
from data import Tokens, codec_of, read_meta, read_tokenizer
from fused_ops import use_fused_ops
from run import atomic_write, rng
from sample import load_run
from search_spaces import build, data_kind
from train import configure_optimizer

# -----------------------------------------------------------------------------
out_dir = 'out/train'
format = 'onnx' # 'torch', 'safetensors', 'nanogpt', 'huggingface'
img_size = 0 # pixels a side of the images that it takes; 0: those it was trained on
# -----------------------------------------------------------------------------

TOLERANCE = 1e-4 # the largest difference of an output, relative to the largest output
EVERY_NETWORK = "take --format=safetensors, onnx or torch, which hold every network"
IN_GPT2 = {"gelu": "gelu_new", "exact_gelu": "gelu", "relu": "relu", "silu": "silu",
           "mish": "mish"} # our activation -> its name in transformers
# what the blocks may be; in n_kv_head and window 0 stands for all
CODE = {"residual": ("pre",), "n_expert": (0,)} # for modeling_gpt_kinds.py
GPT2 = CODE | {"norm": ("layernorm",), "position": ("learned", "sinusoidal"), "qk_norm": (False,),
               "n_kv_head": (0,), "window": (0,), "activation": tuple(IN_GPT2)}
NANOGPT = GPT2 | {"activation": ("exact_gelu", "gelu")} # for gelu see export_nanogpt()
LLAMA = CODE | {"norm": ("rmsnorm",), "position": ("rope",), "qk_norm": (False,), "window": (0,),
                "activation": ("swiglu",)}


class Outputs(nn.Module):
    """The network as x -> logits, without the loss; of a GPT the logits of all positions."""
    def __init__(self, net, tokens):
        super().__init__()
        self.net, self.tokens = net, tokens
        if tokens:
            net.config.loss_chunk = 0 # with chunks a GPT returns no logits

    def forward(self, x):
        targets = x if self.tokens else None # without targets a GPT returns only the last position
        return self.net(x, targets)[0]


def need_packages(format, *names):
    """SystemExit unless the packages that a format needs are installed."""
    try:
        for name in names:
            importlib.import_module(name)
    except ImportError as e:
        raise SystemExit(f"format={format} needs packages that are not installed ({e}): "
                         f"pip install {' '.join(names)}, or take another --format.") from None


def difference(found, expected):
    """The largest difference between outputs, relative to the largest output."""
    pairs = zip(found, expected, strict=True)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)

# -----------------------------------------------------------------------------
# Formats: each a function (Outputs, training config, batch x) -> ({path in out_dir: bytes}, run),
# where run(x) is what another program computes with these files.

def trace(net, trained, x):
    """The network as torch.export sees it, for any batch size and, of tokens, any length."""
    shape = {0: torch.export.Dim("batch")}
    if net.tokens and trained.block_size > 1:
        shape[1] = torch.export.Dim("time", max=trained.block_size)
    # strict: otherwise len(x) becomes a number, and the batch size is fixed
    return torch.export.export(net, (x,), dynamic_shapes=[shape], strict=True)


def export_torch(net, trained, x):
    file = io.BytesIO()
    torch.export.save(trace(net, trained, x), file)
    data = file.getvalue()
    return {"model.pt2": data}, torch.export.load(io.BytesIO(data)).module()


def export_onnx(net, trained, x):
    need_packages("onnx", "onnx", "onnxscript", "onnxruntime")
    import onnxruntime
    converted = torch.onnx.export(trace(net, trained, x), dynamo=True, input_names=["x"],
                                  output_names=["y"], verbose=False)
    data = converted.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return {"model.onnx": data}, lambda x: torch.from_numpy(session.run(["y"], {"x": x.numpy()})[0])


def export_safetensors(net, trained, x):
    need_packages("safetensors", "safetensors")
    from safetensors.torch import load, save
    once, tied, names = {}, {}, {} # names: address of a tensor -> its first name
    for name, w in net.net.state_dict().items():
        first = names.setdefault(w.data_ptr(), name)
        if first == name:
            once[name] = w.contiguous()
        else:
            tied[name] = first
    config = json.dumps(vars(trained))
    data = save(once, {"format": "pt", "config": config, "tied": json.dumps(tied)})

    other, state = build(json.loads(config), trained.arch), load(data)
    other.load_state_dict(state | {name: state[first] for name, first in tied.items()})
    return {"model.safetensors": data}, Outputs(other, net.tokens).eval()


def export_nanogpt(net, trained, x):
    net, c, E = net.net, net.net.config, net.net.n_embd[-1]
    check_blocks(net, "nanogpt", NANOGPT)
    n_head, widest, activation = common_heads(net), widest_mlp(net), layers_of(net)[0]["activation"]
    if not n_head:
        raise SystemExit("nanoGPT has n_embd / n_head channels in every head, and no n_head for "
                         f"n_embd={E} holds the layers' heads, {heads_text(net)}: take "
                         "--format=huggingface, which brings code for them.")
    if widest > 4 * E:
        raise SystemExit(f"nanoGPT's MLPs have 4 * n_embd = {4 * E} channels, and one of this "
                         f"network has {widest}: take --format=huggingface, which holds any width.")
    args = dict(n_layer=len(net.transformer.h), n_head=n_head, n_embd=E, block_size=c.block_size,
                bias=c.bias, vocab_size=c.vocab_size, dropout=c.dropout)
    twin = build(args | {"space": "gpt", "mlp_ratio": 4, "activation": activation})

    # nanoGPT's train.py asks for an optimizer: one that has made no step
    settings = SimpleNamespace(**vars(trained) | dict(weight_optimizer="adamw", zero_stage=0))
    optimizer = configure_optimizer(twin, settings, SimpleNamespace(device_type="cpu"))
    file = io.BytesIO()
    torch.save({"model": uniform_weights(net, n_head, 4 * E), "model_args": args,
                "optimizer": optimizer.state_dict(), "iter_num": 0, "best_val_loss": 1e9,
                "config": {"dataset": trained.dataset}}, file)
    data = file.getvalue()
    twin.load_state_dict(torch.load(io.BytesIO(data), weights_only=True)["model"])
    run = Outputs(twin, True).eval()
    if activation == "gelu":
        exact = build(vars(twin.config) | {"space": "gpt", "activation": "exact_gelu"})
        exact.load_state_dict(twin.state_dict())
        off = difference([Outputs(exact, True).eval()(x)], [run(x)])
        print(f"with nanoGPT's nn.GELU() the logits are within {off:.1e} of these, relative to the "
              "largest; they are the same with nn.GELU(approximate='tanh') in its model.py, or for "
              "a network trained with --activation=exact_gelu")
    return {"nanogpt/ckpt.pt": data}, run


def export_huggingface(net, trained, x):
    need_packages("huggingface", "safetensors", "transformers")
    import transformers
    from safetensors.torch import save
    net = net.net
    check_blocks(net, "huggingface", CODE)
    if not unknown(net, GPT2) and common_heads(net):
        config, state = as_gpt2(net)
    else:
        config, state = (as_llama if is_llama(net) else with_code)(net)
    c, has_code = net.config, "auto_map" in config
    config |= dict(vocab_size=c.vocab_size, bos_token_id=None, eos_token_id=None)
    state = {name: w.contiguous() for name, w in state.items()}
    files = {"config.json": json.dumps(config, indent=2).encode(),
             "model.safetensors": save(state, {"format": "pt"})}
    if has_code:
        path = Path(__file__).parent / "assets/modeling_gpt_kinds.py"
        files["modeling_gpt_kinds.py"] = path.read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            Path(folder, name).write_bytes(data)
        transformers.utils.logging.disable_progress_bar()
        load = transformers.AutoModelForCausalLM.from_pretrained
        model = load(folder, trust_remote_code=has_code) # the code is the file above
    return {f"huggingface/{name}": data for name, data in files.items()}, lambda x: model(x).logits


FORMATS = {"onnx": export_onnx, "torch": export_torch, "safetensors": export_safetensors,
           "nanogpt": export_nanogpt, "huggingface": export_huggingface}

# -----------------------------------------------------------------------------
# a GPT in the architectures of others: what they hold, and their config and weights

def layers_of(net):
    """What every layer is: [{"n_head", "head_size", "n_kv_head", "window", "n_hidden",
    "activation"}]. A window that reaches all tokens is 0."""
    layers, c = [], net.config
    for i, block in enumerate(net.transformer.h):
        names = "n_head", "n_kv_head", "window", "activation"
        layer = {name: net.options_in(name, i)[-1] for name in names}
        n_head, mlp = layer["n_head"], block.mlp.experts[0] if c.n_expert else block.mlp
        layers.append(layer | dict(
            head_size=net.head_size or net.n_embd[-1] // n_head, n_hidden=mlp.n_hidden[-1],
            n_kv_head=layer["n_kv_head"] or n_head, window=layer["window"] % c.block_size))
    return layers


def unknown(net, known):
    """{key: [its values in the network's layers]} of those that a format does not know, or of which
    it has only one."""
    layers, c = layers_of(net), net.config
    found = {name: [net.options_in(name)[-1]] for name in ("norm", "position", "qk_norm")}
    found |= {"residual": [net.options_in("residual")[-1]], "n_expert": [c.n_expert]}
    found |= {name: [layer[name] for layer in layers] for name in ("activation", "window")}
    found["n_kv_head"] = [layer["n_kv_head"] % layer["n_head"] for layer in layers]
    found = {name: sorted(set(found[name])) for name in known}
    return {name: values for name, values in found.items()
            if len(values) > 1 or values[0] not in known[name]}


def check_blocks(net, format, known):
    """SystemExit if the network's blocks are of a kind that a format does not know."""
    fix = "take --format=huggingface, safetensors, onnx or torch, which hold it"
    for name, values in unknown(net, known).items():
        raise SystemExit(f"{name}={' and '.join(map(repr, values))} has no place in "
                         f"format={format}, which knows {', '.join(map(repr, known[name]))}"
                         f"{', one in all layers' * (len(values) > 1)}: "
                         f"{EVERY_NETWORK if unknown(net, CODE) else fix}.")


def is_llama(net):
    """Llama's heads are the same in all layers, and in transformers their number divides n_embd."""
    heads = {(layer["n_head"], layer["n_kv_head"]) for layer in layers_of(net)}
    return not unknown(net, LLAMA) and len(heads) == 1 and net.n_embd[-1] % min(heads)[0] == 0


def widest_mlp(net):
    return max(layer["n_hidden"] for layer in layers_of(net))


def heads_of(net):
    """[(number of heads, channels of each)] of every layer."""
    return [(layer["n_head"], layer["head_size"]) for layer in layers_of(net)]


def heads_text(net):
    """Such as "1 of 16, 2 of 8"."""
    return ", ".join(f"{n} of {size}" for n, size in sorted(set(heads_of(net))))


def common_heads(net):
    """The largest n_head whose heads of n_embd / n_head channels hold those of every layer, or 0.

    Where every layer fills n_embd with its heads, it is their number if all layers have the same,
    and 0 if they differ.
    """
    E = net.n_embd[-1]
    most, largest = map(max, zip(*heads_of(net), strict=True)) # heads, channels
    return max((n for n in range(most, E // largest + 1) if E % n == 0), default=0)


def padded(w, *shape):
    """w at the beginning of zeros of that shape; further dimensions are w's."""
    larger = w.new_zeros(*shape, *w.shape[len(shape):])
    larger[tuple(slice(n) for n in w.shape)] = w
    return larger


def uniform_weights(net, n_head, n_hidden):
    """The state_dict of the same function with n_head heads (0: each layer's own) and MLPs of
    n_hidden channels in every layer.

    What is added is zero. Larger heads have a smaller scale, 1/sqrt(head size), so the queries
    become larger.
    """
    E, state = net.n_embd[-1], net.state_dict()
    state["transformer.wpe.weight"] = positions_of(net)
    for name, w in state.items():
        if ".h." not in name:
            continue
        n, size = heads_of(net)[int(name.split(".")[2])]
        N, larger = (n_head, E // n_head) if n_head else (n, size)
        if ".attn.c_attn." in name: # weight or bias
            w = padded(w.unflatten(0, (3, n, size)), 3, N, larger)
            w[0] *= (larger / size) ** 0.5
            state[name] = w.flatten(0, 2)
        elif name.endswith(".attn.c_proj.weight"):
            state[name] = padded(w.unflatten(1, (n, size)), E, N, larger).flatten(1)
        elif ".mlp.c_fc." in name:
            state[name] = padded(w, n_hidden)
        elif name.endswith(".mlp.c_proj.weight"):
            state[name] = padded(w, E, n_hidden)
    return dict(state)


def positions_of(net):
    """The table of learned positions, or that of sinusoidal ones."""
    table = net.transformer[net.tables[net.position[-1]]]
    return table(torch.arange(net.config.block_size))


def as_gpt2(net):
    """(config, state_dict) of a GPT-2 in transformers."""
    c, n_head, widest = net.config, common_heads(net), widest_mlp(net)
    config = dict(
        model_type="gpt2", architectures=["GPT2LMHeadModel"], n_positions=c.block_size,
        n_embd=net.n_embd[-1], n_layer=len(net.transformer.h), n_head=n_head, n_inner=widest,
        activation_function=IN_GPT2[layers_of(net)[0]["activation"]], resid_pdrop=c.dropout,
        embd_pdrop=c.dropout, attn_pdrop=c.dropout)
    state = uniform_weights(net, n_head, widest)
    del state["lm_head.weight"] # tied to wte
    for name, w in list(state.items()):
        if name.endswith(".weight") and "wte" not in name and "wpe" not in name:
            state.setdefault(name.replace("weight", "bias"), torch.zeros(len(w)))
            state[name] = w.T # GPT-2's Conv1D has the transpose; a norm stays
    return config, state


def as_llama(net):
    """(config, state_dict) of a Llama in transformers."""
    c, E, N, layer = net.config, net.n_embd[-1], widest_mlp(net), layers_of(net)[0]
    n, kv, size = (layer[name] for name in ("n_head", "n_kv_head", "head_size"))
    config = dict(
        model_type="llama", architectures=["LlamaForCausalLM"], hidden_size=E, intermediate_size=N,
        num_hidden_layers=len(net.transformer.h), num_attention_heads=n, num_key_value_heads=kv,
        head_dim=size, max_position_embeddings=c.block_size, rms_norm_eps=1e-5, rope_theta=10000.0,
        hidden_act="silu", attention_bias=c.bias, mlp_bias=c.bias, tie_word_embeddings=True)
    heads = torch.arange(n).view(-1, kv).T.flatten() # those that read key head 0, then 1, ...
    pairs = torch.arange(size).view(-1, 2).T.flatten() # the even channels, then the odd ones
    state = {"model.embed_tokens.weight": net.transformer.wte.weight,
             "model.norm.weight": net.transformer.ln_f.weight}
    for i, block in enumerate(net.transformer.h):
        found = {"input_layernorm.weight": block.ln_1.weight,
                 "post_attention_layernorm.weight": block.ln_2.weight}
        for kind, w in block.attn.c_attn.named_parameters(): # weight, bias
            q, k, v = (t.unflatten(0, (-1, size)) for t in w.split(block.attn.sizes))
            found |= {f"self_attn.q_proj.{kind}": q[heads][:, pairs].flatten(0, 1),
                      f"self_attn.k_proj.{kind}": k[:, pairs].flatten(0, 1),
                      f"self_attn.v_proj.{kind}": v.flatten(0, 1)}
        for kind, w in block.mlp.c_fc.named_parameters():
            gate, up = (padded(t, N) for t in w.chunk(2))
            found |= {f"mlp.gate_proj.{kind}": gate, f"mlp.up_proj.{kind}": up}
        by_head = block.attn.c_proj.weight.unflatten(1, (n, size))
        found["self_attn.o_proj.weight"] = by_head[:, heads].flatten(1)
        found["mlp.down_proj.weight"] = padded(block.mlp.c_proj.weight, E, N)
        if c.bias:
            found["self_attn.o_proj.bias"] = block.attn.c_proj.bias
            found["mlp.down_proj.bias"] = block.mlp.c_proj.bias
        state |= {f"model.layers.{i}.{name}": w for name, w in found.items()}
    return config, state


def with_code(net):
    """(config, state_dict) for modeling_gpt_kinds.py, whose tensors have our names."""
    c, code = net.config, "modeling_gpt_kinds"
    norm, position, qk_norm = (net.options_in(name)[-1] for name in ("norm", "position", "qk_norm"))
    E, state = net.n_embd[-1], dict(net.state_dict())
    del state["lm_head.weight"] # tied to wte
    if net.tables:
        position, state["transformer.wpe.weight"] = "learned", positions_of(net)
    config = dict(
        model_type="gpt_kinds", architectures=["GPTKindsForCausalLM"],
        auto_map={"AutoConfig": f"{code}.GPTKindsConfig",
                  "AutoModelForCausalLM": f"{code}.GPTKindsForCausalLM"},
        n_positions=c.block_size, n_embd=E, n_layer=len(net.transformer.h), blocks=layers_of(net),
        norm=norm, position=position, qk_norm=qk_norm, bias=c.bias,
        n_rms=max(1, int(c.prmsnorm_pct * E)) if norm == "partial_rmsnorm" else E)
    return config, state

# -----------------------------------------------------------------------------

GPT2_FILES = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/" # tiktoken's cache


def gpt2_json():
    """GPT-2's vocabulary as a Tokenizer of tokenizers, from the files that tiktoken keeps."""
    from tiktoken.load import read_file_cached
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    merges = read_file_cached(GPT2_FILES + "vocab.bpe").decode().split("\n")[1:-1]
    vocab = json.loads(read_file_cached(GPT2_FILES + "encoder.json"))
    found = Tokenizer(models.BPE(vocab, [tuple(merge.split(" ")) for merge in merges]))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    found.add_special_tokens(["<|endoftext|>"])
    return found


def char_json(chars):
    """A vocabulary of characters as a Tokenizer of tokenizers."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    found = Tokenizer(models.WordLevel({c: i for i, c in enumerate(chars)}))
    found.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    found.decoder = decoders.Fuse()
    return found


def tokenizer_files(trained):
    """{name: bytes} of the tokenizer of a network's data set. SystemExit if it cannot be had, or is
    not the one of the data set."""
    codec, meta = codec_of(trained), read_meta(trained.data_dir, trained.dataset, "text")
    folder = Path(trained.data_dir) / trained.dataset
    if meta["tokenizer"] == "sentencepiece":
        return {"tokenizer.model": read_tokenizer(folder, "tokenizer.model")}
    if meta["tokenizer"] in ("char", "gpt2"):
        found = char_json(meta["chars"]) if meta["chars"] else gpt2_json()
        found.encode_special_tokens = True # a text may speak of them
        text = meta["chars"] or Path(__file__).read_text(encoding="utf-8")
        own = list(codec.encode([text])[0])
        assert found.encode(text, add_special_tokens=False).ids == own, "another tokenizer"
        tokenizer = found.to_str().encode()
    else:
        tokenizer = read_tokenizer(folder, "tokenizer.json")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if meta["eot"] is not None:
        from tokenizers import Tokenizer
        config["eos_token"] = Tokenizer.from_str(tokenizer.decode()).id_to_token(meta["eot"])
    return {"tokenizer.json": tokenizer,
            "tokenizer_config.json": json.dumps(config, indent=2).encode()}


def example(trained, batch_size, time, img_size, generator):
    """A random batch of what the network takes. time: the length as a share of block_size."""
    if data_kind(trained.space) is Tokens:
        shape = batch_size, max(1, int(time * trained.block_size))
        return torch.randint(trained.vocab_size, shape, generator=generator)
    # networks for super-resolution have neither key
    side = img_size or getattr(trained, "img_size", 64)
    channels = getattr(trained, "in_channels", 3)
    return torch.randn(batch_size, channels, side, side, generator=generator)


@contextlib.contextmanager
def quiet():
    """Silences the warnings of PyTorch's exporters, which are about their own insides."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


@torch.no_grad()
def export(config):
    """Writes what config (a dict) asks for.

    Returns its path and the largest difference of its outputs, relative to the largest output.
    """
    config = SimpleNamespace(**config)
    check_limits(config, {"img_size": at_least(0), "format": one_of(*FORMATS)})
    use_fused_ops(False) # no other program knows their operations
    net, trained = load_run(config.out_dir, "cpu")
    tokens = data_kind(trained.space) is Tokens
    if tokens and config.img_size:
        raise SystemExit(f"img_size={config.img_size} is for images, and a GPT has none: "
                         "leave it out.")
    if config.format in ("nanogpt", "huggingface") and not tokens:
        raise SystemExit(f"format={config.format} is for a GPT, and this network is one of "
                         f"{trained.space}: {EVERY_NETWORK}.")
    net, generator = Outputs(net, tokens).eval(), rng("export")
    shapes = ((2, 1.0), (3, 0.5), (1, 1.0)) # batch size, time
    batches = [example(trained, *shape, config.img_size, generator) for shape in shapes]
    try:
        expected = [net(x) for x in batches]
    except (AssertionError, RuntimeError):
        raise SystemExit(f"This network of {trained.space} takes no images of {config.img_size} "
                         "pixels: leave out --img_size.") from None
    n_params = sum(p.numel() for p in net.parameters())
    print(f"exporting {n_params:,} parameters, which takes some seconds ...", flush=True)
    try:
        with quiet():
            files, run = FORMATS[config.format](net, trained, batches[0])
        found = [run(x) for x in batches]
    except Exception as e: # these exporters raise whatever they meet
        reason = (str(e).strip() or "no message").splitlines()[0]
        raise SystemExit(f"This network of {trained.space} cannot be exported with "
                         f"format={config.format} ({type(e).__name__}: {reason}): "
                         "try another --format.") from None
    path = os.path.join(config.out_dir, os.path.commonpath(list(files)))
    off = difference(found, expected)
    if not off <= TOLERANCE: # also nan
        raise SystemExit(f"{path} was not written: its outputs would differ from the network's by "
                         f"{off:.1e} of the largest, and {TOLERANCE} is allowed: "
                         "try another --format.")
    size = sum(map(len, files.values())) / 1e6
    if tokens:
        try:
            inside = "huggingface/" if config.format == "huggingface" else ""
            files |= {inside + name: data for name, data in tokenizer_files(trained).items()}
        except SystemExit as e: # the data set is gone, the network is not
            print(f"without a tokenizer: {e}")
    for name, data in files.items():
        save(os.path.join(config.out_dir, name), data)
    print(f"{path}: {size:,.2f} MB, outputs within {off:.1e} of the network's, relative to the "
          f"largest, on {len(batches)} random batches")
    return path, off


def save(path, data):
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
    except OSError as e:
        raise SystemExit(f"The folder of {path} cannot be made ({e.strerror}): make room for it in "
                         "out_dir.") from None
    atomic_write(path, lambda f: f.write(data))


if __name__ == "__main__":
    export(configure(globals()))
