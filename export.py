"""
Exports a trained network for other programs, written only if what was written computes what the network computes.

    python export.py --out_dir=out/base                         # model.onnx, for ONNX Runtime and many others
    python export.py --out_dir=out/base --format=torch          # model.pt2, for torch.export.load(path).module()(x)
    python export.py --out_dir=out/base --format=safetensors    # model.safetensors, the weights under our names
    python export.py --out_dir=out/base --format=nanogpt        # nanogpt/ckpt.pt, a GPT for nanoGPT's --init_from=resume
    python export.py --out_dir=out/base --format=huggingface    # huggingface/, a GPT for transformers' from_pretrained()

Takes out_dir's best.pt, the best weights in validation, and writes into out_dir.

The only input of model.onnx and model.pt2, x, is
    images     float32 (batch, channels, img_size, img_size), as prepare.get_images() gives them: (pixel - mean) / std of meta.json
    tokens     int64 (batch, time), for a GPT
and their only output, y, the logits: (batch, num_classes), or (batch, time, vocab_size), or for super-resolution the larger image. The
batch may have any size, and time up to block_size; images have the size that they are exported with.

model.safetensors holds every tensor once. Its metadata, in JSON: "config", the training's keys with the architecture as "arch", so that
train.build(config, config["arch"]) is the network; "tied", {name: the tensor that it is too}.

nanoGPT and GPT-2 have the same width in every MLP and the same heads in every layer: what is narrower gets zeros, which change nothing,
and fixed sinusoidal positions are what the learned ones were. nanoGPT's nn.GELU() is activation=exact_gelu; GPT-2's, our gelu, approximates
it by tanh, and how much that alone moves the logits is printed. Where GPT-2 cannot hold a network because its layers attend differently,
modeling_gpt2_heads.py comes with the weights, and AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True) loads both.

No format holds the tokenizer. Ids are those of the data set: GPT-2's with tokenizer=gpt2, positions in "chars" of its meta.json with char,
those of its tokenizer.model with sentencepiece; ids from meta.json's vocab_size on only fill the vocabulary up to a round number.

A .pt2 file has pickles in it, which may run code when they are loaded: load those alone that you made yourself. The others hold none, or
only what torch.load(path, weights_only=True) reads.
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

from configurator import check_range
from fused_ops import use_fused_ops
from run import rng, atomic_write
from sample import load_run
from search_spaces import build
from train import configure_optimizer

# -----------------------------------------------------------------------------
out_dir = 'out/train'
format = 'onnx' # 'torch', 'safetensors', 'nanogpt', 'huggingface'
img_size = 0 # pixels a side of the images that it takes; 0: those it was trained on
# -----------------------------------------------------------------------------

TOLERANCE = 1e-4 # how far the outputs of a file may be from the network's, relative to the largest
NANOGPT = ("exact_gelu", "gelu") # the activations that it has; of the second see export_nanogpt()
GPT2 = {"gelu": "gelu_new", "exact_gelu": "gelu", "relu": "relu", "silu": "silu", "mish": "mish"} # transformers' and its names
OTHERS = "take --format=safetensors, onnx or torch, which hold every network"


class Outputs(nn.Module):
    """The network as x -> logits, without the loss; of a GPT those of all positions, which it gives where there are targets."""
    def __init__(self, net, tokens):
        super().__init__()
        self.net, self.tokens = net, tokens
        if tokens:
            net.config.loss_chunk = 0 # with which there are no logits

    def forward(self, x):
        return self.net(x, x if self.tokens else None)[0]


def packages(format, *names):
    """SystemExit unless what a format needs is installed."""
    try:
        for name in names:
            importlib.import_module(name)
    except ImportError as e:
        raise SystemExit(f"format={format} needs packages of its own ({e}): pip install {' '.join(names)}, or take another --format.") \
            from None


def difference(found, expected):
    """The largest of any output, relative to the largest output."""
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True))

# -----------------------------------------------------------------------------
# formats: (Outputs, training config, batch) -> ({path in out_dir: bytes}, what another program computes with them, as a function of x)

def trace(net, trained, x):
    """The network as torch.export sees it."""
    dim = torch.export.Dim
    shapes = [{0: dim("batch")} | ({1: dim("time", max=trained.block_size)} if net.tokens and trained.block_size > 1 else {})]
    return torch.export.export(net, (x,), dynamic_shapes=shapes, strict=True) # strict: else len(x) is a number, and the batch fixed


def export_torch(net, trained, x):
    file = io.BytesIO()
    torch.export.save(trace(net, trained, x), file)
    return {"model.pt2": file.getvalue()}, torch.export.load(io.BytesIO(file.getvalue())).module()


def export_onnx(net, trained, x):
    packages("onnx", "onnx", "onnxscript", "onnxruntime")
    import onnxruntime
    converted = torch.onnx.export(trace(net, trained, x), dynamo=True, input_names=["x"], output_names=["y"], verbose=False)
    data = converted.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return {"model.onnx": data}, lambda x: torch.from_numpy(session.run(["y"], {"x": x.numpy()})[0])


def export_safetensors(net, trained, x):
    packages("safetensors", "safetensors")
    from safetensors.torch import load, save
    state, config, first, tied = net.net.state_dict(), json.dumps(vars(trained)), {}, {}
    for name, w in state.items():
        if first.setdefault(w.data_ptr(), name) != name:
            tied[name] = first[w.data_ptr()]
    once = {name: w.contiguous() for name, w in state.items() if name not in tied}
    data = save(once, {"format": "pt", "config": config, "tied": json.dumps(tied)})
    other, state = build(json.loads(config), trained.arch), load(data)
    other.load_state_dict(state | {name: state[same] for name, same in tied.items()})
    return {"model.safetensors": data}, Outputs(other, net.tokens).eval()


def export_nanogpt(net, trained, x):
    net, c, E = net.net, net.net.config, net.net.n_embd[-1]
    check_gpt2(c, "nanogpt", NANOGPT)
    n_head, widest = common_heads(net), max(block.mlp.n_hidden[-1] for block in net.transformer.h)
    if not n_head:
        raise SystemExit(f"nanoGPT has n_embd / n_head channels in every head, and no n_head for n_embd={E} holds the layers' heads, "
                         f"{said(net)}: take --format=huggingface, which brings code for them.")
    if widest > 4 * E:
        raise SystemExit(f"nanoGPT's MLPs have 4 * n_embd = {4 * E} channels, and one of this network has {widest}: take "
                         "--format=huggingface, which holds any width.")
    args = dict(n_layer=len(net.transformer.h), n_head=n_head, n_embd=E, block_size=c.block_size, bias=c.bias, vocab_size=c.vocab_size,
                dropout=c.dropout)
    twin = build(args | {"space": "gpt", "mlp_ratio": 4, "activation": c.activation})
    optimizer = configure_optimizer(twin, SimpleNamespace(**vars(trained) | dict(weight_optimizer="adamw", zero_stage=0)),
                                    SimpleNamespace(device_type="cpu")) # which has not made a step; its train.py asks for one
    file = io.BytesIO()
    torch.save({"model": alike(net, n_head, 4 * E), "model_args": args, "optimizer": optimizer.state_dict(), "iter_num": 0,
                "best_val_loss": 1e9, "config": {"dataset": trained.dataset}}, file)
    twin.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True)["model"])
    run = Outputs(twin, True).eval()
    if c.activation == "gelu":
        exact = build(vars(twin.config) | {"space": "gpt", "activation": "exact_gelu"})
        exact.load_state_dict(twin.state_dict())
        print(f"with nanoGPT's nn.GELU() the logits are within {difference([Outputs(exact, True).eval()(x)], [run(x)]):.1e} of these, "
              "relative to the largest; with nn.GELU(approximate='tanh') in its model.py they are these, and a network trained with "
              "--activation=exact_gelu has them as it is")
    return {"nanogpt/ckpt.pt": file.getvalue()}, run


def export_huggingface(net, trained, x):
    packages("huggingface", "safetensors", "transformers")
    import transformers
    from safetensors.torch import save
    net, c, heads = net.net, net.net.config, heads_of(net.net)
    check_gpt2(c, "huggingface", GPT2)
    n_head, widest = common_heads(net), max(block.mlp.n_hidden[-1] for block in net.transformer.h)
    config = dict(model_type="gpt2", architectures=["GPT2LMHeadModel"], vocab_size=c.vocab_size, n_positions=c.block_size,
                  n_embd=net.n_embd[-1], n_layer=len(heads), n_head=n_head, n_inner=widest, activation_function=GPT2[c.activation],
                  resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=c.dropout, bos_token_id=None, eos_token_id=None)
    if not n_head:
        config |= dict(model_type="gpt2_heads", architectures=["GPT2HeadsLMHeadModel"], n_head=1, heads=heads, auto_map={
            "AutoConfig": "modeling_gpt2_heads.GPT2HeadsConfig", "AutoModelForCausalLM": "modeling_gpt2_heads.GPT2HeadsLMHeadModel"})
    state = alike(net, n_head, widest)
    del state["lm_head.weight"] # which is wte's
    for name, w in list(state.items()):
        if name.endswith(".weight") and "wte" not in name and "wpe" not in name:
            state.setdefault(name.replace("weight", "bias"), torch.zeros(len(w)))
            state[name] = w.T.contiguous() # a Conv1D, or a norm
    files = {"config.json": json.dumps(config, indent=2).encode(), "model.safetensors": save(state, {"format": "pt"})}
    if not n_head:
        files["modeling_gpt2_heads.py"] = (Path(__file__).parent / "assets/modeling_gpt2_heads.py").read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            Path(folder, name).write_bytes(data)
        transformers.utils.logging.disable_progress_bar()
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=not n_head) # code of ours
    return {f"huggingface/{name}": data for name, data in files.items()}, lambda x: model(x).logits


FORMATS = {"onnx": export_onnx, "torch": export_torch, "safetensors": export_safetensors, "nanogpt": export_nanogpt,
           "huggingface": export_huggingface}

# -----------------------------------------------------------------------------
# a GPT as GPT-2's architecture has it

def check_gpt2(config, format, activations):
    """SystemExit if a network's blocks are of a kind that a format does not know."""
    known = dict(norm=["layernorm"], position=["learned", "sinusoidal"], activation=list(activations), residual=["pre"], n_expert=[0])
    for name, values in known.items():
        if (value := getattr(config, name)) not in values:
            raise SystemExit(f"{name}={value!r} has no place in format={format}, which knows {', '.join(map(repr, values))}: {OTHERS}.")


