// y = x weight^T + bias for a few rows, with weights as torch keeps them: see
// rlhf_core/ops/linear_rows.py. ISA-generic; see simd.h.
//
// Each weight comes from memory once. Up to kFewRows rows, a tile of rows and outputs stays in
// registers while its weights stream past, and the lanes of a vector are inputs. Weights that come
// next are fetched meanwhile, because a row of weights is too short for the hardware to see a
// stream. With more float32 rows the lanes are outputs, whose weights are first transposed in the
// cache: then no sum is over lanes. No sum's order depends on the other rows.
//
// Weights of 8 bits become float32 on the way into registers, or when they are transposed, and
// bfloat16, which is exact, for AMX. A scale of each output turns them into weights.

// Keeps a vector that several products share in a register: compilers would load it for each.
template <class V> SIMD V keep(V v) {
#if RLHF_ISA >= 512
  __asm__("" : "+v"(v));
#elif RLHF_ISA == 2
  __asm__("" : "+x"(v));
#endif
  return v;
}

constexpr int kTileRows = W == 16 ? 8 : 4, kTileOutputs = W == 16 ? 2 : W == 8 ? 3 : 4;
constexpr int kRowOutputs = 8;  // of a single row and 8-bit weights, against the sums' latency

// kStep weights, and the sums of their products with inputs in each lane.
template <class E> struct Products {
  using Input = E;  // what inputs are rounded to
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

// Weights that fill a vector once they are float32, in memory order.
template <class E> struct WideProducts {
  using Input = float;
  using X = float;
  static constexpr int64_t kStep = W;
  F weights;
  SIMD void load_weights(const E* p) { weights = load(p); }
  template <class P, int n> SIMD static void add(const P (&w)[n], const float* x, F* sums) {
    const F input = keep(load(x));
    for (int o = 0; o < n; ++o) sums[o] = fma(input, w[o].weights, sums[o]);
  }
  static SIMD void convert(const float* from, float* to) { store(to, load(from)); }
};
template <> struct Products<float> : WideProducts<float> {};
template <> struct Products<I8> : WideProducts<I8> {};

#if RLHF_ISA == 513
template <> struct Products<BF16> {
  using Input = BF16;
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

// Inputs [i, i + n) of row r, rounded to E.
template <class E>
SIMD void copy_inputs(const LinearRowsArgs& a, int64_t r, int64_t i, int64_t n, E* to) {
  if (!a.wide) std::memcpy(to, a.rows.at<const E>(r, 0) + i, n * sizeof(E));
  else narrow<E>(a.rows.at<const float>(r, 0) + i, n, reinterpret_cast<char*>(to));
}

// Outputs [j, j + n) of row r, n <= W.
template <class E>
SIMD void write_outputs(const LinearRowsArgs& a, int64_t r, int64_t j, F y, int64_t n) {
  if (a.scales) y *= load_partial(a.scales + j, n);
  if (a.bias) y += load_partial(reinterpret_cast<const E*>(a.bias) + j, n);
  const int64_t at = r * a.y_stride + j;
  if (!a.wide) return store_partial(reinterpret_cast<E*>(a.y) + at, y, n);
  float* const to = reinterpret_cast<float*>(a.y) + at;
  store_partial(to, a.add ? load_partial(to, n) + y : y, n);
}

template <class E, int kRows, int kOut>
void linear_tile(const LinearRowsArgs& a, int64_t r, int64_t j) {
  using P = Products<E>;
  constexpr int64_t kStep = P::kStep, kSums = (kRows * kOut + W - 1) / W * W;
  constexpr int64_t kFetch = std::is_same_v<E, I8> ? 64 : kStep;  // inputs between two prefetches
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
      if (r == 0 && i % kFetch == 0) __builtin_prefetch(p + kOut * in, 0, 2);
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
    for (int o = 0; o < kOut; o += W) {
      const int64_t n = std::min(kOut - o, W);
      write_outputs<typename P::Input>(a, r + k, j + o, load_partial(y + k * kOut + o, n), n);
    }
}

template <class E, int kRows, int kOut>
void linear_tiles(const LinearRowsArgs& a, int64_t r, int64_t j) {
  for (; r + kRows <= a.n; r += kRows) linear_tile<E, kRows, kOut>(a, r, j);
  if constexpr (kRows > 1) linear_tiles<E, kRows / 2, kOut>(a, r, j);
}

template <class E, int kRows, int kOut>
void linear_tiles_of(const LinearRowsArgs& a, int64_t begin, int64_t end) {
  int64_t j = begin;
  for (; j + kOut <= end; j += kOut) linear_tiles<E, kRows, kOut>(a, 0, j);
  for (; j < end; ++j) linear_tiles<E, kRows, 1>(a, 0, j);
}

constexpr int64_t kAmx = 16;  // outputs and rows of an AMX tile

#if RLHF_ISA == 513
// AMX multiplies 16 outputs x 32 inputs, as they lie in memory, with 32 inputs x 16 rows, whose
// inputs lie in pairs. Tiles 0 to 3 hold the sums of up to 64 rows, 4 weights and 5 inputs.
constexpr int64_t kAmxInputs = 32, kAmxTiles = 4;
template <class E> constexpr int64_t kBlocks = 64 / (kAmxInputs * sizeof(E));  // of a cache line

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

SIMD void widen(const BF16* from, BF16* to) { std::memcpy(to, from, kAmxInputs * sizeof(BF16)); }
SIMD void widen(const I8* from, BF16* to) { store(to, load(from)), store(to + W, load(from + W)); }

// Outputs j to j + 16, of which those from `first` on are written.
template <class E, int kTiles>
void amx_outputs(const LinearRowsArgs& a, int64_t j, int64_t first) {
  using Output = std::conditional_t<std::is_same_v<E, I8>, float, BF16>;  // unless a.wide
  const int64_t in = a.in, blocks = a.padded() / kAmxInputs;
  const E* const w = reinterpret_cast<const E*>(a.weight) + j * in;
  const BF16* x = reinterpret_cast<const BF16*>(a.x);  // (blocks, kTiles, 16 pairs, 16 rows, 2)
  __asm__ volatile("tilezero %tmm0\n\ttilezero %tmm1\n\ttilezero %tmm2\n\ttilezero %tmm3");
  for (int64_t block = 0; block < blocks; ++block, x += kTiles * kAmx * kAmxInputs) {
    const E* const from = w + block * kAmxInputs;
    const void* weights = from;
    int64_t stride = in * sizeof(E);
    alignas(64) BF16 wide[kAmx][kAmxInputs];
    if ((block + 1) * kAmxInputs > in) {
      for (int64_t o = 0; o < kAmx; ++o) {
        E rest[kAmxInputs] = {};
        std::memcpy(rest, from + o * in, (in - block * kAmxInputs) * sizeof(E));
        widen(rest, wide[o]);
      }
      weights = wide, stride = sizeof wide[0];
    } else {
      if (block % kBlocks<E> == 0)
        for (int64_t o = 0; o < kAmx; ++o) __builtin_prefetch(from + (kAmx + o) * in, 0, 2);
      if (std::is_same_v<E, I8>) {
        for (int64_t o = 0; o < kAmx; ++o) widen(from + o * in, wide[o]);
        weights = wide, stride = sizeof wide[0];
      }
    }
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm4" ::"r"(weights), "r"(stride) : "memory");
    multiply_tile<0>(x);
    if constexpr (kTiles > 1) multiply_tile<1>(x + kAmx * kAmxInputs);
    if constexpr (kTiles > 2) multiply_tile<2>(x + 2 * kAmx * kAmxInputs);
    if constexpr (kTiles > 3) multiply_tile<3>(x + 3 * kAmx * kAmxInputs);
  }
  alignas(64) float sums[kAmxTiles + 1][kAmx][kAmx];  // (tile, output, row)
  read_tile<0>(sums[0][0]);
  if constexpr (kTiles > 1) read_tile<1>(sums[1][0]);
  if constexpr (kTiles > 2) read_tile<2>(sums[2][0]);
  if constexpr (kTiles > 3) read_tile<3>(sums[3][0]);
  const I offsets = {0, 16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240};
  for (int64_t r = 0; r < a.n; ++r) {
    const float* const from = &sums[r / kAmx][first - j][r % kAmx];
    const F y = (F)_mm512_i32gather_ps((__m512i)offsets, from, sizeof(float));
    if (first == j) write_outputs<Output>(a, r, j, y, W);
    else write_outputs<Output>(a, r, first, y, j + kAmx - first);
  }
}

// Up to 64 rows.
template <class E> void amx_linear(const LinearRowsArgs& a, int64_t begin, int64_t end) {
  constexpr void (*kOutputs[])(const LinearRowsArgs&, int64_t, int64_t) = {
      amx_outputs<E, 1>, amx_outputs<E, 2>, amx_outputs<E, 3>, amx_outputs<E, 4>};
  const AmxTiles tiles;
  for (int64_t j = begin; j < end; j += kAmx)
    kOutputs[(a.n - 1) / kAmx](a, std::min(j, a.out - kAmx), j);
}

void amx_spread(const LinearRowsArgs& a, int64_t begin, int64_t end) {
  const int64_t block = (a.n + kAmx - 1) / kAmx * kAmx * kAmxInputs;
  for (int64_t r = begin; r < end; ++r) {
    BF16* to = reinterpret_cast<BF16*>(a.x) + r / kAmx * kAmx * kAmxInputs + r % kAmx * 2;
    for (int64_t i = 0; i < a.in; i += kAmxInputs, to += block) {
      BF16 part[kAmxInputs] = {};
      copy_inputs(a, r, i, std::min(kAmxInputs, a.in - i), part);
      for (int64_t k = 0; k < kAmxInputs; ++k) to[k / 2 * kAmx * 2 + k % 2] = part[k];
    }
  }
}
#endif

// Panels: kPanel outputs side by side, for each input in turn. A tile has up to kPanelRows rows,
// and as many vectors of outputs as leave its sums in registers.
constexpr int64_t kPanelRows = W == 16 ? 8 : W == 8 || RLHF_ISA == 1 ? 6 : 2;
constexpr int64_t vectors_beside(int64_t rows) {
  const int64_t most = W >= 8 ? 2 : 4;
  return std::min(kPanel / W, rows <= kPanelRows / 2 ? 2 * most : most);
}
constexpr int64_t kRowsAtOnce = 64;                           // whose sums lie on the stack
template <class E> constexpr int64_t kLine = 64 / sizeof(E);  // weights of a cache line

struct Panel {
  int64_t depth;     // inputs
  bool first;        // whether the sums begin at 0
  const char* next;  // rows of weights to fetch meanwhile
  int64_t stride;    // bytes from one to the next
  int64_t lines;     // of them during four inputs
};

template <int kRows, int kVectors>
SIMD void add_input(const float* x, const float* w, F (&sums)[kRows][kVectors]) {
  F weights[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) weights[v] = keep(load(w + v * W));
#pragma GCC unroll 8
  for (int k = 0; k < kRows; ++k) {
    const F value = splat(x[k * kDepth]);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sums[k][v] = fma(value, weights[v], sums[k][v]);
  }
}

// Adds the products of a tile, with weights w (depth, kPanel), to total (kRows, kPanel). Fetches
// lines of the next panel of E from `line` on.
template <class E, int kRows>
__attribute__((noinline)) void multiply_rows(const Panel& p, const float* x, const float* w,
                                             float* total, int64_t line) {
  constexpr int64_t kLines = kDepth / kLine<E>;  // of a row
  constexpr int kVectors = vectors_beside(kRows);
  F sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int k = 0; k < kRows; ++k)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v)
      sums[k][v] = p.first ? F{} : load(total + k * kPanel + v * W);
  int64_t i = 0;
  for (; i + 4 <= p.depth; i += 4, x += 4) {
    for (int64_t k = 0; k < p.lines && line < kPanel * kLines; ++k, ++line)
      __builtin_prefetch(p.next + line / kLines * p.stride + line % kLines * 64, 0, 2);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k, w += kPanel) add_input<kRows>(x + k, w, sums);
  }
  for (; i < p.depth; ++i, ++x, w += kPanel) add_input<kRows>(x, w, sums);
