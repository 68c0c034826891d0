// Log-probability of one target per row, optionally the row's entropy, and the gradient of both.
// ISA-generic; see simd.h.
//
// With u = z - m and t = log2(e) / temperature * u, both follow from d = sum 2^t and s = sum t 2^t.
// The offset m starts as the maximum of the row's first elements: that of the whole row would need
// a second pass, and an online maximum costs more than the exponential. A block whose sum shows
// that m was too low is summed again with its true maximum. Nothing depends on alignment or on
// other rows, and d does not depend on whether s is requested.

constexpr int64_t kBlock = 4096;  // float32 sums within a block, double across blocks
constexpr int64_t kFirst = 256;   // the first offset is the maximum of this many elements
constexpr float kFloor = -1024;   // keeps t * 2^t at 0 where t = -inf

template <class E>
SIMD float block_max(const E* z, int64_t n) {
  F best = splat(-INFINITY);
  int64_t i = 0;
  for (; i + W <= n; i += W) best = max(best, load(z + i));
  if (i < n) best = max(best, load_partial(z + i, n - i));
  return max_lane(best);
}

template <bool kEntropy>
SIMD void accumulate(F z, F m, F c, F lowest, F& d, F& s) {
  const F u = max(lowest, z - m), t = u * c, n = round(t);
  const F e = exp2(n, fma(u, c, -n));  // not t - n, because t is rounded
  d += e;
  if (kEntropy) s = fma(e, t, s);
}

template <class E, bool kEntropy>
SIMD void block_sums(const E* z, int64_t n, float offset, float scale, double& d, double& s) {
  const F m = splat(offset), c = splat(scale), lowest = splat(kFloor / scale);
  F d_total = {}, s_total = {};
  int64_t i = 0;
  while (i + 4 * W <= n) {  // short chains of additions: equal elements all round the same way
    F ds[4] = {}, ss[4] = {};
    for (const int64_t stop = std::min(n, i + 64 * W); i + 4 * W <= stop; i += 4 * W) {
#pragma GCC unroll 2
      for (int k = 0; k < 4; k += 2) {
        F a, b;
        load_pair(z + i + k * W, a, b);
        accumulate<kEntropy>(a, m, c, lowest, ds[k], ss[k]);
        accumulate<kEntropy>(b, m, c, lowest, ds[k + 1], ss[k + 1]);
      }
    }
    d_total += (ds[0] + ds[1]) + (ds[2] + ds[3]);
    s_total += (ss[0] + ss[1]) + (ss[2] + ss[3]);
  }
  for (; i + W <= n; i += W) accumulate<kEntropy>(load(z + i), m, c, lowest, d_total, s_total);
  if (i < n) accumulate<kEntropy>(load_partial(z + i, n - i), m, c, lowest, d_total, s_total);
  d = sum(d_total);
  s = sum(s_total);
}

struct RowSums {
  float m;
  double d, s;
};

template <class E, bool kEntropy>
RowSums row_sums(const E* z, int64_t V, float c) {
  float m = block_max(z, std::min(V, kFirst));
  double d = 0, s = 0;
  for (int64_t i = 0; i < V; i += kBlock) {
    const int64_t n = std::min(V - i, kBlock);
    double block_d = NAN, block_s;
    if (m != -INFINITY) block_sums<E, kEntropy>(z + i, n, m, c, block_d, block_s);
    if (!(block_d >= 0 && block_d <= n)) {  // some z is above m, or NaN, or no offset yet
      const float higher = std::max(m, block_max(z + i, n));
      if (higher == -INFINITY) continue;
      if (d > 0) {
        const double shift = (double(m) - higher) * c, factor = std::exp2(shift);
        s = (s + shift * d) * factor;
        d *= factor;
      }
      m = higher;
      block_sums<E, kEntropy>(z + i, n, m, c, block_d, block_s);
    }
    d += block_d;
    s += block_s;
  }
  return {m, d, s};
}

template <class E> SIMD double element(const E* z, int64_t j) { return load_partial(z + j, 1)[0]; }

