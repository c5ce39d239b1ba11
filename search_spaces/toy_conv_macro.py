"""
The convolutional toy space of TangleNAS (Sukthanker et al. 2023): channels and kernels of 4
convolutions, 6,561 architectures.

    conv 1, conv 2, pool, conv 3, dropout, pool, conv 4     a ReLU after each convolution; no norms
    a wider convolution without ReLU, dropout, and four linear layers

A list of channels or kernel sizes is a choice, a number is fixed. The genotype is
[[channels of conv 1 to 4], [their kernels]].
"""
import json
import re
from itertools import pairwise, product

import torch
import torch.nn as nn
from torch.nn import functional as F

from configurator import ConfigError, check_range
from search_spaces.convs import (
    Conv2d, Entangled, ImageNetwork, check_entanglement, settings, with_loss,
)
from supernet import Choice, Linear, options_of, prefix_masks, sampled, set_choices

# -----------------------------------------------------------------------------
channels_1 = [8, 16, 32] # of the first convolution
channels_2 = [16, 32, 64]
channels_3 = [32, 64, 128]
channels_4 = [64, 128, 256]
kernel_size = [3, 5, 7] # of each of the four
last_channels = 256 # of the convolution behind them
last_kernel_size = 7
last_padding = 2 # for images of 32 x 32; those of 8 x 8 need last_kernel_size=3, last_padding=1
fc = 256 # of the first linear layer; halved twice
he_init = False # weights at the scale that ReLUs keep (He et al. 2015), or small networks may die
dropout = 0.5 # of whole channels, after convolution 3 and the last one
entanglement = 'weights' # of channels and kernels: 'weights', 'outputs' or 'none', see Entangled
# -----------------------------------------------------------------------------

DATA = "images" # the kind of data it takes
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
            raise ConfigError(f"kernel_size={c.kernel_size} must be odd numbers: the output has "
                              "the size of the input.")
        choices = {name: Choice(n, repeat=4 if name == "kernel_size" else None)
                   for name, n in options.items()}
        arch = set_choices(self, choices, arch)
        kernels = [options["kernel_size"]] * 4
        if arch is not None:
            options = {name: (arch[name],) for name in CHANNELS}
            kernels = [(k,) for k in arch["kernel_size"]]
        self.n = [options[name] for name in CHANNELS]
        for name, n in zip(CHANNELS, self.n, strict=True): # (options, channels)
            self.register_buffer(f"mask_of_{name}", prefix_masks(n, n[-1]), persistent=False)
        side = c.img_size // 4 + 2 * c.last_padding - c.last_kernel_size + 1
        if c.img_size < 4:
            raise ConfigError(f"img_size={c.img_size} leaves nothing to classify in "
                              "toy_conv_macro: prepare images of at least 4 pixels a side.")
        if side < 1:
            raise ConfigError(f"img_size={c.img_size} is too small for last_kernel_size="
                              f"{c.last_kernel_size} with last_padding={c.last_padding}: a quarter "
                              "of it and twice the padding must hold the kernel, such as 3 with 1.")
        self.side = side

        def conv(i, o, kernels, padding=None):
            def make(*args):
                return Conv2d(*args, bias=True, padding=padding)
            return Entangled(make, product(i, o, kernels), c.entanglement)
        ins = [(c.in_channels,), *self.n[:-1]]
        self.convs = nn.ModuleList(map(conv, ins, self.n, kernels))
        self.last = conv(self.n[-1], (c.last_channels,), (c.last_kernel_size,), c.last_padding)
        sizes = [c.last_channels * side * side, c.fc, c.fc // 2, c.fc // 4]
        self.fc = nn.ModuleList([Linear(i, o) for i, o in pairwise(sizes)])
        self.classifier = Linear(sizes[-1], c.num_classes)
        self.dropout = nn.Dropout2d(c.dropout)
        for module in self.modules() if c.he_init else ():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def forward(self, x, targets=None, arch=None):
        """See ImageNetwork."""
        now, i = sampled(self, arch), None
        layers = zip(CHANNELS, self.convs, self.n, now["kernel_size"], strict=True)
        for n, (name, conv, sizes, kernel) in enumerate(layers, 1):
            o = now[name].size(sizes, getattr(self, f"mask_of_{name}"))
            x, i = F.relu(conv(x, i, o, kernel)), o
            if n == 3:
                x = self.dropout(x)
            if n in (2, 3):
                x = F.max_pool2d(x, 2)
        x = self.dropout(self.last(x, i)).flatten(1) # (B, last_channels * side * side)
        for fc in self.fc:
            x = F.relu(fc(x))
        return with_loss(self.classifier(x), targets)

    def expected_cost(self, arch):
        c, params, flops, i = self.config, 0, 0, self.config.in_channels
        areas = [k * k for k in self.choices["kernel_size"].options]

        def mean(p, values):
            return p.double().cpu() @ torch.tensor(values).double()
        layers = zip(CHANNELS, self.n, arch["kernel_size"], (1, 1, 2, 4), strict=True)
        for name, n, k, side in layers:
            o = mean(arch[name], n)
            weights = i * o * mean(k, areas) # independent choices: a product of means
            params, flops = params + weights + o, flops + 2 * (c.img_size // side) ** 2 * weights
            i = o
        weights = i * c.last_channels * c.last_kernel_size ** 2
        head = [*self.fc, self.classifier]
        params = params + weights + c.last_channels
        params = params + sum(p.numel() for fc in head for p in fc.parameters())
        flops = flops + 2 * self.side ** 2 * weights + 2 * sum(fc.weight.numel() for fc in head)
        return {"params": params, "flops": flops}


def columns(arch):
    """The columns of an architecture in a table of all."""
    n = {f"c{i}": arch[name] for i, name in enumerate(CHANNELS, 1)}
    return n | {f"k{i}": k for i, k in enumerate(arch["kernel_size"], 1)}


def genotype(arch):
    """The published text of an architecture."""
    return json.dumps([[arch[name] for name in CHANNELS], list(arch["kernel_size"])])


def arch_of(text):
    """The architecture of a genotype. Raises ConfigError if the text is none; whether its numbers
    are options is for build() to check."""
    four = r"\[\d+(, ?\d+){3}\]"
    if not re.fullmatch(rf"\[{four}, ?{four}\]", text):
        raise ConfigError(f"'{text}' is not a genotype of toy_conv_macro: write [[32, 64, 128, "
                          "128], [3, 7, 5, 7]], channels and kernels of 4 convolutions.")
    n, kernels = json.loads(text)
    return dict(zip(CHANNELS, n, strict=True)) | {"kernel_size": kernels}


def build(config, arch=None):
    """A network from a dict of the keys above, with img_size, in_channels and num_classes."""
    known = settings(config, globals(), img_size=32, in_channels=3, num_classes=10)
    return ConvMacro(known, arch)
