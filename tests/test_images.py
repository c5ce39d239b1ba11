"""Images by prepare.py: every form of --path gives the same pixels, and a batch depends on its
generator and index alone."""

import gzip
import io
import re
import runpy
import struct
import sys
import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED, fails, killed_in, succeeds
from PIL import Image
from sklearn.datasets import load_digits

import data
import prepare as p
import run as runs

CIFAR = SHARED / "cifar10/cifar10_jpeg_full.npz"
FASHION = Path("/usr/share/datasets/fashion-mnist")


def grey(start, stop):
    """The expected digits: uint8 (N, 8, 8, 1), labels (N,)."""
    digits = load_digits()
    pixels = np.rint(digits.images[start:stop, :, :, None] * 255 / 16).astype(np.uint8)
    return pixels, digits.target[start:stop]


def colour(start, stop):
    pixels, labels = grey(start, stop)
    return np.concatenate([pixels, 255 - pixels, pixels.transpose(0, 2, 1, 3)], 3), labels


def plain(pixels):
    """A set whose normalised images are its pixels."""
    n, C = len(pixels), pixels.shape[3]
    return data.Images(pixels, np.arange(n), np.zeros(C, np.float32), np.ones(C, np.float32), n)


def contents(pixels, labels):
    """Images with their labels, in an order that does not depend on that of the data set."""
    return sorted((image.tobytes(), int(label))
                  for image, label in zip(pixels, labels, strict=True))


def contents_of(splits):
    return contents(np.concatenate([split.pixels for split in splits]),
                    np.concatenate([split.labels for split in splits]))


def facts(meta, *keys):
    return tuple(meta[key] for key in keys)


def encoded(image, form="png"):
    file = io.BytesIO()
    Image.fromarray(image.squeeze()).save(file, form)
    return file.getvalue()


def save(file, data):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)


def idx(array):
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


# each writes {"train": (pixels, labels), "test": ...} into folder / "in" and returns what --path is

def as_idx(folder, splits, pack=bytes, end=""):
    for split, (pixels, labels) in {"train": splits["train"], "t10k": splits["test"]}.items():
        save(folder / f"in/{split}-images-idx3-ubyte{end}", pack(idx(pixels.squeeze(3))))
        save(folder / f"in/{split}-labels-idx1-ubyte{end}", pack(idx(labels)))
    return folder / "in"


def as_idx_gz(folder, splits):
    return as_idx(folder, splits, gzip.compress, ".gz")


def as_npz(folder, splits):
    np.savez(folder / "in.npz", **{f"{key}_{split}": array for split, xy in splits.items()
                                   for key, array in zip("xy", xy, strict=True)})
    return folder / "in.npz"


def as_flat_npz(folder, splits):
    """Grey images without the axis of channels, labels with one too many."""
    return as_npz(folder, {split: (pixels.squeeze(3), labels[:, None].astype(np.uint8))
                           for split, (pixels, labels) in splits.items()})


def as_encoded_npz(folder, splits, form="png"):
    arrays = {"classes": np.array([f"digit {i}" for i in range(10)])}
    for split, (pixels, labels) in splits.items():
        files = [encoded(image, form) for image in pixels]
        arrays[f"{split}_jpeg"] = np.frombuffer(b"".join(files), np.uint8)
        ends = np.cumsum([0] + [len(file) for file in files])
        arrays[f"{split}_offsets"] = ends.astype(np.uint32)
        arrays[f"y_{split}"] = labels
    np.savez(folder / "in.npz", **arrays)
    return folder / "in.npz"


def as_folders(folder, splits, val="val"):
    for split, (pixels, labels) in {"train": splits["train"], val: splits["test"]}.items():
        for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            save(folder / f"in/{split}/digit {label}/{i:03d}.PNG", encoded(image))
    save(folder / "in/README.md", b"about the data")
    return folder / "in"


def as_folders_with_test(folder, splits):
    return as_folders(folder, splits, "test")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    return folder, succeeds("prepare.py", "--dataset=digits", f"--data_dir={folder}")


@pytest.fixture(scope="module")
def train(digits):
    return data.load_images(digits[0], "digits", "train")


# ---- sources

