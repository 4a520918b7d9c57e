#include "rlhf/model/jinja/interpreter.h"

#include <algorithm>

#include "rlhf/model/jinja/python_text.h"

namespace rlhf::jinja {

using Kind = Expression::Kind;

const Value* Scope::find(std::string_view name) const {
  for (const Scope* scope = this; scope; scope = scope->parent.get()) {
    for (const auto& [own, value] : scope->variables) {
      if (own == name) return &value;
    }
  }
  return nullptr;
}

void Scope::set(const std::string& name, Value value) {
  for (auto& [own, held] : variables) {
    if (own == name) {
      held = std::move(value);
      return;
    }
  }
  variables.emplace_back(name, std::move(value));
}

namespace {

std::shared_ptr<Scope> inner(const std::shared_ptr<Scope>& parent) {
  auto scope = std::make_shared<Scope>();
  scope->parent = parent;
  return scope;
}

}  // namespace

/// Sends output into a text of its own while it lives.
class Interpreter::Capture {
 public:
  Capture(Interpreter& interpreter, std::string& target)
      : interpreter_(interpreter), before_(interpreter.output_) {
    interpreter_.output_ = &target;
    ++interpreter_.capture_depth_;
  }
  ~Capture() {
    interpreter_.output_ = before_;
    --interpreter_.capture_depth_;
  }

 private:
  Interpreter& interpreter_;
  std::string* before_;
};

/// The `loop` variable.
class LoopObject final : public Object, public std::enable_shared_from_this<LoopObject> {
 public:
  LoopObject(std::vector<Value> items, int depth) : items_(std::move(items)), depth_(depth) {}

  std::string_view type_name() const override { return "LoopContext"; }
  std::size_t size() const { return items_.size(); }
  const Value& start(std::size_t index) { return items_[index_ = index]; }
  void set_recursion(Function recursion) { recursion_ = std::move(recursion); }

  Value attribute(std::string_view name) override {
    const auto index = static_cast<std::int64_t>(index_), size = static_cast<std::int64_t>(items_.size());
    if (name == "index") return index + 1;
    if (name == "index0") return index;
    if (name == "revindex") return size - index;
    if (name == "revindex0") return size - index - 1;
    if (name == "first") return index == 0;
    if (name == "last") return index + 1 == size;
    if (name == "length") return size;
    if (name == "depth") return std::int64_t{depth_};
    if (name == "depth0") return std::int64_t{depth_ - 1};
    if (name == "previtem")
      return index > 0 ? items_[index_ - 1] : Value::undefined("there is no previous item");
    if (name == "nextitem")
      return index + 1 < size ? items_[index_ + 1] : Value::undefined("there is no next item");
    if (name == "cycle")
      return Value::callable(
          "cycle", [own = shared_from_this()](Interpreter&, Arguments& given) { return own->cycle(given); });
    if (name == "changed")
      return Value::callable("changed", [own = shared_from_this()](Interpreter&, Arguments& given) {
        return own->changed(given);
      });
    return Value::undefined(concat("'LoopContext object' has no attribute '", name, "'"));
  }

  Value call(Interpreter& interpreter, Arguments& arguments) override {
    if (!recursion_)
      fail<TemplateError>("The loop must have the 'recursive' marker to be called recursively.");
    return recursion_(interpreter, arguments);
  }

 private:
  Value cycle(const Arguments& given) const {
    if (given.positional.empty()) fail<TemplateError>("no items for cycling given");
    return given.positional[index_ % given.positional.size()];
  }
  Value changed(const Arguments& given) {
    Value now = Value::tuple(given.positional);
    const bool is_new = !has_last_ || !equal(now, last_);
    last_ = std::move(now);
    has_last_ = true;
    return is_new;
  }

