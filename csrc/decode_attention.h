// Appends each row's new key and value to the cache, then attends to it with the row's new query.
// rlhf_core/ops/decode_attention.py has the formulas. ISA-generic; see simd.h.
//
// A unit of work is a key/value head of a row. Its keys and values are read once, in blocks, for up
// to kHeads query heads, with an online softmax (Milakov & Gimelshein 2018). Rows that follow each
// other and share their first tokens read those together. If W does not divide
// K, the last of a head's `vectors` overlaps the previous one, where the query is 0. If K < W,
// blocks are staged: copied to float rows of length W, or W / 2 if that is enough, padded with 0.

constexpr int64_t kKeys = 128;  // per block
constexpr int64_t kHeads = 8;

SIMD I below(int64_t n) {  // true in the first n lanes
  I lane;
  for (int k = 0; k < W; ++k) lane[k] = k;
  return lane < static_cast<int32_t>(n);
}

// Half a head is usually a multiple of 4. Heads are short, so work per head must be cheap.
typedef float F4 __attribute__((vector_size(16)));
typedef float Half __attribute__((vector_size(2 * W)));

SIMD void copy(const float* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) write(to + i, read<F4>(from + i));
  for (; i < n; ++i) to[i] = from[i];
}

// Converts n elements to float. `to` has room for a multiple of W.
template <class E>
void widen(const char* from, int64_t n, float* to) {
  const E* p = reinterpret_cast<const E*>(from);
  int64_t i = 0;
  for (; i + W <= n; i += W) store(to + i, load(p + i));
  if constexpr (std::is_same_v<E, float>) copy(p + i, n - i, to + i);
  else if (i < n) store(to + i, load_partial(p + i, n - i));
}

template <class E>
void narrow(const float* from, int64_t n, char* to) {
  E* p = reinterpret_cast<E*>(to);
  int64_t i = 0;
  for (; i + W <= n; i += W) store(p + i, load(from + i));
  if (i < n) store_partial(p + i, load_partial(from + i, n - i), n - i);
}

constexpr void (*kWiden[kDtypes])(const char*, int64_t, float*) = {widen<float>, widen<BF16>,
                                                                   widen<F16>};
constexpr void (*kNarrow[kDtypes])(const float*, int64_t, char*) = {narrow<float>, narrow<BF16>,
                                                                    narrow<F16>};

template <class V>
SIMD void turn(const float* p, const float* cos, const float* sin, int64_t half, float scale,
               float* x) {
  const V left = read<V>(p), right = read<V>(p + half), c = read<V>(cos), s = read<V>(sin);
  write(x, (left * c - right * s) * scale), write(x + half, (right * c + left * s) * scale);
}

// x = scale * head, rotated if cos is given. x has room for a multiple of W unless in float32.
SIMD void load_head(Dtype dtype, const char* from, int64_t K, const float* cos, const float* sin,
                    float scale, float* x) {
  const float* p = reinterpret_cast<const float*>(from);
  if (dtype != kFloat32) kWiden[dtype](from, K, x), p = x;
  int64_t i = 0;
  if (!cos) {
    for (; i + 4 <= K; i += 4) write(x + i, read<F4>(p + i) * scale);
    for (; i < K; ++i) x[i] = p[i] * scale;
    return;
  }
  const int64_t half = K / 2;
  for (; i + 4 <= half; i += 4) turn<F4>(p + i, cos + i, sin + i, half, scale, x + i);
  for (; i < half; ++i) turn<float>(p + i, cos + i, sin + i, half, scale, x + i);
}

// Writes a head's key or value to its place in the cache. `head` is scratch.
template <class E>
SIMD void append(Dtype dtype, const char* from, int64_t K, const float* cos, const float* sin,
                 float* head, E* to) {
  float* x = head;
  if constexpr (std::is_same_v<E, float>) {
    if (dtype == kFloat32) x = to;
  }
  load_head(dtype, from, K, cos, sin, 1, x);
  if (x == head) narrow<E>(head, K, reinterpret_cast<char*>(to));
}

