"""report.py: rivals of equal budget, a verdict from the numbers, no training twice, the page."""
import html.parser
import itertools
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (TINY, TINY_IMAGES, TINY_SEARCH, TINY_SPACES, flags, killed_in, script, stops,
                      succeeds)
from test_pretrained import SPACE, save_gpt2

import report
from budget import Budget, architectures
from model import build
from optim_nas import arch_key
from run import read_json, write_json
from search_spaces import space_module
from supernet import extremes

SMALL = TINY | dict(n_pick=3, n_rank=4, n_random=2, seeds=[1, 2])
CHARS = dict(n_layer=[4, 5, 6], n_head=[2, 4, 6], n_embd=[96, 192, 384], mlp_ratio=[2, 3, 4],
             vocab_size=65, block_size=256)


@pytest.fixture(scope="module")
def searched(data_dir, tmp_path_factory):
    """A search with a budget."""
    out = tmp_path_factory.mktemp("searched") / "s"
    options = dict(data_dir=data_dir, out_dir=out, target_params=4000)
    script("train_search.py", *flags(TINY_SEARCH | options))
    return out


@pytest.fixture(scope="module")
def reported(searched, data_dir):
    """Its report, as a user makes it: the folder."""
    succeeds("report.py", str(searched), *flags(SMALL | dict(data_dir=data_dir)))
    return searched / "report"


def numbers_of(folder):
    found = json.loads((folder / "report.json").read_text())
    networks = {name: {key: n[key] for key in ("arch", "val", "test", "params")}
                for name, n in found["networks"].items()}
    return {key: found[key] for key in ("verdict", "ranked", "ranks")} | networks


def test_every_rival_is_in_the_budget(reported):
    networks = json.loads((reported / "report.json").read_text())["networks"]
    assert list(networks) == ["found", "largest", "standard", "picked", "random 1", "random 2"]
    assert all(n["params"] <= 4000 for n in networks.values())
    assert all(len(n["test"]) == len(n["val"]) == 2 for n in networks.values())


def test_the_largest_by_exhaustion_and_nanogpts_shape():
    net = build(dict(n_layer=[1, 2, 3], n_head=[1, 2], n_embd=[16, 32], mlp_ratio=[1, 2, 4],
                     vocab_size=65, block_size=16))

    def largest(budget, other_than=None):
        generator = torch.Generator().manual_seed(0)
        return report.largest_in_budget(net.choices, budget, generator, other_than=other_than)

    params = {arch_key(arch): net.cost(arch)["params"] for arch in architectures(net.choices)}
    for target in (9_000, 20_000, 33_000):
        budget = Budget(net.choices, net.cost, {"params": target})
        arch = largest(budget)
        assert params[arch_key(arch)] == max(n for n in params.values() if n <= target)
        assert largest(budget, other_than=arch) != arch
    net = build(CHARS)
    for target, (depth, width) in ((10_800_000, (6, 384)), (2_750_000, (6, 192))):
        arch = report.standard_shape(net.choices, Budget(net.choices, net.cost, {"params": target}))
        heads = {384: 6, 192: 4}[width]
        assert arch == dict(n_layer=depth, n_embd=width, n_head=[heads] * depth,
                            mlp_ratio=[4] * depth)
    small = Budget(net.choices, net.cost, {"params": 340_000}) # mlp_ratio 4 does not fit
    assert report.standard_shape(net.choices, small) is None


