// The mixing kernels of a weight-entangled supernet on a CPU, forward and backward: LayerNorm, Linear and attention;
// and depthwise convolution, whose backward is slow in PyTorch.
//
// supernet.py compiles this file at first use, registers the shapes, and has each kernel's reference in PyTorch, which says what is
// computed. Activations are float, double, bfloat16 or float16; sums and all small vectors are float (double for double).
// Strides are free but for the last dimension, which is made contiguous.
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

namespace {

template <typename scalar_t>
using acc = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

at::TensorOptions acc_options(const Tensor& x) {
  return x.options().dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

// A small vector as the kernels read it.
Tensor small(const Tensor& v, const Tensor& x) { return v.to(acc_options(x).dtype()).contiguous(); }

// (rows, N) with any row stride.
Tensor rows_of(const Tensor& x) {
  Tensor flat = x.reshape({-1, x.size(-1)});
  return flat.stride(1) == 1 || flat.size(1) == 1 ? flat : flat.contiguous();
}

constexpr int64_t grain(int64_t work_per_item) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, work_per_item)); }

// ---------------------------------------------------------------------------------------------------------------------------
// Vectors, as wide as the processor has them.

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
  typedef T anywhere __attribute__((vector_size(vector_bytes), aligned(sizeof(T)))); // in memory, at any address
  static constexpr int64_t size = vector_bytes / sizeof(T);
};

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Zeros in memory from a whole cache line on: a vector that lies in two of them takes twice as long.
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
  typename Vector<T>::type* vectors() { return reinterpret_cast<typename Vector<T>::type*>(first); }
};

// Every lane of x in the place of the one whose number has bit w changed.
template <typename T, int w>
typename Vector<T>::type swapped(typename Vector<T>::type x) {
  typename Vector<T>::type y{};
#pragma GCC unroll 16
  for (int l = 0; l < Vector<T>::size; l++) y[l] = x[l ^ w]; // one instruction
  return y;
}

// What op makes of all lanes of x.
template <typename T, int w = Vector<T>::size / 2, typename F>
T across(typename Vector<T>::type x, F op) {
  x = op(x, swapped<T, w>(x));
  if constexpr (w > 1) return across<T, w / 2>(x, op);
  else return x[0];
}

// As many rows as lanes, in place: of each pair of rows it exchanges the lanes with bit w, once for every w.
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

// As many rows of x as a vector has lanes, and as many columns, transposed; the rows of out are multiplied by scale, if there is one.
template <typename T>
void transpose(const T* x, int64_t stride, T* out, int64_t ld, const T* scale = nullptr) {
  constexpr int64_t v = Vector<T>::size;
  typename Vector<T>::type rows[v];
#pragma GCC unroll 16
  for (int64_t r = 0; r < v; r++) rows[r] = *reinterpret_cast<const typename Vector<T>::anywhere*>(x + r * stride);
  transpose<T>(rows);
#pragma GCC unroll 16
  for (int64_t r = 0; r < v; r++)
    *reinterpret_cast<typename Vector<T>::anywhere*>(out + r * ld) = scale ? rows[r] * scale[r] : rows[r];
}

// ---------------------------------------------------------------------------------------------------------------------------
// y = weight * sum_k p_k pad((x[:n_k] - mean_k) * rstd_k) + bias. Inside block b, the channels between two options, this is
// weight * (x * A_b - B_b) + bias, A_b = sum_{k >= b} p_k rstd_k, B_b = sum_{k >= b} p_k rstd_k mean_k.

// Up to as many rows of x as a vector has lanes, a lane each: X (N, v), with zeros where there are fewer; and back.
template <typename T, typename scalar_t>
void to_lanes(const scalar_t* x, int64_t stride, int64_t rows, int64_t N, T* X) {
  constexpr int64_t v = Vector<T>::size;
  if constexpr (std::is_same_v<T, scalar_t>)
    if (rows == v && N >= v) {
      for (int64_t c = 0; c < N; c += v) transpose<T>(x + std::min(c, N - v), stride, X + std::min(c, N - v) * v, v);
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
      for (int64_t c = 0; c < N; c += v) transpose<T>(X + std::min(c, N - v) * v, v, y + std::min(c, N - v), N);
      return;
    }
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < N; c++) y[r * N + c] = scalar_t(X[c * v + r]);
}

// f(from) + ... + f(to - 1)
template <typename T, typename F>
typename Vector<T>::type sum(int64_t from, int64_t to, F f) {
  typename Vector<T>::type sums[4] = {}; // an addition waits for the last but three
  for (; from + 4 <= to; from += 4)
    for (int64_t i = 0; i < 4; i++) sums[i] += f(from + i);
  for (; from < to; from++) sums[0] += f(from);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// The mean of every block of the rows, and the mean and 1 / deviation of every prefix.
template <typename T, typename V = typename Vector<T>::type>
void prefix_moments(const V* x, Sizes n, T eps, V* block_means, V* mean, V* rstd) {
  V m{}, m2{}; // of the channels so far; blocks are merged as in Chan et al. 1979
  for (size_t k = 0, c0 = 0; k < n.size(); c0 = n[k++]) {
    const T before = c0, all = n[k], size = all - before;
    const V block_mean = block_means[k] = sum<T>(c0, n[k], [&](int64_t c) { return x[c]; }) / size, delta = block_mean - m;
    m2 += sum<T>(c0, n[k], [&](int64_t c) { return (x[c] - block_mean) * (x[c] - block_mean); }) + delta * delta * (before * size / all);
    m += delta * (size / all);
    mean[k] = m;
    for (int64_t l = 0; l < Vector<T>::size; l++) rstd[k][l] = 1 / std::sqrt(m2[l] / all + eps);
  }
}

Tensor layer_norm(const Tensor& x, const Tensor& weight, const OptTensor& bias, const Tensor& p, Sizes n, double eps) {
  const int64_t N = x.size(-1), K = n.size();
  Tensor x2 = rows_of(x), y = at::empty(x2.sizes(), x.options());
  const int64_t rows = x2.size(0), stride = x2.stride(0);
  Tensor w = small(weight, x), b = bias ? small(*bias, x) : Tensor(), ps = small(p, x);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "nas::layer_norm", [&] {
    using T = acc<scalar_t>;
    constexpr int64_t v = Vector<T>::size;
    const scalar_t* px = x2.const_data_ptr<scalar_t>();
    scalar_t* py = y.data_ptr<scalar_t>();
    const T *pw = w.const_data_ptr<T>(), *pb = bias ? b.const_data_ptr<T>() : nullptr, *pp = ps.const_data_ptr<T>();
    at::parallel_for(0, (rows + v - 1) / v, grain(4 * N * v), [&](int64_t begin, int64_t end) {
      Buffer<T> X(N * v), moments(3 * K * v);
      auto *xs = X.vectors(), *block_means = moments.vectors(), *mean = block_means + K, *rstd = mean + K;
      for (int64_t r = begin * v; r < std::min(rows, end * v); r += v) {
        to_lanes<T>(px + r * stride, stride, std::min(v, rows - r), N, X.first);
        prefix_moments<T>(xs, n, T(eps), block_means, mean, rstd);
        typename Vector<T>::type A{}, B{};
        for (int64_t k = K - 1; k >= 0; k--) {
          A += pp[k] * rstd[k];
          B += pp[k] * rstd[k] * mean[k];
          for (int64_t c = k ? n[k - 1] : 0; c < n[k]; c++) xs[c] = pw[c] * (xs[c] * A - B) + (pb ? pb[c] : T(0));
        }
        from_lanes<T>(X.first, std::min(v, rows - r), N, py + r * N);
      }
    });
  });
  return y.view(x.sizes());
}

