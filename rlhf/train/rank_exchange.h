#pragma once

#include <map>
#include <span>
#include <string>
#include <vector>

#include "rlhf/data/sample.h"
#include "rlhf/distributed/collective.h"
#include "rlhf/train/ppo_batch.h"

namespace rlhf {

/// Returns the samples of all ranks, rank by rank; each gives its own. A sample's trunk stays where it is.
std::vector<Sample> gather_samples(Collective& collective, std::vector<Sample> own);

/// Gives every rank what the judges and models of each response's rank have said of it. `rank_of[i]` has
/// scored responses[i]; tokens are there already.
void exchange_scores(Collective& collective, std::vector<PpoResponse>& responses,
                     std::span<const int> rank_of);

/// Adds up the numbers of all ranks by name; a rank need not have all names.
void add_ranks(Collective& collective, std::map<std::string, double>& numbers);

}  // namespace rlhf
