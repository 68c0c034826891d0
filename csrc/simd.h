// Vectors of W floats for one ISA: the compiler's vector operators, and the operations they lack.
// RLHF_ISA is 513 (AVX-512 + BF16), 512 (AVX-512), 2 (AVX2 + FMA + F16C), 1 (NEON) or 0 (portable).
// table.h includes this per ISA, in a namespace and target region of its own: no include guard.

constexpr int W = RLHF_ISA >= 512 ? 16 : RLHF_ISA == 2 ? 8 : 4;
typedef float F __attribute__((vector_size(4 * W)));
typedef double D __attribute__((vector_size(8 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));  // from comparisons: 0 or -1
typedef uint32_t U __attribute__((vector_size(4 * W)));
typedef uint16_t H __attribute__((vector_size(2 * W)));
typedef uint8_t B8 __attribute__((vector_size(W)));
typedef int8_t C8 __attribute__((vector_size(W)));
typedef int32_t Q __attribute__((vector_size(W)));  // W / 4 times four bytes

struct BF16 { uint16_t bits; };
struct F16 { uint16_t bits; };
struct I8 { int8_t value; };

template <class E> constexpr E kMinusInf = E{-INFINITY};
template <> constexpr BF16 kMinusInf<BF16> = {0xff80};
template <> constexpr F16 kMinusInf<F16> = {0xfc00};

constexpr double kLn2 = 0.69314718055994530942, kLog2e = 1.44269504088896340736;

#define SIMD inline __attribute__((always_inline))

template <class V, class P> SIMD V read(const P* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class P, class V> SIMD void write(P* p, V v) { std::memcpy(p, &v, sizeof v); }

SIMD F splat(float x) { return x - F{}; }
SIMD F select(I condition, F a, F b) { return (F)((condition & (I)a) | (~condition & (I)b)); }
SIMD F zero_unless(I condition, F a) { return (F)(condition & (I)a); }

SIMD double sum(F v) {  // in lane order, in double
  double total = 0;
  for (int k = 0; k < W; ++k) total += v[k];
  return total;
}

SIMD float max_lane(F v) {
  float best = v[0];
  for (int k = 1; k < W; ++k) best = v[k] > best ? v[k] : best;
  return best;
}

// fma(a, b, c) = a * b + c. pair_sums adds every two neighbouring lanes, those of a, then those of
// b. zip_low, zip_high, pairs_low and pairs_high make, of each four lanes of a and b, a0 b0 a1 b1,
// a2 b2 a3 b3, a0 a1 b0 b1 and a2 a3 b2 b3. min and max return b where either is NaN. scale2(p, n)
// = p * 2^n for integral n and p near 1: 0 for n < -126 (even -inf), huge or inf for n > 127. A NaN
// in p stays NaN unless n is -inf.
#if RLHF_ISA >= 512
SIMD F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
SIMD F min(F a, F b) { return _mm512_min_ps(a, b); }
SIMD F max(F a, F b) { return _mm512_max_ps(a, b); }
SIMD F round(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
SIMD F scale2(F p, F n) { return _mm512_scalef_ps(p, n); }
SIMD F pair_sums(F a, F b) {
  const U low = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, even = 2 * low;
  return _mm512_permutex2var_ps(a, (__m512i)even, b) +
         _mm512_permutex2var_ps(a, (__m512i)(even + 1), b);
}
SIMD F zip_low(F a, F b) { return _mm512_unpacklo_ps(a, b); }
SIMD F zip_high(F a, F b) { return _mm512_unpackhi_ps(a, b); }
SIMD F pairs_low(F a, F b) { return (F)_mm512_unpacklo_pd((__m512d)a, (__m512d)b); }
SIMD F pairs_high(F a, F b) { return (F)_mm512_unpackhi_pd((__m512d)a, (__m512d)b); }
SIMD F load(const F16* p) { return _mm512_cvtph_ps(read<__m256i>(p)); }
SIMD H to_half(F v) { return (H)_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
#elif RLHF_ISA == 2
SIMD F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
SIMD F min(F a, F b) { return _mm256_min_ps(a, b); }
SIMD F max(F a, F b) { return _mm256_max_ps(a, b); }
SIMD F round(F x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
SIMD F pair_sums(F a, F b) {
  return (F)_mm256_permute4x64_pd((__m256d)_mm256_hadd_ps(a, b), 0xd8);  // hadd alternates a and b
}
SIMD F zip_low(F a, F b) { return _mm256_unpacklo_ps(a, b); }
SIMD F zip_high(F a, F b) { return _mm256_unpackhi_ps(a, b); }
SIMD F pairs_low(F a, F b) { return (F)_mm256_unpacklo_pd((__m256d)a, (__m256d)b); }
SIMD F pairs_high(F a, F b) { return (F)_mm256_unpackhi_pd((__m256d)a, (__m256d)b); }
SIMD F load(const F16* p) { return _mm256_cvtph_ps(read<__m128i>(p)); }
SIMD H to_half(F v) { return (H)_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
#elif RLHF_ISA == 1
SIMD F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
SIMD F round(F x) { return vrndnq_f32(x); }
SIMD F pair_sums(F a, F b) { return vpaddq_f32(a, b); }
SIMD F zip_low(F a, F b) { return vzip1q_f32(a, b); }
SIMD F zip_high(F a, F b) { return vzip2q_f32(a, b); }
SIMD F pairs_low(F a, F b) { return (F)vzip1q_f64((float64x2_t)a, (float64x2_t)b); }
SIMD F pairs_high(F a, F b) { return (F)vzip2q_f64((float64x2_t)a, (float64x2_t)b); }
SIMD F load(const F16* p) { return vcvt_f32_f16((float16x4_t)read<H>(p)); }
SIMD H to_half(F v) { return (H)vcvt_f16_f32(v); }
#else
SIMD F fma(F a, F b, F c) { return a * b + c; }
SIMD F pair_sums(F a, F b) { return F{a[0] + a[1], a[2] + a[3], b[0] + b[1], b[2] + b[3]}; }
SIMD F zip_low(F a, F b) { return F{a[0], b[0], a[1], b[1]}; }
SIMD F zip_high(F a, F b) { return F{a[2], b[2], a[3], b[3]}; }
SIMD F pairs_low(F a, F b) { return F{a[0], a[1], b[0], b[1]}; }
SIMD F pairs_high(F a, F b) { return F{a[2], a[3], b[2], b[3]}; }
// Adding 1.5 * 2^23 leaves no fraction bits. Beyond 2^22 no caller needs the rounding.
SIMD F round(F x) {
  return select((x < 4194304.f) & (x > -4194304.f), (x + 12582912.f) - 12582912.f, x);
}
SIMD F load(const F16* p) {
  const U h = __builtin_convertvector(read<H>(p), U), magnitude = (h & 0x7fff) << 13;
  const F x = (F)magnitude * 0x1p112f;  // changes the exponent's bias; exact even for subnormals
  const U special = (U)((I)magnitude >= 0x0f800000) & 0x7f800000;
  return (F)((U)x | special | (h & 0x8000) << 16);
}
SIMD H to_half(F v) {
  const U u = (U)v, sign = u & 0x80000000, magnitude = u ^ sign;
  const U normal = (magnitude - 0x37fff001 + ((magnitude >> 13) & 1)) >> 13;  // rebias and round
  const U subnormal = (U)((F)magnitude + 0.5f) - 0x3f000000;                  // the addition rounds
  U half = (U)((I)magnitude < 0x38800000 ? (I)subnormal : (I)normal);
  half = (U)((I)magnitude >= 0x47800000 ? (I)(U{} + 0x7c00) : (I)half);
  half = (U)((I)magnitude > 0x7f800000 ? (I)(U{} + 0x7e00) : (I)half);
  return __builtin_convertvector(half | sign >> 16, H);
}
#endif

#if RLHF_ISA < 2
SIMD F min(F a, F b) { return select(a < b, a, b); }  // NEON's own return NaN for a NaN in a
SIMD F max(F a, F b) { return select(a > b, a, b); }
#endif
#if RLHF_ISA < 512
SIMD F scale2(F p, F n) {
  const I exponent = __builtin_convertvector(max(min(n, splat(127)), splat(-126)), I);
  return zero_unless(~(n < -126.f), p * (F)((exponent + 127) << 23));  // keeps NaN
}
#endif

SIMD F load(const float* p) { return read<F>(p); }
SIMD F load(const BF16* p) { return (F)(__builtin_convertvector(read<H>(p), U) << 16); }
// Compilers convert between bytes and floats one by one unless told how.
#if RLHF_ISA >= 512
SIMD F to_float(C8 v) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)v)); }
SIMD C8 to_bytes(F v) { return (C8)_mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v)); }
#elif RLHF_ISA == 2
SIMD F to_float(C8 v) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128((int64_t)v)));
}
SIMD C8 to_bytes(F v) {
  const __m256i words = _mm256_cvtps_epi32(v), zero = {};
  const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(words, zero), zero);
  const Q halves = {((I)bytes)[0], ((I)bytes)[4]};
  return (C8)halves;
}
#elif RLHF_ISA == 1
SIMD F to_float(C8 v) {
  const int8x8_t bytes = vcreate_s8((uint32_t)((Q)v)[0]);
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(bytes))));
}
SIMD C8 to_bytes(F v) { return __builtin_convertvector(vcvtnq_s32_f32(v), C8); }
#else
SIMD F to_float(C8 v) { return __builtin_convertvector(__builtin_convertvector(v, I), F); }
SIMD C8 to_bytes(F v) {
  return __builtin_convertvector(__builtin_convertvector(zero_unless(v == v, round(v)), I), C8);
}
#endif
SIMD F load(const I8* p) { return to_float(read<C8>(p)); }
SIMD float value(float x) { return x; }
SIMD float value(I8 x) { return x.value; }

