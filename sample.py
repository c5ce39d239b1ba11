"""
Samples text from a trained checkpoint.

    python sample.py --out_dir=out/base --prompt="Return the " --num_samples=3
    python sample.py --out_dir=out/base --prompt=FILE:notes.txt
    python sample.py --out_dir=out/base --stop="\\n\\n"         # each sample ends at a blank line

Reads best.pt in out_dir, the weights of the lowest validation loss, and the tokenizer of the data
set. A sample ends where the network ends its document; a vocabulary of characters has no token for
that, and --stop names a text instead. With --stop=never samples go on, and <|endoftext|> shows
where a document ends.
"""
import os
from itertools import pairwise
from types import SimpleNamespace

import torch

from configurator import at_least, at_least_below, check_limits, configure
from data import Tokens, codec_of
from run import DTYPES, load_checkpoint, load_model, pick_device, pick_dtype
from search_spaces import build, data_kind

# -----------------------------------------------------------------------------
out_dir = 'out/train'
prompt = '' # how the text begins, or FILE:path; '': as a document does
stop = '' # text at which a sample ends; '': at the end of its document; 'never'
num_samples = 3
max_new_tokens = 300
temperature = 0.8 # 1: as learned, below 1: safer, 0: always the likeliest token
top_k = 200 # only the top_k likeliest tokens are drawn; 0: all
seed = 1337
device = 'auto'
dtype = 'auto'
# -----------------------------------------------------------------------------

LIMITS = {"num_samples": at_least(1), "max_new_tokens": at_least(1), "temperature": at_least(0),
          "top_k": at_least(0), "seed": at_least_below(-2**63, 2**63)}


def load_run(out_dir, device):
    """The trained network of a run, and the training's config, in which arch may be None."""
    path = os.path.join(out_dir, "best.pt")
    checkpoint = load_checkpoint(path, device)
    config, arch = checkpoint["config"], checkpoint["arch"]
    net = load_model(build(config, arch), checkpoint, path)
    return net.to(device).eval(), SimpleNamespace(**config | {"arch": arch})


def read_prompt(prompt):
    """The prompt, or the text of the file that it names as FILE:path."""
    path = prompt.removeprefix("FILE:")
    try:
        if path != prompt:
            with open(path, encoding="utf-8") as f:
                return f.read()
        prompt.encode()
    except UnicodeError as e:
        raise SystemExit(f"--prompt={prompt!a} is not UTF-8 text ({e}): correct it.") from None
    except OSError as e:
        raise SystemExit(f"The prompt's file {path} cannot be read: {e}.") from None
    return prompt


def main(config):
    """Prints num_samples continuations of the prompt."""
    config = SimpleNamespace(**config)
    check_limits(config, LIMITS)
    device = pick_device(config.device)
    net, trained = load_run(config.out_dir, device)
    if data_kind(trained.space) is not Tokens:
        raise SystemExit(f"out_dir={config.out_dir} holds a network of {trained.space}, which "
                         "writes no text: name the out_dir of a GPT.")
    tokens = codec_of(trained)
    prompt, stop = read_prompt(config.prompt), config.stop.replace("\\n", "\n")
    shown = [int(i) for i in tokens.encode([prompt])[0]]
    if not shown and not tokens.joint:
        shown = [0] # characters without a line break: any of them begins
    ids = shown or tokens.joint[-1:] # without a prompt, what stands before a document

    def end_of(new):
        """The text of a sample's new tokens if it has come to its end, else None."""
        if stop == "never":
            return None
        if tokens.eot in new:
            return show(tokens, shown + new[:new.index(tokens.eot)])
        text = show(tokens, shown + new) if stop else ""
        end = text.find(stop, len(show(tokens, shown))) if stop else -1
        return text[:end] if end >= 0 else None

    def all_have_ended(idx):
        return all(end_of(sample[len(ids):]) is not None for sample in idx.tolist())

    x = torch.tensor(ids, device=device).repeat(config.num_samples, 1) # (num_samples, T)
    device_type = device.split(":")[0]
    dtype = pick_dtype(config.dtype, device_type)
    generator = torch.Generator(device).manual_seed(config.seed)
    # the network's vocab_size is padded, and the ids behind the data set's have no text
    with torch.autocast(device_type, DTYPES[dtype], enabled=dtype != "float32"):
        y = net.generate(x, config.max_new_tokens, config.temperature, config.top_k or None,
                         generator=generator, vocab_size=tokens.vocab_size, until=all_have_ended)
    for sample in y.tolist():
        new = sample[len(ids):]
        text = end_of(new)
        print(show(tokens, shown + new) if text is None else text)
        print("---------------")


def show(tokens, ids):
    """The text of ids, with a line <|endoftext|> where a document ends."""
    ends = [i for i, token in enumerate(ids) if token == tokens.eot]
    parts = [ids[before + 1:end] for before, end in pairwise([-1, *ends, len(ids)])]
    return "\n<|endoftext|>\n".join(tokens.decode(part) for part in parts)


if __name__ == "__main__":
    main(configure(globals()))
