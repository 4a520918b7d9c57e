// The verbs that read a model, against the numbers of the reference framework.
#include "rlhf/train/language_model.h"
#include "tests/cli/program.h"

using namespace rlhf;
using nlohmann::json;

namespace {

const std::string kGolden = RLHF_SOURCE_DIR "/tests/golden/";

json expected_of(const std::string& model) {
  return json::parse(read_text_file(kGolden + model + "/expected.json"));
}

// input_ids of each sequence as JSONL.
std::string as_lines(const json& sequences) {
  std::string text;
  for (const json& ids : sequences) text += json({{"input_ids", ids}}).dump() + "\n";
  return text;
}

std::string byte_model(const Program& program, const std::string& name = "bytes") {
  NewModelOptions options;
  options.hidden_size = 16;
  options.heads = 2;
  options.kv_heads = 1;
  options.intermediate_size = 24;
  options.max_positions = 128;
  options.initial_std = 0.2;
  LanguageModel::create(options, {}, 7).save(program.path(name));
  return program.path(name);
}

}  // namespace

TEST_CASE("generate continues prompts greedily as the reference does") {
  const Program program;
  for (const std::string model :
       {"model_llama_gqa_untied", "model_gpt2", "model_gemma2", "model_qwen3", "model_mistral"}) {
    const json greedy = expected_of(model)["greedy"];
    std::string prompts;
    for (const json& entry : greedy) prompts += json({{"input_ids", entry["prompt"]}}).dump() + "\n";
    const std::size_t length = greedy[0]["tokens"].size();
    const Result result =
        program.run({"generate", "--model", kGolden + model, "--input", "-", "--temperature", "0",
                     "--ignore-eos", "--max-new-tokens", std::to_string(length), "--threads", "1"},
                    prompts);
    INFO(model << ": " << result.err);
    REQUIRE(result.code == 0);
    const auto lines = result.lines();
    REQUIRE(lines.size() == greedy.size());
    for (std::size_t i = 0; i < lines.size(); ++i) {
      CHECK(lines[i]["output_ids"] == json::array({greedy[i]["tokens"]}));
      CHECK(lines[i]["finish_reason"] == json::array({"length"}));
      CHECK(lines[i]["text"] == json::array({""}));  // these models have no tokenizer
      REQUIRE(lines[i]["logprobs"].size() == 1);
      CHECK(lines[i]["logprobs"][0].size() == length);
      CHECK(lines[i].size() == 4);
    }
  }
}

