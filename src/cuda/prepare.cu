// The small kernels around a step: hyperparameters that live on the device, step counters, the table's updates.
#include <cuda_runtime.h>

#include "flashoptim/core/optimizer_list.h"
#include "src/cuda/arguments.h"
#include "src/cuda/updates-inl.cuh"

namespace flashoptim::cuda {
namespace {

template <class Rule>
__device__ void store_hyper(const Hyperparameters& p, HyperStorage* out) {
  reinterpret_cast<typename Rule::Hyper&>(*out) = Rule::make_hyper(p);
}

/// As Plan::step on the host: the rule's fp32 numbers, the dither key, the gradients' factor.
__global__ void prepare_kernel(const __grid_constant__ PrepareArguments args) {
  const int i = static_cast<int>(threadIdx.x);
  if (i >= args.count) return;
  Hyperparameters p = args.hypers[i];
  if (args.lr[i] != nullptr) p.lr = static_cast<double>(*args.lr[i]);
  if (args.step[i] != nullptr) p.step = *args.step[i];
  PreparedHyper out{};
  switch (args.rule) {
#define FLASHOPTIM_CASE(name)                                                      \
  case RuleKind::k##name:                                                          \
    store_hyper<core::name>(p, &out.rule);                                         \
    if (args.largest_updates != nullptr) {                                         \
      args.largest_updates[i] = static_cast<float>(core::name::largest_update(p)); \
    }                                                                              \
    break;
    FLASHOPTIM_FOR_EACH_RULE(FLASHOPTIM_CASE)
#undef FLASHOPTIM_CASE
    case RuleKind::kCount:
      break;
  }
  out.dither = core::make_dither_key(p.seed, static_cast<uint64_t>(p.step));
  const float factor = core::gradient_factor(args.gradient_scale, args.gradient_divisor, args.clip_coefficient);
  out.gradient_scale = core::directed_factor(factor, p);
  out.skip = args.found_inf != nullptr && *args.found_inf != 0.0f;
  args.out[i] = out;
}

__global__ void advance_kernel(int64_t* counter, const float* found_inf) {
  if (found_inf == nullptr || *found_inf == 0.0f) ++*counter;
}

}  // namespace

int launch_prepare(const PrepareArguments& args, void* stream) {
  prepare_kernel<<<1, 32, 0, static_cast<cudaStream_t>(stream)>>>(args);
  return static_cast<int>(cudaGetLastError());
}

template int launch_gradients(const GradientArguments<kGradientsPerLaunch>&, void*);
template int launch_entries(const EntryArguments<kEntriesPerLaunch>&, void*);

int launch_advance(int64_t* counter, const float* found_inf, void* stream) {
  advance_kernel<<<1, 1, 0, static_cast<cudaStream_t>(stream)>>>(counter, found_inf);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace flashoptim::cuda
