// x / sqrt(mean(x^2) + eps) * weight for each row, in float32; see rlhf_core/ops/rms_norm.py.
// ISA-generic; see simd.h.

template <class E>
void rms_norm(const RmsNormArgs& a, int64_t begin, int64_t end) {
  const E* const weight = reinterpret_cast<const E*>(a.weight);
  const int64_t whole = a.D - a.D % W, rest = a.D % W;
  for (int64_t b = begin; b < end; ++b) {
    const E* const x = a.x.at<const E>(b, 0);
    E* const out = reinterpret_cast<E*>(a.out) + b * a.D;
    const F last = rest ? zero_unless(below(rest), load_partial(x + whole, rest)) : F{};
    F total = last * last;
    for (int64_t i = 0; i < whole; i += W) {
      const F v = load(x + i);
      total = fma(v, v, total);
    }
    for (int k = 1; k < W; k *= 2) total = pair_sums(total, total);
    const float scale = 1 / std::sqrt(total[0] / a.D + a.eps);
    for (int64_t i = 0; i < whole; i += W) store(out + i, load(x + i) * scale * load(weight + i));
    if (rest) store_partial(out + whole, last * scale * load_partial(weight + whole, rest), rest);
  }
}
