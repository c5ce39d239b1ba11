"""
Turns text or images into data/<name>/{train,val}.bin or .npy + meta.json, once, and hands out batches of it to the trainers.

    python prepare.py                           # pydocs: Python 3.11.7's documentation, no network
    python prepare.py --dataset=this_python     # the same of the Python that runs, no network
    python prepare.py --dataset=shakespeare_char
    python prepare.py --dataset=tinystories                 # from Hugging Face
    python prepare.py --dataset=tinystories --path=train.txt.gz --val_path=valid.txt.gz      # the same from local files
    python prepare.py --dataset=text --path=my_folder --tokenizer=sentencepiece --vocab_size=1024
    python prepare.py --shards=50                           # also 50 parts of different sizes, for train_rl.py

    python prepare.py --dataset=digits                      # 1,797 images of 8x8 that scikit-learn brings, no network
    python prepare.py --dataset=cifar10                     # from Hugging Face, as fashion_mnist, cifar100 and imagenet are
    python prepare.py --dataset=fashion_mnist --path=FOLDER                                  # the same from local files
    python prepare.py --dataset=images --path=FILE_OR_FOLDER --img_size=64 --name=flowers    # your own

    python prepare.py --dataset=sr_samples --scale=2        # pairs for super-resolution of 2 photographs that scikit-learn brings
    python prepare.py --dataset=set5 --path=FOLDER --scale=4             # to test on, as set14; div2k, to train on
    python prepare.py --dataset=pairs --path=FOLDER --name=bsd   # your own images; or FILE.zip or FILE.zip/FOLDER

Text: --path is a file or a folder of plain text (.txt, .md, .py, ...), .gz of text, .jsonl or .parquet (column "text"). Files whose
names start with train and val are the two splits of a folder; otherwise its last val_fraction of characters is the validation
split. Documents end at the line <|endoftext|> of a text file, at the end of a row, and where the next file begins; between two
of them, and after the last row, stands the end-of-text token (gpt2, sentencepiece) or a blank line (char).

A .bin is a flat array of token ids, uint16 or uint32 as meta.json says. A run that was killed continues where it was: until
both splits are whole there is a progress.json in the place of meta.json. One document has to fit into memory, all need not.

Images: --path is one of
    a folder of IDX files           train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte, or .gz
    an .npz of pixels               x_train, x_test: uint8 (N, H, W) or (N, H, W, 1 or 3); y_train, y_test: integers (N,)
    an .npz of encoded images       train_jpeg, test_jpeg: uint8, their bytes end to end; train_offsets, test_offsets: (N + 1,), where
                                    each begins, and the end of the last; y_train, y_test. Both may name the classes: strings (classes,)
    a folder of image files         train/<class>/*.png and val/<class>/* or test/<class>/*; or <class>/*, cut by val_fraction
train.npy and val.npy are uint8 (N, img_size, img_size, in_channels), {train,val}_labels.npy int64 (N,). An official test set is the
validation split. The images of train are stored in an order that the seed shuffled, so that every part start:stop is a random one.
A killed run begins anew. Not all images have to fit into memory.

Pairs: --path holds images in high resolution, of any sizes; what lies in a folder of which LR is a word (LR_bicubic) are images in low
resolution, and <name>x<scale> there is that of <name>. Others are made by bicubic interpolation (a = -0.5, antialiased, as MATLAB's).
Those whose folder has train or val in its name are the splits; otherwise val_fraction of the images, and of set5 and set14 all, are val.
Images of train are cut into regions of up to img_size pixels. data/<name>_x<scale>/{train,val}.bin are uint8: of pair after pair the low
resolution (h, w, 3) and the high (scale h, scale w, 3), with the shapes and offsets in meta.json.

A shard is a data set of text of its own, data/<name>/<shards>/<number>: its train.bin is a part of train.bin that no other shard has, and
its val.bin, the same for all, the first test_entries of val.bin. Every second one is of mode 1, the others are of mode 2.
"""

import ast
import gzip
import io
import hashlib
import json
import math
import os
import platform
import random
import re
import sysconfig
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, islice, pairwise, product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
import torch.distributed as dist
from data import IMAGE_SETS, PAIR_SETS, TOKENIZER, codec, data_dir_option, bytes_hash, load_meta
from data import load_tokens
from run import read_json, rng, atomic_write, write_json

dataset = "pydocs"  # this_python, shakespeare_char, tinystories, openwebtext, text; see IMAGE_SETS
path = ""  # a local file or folder in the place of the download; dataset=text, images and imagenet16_120 need it
val_path = ""  # the same for the validation split of text
img_size = 0  # pixels a side: images are cut to a square and resized; 0 = as they are; of pairs, see above, 0 = 480, 160 for sr_samples
scale = 2  # of pairs: 2, 3 or 4
make_low = False  # of pairs: makes every low resolution, also where the path has one
tokenizer = ""  # char, gpt2, sentencepiece; '' = the data set's usual one
vocab_size = 0  # of sentencepiece; 0 = 4096
val_fraction = 0.0  # share of the validation split; 0 = 0.1, 0.2 for digits, and 0.0005 for openwebtext
seed = 1337  # of the split of pydocs, this_python and openwebtext, and of the order of images
num_proc = 8  # threads that tokenize (gpt2, sentencepiece) or decode images
data_dir = "data"
name = ""  # folder in data_dir; '' = the data set's name
shards = 0  # parts to cut train.bin into
entries = [20, 2000]  # of the smallest and the largest shard, the others between them in equal ratios
test_entries = 256  # entries of the test split of all shards
block_size = 64  # tokens an entry, which is one training sequence

PYDOCS = Path(__file__).resolve().parent / "assets/pydocs.txt.xz"  # see read_pydocs()
PYDOCS_PYTHON = "3.11.7"
PYDOCS_SHA256 = "3903b23a0572dd373487bd861a8dfa535da72f92dd3ca4b7ff7584bbd2a88a70"  # of its text
HUB = {"shakespeare_char": "karpathy/tiny_shakespeare", "tinystories": "roneneldan/TinyStories",
       "openwebtext": "Skylion007/openwebtext", "fashion_mnist": "zalando-datasets/fashion_mnist", "cifar10": "uoft-cs/cifar10",
       "cifar100": "uoft-cs/cifar100", "imagenet": "ILSVRC/imagenet-1k"}