#pragma GCC unroll 8
  for (int k = 0; k < kRows; ++k)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(total + k * kPanel + v * W, sums[k][v]);
}

// The same for n rows, in tiles of about equal size.
template <class E, int... kRows>
void multiply_panel(const Panel& p, const float* x, const float* w, int64_t n, float* total,
                    std::integer_sequence<int, kRows...>) {
  using Multiply = void (*)(const Panel&, const float*, const float*, float*, int64_t);
  constexpr Multiply kOfRows[] = {multiply_rows<E, kRows + 1>...};
  int64_t line = 0, rows = 0;
  for (int64_t r = 0, tiles = (n + kPanelRows - 1) / kPanelRows; r < n; r += rows, --tiles) {
    rows = (n - r + tiles - 1) / tiles;
    for (int64_t o = 0; o < kPanel; o += vectors_beside(rows) * W) {
      kOfRows[rows - 1](p, x + r * kDepth, w + o, total + r * kPanel + o, line);
      line += p.depth / 4 * p.lines;
    }
  }
}

// Transposes kPanel rows of `depth` weights, each times its scale if there are scales.
template <class E>
SIMD void transpose_panel(const E* const* rows, const float* scales, int64_t depth, float* to) {
  constexpr bool kScaled = std::is_same_v<E, I8>;
  for (int64_t o = 0; o < kPanel; o += W) {
    F scale[4] = {};  // of the lanes of quads
    for (int k = 0; kScaled && k < 4; ++k)
      for (int lane = 0; lane < W; ++lane) scale[k][lane] = scales[o + k + lane / 4 * 4];
    int64_t i = 0;
    for (; i + 4 <= depth; i += 4) {
      F v[4];
      for (int k = 0; k < 4; ++k) {
        v[k] = quads(rows + o + k, i);
        if (kScaled) v[k] *= scale[k];
      }
      const F low = zip_low(v[0], v[1]), low2 = zip_low(v[2], v[3]);
      const F high = zip_high(v[0], v[1]), high2 = zip_high(v[2], v[3]);
      float* const at = to + i * kPanel + o;
      store(at, pairs_low(low, low2)), store(at + kPanel, pairs_high(low, low2));
      store(at + 2 * kPanel, pairs_low(high, high2));
      store(at + 3 * kPanel, pairs_high(high, high2));
    }
    for (; i < depth; ++i)
      for (int k = 0; k < W; ++k) {
        const float w = value(rows[o + k][i]);
        to[i * kPanel + o + k] = kScaled ? w * scales[o + k] : w;
      }
  }
}

