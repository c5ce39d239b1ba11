"""budget.Benchmark: tables in every form, small ones by hand, and facts of published ones."""
import gzip
import itertools
import json
import os
import random
import re
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import (ROOT, TINY_IMAGES, TINY_KINDS, TINY_SEARCH, TINY_SPACES, flags, script,
                      stops)

from budget import Benchmark, Ranking
from model import build
from search_spaces import nats_size, nb201, toy_cell, toy_conv_macro
import budget

SHARED = Path(os.environ.get("NAS_DATA") or ROOT.parent / "shared/data") / "bench"
OPS = ["none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3"]
ARCHS = [*({"cell": [*["skip_connect"] * 5, op]} for op in OPS), {"cell": ["none"] * 6}]
ACCURACIES = [91.0, 88.5, 93.25, 88.5, 10.0, 90.0]


def rows():
    return list(zip(map(nb201.genotype, ARCHS), ACCURACIES, strict=True))


def text_of(some):
    return "genotype,test_acc,seed\n" + "".join(f"{text},{accuracy},1\n" for text, accuracy in some)


def columns():
    return {text: {"test_acc": accuracy, "seed": 1} for text, accuracy in rows()}


FORMS = {"table.csv": lambda path: path.write_text(text_of(rows())),
         "table.csv.gz": lambda path: path.write_bytes(gzip.compress(text_of(rows()).encode())),
         "table.json": lambda path: path.write_text(json.dumps(dict(rows()))),
         "columns.json": lambda path: path.write_text(json.dumps(columns()))}


def written(tmp_path, name="table.csv"):
    FORMS[name](tmp_path / name)
    return Benchmark(str(tmp_path / name), nb201, ARCHS[0])


@pytest.mark.parametrize("name", FORMS)
def test_every_form_says_the_same(name, tmp_path):
    """Rank 1 is the best; equal ones share the better rank; regret is the distance to the best."""
    table = written(tmp_path, name)
    ranks = [2, 4, 1, 4, 6, 3]
    for arch, accuracy, rank in zip(ARCHS, ACCURACIES, ranks, strict=True):
        percentile = pytest.approx(100 * (7 - rank) / 6)
        assert table(arch) == {"accuracy": accuracy, "rank": rank, "of": 6,
                               "regret": 93.25 - accuracy, "percentile": percentile}


def test_rows_of_one_architecture_are_averaged(tmp_path):
    path = tmp_path / "table.csv"
    genotype = nb201.genotype(ARCHS[1])
    path.write_text(text_of([*rows(), (genotype, 94.5), (genotype, 93.0)]))
    table = Benchmark(str(path), nb201, ARCHS[0])
    assert table(ARCHS[1])["accuracy"] == pytest.approx((88.5 + 94.5 + 93.0) / 3)
    assert len(table.sorted) == 6
    assert table(ARCHS[1])["rank"] == 2 and table(ARCHS[0])["rank"] == 3


@pytest.mark.parametrize("draws", range(1, 8))
def test_the_best_of_random_draws_is_the_mean_over_all_subsets(draws, tmp_path):
    subsets = list(itertools.combinations(ACCURACIES, min(draws, 6)))
    assert written(tmp_path).random_best(draws) == pytest.approx(statistics.mean(map(max, subsets)))


def macro(sizes):
    return toy_conv_macro.arch_of(json.dumps(sizes))


def real(name, module, arch):
    if not (SHARED / name).exists():
        pytest.skip(f"{SHARED / name} is not here")
    return Benchmark(str(SHARED / name), module, arch)


