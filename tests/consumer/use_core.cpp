#include <loramix/core/version.hpp>

int main() { return loramix::version_major < 0; }
