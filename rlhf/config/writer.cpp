#include "rlhf/config/writer.h"

#include "rlhf/config/description.h"
#include "rlhf/core/atomic_file.h"
#include "rlhf/core/error.h"

namespace rlhf::config {
namespace {

std::string comment(const std::string& help) {
  if (help.empty()) return "";
  std::string text = "  # ";
  for (const char c : help) text += c == '\n' ? ' ' : c;
  return text;
}

void write_fields(const Schema& schema, const std::string& indent, std::string& out) {
  for (const Field& field : schema.fields()) {
    out += indent + field.name + ":";
    switch (field.shape) {
      case Field::Shape::kValue:
        out += concat(" ", to_yaml(field.read()), comment(field.help), "\n");
        break;
      case Field::Shape::kGroup:
        if (!field.present()) {
          out += " null" + comment(field.help) + "\n";
        } else {
          out += comment(field.help) + "\n";
          write_fields(field.open(), indent + "  ", out);
        }
        break;
      case Field::Shape::kList:
        out += (field.size() == 0 ? " []" : "") + comment(field.help) + "\n";
        for (std::size_t i = 0; i < field.size(); ++i) {
          out += indent + "  -\n";
          write_fields(field.item(i), indent + "    ", out);
        }
        break;
    }
  }
}

}  // namespace

std::string to_yaml_document(const Schema& schema) {
  std::string out;
  write_fields(schema, "", out);
  return out;
}

void require_equal(const Schema& written, const Schema& read_back) {
  for (const Difference& difference : diff(written, read_back)) {
    fail<InternalError>("resolved configuration reads back differently: ", difference.path, ": ",
                        difference.left, " became ", difference.right);
  }
}

void write_resolved_text(const std::filesystem::path& path, const std::string& text) {
  write_file_atomically(path, text);
}

}  // namespace rlhf::config
