// Kernels for a CPU, forward and backward: the mixing operations of a weight-entangled supernet
// (norms, Linear, activations and attention over all options in one pass), and the backward pass
// of depthwise convolution, which is slow in PyTorch.
//
// fused_ops.py compiles this file at first use. It also has the PyTorch reference of each kernel,
// which says what is computed; the tests compare the two.
//
// Types: activations (scalar_t) are float, double, bfloat16 or float16. All sums, and all small
// tensors such as scales and option weights, are in acc<scalar_t>: double for double, else float.
// Layout: the last dimension of an activation is made contiguous, other strides are free.
//
// The file, from top to bottom: vectors; norms; Linear; the matrix products and the softmax of
// attention; activations; heads; attention; depthwise convolution; autograd and the operators'
// signatures.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/Dispatch.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

using at::Tensor;
using Sizes = at::IntArrayRef;
using OptTensor = std::optional<Tensor>;

// Runs a lambda with scalar_t as the type of the tensor's elements.
#define FOR_TYPE_OF(tensor, name, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, tensor.scalar_type(), name, __VA_ARGS__)

namespace {

template <typename scalar_t>
using acc = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

at::TensorOptions acc_options(const Tensor& x) {
  return x.options().dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

// A small tensor v in the type of the sums over x, contiguous.
Tensor to_acc(const Tensor& v, const Tensor& x) {
  return v.to(acc_options(x).dtype()).contiguous();
}

// (..., N) as (rows, N), with any row stride.
Tensor rows_of(const Tensor& x) {
  Tensor flat = x.reshape({-1, x.size(-1)});
  return flat.stride(1) == 1 || flat.size(1) == 1 ? flat : flat.contiguous();
}

// Items for one task of parallel_for: about 32768 operations are worth the start of a thread.
constexpr int64_t grain(int64_t work_per_item) {
  return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, work_per_item));
}

// -------------------------------------------------------------------------------------------------
// Vectors as wide as the processor's registers, by GCC's and Clang's vector extension.

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

template <typename T>
struct Vector {
  typedef T type __attribute__((vector_size(vector_bytes)));
  typedef T anywhere __attribute__((vector_size(vector_bytes), aligned(sizeof(T)))); // unaligned
  static constexpr int64_t size = vector_bytes / sizeof(T);
};

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// n zeros that begin at a multiple of vector_bytes: a vector across two cache lines is slow.
template <typename T>
struct Buffer {
  std::vector<T> all;
  T* first;
  explicit Buffer(int64_t n) : all(n + vector_bytes / sizeof(T)) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(all.data());
    first = reinterpret_cast<T*>((address + vector_bytes - 1) / vector_bytes * vector_bytes);
  }
  Buffer(const Buffer&) = delete;
  operator T*() { return first; }
  typename Vector<T>::type* vectors() {
    return reinterpret_cast<typename Vector<T>::type*>(first);
  }
};

// Exchanges lane l of x with lane l ^ w, for all l.
template <typename T, int w>
typename Vector<T>::type swapped(typename Vector<T>::type x) {
  typename Vector<T>::type y{};
#pragma GCC unroll 16
  for (int l = 0; l < Vector<T>::size; l++) y[l] = x[l ^ w]; // compiles to one shuffle
  return y;
}

// Reduces all lanes of x to one number by op, such as a sum or a maximum.
template <typename T, int w = Vector<T>::size / 2, typename F>
T across(typename Vector<T>::type x, F op) {
  x = op(x, swapped<T, w>(x));
  if constexpr (w > 1) return across<T, w / 2>(x, op);
  else return x[0];
}

// Transposes a square block of v rows in place, v the lanes of a vector. Step w exchanges, in each
// pair of rows r and r | w, the lanes that have bit w in one with those that do not in the other.
template <typename T, int w = Vector<T>::size / 2>
void transpose(typename Vector<T>::type* rows) {
  using V = typename Vector<T>::type;
  V has{};
#pragma GCC unroll 16
  for (int l = 0; l < Vector<T>::size; l++) has[l] = l & w ? 1 : 0;
#pragma GCC unroll 16
  for (int r = 0; r < Vector<T>::size; r++)
    if (!(r & w)) {
      const V a = rows[r], b = rows[r | w];
      rows[r] = has > 0 ? swapped<T, w>(b) : a;
      rows[r | w] = has > 0 ? b : swapped<T, w>(a);
    }
  if constexpr (w > 1) transpose<T, w / 2>(rows);
}

// The same from x (v, v) to out (v, v), with row strides; row r of out is multiplied by scale[r].
template <typename T>
void transpose(const T* x, int64_t stride, T* out, int64_t ld, const T* scale = nullptr) {
  using Anywhere = typename Vector<T>::anywhere;
  constexpr int64_t v = Vector<T>::size;
  typename Vector<T>::type rows[v];
#pragma GCC unroll 16
  for (int64_t r = 0; r < v; r++) rows[r] = *reinterpret_cast<const Anywhere*>(x + r * stride);
  transpose<T>(rows);
#pragma GCC unroll 16
  for (int64_t r = 0; r < v; r++)
    *reinterpret_cast<Anywhere*>(out + r * ld) = scale ? rows[r] * scale[r] : rows[r];
}

// -------------------------------------------------------------------------------------------------
// LayerNorm and RMSNorm over a mixture of widths n_0 < ... < n_(K-1) = N: p are the weights of each
// width's LayerNorm, and q, which may be missing, those of its RMSNorm.
//
//   y = weight * sum_k pad(p_k (x[:n_k] - mean_k) * rstd_k + q_k x[:n_k] * rrms_k) + bias
//   x, y: (rows, N)
//
// Block b is the channels between two widths, which the options k >= b use. There the sum is
//
//   x * A_b - B_b     with  A_b = sum_{k >= b} p_k rstd_k + q_k rrms_k,
//                           B_b = sum_{k >= b} p_k rstd_k mean_k
//
// so a row is read once for its moments and once for y. The moments are exact: each block has its
// own mean and squared deviations, and merging them (Chan et al. 1979) subtracts no large numbers.
//
// Threads: the rows are independent. A task takes v rows at a time, one in each lane of a vector.

// Up to v rows of x, one in each lane: X (N, v), zeros in the lanes that are left. And back.
template <typename T, typename scalar_t>
void to_lanes(const scalar_t* x, int64_t stride, int64_t rows, int64_t N, T* X) {
  constexpr int64_t v = Vector<T>::size;
  if constexpr (std::is_same_v<T, scalar_t>)
    if (rows == v && N >= v) { // the last square overlaps the one before it
      for (int64_t c = 0; c < N; c += v)
        transpose<T>(x + std::min(c, N - v), stride, X + std::min(c, N - v) * v, v);
      return;
    }
  for (int64_t c = 0; c < N; c++)
    for (int64_t r = 0; r < v; r++) X[c * v + r] = r < rows ? T(x[r * stride + c]) : T(0);
}

template <typename T, typename scalar_t>
void from_lanes(const T* X, int64_t rows, int64_t N, scalar_t* y) {
  constexpr int64_t v = Vector<T>::size;
  if constexpr (std::is_same_v<T, scalar_t>)
    if (rows == v && N >= v) {
      for (int64_t c = 0; c < N; c += v)
        transpose<T>(X + std::min(c, N - v) * v, v, y + std::min(c, N - v), N);
      return;
    }
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < N; c++) y[r * N + c] = scalar_t(X[c * v + r]);
}

