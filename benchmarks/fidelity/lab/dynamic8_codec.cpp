// bitsandbytes' dynamic 8-bit states, from the paper (Dettmers et al. 2022, sections 1.3 and 2): the codes of a dynamic
// tree over 7 decades, the nearest one taken, blocks of 256 with an fp32 absmax.
#include <algorithm>
#include <cmath>

#include "lab/lab_codec.h"

namespace flashoptim::fidelity {

namespace {

/// The 256 values of the tree: for decade 10^(i - 6), 2^i (signed) or 2^(i + 1) (unsigned) fractions, which are the
/// midpoints of as many equal parts of [0.1, 1]; and 0 and 1.
std::vector<float> dynamic_tree(bool is_signed) {
  std::vector<float> values{0.0f, 1.0f};
  for (int i = 0; i < 7; ++i) {
    const int parts = 1 << (is_signed ? i : i + 1);
    for (int k = 0; k < parts; ++k) {
      const double fraction = 0.1 + 0.9 * (k + 0.5) / parts;
      const auto value = static_cast<float>(std::pow(10.0, i - 6) * fraction);
      values.push_back(value);
      if (is_signed) values.push_back(-value);
    }
  }
  std::sort(values.begin(), values.end());
  return values;
}

class Tree {
 public:
  explicit Tree(bool is_signed) : values_(dynamic_tree(is_signed)) {
    for (size_t i = 0; i + 1 < values_.size(); ++i) middles_.push_back(0.5f * (values_[i] + values_[i + 1]));
  }
  uint8_t nearest(float x) const {
    const float* middle = middles_.data();
    uint32_t code = 0;
    for (uint32_t half = 128; half != 0; half >>= 1) code += x > middle[code + half - 1] ? half : 0u;
    return static_cast<uint8_t>(code);
  }
  float value(uint8_t code) const { return values_[code]; }

 private:
  std::vector<float> values_, middles_;
};

class Dynamic8Codec : public LabCodec {
 public:
  explicit Dynamic8Codec(int64_t elements) {
    const auto n = static_cast<size_t>(elements);
    for (Slot* s : {&m_, &v_}) {
      s->codes.assign(n, s->tree.nearest(0.0f));
      s->scales.assign(n / 256, 0.0f);
    }
  }
  int64_t block_size() const override { return 256; }
  void decode(int64_t block, float* m, float* v) override {
    m_.decode(block, m);
    if (v != nullptr) v_.decode(block, v);
  }
  void encode(int64_t block, const core::DitherKey&, const float* m, const float* v) override {
    m_.encode(block, m);
    if (v != nullptr) v_.encode(block, v);
  }

 private:
  struct Slot {
    explicit Slot(bool is_signed) : tree(is_signed) {}
    void decode(int64_t block, float* out) const {
      for (int64_t i = 0; i < 256; ++i) {
        out[i] = tree.value(codes[static_cast<size_t>(block * 256 + i)]) * scales[static_cast<size_t>(block)];
      }
    }
    void encode(int64_t block, const float* x) {
      float absmax = 0.0f;
      for (int64_t i = 0; i < 256; ++i) absmax = std::max(absmax, std::fabs(x[i]));
      scales[static_cast<size_t>(block)] = absmax;
      const float divisor = absmax > 0.0f ? absmax : 1.0f;
      for (int64_t i = 0; i < 256; ++i) codes[static_cast<size_t>(block * 256 + i)] = tree.nearest(x[i] / divisor);
    }
    Tree tree;
    std::vector<uint8_t> codes;
    std::vector<float> scales;
  };
  Slot m_{true}, v_{false};
};

}  // namespace

std::unique_ptr<LabCodec> make_dynamic8_codec(int64_t elements) { return std::make_unique<Dynamic8Codec>(elements); }

}  // namespace flashoptim::fidelity
