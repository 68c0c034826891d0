// All kernels of one ISA. dispatch.cpp includes this once per ISA, in a namespace and target region of its own.
#include "simd.h"

#include "kl.h"
#include "logprobs.h"

const Table table = {
    {logprobs_fwd<float>, logprobs_fwd<BF16>, logprobs_fwd<F16>},
    {logprobs_bwd<float>, logprobs_bwd<BF16>, logprobs_bwd<F16>},
    {kl_estimate<kK1, false>, kl_estimate<kK2, false>, kl_estimate<kK3, false>, kl_estimate<kAbs, false>},
    {kl_estimate<kK1, true>, kl_estimate<kK2, true>, kl_estimate<kK3, true>, kl_estimate<kAbs, true>},
};

#undef SIMD
