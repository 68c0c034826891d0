// y = x / sqrt(mean(x^2) + eps) * weight for each row, and its gradient, in float32; see
// rlhf_core/ops/rms_norm.py. Y is X, or X is float. ISA-generic; see simd.h.

SIMD float total(F v) {
  for (int k = 1; k < W; k *= 2) v = pair_sums(v, v);
  return v[0];
}

// The first n elements, padded with zeros.
template <class E> SIMD F load_or_zero(const E* p, int64_t n) {
  return n >= W ? load(p) : zero_unless(below(n), load_partial(p, n));
}

template <class X, class Y>
void rms_norm_fwd(const RmsNormArgs& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const X* const x = a.x.at<const X>(r / a.T, r % a.T);
    Y* const y = reinterpret_cast<Y*>(a.y) + r * a.D;
    F squares = {};
    for (int64_t i = 0; i < a.D; i += W) {
      const F v = load_or_zero(x + i, a.D - i);
      squares = fma(v, v, squares);
    }
    const float scale = 1 / std::sqrt(total(squares) / a.D + a.eps);
    for (int64_t i = 0; i < a.D; i += W) {
      const int64_t n = a.D - i;
      store_n(y + i, load_or_zero(x + i, n) * scale * load_or_zero(a.weight + i, n), n);
    }
  }
}

// With s the row's scale and g = dy * weight: dx = s (g - x s^2 mean(g x)), dweight = sum dy x s.
// [begin, end) are chunks of kNormRows rows, each with sums for dweight of its own.
template <class X, class Y>
void rms_norm_bwd(const RmsNormArgs& a, int64_t begin, int64_t end) {
  for (int64_t r = begin * kNormRows; r < std::min(end * kNormRows, a.B * a.T); ++r) {
    const X* const x = a.x.at<const X>(r / a.T, r % a.T);
    const Y* const dy = a.dy.at<const Y>(r / a.T, r % a.T);
    X* const dx = reinterpret_cast<X*>(a.dx) + r * a.D;
    F squares = {}, products = {};
    for (int64_t i = 0; i < a.D; i += W) {
      const int64_t n = a.D - i;
      const F v = load_or_zero(x + i, n);
      squares = fma(v, v, squares);
      products = fma(load_or_zero(dy + i, n) * load_or_zero(a.weight + i, n), v, products);
    }
    const float scale = 1 / std::sqrt(total(squares) / a.D + a.eps);
    const float along = total(products) / a.D * scale * scale;
    float* const dweight = a.dweight ? a.dweight + r / kNormRows * a.D : nullptr;
    for (int64_t i = 0; i < a.D; i += W) {
      const int64_t n = a.D - i;
      const F v = load_or_zero(x + i, n), d = load_or_zero(dy + i, n);
      store_n(dx + i, (d * load_or_zero(a.weight + i, n) - v * along) * scale, n);
      if (dweight) store_n(dweight + i, fma(d, v * scale, load_or_zero(dweight + i, n)), n);
    }
  }
}