TEST_CASE("generate draws n samples that depend on the seed, not on the batch or the output") {
  const Program program;
  const std::string model = byte_model(program);
  program.write("prompts.jsonl",
                "{\"prompt\": \"ab\"}\n{\"messages\": [{\"role\": \"user\", \"content\": "
                "\"hi\"}]}\n{\"input_ids\": [97, 98]}\n");
  const std::vector<std::string> base = {"generate", "--model",   model,    "--input", "prompts.jsonl",
                                         "--n",      "3",         "--seed", "5",       "--max-new-tokens",
                                         "12",       "--threads", "1"};
  const auto with = [&](std::vector<std::string> more) {
    more.insert(more.begin(), base.begin(), base.end());
    return program.run(more);
  };
  const Result first = with({});
  INFO(first.err);
  REQUIRE(first.code == 0);
  const auto lines = first.lines();
  REQUIRE(lines.size() == 3);
  const Tokenizer tokenizer = Tokenizer::load(model);
  for (const json& line : lines)
    for (std::size_t i = 0; i < 3; ++i) {
      const auto ids = line["output_ids"].at(i).get<std::vector<TokenId>>();
      CHECK(line["text"].at(i) == json::parse(json(tokenizer.decode(ids, {.skip_special = true}))
                                                  .dump(-1, ' ', false, json::error_handler_t::replace)));
      CHECK(line["logprobs"].at(i).size() == ids.size());
    }
  CHECK(lines[0]["output_ids"][0] != lines[0]["output_ids"][1]);
  CHECK(with({"--max-sequences", "1"}).out == first.out);
  const Result to_file = with({"--output", "out.jsonl"});
  CHECK(to_file.out.empty());
  CHECK(read_text_file(program.path("out.jsonl")) == first.out);
  CHECK(program
            .run({"generate", "--model", model, "--input", "prompts.jsonl", "--n", "3", "--seed", "6",
                  "--max-new-tokens", "12"})
            .out != first.out);
  // A stop string ends the text.
  const std::string text = lines[0]["text"][0];
  const Result stopped =
      program.run({"generate", "--model", model, "--input", "prompts.jsonl", "--temperature", "0", "--stop",
                   "never there", "--max-new-tokens", "3"});
  CHECK(stopped.lines()[0]["finish_reason"][0] == "length");
  CHECK_THAT(program
                 .run({"generate", "--model", model, "--input", "-", "--max-new-tokens", "3"},
                      "{\"prompt\": \"\"}\n")
                 .err,
             ContainsSubstring("-:1: the prompt is empty"));
  const std::string long_prompt(200, 'x');
  CHECK_THAT(
      program.run({"generate", "--model", model, "--input", "-"}, "{\"prompt\": \"" + long_prompt + "\"}\n")
          .err,
      ContainsSubstring("-:1: ") &&
          ContainsSubstring("the prompt has 200 tokens, which leaves no room in the model's context of 128"));
  const Result rounded = program.run(
      {"generate", "--model", model, "--input", "prompts.jsonl", "--device", "cpu", "--kv-dtype", "fp8"});
  CHECK(rounded.code != 0);
  CHECK_THAT(rounded.err, ContainsSubstring("--kv-dtype fp8 is for a GPU"));
}

TEST_CASE("generate lets an environment answer turns") {
  const Program program;
  const std::string model = byte_model(program);
  std::vector<std::string> command = {"generate",
                                      "--model",
                                      model,
                                      "--input",
                                      "-",
                                      "--threads",
                                      "1",
                                      "--max-new-tokens",
                                      "100",
                                      "--environment",
                                      program.path("user.yaml")};
  for (int token = 0; token < 256; token += 5)  // turns are short
    for (const std::string& word : {std::string("--stop-token-id"), std::to_string(token)})
      command.push_back(word);
  write_file_atomically(program.path("user.yaml"), "scripted_user: true\nmax_turns: 5\n");
  const Result result = program.run(
      command, "{\"prompt\": \"abc\", \"user_turns\": [\"first\", \"second\"]}\n{\"prompt\": \"abd\"}\n");
  INFO(result.err);
  REQUIRE(result.code == 0);
  const auto lines = result.lines();
  REQUIRE(lines.size() == 2);
  REQUIRE(lines[0]["turns"][0].size() == 3);
  CHECK(lines[0]["finish_reason"] == json::array({"stop"}));
  const auto episode = lines[0]["episode"][0].get<std::string>();
  for (const char* said : {"<|im_start|>user\nfirst<|im_end|>\n<|im_start|>assistant\n",
                           "<|im_start|>user\nsecond<|im_end|>\n<|im_start|>assistant\n"})
    CHECK_THAT(episode, ContainsSubstring(said));
  CHECK(episode.ends_with(lines[0]["text"][0].get<std::string>()));
  std::size_t masked = 0, silent = 0;
  for (std::size_t t = 0; t < lines[0]["mask"][0].size(); ++t) {
    masked += lines[0]["mask"][0][t] == 0;
    silent += lines[0]["logprobs"][0][t] == 0;
  }
  // Of each turn: the end of the policy's, header and end of the user's, the policy's header; 5 and 6
  // letters.
  CHECK(masked == 2 * 21 + 5 + 6);
  CHECK(silent >= masked);
  CHECK(lines[1]["turns"][0].size() == 1);  // nobody answers: one turn
  CHECK(program.run(command, "{\"prompt\": \"a\", \"user_turns\": \"b\"}\n").code == 1);
  write_file_atomically(program.path("user.yaml"), "scripted_usr: true\n");
  const Result bad = program.run(command, "{\"prompt\": \"a\"}\n");
  CHECK(bad.code == 2);
  CHECK_THAT(bad.err,
             ContainsSubstring("user.yaml:1:1: scripted_usr: unknown key; nearest key is scripted_user"));
}

