"""
Turns text or images, once, into a folder data/<name> that data.py reads.

    python prepare.py                           # pydocs: Python 3.11.7's documentation, no network
    python prepare.py --dataset=this_python     # that of the Python that runs, no network
    python prepare.py --dataset=shakespeare_char
    python prepare.py --dataset=tinystories     # or openwebtext; from Hugging Face
    python prepare.py --dataset=tinystories --path=train.txt.gz --val_path=valid.txt.gz  # your copy
    python prepare.py --dataset=text --path=my_folder --tokenizer=sentencepiece --vocab_size=1024
    python prepare.py --dataset=text --path=hf:OWNER/NAME --text_column=content --name=mine
    python prepare.py --shards=50               # also 50 shards of different sizes, for train_rl.py

    python prepare.py --dataset=digits          # 1,797 images of 8x8 in scikit-learn, no network
    python prepare.py --dataset=cifar10         # or fashion_mnist, cifar100, imagenet; Hugging Face
    python prepare.py --dataset=fashion_mnist --path=FOLDER                              # your copy
    python prepare.py --dataset=images --path=FILE_OR_FOLDER --img_size=64 --name=flowers    # yours

    python prepare.py --dataset=sr_samples --scale=2             # 2 photographs in scikit-learn
    python prepare.py --dataset=div2k --path=FOLDER --scale=4    # or FILE.zip or FILE.zip/FOLDER
    python prepare.py --dataset=set5 --path=FOLDER --scale=4     # or set14; for tests only
    python prepare.py --dataset=pairs --path=FOLDER --name=bsd   # yours

It prints what it understood: the files of each split, those left out and why, the column, the
classes. It stops where a file would be used by nothing and where a split or a column is open.

--path is a file, a folder, or hf:OWNER/NAME of the Hugging Face hub. Everywhere in a folder,
symbolic links are followed, and hidden files and __MACOSX are left out. A word in the name of a
folder, else of a file, makes a split, as in Hugging Face's datasets: train or training; validation,
valid, val or dev; test, testing, eval or evaluation. The train split trains, and the validation
split, else the test split, validates. Without a train split, all is one and val_fraction cuts it.
--split=A,B names other splits, --split=A one that val_fraction cuts, --split=all takes all files.

Text: plain text (.txt, .md, .py, ...), also .gz, .bz2 or .xz; rows in .jsonl, .ndjson, .json, .csv,
    .tsv, .parquet or .arrow; a folder of datasets' save_to_disk(). A document ends at a line
    <|endoftext|> of plain text, at the end of a row, and at the end of a file. Between two
    documents, and after the last row, stands the end-of-text token (char: a blank line).
    Writes train.bin and val.bin, flat arrays of token ids, uint16 or uint32 (dtype in meta.json);
    meta.json; and the file of the tokenizer: tokenizer.model of sentencepiece, tokenizer.json of
    --tokenizer=hf:OWNER/NAME, hf:FOLDER or hf:FILE. Documents may be of any length.

Images: a folder, whose folders are the classes, or whose metadata.csv or .jsonl has the columns
    file_name and label (Hugging Face's imagefolder); rows in .parquet or .arrow; save_to_disk();
    four IDX files       train-images-idx3-ubyte, train-labels-idx1-ubyte,
                         t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte, or .gz, in a folder
    .npz of pixels       x_train, x_test: uint8 (N, H, W) or (N, H, W, 1 or 3);
                         y_train, y_test: integers (N,); names of classes: strings (classes,)
    .npz of files        train_jpeg, test_jpeg: uint8, encoded images end to end;
                         train_offsets, test_offsets: (N + 1,), the start of each image and the
                         end of the last; y_train, y_test
    Writes train.npy and val.npy, uint8 (N, img_size, img_size, in_channels); train_labels.npy and
    val_labels.npy, int64 (N,); and meta.json. --img_size=N crops images to the largest square
    around the centre and resizes them. Both splits are shuffled by the seed, so that every part
    start:stop is a random sample. The order before that is that of the source; in a folder, by the
    names of the files and then of the classes.

Pairs, for super-resolution: a folder or .zip of images in high resolution, of any sizes. Images in
    a folder that has the word LR or low in its name are low resolutions: <name>x<scale> there, or
    <name>, belongs to <name>. Missing ones are made by bicubic interpolation (a = -0.5,
    antialiased, as in MATLAB). All images of set5 and set14 are the validation split.
    Writes data/<name>_x<scale> with train.bin, val.bin and meta.json. Training images are cut into
    regions of at most img_size pixels a side. A .bin is uint8: for each pair the low resolution
    (h, w, 3), then the high one (scale h, scale w, 3). meta.json holds shapes and offsets.

Shards: --shards also writes data/<name>/<shards>/<number>, each a data set of text.
    Each train.bin is a part of the whole train.bin that no other shard has. All shards have the
    same val.bin: the first test_entries of the whole one. The shards' modes are 1 and 2 in turn.

The folder is made under the name data/.<name>.part and then renamed. Of two processes that want the
same one, the second waits for the first.
"""
import ast
import contextlib
import errno
import glob
import hashlib
import importlib
import io
import json
import math
import os
import platform
import random
import re
import shlex
import shutil
import sysconfig
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, islice, pairwise, product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F
from tqdm import tqdm

from configurator import configure, defaults
from data import (IMAGE_SETS, KINDS, PAIR_SETS, PYDOCS_SOURCE, TOKENIZER, bytes_hash, code_points,
                  codec, data_dir_option, load_meta, load_tokens)
from run import atomic_write, lock_file, read_json, rng, write_json

# -----------------------------------------------------------------------------
dataset = "pydocs" # a data set of the commands above; your own: text, images or pairs
path = "" # a local file or folder, or hf:OWNER/NAME of the hub, instead of the usual download
val_path = "" # the same for the validation split of text
subset = "" # of a data set of the hub that has several
split = "" # which splits train and validate: 'A,B'; 'A': cut by val_fraction; 'all'; '': as above
text_column = "" # '': text, or the only column of texts
label_column = "" # of images; '': the only one of labels
split_by = "" # where val_fraction cuts text: 'end', or 'document': random ones; '': the usual one
img_size = 0 # pixels a side: of images, 0: unchanged; of regions of pairs, 0: 480, sr_samples 160
skip_damaged = False # leave out images that cannot be read
scale = 2 # of pairs: 2, 3 or 4
make_low = False # of pairs: make every low resolution, also where path has one
tokenizer = "" # char, gpt2, sentencepiece, or hf:NAME_OR_FOLDER; '': the data set's usual one
vocab_size = 0 # of sentencepiece; 0: 4096
val_fraction = 0.0 # share of the validation split; 0: 0.1, for digits 0.2, for openwebtext 0.0005
seed = 1337 # of every random split, and of the order of images
num_proc = 8 # threads that tokenize (gpt2, sentencepiece) or decode images
data_dir = "data"
name = "" # folder in data_dir; '': the data set's name
shards = 0 # parts to cut train.bin into; 0: none
entries = [20, 2000] # of the smallest and the largest shard; the sizes grow by a constant factor
test_entries = 256 # entries of the validation split that all shards share
block_size = 64 # tokens an entry, which is one training sequence
DEFAULTS = defaults(globals())
# -----------------------------------------------------------------------------

PYDOCS = Path(__file__).resolve().parent / "assets/pydocs.txt.xz" # see read_pydocs()
PYDOCS_PYTHON = PYDOCS_SOURCE.split()[-1] # the version
PYDOCS_SHA256 = "3903b23a0572dd373487bd861a8dfa535da72f92dd3ca4b7ff7584bbd2a88a70" # of its text
# repositories at Hugging Face
HUB = {"shakespeare_char": "karpathy/tiny_shakespeare", "tinystories": "roneneldan/TinyStories",
       "openwebtext": "Skylion007/openwebtext", "fashion_mnist": "zalando-datasets/fashion_mnist",
       "cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100",
       "imagenet": "ILSVRC/imagenet-1k"}
LABEL_WORDS = ("label", "labels", "class", "target") # columns that need no --label_column
LABELS = {"cifar100": "fine_label"} # the column, where there are several
VAL_FRACTION = {"digits": 0.2, "openwebtext": 0.0005} # of the others: 0.1
TEST_SETS = ("set5", "set14") # pairs that are all of the validation split
# trainers make these at first use: they need no network
OFFLINE = {"this_python", *(kind.default_dataset for kind in KINDS.values())}
IMAGE_FILES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".bmp", ".gif", ".tif",
               ".tiff", ".ppm", ".pgm")
ROWS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv",
        ".parquet": "parquet", ".arrow": "arrow"} # and the builder of datasets that reads them
PACKED = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma"} # and the module that opens them
SPLIT_WORDS = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"),
               "test": ("test", "testing", "eval", "evaluation")}