  std::vector<Value> items_;
  std::size_t index_ = 0;
  int depth_;
  Function recursion_;
  Value last_;
  bool has_last_ = false;
};

Interpreter::Interpreter(std::vector<std::pair<std::string, Value>> globals, const std::tm& now)
    : root_(std::make_shared<Scope>()), now_(now) {
  auto builtins = std::make_shared<Scope>();
  builtins->variables = builtin_globals();
  auto given = inner(builtins);
  given->variables = std::move(globals);
  root_ = inner(given);
}

// Namespaces are the only values that can change, so every cycle of references goes through one.
Interpreter::~Interpreter() {
  for (const auto& weak : namespaces_) {
    if (const auto mapping = weak.lock()) mapping->entries.clear();
  }
}

Value Interpreter::make_namespace() {
  auto mapping = std::make_shared<Mapping>();
  mapping->is_namespace = true;
  namespaces_.push_back(mapping);
  return mapping;
}

std::string Interpreter::render(const Block& block) {
  std::string text;
  output_ = &text;
  execute(block, root_);
  output_ = nullptr;
  return text;
}

void Interpreter::step(std::int64_t count) {
  steps_ += count;
  if (steps_ > kMaxSteps) fail<TemplateError>("takes more than ", kMaxSteps, " steps");
}

void Interpreter::write(std::string_view text) {
  total_written_ += text.size();
  python::check_size(total_written_);
  output_->append(text);
}

// --- statements

Interpreter::Flow Interpreter::execute(const Block& block, const ScopePtr& scope) {
  for (const auto& statement : block) {
    const Flow flow = execute(*statement, scope);
    if (flow != Flow::kNormal) return flow;
  }
  return Flow::kNormal;
}

Interpreter::Flow Interpreter::execute(const Statement& statement, const ScopePtr& scope) {
  const Depth depth(*this);
  step();
  try {
    return execute_statement(statement, scope);
  } catch (const TemplateError& error) {
    if (error.line() > 0) throw;
    throw TemplateError(error.message(), statement.line);
  }
}

Interpreter::Flow Interpreter::execute_statement(const Statement& statement, const ScopePtr& scope) {
  switch (statement.kind) {
    case Statement::Kind::kText:
      write(statement.name);
      break;
    case Statement::Kind::kOutput:
      write(to_text(evaluate(*statement.value, scope)));
      break;
    case Statement::Kind::kIf:
      return execute_if(statement, scope);
    case Statement::Kind::kFor:
      return execute_for(statement, scope);
    case Statement::Kind::kSet:
      assign(*statement.target, evaluate(*statement.value, scope), scope);
      break;
    case Statement::Kind::kSetBlock:
      execute_set_block(statement, scope);
      break;
    case Statement::Kind::kWith:
      execute_with(statement, scope);
      break;
    case Statement::Kind::kMacro:
      scope->set(statement.name, make_macro(statement, scope));
      break;
    case Statement::Kind::kCallBlock:
      execute_call_block(statement, scope);
      break;
    case Statement::Kind::kFilterBlock:
      execute_filter_block(statement, scope);
      break;
    case Statement::Kind::kGeneration:
      execute_generation(statement, scope);
      break;
    case Statement::Kind::kBody:
      return execute(statement.body, inner(scope));
    case Statement::Kind::kBreak:
      return Flow::kBreak;
    case Statement::Kind::kContinue:
      return Flow::kContinue;
  }
  return Flow::kNormal;
}

Interpreter::Flow Interpreter::execute_if(const Statement& statement, const ScopePtr& scope) {
  for (const auto& [condition, body] : statement.branches) {
    if (truth(evaluate(*condition, scope))) return execute(body, scope);
  }
  return execute(statement.otherwise, scope);
}

Interpreter::Flow Interpreter::execute_for(const Statement& statement, const ScopePtr& scope) {
  const Value iterable = evaluate(*statement.value, scope);
  run_loop(statement, scope, iterate(iterable), 1);
  return Flow::kNormal;
}

std::vector<Value> Interpreter::filter_items(const Statement& statement, const ScopePtr& scope,
                                             std::vector<Value> items) {
  if (!statement.condition) return items;
  std::vector<Value> kept;
  for (Value& item : items) {
    const ScopePtr own = inner(scope);
    assign(*statement.target, item, own);
    if (truth(evaluate(*statement.condition, own))) kept.push_back(std::move(item));
  }
  return kept;
}

void Interpreter::run_loop(const Statement& statement, const ScopePtr& scope, std::vector<Value> items,
                           int depth) {
  auto loop = std::make_shared<LoopObject>(filter_items(statement, scope, std::move(items)), depth);
  if (statement.recursive) {
    loop->set_recursion([this, &statement, scope, depth](Interpreter&, Arguments& arguments) -> Value {
      if (arguments.positional.size() != 1) fail<TemplateError>("loop(...) takes one argument");
      const Depth nesting(*this);
      std::string text;
      const Capture capture(*this, text);
      run_loop(statement, scope, iterate(arguments.positional.front()), depth + 1);
      return text;
    });
  }
  for (std::size_t i = 0; i < loop->size(); ++i) {
    step();
    const ScopePtr own = inner(scope);
    own->variables.emplace_back("loop", Value(std::shared_ptr<Object>(loop)));
    assign(*statement.target, loop->start(i), own);
    if (execute(statement.body, own) == Flow::kBreak) break;
  }
  if (loop->size() == 0) execute(statement.otherwise, inner(scope));
}

std::string Interpreter::capture(const Block& block, const ScopePtr& scope) {
  std::string text;
  const Capture capture(*this, text);
  execute(block, scope);
  return text;
}

void Interpreter::execute_set_block(const Statement& statement, const ScopePtr& scope) {
  Value value = capture(statement.body, inner(scope));
  if (statement.filter) value = evaluate_filter(*statement.filter, scope, &value);
  assign(*statement.target, std::move(value), scope);
}

void Interpreter::execute_with(const Statement& statement, const ScopePtr& scope) {
  const ScopePtr own = inner(scope);
  // Values see the outer variables only.
  for (const auto& [target, value] : statement.assignments) assign(*target, evaluate(*value, scope), own);
  execute(statement.body, own);
}

void Interpreter::execute_call_block(const Statement& statement, const ScopePtr& scope) {
  const Expression& node = *statement.value;
  const Value callee = evaluate(*node.children[0], scope);
  Arguments arguments = evaluate_arguments(node.arguments, scope);
  const Value caller =
      Value::callable("caller", [this, &statement, scope](Interpreter&, Arguments& given) -> Value {
        return call_macro(statement, scope, given);
      });
  arguments.named.emplace_back("caller", caller);
  write(to_text(call(callee, std::move(arguments))));
}

void Interpreter::execute_filter_block(const Statement& statement, const ScopePtr& scope) {
  const Value text = capture(statement.body, inner(scope));
  write(to_text(evaluate_filter(*statement.filter, scope, &text)));
}

void Interpreter::execute_generation(const Statement& statement, const ScopePtr& scope) {
  const std::size_t begin = output_->size();
  execute(statement.body, inner(scope));
  if (capture_depth_ == 0) generation_spans_.push_back({begin, output_->size()});
}

Value Interpreter::make_macro(const Statement& statement, const ScopePtr& scope) {
  // The scope holds the macro: a shared pointer back would keep both alive for ever.
  return Value::callable(statement.name, [this, &statement, weak = std::weak_ptr<Scope>(scope)](
                                             Interpreter&, Arguments& arguments) {
    const ScopePtr home = weak.lock();
    return call_macro(statement, home ? home : root_, arguments);
  });
}

Value Interpreter::call_macro(const Statement& statement, const ScopePtr& scope, Arguments& arguments) {
  const Depth depth(*this);
  const ScopePtr own = inner(scope);
  bind_parameters(statement, own, arguments);
  return capture(statement.body, own);
}

void Interpreter::bind_parameters(const Statement& statement, const ScopePtr& own, Arguments& arguments) {
  const Signature& signature = statement.signature;
  const std::size_t num_names = signature.names.size(), first_default = num_names - signature.defaults.size();
  std::vector<Value> extra;
  for (std::size_t i = num_names; i < arguments.positional.size(); ++i)
    extra.push_back(arguments.positional[i]);
  auto extra_named = std::make_shared<Mapping>();
  for (std::size_t i = 0; i < num_names; ++i) {
    const std::string& name = signature.names[i];
    const auto named = std::find_if(arguments.named.begin(), arguments.named.end(),
                                    [&](const auto& entry) { return entry.first == name; });
    if (i < arguments.positional.size()) {
      own->set(name, arguments.positional[i]);
    } else if (named != arguments.named.end()) {
      own->set(name, named->second);
    } else if (i >= first_default) {
      own->set(name, evaluate(*signature.defaults[i - first_default], own));
    } else {
      own->set(name, Value::undefined(concat("parameter '", name, "' was not provided")));
    }
  }
  Value caller = Value::undefined("No caller defined");
  for (auto& [name, value] : arguments.named) {
    if (std::find(signature.names.begin(), signature.names.end(), name) != signature.names.end()) continue;
    name == "caller" ? static_cast<void>(caller = value) : extra_named->set(Value(name), value);
  }
  own->set("caller", std::move(caller));
  own->set("varargs", Value::tuple(std::move(extra)));
  own->set("kwargs", Value(std::move(extra_named)));
}

void Interpreter::assign(const Expression& target, Value value, const ScopePtr& scope) {
  if (target.kind == Kind::kName) return scope->set(target.name, std::move(value));
  if (target.kind == Kind::kNamespaceTarget) {
    const Value* found = scope->find(target.name);
    Mapping* mapping = found ? found->as_mapping() : nullptr;
    if (!mapping || !mapping->is_namespace)
      fail<TemplateError>("cannot assign attribute on non-namespace object");
    if (target.attribute.starts_with('_'))
      fail<TemplateError>("cannot store '", target.attribute, "' on a namespace");
    return mapping->set(Value(target.attribute), std::move(value));
  }
  std::vector<Value> items = iterate(value);
  if (items.size() != target.children.size()) {
    fail<TemplateError>("expected ", target.children.size(), " values to unpack, got ", items.size());
  }
  for (std::size_t i = 0; i < items.size(); ++i) assign(*target.children[i], std::move(items[i]), scope);
}

}  // namespace rlhf::jinja
