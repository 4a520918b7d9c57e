#pragma once

#include <string>
#include <vector>

#include "rlhf/ppo/options.h"

namespace rlhf::ppo {

/// A named set of values over the keys of PpoOptions: configs/presets/NAME.yaml, whose text is built in.
struct Preset {
  std::string name;
  std::string yaml;
};

/// All built-in presets, by name.
const std::vector<Preset>& presets();

/// Returns the options of a preset: its keys over the defaults. @throws InvalidArgument naming the known
/// presets when there is none of that name.
PpoOptions make_preset(const std::string& name);

}  // namespace rlhf::ppo
