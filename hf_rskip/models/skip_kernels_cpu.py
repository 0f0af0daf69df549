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
#include <type_traits>
#include <vector>

#if defined(__AVX512F__)
#define WIDTH 64
#elif defined(__AVX__)
#define WIDTH 32
#else
#define WIDTH 16
#endif
typedef float V __attribute__((vector_size(WIDTH)));
typedef uint32_t U __attribute__((vector_size(WIDTH)));
typedef uint16_t H __attribute__((vector_size(WIDTH / 2)));
constexpr int64_t LANES = WIDTH / 4;

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

// Calls `body(i, part, lane)` for the vectors of a row; `lane` counts to UNROLL, for sums that do not wait for another.
constexpr int UNROLL = 2;
template <class Body>
static inline __attribute__((always_inline)) void over(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + UNROLL * LANES <= n; i += UNROLL * LANES) {
    body(i, Whole{}, 0);
    body(i + LANES, Whole{}, 1);
  }
  for (; i + LANES <= n; i += LANES) body(i, Whole{}, 0);
  if (i < n) body(i, Tail{n - i}, 0);
}

struct Sum {
  V lanes[UNROLL] = {};
  V& operator[](int lane) { return lanes[lane]; }
  float total() const {
    V v = lanes[0] + lanes[1];
    float values[LANES];
    std::memcpy(values, &v, sizeof v);
    for (int64_t half = LANES / 2; half > 0; half /= 2)
      for (int64_t i = 0; i < half; i++) values[i] += values[i + half];
    return values[0];
  }
};

struct Job {
  int64_t rows, n, stride, steps, affine_rows;  // `stride` between rows of gains, biases and of what passes share
  float eps, scale, over_n;
};

// Sums of squares lose digits far from the mean; that of the first eighth of a row is near enough, whatever is there.
static inline int64_t sample_size(int64_t n) { return std::min(n, std::max(n / 8, int64_t(64))); }

// Mean and 1 / std of `value(i, part)`, which `keep(i, v)` gets to see.
template <class Value, class Keep>
static inline __attribute__((always_inline)) void moments(const Job job, Value value, Keep keep, float* stats) {
  const int64_t few = sample_size(job.n);
  Sum sample, rest, square;
  over(few, [&](int64_t i, auto part, int lane) { sample[lane] += value(i, part); });
  const float shift = sample.total() / few;
  over(job.n, [&](int64_t i, auto part, int lane) {
    const V v = value(i, part), d = part.keep(v - shift);
    keep(i, v);
    rest[lane] += d;
    square[lane] += d * d;
  });
  const float mean = rest.total() * job.over_n, variance = square.total() * job.over_n - mean * mean;
  stats[0] = shift + mean;
  stats[1] = 1 / std::sqrt(std::max(variance, 0.0f) + job.eps);
}

static void chain_forward(const TX* x, const TF* f, const float* w,
                          const float* b, TY* y, float* stats, const Job job,
                          float* work) {
  float *now = work, *next = work + job.stride;
  moments(
      job, [&](int64_t i, auto part) { return job.scale * part.load(x + i) + part.load(f + i); },
      [&](int64_t i, V v) { narrow(v, now + i); }, stats);
  for (int64_t k = 0;; k++, stats += 2) {
    const int64_t row = job.affine_rows > 1 ? k * job.stride : 0;
    const float *gain = w + row, *shift = b + row, mean = stats[0], rstd = stats[1];
    const auto normalized = [&](int64_t i) {
      return (widen(now + i) - mean) * rstd * widen(gain + i) + widen(shift + i);
    };
    if (k == job.steps - 1) {
      over(job.n, [&](int64_t i, auto part, int) { part.store(normalized(i), y + i); });
      return;
    }
    moments(
        job, [&](int64_t i, auto part) { return job.scale * part.load(x + i) + normalized(i); },
        [&](int64_t i, V v) { narrow(v, next + i); }, stats + 2);
    std::swap(now, next);
  }
}

