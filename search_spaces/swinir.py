"""
Image super-resolution by attention in windows (SwinIR-light, Liang et al. 2021): width, depth, and
the heads and MLP of every layer; 2.5e15 networks.

    x - mean -> 3 x 3 convolution -> n_rstb residual Swin transformer blocks -> norm, 3 x 3
    convolution -> + the first convolution's output -> 3 x 3 convolution to 3 * scale^2 channels,
    pixel shuffle -> + mean
    block: n_layer layers and a 3 x 3 convolution, beside an identity
    layer: norm and attention, norm and MLP, each beside an identity

Attention is in windows of window_size x window_size pixels; those of every second layer are shifted
by half a window (Swin, Liu et al. 2021). x, of any size, is padded to whole windows by reflection.

Block r chooses n_layer_r, and that many entries of n_head_r and mlp_ratio_r. An architecture has
them also for the blocks beyond n_rstb, where they are ignored. The genotype has a list a block, as
long as the block has layers: {"n_embd": 36, "n_head": [[4, 6, 4, 4], [6, 6, 4, 4, 4]],
"mlp_ratio": [[1, 2, 1, 1], [1, 1, 2, 1, 1]]}.
"""
import json
from functools import lru_cache
from types import SimpleNamespace

import torch
import torch.nn as nn
from torch.nn import functional as F

from configurator import ConfigError, check_range
from fused_ops import window_attention
from model import MLP, CausalSelfAttention
from search_spaces.convs import Conv2d, ImageNetwork, drop_path as drop_samples, settings
from supernet import (
    ALL, Choice, Embedding, Norm, Size, options_of, prefix_masks, run_blocks, sampled,
    set_choices, straight_through,
)

# -----------------------------------------------------------------------------
n_embd = [36, 48, 60] # width
n_rstb = [2, 3, 4] # blocks
n_layer = [4, 5, 6] # layers of each block
n_head = [4, 6] # of each layer; a head has n_embd / n_head channels
mlp_ratio = [1, 2] # of each layer
window_size = 8 # pixels a side
scale = 2 # 2, 3 or 4 times as many pixels a side
patch = 64 # the side of the low-resolution crops that it is trained on
drop_path = 0.0 # of a network without choices, rising to this from layer to layer; published: 0.1
tile = 0 # pixels a side that an evaluation computes at a time, to save memory; 0: the whole image
# -----------------------------------------------------------------------------

DATA = "pairs" # the kind of data it takes
GLOBAL, LAYERED = ("n_embd", "n_rstb"), ("n_layer", "n_head", "mlp_ratio")
EXAMPLE = ('{"n_embd": 36, "n_head": [[4, 6, 4, 4], [4, 4, 6, 4]], '
           '"mlp_ratio": [[1, 2, 1, 1], [1, 1, 2, 1]]}')
OVERLAP = 32 # low-resolution pixels that a tile sees beyond its edges
WINDOWS = (2, 4, 8, 16, 32) # window sizes that divide it
MEAN = (0.4488, 0.4371, 0.4040) # of DIV2K
# the config of model.py's attention and MLP
BLOCK = dict(dropout=0.0, bias=True)


def reflected(n, size):
    """The indices of n pixels and of their reflections that pad them to whole windows of `size`:
    0 1 2 1 0 1 2 1 for n = 3 and size = 8."""
    i = torch.arange(n + -n % size) % max(1, 2 * n - 2)
    return torch.minimum(i, 2 * n - 2 - i)


def windows(x, size, shift):
    """(B, H, W, C) -> (B * windows, size^2, C), of the image moved up and left by shift."""
    x = torch.roll(x, (-shift, -shift), (1, 2)) if shift else x
    x = x.unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3)
    return x.flatten(3, 4).flatten(0, 2)


