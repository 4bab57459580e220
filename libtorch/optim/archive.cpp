#include "libtorch/optim/archive.h"

#include <c10/util/Exception.h>
#include <zlib.h>

#include <algorithm>
#include <bit>
#include <limits>
#include <type_traits>
#include <utility>

#include "libtorch/optim/handles.h"
#include "libtorch/optim/param_state.h"
#include "libtorch/store/device.h"

namespace flashoptim::libtorch {
namespace {

constexpr store::Op kOp{"load"};
constexpr int64_t kMostSteps = int64_t{1} << 53;
/// Bytes that are worth a thread.
constexpr int64_t kPieceBytes = int64_t{1} << 20;

/// Throws unless the elements lie in the tensor's storage; sizes, strides and offset may be any numbers.
void check_in_storage(const std::string& name, const at::Tensor& tensor) {
  TORCH_CHECK(tensor.defined() && tensor.layout() == at::kStrided && tensor.has_storage() && !tensor.is_meta(), name,
              " in the archive is undefined, sparse or without memory; must be a dense tensor with values");
  const auto refuse = [&] {
    TORCH_CHECK(false, name, " in the archive has shape ", tensor.sizes(), ", strides ", tensor.strides(), ", offset ",
                tensor.storage_offset(), " and a storage of ", tensor.storage().nbytes(),
                " bytes; all its elements must lie there, each in a place of its own");
  };
  // The index behind the last element, each step checked: the numbers come from a file.
  int64_t end = 1, numel = 1;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    const int64_t size = tensor.sizes()[static_cast<size_t>(d)], stride = tensor.strides()[static_cast<size_t>(d)];
    int64_t reach = 0;
    if (size < 0 || stride < 0 || __builtin_mul_overflow(numel, size, &numel)) refuse();
    if (size > 0 && (__builtin_mul_overflow(size - 1, stride, &reach) || __builtin_add_overflow(end, reach, &end))) {
      refuse();
    }
  }
  int64_t bytes = 0;
  const auto storage = static_cast<int64_t>(tensor.storage().nbytes());
  if (tensor.storage_offset() < 0 || tensor.numel() != numel) refuse();
  if (numel == 0) return;
  const auto itemsize = static_cast<int64_t>(tensor.itemsize());
  if (__builtin_add_overflow(end, tensor.storage_offset(), &end) || __builtin_mul_overflow(end, itemsize, &bytes) ||
      bytes > storage) {
    refuse();
  }
  // A few bytes with strides of 0 would be any size in the first copy.
  if (__builtin_mul_overflow(numel, itemsize, &bytes) || bytes > storage) refuse();
}

bool has_any(const at::Tensor& condition) { return condition.any().item<bool>(); }

}  // namespace

// ---- reading --------------------------------------------------------------------------------------------------------

std::vector<std::string> ArchiveReader::keys() const { return archive_.keys(); }

bool ArchiveReader::has(const std::string& key) const {
  const std::vector<std::string> all = keys();
  return std::find(all.begin(), all.end(), key) != all.end();
}

c10::IValue ArchiveReader::read(const std::string& key, const char* kind, bool (c10::IValue::*is)() const) {
  c10::IValue value;
  TORCH_CHECK(archive_.try_read(key, value), where_, key, " is missing from the archive; must be ", kind);
  TORCH_CHECK((value.*is)(), where_, key, " is of type ", value.tagKind(), " in the archive; must be ", kind);
  read_.insert(key);
  return value;
}

int64_t ArchiveReader::read_int(const std::string& key) { return read(key, "an int", &c10::IValue::isInt).toInt(); }

bool ArchiveReader::read_bool(const std::string& key) { return read(key, "a bool", &c10::IValue::isBool).toBool(); }

std::string ArchiveReader::read_string(const std::string& key) {
  return read(key, "a string", &c10::IValue::isString).toStringRef();
}

at::Tensor ArchiveReader::read_tensor(const std::string& key) {
  const at::Tensor tensor = read(key, "a tensor", &c10::IValue::isTensor).toTensor();
  check_in_storage(where_ + key, tensor);
  return tensor.detach();
}

void ArchiveReader::read_archive(const std::string& key, ::torch::serialize::InputArchive* inner) {
  TORCH_CHECK(archive_.try_read(key, *inner), where_, key, has(key) ? " is no archive" : " is missing from the archive",
              "; must be an archive of its own");
  read_.insert(key);
}

