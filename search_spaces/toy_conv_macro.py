"""
The convolutional toy space of TangleNAS (Sukthanker et al. 2023): channels and kernels of 4 convolutions, 6,561 architectures.

    conv 1, conv 2, pool, conv 3, dropout, pool, conv 4     each with a ReLU behind it; no norms
    a wider convolution without ReLU, dropout, and four linear layers

A list of channels or kernel sizes is a choice, a number is fixed. The genotype is [[channels of conv 1 to 4], [their kernels]].
"""
import json
import re
from itertools import pairwise, product
from types import SimpleNamespace

import torch
import torch.nn as nn
from torch.nn import functional as F

from configurator import check_range, defaults
from search_spaces.convs import Conv2d, Entangled, ImageNetwork, check_entanglement
from supernet import Choice, Linear, check_arch, options_of, prefix_masks, size_of

# -----------------------------------------------------------------------------
channels_1 = [8, 16, 32] # of the first convolution
channels_2 = [16, 32, 64]
channels_3 = [32, 64, 128]
channels_4 = [64, 128, 256]
kernel_size = [3, 5, 7] # of each of the four
last_channels = 256 # of the convolution behind them
last_kernel_size = 7
last_padding = 2 # with its 7 x 7: 32 x 32 pixels arrive as 8 x 8 and leave as 6 x 6; images of 8 x 8 need 3 and 1
fc = 256 # of the first linear layer; halved twice
he_init = False # weights start at the scale that ReLUs keep (He et al. 2015); PyTorch's usual one lets many small networks die
dropout = 0.5 # of whole channels, behind convolution 3 and the last one
entanglement = 'weights' # mixed weights; 'outputs': every combination of in, out and kernel runs; 'none': each has its own weights
# -----------------------------------------------------------------------------

CHANNELS = ("channels_1", "channels_2", "channels_3", "channels_4")


