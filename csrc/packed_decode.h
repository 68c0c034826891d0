// Runs the new tokens of each row through a small model, to the logits of the row's last token.
// rlhf_core/models/packed_decode.py gives the order of `weights`. ISA-generic; see simd.h.
//
// A thread takes its rows through all layers without waiting for others, in blocks whose
// activations fit into its cache beside the weights. No sum's order depends on the other rows.

constexpr int64_t kVectors = kPanel / W;
constexpr int kTile = W == 16 ? 8 : W == 8 || RLHF_ISA == 1 ? 3 : 1;  // rows that fit in registers

struct Linear {
  const float* x;  // (n, in)
  int64_t x_stride, in, n;
  float* y;  // (n, out)
  int64_t y_stride, out;
  bool add;  // to y instead of overwriting it
};

__attribute__((noinline)) void finish(float* y, int64_t n, bool add, F sum) {
  store_partial(y, add ? load_partial(y, n) + sum : sum, n);
}

// kPanel outputs from j on, for kRows rows from r on. w holds kPanel biases, then kPanel weights
// for each input.
template <int kRows>
SIMD void panel(const Linear& l, const float* w, int64_t j, int64_t r) {
  const float* x = l.x + r * l.x_stride;
  F sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int k = 0; k < kRows; ++k)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sums[k][v] = load(w + v * W);
  for (int64_t i = 0; i < l.in; ++i) {
    w += kPanel;
#pragma GCC unroll 8
    for (int k = 0; k < kRows; ++k) {
      const F value = splat(x[k * l.x_stride + i]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[k][v] = fma(value, load(w + v * W), sums[k][v]);
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < kRows; ++k)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      float* const y = l.y + (r + k) * l.y_stride + j + v * W;
      const int64_t left = l.out - j - v * W;
      if (left >= W) store(y, l.add ? load(y) + sums[k][v] : sums[k][v]);
      else if (left > 0) finish(y, left, l.add, sums[k][v]);
    }
}

template <int kRows>
void panel_of_rows(const Linear& l, const float* w, int64_t j, int64_t r) {
  for (; r + kRows <= l.n; r += kRows) panel<kRows>(l, w, j, r);
  if constexpr (kRows > 1) panel_of_rows<kRows - 1>(l, w, j, r);
}

// y = x W^T + b. Returns the end of W and b.
const float* linear(const Linear& l, const float* w) {
  for (int64_t j = 0; j < l.out; j += kPanel, w += (1 + l.in) * kPanel)
    panel_of_rows<kTile>(l, w, j, 0);
  return w;
}

// out (n, D) = rms_norm(x), where x has this row stride. Returns the end of the norm's weights.
const float* norm(const float* x, int64_t stride, int64_t n, int64_t D, float eps, const float* w,
                  float* out) {
  RmsNormArgs a = {};
  a.D = D, a.eps = eps, a.x = {reinterpret_cast<char*>(const_cast<float*>(x)), stride, 0};
  a.weight = reinterpret_cast<const char*>(w), a.out = reinterpret_cast<char*>(out);
  rms_norm<float>(a, 0, n);
  return w + D;
}

// x[:I] = silu(x[:I]) * x[I:2 I]. x has room for W more.
SIMD void gate(float* x, int64_t I) {
  for (int64_t i = 0; i < I; i += W) {
    const F z = load(x + i), up = load(x + I + i);
    store(x + i, z / (exp(-z) + 1.f) * up);
  }
}

void packed_decode(const PackedDecodeArgs& a, int64_t begin, int64_t end) {
  const int64_t D = a.D, K = a.attention.K, heads = a.attention.H * K, kv = a.attention.Hkv * K;
  const int64_t qkv = heads + 2 * kv, wide = a.wide();
  const int64_t store = a.attention.N * kv * a.attention.S * sizeof(float);
  float *const x = a.scratch, *const h = x + kDecodeRows * D;
  float* const y = h + kDecodeRows * std::max(D, heads);
  const auto bytes = [](float* p) { return reinterpret_cast<char*>(p); };
  int64_t slots[kDecodeRows], positions[kDecodeRows], last[kDecodeRows];

  for (int64_t b = begin, t = 0; b < end;) {
    int64_t n = 0, ends = 0;  // tokens in this block, and those that are a row's last
    for (; n < kDecodeRows && b < end; ++n) {
      copy(a.embedding + a.tokens[b * a.T + t] * D, D, x + n * D);
      slots[n] = a.attention.slots[b], positions[n] = a.lengths[slots[n]] + t;
      if (++t == a.count(b)) last[ends++] = n, ++b, t = 0;
    }
    DecodeAttentionArgs attention = a.attention;
    attention.slots = slots, attention.positions = positions, attention.out = bytes(h);
    attention.q = {bytes(y), wide, K}, attention.k = {bytes(y + heads), wide, K};
    attention.v = {bytes(y + heads + kv), wide, K};
    const float* w = a.weights;
    for (int64_t layer = 0; layer < a.layers; ++layer) {
      w = norm(x, D, n, D, a.eps, w, h);
      w = linear({h, D, D, n, y, wide, qkv, false}, w);
      if (a.qk_norm) {
        for (int64_t r = 0; r < n; ++r) {
          float* const head = y + r * wide;
          norm(head, K, attention.H, K, a.eps, w, head);
          norm(head + heads, K, attention.Hkv, K, a.eps, w + K, head + heads);
        }
        w += 2 * K;
      }
      decode_attention<float>(attention, 0, n * attention.Hkv);  // in order, hence causal
      attention.keys += store, attention.values += store;
      if (layer == a.layers - 1) {  // from here on only each row's last token matters
        for (int64_t r = 0; r < ends; ++r) {
          std::memmove(x + r * D, x + last[r] * D, D * sizeof(float));
          std::memmove(h + r * heads, h + last[r] * heads, heads * sizeof(float));
        }
        n = ends;
      }
      w = linear({h, heads, heads, n, x, D, D, true}, w);
      w = norm(x, D, n, D, a.eps, w, h);
      w = linear({h, D, D, n, y, wide, 2 * a.I, false}, w);
      for (int64_t r = 0; r < n; ++r) gate(y + r * wide, a.I);
      w = linear({y, wide, a.I, n, x, D, D, true}, w);
    }
    w = norm(x, D, n, D, a.eps, w, h);
    linear({h, D, D, n, a.logits + (b - ends) * a.V, a.V, a.V, false}, w);
    for (int64_t r = 0; r < ends; ++r) a.lengths[slots[last[r]]] = positions[last[r]] + 1;
  }
}
