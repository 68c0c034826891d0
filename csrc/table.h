// All kernels of one ISA. dispatch.cpp includes this per ISA, in a namespace and target region.
#include "simd.h"

#include "logprobs.h"

#include "kl.h"

#include "gae.h"
#include "policy_loss.h"
#include "sampling.h"

#include "decode_attention.h"
#include "linear_rows.h"
#include "rms_norm.h"
#include "rotary.h"

#include "gated_activation.h"
#include "packed_decode.h"

const Table table = {
    {logprobs_fwd<float>, logprobs_fwd<BF16>, logprobs_fwd<F16>},
    {logprobs_bwd<float>, logprobs_bwd<BF16>, logprobs_bwd<F16>},
    {full_kl_fwd<float>, full_kl_fwd<BF16>, full_kl_fwd<F16>},
    {full_kl_bwd<float>, full_kl_bwd<BF16>, full_kl_bwd<F16>},
    {kKlFwd[kK1], kKlFwd[kK2], kKlFwd[kK3], kKlFwd[kAbs]},
    {kl_estimate<kK1, true>, kl_estimate<kK2, true>, kl_estimate<kK3, true>,
     kl_estimate<kAbs, true>},
    gae_fwd,
    gae_bwd,
    ppo_advantages,
    whiten,
    ppo_loss,
    {decode_attention<float>, decode_attention<BF16>, decode_attention<F16>},
    {{rms_norm_fwd<float, float>, rms_norm_fwd<float, BF16>, rms_norm_fwd<float, F16>},
     {nullptr, rms_norm_fwd<BF16, BF16>, nullptr},
     {nullptr, nullptr, rms_norm_fwd<F16, F16>}},
    {{rms_norm_bwd<float, float>, rms_norm_bwd<float, BF16>, rms_norm_bwd<float, F16>},
     {nullptr, rms_norm_bwd<BF16, BF16>, nullptr},
     {nullptr, nullptr, rms_norm_bwd<F16, F16>}},
    {gated_activation_fwd<float>, gated_activation_fwd<BF16>, gated_activation_fwd<F16>},
    {gated_activation_bwd<float>, gated_activation_bwd<BF16>, gated_activation_bwd<F16>},
    {rotary<float>, rotary<BF16>, rotary<F16>},
    RLHF_ISA == 513,
    {linear_rows<float>, linear_rows<BF16>, linear_rows<F16>},
    linear_rows<I8>,
    {quantize_rows<float>, quantize_rows<BF16>, quantize_rows<F16>},
    {packed_decode<float>, packed_decode<BF16>, packed_decode<F16>},
    {sample_tokens<float>, sample_tokens<BF16>, sample_tokens<F16>},
};

#undef SIMD
