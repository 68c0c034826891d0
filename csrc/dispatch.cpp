// Compiles the kernels for every ISA, chooses one at run time, and splits the work over threads.

#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12 warns about its own headers
#endif

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <type_traits>
#include <utility>
#include <vector>
#ifdef __x86_64__
#include <cpuid.h>
#include <immintrin.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "kernels.h"
#include "parallel.h"

// Code between BEGIN and END may use the target's instructions. Never include a standard header
// there: CPUs without these instructions could end up running its inline functions.
#ifdef __clang__
#define RLHF_PRAGMA(text) _Pragma(#text)
#define RLHF_BEGIN_TARGET(isa) \
  RLHF_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define RLHF_END_TARGET _Pragma("clang attribute pop")
#else
#define RLHF_PRAGMA(text) _Pragma(#text)
#define RLHF_BEGIN_TARGET(isa) _Pragma("GCC push_options") RLHF_PRAGMA(GCC target(isa))
#define RLHF_END_TARGET _Pragma("GCC pop_options")
#endif

namespace rlhf {

#define RLHF_ISA 0
namespace scalar { namespace {
#include "table.h"
}}  // namespace scalar
#undef RLHF_ISA

#ifdef __x86_64__
#define RLHF_ISA 2
RLHF_BEGIN_TARGET("avx2,fma,f16c")
namespace avx2 { namespace {
#include "table.h"
}}  // namespace avx2
RLHF_END_TARGET
#undef RLHF_ISA

#define RLHF_ISA 512
RLHF_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace avx512 { namespace {
#include "table.h"
}}  // namespace avx512
RLHF_END_TARGET
#undef RLHF_ISA

#define RLHF_ISA 513
RLHF_BEGIN_TARGET("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace avx512_bf16 { namespace {
#include "table.h"
}}  // namespace avx512_bf16
RLHF_END_TARGET
#undef RLHF_ISA
#elif defined(__aarch64__)
#define RLHF_ISA 1
namespace neon { namespace {
#include "table.h"
}}  // namespace neon
#undef RLHF_ISA
#endif

namespace {

template <class... Parts> [[noreturn]] void reject(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

struct Isa {
  const char* name;
  const Table* table;
};

// __builtin_cpu_supports also checks that the operating system saves the registers.
std::vector<Isa> supported() {
  std::vector<Isa> isas = {{"scalar", &scalar::table}};
#ifdef __x86_64__
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    isas.push_back({"avx2", &avx2::table});  // every CPU with AVX2 has F16C
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      isas.push_back({"avx512", &avx512::table});
      if (__builtin_cpu_supports("avx512bf16"))
        isas.push_back({"avx512_bf16", &avx512_bf16::table});
    }
  }
#elif defined(__aarch64__)
  isas.push_back({"neon", &neon::table});
#endif
  return isas;
}

Isa choose() {
  const std::vector<Isa> isas = supported();
  const char* wanted = std::getenv("RLHF_CORE_CPU_ISA");
  if (!wanted || !*wanted) return isas.back();
  std::string possible;
  for (const Isa& isa : isas) {
    if (std::strcmp(isa.name, wanted) == 0) return isa;
    possible += std::string(possible.empty() ? "" : ", ") + isa.name;
  }
  reject("RLHF_CORE_CPU_ISA=", wanted, " is not available here: unset it, or choose from ",
         possible);
}

const Isa& chosen() {
  static const Isa isa = choose();  // at the first call, or again after one that threw
  return isa;
}

// Whether the CPU multiplies tiles of bfloat16, and Linux lets this process use their registers.
bool amx() {
#if defined(__x86_64__) && defined(__linux__)
  static const bool there = [] {
    unsigned a, b, c, d;
    constexpr unsigned kAmxBf16 = 1 << 22, kAmxTile = 1 << 24;
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kAmxBf16) && (d & kAmxTile) &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return there;
#else
  return false;
#endif
}

template <class Args>
void run(Kernel<Args> kernel, const Args& args, int64_t n, int64_t grain, int threads) {
  parallel_for(n, grain, threads, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// The moments of two parts combined (Chan, Golub & LeVeque 1979, eq. 2.1).
Moments combine(const Moments& a, const Moments& b) {
  const double count = a.count + b.count, share = b.count / std::fmax(count, 1);
  const double delta = b.mean - a.mean;
  return {count, a.mean + delta * share, a.m2 + b.m2 + delta * delta * a.count * share};
}

void check_targets(const LogprobsArgs& a) {
  for (int64_t b = 0; b < a.B; ++b)
    for (int64_t t = 0; t < a.T; ++t) {
      const int64_t y = a.targets.at(b, t);
      if ((y >= 0 && y < a.V) || (a.mask && !a.mask.at(b, t))) continue;
      reject("target ", y, " at (", b, ", ", t, ") is outside [0, ", a.V,
             "); positions without a target need mask=targets != IGNORE_INDEX");
    }
}

// The first place from p on that starts a cache line; at most 16 floats on.
float* aligned(float* p) {
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(p) + 63) & ~uintptr_t{63});
}

