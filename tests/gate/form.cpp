// The normal form, rank by rank, against the written-out meaning of drawn gates; groups; what check_form refuses.
#include <doctest/doctest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include <loramix/gate/gates.hpp>

#include "conformance/gates.hpp"
#include "core/caught.hpp"
#include "support/seed.hpp"

using namespace loramix_test;

namespace {

/// Memory without a backend.
class Memory {
 public:
  static constexpr lm::Space space = lm::Space::host;
  template <class T>
  T* upload(const std::vector<T>& values) {
    const auto memory = std::make_shared<std::vector<T>>(values);
    memory->reserve(values.size() + 1);
    alive_.push_back(memory);
    return memory->data();
  }
  lm::StatusFlags* status() { return nullptr; }

 private:
  std::vector<std::shared_ptr<void>> alive_;
};

}  // namespace

TEST_CASE("a lowered gate is open where its data say so, and its factors are theirs") {
  Random random(seed(70));
  for (const GateSpec& spec : gate_specs()) {
    if (spec.computed) continue;
    for (const Index tokens : {1, 17}) {
      for (const Index experts : {1, 4}) {
        INFO(std::string(spec.name), ", T ", tokens, ", E ", experts);
        Memory memory;
        const GateData data = draw_gate(random, spec, tokens, experts, 3);
        LoweredGate<Memory, double> gate(memory, data, 2);
        const lm::GateForm<double>& form = gate.form();
        lm::check_form("test", form, tokens, data.ranks);
        const NamedGate<double> want = truth<double>(data);
        long wrong = 0, open = 0;
        for (Index t = 0; t < tokens; ++t) {
          const lm::GateRow<double, double, lm::Space::host> row(form, t);
          for (Index j = 0; j < data.ranks; ++j) {
            const Index e = form.expert_of(j);
            wrong += form.expert_begin(e) <= j && j < form.expert_begin(e + 1) ? 0 : 1;
            wrong += row.open(j, e) == (want.gate.open(t, j) != 0) ? 0 : 1;
            if (want.gate.open(t, j) == 0) continue;
            ++open;
            const double g = reference::product_of_factors(want.gate, t, j);
            wrong += std::abs(row.factor(j, e) - g) <= 1e-14 * std::abs(g) ? 0 : 1;  // at most five factors
            for (std::size_t i = 0; i < want.names.size(); ++i) {
              const double others = reference::product_of_factors(want.gate, t, j, static_cast<Index>(i));
              const double got = want.names[i] == FactorName::id_weights   ? row.factor<lm::Factor::id_weight>(j, e)
                                 : want.names[i] == FactorName::weights    ? row.factor<lm::Factor::weight>(j, e)
                                 : want.names[i] == FactorName::values     ? row.factor<lm::Factor::value>(j, e)
                                 : want.names[i] == FactorName::multiplier ? row.factor<lm::Factor::multiplier>(j, e)
                                                                           : row.factor<lm::Factor::rank_scale>(j, e);
              wrong += std::abs(got - others) <= 1e-14 * std::abs(others) ? 0 : 1;
            }
          }
        }
        CHECK(wrong == 0);
        CHECK(open > 0);
      }
    }
  }
}

