// Calls in a turn: what is read, what is answered, and that nothing a model can write does any harm.
#include <rapidcheck.h>

#include <set>
#include <stdexcept>

#include "rlhf/core/error.h"
#include "rollout/environment/calculator.h"
#include "rollout/environment/scripted_user.h"
#include "rollout/environment/tool_environment.h"
#include "tests/catch.h"

using namespace rlhf;
using nlohmann::json;

namespace {

// Does what its argument `do` says.
class MoodyTool : public Tool {
 public:
  explicit MoodyTool(double* now_s = nullptr) : now_s_(now_s) {
    schema_.name = "moody";
    schema_.parameters = nlohmann::ordered_json::parse(
        R"({"type": "object", "properties": {"do": {"type": "string"}, "n": {"type": "integer"},
            "list": {"type": ["array", "null"]}}, "required": ["do"]})");
  }
  const ToolSchema& schema() const override { return schema_; }
  ToolResult call(const json& arguments, const CallLimit&) const override {
    const auto what = arguments.at("do").get<std::string>();
    if (what == "throw") throw std::runtime_error("in a bad mood");
    if (what == "throw int") throw 7;
    if (what == "dawdle") *now_s_ += 10;
    if (what == "ramble")
      return ToolResult::ok(std::string(100, 'x') + "\xC3\xA4\xFF" + std::string(100, 'y'));
    return ToolResult::ok("done");
  }

 private:
  ToolSchema schema_;
  double* now_s_;
};

std::shared_ptr<const ToolEnvironmentFactory> make_factory(double* now_s = nullptr, ToolLimits limits = {}) {
  return std::make_shared<ToolEnvironmentFactory>(
      std::vector<std::shared_ptr<const Tool>>{std::make_shared<CalculatorTool>(),
                                               std::make_shared<MoodyTool>(now_s)},
      limits);
}

Observation observe(const ToolEnvironmentFactory& factory, std::string_view text, CallLimit limit = {}) {
  const Prompt prompt;
  return factory.begin({prompt})->observe({.text = text, .tokens = {}, .limit = std::move(limit)});
}

std::string call_of(const std::string& text) {
  return "<tool_call>" + text + "</tool_call>";
}

// The one answer to one call, which must be an error object.
std::string error_of(const std::string& call, CallLimit limit = {}, double* now_s = nullptr) {
  const auto factory = make_factory(now_s);
  const Observation said = observe(*factory, call, std::move(limit));
  INFO(call);
  REQUIRE(said.messages.size() == 1);
  CHECK(said.messages[0].role == "tool");
  CHECK(said.tool_calls == 1);
  CHECK(said.tool_errors == 1);
  CHECK_FALSE(said.over);
  return json::parse(said.messages[0].content).at("error").get<std::string>();
}

}  // namespace