// The position of each row's new token.
std::vector<int64_t> positions_of(const DecodeAttentionArgs& a) {
  std::vector<bool> taken(a.N);
  std::vector<int64_t> positions(a.B);
  for (int64_t b = 0; b < a.B; ++b) {
    const int64_t slot = a.slots[b];
    const auto reject_slot = [&](auto... why) { reject("row ", b, ": slot ", slot, why...); };
    if (slot < 0 || slot >= a.N) reject_slot(" is outside [0, ", a.N, ")");
    if (taken[slot]) reject_slot(" is an earlier row's");
    const int64_t n = a.lengths[slot];
    const int64_t shared = a.shared_length(slot), last = shared + a.limit;
    if (shared < 0 || shared > a.P || n < shared || n >= last)
      reject_slot(" has length ", n, ", no room for another token in ", last);
    taken[slot] = true;
    positions[b] = n;
  }
  return positions;
}

}  // namespace

void token_logprobs_fwd(const LogprobsArgs& a, int threads) {
  check_targets(a);
  run(chosen().table->logprobs_fwd[a.dtype], a, a.B * a.T, row_grain(a.V), threads);
}

void token_logprobs_bwd(const LogprobsArgs& a, int threads) {
  run(chosen().table->logprobs_bwd[a.dtype], a, a.B * a.T, row_grain(a.V), threads);
}

void full_kl_fwd(const FullKlArgs& a, int threads) {
  run(chosen().table->full_kl_fwd[a.dtype], a, a.B * a.T, row_grain(2 * a.V), threads);
}

void full_kl_bwd(const FullKlArgs& a, int threads) {
  run(chosen().table->full_kl_bwd[a.dtype], a, a.B * a.T, row_grain(2 * a.V), threads);
}

void kl_estimate_fwd(const KlArgs& a, int64_t n, int threads) {
  run(chosen().table->kl_fwd[a.estimator], a, n, row_grain(1), threads);
}

void kl_estimate_bwd(const KlArgs& a, int64_t n, int threads) {
  run(chosen().table->kl_bwd[a.estimator], a, n, row_grain(1), threads);
}

void gae_fwd(const GaeArgs& a, int threads) {
  run(chosen().table->gae_fwd, a, a.B, row_grain(a.T), threads);
}

void gae_bwd(const GaeArgs& a, int threads) {
  run(chosen().table->gae_bwd, a, a.B, row_grain(2 * a.T), threads);
}

void ppo_advantages_fwd(AdvantagesArgs a, bool whitened, int threads) {
  std::vector<Moments> moments(whitened ? a.gae.B : 0);
  a.moments = whitened ? moments.data() : nullptr;
  const Table& table = *chosen().table;
  run(table.ppo_advantages, a, a.gae.B, row_grain(4 * a.gae.T), threads);
  if (!whitened) return;
  Moments all = {};
  for (const Moments& row : moments) all = combine(all, row);
  const int64_t first = a.gae.begin(0), n = a.gae.begin(a.gae.B) - first;
  const double scale = 1 / std::sqrt(all.m2 / std::fmax(all.count, 1) + 1e-8);
  parallel_for(n, row_grain(1), threads, [&](int64_t begin, int64_t end) {
    table.whiten(a.gae.advantages + first + begin, a.gae.mask + first + begin, end - begin,
                 all.mean, scale);
  });
}

void ppo_loss_fwd(PpoLossArgs a, int threads) {
  a.chunk_rows = row_grain(8 * a.T);
  const int64_t chunks = (a.B + a.chunk_rows - 1) / a.chunk_rows;
  std::vector<double> chunk_sums(chunks * kPpoSums);
  a.chunk_sums = chunk_sums.data();
  run(chosen().table->ppo_loss, a, chunks, 1, threads);
  double sums[kPpoSums] = {};
  for (size_t i = 0; i < chunk_sums.size(); ++i) sums[i % kPpoSums] += chunk_sums[i];
  const double count = std::max(1.0, sums[kCount]);
  const double scale =
      a.weights ? 1 : 1 / (a.sequence_mean ? std::max(1.0, sums[kSequences]) : count);
  *a.loss = static_cast<float>(sums[kLoss] * scale);
  *a.scale = static_cast<float>(scale);
  for (int k = 0; k < kCount; ++k) a.stats[k] = static_cast<float>(sums[k] / count);
  a.stats[kCount] = static_cast<float>(sums[kCount]);
}

void decode_attention_fwd(DecodeAttentionArgs a, int threads) {
  const std::vector<int64_t> positions = positions_of(a);
  a.positions = positions.data();
  int64_t keys = 0;  // read by all rows together
  for (int64_t n : positions) keys += std::min(n + 1, a.window);
  const int64_t per_unit = keys / std::max<int64_t>(a.B, 1) * a.K * (1 + a.H / a.Hkv);
  run(chosen().table->decode_attention[a.cache_dtype], a, a.B * a.Hkv, row_grain(per_unit),
      threads);
}

