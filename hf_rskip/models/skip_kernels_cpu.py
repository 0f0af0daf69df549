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

FLAGS = "-std=c++17 -O3 -march=native -fno-math-errno -fno-trapping-math -fopenmp -shared -fPIC"
_NAMES = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.float16: "_Float16"}

SOURCE = r"""
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

struct bfloat16 {
  uint16_t bits;
  operator float() const {
    uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
  bfloat16() = default;
  explicit bfloat16(float value) {  // to the nearest, ties to even
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    uint32_t rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
    bits = uint16_t(value != value ? 0x7fc0 : rounded);
  }
};

using TX = TYPE_OF_X;       // of x and its gradient
using TF = TYPE_OF_BRANCH;  // of F and its gradient
using TY = TYPE_OF_Y;       // of y and its gradient

constexpr int64_t BLOCK = 16;  // rows whose numbers are updated side by side in the closed form

struct Job {
  int64_t rows, n, steps, affine_rows;
  float eps, scale;
};

// u = s x + F centred and s x, with their means; returns the variance of u.
static inline float begin_row(const TX* x, const TF* f, const Job& job, float* xs, float* v, float& mean) {
  const int64_t n = job.n;
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) {
    float scaled = job.scale * float(x[i]);
    xs[i] = scaled;
    v[i] = scaled + float(f[i]);
    sum += v[i];
  }
  mean = sum / n;
  float square = 0;
#pragma omp simd reduction(+ : square)
  for (int64_t i = 0; i < n; i++) {
    v[i] -= mean;
    square += v[i] * v[i];
  }
  return square / n;
}

static void chain_forward_row(const TX* x, const TF* f, const float* w, const float* b, TY* y, float* stats,
                              const Job& job, float* xs, float* v) {
  const int64_t n = job.n;
  float mean, variance = begin_row(x, f, job, xs, v, mean);
  for (int64_t k = 0;; k++) {
    const float rstd = 1 / std::sqrt(variance + job.eps);
    const float* gain = w + (job.affine_rows > 1 ? k * n : 0);
    const float* shift = b + (job.affine_rows > 1 ? k * n : 0);
    stats[2 * k] = mean;
    stats[2 * k + 1] = rstd;
    if (k == job.steps - 1) {
#pragma omp simd
      for (int64_t i = 0; i < n; i++) y[i] = TY(v[i] * rstd * gain[i] + shift[i]);
      return;
    }
    float sum = 0, square = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) {
      v[i] = xs[i] + (v[i] * rstd * gain[i] + shift[i]);
      sum += v[i];
    }
    mean = sum / n;
#pragma omp simd reduction(+ : square)
    for (int64_t i = 0; i < n; i++) {
      v[i] -= mean;
      square += v[i] * v[i];
    }
    variance = square / n;
  }
}

// `normalized` holds the K normalised rows, `acc_w` and `acc_b` gather the gradients of gains and biases.
static void chain_backward_row(const TY* gradient, const TX* x, const TF* f, const float* w, const float* b,
                               const float* stats, TX* dx, TF* df, float* acc_w, float* acc_b, const Job& job,
                               float* xs, float* g, float* sum_x, float* normalized) {
  const int64_t n = job.n;
  const auto row_of = [&](int64_t k) { return job.affine_rows > 1 ? k * n : 0; };
  for (int64_t k = 0; k < job.steps; k++) {
    const float mean = stats[2 * k], rstd = stats[2 * k + 1];
    float* h = normalized + k * n;
    if (k == 0) {
#pragma omp simd
      for (int64_t i = 0; i < n; i++) {
        xs[i] = job.scale * float(x[i]);
        h[i] = (xs[i] + float(f[i]) - mean) * rstd;
      }
    } else {
      const float *before = h - n, *gain = w + row_of(k - 1), *shift = b + row_of(k - 1);
#pragma omp simd
      for (int64_t i = 0; i < n; i++) h[i] = (xs[i] + (before[i] * gain[i] + shift[i]) - mean) * rstd;
    }
  }
  int64_t k = job.steps - 1;
  float of_mean = 0, of_std = 0;
  {
    const float *h = normalized + k * n, *gain = w + row_of(k);
    float *to_w = acc_w + row_of(k), *to_b = acc_b + row_of(k);
#pragma omp simd reduction(+ : of_mean, of_std)
    for (int64_t i = 0; i < n; i++) {
      const float up = float(gradient[i]);
      to_w[i] += up * h[i];
      to_b[i] += up;
      g[i] = up * gain[i];
      sum_x[i] = 0;
      of_mean += g[i];
      of_std += g[i] * h[i];
    }
  }
  for (; k > 0; k--) {
    const float rstd = stats[2 * k + 1], m = of_mean / n, s = of_std / n;
    const float *h = normalized + k * n, *next = h - n, *gain = w + row_of(k - 1);
    float *to_w = acc_w + row_of(k - 1), *to_b = acc_b + row_of(k - 1);
    of_mean = of_std = 0;
#pragma omp simd reduction(+ : of_mean, of_std)
    for (int64_t i = 0; i < n; i++) {
      const float up = rstd * (g[i] - m - h[i] * s);
      sum_x[i] += up;
      to_w[i] += up * next[i];
      to_b[i] += up;
      g[i] = up * gain[i];
      of_mean += g[i];
      of_std += g[i] * next[i];
    }
  }
  const float rstd = stats[1], m = of_mean / n, s = of_std / n;
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const float up = rstd * (g[i] - m - normalized[i] * s);
    df[i] = TF(up);
    dx[i] = TX(job.scale * (sum_x[i] + up));
  }
}

// The closed form: y_k = a x + c u with the derivatives of a and c by (v_xx, v_uu, v_xu).
struct Coefficients {
  double a[BLOCK], c[BLOCK], da[3][BLOCK], dc[3][BLOCK];
};

static void closed_form(const float (*stats)[BLOCK], const Job& job, bool derivatives, Coefficients& r) {
  for (int64_t j = 0; j < BLOCK; j++) {
    r.a[j] = 0;
    r.c[j] = 1;
    for (int p = 0; p < 3; p++) r.da[p][j] = r.dc[p][j] = 0;
  }
  for (int64_t k = 0; k < job.steps; k++) {
#pragma omp simd
    for (int64_t j = 0; j < BLOCK; j++) {
      const double xx = stats[2][j], uu = stats[3][j], xu = stats[4][j], c = r.c[j], a = r.a[j] + (k ? 1 : 0);
      const double variance = a * a * xx + c * c * uu + 2 * a * c * xu;
      const double rstd = 1 / std::sqrt((variance > 0 ? variance : 0) + job.eps);
      if (derivatives) {
        const double by_a = 2 * (a * xx + c * xu), by_c = 2 * (c * uu + a * xu);
        const double direct[3] = {a * a, c * c, 2 * a * c}, factor = -0.5 * rstd * rstd * rstd;
        for (int p = 0; p < 3; p++) {
          const double drstd = factor * (direct[p] + by_a * r.da[p][j] + by_c * r.dc[p][j]);
          r.da[p][j] = r.da[p][j] * rstd + a * drstd;
          r.dc[p][j] = r.dc[p][j] * rstd + c * drstd;
        }
      }
      r.a[j] = a * rstd;
      r.c[j] = c * rstd;
    }
  }
}

static void closed_forward_block(const TX* x, const TF* f, const float* w, const float* b, TY* y, float* saved,
                                 int64_t count, const Job& job) {
  const int64_t n = job.n;
  float stats[5][BLOCK] = {};
  for (int64_t j = 0; j < count; j++) {
    const TX* xj = x + j * n;
    const TF* fj = f + j * n;
    float sum_x = 0, sum_u = 0;
#pragma omp simd reduction(+ : sum_x, sum_u)
    for (int64_t i = 0; i < n; i++) {
      const float scaled = job.scale * float(xj[i]);
      sum_x += scaled;
      sum_u += scaled + float(fj[i]);
    }
    const float mean_x = sum_x / n, mean_u = sum_u / n;
    float xx = 0, uu = 0, xu = 0;
#pragma omp simd reduction(+ : xx, uu, xu)
    for (int64_t i = 0; i < n; i++) {
      const float scaled = job.scale * float(xj[i]), p = scaled - mean_x, q = scaled + float(fj[i]) - mean_u;
      xx += p * p;
      uu += q * q;
      xu += p * q;
    }
    const float found[5] = {mean_x, mean_u, xx / n, uu / n, xu / n};
    for (int s = 0; s < 5; s++) saved[5 * j + s] = stats[s][j] = found[s];
  }
  Coefficients r;
  closed_form(stats, job, false, r);
  for (int64_t j = 0; j < count; j++) {
    const TX* xj = x + j * n;
    const TF* fj = f + j * n;
    TY* yj = y + j * n;
    const float a = r.a[j], c = r.c[j], mean_x = stats[0][j], mean_u = stats[1][j];
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
      const float scaled = job.scale * float(xj[i]);
      yj[i] = TY((a * (scaled - mean_x) + c * (scaled + float(fj[i]) - mean_u)) * w[i] + b[i]);
    }
  }
}

static void closed_backward_block(const TY* gradient, const TX* x, const TF* f, const float* w, const float* saved,
                                  TX* dx, TF* df, float* acc_w, float* acc_b, int64_t count, const Job& job) {
  const int64_t n = job.n;
  float stats[5][BLOCK] = {}, sums[3][BLOCK];
  for (int64_t j = 0; j < count; j++)
    for (int s = 0; s < 5; s++) stats[s][j] = saved[5 * j + s];
  Coefficients r;
  closed_form(stats, job, true, r);
  for (int64_t j = 0; j < count; j++) {
    const TX* xj = x + j * n;
    const TF* fj = f + j * n;
    const TY* gj = gradient + j * n;
    const float a = r.a[j], c = r.c[j], mean_x = stats[0][j], mean_u = stats[1][j];
    float total = 0, along_x = 0, along_u = 0;
#pragma omp simd reduction(+ : total, along_x, along_u)
    for (int64_t i = 0; i < n; i++) {
      const float up = float(gj[i]), g = up * w[i], scaled = job.scale * float(xj[i]);
      const float p = scaled - mean_x, q = scaled + float(fj[i]) - mean_u;
      total += g;
      along_x += g * p;
      along_u += g * q;
      acc_w[i] += up * (a * p + c * q);
      acc_b[i] += up;
    }
    double by[3];
    for (int p = 0; p < 3; p++) by[p] = (along_x * r.da[p][j] + along_u * r.dc[p][j]) / n;
    const float mean_g = total / n, by_xx = 2 * by[0], by_uu = 2 * by[1], by_xu = by[2];
    TX* dxj = dx + j * n;
    TF* dfj = df + j * n;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
      const float g = float(gj[i]) * w[i] - mean_g, scaled = job.scale * float(xj[i]);
      const float p = scaled - mean_x, q = scaled + float(fj[i]) - mean_u;
      const float du = c * g + by_uu * q + by_xu * p;
      dfj[i] = TF(du);
      dxj[i] = TX(job.scale * (a * g + by_xx * p + by_xu * q + du));
    }
  }
}

extern "C" void rskip_forward(const TX* x, const TF* f, const float* w, const float* b, TY* y, float* stats,
                              int64_t rows, int64_t n, int64_t steps, int64_t affine_rows, int64_t closed, float eps,
                              float scale, int threads) {
  const Job job{rows, n, steps, affine_rows, eps, scale};
  const int64_t blocks = (rows + BLOCK - 1) / BLOCK;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> xs(n), v(n);
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; block++) {
      const int64_t first = block * BLOCK, count = std::min(BLOCK, rows - first);
      if (closed)
        closed_forward_block(x + first * n, f + first * n, w, b, y + first * n, stats + first * 5, count, job);
      else
        for (int64_t row = first; row < first + count; row++)
          chain_forward_row(x + row * n, f + row * n, w, b, y + row * n, stats + row * 2 * steps, job, xs.data(),
                            v.data());
    }
  }
}

// `partial` is (chunks, 2, affine_rows, n): sums over consecutive rows, which do not depend on the number of threads.
extern "C" void rskip_backward(const TY* gradient, const TX* x, const TF* f, const float* w, const float* b,
                               const float* stats, TX* dx, TF* df, double* partial, int64_t chunks, int64_t rows,
                               int64_t n, int64_t steps, int64_t affine_rows, int64_t closed, float eps, float scale,
                               int threads) {
  const Job job{rows, n, steps, affine_rows, eps, scale};
  const int64_t blocks = (rows + BLOCK - 1) / BLOCK, affine = affine_rows * n;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> acc(2 * affine), xs(n), g(n), sum_x(n), normalized(steps * n);
#pragma omp for schedule(dynamic)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
      double* sums = partial + chunk * 2 * affine;
      std::fill(sums, sums + 2 * affine, 0.0);
      const int64_t last = (chunk + 1) * blocks / chunks;
      for (int64_t block = chunk * blocks / chunks, added = 0; block < last; block++) {
        const int64_t first = block * BLOCK, count = std::min(BLOCK, rows - first);
        if (closed)
          closed_backward_block(gradient + first * n, x + first * n, f + first * n, w, stats + first * 5,
                                dx + first * n, df + first * n, acc.data(), acc.data() + affine, count, job);
        else
          for (int64_t row = first; row < first + count; row++)
            chain_backward_row(gradient + row * n, x + row * n, f + row * n, w, b, stats + row * 2 * steps,
                               dx + row * n, df + row * n, acc.data(), acc.data() + affine, job, xs.data(), g.data(),
                               sum_x.data(), normalized.data());
        if (++added % 8 == 0 || block == last - 1) {  // few enough to add in single precision
          for (int64_t i = 0; i < 2 * affine; i++) sums[i] += acc[i];
          std::fill(acc.begin(), acc.end(), 0.0f);
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
