// The container: 8 bytes with the length of a JSON header, the header, the tensors' bytes without gaps.
#include <c10/util/Exception.h>
#include <torch/types.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <utility>
#include <vector>

#include "flashoptim/torch/interchange.h"
#include "libtorch/optim/param_state.h"
#include "libtorch/optim/whole_file.h"

namespace flashoptim::libtorch {
namespace {

using Json = nlohmann::json;

constexpr uint64_t kLongestHeader = 100'000'000;  // safetensors' own limit
constexpr const char* kMetadata = "__metadata__";

const std::vector<std::pair<const char*, at::ScalarType>>& dtypes() {
  static const std::vector<std::pair<const char*, at::ScalarType>> all = {{"BOOL", at::kBool},
                                                                          {"U8", at::kByte},
                                                                          {"I8", at::kChar},
                                                                          {"I16", at::kShort},
                                                                          {"U16", at::kUInt16},
                                                                          {"F16", at::kHalf},
                                                                          {"BF16", at::kBFloat16},
                                                                          {"I32", at::kInt},
                                                                          {"U32", at::kUInt32},
                                                                          {"F32", at::kFloat},
                                                                          {"F64", at::kDouble},
                                                                          {"I64", at::kLong},
                                                                          {"U64", at::kUInt64},
                                                                          {"F8_E4M3", at::kFloat8_e4m3fn},
                                                                          {"F8_E5M2", at::kFloat8_e5m2}};
  return all;
}

const char* name_of(const std::string& where, at::ScalarType dtype) {
  for (const auto& [name, known] : dtypes()) {
    if (known == dtype) return name;
  }
  TORCH_CHECK(false, where, "dtype ", dtype, " has no name in safetensors");
}

struct Entry {
  std::string name;
  at::ScalarType dtype;
  std::vector<int64_t> sizes;
  uint64_t begin, end;
};

/// A whole number that is at least 0 and fits.
int64_t read_size(const std::string& what, const Json& value) {
  TORCH_CHECK(value.is_number_unsigned() && value.get<uint64_t>() < uint64_t{1} << 62, what, " is ", value.dump(),
              " in the header; must be a whole number of at least 0");
  return static_cast<int64_t>(value.get<uint64_t>());
}

Entry read_entry(const std::string& where, const std::string& name, const Json& value) {
  const std::string what = where + "tensor \"" + name + "\"";
  const auto field = [&](const char* key) -> const Json& {
    TORCH_CHECK(value.is_object() && value.contains(key), what, " has no ", key, " in the header");
    return value.at(key);
  };
  Entry entry{name, at::kFloat, {}, 0, 0};
  const Json &dtype = field("dtype"), &shape = field("shape"), &offsets = field("data_offsets");
  const auto known = std::find_if(dtypes().begin(), dtypes().end(),
                                  [&](const auto& one) { return dtype.is_string() && dtype == one.first; });
  TORCH_CHECK(known != dtypes().end(), what, " has dtype ", dtype.dump(), ", which is unknown here");
  entry.dtype = known->second;
  TORCH_CHECK(shape.is_array() && offsets.is_array() && offsets.size() == 2, what,
              ": shape and data_offsets must be lists, the latter of two numbers");
  int64_t bytes = static_cast<int64_t>(c10::elementSize(entry.dtype));
  for (const Json& size : shape) {
    entry.sizes.push_back(read_size(what + ": shape", size));
    TORCH_CHECK(!__builtin_mul_overflow(bytes, entry.sizes.back(), &bytes), what, " has shape ", shape.dump(),
                ", which is too large");
  }
  entry.begin = static_cast<uint64_t>(read_size(what + ": data_offsets", offsets[0]));
  entry.end = static_cast<uint64_t>(read_size(what + ": data_offsets", offsets[1]));
  TORCH_CHECK(entry.begin <= entry.end && entry.end - entry.begin == static_cast<uint64_t>(bytes), what, " has ", bytes,
              " bytes and data_offsets ", offsets.dump(), "; must be as long");
  return entry;
}

}  // namespace

void sort_for_file(::torch::OrderedDict<std::string, at::Tensor>* tensors) {
  std::vector<std::pair<std::string, at::Tensor>> sorted;
  for (const auto& item : *tensors) sorted.emplace_back(item.key(), item.value());
  std::stable_sort(sorted.begin(), sorted.end(),
                   [](const auto& a, const auto& b) { return a.second.element_size() > b.second.element_size(); });
  tensors->clear();
  for (auto& [name, tensor] : sorted) tensors->insert(std::move(name), std::move(tensor));
}

Safetensors read_safetensors(const std::string& path) { return read_safetensors("read_safetensors", path); }

Safetensors read_safetensors(const char* caller, const std::string& path) {
  const std::string where = std::string(caller) + ": " + path + ": ";
  std::error_code error;
  TORCH_CHECK(!std::filesystem::is_directory(path, error), where, "is a folder; must be a safetensors file");
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  TORCH_CHECK(file.is_open(), where, "cannot be opened: ", std::strerror(errno));
  const auto size = static_cast<uint64_t>(std::max<std::streamoff>(0, file.tellg()));
  uint64_t length = 0;
  file.seekg(0);
  file.read(reinterpret_cast<char*>(&length), sizeof length);
  TORCH_CHECK(size > sizeof length && file.good() && length <= size - sizeof length && length <= kLongestHeader, where,
              "has ", size, " bytes and a header of ", length, "; it is no safetensors file, or was cut off");
  std::string text(length, '\0');
  file.read(text.data(), static_cast<std::streamsize>(length));
  TORCH_CHECK(file.good(), where, "cannot be read");
  const Json header = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  TORCH_CHECK(header.is_object(), where, "its header is no JSON object: it is no safetensors file, or is damaged");

  Safetensors content;
  std::vector<Entry> entries;
  for (const auto& [name, value] : header.items()) {
    if (name != kMetadata) {
      entries.push_back(read_entry(where, name, value));
      continue;
    }
    TORCH_CHECK(value.is_object(), where, kMetadata, " is no object in the header");
    for (const auto& [key, said] : value.items()) {
      TORCH_CHECK(said.is_string(), where, kMetadata, ".", key, " is no text in the header");
      content.metadata[key] = said.get<std::string>();
    }
  }
  std::stable_sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
  });
  uint64_t end = 0;
  for (const Entry& entry : entries) {
    TORCH_CHECK(entry.begin == end, where, "tensor \"", entry.name, "\" begins at ", entry.begin, "; must be at ", end,
                ", where the one before ends");
    end = entry.end;
  }
  TORCH_CHECK(end == size - sizeof length - length, where, "has ", size - sizeof length - length,
              " bytes of tensors; the header says ", end, ": it was cut off, or is damaged");
  for (const Entry& entry : entries) {
    const at::Tensor tensor = at::empty(entry.sizes, at::TensorOptions().dtype(entry.dtype));
    if (entry.end > entry.begin) {
      file.read(static_cast<char*>(tensor.mutable_data_ptr()), static_cast<std::streamsize>(entry.end - entry.begin));
      TORCH_CHECK(file.good(), where, "cannot be read");
    }
    content.tensors.insert(entry.name, tensor);
  }
  return content;
}