def heads_of(net):
    """[(number, channels of each)] of every layer."""
    layers = [block.attn for block in net.transformer.h]
    return [(attn.n_head[-1], attn.head_size or attn.n_embd[-1] // attn.n_head[-1]) for attn in layers]


def said(net):
    return ", ".join(f"{n} of {size}" for n, size in sorted(set(heads_of(net))))


def common_heads(net):
    """The largest n_head of n_embd / n_head channels each that holds the heads of every layer, or 0. With n_head heads of
    n_embd / n_head channels, which fill n_embd, in every layer, that is the same number in all, or none."""
    E, heads = net.n_embd[-1], heads_of(net)
    most, largest = map(max, zip(*heads, strict=True))
    return max((n for n in range(most, E // largest + 1) if E % n == 0), default=0)


def padded(w, *shape):
    """w at the beginning of zeros; dimensions beyond the shape are w's."""
    larger = w.new_zeros(*shape, *w.shape[len(shape):])
    larger[tuple(slice(n) for n in w.shape)] = w
    return larger


def alike(net, n_head, n_hidden):
    """The weights of the same function with n_head heads (0: its own) and MLPs of n_hidden channels in every layer. What is new are zeros;
    the queries outweigh the larger heads' smaller 1/sqrt of their size."""
    E, state = net.n_embd[-1], net.state_dict()
    state["transformer.wpe.weight"] = net.transformer.wpe(torch.arange(net.config.block_size)) # of sinusoidal ones the table
    for name, w in state.items():
        n, size = heads_of(net)[int(name.split(".")[2])] if ".h." in name else (0, 0)
        N, larger = (n_head, E // n_head) if n_head else (n, size)
        if ".attn.c_attn." in name: # the weight or the bias
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

# -----------------------------------------------------------------------------

def example(trained, batch_size, time, img_size, generator):
    """A random batch of what the network takes; time: the share of the longest sequence."""
    if trained.space == "gpt":
        return torch.randint(trained.vocab_size, (batch_size, max(1, int(time * trained.block_size))), generator=generator)
    side = img_size or getattr(trained, "img_size", 64) # of super-resolution there is none
    return torch.randn(batch_size, getattr(trained, "in_channels", 3), side, side, generator=generator)


@contextlib.contextmanager
def quiet():
    """Without what the exporters have to say about their own parts."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


@torch.no_grad()
def export(config):
    """Writes what config (a dict) asks for; returns its path and the largest difference, relative to the largest output."""
    config = SimpleNamespace(**config)
    check_range(config, 0, "img_size")
    if config.format not in FORMATS:
        raise SystemExit(f"format='{config.format}' is not one of {', '.join(FORMATS)}.")
    use_fused_ops(False) # whose operations no other program knows
    net, trained = load_run(config.out_dir, "cpu")
    tokens = trained.space == "gpt"
    if tokens and config.img_size:
        raise SystemExit(f"img_size={config.img_size} is for images, and a GPT has none: leave it out.")
    if config.format in ("nanogpt", "huggingface") and not tokens:
        raise SystemExit(f"format={config.format} is for a GPT, and this network is one of {trained.space}: {OTHERS}.")
    net, generator = Outputs(net, tokens).eval(), rng("export")
    x, *others = (example(trained, *shape, config.img_size, generator) for shape in ((2, 1.0), (3, 0.5), (1, 1.0)))
    try:
        expected = [net(other) for other in (x, *others)]
    except (AssertionError, RuntimeError):
        raise SystemExit(f"This network of {trained.space} takes no images of {config.img_size} pixels: leave out --img_size.") from None
    print(f"exporting {sum(p.numel() for p in net.parameters()):,} parameters, which takes some seconds ...", flush=True)
    try:
        with quiet():
            files, run = FORMATS[config.format](net, trained, x)
        found = [run(other) for other in (x, *others)]
    except Exception as e: # these exporters raise whatever they meet
        raise SystemExit(f"This network of {trained.space} cannot be exported with format={config.format} ({type(e).__name__}: "
                         f"{str(e).strip().splitlines()[0] if str(e).strip() else ''}).") from None
    path, off = os.path.join(config.out_dir, os.path.commonpath(list(files))), difference(found, expected)
    if not off <= TOLERANCE: # nan
        raise SystemExit(f"{path} was not written: its outputs would differ from the network's by {off:.1e} of the largest, and "
                         f"{TOLERANCE} is allowed: try another --format.")
    for name, data in files.items():
        save(os.path.join(config.out_dir, name), data)
    print(f"{path}: {sum(map(len, files.values())) / 1e6:,.2f} MB, outputs within {off:.1e} of the network's, relative to the largest, on "
          f"{1 + len(others)} random batches")
    return path, off


def save(path, data):
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
    except OSError as e:
        raise SystemExit(f"The folder of {path} cannot be made ({e.strerror}): make room for it in out_dir.") from None
    atomic_write(path, lambda f: f.write(data))


if __name__ == "__main__":
    from configurator import configure
    export(configure(globals()))
