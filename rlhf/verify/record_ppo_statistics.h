#pragma once

#include <map>
#include <string>
#include <vector>

#include "rlhf/verify/record_object.h"
#include "rlhf/verify/record_ppo_rollout.h"

namespace rlhf::verify {

/// TRL's tables of statistics, [epochs, mini-batches, accumulation steps]: kept over the updates, zero where
/// no micro-batch writes (a mini-batch may have fewer than the accumulation steps), float32 in every case.
class PpoStatistics {
 public:
  explicit PpoStatistics(const PpoRecordOptions& options);

  struct Place {
    std::size_t epoch = 0, mini_batch = 0, micro_batch = 0;
  };
  void put(const std::string& table, const Place& place, double value);
  /// Marks an entry that cannot be computed without padding.
  void put_unknown(const std::string& table, const Place& place);
  /// Compares the tables of an update.
  void check_tables(RecordObject& update, Tolerance tolerance);
  /// Compares the logged metrics of an update; `number` counts updates from 1.
  void check_metrics(RecordObject& update, const PpoRollout& rollout, double learning_rate,
                     std::size_t number, Tolerance tolerance);

 private:
  struct Table {
    std::vector<double> values;
    std::vector<std::uint8_t> unknown;
  };
  std::size_t index(const Place& place) const;
  bool complete(const std::string& table) const;

  const PpoRecordOptions& options_;
  std::map<std::string, Table> tables_;
};

}  // namespace rlhf::verify
