#include <algorithm>
#include <array>
#include <utility>

#include "rlhf/model/jinja/filters.h"

#include "rlhf/model/jinja/python_text.h"
#include "rlhf/model/utf8.h"

namespace rlhf::jinja {
namespace {

Value generator(std::vector<Value> items) {
  return Value::sequence(Sequence::Kind::kGenerator, std::move(items));
}

// "a.b.0": attributes or items, one after the other; an integer is one item.
Value follow_path(Interpreter& interpreter, Value value, const Value& path) {
  if (!path.is_string()) return interpreter.get_item(value, path);
  for (const std::string& part : python::split(path.text(), ".", -1)) {
    const bool digits =
        !part.empty() && part.size() < 18 && part.find_first_not_of("0123456789") == std::string::npos;
    value = interpreter.get_item(value,
                                 digits ? Value(static_cast<std::int64_t>(std::stoll(part))) : Value(part));
  }
  return value;
}

Value ignore_case(const Value& value, bool case_sensitive) {
  return !case_sensitive && value.is_string() ? Value(python::lower(value.text())) : value;
}

/// Sort key of one item: its attribute paths (comma separated), case folded unless case counts.
class SortKey {
 public:
  SortKey(Interpreter& interpreter, const Value& attribute, bool case_sensitive)
      : interpreter_(interpreter), case_sensitive_(case_sensitive) {
    if (attribute.is_string()) {
      for (const std::string& path : python::split(attribute.text(), ",", -1)) paths_.emplace_back(path);
    } else if (!attribute.is_none()) {
      paths_.push_back(attribute);
    }
  }

  Value operator()(const Value& item) const {
    if (paths_.empty()) return ignore_case(item, case_sensitive_);
    std::vector<Value> keys;
    for (const Value& path : paths_)
      keys.push_back(ignore_case(follow_path(interpreter_, item, path), case_sensitive_));
    return keys.size() == 1 ? keys.front() : Value::list(std::move(keys));
  }

