"""
AutoFormer (Chen et al. 2021): vision transformers whose width, depth, heads and MLPs are chosen; T
has 1.06e9 architectures.

    a class token and patches by a convolution, + learned positions -> blocks as in GPT-2, with
    relative positions -> LayerNorm -> mean of the patches, without the class token -> classifier

The keys are those of T; S and B are in config/. Heads have a fixed size: fewer of them are the
first ones, and the queries, keys and values are each the first rows of their own matrix. All
choices are entangled by mixed weights. The genotype is the width, and heads x ratio of every layer:
192: 3x3.5 4x4 ...

The published MACs (1.344 G, 4.892 G and 11.237 G of the subnets of T, S and B) are from a formula
with one token too many, a classifier on each token, norms, and 28 multiply-adds a pair of tokens
for the relative positions of all heads together. net.cost() has 2 FLOPs for each multiply-add that
is computed: 2 x 1.443 G, 5.086 G and 11.565 G. Without relative positions that is 2 x 1.283 G,
4.774 G and 11.045 G.
"""
import re
from types import SimpleNamespace

import torch
import torch.nn as nn
from torch.nn import functional as F

from configurator import ConfigError, check_range
from model import MLP
from search_spaces.convs import Conv2d, ImageNetwork, drop_path as drop, settings, with_loss
from supernet import (
    ALL, Linear, Norm, Size, options_of, prefix_masks, run_blocks, slice_dim, straight_through,
    times_weight, transformer_choices, transformer_sizes,
)

# -----------------------------------------------------------------------------
n_embd = [192, 216, 240] # of all layers
n_layer = [12, 13, 14] # blocks
n_head = [3, 4] # of each layer
mlp_ratio = [3.5, 4] # of each layer
head_size = 64 # channels a head
patch_size = 16 # pixels of a patch's side
rel_pos_clip = 14 # patches further apart count as this many rows or columns apart
dropout = 0.0 # of the embeddings and of what a block adds
drop_path = 0.1 # probability that a sample skips the last layer, in training; 0 in the first
# -----------------------------------------------------------------------------

DATA = "images" # the kind of data it takes
PUBLISHED = { # the ratio 3 of T is not among the released options
    "autoformer_t": "192: 3x3.5 3x3.5 3x3 3x3.5 3x3 3x3 3x4 3x4 3x3.5 3x4 4x3.5 3x4 3x3.5",
    "autoformer_s": "384: 6x3 6x3.5 5x3 7x3.5 5x4 5x4 5x4 6x4 6x4 7x4 7x4 6x3.5 7x4",
    "autoformer_b": "576: 9x3.5 9x3.5 9x4 9x3.5 9x4 10x3.5 9x3.5 9x3 10x4 9x4 10x3 9x4 9x3 10x3.5",
}


class PatchEmbedding(nn.Module):
    """(B, in_channels, H, W) -> (B, N, n_embd): a class token and the patches, row by row, with
    their positions."""
    def __init__(self, c, E, N):
        super().__init__()
        self.proj = Conv2d(c.in_channels, E, c.patch_size, c.patch_size, bias=True, padding=0)
        self.cls_token = nn.Parameter(torch.empty(1, 1, E))
        self.pos_embed = nn.Parameter(torch.empty(1, N, E))

    def slice_params(self, e=None):
        return {"cls_token": slice_dim(self.cls_token, 2, e),
                "pos_embed": slice_dim(self.pos_embed, 2, e)}

    def forward(self, x, e=None):
        part = e and e.unweighted # the weights are multiplied once, behind the sum
        slices = self.slice_params(part)
        x = self.proj(x, None, part).flatten(2).transpose(1, 2) # (B, patches, n_embd)
        cls_token = slices["cls_token"].expand(len(x), -1, -1).to(x.dtype)
        x = torch.cat((cls_token, x), 1) + slices["pos_embed"]
        return x * e.coverage if e and e.is_mixture else times_weight(x, e)


def offsets(side, clip):
    """For a class token and side x side patches, N tokens in all: index (N, n), one_hot (N, n).

    The offset of a pair of tokens in rows is an index into a table of
    clip(row_j - row_i) + clip + 1, or 0 with the class token; that in columns one into a second
    table below it. one_hot[j] has the row and the column of token j, and index[i] the entries of
    the tables for token i and every row and column: table[index[i]].T @ one_hot[j] is the sum of
    the entries of both offsets. n is padded to a multiple of 8, with which attention is faster.
    """
    position = torch.arange(side)
    patches = torch.cartesian_prod(position, position) + 1
    token = torch.cat((torch.zeros(1, 2, dtype=torch.long), patches)) # (N, 2), 0: the class token
    other = torch.arange(side + 1)
    index = (other - token.unsqueeze(-1)).clamp(-clip, clip) + clip + 1 # (N, 2, side + 1)
    index = index * ((other > 0) & (token > 0).unsqueeze(-1)) + torch.tensor([[0], [2 * clip + 2]])
    pad = (0, -2 * (side + 1) % 8)
    return F.pad(index.flatten(1), pad), F.pad(F.one_hot(token, side + 1).flatten(1), pad).float()


