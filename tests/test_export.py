"""What export.py writes gives the outputs of the network, at any batch size, or is not written."""
import json
import math
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import onnxruntime
import pytest
import sentencepiece
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import TINY_SPACES, turn_kernels_on
from safetensors import safe_open
from test_train import train_config
from test_vision import search_config, space_config

import data
import export
import sample
import train
from optim_nas import uniform
from prepare import prepare
from run import rng
from search_spaces import build
import run as runs

SPACES = ("gpt", *TINY_SPACES)
# test_other_sizes_of_images and test_no_operation_of_ours_is_in_the_file trace the other two
TRACED = [(space, "onnx") for space in SPACES if space not in ("nats_size", "toy_cell")]
TRACED += [("gpt", "torch")]
# a GPT whose layers are of kinds that neither GPT-2 nor Llama knows
KINDS = dict(n_layer=2, n_embd=[8, 16], n_head=[2, 4], mlp_ratio=[1, 2], head_size=6,
             norm=["layernorm", "rmsnorm"], position=["learned", "rope"], qk_norm=[False, True],
             activation=["relu2", "swiglu"], n_kv_head=[1, 2, 0], window=[3, 0])
KINDS_ARCH = dict(n_layer=2, n_embd=16, n_head=[4, 2], mlp_ratio=[1, 2], norm="rmsnorm",
                  position="rope", qk_norm=True, activation=["swiglu", "relu2"], n_kv_head=[2, 1],
                  window=[3, 0])


@pytest.fixture(scope="module")
def trained(data_dir, digits_dir, tmp_path_factory):
    """{space: the out_dir of a training in it}, each made at first use."""
    folder, made = tmp_path_factory.mktemp("trained"), {}

    def make(space):
        out = folder / space
        if space not in made and space == "gpt":
            train.train(train_config(data_dir, out, n_layer=2, n_head=2, n_embd=8))
        elif space not in made:
            facts = dict(img_size=8, in_channels=1, num_classes=10)
            arch = uniform(build(search_config(space, digits_dir, "") | facts).choices, rng(1))
            change = {"darts": {"n_layer": 1}, "swinir": {"val_portion": 0.1}}.get(space, {})
            train.train(space_config(train, space, digits_dir, out, **change), arch)
        made[space] = out
        return out
    return make


def options(out, format="onnx", **rest):
    return dict(out_dir=str(out), format=format, img_size=0) | rest


def load(path):
    """A file as another program loads it, as a function."""
    if path.endswith(".pt2"):
        return torch.export.load(path).module()
    if path.endswith(".safetensors"):
        with safe_open(path, "pt") as f:
            config, tied = (json.loads(f.metadata()[key]) for key in ("config", "tied"))
            state = {name: f.get_tensor(name) for name in f.keys()}
        net = build(config, config["arch"])
        net.load_state_dict(state | {name: state[same] for name, same in tied.items()})
        return lambda x: outputs(net.eval(), config["space"], x)
    session = onnxruntime.InferenceSession(path)
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def saved(out, arch=None, **sizes):
    """(A GPT, its config): its random weights and biases are far from zero, and are in out as if it
    had been trained there."""
    default = dict(n_layer=2, n_head=2, n_embd=8, vocab_size=17, bias=True, data_dir="data")
    config = train_config(out_dir=out, **default | sizes)
    net, generator = build(config, arch).eval(), rng("weights")
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(0, 0.4, generator=generator)
    runs.save(SimpleNamespace(**config), SimpleNamespace(master=True), "best.pt", net, arch=arch)
    net.config.loss_chunk = 0
    return net, config


def assert_same(file, net, config):
    """At batches and lengths that export.py does not try."""
    for shape in ((3, 11), (1, 1), (5, config["block_size"])):
        x = torch.randint(config["vocab_size"], shape, generator=rng(2))
        y = outputs(net, "gpt", x)
        assert (file(x) - y).abs().max() <= 1e-4 * y.abs().max()


def outputs(net, space, x):
    with torch.no_grad():
        return net(x, x if space == "gpt" else None)[0]


