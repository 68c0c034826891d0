// Draws one token per row of logits and returns its log-probs. rlhf_core/ops/sampling.py defines
// which token is drawn. ISA-generic; see simd.h.
//
// Only the sum of exponentials of each block is stored. The uniform number picks a block, whose
// exponentials are computed again to pick the token. Truncation searches for the smallest logit to
// keep: a sorted sample narrows its range, a pass collects the logits in that range, and so on.

constexpr int64_t kDraw = 1024;  // elements per block
constexpr int kSample = 128;     // a multiple of W, and small enough to sort

double uniform(uint64_t seed, uint64_t counter) {  // in (0, 1), by Philox4x32-10
  uint32_t k0 = seed, k1 = seed >> 32, c0 = counter, c1 = counter >> 32, c2 = 0, c3 = 0;
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = 0xD2511F53 * uint64_t(c0), b = 0xCD9E8D57 * uint64_t(c2);
    c0 = uint32_t(b >> 32) ^ c1 ^ k0, c1 = uint32_t(b);
    c2 = uint32_t(a >> 32) ^ c3 ^ k1, c3 = uint32_t(a);
    k0 += 0x9E3779B9, k1 += 0xBB67AE85;
  }
  return (c0 + 0.5) / 4294967296.0;
}

struct Exponential { float m, c; };  // maps a logit z to 2^((z - m) c)

SIMD F exponential(F z, Exponential of) {
  const F u = max(splat(kFloor / of.c), z - of.m), n = round(u * of.c);
  return exp2(n, fma(u, splat(of.c), -n));
}

SIMD float next_above(float x) { return std::nextafter(x, INFINITY); }

// The weight at or above `high`, and in [low, high), which holds n elements.
struct Part {
  double above, inside;
  int64_t n;
};

template <bool kMass>
SIMD void narrow_step(F z, I real, F low, F high, Exponential of, F& above, F& inside,
                      float*& out) {
  const I reached = (z >= low) & real;
  if (!lane_bits(reached)) return;
  const F weight = kMass ? exponential(z, of) : splat(1);
  const I over = z >= high;
  above += zero_unless(reached & over, weight);
  inside += zero_unless(reached & ~over, weight);
  if (out) out = compress(out, z, reached & ~over);
}

// Copies what is in [low, high) to `out`, unless null, which has room for W more. No z may be NaN.
template <class E, bool kMass>
Part narrow(const E* z, int64_t n, float low, float high, Exponential of, float* out) {
  Part part = {};
  float* end = out;
  int64_t i = 0;
  while (i < n) {
    F above = {}, inside = {};
    for (const int64_t stop = std::min(n, i + 32 * W); i + W <= stop; i += W)
      narrow_step<kMass>(load(z + i), ~I{}, splat(low), splat(high), of, above, inside, end);
    if (n - i < W) {
      I real;
      for (int k = 0; k < W; ++k) real[k] = -(i + k < n);
      const F rest = load_partial(z + i, n - i);
      narrow_step<kMass>(rest, real, splat(low), splat(high), of, above, inside, end);
      i = n;
    }
    part.above += sum(above), part.inside += sum(inside);
  }
  part.n = end - out;
  return part;
}

// Sorts kSample elements by rank. This compares all pairs, but without branches to mispredict.
SIMD void sort_descending(float* x) {
  float sorted[kSample];
  for (int k = 0; k < kSample; k += W) {
    const F v = load(x + k);
    I rank = {}, at;
    for (int lane = 0; lane < W; ++lane) at[lane] = k + lane;
    for (int j = 0; j < k; ++j) rank -= splat(x[j]) >= v;  // ties keep their order
    for (int j = k; j < k + W; ++j) rank -= (splat(x[j]) > v) | ((splat(x[j]) == v) & (at > j));
    for (int j = k + W; j < kSample; ++j) rank -= splat(x[j]) > v;
    for (int lane = 0; lane < W; ++lane) sorted[rank[lane]] = v[lane];
  }
  std::memcpy(x, sorted, sizeof sorted);
}

// Searches for the largest value such that all values at or above it weigh at least `need`. It is
// in [low, high), which holds n values of weight `inside`. Values at or above `high` weigh `above`.
struct Search {
  double need, above, inside;
  int64_t n;
  float low, high;
  float *found, *spare;
};

// One round of the search among s.n values. Returns true if s.low is the answer.
template <class E, bool kMass>
bool search_among(const E* z, Search& s, Exponential of) {
  float sample[kSample], weights[kSample];
  const int count = static_cast<int>(std::min<int64_t>(s.n, kSample));
  for (uint64_t k = 0; k < kSample; ++k) {  // golden-ratio steps: even, and in no pattern
    const int64_t spread = static_cast<int64_t>((k * 0x9E3779B97F4A7C15 >> 32) * s.n >> 32);
    const int64_t j = s.n <= kSample ? k : spread;
    sample[k] = j < s.n ? static_cast<float>(element(z, j)) : -INFINITY;
  }
  sort_descending(sample);
  for (int k = 0; k < kSample; k += W)
    store(weights + k, kMass ? exponential(load(sample + k), of) : splat(1));
  if (s.n <= kSample) {
    for (int k = 0; k < count; ++k) {
      s.low = sample[k];
      if ((s.above += weights[k]) >= s.need) break;
    }
    return true;
  }
  // Count up from the many small weights, because the sample may miss the few large ones.
  const double rest = (s.above + s.inside - s.need) * count / s.n;
  double tail = 0;
  int i = count;
  while (i > 0 && tail + weights[i - 1] <= rest) tail += weights[--i];
  const double sigma = std::sqrt(double(i) * (count - i) / count);
  const int slack = 3 + static_cast<int>(2 * sigma);
  float low = i + slack < count ? sample[i + slack] : s.low;
  float high = i - slack > 0 ? sample[i - slack - 1] : s.high;
  // An empty or full range would not narrow the search, so take the single value `low`.
  if (low == high || (high == s.high && low == sample[count - 1])) high = next_above(low);
  Part part = narrow<E, kMass>(z, s.n, low, high, of, s.spare);
  if (s.above + part.above >= s.need) {
    low = high, high = s.high;
    part = narrow<E, kMass>(z, s.n, low, high, of, s.spare);
  } else if (s.above + part.above + part.inside < s.need) {
    high = low, low = s.low;
    part = narrow<E, kMass>(z, s.n, low, high, of, s.spare);
  }
  // Rounding can leave no values in the range, or all of them.
  const bool done = next_above(low) == high || part.n == 0 || part.n == s.n;
  s = {s.need, s.above + part.above, part.inside, part.n, low, high, s.spare, s.found};
  return done;
}