ABOUT = re.compile(r"(readme|licen[cs]e|copying|citation|notice)(?![a-z])|dataset_infos?\.json")
NOTES = ("", ".md", ".txt", ".rst", ".cff", ".bib", ".html", ".json") # suffixes of such files
PACKAGES = (".zst", ".zip", ".tar", ".tgz", ".7z", ".rar", ".lz4", ".pdf", ".docx", ".epub")
JUNK = {"__macosx", "thumbs.db", "desktop.ini"}
END = "<|endoftext|>"
NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS)
PIECE = 2**18 # characters: longer documents are read and tokenized in pieces
# keys that are in meta.json where they are given
OPTIONAL = ("subset", "split", "text_column", "label_column", "skip_damaged", "split_by")
SHORT = 60 # characters: python_docs() drops shorter documents, and repeated paragraphs from here on

# -----------------------------------------------------------------------------
# what --path holds

def list_files(path):
    """-> the files of a folder, or the file itself; {why: what is left out}.

    SystemExit: nothing is there, a folder cannot be read, or a link leads nowhere.
    """
    path, files, left_out = Path(path), [], {}
    if os.path.isfile(path):
        return [path], {}

    def stop(error):
        raise SystemExit(f"{error.filename} cannot be read ({error.strerror}): allow it, or give "
                         "another --path") from None

    for root, folders, names in os.walk(path, onerror=stop, followlinks=True):
        why = {name: why_left_out(Path(root, name)) for name in (*folders, *names)}
        for name, reason in why.items():
            if reason:
                left_out.setdefault(reason, []).append(Path(root, name))
        if not why and Path(root) != path:
            left_out.setdefault("empty folder", []).append(Path(root))
        folders[:] = [name for name in folders if not why[name]]
        files += [Path(root, name) for name in names if not why[name]]
    if not files:
        raise SystemExit(f"{path} is no file and no folder with files in it: give one that holds "
                         "the data")
    return sorted(files), left_out


def why_left_out(file):
    if file.name[0] == ".":
        return "hidden"
    if file.name.lower() in JUNK:
        return "not data"
    if not os.path.exists(file):
        raise SystemExit(f"{file} is a link that leads nowhere, or cannot be read: mend or delete "
                         "it")
    if os.path.isdir(file):
        above = file.parent.resolve().is_relative_to(file.resolve())
        return "a link to a folder around it" if above else ""
    return "" if os.path.isfile(file) else "no plain file"


def leave_out(files, left_out, why, condition):
    """The files without those of the condition, which are noted in left_out."""
    gone = {file for file in files if condition(file)}
    if gone:
        left_out.setdefault(why, []).extend(sorted(gone))
    return [file for file in files if file not in gone]


def is_about(file):
    """Whether a file is about data, such as a README."""
    return file.suffix.lower() in NOTES and bool(ABOUT.match(file.name.lower()))


def split_word(name):
    """The split that a word in a name stands for, or ''."""
    words = set(re.split(r"[-._ 0-9]+", name.lower()))
    return next((split for split, known in SPLIT_WORDS.items() if words & set(known)), "")


def find_splits(path, files, left_out, split):
    """{split: files} by the words in the names of folders, else of files; {"all": files} without a
    train split. SystemExit: some files are in a split and some in none."""
    words = {}
    for file in files:
        parts = file.relative_to(path).parts if Path(path) != file else ()
        words[file] = next(filter(None, map(split_word, parts)), "")
    if split == "all" or "train" not in words.values():
        return {"all": files}
    kept = leave_out(files, left_out, "about the data",
                     lambda file: is_about(file) and not words[file])
    if outside := [file for file in kept if not words[file]]:
        raise SystemExit(f"{path} has a split train, and {some(outside)} in no split: move them, "
                         "or take all files as one by --split=all")
    return {name: [file for file in kept if words[file] == name]
            for name in SPLIT_WORDS if name in words.values()}


def use_splits(found, ask, left_out, where):
    """{"train": ..., "val": ...}, or {"all": ...} where val_fraction is to cut it, of {split: ...}.
    What is not used is noted in left_out. SystemExit lists the candidates if the choice is open."""
    names = list(found)
    wanted = ask.split.replace(" ", "").split(",") if ask.split else names
    if not ask.split and len(names) > 1:
        wanted = [name for name in names if name == "train"]
        wanted += [name for name in ("validation", "test") if name in names][:1]
    if names == ["all"] and wanted != names:
        raise SystemExit(f"{where} has no splits: leave out --split={ask.split}")
    if (len(wanted) > 2 or len(set(wanted) & set(names)) < max(1, len(wanted))
            or (not ask.split and len(wanted) < min(2, len(names)))):
        raise SystemExit(f"{where} has the splits {', '.join(names)}: name the one that trains and "
                         f"the one that validates, such as --split={','.join(names[:2])} (it is "
                         f"'{ask.split}'), or one, which val_fraction cuts")
    for name in names:
        if name not in wanted:
            left_out.setdefault("another --split", []).append(name)
    keys = ("train", "val") if len(wanted) == 2 else ("all",)
    return {key: found[name] for key, name in zip(keys, wanted, strict=True)}


def some(names, n=3):
    """The first names of many, in words."""
    rest = f" and {len(names) - n:,} more" if len(names) > n else ""
    return ", ".join(map(str, names[:n])) + rest


def show(source, rows, left_out, notes=()):
    """Prints what was understood of a source: a table, what is left out and why, and notes."""
    print(source)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for name, *cells in rows:
        cells = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        print("  " + "  ".join([name.ljust(widths[0]), *cells]))
    for why, files in left_out.items():
        print(f"  left out ({why}): {some(files)}")
    for note in notes:
        print(f"  {note}")

# -----------------------------------------------------------------------------
# rows, by Hugging Face's datasets

def import_datasets():
    import datasets
    datasets.logging.set_verbosity(datasets.logging.CRITICAL) # what fails is said in one sentence
    datasets.disable_progress_bars()
    return datasets


def first_line(error):
    """An error in words, without its later lines."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".:")


def load_rows(form, files, **options):
    """The rows of local files, streamed. form: a builder of datasets. files: {split: files}."""
    if odd := [file for of_split in files.values() for file in of_split if "::" in str(file)]:
        raise SystemExit(f"{odd[0]} has :: in its path, which means an address to datasets: rename "
                         "it")
    files = {split: [glob.escape(str(file.absolute())) for file in of_split]
             for split, of_split in files.items()}
    return import_datasets().load_dataset(form, data_files=files, streaming=True, **options)


def is_saved(path):
    """Whether a folder is one of datasets' save_to_disk()."""
    return any((Path(path) / name).exists() for name in ("dataset_dict.json", "state.json"))


def load_whole(path, subset, revision=None):
    """{split: Dataset} of hf:OWNER/NAME of the hub, or of a folder of save_to_disk()."""
    datasets = import_datasets()
    try:
        if path.startswith("hf:"):
            datasets.enable_progress_bars()
            found = datasets.load_dataset(path[3:], subset or None, revision=revision)
        else:
            found = datasets.load_from_disk(path)
    except Exception as error: # the hub, the network, damaged files: errors of every kind
        fix = "take an undamaged copy"
        if path.startswith("hf:"):
            fix = "check the name and the network, give a --subset, or a local copy as --path"
        what = f"Hugging Face did not deliver {path[3:]}" if path[:3] == "hf:" else (
            f"{path} is no whole folder of save_to_disk()")
        raise SystemExit(f"{what} ({first_line(error)}): {fix}") from None
    found = dict(found) if hasattr(found, "keys") else {"all": found}
    words = {name: split_word(name) or name for name in found} # dev is validation
    return {words[name]: rows for name, rows in found.items()} if (
        len(set(words.values())) == len(words)) else found


def is_whole(path):
    """Whether the data come as a whole from the hub, or from a folder of save_to_disk()."""
    return not path or path.startswith("hf:") or is_saved(path)


def whole_rows(ask, left_out):
    """-> where from, {split: Dataset}, of what is_whole()."""
    where = ask.path or f"hf:{HUB[ask.dataset]}"
    return where, use_splits(load_whole(where, ask.subset), ask, left_out, where)

# -----------------------------------------------------------------------------
# text: a split is read(), which yields (begins, piece). begins: True where the piece begins a
# document, False where it goes on, None for an empty row, which is left out

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
        text = f"\n{prepare.END}\n".join(prepare.python_docs()).encode()
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


def form_of(file):
    """The builder of datasets that reads a file of rows, or "text"."""
    name = file.name.lower()
    for packed in PACKED:
        name = name.removesuffix(packed)
    return ROWS.get(Path(name).suffix, "text")


def open_any(file, mode, encoding=None):
    module = PACKED.get(file.suffix.lower())
    opened = importlib.import_module(module).open if module else open
    return opened(file, mode, encoding=encoding)


def pieces(text):
    """A document in pieces of at most PIECE characters."""
    begins = True
    while begins or text:
        stop = len(text) if len(text) <= PIECE else boundary(text, PIECE)
        yield begins, text[:stop]
        text, begins = text[stop:], False


def boundary(text, stop):
    """Where to cut a text, at stop or before it, so that no token is cut: before a space behind a
    word, else before a line break behind one, else at stop."""
    for space in " \n":
        i = text.rfind(space, 0, stop)
        while i > 0:
            if not text[i - 1].isspace():
                return i
            i = text.rfind(space, 0, i)
    return stop