@pytest.mark.parametrize("space, format", TRACED + [(space, "safetensors") for space in SPACES])
def test_a_file_computes_what_the_network_does(space, format, trained, capsys):
    out = trained(space)
    path, difference = export.export(options(out, format, img_size=8 if space == "swinir" else 0))
    said, size = capsys.readouterr().out, Path(path).stat().st_size
    assert difference <= 1e-4 and not list(out.glob("*.tmp"))
    assert f"{size / 1e6:,.2f} MB" in said and f"{difference:.1e}" in said
    net, config = sample.load_run(str(out), "cpu")
    file = load(path)
    for batch_size in (1, 5, 8):
        if space == "gpt":
            shape = batch_size, 3 + batch_size
            x = torch.randint(config.vocab_size, shape, generator=rng(2))
            expected = *shape, config.vocab_size
        else:
            x = torch.randn(batch_size, 3 if space == "swinir" else 1, 8, 8, generator=rng(2))
            expected = (batch_size, 3, 16, 16) if space == "swinir" else (batch_size, 10)
        y = outputs(net, space, x)
        assert y.shape == expected
        assert (file(x) - y).abs().max() <= 1e-4 * y.abs().max()


@pytest.mark.parametrize("format, change", [
    ("onnx", dict(norm="rmsnorm", position="rope", activation="swiglu", residual="parallel",
                  n_expert=3)),
    ("torch", dict(norm="partial_rmsnorm", position="sinusoidal", activation="mish",
                   residual="post", loss_chunk=7, head_size=3))])
def test_the_options_of_a_gpt_export(format, change, tmp_path):
    net, config = saved(tmp_path, n_layer=1, **change)
    path, _ = export.export(options(tmp_path, format))
    assert_same(load(path), net, config)


@pytest.mark.parametrize("format", ["onnx", "torch", "safetensors"])
def test_layers_of_other_kinds_export(format, tmp_path):
    net, config = saved(tmp_path, KINDS_ARCH, **KINDS)
    path, _ = export.export(options(tmp_path, format))
    assert_same(load(path), net, config)


def test_no_operation_of_ours_is_in_the_file(trained):
    """Where the kernels of fused_ops.cpp were in use before."""
    turn_kernels_on()
    path, _ = export.export(options(trained("toy_cell"), "torch"))
    nodes = torch.export.load(path).graph.nodes
    operations = " ".join(str(node.target) for node in nodes if node.op == "call_function")
    assert "conv2d" in operations and "nas" not in operations, operations


@pytest.mark.parametrize("change, words", [(lambda y: y * (1 + 3e-4), "3.0e-04"),
                                           (lambda y: y * torch.nan, "nan")])
def test_a_file_that_differs_is_not_written(change, words, trained, monkeypatch):
    out = trained("nb201")
    (out / "model.onnx").write_bytes(b"of before")

    def differs(net, trained, x):
        return {"model.onnx": b"other"}, lambda x: change(net(x))
    monkeypatch.setitem(export.FORMATS, "onnx", differs)
    with pytest.raises(SystemExit, match=f"model.onnx was not written.*{words}"):
        export.export(options(out))
    assert (out / "model.onnx").read_bytes() == b"of before"


def test_what_cannot_be_exported_is_one_sentence(trained, monkeypatch):
    def fails(net, trained, x):
        raise RuntimeError("no operator for this\nand a page of advice")
    monkeypatch.setitem(export.FORMATS, "torch", fails)
    words = r"cannot be exported with format=torch \(RuntimeError: no operator for this\): try an"
    with pytest.raises(SystemExit, match=f"nb201 {words}"):
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
    macro, gpt = trained("toy_conv_macro"), trained("gpt")
    mistakes = {
        "There is no checkpoint": options(tmp_path),
        "'caffe' must be one of onnx, torch, safe": options(out, "caffe"),
        "toy_conv_macro takes no images of 16 pixels": options(macro, img_size=16),
        "img_size=28 is for images, and a GPT has none: leave it out": options(gpt, img_size=28),
        "img_size=-1 must be 0 or more": options(out, img_size=-1),
        "nanogpt is for a GPT, and this network is one of nb201": options(out, "nanogpt"),
        "huggingface is for a GPT, and this network is one of nb201": options(out, "huggingface")}
    for words, config in mistakes.items():
        with pytest.raises(SystemExit, match=words):
            export.export(config)
    packages = {"onnx": "onnxruntime", "huggingface": "transformers", "safetensors": "safetensors"}
    for format, package in packages.items():
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(SystemExit, match=f"{package}.*pip install .*{package}"):
            export.export(options(gpt, format))