// `acc_w` and `acc_b` gather the gradients of gains and biases; `work` holds K normalised rows, the gradient of y_k,
// and the sum of those that reached x.
static void chain_backward(const TY* gradient, const TX* x, const TF* f, const float* w, const float* b,
                           const float* stats, TX* dx, TF* df, float* acc_w, float* acc_b, const Job job,
                           float* work) {
  const int64_t n = job.n, stride = job.stride, steps = job.steps;
  const auto row_of = [&](int64_t k) { return job.affine_rows > 1 ? k * stride : 0; };
  const auto centred = [&](V v, int64_t k) { return (v - stats[2 * k]) * stats[2 * k + 1]; };
  float *grad = work + steps * stride, *grad_x = grad + stride;
  Sum of_mean, of_std;
  // What the gradient `up` of the output of step k, which normalised to `h`, says of its gain, bias and input.
  const auto gather = [&](int64_t k, int64_t i, V up, V h, int lane) {
    float *to_w = acc_w + row_of(k) + i, *to_b = acc_b + row_of(k) + i;
    const V weighted = up * widen(w + row_of(k) + i);
    narrow(widen(to_w) + up * h, to_w);
    narrow(widen(to_b) + up, to_b);
    of_mean[lane] += weighted;
    of_std[lane] += weighted * h;
  };
  const auto given = [&](int64_t i, auto part) { return part.load(gradient + i); };
  const auto later = [&](int64_t i, auto) { return widen(grad + i); };
  over(n, [&](int64_t i, auto part, int lane) {
    const V scaled = job.scale * part.load(x + i);
    V h = centred(scaled + part.load(f + i), 0);
    narrow(h, work + i);
    for (int64_t k = 1; k < steps; k++) {
      h = centred(scaled + (h * widen(w + row_of(k - 1) + i) + widen(b + row_of(k - 1) + i)), k);
      narrow(h, work + k * stride + i);
    }
    gather(steps - 1, i, given(i, part), h, lane);
  });
  for (int64_t k = steps - 1;; k--) {
    const float mean = of_mean.total() * job.over_n, std = of_std.total() * job.over_n, rstd = stats[2 * k + 1];
    const float *gain = w + row_of(k), *h = work + k * stride;
    const auto through = [&](int64_t i, V up) { return rstd * (up * widen(gain + i) - mean - widen(h + i) * std); };
    of_mean = of_std = Sum{};
    const bool top = k == steps - 1;
    if (k == 0) {
      const auto write = [&](auto before) {
        over(n, [&](int64_t i, auto part, int) {
          const V up = through(i, before(i, part));
          part.store(up, df + i);
          part.store(job.scale * (top ? up : up + widen(grad_x + i)), dx + i);
        });
      };
      top ? write(given) : write(later);
      return;
    }
    const auto step = [&](auto before) {
      over(n, [&](int64_t i, auto part, int lane) {
        const V up = through(i, before(i, part));
        narrow(up, grad + i);
        narrow(top ? up : up + widen(grad_x + i), grad_x + i);
        gather(k - 1, i, up, widen(h - stride + i), lane);
      });
    };
    top ? step(given) : step(later);
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

static void closed_form(const Stats* stats, int64_t count, const Job job, bool derivatives, Coefficients& o) {
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

static void closed_forward(const TX* x, const TF* f, const float* w, const float* b, TY* y, float* saved,
                           int64_t count, const Job job) {
  const int64_t n = job.n, few = sample_size(n);
  Stats stats[BLOCK];
  for (int64_t j = 0; j < count; j++) {
    const TX* xj = x + j * n;
    const TF* fj = f + j * n;
    Sum sum_x, sum_u, rest_x, rest_u, xx, uu, xu;
    over(few, [&](int64_t i, auto part, int lane) {
      const V scaled = job.scale * part.load(xj + i);
      sum_x[lane] += scaled;
      sum_u[lane] += scaled + part.load(fj + i);
    });
    const float shift_x = sum_x.total() / few, shift_u = sum_u.total() / few;
    over(n, [&](int64_t i, auto part, int lane) {
      const V scaled = job.scale * part.load(xj + i), p = part.keep(scaled - shift_x);
      const V q = part.keep(scaled + part.load(fj + i) - shift_u);
      rest_x[lane] += p;
      rest_u[lane] += q;
      xx[lane] += p * p;
      uu[lane] += q * q;
      xu[lane] += p * q;
    });
    const float dx = rest_x.total() * job.over_n, du = rest_u.total() * job.over_n;
    const auto at_least = [](float variance, float mean) {  // what rounding leaves of a row that is constant
      const float rounding = mean * 0x1p-22f;
      return std::max(variance, rounding * rounding);
    };
    stats[j] = {shift_x + dx, shift_u + du, at_least(xx.total() * job.over_n - dx * dx, shift_x),
                at_least(uu.total() * job.over_n - du * du, shift_u), xu.total() * job.over_n - dx * du};
  }
  std::memcpy(saved, stats, count * sizeof(Stats));
  Coefficients o;
  closed_form(stats, count, job, false, o);
  for (int64_t j = 0; j < count; j++) {
    const float a = o.a[j], c = o.c[j], mean_x = stats[j].mean_x, mean_u = stats[j].mean_u;
    const TX* xj = x + j * n;
    const TF* fj = f + j * n;
    over(n, [&](int64_t i, auto part, int) {
      const V scaled = job.scale * part.load(xj + i), u = scaled + part.load(fj + i);
      part.store((a * (scaled - mean_x) + c * (u - mean_u)) * widen(w + i) + widen(b + i), y + j * n + i);
    });
  }
}

static void closed_backward(const TY* gradient, const TX* x, const TF* f, const float* w, const float* saved, TX* dx,
                            TF* df, float* acc_w, float* acc_b, int64_t count, const Job job) {
  const int64_t n = job.n;
  Stats stats[BLOCK];
  std::memcpy(stats, saved, count * sizeof(Stats));
  Coefficients o;
  closed_form(stats, count, job, true, o);
  for (int64_t j = 0; j < count; j++) {
    const float a = o.a[j], c = o.c[j], mean_x = stats[j].mean_x, mean_u = stats[j].mean_u;
    const TY* gj = gradient + j * n;
    const TX* xj = x + j * n;
    const TF* fj = f + j * n;
    Sum sum, along_x, along_u;
    over(n, [&](int64_t i, auto part, int lane) {
      const V up = part.load(gj + i), g = up * widen(w + i), scaled = job.scale * part.load(xj + i);
      const V p = scaled - mean_x, q = scaled + part.load(fj + i) - mean_u;
      sum[lane] += g;
      along_x[lane] += g * p;
      along_u[lane] += g * q;
      narrow(widen(acc_w + i) + up * (a * p + c * q), acc_w + i);
      narrow(widen(acc_b + i) + up, acc_b + i);
    });
    const double by_x = along_x.total() * job.over_n, by_u = along_u.total() * job.over_n;
    float by[3], mean = sum.total() * job.over_n;
    for (int p = 0; p < 3; p++) by[p] = (p < 2 ? 2 : 1) * (by_x * o.da[p][j] + by_u * o.dc[p][j]);
    over(n, [&](int64_t i, auto part, int) {
      const V g = part.load(gj + i) * widen(w + i) - mean, scaled = job.scale * part.load(xj + i);
      const V p = scaled - mean_x, q = scaled + part.load(fj + i) - mean_u;
      const V du = c * g + by[1] * q + by[2] * p;
      part.store(du, df + j * n + i);
      part.store(job.scale * (a * g + by[0] * p + by[2] * q + du), dx + j * n + i);
    });
  }
}

// Rows of gains or biases with zeros up to whole vectors.
static std::vector<float> padded(const float* rows, const Job job) {
  std::vector<float> result(job.affine_rows * job.stride);
  for (int64_t k = 0; k < job.affine_rows; k++)
    std::copy(rows + k * job.n, rows + (k + 1) * job.n, result.begin() + k * job.stride);
  return result;
}

static Job make_job(int64_t rows, int64_t n, int64_t steps, int64_t affine_rows, float eps, float scale) {
  // Rows at multiples of 4096 bytes would take turns in one set of the cache.
  const int64_t stride = (n + LANES - 1) / LANES * LANES + 80;
  return {rows, n, stride, steps, affine_rows, eps, scale, 1.0f / n};
}

extern "C" void rskip_forward(const TX* x, const TF* f, const float* weight, const float* bias, TY* y, float* stats,
                              int64_t rows, int64_t n, int64_t steps, int64_t affine_rows, int64_t closed, float eps,
                              float scale, int threads) {
  const Job job = make_job(rows, n, steps, affine_rows, eps, scale);
  const auto w = padded(weight, job), b = padded(bias, job);
  const int64_t blocks = (rows + BLOCK - 1) / BLOCK;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> work(2 * job.stride);
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; block++) {
      const int64_t first = block * BLOCK, end = std::min(first + BLOCK, rows);
      if (closed)
        closed_forward(x + first * n, f + first * n, w.data(), b.data(), y + first * n, stats + first * 5,
                       end - first, job);
      else
        for (int64_t row = first; row < end; row++)
          chain_forward(x + row * n, f + row * n, w.data(), b.data(), y + row * n, stats + row * 2 * steps, job,
                        work.data());
    }
  }
}

// `partial` is (chunks, 2, affine_rows, n): sums over consecutive rows, which do not depend on the number of threads.
extern "C" void rskip_backward(const TY* gradient, const TX* x, const TF* f, const float* weight, const float* bias,
                               const float* stats, TX* dx, TF* df, double* partial, int64_t chunks, int64_t rows,
                               int64_t n, int64_t steps, int64_t affine_rows, int64_t closed, float eps, float scale,
                               int threads) {
  const Job job = make_job(rows, n, steps, affine_rows, eps, scale);
  const auto w = padded(weight, job), b = padded(bias, job);
  const int64_t blocks = (rows + BLOCK - 1) / BLOCK;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> acc_w(w.size()), acc_b(b.size()), work((steps + 2) * job.stride);
    const auto flush = [&](std::vector<float>& acc, double* sums) {
      for (int64_t k = 0; k < affine_rows; k++)
        for (int64_t i = 0; i < n; i++) sums[k * n + i] += acc[k * job.stride + i];
      std::fill(acc.begin(), acc.end(), 0.0f);
    };
#pragma omp for schedule(dynamic)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
      double* sums = partial + chunk * 2 * affine_rows * n;
      std::fill(sums, sums + 2 * affine_rows * n, 0.0);
      const int64_t last = (chunk + 1) * blocks / chunks;
      for (int64_t block = chunk * blocks / chunks, added = 0; block < last; block++) {
        const int64_t first = block * BLOCK, end = std::min(first + BLOCK, rows);
        if (closed)
          closed_backward(gradient + first * n, x + first * n, f + first * n, w.data(), stats + first * 5,
                          dx + first * n, df + first * n, acc_w.data(), acc_b.data(), end - first, job);
        else
          for (int64_t row = first; row < end; row++)
            chain_backward(gradient + row * n, x + row * n, f + row * n, w.data(), b.data(), stats + row * 2 * steps,
                           dx + row * n, df + row * n, acc_w.data(), acc_b.data(), job, work.data());
        if (++added % 8 == 0 || block == last - 1) {  // few enough to add in single precision
          flush(acc_w, sums);
          flush(acc_b, sums + affine_rows * n);
        }
      }
    }
  }
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


