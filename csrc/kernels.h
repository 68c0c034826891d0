// What the bindings may call: plain structs of pointers and element strides. Knows neither torch nor pybind11.
#pragma once

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

struct LogprobsArgs {
  Dtype dtype;
  int64_t B, T, V;
  double temperature;
  Rows logits;
  Grid<const int64_t> targets;
  Grid<const bool> mask;          // null: every position counts
  float *logprobs, *entropy;      // (B, T); the backward reads entropy; null where not asked for
  float* lse;                     // (B, T, 2): offset m, log sum exp((z - m) / temperature)
  Grid<const float> dlogprobs, dentropy;  // backward only; dentropy may be null
  Rows dlogits;                           // backward only; may be the logits
};

struct KlArgs {
  Estimator estimator;
  const float *logprobs, *ref_logprobs, *dkl;
  const bool* mask;
  float *kl, *dlogprobs, *dref_logprobs;
};

struct GaeArgs {
  int64_t T;
  double gamma, lam;
  const bool* mask;
  const float *rewards, *values, *last_values;
  float *advantages, *returns;
  const float *dadvantages, *dreturns;  // backward only, as are the next three
  float *drewards, *dvalues, *dlast_values;
};

// One table per ISA. A kernel works on rows (or elements) [begin, end) and knows nothing of threads.
template <class Args>
using Kernel = void (*)(const Args&, int64_t begin, int64_t end);

struct Table {
  Kernel<LogprobsArgs> logprobs_fwd[kDtypes], logprobs_bwd[kDtypes];
  Kernel<KlArgs> kl_fwd[kEstimators], kl_bwd[kEstimators];
};

// Wrong input (a target out of range, an impossible RLHF_CORE_CPU_ISA) throws std::invalid_argument.
void token_logprobs_fwd(const LogprobsArgs& args, int threads);
void token_logprobs_bwd(const LogprobsArgs& args, int threads);
void kl_estimate_fwd(const KlArgs& args, int64_t n, int threads);
void kl_estimate_bwd(const KlArgs& args, int64_t n, int threads);
void gae_fwd(const GaeArgs& args, int64_t B, int threads);
void gae_bwd(const GaeArgs& args, int64_t B, int threads);

std::string isa();                          // the one in use
std::vector<std::string> available_isas();  // those this CPU and this build can run, slowest first
const char* threading();

}  // namespace rlhf
