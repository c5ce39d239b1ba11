"""The law of exactness for GPT: one-hot supernet == hard supernet == extracted network, in logits,
loss and gradients."""
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, TINY_KINDS, TINY_SEARCH, TINY_SPACES, flags, script, stops
from torch.utils.flop_counter import FlopCounterMode

from bench import peak
from configurator import ConfigError
import model
from fused_ops import rotation
from model import MLP, PLAIN, Now, build
from optim_nas import METHODS, uniform
import search_spaces
from search_spaces import space_module
from supernet import Sampled, Size, extremes, one_hot, straight_through_arch, transformer_sizes

SPACES = { # lists of lengths 1 to 4 that differ between choices, and sizes of no config
    "three": dict(n_layer=[1, 2, 3], n_embd=[12, 24, 36], n_head=[2, 3, 6], mlp_ratio=[1, 2.5, 4]),
    "ragged": dict(n_layer=[2, 3], n_embd=[16, 24, 32, 48], n_head=[1, 8], mlp_ratio=[1.5]),
    "single": dict(n_layer=[2], n_embd=[40], n_head=[5], mlp_ratio=[3]),
    "numbers": dict(n_layer=2, n_embd=[20, 60], n_head=4, mlp_ratio=[1, 2, 3, 4]),
}
EVEN = dict(n_layer=[1, 2], n_embd=[12, 24, 36], n_head=[2, 4], mlp_ratio=[1, 2.5])
BLOCKS = { # every kind of block that may live in a supernet, a few at a time
    "llama": dict(norm="rmsnorm", position="rope", activation="swiglu", bias=False),
    "gpt-j": dict(position="rope", activation="silu", residual="parallel"),
    "original": dict(position="sinusoidal", activation="relu", residual="post"),
    "branch": dict(activation="geglu", residual="branch", loss_chunk=7),
    "partial": dict(norm="partial_rmsnorm", prmsnorm_pct=0.3, activation="mish"),
    "post": dict(norm="partial_rmsnorm", prmsnorm_pct=0.5, position="rope", activation="reglu",
                 residual="post"),
    "modern": dict(norm="rmsnorm", position="rope", qk_norm=True, activation="relu2", n_kv_head=1,
                   window=5, bias=False),
    # lists: choices
    "kinds": dict(norm=["layernorm", "rmsnorm"], position=["learned", "sinusoidal", "rope", "none"],
                  qk_norm=[False, True], activation=list(model.ACTIVATIONS), n_kv_head=[1, 2, 0],
                  window=[3, 7, 0]),
    "residuals": dict(residual=list(model.RESIDUALS), norm=["rmsnorm", "layernorm"]),
    "two residuals": dict(residual=["parallel", "pre"]),
    "two": dict(norm=["rmsnorm", "layernorm"], position=["rope", "learned"], qk_norm=[True, False],
                activation=["swiglu", "reglu"], n_kv_head=[1, 2], window=[2, 4], bias=False),
    "any heads": dict(norm=["partial_rmsnorm", "layernorm"], prmsnorm_pct=0.5, window=[4, 0],
                      position=["sinusoidal", "none"], activation=["gelu", "relu2"],
                      residual="branch"),
}
FIXED_HEADS = [name for name, block in BLOCKS.items() # others have heads of any size, too
               if "rope" in block.get("position", ()) or "n_kv_head" in block]
BLOCKS_AND_HEADS = [(name, head_size) for name in BLOCKS for head_size in (0, 4)
                    if head_size or name not in FIXED_HEADS]
PLAIN_BLOCKS = [name for name, block in BLOCKS.items() # without choices
                if not any(type(o) is list for o in block.values())]
MOE = dict(n_expert=4, top_k=2, activation="swiglu")


def supernet(space, **rest):
    torch.manual_seed(1)
    net = build(dict(block_size=12, vocab_size=29) | (EVEN if space == "even" else SPACES[space]) |
                rest)
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(0, 0.3) # the initial ones and zeros would hide a wrong slice
    return net


def tokens(seed=0, B=2, T=9):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(29, (B, T), generator=g), torch.randint(29, (B, T), generator=g)


def agree(a, b, what):
    if a is None and b is None: # logits with loss_chunk
        return
    scale = b.abs().max().clamp_min(1e-12).item()
    worst = (a - b).abs().max().item()
    assert worst <= 1e-5 * scale, f"{what}: differ by {worst:.2e}, largest {scale:.2e}"


def some_archs(net):
    """Every (n_embd, n_head) pair, with random depths, ratios and other heads; then the smallest
    and the largest."""
    g = torch.Generator().manual_seed(0)
    for e, h in itertools.product(net.choices["n_embd"].options, net.choices["n_head"].options):
        arch = uniform(net.choices, g)
        yield arch | {"n_embd": e, "n_head": [h, *arch["n_head"][1:]]}
    yield from extremes(net.choices)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("head_size", [0, 4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.usefixtures("implementation")
def test_law_of_exactness(space, head_size, bias):
    check_law_of_exactness(supernet(space, head_size=head_size, bias=bias))


@pytest.mark.parametrize("block, head_size", BLOCKS_AND_HEADS)
@pytest.mark.usefixtures("implementation")
def test_law_of_exactness_of_every_block_option(block, head_size):
    check_law_of_exactness(supernet("even", head_size=head_size, **BLOCKS[block]))


def check_law_of_exactness(net):
    x, y = tokens()
    for arch in some_archs(net):
        small = net.extract(arch)
        alone, alone_loss = small(x, y)
        alone_loss.backward()
        for form, third in (("one-hot", one_hot(net.choices, arch)), ("hard", arch)):
            net.zero_grad()
            logits, loss = net(x, y, third)
            loss.backward()
            agree(logits, alone, f"{form} logits of {arch}")
            agree(loss, alone_loss, f"{form} loss of {arch}")
            # extraction copies slices, so it carries the supernet's gradients to the places of the
            # small network's own
            shared = net.extract(arch)
            for p, q in zip(gradients_as_weights(net).extract(arch).parameters(),
                            small.parameters(), strict=True):
                agree(p, q.grad, f"{form} gradient of {arch}")
            outside = sum(p.grad.abs().sum() for p in net.parameters() if p.grad is not None)
            inside = sum(p.grad.abs().sum() for p in small.parameters())
            agree(outside, inside, f"{form} gradient outside the slices of {arch}")
            assert sum(p.numel() for p in shared.parameters()) == net.cost(arch)["params"]
            assert small.cost() == net.cost(arch)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm", "partial_rmsnorm"])
def test_norms_of_16_bit_numbers(norm, dtype):
    """With residual=branch they come from a matrix product: the gradients of a new network are
    those of float32 in half precision too."""
    torch.manual_seed(0)
    net = build(dict(n_layer=2, n_embd=[64, 128], n_head=[2, 4], mlp_ratio=[1, 2], vocab_size=20,
                     block_size=16, norm=norm,
                     residual="branch"))
    x = torch.randint(20, (4, 16))
    largest, smallest = extremes(net.choices)[1], one_hot(net.choices, extremes(net.choices)[0])
    for third in (largest, {name: w.softmax(-1) for name, w in smallest.items()}):
        gradients = []
        for enabled in (False, True):
            net.zero_grad()
            with torch.autocast("cpu", dtype, enabled):
                net(x, x, third)[1].backward()
            gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()
                                        if p.grad is not None]))
        difference = (gradients[1] - gradients[0]).norm()
        assert difference <= 3 * torch.finfo(dtype).eps * gradients[0].norm()