class Attention(nn.Module):
    """Attention of every token to all, with relative positions K and V, each the sum of an entry
    for rows and one for columns (Shaw et al. 2018):

        y_i = sum_j softmax_j(q_i (k_j + K_ij) / sqrt(head_size)) (v_j + V_ij)

    No K_ij is ever built. q_i K_ij is the sum of two entries of q_i @ table, one for the row and
    one for the column of j: a product with the one-hot row and column of j. So these entries are
    further channels of q, and the one-hot vectors further channels of k. As further channels of v
    the one-hot vectors sum up the attention to each row and column, which is then multiplied by the
    table of V. It takes one call of a plain attention, of 96 channels at 224 pixels.
    """
    def __init__(self, c, n_embd, n_head, side):
        super().__init__()
        self.n_head, self.head_size = n_head, c.head_size
        inner = n_head[-1] * c.head_size
        self.qkv, self.proj = Linear(n_embd[-1], 3 * inner), Linear(inner, n_embd[-1])
        entries = 2 * (2 * c.rel_pos_clip + 2) # of the table for rows, and of that for columns
        self.rel_pos_k = nn.Parameter(torch.empty(entries, c.head_size))
        self.rel_pos_v = nn.Parameter(torch.empty(entries, c.head_size))
        index, one_hot = offsets(side, c.rel_pos_clip)
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("one_hot", one_hot, persistent=False)
        mask = prefix_masks([h * c.head_size for h in n_head], inner) # (n_head, inner)
        self.register_buffer("mask", mask, persistent=False)
        self.resid_dropout = nn.Dropout(c.dropout)

    def slice_params(self, e=None, n_head=ALL): # the tables are those of every head
        return {"rel_pos_k": self.rel_pos_k, "rel_pos_v": self.rel_pos_v}

    def forward(self, x, e=None, n_head=ALL):
        """x: (B, N, n_embd) -> the same. In a mixture of head counts, head i is multiplied by the
        total weight of the counts that have it."""
        h = n_head.option or self.n_head[-1]
        n, all_heads = h * self.head_size, n_head.option is None
        qkv = self.qkv(x, e, None if all_heads else Size(3 * n, 3)) # (B, N, 3n)
        q, k, v = qkv.unflatten(2, (3, h, -1)).permute(2, 0, 3, 1, 4) # (B, h, N, head_size) each
        y = self.attend(q, k, v).transpose(1, 2).flatten(2) # (B, N, n)
        if n_head.is_mixture:
            y = y * (n_head.weights @ self.mask).to(y.dtype)
        else:
            y = straight_through(y, n_head.weight)
        return self.resid_dropout(self.proj(y, None if all_heads else Size(n), e))

    def attend(self, q, k, v):
        """(B, h, N, head_size) each -> the same."""
        index = self.index.expand(*q.shape[:2], -1, -1) # (B, h, N, n)
        one_hot = self.one_hot.to(k.dtype).expand(*q.shape[:2], -1, -1)
        of_rows_and_columns = (q @ self.rel_pos_k.T).gather(3, index) # (B, h, N, n)
        q = torch.cat((q, of_rows_and_columns), 3)
        k, v = torch.cat((k, one_hot), 3), torch.cat((v, one_hot), 3)
        y = F.scaled_dot_product_attention(q, k, v, scale=self.head_size ** -0.5)
        y, attention = y.split((self.head_size, index.shape[3]), 3)
        of_entries = attention.new_zeros(*attention.shape[:3], len(self.rel_pos_v))
        return y + of_entries.scatter_add(3, index, attention) @ self.rel_pos_v


class Block(nn.Module):

    def __init__(self, c, n_embd, n_head, mlp_ratio, side, drop_path):
        super().__init__()
        self.drop_path = drop_path
        self.ln_1, self.attn = Norm(n_embd[-1], bias=True), Attention(c, n_embd, n_head, side)
        self.ln_2 = Norm(n_embd[-1], bias=True)
        of_mlp = SimpleNamespace(bias=True, dropout=c.dropout)
        self.mlp = MLP(of_mlp, n_embd, mlp_ratio, ("exact_gelu",))

    def forward(self, x, e=None, n_head=ALL, mlp_ratio=ALL):
        p = self.drop_path if self.training else 0.0
        x = x + drop(self.attn(self.ln_1(x, e), e, n_head), p)
        return x + drop(self.mlp(self.ln_2(x, e), e, mlp_ratio), p)


