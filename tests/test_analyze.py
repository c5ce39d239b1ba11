"""analyze.py: damaged logs, the heat map of the logged weights, a whole figure for every run."""
import itertools
import json
import subprocess
import sys
from pathlib import Path

import matplotlib
import matplotlib.image
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from analyze import analyze, search_figure, train_figure, weight_history
from configurator import as_list
from run import add_checksum, read_lines, write_json
from search_spaces import describe

ROOT = Path(__file__).resolve().parents[1]
SPACES = { # lists of different lengths, numbers, and a choice that the config does not list
    "quick": dict(n_layer=[2, 3, 4], n_embd=[64, 96, 128], n_head=[2, 4, 8], mlp_ratio=[1, 2, 4]),
    "ragged": dict(n_layer=[1, 3], n_embd=[64, 96, 128, 192, 1024], n_head=4, mlp_ratio=[0.5, 4.0]),
    "gpt2": dict(n_layer=[10, 11, 12], n_embd=[384, 576, 768], n_head=[6, 8, 12],
                 mlp_ratio=[2, 3, 4]),
    "deep": dict(n_layer=[22, 23, 24], n_embd=[64, 96], n_head=[2, 4], mlp_ratio=[1, 2, 3]),
    "one": dict(n_layer=2, n_embd=[64], n_head=2, mlp_ratio=4),
}


def options_of(space):
    return {name: as_list(value) for name, value in SPACES[space].items()}


def evaluation(space, step, rng):
    """A line of arch_traj.jsonl as train_search.py writes it: random weights and their argmax."""
    weights, arch = {}, {}
    for name, options in options_of(space).items():
        layers = max(options_of(space)["n_layer"])
        w = rng.dirichlet(np.ones(len(options)), None if name in ("n_layer", "n_embd") else layers)
        weights[name] = w.tolist()
        likeliest = [options[i] for i in np.atleast_1d(w.argmax(-1))]
        arch[name] = likeliest[0] if w.ndim == 1 else likeliest[:arch["n_layer"]]
    losses = dict(arch_loss=3 + rng.random(), mixture_loss=3.5, val_arch_loss=4 + rng.random())
    return {"step": step, "arch": arch, **losses, "gap": losses["arch_loss"] - 3.5, "entropy": {},
            "weights": weights, "options": options_of(space),
            "cost": {"params": 432_100, "flops": 51_000_000}}


