// PPO's clipped policy and value losses, their gradients and statistics, in one pass. The formulas
// are in rlhf_core/ops/policy_loss.py. ISA-generic; see simd.h.
//
// Masked inputs are read as 0 and contribute nothing. Sums are float32 over a few vectors, then
// double. Each chunk of rows has its own sums, and dispatch.cpp adds the chunks in order.

constexpr float kMaxLogRatio = 20;  // keeps exp finite, because 0 * inf would be NaN

// The part of torch.maximum(x, y)'s gradient that goes to x.
SIMD F share_of_maximum(F x, F y) {
  return select(x < y, F{}, select(x == y, splat(0.5f), splat(1.f)));
}

// min and max return their second argument if either is NaN, so x comes last.
SIMD F clamp(F x, F low, F high) { return min(high, max(low, x)); }

// Elements [i, i + n).
SIMD void ppo_step(const PpoLossArgs& a, int64_t i, int64_t n, float row_weight, F* sums) {
  const I counted = load_mask(a.mask + i, n);
  const auto load_counted = [&](const float* p) { return zero_unless(counted, load_n(p + i, n)); };
  const F one = zero_unless(counted, splat(1.f));
  const F weight = a.weights ? load_counted(a.weights) : one * row_weight;

  const F log_ratio = load_counted(a.logprobs) - load_counted(a.old_logprobs);
  const F advantage = load_counted(a.advantages);
  const F held = clamp(log_ratio, splat(-kMaxLogRatio), splat(kMaxLogRatio)), ratio = exp(held);
  const F near_ratio = clamp(ratio, splat(float(1 - a.clip_low)), splat(float(1 + a.clip_high)));
  const F unclipped = -advantage * ratio, clipped = -advantage * near_ratio;
  const F bound = -advantage * a.dual_clip;
  const F worse = select(clipped > unclipped, clipped, unclipped);
  const I bounded = (advantage < 0.f) & (bound < worse), flows = (held == log_ratio) & ~bounded;
  const F policy_loss = select(bounded, bound, worse);
  const F share = select(near_ratio == ratio, splat(1.f), share_of_maximum(unclipped, clipped));
  store_n(a.dlogprobs + i, zero_unless(flows, unclipped * share) * weight, n);
  F loss = policy_loss;
  sums[kPolicyLoss] += policy_loss;
  sums[kApproxKl] += max(splat(0), ratio - 1.f - log_ratio);
  sums[kClipped] += zero_unless(clipped > unclipped, one);
  sums[kRatio] += ratio * one;
  sums[kRatioSquared] += ratio * ratio * one;
  sums[kDualClipped] += zero_unless(bounded, one);
  sums[kCount] += one;

  if (a.values) {
    const F value = load_counted(a.values), old = load_counted(a.old_values);
    const F target = load_counted(a.returns);
    const F near = clamp(value, old - a.value_clip_range, old + a.value_clip_range);
    const F error = value - target, squared = error * error;
    const F clipped_squared = (near - target) * (near - target);
    const F value_loss = select(clipped_squared > squared, clipped_squared, squared) * 0.5f;
    const F share = select(near == value, splat(1.f), share_of_maximum(squared, clipped_squared));
    store_n(a.dvalues + i, error * share * (weight * a.vf_coef), n);
    loss += value_loss * a.vf_coef;
    sums[kValueLoss] += value_loss;
    sums[kValueClipped] += zero_unless(clipped_squared > squared, one);
  }
  if (a.entropy) {
    const F entropy = load_counted(a.entropy);
    store_n(a.dentropy + i, weight * -a.entropy_coef, n);
    loss -= entropy * a.entropy_coef;
    sums[kEntropy] += entropy;
  }
  sums[kLoss] += loss * weight;
}

void ppo_loss(const PpoLossArgs& a, int64_t begin, int64_t end) {
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    D totals[kSequences] = {};
    double sequences = 0;
    const int64_t end_row = std::min(a.B, (chunk + 1) * a.chunk_rows);
    for (int64_t row = chunk * a.chunk_rows; row < end_row; ++row) {
      int64_t i = row * a.T, length = 0;
      const int64_t stop = i + a.T;
      if (a.sequence_mean)
        for (int64_t k = i; k < stop; ++k) length += a.mask[k];
      const float weight = length ? 1.f / length : 1.f;
      sequences += length > 0;
      while (i < stop) {
        F sums[kSequences] = {};
        const int64_t block = std::min(stop, i + 32 * W);
        for (; i + W <= block; i += W) ppo_step(a, i, W, weight, sums);
        if (i < block) ppo_step(a, i, block - i, weight, sums), i = block;
        for (int k = 0; k < kSequences; ++k) totals[k] += __builtin_convertvector(sums[k], D);
      }
    }
    double* sums = a.chunk_sums + chunk * kPpoSums;
    for (int k = 0; k < kSequences; ++k) {
      sums[k] = 0;
      for (int lane = 0; lane < W; ++lane) sums[k] += totals[k][lane];
    }
    sums[kSequences] = sequences;
  }
}
