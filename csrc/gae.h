// Generalised advantage estimation over the counted tokens of each row, and its adjoint. One recurrence per row: plain
// scalar code, carried in double. What is masked is neither used nor waited for, its outputs are 0.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace rlhf {

inline void gae_fwd_rows(const GaeArgs& a, int64_t begin, int64_t end) {
  const double decay = a.gamma * a.lam;
  for (int64_t b = begin; b < end; ++b) {
    double next_value = a.last_values ? a.last_values[b] : 0, advantage = 0;
    for (int64_t i = (b + 1) * a.T - 1; i >= b * a.T; --i) {
      a.advantages[i] = a.returns[i] = 0;
      if (!a.mask[i]) continue;
      const double value = a.values[i], delta = a.rewards[i] + a.gamma * next_value - value;
      advantage = delta + decay * advantage;
      next_value = value;
      a.advantages[i] = static_cast<float>(advantage);
      a.returns[i] = static_cast<float>(advantage + value);
    }
  }
}

inline void gae_bwd_rows(const GaeArgs& a, int64_t begin, int64_t end) {
  const double decay = a.gamma * a.lam;
  for (int64_t b = begin; b < end; ++b) {
    double ddelta = 0;  // of the counted token before
    for (int64_t i = b * a.T; i < (b + 1) * a.T; ++i) {
      a.drewards[i] = a.dvalues[i] = 0;
      if (!a.mask[i]) continue;
      const double dreturn = a.dreturns[i], via_next = a.gamma * ddelta;
      ddelta = a.dadvantages[i] + dreturn + decay * ddelta;
      a.drewards[i] = static_cast<float>(ddelta);
      a.dvalues[i] = static_cast<float>(dreturn - ddelta + via_next);
    }
    if (a.dlast_values) a.dlast_values[b] = static_cast<float>(a.gamma * ddelta);
  }
}

}  // namespace rlhf
