"""The sandwich rule and in-place distillation: of the draws of a step the largest learns from
labels, the others from its answers."""
import pytest
import torch
from conftest import TINY_KINDS, TINY_SPACES, flags, succeeds
from test_survival import state_of
from test_train import search_config
from test_vision import search_config as image_config
from test_vision import signalled

import train
import train_search
import search_spaces
from configurator import defaults
from optim_nas import is_of_words, sandwich_archs, uniform
from run import read_lines, rng
from supernet import extremes
from train_search import with_inplace_distillation

SANDWICH = dict(optimizer="spos", subnets_per_step=3, sandwich=True, inplace_distill=True)


def config_of(space, data_dir, digits_dir, out_dir, **rest):
    if space == "gpt":
        return search_config(data_dir, out_dir, **SANDWICH | rest)
    return image_config(space, digits_dir, out_dir, **SANDWICH | rest)


def network(space):
    torch.manual_seed(0)
    if space == "gpt":
        config = search_config("", "") | dict(vocab_size=17)
        x, y = torch.randint(17, (2, 2, 6))
    else:
        images = dict(img_size=8, in_channels=1, num_classes=10)
        config = image_config(space, "", "") | TINY_SPACES[space] | images
        x, y = torch.randn(4, 1, 8, 8), torch.arange(4)
    return search_spaces.build(config).eval(), x, y