// Four floats from i on of each fourth row, side by side.
SIMD F quads(const float* const* rows, int64_t i) {
#if RLHF_ISA >= 512
  F v = _mm512_castps128_ps512(_mm_loadu_ps(rows[0] + i));
  v = _mm512_insertf32x4(v, _mm_loadu_ps(rows[4] + i), 1);
  v = _mm512_insertf32x4(v, _mm_loadu_ps(rows[8] + i), 2);
  return _mm512_insertf32x4(v, _mm_loadu_ps(rows[12] + i), 3);
#elif RLHF_ISA == 2
  const F v = _mm256_castps128_ps256(_mm_loadu_ps(rows[0] + i));
  return _mm256_insertf128_ps(v, _mm_loadu_ps(rows[4] + i), 1);
#else
  return load(rows[0] + i);
#endif
}

SIMD F quads(const I8* const* rows, int64_t i) {
  Q v = {};
  for (int k = 0; k < W / 4; ++k) v[k] = read<int32_t>(rows[4 * k] + i);
  return to_float((C8)v);
}

// Loads 2 W elements in any order, because memory order costs more for BF16.
template <class E> SIMD void load_pair(const E* p, F& a, F& b) { a = load(p), b = load(p + W); }
SIMD void load_pair(const BF16* p, F& a, F& b) {
  const U pairs = read<U>(p);
  a = (F)(pairs << 16), b = (F)(pairs & 0xffff0000);
}

