#pragma once

#include <string_view>

#include "rlhf/model/jinja/ast.h"

namespace rlhf::jinja {

/// Parses a template. @throws TemplateError with the line: syntax errors, unknown tags, expressions or blocks
/// nested deeper than 200 levels.
Block parse_template(std::string_view source);

}  // namespace rlhf::jinja
