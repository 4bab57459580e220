// flashoptim for LibTorch programs:
//
//   flashoptim::torch::cast_model(*model);  // bf16
//   flashoptim::torch::FlashAdamW optimizer(model->parameters(), flashoptim::torch::FlashAdamWOptions(1e-3));
//   loss.backward();
//   optimizer.step();
#pragma once

#include "flashoptim/torch/file.h"
#include "flashoptim/torch/gradient_release.h"
#include "flashoptim/torch/interchange.h"
#include "flashoptim/torch/model.h"
#include "flashoptim/torch/numerics.h"
#include "flashoptim/torch/optimizer.h"
#include "flashoptim/torch/optimizers.h"
#include "flashoptim/torch/options.h"
#include "flashoptim/version.h"
