#include "reward/scoring/term_options.h"

#include <cmath>

#include "rlhf/core/error.h"

namespace rlhf {

void TermOptions::validate(config::Problems& problems) const {
  if (!std::isfinite(weight)) problems.add("weight", concat("is ", weight, ", expected a finite number"));
  if (!std::isfinite(failure_score))
    problems.add("failure_score", concat("is ", failure_score, ", expected a finite number"));
  if (on_failure == OnFailure::kDrop && normalize != TermNormalization::kNone)
    problems.add("on_failure", "drop goes with no normalize, which measures a response against the others");
  // Written so that NaN is a problem too.
  if ((clip_min && std::isnan(*clip_min)) || (clip_max && std::isnan(*clip_max)) ||
      (clip_min && clip_max && !(*clip_min <= *clip_max)))
    problems.add("clip_min", concat("expected clip_min <= clip_max, got ", clip_min.value_or(-INFINITY),
                                    " and ", clip_max.value_or(INFINITY)));
  if (gate && (!std::isfinite(gate->min) || !std::isfinite(gate->otherwise)))
    problems.add("gate", "min and otherwise must be finite numbers");
  for (std::size_t i = 0; i < schedule.size(); ++i) {
    if (!std::isfinite(schedule[i].iteration) || !std::isfinite(schedule[i].factor))
      problems.add("schedule", concat("point ", i, " is not finite"));
    else if (i > 0 && schedule[i].iteration <= schedule[i - 1].iteration)
      problems.add("schedule", concat("iterations must grow from point to point: ", schedule[i].iteration,
                                      " comes after ", schedule[i - 1].iteration));
  }
}

}  // namespace rlhf
