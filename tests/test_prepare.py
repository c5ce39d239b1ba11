"""What prepare.py promises: nothing of the text is lost or seen twice, and a half-written file is never taken for a whole one."""

import gzip
import json
import lzma
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import killed_in

import bench
import prepare as p
import data

SCRIPT = Path(p.__file__)
SHARED = Path(os.environ.get("NAS_DATA") or Path(__file__).resolve().parents[2] / "shared/data")
needs_data = pytest.mark.skipif(not (SHARED / "text").is_dir(), reason=f"no small real data in {SHARED} (set NAS_DATA)")
STORY = "Two  spaces,\ta tab;\n\n\n    four spaces, é 漢字 😀 and the end. \n"


def run(folder, *args):
    return subprocess.run([sys.executable, SCRIPT, *args], cwd=folder, capture_output=True, text=True, timeout=300)


def text_of(folder, name, splits=("train", "val")):
    decode = data.load_tokenizer(folder, name)[1]
    return "".join(decode(data.load_tokens(folder, name, split).tolist()) for split in splits)


def files_of(folder):
    return {f.name: f.read_bytes() for f in Path(folder).iterdir()}


@pytest.fixture(scope="session")
def pydocs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pydocs")
    done = run(folder)
    assert done.returncode == 0, done.stderr
    return folder / "data", done.stdout


@pytest.fixture
def gpt2(tmp_path, monkeypatch):
    if (SHARED / "tiktoken").is_dir():  # a copy: tiktoken deletes a file that it takes for damaged
        shutil.copytree(SHARED / "tiktoken", tmp_path / "tiktoken", copy_function=shutil.copyfile)
        (tmp_path / "tiktoken").chmod(0o700)
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tiktoken"))
    import tiktoken
    try:
        tiktoken.get_encoding("gpt2")
    except OSError:
        pytest.skip("GPT-2's vocabulary is neither in a cache nor to be had from the network")


# ---- pydocs and this_python

PYDOCS = {"train": "b3daf1666d09abe39f42950bf22292d50fbc3073833dd14d12980fccb7b6c26f",
          "val": "e16b658c79705c51b1d0edc5fa8a1fd86947221101329e4c1b0323ae7ac4d286"}


@pytest.fixture(scope="session")
def this_python(tmp_path_factory):
    folder = tmp_path_factory.mktemp("this_python")
    p.prepare("this_python", data_dir=folder)
    return folder


def leaked(folder, name):
    """How many paragraphs the validation split has, and those of them that train has, too."""
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
    monkeypatch.setattr(p, "python_docs", p.read_pydocs)  # seconds saved
    for name in ("pydocs", "this_python"):
        config = SimpleNamespace(dataset=name, data_dir=str(tmp_path), space="gpt",
                                 out_dir=str(tmp_path / "out"), init_from="scratch")
        p.prepare_own(config, SimpleNamespace(master=True, world=1))
        _, val, facts = data.load_data(config, None)
        assert data.bytes_hash(val) == PYDOCS["val"]
        assert facts == {"vocab_size": bench.VOCAB_SIZE[name]}


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
        patch.setitem(sys.modules, "lzma", None)  # as where Python was built without it
        with pytest.raises(SystemExit, match=r"built without lzma.*--dataset=this_python$"):
            p.prepare(data_dir=tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_the_seed_decides_the_split(pydocs, tmp_path):
    p.prepare(data_dir=tmp_path, name="same")
    p.prepare(data_dir=tmp_path, name="other", seed=7)
    first, same, other = (files_of(folder) for folder in (pydocs[0] / "pydocs", tmp_path / "same", tmp_path / "other"))
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
    meta = p.prepare("text", str(tmp_path / "my.txt"), tokenizer=tokenizer, vocab_size=size, data_dir=tmp_path)
    assert text_of(tmp_path, "text") == text
    assert len(text_of(tmp_path, "text", ["train"])) == int(0.9 * len(text))
    assert max(data.load_tokens(tmp_path, "text", "train")) < meta["vocab_size"]
    assert meta["vocab_size"] == {"char": len(set(text)), "gpt2": 50257, "sentencepiece": 400}[tokenizer]
    encode, decode = data.load_tokenizer(tmp_path, "text")
    assert decode(encode(STORY)) == STORY and decode([]) == "" == decode(encode(""))
    assert decode(encode("end") + encode(STORY)) == "end" + STORY
    assert decode([meta["vocab_size"], *encode(STORY), meta["vocab_size"] + 40]) == STORY
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
        pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(docs))), "text": docs}), file, row_group_size=7)
    else:  # a folder, and in it folders
        for i, doc in enumerate(docs):
            sub = file / f"part{i // 10:02}"
            sub.mkdir(parents=True, exist_ok=True)
            (sub / f"{i % 10}{('.txt', '.md', '.py')[i % 3]}").write_text(doc + "\n", encoding="utf-8")
        (file / ".hidden").mkdir()
        (file / ".hidden" / "x.txt").write_bytes(b"\xff\0")
    return str(file)


