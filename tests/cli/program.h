#pragma once
// Runs the built program as a process.

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <functional>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "rlhf/core/atomic_file.h"
#include "tests/catch.h"
#include "tests/data/temporary_folder.h"

namespace rlhf {

/// What a process left: its exit code (128 + signal when killed) and what it wrote.
struct Result {
  int code = -1;
  std::string out, err;

  /// Standard output, one JSON value a line.
  std::vector<nlohmann::json> lines() const {
    std::vector<nlohmann::json> values;
    std::istringstream in(out);
    for (std::string line; std::getline(in, line);) values.push_back(nlohmann::json::parse(line));
    return values;
  }
};

/// A folder with files for the program, which runs in it.
class Program {
 public:
  const TemporaryFolder& folder() const { return folder_; }
  std::string path(const std::string& name) const { return (folder_.path() / name).string(); }
  std::string write(const std::string& name, const std::string& text) const {
    return folder_.write(name, text).string();
  }

  /// Runs `rlhf ARGUMENTS`. `meanwhile` gets the process id while the program runs.
  Result run(const std::vector<std::string>& arguments, const std::string& input = "",
             const std::function<void(pid_t)>& meanwhile = {}) const {
    const std::string in = write("stdin", input), out = path("stdout"), err = path("stderr");
    std::vector<std::string> words = {RLHF_PROGRAM};
    words.insert(words.end(), arguments.begin(), arguments.end());
    std::vector<char*> argv;
    for (std::string& word : words) argv.push_back(word.data());
    argv.push_back(nullptr);
    const pid_t pid = fork();
    if (pid == 0) {
      // Only system calls between fork and exec.
      if (chdir(folder_.path().c_str()) != 0) _exit(120);
      dup2(open(in.c_str(), O_RDONLY), 0);
      dup2(open(out.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0666), 1);
      dup2(open(err.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0666), 2);
      execv(RLHF_PROGRAM, argv.data());
      _exit(121);
    }
    REQUIRE(pid > 0);
    if (meanwhile) meanwhile(pid);
    int status = 0;
    REQUIRE(waitpid(pid, &status, 0) == pid);
    Result result;
    result.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    result.out = read_text_file(out);
    result.err = read_text_file(err);
    return result;
  }

 private:
  TemporaryFolder folder_;
};

/// Waits until `condition` holds; false after `seconds`.
inline bool wait_until(const std::function<bool()>& condition, int seconds = 20) {
  for (int i = 0; i < seconds * 200; ++i) {
    if (condition()) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  return false;
}

}  // namespace rlhf
