#include "src/cpu/lanes_scalar-inl.h"
//
#include "src/cpu/loops-inl.h"

namespace flashoptim::cpu {

const KernelTable kScalarKernels = Loops<float>::table("scalar");

}  // namespace flashoptim::cpu
