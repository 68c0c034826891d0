// y = x weight^T + bias for a few rows, with weights as torch keeps them: see
// rlhf_core/ops/linear_rows.py. ISA-generic; see simd.h.
//
// Each weight comes from memory once. A tile of rows and outputs stays in registers while its
// weights stream past. Those of the next tile are fetched meanwhile, because a row of weights is
// too short for the hardware to see a stream. No sum's order depends on the other rows.

// Keeps a vector that several products share in a register: compilers would load it for each.
template <class V> SIMD V keep(V v) {
#if RLHF_ISA >= 512
  __asm__("" : "+v"(v));
#elif RLHF_ISA == 2
  __asm__("" : "+x"(v));
#endif
  return v;
}

constexpr int kTileRows = W == 16 ? 8 : 4, kTileOutputs = W == 4 ? 4 : 2;

// kStep weights, and the sums of their products with inputs in each lane.
template <class E> struct Products {
  using X = float;  // of stored inputs, which are in the order of load_pair
  static constexpr int64_t kStep = 2 * W;
  F even, odd;
  SIMD void load_weights(const E* p) { load_pair(p, even, odd); }
  template <int n> SIMD static void add(const Products (&w)[n], const float* x, F* sums) {
    const F first = keep(load(x)), second = keep(load(x + W));
    for (int o = 0; o < n; ++o) sums[o] = fma(second, w[o].odd, fma(first, w[o].even, sums[o]));
  }
  static SIMD void convert(const E* from, float* to) {
    F even, odd;
    load_pair(from, even, odd);
    store(to, even), store(to + W, odd);
  }
};

template <> struct Products<float> {
  using X = float;
  static constexpr int64_t kStep = W;
  F weights;
  SIMD void load_weights(const float* p) { weights = load(p); }
  template <int n> SIMD static void add(const Products (&w)[n], const float* x, F* sums) {
    const F input = keep(load(x));
    for (int o = 0; o < n; ++o) sums[o] = fma(input, w[o].weights, sums[o]);
  }
  static SIMD void convert(const float* from, float* to) { store(to, load(from)); }
};

#if RLHF_ISA == 513
template <> struct Products<BF16> {
  using X = BF16;
  static constexpr int64_t kStep = 2 * W;
  __m512bh weights;
  SIMD void load_weights(const BF16* p) { weights = read<__m512bh>(p); }
  template <int n> SIMD static void add(const Products (&w)[n], const BF16* x, F* sums) {
    const __m512bh input = keep(read<__m512bh>(x));
    for (int o = 0; o < n; ++o) sums[o] = _mm512_dpbf16_ps(sums[o], w[o].weights, input);
  }
  static SIMD void convert(const BF16* from, BF16* to) { std::memcpy(to, from, 4 * W); }
};
#endif

template <class E> SIMD void write_output(const LinearRowsArgs& a, int64_t r, int64_t j, float y) {
  if (a.bias) y += load_partial(reinterpret_cast<const E*>(a.bias) + j, 1)[0];
  store_partial(reinterpret_cast<E*>(a.y) + r * a.out + j, splat(y), 1);
}

