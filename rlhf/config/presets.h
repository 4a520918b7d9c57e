#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace rlhf::config {

/// A named set of values for the keys of one group: configs/presets/NAME.yaml. The files are the source;
/// their text is compiled into the library, so that the program, embedders and `rlhf verify` read the same
/// wherever the library is installed.
struct Preset {
  std::string name;
  std::string yaml;

  /// Path in the source tree, as error messages and difference sheets show it.
  std::string path() const { return "configs/presets/" + name + ".yaml"; }
};

/// All presets, by name.
const std::vector<Preset>& presets();
/// Returns the preset of that name, or nullptr.
const Preset* find_preset(std::string_view name);
/// Names of all presets.
std::vector<std::string> preset_names();

}  // namespace rlhf::config
