"""
Turns text into data/<name>/{train,val}.bin + meta.json, once, and hands out batches of it to the trainers.

    python prepare.py                                       # pydocs: this Python's own documentation, no network
    python prepare.py --dataset=shakespeare_char
    python prepare.py --dataset=tinystories                 # from Hugging Face
    python prepare.py --dataset=tinystories --path=train.txt.gz --val_path=valid.txt.gz      # the same from local files
    python prepare.py --dataset=text --path=my_folder --tokenizer=sentencepiece --vocab_size=1024
    python prepare.py --shards=50                           # also 50 parts of different sizes, for train_rl.py

--path is a file or a folder of plain text (.txt, .md, .py, ...), .gz of text, .jsonl or .parquet (column "text"). Files whose
names start with train and val are the two splits of a folder; otherwise its last val_fraction of characters is the validation
split. Documents end at the line <|endoftext|> of a text file, at the end of a row, and where the next file begins; between two
of them, and after the last row, stands the end-of-text token (gpt2, sentencepiece) or a blank line (char).

A .bin is a flat array of token ids, uint16 or uint32 as meta.json says. A run that was killed continues where it was: until
both splits are whole there is a progress.json in the place of meta.json. One document has to fit into memory, all need not.

A shard is a data set of its own, data/<name>/<shards>/<number>: its train.bin is a part of train.bin that no other shard has, and
its val.bin, the same for all, the first test_entries of val.bin. Every second one is of mode 1, the others are of mode 2.
"""

import ast
import gzip
import io
import hashlib
import json
import os
import platform
import random
import re
import sysconfig
import zlib
from contextlib import suppress
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

dataset = "pydocs"  # pydocs, shakespeare_char, tinystories, openwebtext, text
path = ""  # a local file or folder in the place of the download; dataset=text needs it
val_path = ""  # the same for the validation split
tokenizer = ""  # char, gpt2, sentencepiece; '' = the data set's usual one
vocab_size = 0  # of sentencepiece; 0 = 4096
val_fraction = 0.0  # share of the validation split; 0 = 0.1, and 0.0005 for openwebtext
seed = 1337  # of the split of pydocs and openwebtext
num_proc = 8  # threads that tokenize (gpt2, sentencepiece)
data_dir = "data"
name = ""  # folder in data_dir; '' = the data set's name
shards = 0  # parts to cut train.bin into
entries = [20, 2000]  # of the smallest and the largest shard, the others between them in equal ratios
test_entries = 256  # entries of the test split of all shards
block_size = 64  # tokens an entry, which is one training sequence

TOKENIZER = {"pydocs": "char", "shakespeare_char": "char", "tinystories": "gpt2", "openwebtext": "gpt2", "text": "char"}
HUB = {"shakespeare_char": "karpathy/tiny_shakespeare", "tinystories": "roneneldan/TinyStories",
       "openwebtext": "Skylion007/openwebtext"}
END = "<|endoftext|>"
SHORT = 60  # characters: pydocs drops shorter documents, and longer paragraphs that it has already


# ---- sources: for each split a function that returns its documents, so that they can be read twice, and how many they are

def python_docs():
    """Topics and docstrings of the running Python's standard library, ASCII, no document and no long paragraph twice."""
    lib = Path(sysconfig.get_path("stdlib"))
    skip = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "encodings", "site-packages", "dist-packages"}
    files = [f for f in sorted(lib.rglob("*.py")) if not skip & set(f.relative_to(lib).parts)]
    if not files:
        raise SystemExit(f"this Python keeps no sources of its standard library in {lib}: use a full installation of Python, "
                         "or --dataset=text --path=FILE_OR_FOLDER")
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