@pytest.mark.parametrize("form", [".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet", ""])
def test_every_form_of_path_gives_every_document_once_and_in_order(form, tmp_path):
    docs = [f"document {i}: é{'x' * (i % 13)}" for i in range(50)]
    path = write_docs(tmp_path, form, docs)
    p.prepare("text", path, data_dir=tmp_path, name="char")
    assert [line for line in text_of(tmp_path, "char").split("\n") if line] == docs
    meta = p.prepare("text", path, tokenizer="sentencepiece", vocab_size=300, data_dir=tmp_path, name="pieces")
    ends = sum((data.load_tokens(tmp_path, "pieces", split) == meta["eot"]).sum() for split in ("train", "val"))
    assert ends == (50 if form else 49)  # between plain files, after every marked document and every row


def test_files_called_train_and_val_are_the_splits(tmp_path):
    (tmp_path / "my" / "val").mkdir(parents=True)
    for file, text in {"train-0.txt": "aa", "train-1.txt": "bb", "val/x.txt": "cc", "README": "dd"}.items():
        (tmp_path / "my" / file).write_text(text)
    p.prepare("text", str(tmp_path / "my"), data_dir=tmp_path, name="a")
    p.prepare("text", str(tmp_path / "my/train-0.txt"), str(tmp_path / "my/val"), data_dir=tmp_path, name="b")
    assert (text_of(tmp_path, "a", ["train"]), text_of(tmp_path, "a", ["val"])) == ("aa\n\nbb", "cc")
    assert (text_of(tmp_path, "b", ["train"]), text_of(tmp_path, "b", ["val"])) == ("aa", "cc")


def test_hugging_face_sets(tmp_path, monkeypatch):
    import datasets
    docs = [f"story {i}" for i in range(4000)]

    def load_dataset(repo, split, revision=None):  # stands for the network
        texts = {"train": [*docs, ""], "validation": ["never seen"], "train+validation+test": ["ab\n" * 300, "cd", "e"]}[split]
        return datasets.Dataset.from_dict({"text": texts})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    p.prepare("tinystories", tokenizer="char", data_dir=tmp_path)
    assert text_of(tmp_path, "tinystories", ["train"]) == "".join(doc + "\n\n" for doc in docs)
    assert text_of(tmp_path, "tinystories", ["val"]) == "never seen\n\n"
    p.prepare("shakespeare_char", data_dir=tmp_path)
    assert text_of(tmp_path, "shakespeare_char") == "ab\n" * 300 + "cde"
    p.prepare("openwebtext", tokenizer="char", data_dir=tmp_path)
    train, val = (text_of(tmp_path, "openwebtext", [split]).split("\n\n")[:-1] for split in ("train", "val"))
    assert len(val) in (2, 3) and sorted(train + val) == sorted(docs)


@needs_data
def test_shakespeare_has_the_known_size(tmp_path):
    meta = p.prepare("shakespeare_char", str(SHARED / "text/tinyshakespeare.txt.gz"), data_dir=tmp_path)
    assert (meta["train_tokens"], meta["val_tokens"], meta["vocab_size"]) == (1_003_854, 111_540, 65)


@needs_data
def test_tinystories_has_the_known_size(tmp_path, gpt2):
    train, val = (str(SHARED / f"text/tinystories_{part}.txt.gz") for part in ("train", "v1_valid_head"))
    meta = p.prepare("tinystories", train, val, data_dir=tmp_path)
    assert (meta["train_tokens"], meta["val_tokens"], meta["vocab_size"], meta["dtype"]) == (1_484_521, 195_558, 50257, "uint16")
    assert (data.load_tokens(tmp_path, "tinystories", "train") == meta["eot"]).sum() == 7151