TEST_CASE("calls are answered in order, and a turn without call ends the episode") {
  const auto factory = make_factory();
  const Observation two =
      observe(*factory,
              "Let me see.\n<tool_call>\n{\"name\": \"calculator\", \"arguments\": {\"expression\": "
              "\"1/8\"}}\n</tool_call>\nand " +
                  call_of(R"({"name": "calculator", "arguments": "{\"expression\": \"2*3\"}"})"));
  CHECK(two.messages == Chat{{"tool", "0.125"}, {"tool", "6"}});
  CHECK(two.tool_calls == 2);
  CHECK(two.tool_errors == 0);
  CHECK_FALSE(two.over);
  const Observation none = observe(*factory, "It is 6.");
  CHECK(none.over);
  CHECK(none.messages.empty());
}

TEST_CASE("whatever is wrong with a call is told to the policy") {
  CHECK_THAT(error_of("<tool_call>{\"name\": \"calculator\"}"), ContainsSubstring("not closed"));
  CHECK_THAT(error_of(call_of("")), ContainsSubstring("not JSON"));
  CHECK_THAT(error_of(call_of("{\"name\": ")), ContainsSubstring("not JSON"));
  CHECK_THAT(error_of(call_of("\xFF\xFE")), ContainsSubstring("not JSON"));
  CHECK_THAT(error_of(call_of("[1, 2]")), ContainsSubstring("expected {\"name\""));
  CHECK_THAT(error_of(call_of(R"({"name": 5})")), ContainsSubstring("expected {\"name\""));
  CHECK_THAT(error_of(call_of(std::string(100, '['))), ContainsSubstring("nested deeper than 64"));
  CHECK_THAT(error_of(call_of(std::string(70000, ' '))), ContainsSubstring("longer than 65536 bytes"));
  CHECK_THAT(error_of(call_of(R"({"name": "abacus"})")),
             ContainsSubstring("no tool 'abacus'; expected one of: calculator, moody"));
  CHECK_THAT(error_of(call_of(R"({"name": "calculator"})")),
             ContainsSubstring("argument expression is missing"));
  CHECK_THAT(error_of(call_of(R"({"name": "calculator", "arguments": [1]})")),
             ContainsSubstring("got [1], expected an object"));
  CHECK_THAT(error_of(call_of(R"({"name": "calculator", "arguments": {"expression": 5}})")),
             ContainsSubstring("argument expression: got 5, expected \"string\""));
  CHECK_THAT(error_of(call_of(R"({"name": "calculator", "arguments": {"expression": "1", "base": 2}})")),
             ContainsSubstring("no argument base; expected: expression"));
  CHECK_THAT(error_of(call_of(R"({"name": "calculator", "arguments": {"expression": "1/0"}})")),
             ContainsSubstring("division by zero"));
  CHECK_THAT(error_of(call_of(R"({"name": "moody", "arguments": {"do": "x", "n": 1.5}})")),
             ContainsSubstring("argument n: got 1.5, expected \"integer\""));
  CHECK_THAT(error_of(call_of(R"({"name": "moody", "arguments": {"do": "x", "list": {}}})")),
             ContainsSubstring("argument list: got {}, expected [\"array\",\"null\"]"));
  CHECK_THAT(error_of(call_of(R"({"name": "moody", "arguments": {"do": "throw"}})")),
             ContainsSubstring("moody: in a bad mood"));
  CHECK_THAT(error_of(call_of(R"({"name": "moody", "arguments": {"do": "throw int"}})")),
             ContainsSubstring("moody: failed"));
}

TEST_CASE("a call that takes too long is an error, and so are those after it") {
  double now_s = 100;
  const CallLimit limit{[&] { return now_s; }, 105, nullptr};
  const auto factory = make_factory(&now_s);
  const std::string quick = call_of(R"({"name": "moody", "arguments": {"do": "x", "list": null}})");
  const Observation said = observe(
      *factory, quick + call_of(R"({"name": "moody", "arguments": {"do": "dawdle"}})") + quick, limit);
  REQUIRE(said.messages.size() == 3);
  CHECK(said.messages[0].content == "done");
  CHECK(said.messages[1].content == R"({"error":"moody: took longer than it may"})");
  CHECK(said.messages[2].content == R"({"error":"moody: no time was left for the call"})");
  CHECK(said.tool_errors == 2);
}

TEST_CASE("long results and many calls are cut with a note") {
  ToolLimits limits;
  limits.max_result_bytes = 101;
  limits.max_calls_per_turn = 3;
  const auto factory = make_factory(nullptr, limits);
  const std::string ramble = call_of(R"({"name": "moody", "arguments": {"do": "ramble"}})");
  const Observation said = observe(*factory, ramble + ramble + ramble + ramble + ramble);
  REQUIRE(said.messages.size() == 4);
  // The cut would fall inside a character: the whole character goes.
  CHECK(said.messages[0].content == std::string(100, 'x') + " [103 more bytes left out]");
  CHECK(said.messages[3].content ==
        R"({"error":"at most 3 calls in a turn; this one and 1 after it were not made"})");
  CHECK(bounded_text("a\xFF", 100) == "a\xEF\xBF\xBD");
  CHECK(bounded_text("", 0).empty());
}

TEST_CASE("tools with the same name, or none, are refused") {
  const auto tool = std::make_shared<CalculatorTool>();
  CHECK_THROWS_AS(ToolEnvironmentFactory({tool, tool}, {}), InvalidArgument);
}

TEST_CASE("a scripted user speaks after turns without call until it has nothing left to say") {
  const ToolEnvironmentFactory factory({std::make_shared<CalculatorTool>()}, {},
                                       std::make_shared<ScriptedUserFactory>());
  Prompt prompt;
  prompt.user_turns = {"and 2+2?", "thanks"};
  const auto episode = factory.begin({prompt});
  const auto say = [&](std::string_view text) {
    return episode->observe({.text = text, .tokens = {}, .limit = {}});
  };
  CHECK(say("4").messages == Chat{{"user", "and 2+2?"}});
  CHECK(say(call_of(R"({"name": "calculator", "arguments": {"expression": "2+2"}})")).messages ==
        Chat{{"tool", "4"}});
  CHECK(say("4 again").messages == Chat{{"user", "thanks"}});
  CHECK(say("bye").over);
}

TEST_CASE("no text is too strange: every call gets one answer, valid UTF-8, within its bound") {
  ToolLimits limits;
  limits.max_result_bytes = 200;
  const auto factory = make_factory(nullptr, limits);
  const std::vector<std::string> pieces = {"<tool_call>",
                                           "</tool_call>",
                                           "{",
                                           "}",
                                           "\"",
                                           ":",
                                           ",",
                                           "name",
                                           "\"name\"",
                                           "arguments",
                                           "[",
                                           "]",
                                           "\\",
                                           "\\u",
                                           "1e9",
                                           "moody",
                                           "calculator",
                                           "\"do\"",
                                           "\xFF",
                                           "\xF0\x9F",
                                           std::string(1, '\0'),
                                           "null",
                                           "\n",
                                           "<tool",
                                           "{\"name\": \"moody\", \"arguments\": {\"do\": \"ramble\"}}"};
  const bool held = rc::check("random turns", [&] {
    const auto parts =
        *rc::gen::container<std::vector<int>>(rc::gen::inRange(0, static_cast<int>(pieces.size()) + 1));
    std::string text;
    for (const int part : parts)
      text += part < static_cast<int>(pieces.size()) ? pieces[static_cast<std::size_t>(part)]
                                                     : *rc::gen::arbitrary<std::string>();
    const Observation said = observe(*factory, text);
    RC_ASSERT(said.over == (text.find("<tool_call>") == std::string::npos));
    RC_ASSERT(static_cast<std::size_t>(said.tool_calls) == said.messages.size());
    for (const ChatMessage& message : said.messages) {
      RC_ASSERT(message.content.size() <= 3 * 200 + 40);
      json(message.content).dump();  // throws for what is no UTF-8
    }
  });
  CHECK(held);
}

TEST_CASE("schemas are what chat templates expect") {
  const auto schemas = make_factory()->schemas();
  REQUIRE(schemas.size() == 2);
  CHECK(schemas[0]["type"] == "function");
  CHECK(schemas[0]["function"]["name"] == "calculator");
  CHECK(schemas[0]["function"]["parameters"]["required"] == json::array({"expression"}));
}
