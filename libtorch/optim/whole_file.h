// Files that are there whole or not at all, of whatever content.
#pragma once

#include <torch/ordered_dict.h>
#include <torch/types.h>

#include <cstddef>
#include <functional>
#include <string>

#include "flashoptim/torch/interchange.h"

namespace flashoptim::libtorch {

/// Takes bytes; returns how many, all of them. Never fails: what fails on the disk is said once all has been taken.
using ByteSink = std::function<size_t(const void* data, size_t bytes)>;

/// As save_archive() (flashoptim/torch/file.h), which this is: writes what `produce` gives under another name, flushes
/// and renames. `where` begins messages. `has_trailer`: with length and checksum behind it.
void write_whole_file(const std::string& where, const std::string& path, bool has_trailer,
                      const std::function<void(const ByteSink&)>& produce);

/// read_safetensors() and write_safetensors() for `caller`, which messages begin with.
Safetensors read_safetensors(const char* caller, const std::string& path);
void write_safetensors(const char* caller, const std::string& path, const Safetensors& content);

/// The order in which write_safetensors() writes tensors: wide numbers first, so that all are aligned.
void sort_for_file(::torch::OrderedDict<std::string, ::torch::Tensor>* tensors);

}  // namespace flashoptim::libtorch
