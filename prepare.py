"""
Turns text or images, once, into a folder data/<name> that data.py reads.

    python prepare.py                           # pydocs: Python 3.11.7's documentation, no network
    python prepare.py --dataset=this_python     # that of the Python that runs, no network
    python prepare.py --dataset=shakespeare_char
    python prepare.py --dataset=tinystories     # or openwebtext; from Hugging Face
    python prepare.py --dataset=tinystories --path=train.txt.gz --val_path=valid.txt.gz  # your copy
    python prepare.py --dataset=text --path=my_folder --tokenizer=sentencepiece --vocab_size=1024
    python prepare.py --shards=50               # also 50 shards of different sizes, for train_rl.py

    python prepare.py --dataset=digits          # 1,797 images of 8x8 in scikit-learn, no network
    python prepare.py --dataset=cifar10         # or fashion_mnist, cifar100, imagenet; Hugging Face
    python prepare.py --dataset=fashion_mnist --path=FOLDER                              # your copy
    python prepare.py --dataset=images --path=FILE_OR_FOLDER --img_size=64 --name=flowers    # yours

    python prepare.py --dataset=sr_samples --scale=2             # 2 photographs in scikit-learn
    python prepare.py --dataset=div2k --path=FOLDER --scale=4    # or FILE.zip or FILE.zip/FOLDER
    python prepare.py --dataset=set5 --path=FOLDER --scale=4     # or set14; for tests only
    python prepare.py --dataset=pairs --path=FOLDER --name=bsd   # yours

Text: writes train.bin, val.bin, meta.json, and tokenizer.model for sentencepiece.
    --path is a file or a folder of plain text (.txt, .md, .py, ...), text in .gz, .jsonl or
    .parquet (column "text"). In a folder, the files whose paths start with train and with val are
    the two splits. Otherwise the last val_fraction of the characters is the validation split.
    A document ends at a line <|endoftext|> of a text file, at the end of a row, and at the end of
    a file. Between two documents, and after the last row, stands the end-of-text token (gpt2,
    sentencepiece) or a blank line (char).
    A .bin is a flat array of token ids, uint16 or uint32 (dtype in meta.json). A killed run
    continues where it stopped: until both splits are whole, progress.json takes the place of
    meta.json. Each document has to fit into memory, the whole text does not.

Images: writes train.npy and val.npy, uint8 (N, img_size, img_size, in_channels);
    train_labels.npy and val_labels.npy, int64 (N,); and meta.json. --img_size=N crops images to
    the largest square around the centre and resizes them. --path is one of
    four IDX files       train-images-idx3-ubyte, train-labels-idx1-ubyte,
                         t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte, or .gz, in a folder
    .npz of pixels       x_train, x_test: uint8 (N, H, W) or (N, H, W, 1 or 3);
                         y_train, y_test: integers (N,)
    .npz of files        train_jpeg, test_jpeg: uint8, encoded images end to end;
                         train_offsets, test_offsets: (N + 1,), the start of each image and the
                         end of the last; y_train, y_test
    a folder of files    train/<class>/* and val/<class>/* or test/<class>/*;
                         or <class>/*, split by val_fraction
    An .npz may name the classes: strings (classes,). An official test set is the validation split.
    The training images are shuffled by the seed, so that every part start:stop is a random sample.
    A killed run starts again. The decoded images need not fit into memory.

Pairs: writes data/<name>_x<scale> with train.bin, val.bin and meta.json, for super-resolution.
    --path holds images in high resolution, of any sizes. Images in a folder that has the word LR
    in its name (LR_bicubic) are low resolutions: <name>x<scale> there belongs to <name>. Missing
    ones are made by bicubic interpolation (a = -0.5, antialiased, as in MATLAB).
    Folders with train or val in their names are the splits. Otherwise val_fraction of the images,
    and all images of set5 and set14, are the validation split.
    Training images are cut into regions of at most img_size pixels a side. A .bin is uint8: for
    each pair the low resolution (h, w, 3), then the high one (scale h, scale w, 3). meta.json
    holds their shapes and offsets.

Shards: --shards also writes data/<name>/<shards>/<number>, each a data set of text.
    Each train.bin is a part of the whole train.bin that no other shard has. All shards have the
    same val.bin: the first test_entries of the whole one. The shards' modes are 1 and 2 in turn.
"""
import ast
import gzip
import hashlib
import io
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
import torch.distributed as dist
from torch.nn import functional as F
from tqdm import tqdm

from data import (IMAGE_SETS, KINDS, PAIR_SETS, TOKENIZER, bytes_hash, codec, data_dir_option,
                  load_meta, load_tokens)
from run import atomic_write, read_json, rng, write_json

# -----------------------------------------------------------------------------
dataset = "pydocs" # a data set of the commands above; your own: text, images or pairs
path = "" # a local file or folder instead of a download; text, images and imagenet16_120 need it
val_path = "" # the same for the validation split of text
img_size = 0 # pixels a side: of images, 0: unchanged; of regions of pairs, 0: 480, sr_samples 160
scale = 2 # of pairs: 2, 3 or 4
make_low = False # of pairs: make every low resolution, also where path has one
tokenizer = "" # char, gpt2, sentencepiece; '': the data set's usual one
vocab_size = 0 # of sentencepiece; 0: 4096
val_fraction = 0.0 # share of the validation split; 0: 0.1, for digits 0.2, for openwebtext 0.0005
seed = 1337 # of the split of pydocs, this_python and openwebtext, and of the order of images
num_proc = 8 # threads that tokenize (gpt2, sentencepiece) or decode images
data_dir = "data"
name = "" # folder in data_dir; '': the data set's name
shards = 0 # parts to cut train.bin into; 0: none
entries = [20, 2000] # of the smallest and the largest shard; the sizes grow by a constant factor
test_entries = 256 # entries of the validation split that all shards share
block_size = 64 # tokens an entry, which is one training sequence
# -----------------------------------------------------------------------------

PYDOCS = Path(__file__).resolve().parent / "assets/pydocs.txt.xz" # see read_pydocs()
PYDOCS_PYTHON = "3.11.7"
PYDOCS_SHA256 = "3903b23a0572dd373487bd861a8dfa535da72f92dd3ca4b7ff7584bbd2a88a70" # of its text
# repositories at Hugging Face
HUB = {"shakespeare_char": "karpathy/tiny_shakespeare", "tinystories": "roneneldan/TinyStories",
       "openwebtext": "Skylion007/openwebtext", "fashion_mnist": "zalando-datasets/fashion_mnist",
       "cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100",
       "imagenet": "ILSVRC/imagenet-1k"}
