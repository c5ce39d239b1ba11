"""Text by prepare.py: nothing is lost or in both splits, and an unfinished file is not taken for a
complete one."""

import gzip
import json
import lzma
import os
import platform
import signal
import subprocess
import sys
import sysconfig
from itertools import chain, pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SHARED, killed_in

import bench
import data
import export
import prepare as p

SCRIPT = Path(p.__file__)
needs_data = pytest.mark.skipif(not (SHARED / "text").is_dir(),
                                reason=f"no small real data in {SHARED} (set NAS_DATA)")
STORY = "Two  spaces,\ta tab;\n\n\n    four spaces, é 漢字 😀 and the end. \n"


def run(folder, *args):
    return subprocess.run([sys.executable, SCRIPT, *args], cwd=folder, capture_output=True,
                          text=True, timeout=300)


def text_of(folder, name, splits=("train", "val")):
    tokens = data.load_codec(folder, name)
    return "".join(tokens.decode(data.load_tokens(folder, name, split).tolist())
                   for split in splits)


def files_of(folder):
    return {f.name: f.read_bytes() for f in Path(folder).iterdir()}


def stamps_of(folder):
    return [(f.read_bytes(), f.stat().st_mtime_ns) for f in sorted(Path(folder).iterdir())]


def said(done):
    """The last line of a script that failed, without a traceback."""
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    return done.stderr.splitlines()[-1]


@pytest.fixture(scope="session")
def pydocs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pydocs")
    done = run(folder)
    assert done.returncode == 0, done.stderr
    return folder / "data", done.stdout


# ---- pydocs and this_python

PYDOCS = {"train": data.PYDOCS_TRAIN,
          "val": "e16b658c79705c51b1d0edc5fa8a1fd86947221101329e4c1b0323ae7ac4d286"}


@pytest.fixture(scope="session")
def this_python(tmp_path_factory):
    folder = tmp_path_factory.mktemp("this_python")
    p.prepare("this_python", data_dir=folder)
    return folder


def leaked(folder, name):
    """The number of paragraphs of the validation split, and the long ones that train has, too."""
    train, val = ({paragraph.strip() for paragraph in text_of(folder, name, [split]).split("\n\n")}
                  for split in ("train", "val"))
    return len(val), [paragraph for paragraph in train & val if len(paragraph) >= 80]


def test_pydocs_is_the_same_on_every_python(pydocs):
    folder, out = pydocs
    meta = data.load_meta(folder, "pydocs")
    assert meta["source"] == "documentation of Python 3.11.7" and meta["vocab_size"] == 96
    for split, sha256 in PYDOCS.items():
        assert data.bytes_hash(data.load_tokens(folder, "pydocs", split)) == sha256
    assert f"{meta['train_tokens']:,}" in out
    assert out.rstrip().endswith("python train_search.py --dataset=pydocs")


@pytest.mark.skipif(platform.python_version() != p.PYDOCS_PYTHON,
                    reason=f"every Python but {p.PYDOCS_PYTHON} has other texts")
def test_pydocs_is_what_its_python_gives():
    assert p.read_pydocs() == p.python_docs()


def test_this_python_needs_nothing_but_the_interpreter(this_python):
    meta = data.load_meta(this_python, "this_python")
    assert meta["source"] == f"documentation of Python {platform.python_version()}"
    assert 1e6 < meta["train_tokens"] + meta["val_tokens"] < 4e6, meta
    assert 0.05 < meta["val_tokens"] / meta["train_tokens"] < 0.25, meta
    assert text_of(this_python, "this_python").isascii()


def test_no_validation_text_is_shown_in_training(pydocs, this_python):
    for folder, name in ((pydocs[0], "pydocs"), (this_python, "this_python")):
        n, both = leaked(folder, name)
        assert n > 500 and not both, (name, both)


def test_trainers_make_what_needs_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(p, "python_docs", p.read_pydocs) # seconds saved
    for name in ("pydocs", "this_python"):
        config = SimpleNamespace(dataset=name, data_dir=str(tmp_path), space="gpt",
                                 out_dir=str(tmp_path / "out"), init_from="scratch")
        p.prepare_own(config, SimpleNamespace(master=True, world=1))
        splits, facts = data.Tokens.load(config)
        assert data.bytes_hash(splits["val"].ids) == PYDOCS["val"]
        assert facts["vocab_size"] == bench.VOCAB_SIZE[name]


def test_a_damaged_asset_is_one_sentence(tmp_path, monkeypatch):
    whole, file = p.PYDOCS.read_bytes(), tmp_path / "pydocs.txt.xz"
    assert len(whole) < 600_000
    monkeypatch.setattr(p, "PYDOCS", file)
    for content, word in {None: "No such file", b"": "ended before", whole[:-9]: "ended before",
                          whole[:5000] + b"damaged" + whole[5007:]: "Corrupt",
                          b"plain text": "format",
                          lzma.compress(b"other"): f"text has {data.bytes_hash(b'other')}"}.items():
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(SystemExit) as stop:
            p.prepare(data_dir=tmp_path / "data")
        message = stop.value.code
        assert all(part in message for part in (str(file), p.PYDOCS_SHA256, word)), message
        assert "\n" not in message and message.endswith("use --dataset=this_python"), message
    file.write_bytes(whole)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "lzma", None) # as where Python was built without it
        with pytest.raises(SystemExit, match=r"built without lzma.*--dataset=this_python$"):
            p.prepare(data_dir=tmp_path / "data")
    assert not list(tmp_path.glob("data/[!.]*"))


