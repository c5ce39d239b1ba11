"""Each layer's cheap form equals the padded sum that it stands for, forward and backward; with
one-hot weights it is the slice."""
import math

import pytest
import torch
import torch.nn.functional as F

from fused_ops import mixed_norm, rotate, rotation
from supernet import (NORMS, Embedding, Linear, Norm, Sampled, Sinusoidal, Size, prefix_masks,
                      slice_dim)

pytestmark = pytest.mark.usefixtures("implementation")
EMBD = (3, 5, 8)


@pytest.fixture(autouse=True)
def in_float64():
    """The forms are equal as algebra, so float64 must show it to many digits; test_model.py checks
    float32."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def close(a, b):
    scale = b.abs().max().clamp_min(1e-12)
    difference = (a - b).abs().max()
    assert difference <= 1e-10 * scale, f"max difference {difference:.3e}, scale {scale:.3e}"


def mixture(n, N, groups=1):
    p = torch.rand(len(n)).softmax(-1).requires_grad_()
    return Size(n, groups, prefix_masks(n, N, groups).double(), p, torch.tensor(n) - 1)


def pad(x, N):
    return F.pad(x, (0, N - x.shape[-1]))


def same_with_gradients(cheap, padded, inputs):
    """Two tensors with equal values, and equal gradients of a random projection to every input."""
    close(cheap, padded)
    direction = torch.randn_like(padded)
    for a, b in zip(*(torch.autograd.grad((y * direction).sum(), inputs, retain_graph=True)
                      for y in (cheap, padded)), strict=True):
        close(a, b)


@pytest.mark.parametrize("n", [(8,), (3, 8), EMBD, (1, 2, 4, 8), (1, 3, 4, 6, 8)])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm(n, bias):
    norm, x, e = Norm(8, bias), (torch.randn(2, 4, 8) + 3).requires_grad_(), mixture(n, 8)
    params = list(norm.parameters())
    torch.nn.init.normal_(norm.weight)
    if bias:
        torch.nn.init.normal_(norm.bias)
    padded = sum(p * pad(F.layer_norm(x[..., :k], (k,), norm.weight[:k], norm.bias[:k] if bias
                                      else None, norm.eps), 8)
                 for p, k in zip(e.p, n, strict=True))
    same_with_gradients(norm(x, e), padded, [x, e.p, *params])


def rms_norm(portion=1.0):
    return Norm(8, True, ("partial_rmsnorm",) if portion < 1 else ("rmsnorm",), portion)


@pytest.mark.parametrize("n", [(8,), EMBD, (1, 3, 4, 6, 8)])
@pytest.mark.parametrize("portion", [1.0, 0.5, 0.01])
def test_rms_norm(n, portion):
    """Against torch.nn.RMSNorm; with a portion, the RMS is that of the first channels of each
    width, at least one."""
    norm, x, e = rms_norm(portion), (torch.randn(2, 4, 8) + 3).requires_grad_(), mixture(n, 8)
    torch.nn.init.normal_(norm.weight)
    whole = torch.nn.RMSNorm(8, eps=norm.eps)
    whole.weight = norm.weight
    if portion == 1:
        same_with_gradients(norm(x), whole(x), [x, norm.weight])
    padded = 0
    for p, k in zip(e.p, n, strict=True):
        first = max(1, int(portion * k))
        ratio = F.rms_norm(x[..., :first], (first,), eps=norm.eps)[..., :1] / x[..., :1] # 1 / RMS
        padded = padded + p * pad(x[..., :k] * ratio * norm.weight[:k], 8)
    same_with_gradients(norm(x, e), padded, [x, e.p, norm.weight])


@pytest.mark.parametrize("kinds", [("layernorm", "rmsnorm"), ("rmsnorm", "layernorm"),
                                   ("partial_rmsnorm", "layernorm", "rmsnorm")])
@pytest.mark.parametrize("n", [None, (8,), EMBD])
def test_a_mixture_of_norms_is_their_sum(kinds, n):
    """Of every width and kind, each a norm of its own with the shared weight."""
    norm, x = Norm(8, True, kinds, 0.5), (torch.randn(2, 4, 8) + 3).requires_grad_()
    for p in norm.parameters():
        torch.nn.init.normal_(p)
    e = n and mixture(n, 8)
    a = torch.rand(len(kinds)).softmax(-1).requires_grad_()
    padded = 0
    for p, k in zip(e.p, e.n, strict=True) if e else [(1.0, 8)]:
        for w, kind in zip(a, kinds, strict=True):
            alone = Norm(k, True, (kind,), 0.5)
            alone.weight = norm.weight # of more channels: cut by the Size
            alone.bias = norm.bias if kind == "layernorm" else None
            padded = padded + w * p * pad(alone(x[..., :k], Size(k)), 8)
    inputs = [x, a, *norm.parameters(), *([e.p] if e else [])]
    same_with_gradients(norm(x, e, Sampled(kinds, weights=a)), padded, inputs)


def test_every_norm_is_its_formula():
    x = torch.randn(5, 8) + 2
    for kind, formula in (("layernorm", lambda x: (x - x.mean(-1, keepdim=True)) / (x.var(
            -1, correction=0, keepdim=True) + 1e-5).sqrt()),
            ("rmsnorm", lambda x: x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt())):
        scale, shift = NORMS[kind](x, 1e-5)
        close(x * scale - shift, formula(x))


def test_sinusoidal():
    """Written out entry by entry; of a mixture: the padded sum of the tables."""
    def table(n):
        wave = (math.sin, math.cos)
        return torch.tensor([[wave[i % 2](t / 10000 ** ((i - i % 2) / n)) for i in range(n)]
                             for t in range(6)])
    layer, e, pos = Sinusoidal(8), mixture(EMBD, 8), torch.arange(6)
    assert (layer(pos) - table(8)).abs().max() < 1e-5
    assert (layer(pos[2:], Size(5)) - table(5)[2:]).abs().max() < 1e-5
    padded = sum(p * pad(table(k), 8) for p, k in zip(e.p, EMBD, strict=True))
    assert (layer(pos, e) - padded).abs().max() < 1e-5


def turned(x, n_head, past=0):
    """RoPE by complex numbers: channels 2i and 2i + 1 are a number that e^(i t theta) turns. x:
    (B, T, n) -> (B, n_head, T, d)."""
    # (B, n_head, T, d / 2)
    z = torch.view_as_complex(x.unflatten(2, (n_head, -1, 2)).transpose(1, 2).contiguous())
    d = 2 * z.shape[3]
    theta = torch.tensor([10000 ** (-2 * i / d) for i in range(d // 2)])
    angle = torch.arange(past, past + z.shape[2]).unsqueeze(1) * theta
    return torch.view_as_real(z * torch.polar(torch.ones_like(angle), angle)).flatten(3)


@pytest.mark.parametrize("n_head", [1, 3])
def test_rotary(n_head):
    """Against complex numbers; and a score depends on the content and on the distance alone."""
    x, size = torch.randn(2, 7, 24), 24 // n_head
    heads = rotate(x, *rotation(size, torch.arange(5, 12))).unflatten(2, (n_head, -1))
    # angles are float32
    assert (heads.transpose(1, 2) - turned(x, n_head, 5)).abs().max() < 1e-5
    q, k = (rotate(t[:, :1].expand(2, 7, 24), *rotation(size, torch.arange(7)))
            .unflatten(2, (n_head, -1)).transpose(1, 2) for t in (x, torch.randn(2, 7, 24)))
    scores = q @ k.transpose(-1, -2) # of the same query and key everywhere
    for distance in range(-6, 7):
        on = scores.diagonal(distance, 2, 3)
        assert (on - on[..., :1]).abs().max() < 1e-5
    assert (scores[..., 0, 1:] - scores[..., 0, :1]).abs().max() > 0.1


def test_a_weighted_rotation_turns_by_a_part_of_the_angle():
    """By none with weight 0, and its weight has a gradient there too."""
    x, weight = torch.randn(2, 7, 24), torch.zeros((), requires_grad=True)
    still = rotate(x, *rotation(8, torch.arange(7), weight))
    assert torch.equal(still, x)
    still.square()[..., 0].sum().backward()
    assert weight.grad.isfinite() and weight.grad != 0
    half = rotate(x, *rotation(8, torch.arange(7), 0.5))
    twice = rotate(half, *rotation(8, torch.arange(7), 0.5))
    assert (twice - rotate(x, *rotation(8, torch.arange(7)))).abs().max() < 1e-5


def test_layer_norm_far_from_zero():
    """Block statistics must not cancel: channels around 1000 with a deviation of 1, in float32."""
    x, n, p = (torch.randn(4, 64) + 1000).float(), (16, 48, 64), torch.tensor([0.2, 0.3, 0.5])
    exact = sum(pk * pad(F.layer_norm(x[..., :k].double(), (k,)), 64)
                for pk, k in zip(p, n, strict=True))
    found = mixed_norm(x, torch.ones(64).float(), None, p.float(), None, n, 1e-5)
    assert (found - exact).abs().max() < 2e-3


@pytest.mark.parametrize("bias", [True, False])
def test_linear_sizes_chosen_together(bias):
    """Rows int(m e) by columns e, every (e, m) weighted by the product of the two choices: c_fc,
    and c_proj transposed."""
    ratios, x = (1, 2.5), torch.randn(2, 4, 8, requires_grad=True)
    linear, e = Linear(8, 20, bias), mixture(EMBD, 8)
    alpha = torch.randn(2, requires_grad=True)
    q = alpha.softmax(-1) # rows sum to 1: gradients are compared behind the softmax
    share = prefix_masks([[int(m * k) for m in ratios] for k in EMBD], 20).double()
    n = tuple(sorted({int(m * k) for m in ratios for k in EMBD}))
    hidden = Size(n, mask=torch.einsum("m,emh->eh", q, share), p=e.p, last=torch.tensor(n) - 1)
    pairs = [(pi * qj, k, int(m * k)) for pi, k in zip(e.p, EMBD, strict=True)
             for qj, m in zip(q, ratios, strict=True)]
    padded = sum(w * pad(F.linear(x[..., :k], linear.weight[:o, :k], linear.bias[:o] if bias
                                  else None), 20) for w, k, o in pairs)
    same_with_gradients(linear(x, e, hidden), padded, [x, e.p, alpha, *linear.parameters()])
    both = Linear(8, 40, bias) # a gated MLP's: the same rows of two parts
    halves = [Linear(8, 20, bias) for _ in range(2)]
    for i, half in enumerate(halves):
        half.weight, half.bias = (p if p is None
                                  else torch.nn.Parameter(p[20 * i:20 * i + 20].detach())
                                  for p in (both.weight, both.bias))
    apart = torch.cat([half(x, e, hidden) for half in halves], -1)
    same_with_gradients(both(x, e, hidden.doubled), apart, [x, e.p, alpha])
    back, h = Linear(20, 8, bias), torch.randn(2, 4, 20, requires_grad=True)
    padded = sum(w * pad(F.linear(h[..., :o], back.weight[:k, :o], back.bias[:k] if bias else None),
                         8) for w, k, o in pairs)
    same_with_gradients(back(h, hidden, e), padded, [h, e.p, alpha, *back.parameters()])


@pytest.mark.parametrize("sides", ["in", "out", "both"])
def test_linear_sizes_chosen_independently(sides):
    linear, x = Linear(8, 6), torch.randn(3, 8, requires_grad=True)
    i = mixture(EMBD, 8) if sides != "out" else None
    o = mixture((2, 6), 6) if sides != "in" else None
    ins = zip(i.p, i.n, strict=True) if i else [(torch.tensor(1.0), 8)]
    outs = list(zip(o.p, o.n, strict=True)) if o else [(torch.tensor(1.0), 6)]
    padded = sum(a * b * pad(F.linear(x[..., :c], linear.weight[:r, :c]), 6)
                 for a, c in ins for b, r in outs)
    padded = padded + sum(b * pad(linear.bias[:r], 6) for b, r in outs)
    inputs = [x, *linear.parameters(), *(s.p for s in (i, o) if s)]
    same_with_gradients(linear(x, i, o), padded, inputs)


def test_embedding():
    table, idx, e = Embedding(11, 8), torch.randint(11, (2, 5)), mixture(EMBD, 8)
    padded = sum(p * pad(F.embedding(idx, table.weight[:, :k]), 8)
                 for p, k in zip(e.p, EMBD, strict=True))
    same_with_gradients(table(idx, e), padded, [e.p, table.weight])


@pytest.mark.parametrize("k", range(3))
def test_one_hot_is_the_slice(k):
    """With all weight on one option, channels beyond it are exactly 0, whatever stands there."""
    e = mixture(EMBD, 8)._replace(p=F.one_hot(torch.tensor(k), 3).double())
    n, x = Size(EMBD[k]), torch.randn(4, 8)
    idx = torch.randint(11, (4,))
    for layer, mixed, hard in (
            (Norm(8, True), lambda f: f(x, e), lambda f: f(x[:, :n.n], n)),
            (rms_norm(0.5), lambda f: f(x, e), lambda f: f(x[:, :n.n], n)),
            (Sinusoidal(8), lambda f: f(torch.arange(4), e), lambda f: f(torch.arange(4), n)),
            (Linear(8, 8), lambda f: f(x, e, e), lambda f: f(x[:, :n.n], n, n)),
            (Embedding(11, 8), lambda f: f(idx, e), lambda f: f(idx, n))):
        for p in layer.parameters():
            torch.nn.init.normal_(p)
        y = mixed(layer)
        close(y[:, :n.n], hard(layer))
        assert not y[:, n.n:].any()


def test_slice_dim_slices_every_part():
    """Two of four channels of each of three equal parts: what a head count, or q, k and v side by
    side, use."""
    w = torch.arange(12.0)
    assert slice_dim(w, 0, Size(6, groups=3)).tolist() == [0, 1, 4, 5, 8, 9]
    assert prefix_masks((6, 12), 12, groups=3)[0].nonzero().flatten().tolist() == [0, 1, 4, 5, 8, 9]
    for whole in (None, Size(12), Size(12, groups=3)): # copies nothing
        assert slice_dim(w, 0, whole).tolist() == w.tolist()
        assert slice_dim(w, 0, whole).data_ptr() == w.data_ptr()