TEST_CASE("the group of a token: segments, some of them empty") {
  const auto by_hand = [](const std::vector<lm::Index>& offsets, Index t) {
    for (std::size_t g = 0; g + 1 < offsets.size(); ++g) {
      if (offsets[g] <= t && t < offsets[g + 1]) return static_cast<Index>(g);
    }
    return Index{-1};
  };
  const std::vector<std::vector<lm::Index>> all = {
      {0, 9},       {0, 0, 9}, {0, 9, 9}, {0, 0, 0, 4, 4, 4, 9, 9, 9}, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9},
      {0, 3, 3, 9}, {0, 8, 9}};
  for (const std::vector<lm::Index>& offsets : all) {
    const auto groups = lm::Groups<>::by_segment(offsets.data(), static_cast<Index>(offsets.size()) - 1);
    CHECK(!groups.per_token());
    CHECK(groups.size(9) == groups.count);
    for (Index t = 0; t < 9; ++t) CHECK(groups.of(t) == by_hand(offsets, t));
    CHECK(groups.of(9) == -1);
  }
  Random random(seed(71));
  for (int round = 0; round < 200; ++round) {
    std::vector<lm::Index> offsets{0};
    while (offsets.back() < 40) offsets.push_back(std::min<lm::Index>(40, offsets.back() + draw_below(random, 9)));
    const auto groups = lm::Groups<>::by_segment(offsets.data(), static_cast<Index>(offsets.size()) - 1);
    long wrong = 0;
    for (Index t = 0; t < 40; ++t) wrong += groups.of(t) == by_hand(offsets, t) ? 0 : 1;
    CHECK(wrong == 0);
  }
  const lm::Index zero[1] = {0};
  CHECK(lm::Groups<>::by_segment(zero, 0).of(0) == -1);
}

TEST_CASE("the group of a token: ids, and its own") {
  const std::int32_t ids[] = {2, -1, 0, 2};
  const auto groups = lm::Groups<>::by_id(ids, 3);
  CHECK(groups.of(0) == 2);
  CHECK(groups.of(1) == -1);
  CHECK(groups.size(4) == 3);
  CHECK(lm::Groups<>{}.per_token());
  CHECK(lm::Groups<>{}.of(17) == 17);
  CHECK(lm::Groups<>{}.size(18) == 18);
}

TEST_CASE("bad contents close the token, set the flag and read nothing") {
  // On the device nobody has looked at the ids before: the row must.
  lm::StatusFlags status;
  const std::int32_t ids[] = {7, -5, 1}, groups[] = {0, 9, -3};
  const double weights[] = {0.5, 0.25};
  lm::GateForm<double> form;
  form.tokens = 3;
  form.ranks = 4;
  form.experts = 2;
  form.status = &status;
  using Row = lm::GateRow<double, double, lm::Space::host>;

  SUBCASE("expert ids") {
    form.ids = {ids, 3, 1};
    CHECK(Row(form, 2).expert_at(0) == 1);
    CHECK(status.bad_expert_id == 0);
    for (Index j = 0; j < 4; ++j) CHECK(!Row(form, 0).open(j, form.expert_of(j)));
    CHECK(Row(form, 0).expert_at(0) == -1);
    CHECK(status.bad_expert_id == 1);
    status = {};
    CHECK(Row(form, 1).expert_at(0) == -1);
    CHECK(status.bad_expert_id == 1);
  }
  SUBCASE("group ids") {
    form.weights = {weights, 1, 2};
    form.weight_groups = lm::Groups<>::by_id(groups, 1);
    CHECK(Row(form, 0).open(0, 0));
    CHECK(status.bad_group_id == 0);
    for (const Index t : {1, 2}) {
      status = {};
      const Row row(form, t);
      CHECK(status.bad_group_id == 1);
      CHECK(!row.covered());
      for (Index j = 0; j < 4; ++j) CHECK(!row.open(j, form.expert_of(j)));
    }
  }
}

