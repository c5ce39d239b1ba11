"""Random damage to what prepare.py reads ends in one sentence or in a whole data set.

PREPARE_DAMAGES=1000 python -m pytest tests/test_damage.py tries more of them.
"""
import gzip
import io
import json
import os
import random
import re
import shutil
import zipfile

import numpy as np
import pytest
from PIL import Image

import data
import prepare as p

DAMAGES = int(os.environ.get("PREPARE_DAMAGES", 80))
WORDS = ("text", "train", "valid", "test", "body", "é", "漢字", "", "NA", "null", "0", p.END)


def docs_of(draw):
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 60)))
            for _ in range(draw.randint(2, 40))]


def picture(draw, form="png", side=9):
    file = io.BytesIO()
    pixels = np.frombuffer(draw.randbytes(side * side * 3), np.uint8).reshape(side, side, 3)
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def write(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())


def text_folder(folder, draw):
    for split in draw.choice([("train", "val"), ("train", "test", "validation"), ("a",)]):
        write(folder / f"{split}/{draw.randint(0, 9)}.txt", f"\n{p.END}\n".join(docs_of(draw)))


def text_file(folder, draw):
    text = f"\n{p.END}\n".join(docs_of(draw)).encode(draw.choice(["utf-8", "utf-8", "utf-16",
                                                                  "latin-1"]), "replace")
    packed = draw.random() < 0.4
    write(folder / f"a.txt{'.gz' * packed}", gzip.compress(text) if packed else text)


def rows_of_json(folder, draw):
    rows = [{"id": i, "text": doc} for i, doc in enumerate(docs_of(draw))]
    for row in draw.sample(rows, draw.choice([0, 0, 1])): # mixed types
        row["text"] = draw.choice([1, None, True, ["x"], {"y": 1}, "half \ud83d"])
    lines = "\n".join(json.dumps(row) for row in rows)
    if draw.random() < 0.3:
        write(folder / "a.json", json.dumps(rows))
    else:
        write(folder / draw.choice(["a.jsonl", "train.NDJSON", "b.jsonl.gz"]), lines)
        for file in folder.glob("*.gz"):
            file.write_bytes(gzip.compress(file.read_bytes()))


def rows_of_csv(folder, draw):
    sep = draw.choice([",", "\t"])
    lines = [sep.join(("id", draw.choice(["text", "body"]))),
             *(f'{i}{sep}"{doc}"' for i, doc in enumerate(docs_of(draw)))]
    if draw.random() < 0.3: # a field too many
        lines[draw.randrange(len(lines))] += sep + "more"
    write(folder / ("a.csv" if sep == "," else "a.tsv"), "\n".join(lines))


def rows_of_datasets(folder, draw):
    import datasets
    rows = datasets.Dataset.from_dict({"text": docs_of(draw)})
    kind = draw.choice(["parquet", "arrow", "saved", "splits"])
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "parquet":
        rows.to_parquet(folder / "train-00000-of-00001.parquet")
    elif kind == "arrow":
        rows.save_to_disk(str(folder / "saved"))
        next((folder / "saved").glob("*.arrow")).rename(folder / "a.arrow")
        shutil.rmtree(folder / "saved")
    else:
        whole = rows if kind == "saved" else datasets.DatasetDict(train=rows, test=rows)
        whole.save_to_disk(str(folder))


def image_folder(folder, draw):
    for split in draw.choice([("train/", "val/"), ("",), ("train/", "test/")]):
        for label in "abc":
            for i in range(draw.randint(1, 4)):
                write(folder / f"{split}{label}/{i}.png", picture(draw))
    if draw.random() < 0.2:
        names = [file.relative_to(folder) for file in folder.rglob("*.png")]
        write(folder / "metadata.csv", "file_name,label\n" + "".join(
            f"{name},{name.parent.name}\n" for name in names))


def image_rows(folder, draw):
    import datasets
    rows = {"image": [{"bytes": picture(draw), "path": None} for _ in range(12)],
            "label": [draw.randint(0, 2) for _ in range(12)]}
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list("abc"))}
    folder.mkdir(parents=True, exist_ok=True)
    found = datasets.Dataset.from_dict(rows, datasets.Features(features))
    found.to_parquet(folder / "all.parquet")


def arrays(folder, draw):
    n = {"train": draw.randint(4, 12), "test": draw.randint(2, 6)}
    folder.mkdir(parents=True, exist_ok=True)
    values = {f"x_{split}": np.zeros((k, 6, 6), np.uint8) for split, k in n.items()}
    values |= {f"y_{split}": np.arange(k) % 2 for split, k in n.items()}
    if draw.random() < 0.3:
        name = draw.choice(list(values))
        values[name] = values[name].astype(draw.choice([np.float32, np.int16]))[:draw.randint(0, 4)]
    np.savez(folder / "a.npz", **values)


