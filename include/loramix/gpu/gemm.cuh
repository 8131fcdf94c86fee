/// The one place that calls cuBLAS.
///
/// Computes:    C = α A B + β C for β 0 or 1, in float or double; with Into::set (β = 0) C is never read.
/// Reads:       A [m, k], B [k, n], each in either storage order.
/// Adds to:     C [m, n], in either order, or assigns.
/// Errors:      a status of cuBLAS or CUDA other than success (ErrorCode::device).
/// Cost:        2·m·n·k flop; cuBLAS scratch from the arena.
/// Determinism: no TF32, no atomics: exact products of the type, in an order that cuBLAS fixes for a shape and a device.
/// Example:     gpu/product.cuh
#pragma once
#include <loramix/gpu/backend.cuh>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace gpu {
namespace detail {

inline void check_blas(const char* call, cublasStatus_t status) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  Error error(ErrorCode::device);
  fail(error << "loramix: " << call << " failed: " << cublasGetStatusName(status) << ", "
             << cublasGetStatusString(status));
}

/// cuBLAS wants 256-byte alignment, arenas give 64.
inline constexpr Index blas_alignment = 256;

inline std::byte* carve_blas(DeviceArena& arena, const Backend& be) {
  std::byte* const memory = arena.take<std::byte>(be.blas_bytes + blas_alignment - DeviceArena::alignment);
  const auto address = reinterpret_cast<std::uintptr_t>(memory);
  return memory + (blas_alignment - address % blas_alignment) % blas_alignment;
}

/// The engine's settings of a handle, put back at the end of the scope. The workspace goes back to cuBLAS's own: setting
/// the stream does that.
class HandleSettings {
 public:
  explicit HandleSettings(cublasHandle_t handle) : handle_(handle) {
    check_blas("cublasGetStream", cublasGetStream(handle, &stream_));
    check_blas("cublasGetPointerMode", cublasGetPointerMode(handle, &pointers_));
    check_blas("cublasGetMathMode", cublasGetMathMode(handle, &math_));
    check_blas("cublasGetAtomicsMode", cublasGetAtomicsMode(handle, &atomics_));
  }
  ~HandleSettings() {
    cublasSetStream(handle_, stream_);
    cublasSetPointerMode(handle_, pointers_);
    cublasSetMathMode(handle_, math_);
    cublasSetAtomicsMode(handle_, atomics_);
  }
  HandleSettings(const HandleSettings&) = delete;
  HandleSettings& operator=(const HandleSettings&) = delete;

 private:
  cublasHandle_t handle_;
  cudaStream_t stream_ = nullptr;
  cublasPointerMode_t pointers_{};
  cublasMath_t math_{};
  cublasAtomicsMode_t atomics_{};
};

/// The backend's handle for the duration of one op.
class Blas {
 public:
  Blas(const Backend& be, std::byte* workspace) : handle_(be.cublas), stream_(be.stream), engine_(be.cublas) {
    // The stream first: setting it drops the workspace.
    check_blas("cublasSetStream", cublasSetStream(handle_, be.stream));
    check_blas("cublasSetWorkspace", cublasSetWorkspace(handle_, workspace, static_cast<std::size_t>(be.blas_bytes)));
    check_blas("cublasSetPointerMode", cublasSetPointerMode(handle_, CUBLAS_POINTER_MODE_HOST));
    check_blas("cublasSetMathMode", cublasSetMathMode(handle_, CUBLAS_DEFAULT_MATH));
    check_blas("cublasSetAtomicsMode", cublasSetAtomicsMode(handle_, CUBLAS_ATOMICS_NOT_ALLOWED));
  }

  /// C (+)= α A B.
  template <class T, class A, class B, Major MA, Major MB>
  void multiply(T alpha, View<A, MA> a, View<B, MB> b, View<T> c, Into into) const {
    static_assert(std::is_same_v<const T, const A> && std::is_same_v<const T, const B>);
    static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>,
                  "loramix: the composed GPU path accumulates in float or double");
    if (c.empty()) return;
    if (a.cols == 0) {
      if (into == Into::set) fill_zero(c);
      return;
    }
    // cuBLAS is column-major: it is asked for Cᵀ = Bᵀ Aᵀ, where a row-major operand is its own transpose.
    const T beta = into == Into::add ? T(1) : T(0);
    gemm(MB == Major::row ? CUBLAS_OP_N : CUBLAS_OP_T, MA == Major::row ? CUBLAS_OP_N : CUBLAS_OP_T, c.cols, c.rows,
         a.cols, &alpha, b.data, leading(b), a.data, leading(a), &beta, c.data, leading(c));
  }
  /// A column-major C is a row-major Cᵀ.
  template <class T, class A, class B, Major MA, Major MB>
  void multiply(T alpha, View<A, MA> a, View<B, MB> b, View<T, Major::column> c, Into into) const {
    multiply(alpha, b.transposed(), a.transposed(), c.transposed(), into);
  }

 private:
  /// The stride of a matrix of one row or column may be anything; cuBLAS checks it nevertheless.
  template <class T, Major M>
  static Index leading(View<T, M> v) {
    const Index outer = M == Major::row ? v.rows : v.cols, inner = M == Major::row ? v.cols : v.rows;
    return outer > 1 ? v.stride : inner;
  }

  template <class T>
  void fill_zero(View<T> c) const {
    const std::size_t size = sizeof(T);
    check_cuda("cudaMemset2DAsync",
               cudaMemset2DAsync(c.data, static_cast<std::size_t>(leading(c)) * size, 0,
                                 static_cast<std::size_t>(c.cols) * size, static_cast<std::size_t>(c.rows), stream_));
  }

  void gemm(cublasOperation_t ta, cublasOperation_t tb, Index m, Index n, Index k, const float* alpha, const float* a,
            Index lda, const float* b, Index ldb, const float* beta, float* c, Index ldc) const {
    check_blas("cublasSgemm_64", cublasSgemm_64(handle_, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc));
  }
  void gemm(cublasOperation_t ta, cublasOperation_t tb, Index m, Index n, Index k, const double* alpha, const double* a,
            Index lda, const double* b, Index ldb, const double* beta, double* c, Index ldc) const {
    check_blas("cublasDgemm_64", cublasDgemm_64(handle_, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc));
  }

  cublasHandle_t handle_;
  cudaStream_t stream_;
  HandleSettings engine_;
};

}  // namespace detail
}  // namespace gpu
}  // namespace LORAMIX_ABI
}  // namespace loramix
