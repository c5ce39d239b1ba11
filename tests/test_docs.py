"""The README is short, links lead somewhere, and the tutorials of docs/hack.md work as written."""
import importlib.util
import re
import shutil
import json
import subprocess
import sys

import pytest
import test_spaces
import torch
from conftest import ROOT, TINY, TINY_IMAGES, TINY_SEARCH, flags, succeeds
from test_spaces import check_law, make
from test_spaces import in_float64 # noqa: F401 (a fixture that every test here uses)
from test_spaces import test_an_option_that_carries_its_weight as check_straight_through
from test_spaces import test_cost_is_that_of_the_extracted_network as check_cost
from test_spaces import test_gradient_of_the_alphas_is_the_finite_difference as check_alphas

from budget import architectures
from run import load_checkpoint

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("results/*.md"))]
HACK = (ROOT / "docs/hack.md").read_text()
SPACES = dict(re.findall(r"`search_spaces/(\w+)\.py`:\n\n```python\n(.*?)```", HACK, re.S))
TINY_SIZES = {
    "two_convs": dict(width=[3, 4, 6], kernel_size=[1, 3, 5]),
    "last_tokens": dict(n_embd=[3, 4, 6], n_hidden=[4, 5, 7], context=3, vocab_size=11,
                        block_size=5),
}


# -----------------------------------------------------------------------------
# the pages

def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    lines = [line for line in lines if not line.startswith("python3 -m venv")]
    assert [line for line in lines if len(line) > 100] == []


def anchors(page):
    """What may stand behind the # of a link to a Markdown page."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)|^\[.*?\]: (\S+)", page.read_text(), re.M)
    for link in [link for pair in links for link in pair if link and "://" not in link]:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


# -----------------------------------------------------------------------------
# the tutorials, followed in a copy of the code

@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The code after all tutorials: patches applied, files saved."""
    folder = tmp_path_factory.mktemp("copy")
    (folder / "search_spaces").mkdir()
    for file in [*ROOT.glob("*.py"), *ROOT.glob("*.cpp"), *ROOT.glob("search_spaces/*.py")]:
        shutil.copy(file, folder / file.relative_to(ROOT))
    for name, code in SPACES.items():
        (folder / f"search_spaces/{name}.py").write_text(code)
    patches = re.findall(r"```diff\n(.*?)```", HACK, re.S)
    assert len(patches) == 3
    for patch in patches:
        subprocess.run(["git", "apply", "-"], input=patch, text=True, cwd=folder, check=True)
    return folder


def supernet(name, monkeypatch, tmp_path):
    """A tiny supernet of a space of the docs, which the tests of test_spaces.py then know, too."""
    path = tmp_path / f"{name}.py"
    path.write_text(SPACES[name])
    spec = importlib.util.spec_from_file_location(f"search_spaces.{name}", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, f"search_spaces.{name}", module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(test_spaces.SPACES, name, TINY_SIZES[name])
    return make(name)


def tokens(B=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(11, (B, 5), generator=g), torch.randint(11, (B, 5), generator=g)


@pytest.mark.parametrize("name", ["two_convs", "last_tokens"])
def test_a_new_space_obeys_the_law(name, monkeypatch, tmp_path):
    net = supernet(name, monkeypatch, tmp_path)
    batch = test_spaces.batch if name == "two_convs" else tokens
    check_law(net, list(architectures(net.choices))[::4], batch)
    monkeypatch.setattr(test_spaces, "batch", batch)
    check_alphas(name)
    check_straight_through(name, "weights", True)


def test_the_cost_of_a_new_space_of_images(monkeypatch, tmp_path):
    supernet("two_convs", monkeypatch, tmp_path)
    check_cost("two_convs", "weights")


def test_the_cost_of_a_new_space_of_text(monkeypatch, tmp_path):
    net = supernet("last_tokens", monkeypatch, tmp_path)
    archs = list(architectures(net.choices))
    assert all(net.cost(arch) == net.extract(arch).cost() for arch in archs)
    uniform = {name: torch.full(c.shape, 1 / len(c.options)) for name, c in net.choices.items()}
    for key, expected in net.cost(uniform).items():
        mean = sum(net.cost(arch)[key] for arch in archs) / len(archs)
        assert expected.item() == pytest.approx(mean)


@pytest.mark.parametrize("name, choices", [
    ("two_convs", "choices width=[8, 16] kernel_size=[3, 5]x2"),
    ("last_tokens", "choices n_embd=[16, 32] n_hidden=[64, 128]")])
def test_a_new_space_is_searched_and_trained(name, choices, copy, data_dir, digits_dir, tmp_path):
    images = name == "two_convs"
    options = flags((TINY_IMAGES if images else TINY) |
                    dict(data_dir=digits_dir if images else data_dir))
    search = ["train_search.py", f"--space={name}"]
    assert choices in succeeds(*search, f"--out_dir={tmp_path}/s", *options, cwd=copy)
    base = ["train_base.py", f"--arch={tmp_path}/s/arch.json", f"--out_dir={tmp_path}/b"]
    succeeds(*base, *options, cwd=copy)
    assert choices.split()[1].partition("=")[0] + " = [" in succeeds(*search, "--help", cwd=copy)


def test_a_new_norm_obeys_the_law(copy):
    path = f"import sys; sys.path[:0] = [{str(copy)!r}, {str(ROOT / 'tests')!r}]; "
    law = ("from test_model import *; check_law_of_exactness(supernet('even', norm='l1norm'));"
           "check_law_of_exactness(supernet('even', norm=['layernorm', 'l1norm']))")
    subprocess.run([sys.executable, "-c", path + law], cwd=copy, check=True)


def test_a_new_norm_and_a_new_method_search(copy, data_dir, tmp_path):
    options = [f"--data_dir={data_dir}", f"--out_dir={tmp_path}/s", *flags(TINY_SEARCH)]
    new = ["--norm=l1norm", "--optimizer=snas", "--tau_max=5"]
    assert "snas on cpu" in succeeds("train_search.py", *options, *new, cwd=copy)
    assert json.loads((tmp_path / "s/arch.json").read_text())["model"]["norm"] == "l1norm"


def test_a_weight_average_is_evaluated_and_resumed(copy, data_dir, tmp_path):
    size = dict(n_layer=1, n_head=2, n_embd=8, learning_rate=1e-2, lr_decay_iters=4, ema=0.5)

    def trained(name, **rest):
        options = TINY | size | rest | dict(data_dir=data_dir, out_dir=tmp_path / name)
        succeeds("train.py", *flags(options), cwd=copy)
        return load_checkpoint(f"{tmp_path}/{name}/ckpt.pt", "cpu")

    whole, best = trained("whole"), load_checkpoint(f"{tmp_path}/whole/best.pt", "cpu")
    assert best["step"] == 4
    for name, p in best["model"].items():
        assert torch.equal(p, whole["average"][f"module.{name}"])
    assert any(not torch.equal(p, whole["model"][name]) for name, p in best["model"].items())

    trained("halves", max_iters=2)
    resumed = trained("halves", init_from="resume")
    for name, p in whole["average"].items():
        assert torch.equal(p, resumed["average"][name])
