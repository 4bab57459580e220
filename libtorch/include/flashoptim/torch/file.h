// Archives as files that are there whole or not at all, and that are known to be what was written.
//
// torch::save() and torch::load() leave half a file where a program is killed or a disk is full (or end the program),
// and read damaged files without a word: torch does not look at the checksums in its zip files. These two write the
// same zip file with 32 more bytes behind it, which torch::load() and Python's torch.load() pass over:
//
//   "flashoptim file\n"    16 bytes
//   length, checksum       2 x uint64, little-endian: bytes before these 32, and their CRC-32
#pragma once

#include <torch/serialize/archive.h>

#include <optional>
#include <string>

#include "flashoptim/torch/namespace.h"

namespace flashoptim::libtorch {

/// Writes `archive` under the name `path` + ".partial", flushes it to the disk, renames it to `path` and flushes the
/// folder. Whenever this is interrupted, `path` is the old file or the new one. Throws c10::Error that names path and
/// reason where a system call fails: `path` is then as it was, and nothing is left beside it. (Where the last of them
/// fails, the folder's flush, the new file is there, and may not be after a power cut; the error says so.)
void save_archive(const std::string& path, ::torch::serialize::OutputArchive& archive);

/// Reads a file of save_archive() into `archive`. Throws c10::Error that names path and reason where the file cannot be
/// read or is not what was written: every change of a byte and every cut is found before torch reads anything.
/// `device`: as in torch::load. The file is read twice, and never held in memory as a whole.
void load_archive(const std::string& path, ::torch::serialize::InputArchive& archive,
                  std::optional<::torch::Device> device = std::nullopt);

}  // namespace flashoptim::libtorch

namespace torch {
using ::flashoptim::libtorch::load_archive;
using ::flashoptim::libtorch::save_archive;
}  // namespace torch
