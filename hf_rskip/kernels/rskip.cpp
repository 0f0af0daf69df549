// Recursive skip connections y_1 = LN(x + F), y_k = LN(x + y_{k-1}) over rows: a row stays in the cache while it passes
// through its K steps. `cpu.py` compiles this for the precisions TYPE_OF_X, TYPE_OF_BRANCH and TYPE_OF_Y.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>
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
typedef uint16_t H __attribute__((vector_size(WIDTH / 2)));
typedef float Quarter __attribute__((vector_size(16)));
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

// The last values of a row, fewer than a vector; the other lanes are 0 and are not stored.
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

// Streaming stores, to addresses that are multiples of a vector: a cache would first read the lines that are
// overwritten. Vectors of 16 bits gain nothing.
struct Streamed : Whole {
  using Whole::store;
#if defined(__AVX512F__)
  void store(V v, float* p) const { _mm512_stream_ps(p, (__m512)v); }
#elif defined(__AVX__)
  void store(V v, float* p) const { _mm256_stream_ps(p, (__m256)v); }
#endif
  static void finish() {
#ifdef __AVX__
    _mm_sfence();
#endif
  }
};

// A sum in independent lanes, which `put_by` empties every few vectors: a lane that holds one large value would round
// every later one alike.
constexpr int UNROLL = 2;
struct Sum {
  V lanes[UNROLL] = {}, before = {};
  V& operator[](int lane) { return lanes[lane]; }
  void put_by() {
    before += lanes[0] + lanes[1];
    lanes[0] = lanes[1] = V{};
  }
  float total() const {
    Quarter quarters[LANES / 4];
    std::memcpy(quarters, &before, sizeof before);
    for (int64_t half = LANES / 8; half > 0; half /= 2)
      for (int64_t i = 0; i < half; i++) quarters[i] += quarters[i + half];
    const Quarter q = quarters[0];
    return (q[0] + q[1]) + (q[2] + q[3]);
  }
};

// Calls `body(i, part, count)` for groups of vectors of a row, `count` of them from i on: an `integral_constant`, 1 or
// MANY. `body` adds to `sums`.
template <int MANY, class Part = Whole, class Body, class... Sums>
static inline __attribute__((always_inline)) void over_groups(int64_t n, Body body, Sums&... sums) {
  constexpr std::integral_constant<int, MANY> many;
  constexpr std::integral_constant<int, 1> one;
  for (int64_t i = 0; i < n;) {
    const int64_t end = sizeof...(sums) > 0 ? std::min(n, i + 16 * UNROLL * LANES) : n;
    for (; i + MANY * LANES <= end; i += MANY * LANES) body(i, Part{}, many);
    for (; i + LANES <= end; i += LANES) body(i, Part{}, one);
    if (i < end) body(i, Tail{end - i}, one);
    i = end;
    (sums.put_by(), ...);
  }
}

// Calls `body(i, part, lane)` for the vectors of a row, which adds to those lanes of `sums`.
template <class Part = Whole, class Body, class... Sums>
static inline __attribute__((always_inline)) void over(int64_t n, Body body, Sums&... sums) {
  over_groups<UNROLL, Part>(n, [&](int64_t i, auto part, auto count) {
    for (int lane = 0; lane < count; lane++) body(i + lane * LANES, part, lane);
  }, sums...);
}

struct Job {
  int64_t rows, n, stride, steps;  // `stride` between rows of gains, biases and of what passes share
  float eps, over_n;
  bool centred, streams;
};

// The tensors from some row on.
struct Rows {
  const TX* x;
  const TF* f;
  float* stats;
  TY* y;
  const TY* gradient;
  TX* dx;
  TF* df;
  Rows from(int64_t row, int64_t n, int64_t of_stats) const {
    const int64_t i = row * n;
    return {x + i, f + i, stats + row * of_stats, y + i, gradient + i, dx + i, df + i};
  }
};

// Prefetches what lies four rows ahead into the second-level cache.
template <class T>
static inline void ahead(const T* p, const Job& job) {
  __builtin_prefetch(p + 4 * job.n, 0, 2);
}

// Sums of squares lose digits far from the mean, so that values are shifted by the mean of the first eighth of a row.
static inline int64_t sample_size(int64_t n) { return std::min(n, std::max(n / 8, int64_t(64))); }