def test_digits_come_with_scikit_learn(digits):
    folder, out = digits
    splits = [data.load_images(folder, "digits", split) for split in ("train", "val")]
    assert [len(images) for images in splits] == [1438, 359]
    assert contents_of(splits) == contents(*grey(0, 1797)), "each is in one split, with its label"
    for images in splits:
        assert images.pixels.dtype == np.uint8 and isinstance(images.pixels, np.memmap)
        assert images.pixels.flags.c_contiguous and not images.pixels.flags.writeable
        assert images.labels.dtype == np.int64 and images.num_classes == 10
    pixels = splits[0].pixels.astype(np.float64)
    np.testing.assert_allclose(splits[1].mean, pixels.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(splits[1].std, pixels.std((0, 1, 2)), rtol=1e-6)
    meta = data.load_meta(folder, "digits")
    assert facts(meta, "kind", "img_size", "in_channels", "seed") == ("images", 8, 1, 1337)
    assert "1,438 images of train, 359 of val, 8x8 in 1 channel, 10 classes\n" in out
    assert out.rstrip().endswith("next: python train_search.py --space=toy_cell --dataset=digits "
                                 f"--data_dir={folder}")
    assert np.load(folder / "digits/val.npy", allow_pickle=False).shape == (359, 8, 8, 1)


@pytest.mark.parametrize("form, kind", [
    (as_idx, grey), (as_idx_gz, grey), (as_flat_npz, grey), (as_npz, grey), (as_npz, colour),
    (as_encoded_npz, grey), (as_encoded_npz, colour), (as_folders, grey), (as_folders, colour),
    (as_folders_with_test, colour)])
def test_every_form_of_path_gives_the_same_images(form, kind, tmp_path):
    splits = {"train": kind(0, 150), "test": kind(150, 200)}
    meta = p.prepare("images", str(form(tmp_path, splits)), data_dir=tmp_path)
    train, val = (data.load_images(tmp_path, "images", split) for split in ("train", "val"))
    assert contents(train.pixels, train.labels) == contents(*splits["train"])
    assert contents(val.pixels, val.labels) == contents(*splits["test"])
    assert not np.array_equal(train.pixels, splits["train"][0]), "the order of train is shuffled"
    assert len(set(val.labels[:20].tolist())) > 6, "an estimate takes the first ones"
    nameless = form in (as_idx, as_idx_gz, as_npz, as_flat_npz)
    assert meta["classes"] == (None if nameless else [f"digit {i}" for i in range(10)])
    assert train.num_classes == 10
    assert meta["in_channels"] == len(train.mean) == (1 if kind is grey else 3)


def test_jpegs_are_what_pillow_decodes(tmp_path):
    splits = {"train": colour(0, 100), "test": colour(100, 120)}
    path = as_encoded_npz(tmp_path, splits, "jpeg")
    p.prepare("cifar10", str(path), data_dir=tmp_path, name="small")
    val = data.load_images(tmp_path, "small", "val")
    decoded = [np.asarray(Image.open(io.BytesIO(encoded(image, "jpeg"))).convert("RGB"))
               for image in splits["test"][0]]
    assert contents(val.pixels, val.labels) == contents(decoded, splits["test"][1])


def test_a_folder_of_classes_is_cut_by_val_fraction(tmp_path):
    pixels, labels = grey(0, 200)
    nothing = pixels[:0], labels[:0]
    path = as_folders(tmp_path, {"train": (pixels, labels), "test": nothing}) / "train"
    p.prepare("images", str(path), data_dir=tmp_path, name="a", val_fraction=0.25)
    p.prepare("images", str(path), data_dir=tmp_path, name="b", val_fraction=0.25, seed=7)
    a, b = ([data.load_images(tmp_path, name, split) for split in ("train", "val")]
            for name in "ab")
    assert [len(images) for images in a] == [150, 50]
    for splits in (a, b):
        assert contents_of(splits) == contents(pixels, labels)
        assert len(set(splits[1].labels)) > 5, "the validation split is no run of classes"
    assert not np.array_equal(a[1].pixels, b[1].pixels), "the seed decides"


def test_img_size_takes_the_square_in_the_centre_and_grey_joins_colour(tmp_path):
    wide, tall = np.zeros((8, 24, 3), np.uint8), np.zeros((32, 16), np.uint8)
    wide[:, 8:16], tall[4:28] = (200, 100, 50), 77 # a resized edge mixes with what lies beyond it
    for i in range(4):
        save(tmp_path / f"in/wide/{i}.png", encoded(wide))
        save(tmp_path / f"in/tall/{i}.png", encoded(tall))
    meta = p.prepare("images", str(tmp_path / "in"), data_dir=tmp_path, img_size=8,
                     val_fraction=0.5)
    assert facts(meta, "img_size", "in_channels", "classes") == (8, 3, ["tall", "wide"])
    images = data.load_images(tmp_path, "images", "train")
    for image, label in zip(images.pixels, images.labels, strict=True):
        assert (image == ((200, 100, 50) if label else (77, 77, 77))).all()


def test_hugging_face_sets(tmp_path, monkeypatch):
    import datasets

    def load_dataset(repo, subset, revision=None): # stands for the network
        splits = ("train", "validation" if "imagenet" in repo else "test")
        return datasets.DatasetDict({split: one_split(repo, split) for split in splits})

    def one_split(repo, split):
        columns = {"uoft-cs/cifar10": ("img", "label"), "uoft-cs/cifar100": ("img", "fine_label")}
        image, label = columns.get(repo, ("image", "label"))
        classes = {"uoft-cs/cifar100": 100, "ILSVRC/imagenet-1k": 1000}.get(repo, 10)
        kind = grey if "mnist" in repo else colour
        pixels, labels = kind(*{"train": (0, 60), "test": (60, 80), "validation": (60, 80)}[split])
        names = [f"class {i}" for i in range(classes)]
        features = {image: datasets.Image(), label: datasets.ClassLabel(names=names)}
        rows = {image: [{"bytes": encoded(x)} for x in pixels], label: labels}
        return datasets.Dataset.from_dict(rows, datasets.Features(features))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    expected = {"fashion_mnist": 10, "cifar10": 10, "cifar100": 100, "imagenet": 1000}
    for name, classes in expected.items():
        meta = p.prepare(name, data_dir=tmp_path)
        train, val = (data.load_images(tmp_path, name, split) for split in ("train", "val"))
        kind = grey if name == "fashion_mnist" else colour
        assert contents(train.pixels, train.labels) == contents(*kind(0, 60))
        assert contents(val.pixels, val.labels) == contents(*kind(60, 80))
        assert meta["classes"] == [f"class {i}" for i in range(classes)]
        assert train.num_classes == classes


@pytest.mark.skipif(not CIFAR.exists(), reason=f"no CIFAR-10 at {CIFAR} (set NAS_DATA)")
def test_real_jpegs(tmp_path):
    with np.load(CIFAR, allow_pickle=False) as file:
        cut = {"classes": file["classes"]}
        for split, n in {"train": 1500, "test": 500}.items():
            offsets = file[f"{split}_offsets"][:n + 1]
            cut |= {f"{split}_offsets": offsets, f"y_{split}": file[f"y_{split}"][:n],
                    f"{split}_jpeg": file[f"{split}_jpeg"][:offsets[-1]]}
    np.savez(tmp_path / "cut.npz", **cut)
    meta = p.prepare("cifar10", str(tmp_path / "cut.npz"), data_dir=tmp_path)
    sizes = facts(meta, "train_images", "val_images", "img_size", "in_channels")
    assert sizes == (1500, 500, 32, 3)
    assert meta["classes"][:2] == ["airplane", "automobile"]
    # the known ones of all of CIFAR-10
    known = np.array([[0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]]) * 255
    np.testing.assert_allclose([meta["mean"], meta["std"]], known, atol=5)
    val, stream = data.load_images(tmp_path, "cifar10", "val"), cut["test_jpeg"].tobytes()
    images = [np.asarray(Image.open(io.BytesIO(stream[start:stop])))
              for start, stop in pairwise(cut["test_offsets"].tolist())]
    assert contents(val.pixels, val.labels) == contents(images, cut["y_test"])


@pytest.mark.skipif(not FASHION.is_dir(), reason=f"no Fashion-MNIST in {FASHION} (Debian's "
                                                 "dataset-fashion-mnist)")
def test_fashion_mnist_has_the_known_size(tmp_path):
    meta = p.prepare("fashion_mnist", str(FASHION), data_dir=tmp_path)
    sizes = facts(meta, "train_images", "val_images", "img_size", "in_channels")
    assert sizes == (60_000, 10_000, 28, 1)
    np.testing.assert_allclose([meta["mean"], meta["std"]], [[72.94], [90.02]], atol=0.01)
    train = data.load_images(tmp_path, "fashion_mnist", "train")
    assert np.bincount(train.labels).tolist() == [6000] * 10


# ---- what a folder means

@pytest.mark.parametrize("val", ["valid", "validation", "val", "test", "dev", "eval", "Test"])
def test_the_words_of_hugging_face_make_the_splits(val, tmp_path):
    splits = {"train": colour(0, 60), "test": colour(60, 90)}
    path = as_folders(tmp_path, splits, val)
    meta = p.prepare("images", str(path), data_dir=tmp_path)
    assert meta["classes"] == [f"digit {i}" for i in range(10)]
    for split, given in (("train", "train"), ("val", "test")):
        found = data.load_images(tmp_path, "images", split)
        assert contents(found.pixels, found.labels) == contents(*splits[given])


def test_what_lies_in_a_folder_of_images(tmp_path, capsys):
    """Links are followed, a folder too deep is found, and what is left out is said."""
    x, y = grey(0, 40)
    for i, (image, label) in enumerate(zip(x, y, strict=True)):
        save(tmp_path / f"{'far' if label == 3 else 'in/extra'}/{label}/{i:03d}.jfif",
             encoded(image, "jpeg"))
    (tmp_path / "in/extra/3").symlink_to(tmp_path / "far/3")
    save(tmp_path / "in/__MACOSX/0/._000.png", b"junk")
    save(tmp_path / "in/extra/0/Thumbs.db", b"junk")
    save(tmp_path / "in/LICENSE", b"free")
    (tmp_path / "in/extra/empty").mkdir()
    meta = p.prepare("images", str(tmp_path / "in"), data_dir=tmp_path)
    assert meta["classes"] == [str(i) for i in range(10)]
    splits = [data.load_images(tmp_path, "images", split) for split in ("train", "val")]
    assert sorted(np.concatenate([split.labels for split in splits])) == sorted(y)
    out = capsys.readouterr().out
    for line in ("not data): {}/in/__MACOSX, {}/in/extra/0/Thumbs.db",
                 "about the data): {}/in/LICENSE", "empty folder): {}/in/extra/empty"):
        assert f"left out ({line.format(tmp_path, tmp_path)}" in out, out
    with pytest.raises(SystemExit, match=r"train, and .* in no split"):
        save(tmp_path / "in/extra/train/0.png", encoded(x[0]))
        p.prepare("images", str(tmp_path / "in"), data_dir=tmp_path, name="b")
    meta = p.prepare("images", str(tmp_path / "in"), data_dir=tmp_path, name="c", split="all")
    assert meta["classes"][-1] == "train", "a class of this name"


def test_labels_in_a_table(tmp_path):
    x, y = colour(0, 30)
    rows = ["file_name,label", *(f"images/{i}.png,digit {label}" for i, label in enumerate(y))]
    for i, image in enumerate(x):
        save(tmp_path / f"in/images/{i}.png", encoded(image))
    save(tmp_path / "in/metadata.csv", "\n".join(rows).encode())
    meta = p.prepare("images", str(tmp_path / "in"), data_dir=tmp_path)
    assert meta["classes"] == [f"digit {i}" for i in range(10)]
    splits = [data.load_images(tmp_path, "images", split) for split in ("train", "val")]
    assert contents_of(splits) == contents(x, y)


@pytest.mark.parametrize("form", ["parquet", "saved", "plain"])
def test_rows_of_images(form, tmp_path):
    import datasets
    splits, names = {"train": colour(0, 60), "test": colour(60, 90)}, [str(i) for i in range(10)]
    found = {}
    for split, (pixels, labels) in splits.items():
        features = {"img": datasets.Image(), "label": datasets.ClassLabel(names=names)}
        if form == "plain": # written by another program
            file = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
            features = {"img": file, "label": datasets.Value("int64")}
        rows = {"img": [{"bytes": encoded(image), "path": None} for image in pixels],
                "label": labels}
        found[split] = datasets.Dataset.from_dict(rows, datasets.Features(features))
        if form != "saved":
            found[split].to_parquet(tmp_path / f"in/data/{split}-00000-of-00001.parquet")
    if form == "saved":
        datasets.DatasetDict(found).save_to_disk(str(tmp_path / "in"))
    meta = p.prepare("images", str(tmp_path / "in"), data_dir=tmp_path)
    assert meta["classes"] == (None if form == "plain" else names)
    for split, given in (("train", "train"), ("val", "test")):
        images = data.load_images(tmp_path, "images", split)
        assert contents(images.pixels, images.labels) == contents(*splits[given])


def test_modes_and_orientations(tmp_path):
    """What Pillow reads as another mode, and a photograph that was taken sideways."""
    image = np.zeros((8, 8, 3), np.uint8)
    image[:4], image[:, 6:] = (250, 10, 20), (10, 240, 30)
    whole = Image.fromarray(image)
    pictures = {"a": whole, "b": whole.convert("RGBA"), "c": whole.quantize(4),
                "d": whole.convert("CMYK")}
    for name, picture in pictures.items():
        form = "TIFF" if name == "d" else "PNG"
        file = io.BytesIO()
        picture.save(file, form)
        save(tmp_path / f"in/{name}/0.{form.lower()}", file.getvalue())
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6 # the camera was turned
    Image.fromarray(np.rot90(image)).save(file, "PNG", exif=exif.tobytes())
    save(tmp_path / "in/e/0.png", file.getvalue())
    from PIL import features
    if features.check("avif"):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "AVIF", quality=100, subsampling="4:4:4")
        save(tmp_path / "in/f/0.avif", file.getvalue())
    p.prepare("images", str(tmp_path / "in"), data_dir=tmp_path, val_fraction=0.3)
    for split in ("train", "val"):
        for pixels in data.load_images(tmp_path, "images", split).pixels:
            assert np.abs(pixels.astype(int) - image).max() <= 12, pixels


