"""--init_from with the weights of a GPT-2: it computes what transformers' GPT-2 computes, as a
network and inside a supernet."""
import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from conftest import fails, flags
from test_survival import killed_early, state_of
from test_train import base_config, search_config, train_config
from test_vision import signalled

import train
import train_base
import train_search
from data import Tokens, load_meta, load_tokens
from model import build
from pretrained import load_gpt2, read_gpt2, sort_by_importance
from run import read_json, read_lines
from sample import load_run
from supernet import extremes
import run as runs
import data

GPT2 = dict(n_layer=2, n_head=4, n_embd=32)
OURS = GPT2 | dict(bias=True, mlp_ratio=4.0)
SPACE = dict(n_layer=[1, 2], n_head=[2, 4], n_embd=[16, 32], mlp_ratio=[2, 4], head_size=8,
             bias=True, optimizer="spos")


def save_gpt2(folder, vocab_size, **rest):
    """A random GPT-2, as transformers saves it; weights large enough to show a wrong place."""
    torch.manual_seed(3)
    settings = GPT2 | dict(vocab_size=vocab_size, n_positions=24) | rest
    net = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings)).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape) * 0.1)
    net.save_pretrained(folder)
    return net


@pytest.fixture(scope="module")
def gpt2(data_dir, tmp_path_factory):
    """(the folder, transformers' network) of a GPT-2 for the tokens of data_dir."""
    folder = str(tmp_path_factory.mktemp("gpt2"))
    return folder, save_gpt2(folder, load_meta(data_dir, "pydocs")["vocab_size"])


def x_of(net, T):
    return torch.randint(net.config.vocab_size, (3, T), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rest, activation", [({}, "gelu"), (dict(n_inner=48), "gelu"),
                                              (dict(activation_function="gelu"), "exact_gelu"),
                                              (dict(activation_function="relu", n_head=2), "relu")])
def test_logits_are_those_of_transformers(rest, activation, tmp_path):
    theirs, x = save_gpt2(tmp_path, 31, **rest), None
    ours = OURS | dict(vocab_size=31, n_head=theirs.config.n_head, activation=activation,
                       mlp_ratio=rest.get("n_inner", 128) / 32)
    for block_size in (24, 10):
        net, x = build(ours | dict(block_size=block_size)).eval(), x_of(theirs, block_size)
        load_gpt2(net, str(tmp_path))
        assert (net(x, x)[0] - theirs(x).logits).abs().max() < 1e-5


def test_a_ratio_that_rounds_below_its_mlp(tmp_path):
    """120 / 88 times 88 is 119.99999999999999."""
    theirs = save_gpt2(tmp_path, 31, n_embd=88, n_inner=120)
    sizes, _ = read_gpt2(str(tmp_path))
    net, x = build(sizes).eval(), x_of(theirs, 24)
    load_gpt2(net, str(tmp_path))
    assert (net(x, x)[0] - theirs(x).logits).abs().max() < 1e-4


@pytest.mark.parametrize("head_size", [0, 8])
def test_the_largest_network_of_the_supernet_is_the_pretrained_one(head_size, gpt2):
    folder, theirs = gpt2
    net, x = build(SPACE | dict(head_size=head_size, vocab_size=theirs.config.vocab_size,
                                block_size=24)).eval(), x_of(theirs, 24)
    load_gpt2(net, folder)
    for _ in range(2):
        for one in (net.extract(extremes(net.choices)[1]).eval(), lambda x,
                    y: net(x, y, extremes(net.choices)[1])):
            assert (one(x, x)[0] - theirs(x).logits).abs().max() < 1e-4
        sort_by_importance(net, torch.abs)


def test_a_file_as_on_the_hub(gpt2, tmp_path):
    """Whose names have no prefix, and which holds the masks of attention."""
    folder, theirs = gpt2
    weights = {name.removeprefix("transformer."): t
               for name, t in load_file(f"{folder}/model.safetensors").items()}
    weights = {name: t for name, t in weights.items() if name != "lm_head.weight"}
    weights |= {f"h.{i}.attn.bias": torch.ones(1, 1, 24, 24).tril() for i in range(2)}
    save_file(weights, tmp_path / "model.safetensors")
    shutil.copy(f"{folder}/config.json", tmp_path)
    net, x = build(OURS | dict(vocab_size=theirs.config.vocab_size,
                               block_size=24)).eval(), x_of(theirs, 24)
    load_gpt2(net, str(tmp_path))
    assert (net(x, x)[0] - theirs(x).logits).abs().max() < 1e-4