SIMD uint32_t lane_bits(I condition) {  // bit k is set if lane k is true
#if RLHF_ISA >= 512
  return _mm512_movepi32_mask((__m512i)condition);
#elif RLHF_ISA == 2
  return _mm256_movemask_ps((__m256)condition);
#else
  uint32_t bits = 0;
  for (int k = 0; k < W; ++k) bits |= uint32_t(condition[k] & 1) << k;
  return bits;
#endif
}

// Packs the true lanes at p, overwrites what follows up to p + W, and returns the lanes' end.
SIMD float* compress(float* p, F v, I condition) {
  uint32_t bits = lane_bits(condition);
#if RLHF_ISA >= 512
  write(p, _mm512_maskz_compress_ps(bits, v));  // on some CPUs 10 times slower in memory
  return p + __builtin_popcount(bits);
#else
  float lanes[W];
  write(lanes, v);
  for (int k = 0; k < W; ++k, bits >>= 1) *p = lanes[k], p += bits & 1;
  return p;
#endif
}

SIMD U round_to_bfloat(F v) {  // in the upper half; the lower half is garbage
  const U u = (U)v, rounded = u + 0x7fff + ((u >> 16) & 1);
  return (U)(v != v ? (I)(U{} + 0x7fc00000) : (I)rounded);
}

