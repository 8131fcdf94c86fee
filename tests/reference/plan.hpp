// A dispatch plan by the standard library's stable sort.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "reference/grid.hpp"

namespace loramix_test::reference {

struct Plan {
  std::vector<Index> offsets;
  std::vector<std::int32_t> order, inverse;
};

/// expert(i): the expert of choice i, −1 = none.
template <class F>
Plan plan(Index choices, Index experts, const F& expert) {
  Plan p;
  for (Index i = 0; i < choices; ++i) {
    if (expert(i) >= 0) p.order.push_back(static_cast<std::int32_t>(i));
  }
  std::stable_sort(p.order.begin(), p.order.end(),
                   [&](std::int32_t a, std::int32_t b) { return expert(a) < expert(b); });
  for (Index e = 0; e <= experts; ++e) {
    p.offsets.push_back(std::count_if(p.order.begin(), p.order.end(), [&](std::int32_t i) { return expert(i) < e; }));
  }
  p.inverse.assign(static_cast<std::size_t>(choices), -1);
  for (std::size_t place = 0; place < p.order.size(); ++place) {
    p.inverse[static_cast<std::size_t>(p.order[place])] = static_cast<std::int32_t>(place);
  }
  p.order.resize(static_cast<std::size_t>(choices), -1);
  return p;
}

}  // namespace loramix_test::reference
