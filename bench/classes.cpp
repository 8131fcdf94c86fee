// The class table of SPEED.md: for each class shapes that suit the tiles and one of primes, forward and backward, on one
// and two threads. bench/summary.py prints the median of floor/time over a class beside its bar.
#include "product.hpp"

namespace bench {
namespace {

struct Shape {
  Index T, d_in, d_out;
};

void add_class(const char* name, Gate gate, Index rank, Index prime_rank, std::initializer_list<Shape> shapes,
               Shape primes, std::initializer_list<Passes> passes, bool cold = false) {
  const bool mixture = gate != Gate::open;
  const auto add = [&](const Shape& s, Index r) {
    const Index experts = mixture ? 8 : 1, weights = r * experts * (s.d_in + s.d_out) * 4;
    ProductRow row{{.T = s.T, .d_in = s.d_in, .d_out = s.d_out, .R = r * experts, .E = experts}, gate};
    row.copies = cold ? (Index{700} << 20) / weights + 1 : 1;  // gone round: what no cache holds
    row.brief = true;
    add_product(std::string("class/") + name, row, {1, 2}, passes);
  };
  for (const Shape& s : shapes) add(s, rank);
  add(primes, prime_rank);
}

}  // namespace

void register_classes() {
  const auto both = {Passes::forward, Passes::backward};
  const auto many = {Shape{2048, 4096, 4096}, Shape{512, 4096, 11008}};
  const Shape primes{509, 4093, 4099};
  add_class("R>=128", Gate::open, 128, 131, many, primes, both);
  add_class("R>=128 mixture", Gate::dense, 16, 17, {{2048, 4096, 4096}}, primes, both);
  add_class("R=32..64", Gate::open, 32, 37, many, primes, both);
  add_class("R=32..64", Gate::open, 64, 61, {{2048, 4096, 4096}}, {1021, 1021, 1031}, both);
  add_class("R=16", Gate::open, 16, 17, many, primes, both);
  add_class("R<=8", Gate::open, 8, 7, {{2048, 4096, 4096}, {4096, 768, 3072}}, primes, both);
  add_class("top2 r=32", Gate::top_k, 32, 31, many, primes, both);
  add_class("top2 r=16", Gate::top_k, 16, 17, many, primes, both);
  add_class("top2 r=8", Gate::top_k, 8, 7, many, primes, both);
  add_class("T=16", Gate::open, 16, 31, {{16, 4096, 4096}}, {13, 4093, 4099}, both);
  add_class("T=16", Gate::dense, 16, 17, {{16, 4096, 4096}, {16, 4096, 11008}}, {13, 4093, 4099}, both);
  const auto forward = {Passes::forward};
  add_class("T=1 cold", Gate::open, 16, 31, {{1, 4096, 4096}, {1, 4096, 11008}}, {1, 4093, 4099}, forward, true);
  add_class("T=1 cold", Gate::open, 128, 131, {{1, 4096, 4096}}, {1, 4093, 4099}, forward, true);
  add_class("T=1 warm", Gate::open, 16, 31, {{1, 4096, 4096}}, {1, 4093, 4099}, forward);
  for (const Index R : {Index{16}, Index{64}, Index{128}}) {
    for (const char* const scalar : {"bfloat16", "bfloat16-amx"}) {
      const ProductRow row{{.T = 2048, .d_in = 4096, .d_out = 4096, .R = R, .scalar = scalar}};
      add_product("class/bfloat16", row, {1, 2}, both);
    }
  }
}

}  // namespace bench
