// B1 to B16 of PEERS 4.8 as products (adapters.cpp: those that are more than a product), with everything beside them.
#include "product.hpp"

namespace bench {
namespace {

constexpr Index d = 4096, wide = 11008;
constexpr auto both = {Passes::forward, Passes::train};
constexpr auto forward = {Passes::forward};
constexpr auto one_and_two = {Index{1}, Index{2}};

void dense() {
  for (const Index R : {8, 16, 64}) {
    add_product("B1", {{.T = 512, .d_in = d, .d_out = d, .R = R}}, one_and_two, both);
    add_product("B1", {{.T = 512, .d_in = d, .d_out = d, .R = R, .scalar = "bfloat16"}}, one_and_two, both);
  }
  for (const Index E : {2, 4, 8}) {
    add_product("B2", {{.T = 512, .d_in = d, .d_out = wide, .R = 128, .E = E}, Gate::dense}, one_and_two, both);
  }
  add_product("B3", {{.T = 512, .d_in = d, .d_out = wide, .R = 16, .E = 4}, Gate::shared}, one_and_two, both);
  add_product("B4", {{.T = 512, .d_in = d, .d_out = d, .R = 32, .E = 8}, Gate::dense}, one_and_two, both);
  for (const Index d_out : {1024, 4096}) {
    for (const Index R : {8, 32, 128, 256}) {
      ProductRow row{{.T = 32768, .d_in = 1024, .d_out = d_out, .R = R}};
      row.brief = true;
      add_product("B11", row, {2}, both);
    }
  }
  ProductRow decode{{.T = 1, .d_in = d, .d_out = d, .R = 16}};
  decode.copies = 1400;
  add_product("B16 cold", decode, one_and_two, forward);
}

void sparse() {
  add_product("B5", {{.T = 2048, .d_in = d, .d_out = d, .R = 64, .E = 8}, Gate::top_k}, one_and_two, both);
  add_product("B7", {{.T = 1024, .d_in = 1024, .d_out = 1024, .R = 2048, .E = 16}, Gate::top_k}, one_and_two, both);
  add_product("B12", {{.T = 4096, .d_in = 768, .d_out = 3072, .R = 8}, Gate::prefix}, one_and_two, both);
  for (const char* const length : {"16", "32", "48", "drawn"}) {  // beside LoRA of all 64 ranks, and what must be moved
    ProductRow row{{.T = 2048, .d_in = d, .d_out = d, .R = 64, .note = length}, Gate::prefix};
    row.prefix = *length == 'd' ? 0 : std::stoll(length);
    row.brief = true;
    add_product("MoRE prefix", row, one_and_two, {Passes::forward, Passes::backward});
  }
  for (const Index T : {1, 16, 128, 1024}) {
    ProductRow row{{.T = T, .d_in = 3072, .d_out = 2688, .R = 32768, .E = 1024}, Gate::top_k};
    row.brief = true;
    add_product("B13", row, one_and_two, forward);
  }
  add_product("B14", {{.T = 512, .d_in = d, .d_out = d, .R = 64, .E = 8}, Gate::segments}, one_and_two, both);
}

void serving() {
  for (const Index T : {1, 4, 16, 64}) {
    Index root = 1;
    while (root * root < T) ++root;
    for (const Index L : {Index{1}, root, T}) {
      if ((L == root && root == 1) || (L == T && T == 1)) continue;
      ProductRow row{{.T = T, .d_in = d, .d_out = wide, .R = 16 * L, .E = L}, Gate::served};
      row.copies = T == 1 ? 750 : 1;
      row.brief = true;
      add_product("B8", row, one_and_two, forward);
    }
  }
  for (const Index T : {64, 256}) {
    for (const Index L : {1, 5, 100, 1000}) {
      ProductRow row{{.T = T, .d_in = d, .d_out = d, .R = 0, .E = L}, Gate::served};
      for (Index i = 0; i < L; ++i) row.rank_of.push_back(Index{8} << i % 4);
      for (const Index r : row.rank_of) row.axes.R += r;
      row.brief = true;
      add_product("B9", row, one_and_two, forward);
    }
  }
}

// What a router adds: its rows in the same pass over x. `lora` has them too, `lora without side rows` has not.
void side_rows() {
  const auto add = [](Index T, Index d_out, Index R, Index side) {
    ProductRow row{{.T = T, .d_in = d, .d_out = d_out, .R = R, .E = 8}, Gate::dense};
    row.side = side;
    row.brief = true;
    add_product("side rows " + std::to_string(side), row, one_and_two, both);
  };
  add(512, wide, 128, 8);  // a linear router
  add(512, d, 32, 8);
  add(512, wide, 128, 64);  // TeamLoRA's S
  add(512, d, 32, 64);
}

}  // namespace

void register_shapes() {
  dense();
  sparse();
  serving();
  side_rows();
}

}  // namespace bench