void rms_norm_fwd(const RmsNormArgs& a, int threads) {
  run(chosen().table->rms_norm_fwd[a.dtype][a.y_dtype], a, a.B * a.T, row_grain(a.D), threads);
}

void rms_norm_bwd(RmsNormArgs a, int threads) {
  const int64_t chunks = (a.B * a.T + kNormRows - 1) / kNormRows;
  std::vector<float> sums(a.dweight ? chunks * a.D : 0);
  float* const dweight = std::exchange(a.dweight, a.dweight ? sums.data() : nullptr);
  run(chosen().table->rms_norm_bwd[a.dtype][a.y_dtype], a, chunks, row_grain(2 * kNormRows * a.D),
      threads);
  for (int64_t i = 0; dweight && i < a.D; ++i) {
    double total = 0;
    for (int64_t c = 0; c < chunks; ++c) total += sums[c * a.D + i];
    dweight[i] = static_cast<float>(total);
  }
}

void gated_activation_fwd(const GatedActivationArgs& a, int threads) {
  run(chosen().table->gated_activation_fwd[a.dtype], a, a.B * a.T, row_grain(4 * a.I), threads);
}

void gated_activation_bwd(const GatedActivationArgs& a, int threads) {
  run(chosen().table->gated_activation_bwd[a.dtype], a, a.B * a.T, row_grain(6 * a.I), threads);
}

void rotary_fwd(const RotaryArgs& a, int threads) {
  run(chosen().table->rotary[a.dtype], a, a.B * a.T, row_grain(a.H * a.K), threads);
}

void linear_rows_fwd(LinearRowsArgs a, int threads) {
  const Table& table = *chosen().table;
  const std::unique_ptr<float[]> x(new float[LinearRowsArgs::x_size(a.n, a.in) + 16]);
  a.x = aligned(x.get()), a.amx = table.amx && amx() && !a.scales;
  (a.scales ? table.linear_rows_int8 : table.linear_rows[a.dtype])(a, threads);
}

void quantize_rows_fwd(const QuantizeArgs& a, int threads) {
  run(chosen().table->quantize_rows[a.dtype], a, a.out, row_grain(2 * a.in), threads);
}

void packed_decode_fwd(const PackedDecodeArgs& args, int threads) {
  const int64_t B = args.attention.B, T = args.T;
  const std::vector<int64_t> positions = positions_of(args.attention);
  for (int64_t b = 0; b < B; ++b) {
    const int64_t count = args.count(b);
    const int64_t shared = args.attention.shared_length(args.attention.slots[b]);
    const int64_t limit = shared + args.attention.limit;
    if (count < 1 || count > T || positions[b] + count > limit)
      reject("row ", b, ": cannot append ", count, " of ", T, " tokens at position ", positions[b],
             " of a cache of ", limit);
    for (int64_t t = b * T; t < b * T + count; ++t)
      if (args.tokens[t] < 0 || args.tokens[t] >= args.V)
        reject("row ", b, ": token ", args.tokens[t], " is outside [0, ", args.V, ")");
  }
  const Table& table = *chosen().table;
  const auto decode = [&](int64_t begin, int64_t end, int64_t block, int team) {
    PackedDecodeArgs a = args;
    a.block = block, a.threads = team, a.amx = table.amx && amx();
    const std::unique_ptr<float[]> scratch(new float[a.scratch_size()]);
    const std::unique_ptr<int64_t[]> indices(new int64_t[3 * block]);
    a.scratch = aligned(scratch.get()), a.indices = indices.get();
    table.packed_decode[a.dtype](a, begin, end);
  };
  if (!args.packed) return decode(0, B, B * T, threads);
  // Larger chunks than the work alone requires, because every chunk reads all the weights.
  const int64_t grain =
      std::max(row_grain(args.size * T / 8), std::min(kDecodeRows, (B + threads - 1) / threads));
  parallel_for(B, grain, threads,
               [&](int64_t begin, int64_t end) { decode(begin, end, kDecodeRows, 1); });
}

void sample_tokens_fwd(const SamplingArgs& args, int threads) {
  const auto kernel = chosen().table->sample_tokens[args.dtype];
  parallel_for(args.B, row_grain(2 * args.V), threads, [&](int64_t begin, int64_t end) {
    const int64_t blocks = args.V / 1024 + 1, lanes = 16;  // kDraw; the widest W
    const std::unique_ptr<double[]> sums(new double[blocks]);
    const std::unique_ptr<float[]> scratch(new float[blocks + 3 * (args.V + lanes) + 1024]);
    SamplingArgs a = args;
    a.sums = sums.get(), a.scratch = scratch.get();
    kernel(a, begin, end);
  });
}

std::string isa() { return chosen().name; }

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : supported()) names.push_back(isa.name);
  return names;
}

const char* threading() {
#ifdef _OPENMP
  return "openmp";
#else
  return "std::thread";
#endif
}

}  // namespace rlhf