template <class E>
void logprobs_fwd(const LogprobsArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / a.T, t = row % a.T;
    double logprob = 0, entropy = 0, offset = 0, rest = 0;
    if (!a.mask || a.mask.at(b, t)) {
      const E* z = a.logits.at<const E>(b, t);
      const float c = static_cast<float>(kLog2e / a.temperature_at(b, t));
      const double inverse = c * kLn2;  // 1 / temperature with the rounding of c, as in the sums
      const RowSums r = a.entropy ? row_sums<E, true>(z, a.V, c) : row_sums<E, false>(z, a.V, c);
      const double log_d = std::log(r.d);
      logprob = (element(z, a.targets.at(b, t)) - r.m) * inverse - log_d;
      entropy = log_d - r.s / r.d * kLn2;
      if (logprob > 0) logprob = 0;  // keeps NaN
      if (entropy < 0) entropy = 0;
      // `offset` is the whole log-sum-exp and `rest` its rounding error, so that the backward loses
      // no digits in p = exp((z - offset) / T - rest).
      offset = static_cast<float>(r.m + log_d / inverse);
      rest = (r.m - offset) * inverse + log_d;
    }
    a.logprobs[row] = static_cast<float>(logprob);
    if (a.entropy) a.entropy[row] = static_cast<float>(entropy);
    if (!a.lse) continue;
    a.lse[2 * row] = static_cast<float>(offset);
    a.lse[2 * row + 1] = static_cast<float>(rest);
  }
}

// The gradient everywhere except at the target: dz_j = p_j * (slope * log2 p_j + level).
struct GradientLine { F m, c, rest, slope, level; };

template <bool kEntropy>
SIMD F gradient(F z, const GradientLine& g) {
  const F t = fma(z - g.m, g.c, g.rest), n = round(t), p = exp2(n, t - n);
  return p * (kEntropy ? fma(max(t, splat(kFloor)), g.slope, g.level) : g.level);
}

template <class E, bool kEntropy>
void gradient_row(const E* z, E* dz, int64_t V, const GradientLine& g) {
  int64_t i = 0;
#pragma GCC unroll 2
  for (; i + 2 * W <= V; i += 2 * W) {
    F a, b;
    load_pair(z + i, a, b);
    store_pair(dz + i, gradient<kEntropy>(a, g), gradient<kEntropy>(b, g));
  }
  if (i + W <= V) store(dz + i, gradient<kEntropy>(load(z + i), g)), i += W;
  if (i < V) store_partial(dz + i, gradient<kEntropy>(load_partial(z + i, V - i), g), V - i);
}

template <class E>
void logprobs_bwd(const LogprobsArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / a.T, t = row % a.T;
    E* dz = a.dlogits.at<E>(b, t);
    const double g = a.dlogprobs.at(b, t), h = a.dentropy ? a.dentropy.at(b, t) : 0;
    if ((a.mask && !a.mask.at(b, t)) || (g == 0 && h == 0)) {
      std::memset(dz, 0, a.V * sizeof(E));
      continue;
    }
    const E* z = a.logits.at<const E>(b, t);
    const int64_t y = a.targets.at(b, t);
    const double temperature = a.temperature_at(b, t);
    const float c = static_cast<float>(kLog2e / temperature);
    const double inverse = c * kLn2;
    const float m = a.lse[2 * row], rest = a.lse[2 * row + 1];
    const double entropy = h == 0 ? 0 : a.entropy[row];
    const GradientLine line = {splat(m), splat(c), splat(static_cast<float>(-rest * kLog2e)),
                               splat(static_cast<float>(-h * kLn2 / temperature)),
                               splat(static_cast<float>(-(g + h * entropy) / temperature))};
    E at_target = {};
    if (y >= 0 && y < a.V) {  // otherwise in another part of the vocabulary
      double logp = (element(z, y) - m) * inverse - rest;  // before gradient_row, as dz may be z
      if (logp > 0) logp = 0;
      double dz_y = -g * std::expm1(logp);  // 1 - p without cancellation
      if (h != 0 && logp != -INFINITY) dz_y -= h * std::exp(logp) * (logp + entropy);
      store_partial(&at_target, splat(static_cast<float>(dz_y / temperature)), 1);
    }
    h != 0 ? gradient_row<E, true>(z, dz, a.V, line) : gradient_row<E, false>(z, dz, a.V, line);
    if (y >= 0 && y < a.V) dz[y] = at_target;
  }
}