# columns of images and labels; of the others: image, label
COLUMNS = {"cifar10": ("img", "label"), "cifar100": ("img", "fine_label")}
VAL_FRACTION = {"digits": 0.2, "openwebtext": 0.0005} # of the others: 0.1
TEST_SETS = ("set5", "set14") # pairs that are all of the validation split
# trainers make these at first use: they need no network
OFFLINE = {"this_python", *(kind.default_dataset for kind in KINDS.values())}
IMAGE_FILES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
END = "<|endoftext|>"
SHORT = 60 # characters: python_docs() drops shorter documents, and repeated paragraphs from here on

# -----------------------------------------------------------------------------
# text: a split is (docs, n_docs); docs() yields its documents, so that they can be read twice

def python_docs():
    """Topics and docstrings of the running Python's standard library.

    ASCII only; no document and no long paragraph is there twice.
    """
    lib = Path(sysconfig.get_path("stdlib"))
    skip = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "encodings",
            "site-packages", "dist-packages"}
    files = [f for f in sorted(lib.rglob("*.py")) if not skip & set(f.relative_to(lib).parts)]
    if not files:
        raise SystemExit(f"this Python keeps no sources of its standard library in {lib}: use a "
                         "full installation of Python, or --dataset=pydocs, which needs none")
    from pydoc_data.topics import topics
    docs = list(topics.values())
    for file in tqdm(files, desc="docstrings", unit=" files"):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                docs.append(ast.get_docstring(node) or "")
    ascii_of = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "--",
                              "…": "...", "•": "*", "→": "->", "×": "x", "≤": "<=", "\xa0": " "})
    docs = {doc.translate(ascii_of) for doc in docs}
    # Some topics contain others. The longest come first, so that what repeats them is dropped, and
    # no paragraph is in both splits.
    seen, kept = set(), []
    for doc in sorted(docs, key=lambda doc: (-len(doc), doc)):
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

    Lines <|endoftext|> separate them; no document has such a line, many have blank ones. For a new
    PYDOCS_PYTHON, make the file again, and set PYDOCS_SHA256 to what this prints:
        import lzma, prepare
        text = f"\\n{prepare.END}\\n".join(prepare.python_docs()).encode()
        prepare.PYDOCS.write_bytes(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
        print(prepare.bytes_hash(text))
    """
    try:
        import lzma # not at the top: a Python that was built without it can do all the rest
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
    """Documents of a text file: exactly what is between two lines END."""
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
        parquet = pyarrow.parquet.ParquetFile(file)
        for batch in parquet.iter_batches(batch_size=1024, columns=["text"]):
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
            what = f"UTF-8 text ({error})"
            if of_rows:
                what = f"rows with a text in the column 'text' ({error!r})"
            raise SystemExit(f"{file} does not hold {what}: convert it or leave it out") from None
    if of_rows:
        yield "" # so that what separates documents also follows the last row


def list_files(path):
    """The file, or all files in the folder that are not hidden."""
    path = Path(path)
    if path.is_file():
        return [path]
    files = [f for f in sorted(path.rglob("*"))
             if f.is_file() and not any(part[0] == "." for part in f.relative_to(path).parts)]
    if not files:
        raise SystemExit(f"{path} is no file and no folder with files in it: give one that holds "
                         "the data")
    return files


def split_files(path, val_path):
    """-> files of train, files of val; no files of val where val_fraction splits the text."""
    files = list_files(path)
    if val_path:
        return files, list_files(val_path)
    train, val = ([f for f in files if str(f.relative_to(path)).startswith(split)]
                  for split in ("train", "val"))
    return (train, val) if train and val else (files, [])


def cut(docs, start, stop):
    """The characters start to stop, counted over all documents, as parts of documents."""
    position = 0
    for doc in docs:
        if position >= stop:
            return
        if position + len(doc) > start:
            yield doc[max(0, start - position):stop - position]
        position += len(doc)


def local_splits(path, val_path, val_fraction):
    """The splits of local text. Reads all of it once, to check and to count it."""
    files = split_files(path, val_path)
    sizes = []
    for of_split in filter(None, files):
        docs = tqdm(read_files(of_split), desc="reading", unit=" documents")
        sizes.append(np.array([len(doc) for doc in docs], np.int64))
    chars = [int(size.sum()) for size in sizes]
    if files[1]:
        splits = [(partial(read_files, f), len(size)) for f, size in zip(files, sizes, strict=True)]
    else:
        ends, n = sizes[0].cumsum(), int((1 - val_fraction) * chars[0])
        chars = [n, chars[0] - n]
        n_train, n_val = int((ends - sizes[0] < n).sum()), int((ends > n).sum())
        splits = [(lambda: cut(read_files(files[0]), 0, n), n_train),
                  (lambda: cut(read_files(files[0]), n, sum(chars) + 1), n_val)]
    if 0 in chars:
        raise SystemExit(f"{path} gives {chars[0]} characters of training and {chars[1]} of "
                         "validation text, and both need some: give more text")
    return splits


def download(dataset, split):
    from datasets import load_dataset
    # the main branch of tiny_shakespeare needs a script, which datasets no longer runs
    revision = "refs/convert/parquet" if dataset == "shakespeare_char" else None
    try:
        return load_dataset(HUB[dataset], split=split, revision=revision)
    except (OSError, RuntimeError, ValueError) as error:
        raise SystemExit(f"Hugging Face did not deliver {HUB[dataset]} ({error}): check the "
                         "network, or give a local copy as --path") from None


def read_splits(dataset, path, val_path, val_fraction, seed):
    """-> the splits of train and of val."""
    if path:
        return local_splits(path, val_path, val_fraction)
    if dataset == "shakespeare_char": # one text that comes in three pieces
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
    return [(lambda docs=docs: chain(filter(None, docs), [""]), len(docs) + 1)
            for docs in (train, val)]

# -----------------------------------------------------------------------------
# images: a split is (labels, get, name); get(i) is image i as as_image() takes it, and name(i) says
# in an error which image that is

def as_image(data):
    """A Pillow image of a file, of its bytes, or of pixels (H, W) or (H, W, 3)."""
    from PIL import Image
    if isinstance(data, np.ndarray) and data.ndim > 1:
        return Image.fromarray(data)
    return Image.open(data if isinstance(data, Path) else io.BytesIO(data))


def make_split(labels, n, get, where):
    """The split of n images. SystemExit if the labels are not n integers."""
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape not in ((n,), (n, 1)):
        raise SystemExit(f"{where} has {n:,} images and labels of {labels.dtype} {labels.shape}: "
                         "give one integer for each image")
    return labels.reshape(-1).astype(np.int64), get, lambda i: f"image {i} of {where}"


def split_of_pixels(pixels, labels, where):
    channels = pixels.shape[3:]
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or channels not in ((), (1,), (3,)):
        raise SystemExit(f"the images of {where} are {pixels.dtype} {pixels.shape}: give uint8 of "
                         "0 to 255, (N, H, W) or (N, H, W, 1 or 3)")
    pixels = pixels[..., 0] if channels == (1,) else pixels # Pillow has no axis for one channel
    return make_split(labels, len(pixels), pixels.__getitem__, where)


def split_of_bytes(data, offsets, labels, where):
    if data.dtype != np.uint8 or offsets.ndim != 1 or offsets[-1:].tolist() != [data.size]:
        raise SystemExit(f"the offsets of {where} do not end with the number of its bytes, "
                         f"{data.size:,}: give the start of each image and the end of the last")
    return make_split(labels, len(offsets) - 1, lambda i: data[offsets[i]:offsets[i + 1]], where)


def read_idx(folder, start, ndim):
    """The array in the IDX file <start>-idx<ndim>-ubyte.

    The file holds a magic number (0, 0, 8 for bytes, ndim), the sizes as uint32, and the bytes.
    """
    files = sorted(folder.glob(f"{start}?idx{ndim}-ubyte*"))
    if not files:
        raise SystemExit(f"{folder} lacks {start}-idx{ndim}-ubyte: add it, for IDX files come in "
                         "fours, images and labels of train and of t10k")
    try:
        with open_any(files[0], "rb") as f:
            data = f.read()
    except (OSError, EOFError, zlib.error) as error:
        raise SystemExit(f"{files[0]} is damaged ({error}): take an undamaged copy") from None
    magic, head = bytes([0, 0, 8, ndim]), 4 + 4 * ndim
    sizes = np.frombuffer(data[4:head].ljust(4 * ndim, b"\0"), ">u4").tolist()
    length = head + math.prod(sizes)
    if data[:4] != magic or len(data) != length:
        raise SystemExit(f"{files[0]} begins with {data[:4].hex()} and has {len(data):,} bytes, "
                         f"where an IDX file of this name and of sizes {sizes} begins with "
                         f"{magic.hex()} and has {length:,}: take an undamaged copy")
    return np.frombuffer(data, np.uint8, offset=head).reshape(sizes)


def read_npz(path):
    if not zipfile.is_zipfile(path):
        raise SystemExit(f"{path} is no .npz and no folder: give one of them, python prepare.py "
                         "--help lists what it has to hold")
    try:
        with np.load(path, allow_pickle=False) as file:
            data = {key: np.asarray(file[key]) for key in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise SystemExit(f"{path} does not hold plain arrays ({error}): save it with np.savez, "
                         "without arrays of objects") from None
    splits, is_encoded = {}, "train_jpeg" in data
    for split, key in {"train": "train", "val": "test"}.items():
        names = [f"{key}_jpeg", f"{key}_offsets"] if is_encoded else [f"x_{key}"]
        names.append(f"y_{key}")
        if not data.keys() >= set(names):
            raise SystemExit(f"{path} holds {', '.join(data) or 'nothing'} and lacks one of "
                             f"{', '.join(names)}: add it")
        split_of = split_of_bytes if is_encoded else split_of_pixels
        splits[split] = split_of(*(data[name] for name in names), f"{key} in {path}")
    return splits, [str(name) for name in data["classes"]] if "classes" in data else None


def read_folder(path):
    val = next((path / name for name in ("val", "test") if (path / name).is_dir()), None)
    folders = {"all": path}
    if val and (path / "train").is_dir():
        folders = {"train": path / "train", "val": val}
    first = next(iter(folders.values()))
    classes = sorted(f.name for f in first.iterdir() if f.is_dir() and f.name[0] != ".")
    number = {name: i for i, name in enumerate(classes)}

    splits = {}
    for split, folder in folders.items():
        files = [f for f in list_files(folder)
                 if f.suffix.lower() in IMAGE_FILES and f.parent != folder]
        if split == "val": # mixes the classes, for an estimate takes the first images
            files.sort(key=lambda f: hashlib.sha256(f.relative_to(folder).as_posix().encode())
                       .digest())
        names = [f.relative_to(folder).parts[0] for f in files]
        if not files or not set(names) <= set(classes):
            what = "no image in a folder of its class"
            if files:
                what = f"the class {min(set(names) - set(classes))}, which train has not"
            raise SystemExit(f"{folder} has {what}: put the images into train/<class> and "
                             "val/<class>, or into <class>")
        labels = np.array([number[name] for name in names], np.int64)
        splits[split] = labels, files.__getitem__, lambda i, files=files: str(files[i])
    return splits, classes


def download_images(dataset):
    import datasets
    splits, (image, label) = {}, COLUMNS.get(dataset, ("image", "label"))
    for split in ("train", "val"):
        official = split
        if split == "val":
            official = "validation" if dataset == "imagenet" else "test"
        data = download(dataset, official)
        rows = data.select_columns([image]).cast_column(image, datasets.Image(decode=False))
        splits[split] = make_split(np.array(data[label][:]), len(data),
                                   lambda i, rows=rows: rows[i][image]["bytes"],
                                   f"{official} in {HUB[dataset]}")
    return splits, data.features[label].names


def read_image_splits(dataset, path):
    """-> splits, names of the classes or None.

    splits: {"train": split, "val": split}, or {"all": split} where val_fraction is to split it.
    """
    if not path and dataset == "digits":
        from sklearn.datasets import load_digits
        digits = load_digits()
        pixels = (digits.images * 255 / 16).round().astype(np.uint8) # theirs are 0 to 16
        split = split_of_pixels(pixels, digits.target, dataset)
        return {"all": split}, [str(name) for name in digits.target_names]
    if not path:
        return download_images(dataset)
    path = Path(path)
    files = list_files(path)
    for file in [f for f in files if f == files[0] or f.suffix in (".pkl", ".pickle")]:
        with open(file, "rb") as f:
            if f.read(1) == b"\x80": # the first byte of a pickle, of every protocol since 2
                raise SystemExit(f"{file} is a pickle, and reading a pickle runs the code in it: "
                                 "if you trust it, convert it to an .npz of x_train, y_train, "
                                 "x_test, y_test and give that as --path")
    if path.is_file():
        return read_npz(path)
    if any("idx3-ubyte" in f.name for f in files):
        splits = {}
        for split, key in {"train": "train", "val": "t10k"}.items():
            pixels, labels = read_idx(path, f"{key}-images", 3), read_idx(path, f"{key}-labels", 1)
            splits[split] = split_of_pixels(pixels, labels, f"{key} in {path}")
        return splits, None
    return read_folder(path)


def with_image(data, name, function):
    """function(image) of the open image data() or, if it cannot be read, SystemExit with name."""
    try:
        with as_image(data()) as image:
            if image.mode[0] in "IF":
                raise ValueError(f"its pixels are {image.mode}")
            return function(image)
    except Exception as error: # of any kind: Pillow's decoders raise many
        raise SystemExit(f"{name} is damaged or no image of 8 bits a channel ({error}): replace it "
                         "or leave it out") from None


def survey(splits, orders, img_size):
    """Reads the header of every image: -> pixels a side; 1 channel if all are grey, else 3."""
    sizes, modes = {}, set() # sizes: {(width, height): the first image of that size}
    for split, order in orders.items():
        _, get, name = splits[split]
        for i in tqdm(order, desc=f"sizes of {split}", unit=" images"):
            size, mode = with_image(partial(get, i), name(i),
                                    lambda image: (image.size, image.mode))
            modes.add(mode)
            sizes.setdefault(size, name(i))
            if not img_size and (len(sizes) > 1 or size[0] != size[1]):
                found = " and ".join(f"{width}x{height} ({where})"
                                     for (width, height), where in sizes.items())
                raise SystemExit(f"the images must be squares of one size, and there is {found}: "
                                 "give --img_size=N to make them so")
    return img_size or size[0], 1 if modes <= {"1", "L", "LA"} else 3


def write_images(file, split, order, side, channels, num_proc):
    """Writes the images of a split in this order, decoded by num_proc threads.

    -> how often each channel has each value, (C, 256).
    """
    from PIL import ImageOps
    _, get, name = split
    counts = np.zeros((channels, 256), np.int64)

    def pixels_of(image):
        image = image.convert("L" if channels == 1 else "RGB")
        image = ImageOps.fit(image, (side, side)) # the largest square around the centre
        return np.asarray(image).reshape(side, side, channels)

    def save(f):
        header = {"descr": "|u1", "fortran_order": False,
                  "shape": (len(order), side, side, channels)}
        np.lib.format.write_array_header_1_0(f, header)
        with (ThreadPoolExecutor(num_proc) as pool,
              tqdm(desc=file.stem, total=len(order), unit=" images") as bar):
            for start in range(0, len(order), 64):
                images = pool.map(lambda i: with_image(partial(get, i), name(i), pixels_of),
                                  order[start:start + 64])
                block = np.stack(list(images)) # (up to 64, H, W, C)
                f.write(block)
                for c in range(channels):
                    counts[c] += np.bincount(block[..., c].ravel(), minlength=256)
                bar.update(len(block))

    atomic_write(file, save)
    return counts


def mean_and_std(counts):
    """{"mean", "std"}, one value a channel, of how often each channel has each value, (C, 256)."""
    share = counts / counts.sum(1, keepdims=True) # (C, 256)
    mean = share @ np.arange(256)
    variance = (share * (np.arange(256) - mean[:, None])**2).sum(1)
    std = [v**0.5 or 1.0 for v in variance.tolist()] # 1 for a channel of one value
    return {"mean": mean.tolist(), "std": std}


def image_orders(splits, settings):
    """-> {"train": split, "val": split}, and for each the indices of its images in their order.

    The validation split keeps its official order.
    """
    orders = {split: list(range(len(labels))) for split, (labels, _, _) in splits.items()}
    shuffled = "all" if "all" in splits else "train"
    generator = rng(settings["seed"], "images")
    orders[shuffled] = torch.randperm(len(orders[shuffled]), generator=generator).tolist()
    if "all" in splits:
        n = round(settings["val_fraction"] * len(orders["all"]))
        orders = {"train": orders["all"][n:], "val": orders["all"][:n]}
        splits = {"train": splits["all"], "val": splits["all"]}
    if not all(orders.values()):
        raise SystemExit(f"{settings['source']} gives {len(orders['train']):,} images of training "
                         f"and {len(orders['val']):,} of validation, and both need some: give "
                         "more images")
    return splits, orders


def count_classes(labels, classes, settings):
    """The number of classes. SystemExit if the labels or the names of the classes do not fit."""
    dataset, source = settings["dataset"], settings["source"]
    num_classes = IMAGE_SETS[dataset] or len(classes or range(labels["train"].max() + 1))
    if classes and len(classes) != num_classes:
        raise SystemExit(f"{source} has {len(classes)} classes and {dataset} has {num_classes}: "
                         "choose --dataset=images for it")
    for split, found in labels.items():
        wrong = found[(found < 0) | (found >= num_classes)]
        if len(wrong):
            raise SystemExit(f"{source} has the label {wrong[0]} in {split}, and the {num_classes} "
                             f"classes are 0 to {num_classes - 1}: correct the labels")
    return num_classes


def prepare_images(folder, settings, path, num_proc):
    """Writes images and labels; returns the content of meta.json.

    Until meta.json is there, progress.json shows that this script made the folder.
    """
    splits, classes = read_image_splits(settings["dataset"], path)
    splits, orders = image_orders(splits, settings)
    labels = {split: splits[split][0][order] for split, order in orders.items()}
    num_classes = count_classes(labels, classes, settings)
    side, channels = survey(splits, orders, settings["resize"])
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "progress.json", settings)
    meta = {**settings, "img_size": side, "in_channels": channels, "num_classes": num_classes,
            "classes": classes}
    for split, order in orders.items():
        file = folder / f"{split}.npy"
        counts = write_images(file, splits[split], order, side, channels, num_proc)
        atomic_write(folder / f"{split}_labels.npy",
                     lambda f, split=split: np.save(f, labels[split]))
        meta[f"{split}_images"] = len(order)
        for part in (split, f"{split}_labels"):
            meta[f"{part}_sha256"] = bytes_hash(np.memmap(folder / f"{part}.npy", mode="r"))
        if split == "train":
            meta |= mean_and_std(counts)
    return meta

# -----------------------------------------------------------------------------
# pairs: a split is [(name, get, get_low)]; get() and get_low() give an image in high and in low
# resolution as as_image() takes it; get_low is None where the low resolution is to be made

def outside(path):
    """The .zip that the path leads into, or else the path."""
    path = Path(path)
    archives = (p for p in (path, *path.parents) if p.suffix == ".zip" and p.is_file())
    return next(archives, path)


def read_pictures(path):
    """{name: a function that gives its bytes} of the image files in path, which is a folder, a
    .zip, or a folder of a .zip."""
    archive = outside(path)
    if archive.suffix == ".zip" and archive.is_file():
        try:
            zipped, inside = zipfile.ZipFile(archive), Path(path).relative_to(archive)
        except (OSError, zipfile.BadZipFile) as error:
            raise SystemExit(f"{archive} is damaged ({error}): take an undamaged copy") from None
        names = [Path(name) for name in sorted(zipped.namelist())]
        files = {str(name.relative_to(inside)): partial(zipped.read, name.as_posix())
                 for name in names
                 if name.is_relative_to(inside) and not name.name.startswith("._")} # of macOS
    else:
        files = {str(f.relative_to(path)): f.read_bytes for f in list_files(path)}
    found = {name: get for name, get in files.items() if Path(name).suffix.lower() in IMAGE_FILES}
    if not found:
        raise SystemExit(f"{path} has no image ({', '.join(IMAGE_FILES)}) in it: give a folder, a "
                         ".zip or FILE.zip/FOLDER that has some")
    return found


def read_samples():
    """The splits of scikit-learn's two photographs: the left part trains, the right validates."""
    from sklearn.datasets import load_sample_images
    photos, edge = load_sample_images().images, 480 # (427, 640, 3) each
    return {split: [(f"photograph {i} of scikit-learn",
                     partial(photo.__getitem__, (slice(None), columns)), None)
                    for i, photo in enumerate(photos)]
            for split, columns in (("train", slice(edge)), ("val", slice(edge, None)))}


def read_pair_splits(settings, path):
    """-> {"train": split, "val": split}"""
    dataset, scale = settings["dataset"], settings["scale"]
    if dataset == "sr_samples":
        return read_samples()
    files = read_pictures(path)
    if dataset in TEST_SETS: # of several test sets in path, this one
        own = {name: get for name, get in files.items() if dataset in Path(name.lower()).parts}
        files = own or files

    # low resolutions by the names of their files
    low = {}
    for name in files:
        if re.search(r"(^|_)LR$", Path(name).stem):
            raise SystemExit(f"{name} in {path} is called a low resolution, which must lie in a "
                             f"folder LR and be called <name>x{scale}: move such files there, or "
                             "leave them out")
        if re.search(r"(^|[_/])LR([_/])", name):
            low.setdefault(Path(name).stem, []).append(name)

    # every other image, with the low resolution that lies somewhere in its folder's parent
    all_low = set(chain(*low.values()))
    splits = {"train": [], "val": [], "": []}
    for name, get in files.items():
        if name in all_low:
            continue
        file = Path(name)
        given = [n for n in low.get(f"{file.stem}x{scale}", [])
                 if Path(n).is_relative_to(file.parent.parent)]
        get_low = files[given[0]] if given and not settings["make_low"] else None
        folder = file.parent.as_posix().lower()
        split = "train" if "train" in folder else "val" if "val" in folder else ""
        splits[split].append((name, get, get_low))
    if splits["train"] and splits["val"]:
        return {split: splits[split] for split in ("train", "val")}

    found = list(chain(*splits.values()))
    n = len(found)
    if dataset not in TEST_SETS:
        n = max(1, round(settings["val_fraction"] * n))
    order = torch.randperm(len(found), generator=rng(settings["seed"], "pairs")).tolist()
    return {"train": [found[i] for i in order[n:]], "val": [found[i] for i in sorted(order[:n])]}


def shrink(high, scale):
    """(scale h, scale w, 3) uint8 -> (h, w, 3), by antialiased bicubic interpolation of the image,
    mirrored at its edges."""
    edge = 2 # low-resolution pixels that the kernel reaches
    x = np.pad(high, ((edge * scale, edge * scale),) * 2 + ((0, 0),), "symmetric")
    x = torch.from_numpy(x).permute(2, 0, 1)[None].float() # (1, 3, H, W)
    # with antialias, PyTorch's a is -0.5
    y = F.interpolate(x, scale_factor=1 / scale, mode="bicubic", antialias=True)
    y = y[0, :, edge:-edge, edge:-edge].round().clamp(0, 255).byte()
    return y.permute(1, 2, 0).numpy()


def read_pair(entry, scale):
    """-> low (h, w, 3), high (scale h, scale w, 3), uint8"""
    name, get, get_low = entry

    def rgb(image):
        return np.asarray(image.convert("RGB"))

    high = with_image(get, name, rgb)
    height, width = high.shape[:2]
    h, w = height // scale, width // scale
    low = get_low and with_image(get_low, f"the low resolution of {name}", rgb)
    if low is not None and low.shape[:2] != (h, w):
        raise SystemExit(f"{name} is {width}x{height} and its low resolution "
                         f"{low.shape[1]}x{low.shape[0]}, where scale={scale} makes {w}x{h}: "
                         "replace one of the two, or make all low resolutions by --make_low=True")
    if min(h, w) < 8:
        raise SystemExit(f"{name} is {width}x{height}, of which scale={scale} leaves less than 8 "
                         "pixels a side: leave it out")
    high = np.ascontiguousarray(high[:scale * h, :scale * w])
    return shrink(high, scale) if low is None else low, high


def write_pairs(file, split, scale, region):
    """Writes the pairs of a split, cut into equal regions of at most `region` pixels a side in high
    resolution; 0: whole.

    -> the low resolutions' [h, w], where each pair begins, the sha256 of the file.
    """
    shapes, offsets, digest = [], [], hashlib.sha256()

    def save(f):
        for entry in tqdm(split, desc=file.stem, unit=" images"):
            low, high = read_pair(entry, scale)
            spans = [] # of rows and of columns: the starts and ends of regions
            for n in low.shape[:2]:
                parts = math.ceil(n * scale / region) if region else 1
                spans.append(list(pairwise(np.linspace(0, n, parts + 1).astype(int).tolist())))
            for (top, bottom), (left, right) in product(*spans):
                offsets.append(f.tell())
                shapes.append([bottom - top, right - left])
                for image, s in ((low, 1), (high, scale)):
                    pixels = image[s * top:s * bottom, s * left:s * right].tobytes()
                    f.write(pixels)
                    digest.update(pixels)

    atomic_write(file, save)
    return shapes, offsets, digest.hexdigest()


def prepare_pairs(folder, settings, path):
    """Writes the pairs; returns the content of meta.json. progress.json as in prepare_images()."""
    splits = read_pair_splits(settings, path)
    if not splits["val"] or not (splits["train"] or settings["dataset"] in TEST_SETS):
        raise SystemExit(f"{settings['source']} gives {len(splits['train'])} images of training "
                         f"and {len(splits['val'])} of validation, and both need some: give more "
                         "images")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "progress.json", settings)
    meta = dict(settings)
    for split, entries in splits.items():
        region = settings["region"] if split == "train" else 0
        file = folder / f"{split}.bin"
        shapes, offsets, sha256 = write_pairs(file, entries, settings["scale"], region)
        # Trainers split train by start:stop, so that each part has whole images. Of few images, a
        # part takes random regions instead.
        order = range(len(shapes))
        if split == "train" and len(entries) < 16:
            generator = rng(settings["seed"], "regions")
            order = torch.randperm(len(shapes), generator=generator).tolist()
        meta |= {f"{split}_images": len(entries), f"{split}_shapes": [shapes[i] for i in order],
                 f"{split}_offsets": [offsets[i] for i in order], f"{split}_sha256": sha256}
    return meta

