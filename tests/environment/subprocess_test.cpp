// Programs that misbehave in every way end in an answer, soon, and leave nothing behind.
#include "rollout/environment/subprocess.h"

#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <fstream>
#include <thread>

#include "rollout/environment/subprocess_tool.h"
#include "tests/catch.h"

using namespace rlhf;
using End = SubprocessResult::End;

namespace {

// A busy machine must not look like a slow program.
SubprocessLimits patient() {
  SubprocessLimits limits;
  limits.max_seconds = limits.max_cpu_seconds = 600;
  return limits;
}

SubprocessResult shell(const std::string& script, SubprocessLimits limits = patient(),
                       const std::string& input = "", CallLimit limit = {}) {
  return run_subprocess({"sh", "-c", script}, input, limits, limit);
}

SubprocessLimits quick() {
  SubprocessLimits limits;
  limits.max_seconds = 0.2;
  return limits;
}

// Waits for a process to go, at most a few seconds; zombies of a foreign parent count as gone.
bool is_gone(int pid) {
  for (int i = 0; i < 500; ++i) {
    std::ifstream status("/proc/" + std::to_string(pid) + "/stat");
    std::string id, name, state;
    if (!(status >> id >> name >> state) || state == "Z") return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  return false;
}

}  // namespace

TEST_CASE("input goes in, output comes out") {
  const SubprocessResult result = run_subprocess({"cat"}, "hello\nworld", patient(), {});
  CHECK(result.end == End::kExited);
  CHECK(result.code == 0);
  CHECK(result.output == "hello\nworld");
  CHECK(shell("exit 0", patient(), std::string(200000, 'x')).code == 0);  // input that nobody reads
  CHECK(run_subprocess({"printf", "%s|", "a b", "$HOME", "*"}, "", patient(), {}).output == "a b|$HOME|*|");
}

TEST_CASE("a status, a signal and a missing program are told apart") {
  const SubprocessResult status = shell("echo out; echo oops >&2; exit 3");
  CHECK(status.end == End::kExited);
  CHECK(status.code == 3);
  CHECK(status.output == "out\n");
  CHECK(status.errors == "oops\n");
  const SubprocessResult signalled = shell("kill -TERM $$");
  CHECK(signalled.end == End::kSignalled);
  CHECK(signalled.code == SIGTERM);
  for (const char* name : {"no-such-program-here", "/no/such/program", "/etc/passwd", "/"}) {
    const SubprocessResult missing = run_subprocess({name}, "", {}, {});
    INFO(name << ": " << missing.errors);
    CHECK(missing.end == End::kNotStarted);
    CHECK_FALSE(missing.errors.empty());
  }
}

TEST_CASE("sleeping, closing its output, and ignoring signals do not outlast the limit") {
  for (const char* script :
       {"sleep 60", "exec >&- 2>&-; sleep 60", "trap '' TERM INT HUP; sleep 60; sleep 60"}) {
    INFO(script);
    CHECK(shell(script, quick()).end == End::kTooSlow);
  }
  CallLimit none_left;
  none_left.deadline_s = none_left.clock() - 1;
  CHECK(shell("sleep 60", patient(), "", none_left).end == End::kTooSlow);
  CallLimit abandoned;
  abandoned.abandoned = std::make_shared<std::atomic<bool>>(true);
  CHECK(shell("sleep 60", patient(), "", abandoned).end == End::kAbandoned);
}

TEST_CASE("endless output ends at its bound; errors beyond it are dropped") {
  SubprocessLimits limits = patient();
  limits.max_output_bytes = 1000;
  const SubprocessResult endless = run_subprocess({"yes"}, "", limits, {});
  CHECK(endless.end == End::kTooMuchOutput);
  CHECK(endless.output.size() == 1000);
  const SubprocessResult exact = shell("head -c 1000 /dev/zero", limits);
  CHECK(exact.end == End::kExited);
  CHECK(exact.output.size() == 1000);
  const SubprocessResult noisy = shell("head -c 300000 /dev/zero >&2; echo fine", limits);
  CHECK(noisy.end == End::kExited);
  CHECK(noisy.output == "fine\n");
  CHECK(noisy.errors.size() == 1000);
}

TEST_CASE("children that were left running are killed with their group") {
  const SubprocessResult left = shell("sleep 300 & echo $!");
  CHECK(left.end == End::kExited);
  CHECK(is_gone(std::stoi(left.output)));
  // They do not keep the call waiting either, though they hold its output open.
  const SubprocessResult slow = shell("sleep 300 & echo $!; sleep 300", quick());
  CHECK(slow.end == End::kTooSlow);
  if (!slow.output.empty()) CHECK(is_gone(std::stoi(slow.output)));  // else it had no time to begin
  const SubprocessResult forks = shell("while true; do sleep 300 & done", quick());
  CHECK(forks.end != End::kExited);
}

TEST_CASE("memory and processor time are limited") {
  SubprocessLimits limits = patient();
  limits.max_memory_bytes = 200u << 20;
  CHECK(shell("ulimit -v").output == "1048576\n");
  CHECK(shell("ulimit -v", limits).output == "204800\n");
  CHECK(shell("ulimit -c").output == "0\n");
  limits = patient();
  limits.max_cpu_seconds = 0.5;
  CHECK(shell("ulimit -t", limits).output == "1\n");
  const SubprocessResult busy = shell("while true; do :; done", limits);
  CHECK(busy.end == End::kSignalled);
}

TEST_CASE("no file descriptor and no further variable is inherited") {
  const int fd = open("/dev/null", O_RDONLY);  // without O_CLOEXEC
  REQUIRE(fd >= 3);
  setenv("RLHF_TEST_SECRET", "secret", 1);
  CHECK(shell("ls /proc/self/fd | wc -l").output == shell("echo 4").output);  // 0, 1, 2 and the folder itself
  CHECK(shell("echo \"$RLHF_TEST_SECRET\"").output == "\n");
  unsetenv("RLHF_TEST_SECRET");
  close(fd);
}

TEST_CASE("as a tool, arguments go in as JSON and every end is an answer") {
  const auto tool = [](std::vector<std::string> argv, SubprocessLimits limits = patient()) {
    ToolSchema schema;
    schema.name = "program";
    return SubprocessTool(schema, std::move(argv), limits);
  };
  const nlohmann::json arguments = {{"a", 1}, {"b", "x y"}};
  CHECK(tool({"cat"}).call(arguments, {}).text == R"({"a":1,"b":"x y"})");
  const ToolResult failed = tool({"sh", "-c", "echo bad input >&2; exit 2"}).call(arguments, {});
  CHECK(failed.is_error);
  CHECK(failed.text == R"({"error":"exit status 2: bad input"})");
  CHECK(tool({"sleep", "60"}, quick()).call(arguments, {}).text == R"({"error":"took longer than it may"})");
  CHECK(tool({"no-such-program-here"}).call(arguments, {}).text ==
        R"({"error":"there is no program 'no-such-program-here' in PATH"})");
  SubprocessLimits limits = patient();
  limits.max_output_bytes = 4;
  const ToolResult cut = tool({"yes"}, limits).call(arguments, {});
  CHECK_FALSE(cut.is_error);
  CHECK(cut.text == "y\ny\n [cut after 4 bytes; the program was ended]");
}
