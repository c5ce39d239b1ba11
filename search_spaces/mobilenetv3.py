"""
Once-for-all's MobileNetV3 space (Cai et al. 2020): kernel and expansion of every block, depth of
every stage, 2.2e19 architectures.

    stem, a fixed block, five stages of 2 to 4 blocks, a wide 1 x 1 convolution, the mean over
    pixels, two linear layers
    block: 1 x 1 convolution to in * expand channels, k x k depthwise, squeeze-and-excitation where
    the stage has it, 1 x 1 convolution to out

Smaller options are entangled in the largest: the first channels of a block's middle, the first
blocks of a stage, and the centre of the next larger kernel, times a learned matrix, one a block for
all its channels. Stage s chooses depth_s, and that many entries of kernel_size_s and expand_s. The
genotype has [kernel, expand] of every block of every stage: [[[3, 6], [7, 4]], ...].
"""
import json

import torch
import torch.nn as nn
from torch.nn import functional as F

from configurator import ConfigError, as_list, check_range, check_whole
from search_spaces.convs import BatchNorm2d, Conv2d, ImageNetwork, settings, with_loss
from supernet import (
    ALL, Choice, Linear, one_hot, options_of, prefix_masks, ranking, reorder, run_blocks, sampled,
    set_choices, straight_through,
)

# -----------------------------------------------------------------------------
depth = [2, 3, 4] # blocks of each stage
kernel_size = [3, 5, 7] # of each block
expand = [3, 4, 6] # of each block: the channels in its middle over those that come in
width_mult = 1.0 # published: 1.0 and 1.2
kernel_transform = True # a smaller kernel is the larger one's centre times a learned matrix
stem_channels = 16 # also of the fixed block behind it
stem_stride = 2 # images of 32 pixels and less need 1
widths = [24, 40, 80, 112, 160] # of each stage; its length is the number of stages
strides = [2, 2, 2, 1, 2] # of each stage's first block
se = [0, 1, 0, 1, 1] # of each stage: 1 for squeeze-and-excitation (Hu et al. 2018)
hswish = [0, 0, 1, 1, 1] # of each stage: 1 for h-swish (Howard et al. 2019), 0 for ReLU
last_channels = 960 # of the wide convolution
mix_channels = 1280 # of the first linear layer
dropout = 0.1 # before the second
# -----------------------------------------------------------------------------

DATA = "images" # the kind of data it takes
NAMES, OF_STAGES = ("depth", "kernel_size", "expand"), ("strides", "se", "hswish")