def read_text(file):
    """The documents of a plain text: what is between two lines END, without the line breaks around
    these lines. Of the file, only about PIECE characters are in memory."""
    mark = rf"\n[ \t]*{re.escape(END)}[ \t]*"
    with open_any(file, "rt", "utf-8-sig") as f:
        # begins: nothing of the document has been given yet. skip: the line break before it, which
        # belongs to the line END, is still to come; the first document gets one for this
        block = rest = "\n"
        begins = skip = True
        while block:
            block = f.read(PIECE)
            *ended, rest = re.split(mark + (r"(?=\n)" if block else r"(?=\n|\Z)"), rest + block)
            stop = len(rest)
            if block: # the last line waits for its end, unless it is long
                line = max(0, rest.rfind("\n"))
                stop = boundary(rest, line if line > len(rest) - PIECE else len(rest))
            for i, part in enumerate([*ended, rest[:stop]]):
                begins, skip = begins or i > 0, skip or i > 0
                if skip and part:
                    part, skip = part[1:], False
                if part:
                    yield begins, part
                    begins = False
            rest = rest[stop:]
        if begins: # behind the last line END, or in an empty file
            yield True, ""


def pick_column(names, texts, column, where):
    """The column of texts. SystemExit lists the candidates if that is open."""
    chosen = column or ("text" if "text" in names else texts[0] if len(texts) == 1 else "")
    if chosen not in names:
        raise SystemExit(f"{where} has no column '{chosen or 'text'}' but {', '.join(names)}: name "
                         "the texts by --text_column, such as "
                         f"--text_column={[*texts, *names][0]}")
    return chosen


def read_rows(tables, column, where, used):
    """The documents in a column of tables of pyarrow. used: gets the column's name."""
    for table in tables:
        names = table.column_names
        texts = [field.name for field in table.schema if str(field.type).endswith("string")]
        chosen = pick_column(names, texts, column, where)
        if chosen not in texts:
            raise SystemExit(f"{where} has {table.schema.field(chosen).type} and not texts in its "
                             f"column '{chosen}': correct the rows, or name another column of "
                             f"{', '.join(names)} as --text_column")
        used.add(chosen)
        for text in table[chosen].to_pylist():
            yield from pieces(text) if text else [(None, "")]


def read_lines(file, column, used):
    """The same of a .jsonl. By datasets, one whose other columns vary would not be read, and a
    number among the texts would be a text."""
    chosen = ""
    with open_any(file, "rt", "utf-8-sig") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.strip())
                if not chosen:
                    texts = [name for name, value in row.items() if isinstance(value, str)]
                    chosen = pick_column(list(row), texts, column, file)
                    used.add(chosen)
                text = row.get(chosen)
                if not isinstance(text, str | None):
                    raise TypeError(f"'{chosen}' is no text but {text!r:.40}")
                (text or "").encode()
            except UnicodeEncodeError:
                raise ValueError(f"line {number} has half of a surrogate pair, which is no "
                                 "character") from None
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number}, column {error.colno}: {error.msg}") from None
            except AttributeError:
                raise ValueError(f"line {number} is no object with columns") from None
            except (ValueError, TypeError, RecursionError) as error:
                raise ValueError(f"line {number}: {first_line(error)}") from None
            yield from pieces(text) if text else [(None, "")]


def read_dataset(rows, column, where, used):
    """The documents of a Dataset, and an empty one after the last."""
    try:
        tables = rows.to_iterable_dataset().with_format("arrow").iter(256)
        yield from read_rows(tables, column, where, used)
    except Exception as error: # of any kind, for its files may be damaged
        raise SystemExit(f"{where} cannot be read ({first_line(error)}): take an undamaged "
                         "copy") from None
    yield True, ""


def row_tables(file, form, column):
    """The rows of a file as tables of pyarrow."""
    options = {}
    if form == "csv": # texts such as NA and 007 stay; a row longer than the head is an error
        options = {"keep_default_na": False, "index_col": False,
                   "converters": {column or "text": str}}
        options["sep"] = "\t" if ".tsv" in file.name.lower() else ","
        warnings.filterwarnings("error", message="Length of header")
    return load_rows(form, {"all": [file]}, **options)["all"].with_format("arrow").iter(256)


def read_files(files, column, used):
    """The documents of files, one after the other. SystemExit names a file that is damaged."""
    form = "text"
    for file in files:
        form, by_line = form_of(file), re.search(r"\.(jsonl|ndjson)(\.|$)", file.name.lower())
        try:
            if form == "text":
                found = read_text(file)
            elif by_line:
                found = read_lines(file, column, used)
            else:
                found = read_rows(row_tables(file, form, column), column, file, used)
            for begins, piece in found:
                if "\0" in piece:
                    raise ValueError("it has NUL bytes")
                yield begins, piece
        except Exception as error: # the readers of datasets raise errors of every kind
            what = "UTF-8 text" if form == "text" else f"whole rows of {form}"
            raise SystemExit(f"{file} does not hold {what} ({first_line(error)}): correct it or "
                             "leave it out") from None
    if form != "text":
        yield True, "" # so that what separates documents also follows the last row


def local_files(path, ask, left_out):
    """{split: files} of local text."""
    files, why = list_files(path)
    if any(not is_about(file) for file in files): # else they are meant
        files = leave_out(files, why, "about the data", is_about)
    if packed := [file for file in files if file.suffix.lower() in PACKAGES]:
        raise SystemExit(f"{path} holds {some(packed)}, which are no texts: unpack or convert them")
    of_form = {form_of(file): file for file in files}
    if len(of_form) != 1:
        found = [f"{form} ({file})" for form, file in of_form.items()]
        raise SystemExit(f"{path} holds files of {' and of '.join(found)}: give those of one kind, "
                         "and convert or move away the others")
    if ask.text_column and "text" in of_form:
        raise SystemExit(f"--text_column={ask.text_column} is for rows, and {path} is plain text: "
                         "leave it out")
    found = find_splits(path, files, why, ask.split)
    for reason, names in why.items():
        left_out.setdefault(reason, []).extend(names)
    return found


def read_docs(docs):
    """The documents of a list, and an empty one after the last."""
    yield from chain(*map(pieces, filter(None, docs)), [(True, "")])


def text_source(ask, used):
    """-> {"train": read, "val": read} or {"all": read}; {split: where from}; left_out. used: gets
    the names of the columns that are read."""
    left_out, path, column = {}, ask.path, ask.text_column
    if ask.dataset in OFFLINE:
        docs = read_pydocs() if ask.dataset == "pydocs" else python_docs()
        random.Random(ask.seed).shuffle(docs)
        n = int((1 - ask.val_fraction) * len(docs))
        reads = {"train": partial(read_docs, docs[:n]), "val": partial(read_docs, docs[n:])}
        return reads, dict.fromkeys(reads, "Python"), left_out
    if ask.dataset == "shakespeare_char" and not path: # one text that comes in three pieces
        # its main branch needs a script, which datasets no longer runs
        found = load_whole(f"hf:{HUB[ask.dataset]}", "", "refs/convert/parquet")
        text = "".join(chain(*(found[split]["text"] for split in ("train", "validation", "test"))))
        return {"all": partial(pieces, text)}, {"all": "1 text"}, left_out
    if is_whole(path):
        where, found = whole_rows(ask, left_out)
        reads = {split: partial(read_dataset, rows, column, where, used)
                 for split, rows in found.items()}
        return reads, {split: f"{len(rows):,} rows" for split, rows in found.items()}, left_out
    found = local_files(path, ask, left_out)
    if ask.val_path:
        val = list(chain(*local_files(ask.val_path, ask, left_out).values()))
        own = {file.resolve() for file in val}
        train = leave_out(found.get("train") or found["all"], left_out, "in --val_path",
                          lambda file: file.resolve() in own)
        found = {"train": train, "val": val}
    else:
        found = use_splits(found, ask, left_out, path)
    reads = {split: partial(read_files, files, column, used) for split, files in found.items()}
    return reads, {split: count(len(files), "file") for split, files in found.items()}, left_out


def count(n, what):
    return f"{n:,} {what}" + ("s" if n != 1 else "")


def survey(read, what, seen):
    """-> the characters of each document, (n,); how many rows are empty. Notes in seen, (0x110000,)
    bool, which characters there are."""
    sizes, empty = [], 0
    with tqdm(desc=f"reading {what}", unit=" characters", unit_scale=True) as bar:
        for begins, piece in read():
            if begins is None:
                empty += 1
                continue
            if begins:
                sizes.append(0)
                seen[ord("\n")] |= len(sizes) > 1 # a blank line stands between documents
            sizes[-1] += len(piece)
            seen[code_points(piece)] = True
            bar.update(len(piece))
    return np.array(sizes, np.int64), empty


def between(read, start, stop):
    """The characters start to stop, counted over all documents."""
    position = 0
    for begins, piece in read():
        if position >= stop:
            return
        if begins is not None and position + len(piece) > start:
            yield begins, piece[max(0, start - position):stop - position]
        position += len(piece)


def only(read, wanted):
    """The documents that are wanted, (n,) bool, and the empty one after the last row."""
    i = -1
    for begins, piece in read():
        i += begins is True
        if begins is not None and (wanted[i] or not piece):
            yield begins, piece


