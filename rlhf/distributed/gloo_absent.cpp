#include "rlhf/distributed/gloo_collective.h"

namespace rlhf {

bool has_gloo() {
  return false;
}

std::unique_ptr<Collective> connect(const Launch& launch, std::chrono::milliseconds) {
  if (launch.world_size == 1) return make_one_process();
  fail<InvalidArgument>(
      launch.launcher, " has started ", launch.world_size,
      " ranks, and this program was built without Gloo; install libgloo-dev, then configure with "
      "-DRLHF_GLOO=ON and build again");
}

}  // namespace rlhf
