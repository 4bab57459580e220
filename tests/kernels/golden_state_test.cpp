// The bytes of stored states, frozen per optimizer in data/state_format/<rule>.txt: a change of format, dither or rule
// shows here, and says that flashoptim::kStateFormatVersion has to change with it. After an intended change:
//   tests/data/regenerate.sh BUILD_DIR
#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <sstream>

#include "flashoptim/core/dither.h"
#include "flashoptim/version.h"
#include "tests/kernels/test_tensors.h"

namespace flashoptim::test {
namespace {

const std::string kFolder = std::string(FLASHOPTIM_SOURCE_DIR) + "/tests/data/";

bool regenerate() { return std::getenv("FLASHOPTIM_REGENERATE") != nullptr; }

void expect_file_is(const std::string& path, const std::string& text) {
  if (regenerate()) {
    std::ofstream(path) << text;
    return;
  }
  std::ifstream file(path);
  ASSERT_TRUE(file) << path << " is missing: run tests/data/regenerate.sh";
  std::stringstream frozen;
  frozen << file.rdbuf();
  std::istringstream expected(frozen.str()), actual(text);
  std::string expected_line, actual_line;
  for (int line = 1; std::getline(expected, expected_line); ++line) {
    std::getline(actual, actual_line);
    ASSERT_EQ(actual_line, expected_line)
        << path << ':' << line << ": the stored format changed; if that is meant, raise "
        << "kStateFormatVersion and run tests/data/regenerate.sh";
  }
}

std::string hex(const void* data, int64_t bytes) {
  std::ostringstream out;
  for (int64_t i = 0; i < bytes; ++i) {
    char text[3];
    std::snprintf(text, sizeof text, "%02x", static_cast<const unsigned char*>(data)[i]);
    out << text;
  }
  return out.str();
}

/// Three steps on two rows of 40: full and short groups, zeros, a spread of ten decades.
std::string states_after_three_steps(const OptimizerChoice& optimizer) {
  std::ostringstream out;
  out << "# " << optimizer.name
      << ": arrays after three steps of tests/kernels/test_tensors.h on shape [2, 40], hexadecimal bytes\n"
      << "format " << kStateFormatVersion << '\n';
  for (StateCodec codec : {StateCodec::kPaper, StateCodec::kDefault}) {
    const Storage storage{DType::kBFloat16, DType::kBFloat16, MasterWeights::kCorrection8};
    std::vector<std::unique_ptr<TestTensor>> t;
    t.push_back(std::make_unique<TestTensor>(optimizer, codec, storage, std::vector<int64_t>{2, 40}, 77));
    EXPECT_TRUE(run_steps(optimizer, t, 1, 3).is_ok());
    const ParameterTensors& p = t[0]->tensors();
    out << (codec == StateCodec::kPaper ? "paper\n" : "default\n");
    out << "parameter " << hex(p.parameter, 160) << "\ncorrection " << hex(p.correction, 80) << '\n';
    for (int k = 0; k < optimizer.states; ++k) {
      out << state_slot(optimizer.kind, k).name << ' ' << hex(p.states[k], 80) << '\n';
      out << state_slot(optimizer.kind, k).name << "_scale " << hex(p.scales[k], 8) << '\n';
    }
  }
  return out.str();
}

TEST(GoldenState, EveryOptimizersBytesAreTheFrozenOnes) {
  for (const OptimizerChoice& optimizer : kOptimizers) {
    expect_file_is(kFolder + "state_format/" + optimizer.name + ".txt", states_after_three_steps(optimizer));
  }
}

TEST(GoldenState, NearestCodesOfTheDefaultCodecAreTheFrozenOnes) {
  // Groups by what they guard: one scale, a wide spread, an outlier, zeros between, subnormals, the ends of the range.
  std::vector<float> m, v;
  const auto group = [&](auto momentum, auto variance) {
    for (int i = 0; i < 32; ++i) {
      m.push_back(static_cast<float>(momentum(i)));
      v.push_back(static_cast<float>(variance(i)));
    }
  };
  const auto sign = [](int i) { return i % 3 == 0 ? -1.0 : 1.0; };
  group([&](int i) { return sign(i) * (1.0 + i / 32.0); }, [](int i) { return 1.0 + i / 32.0; });
  group([&](int i) { return sign(i) * std::exp2(-i); }, [](int i) { return std::exp2(-2 * i); });
  group([&](int i) { return i == 5 ? 1e3 : 1e-3 * sign(i); }, [](int i) { return i == 5 ? 1e6 : 1e-6; });
  group([&](int i) { return i % 2 == 0 ? 0.0 : 0.1 * sign(i); }, [](int i) { return i % 2 == 0 ? 0.0 : 0.01; });
  group([](int) { return 1e-22; }, [](int i) { return i * 1e-42; });
  group([&](int i) { return sign(i) * 1e18; }, [](int i) { return i == 0 ? 1e-38 : 1e36; });
  const int64_t n = static_cast<int64_t>(m.size());
  std::vector<uint8_t> codes_m(m.size()), codes_v(m.size());
  std::vector<uint16_t> scales_m(m.size() / 32), scales_v(m.size() / 32);
  ParameterTensors t;
  t.layout = {1, n};
  t.state_codec = StateCodec::kDefault;
  t.states[0] = codes_m.data();
  t.states[1] = codes_v.data();
  t.scales[0] = scales_m.data();
  t.scales[1] = scales_v.data();
  const float* values[] = {m.data(), v.data()};
  ASSERT_TRUE(encode_states(OptimizerKind::kAdamW, true, t, values).is_ok());
  std::ostringstream out;
  out << "# default codec, nearest: six groups, momentum beside variance\n";
  for (size_t g = 0; g < scales_m.size(); ++g) {
    out << "exp_avg " << hex(&codes_m[32 * g], 32) << ' ' << hex(&scales_m[g], 2) << "\nexp_avg_sq "
        << hex(&codes_v[32 * g], 32) << ' ' << hex(&scales_v[g], 2) << '\n';
  }
  // Momentum alone.
  ASSERT_TRUE(encode_states(OptimizerKind::kLion, true, t, values).is_ok());
  for (size_t g = 0; g < scales_m.size(); ++g)
    out << "lion " << hex(&codes_m[32 * g], 32) << ' ' << hex(&scales_m[g], 2) << '\n';
  expect_file_is(kFolder + "default_codec.txt", out.str());
}

TEST(GoldenState, TheFirstDitherWordsAreTheFrozenOnes) {
  std::ostringstream out;
  out << "# first words of the dither: seed, step, first element of the group; then variance, momentum, weight\n";
  for (uint64_t seed : {uint64_t{0}, uint64_t{42}, uint64_t{1} << 40}) {
    for (uint64_t step : {1, 2, 1000000}) {
      for (uint64_t first : {uint64_t{0}, uint64_t{32}, (uint64_t{1} << 32) + 32}) {
        const core::DitherKey key = core::make_dither_key(seed, step);
        const uint32_t hash =
            core::dither_group_hash<float>(key, static_cast<uint32_t>(first), static_cast<uint32_t>(first >> 32));
        const uint32_t words[] = {core::dither_group_start<core::DitherStream::kVariance, float>(key, hash),
                                  core::dither_group_start<core::DitherStream::kMomentum, float>(key, hash),
                                  core::dither_group_start<core::DitherStream::kWeight, float>(key, hash)};
        out << seed << ' ' << step << ' ' << first << ": " << hex(&words[0], 4) << ' ' << hex(&words[1], 4) << ' '
            << hex(&words[2], 4) << '\n';
      }
    }
  }
  out << "lane steps " << core::kDitherLaneStep<core::DitherStream::kVariance> << ' '
      << core::kDitherLaneStep<core::DitherStream::kMomentum> << ' '
      << core::kDitherLaneStep<core::DitherStream::kWeight> << '\n';
  expect_file_is(kFolder + "dither.txt", out.str());
}

}  // namespace
}  // namespace flashoptim::test
