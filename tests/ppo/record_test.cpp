// What a trainer record must not get away with: numbers that differ, and anything this library does not know.
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "rlhf/verify/vectors.h"
#include "tests/catch.h"

namespace fs = std::filesystem;
using Json = nlohmann::json;

namespace {

const fs::path kGolden = fs::path(RLHF_SOURCE_DIR) / "tests" / "golden";

// The file with only the case of that name, whose checkpoints stay where they are.
Json one_case(const std::string& file, const std::string& name) {
  std::ifstream stream(kGolden / file);
  Json json = Json::parse(stream);
  Json found;
  for (Json& item : json["cases"])
    if (item["name"] == name) found = std::move(item);
  REQUIRE(found.is_object());
  const std::string checkpoints = found["params"]["checkpoints"];
  found["params"]["checkpoints"] = (kGolden / checkpoints).string();
  json["cases"] = Json::array({std::move(found)});
  return json;
}

rlhf::VerifyResult verify(const Json& json) {
  const fs::path path = fs::temp_directory_path() / "rlhf_record_test.json";
  std::ofstream(path) << json;
  const rlhf::VerifyResult result = rlhf::verify_vectors(path.string());
  fs::remove(path);
  return result;
}

// True when a message of the failed case holds `text`.
bool fails_with(const Json& json, const std::string& text) {
  const rlhf::VerifyResult result = verify(json);
  for (const std::string& message : result.messages)
    if (result.failures == 1 && message.find(text) != std::string::npos) return true;
  return false;
}

// Adds a thousandth of itself, or a thousandth, to a number of the record's outputs.
Json with_changed_number(Json json, const std::string& pointer) {
  Json& number = json["cases"][0]["outputs"].at(Json::json_pointer(pointer));
  const double value = number.get<double>();
  number = value + 1e-3 * (value == 0 ? 1 : value);
  return json;
}

void check_changed_numbers(const Json& record, const std::vector<std::string>& pointers) {
  CHECK(verify(record).failures == 0);
  for (const std::string& pointer : pointers) {
    INFO(pointer);
    CHECK(verify(with_changed_number(record, pointer)).failures == 1);
  }
}

Json with_param(Json json, const std::string& key, const Json& value) {
  json["cases"][0]["params"][key] = value;
  return json;
}

}  // namespace

TEST_CASE("a PPO record with one number changed fails") {
  const Json record = one_case("trl_ppo_record.json", "last_batch_gpt2_fp64");
  check_changed_numbers(record,
                        {"/updates/0/lr",
                         "/updates/0/queries/0/6",
                         "/updates/0/responses/0/1",
                         "/updates/0/padding_mask_p1/1/2",
                         "/updates/0/contain_eos_token/0",
                         "/updates/0/logprobs_before_mask/0/0",
                         "/updates/0/ref_logprobs_before_mask/0/5",
                         "/updates/0/values_before_mask/1/0",
                         "/updates/0/scores_before_penalty/2",
                         "/updates/0/kl/0/1",
                         "/updates/0/rewards/3/0",
                         "/updates/0/advantages_before_whitening/5/0",
                         "/updates/0/advantages/7/1",
                         "/updates/0/returns/6/0",
                         "/updates/0/approxkl_stats/0/0/1",
                         "/updates/0/ratio_stats/0/0/3",
                         "/updates/0/metrics/objective~1entropy",
                         "/updates/0/metrics/val~1ratio_var",
                         "/updates/0/micro_batches/1/pg_loss",
                         "/updates/0/micro_batches/2/vf_loss",
                         "/updates/0/micro_batches/2/loss",
                         "/updates/0/micro_batches/3/vf_clipfrac",
                         "/updates/0/micro_batches/1/new_logprobs/0/0",
                         "/updates/0/micro_batches/1/dscaledloss_dnew_logprobs/1/0",
                         "/updates/0/micro_batches/3/dscaledloss_dvpred/1/0",
                         "/updates/0/micro_batches/0/accumulated_grad_norms/policy.transformer.wte.weight",
                         "/updates/0/micro_batches/3/param_l2_after_step/value_model.score.weight",
                         "/optimizer/eps"});
}

