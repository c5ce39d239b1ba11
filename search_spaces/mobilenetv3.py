"""
Once-for-all's MobileNetV3 space (Cai et al. 2020): kernel and expansion of every block, depth of every stage, 2.2e19 architectures.

    stem, a fixed block, five stages of 2 to 4 blocks, a wide 1 x 1 convolution, the mean over pixels, two linear layers
    block: 1 x 1 convolution to in * expand channels, k x k depthwise, squeeze-and-excitation where the stage has it, 1 x 1 to out

Smaller options are entangled in the largest: the first channels of the middle, the first blocks of a stage, and of a kernel the centre of
the next larger one, times a matrix that learns with the weights, one a block for all its channels.
Stage s chooses depth_s, and that many entries of kernel_size_s and expand_s. The genotype is a list of [kernel, expand] a block, for
each stage: [[[3, 6], [7, 4]], ...].
"""
import json
from types import SimpleNamespace

import torch
import torch.nn as nn
from torch.nn import functional as F

from configurator import as_list, check_range, check_whole, defaults
from model import run_blocks
from search_spaces.convs import BatchNorm2d, Conv2d, ImageNetwork
from supernet import Choice, Linear, Size, check_arch, one_hot, options_of, prefix_masks, ranking
from supernet import reorder, straight_through

# -----------------------------------------------------------------------------
depth = [2, 3, 4] # blocks of each stage
kernel_size = [3, 5, 7] # of each block
expand = [3, 4, 6] # of each block: the channels in its middle over those that come in
width_mult = 1.0 # published: 1.0 and 1.2
kernel_transform = True # learned matrices between a kernel and the centre of the next larger one; False: the centre as it is
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

NAMES, OF_STAGES = ("depth", "kernel_size", "expand"), ("strides", "se", "hswish")


