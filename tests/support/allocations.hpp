// How often this program has taken memory from the heap so far, on all threads (allocations.cpp).
#pragma once

namespace loramix_test {
long allocations();
/// Takes memory once and gives it back; no compiler sees through the volatile.
inline void take_memory() {
  char* volatile p = new char;
  delete p;
}
}  // namespace loramix_test