// Writes sums (n, kPanel) as outputs from j on of the rows from `first` on.
SIMD void write_panel(const LinearRowsArgs& a, const float* sums, const float* bias, int64_t first,
                      int64_t n, int64_t j) {
  for (int64_t r = 0; r < n; ++r)
    for (int64_t o = 0; o < kPanel; o += W) {
      const int64_t left = a.out - j - o;
      if (left <= 0) break;
      float* const y = reinterpret_cast<float*>(a.y) + (first + r) * a.y_stride + j + o;
      const F sum = load(sums + r * kPanel + o) + load(bias + o);
      if (left >= W) store(y, a.add ? load(y) + sum : sum);
      else store_partial(y, a.add ? load_partial(y, left) + sum : sum, left);
    }
}

// Outputs from `begin`, a multiple of kPanel, to `end`.
template <class E> void linear_panels(const LinearRowsArgs& a, int64_t begin, int64_t end) {
  constexpr auto kRows = std::make_integer_sequence<int, kPanelRows>{};
  const E* const weight = reinterpret_cast<const E*>(a.weight);
  alignas(64) float block[kDepth * kPanel], sums[kRowsAtOnce * kPanel];
  float bias[kPanel] = {}, scales[kPanel] = {};
  for (int64_t j = begin; j < end; j += kPanel) {
    const int64_t count = std::min(kPanel, a.out - j);
    // Of packed weights: kPanel biases, then the weights.
    const float* const packed = reinterpret_cast<const float*>(a.weight) + j * (1 + a.in);
    if (a.packed) std::memcpy(bias, packed, sizeof bias);
    else if (a.bias) std::memcpy(bias, a.bias + j * sizeof(float), count * sizeof(float));
    if (a.scales) std::memcpy(scales, a.scales + j, count * sizeof(float));
    for (int64_t first = 0; first < a.n; first += kRowsAtOnce) {
      const int64_t n = std::min(kRowsAtOnce, a.n - first);
      const int64_t tiles = (n + kPanelRows - 1) / kPanelRows;
      Panel p = {};
      p.stride = a.in * sizeof(E);
      p.lines = a.packed ? 0 : (kPanel * 4 / kLine<E> + tiles - 1) / tiles;
      for (int64_t i = 0; i < a.in; i += kDepth) {
        p.depth = std::min(kDepth, a.in - i), p.first = i == 0;
        const float* w = block;
        if (a.packed) {
          w = packed + (1 + i) * kPanel;
        } else {
          const E* rows[kPanel];
          for (int64_t o = 0; o < kPanel; ++o)
            rows[o] = weight + (j + std::min(o, count - 1)) * a.in + i;
          transpose_panel(rows, scales, p.depth, block);
          const bool ends = i + kDepth >= a.in;
          p.next =
              reinterpret_cast<const char*>(ends ? weight + (j + kPanel) * a.in : rows[0] + kDepth);
        }
        multiply_panel<E>(p, a.x + i * a.n + first * kDepth, w, n, sums, kRows);
      }
      write_panel(a, sums, bias, first, n, j);
    }
  }
}

