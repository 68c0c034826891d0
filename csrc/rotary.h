// Rotary positions: elements i and i + R / 2 of a head are a pair, and elements from R on stay as
// they are; see rlhf_core/ops/rotary.py. ISA-generic; see simd.h.

template <class E> void rotary(const RotaryArgs& a, int64_t begin, int64_t end) {
  const int64_t half = a.R / 2;
  for (int64_t r = begin; r < end; ++r) {
    const E* x = a.x.at<const E>(r / a.T, r % a.T);
    const float* const cos = a.cos.at<const float>(r / a.T, r % a.T);
    const float* const sin = a.sin.at<const float>(r / a.T, r % a.T);
    E* y = reinterpret_cast<E*>(a.y) + r * a.H * a.K;
    for (int64_t h = 0; h < a.H; ++h, x += a.K, y += a.K) {
      for (int64_t i = 0; i < half; i += W) {
        const int64_t j = i + half, n = half - i;
        const F first = load_n(x + i, n), second = load_n(x + j, n);
        store_n(y + i, fma(second, load_n(sin + i, n), first * load_n(cos + i, n)), n);
        store_n(y + j, fma(first, load_n(sin + j, n), second * load_n(cos + j, n)), n);
      }
      std::memcpy(y + a.R, x + a.R, (a.K - a.R) * sizeof(E));
    }
  }
}