// f(from) + ... + f(to - 1), in four sums, so that an addition need not wait for the last one.
template <typename T, typename F>
typename Vector<T>::type sum(int64_t from, int64_t to, F f) {
  typename Vector<T>::type sums[4] = {};
  for (; from + 4 <= to; from += 4)
    for (int64_t i = 0; i < 4; i++) sums[i] += f(from + i);
  for (; from < to; from++) sums[0] += f(from);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Of v rows x (N, v): the mean of every block, and mean_k, rstd_k and rrms_k of every width, (K, v)
// each; rrms may be null.
template <typename T, typename V = typename Vector<T>::type>
void prefix_moments(const V* x, Sizes n, T eps, V* block_means, V* mean, V* rstd, V* rrms) {
  V m{}, m2{}; // mean and squared deviations of the channels so far
  for (size_t k = 0, c0 = 0; k < n.size(); c0 = n[k++]) {
    const T before = c0, all = n[k], size = all - before;
    const V block_mean = block_means[k] = sum<T>(c0, n[k], [&](int64_t c) { return x[c]; }) / size;
    const V delta = block_mean - m;
    m2 += sum<T>(c0, n[k], [&](int64_t c) { return (x[c] - block_mean) * (x[c] - block_mean); }) +
          delta * delta * (before * size / all);
    m += delta * (size / all);
    mean[k] = m;
    for (int64_t l = 0; l < Vector<T>::size; l++) rstd[k][l] = 1 / std::sqrt(m2[l] / all + eps);
    for (int64_t l = 0; rrms && l < Vector<T>::size; l++)
      rrms[k][l] = 1 / std::sqrt(m2[l] / all + m[l] * m[l] + eps);
  }
}

Tensor norm(const Tensor& x, const Tensor& weight, const OptTensor& bias, const Tensor& p,
            const OptTensor& q, Sizes n, double eps) {
  const int64_t N = x.size(-1), K = n.size();
  Tensor x2 = rows_of(x), y = at::empty(x2.sizes(), x.options());
  const int64_t rows = x2.size(0), stride = x2.stride(0);
  Tensor w = to_acc(weight, x), b = bias ? to_acc(*bias, x) : Tensor(), ps = to_acc(p, x);
  Tensor qs = q ? to_acc(*q, x) : Tensor();
  FOR_TYPE_OF(x, "nas::norm", [&] {
    using T = acc<scalar_t>;
    constexpr int64_t v = Vector<T>::size;
    const scalar_t* px = x2.const_data_ptr<scalar_t>();
    scalar_t* py = y.data_ptr<scalar_t>();
    const T *pw = w.const_data_ptr<T>(), *pp = ps.const_data_ptr<T>();
    const T* pb = bias ? b.const_data_ptr<T>() : nullptr;
    const T* pq = q ? qs.const_data_ptr<T>() : nullptr;
    at::parallel_for(0, (rows + v - 1) / v, grain(4 * N * v), [&](int64_t begin, int64_t end) {
      Buffer<T> X(N * v), moments(4 * K * v);
      auto *xs = X.vectors(), *block_means = moments.vectors();
      auto *mean = block_means + K, *rstd = mean + K, *rrms = q ? rstd + K : nullptr;
      for (int64_t r = begin * v; r < std::min(rows, end * v); r += v) {
        to_lanes<T>(px + r * stride, stride, std::min(v, rows - r), N, X.first);
        prefix_moments<T>(xs, n, T(eps), block_means, mean, rstd, rrms);
        typename Vector<T>::type A{}, B{};
        for (int64_t k = K - 1; k >= 0; k--) {
          A += pp[k] * rstd[k];
          if (q) A += pq[k] * rrms[k];
          B += pp[k] * rstd[k] * mean[k];
          for (int64_t c = k ? n[k - 1] : 0; c < n[k]; c++)
            xs[c] = pw[c] * (xs[c] * A - B) + (pb ? pb[c] : T(0));
        }
        from_lanes<T>(X.first, std::min(v, rows - r), N, py + r * N);
      }
    });
  });
  return y.view(x.sizes());
}

// The gradients to x, weight, bias, p and q, from g (rows, N).
//
// With the sums over c < n_k  G_k = sum g w  and  H_k = sum g w (x - mean_k):
//   dp_k = sum over the rows of rstd_k H_k
//   dq_k = sum over the rows of rrms_k (H_k + mean_k G_k)
//   dx   = g w A_b - (x - m) D_b - E_b  in block b,
// where D_b and E_b are sums over k >= b, as A_b and B_b are, and m is any shift: the mean of the
// whole row keeps the terms small. G_k and H_k are put together from sums over single blocks.
//
// Threads: each part of the rows has its own sums for weight, bias and p, which are added at the
// end. The result depends on the number of threads in its last digits, but not on their timing.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm_backward(
    const Tensor& g, const Tensor& x, const Tensor& weight, const Tensor& p, const OptTensor& q,
    Sizes n, double eps) {
  const int64_t N = x.size(-1), K = n.size();
  Tensor x2 = rows_of(x), g2 = rows_of(g.to(x.scalar_type()));
  Tensor dx = at::empty(x2.sizes(), x.options());
  const int64_t rows = x2.size(0), stride = x2.stride(0), g_stride = g2.stride(0);
  const int64_t threads = at::get_num_threads();
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, rows / grain(8 * N)));
  const int64_t n_sums = 2 * N + 2 * K; // dweight, dbias, dp, dq
  Tensor sums = at::empty({parts, n_sums}, acc_options(x));
  Tensor w = to_acc(weight, x), ps = to_acc(p, x), qs = q ? to_acc(*q, x) : Tensor();
  FOR_TYPE_OF(x, "nas::norm_backward", [&] {
    using T = acc<scalar_t>;
    using V = typename Vector<T>::type;
    constexpr int64_t v = Vector<T>::size;
    const int64_t tiles = (rows + v - 1) / v;
    const scalar_t *px = x2.const_data_ptr<scalar_t>(), *pg = g2.const_data_ptr<scalar_t>();
    scalar_t* pdx = dx.data_ptr<scalar_t>();
    const T *pw = w.const_data_ptr<T>(), *pp = ps.const_data_ptr<T>();
    const T* pq = q ? qs.const_data_ptr<T>() : nullptr;
    T* psums = sums.data_ptr<T>();
    at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; part++) {
        Buffer<T> X(N * v), Y(N * v), moments(6 * K * v), all(n_sums * v);
        V *xs = X.vectors(), *gs = Y.vectors(), *block_means = moments.vectors();
        V *mean = block_means + K, *rstd = mean + K, *g_sums = rstd + K, *h_sums = g_sums + K;
        V* rrms = q ? h_sums + K : nullptr;
        V *dw = all.vectors(), *db = dw + N, *dp = db + N, *dq = dp + K;
        for (int64_t tile = part * tiles / parts; tile < (part + 1) * tiles / parts; tile++) {
          const int64_t r = tile * v, used = std::min(v, rows - r);
          to_lanes<T>(px + r * stride, stride, used, N, X.first);
          to_lanes<T>(pg + r * g_stride, g_stride, used, N, Y.first);
          prefix_moments<T>(xs, n, T(eps), block_means, mean, rstd, rrms);
          for (int64_t k = 0, c0 = 0; k < K; c0 = n[k++]) { // sums over single blocks
            g_sums[k] = sum<T>(c0, n[k], [&](int64_t c) { return gs[c] * pw[c]; });
            h_sums[k] = sum<T>(
                c0, n[k], [&](int64_t c) { return gs[c] * pw[c] * (xs[c] - block_means[k]); });
          }
          const V m = mean[K - 1];
          V A{}, B{}, D{}, E{};
          for (int64_t k = K - 1; k >= 0; k--) {
            V G{}, H{};
            for (int64_t i = 0; i <= k; i++) {
              G += g_sums[i];
              H += h_sums[i] - (mean[k] - block_means[i]) * g_sums[i];
            }
            const T size = n[k];
            const V scale = pp[k] * rstd[k], shift = mean[k] - m;
            const V Q = rstd[k] * H, slope = scale * rstd[k] * Q / size;
            dp[k] += Q;
            A += scale;
            B += scale * shift;
            D += slope;
            E += scale * G / size - slope * shift;
            if (q) {
              const V rms_scale = pq[k] * rrms[k], dot = rrms[k] * (H + mean[k] * G);
              const V rms_slope = rms_scale * rrms[k] * dot / size;
              dq[k] += dot;
              A += rms_scale;
              B -= rms_scale * m;
              D += rms_slope;
              E += rms_slope * m;
            }
            for (int64_t c = k ? n[k - 1] : 0; c < n[k]; c++) {
              const V gc = gs[c], xc = xs[c] - m;
              xs[c] = gc * pw[c] * A - xc * D - E;
              dw[c] += gc * (xc * A - B);
              db[c] += gc;
            }
          }
          from_lanes<T>(X.first, used, N, pdx + r * N);
        }
        for (int64_t i = 0; i < n_sums; i++)
          psums[part * n_sums + i] = across<T>(dw[i], [](V a, V b) { return a + b; });
      }
    });
  });
  Tensor total = sums.sum(0);
  const auto part = [&](int64_t from, int64_t to) { return total.slice(0, from, to).clone(); };
  return {dx.view(x.sizes()), part(0, N), part(N, 2 * N), part(2 * N, 2 * N + K),
          part(2 * N + K, n_sums)};
}

// -------------------------------------------------------------------------------------------------
// Linear over a mixture of widths.
//
//   y = x (W * M)^T + bias              x: (tokens, in), W: (out, in), y: (tokens, out)
//
// The row ends o and the column ends i cut W into blocks, on each of which M is constant: M is
// (len(o), len(i)). The product W * M costs one pass over W; all else is one plain matrix product,
// whose threads are those of PyTorch's BLAS. It is exact up to the rounding of W * M to W's type.

// W * M. Threads: the rows of W.
Tensor block_scale(const Tensor& W, const Tensor& M, Sizes o, Sizes i) {
  Tensor out = at::empty(W.sizes(), W.options()), Wc = rows_of(W), Ms = to_acc(M, W);
  const int64_t stride = Wc.stride(0), columns = W.size(1), C = i.size();
  FOR_TYPE_OF(W, "nas::block_scale", [&] {
    using T = acc<scalar_t>;
    const scalar_t* pw = Wc.const_data_ptr<scalar_t>();
    const T* pm = Ms.const_data_ptr<T>();
    scalar_t* po = out.data_ptr<scalar_t>();
    at::parallel_for(0, W.size(0), grain(columns), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++) {
        const int64_t block = std::upper_bound(o.begin(), o.end(), r) - o.begin();
        for (int64_t k = 0, c0 = 0; k < C; c0 = i[k++]) {
          const T m = pm[block * C + k];
          for (int64_t c = c0; c < i[k]; c++)
            po[r * columns + c] = scalar_t(T(pw[r * stride + c]) * m);
        }
      }
    });
  });
  return out;
}

// The sums of a * b over each block: (len(o), len(i)). Threads: the rows, then one sum over them.
Tensor block_dot(const Tensor& a, const Tensor& b, Sizes o, Sizes i) {
  Tensor ac = rows_of(a), bc = rows_of(b);
  const int64_t R = o.size(), C = i.size(), rows = a.size(0), sa = ac.stride(0), sb = bc.stride(0);
  Tensor per_row = at::empty({rows, C}, acc_options(a)), out = at::empty({R, C}, acc_options(a));
  FOR_TYPE_OF(a, "nas::block_dot", [&] {
    using T = acc<scalar_t>;
    const scalar_t *pa = ac.const_data_ptr<scalar_t>(), *pb = bc.const_data_ptr<scalar_t>();
    T* pr = per_row.data_ptr<T>();
    at::parallel_for(0, rows, grain(a.size(1)), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++)
        for (int64_t k = 0, c0 = 0; k < C; c0 = i[k++]) {
          T sum = 0;
          for (int64_t c = c0; c < i[k]; c++) sum += T(pa[r * sa + c]) * T(pb[r * sb + c]);
          pr[r * C + k] = sum;
        }
    });
  });
  for (int64_t k = 0, from = 0; k < R; from = o[k++])
    out.select(0, k).copy_(per_row.narrow(0, from, o[k] - from).sum(0));
  return out;
}

Tensor block_linear(const Tensor& x, const Tensor& W, const OptTensor& bias, const Tensor& M,
                    Sizes o, Sizes i) {
  const OptTensor b = bias ? bias->to(x.scalar_type()) : OptTensor();
  return at::linear(x, block_scale(W, M, o, i), b);
}

// dx and dM of frozen weights: with h_r = g[:, rows r] W[rows r] for each block row r,
//   dx = sum_r M_r h_r    and    dM_rc = <h_r, x> over the columns of block c.
// All h_r together cost what the plain dx costs, and dM needs no product of its own. They are
// computed for 512 tokens at a time, so that h stays in the cache. Threads: the tokens.
void frozen_backward(const Tensor& g, const Tensor& x, const Tensor& W, const Tensor& M, Sizes o,
                     Sizes i, Tensor& dx, Tensor& dM) {
  const int64_t R = o.size(), C = i.size(), tokens = x.size(0), I = x.size(1), chunk = 512;
  Tensor h = at::empty({R, std::min(chunk, tokens), I}, x.options()), Ms = to_acc(M, x);
  Tensor dots = at::empty({tokens, R * C}, acc_options(x));
  for (int64_t t0 = 0; t0 < tokens; t0 += chunk) {
    const int64_t size = std::min(chunk, tokens - t0);
    for (int64_t r = 0, from = 0; r < R; from = o[r++]) {
      Tensor out = h.select(0, r).narrow(0, 0, size);
      Tensor g_r = g.narrow(0, t0, size).narrow(1, from, o[r] - from);
      at::mm_out(out, g_r, W.narrow(0, from, o[r] - from));
    }
    FOR_TYPE_OF(x, "nas::block_linear_backward", [&] {
      using T = acc<scalar_t>;
      const scalar_t* ph = h.const_data_ptr<scalar_t>();
      const scalar_t* px = x.const_data_ptr<scalar_t>() + t0 * x.stride(0);
      const int64_t hs = h.stride(0), xs = x.stride(0);
      scalar_t* pdx = dx.data_ptr<scalar_t>() + t0 * I;
      T* pd = dots.data_ptr<T>() + t0 * R * C;
      const T* pm = Ms.const_data_ptr<T>();
      at::parallel_for(0, size, grain(R * I), [&](int64_t begin, int64_t end) {
        std::vector<T> row(I);
        for (int64_t t = begin; t < end; t++)
          for (int64_t k = 0, c0 = 0; k < C; c0 = i[k++]) {
            std::fill(row.begin() + c0, row.begin() + i[k], T(0));
            for (int64_t r = 0; r < R; r++) {
              const scalar_t *hr = ph + r * hs + t * I, *xr = px + t * xs;
              const T m = pm[r * C + k];
              T sum = 0;
              for (int64_t c = c0; c < i[k]; c++) {
                row[c] += m * T(hr[c]);
                sum += T(hr[c]) * T(xr[c]);
              }
              pd[t * R * C + r * C + k] = sum;
            }
            for (int64_t c = c0; c < i[k]; c++) pdx[t * I + c] = scalar_t(row[c]);
          }
      });
    });
  }
  dM = dots.sum(0).view({R, C});
}