def open_text(file):
    return (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8-sig")


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
        raise SystemExit(f"{path} is no file and no folder with files in it: give one that holds text")
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
        docs = python_docs()
        random.Random(seed).shuffle(docs)
        n = int((1 - val_fraction) * len(docs))
        train, val = docs[:n], docs[n:]
    return [(lambda docs=docs: chain(filter(None, docs), [""]), len(docs) + 1) for docs in (train, val)]


# ---- tokenizers

def codec(tokenizer, chars, model, num_proc=1):
    """-> encode (texts -> lists of ids), decode (ids -> text), size of the vocabulary, ids that stand between two documents"""
    if tokenizer == "gpt2":
        import tiktoken
        try:
            bpe = tiktoken.get_encoding("gpt2")
        except OSError as error:
            raise SystemExit(f"tiktoken could not fetch GPT-2's vocabulary ({type(error).__name__}): connect to the network "
                             "once, or set TIKTOKEN_CACHE_DIR to a folder that holds it, or use another --tokenizer") from None
        return partial(bpe.encode_ordinary_batch, num_threads=num_proc), bpe.decode, bpe.n_vocab, [bpe.eot_token]
    if tokenizer == "sentencepiece":
        import sentencepiece
        bpe = sentencepiece.SentencePieceProcessor(model_proto=model.read_bytes())
        return partial(bpe.encode, num_threads=num_proc), bpe.decode, bpe.vocab_size(), [bpe.eos_id()]
    ids = {c: i for i, c in enumerate(chars)}

    def encode(texts):
        try:
            return [[ids[c] for c in text] for text in texts]
        except KeyError as error:
            raise SystemExit(f"the character {error} is not among the {len(chars)} of this data set: leave it out, "
                             "or prepare the data with --tokenizer=gpt2") from None

    return encode, lambda tokens: "".join(chars[i] for i in tokens), len(chars), [ids[c] for c in "\n\n" if c in ids]


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

def write(path, save):
    """save(file) into a temporary file, then rename: path is there whole or not at all. SystemExit if the disk says no."""
    tmp = f"{path}.tmp"
    try:
        with open(tmp, "wb") as f:
            save(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        with suppress(OSError):
            os.remove(tmp)
        raise SystemExit(f"{path} cannot be written ({getattr(error, 'strerror', None) or 'the disk is full?'}): "
                         "make room or choose another folder; what was there before is whole") from None


def seal(data):
    """data with the hash of its content: unseal() then tells a changed file from the one that was written."""
    return {**data, "sha256": hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()}


def unseal(data, path):
    """data without its seal; SystemExit if it is no object or the seal is wrong. A file without one is taken as written by hand."""
    if not isinstance(data, dict):
        raise SystemExit(f"{path} is damaged: it holds {str(data)[:40]!r} where a JSON object is expected")
    content = {key: value for key, value in data.items() if key != "sha256"}
    renamed = any(re.fullmatch("[0-9a-f]{64}", str(value)) and not key.endswith("_sha256") for key, value in content.items())
    if renamed or ("sha256" in data and seal(content) != data):
        raise SystemExit(f"{path} is not what was written: take an undamaged copy, or remove its \"sha256\" if you changed it yourself")
    return content


def write_json(path, data):
    write(path, lambda f: f.write(json.dumps(seal(data), indent=2).encode()))


def read_json(path):
    """The object in a file of write_json(), or one written by hand. SystemExit if it is missing or damaged."""
    try:
        data = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise SystemExit(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise SystemExit(f"{path} is damaged, it is not JSON: {error}") from None
    return unseal(data, path)


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
        write(model, lambda f: f.write(train_sentencepiece(docs, settings["vocab_size"])))
    *_, vocab_size, joint = codec(tokenizer, chars, model)
    meta = {**settings, "vocab_size": vocab_size, "dtype": token_dtype(vocab_size), "eot": None if chars else joint[0],
            "train_tokens": 0, "val_tokens": 0, "train_documents": 0, "val_documents": 0, "chars": chars}
    write_json(folder / "progress.json", meta)
    return meta


def check_settings(dataset, path, val_path, tokenizer, vocab_size, val_fraction):
    if dataset not in TOKENIZER:
        raise SystemExit(f"--dataset={dataset} is unknown: choose one of {', '.join(TOKENIZER)}")
    if tokenizer not in ("char", "gpt2", "sentencepiece"):
        raise SystemExit(f"--tokenizer={tokenizer} is unknown: choose one of char, gpt2, sentencepiece")
    if vocab_size < 0 or (vocab_size and tokenizer != "sentencepiece"):
        raise SystemExit(f"--vocab_size={vocab_size} is for --tokenizer=sentencepiece and positive: {tokenizer} has its own")
    if not 0 < val_fraction < 1:
        raise SystemExit(f"--val_fraction={val_fraction} is no share of the text: choose one between 0 and 1")
    if not path and (dataset == "text" or val_path):
        raise SystemExit(f"--dataset={dataset} --val_path={val_path} lacks the training text: give a file or folder as --path")


def prepare(dataset=dataset, path=path, val_path=val_path, tokenizer=tokenizer, vocab_size=vocab_size, val_fraction=val_fraction,
            seed=seed, num_proc=num_proc, data_dir=data_dir, name=name, shards=shards, entries=entries, test_entries=test_entries,
            block_size=block_size):
    """
    Writes data_dir/name/{train.bin, val.bin, meta.json}, tokenizer.model for sentencepiece, and the shards if there are to be any.
    Returns what meta.json says.

    Continues what an interrupted run with the same settings began, and does nothing where a finished one stands. SystemExit:
    settings that do not fit the folder or each other, text that is missing, unreadable or too short, no network where needed.
    """
    tokenizer = tokenizer or TOKENIZER.get(dataset, "char")
    val_fraction = val_fraction or (0.0005 if dataset == "openwebtext" else 0.1)
    check_settings(dataset, path, val_path, tokenizer, vocab_size, val_fraction)
    # with the size of the files: a rerun must not take other text for the same
    source = ", ".join(f"{p} ({sum(f.stat().st_size for f in list_files(p)):,} bytes)" for p in (path, val_path) if p)
    source = source or HUB.get(dataset) or f"documentation of Python {platform.python_version()}"
    settings = {"dataset": dataset, "source": source, "tokenizer": tokenizer, "val_fraction": val_fraction, "seed": seed}
    if tokenizer == "sentencepiece":
        settings["vocab_size"] = vocab_size or 4096

    name = name or dataset
    folder = Path(data_dir) / name
    finished, progress = folder / "meta.json", folder / "progress.json"
    meta = load_meta(data_dir, name) if finished.exists() else read_json(progress) if progress.exists() else {}
    if not meta and any(folder.glob("*.bin")):
        raise SystemExit(f"{folder} has .bin files without a meta.json, so they may be another program's: choose another --name")
    changed = [f"{key}={meta.get(key)!r} and not {value!r}" for key, value in settings.items() if meta and meta.get(key) != value]
    if changed:
        raise SystemExit(f"{folder} was prepared with {', '.join(changed)}: choose another --name, or delete the folder")

    if finished.exists():
        print(f"{folder} is prepared with these settings already, nothing to do")
    else:
        if meta:
            print(f"{folder}: continuing after {meta['train_documents']:,} documents of train, {meta['val_documents']:,} of val")
        splits = read_splits(dataset, path, val_path, val_fraction, seed)
        meta = meta or start(folder, settings, splits)
        encode, _, _, joint = codec(tokenizer, meta["chars"], folder / "tokenizer.model", num_proc)
        for split, (docs, n_docs) in zip(("train", "val"), splits, strict=True):
            write_split(folder, split, docs(), n_docs, encode, joint, meta)
        for split in ("train", "val"):
            meta[f"{split}_sha256"] = hash_of(np.memmap(folder / f"{split}.bin", mode="r"))
        write_json(progress, meta)
        os.replace(progress, finished)
    if shards:
        cut_shards(data_dir, name, meta, shards, entries, test_entries, block_size)
    script = f"train_rl.py --shards={shards}" if shards else "train_search.py"
    print(f"{folder}: {tokenizer}, vocab size {meta['vocab_size']:,}, {meta['train_tokens']:,} tokens of train, "
          f"{meta['val_tokens']:,} of val\nnext: python {script} --dataset={name}{data_dir_option(data_dir)}")
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
            write(folder / f"{i:02d}" / f"{split}.bin", lambda f, tokens=tokens: f.write(tokens.tobytes()))
        counts = {f"{split}_tokens": len(tokens) for split, tokens in parts.items()}
        hashes = {f"{split}_sha256": hash_of(tokens) for split, tokens in parts.items()}
        write_json(folder / f"{i:02d}" / "meta.json", {**meta, **shard, **counts, **hashes})
        listed.append(shard)
    write_json(folder / "shards.json", settings | {"shards": listed})


# ---- reading, for the trainers

def data_dir_option(data_dir):
    return "" if data_dir == "data" else f" --data_dir={data_dir}"


def load_meta(data_dir, dataset):
    """meta.json of the folder data_dir/dataset. SystemExit if it is not prepared, or not whole."""
    folder = Path(data_dir) / dataset
    command = f"python prepare.py --dataset={dataset}" if dataset in HUB or dataset == "pydocs" else (
        f"python prepare.py --dataset=text --path=FILE_OR_FOLDER --name={dataset}")
    command += data_dir_option(data_dir)
    if not (folder / "meta.json").exists():
        raise SystemExit(f"{folder} is not prepared: run {command}")
    meta = read_json(folder / "meta.json")
    for split in ("train", "val"):
        try:
            size = meta[f"{split}_tokens"] * np.dtype(meta["dtype"]).itemsize
            assert meta[f"{split}_sha256"] and meta["vocab_size"] and meta["tokenizer"]
        except (AssertionError, KeyError, TypeError):
            raise SystemExit(f"{folder / 'meta.json'} is damaged: delete {folder} and run {command}") from None
        file = folder / f"{split}.bin"
        found = file.stat().st_size if file.exists() else 0
        if found != size:
            raise SystemExit(f"{file} has {found:,} bytes and not the {size:,} of meta.json: delete {folder} and run {command}")
    return meta


def load_shards(data_dir, dataset, shards, mode=0):
    """[{"dataset", "entries", "mode"}] of data_dir/dataset/<shards>, in order of size; mode=0: all. SystemExit if they are not prepared."""
    file = Path(data_dir) / dataset / str(shards) / "shards.json"
    if not file.exists():
        raise SystemExit(f"{file} is missing: run python prepare.py --dataset={dataset} --shards={shards}{data_dir_option(data_dir)}")
    if mode not in (0, 1, 2):
        raise SystemExit(f"mode={mode} is not 1 or 2, the two halves of the shards, or 0 for all.")
    return [shard for shard in read_json(file)["shards"] if mode in (0, shard["mode"])]


def hash_of(tokens):
    return hashlib.sha256(tokens).hexdigest()  # about a second a gigabyte


def load_tokens(data_dir, dataset, split):
    """Token ids of "train" or "val", read-only and left on the disk: np.memmap (tokens,) of uint16 or uint32. SystemExit if they
    are not the bytes that were written."""
    meta, file = load_meta(data_dir, dataset), Path(data_dir) / dataset / f"{split}.bin"
    tokens = np.memmap(file, dtype=meta["dtype"], mode="r")
    if hash_of(tokens) != meta[f"{split}_sha256"]:
        raise SystemExit(f"{file} is damaged, its bytes are not those that were written: delete {file.parent} and prepare it again")
    return tokens


def load_tokenizer(data_dir, dataset):
    """-> encode (text -> list of ids), decode (list of ids -> text); decode skips ids beyond the vocabulary."""
    meta = load_meta(data_dir, dataset)
    encode, decode, n, _ = codec(meta["tokenizer"], meta["chars"], Path(data_dir) / dataset / "tokenizer.model")
    return lambda text: encode([text])[0], lambda ids: decode([i for i in ids if i < n])


def check_length(tokens, block_size, what):
    """SystemExit unless tokens hold at least one block and the token after it; what names them in the message."""
    if len(tokens) < block_size + 1:
        raise SystemExit(f"{what} has {len(tokens):,} tokens, and block_size={block_size} needs {block_size + 1:,}: "
                         "give more text or a smaller block_size")


def get_batch(tokens, batch_size, block_size, generator, device="cpu"):
    """
    A random batch: x, y of int64, both (batch_size, block_size), y one token further than x.

    Every window of block_size + 1 tokens is equally likely; generator, a torch.Generator on the CPU, draws them.
    """
    offsets = torch.randint(len(tokens) - block_size, (batch_size, 1), generator=generator)
    window = tokens[offsets.numpy() + np.arange(block_size + 1)]  # (batch_size, block_size + 1)
    x, y = (torch.from_numpy(w.astype(np.int64)) for w in (window[:, :-1], window[:, 1:]))
    if "cuda" in str(device):
        x, y = x.pin_memory(), y.pin_memory()
    return x.to(device, non_blocking=True), y.to(device, non_blocking=True)


def blocks(tokens, batch_size, block_size, device="cpu"):
    """
    Walks all tokens once, in order: yields x, y of int64, both (up to batch_size, block_size).

    Each of the len(tokens) - 1 predictions counts once; the rest of the last block is x = 0, y = -1 (ignore_index).
    """
    step = batch_size * block_size
    for i in range(0, len(tokens) - 1, step):
        part = torch.from_numpy(tokens[i:i + step + 1].astype(np.int64))
        n = len(part) - 1
        rows = -(-n // block_size)
        x, y = torch.zeros(rows * block_size, dtype=torch.int64), torch.full((rows * block_size,), -1)
        x[:n], y[:n] = part[:-1], part[1:]
        yield x.view(rows, block_size).to(device), y.view(rows, block_size).to(device)


if __name__ == "__main__":
    from configurator import configure
    prepare(**configure(globals()))
