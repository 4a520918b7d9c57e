#include "rlhf/model/model_config.h"

#include <cmath>
#include <map>

#include "rlhf/core/error.h"
#include "rlhf/model/weight_file.h"
#include "tests/catch.h"
#include "tests/model/golden.h"

using namespace rlhf;
using model_test::golden;
using model_test::message_of;

namespace {

ModelConfig parse(const std::string& text) {
  return parse_hf_config(parse_json(text, "test"), "config.json");
}

// Compares through the written form: it holds every field that is not derived from others.
void require_equal(const ModelConfig& a, const ModelConfig& b) {
  REQUIRE(to_hf_json(a) == to_hf_json(b));
  REQUIRE(a.layer_window == b.layer_window);
  REQUIRE(a.layer_uses_rope == b.layer_uses_rope);
  REQUIRE(a.attention_scale == Approx(b.attention_scale).epsilon(1e-14));
  REQUIRE(a.embedding_scale == b.embedding_scale);
  REQUIRE(a.num_labels == b.num_labels);
  REQUIRE(a.eos == b.eos);
}

const std::string kLlama =
    R"("model_type":"llama","vocab_size":10,"hidden_size":8,"intermediate_size":16,"num_hidden_layers":1,"num_attention_heads":2)";

}  // namespace

TEST_CASE("every golden checkpoint holds just the expected tensors") {
  const auto folders = model_test::golden_folders("model_");
  REQUIRE(folders.size() == 15);
  for (const auto& folder : folders) {
    INFO(folder);
    const ModelConfig config = load_model_config(folder);
    const auto weights = WeightFile::open(folder);
    std::map<std::string, std::vector<std::int64_t>> expected, stored;
    for (const auto& spec : expected_tensors(config)) expected[spec.name] = spec.shape;
    for (const auto& info : weights->tensors()) stored[info.name] = info.shape;
    REQUIRE(expected == stored);
  }
}

TEST_CASE("old and new spelling of config.json give the same model, and so does the written form") {
  for (const auto& folder : model_test::golden_folders("model_")) {
    INFO(folder);
    const ModelConfig config = load_model_config(folder);
    require_equal(config, parse(to_hf_json(config)));
    const auto legacy = folder / "config_legacy.json";
    if (std::filesystem::exists(legacy))
      require_equal(config, parse_hf_config(read_json_file(legacy), "legacy"));
  }
}

TEST_CASE("architecture features are read") {
  const ModelConfig gemma = load_model_config(golden("model_gemma2"));
  REQUIRE(gemma.layer_window == std::vector<std::int64_t>{8, 0});
  REQUIRE(gemma.attention_softcap == 50);
  REQUIRE(gemma.final_softcap == 30);
  REQUIRE(gemma.embedding_scale == std::sqrt(32.0));
  REQUIRE(gemma.attention_scale == Approx(1 / std::sqrt(8.0)));
  REQUIRE((gemma.norm_plus_one && gemma.post_norms && gemma.activation == Activation::kGeluTanh));
  const ModelConfig smollm3 = load_model_config(golden("model_smollm3"));
  REQUIRE(smollm3.layer_uses_rope == std::vector<std::uint8_t>{1, 1, 1, 0});
  REQUIRE(smollm3.rope.theta == 5e6);
  const ModelConfig llama3 = load_model_config(golden("model_llama_rope_llama3"));
  REQUIRE((llama3.rope.scaling == RopeScaling::kLlama3 && llama3.rope.factor == 4 &&
           llama3.rope.original_max_positions == 32));
  const ModelConfig linear = load_model_config(golden("model_llama_rope_linear"));
  REQUIRE((linear.rope.scaling == RopeScaling::kLinear && linear.rope.factor == 2.5));
  const ModelConfig reward = load_model_config(golden("model_qwen2_reward"));
  REQUIRE((reward.scalar_head && reward.num_labels == 1 && reward.attention_qkv_bias &&
           !reward.attention_out_bias));
  const ModelConfig gpt2 = load_model_config(golden("model_gpt2"));
  REQUIRE((gpt2.learned_positions && !gpt2.gated_mlp && gpt2.intermediate_size == 128 &&
           gpt2.max_positions == 128));
  REQUIRE(load_model_config(golden("model_qwen3")).qk_norm);
}