def unwindows(x, size, shift, H, W):
    """The inverse of windows()."""
    x = x.unflatten(1, (size, size)).unflatten(0, (-1, H // size, W // size))
    x = x.transpose(2, 3).flatten(3, 4).flatten(1, 2) # (B, H, W, C)
    return torch.roll(x, (shift, shift), (1, 2)) if shift else x


@lru_cache(maxsize=2) # one for the crops, one for the image that is evaluated
@torch.inference_mode(False) # training uses it, too
def shift_mask(H, W, size, shift, device):
    """(windows, size^2, size^2): -100 between pixels of a shifted window that are no neighbours in
    the image, else 0."""
    # each row and column of pixels is in part 0, 1 or 2 of the image
    rows, columns = ((torch.arange(n) >= n - size).int() + (torch.arange(n) >= n - shift)
                     for n in (H, W))
    part = (3 * rows[:, None] + columns)[None, :, :, None] # (1, H, W, 1)
    part = windows(part, size, 0)[:, :, 0] # (windows, size^2)
    return -100 * (part[:, :, None] != part[:, None, :]).float().to(device)


class WindowAttention(CausalSelfAttention):
    """Attention of every pixel of a window to all, with a bias for each relative position: a table
    of (2 window_size - 1)^2 rows."""
    def __init__(self, c, n_embd, n_head):
        super().__init__(c, n_embd, n_head)
        w = c.window_size
        self.bias = Embedding((2 * w - 1) ** 2, n_head[-1])
        y, x = torch.arange(w).repeat_interleave(w), torch.arange(w).repeat(w)
        index = (y[:, None] - y + w - 1) * (2 * w - 1) + x[:, None] - x + w - 1
        self.register_buffer("index", index, persistent=False) # (w^2, w^2)

    def forward(self, x, mask, e=None, n_head=ALL):
        """x: (B * windows, T, n_embd), T = window_size^2. mask: (windows, T, T) or None."""
        heads = None if n_head.option is None else Size(n_head.option)
        bias = self.bias(self.index, heads).permute(2, 0, 1) # (heads, T, T)
        if n_head.is_mixture: # as in model.py; a head count uses the first of the biases
            S, scale = e.p @ self.mask, e.p @ self.scale # (n_head, n_embd)
            y_scale = n_head.weights.unsqueeze(-1) * S * S
            y = window_attention(self.c_attn(x, e), S * scale, y_scale, self.n_head, bias, mask)
            return self.c_proj(y, None, e)
        h = n_head.option or self.n_head[-1]
        n = e.n if e else self.n_embd[-1]
        qkv, ones = self.c_attn(x, e, e and Size(3 * n, 3 * h)), x.new_ones(1, n)
        y_scale = ones
        if n_head.weight is not None: # as often as in the mixture
            q = straight_through(qkv[..., :n], e.p * e.p)
            qkv, y_scale = torch.cat((q, qkv[..., n:]), -1), n_head.weight * e.p * e.p * ones
        y = window_attention(qkv, ones * (n / h) ** -0.5, y_scale, (h,), bias, mask)
        return self.c_proj(y, e and Size(n, h), e)


class Layer(nn.Module):

    def __init__(self, c, shift, n_embd, n_head, mlp_ratio, drop):
        super().__init__()
        self.size, self.shift, self.drop = c.window_size, shift, drop
        self.ln_1, self.ln_2 = Norm(n_embd[-1], bias=True), Norm(n_embd[-1], bias=True)
        self.attn = WindowAttention(c, n_embd, n_head)
        self.mlp = MLP(c, n_embd, mlp_ratio, ("exact_gelu",))

    def forward(self, x, e=None, n_head=ALL, mlp_ratio=ALL):
        """x: (B, H, W, n_embd) -> the same."""
        B, H, W = x.shape[:3]
        shift = self.shift if min(H, W) > self.size else 0 # one window is all there is
        mask = shift_mask(H, W, self.size, shift, x.device) if shift else None
        x = windows(x, self.size, shift) # (B * windows, size^2, n_embd)

        def drop(y): # an image's windows together
            if not self.training or not self.drop:
                return y
            return drop_samples(y.unflatten(0, (B, -1)), self.drop).flatten(0, 1)

        x = x + drop(self.attn(self.ln_1(x, e), mask, e, n_head))
        x = x + drop(self.mlp(self.ln_2(x, e), e, mlp_ratio))
        return unwindows(x, self.size, shift, H, W)


def conv(module, x, *sizes):
    """A convolution of pixels whose channels come last: (B, H, W, in) -> (B, H, W, out)."""
    return module(x.permute(0, 3, 1, 2), *sizes).permute(0, 2, 3, 1)


class RSTB(nn.Module):

    def __init__(self, layers, n_embd, n_layer):
        super().__init__()
        self.layers, self.n_layer = nn.ModuleList(layers), n_layer
        self.conv = Conv2d(n_embd[-1], n_embd[-1], 3, bias=True)

    def forward(self, x, e, n_layer, layers):
        """layers: [(n_head, mlp_ratio)], Sampled."""
        y = run_blocks(self.layers, x, n_layer, [(e, *layer) for layer in layers])
        return x + conv(self.conv, y, e, e)


class SwinIR(ImageNetwork):

    def __init__(self, c, arch=None):
        super().__init__()
        self.config, of_layers = c, SimpleNamespace(**vars(c), **BLOCK)
        self.check_config()
        depths, rows = self.choose(arch)
        E, total = self.n_embd[-1], sum(n[-1] for n in depths)
        has_choices = any(len(choice.options) > 1 for choice in self.choices.values())
        drop = 0.0 if has_choices else c.drop_path
        self.conv_first, self.ln_first = Conv2d(3, E, 3, bias=True), Norm(E, bias=True)
        self.rstb = nn.ModuleList()
        for r, n_layer in enumerate(depths):
            before = sum(n[-1] for n in depths[:r])
            layers = []
            for i, row in enumerate(rows[r]):
                shift, p = i % 2 * (c.window_size // 2), drop * (before + i) / max(1, total - 1)
                layers.append(Layer(of_layers, shift, self.n_embd, *row, p))
            self.rstb.append(RSTB(layers, self.n_embd, n_layer))
        self.ln_f, self.conv_last = Norm(E, bias=True), Conv2d(E, E, 3, bias=True)
        self.up = Conv2d(E, 3 * c.scale ** 2, 3, bias=True)
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("mask", prefix_masks(self.n_embd, E), persistent=False) # (n_embd, E)
        self.register_buffer("last", torch.tensor(self.n_embd) - 1, persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def check_config(self):
        """Raises ConfigError if a key has a value that it cannot have."""
        c = self.config
        if c.scale not in (2, 3, 4):
            raise ConfigError(f"scale={c.scale} is not 2, 3 or 4.")
        check_range(c, 0, "tile")
        check_range(c, 0, "drop_path", below=1)
        if c.patch < WINDOWS[0]:
            raise ConfigError(f"patch={c.patch} must be {WINDOWS[0]} or more, the smallest window.")
        fitting = [size for size in WINDOWS if size <= c.patch and c.tile % size == 0]
        if not fitting:
            raise ConfigError(f"tile={c.tile} must be even, for whole windows.")
        if c.window_size not in fitting:
            raise ConfigError(f"window_size={c.window_size} must divide {OVERLAP} and tile="
                              f"{c.tile}, and fit into patch={c.patch}: choose one of "
                              f"{', '.join(map(str, fitting))}.")

    def choose(self, arch):
        """Sets the choices. Returns the options of every block's n_layer, and of the n_head and
        mlp_ratio of its layers: [(n_layer, ...)], [[(n_head, mlp_ratio)]]."""
        options = {name: options_of(getattr(self.config, name), name, whole=name != "mlp_ratio")
                   for name in (*GLOBAL, *LAYERED)}
        n_layer, n_rstb = options["n_layer"], options["n_rstb"][-1]
        choices = {name: Choice(options[name]) for name in GLOBAL}
        for r in range(1, n_rstb + 1):
            choices[f"n_layer_{r}"] = Choice(n_layer)
            choices |= {f"{name}_{r}": Choice(options[name], n_layer[-1], f"n_layer_{r}")
                        for name in LAYERED[1:]}
        arch = set_choices(self, choices, arch)
        if arch is None:
            self.n_embd, self.n_rstb = options["n_embd"], options["n_rstb"]
            layers = [(options["n_head"], options["mlp_ratio"])] * n_layer[-1]
            return [n_layer] * n_rstb, [layers] * n_rstb
        self.n_embd, self.n_rstb = (arch["n_embd"],), (arch["n_rstb"],)
        blocks = range(1, arch["n_rstb"] + 1)
        rows = [zip(arch[f"n_head_{r}"], arch[f"mlp_ratio_{r}"], strict=True) for r in blocks]
        rows = [[((h,), (m,)) for h, m in row] for row in rows]
        return [(arch[f"n_layer_{r}"],) for r in blocks], rows

    def forward(self, x, targets=None, arch=None):
        """x: (B, 3, H, W) of 0 to 1, targets: (B, 3, scale * H, scale * W) or None -> an image of
        the targets' shape, its mean absolute error or None. arch: see ImageNetwork."""
        tile = self.config.tile
        in_tiles = tile and not self.training and max(x.shape[2:]) > tile
        y = self.tiled(x, arch, tile) if in_tiles else self.whole(x, arch)
        return y, None if targets is None else F.l1_loss(y, targets)

    def whole(self, x, arch):
        (h, w), s, size = x.shape[2:], self.config.scale, self.config.window_size
        now = sampled(self, arch)
        e, blocks = now["n_embd"].size(self.n_embd, self.mask, self.last), []
        for r in range(1, len(self.rstb) + 1):
            layers = zip(now[f"n_head_{r}"], now[f"mlp_ratio_{r}"], strict=True)
            blocks.append((e, now[f"n_layer_{r}"], list(layers)))
        x = x[:, :, reflected(h, size)[:, None], reflected(w, size)]
        first = self.conv_first(x - self.mean, None, e).permute(0, 2, 3, 1) # (B, H, W, n_embd)
        x = run_blocks(self.rstb, self.ln_first(first, e), now["n_rstb"], blocks)
        x = first + conv(self.conv_last, self.ln_f(x, e), e, e)
        y = F.pixel_shuffle(self.up(x.permute(0, 3, 1, 2), e), s) + self.mean
        return y[:, :, :s * h, :s * w]

    def tiled(self, x, arch, tile):
        """whole() from tiles that see OVERLAP pixels beyond their edges. It is the same where that
        is as far as the layers reach, about a window a layer; else it differs a little near the
        edges."""
        s, (H, W) = self.config.scale, x.shape[2:]
        y = x.new_empty(len(x), 3, s * H, s * W)
        for top in range(0, H, tile):
            for left in range(0, W, tile):
                y0, x0 = max(0, top - OVERLAP), max(0, left - OVERLAP)
                seen = x[:, :, y0:top + tile + OVERLAP, x0:left + tile + OVERLAP]
                part = self.whole(seen, arch)[:, :, s * (top - y0):, s * (left - x0):]
                part = part[:, :, :s * tile, :s * tile]
                h, w = part.shape[2:]
                y[:, :, s * top:s * top + h, s * left:s * left + w] = part
        return y

    def run(self, arch=None):
        p = self.config.patch # not in tiles: their overlap is not the network's cost
        return self.whole(self.mean.new_zeros(1, 3, p, p), arch)

    def expected_cost(self, arch):
        c, weights = self.config, {name: w.double().cpu() for name, w in arch.items()}

        def chances(p, options): # that block or layer i is in use
            return [sum(p[k] for k, n in enumerate(options) if n > i) for i in range(options[-1])]
        side, e = -(-c.patch // c.window_size) * c.window_size, torch.tensor(self.n_embd).double()
        # convs: weights that all pixels are multiplied by; small: other parameters; attention: the
        # multiply-adds of scores and weighted values
        convs = 27 * e + 9 * e ** 2 + 27 * c.scale ** 2 * e
        small, attention = 6 * e + 3 * c.scale ** 2, 0
        for r, used in enumerate(chances(weights["n_rstb"], self.n_rstb), 1):
            convs, small = convs + used * 9 * e ** 2, small + used * e
            heads, ratios = (self.choices[f"{name}_{r}"].options for name in LAYERED[1:])
            heads = weights[f"n_head_{r}"] @ torch.tensor(heads).double() # (layers,)
            hidden = torch.tensor([[int(m * n) for n in self.n_embd] for m in ratios]).double()
            hidden = weights[f"mlp_ratio_{r}"] @ hidden # (layers, n_embd)
            of_layers = chances(weights[f"n_layer_{r}"], self.rstb[r - 1].n_layer)
            for i, chance in enumerate(of_layers):
                chance, table = used * chance, (2 * c.window_size - 1) ** 2 * heads[i]
                convs = convs + chance * (4 * e ** 2 + 2 * e * hidden[i])
                small = small + chance * (9 * e + hidden[i] + table)
                attention = attention + chance * 2 * c.window_size ** 2 * e
        p = weights["n_embd"]
        return {"params": p @ (convs + small), "flops": p @ (2 * side ** 2 * (convs + attention))}


def genotype(arch):
    """An architecture as text: its width, and the heads and ratios of its layers."""
    blocks = range(1, arch["n_rstb"] + 1)
    rows = {name: [arch[f"{name}_{r}"] for r in blocks] for name in LAYERED[1:]}
    return json.dumps({"n_embd": arch["n_embd"], **rows})


def columns(arch):
    """The columns of an architecture in a table of all."""
    return {"genotype": genotype(arch)}


def arch_of(text):
    """The architecture of a genotype. Raises ConfigError if the text is none; whether its numbers
    are options is for build() to check."""
    try:
        found = json.loads(text)
        heads, ratios = (found[name] for name in LAYERED[1:])
        assert found.keys() == {"n_embd", *LAYERED[1:]} and type(heads) is type(ratios) is list
        assert list(map(len, heads)) == list(map(len, ratios))
    except (ValueError, TypeError, KeyError, AssertionError, AttributeError, RecursionError):
        raise ConfigError(f"'{text}' is not a genotype of swinir: write {EXAMPLE}, a list of its "
                          "layers for each block.") from None
    arch = {"n_embd": found["n_embd"], "n_rstb": len(heads)}
    # a block that is not in use has the first options
    missing = max(n_rstb) - len(heads)
    heads = heads + [[n_head[0]] * n_layer[0]] * missing
    ratios = ratios + [[mlp_ratio[0]] * n_layer[0]] * missing
    for r, (h, m) in enumerate(zip(heads, ratios, strict=True), 1):
        arch |= {f"n_layer_{r}": len(h), f"n_head_{r}": h, f"mlp_ratio_{r}": m}
    return arch


def build(config, arch=None):
    """A network from a dict of the keys above."""
    return SwinIR(settings(config, globals()), arch)