def gradients_as_weights(net):
    other = build(vars(net.config))
    with torch.no_grad():
        for p, q in zip(other.parameters(), net.parameters(), strict=True):
            p.copy_(torch.zeros_like(q) if q.grad is None else q.grad)
    return other


def test_mixed_depth_is_the_sum_over_depths():
    """With the (nonlinear) final norm replaced by the identity, the logits are the weighted sum of
    those of each depth."""
    net, (x, y) = supernet("three", n_embd=24, n_head=2, mlp_ratio=2), tokens()
    net.transformer.ln_f.forward = lambda h, e, norm: h
    weights = {name: torch.ones(c.shape) for name, c in net.choices.items()}
    weights |= {"n_layer": torch.tensor([0.5, 0.2, 0.3])}
    parts = [net(x, y, {"n_layer": d, "n_embd": 24, "n_head": [2] * d, "mlp_ratio": [2] * d})[0]
             for d in (1, 2, 3)]
    agree(net(x, y, weights)[0], 0.5 * parts[0] + 0.2 * parts[1] + 0.3 * parts[2], "logits")


@pytest.mark.parametrize("head_size", [0, 4])
@pytest.mark.usefixtures("implementation")
def test_attention_mixture_is_its_padded_sum(head_size):
    """sum_h a_h of the heads' outputs, each in the layout and with the scale of h; in and out of
    the projections mixed once."""
    net = supernet("three", head_size=head_size)
    attn, e_options, E = net.transformer.h[0].attn, (12, 24, 36), 36
    p = torch.tensor([0.2, 0.5, 0.3], requires_grad=True)
    a = torch.tensor([0.1, 0.6, 0.3], requires_grad=True)
    x = torch.randn(2, 5, E, requires_grad=True)
    e = Size(e_options, mask=net.mask, p=p, last=net.last)
    cheap = attn(x, PLAIN._replace(e=e, n_head=Sampled(weights=a)))

    width = sum(pk * (torch.arange(E) < k) for pk, k in zip(p, e_options, strict=True))
    q, k, v = F.linear(x * width, attn.c_attn.weight, attn.c_attn.bias).chunk(3, -1)
    inner, y = q.shape[-1], 0
    for ah, h in zip(a, (2, 3, 6), strict=True):
        if head_size:
            heads = [t[..., :h * head_size].reshape(2, 5, h, -1).transpose(1, 2) for t in (q, k, v)]
            out = F.scaled_dot_product_attention(*heads, is_causal=True)
            out = out.transpose(1, 2).reshape(2, 5, -1)
            y = y + ah * F.pad(out, (0, inner - out.shape[-1]))
        else:
            masks = [((torch.arange(E) % (E // h)) < n // h).float() for n in e_options]
            mask = sum(pk * m for pk, m in zip(p, masks, strict=True))
            scaled = sum(pk * m * (n / h) ** -0.5
                         for pk, m, n in zip(p, masks, e_options, strict=True))
            heads = [t.reshape(2, 5, h, -1).transpose(1, 2)
                     for t in (q * scaled, k * mask, v * mask)]
            of_heads = F.scaled_dot_product_attention(*heads, is_causal=True, scale=1.0)
            y = y + ah * mask * of_heads.transpose(1, 2).reshape(2, 5, -1)
    padded = F.linear(y, attn.c_proj.weight, attn.c_proj.bias) * width
    agree(cheap, padded, "output")
    direction, inputs = torch.randn_like(padded), [x, p, a, attn.c_attn.weight, attn.c_proj.weight]
    for g, g0 in zip(*(torch.autograd.grad((out * direction).sum(), inputs)
                       for out in (cheap, padded)), strict=True):
        agree(g, g0, "gradient")


@pytest.mark.usefixtures("implementation")
def test_a_mixture_of_kinds_is_its_formula():
    """Attention and MLP written out: heads normed and turned in part, heads of keys and values
    mixed, the softmax's terms times the share of the windows, activations summed."""
    net = supernet("even", head_size=4, position=["learned", "rope"], qk_norm=[False, True],
                   n_kv_head=[1, 2, 0], window=[2, 4, 0], activation=["gelu", "swiglu", "relu2"])
    g = torch.Generator().manual_seed(0)
    weights = {name: torch.rand(c.shape, generator=g).softmax(-1).requires_grad_()
               for name, c in net.choices.items()}
    e, _, (now, *_) = transformer_sizes(net, weights)
    block, x, T = net.transformer.h[0], torch.randn(2, 7, 36, requires_grad=True), 7
    p_rope, (p_plain, p_norm) = weights["position"][1], weights["qk_norm"]
    now = Now(e, **now, rope=rotation(4, torch.arange(T), p_rope))
    attn, mlp, S = block.attn, block.mlp, e.coverage

    qkv = F.linear(x * S, attn.c_attn.weight, attn.c_attn.bias).unflatten(2, (12, 4))
    q, k, v = qkv.transpose(1, 2).split(4, dim=1) # (2, 4, T, 4)
    angle = torch.outer(torch.arange(T), torch.tensor([1.0, 0.01])) * p_rope

    def prepared(t):
        t = t * (p_plain + p_norm / (t.square().mean(-1, keepdim=True) + 1e-5).sqrt())
        z = torch.view_as_complex(t.unflatten(3, (2, 2)).contiguous())
        return torch.view_as_real(z * torch.polar(torch.ones_like(angle), angle)).flatten(3)

    def mixed(t): # 1, 2 or all of the 4 heads
        a = weights["n_kv_head"][0]
        return a[0] * t[:, [0, 0, 0, 0]] + a[1] * t[:, [0, 1, 0, 1]] + a[2] * t
    q, k, v = prepared(q), mixed(prepared(k)), mixed(v)
    back = torch.arange(T)[:, None] - torch.arange(T)
    share = sum(w * ((back >= 0) & (back < n)) for w, n in
                zip(weights["window"][0], (2, 4, 7), strict=True))
    terms = (q @ k.transpose(2, 3) / 2).exp() * share
    y = (terms / terms.sum(-1, keepdim=True) @ v).transpose(1, 2) # (2, T, 4, 4)
    h = weights["n_head"][0]
    y = y * torch.stack([h.sum(), h.sum(), h[1], h[1]])[:, None] # of 2 or 4 heads
    expected = F.linear(y.flatten(2), attn.c_proj.weight, attn.c_proj.bias) * S

    hidden = mlp.hidden(e, Sampled(weights=weights["mlp_ratio"][0]))
    gate, up = mlp.c_fc(x, e, hidden.doubled).chunk(2, -1)
    b = weights["activation"][0]
    acted = (b[0] * F.gelu(gate, approximate="tanh") + b[1] * F.silu(gate) * up
             + b[2] * F.relu(gate) ** 2)
    pairs = [(attn(x, now), expected),
             (mlp(x, e, now.mlp_ratio, now.activation), mlp.c_proj(acted, hidden, e))]
    inputs = [x, *weights.values(), *block.parameters()]
    for found, wanted in pairs:
        agree(found, wanted, "output")
        direction = torch.randn_like(found)
        grads = [torch.autograd.grad((y * direction).sum(), inputs, retain_graph=True,
                                     materialize_grads=True) for y in (found, wanted)]
        for a, b in zip(*grads, strict=True):
            agree(a, b, "gradient")


@pytest.mark.parametrize("config, params", [
    (dict(vocab_size=50257), 124_439_808), # GPT-2 small
    (dict(bias=False), 124_373_760),
    (dict(), 124_475_904),
    (dict(bias=False, block_size=224, n_layer=7, n_embd=576), 56_981_952), # TinyStories
    (dict(bias=False, block_size=224, n_layer=5, n_embd=384, n_head=6, mlp_ratio=2), 25_305_216),
    (dict(bias=False, block_size=224, n_layer=7), 88_362_240),
    # Shakespeare-char
    (dict(bias=False, block_size=256, vocab_size=65, n_layer=6, n_embd=384, n_head=6), 10_745_088),
    (dict(bias=False, block_size=256, vocab_size=65, n_layer=4, n_embd=96, n_head=2, mlp_ratio=2),
     326_592),
    (dict(bias=False, n_layer=10, n_embd=192, n_head=6, mlp_ratio=2), 12_808_128), # OpenWebText
])
def test_published_parameter_counts(config, params):
    with torch.device("meta"):
        net = build(config)
    assert sum(p.numel() for p in net.parameters()) == params
    assert net.cost()["params"] == params


@pytest.mark.parametrize("sum_of_ratios, n_layer, params", [
    (22, 6, 78_923_520), (22, 7, 81_284_352), (21, 6, 77_743_872)])
def test_parameter_counts_of_published_searches(sum_of_ratios, n_layer, params):
    with torch.device("meta"):
        net = build(dict(bias=False, block_size=224, n_layer=[5, 6, 7], n_head=[6, 8, 12],
                         n_embd=[384, 576, 768], mlp_ratio=[2, 3, 4]))
    ratios = [4] * n_layer
    while sum(ratios) > sum_of_ratios:
        ratios[ratios.index(max(ratios))] -= 1
    cost = net.cost({"n_layer": n_layer, "n_embd": 768, "n_head": [12] * n_layer,
                     "mlp_ratio": ratios})
    assert cost["params"] == params


@pytest.mark.parametrize("head_size", [0, 4])
def test_flops_are_those_that_run(head_size):
    net = supernet("three", head_size=head_size, block_size=16)
    for arch in extremes(net.choices):
        small, (x, y) = net.extract(arch), tokens(B=1, T=16)
        with (FlopCounterMode(display=False) as counter,
              torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)):
            small(x, y)
        assert counter.get_total_flops() == net.cost(arch)["flops"]


@pytest.mark.parametrize("options", [
    dict(head_size=0), dict(head_size=4),
    dict(head_size=4, n_embd=32, norm=["rmsnorm", "layernorm"], activation=["gelu", "swiglu"],
         mlp_ratio=1, n_kv_head=[1, 0], window=[3, 0], position=["rope", "learned"])])
def test_expected_cost_is_the_mean_over_architectures(options):
    """The sum over all architectures of probability times exact cost, and a gradient that finite
    differences confirm."""
    net = supernet("ragged", **dict(n_layer=[1, 2], mlp_ratio=[1, 2]) | options)
    g = torch.Generator().manual_seed(0)
    weights = {name: torch.rand(c.shape, generator=g, dtype=torch.float64).softmax(-1)
               for name, c in net.choices.items()}
    total = {"params": 0.0, "flops": 0.0, "kv_cache": 0.0}
    options = {name: [c.options] * (c.repeat or 1) for name, c in net.choices.items()}
    for values in itertools.product(*(itertools.product(*rows) for rows in options.values())):
        arch, p = {}, 1.0
        for (name, c), row in zip(net.choices.items(), values, strict=True):
            arch[name] = list(row) if c.repeat else row[0]
            for i, value in enumerate(row):
                p *= weights[name].view(-1, len(c.options))[i][c.options.index(value)].item()
        for key, value in net.cost(arch).items():
            total[key] += p * value
    for key, value in net.cost(weights).items():
        assert value.item() == pytest.approx(total[key], rel=1e-12)
    leaf = {name: w.clone().requires_grad_() for name, w in weights.items()}
    for key in total:
        def cost_of(*w, key=key):
            return net.cost(dict(zip(leaf, w, strict=True)))[key] / 1e3
        assert torch.autograd.gradcheck(cost_of, tuple(leaf.values()))


@pytest.mark.parametrize("block", [*PLAIN_BLOCKS, "moe"])
def test_cost_of_every_block_option(block):
    """Parameters and matrix products as they are; the expectation over two equal choices is the
    mean."""
    options = (MOE if block == "moe" else BLOCKS[block]) | {"window": 0} # masked scores run, too
    net, (x, y) = supernet("single", head_size=8, mlp_ratio=2.5, block_size=16,
                           **options), tokens(B=1, T=16)
    with (FlopCounterMode(display=False) as counter,
          torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)):
        net(x, y)
    # bytes, keys and values, layers, tokens, heads, channels
    kv_cache = 2 * 2 * 2 * 16 * (options.get("n_kv_head") or 5) * 8
    assert net.cost() == {"params": sum(p.numel() for p in net.parameters()),
                          "flops": counter.get_total_flops(), "kv_cache": kv_cache}
    if block != "moe":
        net = supernet("even", n_layer=1, n_head=1, mlp_ratio=2.5, head_size=4, **options)
        half = {name: torch.full(c.shape, 1 / len(c.options)) for name, c in net.choices.items()}
        costs = [net.cost({"n_layer": 1, "n_embd": e, "n_head": [1], "mlp_ratio": [2.5]})
                 for e in (12, 24, 36)]
        for key, value in net.cost(half).items():
            assert value.item() == pytest.approx(sum(cost[key] for cost in costs) / 3)


def test_state_dict_has_the_names_of_nanogpt():
    names = set(build(dict(block_size=8, vocab_size=11, n_layer=1, n_head=2,
                           n_embd=4)).state_dict())
    layers = {"ln_1": "wb", "attn.c_attn": "wb", "attn.c_proj": "wb", "ln_2": "wb",
              "mlp.c_fc": "wb", "mlp.c_proj": "wb"}
    expected = {f"transformer.h.0.{layer}.{kind}"
                for layer in layers for kind in ("weight", "bias")}
    assert names == expected | {"transformer.wte.weight", "transformer.wpe.weight",
                                "transformer.ln_f.weight", "transformer.ln_f.bias",
                                "lm_head.weight"}


@pytest.mark.parametrize("block", [*PLAIN_BLOCKS, "moe"])
def test_every_block_option_is_causal(block):
    """A later token changes no earlier logits, and an earlier one changes all later ones: nothing
    is seen too soon or hidden."""
    net, (x, _) = supernet("single", **(MOE if block == "moe" else BLOCKS[block]) |
                           {"loss_chunk": 0, "window": 0}).eval(), tokens()
    logits, _ = net(x, x)
    for t in range(9):
        x2 = x.clone()
        x2[:, t] = (x2[:, t] + 1) % 29
        same = (net(x2, x)[0] - logits).abs().amax((0, 2)) <= 1e-5 * logits.abs().max()
        assert same.tolist() == [True] * t + [False] * (9 - t)


def test_plain_network_is_causal_and_ignores_minus_one():
    net, (x, y) = supernet("single"), tokens()
    logits, _ = net(x, y)
    x2 = x.clone()
    x2[:, 6:] = (x2[:, 6:] + 1) % 29
    changed, _ = net(x2, y)
    assert torch.equal(changed[:, :6], logits[:, :6])
    assert not torch.equal(changed[:, 6:], logits[:, 6:])
    y2 = y.clone()
    y2[:, 4:] = -1
    agree(net(x, y2)[1], F.cross_entropy(logits[:, :4].flatten(0, 1), y[:, :4].flatten()),
          "masked loss")


@pytest.mark.parametrize("options, head_size", [
    ({}, 0), ({}, 4), (BLOCKS["llama"], 4), (BLOCKS["original"], 0), (BLOCKS["modern"], 4),
    (BLOCKS["kinds"], 4), (MOE, 0)])
def test_cached_generation_equals_recomputing(options, head_size):
    space = "single" if "n_expert" in options else "even" if options else "ragged"
    net, (x, _) = supernet(space, head_size=head_size, **options), tokens(T=3)
    net.eval()
    for arch in extremes(net.choices):
        # runs past block_size=12
        new = net.generate(x, 40, temperature=1.5, arch=arch,
                           generator=torch.Generator().manual_seed(3))
        g = torch.Generator().manual_seed(3)
        for t in range(3, 43):
            logits, _ = net(new[:, max(0, t - 12):t], arch=arch)
            assert torch.equal(torch.multinomial((logits[:, -1] / 1.5).softmax(-1), 1,
                                                 generator=g)[:, 0], new[:, t]), t
    drawn = [net.generate(x, 8, temperature=0.9, top_k=5, arch=arch,
                          generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert net.generate(x, 30, temperature=5.0, arch=arch, vocab_size=7)[:, 3:].max() < 7


def test_a_mixture_generates_what_it_computes():
    """Every token follows all before it, within block_size=12 and beyond."""
    net, (x, _) = supernet("three").eval(), tokens(T=3)
    weights = {name: torch.full(c.shape, 1 / len(c.options)) for name, c in net.choices.items()}
    new = net.generate(x, 15, temperature=0, arch=weights)
    assert torch.equal(net.generate(x, 15, temperature=1e-300, arch=weights), new)
    for t in range(3, 18):
        assert torch.equal(net(new[:, max(0, t - 12):t], arch=weights)[0][:, -1].argmax(-1),
                           new[:, t]), t


def test_plain_network_is_gpt2_written_out():
    """Against the equations of GPT-2, in plain tensor operations: tanh GELU, pre-norm, tied head,
    softmax(q k / sqrt(d)) v."""
    net, (x, y) = supernet("single"), tokens()
    w = net.state_dict()
    h = w["transformer.wte.weight"][x] + w["transformer.wpe.weight"][:9]

    def norm(h, name):
        centred = h - h.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) +
                          1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(h, name):
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]
    for i in range(2):
        qkv = linear(norm(h, f"transformer.h.{i}.ln_1"), f"transformer.h.{i}.attn.c_attn")
        q, k, v = (t.view(2, 9, 5, 8).transpose(1, 2) for t in qkv.split(40, -1))
        future = torch.ones(9, 9).triu(1).bool()
        scores = (q @ k.transpose(-1, -2) / 8 ** 0.5).masked_fill(future, float("-inf"))
        h = h + linear((scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 9, 40),
                       f"transformer.h.{i}.attn.c_proj")
        z = linear(norm(h, f"transformer.h.{i}.ln_2"), f"transformer.h.{i}.mlp.c_fc")
        z = 0.5 * z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z ** 3)))
        h = h + linear(z, f"transformer.h.{i}.mlp.c_proj")
    logits = norm(h, "transformer.ln_f") @ w["transformer.wte.weight"].T
    agree(net(x, y)[0], logits, "logits")
    agree(net(x)[0], logits[:, [-1]], "logits of the last position")


