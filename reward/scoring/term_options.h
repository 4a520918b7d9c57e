#pragma once

#include <optional>
#include <string>
#include <vector>

#include "rlhf/config/field.h"

namespace rlhf {

/// A term counts only where another term has reached a score: no credit for a right number in an answer that
/// leaks a secret.
struct TermGate {
  std::string term;      ///< name of the other term; its raw score is looked at
  double min = 1;        ///< the gate is open at this score and above
  double otherwise = 0;  ///< what the term counts, before its weight, where the gate is closed

  template <class V>
  void visit_fields(V& v) {
    v.required("term", term, "Name of the term that is looked at");
    v.field("min", min, "Raw score of that term from which on this one counts");
    v.field("otherwise", otherwise, "What this term counts below that, before its weight");
  }
};

/// A point of a weight schedule.
struct WeightPoint {
  double iteration = 1;  ///< counted from 1, as steps in metrics
  double factor = 1;     ///< of the weight

  template <class V>
  void visit_fields(V& v) {
    v.field("iteration", iteration, "Iteration, counted from 1 as in metrics", {1, 1e9});
    v.field("factor", factor, "Factor of the weight there", {-1e6, 1e6});
  }
};

/// What a term's values are measured against before they are weighted, where they are learned from.
enum class TermNormalization {
  kNone,
  kGroup,    ///< (v - mean) / (deviation + 1e-4) over the responses to the prompt; GDPO, arXiv 2601.05242
  kRunning,  ///< (v - mean) / (deviation + 1e-8) over all responses of the stage so far, this batch included
};

/// What becomes of a response for which a term has no score (RewardUnavailable).
enum class OnFailure {
  kStop,   ///< the run ends, and can be resumed
  kScore,  ///< it counts as failure_score
  kDrop,   ///< the response is not learned from
};

/// How one term enters the total: `weight * factor(iteration) * value`, where value is the raw score clipped
/// to [clip_min, clip_max], or what a closed gate says.
struct TermOptions {
  std::string name = {};  ///< empty = the term's own
  double weight = 1.0;
  std::optional<double> clip_min = {}, clip_max = {};
  std::optional<TermGate> gate = {};
  std::vector<WeightPoint> schedule = {};  ///< linear between its points, constant outside; empty = factor 1
  TermNormalization normalize = TermNormalization::kNone;
  OnFailure on_failure = OnFailure::kStop;
  double failure_score = 0;

  template <class V>
  void visit_fields(V& v) {
    v.field("name", name, "Name in metrics; empty = the rule's");
    v.field("weight", weight, "Factor of the score in the total; 0 = the term is only reported", {-1e6, 1e6});
    v.field("clip_min", clip_min, "Lower bound of the score; none = off");
    v.field("clip_max", clip_max, "Upper bound of the score; none = off");
    v.group("gate", gate, "Another term that must reach a score for this one to count");
    v.list(
        "schedule", schedule,
        "Factors of the weight by iteration, linear between the points; evaluation uses the weight itself");
    v.choice("normalize", normalize,
             {{"none", TermNormalization::kNone},
              {"group", TermNormalization::kGroup},
              {"running", TermNormalization::kRunning}},
             "What the term's values are measured against before they are weighted; not in evaluation");
    v.choice("on_failure", on_failure,
             {{"stop", OnFailure::kStop}, {"score", OnFailure::kScore}, {"drop", OnFailure::kDrop}},
             "What becomes of a response that the term cannot score, e.g. after a time-out: stop ends the "
             "run, score counts failure_score, drop learns nothing from the response");
    v.field("failure_score", failure_score,
            "Score of a response that the term could not score: with on_failure: score, and in evaluation");
  }
  void validate(config::Problems& problems) const;
};

}  // namespace rlhf