struct Pair {
  V x, f;
};

template <class Part>
static inline Pair load(const Rows& at, int64_t i, Part part) {
  return {part.load(at.x + i), part.load(at.f + i)};
}

struct Shift {
  float x = 0, f = 0;
};
static inline Shift shift_of(const Rows& at, const Job& job) {
  if (!job.centred) return {};
  const int64_t few = sample_size(job.n);
  Sum x, f;
  over(few, [&](int64_t i, auto part, int lane) {
    const Pair v = load(at, i, part);
    x[lane] += v.x;
    f[lane] += v.f;
  }, x, f);
  return {x.total() / few, f.total() / few};
}

// Statistics of a row: the shifts of x and F, then for each step -mean / std and 1 / std of its shifted input. `b` are
// biases, `inner` biases less their mean, which does not change the next step. The first steps prefetch rows ahead, as
// the processor does not foresee reads that are more than a step away.
static void chain_forward(const Rows at, const float* w, const float* b, const float* inner, const Job job,
                          float* work) {
  const int64_t n = job.n, steps = job.steps;
  float *now = work, *xs = work + job.stride, centre, rstd;
  const auto finish = [&](int64_t k, const Sum& sum, const Sum& square) {
    const float mean = job.centred ? sum.total() * job.over_n : 0;
    const float variance = square.total() * job.over_n - mean * mean;
    at.stats[3 + 2 * k] = rstd = 1 / std::sqrt(std::max(variance, 0.0f) + job.eps);
    at.stats[2 + 2 * k] = centre = -mean * rstd;
  };
  const Shift shift = shift_of(at, job);
  const float shift_u = shift.x + shift.f;
  at.stats[0] = shift.x;
  at.stats[1] = shift.f;
  {
    Sum sum, square;
    over(n, [&](int64_t i, auto part, int lane) {
      const Pair v = load(at, i, part);
      const V d = part.keep(v.x + v.f - shift_u);
      narrow(part.keep(v.x - shift.x), xs + i);
      narrow(d, now + i);
      sum[lane] += d;
      square[lane] += d * d;
    }, sum, square);
    finish(0, sum, square);
  }
  int64_t row = 0;
  for (int64_t k = 0; k < steps - 1; k++, row += job.stride) {
    const auto step = [&](auto meanwhile) {
      Sum sum, square;
      over(n, [&](int64_t i, auto, int lane) {
        meanwhile(i);
        const V y = (widen(now + i) * rstd + centre) * widen(w + row + i) + widen(inner + row + i);
        const V d = widen(xs + i) + y;
        narrow(d, now + i);
        sum[lane] += d;
        square[lane] += d * d;
      }, sum, square);
      finish(k + 1, sum, square);
    };
    if (steps > 2 && k == 0)
      step([&](int64_t i) { ahead(at.x + i, job), ahead(at.f + i, job); });
    else if (k == 1)
      step([&](int64_t i) { ahead(at.y + i, job); });
    else
      step([](int64_t) {});
  }
  over(n, [&](int64_t i, auto part, int) {
    part.store((widen(now + i) * rstd + centre) * widen(w + row + i) + widen(b + row + i), at.y + i);
  });
}