 private:
  Interpreter& interpreter_;
  bool case_sensitive_;
  std::vector<Value> paths_;
};

std::vector<Value> sorted_by(std::vector<Value> items, const SortKey& key, bool reverse) {
  std::vector<std::pair<Value, Value>> keyed;
  for (Value& item : items) keyed.emplace_back(key(item), item);
  // Python keeps equal items in order for both directions.
  std::stable_sort(keyed.begin(), keyed.end(), [&](const auto& a, const auto& b) {
    return reverse ? less(b.first, a.first) : less(a.first, b.first);
  });
  for (std::size_t i = 0; i < items.size(); ++i) items[i] = std::move(keyed[i].second);
  return items;
}

Value first(Interpreter&, Arguments& arguments) {
  const std::vector<Value> items = iterate(BoundArguments("first", arguments, {"seq"}).at(0));
  return items.empty() ? Value::undefined("No first item, sequence was empty.") : items.front();
}

Value last(Interpreter&, Arguments& arguments) {
  const Value& value = BoundArguments("last", arguments, {"seq"}).at(0);
  if (value.is_generator()) fail<TemplateError>("'generator' object is not reversible");
  const std::vector<Value> items = iterate(value);
  return items.empty() ? Value::undefined("No last item, sequence was empty.") : items.back();
}

Value count(Interpreter&, Arguments& arguments) {
  return length(BoundArguments("length", arguments, {"obj"}).at(0));
}

Value to_list(Interpreter&, Arguments& arguments) {
  return Value::list(iterate(BoundArguments("list", arguments, {"value"}).at(0)));
}

Value join(Interpreter& interpreter, Arguments& arguments) {
  const BoundArguments bound("join", arguments, {"value", "d", "attribute"});
  const std::string separator = bound.text(1, "");
  std::string out;
  bool begun = false;
  for (const Value& item : iterate(bound.at(0))) {
    if (begun) out += separator;
    begun = true;
    out +=
        to_text(bound.has(2) && !bound.at(2).is_none() ? follow_path(interpreter, item, bound.at(2)) : item);
    python::check_size(out.size());
  }
  return out;
}

Value reverse(Interpreter&, Arguments& arguments) {
  const Value& value = BoundArguments("reverse", arguments, {"value"}).at(0);
  if (value.is_string()) {
    std::u32string points = utf8::to_code_points(value.text());
    std::reverse(points.begin(), points.end());
    return utf8::from_code_points(points);
  }
  std::vector<Value> items = iterate(value);
  std::reverse(items.begin(), items.end());
  return generator(std::move(items));
}

Value sort(Interpreter& interpreter, Arguments& arguments) {
  const BoundArguments bound("sort", arguments, {"value", "reverse", "case_sensitive", "attribute"});
  const SortKey key(interpreter, bound.get(3, Value()), bound.flag(2, false));
  return Value::list(sorted_by(iterate(bound.at(0)), key, bound.flag(1, false)));
}

Value dictsort(Interpreter& interpreter, Arguments& arguments) {
  const BoundArguments bound("dictsort", arguments, {"value", "case_sensitive", "by", "reverse"});
  if (!bound.at(0).is_dict()) fail<TemplateError>("dictsort: expected a dict");
  const std::string by = bound.text(2, "key");
  if (by != "key" && by != "value") fail<TemplateError>("You can only sort by either \"key\" or \"value\"");
  std::vector<Value> pairs;
  for (const auto& [key, value] : bound.at(0).as_mapping()->entries)
    pairs.push_back(Value::tuple({key, value}));
  const SortKey key(interpreter, by == "key" ? std::int64_t{0} : std::int64_t{1}, bound.flag(1, false));
  return Value::list(sorted_by(std::move(pairs), key, bound.flag(3, false)));
}

Value extreme(Interpreter& interpreter, Arguments& arguments, bool largest) {
  const BoundArguments bound(largest ? "max" : "min", arguments, {"value", "case_sensitive", "attribute"});
  const SortKey key(interpreter, bound.get(2, Value()), bound.flag(1, false));
  const std::vector<Value> items = iterate(bound.at(0));
  if (items.empty()) return Value::undefined("No aggregated item, sequence was empty.");
  const Value* best = &items.front();
  for (const Value& item : items) {
    if (largest ? less(key(*best), key(item)) : less(key(item), key(*best))) best = &item;
  }
  return *best;
}
Value smallest(Interpreter& interpreter, Arguments& arguments) {
  return extreme(interpreter, arguments, false);
}
Value largest(Interpreter& interpreter, Arguments& arguments) {
  return extreme(interpreter, arguments, true);
}

Value unique(Interpreter& interpreter, Arguments& arguments) {
  const BoundArguments bound("unique", arguments, {"value", "case_sensitive", "attribute"});
  const SortKey key(interpreter, bound.get(2, Value()), bound.flag(1, false));
  std::vector<Value> kept, seen;
  for (const Value& item : iterate(bound.at(0))) {
    Value own = key(item);
    interpreter.step(static_cast<std::int64_t>(seen.size()));
    if (std::any_of(seen.begin(), seen.end(), [&](const Value& other) { return equal(own, other); }))
      continue;
    seen.push_back(std::move(own));
    kept.push_back(item);
  }
  return generator(std::move(kept));
}

Value groupby(Interpreter& interpreter, Arguments& arguments) {
  const BoundArguments bound("groupby", arguments, {"value", "attribute", "default", "case_sensitive"});
  const bool case_sensitive = bound.flag(3, false);
  const auto key_of = [&](const Value& item) {
    Value key = follow_path(interpreter, item, bound.at(1));
    return key.is_undefined() && bound.has(2) ? bound.at(2) : key;
  };
  std::vector<std::pair<Value, Value>> keyed;
  for (const Value& item : iterate(bound.at(0))) keyed.emplace_back(key_of(item), item);
  std::stable_sort(keyed.begin(), keyed.end(), [&](const auto& a, const auto& b) {
    return less(ignore_case(a.first, case_sensitive), ignore_case(b.first, case_sensitive));
  });
  std::vector<Value> groups;
  for (std::size_t begin = 0; begin < keyed.size();) {
    std::vector<Value> members;
    std::size_t end = begin;
    while (end < keyed.size() && equal(ignore_case(keyed[end].first, case_sensitive),
                                       ignore_case(keyed[begin].first, case_sensitive))) {
      members.push_back(keyed[end++].second);
    }
    groups.push_back(
        Value::sequence(Sequence::Kind::kGroup, {keyed[begin].first, Value::list(std::move(members))}));
    begin = end;
  }
  return Value::list(std::move(groups));
}

Value sum(Interpreter& interpreter, Arguments& arguments) {
  const BoundArguments bound("sum", arguments, {"iterable", "attribute", "start"});
  Value total = bound.get(2, std::int64_t{0});
  for (const Value& item : iterate(bound.at(0))) {
    total = apply_operator(
        "+", total,
        bound.has(1) && !bound.at(1).is_none() ? follow_path(interpreter, item, bound.at(1)) : item);
  }
  return total;
}

Value map_items(Interpreter& interpreter, Arguments& arguments) {
  if (arguments.positional.empty()) fail<TemplateError>("map requires a sequence");
  const Value sequence = arguments.positional[0];
  const auto named = [&](std::string_view name) {
    const auto found = std::find_if(arguments.named.begin(), arguments.named.end(),
                                    [&](const auto& entry) { return entry.first == name; });
    return found == arguments.named.end() ? nullptr : &found->second;
  };
  std::vector<Value> out;
  if (arguments.positional.size() == 1) {
    const Value *attribute = named("attribute"), *fallback = named("default");
    if (!attribute) fail<TemplateError>("map requires a filter argument");
    for (const Value& item : iterate(sequence)) {
      Value value = follow_path(interpreter, item, *attribute);
      out.push_back(value.is_undefined() && fallback ? *fallback : value);
    }
    return generator(std::move(out));
  }
  const std::string filter = to_text(arguments.positional[1]);
  for (const Value& item : iterate(sequence)) {
    Arguments own{{arguments.positional.begin() + 1, arguments.positional.end()}, arguments.named};
    own.positional[0] = item;
    out.push_back(interpreter.apply_filter(filter, std::move(own)));
  }
  return generator(std::move(out));
}

struct Selection {
  bool by_attribute;
  bool keep;
};

// select, reject: [test, arguments...]; selectattr, rejectattr: attribute first.
Value select_items(Interpreter& interpreter, Arguments& arguments, Selection selection) {
  const std::size_t first = selection.by_attribute ? 2 : 1;
  if (arguments.positional.size() < first) fail<TemplateError>("Missing parameter for attribute name");
  std::vector<Value> out;
  for (const Value& item : iterate(arguments.positional[0])) {
    Value subject = selection.by_attribute ? follow_path(interpreter, item, arguments.positional[1]) : item;
    bool holds = false;
    if (arguments.positional.size() == first) {
      holds = truth(subject);
    } else {
      Arguments own{
          {arguments.positional.begin() + static_cast<std::ptrdiff_t>(first), arguments.positional.end()},
          arguments.named};
      const std::string test = to_text(own.positional[0]);
      own.positional[0] = std::move(subject);
      holds = interpreter.apply_test(test, std::move(own));
    }
    if (holds == selection.keep) out.push_back(item);
  }
  return generator(std::move(out));
}

template <bool ByAttribute, bool Keep>
Value select_filter(Interpreter& interpreter, Arguments& arguments) {
  return select_items(interpreter, arguments, {ByAttribute, Keep});
}

Value batch(Interpreter&, Arguments& arguments) {
  const BoundArguments bound("batch", arguments, {"value", "linecount", "fill_with"});
  const std::int64_t size = bound.at(1).to_int("batch(linecount)");
  if (size < 1 || size > 1000000) fail<TemplateError>("batch(linecount): expected 1 to 1000000");
  std::vector<Value> rows, row;
  for (const Value& item : iterate(bound.at(0))) {
    if (static_cast<std::int64_t>(row.size()) == size) rows.push_back(Value::list(std::exchange(row, {})));
    row.push_back(item);
  }
  if (!row.empty()) {
    const Value fill = bound.get(2, Value());
    while (!fill.is_none() && static_cast<std::int64_t>(row.size()) < size) row.push_back(fill);
    rows.push_back(Value::list(std::move(row)));
  }
  return generator(std::move(rows));
}

Value slice_columns(Interpreter&, Arguments& arguments) {
  const BoundArguments bound("slice", arguments, {"value", "slices", "fill_with"});
  const std::vector<Value> items = iterate(bound.at(0));
  const std::int64_t slices = bound.at(1).to_int("slice(slices)");
  if (slices < 1 || slices > 1000000) fail<TemplateError>("slice(slices): expected 1 to 1000000");
  const auto size = static_cast<std::int64_t>(items.size());
  const std::int64_t each = size / slices, longer = size % slices;
  std::vector<Value> columns;
  std::int64_t begin = 0;
  for (std::int64_t i = 0; i < slices; ++i) {
    const std::int64_t end = begin + each + (i < longer ? 1 : 0);
    std::vector<Value> column(items.begin() + begin, items.begin() + end);
    const Value fill = bound.get(2, Value());
    if (!fill.is_none() && i >= longer) column.push_back(fill);
    columns.push_back(Value::list(std::move(column)));
    begin = end;
  }
  return generator(std::move(columns));
}

Value dict_items(Interpreter&, Arguments& arguments) {
  const Value& value = BoundArguments("items", arguments, {"value"}).at(0);
  if (value.is_undefined()) return generator({});
  if (!value.is_dict()) fail<TemplateError>("Can only get item pairs from a mapping.");
  std::vector<Value> pairs;
  for (const auto& [key, item] : value.as_mapping()->entries) pairs.push_back(Value::tuple({key, item}));
  return generator(std::move(pairs));
}

constexpr std::array<std::pair<std::string_view, FilterFunction>, 22> kCollectionFilters{{
    {"batch", batch},
    {"count", count},
    {"dictsort", dictsort},
    {"first", first},
    {"groupby", groupby},
    {"items", dict_items},
    {"join", join},
    {"last", last},
    {"length", count},
    {"list", to_list},
    {"map", map_items},
    {"max", largest},
    {"min", smallest},
    {"reject", select_filter<false, false>},
    {"rejectattr", select_filter<true, false>},
    {"reverse", reverse},
    {"select", select_filter<false, true>},
    {"selectattr", select_filter<true, true>},
    {"slice", slice_columns},
    {"sort", sort},
    {"sum", sum},
    {"unique", unique},
}};

}  // namespace

FilterFunction find_collection_filter(std::string_view name) {
  for (const auto& [own, function] : kCollectionFilters) {
    if (own == name) return function;
  }
  return nullptr;
}

}  // namespace rlhf::jinja
