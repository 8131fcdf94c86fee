// How often this program has asked for memory: malloc and its relatives are interposed (allocations.cpp).
#pragma once

namespace loramix_test {

/// False where a sanitizer owns malloc: nothing is counted there.
bool counts_allocations();
long allocations();

}  // namespace loramix_test
