#include "rollout/environment/subprocess.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <utility>

#include "rlhf/core/error.h"

namespace rlhf {
namespace {

constexpr int kPoll_ms = 10;

class Descriptor {
 public:
  explicit Descriptor(int fd = -1) : fd_(fd) {}
  Descriptor(Descriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Descriptor& operator=(Descriptor&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Descriptor() { close(); }
  int get() const { return fd_; }
  void close() {
    if (fd_ >= 0) ::close(fd_);
    fd_ = -1;
  }

 private:
  int fd_;
};

struct Pipe {
  Descriptor read, write;
};

[[noreturn]] void fail_system(const char* what) {
  fail<IoError>("cannot start a program: ", what, ": ", std::strerror(errno));
}

Pipe make_pipe() {
  int fds[2];
  if (pipe2(fds, O_CLOEXEC) != 0) fail_system("pipe");
  return {Descriptor(fds[0]), Descriptor(fds[1])};
}

// A file that exists in memory only: nothing blocks on it and nobody gets SIGPIPE.
Descriptor make_input(const std::string& text) {
  Descriptor file(memfd_create("input", MFD_CLOEXEC));
  if (file.get() < 0) fail_system("memfd_create");
  for (std::size_t done = 0; done < text.size();) {
    const ssize_t written = write(file.get(), text.data() + done, text.size() - done);
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) fail_system("write");
    done += static_cast<std::size_t>(written);
  }
  if (lseek(file.get(), 0, SEEK_SET) != 0) fail_system("lseek");
  return file;
}

// The path that exec gets; empty when there is no such program.
std::string find_program(const std::string& name) {
  if (name.find('/') != std::string::npos) return name;
  const char* path = std::getenv("PATH");
  const std::string folders = path ? path : "/usr/local/bin:/usr/bin:/bin";
  for (std::size_t begin = 0; begin <= folders.size();) {
    const std::size_t end = std::min(folders.find(':', begin), folders.size());
    const std::string candidate = folders.substr(begin, end - begin) + "/" + name;
    if (end > begin && access(candidate.c_str(), X_OK) == 0 && std::filesystem::is_regular_file(candidate))
      return candidate;
    begin = end + 1;
  }
  return "";
}

std::vector<std::string> kept_variables() {
  std::vector<std::string> variables;
  for (const char* name : {"PATH", "HOME", "LANG", "TMPDIR"})
    if (const char* value = std::getenv(name)) variables.push_back(concat(name, "=", value));
  return variables;
}

std::vector<char*> pointers(std::vector<std::string>& strings) {
  std::vector<char*> out;
  for (std::string& text : strings) out.push_back(text.data());
  out.push_back(nullptr);
  return out;
}

// All that a child does between fork and exec; nothing here may allocate or lock.
struct Child {
  const char* program;
  char* const* argv;
  char* const* variables;
  int input, output, errors, report;
  rlimit cpu, memory;
  int max_descriptors;

  static void keep_only_standard(int max_descriptors) {
#ifdef SYS_close_range
    constexpr unsigned kCloseOnExec = 4;  // CLOSE_RANGE_CLOEXEC
    if (syscall(SYS_close_range, 3u, ~0u, kCloseOnExec) == 0) return;
#endif
    for (int fd = 3; fd < max_descriptors; ++fd) fcntl(fd, F_SETFD, FD_CLOEXEC);
  }

  [[noreturn]] void run() const {
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, nullptr);
    signal(SIGPIPE, SIG_DFL);
    const rlimit no_core = {0, 0};
    const bool ready = setpgid(0, 0) == 0 && dup2(input, 0) == 0 && dup2(output, 1) == 1 &&
                       dup2(errors, 2) == 2 && setrlimit(RLIMIT_CPU, &cpu) == 0 &&
                       setrlimit(RLIMIT_CORE, &no_core) == 0 && setrlimit(RLIMIT_AS, &memory) == 0;
    if (ready) {
      keep_only_standard(max_descriptors);
      execve(program, argv, variables);
    }
    const int error = errno;
    [[maybe_unused]] const ssize_t written = write(report, &error, sizeof error);
    _exit(127);
  }
};

rlimit at_most(int resource, double value) {
  rlimit limit{};
  getrlimit(resource, &limit);
  const rlim_t wanted = value >= 1e18 ? RLIM_INFINITY : static_cast<rlim_t>(std::ceil(value));
  limit.rlim_cur = std::min(limit.rlim_max, wanted);
  // The CPU limit's first signal can be caught, its last cannot.
  limit.rlim_max = std::min(limit.rlim_max, wanted + (resource == RLIMIT_CPU && wanted != RLIM_INFINITY));
  return limit;
}

// A started program and the ends of its pipes. Kills its group and reaps it at the end at the latest.
class Process {
 public:
  Process(pid_t pid, Descriptor output, Descriptor errors)
      : pid_(pid), streams_{Stream{std::move(output), {}}, Stream{std::move(errors), {}}} {
    for (const Stream& stream : streams_) fcntl(stream.file.get(), F_SETFL, O_NONBLOCK);
  }
  ~Process() { reap(); }
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;

