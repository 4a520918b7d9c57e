#pragma once

#include <chrono>
#include <memory>

#include "rlhf/distributed/collective.h"
#include "rlhf/distributed/launch.h"

namespace rlhf {

/// Whether this build has a collective for several processes (CMake option RLHF_GLOO).
bool has_gloo();

/// Joins the ranks of a launch over TCP (Gloo, github.com/facebookincubator/gloo); one process is
/// `one_process` without a connection. All ranks must be of one architecture. With several ranks SIGPIPE is
/// ignored from then on, unless the process handles it.
/// @param timeout that a rank waits for another one: while they meet, and in every function
/// @throws CollectiveError when the ranks do not meet, InvalidArgument for several ranks without Gloo
std::unique_ptr<Collective> connect(const Launch& launch, std::chrono::milliseconds timeout);

}  // namespace rlhf
