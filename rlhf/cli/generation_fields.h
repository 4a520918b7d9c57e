#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "rlhf/train/language_model.h"
#include "rollout/engine/generation.h"

namespace rlhf::cli {

/// Changes a request by the keys of its input line: n, seed, priority, deadline_steps, deadline_s,
/// max_new_tokens, min_new_tokens, ignore_eos, stop, stop_token_ids, temperature, top_k, top_p, min_p,
/// repetition_penalty, presence_penalty, frequency_penalty, logit_bias, allowed_token_ids, choices,
/// raw_logprobs, entropies, top_logprobs. Other keys belong to the caller and are left alone, unless they
/// look like one of these misspelt.
/// @param where file and line, for messages
/// @throws IoError `where: key: got X, expected Y`, or naming the key that was probably meant
void apply_generation_fields(const LanguageModel& model, const nlohmann::json& line, const std::string& where,
                             GenerationRequest& request);

/// Token ids of a text that the response shall consist of. @throws IoError naming `where` without a
/// tokenizer.
std::vector<TokenId> choice_tokens(const LanguageModel& model, const std::string& text,
                                   const std::string& where);

}  // namespace rlhf::cli
