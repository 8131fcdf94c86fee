// expect: Adapter
#include <loramix/core/adapter.hpp>

struct Nearly {  // no config, no buffer, no visit
  using precision = loramix::Precision<float>;
  using element = float;
  static constexpr loramix::Space space = loramix::Space::host;
};

int main() { return static_cast<int>(loramix::parameter_count(Nearly{})); }