// With G_k, H_k the sums over c < n_k of g w and g w (x - mean_k), Q_k = rstd_k H_k is the gradient to p_k, and
// dx = g w A_b - (x - m) D_b - E_b in block b; D_b and E_b are sums over k >= b, m any shift.
std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& g, const Tensor& x, const Tensor& weight, const Tensor& p,
                                                               Sizes n, double eps) {
  const int64_t N = x.size(-1), K = n.size();
  Tensor x2 = rows_of(x), g2 = rows_of(g.to(x.scalar_type())), dx = at::empty(x2.sizes(), x.options());
  const int64_t rows = x2.size(0), stride = x2.stride(0), g_stride = g2.stride(0);
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), rows / grain(8 * N)));
  Tensor sums = at::empty({parts, 2 * N + K}, acc_options(x)); // dweight, dbias, dp
  Tensor w = small(weight, x), ps = small(p, x);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "nas::layer_norm_backward", [&] {
    using T = acc<scalar_t>;
    using V = typename Vector<T>::type;
    constexpr int64_t v = Vector<T>::size;
    const int64_t tiles = (rows + v - 1) / v;
    const scalar_t *px = x2.const_data_ptr<scalar_t>(), *pg = g2.const_data_ptr<scalar_t>();
    scalar_t* pdx = dx.data_ptr<scalar_t>();
    const T *pw = w.const_data_ptr<T>(), *pp = ps.const_data_ptr<T>();
    T* psums = sums.data_ptr<T>();
    at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; part++) {
        Buffer<T> X(N * v), Y(N * v), moments(5 * K * v), all((2 * N + K) * v);
        V *xs = X.vectors(), *gs = Y.vectors(), *block_means = moments.vectors(), *mean = block_means + K, *rstd = mean + K;
        V *g_sums = rstd + K, *h_sums = g_sums + K, *dw = all.vectors(), *db = dw + N, *dp = db + N;
        for (int64_t tile = part * tiles / parts; tile < (part + 1) * tiles / parts; tile++) {
          const int64_t r = tile * v, used = std::min(v, rows - r);
          to_lanes<T>(px + r * stride, stride, used, N, X.first);
          to_lanes<T>(pg + r * g_stride, g_stride, used, N, Y.first);
          prefix_moments<T>(xs, n, T(eps), block_means, mean, rstd);
          for (int64_t k = 0, c0 = 0; k < K; c0 = n[k++]) {
            g_sums[k] = sum<T>(c0, n[k], [&](int64_t c) { return gs[c] * pw[c]; });
            h_sums[k] = sum<T>(c0, n[k], [&](int64_t c) { return gs[c] * pw[c] * (xs[c] - block_means[k]); });
          }
          const V m = mean[K - 1];
          V A{}, B{}, D{}, E{};
          for (int64_t k = K - 1; k >= 0; k--) {
            V G{}, H{}; // sums over c < n_k of g w, and of g w (x - mean_k)
            for (int64_t i = 0; i <= k; i++) {
              G += g_sums[i];
              H += h_sums[i] - (mean[k] - block_means[i]) * g_sums[i];
            }
            const T size = n[k];
            const V scale = pp[k] * rstd[k], shift = mean[k] - m, Q = rstd[k] * H, slope = scale * rstd[k] * Q / size;
            dp[k] += Q;
            A += scale;
            B += scale * shift;
            D += slope;
            E += scale * G / size - slope * shift;
            for (int64_t c = k ? n[k - 1] : 0; c < n[k]; c++) {
              const V gc = gs[c], xc = xs[c] - m;
              xs[c] = gc * pw[c] * A - xc * D - E;
              dw[c] += gc * (xc * A - B);
              db[c] += gc;
            }
          }
          from_lanes<T>(X.first, used, N, pdx + r * N);
        }
        for (int64_t i = 0; i < 2 * N + K; i++)
          psums[part * (2 * N + K) + i] = across<T>(dw[i], [](V a, V b) { return a + b; });
      }
    });
  });
  Tensor total = sums.sum(0);
  return {dx.view(x.sizes()), total.slice(0, 0, N).clone(), total.slice(0, N, 2 * N).clone(), total.slice(0, 2 * N).clone()};
}

// ---------------------------------------------------------------------------------------------------------------------------
// y = x (W * M)^T + bias, M constant on the blocks that the row ends o and the column ends i cut W into; M is (len(o), len(i)).

Tensor block_scale(const Tensor& W, const Tensor& M, Sizes o, Sizes i) {
  Tensor out = at::empty(W.sizes(), W.options()), Wc = rows_of(W), Ms = small(M, W);
  const int64_t stride = Wc.stride(0), columns = W.size(1), C = i.size();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, W.scalar_type(), "nas::block_scale", [&] {
    using T = acc<scalar_t>;
    const scalar_t* pw = Wc.const_data_ptr<scalar_t>();
    const T* pm = Ms.const_data_ptr<T>();
    scalar_t* po = out.data_ptr<scalar_t>();
    at::parallel_for(0, W.size(0), grain(columns), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++) {
        const int64_t block = std::upper_bound(o.begin(), o.end(), r) - o.begin();
        for (int64_t k = 0, c0 = 0; k < C; c0 = i[k++]) {
          const T m = pm[block * C + k];
          for (int64_t c = c0; c < i[k]; c++) po[r * columns + c] = scalar_t(T(pw[r * stride + c]) * m);
        }
      }
    });
  });
  return out;
}

