"""The training recipes: each does what its paper says, by its moments; the seed alone decides;
only what trains the weights is changed."""
import data
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_SPACES, fails, flags, succeeds
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_image
from test_survival import state_of
from test_vision import parts, search_config, signalled, space_config
from torch.nn import functional as F

import data as recipes
from configurator import defaults
import train
import train_base
import train_search
from data import get_images, load_images
from optim_nas import uniform
from run import read_lines, rng
from search_spaces import build

OFF = defaults(vars(recipes.ImageKeys))
ALL = dict(label_smoothing=0.1, mixup=0.8, cutmix=1.0, rand_augment=9, random_erasing=0.25,
           repeated_augmentation=2, color_jitter=0.4,
           resized_crop=0.5, resolutions=[0, 6, 12])


def some(**on):
    return SimpleNamespace(**OFF | on)


def photo(size=64):
    return Image.fromarray(load_sample_image("flower.jpg")[100:100 + size, 300:300 + size])


def pixels_of(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255

# ---- what each key does

def test_all_off_changes_nothing(digits_dir, tmp_path):
    config, _, splits, _ = parts(search_config("toy_cell", digits_dir, tmp_path))
    x, y = splits["train"].batch(config, "train", 3)
    plain = get_images(splits["train"], data.batch_indices(len(splits["train"]), config.batch_size,
                                                           3, config.seed, "train"))
    assert torch.equal(x, plain[0]) and torch.equal(y, plain[1]) and y.dtype == torch.int64


FILL = (51, 102, 153)


def moved(image, matrix):
    return image.transform(image.size, Image.AFFINE, matrix, Image.BILINEAR, fillcolor=FILL)


OPERATIONS = {
    "auto_contrast": ImageOps.autocontrast, "equalize": ImageOps.equalize,
    "invert": ImageOps.invert,
    "posterize": lambda image: ImageOps.posterize(image, 4 - int(4 * 0.6)),
    "solarize": lambda image: ImageOps.solarize(image, 0.4 * 255),
    "solarize_add": lambda image: image.point(lambda v: min(255, v + 66) if v < 128 else v),
    "color": lambda image: ImageEnhance.Color(image).enhance(1.54),
    "contrast": lambda image: ImageEnhance.Contrast(image).enhance(1.54),
    "brightness": lambda image: ImageEnhance.Brightness(image).enhance(1.54),
    "sharpness": lambda image: ImageEnhance.Sharpness(image).enhance(1.54),
    "rotate": lambda image: image.rotate(18, Image.BILINEAR, fillcolor=FILL),
    "shear_x": lambda image: moved(image, (1, 0.18, -0.18 * 32, 0, 1, 0)),
    "shear_y": lambda image: moved(image, (1, 0, 0, 0.18, 1, -0.18 * 32)),
    "translate_x": lambda image: moved(image, (1, 0, 0.27 * 64, 0, 1, 0)),
    "translate_y": lambda image: moved(image, (1, 0, 0, 0, 1, 0.27 * 64))}


def test_the_operations_are_all_tested():
    assert list(recipes.operations(0)) == list(OPERATIONS)


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_pillows(name):
    """At level 6 of 10, to a grey level; where the border comes in, two ways to fill it may
    differ."""
    x, mean = pixels_of(photo()), torch.tensor(FILL).view(3, 1, 1) / 255
    own = recipes.operations(mean)[name](x, torch.tensor([0.6]), torch.tensor([1]))
    wrong = (own - pixels_of(OPERATIONS[name](photo()))).abs() > 1.6 / 255
    assert wrong.float().mean() < (0.03 if name[:5] in ("rotat", "shear", "trans")
                                   else 1e-9), wrong.float().mean()
    mirrored = recipes.operations(mean)[name](x, torch.tensor([0.6]), torch.tensor([-1]))
    signed = name not in ("auto_contrast", "equalize", "invert", "posterize", "solarize",
                          "solarize_add")
    assert torch.equal(own, mirrored) != signed


def test_rand_augment_draws_for_every_image():
    """A quarter of the images goes through no operation, and the others are almost all
    different."""
    x = 0.2 + 0.6 * torch.rand(1, 3, 8, 8, generator=rng(1)).repeat(4000, 1, 1, 1)
    y = recipes.rand_augment(x, torch.full((3, 1, 1), 0.5), 9, rng(2))
    same = (y == x).flatten(1).all(1)
    assert abs(same.sum() - 1000) < 140 and 0 <= y.min() and y.max() <= 1
    assert len({image.numpy().tobytes() for image in y}) > 2000
    assert torch.equal(y, recipes.rand_augment(x, torch.full((3, 1, 1), 0.5), 9, rng(2)))


def mixed(seed, **on):
    """Of two images of 0 and 1 and their labels, mixed: the first image's pixels (16, 16), and the
    share of the second in its label."""
    x = torch.arange(2.).view(2, 1, 1, 1).expand(2, 1, 16, 16)
    x, y = recipes.change_batch(x, torch.arange(2), 2, some(**on), rng(seed))
    if y.dim() > 1:
        torch.testing.assert_close(y, y.flip(0, 1))
        torch.testing.assert_close(y.sum(1), torch.ones(2))
    return x[0, 0], y[0, 1].item() if y.dim() > 1 else 0.0


@pytest.mark.parametrize("alpha", [0.2, 0.8, 2.0])
def test_the_weights_of_mixup_are_beta(alpha):
    n, found = 2000, []
    for seed in range(n):
        x, share = mixed(seed, mixup=alpha)
        assert (x == x[0, 0]).all() and abs(x[0, 0].item() - share) < 1e-6
        found.append(share)
    variance = 1 / (4 * (2 * alpha + 1))
    assert (abs(np.mean(found) - 0.5) < 5 * math.sqrt(variance / n) and np.var(found) ==
            pytest.approx(variance, rel=0.1))


def test_the_area_of_cutmix_is_its_share_of_the_label():
    shares = []
    for seed in range(1000):
        x, share = mixed(seed, cutmix=1.0)
        box = x == 1
        assert torch.equal(box, box.any(1, keepdim=True) & box.any(0)), "a box"
        assert ((x == 0) | box).all(), "a box"
        assert abs(x.mean().item() - share) < 1e-6
        shares.append(share)
    # uniform on (0, 1), but for what the border cuts off
    assert 0.15 < np.mean(shares) < 0.5 and min(shares) == 0 and max(shares) > 0.8


@pytest.mark.parametrize("prob, switch", [(1.0, 0.5), (0.7, 0.2)])
def test_a_batch_is_mixed_one_way(prob, switch):
    kinds = {"none": 0, "cut": 0, "mixed": 0}
    for seed in range(1500):
        x, share = mixed(seed, mixup=1.0, cutmix=1.0, mix_prob=prob, mix_switch=switch)
        whole = ((x == 0) | (x == 1)).all()
        kinds["mixed" if not whole else "cut" if share > 0 else "none"] += 1
    assert (abs(kinds["mixed"] / 1500 - prob * (1 - switch)) < 0.05 and kinds["cut"] / 1500 <
            prob * switch + 0.05)
    assert kinds["cut"] / 1500 > prob * switch * 0.85 - 0.05, "boxes of no pixel are rare"


def test_label_smoothing_is_pytorchs():
    logits, y = torch.randn(50, 7, generator=rng(0)), torch.arange(50) % 7
    x, soft = recipes.change_batch(torch.zeros(50, 1, 4, 4), y, 7, some(label_smoothing=0.1),
                                   rng(0))
    assert soft.shape == (50, 7) and torch.equal(soft.argmax(1), y) and not x.any()
    torch.testing.assert_close(soft.sum(1), torch.ones(50))
    expected = F.cross_entropy(logits, y, label_smoothing=0.1)
    torch.testing.assert_close(F.cross_entropy(logits, soft), expected)


def test_what_is_erased():
    n, side = 4000, 32
    x = recipes.erase(torch.full((n, 3, side, side), 7.0), 0.25, rng(1))
    hidden = x != 7
    assert torch.equal(hidden, hidden[:, :1].expand_as(hidden)), "all channels at once"
    rows, columns = hidden[:, 0].any(2), hidden[:, 0].any(1)
    assert torch.equal(hidden[:, 0], rows[:, :, None] & columns[:, None])
    h, w = rows.sum(1), columns.sum(1)
    erased = h > 0
    assert abs(erased.sum() / n - 0.25) < 5 * math.sqrt(0.25 * 0.75 / n)
    area, ratio = (h * w)[erased] / side**2, (w / h)[erased]
    assert 0.015 < area.min() and area.max() < 0.36 and 0.25 < ratio.min() and ratio.max() < 4
    assert abs(area.mean() - (0.02 + 1 / 3) / 2) < 0.02 and abs(ratio.log().mean()) < 0.1
    noise = x[hidden]
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    covered = hidden[erased, 0].float().mean(0)
    assert max((covered - covered.flip(dim)).abs().max()
               for dim in (0, 1)) < 0.1 and covered[side // 2, side // 2] > 0.2


def test_a_resized_crop_is_a_box_of_the_image():
    n, side, smallest = 3000, 16, 0.3
    ramp = (torch.arange(side) + 0.5) / side
    column, row = ramp.expand(side, side), ramp[:, None].expand(side, side)
    x = torch.stack((column, row))[None].repeat(n, 1, 1, 1)
    y = recipes.resized_crop(x, smallest, rng(1))
    w = (y[:, 0, 0, side - 4] - y[:, 0, 0, 3]) * side / (side - 7)
    h = (y[:, 1, side - 4, 0] - y[:, 1, 3, 0]) * side / (side - 7)
    area, ratio = h * w, w / h
    assert (area.min() > smallest - 0.01 and area.max() < 1.01 and ratio.min() > 0.74
            and ratio.max() < 1.35)
    # boxes near the whole are drawn anew more often
    assert abs(ratio.log().mean()) < 0.02 and 0.55 < area.mean() < 0.65
    middle = y[:, :, 7:9, 7:9].mean((2, 3))
    assert (middle > 0.25).all() and (middle < 0.75).all()
    assert (middle.mean(0) - 0.5).abs().max() < 0.01


def test_color_jitter_is_uniform():
    x = torch.full((4000, 3, 4, 4), 0.5)
    # grey: contrast and saturation leave it as it is
    y = recipes.color_jitter(x, 0.4, rng(1))[:, 0, 0, 0] * 2
    assert (y.min() > 0.599 and y.max() < 1.401 and abs(y.mean() - 1) < 0.02
            and abs(y.std() - 0.8 / math.sqrt(12)) < 0.01)
    one = pixels_of(photo()).repeat(20, 1, 1, 1)
    assert len({image.numpy().tobytes() for image in recipes.color_jitter(one, 0.4, rng(2))}) == 20


def test_copies_of_an_image_are_changed_differently(digits_dir, tmp_path):
    config, _, splits, _ = parts(search_config("toy_cell", digits_dir, tmp_path,
                                                 repeated_augmentation=4, crop=2, resized_crop=0.5))
    images, seen = splits["train"], []
    for step in range(4):
        x, y = images.batch(config, "train", step)
        assert len(x) == 8 and y.view(2, 4).eq(y.view(2, 4)[:, :1]).all()
        assert len({image.numpy().tobytes() for image in x}) == 8
        seen += data.batch_indices(len(images), 2, step, config.seed, "train").tolist()
    assert len(set(seen)) == 8


def test_resolutions_are_equally_likely(digits_dir, tmp_path):
    config, _, splits, _ = parts(search_config("toy_cell", digits_dir, tmp_path,
                                                 resolutions=[0, 4, 13]))
    sizes = [splits["train"].batch(config, "train", step)[0].shape[-2:] for step in range(300)]
    counts = {n: sizes.count((n, n)) for n in (8, 4, 13)}
    assert sum(counts.values()) == 300 and min(counts.values()) > 60
    assert splits["search"].batch(config, "search", 0)[0].shape[-1] == 8


# which has no classes
@pytest.mark.parametrize("space", [space for space in TINY_SPACES if space != "swinir"])
def test_every_space_learns_from_probabilities(space, digits_dir):
    net = build(search_config(space, digits_dir, "") | dict(img_size=8, in_channels=1,
                                                            num_classes=10))
    arch, y = uniform(net.choices, rng(0)), torch.arange(8)
    x = torch.randn(8, 1, 8, 8, generator=rng(1))
    losses = [net.eval()(x, target, arch)[1] for target in (y, F.one_hot(y, 10).float())]
    torch.testing.assert_close(*losses)

# ---- whole runs

def test_the_seed_decides_and_nothing_else_is_drawn_from(digits_dir, tmp_path):
    config, _, splits, _ = parts(search_config("toy_cell", digits_dir, tmp_path, **ALL))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    x, y = splits["train"].batch(config, "train", 3, 1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = splits["train"].batch(config, "train", 3, 1)
    assert torch.equal(x, again[0]) and torch.equal(y, again[1])
    config.seed += 1
    other = splits["train"].batch(config, "train", 3, 1)
    assert other[0].shape != x.shape or not torch.equal(x, other[0])


@pytest.mark.parametrize("name", ["search", "train"])
def test_a_resumed_run_is_one_that_was_not_stopped(name, digits_dir, tmp_path):
    options = dict(max_iters=8, eval_interval=4, crop=1, flip=True, **ALL)
    if name == "search":
        config, go = search_config("toy_cell", digits_dir, tmp_path / "whole",
                                   **options), train_search.search
    else:
        config, arch = space_config(train, "nb201", digits_dir, tmp_path / "whole",
                                    **options), {"cell": ["nor_conv_3x3"] * 6}

        def go(config):
            train.train(config, arch)
    go(config)
    module = train_search if name == "search" else train
    with signalled(module, "train_step", lambda *args: args[6].step == 4):
        go(config | {"out_dir": str(tmp_path / "parts")})
    go(config | {"out_dir": str(tmp_path / "parts"), "init_from": "resume"})
    assert state_of(tmp_path / "whole") == state_of(tmp_path / "parts")


RANKS = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import train_search
from test_recipes import TWO, search_config
import data
import data
train_search.search(search_config("toy_cell", {data!r}, {out!r}, **TWO))
"""
# dropout is each process's own
TWO = dict(gradient_accumulation_steps=2, crop=1, dropout=0.0, **ALL)


def test_two_processes_find_what_one_finds(digits_dir, tmp_path):
    train_search.search(search_config("toy_cell", digits_dir, tmp_path / "one", **TWO))
    places = dict(root=str(ROOT), tests=str(ROOT / "tests"), data=digits_dir,
                  out=str(tmp_path / "two"))
    (tmp_path / "ranks.py").write_text(RANKS.format(**places))
    succeeds("torchrun", "--standalone", "--nproc_per_node=2", str(tmp_path / "ranks.py"))
    one, two = (read_lines(tmp_path / name / "log.jsonl") for name in ("one", "two"))
    assert len(one) == len(two) > 4
    for a, b in zip(one, two, strict=True):
        for key in [key for key, value in a.items() if isinstance(value, float)
                    and key not in ("ms", "images_per_s")]:
            assert a[key] == pytest.approx(b[key], abs=1e-5), f"{key} at step {a['step']}"


@pytest.mark.parametrize("name", ["search", "base"])
def test_only_what_trains_the_weights_is_changed(name, digits_dir, tmp_path, monkeypatch):
    """Of all batches that the network sees, those of the weight steps alone hold other images than
    the data, or have probabilities."""
    images = load_images(digits_dir, "digits", "train")
    known = {image.numpy().tobytes() for split in ("train", "val") for image in
             get_images(load_images(digits_dir, "digits", split),
                        torch.arange(len(load_images(digits_dir, "digits", split))))[0]}
    seen, real = [], train.build

    def spied(config, arch=None):
        net = real(config, arch)
        net.register_forward_pre_hook(lambda net, args: seen.append(
            (torch.is_grad_enabled() and all(p.requires_grad for p in net.parameters()),
             args[1] is None or args[1].dtype == torch.int64,
             all(image.numpy().tobytes() in known for image in args[0]))) if len(args[0]) > 1
                                      else None)
        return net
    for module in (train, train_search):
        monkeypatch.setattr(module, "build", spied)
    options = dict(batch_size=32, **ALL | dict(resolutions=[0]))
    if name == "search":
        train_search.search(search_config("toy_cell", digits_dir, tmp_path / "s", **options))
    else:
        config = space_config(train_base, "nb201", digits_dir, tmp_path / "b", **options)
        train.train({key: value for key, value in config.items() if key != "arch"},
                    {"cell": ["nor_conv_3x3"] * 6}, test=True)
    steps, rest = ([s[1:] for s in seen if s[0] is trains] for trains in (True, False))
    assert len(images) == 1438
    assert steps == [(False, False)] * 4, "classes and images as they are, none of either"
    assert len(rest) > 8 and set(rest) == {(True, True)}


@pytest.mark.parametrize("change, words", [
    (dict(label_smoothing=1.5), ["label_smoothing=1.5", "0 to 1"]),
    (dict(mixup=-1.0), ["mixup=-1.0", "0 or more"]),
    (dict(rand_augment=11), ["rand_augment=11", "0 to 10"]),
    (dict(random_erasing=-0.1), ["random_erasing=-0.1"]),
    (dict(repeated_augmentation=3), ["repeated_augmentation=3", "batch_size=8"]),
    (dict(repeated_augmentation=0), ["repeated_augmentation=0"]),
    (dict(resolutions=[8.5]), ["resolutions=[8.5]", "whole"]),
    (dict(resolutions=-8), ["resolutions=-8"]),
    *((dict([(key, -1)]), [f"{key}=-1 must be 0 or more"])
      for key in ("crop", "cutout", "bn_batches"))])
def test_a_mistake_is_one_sentence(change, words, digits_dir, tmp_path):
    with pytest.raises(SystemExit) as stop:
        train_search.search(search_config("toy_cell", digits_dir, tmp_path / "s", **change))
    assert all(word in stop.value.code for word in words)
    assert "\n" not in stop.value.code and not (tmp_path / "s").exists()


def test_a_network_of_one_size_is_told_before_it_trains(digits_dir, tmp_path):
    line = fails("train_search.py", "--space=toy_conv_macro", f"--data_dir={digits_dir}",
                 f"--out_dir={tmp_path}/s", "--device=cpu",
                 "--resolutions=[0,16]", "--batch_size=8", *flags(TINY_SPACES["toy_conv_macro"]))
    assert ("resolutions=[0, 16]" in line and "toy_conv_macro" in line
            and not (tmp_path / "s").exists())


def test_without_kornia_only_what_needs_it_says_so(digits_dir, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "kornia"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "kornia", None)
    for key, value in (("rand_augment", 9), ("color_jitter", 0.4)):
        with pytest.raises(SystemExit, match="pip install kornia"):
            train_search.search(search_config("toy_cell", digits_dir, tmp_path / "s",
                                              **{key: value}))
    rest = {key: value for key, value in ALL.items() if key not in ("rand_augment", "color_jitter")}
    train_search.search(search_config("toy_cell", digits_dir, tmp_path / "s", **rest))
