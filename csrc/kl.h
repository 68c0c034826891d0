// Per-token estimators of KL(policy || reference) and their gradients, elementwise. ISA-generic; see simd.h.

SIMD F exp(F x) {
  const F n = round(x * static_cast<float>(kLog2e));
  const F f = fma(x, splat(static_cast<float>(kLog2e)), -n);
  return exp2(n, fma(x, splat(static_cast<float>(kLog2e - static_cast<float>(kLog2e))), f));
}

// k3 = exp(-d) - 1 + d. Near 0 by its series, as the difference would cancel; below -20 its tangent goes on, so that
// value and gradient stay finite.
SIMD F k3(F d) {
  const F held = max(splat(-20), d), beyond = max(splat(0), -20.f - d), e = exp(-held);
  F series = fma(d, splat(1 / 360.f), splat(-1 / 60.f));
  series = fma(d, series, splat(1 / 12.f));
  series = fma(d, series, splat(-1 / 3.f));
  series = fma(d, series, splat(1.f)) * (d * d * 0.5f);
  return select((d < 0.125f) & (d > -0.125f), series, fma(e - 1.f, beyond, e - 1.f + held));
}

SIMD F k3_slope(F d) {  // 1 - exp(-d), likewise
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
  return select(d > 0.f, splat(1.f), select(d < 0.f, splat(-1.f), d));  // d is 0 or NaN there
}

SIMD F kl_load(const float* p, int64_t n) { return n == W ? load(p) : load_partial(p, n); }
SIMD void kl_store(float* p, F v, int64_t n) { n == W ? store(p, v) : store_partial(p, v, n); }

// Elements i .. i + n, where n is the constant W but for the last. What is masked is exactly 0, whatever it came from.
template <Estimator kEstimator, bool kBackward>
SIMD void kl_step(const KlArgs& a, int64_t i, int64_t n) {
  const F d = kl_load(a.logprobs + i, n) - kl_load(a.ref_logprobs + i, n);
  F result = kBackward ? kl_load(a.dkl + i, n) * kl_slope<kEstimator>(d) : kl_value<kEstimator>(d);
  if (a.mask) {
    B8 counted = {};
    std::memcpy(&counted, a.mask + i, n);
    result = zero_unless(__builtin_convertvector(counted, I) != 0, result);
  }
  kl_store((kBackward ? a.dlogprobs : a.kl) + i, result, n);
  if (kBackward) kl_store(a.dref_logprobs + i, F{} - result, n);
}

template <Estimator kEstimator, bool kBackward>
void kl_estimate(const KlArgs& a, int64_t begin, int64_t end) {
  int64_t i = begin;
  for (; i + W <= end; i += W) kl_step<kEstimator, kBackward>(a, i, W);
  if (i < end) kl_step<kEstimator, kBackward>(a, i, end - i);
}
