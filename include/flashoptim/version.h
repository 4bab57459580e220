// Version of the library and of the state format it writes (docs/state_format.md).
#pragma once

#define FLASHOPTIM_VERSION_MAJOR 0
#define FLASHOPTIM_VERSION_MINOR 1
#define FLASHOPTIM_VERSION_PATCH 0

namespace flashoptim {

/// Changes whenever the meaning of stored codes, scales or corrections does.
inline constexpr int kStateFormatVersion = 2;

}  // namespace flashoptim
