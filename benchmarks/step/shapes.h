// Shapes of the parameter tensors of real models, in the order of the model's parameters().
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace flashoptim::benchmarks {

/// Sizes of one tensor; unused dimensions are 0.
using Shape = std::array<int64_t, 4>;

constexpr int64_t numel(const Shape& shape) {
  int64_t product = 1;
  for (int64_t size : shape) product *= size == 0 ? 1 : size;
  return product;
}
constexpr int64_t dimensions(const Shape& shape) {
  int64_t count = 0;
  for (int64_t size : shape) count += size != 0;
  return count;
}

/// torchvision's ResNet-50: 53 convolutions without bias, 53 batch norms, one linear layer.
template <class Add>
constexpr void resnet50(Add add) {
  const auto convolution = [&add](int64_t out, int64_t in, int64_t kernel) {
    add({out, in, kernel, kernel});
    add({out});
    add({out});
  };
  convolution(64, 3, 7);
  int64_t in = 64;
  constexpr int64_t kWidths[] = {64, 128, 256, 512}, kBlocks[] = {3, 4, 6, 3};
  for (int stage = 0; stage < 4; ++stage) {
    const int64_t width = kWidths[stage], out = 4 * width;
    for (int64_t block = 0; block < kBlocks[stage]; ++block) {
      convolution(width, in, 1);
      convolution(width, width, 3);
      convolution(out, width, 1);
      if (block == 0) convolution(out, in, 1);
      in = out;
    }
  }
  add({1000, 2048});
  add({1000});
}

/// GPT-2 124M (the output layer is tied to the embedding).
template <class Add>
constexpr void gpt2(Add add) {
  constexpr int64_t kWidth = 768;
  add({50257, kWidth});
  add({1024, kWidth});
  for (int layer = 0; layer < 12; ++layer) {
    add({kWidth});
    add({kWidth});
    add({kWidth, 3 * kWidth});
    add({3 * kWidth});
    add({kWidth, kWidth});
    add({kWidth});
    add({kWidth});
    add({kWidth});
    add({kWidth, 4 * kWidth});
    add({4 * kWidth});
    add({4 * kWidth, kWidth});
    add({kWidth});
  }
  add({kWidth});
  add({kWidth});
}

/// One decoder layer of Llama-3.1-8B.
template <class Add>
constexpr void llama_layer(Add add) {
  add({4096, 4096});   // q
  add({1024, 4096});   // k
  add({1024, 4096});   // v
  add({4096, 4096});   // o
  add({14336, 4096});  // gate
  add({14336, 4096});  // up
  add({4096, 14336});  // down
  add({4096});
  add({4096});
}

struct ShapeCount {
  int64_t tensors = 0, parameters = 0;
  constexpr void operator()(const Shape& shape) {
    ++tensors;
    parameters += numel(shape);
  }
  constexpr bool operator==(const ShapeCount&) const = default;
};

static_assert([] {
  ShapeCount n;
  resnet50([&n](const Shape& s) { n(s); });
  return n;
}() == ShapeCount{161, 25557032});
static_assert([] {
  ShapeCount n;
  gpt2([&n](const Shape& s) { n(s); });
  return n;
}() == ShapeCount{148, 124439808});
static_assert([] {
  ShapeCount n;
  llama_layer([&n](const Shape& s) { n(s); });
  return n;
}() == ShapeCount{9, 218112000});

/// A named list of tensors to step.
struct Workload {
  std::string name;
  std::vector<Shape> shapes;
  int64_t numel() const {
    int64_t sum = 0;
    for (const Shape& shape : shapes) sum += benchmarks::numel(shape);
    return sum;
  }
};

/// One 2-D tensor of 2^log2_numel elements.
inline Workload one_tensor(int log2_numel) {
  const int64_t columns = int64_t{1} << (log2_numel < 20 ? log2_numel / 2 : 10);
  return {"n:" + std::to_string(int64_t{1} << log2_numel), {{(int64_t{1} << log2_numel) / columns, columns}}};
}
inline Workload resnet50_workload() {
  Workload w{"resnet50", {}};
  resnet50([&w](const Shape& shape) { w.shapes.push_back(shape); });
  return w;
}
inline Workload gpt2_workload() {
  Workload w{"gpt2", {}};
  gpt2([&w](const Shape& shape) { w.shapes.push_back(shape); });
  return w;
}
inline Workload llama_layer_workload() {
  Workload w{"llama_layer", {}};
  llama_layer([&w](const Shape& shape) { w.shapes.push_back(shape); });
  return w;
}

}  // namespace flashoptim::benchmarks