ACTIVATIONS = {"gelu": torch.nn.GELU("tanh"), "exact_gelu": torch.nn.GELU(),
               "relu": torch.nn.ReLU(), "silu": torch.nn.SiLU(),
               "relu2": lambda x: torch.relu(x) ** 2,
               "mish": torch.nn.Mish(), "geglu": torch.nn.GELU("tanh"), "swiglu": torch.nn.SiLU(),
               "reglu": torch.nn.ReLU()}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    """Against torch's modules; the gated ones are act(W x) * (V x), W the first half of the rows
    of c_fc and V the second."""
    mlp = supernet("single", activation=activation).transformer.h[0].mlp
    x, act = torch.randn(3, 5, 40), ACTIVATIONS[activation]
    w, b = mlp.c_fc.weight, mlp.c_fc.bias
    hidden = act(x @ w[:120].T + b[:120])
    if activation.endswith("glu"):
        hidden = hidden * (x @ w[120:].T + b[120:])
    # mlp_ratio=3 times 40, for each part
    assert len(w) == (240 if activation.endswith("glu") else 120)
    agree(mlp(x), hidden @ mlp.c_proj.weight.T + mlp.c_proj.bias, "output")


@pytest.mark.parametrize("space", ["autoformer", "swinir"])
def test_vision_transformers_have_the_exact_gelu(space):
    net = space_module(space).build(TINY_SPACES[space] | dict(img_size=8))
    mlp = next(module for module in net.modules() if isinstance(module, MLP))
    # its weights are small, and around 0 both forms are one
    x = 100 * torch.randn(4, 5, mlp.c_fc.in_features)
    agree(mlp(x), mlp.c_proj(torch.nn.GELU()(mlp.c_fc(x))), "output")


