// Entries of archives: read as what they must be, or refused by name; and checksums over what they mean.
#pragma once

#include <c10/util/Exception.h>
#include <torch/serialize/archive.h>
#include <torch/types.h>

#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "flashoptim/torch/optimizer.h"

namespace flashoptim::libtorch {

/// Reads an archive, or one inside another. Every function throws c10::Error, beginning with `where` and the entry's
/// name, unless the entry is there and of its kind.
class ArchiveReader {
 public:
  /// `where` precedes the names of entries: "FlashAdamW::load: ". `archive` must outlive the reader.
  ArchiveReader(::torch::serialize::InputArchive& archive, std::string where)
      : archive_(archive), where_(std::move(where)) {}

  const std::string& where() const { return where_; }
  /// As it stands in the archive, read or not.
  bool has(const std::string& key) const;
  std::vector<std::string> keys() const;

  int64_t read_int(const std::string& key);
  /// An int from 0 to that of `last`.
  template <class Enum>
  Enum read_enumerator(const std::string& key, Enum last) {
    const int64_t value = read_int(key);
    TORCH_CHECK(value >= 0 && value <= static_cast<int64_t>(last), where_, key, " = ", value,
                " in the archive; must be 0 to ", static_cast<int64_t>(last));
    return static_cast<Enum>(value);
  }
  bool read_bool(const std::string& key);
  std::string read_string(const std::string& key);
  /// A strided tensor each of whose elements has a place of its own in its storage: reading it cannot leave memory, and
  /// a copy takes no more.
  ::torch::Tensor read_tensor(const std::string& key);
  void read_archive(const std::string& key, ::torch::serialize::InputArchive* inner);
  /// Throws unless all options that archives of the optimizer hold are there and of their types.
  void check_options(OptimizerKind kind);
  void read_options(FlashOptions* options);

  /// Throws where the archive holds an entry that was not read.
  void check_all_read() const;

 private:
  c10::IValue read(const std::string& key, const char* kind, bool (c10::IValue::*is)() const);

  ::torch::serialize::InputArchive& archive_;
  std::string where_;
  std::set<std::string> read_;
};

/// CRC-32 (zlib's) of everything that is added, in its order: one changed byte always changes it, and so does any
/// damage within 32 bits.
class Checksum {
 public:
  void add(int64_t value);
  void add(const std::string& text);
  /// Dtype, shape, order in memory, and every byte. On the host; other tensors are copied there.
  void add(const ::torch::Tensor& tensor);
  /// The options that archives of their optimizer hold.
  void add(const FlashOptions& options);
  /// Everything that is kept for a parameter.
  void add(const FlashParamState& state);

  int64_t value() const { return static_cast<int64_t>(crc_); }

 private:
  void add(const void* data, size_t bytes);

  uint64_t crc_ = 0;
};

/// Throws unless a state can have been written by a step of `kind`: counts, formats, scales, corrections and codes.
/// `name` precedes the names of its entries. Shapes are looked at where the parameter is known (checked_state).
void check_values(const std::string& name, OptimizerKind kind, const FlashParamState& state);
/// A copy of `saved` where the parameter is, checked (check_values(), shapes, order in memory, numbers that codes stand
/// for) against what it says of its own format. `is_as_saved`: whether a checksum says that its bytes are those saved.
FlashParamState checked_state(const std::string& name, const ::torch::Tensor& param, OptimizerKind kind,
                              const FlashParamState& saved, bool is_as_saved);

}  // namespace flashoptim::libtorch
