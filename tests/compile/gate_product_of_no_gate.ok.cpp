#include <loramix/gate/gates.hpp>

loramix::GateProduct<loramix::RankPrefix<>, loramix::RankScale<>> gate{{}, {}};
