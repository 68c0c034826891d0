// What the bindings may call: plain structs of pointers and element strides. Knows neither torch nor pybind11.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

namespace rlhf {

enum Dtype { kFloat32, kBFloat16, kFloat16, kDtypes };
enum Estimator { kK1, kK2, kK3, kAbs, kEstimators };

// The leading two axes of a (B, T, ...) tensor. Strides count elements; 0 (an expanded axis) is as good as any.
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
  template <class E>
  E* at(int64_t b, int64_t t) const { return reinterpret_cast<E*>(data) + (b * stride_b + t * stride_t); }
};

// What an op on rows of logits is given.
struct LogitsArgs {
  Dtype dtype;
  int64_t B, T, V;
  double temperature;
  Grid<const float> temperatures;  // one per row; null: `temperature` for all
  Rows logits;
  Grid<const bool> mask;  // null: every position counts
  double temperature_at(int64_t b, int64_t t) const { return temperatures ? temperatures.at(b, t) : temperature; }
};

struct LogprobsArgs : LogitsArgs {
  Grid<const int64_t> targets;
  float *logprobs, *entropy;  // (B, T); the backward reads entropy; null where not asked for
  float* lse;                 // (B, T, 2): offset m, log sum exp((z - m) / temperature); the forward's may be null
  Grid<const float> dlogprobs, dentropy;  // backward only; dentropy may be null
  Rows dlogits;                           // backward only; may be the logits
};

struct FullKlArgs : LogitsArgs {
  Rows ref_logits;
  float *kl, *lse;              // (B, T), (B, T, 4): as in LogprobsArgs, of the policy's row, then of the reference's
  Grid<const float> dkl;        // backward only
  char *dlogits, *dref_logits;  // backward only, contiguous; null where not asked for
};

struct KlArgs {
  Estimator estimator;
  const float *logprobs, *ref_logprobs, *dkl;
  const bool* mask;
  float *kl, *dlogprobs, *dref_logprobs;
};

struct GaeArgs {
  int64_t B, T;               // with cu_seqlens T is the mean length, good for nothing but the size of the work
  const int64_t* cu_seqlens;  // (B + 1): sequence b is [cu_seqlens[b], cu_seqlens[b + 1]); null: row b of (B, T)
  double gamma, lam;
  const bool* mask;
  const float *rewards, *values, *last_values;
  float *advantages, *returns;
  const float *dadvantages, *dreturns;  // backward only, as are the next three
  float *drewards, *dvalues, *dlast_values;
  int64_t begin(int64_t b) const { return cu_seqlens ? cu_seqlens[b] : b * T; }
};

struct Moments { double count, mean, m2; };  // m2: the sum of squared deviations from the mean

// rewards = -kl_coef * kl, plus the score on a sequence's last counted token; then GAE.
struct AdvantagesArgs {
  GaeArgs gae;  // no last_values
  KlArgs kl;
  const float* scores;  // (B,)
  double kl_coef;
  float* rewards;    // gae.rewards
  Moments* moments;  // (B,) of the advantages; null: they are not whitened
};

// What ppo_loss sums over the counted tokens, in the order of its statistics; then the loss and the sequences that
// count anything.
enum PpoSum { kPolicyLoss, kValueLoss, kEntropy, kApproxKl, kClipped, kValueClipped, kRatio, kRatioSquared,
              kDualClipped, kCount, kLoss, kSequences, kPpoSums };

struct PpoLossArgs {
  int64_t B, T;
  const float *logprobs, *old_logprobs, *advantages;  // (B, T), as is all that follows
  const float *values, *old_values, *returns, *entropy, *weights;  // null where not given
  const bool* mask;
  bool sequence_mean;
  double clip_low, clip_high;
  float value_clip_range, vf_coef, entropy_coef, dual_clip;  // infinite ranges do not clip
  float *loss, *scale, *stats;            // (), (), (kCount + 1)
  float *dlogprobs, *dvalues, *dentropy;  // of loss / scale
  int64_t chunk_rows;                     // rows whose sums are formed together;
  double* chunk_sums;                     // (chunks, kPpoSums): both set by ppo_loss_fwd
};

