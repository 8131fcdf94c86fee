// How often this program has taken memory from the heap so far. The one file of a test program that includes this
// replaces malloc and its kin (operator new and Eigen end there); under a sanitizer, which owns malloc, operator new.
#pragma once

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdlib>
#include <new>

#include <loramix/core/views.hpp>

namespace loramix_test {
inline std::atomic<loramix::Index> allocation_count{0};
inline loramix::Index allocations() { return allocation_count.load(); }
}  // namespace loramix_test

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define LORAMIX_TEST_SANITIZED 1
#elif defined(__has_feature)  // gcc 12 has none, doctest gives it one that says no
#define LORAMIX_TEST_SANITIZED (__has_feature(address_sanitizer) || __has_feature(thread_sanitizer))
#else
#define LORAMIX_TEST_SANITIZED 0
#endif

#if defined(__GLIBC__) && !LORAMIX_TEST_SANITIZED
extern "C" {
void* __libc_malloc(std::size_t);
void* __libc_calloc(std::size_t, std::size_t);
void* __libc_realloc(void*, std::size_t);
void* __libc_memalign(std::size_t, std::size_t);

void* malloc(std::size_t size) {
  ++loramix_test::allocation_count;
  return __libc_malloc(size);
}
void* calloc(std::size_t n, std::size_t size) {
  ++loramix_test::allocation_count;
  return __libc_calloc(n, size);
}
void* realloc(void* p, std::size_t size) {
  ++loramix_test::allocation_count;
  return __libc_realloc(p, size);
}
void* memalign(std::size_t alignment, std::size_t size) {
  ++loramix_test::allocation_count;
  return __libc_memalign(alignment, size);
}
void* aligned_alloc(std::size_t alignment, std::size_t size) { return memalign(alignment, size); }
int posix_memalign(void** p, std::size_t alignment, std::size_t size) {
  *p = memalign(alignment, size);
  return *p == nullptr ? ENOMEM : 0;
}
}
#else
void* operator new(std::size_t size) {
  ++loramix_test::allocation_count;
  if (void* const p = std::malloc(size)) return p;
  throw std::bad_alloc();
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }
#endif
