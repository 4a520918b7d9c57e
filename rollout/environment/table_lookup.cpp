#include "rollout/environment/table_lookup.h"

#include <algorithm>

#include "rlhf/core/error.h"
#include "rlhf/data/jsonl.h"
#include "rollout/environment/csv.h"

namespace rlhf {

TableLookupTool::TableLookupTool(const TableLookupOptions& options) : options_(options) {
  RLHF_CHECK(!options.key.empty(), "tool '", options.name, "': the key column has no name");
  if (options.file.extension() == ".jsonl")
    read_jsonl();
  else
    read_csv();
  if (rows_.empty()) fail<IoError>(options.file.string(), ": has no rows");
  schema_.name = options.name;
  schema_.description = options.description.empty()
                            ? concat("Looks up a row of a table by its ", options.key, ".")
                            : options.description;
  schema_.parameters = nlohmann::ordered_json{
      {"type", "object"},
      {"properties", {{options.key, {{"type", nlohmann::ordered_json::array({"string", "number"})}}}}},
      {"required", nlohmann::ordered_json::array({options.key})}};
}

void TableLookupTool::add(const std::string& key, const nlohmann::ordered_json& row) {
  const bool is_new =
      rows_.emplace(key, row.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace)).second;
  RLHF_CHECK(is_new, "column ", options_.key, ": '", key, "' is the key of an earlier row");
}

void TableLookupTool::read_csv() {
  std::vector<std::string> header;
  std::size_t key_column = 0;
  for_each_csv_record(options_.file, [&](const std::vector<std::string>& fields, std::int64_t) {
    if (header.empty()) {
      header = fields;
      for (const std::string& name : header)
        RLHF_CHECK(std::ranges::count(header, name) == 1, "the header has the column '", name, "' twice");
      key_column = static_cast<std::size_t>(std::ranges::find(header, options_.key) - header.begin());
      RLHF_CHECK(key_column < header.size(), "the header has no column '", options_.key, "'");
      return;
    }
    RLHF_CHECK(fields.size() == header.size(), "the row has ", fields.size(), " columns, the header ",
               header.size());
    nlohmann::ordered_json row;
    for (std::size_t i = 0; i < fields.size(); ++i) row[header[i]] = fields[i];
    add(fields[key_column], row);
  });
}

void TableLookupTool::read_jsonl() {
  for_each_json_line(options_.file, [&](const nlohmann::json& row, std::int64_t) {
    const auto key = row.find(options_.key);
    const bool usable = key != row.end() && (key->is_string() || key->is_number());
    RLHF_CHECK(usable, "expected text or a number under \"", options_.key, '"');
    add(key->is_string() ? key->get<std::string>() : key->dump(), nlohmann::ordered_json(row));
  });
}

ToolResult TableLookupTool::call(const nlohmann::json& arguments, const CallLimit&) const {
  const nlohmann::json& key = arguments.at(options_.key);
  const std::string text = key.is_string() ? key.get<std::string>() : key.dump();
  const auto row = rows_.find(text);
  if (row == rows_.end())
    return ToolResult::error(
        concat("there is no row with ", options_.key, " '", bounded_text(text, 80), "'"));
  return ToolResult::ok(row->second);
}

}  // namespace rlhf