def cut_text(read, sizes, ask):
    """One text in two: {"train": read, "val": read}, {split: characters of each document}."""
    total = int(sizes.sum())
    if ask.split_by == "end":
        ends, n = sizes.cumsum(), int((1 - ask.val_fraction) * total)
        reads = {"train": partial(between, read, 0, n), "val": partial(between, read, n, total + 1)}
        return reads, {"train": np.diff(ends.clip(0, n), prepend=0),
                       "val": np.diff(ends.clip(n), prepend=n)}
    docs = np.flatnonzero(sizes)
    n = max(1, round(ask.val_fraction * len(docs)))
    if len(docs) < 2:
        raise SystemExit("--split_by=document needs two documents, and there is "
                         f"{len(docs)}: give more, or take --split_by=end")
    val = np.zeros(len(sizes), bool)
    val[docs[torch.randperm(len(docs), generator=rng(ask.seed, "documents"))[:n].numpy()]] = True
    return ({"train": partial(only, read, ~val & (sizes > 0)), "val": partial(only, read, val)},
            {"train": sizes[~val], "val": sizes[val]})


def understand_text(ask):
    """Reads all of the text once, and prints what it is: -> {"train": read, "val": read}, {split:
    documents}, the characters that there are."""
    used = set() # columns
    reads, words, left_out = text_source(ask, used)
    seen, sizes, notes = np.zeros(0x110000, bool), {}, []
    for split, read in reads.items():
        sizes[split], empty = survey(read, split, seen)
        if empty:
            notes.append(f"{empty:,} empty rows of {split} are left out")
    if len(used) > 1:
        raise SystemExit(f"{ask.source} has texts in {' and in '.join(sorted(used))}, each in some "
                         "of its files: name one column by --text_column")
    notes += [f"text column: {column}" for column in used]
    if "all" in reads:
        notes.append(f"val is the last {ask.val_fraction:g} of the text" if ask.split_by == "end"
                     else f"val is {ask.val_fraction:g} of the documents, drawn by seed {ask.seed}")
        reads, sizes = cut_text(reads["all"], sizes["all"], ask)
        words = dict.fromkeys(reads, f"part of {words['all']}")
    documents = {split: int((of_split > 0).sum()) for split, of_split in sizes.items()}
    chars = {split: int(of_split.sum()) for split, of_split in sizes.items()}
    show(ask.source, [("split", "from", "documents", "characters"), *(
        (split, words[split], f"{documents[split]:,}", f"{chars[split]:,}") for split in reads)],
        left_out, notes)
    if 0 in chars.values():
        raise SystemExit(f"{ask.source} gives {chars['train']} characters of training and "
                         f"{chars['val']} of validation text, and both need some: give more text")
    return reads, documents, "".join(map(chr, np.flatnonzero(seen)))

# -----------------------------------------------------------------------------
# tokens