COLUMNS = {"cifar10": ("img", "label"), "cifar100": ("img", "fine_label")}  # of the others: image, label
VAL_FRACTION = {"digits": 0.2, "openwebtext": 0.0005}  # of the others: 0.1
IMAGE_FILES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
END = "<|endoftext|>"
SHORT = 60  # characters: python_docs() drops shorter documents, and longer paragraphs it has


# ---- sources: for each split a function that returns its documents, so that they can be read twice, and how many they are

def python_docs():
    """Topics and docstrings of the running Python's standard library, ASCII, no document and no long paragraph twice."""
    lib = Path(sysconfig.get_path("stdlib"))
    skip = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "encodings", "site-packages", "dist-packages"}
    files = [f for f in sorted(lib.rglob("*.py")) if not skip & set(f.relative_to(lib).parts)]
    if not files:
        raise SystemExit(f"this Python keeps no sources of its standard library in {lib}: use a full installation of Python, "
                         "or --dataset=pydocs, which needs none")
    from pydoc_data.topics import topics
    docs = list(topics.values())
    for file in tqdm(files, desc="docstrings", unit=" files"):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                docs.append(ast.get_docstring(node) or "")
    ascii_of = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "--", "…": "...", "•": "*", "→": "->",
                              "×": "x", "≤": "<=", "\xa0": " "})
    seen, kept = set(), []
    # some topics contain other topics: the longest first, or the validation text would be trained on
    for doc in sorted({doc.translate(ascii_of) for doc in docs}, key=lambda doc: (-len(doc), doc)):
        paragraphs = [p for p in doc.split("\n\n") if len(p) < SHORT or p.strip() not in seen]
        seen.update(p.strip() for p in paragraphs)
        doc = "\n\n".join(paragraphs).strip()
        if len(doc) >= SHORT and doc.isascii():
            kept.append(doc)
    return kept


def read_pydocs():
    """
    Documents of assets/pydocs.txt.xz: those of python_docs() on Python 3.11.7, the same everywhere.
    SystemExit if the file is missing or holds anything else.

    Lines <|endoftext|> stand between them; none of them has such a line, many have blank ones. A
    new PYDOCS_PYTHON makes the file anew, and its text has another PYDOCS_SHA256:
        import lzma, prepare
        text = f"\\n{prepare.END}\\n".join(prepare.python_docs()).encode()
        prepare.PYDOCS.write_bytes(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
        print(prepare.bytes_hash(text))
    """
    try:
        import lzma  # not at the top: a Python that was built without it can do all the rest
        text = lzma.decompress(PYDOCS.read_bytes())
        error = f"its text has {bytes_hash(text)}" if bytes_hash(text) != PYDOCS_SHA256 else ""
    except ImportError as missing:
        raise SystemExit(f"this Python was built without lzma, which reads {PYDOCS} ({missing}): "
                         "use one that has it, or --dataset=this_python") from None
    except (OSError, lzma.LZMAError) as found:
        error = getattr(found, "strerror", None) or found
    if error:
        raise SystemExit(f"{PYDOCS} does not hold the text of sha256 {PYDOCS_SHA256} ({error}): "
                         "take the file from the repository again, or use --dataset=this_python")
    return text.decode().split(f"\n{END}\n")


def open_any(file, mode, encoding=None):
    return (gzip.open if file.suffix == ".gz" else open)(file, mode, encoding=encoding)


def open_text(file):
    return open_any(file, "rt", "utf-8-sig")


def read_text(file):
    """Documents of a text file, to the character as they stand between the marks."""
    lines = []
    with open_text(file) as f:
        for line in f:
            if line.strip() == END:
                yield "".join(lines)
                lines = [line.replace(END, "")]
            else:
                lines.append(line)
    yield "".join(lines)


def read_rows(file):
    """Column text of a .parquet or .jsonl (.gz) file."""
    if file.suffix == ".parquet":
        import pyarrow.parquet
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024, columns=["text"]):
            yield from filter(None, batch["text"].to_pylist())
    else:
        with open_text(file) as f:
            yield from filter(None, (json.loads(line)["text"] for line in f if line.strip()))


def read_files(files):
    """Documents of the files, one after the other. SystemExit names a file that is not text."""
    of_rows = False
    for file in files:
        of_rows = file.name.endswith((".parquet", ".jsonl", ".jsonl.gz"))
        try:
            for doc in (read_rows if of_rows else read_text)(file):
                if "\0" in doc:
                    raise ValueError("it has NUL bytes")
                yield doc
        except (OSError, EOFError, KeyError, TypeError, ValueError, zlib.error) as error:
            what = f"rows with a text in the column 'text' ({error!r})" if of_rows else f"UTF-8 text ({error})"
            raise SystemExit(f"{file} does not hold {what}: convert it or leave it out") from None
    if of_rows:
        yield ""  # what stands between documents ends the last row, too


def list_files(path):
    path = Path(path)
    if path.is_file():
        return [path]
    files = sorted(f for f in path.rglob("*") if f.is_file() and not any(p[0] == "." for p in f.relative_to(path).parts))
    if not files:
        raise SystemExit(f"{path} is no file and no folder with files in it: give one that holds the data")
    return files


def split_files(path, val_path):
    """-> files of train, files of val; no files of val where the text is to be cut."""
    files = list_files(path)
    if val_path:
        return files, list_files(val_path)
    train, val = ([f for f in files if str(f.relative_to(path)).startswith(split)] for split in ("train", "val"))
    return (train, val) if train and val else (files, [])


def cut(docs, start, stop):
    """What lies within the characters start to stop of all documents together."""
    position = 0
    for doc in docs:
        if position >= stop:
            return
        if position + len(doc) > start:
            yield doc[max(0, start - position):stop - position]
        position += len(doc)


