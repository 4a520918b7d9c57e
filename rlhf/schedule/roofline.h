#pragma once

#include <span>
#include <string_view>

#include "rlhf/schedule/cost_model.h"

namespace rlhf::schedule {

/// A device as its data sheet describes it.
struct Accelerator {
  std::string_view name;
  double flops_per_s = 0;  ///< dense bf16
  double memory_bytes_per_s = 0;
  double node_bytes_per_s = 0;     ///< one direction, to devices of the same node
  double cluster_bytes_per_s = 0;  ///< one direction, one network card a device
  std::int64_t devices_per_node = 8;
  std::uint64_t memory_bytes = 0;
};
/// The devices that are known by name.
std::span<const Accelerator> accelerators();
/// @throws InvalidArgument listing the names.
const Accelerator& find_accelerator(std::string_view name);

/// A decoder, weights in bf16.
struct ModelShape {
  double parameters = 0, layers = 0, hidden = 0;
  double kv_width = 0;  ///< key (or value) numbers of a token in one layer: kv heads x head width
  double kv_bytes = 2;  ///< of one of them, scales included
};

/// Shares of the data sheet's numbers that programs reach. A model, not a measurement: calibrate with a run
/// where there is one.
struct Efficiency {
  double train_flops = 0.4;    ///< Llama 3 reports 38 to 43 % of bf16 peak on this class of device (2024)
  double forward_flops = 0.5;  ///< assumed: scoring and prefill have no backward pass and no optimizer state
  double memory = 0.7;         ///< assumed: long streams of reads
  double network = 0.7;        ///< assumed
  double step_s = 2e-3;        ///< assumed: launches and sampling of a decode step
};

/// Costs of a device from what it can compute and move at most; nothing of it is measured. Forward passes
/// cost 2 operations a parameter and token, training 6, attention comes on top with a context of
/// `lengths`; an optimizer step moves 30 bytes a parameter (bf16 weights, fp32 gradient, master weights and
/// two moments, read and written), publishing 4. Scoring is one forward pass. Memory is not checked.
CostModel roofline_costs(const Accelerator& accelerator, const ModelShape& model, const LengthModel& lengths,
                         const Efficiency& efficiency = {});

}  // namespace rlhf::schedule