template <class E> void linear_outputs(const LinearRowsArgs& a, int64_t begin, int64_t end) {
  if constexpr (std::is_same_v<E, float> || std::is_same_v<E, I8>)
    if (a.panels()) return linear_panels<E>(a, begin, end);
#if RLHF_ISA == 513
  if constexpr (std::is_same_v<E, BF16> || std::is_same_v<E, I8>)
    if (a.amx) return amx_linear<E>(a, begin, end);
#endif
  if constexpr (std::is_same_v<E, I8>)
    if (a.n == 1) return linear_tiles_of<E, 1, kRowOutputs>(a, begin, end);
  if (a.n > kTileRows) linear_tiles_of<E, 4, W == 8 ? 3 : 4>(a, begin, end);
  else linear_tiles_of<E, kTileRows, kTileOutputs>(a, begin, end);
}

// The rows as the tiles read them, padded with zeros.
template <class E> void spread_rows(const LinearRowsArgs& a, int64_t begin, int64_t end) {
  using P = Products<E>;
  for (int64_t r = begin; r < end; ++r) {
    auto* const to = reinterpret_cast<typename P::X*>(a.x) + r * a.padded();
    for (int64_t i = 0; i < a.in; i += P::kStep) {
      typename P::Input part[P::kStep] = {};
      copy_inputs(a, r, i, std::min(P::kStep, a.in - i), part);
      P::convert(part, to + i);
    }
  }
}

