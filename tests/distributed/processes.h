#pragma once
// Starts the ranks of a run as processes, as a launcher does.

#include <fcntl.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "rlhf/core/atomic_file.h"
#include "tests/catch.h"
#include "tests/data/temporary_folder.h"

namespace rlhf {

using Variables = std::map<std::string, std::string>;

/// A port of this machine that nobody listens on.
inline int free_port() {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  REQUIRE(bind(fd, reinterpret_cast<sockaddr*>(&address), size) == 0);
  REQUIRE(getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size) == 0);
  close(fd);
  return ntohs(address.sin_port);
}

/// A process that runs in `folder`, with its output in files there.
class Process {
 public:
  Process(const TemporaryFolder& folder, const std::string& name, std::vector<std::string> words,
          const Variables& variables)
      : out_(folder.path() / (name + ".out")), err_(folder.path() / (name + ".err")) {
    std::vector<std::string> environment;
    for (char** entry = environ; *entry; ++entry) environment.emplace_back(*entry);
    for (const auto& [key, value] : variables) environment.push_back(key + "=" + value);
    const auto pointers = [](std::vector<std::string>& texts) {
      std::vector<char*> pointers;
      for (std::string& text : texts) pointers.push_back(text.data());
      pointers.push_back(nullptr);
      return pointers;
    };
    const auto argv = pointers(words), envp = pointers(environment);
    // Before the fork, so that they are there as soon as this constructor is done.
    const int in = open("/dev/null", O_RDONLY | O_CLOEXEC), out = create(out_), err = create(err_);
    pid_ = fork();
    if (pid_ == 0) {
      // Only system calls between fork and exec.
      if (chdir(folder.path().c_str()) != 0) _exit(120);
      dup2(in, 0);
      dup2(out, 1);
      dup2(err, 2);
      execve(argv[0], argv.data(), envp.data());
      _exit(121);
    }
    for (const int fd : {in, out, err}) close(fd);
    REQUIRE(pid_ > 0);
  }
  Process(Process&& other) noexcept
      : pid_(std::exchange(other.pid_, -1)), code_(other.code_), out_(other.out_), err_(other.err_) {}
  ~Process() {
    if (pid_ <= 0) return;
    ::kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
  }

  void signal(int number) const { ::kill(pid_, number); }
  /// Exit code, 128 + signal when killed; -1 when it has not ended after `seconds`.
  int wait(double seconds = 60) {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
    while (pid_ > 0) {
      int status = 0;
      if (waitpid(pid_, &status, WNOHANG) == pid_) {
        code_ = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
        pid_ = -1;
      } else if (std::chrono::steady_clock::now() > deadline) {
        return -1;
      } else {
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
      }
    }
    return code_;
  }
  /// What it has written so far.
  std::string out() const { return read_text_file(out_); }
  std::string err() const { return read_text_file(err_); }

 private:
  static int create(const std::filesystem::path& file) {
    const int fd = open(file.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    REQUIRE(fd >= 0);
    return fd;
  }

  pid_t pid_ = -1;
  int code_ = -1;
  std::filesystem::path out_, err_;
};

/// What torchrun sets for one rank, on this machine.
inline Variables rank_variables(int rank, int world_size, int port) {
  return {{"RANK", std::to_string(rank)},       {"WORLD_SIZE", std::to_string(world_size)},
          {"LOCAL_RANK", std::to_string(rank)}, {"LOCAL_WORLD_SIZE", std::to_string(world_size)},
          {"MASTER_ADDR", "127.0.0.1"},         {"MASTER_PORT", std::to_string(port)}};
}

/// Starts the same command as every rank of a run.
inline std::vector<Process> start_ranks(const TemporaryFolder& folder, const std::vector<std::string>& words,
                                        int world_size, int port = free_port()) {
  std::vector<Process> ranks;
  for (int rank = 0; rank < world_size; ++rank)
    ranks.emplace_back(folder, "rank" + std::to_string(rank), words, rank_variables(rank, world_size, port));
  return ranks;
}

}  // namespace rlhf
