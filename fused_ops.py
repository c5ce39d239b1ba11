"""The mixing kernels: each in PyTorch, which says what is computed, and for a CPU in fused_ops.cpp."""
import torch
from torch.nn import functional as F
import hashlib
import os
import platform
import sys
import tempfile
import time


FLAGS = ["-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros"]
fused = False # whether CPU mixtures run in fused_ops.cpp


def use_fused_ops(wanted=True):
    """Turns the kernels of fused_ops.cpp on, or off; compiles them first where this machine has not yet done so. Without a
    compiler the same is computed by PyTorch, after one line that says so."""
    global fused
    fused = wanted and (hasattr(torch.ops.nas, "attention") or compile_fused_ops())


def compile_fused_ops():
    from torch.utils import cpp_extension
    file = os.path.join(os.path.dirname(os.path.abspath(__file__)), "fused_ops.cpp")
    with open(file) as f: # a build is for one source, one PyTorch and one kind of processor
        identity = repr((f.read(), FLAGS, torch.__version__, platform.machine(), torch.backends.cpu.get_cpu_capability(), processor()))
    name, start = "nas_" + hashlib.sha256(identity.encode()).hexdigest()[:12], time.perf_counter()
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    library = os.path.join(root, f"{name}.so")

    def say(line):
        if os.environ.get("RANK", "0") == "0": # once, not by every process of torchrun
            print(line, flush=True)

    try:
        if os.path.exists(library):
            torch.ops.load_library(library)
        else: # in a folder of its own: PyTorch's lock on a shared one outlives a process that is killed, and all later ones wait for it
            say("compiling fused_ops.cpp, once on this machine, about 35 s ...")
            os.environ["PATH"] += os.pathsep + os.path.dirname(sys.executable) # ninja, of a virtual environment that is not activated
            os.makedirs(root, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=root, ignore_cleanup_errors=True) as folder:
                cpp_extension.load(name, [file], extra_cflags=FLAGS, build_directory=folder, is_python_module=False)
                os.replace(os.path.join(folder, f"{name}.so"), library)
            say(f"compiled fused_ops.cpp in {time.perf_counter() - start:.0f} s")
    except (RuntimeError, OSError, ImportError, SystemError) as e: # no compiler, no ninja, no room, a library that does not load
        say(f"fused_ops.cpp is not in use, PyTorch computes the same more slowly ({str(e).strip().splitlines()[0]}).")
        return False
    register_fused_ops()
    return True


def processor():
    """The model of this processor, for code that was compiled for it alone."""
    try:
        with open("/proc/cpuinfo") as f:
            return next((line for line in f if line.startswith("model name")), "")
    except OSError:
        return platform.processor()