def idx_files(folder, draw):
    for split in ("train", "t10k"):
        n = draw.randint(3, 8)
        head = [n.to_bytes(4, "big"), (5).to_bytes(4, "big"), (5).to_bytes(4, "big")]
        images = b"\0\0\x08\x03" + b"".join(head) + bytes(n * 25)
        write(folder / f"{split}-images-idx3-ubyte", images)
        write(folder / f"{split}-labels-idx1-ubyte", b"\0\0\x08\x01" + head[0] + bytes(
            i % 2 for i in range(n)))


def pair_files(folder, draw):
    for i in range(draw.randint(2, 4)):
        write(folder / f"HR/{i}.png", picture(draw, side=32))
        if draw.random() < 0.5:
            write(folder / f"{draw.choice(['LR', 'low', 'LR_bicubic/X2'])}/{i}x2.png",
                  picture(draw, side=16))
    if draw.random() < 0.4:
        with zipfile.ZipFile(folder.with_suffix(".zip"), "w") as zipped:
            for file in folder.rglob("*.png"):
                zipped.write(file, file.relative_to(folder))
        shutil.rmtree(folder)
        folder.mkdir()
        folder.with_suffix(".zip").rename(folder / "a.zip")


SOURCES = {text_folder: "text", text_file: "text", rows_of_json: "text", rows_of_csv: "text",
           rows_of_datasets: "text", image_folder: "images", image_rows: "images",
           arrays: "images", idx_files: "images", pair_files: "pairs"}


def damage(folder, draw):
    """Cuts, flips, renames, empties, deletes, doubles or replaces files."""
    for _ in range(draw.choice([0, 1, 1, 1, 2, 4])):
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        if not files:
            return
        file = draw.choice(files)
        content, kind = file.read_bytes(), draw.randint(0, 9)
        if kind == 0:
            file.write_bytes(content[:draw.randint(0, len(content))])
        elif kind <= 2 and content:
            flipped = bytearray(content)
            for _ in range(draw.choice([1, 3, 30])):
                flipped[draw.randrange(len(flipped))] ^= 1 << draw.randint(0, 7)
            file.write_bytes(flipped)
        elif kind == 3:
            suffix = draw.choice([".txt", ".csv", ".jsonl", ".parquet", ".png", ".npz", ".gz",
                                  ".json", ".arrow", ".zip", ".bin", ""])
            file.rename(file.with_suffix(suffix))
        elif kind == 4:
            file.write_bytes(b"")
        elif kind == 5:
            file.unlink()
        elif kind == 6:
            file.write_bytes(content + draw.randbytes(draw.randint(1, 50)))
        elif kind == 7:
            write(file.parent / draw.choice(["README.md", "notes.txt", "x.pkl", ".hidden", "a.bin",
                                             "train.txt", "__MACOSX/x.png", "Thumbs.db"]),
                  draw.randbytes(20))
        elif kind == 8:
            file.write_bytes(draw.choice(files).read_bytes())
        else:
            link = file.parent / f"link {len(files)}"
            if not link.is_symlink():
                link.symlink_to(draw.choice(["gone", file.name, ".", ".."]))


@pytest.mark.parametrize("part", range(4))
def test_damage_is_one_sentence_or_a_whole_data_set(part, tmp_path):
    made = 0
    for number in range(part, DAMAGES, 4):
        draw = random.Random(f"damage {number}")
        folder, out = tmp_path / f"in{number}", tmp_path / f"out{number}"
        source = draw.choice(list(SOURCES))
        source(folder, draw)
        damage(folder, draw)
        files, dataset = [file for file in folder.rglob("*") if file.is_file()], SOURCES[source]
        path = files[0] if len(files) == 1 and draw.random() < 0.8 else folder
        name = "pairs_x2" if dataset == "pairs" else dataset
        try:
            p.prepare(dataset, str(path), data_dir=out, val_fraction=0.3, num_proc=2)
        except SystemExit as stop:
            assert isinstance(stop.code, str) and "\n" not in stop.code, (number, stop.code)
            assert not re.search("[a-z]Error", stop.code), (number, stop.code)
            assert len(stop.code) < 5000, (number, stop.code)
            assert not (out / name).exists(), number
        except Exception as error:
            raise AssertionError(f"damage {number} of {source.__name__} in {path}") from error
        else:
            data.load_meta(out, name)
            made += 1
        assert not (out / f".{name}.part").exists(), number
        shutil.rmtree(folder)
    assert made > DAMAGES / 20, "some are whole"
