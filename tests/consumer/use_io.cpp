#include <loramix/core/version.hpp>
#include <nlohmann/json.hpp>

int main() { return nlohmann::json{{"version", loramix::version_major}}["version"] == loramix::version_major ? 0 : 1; }
