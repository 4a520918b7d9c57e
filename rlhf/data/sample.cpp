#include "rlhf/data/sample.h"

namespace rlhf {

const char* to_string(FinishReason reason) {
  switch (reason) {
    case FinishReason::kStop:
      return "stop";
    case FinishReason::kLength:
      return "length";
    case FinishReason::kStopString:
      return "stop_string";
    case FinishReason::kCancelled:
      return "cancelled";
    case FinishReason::kDeadline:
      return "deadline";
    case FinishReason::kTurns:
      return "turns";
    case FinishReason::kEnvironmentError:
      return "environment_error";
  }
  return "unknown";
}

bool is_cut_short(FinishReason reason) {
  return reason != FinishReason::kStop && reason != FinishReason::kStopString;
}

}  // namespace rlhf