// Lane j is the sum of lanes [n j, n j + n) of v's n vectors, concatenated. n <= W is a power of 2.
SIMD F sums(F* v, int64_t n) {
  for (; n > 1; n /= 2)
    for (int64_t i = 0; i < n / 2; ++i) v[i] = pair_sums(v[2 * i], v[2 * i + 1]);
  return v[0];
}

struct Heads {
  int64_t count, vectors, K;  // K >= W
  float *q, *out;             // (count, vectors, W)
  float* scores;              // (count, kKeys)
  float* highest;             // (count,) scores so far
  F* totals;                  // (count,) sums of exponentials relative to `highest`
  int64_t offset(int64_t i) const { return std::min(i * W, K - W); }
  Heads part(int64_t first, int64_t n) const {
    const int64_t at = first * vectors * W;
    return {
        n, vectors, K, q + at, out + at, scores + first * kKeys, highest + first, totals + first};
  }
};

struct Stage {
  bool used, two;  // whether blocks are staged, with two keys in a vector
  int64_t wide;
  float *keys, *values;
};

// Scores n keys; what follows, up to a multiple of W, is arbitrary. A vector holds kRows keys.
template <class E, int kRows>
SIMD void score(const Heads& h, const E* keys, int64_t n) {
  for (int64_t j = 0; j < n; j += W) {
    F products[kHeads][W];
    if (kRows == 2) {
      for (int64_t g = 0; g < h.count; ++g)
        for (int64_t i = 0; i < W / 2; ++i)
          products[g][i] = load(h.q + g * W) * load(keys + j * (W / 2) + i * W);
    } else {
      for (int64_t u = 0; u < W; u += 4) {
        const E* row[4];
        for (int64_t k = 0; k < 4; ++k) row[k] = keys + std::min(j + u + k, n - 1) * h.K;
        for (int64_t g = 0; g < h.count; ++g) {
          F dot[4] = {};
          for (int64_t i = 0; i < h.vectors; ++i) {
            const F q = load(h.q + (g * h.vectors + i) * W);
#pragma GCC unroll 4
            for (int k = 0; k < 4; ++k) dot[k] = fma(q, load(row[k] + h.offset(i)), dot[k]);
          }
          for (int k = 0; k < 4; ++k) products[g][u + k] = dot[k];
        }
      }
    }
    for (int64_t g = 0; g < h.count; ++g)
      store(h.scores + g * kKeys + j, sums(products[g], W / kRows));
  }
}

// out += probabilities * values.
template <class E, int kRows>
SIMD void weigh(const Heads& h, const E* values, int64_t n) {
  constexpr int64_t kStep = 8;
  if (kRows == 2) {
    const I first = below(W / 2);
    for (int64_t g = 0; g < h.count; ++g) {
      const float* p = h.scores + g * kKeys;
      F even = load(h.out + g * W), odd = {};
      for (int64_t j = 0; j < n; j += 4) {
        even = fma(select(first, splat(p[j]), splat(p[j + 1])), load(values + j * (W / 2)), even);
        const F weights = select(first, splat(p[j + 2]), splat(p[j + 3]));
        odd = fma(weights, load(values + (j + 2) * (W / 2)), odd);
      }
      store(h.out + g * W, even + odd);
    }
    return;
  }
  for (int64_t j = 0; j < n; j += kStep) {
    for (int64_t g = 0; g < h.count; ++g) {
      const float* p = h.scores + g * kKeys + j;
      float* out = h.out + g * h.vectors * W;
      if (j + kStep <= n) {
        for (int64_t i = 0; i < h.vectors; ++i) {
          F total = load(out + i * W);
#pragma GCC unroll 8
          for (int64_t k = 0; k < kStep; ++k)
            total = fma(splat(p[k]), load(values + (j + k) * h.K + h.offset(i)), total);
          store(out + i * W, total);
        }
      } else {
        for (int64_t k = 0; k < n - j; ++k)
          for (int64_t i = 0; i < h.vectors; ++i)
            store(out + i * W,
                  fma(splat(p[k]), load(values + (j + k) * h.K + h.offset(i)), load(out + i * W)));
      }
    }
  }
}

