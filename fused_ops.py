"""
The mixing kernels, and the PyTorch reference beside each.

A search step should cost what a plain training step costs, so a mixture has to be one pass over
its data. In PyTorch it is many: every width of a norm, every block of a weight matrix and every
head count of an attention is an operation of its own, which reads and writes whole tensors. On a
CPU the kernels of fused_ops.cpp do the same in one pass, forward and backward. The depthwise
convolution mixes nothing: it has a kernel because its backward pass in PyTorch is slow on a CPU.

The functions of the first part say what is computed. Each of them calls its kernel where the
kernels are enabled and the tensors are on a CPU. The second part compiles fused_ops.cpp and
switches it on and off.
"""
import hashlib
import os
import platform
import sys
import tempfile
import time

import torch
from torch.nn import functional as F

enabled = False # whether the kernels of fused_ops.cpp are in use; use_fused_ops() sets it

# -----------------------------------------------------------------------------
# what is computed

def mixed_norm(x, weight, bias, p, n, eps):
    """LayerNorm over a mixture of widths:
    weight * sum_k p_k pad((x[:n_k] - mean_k) / std_k) + bias.

    x: (..., N), weight and bias: (N,), bias may be None -> (..., N).
    n: the widths in increasing order, the last one N. p: (len(n),), their weights.

    Each block of channels between two widths is reduced once. The blocks' means and squared
    deviations are merged into those of every prefix (Chan et al. 1979), which stays exact where
    E[x^2] - mean^2 would cancel.
    """
    if enabled and x.is_cpu:
        return torch.ops.nas.layer_norm(x, weight, bias, p, n, eps)
    dtype = x.dtype
    x = x.to(p.dtype) # float32, as PyTorch's autocast does its norms
    sizes = block_sizes(n)
    blocks = x.split(sizes, dim=-1)

    # of each option k: the scale p_k / std_k, and the shift p_k mean_k / std_k
    mean, m2, scales, shifts = 0.0, 0.0, [], [] # mean, m2: of the first n_k channels
    for k, (size, block) in enumerate(zip(sizes, blocks, strict=True)):
        var_b, mean_b = torch.var_mean(block, dim=-1, keepdim=True, correction=0) # (..., 1)
        delta = mean_b - mean
        m2 = m2 + var_b * size + delta * delta * ((n[k] - size) * size / n[k])
        mean = mean + delta * (size / n[k])
        scales.append(p[k] * torch.rsqrt(m2 / n[k] + eps))
        shifts.append(scales[-1] * mean)

    # block k is in option k and in all wider ones
    mixed = [block * sum(scales[k:]) - sum(shifts[k:]) for k, block in enumerate(blocks)]
    y = weight * torch.cat(mixed, dim=-1)
    y = y if bias is None else y + bias
    # on cuda autocast leaves the norm of a single width in float32 too
    return y if torch.is_autocast_enabled("cuda") else y.to(dtype)


def mixed_linear(x, W, bias, M, o, i):
    """Linear over a mixture of widths, in and out of the same choice: x @ (W * M).T + bias.

    x: (..., in), W: (out, in), bias: (out,) or None -> (..., out).
    The row ends o and the column ends i cut W into blocks. M: (len(o), len(i)) is the total
    weight of the options that use each block.

    Where W is frozen, the gradient to M costs no extra product: block row r computes
    y_r = W_r (M_r * x), and both the gradient to M and that to x come from g_r W_r.
    """
    if enabled and x.is_cpu:
        return torch.ops.nas.block_linear(*autocast_cpu(x, W), bias, M, o, i)
    columns = [M.to(W.dtype)[:, [k]].expand(-1, size) for k, size in enumerate(block_sizes(i))]
    M = torch.cat(columns, dim=1) # (len(o), in)
    rows = block_sizes(o)
    if W.requires_grad or not M.requires_grad:
        M = torch.cat([M[[k]].expand(size, -1) for k, size in enumerate(rows)]) # (out, in)
        return F.linear(x, W * M, bias)
    y = torch.cat([F.linear(x * m, W_r) for m, W_r in zip(M, W.split(rows), strict=True)], dim=-1)
    return y if bias is None else y + bias


def causal_attention(q, k, v, n_head, dropout=0.0, scale=None, is_causal=True):
    """Plain attention, without a kernel of ours: (B, T, n) each -> (B, T, n).

    The n_head heads of n / n_head channels lie side by side. scale: the factor of the scores,
    None for 1/sqrt(head size).
    """
    q, k, v = (split_heads(t, n_head) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale, is_causal=is_causal)
    return merge_heads(y)