def test_networks_are_equal_whatever_they_list_for_blocks_that_they_do_not_have():
    """In a space of one or two blocks, two architectures of one block that differ in the second."""
    sizes = dict(n_embd=[12], n_rstb=[1, 2], n_layer=[1, 2], n_head=[2, 3], mlp_ratio=[1],
                 window_size=4, patch=8)
    net = space_module("swinir").build(sizes)
    found = dict(n_embd=12, n_rstb=1, n_layer_1=2, n_head_1=[3, 3], mlp_ratio_1=[1, 1],
                 n_layer_2=1, n_head_2=[2], mlp_ratio_2=[1])
    params = {"params": net.cost(found)["params"]} # it alone is the largest that fits
    budget, config = Budget(net.choices, net.cost, params), dict(n_pick=0, n_random=8, seed=1)
    archs = report.networks_of(net, {"arch": found, "space": "swinir"}, budget, None, config,
                               own=True)
    texts = {name: report.text_of(arch, "swinir") for name, arch in archs.items()}
    assert "largest" not in archs and list(texts.values()).count(texts["found"]) > 1
    assert all((archs[a] == archs[b]) == (texts[a] == texts[b])
               for a, b in itertools.combinations(archs, 2))


def test_a_search_that_ends_at_the_largest_that_fits_did_not_pay():
    images = dict(img_size=8, in_channels=1, num_classes=10)
    net = space_module("nats_size").build(TINY_IMAGES | TINY_SPACES["nats_size"] | images)
    found = extremes(net.choices)[1]
    budget = Budget(net.choices, net.cost, {"params": 1.02 * net.cost(found)["params"]})
    archs = report.networks_of(net, {"arch": found, "space": "nats_size"}, budget, None,
                               dict(n_pick=0, n_random=1, seed=1))
    assert archs["largest"] == found
    numbers = {name: {"arch": arch, "val": [2.0, 2.1], "test": [2.0, 2.1]}
               for name, arch in archs.items()}
    numbers["random 1"] |= {"val": [3.0, 3.1], "test": [3.0, 3.1]}
    assert report.verdict(numbers, 5, 1)[0] == (
        "The search did not pay: what it found is largest, which needs no search.")


def test_a_progressive_search_can_be_reported(digits_dir, tmp_path):
    """Its supernet has lost operations that its rivals have."""
    options = dict(space="nb201", init_channels=8, optimizer="drnas", partial_channels=4,
                   widen_to=2, prune_keep=2, data_dir=digits_dir, out_dir=tmp_path / "s")
    script("train_search.py", *flags(TINY_IMAGES | TINY_SPACES["nb201"] | options))
    options = TINY_IMAGES | dict(n_random=2, seeds=[1, 2], data_dir=digits_dir)
    report = ["report.py", str(tmp_path / "s"), *flags(options)]
    assert "give --n_pick=0 --n_rank=0" in stops(*report)
    script(*report, "--n_pick=0", "--n_rank=0")
    told = read_json(tmp_path / "s/report/report.json")
    assert {"found", "random 1", "random 2"} <= set(told["networks"])
    assert told["cost"]["search_flops"] > 0


def constructed(found, *rivals):
    """networks of these mean losses, three seeds each."""
    names = ("found", "largest", "standard", "random 1", "random 2")
    return {name: {"arch": {"n": i}, "val": [mean + d for d in (-0.01, 0.0, 0.01)],
                   "test": [mean + d for d in (-0.011, 0.0, 0.01)]}
            for i, (name, mean) in enumerate(zip(names, (found, *rivals), strict=False))}


@pytest.mark.parametrize("found, rivals, bought, said, strongest", [
    (2.0, (2.2, 2.1, 2.3), 5, "The search paid", "standard"),
    (2.2, (2.4, 2.3, 2.1), 5, "The search did not pay", "random 1"),
    (2.0, (2.2, 2.001, 2.3), 5, "cannot be told with these seeds", "standard"),
    # the search and the training of what it found cost two random trainings, or one
    (2.0, (2.2, 2.2, 2.1, 1.8), 1, "The search did not pay", "random 2"),
    (2.0, (2.2, 2.2, 2.1, 1.8), 0.5, "The search paid", "random 1")])
def test_the_statement_follows_the_numbers(found, rivals, bought, said, strongest):
    text, name = report.verdict(constructed(found, *rivals), bought, 1)
    assert said in text and name == strongest and strongest in text and ("test loss" in text)
    words = {"The search paid": "is better than", "The search did not pay": "is worse than"}
    assert words.get(said, "cannot be told apart from") in text
    accuracies = constructed(-found, *(-loss for loss in rivals))
    assert said in report.verdict(accuracies, bought, -1, "test accuracy in %")[0]


