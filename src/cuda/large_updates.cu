// Apart from all other kernels: a driver that cannot take more than 4 KB of arguments may refuse the file that they are
// in.
#include "src/cuda/updates-inl.cuh"

namespace flashoptim::cuda {

template int launch_gradients(const GradientArguments<kLargeGradientsPerLaunch>&, void*);
template int launch_entries(const EntryArguments<kLargeEntriesPerLaunch>&, void*);

}  // namespace flashoptim::cuda
