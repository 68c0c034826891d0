// Generalised advantage estimation (GAE), its gradient, and PPO's steps around it: KL-shaped
// rewards before, whitening after. Runs in double. Masked tokens are skipped and get 0.

// The next unmasked token of the sequence.
struct Future { double value, advantage; };

SIMD void gae_token(const GaeArgs& a, int64_t i, Future& next) {
  a.advantages[i] = a.returns[i] = 0;
  if (!a.mask[i]) return;
  const double value = a.values[i], delta = a.rewards[i] + a.gamma * next.value - value;
  next = {value, delta + a.gamma * a.lam * next.advantage};
  a.advantages[i] = static_cast<float>(next.advantage);
  a.returns[i] = static_cast<float>(next.advantage + value);
}

// kTokens doubles fill one register. Lane k of SHIFT(x, n) is lane k + n of x, or 0 past the end.
constexpr int kTokens = W / 2;
typedef double G __attribute__((vector_size(8 * kTokens)));
typedef float GF __attribute__((vector_size(4 * kTokens)));
#if !defined(__clang__) && __GNUC__ < 12
#undef SHIFT  // no shuffles before gcc 12: one token at a time
#elif RLHF_ISA >= 512
#define SHIFT(x, n) \
  __builtin_shufflevector(x, G{}, n, n + 1, n + 2, n + 3, n + 4, n + 5, n + 6, n + 7)
#elif RLHF_ISA == 2
#define SHIFT(x, n) __builtin_shufflevector(x, G{}, n, n + 1, n + 2, n + 3)
#else
#define SHIFT(x, n) __builtin_shufflevector(x, G{}, n, n + 1)
#endif

#ifdef SHIFT
// kTokens unmasked tokens from i on; powers_k = decay^(kTokens - k). The recursion
// x_k += decay * x_{k+1}, last token first, takes log2(kTokens) steps.
SIMD void gae_tokens(const GaeArgs& a, int64_t i, G powers, Future& next) {
  const G rewards = __builtin_convertvector(read<GF>(a.rewards + i), G);
  const G values = __builtin_convertvector(read<GF>(a.values + i), G);
  G next_values = SHIFT(values, 1);
  next_values[kTokens - 1] = next.value;
  double decay = a.gamma * a.lam;
  G x = rewards + next_values * a.gamma - values;
  x += SHIFT(x, 1) * decay;
  if (kTokens > 2) decay *= decay, x += SHIFT(x, 2 % kTokens) * decay;
  if (kTokens > 4) decay *= decay, x += SHIFT(x, 4 % kTokens) * decay;
  const double advantage = x[0] + powers[0] * next.advantage;  // all that the next call waits for
  x += powers * next.advantage;
  write(a.advantages + i, __builtin_convertvector(x, GF));
  write(a.returns + i, __builtin_convertvector(x + values, GF));
  next = {values[0], advantage};
}
#endif

void gae_fwd(const GaeArgs& a, int64_t begin, int64_t end) {
  bool all[kTokens];
  std::memset(all, 1, kTokens);
  G powers;
  double power = 1;
  for (int k = kTokens - 1; k >= 0; --k) powers[k] = power *= a.gamma * a.lam;
  for (int64_t b = begin; b < end; ++b) {
    Future next = {a.last_values ? a.last_values[b] : 0, 0};
    const int64_t first = a.begin(b);
    int64_t stop = a.begin(b + 1);
    while (stop > first) {  // blocks align to the end, so a row's place in the batch is irrelevant
      const int64_t i = std::max(first, stop - kTokens);
#ifdef SHIFT
      if (stop - i == kTokens && std::memcmp(a.mask + i, all, kTokens) == 0) {
        gae_tokens(a, i, powers, next);
        stop = i;
      }
#endif
      while (stop > i) gae_token(a, --stop, next);
    }
  }
}

#undef SHIFT

void gae_bwd(const GaeArgs& a, int64_t begin, int64_t end) {
  const double decay = a.gamma * a.lam;
  for (int64_t b = begin; b < end; ++b) {
    double ddelta = 0;  // of the previous unmasked token
    for (int64_t i = a.begin(b); i < a.begin(b + 1); ++i) {
      a.drewards[i] = a.dvalues[i] = 0;
      if (!a.mask[i]) continue;
      const double dreturn = a.dreturns[i], via_next = a.gamma * ddelta;
      ddelta = a.dadvantages[i] + dreturn + decay * ddelta;
      a.drewards[i] = static_cast<float>(ddelta);
      a.dvalues[i] = static_cast<float>(dreturn - ddelta + via_next);
    }
    if (a.dlast_values) a.dlast_values[b] = static_cast<float>(a.gamma * ddelta);
  }
}

// Of the unmasked values. Differences from the first one give equal values exactly zero variance.
SIMD Moments moments(const float* x, const bool* mask, int64_t n) {
  int64_t i = 0;
  while (i < n && !mask[i]) ++i;
  if (i == n) return {};
  const float pivot = x[i];
  I counts = {};
  D firsts = {}, seconds = {};
  for (; i < n; i += W) {
    const int64_t k = std::min<int64_t>(n - i, W);
    const I counted = load_mask(mask + i, k);
    const F values = select(counted, load_n(x + i, k), splat(pivot));
    const D difference = __builtin_convertvector(values, D) - double(pivot);
    counts -= counted;
    firsts += difference;
    seconds += difference * difference;
  }
  double count = 0, first = 0, second = 0;
  for (int k = 0; k < W; ++k) count += counts[k], first += firsts[k], second += seconds[k];
  const double shift = first / count;
  return {count, pivot + shift, std::max(0.0, second - shift * first)};
}

void ppo_advantages(const AdvantagesArgs& a, int64_t begin, int64_t end) {
  const float* kl = a.kl.kl;
  for (int64_t b = begin; b < end; ++b) {
    const int64_t first = a.gae.begin(b), stop = a.gae.begin(b + 1);
    kKlFwd[a.kl.estimator](a.kl, first, stop);
    for (int64_t i = first; i < stop; ++i) a.rewards[i] = static_cast<float>(0 - a.kl_coef * kl[i]);
    int64_t last = stop - 1;
    while (last >= first && !a.gae.mask[last]) --last;
    if (last >= first) a.rewards[last] = static_cast<float>(a.scores[b] - a.kl_coef * kl[last]);
    gae_fwd(a.gae, b, b + 1);
    if (a.moments)
      a.moments[b] = moments(a.gae.advantages + first, a.gae.mask + first, stop - first);
  }
}

// Whitens in place: (x - mean) * scale, and 0 where masked.
void whiten(float* x, const bool* mask, int64_t n, double mean, double scale) {
  for (int64_t i = 0; i < n; i += W) {
    const int64_t k = std::min<int64_t>(n - i, W);
    const D white = (__builtin_convertvector(load_n(x + i, k), D) - mean) * scale;
    store_n(x + i, zero_unless(load_mask(mask + i, k), __builtin_convertvector(white, F)), k);
  }
}