def register_fused_ops():
    """The shapes of what the kernels return."""
    library = torch.library

    library.register_fake("nas::layer_norm")(lambda x, weight, bias, p, n, eps: torch.empty_like(x, memory_format=torch.contiguous_format))
    library.register_fake("nas::layer_norm_backward")(lambda g, x, weight, p, n, eps: (
        torch.empty_like(x, memory_format=torch.contiguous_format), *(small(x, t.shape) for t in (weight, weight, p))))
    library.register_fake("nas::block_linear")(lambda x, W, bias, M, o, i: x.new_empty((*x.shape[:-1], W.shape[0])))
    library.register_fake("nas::block_linear_backward")(lambda g, x, W, M, o, i, need_W, need_bias, need_M: (
        torch.empty_like(x, memory_format=torch.contiguous_format), W.new_empty(W.shape if need_W else 0),
        small(x, W.shape[:1] if need_bias else 0), small(x, M.shape if need_M else 0)))
    library.register_fake("nas::attention")(lambda qkv, q_scale, y_scale, n_head, bias=None, mask=None: qkv.new_empty(
        (*qkv.shape[:2], qkv.shape[2] // 3)))
    library.register_fake("nas::attention_backward")(lambda g, qkv, q_scale, y_scale, n_head, bias=None, mask=None, need_bias=False: (
        torch.empty_like(qkv, memory_format=torch.contiguous_format), small(qkv, q_scale.shape), small(qkv, y_scale.shape),
        small(qkv, bias.shape if need_bias else (0, *2 * qkv.shape[1:2]))))
    library.register_fake("nas::depthwise")(lambda x, weight, stride, padding, dilation: torch.empty(
        (*x.shape[:2], *((n + 2 * padding - dilation * (weight.shape[2] - 1) - 1) // stride + 1 for n in x.shape[2:])),
        dtype=x.dtype, device=x.device, memory_format=torch.channels_last))
    library.register_fake("nas::depthwise_backward")(lambda g, x, weight, stride, padding, dilation, need_x, need_w: (
        torch.empty_like(x, memory_format=torch.channels_last) if need_x else x.new_empty(0),
        weight.new_empty(weight.shape if need_w else 0)))

    def small(x, shape): # what the kernels sum up is float32, or float64
        return x.new_empty(shape, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def mixed_norm(x, weight, bias, p, n, eps):
    """weight * sum_k p_k pad((x[:n_k] - mean_k) / std_k) + bias: x (..., N), n increasing options, p their weights -> (..., N).

    Each block of channels between two options is reduced once; the blocks' means and squared deviations are merged
    into those of every prefix (Chan et al. 1979), which stays exact where E[x^2] - mean^2 would cancel.
    """
    if fused and x.is_cpu:
        return torch.ops.nas.layer_norm(x, weight, bias, p, n, eps)
    x, dtype = x.to(p.dtype), x.dtype # float32, as PyTorch's autocast does its norms
    sizes = [b - a for a, b in zip((0, *n[:-1]), n, strict=True)]
    blocks = x.split(sizes, dim=-1)
    mean, m2, scales, shifts = 0.0, 0.0, [], []
    for k, (size, block) in enumerate(zip(sizes, blocks, strict=True)):
        var_b, mean_b = torch.var_mean(block, dim=-1, keepdim=True, correction=0) # (..., 1)
        delta = mean_b - mean
        m2 = m2 + var_b * size + delta * delta * ((n[k] - size) * size / n[k])
        mean = mean + delta * (size / n[k])
        scales.append(p[k] * torch.rsqrt(m2 / n[k] + eps))
        shifts.append(scales[-1] * mean)
    # block k is in every option from k on
    y = weight * torch.cat([block * sum(scales[k:]) - sum(shifts[k:]) for k, block in enumerate(blocks)], dim=-1)
    y = y if bias is None else y + bias
    return y if torch.is_autocast_enabled("cuda") else y.to(dtype) # the norms of a single size stay in float32 there


def mixed_linear(x, W, bias, M, o, i):
    """x @ (W * M).T + bias: M (len(o), len(i)) is constant on the blocks that the row ends o and the column ends i cut W into.

    Frozen weights get no gradient, and that of M comes at no more than the price of the gradient to x: by block rows r,
    y_r = W_r (M_r * x), the products with W_r are what the gradient to x is made of.
    """
    if fused and x.is_cpu:
        if torch.is_autocast_enabled("cpu"): # which knows torch's own operations alone
            x, W = (t.to(torch.get_autocast_dtype("cpu")) for t in (x, W))
        return torch.ops.nas.block_linear(x, W, bias, M, o, i)
    rows, columns = ([b - a for a, b in zip((0, *n[:-1]), n, strict=True)] for n in (o, i))
    M = torch.cat([M.to(W.dtype)[:, [k]].expand(-1, size) for k, size in enumerate(columns)], dim=1) # (len(o), in)
    if W.requires_grad or not M.requires_grad:
        return F.linear(x, W * torch.cat([M[[k]].expand(size, -1) for k, size in enumerate(rows)]), bias)
    y = torch.cat([F.linear(x * m, W_r) for m, W_r in zip(M, W.split(rows), strict=True)], dim=-1)
    return y if bias is None else y + bias


def depthwise(x, weight, stride, padding, dilation):
    """A convolution of every channel by itself: x (B, C, H, W), weight (C, 1, k, k) -> (B, C, H', W'), of the kernel channels_last."""
    if fused and x.is_cpu:
        if torch.is_autocast_enabled("cpu"):
            x, weight = (t.to(torch.get_autocast_dtype("cpu")) for t in (x, weight))
        return torch.ops.nas.depthwise(x, weight, stride, padding, dilation)
    return F.conv2d(x, weight, None, stride, padding, dilation, weight.shape[0])


def causal_attention(q, k, v, n_head, dropout=0.0, scale=None, is_causal=True):
    """(B, T, n) each -> (B, T, n): n_head heads of n / n_head channels side by side."""
    q, k, v = (t.unflatten(2, (n_head, -1)).transpose(1, 2) for t in (q, k, v)) # (B, n_head, T, n / n_head)
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale, is_causal=is_causal)
    return y.transpose(1, 2).flatten(2)


def mixed_attention(qkv, q_scale, y_scale, n_head, dropout=0.0):
    """sum_j y_scale_j * attention of n_head[j] heads on (q_scale_j * q, k, v). qkv: (B, T, 3n), scales: (len(n_head), n)."""
    if fused and qkv.is_cpu and not dropout:
        return torch.ops.nas.attention(qkv, q_scale, y_scale, n_head)
    q, k, v = qkv.chunk(3, dim=2)
    q_scale, y_scale = q_scale.to(q.dtype), y_scale.to(q.dtype) # else they would undo autocast
    return sum(causal_attention(q * q_scale[j], k, v, h, dropout, scale=1.0) * y_scale[j] for j, h in enumerate(n_head))


def window_attention(qkv, q_scale, y_scale, n_head, bias, mask=None):
    """mixed_attention() within windows, not causal: qkv (B * M, T, 3n), bias (heads, T, T) on the scores, those of a head count the
    first; mask: (M, T, T), of which window i has the i % M-th."""
    if fused and qkv.is_cpu:
        return torch.ops.nas.attention(qkv, q_scale, y_scale, n_head, bias, mask)
    y, B = 0, len(qkv)
    for j, h in enumerate(n_head):
        b, (q, k, v) = bias[None, :h], (t.unflatten(2, (h, -1)).transpose(1, 2) for t in qkv.chunk(3, dim=2)) # (B M, h, T, n / h)
        q = q * q_scale[j].view(h, 1, -1).to(q.dtype)
        if qkv.is_cpu: # where PyTorch has no fused attention that learns a bias
            scores = q @ k.transpose(2, 3)
            scores = scores + b if mask is None else (scores.unflatten(0, (-1, len(mask))) + (b + mask[:, None])).flatten(0, 1)
            out = scores.softmax(-1) @ v
        else:
            if mask is not None: # the windows of an image as its heads
                b, (q, k, v) = (b + mask[:, None]).flatten(0, 1)[None], (t.unflatten(0, (-1, len(mask))).flatten(1, 2) for t in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, b.to(q.dtype), scale=1.0).reshape(B, h, *v.shape[2:])
        y = y + out.transpose(1, 2).flatten(2) * y_scale[j].to(q.dtype)
    return y


def rotary(qkv, n_head, past=0):
    """RoPE (Su et al. 2021): rotates channels 2i and 2i + 1 of every head of the queries and keys
    by position * 10000^(-2i/d). qkv: (B, T, 3n); past: how many tokens came before."""
    T, n = qkv.shape[1], qkv.shape[2] // 3
    a, b = qkv[..., :2 * n].unflatten(2, (2 * n_head, -1, 2)).unbind(-1) # (B, T, 2 n_head, d / 2)
    frequency = 10000 ** (-torch.arange(a.shape[3], device=qkv.device) / a.shape[3]) # (d / 2,)
    position = torch.arange(past, past + T, device=qkv.device)
    angle = torch.outer(position, frequency).unsqueeze(1) # (T, 1, d / 2)
    cos, sin = angle.cos(), angle.sin()
    rotated = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(2) # (B, T, 2n)
    return torch.cat((rotated.to(qkv.dtype), qkv[..., 2 * n:]), 2)


def mixed_rotary_attention(qkv, n, p, y_scale, n_head, dropout=0.0):
    """mixed_attention() with RoPE, for widths n with weights p: heads of n_k / n_head[j] channels,
    and scores sum_k p_k scores_k. Each width rotates by frequencies of its own, so the queries and
    keys of all widths stand side by side."""
    y, v = 0.0, qkv.chunk(3, dim=2)[2]
    for j, h in enumerate(n_head):
        # width e uses the first e / h channels of every head
        parts = [qkv.unflatten(2, (3 * h, -1))[..., :e // h].flatten(2) for e in n]
        parts = [rotary(part, h).unflatten(2, (3, h, -1)).unbind(2) for part in parts]
        q = [part[0] * (w * (e / h) ** -0.5) for part, e, w in zip(parts, n, p, strict=True)]
        q, k = torch.cat(q, -1).flatten(2), torch.cat([part[1] for part in parts], -1).flatten(2)
        y = y + causal_attention(q, k, v, h, dropout, scale=1.0) * y_scale[j].to(v.dtype)
    return y
