"""The contract of configurator.py: what a key is, what it takes, and that a mistake ends in one
sentence."""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configurator import configure, defaults, given

ROOT = Path(__file__).resolve().parents[1]


def script():
    """The globals of a small script, fresh for each test."""
    return {
        "__doc__": "A script.", "__name__": "__main__", "_private": 1, "MAX": 9, "math": math,
        "main": script, "nothing": None,
        "n_layer": 6, "learning_rate": 1e-3, "min_lr": 1e-4, "compile": True, "out_dir": "out",
        "n_embd": [192, 384],
        "betas": (0.9, 0.95), "primitives": ["skip", "conv"],
    }


KEYS = ["n_layer", "learning_rate", "min_lr", "compile", "out_dir", "n_embd", "betas", "primitives"]


def refused(argv, **kwargs):
    """The message that argv ends in: one line, and the namespace untouched."""
    namespace = script()
    before = repr(namespace)
    with pytest.raises(SystemExit) as stopped:
        configure(namespace, argv, **kwargs)
    message = stopped.value.code
    assert isinstance(message, str) and message and len(message.splitlines()) == 1, message
    assert repr(namespace) == before
    return message


def config_file(tmp_path, text):
    path = tmp_path / "small.py"
    path.write_text(text)
    return str(path)


def test_keys_are_lower_case_plain_values():
    assert list(defaults(script())) == KEYS
    assert configure(script(), []) == defaults(script())


