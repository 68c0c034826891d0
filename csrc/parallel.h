// parallel_for over independent rows. Threads take chunks from a shared counter, which evens out
// masked rows and busy cores. Rows are never split, so results do not depend on the threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#ifdef _OPENMP
#include <pthread.h>
#else
#include <thread>
#include <vector>
#endif

namespace rlhf {

#ifdef _OPENMP
// A forked child has lost its parent's OpenMP threads, but libgomp would wait for them.
inline bool forked = false;
inline const int watching_forks = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

// Rows per chunk: about 30 us of work, because waking a thread on a busy machine is not cheap.
inline int64_t row_grain(int64_t elements_per_row) {
  return std::max<int64_t>(1, (int64_t{1} << 17) / std::max<int64_t>(1, elements_per_row));
}

// Calls body(begin, end) over [0, n) in chunks of `grain`. A single chunk or thread runs in the
// caller. A chunk should take longer than waking a thread, about 10 us.
template <class Body>
void parallel_for(int64_t n, int64_t grain, int threads, const Body& body) {
  threads = static_cast<int>(std::min<int64_t>(threads, (n + grain - 1) / grain));
#ifdef _OPENMP
  if (forked) threads = 1;
#endif
  if (threads <= 1) return body(0, n);
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t i; (i = next.fetch_add(grain, std::memory_order_relaxed)) < n;)
      body(i, std::min(i + grain, n));
  };
#ifdef _OPENMP  // torch's own libgomp, whose threads already exist
#pragma omp parallel num_threads(threads)
  work();
#else
  std::vector<std::thread> helpers;
  for (int i = 1; i < threads; ++i) helpers.emplace_back(work);
  work();
  for (auto& helper : helpers) helper.join();
#endif
}

}  // namespace rlhf
