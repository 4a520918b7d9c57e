#include <algorithm>
#include <array>

#include "rlhf/model/jinja/interpreter.h"

namespace rlhf::jinja {
namespace {

constexpr std::int64_t kMaxRange = 100000;  // the sandbox's limit

class Joiner final : public Object {
 public:
  explicit Joiner(std::string separator) : separator_(std::move(separator)) {}
  std::string_view type_name() const override { return "Joiner"; }
  Value attribute(std::string_view name) override {
    return Value::undefined(concat("'Joiner object' has no attribute '", name, "'"));
  }
  Value call(Interpreter&, Arguments&) override {
    const bool first = !used_;
    used_ = true;
    return first ? std::string() : separator_;
  }

 private:
  std::string separator_;
  bool used_ = false;
};

class Cycler final : public Object, public std::enable_shared_from_this<Cycler> {
 public:
  explicit Cycler(std::vector<Value> items) : items_(std::move(items)) {}
  std::string_view type_name() const override { return "Cycler"; }
  Value attribute(std::string_view name) override {
    if (name == "current") return items_[position_];
    if (name == "next")
      return Value::callable("next",
                             [own = shared_from_this()](Interpreter&, Arguments&) { return own->advance(); });
    if (name == "reset") {
      return Value::callable("reset", [own = shared_from_this()](Interpreter&, Arguments&) {
        own->position_ = 0;
        return Value();
      });
    }
    return Value::undefined(concat("'Cycler object' has no attribute '", name, "'"));
  }
  Value call(Interpreter&, Arguments&) override { fail<TemplateError>("'Cycler' object is not callable"); }

 private:
  Value advance() {
    Value item = items_[position_];
    position_ = (position_ + 1) % items_.size();
    return item;
  }
  std::vector<Value> items_;
  std::size_t position_ = 0;
};

Value range(Interpreter& interpreter, Arguments& arguments) {
  const auto& given = arguments.positional;
  if (given.empty() || given.size() > 3 || !arguments.named.empty())
    fail<TemplateError>("range expected 1 to 3 arguments");
  const std::int64_t start = given.size() > 1 ? given[0].to_int("range") : 0;
  const std::int64_t stop = given[given.size() > 1 ? 1 : 0].to_int("range");
  const std::int64_t step = given.size() > 2 ? given[2].to_int("range") : 1;
  if (step == 0) fail<TemplateError>("range() arg 3 must not be zero");
  std::vector<Value> items;
  for (std::int64_t i = start; step > 0 ? i < stop : i > stop;) {
    if (static_cast<std::int64_t>(items.size()) == kMaxRange) {
      fail<TemplateError>("Range too big. The sandbox blocks ranges larger than MAX_RANGE (", kMaxRange,
                          ").");
    }
    items.emplace_back(i);
    if (__builtin_add_overflow(i, step, &i)) break;
  }
  interpreter.step(static_cast<std::int64_t>(items.size()));
  return Value::sequence(Sequence::Kind::kRange, std::move(items));
}

// dict(mapping or pairs, **named), which namespace() takes too.
void fill_mapping(Mapping& mapping, Arguments& arguments) {
  if (arguments.positional.size() > 1) fail<TemplateError>("dict expected at most 1 argument");
  for (const Value& source : arguments.positional) {
    if (const Mapping* other = source.as_mapping()) {
      for (const auto& [key, value] : other->entries) mapping.set(key, value);
      continue;
    }
    for (const Value& pair : iterate(source)) {
      std::vector<Value> parts = iterate(pair);
      if (parts.size() != 2)
        fail<TemplateError>("dictionary update sequence element has length ", parts.size(),
                            "; 2 is required");
      mapping.set(std::move(parts[0]), std::move(parts[1]));
    }
  }
  for (auto& [name, value] : arguments.named) mapping.set(Value(name), value);
}

Value make_dict(Interpreter&, Arguments& arguments) {
  auto mapping = std::make_shared<Mapping>();
  fill_mapping(*mapping, arguments);
  return mapping;
}

Value make_namespace(Interpreter& interpreter, Arguments& arguments) {
  Value value = interpreter.make_namespace();
  fill_mapping(*value.as_mapping(), arguments);
  for (const auto& [key, own] : value.as_mapping()->entries) {
    if (key.is_string() && key.text().starts_with('_'))
      fail<TemplateError>("cannot store '", key.text(), "' on a namespace");
  }
  return value;
}

Value make_joiner(Interpreter&, Arguments& arguments) {
  const BoundArguments bound("joiner", arguments, {"sep"});
  return std::shared_ptr<Object>(std::make_shared<Joiner>(bound.text(0, ", ")));
}

Value make_cycler(Interpreter&, Arguments& arguments) {
  if (arguments.positional.empty()) fail<TemplateError>("at least one item has to be provided");
  return std::shared_ptr<Object>(std::make_shared<Cycler>(arguments.positional));
}

Value raise_exception(Interpreter&, Arguments& arguments) {
  const BoundArguments bound("raise_exception", arguments, {"message"});
  throw TemplateError(to_text(bound.at(0)));
}

Value strftime_now(Interpreter& interpreter, Arguments& arguments) {
  const BoundArguments bound("strftime_now", arguments, {"format"});
  const std::string format = bound.text(0, "");
  if (format.empty()) return std::string();
  std::array<char, 4096> buffer{};
  const std::size_t size = std::strftime(buffer.data(), buffer.size(), format.c_str(), &interpreter.now());
  if (size == 0)
    fail<TemplateError>("strftime_now: the result is empty or longer than ", buffer.size(), " bytes");
  return std::string(buffer.data(), size);
}

}  // namespace

std::vector<std::pair<std::string, Value>> builtin_globals() {
  std::vector<std::pair<std::string, Value>> globals;
  const auto add = [&](const char* name, Value (*function)(Interpreter&, Arguments&)) {
    globals.emplace_back(name, Value::callable(name, function));
  };
  add("range", range);
  add("dict", make_dict);
  add("namespace", make_namespace);
  add("joiner", make_joiner);
  add("cycler", make_cycler);
  add("raise_exception", raise_exception);
  add("strftime_now", strftime_now);
  return globals;
}

}  // namespace rlhf::jinja