// (len(o), len(i)): the sums of a * b over each block.
Tensor block_dot(const Tensor& a, const Tensor& b, Sizes o, Sizes i) {
  Tensor ac = rows_of(a), bc = rows_of(b);
  const int64_t C = i.size(), rows = a.size(0), sa = ac.stride(0), sb = bc.stride(0);
  Tensor per_row = at::empty({rows, C}, acc_options(a)), out = at::empty({static_cast<int64_t>(o.size()), C}, acc_options(a));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, a.scalar_type(), "nas::block_dot", [&] {
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
  for (size_t k = 0; k < o.size(); k++) {
    const int64_t from = k ? o[k - 1] : 0;
    out.select(0, k).copy_(per_row.narrow(0, from, o[k] - from).sum(0));
  }
  return out;
}

Tensor block_linear(const Tensor& x, const Tensor& W, const OptTensor& bias, const Tensor& M, Sizes o, Sizes i) {
  return at::linear(x, block_scale(W, M, o, i), bias ? bias->to(x.scalar_type()) : OptTensor());
}

// dx and dM of frozen weights: h_r = g[:, rows r] W[rows r] for each row block, at the price of the plain dx alone; then
// dx = sum_r M_r h_r and dM_rc = <h_r, x> over the columns c. A few hundred tokens at a time, so that h stays in the cache.
void frozen_backward(const Tensor& g, const Tensor& x, const Tensor& W, const Tensor& M, Sizes o, Sizes i, Tensor& dx, Tensor& dM) {
  const int64_t R = o.size(), C = i.size(), tokens = x.size(0), I = x.size(1), chunk = 512;
  Tensor h = at::empty({R, std::min(chunk, tokens), I}, x.options()), Ms = small(M, x);
  Tensor dots = at::empty({tokens, R * C}, acc_options(x));
  for (int64_t t0 = 0; t0 < tokens; t0 += chunk) {
    const int64_t size = std::min(chunk, tokens - t0);
    for (int64_t r = 0, from = 0; r < R; from = o[r++]) {
      Tensor out = h.select(0, r).narrow(0, 0, size);
      at::mm_out(out, g.narrow(0, t0, size).narrow(1, from, o[r] - from), W.narrow(0, from, o[r] - from));
    }
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "nas::block_linear_backward", [&] {
      using T = acc<scalar_t>;
      const scalar_t *ph = h.const_data_ptr<scalar_t>(), *px = x.const_data_ptr<scalar_t>() + t0 * x.stride(0);
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

// An empty tensor stands for a gradient that was not asked for. dx is computed always.
std::tuple<Tensor, Tensor, Tensor, Tensor> block_linear_backward(const Tensor& g, const Tensor& x, const Tensor& W, const Tensor& M,
                                                                 Sizes o, Sizes i, bool need_W, bool need_bias, bool need_M) {
  Tensor g2 = rows_of(g), x2 = rows_of(x), dx, dW = at::empty({0}, W.options());
  Tensor db = at::empty({0}, acc_options(x)), dM = at::empty({0}, acc_options(x));
  const bool by_rows = !need_W && W.size(0) >= 32 * static_cast<int64_t>(o.size()); // products of a few rows are slower than one more
  if (need_M && by_rows) {
    dx = at::empty(x2.sizes(), x.options());
    frozen_backward(g2, x2, W, M, o, i, dx, dM);
  } else {
    dx = at::mm(g2, block_scale(W, M, o, i));
  }
  if (need_W || (need_M && !by_rows)) {
    Tensor raw = at::mm(g2.t(), x2); // (out, in)
    if (need_M) dM = block_dot(raw, W, o, i);
    if (need_W) dW = block_scale(raw, M, o, i);
  }
  if (need_bias) db = g2.sum(0, false, acc_options(x).dtype().toScalarType());
  return {dx.view(x.sizes()), dW, db, dM};
}

// ---------------------------------------------------------------------------------------------------------------------------
// C (m, n) = or += A (m, k) B (k, n). A has any strides; B and C have contiguous rows, and m is a multiple of tile_rows,
// n of a vector.

// Rows at a time: a divisor of a vector's lanes, so that keys, in whole vectors, can be rows as well.
template <typename T>
constexpr int tile_rows = std::min<int>(Vector<T>::size, vector_bytes == 64 ? 8 : 4);

template <typename T, int columns>
void tile(int64_t k, const T* A, int64_t ai, int64_t ak, const T* B, int64_t ldb, T* C, int64_t ldc, bool add) {
  using V = typename Vector<T>::type;
  using Anywhere = typename Vector<T>::anywhere;
  constexpr int64_t v = Vector<T>::size;
  V sum[tile_rows<T>][columns], b[columns]; // all in registers, once the loops are unrolled
#pragma GCC unroll 8
  for (int r = 0; r < tile_rows<T>; r++)
#pragma GCC unroll 2
    for (int c = 0; c < columns; c++) sum[r][c] = V{};
  for (int64_t q = 0; q < k; q++) {
#pragma GCC unroll 2
    for (int c = 0; c < columns; c++) b[c] = *reinterpret_cast<const Anywhere*>(B + q * ldb + c * v);
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
void gemm(int64_t m, int64_t n, int64_t k, const T* A, int64_t ai, int64_t ak, const T* B, int64_t ldb, T* C, int64_t ldc, bool add) {
  constexpr int64_t v = Vector<T>::size;
  for (int64_t c = 0; c < n; c += 2 * v)
    for (int64_t r = 0; r < m; r += tile_rows<T>) {
      if (n - c >= 2 * v) tile<T, 2>(k, A + r * ai, ai, ak, B + c, ldb, C + r * ldc + c, ldc, add);
      else tile<T, 1>(k, A + r * ai, ai, ak, B + c, ldb, C + r * ldc + c, ldc, add);
    }
}

// e^x for x <= 0, to 2 units in the last place.
inline Vector<float>::type exponential(Vector<float>::type x) {
  using V = Vector<float>::type;
  typedef int32_t I __attribute__((vector_size(vector_bytes)));
  x = x < -87.f ? V{} - 87.f : x;
  const I whole = __builtin_convertvector(x * 1.44269504f - 0.5f, I); // it rounds toward zero
  const V n = __builtin_convertvector(whole, V), r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  V y = r * (1.f / 5040) + 1.f / 720;
  y = y * r + 1.f / 120;
  y = y * r + 1.f / 24;
  y = y * r + 1.f / 6;
  y = y * r + 0.5f;
  y = y * r + 1.f;
  y = y * r + 1.f;
  const I exponent = (whole + 127) << 23;
  V scale;
  std::memcpy(&scale, &exponent, sizeof(scale));
  return y * scale;
}
inline Vector<double>::type exponential(Vector<double>::type x) {
  for (int64_t l = 0; l < Vector<double>::size; l++) x[l] = std::exp(x[l]);
  return x;
}

// Row i of S, (rows, width), holds the scores of a token for the keys 0 .. first + i, or for `all` keys if there is a bias, (rows, all),
// to add and a mask like it. They become e^(score - the highest), with zeros behind them, and inverse[i] one over their sum.
template <typename T>
void exponentials(T* S, int64_t rows, int64_t width, int64_t first, int64_t all, const T* bias, const T* mask, T* inverse) {
  using V = typename Vector<T>::type;
  using Anywhere = typename Vector<T>::anywhere;
  constexpr int64_t v = Vector<T>::size;
  V lane;
  for (int64_t l = 0; l < v; l++) lane[l] = l;
  for (int64_t i = 0; i < rows; i++) {
    const int64_t keys = bias ? all : first + i + 1, whole = keys / v * v;
    T* s = S + i * width;
    const auto at = [&](int64_t j) -> Anywhere& { return *reinterpret_cast<Anywhere*>(s + j); };
    for (int64_t j = 0; bias && !mask && j < keys; j++) s[j] += bias[i * all + j];
    for (int64_t j = 0; bias && mask && j < keys; j++) s[j] += bias[i * all + j] + mask[i * all + j];
    const auto in = lane < V{} + T(keys - whole); // of the last vector
    V x = V{} + s[0], top = whole < keys ? in ? at(whole) : x : x, sum{};
    for (int64_t j = 0; j < whole; j += v) top = at(j) > top ? at(j) : top;
    top = V{} + across<T>(top, [](V a, V b) -> V { return a > b ? a : b; });
    for (int64_t j = 0; j < whole; j += v) sum += at(j) = exponential(at(j) - top);
    if (whole < keys) sum += at(whole) = in ? exponential(at(whole) - top) : V{};
    for (int64_t j = round_up(keys, v); j < width; j += v) at(j) = V{};
    inverse[i] = 1 / across<T>(sum, [](V a, V b) { return a + b; });
  }
}

// dP, (rows, width), the gradient of the softmax times `inverse`, becomes that of the scores; it is added to db, if there is one.
template <typename T>
void score_gradients(const T* P, T* dP, int64_t rows, int64_t width, const T* inverse, T* db) {
  using V = typename Vector<T>::type;
  using Anywhere = typename Vector<T>::anywhere;
  constexpr int64_t v = Vector<T>::size;
  for (int64_t r = 0; r < rows; r++) {
    const auto s = [&](int64_t c) { return *reinterpret_cast<const Anywhere*>(P + r * width + c); };
    const auto a = [&](int64_t c) -> Anywhere& { return *reinterpret_cast<Anywhere*>(dP + r * width + c); };
    V dot{};
    for (int64_t c = 0; c < width; c += v) dot += s(c) * a(c);
    dot = V{} + inverse[r] * across<T>(dot, [](V a, V b) { return a + b; });
    for (int64_t c = 0; c < width; c += v) a(c) = s(c) * (a(c) - dot);
    for (int64_t c = 0; db && c < width; c += v) *reinterpret_cast<Anywhere*>(db + r * width + c) += a(c);
  }
}

// ---------------------------------------------------------------------------------------------------------------------------
// y = sum_j y_scale_j * attention with n_head[j] heads of (q_scale_j * q, k, v); qkv (B, T, 3E), q_scale and y_scale (J, E).
// Both scales are linear in what they multiply: the first goes to the keys, the second to the values, T x d each, once a head.
// Causal without a bias, (heads, T, T), which is added to the scores, those of a head count the first; with it also a mask,
// (M, T, T), of which sequence b has the b % M-th.

constexpr int64_t block = 64; // query rows at a time

// The first rows of a head, times scale, as T: out (rows, d), or its transpose, (d, ld). d is size, in whole vectors: what follows
// in x comes along, if there is room for it behind the last row's start, and if there is not, in all rows but the last.
template <typename T, typename scalar_t>
void load(const scalar_t* x, int64_t stride, int64_t rows, int64_t size, int64_t room, const T* scale, T* out, int64_t d) {
  constexpr int64_t v = Vector<T>::size;
  const int64_t wide = room >= d ? rows : stride >= d ? rows - 1 : 0;
  for (int64_t t = 0; t < wide; t++)
    for (int64_t c = 0; c < d; c += v)
      for (int64_t l = 0; l < v; l++) out[t * d + c + l] = T(x[t * stride + c + l]) * scale[c + l];
  for (int64_t t = wide; t < rows; t++)
    for (int64_t c = 0; c < size; c++) out[t * d + c] = T(x[t * stride + c]) * scale[c];
}

template <typename T, typename scalar_t>
void load_transposed(const scalar_t* x, int64_t stride, int64_t rows, int64_t size, int64_t room, const T* scale, T* out, int64_t ld,
                     int64_t d) {
  constexpr int64_t v = Vector<T>::size;
  int64_t t = 0;
  if constexpr (std::is_same_v<T, scalar_t>)
    for (const int64_t wide = room >= d ? rows : stride >= d ? rows - 1 : 0; t + v <= wide; t += v)
      for (int64_t c = 0; c < d; c += v) transpose<T>(x + t * stride + c, stride, out + c * ld + t, ld, scale + c);
  for (int64_t c = 0; c < size; c++)
    for (int64_t r = t; r < rows; r++) out[c * ld + r] = T(x[r * stride + c]) * scale[c];
}

// Head i of the j-th head count, its channels c0 .. c0 + size and, in whole vectors, d.
struct Head {
  int64_t i, j, c0, size, d;
};

// All heads of all counts, in rounds: windows are small, so that all heads of one run while it is in the cache; of other sequences those
// of one count, which are enough for all threads.
std::vector<std::vector<Head>> rounds_of(Sizes n_head, int64_t E, int64_t v, bool windows) {
  std::vector<std::vector<Head>> rounds(windows ? 1 : n_head.size());
  for (size_t j = 0; j < n_head.size(); j++)
    for (int64_t i = 0, size = E / n_head[j]; i < n_head[j]; i++)
      rounds[windows ? 0 : j].push_back({i, int64_t(j), i * size, size, round_up(size, v)});
  return rounds;
}

// The range of (sequence, head) that is one part of the work: of windows whole ones.
struct Parts {
  int64_t B, n, parts;
  bool windows;
  Parts(int64_t B, int64_t n, bool windows)
      : B(B), n(n), parts(windows ? std::min<int64_t>(at::get_num_threads(), B) : B * n), windows(windows) {}
  int64_t first(int64_t part) const { return windows ? part * B / parts * n : part; }
};

Tensor attention(const Tensor& qkv, const Tensor& q_scale, const Tensor& y_scale, Sizes n_head, const OptTensor& bias,
                 const OptTensor& mask) {
  Tensor x = qkv.stride(2) == 1 ? qkv : qkv.contiguous();
  const int64_t B = x.size(0), L = x.size(1), E = x.size(2) / 3, sb = x.stride(0), st = x.stride(1);
  Tensor y = at::empty({B, L, E}, acc_options(x)), qs = small(q_scale, x), ys = small(y_scale, x);
  const Tensor bs = bias ? small(*bias, x) : Tensor(), ms = mask ? small(*mask, x) : Tensor();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "nas::attention", [&] {
    using T = acc<scalar_t>;
    const scalar_t* px = x.const_data_ptr<scalar_t>();
    T* py = y.data_ptr<T>();
    const T *pb = bias ? bs.const_data_ptr<T>() : nullptr, *pm = mask ? ms.const_data_ptr<T>() : nullptr;
    const int64_t width = round_up(L, Vector<T>::size);
    for (const std::vector<Head>& heads : rounds_of(n_head, E, Vector<T>::size, pb)) {
      const int64_t most = std::max_element(heads.begin(), heads.end(), [](const Head& a, const Head& b) { return a.d < b.d; })->d;
      const Parts parts(B, heads.size(), pb);
      at::parallel_for(0, parts.parts, 1, [&](int64_t begin, int64_t end) {
        Buffer<T> k(most * width), v(width * most), q(block * most), S(block * width), out(block * most), inverse(block);
        Buffer<T> one(most), q_scale(most), y_scale(most);
        std::fill(one + 0, one + most, T(1));
        for (int64_t item = parts.first(begin); item < parts.first(end); item++) {
          const auto [i, j, c0, size, d] = heads[item % heads.size()];
          const int64_t b = item / heads.size();
          const scalar_t* head = px + b * sb + c0;
          const T *pq = qs.const_data_ptr<T>() + j * E + c0, *po = ys.const_data_ptr<T>() + j * E + c0;
          std::copy(pq, pq + size, q_scale + 0);
          std::copy(po, po + size, y_scale + 0);
          load_transposed<T>(head + E, st, L, size, 2 * E - c0, q_scale, k, width, d);
          load<T>(head + 2 * E, st, L, size, E - c0, y_scale, v, d);
          for (int64_t t = 0; t < L; t += block) {
            const int64_t rows = std::min(block, L - t), padded = round_up(rows, tile_rows<T>);
            const int64_t keys = pb ? width : round_up(t + rows, Vector<T>::size);
            load<T>(head + t * st, st, rows, size, 3 * E - c0, one, q, d);
            gemm<T>(padded, keys, size, q, d, 1, k, width, S, keys, false);
            exponentials<T>(S, rows, keys, t, L, pb ? pb + (i * L + t) * L : nullptr, pm ? pm + (b % ms.size(0) * L + t) * L : nullptr,
                            inverse);
            gemm<T>(padded, d, std::min(keys, L), S, keys, 1, v, d, out, d, false);
            for (int64_t r = 0; r < rows; r++) {
              T* row = py + (b * L + t + r) * E + c0;
              for (int64_t c = 0; c < size; c++) row[c] = (j ? row[c] : T(0)) + inverse[r] * out[r * d + c];
            }
          }
        }
      });
    }
  });
  return y.to(qkv.scalar_type());
}

// The gradients of qkv, q_scale, y_scale and, where asked for, the bias: one sum a thread, for not to wait for each other.
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(const Tensor& g, const Tensor& qkv, const Tensor& q_scale,
                                                              const Tensor& y_scale, Sizes n_head, const OptTensor& bias,
                                                              const OptTensor& mask, bool need_bias) {
  Tensor x = qkv.stride(2) == 1 ? qkv : qkv.contiguous(), gc = g.to(qkv.scalar_type()).contiguous();
  const int64_t B = x.size(0), L = x.size(1), E = x.size(2) / 3, sb = x.stride(0), st = x.stride(1), J = n_head.size();
  Tensor dx = at::empty({B, L, 3 * E}, acc_options(x)), dq_scale = at::empty({B, J, E}, acc_options(x));
  Tensor dy_scale = at::empty({B, J, E}, acc_options(x)), qs = small(q_scale, x), ys = small(y_scale, x);
  const Tensor bs = bias ? small(*bias, x) : Tensor(), ms = mask ? small(*mask, x) : Tensor();
  Tensor dbias = at::zeros({need_bias ? Parts(B, 1, true).parts : 1, need_bias ? bias->size(0) : 0, L, round_up(L, vector_bytes / acc_options(x).dtype().itemsize())},
                           acc_options(x)); // with a row's padding
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "nas::attention_backward", [&] {
    using T = acc<scalar_t>;
    const scalar_t *px = x.const_data_ptr<scalar_t>(), *pg = gc.const_data_ptr<scalar_t>();
    T *pdx = dx.data_ptr<T>(), *pdq = dq_scale.data_ptr<T>(), *pdy = dy_scale.data_ptr<T>(), *pdb = dbias.data_ptr<T>();
    const T *pb = bias ? bs.const_data_ptr<T>() : nullptr, *pm = mask ? ms.const_data_ptr<T>() : nullptr;
    const int64_t width = round_up(L, Vector<T>::size);
    for (const std::vector<Head>& heads : rounds_of(n_head, E, Vector<T>::size, pb)) {
      const int64_t most = std::max_element(heads.begin(), heads.end(), [](const Head& a, const Head& b) { return a.d < b.d; })->d;
      const Parts parts(B, heads.size(), pb);
      at::parallel_for(0, parts.parts, 1, [&](int64_t begin, int64_t end) {
        Buffer<T> k(width * most), kT(most * width), vT(most * width), q(block * most), gy(block * most), out(block * most);
        Buffer<T> P(block * width), dP(block * width), w(width * most), u(width * most); // w, u: before the scales' product with dk, dv
        Buffer<T> one(most), q_scale(most), y_scale(most), inverse(block);
        std::fill(one + 0, one + most, T(1));
        for (int64_t part = begin; part < end; part++)
        for (int64_t item = parts.first(part); item < parts.first(part + 1); item++) {
          const auto [i, j, c0, size, d] = heads[item % heads.size()];
          const int64_t b = item / heads.size();
          const scalar_t* head = px + b * sb + c0;
          const T *pq = qs.const_data_ptr<T>() + j * E + c0, *po = ys.const_data_ptr<T>() + j * E + c0;
          std::copy(pq, pq + size, q_scale + 0);
          std::copy(po, po + size, y_scale + 0);
          load<T>(head + E, st, L, size, 2 * E - c0, q_scale, k, d);
          load_transposed<T>(head + E, st, L, size, 2 * E - c0, q_scale, kT, width, d);
          load_transposed<T>(head + 2 * E, st, L, size, E - c0, y_scale, vT, width, d);
          std::fill(w + 0, w + width * d, T(0));
          std::fill(u + 0, u + width * d, T(0));
          for (int64_t t = 0; t < L; t += block) {
            const int64_t rows = std::min(block, L - t), padded = round_up(rows, tile_rows<T>);
            const int64_t keys = pb ? width : round_up(t + rows, Vector<T>::size);
            load<T>(head + t * st, st, rows, size, 3 * E - c0, one, q, d);
            load<T>(pg + (b * L + t) * E + c0, E, rows, size, E - c0, one, gy, d);
            gemm<T>(padded, keys, size, q, d, 1, kT, width, P, keys, false);
            exponentials<T>(P, rows, keys, t, L, pb ? pb + (i * L + t) * L : nullptr, pm ? pm + (b % ms.size(0) * L + t) * L : nullptr,
                            inverse);
            for (int64_t r = 0; r < rows; r++)
              for (int64_t c = 0; c < d; c++) gy[r * d + c] *= inverse[r];
            gemm<T>(keys, d, rows, P, 1, keys, gy, d, u, d, true);
            gemm<T>(padded, keys, size, gy, d, 1, vT, width, dP, keys, false);
            score_gradients<T>(P, dP, rows, keys, inverse, need_bias ? pdb + part * dbias.stride(0) + (i * L + t) * width : nullptr);
            gemm<T>(keys, d, rows, dP, 1, keys, q, d, w, d, true);
            gemm<T>(padded, d, std::min(keys, L), dP, keys, 1, k, d, out, d, false);
            for (int64_t r = 0; r < rows; r++) {
              T* row = pdx + (b * L + t + r) * 3 * E + c0;
              for (int64_t c = 0; c < size; c++) row[c] = (j ? row[c] : T(0)) + out[r * d + c];
            }
          }
          T *sq = pdq + (b * J + j) * E + c0, *sy = pdy + (b * J + j) * E + c0;
          std::fill(sq, sq + size, T(0));
          std::fill(sy, sy + size, T(0));
          for (int64_t t = 0; t < L; t++) {
            T* row = pdx + (b * L + t) * 3 * E + c0;
            for (int64_t c = 0; c < size; c++) {
              const T dk = w[t * d + c], dv = u[t * d + c];
              row[E + c] = (j ? row[E + c] : T(0)) + dk * pq[c];
              row[2 * E + c] = (j ? row[2 * E + c] : T(0)) + dv * po[c];
              sq[c] += dk * T(head[t * st + E + c]);
              sy[c] += dv * T(head[t * st + 2 * E + c]);
            }
          }
        }
      });
    }
  });
  return {dx.to(qkv.scalar_type()), dq_scale.sum(0), dy_scale.sum(0), dbias.sum(0).narrow(2, 0, L).contiguous()};
}

// ---------------------------------------------------------------------------------------------------------------------------
// y[b, c, i, j] = sum_uv w[c, u, v] x[b, c, i stride + u dilation - padding, j stride + v dilation - padding], zeros around x.
// Forward is PyTorch's own, which is as fast as the processor. Backward takes one vector of channels of one image at a time, copied to
// where its pixels are neighbours and its rows have the zeros at their ends.

struct Window {
  int64_t k, stride, padding, dilation;
  int64_t reach() const { return dilation * (k - 1); }
  int64_t outputs(int64_t size) const { return (size + 2 * padding - reach() - 1) / stride + 1; }
};

// The pixels of a row that read by the same taps, those that fall on zeros above and below left out.
struct Tap {
  int64_t x, w; // where the first pixel reads, and the weight
};
struct Line {
  int64_t first, pixels;
  std::vector<Tap> taps;
};

// Of the gradient to x, every stride-th pixel of a row from r on is a line. It reads rows of g, `width` pixels with `left` zeros first.
std::vector<Line> lines_of(const Window& w, int64_t H, int64_t W, int64_t width, int64_t left) {
  std::vector<Line> lines;
  for (int64_t i = 0; i < H; i++)
    for (int64_t r = 0; r < std::min(w.stride, W); r++) {
      lines.push_back({i * W + r, (W - r + w.stride - 1) / w.stride, {}});
      for (int64_t u = 0; u < w.k; u++) {
        const int64_t y = i + w.padding - u * w.dilation; // times the stride
        if (y < 0 || y % w.stride || y / w.stride >= w.outputs(H)) continue;
        for (int64_t v = 0; v < w.k; v++) {
          const int64_t x = r + w.padding - v * w.dilation;
          if (x % w.stride == 0) lines.back().taps.push_back({y / w.stride * width + left + x / w.stride, u * w.k + v});
        }
      }
    }
  return lines;
}

// n <= a vector of the channels of an image to the middle of rows of `width` vectors.
template <typename T, typename scalar_t>
void pack(const scalar_t* x, int64_t C, int64_t n, int64_t H, int64_t W, int64_t width, int64_t left, T* out) {
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

constexpr int most = vector_bytes == 64 ? 14 : 8; // sums in registers

// R pixels of a line, or fewer: every weight is loaded once for all of them.
template <int R, typename T>
void pixels(int64_t count, const std::vector<Tap>& taps, const T* x, const T* w, T* out, int64_t out_step) {
  if constexpr (R > 1)
    if (count < R) return pixels<R - 1>(count, taps, x, w, out, out_step);
  using V = typename Vector<T>::type;
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
  for (int r = 0; r < R; r++) *reinterpret_cast<typename Vector<T>::anywhere*>(out + r * out_step) = sum[r];
}

// out: the first pixel of an image of C channels, of which n are written.
template <typename T, typename scalar_t>
void convolve(const std::vector<Line>& lines, const T* x, const T* w, scalar_t* out, int64_t C, int64_t out_step, int64_t n) {
  constexpr int64_t v = Vector<T>::size;
  T values[most * v];
  for (const Line& line : lines)
    for (int64_t part = 0, parts = (line.pixels + most - 1) / most; part < parts; part++) { // of the same size, as far as that goes
      const int64_t from = part * line.pixels / parts, count = (part + 1) * line.pixels / parts - from;
      const T* first = x + from * v;
      scalar_t* to = out + (line.first + from * out_step) * C;
      if constexpr (std::is_same_v<T, scalar_t>)
        if (n == v) {
          pixels<most>(count, line.taps, first, w, to, out_step * C);
          continue;
        }
      pixels<most>(count, line.taps, first, w, values, v);
      for (int64_t r = 0; r < count; r++)
#pragma GCC ivdep
        for (int64_t c = 0; c < n; c++) to[r * out_step * C + c] = scalar_t(values[r * v + c]);
    }
}

// The sums over g of g times x at R neighbouring taps, or fewer, added to out.
template <int R, typename T>
void correlate(int64_t count, const T* g, int64_t g_row, const T* x, int64_t x_row, int64_t rows, int64_t columns, int64_t step,
               int64_t dilation, T* out) {
  if constexpr (R > 1)
    if (count < R) return correlate<R - 1>(count, g, g_row, x, x_row, rows, columns, step, dilation, out);
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
      for (int r = 0; r < R; r++) sum[r] += *reinterpret_cast<const V*>(from + r * dilation * v) * gv;
    }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) *reinterpret_cast<V*>(out + r * v) += sum[r];
}

// out (k k, vector): the gradient to the weights of one vector of channels of one image.
template <typename T>
void weight_gradient(const Window& w, int64_t H, int64_t W, const T* g, int64_t g_row, const T* x, int64_t x_row, T* out) {
  constexpr int64_t v = Vector<T>::size;
  for (int64_t u = 0; u < w.k; u++) {
    const int64_t up = w.padding - u * w.dilation; // rows lo .. hi - 1 of g meet rows of x
    const int64_t lo = up > 0 ? (up + w.stride - 1) / w.stride : 0;
    const int64_t hi = std::min(w.outputs(H), H - 1 + up < 0 ? 0 : (H - 1 + up) / w.stride + 1);
    for (int64_t t = 0; t < w.k && lo < hi; t += most)
      correlate<most>(std::min<int64_t>(most, w.k - t), g + lo * g_row * v, g_row, x + ((lo * w.stride - up) * x_row + t * w.dilation) * v,
                      w.stride * x_row, hi - lo, w.outputs(W), w.stride, w.dilation, out + (u * w.k + t) * v);
  }
}

// (C, 1, k, k) -> (C / v, k k, v), the last vector filled up with zeros, and back.
Tensor to_vectors(const Tensor& w, int64_t v) {
  const int64_t C = w.size(0), taps = w.size(2) * w.size(3), blocks = (C + v - 1) / v;
  Tensor out = at::zeros({blocks * v, taps}, w.options());
  out.narrow(0, 0, C).copy_(w.reshape({C, taps}));
  return out.view({blocks, v, taps}).transpose(1, 2).contiguous();
}

Tensor from_vectors(const Tensor& w, Sizes shape) {
  return w.transpose(1, 2).reshape({w.size(0) * w.size(2), w.size(1)}).narrow(0, 0, shape[0]).contiguous().view(shape);
}

Tensor depthwise(const Tensor& x, const Tensor& weight, int64_t stride, int64_t padding, int64_t dilation) {
  const auto layout = at::MemoryFormat::ChannelsLast;
  return at::conv2d(x.contiguous(layout), weight, {}, stride, padding, dilation, weight.size(0)).contiguous(layout);
}

// An empty tensor stands for a gradient that was not asked for.
std::tuple<Tensor, Tensor> depthwise_backward(const Tensor& g, const Tensor& x, const Tensor& weight, int64_t stride, int64_t padding,
                                              int64_t dilation, bool need_x, bool need_w) {
  const Window window{weight.size(2), stride, padding, dilation};
  const int64_t B = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3), OH = window.outputs(H), OW = window.outputs(W);
  Tensor gc = g.to(x.scalar_type()).contiguous(at::MemoryFormat::ChannelsLast), xc, dx = at::empty({0}, x.options());
  Tensor dw = at::empty({0}, weight.options());
  if (need_w) xc = x.contiguous(at::MemoryFormat::ChannelsLast);
  if (need_x) dx = at::empty(x.sizes(), x.options().memory_format(at::MemoryFormat::ChannelsLast));
  const int64_t x_width = std::max(padding + W, (OW - 1) * stride + window.reach() + 1);
  const int64_t left = std::max<int64_t>(0, (window.reach() - padding + stride - 1) / stride);
  const int64_t width = left + std::max(OW, (W - 1 + padding) / stride + 1);
  const std::vector<Line> lines = need_x ? lines_of(window, H, W, width, left) : std::vector<Line>();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "nas::depthwise_backward", [&] {
    using T = acc<scalar_t>;
    constexpr int64_t v = Vector<T>::size;
    Tensor w = to_vectors(small(weight, x), v);
    const int64_t blocks = w.size(0), taps = w.size(1), items = B * blocks;
    const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), items / grain(OH * OW * taps * v)));
    Tensor sums = at::zeros({need_w ? parts : 0, blocks, taps, v}, acc_options(x)); // of dw
    const scalar_t *pg = gc.const_data_ptr<scalar_t>(), *px = need_w ? xc.const_data_ptr<scalar_t>() : nullptr;
    scalar_t* pdx = need_x ? dx.data_ptr<scalar_t>() : nullptr;
    const T* pw = w.const_data_ptr<T>();
    T* psums = sums.data_ptr<T>();
    at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      Tensor g_buffer = at::zeros({OH * width * v}, acc_options(x)), x_buffer = at::zeros({H * x_width * v}, acc_options(x));
      T *pgb = g_buffer.data_ptr<T>(), *pxb = x_buffer.data_ptr<T>();
      for (int64_t part = begin; part < end; part++)
        for (int64_t item = part * items / parts; item < (part + 1) * items / parts; item++) {
          const int64_t b = item / blocks, k = item % blocks, n = std::min(v, C - k * v);
          pack(pg + b * OH * OW * C + k * v, C, n, OH, OW, width, left, pgb);
          if (need_x) convolve(lines, pgb, pw + k * taps * v, pdx + b * H * W * C + k * v, C, stride, n);
          if (!need_w) continue;
          pack(px + b * H * W * C + k * v, C, n, H, W, x_width, padding, pxb);
          weight_gradient(window, H, W, pgb + left * v, width, pxb, x_width, psums + (part * blocks + k) * taps * v);
        }
    });
    if (need_w) dw = from_vectors(sums.sum(0), weight.sizes()).to(weight.scalar_type());
  });
  return {dx, dw};
}