TEST_CASE("a GRPO record with one number changed fails") {
  check_changed_numbers(
      one_case("trl_grpo_record.json", "grpo"),
      {"/events/0/completion_mask/0/7", "/events/0/old_per_token_logps/1/1",
       "/events/0/ref_per_token_logps/1/1", "/events/0/rewards_per_func/2/0", "/events/0/advantages/3",
       "/events/0/num_items_in_batch", "/events/1/learning_rate", "/events/1/per_token_logps/0/3",
       "/events/1/entropies/0/3", "/events/4/per_token_loss/1/2", "/events/4/coef_1/1/2", "/events/5/loss",
       "/events/3/global_grad_norm_before_clipping", "/events/3/grad_norms_after_clipping/model.norm.weight",
       "/events/6/param_l2_after_step/lm_head.weight", "/events/6/learning_rate"});
}

TEST_CASE("an RLOO record with one number changed fails") {
  check_changed_numbers(one_case("trl_grpo_record.json", "rloo"),
                        {"/events/0/old_logps/1", "/events/7/kl/0", "/events/7/advantages/0",
                         "/events/8/logps/0", "/events/8/coef_1/1", "/events/8/loss"});
}

TEST_CASE("a record fails for what is not known") {
  const Json ppo = one_case("trl_ppo_record.json", "last_batch_gpt2_fp64");
  CHECK(fails_with(with_param(ppo, "entropy_coef", 0.1), "parameter 'entropy_coef' is not known"));
  CHECK(fails_with(with_param(ppo, "kl_estimator", "k2"), "kl_estimator 'k2' is not known"));
  CHECK(fails_with(with_param(ppo, "stop_token", "period"), "stop_token 'period' is not known"));
  CHECK(fails_with(with_param(ppo, "weight_decay", 0.01), "weight_decay 0.01 is not known"));
  CHECK(fails_with(with_param(ppo, "lr_scheduler_type", "SchedulerType.REDUCE_ON_PLATEAU"), "is not known"));
  Json more = ppo;
  more["cases"][0]["outputs"]["updates"][0]["micro_batches"][2]["surprise"] = 1;
  CHECK(fails_with(more, "updates[0].micro_batches[2]: 'surprise' is not known"));
  Json fewer = ppo;
  fewer["cases"][0]["outputs"]["updates"][0].erase("returns");
  CHECK(fails_with(fewer, "updates[0].returns is missing"));

  const Json grpo = one_case("trl_grpo_record.json", "grpo");
  CHECK(fails_with(with_param(grpo, "use_vllm", true), "parameter 'use_vllm' is not known"));
  CHECK(fails_with(with_param(grpo, "loss_type", "sppo"), "loss_type 'sppo' is not known"));
  CHECK(fails_with(with_param(grpo, "scale_rewards", "median"), "scale_rewards 'median' is not known"));
  Json event = grpo;
  event["cases"][0]["outputs"]["events"][0]["kind"] = "evaluation";
  CHECK(fails_with(event, "kind 'evaluation' is not known"));
}

TEST_CASE("a record fails with another configuration than it was made with") {
  const Json ppo = one_case("trl_ppo_record.json", "last_batch_gpt2_fp64");
  for (const auto& [key, value] : std::vector<std::pair<std::string, Json>>{{"gamma", 0.99},
                                                                            {"lam", 0.9},
                                                                            {"cliprange", 0.1},
                                                                            {"cliprange_value", 0.1},
                                                                            {"vf_coef", 0.2},
                                                                            {"kl_estimator", "k3"},
                                                                            {"whiten_rewards", true},
                                                                            {"missing_eos_penalty", 1.0},
                                                                            {"stop_token", nullptr},
                                                                            {"temperature", 0.8},
                                                                            {"adam_beta2", 0.99},
                                                                            {"learning_rate", 0.004}}) {
    INFO(key);
    CHECK(verify(with_param(ppo, key, value)).failures == 1);
  }
  const Json grpo = one_case("trl_grpo_record.json", "grpo");
  for (const auto& [key, value] :
       std::vector<std::pair<std::string, Json>>{{"beta", 0.02},
                                                 {"epsilon", 0.1},
                                                 {"loss_type", "grpo"},
                                                 {"scale_rewards", "none"},
                                                 {"use_bias_correction_kl", false},
                                                 {"max_grad_norm", 0.5},
                                                 {"num_generations", 2},
                                                 {"importance_sampling_level", "sequence"}}) {
    INFO(key);
    CHECK(verify(with_param(grpo, key, value)).failures == 1);
  }
}
