// expect: two factors of this GateProduct fill the same slot of the normal form; multiply them into one
#include <loramix/gate/gates.hpp>

int main() {
  const loramix::GateProduct gate{loramix::TokenExperts<>{}, loramix::GroupExperts<>{}};
  return static_cast<int>(gate.form(0, 0).tokens);
}