// ---------------------------------------------------------------------------------------------------------------------------
// Autograd, by the dispatcher, so that torch.compile sees both directions. In Python it would cost a small layer as much time again.

using Context = torch::autograd::AutogradContext;
using Gradients = torch::autograd::variable_list;

template <typename F>
auto find(F&, const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

template <typename F, typename... Args>
auto apply(Tensor (&)(Args...)) {
  return +[](Args... args) { return F::apply(args...); };
}

Tensor as(const Tensor& gradient, const Tensor& x, bool needed = true) { return needed ? gradient.to(x.scalar_type()) : Tensor(); }

Gradients saved_by(Context* ctx) {
  TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled(), "the kernels of fused_ops.cpp have no second derivatives: turn them off");
  return ctx->get_saved_variables();
}

struct LayerNorm : torch::autograd::Function<LayerNorm> {
  static Tensor forward(Context* ctx, const Tensor& x, const Tensor& weight, const OptTensor& bias, const Tensor& p, Sizes n, double eps) {
    static const auto op = find(layer_norm, "nas::layer_norm");
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({x, weight, p});
    ctx->saved_data = {{"bias", bias.has_value()}, {"n", n}, {"eps", eps}};
    return op.call(x, weight, bias, p, n, eps);
  }
  static Gradients backward(Context* ctx, Gradients g) {
    static const auto op = find(layer_norm_backward, "nas::layer_norm_backward");
    auto saved = saved_by(ctx);
    auto& rest = ctx->saved_data;
    auto [dx, dweight, dbias, dp] = op.call(g[0], saved[0], saved[1], saved[2], rest["n"].toIntVector(), rest["eps"].toDouble());
    return {dx, as(dweight, saved[1]), as(dbias, saved[1], rest["bias"].toBool()), as(dp, saved[2]), Tensor(), Tensor()};
  }
};

