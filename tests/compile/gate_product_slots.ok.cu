// Factors that fill different slots.
#include <loramix/gate/gates.hpp>

int main() {
  const loramix::GateProduct gate{loramix::TokenExperts<>{}, loramix::RankScale<>{}};
  return static_cast<int>(gate.form(0, 0).tokens);
}
