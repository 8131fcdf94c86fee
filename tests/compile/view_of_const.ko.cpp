// expect: MatrixView<float
#include <loramix/core/views.hpp>

int main() {
  loramix::MatrixView<const float> read;
  loramix::MatrixView<float> written = read;
  return static_cast<int>(written.rows);
}