def test_the_table_of_toy_cells():
    """Best, median and worst, the best of 100 draws, and architectures that are known by name."""
    def uniform(op):
        return {"normal": [op] * 3, "reduce": [op] * 3}
    table = real("tanglenas_toy_cell_fmnist.csv.gz", toy_cell, uniform("sep_conv_3x3"))
    assert (len(table.sorted), table.sorted[0], table.sorted[-1]) == (4096, 91.63, 86.06)
    assert round(statistics.median(table.sorted), 2) == 90.54
    assert table.random_best(100) == pytest.approx(91.43, abs=0.01)
    s3, s5, d3 = "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3"
    assert table({"normal": [s3, s3, d3], "reduce": [s3, d3, s3]}) == {
        "accuracy": 91.63, "rank": 1, "of": 4096, "percentile": 100, "regret": 0}
    assert table({"normal": [s5, s3, s5], "reduce": [s3, s3, s5]})["accuracy"] == 91.60
    assert (table(uniform(s3))["accuracy"], table(uniform(s3))["rank"]) == (90.88, 986)
    accuracies = [table(uniform(op))["accuracy"] for op in (s5, d3, "dil_conv_5x5")]
    assert accuracies == [90.32, 87.75, 87.48]
    for least, count in ((91.0, 641), (91.2, 220), (91.4, 43), (91.5, 11)):
        assert sum(accuracy >= least for accuracy in table.sorted) == count


def test_the_table_of_the_conv_macro_space():
    smallest = macro([[8, 16, 32, 64], [3] * 4])
    table = real("tanglenas_conv_macro_cifar10.csv.gz", toy_conv_macro, smallest)
    assert (len(table.sorted), table.sorted[0], table.sorted[-1]) == (6561, 84.41, 10.0)
    assert table.sorted.count(10.0) == 14
    assert round(statistics.median(table.sorted), 2) == 78.58
    assert table.random_best(100) == pytest.approx(83.12, abs=0.01)
    for sizes, accuracy, rank in (
            ([[32, 64, 128, 128], [3, 7, 5, 7]], 84.41, 1),
            ([[16, 64, 128, 256], [3, 5, 5, 7]], 84.13, 2),
            ([[32, 64, 128, 64], [5, 5, 7, 7]], 83.02, 56),
            ([[32, 64, 128, 128], [5, 5, 7, 7]], 82.82, 94),
            ([[32, 64, 128, 256], [7, 7, 7, 7]], 81.50, 606),
            ([[32, 64, 128, 128], [5, 7, 7, 7]], 81.54, None),
            ([[16, 32, 128, 256], [3, 5, 5, 5]], 81.29, None),
            ([[16, 32, 128, 64], [3, 3, 5, 7]], 80.23, None),
            ([[32, 32, 128, 128], [5, 5, 7, 5]], 81.42, None),
            ([[16, 64, 128, 256], [3, 5, 5, 5]], 82.91, None),
            ([[8, 16, 32, 64], [3, 3, 3, 3]], 10.0, 6548)):
        found = table(macro(sizes))
        assert found["accuracy"] == accuracy and rank in (None, found["rank"]), found


def test_a_damaged_table_is_one_sentence_or_the_same(tmp_path):
    """Every form is cut off or has a bit changed. A .csv.gz, which has a checksum, is then refused
    or says the same."""
    dice, refused = random.Random(0), 0
    for name in FORMS:
        right = written(tmp_path, name).accuracies
        whole = (tmp_path / name).read_bytes()
        for case in range(60):
            damaged = bytearray(whole)
            if case % 2:
                del damaged[dice.randrange(len(damaged)):]
            else:
                damaged[dice.randrange(len(damaged))] ^= 1 << dice.randrange(8)
            (tmp_path / name).write_bytes(damaged)
            try:
                found = Benchmark(str(tmp_path / name), nb201, ARCHS[0]).accuracies
                assert not name.endswith(".gz") or found == right
            except SystemExit as e:
                assert isinstance(e.code, str) and "\n" not in e.code, e.code
                assert str(tmp_path / name) in e.code, e.code
                refused += 1
    assert refused > 100


