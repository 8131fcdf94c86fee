#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <cstdio>

#include "support/seed.hpp"

int main(int argc, char** argv) {
  std::printf("seed %llu (replay with LORAMIX_SEED)\n", static_cast<unsigned long long>(loramix_test::seed()));
  return doctest::Context(argc, argv).run();
}