TEST_CASE("generate takes options from each line, and names line, key and what was expected") {
  const Program program;
  const std::string model = byte_model(program);
  const auto generate = [&](const std::string& input, std::vector<std::string> more = {}) {
    more.insert(more.begin(), {"generate", "--model", model, "--input", "-", "--threads", "1"});
    return program.run(more, input);
  };
  const Result result = generate(
      "{\"prompt\": \"ab\", \"choices\": [\"yes\", \"no\"], \"n\": 3, \"id\": \"caller's own\"}\n"
      "{\"prompt\": \"ab\", \"max_new_tokens\": 4, \"temperature\": 0, \"top_logprobs\": 2, "
      "\"raw_logprobs\": true, \"ignore_eos\": true}\n"
      "{\"prompt\": \"ab\", \"logit_bias\": {\"120\": 200}, \"stop\": \"xxx\"}\n"
      "{\"prompt\": \"ab\", \"allowed_token_ids\": [65, 66], \"stop_token_ids\": [66], \"seed\": 4, "
      "\"priority\": 2, \"deadline_steps\": 9, \"entropies\": true}\n");
  INFO(result.err);
  REQUIRE(result.code == 0);
  const auto lines = result.lines();
  REQUIRE(lines.size() == 4);
  for (const json& text : lines[0]["text"]) CHECK((text == "yes" || text == "no"));
  CHECK(lines[0]["text"].size() == 3);
  CHECK(lines[0].size() == 4);
  CHECK(lines[1]["output_ids"][0].size() == 4);
  CHECK(lines[1]["raw_logprobs"] == lines[1]["logprobs"]);
  CHECK(lines[1]["top_logprobs"][0][0][0][0] == lines[1]["output_ids"][0][0]);  // greedy
  CHECK(lines[2]["text"][0] == "xxx");
  CHECK(lines[2]["finish_reason"][0] == "stop_string");
  CHECK(lines[3]["entropies"][0].size() == lines[3]["output_ids"][0].size());
  CHECK(lines[3]["output_ids"][0].size() <= 9);

  // A cache of a few blocks gives what a large one gives.
  const std::string long_lines =
      "{\"prompt\": \"one\", \"n\": 4}\n{\"prompt\": \"two\", \"n\": 4}\n{\"prompt\": \"three\", \"n\": 4}\n";
  const std::vector<std::string> fixed = {"--max-new-tokens", "60", "--ignore-eos"};
  auto tight = fixed;
  tight.insert(tight.end(), {"--cache-blocks", "7"});
  CHECK(generate(long_lines, tight).out == generate(long_lines, fixed).out);

  struct Case {
    std::string fields, message;
  };
  for (const Case& c :
       {Case{"\"temperature_\": 1", "-:1: temperature_: unknown key; nearest key is temperature"},
        Case{"\"temperature\": \"hot\"", "-:1: temperature: got \"hot\", expected a number of at least 0"},
        Case{"\"top_p\": 1.5", "-:1: top_p: got 1.5, expected a number from 0 to 1"},
        Case{"\"n\": 0", "-:1: n: got 0, expected an integer from 1 to 100000"},
        Case{"\"max_new_tokens\": 2.5", "-:1: max_new_tokens: got 2.5, expected an integer from 1 to"},
        Case{"\"ignore_eos\": 1", "-:1: ignore_eos: got 1, expected true or false"},
        Case{"\"stop\": [1]", "-:1: stop: got [1], expected a string or an array of strings"},
        Case{"\"stop_token_ids\": [-1]", "-:1: stop_token_ids: got [-1], expected an array of token ids"},
        Case{"\"logit_bias\": {\"a\": 1}", "-:1: logit_bias: got {\"a\":1}, expected an object of token ids"},
        Case{"\"choices\": []",
             "-:1: choices: got [], expected an array of strings or of arrays of token ids"},
        Case{"\"choices\": [\"a\", \"a\"]", "choice 2 equals choice 1"},
        Case{"\"allowed_token_ids\": [999]", "allowed token 999 is outside the vocabulary of 259"},
        Case{"\"repetition_penalty\": 0", "-:1: repetition_penalty: got 0, expected a number above 0"}}) {
    const Result bad = generate("{\"prompt\": \"a\", " + c.fields + "}\n");
    INFO(c.fields);
    CHECK(bad.code == 1);
    CHECK_THAT(bad.err, ContainsSubstring(c.message) && ContainsSubstring("-:1: "));
  }
}

