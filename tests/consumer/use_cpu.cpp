#include <Eigen/Core>
#include <loramix/core/version.hpp>

int main() { return Eigen::VectorXf::Zero(3).sum() == 0 ? loramix::version_major < 0 : 1; }
