"""
Overrides a script's commented globals from config files and the command line.

    n_layer = 6       # number of blocks
    dropout = 0.0     # share of activations dropped

    if __name__ == "__main__":
        main(configure(globals()))

    python script.py config/small.py --n_layer=4 --dropout=0.1   # left to right, later ones win
    python script.py --help                                      # every key with its default

Keys are the lower-case globals that hold a bool, int, float, str, list or tuple. The type of the
default is the key's type.

A config file is Python CODE that runs with your rights: run only files that you trust. It sees the
values so far (`min_lr = learning_rate / 10`). Its imports, functions and _private names are its
own; every other name must be a key. `include('shared/digits.py')` runs another config file at that
line, with the path relative to the file that includes it.

What a key may be is declared beside the keys: LIMITS = {"batch_size": at_least(1)}, and RULES, a
list of (broken, sentence), for keys that must go together. check_limits() and check_rules() make
the one sentence of a mistake.
"""

import ast
import copy
import difflib
import inspect
import io
import math
import os
import re
import sys
import tokenize
import textwrap
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple


# keys of files and folders, in which ~ is the user's own folder
PATHS = {"path", "val_path", "data_dir", "out_dir", "arch", "arch_traj", "table", "against",
         "cache_dir", "benchmark", "latency_table", "init_from", "inherit", "teacher"}


def configure(namespace, argv=None, list_hint=""):
    """Applies argv to namespace, usually globals(); returns its defaults() after that.

    argv: strings, each `config/name.py` or `--key=value`; None: the command line. A str key takes
    the raw text, every other key a Python literal. list_hint: ends the message when a list of
    numbers is given to a key that takes one number. A mistake raises SystemExit with one sentence,
    and leaves namespace as it was. Rank 0 prints one line a change.

    namespace may have "__run__", the (out_dir, {key: value}) of a run that is resumed: its keys
    come before argv.
    """
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"): # a console that lacks a character shows its number
            stream.reconfigure(errors="backslashreplace")
    out_dir, own = namespace.get("__run__", ("", {}))
    run_json = f"{out_dir}/run.json"
    if "--help" in argv or "-h" in argv:
        print(usage(namespace))
        raise SystemExit(0)
    first = keys_of(namespace)
    values = dict(first)
    is_master = os.environ.get("RANK", "0") == "0"
    if (gone := sorted(own.keys() - first)) and is_master:
        print(f"{', '.join(gone)}: in {run_json}, but no longer a key")
    for arg in [*[run_json] * bool(own), *argv]:
        is_file = arg == run_json or (arg.endswith(".py") and not arg.startswith("-"))
        if arg == run_json: # what the command gives itself may have another type by now
            changes = {key: own[key] for key in first if key in own and not given(key, argv)}
        else:
            changes = run_file(arg, values) if is_file else parse(arg, first)
        for key, value in changes.items():
            where = f"{arg}: {key} = {value!r}" if is_file else arg
            value = checked(key, value, first, where, is_file, list_hint)
            if repr(value) != repr(values[key]) and is_master:
                source = arg if is_file else "command line"
                print(f"{key}: {values[key]!r} -> {value!r} ({source})")
            values[key] = value
    if own and values["out_dir"] != out_dir:
        stop(f"out_dir={values['out_dir']!r} is not {out_dir!r}, whose run.json has the keys to go "
             "on with: give it as --out_dir=FOLDER")
    namespace.update(values)
    return defaults(namespace)


def checked(key, value, first, where, is_file, list_hint):
    """value in the type of key's default; SystemExit if it does not fit or key does not exist."""
    if key not in first:
        helper = ", and the name of a helper starts with _" if is_file else ""
        stop(f"{where}: there is no key {key!r}{nearest(key, first)}, --help lists them "
             f"all{helper}")
    default = first[key]
    fits, wanted = check(value, default)
    if not fits:
        takes_one = list_hint and is_number(default) and is_list(value, is_number)
        hint = f"; {list_hint}" if takes_one else ""
        stop(f"{where}: {key} takes {wanted}, such as {default!r}{hint}")
    if type(value) in (list, tuple):
        return type(default)(value)
    if is_str(value) and not is_str(default): # one word of a list of words
        return type(default)([value])
    if key in PATHS and is_str(value): # a shell leaves ~ in --path=~/texts
        return os.path.expanduser(value)
    return float(value) if type(default) is float else value