TEST_CASE("score gives the reference's log-probs, and entropies beside them") {
  const Program program;
  for (const std::string model : {"model_llama_gqa_untied", "model_gpt2", "model_qwen2"})
    for (const auto& [temperature, key] : {std::pair<std::string, std::string>{"1", "logprobs_temperature_1"},
                                           {"0.7", "logprobs_temperature_0.7"}}) {
      const json expected = expected_of(model);
      const Result result =
          program.run({"score", "--model", kGolden + model, "--input", "-", "--temperature", temperature,
                       "--entropy", "--max-tokens-per-pass", "30", "--threads", "1"},
                      as_lines(expected["sequences"]));
      INFO(model << " at " << temperature << ": " << result.err);
      REQUIRE(result.code == 0);
      const auto lines = result.lines();
      REQUIRE(lines.size() == expected["sequences"].size());
      for (std::size_t i = 0; i < lines.size(); ++i) {
        const json& logprobs = lines[i]["logprobs"];
        REQUIRE(logprobs.size() == expected["sequences"][i].size());
        REQUIRE(lines[i]["entropy"].size() == logprobs.size());
        CHECK(logprobs[0].is_null());
        CHECK(lines[i]["entropy"][0].is_null());
        for (std::size_t t = 1; t < logprobs.size(); ++t) {
          // Two float32 forward passes; the reference differs from its float64 run by up to 1e-5.
          CHECK(logprobs[t].get<double>() == Approx(expected[key][i][t - 1].get<double>()).margin(5e-5));
          CHECK(lines[i]["entropy"][t] > 0);
        }
      }
    }
}

TEST_CASE("score gives the reference's scores of a reward model") {
  const Program program;
  for (const std::string model : {"model_llama_reward", "model_qwen2_reward"}) {
    const json expected = expected_of(model);
    const Result result =
        program.run({"score", "--model", kGolden + model, "--input", "-"}, as_lines(expected["sequences"]));
    INFO(result.err);
    REQUIRE(result.code == 0);
    const auto lines = result.lines();
    REQUIRE(lines.size() == expected["scores"].size());
    for (std::size_t i = 0; i < lines.size(); ++i) {
      CHECK(lines[i].size() == 1);
      CHECK(lines[i]["score"].get<double>() == Approx(expected["scores"][i].get<double>()).margin(5e-5));
    }
  }
}