def jsonl(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def search_run(folder, space="quick", n=5, optimizer="drnas", searched=0):
    """A run of train_search.py with n evaluations; returns its trajectory.

    searched: how many architectures were evaluated after spos.
    """
    rng = np.random.default_rng(0)
    config = {**SPACES[space], "optimizer": optimizer, "eval_interval": 100}
    (folder / "run.json").write_text(json.dumps({"config": config}))
    traj = [evaluation(space, 100 * i, rng) for i in range(n)]
    steps = range(10, 100 * n - 99, 10)
    log = [{}] + [{"step": step, "loss": 10 - step / 100, "lr": 1e-3} for step in steps]
    if searched:
        lines = [{"evaluation": i, "loss": 2 + rng.random()} for i in range(1, searched + 1)]
        jsonl(folder / "arch_search.jsonl", lines)
        result = {"arch_loss": 1.9, "mixture_loss": 2.2}
        traj.append({**evaluation(space, 100 * (n - 1), rng), **result}) # of the same step
        del traj[-1]["weights"], traj[-1]["entropy"]
    jsonl(folder / "arch_traj.jsonl", traj)
    jsonl(folder / "log.jsonl", log)
    return traj


def train_run(folder, n=5, val=True, test=True):
    log = [{"params": 432_100, "flops": 51_000_000}]
    for i in range(n):
        loss, steps = 5 / (i + 1), range(100 * i + 10, 100 * i + 100, 10)
        log.append({"step": 100 * i, "train_loss": loss})
        if val:
            log[-1]["val_loss"] = loss + 0.5 * i
        log += [{"step": step, "loss": loss, "lr": 1e-3} for step in steps]
    jsonl(folder / "log.jsonl", log + [{"step": 100 * n, "test_loss": 2.5}] * test)


def assert_whole(path, folder):
    """A picture with something on it, of a size to look at, and no temporary file beside it."""
    image = matplotlib.image.imread(path)
    height, width = image.shape[:2]
    assert 800 <= width <= 1600 and 400 <= height <= 2400, (width, height)
    assert 0.005 < (image[..., :3] < 0.95).any(-1).mean() < 0.8
    assert not list(folder.glob("*.tmp"))


@pytest.fixture
def drawn(monkeypatch):
    """The Figure objects that were written to disk."""
    figures, savefig = [], Figure.savefig

    def recorded(figure, *args, **kw):
        figures.append(figure)
        savefig(figure, *args, **kw)
    monkeypatch.setattr(Figure, "savefig", recorded)
    return figures


def stars(figure):
    return [line for ax in figure.axes for line in ax.lines if line.get_marker() == "*"]


def best_row(said):
    """The cells of the row "best" of a summary."""
    return next(line.split() for line in said.splitlines() if line.split()[0] == "best")


# ---- read_lines

def test_a_file_cut_anywhere_gives_its_whole_lines(tmp_path):
    lines = [{"step": 1, "arch": {"n_head": [4, 8]}}, {}, {"step": 2, "text": "ü} {"}]
    path = tmp_path / "log.jsonl"
    data = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
    ends = [i for i, byte in enumerate(data) if byte == 10]
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        assert read_lines(path) == lines[:sum(end <= cut for end in ends)], cut


@pytest.mark.parametrize("damage", [
    b"{\"step\": ", b"", b"3", b"[1]", b"null", b"\xff\xfe", b"{} {}"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_other_damage_stops_with_file_and_line(tmp_path, damage, number):
    path = tmp_path / "log.jsonl"
    lines = [b'{"step": 1}', b'{"step": 2}', b'{"step": 3}']
    lines[number - 1] = damage
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(SystemExit, match=f"log.jsonl is damaged: its line {number} ") as stopped:
        read_lines(path)
    assert len(str(stopped.value).splitlines()) == 1


def test_a_missing_file_stops_with_its_name(tmp_path):
    with pytest.raises(SystemExit, match=r"none\.jsonl cannot be read: No such file"):
        read_lines(tmp_path / "none.jsonl")


# ---- the heat map

@pytest.mark.parametrize("space", SPACES)
def test_the_heat_map_is_the_logged_weights(space):
    rng = np.random.default_rng(1)
    lines = [evaluation(space, step, rng) for step in (0, 10, 30)]
    labels, matrix = weight_history(lines, SPACES[space])
    shown = {(label, column): weight for label, row in zip(labels, matrix, strict=True)
             for column, weight in enumerate(row)}
    logged = {}
    for column, line in enumerate(lines):
        for name, options in options_of(space).items():
            rows = {f"{name}.{i}": row for i, row in enumerate(line["weights"][name])}
            if name in ("n_layer", "n_embd"):
                rows = {name: line["weights"][name]}
            for group, row in rows.items() if len(options) > 1 else ():
                logged |= {(f"{group} {option}", column): weight
                           for option, weight in zip(options, row, strict=True)}
    assert shown == logged
    assert len(set(labels)) == len(labels)


def test_options_that_the_config_does_not_hold_are_labelled_by_index():
    line = {"arch": {"edge": [["sep", 3], "skip"], "ops": "b", "cut": 2},
            "weights": {"edge": [[0.75, 0.25], [0.5, 0.5]], "ops": [0.2, 0.8], "cut": [0.1, 0.9]}}
    labels, matrix = weight_history([line], {"ops": ["a", "b"], "cut": [1, 2, 3]})
    assert labels == ["edge.0 0", "edge.0 1", "edge.1 0", "edge.1 1", "ops a", "ops b", "cut 0",
                      "cut 1"]
    assert matrix.tolist() == [[0.75], [0.25], [0.5], [0.5], [0.2], [0.8], [0.1], [0.9]]


@pytest.mark.parametrize("space", ["quick", "ragged", "gpt2"])
def test_the_heat_map_shows_the_weights_and_the_best_under_labels_apart(tmp_path, drawn, space):
    traj = search_run(tmp_path, space)
    search_figure(tmp_path)
    labels, matrix = weight_history(traj, SPACES[space])
    ax = drawn[0].axes[2]
    mesh, = ax.collections
    assert np.array_equal(mesh.get_array().reshape(matrix.shape), matrix)
    assert mesh.get_clim() == (0, 1)

    best = min(traj, key=lambda line: line["arch_loss"])
    places = [line.get_xydata()[0] for line in ax.lines if line.get_marker() == "*"]
    chosen = []
    for name, value in best["arch"].items():
        if len(options_of(space)[name]) == 1:
            continue
        if isinstance(value, list):
            chosen += [f"{name}.{i} {option}" for i, option in enumerate(value)]
        else:
            chosen.append(f"{name} {value}")
    assert sorted(labels[int(y)] for _, y in places) == sorted(chosen)
    assert all(x == best["step"] for x, _ in places)

    renderer = FigureCanvasAgg(drawn[0]).get_renderer()
    drawn[0].draw(renderer)
    names, options = (
        sorted((label.get_window_extent(renderer) for label in ax.get_yticklabels(minor=minor)),
               key=lambda box: box.y0) for minor in (False, True))
    for boxes in (names, options):
        assert all(low.y1 <= high.y0 + 1 for low, high in itertools.pairwise(boxes))
    assert 0 <= min(box.x0 for box in names)
    assert max(box.x1 for box in names) <= min(box.x0 for box in options)


# ---- whole figures

@pytest.mark.parametrize(("space", "n", "optimizer", "searched", "panels"), [
    ("quick", 1, "drnas", 0, 4), ("quick", 2, "gdas", 0, 4), ("ragged", 150, "darts", 0, 4),
    ("gpt2", 3, "drnas", 0, 4), ("one", 3, "drnas", 0, 2), ("quick", 1, "spos", 0, 2),
    ("quick", 4, "spos", 1, 3), ("quick", 4, "spos", 40, 3),
    ("deep", 3, "drnas", 0, 7)]) # the last weights of its four choices, and no history
def test_every_search_gets_a_whole_figure(tmp_path, drawn, space, n, optimizer, searched, panels):
    search_run(tmp_path, space, n, optimizer, searched)
    path = search_figure(str(tmp_path))
    assert path == str(tmp_path / "search.png")
    assert_whole(path, tmp_path)
    assert len(drawn[0].axes) == panels # the colour bar is one


def test_every_training_run_gets_a_whole_figure(tmp_path):
    for n, val, test in [(1, True, False), (1, False, True), (6, True, True), (6, False, False)]:
        train_run(tmp_path, n, val, test)
        assert_whole(train_figure(str(tmp_path)), tmp_path)


def test_the_curves_are_the_logged_losses_once_a_step(tmp_path, drawn):
    traj = search_run(tmp_path)
    jsonl(tmp_path / "arch_traj.jsonl", traj[:3] + traj[1:]) # as after a resume from the second
    search_figure(tmp_path)
    curves = {line.get_label(): line.get_xydata().tolist() for line in drawn[0].axes[0].lines}
    for label, key in [("supernet", "mixture_loss"), ("architecture", "arch_loss"),
                       ("architecture, val", "val_arch_loss")]:
        assert curves[label] == [[line["step"], line[key]] for line in traj]


def test_spos_shows_its_result_and_the_running_best(tmp_path, drawn):
    search_run(tmp_path, "quick", 4, "spos", 40)
    search_figure(tmp_path)
    losses, _, searched = drawn[0].axes
    assert [line.get_ydata()[0] for line in stars(drawn[0])] == [1.9]
    assert losses.lines[1].get_ydata().tolist() == [3.5] * 4 # without the mean of the searched ones
    dots, running = (line.get_ydata() for line in searched.lines)
    assert len(dots) == 40 and all(running[i] == min(dots[:i + 1]) for i in range(40))


@pytest.mark.parametrize("name", ["arch_traj.jsonl", "log.jsonl"])
def test_a_run_without_an_evaluation_says_so_and_keeps_the_old_figure(tmp_path, name):
    search_run(tmp_path, n=0)
    (tmp_path / "search.png").write_bytes(b"old")
    if name == "log.jsonl":
        (tmp_path / "arch_traj.jsonl").unlink()
    with pytest.raises(SystemExit, match=f"{name} holds no evaluation yet"):
        analyze(str(tmp_path))
    assert (tmp_path / "search.png").read_bytes() == b"old"


def test_a_drawing_that_is_cut_off_keeps_the_old_figure(tmp_path, monkeypatch):
    def savefig(figure, file, **kw):
        file.write(b"half")
        raise OSError(28, "No space left on device")
    search_run(tmp_path)
    old = Path(search_figure(str(tmp_path))).read_bytes()
    monkeypatch.setattr(Figure, "savefig", savefig)
    with pytest.raises(SystemExit, match="No space"):
        search_figure(str(tmp_path))
    assert not list(tmp_path.glob("*.tmp"))
    assert (tmp_path / "search.png").read_bytes() == old


def test_drawing_leaves_matplotlib_as_it_was(tmp_path):
    search_run(tmp_path)
    code = ("import sys, analyze; assert 'matplotlib' not in sys.modules\n"
            "import matplotlib; before = matplotlib.rcParams.copy()\n"
            f"analyze.search_figure({str(tmp_path)!r})\n"
            "assert matplotlib.rcParams.copy() == before\n"
            "assert 'matplotlib.pyplot' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# ---- the script, on the files of real runs

def run(script, *args, **kw):
    command = [sys.executable, str(ROOT / script), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **kw)


def test_the_script_redraws_real_runs(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(file.read_text() for file in sorted(ROOT.glob("*.py"))))
    data = f"--data_dir={tmp_path / 'data'}"
    tiny = ["--dataset=own", data, "--max_iters=3", "--eval_interval=2", "--eval_iters=1",
            "--log_interval=1", "--batch_size=2", "--block_size=16", "--device=cpu"]
    search, base = tmp_path / "search", tmp_path / "train"
    space = ["--n_layer=[1,2]", "--n_embd=[8,16]", "--n_head=[2,4]", "--mlp_ratio=2",
             "--window=[4,0]"]
    for command in (["prepare.py", "--dataset=text", f"--path={text}", "--name=own", data],
                    ["train.py", *tiny, "--n_layer=1", "--n_embd=8", "--n_head=2",
                     f"--out_dir={base}"],
                    ["train_search.py", *tiny, *space, f"--out_dir={search}"]):
        done = run(*command)
        assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines() # of analyze.py a search shows where its figure is, no more
    assert said[-1] == f"figure: {search / 'search.png'}" and "best " not in done.stdout
    assert_whole(search / "search.png", search)
    best = json.loads((search / "arch.json").read_text())
    result = json.loads((base / "result.json").read_text())
    for folder, figure, step in [(search, "search.png", best["step"]),
                                 (base, "loss.png", result["best_step"])]:
        (folder / figure).unlink(missing_ok=True)
        done = run("analyze.py", f"--out_dir={folder}")
        assert done.returncode == 0, done.stderr
        assert_whole(folder / figure, folder)
        assert f"figure: {folder / figure}" in done.stdout
        lines = [line.split() for line in done.stdout.splitlines() if line.strip()]
        rows = {line[0]: line[1] for line in lines}
        assert rows["best"] == str(step) and rows["last"] == "3", done.stdout
        if folder is search:
            assert f"{best['arch_loss']:.4f}" in done.stdout
            assert f"n_layer={best['arch']['n_layer']}" in done.stdout
            assert f"{best['cost']['params']:,} parameters" in done.stdout


def test_the_best_of_a_progressive_search_is_what_it_keeps(tmp_path, drawn, capsys):
    """The best of its second half: the lower loss of the first was with operations now pruned."""
    traj, losses = search_run(tmp_path, n=4), (3.0, 1.0, 2.5, 2.0)
    traj = [line | {"arch_loss": loss} for line, loss in zip(traj, losses, strict=True)]
    jsonl(tmp_path / "arch_traj.jsonl", map(add_checksum, traj))
    write_json(tmp_path / "arch.json", traj[3])
    analyze(str(tmp_path))
    said = capsys.readouterr().out
    assert best_row(said)[1] == "300" and describe(traj[3]["arch"]) in said
    assert {line.get_xdata()[0] for line in stars(drawn[0])} == {300}


@pytest.mark.parametrize("key", ["val_acc", "val_psnr"])
def test_the_best_of_images_is_that_of_the_weights_that_are_kept(tmp_path, drawn, capsys, key):
    """The first with the highest validation accuracy or PSNR, wherever the lowest loss is."""
    log = [{"params": 1000, "flops": 2000}]
    log += [{"step": step, "train_loss": 1.0, "val_loss": loss, key: value, "train" + key[3:]: 1.0}
            for step, loss, value in ((0, 2.0, 10.0), (100, 0.5, 80.0), (200, 0.7, 90.0),
                                      (300, 0.9, 90.0))]
    jsonl(tmp_path / "log.jsonl", [*log, {"step": 300, "test_loss": 0.8}])
    (tmp_path / "run.json").write_text(json.dumps({"config": {}}))
    analyze(str(tmp_path))
    best = best_row(capsys.readouterr().out)
    assert best[1] == "200" and "90.0000" in best
    star, = stars(drawn[0])
    assert star.get_xdata()[0] == 200 and "weights of step 200" in star.get_label()


def test_a_folder_without_a_run_is_one_sentence(tmp_path):
    done = run("analyze.py", f"--out_dir={tmp_path / 'none'}")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "cannot be read" in done.stderr, done.stderr
