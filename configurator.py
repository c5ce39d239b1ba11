"""
Overrides a script's commented globals from config files and the command line.

    n_layer = 6       # number of blocks
    dropout = 0.0     # share of activations dropped

    if __name__ == "__main__":
        main(configure(globals()))

    python script.py config/small.py --n_layer=4 --dropout=0.1     # left to right, the later one wins
    python script.py --help                                        # every key with its default

A config file is Python CODE that runs with your rights: run only files that you trust. It sees the values so far
(`min_lr = learning_rate / 10`). Its imports, functions and _private names are its own business, every other name must be a key.
`include('small.py')` in a config file runs another one at this line, found from its own folder: what follows are the differences.
Keys are the lower-case globals that hold a bool, int, float, str, list or tuple; the default's type is the key's type.
"""

import ast
import copy
import difflib
import math
import os
import re
import sys
import tokenize
import traceback
from pathlib import Path
from types import ModuleType


class ConfigError(ValueError):
    """A value that a key cannot have, in one sentence. run.main() ends the script with it."""


def configure(namespace, argv=None, list_hint=""):
    """Apply argv (default: the command line) to namespace, usually globals(), and return its defaults() after that.

    argv: strings, each `config/name.py` or `--key=value`. A str key takes the raw text, every other key a Python literal.
    list_hint: ends the message when a list of numbers is given to a key that takes one number.
    A mistake raises SystemExit with one sentence and leaves namespace as it was. Each change is one printed line on rank 0.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(usage(namespace))
        raise SystemExit(0)
    first = keys_of(namespace)
    values = dict(first)
    for arg in argv:
        is_file = arg.endswith(".py") and not arg.startswith("-")
        for key, value in (run_file(arg, values) if is_file else parse(arg, first)).items():
            where = f"{arg}: {key} = {value!r}" if is_file else arg
            if key not in first:
                helper = ", and the name of a helper starts with _" if is_file else ""
                stop(f"{where}: there is no key {key!r}{nearest(key, first)}, --help lists them all{helper}")
            default = first[key]
            fits, wanted = check(value, default)
            if not fits:
                hint = f"; {list_hint}" if list_hint and is_number(default) and is_list(value, is_number) else ""
                stop(f"{where}: {key} takes {wanted}, such as {default!r}{hint}")
            if type(value) in (list, tuple):
                value = type(default)(value)
            elif type(default) is float:
                value = float(value)
            if repr(value) != repr(values[key]) and os.environ.get("RANK", "0") == "0":
                print(f"{key}: {values[key]!r} -> {value!r} ({arg if is_file else 'command line'})")
            values[key] = value
    namespace.update(values)
    return defaults(namespace)


def defaults(namespace):
    """{key: value} of a script's globals() or vars(module), ready for JSON: copies, and tuples as lists. Reads no argv."""
    return {key: list(value) if type(value) in (list, tuple) else value for key, value in keys_of(namespace).items()}


def keys_of(namespace):
    types = (bool, int, float, str, list, tuple)
    keys = {name: value for name, value in namespace.items() if name[0].islower() and type(value) in types}
    for key, value in keys.items():
        fits, wanted = check(value, value)
        assert fits, f"the default {key} = {value!r} must be {wanted}"
    return keys


def check(value, default):
    """Whether a key with this default may hold value, and what it takes, in words."""
    if is_list(default, is_number):
        return is_number(value) or is_list(value, is_number), "a finite number or a non-empty list of them"
    if type(default) in (list, tuple):
        return is_list(value, is_str), "a non-empty list of quoted strings"
    if type(default) is float:
        return is_number(value), "a finite number"
    if type(default) is int:
        return is_number(value) and type(value) is int, "an int (1000, not 1e3)"
    return type(value) is type(default), "True or False" if type(default) is bool else "a quoted string"


def check_range(config, low, *keys, below=math.inf):
    """SystemExit unless these keys of config (a namespace), a number or a list of them each, are `low` or more, and below `below`."""
    for key in keys:
        if not all(low <= value < below for value in as_list(getattr(config, key))):
            allowed = f"{low} or more" if below == math.inf else f"at least {low} and below {below}"
            stop(f"{key}={getattr(config, key)} must be {allowed}.")


def check_whole(config, *keys):
    """SystemExit unless these keys of config (a namespace), a number or a list of them each, are whole numbers."""
    for key in keys:
        if not all(type(value) is int for value in as_list(getattr(config, key))):
            stop(f"{key}={getattr(config, key)} must be whole numbers, such as 2 and not 2.0.")


