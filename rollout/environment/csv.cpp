#include "rollout/environment/csv.h"

#include <fstream>
#include <iterator>

#include "rlhf/core/error.h"

namespace rlhf {
namespace {

class CsvReader {
 public:
  CsvReader(std::string path, std::string text) : path_(std::move(path)), text_(std::move(text)) {
    if (text_.starts_with("\xEF\xBB\xBF")) at_ = 3;
  }

  bool next(std::vector<std::string>& fields, std::int64_t& begin_line) {
    while (at_ < text_.size() && (text_[at_] == '\n' || text_.compare(at_, 2, "\r\n") == 0)) end_line();
    if (at_ >= text_.size()) return false;
    begin_line = line_;
    fields.clear();
    do fields.push_back(field());
    while (accept(','));
    end_line();
    return true;
  }

 private:
  bool accept(char c) {
    if (at_ >= text_.size() || text_[at_] != c) return false;
    ++at_;
    return true;
  }

  void end_line() {
    if (text_.compare(at_, 2, "\r\n") == 0) ++at_;
    if (accept('\n')) ++line_;
  }

  std::string field() {
    if (accept('"')) return quoted();
    const std::size_t end = std::min(text_.find_first_of(",\r\n\"", at_), text_.size());
    std::string value = text_.substr(at_, end - at_);
    at_ = end;
    if (at_ < text_.size() && text_[at_] == '"') stop("a quote inside a field that does not begin with one");
    if (at_ < text_.size() && text_[at_] == '\r' && text_.compare(at_, 2, "\r\n") != 0)
      stop("a carriage return that ends no line");
    return value;
  }

  std::string quoted() {
    const std::int64_t begin_line = line_;
    std::string value;
    while (true) {
      if (at_ >= text_.size()) {
        line_ = begin_line;
        stop("a quoted field that is never closed");
      }
      const char c = text_[at_++];
      line_ += c == '\n';
      if (c != '"') {
        value += c;
      } else if (accept('"')) {
        value += '"';
      } else {
        break;
      }
    }
    if (at_ < text_.size() && text_.find_first_of(",\r\n", at_) != at_)
      stop("text behind the closing quote of a field");
    return value;
  }

  [[noreturn]] void stop(const char* what) const { fail<IoError>(path_, ":", line_, ": ", what); }

  std::string path_, text_;
  std::size_t at_ = 0;
  std::int64_t line_ = 1;
};

}  // namespace

void for_each_csv_record(
    const std::filesystem::path& path,
    const std::function<void(const std::vector<std::string>& fields, std::int64_t line)>& visit) {
  std::ifstream file(path, std::ios::binary);
  if (!file) fail<IoError>(path.string(), ": cannot be opened");
  std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (file.bad()) fail<IoError>(path.string(), ": cannot be read");
  CsvReader reader(path.string(), std::move(text));
  std::vector<std::string> fields;
  std::int64_t line = 0;
  while (reader.next(fields, line)) {
    try {
      visit(fields, line);
    } catch (const InvalidArgument& error) {
      fail<IoError>(path.string(), ":", line, ": ", error.what());
    }
  }
}

}  // namespace rlhf