def test_training_starts_with_the_pretrained_loss(gpt2, data_dir, tmp_path):
    folder, theirs = gpt2
    config = train_config(data_dir, tmp_path / "t", **OURS, init_from=folder)
    train.train(config)
    config = SimpleNamespace(**config)
    run = runs.setup(SimpleNamespace(**vars(config) | {"out_dir": str(tmp_path / "none")}))

    def net(x, y, arch=None):
        logits = theirs(x).logits
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
    net.training, net.eval, net.train = False, lambda: None, lambda mode: None
    expected = train.estimate(net, Tokens(load_tokens(data_dir, "pydocs", "val")), config, run,
                              "val")["loss"]
    first = next(line for line in read_lines(tmp_path / "t/log.jsonl") if line.get("step") == 0
                 and "val_loss" in line)
    assert first["val_loss"] == pytest.approx(expected, abs=1e-4)


def test_a_search_cuts_it_to_a_budget_and_resumes_exactly(gpt2, data_dir, tmp_path):
    folder, theirs = gpt2
    config = search_config(data_dir, tmp_path / "whole", **SPACE, init_from=folder, max_iters=6,
                           learning_rate=1e-9, min_lr=0.0)
    net = build(config | {"vocab_size": theirs.config.vocab_size})
    small, large = (net.cost(arch)["params"] for arch in extremes(net.choices))
    config["target_params"] = (small + large) // 2
    result = train_search.search(config)
    assert 0.95 * config["target_params"] <= result["params"] <= config["target_params"]
    with signalled(train_search, "train_step", lambda *args: args[6].step == 2):
        train_search.search(config | {"out_dir": str(tmp_path / "parts")})
    train_search.search(config | {"out_dir": str(tmp_path / "parts"), "init_from": "resume"})
    assert state_of(tmp_path / "whole") == state_of(tmp_path / "parts")
    # with hardly a step made, it still is the pretrained one
    net = build(read_json(tmp_path / "whole/run.json")["config"]).eval()
    net.load_state_dict(torch.load(tmp_path / "whole/ckpt.pt", weights_only=True)["model"])
    x = x_of(theirs, 16)
    assert (net(x, x, extremes(net.choices)[1])[0] - theirs(x).logits).abs().max() < 1e-3
    moved = (net.transformer.wte.weight - theirs.transformer.wte.weight).abs().max()
    assert moved > 0.1, "its channels are in another order"
    found = read_json(tmp_path / "whole/arch.json")["arch"]
    train_base.train_found(base_config(data_dir, tmp_path / "base", tmp_path / "whole/arch.json",
                                       init_from=str(tmp_path / "whole"),
                                       learning_rate=1e-9, min_lr=0.0))
    cut, _ = load_run(str(tmp_path / "base"), "cpu")
    assert (cut(x, x)[0] - net(x, x, found)[0]).abs().max() < 1e-4


def test_killed_before_its_first_checkpoint_it_starts_with_the_same_weights_again(
        gpt2, data_dir, tmp_path):
    """A search and a training from a GPT-2, and a training from each of these."""
    folder, out = gpt2[0], tmp_path / "search"
    runs = {"search": (train_search.search, search_config(data_dir, out, **SPACE,
                                                          init_from=folder)),
            "train": (train.train, train_config(data_dir, tmp_path / "train", **OURS,
                                                init_from=folder)),
            "base": (train_base.train_found, base_config(data_dir, tmp_path / "base",
                                                         out / "arch.json", init_from=str(out))),
            "more": (train.train, train_config(data_dir, tmp_path / "more", **OURS,
                                               init_from=str(tmp_path / "train")))}
    for name, (go, config) in runs.items():
        go(config)
        go(config | killed_early(tmp_path / name, tmp_path / f"{name} again"))
        assert state_of(tmp_path / name) == state_of(tmp_path / f"{name} again"), name


def test_a_new_run_knows_nothing_of_the_one_it_replaces(gpt2, data_dir, tmp_path):
    config = search_config(data_dir, tmp_path, **SPACE, init_from=gpt2[0], overwrite=True)
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "arch_search.jsonl").write_text("no line of ours\n")
    train_search.search(config)
    assert len(read_lines(tmp_path / "arch_search.jsonl")) == config["arch_evals"]
    (tmp_path / "pareto.json").write_text("{}")
    # a report of it would count these evaluations
    train_search.search(config | dict(optimizer="drnas"))
    assert not (tmp_path / "arch_search.jsonl").exists() and not (tmp_path / "pareto.json").exists()


