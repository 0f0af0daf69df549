"""The C++ of recursive skip connections on CPUs, which `skip_kernels_cpu.py` compiles: `SOURCE`, and in `PRELUDE` its
vectors and precisions.

In a Python file, since those alone travel with a checkpoint.
"""

PRELUDE = r"""
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
typedef int32_t I __attribute__((vector_size(WIDTH)));
typedef uint64_t L __attribute__((vector_size(WIDTH)));
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
"""

SOURCE = (
    PRELUDE
    + r"""
// Stores past the caches, which would otherwise read first what is overwritten, at multiples of a vector. Vectors of 16
// bits are no faster for it.
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

// A sum in lanes that do not wait for each other. What they gathered is put by now and then: a lane that holds one
// large value would round every later one alike.
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
  int64_t rows, n, stride, steps, affine_rows;  // `stride` between rows of gains, biases and of what passes share
  float eps, scale, over_n;
  bool closed, centred, streams;
  uint64_t seed;
  float dropout;
};

// `over` for what stores outputs.
template <class Body>
static inline void over_outputs(const Job& job, Body body) {
  job.streams ? over<Streamed>(job.n, body) : over(job.n, body);
}

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
    return {x + i, f + i, stats + row * of_stats, y + i, gradient + i, dx + i, df + i, factors + i};
  }
};

// Asks for what lies `rows` ahead, into the cache of second level.
template <class T>
static inline void ahead(const T* p, const Job& job, int64_t rows = 4) {
  __builtin_prefetch(p + rows * job.n, 0, 2);
}

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
// s x and F at i, F after dropout.
template <bool DROP, class Part>
static inline Pair load(const Rows& at, const Job& job, int64_t i, Part part) {
  const V f = part.load(at.f + i);
  return {job.scale * part.load(at.x + i), DROP ? f * part.load(at.factors + i) : f};
}

struct Shift {
  float x = 0, f = 0;
};
template <bool DROP>
static inline Shift shift_of(const Rows& at, const Job& job) {
  if (!job.centred) return {};
  const int64_t few = sample_size(job.n);
  Sum x, f;
  over(few, [&](int64_t i, auto part, int lane) {
    const Pair v = load<DROP>(at, job, i, part);
    x[lane] += v.x;
    f[lane] += v.f;
  }, x, f);
  return {x.total() / few, f.total() / few};
}

// The chain. Statistics of a row: the shifts of x and F, then for each step -mean / std and 1 / std of what is
// normalised, from which the shifts have been subtracted. `b` are biases, and `inner` those whose mean was subtracted,
// which the next step does not notice. The processor does not see for itself, over more than a step of other work, that
// the next rows are read soon; it is told while it does that work.
template <bool DROP>
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
  const Shift shift = shift_of<DROP>(at, job);
  const float shift_u = shift.x + shift.f;
  at.stats[0] = shift.x;
  at.stats[1] = shift.f;
  {
    Sum sum, square;
    over(n, [&](int64_t i, auto part, int lane) {
      const Pair v = load<DROP>(at, job, i, part);
      const V d = part.keep(v.x + v.f - shift_u);
      narrow(part.keep(v.x - shift.x), xs + i);
      narrow(d, now + i);
      sum[lane] += d;
      square[lane] += d * d;
    }, sum, square);
    finish(0, sum, square);
  }
  int64_t row = 0;
  for (int64_t k = 0; k < steps - 1; k++, row += job.affine_rows > 1 ? job.stride : 0) {
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

// `acc_w` and `acc_b` gather the gradients of gains and biases; `work` holds the K normalised rows, each until the
// gradient of what was normalised takes its place. What waits for the step before it goes by groups of vectors, which
// wait together. Sums live as long as one pass: where later ones saw them, too, they would be in memory.
constexpr int GROUP = 4;
template <bool DROP>
static void chain_backward(const Rows at, const float* w, const float* inner, float* acc_w, float* acc_b,
                           const Job job, float* work) {
  const int64_t n = job.n, steps = job.steps, stride = job.stride, of_affine = job.affine_rows > 1 ? stride : 0;
  float mean, std, rstd;
  const auto finish = [&](int64_t k, const Sum& of_mean, const Sum& of_std) {
    rstd = at.stats[3 + 2 * k];
    mean = job.centred ? -of_mean.total() * job.over_n * rstd : 0;
    std = -of_std.total() * job.over_n * rstd;
  };
  // What the gradient `up` of the output of step k, which normalised to `h`, says of its gain, bias and input.
  const auto gather = [&](int64_t k, int64_t i, V up, V h, V& of_mean, V& of_std) {
    float *to_w = acc_w + k * of_affine + i, *to_b = acc_b + k * of_affine + i;
    const V weighted = up * widen(w + k * of_affine + i);
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
        const Pair v = load<DROP>(at, job, i + j * LANES, part);
        x[j] = part.keep(v.x - at.stats[0]);
        h[j] = part.keep(v.x + v.f - shift_u) * at.stats[3] + at.stats[2];
        narrow(h[j], work + i + j * LANES);
      }
      for (int64_t k = 1; k < steps; k++) {
        const float *gain = w + (k - 1) * of_affine + i, *shift = inner + (k - 1) * of_affine + i;
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
    return up * widen(w + k * of_affine + i) * rstd + (widen(work + k * stride + i) * std + mean);
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
      part.store(DROP ? up[j] * part.load(at.factors + here) : up[j], at.df + here);
      part.store(job.scale * sum[j], at.dx + here);
    }
  };
  job.streams ? over_groups<GROUP, Streamed>(n, output) : over_groups<GROUP>(n, output);
}

// The closed form of `skip_kernels_autograd.py`, for rows side by side.
constexpr int64_t BLOCK = 16;
struct Coefficients {
  double over[BLOCK], a[BLOCK], c[BLOCK], da[3][BLOCK], dc[3][BLOCK];
};
struct Stats {
  float mean_x, mean_u, xx, uu, xu;
};

static void closed_form(const Stats* stats, int64_t count, const Job& job, bool derivatives, Coefficients& o) {
  double xx[BLOCK] = {}, uu[BLOCK] = {}, xu[BLOCK] = {}, sigma[BLOCK] = {};
  o = Coefficients{};
  for (int64_t j = 0; j < count; j++) {
    const double square = std::max(std::max(stats[j].xx, stats[j].uu), 1e-36f);
    xx[j] = stats[j].xx / square;
    uu[j] = std::max(stats[j].uu / square, 1e-22);
    xu[j] = stats[j].xu / square;
    o.c[j] = sigma[j] = std::sqrt(square);
    o.over[j] = 1 / sigma[j];
  }
  for (int64_t k = 0; k < job.steps; k++) {
#pragma omp simd
    for (int64_t j = 0; j < BLOCK; j++) {
      const double c = o.c[j], a = o.a[j] + (k ? sigma[j] : 0);
      const double variance = a * a * xx[j] + c * c * uu[j] + 2 * a * c * xu[j];
      const double rstd = 1 / std::sqrt((variance < 0 ? 0 : variance) + job.eps);
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

template <bool DROP>
static Stats closed_statistics(const Rows at, const Job& job) {
  const Shift shift = shift_of<DROP>(at, job);
  const float shift_u = shift.x + shift.f;
  Sum rest_x, rest_u, xx, uu, xu;
  over(job.n, [&](int64_t i, auto part, int lane) {
    const Pair v = load<DROP>(at, job, i, part);
    const V p = part.keep(v.x - shift.x), q = part.keep(v.x + v.f - shift_u);
    rest_x[lane] += p;
    rest_u[lane] += q;
    xx[lane] += p * p;
    uu[lane] += q * q;
    xu[lane] += p * q;
  }, rest_x, rest_u, xx, uu, xu);
  const float dx = job.centred ? rest_x.total() * job.over_n : 0, du = job.centred ? rest_u.total() * job.over_n : 0;
  const auto at_least = [](float variance, float mean) {  // what rounding leaves of a row that is constant
    const float rounding = mean * 0x1p-22f;
    return std::max(variance, rounding * rounding);
  };
  return {shift.x + dx, shift_u + du, at_least(xx.total() * job.over_n - dx * dx, shift.x),
          at_least(uu.total() * job.over_n - du * du, shift_u), xu.total() * job.over_n - dx * du};
}

template <bool DROP>
static void closed_output(const Rows at, const float* w, const float* b, const Job job,
                          const Stats stats, float scale, float a, float c) {
  over_outputs(job, [&](int64_t i, auto part, int) {
    ahead(at.x + i, job, BLOCK + 4), ahead(at.f + i, job, BLOCK + 4);
    const Pair v = load<DROP>(at, job, i, part);
    const V p = (v.x - stats.mean_x) * scale, q = (v.x + v.f - stats.mean_u) * scale;
    part.store((a * p + c * q) * widen(w + i) + widen(b + i), at.y + i);
  });
}

template <bool DROP>
static void closed_backward(const Rows at, const float* w, float* acc_w, float* acc_b,
                            const Job job, const Stats stats, const Coefficients& o, int64_t j) {
  const float scale = o.over[j], a = o.a[j], c = o.c[j];
  Sum sum, along_x, along_u;
  over(job.n, [&](int64_t i, auto part, int lane) {
    const Pair v = load<DROP>(at, job, i, part);
    const V up = part.load(at.gradient + i), g = up * widen(w + i);
    const V p = (v.x - stats.mean_x) * scale, q = (v.x + v.f - stats.mean_u) * scale;
    sum[lane] += g;
    along_x[lane] += g * p;
    along_u[lane] += g * q;
    narrow(widen(acc_w + i) + up * (a * p + c * q), acc_w + i);
    narrow(widen(acc_b + i) + up, acc_b + i);
  }, sum, along_x, along_u);
  const double by_x = along_x.total() * job.over_n, by_u = along_u.total() * job.over_n;
  float by[3], mean = job.centred ? sum.total() * job.over_n : 0;
  for (int p = 0; p < 3; p++) by[p] = (p < 2 ? 2 : 1) * (by_x * o.da[p][j] + by_u * o.dc[p][j]);
  over_outputs(job, [&](int64_t i, auto part, int) {
    ahead(at.x + i, job), ahead(at.f + i, job), ahead(at.gradient + i, job);
    const Pair v = load<DROP>(at, job, i, part);
    const V g = part.load(at.gradient + i) * widen(w + i) - mean;
    const V p = (v.x - stats.mean_x) * scale, q = (v.x + v.f - stats.mean_u) * scale;
    const V du = scale * (c * g + by[1] * q + by[2] * p);
    part.store(DROP ? du * part.load(at.factors + i) : du, at.df + i);
    part.store(job.scale * (scale * (a * g + by[0] * p + by[2] * q) + du), at.dx + i);
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


static Job make_job(const int64_t* sizes, const double* numbers, int64_t seed,
                    std::initializer_list<const void*> outputs) {
  const int64_t n = sizes[1];
  bool streams = sizes[0] * n >= 1 << 20 && n % LANES == 0;  // from there on faster with the next reading counted
  for (const void* output : outputs) streams &= (uintptr_t)output % WIDTH == 0;
  // Rows at multiples of 4096 bytes would take turns in one set of the cache.
  const int64_t stride = (n + LANES - 1) / LANES * LANES + 80;
  return {sizes[0], n, stride, sizes[2], sizes[3], float(numbers[0]), float(numbers[1]), 1.0f / n,
          sizes[4] != 0, sizes[5] != 0, streams, uint64_t(seed), float(numbers[2])};
}

// Blocks of rows that stay in the cache.
static int64_t rows_a_block(const Job& job) {
  return std::max(int64_t(1), std::min(BLOCK, 65536 / job.n / 4 * 4));
}

template <bool DROP>
static void forward(const Rows tensors, const Affine& affine, const Job job, int threads) {
  const int64_t n = job.n, size = rows_a_block(job) * (job.closed ? 8 : 1), blocks = (job.rows + size - 1) / size;
  const int64_t of_stats = job.closed ? 5 : 2 + 2 * job.steps;
#pragma omp parallel num_threads(threads)
  {
    Buffer work(job.closed ? 0 : 2 * job.stride), factors(DROP ? size * n + LANES : 0);
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; block++) {
      const int64_t first = block * size, count = std::min(size, job.rows - first);
      if (DROP) draw_factors(first * n, count * n, job, factors.data);
      Rows at = tensors.from(first, n, of_stats);
      at.factors = factors.data;
      const auto of = [&](int64_t row) { return at.from(row, n, of_stats); };
      if (job.closed) {
        // Rows are read by the side of others that are written.
        Stats stats[2][BLOCK];
        Coefficients o;
        const auto row_of = [&](int64_t part, int64_t j) { return of(part * BLOCK + j); };
        const auto rows_of = [&](int64_t part) { return std::max(int64_t(0), std::min(BLOCK, count - part * BLOCK)); };
        for (int64_t part = 0, written = 0; part * BLOCK < count + BLOCK; part++) {
          const int64_t read = rows_of(part);
          for (int64_t j = 0; j < std::max(read, written); j++) {
            if (j < read) stats[part % 2][j] = closed_statistics<DROP>(row_of(part, j), job);
            if (j < written)
              closed_output<DROP>(row_of(part - 1, j), affine.w.data, affine.b.data, job, stats[(part + 1) % 2][j],
                                  o.over[j], o.a[j], o.c[j]);
          }
          if (read > 0) std::memcpy(row_of(part, 0).stats, stats[part % 2], read * sizeof(Stats));
          closed_form(stats[part % 2], read, job, false, o);
          written = read;
        }
      } else {
        for (int64_t row = 0; row < count; row++)
          chain_forward<DROP>(of(row), affine.w.data, affine.b.data, affine.inner.data, job, work.data);
      }
    }
    Streamed::finish();
  }
}

template <bool DROP>
static void backward(const Rows tensors, const Affine& affine, double* partial, int64_t chunks, const Job job,
                     int threads) {
  const int64_t n = job.n, size = rows_a_block(job), blocks = (job.rows + size - 1) / size;
  const int64_t of_stats = job.closed ? 5 : 2 + 2 * job.steps, gains = job.affine_rows * job.stride;
#pragma omp parallel num_threads(threads)
  {
    Buffer acc_w(gains), acc_b(gains), work(job.closed ? 0 : job.steps * job.stride);
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
        Rows at = tensors.from(first, n, of_stats);
        at.factors = factors.data;
        const auto of = [&](int64_t row) { return at.from(row, n, of_stats); };
        if (job.closed) {
          Stats stats[BLOCK];
          std::memcpy(stats, at.stats, count * sizeof(Stats));
          Coefficients o;
          closed_form(stats, count, job, true, o);
          for (int64_t row = 0; row < count; row++)
            closed_backward<DROP>(of(row), affine.w.data, acc_w.data, acc_b.data, job, stats[row], o, row);
        } else {
          for (int64_t row = 0; row < count; row++)
            chain_backward<DROP>(of(row), affine.w.data, affine.inner.data, acc_w.data, acc_b.data, job, work.data);
        }
        added += count;
        if (added >= 128 || block == last - 1) {  // few enough to add in single precision
          flush(acc_w.data, sums);
          flush(acc_b.data, sums + job.affine_rows * n);
          added = 0;
        }
      }
    }
    Streamed::finish();
  }
}

// `sizes` are rows, n, K, affine rows, closed, centred, chunks of the backward pass; `numbers` eps, scale, dropout.
extern "C" void rskip_forward(const TX* x, const TF* f, const float* weight, const float* bias, TY* y, float* stats,
                              const int64_t* sizes, const double* numbers, int64_t seed, int threads) {
  const Job job = make_job(sizes, numbers, seed, {y});
  const Affine affine(weight, bias, job);
  const Rows rows{x, f, stats, y, nullptr, nullptr, nullptr, nullptr};
  job.dropout > 0 ? forward<true>(rows, affine, job, threads) : forward<false>(rows, affine, job, threads);
}

// `partial` is (chunks, 2, affine rows, n): sums over consecutive rows, which do not depend on the number of threads.
extern "C" void rskip_backward(const TY* gradient, const TX* x, const TF* f, const float* weight, const float* bias,
                               float* stats, TX* dx, TF* df, double* partial, const int64_t* sizes,
                               const double* numbers, int64_t seed, int threads) {
  const Job job = make_job(sizes, numbers, seed, {dx, df});
  const Affine affine(weight, bias, job);
  const Rows rows{x, f, stats, nullptr, gradient, dx, df, nullptr};
  job.dropout > 0 ? backward<true>(rows, affine, partial, sizes[6], job, threads)
                  : backward<false>(rows, affine, partial, sizes[6], job, threads);
}
"""
)