# -----------------------------------------------------------------------------
# GPTs for other programs

FOUND = dict(n_layer=[1, 3], n_embd=[8, 16], n_head=[1, 2, 4, 8], mlp_ratio=[1, 2, 4])
ARCH = dict(n_layer=3, n_embd=16, n_head=[4, 4, 4], mlp_ratio=[1, 4, 2]) # ratios that differ
HEADS = ARCH | dict(n_head=[4, 1, 2]) # and heads that differ
HELD = { # (architecture, keys) of networks that both programs can hold
    "bias": (ARCH, dict()),
    "no bias, sinusoidal": (ARCH, dict(bias=False, position="sinusoidal", loss_chunk=5)),
    "larger heads": (HEADS, dict(head_size=3)),
    "more heads": (HEADS | dict(n_head=[3, 1, 3]), dict(head_size=4, n_head=[1, 3])),
    "exact gelu": (ARCH, dict(activation="exact_gelu")),
    "one layer": (None, dict(n_layer=1, n_head=1, n_embd=6, mlp_ratio=0.5)),
    "kinds that change nothing": (None, dict(n_layer=1, n_kv_head=2, window=16))}
LLAMA = dict(norm="rmsnorm", position="rope", activation="swiglu")


class NanoGPT(nn.Module):
    """What nanoGPT's model.py computes, from its model_args, under its names."""
    def __init__(self, n_layer, n_head, n_embd, block_size, bias, vocab_size, dropout):
        super().__init__()
        def linear(i, o):
            return nn.Linear(i * n_embd, o * n_embd, bias=bias)
        def norm():
            return nn.LayerNorm(n_embd, bias=bias)
        def block():
            attn = nn.ModuleDict(dict(c_attn=linear(1, 3), c_proj=linear(1, 1)))
            mlp = nn.ModuleDict(dict(c_fc=linear(1, 4), c_proj=linear(4, 1)))
            return nn.ModuleDict(dict(ln_1=norm(), attn=attn, ln_2=norm(), mlp=mlp))
        self.n_head = n_head
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(vocab_size, n_embd), wpe=nn.Embedding(block_size, n_embd), ln_f=norm(),
            h=nn.ModuleList(block() for _ in range(n_layer))))
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight

    @torch.no_grad()
    def forward(self, idx, approximate="none"):
        net, T = self.transformer, idx.size(1)
        x = net.wte(idx) + net.wpe(torch.arange(T))
        for block in net.h:
            qkv = block.attn.c_attn(block.ln_1(x)).chunk(3, dim=2)
            q, k, v = (t.unflatten(2, (self.n_head, -1)).transpose(1, 2) for t in qkv)
            later = torch.ones(T, T).triu(1).bool()
            scores = (q @ k.mT / math.sqrt(q.size(-1))).masked_fill(later, -math.inf)
            x = x + block.attn.c_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
            x = x + block.mlp.c_proj(F.gelu(block.mlp.c_fc(block.ln_2(x)), approximate=approximate))
        return self.lm_head(net.ln_f(x))


@pytest.fixture(scope="module")
def transformers(tmp_path_factory):
    """With its copies of code from beside weights in a folder of ours."""
    os.environ["HF_MODULES_CACHE"] = str(tmp_path_factory.mktemp("modules"))
    import transformers
    return transformers


