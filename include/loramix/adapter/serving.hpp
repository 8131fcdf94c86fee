/// LoRAs that come and go while other threads run forward: immutable snapshots behind one pointer.
///
/// Computes:    snapshot() is what is served now; add and remove make the next snapshot and put it in its place. A forward
///              that began on the old one ends on it.
/// Source:      PEERS: per-request hot swap, many adapters in one batch.
/// Reads:       LoRAs [r, d_in], [d_out, r]; they are copied.
/// Writes:      the current snapshot.
/// Errors:      a LoRA of another shape, a slot that is out of range or empty; the snapshot stays.
/// Cost:        add and remove copy every parameter, outside the lock that readers take; snapshot copies a pointer.
/// Determinism: a slot keeps its id while it is used; the lowest free slot is used next.
/// Example:     tests/adapter/serving.cpp
#pragma once
#include <memory>
#include <mutex>

#include <loramix/adapter/experts.hpp>
#include <loramix/adapter/served.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// What a server holds; safe from any number of threads. A mutex guards the pointer: libstdc++ 12's
/// atomic<shared_ptr> is reported by ThreadSanitizer.
template <class P = float, class T = typename precision_t<P>::weight>
class Serving {
 public:
  using Snapshot = Served<P, Space::host, T>;
  using Pointer = std::shared_ptr<const Snapshot>;

  Serving(Index d_in, Index d_out) : current_(std::make_shared<const Snapshot>(ServedConfig{d_in, d_out})) {}

  Pointer snapshot() const {
    const std::lock_guard lock(pointer_);
    return current_;
  }
  /// Returns the id of the LoRA's slot.
  Index add(const Lora<P, Space::host, T>& lora) {
    const std::lock_guard writing(writers_);
    const Pointer before = snapshot();
    ServedConfig config = before->config();
    check::same("Serving::add", "the LoRA", "d_in", lora.config().d_in, "the server's", config.d_in);
    check::same("Serving::add", "the LoRA", "d_out", lora.config().d_out, "the server's", config.d_out);
    std::size_t id = 0;
    while (id < config.slots.size() && config.slots[id].used) ++id;
    if (id == config.slots.size()) config.slots.emplace_back();
    config.slots[id] = {lora.config().rank, lora.scale(), true};
    const auto next = copied(*before, config, static_cast<Index>(id));
    detail::copy_rows(lora.A(), next->A(static_cast<Index>(id)));
    detail::copy_rows(lora.B().transposed(), next->B(static_cast<Index>(id)).transposed());
    publish(next);
    return static_cast<Index>(id);
  }
  /// Empties a slot.
  void remove(Index id) {
    const std::lock_guard writing(writers_);
    const Pointer before = snapshot();
    ServedConfig config = before->config();
    if (id < 0 || id >= before->slots() || !before->slot(id).used) {
      fail(check::detail::about(ErrorCode::value, "Serving::remove", "id")
           << " " << id << " is no adapter in use; there are " << before->slots() << " slots");
    }
    config.slots[static_cast<std::size_t>(id)] = {};
    publish(copied(*before, config, id));
  }

 private:
  /// The next snapshot: every slot as it was but one.
  static std::shared_ptr<Snapshot> copied(const Snapshot& before, const ServedConfig& config, Index but) {
    const auto next = std::make_shared<Snapshot>(config);
    for (Index e = 0; e < before.slots(); ++e) {
      if (e == but) continue;
      detail::copy_rows(before.A(e), next->A(e));
      detail::copy_rows(before.B(e).transposed(), next->B(e).transposed());
    }
    return next;
  }
  void publish(Pointer next) {
    const std::lock_guard lock(pointer_);
    current_.swap(next);
  }

  mutable std::mutex pointer_;
  std::mutex writers_;
  Pointer current_;
};

}  // namespace LORAMIX_ABI
}  // namespace loramix
