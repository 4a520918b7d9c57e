#pragma once

#include <string_view>

#include "rlhf/model/jinja/interpreter.h"

namespace rlhf::jinja {

/// The built-in filters on texts and on collections; null when there is none of that name. find_filter() asks
/// both.
FilterFunction find_text_filter(std::string_view name);
FilterFunction find_collection_filter(std::string_view name);

}  // namespace rlhf::jinja