def test_damaged_images_are_all_named_or_left_out(tmp_path, capsys):
    path = as_folders(tmp_path, {"train": colour(0, 60), "test": colour(60, 80)})
    broken = sorted(path.glob("train/*/*.PNG"))[:50:2] + sorted(path.glob("val/*/*.PNG"))[:2]
    kept = {"train": 60 - 25, "val": 20 - 2}
    for i, file in enumerate(broken):
        file.write_bytes(file.read_bytes()[:i * 4])
    with pytest.raises(SystemExit) as stop:
        p.prepare("images", str(path), data_dir=tmp_path)
    listed = [file for file in broken if str(file) in stop.value.code]
    assert len(listed) == 20 and "27 images cannot be read" in stop.value.code
    assert "7 more: replace them, or leave them out by --skip_damaged=True" in stop.value.code
    meta = p.prepare("images", str(path), data_dir=tmp_path, skip_damaged=True)
    assert {split: meta[f"{split}_images"] for split in kept} == kept
    assert "left out (damaged): " in capsys.readouterr().out
    found = [data.load_images(tmp_path, "images", split) for split in kept]
    whole = [contents(*colour(0, 60)), contents(*colour(60, 80))]
    assert all(set(contents(split.pixels, split.labels)) <= set(of)
               for split, of in zip(found, whole, strict=True)), "with their own labels"


