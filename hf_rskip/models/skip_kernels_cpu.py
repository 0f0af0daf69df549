"""Recursive skip connections as one operator for CPUs: a row stays in the cache while it passes through its K steps.

The C++ below is plain enough that any `c++` builds it in about a second: no headers of torch, no ninja. It is compiled
for the processor at hand when a precision is first used, and kept in torch's folder of extensions
(`TORCH_EXTENSIONS_DIR`); processes that do so at once each build for themselves, and the last one's file stays.
"""

import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch.utils.cpp_extension import get_default_build_root
from transformers.utils import logging

from .skip_kernels_autograd import register_recomputation

logger = logging.get_logger(__name__)

FLAGS = "-std=c++17 -O3 -march=native -Wno-psabi -fno-math-errno -fno-trapping-math -fopenmp -shared -fPIC"
_NAMES = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.float16: "_Float16"}

SOURCE = r"""
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define WIDTH 64
#elif defined(__AVX__)
#define WIDTH 32
#else
#define WIDTH 16
#endif
typedef float V __attribute__((vector_size(WIDTH)));
typedef uint32_t U __attribute__((vector_size(WIDTH)));
typedef int32_t I __attribute__((vector_size(WIDTH)));
typedef uint64_t L __attribute__((vector_size(WIDTH)));
typedef uint16_t H __attribute__((vector_size(WIDTH / 2)));
typedef float Quarter __attribute__((vector_size(16)));
constexpr int64_t LANES = WIDTH / 4;
#ifndef GROUP
#define GROUP 4
#endif

struct bfloat16 {
  uint16_t bits;
};

static inline V widen(const float* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
static inline V widen(const bfloat16* p) {
  H h;
  std::memcpy(&h, p, sizeof h);
  return (V)(__builtin_convertvector(h, U) << 16);
}
static inline void narrow(V v, float* p) { std::memcpy(p, &v, sizeof v); }
static inline void narrow(V v, bfloat16* p) {  // to the nearest, ties to even
  U u = (U)v;
  u = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  H h = __builtin_convertvector(v == v ? u : U{} + 0x7fc0, H);
  std::memcpy(p, &h, sizeof h);
}
#ifdef __FLT16_MAX__
typedef _Float16 F16 __attribute__((vector_size(WIDTH / 2)));
static inline V widen(const _Float16* p) {
  F16 h;
  std::memcpy(&h, p, sizeof h);
  return __builtin_convertvector(h, V);
}
static inline void narrow(V v, _Float16* p) {
  F16 h = __builtin_convertvector(v, F16);
  std::memcpy(p, &h, sizeof h);
}
#endif

using TX = TYPE_OF_X;       // of x and its gradient
using TF = TYPE_OF_BRANCH;  // of F and its gradient
using TY = TYPE_OF_Y;       // of y and its gradient

// The last values of a row, fewer than a vector; the lanes beyond them are 0 and are not stored.
struct Tail {
  int64_t count;
  template <class T>
  V load(const T* p) const {
    T values[LANES] = {};
    std::memcpy(values, p, count * sizeof(T));
    return widen(values);
  }
  template <class T>
  void store(V v, T* p) const {
    T values[LANES];
    narrow(v, values);
    std::memcpy(p, values, count * sizeof(T));
  }
  V keep(V v) const {
    for (int64_t i = count; i < LANES; i++) v[i] = 0;
    return v;
  }
};
struct Whole {
  template <class T>
  V load(const T* p) const { return widen(p); }
  template <class T>
  void store(V v, T* p) const { narrow(v, p); }
  V keep(V v) const { return v; }
};

// Calls `body(i, part)` for the vectors of a row.
template <class Body>
static inline __attribute__((always_inline)) void over(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) body(i, Whole{});
  if (i < n) body(i, Tail{n - i});
}

static inline float total(V v) {
  Quarter quarters[LANES / 4];
  std::memcpy(quarters, &v, sizeof v);
  for (int64_t half = LANES / 8; half > 0; half /= 2)
    for (int64_t i = 0; i < half; i++) quarters[i] += quarters[i + half];
  const Quarter q = quarters[0];
  return (q[0] + q[1]) + (q[2] + q[3]);
}

struct Job {
  int64_t rows, n, stride, steps, affine_rows;  // `stride` between rows of gains, biases and of what passes share
  float eps, scale, over_n;
  bool closed, centred;
  uint64_t seed;
  float dropout;
};

// The tensors from some row on; `factors` is what dropout multiplies F with.
struct Rows {
  const TX* x;
  const TF* f;
  float* stats;
  TY* y;
  const TY* gradient;
  TX* dx;
  TF* df;
  const float* factors;
  Rows from(int64_t row, int64_t n, int64_t of_stats) const {
    const int64_t i = row * n;
    return {x + i, f + i, stats + row * of_stats, y + i, gradient + i, dx + i, df + i, factors};
  }
};

// Brings rows that come next into the cache, a little at each vector of a row of this pass, one of several.
template <bool WRITTEN>
struct Ahead {
  const char* at;
  int64_t bytes;
  template <class T>
  Ahead(const T* next, int64_t rows, int64_t n, int64_t pass, int64_t passes)
      : at((const char*)next + rows * n * sizeof(T) * pass / passes), bytes(rows * LANES * sizeof(T) / passes) {}
  void operator()() {
    for (int64_t j = 0; j < bytes; j += 64) __builtin_prefetch(at + j, WRITTEN);
    at += bytes;
  }
};

// Dropout: u(seed, i) of `skip_dropout.py`, two halves of a vector in 64-bit lanes.
static inline L times(L a, uint64_t m) {
#if defined(__AVX512F__)
  return (L)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(m));
#elif defined(__AVX2__)
  return (L)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(m));
#else
  return (a & 0xffffffff) * m;
#endif
}
static inline L philox(L position, uint64_t seed) {
  L c0 = position, c1 = position >> 32, c2 = {}, c3 = {};
  uint32_t k0 = seed, k1 = seed >> 32;
  for (int round = 0; round < 10; round++, k0 += 0x9E3779B9, k1 += 0xBB67AE85) {
    const L first = times(c0, 0xD2511F53), second = times(c2, 0xCD9E8D57);
    c0 = (second >> 32) ^ c1 ^ k0;
    c1 = second;
    c2 = (first >> 32) ^ c3 ^ k1;
    c3 = first;
  }
  return c0;
}
static void draw_factors(int64_t first, int64_t count, const Job& job, float* factors) {
  L even;
  for (int64_t i = 0; i < LANES / 2; i++) even[i] = first + 2 * i;
  for (int64_t i = 0; i < count; i += LANES, even += LANES) {
    const I word = (I)((philox(even, job.seed) & 0xffffffff) | (philox(even + 1, job.seed) << 32));
    const V uniform = __builtin_convertvector(word ^ (word >> 31), V) * 4.6566127342e-10f;
    narrow(uniform >= job.dropout ? V{} + 1 / (1 - job.dropout) : V{}, factors + i);
  }
}

// Sums of squares lose digits far from the mean; that of the first eighth of a row is near enough, whatever is there.
static inline int64_t sample_size(int64_t n) { return std::min(n, std::max(n / 8, int64_t(64))); }

struct Pair {
  V x, f;
};
// s x and F of row r at i, F after dropout.
template <bool DROP, class Part>
static inline Pair load(const Rows& at, const Job& job, int64_t r, int64_t i, Part part) {
  const int64_t j = r * job.n + i;
  const V f = part.load(at.f + j);
  return {job.scale * part.load(at.x + j), DROP ? f * part.load(at.factors + j) : f};
}

template <int R>
struct Shifts {
  float x[R] = {}, f[R] = {};
};
template <int R, bool DROP>
static inline Shifts<R> shifts_of(const Rows& at, const Job& job) {
  Shifts<R> shift;
  if (!job.centred) return shift;
  const int64_t few = sample_size(job.n);
  V x[R] = {}, f[R] = {};
  over(few, [&](int64_t i, auto part) {
    for (int r = 0; r < R; r++) {
      const Pair v = load<DROP>(at, job, r, i, part);
      x[r] += v.x;
      f[r] += v.f;
    }
  });
  for (int r = 0; r < R; r++) {
    shift.x[r] = total(x[r]) / few;
    shift.f[r] = total(f[r]) / few;
  }
  return shift;
}

// The chain, R rows at a time. Statistics of a row: the shifts of x and F, then for each step -mean / std and 1 / std
// of what is normalised, from which the shifts have been subtracted. `b` are biases, and `inner` those whose mean was
// subtracted, which the next step does not notice.
template <int R, bool DROP>
static void chain_forward(const Rows at, const float* w, const float* b, const float* inner, const Job job,
                          float* work) {
  const int64_t n = job.n, stride = job.stride, steps = job.steps, of_stats = 2 + 2 * steps;
  float *now = work, *xs = work + R * stride;
  const auto shift = shifts_of<R, DROP>(at, job);
  float centre[R], rstd[R];
  const auto finish = [&](int64_t k, const V* sum, const V* square) {
    for (int r = 0; r < R; r++) {
      const float mean = job.centred ? total(sum[r]) * job.over_n : 0;
      const float variance = total(square[r]) * job.over_n - mean * mean;
      rstd[r] = 1 / std::sqrt(std::max(variance, 0.0f) + job.eps);
      centre[r] = -mean * rstd[r];
      float* stats = at.stats + r * of_stats;
      if (k == 0) stats[0] = shift.x[r], stats[1] = shift.f[r];
      stats[2 + 2 * k] = centre[r];
      stats[3 + 2 * k] = rstd[r];
    }
  };
  {
    V sum[R] = {}, square[R] = {};
    over(n, [&](int64_t i, auto part) {
      for (int r = 0; r < R; r++) {
        const Pair v = load<DROP>(at, job, r, i, part);
        const V x = part.keep(v.x - shift.x[r]), d = x + part.keep(v.f - shift.f[r]);
        if (steps > 1) narrow(x, xs + r * stride + i);
        narrow(d, now + r * stride + i);
        sum[r] += d;
        square[r] += d * d;
      }
    });
    finish(0, sum, square);
  }
  for (int64_t k = 0;; k++) {
    const int64_t row = job.affine_rows > 1 ? k * stride : 0;
    Ahead<false> x(at.x + R * n, R, n, k, steps), f(at.f + R * n, R, n, k, steps);
    Ahead<true> y(at.y + R * n, R, n, k, steps);
    if (k == steps - 1) {
      over(n, [&](int64_t i, auto part) {
        x(), f(), y();
        const V gain = widen(w + row + i), bias = widen(b + row + i);
        for (int r = 0; r < R; r++)
          part.store((widen(now + r * stride + i) * rstd[r] + centre[r]) * gain + bias, at.y + r * n + i);
      });
      return;
    }
    V sum[R] = {}, square[R] = {};
    over(n, [&](int64_t i, auto) {
      x(), f(), y();
      const V gain = widen(w + row + i), bias = widen(inner + row + i);
      for (int r = 0; r < R; r++) {
        float* to = now + r * stride + i;
        const V d = widen(xs + r * stride + i) + ((widen(to) * rstd[r] + centre[r]) * gain + bias);
        narrow(d, to);
        sum[r] += d;
        square[r] += d * d;
      }
    });
    finish(k + 1, sum, square);
  }
}

// `acc_w` and `acc_b` gather the gradients of gains and biases; `work` holds, for each row, its K normalised rows, the
// gradient of y_k, and the sum of those that reached x.
template <int R, bool DROP>
static void chain_backward(const Rows at, const float* w, const float* inner, float* acc_w, float* acc_b,
                           const Job job, float* work) {
  const int64_t n = job.n, stride = job.stride, steps = job.steps, of_stats = 2 + 2 * steps;
  const auto row_of = [&](int64_t k) { return job.affine_rows > 1 ? k * stride : 0; };
  const auto centre = [&](int r, int64_t k) { return at.stats[r * of_stats + 2 + 2 * k]; };
  const auto rstd = [&](int r, int64_t k) { return at.stats[r * of_stats + 3 + 2 * k]; };
  float *grad = work + R * steps * stride, *grad_x = grad + R * stride;
  V of_mean[R] = {}, of_std[R] = {};
  // What the gradients `up` of the outputs of step k, which normalised to `h`, say of its gain, bias and inputs.
  const auto gather = [&](int64_t k, int64_t i, const V* up, const V* h) {
    float *to_w = acc_w + row_of(k) + i, *to_b = acc_b + row_of(k) + i;
    const V gain = widen(w + row_of(k) + i);
    V of_gain = widen(to_w), of_bias = widen(to_b);
    for (int r = 0; r < R; r++) {
      const V weighted = up[r] * gain;
      of_gain += up[r] * h[r];
      of_bias += up[r];
      of_mean[r] += weighted;
      of_std[r] += weighted * h[r];
    }
    narrow(of_gain, to_w);
    narrow(of_bias, to_b);
  };
  over(n, [&](int64_t i, auto part) {
    V x[R], h[R], up[R];
    for (int r = 0; r < R; r++) {
      const float* stats = at.stats + r * of_stats;
      const Pair v = load<DROP>(at, job, r, i, part);
      x[r] = part.keep(v.x - stats[0]);
      h[r] = (x[r] + part.keep(v.f - stats[1])) * rstd(r, 0) + centre(r, 0);
      narrow(h[r], work + r * stride + i);
    }
    for (int64_t k = 1; k < steps; k++) {
      const V gain = widen(w + row_of(k - 1) + i), bias = widen(inner + row_of(k - 1) + i);
      for (int r = 0; r < R; r++) {
        h[r] = (x[r] + (h[r] * gain + bias)) * rstd(r, k) + centre(r, k);
        narrow(h[r], work + (k * R + r) * stride + i);
      }
    }
    for (int r = 0; r < R; r++) up[r] = part.load(at.gradient + r * n + i);
    gather(steps - 1, i, up, h);
  });
  for (int64_t k = steps - 1;; k--) {
    float mean[R], std[R], scale[R];
    for (int r = 0; r < R; r++) {
      scale[r] = rstd(r, k);
      mean[r] = job.centred ? -total(of_mean[r]) * job.over_n * scale[r] : 0;
      std[r] = -total(of_std[r]) * job.over_n * scale[r];
      of_mean[r] = of_std[r] = V{};
    }
    const int64_t pass = steps - 1 - k;
    Ahead<false> next_x(at.x + R * n, R, n, pass, steps), next_f(at.f + R * n, R, n, pass, steps);
    Ahead<false> next_gradient(at.gradient + R * n, R, n, pass, steps);
    Ahead<true> next_dx(at.dx + R * n, R, n, pass, steps), next_df(at.df + R * n, R, n, pass, steps);
    const float* h = work + k * R * stride;
    const auto step = [&](auto top) {
      over(n, [&](int64_t i, auto part) {
        next_x(), next_f(), next_gradient(), next_dx(), next_df();
        const V gain = widen(w + row_of(k) + i);
        V up[R], before[R];
        for (int r = 0; r < R; r++) {
          const int64_t j = r * stride + i;
          const V given = top ? part.load(at.gradient + r * n + i) : widen(grad + j);
          up[r] = given * gain * scale[r] + (widen(h + j) * std[r] + mean[r]);
          const V sum = top ? up[r] : up[r] + widen(grad_x + j);
          if (k > 0) {
            narrow(up[r], grad + j);
            narrow(sum, grad_x + j);
            before[r] = widen(h - R * stride + j);
          } else {
            part.store(DROP ? up[r] * part.load(at.factors + r * n + i) : up[r], at.df + r * n + i);
            part.store(job.scale * sum, at.dx + r * n + i);
          }
        }
        if (k > 0) gather(k - 1, i, up, before);
      });
    };
    k == steps - 1 ? step(std::true_type{}) : step(std::false_type{});
    if (k == 0) return;
  }
}

// The closed form: y_k = a x + c u with the derivatives of a and c by (v_xx, v_uu, v_xu), for rows side by side.
constexpr int64_t BLOCK = 16;
struct Coefficients {
  double a[BLOCK], c[BLOCK], da[3][BLOCK], dc[3][BLOCK];
};
struct Stats {
  float mean_x, mean_u, xx, uu, xu;
};

static void closed_form(const Stats* stats, int64_t count, const Job& job, bool derivatives, Coefficients& o) {
  double xx[BLOCK] = {}, uu[BLOCK] = {}, xu[BLOCK] = {};
  o = Coefficients{};
  for (int64_t j = 0; j < count; j++) {
    xx[j] = stats[j].xx;
    uu[j] = stats[j].uu;
    xu[j] = stats[j].xu;
    o.c[j] = 1;
  }
  for (int64_t k = 0; k < job.steps; k++) {
#pragma omp simd
    for (int64_t j = 0; j < BLOCK; j++) {
      const double c = o.c[j], a = o.a[j] + (k ? 1 : 0);
      const double variance = a * a * xx[j] + c * c * uu[j] + 2 * a * c * xu[j];
      const double rstd = 1 / std::sqrt((variance > 0 ? variance : 0) + job.eps);
      if (derivatives) {
        const double by_a = 2 * (a * xx[j] + c * xu[j]), by_c = 2 * (c * uu[j] + a * xu[j]);
        const double direct[3] = {a * a, c * c, 2 * a * c}, factor = -0.5 * rstd * rstd * rstd;
        for (int p = 0; p < 3; p++) {
          const double drstd = factor * (direct[p] + by_a * o.da[p][j] + by_c * o.dc[p][j]);
          o.da[p][j] = o.da[p][j] * rstd + a * drstd;
          o.dc[p][j] = o.dc[p][j] * rstd + c * drstd;
        }
      }
      o.a[j] = a * rstd;
      o.c[j] = c * rstd;
    }
  }
}

template <int R, bool DROP>
static void closed_statistics(const Rows at, const Job& job, Stats* stats) {
  const auto shift = shifts_of<R, DROP>(at, job);
  V rest_x[R] = {}, rest_u[R] = {}, xx[R] = {}, uu[R] = {}, xu[R] = {};
  over(job.n, [&](int64_t i, auto part) {
    for (int r = 0; r < R; r++) {
      const Pair v = load<DROP>(at, job, r, i, part);
      const V p = part.keep(v.x - shift.x[r]), q = p + part.keep(v.f - shift.f[r]);
      rest_x[r] += p;
      rest_u[r] += q;
      xx[r] += p * p;
      uu[r] += q * q;
      xu[r] += p * q;
    }
  });
  for (int r = 0; r < R; r++) {
    float dx = total(rest_x[r]) * job.over_n, du = total(rest_u[r]) * job.over_n;
    if (!job.centred) dx = du = 0;
    const float shift_u = shift.x[r] + shift.f[r];
    const auto at_least = [](float variance, float mean) {  // what rounding leaves of a row that is constant
      const float rounding = mean * 0x1p-22f;
      return std::max(variance, rounding * rounding);
    };
    stats[r] = {shift.x[r] + dx, shift_u + du, at_least(total(xx[r]) * job.over_n - dx * dx, shift.x[r]),
                at_least(total(uu[r]) * job.over_n - du * du, shift_u), total(xu[r]) * job.over_n - dx * du};
  }
}

template <int R, bool DROP>
static void closed_output(const Rows at, const float* w, const float* b, const Job& job, const Stats* stats,
                          const double* a, const double* c, int64_t block) {
  Ahead<false> next_x(at.x + block * job.n, R, job.n, 0, 1), next_f(at.f + block * job.n, R, job.n, 0, 1);
  Ahead<true> next_y(at.y + block * job.n, R, job.n, 0, 1);
  over(job.n, [&](int64_t i, auto part) {
    next_x(), next_f(), next_y();
    for (int r = 0; r < R; r++) {
      const Pair v = load<DROP>(at, job, r, i, part);
      const V p = v.x - stats[r].mean_x, q = v.x + v.f - stats[r].mean_u;
      part.store((float(a[r]) * p + float(c[r]) * q) * widen(w + i) + widen(b + i), at.y + r * job.n + i);
    }
  });
}

template <int R, bool DROP>
static void closed_backward(const Rows at, const float* w, float* acc_w, float* acc_b, const Job& job,
                            const Stats* stats, const Coefficients& o, int64_t first, int64_t block) {
  const int64_t n = job.n;
  const double *a = o.a + first, *c = o.c + first;
  V sum[R] = {}, along_x[R] = {}, along_u[R] = {};
  over(n, [&](int64_t i, auto part) {
    const V gain = widen(w + i);
    V of_gain = widen(acc_w + i), of_bias = widen(acc_b + i);
    for (int r = 0; r < R; r++) {
      const Pair v = load<DROP>(at, job, r, i, part);
      const V up = part.load(at.gradient + r * n + i), g = up * gain;
      const V p = v.x - stats[r].mean_x, q = v.x + v.f - stats[r].mean_u;
      sum[r] += g;
      along_x[r] += g * p;
      along_u[r] += g * q;
      of_gain += up * (float(a[r]) * p + float(c[r]) * q);
      of_bias += up;
    }
    narrow(of_gain, acc_w + i);
    narrow(of_bias, acc_b + i);
  });
  float by[3][R], mean[R];
  for (int r = 0; r < R; r++) {
    const double by_x = total(along_x[r]) * job.over_n, by_u = total(along_u[r]) * job.over_n;
    mean[r] = job.centred ? total(sum[r]) * job.over_n : 0;
    for (int p = 0; p < 3; p++) by[p][r] = (p < 2 ? 2 : 1) * (by_x * o.da[p][first + r] + by_u * o.dc[p][first + r]);
  }
  Ahead<false> next_x(at.x + block * n, R, n, 0, 1), next_f(at.f + block * n, R, n, 0, 1);
  Ahead<false> next_gradient(at.gradient + block * n, R, n, 0, 1);
  Ahead<true> next_dx(at.dx + block * n, R, n, 0, 1), next_df(at.df + block * n, R, n, 0, 1);
  over(n, [&](int64_t i, auto part) {
    next_x(), next_f(), next_gradient(), next_dx(), next_df();
    const V gain = widen(w + i);
    for (int r = 0; r < R; r++) {
      const int64_t j = r * n + i;
      const Pair v = load<DROP>(at, job, r, i, part);
      const V g = part.load(at.gradient + j) * gain - mean[r];
      const V p = v.x - stats[r].mean_x, q = v.x + v.f - stats[r].mean_u;
      const V du = float(c[r]) * g + by[1][r] * q + by[2][r] * p;
      part.store(DROP ? du * part.load(at.factors + j) : du, at.df + j);
      part.store(job.scale * (float(a[r]) * g + by[0][r] * p + by[2][r] * q + du), at.dx + j);
    }
  });
}

// Rows of floats at the start of a line of the cache.
struct Buffer {
  std::vector<float> memory;
  float* data;
  explicit Buffer(int64_t count) : memory(count + 16) {
    data = (float*)(((uintptr_t)memory.data() + 63) / 64 * 64);
  }
  Buffer(const Buffer&) = delete;
};

// Rows of gains or biases with zeros up to whole vectors, less the mean of each where that is asked for.
static void pad(const float* rows, const Job& job, bool centred, float* result) {
  for (int64_t k = 0; k < job.affine_rows; k++) {
    double mean = 0;
    for (int64_t i = 0; centred && i < job.n; i++) mean += rows[k * job.n + i];
    mean /= job.n;
    for (int64_t i = 0; i < job.n; i++) result[k * job.stride + i] = rows[k * job.n + i] - mean;
  }
}

struct Affine {
  Buffer w, b, inner;
  Affine(const float* weight, const float* bias, const Job& job)
      : w(job.affine_rows * job.stride), b(job.affine_rows * job.stride), inner(job.affine_rows * job.stride) {
    pad(weight, job, false, w.data);
    pad(bias, job, false, b.data);
    pad(bias, job, job.centred, inner.data);
  }
};


static Job make_job(const int64_t* sizes, const double* numbers, int64_t seed) {
  const int64_t n = sizes[1];
  // Rows at multiples of 4096 bytes would take turns in one set of the cache.
  const int64_t stride = (n + LANES - 1) / LANES * LANES + 80;
  return {sizes[0], n, stride, sizes[2], sizes[3], float(numbers[0]), float(numbers[1]), 1.0f / n,
          sizes[4] != 0, sizes[5] != 0, uint64_t(seed), float(numbers[2])};
}

// Blocks of rows that stay in the cache.
static int64_t rows_a_block(const Job& job) {
  return std::max(int64_t(1), std::min(BLOCK, 65536 / job.n / 4 * 4));
}

// Calls `body(first, rows at a time)` for the rows of a block, R and then one at a time.
template <int R, class Body>
static inline void groups(int64_t count, int64_t n, Body body) {
  int64_t row = 0;
  if (n <= 4096)
    for (; row + R <= count; row += R) body(row, std::integral_constant<int, R>{});
  for (; row < count; row++) body(row, std::integral_constant<int, 1>{});
}

template <bool DROP>
static void forward(const Rows tensors, const Affine& affine, const Job job, int threads) {
  const int64_t n = job.n, size = rows_a_block(job), blocks = (job.rows + size - 1) / size;
  const int64_t of_stats = job.closed ? 5 : 2 + 2 * job.steps;
#pragma omp parallel num_threads(threads)
  {
    Buffer work(job.closed ? 0 : 2 * GROUP * job.stride), factors(DROP ? size * n + LANES : 0);
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; block++) {
      const int64_t first = block * size, count = std::min(size, job.rows - first);
      if (DROP) draw_factors(first * n, count * n, job, factors.data);
      const Rows at = tensors.from(first, n, of_stats);
      const auto of = [&](int64_t row) {
        Rows rows = at.from(row, n, of_stats);
        rows.factors = factors.data + row * n;
        return rows;
      };
      if (job.closed) {
        Stats stats[BLOCK];
        groups<2>(count, n, [&](int64_t row, auto r) { closed_statistics<r, DROP>(of(row), job, stats + row); });
        std::memcpy(at.stats, stats, count * sizeof(Stats));
        Coefficients o;
        closed_form(stats, count, job, false, o);
        groups<2>(count, n, [&](int64_t row, auto r) {
          closed_output<r, DROP>(of(row), affine.w.data, affine.b.data, job, stats + row, o.a + row, o.c + row, size);
        });
      } else {
        groups<GROUP>(count, n, [&](int64_t row, auto r) {
          chain_forward<r, DROP>(of(row), affine.w.data, affine.b.data, affine.inner.data, job, work.data);
        });
      }
    }
  }
}

template <bool DROP>
static void backward(const Rows tensors, const Affine& affine, double* partial, int64_t chunks, const Job job,
                     int threads) {
  const int64_t n = job.n, size = rows_a_block(job), blocks = (job.rows + size - 1) / size;
  const int64_t of_stats = job.closed ? 5 : 2 + 2 * job.steps, gains = job.affine_rows * job.stride;
#pragma omp parallel num_threads(threads)
  {
    Buffer acc_w(gains), acc_b(gains), work(job.closed ? 0 : (job.steps + 2) * GROUP * job.stride);
    Buffer factors(DROP ? size * n + LANES : 0);
    const auto flush = [&](float* acc, double* sums) {
      for (int64_t k = 0; k < job.affine_rows; k++)
        for (int64_t i = 0; i < n; i++) sums[k * n + i] += acc[k * job.stride + i];
      std::fill(acc, acc + gains, 0.0f);
    };
#pragma omp for schedule(dynamic)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
      double* sums = partial + chunk * 2 * job.affine_rows * n;
      std::fill(sums, sums + 2 * job.affine_rows * n, 0.0);
      const int64_t last = (chunk + 1) * blocks / chunks;
      for (int64_t block = chunk * blocks / chunks, added = 0; block < last; block++) {
        const int64_t first = block * size, count = std::min(size, job.rows - first);
        if (DROP) draw_factors(first * n, count * n, job, factors.data);
        const Rows at = tensors.from(first, n, of_stats);
        const auto of = [&](int64_t row) {
          Rows rows = at.from(row, n, of_stats);
          rows.factors = factors.data + row * n;
          return rows;
        };
        if (job.closed) {
          Stats stats[BLOCK];
          std::memcpy(stats, at.stats, count * sizeof(Stats));
          Coefficients o;
          closed_form(stats, count, job, true, o);
          groups<2>(count, n, [&](int64_t row, auto r) {
            closed_backward<r, DROP>(of(row), affine.w.data, acc_w.data, acc_b.data, job, stats + row, o, row, size);
          });
        } else {
          groups<GROUP>(count, n, [&](int64_t row, auto r) {
            chain_backward<r, DROP>(of(row), affine.w.data, affine.inner.data, acc_w.data, acc_b.data, job, work.data);
          });
        }
        added += count;
        if (added >= 128 || block == last - 1) {  // few enough to add in single precision
          flush(acc_w.data, sums);
          flush(acc_b.data, sums + job.affine_rows * n);
          added = 0;
        }
      }
    }
  }
}

// `sizes` are rows, n, K, affine rows, closed, centred, chunks of the backward pass; `numbers` eps, scale, dropout.
extern "C" void rskip_forward(const TX* x, const TF* f, const float* weight, const float* bias, TY* y, float* stats,
                              const int64_t* sizes, const double* numbers, int64_t seed, int threads) {
  const Job job = make_job(sizes, numbers, seed);
  const Affine affine(weight, bias, job);
  const Rows rows{x, f, stats, y, nullptr, nullptr, nullptr, nullptr};
  job.dropout > 0 ? forward<true>(rows, affine, job, threads) : forward<false>(rows, affine, job, threads);
}

// `partial` is (chunks, 2, affine rows, n): sums over consecutive rows, which do not depend on the number of threads.
extern "C" void rskip_backward(const TY* gradient, const TX* x, const TF* f, const float* weight, const float* bias,
                               float* stats, TX* dx, TF* df, double* partial, const int64_t* sizes,
                               const double* numbers, int64_t seed, int threads) {
  const Job job = make_job(sizes, numbers, seed);
  const Affine affine(weight, bias, job);
  const Rows rows{x, f, stats, nullptr, gradient, dx, df, nullptr};
  job.dropout > 0 ? backward<true>(rows, affine, partial, sizes[6], job, threads)
                  : backward<false>(rows, affine, partial, sizes[6], job, threads);
}
"""