def test_the_seed_decides_the_split(pydocs, tmp_path):
    p.prepare(data_dir=tmp_path, name="same")
    p.prepare(data_dir=tmp_path, name="other", seed=7)
    folders = (pydocs[0] / "pydocs", tmp_path / "same", tmp_path / "other")
    first, same, other = (files_of(folder) for folder in folders)
    assert first == same
    assert first["val.bin"] != other["val.bin"]
    assert set(text_of(tmp_path, "same")) == set(text_of(tmp_path, "other"))


def test_an_interpreter_without_sources_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(SystemExit, match="keeps no sources"):
        p.prepare("this_python", data_dir=tmp_path)
    assert not (tmp_path / "this_python").exists()


# ---- tokenizers

@pytest.mark.parametrize("tokenizer", ["char", "gpt2", "sentencepiece"])
def test_text_survives_the_round_trip(tokenizer, tmp_path, request):
    if tokenizer == "gpt2":
        request.getfixturevalue("gpt2")
    text = STORY * 20 + "\n".join(f"line {i} of {i * i}" for i in range(200))
    (tmp_path / "my.txt").write_text(text, encoding="utf-8")
    size = 400 if tokenizer == "sentencepiece" else 0
    meta = p.prepare("text", str(tmp_path / "my.txt"), tokenizer=tokenizer, vocab_size=size,
                     data_dir=tmp_path)
    assert text_of(tmp_path, "text") == text
    assert len(text_of(tmp_path, "text", ["train"])) == int(0.9 * len(text))
    assert max(data.load_tokens(tmp_path, "text", "train")) < meta["vocab_size"]
    sizes = {"char": len(set(text)), "gpt2": 50257, "sentencepiece": 400}
    assert meta["vocab_size"] == sizes[tokenizer]
    tokens = data.load_codec(tmp_path, "text")
    decode = tokens.decode

    def encode(text):
        return [int(i) for i in tokens.encode([text])[0]]

    assert decode(encode(STORY)) == STORY and decode([]) == "" == decode(encode(""))
    assert decode(encode("end") + encode(STORY)) == "end" + STORY
    if tokenizer == "char":
        assert list(meta["chars"]) == sorted(set(text))
        with pytest.raises(SystemExit, match="'Ω'"):
            encode("an Ω")
    else:
        assert decode(encode("Ω \u00ff never seen")) == "Ω \u00ff never seen"


def test_wide_tokens_where_the_vocabulary_asks_for_them(tmp_path):
    assert [p.token_dtype(n) for n in (2, 2**16, 2**16 + 1)] == ["uint16", "uint16", "uint32"]
    text = "".join(chr(i) for i in range(0x20000, 0x20000 + 70_000))
    (tmp_path / "wide.txt").write_text(text, encoding="utf-8")
    assert p.prepare("text", str(tmp_path / "wide.txt"), data_dir=tmp_path)["dtype"] == "uint32"
    assert text_of(tmp_path, "text") == text


# ---- sources

def write_docs(folder, form, docs):
    file = folder / f"docs{form}"
    marked = "".join(f"{doc}\n{p.END}\n" for doc in docs)
    rows = "".join(json.dumps({"id": i, "text": doc}) + "\n" for i, doc in enumerate(docs))
    if form in (".txt", ".jsonl"):
        file.write_text(marked if form == ".txt" else rows, encoding="utf-8")
    elif form in (".txt.gz", ".jsonl.gz"):
        file.write_bytes(gzip.compress((marked if form == ".txt.gz" else rows).encode()))
    elif form == ".parquet":
        import pyarrow
        import pyarrow.parquet
        table = pyarrow.table({"id": list(range(len(docs))), "text": docs})
        pyarrow.parquet.write_table(table, file, row_group_size=7)
    else: # a folder of folders
        for i, doc in enumerate(docs):
            sub = file / f"part{i // 10:02}"
            sub.mkdir(parents=True, exist_ok=True)
            suffix = (".txt", ".md", ".py")[i % 3]
            (sub / f"{i % 10}{suffix}").write_text(doc + "\n", encoding="utf-8")
        (file / ".hidden").mkdir()
        (file / ".hidden" / "x.txt").write_bytes(b"\xff\0")
    return str(file)


@pytest.mark.parametrize("form", [".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet", ""])
def test_every_form_of_path_gives_every_document_once_and_in_order(form, tmp_path):
    docs = [f"document {i}: é{'x' * (i % 13)}" for i in range(50)]
    path = write_docs(tmp_path, form, docs)
    p.prepare("text", path, data_dir=tmp_path, name="char")
    assert [line for line in text_of(tmp_path, "char").split("\n") if line] == docs
    meta = p.prepare("text", path, tokenizer="sentencepiece", vocab_size=300, data_dir=tmp_path,
                     name="pieces")
    ends = sum((data.load_tokens(tmp_path, "pieces", split) == meta["eot"]).sum()
               for split in ("train", "val"))
    # between plain files; after every marked document and every row
    assert ends == (50 if form else 49)