@pytest.mark.skipif(not CIFAR.exists(), reason=f"no CIFAR-10 at {CIFAR} (set NAS_DATA)")
def test_every_form_of_cifar_gives_the_same_arrays(tmp_path):
    import datasets
    with np.load(CIFAR, allow_pickle=False) as file:
        arrays = {"classes": file["classes"]}
        names = [str(name) for name in file["classes"]]
        for split, n in {"train": 900, "test": 300}.items():
            offsets, labels = file[f"{split}_offsets"][:n + 1], file[f"y_{split}"][:n]
            stream = file[f"{split}_jpeg"][:offsets[-1]]
            arrays |= {f"{split}_offsets": offsets, f"{split}_jpeg": stream, f"y_{split}": labels}
            jpegs = [stream[a:b].tobytes() for a, b in pairwise(offsets.tolist())]
            for i, (jpeg, label) in enumerate(zip(jpegs, labels, strict=True)):
                save(tmp_path / f"folder/{split}/{names[label]}/{i:05d}.jpg", jpeg)
            features = datasets.Features({"img": datasets.Image(),
                                          "label": datasets.ClassLabel(names=names)})
            columns = {"img": [{"bytes": jpeg, "path": None} for jpeg in jpegs], "label": labels}
            file_of = tmp_path / f"hub/data/{split}-00000-of-00001.parquet"
            datasets.Dataset.from_dict(columns, features).to_parquet(file_of)
    np.savez(tmp_path / "a.npz", **arrays)
    found = []
    for path in ("a.npz", "folder", "hub"):
        p.prepare("cifar10", str(tmp_path / path), data_dir=tmp_path, name=f"of {path}")
        found.append({file.name: file.read_bytes()
                      for file in (tmp_path / f"of {path}").glob("*.npy")})
    assert len(found[0]) == 4 and found[0] == found[1] == found[2]