// `acc_w` and `acc_b` are sums of the gradients of gains and biases; `work` holds the K normalised rows, each until it
// is overwritten by the gradient of the input of its step. Chains of dependent operations run on groups of vectors, to
// overlap their latencies. Sums are local to a pass, so that they stay in registers. Inlined, the function was measured
// 7% slower (g++ 12).
constexpr int GROUP = 4;
static __attribute__((noinline)) void chain_backward(const Rows at, const float* w, const float* inner, float* acc_w,
                                                     float* acc_b, const Job job, float* work) {
  const int64_t n = job.n, steps = job.steps, stride = job.stride;
  float mean, std, rstd;
  const auto finish = [&](int64_t k, const Sum& of_mean, const Sum& of_std) {
    rstd = at.stats[3 + 2 * k];
    mean = job.centred ? -of_mean.total() * job.over_n * rstd : 0;
    std = -of_std.total() * job.over_n * rstd;
  };
  // Adds the gradients of gain and bias of step k, and the sums for that of its input; `up` is the gradient of its
  // output, `h` its normalised input.
  const auto gather = [&](int64_t k, int64_t i, V up, V h, V& of_mean, V& of_std) {
    float *to_w = acc_w + k * stride + i, *to_b = acc_b + k * stride + i;
    const V weighted = up * widen(w + k * stride + i);
    narrow(widen(to_w) + up * h, to_w);
    narrow(widen(to_b) + up, to_b);
    of_mean += weighted;
    of_std += weighted * h;
  };
  {
    const float shift_u = at.stats[0] + at.stats[1];
    Sum of_mean, of_std;
    over_groups<GROUP>(n, [&](int64_t i, auto part, auto count) {
      V x[GROUP], h[GROUP];
      for (int j = 0; j < count; j++) {
        const Pair v = load(at, i + j * LANES, part);
        x[j] = part.keep(v.x - at.stats[0]);
        h[j] = part.keep(v.x + v.f - shift_u) * at.stats[3] + at.stats[2];
        narrow(h[j], work + i + j * LANES);
      }
      for (int64_t k = 1; k < steps; k++) {
        const float *gain = w + (k - 1) * stride + i, *shift = inner + (k - 1) * stride + i;
        const V centre = V{} + at.stats[2 + 2 * k], rstd = V{} + at.stats[3 + 2 * k];
        for (int j = 0; j < count; j++) {
          h[j] = (x[j] + (h[j] * widen(gain + j * LANES) + widen(shift + j * LANES))) * rstd + centre;
          narrow(h[j], work + k * stride + i + j * LANES);
        }
      }
      for (int j = 0; j < count; j++) {
        const int64_t here = i + j * LANES;
        gather(steps - 1, here, part.load(at.gradient + here), h[j], of_mean[j % UNROLL], of_std[j % UNROLL]);
      }
    }, of_mean, of_std);
    finish(steps - 1, of_mean, of_std);
  }
  const auto through = [&](int64_t k, int64_t i, V up) {
    return up * widen(w + k * stride + i) * rstd + (widen(work + k * stride + i) * std + mean);
  };
  for (int64_t k = steps - 1; k > 0; k--) {
    float* here = work + k * stride;
    const auto step = [&](auto given, auto meanwhile) {
      Sum of_mean, of_std;
      over(n, [&](int64_t i, auto part, int lane) {
        meanwhile(i);
        const V up = through(k, i, given(i, part));
        narrow(up, here + i);
        gather(k - 1, i, up, widen(here - stride + i), of_mean[lane], of_std[lane]);
      }, of_mean, of_std);
      finish(k - 1, of_mean, of_std);
    };
    const auto later = [&](int64_t i, auto) { return widen(here + stride + i); };
    if (k == steps - 1)
      step([&](int64_t i, auto part) { return part.load(at.gradient + i); },
           [&](int64_t i) { ahead(at.x + i, job), ahead(at.f + i, job), ahead(at.gradient + i, job); });
    else
      step(later, [](int64_t) {});
  }
  const auto output = [&](int64_t i, auto part, auto count) {
    V up[GROUP], sum[GROUP];
    for (int j = 0; j < count; j++) {
      const int64_t here = i + j * LANES;
      sum[j] = up[j] = through(0, here, steps == 1 ? part.load(at.gradient + here) : widen(work + stride + here));
    }
    for (int64_t k = 1; k < steps; k++)
      for (int j = 0; j < count; j++) sum[j] += widen(work + k * stride + i + j * LANES);
    for (int j = 0; j < count; j++) {
      const int64_t here = i + j * LANES;
      part.store(up[j], at.df + here);
      part.store(sum[j], at.dx + here);
    }
  };
  job.streams ? over_groups<GROUP, Streamed>(n, output) : over_groups<GROUP>(n, output);
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

// Copies rows of gains or biases, padded with zeros to whole vectors; with `centred`, less the mean of each.
static void pad(const float* rows, const Job& job, bool centred, float* result) {
  for (int64_t k = 0; k < job.steps; k++) {
    double mean = 0;
    for (int64_t i = 0; centred && i < job.n; i++) mean += rows[k * job.n + i];
    mean /= job.n;
    for (int64_t i = 0; i < job.n; i++) result[k * job.stride + i] = rows[k * job.n + i] - mean;
  }
}

struct Affine {
  Buffer w, b, inner;
  Affine(const float* weight, const float* bias, const Job& job)
      : w(job.steps * job.stride), b(job.steps * job.stride), inner(job.steps * job.stride) {
    pad(weight, job, false, w.data);
    pad(bias, job, false, b.data);
    pad(bias, job, job.centred, inner.data);
  }
};

static Job make_job(const int64_t* sizes, double eps, std::initializer_list<const void*> outputs) {
  const int64_t n = sizes[1];
  // Measured from 2^20 values on: faster, the next reading of the output included.
  bool streams = sizes[0] * n >= 1 << 20 && n % LANES == 0;
  for (const void* output : outputs) streams &= (uintptr_t)output % WIDTH == 0;
  // Rows at multiples of 4096 bytes would compete for one set of the cache.
  const int64_t stride = (n + LANES - 1) / LANES * LANES + 80;
  return {sizes[0], n, stride, sizes[2], float(eps), 1.0f / n, sizes[3] != 0, streams};
}

// Blocks of rows that stay in the cache.
static int64_t rows_a_block(const Job& job) {
  return std::max(int64_t(1), std::min(int64_t(16), 65536 / job.n / 4 * 4));
}

// `sizes` are rows, n, K, centred, chunks of the backward pass; `stats` is (rows, 2 + 2 K), gains and biases (K, n).
extern "C" void rskip_forward(const TX* x, const TF* f, const float* weight, const float* bias, TY* y, float* stats,
                              const int64_t* sizes, double eps, int threads) {
  const Job job = make_job(sizes, eps, {});
  const Affine affine(weight, bias, job);
  const Rows tensors{x, f, stats, y, nullptr, nullptr, nullptr};
  const int64_t of_stats = 2 + 2 * job.steps;
#pragma omp parallel num_threads(threads)
  {
    Buffer work(2 * job.stride);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < job.rows; row++)
      chain_forward(tensors.from(row, job.n, of_stats), affine.w.data, affine.b.data, affine.inner.data, job,
                    work.data);
  }
}