def test_argv_is_the_command_line_by_default_and_is_not_read_for_defaults(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py", "--n_layer=2"])
    assert configure(script())["n_layer"] == 2
    assert defaults(script())["n_layer"] == 6


def test_snapshot_is_json_and_shares_nothing_with_the_script():
    namespace = script()
    # a tuple stays one in the script
    config = configure(namespace, ["--betas=[0.8, 0.9]"])
    assert json.loads(json.dumps(config, allow_nan=False)) == config
    assert config["betas"] == [0.8, 0.9] and namespace["betas"] == (0.8, 0.9)
    config["n_embd"].append(1)
    assert namespace["n_embd"] == [192, 384]


@pytest.mark.parametrize("arg, value", [
    ("--n_layer=12", 12), ("--n_layer=-1", -1),
    ("--learning_rate=6e-4", 6e-4), ("--learning_rate=1", 1.0),
    ("--compile=False", False),
    ("--out_dir=1e5", "1e5"), ("--out_dir=a=b", "a=b"), ("--out_dir=./x", "./x"),
    ("--out_dir=", ""), ("--out_dir=x.py", "x.py"),
    ("--out_dir='q'", "'q'"), ("--out_dir=[1]", "[1]"), ("--out_dir=two words", "two words"),
    ("--n_embd=[64]", [64]), ("--n_embd=64,96,128", [64, 96, 128]), ("--n_embd=[1, 2.5]", [1, 2.5]),
    ("--n_embd=256", 256),
    ("--n_embd=0.5", 0.5), ("--betas=0.9", 0.9), ("--betas=[0, 1]", [0, 1]),
    ("--primitives=['pool']", ["pool"]),
])
def test_command_line_value(arg, value):
    namespace = script()
    key = arg[2:].partition("=")[0]
    config = configure(namespace, [arg])
    # repr tells 1 from 1.0 and True
    assert repr(config[key]) == repr(value)
    unchanged = {k: v for k, v in defaults(script()).items() if k != key}
    assert {k: v for k, v in config.items() if k != key} == unchanged
    assert defaults(namespace) == config


@pytest.mark.parametrize("arg, takes", [
    *[(f"--n_layer={text}", "an int") for text in ("3.0", "1e3", "True", "six", "'6'", "", "None",
                                                   "0x" + "f" * 9999, "[" * 999)],
    *[(f"--learning_rate={text}", "a finite number")
      for text in ("True", "fast", "", "1e999", "nan", "2j")],
    *[(f"--compile={text}", "True or False") for text in ("1", "0", "true", "", "'True'", "None")],
    *[(f"--n_embd={text}", "list of them") for text in ("[]", "True", "[True, 2]", "['a']",
                                                        "[1, 'a']", "[[1]]", "{1}", "x")],
    *[(f"--primitives={text}", "list of quoted strings")
      for text in ("[]", "[1]", "['a', 1]", "3")],
])
def test_wrong_type_on_the_command_line_says_what_the_key_takes(arg, takes):
    message = refused([arg])
    assert message.startswith(arg[:20].rstrip()) and takes in message


@pytest.mark.parametrize("line, takes", [
    ("n_layer = 3.0", "an int"), ("n_layer = True", "an int"),
    ("learning_rate = '1'", "a finite number"), ("compile = 1", "True or False"),
    ("out_dir = 5", "a quoted string"), ("out_dir = None", "a quoted string"),
    ("n_embd = []", "list of them"), ("n_embd = [True]", "list of them"),
    ("n_embd = [1e999]", "list of them"), ("n_embd = range(3)", "list of them"),
    ("primitives = ['skip', 1]", "list of quoted strings"), ("def n_layer(): pass", "an int"),
    ("import math as n_layer", "an int"), ("n_embd.append('x')", "list of them"),
])
def test_wrong_type_in_a_file_names_the_file(tmp_path, line, takes):
    file = config_file(tmp_path, line)
    message = refused([file])
    assert message.startswith(file) and takes in message


def test_a_list_for_a_number_gets_the_hint():
    hint = "train_search.py searches over lists"
    for arg in ("--n_layer=[4, 6]", "--n_layer=4,6", "--learning_rate=[0.1]"):
        assert refused([arg], list_hint=hint).endswith(hint)
    for arg in ("--n_layer=4.5", "--n_layer=[]", "--n_layer=['a']", "--n_layer=[True]",
                "--compile=[1]", "--primitives=[1]"):
        assert hint not in refused([arg], list_hint=hint)


def test_a_list_key_stays_one_after_a_bare_number(tmp_path):
    file = config_file(tmp_path, "n_embd = 64")
    assert configure(script(), [file, "--n_layer=1"])["n_embd"] == 64
    assert configure(script(), [file, "--n_embd=[64, 96]"])["n_embd"] == [64, 96]


def test_left_to_right_the_later_one_wins(tmp_path):
    file = config_file(tmp_path, "min_lr = learning_rate / 10\nn_layer = 3\n")
    config = configure(script(), ["--learning_rate=0.5", file, "--n_layer=4"])
    assert (config["min_lr"], config["n_layer"]) == (0.05, 4)
    assert configure(script(), ["--n_layer=4", file])["n_layer"] == 3


def test_a_file_may_import_define_and_keep_private_names(tmp_path):
    text = """
import os.path
from math import e, pi as circle, sqrt
def half(x): return x // 2
class Helper: pass
_tokens = 10 ** 6
n_layer = half(n_layer)
learning_rate = circle
n_embd.append(768)
"""
    config = configure(script(), [config_file(tmp_path, text)])
    assert config == defaults(script()) | {"n_layer": 3, "learning_rate": math.pi,
                                           "n_embd": [192, 384, 768]}


def test_an_included_file_runs_at_its_line(tmp_path, monkeypatch):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "recipe.py").write_text(
        "include('sizes.py')\nmin_lr = learning_rate / 10\nout_dir += '_recipe'\n")
    (tmp_path / "parts" / "sizes.py").write_text(
        "from math import pi\n_half = 3\nn_layer = _half\nn_embd.append(768)\n")
    file = config_file(
        tmp_path,
        "learning_rate = 0.5\n"
        "include('parts/recipe.py') # found from here, wherever the script runs\n"
        "out_dir += '_small'\nn_layer += 1\n")
    monkeypatch.chdir(tmp_path.parent)
    changed = {"learning_rate": 0.5, "min_lr": 0.05, "n_layer": 4, "n_embd": [192, 384, 768],
               "out_dir": "o_recipe_small"}
    assert configure(script(), ["--out_dir=o", file]) == defaults(script()) | changed
    assert configure(script(), ["--out_dir=o", file, "--n_layer=2"])["n_layer"] == 2


def test_a_mistake_in_an_included_file_names_that_file(tmp_path):
    file = config_file(tmp_path, "include('part.py')")
    assert refused([file]).startswith((tmp_path / "part.py").as_posix())
    (tmp_path / "part.py").write_text("n_layer = 3\nmin_lr = 1 / 0\n")
    place = f"{(tmp_path / 'part.py').as_posix()}, line 2"
    assert refused([file]).startswith(f"{place}: ZeroDivisionError")
    (tmp_path / "part.py").write_text("learnig_rate = 0.1")
    assert "learnig_rate" in refused([file])
    (tmp_path / "part.py").write_text("include('small.py')")
    assert "RecursionError" in refused([file]) and given("n_layer", [file]) is None


def test_given_reads_included_files(tmp_path):
    """What a script must know before it configures, such as the space, may stand in an included
    file."""
    (tmp_path / "part.py").write_text("n_layer = 3\nout_dir = 'part'\n")
    file = config_file(tmp_path, "include('part.py') # the sizes\nout_dir = 'small'\n")
    assert (given("n_layer", [file]), given("out_dir", [file]),
            given("min_lr", [file])) == ("3", "small", None)
    file = config_file(tmp_path, "out_dir = 'small'\ninclude('part.py')\ninclude('missing.py')\n")
    assert given("out_dir", [file]) == "part" and given("out_dir", [file, "--out_dir=o"]) == "o"