def mixed_attention(qkv, q_scale, y_scale, n_head, dropout=0.0):
    """Causal attention over a mixture of head counts:
    sum_j y_scale_j * attention with n_head[j] heads on (q_scale_j * q, k, v).

    qkv: (B, T, 3n), q_scale and y_scale: (len(n_head), n) -> (B, T, n).
    q_scale includes 1/sqrt(head size): the scores are not scaled any further.
    """
    if enabled and qkv.is_cpu and not dropout:
        return torch.ops.nas.attention(qkv, q_scale, y_scale, n_head)
    q, k, v = qkv.chunk(3, dim=2)
    q_scale, y_scale = q_scale.to(q.dtype), y_scale.to(q.dtype) # float32 scales would undo autocast
    return sum(causal_attention(q * q_scale[j], k, v, h, dropout, scale=1.0) * y_scale[j]
               for j, h in enumerate(n_head))


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


def window_attention(qkv, q_scale, y_scale, n_head, bias, mask=None):
    """mixed_attention() within windows: not causal, with a bias and a mask added to the scores.

    qkv: (B * M, T, 3n), the M windows of an image one after the other -> (B * M, T, n).
    bias: (H, T, T), H the largest head count; h heads use the first h of it.
    mask: (M, T, T), one for each window of an image, or None.
    """
    if enabled and qkv.is_cpu:
        return torch.ops.nas.attention(qkv, q_scale, y_scale, n_head, bias, mask)
    attend = biased_attention_cpu if qkv.is_cpu else biased_attention
    y = 0
    for j, h in enumerate(n_head):
        q, k, v = (split_heads(t, h) for t in qkv.chunk(3, dim=2)) # (B * M, h, T, n / h)
        q = q * q_scale[j].view(h, 1, -1).to(q.dtype)
        heads = attend(q, k, v, bias[:h], mask)
        y = y + merge_heads(heads) * y_scale[j].to(q.dtype)
    return y


def biased_attention(q, k, v, bias, mask):
    """softmax(q k^T + bias + mask) v. q, k, v: (B * M, h, T, d), bias: (h, T, T)."""
    shape = v.shape
    if mask is None:
        bias = bias[None] # (1, h, T, T)
    else: # the windows of an image become heads: (1, M * h, T, T) serves all images
        bias = (bias[None] + mask[:, None]).flatten(0, 1)[None]
        q, k, v = (t.unflatten(0, (-1, len(mask))).flatten(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype), scale=1.0)
    return y.reshape(shape)


def biased_attention_cpu(q, k, v, bias, mask):
    """biased_attention() step by step: on a CPU PyTorch's fused one has no gradient to the bias."""
    scores, bias = q @ k.transpose(2, 3), bias[None] # (B * M, h, T, T), (1, h, T, T)
    if mask is None:
        scores = scores + bias
    else:
        scores = (scores.unflatten(0, (-1, len(mask))) + (bias + mask[:, None])).flatten(0, 1)
    return scores.softmax(-1) @ v


def depthwise(x, weight, stride, padding, dilation):
    """The convolution of every channel with a kernel of its own.

    x: (B, C, H, W), weight: (C, 1, k, k) -> (B, C, H', W'). The kernel returns it in channels_last.
    """
    if enabled and x.is_cpu:
        return torch.ops.nas.depthwise(*autocast_cpu(x, weight), stride, padding, dilation)
    return F.conv2d(x, weight, None, stride, padding, dilation, weight.shape[0])


def block_sizes(ends):
    """The sizes of the blocks that end at `ends`: (2, 3, 7) -> [2, 1, 4]."""
    return [b - a for a, b in zip((0, *ends[:-1]), ends, strict=True)]


def split_heads(t, n_head):
    return t.unflatten(2, (n_head, -1)).transpose(1, 2) # (B, T, n) -> (B, n_head, T, n / n_head)


def merge_heads(t):
    return t.transpose(1, 2).flatten(2) # (B, n_head, T, n / n_head) -> (B, T, n)


def autocast_cpu(*tensors):
    """The tensors in autocast's type: autocast itself casts for PyTorch's own operations only."""
    if not torch.is_autocast_enabled("cpu"):
        return tensors
    return [t.to(torch.get_autocast_dtype("cpu")) for t in tensors]

# -----------------------------------------------------------------------------
# compiling fused_ops.cpp, and switching it on and off

FLAGS = ["-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math",
         "-fassociative-math", "-fno-signed-zeros"]


