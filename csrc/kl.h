// KL(policy || reference) and its gradient: per-token estimators from log-probs, and the exact
// value from two rows of logits. ISA-generic; see simd.h.

// k3 = exp(-d) - 1 + d. Near 0 the difference would cancel, so it uses a series. Below -20 it
// follows the tangent, so that value and gradient stay finite.
SIMD F k3(F d) {
  const F held = max(splat(-20), d), beyond = max(splat(0), -20.f - d), e = exp(-held);
  F series = fma(d, splat(1 / 360.f), splat(-1 / 60.f));
  series = fma(d, series, splat(1 / 12.f));
  series = fma(d, series, splat(-1 / 3.f));
  series = fma(d, series, splat(1.f)) * (d * d * 0.5f);
  return select((d < 0.125f) & (d > -0.125f), series, fma(e - 1.f, beyond, e - 1.f + held));
}

SIMD F k3_slope(F d) {  // 1 - exp(-d), in the same way
  F series = fma(d, splat(1 / 120.f), splat(-1 / 24.f));
  series = fma(d, series, splat(1 / 6.f));
  series = fma(d, series, splat(-0.5f));
  series = fma(d, series, splat(1.f)) * d;
  return select((d < 0.125f) & (d > -0.125f), series, 1.f - exp(-max(splat(-20), d)));
}

template <Estimator kEstimator>
SIMD F kl_value(F d) {
  if (kEstimator == kK1) return d;
  if (kEstimator == kK2) return d * d * 0.5f;
  if (kEstimator == kK3) return k3(d);
  return (F)((I)d & 0x7fffffff);
}

template <Estimator kEstimator>
SIMD F kl_slope(F d) {
  if (kEstimator == kK1) return splat(1.f);
  if (kEstimator == kK2) return d;
  if (kEstimator == kK3) return k3_slope(d);
  return select(d > 0.f, splat(1.f), select(d < 0.f, splat(-1.f), d));  // keeps 0 and NaN
}

// Of n elements, at most W. n is the constant W except at the end of a row.
template <class E> SIMD F load_n(const E* p, int64_t n) {
  return n >= W ? load(p) : load_partial(p, n);
}
template <class E> SIMD void store_n(E* p, F v, int64_t n) {
  n >= W ? store(p, v) : store_partial(p, v, n);
}

SIMD I load_mask(const bool* p, int64_t n) {
  B8 bytes = {};
  std::memcpy(&bytes, p, n);
  return __builtin_convertvector(bytes, I) != 0;
}

// Elements [i, i + n). Masked results are exactly 0, whatever the inputs hold.
template <Estimator kEstimator, bool kBackward>
SIMD void kl_step(const KlArgs& a, int64_t i, int64_t n) {
  const F d = load_n(a.logprobs + i, n) - load_n(a.ref_logprobs + i, n);
  F result = kBackward ? load_n(a.dkl + i, n) * kl_slope<kEstimator>(d) : kl_value<kEstimator>(d);
  if (a.mask) result = zero_unless(load_mask(a.mask + i, n), result);
  store_n((kBackward ? a.dlogprobs : a.kl) + i, result, n);
  if (kBackward) store_n(a.dref_logprobs + i, F{} - result, n);
}

template <Estimator kEstimator, bool kBackward>
void kl_estimate(const KlArgs& a, int64_t begin, int64_t end) {
  int64_t i = begin;
  for (; i + W <= end; i += W) kl_step<kEstimator, kBackward>(a, i, W);
  if (i < end) kl_step<kEstimator, kBackward>(a, i, end - i);
}

constexpr Kernel<KlArgs> kKlFwd[kEstimators] = {kl_estimate<kK1, false>, kl_estimate<kK2, false>,
                                                kl_estimate<kK3, false>, kl_estimate<kAbs, false>};

// The exact KL, in one pass over both rows as in logprobs.h. For logits a and b with offsets m_a
// and m_b, let u = a - m_a, v = b - m_b and c = log2(e) / temperature. The sums p = sum 2^(c u), q
// = sum 2^(c v) and s = sum 2^(c u) (u - v) give
//     KL = s / p / temperature - log p + log q