def test_a_rival_that_the_search_found_too_means_that_it_did_not_pay():
    networks = constructed(2.0, 2.2) | {"standard": constructed(2.0)["found"]}
    assert "did not pay: what it found is standard" in report.verdict(networks, 5, 1)[0]
    assert "Nothing can be said" in report.verdict(constructed(2.0), 5, 1)[0]


def test_differences_by_hand():
    told = report.compare([2.0, 2.1, 2.2], [3.5, 3.4, 3.9], 1)
    assert told["gain"] == pytest.approx(1.5) and told["std"] == pytest.approx(0.2)
    assert told["words"] == "better"
    t = 1.5 / math.sqrt((0.01 + 0.07) / 3) # Welch's statistic; df by Welch-Satterthwaite
    df = (0.08 / 3) ** 2 / ((0.01 / 3) ** 2 / 2 + (0.07 / 3) ** 2 / 2)
    x = np.linspace(t, 4000, 4_000_001)
    factor = math.gamma((df + 1) / 2) / math.sqrt(df * math.pi) / math.gamma(df / 2)
    tail = factor * np.trapezoid((1 + x ** 2 / df) ** (-(df + 1) / 2), x)
    assert told["p"] == pytest.approx(2 * tail, rel=1e-3)
    assert report.compare([1.0, 1.0], [1.0, 1.0], 1)["words"] == "not told apart"


def test_kendalls_tau_by_pairs():
    rng = np.random.default_rng(0)
    trained, inherited = rng.random(20), rng.random(20)
    inherited += trained
    agree = [np.sign((inherited[i] - inherited[j]) * (trained[i] - trained[j]))
             for i, j in itertools.combinations(range(20), 2)]
    found = report.rank_correlations({"inherited": inherited, "same": trained ** 3}, trained)
    assert found["inherited"]["tau"] == pytest.approx(np.mean(agree))
    assert found["inherited"]["tau_p"] < 0.05
    assert found["same"]["tau"] == pytest.approx(1) and found["same"]["rho"] == pytest.approx(1)
    assert report.rank_correlations({"all alike": np.ones(20)}, trained) == {} # it has no order


@pytest.mark.parametrize("optimizer, order, draws, batches", [
    ("drnas", 1, 1, 30 * 5), ("darts", 2, 1, 30 * 15), ("spos", 1, 1, 30 * 3 + 7 * 2),
    ("spos", 1, 4, 30 * 12 + 7 * 2)])
def test_the_flops_of_a_search(optimizer, order, draws, batches):
    net = build(dict(n_layer=[1, 2], n_head=[1], n_embd=[16, 32], mlp_ratio=[1, 2], vocab_size=65,
                     block_size=16))
    search = SimpleNamespace(optimizer=optimizer, order=order, max_iters=10, eval_iters=2,
                             gradient_accumulation_steps=3, batch_size=4, subnets_per_step=draws,
                             teacher="", shrink="", arch_warmup_iters=0)
    costs = [net.cost(arch)["flops"] for arch in architectures(net.choices)]
    flops = report.search_flops(net, search, 7 if optimizer == "spos" else 0) / 4 / batches
    assert min(costs) < flops < max(costs) if optimizer == "spos" else flops == max(costs)
    search.arch_warmup_iters = 6 # the alphas move in 4 steps of 10
    alphas = {1: 2, 2: 12}[order] * (optimizer != "spos")
    rested = report.search_flops(net, search, 7 if optimizer == "spos" else 0) / 4 / batches
    assert (flops - rested) * batches == pytest.approx(3 * alphas * 6 * flops)


