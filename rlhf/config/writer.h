#pragma once

#include <filesystem>
#include <string>

#include "rlhf/config/reader.h"

namespace rlhf::config {

/// Writes every value of a schema as block YAML, in declaration order, with each field's help as a comment.
std::string to_yaml_document(const Schema& schema);

/// Throws InternalError naming the first key in which the two differ.
void require_equal(const Schema& written, const Schema& read_back);

/// Writes `options` to `path` (atomically, all keys explicit, no presets) and reads the text back as a check
/// that the file means what runs. @throws IoError; InternalError when it reads back differently.
template <class T>
void save_resolved(const std::filesystem::path& path, T options);

void write_resolved_text(const std::filesystem::path& path, const std::string& text);

template <class T>
void save_resolved(const std::filesystem::path& path, T options) {
  const std::string text = to_yaml_document(Schema::of(options));
  T read_back = parse<T>(text, path.string());
  require_equal(Schema::of(options), Schema::of(read_back));
  write_resolved_text(path, text);
}

}  // namespace rlhf::config