# -----------------------------------------------------------------------------
# tokens

def train_sentencepiece(docs, vocab_size):
    """Byte-pair encoding learnt from the first million lines: the model as bytes.

    It keeps all white space.
    """
    import sentencepiece
    # at most 1,000 characters, because sentencepiece ignores lines of more than 4,192 bytes
    lines = (line[i:i + 1000] for doc in docs for line in doc.splitlines()
             for i in range(0, len(line), 1000))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=islice(lines, 1_000_000), model_writer=model, vocab_size=vocab_size,
            model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
            remove_extra_whitespaces=False, add_dummy_prefix=False,
            allow_whitespace_only_pieces=True, minloglevel=2)
    except RuntimeError as error:
        reason = str(error).split("] ")[-1].strip(" .")
        raise SystemExit(f"sentencepiece cannot learn --vocab_size={vocab_size} from this text "
                         f"({reason}): choose another --vocab_size or give more text") from None
    return model.getvalue()


def token_dtype(vocab_size):
    return "uint16" if vocab_size <= 2**16 else "uint32"


def batches(docs, max_docs=1024, max_chars=2**24):
    """Lists of documents; each ends with the document that reaches max_docs or max_chars."""
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
    """Writes the tokens of docs to folder/<split>.bin, with the ids `joint` between documents.

    Counts documents and tokens in meta, and writes it to progress.json after every batch.
    """
    if (folder / f"{split}.bin").exists():
        return
    part, dtype = folder / f"{split}.bin.part", np.dtype(meta["dtype"])
    done, size = meta[f"{split}_documents"], meta[f"{split}_tokens"] * dtype.itemsize
    with (open(part, "ab") as f,
          tqdm(desc=split, total=n_docs, initial=done, unit=" documents") as bar):
        if f.tell() < size:
            raise SystemExit(f"{part} has {f.tell():,} bytes and not the {size:,} of "
                             f"progress.json: delete {folder}")
        f.truncate(size) # drops what a killed run wrote after its last progress.json
        for batch in batches(islice(docs, done, None)):
            ids = chain.from_iterable(joint + ids if i else ids
                                      for i, ids in enumerate(encode(batch), done))
            tokens = np.fromiter(ids, dtype)
            f.write(tokens.tobytes())
            f.flush()
            os.fsync(f.fileno()) # the tokens reach the disk before progress.json does
            done += len(batch)
            meta[f"{split}_documents"] = done
            meta[f"{split}_tokens"] += len(tokens)
            write_json(folder / "progress.json", meta)
            bar.update(len(batch))
    os.replace(part, folder / f"{split}.bin")


