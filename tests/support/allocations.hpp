// How often this program has taken memory from the heap so far, on all threads (allocations.cpp).
#pragma once
#include <atomic>
#include <thread>

namespace loramix_test {
long allocations();
/// Returns when every thread of an executor's has begun to work: one that starts takes memory, under sanitizers.
template <class Executor>
void begin_threads(const Executor& executor) {
  std::atomic<long> here{0};
  executor.run(executor.lanes(), [&](auto, auto) {
    here.fetch_add(1);
    while (here.load() < executor.lanes()) std::this_thread::yield();
  });
}
/// Takes memory once and gives it back; no compiler sees through the volatile.
inline void take_memory() {
  char* volatile p = new char;
  delete p;
}
}  // namespace loramix_test