TEST_CASE("tokenize shows ids, the rendered text and what the ids decode to") {
  const Program program;
  const std::string model = byte_model(program);
  const std::string input =
      "{\"text\": \"ab\\u00e9\"}\n"
      "{\"messages\": [{\"role\": \"user\", \"content\": \"hi\"}]}\n"
      "\n"
      "{\"input_ids\": [104, 105, 258]}\n";
  const Result result = program.run({"tokenize", "--model", model, "--input", "-"}, input);
  INFO(result.err);
  REQUIRE(result.code == 0);
  const auto lines = result.lines();
  REQUIRE(lines.size() == 3);
  CHECK(lines[0] ==
        json({{"input_ids", {97, 98, 0xc3, 0xa9}}, {"text", "ab\xc3\xa9"}, {"decoded", "ab\xc3\xa9"}}));
  const std::string chat = "<|im_start|>user\nhi<|im_end|>\n";
  CHECK(lines[1]["text"] == chat + "<|im_start|>assistant\n");
  CHECK(lines[1]["decoded"] == lines[1]["text"]);
  CHECK(lines[1]["input_ids"].size() == 1 + 5 + 2 + 1 + 1 + 1 + 10);
  CHECK(lines[1]["input_ids"][0] == 257);
  CHECK(lines[2] == json({{"input_ids", {104, 105, 258}}, {"decoded", "hi<|im_end|>"}}));
  const auto closed = program.run({"tokenize", "--model", model, "--input", "-", "--closed"}, input).lines();
  CHECK(closed[1]["text"] == chat);
  CHECK_THAT(program.run({"tokenize", "--model", model, "--input", "-"}, "{\"input_ids\": [259]}\n").err,
             ContainsSubstring("-:1: token id 259 is outside the tokenizer's vocabulary of 259"));
  CHECK(program.run({"tokenize", "--model", model, "--input", "-", "--output", "out.jsonl"}, input)
            .out.empty());
  CHECK(read_text_file(program.path("out.jsonl")) == result.out);
}

TEST_CASE("inspect describes a model") {
  const Program program;
  const Result result = program.run({"inspect", kGolden + "model_llama_gqa_untied", "--json", "--tensors"});
  INFO(result.err);
  REQUIRE(result.code == 0);
  const json out = json::parse(result.out);
  CHECK(out["architecture"] == "llama");
  CHECK(out["heads"] == 4);
  CHECK(out["kv_heads"] == 2);
  CHECK(out["vocab_size"] == 96);
  CHECK(out["scalar_head"] == false);
  CHECK(out["tied_embeddings"] == false);
  CHECK(out["tensors"].size() == 21);
  CHECK_FALSE(out.contains("missing_tensors"));
  std::int64_t parameters = 0;
  for (const json& tensor : out["tensors"]) {
    std::int64_t count = 1;
    for (const json& size : tensor["shape"]) count *= size.get<std::int64_t>();
    parameters += count;
  }
  CHECK(out["parameters"] == parameters);
  CHECK(out["memory_bytes"]["fp32"] == 4 * parameters);
  const Result text = program.run({"inspect", byte_model(program)});
  CHECK(text.code == 0);
  CHECK_THAT(text.out, ContainsSubstring("architecture: llama\n") && ContainsSubstring("\"ids\":259"));
}

TEST_CASE("convert writes a directory that computes the same, and does not overwrite by accident") {
  const Program program;
  for (const std::string model :
       {"model_llama_bf16", "model_llama_sharded", "model_gpt2", "model_llama_reward"}) {
    const std::string source = kGolden + model, target = model + ".copy";
    const std::string sequences = as_lines(expected_of(model)["sequences"]);
    const Result converted = program.run({"convert", source, target});
    INFO(converted.err);
    REQUIRE(converted.code == 0);
    const Result a = program.run({"score", "--model", source, "--input", "-"}, sequences);
    const Result b = program.run({"score", "--model", target, "--input", "-"}, sequences);
    CHECK(a.code == 0);
    CHECK(a.out == b.out);
    CHECK_FALSE(a.out.empty());
    const Result again = program.run({"convert", source, target});
    CHECK(again.code == 1);
    CHECK_THAT(again.err, ContainsSubstring(target + " exists; pass --overwrite to write into it"));
    CHECK(program.run({"convert", source, target, "--overwrite"}).code == 0);
  }
  // A tokenizer that is not supported is named rather than lost.
  const Result other = program.run({"convert", kGolden + "gguf_llama/llama_F32.gguf", "out"});
  CHECK(other.code == 1);
  CHECK_THAT(other.err,
             ContainsSubstring("llama_F32.gguf: metadata tokenizer.ggml.model: llama: expected gpt2"));
  CHECK_FALSE(std::filesystem::exists(program.path("out")));
  // A supported one is kept.
  const std::string bytes = byte_model(program);
  REQUIRE(program.run({"convert", bytes, "copy"}).code == 0);
  const std::string line = "{\"messages\": [{\"role\": \"user\", \"content\": \"hi\"}]}\n";
  CHECK(program.run({"tokenize", "--model", "copy", "--input", "-"}, line).out ==
        program.run({"tokenize", "--model", bytes, "--input", "-"}, line).out);
}