// The gradients to x, W, bias and M. That to x is always computed; one of the others that is not
// needed has no elements.
std::tuple<Tensor, Tensor, Tensor, Tensor> block_linear_backward(
    const Tensor& g, const Tensor& x, const Tensor& W, const Tensor& M, Sizes o, Sizes i,
    bool need_W, bool need_bias, bool need_M) {
  Tensor g2 = rows_of(g), x2 = rows_of(x), dx, dW = at::empty({0}, W.options());
  Tensor db = at::empty({0}, acc_options(x)), dM = at::empty({0}, acc_options(x));
  // products with fewer than 32 rows are slower than one more product with all of them
  const bool by_rows = !need_W && W.size(0) >= 32 * static_cast<int64_t>(o.size());
  if (need_M && by_rows) {
    dx = at::empty(x2.sizes(), x.options());
    frozen_backward(g2, x2, W, M, o, i, dx, dM);
  } else {
    dx = at::mm(g2, block_scale(W, M, o, i));
  }
  if (need_W || (need_M && !by_rows)) {
    Tensor raw = at::mm(g2.t(), x2); // (out, in), the gradient to W * M
    if (need_M) dM = block_dot(raw, W, o, i);
    if (need_W) dW = block_scale(raw, M, o, i);
  }
  if (need_bias) db = g2.sum(0, false, acc_options(x).dtype().toScalarType());
  return {dx.view(x.sizes()), dW, db, dM};
}

// -------------------------------------------------------------------------------------------------
// Matrix products for attention: C (m, n) = A (m, k) B (k, n), or += where `add`. The heads are too
// small for a BLAS. A has any strides, (ai, ak); B and C have contiguous rows of ldb and ldc. m is
// a multiple of tile_rows, and n of a vector.

// Rows of C at a time. It divides a vector's lanes, so that keys, in whole vectors, can be rows.
template <typename T>
constexpr int tile_rows = std::min<int>(Vector<T>::size, vector_bytes == 64 ? 8 : 4);

// tile_rows rows and `columns` vectors of C, with all sums in registers.
template <typename T, int columns>
void tile(int64_t k, const T* A, int64_t ai, int64_t ak, const T* B, int64_t ldb, T* C, int64_t ldc,
          bool add) {
  using V = typename Vector<T>::type;
  using Anywhere = typename Vector<T>::anywhere;
  constexpr int64_t v = Vector<T>::size;
  V sum[tile_rows<T>][columns], b[columns];
#pragma GCC unroll 8
  for (int r = 0; r < tile_rows<T>; r++)
#pragma GCC unroll 2
    for (int c = 0; c < columns; c++) sum[r][c] = V{};
  for (int64_t q = 0; q < k; q++) {
#pragma GCC unroll 2
    for (int c = 0; c < columns; c++)
      b[c] = *reinterpret_cast<const Anywhere*>(B + q * ldb + c * v);
#pragma GCC unroll 8
    for (int r = 0; r < tile_rows<T>; r++)
#pragma GCC unroll 2
      for (int c = 0; c < columns; c++) sum[r][c] += A[r * ai + q * ak] * b[c];
  }
#pragma GCC unroll 8
  for (int r = 0; r < tile_rows<T>; r++)
#pragma GCC unroll 2
    for (int c = 0; c < columns; c++) {
      Anywhere* out = reinterpret_cast<Anywhere*>(C + r * ldc + c * v);
      *out = add ? *out + sum[r][c] : sum[r][c];
    }
}

template <typename T>
void gemm(int64_t m, int64_t n, int64_t k, const T* A, int64_t ai, int64_t ak, const T* B,
          int64_t ldb, T* C, int64_t ldc, bool add) {
  constexpr int64_t v = Vector<T>::size;
  for (int64_t c = 0; c < n; c += 2 * v)
    for (int64_t r = 0; r < m; r += tile_rows<T>) {
      const T* Ar = A + r * ai;
      T* Cr = C + r * ldc + c;
      if (n - c >= 2 * v) tile<T, 2>(k, Ar, ai, ak, B + c, ldb, Cr, ldc, add);
      else tile<T, 1>(k, Ar, ai, ak, B + c, ldb, Cr, ldc, add);
    }
}

// -------------------------------------------------------------------------------------------------
// The softmax of attention, for some rows (tokens) of scores at a time.

// e^x for x <= 0: 2^n e^r with a Taylor polynomial for e^r, within 2 units in the last place. Not a
// number stays one.
inline Vector<float>::type exponential(Vector<float>::type x) {
  using V = Vector<float>::type;
  typedef int32_t I __attribute__((vector_size(vector_bytes)));
  x = x < -87.f ? V{} - 87.f : x; // below that e^x is no normal float
  const I whole = __builtin_convertvector(x * 1.44269504f - 0.5f, I); // x / ln 2, to the nearest
  const V n = __builtin_convertvector(whole, V);
  const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f; // x - n ln 2, ln 2 in two parts
  V y = r * (1.f / 5040) + 1.f / 720;
  y = y * r + 1.f / 120;
  y = y * r + 1.f / 24;
  y = y * r + 1.f / 6;
  y = y * r + 0.5f;
  y = y * r + 1.f;
  y = y * r + 1.f;
  const I exponent = (whole + 127) << 23; // the bits of 2^n
  V scale;
  std::memcpy(&scale, &exponent, sizeof(scale));
  return y * scale;
}
inline Vector<double>::type exponential(Vector<double>::type x) {
  for (int64_t l = 0; l < Vector<double>::size; l++) x[l] = std::exp(x[l]);
  return x;
}

// Turns the scores S (rows, width) into e^(score - the row's highest), and inverse (rows) into one
// over the row's sum; the softmax is their product.
//
// Without a bias row i sees the keys 0 .. first + i: the attention is causal. With a bias (rows,
// all), which is added to the scores as the mask is, it sees all of `all` keys. The columns of
// other keys become zero. Of a causal attention, behind[j - first - i] is added to the score of key
// j, if it is not null.
template <typename T>
void exponentials(T* S, int64_t rows, int64_t width, int64_t first, int64_t all, const T* bias,
                  const T* mask, const T* behind, T* inverse) {
  using V = typename Vector<T>::type;
  using Anywhere = typename Vector<T>::anywhere;
  constexpr int64_t v = Vector<T>::size;
  V lane;
  for (int64_t l = 0; l < v; l++) lane[l] = l;
  for (int64_t i = 0; i < rows; i++) {
    const int64_t keys = bias ? all : first + i + 1, whole = keys / v * v; // whole: in full vectors
    T* s = S + i * width;
    const auto at = [&](int64_t j) -> Anywhere& { return *reinterpret_cast<Anywhere*>(s + j); };
    for (int64_t j = 0; bias && j < keys; j++)
      s[j] += mask ? bias[i * all + j] + mask[i * all + j] : bias[i * all + j];
    for (int64_t j = 0; behind && j < keys; j++) s[j] += behind[j - first - i];
    const auto in = lane < V{} + T(keys - whole); // the lanes of the last vector that are keys
    V x = V{} + s[0], top = whole < keys ? in ? at(whole) : x : x, sum{};
    for (int64_t j = 0; j < whole; j += v) top = at(j) > top ? at(j) : top;
    top = V{} + across<T>(top, [](V a, V b) -> V { return a > b ? a : b; });
    for (int64_t j = 0; j < whole; j += v) sum += at(j) = exponential(at(j) - top);
    if (whole < keys) sum += at(whole) = in ? exponential(at(whole) - top) : V{};
    for (int64_t j = round_up(keys, v); j < width; j += v) at(j) = V{};
    inverse[i] = 1 / across<T>(sum, [](V a, V b) { return a + b; });
  }
}

// Turns dP (rows, width), `inverse` times the gradient to the softmax, into that to the scores:
// P * (dP - inverse * <P, dP>), P from exponentials(). It is also added to dbias, if not null, and
// to dbehind, where row r and column c have their place at dbehind[c - first - r].
template <typename T>
void score_gradients(const T* P, T* dP, int64_t rows, int64_t width, const T* inverse, T* dbias,
                     int64_t first, T* dbehind) {
  using V = typename Vector<T>::type;
  using Anywhere = typename Vector<T>::anywhere;
  constexpr int64_t v = Vector<T>::size;
  for (int64_t r = 0; r < rows; r++) {
    const T* p = P + r * width;
    T* d = dP + r * width;
    const auto s = [&](int64_t c) { return *reinterpret_cast<const Anywhere*>(p + c); };
    const auto a = [&](int64_t c) -> Anywhere& { return *reinterpret_cast<Anywhere*>(d + c); };
    V dot{};
    for (int64_t c = 0; c < width; c += v) dot += s(c) * a(c);
    dot = V{} + inverse[r] * across<T>(dot, [](V a, V b) { return a + b; });
    for (int64_t c = 0; c < width; c += v) a(c) = s(c) * (a(c) - dot);
    for (int64_t c = 0; dbias && c < width; c += v)
      *reinterpret_cast<Anywhere*>(dbias + r * width + c) += a(c);
    for (int64_t c = 0; dbehind && c <= first + r; c++) dbehind[c - first - r] += d[c];
  }
}

// -------------------------------------------------------------------------------------------------
// A mixture of activations, some of them gated.
//
//   y = sum_k p_k act_k(gate) (times `up`, where act_k is gated)      y: (rows, N), p: (K)
//   x: (rows, N), the gate; or (rows, 2N), gate and up, if one of them is gated
//
// A kind is an activation's number below, plus 16 if it is gated. Backward computes the activations
// anew, so that x is all that is saved.
//
// Threads: parts of the rows, which have their own sums for p, added at the end.

enum Activation { gelu_tanh, gelu_erf, relu, relu_squared, silu, mish, gated = 16 };

template <typename V>
struct ValueAndSlope {
  V value, slope;
};

// 1 / (1 + e^-x)
template <typename T, typename V>
V sigmoid(V x) {
  const V e = exponential(x < V{} ? x : -x);
  return (x < V{} ? e : V{} + T(1)) / (e + T(1));
}

template <typename T, typename V = typename Vector<T>::type>
ValueAndSlope<V> activate(int64_t kind, V x) {
  const V positive = x > V{} ? x : V{};
  switch (kind % gated) {
    case relu: return {positive, x > V{} ? V{} + T(1) : V{}};
    case relu_squared: return {positive * positive, 2 * positive};
    case silu: {
      const V s = sigmoid<T>(x);
      return {x * s, s + x * s * (1 - s)};
    }
    case gelu_tanh: { // (1 + tanh(u)) / 2 is the sigmoid of 2 u
      const T a = 2 * std::sqrt(2 / M_PI), b = 0.044715;
      const V s = sigmoid<T>(a * (x + b * x * x * x));
      return {x * s, s + x * s * (1 - s) * a * (1 + 3 * b * x * x)};
    }
    case gelu_erf: {
      V below, density; // of the normal distribution
      for (int64_t l = 0; l < Vector<T>::size; l++) {
        below[l] = T(0.5) * std::erfc(-x[l] * T(M_SQRT1_2));
        density[l] = std::exp(-x[l] * x[l] / 2) * T(M_SQRT1_2 / std::sqrt(M_PI));
      }
      return {x * below, below + x * density};
    }
    default: { // mish: tanh(softplus(x)) with e = e^-|x|
      const V e = exponential(x < V{} ? x : -x), s = sigmoid<T>(x);
      const V t = x < V{} ? e * (e + 2) / (e * (e + 2) + 2) : (1 + 2 * e) / (1 + 2 * e + 2 * e * e);
      return {x * t, t + x * (1 - t * t) * s};
    }
  }
}

// Calls f(c, lanes) for N channels, a vector's lanes at a time.
template <typename T, typename F>
void for_vectors(int64_t N, F f) {
  for (int64_t c = 0; c < N; c += Vector<T>::size) f(c, std::min<int64_t>(Vector<T>::size, N - c));
}