def local_splits(path, val_path, val_fraction):
    """Reads everything once: whether it is text, and how much."""
    files = split_files(path, val_path)
    sizes = [np.array([len(doc) for doc in tqdm(read_files(f), desc="reading", unit=" documents")], np.int64) for f in files if f]
    chars = [int(s.sum()) for s in sizes]
    if files[1]:
        splits = [(partial(read_files, f), len(s)) for f, s in zip(files, sizes, strict=True)]
    else:
        ends, n = sizes[0].cumsum(), int((1 - val_fraction) * chars[0])
        chars = [n, chars[0] - n]
        splits = [(lambda: cut(read_files(files[0]), 0, n), int((ends - sizes[0] < n).sum())),
                  (lambda: cut(read_files(files[0]), n, sum(chars) + 1), int((ends > n).sum()))]
    if 0 in chars:
        raise SystemExit(f"{path} gives {chars[0]} characters of training and {chars[1]} of validation text, and both need some: "
                         "give more text")
    return splits


def download(dataset, split):
    from datasets import load_dataset
    # the main branch of tiny_shakespeare needs a script, which datasets no longer runs
    revision = "refs/convert/parquet" if dataset == "shakespeare_char" else None
    try:
        return load_dataset(HUB[dataset], split=split, revision=revision)
    except (OSError, RuntimeError, ValueError) as error:
        raise SystemExit(f"Hugging Face did not deliver {HUB[dataset]} ({error}): check the network, "
                         "or give a local copy as --path") from None


def read_splits(dataset, path, val_path, val_fraction, seed):
    if path:
        return local_splits(path, val_path, val_fraction)
    if dataset == "shakespeare_char":  # one text that comes in three pieces
        text = "".join(download(dataset, "train+validation+test")["text"])
        n = int((1 - val_fraction) * len(text))
        return [(lambda: [text[:n]], 1), (lambda: [text[n:]], 1)]
    if dataset == "tinystories":
        train, val = (download(dataset, split)["text"] for split in ("train", "validation"))
    elif dataset == "openwebtext":
        parts = download(dataset, "train").train_test_split(test_size=val_fraction, seed=seed)
        train, val = parts["train"]["text"], parts["test"]["text"]
    else:
        docs = read_pydocs() if dataset == "pydocs" else python_docs()
        random.Random(seed).shuffle(docs)
        n = int((1 - val_fraction) * len(docs))
        train, val = docs[:n], docs[n:]
    return [(lambda docs=docs: chain(filter(None, docs), [""]), len(docs) + 1) for docs in (train, val)]


# ---- images: a split is (labels, get, name): get(i) is what as_image() takes, name(i) says in an error which image that is

def as_image(data):
    """A Pillow image of a file, of its bytes, or of pixels (H, W) or (H, W, 3)."""
    from PIL import Image
    if isinstance(data, np.ndarray) and data.ndim > 1:
        return Image.fromarray(data)
    return Image.open(data if isinstance(data, Path) else io.BytesIO(data))


def make_split(labels, n, get, where):
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape not in ((n,), (n, 1)):
        raise SystemExit(f"{where} has {n:,} images and labels of {labels.dtype} {labels.shape}: give one integer for each image")
    return labels.reshape(-1).astype(np.int64), get, lambda i: f"image {i} of {where}"


def split_of_pixels(pixels, labels, where):
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or pixels.shape[3:] not in ((), (1,), (3,)):
        raise SystemExit(f"the images of {where} are {pixels.dtype} {pixels.shape}: give uint8 of 0 to 255, (N, H, W) or (N, H, W, 1 or 3)")
    pixels = pixels[..., 0] if pixels.shape[3:] == (1,) else pixels  # Pillow has no axis for a single channel
    return make_split(labels, len(pixels), pixels.__getitem__, where)


def split_of_bytes(data, offsets, labels, where):
    if data.dtype != np.uint8 or offsets.ndim != 1 or offsets[-1:].tolist() != [data.size]:
        raise SystemExit(f"the offsets of {where} do not end with the number of its bytes, {data.size:,}: give the start of each image and "
                         "the end of the last")
    return make_split(labels, len(offsets) - 1, lambda i: data[offsets[i]:offsets[i + 1]], where)


def read_idx(folder, start, ndim):
    """The array in the IDX file <start>-idx<ndim>-ubyte: a magic number (0, 0, 8 for bytes, ndim), the sizes as uint32, the bytes."""
    files = sorted(folder.glob(f"{start}?idx{ndim}-ubyte*"))
    if not files:
        raise SystemExit(f"{folder} lacks {start}-idx{ndim}-ubyte: IDX files come in fours, images and labels of train and of t10k")
    try:
        with open_any(files[0], "rb") as f:
            data = f.read()
    except (OSError, EOFError, zlib.error) as error:
        raise SystemExit(f"{files[0]} is damaged ({error}): take an undamaged copy") from None
    magic, head = bytes([0, 0, 8, ndim]), 4 + 4 * ndim
    sizes = np.frombuffer(data[4:head].ljust(4 * ndim, b"\0"), ">u4").tolist()
    if data[:4] != magic or len(data) != head + math.prod(sizes):
        raise SystemExit(f"{files[0]} begins with {data[:4].hex()} and has {len(data):,} bytes, an IDX file of this name and sizes "
                         f"{sizes} begins with {magic.hex()} and has {head + math.prod(sizes):,}: take an undamaged copy")
    return np.frombuffer(data, np.uint8, offset=head).reshape(sizes)


