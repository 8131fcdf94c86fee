/// LoRAs that come and go in device memory that stays where it is: a captured graph goes on serving.
///
/// Computes:    place: slot e of `served` holds `lora` from then on, in the first of its ranks; the others are 0. clear_slot: it is empty,
///              and tokens that name it get nothing. A server makes room once, slots of the largest rank it takes, not used:
///              lm::Served<P, lm::Space::device>({d_in, d_out, {{64}, {64}, {16}}}).
/// Source:      S-LoRA (arXiv 2311.03285): adapters paged in and out of a pool.
/// Reads:       a LoRA in host or device memory.
/// Writes:      A, B, scale and id of the slot.
/// Errors:      a slot that is none, another shape, a rank that has no room: before any write; CUDA failures (ErrorCode::device).
/// Cost:        one slot is copied, on `stream`: forwards enqueued there before see the old one. A LoRA in host memory must live until
///              the stream has passed it (where it is not pinned CUDA may have read it before, and need not). Not for captures.
/// Determinism: bit for bit.
/// Example:     tests/gpu/serving.cu (include loramix/adapter/served.hpp for what is served)
#pragma once
#include <loramix/core/adapter.hpp>
#include <loramix/gpu/buffer.cuh>
#include <loramix/gpu/launch.cuh>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace gpu {

/// What holds LoRAs in slots, in device memory: lm::Served<P, lm::Space::device>.
template <class A>
concept ServedOnDevice = Adapter<A> && A::space == Space::device&& requires(A& served, Index e) {
  served.slot(e).rank;
  served.id(e).data;
  served.scales(e).data;
};

namespace detail {
template <class Served>
void check_slot(const char* op, const Served& served, Index e) {
  if (e >= 0 && e < served.slots()) return;
  fail(check::detail::about(ErrorCode::value, op, "slot") << " is " << e << "; there are " << served.slots());
}
/// Enqueues values = 0 for n of them.
template <class T>
void enqueue_zeros(cudaStream_t stream, T* values, Index n) {
  if (n == 0) return;
  check_cuda("cudaMemsetAsync", cudaMemsetAsync(values, 0, static_cast<std::size_t>(n) * sizeof(T), stream));
}
/// scales = scale, and the slot's id: by one block, with values that travel with the launch.
template <class Score>
__global__ void __launch_bounds__(128)
    name_slot_kernel(Score scale, Score* scales, Index room, std::int32_t e, std::int32_t* id) {
  for (Index i = threadIdx.x; i < room; i += blockDim.x) scales[i] = scale;
  if (threadIdx.x == 0) *id = e;
}
}  // namespace detail

/// Empties slot e.
template <ServedOnDevice Served>
void clear_slot(cudaStream_t stream, Served& served, Index e) {
  detail::check_slot("clear_slot", served, e);
  check_cuda("cudaMemsetAsync", cudaMemsetAsync(served.id(e).data, 0xff, sizeof(std::int32_t), stream));  // −1
}

/// Puts `lora`, an lm::Lora of the same element in either memory, into slot e, whatever was there.
template <Adapter Lora, ServedOnDevice Served>
void place(cudaStream_t stream, const Lora& lora, Served& served, Index e) {
  using Score = typename Served::score;
  const char* const op = "place";
  detail::check_slot(op, served, e);
  const Index rank = lora.config().rank, room = served.slot(e).rank, d_in = served.config().d_in,
              d_out = served.config().d_out;
  check::same(op, "the LoRA", "d_in", lora.config().d_in, "the server's", d_in);
  check::same(op, "the LoRA", "d_out", lora.config().d_out, "the server's", d_out);
  if (rank > room) {
    fail(check::detail::about(ErrorCode::shape, op, "the LoRA")
         << " has rank " << rank << ", but slot " << e << " has room for " << room);
  }
  copy(stream, lora.A(), served.A(e).row_range(0, rank));
  copy(stream, lora.B(), served.B(e).col_range(0, rank));
  detail::enqueue_zeros(stream, served.A(e).data + rank * d_in, (room - rank) * d_in);
  detail::enqueue_zeros(stream, served.B(e).data + rank * d_out, (room - rank) * d_out);
  Backend be;
  be.stream = stream;
  detail::launch(be, "name_slot_kernel", &detail::name_slot_kernel<Score>, dim3(1), 128, 0, Score(lora.scale()),
                 served.scales(e).data, room, static_cast<std::int32_t>(e), served.id(e).data);
}

}  // namespace gpu
}  // namespace LORAMIX_ABI
}  // namespace loramix
