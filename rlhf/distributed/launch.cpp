#include "rlhf/distributed/launch.h"

#include <charconv>
#include <cstdlib>
#include <vector>

#include "rlhf/core/error.h"

namespace rlhf {
namespace {

constexpr int kMostRanks = 4096, kDefaultPort = 29500;

// The variables of one launcher.
struct Variables {
  const char *launcher, *rank, *size, *local_size;
};
constexpr Variables kTorchrun{"torchrun", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"},
    kOpenMpi{"Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"},
    kPmi{"MPI (PMI)", "PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS"};

class EnvironmentReader {
 public:
  explicit EnvironmentReader(const VariableLookup& environment) : environment_(environment) {}

  std::optional<std::string> text(const std::string& name) const {
    auto value = environment_(name);
    if (value && value->empty()) value.reset();
    return value;
  }
  bool has(const std::string& name) const { return text(name).has_value(); }

  std::optional<int> number(const std::string& name, int least, int most) const {
    const auto value = text(name);
    if (!value) return std::nullopt;
    int number = 0;
    const char* end = value->data() + value->size();
    const auto [stopped, error] = std::from_chars(value->data(), end, number);
    if (error != std::errc() || stopped != end || number < least || number > most)
      fail<ConfigError>("environment variable ", name, " is '", *value, "', expected a whole number from ",
                        least, " to ", most);
    return number;
  }

 private:
  const VariableLookup& environment_;
};

std::optional<Launch> ranks_of(const EnvironmentReader& reader, const Variables& names) {
  const bool has_rank = reader.has(names.rank), has_size = reader.has(names.size);
  if (!has_rank && !has_size) return std::nullopt;
  if (has_rank != has_size)
    fail<ConfigError>("environment variable ", has_rank ? names.rank : names.size, " is set and ",
                      has_rank ? names.size : names.rank, " is not; a launcher sets both (", names.launcher,
                      ")");
  Launch launch;
  launch.launcher = names.launcher;
  launch.world_size = *reader.number(names.size, 1, kMostRanks);
  launch.rank = *reader.number(names.rank, 0, kMostRanks);
  if (launch.rank >= launch.world_size)
    fail<ConfigError>("environment variable ", names.rank, " is ", launch.rank, " and ", names.size, " is ",
                      launch.world_size, "; ranks count from 0");
  return launch;
}

// srun sets the number of the step; the batch script around it has only the job's variables.
bool is_slurm_step(const EnvironmentReader& reader) {
  return reader.has("SLURM_STEP_ID") && reader.has("SLURM_PROCID");
}

std::optional<Launch> slurm_ranks(const EnvironmentReader& reader) {
  if (!is_slurm_step(reader)) return std::nullopt;
  const char* size = reader.has("SLURM_STEP_NUM_TASKS") ? "SLURM_STEP_NUM_TASKS" : "SLURM_NTASKS";
  return ranks_of(reader, {"Slurm", "SLURM_PROCID", size, ""});
}

// The first host of a list as Slurm writes it: "a1,b", "node[03-07,9],x" is node03.
std::string first_host(const std::string& list) {
  const std::size_t bracket = list.find('['), comma = list.find(',');
  if (bracket == std::string::npos || comma < bracket) return list.substr(0, comma);
  const std::size_t end = list.find_first_of("-,]", bracket + 1);
  if (end == std::string::npos) return list;
  const std::size_t closed = list.find(']', bracket);
  const std::size_t next = closed == std::string::npos ? closed : list.find(',', closed);
  const std::string suffix =
      closed == std::string::npos
          ? ""
          : list.substr(closed + 1, next == std::string::npos ? next : next - closed - 1);
  return list.substr(0, bracket) + list.substr(bracket + 1, end - bracket - 1) + suffix;
}

std::optional<std::string> slurm_address(const EnvironmentReader& reader) {
  if (reader.text("SLURM_STEP_NUM_NODES") == "1") return "127.0.0.1";
  for (const char* name : {"SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"})
    if (const auto list = reader.text(name)) return first_host(*list);
  return reader.text("SLURM_LAUNCH_NODE_IPADDR");
}

// Two jobs on one machine get different ports.
int slurm_port(const EnvironmentReader& reader) {
  const auto job = reader.number("SLURM_JOB_ID", 0, 2147483647);
  return 15000 + job.value_or(0) % 10000;
}

void find_address(const EnvironmentReader& reader, const Variables* names, Launch& launch) {
  const auto address = reader.text("MASTER_ADDR");
  const auto port = reader.number("MASTER_PORT", 1, 65534);
  const bool in_slurm = is_slurm_step(reader);
  const bool all_here = names && reader.number(names->local_size, 1, kMostRanks) == launch.world_size;
  if (address)
    launch.address = *address;
  else if (in_slurm)
    launch.address = slurm_address(reader).value_or("");
  else if (all_here)
    launch.address = "127.0.0.1";
  if (launch.address.empty())
    fail<ConfigError>("environment variable MASTER_ADDR is not set, and ", launch.launcher,
                      " does not say that all ", launch.world_size,
                      " ranks are on this machine; set it to the address of rank 0");
  if (port)
    launch.port = *port;
  else if (in_slurm)
    launch.port = slurm_port(reader);
  else if (all_here)
    launch.port = kDefaultPort;
  else
    fail<ConfigError>("environment variable MASTER_PORT is not set; set it to a free port of rank 0 at ",
                      launch.address);
  if (port && reader.text("TORCHELASTIC_USE_AGENT_STORE") == "True") ++launch.port;
}

}  // namespace

std::optional<std::string> process_environment(const std::string& name) {
  const char* value = std::getenv(name.c_str());
  return value ? std::optional<std::string>(value) : std::nullopt;
}

Launch read_launch(const VariableLookup& environment) {
  const EnvironmentReader reader(environment);
  Launch launch;
  const Variables* found = nullptr;
  for (const Variables* names : {&kTorchrun, &kOpenMpi, &kPmi}) {
    const auto ranks = ranks_of(reader, *names);
    if (!ranks) continue;
    launch = *ranks;
    found = names;
    break;
  }
  if (!found)
    if (const auto ranks = slurm_ranks(reader)) launch = *ranks;
  if (launch.world_size == 1) return launch;
  launch.interface = reader.text("GLOO_SOCKET_IFNAME").value_or("");
  find_address(reader, found, launch);
  return launch;
}

}  // namespace rlhf