void write_safetensors(const std::string& path, const Safetensors& content) {
  write_safetensors("write_safetensors", path, content);
}

void write_safetensors(const char* caller, const std::string& path, const Safetensors& content) {
  const std::string where = std::string(caller) + ": " + path + ": ";
  Json header = Json::object();
  if (!content.metadata.empty()) header[kMetadata] = content.metadata;
  uint64_t end = 0;
  for (const auto& item : content.tensors) {
    check_has_values(where + "tensor \"" + item.key() + "\"", item.value());
    TORCH_CHECK(item.key() != kMetadata, where, "a tensor is called ", kMetadata, "; must be another name");
  }
  ::torch::OrderedDict<std::string, at::Tensor> tensors = content.tensors;
  sort_for_file(&tensors);
  for (const auto& item : tensors) {
    const at::Tensor& tensor = item.value();
    const uint64_t begin = end;
    end += tensor.nbytes();
    header[item.key()] = {{"dtype", name_of(where, tensor.scalar_type())},
                          {"shape", tensor.sizes().vec()},
                          {"data_offsets", {begin, end}}};
  }
  std::string text;
  try {
    text = header.dump();
  } catch (const Json::exception& error) {
    TORCH_CHECK(false, where, "a name or text is not UTF-8: ", error.what());
  }
  text.resize((text.size() + 7) / 8 * 8, ' ');
  write_whole_file(where, path, /*has_trailer=*/false, [&](const ByteSink& sink) {
    const uint64_t length = text.size();
    sink(&length, sizeof length);
    sink(text.data(), text.size());
    for (const auto& item : tensors) {
      const at::Tensor on_host = item.value().detach().cpu().contiguous();
      sink(on_host.const_data_ptr(), on_host.nbytes());
    }
  });
}

}  // namespace flashoptim::libtorch