template <typename T, typename scalar_t>
typename Vector<T>::type load_some(const scalar_t* x, int64_t lanes) {
  typename Vector<T>::type out{};
  if (lanes == Vector<T>::size)
    for (int64_t l = 0; l < Vector<T>::size; l++) out[l] = T(x[l]);
  else
    for (int64_t l = 0; l < lanes; l++) out[l] = T(x[l]);
  return out;
}

template <typename T, typename scalar_t>
void store_some(typename Vector<T>::type v, scalar_t* x, int64_t lanes) {
  if (lanes == Vector<T>::size)
    for (int64_t l = 0; l < Vector<T>::size; l++) x[l] = scalar_t(v[l]);
  else
    for (int64_t l = 0; l < lanes; l++) x[l] = scalar_t(v[l]);
}

bool any_gated(Sizes kinds) {
  return std::any_of(kinds.begin(), kinds.end(), [](int64_t kind) { return kind >= gated; });
}

Tensor activation(const Tensor& x, const Tensor& p, Sizes kinds) {
  const bool has_up = any_gated(kinds);
  const int64_t K = kinds.size(), N = x.size(-1) / (1 + has_up);
  Tensor x2 = rows_of(x), ps = to_acc(p, x);
  const int64_t rows = x2.size(0), stride = x2.stride(0);
  Tensor y = at::empty({rows, N}, x.options());
  FOR_TYPE_OF(x, "nas::activation", [&] {
    using T = acc<scalar_t>;
    using V = typename Vector<T>::type;
    const scalar_t* px = x2.const_data_ptr<scalar_t>();
    const T* pp = ps.const_data_ptr<T>();
    scalar_t* py = y.data_ptr<scalar_t>();
    at::parallel_for(0, rows, grain(16 * K * N), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++)
        for_vectors<T>(N, [&](int64_t c, int64_t lanes) {
          const scalar_t* at = px + r * stride + c;
          const V gate = load_some<T>(at, lanes), up = has_up ? load_some<T>(at + N, lanes) : V{};
          V plain{}, times_up{};
          for (int64_t k = 0; k < K; k++)
            (kinds[k] >= gated ? times_up : plain) += pp[k] * activate<T>(kinds[k], gate).value;
          store_some<T>(plain + times_up * up, py + r * N + c, lanes);
        });
    });
  });
  auto shape = x.sizes().vec();
  shape.back() = N;
  return y.view(shape);
}

std::tuple<Tensor, Tensor> activation_backward(const Tensor& g, const Tensor& x, const Tensor& p,
                                               Sizes kinds) {
  const bool has_up = any_gated(kinds);
  const int64_t K = kinds.size(), N = x.size(-1) / (1 + has_up);
  Tensor x2 = rows_of(x), g2 = rows_of(g.to(x.scalar_type())), ps = to_acc(p, x);
  const int64_t rows = x2.size(0), stride = x2.stride(0), g_stride = g2.stride(0);
  Tensor dx = at::empty(x2.sizes(), x.options());
  const int64_t threads = at::get_num_threads();
  const int64_t parts =
      std::max<int64_t>(1, std::min<int64_t>(threads, rows / grain(16 * K * N)));
  Tensor sums = at::empty({parts, K}, acc_options(x));
  FOR_TYPE_OF(x, "nas::activation_backward", [&] {
    using T = acc<scalar_t>;
    using V = typename Vector<T>::type;
    const scalar_t *px = x2.const_data_ptr<scalar_t>(), *pg = g2.const_data_ptr<scalar_t>();
    const T* pp = ps.const_data_ptr<T>();
    scalar_t* pdx = dx.data_ptr<scalar_t>();
    T* psums = sums.data_ptr<T>();
    at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; part++) {
        Buffer<T> all(K * Vector<T>::size);
        V* dp = all.vectors();
        for (int64_t r = part * rows / parts; r < (part + 1) * rows / parts; r++)
          for_vectors<T>(N, [&](int64_t c, int64_t lanes) {
            const scalar_t* at = px + r * stride + c;
            scalar_t* to = pdx + r * x2.size(1) + c;
            const V gate = load_some<T>(at, lanes), up = has_up ? load_some<T>(at + N, lanes) : V{};
            const V gy = load_some<T>(pg + r * g_stride + c, lanes);
            V slope{}, times_up{};
            for (int64_t k = 0; k < K; k++) {
              const auto act = activate<T>(kinds[k], gate);
              const V factor = kinds[k] >= gated ? up : V{} + T(1);
              slope += pp[k] * act.slope * factor;
              if (kinds[k] >= gated) times_up += pp[k] * act.value;
              dp[k] += gy * act.value * factor;
            }
            store_some<T>(gy * slope, to, lanes);
            if (has_up) store_some<T>(gy * times_up, to + N, lanes);
          });
        for (int64_t k = 0; k < K; k++)
          psums[part * K + k] = across<T>(dp[k], [](V a, V b) { return a + b; });
      }
    });
  });
  return {dx.view(x.sizes()), sums.sum(0)};
}

// -------------------------------------------------------------------------------------------------
// The heads of attention: queries and keys normalized and turned, and heads of keys and values for
// all queries.
//
//   qkv: (B, L, (H + 2 G) d), H heads of queries, G of keys and of values -> (B, L, 3 H d)
//
//   u = s x, s = norm_0 + norm_1 / RMS(x)       a head of queries or keys; s = 1 without norm
//   (a, b) -> (a cos - b sin, a sin + b cos)    its channels 2i and 2i + 1, with cos and sin
//   out_i = sum_j reads_ij head_j               of keys and values; head i % G without reads
//
// All pieces but qkv may be missing: norm (2), cos and sin (L, d / 2), reads (H, G).
//
// Threads: parts of the tokens, which have their own sums for the gradients to the small tensors,
// added at the end.

constexpr double head_eps = 1e-5;

struct HeadsInputs {
  Tensor qkv, norm, cos, sin, reads;
  int64_t B, L, d, H, G;
  HeadsInputs(const Tensor& x, int64_t d, int64_t H, int64_t G, const OptTensor& n,
              const OptTensor& c, const OptTensor& s, const OptTensor& r)
      : qkv(x.contiguous()),
        norm(n ? to_acc(*n, x) : Tensor()),
        cos(c ? to_acc(*c, x) : Tensor()),
        sin(s ? to_acc(*s, x) : Tensor()),
        reads(r ? to_acc(*r, x) : Tensor()),
        B(x.size(0)),
        L(x.size(1)),
        d(d),
        H(H),
        G(G) {
    TORCH_CHECK(x.size(2) == (H + 2 * G) * d, "heads: ", x.sizes(), " is not of ", H, " and ", G);
  }
  template <typename T>
  static const T* data(const Tensor& t) {
    return t.defined() ? t.const_data_ptr<T>() : nullptr;
  }
};

// One head of a token: s, and the head normalized and turned to out.
template <typename T, typename scalar_t>
T prepare(const scalar_t* x, int64_t d, const T* norm, const T* cos, const T* sin, T* out,
          T* rrms) {
  T s = 1;
  if (norm) {
    T squares = 0;
    for (int64_t c = 0; c < d; c++) squares += T(x[c]) * T(x[c]);
    *rrms = 1 / std::sqrt(squares / d + T(head_eps));
    s = norm[0] + norm[1] * *rrms;
  }
  if (!cos)
    for (int64_t c = 0; c < d; c++) out[c] = s * T(x[c]);
  else
    for (int64_t i = 0; i < d / 2; i++) {
      const T a = s * T(x[2 * i]), b = s * T(x[2 * i + 1]);
      out[2 * i] = a * cos[i] - b * sin[i];
      out[2 * i + 1] = a * sin[i] + b * cos[i];
    }
  return s;
}

// out_i = sum_j reads_ij in_j: (G, d) -> (H, d)
template <typename T>
void read_heads(const T* in, const T* reads, int64_t H, int64_t G, int64_t d, T* out) {
  for (int64_t i = 0; i < H; i++) {
    T* to = out + i * d;
    if (!reads) {
      std::copy(in + i % G * d, in + (i % G + 1) * d, to);
      continue;
    }
    for (int64_t c = 0; c < d; c++) to[c] = reads[i * G] * in[c];
    for (int64_t j = 1; j < G; j++)
      for (int64_t c = 0; c < d; c++) to[c] += reads[i * G + j] * in[j * d + c];
  }
}

Tensor heads(const Tensor& qkv, int64_t d, int64_t H, int64_t G, const OptTensor& norm,
             const OptTensor& cos, const OptTensor& sin, const OptTensor& reads) {
  const HeadsInputs in(qkv, d, H, G, norm, cos, sin, reads);
  Tensor y = at::empty({in.B, in.L, 3 * H * d}, qkv.options());
  FOR_TYPE_OF(qkv, "nas::heads", [&] {
    using T = acc<scalar_t>;
    const scalar_t* px = in.qkv.const_data_ptr<scalar_t>();
    const T *pn = in.data<T>(in.norm), *pc = in.data<T>(in.cos), *ps = in.data<T>(in.sin);
    const T* pr = in.data<T>(in.reads);
    scalar_t* py = y.data_ptr<scalar_t>();
    at::parallel_for(0, in.B * in.L, grain(8 * H * d), [&](int64_t begin, int64_t end) {
      Buffer<T> kv(2 * G * d), all(3 * H * d);
      T unused;
      for (int64_t r = begin; r < end; r++) {
        const scalar_t* x = px + r * (H + 2 * G) * d;
        const int64_t angle = r % in.L * (d / 2);
        const T *c = pc ? pc + angle : nullptr, *s = ps ? ps + angle : nullptr;
        for (int64_t i = 0; i < H; i++) prepare<T>(x + i * d, d, pn, c, s, all + i * d, &unused);
        for (int64_t j = 0; j < G; j++)
          prepare<T>(x + (H + j) * d, d, pn, c, s, kv + j * d, &unused);
        for (int64_t i = 0; i < G * d; i++) kv[G * d + i] = T(x[(H + G) * d + i]);
        read_heads<T>(kv + 0, pr, H, G, d, all + H * d);
        read_heads<T>(kv + G * d, pr, H, G, d, all + 2 * H * d);
        for (int64_t i = 0; i < 3 * H * d; i++) py[r * 3 * H * d + i] = scalar_t(all[i]);
      }
    });
  });
  return y;
}

// The gradient to one head, from g, that to what prepare() made of it. g is overwritten by the
// gradient to the normalized head. Adds to dnorm, dcos and dsin.
template <typename T, typename scalar_t>
void prepare_backward(const scalar_t* x, int64_t d, const T* norm, const T* cos, const T* sin, T* g,
                      scalar_t* dx, T* dnorm, T* dcos, T* dsin) {
  T s = 1, rrms = 0, dot = 0;
  if (norm) {
    T squares = 0;
    for (int64_t c = 0; c < d; c++) squares += T(x[c]) * T(x[c]);
    rrms = 1 / std::sqrt(squares / d + T(head_eps));
    s = norm[0] + norm[1] * rrms;
  }
  if (cos)
    for (int64_t i = 0; i < d / 2; i++) {
      const T a = s * T(x[2 * i]), b = s * T(x[2 * i + 1]), ga = g[2 * i], gb = g[2 * i + 1];
      dcos[i] += ga * a + gb * b;
      dsin[i] += gb * a - ga * b;
      g[2 * i] = ga * cos[i] + gb * sin[i];
      g[2 * i + 1] = gb * cos[i] - ga * sin[i];
    }
  if (norm) {
    for (int64_t c = 0; c < d; c++) dot += g[c] * T(x[c]);
    dnorm[0] += dot;
    dnorm[1] += dot * rrms;
  }
  const T slope = norm ? dot * norm[1] * rrms * rrms * rrms / d : T(0);
  for (int64_t c = 0; c < d; c++) dx[c] = scalar_t(s * g[c] - slope * T(x[c]));
}