TEST_CASE("eval judges a model on the prompts of a run file") {
  const Program program;
  byte_model(program);
  program.write("eval.jsonl",
                "{\"prompt\": \"a\", \"task\": \"first\"}\n{\"prompt\": \"b\", \"task\": "
                "\"first\"}\n{\"prompt\": \"c\", \"task\": \"second\"}\n");
  program.write("run.yaml",
                "model: {path: bytes}\ndata: {source: files, prompt_text: raw, eval_file: eval.jsonl}\n"
                "rewards: [{type: length, min_tokens: 1, max_tokens: 6, slope_tokens: 4}]\nstages: [eval]\n"
                "rollout: {max_new_tokens: 6}\n");
  const Result result = program.run({"eval", "run.yaml", "--json", "--output", "judged.jsonl"});
  INFO(result.err);
  REQUIRE(result.code == 0);
  const json out = json::parse(result.out);
  CHECK(out["tasks"]["first"]["count"] == 2);
  CHECK(out["tasks"]["second"]["count"] == 1);
  CHECK(out["mean"].is_number());
  std::istringstream judged(read_text_file(program.path("judged.jsonl")));
  int count = 0;
  double sum = 0;
  for (std::string line; std::getline(judged, line); ++count) {
    const json response = json::parse(line);
    CHECK(response.at("output_ids").size() <= 6);
    sum += response["score"].get<double>();
  }
  CHECK(count == 3);
  CHECK(out["mean"].get<double>() == Approx(sum / 3));
  const Result text =
      program.run({"eval", "run.yaml", "--model", "bytes", "--set", "rollout.max_new_tokens=2"});
  CHECK(text.code == 0);
  CHECK_THAT(text.out, ContainsSubstring("first: ") && ContainsSubstring("over 2 cases") &&
                           ContainsSubstring("mean: "));
  const Result none = program.run({"eval", "run.yaml", "--model", "none"});
  CHECK(none.code == 1);
  CHECK_THAT(none.err, ContainsSubstring("none: no such file"));
  // A run file with a new model has nothing to judge by itself.
  program.write("new.yaml",
                "model: {new: {layers: 1}}\ndata: {source: files, eval_file: eval.jsonl}\nstages: [eval]\n");
  const Result fresh = program.run({"eval", "new.yaml"});
  CHECK(fresh.code == 1);
  CHECK_THAT(fresh.err, ContainsSubstring("new.yaml") && ContainsSubstring("--model"));
}

TEST_CASE("verify fails when a vector does not hold") {
  const Program program;
  std::filesystem::create_directories(program.path("vectors"));
  const std::string good = read_text_file(kGolden + "adamw.json");
  program.write("vectors/adamw.json", good);
  const Result holds = program.run({"verify", "--vectors", "vectors"});
  INFO(holds.out);
  CHECK(holds.code == 0);
  CHECK_THAT(holds.out, ContainsSubstring("ok    adamw.json") && ContainsSubstring(" 0 failed"));
  std::string bad = good;
  const auto digit = bad.find("0.9", bad.find("\"cases\""));
  REQUIRE(digit != std::string::npos);
  bad.replace(digit, 3, "0.7");
  program.write("vectors/adamw.json", bad);
  const Result fails = program.run({"verify", "--vectors", "vectors", "--json"});
  CHECK(fails.code == 1);
  CHECK(fails.lines()[0]["failures"] > 0);
}
