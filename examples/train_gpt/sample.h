// Text from a trained model.
#pragma once

#include <cstdint>
#include <string>

#include "model.h"
#include "tokenizer.h"

namespace train_gpt {

// Continues `prompt` by `count` tokens drawn at the given temperature; the same seed gives the same text.
std::string sample_text(Gpt& model, const Tokenizer& tokenizer, const std::string& prompt, std::int64_t count,
                        double temperature, std::int64_t seed);

}  // namespace train_gpt