void ArchiveReader::check_options(OptimizerKind kind) {
  const auto check = [&](const char* name, bool (c10::IValue::*is)() const, const char* kind) { read(name, kind, is); };
  for_each_option([&](int index, const char* name, auto member) {
    if (!is_archived(kind, index, name)) return;
    using Value = std::decay_t<decltype(std::declval<OptionValues>().*member)>;
    if constexpr (std::is_same_v<Value, double>) check(name, &c10::IValue::isDouble, "a number");
    if constexpr (std::is_same_v<Value, bool>) check(name, &c10::IValue::isBool, "a bool");
    if constexpr (std::is_same_v<Value, int64_t>) check(name, &c10::IValue::isInt, "an int");
    if constexpr (std::is_same_v<Value, std::string>) check(name, &c10::IValue::isString, "a string");
    if constexpr (std::is_same_v<Value, Betas>) {
      const c10::IValue pair = read(name, "two numbers", &c10::IValue::isTuple);
      const auto& elements = pair.toTupleRef().elements();
      TORCH_CHECK(elements.size() == 2 && elements[0].isDouble() && elements[1].isDouble(), where_, name, " holds ",
                  elements.size(), " elements in the archive, or other things than numbers; must be two numbers");
    }
  });
  if (has("explicitly_set")) {
    const c10::IValue names = read("explicitly_set", "a list of names", &c10::IValue::isList);
    for (const c10::IValue& name : names.toListRef()) {
      TORCH_CHECK(name.isString(), where_, "explicitly_set holds a ", name.tagKind(),
                  " in the archive; must be names of options");
      bool is_known = false;
      for_each_option([&](int, const char* option, auto) { is_known = is_known || name.toStringRef() == option; });
      TORCH_CHECK(is_known, where_, "explicitly_set holds \"", name.toStringRef(),
                  "\" in the archive; must be names of options");
    }
  }
}

void ArchiveReader::read_options(FlashOptions* options) {
  check_options(options->kind());
  options->serialize(archive_);
}

void ArchiveReader::check_all_read() const {
  for (const std::string& key : keys()) {
    TORCH_CHECK(read_.count(key) != 0, where_, key,
                " of the archive is unknown here; must be entries that this version writes, and no others");
  }
}

// ---- checksums ------------------------------------------------------------------------------------------------------

void Checksum::add(const void* data, size_t bytes) {
  const auto* const first = static_cast<const Bytef*>(data);
  const auto size = static_cast<int64_t>(bytes), pieces = (size + kPieceBytes - 1) / kPieceBytes;
  std::vector<uLong> sums(static_cast<size_t>(pieces));
  const auto length = [&](int64_t piece) { return std::min(kPieceBytes, size - piece * kPieceBytes); };
  store::parallel_for(pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      sums[static_cast<size_t>(piece)] = crc32_z(0, first + piece * kPieceBytes, static_cast<size_t>(length(piece)));
    }
  });
  for (int64_t piece = 0; piece < pieces; ++piece) {
    crc_ = crc32_combine(crc_, sums[static_cast<size_t>(piece)], length(piece));
  }
}

void Checksum::add(int64_t value) {
  static_assert(std::endian::native == std::endian::little, "archives are little-endian, and so are their checksums");
  add(&value, sizeof value);
}

void Checksum::add(const std::string& text) {
  add(static_cast<int64_t>(text.size()));
  add(text.data(), text.size());
}

void Checksum::add(const at::Tensor& tensor) {
  add(std::string(toString(tensor.scalar_type())));
  add(tensor.dim());
  for (const int64_t size : tensor.sizes()) add(size);
  // The strides of dimensions of one element mean nothing, and not every copy keeps them.
  for (int64_t d = 0; d < tensor.dim(); ++d) add(tensor.numel() == 0 || tensor.size(d) == 1 ? 0 : tensor.stride(d));
  const at::Tensor dense = tensor.is_non_overlapping_and_dense() ? tensor : tensor.contiguous();
  const at::Tensor on_host = dense.cpu();
  add(on_host.const_data_ptr(), on_host.nbytes());
}

void Checksum::add(const FlashOptions& options) {
  for_each_option([&](int index, const char* name, auto member) {
    if (!is_archived(options.kind(), index, name)) return;
    add(std::string(name));
    const auto& value = options.values().*member;
    using Value = std::decay_t<decltype(value)>;
    if constexpr (std::is_same_v<Value, double>) {
      add(std::bit_cast<int64_t>(value));
    } else if constexpr (std::is_same_v<Value, Betas>) {
      add(std::bit_cast<int64_t>(std::get<0>(value)));
      add(std::bit_cast<int64_t>(std::get<1>(value)));
    } else if constexpr (std::is_same_v<Value, std::string>) {
      add(value);
    } else {
      add(static_cast<int64_t>(value));
    }
  });
}