def divisible(n, by=8):
    """The multiple of `by` that is nearest to n, upwards where that takes more than a tenth away."""
    near = max(by, int(n + by / 2) // by * by)
    return near + by if near < 0.9 * n else near


class Depthwise(Conv2d):
    """A depthwise convolution whose kernels are a chain: each is the centre of the next larger one, times a matrix if transform."""
    def __init__(self, n, kernels, stride, transform):
        super().__init__(n, n, kernels, stride, groups=n)
        smaller = self.kernels[:-1] if transform else ()
        self.matrices = nn.ParameterDict({str(k): nn.Parameter(torch.eye(k * k)) for k in smaller})

    def shrink(self, w, k):
        """w: (C, 1, K, K), the next larger kernel -> (C, 1, k, k)."""
        cut = (w.shape[-1] - k) // 2
        w = w[..., cut:cut + k, cut:cut + k]
        return (w.flatten(1) @ self.matrices[str(k)].T).view(w.shape) if self.matrices else w

    def take(self, i=None, o=None, k=None):
        w = super().take(i, o)["weight"]
        k = self.kernels[-1] if k is None else k[0] if isinstance(k, tuple) else k
        for smaller in reversed(self.kernels[self.kernels.index(k):-1]):
            w = self.shrink(w, smaller)
        return {"weight": w, "bias": None}

    def forward(self, x, i=None, o=None, k=None):
        if not isinstance(k, torch.Tensor) or not self.matrices:
            return super().forward(x, i, o, k)
        chain = [self.weight] # from the largest to the smallest
        for smaller in reversed(self.kernels[:-1]):
            chain.append(self.shrink(chain[-1], smaller))
        mixed = chain[-1] * k[0]
        for p, w in zip(k[1:], reversed(chain[:-1]), strict=True):
            mixed = w * p + F.pad(mixed, [(w.shape[-1] - mixed.shape[-1]) // 2] * 4)
        return self.conv(x, mixed)


class SqueezeExcite(nn.Module):
    """Every channel times a gate, which two linear layers compute from the means of all (Hu et al. 2018)."""
    def __init__(self, mid, reduced):
        super().__init__()
        self.reduce, self.expand = Linear(mid, reduced), Linear(reduced, mid)

    def forward(self, x, mid=None, reduced=None):
        """mid, reduced: Sizes. Of a mixture, x is weighted already, and channels that no option uses are 0 there."""
        h = F.relu(self.reduce(x.mean((2, 3)), mid, reduced)) # (B, reduced)
        return x * F.hardsigmoid(self.expand(h, reduced and reduced.unweighted, mid))[:, :, None, None]


class Block(nn.Module):

    def __init__(self, i, o, kernels, expands, stride, se, hswish, transform):
        super().__init__()
        self.expands, self.skip, self.act = expands, stride == 1 and i == o, F.hardswish if hswish else F.relu
        self.mid = tuple(divisible(round(i * e)) for e in expands) # channels of each option
        self.reduced = tuple(divisible(n // 4) for n in self.mid) # and of its squeeze
        n = self.mid[-1]
        self.register_buffer("mask", prefix_masks(self.mid, n), persistent=False) # (expands, n)
        self.register_buffer("mask_of_reduced", prefix_masks(self.reduced, self.reduced[-1]), persistent=False)
        wide = expands[-1] != 1 # else there is nothing to expand
        self.expand, self.expand_norm = (Conv2d(i, n, 1), BatchNorm2d(n)) if wide else (None, None)
        self.depthwise, self.depthwise_norm = Depthwise(n, kernels, stride, transform), BatchNorm2d(n)
        self.se = SqueezeExcite(n, self.reduced[-1]) if se else None
        self.project, self.project_norm = Conv2d(n, o, 1), BatchNorm2d(o)

    def sizes(self, e):
        """The Sizes of the middle and of its squeeze."""
        if isinstance(e, torch.Tensor):
            return Size(self.mid, mask=self.mask, p=e), Size(self.reduced, mask=self.mask_of_reduced, p=e)
        option, p = e if isinstance(e, tuple) else (e, None)
        place = None if option is None else self.expands.index(option)
        return (None, None) if place is None else (Size(self.mid[place], p=p), Size(self.reduced[place], p=p))

    def forward(self, x, k=None, e=None):
        """k, e: kernel and expansion, each None where there is one option, an option, one and its weight, or the weights of all. They
        count once, behind the depthwise convolution: its norm would remove what came before."""
        mid, reduced = self.sizes(e)
        part, y = mid and mid.unweighted, x
        if self.expand is not None:
            y = self.act(self.expand_norm(self.expand(y, None, part), part))
        y = self.depthwise_norm(self.depthwise(y, None, part, k), mid, k.sum() if isinstance(k, torch.Tensor) else None)
        y = self.act(straight_through(y, k[1] if isinstance(k, tuple) else None))
        y = y if self.se is None else self.se(y, part, reduced)
        y = self.project_norm(self.project(y, part))
        return x + y if self.skip else y

    @torch.no_grad()
    def sort_channels(self, trained):
        """Orders the middle channels, and those of the squeeze, by the L1 norm of the weights that read them, largest first. The
        expansions in `trained`, the largest among them, compute what they did before: each keeps its channels."""
        places = [place for place, e in enumerate(self.expands) if e in trained]
        mid = ranking(self.project.weight.flatten(1).abs().sum(0), [self.mid[place] for place in places])
        rows = [self.expand.weight, self.depthwise.weight, self.project.weight.transpose(0, 1)]
        for norm in (self.expand_norm, self.depthwise_norm):
            rows += [norm.weight, norm.bias, norm.running_mean, norm.running_var]
        if self.se is not None:
            reduced = ranking(self.se.expand.weight.abs().sum(0), [self.reduced[place] for place in places])
            reorder([self.se.reduce.weight, self.se.reduce.bias, self.se.expand.weight.T], reduced)
            rows += [self.se.reduce.weight.T, self.se.expand.weight, self.se.expand.bias]
        reorder(rows, mid)


class MobileNetV3(ImageNetwork):
    decays_norms = False # nor biases, as in once-for-all

    def __init__(self, c, arch=None):
        super().__init__()
        for key in ("widths", *OF_STAGES):
            setattr(c, key, as_list(getattr(c, key)))
        self.config, stages = c, len(c.widths)
        options = {name: options_of(getattr(c, name), name) for name in NAMES}
        if not all(k % 2 for k in options["kernel_size"]):
            raise SystemExit(f"kernel_size={c.kernel_size} must be odd numbers: the output has the size of the input.")
        if options["expand"][0] < 2:
            raise SystemExit(f"expand={c.expand} must be 2 or more: without an expansion a block has a layer less, and is no part of it.")
        check_whole(c, "widths", *OF_STAGES)
        check_range(c, 0, "se", "hswish", below=2)
        check_range(c, 1, "stem_channels", "stem_stride", "widths", "strides", "last_channels", "mix_channels")
        check_range(c, 0, "dropout", below=1)
        if c.width_mult <= 0:
            raise SystemExit(f"width_mult={c.width_mult} must be above 0.")
        for key in OF_STAGES:
            if len(getattr(c, key)) != stages:
                raise SystemExit(f"{key}={getattr(c, key)} needs one entry a stage, and widths={c.widths} has {stages}.")
        self.choices = {}
        for s in range(1, stages + 1):
            layers = dict(repeat=options["depth"][-1], depth=f"depth_{s}")
            self.choices |= {f"{name}_{s}": Choice(o, **layers if name != "depth" else {}) for name, o in options.items()}
        if arch is not None: # nothing is left to choose
            arch, self.choices = check_arch(self.choices, arch), {}

        stem, *channels = (divisible(n * c.width_mult) for n in (c.stem_channels, *c.widths, c.last_channels, c.mix_channels))
        self.stem, self.stem_norm = Conv2d(c.in_channels, stem, 3, c.stem_stride), BatchNorm2d(stem)
        self.first = Block(stem, stem, (3,), (1,), 1, 0, 0, False)
        self.depths = [options["depth"] if arch is None else (arch[f"depth_{s}"],) for s in range(1, stages + 1)]
        self.stages, i = nn.ModuleList(), stem
        for s, o in enumerate(channels[:stages], 1):
            kernels, expands = ([options[name]] * self.depths[s - 1][-1] if arch is None else [(n,) for n in arch[f"{name}_{s}"]]
                                for name in NAMES[1:])
            self.stages.append(nn.ModuleList())
            for stride, k, e in zip([c.strides[s - 1], *[1] * len(kernels)], kernels, expands, strict=False):
                self.stages[-1].append(Block(i, o, k, e, stride, c.se[s - 1], c.hswish[s - 1], c.kernel_transform))
                i = o
        last, mix = channels[stages:]
        self.last, self.last_norm = Conv2d(i, last, 1), BatchNorm2d(last)
        self.mix = Linear(last, mix, bias=False)
        self.dropout = nn.Dropout(c.dropout)
        self.classifier = Linear(mix, c.num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear) and module is not self.classifier: # the classifier has PyTorch's
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x, targets=None, arch=None):
        """x: (B, in_channels, H, W) of any size, targets: (B,) classes or None -> logits (B, num_classes), loss or None. arch: None for
        a network without choices, else an architecture, or weights for a mixture."""
        open_choices = any(len(c.options) > 1 for c in self.choices.values())
        assert arch is not None or not open_choices, "a supernet needs weights or an architecture as its third argument"
        x = self.first(F.hardswish(self.stem_norm(self.stem(x))))
        for s, blocks in enumerate(self.stages, 1):
            nothing = (self.depths[s - 1][-1], *[[None] * len(blocks)] * 2)
            depth, kernels, expands = nothing if arch is None else (arch[f"{name}_{s}"] for name in NAMES)
            x = run_blocks(blocks, x, depth, self.depths[s - 1], list(zip(kernels, expands, strict=True)))
        x = F.hardswish(self.last_norm(self.last(x))).mean((2, 3)) # (B, last_channels)
        logits = self.classifier(self.dropout(F.hardswish(self.mix(x))))
        return logits, None if targets is None else F.cross_entropy(logits, targets)

    def unlock(self, old, new):
        """Before the options of the choices `old` become those of `new`: the channels of smaller expansions will be those that matter."""
        for s, blocks in enumerate(self.stages, 1):
            for block in blocks if old[f"expand_{s}"] != new[f"expand_{s}"] else ():
                block.sort_channels(old[f"expand_{s}"].options)

    def cost(self, arch=None):
        if arch is None or torch.is_tensor(arch["depth_1"]):
            return super().cost(arch)
        cost = self.expected_cost(one_hot(self.choices, arch)) # a hard forward pass has more to do: it makes the kernels
        return {key: round(value.item()) for key, value in cost.items()}

    def expected_cost(self, arch):
        c, params, flops = self.config, 0, 0
        side = -(-c.img_size // c.stem_stride)

        def add(weights, used=1, side=1, rest=0): # products at every pixel, and other parameters
            nonlocal params, flops
            params, flops = params + used * (weights + rest), flops + used * 2 * side * side * weights

        def mean(p, values):
            return p.double().cpu() @ torch.tensor(values).double()

        def add_block(block, used, k, e):
            nonlocal side
            n, o, inside = mean(e, block.mid), block.project.out_channels, side
            side = -(-side // block.depthwise.stride[0])
            if block.expand is not None:
                add(block.expand.in_channels * n, used, inside, 2 * n)
            add(mean(k, [k * k for k in block.depthwise.kernels]) * n, used, side, 2 * n) # independent: a product of means
            if block.se is not None:
                both = 2 * mean(e, [n * r for n, r in zip(block.mid, block.reduced, strict=True)])
                add(both, used, 1, n + mean(e, block.reduced))
            add(n * o, used, side, 2 * o)
        one = torch.ones(1)
        add(self.stem.weight.numel(), 1, side, 2 * self.stem.out_channels)
        add_block(self.first, 1, one, one)
        for s, (blocks, depths) in enumerate(zip(self.stages, self.depths, strict=True), 1):
            for n, block in enumerate(blocks):
                used = mean(arch[f"depth_{s}"], [float(d > n) for d in depths]) # the chance that it runs
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
    stages = range(1, len(arch) // len(NAMES) + 1)
    return json.dumps([[[k, e] for k, e in zip(arch[f"kernel_size_{s}"], arch[f"expand_{s}"], strict=True)] for s in stages])


def arch_of(text):
    """The architecture of a genotype, whose numbers build() compares with its options; SystemExit if it is none."""
    try:
        stages = [[(k, e) for k, e in blocks] for blocks in json.loads(text)]
    except (ValueError, TypeError, RecursionError):
        raise SystemExit(f"'{text}' is no genotype of mobilenetv3: write [[[3, 6], [7, 4]], ...], kernel and expansion of every block of "
                         "every stage.") from None
    return {f"{name}_{s}": value for s, blocks in enumerate(stages, 1)
            for name, value in zip(NAMES, (len(blocks), [k for k, _ in blocks], [e for _, e in blocks]), strict=True)}


def build(config, arch=None):
    """A network from a dict of the keys above, with img_size, in_channels and num_classes; other keys are left alone."""
    known = defaults(globals()) | {"img_size": 224, "in_channels": 3, "num_classes": 1000}
    return MobileNetV3(SimpleNamespace(**known | {name: value for name, value in config.items() if name in known}), arch)


DATA = "images"