constexpr float kNoOffset = -3e38f;  // for logits of -inf; any other shows that it is too low

struct KlSums { double p, q, s; };

// Constants of a row's loop. u and v are clamped to `lowest`: 2^(c * lowest) is already 0, and for
// a logit such as -1e30 the rounding of c * u would leave no meaningful fraction.
struct KlOffsets { F m_a, m_b, c, lowest; };

SIMD F power(F u, const KlOffsets& o) {
  const F x = max(o.lowest, u), n = round(x * o.c);
  return exp2(n, fma(x, o.c, -n));
}

SIMD void kl_accumulate(F a, F b, const KlOffsets& o, F& p, F& q, F& s) {
  const F u = a - o.m_a, v = b - o.m_b, e = power(u, o);
  p += e;
  q += power(v, o);
  s = fma(e, zero_unless(e != 0.f, u - v), s);  // 0 where p = 0, even if q = 0
}

template <class E>
SIMD KlSums kl_block(const E* a, const E* b, int64_t n, float m_a, float m_b, float scale) {
  const KlOffsets o = {splat(m_a), splat(m_b), splat(scale), splat(-256 / scale)};
  F p_total = {}, q_total = {}, s_total = {};
  int64_t i = 0;
  while (i + 2 * W <= n) {  // short chains of additions, as in block_sums
    F p[2] = {}, q[2] = {}, s[2] = {}, x[2], y[2];
    for (const int64_t stop = std::min(n, i + 32 * W); i + 2 * W <= stop; i += 2 * W) {
      load_pair(a + i, x[0], x[1]);
      load_pair(b + i, y[0], y[1]);
      kl_accumulate(x[0], y[0], o, p[0], q[0], s[0]);
      kl_accumulate(x[1], y[1], o, p[1], q[1], s[1]);
    }
    p_total += p[0] + p[1];
    q_total += q[0] + q[1];
    s_total += s[0] + s[1];
  }
  for (; i < n; i += W) {
    const int64_t k = std::min<int64_t>(n - i, W);
    kl_accumulate(load_n(a + i, k), load_n(b + i, k), o, p_total, q_total, s_total);
  }
  return {sum(p_total), sum(q_total), sum(s_total)};
}

template <class E>
KlSums kl_row(const E* a, const E* b, int64_t V, float c, float& m_a, float& m_b) {
  KlSums row = {};
  m_a = std::max(kNoOffset, block_max(a, std::min(V, kFirst)));
  m_b = std::max(kNoOffset, block_max(b, std::min(V, kFirst)));
  for (int64_t i = 0; i < V; i += kBlock) {
    const int64_t n = std::min(V - i, kBlock);
    KlSums block = kl_block(a + i, b + i, n, m_a, m_b, c);
    const bool valid = block.p >= 0 && block.p <= n && block.q >= 0 && block.q <= n;
    if (!valid) {  // an offset is too low, or there is a NaN
      const float higher_a = std::max(m_a, block_max(a + i, n));
      const float higher_b = std::max(m_b, block_max(b + i, n));
      const double shift_a = double(m_a) - higher_a, shift_b = double(m_b) - higher_b;
      const double factor_a = std::exp2(shift_a * c), factor_b = std::exp2(shift_b * c);
      row.s += (shift_a - shift_b) * row.p;
      row.s = factor_a > 0 ? row.s * factor_a : 0;  // avoids inf * 0
      row.p *= factor_a;
      row.q *= factor_b;
      m_a = higher_a, m_b = higher_b;
      block = kl_block(a + i, b + i, n, m_a, m_b, c);
    }
    row.p += block.p, row.q += block.q, row.s += block.s;
  }
  return row;
}

