// y = act(gate) * up for rows that hold gate, then up, and its gradient; see
// rlhf_core/ops/gated_activation.py. ISA-generic; see simd.h.

// 1 / (1 + exp(-u)), but 0 below -88, where exp would overflow. NaN stays NaN.
SIMD F sigmoid(F u) {
  const F held = max(splat(-88.f), min(splat(88.f), u));
  return zero_unless(~(u < -88.f), 1.f / (exp(-held) + 1.f));
}

struct Activated { F value, slope; };

// SiLU is z sigmoid(z). GELU's tanh form is z sigmoid(u), with u twice the argument of tanh.
SIMD Activated activate(Activation kind, F z) {
  F u = z, du = splat(1.f);
  if (kind == kGeluTanh) {
    const F cubic = z * z * 0.0713548162726f;
    u = z * (cubic + 1.5957691216057f), du = fma(cubic, splat(3.f), splat(1.5957691216057f));
  }
  const F s = sigmoid(u), value = z * s;
  return {value, fma(value * (1.f - s), du, s)};
}

template <class E>
void gated_activation_fwd(const GatedActivationArgs& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const E *const gate = a.gate_up.at<const E>(r / a.T, r % a.T), *const up = gate + a.I;
    E* const y = reinterpret_cast<E*>(a.y) + r * a.I;
    for (int64_t i = 0; i < a.I; i += 2 * W) {
      const int64_t n = a.I - i;
      F z[2], v[2];
      load_pair(gate + i, n, z[0], z[1]);
      load_pair(up + i, n, v[0], v[1]);
      for (int k = 0; k < 2; ++k) v[k] = v[k] * activate(a.activation, z[k]).value;
      store_pair(y + i, n, v[0], v[1]);
    }
  }
}

template <class E>
void gated_activation_bwd(const GatedActivationArgs& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const E *const gate = a.gate_up.at<const E>(r / a.T, r % a.T), *const up = gate + a.I;
    const E* const dy = a.dy.at<const E>(r / a.T, r % a.T);
    E *const dgate = reinterpret_cast<E*>(a.dgate_up) + r * 2 * a.I, *const dup = dgate + a.I;
    for (int64_t i = 0; i < a.I; i += 2 * W) {
      const int64_t n = a.I - i;
      F z[2], v[2], d[2];
      load_pair(gate + i, n, z[0], z[1]);
      load_pair(up + i, n, v[0], v[1]);
      load_pair(dy + i, n, d[0], d[1]);
      for (int k = 0; k < 2; ++k) {
        const Activated h = activate(a.activation, z[k]);
        v[k] = v[k] * d[k] * h.slope, d[k] = d[k] * h.value;
      }
      store_pair(dgate + i, n, v[0], v[1]);
      store_pair(dup + i, n, d[0], d[1]);
    }
  }
}