SIMD float largest(F v) {  // no lane may be NaN
  float lanes[W];
  store(lanes, v);
  F4 best = read<F4>(lanes);
  for (int k = 4; k < W; k += 4) {
    const F4 x = read<F4>(lanes + k);
    best = x > best ? x : best;
  }
  const float a = best[0] > best[1] ? best[0] : best[1], b = best[2] > best[3] ? best[2] : best[3];
  return a > b ? a : b;
}

// Replaces each score by exp(score - highest so far). Returns the factor that rescales older sums.
SIMD float exponentiate(float* scores, int64_t n, float& highest, F& total) {
  F best = splat(-INFINITY);
  for (int64_t j = 0; j < n; j += W) {
    const F x = select(below(n - j), load(scores + j), splat(-INFINITY));
    store(scores + j, x);
    best = max(x, best);
  }
  const float before = highest, block = largest(best);
  highest = block < before ? before : block;
  const bool same = before == highest || before == -INFINITY;
  const float factor = same ? 1 : exp(splat(before - highest))[0];
  total = total * factor;
  for (int64_t j = 0; j < n; j += W) {
    const F e = exp(load(scores + j) - highest);
    store(scores + j, e);
    total += e;
  }
  return factor;
}

// Copies n rows of K elements to rows of `wide` floats, padded with 0, up to a multiple of 4 rows.
template <class E>
SIMD void stage(const E* rows, int64_t n, int64_t K, int64_t wide, float* to) {
  if (K == wide) widen<E>(reinterpret_cast<const char*>(rows), n * K, to);
  else
    for (int64_t j = 0; j < n; ++j)
      store(to + j * wide, zero_unless(below(K), load_partial(rows + j * K, K)));
  for (; n % 4; ++n) store(to + n * wide, F{});
}

// Adds n <= kKeys keys and values of K elements to the softmax of each head.
template <class E>
void add_block(const Heads& h, const Stage& s, const E* keys, const E* values, int64_t n,
               int64_t K) {
  if (s.used) {
    stage(keys, n, K, s.wide, s.keys);
    stage(values, n, K, s.wide, s.values);
  }
  if (s.two) score<float, 2>(h, s.keys, n);
  else if (s.used) score<float, 1>(h, s.keys, n);
  else score<E, 1>(h, keys, n);
  for (int64_t g = 0; g < h.count; ++g) {
    const float factor = exponentiate(h.scores + g * kKeys, n, h.highest[g], h.totals[g]);
    float* out = h.out + g * h.vectors * W;
    if (factor != 1)
      for (int64_t i = 0; i < h.vectors * W; i += W) store(out + i, load(out + i) * factor);
  }
  if (s.two) weigh<float, 2>(h, s.values, n);
  else if (s.used) weigh<float, 1>(h, s.values, n);
  else weigh<E, 1>(h, values, n);
}