def test_files_called_train_and_val_are_the_splits(tmp_path):
    (tmp_path / "my" / "val").mkdir(parents=True)
    files = {"train-0.txt": "aa", "train-1.txt": "bb", "val/x.txt": "cc", "README": "dd"}
    for file, text in files.items():
        (tmp_path / "my" / file).write_text(text)
    p.prepare("text", str(tmp_path / "my"), data_dir=tmp_path, name="a")
    p.prepare("text", str(tmp_path / "my/train-0.txt"), val_path=str(tmp_path / "my/val"),
              data_dir=tmp_path, name="b")
    a, b = ([text_of(tmp_path, name, [split]) for split in ("train", "val")] for name in "ab")
    assert a == ["aa\n\nbb", "cc"]
    assert b == ["aa", "cc"]


def test_hugging_face_sets(tmp_path, monkeypatch):
    import datasets
    docs = [f"story {i}" for i in range(4000)]

    def load_dataset(repo, subset, revision=None): # stands for the network
        splits = {"karpathy/tiny_shakespeare": [["ab\n" * 300], ["cd"], ["e"]],
                  "roneneldan/TinyStories": [[*docs, ""], ["never seen"]],
                  "Skylion007/openwebtext": [[*docs, ""]],
                  "me/mine": [docs, ["never seen"]]}[repo]
        return datasets.DatasetDict({split: datasets.Dataset.from_dict({"text": texts})
                                     for split, texts in zip(
                                         ("train", "validation", "test"), splits, strict=False)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    p.prepare("tinystories", tokenizer="char", data_dir=tmp_path)
    assert text_of(tmp_path, "tinystories", ["train"]) == "".join(doc + "\n\n" for doc in docs)
    assert text_of(tmp_path, "tinystories", ["val"]) == "never seen\n\n"
    p.prepare("shakespeare_char", data_dir=tmp_path)
    assert text_of(tmp_path, "shakespeare_char") == "ab\n" * 300 + "cde"
    p.prepare("openwebtext", tokenizer="char", data_dir=tmp_path)
    train, val = (text_of(tmp_path, "openwebtext", [split]).split("\n\n")[:-1]
                  for split in ("train", "val"))
    assert len(val) == 2 and sorted(train + val) == sorted(docs)
    p.prepare("text", "hf:me/mine", data_dir=tmp_path, subset="x", split="validation,train")
    assert text_of(tmp_path, "text", ["train"]) == "never seen\n\n"


@needs_data
def test_shakespeare_has_the_known_size(tmp_path):
    path = str(SHARED / "text/tinyshakespeare.txt.gz")
    meta = p.prepare("shakespeare_char", path, data_dir=tmp_path)
    known = {"train_tokens": 1_003_854, "val_tokens": 111_540, "vocab_size": 65}
    assert {key: meta[key] for key in known} == known


@needs_data
def test_tinystories_has_the_known_size(tmp_path, gpt2):
    train, val = (str(SHARED / f"text/tinystories_{part}.txt.gz")
                  for part in ("train", "v1_valid_head"))
    meta = p.prepare("tinystories", train, val_path=val, data_dir=tmp_path)
    known = {"train_tokens": 1_470_219, "val_tokens": 195_558, "vocab_size": 50257,
             "dtype": "uint16"}
    assert {key: meta[key] for key in known} == known
    assert (data.load_tokens(tmp_path, "tinystories", "train") == meta["eot"]).sum() == 7151


# ---- what a folder means

def parquet(file, **columns):
    import pyarrow
    import pyarrow.parquet
    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), file)


def texts_of(folder, name):
    return [text_of(folder, name, [split]).split("\n\n") for split in ("train", "val")]


FOLDERS = { # {file: text}: of train, of val, words of the printed table
    "hub": ({"README.md": "about", "data/test-00000-of-00001.parquet": "t",
             "data/train-00000-of-00002.parquet": "a", "data/train-00001-of-00002.parquet": "b",
             "data/validation-00000-of-00001.parquet": "v"}, "ab", "v",
            ["about the data): {}/README.md", "another --split): test", "2 files"]),
    "train and test": ({"train-x.parquet": "a", "test-x.parquet": "t"}, "a", "t", []),
    "words": ({"train/1.txt": "a", "train/deep/2.txt": "b", "dev/1.txt": "v",
               "__MACOSX/train/1.txt": "junk", ".git/train": "junk"}, "ab", "v",
              ["not data): {}/__MACOSX", "hidden): {}/.git"]),
    "valid": ({"TinyStories-train.txt": "a", "TinyStories-valid.txt": "v", "LICENSE": "l"}, "a",
              "v", ["about the data): {}/LICENSE"]),
    "training": ({"Training/1.JSONL": "a", "Evaluation/1.ndjson": "v"}, "a", "v", []),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_the_words_of_hugging_face_make_the_splits(name, tmp_path, capsys):
    files, train, val, printed = FOLDERS[name]
    for file, text in files.items():
        file = tmp_path / "in" / file
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".parquet":
            parquet(file, text=[text])
        else:
            rows = file.suffix.lower() in (".jsonl", ".ndjson")
            file.write_text(json.dumps({"text": text}) if rows else text)
    p.prepare("text", str(tmp_path / "in"), data_dir=tmp_path)
    found = ["".join(texts) for texts in texts_of(tmp_path, "text")]
    assert found == [train, val]
    out = capsys.readouterr().out
    assert all(word.format(tmp_path / "in") in out for word in printed), out


def test_links_are_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/1.txt").write_text("linked text " * 20)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/again").symlink_to(tmp_path / "in") # not without end
    (tmp_path / "in/file.txt").symlink_to(tmp_path / "elsewhere/1.txt")
    p.prepare("text", str(tmp_path / "in"), data_dir=tmp_path)
    assert text_of(tmp_path, "text") == "\n\n".join(["linked text " * 20] * 2)