# ---- interrupted, finished, changed

def test_a_killed_run_is_not_taken_for_whole_and_begins_anew(tmp_path, capsys):
    pixels, labels = (np.tile(a, (6, *[1] * (a.ndim - 1))) for a in grey(0, 1797))
    path = str(as_npz(tmp_path, {"train": (pixels, labels), "test": grey(0, 50)}))
    folder, command = tmp_path / "killed", "prepare.py --dataset=images --name=killed"
    part = tmp_path / ".killed.part"
    begun = f"os.path.exists({str(part / 'train_labels.npy')!r})"
    killed_in("atomic_write", begun, *command.split(), f"--path={path}", f"--data_dir={tmp_path}")
    assert (part / "train.npy").exists() and not folder.exists()
    options = "--dataset=images --path=FILE_OR_FOLDER --name=killed"
    with pytest.raises(SystemExit, match=f"not prepared: run python prepare.py {options}"):
        data.load_images(tmp_path, "killed", "train")
    for name in ("killed", "whole"):
        p.prepare("images", path, data_dir=tmp_path, name=name)
    whole, killed = ({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()}
                     for name in ("whole", "killed"))
    assert killed == whole
    assert sorted(whole) == ["meta.json", "train.npy", "train_labels.npy", "val.npy",
                             "val_labels.npy"]
    p.prepare("images", path, data_dir=tmp_path, name="killed")
    assert "nothing to do" in capsys.readouterr().out


def test_a_mistake_that_was_corrected_does_not_stay(tmp_path):
    path = as_folders(tmp_path, {"train": grey(0, 100), "test": grey(100, 150)})
    broken = path / "val/digit 1/bad.png"
    save(broken, encoded(grey(0, 1)[0])[:60])
    with pytest.raises(SystemExit, match=r"1 image cannot be read: .*digit 1/bad.png"):
        p.prepare("images", str(path), data_dir=tmp_path)
    assert not list(tmp_path.glob("images/*.tmp"))
    broken.unlink()
    assert p.prepare("images", str(path), data_dir=tmp_path)["val_images"] == 50


def test_other_settings_and_files_of_another_program_are_not_replaced(digits, tmp_path):
    for options, word in (({"seed": 7}, "seed=1337 and not 7"),
                          ({"img_size": 4}, "resize=0 and not 4"),
                          ({"dataset": "pydocs", "name": "digits"},
                           "dataset='digits' and not 'pydocs'")):
        with pytest.raises(SystemExit, match=word):
            p.prepare(**{"dataset": "digits", "data_dir": digits[0], **options})
    save(tmp_path / "digits/train.npy", b"precious")
    with pytest.raises(SystemExit, match="another program"):
        p.prepare("digits", data_dir=tmp_path)
    assert (tmp_path / "digits/train.npy").read_bytes() == b"precious"


@pytest.mark.parametrize("file", ["train.npy", "train_labels.npy", "val.npy", "val_labels.npy"])
def test_damage_is_found_before_training(file, tmp_path):
    p.prepare("digits", data_dir=tmp_path)
    split, path = file.split(".")[0].split("_")[0], tmp_path / "digits" / file
    content = path.read_bytes()
    path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    with pytest.raises(SystemExit, match=f"{file} is damaged"):
        data.load_images(tmp_path, "digits", split)
    path.write_bytes(content[:-1])
    for use in (lambda: data.load_meta(tmp_path, "digits"),
                lambda: p.prepare("digits", data_dir=tmp_path)):
        with pytest.raises(SystemExit, match=r"digits is damaged.*prepare it again"):
            use()
    path.unlink()
    with pytest.raises(SystemExit, match="damaged"):
        data.load_images(tmp_path, "digits", split)


def test_text_is_no_images_and_images_are_no_text(digits, data_dir):
    for use in (data.load_tokens, lambda *args: data.load_codec(*args[:2])):
        with pytest.raises(SystemExit, match="digits holds images, where text should be"):
            use(digits[0], "digits", "train")
    with pytest.raises(SystemExit, match="pydocs holds text, where images should be"):
        data.load_images(data_dir, "pydocs", "train")


def test_not_all_images_are_in_memory(tmp_path):
    path = as_folders(tmp_path, {"train": colour(0, 1000), "test": colour(0, 20)})
    tracemalloc.start()
    p.prepare("images", str(path), data_dir=tmp_path, img_size=128)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = (tmp_path / "images/train.npy").stat().st_size
    assert size > 48e6 and peak < 0.5 * size, (peak, size)


# ---- mistakes

