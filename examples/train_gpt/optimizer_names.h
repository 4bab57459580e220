// The names --optimizer takes, apart from optimizers.h so that the command line needs no torch header.
#pragma once

#include <string>
#include <vector>

namespace train_gpt {

// Every optimizer this build offers.
inline std::vector<std::string> optimizer_names() {
  return {"torch-adamw", "flash-adamw", "flash-adam", "flash-sgd", "flash-sgdw", "flash-lion"};
}

// Whether the optimizer is one of flashoptim's, which keep parameters and gradients in bf16.
inline bool is_flash(const std::string& name) { return name.rfind("flash-", 0) == 0; }

}  // namespace train_gpt
