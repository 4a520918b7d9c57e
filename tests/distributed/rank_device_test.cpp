// Which GPU each rank takes.
#include "rlhf/train/rank_device.h"

#include "tests/catch.h"
#include "tests/distributed/silent_rank.h"

using namespace rlhf;

namespace {

using Ranks = std::vector<RankGpus>;
using Chosen = std::vector<std::optional<int>>;

const std::vector<std::string> kAll = {"a", "b"};

// Rank 0 of two; the other one runs elsewhere and has no GPU.
class WithoutGpuElsewhere : public SilentRank {
 public:
  WithoutGpuElsewhere() : SilentRank(0, 2) {}
  std::vector<std::string> all_gather_bytes(const std::string& own) override {
    return {own, R"({"machine": "elsewhere", "names": [], "problem": "it is missing"})"};
  }
};

}  // namespace

TEST_CASE("ranks of a machine take its GPUs in their order") {
  const Ranks ranks = {{"m", kAll, ""}, {"n", kAll, ""}, {"m", kAll, ""}, {"n", kAll, ""}};
  CHECK(choose_gpus(ranks) == Chosen{0, 0, 1, 1});
  CHECK(gpu_problem(ranks).empty());
}

TEST_CASE("a rank that is shown one GPU takes that, as number 0") {
  const Ranks ranks = {{"m", {"a"}, ""}, {"m", {"b"}, ""}, {"m", {"c"}, ""}};
  CHECK(choose_gpus(ranks) == Chosen{0, 0, 0});
}

TEST_CASE("GPUs that cannot be used are passed over") {
  const Ranks ranks = {{"m", {"", "b", "c"}, ""}, {"m", {"", "b", "c"}, ""}};
  CHECK(choose_gpus(ranks) == Chosen{1, 2});
}

TEST_CASE("too few GPUs are named with both numbers, and a rank without any with its reason") {
  const Ranks few = {{"m", kAll, ""}, {"m", kAll, ""}, {"n", kAll, ""}, {"m", kAll, ""}};
  CHECK(choose_gpus(few) == Chosen{0, 1, 0, std::nullopt});
  CHECK(gpu_problem(few) ==
        "rank 3 finds no GPU for itself: 3 ranks run on its machine and 2 GPUs can be used there; every rank "
        "needs one of its own");
  CHECK_THAT(gpu_problem(Ranks{{"m", {"a", ""}, ""}, {"m", {"a", ""}, ""}}),
             ContainsSubstring("2 ranks run on its machine and 1 GPU can be used"));
  CHECK(gpu_problem(Ranks{{"m", kAll, ""}, {"n", {}, "no NVIDIA driver was found"}}) ==
        "rank 1: no NVIDIA driver was found");
  CHECK(gpu_problem(Ranks{{"m", {""}, "too old"}, {"m", {""}, "too old"}}) == "rank 0: too old");
}

TEST_CASE("GPUs are for every rank or for none") {
  WithoutGpuElsewhere ranks;
  const std::string problem = cuda_status().usable ? "rank 1: it is missing" : "rank 0: ";
  CHECK_THROWS_AS(RankDevice(Device::kCuda, ranks, {}), ConfigError);
  CHECK_THROWS_WITH(RankDevice(Device::kCuda, ranks, {}), ContainsSubstring("device: cuda: " + problem));
  const RankDevice automatic(Device::kAuto, ranks, {});
  CHECK_FALSE(automatic.accelerator());
  CHECK_THAT(automatic.text(), ContainsSubstring("cpu (" + problem));
  CHECK(RankDevice(Device::kCpu, ranks, {}).text() == "cpu");
  CHECK(RankDevice(Device::kCpu, one_process(), {}).text() == "cpu");
}
