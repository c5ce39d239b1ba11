"""
Image super-resolution by windows of attention (SwinIR-light, Liang et al. 2021): width, depth, and every layer's heads and MLP.

x - mean -> 3 x 3 convolution -> n_rstb residual Swin transformer blocks -> norm, 3 x 3 convolution -> + the first convolution's output
-> 3 x 3 convolution to 3 * scale^2 channels, pixel shuffle -> + mean. A block is n_layer layers and a 3 x 3 convolution beside an
identity. A layer is attention and an MLP behind norms, each beside an identity, in windows of window_size x window_size pixels; those
of every second layer are shifted by half a window (Swin, Liu et al. 2021). x, of any size, is padded to whole windows by reflection.

Block r chooses n_layer_r, and that many entries of n_head_r and mlp_ratio_r; of the blocks beyond n_rstb an architecture has them too,
and they are ignored. The genotype is {"n_embd": 36, "n_head": [[4, 6, 4, 4], [6, 6, 4, 4, 4]], "mlp_ratio": [[1, 2, 1, 1],
[1, 1, 2, 1, 1]]}, a list a block, as long as the block has layers. There are 2.5e15 networks.
"""
import json
from functools import lru_cache
from types import SimpleNamespace

import torch
import torch.nn as nn
from torch.nn import functional as F

from configurator import check_range, defaults
from fused_ops import window_attention
from model import CausalSelfAttention, MLP, run_blocks
from search_spaces.convs import Conv2d, ImageNetwork, drop_path as drop_samples
from supernet import Choice, Embedding, LayerNorm, Size, check_arch, options_of, prefix_masks
from supernet import size_of, straight_through

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
tile = 0 # low-resolution pixels a side that an evaluation computes at a time, to save memory; 0: the whole image
# -----------------------------------------------------------------------------

GLOBAL, LAYERED = ("n_embd", "n_rstb"), ("n_layer", "n_head", "mlp_ratio")
EXAMPLE = '{"n_embd": 36, "n_head": [[4, 6, 4, 4], [4, 4, 6, 4]], "mlp_ratio": [[1, 2, 1, 1], [1, 1, 2, 1]]}'
OVERLAP = 32 # low-resolution pixels that a tile sees beyond its edges
BLOCK = dict(head_size=0, dropout=0.0, bias=True, position="", activation="exact_gelu") # what attention and MLP of model.py want to know
MEAN = (0.4488, 0.4371, 0.4040) # of DIV2K


def reflected(n, size):
    """The places of n pixels and of what pads them to whole windows, back and forth: 0 1 2 1 0 1 2 1 for n = 3 and size = 8."""
    i = torch.arange(n + -n % size) % max(1, 2 * n - 2)
    return torch.minimum(i, 2 * n - 2 - i)


def windows(x, size, shift):
    """(B, H, W, C) -> (B * windows, size^2, C), after all has moved by shift up and to the left."""
    x = torch.roll(x, (-shift, -shift), (1, 2)) if shift else x
    return x.unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3).flatten(3, 4).flatten(0, 2)