def test_the_column_of_texts(tmp_path, capsys):
    docs = [f"document {i}, NA and \"null\"" for i in range(30)]
    parquet(tmp_path / "in/a.parquet", id=list(range(32)), body=[*docs, "", None])
    (tmp_path / "a.csv").write_text('title,text\nx,"one, two\nNA"\ny,NA\n' + "z,more\n" * 20)
    p.prepare("text", str(tmp_path / "in"), data_dir=tmp_path, name="a", val_fraction=0.2)
    assert "2 empty rows of all are left out" in capsys.readouterr().out
    assert text_of(tmp_path, "a").split("\n\n")[:-1] == docs
    p.prepare("text", str(tmp_path / "a.csv"), data_dir=tmp_path, name="b")
    assert text_of(tmp_path, "b").startswith("one, two\nNA\n\nNA\n\nmore\n\n")
    p.prepare("text", str(tmp_path / "a.csv"), data_dir=tmp_path, name="c", text_column="title")
    assert text_of(tmp_path, "c").startswith("x\n\ny\n\nz\n\n")


def test_rows_are_read_whatever_else_they_hold(tmp_path, capsys):
    """Other columns may vary; a text may look like a number; the column is printed."""
    rows = [{"text": "a", "meta": None}, {"text": "b", "meta": {"x": 1}, "id": 7},
            {"id": "seven", "text": "c", "new": []}, {"other": 1}, {"text": "2020-01-01"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 9))
    p.prepare("text", str(tmp_path / "a.jsonl"), data_dir=tmp_path, name="a")
    assert text_of(tmp_path, "a").replace("\n", "") == "abc2020-01-01" * 9
    out = capsys.readouterr().out
    assert "text column: text" in out and "9 empty rows of all are left out" in out
    (tmp_path / "a.csv").write_text("id,text\n" + "".join(f"{i},00{i}\n" for i in range(9)))
    p.prepare("text", str(tmp_path / "a.csv"), data_dir=tmp_path, name="b")
    assert text_of(tmp_path, "b").replace("\n", "") == "".join(f"00{i}" for i in range(9))


def test_what_validates_does_not_train(tmp_path):
    for name, text in {"train.txt": "T" * 90, "more.txt": "M" * 90, "valid.txt": "V" * 90}.items():
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_text(text)
    valid = str(tmp_path / "in/valid.txt")
    (tmp_path / "in/more.txt").unlink()
    p.prepare("text", str(tmp_path / "in"), val_path=valid, data_dir=tmp_path)
    assert [set(text_of(tmp_path, "text", [split])) for split in ("train", "val")] == [{"T"}, {"V"}]


@pytest.mark.parametrize("name, about", [
    ("README", True), ("readme.md", True), ("LICENSE-2.0.txt", True), ("dataset_info.json", True),
    ("notices.jsonl", False), ("license_0.png", False), ("citations.csv", False),
    ("noticeable.txt", False), ("README.jsonl", False)])
def test_the_name_of_a_file_about_data(name, about):
    assert p.is_about(Path(name)) == about


def test_an_option_that_is_dropped_is_another_data_set(tmp_path):
    docs = [f"document {i}" for i in range(30)]
    path = write_docs(tmp_path, ".jsonl", docs)
    p.prepare("text", path, data_dir=tmp_path, split_by="document", text_column="text")
    for given in ({}, {"split_by": "document"}, {"text_column": "text"}):
        with pytest.raises(SystemExit, match="was prepared with"):
            p.prepare("text", path, data_dir=tmp_path, **given)