@pytest.mark.parametrize("case", HELD)
def test_nanogpt_loads_its_checkpoint(case, tmp_path, capsys):
    """As its train.py and sample.py do; what its own GELU changes where it is another is said."""
    arch, change = HELD[case]
    net, config = saved(tmp_path, arch, **(FOUND if arch else {}) | change)
    path, _ = export.export(options(tmp_path, "nanogpt"))
    checkpoint = torch.load(path, weights_only=True)
    other = NanoGPT(**checkpoint["model_args"])
    other.load_state_dict(checkpoint["model"])
    exact, said = case == "exact gelu", capsys.readouterr().out
    assert_same(lambda x: other(x, "none" if exact else "tanh"), net, config)
    assert ("nn.GELU" in said) != exact
    if not exact:
        off = float(re.search(r"within (\S+) of these", said)[1])
        x = torch.randint(17, (8, 16), generator=rng(4))
        assert 1e-6 < (other(x) - other(x, "tanh")).abs().max() / other(x).abs().max() < 4 * off
    groups = [{"params": [p for p in other.parameters() if (p.dim() >= 2) == decays]}
              for decays in (True, False)]
    torch.optim.AdamW(groups).load_state_dict(checkpoint["optimizer"])
    assert path.endswith("nanogpt/ckpt.pt") and checkpoint["iter_num"] == 0
    assert checkpoint["config"]["dataset"] == config["dataset"]


@pytest.mark.parametrize("case", [*HELD, "relu", "silu", "mish"])
def test_transformers_loads_gpt2(case, tmp_path, transformers):
    """Without code of ours."""
    arch, change = HELD.get(case, (ARCH | dict(mlp_ratio=[1, 2, 1]), dict(activation=case)))
    net, config = saved(tmp_path, arch, **(FOUND if arch else {}) | change)
    path, _ = export.export(options(tmp_path, "huggingface"))
    model, info = transformers.GPT2LMHeadModel.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()) and not list(Path(path).glob("*.py"))
    assert_same(lambda x: model(x).logits.detach(), net, config)


@pytest.mark.parametrize("arch, change", [
    (ARCH, LLAMA | FOUND | dict(n_head=[2, 4], head_size=6, n_kv_head=2)),
    (None, LLAMA | dict(bias=False, n_head=4, n_kv_head=1, n_embd=24))])
def test_transformers_loads_llama(arch, change, tmp_path, transformers):
    """Without code of ours; with cached keys it generates the same."""
    net, config = saved(tmp_path, arch, **change)
    path, _ = export.export(options(tmp_path, "huggingface"))
    model, info = transformers.LlamaForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()) and not list(Path(path).glob("*.py"))
    assert_same(lambda x: model(x).logits.detach(), net, config)
    assert_generates_the_same(model, net)