def use_fused_ops(wanted=True):
    """Switches the kernels on or off. The first use on a machine compiles them. Without a compiler
    one line says so, and PyTorch computes the same."""
    global enabled
    enabled = wanted and (hasattr(torch.ops.nas, "attention") or compile_fused_ops())


def compile_fused_ops():
    """Loads the kernels, compiled first if this machine has not done so yet; returns success."""
    from torch.utils import cpp_extension
    source = os.path.join(os.path.dirname(os.path.abspath(__file__)), "fused_ops.cpp")
    name, start = build_name(source), time.perf_counter()
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    library = os.path.join(root, f"{name}.so")
    try:
        if os.path.exists(library):
            torch.ops.load_library(library)
        else:
            say("compiling fused_ops.cpp, once on this machine, about 35 s ...")
            # ninja may be in a virtual environment that is not activated
            os.environ["PATH"] += os.pathsep + os.path.dirname(sys.executable)
            os.makedirs(root, exist_ok=True)
            # A new folder for every build: PyTorch locks the build folder, and the lock of a killed
            # process would block all later builds.
            with tempfile.TemporaryDirectory(dir=root, ignore_cleanup_errors=True) as folder:
                cpp_extension.load(name, [source], extra_cflags=FLAGS, build_directory=folder,
                                   is_python_module=False)
                os.replace(os.path.join(folder, f"{name}.so"), library)
            say(f"compiled fused_ops.cpp in {time.perf_counter() - start:.0f} s")
    # no compiler, no ninja, a full disk, a library that does not load
    except (RuntimeError, OSError, ImportError, SystemError) as e:
        reason = str(e).strip().splitlines()[0]
        say(f"fused_ops.cpp is not in use ({reason}): PyTorch computes the same, more slowly.")
        return False
    register_fakes()
    return True


def build_name(source):
    """The name of a build, a hash of the source, the flags, PyTorch's version and the processor."""
    processor = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            processor = next((line for line in f if line.startswith("model name")), "")
    with open(source) as f:
        identity = repr((f.read(), FLAGS, torch.__version__, platform.machine(),
                         torch.backends.cpu.get_cpu_capability(), processor))
    return "nas_" + hashlib.sha256(identity.encode()).hexdigest()[:12]


def say(line):
    """Prints it once, and not in every process of torchrun."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


def register_fakes():
    """Tells torch.compile the shapes, types and memory formats that the kernels return.

    A gradient that is not needed has no elements.
    """
    register, channels_last = torch.library.register_fake, torch.channels_last

    def like(x, memory_format=torch.contiguous_format):
        return torch.empty_like(x, memory_format=memory_format)

    def sums(x, shape): # the kernels sum up in float32, and in float64 for float64
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return x.new_empty(shape, dtype=dtype)

    @register("nas::layer_norm")
    def layer_norm(x, weight, bias, p, n, eps):
        return like(x)

    @register("nas::layer_norm_backward")
    def layer_norm_backward(g, x, weight, p, n, eps):
        return like(x), sums(x, weight.shape), sums(x, weight.shape), sums(x, p.shape)

    @register("nas::block_linear")
    def block_linear(x, W, bias, M, o, i):
        return x.new_empty((*x.shape[:-1], W.shape[0]))

    @register("nas::block_linear_backward")
    def block_linear_backward(g, x, W, M, o, i, need_W, need_bias, need_M):
        return (like(x), W.new_empty(W.shape if need_W else 0),
                sums(x, W.shape[:1] if need_bias else 0), sums(x, M.shape if need_M else 0))

    @register("nas::attention")
    def attention(qkv, q_scale, y_scale, n_head, bias=None, mask=None):
        B, T, n = qkv.shape
        return qkv.new_empty((B, T, n // 3))

    @register("nas::attention_backward")
    def attention_backward(g, qkv, q_scale, y_scale, n_head, bias=None, mask=None, need_bias=False):
        T = qkv.shape[1]
        dbias = sums(qkv, bias.shape if need_bias else (0, T, T))
        return like(qkv), sums(qkv, q_scale.shape), sums(qkv, y_scale.shape), dbias

    @register("nas::depthwise")
    def depthwise(x, weight, stride, padding, dilation):
        B, C, *image = x.shape
        reach = dilation * (weight.shape[2] - 1)
        sides = [(side + 2 * padding - reach - 1) // stride + 1 for side in image]
        shape = B, C, *sides
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=channels_last)

    @register("nas::depthwise_backward")
    def depthwise_backward(g, x, weight, stride, padding, dilation, need_x, need_w):
        return (like(x, channels_last) if need_x else x.new_empty(0),
                weight.new_empty(weight.shape if need_w else 0))