@pytest.mark.parametrize("residual", ["pre", "post", "parallel", "branch"])
def test_residuals(residual):
    """With the places of the norms written out, around torch's own attention."""
    net, x = supernet("single", residual=residual), torch.randn(2, 9, 40)
    block = net.transformer.h[0]
    norm_1, norm_2 = (lambda x, m=m: m and F.layer_norm(x, (40,), m.weight, m.bias)
                      for m in (block.ln_1, getattr(block, "ln_2", None)))

    def attention(x):
        torch_attention = torch.nn.MultiheadAttention(40, 5, batch_first=True)
        torch_attention.in_proj_weight = block.attn.c_attn.weight
        torch_attention.in_proj_bias = block.attn.c_attn.bias
        torch_attention.out_proj = block.attn.c_proj
        return torch_attention(x, x, x, attn_mask=torch.ones(9, 9).triu(1).bool(),
                               need_weights=False)[0]
    if residual == "pre":
        y = x + attention(norm_1(x))
        y = y + block.mlp(norm_2(y))
    elif residual == "post":
        y = norm_1(x + attention(x))
        y = norm_2(y + block.mlp(y))
    elif residual == "branch":
        y = x + norm_1(attention(x))
        y = y + norm_2(block.mlp(y))
    else:
        y = x + attention(norm_1(x)) + block.mlp(norm_1(x))
    agree(block(x), y, "output")


