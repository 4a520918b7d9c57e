#pragma once

#include <functional>
#include <optional>
#include <string>

namespace rlhf {

/// Place of this process among those that a launcher has started, and where rank 0 is met.
struct Launch {
  std::string
      launcher;  ///< who said so, for messages: "torchrun", "Open MPI", "MPI (PMI)", "Slurm"; "" = nobody
  int rank = 0;
  int world_size = 1;
  std::string address;    ///< of rank 0: name or number; empty with one process
  int port = 0;           ///< on which rank 0 listens while the ranks find each other
  std::string interface;  ///< network interface to talk over; empty = the one that leads to rank 0
};

/// Value of a variable of the environment, or nothing.
using VariableLookup = std::function<std::optional<std::string>(const std::string& name)>;
/// The environment of this process.
std::optional<std::string> process_environment(const std::string& name);

/// Reads what a launcher says, the first of:
/// - torchrun, or a person: RANK, WORLD_SIZE. Where torchrun's agent holds MASTER_PORT itself
///   (TORCHELASTIC_USE_AGENT_STORE=True), rank 0 listens on the next port.
/// - Open MPI's mpirun: OMPI_COMM_WORLD_RANK, OMPI_COMM_WORLD_SIZE, OMPI_COMM_WORLD_LOCAL_SIZE
/// - MPICH's and Intel's: PMI_RANK, PMI_SIZE, MPI_LOCALNRANKS
/// - Slurm's srun: SLURM_PROCID and SLURM_STEP_NUM_TASKS or SLURM_NTASKS, only with SLURM_STEP_ID: a batch
///   script itself has the others as well and is one process.
///
/// Rank 0 is met at MASTER_ADDR:MASTER_PORT. Without them: under Slurm on the first host of the step's list
/// and a port made of the job's number; elsewhere on this machine and port 29500, if the launcher says that
/// all ranks are here. GLOO_SOCKET_IFNAME names the interface, as it does for PyTorch.
/// @throws ConfigError naming the variables that are missing, no numbers or contradict each other
Launch read_launch(const VariableLookup& environment = process_environment);

}  // namespace rlhf
