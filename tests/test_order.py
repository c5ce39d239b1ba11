"""Ordering by importance: the largest network computes what it did, and a smaller option keeps
what matters most."""
from types import SimpleNamespace

import pytest
import torch
from conftest import GPT2_BLOCK, TINY
from test_model import BLOCKS, BLOCKS_AND_HEADS, agree, supernet, tokens

import train_search
from configurator import defaults
from model import build
from pretrained import sort_by_importance
from run import setup
from supernet import extremes
from train_search import importance, split_data
import train


CASES = [("gpt2", 0), ("gpt2", 4), # heads that share keys and values are bound to their places
         *((block, head_size) for block, head_size in BLOCKS_AND_HEADS
           if "n_kv_head" not in BLOCKS[block] and block != "any heads")]


def sizes(net, **change):
    """The largest architecture, with some choices at another option."""
    largest = extremes(net.choices)[1]
    return largest | {name: [v] * largest["n_layer"] if isinstance(largest[name], list) else v
                      for name, v in change.items()}


@pytest.mark.parametrize("block, head_size", CASES)
def test_the_largest_network_computes_what_it_did(block, head_size):
    net, (x, y) = supernet("even", head_size=head_size, **BLOCKS.get(block, {}) |
                           {"loss_chunk": 0}), tokens()
    least, largest = extremes(net.choices)
    before = net(x, y, largest)[0], net(x, y, least)[0]
    sort_by_importance(net, torch.abs)
    agree(net(x, y, largest)[0], before[0], "logits")
    assert (net(x, y, least)[0] - before[1]).abs().max() > 0.1


@pytest.mark.parametrize("block, head_size", CASES)
def test_everything_that_may_move_is_in_order(block, head_size):
    options = BLOCKS.get(block, {})
    net = supernet("even", head_size=head_size, **options)
    E, h = net.n_embd[-1], 4

    def falls(norms): # the L1 norms of what reads and writes each unit
        return torch.equal(norms, norms.sort(descending=True).values)

    def channels():
        whole = sum(p.abs().movedim(p.shape.index(E), 0).reshape(E, -1).sum(1)
                    for name, p in net.named_parameters() if E in p.shape and "attn" not in name)
        return whole + sum(
            block.attn.c_attn.weight.abs().sum(0)
            + sum(p.abs().reshape(E, -1).sum(1) for p in block.attn.c_proj.parameters())
            for block in net.transformer.h)
    before = channels()
    sort_by_importance(net, torch.abs)
    still = options.get("position") == "sinusoidal" or options.get("norm") == "partial_rmsnorm"
    assert torch.allclose(channels(), before) if still else falls(channels())
    for layer in net.transformer.h:
        hidden = layer.mlp.c_proj.weight.shape[1]
        assert falls(sum(p.abs().view(-1, hidden, p[0].numel()).sum((0, 2))
                         for p in layer.mlp.c_fc.parameters())
                     + layer.mlp.c_proj.weight.abs().sum(0))
        # (3, head, channel)
        qkv = sum(p.abs().view(3, h, -1, p[0].numel()).sum(-1)
                  for p in layer.attn.c_attn.parameters())
        read = layer.attn.c_proj.weight.abs().sum(0).view(h, -1)
        if head_size:
            assert falls(qkv.sum((0, 2)) + read.sum(1))
            continue
        for i in range(h):
            assert falls(qkv[2, i] + read[i])
            assert falls(qkv[:2, i].sum(0))


def test_what_is_dead_goes_last():
    """Scattered heads and neurons that nothing reads: the smaller options leave out exactly
    those."""
    net, (x, y) = supernet("even", n_head=[2, 4], mlp_ratio=[1, 2], head_size=4).eval(), tokens()
    with torch.no_grad():
        for i, block in enumerate(net.transformer.h):
            block.attn.c_proj.weight.view(36, 4, 4)[:, [0, 1 + i]] = 0
            block.mlp.c_proj.weight[:, torch.randperm(72)[:36]] = 0
    whole = net(x, y, sizes(net))[0]
    assert (net(x, y, sizes(net, n_head=2, mlp_ratio=1))[0] - whole).abs().max() > 0.1
    reads = {p for block in net.transformer.h
             for p in (block.attn.c_proj.weight, block.mlp.c_proj.weight)}
    sort_by_importance(net, lambda p: p.abs() if p in reads else torch.zeros_like(p))
    agree(net(x, y, sizes(net, n_head=2, mlp_ratio=1))[0], whole, "logits")


def test_the_first_half_of_a_trained_network_loses_less_after_ordering(data_dir, tmp_path):
    options = TINY | GPT2_BLOCK | dict(
        eval_iters=10, data_dir=data_dir, out_dir=str(tmp_path), block_size=32, batch_size=16,
        train_portion=0.8, n_layer=2, n_head=[4, 8], n_embd=[32, 64], mlp_ratio=[2, 4], head_size=8)
    config = SimpleNamespace(**defaults(vars(train_search)) | options)
    run = setup(config)
    splits, _ = split_data(config, run)
    net = build(vars(config))
    largest, optimizer = sizes(net), torch.optim.AdamW(net.parameters(), 3e-3)
    for step in range(150):
        for x, y in train.micro_batches(splits["train"], config, run, "train", step):
            net(x, y, largest)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    halves = [dict(n_head=4), dict(mlp_ratio=2), dict(n_embd=32)]

    def losses():
        return [train.estimate(net, splits["search"], config, run, "search", lambda i,
                               half=half: sizes(net, **half))["loss"]
                for half in ({}, *halves)]
    before = losses()
    sort_by_importance(net, importance(net, splits["train"], config, run).__getitem__)
    after = losses()
    assert after[0] == pytest.approx(before[0], abs=1e-5)
    assert all(b < a for a, b in zip(before[1:], after[1:], strict=True)), (before, after)