template <class E>
void full_kl_fwd(const FullKlArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / a.T, t = row % a.T;
    double kl = 0;
    float* lse = a.lse + 4 * row;
    for (int k = 0; k < 4; ++k) lse[k] = 0;
    if (!a.mask || a.mask.at(b, t)) {
      const float c = static_cast<float>(kLog2e / a.temperature_at(b, t));
      const double inverse = c * kLn2;  // 1 / temperature with the rounding of c, as in the sums
      float m[2];
      const E *z_a = a.logits.at<const E>(b, t), *z_b = a.ref_logits.at<const E>(b, t);
      const KlSums r = kl_row(z_a, z_b, a.V, c, m[0], m[1]);
      const double logs[2] = {std::log(r.p), std::log(r.q)};
      kl = r.s / r.p * inverse - logs[0] + logs[1];
      if (kl < 0) kl = 0;  // keeps NaN
      for (int k = 0; k < 2; ++k) {
        lse[2 * k] = static_cast<float>(m[k] + logs[k] / inverse);
        lse[2 * k + 1] = static_cast<float>((m[k] - lse[2 * k]) * inverse + logs[k]);
      }
    }
    a.kl[row] = static_cast<float>(kl);
  }
}

// log p - log q - KL = (u - v - mean) / temperature, with the offsets in lse and mean = E_p[u - v].
// The mean is split into two floats, because a large one loses digits in the subtraction.
struct KlLine { F m_a, m_b, c, rest_a, rest_b, mean, mean_rest, slope, scale; };

template <class E>
SIMD void kl_gradient(const E* a, const E* b, E* da, E* db, int64_t n, const KlLine& g) {
  const F x = load_n(a, n), y = load_n(b, n);
  const F u = x - g.m_a, v = y - g.m_b;
  const F t = fma(u, g.c, g.rest_a), k = round(t), p = exp2(k, t - k);
  if (da) store_n(da, zero_unless(p != 0.f, p * ((u - v - g.mean) - g.mean_rest) * g.slope), n);
  if (!db) return;
  const F t_q = fma(v, g.c, g.rest_b), k_q = round(t_q);
  store_n(db, (exp2(k_q, t_q - k_q) - p) * g.scale, n);
}

template <class E>
void full_kl_bwd(const FullKlArgs& a, int64_t begin, int64_t end) {
  E *dlogits = reinterpret_cast<E*>(a.dlogits), *dref_logits = reinterpret_cast<E*>(a.dref_logits);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / a.T, t = row % a.T;
    E* da = dlogits ? dlogits + row * a.V : nullptr;
    E* db = dref_logits ? dref_logits + row * a.V : nullptr;
    const double dkl = a.dkl.at(b, t);
    if ((a.mask && !a.mask.at(b, t)) || dkl == 0) {
      if (da) std::memset(da, 0, a.V * sizeof(E));
      if (db) std::memset(db, 0, a.V * sizeof(E));
      continue;
    }
    const E *z_a = a.logits.at<const E>(b, t), *z_b = a.ref_logits.at<const E>(b, t);
    const float c = static_cast<float>(kLog2e / a.temperature_at(b, t)), *lse = a.lse + 4 * row;
    const double inverse = c * kLn2, scale = dkl / a.temperature_at(b, t);
    const double mean = (double(a.kl[row]) + lse[1] - lse[3]) / inverse;
    const float mean_head = static_cast<float>(mean);
    const float rest_a = -lse[1] * kLog2e, rest_b = -lse[3] * kLog2e, mean_rest = mean - mean_head;
    const KlLine line = {splat(lse[0]),    splat(lse[2]),          splat(c),
                         splat(rest_a),    splat(rest_b),          splat(mean_head),
                         splat(mean_rest), splat(scale * inverse), splat(scale)};
    int64_t i = 0;
    for (; i + W <= a.V; i += W)
      kl_gradient(z_a + i, z_b + i, da ? da + i : da, db ? db + i : db, W, line);
    if (i < a.V) kl_gradient(z_a + i, z_b + i, da ? da + i : da, db ? db + i : db, a.V - i, line);
  }
}
