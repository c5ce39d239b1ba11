"""The kernels of fused_ops.cpp compute what their PyTorch references do: values and gradients."""
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from conftest import ROOT, TINY_KINDS, TINY_SEARCH, flags, succeeds, turn_kernels_on
from torch._dynamo.utils import counters

import fused_ops
import supernet
from fused_ops import (ACTIVATION_KERNELS, depthwise, mixed_activation, mixed_attention,
                       mixed_heads, mixed_linear, mixed_norm)
from model import ACTIVATIONS, GATED
from model import build
from optim_nas import METHODS, discretize, uniform
from search_spaces.convs import Conv2d
from supernet import straight_through_arch

FORWARD_TESTS = ("test_schema", "test_autograd_registration", "test_faketensor")
TESTS = (*FORWARD_TESTS, "test_aot_dispatch_dynamic")
DTYPES = [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 0.01),
          (torch.float16, 2e-3)]


@pytest.fixture(autouse=True)
def kernels():
    turn_kernels_on()
    yield
    fused_ops.use_fused_ops(False)


def prefix_sizes(g, N):
    """One to five increasing sizes, the last of them N."""
    K = torch.randint(1, 6, (), generator=g).item()
    smaller = torch.randint(1, N, (K - 1,), generator=g).tolist() if K > 1 else []
    return sorted({*smaller, N})


# the references with the operators' arguments

def attention_with_distance(qkv, q_scale, y_scale, n_head, bias, mask, distance):
    return mixed_attention(qkv, q_scale, y_scale, n_head, 0.0, distance[:qkv.shape[1]])


def heads_with_numbers(qkv, size, H, G, norm, cos, sin, reads):
    T = qkv.shape[1]
    rope = None if cos is None else (cos[:T], sin[:T])
    return mixed_heads(qkv, size, H, G, norm, rope, reads)


def activation_of_numbers(x, p, numbers):
    names = {ACTIVATION_KERNELS[name] + 16 * (name in GATED): name for name in ACTIVATION_KERNELS}
    kinds = [(names[n], ACTIVATIONS[names[n]], n >= 16) for n in numbers]
    return mixed_activation(x, p, kinds)