@pytest.mark.parametrize("space", ["gpt", "mobilenetv3"])
def test_only_the_first_of_a_batch_learns_from_labels(space):
    """The others' loss, and its gradient, are those of the cross-entropy to fixed answers; each
    batch has its own."""
    net, x, y = network(space)
    forward, generator = with_inplace_distillation(net), rng(0)
    for _ in range(2):
        x = x.flip(0) # another batch
        archs = [extremes(net.choices)[1], uniform(net.choices, generator),
                 extremes(net.choices)[0]]
        answers = net(x, y, archs[0])[0].detach().softmax(-1)
        for i, arch in enumerate(archs):
            logits, loss = net(x, y, arch)
            if i:
                loss = -(answers * logits.log_softmax(-1)).sum(-1).mean()
            expected = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
            _, found = forward(x, y, arch)
            torch.testing.assert_close(found, loss)
            found = torch.autograd.grad(found, list(net.parameters()), allow_unused=True)
            for a, b in zip(found, expected, strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_a_step_trains_the_largest_some_draws_and_the_smallest(
        data_dir, digits_dir, tmp_path, monkeypatch):
    def archs_of(out, **rest):
        steps, real = [], train.train_step
        monkeypatch.setattr(train_search, "train_step", lambda *args: steps.append(args[-1])
                            or real(*args))
        train_search.search(config_of("gpt", data_dir, digits_dir, tmp_path / out,
                                      subnets_per_step=4, **rest))
        monkeypatch.undo()
        return steps
    plain, steps = archs_of("a", sandwich=False, inplace_distill=False), archs_of("b")
    largest = dict(n_layer=2, n_embd=16, n_head=[2, 2], mlp_ratio=[2, 2])
    assert len(steps) == 4
    for draws, archs in zip(plain, steps, strict=True):
        assert archs == [largest, *draws[1:3], dict(n_layer=1, n_embd=8, n_head=[1], mlp_ratio=[1])]
    # the smallest that is unlocked
    for archs, smallest in zip(archs_of("c", shrink="n_embd=8, n_layer=1"), (2, 2, 1, 1),
                               strict=True):
        assert archs[0] == largest and archs[-1] == dict(n_layer=smallest, n_embd=8,
                                                         n_head=[2] * smallest,
                                                         mlp_ratio=[2] * smallest)


@pytest.mark.parametrize("space", ["gpt", "nats_size"])
def test_a_resumed_search_is_one_that_was_not_stopped(space, data_dir, digits_dir, tmp_path):
    config = config_of(space, data_dir, digits_dir, tmp_path / "whole")
    train_search.search(config)
    with signalled(train_search, "train_step", lambda *args: args[6].step == 2):
        train_search.search(config | {"out_dir": str(tmp_path / "parts")})
    train_search.search(config | {"out_dir": str(tmp_path / "parts"), "init_from": "resume"})
    assert state_of(tmp_path / "whole") == state_of(tmp_path / "parts")


def test_two_processes_are_one(data_dir, digits_dir, tmp_path):
    config = config_of("gpt", data_dir, digits_dir, tmp_path / "one", gradient_accumulation_steps=2)
    train_search.search(config)
    changed = {key: value for key, value in config.items()
               if value != defaults(vars(train_search))[key]}
    succeeds("torchrun", "--standalone", "--nproc_per_node=2", "train_search.py",
             *flags(changed | {"out_dir": tmp_path / "two"}))
    one, two = (read_lines(tmp_path / name / "log.jsonl") for name in ("one", "two"))
    one, two = ([line["loss"] for line in lines if "loss" in line] for lines in (one, two))
    assert len(one) == 4 and one == pytest.approx(two, abs=2e-5)


def test_answers_teach_what_labels_would(data_dir, digits_dir, tmp_path):
    """The smallest, which never sees a label, still learns the text."""
    config = config_of("gpt", data_dir, digits_dir, tmp_path / "s", subnets_per_step=2,
                       max_iters=150, eval_interval=150,
                       learning_rate=5e-3, n_embd=[16, 32], block_size=32, eval_iters=8)
    train_search.search(config)
    losses = [line["arch_loss"] for line in read_lines(tmp_path / "s/arch_traj.jsonl")]
    assert losses[1] < losses[0] - 0.5, losses


@pytest.mark.parametrize("change, words", [
    (dict(sandwich=False), ["inplace_distill=True needs sandwich=True"]),
    (dict(loss_chunk=8), ["loss_chunk=0", "8"]),
    (dict(optimizer="drnas"), ["optimizer=spos", "drnas"]),
    (dict(subnets_per_step=1), ["subnets_per_step of 2 or more (it is 1)"]),
    (dict(shrink="n_embd=8, n_layer=1 subnets_per_step=1"), ["in every phase", "it is 1"])])
def test_mistakes_are_one_sentence(change, words, data_dir, digits_dir, tmp_path):
    with pytest.raises(SystemExit) as e:
        train_search.search(config_of("gpt", data_dir, digits_dir, tmp_path / "s", **change))
    assert all(word in str(e.value) for word in words) and "\n" not in str(e.value)


@pytest.mark.parametrize("space", ["gpt", "mobilenetv3"])
def test_the_sandwich_of_sizes_is_the_smallest_and_the_largest(space):
    choices = network(space)[0].choices
    assert list(sandwich_archs(choices, rng(1))) == extremes(choices)


def test_kinds_of_block_are_drawn_in_a_sandwich(data_dir):
    """None of them is the largest: sizes are, and every kind comes with both."""
    config = search_config("", "") | TINY_KINDS | dict(vocab_size=17)
    choices, seen = search_spaces.build(config).choices, set()
    sizes = {name for name, c in choices.items() if not is_of_words(c)}
    assert choices.keys() - sizes == {"norm", "position", "qk_norm", "activation"}
    for seed in range(40):
        found = list(sandwich_archs(choices, rng(seed)))
        for arch, expected in zip(found, extremes(choices), strict=True):
            assert {name: arch[name] for name in sizes} == {name: expected[name] for name in sizes}
            seen.add((arch["n_embd"], arch["norm"], arch["position"], arch["activation"][0]))
    assert len(seen) == 2 * 2 * 2 * 2


def test_operations_have_no_largest(data_dir, digits_dir, tmp_path):
    with pytest.raises(SystemExit, match="toy_cell chooses operations"):
        train_search.search(config_of("toy_cell", data_dir, digits_dir, tmp_path / "s"))
