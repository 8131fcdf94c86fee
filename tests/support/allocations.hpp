// How often this program has taken memory from the heap so far, on all threads (allocations.cpp).
#pragma once

namespace loramix_test {
long allocations();
}  // namespace loramix_test