struct BlockLinear : torch::autograd::Function<BlockLinear> {
  static Tensor forward(Context* ctx, const Tensor& x, const Tensor& W, const OptTensor& bias, const Tensor& M, Sizes o, Sizes i) {
    static const auto op = find(block_linear, "nas::block_linear");
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({x, W, M});
    ctx->saved_data = {{"bias", bias.has_value()}, {"o", o}, {"i", i}};
    return op.call(x, W, bias, M, o, i);
  }
  static Gradients backward(Context* ctx, Gradients g) {
    static const auto op = find(block_linear_backward, "nas::block_linear_backward");
    auto saved = saved_by(ctx);
    auto& rest = ctx->saved_data;
    const bool bias = rest["bias"].toBool(), need_W = ctx->needs_input_grad(1); // which counts the tensors that there are
    const bool need_bias = bias && ctx->needs_input_grad(2), need_M = ctx->needs_input_grad(2 + bias);
    auto [dx, dW, dbias, dM] = op.call(g[0], saved[0], saved[1], saved[2], rest["o"].toIntVector(), rest["i"].toIntVector(), need_W,
                                       need_bias, need_M);
    return {dx, as(dW, saved[1], need_W), as(dbias, g[0], need_bias), as(dM, saved[2], need_M), Tensor(), Tensor()};
  }
};