// Units are the rows of the first head, then those of the next one.
template <class E>
void decode_attention(const DecodeAttentionArgs& a, int64_t begin, int64_t end) {
  const int64_t K = a.K, G = a.H / a.Hkv, vectors = (K + W - 1) / W, per_head = vectors * W;
  const bool staged = K < W, two = K <= W / 2;
  const int64_t wide = two ? W / 2 : W, stage_size = staged ? kKeys * wide + W : 0;
  const int64_t floats = kHeads * (2 * per_head + kKeys) + 2 * stage_size + per_head;
  float* const scratch =
      static_cast<float*>(__builtin_alloca_with_align(floats * sizeof(float), 512));
  float *const out = scratch + kHeads * per_head, *const scores = out + kHeads * per_head;
  float* const staged_keys = scores + kHeads * kKeys;
  float *const staged_values = staged_keys + stage_size, *const head = staged_values + stage_size;
  float highest[kHeads];
  F totals[kHeads];
  Heads h = {0, vectors, staged ? W : K, scratch, out, scores, highest, totals};
  const Stage stages = {staged, two, wide, staged_keys, staged_values};
  const float scale = static_cast<float>(1 / std::sqrt(static_cast<double>(K)));
  const auto cache = [&](const char* store, int64_t row, int64_t kv, int64_t size) {
    return const_cast<E*>(reinterpret_cast<const E*>(store)) + (row * a.Hkv + kv) * size * K;
  };

  for (int64_t unit = begin, rows; unit < end; unit += rows) {
    const int64_t first = unit % a.B, kv = unit / a.B, owner = a.slots[first] / a.samples;
    const int64_t shared = a.shared_length(a.slots[first]);
    const int64_t together = shared ? std::max<int64_t>(1, kHeads / G) : 1;
    rows = 1;
    while (rows < together && unit + rows < end && first + rows < a.B &&
           a.slots[first + rows] / a.samples == owner)
      ++rows;
    for (int64_t b = first; b < first + rows; ++b) {
      const int64_t n = a.positions[b], at = (n - shared) % a.S * K;
      const float* cos = a.cos ? a.cos + n * (K / 2) : nullptr;
      const float* sin = a.cos ? a.sin + n * (K / 2) : nullptr;
      append(a.dtype, a.head(a.k, b, kv), K, cos, sin, head,
             cache(a.keys, a.slots[b], kv, a.S) + at);
      append(a.dtype, a.head(a.v, b, kv), K, nullptr, nullptr, head,
             cache(a.values, a.slots[b], kv, a.S) + at);
    }

    for (int64_t done = 0, count; done < G; done += count) {
      count = std::min(kHeads, G - done);  // of each row
      h.count = rows * count;
      for (int64_t i = 0; i < h.count * per_head; i += W) store(h.out + i, F{});
      for (int64_t g = 0; g < h.count; ++g) {
        const int64_t b = first + g / count, n = a.positions[b];
        const float* cos = a.cos ? a.cos + n * (K / 2) : nullptr;
        const float* sin = a.cos ? a.sin + n * (K / 2) : nullptr;
        float *q = h.q + g * per_head, *last = q + per_head - W;
        load_head(a.dtype, a.head(a.q, b, kv * G + done + g % count), K, cos, sin, scale, q);
        if (K > W && K % W) {
          std::memmove(last + W - K % W, last, K % W * sizeof(float));
          std::memset(last, 0, (W - K % W) * sizeof(float));
        } else if (K < W) {
          std::memset(q + K, 0, (W - K) * sizeof(float));
        }
        if (two) std::memcpy(q + W / 2, q, W / 2 * sizeof(float));
        highest[g] = -INFINITY, totals[g] = F{};
      }

      for (int64_t j = 0; j < shared; j += kKeys)
        add_block(h, stages, cache(a.shared_keys, owner, kv, a.P) + j * K,
                  cache(a.shared_values, owner, kv, a.P) + j * K, std::min(kKeys, shared - j), K);
      for (int64_t b = first; b < first + rows; ++b) {
        const Heads own = h.part((b - first) * count, count);
        const E* keys = cache(a.keys, a.slots[b], kv, a.S);
        const E* values = cache(a.values, a.slots[b], kv, a.S);
        const int64_t n = a.positions[b] - shared;
        for (int64_t j = std::max<int64_t>(0, n + 1 - a.window), size; j <= n; j += size) {
          const int64_t at = j % a.S;
          size = std::min(std::min(kKeys, a.S - at), n + 1 - j);  // a block ends where a ring does
          add_block(own, stages, keys + at * K, values + at * K, size, K);
        }
      }

      for (int64_t g = 0; g < h.count; ++g) {
        const int64_t b = first + g / count, query = kv * G + done + g % count;
        const float* out = h.out + g * per_head;
        F total = totals[g];
        for (int k = 1; k < W; k *= 2) total = pair_sums(total, total);
        for (int64_t i = 0; i < vectors; ++i) store(head + h.offset(i), load(out + i * W) / total);
        if (two) write(head, read<Half>(head) + read<Half>(head + W / 2));
        char* const to = a.out + (b * a.H + query) * K * (a.dtype == kFloat32 ? 4 : 2);
        if (a.dtype == kFloat32) copy(head, K, reinterpret_cast<float*>(to));
        else kNarrow[a.dtype](head, K, to);
      }
    }
  }
}
