// Archives as flashoptim of 2026-11-23 (commit b9225ff, state format 1) wrote them.
#include <torch/torch.h>
#include <fstream>
#include "flashoptim/torch/flashoptim.h"
namespace flash = flashoptim::torch;
using torch::Tensor;
static Tensor values(std::vector<int64_t> sizes, double scale) {
  int64_t n = 1;
  for (auto s : sizes) n *= s;
  return (((torch::arange(n, torch::kLong) * 7919 % 2003).to(torch::kDouble) - 1001) * (scale / 1001))
      .view(sizes)
      .to(torch::kFloat);
}
static std::vector<Tensor> params() {
  std::vector<Tensor> p;
  for (auto s : std::vector<std::vector<int64_t>>{{2, 4, 64}, {7, 80}, {6, 5, 40}, {70}})
    p.push_back(values(s, 1).to(torch::kBFloat16).requires_grad_());
  p.push_back(values({4, 33}, 2).requires_grad_());
  p.push_back(values({6, 8, 4, 4}, 1).to(torch::kHalf).contiguous(at::MemoryFormat::ChannelsLast).requires_grad_());
  return p;
}
template <class O, class Opt>
void one(const std::string& file, Opt options) {
  auto p = params();
  O optimizer(p, options);
  torch::serialize::OutputArchive out, opt;
  for (int i = 0; i < 3; ++i) {
    int k = 0;
    for (auto& t : p) t.mutable_grad() = (values(t.sizes().vec(), 0.5 + i) * ((k++ % 3) + 1)).to(t.scalar_type());
    optimizer.step();
  }
  optimizer.save(opt);
  out.write("optimizer", opt);
  int k = 0;
  for (auto& t : p) {
    out.write("param" + std::to_string(k), t.detach(), true);
    out.write("weight" + std::to_string(k), optimizer.fp32_weight(t), true);
    for (auto& item : optimizer.decoded_state(t))
      out.write(item.key() + std::to_string(k), item.value().contiguous(), true);
    ++k;
  }
  out.save_to(file);
}
int main() {
  one<flash::FlashAdamW>("adamw_format1.pt", flash::FlashAdamWOptions(1e-2).min_quantized_numel(64));
  one<flash::FlashLion>(
      "lion_paper_format1.pt",
      flash::FlashLionOptions(1e-3).min_quantized_numel(64).state_codec("paper").master_weight_bits(32));
}