@functools.cache
def load(types: tuple[torch.dtype, torch.dtype, torch.dtype]):
    """The compiled functions for x, F and y of these precisions, or `None`, with one line of log, where there is no
    compiler for them."""
    names = zip(("TYPE_OF_X", "TYPE_OF_BRANCH", "TYPE_OF_Y"), types, strict=True)
    command = [*_compiler(), *FLAGS.split(), *(f"-D{name}={_NAMES[dtype]}" for name, dtype in names)]
    key = hashlib.sha256("\0".join([SOURCE, *command, _processor()]).encode()).hexdigest()[:16]
    try:
        folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()) / "hf_rskip"
        library = folder / f"skip_kernels-{key}.so"
        if not library.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as build:
                built = Path(build) / library.name
                command += ["-x", "c++", "-", "-o", str(built)]
                subprocess.run(command, input=SOURCE, check=True, capture_output=True, text=True, timeout=120)
                built.replace(library)
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().partition("\n")[0]
        logger.warning(
            f"Skip connections run unfused on this CPU: {command[0]} cannot build their operator ({reason})."
        )
        return None


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or [next(filter(shutil.which, ("c++", "g++", "clang++")), "c++")]


def _processor() -> str:
    """What `-march=native` means here: a folder may be shared between machines."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.findall(r"^(?:flags|Features|model name)\s*:.*", cpuinfo.read_text(), re.M) if cpuinfo.exists() else []
    return "\n".join([platform.machine(), platform.processor(), *sorted(set(found))])


_NAMESPACE = re.sub(r"\W", "_", __name__)  # a copy of this file that came with a checkpoint has operators of its own


def _arguments(tensors, sizes, numbers, seed):
    return (
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors),
        (ctypes.c_int64 * len(sizes))(*sizes),
        (ctypes.c_double * len(numbers))(*numbers),
        ctypes.c_int64(0 if seed is None else seed.item()),
        torch.get_num_threads(),
    )


@torch.library.custom_op(f"{_NAMESPACE}::rskip_layer_norm", mutates_args=(), device_types="cpu")
def rskip_layer_norm(
    x: torch.Tensor,
    branch: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    seed: torch.Tensor | None,
    recursions: int,
    closed: bool,
    centred: bool,
    eps: float,
    scale: float,
    dropout: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    y = torch.empty_like(x, dtype=dtype)
    stats = x.new_empty(len(x), _stats_of_row(recursions, closed), dtype=torch.float32)
    tensors = (x, branch, weight.float(), bias.float(), y, stats)
    sizes = (*x.shape, recursions, len(weight), closed, centred)
    library = load((x.dtype, branch.dtype, dtype))
    library.rskip_forward(*_arguments(tensors, sizes, (eps, scale, dropout), seed))
    return y, stats


@rskip_layer_norm.register_fake
def _(x, branch, weight, bias, seed, recursions, closed, centred, eps, scale, dropout, dtype):
    stats = x.new_empty(x.shape[0], _stats_of_row(recursions, closed), dtype=torch.float32)
    return torch.empty_like(x, dtype=dtype), stats


def _stats_of_row(recursions, closed):
    return 5 if closed else 2 + 2 * recursions


@torch.library.custom_op(f"{_NAMESPACE}::rskip_layer_norm_backward", mutates_args=(), device_types="cpu")
def rskip_layer_norm_backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    branch: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    stats: torch.Tensor,
    seed: torch.Tensor | None,
    recursions: int,
    closed: bool,
    centred: bool,
    eps: float,
    scale: float,
    dropout: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    gradient = gradient.contiguous()
    grad_x, grad_branch = torch.empty_like(x), torch.empty_like(branch)
    rows, size = x.shape
    chunks = min(64, -(-rows // (64 if size <= 8192 else 16)))
    partial = torch.empty(chunks, 2, *weight.shape, dtype=torch.float64)
    tensors = (gradient, x, branch, weight.float(), bias.float(), stats, grad_x, grad_branch, partial)
    sizes = (rows, size, recursions, len(weight), closed, centred, chunks)
    library = load((x.dtype, branch.dtype, gradient.dtype))
    library.rskip_backward(*_arguments(tensors, sizes, (eps, scale, dropout), seed))
    grad_weight, grad_bias = partial.sum(0)
    return grad_x, grad_branch, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


@rskip_layer_norm_backward.register_fake
def _(gradient, x, branch, weight, bias, stats, seed, recursions, closed, centred, eps, scale, dropout):
    return tuple(map(torch.empty_like, (x, branch, weight, bias)))


register_recomputation(rskip_layer_norm, rskip_layer_norm_backward)
