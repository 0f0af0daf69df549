"""The C++ of recursive skip connections over whole maps, which `skip_kernels_maps_cpu.py` compiles."""

from .cpu_source import PRELUDE

SOURCE = (
    PRELUDE
    + r"""
typedef double D __attribute__((vector_size(2 * WIDTH)));
typedef double Pairs __attribute__((vector_size(16)));

struct Job {
  int64_t samples, positions, channels, steps;
  bool planes, centred;  // planes: the positions of a channel lie side by side; otherwise the channels of a position
  float scale;
  double eps;
};

// The tensors of one sample; `moments` has five numbers for each channel.
struct Sample {
  const TX* x;
  const TF* f;
  float* moments;
  TY* y;
  const TY* gradient;
  TX* dx;
  TF* df;
};

// The channels that the lanes of a vector hold: one for all of them, of planes, otherwise one each.
struct Group {
  int64_t first, count, start, step, whole, stop;
  bool planes;
  Group(const Job& job, int64_t channel, int64_t positions) : first(channel), planes(job.planes) {
    count = planes ? 1 : std::min(LANES, job.channels - first);
    start = planes ? first * job.positions : first;
    stop = planes ? start + positions : positions * job.channels;
    step = planes ? LANES : job.channels;
    whole = planes ? positions / LANES : count == LANES ? positions : 0;
  }
  Group(const Job& job, int64_t channel) : Group(job, channel, job.positions) {}
  V load(const float* numbers) const { return planes ? V{} + numbers[first] : Tail{count}.load(numbers + first); }
};

// Sums of a group, in float32 for 32 vectors and then in float64.
template <int N>
struct Sums {
  V lanes[N] = {};
  D before[N] = {};
  void put_by() {
    for (int i = 0; i < N; i++) {
      before[i] += __builtin_convertvector(lanes[i], D);
      lanes[i] = V{};
    }
  }
  static double total(D sum) {
    Pairs pairs[LANES / 2];
    std::memcpy(pairs, &sum, sizeof sum);
    for (int64_t half = LANES / 4; half > 0; half /= 2)
      for (int64_t i = 0; i < half; i++) pairs[i] += pairs[i + half];
    return pairs[0][0] + pairs[0][1];
  }
  template <class To>
  void store(const Group& group, To to) const {  // calls `to(channel, sums)`
    for (int64_t lane = 0; lane < group.count; lane++) {
      double sums[N];
      for (int i = 0; i < N; i++) sums[i] = group.planes ? total(before[i]) : before[i][lane];
      to(group.first + lane, sums);
    }
  }
};
struct NoSums {
  void put_by() {}
};

// A vector whose first `skipped` lanes have had their turn: storing them once more changes nothing.
struct Last : Whole {
  int64_t skipped;
  explicit Last(int64_t skipped) : skipped(skipped) {}
  V keep(V v) const {
    I lane;
    for (int64_t i = 0; i < LANES; i++) lane[i] = i;
    return lane >= int32_t(skipped) ? v : V{};
  }
};

// Calls `body(i, part)` for the vectors of a group, which adds to `sums`.
template <class Body, class S>
static inline __attribute__((always_inline)) void over(const Group& group, S& sums, Body body) {
  int64_t i = group.start, vectors = 0;
  for (; vectors < group.whole; i += group.step) {
    body(i, Whole{});
    if (++vectors % 32 == 0) sums.put_by();
  }
  if (group.planes && group.whole > 0) {
    if (i < group.stop) body(group.stop - LANES, Last(i + LANES - group.stop));
    i = group.stop;
  }
  for (; i < group.stop; i += group.step) {
    body(i, Tail{group.planes ? group.stop - i : group.count});
    if (++vectors % 32 == 0) sums.put_by();
  }
  sums.put_by();
}

struct Pair {
  V x, u;
};
// s x and u, less what is given.
template <class Part>
static inline Pair load(const Sample& at, const Job& job, int64_t i, Part part, V mean_x, V mean_u) {
  const V x = job.scale * part.load(at.x + i);
  return {x - mean_x, x + part.load(at.f + i) - mean_u};
}

// Sums of squares lose digits far from the mean. That of an eighth of the positions is near enough: where it is not,
// the variance is large.
static void find_moments(const Sample at, const Job job) {
  const int64_t n = job.channels, few = std::min(job.positions, std::max(job.positions / 8, int64_t(64)));
  float* m = at.moments;
  for (int64_t first = 0; first < n; first += Group(job, first).count) {
    const Group group(job, first), some(job, first, few);
    Sums<2> near;
    over(some, near, [&](int64_t i, auto part) {
      const Pair v = load(at, job, i, part, V{}, V{});
      near.lanes[0] += part.keep(v.x);
      near.lanes[1] += part.keep(v.u);
    });
    near.store(some, [&](int64_t j, const double* sums) {
      for (int p = 0; p < 2; p++) m[p * n + j] = sums[p] / few;
    });
    const V near_x = group.load(m), near_u = group.load(m + n);
    Sums<5> rest;
    over(group, rest, [&](int64_t i, auto part) {
      const Pair v = load(at, job, i, part, near_x, near_u);
      const V x = part.keep(v.x), u = part.keep(v.u);
      rest.lanes[0] += x;
      rest.lanes[1] += u;
      rest.lanes[2] += x * x;
      rest.lanes[3] += u * u;
      rest.lanes[4] += x * u;
    });
    rest.store(group, [&](int64_t j, const double* sums) {
      double mean[2], left[2];  // `left` is what rounding the mean leaves of it
      for (int p = 0; p < 2; p++) {
        mean[p] = sums[p] / job.positions;
        const double whole = m[p * n + j] + mean[p];
        m[p * n + j] = whole;
        left[p] = whole - m[p * n + j];
      }
      const auto about = [&](double sum, int p, int q) {
        return sum / job.positions - mean[p] * mean[q] + left[p] * left[q];
      };
      m[2 * n + j] = std::max(about(sums[2], 0, 0), 0.0);
      m[3 * n + j] = std::max(about(sums[3], 1, 1), 0.0);
      m[4 * n + j] = about(sums[4], 0, 1);
    });
  }
}

// `_chain` of `skip_kernels_maps.py`. Of each step a, c and e of what is normalised, over its standard deviation, which
// is `1 / rstd`; behind those of all steps, those of y_K.
struct Chain {
  std::vector<double> states, rstd;
  double* state(int64_t k, const Job& job) { return states.data() + 3 * k * job.channels; }
  Chain(const float* m, const float* w, const float* b, const Job& job)
      : states(3 * (job.steps + 1) * job.channels), rstd(job.steps) {
    const int64_t n = job.channels;
    double *a = state(0, job), *c = a + n, *e = c + n;
    for (int64_t j = 0; j < n; j++) a[j] = 0, c[j] = 1, e[j] = m[n + j];
    for (int64_t k = 0; k < job.steps; k++, w += n, b += n) {
      double mean = 0, square = 0;
#pragma omp simd reduction(+ : mean)
      for (int64_t j = 0; j < n; j++) mean += e[j];
      mean = job.centred ? mean / n : 0;
#pragma omp simd reduction(+ : square)
      for (int64_t j = 0; j < n; j++) {
        e[j] -= mean;
        square += a[j] * a[j] * (m[2 * n + j] + 1e-34) + c[j] * c[j] * (m[3 * n + j] + 1e-34) +
                  2 * a[j] * c[j] * m[4 * n + j] + e[j] * e[j];
      }
      const double r = rstd[k] = 1 / std::sqrt(std::max(square / n, 0.0) + job.eps), more = k + 1 < job.steps;
      double *next_a = state(k + 1, job), *next_c = next_a + n, *next_e = next_c + n;
#pragma omp simd
      for (int64_t j = 0; j < n; j++) {
        a[j] *= r, c[j] *= r, e[j] *= r;
        next_a[j] = w[j] * a[j] + more, next_c[j] = w[j] * c[j], next_e[j] = w[j] * e[j] + b[j] + more * m[j];
      }
      a = next_a, c = next_c, e = next_e;
    }
  }
};

// `_chain_backward`: takes the gradients of a, c and e of y_K, leaves those of the moments in `of`, (5, channels), and
// those of gains and biases in `dw` and `db`.
static void chain_backward(Chain& chain, double* g, const float* m, const float* w, const Job& job, double* of,
                           double* dw, double* db) {
  const int64_t n = job.channels;
  double *ga = g, *gc = g + n, *ge = gc + n;
  std::fill(of, of + 5 * n, 0.0);
  for (int64_t k = job.steps - 1; k >= 0; k--) {
    const double *a = chain.state(k, job), *c = a + n, *e = c + n, r = chain.rstd[k];
    double along = 0, mean = 0, *of_mean = of + (k > 0 ? 0 : n);
#pragma omp simd reduction(+ : along)
    for (int64_t j = 0; j < n; j++) {
      dw[k * n + j] = ga[j] * a[j] + gc[j] * c[j] + ge[j] * e[j];
      db[k * n + j] = ge[j];
      along += w[k * n + j] * dw[k * n + j];
    }
    along /= n;
#pragma omp simd reduction(+ : mean)
    for (int64_t j = 0; j < n; j++) {
      const double gain = w[k * n + j], xx = m[2 * n + j], uu = m[3 * n + j], xu = m[4 * n + j];
      of[2 * n + j] -= along * a[j] * a[j] / 2;
      of[3 * n + j] -= along * c[j] * c[j] / 2;
      of[4 * n + j] -= along * a[j] * c[j];
      ga[j] = r * (gain * ga[j] - along * (xx * a[j] + xu * c[j]));
      gc[j] = r * (gain * gc[j] - along * (uu * c[j] + xu * a[j]));
      ge[j] = r * (gain * ge[j] - along * e[j]);
      mean += ge[j];
    }
    mean = job.centred ? mean / n : 0;
    for (int64_t j = 0; j < n; j++) of_mean[j] += ge[j] -= mean;
  }
}

static void forward(const Sample at, const float* w, const float* b, const Job job) {
  const int64_t n = job.channels;
  find_moments(at, job);
  Chain chain(at.moments, w, b, job);
  const double* last = chain.state(job.steps, job);
  const std::vector<float> numbers(last, last + 3 * n);
  NoSums none;
  for (int64_t first = 0; first < n; first += Group(job, first).count) {
    const Group group(job, first);
    const V mean_x = group.load(at.moments), mean_u = group.load(at.moments + n), a = group.load(numbers.data());
    const V c = group.load(numbers.data() + n), e = group.load(numbers.data() + 2 * n);
    over(group, none, [&](int64_t i, auto part) {
      const Pair v = load(at, job, i, part, mean_x, mean_u);
      part.store(a * v.x + c * v.u + e, at.y + i);
    });
  }
}

static void backward(const Sample at, const float* w, const float* b, const Job job, double* dw, double* db) {
  const int64_t n = job.channels;
  const float* m = at.moments;
  std::vector<double> sums(3 * n), of(5 * n);
  for (int64_t first = 0; first < n; first += Group(job, first).count) {
    const Group group(job, first);
    const V mean_x = group.load(m), mean_u = group.load(m + n);
    Sums<3> sum;
    over(group, sum, [&](int64_t i, auto part) {
      const Pair v = load(at, job, i, part, mean_x, mean_u);
      const V g = part.keep(part.load(at.gradient + i));
      sum.lanes[0] += g * v.x;
      sum.lanes[1] += g * v.u;
      sum.lanes[2] += g;
    });
    sum.store(group, [&](int64_t j, const double* found) {
      for (int p = 0; p < 3; p++) sums[p * n + j] = found[p];
    });
  }
  const std::vector<double> of_e(sums.begin() + 2 * n, sums.end());
  Chain chain(m, w, b, job);
  chain_backward(chain, sums.data(), m, w, job, of.data(), dw, db);
  // Of s x and of u: what multiplies gradient - mean, s x - mean, u - mean and 1; then the mean of the gradient.
  const double *a = chain.state(job.steps, job), *c = a + n, over_p = 1.0 / job.positions;
  std::vector<float> numbers(9 * n);
  for (int64_t j = 0; j < n; j++) {
    const double xx = 2 * of[2 * n + j] * over_p, uu = 2 * of[3 * n + j] * over_p, xu = of[4 * n + j] * over_p;
    const double of_x[4] = {a[j], xx, xu, of[j] * over_p};
    const double of_u[4] = {c[j], xu, uu, of[n + j] * over_p};
    for (int p = 0; p < 4; p++) {
      numbers[p * n + j] = job.scale * (of_x[p] + of_u[p]);
      numbers[(4 + p) * n + j] = of_u[p];
    }
    numbers[8 * n + j] = of_e[j] * over_p;
  }
  NoSums none;
  for (int64_t first = 0; first < n; first += Group(job, first).count) {
    const Group group(job, first);
    const V mean_x = group.load(m), mean_u = group.load(m + n);
    V by[9];
    for (int p = 0; p < 9; p++) by[p] = group.load(numbers.data() + p * n);
    over(group, none, [&](int64_t i, auto part) {
      const Pair v = load(at, job, i, part, mean_x, mean_u);
      const V g = part.load(at.gradient + i) - by[8];
      part.store(by[0] * g + by[1] * v.x + by[2] * v.u + by[3], at.dx + i);
      part.store(by[4] * g + by[5] * v.x + by[6] * v.u + by[7], at.df + i);
    });
  }
}

// `sizes` are samples, positions, channels, K, planes, centred; `numbers` eps, scale. `moments` is
// (samples, 5, channels), gains and biases are (K, channels).
static Job make_job(const int64_t* sizes, const double* numbers) {
  return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4] != 0, sizes[5] != 0, float(numbers[1]), numbers[0]};
}

extern "C" void rskip_maps_forward(const TX* x, const TF* f, const float* w, const float* b, TY* y, float* moments,
                                   const int64_t* sizes, const double* numbers, int threads) {
  const Job job = make_job(sizes, numbers);
  const int64_t size = job.positions * job.channels;
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < job.samples; i++)
    forward({x + i * size, f + i * size, moments + i * 5 * job.channels, y + i * size}, w, b, job);
}

// `partial` is (samples, 2, K, channels), of gains and biases.
extern "C" void rskip_maps_backward(const TY* gradient, const TX* x, const TF* f, const float* w, const float* b,
                                    float* moments, TX* dx, TF* df, double* partial, const int64_t* sizes,
                                    const double* numbers, int threads) {
  const Job job = make_job(sizes, numbers);
  const int64_t size = job.positions * job.channels, of_affine = job.steps * job.channels;
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < job.samples; i++) {
    const int64_t p = i * size;
    double* dw = partial + 2 * i * of_affine;
    backward({x + p, f + p, moments + i * 5 * job.channels, nullptr, gradient + p, dx + p, df + p}, w, b, job, dw,
             dw + of_affine);
  }
}
"""
)