def test_a_file_that_is_refused_does_not_reach_a_list_of_the_script(tmp_path):
    # refused() compares the namespace
    refused([config_file(tmp_path, "n_embd.append(768)\nn_layer = 'x'")])


def test_unknown_keys_stop_with_the_nearest(tmp_path):
    file = config_file(tmp_path, "learnig_rate = 0.1")
    for message in (refused(["--learnig_rate=0.1"]), refused([file]),
                    refused(["--learning-rate=0.1"])):
        assert "learning_rate" in message
    assert refused([file]).startswith(file)
    for name in ("__name__", "_private", "MAX", "math", "main", "nothing", "zzz", "", "n_layer "):
        assert "there is no key" in refused([f"--{name}=1"])
    for line in ("tokens = 5", "MAX = 5", "N_LAYER = 5"):
        assert "there is no key" in refused([config_file(tmp_path, line)])


@pytest.mark.parametrize("text, line, error", [
    ("n_layer = 3\nn_layer = = 4\n", 2, "SyntaxError"),
    ("def f():\n    return 1 / 0\n\nn_layer = f()\n", 2, "ZeroDivisionError"),
    ("\n\nn_layer = n_leyer\n", 3, "n_leyer"),
    ("import no_such_module_here\n", 1, "no_such_module_here"),
    ("raise ValueError('two\\nlines')\n", 1, "two lines"),
    ("\n  n_layer = 1\n", 2, "IndentationError"),
    ("import json\n\njson.loads('{')\n", 3, "JSONDecodeError"),
])
def test_a_file_that_raises_stops_with_file_line_and_error(tmp_path, text, line, error):
    file = config_file(tmp_path, text)
    message = refused([file])
    assert message.startswith(f"{file}, line {line}: ") and error in message


def test_bytes_that_are_no_python_stop_with_the_file(tmp_path):
    path = tmp_path / "small.py"
    for content in (b"\xff\xfe\x00", b"n_layer = 1\x00", b"# coding: nonsense\n"):
        path.write_bytes(content)
        assert refused([str(path)]).startswith(str(path))


def test_what_is_no_override_and_no_file_says_what_to_write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "train_gpt2.py").write_text("")
    (tmp_path / "folder.py").mkdir()
    assert "write --n_layer=value" in refused(["--n_layer", "3"])
    assert "write --n_layer=3" in refused(["n_layer=3"])
    assert "write --n_layer=3" in refused(["-n_layer=3"])
    for arg in ("train", "", "-", "--", "=", "config/train_gpt2"):
        assert "write --" in refused([arg]) and "config/name.py" in refused([arg])
    assert "config/train_gpt2.py" in refused(["config/train_gpt.py"])
    for arg in ("none.py", "folder.py"):
        assert refused([arg]).startswith(arg) and "config/name.py" in refused([arg])


def test_one_line_per_change_on_rank_0(tmp_path, monkeypatch, capsys):
    file = config_file(tmp_path, "n_layer = 3\nout_dir = 'out'\n")
    argv = [file, "--n_layer=4", "--min_lr=1e-4", "--out_dir=a\nb"]
    for rank, printed in ((None, True), ("0", True), ("1", False)):
        if rank is None:
            monkeypatch.delenv("RANK", raising=False)
        else:
            monkeypatch.setenv("RANK", rank)
        configure(script(), argv)
        lines = [f"n_layer: 6 -> 3 ({file})", "n_layer: 3 -> 4 (command line)",
                 r"out_dir: 'out' -> 'a\nb' (command line)"]
        assert capsys.readouterr().out.splitlines() == (lines if printed else [])


@pytest.mark.parametrize("value", [[], (), [1, "a"], [[1]], [True, 1], math.inf,
                                   math.nan])
def test_a_default_that_could_not_be_overridden_or_saved_is_the_authors_error(value):
    with pytest.raises(AssertionError, match="n_head"):
        defaults(script() | {"n_head": value})


def suits(key, value):
    """The contract's types, written down a second time."""
    def number(v):
        return isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)
    if key in ("n_embd", "betas"):
        listed = isinstance(value, list) and len(value) > 0
        return number(value) or (listed and all(number(v) for v in value))
    if key == "primitives":
        return isinstance(value, list) and len(value) > 0 and all(isinstance(v, str) for v in value)
    return type(value) is type(script()[key])