def read_npz(path):
    if not zipfile.is_zipfile(path):
        raise SystemExit(f"{path} is no .npz and no folder: give one of them, python prepare.py --help lists what is to be in it")
    try:
        with np.load(path, allow_pickle=False) as file:
            data = {key: np.asarray(file[key]) for key in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise SystemExit(f"{path} does not hold plain arrays ({error}): save it with np.savez, without arrays of objects") from None
    splits = {}
    for split, key in {"train": "train", "val": "test"}.items():
        names = [f"{key}_jpeg", f"{key}_offsets", f"y_{key}"] if "train_jpeg" in data else [f"x_{key}", f"y_{key}"]
        if not data.keys() >= set(names):
            raise SystemExit(f"{path} holds {', '.join(data) or 'nothing'} and lacks one of {', '.join(names)}: add it")
        splits[split] = (split_of_pixels if len(names) == 2 else split_of_bytes)(*(data[name] for name in names), f"{key} in {path}")
    return splits, [str(name) for name in data["classes"]] if "classes" in data else None


def read_folder(path):
    val = next((path / name for name in ("val", "test") if (path / name).is_dir()), None)
    folders = {"train": path / "train", "val": val} if val and (path / "train").is_dir() else {"all": path}
    classes = sorted(f.name for f in next(iter(folders.values())).iterdir() if f.is_dir() and f.name[0] != ".")
    splits = {}
    for split, folder in folders.items():
        files = [f for f in list_files(folder) if f.suffix.lower() in IMAGE_FILES and f.parent != folder]
        if split == "val":  # an estimate takes the first ones, which must not be of the first classes alone
            files.sort(key=lambda f: hashlib.sha256(f.relative_to(folder).as_posix().encode()).digest())
        names = [f.relative_to(folder).parts[0] for f in files]
        if not files or not set(names) <= set(classes):
            what = f"the class {min(set(names) - set(classes))}, which train has not" if files else "no image in a folder of its class"
            raise SystemExit(f"{folder} has {what}: put the images into train/<class> and val/<class>, or into <class>")
        number = {name: i for i, name in enumerate(classes)}
        splits[split] = np.array([number[name] for name in names], np.int64), files.__getitem__, lambda i, files=files: str(files[i])
    return splits, classes


def download_images(dataset):
    import datasets
    splits, (image, label) = {}, COLUMNS.get(dataset, ("image", "label"))
    for split, official in {"train": "train", "val": "validation" if dataset == "imagenet" else "test"}.items():
        data = download(dataset, official)
        rows = data.select_columns([image]).cast_column(image, datasets.Image(decode=False))
        splits[split] = make_split(np.array(data[label][:]), len(data), lambda i, rows=rows: rows[i][image]["bytes"],
                                   f"{official} in {HUB[dataset]}")
    return splits, data.features[label].names


def read_image_splits(dataset, path):
    """-> {"train": split, "val": split}, or {"all": split} if it is to be cut; names of the classes, or None"""
    if not path and dataset == "digits":
        from sklearn.datasets import load_digits
        digits = load_digits()
        pixels = (digits.images * 255 / 16).round().astype(np.uint8)  # they count 0 to 16
        return {"all": split_of_pixels(pixels, digits.target, dataset)}, [str(name) for name in digits.target_names]
    if not path:
        return download_images(dataset)
    path = Path(path)
    files = list_files(path)
    for file in [f for f in files if f == files[0] or f.suffix in (".pkl", ".pickle")]:
        with open(file, "rb") as f:
            if f.read(1) == b"\x80":  # so begin the pickles of every protocol since 2
                raise SystemExit(f"{file} is a pickle, and reading a pickle runs the code in it: convert it, where you trust it, to an "
                                 ".npz of x_train, y_train, x_test, y_test and give that as --path")
    if path.is_file():
        return read_npz(path)
    if any("idx3-ubyte" in f.name for f in files):
        return {split: split_of_pixels(read_idx(path, f"{key}-images", 3), read_idx(path, f"{key}-labels", 1), f"{key} in {path}")
                for split, key in {"train": "train", "val": "t10k"}.items()}, None
    return read_folder(path)


def with_image(split, i, do):
    """do(image) of image i of the split, open. SystemExit names it if Pillow cannot read it."""
    _, get, name = split
    try:
        with as_image(get(i)) as image:
            if image.mode[0] in "IF":
                raise ValueError(f"its pixels are {image.mode}")
            return do(image)
    except Exception as error:  # Pillow's decoders raise what they like
        raise SystemExit(f"{name(i)} is damaged or no image of 8 bits a channel ({error}): replace it or leave it out") from None


def survey(splits, orders, img_size):
    """Reads the head of every image: -> pixels a side, and 1 channel if all are grey, else 3."""
    sizes, modes = {}, set()
    for split, order in orders.items():
        for i in tqdm(order, desc=f"sizes of {split}", unit=" images"):
            size, mode = with_image(splits[split], i, lambda image: (image.size, image.mode))
            modes.add(mode)
            sizes.setdefault(size, splits[split][2](i))
            if not img_size and (len(sizes) > 1 or size[0] != size[1]):
                found = " and ".join(f"{width}x{height} ({name})" for (width, height), name in sizes.items())
                raise SystemExit(f"images have to be squares of one size, and here is {found}: give --img_size=N to make them so")
    return img_size or size[0], 1 if modes <= {"1", "L", "LA"} else 3


def write_images(file, split, order, side, channels, num_proc):
    """Writes images of a split in this order, decoded by num_proc threads: -> how often each channel has each value, (C, 256)."""
    from PIL import ImageOps
    counts = np.zeros((channels, 256), np.int64)

    def pixels_of(image):
        image = ImageOps.fit(image.convert("L" if channels == 1 else "RGB"), (side, side))  # the largest square around the centre
        return np.asarray(image).reshape(side, side, channels)

    def save(f):
        np.lib.format.write_array_header_1_0(f, {"descr": "|u1", "fortran_order": False, "shape": (len(order), side, side, channels)})
        with ThreadPoolExecutor(num_proc) as pool, tqdm(desc=file.stem, total=len(order), unit=" images") as bar:
            for start in range(0, len(order), 64):
                images = pool.map(lambda i: with_image(split, i, pixels_of), order[start:start + 64])
                block = np.stack(list(images))  # (up to 64, H, W, C)
                f.write(block)
                counts[:] += [np.bincount(block[..., c].ravel(), minlength=256) for c in range(channels)]
                bar.update(len(block))

    atomic_write(file, save)
    return counts


def prepare_images(folder, settings, path, num_proc):
    """Writes the images and labels, and returns what meta.json is to say; until that is there, progress.json marks the folder as ours."""
    splits, classes = read_image_splits(settings["dataset"], path)
    orders = {split: list(range(len(labels))) for split, (labels, _, _) in splits.items()}
    shuffled = "all" if "all" in splits else "train"  # the validation split keeps its official order
    orders[shuffled] = torch.randperm(len(orders[shuffled]), generator=rng(settings["seed"], "images")).tolist()
    if "all" in splits:
        n = round(settings["val_fraction"] * len(orders["all"]))
        orders, splits = {"train": orders["all"][n:], "val": orders["all"][:n]}, dict.fromkeys(("train", "val"), splits["all"])
    labels, source = {split: splits[split][0][order] for split, order in orders.items()}, settings["source"]
    if not all(orders.values()):
        raise SystemExit(f"{source} gives {len(orders['train']):,} images of training and {len(orders['val']):,} of validation, and both "
                         "need some: give more images")
    num_classes = IMAGE_SETS[settings["dataset"]] or len(classes or range(labels["train"].max() + 1))
    if classes and len(classes) != num_classes:
        raise SystemExit(f"{source} has {len(classes)} classes and {settings['dataset']} has {num_classes}: choose --dataset=images for it")
    for split, found in labels.items():
        wrong = found[(found < 0) | (found >= num_classes)]
        if len(wrong):
            raise SystemExit(f"{source} has the label {wrong[0]} in {split}, and the {num_classes} classes are 0 to {num_classes - 1}: "
                             "correct the labels")
    side, channels = survey(splits, orders, settings["resize"])
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "progress.json", settings)
    meta = {**settings, "img_size": side, "in_channels": channels, "num_classes": num_classes, "classes": classes}
    for split, order in orders.items():
        counts = write_images(folder / f"{split}.npy", splits[split], order, side, channels, num_proc)
        atomic_write(folder / f"{split}_labels.npy", lambda f, split=split: np.save(f, labels[split]))
        meta[f"{split}_images"] = len(order)
        for part in (split, f"{split}_labels"):
            meta[f"{part}_sha256"] = bytes_hash(np.memmap(folder / f"{part}.npy", mode="r"))
        if split == "train":
            share = counts / counts.sum(1, keepdims=True)  # (C, 256)
            mean = share @ np.arange(256)
            variance = (share * (np.arange(256) - mean[:, None])**2).sum(1)
            meta |= {"mean": mean.tolist(), "std": [v**0.5 or 1.0 for v in variance.tolist()]}  # 1: a channel of one value
    return meta