struct DecodeAttentionArgs {
  Dtype dtype, cache_dtype;  // of q, k, v and out; of keys and values
  int64_t B, H, Hkv, K, N, S, window;
  struct Heads { char* data; int64_t stride; } q, k, v;  // (B, H or Hkv, K); stride, of the rows, counts elements
  char *keys, *values;                                   // (N, Hkv, S, K)
  const int64_t *lengths, *slots;                        // (N,), (B,)
  const int64_t* positions;                              // (B,), where the new tokens go; set by decode_attention_fwd
  const float *cos, *sin;                                // (positions, K / 2); null: no rotation
  char* out;                                             // (B, H, K)
  char* head(const Heads& x, int64_t b, int64_t h) const {
    return x.data + (b * x.stride + h * K) * (dtype == kFloat32 ? 4 : 2);
  }
};

struct RmsNormArgs {
  Dtype dtype;
  int64_t B, D;
  Rows x;  // (B, D)
  const char* weight;
  float eps;
  char* out;  // contiguous
};

constexpr int64_t kPanel = 32;       // outputs of a linear layer whose packed weights lie side by side
constexpr int64_t kDecodeRows = 32;  // that go through packed_decode together

struct PackedDecodeArgs {
  DecodeAttentionArgs attention;  // keys and values of the first layer, before those of the others; no q, k, v, out
  int64_t layers, T, D, I, V;
  bool qk_norm;
  float eps;
  const int64_t *tokens, *counts;    // (B, T), of which a row's first counts[b] are real; null: all
  int64_t* lengths;                  // (N,)
  const float *embedding, *weights;  // (V, D); see packed_decode.py
  float *logits, *scratch;           // (B, V); (scratch_size(),), set by packed_decode_fwd for each thread
  int64_t count(int64_t b) const { return counts ? counts[b] : T; }
  int64_t wide() const { return std::max((attention.H + 2 * attention.Hkv) * attention.K, 2 * I + kPanel); }
  int64_t scratch_size() const { return kDecodeRows * (D + std::max(D, attention.H * attention.K) + wide()); }
};

struct SamplingArgs {
  Dtype dtype;
  int64_t B, V;
  Rows logits;  // (B, V)
  const int64_t *seeds, *counters;
  double temperature;
  int64_t top_k;        // 0: all, as in the next two
  double top_p, min_p;
  int64_t* tokens;
  float *logprobs, *full_logprobs;  // the latter null if and only if nothing is truncated
  double* sums;                     // one per block of a row, and what else a row needs:
  float* scratch;                   // both set by sample_tokens_fwd for each thread
};

// One table per ISA. A kernel works on rows (or elements) [begin, end) and knows nothing of threads.
template <class Args>
using Kernel = void (*)(const Args&, int64_t begin, int64_t end);

struct Table {
  Kernel<LogprobsArgs> logprobs_fwd[kDtypes], logprobs_bwd[kDtypes];
  Kernel<FullKlArgs> full_kl_fwd[kDtypes], full_kl_bwd[kDtypes];
  Kernel<KlArgs> kl_fwd[kEstimators], kl_bwd[kEstimators];
  Kernel<GaeArgs> gae_fwd, gae_bwd;
  Kernel<AdvantagesArgs> ppo_advantages;  // up to the moments of each row
  void (*whiten)(float* x, const bool* mask, int64_t n, double mean, double scale);
  Kernel<PpoLossArgs> ppo_loss;  // works on chunks of rows
  Kernel<DecodeAttentionArgs> decode_attention[kDtypes];  // by cache_dtype; works on key/value heads of rows
  Kernel<RmsNormArgs> rms_norm[kDtypes];
  Kernel<PackedDecodeArgs> packed_decode;
  Kernel<SamplingArgs> sample_tokens[kDtypes];
};

// Wrong input (a target or slot out of range, an impossible RLHF_CORE_CPU_ISA) throws std::invalid_argument.
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
void packed_decode_fwd(const PackedDecodeArgs& args, int64_t size, int threads);  // size: of all weights
void sample_tokens_fwd(const SamplingArgs& args, int threads);

std::string isa();                          // the one in use
std::vector<std::string> available_isas();  // those this CPU and this build can run, slowest first
const char* threading();

}  // namespace rlhf