def defaults(namespace):
    """{key: value} of a script's globals() or of vars(module), ready for JSON: copies, and tuples
    as lists. Reads no argv."""
    return {key: list(value) if type(value) in (list, tuple) else value
            for key, value in keys_of(namespace).items()}


def keys_of(namespace):
    types = (bool, int, float, str, list, tuple)
    keys = {name: value for name, value in namespace.items()
            if name[0].islower() and type(value) in types}
    for key, value in keys.items():
        fits, wanted = check(value, value)
        assert fits, f"the default {key} = {value!r} must be {wanted}"
    return keys


def check(value, default):
    """Whether a key with this default may hold value, and what it takes, in words."""
    if is_list(default, is_number):
        fits = is_number(value) or is_list(value, is_number)
        return fits, "a finite number or a non-empty list of them"
    if is_list(default, is_bool):
        return is_bool(value) or is_list(value, is_bool), "True, False or a list of them"
    if type(default) in (list, tuple):
        fits = is_str(value) or is_list(value, is_str)
        return fits, "a quoted string or a non-empty list of quoted strings"
    if type(default) is float:
        return is_number(value), "a finite number"
    if type(default) is int:
        return is_number(value) and type(value) is int, "an int (1000, not 1e3)"
    wanted = "True or False" if type(default) is bool else "a quoted string"
    return type(value) is type(default), wanted


class ConfigError(ValueError):
    """A config or an architecture that no network can have: layers raise it, a script makes it the
    one sentence that it ends with."""


class Limit(NamedTuple):
    """What a key may be: fits(value), and the same in words, behind "must be"."""
    fits: Callable
    words: str


def at_least(low):
    return Limit(lambda value: low <= value, f"{low} or more")


def above(low):
    return Limit(lambda value: value > low, f"above {low}")


def at_least_below(low, high):
    return Limit(lambda value: low <= value < high, f"at least {low} and below {high}")


def between(low, high):
    return Limit(lambda value: low <= value <= high, f"{low} to {high}")


def one_of(*words):
    return Limit(lambda value: value in words, f"one of {', '.join(map(str, words))}")


WHOLE = Limit(lambda value: type(value) is int, "whole numbers, such as 2 and not 2.0")


def beyond_limits(config, limits):
    """The sentence for the first key of config (a namespace) that is not within its Limit, or None.

    Of a list, all of it must be. Keys that config does not have count as right.
    """
    for key, limit in limits.items():
        value = getattr(config, key, None)
        if value is not None and not all(map(limit.fits, as_list(value))):
            return f"{key}={value!r} must be {limit.words}."
    return None


def check_limits(config, limits):
    """SystemExit, for a script, unless every key of config is within its Limit."""
    if sentence := beyond_limits(config, limits):
        stop(sentence)


def check_range(config, low, *keys, below=math.inf):
    """ConfigError, in a layer, unless these keys of config are `low` or more, and below `below`."""
    limit = at_least(low) if below == math.inf else at_least_below(low, below)
    if sentence := beyond_limits(config, dict.fromkeys(keys, limit)):
        raise ConfigError(sentence)


def check_whole(config, *keys):
    """ConfigError, in a layer, unless these keys of config are whole numbers."""
    if sentence := beyond_limits(config, dict.fromkeys(keys, WHOLE)):
        raise ConfigError(sentence)


def check_rules(config, rules):
    """SystemExit for the first of rules that config (a namespace) breaks.

    rules: [(broken, sentence)]: broken(config) says whether, sentence names keys in {braces}.
    """
    for broken, sentence in rules:
        if broken(config):
            stop(sentence.format_map(vars(config)))


def as_list(value):
    """A number, which stands for a list of one, or a list, as a list."""
    return value if isinstance(value, list) else [value]


def given(key, argv=None):
    """The string that argv (None: the command line) gives to a key, or None. Runs nothing.

    It is given by --key=value, or in a config file by assigning a plain value such as 'rope', 0.5,
    True or [2, 4].
    """
    found = None
    for arg in sys.argv[1:] if argv is None else argv:
        if arg.startswith(f"--{key}="):
            found = arg.partition("=")[2]
        elif arg.endswith(".py"):
            plain = rf"^{key}\s*=\s*(?:(['\"])(.*?)\1|(True|False|[-\d.\[][^#\n]*))"
            lines = re.findall(plain, text_of(Path(arg)), re.M)
            found = (lines[-1][1] or lines[-1][2].strip()) if lines else found
    return os.path.expanduser(found) if found and key in PATHS else found