def train_sentencepiece(read, vocab_size):
    """Byte-pair encoding learnt from the first million lines: the model as bytes.

    It keeps all white space.
    """
    import sentencepiece
    # at most 1,000 characters, because sentencepiece ignores lines of more than 4,192 bytes
    texts = tqdm((piece for begins, piece in read() if begins is not None), desc="sentencepiece",
                 unit=" pieces")
    lines = (line[i:i + 1000] for text in texts for line in text.splitlines()
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


def fetch_tokenizer(name):
    """The tokenizer.json of hf:NAME of the hub, or of a folder or file, as bytes."""
    import tokenizers
    source = Path(name.removeprefix("hf:")).expanduser()
    source = source / "tokenizer.json" if source.is_dir() else source
    try:
        if source.is_file():
            found = tokenizers.Tokenizer.from_file(str(source))
        else:
            found = tokenizers.Tokenizer.from_pretrained(name.removeprefix("hf:"))
    except Exception as error: # the library raises Exception itself
        raise SystemExit(f"--tokenizer={name} cannot be loaded ({first_line(error)}): give a "
                         "folder or file with a tokenizer.json, or a name of the Hugging Face hub "
                         "that can be reached") from None
    return found.to_str().encode()


def token_dtype(vocab_size):
    return "uint16" if vocab_size <= 2**16 else "uint32"


def batches(parts, max_chars=2**20):
    """Lists of (begins, piece); each ends with the one that reaches 4,096 or max_chars."""
    batch, size = [], 0
    for begins, piece in parts:
        if begins is None:
            continue
        batch.append((begins, piece))
        size += len(piece)
        if len(batch) == 4096 or size >= max_chars:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def write_split(folder, split, read, tokens, meta):
    """Writes the ids of a split to folder/<split>.bin, with tokens.joint between two documents, and
    their number and hash into meta."""
    n, dtype, digest = 0, np.dtype(meta["dtype"]), hashlib.sha256()
    with (open(folder / f"{split}.bin", "wb") as f,
          tqdm(desc=split, unit=" tokens", unit_scale=True) as bar):
        for batch in batches(read()):
            parts = []
            encoded = tokens.encode([piece for _, piece in batch])
            for (begins, _), ids in zip(batch, encoded, strict=True):
                if not begins and not tokens.joins:
                    raise SystemExit(f"--tokenizer={meta['tokenizer']} cannot tokenize a document "
                                     f"in parts, and one has more than {PIECE:,} characters: "
                                     "divide it, or use another --tokenizer")
                if begins and (n or parts): # not before the first document
                    parts.append(tokens.joint)
                parts.append(ids)
            ids = np.concatenate([np.asarray(part, dtype) for part in parts])
            f.write(ids)
            digest.update(ids)
            n += len(ids)
            bar.update(len(ids))
    meta |= {f"{split}_tokens": n, f"{split}_sha256": digest.hexdigest()}


def say_what_is_lost(tokens, read):
    """Prints whether the first text comes back from its tokens; not all tokenizers promise that."""
    text = next(piece for begins, piece in read() if piece)[:10_000]
    back = tokens.decode([int(i) for i in tokens.encode([text])[0]])
    if back != text:
        same = next((i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b),
                    min(len(text), len(back)))
        print(f"  the tokenizer does not give all of a text back: {text[same:same + 20]!r} becomes "
              f"{back[same:same + 20]!r}")


def prepare_text(folder, settings, ask):
    """Writes the tokenizer and the tokens; returns the content of meta.json."""
    if ask.tokenizer.startswith("hf:"):
        (folder / "tokenizer.json").write_bytes(fetch_tokenizer(ask.tokenizer))
    if ask.tokenizer not in ("char", "sentencepiece"):
        codec(ask.tokenizer, None, folder) # what is missing is said before all of the text is read
    reads, documents, chars = understand_text(ask)
    if ask.tokenizer == "sentencepiece":
        model = train_sentencepiece(reads["train"], settings["vocab_size"])
        (folder / "tokenizer.model").write_bytes(model)
    chars = chars if ask.tokenizer == "char" else None
    tokens = codec(ask.tokenizer, chars, folder, ask.num_proc)
    if ask.tokenizer.startswith("hf:"):
        say_what_is_lost(tokens, reads["train"])
    meta = {**settings, "vocab_size": tokens.vocab_size, "dtype": token_dtype(tokens.vocab_size),
            "eot": tokens.eot, "chars": chars}
    for split, read in reads.items():
        write_split(folder, split, read, tokens, meta)
        meta[f"{split}_documents"] = documents[split]
    return meta

# -----------------------------------------------------------------------------
# images: a split is rows(), which yields (image, label, name). image: a path, the bytes of a file,
# or pixels; label: a number or a name; name: says in an error which image that is

def as_image(data):
    """A Pillow image of a file, of its bytes, or of pixels (H, W) or (H, W, 3)."""
    from PIL import Image
    if isinstance(data, np.ndarray) and data.ndim > 1:
        return Image.fromarray(data)
    return Image.open(data if isinstance(data, Path) else io.BytesIO(data))


def with_image(data, function):
    """function(image) of an image, which stands upright. ValueError if it cannot be read."""
    from PIL import ImageOps, UnidentifiedImageError
    try:
        with as_image(data) as image:
            if image.mode[0] in "IF":
                raise ValueError(f"its pixels are {image.mode}, not of 8 bits")
            ImageOps.exif_transpose(image, in_place=True)
            return function(image)
    except UnidentifiedImageError: # whose message names an object in memory
        raise ValueError("no image that Pillow reads") from None
    except Exception as error: # of any kind: Pillow's decoders raise many
        raise ValueError(first_line(error)) from None


def rows_of_arrays(images, labels, where):
    """rows of n images and an array of labels. SystemExit if the labels are not n integers."""
    n = len(images)
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape not in ((n,), (n, 1)):
        raise SystemExit(f"{where} has {n:,} images and labels of {labels.dtype} {labels.shape}: "
                         "give one integer for each image")
    names = (f"image {i} of {where}" for i in range(n))
    return lambda: zip(images, labels.reshape(-1).tolist(), list(names), strict=True)


def rows_of_pixels(pixels, labels, where):
    channels = pixels.shape[3:]
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or channels not in ((), (1,), (3,)):
        raise SystemExit(f"the images of {where} are {pixels.dtype} {pixels.shape}: give uint8 of "
                         "0 to 255, (N, H, W) or (N, H, W, 1 or 3)")
    pixels = pixels[..., 0] if channels == (1,) else pixels # Pillow has no axis for one channel
    return rows_of_arrays(pixels, labels, where)


def rows_of_files(data, offsets, labels, where):
    """rows of encoded images, which lie end to end in data."""
    if (data.dtype != np.uint8 or offsets.ndim != 1 or offsets[-1:].tolist() != [data.size]
            or (np.diff(offsets.astype(np.int64)) < 0).any()):
        raise SystemExit(f"the offsets of {where} do not rise to the number of its bytes, "
                         f"{data.size:,}: give the start of each image and the end of the last")
    images = [data[start:stop] for start, stop in pairwise(offsets.tolist())]
    return rows_of_arrays(images, labels, where)


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


def read_idx_folder(path, files, left_out):
    rest = leave_out(files, left_out, "about the data", is_about)
    if other := [file for file in rest if "-ubyte" not in file.name]:
        raise SystemExit(f"{path} holds IDX files and {some(other)}, which are used by nothing: "
                         "move them away")
    splits = {}
    for split, key in {"train": "train", "val": "t10k"}.items():
        pixels, labels = read_idx(path, f"{key}-images", 3), read_idx(path, f"{key}-labels", 1)
        splits[split] = rows_of_pixels(pixels, labels, f"{key} in {path}")
    return splits, None


def read_npz(path):
    if not zipfile.is_zipfile(path):
        raise SystemExit(f"{path} is no whole .npz, .parquet or .arrow and no folder: give one of "
                         "them, python prepare.py --help lists what it has to hold")
    try:
        with np.load(path, allow_pickle=False) as file:
            data = {key: np.asarray(file[key]) for key in file.files}
    except Exception as error: # of any kind: zip, zlib, numpy's heads
        raise SystemExit(f"{path} does not hold plain arrays ({first_line(error)}): save it with "
                         "np.savez, without arrays of objects") from None
    splits, is_encoded, used = {}, "train_jpeg" in data, {"classes"}
    for split, key in {"train": "train", "val": "test"}.items():
        names = [f"{key}_jpeg", f"{key}_offsets"] if is_encoded else [f"x_{key}"]
        names.append(f"y_{key}")
        used |= set(names)
        if not data.keys() >= set(names):
            raise SystemExit(f"{path} holds {', '.join(data) or 'nothing'} and lacks one of "
                             f"{', '.join(names)}: add it")
        rows_of = rows_of_files if is_encoded else rows_of_pixels
        splits[split] = rows_of(*(data[name] for name in names), f"{key} in {path}")
    if unused := data.keys() - used:
        raise SystemExit(f"{path} holds {', '.join(sorted(unused))}, which nothing uses: leave it "
                         "out")
    return splits, [str(name) for name in data["classes"]] if "classes" in data else None


def image_columns(features, ask, where):
    """The columns of images and of labels. SystemExit lists the candidates if that is open."""
    datasets = import_datasets()
    images = [name for name, feature in features.items()
              if isinstance(feature, datasets.Image) or feature == datasets.Value("binary")
              or (isinstance(feature, dict) and "bytes" in feature)]
    labels = [name for name, feature in features.items() if name not in images and
              re.match("u?int|(large_)?string", getattr(feature, "dtype", ""))]
    known = [name for name in labels if isinstance(features[name], datasets.ClassLabel)]
    known = known or [name for name in labels if name.lower() in LABEL_WORDS]
    label = ask.label_column or LABELS.get(ask.dataset, "") or "".join(known[:len(known) == 1])
    if len(images) != 1 or label not in labels:
        raise SystemExit(f"{where} has the columns {', '.join(features)}, of which "
                         f"{', '.join(images) or 'none'} may be the image and "
                         f"{', '.join(labels) or 'none'} the label: there must be one image, and "
                         "--label_column names one of several labels")
    return images[0], label


def rows_of_dataset(found, ask, where):
    """-> {split: rows} of {split: rows of datasets}, names of the classes or None."""
    datasets, splits, names = import_datasets(), {}, []
    for split, rows in found.items():
        image, label = image_columns(rows.features, ask, where)
        names.append(getattr(rows.features[label], "names", None))
        splits[split] = partial(image_rows, rows.cast_column(image, datasets.Image(decode=False)),
                                image, label, f"{split} in {where}")
    if names[0] != names[-1]:
        raise SystemExit(f"{where} numbers its classes {some(names[0] or ['without names'])} in "
                         f"one split and {some(names[-1] or ['without names'])} in the other: "
                         "give both the same classes, in the same order")
    ask.label_column = label
    return splits, names[0]


def image_rows(rows, image, label, where):
    for i, row in enumerate(rows):
        data = row[image] or {"bytes": b""}
        if data["bytes"] is None:
            yield Path(data["path"]), row[label], data["path"]
        else:
            yield data["bytes"], row[label], f"row {i} of {where}"


def is_image(file):
    return file.suffix.lower() in IMAGE_FILES


def read_rows_of_images(path, found, ask):
    """Rows of images in {split: .parquet or .arrow files}."""
    forms = {form_of(file) for files in found.values() for file in files}
    if len(forms) != 1 or forms & {"text", "json", "csv"}:
        raise SystemExit(f"{path} holds files of {', '.join(sorted(forms))}: give rows of images "
                         "in .parquet or in .arrow, and move the other files away")
    rows = {split: load_rows(*forms, {split: files})[split] for split, files in found.items()}
    return rows_of_dataset(rows, ask, path)


def read_image_folder(path, found, ask):
    """{split: images in folders of their classes, or with a metadata.csv or .jsonl}."""
    files = [file for of_split in found.values() for file in of_split]
    tables = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
    if other := [file for file in files if not is_image(file) and file.name not in tables]:
        raise SystemExit(f"{path} holds {some(other)}, which are no images and are used by "
                         "nothing: move them away; a table of labels is called metadata.csv and "
                         "has the columns file_name and label")
    classes = sorted({file.parent.name for file in files if is_image(file)})
    if "all" in found and not ask.split and any(map(split_word, classes)):
        raise SystemExit(f"{path} has the folders {some(classes)} and no train: name the folder of "
                         "the training images train, or say by --split=all that these are classes")
    # in the order of the files' names, so that a set numbered there keeps its order
    found = {split: sorted(of_split, key=lambda file: (file.name, file.parent.name))
             for split, of_split in found.items()}
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
    ImageFolder.EXTENSIONS = list(IMAGE_FILES) # its own list lacks .avif
    rows = load_rows("imagefolder", found)
    rows = {split: rows[split] for split in found}
    if next(iter(rows.values())).features.keys() == {"image"}:
        what = "images at different depths" if len(classes) > 1 else "one class only"
        raise SystemExit(f"{path} has {what} ({some(classes)}): put the images into train/<class> "
                         "and val/<class>, or into <class>, or name their labels in a metadata.csv")
    splits, names = rows_of_dataset(rows, ask, path)
    used = {name for rows in splits.values() for _, _, name in rows()}
    if unused := [file for file in files if is_image(file) and str(file.absolute()) not in used]:
        raise SystemExit(f"{path} holds {some(unused)}, which its metadata does not name: add "
                         "them there, or move them away")
    return splits, names


def image_splits(ask, left_out):
    """-> {"train": rows, "val": rows}, or {"all": rows} where val_fraction is to cut it; the names
    of the classes or None."""
    if ask.dataset == "digits" and not ask.path:
        from sklearn.datasets import load_digits
        digits = load_digits()
        pixels = (digits.images * 255 / 16).round().astype(np.uint8) # theirs are 0 to 16
        rows = rows_of_pixels(pixels, digits.target, ask.dataset)
        return {"all": rows}, [str(name) for name in digits.target_names]
    if is_whole(ask.path):
        where, found = whole_rows(ask, left_out)
        return rows_of_dataset(found, ask, where)
    path = Path(ask.path)
    files, why = list_files(path)
    left_out |= why
    for file in [f for f in files if f == files[0] or f.suffix in (".pkl", ".pickle")]:
        with open(file, "rb") as f:
            if f.read(1) == b"\x80": # the first byte of a pickle, of every protocol since 2
                raise SystemExit(f"{file} is a pickle, and reading a pickle runs the code in it: "
                                 "if you trust it, convert it to an .npz of x_train, y_train, "
                                 "x_test, y_test and give that as --path")
    if path.is_file() and form_of(path) == "text":
        return read_npz(path)
    if any("idx3-ubyte" in f.name for f in files):
        return read_idx_folder(path, files, left_out)
    files = leave_out(files, left_out, "about the data", is_about)
    if not files:
        raise SystemExit(f"{path} has no image ({', '.join(IMAGE_FILES)}): give some")
    found = use_splits(find_splits(path, files, left_out, ask.split), ask, left_out, path)
    of_rows = any(form_of(f) in ("parquet", "arrow") and f.stem != "metadata" for f in files)
    return (read_rows_of_images if of_rows else read_image_folder)(path, found, ask)


def decode_images(file, rows, what, img_size, num_proc):
    """Writes the images that can be read to a file, in their order, uint8 (N, side, side, 3),
    decoded by num_proc threads: -> these pixels, their labels, the names of the other images.

    SystemExit if the images are not squares of one size, and no img_size is given.
    """
    from PIL import ImageOps
    labels, damaged, first = [], [], None

    def pixels_of(image):
        image = image.convert("RGB")
        if img_size: # the largest square around the centre
            image = ImageOps.fit(image, (img_size, img_size))
        return np.asarray(image)

    def decode(row):
        data, label, name = row
        try:
            return with_image(data, pixels_of), label, name
        except ValueError as error:
            return None, label, f"{name} ({error})"

    rows = iter(rows())
    with (open(file, "wb") as f, ThreadPoolExecutor(num_proc) as pool,
          tqdm(desc=f"decoding {what}", unit=" images") as bar):
        while block := list(islice(rows, 64)):
            for pixels, label, name in pool.map(decode, block):
                if pixels is None:
                    damaged.append(name)
                    continue
                first = first or (pixels.shape, name)
                height, width, _ = pixels.shape
                if height != width or pixels.shape != first[0]:
                    other = f" and {first[0][1]}x{first[0][0]} ({first[1]})" if labels else ""
                    raise SystemExit(f"the images must be squares of one size, and there is {width}"
                                     f"x{height} ({name}){other}: give --img_size=N to make them "
                                     "so")
                f.write(pixels.tobytes())
                labels.append(label)
            bar.update(len(block))
    if not labels:
        return np.zeros((0, 1, 1, 3), np.uint8), labels, damaged
    return np.memmap(file, np.uint8, "r", shape=(len(labels), *first[0])), labels, damaged


def number_labels(labels, classes, ask):
    """{split: (N,) int64} of {split: labels}; the names of the classes or None; their number.

    Names of labels are numbered in their order. SystemExit for labels and names that do not fit,
    for classes that train has not, and if there is one class only.
    """
    source, known = ask.source, set(next(iter(labels.values())))
    if len({isinstance(label, str) for label in chain(*labels.values())}) > 1 or (
            None in chain(*labels.values())):
        raise SystemExit(f"{source} has images without a label, or with words and numbers as "
                         "labels: correct them, or leave them out")
    if all(isinstance(label, str) for label in known):
        classes = sorted(known)
        number = {name: i for i, name in enumerate(classes)}
        if new := set(chain(*labels.values())) - known:
            raise SystemExit(f"{source} has the class {min(new)} in its validation split alone: "
                             "add images of it to the training split, or leave it out")
        labels = {split: [number[label] for label in found] for split, found in labels.items()}
    labels = {split: np.array(found, np.int64) for split, found in labels.items()}
    found = np.unique(next(iter(labels.values())))
    num_classes = IMAGE_SETS[ask.dataset] or len(classes or range(found.max(initial=0) + 1))
    if classes and len(classes) != num_classes:
        raise SystemExit(f"{source} has {len(classes)} classes and {ask.dataset} has "
                         f"{num_classes}: choose --dataset=images for it")
    for split, of_split in labels.items():
        wrong = of_split[(of_split < 0) | (of_split >= num_classes)]
        new = np.setdiff1d(of_split, found)
        if len(wrong):
            raise SystemExit(f"{source} has the label {wrong[0]} in {split}, and the {num_classes} "
                             f"classes are 0 to {num_classes - 1}: correct the labels")
        if len(new):
            raise SystemExit(f"{source} has the class {classes[new[0]] if classes else new[0]} in "
                             f"{split}, which train has not: add images of it there, or leave it "
                             "out")
    lacking = sorted(set(range(num_classes)) - set(found.tolist()))
    if lacking and not classes and ask.dataset == "images":
        raise SystemExit(f"{source} has labels up to {num_classes - 1} and none of {some(lacking)}:"
                         " number them from 0 without gaps")
    if len(found) == 1:
        one = classes[found[0]] if classes else found[0]
        raise SystemExit(f"{source} has one class only ({one}): give images of two classes or more")
    return labels, classes, num_classes


def write_images(file, pixels, order, channels):
    """Writes pixels[order] as .npy; returns how often each channel has each value, (C, 256)."""
    counts = np.zeros((channels, 256), np.int64)

    def save(f):
        header = {"descr": "|u1", "fortran_order": False,
                  "shape": (len(order), *pixels.shape[1:3], channels)}
        np.lib.format.write_array_header_1_0(f, header)
        for start in range(0, len(order), 64):
            block = pixels[order[start:start + 64]][..., :channels] # (up to 64, H, W, C)
            f.write(block.tobytes())
            for c in range(channels):
                counts[c] += np.bincount(block[..., c].ravel(), minlength=256)

    atomic_write(file, save)
    return counts


def is_grey(pixels):
    """Whether all channels of all images are equal."""
    blocks = (pixels[start:start + 64] for start in range(0, len(pixels), 64))
    return all((block == block[..., :1]).all() for block in blocks)


def mean_and_std(counts):
    """{"mean", "std"}, one value a channel, of how often each channel has each value, (C, 256)."""
    share = counts / counts.sum(1, keepdims=True) # (C, 256)
    mean = share @ np.arange(256)
    variance = (share * (np.arange(256) - mean[:, None])**2).sum(1)
    std = [v**0.5 or 1.0 for v in variance.tolist()] # 1 for a channel of one value
    return {"mean": mean.tolist(), "std": std}


def image_orders(pixels, ask):
    """{"train": indices, "val": indices}, in the order in which the images are written."""
    orders = {split: torch.randperm(len(found), generator=rng(
                  ask.seed, "images", *["val"] * (split == "val"))).numpy()
              for split, found in pixels.items()}
    if "all" in orders:
        n = round(ask.val_fraction * len(orders["all"]))
        orders = {"train": orders["all"][n:], "val": orders["all"][:n]}
    if not all(map(len, orders.values())):
        raise SystemExit(f"{ask.source} gives {len(orders['train']):,} images of training and "
                         f"{len(orders['val']):,} of validation, and both need some: give more "
                         "images")
    return orders


def show_images(ask, labels, classes, num_classes, left_out):
    """Prints the splits and the images of each class."""
    classes, rows = classes or range(num_classes), [("split", "images")]
    rows += [(split, f"{len(found):,}") for split, found in labels.items()]
    counts = {split: np.bincount(found, minlength=num_classes) for split, found in labels.items()}
    listed = [f"{name} {counts['train'][i]:,} + {counts['val'][i]:,}"
              for i, name in enumerate(classes)]
    notes = [f"label column: {ask.label_column}"] if ask.label_column else []
    notes += [f"classes (train + val): {some(listed, 20)}"]
    if lacking := [str(name) for i, name in enumerate(classes) if not counts["val"][i]]:
        notes.append(f"val has no image of {some(lacking, 20)}")
    show(ask.source, rows, left_out, notes)


def prepare_images(folder, settings, ask):
    """Writes images and labels; returns the content of meta.json."""
    left_out, pixels, labels, damaged = {}, {}, {}, []
    try:
        splits, classes = image_splits(ask, left_out)
        for split, rows in splits.items():
            pixels[split], labels[split], broken = decode_images(
                folder / f"{split}.raw", rows, split, ask.img_size, ask.num_proc)
            damaged += broken
    except Exception as error: # the readers of datasets raise errors of every kind
        if getattr(error, "errno", None) in NO_ROOM:
            raise
        raise SystemExit(f"{ask.source} cannot be read ({first_line(error)}): take an "
                         "undamaged copy") from None
    if damaged and not ask.skip_damaged:
        raise SystemExit(f"{count(len(damaged), 'image')} cannot be read: {some(damaged, 20)}: "
                         "replace them, or leave them out by --skip_damaged=True")
    if damaged:
        left_out["damaged"] = damaged
    orders = image_orders(pixels, ask)
    labels, classes, num_classes = number_labels(labels, classes, ask)
    channels = 1 if all(map(is_grey, pixels.values())) else 3
    sides = {found.shape[1] for found in pixels.values()}
    if len(sides) > 1:
        found = " and ".join(f"{side}x{side}" for side in sides)
        raise SystemExit(f"the images must be squares of one size, and there is {found}: give "
                         "--img_size=N to make them so")
    if "all" in splits:
        pixels, labels = (dict.fromkeys(orders, of["all"]) for of in (pixels, labels))
    labels = {split: labels[split][order] for split, order in orders.items()}
    show_images(ask, labels, classes, num_classes, left_out)
    meta = {**settings, "img_size": sides.pop(), "in_channels": channels,
            "num_classes": num_classes, "classes": classes}
    for split, order in orders.items():
        counts = write_images(folder / f"{split}.npy", pixels[split], order, channels)
        atomic_write(folder / f"{split}_labels.npy",
                     lambda f, split=split: np.save(f, labels[split]))
        meta[f"{split}_images"] = len(order)
        for part in (split, f"{split}_labels"):
            meta[f"{part}_sha256"] = bytes_hash(np.memmap(folder / f"{part}.npy", mode="r"))
        if split == "train":
            meta |= mean_and_std(counts)
    for split in splits:
        (folder / f"{split}.raw").unlink()
    return meta

# -----------------------------------------------------------------------------
# pairs: a split is [(name, get, get_low)]; get() and get_low() give an image in high and in low
# resolution as as_image() takes it; get_low is None where the low resolution is to be made

def outside(path):
    """The .zip that the path leads into, or else the path."""
    path = Path(path)
    archives = (p for p in (path, *path.parents) if p.suffix == ".zip" and p.is_file())
    return next(archives, path)


def read_pictures(path, left_out):
    """{name: a function that gives its bytes} of the image files in path, which is a folder, a
    .zip, or a folder of a .zip."""
    archive = outside(path)
    if archive.suffix == ".zip" and archive.is_file():
        try:
            zipped, inside = zipfile.ZipFile(archive), Path(path).relative_to(archive)
        except (OSError, zipfile.BadZipFile) as error:
            raise SystemExit(f"{archive} is damaged ({error}): take an undamaged copy") from None
        names = [Path(name) for name in sorted(zipped.namelist()) if name[-1] != "/"]
        names = [name for name in names if name.is_relative_to(inside)]
        names = leave_out(names, left_out, "hidden", lambda name: name.name[0] == ".")
        names = leave_out(names, left_out, "not data",
                          lambda name: JUNK & {part.lower() for part in name.parts})
        files = {name.relative_to(inside): partial(zipped.read, name.as_posix()) for name in names}
    else:
        found, why = list_files(path)
        left_out |= why
        files = {f.relative_to(path) if f != Path(path) else Path(f.name): f.read_bytes
                 for f in found}
    kept = leave_out(list(files), left_out, "about the data", is_about)
    if other := [name for name in kept if not is_image(name)]:
        raise SystemExit(f"{path} holds {some(other)}, which are no images "
                         f"({', '.join(IMAGE_FILES)}) and are used by nothing: move them away")
    if not kept:
        raise SystemExit(f"{path} has no image ({', '.join(IMAGE_FILES)}) in it: give a folder, a "
                         ".zip or FILE.zip/FOLDER that has some")
    return {name: files[name] for name in kept}


def read_samples():
    """The splits of scikit-learn's two photographs: the left part trains, the right validates."""
    from sklearn.datasets import load_sample_images
    photos, edge = load_sample_images().images, 480 # (427, 640, 3) each
    return {split: [(f"photograph {i} of scikit-learn",
                     partial(photo.__getitem__, (slice(None), columns)), None)
                    for i, photo in enumerate(photos)]
            for split, columns in (("train", slice(edge)), ("val", slice(edge, None)))}


def is_low(name):
    """Whether a folder of this file has the word LR or low in its name."""
    word = r"(^|[-_. ])(lr|lq|low)(bi|bd|res|x?\d)?([-_. ]|$)"
    return any(re.search(word, part.lower()) for part in name.parts[:-1])


def match_low(files, scale, path, left_out):
    """{high resolution: its low resolution, or None} of {name: get}, by the names of the files."""
    for name in files:
        if re.search(r"(^|_)LR$", name.stem):
            raise SystemExit(f"{name} in {path} is called a low resolution, which must lie in a "
                             f"folder LR and be called <name>x{scale}: move such files there, or "
                             "leave them out")
    low = [name for name in files if is_low(name)]
    high, by_stem = [name for name in files if not is_low(name)], {}
    for name in low:
        by_stem.setdefault(name.stem, []).append(name)
    found = {}
    for name in high: # its low resolution lies somewhere in the parent of its folder
        near = [low for stem in (f"{name.stem}x{scale}", name.stem) for low in by_stem.get(stem, [])
                if low.is_relative_to(name.parent.parent)]
        near.sort(key=lambda low: low.parent.name.lower() != f"x{scale}")
        found[name] = near[0] if near else None
    by_stem = {}
    for name in high: # one of two of a name is a low resolution, in a folder that does not say so
        other = by_stem.setdefault((name.stem, *map(split_word, name.parts[:-1])), name)
        if other.parent != name.parent:
            raise SystemExit(f"{path} holds {other} and {name}: if one is the low resolution of "
                             "the other, call its folder LR, else give them different names")
    used = set(found.values())
    rest = leave_out([name for name in low if name not in used], left_out, "of another scale",
                     lambda name: re.search(r"x\d+$", f"{name.parent} {name.stem}".lower()) or
                     re.search(r"x\d+$", name.parent.name.lower()))
    if rest:
        raise SystemExit(f"{path} holds {some(rest)}, low resolutions of nothing: a high one must "
                         f"have the same name, or that without x{scale}")
    return found


def read_pair_splits(ask, left_out):
    """-> {"train": split, "val": split}"""
    dataset, path = ask.dataset, ask.path
    if dataset == "sr_samples":
        return read_samples()
    files = read_pictures(path, left_out)
    if dataset in TEST_SETS: # of several test sets in path, this one
        own = {name: get for name, get in files.items() if dataset in Path(str(name).lower()).parts}
        if own:
            leave_out(list(files), left_out, "another set", lambda name: name not in own)
            files = own
    low = match_low(files, ask.scale, path, left_out)
    entries = {name: (str(name), files[name], files[one] if one and not ask.make_low else None)
               for name, one in low.items()}
    found = use_splits(find_splits("", list(entries), left_out, ask.split), ask, left_out, path)
    if "all" not in found:
        return {split: [entries[name] for name in names] for split, names in found.items()}
    found = list(entries.values())
    n = len(found)
    if dataset not in TEST_SETS:
        n = max(1, round(ask.val_fraction * n))
    order = torch.randperm(len(found), generator=rng(ask.seed, "pairs")).tolist()
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

    def rgb(get, name):
        try:
            return with_image(get(), lambda image: np.asarray(image.convert("RGB")))
        except (ValueError, OSError, zipfile.BadZipFile, zlib.error) as error:
            raise SystemExit(f"{name} is damaged or no image of 8 bits a channel "
                             f"({first_line(error)}): replace it or leave it out") from None

    high = rgb(get, name)
    height, width = high.shape[:2]
    h, w = height // scale, width // scale
    low = get_low and rgb(get_low, f"the low resolution of {name}")
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


def prepare_pairs(folder, settings, ask):
    """Writes the pairs; returns the content of meta.json."""
    left_out = {}
    splits = read_pair_splits(ask, left_out)
    show(ask.source, [("split", "images", "with a low resolution"), *(
        (split, f"{len(entries):,}", f"{sum(low is not None for *_, low in entries):,}")
        for split, entries in splits.items())], left_out)
    if not splits["val"] or not (splits["train"] or ask.dataset in TEST_SETS):
        raise SystemExit(f"{ask.source} gives {len(splits['train'])} images of training "
                         f"and {len(splits['val'])} of validation, and both need some: give more "
                         "images")
    meta = dict(settings)
    for split, entries in splits.items():
        region = settings["region"] if split == "train" else 0
        shapes, offsets, sha256 = write_pairs(folder / f"{split}.bin", entries, ask.scale, region)
        # Trainers split train by start:stop, so that each part has whole images. Of few images, a
        # part takes random regions instead.
        order = range(len(shapes))
        if split == "train" and len(entries) < 16:
            generator = rng(ask.seed, "regions")
            order = torch.randperm(len(shapes), generator=generator).tolist()
        meta |= {f"{split}_images": len(entries), f"{split}_shapes": [shapes[i] for i in order],
                 f"{split}_offsets": [offsets[i] for i in order], f"{split}_sha256": sha256}
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
        for file in (Path(data_dir) / name).glob("tokenizer.*"):
            shutil.copyfile(file, folder / f"{i:02d}" / file.name)
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

def check_settings(ask):
    """SystemExit with one sentence for settings that are impossible or do not go together."""
    dataset, known = ask.dataset, (*TOKENIZER, *IMAGE_SETS, *PAIR_SETS)
    if dataset not in known:
        raise SystemExit(f"--dataset={dataset} is unknown: choose one of {', '.join(known)}")
    of_images = dataset not in TOKENIZER
    if ask.scale not in (2, 3, 4):
        raise SystemExit(f"--scale={ask.scale} is not 2, 3 or 4: choose one of them as the factor "
                         "between the low and the high resolution")
    if dataset in PAIR_SETS and bool(ask.path) == (dataset == "sr_samples"):
        raise SystemExit(f"--dataset={dataset} --path={ask.path} does not fit: sr_samples is of "
                         "scikit-learn and takes no path, the other pairs need a folder or .zip of "
                         "images, such as the official archives of DIV2K")
    if not 0 < ask.val_fraction < 1:
        raise SystemExit(f"--val_fraction={ask.val_fraction} is not a share of the data: choose "
                         "one between 0 and 1")
    parts = Path(ask.name).parts
    if ask.name and (parts[:1] == ("/",) or {"..", ".", ""} & {*parts, ask.name.strip(".")}
                     or not ask.name.isprintable() or len(ask.name.encode()) > 200):
        raise SystemExit(f"--name={ask.name!r} is not possible: give the name of a folder in "
                         f"{ask.data_dir}")
    if ask.subset and ask.path[:3] != "hf:" and (ask.path or dataset not in HUB):
        raise SystemExit(f"--subset={ask.subset} is for the hub: leave it out, or give an hf: path")
    if ask.val_path and (is_whole(ask.path) or ask.split):
        raise SystemExit(f"--val_path={ask.val_path} is for files, without --split: give files of "
                         "both splits, or neither key")
    if ask.path and dataset in OFFLINE:
        raise SystemExit(f"--dataset={dataset} takes no --path={ask.path}, for it is made without "
                         "one: name your own data text or images")
    if not ask.path and dataset in ("images", "imagenet16_120"):
        raise SystemExit(f"--dataset={dataset} lacks the images: give an .npz or a folder as "
                         "--path")
    for_text = {"val_path", "text_column", "split_by", "tokenizer", "vocab_size", "shards"}
    for_images = {"img_size", "skip_damaged", "label_column"}
    if dataset in PAIR_SETS:
        for_text |= {"subset", "skip_damaged", "label_column"}
        for_images = {"img_size"}
    given = [key for key in sorted(for_text if of_images else for_images) if vars(ask)[key]]
    if given:
        raise SystemExit(f"--{given[0]}={vars(ask)[given[0]]} does not fit --dataset={dataset}, "
                         f"for it is of other data: leave it out")
    if ask.img_size < 0 or ask.vocab_size < 0 or ask.num_proc < 1:
        raise SystemExit(f"--img_size={ask.img_size}, --vocab_size={ask.vocab_size} or --num_proc="
                         f"{ask.num_proc} is too small: choose a positive number, or leave it out")
    if of_images:
        return
    if ask.tokenizer not in ("char", "gpt2", "sentencepiece") and ask.tokenizer[:3] != "hf:":
        raise SystemExit(f"--tokenizer={ask.tokenizer} is unknown: choose one of char, gpt2, "
                         "sentencepiece, hf:NAME, hf:FOLDER")
    if ask.vocab_size and ask.tokenizer != "sentencepiece":
        raise SystemExit(f"--vocab_size={ask.vocab_size} does not fit --tokenizer={ask.tokenizer}: "
                         "leave it out, or give a positive one with --tokenizer=sentencepiece")
    if ask.split_by not in ("end", "document") or (ask.val_path and ask.split_by != "end"):
        raise SystemExit(f"--split_by={ask.split_by} is not possible here: choose end or document, "
                         "and leave it out with a --val_path")
    if not ask.path and (dataset == "text" or ask.val_path):
        raise SystemExit(f"--dataset={dataset} --val_path={ask.val_path} lacks the training text: "
                         "give a file or folder as --path")


def source_of(ask):
    """Where the data is from, in words.

    Local files with their sizes, so that a later run does not take changed ones for the same.
    """
    if ask.path:
        parts = []
        for path in filter(None, (ask.path, ask.val_path)):
            part = path
            if not path.startswith("hf:"):
                size = sum(f.stat().st_size for f in list_files(outside(path))[0])
                part += f" ({size:,} bytes)"
            parts.append(part)
        return ", ".join(parts)
    if ask.dataset in HUB:
        return HUB[ask.dataset]
    if ask.dataset in ("digits", "sr_samples"):
        return f"scikit-learn's {ask.dataset}"
    if ask.dataset == "pydocs":
        return PYDOCS_SOURCE
    return f"documentation of Python {platform.python_version()}"


def settings_of(ask):
    """What decides the content of a folder, as meta.json holds it."""
    settings = {"dataset": ask.dataset, "source": ask.source}
    settings |= {key: vars(ask)[key] for key in OPTIONAL if vars(ask)[key]}
    last = {"val_fraction": ask.val_fraction, "seed": ask.seed}
    if ask.dataset in IMAGE_SETS:
        return {"kind": "images", **settings, "resize": ask.img_size, **last}
    if ask.dataset in PAIR_SETS:
        region = ask.img_size or (160 if ask.dataset == "sr_samples" else 480)
        return {"kind": "pairs", **settings, "scale": ask.scale, "make_low": ask.make_low,
                "region": region, **last}
    settings |= {"tokenizer": ask.tokenizer, **last}
    if ask.split_by == "end": # the usual one is not noted
        del settings["split_by"]
    if ask.tokenizer == "sentencepiece":
        settings["vocab_size"] = ask.vocab_size or 4096
    return settings


def prepared(folder, settings):
    """The content of meta.json; {} if there is no such folder yet.

    SystemExit if it has other settings, is damaged, or may be another program's.
    """
    if not os.path.exists(folder / "meta.json"):
        if os.path.lexists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
            raise SystemExit(f"{folder} holds files and no meta.json, so it may be another "
                             "program's: choose another --name, or delete it")
        return {}
    meta = load_meta(folder.parent, folder.name)
    wanted = dict.fromkeys(OPTIONAL) | settings
    changed = [f"{key}={meta.get(key)!r} and not {value!r}" for key, value in wanted.items()
               if meta.get(key) != value]
    if changed:
        raise SystemExit(f"{folder} was prepared with {', '.join(changed)}: choose another --name, "
                         "or delete the folder")
    return meta


@contextlib.contextmanager
def alone(folder):
    """Waits until no other process makes the folder. SystemExit if the disk says no."""
    path = folder.with_name(f".{folder.name}.lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock = lock_file(path)
        except BlockingIOError:
            print(f"another process is preparing {folder}: waiting for it", flush=True)
            lock = lock_file(path, wait=True)
        with lock or contextlib.nullcontext():
            yield
    except OSError as error:
        raise SystemExit(f"{folder} cannot be made ({error.strerror or error}): make room there, "
                         "or choose another --data_dir") from None


def make(folder, settings, ask):
    """Makes the data set under the name .<name>.part, and renames it; returns meta.json.

    A run that fails takes that away; what a killed one leaves is replaced by the next.
    """
    part, kind = folder.with_name(f".{folder.name}.part"), settings.get("kind")
    write = {"images": prepare_images, "pairs": prepare_pairs}.get(kind, prepare_text)
    shutil.rmtree(part, ignore_errors=True) # of a killed run
    part.mkdir()
    try:
        meta = write(part, settings, ask)
        write_json(part / "meta.json", meta)
        if folder.is_dir(): # an empty one
            folder.rmdir()
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
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


def next_command(meta, ask, name):
    option = shlex.quote(f"--dataset={name}") + data_dir_option(ask.data_dir)
    kind = meta.get("kind")
    if kind == "images":
        return f"train_search.py --space=toy_cell {option}"
    if kind == "pairs":
        return f"train_search.py --space=swinir --scale={ask.scale} {option}"
    if ask.shards: # trained, for the table of train_rl.py is of other shards
        return (f"train_rl.py --evaluator=train --shards={ask.shards} "
                f"--entries={str(ask.entries).replace(' ', '')} "
                f"--test_entries={ask.test_entries} --block_size={ask.block_size} {option}")
    return f"train_search.py {option}"


def prepare(dataset=dataset, path=path, **given):
    """
    Writes data_dir/name, for pairs data_dir/name_x<scale>, and shards if there are to be any; the
    docstring of this file lists the files. Returns the content of meta.json. given: other keys.

    Does nothing if the data set is there, and waits where another process makes it. SystemExit:
    settings that do not fit the folder or each other; text or images that are missing, unreadable,
    too few or used by nothing; labels that do not fit the images or the classes; no network where
    it is needed; no room.
    """
    ask = SimpleNamespace(**DEFAULTS | {"dataset": dataset, "path": path} | given)
    ask.path, ask.val_path = (str(Path(p).expanduser()) if p and p[:3] != "hf:" else p
                              for p in (str(ask.path), str(ask.val_path)))
    ask.tokenizer = ask.tokenizer or TOKENIZER.get(dataset, "")
    ask.val_fraction = ask.val_fraction or VAL_FRACTION.get(dataset, 0.1)
    if dataset in TOKENIZER:
        ask.split_by = ask.split_by or ("document" if dataset == "openwebtext" else "end")
    check_settings(ask)
    name = ask.name or dataset
    if dataset in PAIR_SETS:
        name += f"_x{ask.scale}"
    folder, ask.source = Path(ask.data_dir).expanduser() / name, source_of(ask)
    settings = settings_of(ask)

    try:
        meta = prepared(folder, settings)
    except OSError as error:
        raise SystemExit(f"{folder} cannot be read ({error.strerror}): allow it, or choose another "
                         "--name") from None
    if not meta:
        with alone(folder):
            meta = prepared(folder, settings) # by another process
            meta = meta or make(folder, settings, ask)
    else:
        print(f"{folder} is prepared with these settings already, nothing to do")
    if ask.shards:
        cut_shards(folder.parent, name, meta, ask.shards, ask.entries, ask.test_entries,
                   ask.block_size)

    # what is there and what is next
    print(f"{folder}: {describe(meta)}")
    if dataset not in PAIR_SETS or meta["train_images"]: # a test set trains nothing
        print(f"next: python {next_command(meta, ask, name)}")
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
    try:
        prepare(**configure(globals()))
    except KeyboardInterrupt:
        raise SystemExit("stopped: nothing is written, the same command starts again") from None