  SubprocessResult run(const SubprocessLimits& limits, const CallLimit& limit) {
    SubprocessResult result;
    result.end = wait_for_end(limits, limit);
    const int status = reap();
    read_streams(limits.max_output_bytes, 0);  // what was written before it was killed
    if (result.end == SubprocessResult::End::kExited && is_too_much(limits))
      result.end = SubprocessResult::End::kTooMuchOutput;
    if (result.end == SubprocessResult::End::kExited) {
      result.code = WIFEXITED(status) ? WEXITSTATUS(status) : WTERMSIG(status);
      if (WIFSIGNALED(status)) result.end = SubprocessResult::End::kSignalled;
    }
    result.output = std::move(streams_[0].text);
    result.errors = std::move(streams_[1].text);
    result.output.resize(std::min(result.output.size(), limits.max_output_bytes));
    result.errors.resize(std::min(result.errors.size(), limits.max_output_bytes));
    return result;
  }

 private:
  struct Stream {
    Descriptor file;
    std::string text;
  };

  bool is_too_much(const SubprocessLimits& limits) const {
    return streams_[0].text.size() > limits.max_output_bytes;
  }

  // Without reaping it, so that its group's number stays its own until the group is killed.
  bool has_ended() const {
    siginfo_t info{};
    return waitid(P_PID, static_cast<id_t>(pid_), &info, WEXITED | WNOHANG | WNOWAIT) != 0 ||
           info.si_pid != 0;
  }

  SubprocessResult::End wait_for_end(const SubprocessLimits& limits, const CallLimit& limit) {
    using End = SubprocessResult::End;
    const double deadline_s = std::min(limit.deadline_s, limit.clock() + limits.max_seconds);
    while (!has_ended()) {
      if (limit.is_abandoned()) return End::kAbandoned;
      if (limit.clock() >= deadline_s) return End::kTooSlow;
      read_streams(limits.max_output_bytes, kPoll_ms);
      if (is_too_much(limits)) return End::kTooMuchOutput;
    }
    return End::kExited;
  }

  // Reads what is there, waiting for it if need be. Standard error beyond the limit is dropped.
  void read_streams(std::size_t max_bytes, int wait_ms) {
    std::array<pollfd, 2> polled{};
    for (std::size_t i = 0; i < 2; ++i) polled[i] = {streams_[i].file.get(), POLLIN, 0};
    poll(polled.data(), polled.size(), wait_ms);
    for (Stream& stream : streams_) read_stream(stream, max_bytes);
    // Both are closed and it still runs: there is nothing for poll to wait for.
    if (wait_ms > 0 && streams_[0].file.get() < 0 && streams_[1].file.get() < 0) poll(nullptr, 0, 1);
  }

  static void read_stream(Stream& stream, std::size_t max_bytes) {
    std::array<char, 4096> buffer;
    for (int reads = 0; reads < 64 && stream.file.get() >= 0; ++reads) {
      const ssize_t got = ::read(stream.file.get(), buffer.data(), buffer.size());
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) return;
      if (got == 0) return stream.file.close();
      const std::size_t room = max_bytes + 1 - std::min(max_bytes + 1, stream.text.size());
      stream.text.append(buffer.data(), std::min(room, static_cast<std::size_t>(got)));
    }
  }

  int reap() {
    if (pid_ < 0) return 0;
    kill(-pid_, SIGKILL);
    int status = 0;
    while (waitpid(pid_, &status, 0) < 0 && errno == EINTR) continue;
    pid_ = -1;
    return status;
  }

  pid_t pid_;
  std::array<Stream, 2> streams_;
};

}  // namespace

SubprocessResult run_subprocess(const std::vector<std::string>& argv, const std::string& input,
                                const SubprocessLimits& limits, const CallLimit& limit) {
  RLHF_CHECK(!argv.empty(), "a program to run has no name");
  const std::string program = find_program(argv.front());
  SubprocessResult result;
  if (program.empty()) {
    result.errors = "there is no program '" + argv.front() + "' in PATH";
    return result;
  }
  const Descriptor in = make_input(input);
  Pipe out = make_pipe(), err = make_pipe(), report = make_pipe();
  std::vector<std::string> arguments = argv, variables = kept_variables();
  const std::vector<char*> argument_pointers = pointers(arguments), variable_pointers = pointers(variables);
  const Child child{program.c_str(),
                    argument_pointers.data(),
                    variable_pointers.data(),
                    in.get(),
                    out.write.get(),
                    err.write.get(),
                    report.write.get(),
                    at_most(RLIMIT_CPU, limits.max_cpu_seconds),
                    at_most(RLIMIT_AS, static_cast<double>(limits.max_memory_bytes)),
                    static_cast<int>(sysconf(_SC_OPEN_MAX))};
  const pid_t pid = fork();
  if (pid < 0) fail_system("fork");
  if (pid == 0) child.run();
  Process process(pid, std::move(out.read), std::move(err.read));
  for (Descriptor* end : {&out.write, &err.write, &report.write}) end->close();
  int error = 0;
  ssize_t got = 0;
  while ((got = ::read(report.read.get(), &error, sizeof error)) < 0 && errno == EINTR) continue;
  if (got == sizeof error) {
    result.errors = concat("cannot run ", program, ": ", std::strerror(error));
    return result;
  }
  return process.run(limits, limit);
}

}  // namespace rlhf