# ---- pairs: a split is [(name, get, get_low)] of what as_image() takes; get_low is None where the low resolution is to be made

def outside(path):
    """The .zip that a path leads into, or else the path."""
    return next((p for p in (Path(path), *Path(path).parents) if p.suffix == ".zip" and p.is_file()), Path(path))


def read_pictures(path):
    """{name: a function that gives its bytes} of the image files in a folder, in a .zip, or in a folder of a .zip."""
    archive = outside(path)
    if archive.suffix == ".zip" and archive.is_file():
        try:
            zipped, inside = zipfile.ZipFile(archive), Path(path).relative_to(archive)
        except (OSError, zipfile.BadZipFile) as error:
            raise SystemExit(f"{archive} is damaged ({error}): take an undamaged copy") from None
        names = [Path(name) for name in sorted(zipped.namelist()) if not Path(name).name.startswith("._")] # which macOS adds
        files = {str(name.relative_to(inside)): partial(zipped.read, name.as_posix()) for name in names if name.is_relative_to(inside)}
    else:
        files = {str(f.relative_to(path)): f.read_bytes for f in list_files(path)}
    found = {name: get for name, get in files.items() if Path(name).suffix.lower() in IMAGE_FILES}
    if not found:
        raise SystemExit(f"{path} has no image ({', '.join(IMAGE_FILES)}) in it: give a folder, a .zip or FILE.zip/FOLDER that has some")
    return found


def read_pair_splits(settings, path):
    dataset, scale = settings["dataset"], settings["scale"]
    if dataset == "sr_samples":
        from sklearn.datasets import load_sample_images
        photos, edge = load_sample_images().images, 480  # (427, 640, 3) each
        return {split: [(f"photograph {i} of scikit-learn", partial(photo.__getitem__, (slice(None), columns)), None)
                        for i, photo in enumerate(photos)] for split, columns in (("train", slice(edge)), ("val", slice(edge, None)))}
    files = read_pictures(path)
    own = {name: get for name, get in files.items() if dataset in Path(name.lower()).parts} if dataset in ("set5", "set14") else {}
    low, splits, files = {}, {"train": [], "val": [], "": []}, own or files
    for name in files:
        if re.search(r"(^|_)LR$", Path(name).stem):
            raise SystemExit(f"{name} in {path} is called a low resolution, which must lie in a folder LR and be called <name>x{scale}: "
                             "move such files there, or leave them out")
        if re.search(r"(^|[_/])LR([_/])", name):
            low.setdefault(Path(name).stem, []).append(name)
    for name, get in files.items():
        if any(name in names for names in low.values()):
            continue
        file = Path(name)
        given = [n for n in low.get(f"{file.stem}x{scale}", []) if Path(n).is_relative_to(file.parent.parent)]
        folder = file.parent.as_posix().lower()
        get_low = files[given[0]] if given and not settings["make_low"] else None
        splits["train" if "train" in folder else "val" if "val" in folder else ""].append((name, get, get_low))
    if splits["train"] and splits["val"]:
        return {split: splits[split] for split in ("train", "val")}
    found = list(chain(*splits.values()))
    n = len(found) if dataset in ("set5", "set14") else max(1, round(settings["val_fraction"] * len(found)))
    order = torch.randperm(len(found), generator=rng(settings["seed"], "pairs")).tolist()
    return {"train": [found[i] for i in order[n:]], "val": [found[i] for i in sorted(order[:n])]}


def shrink(high, scale):
    """(scale h, scale w, 3) uint8 -> (h, w, 3), by bicubic interpolation, antialiased, of the image mirrored at its edges."""
    edge = 2  # low-resolution pixels that the kernel reaches
    x = np.pad(high, ((edge * scale, edge * scale),) * 2 + ((0, 0),), "symmetric")
    x = torch.from_numpy(x).permute(2, 0, 1)[None].float()
    y = F.interpolate(x, scale_factor=1 / scale, mode="bicubic", antialias=True)  # with antialias, PyTorch's a is -0.5
    return y[0, :, edge:-edge, edge:-edge].round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


