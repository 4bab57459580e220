#include "activation_checkpoint.h"

namespace train_gpt {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// An autograd context stores IValues only; this carries the function in one.
struct SegmentHolder : torch::CustomClassHolder {
  explicit SegmentHolder(Segment function) : segment(std::move(function)) {}
  Segment segment;
};

class Recompute : public torch::autograd::Function<Recompute> {
 public:
  // The parameters are arguments although the segment has them already: that is what gives this node its edges to
  // them, so that hooks, torch::autograd::grad and shared parameters work as with an ordinary operation.
  static torch::Tensor forward(AutogradContext* context, const c10::intrusive_ptr<SegmentHolder>& holder,
                               const torch::Tensor& input, torch::TensorList parameters) {
    variable_list saved{input};
    saved.insert(saved.end(), parameters.begin(), parameters.end());
    context->save_for_backward(std::move(saved));
    context->saved_data["segment"] = c10::IValue::make_capsule(holder);
    return holder->segment(input);  // Function::apply has switched autograd off here
  }

  static variable_list backward(AutogradContext* context, const variable_list& grad_outputs) {
    const auto holder = c10::static_intrusive_pointer_cast<SegmentHolder>(context->saved_data["segment"].toCapsule());
    variable_list leaves = context->get_saved_variables();
    leaves[0] = leaves[0].detach().requires_grad_(true);
    torch::Tensor output;
    {
      torch::AutoGradMode with_graph(true);
      output = holder->segment(leaves[0]);
    }
    variable_list gradients{torch::Tensor()};  // of the holder
    const variable_list of_leaves =
        torch::autograd::grad({output}, leaves, grad_outputs, /*retain_graph=*/false, /*create_graph=*/false,
                              /*allow_unused=*/true);
    gradients.insert(gradients.end(), of_leaves.begin(), of_leaves.end());
    return gradients;
  }
};

}  // namespace

torch::Tensor checkpoint(Segment segment, const torch::Tensor& input, const std::vector<torch::Tensor>& parameters) {
  if (!torch::GradMode::is_enabled()) return segment(input);
  return Recompute::apply(c10::make_intrusive<SegmentHolder>(std::move(segment)), input, torch::TensorList(parameters));
}

}  // namespace train_gpt
