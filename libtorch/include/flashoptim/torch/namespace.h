// Where the names of this front end stand.
//
// Their home is flashoptim::libtorch. flashoptim::torch is LibTorch's own namespace under a second name, and each
// header declares its classes and functions there, too: flashoptim::torch::FlashAdamW, torch::FlashAdamW and
// flashoptim::libtorch::FlashAdamW are one class. A namespace flashoptim::torch of our own would make `torch::`
// ambiguous in every program that says `using namespace flashoptim;`; two names of one namespace are not ambiguous.
//
// So `namespace flashoptim::torch { ... }` cannot be opened: what adds to the front end opens flashoptim::libtorch.
#pragma once

namespace torch {}

namespace flashoptim {
namespace libtorch {}
namespace torch = ::torch;
}  // namespace flashoptim
