// A row for one gated product at the level of ops, beside its baselines; the families differ in shapes only.
#pragma once
#include <loramix/bench/fixture.hpp>
#include <loramix/ops/expand.hpp>
#include <loramix/ops/shrink.hpp>

#include "gate_data.hpp"
#include "rows.hpp"

namespace bench {

struct ProductRow {
  Axes axes;
  Gate gate = Gate::open;
  Index chosen = 2;
  Index side = 0;                // side rows of a router, in the same pass over x
  Index copies = 1;              // of the weights, gone round: cold
  std::vector<Index> rank_of{};  // of each adapter, where they differ
  Index prefix = 0;              // leading ranks of every token; 0: drawn
  bool brief = false;            // without the baselines that take longest
};

// Operands, scratch and ops. X: of activations and weights; everything else is float.
template <class X>
class Product {
 public:
  static constexpr lm::Space host = lm::Space::host;
  static constexpr lm::Major rank_major = lm::Major::column;

  explicit Product(const ProductRow& row)
      : row_(row),
        gate_({row.gate, row.axes.T, row.axes.R, row.axes.E, row.chosen, row.rank_of, row.prefix}),
        ranks_of_A_(row.gate == Gate::shared ? row.axes.R / row.axes.E : row.axes.R),
        x_(row.axes.T, row.axes.d_in),
        y_(row.axes.T, row.axes.d_out),
        dy_(backward() ? row.axes.T : 0, row.axes.d_out),
        dx_(backward() ? row.axes.T : 0, row.axes.d_in),
        side_(row.side, row.axes.d_in),
        dA_(backward() ? ranks_of_A_ : 0, row.axes.d_in),
        dB_(row.axes.d_out, backward() ? row.axes.R : 0),
        dside_(backward() ? row.side : 0, row.axes.d_in),
        u_(row.axes.T, ranks_of_A_),
        du_(row.axes.T, ranks_of_A_),
        h_(row.axes.T, row.side),
        dh_(row.axes.T, row.side) {
    using lm::bench::fill_uniform;
    fill_uniform(x_.view(), 1);
    fill_uniform(y_.view(), 2);
    fill_uniform(dy_.view(), 3);
    fill_uniform(side_.view(), 4, 0.02);
    fill_uniform(dh_.view(), 5, 0.1);
    for (Index i = 0; i < row.copies; ++i) {
      As_.emplace_back(ranks_of_A_, row.axes.d_in);
      Bs_.emplace_back(row.axes.d_out, row.axes.R);
      if (i == 0) {
        fill_uniform(As_[0].view(), 6, 0.02);
        fill_uniform(Bs_[0].view(), 7, 0.1);
      } else {
        As_.back() = As_[0], Bs_.back() = Bs_[0];
      }
    }
  }
  Product(const Product&) = delete;
  Product& operator=(const Product&) = delete;

  const GateData& gate() const { return gate_; }
  Index copies() const { return row_.copies; }
  const lm::bench::RingPlace& place() const { return place_; }
  Index scratch() const { return scratch_.size(); }
  Operands<X> operands(Index i = 0) requires std::is_same_v<X, float> {
    return {x_.view(), y_.view(), A(i), B(i), dy_.view(), dx_.view(), dA_.view(), dB_.view(), scale};
  }

  // The row's passes with another backend, or with every rank open.
  template <class B>
  std::function<void()> work(const B& be, bool closed_too = false, bool with_side = true) {
    Index bytes = 0;
    ops(0, closed_too, with_side, [&](const auto& op) { bytes = std::max(bytes, scratch_bytes(be, op)); });
    if (bytes > scratch_.size()) scratch_ = lm::Buffer<std::byte>(lm::Arena<>::with_alignment(bytes));
    return [this, be, closed_too, with_side] {
      const lm::Arena<> arena{scratch_};
      const auto copy = static_cast<Index>(place_.next(static_cast<std::size_t>(copies())));
      ops(copy, closed_too, with_side, [&](const auto& op) { lm::execute(be, op, arena); });
    };
  }
  // One forward, so that a backward has its U.
  template <class B>
  void forward_once(const B& be) {
    Index bytes = 0;
    forward_ops(0, false, true, [&](const auto& op) { bytes = std::max(bytes, scratch_bytes(be, op)); });
    lm::Buffer<std::byte> scratch(lm::Arena<>::with_alignment(bytes));
    forward_ops(0, false, true, [&](const auto& op) { lm::execute(be, op, lm::Arena<>{scratch}); });
  }

