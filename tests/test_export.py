"""A file of export.py gives the outputs of the network, at any batch size, or is not written."""
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch
from conftest import TINY_SPACES, fails, turn_kernels_on
from test_train import train_config
from test_vision import search_config, space_config

import export
import sample
import train
from optim_nas import uniform
from prepare import rng
from train import build

SPACES = ("gpt", *TINY_SPACES)


@pytest.fixture(scope="module")
def trained(data_dir, digits_dir, tmp_path_factory):
    """{space: the out_dir of a training in it}, each made at first use."""
    folder, made = tmp_path_factory.mktemp("trained"), {}

    def make(space):
        out = folder / space
        if space not in made and space == "gpt":
            train.train(train_config(data_dir, out, n_layer=2, n_head=2, n_embd=8))
        elif space not in made:
            arch = uniform(build(search_config(space, digits_dir, "") | dict(img_size=8, in_channels=1, num_classes=10)).choices, rng(1))
            train.train(space_config(train, space, digits_dir, out, **{"n_layer": 1} if space == "darts" else {}), arch)
        made[space] = out
        return out
    return make


def options(out, format="onnx", **rest):
    return dict(out_dir=str(out), format=format, img_size=0) | rest


def load(path):
    """A file as another program loads it, as a function."""
    if path.endswith(".pt2"):
        return torch.export.load(path).module()
    session = onnxruntime.InferenceSession(path)
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def outputs(net, space, x):
    with torch.no_grad():
        return net(x, x if space == "gpt" else None)[0]


@pytest.mark.parametrize("format", export.FORMATS)
@pytest.mark.parametrize("space", SPACES)
def test_a_file_computes_what_the_network_does(space, format, trained, capsys):
    out = trained(space)
    path, difference = export.export(options(out, format))
    said, size = capsys.readouterr().out, Path(path).stat().st_size
    assert difference <= 1e-4 and f"{size / 1e6:,.2f} MB" in said and f"{difference:.1e}" in said and not list(out.glob("*.tmp"))
    net, config = sample.load_run(str(out), "cpu")
    file = load(path)
    for batch_size in (1, 5, 8):
        shape = (batch_size, 3 + batch_size) if space == "gpt" else (batch_size, 1, 8, 8)
        x = torch.randint(config.vocab_size, shape, generator=rng(2)) if space == "gpt" else torch.randn(shape, generator=rng(2))
        y = outputs(net, space, x)
        assert y.shape == ((*shape, config.vocab_size) if space == "gpt" else (batch_size, 10))
        assert (file(x) - y).abs().max() <= 1e-4 * y.abs().max()


@pytest.mark.parametrize("change", [dict(norm="rmsnorm", position="rope", activation="swiglu", residual="parallel",
                                         n_expert=3),
                                    dict(norm="partial_rmsnorm", position="sinusoidal", activation="mish", residual="post", loss_chunk=7,
                                         head_size=3)])
def test_the_options_of_a_gpt_export(change, data_dir, tmp_path):
    train.train(train_config(data_dir, tmp_path, n_layer=2, n_head=2, n_embd=8, **change))
    path, _ = export.export(options(tmp_path))
    net, config = sample.load_run(str(tmp_path), "cpu")
    net.config.loss_chunk = 0
    x = torch.randint(config.vocab_size, (3, 11), generator=rng(2))
    assert (load(path)(x) - outputs(net, "gpt", x)).abs().max() <= 1e-4 * outputs(net, "gpt", x).abs().max()


def test_no_operation_of_ours_is_in_the_file(trained):
    """Where the kernels of fused_ops.cpp were in use before."""
    turn_kernels_on()
    path, _ = export.export(options(trained("toy_cell"), "torch"))
    operations = {str(node.target) for node in torch.export.load(path).graph.nodes if node.op == "call_function"}
    assert any("conv2d" in name for name in operations) and not any("nas" in name for name in operations), operations


@pytest.mark.parametrize("change, words", [(lambda y: y * (1 + 3e-4), "3.0e-04"), (lambda y: y * torch.nan, "nan")])
def test_a_file_that_differs_is_not_written(change, words, trained, monkeypatch):
    out = trained("nb201")
    (out / "model.onnx").write_bytes(b"of before")
    monkeypatch.setitem(export.FORMATS, "onnx", (lambda program: (b"other", lambda x: change(program.module()(x))), "model.onnx"))
    with pytest.raises(SystemExit, match=f"model.onnx was not written.*{words}"):
        export.export(options(out))
    assert (out / "model.onnx").read_bytes() == b"of before"


def test_what_cannot_be_exported_is_one_sentence(trained, monkeypatch):
    def fails(program):
        raise RuntimeError("no operator for this\nand a page of advice")
    monkeypatch.setitem(export.FORMATS, "torch", (fails, "model.pt2"))
    with pytest.raises(SystemExit, match=r"nb201 cannot be exported with format=torch \(RuntimeError: no operator for this\).$"):
        export.export(options(trained("nb201"), "torch"))


def test_other_sizes_of_images(trained):
    """Where a network takes them."""
    out = trained("nats_size")
    path, _ = export.export(options(out, "torch", img_size=16))
    x = torch.randn(2, 1, 16, 16, generator=rng(3))
    y = outputs(sample.load_run(str(out), "cpu")[0], "nats_size", x)
    assert (load(path)(x) - y).abs().max() <= 1e-4 * y.abs().max()


def test_mistakes_are_one_sentence(trained, tmp_path, monkeypatch):
    out = trained("nb201")
    assert "no checkpoint" in fails("export.py", f"--out_dir={tmp_path}")
    with pytest.raises(SystemExit, match="format='caffe' is not one of onnx, torch"):
        export.export(options(out, "caffe"))
    with pytest.raises(SystemExit, match="toy_conv_macro takes no images of 16 pixels"):
        export.export(options(trained("toy_conv_macro"), img_size=16))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(SystemExit, match=r"onnxruntime.*pip install onnx"):
        export.export(options(out))