# ---- interrupted, finished, changed

def test_a_killed_run_continues_to_the_same_bytes(pydocs, tmp_path):
    docs = text_of(pydocs[0], "pydocs").split("\n\n") * 2
    path = write_docs(tmp_path, ".jsonl", docs)
    args = ["--dataset=text", f"--path={path}", "--tokenizer=sentencepiece", "--vocab_size=600", "--val_fraction=0.4"]
    p.prepare("text", path, "", "sentencepiece", 600, 0.4, data_dir=tmp_path / "data", name="whole")

    folder, noted = tmp_path / "data/killed", []
    for split in ("train", "val"):
        begun = f"event == 'return' and json.load(open({str(folder / 'progress.json')!r})).get('{split}_documents')"
        out = killed_in("write_json", begun, SCRIPT, *args, "--name=killed", cwd=tmp_path)
        assert all(f"continuing after {n:,} documents of train" in out for n in noted)
        noted = [json.loads((folder / "progress.json").read_text())["train_documents"]]
        assert (folder / f"{split}.bin.part").exists() and not (folder / "meta.json").exists()
        with open(folder / f"{split}.bin.part", "ab") as f:
            f.write(b"half a batch")
        with pytest.raises(SystemExit, match="not prepared"):
            data.load_meta(tmp_path / "data", "killed")

    done = run(tmp_path, *args, "--name=killed")
    assert done.returncode == 0 and f"continuing after {noted[0]:,}" in done.stdout, done.stderr
    assert files_of(folder) == files_of(tmp_path / "data/whole")
    assert sorted(files_of(folder)) == ["meta.json", "tokenizer.model", "train.bin", "val.bin"]


def test_a_finished_folder_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("first text " * 10)
    Path("b.txt").write_text("other text " * 10)
    p.prepare("text", "a.txt")
    before = [(f.read_bytes(), f.stat().st_mtime_ns) for f in sorted(Path("data/text").iterdir())]
    for other in ({"path": "b.txt"}, {"tokenizer": "sentencepiece", "vocab_size": 300}, {"val_fraction": 0.2}):
        with pytest.raises(SystemExit, match="--name"):
            p.prepare(**{"dataset": "text", "path": "a.txt", **other})
    again = run(tmp_path, "--dataset=text", "--path=a.txt")
    assert again.returncode == 0 and "nothing to do" in again.stdout, again.stderr
    assert [(f.read_bytes(), f.stat().st_mtime_ns) for f in sorted(Path("data/text").iterdir())] == before


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
    for dataset, command in {"pydocs": "--dataset=pydocs", "mine": "--dataset=text --path=FILE_OR_FOLDER --name=mine"}.items():
        with pytest.raises(SystemExit, match=f"run python prepare.py {command} --data_dir={tmp_path}$"):
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
    "--path=column.parquet": "'text'",
    "--path=column.jsonl": "'text'",
    "--path=number.jsonl": "'text'",
    "--path=broken.jsonl": "broken.jsonl",
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
    for file, data in {"a.txt": b"some text " * 50, "empty.txt": b"", "one.txt": b"x", "photo.png": photo, "nul.txt": b"a\0b" * 9,
                       "broken.gz": b"no gz", "short.txt.gz": gzip.compress(os.urandom(99).hex().encode())[:60],
                       "broken.parquet": b"PAR1 and no more", "column.jsonl": b'{"content": "x"}\n',
                       "number.jsonl": b'{"text": 1}\n', "broken.jsonl": b'{"text": "x"}\n{"text"\n',
                       "folder/a.txt": b"text", "folder/photo.png": photo}.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(data)
    (tmp_path / "empty").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"content": ["x"]}), tmp_path / "column.parquet")
    return tmp_path


def test_a_mistake_is_answered_with_one_sentence(mistaken, monkeypatch):
    monkeypatch.chdir(mistaken)
    for args, word in MISTAKES.items():
        settings = {"dataset": "text", **dict(arg.removeprefix("--").split("=") for arg in args.split())}
        settings = {key: type(getattr(p, key))(value) for key, value in settings.items()}
        with pytest.raises(SystemExit) as stop:
            p.prepare(**settings)
        message = stop.value.code
        assert isinstance(message, str) and "\n" not in message and word in message, (args, message)
        assert not list(mistaken.glob("data/*/*.json")), args


