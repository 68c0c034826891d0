// Runs the new tokens of each row through a model, to the logits of the row's last token.
// rlhf_core/models/packed_decode.py lists the weights. ISA-generic; see simd.h.
//
// A packed model is small: a thread takes its rows through all layers without waiting for others,
// in blocks whose activations fit into its cache beside the weights. The weights of other models
// are read where they are: all threads share each layer of the one block that holds all rows.
// Activations are float32. No sum's order depends on the other rows.

// x = (x - mean) / sqrt(variance + eps) * weight + bias for each row, into out (n, D).
SIMD void layer_norm(const float* x, int64_t D, float eps, NormWeights w, float* out) {
  const int64_t whole = D - D % W;
  float mean = 0, variance = 0;
  F total = {};
  for (int64_t i = 0; i < whole; i += W) total += load(x + i);
  for (int64_t i = whole; i < D; ++i) mean += x[i];
  mean = (mean + static_cast<float>(sum(total))) / D;
  total = F{};
  for (int64_t i = 0; i < whole; i += W) {
    const F v = load(x + i) - mean;
    total = fma(v, v, total);
  }
  for (int64_t i = whole; i < D; ++i) variance += (x[i] - mean) * (x[i] - mean);
  const float scale = 1 / std::sqrt((variance + static_cast<float>(sum(total))) / D + eps);
  for (int64_t i = 0; i < whole; i += W)
    store(out + i, fma((load(x + i) - mean) * scale, load(w.weight + i), load(w.bias + i)));
  for (int64_t i = whole; i < D; ++i) out[i] = (x[i] - mean) * scale * w.weight[i] + w.bias[i];
}

template <class E> struct Decode {
  const PackedDecodeArgs& a;
  float *const linear_scratch = a.scratch, *const x = linear_scratch + a.x_size();  // x (n, D)
  float* const h = x + a.block * a.D;                       // (n, max(D, heads))
  float* const y = h + a.block * std::max(a.D, a.heads());  // (n, wide)
  float* const low = y + a.block * a.wide();                // (n, rank)

  void norm(const float* from, int64_t stride, int64_t n, int64_t D, NormWeights w, float* out) {
    RmsNormArgs r = {};
    r.T = 1, r.D = D, r.eps = a.eps, r.x = {bytes(from), stride, 0};
    r.weight = w.weight, r.y = bytes(out);
    parallel_for(n, row_grain(D), a.threads, [&](int64_t begin, int64_t end) {
      if (!w.bias) return rms_norm_fwd<float, float>(r, begin, end);
      for (int64_t i = begin; i < end; ++i) layer_norm(from + i * stride, D, a.eps, w, out + i * D);
    });
  }

  // to (n, out) = from (n, in) W^T + b, with adapters; added to what `to` holds if `add`.
  void linear(const float* from, int64_t stride, int64_t in, int64_t n, const LinearWeights& w,
              float* to, int64_t to_stride, int64_t out, bool add) {
    LinearRowsArgs l = {};
    l.dtype = a.dtype, l.n = n, l.in = in, l.out = out, l.rows = {bytes(from), stride, 0};
    l.weight = w.weight, l.bias = w.bias, l.packed = a.packed, l.wide = true, l.add = add;
    l.y = bytes(to), l.y_stride = to_stride, l.x = linear_scratch, l.amx = a.amx;
    l.scales = w.scales;
    if (w.scales) {
      l.dtype = kFloat32, l.amx = a.amx && a.dtype == kBFloat16;
      linear_rows<I8>(l, a.threads);
    } else {
      linear_rows<E>(l, a.threads);
    }
    if (!w.rank) return;
    l.dtype = kFloat32, l.bias = nullptr, l.scales = nullptr, l.add = false, l.packed = false;
    l.weight = bytes(w.lora_a), l.out = w.rank, l.y = bytes(low), l.y_stride = w.rank;
    linear_rows<float>(l, a.threads);
    l.weight = bytes(w.lora_b), l.in = w.rank, l.out = out, l.rows = {bytes(low), w.rank, 0};
    l.y = bytes(to), l.y_stride = to_stride, l.add = true, l.packed = true;
    linear_rows<float>(l, a.threads);
  }

  void attend(DecodeAttentionArgs& attention, int64_t n) {
    int64_t keys = 0;
    for (int64_t r = 0; r < n; ++r) keys += attention.positions[r] + 1;
    attention.B = n;
    const int64_t per_unit = keys / n * attention.K * (1 + attention.H / attention.Hkv);
    const auto kernel =
        attention.cache_dtype == kFloat32 ? decode_attention<float> : decode_attention<E>;
    parallel_for(n * attention.Hkv, row_grain(per_unit), a.threads,
                 [&](int64_t begin, int64_t end) { kernel(attention, begin, end); });
    const int64_t store = attention.N * attention.Hkv * attention.S * attention.K;
    const int64_t size = store * (attention.cache_dtype == kFloat32 ? 4 : 2);
    attention.keys += size, attention.values += size;
    if (!attention.shared_keys) return;
    const int64_t of_row = attention.Hkv * attention.P * attention.K;
    const int64_t shared = attention.N / attention.samples * of_row * (size / store);
    attention.shared_keys += shared, attention.shared_values += shared;
  }

  // y[:I] = act(y[:I]), times y[I:2 I] if gated. A row of y has room for W more.
  void activate_rows(int64_t n) {
    const int64_t I = a.I;
    parallel_for(n, row_grain(4 * I), a.threads, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        float* const row = y + r * a.wide();
        for (int64_t i = 0; i < I; i += W) {
          const F z = activate(a.activation, load(row + i)).value;
          store(row + i, a.gated ? z * load(row + I + i) : z);
        }
      }
    });
  }

  static char* bytes(const float* p) { return reinterpret_cast<char*>(const_cast<float*>(p)); }
};