def test_a_tokenizer_with_habits_of_its_own(tmp_path, capsys):
    """It cuts and fills up texts, its ids have gaps, and it knows few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    words = {"</s>": 70_000, "[UNK]": 0, "cat": 9, "sat": 500}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(pad_token="[UNK]", length=16)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.jsonl").write_text('{"text": "cat sat cat sat cat sat zebra"}\n' * 10)
    meta = p.prepare("text", str(tmp_path / "a.jsonl"), tokenizer=f"hf:{tmp_path}", shards=2,
                     data_dir=tmp_path, block_size=4, entries=[1, 2], test_entries=1)
    assert (meta["vocab_size"], meta["dtype"]) == (70_001, "uint32")
    ids = data.load_tokens(tmp_path, "text", "train").tolist()
    assert ids[:8] == [9, 500, 9, 500, 9, 500, 0, 70_000]
    assert "does not give all of a text back" in capsys.readouterr().out
    assert data.load_codec(tmp_path, "text/2/00").vocab_size == 70_001


def test_random_documents_validate(tmp_path):
    """A corpus sorted by topic: its end is of one topic, random documents are of all."""
    docs = [f"{'abcd'[i // 50]} {i}" for i in range(200)]
    path = write_docs(tmp_path, ".jsonl", docs)
    found = {}
    for seed in (1, 1, 2):
        p.prepare("text", path, data_dir=tmp_path, name=f"run{len(found)}", split_by="document",
                  seed=seed, val_fraction=0.2)
        train, val = (texts[:-1] for texts in texts_of(tmp_path, f"run{len(found)}"))
        assert len(val) == 40 and sorted(train + val) == sorted(docs)
        assert {doc[0] for doc in val} == set("abcd")
        assert val == [doc for doc in docs if doc in val], "in their order"
        found[len(found)] = val
    assert found[0] == found[1] != found[2]
    p.prepare("text", path, data_dir=tmp_path, name="end", val_fraction=0.2)
    assert {doc[0] for doc in texts_of(tmp_path, "end")[1][1:-1]} == {"d"}


@pytest.mark.parametrize("tokenizer", ["char", "gpt2", "sentencepiece", "hf:GPT2"])
def test_long_documents_in_pieces_are_the_same_tokens(tokenizer, tmp_path, monkeypatch, request):
    if tokenizer in ("gpt2", "hf:GPT2"):
        request.getfixturevalue("gpt2")
    if tokenizer == "hf:GPT2":
        tokenizer = hf_gpt2(tmp_path)
    one_line = " ".join(f"word{i} I'll  be {i * i}" for i in range(300))
    lines = f"\n\n  {STORY}\n".join(f"line {i},\n\n\tand {i}." for i in range(100))
    docs, file = [one_line, lines, "漢字 " * 300 + "\n" * 30 + "last"], tmp_path / "my.txt"
    file.write_text(f"{p.END}\n" + f"\n  {p.END} \n".join(docs))
    p.prepare("text", str(file), tokenizer=tokenizer, data_dir=tmp_path,
              vocab_size=420 if tokenizer == "sentencepiece" else 0)
    tokens = data.load_codec(tmp_path, "text")
    assert tokens.joins
    for size in (p.PIECE, 400, 60):
        monkeypatch.setattr(p, "PIECE", size)
        read = list(p.read_text(file))
        assert [begins for begins, _ in read].count(True) == 3
        assert "".join(piece for _, piece in read) == "".join(docs)
        assert size > 400 or len(read) > len("".join(docs)) / size / 2
        for found in (read, [piece for doc in docs for piece in p.pieces(doc)]):
            start = [i for i, (begins, _) in enumerate(found) if begins]
            for doc, (i, j) in zip(docs, pairwise([*start, len(found)]), strict=True):
                parts = tokens.encode([piece for _, piece in found[i:j]])
                whole = tokens.encode([doc])[0]
                assert list(chain(*map(list, parts))) == list(whole), (size, doc[:20])


def hf_gpt2(folder):
    """--tokenizer=hf:FILE of GPT-2's own vocabulary."""
    (folder / "gpt2.json").write_text(export.gpt2_json().to_str())
    return f"hf:{folder}/gpt2.json"


def test_a_tokenizer_of_hugging_face(tmp_path, gpt2):
    """GPT-2's as a tokenizer.json gives GPT-2's tokens."""
    text = (STORY + "I'll say <|endoftext|> plainly. \n\n  x = 1\n") * 20
    rows = json.dumps({"text": text}) + "\n" + json.dumps({"text": STORY})
    (tmp_path / "my.jsonl").write_text(rows)
    tokenizer = hf_gpt2(tmp_path)
    for name, given in (("a", "gpt2"), ("b", tokenizer)):
        p.prepare("text", str(tmp_path / "my.jsonl"), tokenizer=given, data_dir=tmp_path, name=name)
    a, b = (files_of(tmp_path / name) for name in "ab")
    assert a["train.bin"] == b["train.bin"] and a["val.bin"] == b["val.bin"]
    assert b["tokenizer.json"] and text_of(tmp_path, "b", ["train"]) in text
    assert data.load_codec(tmp_path, "b").eot == 50256


