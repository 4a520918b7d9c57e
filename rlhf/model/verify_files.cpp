#include "rlhf/model/verify_files.h"

#include <functional>
#include <set>

#include "rlhf/core/error.h"
#include "rlhf/model/chat_template.h"
#include "rlhf/model/gguf.h"
#include "rlhf/model/json_file.h"
#include "rlhf/model/tokenizer.h"

namespace rlhf {
namespace {

using nlohmann::json;

constexpr std::size_t kMaxMessages = 20;

/// Collects the outcome of the cases of one file; a case fails at most once.
class CaseLog {
 public:
  explicit CaseLog(const std::filesystem::path& file) { result_.file = file.string(); }

  void run(std::size_t index, const std::function<std::string()>& problem_of) {
    ++result_.cases;
    std::string problem;
    try {
      problem = problem_of();
    } catch (const std::exception& error) {
      problem = concat("error: ", error.what());
    }
    if (!problem.empty()) note(concat("case ", index, ": ", problem));
  }
  void note(std::string message) {
    ++result_.failures;
    if (result_.messages.size() < kMaxMessages) result_.messages.push_back(std::move(message));
  }
  VerifyResult take() { return std::move(result_); }

 private:
  VerifyResult result_;
};

template <typename Json>
std::string unknown_key(const Json& object, const std::set<std::string>& known) {
  for (const auto& [key, value] : object.items()) {
    if (!known.contains(key)) return concat("unknown key ", key);
  }
  return "";
}

template <typename Json>
std::string differing_ids(const std::vector<TokenId>& ids, const Json& expected, const char* what) {
  const auto wanted = expected.template get<std::vector<TokenId>>();
  if (ids == wanted) return "";
  std::size_t place = 0;
  while (place < ids.size() && place < wanted.size() && ids[place] == wanted[place]) ++place;
  return concat(what, " differ from place ", place, ": got ", ids.size(), " ids, expected ", wanted.size());
}

template <typename Json>
std::string differing_text(const std::string& text, const Json& expected, const char* what) {
  if (text == expected.template get<std::string>()) return "";
  return concat(what, ": got ", json(text).dump(-1, ' ', true), ", expected ", expected.dump(-1, ' ', true));
}

std::string streamed(const Tokenizer& tokenizer, const std::vector<TokenId>& ids) {
  StreamDecoder decoder(tokenizer);
  std::string text;
  for (const TokenId id : ids) text += decoder.push(id);
  return text + decoder.finish();
}

std::string check_tokenizer_case(const Tokenizer& tokenizer, const json& one) {
  static const std::set<std::string> kKnown{"text",
                                            "ids",
                                            "decoded",
                                            "decoded_skip_special",
                                            "ids_with_special",
                                            "decoded_prefix",
                                            "ids_transformers_gguf_loader",
                                            "name",
                                            "doc"};
  std::string problem = unknown_key(one, kKnown);
  const auto check = [&](const std::string& found) {
    if (problem.empty()) problem = found;
  };
  const auto text = one.at("text").get<std::string>();
  const auto ids = tokenizer.encode(text);
  check(differing_ids(ids, one.at("ids"), "ids"));
  if (one.contains("ids_with_special")) {
    check(differing_ids(tokenizer.encode(text, {true}), one["ids_with_special"], "ids_with_special"));
  }
  const auto wanted = one.at("ids").get<std::vector<TokenId>>();
  check(differing_text(tokenizer.decode(wanted), one.at("decoded"), "decoded"));
  check(differing_text(streamed(tokenizer, wanted), one.at("decoded"), "streamed"));
  if (one.contains("decoded_skip_special")) {
    check(differing_text(tokenizer.decode(wanted, {true}), one["decoded_skip_special"],
                         "decoded_skip_special"));
  }
  if (one.contains("decoded_prefix")) {
    const auto count = one["decoded_prefix"].at("count").get<std::size_t>();
    const std::vector<TokenId> prefix(
        wanted.begin(), wanted.begin() + static_cast<std::ptrdiff_t>(std::min(count, wanted.size())));
    check(differing_text(tokenizer.decode(prefix), one["decoded_prefix"].at("text"), "decoded_prefix"));
    check(differing_text(streamed(tokenizer, prefix), one["decoded_prefix"].at("text"), "streamed prefix"));
  }
  return problem;
}

// The tokenizer that a golden file speaks of: tokenizer.json beside it, else the SmolLM2 GGUF.
std::optional<Tokenizer> tokenizer_for(const std::filesystem::path& file, const VerifyAssets& assets) {
  const auto beside = file.parent_path() / "tokenizer.json";
  if (std::filesystem::exists(beside)) return Tokenizer::load(beside);
  if (assets.smollm2_gguf) return Tokenizer::load(*assets.smollm2_gguf);
  return std::nullopt;
}

template <typename Json>
const Json& cases_of(const Json& golden, const std::filesystem::path& file, std::string_view family) {
  if (!golden.is_object() || golden.value("format", "") != "golden-1")
    fail<IoError>(file.string(), ": format: expected golden-1");
  if (golden.value("family", "") != family) fail<IoError>(file.string(), ": family: expected ", family);
  if (!golden.contains("cases") || !golden["cases"].is_array())
    fail<IoError>(file.string(), ": cases: expected a list");
  return golden["cases"];
}

// Messages and tools keep the order of their keys.
using nlohmann::ordered_json;

RenderOptions render_options(const ordered_json& one) {
  RenderOptions options;
  options.add_generation_prompt = one.value("add_generation_prompt", false);
  if (one.contains("tools")) options.tools = one["tools"];
  if (one.contains("documents")) options.documents = one["documents"];
  if (one.contains("variables")) options.variables = one["variables"];
  return options;
}

std::string check_template_case(const ChatTemplate& chat_template, const ordered_json& one) {
  static const std::set<std::string> kKnown{"messages",  "tools",    "documents", "add_generation_prompt",
                                            "variables", "rendered", "error",     "name",
                                            "doc"};
  if (std::string problem = unknown_key(one, kKnown); !problem.empty()) return problem;
  try {
    const std::string text = chat_template.render(one.at("messages"), render_options(one));
    if (one.contains("error")) return concat("expected an error, got ", json(text).dump(-1, ' ', true));
    return differing_text(text, one.at("rendered"), "rendered");
  } catch (const ChatTemplateError& error) {
    if (!one.contains("error")) throw;
    // Python's own errors have other words; what a template raises itself must come through as it is.
    const auto& expected = one["error"];
    const bool raised = expected.is_object() && expected.value("type", "") == "TemplateError";
    return raised ? differing_text(error.message(), expected.at("message"), "error message") : "";
  }
}

std::string check_chat_case(const Tokenizer& tokenizer, const ChatTemplate& chat_template,
                            const ordered_json& one) {
  static const std::set<std::string> kKnown{
      "messages",  "tools",    "documents", "add_generation_prompt",
      "variables", "rendered", "ids",       "ids_sanitized_transformers_gguf_loader",
      "name",      "doc"};
  if (std::string problem = unknown_key(one, kKnown); !problem.empty()) return problem;
  const EncodedChat chat = encode_chat(tokenizer, chat_template, one.at("messages"), render_options(one));
  if (std::string problem = differing_text(chat.text, one.at("rendered"), "rendered"); !problem.empty())
    return problem;
  if (std::string problem = differing_ids(chat.ids, one.at("ids"), "ids"); !problem.empty()) return problem;
  if (!one.contains("ids_sanitized_transformers_gguf_loader")) return "";
  const EncodedChat literal =
      encode_chat(tokenizer, chat_template, one.at("messages"), render_options(one), ContentTokens::kLiteral);
  if (literal.text != chat.text) return "literal contents changed the rendered text";
  return differing_ids(literal.ids, one["ids_sanitized_transformers_gguf_loader"], "sanitized ids");
}

std::string check_row(const GgufFile& file, const std::string& name, const json& row) {
  const GgufTensor* tensor = file.find_tensor(name);
  if (!tensor) return concat("no tensor ", name);
  if (tensor_type_name(tensor->type) != row.at("ggml_type").get<std::string>())
    return concat(name, ": another type");
  const auto expected = row.at("values").get<std::vector<float>>();
  const auto rows = static_cast<std::size_t>(tensor->shape.front()), index = row.at("row").get<std::size_t>();
  if (index >= rows || expected.size() != static_cast<std::size_t>(tensor->shape.back()))
    return concat(name, ": another shape");
  std::vector<float> values(expected.size());
  dequantise(tensor->type, tensor->data.data() + index * (tensor->data.size() / rows), values.size(),
             values.data());
  return values == expected ? "" : concat(name, ": row ", index, " differs");
}

constexpr const char* kNoTokenizer = "no tokenizer.json beside the file and no SmolLM2 GGUF given";

}  // namespace

VerifyResult verify_tokenizer(const std::filesystem::path& file, const VerifyAssets& assets) {
  const json golden = read_json_file(file);
  const json& cases = cases_of(golden, file, "tokenizer");
  const auto tokenizer = tokenizer_for(file, assets);
  CaseLog log(file);
  for (std::size_t i = 0; i < cases.size(); ++i) {
    log.run(i, [&]() -> std::string {
      return tokenizer ? check_tokenizer_case(*tokenizer, cases[i]) : kNoTokenizer;
    });
  }
  return log.take();
}

VerifyResult verify_chat_template(const std::filesystem::path& file) {
  const ordered_json golden = parse_ordered_json(read_text_file(file), file.string());
  const ordered_json& cases = cases_of(golden, file, "chat_template");
  auto source = file;
  source.replace_extension(".jinja");
  const ChatTemplate chat_template(read_text_file(source), source.string());
  CaseLog log(file);
  for (std::size_t i = 0; i < cases.size(); ++i) {
    log.run(i, [&] { return check_template_case(chat_template, cases[i]); });
  }
  return log.take();
}

VerifyResult verify_chat(const std::filesystem::path& file, const VerifyAssets& assets) {
  const ordered_json golden = parse_ordered_json(read_text_file(file), file.string());
  const ordered_json& cases = cases_of(golden, file, "chat");
  const auto tokenizer = tokenizer_for(file, assets);
  CaseLog log(file);
  for (std::size_t i = 0; i < cases.size(); ++i) {
    log.run(i, [&]() -> std::string {
      return tokenizer ? check_chat_case(*tokenizer, ChatTemplate::of(*tokenizer), cases[i]) : kNoTokenizer;
    });
  }
  if (tokenizer && golden.contains("chat_template") &&
      golden["chat_template"] != ChatTemplate::of(*tokenizer).source()) {
    log.note("the tokenizer brings another chat template than the file");
  }
  return log.take();
}

VerifyResult verify_gguf_rows(const std::filesystem::path& file) {
  const json golden = read_json_file(file);
  if (!golden.is_object() || golden.value("family", "") != "gguf" || !golden.contains("files")) {
    fail<IoError>(file.string(), ": family: expected gguf with files");
  }
  CaseLog log(file);
  std::size_t index = 0;
  for (const auto& [name, content] : golden["files"].items()) {
    const auto gguf = GgufFile::open(file.parent_path() / name);
    for (const auto& [tensor, row] : content.at("dequantised").items()) {
      log.run(index++, [&, &tensor = tensor, &row = row] { return check_row(*gguf, tensor, row); });
    }
  }
  return log.take();
}

}  // namespace rlhf