class AutoFormer(ImageNetwork):
    no_weight_decay = ("cls_token", "pos_embed", "rel_pos_k", "rel_pos_v")

    def __init__(self, c, arch=None):
        super().__init__()
        self.config = c
        check_range(c, 1, "patch_size", "head_size", "rel_pos_clip")
        check_range(c, 0, "dropout", "drop_path", below=1)
        if c.img_size % c.patch_size:
            divisors = [str(n) for n in range(1, c.img_size + 1) if c.img_size % n == 0]
            raise ConfigError(f"patch_size={c.patch_size} does not divide img_size={c.img_size}: "
                              f"choose one of {', '.join(divisors)}.")
        self.n_layer, layers = transformer_choices(self, c, arch)
        self.n_embd = layers[0]["n_embd"]
        E, side = self.n_embd[-1], c.img_size // c.patch_size
        # a layer has its own probability, whatever the depth of the network
        deepest = options_of(c.n_layer, "n_layer")[-1]
        drops = [c.drop_path * i / max(1, deepest - 1) for i in range(deepest)]
        self.embed, self.dropout = PatchEmbedding(c, E, side * side + 1), nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList([Block(c, self.n_embd, layer["n_head"], layer["mlp_ratio"],
                                           side, drops[i])
                                     for i, layer in enumerate(layers)])
        self.ln_f, self.classifier = Norm(E, bias=True), Linear(E, c.num_classes)
        self.register_buffer("mask", prefix_masks(self.n_embd, E), persistent=False) # (n_embd, E)
        self.register_buffer("last", torch.tensor(self.n_embd) - 1, persistent=False)
        for name, p in self.named_parameters():
            if name.endswith(self.no_weight_decay):
                nn.init.trunc_normal_(p, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x, targets=None, arch=None):
        """See ImageNetwork."""
        e, n_layer, layers = transformer_sizes(self, arch)
        x = self.dropout(self.embed(x, e)) # (B, N, n_embd)
        args = [(e, layer["n_head"], layer["mlp_ratio"]) for layer in layers]
        x = run_blocks(self.blocks, x, n_layer, args)
        x = self.ln_f(x[:, 1:], e).mean(1) # (B, n_embd)
        return with_loss(self.classifier(x, e), targets)

    def expected_cost(self, weights):
        c, w = self.config, {name: p.double().cpu() for name, p in weights.items()}
        e = torch.tensor(self.n_embd).double() # (n_embd,)
        attn, pixels = self.blocks[0].attn, c.in_channels * c.patch_size ** 2
        N, tables = len(attn.index), attn.rel_pos_k.numel()
        # multiply-adds after a head's q, k and v
        of_head = 2 * N * tables + 2 * N * N * (c.head_size + attn.index.shape[1])
        params = (pixels + N + 4 + c.num_classes) * e + c.num_classes
        flops = 2 * ((N - 1) * pixels + c.num_classes) * e
        n_head = torch.tensor(self.choices["n_head"].options).double()
        ratios = self.choices["mlp_ratio"].options
        n_hidden = torch.tensor([[int(n * r) for r in ratios] for n in self.n_embd]).double()
        for i, (h, m) in enumerate(zip(w["n_head"], w["mlp_ratio"], strict=True)):
            # the chance that this layer runs
            used = sum(p for p, n in zip(w["n_layer"], self.n_layer, strict=True) if n > i)
            h, hidden = h @ n_head, n_hidden @ m # (), (n_embd,)
            inner = c.head_size * h
            of_layer = 4 * inner * e + 3 * inner + 2 * hidden * e + hidden + 6 * e + 2 * tables
            params = params + used * of_layer
            flops = flops + 2 * used * (N * (4 * inner + 2 * hidden) * e + h * of_head)
        return {"params": w["n_embd"] @ params, "flops": w["n_embd"] @ flops}


def genotype(arch):
    """An architecture as text."""
    layers = zip(arch["n_head"], arch["mlp_ratio"], strict=True)
    return f"{arch['n_embd']}: " + " ".join(f"{h}x{r:g}" for h, r in layers)


def columns(arch):
    """The columns of a table that say which architecture a row is about."""
    return {"genotype": genotype(arch)}


def arch_of(text):
    """The architecture of a genotype, or of a name in PUBLISHED. Raises ConfigError if the text is
    neither; whether its numbers are options is for build() to check."""
    text = PUBLISHED.get(text, text)
    if not re.fullmatch(r"\d+:( \d+x\d+(\.\d+)?)+", text):
        raise ConfigError(f"'{text}' is not a genotype of autoformer: write "
                          f"{', '.join(PUBLISHED)}, or the width and every layer's heads x ratio, "
                          "such as '192: 3x3.5 4x4'.")
    width, *layers = text.split()
    n_head, mlp_ratio = zip(*(layer.split("x") for layer in layers), strict=True)
    return {"n_embd": int(width[:-1]), "n_layer": len(layers),
            "n_head": list(map(int, n_head)), "mlp_ratio": list(map(float, mlp_ratio))}


def build(config, arch=None):
    """A network from a dict of the keys above, with img_size, in_channels and num_classes."""
    known = settings(config, globals(), img_size=224, in_channels=3, num_classes=1000)
    return AutoFormer(known, arch)
