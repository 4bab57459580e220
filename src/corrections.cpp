// Corrections of one width into the other.
#include <cstring>
#include <string>

#include "flashoptim/core/weight_split.h"
#include "flashoptim/step.h"
#include "src/checks.h"

namespace flashoptim {
namespace {

template <int kBits>
using Stored = std::conditional_t<kBits == 8, int8_t, int16_t>;

template <int kFrom, int kTo>
void rescale(const void* corrections, void* rescaled, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    Stored<kFrom> from;
    std::memcpy(&from, static_cast<const char*>(corrections) + i * static_cast<int64_t>(sizeof from), sizeof from);
    const auto to = static_cast<Stored<kTo>>(core::rescale_correction<kFrom, kTo>(from));
    std::memcpy(static_cast<char*>(rescaled) + i * static_cast<int64_t>(sizeof to), &to, sizeof to);
  }
}

}  // namespace

Status rescale_corrections(MasterWeights from, const void* corrections, MasterWeights to, void* rescaled,
                           int64_t count) {
  return guarded([&] {
    for (const auto& [name, value] : {std::pair{"from", from}, std::pair{"to", to}}) {
      const auto number = static_cast<int>(value);
      if (number >= static_cast<int>(MasterWeights::kCorrection8) &&
          number <= static_cast<int>(MasterWeights::kCorrection16Nearest)) {
        continue;
      }
      return Status::invalid_argument(std::string(name) + " = " + std::to_string(number) +
                                      "; allowed are 2 (8 bit), 3 (16 bit), 4 (8 bit, nearest), 5 (16 bit, nearest)");
    }
    if (count < 0 || count > kMostElements) {
      return Status::invalid_argument("count = " + std::to_string(count) + "; allowed are 0 to 2^57");
    }
    if (count > 0 && (corrections == nullptr || rescaled == nullptr)) {
      return Status::invalid_argument(std::string(corrections == nullptr ? "corrections" : "rescaled") +
                                      " is null; must point to " + std::to_string(count) + " corrections");
    }
    const bool from_8 = core::correction_bits(from) == 8, to_8 = core::correction_bits(to) == 8;
    const bool is_in_place = corrections == rescaled && from_8 == to_8;
    const ArrayRange arrays[] = {{"corrections", -1, corrections, from_8 ? count : 2 * count},
                                 {"rescaled", -1, rescaled, to_8 ? count : 2 * count}};
    const Status status = count == 0 || is_in_place ? Status::ok() : check_apart(arrays, 2, {});
    if (!status.is_ok()) return status;
    if (from_8 && to_8) rescale<8, 8>(corrections, rescaled, count);
    if (from_8 && !to_8) rescale<8, 16>(corrections, rescaled, count);
    if (!from_8 && to_8) rescale<16, 8>(corrections, rescaled, count);
    if (!from_8 && !to_8) rescale<16, 16>(corrections, rescaled, count);
    return Status::ok();
  });
}

}  // namespace flashoptim
