"""
Samples text from a trained checkpoint.

    python sample.py --out_dir=out/base --prompt="Return the " --num_samples=3
    python sample.py --out_dir=out/base --prompt=FILE:notes.txt

Takes out_dir's best.pt, the weights of the lowest validation loss.
"""
import os
from types import SimpleNamespace

import torch

from configurator import check_range
from data import load_meta, load_tokenizer
from run import DTYPES, load_checkpoint, load_model, pick_device, pick_dtype
from search_spaces import build

# -----------------------------------------------------------------------------
out_dir = 'out/train'
prompt = '\n' # or FILE:path
num_samples = 3
max_new_tokens = 300
temperature = 0.8 # 1: as learned, lower: safer, 0: always the likeliest token
top_k = 200 # only the likeliest top_k tokens are drawn; 0: all
seed = 1337
device = 'auto'
dtype = 'auto'
# -----------------------------------------------------------------------------


def load_run(out_dir, device):
    """The trained network of a run and its training config, whose arch is the architecture, or None."""
    path = os.path.join(out_dir, "best.pt")
    checkpoint = load_checkpoint(path, device)
    net = build(checkpoint["config"], checkpoint["arch"])
    return load_model(net, checkpoint, path).to(device).eval(), SimpleNamespace(**checkpoint["config"] | {"arch": checkpoint["arch"]})


def main(config):
    """Prints num_samples continuations of the prompt."""
    config = SimpleNamespace(**config)
    check_range(config, 1, "num_samples", "max_new_tokens")
    check_range(config, 0, "temperature", "top_k")
    check_range(config, -2**63, "seed", below=2**63)
    device = pick_device(config.device)
    net, trained = load_run(config.out_dir, device)
    if trained.space != "gpt":
        raise SystemExit(f"out_dir={config.out_dir} holds a network of {trained.space}, which writes no text: name that of a GPT.")
    encode, decode = load_tokenizer(trained.data_dir, trained.dataset)
    vocab_size = load_meta(trained.data_dir, trained.dataset)["vocab_size"] # the network's is padded
    text = config.prompt
    if text.startswith("FILE:"):
        try:
            with open(text[5:], encoding="utf-8") as f:
                text = f.read()
        except (OSError, UnicodeDecodeError) as e:
            raise SystemExit(f"The prompt's file {text[5:]} cannot be read: {e}.") from None
    ids = encode(text)
    if not ids:
        raise SystemExit("The prompt is empty: give at least one character, such as --prompt='The '.")
    x = torch.tensor(ids, device=device).repeat(config.num_samples, 1)
    device_type = device.split(":")[0]
    dtype = pick_dtype(config.dtype, device_type)
    generator = torch.Generator(device).manual_seed(config.seed)
    with torch.autocast(device_type, DTYPES[dtype], enabled=dtype != "float32"):
        y = net.generate(x, config.max_new_tokens, config.temperature, config.top_k or None, generator=generator, vocab_size=vocab_size)
    for sample in y.tolist():
        print(decode(sample))
        print("---------------")


if __name__ == "__main__":
    from configurator import configure
    main(configure(globals()))