struct Attention : torch::autograd::Function<Attention> {
  static Tensor forward(Context* ctx, const Tensor& qkv, const Tensor& q_scale, const Tensor& y_scale, Sizes n_head, const OptTensor& bias,
                        const OptTensor& mask) {
    static const auto op = find(attention, "nas::attention");
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({qkv, q_scale, y_scale, bias.value_or(Tensor()), mask.value_or(Tensor())});
    ctx->saved_data = {{"n_head", n_head}};
    return op.call(qkv, q_scale, y_scale, n_head, bias, mask);
  }
  static Gradients backward(Context* ctx, Gradients g) {
    static const auto op = find(attention_backward, "nas::attention_backward");
    auto saved = saved_by(ctx);
    auto optional = [](const Tensor& t) { return t.defined() ? OptTensor(t) : OptTensor(); };
    const bool need_bias = saved[3].defined() && ctx->needs_input_grad(3);
    auto [dqkv, dq_scale, dy_scale, dbias] = op.call(g[0], saved[0], saved[1], saved[2], ctx->saved_data["n_head"].toIntVector(),
                                                     optional(saved[3]), optional(saved[4]), need_bias);
    return {dqkv, as(dq_scale, saved[1]), as(dy_scale, saved[2]), Tensor(), need_bias ? as(dbias, saved[3]) : Tensor(), Tensor()};
  }
};

