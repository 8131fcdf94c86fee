// expect: a factor of this GateProduct is not a gate: it needs static constexpr GateFacts facts
#include <loramix/gate/gates.hpp>

struct NotAGate {};
loramix::GateProduct<loramix::RankPrefix<>, NotAGate> gate{{}, {}};