class ConvMacro(ImageNetwork):

    def __init__(self, c, arch=None):
        super().__init__()
        self.config = c
        check_range(c, 1, "last_channels", "last_kernel_size")
        check_range(c, 0, "last_padding")
        check_range(c, 0, "dropout", below=1)
        check_range(c, 4, "fc") # halved twice
        check_entanglement(c.entanglement)
        options = {name: options_of(getattr(c, name), name) for name in (*CHANNELS, "kernel_size")}
        if not all(k % 2 for k in options["kernel_size"]):
            raise SystemExit(f"kernel_size={c.kernel_size} must be odd numbers: the output has the size of the input.")
        self.choices = {name: Choice(n, repeat=4 if name == "kernel_size" else None) for name, n in options.items()}
        kernels = [options["kernel_size"]] * 4
        if arch is not None: # nothing is left to choose
            arch = check_arch(self.choices, arch)
            options, kernels, self.choices = {name: (arch[name],) for name in CHANNELS}, [(k,) for k in arch["kernel_size"]], {}
        self.n = [options[name] for name in CHANNELS]
        for name, n in zip(CHANNELS, self.n, strict=True):
            self.register_buffer(f"mask_of_{name}", prefix_masks(n, n[-1]), persistent=False) # (options, channels)
        side = c.img_size // 4 + 2 * c.last_padding - c.last_kernel_size + 1
        if c.img_size < 4 or side < 1:
            raise SystemExit(f"img_size={c.img_size} is too small for last_kernel_size={c.last_kernel_size} with last_padding="
                             f"{c.last_padding}: a quarter of it and twice the padding must hold the kernel, such as 3 with 1.")
        self.side = side

        def conv(i, o, kernels, padding=None):
            return Entangled(lambda *args: Conv2d(*args, bias=True, padding=padding), product(i, o, kernels), c.entanglement)
        self.convs = nn.ModuleList([conv(i, o, k) for i, o, k in zip([(c.in_channels,), *self.n], self.n, kernels, strict=False)])
        self.last = conv(self.n[-1], (c.last_channels,), (c.last_kernel_size,), c.last_padding)
        sizes = [c.last_channels * side * side, c.fc, c.fc // 2, c.fc // 4]
        self.fc = nn.ModuleList([Linear(i, o) for i, o in pairwise(sizes)])
        self.classifier = Linear(sizes[-1], c.num_classes)
        self.dropout = nn.Dropout2d(c.dropout)
        for module in self.modules() if c.he_init else ():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def sizes(self, arch):
        """The Sizes of the four convolutions' channels, and their kernels."""
        if arch is None:
            assert all(len(c.options) == 1 for c in self.choices.values()), "a supernet needs weights or an architecture as third argument"
            return [None] * 4, [None] * 4
        shares = [getattr(self, f"mask_of_{name}") for name in CHANNELS]
        return [size_of(arch[name], n, s) for name, n, s in zip(CHANNELS, self.n, shares, strict=True)], arch["kernel_size"]

    def forward(self, x, targets=None, arch=None):
        """x: (B, in_channels, H, W), targets: (B,) classes or None -> logits (B, num_classes), loss or None. arch: None for a
        network without choices, else an architecture, or weights for a mixture."""
        i, (sizes, kernels) = None, self.sizes(arch)
        for n, (conv, o, k) in enumerate(zip(self.convs, sizes, kernels, strict=True), 1):
            x, i = F.relu(conv(x, i, o, k)), o
            if n == 3:
                x = self.dropout(x)
            if n in (2, 3):
                x = F.max_pool2d(x, 2)
        x = self.dropout(self.last(x, i)).flatten(1) # (B, last_channels * side * side)
        for fc in self.fc:
            x = F.relu(fc(x))
        logits = self.classifier(x)
        return logits, None if targets is None else F.cross_entropy(logits, targets)

    def expected_cost(self, arch):
        c, params, flops = self.config, 0, 0

        def mean(p, values):
            return p.double().cpu() @ torch.tensor(values).double()
        i = c.in_channels
        for name, n, k, side in zip(CHANNELS, self.n, arch["kernel_size"], (1, 1, 2, 4), strict=True):
            o = mean(arch[name], n)
            weights = i * o * mean(k, [k * k for k in self.choices["kernel_size"].options]) # independent choices: a product of means
            params, flops, i = params + weights + o, flops + 2 * (c.img_size // side) ** 2 * weights, o
        weights = i * c.last_channels * c.last_kernel_size ** 2
        head = [*self.fc, self.classifier]
        params = params + weights + c.last_channels + sum(p.numel() for fc in head for p in fc.parameters())
        return {"params": params, "flops": flops + 2 * self.side ** 2 * weights + 2 * sum(fc.weight.numel() for fc in head)}


def columns(arch):
    """The columns of an architecture in a table of all."""
    return {f"c{i}": arch[name] for i, name in enumerate(CHANNELS, 1)} | {f"k{i}": k for i, k in enumerate(arch["kernel_size"], 1)}


def genotype(arch):
    """The published text of an architecture."""
    return json.dumps([[arch[name] for name in CHANNELS], list(arch["kernel_size"])])


def arch_of(text):
    """The architecture of a genotype, whose numbers build() compares with its options; SystemExit if it is none."""
    four = r"\[\d+(, ?\d+){3}\]"
    if not re.fullmatch(rf"\[{four}, ?{four}\]", text):
        raise SystemExit(f"'{text}' is no genotype of toy_conv_macro: write [[32, 64, 128, 128], [3, 7, 5, 7]], channels and kernels of 4 "
                         "convolutions.")
    n, kernels = json.loads(text)
    return dict(zip(CHANNELS, n, strict=True)) | {"kernel_size": kernels}


def build(config, arch=None):
    """A network from a dict of the keys above, with img_size, in_channels and num_classes; other keys are left alone."""
    known = defaults(globals()) | {"img_size": 32, "in_channels": 3, "num_classes": 10}
    return ConvMacro(SimpleNamespace(**known | {name: value for name, value in config.items() if name in known}), arch)


DATA = "images"