def test_the_flops_of_a_progressive_search():
    """First all operations of a quarter of the channels, then some of a half of them.

    The alphas rest at the start of each half.
    """
    config = dict(img_size=8, in_channels=1, num_classes=10, init_channels=8)
    config = TINY_IMAGES | TINY_SPACES["nb201"] | config
    first, second = (space_module("nb201").build(config | dict(partial_channels=k)) for k in (4, 2))
    pruned = torch.arange(5) % 2 == 0
    second.prune({name: pruned.expand(c.shape) for name, c in second.choices.items()})
    ones = {name: torch.ones(c.shape) for name, c in first.choices.items()}
    a, b = (float(net.cost(ones)["flops"]) for net in (first, second))
    assert b < 2 * a
    search = SimpleNamespace(optimizer="drnas", order=1, max_iters=11, eval_iters=2,
                             gradient_accumulation_steps=1, batch_size=4, subnets_per_step=1,
                             teacher="", shrink="", arch_warmup_iters=2)
    expected = 4 * (a * (5 * 3 + 3 * 2) + b * (6 * 3 + 4 * 2))
    assert report.search_flops(second, search, 0, first) == pytest.approx(expected)


def test_the_flops_of_a_shrinking():
    """Each phase counts what it draws: the first one architecture, the second one of two, twice."""
    net = build(dict(n_layer=[1, 2], n_head=[1], n_embd=[16, 32], mlp_ratio=[2], vocab_size=65,
                     block_size=16))
    shrink = "n_layer=2 n_embd=32 share=2, n_embd=16 share=3 subnets_per_step=2"
    search = SimpleNamespace(optimizer="spos", order=1, max_iters=10, eval_iters=2,
                             gradient_accumulation_steps=1, batch_size=4, subnets_per_step=1,
                             teacher="t", arch_warmup_iters=0, shrink=shrink)
    archs = ({"n_layer": 2, "n_embd": n, "n_head": [1, 1], "mlp_ratio": [2, 2]} for n in (16, 32))
    small, large = (net.cost(arch)["flops"] for arch in archs)
    mean = (small + large) / 2
    expected = 4 * (4 * (3 + 1) * large + 6 * (2 * 3 + 1) * mean + 5 * 2 * mean)
    assert report.search_flops(net, search, 5) == pytest.approx(expected)


def test_killed_and_rerun_it_has_the_same_numbers_and_trains_nothing_again(
        searched, reported, data_dir, tmp_path):
    shutil.copytree(searched, tmp_path / "s", ignore=shutil.ignore_patterns("report"))
    command = ["report.py", str(tmp_path / "s"), *flags(SMALL | dict(data_dir=data_dir))]
    runs = tmp_path / "s/report/runs"
    third = f"event == 'return' and len(glob({str(runs)!r} + '/*/result.json')) > 2"
    killed_in("write_json", third, *command)
    done = {path: path.stat().st_mtime_ns for path in runs.glob("*/result.json")}
    assert len(done) >= 3 and not (runs.parent / "report.json").exists()
    memory = runs.parent / "inherited.jsonl"
    scored = memory.read_bytes()
    memory.write_bytes(scored + b'{"supernet": "0') # as if it had been killed while it wrote
    assert "of which 0 are left" not in succeeds(*command)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert memory.read_bytes() == scored
    assert numbers_of(tmp_path / "s/report") == numbers_of(reported)


class Page(html.parser.HTMLParser):
    """Every tag closed in order, and the text of the page."""
    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.text = [], [], ""
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_stands_alone(reported):
    text = (reported / "report.html").read_text()
    page, numbers = Page(text), json.loads((reported / "report.json").read_text())
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.seen}
    assert "http" not in text and "url(" not in text
    images = [attrs["src"] for tag, attrs in page.seen if tag == "img"]
    assert len(images) == 3 and all(src.startswith("data:image/png;base64,") for src in images)
    markdown = (reported / "report.md").read_text()
    for said in (numbers["verdict"], "report.py", *numbers["networks"], numbers["made"]["commit"],
                 "Kendall's tau"):
        assert said in page.text and said in markdown, said
    blocks = [("h1", "a <b> & c"), ("table", ["x\"y"], [["<script>"]])]
    assert "<b>&lt;" not in Page(report.to_html(blocks)).text