@pytest.mark.parametrize("args", ["--path=photo.png", "--path=a.txt --tokenizer=bpe"])
def test_the_script_shows_the_sentence_and_no_traceback(mistaken, args):
    done = run(mistaken, "--dataset=text", *args.split())
    assert done.returncode == 1 and "Traceback" not in done.stderr and MISTAKES[args] in done.stderr.splitlines()[-1], done.stderr


def test_no_network_is_one_sentence(tmp_path, monkeypatch):
    for variable in ("HF_HOME", "TIKTOKEN_CACHE_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "nothing"))
    for variable in ("http_proxy", "https_proxy", "HTTPS_PROXY"):  # no proxy there: nobody is asked
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "a.txt").write_text("some text " * 50)
    for args, word in ("--dataset=tinystories", "--path"), ("--dataset=text --path=a.txt --tokenizer=gpt2", "TIKTOKEN_CACHE_DIR"):
        done = run(tmp_path, *args.split())
        assert done.returncode == 1 and "Traceback" not in done.stderr and word in done.stderr.splitlines()[-1], done.stderr


# ---- batches

def test_batches_are_windows_and_every_offset_is_equally_likely():
    tokens, block_size = np.arange(1000, 1021, dtype=np.uint16), 5  # 16 offsets, the last one 15
    generator = torch.Generator().manual_seed(1)
    x, y = data.get_batch(tokens, 16_000, block_size, generator)
    assert x.shape == y.shape == (16_000, block_size) and x.dtype == y.dtype == torch.int64
    assert x.is_contiguous() and y.is_contiguous()
    assert torch.equal(x, x[:, :1] + torch.arange(block_size)) and torch.equal(y, x + 1)
    counts = torch.bincount(x[:, 0] - 1000)
    assert len(counts) == 16 and (counts - 1000).abs().max() < 150, counts  # five standard deviations
    again = data.get_batch(tokens, 16_000, block_size, torch.Generator().manual_seed(1))
    assert torch.equal(again[0], x) and not torch.equal(data.get_batch(tokens, 16_000, block_size, generator)[0], x)
    shortest = data.get_batch(tokens[:6], 3, block_size, generator)[1]
    assert shortest[:, -1].tolist() == [1005] * 3


def test_batches_hold_wide_tokens():
    x, y = data.get_batch(np.arange(70_000, 70_004, dtype=np.uint32), 2, 3, torch.Generator())
    assert x.tolist() == [[70_000, 70_001, 70_002]] * 2 and y.tolist() == [[70_001, 70_002, 70_003]] * 2


def test_blocks_count_every_prediction_once():
    for n in (2, 5, 6, 7, 24, 25, 26, 100):
        tokens = np.arange(10, 10 + n, dtype=np.uint16)
        for batch_size, block_size in ((1, 1), (2, 3), (4, 6), (8, 200)):
            x, y = zip(*data.sequential_batches(tokens, batch_size, block_size, "cpu"), strict=True)
            assert all(b.shape[1] == block_size and 0 < b.shape[0] <= batch_size and b.dtype == torch.int64 for b in (*x, *y))
            x, y = (torch.cat(b).flatten() for b in (x, y))
            assert x[y != -1].tolist() == tokens[:-1].tolist() and y[y != -1].tolist() == tokens[1:].tolist()
            assert (x[y == -1] == 0).all() and len(y) - (n - 1) < block_size


def test_too_little_text_for_a_block_names_both_numbers():
    data.check_length(np.arange(9), 8, "val.bin")
    with pytest.raises(SystemExit, match=r"val.bin has 8 tokens.*block_size=8.*9"):
        data.check_length(np.arange(8), 8, "val.bin")


def test_a_gpu_gets_the_same_batches():
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    tokens = np.arange(100, dtype=np.uint16)
    here, there = (data.get_batch(tokens, 4, 8, torch.Generator().manual_seed(3), device) for device in ("cpu", "cuda"))
    assert all(torch.equal(a, b.cpu()) and b.is_cuda for a, b in zip(here, there, strict=True))