@pytest.mark.parametrize("tokenizer", ["char", "gpt2", "hf", "sentencepiece"])
def test_the_tokenizer_comes_with_every_export(tokenizer, tmp_path, transformers, request):
    """As transformers finds it, it gives the ids of the data set, and the text back."""
    text = "Two  spaces, I'll say\n\n<|endoftext|> and é 漢字.\n" * 9
    (tmp_path / "a.txt").write_text(text)
    given, sizes = tokenizer, {}
    if tokenizer in ("gpt2", "hf"):
        request.getfixturevalue("gpt2")
    if tokenizer == "hf":
        (tmp_path / "gpt2.json").write_text(export.gpt2_json().to_str())
        given = f"hf:{tmp_path}/gpt2.json"
    if tokenizer == "sentencepiece":
        sizes = dict(vocab_size=320)
    meta = prepare("text", str(tmp_path / "a.txt"), data_dir=tmp_path, tokenizer=given, **sizes)
    saved(tmp_path, data_dir=str(tmp_path), dataset="text", vocab_size=meta["vocab_size"])
    path, _ = export.export(options(tmp_path, "huggingface"))
    export.export(options(tmp_path, "safetensors"))
    own, kind = data.load_codec(tmp_path, "text"), "json"
    ids = list(map(int, own.encode([text])[0]))
    if tokenizer == "sentencepiece":
        kind = "model"
        found = sentencepiece.SentencePieceProcessor(f"{path}/tokenizer.model").encode(text)
    else:
        loaded = transformers.AutoTokenizer.from_pretrained(path)
        found = loaded(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert loaded.decode(ids) == text
        assert loaded.eos_token_id == own.eot
    assert found == ids
    files = [(folder / f"tokenizer.{kind}").read_bytes() for folder in (tmp_path, Path(path))]
    assert files[0] == files[1]


def assert_generates_the_same(model, net):
    """Up to block_size, and also behind a padding."""
    x = torch.tensor([[1, 2, 3], [4, 5, 6]])
    expected = net.generate(x, 13, temperature=0)
    keys = dict(do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(x, max_new_tokens=13, **keys), expected)
    padding = torch.zeros(2, 2, dtype=torch.long)
    mask = torch.cat((padding, torch.ones_like(x)), 1)
    padded = model.generate(torch.cat((padding, x), 1), attention_mask=mask, max_new_tokens=11,
                            **keys)
    assert torch.equal(padded[:, 2:], expected[:, :14])


@pytest.mark.parametrize("arch, change", [
    (HEADS, FOUND | dict(bias=False)), (HEADS, FOUND | dict(head_size=6)), (KINDS_ARCH, KINDS),
    (ARCH | dict(activation=["gelu", "relu", "gelu"]), FOUND | dict(activation=["gelu", "relu"])),
    (None, LLAMA | dict(window=5)), (None, LLAMA | dict(qk_norm=True)),
    (None, LLAMA | dict(n_head=3, head_size=4)), # transformers wants n_embd to be divisible
    (None, dict(norm="partial_rmsnorm", prmsnorm_pct=0.3, position="sinusoidal", n_kv_head=1)),
    (None, dict(position="none", activation="mish", head_size=5))])
def test_transformers_loads_other_networks_with_code(arch, change, tmp_path, transformers):
    """By the code beside the weights, if one trusts it; with cached keys it generates the same."""
    net, config = saved(tmp_path, arch, **change)
    path, _ = export.export(options(tmp_path, "huggingface"))
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        path, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values())
    assert_same(lambda x: model(x).logits.detach(), net, config)
    assert_generates_the_same(model, net)
    x = torch.randint(17, (2, 9), generator=rng(2))
    loss, expected = model(x, labels=x).loss, net(x[:, :-1], x[:, 1:])[1]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    path = tmp_path / "again"
    model.save_pretrained(path)
    again = transformers.AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    assert_same(lambda x: again(x).logits.detach(), net, config)


@pytest.mark.parametrize("format, change, words", [
    ("nanogpt", dict(activation="relu"),
     "activation='relu' has no place in format=nanogpt, which knows 'exact_gelu', 'gelu'"),
    ("nanogpt", dict(arch=HEADS, **FOUND), "1 of 16, 2 of 8, 4 of 4: take --format=huggingface"),
    ("nanogpt", dict(head_size=6), "no n_head for n_embd=8 holds the layers' heads, 2 of 6"),
    ("nanogpt", dict(mlp_ratio=5),
     "4 \\* n_embd = 32 channels, and one of this network has 40: take --format=huggingface"),
    ("nanogpt", dict(arch=ARCH | dict(activation=["gelu", "exact_gelu", "gelu"]),
                     **FOUND, activation=["gelu", "exact_gelu"]),
     "'exact_gelu' and 'gelu' has no place.*'gelu', one in all layers: take --format=huggingface"),
    *[("nanogpt", change, f"{word} has no place in format=nanogpt.*take --format=huggingface, safe")
      for word, change in (("'rmsnorm'", dict(norm="rmsnorm")), ("'rope'", dict(position="rope")),
                           ("window=4", dict(window=4)), ("n_kv_head=1", dict(n_kv_head=1)),
                           ("qk_norm=True", dict(qk_norm=True)))],
    ("nanogpt", dict(residual="post", norm="rmsnorm"), "'post'.*nanogpt.*take --format=safetens"),
    *[("huggingface", change, f"{word} has no place in format=huggingface.*take --format=safetens")
      for word, change in (("residual='parallel'", dict(residual="parallel")),
                           ("residual='branch'", dict(residual="branch")),
                           ("residual='post'", dict(residual="post")),
                           ("n_expert=3", dict(n_expert=3)))]])
def test_what_they_cannot_hold_is_one_sentence(format, change, words, tmp_path):
    saved(tmp_path, **change)
    with pytest.raises(SystemExit, match=words) as stopped:
        export.export(options(tmp_path, format))
    assert "\n" not in str(stopped.value) and os.listdir(tmp_path) == ["best.pt"]
