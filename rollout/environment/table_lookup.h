#pragma once

#include <filesystem>
#include <string>
#include <unordered_map>

#include "rollout/environment/tool.h"

namespace rlhf {

struct TableLookupOptions {
  std::string name = "table_lookup";
  std::string description;     ///< empty: says which keys the table has
  std::filesystem::path file;  ///< .jsonl: one object a line; anything else: CSV with a header
  std::string key;             ///< column whose values name the rows
};

/// Finds a row of a table by its key; argument: the name of the key column, as text. The answer is the row as
/// one JSON object, the columns of a CSV file in its order. The table is read once and kept in memory.
class TableLookupTool : public Tool {
 public:
  /// @throws IoError `path:line: ...` for a file that is missing, empty or malformed, a row without the key
  /// or with another number of columns than the header, a key that is no text or number, or a key given twice
  explicit TableLookupTool(const TableLookupOptions& options);

  const ToolSchema& schema() const override { return schema_; }
  ToolResult call(const nlohmann::json& arguments, const CallLimit& limit) const override;
  bool answers_at_once() const override { return true; }
  std::size_t num_rows() const { return rows_.size(); }

 private:
  void add(const std::string& key, const nlohmann::ordered_json& row);
  void read_csv();
  void read_jsonl();

  TableLookupOptions options_;
  ToolSchema schema_;
  std::unordered_map<std::string, std::string> rows_;  ///< key to JSON text
};

}  // namespace rlhf