def unwindows(x, size, shift, H, W):
    x = x.unflatten(1, (size, size)).unflatten(0, (-1, H // size, W // size)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return torch.roll(x, (shift, shift), (1, 2)) if shift else x


@lru_cache(maxsize=2) # of the crops and of the image at hand
@torch.inference_mode(False) # it is kept for training, too
def shift_mask(H, W, size, shift, device):
    """(windows, size^2, size^2): -100 between pixels of a shifted window that are no neighbours in the image, else 0."""
    part = [(torch.arange(n) >= n - size).int() + (torch.arange(n) >= n - shift) for n in (H, W)] # 0, 1 or 2
    part = windows((3 * part[0][:, None] + part[1])[None, :, :, None], size, 0)[:, :, 0] # (windows, size^2)
    return -100 * (part[:, :, None] != part[:, None, :]).float().to(device)


class WindowAttention(CausalSelfAttention):
    """Of all pixels of a window, with a bias for every difference of places: a table of (2 window_size - 1)^2 rows."""
    def __init__(self, c, n_embd, n_head):
        super().__init__(c, n_embd, n_head)
        w = c.window_size
        self.bias = Embedding((2 * w - 1) ** 2, n_head[-1])
        y, x = torch.arange(w).repeat_interleave(w), torch.arange(w).repeat(w)
        index = (y[:, None] - y + w - 1) * (2 * w - 1) + x[:, None] - x + w - 1
        self.register_buffer("index", index, persistent=False) # (w^2, w^2)

    def forward(self, x, mask, e=None, n_head=None):
        """x: (B * windows, window_size^2, n_embd), mask: (windows, window_size^2, window_size^2) or None"""
        bias = self.bias(self.index, self.heads(n_head)).permute(2, 0, 1) # (heads, T, T)
        if isinstance(n_head, torch.Tensor): # as in model.py: every head count in its own layout, with the first of the biases
            S, scale = e.p @ self.mask, e.p @ self.scale # (n_head, n_embd)
            y = window_attention(self.c_attn(x, e), S * scale, n_head.unsqueeze(-1) * S * S, self.n_head, bias, mask)
            return self.c_proj(y, None, e)
        h, a = n_head if isinstance(n_head, tuple) else (n_head or self.n_head[-1], None)
        n = self.n_embd[-1] if e is None else e.n
        qkv, ones = self.c_attn(x, e, e and Size(3 * n, 3 * h)), x.new_ones(1, n)
        y_scale = ones
        if a is not None: # the weights as in the mixture
            qkv, y_scale = torch.cat((straight_through(qkv[..., :n], e.p * e.p), qkv[..., n:]), -1), a * e.p * e.p * ones
        y = window_attention(qkv, ones * (n / h) ** -0.5, y_scale, (h,), bias, mask)
        return self.c_proj(y, e and Size(n, h), e)

    def heads(self, n_head):
        return None if n_head is None or isinstance(n_head, torch.Tensor) else Size(n_head[0] if isinstance(n_head, tuple) else n_head)


class Layer(nn.Module):

    def __init__(self, c, shift, n_embd, n_head, mlp_ratio, drop):
        super().__init__()
        self.size, self.shift, self.drop = c.window_size, shift, drop
        self.ln_1, self.ln_2 = LayerNorm(n_embd[-1], bias=True), LayerNorm(n_embd[-1], bias=True)
        self.attn, self.mlp = WindowAttention(c, n_embd, n_head), MLP(c, n_embd, mlp_ratio)

    def forward(self, x, e=None, n_head=None, mlp_ratio=None):
        """x: (B, H, W, n_embd)"""
        B, H, W = x.shape[:3]
        shift = self.shift if min(H, W) > self.size else 0 # one window is all there is
        mask = shift_mask(H, W, self.size, shift, x.device) if shift else None
        x = windows(x, self.size, shift) # (B * windows, size^2, n_embd)
        def drop(y): # an image's windows together
            return drop_samples(y.unflatten(0, (B, -1)), self.drop).flatten(0, 1) if self.training and self.drop else y

        x = x + drop(self.attn(self.ln_1(x, e), mask, e, n_head))
        x = x + drop(self.mlp(self.ln_2(x, e), e, mlp_ratio))
        return unwindows(x, self.size, shift, H, W)


def conv(module, x, *sizes):
    """A convolution of pixels whose channels come last: (B, H, W, in) -> (B, H, W, out)."""
    return module(x.permute(0, 3, 1, 2), *sizes).permute(0, 2, 3, 1)


class RSTB(nn.Module):

    def __init__(self, layers, n_embd, n_layer):
        super().__init__()
        self.layers, self.n_layer, self.conv = nn.ModuleList(layers), n_layer, Conv2d(n_embd[-1], n_embd[-1], 3, bias=True)

    def forward(self, x, e, n_layer, sizes):
        y = run_blocks(self.layers, x, n_layer, self.n_layer, [(e, *size) for size in sizes])
        return x + conv(self.conv, y, e, e)


class SwinIR(ImageNetwork):

    def __init__(self, c, arch=None):
        super().__init__()
        self.config, inner = c, SimpleNamespace(**vars(c), **BLOCK)
        if c.scale not in (2, 3, 4):
            raise SystemExit(f"scale={c.scale} is not 2, 3 or 4.")
        if c.window_size < 2 or c.patch < c.window_size or c.tile < 0 or c.tile % c.window_size or OVERLAP % c.window_size:
            raise SystemExit(f"window_size={c.window_size} must divide {OVERLAP} and tile={c.tile}, and fit into patch={c.patch}.")
        options = {name: options_of(getattr(c, name), name, whole=name != "mlp_ratio") for name in (*GLOBAL, *LAYERED)}
        self.choices = {"n_embd": Choice(options["n_embd"]), "n_rstb": Choice(options["n_rstb"], is_depth=True)}
        for r in range(1, options["n_rstb"][-1] + 1):
            self.choices[f"n_layer_{r}"] = Choice(options["n_layer"])
            self.choices |= {f"{name}_{r}": Choice(options[name], options["n_layer"][-1], f"n_layer_{r}") for name in LAYERED[1:]}
        depths = [options["n_layer"]] * options["n_rstb"][-1]
        rows = [[(options["n_head"], options["mlp_ratio"])] * options["n_layer"][-1]] * len(depths)
        if arch is not None: # nothing is left to choose
            arch = check_arch(self.choices, arch)
            depths = [(arch[f"n_layer_{r}"],) for r in range(1, arch["n_rstb"] + 1)]
            rows = [[((h,), (m,)) for h, m in zip(arch[f"n_head_{r}"], arch[f"mlp_ratio_{r}"], strict=True)]
                    for r in range(1, arch["n_rstb"] + 1)]
            options, self.choices = {name: (arch[name],) for name in GLOBAL}, {}
        self.n_embd, self.n_rstb = options["n_embd"], options["n_rstb"]
        for e in self.n_embd:
            for h in {h for row in rows for n_head, _ in row for h in n_head}:
                if e % h:
                    raise SystemExit(f"n_embd={e} is not divisible by n_head={h}: choose widths and head counts that divide.")
        check_range(c, 0, "drop_path", below=1)
        something_to_choose = any(len(choice.options) > 1 for choice in self.choices.values())
        E, total, drop = self.n_embd[-1], sum(n[-1] for n in depths), 0.0 if something_to_choose else c.drop_path
        self.conv_first, self.ln_first = Conv2d(3, E, 3, bias=True), LayerNorm(E, bias=True)
        self.rstb = nn.ModuleList()
        for r, n in enumerate(depths):
            before = sum(n[-1] for n in depths[:r])
            layers = [Layer(inner, i % 2 * (c.window_size // 2), self.n_embd, *row, drop * (before + i) / max(1, total - 1))
                      for i, row in enumerate(rows[r])]
            self.rstb.append(RSTB(layers, self.n_embd, n))
        self.ln_f, self.conv_last = LayerNorm(E, bias=True), Conv2d(E, E, 3, bias=True)
        self.up = Conv2d(E, 3 * c.scale ** 2, 3, bias=True)
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("mask", prefix_masks(self.n_embd, E), persistent=False) # (n_embd, E)
        self.register_buffer("last", torch.tensor(self.n_embd) - 1, persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def sizes(self, arch):
        """(the Size of n_embd, n_rstb, [(the Size of n_embd, n_layer, [(n_head, mlp_ratio)] of every layer)] of every block)."""
        if arch is None:
            assert all(len(c.options) == 1 for c in self.choices.values()), "a supernet needs weights or an architecture as third argument"
            return None, len(self.rstb), [(None, len(block.layers), [(None, None)] * len(block.layers)) for block in self.rstb]
        e = size_of(arch["n_embd"], self.n_embd, self.mask, self.last)
        return e, arch["n_rstb"], [(e, arch[f"n_layer_{r}"], list(zip(arch[f"n_head_{r}"], arch[f"mlp_ratio_{r}"], strict=True)))
                                   for r in range(1, len(self.rstb) + 1)]

    def forward(self, x, targets=None, arch=None):
        """x: (B, 3, H, W) of 0 to 1, targets: (B, 3, scale * H, scale * W) or None -> an image of the targets' shape, its mean absolute
        error or None. arch: None for a network without choices, else an architecture, or weights for a mixture."""
        tile = self.config.tile
        y = self.tiled(x, arch, tile) if tile and not self.training and max(x.shape[2:]) > tile else self.whole(x, arch)
        return y, None if targets is None else F.l1_loss(y, targets)

    def whole(self, x, arch):
        (h, w), s, size = x.shape[2:], self.config.scale, self.config.window_size
        e, n_rstb, blocks = self.sizes(arch)
        x = x[:, :, reflected(h, size)[:, None], reflected(w, size)]
        first = self.conv_first(x - self.mean, None, e).permute(0, 2, 3, 1) # (B, H, W, n_embd)
        x = run_blocks(self.rstb, self.ln_first(first, e), n_rstb, self.n_rstb, blocks)
        x = first + conv(self.conv_last, self.ln_f(x, e), e, e)
        y = F.pixel_shuffle(self.up(x.permute(0, 3, 1, 2), e), s) + self.mean
        return y[:, :, :s * h, :s * w]

    def tiled(self, x, arch, tile):
        """whole() from tiles that see OVERLAP pixels beyond their edges. The same where that is as far as the layers reach, about a
        window a layer; else a little different near the edges."""
        s, (H, W) = self.config.scale, x.shape[2:]
        y = x.new_empty(len(x), 3, s * H, s * W)
        for top in range(0, H, tile):
            for left in range(0, W, tile):
                y0, x0 = max(0, top - OVERLAP), max(0, left - OVERLAP)
                part = self.whole(x[:, :, y0:top + tile + OVERLAP, x0:left + tile + OVERLAP], arch)
                part = part[:, :, s * (top - y0):, s * (left - x0):][:, :, :s * tile, :s * tile]
                y[:, :, s * top:s * top + part.shape[2], s * left:s * left + part.shape[3]] = part
        return y

    def run(self, arch=None):
        p = self.config.patch
        return self.whole(self.mean.new_zeros(1, 3, p, p), arch) # a tile's overlap is not the network's cost

    def expected_cost(self, arch):
        c, weights = self.config, {name: w.double().cpu() for name, w in arch.items()}
        def chances(p, options): # that the i-th is in use
            return [sum(p[k] for k, n in enumerate(options) if n > i) for i in range(options[-1])]
        pixels, e = (-(-c.patch // c.window_size) * c.window_size) ** 2, torch.tensor(self.n_embd).double()
        convs = 27 * e + 9 * e ** 2 + 27 * c.scale ** 2 * e # weights that all pixels see
        small, attention = 6 * e + 3 * c.scale ** 2, 0 # biases, norms and tables; scores and weighted values
        for r, used in enumerate(chances(weights["n_rstb"], self.n_rstb), 1):
            convs, small = convs + used * 9 * e ** 2, small + used * e
            heads = weights[f"n_head_{r}"] @ torch.tensor(self.choices[f"n_head_{r}"].options).double() # (layers,)
            hidden_of = torch.tensor([[int(m * n) for n in self.n_embd] for m in self.choices[f"mlp_ratio_{r}"].options]).double()
            for i, chance in enumerate(chances(weights[f"n_layer_{r}"], self.rstb[r - 1].n_layer)):
                hidden, chance = weights[f"mlp_ratio_{r}"][i] @ hidden_of, used * chance # (n_embd,)
                convs = convs + chance * (4 * e ** 2 + 2 * e * hidden)
                small = small + chance * (9 * e + hidden + (2 * c.window_size - 1) ** 2 * heads[i])
                attention = attention + chance * 2 * c.window_size ** 2 * e
        p = weights["n_embd"]
        return {"params": p @ (convs + small), "flops": p @ (2 * pixels * (convs + attention))}


def genotype(arch):
    """An architecture as text: its width, and the heads and ratios of its layers."""
    rows = {name: [arch[f"{name}_{r}"] for r in range(1, arch["n_rstb"] + 1)] for name in LAYERED[1:]}
    return json.dumps({"n_embd": arch["n_embd"], **rows})


def columns(arch):
    """The columns of an architecture in a table of all."""
    return {"genotype": genotype(arch)}


def arch_of(text):
    """The architecture of a genotype, whose numbers build() compares with its options; SystemExit if it is none."""
    try:
        found = json.loads(text)
        heads, ratios = (found[name] for name in LAYERED[1:])
        assert found.keys() == {"n_embd", *LAYERED[1:]} and type(heads) is type(ratios) is list
        assert list(map(len, heads)) == list(map(len, ratios))
    except (ValueError, TypeError, KeyError, AssertionError, AttributeError, RecursionError):
        raise SystemExit(f"'{text}' is no genotype of swinir: write {EXAMPLE}, a list of its layers for each block.") from None
    arch = {"n_embd": found["n_embd"], "n_rstb": len(heads)}
    for r in range(max(len(heads), max(n_rstb))): # a block that is not there has the first options
        rows = (heads[r], ratios[r]) if r < len(heads) else ([n_head[0]] * n_layer[0], [mlp_ratio[0]] * n_layer[0])
        arch |= {f"n_layer_{r + 1}": len(rows[0])} | {f"{name}_{r + 1}": row for name, row in zip(LAYERED[1:], rows, strict=True)}
    return arch


def build(config, arch=None):
    """A network from a dict of the keys above; other keys are left alone."""
    known = defaults(globals())
    return SwinIR(SimpleNamespace(**known | {name: value for name, value in config.items() if name in known}), arch)


DATA = "pairs"
