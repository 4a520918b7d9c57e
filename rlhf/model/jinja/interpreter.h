#pragma once

#include <cstdint>
#include <ctime>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "rlhf/model/jinja/ast.h"
#include "rlhf/model/jinja/value.h"

namespace rlhf::jinja {

/// Variables of one block; lookups go on in the parent.
struct Scope {
  std::vector<std::pair<std::string, Value>> variables;
  std::shared_ptr<Scope> parent;

  const Value* find(std::string_view name) const;
  void set(const std::string& name, Value value);
};

/// A byte range [begin, end) of rendered text.
struct TextSpan {
  std::size_t begin = 0;
  std::size_t end = 0;
};

/// Limits that stop a hostile template; generous for real ones (some thousand steps).
constexpr std::int64_t kMaxSteps = 20'000'000;
constexpr int kMaxCallDepth = 800;

/// Renders one template once. Works on a parsed template that must outlive it.
class Interpreter {
 public:
  /// @param globals the variables of the render call. @param now what strftime_now() shows.
  Interpreter(std::vector<std::pair<std::string, Value>> globals, const std::tm& now);
  ~Interpreter();

  /// @throws TemplateError with the line.
  std::string render(const Block& block);
  /// Ranges of the rendered text that {% generation %} blocks produced at the outermost level.
  const std::vector<TextSpan>& generation_spans() const { return generation_spans_; }

  Value call(const Value& callee, Arguments arguments);
  Value apply_filter(const std::string& name, Arguments arguments);
  bool apply_test(const std::string& name, Arguments arguments);
  /// object.name and object[key] of templates; undefined when missing.
  Value get_attribute(const Value& object, const std::string& name);
  Value get_item(const Value& object, const Value& key);
  /// Counts towards the limit. @throws TemplateError
  void step(std::int64_t count = 1);
  const std::tm& now() const { return now_; }
  /// An empty namespace object.
  Value make_namespace();

 private:
  enum class Flow { kNormal, kBreak, kContinue };
  using ScopePtr = std::shared_ptr<Scope>;
  class Depth;
  class Capture;
  friend class LoopObject;

  Flow execute(const Block& block, const ScopePtr& scope);
  Flow execute(const Statement& statement, const ScopePtr& scope);
  Flow execute_statement(const Statement& statement, const ScopePtr& scope);
  void write(std::string_view text);
  Flow execute_if(const Statement& statement, const ScopePtr& scope);
  Flow execute_for(const Statement& statement, const ScopePtr& scope);
  /// One level of a (recursive) loop over `items`.
  void run_loop(const Statement& statement, const ScopePtr& scope, std::vector<Value> items, int depth);
  std::vector<Value> filter_items(const Statement& statement, const ScopePtr& scope,
                                  std::vector<Value> items);
  void execute_set_block(const Statement& statement, const ScopePtr& scope);
  void execute_with(const Statement& statement, const ScopePtr& scope);
  void execute_call_block(const Statement& statement, const ScopePtr& scope);
  void execute_filter_block(const Statement& statement, const ScopePtr& scope);
  void execute_generation(const Statement& statement, const ScopePtr& scope);
  Value make_macro(const Statement& statement, const ScopePtr& scope);
  Value call_macro(const Statement& statement, const ScopePtr& scope, Arguments& arguments);
  void bind_parameters(const Statement& statement, const ScopePtr& scope, Arguments& arguments);
  void assign(const Expression& target, Value value, const ScopePtr& scope);
  std::string capture(const Block& block, const ScopePtr& scope);

  Value evaluate(const Expression& node, const ScopePtr& scope);
  Value evaluate_node(const Expression& node, const ScopePtr& scope);
  std::vector<Value> evaluate_all(const std::vector<ExpressionPtr>& nodes, const ScopePtr& scope);
  Value evaluate_name(const Expression& node, const ScopePtr& scope);
  Value evaluate_dict(const Expression& node, const ScopePtr& scope);
  Value evaluate_item(const Expression& node, const ScopePtr& scope);
  Value evaluate_filter(const Expression& node, const ScopePtr& scope, const Value* operand);
  Value evaluate_compare(const Expression& node, const ScopePtr& scope);
  Value evaluate_concat(const Expression& node, const ScopePtr& scope);
  Value evaluate_conditional(const Expression& node, const ScopePtr& scope);
  Arguments evaluate_arguments(const CallArguments& given, const ScopePtr& scope);

  std::shared_ptr<Scope> root_;
  std::tm now_;
  std::string* output_ = nullptr;
  std::size_t total_written_ = 0;
  int capture_depth_ = 0;
  std::vector<TextSpan> generation_spans_;
  std::vector<std::weak_ptr<Mapping>> namespaces_;
  std::int64_t steps_ = 0;
  int depth_ = 0;
};

/// Bounds nested evaluation, so that a template cannot overflow the stack.
class Interpreter::Depth {
 public:
  explicit Depth(Interpreter& interpreter) : interpreter_(interpreter) {
    if (++interpreter_.depth_ > kMaxCallDepth) {
      --interpreter_.depth_;
      fail<TemplateError>("maximum recursion depth exceeded");
    }
  }
  ~Depth() { --interpreter_.depth_; }

 private:
  Interpreter& interpreter_;
};

/// a + b, a * b, ... of Python. @throws TemplateError
Value apply_operator(std::string_view op, const Value& a, const Value& b);
Value negate(const Value& value);
/// Fails with the message of an undefined value.
[[noreturn]] void fail_undefined(const Value& value);
/// text[start:stop:step] and the same for lists; none = left out.
Value slice(const Value& object, const Value& start, const Value& stop, const Value& step);

/// Methods of str, list, tuple and dict: undefined when the type has no such method.
Value find_method(const Value& object, const std::string& name);
/// Null when there is no such filter or test.
using FilterFunction = Value (*)(Interpreter&, Arguments&);
using TestFunction = bool (*)(Interpreter&, Arguments&);
FilterFunction find_filter(std::string_view name);
TestFunction find_test(std::string_view name);
/// range, namespace, dict, joiner, cycler, raise_exception, strftime_now.
std::vector<std::pair<std::string, Value>> builtin_globals();

/// json.dumps with transformers' arguments (ensure_ascii, indent, separators, sort_keys).
Value to_json(Interpreter& interpreter, Arguments& arguments);

/// Picks arguments by position or name, like a Python signature. Create it with all names, then ask.
class BoundArguments {
 public:
  /// @throws TemplateError for too many or unknown arguments; `function` is for messages.
  BoundArguments(std::string_view function, Arguments& arguments,
                 std::initializer_list<std::string_view> names);

  bool has(std::size_t index) const { return values_[index] != nullptr; }
  /// @throws TemplateError when it was not given.
  const Value& at(std::size_t index) const;
  Value get(std::size_t index, Value fallback) const {
    return values_[index] ? *values_[index] : std::move(fallback);
  }
  std::int64_t integer(std::size_t index, std::int64_t fallback) const;
  bool flag(std::size_t index, bool fallback) const;
  std::string text(std::size_t index, std::string fallback) const;

 private:
  std::string function_;
  std::vector<std::string> names_;
  std::vector<const Value*> values_;
};

}  // namespace rlhf::jinja