// `partial` is (chunks, 2, K, n): sums over consecutive rows, which do not depend on the number of threads.
extern "C" void rskip_backward(const TY* gradient, const TX* x, const TF* f, const float* weight, const float* bias,
                               float* stats, TX* dx, TF* df, double* partial, const int64_t* sizes, double eps,
                               int threads) {
  const Job job = make_job(sizes, eps, {dx, df});
  const Affine affine(weight, bias, job);
  const Rows tensors{x, f, stats, nullptr, gradient, dx, df};
  const int64_t n = job.n, chunks = sizes[4], of_stats = 2 + 2 * job.steps, gains = job.steps * job.stride;
  const int64_t size = rows_a_block(job), blocks = (job.rows + size - 1) / size;
#pragma omp parallel num_threads(threads)
  {
    Buffer acc_w(gains), acc_b(gains), work(gains);
    const auto flush = [&](float* acc, double* sums) {
      for (int64_t k = 0; k < job.steps; k++)
        for (int64_t i = 0; i < n; i++) sums[k * n + i] += acc[k * job.stride + i];
      std::fill(acc, acc + gains, 0.0f);
    };
#pragma omp for schedule(dynamic)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
      double* sums = partial + chunk * 2 * job.steps * n;
      std::fill(sums, sums + 2 * job.steps * n, 0.0);
      const int64_t last = (chunk + 1) * blocks / chunks;
      for (int64_t block = chunk * blocks / chunks, added = 0; block < last; block++) {
        const int64_t first = block * size, count = std::min(size, job.rows - first);
        for (int64_t row = first; row < first + count; row++)
          chain_backward(tensors.from(row, n, of_stats), affine.w.data, affine.inner.data, acc_w.data, acc_b.data, job,
                         work.data);
        added += count;
        if (added >= 128 || block == last - 1) {  // few enough to add in single precision
          flush(acc_w.data, sums);
          flush(acc_b.data, sums + job.steps * n);
          added = 0;
        }
      }
    }
    Streamed::finish();
  }
}
