"""The layout of the design: imports point down, the files of the book keep their sizes, no script
asks for a space or a method by its name."""
import ast
import re

import pytest
from conftest import ROOT

LAYERS = [("configurator",), ("fused_ops", "run"), ("data", "supernet"),
          ("model", "search_spaces.convs"), ("search_spaces.cells",),
          ("search_spaces.*",), ("search_spaces", "optim_nas"),
          ("budget", "pretrained", "prepare"), ("train",), ("train_search", "train_base", "env"),
          ("train_rl",), ("sample", "export", "bench", "analyze", "report")]
BOOK = ("model.py", "supernet.py", "optim_nas.py", "train.py", "train_search.py")
LEAVES = ("sample", "export", "bench", "analyze", "report")


def modules():
    """{module: its path} of the project, without tests and configs."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("search_spaces/*.py")]
    found = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}
    return {name.removesuffix(".__init__"): file for name, file in found.items()}


def imports_of(file, known):
    """The project's modules that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & known.keys()


def layer_of(name):
    for i, layer in enumerate(LAYERS):
        if name in layer:
            return i
    assert name.startswith("search_spaces."), f"{name} has no place in the layout"
    return LAYERS.index(("search_spaces.*",))


@pytest.fixture(scope="module")
def graph():
    known = modules()
    return {name: imports_of(file, known) for name, file in known.items()}


def test_no_circle(graph):
    """Whatever a module imports does not import it, over any number of steps."""
    def reach(name, seen):
        for other in graph[name] - seen:
            seen.add(other)
            reach(other, seen)
        return seen
    circles = [name for name in graph if name in reach(name, set())]
    assert not circles, f"modules that import themselves in the end: {circles}"


def test_imports_point_down(graph):
    for name, others in graph.items():
        for other in others:
            assert layer_of(other) <= layer_of(name), f"{name} imports {other}, which is above it"


def test_no_trainer_imports_what_reads_its_files(graph):
    for name, others in graph.items():
        if name not in LEAVES:
            assert not others & set(LEAVES), f"{name} imports {others & set(LEAVES)}"


@pytest.mark.parametrize("pattern, exempt", [
    (r"""space *(==|!=) *["']gpt["']""", ()),
    (r"""\boptimizer *(==|!=|in) *[\["'(]""", ("optim_nas",)),
    (r"except *:|except BaseException", ()),
    (r"weights_only *= *False|pickle\.load|shell *= *True", ())])
def test_nobody_asks_for_a_name(pattern, exempt):
    for name, file in modules().items():
        for number, line in enumerate(file.read_text().splitlines(), 1):
            assert name in exempt or not re.search(pattern, line), f"{file.name}:{number}: {line}"


def test_layers_raise_config_errors():
    """A layer does not know whether a script runs it."""
    for name, file in modules().items():
        if name in ("model", "supernet") or name.startswith("search_spaces."):
            assert "SystemExit" not in file.read_text(), file


def test_twenty_files_at_the_top():
    assert len(list(ROOT.glob("*.py"))) <= 20


def test_no_function_is_longer_than_a_screen_and_a_half():
    for name, file in modules().items():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                allowed = 130 if (name, node.name) == ("train_search", "search") else 80
                assert lines <= allowed, f"{file.name}: {node.name} has {lines} lines"


def test_the_readme_says_how_long_the_book_is():
    lines = sum(len((ROOT / name).read_text().splitlines()) for name in BOOK)
    said = re.search(r"five files, ([\d,]+) lines", (ROOT / "README.md").read_text())[1]
    assert abs(int(said.replace(",", "")) - lines) < 100, f"the book has {lines} lines"