def test_any_argv_gives_right_types_or_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pieces = ["1", "-2", "0.5", "1e3", "1e999", "nan", "True", "None", "[", "]", "(", ")", "{", "}",
              ",", "'", '"', "a", "b.c",
              ".py", " ", "\n", "\t", "=", "--", "-", "\\", "\u2028", "\udcff", "é", "[1,2]",
              "['x']", "[True]", "[]", "{[]:1}",
              "lambda:0", "__import__('os')", "n_layer", "0x" + "f" * 5000, "9" * 5000, "(" * 300]
    rng = random.Random(1337)
    accepted = 0
    for _ in range(4000):
        argv = []
        for _ in range(rng.randint(1, 3)):
            key = rng.choice(KEYS)
            # of this key's type, or of another's
            value = repr(script()[rng.choice([key, rng.choice(KEYS)])])
            if rng.random() < 0.5:
                value = "".join(rng.choices(pieces, k=rng.randint(0, 3)))
            if rng.random() < 0.1:
                key = rng.choice([*pieces, "MAX", "__doc__", "main"])
            start, equals = "--", "="
            if rng.random() >= 0.9:
                start, equals = rng.choice(["", "-", "---"]), rng.choice(["", " ", "=="])
            argv.append(start + key + equals + value)
        namespace = script()
        try:
            config = configure(namespace, argv)
        except SystemExit as stopped:
            assert isinstance(stopped.code, str) and len(stopped.code.splitlines()) == 1, argv
            assert repr(namespace) == repr(script()), argv
            continue
        accepted += 1
        assert list(config) == KEYS, (argv, config)
        assert all(suits(key, value) for key, value in config.items()), (argv, config)
        json.dumps(config, allow_nan=False)
    assert 400 < accepted < 3600, f"{accepted} of 4000 accepted: the loop sees one side only"


TRAIN = '''"""
Trains nothing.
"""
seed = 1
# a comment on its own line belongs to no key
n_layer = 6  # number of blocks
out_dir = "#out"  # where the files go
n_embd = [  # widths
    192,  # narrow
    384,
]
def helper():
    batch_size = 0  # not this one
batch_size = n_layer  # sequences a step
'''

SEARCH = '''"""Searches nothing."""
import json
from configurator import configure
from train import *
n_layer = [4, 6]  # depths to choose from
tau_max = 10.0
def main(config):
    print(json.dumps(config))
if __name__ == "__main__":
    main(configure(globals()))
'''


@pytest.fixture
def run(tmp_path):
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "search.py").write_text(SEARCH)
    env = {key: value for key, value in os.environ.items()
           if key != "RANK"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "search.py"]
    return lambda *argv: subprocess.run([*command, *argv], cwd=tmp_path, env=env,
                                        capture_output=True, text=True)


def test_process_help_shows_docstring_defaults_and_comments_own_and_inherited(run):
    done = run("--n_layer=3", "--help")
    assert done.returncode == 0 and done.stderr == ""
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert lines[0] == "Searches nothing."
    assert lines[-6:] == ["seed = 1", "n_layer = [4, 6] # depths to choose from",
                          "out_dir = '#out' # where the files go",
                          "n_embd = [192, 384] # widths", "batch_size = 6 # sequences a step",
                          "tau_max = 10.0"]
    assert run("-h").stdout == done.stdout


def test_process_override_reaches_main(run, tmp_path):
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "tiny.py").write_text("n_layer = 2\ntau_max = n_layer + 1\n")
    done = run("config/tiny.py", "--out_dir=./a=b")
    assert done.returncode == 0 and done.stderr == ""
    *changes, last = done.stdout.splitlines()
    assert json.loads(last) == {"seed": 1, "n_layer": 2, "out_dir": "./a=b", "n_embd": [192, 384],
                                "batch_size": 6,
                                "tau_max": 3.0}
    assert len(changes) == 3


@pytest.mark.parametrize("arg", ["--n_layers=3", "--tau_max=hot", "config/none.py", "--__name__=x",
                                 "--seed", "broken.py"])
def test_process_mistake_ends_in_one_line_on_stderr(run, tmp_path, arg):
    (tmp_path / "broken.py").write_text("n_layer = 1 / 0\n")
    done = run(arg)
    assert done.returncode == 1 and done.stdout == ""
    assert ("Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1
            and arg in done.stderr)


@pytest.mark.parametrize("text", ["skip", "'skip'", "['skip']"])
def test_one_word_is_a_list_of_one(text):
    namespace = script()
    configure(namespace, [f"--primitives={text}"])
    assert namespace["primitives"] == ["skip"]


@pytest.mark.parametrize("text, value", [("True", True), ("[False, True]", [False, True])])
def test_a_switch_may_be_a_list_of_both(text, value):
    namespace = script() | {"qk_norm": [False]}
    configure(namespace, [f"--qk_norm={text}"])
    assert namespace["qk_norm"] == value
    with pytest.raises(SystemExit, match="True, False or a list of them"):
        configure(script() | {"qk_norm": [False]}, ["--qk_norm=[False, 'no']"])