template <class E, int kRows, int kOut>
void linear_tile(const LinearRowsArgs& a, int64_t r, int64_t j) {
  using P = Products<E>;
  constexpr int64_t kStep = P::kStep, kSums = (kRows * kOut + W - 1) / W * W;
  const int64_t in = a.in, padded = a.padded(), whole = in - in % kStep;
  const E* const w = reinterpret_cast<const E*>(a.weight) + j * in;
  const auto* const x = reinterpret_cast<const typename P::X*>(a.x) + r * padded;
  F total[kSums] = {};
  P weights[kOut];
  const auto add = [&](int64_t i) {
#pragma GCC unroll 8
    for (int k = 0; k < kRows; ++k) P::add(weights, x + k * padded + i, total + k * kOut);
  };
  for (int64_t i = 0; i < whole; i += kStep) {
#pragma GCC unroll 8
    for (int o = 0; o < kOut; ++o) {
      const E* const p = w + o * in + i;
      weights[o].load_weights(p);
      if (r == 0) __builtin_prefetch(p + kOut * in, 0, 2);
    }
    add(i);
  }
  if (whole < in) {
    for (int o = 0; o < kOut; ++o) {
      E rest[kStep] = {};
      std::memcpy(rest, w + o * in + whole, (in - whole) * sizeof(E));
      weights[o].load_weights(rest);
    }
    add(whole);
  }
  float y[kSums];
  for (int64_t i = 0; i < kSums; i += W) store(y + i, sums(total + i, W));
  for (int k = 0; k < kRows; ++k)
    for (int o = 0; o < kOut; ++o) write_output<E>(a, r + k, j + o, y[k * kOut + o]);
}

template <class E, int kRows, int kOut>
void linear_tiles(const LinearRowsArgs& a, int64_t r, int64_t j) {
  for (; r + kRows <= a.n; r += kRows) linear_tile<E, kRows, kOut>(a, r, j);
  if constexpr (kRows > 1) linear_tiles<E, kRows / 2, kOut>(a, r, j);
}

template <class E, int kRows, int kOut>
void linear_outputs(const LinearRowsArgs& a, int64_t begin, int64_t end) {
  int64_t j = begin;
  for (; j + kOut <= end; j += kOut) linear_tiles<E, kRows, kOut>(a, 0, j);
  for (; j < end; ++j) linear_tiles<E, kRows, 1>(a, 0, j);
}

#if RLHF_ISA == 513
// AMX multiplies 16 outputs x 32 inputs, as they lie in memory, with 32 inputs x 16 rows, whose
// inputs lie in pairs. Tiles 0 to 3 hold the sums of up to 64 rows, 4 weights and 5 inputs.
constexpr int64_t kAmx = 16, kAmxInputs = 32, kAmxTiles = 4;

struct AmxTiles {  // the layout that ldtilecfg reads
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
  AmxTiles() {
    for (int tile = 0; tile < 6; ++tile) row_bytes[tile] = 64, rows[tile] = 16;
    __asm__ volatile("ldtilecfg %0" ::"m"(*this));
  }
  ~AmxTiles() { __asm__ volatile("tilerelease"); }
};

template <int kTile> SIMD void multiply_tile(const BF16* x) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm5\n\ttdpbf16ps %%tmm5, %%tmm4, %%tmm%c2" ::"r"(x),
                   "r"(int64_t{64}), "i"(kTile)
                   : "memory");
}

template <int kTile> SIMD void read_tile(float* sums) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(sums), "r"(int64_t{64}), "i"(kTile)
                   : "memory");
}

