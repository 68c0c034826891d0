// What bindings.cpp calls. Arguments are plain structs of pointers, without torch or pybind11.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

namespace rlhf {

enum Dtype { kFloat32, kBFloat16, kFloat16, kDtypes };
enum Activation { kSilu, kGeluTanh };
enum Estimator { kK1, kK2, kK3, kAbs, kEstimators };

// The first two axes of a (B, T, ...) tensor. Strides count elements and are 0 for expanded axes.
template <class T>
struct Grid {
  T* data;
  int64_t stride_b, stride_t;
  explicit operator bool() const { return data != nullptr; }
  T& at(int64_t b, int64_t t) const { return data[b * stride_b + t * stride_t]; }
};

// The rows of a (B, T, V) tensor of any dtype; the last axis has stride 1.
struct Rows {
  char* data;
  int64_t stride_b, stride_t;
  template <class E> E* at(int64_t b, int64_t t) const {
    return reinterpret_cast<E*>(data) + (b * stride_b + t * stride_t);
  }
};

// Shared by the ops on rows of logits.
struct LogitsArgs {
  Dtype dtype;
  int64_t B, T, V;
  double temperature;
  Grid<const float> temperatures;  // one per row; null: use `temperature`
  Rows logits;
  Grid<const bool> mask;  // null: every position counts
  double temperature_at(int64_t b, int64_t t) const {
    return temperatures ? temperatures.at(b, t) : temperature;
  }
};

struct LogprobsArgs : LogitsArgs {
  Grid<const int64_t> targets;
  float *logprobs, *entropy;  // (B, T); entropy may be null; backward reads it
  float* lse;  // (B, T, 2): offset m, log sum exp((z - m) / temperature); forward accepts null
  Grid<const float> dlogprobs, dentropy;  // backward only; dentropy may be null
  Rows dlogits;                           // backward only; may overwrite the logits
};

struct FullKlArgs : LogitsArgs {
  Rows ref_logits;
  float *kl, *lse;              // (B, T), (B, T, 4): the policy's lse, the reference's
  Grid<const float> dkl;        // backward only
  char *dlogits, *dref_logits;  // backward only, contiguous; null: not requested
};

struct KlArgs {
  Estimator estimator;
  const float *logprobs, *ref_logprobs, *dkl;
  const bool* mask;
  float *kl, *dlogprobs, *dref_logprobs;
};

struct GaeArgs {
  int64_t B, T;               // given cu_seqlens, T is the mean length and only sizes the work
  const int64_t* cu_seqlens;  // (B + 1): where packed sequences start and end; null: (B, T) rows
  double gamma, lam;
  const bool* mask;
  const float *rewards, *values, *last_values;
  float *advantages, *returns;
  const float *dadvantages, *dreturns;  // backward only, like the next three
  float *drewards, *dvalues, *dlast_values;
  int64_t begin(int64_t b) const { return cu_seqlens ? cu_seqlens[b] : b * T; }
};

struct Moments { double count, mean, m2; };  // m2: the sum of squared deviations from the mean

// rewards = -kl_coef * kl, plus the score at each sequence's last unmasked token; then GAE.
struct AdvantagesArgs {
  GaeArgs gae;  // without last_values
  KlArgs kl;
  const float* scores;  // (B,)
  double kl_coef;
  float* rewards;    // the memory of gae.rewards
  Moments* moments;  // (B,), of the advantages; null: no whitening
};

// Sums over unmasked tokens: ppo_loss's statistics in order, the loss, and the nonempty sequences.
// clang-format off
enum PpoSum { kPolicyLoss, kValueLoss, kEntropy, kApproxKl, kClipped, kValueClipped, kRatio,
              kRatioSquared, kDualClipped, kCount, kLoss, kSequences, kPpoSums };
// clang-format on

struct PpoLossArgs {
  int64_t B, T;
  const float *logprobs, *old_logprobs, *advantages;               // all (B, T)
  const float *values, *old_values, *returns, *entropy, *weights;  // null: not given
  const bool* mask;
  bool sequence_mean;
  double clip_low, clip_high;
  float value_clip_range, vf_coef, entropy_coef, dual_clip;  // an infinite range does not clip
  float *loss, *scale, *stats;                               // (), (), (kCount + 1)
  float *dlogprobs, *dvalues, *dentropy;                     // of loss / scale
  int64_t chunk_rows;  // rows summed together; set by ppo_loss_fwd
  double* chunk_sums;  // (chunks, kPpoSums); set by ppo_loss_fwd
};

struct DecodeAttentionArgs {
  Dtype dtype, cache_dtype;  // of q, k, v and out; of keys and values
  int64_t B, H, Hkv, K, N, S, window;
  int64_t limit;                            // of a row's tokens, at most S unless window <= S
  Rows q, k, v;                             // (B, H or Hkv, K); a row's heads are contiguous
  char *keys, *values;                      // (N, Hkv, S, K); token n is at (n - shared_length) % S
  const int64_t *lengths, *slots;           // (N,), (B,)
  const char *shared_keys, *shared_values;  // (N / samples, Hkv, P, K); null: no shared tokens
  const int64_t* shared_lengths;            // (N / samples,)
  int64_t samples, P;
  const int64_t* positions;  // (B,), of the new tokens; set by decode_attention_fwd
  const float *cos, *sin;    // (positions, K / 2); null: no rotation
  char* out;                 // (B, H, K)
  int64_t shared_length(int64_t slot) const {
    return shared_lengths ? shared_lengths[slot / samples] : 0;
  }
  char* head(const Rows& x, int64_t b, int64_t h) const {
    return x.data + (b * x.stride_b + h * K) * (dtype == kFloat32 ? 4 : 2);
  }
};

constexpr int64_t kNormRows = 64;  // whose parts of dweight are added up together

struct RmsNormArgs {
  Dtype dtype, y_dtype;  // of x and dx; of y and dy, which is the same unless dtype is float32
  int64_t B, T, D;
  Rows x, dy;           // (B, T, D); dy, like dx and dweight, is backward only
  const float* weight;  // (D,)
  float eps;
  char *y, *dx;    // contiguous
  float* dweight;  // (D,), or of a kernel (chunks, D), where it adds; null: not requested
};

struct GatedActivationArgs {
  Dtype dtype;
  Activation activation;
  int64_t B, T, I;
  Rows gate_up, dy;    // (B, T, 2 I), gate first; (B, T, I), backward only
  char *y, *dgate_up;  // (B, T, I), (B, T, 2 I), contiguous
};

struct RotaryArgs {
  Dtype dtype;
  int64_t B, T, H, K, R;
  Rows x;         // (B, T, H K)
  Rows cos, sin;  // (B, T, R), float32
  char* y;        // (B, T, H K), contiguous
};

constexpr int64_t kPanel = 32;    // outputs of a linear layer that are packed side by side
constexpr int64_t kDepth = 128;   // inputs that are processed with a panel at a time
constexpr int64_t kFewRows = 16;  // beyond this float32 weights are transposed, see linear_rows.h

struct LinearRowsArgs {
  Dtype dtype;  // of weight and bias; with scales float32, while weight is int8
  int64_t n, in, out;
  Rows rows;                  // (n, in)
  const char *weight, *bias;  // (out, in), (out,); bias may be null
  const float* scales;        // (out,), which multiply the rows of an int8 weight; null: none
  bool packed;                // weight holds panels with biases: see packed_decode.py
  char* y;                    // (n, out)
  int64_t y_stride;
  bool wide, add;  // rows and y are float32, whatever dtype is; add to y, if wide
  float* x;        // (x_size(n, in),) scratch: the rows as the kernel reads them
  bool amx;        // whether the CPU has it, and rows may be rounded to bfloat16
  bool panels() const { return packed || (dtype == kFloat32 && n > kFewRows && !amx); }
  int64_t padded() const { return (in + 31) / 32 * 32; }
  static int64_t x_size(int64_t n, int64_t in) {
    return (n + 15) / 16 * 16 * ((in + kDepth - 1) / kDepth * kDepth);
  }
};

constexpr float kLeastScale = 1e-37f;  // of rows of zeros; its inverse is finite

struct QuantizeArgs {
  Dtype dtype;
  int64_t out, in;
  const char* weight;  // (out, in)
  int8_t* rows;        // (out, in)
  float* scales;       // (out,)
};

constexpr int64_t kDecodeRows = 32;  // of a packed model that a thread processes together

// The layers of a model, as packed_decode.py lists them. Any pointer but `weight` may be null.
struct NormWeights { const float *weight, *bias; };
struct LinearWeights {
  const char *weight, *bias;
  const float* scales;           // null unless weight is int8, and bias float32
  const float *lora_a, *lora_b;  // (rank, in), (out, rank) in panels: the layer adds B A x
  int64_t rank;
};
struct LayerWeights {
  NormWeights norm1;
  LinearWeights qkv;
  const float *q_norm, *k_norm;
  LinearWeights out;
  NormWeights norm2;
  LinearWeights up, down;
};
struct ModelWeights {
  const char *embedding, *positions;  // (V, D), (positions, D)
  NormWeights norm;
  LinearWeights head;
};

struct PackedDecodeArgs {
  Dtype dtype;                    // of embeddings, weights and biases; norms are float32
  DecodeAttentionArgs attention;  // keys and values of layer 0, others follow; q, k, v, out unset
  int64_t layers, T, D, I, V, rank;  // rank: the largest
  Activation activation;
  bool packed, gated, amx;  // amx is set per call
  int64_t size;             // the number of weights, if packed
  float eps;
  const int64_t *tokens, *counts;  // (B, T); only a row's first counts[b] are real; null: all
  int64_t* lengths;                // (N,)
  const ModelWeights* model;
  const LayerWeights* weights;  // (layers,)
  float* logits;                // (B, V)
  int64_t block;                // tokens processed together; this and the rest are set per call
  int threads;                  // that share a block
  float* scratch;               // (scratch_size(),)
  int64_t* indices;             // (3, block)
  int64_t count(int64_t b) const { return counts ? counts[b] : T; }
  int64_t heads() const { return attention.H * attention.K; }
  int64_t wide() const {
    return std::max(heads() + 2 * attention.Hkv * attention.K, (1 + gated) * I + kPanel);
  }
  int64_t x_size() const { return LinearRowsArgs::x_size(block, std::max({D, heads(), I, rank})); }
  int64_t scratch_size() const {
    return 16 + x_size() + block * (D + std::max(D, heads()) + wide() + rank);
  }
};

struct SamplingArgs {
  Dtype dtype;
  int64_t B, V;
  Rows logits;  // (B, V)
  const int64_t *seeds, *counters;
  double temperature;
  int64_t top_k;  // 0 keeps all, like the next two
  double top_p, min_p;
  int64_t* tokens;
  float *logprobs, *full_logprobs;  // full_logprobs is null iff nothing is truncated
  double* sums;                     // one per block of a row; each thread's own, like scratch
  float* scratch;
};

// One table per ISA. A kernel computes rows (or elements) [begin, end) in the calling thread.
template <class Args> using Kernel = void (*)(const Args&, int64_t begin, int64_t end);

struct Table {
  Kernel<LogprobsArgs> logprobs_fwd[kDtypes], logprobs_bwd[kDtypes];
  Kernel<FullKlArgs> full_kl_fwd[kDtypes], full_kl_bwd[kDtypes];
  Kernel<KlArgs> kl_fwd[kEstimators], kl_bwd[kEstimators];
  Kernel<GaeArgs> gae_fwd, gae_bwd;
  Kernel<AdvantagesArgs> ppo_advantages;  // including the moments of each row
  void (*whiten)(float* x, const bool* mask, int64_t n, double mean, double scale);
  Kernel<PpoLossArgs> ppo_loss;                           // [begin, end) are chunks of rows
  Kernel<DecodeAttentionArgs> decode_attention[kDtypes];  // by cache_dtype; B * Hkv units
  Kernel<RmsNormArgs> rms_norm_fwd[kDtypes][kDtypes];     // by dtype and y_dtype
  Kernel<RmsNormArgs> rms_norm_bwd[kDtypes][kDtypes];
  Kernel<GatedActivationArgs> gated_activation_fwd[kDtypes], gated_activation_bwd[kDtypes];
  Kernel<RotaryArgs> rotary[kDtypes];
  bool amx;  // whether linear_rows can use it
  void (*linear_rows[kDtypes])(const LinearRowsArgs& args, int threads);
  void (*linear_rows_int8)(const LinearRowsArgs& args, int threads);
  Kernel<QuantizeArgs> quantize_rows[kDtypes];
  Kernel<PackedDecodeArgs> packed_decode[kDtypes];
  Kernel<SamplingArgs> sample_tokens[kDtypes];
};

// These throw std::invalid_argument on a bad target, token, slot or count, or RLHF_CORE_CPU_ISA.
void token_logprobs_fwd(const LogprobsArgs& args, int threads);
void token_logprobs_bwd(const LogprobsArgs& args, int threads);
void full_kl_fwd(const FullKlArgs& args, int threads);
void full_kl_bwd(const FullKlArgs& args, int threads);
void kl_estimate_fwd(const KlArgs& args, int64_t n, int threads);
void kl_estimate_bwd(const KlArgs& args, int64_t n, int threads);
void gae_fwd(const GaeArgs& args, int threads);
void gae_bwd(const GaeArgs& args, int threads);
void ppo_advantages_fwd(AdvantagesArgs args, bool whiten, int threads);
void ppo_loss_fwd(PpoLossArgs args, int threads);
void decode_attention_fwd(DecodeAttentionArgs args, int threads);
void rms_norm_fwd(const RmsNormArgs& args, int threads);
void rms_norm_bwd(RmsNormArgs args, int threads);
void gated_activation_fwd(const GatedActivationArgs& args, int threads);
void gated_activation_bwd(const GatedActivationArgs& args, int threads);
void rotary_fwd(const RotaryArgs& args, int threads);
void linear_rows_fwd(LinearRowsArgs args, int threads);
void quantize_rows_fwd(const QuantizeArgs& args, int threads);
void packed_decode_fwd(const PackedDecodeArgs& args, int threads);
void sample_tokens_fwd(const SamplingArgs& args, int threads);

std::string isa();                          // the one in use
std::vector<std::string> available_isas();  // on this CPU and build, slowest first
const char* threading();

}  // namespace rlhf