def as_list(value):
    """A number, which stands for a list of one, or a list, as a list."""
    return value if isinstance(value, list) else [value]


def given(key, argv=None):
    """The string that argv (default: the command line) gives to a key, by --key=value or by an assignment of a plain value, such as
    'rope', 0.5, True or [2, 4], in a config file; else None. Runs nothing."""
    found = None
    for arg in sys.argv[1:] if argv is None else argv:
        if arg.startswith(f"--{key}="):
            found = arg.partition("=")[2]
        elif arg.endswith(".py"):
            plain = rf"^{key}\s*=\s*(?:(['\"])(.*?)\1|(True|False|[-\d.\[][^#\n]*))"
            lines = re.findall(plain, text_of(Path(arg)), re.M)
            found = (lines[-1][1] or lines[-1][2].strip()) if lines else found
    return found


def text_of(file, within=()):
    """The text of a config file, with that of the files it includes at their lines. run_file() reports a missing file or a circle."""
    if not file.is_file() or file.resolve() in within:
        return ""
    within = (*within, file.resolve())
    return re.sub(r"^include\((['\"])(.+?)\1\).*", lambda line: text_of(file.parent / line[2], within),
                  file.read_text(errors="replace"), flags=re.M)


def is_number(value):
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # no bool; nan and infinity fail the comparison


def is_str(value):
    return type(value) is str


def is_list(value, is_element):
    return type(value) in (list, tuple) and len(value) > 0 and all(map(is_element, value))


def parse(arg, keys):
    """{key: value} of one `--key=value`."""
    key, equals, text = arg.lstrip("-").partition("=")
    if not equals or not arg.startswith("--"):
        stop(f"{arg!r} is neither an override nor a config file: write --{key or 'key'}={text or 'value'} or config/name.py")
    if type(keys.get(key)) is str:
        return {key: text}
    try:
        return {key: ast.literal_eval(text)}
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return {key: text}  # a str fits no key that comes here: check() will say what this one takes


def run_file(file, values):
    """{name: value} that a config file leaves behind: every key, and any other name that is neither private nor code."""
    try:
        source = Path(file).read_bytes()
    except OSError as error:
        found = nearest(file, [path.as_posix() for path in Path("config").glob("*.py")])
        stop(f"{file}: {error.strerror}{found}; write the path of a config file, such as config/name.py")

    def include(name):
        after.update(run_file((Path(file).parent / name).as_posix(), {key: after[key] for key in values}))

    after = {"__file__": file, "include": include, **copy.deepcopy(values)}  # deep: a file may append to a list
    try:
        tree = ast.parse(source, file)
        exec(compile(tree, file, "exec"), after)
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        line = lines[-1] if lines else getattr(error, "lineno", None) or 1  # its own syntax error has no frame in the file
        stop(f"{file}, line {line}: {traceback.format_exception_only(error)[-1]}")
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    imported = {alias.asname or alias.name for node in imports for alias in node.names}  # `from math import pi`: a float, no key
    given = {}
    for name, value in after.items():
        if name in values or not (name[0] == "_" or name in imported or callable(value) or isinstance(value, ModuleType)):
            given[name] = value
    return given


def nearest(name, names):
    found = difflib.get_close_matches(name, names)
    return f", the nearest is {' or '.join(found)}" if found else ""


def stop(message):
    raise SystemExit(" ".join(message.split()))  # one line, whatever the value looks like


def usage(namespace):
    comment = comments(namespace) | comments(vars(namespace["__space__"]) if "__space__" in namespace else {})
    lines = [(namespace.get("__doc__") or "").strip(), "", "keys, set by --key=value or as here in a config/name.py:"]
    for key, value in keys_of(namespace).items():
        lines.append(f"{f'{key} = {value!r}':<40}  {comment.get(key, '')}".rstrip())
    return "\n".join(lines)


def comments(namespace):
    """{name: trailing comment} of a module's top-level lines; a name that it star-imports keeps its comment from there."""
    file = namespace.get("__file__", "")
    if not file.endswith(".py"):
        return {}
    inherited, own, name = {}, {}, None
    for node in ast.parse(Path(file).read_bytes()).body:
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            inherited |= comments(vars(sys.modules[node.module]))
    with tokenize.open(file) as f:
        for token in tokenize.generate_tokens(f.readline):
            if token.type == tokenize.NAME and token.start[1] == 0:
                name = token.string
            elif token.type == tokenize.NEWLINE:
                name = None  # a comment on a line of its own belongs to no name
            elif token.type == tokenize.COMMENT and name:
                own.setdefault(name, token.string)
    return inherited | own