def start(folder, settings, splits):
    """Makes the folder, the tokenizer and the first progress.json; returns its content."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, chars, model = settings["tokenizer"], None, folder / "tokenizer.model"
    if tokenizer == "char":
        chars = set()
        for docs, n_docs in splits:
            docs = tqdm(docs(), desc="characters", total=n_docs, unit=" documents")
            for i, doc in enumerate(docs):
                chars.update("\n" + doc if i else doc) # a blank line stands between documents
        chars = "".join(sorted(chars))
    if tokenizer == "sentencepiece":
        docs, n_docs = splits[0]
        docs = tqdm(docs(), desc="sentencepiece", total=n_docs, unit=" documents")
        trained = train_sentencepiece(docs, settings["vocab_size"])
        atomic_write(model, lambda f: f.write(trained))
    *_, vocab_size, joint = codec(tokenizer, chars, model)
    meta = {**settings, "vocab_size": vocab_size, "dtype": token_dtype(vocab_size),
            "eot": None if chars else joint[0], "train_tokens": 0, "val_tokens": 0,
            "train_documents": 0, "val_documents": 0, "chars": chars}
    write_json(folder / "progress.json", meta)
    return meta


def prepare_text(folder, settings, meta, path, val_path, num_proc):
    """Writes the tokens; returns the content of meta.json.

    meta: progress.json of the interrupted run that this one continues, or {}.
    """
    tokenizer = settings["tokenizer"]
    if meta:
        print(f"{folder}: continuing after {meta['train_documents']:,} documents of train, "
              f"{meta['val_documents']:,} of val")
    splits = read_splits(settings["dataset"], path, val_path, settings["val_fraction"],
                         settings["seed"])
    meta = meta or start(folder, settings, splits)
    encode, _, _, joint = codec(tokenizer, meta["chars"], folder / "tokenizer.model", num_proc)
    for split, (docs, n_docs) in zip(("train", "val"), splits, strict=True):
        write_split(folder, split, docs(), n_docs, encode, joint, meta)
    for split in ("train", "val"):
        meta[f"{split}_sha256"] = bytes_hash(np.memmap(folder / f"{split}.bin", mode="r"))
    return meta

# -----------------------------------------------------------------------------
# shards of text

def cut_shards(data_dir, name, meta, shards, entries, test_entries, block_size):
    """Writes data_dir/name/<shards>/<number>/{train.bin, val.bin, meta.json} and, last,
    shards.json, which lists them."""
    folder = Path(data_dir) / name / str(shards)
    is_range = isinstance(entries, list) and len(entries) == 2 and 0 < entries[0] < entries[1]
    if shards < 2 or not is_range or block_size < 1:
        raise SystemExit(f"--shards={shards} --entries={entries} --block_size={block_size} is not "
                         "possible: give two shards or more, the entries of the smallest and of "
                         "the largest, and a positive block_size, such as --shards=50 "
                         "--entries=[20,2000]")
    sizes = np.geomspace(*entries, shards).round().astype(int).tolist()
    settings = {"sizes": sizes, "test_entries": test_entries, "block_size": block_size,
                "train_sha256": meta["train_sha256"]}
    if (folder / "shards.json").exists():
        found = read_json(folder / "shards.json")
        if any(found[key] != value for key, value in settings.items()):
            raise SystemExit(f"{folder} holds shards of {found['sizes'][0]} to "
                             f"{found['sizes'][-1]} entries of {found['block_size']} tokens, with "
                             f"{found['test_entries']} to test, or of other text: ask for these, "
                             "for another number of shards, or delete the folder")
        return

    train, val = load_tokens(data_dir, name, "train"), load_tokens(data_dir, name, "val")
    # the last entry of a shard predicts one token more
    stops = np.cumsum([size * block_size + 1 for size in sizes]).tolist()
    test_tokens = test_entries * block_size + 1
    if len(set(sizes)) < shards or stops[-1] > len(train) or not 1 < test_tokens <= len(val):
        raise SystemExit(f"{shards} shards of {sizes[0]} to {sizes[-1]} entries, all different, "
                         f"and {test_entries} to test need {stops[-1]:,} tokens of train.bin and "
                         f"{test_tokens:,} of val.bin, which have {len(train):,} and "
                         f"{len(val):,}: choose fewer --shards, other --entries, or fewer "
                         "--test_entries")
    listed = []
    for i, (size, stop) in enumerate(zip(sizes, stops, strict=True)):
        parts = {"train": train[stop - size * block_size - 1:stop], "val": val[:test_tokens]}
        shard = {"dataset": f"{name}/{shards}/{i:02d}", "entries": size, "mode": i % 2 + 1}
        (folder / f"{i:02d}").mkdir(parents=True, exist_ok=True)
        for split, tokens in parts.items():
            atomic_write(folder / f"{i:02d}" / f"{split}.bin",
                         lambda f, tokens=tokens: f.write(tokens.tobytes()))
        counts = {f"{split}_tokens": len(tokens) for split, tokens in parts.items()}
        hashes = {f"{split}_sha256": bytes_hash(tokens) for split, tokens in parts.items()}
        write_json(folder / f"{i:02d}" / "meta.json", {**meta, **shard, **counts, **hashes})
        listed.append(shard)
    write_json(folder / "shards.json", settings | {"shards": listed})

# -----------------------------------------------------------------------------
# all of it

def check_settings(dataset, path, val_path, tokenizer, vocab_size, val_fraction, img_size, num_proc,
                   shards, scale):
    known = (*TOKENIZER, *IMAGE_SETS, *PAIR_SETS)
    if dataset not in known:
        raise SystemExit(f"--dataset={dataset} is unknown: choose one of {', '.join(known)}")
    of_images = dataset not in TOKENIZER
    if scale not in (2, 3, 4):
        raise SystemExit(f"--scale={scale} is not 2, 3 or 4: choose one of them as the factor "
                         "between the low and the high resolution")
    if dataset in PAIR_SETS and bool(path) == (dataset == "sr_samples"):
        raise SystemExit(f"--dataset={dataset} --path={path} does not fit: sr_samples is of "
                         "scikit-learn and takes no path, the other pairs need a folder or .zip of "
                         "images, such as the official archives of DIV2K")
    if not 0 < val_fraction < 1:
        raise SystemExit(f"--val_fraction={val_fraction} is not a share of the data: choose one "
                         "between 0 and 1")
    if not path and dataset in ("images", "imagenet16_120"):
        raise SystemExit(f"--dataset={dataset} lacks the images: give an .npz or a folder as "
                         "--path")
    if of_images and (val_path or tokenizer or vocab_size or shards):
        raise SystemExit(f"--dataset={dataset} is of images, and --val_path, --tokenizer, "
                         "--vocab_size and --shards are for text: leave them out")
    if img_size < 0 or (img_size and not of_images):
        raise SystemExit(f"--img_size={img_size} does not fit --dataset={dataset}: give 1 or more "
                         "for images, and 0, the default, for text or to leave images unchanged")
    if num_proc < 1:
        raise SystemExit(f"--num_proc={num_proc} is too small: choose 1 or more threads")
    if of_images:
        return
    if tokenizer not in ("char", "gpt2", "sentencepiece"):
        raise SystemExit(f"--tokenizer={tokenizer} is unknown: choose one of char, gpt2, "
                         "sentencepiece")
    if vocab_size < 0 or (vocab_size and tokenizer != "sentencepiece"):
        raise SystemExit(f"--vocab_size={vocab_size} does not fit --tokenizer={tokenizer}: leave "
                         "it out, or give a positive one with --tokenizer=sentencepiece")
    if not path and (dataset == "text" or val_path):
        raise SystemExit(f"--dataset={dataset} --val_path={val_path} lacks the training text: give "
                         "a file or folder as --path")


def source_of(dataset, path, val_path):
    """Where the data is from, in words.

    Local files with their sizes, so that a later run does not take changed ones for the same.
    """
    if path:
        paths = [p for p in (path, val_path) if p]
        sizes = [sum(f.stat().st_size for f in list_files(outside(p))) for p in paths]
        return ", ".join(f"{p} ({size:,} bytes)" for p, size in zip(paths, sizes, strict=True))
    if dataset in HUB:
        return HUB[dataset]
    if dataset in ("digits", "sr_samples"):
        return f"scikit-learn's {dataset}"
    version = PYDOCS_PYTHON if dataset == "pydocs" else platform.python_version()
    return f"documentation of Python {version}"


def begun(data_dir, name, settings):
    """The content of meta.json, else of an interrupted run's progress.json, else {}.

    SystemExit if what is there has other settings, or may be another program's.
    """
    folder = Path(data_dir) / name
    progress, finished = folder / "progress.json", (folder / "meta.json").exists()
    meta = {}
    if finished:
        meta = load_meta(data_dir, name)
    elif progress.exists():
        meta = read_json(progress)
    if not meta and any(chain(folder.glob("*.bin"), folder.glob("*.npy"))):
        raise SystemExit(f"{folder} has .bin or .npy files without a meta.json, so they may be "
                         "another program's: choose another --name")
    kind = settings.get("kind")
    starts_again = not finished and kind and meta.get("kind") == kind
    changed = [f"{key}={meta.get(key)!r} and not {value!r}" for key, value in settings.items()
               if meta.get(key) != value]
    if meta and changed and not starts_again:
        raise SystemExit(f"{folder} was prepared with {', '.join(changed)}: choose another --name, "
                         "or delete the folder")
    return meta


def describe(meta):
    """What a prepared data set holds, in words."""
    kind = meta.get("kind", "text")
    if kind == "pairs":
        return (f"{meta['train_images']:,} images of train in {len(meta['train_shapes']):,} "
                f"regions, {meta['val_images']:,} of val, enlarged {meta['scale']} times")
    if kind == "images":
        side, channels = meta["img_size"], meta["in_channels"]
        return (f"{meta['train_images']:,} images of train, {meta['val_images']:,} of val, "
                f"{side}x{side} in {channels} {'channel' if channels == 1 else 'channels'}, "
                f"{meta['num_classes']} classes")
    return (f"{meta['tokenizer']}, vocab size {meta['vocab_size']:,}, "
            f"{meta['train_tokens']:,} tokens of train, {meta['val_tokens']:,} of val")


def prepare(dataset=dataset, path=path, val_path=val_path, tokenizer=tokenizer,
            vocab_size=vocab_size, val_fraction=val_fraction, seed=seed, num_proc=num_proc,
            data_dir=data_dir, name=name, shards=shards, entries=entries, test_entries=test_entries,
            block_size=block_size, img_size=img_size, scale=scale, make_low=make_low):
    """
    Writes data_dir/name, for pairs data_dir/name_x<scale>, and shards if there are to be any; the
    docstring of this file lists the files. Returns the content of meta.json.

    Continues an interrupted run of text with the same settings, starts one of images again, and
    does nothing if the data set is complete. SystemExit: settings that do not fit the folder or
    each other; text or images that are missing, unreadable or too few; labels that do not fit the
    images or the classes; no network where it is needed.
    """
    # settings
    tokenizer = tokenizer or TOKENIZER.get(dataset, "")
    val_fraction = val_fraction or VAL_FRACTION.get(dataset, 0.1)
    check_settings(dataset, path, val_path, tokenizer, vocab_size, val_fraction, img_size, num_proc,
                   shards, scale)
    settings = {"dataset": dataset, "source": source_of(dataset, path, val_path)}
    last = {"val_fraction": val_fraction, "seed": seed}
    next_script, name = "train_search.py", name or dataset
    option = f"--dataset={name}{data_dir_option(data_dir)}"
    if dataset in IMAGE_SETS:
        settings = {"kind": "images", **settings, "resize": img_size, **last}
        next_script += " --space=toy_cell"
    elif dataset in PAIR_SETS:
        region = img_size or (160 if dataset == "sr_samples" else 480)
        settings = {"kind": "pairs", **settings, "scale": scale, "make_low": make_low,
                    "region": region, **last}
        next_script += f" --space=swinir --scale={scale}"
        name += f"_x{scale}"
    else:
        settings = {**settings, "tokenizer": tokenizer, **last}
        if tokenizer == "sentencepiece":
            settings["vocab_size"] = vocab_size or 4096
        if shards: # trained, for the table of train_rl.py is of other shards
            next_script = (f"train_rl.py --evaluator=train --shards={shards} "
                           f"--entries={str(entries).replace(' ', '')} "
                           f"--test_entries={test_entries} --block_size={block_size}")

    # the data, unless it is there
    folder = Path(data_dir) / name
    meta = begun(data_dir, name, settings)
    if (folder / "meta.json").exists():
        print(f"{folder} is prepared with these settings already, nothing to do")
    else:
        if dataset in IMAGE_SETS:
            meta = prepare_images(folder, settings, path, num_proc)
        elif dataset in PAIR_SETS:
            meta = prepare_pairs(folder, settings, path)
        else:
            meta = prepare_text(folder, settings, meta, path, val_path, num_proc)
        write_json(folder / "progress.json", meta)
        os.replace(folder / "progress.json", folder / "meta.json")
    if shards:
        cut_shards(data_dir, name, meta, shards, entries, test_entries, block_size)

    # what is there and what is next
    print(f"{folder}: {describe(meta)}")
    if dataset not in PAIR_SETS or meta["train_images"]: # a test set trains nothing
        print(f"next: python {next_script} {option}")
    return meta


def prepare_own(config, run):
    """Makes a data set that needs no network, at its first use."""
    scale = vars(config).get("scale")
    folder = f"{config.dataset}_x{scale}" if scale else config.dataset
    meta = Path(config.data_dir) / folder / "meta.json"
    if config.dataset in OFFLINE and run.master and not meta.exists():
        prepare(dataset=config.dataset, data_dir=config.data_dir,
                **{"scale": scale} if scale else {})
    if run.world > 1:
        dist.barrier()


if __name__ == "__main__":
    from configurator import configure
    prepare(**configure(globals()))