void Checksum::add(const FlashParamState& state) {
  add(state.step);
  add(static_cast<int64_t>(state.master_weights));
  add(static_cast<int64_t>(state.state_codec));
  add(state.rows);
  add(std::string(toString(state.param_dtype)));
  add(state.correction);
  add(static_cast<int64_t>(state.states.size()));
  for (size_t k = 0; k < state.states.size(); ++k) {
    add(state.states[k]);
    add(state.scales[k]);
  }
}

// ---- values ---------------------------------------------------------------------------------------------------------

void check_values(const std::string& name, OptimizerKind kind, const FlashParamState& state) {
  const auto master = static_cast<int64_t>(state.master_weights), codec = static_cast<int64_t>(state.state_codec);
  TORCH_CHECK(state.step >= 0 && state.step < kMostSteps, name, ": step = ", state.step,
              " in the archive; must be at least 0 and below 2^53");
  TORCH_CHECK(master >= 0 && master <= static_cast<int64_t>(MasterWeights::kCorrection16Nearest), name,
              ": master_weights = ", master, " in the archive; must be 0 to 5");
  TORCH_CHECK(codec >= 0 && codec <= static_cast<int64_t>(StateCodec::kDefault), name, ": state_codec = ", codec,
              " in the archive; must be 0 to 2");
  const int bits = store::correction_bits(state.master_weights);
  TORCH_CHECK(bits == 0 || state.param_dtype != at::kFloat, name, ": master_weights = ", master,
              " in the archive of a Float parameter, which has no bits to correct; must be 0");
  TORCH_CHECK(bits != 0 || state.correction.numel() == 0, name, ": correction has ", state.correction.numel(),
              " elements in the archive with master_weights = ", master, ", which keeps none; must have 0");
  if (bits != 0) {
    const auto wanted = static_cast<at::ScalarType>(store::correction_dtype(state.master_weights));
    TORCH_CHECK(state.correction.scalar_type() == wanted, name, ": correction was saved with dtype ",
                state.correction.scalar_type(), "; must be ", wanted);
    const int64_t least = bits == 8 ? std::numeric_limits<int8_t>::min() : std::numeric_limits<int16_t>::min();
    TORCH_CHECK(state.correction.numel() == 0 || state.correction.min().item<int64_t>() > least, name,
                ": correction holds ", least, " in the archive, which no step writes; must be ", least + 1, " to ",
                -(least + 1));
  }
  const bool is_quantized = state.state_codec != StateCodec::kFloat32;
  for (size_t k = 0; k < state.states.size(); ++k) {
    const int slot = static_cast<int>(k);
    const std::string number = "[" + std::to_string(k) + "]";
    const at::Tensor &values = state.states[k], &scale = state.scales[k];
    const auto wanted = static_cast<at::ScalarType>(store::state_dtype(kind, slot, state.state_codec));
    TORCH_CHECK(values.scalar_type() == wanted, name, ": states", number, " was saved with dtype ",
                values.scalar_type(), "; must be ", wanted);
    TORCH_CHECK(is_quantized || scale.numel() == 0, name, ": scales", number, " has ", scale.numel(),
                " elements in the archive beside Float states; must have 0");
    if (!is_quantized) continue;
    TORCH_CHECK(store::accepts_scale_dtype(state.state_codec, dtype_code(scale.scalar_type())), name, ": scales",
                number, " was saved with dtype ", scale.scalar_type(), "; must be ",
                static_cast<at::ScalarType>(store::scale_dtype(state.state_codec)));
    if (state.state_codec != StateCodec::kPaper) continue;
    const at::Tensor bits_of = scale.contiguous().view(at::kShort);  // sign, exponent, mantissa
    TORCH_CHECK(!has_any((bits_of < 0) | (bits_of >= 0x7c00)), name, ": scales", number,
                " holds a number that is negative, infinite or NaN in the archive; must be finite and at least 0");
    TORCH_CHECK(values.scalar_type() != at::kChar || values.numel() == 0 || values.min().item<int64_t>() > -128, name,
                ": states", number, " holds the code -128 in the archive, which no step writes; must be -127 to 127");
  }
}

}  // namespace flashoptim::libtorch