def mistakes(folder):
    """Writes faulty data; returns {arguments: a pattern of the message}."""
    good = {"train": grey(0, 60), "test": grey(60, 90)}
    (x, y), (x_test, y_test) = good["train"], good["test"]
    arrays = {"x_train": x, "y_train": y, "x_test": x_test, "y_test": y_test}

    def npz(name, **changed):
        kept = {key: value for key, value in {**arrays, **changed}.items() if value is not None}
        np.savez(folder / f"{name}.npz", **kept)

    npz("count", y_train=y[:-1])
    npz("label", y_test=np.where(y_test == 3, 12, y_test))
    npz("negative", y_train=np.where(y == 3, -1, y))
    npz("fraction", y_train=y / 2)
    npz("float", x_train=x / 255)
    npz("axes", x_train=x.transpose(0, 3, 1, 2).repeat(2, 1))
    npz("lacks", y_test=None)
    npz("empty", x_test=x[:0], y_test=y[:0])
    npz("oblong", x_train=x[:, :6], x_test=x_test[:, :6])
    npz("objects", y_train=np.array([None] * 60))
    npz("sizes", x_test=x_test[:, :6, :6])
    npz("classes", classes=np.array(["a", "b"]))
    as_encoded_npz(folder, good)
    with np.load(folder / "in.npz") as file:
        encoded_arrays = dict(file)
    offsets = encoded_arrays["train_offsets"][:-1]
    np.savez(folder / "offsets.npz", **encoded_arrays | {"train_offsets": offsets})
    (folder / "broken.npz").write_bytes((folder / "in.npz").read_bytes()[:-3000])
    save(folder / "stream.jpg", b"\xff\xd8 no zip")
    save(folder / "nothing/readme.txt", b"no images")
    images, labels = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
    t10k_images, t10k_labels = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
    for name, file, change in (("magic", images, lambda content: b"\0\0\x09" + content[3:]),
                               ("cut", t10k_images, lambda content: content[:-1]),
                               ("head", labels, lambda content: content[:6]),
                               ("none", labels, lambda content: b""),
                               ("swapped", labels, lambda content: idx(x)),
                               ("few", t10k_labels, lambda content: idx(y_test[:-1]))):
        file = as_idx(folder / name, good) / file
        file.write_bytes(change(file.read_bytes()))
    (as_idx(folder / "three", good) / t10k_labels).unlink()
    (as_idx_gz(folder / "gz", good) / f"{images}.gz").write_bytes(gzip.compress(idx(x))[:-30])
    large = np.kron(x[0, :, :, 0], np.ones((2, 2), np.uint8))
    for name, file, content in (
            ("corrupt", "train/digit 4/x.png", encoded(x[0])[:-30]),
            ("fake", "val/digit 4/x.jpg", b"not an image"),
            ("deep", "train/digit 4/x.png", encoded(x[0].astype(np.uint16) * 257)),
            ("large", "train/digit 4/x.png", encoded(large)),
            ("new", "val/digit 77/x.png", encoded(x[0]))):
        save(as_folders(folder / name, good) / file, content)
    save(folder / "batches/train_data_batch_1", b"\x80\x03}q\0.")
    save(folder / "one.pkl", b"\x80\x04}.")
    for file in ("one/in/cat/0.png", "one/in/cat/1.png", "depths/cat/0.png", "depths/x/dog/1.png",
                 "labels/images/0.png", "table/0.png", "table/1.png", "table/2.png",
                 "only/test/cat.png", "only/val/dog.png"):
        save(folder / file, encoded(x[0]))
    save(folder / "labels/labels.csv", b"file,label\n0.png,cat\n")
    save(folder / "table/metadata.csv", b"file_name,label\n0.png,cat\n1.png,dog\n")
    npz("odd", extra=y)
    npz("gaps", y_train=np.where(y > 1, 9, y), y_test=y_test * 0)
    save(folder / "author/a/0.png", encoded(x[0]))
    save(folder / "author/metadata.csv", b"file_name,author\na/0.png,me\n")
    import datasets
    rows = {"image": [{"bytes": encoded(image), "path": None} for image in x], "a": y, "b": y}
    datasets.Dataset.from_dict(rows).to_parquet(folder / "two.parquet")
    (folder / "orders").mkdir()
    for split, names in {"train": ["a", "b"], "test": ["b", "a"]}.items():
        features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
        rows = {"image": [{"bytes": encoded(x[0]), "path": None}] * 4, "label": [0, 1, 0, 1]}
        rows = datasets.Dataset.from_dict(rows, datasets.Features(features))
        rows.to_parquet(folder / f"orders/{split}.parquet")
    return {
        "": "--path",
        "--path=nothing": "no image",
        "--path=nowhere": "nowhere",
        "--path=corrupt/in": "1 image cannot be read: .*digit 4/x.png.*--skip_damaged",
        "--path=fake/in": "1 image cannot be read: .*digit 4/x.jpg",
        "--path=deep/in": "digit 4/x.png.* I;16",
        "--path=large/in": "16x16.*digit 4/x.png.*img_size",
        "--path=new/in": "digit 77",
        "--path=batches": "pickle runs the code.*npz",
        "--path=one.pkl": "pickle runs the code.*npz",
        "--path=one/in": r"one class only \(cat\)",
        "--path=depths": r"different depths \(cat, dog\)",
        "--path=labels": "labels/labels.csv, which are no images and are used by nothing",
        "--path=table": "which its metadata does not name",
        "--path=only": "no train: name the folder of the training images train",
        "--path=odd.npz": "holds extra, which nothing uses",
        "--path=orders": "numbers its classes a, b in one split and b, a in the other",
        "--path=gaps.npz": "labels up to 9 and none of 2, 3, 4",
        "--path=author": "columns image, author",
        "--path=two.parquet": "a, b the label.*--label_column",
        "--path=in.npz --text_column=x": "--text_column",
        "--dataset=imagenet16_120 --path=batches": "pickle runs the code.*npz",
        "--dataset=imagenet16_120": "--path",
        "--path=magic/in": f"{images} begins with 00000903",
        "--path=cut/in": f"{t10k_images} .* 1,935 bytes.*1,936",
        "--path=head/in": labels,
        "--path=none/in": labels,
        "--path=swapped/in": labels,
        "--path=three/in": t10k_labels,
        "--path=gz/in": f"{images}.gz is damaged",
        "--path=few/in": r"30 images.*\(29,\)",
        "--path=count.npz": r"60 images.*\(59,\)",
        "--path=label.npz": "label 12.*0 to 9",
        "--path=negative.npz": "label -1",
        "--path=fraction.npz": "float64",
        "--path=float.npz": "float64",
        "--path=axes.npz": r"\(60, 2, 8, 8\)",
        "--path=lacks.npz": "y_test",
        "--path=empty.npz": "0 of validation",
        "--path=oblong.npz": "8x6.*img_size",
        "--path=sizes.npz": "8x8.*6x6.*img_size",
        "--path=objects.npz": "np.savez",
        "--path=broken.npz": "broken.npz",
        "--path=offsets.npz": "offsets",
        "--path=stream.jpg": "no whole .npz",
        "--path=classes.npz": "label .*2 classes",
        "--dataset=cifar100 --path=in.npz": "10 classes and cifar100 has 100",
        "--dataset=mnist": "choose one of pydocs.*digits",
        "--path=in.npz --tokenizer=char": "--tokenizer",
        "--path=in.npz --shards=5": "--shards",
        "--path=in.npz --num_proc=0": "num_proc=0",
        "--path=in.npz --val_fraction=1.5": "between 0 and 1",
        "--path=in.npz --img_size=-1": "img_size=-1",
        "--dataset=pydocs --img_size=8": "img_size=8",
    }