// x = the token's embedding, plus that of its position if there is one.
template <class E> void embed(const PackedDecodeArgs& a, int64_t token, int64_t at, float* x) {
  const auto row = [&](const char* table, int64_t i) {
    return reinterpret_cast<const E*>(table) + i * a.D;
  };
  const E* const from = row(a.model->embedding, token);
  const E* const position = a.model->positions ? row(a.model->positions, at) : nullptr;
  int64_t i = 0;
  for (; i + W <= a.D; i += W)
    store(x + i, position ? load(from + i) + load(position + i) : load(from + i));
  if (const int64_t n = a.D - i) {
    const F last = load_partial(from + i, n);
    store_partial(x + i, position ? last + load_partial(position + i, n) : last, n);
  }
}

template <class E> void packed_decode(const PackedDecodeArgs& a, int64_t begin, int64_t end) {
  Decode<E> d = {a};
  const int64_t D = a.D, K = a.attention.K, heads = a.heads(), kv = a.attention.Hkv * K;
  const int64_t wide = a.wide(), up = (1 + a.gated) * a.I;
  float *const x = d.x, *const h = d.h, *const y = d.y;
  int64_t *const slots = a.indices, *const positions = slots + a.block;
  int64_t* const last = positions + a.block;

  for (int64_t b = begin, t = 0; b < end;) {
    int64_t n = 0, ends = 0;  // tokens in this block, and those that are a row's last
    for (; n < a.block && b < end; ++n) {
      slots[n] = a.attention.slots[b], positions[n] = a.lengths[slots[n]] + t;
      embed<E>(a, a.tokens[b * a.T + t], positions[n], x + n * D);
      if (++t == a.count(b)) last[ends++] = n, ++b, t = 0;
    }
    DecodeAttentionArgs attention = a.attention;
    attention.slots = slots, attention.positions = positions, attention.out = d.bytes(h);
    attention.q = {d.bytes(y), wide, K}, attention.k = {d.bytes(y + heads), wide, K};
    attention.v = {d.bytes(y + heads + kv), wide, K};
    for (int64_t layer = 0; layer < a.layers; ++layer) {
      const LayerWeights& w = a.weights[layer];
      d.norm(x, D, n, D, w.norm1, h);
      d.linear(h, D, D, n, w.qkv, y, wide, heads + 2 * kv, false);
      for (int64_t r = 0; w.q_norm && r < n; ++r) {
        float* const head = y + r * wide;
        d.norm(head, K, a.attention.H, K, {w.q_norm, nullptr}, head);
        d.norm(head + heads, K, a.attention.Hkv, K, {w.k_norm, nullptr}, head + heads);
      }
      d.attend(attention, n);       // several tokens of a row: by one thread in order, hence causal
      if (layer == a.layers - 1) {  // from here on only each row's last token matters
        for (int64_t r = 0; r < ends; ++r) {
          std::memmove(x + r * D, x + last[r] * D, D * sizeof(float));
          std::memmove(h + r * heads, h + last[r] * heads, heads * sizeof(float));
        }
        n = ends;
      }
      d.linear(h, heads, heads, n, w.out, x, D, D, true);
      d.norm(x, D, n, D, w.norm2, h);
      d.linear(h, D, D, n, w.up, y, wide, up, false);
      d.activate_rows(n);
      d.linear(y, wide, a.I, n, w.down, x, D, D, true);
    }
    d.norm(x, D, n, D, a.model->norm, h);
    d.linear(h, D, D, n, a.model->head, a.logits + (b - ends) * a.V, a.V, a.V, false);
    for (int64_t r = 0; r < ends; ++r) a.lengths[slots[last[r]]] = positions[last[r]] + 1;
  }
}
