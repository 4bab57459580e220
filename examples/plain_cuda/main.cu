// Trains a small linear regression in plain CUDA: bf16 weights with 8-bit corrections and 8-bit states, no framework.
//
//   cmake -B build -DFLASHOPTIM_CUDA=ON && cmake --build build --target plain_cuda &&
//   build/examples/plain_cuda/plain_cuda
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "flashoptim/cuda.h"

namespace {

constexpr int kInputs = 512, kOutputs = 64, kBatch = 1024;

/// One block per sample and 64 outputs: prediction, error, and the error's contribution to the gradient (fp32, summed).
__global__ void forward_backward(const float* x, const float* y, const __nv_bfloat16* w, float* gradient,
                                 double* loss) {
  const int sample = blockIdx.x, output = threadIdx.x;
  float prediction = 0.0f;
  for (int i = 0; i < kInputs; ++i) prediction += __bfloat162float(w[output * kInputs + i]) * x[sample * kInputs + i];
  const float error = prediction - y[sample * kOutputs + output];
  for (int i = 0; i < kInputs; ++i)
    atomicAdd(&gradient[output * kInputs + i], 2.0f / kBatch * error * x[sample * kInputs + i]);
  atomicAdd(loss, static_cast<double>(error) * error / (kBatch * kOutputs));
}

__global__ void narrow(const float* from, __nv_bfloat16* to, int count) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) to[i] = __float2bfloat16(from[i]);
}

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
  std::exit(1);
}
void check(const flashoptim::Status& status) {
  if (status.is_ok()) return;
  std::fprintf(stderr, "%s\n", status.message().c_str());
  std::exit(1);
}

template <class T>
T* zeros(size_t count) {
  T* p = nullptr;
  check(cudaMalloc(&p, count * sizeof(T)));
  check(cudaMemset(p, 0, count * sizeof(T)));
  return p;
}

template <class T>
T* upload(const std::vector<T>& values) {
  T* p = zeros<T>(values.size());
  check(cudaMemcpy(p, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  return p;
}

}  // namespace

int main() {
  // Data from hidden weights.
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> hidden(kOutputs * kInputs), x(kBatch * kInputs), y(kBatch * kOutputs, 0.0f);
  for (float& v : hidden) v = 0.1f * normal(random);
  for (float& v : x) v = normal(random);
  for (int s = 0; s < kBatch; ++s) {
    for (int o = 0; o < kOutputs; ++o) {
      for (int i = 0; i < kInputs; ++i)
        y[static_cast<size_t>(s * kOutputs + o)] +=
            hidden[static_cast<size_t>(o * kInputs + i)] * x[static_cast<size_t>(s * kInputs + i)];
    }
  }
  const float *device_x = upload(x), *device_y = upload(y);

  // The parameter and what is stored for it: 2 + 1 + 1 + 1 bytes an element, and 2 x 2 per 32.
  constexpr int64_t kSizes[] = {kOutputs, kInputs};
  constexpr int kCount = kOutputs * kInputs;
  flashoptim::ParameterTensors t;
  t.layout = flashoptim::group_layout(kSizes, 2);
  t.parameter_dtype = t.gradient_dtype = flashoptim::DType::kBFloat16;
  t.master_weights = flashoptim::MasterWeights::kCorrection8;
  t.state_codec = flashoptim::StateCodec::kDefault;
  t.parameter = zeros<__nv_bfloat16>(kCount);
  t.correction = zeros<int8_t>(kCount);
  for (int k = 0; k < 2; ++k) {
    t.states[k] = zeros<uint8_t>(kCount);
    t.scales[k] = zeros<uint16_t>(static_cast<size_t>(t.layout.groups()));
  }
  auto* gradient = zeros<__nv_bfloat16>(kCount);
  auto* sum = zeros<float>(kCount);
  auto* loss = zeros<double>(1);
  auto* norm = zeros<flashoptim::cuda::GradientNorm>(1);
  t.gradient = gradient;

  flashoptim::cuda::Plan plan;
  check(flashoptim::cuda::Plan::make(flashoptim::OptimizerKind::kAdamW, false, &t, 1, 0, &plan));
  cudaStream_t stream;
  check(cudaStreamCreate(&stream));

  double value = 0.0, first = 0.0;
  for (int step = 1; step <= 300; ++step) {
    check(cudaMemsetAsync(sum, 0, kCount * sizeof(float), stream));
    check(cudaMemsetAsync(loss, 0, sizeof(double), stream));
    forward_backward<<<kBatch, kOutputs, 0, stream>>>(device_x, device_y, static_cast<__nv_bfloat16*>(t.parameter), sum,
                                                      loss);
    narrow<<<(kCount + 255) / 256, 256, 0, stream>>>(sum, gradient, kCount);
    check(cudaGetLastError());

    // Clip to norm 1 and step, without waiting for the device.
    flashoptim::cuda::NormOptions norm_options;
    norm_options.stream = stream;
    norm_options.max_norm = 1.0f;
    check(plan.gradient_norm(norm_options, norm));
    flashoptim::cuda::StepOptions options;
    options.stream = stream;
    options.clip_coefficient = &norm->coefficient;
    flashoptim::Hyperparameters hyper;
    hyper.lr = step < 200 ? 3e-3 : 3e-4;
    hyper.step = step;
    check(plan.step(&hyper, 1, options));

    if (step == 1 || step % 50 == 0) {
      check(cudaMemcpyAsync(&value, loss, sizeof value, cudaMemcpyDeviceToHost, stream));
      check(cudaStreamSynchronize(stream));
      if (step == 1) first = value;
      std::printf("step %3d  loss %.6f\n", step, value);
    }
  }
  const bool learned = value < 0.01 * first;
  std::printf(learned ? "learned\n" : "did not learn\n");
  return learned ? 0 : 1;
}