// Rounds to nearest even. A CPU's own BF16 instructions treat numbers below 2^-126 as 0.
#if RLHF_ISA == 513
SIMD void store(BF16* p, F v) { write(p, _mm512_cvtneps_pbh(v)); }
SIMD void store_pair(BF16* p, F a, F b) {
  const U low = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const U halves = (U)_mm512_cvtne2ps_pbh(b, a);
  const U interleave = (low + 16) << 16 | low;
  write(p, _mm512_permutexvar_epi16((__m512i)interleave, (__m512i)halves));
}
#else
SIMD void store(BF16* p, F v) { write(p, __builtin_convertvector(round_to_bfloat(v) >> 16, H)); }
SIMD void store_pair(BF16* p, F a, F b) {
  write(p, round_to_bfloat(a) >> 16 | (round_to_bfloat(b) & 0xffff0000));
}
#endif
SIMD void store(float* p, F v) { write(p, v); }
SIMD void store(F16* p, F v) { write(p, to_half(v)); }

// The inverse of load_pair.
template <class E> SIMD void store_pair(E* p, F a, F b) { store(p, a), store(p + W, b); }

// The first n < W elements, padded with -inf, which is neutral in a max and a sum of exponentials.
template <class E>
SIMD F load_partial(const E* p, int64_t n) {
  E buffer[W];
  for (int k = 0; k < W; ++k) buffer[k] = k < n ? p[k] : kMinusInf<E>;
  return load(buffer);
}

template <class E>
SIMD void store_partial(E* p, F v, int64_t n) {
  E buffer[W];
  store(buffer, v);
  std::memcpy(p, buffer, n * sizeof(E));
}

// The first n elements of a pair, padded with zeros.
template <class E>
SIMD void load_pair(const E* p, int64_t n, F& a, F& b) {
  if (n >= 2 * W) return load_pair(p, a, b);
  E buffer[2 * W] = {};
  std::memcpy(buffer, p, n * sizeof(E));
  load_pair(buffer, a, b);
}

template <class E>
SIMD void store_pair(E* p, int64_t n, F a, F b) {
  if (n >= 2 * W) return store_pair(p, a, b);
  E buffer[2 * W];
  store_pair(buffer, a, b);
  std::memcpy(p, buffer, n * sizeof(E));
}

// 2^(n + f) for integral n >= -126 and |f| <= 1/2, within 1.8 ulp (2.1 without a fused
// multiply-add). The polynomial accounts for 1.1 of them. 2^0 = 1 exactly.
SIMD F exp2(F n, F f) {
  F p = splat(0.0013204988790675998f);
  p = fma(p, f, splat(0.009671968407928944f));
  p = fma(p, f, splat(0.05550967901945114f));
  p = fma(p, f, splat(0.24022233486175537f));
  p = fma(p, f, splat(0.6931467652320862f));
  p = fma(p, f, splat(1.f));
  return scale2(p, n);
}

// Within 1.02 ulp on [-87, 88], exp(0) = 1 exactly. exp2 would round x log2(e) and lose digits.
SIMD F exp(F x) {
  const F n = round(x * static_cast<float>(kLog2e));
  const F r = fma(n, splat(2.1219444e-4f), fma(n, splat(-0.693359375f), x));  // ln 2 in two parts
  F p = splat(0.0013787834905087948f);
  p = fma(p, r, splat(0.008368697948753834f));
  p = fma(p, r, splat(0.041668910533189774f));
  p = fma(p, r, splat(0.1666652113199234f));
  p = fma(p, r, splat(0.49999991059303284f));
  return scale2(fma(p, r * r, r) + 1.f, n);
}