def cases(seed, dtype):
    """(reference, the kernel's operator, inputs) of each kernel on random sizes."""
    g = torch.Generator().manual_seed(seed)
    small = torch.float64 if dtype == torch.float64 else torch.float32 # the type of small tensors

    def number(low, high):
        return torch.randint(low, high + 1, (), generator=g).item()

    def tensor(*shape, grad=True, dtype=dtype, random=torch.randn):
        return random(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_(grad)

    N, R, B, T = number(1, 40), number(2, 40), number(1, 3), number(1, 150)
    n, o, bias = prefix_sizes(g, N), prefix_sizes(g, R), number(0, 1)
    x = tensor(B, T, N)
    w, b, p, q = (tensor(size, dtype=small) for size in (N, N, len(n), len(n)))
    q = q if number(0, 1) else None
    yield mixed_norm, torch.ops.nas.norm, (x, w, b if bias else None, p, q, n, 1e-5)

    kinds = sorted({number(0, 5) for _ in range(3)}) + [16 + k for k in (0, 2, 4) if number(0, 1)]
    gates = tensor(B, T, N * (1 + (kinds[-1] >= 16)))
    inputs = gates, tensor(len(kinds), dtype=small), kinds
    yield activation_of_numbers, torch.ops.nas.activation, inputs

    linear = torch.ops.nas.block_linear
    M = tensor(len(o), len(n), dtype=small, random=torch.rand)
    b = tensor(R) if bias else None
    yield mixed_linear, linear, (x, tensor(R, N), b, M, o, n)
    yield mixed_linear, linear, (x, tensor(R, N, grad=False), b, M, o, n) # frozen,
    b = tensor(32 * R) if bias else None # and with enough rows for frozen_backward()
    W = tensor(32 * R, N, grad=False)
    yield mixed_linear, linear, (x, W, b, M, [32 * rows for rows in o], n)

    heads = [h for h in (1, 2, 3, 4, 6) if number(0, 1)] or [2]
    E = 12 * number(1, 6)
    scales = [tensor(len(heads), E, dtype=small) for _ in range(2)]
    yield mixed_attention, torch.ops.nas.attention, (tensor(B, T, 3 * E), *scales, heads)

    distance = tensor(T, dtype=small)
    inputs = tensor(B, T, 3 * E), *scales, heads, None, None, distance
    yield attention_with_distance, torch.ops.nas.attention, inputs

    G, size = number(1, 3), 2 * number(1, 9)
    H = G * number(1, 3)
    norm, reads = (tensor(*shape, dtype=small) if number(0, 1) else None
                   for shape in ((2,), (H, G)))
    rope = [tensor(T, size // 2, dtype=small) for _ in range(2)] if number(0, 1) else [None, None]
    x = tensor(B, T, (H + 2 * G) * size)
    yield heads_with_numbers, torch.ops.nas.heads, (x, size, H, G, norm, *rope, reads)

    C, k, stride, dilation = number(1, 40), number(1, 7), number(1, 3), number(1, 3)
    padding = (dilation * (k - 1) + 1) // 2 + number(0, 1) # what one pixel needs, or more
    for grad_x, grad_w in ((True, True), (True, False), (False, True)):
        x = tensor(B, C, number(1, 17), number(1, 17), grad=grad_x)
        w = tensor(C, 1, k, k, grad=grad_w)
        yield depthwise, torch.ops.nas.depthwise, (x, w, stride, padding, dilation)


def leaves_of(inputs):
    return [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]


def in_float64(inputs):
    return [t.detach().double().requires_grad_(t.requires_grad)
            if isinstance(t, torch.Tensor) else t for t in inputs]


def run(function, inputs, enabled):
    """[output, gradients to all inputs], for a random direction."""
    fused_ops.use_fused_ops(enabled)
    y = function(*inputs)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    direction = direction.to(torch.bfloat16).to(y.dtype) # the same numbers in every type
    return [y, *torch.autograd.grad(y, leaves_of(inputs), direction)]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("dtype, tolerance", DTYPES)
def test_kernels_are_their_references(seed, dtype, tolerance):
    """As near to PyTorch's result in float64 as PyTorch's result in the same type is."""
    for reference, _, inputs in cases(seed, dtype):
        truth = run(reference, in_float64(inputs), False)
        theirs, ours = run(reference, inputs, False), run(reference, inputs, True)
        for i, (t, a, b) in enumerate(zip(truth, theirs, ours, strict=True)):
            assert a.shape == b.shape and a.dtype == b.dtype
            error, scale = (b.double() - t).abs().max().item(), t.abs().max().item()
            allowed = 3 * (a.double() - t).abs().max().item() + tolerance * max(scale, 1e-3)
            where = f"{reference.__name__}, output or gradient {i}"
            assert error <= allowed, f"{where}: {error:.2e} > {allowed:.2e}, of {scale:.2e}"


@pytest.mark.parametrize("seed", range(3))
def test_strides_are_free(seed):
    def loosened(t):
        """The same tensor with another order of its dimensions in memory."""
        other = t.detach().transpose(0, -1).contiguous().transpose(0, -1)
        return other.requires_grad_(t.requires_grad)

    for reference, _, inputs in cases(seed, torch.float64):
        loose = [loosened(t) if isinstance(t, torch.Tensor) and t.dim() > 1 else t for t in inputs]
        y, z = reference(*inputs), reference(*loose)
        assert torch.allclose(y, z, rtol=1e-10, atol=1e-10)
        g = torch.ones((), dtype=y.dtype).expand(y.shape) # with strides of 0, as sum() sends it
        grads = torch.autograd.grad(y, leaves_of(inputs), g)
        for a, b in zip(grads, torch.autograd.grad(z, leaves_of(loose), g), strict=True):
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("seed", range(2))
def test_operators_are_registered_right(seed):
    for _, operator, inputs in cases(seed, torch.float32):
        torch.library.opcheck(operator, inputs, test_utils=TESTS)


@pytest.mark.parametrize("need_x, need_w", [(True, True), (True, False), (False, True)])
def test_depthwise_backward_is_registered_right(need_x, need_w):
    """Also the memory format of the gradient to x, whatever that of x is."""
    x, weight, g = torch.randn(2, 5, 7, 8), torch.randn(5, 1, 3, 3), torch.randn(2, 5, 4, 4)
    torch.library.opcheck(torch.ops.nas.depthwise_backward,
                          (g, x, weight, 2, 1, 1, need_x, need_w), test_utils=FORWARD_TESTS)


@pytest.mark.parametrize("need_bias", [True, False])
def test_attention_backward_is_registered_right(need_bias):
    """Also the strides of the gradient to the bias, whose rows the kernel pads to whole vectors."""
    g, qkv = torch.randn(2, 3, 4), torch.randn(2, 3, 12)
    scale, bias = torch.randn(1, 4), torch.randn(2, 3, 3)
    inputs = (g, qkv, scale, scale, [2], bias, None, None, need_bias)
    torch.library.opcheck(torch.ops.nas.attention_backward, inputs, test_utils=FORWARD_TESTS)


@pytest.mark.parametrize("need_W, need_bias", [(False, False), (True, False), (False, True)])
def test_linear_backward_is_registered_right(need_W, need_bias):
    M, sizes = torch.randn(2, 2), ([3, 6], [2, 4])
    for dtype in (torch.float32, torch.bfloat16):
        g, x, W = (torch.randn(*shape).to(dtype) for shape in ((5, 6), (5, 4), (6, 4)))
        inputs = (g, x, W, M, *sizes, need_W, need_bias, True)
        torch.library.opcheck(torch.ops.nas.block_linear_backward, inputs,
                              test_utils=FORWARD_TESTS)


def test_second_derivatives_are_refused():
    """They would be wrong, and nothing would say so."""
    for _, operator, inputs in cases(0, torch.float64):
        leaves = leaves_of(inputs)
        torch.autograd.grad(operator(*inputs).sum(), leaves)
        with pytest.raises(NotImplementedError, match="no second derivatives"):
            torch.autograd.grad(operator(*inputs).sum(), leaves, create_graph=True)


def test_gradients_are_finite_differences():
    def shortened(t):
        return t[:1, :5].detach().requires_grad_()

    for reference, _, inputs in cases(5, torch.float64):
        inputs = [shortened(t) if isinstance(t, torch.Tensor) and t.dim() == 3 else t
                  for t in inputs]
        assert torch.autograd.gradcheck(reference, inputs, fast_mode=True)


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("k", [1, 2, 3, 5, 7, 11])
def test_depthwise_is_conv2d_at_every_shape(k, stride, dilation):
    """Images of one pixel, smaller than the kernel, and wider than the kernel's blocks; channels
    below, at and above whole vectors."""
    shapes = ((1, 1, 1, 1), (3, 8, 2, 3), (2, 33, 5, 30), (1, 17, 30, 16), (0, 4, 9, 9))
    for padding in {0, dilation * (k // 2), k + 2}:
        for B, C, H, W in shapes:
            if min(H, W) + 2 * padding <= dilation * (k - 1): # there is no such convolution
                continue
            x = torch.randn(B, C, H, W, dtype=torch.float64, requires_grad=True)
            weight = torch.randn(C, 1, k, k, dtype=torch.float64, requires_grad=True)
            inputs = x, weight, stride, padding, dilation
            theirs, ours = run(depthwise, inputs, False), run(depthwise, inputs, True)
            for a, b in zip(theirs, ours, strict=True):
                assert a.shape == b.shape, (inputs[2:], x.shape)
                assert torch.allclose(a, b, rtol=1e-12, atol=1e-12), (inputs[2:], x.shape)


MIXED = supernet.Sampled((3, 5, 7), weights=torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64))


@pytest.mark.parametrize("o, k", [(None, 3), (None, 7), (None, MIXED), (supernet.Size(10), 5)])
def test_depthwise_takes_what_the_network_gives(o, k):
    """Weights that are cut out of larger ones, or scaled, with a bias; images of any memory format.
    The output is in channels_last."""
    conv = Conv2d(24, 24, (3, 5, 7), stride=2, dilation=2, groups=24, bias=True).double()
    k = k if k is MIXED else supernet.Sampled((3, 5, 7), k)
    x = torch.randn(2, 48, 9, 11, dtype=torch.float64)
    formats = (x[:, :24], x[:, ::2], x[:, :24].transpose(2, 3),
               x[:, :24].to(memory_format=torch.channels_last))
    for t in formats:
        t = t[:, :10] if o else t
        inputs = t.requires_grad_(), *conv.parameters()
        theirs, ours = (run(lambda t, *_: conv(t, o=o, k=k), inputs, enabled)
                        for enabled in (False, True))
        for a, b in zip(theirs, ours, strict=True):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)
        assert all(t.is_contiguous(memory_format=torch.channels_last) for t in ours[:2])


def test_depthwise_on_two_threads():
    """The gradient to the weights is summed in another order, but always in the same one."""
    x = torch.randn(8, 40, 16, 16, requires_grad=True)
    inputs = x, torch.randn(40, 1, 5, 5, requires_grad=True), 1, 2, 1
    one, threads = run(depthwise, inputs, True), torch.get_num_threads()
    torch.set_num_threads(2)
    two, again = run(depthwise, inputs, True), run(depthwise, inputs, True)
    torch.set_num_threads(threads)
    for a, b, c in zip(one, two, again, strict=True):
        assert torch.equal(b, c) and (a - b).abs().max() <= 1e-6 * a.abs().max()


def test_attention_is_causal():
    """Later tokens change nothing, however large their scores, at lengths around the kernel's
    blocks of queries."""
    for T in (1, 63, 64, 65, 130):
        qkv, ones = torch.randn(1, T, 36), torch.ones(1, 12)
        y = mixed_attention(qkv, ones, ones, (3,))
        for t in {0, T // 2, T - 1}:
            changed = qkv.clone()
            changed[:, t:] *= 1000
            assert torch.equal(mixed_attention(changed, ones, ones, (3,))[:, :t], y[:, :t])


@pytest.mark.parametrize("windows", [0, 3])
def test_window_attention_is_the_same_on_every_device(windows):
    """The form for a GPU, also computed here on a CPU."""
    q, k, v = (torch.randn(6, 4, 5, 8, dtype=torch.float64) for _ in range(3)) # (B * M, h, T, d)
    bias = torch.randn(4, 5, 5, dtype=torch.float64)
    mask = torch.randn(windows, 5, 5, dtype=torch.float64) if windows else None
    y = fused_ops.biased_attention(q, k, v, bias, mask)
    assert torch.allclose(y, fused_ops.biased_attention_cpu(q, k, v, bias, mask), rtol=1e-12)


def test_not_a_number_stays_one():
    """A fault must be seen, and not be hidden by the kernel's own exp."""
    for reference, _, inputs in cases(1, torch.float32):
        if reference is not depthwise: # which may not read that pixel
            with torch.no_grad():
                inputs[0][0, -1, -1] = torch.nan
            assert reference(*inputs).isnan().any()


@pytest.mark.parametrize("head_size", [0, 8])
def test_memory_kept_for_backward(head_size):
    """A mixture keeps at most 1.5 times what the plain network keeps; 1.3 times with a fixed
    head_size."""
    sizes = dict(block_size=64, vocab_size=65, head_size=head_size, bias=False)
    net = build(dict(n_layer=[2, 3, 4], n_embd=[32, 64, 96], n_head=[2, 4, 8],
                     mlp_ratio=[2, 3, 4]) | sizes)
    plain = build(dict(n_layer=4, n_embd=96, n_head=8, mlp_ratio=4) | sizes)
    x = torch.randint(65, (8, 64))

    def kept_bytes(net, *third):
        storages = {}
        own = {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers(), x)}

        def keep(t):
            return storages.setdefault(t.untyped_storage().data_ptr(), t)

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            net(x, x, *third)
        kept = [t for pointer, t in storages.items() if pointer not in own]
        return sum(t.untyped_storage().nbytes() for t in kept)

    weights = {name: torch.ones(c.shape) / len(c.options) for name, c in net.choices.items()}
    limit = (1.3 if head_size else 1.5) * kept_bytes(plain)
    assert kept_bytes(net, weights) <= limit
    net.requires_grad_(False)
    assert kept_bytes(net, {name: w.requires_grad_() for name, w in weights.items()}) <= limit


@pytest.mark.parametrize("enabled", [True, False])
def test_frozen_weights_get_no_gradient_and_cost_less(enabled):
    """The arch step of a mixture multiplies no more than the forward pass and the gradient to the
    activations need: two thirds of a training step."""
    fused_ops.use_fused_ops(enabled)
    net = build(dict(block_size=64, vocab_size=65, n_layer=2, n_embd=[32, 64], n_head=4,
                     mlp_ratio=[2, 4], bias=False))
    x = torch.randint(65, (4, 64))
    leaves = {name: (torch.ones(c.shape) / len(c.options)).requires_grad_()
              for name, c in net.choices.items()}
    net.requires_grad_(False)
    with torch.profiler.profile(with_flops=True) as profile:
        net(x, x, leaves)[1].backward()
    assert all(p.grad is None for p in net.parameters())
    assert leaves["n_embd"].grad.any() and leaves["mlp_ratio"].grad.any()
    matmuls = sum(e.flops for e in profile.key_averages() if e.key in ("aten::mm", "aten::addmm"))
    per_token = sum(p.numel() for name, p in net.named_parameters()
                    if p.dim() == 2 and "wpe" not in name)
    assert matmuls <= 1.05 * 2 * (2 * per_token * x.numel()), (matmuls, per_token)


def test_without_a_compiler_the_search_says_so_and_runs(data_dir, tmp_path):
    tiny = [f"--data_dir={data_dir}", *flags(TINY_SEARCH)]
    out = succeeds("train_search.py", f"--out_dir={tmp_path}/s", *tiny, CXX="/no/such/compiler",
                   TORCH_EXTENSIONS_DIR=str(tmp_path))
    said = [line for line in out.splitlines() if "fused_ops.cpp is not in use" in line]
    assert len(said) == 1 and "found:" in out
    out = succeeds("train_search.py", f"--out_dir={tmp_path}/t", "--fused=False", *tiny)
    assert "fused_ops.cpp" not in out.replace("fused: True", "")


def test_of_two_compilations_at_once_one_is_killed_and_holds_up_no_other(tmp_path):
    # unoptimised, in a third of the time
    code = ("import fused_ops; fused_ops.FLAGS[0] = '-O0'; fused_ops.use_fused_ops(); "
            "print(fused_ops.enabled)")
    command = [sys.executable, "-c", code]
    where = dict(cwd=ROOT, env={**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)}, text=True,
                 stdout=subprocess.PIPE, start_new_session=True)
    killed, other = (subprocess.Popen(command, **where) for _ in range(2))
    for process in (killed, other):
        assert "compiling" in process.stdout.readline()
    while len(list(tmp_path.glob("*/build.ninja"))) < 2: # both builds have begun
        assert killed.poll() is None, "compiled before it could be killed"
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    for compiles in (True, False):
        process = other if compiles else subprocess.Popen(command, **where)
        out = process.communicate(timeout=200)[0]
        assert out.splitlines()[-1] == "True" and ("compiled" in out) == compiles, out


def compiled_and_eager(**kinds):
    """A net with compiled parts, and one of the same weights without."""
    torch._dynamo.reset()
    net = build(dict(block_size=16, vocab_size=29, n_layer=[1, 2], n_embd=[24, 48, 96],
                     n_head=[2, 4, 6], mlp_ratio=[2, 4], bias=False) | kinds)
    eager = build(vars(net.config))
    eager.load_state_dict(net.state_dict())
    return net.compile_parts(), eager


def check_compiled(net, eager, x, third):
    """The output and, after a backward pass, its gradient to the weights are those of eager."""
    outputs = []
    for network in (net, eager):
        network.zero_grad()
        logits, loss = network(x, x, third)
        loss.backward()
        outputs.append([logits, network.transformer.wte.weight.grad])
    for a, b in zip(*outputs, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_compiled_parts_do_not_recompile(monkeypatch):
    """After a few architectures, 50 more, hard, mixed and straight-through, use the graphs that
    there are, and are right; no graph has a break. The graphs are not made into machine code."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    counters.clear()
    (net, eager), x = compiled_and_eager(), torch.randint(29, (3, 16))
    generator = torch.Generator().manual_seed(0)
    drnas, gdas = (METHODS[name](net.choices, generator) for name in ("drnas", "gdas"))

    def thirds():
        yield uniform(net.choices, generator)
        yield {name: w.detach() for name, w in drnas.sample(0.0, generator).items()}
        yield discretize(net.choices, gdas.sample(0.0, generator))
        leaves = {name: w.detach().requires_grad_()
                  for name, w in gdas.sample(0.0, generator).items()}
        yield straight_through_arch(net.choices, leaves)

    for i in range(58):
        if i == 8: # the widest and the narrowest have come by
            graphs = counters["stats"]["unique_graphs"]
        for third in thirds():
            check_compiled(net, eager, x, third)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == graphs, dict(counters["stats"])


def test_a_mixture_of_kinds_is_one_graph_of_a_block_and_one_of_the_head(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    counters.clear()
    (net, eager), x = compiled_and_eager(**TINY_KINDS), torch.randint(29, (3, 16))
    drnas = METHODS["drnas"](net.choices, torch.Generator().manual_seed(0))
    for seed in range(3):
        sample = drnas.sample(0.0, torch.Generator().manual_seed(seed))
        check_compiled(net, eager, x, {name: w.detach() for name, w in sample.items()})
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 2


def test_compiled_parts_are_right():
    """As machine code: one graph for two architectures of part of the width."""
    (net, eager), x = compiled_and_eager(), torch.randint(29, (3, 16))
    for n in (24, 48):
        arch = {"n_layer": 1, "n_embd": n, "n_head": [2], "mlp_ratio": [4]}
        check_compiled(net, eager, x, arch)
