#pragma once

#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "rlhf/distributed/launch.h"

namespace rlhf {

/// How ranks find each other: one exchange of short texts through rank 0, which listens for it at the
/// launch's address. Whatever else connects to the port is dropped; nothing waits longer than the time-out.
class Rendezvous {
 public:
  /// Rank 0 begins to listen; the others connect, and try again while nobody listens.
  /// @throws CollectiveError naming the address
  Rendezvous(const Launch& launch, std::chrono::milliseconds timeout);
  ~Rendezvous();
  Rendezvous(const Rendezvous&) = delete;
  Rendezvous& operator=(const Rendezvous&) = delete;

  /// Address of this machine as the others reach it: a number, or its name.
  const std::string& local_address() const;
  /// Returns every rank's text, once. @throws CollectiveError naming the ranks that did not come, or what
  /// does not fit: two processes with one rank, another world size
  std::vector<std::string> exchange(const std::string& own);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace rlhf
