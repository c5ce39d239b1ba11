"""Super-resolution: the law of exactness in SwinIR's space, its counts, windows and tiles; pairs
of images, and how they are measured."""
import contextlib
import itertools
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, killed_in, turn_kernels_on
from PIL import Image
from test_size_spaces import agree, some_archs, weights_of
from test_spaces import check_law, generator, mixed

from configurator import ConfigError
import prepare as p
import fused_ops
import train
from search_spaces import swinir
from search_spaces.convs import Conv2d
from supernet import Size, check_arch, extremes, one_hot, prefix_masks, straight_through_arch
import data
import run as runs

SHARED = Path(os.environ.get("NAS_DATA") or ROOT.parent / "shared/data") / "sr/sr_sets.zip"
needs_sets = pytest.mark.skipif(not SHARED.exists(), reason=f"no Set5 at {SHARED} (set NAS_DATA)")
TINY = dict(n_embd=[12, 24], n_rstb=[1, 2], n_layer=[1, 2, 3], n_head=[2, 3], mlp_ratio=[1, 2],
            window_size=4, patch=8)


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request):
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)
    fused_ops.use_fused_ops(False)


def make(**rest):
    """A tiny supernet in which no weight is 0 or 1."""
    torch.manual_seed(0)
    net = swinir.build(TINY | rest).to(torch.get_default_dtype())
    for q in net.parameters():
        q.data.add_(0.1 * torch.randn_like(q))
    return net


def batch(seed=0, h=9, w=14, s=2):
    """Of a size that is no multiple of the window."""
    return (torch.rand(2, 3, h, w, generator=generator(seed)),
            torch.rand(2, 3, s * h, s * w, generator=generator(seed)))


def uniform_arch(n_embd, n_head, n_rstb, n_layer, mlp_ratio, blocks=4):
    arch = {"n_embd": n_embd, "n_rstb": n_rstb}
    for r in range(1, blocks + 1):
        arch |= {f"n_layer_{r}": n_layer, f"n_head_{r}": [n_head] * n_layer,
                 f"mlp_ratio_{r}": [mlp_ratio] * n_layer}
    return arch

# ---- the network

@pytest.mark.parametrize("kernels", [False, True], ids=["pytorch", "kernels"])
def test_law_of_exactness(kernels, dtype):
    """One-hot mixture, hard architecture and extracted network: image, loss, and the gradient of
    everything that they share."""
    if kernels:
        turn_kernels_on()
    check_law(make(), some_archs(make()), batch)


def test_straight_through_options_have_the_gradients_of_the_mixture(dtype):
    net, (x, y) = make(), batch()
    for arch in some_archs(net):
        soft, hard = ({name: w.to(dtype).requires_grad_()
                       for name, w in one_hot(net.choices, arch).items()} for _ in range(2))
        for third in (soft, straight_through_arch(net.choices, hard)):
            net(x, y, third)[1].backward()
        scale = max(w.grad.abs().max() for w in soft.values() if w.grad is not None)
        for key, w in soft.items():
            if hard[key].grad is not None:
                chosen = w.detach() > 0
                tolerance = 1e-4 if dtype is torch.float32 else 1e-9
                difference = (hard[key].grad[chosen] - w.grad[chosen]).abs().max()
                assert difference <= tolerance * scale, key


def test_every_weight_of_a_mixture_has_a_gradient():
    net, (x, y) = make(), batch()
    weights = weights_of(net)
    net(x, y, weights)[1].backward()
    assert all(w.grad.abs().min() > 0 for w in weights.values()), weights


def test_kernels_compute_a_mixture_as_pytorch_does():
    """Also its gradients, to the table of biases among them, with frozen weights and without."""
    net, (x, y), found = make(), batch(), []
    weights = mixed(net)
    for kernels in (False, True):
        turn_kernels_on() if kernels else fused_ops.use_fused_ops(False)
        image, loss = net(x, y, weights)
        found.append([image, *torch.autograd.grad(loss, [*weights.values(), *net.parameters()])])
        net.requires_grad_(False)
        found[-1] += torch.autograd.grad(net(x, y, weights)[1], list(weights.values()))
        net.requires_grad_(True)
    fused_ops.use_fused_ops(False)
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max().clamp_min(1e-3)


