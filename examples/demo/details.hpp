// What routers chose, domain by domain, and what every expert is worth there.
#pragma once
#include <loramix/ops/telemetry.hpp>

#include "adapted.hpp"

namespace demo {

/// Something seen in the trained layers, whichever numbers the experts have.
struct Detail {
  std::string name;
  std::array<double, domains> value{};
};

/// The experts of one place, in percent [E, domains].
struct Experts {
  std::string place;
  Eigen::ArrayXXd load;  // of the domain's choices (or weights), by expert
  Eigen::ArrayXXd shapley;  // of ‖ΔY‖²: what an expert adds, on average over the orders in which experts come; or empty
};

struct Details {
  std::vector<Detail> of_domains;
  std::vector<Experts> experts;
};

template <class Adapter>
constexpr bool has_experts = (lm::ProductAdapter<Adapter> || lm::MixLoraAdapter<Adapter>)&&requires(const Adapter& a) {
  a.config().experts;
};

/// Looks at places while the images of one domain pass.
template <class Adapter, class Net>
class Look {
 public:
  using Model = Adapted<Adapter, Net>;
  static constexpr bool moa = std::is_same_v<Adapter, lm::Moa<float>>;
  /// Whether several experts add to an image's ΔY, each by a product of its own.
  static constexpr bool shares_products = lm::ProductAdapter<Adapter> && !moa;

  Look(const Model& model, const Images& images, int domain, Details& found)
      : model_(model), images_(images), k_(domain), found_(found) {}

  void operator()(int place, const Matrix& x, const typename Model::Saved& saved) const {
    const Adapter& adapter = model_.adapters[place];
    if constexpr (std::is_same_v<Adapter, lm::More<float>>) {
      detail("rank", place) = static_cast<double>(adapter.chosen_rank(k_));
    } else if constexpr (has_experts<Adapter>) {
      if (moa && model_.deciding == Deciding::label) return;
      Experts& experts = experts_at(place, adapter.config().experts);
      const auto& scores = saved.scores;
      if (scores.p.rows != images_.size()) {  // a row is a task
        for (Index e = 0; e < scores.p.cols; ++e) experts.load(e, k_) = 100.0 * static_cast<double>(scores.p(k_, e));
      } else {
        lm::RouterTelemetry<float> seen(scores.p.cols);
        std::vector<std::byte> work(lm::loss_workspace_bytes<float>(scores.p.rows, scores.p.cols));
        lm::telemetry(lm::cpu::Backend{}, saved, seen, lm::Arena<>{work});
        const Eigen::Map<const Eigen::ArrayXf> load(seen.load().data, scores.p.cols);
        experts.load.col(k_) = 100.0 * load.cast<double>() / load.cast<double>().sum();
        if (!moa) detail("load CV", place) = static_cast<double>(seen.load_cv());
      }
      if (moa) detail("routed right %", place) = experts.load(k_, k_);
      if constexpr (shares_products) {
        experts.shapley.col(k_) = shapley(adapter, place, x);
        detail("largest Shapley %", place) = experts.shapley.col(k_).maxCoeff();
      }
    }
  }

 private:
  std::string name_of(int place) const { return Places<Adapter, Net>{model_.network()}.name(place); }
  double& detail(const std::string& what, int place) const {
    const std::string name = what + ", " + name_of(place);
    for (Detail& known : found_.of_domains) {
      if (known.name == name) return known.value[k_];
    }
    found_.of_domains.push_back({name});
    return found_.of_domains.back().value[k_];
  }
  Experts& experts_at(int place, Index experts) const {
    if (static_cast<int>(found_.experts.size()) == place) {
      const Eigen::ArrayXXd none = Eigen::ArrayXXd::Zero(experts, domains);
      found_.experts.push_back({name_of(place), none, shares_products ? none : Eigen::ArrayXXd()});
    }
    return found_.experts[place];
  }

  /// Shapley values of v(C) = ‖ΔY‖² − ‖ΔY − what the experts of C add‖², in percent of ‖ΔY‖².
  Eigen::ArrayXd shapley(const Adapter& adapter, int place, const Matrix& x) const {
    const lm::cpu::Backend be;
    const Index experts = adapter.config().experts;
    std::vector<std::byte> work_bytes(
        std::max(lm::workspace_bytes(be, adapter, x.rows()), lm::shapley_workspace_bytes(be, adapter, x.rows()))),
        kept(lm::reserve_bytes(adapter, x.rows()));
    const lm::Arena<> work{work_bytes};
    lm::Arena<> reserve{kept};
    Matrix delta(x.rows(), model_.network().shape(place).out), phi(x.rows(), experts);
    const auto saved = lm::forward(be, adapter, view(x), view(delta), work,
                                   {.save = &reserve,
                                    .into = lm::Into::set,
                                    .dropout_off = true,
                                    .tasks = lm::Groups<>::by_id(images_.domain.data(), domains)});
    lm::shapley_values(be, adapter, saved, view(std::as_const(delta)), 1, view(phi), work);
    const double all = delta.cast<double>().squaredNorm();
    return 100.0 * phi.cast<double>().colwise().sum().transpose().array() / all;
  }

  const Model& model_;
  const Images& images_;
  int k_;
  Details& found_;
};

template <class Adapter, class Net>
Details details(const Adapted<Adapter, Net>& model, const Data& data) {
  Details found;
  if constexpr (has_experts<Adapter> || std::is_same_v<Adapter, lm::More<float>>) {
    for (int k = 0; k < domains; ++k) model.logits(data.test[k], Look<Adapter, Net>(model, data.test[k], k, found));
  }
  return found;
}

}  // namespace demo