  // What the passes must compute and move; of weights the part that is used.
  std::vector<lm::bench::PassCost> passes() {
    using lm::bench::span_of;
    const Axes& a = row_.axes;
    const double products = static_cast<double>(ranks_of_A_ * a.d_in + a.R * a.d_out) * gate_.active +
                            static_cast<double>(row_.side * a.d_in);
    const double flop = 2.0 * static_cast<double>(a.T) * products;
    std::vector<lm::bench::PassCost> all;
    if (a.forward()) {
      all.push_back({flop, {}, place_});
      for (Index i = 0; i < copies(); ++i) {
        all.back().traffic.push_back(
            {{used(span_of(A(i))), used(span_of(B(i))), span_of(x_.view()), span_of(side_.view())},
             {span_of(y_.view())}});
      }
    }
    if (a.backward()) {
      all.push_back({2 * flop,
                     {{{span_of(A(0)), span_of(B(0)), span_of(x_.view()), span_of(dy_.view()), span_of(side_.view())},
                       {span_of(dx_.view()), span_of(dA_.view()), span_of(dB_.view()), span_of(dside_.view())}}}});
    }
    return all;
  }

 private:
  static constexpr float scale = 0.5f;
  bool backward() const { return row_.axes.backward(); }
  View<const X> A(Index i) const { return As_[static_cast<std::size_t>(i)].view(); }
  View<const X, rank_major> B(Index i) const { return Bs_[static_cast<std::size_t>(i)].view(); }
  lm::bench::Span used(lm::bench::Span all) const {
    all.bytes = static_cast<Index>(static_cast<double>(all.bytes) * gate_.used) / 64 * 64;
    return all;
  }

  template <class F>
  void forward_ops(Index i, bool open, bool with_side, const F& f) {
    const lm::GateForm<float> form = open ? lm::OpenGate<float>{}.form(row_.axes.T, row_.axes.R) : gate_.form;
    const View<const X> side = with_side ? side_.view() : View<X>{};
    const View<float> h = with_side ? h_.view() : View<float>{};
    f(lm::Shrink<X, X, float, float, host>{A(i), side, x_.view(), {}, u_.view(), h, select(form)});
    f(lm::Expand<float, X, X, float, host, rank_major>{u_.view(), form, B(i), scale, y_.view()});
  }
  template <class F>
  void ops(Index i, bool open, bool with_side, const F& f) {
    if (row_.axes.forward()) forward_ops(i, open, with_side, f);
    if (!backward()) return;
    const lm::GateForm<float> form = open ? lm::OpenGate<float>{}.form(row_.axes.T, row_.axes.R) : gate_.form;
    lm::ExpandBackward<float, X, X, float, float, host, rank_major> expand{
        u_.view(),  form,       B(i),       scale,
        dy_.view(), du_.view(), dB_.view(), open ? lm::GateGradient<float>{} : gate_.gradient};
    expand.gate_values = lm::Into::set;
    f(expand);
    const View<const X> side = with_side ? side_.view() : View<X>{};
    const View<const float> dh = with_side ? dh_.view() : View<float>{};
    lm::ShrinkBackward<X, X, float, float, float, host> shrink{
        A(i), side, x_.view(), {}, du_.view(), dh, dA_.view(), with_side ? dside_.view() : View<float>{}, dx_.view()};
    shrink.select = select(form);
    f(shrink);
  }
  static lm::GateForm<float> select(const lm::GateForm<float>& form) {
    return form.ids.data == nullptr && form.prefix.data == nullptr ? lm::GateForm<float>{} : form;
  }

  ProductRow row_;
  GateData gate_;
  Index ranks_of_A_;
  lm::Matrix<X> x_, y_, dy_, dx_, side_;
  std::vector<lm::Matrix<X>> As_;
  std::vector<lm::Matrix<X, lm::Space::host, rank_major>> Bs_;
  lm::Matrix<float> dA_;
  lm::Matrix<float, lm::Space::host, rank_major> dB_;
  lm::Matrix<float> dside_, u_, du_, h_, dh_;
  lm::Buffer<std::byte> scratch_;
  lm::bench::RingPlace place_;  // in As_ and Bs_
};

// Registers the row for each number of threads and each of the passes.
void add_product(const std::string& family, ProductRow row, std::initializer_list<Index> threads,
                 std::initializer_list<Passes> passes);

}  // namespace bench