// The gradient to the heads that were read, and to reads: din (G, d) from g (H, d).
template <typename T>
void read_backward(const T* in, const T* g, const T* reads, int64_t H, int64_t G, int64_t d, T* din,
                   T* dreads) {
  std::fill(din, din + G * d, T(0));
  for (int64_t i = 0; i < H; i++)
    for (int64_t j = 0; j < G; j++) {
      if (!reads && i % G != j) continue;
      const T weight = reads ? reads[i * G + j] : T(1);
      T dot = 0;
      for (int64_t c = 0; c < d; c++) {
        din[j * d + c] += weight * g[i * d + c];
        dot += g[i * d + c] * in[j * d + c];
      }
      if (reads) dreads[i * G + j] += dot;
    }
}

// The gradients to qkv, norm, cos, sin and reads; of missing ones they mean nothing.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> heads_backward(
    const Tensor& g, const Tensor& qkv, int64_t d, int64_t H, int64_t G, const OptTensor& norm,
    const OptTensor& cos, const OptTensor& sin, const OptTensor& reads) {
  const HeadsInputs in(qkv, d, H, G, norm, cos, sin, reads);
  const int64_t rows = in.B * in.L, angles = in.L * (d / 2);
  const int64_t parts = std::max<int64_t>(
      1, std::min<int64_t>(at::get_num_threads(), rows / grain(16 * H * d)));
  const auto options = acc_options(qkv);
  Tensor gc = g.to(qkv.scalar_type()).contiguous(), dx = at::empty_like(in.qkv);
  Tensor dnorm = at::zeros({parts, H + G, 2}, options); // short sums are more exact
  Tensor dreads = at::zeros({parts, H, G}, options);
  Tensor dcos = at::zeros({parts, in.L, d / 2}, options), dsin = at::zeros_like(dcos);
  FOR_TYPE_OF(qkv, "nas::heads_backward", [&] {
    using T = acc<scalar_t>;
    const scalar_t *px = in.qkv.const_data_ptr<scalar_t>(), *pg = gc.const_data_ptr<scalar_t>();
    const T *pn = in.data<T>(in.norm), *pc = in.data<T>(in.cos), *ps = in.data<T>(in.sin);
    const T* pr = in.data<T>(in.reads);
    scalar_t* pdx = dx.data_ptr<scalar_t>();
    T *pdn = dnorm.data_ptr<T>(), *pdr = dreads.data_ptr<T>();
    T *pdc = dcos.data_ptr<T>(), *pds = dsin.data_ptr<T>();
    at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; part++) {
        Buffer<T> kv(2 * G * d), all(3 * H * d), dkv(2 * G * d);
        T unused;
        for (int64_t r = part * rows / parts; r < (part + 1) * rows / parts; r++) {
          const int64_t angle = r % in.L * (d / 2);
          const scalar_t* x = px + r * (H + 2 * G) * d;
          scalar_t* to = pdx + r * (H + 2 * G) * d;
          const T *c = pc ? pc + angle : nullptr, *s = ps ? ps + angle : nullptr;
          T *dc = pdc + part * angles + angle, *ds = pds + part * angles + angle;
          T *dn = pdn + part * (H + G) * 2, *dr = pdr + part * H * G;
          for (int64_t i = 0; i < 3 * H * d; i++) all[i] = T(pg[r * 3 * H * d + i]);
          for (int64_t j = 0; j < G; j++)
            prepare<T>(x + (H + j) * d, d, pn, c, s, kv + j * d, &unused);
          for (int64_t i = 0; i < G * d; i++) kv[G * d + i] = T(x[(H + G) * d + i]);
          read_backward<T>(kv + 0, all + H * d, pr, H, G, d, dkv + 0, dr);
          read_backward<T>(kv + G * d, all + 2 * H * d, pr, H, G, d, dkv + G * d, dr);
          for (int64_t i = 0; i < H; i++)
            prepare_backward<T>(x + i * d, d, pn, c, s, all + i * d, to + i * d, dn + 2 * i, dc,
                                ds);
          for (int64_t j = 0; j < G; j++)
            prepare_backward<T>(x + (H + j) * d, d, pn, c, s, dkv + j * d, to + (H + j) * d,
                                dn + 2 * (H + j), dc, ds);
          for (int64_t i = 0; i < G * d; i++) to[(H + G) * d + i] = scalar_t(dkv[G * d + i]);
        }
      }
    });
  });
  return {dx, dnorm.sum(at::IntArrayRef({0, 1})), dcos.sum(0), dsin.sum(0), dreads.sum(0)};
}

// -------------------------------------------------------------------------------------------------
// Attention over a mixture of head counts.
//
//   y = sum_j y_scale_j * attention with n_head[j] heads of (q_scale_j * q, k, v)
//   qkv: (B, L, 3E), q_scale and y_scale: (J, E), y: (B, L, E)
//
// A head count j has heads of E / n_head[j] channels side by side. Both scales are factors of a
// channel, so the kernel multiplies the keys by the first and the values by the second, L x d
// numbers once a head, and q and y stay as they are.
//
// Without a bias the attention is causal. With a bias (H, L, L), added to the scores, every token
// sees all L, and h heads use the first h of H; a mask (M, L, L) is added as well, for sequence b
// its entry b % M. These are the windows of a vision transformer.
//
// A causal attention may have a distance (L), which is added to the scores of the keys so many
// tokens back. It is stored from its end, so that a row of scores reads it forward.
//
// It is exact: no scores are left out but those that causality forbids, whose softmax is zero. A
// head goes through its queries in blocks of 64, so that their scores stay in the cache.
//
// Threads: each takes some of the B x (heads) problems, and no two write the same numbers at the
// same time: the head counts, which add to the same y, run one after the other (see rounds_of).

constexpr int64_t query_block = 64;

// Copies `rows` rows of a head (size channels), times scale, to out (rows, d) in the type T. d is
// size in whole vectors. The columns from size on get whatever follows in x: that is fast, and what
// is computed of them is not used. So that nothing behind x is read, the last row is copied channel
// by channel if less than d is left of it (room), and so are all rows if they are narrower than d.
template <typename T, typename scalar_t>
void load(const scalar_t* x, int64_t stride, int64_t rows, int64_t size, int64_t room,
          const T* scale, T* out, int64_t d) {
  constexpr int64_t v = Vector<T>::size;
  const int64_t wide = room >= d ? rows : stride >= d ? rows - 1 : 0;
  for (int64_t t = 0; t < wide; t++)
    for (int64_t c = 0; c < d; c += v)
      for (int64_t l = 0; l < v; l++) out[t * d + c + l] = T(x[t * stride + c + l]) * scale[c + l];
  for (int64_t t = wide; t < rows; t++)
    for (int64_t c = 0; c < size; c++) out[t * d + c] = T(x[t * stride + c]) * scale[c];
}

// The same to the transpose: out (d, ld).
template <typename T, typename scalar_t>
void load_transposed(const scalar_t* x, int64_t stride, int64_t rows, int64_t size, int64_t room,
                     const T* scale, T* out, int64_t ld, int64_t d) {
  constexpr int64_t v = Vector<T>::size;
  int64_t t = 0;
  if constexpr (std::is_same_v<T, scalar_t>)
    for (const int64_t wide = room >= d ? rows : stride >= d ? rows - 1 : 0; t + v <= wide; t += v)
      for (int64_t c = 0; c < d; c += v)
        transpose<T>(x + t * stride + c, stride, out + c * ld + t, ld, scale + c);
  for (int64_t c = 0; c < size; c++)
    for (int64_t r = t; r < rows; r++) out[c * ld + r] = T(x[r * stride + c]) * scale[c];
}

// Head i of the j-th head count: its channels c0 .. c0 + size, and d, size in whole vectors.
struct Head {
  int64_t i, j, c0, size, d;
};

// The heads of all head counts, in rounds that run one after the other. Windows are small and many:
// one round, in which a thread runs all heads of a window while that is in the cache. Otherwise a
// round is one head count, whose heads write different channels.
std::vector<std::vector<Head>> rounds_of(Sizes n_head, int64_t E, int64_t v, bool windows) {
  std::vector<std::vector<Head>> rounds(windows ? 1 : n_head.size());
  for (size_t j = 0; j < n_head.size(); j++)
    for (int64_t i = 0, size = E / n_head[j]; i < n_head[j]; i++)
      rounds[windows ? 0 : j].push_back({i, int64_t(j), i * size, size, round_up(size, v)});
  return rounds;
}

// The largest d of some heads.
int64_t widest(const std::vector<Head>& heads) {
  int64_t d = 0;
  for (const Head& head : heads) d = std::max(d, head.d);
  return d;
}

// Cuts the (sequence, head) problems of a round into parts, each for one thread: single problems,
// or of windows as many parts as there are threads, of whole windows each.
struct Parts {
  int64_t B, n, parts;
  bool windows;
  Parts(int64_t B, int64_t n, bool windows)
      : B(B),
        n(n),
        parts(windows ? std::min<int64_t>(at::get_num_threads(), B) : B * n),
        windows(windows) {}
  int64_t first(int64_t part) const { return windows ? part * B / parts * n : part; }
};

// What both directions read. All but qkv are in the type of the sums; bias and mask may be missing.
struct AttentionInputs {
  Tensor qkv, q_scale, y_scale, bias, mask, behind; // behind: the distance from its end, or empty
  int64_t B, L, E;
  AttentionInputs(const Tensor& x, const Tensor& qs, const Tensor& ys, const OptTensor& b,
                  const OptTensor& m, const OptTensor& distance)
      : qkv(x.stride(2) == 1 ? x : x.contiguous()),
        q_scale(to_acc(qs, x)),
        y_scale(to_acc(ys, x)),
        bias(b ? to_acc(*b, x) : Tensor()),
        mask(m ? to_acc(*m, x) : Tensor()),
        behind(distance ? to_acc(*distance, x).flip(0) : Tensor()),
        B(x.size(0)),
        L(x.size(1)),
        E(x.size(2) / 3) {
    TORCH_CHECK(!(b && distance), "attention has a bias or a distance, not both");
    TORCH_CHECK(!distance || distance->size(0) == L, "distance needs one number a token");
  }
  // where exponentials() finds the number of a token itself, or null
  template <typename T>
  const T* at_zero() const {
    return behind.defined() ? behind.const_data_ptr<T>() + L - 1 : nullptr;
  }
};

// One head of sequence b: where its queries, keys and values, its scales, and the bias and mask of
// its scores begin (null where there is none), and how many channels of a row follow there.
template <typename scalar_t, typename T>
struct HeadInputs {
  const scalar_t *q, *k, *v;
  int64_t q_room, k_room, v_room;
  const T *q_scale, *y_scale, *bias, *mask;
  HeadInputs(const AttentionInputs& in, const Head& head, int64_t b)
      : q(in.qkv.const_data_ptr<scalar_t>() + b * in.qkv.stride(0) + head.c0),
        k(q + in.E),
        v(k + in.E),
        q_room(3 * in.E - head.c0),
        k_room(2 * in.E - head.c0),
        v_room(in.E - head.c0),
        q_scale(in.q_scale.const_data_ptr<T>() + head.j * in.E + head.c0),
        y_scale(in.y_scale.const_data_ptr<T>() + head.j * in.E + head.c0),
        bias(in.bias.defined() ? in.bias.const_data_ptr<T>() + head.i * in.L * in.L : nullptr),
        mask(in.mask.defined()
                 ? in.mask.const_data_ptr<T>() + b % in.mask.size(0) * in.L * in.L
                 : nullptr) {}
};