def test_more_networks_are_added(searched, reported, data_dir):
    before = numbers_of(reported)
    more = SMALL | dict(data_dir=data_dir, n_random=3, n_rank=5)
    said = succeeds("report.py", str(searched), *flags(more))
    after = numbers_of(reported)
    assert all(after[name] == before[name] for name in ("found", "largest", "random 1", "random 2"))
    assert after["ranked"][:4] == before["ranked"] and "trainings of 4 steps" in said


def test_accuracies_of_an_image_space(digits_dir, tmp_path):
    options = dict(space="toy_conv_macro", data_dir=digits_dir, out_dir=tmp_path)
    script("train_search.py", *flags(TINY_IMAGES | TINY_SPACES["toy_conv_macro"] | options))
    sizes = TINY_IMAGES | dict(n_pick=0, n_rank=3, n_random=1, seeds=[1, 2], data_dir=digits_dir)
    script("report.py", str(tmp_path), *flags(sizes))
    numbers = json.loads((tmp_path / "report/report.json").read_text())
    assert "test accuracy" in numbers["metric"] and "standard" not in numbers["networks"]
    assert all(0 <= value <= 100 for n in numbers["networks"].values() for value in n["test"])
    assert "no standard shape" in (tmp_path / "report/report.md").read_text()


def test_a_search_from_a_gpt2_has_its_vocabulary(data_dir, tmp_path):
    """Which is not rounded up, as that of a network from scratch would be."""
    shutil.copytree(data_dir, tmp_path / "data")
    meta = tmp_path / "data/pydocs/meta.json"
    write_json(meta, read_json(meta) | {"vocab_size": 1001})
    save_gpt2(tmp_path / "gpt2", 1001)
    options = dict(data_dir=tmp_path / "data", out_dir=tmp_path / "s", init_from=tmp_path / "gpt2",
                   target_params=60_000)
    script("train_search.py", *flags(TINY_SEARCH | SPACE | options))
    moved = tmp_path / "moved"
    (tmp_path / "s").rename(moved)
    script("report.py", str(moved), *flags(SMALL | dict(n_pick=2, n_rank=3, n_random=1)))
    page = (moved / "report/report.md").read_text()
    assert "Did the search pay?" in page
    assert f"had been trained before, {tmp_path / 'gpt2'}, is not" in page
    still = dict(n_pick=0, n_rank=0, n_random=1, max_iters=1, learning_rate=0.0, min_lr=0.0)
    for origin, start, same in (("scratch", "scratch", False), # the seeds end as they start
                                (moved, f"the weights in {moved}", True)):
        script("report.py", str(moved), *flags(SMALL | still | dict(init_from=origin)))
        assert f"alike, from {start}, for" in (moved / "report/report.md").read_text()
        numbers = read_json(moved / "report/report.json")
        assert all((len(set(n["test"])) == 1) == same for n in numbers["networks"].values())


def test_what_cannot_be_reported_is_one_sentence(searched, tmp_path):
    assert "two or more different" in stops("report.py", str(searched), "--seeds=[1,1]")
    said = stops("report.py", str(searched), "--seeds=[1.5,2]")
    assert "seeds=[1.5, 2] must be whole numbers" in said
    assert "n_random=-1 must be 0 or more" in stops("report.py", str(searched), "--n_random=-1")
    assert "max_iters=0 must be 1 or more" in stops("report.py", str(searched), "--max_iters=0")
    assert "val_portion" in stops("report.py", str(searched), "--val_portion=0.0")
    assert "leave it out" in stops("report.py", str(searched), "--init_from=resume")
    assert "n_rank=2 networks have no order" in stops("report.py", str(searched), "--n_rank=2")
    assert "cannot be read" in stops("report.py", str(tmp_path))
    shutil.copy(searched / "arch.json", tmp_path)
    assert "no finished search" in stops("report.py", str(tmp_path))


def test_help_lists_the_keys_of_a_report():
    said = succeeds("report.py", "--help")
    assert "n_rank = 20" in said and "learning_rate = " in said and "arch_traj" not in said
