// Saving, loading and going on, for the tests that do so.
#pragma once

#include <sstream>
#include <vector>

#include "tests/libtorch/support.h"

namespace flashoptim_test {

inline std::vector<Tensor> copies(const std::vector<Tensor>& params) {
  std::vector<Tensor> result;
  for (const Tensor& param : params) result.push_back(param.detach().clone().set_requires_grad(true));
  return result;
}

inline std::stringstream saved(const flash::FlashOptimizer& optimizer) {
  std::stringstream stream;
  torch::serialize::OutputArchive archive;
  optimizer.save(archive);
  archive.save_to(stream);
  return stream;
}

inline void load(flash::FlashOptimizer& optimizer, std::stringstream& stream) {
  torch::serialize::InputArchive archive;
  archive.load_from(stream);
  optimizer.load(archive);
}

inline void step(flash::FlashOptimizer& optimizer, const std::vector<Tensor>& params, int64_t number) {
  set_gradients(params, number);
  optimizer.step();
}

}  // namespace flashoptim_test