def test_rope_attention_sees_distances_alone():
    """The scores of a whole attention, against scaled_dot_product_attention of tokens turned as
    complex numbers, at any offset."""
    net, x = supernet("single", position="rope"), torch.randn(2, 9, 40)
    attn, now = net.transformer.h[0].attn, Now(rope=rotation(8, torch.arange(9)))
    q, k, v = (t.unflatten(2, (5, 8)).transpose(1, 2) for t in attn.c_attn(x).chunk(3, 2))
    for offset in (0, 100):
        turn = torch.exp(1j * torch.outer(torch.arange(9.0) + offset,
                                          10000 ** (-torch.arange(0, 8, 2) / 8)))
        pairs = [torch.view_as_complex(t.unflatten(3, (4, 2)).contiguous()) for t in (q, k)]
        q_k = [torch.view_as_real(pair * turn).flatten(3) for pair in pairs]
        y = F.scaled_dot_product_attention(*q_k, v, is_causal=True).transpose(1, 2).flatten(2)
        torch.testing.assert_close(attn(x, now), attn.c_proj(y), rtol=1e-4, atol=1e-4)


def moe(**options):
    torch.manual_seed(2)
    layer = supernet("single", **MOE | options).transformer.h[0].mlp
    return layer, torch.randn(2, 50, 40)


def test_top_1_of_the_mixture_of_experts_is_the_chosen_expert():
    layer, x = moe(top_k=1)
    layer.eval()
    chosen = (x @ layer.router.weight[:4].T).argmax(-1)
    assert len(chosen.unique()) > 1
    y = torch.stack([layer.experts[int(i)](token)
                     for i, token in zip(chosen.flatten(), x.flatten(0, 1), strict=True)])
    agree(layer(x), y.view_as(x), "output")


def test_mixture_of_experts_is_the_weighted_sum_of_the_top_k():
    layer, x = moe()
    layer.eval()
    logits = x @ layer.router.weight[:4].T
    hidden = logits < logits.sort(descending=True).values[..., [1]]
    gates = logits.masked_fill(hidden, float("-inf")).softmax(-1)
    agree(layer(x), sum(gates[..., [i]] * expert(x) for i, expert in enumerate(layer.experts)),
          "output")


def test_load_of_an_expert_is_how_often_it_would_be_chosen():
    """P(x, i) in the loss, against drawing the noise of expert i anew 4,000 times while that of
    the others stays (Shazeer et al. 2017, appendix A); and the whole loss from it."""
    layer, x = moe()
    clean, scale = (x.flatten(0, 1) @ layer.router.weight.T).chunk(2, -1)
    torch.manual_seed(5)
    layer(x)
    torch.manual_seed(5)
    logits = clean + torch.randn(100, 4) * F.softplus(scale)
    load = torch.zeros(4)
    for i in range(4):
        redrawn = logits.repeat(4000, 1, 1)
        redrawn[..., i] = clean[:, i] + torch.randn(4000, 100) * F.softplus(scale)[:, i]
        load[i] = (redrawn.topk(2).indices == i).any(-1).float().mean(0).sum()
    gates = torch.zeros(100, 4).scatter(1, logits.topk(2).indices,
                                        logits.topk(2).values.softmax(-1)).sum(0)
    loss = sum((t.std(correction=0) / t.mean()) ** 2 for t in (gates, load))
    assert layer.aux_loss.item() == pytest.approx(loss.item(), rel=0.03)