def divisible(n, by=8):
    """The multiple of `by` nearest to n, or the next one up if the nearest is less than 0.9 n."""
    near = max(by, int(n + by / 2) // by * by)
    return near + by if near < 0.9 * n else near


class Depthwise(Conv2d):
    """A depthwise convolution whose kernels are a chain: each is the centre of the next larger one,
    times a matrix with `transform`."""
    def __init__(self, n, kernels, stride, transform):
        super().__init__(n, n, kernels, stride, groups=n)
        smaller = self.kernels[:-1] if transform else ()
        self.matrices = nn.ParameterDict({str(k): nn.Parameter(torch.eye(k * k)) for k in smaller})

    def shrink(self, w, k):
        """w: (C, 1, K, K), the next larger kernel -> (C, 1, k, k)."""
        cut = (w.shape[-1] - k) // 2
        w = w[..., cut:cut + k, cut:cut + k]
        return (w.flatten(1) @ self.matrices[str(k)].T).view(w.shape) if self.matrices else w

    def slice_params(self, i=None, o=None, k=ALL):
        w = super().slice_params(i, o)["weight"]
        kernel = k.option or self.kernels[-1]
        for smaller in reversed(self.kernels[self.kernels.index(kernel):-1]):
            w = self.shrink(w, smaller)
        return {"weight": w, "bias": None}

    def forward(self, x, i=None, o=None, k=ALL):
        if not k.is_mixture or not self.matrices:
            return super().forward(x, i, o, k)
        chain = [self.weight] # from the largest to the smallest
        for smaller in reversed(self.kernels[:-1]):
            chain.append(self.shrink(chain[-1], smaller))
        mixed = chain[-1] * k.weights[0]
        for p, w in zip(k.weights[1:], reversed(chain[:-1]), strict=True):
            mixed = w * p + F.pad(mixed, [(w.shape[-1] - mixed.shape[-1]) // 2] * 4)
        return self.conv(x, mixed)


class SqueezeExcite(nn.Module):
    """Every channel times a gate, which two linear layers compute from the means of all channels
    (Hu et al. 2018)."""
    def __init__(self, mid, reduced):
        super().__init__()
        self.reduce, self.expand = Linear(mid, reduced), Linear(reduced, mid)

    def forward(self, x, mid=None, reduced=None):
        """mid, reduced: Sizes. In a mixture x is weighted already: channels that no option uses are
        0."""
        h = F.relu(self.reduce(x.mean((2, 3)), mid, reduced)) # (B, reduced)
        gate = F.hardsigmoid(self.expand(h, reduced and reduced.unweighted, mid)) # (B, mid)
        return x * gate[:, :, None, None]


class Block(nn.Module):

    def __init__(self, i, o, kernels, expands, stride, se, hswish, transform):
        super().__init__()
        self.expands, self.skip = expands, stride == 1 and i == o
        self.act = F.hardswish if hswish else F.relu
        self.mid = tuple(divisible(round(i * e)) for e in expands) # channels of each option
        self.reduced = tuple(divisible(n // 4) for n in self.mid) # and of its squeeze
        n, r = self.mid[-1], self.reduced[-1]
        self.register_buffer("mask", prefix_masks(self.mid, n), persistent=False) # (expands, n)
        self.register_buffer("mask_of_reduced", prefix_masks(self.reduced, r), persistent=False)
        self.expand, self.expand_norm = None, None
        if expands[-1] != 1: # else there is nothing to expand
            self.expand, self.expand_norm = Conv2d(i, n, 1), BatchNorm2d(n)
        self.depthwise = Depthwise(n, kernels, stride, transform)
        self.depthwise_norm = BatchNorm2d(n)
        self.se = SqueezeExcite(n, r) if se else None
        self.project, self.project_norm = Conv2d(n, o, 1), BatchNorm2d(o)

    def forward(self, x, kernel=ALL, expand=ALL):
        """Their weights are multiplied once, behind the norm of the depthwise convolution: it would
        remove what came before."""
        mid = expand.size(self.mid, self.mask)
        reduced = expand.size(self.reduced, self.mask_of_reduced)
        part, y = mid and mid.unweighted, x
        if self.expand is not None:
            y = self.act(self.expand_norm(self.expand(y, None, part), part))
        total = kernel.weights.sum() if kernel.is_mixture else None
        y = self.depthwise_norm(self.depthwise(y, None, part, kernel), mid, total)
        y = self.act(straight_through(y, kernel.weight))
        y = y if self.se is None else self.se(y, part, reduced)
        y = self.project_norm(self.project(y, part))
        return x + y if self.skip else y

    @torch.no_grad()
    def sort_channels(self, trained):
        """Orders the middle channels, and those of the squeeze, by the L1 norm of the weights that
        read them, largest first. The expansions in `trained`, with the largest among them, compute
        what they did before: each keeps its channels."""
        known = [i for i, e in enumerate(self.expands) if e in trained]
        importance = self.project.weight.flatten(1).abs().sum(0)
        mid = ranking(importance, [self.mid[i] for i in known])
        rows = [self.expand.weight, self.depthwise.weight, self.project.weight.transpose(0, 1)]
        for norm in (self.expand_norm, self.depthwise_norm):
            rows += [norm.weight, norm.bias, norm.running_mean, norm.running_var]
        if self.se is not None:
            reduce, expand = self.se.reduce, self.se.expand
            importance = expand.weight.abs().sum(0)
            reduced = ranking(importance, [self.reduced[i] for i in known])
            reorder([reduce.weight, reduce.bias, expand.weight.T], reduced)
            rows += [reduce.weight.T, expand.weight, expand.bias]
        reorder(rows, mid)


class MobileNetV3(ImageNetwork):
    decays_norms = False # nor biases, as in once-for-all

    def __init__(self, c, arch=None):
        super().__init__()
        for key in ("widths", *OF_STAGES):
            setattr(c, key, as_list(getattr(c, key)))
        self.config, n_stages = c, len(c.widths)
        options = {name: options_of(getattr(c, name), name) for name in NAMES}
        self.check_config(options)
        choices = {}
        for s in range(1, n_stages + 1):
            layers = dict(repeat=options["depth"][-1], depth=f"depth_{s}")
            choices |= {f"{name}_{s}": Choice(o, **layers if name != "depth" else {})
                        for name, o in options.items()}
        arch = set_choices(self, choices, arch)

        names = (c.stem_channels, *c.widths, c.last_channels, c.mix_channels)
        stem, *channels = (divisible(n * c.width_mult) for n in names)
        self.stem = Conv2d(c.in_channels, stem, 3, c.stem_stride)
        self.stem_norm = BatchNorm2d(stem)
        self.first = Block(stem, stem, (3,), (1,), 1, 0, 0, False)
        self.depths = [options["depth"] if arch is None else (arch[f"depth_{s}"],)
                       for s in range(1, n_stages + 1)]
        self.stages, i = nn.ModuleList(), stem
        for s, o in enumerate(channels[:n_stages]):
            if arch is None:
                rows = [(options["kernel_size"], options["expand"])] * self.depths[s][-1]
            else:
                kernels, expands = (arch[f"{name}_{s + 1}"] for name in NAMES[1:])
                rows = [((k,), (e,)) for k, e in zip(kernels, expands, strict=True)]
            self.stages.append(nn.ModuleList())
            for row, (kernels, expands) in enumerate(rows):
                stride, kinds = 1 if row else c.strides[s], (c.se[s], c.hswish[s])
                block = Block(i, o, kernels, expands, stride, *kinds, c.kernel_transform)
                self.stages[-1].append(block)
                i = o
        last, mix = channels[n_stages:]
        self.last, self.last_norm = Conv2d(i, last, 1), BatchNorm2d(last)
        self.mix = Linear(last, mix, bias=False)
        self.dropout = nn.Dropout(c.dropout)
        self.classifier = Linear(mix, c.num_classes)
        for module in self.modules():
            is_layer = isinstance(module, nn.Conv2d | nn.Linear)
            if is_layer and module is not self.classifier: # which keeps PyTorch's initial weights
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.zeros_(self.classifier.bias)

    def check_config(self, options):
        """Raises ConfigError if a key has a value that it cannot have."""
        c = self.config
        if not all(k % 2 for k in options["kernel_size"]):
            raise ConfigError(f"kernel_size={c.kernel_size} must be odd numbers: the output has "
                              "the size of the input.")
        if options["expand"][0] < 2:
            raise ConfigError(f"expand={c.expand} must be 2 or more: a block without an expansion "
                              "has a layer less, and is no part of a larger one.")
        check_whole(c, "widths", *OF_STAGES)
        check_range(c, 0, "se", "hswish", below=2)
        check_range(c, 1, "stem_channels", "stem_stride", "widths", "strides", "last_channels",
                    "mix_channels")
        check_range(c, 0, "dropout", below=1)
        if c.width_mult <= 0:
            raise ConfigError(f"width_mult={c.width_mult} must be above 0.")
        for key in OF_STAGES:
            if len(getattr(c, key)) != len(c.widths):
                raise ConfigError(f"{key}={getattr(c, key)} needs one entry a stage, and widths="
                                  f"{c.widths} has {len(c.widths)}.")

    def forward(self, x, targets=None, arch=None):
        """See ImageNetwork. Images may have any size."""
        now = sampled(self, arch)
        x = self.first(F.hardswish(self.stem_norm(self.stem(x))))
        for s, blocks in enumerate(self.stages, 1):
            depth, kernels, expands = (now[f"{name}_{s}"] for name in NAMES)
            x = run_blocks(blocks, x, depth, list(zip(kernels, expands, strict=True)))
        x = F.hardswish(self.last_norm(self.last(x))).mean((2, 3)) # (B, last_channels)
        x = self.dropout(F.hardswish(self.mix(x))) # (B, mix_channels)
        return with_loss(self.classifier(x), targets)

    def unlock(self, old, new):
        """Before the options of the choices `old` become those of `new`: orders the channels, so
        that smaller expansions have those that matter."""
        for s, blocks in enumerate(self.stages, 1):
            name = f"expand_{s}"
            for block in blocks if old[name] != new[name] else ():
                block.sort_channels(old[name].options)

    def cost(self, arch=None):
        if arch is None or torch.is_tensor(arch["depth_1"]):
            return super().cost(arch)
        # what a hard forward pass does beside it, to make the kernels, is not the network's cost
        cost = self.expected_cost(one_hot(self.choices, arch))
        return {key: round(value.item()) for key, value in cost.items()}

    def expected_cost(self, arch):
        c, params, flops = self.config, 0, 0
        side = -(-c.img_size // c.stem_stride)

        def add(weights, used=1, side=1, rest=0): # weights at every pixel, and other parameters
            nonlocal params, flops
            params = params + used * (weights + rest)
            flops = flops + used * 2 * side * side * weights

        def mean(p, values):
            return p.double().cpu() @ torch.tensor(values).double()

        def add_block(block, used, k, e):
            nonlocal side
            n, o, inside = mean(e, block.mid), block.project.out_channels, side
            side = -(-side // block.depthwise.stride[0])
            if block.expand is not None:
                add(block.expand.in_channels * n, used, inside, 2 * n)
            area = mean(k, [k * k for k in block.depthwise.kernels])
            add(area * n, used, side, 2 * n) # independent choices: a product of means
            if block.se is not None:
                both = 2 * mean(e, [n * r for n, r in zip(block.mid, block.reduced, strict=True)])
                add(both, used, 1, n + mean(e, block.reduced))
            add(n * o, used, side, 2 * o)
        one = torch.ones(1)
        add(self.stem.weight.numel(), 1, side, 2 * self.stem.out_channels)
        add_block(self.first, 1, one, one)
        for s, (blocks, depths) in enumerate(zip(self.stages, self.depths, strict=True), 1):
            for n, block in enumerate(blocks):
                # the chance that it runs
                used = mean(arch[f"depth_{s}"], [float(d > n) for d in depths])
                add_block(block, used, arch[f"kernel_size_{s}"][n], arch[f"expand_{s}"][n])
        add(self.last.weight.numel(), 1, side, 2 * self.last.out_channels)
        add(self.mix.weight.numel())
        add(self.classifier.weight.numel(), rest=c.num_classes)
        return {"params": params, "flops": flops}


def columns(arch):
    """The columns of an architecture in a table of all."""
    return {"genotype": genotype(arch)}


def genotype(arch):
    """The text of an architecture: [kernel, expand] of every block of every stage."""
    stages = []
    for s in range(1, len(arch) // len(NAMES) + 1):
        blocks = zip(arch[f"kernel_size_{s}"], arch[f"expand_{s}"], strict=True)
        stages.append([[k, e] for k, e in blocks])
    return json.dumps(stages)


def arch_of(text):
    """The architecture of a genotype. Raises ConfigError if the text is none; whether its numbers
    are options is for build() to check."""
    try:
        stages = [[(k, e) for k, e in blocks] for blocks in json.loads(text)]
    except (ValueError, TypeError, RecursionError):
        raise ConfigError(f"'{text}' is not a genotype of mobilenetv3: write [[[3, 6], [7, 4]], "
                          "...], kernel and expansion of every block of every stage.") from None
    arch = {}
    for s, blocks in enumerate(stages, 1):
        arch |= {f"depth_{s}": len(blocks), f"kernel_size_{s}": [k for k, _ in blocks],
                 f"expand_{s}": [e for _, e in blocks]}
    return arch


def build(config, arch=None):
    """A network from a dict of the keys above, with img_size, in_channels and num_classes."""
    known = settings(config, globals(), img_size=224, in_channels=3, num_classes=1000)
    return MobileNetV3(known, arch)