// The rows as the panels read them: in blocks of kDepth inputs, so that the addresses of a tile's
// rows differ by constants.
inline void block_rows(const LinearRowsArgs& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r)
    for (int64_t i = 0; i < a.in; i += kDepth)
      std::memcpy(a.x + i * a.n + r * kDepth, a.rows.at<const float>(r, 0) + i,
                  std::min(kDepth, a.in - i) * sizeof(float));
}

// Rows of 8 bits and their scales: see quantize_rows in rlhf_core/ops/linear_rows.py.
template <class E> void quantize_rows(const QuantizeArgs& a, int64_t begin, int64_t end) {
  const int64_t whole = a.in - a.in % W;
  const U sign = U{} + 0x80000000;
  for (int64_t r = begin; r < end; ++r) {
    const E* const from = reinterpret_cast<const E*>(a.weight) + r * a.in;
    int8_t* const to = a.rows + r * a.in;
    const auto part = [&](int64_t i) {
      return i < whole ? load(from + i)
                       : zero_unless(below(a.in - i), load_partial(from + i, a.in - i));
    };
    F largest = {}, bad = {};
    for (int64_t i = 0; i < a.in; i += W) {
      const F v = part(i);
      largest = max((F)((U)v & ~sign), largest);
      bad += v * 0.f;  // NaN after a NaN or an infinity
    }
    const float scale = max_lane(largest) / 127, found = static_cast<float>(sum(bad));
    a.scales[r] = (scale < kLeastScale ? kLeastScale : scale) + found;
    const float inverse = 1 / a.scales[r];
    for (int64_t i = 0; i < a.in; i += W) {
      const C8 bytes = to_bytes(part(i) * inverse);
      std::memcpy(to + i, &bytes, std::min<int64_t>(W, a.in - i));
    }
  }
}

template <class E> void linear_rows(const LinearRowsArgs& args, int threads) {
  LinearRowsArgs a = args;
  a.amx = a.amx && (std::is_same_v<E, BF16> || std::is_same_v<E, I8>) && a.n > 4 && a.n <= 64 &&
          a.out >= kAmx;
  parallel_for(a.n, row_grain(a.in), threads, [&](int64_t begin, int64_t end) {
    if (a.panels()) return block_rows(a, begin, end);
#if RLHF_ISA == 513
    if (a.amx) return amx_spread(a, begin, end);
#endif
    spread_rows<E>(a, begin, end);
  });
  const int64_t grain = row_grain(a.in * (1 + a.n / 8)) / kPanel * kPanel + kPanel;
  parallel_for(a.out, grain, threads,
               [&](int64_t begin, int64_t end) { linear_outputs<E>(a, begin, end); });
}
