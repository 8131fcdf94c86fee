/// The library's version. CMake reads these three lines; the major number is also part of the ABI namespace.
#pragma once
#include <loramix/core/config.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

inline constexpr int version_major = 0;
inline constexpr int version_minor = 1;
inline constexpr int version_patch = 0;

}  // namespace LORAMIX_ABI
}  // namespace loramix