def test_training_loss_has_the_experts_imbalance_and_evaluation_has_not():
    net, (x, y) = supernet("single", **MOE, router_aux_loss_coef=0.25), tokens()
    logits, loss = net(x, y)
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), y.flatten())
    agree(loss, cross_entropy + 0.25 * sum(block.mlp.aux_loss for block in net.transformer.h),
          "training loss")
    net.eval()
    logits, loss = net(x, y)
    agree(loss, F.cross_entropy(logits.flatten(0, 1), y.flatten()), "loss")


def test_load_balancing_loss_balances():
    """Experts of which one takes nearly all: a few steps on the loss alone spread the tokens."""
    layer, x = moe(top_k=1)
    x = x.abs()
    with torch.no_grad():
        layer.router.weight[0] += 0.1

    def largest_share():
        chosen = (x @ layer.router.weight[:4].T).argmax(-1).flatten()
        return chosen.bincount(minlength=4).max().item() / 100
    before, optimizer = largest_share(), torch.optim.Adam([layer.router.weight], lr=0.01)
    for _ in range(100):
        layer(x)
        optimizer.zero_grad()
        layer.aux_loss.backward()
        optimizer.step()
    assert before > 0.9 and largest_share() < 0.5


@pytest.mark.parametrize("loss_chunk", [1, 7, 18, 100])
def test_chunked_loss_is_the_whole_loss(loss_chunk):
    """In value and gradient, also where the chunks do not divide the tokens and where targets are
    ignored."""
    nets, (x, y) = [supernet("single", loss_chunk=n) for n in (0, loss_chunk)], tokens()
    y[0, 3:6] = -1
    for net in nets:
        logits, loss = net(x, y)
        loss.backward()
        assert (logits is None) == bool(net.config.loss_chunk)
    agree(loss, nets[0](x, y)[1], "loss")
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        agree(p.grad, q.grad, "gradient")


def test_chunked_loss_never_holds_all_logits():
    """The logits of 1,024 tokens are 33 MB, and their gradient as much: a step stays below even
    one of them."""
    def step(loss_chunk):
        net = build(dict(block_size=256, vocab_size=8192, n_layer=1, n_head=1, n_embd=8,
                         loss_chunk=loss_chunk))
        x = torch.randint(8192, (4, 256))
        return peak(lambda: net(x, x)[1].backward(), SimpleNamespace(device_type="cpu"))
    whole, chunked = step(0), step(64)
    assert whole > 2 * 33e6 and chunked < 0.5 * 33e6, (whole, chunked)


def test_options_go_from_search_to_training(data_dir, tmp_path):
    """A search with the options of a block hands them on; the network that is trained is the one
    that was found."""
    options = dict(norm="rmsnorm", position="rope", activation="swiglu", residual="parallel",
                   head_size=8)
    script("train_search.py", f"--data_dir={data_dir}", f"--out_dir={tmp_path}/s",
           *flags(TINY_SEARCH | options))
    script("train_base.py", f"--arch={tmp_path}/s/arch.json", f"--out_dir={tmp_path}/b",
           *flags(TINY), "--loss_chunk=10")
    found, trained = (json.loads((tmp_path / out / "result.json").read_text()) for out in "sb")
    checkpoint = torch.load(tmp_path / "b/best.pt", weights_only=True)
    net = build(checkpoint["config"], found["arch"])
    net.load_state_dict(checkpoint["model"])
    assert "wpe" not in dict(net.transformer.named_children())
    assert not hasattr(net.transformer.h[0], "ln_2")
    assert found["params"] == trained["params"] == sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("optimizer", [*METHODS, "darts2"])
def test_every_method_finds_kinds_that_train_and_speak(optimizer, data_dir, tmp_path, capsys):
    method = dict(optimizer="darts", order=2, fused=False) if optimizer == "darts2" else dict(
        optimizer=optimizer)
    script("train_search.py", f"--data_dir={data_dir}", f"--out_dir={tmp_path}/s",
           *flags(TINY_SEARCH | TINY_KINDS | method))
    script("train_base.py", f"--arch={tmp_path}/s/arch.json", f"--out_dir={tmp_path}/b",
           *flags(TINY))
    found, trained = (json.loads((tmp_path / out / "result.json").read_text()) for out in "sb")
    arch = found["arch"]
    assert all(arch[name] in TINY_KINDS[name] for name in ("norm", "position", "qk_norm"))
    assert all(set(arch[name]) <= set(TINY_KINDS[name]) and len(arch[name]) == arch["n_layer"]
               for name in ("activation", "n_kv_head", "window"))
    assert found["params"] == trained["params"]
    script("sample.py", f"--out_dir={tmp_path}/b", "--device=cpu", "--max_new_tokens=20")
    assert "Traceback" not in capsys.readouterr().out


