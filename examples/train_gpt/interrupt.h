// Ctrl-C and SIGTERM as a request that the training loop looks at between steps.
#pragma once

namespace train_gpt {

// From here on the first SIGINT or SIGTERM is only noted; a second one ends the process as usual.
void install_interrupt_handlers();

// The signal that was noted, or 0.
int interrupt_signal();

}  // namespace train_gpt
