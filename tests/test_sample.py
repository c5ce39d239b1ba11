"""Samples: where they end, what they show, and what they need."""
import os
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, script, stops, succeeds

from prepare import END, prepare

TINY_GPT = TINY | dict(n_layer=1, n_head=1, n_embd=8)
DOCS = [f"document {i} of 漢字: é is {i * i}" for i in range(60)]


def trained(folder, text, **given):
    """A network that has hardly learnt, on a text of its own."""
    (folder / "a.txt").write_text(text)
    prepare("text", str(folder / "a.txt"), data_dir=folder, **given)
    keys = TINY_GPT | dict(max_iters=2, data_dir=folder, dataset="text", out_dir=folder / "out")
    script("train.py", *(f"--{key}={value}" for key, value in keys.items()))
    return folder / "out"


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    text = f"\n{END}\n".join(DOCS)
    return trained(tmp_path_factory.mktemp("pieces"), text, tokenizer="sentencepiece",
                   vocab_size=300)


def samples(out, *args, capsys):
    capsys.readouterr()
    script("sample.py", f"--out_dir={out}", "--device=cpu", *args)
    out = capsys.readouterr().out.rpartition("(command line)\n")[2] # behind the changed keys
    return out.split("\n---------------\n")[:-1]


def test_a_sample_ends_with_its_document_or_at_a_text(pieces, capsys):
    """The same tokens, shown to different ends."""
    args = ("--max_new_tokens=900", "--num_samples=4", "--temperature=1.5", "--top_k=0")
    whole = samples(pieces, *args, "--prompt=dec", "--stop=never", capsys=capsys)
    short = samples(pieces, *args, "--prompt=dec", capsys=capsys)
    mark = f"\n{END}\n"
    assert any(mark in text for text in whole), "some end"
    assert all(text.startswith("dec") for text in whole)
    assert short == [text.split(mark)[0] for text in whole]
    cut = samples(pieces, *args, "--prompt=dec", "--stop=e", capsys=capsys)
    assert cut == ["dec" + text.split(mark)[0][3:].split("e")[0] for text in whole]


def test_without_a_prompt_a_document_begins(pieces, capsys):
    text = samples(pieces, "--num_samples=1", capsys=capsys)
    assert len(text) == 1 and END not in text[0]


def test_a_network_needs_the_tokenizer_alone(pieces, tmp_path, capsys):
    folder = pieces.parent / "text"
    moved = [folder / "train.bin", folder / "val.bin"]
    for file in moved:
        file.rename(tmp_path / file.name)
    try:
        assert len(samples(pieces, "--num_samples=2", capsys=capsys)) == 2
    finally:
        for file in moved:
            (tmp_path / file.name).rename(file)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-16"])
def test_any_console(pieces, encoding):
    done = subprocess.run([sys.executable, "sample.py", f"--out_dir={pieces}", "--device=cpu",
                           "--prompt=漢字 é", "--num_samples=1", "--max_new_tokens=5"], cwd=ROOT,
                          capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding})
    assert done.returncode == 0, done.stderr
    shown = "漢字 é".encode(encoding, "backslashreplace").decode(encoding)
    assert shown in done.stdout.decode(encoding)


def test_the_next_commands_of_a_text_without_line_breaks(tmp_path, capfd):
    """Its vocabulary lacks the line break, with which most texts begin."""
    out = trained(tmp_path, "one line of text, again and " * 40)
    command = capfd.readouterr().out.split("next: python ")[-1].strip()
    shown = succeeds(*shlex.split(command), "--max_new_tokens=3", "--device=cpu")
    assert shown.count("---------------") == 3
    assert "character" in stops("sample.py", f"--out_dir={out}", "--prompt=Ω")


def test_a_prompt_that_is_no_text(pieces, monkeypatch):
    monkeypatch.setattr(sys, "argv", [])
    assert "is not UTF-8" in stops("sample.py", f"--out_dir={pieces}", "--prompt=a\udce9")
