#include "libtorch/optim/grad_norm.h"

#include <c10/util/Exception.h>
#include <torch/types.h>

#include <algorithm>

namespace flashoptim::libtorch {
namespace {

constexpr double kEpsilon = 1e-6;

}  // namespace

at::Tensor sum_of_squares(const at::Tensor& grad) {
  if (grad.numel() == 0) return at::zeros({}, grad.options().dtype(at::kDouble).requires_grad(false));
  return at::_foreach_norm({grad.detach()}, 2, at::kDouble)[0].square();
}

at::Tensor total_norm(const std::vector<at::Tensor>& squares) {
  std::vector<at::Tensor> moved;
  for (const at::Tensor& square : squares) moved.push_back(square.to(squares[0].device()));
  return at::stack(moved).sum().sqrt().to(at::kFloat);
}

at::Tensor clip_coefficient(const at::Tensor& norm, double max_norm) {
  return ((norm + kEpsilon).reciprocal() * max_norm).clamp_max(1.0);
}

at::Tensor clip_in_place(const std::vector<at::Tensor>& grads, double max_norm) {
  if (grads.empty()) return at::zeros({});
  std::vector<std::vector<at::Tensor>> alike;  // of one device and dtype
  for (const at::Tensor& grad : grads) {
    const auto same = [&](const std::vector<at::Tensor>& some) {
      return some[0].device() == grad.device() && some[0].scalar_type() == grad.scalar_type();
    };
    auto found = std::find_if(alike.begin(), alike.end(), same);
    if (found == alike.end()) found = alike.insert(alike.end(), std::vector<at::Tensor>{});
    found->push_back(grad.detach());
  }
  std::vector<at::Tensor> norms;
  for (const auto& some : alike) {
    for (const at::Tensor& norm : at::_foreach_norm(some, 2)) norms.push_back(norm.to(grads[0].device()));
  }
  const at::Tensor norm = at::linalg_vector_norm(at::stack(norms), 2);
  const at::Tensor coefficient = clip_coefficient(norm, max_norm);
  for (const auto& some : alike) at::_foreach_mul_(some, coefficient.to(some[0].device()));
  return norm;
}

void ReleaseClip::measure(const at::Tensor& param) {
  const bool is_new = squares_.emplace(param.unsafeGetTensorImpl(), sum_of_squares(param.grad())).second;
  TORCH_CHECK(is_new, "the gradient of a parameter of shape ", param.sizes(),
              " is complete a second time inside measure_norm(), which takes one backward()");
}

at::Tensor ReleaseClip::factor(const at::Tensor& param) {
  if (way_ == "two_pass") {
    TORCH_CHECK(measured_.defined(),
                "gradient release with clip = \"two_pass\" steps by the norm of all gradients, which was not measured: "
                "call handle.measure_norm([&] { loss.backward({}, /*keep_graph=*/true); }) before each "
                "loss.backward()");
    return measured_;
  }
  measure(param);
  const bool is_own = way_ == "parameter" || !average_.defined();
  return clip_coefficient(is_own ? total_norm({squares_.at(param.unsafeGetTensorImpl())}) : average_, max_norm_);
}

void ReleaseClip::begin_measuring() {
  squares_.clear();
  measured_ = at::Tensor();
  is_measuring_ = true;
}

void ReleaseClip::end_measuring(const Params& params) {
  is_measuring_ = false;
  TORCH_CHECK(!squares_.empty(),
              "no gradient was complete inside measure_norm(); must be one loss.backward({}, /*keep_graph=*/true)");
  norm_ = total(params);
  measured_ = clip_coefficient(norm_, max_norm_);
  squares_.clear();
}

void ReleaseClip::finish(const Params& params) {
  measured_ = at::Tensor();
  if (squares_.empty()) return;
  norm_ = total(params);
  if (way_ == "previous") average_ = average_.defined() ? average_ * decay_ + norm_ * (1.0 - decay_) : norm_;
  squares_.clear();
}

at::Tensor ReleaseClip::norm_now(const Params& params) const {
  if (!squares_.empty() && !is_measuring_) return total(params);
  return norm_.defined() ? norm_ : at::zeros({});
}

at::Tensor ReleaseClip::total(const Params& params) const {
  std::vector<at::Tensor> squares;
  for (const at::Tensor& param : params) {
    const auto found = squares_.find(param.unsafeGetTensorImpl());
    if (found != squares_.end()) squares.push_back(found->second);
  }
  return total_norm(squares);
}

}  // namespace flashoptim::libtorch