@needs_data
def test_every_form_of_tinystories_gives_the_same_tokens(tmp_path, gpt2):
    import datasets
    file = SHARED / "text/tinystories_train.txt.gz"
    docs = gzip.open(file, "rt").read().removesuffix(f"\n{p.END}\n").split(f"\n{p.END}\n")
    assert len(docs) == 7151
    rows = datasets.Dataset.from_dict({"text": docs})
    rows.to_parquet(str(tmp_path / "a.parquet"))
    rows.to_json(str(tmp_path / "a.jsonl"))
    rows.to_csv(str(tmp_path / "a.csv"))
    rows.save_to_disk(str(tmp_path / "saved"))
    found = {}
    for path in (file, *(tmp_path / name for name in ("a.jsonl", "a.parquet", "a.csv", "saved"))):
        p.prepare("tinystories", str(path), data_dir=tmp_path, name=f"of {path.name}")
        found[path.name] = files_of(tmp_path / f"of {path.name}")
    first = found[file.name]
    for name, files in found.items():
        assert all(files[part] == first[part] for part in ("train.bin", "val.bin")), name


# ---- disks, locks, signals

def test_of_two_processes_one_waits(tmp_path):
    (tmp_path / "a.txt").write_text("some text " * 50_000)
    command = [sys.executable, SCRIPT, "--dataset=text", "--path=a.txt"]
    both = [subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             text=True) for _ in range(2)]
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert len([out for out, _ in said if "reading all" in out or "split" in out]) == 1, said
    assert text_of(tmp_path / "data", "text") == "some text " * 50_000