@pytest.mark.parametrize("scale, arch, params", [
    # SwinIR-light
    (2, (60, 6, 4, 6, 2), 910_152), (3, (60, 6, 4, 6, 2), 918_267), (4, (60, 6, 4, 6, 2), 929_628),
    (2, (36, 4, 2, 4, 1), 112_440), (2, (48, 4, 3, 5, 1), 317_928), (2, (48, 6, 4, 6, 2), 598_092),
    (2, (36, 6, 4, 6, 2), 354_288)])
def test_published_parameter_counts(scale, arch, params):
    with torch.device("meta"):
        net = swinir.build({"scale": scale}, uniform_arch(*arch))
        assert sum(q.numel() for q in net.parameters()) == params


@pytest.mark.parametrize("patch, tile, mlp_ratio", [(8, 0, [1, 2]), (10, 0, [1, 2]),
                                                    (24, 16, [1, 2]), (8, 0, [1.3, 1.7])])
def test_cost_is_that_of_the_extracted_network_and_its_expectation(patch, tile, mlp_ratio):
    """That of weights is linear in every choice: by all corners of a mixture of two architectures
    in two rows. Tiles cost nothing, and a ratio that makes no whole number of neurons counts those
    that there are."""
    net = make(patch=patch, tile=tile, mlp_ratio=mlp_ratio)
    for arch in some_archs(net):
        small, cost = net.extract(arch), net.cost(arch)
        assert cost == small.cost() and cost["params"] == sum(q.numel() for q in small.parameters())
        of_weights = net.cost(one_hot(net.choices, arch))
        of_weights = {key: value.item() for key, value in of_weights.items()}
        assert of_weights == pytest.approx(cost, rel=1e-9)
    weights = mixed(net)
    rows = [("n_embd", None), ("mlp_ratio_1", 0), ("n_rstb", None)]
    expected = {"params": 0, "flops": 0}
    for places in itertools.product(*(range(net.choices[name].shape[-1]) for name, _ in rows)):
        corner, share = {name: w.detach().clone() for name, w in weights.items()}, 1
        for (name, row), k in zip(rows, places, strict=True):
            target = corner[name] if row is None else corner[name][row]
            share, _ = share * target[k].item(), target.zero_()
            target[k] = 1
        expected = {key: expected[key] + share * value.item()
                    for key, value in net.cost(corner).items()}
    found = {key: value.item() for key, value in net.cost(weights).items()}
    assert found == pytest.approx(expected)


def test_convolution_of_one_width_is_its_padded_sum(dtype):
    torch.manual_seed(0)
    conv, x, w = Conv2d(5, 5, 3, bias=True), torch.randn(2, 5, 6, 6), torch.tensor([0.2, 0.3, 0.5])
    size = Size((2, 3, 5), mask=prefix_masks((2, 3, 5), 5).to(dtype), p=w)
    padded = sum(q * F.pad(F.conv2d(x[:, :n], conv.weight[:n, :n], conv.bias[:n], padding=1),
                           (0, 0, 0, 0, 0, 5 - n))
                 for n, q in zip((2, 3, 5), w, strict=True))
    agree(conv(x, size, size), padded, "output")


def test_windows_and_their_shift_are_those_of_a_plain_computation(dtype):
    """Every pixel attends to those of its window alone; of a shifted window, to those that are its
    neighbours in the image."""
    size, H, W = 4, 8, 12
    image = torch.arange(H * W).view(1, H, W, 1)
    for shift in (0, 2):
        parts = swinir.windows(image, size, shift)
        assert torch.equal(swinir.unwindows(parts, size, shift, H, W), image)
        mask = swinir.shift_mask(H, W, size, shift,
                                 image.device) if shift else torch.zeros(6, 16, 16)
        sees = torch.zeros(H * W, H * W, dtype=torch.bool)
        for part, m in zip(parts.flatten(1), mask, strict=True):
            sees[part[:, None], part] = m == 0
        place = [(divmod(i, W)[0] + shift) // size * 100 + (divmod(i, W)[1] + shift) // size
                 for i in range(H * W)]
        assert torch.equal(sees, torch.tensor(place)[:, None] == torch.tensor(place))


