"""
Exports a trained network as one file for other programs, written only if it computes what the network computes.

    python export.py --out_dir=out/base                         # model.onnx, for ONNX Runtime and many others
    python export.py --out_dir=out/base --format=torch          # model.pt2, for torch.export.load(path).module()(x)

Takes out_dir's best.pt, the weights of the lowest validation loss, of any space, and writes the file into out_dir. Its only input, x, is
    images     float32 (batch, channels, img_size, img_size), as prepare.get_images() gives them: (pixel - mean) / std of meta.json
    tokens     int64 (batch, time), for a GPT
and its only output, y, the logits: (batch, num_classes), or (batch, time, vocab_size), or for super-resolution the larger image. The
batch may have any size, and time up to block_size; images have the size that they are exported with.

A .pt2 file has pickles in it, which may run code when they are loaded: load those alone that you made yourself. ONNX files hold none.
"""
import contextlib
import io
import logging
import os
import warnings
from types import SimpleNamespace

import torch
import torch.nn as nn

from prepare import rng, write
from sample import load_run
from supernet import use_fused_ops

# -----------------------------------------------------------------------------
out_dir = 'out/train'
format = 'onnx' # 'torch'
img_size = 0 # pixels a side of the images that it takes; 0: those it was trained on
# -----------------------------------------------------------------------------

TOLERANCE = 1e-4 # how far the outputs of a file may be from the network's, relative to the largest


class Outputs(nn.Module):
    """The network as x -> logits, without the loss; of a GPT those of all positions, which it gives where there are targets."""
    def __init__(self, net, tokens):
        super().__init__()
        self.net, self.tokens = net, tokens
        if tokens:
            net.config.loss_chunk = 0 # with which there are no logits

    def forward(self, x):
        return self.net(x, x if self.tokens else None)[0]


def export_torch(program):
    """(the bytes of a .pt2 file, what it computes as a function)"""
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue(), torch.export.load(io.BytesIO(file.getvalue())).module()


def export_onnx(program):
    """(the bytes of an .onnx file, what ONNX Runtime computes with it as a function)"""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (torch.onnx imports it)
    except ImportError as e:
        raise SystemExit(f"format=onnx needs packages of its own ({e}): pip install onnx onnxscript onnxruntime, or take --format=torch.") \
            from None
    converted = torch.onnx.export(program, dynamo=True, input_names=["x"], output_names=["y"], verbose=False)
    data = converted.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return data, lambda x: torch.from_numpy(session.run(["y"], {"x": x.numpy()})[0])


FORMATS = {"onnx": (export_onnx, "model.onnx"), "torch": (export_torch, "model.pt2")}


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
    """Writes the file of config (a dict); returns its path and the largest difference, relative to the largest output."""
    config = SimpleNamespace(**config)
    if config.format not in FORMATS:
        raise SystemExit(f"format='{config.format}' is not one of {', '.join(FORMATS)}.")
    use_fused_ops(False) # whose operations no other program knows
    net, trained = load_run(config.out_dir, "cpu")
    tokens = trained.space == "gpt"
    net, generator = Outputs(net, tokens).eval(), rng("export")
    x, *others = (example(trained, *shape, config.img_size, generator) for shape in ((2, 1.0), (3, 0.5), (1, 1.0)))
    function, name = FORMATS[config.format]
    dim = torch.export.Dim
    shapes = [{0: dim("batch")} | ({1: dim("time", max=trained.block_size)} if tokens and trained.block_size > 1 else {})]
    try:
        expected = [net(other) for other in (x, *others)]
    except (AssertionError, RuntimeError):
        raise SystemExit(f"This network of {trained.space} takes no images of {config.img_size} pixels: leave out --img_size.") from None
    path = os.path.join(config.out_dir, name)
    print(f"exporting {sum(p.numel() for p in net.parameters()):,} parameters, which takes some seconds ...", flush=True)
    try:
        with quiet(): # strict: else len(x) is a number, and the batch keeps its size
            data, run = function(torch.export.export(net, (x,), dynamic_shapes=shapes, strict=True))
        found = [run(other) for other in (x, *others)]
    except Exception as e: # these exporters raise whatever they meet
        raise SystemExit(f"This network of {trained.space} cannot be exported with format={config.format} ({type(e).__name__}: "
                         f"{str(e).strip().splitlines()[0] if str(e).strip() else ''}).") from None
    difference = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True))
    if not difference <= TOLERANCE: # nan
        raise SystemExit(f"{path} was not written: its outputs would differ from the network's by {difference:.1e} of the largest, and "
                         f"{TOLERANCE} is allowed: try the other --format.")
    write(path, lambda f: f.write(data))
    print(f"{path}: {len(data) / 1e6:,.2f} MB, outputs within {difference:.1e} of the network's, relative to the largest, on "
          f"{1 + len(others)} random batches")
    return path, difference


if __name__ == "__main__":
    from configurator import configure
    export(configure(globals()))
