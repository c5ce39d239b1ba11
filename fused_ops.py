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
import math
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

def mixed_norm(x, weight, bias, p, q, n, eps):
    """LayerNorm and RMSNorm over a mixture of widths:
    weight * sum_k pad(p_k (x[:n_k] - mean_k) / std_k + q_k x[:n_k] / rms_k) + bias.

    x: (..., N), weight and bias: (N,), bias may be None -> (..., N).
    n: the widths in increasing order, the last one N. p, q: (len(n),), the weights of each width's
    LayerNorm and RMSNorm; None where one of them is not in use.

    Each block of channels between two widths is reduced once. The blocks' means and squared
    deviations are merged into those of every prefix (Chan et al. 1979), which stays exact where
    E[x^2] - mean^2 would cancel.
    """
    if enabled and x.is_cpu:
        return torch.ops.nas.norm(x, weight, bias, torch.zeros_like(q) if p is None else p, q, n,
                                  eps)
    dtype = x.dtype
    x = x.to((q if p is None else p).dtype) # float32, as PyTorch's autocast does its norms
    sizes = block_sizes(n)
    blocks = x.split(sizes, dim=-1)

    # of each option k: the scale p_k / std_k + q_k / rms_k, and the shift p_k mean_k / std_k
    mean, m2, scales, shifts = 0.0, 0.0, [], [] # mean, m2: of the first n_k channels
    for k, (size, block) in enumerate(zip(sizes, blocks, strict=True)):
        var_b, mean_b = torch.var_mean(block, dim=-1, keepdim=True, correction=0) # (..., 1)
        delta = mean_b - mean
        m2 = m2 + var_b * size + delta * delta * ((n[k] - size) * size / n[k])
        mean = mean + delta * (size / n[k])
        var = m2 / n[k]
        of_layer = 0.0 if p is None else p[k] * torch.rsqrt(var + eps)
        of_rms = 0.0 if q is None else q[k] * torch.rsqrt(var + mean * mean + eps)
        scales.append(of_layer + of_rms)
        shifts.append(of_layer * mean)

    # block k is in option k and in all wider ones
    mixed = [block * sum(scales[k:]) - sum(shifts[k:]) for k, block in enumerate(blocks)]
    y = weight * torch.cat(mixed, dim=-1)
    y = y if bias is None else y + bias
    # on cuda autocast leaves the norm of a single width in float32 too
    return y if torch.is_autocast_enabled("cuda") else y.to(dtype)


# the number of an activation in fused_ops.cpp
ACTIVATION_KERNELS = {"gelu": 0, "exact_gelu": 1, "relu": 2, "relu2": 3, "silu": 4, "mish": 5,
                      "geglu": 0, "swiglu": 4, "reglu": 2}


def mixed_activation(x, p, kinds):
    """sum_k p_k act_k(gate), where the terms of the gated kinds are multiplied by `up`.

    x: (..., N), or (..., 2N), gate and up side by side, if one of the kinds is gated -> (..., N).
    kinds: [(name, act, is_gated)]. p: (len(kinds),), their weights.
    """
    gated = any(is_gated for _, _, is_gated in kinds)
    if enabled and x.is_cpu and all(name in ACTIVATION_KERNELS for name, _, _ in kinds):
        numbers = [ACTIVATION_KERNELS[name] + 16 * is_gated for name, _, is_gated in kinds]
        return torch.ops.nas.activation(x, p, numbers)
    gate, up = x.chunk(2, dim=-1) if gated else (x, None)
    p, plain, times_up = p.to(x.dtype), 0.0, 0.0
    for w, (_, act, is_gated) in zip(p, kinds, strict=True):
        if is_gated:
            times_up = times_up + w * act(gate)
        else:
            plain = plain + w * act(gate)
    return plain + times_up * up if gated else plain


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