MACRO = "c1,c2,c3,c4,k1,k2,k3,k4,test_acc\n8,16,32,64,3,3,3,3,10.0\n"
MISTAKES = {
    "missing": ("table.csv", None, ["cannot be read", "table.csv"]),
    "an architecture is missing": ("table.csv", text_of(rows()),
                                   ["lacks the architecture", "--benchmark"]),
    "of another space": ("table.csv", MACRO, ["row 1"]),
    "without accuracies": ("table.csv", text_of(rows()).replace("test_acc", "accuracy"),
                           ["no test_acc", "row 1"]),
    "not a number": ("table.csv", text_of(rows()).replace("88.5", "good"), ["row 2", "good"]),
    "empty": ("table.csv", "", ["empty"]),
    "a head alone": ("table.csv", "genotype,test_acc\n", ["empty"]),
    "empty json": ("table.json", "{}", ["empty"]),
    "a list": ("table.json", "[1, 2]", ["table.json"]),
    "not json": ("table.json", "{\"a\":", ["damaged"]),
    "damaged": ("table.csv.gz", gzip.compress(text_of(rows()).encode())[:-20], ["cannot be read"]),
    "not compressed": ("table.csv.gz", text_of(rows()), ["cannot be read"]),
    "a folder": (".csv", "folder", ["cannot be read"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_sentence_of_the_script(case, digits_dir, tmp_path):
    name, content, words = MISTAKES[case]
    if content == "folder":
        (tmp_path / name).mkdir()
    elif content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    message = stops("train_search.py", "--space=nb201", f"--data_dir={digits_dir}",
                    *flags(TINY_IMAGES | TINY_SPACES["nb201"]),
                    f"--benchmark={tmp_path / name}", f"--out_dir={tmp_path}/o")
    assert all(word in message for word in words) and not (tmp_path / "o").exists(), message


@pytest.mark.parametrize("space, name, package", [
    (nb201, "NAS-Bench-201-v1_1-096897.pth", "nas_201_api"),
    (nb201, "NATS-tss-v1_0-3ffb9-simple", "nats_bench"),
    (nats_size, "NATS-sss-v1_0-50262-simple", "nats_bench")])
def test_a_missing_package_is_one_sentence(space, name, package, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None) # as if it were not installed
    with pytest.raises(SystemExit) as e:
        budget.Benchmark(str(tmp_path / name), space, {}, "cifar10")
    assert re.search(f"needs the package.*{package}.*pip install", e.value.code)
    assert "\n" not in e.value.code


@pytest.mark.parametrize("space, part, epochs", [(nb201, "tss", "200"), (nats_size, "sss", "90")])
def test_official_rows_are_those_of_the_spaces_part(space, part, epochs, monkeypatch):
    """Of a package that only notes what it is asked for."""
    asked = []

    class Api:
        def __len__(self):
            return 2

        def arch(self, i):
            return f"genotype {i}"

        def get_more_info(self, i, dataset, hp, is_random):
            asked.append((dataset, hp, is_random))
            return {"test-accuracy": 90.0 + i}

    def create(path, part, **rest):
        asked.append(part)
        return Api()
    monkeypatch.setitem(sys.modules, "nats_bench", SimpleNamespace(create=create))
    rows = budget.official_rows("NATS", space, "imagenet16_120")
    assert rows == [{"genotype": "genotype 0", "test_acc": 90.0},
                    {"genotype": "genotype 1", "test_acc": 91.0}]
    assert asked == [part, *[("ImageNet16-120", epochs, False)] * 2]


# ---- language models: random networks near numbers of parameters

TINY_TABLE = dict(max_iters=2, bands=[3700, 5400], n_archs=3, seeds=[1, 2], batch_size=2,
                  val_portion=0.0, device="cpu")


@pytest.fixture(scope="module")
def text_space(data_dir, tmp_path_factory):
    """The arch.json of a space of GPTs, its choices, and the file of a table of it."""
    folder = tmp_path_factory.mktemp("space")
    keys = TINY_SEARCH | TINY_KINDS | dict(max_iters=0, out_dir=folder, data_dir=data_dir)
    script("train_search.py", *flags(keys))
    keys = TINY_TABLE | dict(arch=folder / "arch.json", data_dir=data_dir, block_size=16)
    script("train_base.py", *flags(keys | dict(table=folder / "table.csv")))
    model = json.loads((folder / "arch.json").read_text())["model"]
    return keys, build(model | dict(vocab_size=97)).choices, folder / "table.csv"


def test_a_table_of_language_models(text_space, data_dir, tmp_path):
    """Networks near each number of parameters, every third with all seeds; processes share them."""
    keys, choices, path = text_space
    rows = budget.read_table(str(path))
    assert [int(row["seed"]) for row in rows] == [1, 2, 1, 2, 1, 1, 1, 1]
    vocab_size = json.loads((Path(data_dir) / "pydocs/meta.json").read_text())["vocab_size"]
    config = json.loads(Path(keys["arch"]).read_text())["model"] | dict(vocab_size=vocab_size)
    for i, row in enumerate(rows):
        band = TINY_TABLE["bands"][(0, 0, 1, 1, 0, 1, 0, 1)[i]]
        assert 0.95 * band < int(row["params"]) <= band
        arch = {name: Ranking.read(choice, row[name]) for name, choice in choices.items()}
        cost = build(config, arch).cost()
        assert (cost["params"], cost["flops"]) == (int(row["params"]), int(row["flops"]))
    command = [sys.executable, ROOT / "train_base.py",
               *flags(keys | dict(table=tmp_path / "two.csv"))]
    both = [subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=ROOT) for _ in range(2)]
    assert [process.wait(timeout=300) for process in both] == [0, 0]
    found = budget.read_table(str(tmp_path / "two.csv"))
    assert sorted(map(str, found)) == sorted(map(str, rows)) and len(found) == 8
    assert [file.name for file in tmp_path.iterdir()] == ["two.csv"]


def test_a_ranking_of_each_band(text_space):
    """Tau and regret of what ranks as the trainings do, the other way round, and in two bands."""
    _, choices, path = text_space
    truth = Ranking(str(path), choices, None)
    assert [len(band) for band in truth.bands] == [3, 3] and len(truth.archs) == 6
    loss_of = {str(arch): truth.losses[key] for key, arch in truth.archs.items()}
    for sign in (1, -1):
        found = Ranking(str(path), choices,
                        lambda arch, sign=sign: sign * loss_of[str(arch)])(None)
        assert found["taus"] == pytest.approx([sign, sign]) and found["tau"] == pytest.approx(sign)
        assert found["regrets"] == pytest.approx([50 - 50 * sign] * 2)
    first = {str(truth.archs[key]) for key in truth.bands[0]}
    half = Ranking(str(path), choices,
                   lambda arch: loss_of[str(arch)] * (1 if str(arch) in first else -1))(None)
    assert half["taus"] == pytest.approx([1, -1]) and half["regret"] == pytest.approx(50)


def test_a_search_of_language_models_logs_its_rank(text_space, data_dir, tmp_path, capsys):
    _, _, path = text_space
    keys = TINY_SEARCH | TINY_KINDS | dict(data_dir=data_dir, benchmark=path, benchmark_iters=1,
                                           out_dir=tmp_path / "s")
    script("train_search.py", *flags(keys))
    out = capsys.readouterr().out
    assert out.count("| table tau ") == 3 and "in the table of 6 networks" in out
    lines = [json.loads(line) for line in (tmp_path / "s/arch_traj.jsonl").open()]
    assert all(-1 <= tau <= 1 for line in lines for tau in line["table_taus"])
    assert all(0 <= regret <= 100 for line in lines for regret in line["table_regrets"])
    (tmp_path / "other.csv").write_text(path.read_text().replace("rope", "alibi"))
    sentence = stops("train_search.py", *flags(keys | dict(
        benchmark=tmp_path / "other.csv", out_dir=tmp_path / "t")))
    assert "no network of this space in row" in sentence