def read_pair(entry, scale):
    """-> low (h, w, 3), high (scale h, scale w, 3), uint8"""
    name, get, get_low = entry

    def pixels_of(get, name):
        return with_image((None, lambda i: get(), lambda i: name), 0, lambda image: np.asarray(image.convert("RGB")))
    high, low = pixels_of(get, name), get_low and pixels_of(get_low, f"the low resolution of {name}")
    h, w = (n // scale for n in high.shape[:2])
    if low is not None and low.shape[:2] != (h, w):
        raise SystemExit(f"{name} is {high.shape[1]}x{high.shape[0]} and its low resolution {low.shape[1]}x{low.shape[0]}, where "
                         f"scale={scale} makes {w}x{h}: replace one of the two, or make all low resolutions by --make_low=True")
    if min(h, w) < 8:
        raise SystemExit(f"{name} is {high.shape[1]}x{high.shape[0]}, of which scale={scale} leaves less than 8 pixels a side: leave it "
                         "out")
    high = np.ascontiguousarray(high[:scale * h, :scale * w])
    return shrink(high, scale) if low is None else low, high


def prepare_pairs(folder, settings, path):
    """Writes the pairs, and returns what meta.json is to say, as prepare_images()."""
    splits, scale = read_pair_splits(settings, path), settings["scale"]
    if not splits["val"] or not (splits["train"] or settings["dataset"] in ("set5", "set14")):
        raise SystemExit(f"{settings['source']} gives {len(splits['train'])} images of training and {len(splits['val'])} of validation, "
                         "and both need some: give more images")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "progress.json", settings)
    meta = dict(settings)
    for split, entries in splits.items():
        shapes, offsets, digest = [], [], hashlib.sha256()

        def save(f, split=split, entries=entries, shapes=shapes, offsets=offsets, digest=digest):
            for entry in tqdm(entries, desc=split, unit=" images"):
                low, high = read_pair(entry, scale)
                sides = [-(-n * scale // settings["region"]) if split == "train" else 1 for n in low.shape[:2]]
                for rows, columns in product(*(pairwise(np.linspace(0, n, k + 1).astype(int))
                                                         for n, k in zip(low.shape[:2], sides, strict=True))):
                    offsets.append(f.tell())
                    shapes.append([int(b - a) for a, b in (rows, columns)])
                    for image, s in ((low, 1), (high, scale)):
                        pixels = image[s * rows[0]:s * rows[1], s * columns[0]:s * columns[1]].tobytes()
                        f.write(pixels)
                        digest.update(pixels)

        atomic_write(folder / f"{split}.bin", save)
        order = range(len(shapes))
        if split == "train" and len(entries) < 16:  # a part start:stop is one of images, and of few images one of regions
            order = torch.randperm(len(shapes), generator=rng(settings["seed"], "regions")).tolist()
        meta |= {f"{split}_images": len(entries), f"{split}_shapes": [shapes[i] for i in order],
                 f"{split}_offsets": [offsets[i] for i in order], f"{split}_sha256": digest.hexdigest()}
    return meta


# ---- tokenizers


def train_sentencepiece(docs, vocab_size):
    """Byte-pair encoding learnt from the first million lines: the model as bytes. White space survives a round trip."""
    import sentencepiece
    # 1,000 characters at most, for sentencepiece ignores lines of more than 4,192 bytes
    lines = (line[i:i + 1000] for doc in docs for line in doc.splitlines() for i in range(0, len(line), 1000))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=islice(lines, 1_000_000), model_writer=model, vocab_size=vocab_size, model_type="bpe",
            byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
            allow_whitespace_only_pieces=True, minloglevel=2)
    except RuntimeError as error:
        raise SystemExit(f"sentencepiece cannot learn --vocab_size={vocab_size} from this text "
                         f"({str(error).split('] ')[-1].strip(' .')}): choose another --vocab_size or give more text") from None
    return model.getvalue()


def token_dtype(vocab_size):
    return "uint16" if vocab_size <= 2**16 else "uint32"


# ---- writing


def batches(docs, max_docs=1024, max_chars=2**24):
    batch, size = [], 0
    for doc in docs:
        batch.append(doc)
        size += len(doc)
        if len(batch) == max_docs or size >= max_chars:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def write_split(folder, split, docs, n_docs, encode, joint, meta):
    """Tokenizes docs into folder/<split>.bin; after every batch progress.json tells how far it is."""
    if (folder / f"{split}.bin").exists():
        return
    part, dtype = folder / f"{split}.bin.part", np.dtype(meta["dtype"])
    done, size = meta[f"{split}_documents"], meta[f"{split}_tokens"] * dtype.itemsize
    with open(part, "ab") as f, tqdm(desc=split, total=n_docs, initial=done, unit=" documents") as bar:
        if f.tell() < size:
            raise SystemExit(f"{part} has {f.tell():,} bytes and not the {size:,} of progress.json: delete {folder}")
        f.truncate(size)  # forgets what a killed run wrote after its last note
        for batch in batches(islice(docs, done, None)):
            ids = chain.from_iterable(joint + ids if i else ids for i, ids in enumerate(encode(batch), done))
            tokens = np.fromiter(ids, dtype)
            f.write(tokens.tobytes())
            f.flush()
            os.fsync(f.fileno())  # the tokens reach the disk before the note does
            done += len(batch)
            meta[f"{split}_documents"] = done
            meta[f"{split}_tokens"] += len(tokens)
            write_json(folder / "progress.json", meta)
            bar.update(len(batch))
    os.replace(part, folder / f"{split}.bin")


def start(folder, settings, splits):
    """Makes the folder, the tokenizer and the first progress.json; returns what is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, chars, model = settings["tokenizer"], None, folder / "tokenizer.model"
    if tokenizer == "char":
        chars = set()
        for docs, n_docs in splits:
            for i, doc in enumerate(tqdm(docs(), desc="characters", total=n_docs, unit=" documents")):
                chars.update("\n" + doc if i else doc)
        chars = "".join(sorted(chars))
    if tokenizer == "sentencepiece":
        docs, n_docs = splits[0]
        docs = tqdm(docs(), desc="sentencepiece", total=n_docs, unit=" documents")
        atomic_write(model, lambda f: f.write(train_sentencepiece(docs, settings["vocab_size"])))
    *_, vocab_size, joint = codec(tokenizer, chars, model)
    meta = {**settings, "vocab_size": vocab_size, "dtype": token_dtype(vocab_size), "eot": None if chars else joint[0],
            "train_tokens": 0, "val_tokens": 0, "train_documents": 0, "val_documents": 0, "chars": chars}
    write_json(folder / "progress.json", meta)
    return meta


def check_settings(dataset, path, val_path, tokenizer, vocab_size, val_fraction, img_size, num_proc, shards, scale):
    of_images = dataset in (*IMAGE_SETS, *PAIR_SETS)
    if not of_images and dataset not in TOKENIZER:
        raise SystemExit(f"--dataset={dataset} is unknown: choose one of {', '.join((*TOKENIZER, *IMAGE_SETS, *PAIR_SETS))}")
    if scale not in (2, 3, 4):
        raise SystemExit(f"--scale={scale} is not 2, 3 or 4, times which pairs for super-resolution differ a side")
    if dataset in PAIR_SETS and bool(path) == (dataset == "sr_samples"):
        raise SystemExit(f"--dataset={dataset} --path={path} does not fit: sr_samples is of scikit-learn, the other pairs need a folder or "
                         ".zip of images, such as the official archives of DIV2K")
    if not 0 < val_fraction < 1:
        raise SystemExit(f"--val_fraction={val_fraction} is no share of the data: choose one between 0 and 1")
    if not path and dataset in ("images", "imagenet16_120"):
        raise SystemExit(f"--dataset={dataset} lacks the images: give an .npz or a folder as --path")
    if of_images and (val_path or tokenizer or vocab_size or shards):
        raise SystemExit(f"--dataset={dataset} is of images, and --val_path, --tokenizer, --vocab_size and --shards are for text: leave "
                         "them out")
    if img_size < 0 or (img_size and not of_images) or num_proc < 1:
        raise SystemExit(f"--img_size={img_size} --num_proc={num_proc} does not fit --dataset={dataset}: img_size is for images, and 0 "
                         "where they stay as they are, num_proc is 1 or more")
    if of_images:
        return
    if tokenizer not in ("char", "gpt2", "sentencepiece"):
        raise SystemExit(f"--tokenizer={tokenizer} is unknown: choose one of char, gpt2, sentencepiece")
    if vocab_size < 0 or (vocab_size and tokenizer != "sentencepiece"):
        raise SystemExit(f"--vocab_size={vocab_size} is for --tokenizer=sentencepiece and positive: {tokenizer} has its own")
    if not path and (dataset == "text" or val_path):
        raise SystemExit(f"--dataset={dataset} --val_path={val_path} lacks the training text: give a file or folder as --path")


def prepare(dataset=dataset, path=path, val_path=val_path, tokenizer=tokenizer, vocab_size=vocab_size, val_fraction=val_fraction,
            seed=seed, num_proc=num_proc, data_dir=data_dir, name=name, shards=shards, entries=entries, test_entries=test_entries,
            block_size=block_size, img_size=img_size, scale=scale, make_low=make_low):
    """
    Writes data_dir/name/{train.bin, val.bin, meta.json}, tokenizer.model for sentencepiece, and the shards if there are to be any;
    of images {train.npy, train_labels.npy, val.npy, val_labels.npy, meta.json}; of pairs {train.bin, val.bin, meta.json}, in
    data_dir/name_x<scale>. Returns what meta.json says.

    Continues what an interrupted run with the same settings began (of images it begins anew), and does nothing where a finished one
    stands. SystemExit: settings that do not fit the folder or each other, text or images that are missing, unreadable or too few,
    labels that do not fit the images or the classes, no network where needed.
    """
    tokenizer = tokenizer or TOKENIZER.get(dataset, "")
    val_fraction = val_fraction or VAL_FRACTION.get(dataset, 0.1)
    check_settings(dataset, path, val_path, tokenizer, vocab_size, val_fraction, img_size, num_proc, shards, scale)
    # with the size of the files: a rerun must not take other text for the same
    source = ", ".join(f"{p} ({sum(f.stat().st_size for f in list_files(outside(p))):,} bytes)" for p in (path, val_path) if p)
    version = PYDOCS_PYTHON if dataset == "pydocs" else platform.python_version()
    source = source or HUB.get(dataset) or (
        f"scikit-learn's {dataset}" if dataset in ("digits", "sr_samples")
        else f"documentation of Python {version}")
    settings = {"dataset": dataset, "source": source, "tokenizer": tokenizer, "val_fraction": val_fraction, "seed": seed}
    if dataset in IMAGE_SETS:
        settings = {"kind": "images", "dataset": dataset, "source": source, "resize": img_size, "val_fraction": val_fraction, "seed": seed}
    if dataset in PAIR_SETS:
        region = img_size or (160 if dataset == "sr_samples" else 480)
        settings = {"kind": "pairs", "dataset": dataset, "source": source, "scale": scale, "make_low": make_low, "region": region,
                    "val_fraction": val_fraction, "seed": seed}
    if tokenizer == "sentencepiece":
        settings["vocab_size"] = vocab_size or 4096

    name = (name or dataset) + (f"_x{scale}" if dataset in PAIR_SETS else "")
    folder = Path(data_dir) / name
    finished, progress = folder / "meta.json", folder / "progress.json"
    meta = load_meta(data_dir, name) if finished.exists() else read_json(progress) if progress.exists() else {}
    if not meta and any(file for form in ("*.bin", "*.npy") for file in folder.glob(form)):
        raise SystemExit(f"{folder} has .bin or .npy files without a meta.json, so they may be another program's: choose another --name")
    changed = [f"{key}={meta.get(key)!r} and not {value!r}" for key, value in settings.items() if meta and meta.get(key) != value]
    anew = not finished.exists() and meta.get("kind") == settings.get("kind") in ("images", "pairs")
    if changed and not anew:
        raise SystemExit(f"{folder} was prepared with {', '.join(changed)}: choose another --name, or delete the folder")

    if finished.exists():
        print(f"{folder} is prepared with these settings already, nothing to do")
    elif dataset in IMAGE_SETS:
        meta = prepare_images(folder, settings, path, num_proc)
    elif dataset in PAIR_SETS:
        meta = prepare_pairs(folder, settings, path)
    else:
        if meta:
            print(f"{folder}: continuing after {meta['train_documents']:,} documents of train, {meta['val_documents']:,} of val")
        splits = read_splits(dataset, path, val_path, val_fraction, seed)
        meta = meta or start(folder, settings, splits)
        encode, _, _, joint = codec(tokenizer, meta["chars"], folder / "tokenizer.model", num_proc)
        for split, (docs, n_docs) in zip(("train", "val"), splits, strict=True):
            write_split(folder, split, docs(), n_docs, encode, joint, meta)
        for split in ("train", "val"):
            meta[f"{split}_sha256"] = bytes_hash(np.memmap(folder / f"{split}.bin", mode="r"))
    if not finished.exists():
        write_json(progress, meta)
        os.replace(progress, finished)
    if shards:
        cut_shards(data_dir, name, meta, shards, entries, test_entries, block_size)
    script = "train_search.py"
    if shards: # not the table, which is of other shards
        script = f"train_rl.py --evaluator=train --shards={shards} --entries={str(entries).replace(' ', '')} "
        script += f"--test_entries={test_entries} --block_size={block_size}"
    if dataset in PAIR_SETS:
        print(f"{folder}: {meta['train_images']:,} images of train in {len(meta['train_shapes']):,} regions, {meta['val_images']:,} of "
              f"val, enlarged {scale} times")
        if meta["train_images"]:
            print(f"next: python {script} --space=swinir --scale={scale} --dataset={name.rpartition('_x')[0]}{data_dir_option(data_dir)}")
        return meta
    if dataset in IMAGE_SETS:
        script += " --space=toy_cell"
        print(f"{folder}: {meta['train_images']:,} images of train, {meta['val_images']:,} of val, {meta['img_size']}x{meta['img_size']} "
              f"in {meta['in_channels']} {'channel' if meta['in_channels'] == 1 else 'channels'}, {meta['num_classes']} classes")
    else:
        print(f"{folder}: {tokenizer}, vocab size {meta['vocab_size']:,}, {meta['train_tokens']:,} tokens of train, "
              f"{meta['val_tokens']:,} of val")
    print(f"next: python {script} --dataset={name}{data_dir_option(data_dir)}")
    return meta


def cut_shards(data_dir, name, meta, shards, entries, test_entries, block_size):
    """Writes data_dir/name/<shards>/<number>/{train.bin, val.bin, meta.json} and, last, shards.json, which lists them."""
    folder = Path(data_dir) / name / str(shards)
    if shards < 2 or not isinstance(entries, list) or len(entries) != 2 or not 0 < entries[0] < entries[1] or block_size < 1:
        raise SystemExit(f"--shards={shards} --entries={entries} --block_size={block_size}: give two shards or more, and the entries of "
                         "the smallest and of the largest, such as --shards=50 --entries=[20,2000]")
    sizes = np.geomspace(*entries, shards).round().astype(int).tolist()
    settings = {"sizes": sizes, "test_entries": test_entries, "block_size": block_size, "train_sha256": meta["train_sha256"]}
    if (folder / "shards.json").exists():
        found = read_json(folder / "shards.json")
        if any(found[key] != value for key, value in settings.items()):
            raise SystemExit(f"{folder} holds shards of {found['sizes'][0]} to {found['sizes'][-1]} entries of {found['block_size']} "
                             f"tokens, with {found['test_entries']} to test, or of other text: ask for these, for another number of "
                             "shards, or delete the folder")
        return
    train, val = load_tokens(data_dir, name, "train"), load_tokens(data_dir, name, "val")
    stops = np.cumsum([size * block_size + 1 for size in sizes]).tolist()  # the last entry predicts one token more
    if len(set(sizes)) < shards or stops[-1] > len(train) or not 0 < test_entries * block_size < len(val):
        raise SystemExit(f"{shards} shards of {sizes[0]} to {sizes[-1]} entries, all different, and {test_entries} to test need "
                         f"{stops[-1]:,} tokens of train.bin and {test_entries * block_size + 1:,} of val.bin, which have "
                         f"{len(train):,} and {len(val):,}: choose fewer --shards, other --entries, or fewer --test_entries")
    listed = []
    for i, (size, stop) in enumerate(zip(sizes, stops, strict=True)):
        parts = {"train": train[stop - size * block_size - 1:stop], "val": val[:test_entries * block_size + 1]}
        shard = {"dataset": f"{name}/{shards}/{i:02d}", "entries": size, "mode": i % 2 + 1}
        (folder / f"{i:02d}").mkdir(parents=True, exist_ok=True)
        for split, tokens in parts.items():
            atomic_write(folder / f"{i:02d}" / f"{split}.bin", lambda f, tokens=tokens: f.write(tokens.tobytes()))
        counts = {f"{split}_tokens": len(tokens) for split, tokens in parts.items()}
        hashes = {f"{split}_sha256": bytes_hash(tokens) for split, tokens in parts.items()}
        write_json(folder / f"{i:02d}" / "meta.json", {**meta, **shard, **counts, **hashes})
        listed.append(shard)
    write_json(folder / "shards.json", settings | {"shards": listed})


# ---- reading, for the trainers


# ---- batches of images


# ---- batches of pairs


def prepare_own(config, run):
    """Makes the data sets that need no network, at their first use."""
    scale = vars(config).get("scale")
    own = {"pydocs", "this_python", "digits", "sr_samples"} & {config.dataset}
    folder = f"{config.dataset}_x{scale}" if scale else config.dataset
    if own and run.master and not os.path.exists(os.path.join(config.data_dir, folder, "meta.json")):
        prepare(dataset=config.dataset, data_dir=config.data_dir, **{"scale": scale} if scale else {})
    if run.world > 1:
        dist.barrier()


if __name__ == "__main__":
    from configurator import configure
    prepare(**configure(globals()))