// Outputs j to j + 16, of which those from `first` on are written.
template <int kTiles> void amx_outputs(const LinearRowsArgs& a, int64_t j, int64_t first) {
  const int64_t in = a.in, blocks = a.padded() / kAmxInputs;
  const BF16* const w = reinterpret_cast<const BF16*>(a.weight) + j * in;
  const BF16* x = reinterpret_cast<const BF16*>(a.x);  // (blocks, kTiles, 16 pairs, 16 rows, 2)
  __asm__ volatile("tilezero %tmm0\n\ttilezero %tmm1\n\ttilezero %tmm2\n\ttilezero %tmm3");
  for (int64_t block = 0; block < blocks; ++block, x += kTiles * kAmx * kAmxInputs) {
    const BF16* from = w + block * kAmxInputs;
    int64_t stride = in;
    BF16 rest[kAmx][kAmxInputs];
    if ((block + 1) * kAmxInputs > in) {
      std::memset(rest, 0, sizeof rest);
      for (int64_t o = 0; o < kAmx; ++o)
        std::memcpy(rest[o], from + o * in, (in - block * kAmxInputs) * sizeof(BF16));
      from = rest[0], stride = kAmxInputs;
    } else {
      for (int64_t o = 0; o < kAmx; ++o) __builtin_prefetch(from + (kAmx + o) * in, 0, 2);
    }
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm4" ::"r"(from), "r"(stride * 2) : "memory");
    multiply_tile<0>(x);
    if constexpr (kTiles > 1) multiply_tile<1>(x + kAmx * kAmxInputs);
    if constexpr (kTiles > 2) multiply_tile<2>(x + 2 * kAmx * kAmxInputs);
    if constexpr (kTiles > 3) multiply_tile<3>(x + 3 * kAmx * kAmxInputs);
  }
  alignas(64) float sums[kAmxTiles][kAmx][kAmx];  // (tile, output, row)
  read_tile<0>(sums[0][0]);
  if constexpr (kTiles > 1) read_tile<1>(sums[1][0]);
  if constexpr (kTiles > 2) read_tile<2>(sums[2][0]);
  if constexpr (kTiles > 3) read_tile<3>(sums[3][0]);
  for (int64_t r = 0; r < a.n; ++r)
    for (int64_t o = first - j; o < kAmx; ++o)
      write_output<BF16>(a, r, j + o, sums[r / kAmx][o][r % kAmx]);
}

// Up to 64 rows.
void amx_linear(const LinearRowsArgs& a, int64_t begin, int64_t end) {
  constexpr void (*kOutputs[])(const LinearRowsArgs&, int64_t, int64_t) = {
      amx_outputs<1>, amx_outputs<2>, amx_outputs<3>, amx_outputs<4>};
  const AmxTiles tiles;
  for (int64_t j = begin; j < end; j += kAmx)
    kOutputs[(a.n - 1) / kAmx](a, std::min(j, a.out - kAmx), j);
}

void amx_spread(const LinearRowsArgs& a, int64_t begin, int64_t end) {
  const int64_t block = (a.n + kAmx - 1) / kAmx * kAmx * kAmxInputs;
  for (int64_t r = begin; r < end; ++r) {
    const BF16* const from = a.rows.at<const BF16>(r, 0);
    BF16* to = reinterpret_cast<BF16*>(a.x) + r / kAmx * kAmx * kAmxInputs + r % kAmx * 2;
    for (int64_t i = 0; i < a.in; i += kAmxInputs, to += block)
      for (int64_t k = 0; k < std::min(kAmxInputs, a.in - i); ++k)
        to[k / 2 * kAmx * 2 + k % 2] = from[i + k];
  }
}
#endif

template <class E> void linear_rows(const LinearRowsArgs& a, int64_t begin, int64_t end) {
#if RLHF_ISA == 513
  if constexpr (std::is_same_v<E, BF16>)
    if (a.amx) return amx_linear(a, begin, end);
#endif
  if (a.n > kTileRows) linear_outputs<E, 4, 4>(a, begin, end);
  else linear_outputs<E, kTileRows, kTileOutputs>(a, begin, end);
}

// The rows as linear_rows reads them, padded with zeros.
template <class E> void spread_rows(const LinearRowsArgs& a, int64_t begin, int64_t end) {
#if RLHF_ISA == 513
  if constexpr (std::is_same_v<E, BF16>)
    if (a.amx) return amx_spread(a, begin, end);
#endif
  using P = Products<E>;
  for (int64_t r = begin; r < end; ++r) {
    const E* const from = a.rows.at<const E>(r, 0);
    auto* const to = reinterpret_cast<typename P::X*>(a.x) + r * a.padded();
    int64_t i = 0;
    for (; i + P::kStep <= a.in; i += P::kStep) P::convert(from + i, to + i);
    if (i == a.in) continue;
    E rest[P::kStep] = {};
    std::memcpy(rest, from + i, (a.in - i) * sizeof(E));
    P::convert(rest, to + i);
  }
}