TEST_CASE("windows follow the rules of each configuration class") {
  const auto qwen = [](const std::string& extra) {
    return parse(
               R"({"model_type":"qwen2","vocab_size":10,"hidden_size":8,"intermediate_size":16,"num_hidden_layers":3,)"
               R"("num_attention_heads":2,"num_key_value_heads":2,"sliding_window":5)" +
               extra + "}")
        .layer_window;
  };
  using Windows = std::vector<std::int64_t>;
  REQUIRE(qwen("") == Windows{0, 0, 0});
  REQUIRE(qwen(R"(,"use_sliding_window":true,"max_window_layers":1)") == Windows{0, 5, 5});
  REQUIRE(
      qwen(
          R"(,"use_sliding_window":true,"layer_types":["sliding_attention","full_attention","full_attention"])") ==
      Windows{5, 0, 0});
  REQUIRE(
      parse(
          R"({"model_type":"mistral","vocab_size":10,"hidden_size":8,"intermediate_size":16,"num_hidden_layers":2,)"
          R"("num_attention_heads":2,"num_key_value_heads":1,"sliding_window":7})")
          .layer_window == Windows{7, 7});
}

TEST_CASE("generation_config.json decides what ends a text") {
  const model_test::ScratchFolder folder;
  model_test::write_bytes(folder / "config.json", "{" + kLlama + R"(,"eos_token_id":2})");
  REQUIRE(load_model_config(folder.path()).eos == std::vector<TokenId>{2});
  model_test::write_bytes(folder / "generation_config.json", R"({"eos_token_id":[3,4],"pad_token_id":5})");
  const ModelConfig config = load_model_config(folder.path());
  REQUIRE(config.eos == std::vector<TokenId>{3, 4});
  REQUIRE(config.pad == 5);
}

TEST_CASE("what cannot be loaded is named with key, value and what is supported") {
  const auto error = [](const std::string& text) { return message_of<IoError>([&] { parse(text); }); };
  REQUIRE_THAT(error(R"({"model_type":"mamba"})"),
               ContainsSubstring("config.json: model_type: \"mamba\": expected one of llama, mistral"));
  REQUIRE_THAT(error("[]"), ContainsSubstring("expected a JSON object"));
  REQUIRE_THAT(error(R"({"model_type":"llama","vocab_size":10})"), ContainsSubstring("hidden_size: missing"));
  REQUIRE_THAT(error("{" + kLlama + R"(,"rope_scaling":{"rope_type":"yarn","factor":4}})"),
               ContainsSubstring("rope_scaling.rope_type: \"yarn\": expected default, linear or llama3"));
  REQUIRE_THAT(error("{" + kLlama + R"(,"hidden_act":"relu"})"), ContainsSubstring("hidden_act: \"relu\""));
  REQUIRE_THAT(error("{" + kLlama + R"(,"max_position_embeddings":1e30})"),
               ContainsSubstring("max_position_embeddings"));
  REQUIRE_THAT(error("{" + kLlama + R"(,"num_key_value_heads":3})"),
               ContainsSubstring("expected a divisor of the 2"));
  REQUIRE_THAT(error("{" + kLlama + R"(,"architectures":["LlamaForTokenClassification"]})"),
               ContainsSubstring("LlamaForCausalLM or LlamaForSequenceClassification"));
  REQUIRE_THAT(error("{" + kLlama + R"(,"quantization_config":{}})"),
               ContainsSubstring("plain float weights"));
  REQUIRE_THAT(error("{" + kLlama + R"(,"eos_token_id":99})"), ContainsSubstring("below vocab_size 10"));
  REQUIRE_THAT(error("{" + kLlama + R"(,"head_dim":3})"), ContainsSubstring("even"));
  REQUIRE_THAT(error(R"({"model_type":"llama","vocab_size":99999999999})"),
               ContainsSubstring("vocab_size: 99999999999"));
  REQUIRE_THAT(error(R"({"model_type":"llama","model_type":"gpt2"})"), ContainsSubstring("occurs twice"));
  REQUIRE_THAT(message_of<IoError>([] { load_model_config("/no/such/folder"); }),
               ContainsSubstring("no such file"));
}

TEST_CASE("hostile JSON ends in an error") {
  const auto error = [](const std::string& text) {
    return message_of<IoError>([&] { parse_json(text, "x.json"); });
  };
  REQUIRE_THAT(error(std::string(100000, '[')), ContainsSubstring("nested deeper"));
  REQUIRE_THAT(error("{\"a\":"), ContainsSubstring("x.json: offset"));
  REQUIRE_THAT(error("\"\xff\""), ContainsSubstring("offset"));
  REQUIRE_THAT(error("{} trailing"), ContainsSubstring("offset"));
  REQUIRE(error("{\"a\":[{\"b\":1},{\"b\":2}],\"b\":3}").empty());
}
