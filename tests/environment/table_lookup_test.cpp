#include "rollout/environment/table_lookup.h"

#include "rlhf/core/error.h"
#include "tests/catch.h"
#include "tests/data/temporary_folder.h"

using namespace rlhf;

namespace {

ToolResult look_up(const TableLookupTool& tool, nlohmann::json arguments) {
  return tool.call(arguments, {});
}

}  // namespace

TEST_CASE("rows of CSV and JSONL are found by their key") {
  TemporaryFolder folder;
  TableLookupOptions options;
  options.key = "currency";
  options.file = folder.write("rates.csv",
                              "\xEF\xBB\xBFname,currency,rate\r\n\"Euro, the\",EUR,1\r\n\r\n"
                              "\"a \"\"dollar\"\"\nof two lines\",USD,1.09\n");
  const TableLookupTool csv(options);
  CHECK(csv.num_rows() == 2);
  CHECK(look_up(csv, {{"currency", "EUR"}}).text == R"({"name":"Euro, the","currency":"EUR","rate":"1"})");
  CHECK(look_up(csv, {{"currency", "USD"}}).text ==
        R"({"name":"a \"dollar\"\nof two lines","currency":"USD","rate":"1.09"})");
  const ToolResult none = look_up(csv, {{"currency", "eur"}});
  CHECK(none.is_error);
  CHECK(none.text == R"({"error":"there is no row with currency 'eur'"})");

  options.key = "id";
  options.file = folder.write("rows.jsonl", "{\"id\": 7, \"x\": [1]}\n{\"id\": \"b\", \"x\": null}\n");
  const TableLookupTool jsonl(options);
  CHECK(look_up(jsonl, {{"id", 7}}).text == R"({"id":7,"x":[1]})");
  CHECK(look_up(jsonl, {{"id", "7"}}).text == R"({"id":7,"x":[1]})");
  CHECK(look_up(jsonl, {{"id", "b"}}).text == R"({"id":"b","x":null})");
}

TEST_CASE("a bad table is refused with file and line") {
  TemporaryFolder folder;
  const auto problem = [&](const std::string& name, const std::string& text) {
    TableLookupOptions options;
    options.key = "k";
    options.file = folder.write(name, text);
    try {
      const TableLookupTool tool(options);
    } catch (const IoError& error) {
      return std::string(error.what());
    }
    return std::string("none");
  };
  CHECK_THAT(problem("a.csv", "x,y\n1,2\n"), ContainsSubstring("a.csv:1: the header has no column 'k'"));
  CHECK_THAT(problem("a.csv", "k,k\n1,2\n"),
             ContainsSubstring("a.csv:1: the header has the column 'k' twice"));
  CHECK_THAT(problem("a.csv", "k,v\n1,2\n3\n"),
             ContainsSubstring("a.csv:3: the row has 1 columns, the header 2"));
  CHECK_THAT(problem("a.csv", "k,v\n1,2\n1,3\n"),
             ContainsSubstring("a.csv:3: column k: '1' is the key of an"));
  CHECK_THAT(problem("a.csv", "k,v\n1,\"2\n3\n"), ContainsSubstring("a.csv:2: a quoted field that is never"));
  CHECK_THAT(problem("a.csv", "k,v\n1,a\"b\n"), ContainsSubstring("a.csv:2: a quote inside a field"));
  CHECK_THAT(problem("a.csv", "k,v\n1,\"a\"b\n"),
             ContainsSubstring("a.csv:2: text behind the closing quote"));
  CHECK_THAT(problem("a.csv", "k,v\n"), ContainsSubstring("a.csv: has no rows"));
  CHECK_THAT(problem("a.csv", ""), ContainsSubstring("a.csv: has no rows"));
  CHECK_THAT(problem("a.jsonl", "{\"k\": 1}\n{\"v\": 2}\n"),
             ContainsSubstring("a.jsonl:2: expected text or a number"));
  CHECK_THAT(problem("a.jsonl", "{\"k\": 1}\nnonsense\n"), ContainsSubstring("a.jsonl:2: "));
  TableLookupOptions missing;
  missing.key = "k";
  missing.file = "/no/such/table.csv";
  CHECK_THROWS_WITH(TableLookupTool(missing), ContainsSubstring("/no/such/table.csv: cannot be opened"));
}