TEST_CASE("check_form refuses what a form must not be") {
  constexpr Index tokens = 4, ranks = 6;
  const std::int32_t ids[8] = {0, 1, 2, -1, 1, 0, -1, -1}, bad_low[4] = {0, -2, 1, 1}, bad_high[4] = {0, 1, 3, 1};
  const std::int32_t twice[4] = {0, 0, 1, 2}, bad_group[4] = {0, 1, 2, 0};
  const std::int32_t nobody[4] = {-1, -1, -1, -1};
  const lm::Index offsets[4] = {0, 1, 4, 6}, short_offsets[3] = {0, 1, 3}, late[3] = {1, 2, 4}, halves[3] = {0, 2, 4},
                  descending[4] = {0, 3, 2, 4};
  const lm::Index mixed_descending[4] = {0, 4, 3, 6};
  const double numbers[24] = {};
  lm::GateForm<double> good;
  good.tokens = tokens;
  good.ranks = ranks;
  good.experts = 3;
  const auto refuses = [&](lm::ErrorCode code, std::initializer_list<std::string> parts,
                           const lm::GateForm<double>& f) {
    check_error(code, parts, [&] { lm::check_form("the_op", f, tokens, ranks); });
  };
  lm::check_form("the_op", good, tokens, ranks);

  auto f = good;
  f.ids = {ids, 4, 2};
  lm::check_form("the_op", f, tokens, ranks);
  f.id_weights = {numbers, 4, 3};
  refuses(lm::ErrorCode::shape, {"the_op", "id_weights", "3", "2"}, f);
  f = good;
  f.ids = {bad_low, 4, 1};
  refuses(lm::ErrorCode::value, {"the_op", "ids", "-2", "row 1", "3 experts"}, f);
  f.ids = {bad_high, 4, 1};
  refuses(lm::ErrorCode::value, {"the_op", "ids", "expert 3", "row 2", "3 experts"}, f);
  f.ids = {twice, 2, 2};
  f.id_groups = lm::Groups<>::by_id(ids, 2);
  refuses(lm::ErrorCode::value, {"group id 2", "token 2", "2 groups"}, f);
  f.id_groups = lm::Groups<>::by_segment(halves, 2);
  refuses(lm::ErrorCode::value, {"expert 0", "twice", "row 0"}, f);
  f = good;
  f.rank_offsets = offsets;
  lm::check_form("the_op", f, tokens, ranks);
  f.rank_offsets = mixed_descending;
  refuses(lm::ErrorCode::value, {"rank_offsets", "descends"}, f);
  f.rank_offsets = descending;
  refuses(lm::ErrorCode::shape, {"rank_offsets", "last", "4", "6"}, f);
  f = good;
  f.experts = 4;
  refuses(lm::ErrorCode::shape, {"6 ranks", "4 experts", "rank_offsets"}, f);
  f.experts = 0;
  refuses(lm::ErrorCode::value, {"experts", "0"}, f);
  f = good;
  f.tokens = 3;
  refuses(lm::ErrorCode::shape, {"tokens", "3", "4"}, f);

  // A slot that has columns was meant to be there: ids without an address would open every expert.
  f = lm::OneExpert<double>{.ids = {}, .groups = {}, .experts = 3}.form(tokens, ranks);
  refuses(lm::ErrorCode::null, {"the_op", "gate ids", "null address"}, f);
  f = lm::TopKExperts<double>{{nullptr, 0, 2}, {}, 3}.form(tokens, ranks);
  refuses(lm::ErrorCode::null, {"the_op", "gate ids", "null address"}, f);
  f = lm::TopKExperts<double>{{nullptr, tokens, 0}, {}, 3}.form(tokens, ranks);
  refuses(lm::ErrorCode::null, {"the_op", "gate ids", "null address"}, f);
  f = lm::TokenExperts<double>{{nullptr, 0, 3}}.form(tokens, ranks);
  refuses(lm::ErrorCode::null, {"the_op", "gate weights", "null address"}, f);
  f = lm::TopKExperts<double>{{nullptr, 0, 0}, {nullptr, 0, 2}, 3}.form(tokens, ranks);
  lm::check_form("the_op", f, tokens, ranks);  // weights that are empty are 1
  f = lm::TopKExperts<double>{{bad_low, tokens, 0}, {}, 3}.form(tokens, ranks);
  lm::check_form("the_op", f, tokens, ranks);  // k = 0 with an address: nothing is open

  // No tokens: an empty vector of ids has a null address, and that is no error.
  f = {};
  f.ranks = ranks;
  f.experts = 3;
  f.weights = {numbers, 4, 3};
  f.weight_groups = lm::Groups<>::by_id(nullptr, 4);
  lm::check_form("the_op", f, 0, ranks);

  // Every slot that has groups checks them, and its own size.
  const auto with_groups = [&](const char* slot, auto set) {
    const std::string name = slot;
    CAPTURE(name);
    const auto bad = [&](lm::ErrorCode code, std::initializer_list<std::string> parts, lm::Groups<> groups,
                         Index rows) {
      auto g = good;
      set(g, groups, rows);
      refuses(code, parts, g);
    };
    auto g = good;
    set(g, lm::Groups<>::by_id(bad_group, 3), 3);
    lm::check_form("the_op", g, tokens, ranks);
    bad(lm::ErrorCode::null, {name, "3 groups", "null ids", "4 tokens"}, lm::Groups<>::by_id(nullptr, 3), 3);
    bad(lm::ErrorCode::null, {name, "groups of tokens"}, lm::Groups<>::by_id(nobody, 0), 0);
    bad(lm::ErrorCode::value, {name, "group id 2", "token 2", "2 groups"}, lm::Groups<>::by_id(bad_group, 2), 2);
    bad(lm::ErrorCode::shape, {name, "3", "4"}, lm::Groups<>::by_segment(short_offsets, 2), 2);
    bad(lm::ErrorCode::shape, {name, "first", "1", "0"}, lm::Groups<>::by_segment(late, 2), 2);
    bad(lm::ErrorCode::value, {name, "descend"}, lm::Groups<>::by_segment(descending, 3), 3);
    bad(lm::ErrorCode::shape, {name, "2", "3"}, lm::Groups<>::by_id(ids, 3), 2);
    bad(lm::ErrorCode::shape, {name, "3", "4"}, {}, 3);
  };
  const std::uint8_t bits[24] = {};
  with_groups("prefix", [&](auto& g, lm::Groups<> groups, Index rows) {
    g.prefix = {rows == 0 ? nullptr : ids, rows};
    g.prefix_groups = groups;
  });
  with_groups("subset", [&](auto& g, lm::Groups<> groups, Index rows) {
    g.subset = {rows == 0 ? nullptr : bits, rows, ranks};
    g.subset_groups = groups;
  });
  with_groups("weights", [&](auto& g, lm::Groups<> groups, Index rows) {
    g.weights = {rows == 0 ? nullptr : numbers, rows, 3};
    g.weight_groups = groups;
  });
  with_groups("multiplier", [&](auto& g, lm::Groups<> groups, Index rows) {
    g.multiplier = {rows == 0 ? nullptr : numbers, rows};
    g.multiplier_groups = groups;
  });
  with_groups("ids", [&](auto& g, lm::Groups<> groups, Index rows) {
    g.ids = {rows == 0 ? nullptr : ids + 4, rows, 1};
    g.id_groups = groups;
  });

  // A slot that has a size but no memory was meant to be there: it is not "open".
  const auto null_slot = [&](const char* slot, auto set) {
    auto g = good;
    set(g);
    refuses(lm::ErrorCode::null, {"gate", slot, "null"}, g);
  };
  null_slot("weights", [](auto& g) { g.weights = {nullptr, tokens, 3}; });
  null_slot("values", [](auto& g) { g.values = {nullptr, tokens, ranks}; });
  null_slot("rank_scale", [](auto& g) { g.rank_scale = {nullptr, ranks}; });
  null_slot("multiplier", [](auto& g) { g.multiplier = {nullptr, tokens}; });
  null_slot("ids", [](auto& g) { g.ids = {nullptr, tokens, 1}; });
  null_slot("prefix", [](auto& g) { g.prefix = {nullptr, tokens}; });
  null_slot("subset", [](auto& g) { g.subset = {nullptr, tokens, ranks}; });
}
