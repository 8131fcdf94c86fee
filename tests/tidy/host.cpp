// What clang-tidy reads: every host header once. Adapters and ops are templates, so what is not used here is checked
// only as far as clang looks into templates.
#include <loramix/core/version.hpp>

int main() { return loramix::version_major < 0; }