@pytest.mark.parametrize("place", ["~/data", "~/my data/ü/漢 字"])
def test_home_spaces_and_other_alphabets(place, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my texts").mkdir()
    (tmp_path / "my texts/ü [1].txt").write_text("some text " * 50)
    p.prepare("text", "~/my texts", data_dir=place, name="é")
    assert text_of(Path(place).expanduser(), "é") == "some text " * 50
    assert not (tmp_path / "~").exists()


def test_ctrl_c_and_sigkill_leave_nothing_that_is_taken_for_data(tmp_path):
    (tmp_path / "a.txt").write_text("some text " * 50)
    command = [SCRIPT, "--dataset=text", "--path=a.txt"]
    for signum, left in ((signal.SIGINT, False), (signal.SIGKILL, True)):
        killed_in("write_split", "event == 'call'", *command, cwd=tmp_path, signum=signum)
        assert (tmp_path / "data/.text.part").exists() == left
        assert not (tmp_path / "data/text").exists()
    assert run(tmp_path, *command[1:]).returncode == 0
    assert text_of(tmp_path / "data", "text") == "some text " * 50
    assert sorted(f.name for f in (tmp_path / "data").iterdir() if f.name[-5:] != ".lock") == [
        "text"]


def test_a_disk_that_says_no_is_one_sentence(tmp_path):
    (tmp_path / "a.txt").write_text("some text " * 5000)
    limited = ("import resource, runpy, sys; sys.argv = sys.argv[1:]; "
               "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
               "sys.path[0] = sys.argv[0].rpartition('/')[0]; "
               "runpy.run_path(sys.argv[0], run_name='__main__')")
    full = subprocess.run([sys.executable, "-c", limited, SCRIPT, "--dataset=text", "--path=a.txt"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert "data/text cannot be made (File too large)" in said(full)
    assert not (tmp_path / "data/text").exists() and not (tmp_path / "data/.text.part").exists()
    for place in ("/proc/nothing", str(tmp_path / "a.txt")):
        with pytest.raises(SystemExit, match="cannot be made"):
            p.prepare("text", str(tmp_path / "a.txt"), data_dir=place)


# ---- finished, changed

def test_a_finished_folder_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("first text " * 10)
    Path("b.txt").write_text("other text " * 10)
    p.prepare("text", "a.txt")
    before = stamps_of("data/text")
    for other in ({"path": "b.txt"}, {"tokenizer": "sentencepiece", "vocab_size": 300},
                  {"val_fraction": 0.2}):
        with pytest.raises(SystemExit, match="--name"):
            p.prepare(**{"dataset": "text", "path": "a.txt", **other})
    again = run(tmp_path, "--dataset=text", "--path=a.txt")
    assert again.returncode == 0 and "nothing to do" in again.stdout, again.stderr
    assert stamps_of("data/text") == before


def test_text_that_changed_is_not_taken_for_the_same(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("first text " * 10)
    p.prepare("text", str(file), data_dir=tmp_path)
    file.write_text("first text " * 11)
    with pytest.raises(SystemExit, match=r"110 bytes.*121 bytes"):
        p.prepare("text", str(file), data_dir=tmp_path)


def test_files_of_another_program_are_not_replaced(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text/train.bin").write_bytes(b"precious")
    (tmp_path / "a.txt").write_text("some text " * 10)
    with pytest.raises(SystemExit, match="another program"):
        p.prepare("text", str(tmp_path / "a.txt"), data_dir=tmp_path)
    assert (tmp_path / "text/train.bin").read_bytes() == b"precious"


def test_damage_is_found_before_training(tmp_path):
    options = {"pydocs": "--dataset=pydocs",
               "mine": "--dataset=text --path=FILE_OR_FOLDER --name=mine"}
    for dataset, option in options.items():
        command = f"run python prepare.py {option} --data_dir={tmp_path}$"
        with pytest.raises(SystemExit, match=command):
            data.load_meta(tmp_path, dataset)
    (tmp_path / "a.txt").write_text("some text " * 10)
    p.prepare("text", str(tmp_path / "a.txt"), data_dir=tmp_path)
    tokens = data.load_tokens(tmp_path, "text", "val")
    assert len(tokens) == 10 and not tokens.flags.writeable
    os.truncate(tmp_path / "text/val.bin", 18)
    with pytest.raises(SystemExit, match=r"val.bin has 18 bytes and not the 20"):
        data.load_tokens(tmp_path, "text", "train")
    (tmp_path / "text/val.bin").unlink()
    with pytest.raises(SystemExit, match=r"val.bin has 0 bytes"):
        data.load_meta(tmp_path, "text")
    for damaged in ("", '{"dataset": "te', "[]", "{}"):
        (tmp_path / "text/meta.json").write_text(damaged)
        with pytest.raises(SystemExit, match="damaged"):
            data.load_meta(tmp_path, "text")
        with pytest.raises(SystemExit, match="damaged"):
            p.prepare("text", str(tmp_path / "a.txt"), data_dir=tmp_path)


# ---- mistakes

MISTAKES = {
    "--path=nowhere": "nowhere",
    "": "--path",
    "--path=empty.txt": "give more text",
    "--path=one.txt": "give more text",
    "--path=empty": "no folder with files",
    "--path=photo.png": "photo.png",
    "--path=folder": "photo.png",
    "--path=nul.txt": "NUL",
    "--path=broken.gz": "broken.gz",
    "--path=short.txt.gz": "short.txt.gz",
    "--path=broken.parquet": "broken.parquet",
    "--path=column.parquet": "give more text",
    "--path=column.jsonl": "give more text",
    "--path=number.jsonl": "'text'",
    "--path=broken.jsonl": "broken.jsonl does not hold whole rows of json (line 2, column 8",
    "--path=half.jsonl": "line 2 has half of a surrogate pair",
    "--path=latin.csv": "latin.csv",
    "--path=ragged.csv": "ragged.csv",
    "--path=column.jsonl --text_column=x": "no column 'x' but content",
    "--path=a.txt --split_by=half": "choose end or document",
    "--path=a.txt --split_by=document": "two documents",
    "--path=a.txt --skip_damaged=True": "--skip_damaged",
    "--path=a.txt --tokenizer=hf:nowhere/at/all": "tokenizer.json",
    "--path=a.txt --dataset=pydocs": "takes no --path",
    "--path=mixed": "files of text (mixed/a.txt) and of csv (mixed/b.csv)",
    "--path=two.jsonl": "no column 'text' but a, b: name the texts by --text_column",
    "--path=split": "has a split train, and split/more.txt in no split",
    "--path=a.txt --split=train,test": "has no splits: leave out --split=train,test",
    "--path=link": "is a link that leads nowhere",
    "--path=mixed.jsonl": "line 3: 'text' is no text but 7",
    "--path=rows.jsonl": "line 1 is no object with columns",
    "--path=columns": "has texts in body and in content",
    "--path=a.zip": "unpack or convert",
    "--path=a.txt --text_column=x": "is for rows",
    "--path=a.txt --subset=en": "is for the hub",
    "--path=a.txt --name=../evil": "--name='../evil' is not possible",
    "--path=a.txt --name=.": "--name='.' is not possible",
    "--path=a.txt --name=/tmp/x": "--name='/tmp/x' is not possible",
    "--path=split --val_path=a.txt --split=train": "without --split",
    "--path=a.txt --val_path=nowhere": "nowhere",
    "--path=a.txt --dataset=wikitext": "choose one of pydocs",
    "--path=a.txt --tokenizer=bpe": "choose one of char",
    "--path=a.txt --val_fraction=1.5": "between 0 and 1",
    "--path=a.txt --vocab_size=100": "sentencepiece",
    "--path=a.txt --tokenizer=sentencepiece": "vocab_size=4096",
    "--path=a.txt --tokenizer=sentencepiece --vocab_size=20": "vocab_size=20",
}


@pytest.fixture
def mistaken(tmp_path):
    import pyarrow
    import pyarrow.parquet
    photo = b"\x89PNG\r\n\x1a\n" + bytes(range(256))
    files = {"a.txt": b"some text " * 50, "empty.txt": b"", "one.txt": b"x", "photo.png": photo,
             "nul.txt": b"a\0b" * 9, "broken.gz": b"no gz",
             "short.txt.gz": gzip.compress(os.urandom(99).hex().encode())[:60],
             "broken.parquet": b"PAR1 and no more", "column.jsonl": b'{"content": "x"}\n',
             "half.jsonl": b'{"text": "ok"}\n{"text": "half \\ud83d"}\n',
             "two.jsonl": b'{"a": "x", "b": "y"}\n', "latin.csv": b"id,text\n1,\xe9\n",
             "ragged.csv": b"id,text\n1,a,b\n2,c\n", "mixed/a.txt": b"text",
             "mixed/b.csv": b"text\nx\n", "split/train.txt": b"text", "split/more.txt": b"text",
             "mixed.jsonl": b'{"text": "a"}\n\n{"text": 7}\n', "rows.jsonl": b"[1]\n",
             "columns/1.jsonl": b'{"body": "x"}\n', "columns/2.jsonl": b'{"content": "x"}\n',
             "a.zip": b"PK", "number.jsonl": b'{"text": 1}\n',
             "broken.jsonl": b'{"text": "x"}\n{"text"\n',
             "folder/a.txt": b"text", "folder/photo.png": photo}
    for file, content in files.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(content)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").mkdir()
    (tmp_path / "link/a.txt").symlink_to("gone.txt")
    pyarrow.parquet.write_table(pyarrow.table({"content": ["x"]}), tmp_path / "column.parquet")
    return tmp_path


def test_a_mistake_is_answered_with_one_sentence(mistaken, monkeypatch):
    monkeypatch.chdir(mistaken)
    for args, word in MISTAKES.items():
        given = dict(arg.removeprefix("--").split("=") for arg in args.split())
        settings = {key: type(p.DEFAULTS[key])(value)
                    for key, value in {"dataset": "text", **given}.items()}
        with pytest.raises(SystemExit) as stop:
            p.prepare(**settings)
        message = stop.value.code
        assert isinstance(message, str), args
        assert "\n" not in message and word in message, (args, message)
        assert not list(mistaken.glob("data/*/*.json")), args


@pytest.mark.parametrize("args", ["--path=photo.png", "--path=a.txt --tokenizer=bpe"])
def test_the_script_shows_the_sentence_and_no_traceback(mistaken, args):
    assert MISTAKES[args] in said(run(mistaken, "--dataset=text", *args.split()))


def test_no_network_is_one_sentence(tmp_path, monkeypatch):
    for variable in ("HF_HOME", "TIKTOKEN_CACHE_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "nothing"))
    for variable in ("http_proxy", "https_proxy", "HTTPS_PROXY"): # where no proxy answers
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "a.txt").write_text("some text " * 50)
    for args, word in (("--dataset=tinystories --tokenizer=char", "--path"),
                       ("--dataset=text --path=a.txt --tokenizer=gpt2", "TIKTOKEN_CACHE_DIR")):
        assert word in said(run(tmp_path, *args.split())), args


# ---- batches

def test_batches_are_windows_and_every_offset_is_equally_likely():
    tokens, block_size = np.arange(1000, 1021, dtype=np.uint16), 5 # offsets 0 to 15
    generator = torch.Generator().manual_seed(1)
    x, y = data.get_batch(tokens, 16_000, block_size, generator)
    assert x.shape == y.shape == (16_000, block_size) and x.dtype == y.dtype == torch.int64
    assert x.is_contiguous() and y.is_contiguous()
    assert torch.equal(x, x[:, :1] + torch.arange(block_size)) and torch.equal(y, x + 1)
    counts = torch.bincount(x[:, 0] - 1000)
    assert len(counts) == 16
    assert (counts - 1000).abs().max() < 150, counts # five standard deviations
    again = data.get_batch(tokens, 16_000, block_size, torch.Generator().manual_seed(1))
    later = data.get_batch(tokens, 16_000, block_size, generator)
    assert torch.equal(again[0], x) and not torch.equal(later[0], x)
    shortest = data.get_batch(tokens[:6], 3, block_size, generator)[1]
    assert shortest[:, -1].tolist() == [1005] * 3


def test_batches_hold_wide_tokens():
    x, y = data.get_batch(np.arange(70_000, 70_004, dtype=np.uint32), 2, 3, torch.Generator())
    assert x.tolist() == [[70_000, 70_001, 70_002]] * 2
    assert y.tolist() == [[70_001, 70_002, 70_003]] * 2


def test_blocks_count_every_prediction_once():
    for n in (2, 5, 6, 7, 24, 25, 26, 100):
        tokens = np.arange(10, 10 + n, dtype=np.uint16)
        for batch_size, block_size in ((1, 1), (2, 3), (4, 6), (8, 200)):
            found = data.sequential_batches(tokens, batch_size, block_size, "cpu")
            x, y = zip(*found, strict=True)
            for b in (*x, *y):
                assert b.shape[1] == block_size and 0 < b.shape[0] <= batch_size
                assert b.dtype == torch.int64
            x, y = (torch.cat(b).flatten() for b in (x, y))
            assert x[y != -1].tolist() == tokens[:-1].tolist()
            assert y[y != -1].tolist() == tokens[1:].tolist()
            assert (x[y == -1] == 0).all() and len(y) - (n - 1) < block_size


def test_too_little_text_for_a_block_names_both_numbers():
    data.check_length(np.arange(9), 8, "val.bin")
    with pytest.raises(SystemExit, match=r"val.bin has 8 tokens.*block_size=8.*9"):
        data.check_length(np.arange(8), 8, "val.bin")


def test_a_gpu_gets_the_same_batches():
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    tokens = np.arange(100, dtype=np.uint16)
    here, there = (data.get_batch(tokens, 4, 8, torch.Generator().manual_seed(3), device)
                   for device in ("cpu", "cuda"))
    assert all(torch.equal(a, b.cpu()) and b.is_cuda for a, b in zip(here, there, strict=True))
