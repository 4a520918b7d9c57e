#include "rlhf/data/jsonl.h"

#include <nlohmann/json.hpp>
#include <utility>

#include "rlhf/core/error.h"

namespace rlhf {
namespace {

constexpr std::size_t kMaxLineBytes = 16 << 20;

// The position inside nlohmann's messages counts within the line; its "[json.exception...]" prefix is noise.
std::string reason_of(const nlohmann::json::exception& error) {
  const std::string text = error.what();
  const std::size_t end = text.find("] ");
  return end == std::string::npos ? text : text.substr(end + 2);
}

}  // namespace

JsonlReader::JsonlReader(std::filesystem::path path) : path_(std::move(path)) {
  std::error_code error;
  if (!std::filesystem::exists(path_, error)) fail<IoError>(path_.string(), ": no such file");
  if (std::filesystem::is_directory(path_, error))
    fail<IoError>(path_.string(), ": is a folder, expected JSONL");
  file_.open(path_, std::ios::binary);
  if (!file_) fail<IoError>(path_.string(), ": cannot be opened for reading");
}

std::string JsonlReader::where() const {
  return concat(path_.string(), ':', line_);
}

bool JsonlReader::read_line(std::string& text) {
  text.clear();
  std::streambuf& buffer = *file_.rdbuf();
  constexpr int kEnd = std::char_traits<char>::eof();
  int c = buffer.sbumpc();
  if (c == kEnd) return false;
  ++line_;
  for (; c != kEnd && c != '\n'; c = buffer.sbumpc()) {
    if (text.size() == kMaxLineBytes) fail<IoError>(where(), ": line longer than ", kMaxLineBytes, " bytes");
    text += static_cast<char>(c);
  }
  if (!text.empty() && text.back() == '\r') text.pop_back();
  if (line_ == 1 && text.rfind("\xef\xbb\xbf", 0) == 0) text.erase(0, 3);
  return true;
}

bool JsonlReader::next(nlohmann::json& value) {
  std::string text;
  do {
    if (!read_line(text)) return false;
  } while (text.find_first_not_of(" \t") == std::string::npos);
  try {
    value = nlohmann::json::parse(text);
  } catch (const nlohmann::json::exception& error) {
    fail<IoError>(where(), ": not valid JSON: ", reason_of(error));
  }
  if (!value.is_object()) fail<IoError>(where(), ": got ", value.type_name(), ", expected an object");
  return true;
}

void for_each_json_line(const std::filesystem::path& path,
                        const std::function<void(const nlohmann::json&, std::int64_t line)>& visit) {
  JsonlReader reader(path);
  nlohmann::json value;
  bool empty = true;
  while (reader.next(value)) {
    empty = false;
    try {
      visit(value, reader.line());
    } catch (const InvalidArgument& error) {
      fail<IoError>(reader.where(), ": ", error.what());
    }
  }
  if (empty) fail<IoError>(path.string(), ": holds no records");
}

}  // namespace rlhf
