#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "reward/scoring/reward_term.h"
#include "rlhf/config/field.h"

namespace rlhf {

/// A server that scores responses.
struct HttpRewardOptions {
  std::string url;            ///< http:// or https://, host, port and path
  double timeout_s = 60;      ///< of one attempt, from its start to the last byte of the answer
  std::int64_t attempts = 3;  ///< in all; between them 0.1 s, 0.2 s, 0.4 s ... at most 5 s
  std::int64_t max_in_flight = 16;
  std::string token_variable;  ///< environment variable with a bearer token; "" = none is sent

  template <class V>
  void visit_fields(V& v) {
    v.required("url", url, "Where responses are posted: http://HOST:PORT/PATH or https://...");
    v.field("timeout_s", timeout_s, "Seconds of one attempt, from its start to the end of the answer",
            {0.001, 1e6});
    v.field("attempts", attempts, "Attempts after time-outs, lost connections and HTTP 429 or 5xx", {1, 100});
    v.field("max_in_flight", max_in_flight, "Requests at a time", {1, 1024});
    v.field("token_variable", token_variable,
            "Environment variable that holds a bearer token; empty = none is sent");
  }
  void validate(config::Problems& problems) const;
};

/// Scores by a server, one request a response, with the messages of OpenRLHF's remote reward models:
///
///     POST {"query": [prompt + response], "prompts": [prompt], "labels": [reference],
///           "responses": [response], "tasks": [task]}
///     200  {"rewards": [number]}
///
/// `query`, `prompts` and `labels` are OpenRLHF's, the others are additions. Requests are sent when a
/// response is complete and wait beside decoding. What has no answer in time, or another answer, is a
/// RewardUnavailable that names the server.
class HttpReward : public RewardTerm {
 public:
  /// @throws InvalidArgument for options that are not valid, or a token variable that is not set.
  explicit HttpReward(const HttpRewardOptions& options);
  /// Ends the requests that are under way.
  ~HttpReward() override;

  std::string_view name() const override { return "http"; }
  double score(const ScoredSample& scored) const override { return begin(scored).get(); }
  std::shared_future<double> begin(const ScoredSample& scored) const override;

 private:
  class Requests;
  std::unique_ptr<Requests> requests_;
};

}  // namespace rlhf