def test_a_mixture_of_experts_trains(data_dir, tmp_path):
    options = TINY | dict(n_layer=2, n_head=2, n_embd=16, n_expert=3, norm="partial_rmsnorm",
                          position="sinusoidal", residual="post")
    script("train.py", f"--data_dir={data_dir}", f"--out_dir={tmp_path}/o",
           *flags(options | dict(loss_chunk=10)))
    search = flags(TINY_SEARCH | dict(n_expert=3))
    assert "n_expert=3" in stops("train_search.py", f"--data_dir={data_dir}",
                                 f"--out_dir={tmp_path}/s", *search)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("head_size", [0, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_straight_through_options_have_the_gradients_of_the_mixture(space, head_size, bias):
    check_straight_through_options(supernet(space, head_size=head_size, bias=bias))


@pytest.mark.parametrize("block, head_size", BLOCKS_AND_HEADS)
def test_straight_through_options_of_every_block_option(block, head_size):
    check_straight_through_options(supernet("even", head_size=head_size, **BLOCKS[block]))


def check_straight_through_options(net):
    """gdas slices: its loss is the mixture's, so are the gradients of the shared weights and those
    to the weights of what was chosen; of depths, whose own weight the final norm hides, positions,
    windows and residuals those to all. (In
    float64, but for buffers rounded to float32: the norms all but cancel some of them.)"""
    net, (x, y) = net.double(), tokens()
    params = list(net.parameters())
    for arch in some_archs(net):
        leaves = {name: w.double().requires_grad_()
                  for name, w in one_hot(net.choices, arch).items()}
        results = []
        for third in (straight_through_arch(net.choices, leaves), leaves):
            logits, loss = net(x, y, third)
            grads = torch.autograd.grad(loss, [*leaves.values(), *params], materialize_grads=True)
            results.append((logits, loss, dict(zip(leaves, grads, strict=False)),
                            grads[len(leaves):]))
        (logits, loss, grads, shared), (mixed_logits, mixed_loss, mixed_grads,
                                        mixed_shared) = results
        agree(logits, mixed_logits, "logits")
        agree(loss, mixed_loss, "loss")
        for g, g0 in zip(shared, mixed_shared, strict=True):
            agree(g, g0, "gradient")
        for name, g in grads.items():
            # layers that were not run get nothing from either
            to_all = name in ("n_layer", "position", "window", "residual")
            chosen = 1 if to_all else leaves[name]
            worst = (g - mixed_grads[name] * chosen).abs().max().item()
            assert worst <= 1e-7, f"gradient to {name} of {arch}: differs by {worst:.2e}"


def test_mixture_mixes_the_width_once_in_every_operation():
    """Embeddings, final norm and head of the mixture, written out around its blocks."""
    net, (x, y) = supernet("three"), tokens()
    g = torch.Generator().manual_seed(0)
    weights = {name: torch.rand(c.shape, generator=g).softmax(-1)
               for name, c in net.choices.items()}
    (e, _, layers), p, w = transformer_sizes(net, weights), weights["n_layer"], net.state_dict()
    options = list(zip(weights["n_embd"], (12, 24, 36), strict=True))
    S = sum(pk * (torch.arange(36) < k) for pk, k in options)
    h, mixed = w["transformer.wte.weight"][x] * S + w["transformer.wpe.weight"][:9] * S, 0
    for i, block in enumerate(net.transformer.h):
        h = block(h, Now(e, **layers[i]))
        mixed = mixed + p[i] * h
    weight, bias = w["transformer.ln_f.weight"], w["transformer.ln_f.bias"]
    normed = sum(pk * F.pad(F.layer_norm(mixed[..., :k], (k,), weight[:k], bias[:k]), (0, 36 - k))
                 for pk, k in options)
    agree(net(x, y, weights)[0], (normed * S) @ w["transformer.wte.weight"].T, "logits")


def test_dropout_is_everywhere_in_training_and_nowhere_in_evaluation(monkeypatch):
    net, (x, y) = supernet("single", dropout=0.3), tokens()
    dropped, attention = [], F.scaled_dot_product_attention

    def spy(*args, dropout_p=0.0, **kwargs):
        dropped.append(dropout_p)
        return attention(*args, dropout_p=dropout_p, **kwargs)
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    places = [net.transformer.drop, *(m for b in net.transformer.h
                                      for m in (b.attn.resid_dropout, b.mlp.dropout))]
    for place in places:
        place.register_forward_hook(lambda module, args,
                                    out: dropped.append(module.p if module.training else 0.0))
    net(x, y)
    assert dropped == [0.3] * 7
    dropped.clear()
    net.eval()
    assert torch.equal(net(x, y)[0], net(x, y)[0]) and not any(dropped) and len(dropped) == 14


def test_sampling_follows_temperature_and_top_k():
    net, (x, _) = supernet("single"), tokens(B=1, T=4)
    net.eval()
    logits = net(x)[0][0, -1].detach()
    drawn = net.generate(x.repeat(20_000, 1), 1, temperature=2.0, top_k=5,
                         generator=torch.Generator().manual_seed(0))[:, -1]
    kept = logits.topk(5)
    p = torch.zeros(29).index_put((kept.indices,), (kept.values / 2.0).softmax(-1))
    assert (drawn.bincount(minlength=29) / 20_000 - p).abs().max() < 0.015


def test_any_batch_and_length_at_run_time():
    net = supernet("three")
    weights = {name: torch.full(c.shape, 1 / len(c.options)) for name, c in net.choices.items()}
    for B, T in ((1, 1), (3, 12), (5, 7)):
        x, y = tokens(B=B, T=T)
        assert net(x, y, weights)[0].shape == (B, T, 29)


def test_residual_projections_start_smaller():
    torch.manual_seed(0)
    net = build(dict(block_size=8, vocab_size=64, n_layer=8, n_head=4, n_embd=[64, 128]))
    assert net.transformer.h[3].mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert net.transformer.h[3].mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("change, words", [
    (dict(n_embd=[24, 32], n_head=[3, 4]), ["n_embd=32", "n_head=3"]),
    (dict(n_layer=[3, 2]), ["n_layer=[3, 2]", "increasing"]),
    (dict(n_head=[2, 2]), ["n_head=[2, 2]"]),
    (dict(n_embd=[0, 24]), ["n_embd=[0, 24]"]),
    (dict(n_embd=[24.5]), ["n_embd=[24.5]", "whole"]),
    (dict(mlp_ratio=[]), ["mlp_ratio=[]"]),
    (dict(norm="batchnorm"), ["norm='batchnorm'", "rmsnorm"]),
    (dict(residual=["pre", "front"]), ["residual=['pre', 'front']", "'front'", "parallel"]),
    (dict(position="rope"), ["rope", "n_embd=[12, 24, 36]", "--head_size=16"]),
    (dict(position="rope", head_size=3), ["rope", "even size", "is 3"]),
    (dict(n_kv_head=[1, 2]), ["n_kv_head", "--head_size=16"]),
    (dict(qk_norm=[False, True]), ["qk_norm", "--head_size=16"]),
    (dict(n_kv_head=[1, 2], head_size=4), ["n_head=3", "n_kv_head=2"]),
    (dict(n_kv_head=[0, 1], head_size=4), ["n_kv_head=[0, 1]", "increasing", "last"]),
    (dict(n_kv_head=[1, 1.5], head_size=4), ["n_kv_head=[1, 1.5]", "whole"]),
    (dict(window=[4, 1025]), ["window=1025", "block_size=1024"]),
    (dict(window=-1), ["window=-1"]),
    (dict(activation=["gelu", 3]), ["activation=['gelu', 3]", "3", "relu2"]),
    (dict(norm=["rmsnorm", "rmsnorm"]), ["norm=['rmsnorm', 'rmsnorm']", "twice", "layernorm"]),
    (dict(qk_norm="yes"), ["qk_norm='yes'", "False, True"]),
    (dict(norm="partial_rmsnorm", prmsnorm_pct=6.25), ["prmsnorm_pct=6.25", "0.0625"]),
    (dict(n_expert=4), ["n_expert=4", "lists"]),
    (dict(n_expert=2, top_k=2), ["n_expert=2", "top_k=2"]),
    (dict(loss_chunk=-1), ["loss_chunk=-1 must be 0 or more"]),
    (dict(head_size=-4), ["head_size=-4 must be 0 or more"]),
    (dict(dropout=1.0), ["dropout=1.0 must be at least 0 and below 1"]),
    (dict(dropout=1.5), ["dropout=1.5 must be at least 0 and below 1"]),
    (dict(dropout=-0.1), ["dropout=-0.1 must be at least 0 and below 1"]),
])
def test_bad_sizes_are_one_sentence(change, words):
    with pytest.raises(SystemExit) as e:
        search_spaces.build(SPACES["three"] | {"space": "gpt"} | change)
    assert all(word in str(e.value) for word in words) and "\n" not in str(e.value)


@pytest.mark.parametrize("change", [dict(n_layer=9), dict(n_embd=13), dict(n_head=[2]),
                                    dict(n_head=[2, 7, 2]), dict(extra=1),
                                    dict(mlp_ratio=2)])
def test_an_architecture_of_another_space_is_one_sentence(change):
    net = supernet("three")
    good = {"n_layer": 2, "n_embd": 24, "n_head": [2, 3], "mlp_ratio": [1, 4]}
    net.extract(good)
    with pytest.raises(ConfigError) as e:
        net.extract(good | change)
    assert next(iter(change)) in str(e.value)


@pytest.mark.parametrize("n_kv_head, window", [(2, 0), (1, 3), (2, 1), (0, 4)])
def test_grouped_queries_and_windows_are_those_of_torch(n_kv_head, window):
    """In torch the query heads that read the same key stand side by side, here they are n_kv_head
    apart."""
    net = supernet("single", n_head=4, n_kv_head=n_kv_head, window=window)
    attn, x, n = net.transformer.h[0].attn, torch.randn(2, 9, 40), n_kv_head or 4
    q, k, v = (t.view(2, 9, -1, 10).transpose(1, 2)
               for t in attn.c_attn(x).split((40, 10 * n, 10 * n), -1))
    order = {1: [0, 1, 2, 3], 2: [0, 2, 1, 3], 4: [0, 1, 2, 3]}[n]
    t, s = torch.arange(9)[:, None], torch.arange(9)
    seen = (s <= t) & (t - s < (window or 9))
    y = torch.empty_like(q)
    y[:, order] = F.scaled_dot_product_attention(q[:, order], k, v, seen, enable_gqa=True)
    expected = attn.c_proj(y.transpose(1, 2).flatten(2))
    torch.testing.assert_close(attn(x), expected, rtol=1e-5, atol=1e-5)


def test_the_modern_block_is_llama():
    """Against transformers' Llama with the same weights. Its channels i and i + 4 of a head turn as
    one pair, ours 2i and 2i + 1; its query heads 0 and 1 read key head 0, ours 0 and 2."""
    transformers = pytest.importorskip("transformers")
    net, (x, y) = supernet("single", n_embd=32, n_head=4, n_kv_head=2, **BLOCKS["llama"]), tokens()
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=29, hidden_size=32, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5, tie_word_embeddings=True))
    rows = [8 * head + channel for head in (0, 2, 1, 3) for channel in (0, 2, 4, 6, 1, 3, 5, 7)]
    columns = [8 * head + channel for head in (0, 2, 1, 3) for channel in range(8)]
    of_keys = [8 * head + channel for head in (0, 1) for channel in (0, 2, 4, 6, 1, 3, 5, 7)]
    state = {"model.embed_tokens.weight": net.transformer.wte.weight,
             "lm_head.weight": net.lm_head.weight, "model.norm.weight": net.transformer.ln_f.weight}
    for i, block in enumerate(net.transformer.h):
        qkv, fc = block.attn.c_attn.weight, block.mlp.c_fc.weight
        state |= {f"model.layers.{i}.{name}.weight": w for name, w in {
            "input_layernorm": block.ln_1.weight, "post_attention_layernorm": block.ln_2.weight,
            "self_attn.q_proj": qkv[:32][rows], "self_attn.k_proj": qkv[32:48][of_keys],
            "self_attn.v_proj": qkv[48:], "self_attn.o_proj": block.attn.c_proj.weight[:, columns],
            "mlp.gate_proj": fc[:96], "mlp.up_proj": fc[96:],
            "mlp.down_proj": block.mlp.c_proj.weight}.items()}
    llama.load_state_dict(state)
    logits = net(x, y)[0]
    assert (llama.eval()(x).logits - logits).abs().max() < 1e-4 < logits.std()


@pytest.mark.parametrize("options", [
    dict(window=2), dict(window=7), dict(n_kv_head=2), dict(qk_norm=True),
    BLOCKS["llama"] | dict(window=5, n_kv_head=1, qk_norm=True)])
def test_cached_generation_of_kinds_equals_recomputing(options):
    """With windows smaller and larger than the prompt of 5 tokens, and past block_size=12."""
    net, (x, _) = supernet("single", n_head=4, n_embd=32, **options).eval(), tokens(T=12)
    cache = [{} for _ in net.transformer.h]
    for start, end in [(0, 5), *((t, t + 1) for t in range(5, 12))]:
        cached, _ = net(x[:, start:end], cache=cache)
        agree(cached, net(x[:, :end])[0], f"logits after {end} tokens")
        assert cache[1]["k"].shape[1] == min(end, options.get("window", 12))
    new = net.generate(x[:, :5], 12, temperature=0)
    for t in range(5, 17):
        assert torch.equal(net(new[:, max(0, t - 12):t])[0][:, -1].argmax(-1), new[:, t]), t
