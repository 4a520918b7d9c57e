// What launchers say in the environment.
#include "rlhf/distributed/launch.h"

#include <map>

#include "rlhf/core/error.h"
#include "tests/catch.h"

using namespace rlhf;

namespace {

using Variables = std::map<std::string, std::string>;

Launch launch_of(const Variables& variables) {
  return read_launch([&](const std::string& name) -> std::optional<std::string> {
    const auto found = variables.find(name);
    return found == variables.end() ? std::nullopt : std::optional(found->second);
  });
}

void check_launch(const Variables& variables, const std::string& launcher, int rank, int size,
                  const std::string& address, int port) {
  const Launch launch = launch_of(variables);
  CHECK(launch.launcher == launcher);
  CHECK(launch.rank == rank);
  CHECK(launch.world_size == size);
  CHECK(launch.address == address);
  CHECK(launch.port == port);
}

}  // namespace

TEST_CASE("a process that no launcher has started is alone") {
  check_launch({}, "", 0, 1, "", 0);
  check_launch({{"RANK", "0"}, {"WORLD_SIZE", "1"}}, "torchrun", 0, 1, "", 0);
  // Values that a shell exports empty are not set.
  check_launch({{"RANK", ""}, {"WORLD_SIZE", ""}}, "", 0, 1, "", 0);
}

TEST_CASE("torchrun's variables are read") {
  Variables torchrun = {{"RANK", "3"},           {"WORLD_SIZE", "4"},
                        {"LOCAL_RANK", "1"},     {"LOCAL_WORLD_SIZE", "2"},
                        {"MASTER_ADDR", "head"}, {"MASTER_PORT", "29400"}};
  check_launch(torchrun, "torchrun", 3, 4, "head", 29400);
  torchrun["TORCHELASTIC_USE_AGENT_STORE"] = "True";
  torchrun["GLOO_SOCKET_IFNAME"] = "eth1";
  check_launch(torchrun, "torchrun", 3, 4, "head", 29401);
  CHECK(launch_of(torchrun).interface == "eth1");
  // torchrun under srun: one task of Slurm is several ranks.
  torchrun.insert({{"SLURM_PROCID", "1"}, {"SLURM_NTASKS", "2"}, {"SLURM_STEP_ID", "0"}});
  check_launch(torchrun, "torchrun", 3, 4, "head", 29401);
}

TEST_CASE("mpirun's variables are read, of Open MPI and of MPICH") {
  Variables open = {
      {"OMPI_COMM_WORLD_RANK", "1"}, {"OMPI_COMM_WORLD_SIZE", "2"}, {"OMPI_COMM_WORLD_LOCAL_SIZE", "2"}};
  check_launch(open, "Open MPI", 1, 2, "127.0.0.1", 29500);
  open["MASTER_PORT"] = "4000";
  check_launch(open, "Open MPI", 1, 2, "127.0.0.1", 4000);
  open["OMPI_COMM_WORLD_LOCAL_SIZE"] = "1";
  CHECK_THROWS_WITH(launch_of(open),
                    ContainsSubstring("MASTER_ADDR is not set, and Open MPI does not say that all 2"));
  open["MASTER_ADDR"] = "10.0.0.7";
  check_launch(open, "Open MPI", 1, 2, "10.0.0.7", 4000);
  check_launch({{"PMI_RANK", "0"}, {"PMI_SIZE", "3"}, {"MPI_LOCALNRANKS", "3"}}, "MPI (PMI)", 0, 3,
               "127.0.0.1", 29500);
}

TEST_CASE("srun's variables are read, and a batch script is one process") {
  Variables slurm = {{"SLURM_PROCID", "5"},
                     {"SLURM_NTASKS", "8"},
                     {"SLURM_JOB_ID", "123456"},
                     {"SLURM_JOB_NODELIST", "gpu[07-09,12],login"}};
  check_launch(slurm, "", 0, 1, "", 0);
  slurm["SLURM_STEP_ID"] = "0";
  check_launch(slurm, "Slurm", 5, 8, "gpu07", 15000 + 3456);
  slurm["SLURM_STEP_NUM_TASKS"] = "6";
  slurm["SLURM_STEP_NODELIST"] = "a3,gpu[08-09]";
  check_launch(slurm, "Slurm", 5, 6, "a3", 18456);
  for (const auto& [list, first] :
       Variables{{"n[3]", "n3"}, {"n[3,5]-ib,m", "n3-ib"}, {"one", "one"}, {"a,b", "a"}}) {
    slurm["SLURM_STEP_NODELIST"] = list;
    CHECK(launch_of(slurm).address == first);
  }
  slurm["SLURM_STEP_NUM_NODES"] = "1";
  CHECK(launch_of(slurm).address == "127.0.0.1");
  slurm["MASTER_ADDR"] = "10.1.1.1";
  slurm["MASTER_PORT"] = "7";
  check_launch(slurm, "Slurm", 5, 6, "10.1.1.1", 7);
}

TEST_CASE("variables that are missing or make no sense are named") {
  const auto check_error = [](const Variables& variables, const std::string& text) {
    CHECK_THROWS_AS(launch_of(variables), ConfigError);
    CHECK_THROWS_WITH(launch_of(variables), ContainsSubstring(text));
  };
  check_error({{"RANK", "1"}}, "RANK is set and WORLD_SIZE is not");
  check_error({{"WORLD_SIZE", "2"}}, "WORLD_SIZE is set and RANK is not");
  check_error({{"OMPI_COMM_WORLD_RANK", "0"}}, "OMPI_COMM_WORLD_RANK is set and OMPI_COMM_WORLD_SIZE is not");
  check_error({{"RANK", "2"}, {"WORLD_SIZE", "2"}}, "RANK is 2 and WORLD_SIZE is 2; ranks count from 0");
  check_error({{"RANK", "x"}, {"WORLD_SIZE", "2"}}, "RANK is 'x', expected a whole number from 0");
  check_error({{"RANK", "0"}, {"WORLD_SIZE", "2 "}}, "WORLD_SIZE is '2 ', expected a whole number from 1");
  check_error({{"RANK", "-1"}, {"WORLD_SIZE", "2"}}, "RANK is '-1'");
  check_error({{"RANK", "0"}, {"WORLD_SIZE", "2"}}, "MASTER_ADDR is not set");
  check_error({{"RANK", "0"}, {"WORLD_SIZE", "2"}, {"MASTER_ADDR", "h"}}, "MASTER_PORT is not set");
  check_error({{"RANK", "0"}, {"WORLD_SIZE", "2"}, {"MASTER_ADDR", "h"}, {"MASTER_PORT", "70000"}},
              "MASTER_PORT is '70000', expected a whole number from 1 to 65534");
}
