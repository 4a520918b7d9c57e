#include "rlhf/config/schema.h"

#include "rlhf/core/error.h"

namespace rlhf::config {

const Field* Schema::find(std::string_view name) const {
  for (const Field& field : fields_) {
    if (field.name == name) return &field;
  }
  return nullptr;
}

Field& Schema::append(std::string_view name, std::string_view help) {
  if (name.empty() || name == "preset" || find(name)) {
    fail<InternalError>("option key '", name, "' is empty, reserved or declared twice");
  }
  Field& field = fields_.emplace_back();
  field.name = name;
  field.help = help;
  return field;
}

}  // namespace rlhf::config