def test_attention_is_a_plain_computation(dtype):
    """With a bias by the difference of places, of one window."""
    torch.manual_seed(0)
    config = SimpleNamespace(**swinir.BLOCK, window_size=2)
    attn, x = swinir.WindowAttention(config, (6,), (3,)).to(dtype), torch.randn(1, 4, 6)
    q, k, v = attn.c_attn(x)[0].chunk(3, -1)
    y = torch.zeros(4, 6)
    for h, i in itertools.product(range(3), range(4)):
        c = slice(2 * h, 2 * h + 2)
        bias = torch.stack([attn.bias.weight[(i // 2 - j // 2 + 1) * 3 + i % 2 - j % 2 + 1, h]
                            for j in range(4)])
        y[i, c] = (q[i, c] @ k[:, c].T / 2 ** 0.5 + bias).softmax(0) @ v[:, c]
    agree(attn(x, None)[0], attn.c_proj(y), "output")


@pytest.mark.parametrize("h, w", [(1, 1), (3, 5), (8, 9), (5, 17)])
def test_images_of_any_size_are_padded_by_reflection(h, w):
    """To whole windows as F.pad does, or numpy, which goes on where an image is shorter than what
    it needs."""
    x = torch.rand(2, 3, h, w, generator=generator())
    found = x[:, :, swinir.reflected(h, 8)[:, None], swinir.reflected(w, 8)]
    bottom, right = -h % 8, -w % 8
    sides = (0, 0), (0, 0), (0, bottom), (0, right)
    assert torch.equal(found, torch.from_numpy(np.pad(x.numpy(), sides, "reflect")))
    if bottom < h and right < w:
        assert torch.equal(found, F.pad(x, (0, right, 0, bottom), mode="reflect"))
    net = make(window_size=8).eval()
    arch = extremes(net.choices)[0]
    y = net(x, None, arch)[0]
    of_whole = net(found, None, arch)[0]
    assert y.shape == (2, 3, 2 * h, 2 * w) and torch.equal(y, of_whole[:, :, :2 * h, :2 * w])


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_images_that_have_a_psnr_are_evaluated(scale):
    """Of 3 pixels a side, of which a border of one is left out; a smaller one is a sentence."""
    def pairs(side):
        pixels = np.random.default_rng(0).integers(0, 256, 15 * side * (1 + scale ** 2),
                                                   dtype=np.uint8)
        return data.Pairs(pixels, np.array([[side, 5]]), np.array([0]), scale)
    config, net = SimpleNamespace(dataset="small", patch=8), make(window_size=8, scale=scale)
    pairs(3).check(config, "val")
    small = net.extract(extremes(net.choices)[0]).eval()
    run = SimpleNamespace(amp=contextlib.nullcontext())
    with torch.no_grad():
        batches = [(*next(data.pair_batches(pairs(3), [0], "cpu")), None)]
        loss, psnr, n = train.tally(small, pairs(3), batches, run).tolist()
    assert n == 1 and 0 < loss < 10 and 0 < psnr < 50
    with pytest.raises(SystemExit, match="the smallest of 2 pixels"):
        pairs(2).check(config, "val")


def test_tiles_make_the_whole_image():
    """Exactly, for what one block of two layers reaches lies within the overlap."""
    net = make(n_embd=12, n_rstb=1, n_layer=2, n_head=2, mlp_ratio=1, window_size=8, tile=16)
    arch, x = extremes(net.choices)[0], torch.rand(1, 3, 77, 90, generator=generator())
    net.eval()
    found = net(x, None, arch)[0]
    net.config.tile = 0
    torch.testing.assert_close(found, net(x, None, arch)[0], atol=1e-5, rtol=1e-5)
    assert found.shape == (1, 3, 154, 180)


def test_the_first_convolution_reaches_the_image_past_all_blocks():
    """With nothing in what follows the blocks, the image still depends on x: the long skip
    connection."""
    net, (x, _) = make(), batch()
    net.conv_last.weight.data.zero_()
    arch = extremes(net.choices)[0]
    assert (net(x, None, arch)[0] - net(x.flip(3), None, arch)[0].flip(3)).abs().max() > 1e-3


def test_drop_path_is_for_training_alone():
    arch, (x, _) = extremes(make().choices)[1], batch()
    net, plain = make(drop_path=0.9).extract(arch), make().extract(arch)
    assert not torch.equal(net(x)[0], plain(x)[0])
    assert torch.equal(net.eval()(x)[0], plain.eval()(x)[0])
    assert torch.equal(make(drop_path=0.9)(x, None, arch)[0],
                       plain(x)[0]), "a supernet drops nothing"


def test_drop_path_drops_all_windows_of_an_image_or_none():
    net = make(drop_path=0.5)
    layer = net.extract(extremes(net.choices)[1]).rstb[-1].layers[-1].train()
    # of 2 x 2 windows
    x = torch.randn(16, 8, 8, layer.ln_1.weight.numel(), generator=torch.Generator().manual_seed(0))
    layer.mlp.register_forward_hook(lambda *args: torch.zeros_like(args[2]))
    layer.attn.register_forward_hook(lambda *args: torch.ones_like(args[2]))
    added = (layer(x) - x).flatten(1)
    assert torch.allclose(added, added[:, :1].expand_as(added), atol=1e-6)
    assert {round(value, 4) for value in added[:, 0].tolist()} == {0.0, 2.0}


def test_genotypes_round_trip():
    with torch.device("meta"):
        net = swinir.build({})
    for arch in some_archs(net):
        text = swinir.genotype(arch)
        again = swinir.arch_of(text)
        assert (swinir.genotype(again) == text == swinir.columns(arch)["genotype"]
                and check_arch(net.choices, again) == again)


@pytest.mark.parametrize("call, message", [
    (lambda: swinir.arch_of("[4, 6]"), "is not a genotype of swinir: write"),
    (lambda: swinir.arch_of('{"n_embd": 36, "n_head": [[4]], "mlp_ratio": [[1, 2]]}'),
     "is not a genotype of swinir"),
    (lambda: swinir.arch_of('{"n_embd": 12, "n_head": {"ab": 1}, "mlp_ratio": {"cd": 1}}'),
     "is not a genotype of swinir"),
    (lambda: make(scale=5), "scale=5 is not 2, 3 or 4"),
    (lambda: make(n_embd=[10]), "n_embd=10 is not divisible by n_head=3"),
    (lambda: make(tile=6), "must divide 32 and tile=6"),
    (lambda: make(drop_path=1.0), "drop_path=1.0 must be at least 0 and below 1"),
    (lambda: make(mlp_ratio=[0.05, 1]), "mlp_ratio=0.05 of n_embd=12 is less than one neuron")])
def test_errors_are_one_sentence(call, message):
    with pytest.raises((ConfigError, SystemExit), match=message) as error:
        call()
    assert "\n" not in str(error.value)

# ---- measures

@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    for scale in (2, 3, 4):
        p.prepare("set5", str(SHARED), data_dir=folder, scale=scale)
    return folder


@needs_sets
@pytest.mark.parametrize("scale, psnr, ssim", [(2, 33.66, 0.9299), (3, 30.39, 0.8682),
                                               (4, 28.42, 0.8104)])
def test_bicubic_interpolation_of_set5_has_the_published_psnr_and_ssim(sets, scale, psnr, ssim):
    """To 0.02 dB: the published ones are of Y in 8 bits."""
    pairs, found = data.load_pairs(sets, "set5", "val", scale), []
    for i, (x, y) in enumerate(data.pair_batches(pairs, range(5))):
        up = F.interpolate(x, scale_factor=scale, mode="bicubic", antialias=True)
        found.append(data.image_quality(up, y, scale, structure=True))
        low, high = pairs.pair(i)
        made = p.shrink(high, scale).astype(int)
        assert np.abs(made - low).max() <= 2, "what we make is what MATLAB made"
    assert np.mean([row["psnr_y"] for row in found]) == pytest.approx(psnr, abs=0.02)
    assert np.mean([row["ssim_y"] for row in found]) == pytest.approx(ssim, abs=0.001)


def test_ssim_is_that_of_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    a = torch.rand(1, 3, 40, 50, generator=generator()).double() * 255
    b = (a + 30 * torch.randn(a.shape, generator=generator(1)).double()).clamp(0, 255)
    settings = dict(data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
                    channel_axis=0, full=True)
    _, full = metrics.structural_similarity(a[0].numpy(), b[0].numpy(), **settings)
    assert data.ssim(a, b) == pytest.approx(full[:, 5:-5, 5:-5].mean(), abs=1e-9)


def test_psnr_is_of_8_bits_and_without_the_border():
    y = torch.full((1, 3, 20, 20), 100 / 255)
    x = y + 0.4 / 255 # rounds away
    x[..., 2:-2, 2:-2] += 10 / 255
    x[..., :2, :] = 1
    found = data.image_quality(x, y, 2)
    # and a number, which a mean can hold
    assert all(100 < value < 200 for value in data.image_quality(y, y, 2).values())
    assert found == pytest.approx({"psnr_rgb": 20 * np.log10(255 / 10),
                                   "psnr_y": 20 * np.log10(255 / (10 * 219 / 255))})

# ---- pairs

def picture(h, w, seed=0):
    y, x = np.mgrid[:h, :w]
    waves = np.stack([128 + 100 * np.sin((seed + k + 1) * x / 9) * np.cos((k + 2) * y / 7)
                      for k in range(3)], 2)
    return waves.astype(np.uint8)


def write_pictures(folder, sizes, name="{}.png"):
    for i, (h, w) in enumerate(sizes):
        file = folder / name.format(i)
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(h, w, i)).save(file)
    return folder


def test_photographs_of_scikit_learn(tmp_path):
    meta = p.prepare("sr_samples", data_dir=tmp_path, scale=3)
    train_pairs, val = (data.load_pairs(tmp_path, "sr_samples", split, 3)
                        for split in ("train", "val"))
    assert (len(train_pairs), len(val), meta["kind"]) == (18, 2, "pairs")
    total = sum(9 * h * w for h, w in train_pairs.shapes)
    assert total == 2 * 426 * 480, "the regions are all of the photographs"
    for i in range(18):
        low, high = train_pairs.pair(i)
        assert low.dtype == np.uint8 and high.shape == (3 * low.shape[0], 3 * low.shape[1], 3)
        up = F.interpolate(data.as_batch([low]), scale_factor=3, mode="bicubic", antialias=True)
        assert data.image_quality(up, data.as_batch([high]),
                                  3)["psnr_y"] > 17, "low and high are of the same place"


def test_images_of_any_size_with_and_without_a_low_resolution(tmp_path):
    write_pictures(tmp_path / "in/train_HR", [(40, 50), (33, 47)])
    write_pictures(tmp_path / "in/valid_HR", [(30, 26)], "a{}.png")
    write_pictures(tmp_path / "in/valid_LR/X2", [(15, 13)], "a{}x2.png")
    shutil.make_archive(tmp_path / "in", "zip", tmp_path / "in")
    for name, path in (("folder", "in"), ("zip", "in.zip")):
        p.prepare("pairs", str(tmp_path / path), data_dir=tmp_path, name=name, img_size=24)
        val, train_pairs = (data.load_pairs(tmp_path, name, split, 2) for split in ("val", "train"))
        low, high = val.pair(0)
        assert np.array_equal(low, picture(15, 13)), "the given low resolution is kept"
        assert np.array_equal(high, picture(30, 26)), "the given low resolution is kept"
        assert len(train_pairs) == 2 * 3 + 2 * 2 and max(train_pairs.shapes.ravel()) <= 12
        assert sum(h * w for h, w in train_pairs.shapes) == 20 * 25 + 16 * 23
    p.prepare("pairs", str(tmp_path / "in.zip/train_HR"), data_dir=tmp_path, name="half",
              val_fraction=0.5)
    sizes = [len(data.load_pairs(tmp_path, "half", split, 2)) for split in ("train", "val")]
    assert sizes == [1, 1]


def test_crops_are_of_the_same_place_and_what_the_generator_says(tmp_path):
    p.prepare("sr_samples", data_dir=tmp_path)
    pairs = data.load_pairs(tmp_path, "sr_samples", "train", 2)
    x, y = data.get_patches(pairs, 16, 24, runs.rng(1), flip=True)
    again = data.get_patches(pairs, 16, 24, runs.rng(1), flip=True)
    assert x.shape == (16, 3, 24, 24) and y.shape == (16, 3, 48, 48)
    assert torch.equal(x, again[0]) and torch.equal(y, again[1])
    assert not torch.equal(x, data.get_patches(pairs, 16, 24, runs.rng(2), flip=True)[0])
    assert (F.avg_pool2d(y, 2) - x).abs().mean() < 0.03, "turned and mirrored alike"


def test_search_and_training_never_share_a_pixel(tmp_path):
    config = SimpleNamespace(space="swinir", dataset="sr_samples", data_dir=str(tmp_path), scale=2,
                             patch=24, train_portion=0.5, init_from="scratch")
    import train_search
    splits, _ = train_search.split_data(config, SimpleNamespace(world=1, master=True))
    taken = [set(map(int, splits[name].offsets)) for name in ("train", "search")]
    assert len(taken[0]) == len(taken[1]) == 9 and not taken[0] & taken[1]
    config.patch = 200
    with pytest.raises(SystemExit, match=r"The train split .* patch=200: choose a smaller patch"):
        train_search.split_data(config, SimpleNamespace(world=1, master=True))
    tiny = replace(splits["val"], shapes=np.array([[2, 9]])) # is not cut into patches
    with pytest.raises(SystemExit, match=r"The val split .* of 2 pixels, and 3 are needed"):
        tiny.check(config, "val")


def test_a_mixture_is_evaluated_on_the_images_of_its_architecture(tmp_path):
    """The statistics of a batch, which this network has no use for, leave none of them out: the
    gap is between two losses of the same."""
    p.prepare("sr_samples", data_dir=tmp_path)
    net, val = make(), data.load_pairs(tmp_path, "sr_samples", "val", 2).part(0, 2)
    config = SimpleNamespace(eval_iters=20)
    run = SimpleNamespace(rank=0, world=1, device="cpu", amp=contextlib.nullcontext())
    arch = extremes(net.choices)[0]
    own, given = (train.estimate(net, val, config, run, "val", lambda i: arch, own_norms)
                  for own_norms in (True, False))
    assert own == given


def test_a_killed_run_is_not_taken_for_whole_and_begins_anew(tmp_path):
    path = write_pictures(tmp_path / "in", [(400, 500)] * 16)
    args = ["prepare.py", "--dataset=pairs", f"--path={path}", f"--data_dir={tmp_path}",
            "--name=killed"]
    part = str(tmp_path / ".killed_x2.part/train.bin.tmp")
    killed_in("read_pair", f"any(map(os.path.getsize, glob({part!r})))", *args)
    words = r"run python prepare.py --dataset=pairs --scale=2 --path=FOLDER --name=killed"
    with pytest.raises(SystemExit, match=words):
        data.load_pairs(tmp_path, "killed", "train", 2)
    for name in ("killed", "whole"):
        p.prepare("pairs", str(path), data_dir=tmp_path, name=name)
    whole, killed = ({f.name: f.read_bytes() for f in (tmp_path / f"{name}_x2").iterdir()}
                     for name in ("whole", "killed"))
    assert killed == whole and sorted(whole) == ["meta.json", "train.bin", "val.bin"]
    file = tmp_path / "whole_x2/train.bin"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(SystemExit, match=r"train.bin is damaged"):
        data.load_pairs(tmp_path, "whole", "train", 2)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(SystemExit, match="whole_x2 is damaged"):
        data.load_pairs(tmp_path, "whole", "val", 2)


@pytest.mark.parametrize("high, low, name", [
    ("HR", "LR_bicubic/X2", "{}x2.png"), ("hr", "lr", "{}.png"), ("high", "low", "{}.png"),
    ("DIV2K_train_HR", "DIV2K_train_LR_bicubic/X2", "{}x2.png"), ("HR", "my low ones", "{}x2.png"),
    ("HR", "LRBI/x2", "{}.png"), ("gt", "lowres", "{}.png")])
def test_the_names_of_low_resolutions(high, low, name, tmp_path, capsys):
    """They are no further high ones; those of another scale are left out, and said so."""
    write_pictures(tmp_path / "in" / high, [(40, 60)] * 3)
    for i in range(3):
        for file, side in ((name.format(i), 20), (f"{i}x4.png", 10)):
            file = tmp_path / "in" / low / file
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (side * 3 // 2, side), (10 * i, 20, 30)).save(file)
    meta = p.prepare("pairs", str(tmp_path / "in"), data_dir=tmp_path)
    assert meta["train_images"] + meta["val_images"] == 3
    val = data.load_pairs(tmp_path, "pairs", "val", 2)
    assert tuple(val.pair(0)[0][0, 0].tolist()) in {(10 * i, 20, 30) for i in range(3)}
    assert "of another scale" in capsys.readouterr().out


def spoil(folder, what):
    write_pictures(folder / "HR", [(40, 40)] * 3)
    if what == "corrupt":
        (folder / "HR/1.png").write_bytes((folder / "HR/1.png").read_bytes()[:200])
    elif what == "other size":
        write_pictures(folder / "LR/X2", [(20, 21)])
        (folder / "LR/X2/0.png").rename(folder / "LR/X2/0x2.png")
    elif what == "small":
        write_pictures(folder / "HR", [(14, 40)])
    elif what == "none":
        shutil.rmtree(folder / "HR")
        (folder / "notes.txt").write_text("nothing")
    elif what == "unnamed":
        write_pictures(folder / "input", [(20, 20)] * 3)
    elif what == "orphan":
        write_pictures(folder / "low", [(20, 20)] * 4)
    elif what == "zip":
        shutil.rmtree(folder)
        folder.write_bytes(b"no archive")


@pytest.mark.parametrize("what, message", [
    ("corrupt", "1.png is damaged or no image"),
    ("other size", r"HR.0.png is 40x40 and its low resolution 21x20, where scale=2 makes"),
    ("small", "0.png is 40x14, of which scale=2 leaves less than 8"), ("none", "notes.txt, which"),
    ("zip", "is damaged"), ("orphan", r"low.3.png, low resolutions of nothing"),
    ("unnamed", r"if one is the low resolution of the other, call its folder LR")])
def test_a_mistake_is_one_sentence(what, message, tmp_path):
    folder = tmp_path / ("in.zip" if what == "zip" else "in")
    spoil(folder, what)
    with pytest.raises(SystemExit, match=message) as error:
        p.prepare("pairs", str(folder), data_dir=tmp_path)
    assert "\n" not in str(error.value)
    assert (not list(tmp_path.glob("pairs_x2/*.tmp"))
            and not (tmp_path / "pairs_x2/meta.json").exists())


@pytest.mark.parametrize("options, message", [
    (dict(dataset="div2k"), "the other pairs need a folder"),
    (dict(dataset="sr_samples", path="x"), "sr_samples is of scikit-learn"),
    (dict(dataset="sr_samples", scale=5), "--scale=5 is not 2, 3 or 4"),
    (dict(dataset="sr_samples", tokenizer="char"), "--tokenizer=char does not fit")])
def test_settings_that_do_not_fit(options, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        p.prepare(**options, data_dir=tmp_path)


def test_learning_rate_is_halved_at_milestones():
    config = SimpleNamespace(learning_rate=1.0, warmup_iters=0, milestones=[10, 20])
    rates = [train.get_lr(step, config) for step in (0, 9, 10, 19, 20, 99)]
    assert rates == [1, 1, 0.5, 0.5, 0.25, 0.25]
