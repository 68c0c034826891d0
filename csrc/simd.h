// The vector of one ISA: W float lanes with the compiler's own vector operators, and the few operations those lack.
// Included by table.h once per ISA, inside an unnamed namespace and a target region, hence no include guard.
// RLHF_ISA is 512 (AVX-512), 2 (AVX2 + FMA + F16C) or 0 (whatever the platform's baseline is: SSE2, NEON, ...).

constexpr int W = RLHF_ISA == 512 ? 16 : RLHF_ISA == 2 ? 8 : 4;
typedef float F __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));  // comparisons yield it: 0 or -1
typedef uint32_t U __attribute__((vector_size(4 * W)));
typedef uint16_t H __attribute__((vector_size(2 * W)));
typedef uint8_t B8 __attribute__((vector_size(W)));

struct BF16 { uint16_t bits; };
struct F16 { uint16_t bits; };

template <class E> constexpr E kMinusInf = E{-INFINITY};
template <> constexpr BF16 kMinusInf<BF16> = {0xff80};
template <> constexpr F16 kMinusInf<F16> = {0xfc00};

constexpr double kLn2 = 0.69314718055994530942, kLog2e = 1.44269504088896340736;

#define SIMD inline __attribute__((always_inline))

template <class V, class P>
SIMD V read(const P* p) { V v; std::memcpy(&v, p, sizeof v); return v; }
template <class P, class V>
SIMD void write(P* p, V v) { std::memcpy(p, &v, sizeof v); }

SIMD F splat(float x) { return x - F{}; }
SIMD F select(I condition, F a, F b) { return (F)((condition & (I)a) | (~condition & (I)b)); }
SIMD F zero_unless(I condition, F a) { return (F)(condition & (I)a); }

// Lanes added in order, in double.
SIMD double sum(F v) {
  double total = 0;
  for (int k = 0; k < W; ++k) total += v[k];
  return total;
}

SIMD float max_lane(F v) {
  float best = v[0];
  for (int k = 1; k < W; ++k) best = v[k] > best ? v[k] : best;
  return best;
}

// fma(a, b, c) = a * b + c. min and max return b where either is NaN. scale2(p, n) = p * 2^n for integral n and p near
// 1: 0 for n = -inf (or below the normal range), huge or inf for n > 126; NaN in p stays where n is not -inf.
#if RLHF_ISA == 512
SIMD F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
SIMD F min(F a, F b) { return _mm512_min_ps(a, b); }
SIMD F max(F a, F b) { return _mm512_max_ps(a, b); }
SIMD F round(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
SIMD F scale2(F p, F n) { return _mm512_scalef_ps(p, n); }
SIMD F load(const F16* p) { return _mm512_cvtph_ps(read<__m256i>(p)); }
SIMD H to_half(F v) { return (H)_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
#elif RLHF_ISA == 2
SIMD F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
SIMD F min(F a, F b) { return _mm256_min_ps(a, b); }
SIMD F max(F a, F b) { return _mm256_max_ps(a, b); }
SIMD F round(F x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
SIMD F load(const F16* p) { return _mm256_cvtph_ps(read<__m128i>(p)); }
SIMD H to_half(F v) { return (H)_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
#else
SIMD F fma(F a, F b, F c) { return a * b + c; }
SIMD F min(F a, F b) { return select(a < b, a, b); }
SIMD F max(F a, F b) { return select(a > b, a, b); }
// Adding 1.5 * 2^23 leaves no fraction bits; beyond 2^22 nobody needs the rounding.
SIMD F round(F x) { return select((x < 4194304.f) & (x > -4194304.f), (x + 12582912.f) - 12582912.f, x); }
SIMD F load(const F16* p) {
  const U h = __builtin_convertvector(read<H>(p), U), magnitude = (h & 0x7fff) << 13;
  const F x = (F)magnitude * 0x1p112f;  // moves the exponent's bias; exact for subnormals too
  const U special = (U)((I)magnitude >= 0x0f800000) & 0x7f800000;
  return (F)((U)x | special | (h & 0x8000) << 16);
}
SIMD H to_half(F v) {
  const U u = (U)v, sign = u & 0x80000000, magnitude = u ^ sign;
  const U normal = (magnitude - 0x37fff001 + ((magnitude >> 13) & 1)) >> 13;  // rebias and round to nearest even
  const U subnormal = (U)((F)magnitude + 0.5f) - 0x3f000000;                  // the adder does the rounding
  U half = (U)((I)magnitude < 0x38800000 ? (I)subnormal : (I)normal);
  half = (U)((I)magnitude >= 0x47800000 ? (I)(U{} + 0x7c00) : (I)half);
  half = (U)((I)magnitude > 0x7f800000 ? (I)(U{} + 0x7e00) : (I)half);
  return __builtin_convertvector(half | sign >> 16, H);
}
#endif

#if RLHF_ISA != 512
SIMD F scale2(F p, F n) {
  const I exponent = __builtin_convertvector(max(min(n, splat(126)), splat(-126)), I);
  return zero_unless(~(n < -125.f), p * (F)((exponent + 127) << 23));  // a product, so that a NaN stays one
}
#endif

SIMD F load(const float* p) { return read<F>(p); }
SIMD F load(const BF16* p) { return (F)(__builtin_convertvector(read<H>(p), U) << 16); }

// 2 W elements in any order, which for BF16 is cheaper than in theirs.
template <class E>
SIMD void load_pair(const E* p, F& a, F& b) { a = load(p), b = load(p + W); }
SIMD void load_pair(const BF16* p, F& a, F& b) {
  const U pairs = read<U>(p);
  a = (F)(pairs << 16), b = (F)(pairs & 0xffff0000);
}

SIMD H to_bfloat(F v) {
  const U u = (U)v, rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return __builtin_convertvector((U)(v != v ? (I)(U{} + 0x7fc0) : (I)rounded), H);
}

// Rounded to nearest even.
SIMD void store(float* p, F v) { write(p, v); }
SIMD void store(BF16* p, F v) { write(p, to_bfloat(v)); }
SIMD void store(F16* p, F v) { write(p, to_half(v)); }

// The first n < W elements, filled up with -inf, which adds nothing to a max nor to a sum of exponentials.
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

// 2^(n + f) for integral n and |f| <= 1/2: minimax polynomial with 2^0 = 1 exactly, relative error below 1.6e-7.
SIMD F exp2(F n, F f) {
  F p = splat(0.001326472731307149f);
  p = fma(p, f, splat(0.009671512991189957f));
  p = fma(p, f, splat(0.05550733581185341f));
  p = fma(p, f, splat(0.24022242426872253f));
  p = fma(p, f, splat(0.6931470036506653f));
  p = fma(p, f, splat(1.f));
  return scale2(p, n);
}