def text_of(file, within=()):
    """The text of a config file, with that of the files it includes at their lines.

    A missing file or a circle is left for run_file() to report.
    """
    if not file.is_file() or file.resolve() in within:
        return ""
    within = (*within, file.resolve())
    return re.sub(r"^include\((['\"])(.+?)\1\).*",
                  lambda line: text_of(file.parent / line[2], within),
                  file.read_text(errors="replace"), flags=re.M)


def is_number(value):
    # no bool; nan and infinity fail the comparison
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def is_bool(value):
    return type(value) is bool


def is_str(value):
    return type(value) is str


def is_list(value, is_element):
    return type(value) in (list, tuple) and len(value) > 0 and all(map(is_element, value))


def parse(arg, keys):
    """{key: value} of one `--key=value`."""
    key, equals, text = arg.lstrip("-").partition("=")
    if not equals or not arg.startswith("--"):
        stop(f"{arg!r} is neither an override nor a config file: write "
             f"--{key or 'key'}={text or 'value'} or config/name.py")
    if type(keys.get(key)) is str:
        return {key: text}
    try:
        return {key: ast.literal_eval(text)}
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return {key: text} # a str fits no key that comes here: check() says what this one takes


def run_file(file, values):
    """{name: value} that a config file leaves behind.

    They are all keys, and every other name that is neither private nor code.
    """
    try:
        source = Path(file).read_bytes()
    except OSError as error:
        found = nearest(file, [path.as_posix() for path in Path("config").glob("*.py")])
        stop(f"{file}: {error.strerror}{found}; write the path of a config file, such as "
             "config/name.py")

    def include(name):
        values_so_far = {key: after[key] for key in values}
        after.update(run_file((Path(file).parent / name).as_posix(), values_so_far))

    # a deep copy: a file may append to a list
    after = {"__file__": file, "include": include, **copy.deepcopy(values)}
    try:
        tree = ast.parse(source, file)
        exec(compile(tree, file, "exec"), after)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == file]
        # a syntax error of the file itself has no frame in it
        line = lines[-1] if lines else getattr(error, "lineno", None) or 1
        stop(f"{file}, line {line}: {traceback.format_exception_only(error)[-1]}")
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    # `from math import pi` gives a float that is no key
    imported = {alias.asname or alias.name for node in imports for alias in node.names}
    given = {}
    for name, value in after.items():
        is_code = callable(value) or isinstance(value, ModuleType)
        if name in values or not (name[0] == "_" or name in imported or is_code):
            given[name] = value
    return given


def nearest(name, names):
    found = difflib.get_close_matches(name, names)
    return f", the nearest is {' or '.join(found)}" if found else ""


def stop(message):
    raise SystemExit(" ".join(message.split())) # one line, whatever the value looks like


def usage(namespace):
    """The text of --help. __sources__: the modules and classes whose keys are in the namespace."""
    comment = comments(namespace)
    for source in namespace.get("__sources__", ()):
        comment |= comments_of_class(source) if isinstance(source, type) else comments(vars(source))
    lines = [(namespace.get("__doc__") or "").strip(), "",
             "keys, set by --key=value or as here in a config/name.py:"]
    for key, value in keys_of(namespace).items():
        lines.append(f"{f'{key} = {value!r}':<40}  {comment.get(key, '')}".rstrip())
    return "\n".join(lines)


def comments(namespace):
    """{name: trailing comment} of a module's top-level lines.

    A name that the module star-imports keeps its comment from there.
    """
    file = namespace.get("__file__", "")
    if not file.endswith(".py"):
        return {}
    inherited = {}
    for node in ast.parse(Path(file).read_bytes()).body:
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            inherited |= comments(vars(sys.modules[node.module]))
    with tokenize.open(file) as f:
        return inherited | trailing_comments(f.read())


def comments_of_class(cls):
    """{name: trailing comment} of the lines in the body of a class."""
    body = inspect.getsource(cls).partition(":\n")[2]
    return trailing_comments(textwrap.dedent(body))


def trailing_comments(source):
    """{name: comment} of the lines of source that begin with a name at the left edge."""
    found, name = {}, None
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME and token.start[1] == 0:
            name = token.string
        elif token.type == tokenize.NEWLINE:
            name = None # a comment on a line of its own belongs to no name
        elif token.type == tokenize.COMMENT and name:
            found.setdefault(name, token.string)
    return found
