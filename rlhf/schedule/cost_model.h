#pragma once

#include "rlhf/config/field.h"

/// What the work of one device costs, in seconds: the numbers that a simulation is made of. A file of them is
/// read with `rlhf simulate --rates`; docs/design/scheduler.md says where they come from.
namespace rlhf::schedule {

/// How long responses are. Log-normal: exp(mu + sigma z), rounded, at least 1, clipped at
/// rollout.max_new_tokens.
struct LengthModel {
  double prompt_tokens = 100;  ///< of every prompt
  double mean_tokens = 100;    ///< of a response before it is clipped
  double sigma = 0;            ///< of the logarithm of the length; 0 = all responses are equally long

  template <class V>
  void visit_fields(V& v) {
    v.field("prompt_tokens", prompt_tokens, "Tokens of a prompt", {1, 1 << 20});
    v.field("mean_tokens", mean_tokens, "Mean tokens of a response before rollout.max_new_tokens clips it",
            {1, 1 << 20});
    v.field("sigma", sigma, "Standard deviation of the logarithm of the length; 0 = all equal", {0, 5});
  }
};

/// One decode step costs step_s + max(weights_s, sequence_s * sequences) + context_token_s * cached tokens +
/// prefill_token_s * prompt tokens.
struct DecodeCosts {
  double step_s = 0;           ///< launches, sampling
  double weights_s = 0;        ///< reading the weights, hidden behind the arithmetic of a large batch
  double sequence_s = 0;       ///< arithmetic of one sequence
  double context_token_s = 0;  ///< reading one cached token
  double prefill_token_s = 0;

  template <class V>
  void visit_fields(V& v) {
    v.field("step_s", step_s, "Seconds of a decode step whatever is in it", config::at_least(0));
    v.field("weights_s", weights_s, "Least seconds of the arithmetic of a step: reading the weights",
            config::at_least(0));
    v.field("sequence_s", sequence_s, "Seconds of arithmetic per running sequence", config::at_least(0));
    v.field("context_token_s", context_token_s, "Seconds per token in the cache of the running sequences",
            config::at_least(0));
    v.field("prefill_token_s", prefill_token_s, "Seconds per prompt token", config::at_least(0));
  }
};

/// Scoring a set of samples: the device computes for call_s + token_s * tokens; the reward servers take
/// latency_s, and a failed call timeout_s before it is made again.
struct ScoreCosts {
  double call_s = 0, token_s = 0;
  double latency_s = 0;  ///< the train lane waits, the device is free
  double failure_probability = 0;
  double timeout_s = 0;

  template <class V>
  void visit_fields(V& v) {
    v.field("call_s", call_s, "Seconds of computing per call", config::at_least(0));
    v.field("token_s", token_s, "Seconds of computing per prompt or response token", config::at_least(0));
    v.field("latency_s", latency_s, "Seconds that a call waits for the reward servers", config::at_least(0));
    v.field("failure_probability", failure_probability, "Share of reward calls that fail and are repeated",
            {0, 0.9});
    v.field("timeout_s", timeout_s, "Seconds until a failed reward call is given up", config::at_least(0));
  }
  void validate(config::Problems& problems) const {
    if (timeout_s > 0 && failure_probability == 0)
      problems.add("timeout_s", "only failing calls time out; set failure_probability");
  }
};

struct TrainCosts {
  double micro_batch_s = 0, token_s = 0;  ///< forward and backward
  double advantage_s = 0;                 ///< of a call
  double optimize_s = 0, finish_s = 0, publish_s = 0;

  template <class V>
  void visit_fields(V& v) {
    v.field("micro_batch_s", micro_batch_s, "Seconds of a micro-batch whatever is in it",
            config::at_least(0));
    v.field("token_s", token_s, "Seconds of forward and backward per prompt or response token",
            config::at_least(0));
    v.field("advantage_s", advantage_s, "Seconds of one computation of advantages", config::at_least(0));
    v.field("optimize_s", optimize_s, "Seconds of an optimizer step", config::at_least(0));
    v.field("finish_s", finish_s, "Seconds of report and checkpoint of an iteration", config::at_least(0));
    v.field("publish_s", publish_s, "Seconds of handing weights to generation", config::at_least(0));
  }
};

/// Speed of a lane while the other is computing too, relative to having the device alone. Above 1 where
/// threads of one lane hinder each other, as they do in models of a few thousand parameters.
struct SharingModel {
  double generate = 0.5, train = 0.5;

  template <class V>
  void visit_fields(V& v) {
    v.field("generate", generate, "Speed of generation while training runs on the device too; alone = 1",
            {0.01, 100});
    v.field("train", train, "Speed of training while generation runs on the device too; alone = 1",
            {0.01, 100});
  }
};

/// Gradients are summed over all devices in every optimizer step, in a ring.
struct NetworkModel {
  double gradient_bytes = 0;  ///< of the whole model
  std::int64_t devices_per_node = 8;
  double node_bytes_per_s = 1e11;     ///< of one device to its neighbour in a node
  double cluster_bytes_per_s = 1e10;  ///< of one device to its neighbour in another node
  double hop_s = 0;                   ///< latency of a message

  template <class V>
  void visit_fields(V& v) {
    v.field("gradient_bytes", gradient_bytes, "Bytes that an optimizer step sums over the devices",
            config::at_least(0));
    v.field("devices_per_node", devices_per_node, "Devices with a fast link", {1, 1e6});
    v.field("node_bytes_per_s", node_bytes_per_s, "Bytes a second and device inside a node",
            config::positive());
    v.field("cluster_bytes_per_s", cluster_bytes_per_s, "Bytes a second and device between nodes",
            config::positive());
    v.field("hop_s", hop_s, "Seconds of latency; log2(devices) of them an optimizer step",
            config::at_least(0));
  }
  /// Seconds of summing the gradients over `devices`; 0 on one. Ring: every device sends
  /// 2 (devices - 1) / devices of the bytes; the slowest link counts.
  double all_reduce_s(std::int64_t devices) const;
};

struct CostModel {
  LengthModel lengths;
  DecodeCosts decode;
  ScoreCosts score;
  TrainCosts train;
  SharingModel sharing;
  NetworkModel network;

  template <class V>
  void visit_fields(V& v) {
    v.group("lengths", lengths, "Prompts and responses");
    v.group("decode", decode, "Generation");
    v.group("score", score, "Scoring");
    v.group("train", train, "Training");
    v.group("sharing", sharing, "Both lanes on one device");
    v.group("network", network, "Between devices");
  }
};

}  // namespace rlhf::schedule
