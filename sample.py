"""
Samples text from a trained checkpoint.

    python sample.py --out_dir=out/base --prompt="Return the " --num_samples=3
    python sample.py --out_dir=out/base --prompt=FILE:notes.txt

Reads best.pt in out_dir, the weights of the lowest validation loss.
"""
import os
from types import SimpleNamespace

import torch

from configurator import at_least, at_least_below, check_limits, configure
from data import Tokens, identity, load_meta, load_tokenizer
from run import DTYPES, check_same_data, load_checkpoint, load_model, pick_device, pick_dtype
from search_spaces import build, data_kind

# -----------------------------------------------------------------------------
out_dir = 'out/train'
prompt = '\n' # or FILE:path
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
    if not prompt.startswith("FILE:"):
        return prompt
    path = prompt.removeprefix("FILE:")
    try:
        with open(path, encoding="utf-8") as f:
            return f.read()
    except (OSError, UnicodeDecodeError) as e:
        raise SystemExit(f"The prompt's file {path} cannot be read: {e}.") from None


def main(config):
    """Prints num_samples continuations of the prompt."""
    config = SimpleNamespace(**config)
    check_limits(config, LIMITS)
    device = pick_device(config.device)
    net, trained = load_run(config.out_dir, device)
    if data_kind(trained.space) is not Tokens:
        raise SystemExit(f"out_dir={config.out_dir} holds a network of {trained.space}, which "
                         "writes no text: name the out_dir of a GPT.")
    encode, decode = load_tokenizer(trained.data_dir, trained.dataset)
    now = SimpleNamespace(**vars(trained) |
                          {"identity": identity(trained.data_dir, trained.dataset)})
    check_same_data(now, vars(trained), f"out_dir={config.out_dir}", ("meaning",),
                    "prepare the data as they were")
    # the network's vocab_size is padded, and the ids behind the data set's have no text
    vocab_size = load_meta(trained.data_dir, trained.dataset)["vocab_size"]
    ids = encode(read_prompt(config.prompt))
    if not ids:
        raise SystemExit("The prompt is empty: give a character or more, such as --prompt='The '.")

    x = torch.tensor(ids, device=device).repeat(config.num_samples, 1) # (num_samples, T)
    device_type = device.split(":")[0]
    dtype = pick_dtype(config.dtype, device_type)
    generator = torch.Generator(device).manual_seed(config.seed)
    with torch.autocast(device_type, DTYPES[dtype], enabled=dtype != "float32"):
        y = net.generate(x, config.max_new_tokens, config.temperature, config.top_k or None,
                         generator=generator, vocab_size=vocab_size)
    for sample in y.tolist():
        print(decode(sample))
        print("---------------")


if __name__ == "__main__":
    main(configure(globals()))