struct Depthwise : torch::autograd::Function<Depthwise> {
  static Tensor forward(Context* ctx, const Tensor& x, const Tensor& weight, int64_t stride, int64_t padding, int64_t dilation) {
    static const auto op = find(depthwise, "nas::depthwise");
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({x, weight});
    ctx->saved_data = {{"stride", stride}, {"padding", padding}, {"dilation", dilation}};
    return op.call(x, weight, stride, padding, dilation);
  }
  static Gradients backward(Context* ctx, Gradients g) {
    static const auto op = find(depthwise_backward, "nas::depthwise_backward");
    auto saved = saved_by(ctx);
    auto& rest = ctx->saved_data;
    const bool need_x = ctx->needs_input_grad(0), need_w = ctx->needs_input_grad(1);
    auto [dx, dw] = op.call(g[0], saved[0], saved[1], rest["stride"].toInt(), rest["padding"].toInt(), rest["dilation"].toInt(), need_x,
                            need_w);
    return {need_x ? dx : Tensor(), need_w ? dw : Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

} // namespace

TORCH_LIBRARY(nas, m) {
  m.def("layer_norm(Tensor x, Tensor weight, Tensor? bias, Tensor p, int[] n, float eps) -> Tensor");
  m.def("layer_norm_backward(Tensor g, Tensor x, Tensor weight, Tensor p, int[] n, float eps) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("block_linear(Tensor x, Tensor W, Tensor? bias, Tensor M, int[] o, int[] i) -> Tensor");
  m.def("block_linear_backward(Tensor g, Tensor x, Tensor W, Tensor M, int[] o, int[] i, bool need_W, bool need_bias, bool need_M)"
        " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("attention(Tensor qkv, Tensor q_scale, Tensor y_scale, int[] n_head, Tensor? bias=None, Tensor? mask=None) -> Tensor");
  m.def("attention_backward(Tensor g, Tensor qkv, Tensor q_scale, Tensor y_scale, int[] n_head, Tensor? bias=None, Tensor? mask=None,"
        " bool need_bias=False) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("depthwise(Tensor x, Tensor weight, int stride, int padding, int dilation) -> Tensor");
  m.def("depthwise_backward(Tensor g, Tensor x, Tensor weight, int stride, int padding, int dilation, bool need_x, bool need_w)"
        " -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(nas, CPU, m) {
  m.impl("layer_norm", layer_norm);
  m.impl("layer_norm_backward", layer_norm_backward);
  m.impl("block_linear", block_linear);
  m.impl("block_linear_backward", block_linear_backward);
  m.impl("attention", attention);
  m.impl("attention_backward", attention_backward);
  m.impl("depthwise", depthwise);
  m.impl("depthwise_backward", depthwise_backward);
}

TORCH_LIBRARY_IMPL(nas, Autograd, m) {
  m.impl("layer_norm", apply<LayerNorm>(layer_norm));
  m.impl("block_linear", apply<BlockLinear>(block_linear));
  m.impl("attention", apply<Attention>(attention));
  m.impl("depthwise", apply<Depthwise>(depthwise));
}