Tensor attention(const Tensor& qkv, const Tensor& q_scale, const Tensor& y_scale, Sizes n_head,
                 const OptTensor& bias, const OptTensor& mask, const OptTensor& distance) {
  const AttentionInputs in(qkv, q_scale, y_scale, bias, mask, distance);
  const int64_t B = in.B, L = in.L, E = in.E, stride = in.qkv.stride(1);
  const bool windows = bias.has_value();
  Tensor y = at::empty({B, L, E}, acc_options(qkv));
  FOR_TYPE_OF(qkv, "nas::attention", [&] {
    using T = acc<scalar_t>;
    T* py = y.data_ptr<T>();
    const int64_t width = round_up(L, Vector<T>::size);
    for (const std::vector<Head>& heads : rounds_of(n_head, E, Vector<T>::size, windows)) {
      const int64_t most = widest(heads);
      const Parts parts(B, heads.size(), windows);
      at::parallel_for(0, parts.parts, 1, [&](int64_t begin, int64_t end) {
        Buffer<T> k(most * width), v(width * most), q(query_block * most);
        Buffer<T> S(query_block * width), out(query_block * most), inverse(query_block);
        Buffer<T> one(most), q_scale(most), y_scale(most);
        std::fill(one + 0, one + most, T(1));
        for (int64_t item = parts.first(begin); item < parts.first(end); item++) {
          const Head& head = heads[item % heads.size()];
          const auto [i, j, c0, size, d] = head;
          const int64_t b = item / heads.size();
          const HeadInputs<scalar_t, T> of(in, head, b);
          std::copy(of.q_scale, of.q_scale + size, q_scale + 0); // with room up to d
          std::copy(of.y_scale, of.y_scale + size, y_scale + 0);
          load_transposed<T>(of.k, stride, L, size, of.k_room, q_scale, k, width, d);
          load<T>(of.v, stride, L, size, of.v_room, y_scale, v, d);
          for (int64_t t = 0; t < L; t += query_block) {
            const int64_t rows = std::min(query_block, L - t);
            const int64_t padded = round_up(rows, tile_rows<T>);
            const int64_t keys = windows ? width : round_up(t + rows, Vector<T>::size);
            const T* bias_rows = of.bias ? of.bias + t * L : nullptr;
            const T* mask_rows = of.mask ? of.mask + t * L : nullptr;
            load<T>(of.q + t * stride, stride, rows, size, of.q_room, one, q, d);
            gemm<T>(padded, keys, size, q, d, 1, k, width, S, keys, false); // S = q k^T
            exponentials<T>(S, rows, keys, t, L, bias_rows, mask_rows, in.at_zero<T>(), inverse);
            gemm<T>(padded, d, std::min(keys, L), S, keys, 1, v, d, out, d, false); // out = S v
            for (int64_t r = 0; r < rows; r++) {
              T* row = py + (b * L + t + r) * E + c0;
              for (int64_t c = 0; c < size; c++)
                row[c] = (j ? row[c] : T(0)) + inverse[r] * out[r * d + c];
            }
          }
        }
      });
    }
  });
  return y.to(qkv.scalar_type());
}

// The last step of a head's backward pass: dk and dv (L, d) are the gradients to its scaled keys
// and values. Times the scales they are those to its keys and values, which are added to row
// (L, 3E), or set by the first head count. Times the keys and values, summed over the tokens, they
// are those to the scales: dq_scale and dy_scale (size).
template <typename scalar_t, typename T>
void unscale(const HeadInputs<scalar_t, T>& of, int64_t stride, int64_t L, int64_t E, int64_t size,
             int64_t d, bool first, const T* dk, const T* dv, T* row, T* dq_scale, T* dy_scale) {
  std::fill(dq_scale, dq_scale + size, T(0));
  std::fill(dy_scale, dy_scale + size, T(0));
  for (int64_t t = 0; t < L; t++, row += 3 * E)
    for (int64_t c = 0; c < size; c++) {
      const T gk = dk[t * d + c], gv = dv[t * d + c];
      row[E + c] = (first ? T(0) : row[E + c]) + gk * of.q_scale[c];
      row[2 * E + c] = (first ? T(0) : row[2 * E + c]) + gv * of.y_scale[c];
      dq_scale[c] += gk * T(of.k[t * stride + c]);
      dy_scale[c] += gv * T(of.v[t * stride + c]);
    }
}

// The gradients to qkv, q_scale, y_scale, the bias, if need_bias, and the distance. The scores are
// computed anew.
//
// Threads: as forward. The scales have a sum for each sequence, bias and distance one for each
// part, so that no thread waits for another; these are added at the end.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& g, const Tensor& qkv, const Tensor& q_scale, const Tensor& y_scale, Sizes n_head,
    const OptTensor& bias, const OptTensor& mask, const OptTensor& distance, bool need_bias) {
  const AttentionInputs in(qkv, q_scale, y_scale, bias, mask, distance);
  const int64_t B = in.B, L = in.L, E = in.E, J = n_head.size(), stride = in.qkv.stride(1);
  const bool windows = bias.has_value();
  const auto options = acc_options(qkv);
  const int64_t bias_width = round_up(L, vector_bytes / options.dtype().itemsize()); // of a row
  const int64_t bias_parts = need_bias ? Parts(B, 1, true).parts : 1;
  Tensor gc = g.to(qkv.scalar_type()).contiguous(), dx = at::empty({B, L, 3 * E}, options);
  Tensor dq_scale = at::empty({B, J, E}, options), dy_scale = at::empty({B, J, E}, options);
  Tensor dbias = at::zeros({bias_parts, need_bias ? bias->size(0) : 0, L, bias_width}, options);
  const int64_t most_heads = *std::max_element(n_head.begin(), n_head.end());
  Tensor dbehind = at::zeros({distance ? B * most_heads : 0, L}, options);
  FOR_TYPE_OF(qkv, "nas::attention_backward", [&] {
    using T = acc<scalar_t>;
    const scalar_t* pg = gc.const_data_ptr<scalar_t>();
    T *pdx = dx.data_ptr<T>(), *pdq = dq_scale.data_ptr<T>(), *pdy = dy_scale.data_ptr<T>();
    T *pdb = dbias.data_ptr<T>(), *pdd = dbehind.data_ptr<T>();
    const int64_t width = round_up(L, Vector<T>::size);
    for (const std::vector<Head>& heads : rounds_of(n_head, E, Vector<T>::size, windows)) {
      const int64_t most = widest(heads);
      const Parts parts(B, heads.size(), windows);
      at::parallel_for(0, parts.parts, 1, [&](int64_t begin, int64_t end) {
        Buffer<T> k(width * most), kT(most * width), vT(most * width); // scaled
        Buffer<T> dk(width * most), dv(width * most);
        Buffer<T> q(query_block * most), gy(query_block * most), dq(query_block * most);
        Buffer<T> P(query_block * width), dP(query_block * width), inverse(query_block);
        Buffer<T> one(most), q_scale(most), y_scale(most);
        std::fill(one + 0, one + most, T(1));
        for (int64_t part = begin; part < end; part++)
          for (int64_t item = parts.first(part); item < parts.first(part + 1); item++) {
            const Head& head = heads[item % heads.size()];
            const auto [i, j, c0, size, d] = head;
            const int64_t b = item / heads.size();
            const HeadInputs<scalar_t, T> of(in, head, b);
            std::copy(of.q_scale, of.q_scale + size, q_scale + 0);
            std::copy(of.y_scale, of.y_scale + size, y_scale + 0);
            load<T>(of.k, stride, L, size, of.k_room, q_scale, k, d);
            load_transposed<T>(of.k, stride, L, size, of.k_room, q_scale, kT, width, d);
            load_transposed<T>(of.v, stride, L, size, of.v_room, y_scale, vT, width, d);
            std::fill(dk + 0, dk + width * d, T(0));
            std::fill(dv + 0, dv + width * d, T(0));
            for (int64_t t = 0; t < L; t += query_block) {
              const int64_t rows = std::min(query_block, L - t);
              const int64_t padded = round_up(rows, tile_rows<T>);
              const int64_t keys = windows ? width : round_up(t + rows, Vector<T>::size);
              const T* bias_rows = of.bias ? of.bias + t * L : nullptr;
              const T* mask_rows = of.mask ? of.mask + t * L : nullptr;
              T* db = need_bias ? pdb + part * dbias.stride(0) + (i * L + t) * width : nullptr;
              T* dd = distance ? pdd + part * L + L - 1 : nullptr; // a causal part is one head
              load<T>(of.q + t * stride, stride, rows, size, of.q_room, one, q, d);
              load<T>(pg + (b * L + t) * E + c0, E, rows, size, E - c0, one, gy, d);
              gemm<T>(padded, keys, size, q, d, 1, kT, width, P, keys, false); // P = q k^T
              exponentials<T>(P, rows, keys, t, L, bias_rows, mask_rows, in.at_zero<T>(), inverse);
              for (int64_t r = 0; r < rows; r++)
                for (int64_t c = 0; c < d; c++) gy[r * d + c] *= inverse[r];
              gemm<T>(keys, d, rows, P, 1, keys, gy, d, dv, d, true); // dv += P^T gy
              gemm<T>(padded, keys, size, gy, d, 1, vT, width, dP, keys, false); // dP = gy v^T
              score_gradients<T>(P, dP, rows, keys, inverse, db, t, dd);
              gemm<T>(keys, d, rows, dP, 1, keys, q, d, dk, d, true); // dk += dP^T q
              gemm<T>(padded, d, std::min(keys, L), dP, keys, 1, k, d, dq, d, false); // dq = dP k
              for (int64_t r = 0; r < rows; r++) {
                T* row = pdx + (b * L + t + r) * 3 * E + c0;
                for (int64_t c = 0; c < size; c++) row[c] = (j ? row[c] : T(0)) + dq[r * d + c];
              }
            }
            const int64_t of_scale = (b * J + j) * E + c0;
            unscale<scalar_t, T>(of, stride, L, E, size, d, j == 0, dk, dv,
                                 pdx + b * L * 3 * E + c0, pdq + of_scale, pdy + of_scale);
          }
      });
    }
  });
  Tensor db = dbias.sum(0).narrow(2, 0, L).contiguous();
  return {dx.to(qkv.scalar_type()), dq_scale.sum(0), dy_scale.sum(0), db, dbehind.sum(0).flip(0)};
}

// -------------------------------------------------------------------------------------------------
// Depthwise convolution, with zeros around x.
//
//   y[b, c, i, j] = sum_{u, t} w[c, u, t] x[b, c, i stride + u dilation - padding,
//                                                 j stride + t dilation - padding]
//   x: (B, C, H, W) in channels_last, w: (C, 1, k, k), y: (B, C, OH, OW) in channels_last
//
// The forward pass is PyTorch's own, which is as fast as the processor allows. Backward works on v
// channels of one image at a time, one in each lane of a vector. They are copied to a buffer, in
// which neighbouring pixels are neighbouring vectors, and rows have their zeros at the ends.
//
// The gradients are the sums of the formula, none approximated, in the type of the sums.
//
// Threads: each part of the (image, v channels) pairs has its own sums for the weights, which are
// added at the end.

