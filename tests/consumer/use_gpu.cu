#include <cublas_v2.h>
#include <loramix/core/version.hpp>

int main() { return loramix::version_major < 0; }