def test_the_vocabulary_is_not_padded(tmp_path):
    config = SimpleNamespace(out_dir=str(tmp_path), init_from="scratch")
    assert data.padded_vocab_size(50257, config) == 50304
    assert data.padded_vocab_size(65, config) == 65
    config.init_from = "gpt2"
    assert data.padded_vocab_size(50257, config) == 50257
    config.init_from = "resume"
    for size in (50257, 50304):
        (tmp_path / "run.json").write_text(json.dumps({"config": {"vocab_size": size}}))
        assert data.padded_vocab_size(50257, config) == size


@pytest.mark.parametrize("change, words", [
    (dict(n_layer=[1, 3]), ["n_layer=2", "at its largest, 3", "--n_layer=2"]),
    (dict(n_head=[2, 8]), ["n_head=4", "8"]), (dict(n_embd=[16, 48]), ["n_embd=32", "48"]),
    (dict(mlp_ratio=[1, 2]), ["mlp_ratio=4", "2"]), (dict(bias=False), ["bias=True"]),
    (dict(norm="rmsnorm"), ["norm=layernorm"]), (dict(position="rope"), ["position=learned"]),
    (dict(activation="silu"), ["activation=gelu"]), (dict(residual="post"), ["residual=pre"]),
    (dict(block_size=25), ["block_size=24", "25"]),
    (dict(head_size=4), ["heads of 8", "head_size"]),
    (dict(space="toy_cell", dataset="digits"), ["for the GPT"]),
    (dict(init_from="gpt5"), ["gpt5", "gpt2-xl"])])
def test_another_network_is_one_sentence(change, words, gpt2, data_dir, tmp_path):
    with pytest.raises(SystemExit) as e:
        train_search.search(search_config(data_dir, tmp_path / "s",
                                          **SPACE | {"init_from": gpt2[0]} | change))
    assert all(word in str(e.value) for word in words) and "\n" not in str(e.value), e.value
    assert not os.path.exists(tmp_path / "s")


def rewrite(folder, change):
    """Saves what change makes of the weights; that of a classifier has a score, for example."""
    path = f"{folder}/model.safetensors"
    save_file(change(load_file(path)), path)


def save_other(folder, name):
    """A tiny network of another architecture, as transformers saves it."""
    config = getattr(transformers, f"{name}Config")(
        vocab_size=30, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=24)
    getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(folder)


@pytest.mark.parametrize("change, words", [
    (lambda folder: os.remove(f"{folder}/model.safetensors"), ["model.safetensors"]),
    (lambda folder: os.truncate(f"{folder}/model.safetensors", 1000), ["SafetensorError"]),
    (lambda folder: open(f"{folder}/config.json", "w").write("{"), ["JSONDecodeError"]),
    (lambda folder: open(f"{folder}/config.json", "w").write("{}"), ["a nameless", "n_layer"]),
    (lambda folder: save_other(folder, "Llama"), ["is a LlamaForCausalLM by its", "GPT-2"]),
    (lambda folder: save_other(folder, "GPTNeoX"), ["is a GPTNeoXForCausalLM by its", "GPT-2"]),
    (lambda folder: rewrite(folder, lambda w: w | {"score.weight": torch.ones(2, 32)}),
     ["transformer.score.weight is (2, 32)", "None"]),
    (lambda folder: rewrite(folder, lambda w: {k: t for k, t in w.items() if "wpe" not in k}),
     ["transformer.wpe.weight is None"]),
    (lambda folder: rewrite(folder, lambda w: w | {"transformer.h.1.ln_1.bias": torch.ones(8)}),
     ["h.1.ln_1.bias is (8,)", "(32,)"]),
    (lambda folder: save_gpt2(folder, 30, activation_function="tanh"),
     ["activation_function=tanh", "gelu_new"]),
    (lambda folder: save_gpt2(folder, 30, layer_norm_epsilon=1e-3), ["layer_norm_epsilon=0.001"]),
    (lambda folder: save_gpt2(folder, 30), ["vocab_size=30", "--tokenizer=gpt2"])])
def test_a_folder_that_cannot_be_used_is_one_sentence(change, words, gpt2, data_dir, tmp_path):
    folder = tmp_path / "gpt2"
    shutil.copytree(gpt2[0], folder)
    change(folder)
    with pytest.raises(SystemExit) as e:
        train.train(train_config(data_dir, tmp_path / "t", **OURS, init_from=str(folder)))
    assert all(word in str(e.value) for word in [*words,
                                                 str(folder)]) and "\n" not in str(e.value), e.value
    assert not os.path.exists(tmp_path / "t")


def test_without_the_hub_it_is_one_sentence(data_dir, tmp_path):
    message = fails("train.py", "--init_from=gpt2",
                    *flags(train_config(data_dir, tmp_path / "t", **OURS) | {"init_from": "gpt2"}),
                    HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert "init_from='gpt2' cannot be loaded" in message and "folder" in message
