// Compiled once per instruction set, with Eigen renamed (see CMakeLists.txt).
#include <Eigen/Core>
#include <loramix/core/version.hpp>

#define LORAMIX_JOIN2(a, b) a##b
#define LORAMIX_JOIN(a, b) LORAMIX_JOIN2(a, b)

/// Sum of A·B for small fixed matrices: the same number whatever the instruction set.
double LORAMIX_JOIN(product_, LORAMIX_TEST_ISA)() {
  Eigen::MatrixXf a(23, 17);
  Eigen::MatrixXf b(17, 19);
  for (int i = 0; i < a.size(); ++i) a.data()[i] = static_cast<float>(i % 7 - 3);
  for (int i = 0; i < b.size(); ++i) b.data()[i] = static_cast<float>(i % 5 - 2);
  const Eigen::MatrixXf c = a * b;
  return static_cast<double>(c.sum()) + loramix::version_major * 0;
}