struct Window {
  int64_t k, stride, padding, dilation;
  int64_t reach() const { return dilation * (k - 1); }
  int64_t outputs(int64_t size) const { return (size + 2 * padding - reach() - 1) / stride + 1; }
};

// A tap of the kernel: the pixel of the buffer that a line's first pixel reads, and the weight.
struct Tap {
  int64_t x, w;
};

// Pixels of a row that have the same taps: the first of them in the image, and how many.
struct Line {
  int64_t first, pixels;
  std::vector<Tap> taps;
};

// How the gradient to x is put together. In row i of x, every stride-th pixel from r on is a line.
// Its taps read the buffer of g, which has rows of `width` pixels with `left` zeros first; taps on
// the zeros above and below g are left out.
std::vector<Line> lines_of(const Window& w, int64_t H, int64_t W, int64_t width, int64_t left) {
  std::vector<Line> lines;
  for (int64_t i = 0; i < H; i++)
    for (int64_t r = 0; r < std::min(w.stride, W); r++) {
      lines.push_back({i * W + r, (W - r + w.stride - 1) / w.stride, {}});
      for (int64_t u = 0; u < w.k; u++) {
        const int64_t y = i + w.padding - u * w.dilation; // the row of g, times the stride
        if (y < 0 || y % w.stride || y / w.stride >= w.outputs(H)) continue;
        for (int64_t t = 0; t < w.k; t++) {
          const int64_t x = r + w.padding - t * w.dilation; // the column of g, times the stride
          const int64_t pixel = y / w.stride * width + left + x / w.stride;
          if (x % w.stride == 0) lines.back().taps.push_back({pixel, u * w.k + t});
        }
      }
    }
  return lines;
}

// Copies n <= v channels of an image (H, W, C) to a buffer with rows of `width` pixels, each of v
// channels; the image begins at column `left`.
template <typename T, typename scalar_t>
void pack(const scalar_t* x, int64_t C, int64_t n, int64_t H, int64_t W, int64_t width,
          int64_t left, T* out) {
  constexpr int64_t v = Vector<T>::size;
  for (int64_t i = 0; i < H; i++)
    for (int64_t j = 0; j < W; j++) {
      const scalar_t* from = x + (i * W + j) * C;
      T* to = out + (i * width + left + j) * v;
      if (std::is_same_v<T, scalar_t> && n == v) std::memcpy(to, from, v * sizeof(T));
      else
#pragma GCC ivdep
        for (int64_t c = 0; c < n; c++) to[c] = T(from[c]);
    }
}

constexpr int max_sums = vector_bytes == 64 ? 14 : 8; // vectors that are summed up in registers

// count <= R pixels of a line, which share each load of a weight: out[r] = sum_taps w x.
template <int R, typename T>
void pixels(int64_t count, const std::vector<Tap>& taps, const T* x, const T* w, T* out,
            int64_t out_step) {
  if constexpr (R > 1)
    if (count < R) return pixels<R - 1>(count, taps, x, w, out, out_step);
  using V = typename Vector<T>::type;
  using Anywhere = typename Vector<T>::anywhere;
  constexpr int64_t v = Vector<T>::size;
  V sum[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) sum[r] = V{};
  for (const Tap& tap : taps) {
    const T* from = x + tap.x * v;
    const V weight = *reinterpret_cast<const V*>(w + tap.w * v);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) sum[r] += *reinterpret_cast<const V*>(from + r * v) * weight;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) *reinterpret_cast<Anywhere*>(out + r * out_step) = sum[r];
}

// All lines of one image: out points to its first pixel, of C channels, of which n are written.
// The pixels of a line are out_step pixels apart.
template <typename T, typename scalar_t>
void convolve(const std::vector<Line>& lines, const T* x, const T* w, scalar_t* out, int64_t C,
              int64_t out_step, int64_t n) {
  constexpr int64_t v = Vector<T>::size;
  T values[max_sums * v];
  for (const Line& line : lines) {
    const int64_t parts = (line.pixels + max_sums - 1) / max_sums; // of nearly the same size
    for (int64_t part = 0; part < parts; part++) {
      const int64_t from = part * line.pixels / parts;
      const int64_t count = (part + 1) * line.pixels / parts - from;
      const T* first = x + from * v;
      scalar_t* to = out + (line.first + from * out_step) * C;
      if constexpr (std::is_same_v<T, scalar_t>)
        if (n == v) {
          pixels<max_sums>(count, line.taps, first, w, to, out_step * C);
          continue;
        }
      pixels<max_sums>(count, line.taps, first, w, values, v);
      for (int64_t r = 0; r < count; r++)
#pragma GCC ivdep
        for (int64_t c = 0; c < n; c++) to[r * out_step * C + c] = scalar_t(values[r * v + c]);
    }
  }
}

// For count <= R neighbouring taps: out[r] += the sum over the pixels of g of g times x at tap r.
// g_row and x_row are the pixels from one row to the next, step those from one column to the next.
template <int R, typename T>
void correlate(int64_t count, const T* g, int64_t g_row, const T* x, int64_t x_row, int64_t rows,
               int64_t columns, int64_t step, int64_t dilation, T* out) {
  if constexpr (R > 1)
    if (count < R)
      return correlate<R - 1>(count, g, g_row, x, x_row, rows, columns, step, dilation, out);
  using V = typename Vector<T>::type;
  constexpr int64_t v = Vector<T>::size;
  V sum[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) sum[r] = V{};
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < columns; j++) {
      const V gv = *reinterpret_cast<const V*>(g + (i * g_row + j) * v);
      const T* from = x + (i * x_row + j * step) * v;
#pragma GCC unroll 16
      for (int r = 0; r < R; r++)
        sum[r] += *reinterpret_cast<const V*>(from + r * dilation * v) * gv;
    }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) *reinterpret_cast<V*>(out + r * v) += sum[r];
}

// out (k k, v) += the gradient to the weights of v channels of one image.
template <typename T>
void weight_gradient(const Window& w, int64_t H, int64_t W, const T* g, int64_t g_row, const T* x,
                     int64_t x_row, T* out) {
  constexpr int64_t v = Vector<T>::size;
  for (int64_t u = 0; u < w.k; u++) {
    // the rows lo .. hi - 1 of g meet rows of x, the others zeros above and below it
    const int64_t up = w.padding - u * w.dilation;
    const int64_t lo = up > 0 ? (up + w.stride - 1) / w.stride : 0;
    const int64_t last = H - 1 + up < 0 ? 0 : (H - 1 + up) / w.stride + 1;
    const int64_t hi = std::min(w.outputs(H), last);
    for (int64_t t = 0; t < w.k && lo < hi; t += max_sums) {
      const int64_t count = std::min<int64_t>(max_sums, w.k - t);
      const T* first = x + ((lo * w.stride - up) * x_row + t * w.dilation) * v;
      correlate<max_sums>(count, g + lo * g_row * v, g_row, first, w.stride * x_row, hi - lo,
                          w.outputs(W), w.stride, w.dilation, out + (u * w.k + t) * v);
    }
  }
}

// (C, 1, k, k) -> (C / v, k k, v), the last vector filled up with zeros; and back.
Tensor to_vectors(const Tensor& w, int64_t v) {
  const int64_t C = w.size(0), taps = w.size(2) * w.size(3), blocks = (C + v - 1) / v;
  Tensor out = at::zeros({blocks * v, taps}, w.options());
  out.narrow(0, 0, C).copy_(w.reshape({C, taps}));
  return out.view({blocks, v, taps}).transpose(1, 2).contiguous();
}

Tensor from_vectors(const Tensor& w, Sizes shape) {
  Tensor flat = w.transpose(1, 2).reshape({w.size(0) * w.size(2), w.size(1)});
  return flat.narrow(0, 0, shape[0]).contiguous().view(shape);
}

Tensor depthwise(const Tensor& x, const Tensor& weight, int64_t stride, int64_t padding,
                 int64_t dilation) {
  const auto layout = at::MemoryFormat::ChannelsLast;
  const Tensor xc = x.contiguous(layout);
  return at::conv2d(xc, weight, {}, stride, padding, dilation, weight.size(0)).contiguous(layout);
}

// The gradients to x and the weights; one that is not needed has no elements.
std::tuple<Tensor, Tensor> depthwise_backward(const Tensor& g, const Tensor& x,
                                              const Tensor& weight, int64_t stride,
                                              int64_t padding, int64_t dilation, bool need_x,
                                              bool need_w) {
  const auto layout = at::MemoryFormat::ChannelsLast;
  const Window window{weight.size(2), stride, padding, dilation};
  const int64_t B = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3);
  const int64_t OH = window.outputs(H), OW = window.outputs(W);
  Tensor gc = g.to(x.scalar_type()).contiguous(layout), xc;
  Tensor dx = at::empty({0}, x.options()), dw = at::empty({0}, weight.options());
  if (need_w) xc = x.contiguous(layout);
  if (need_x) dx = at::empty(x.sizes(), x.options().memory_format(layout));
  // the rows of the buffers: of x with its padding, of g with what taps on its left and right read
  const int64_t x_width = std::max(padding + W, (OW - 1) * stride + window.reach() + 1);
  const int64_t left = std::max<int64_t>(0, (window.reach() - padding + stride - 1) / stride);
  const int64_t width = left + std::max(OW, (W - 1 + padding) / stride + 1);
  std::vector<Line> lines;
  if (need_x) lines = lines_of(window, H, W, width, left);
  FOR_TYPE_OF(x, "nas::depthwise_backward", [&] {
    using T = acc<scalar_t>;
    constexpr int64_t v = Vector<T>::size;
    Tensor w = to_vectors(to_acc(weight, x), v);
    const int64_t blocks = w.size(0), taps = w.size(1), items = B * blocks;
    const int64_t threads = at::get_num_threads(), useful = items / grain(OH * OW * taps * v);
    const int64_t parts = std::max<int64_t>(1, std::min(threads, useful));
    Tensor sums = at::zeros({need_w ? parts : 0, blocks, taps, v}, acc_options(x)); // of dw
    const scalar_t* pg = gc.const_data_ptr<scalar_t>();
    const scalar_t* px = need_w ? xc.const_data_ptr<scalar_t>() : nullptr;
    scalar_t* pdx = need_x ? dx.data_ptr<scalar_t>() : nullptr;
    const T* pw = w.const_data_ptr<T>();
    T* psums = sums.data_ptr<T>();
    at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      Tensor g_buffer = at::zeros({OH * width * v}, acc_options(x));
      Tensor x_buffer = at::zeros({H * x_width * v}, acc_options(x));
      T *pgb = g_buffer.data_ptr<T>(), *pxb = x_buffer.data_ptr<T>();
      for (int64_t part = begin; part < end; part++)
        for (int64_t item = part * items / parts; item < (part + 1) * items / parts; item++) {
          const int64_t b = item / blocks, k = item % blocks, n = std::min(v, C - k * v);
          pack(pg + b * OH * OW * C + k * v, C, n, OH, OW, width, left, pgb);
          if (need_x) {
            scalar_t* out = pdx + b * H * W * C + k * v;
            convolve(lines, pgb, pw + k * taps * v, out, C, stride, n);
          }
          if (need_w) {
            pack(px + b * H * W * C + k * v, C, n, H, W, x_width, padding, pxb);
            T* out = psums + (part * blocks + k) * taps * v;
            weight_gradient(window, H, W, pgb + left * v, width, pxb, x_width, out);
          }
        }
    });
    if (need_w) dw = from_vectors(sums.sum(0), weight.sizes()).to(weight.scalar_type());
  });
  return {dx, dw};
}