def _arguments(*values):
    return [ctypes.c_void_p(value.data_ptr()) if isinstance(value, torch.Tensor) else value for value in values]


def _sizes(x, weight, recursions, closed, eps, scale):
    sizes = map(ctypes.c_int64, (*x.shape, recursions, len(weight), closed))
    return *sizes, ctypes.c_float(eps), ctypes.c_float(scale), ctypes.c_int(torch.get_num_threads())


@torch.library.custom_op(f"{_NAMESPACE}::rskip_layer_norm", mutates_args=(), device_types="cpu")
def rskip_layer_norm(
    x: torch.Tensor,
    branch: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    recursions: int,
    closed: bool,
    eps: float,
    scale: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    y = torch.empty_like(x, dtype=dtype)
    stats = x.new_empty(len(x), 5 if closed else 2 * recursions, dtype=torch.float32)
    weight, bias = weight.float(), bias.float()
    library = load((x.dtype, branch.dtype, dtype))
    sizes = _sizes(x, weight, recursions, closed, eps, scale)
    library.rskip_forward(*_arguments(x, branch, weight, bias, y, stats), *sizes)
    return y, stats


@rskip_layer_norm.register_fake
def _(x, branch, weight, bias, recursions, closed, eps, scale, dtype):
    stats = x.new_empty(x.shape[0], 5 if closed else 2 * recursions, dtype=torch.float32)
    return torch.empty_like(x, dtype=dtype), stats


@torch.library.custom_op(f"{_NAMESPACE}::rskip_layer_norm_backward", mutates_args=(), device_types="cpu")
def rskip_layer_norm_backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    branch: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    stats: torch.Tensor,
    recursions: int,
    closed: bool,
    eps: float,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    gradient = gradient.contiguous()
    grad_x, grad_branch = torch.empty_like(x), torch.empty_like(branch)
    wide_weight, wide_bias = weight.float(), bias.float()
    chunks = min(64, -(-len(x) // 64))
    partial = torch.empty(chunks, 2, *weight.shape, dtype=torch.float64)
    tensors = (gradient, x, branch, wide_weight, wide_bias, stats, grad_x, grad_branch, partial)
    library = load((x.dtype, branch.dtype, gradient.dtype))
    sizes = _sizes(x, weight, recursions, closed, eps, scale)
    library.rskip_backward(*_arguments(*tensors), ctypes.c_int64(chunks), *sizes)
    grad_weight, grad_bias = partial.sum(0)
    return grad_x, grad_branch, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


@rskip_layer_norm_backward.register_fake
def _(gradient, x, branch, weight, bias, stats, recursions, closed, eps, scale):
    return tuple(map(torch.empty_like, (x, branch, weight, bias)))


register_recomputation(rskip_layer_norm, rskip_layer_norm_backward)
