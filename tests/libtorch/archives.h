// Saving, loading and going on, and archives with other entries, for the tests that do so.
#pragma once

#include <functional>
#include <sstream>
#include <string>
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

/// Writes what `in` holds to `out`; `edit` is asked about every entry first, by its path, and says whether it wrote
/// something in its place.
using Edit = std::function<bool(const std::string& path, const std::string& key, torch::serialize::OutputArchive& out)>;

inline void copy_archive(torch::serialize::InputArchive& in, const std::string& path, const Edit& edit,
                         torch::serialize::OutputArchive& out) {
  for (const std::string& key : in.keys()) {
    const std::string inner_path = path.empty() ? key : path + "/" + key;
    if (edit(inner_path, key, out)) continue;
    torch::serialize::InputArchive inner;
    c10::IValue value;
    if (in.try_read(key, inner)) {
      torch::serialize::OutputArchive inner_out(out.compilation_unit());
      copy_archive(inner, inner_path, edit, inner_out);
      out.write(key, inner_out);
    } else if (in.try_read(key, value)) {
      if (value.isTensor()) {
        out.write(key, value.toTensor(), /*is_buffer=*/true);
      } else {
        out.write(key, value);
      }
    }
  }
}

/// The archive of version 1, which has no checksums, with one entry (or more) changed.
inline std::stringstream edited(const flash::FlashOptimizer& optimizer, const Edit& edit, bool with_checksums = false) {
  std::stringstream stream = saved(optimizer), result;
  torch::serialize::InputArchive in;
  in.load_from(stream);
  torch::serialize::OutputArchive out;
  copy_archive(
      in, "",
      [&](const std::string& path, const std::string& key, torch::serialize::OutputArchive& to) {
        if (edit(path, key, to)) return true;
        if (with_checksums) return false;
        if (path == "flashoptim_archive_version") to.write(key, c10::IValue(int64_t{1}));
        return key == "checksum" || path == "flashoptim_archive_version";
      },
      out);
  out.save_to(result);
  return result;
}

inline Edit put(const std::string& where, const c10::IValue& value) {
  return [=](const std::string& path, const std::string& key, torch::serialize::OutputArchive& out) {
    if (path != where) return false;
    if (value.isTensor()) {
      out.write(key, value.toTensor(), /*is_buffer=*/true);
    } else if (!value.isNone()) {
      out.write(key, value);
    }
    return true;
  };
}

}  // namespace flashoptim_test