// -------------------------------------------------------------------------------------------------
// Autograd. It is registered with the dispatcher, so that torch.compile sees both directions, and
// written here, for in Python it would take a small layer as much time again.

using Context = torch::autograd::AutogradContext;
using Gradients = torch::autograd::variable_list;

// The operator of that name; F is the type of its implementation, a function.
template <typename F>
auto find(F&, const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

// Function::apply as a plain function with the implementation's arguments.
template <typename Function, typename... Args>
auto apply(Tensor (&)(Args...)) {
  return +[](Args... args) { return Function::apply(args...); };
}

// The gradient in the type of x; none if it is not needed.
Tensor as(const Tensor& gradient, const Tensor& x, bool needed = true) {
  return needed ? gradient.to(x.scalar_type()) : Tensor();
}

// A tensor that was saved undefined is one that was missing.
OptTensor optional(const Tensor& t) { return t.defined() ? OptTensor(t) : OptTensor(); }

Gradients saved_by(Context* ctx) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !at::GradMode::is_enabled(),
      "the kernels of fused_ops.cpp have no second derivatives: switch them off by --fused=False");
  return ctx->get_saved_variables();
}

struct Norm : torch::autograd::Function<Norm> {
  static Tensor forward(Context* ctx, const Tensor& x, const Tensor& weight, const OptTensor& bias,
                        const Tensor& p, const OptTensor& q, Sizes n, double eps) {
    static const auto op = find(norm, "nas::norm");
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({x, weight, p, q.value_or(Tensor())});
    ctx->saved_data = {{"bias", bias.has_value()}, {"n", n}, {"eps", eps}};
    return op.call(x, weight, bias, p, q, n, eps);
  }
  static Gradients backward(Context* ctx, Gradients g) {
    static const auto op = find(norm_backward, "nas::norm_backward");
    const auto saved = saved_by(ctx);
    const Tensor &x = saved[0], &weight = saved[1], &p = saved[2], &q = saved[3];
    auto& rest = ctx->saved_data;
    const auto n = rest["n"].toIntVector();
    auto [dx, dweight, dbias, dp, dq] =
        op.call(g[0], x, weight, p, optional(q), n, rest["eps"].toDouble());
    return {dx, as(dweight, weight), as(dbias, weight, rest["bias"].toBool()), as(dp, p),
            q.defined() ? as(dq, q) : Tensor(), Tensor(), Tensor()};
  }
};

struct MixedActivation : torch::autograd::Function<MixedActivation> {
  static Tensor forward(Context* ctx, const Tensor& x, const Tensor& p, Sizes kinds) {
    static const auto op = find(activation, "nas::activation");
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({x, p});
    ctx->saved_data = {{"kinds", kinds}};
    return op.call(x, p, kinds);
  }
  static Gradients backward(Context* ctx, Gradients g) {
    static const auto op = find(activation_backward, "nas::activation_backward");
    const auto saved = saved_by(ctx);
    auto [dx, dp] = op.call(g[0], saved[0], saved[1], ctx->saved_data["kinds"].toIntVector());
    return {dx, as(dp, saved[1]), Tensor()};
  }
};

struct BlockLinear : torch::autograd::Function<BlockLinear> {
  static Tensor forward(Context* ctx, const Tensor& x, const Tensor& W, const OptTensor& bias,
                        const Tensor& M, Sizes o, Sizes i) {
    static const auto op = find(block_linear, "nas::block_linear");
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({x, W, M});
    ctx->saved_data = {{"bias", bias.has_value()}, {"o", o}, {"i", i}};
    return op.call(x, W, bias, M, o, i);
  }
  static Gradients backward(Context* ctx, Gradients g) {
    static const auto op = find(block_linear_backward, "nas::block_linear_backward");
    const auto saved = saved_by(ctx);
    const Tensor &x = saved[0], &W = saved[1], &M = saved[2];
    auto& rest = ctx->saved_data;
    const auto o = rest["o"].toIntVector(), i = rest["i"].toIntVector();
    const bool bias = rest["bias"].toBool(); // without one, M is input 2
    const bool need_W = ctx->needs_input_grad(1), need_M = ctx->needs_input_grad(2 + bias);
    const bool need_bias = bias && ctx->needs_input_grad(2);
    auto [dx, dW, dbias, dM] = op.call(g[0], x, W, M, o, i, need_W, need_bias, need_M);
    return {dx, as(dW, W, need_W), as(dbias, g[0], need_bias), as(dM, M, need_M),
            Tensor(), Tensor()};
  }
};

struct Heads : torch::autograd::Function<Heads> {
  static Tensor forward(Context* ctx, const Tensor& qkv, int64_t d, int64_t H, int64_t G,
                        const OptTensor& norm, const OptTensor& cos, const OptTensor& sin,
                        const OptTensor& reads) {
    static const auto op = find(heads, "nas::heads");
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({qkv, norm.value_or(Tensor()), cos.value_or(Tensor()),
                            sin.value_or(Tensor()), reads.value_or(Tensor())});
    ctx->saved_data = {{"d", d}, {"H", H}, {"G", G}};
    return op.call(qkv, d, H, G, norm, cos, sin, reads);
  }
  static Gradients backward(Context* ctx, Gradients g) {
    static const auto op = find(heads_backward, "nas::heads_backward");
    const auto saved = saved_by(ctx);
    const auto number = [&](const char* name) { return ctx->saved_data[name].toInt(); };
    const auto [dqkv, dnorm, dcos, dsin, dreads] =
        op.call(g[0], saved[0], number("d"), number("H"), number("G"), optional(saved[1]),
                optional(saved[2]), optional(saved[3]), optional(saved[4]));
    const auto of = [](const Tensor& gradient, const Tensor& x) {
      return x.defined() ? as(gradient, x) : Tensor();
    };
    return {dqkv, Tensor(), Tensor(), Tensor(), of(dnorm, saved[1]), of(dcos, saved[2]),
            of(dsin, saved[3]), of(dreads, saved[4])};
  }
};

struct Attention : torch::autograd::Function<Attention> {
  static Tensor forward(Context* ctx, const Tensor& qkv, const Tensor& q_scale,
                        const Tensor& y_scale, Sizes n_head, const OptTensor& bias,
                        const OptTensor& mask, const OptTensor& distance) {
    static const auto op = find(attention, "nas::attention");
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({qkv, q_scale, y_scale, bias.value_or(Tensor()), mask.value_or(Tensor()),
                            distance.value_or(Tensor())});
    ctx->saved_data = {{"n_head", n_head}};
    return op.call(qkv, q_scale, y_scale, n_head, bias, mask, distance);
  }
  static Gradients backward(Context* ctx, Gradients g) {
    static const auto op = find(attention_backward, "nas::attention_backward");
    const auto saved = saved_by(ctx);
    const Tensor &qkv = saved[0], &q_scale = saved[1], &y_scale = saved[2], &bias = saved[3];
    const Tensor& distance = saved[5];
    const auto n_head = ctx->saved_data["n_head"].toIntVector();
    const bool need_bias = bias.defined() && ctx->needs_input_grad(3);
    auto [dqkv, dq_scale, dy_scale, dbias, d_distance] =
        op.call(g[0], qkv, q_scale, y_scale, n_head, optional(bias), optional(saved[4]),
                optional(distance), need_bias);
    return {dqkv, as(dq_scale, q_scale), as(dy_scale, y_scale), Tensor(),
            need_bias ? as(dbias, bias) : Tensor(), Tensor(),
            distance.defined() ? as(d_distance, distance) : Tensor()};
  }
};

struct Depthwise : torch::autograd::Function<Depthwise> {
  static Tensor forward(Context* ctx, const Tensor& x, const Tensor& weight, int64_t stride,
                        int64_t padding, int64_t dilation) {
    static const auto op = find(depthwise, "nas::depthwise");
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({x, weight});
    ctx->saved_data = {{"stride", stride}, {"padding", padding}, {"dilation", dilation}};
    return op.call(x, weight, stride, padding, dilation);
  }
  static Gradients backward(Context* ctx, Gradients g) {
    static const auto op = find(depthwise_backward, "nas::depthwise_backward");
    const auto saved = saved_by(ctx);
    const auto number = [&](const char* name) { return ctx->saved_data[name].toInt(); };
    const bool need_x = ctx->needs_input_grad(0), need_w = ctx->needs_input_grad(1);
    auto [dx, dw] = op.call(g[0], saved[0], saved[1], number("stride"), number("padding"),
                            number("dilation"), need_x, need_w);
    return {need_x ? dx : Tensor(), need_w ? dw : Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

} // namespace

TORCH_LIBRARY(nas, m) {
  m.def("norm(Tensor x, Tensor weight, Tensor? bias, Tensor p, Tensor? q, int[] n, float eps)"
        " -> Tensor");
  m.def("norm_backward(Tensor g, Tensor x, Tensor weight, Tensor p, Tensor? q, int[] n, float eps)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("activation(Tensor x, Tensor p, int[] kinds) -> Tensor");
  m.def("activation_backward(Tensor g, Tensor x, Tensor p, int[] kinds) -> (Tensor, Tensor)");
  m.def("block_linear(Tensor x, Tensor W, Tensor? bias, Tensor M, int[] o, int[] i) -> Tensor");
  m.def("block_linear_backward(Tensor g, Tensor x, Tensor W, Tensor M, int[] o, int[] i,"
        " bool need_W, bool need_bias, bool need_M) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("heads(Tensor qkv, int d, int H, int G, Tensor? norm, Tensor? cos, Tensor? sin,"
        " Tensor? reads) -> Tensor");
  m.def("heads_backward(Tensor g, Tensor qkv, int d, int H, int G, Tensor? norm, Tensor? cos,"
        " Tensor? sin, Tensor? reads) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("attention(Tensor qkv, Tensor q_scale, Tensor y_scale, int[] n_head,"
        " Tensor? bias=None, Tensor? mask=None, Tensor? distance=None) -> Tensor");
  m.def("attention_backward(Tensor g, Tensor qkv, Tensor q_scale, Tensor y_scale, int[] n_head,"
        " Tensor? bias=None, Tensor? mask=None, Tensor? distance=None, bool need_bias=False)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("depthwise(Tensor x, Tensor weight, int stride, int padding, int dilation) -> Tensor");
  m.def("depthwise_backward(Tensor g, Tensor x, Tensor weight, int stride, int padding,"
        " int dilation, bool need_x, bool need_w) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(nas, CPU, m) {
  m.impl("norm", norm);
  m.impl("norm_backward", norm_backward);
  m.impl("activation", activation);
  m.impl("activation_backward", activation_backward);
  m.impl("block_linear", block_linear);
  m.impl("block_linear_backward", block_linear_backward);
  m.impl("heads", heads);
  m.impl("heads_backward", heads_backward);
  m.impl("attention", attention);
  m.impl("attention_backward", attention_backward);
  m.impl("depthwise", depthwise);
  m.impl("depthwise_backward", depthwise_backward);
}

TORCH_LIBRARY_IMPL(nas, Autograd, m) {
  m.impl("norm", apply<Norm>(norm));
  m.impl("activation", apply<MixedActivation>(activation));
  m.impl("block_linear", apply<BlockLinear>(block_linear));
  m.impl("heads", apply<Heads>(heads));
  m.impl("attention", apply<Attention>(attention));
  m.impl("depthwise", apply<Depthwise>(depthwise));
}