template <class E, bool kMass>
float threshold(const E* z, int64_t n, double need, double all, Exponential of, float* scratch,
                int64_t room) {
  Search s = {need, 0, all, n, -INFINITY, INFINITY, scratch, scratch + room};
  for (bool done = search_among<E, kMass>(z, s, of); !done;)
    done = search_among<float, kMass>(s.found, s, of);
  return s.low;
}

template <class E>
float truncation(const SamplingArgs& a, const E* z, double all, Exponential of, float* scratch) {
  const int64_t room = a.V + W;
  float least = -INFINITY;
  if (a.top_k) least = threshold<E, false>(z, a.V, a.top_k, a.V, of, scratch, room);
  if (a.top_p && a.top_k) {
    float* left = scratch + 2 * room;
    const Part part = narrow<E, true>(z, a.V, least, INFINITY, of, left);
    const double all_left = part.inside;
    least = threshold<float, true>(left, part.n, a.top_p * all_left, all_left, of, scratch, room);
  } else if (a.top_p) {
    least = threshold<E, true>(z, a.V, a.top_p * all, all, of, scratch, room);
  }
  if (a.min_p) {
    const double lowest = of.m + a.temperature * std::log(a.min_p);
    const float rounded = static_cast<float>(lowest);
    least = std::max(least, rounded < lowest ? next_above(rounded) : rounded);
  }
  return least;
}

// Sets of.m to the row's maximum and `sums` to the blocks' sums relative to it. Returns the total:
// NaN if a z is NaN or inf, 0 if all are -inf.
template <class E>
double block_masses(const E* z, int64_t V, Exponential& of, double* sums, float* offsets) {
  of.m = -INFINITY;
  for (int64_t i = 0, k = 0; i < V; i += kDraw, ++k) {
    const int64_t n = std::min(V - i, kDraw);
    of.m = std::max(of.m, block_max(z + i, n));
    offsets[k] = of.m == -INFINITY ? 0 : of.m;
    double unused;
    block_sums<E, false>(z + i, n, offsets[k], of.c, sums[k], unused);
  }
  double all = 0;
  for (int64_t i = 0, k = 0; i < V; i += kDraw, ++k) {
    if (sums[k] != 0 && offsets[k] != of.m)
      sums[k] *= std::exp2((double(offsets[k]) - of.m) * of.c);
    all += sums[k];
  }
  return all;
}

// The first element where the running mass of the elements >= `least` exceeds `at`.
template <class E>
int64_t draw(const E* z, int64_t V, const double* sums, double at, float least, Exponential of) {
  int64_t begin = 0, last = 0;
  double before = 0;
  while (begin + kDraw < V && before + *sums <= at) before += *sums++, begin += kDraw;
  const int64_t n = std::min(V - begin, kDraw);
  float masses[kDraw];
  for (int64_t i = 0; i < n; i += W) {
    const F x = n - i < W ? load_partial(z + begin + i, n - i) : load(z + begin + i);
    store(masses + i, zero_unless(x >= least, exponential(x, of)));
  }
  for (int64_t i = 0; i < n; ++i) {
    if (masses[i] == 0) continue;
    last = i;
    if ((before += masses[i]) > at) break;
  }
  return begin + last;
}

template <class E>
void sample_tokens(const SamplingArgs& a, int64_t begin, int64_t end) {
  const int64_t blocks = (a.V + kDraw - 1) / kDraw;
  double* sums = a.sums;
  float *offsets = a.scratch, *scratch = offsets + blocks;
  for (int64_t row = begin; row < end; ++row) {
    const E* z = a.logits.at<const E>(row, 0);
    Exponential of = {0, static_cast<float>(kLog2e / a.temperature)};
    const double all = block_masses(z, a.V, of, sums, offsets), inverse = of.c * kLn2;
    double kept = all, chosen = NAN;
    int64_t token = 0;
    if (all > 0) {
      float least = -INFINITY;
      if (a.full_logprobs) {
        least = truncation(a, z, all, of, scratch), kept = 0;
        for (int64_t k = 0; k < blocks; ++k) {
          const int64_t n = std::min(a.V - k * kDraw, kDraw);
          kept += sums[k] = narrow<E, true>(z + k * kDraw, n, least, INFINITY, of, nullptr).inside;
        }
      }
      token = draw(z, a.V, sums, uniform(a.seeds[row], a.counters[row]) * kept, least, of);
      chosen = (element(z, token) - of.m) * inverse;
    }
    a.tokens[row] = token;
    const double logprob = chosen - std::log(kept), full = chosen - std::log(all);
    a.logprobs[row] = static_cast<float>(logprob > 0 ? 0 : logprob);  // keeps NaN
    if (a.full_logprobs) a.full_logprobs[row] = static_cast<float>(full > 0 ? 0 : full);
  }
}