def causal_attention(q, k, v, n_head, dropout=0.0, scale=None, is_causal=True, window=0,
                     distance=None):
    """Plain attention, without a kernel of ours: (B, T, n) each -> (B, T, n).

    The n_head heads of n / n_head channels lie side by side. Keys and values may have fewer heads:
    query head i reads head i % their number. scale: the factor of the scores, None for
    1/sqrt(head size). window: a token sees itself and the window - 1 before it; 0: all before it.
    distance: (T,), added to the scores of keys so many tokens back.
    """
    size = q.shape[2] // n_head
    q, k, v = (split_heads(t, t.shape[2] // size) for t in (q, k, v)) # (B, heads, T, size)
    if k.shape[1] < n_head:
        k, v = (t.repeat(1, n_head // t.shape[1], 1, 1) for t in (k, v))
    T = q.shape[2]
    if distance is not None:
        scale = scale or size ** -0.5
        attend = biased_attention_cpu if q.is_cpu else biased_attention
        return merge_heads(attend(q * scale, k, v, distance_bias(distance)[None], None, dropout))
    mask = None
    # traced, it is one graph for all lengths
    if is_causal and window and (torch.compiler.is_compiling() or window < T):
        mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril().triu(1 - window)
    y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, scale=scale,
                                       is_causal=is_causal and mask is None)
    return merge_heads(y)


def distance_bias(distance):
    """(T,) -> (T, T): distance[i - j] at row i and column j <= i, and -inf above the diagonal."""
    T = len(distance)
    reverse = torch.cat((distance.flip(0), distance.new_full((T - 1,), -math.inf)))
    return reverse.unfold(0, T, 1).flip(0) # row i is reverse[T - 1 - i:]


def mixed_attention(qkv, q_scale, y_scale, n_head, dropout=0.0, distance=None):
    """Causal attention over a mixture of head counts:
    sum_j y_scale_j * attention with n_head[j] heads on (q_scale_j * q, k, v).

    qkv: (B, T, 3n), q_scale and y_scale: (len(n_head), n) -> (B, T, n).
    q_scale includes 1/sqrt(head size): the scores are not scaled any further.
    distance: (T,), added to the scores of keys so many tokens back, or None.
    """
    if enabled and qkv.is_cpu and not dropout:
        return torch.ops.nas.attention(qkv, q_scale, y_scale, n_head, None, None, distance)
    q, k, v = qkv.chunk(3, dim=2)
    q_scale, y_scale = q_scale.to(q.dtype), y_scale.to(q.dtype) # float32 scales would undo autocast
    return sum(causal_attention(q * q_scale[j], k, v, h, dropout, 1.0, distance=distance)
               * y_scale[j] for j, h in enumerate(n_head))


def rotation(size, position, weight=1.0):
    """(cos, sin), (T, size / 2) each, of the angles by which RoPE (Su et al. 2021) turns channels
    2i and 2i + 1 of heads of `size` channels at these positions (T,): weight * position *
    10000^(-2i/size)."""
    frequency = 10000 ** (-torch.arange(0, size, 2, device=position.device) / size) # (size / 2,)
    angle = weight * torch.outer(position, frequency)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """x: (B, T, heads * size), turned by what rotation() returns."""
    a, b = x.unflatten(2, (-1, cos.shape[1], 2)).unbind(-1) # (B, T, heads, size / 2)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1) # (T, 1, size / 2)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(2).to(x.dtype)


def norm_heads(t, size, weights):
    """Heads of `size` channels, times weights[0] + weights[1] / RMS. t: (B, T, heads * size)."""
    heads = t.unflatten(2, (-1, size)).to(torch.promote_types(t.dtype, torch.float32))
    rrms = torch.rsqrt(heads.square().mean(-1, keepdim=True) + 1e-5) # (B, T, heads, 1)
    return (heads * (weights[0] + weights[1] * rrms)).flatten(2).to(t.dtype)


def mixed_heads(qkv, size, H, G, norm=None, rope=None, reads=None):
    """Queries and keys normalized and turned, and as many heads of keys and values as of queries.

    qkv: (B, T, (H + 2 G) * size), H heads of queries, G of keys and G of values
    -> (B, T, 3 H * size). norm: (2,), the weights of norm_heads(). rope: rotation()'s (cos, sin).
    reads: (H, G), query head i reads sum_j reads[i, j] head j; None: head i % G.
    """
    cos, sin = rope or (None, None)
    if enabled and qkv.is_cpu:
        return torch.ops.nas.heads(*autocast_cpu(qkv), size, H, G, norm, cos, sin, reads)
    q, k, v = qkv.split((H * size, G * size, G * size), dim=2)
    if norm is not None:
        q, k = norm_heads(q, size, norm), norm_heads(k, size, norm)
    if rope:
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    if reads is None:
        k, v = k.repeat(1, 1, H // G), v.repeat(1, 1, H // G)
    else:
        k, v = (torch.einsum("ij,btjd->btid", reads.to(t.dtype), t.unflatten(2, (G, size)))
                .flatten(2) for t in (k, v))
    return torch.cat((q, k, v), 2)


def window_attention(qkv, q_scale, y_scale, n_head, bias, mask=None):
    """mixed_attention() within windows: not causal, with a bias and a mask added to the scores.

    qkv: (B * M, T, 3n), the M windows of an image one after the other -> (B * M, T, n).
    bias: (H, T, T), H the largest head count; h heads use the first h of it.
    mask: (M, T, T), one for each window of an image, or None.
    """
    if enabled and qkv.is_cpu:
        return torch.ops.nas.attention(qkv, q_scale, y_scale, n_head, bias, mask, None)
    attend = biased_attention_cpu if qkv.is_cpu else biased_attention
    y = 0
    for j, h in enumerate(n_head):
        q, k, v = (split_heads(t, h) for t in qkv.chunk(3, dim=2)) # (B * M, h, T, n / h)
        q = q * q_scale[j].view(h, 1, -1).to(q.dtype)
        heads = attend(q, k, v, bias[:h], mask)
        y = y + merge_heads(heads) * y_scale[j].to(q.dtype)
    return y


def biased_attention(q, k, v, bias, mask, dropout=0.0):
    """softmax(q k^T + bias + mask) v. q, k, v: (B * M, h, T, d), bias: (h, T, T)."""
    shape = v.shape
    if mask is None:
        bias = bias[None] # (1, h, T, T)
    else: # the windows of an image become heads: (1, M * h, T, T) serves all images
        bias = (bias[None] + mask[:, None]).flatten(0, 1)[None]
        q, k, v = (t.unflatten(0, (-1, len(mask))).flatten(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype), dropout, scale=1.0)
    return y.reshape(shape)


def biased_attention_cpu(q, k, v, bias, mask, dropout=0.0):
    """biased_attention() step by step: on a CPU PyTorch's fused one has no gradient to the bias."""
    scores, bias = q @ k.transpose(2, 3), bias[None] # (B * M, h, T, T), (1, h, T, T)
    if mask is None:
        scores = scores + bias
    else:
        scores = (scores.unflatten(0, (-1, len(mask))) + (bias + mask[:, None])).flatten(0, 1)
    return F.dropout(scores.softmax(-1).to(v.dtype), dropout) @ v


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

    @register("nas::norm")
    def norm(x, weight, bias, p, q, n, eps):
        return like(x)

    @register("nas::norm_backward")
    def norm_backward(g, x, weight, p, q, n, eps):
        of_weight, of_p = (sums(x, t.shape) for t in (weight, p))
        return like(x), of_weight, torch.empty_like(of_weight), of_p, torch.empty_like(of_p)

    @register("nas::activation")
    def activation(x, p, kinds):
        return x.new_empty((*x.shape[:-1], x.shape[-1] // (1 + any(kind >= 16 for kind in kinds))))

    @register("nas::activation_backward")
    def activation_backward(g, x, p, kinds):
        return like(x), sums(x, p.shape)

    @register("nas::block_linear")
    def block_linear(x, W, bias, M, o, i):
        return x.new_empty((*x.shape[:-1], W.shape[0]))

    @register("nas::block_linear_backward")
    def block_linear_backward(g, x, W, M, o, i, need_W, need_bias, need_M):
        return (like(x), W.new_empty(W.shape if need_W else 0),
                sums(x, W.shape[:1] if need_bias else 0), sums(x, M.shape if need_M else 0))

    @register("nas::heads")
    def heads(qkv, d, H, G, norm, cos, sin, reads):
        return qkv.new_empty((*qkv.shape[:2], 3 * H * d))

    @register("nas::heads_backward")
    def heads_backward(g, qkv, d, H, G, norm, cos, sin, reads):
        of_angles = sums(qkv, (qkv.shape[1], d // 2))
        return (torch.empty_like(qkv, memory_format=torch.contiguous_format), sums(qkv, 2),
                of_angles, torch.empty_like(of_angles), sums(qkv, (H, G)))

    @register("nas::attention")
    def attention(qkv, q_scale, y_scale, n_head, bias=None, mask=None, distance=None):
        B, T, n = qkv.shape
        return qkv.new_empty((B, T, n // 3))

    @register("nas::attention_backward")
    def attention_backward(g, qkv, q_scale, y_scale, n_head, bias=None, mask=None, distance=None,
                           need_bias=False):
        T = qkv.shape[1]
        dbias = sums(qkv, bias.shape if need_bias else (0, T, T))
        return (like(qkv), sums(qkv, q_scale.shape), sums(qkv, y_scale.shape), dbias,
                sums(qkv, T))

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