def test_a_mistake_is_answered_with_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for args, word in mistakes(tmp_path).items():
        monkeypatch.setattr(sys, "argv", ["prepare.py", "--dataset=images", *args.split()])
        with pytest.raises(SystemExit) as stop:
            # the script, without the seconds that a process needs
            runpy.run_path(str(ROOT / "prepare.py"), run_name="__main__")
        message = stop.value.code
        assert isinstance(message, str) and re.search(word, message), (args, message)
        assert not re.search(r"\n|\. [A-Z]", message), (args, message)
        assert not list(tmp_path.glob("data/*/meta.json")), args
        assert not list(tmp_path.glob("data/*/*.tmp")), args


def test_the_script_shows_the_sentence_and_no_traceback(tmp_path):
    sentence = mistakes(tmp_path)["--path=corrupt/in"] # found by a thread
    script = str(ROOT / "prepare.py")
    line = fails(script, "--dataset=images", "--path=corrupt/in", cwd=tmp_path)
    assert re.search(sentence, line)


def test_no_network_is_one_sentence(tmp_path):
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTPS_PROXY"), "http://127.0.0.1:9")
    line = fails("prepare.py", "--dataset=cifar10", f"--data_dir={tmp_path}",
                 HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1", **nowhere)
    assert "Hugging Face did not deliver uoft-cs/cifar10" in line and "--path" in line


# ---- batches

def test_validation_images_are_only_normalised(train):
    index = torch.tensor([5, 1437, 0, 5])
    x, y = data.get_images(train, index, crop=2, flip=True, cutout=3)
    plainly = (train.pixels[index].astype(np.float64) - train.mean) / train.std
    np.testing.assert_allclose(x, plainly.transpose(0, 3, 1, 2), atol=1e-5)
    assert x.dtype == torch.float32 and x.is_contiguous()
    assert y.dtype == torch.int64 and y.tolist() == train.labels[index].tolist()
    everything = data.get_images(train, torch.arange(len(train)))[0]
    assert everything.mean().abs() < 1e-4 and (everything.std() - 1).abs() < 1e-3


def test_all_images_once_and_in_order(train):
    for batch_size in (1, 100, 5000):
        part = train.part(100, 350)
        x, y = zip(*data.image_batches(part, batch_size), strict=True)
        assert max(map(len, x)) <= batch_size
        assert torch.cat(y).tolist() == train.labels[100:350].tolist()
        assert torch.equal(torch.cat(x), data.get_images(train, torch.arange(100, 350))[0])
    assert np.shares_memory(part.pixels, train.pixels)
    assert len(part) == 250 and part.num_classes == 10


def test_the_generator_alone_decides(train):
    index = torch.arange(64)

    def batch(seed, images=index):
        return data.get_images(train, images, "cpu", runs.rng(seed), crop=2, flip=True, cutout=4)[0]

    assert torch.equal(batch(1), batch(1)) and not torch.equal(batch(1), batch(2))
    same = batch(1, torch.zeros(64, dtype=torch.int64))
    assert len({image.numpy().tobytes() for image in same}) > 50, "every image has its own shift"
    nothing = data.get_images(train, index, "cpu", runs.rng(1))[0]
    assert torch.equal(nothing, data.get_images(train, index)[0])


def windows(image, crop):
    """All (2 crop + 1)^2 shifts of an image (C, H, W), filled up with zeros; by their definition,
    pixel by pixel."""
    C, H, W = image.shape
    out = torch.zeros(2 * crop + 1, 2 * crop + 1, C, H, W)
    for dy in range(2 * crop + 1):
        for dx in range(2 * crop + 1):
            for i in range(H):
                for j in range(W):
                    y, x = i + dy - crop, j + dx - crop
                    if 0 <= y < H and 0 <= x < W:
                        out[dy, dx, :, i, j] = image[:, y, x]
    return out.flatten(0, 1)


def test_a_crop_is_one_of_the_shifts_and_each_is_equally_likely():
    images = plain(colour(0, 1)[0])
    shifts = windows(data.get_images(images, torch.zeros(1, dtype=torch.int64))[0][0], 2)
    index = torch.zeros(10_000, dtype=torch.int64)
    x, _ = data.get_images(images, index, "cpu", runs.rng(1), crop=2)
    is_shift = (x[:, None] == shifts).flatten(2).all(2)
    assert (is_shift.sum(1) == 1).all()
    counts = is_shift.sum(0)
    assert (counts - 400).abs().max() < 100, counts # five standard deviations


def test_half_of_the_images_are_mirrored():
    images = plain(colour(0, 200)[0])
    index = torch.arange(10_000) % 200
    x, y = data.get_images(images, index)
    flipped = data.get_images(images, index, "cpu", runs.rng(1), flip=True)[0]
    assert x.is_contiguous() and flipped.is_contiguous()
    same, mirrored = ((flipped == other).flatten(1).all(1) for other in (x, x.flip(3)))
    assert (same ^ mirrored).all() and abs(mirrored.sum() - 5000) < 250, mirrored.sum()
    restored = torch.where(mirrored.view(-1, 1, 1, 1), flipped.flip(3), flipped)
    assert torch.equal(restored, x) and torch.equal(y, index)


@pytest.mark.parametrize("cutout", [1, 3, 4, 15])
def test_a_cutout_is_a_square_around_every_pixel_alike(cutout):
    H, n = 8, 20_000
    images = plain(np.full((1, H, H, 3), 7, np.uint8))
    index = torch.zeros(n, dtype=torch.int64)
    x, _ = data.get_images(images, index, "cpu", runs.rng(1), cutout=cutout)
    hidden = x == 0
    assert ((x == 7) | hidden).all()
    assert torch.equal(hidden, hidden[:, :1].expand_as(hidden)), "all channels at once"
    hidden = hidden[:, 0]
    rows, columns = hidden.any(2), hidden.any(1)
    assert torch.equal(hidden, rows[:, :, None] & columns[:, None, :]), "a rectangle"
    for side in (rows, columns):
        assert side.sum(1).min() == min(H, cutout - cutout // 2)
        assert side.sum(1).max() == min(H, cutout)
        assert ((side[:, 1:] ^ side[:, :-1]).sum(1) <= 2).all(), "in one piece"
    starts = [centre - cutout // 2 for centre in range(H)]
    covered = torch.tensor([sum(start <= i < start + cutout for start in starts)
                            for i in range(H)]) / H
    share = covered[:, None] * covered
    assert (hidden.float().mean(0) - share).abs().max() < 5 * (0.25 / n)**0.5


def test_crop_then_flip_then_cutout():
    images = plain(255 - colour(0, 20)[0] // 2) # no pixel is 0
    index = torch.arange(20).repeat(20)
    x = data.get_images(images, index, "cpu", runs.rng(3), crop=2, flip=True, cutout=4)[0]
    # without a cutout: the earlier draws are the same
    whole = data.get_images(images, index, "cpu", runs.rng(3), crop=2, flip=True)[0]
    hidden = x != whole
    assert (x[hidden] == 0).all() and hidden.any() and (hidden.sum((2, 3)) <= 16).all()
    for i, image in enumerate(data.get_images(images, torch.arange(20))[0]):
        shifts = windows(image, 2)
        shifts = torch.cat([shifts, shifts.flip(3)])
        is_one = (whole[index == i][:, None] == shifts).flatten(2).all(2)
        assert is_one.any(1).all()


def test_an_epoch_shows_every_image_at_most_once_and_no_two_are_alike():
    n, batch_size = 103, 10
    epochs = [[data.batch_indices(n, batch_size, 10 * epoch + i, 1, "train") for i in range(10)]
              for epoch in range(30)]
    for epoch in epochs:
        for index in epoch:
            assert index.shape == (batch_size,) and index.dtype == torch.int64
        shown = torch.cat(epoch)
        assert len(set(shown.tolist())) == 100 and 0 <= shown.min() and shown.max() < n
    orders = {tuple(torch.cat(epoch).tolist()) for epoch in epochs}
    assert len(orders) == 30
    missing = {i for order in orders for i in range(n) if i not in order}
    assert len(missing) > 30, "every epoch leaves out other images"
    assert torch.equal(data.batch_indices(n, n, 3, 1).sort()[0], torch.arange(n))


def test_a_batch_is_the_same_for_any_order_of_calls():
    keys = [(1, "a"), (1, "b"), (2, "a"), (1.0, "a")]
    walk = [(key, number, data.batch_indices(50, 8, number, *key).tolist())
            for key in keys for number in range(40)]
    assert len({tuple(index) for _, _, index in walk}) == len(walk), "every key has its own walk"
    for i in torch.randperm(len(walk), generator=runs.rng(5)).tolist():
        key, number, found = walk[i]
        index = data.batch_indices(50, 8, number, *key)
        assert index.tolist() == found, (key, number)
        index += 100 # the caller's own
        assert data.batch_indices(50, 8, number, *key).tolist() == found


def test_a_batch_larger_than_the_set_is_one_sentence():
    with pytest.raises(SystemExit, match="batch_size=11 is more than the 10 images"):
        data.batch_indices(10, 11, 0)


def test_a_gpu_gets_the_same_batches(train):
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    options = dict(crop=2, flip=True, cutout=3)
    here, there = (data.get_images(train, torch.arange(64), device, runs.rng(3), **options)
                   for device in ("cpu", "cuda"))
    assert all(torch.allclose(a, b.cpu(), atol=1e-6) and b.is_cuda
               for a, b in zip(here, there, strict=True))
