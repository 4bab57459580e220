// States from and to others: torch::optim's optimizers, and the Python package by a safetensors file.
#pragma once

#include <torch/optim/optimizer.h>
#include <torch/ordered_dict.h>
#include <torch/serialize/archive.h>
#include <torch/types.h>

#include <map>
#include <string>

#include "flashoptim/torch/namespace.h"
#include "flashoptim/torch/optimizer.h"

namespace flashoptim::libtorch {

/// Takes over the hyperparameters and states of a torch::optim::AdamW, Adam or SGD that has the same parameters, or as
/// many of the same shapes, in the same groups: a FlashAdamW from AdamW, and so on. States are stored in this
/// optimizer's formats, rounded to nearest. amsgrad's largest variances are left behind, with a TORCH_WARN; torch's SGD
/// counts no steps, so one with momentum buffers has taken one. Throws c10::Error, with nothing changed, where kinds,
/// groups, shapes or values do not go together.
void load_from_torch(FlashOptimizer& optimizer, const ::torch::optim::Optimizer& from);
/// The inverse: options that both have, and states in float32. weight_decay means the same in both, with decouple_lr,
/// too. Corrections are left behind, with a TORCH_WARN. Throws c10::Error, with nothing changed, where maximize is
/// true, which torch's do not have.
void save_to_torch(const FlashOptimizer& optimizer, ::torch::optim::Optimizer& to);

/// The same from and to an archive that torch::optim's optimizer wrote or reads: torch::save(torch_adamw, path).
void load_torch_archive(FlashOptimizer& optimizer, ::torch::serialize::InputArchive& archive);
void save_torch_archive(const FlashOptimizer& optimizer, ::torch::serialize::OutputArchive& archive);

/// Writes options and states as the Python package's state_dict() in a safetensors file, which both front ends read
/// (docs/state_format.md, "Safetensors"). The file appears whole or not at all. Throws c10::Error that names the path,
/// or a parameter whose state lies in memory otherwise than it does.
void save_safetensors(const std::string& path, const FlashOptimizer& optimizer);
/// Replaces hyperparameters and states by those of a file that save_safetensors() or Python wrote, states in this
/// optimizer's formats; which those are (quantize, state_codec, master_weight_bits, ...) stays as it is, as in Python.
/// Throws c10::Error that names the entry, and changes nothing, where the file is damaged, another optimizer's, or does
/// not go with the parameters.
void load_safetensors(const std::string& path, FlashOptimizer& optimizer);

/// Tensors and texts of a safetensors file, of whatever content; on the host.
struct Safetensors {
  ::torch::OrderedDict<std::string, ::torch::Tensor> tensors;
  std::map<std::string, std::string> metadata;
};
/// Throws c10::Error that names path and entry where the file is not one, or not whole.
Safetensors read_safetensors(const std::string& path);
/// Tensors of every dtype that safetensors has, contiguous in the file; the file appears whole or not at all.
void write_safetensors(const std::string& path, const Safetensors& content);

}  // namespace flashoptim::libtorch

namespace torch {
using ::flashoptim::libtorch::load_from_torch;
using ::flashoptim::libtorch::load_safetensors;
using ::flashoptim::libtorch::load_torch_archive;
using ::flashoptim::libtorch::read_safetensors;
using ::flashoptim::libtorch::Safetensors;
using ::flashoptim::libtorch::save_safetensors;
using ::flashoptim::libtorch::save_to_torch;
using ::flashoptim::libtorch::save_torch_archive;
using ::flashoptim::libtorch::write_safetensors;
}  // namespace torch
