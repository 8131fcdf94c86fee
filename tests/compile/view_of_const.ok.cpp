// A view to read is made from a view to write.
#include <loramix/core/views.hpp>

int main() {
  loramix::MatrixView<float> written;
  loramix::MatrixView<const float> read = written;
  return static_cast<int>(read.rows);
}
