// Ranks as processes that exchange numbers: against sums taken here, and with ranks that end or stay silent.
#include "rlhf/distributed/gloo_collective.h"

#include <arpa/inet.h>

#include <cmath>

#include "rlhf/distributed/balance.h"
#include "tests/distributed/exchanged.h"
#include "tests/distributed/processes.h"

using namespace rlhf;

namespace {

using Words = std::vector<std::string>;

template <class T>
void append(std::string& out, const std::vector<T>& values) {
  out.append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

template <class T>
void append_expected(std::string& out, int rank, int ranks) {
  for (const std::size_t count : kCounts) {
    std::vector<std::vector<T>> all;
    for (int r = 0; r < ranks; ++r) all.push_back(values_of<T>(r, count));
    std::vector<T> sums = all[0], gathered(count);
    for (int r = 1; r < ranks; ++r)
      for (std::size_t i = 0; i < count; ++i) sums[i] += all[static_cast<std::size_t>(r)][i];
    append(out, sums);
    std::vector<T> slices = all[static_cast<std::size_t>(rank)];
    for (std::size_t i = begin_of(count, rank, ranks); i < begin_of(count, rank + 1, ranks); ++i)
      slices[i] = sums[i];
    append(out, slices);
    for (int r = 0; r < ranks; ++r)
      for (std::size_t i = begin_of(count, r, ranks); i < begin_of(count, r + 1, ranks); ++i)
        gathered[i] = all[static_cast<std::size_t>(r)][i];
    append(out, gathered);
  }
}

// The rank's part is summed, the rest is as it was.
void append_expected_parts(std::string& out, int rank, int ranks) {
  for (const std::size_t count : kCounts) {
    std::vector<float> values = values_of<float>(rank, count);
    for (std::size_t i = uneven_begin_of(count, rank, ranks); i < uneven_begin_of(count, rank + 1, ranks);
         ++i)
      values[i] = 0;
    for (int r = 0; r < ranks; ++r) {
      const std::vector<float> theirs = values_of<float>(r, count);
      for (std::size_t i = uneven_begin_of(count, rank, ranks); i < uneven_begin_of(count, rank + 1, ranks);
           ++i)
        values[i] += theirs[i];
    }
    append(out, values);
  }
}

bool is_without_gloo() {
  if (!has_gloo()) WARN("skipped: built without Gloo");
  return !has_gloo();
}

std::string expected_of(int rank, int ranks) {
  std::string out;
  append_expected<float>(out, rank, ranks);
  append_expected<double>(out, rank, ranks);
  append_expected_parts(out, rank, ranks);
  for (int r = 0; r < ranks; ++r) out += text_of(r);
  for (int root = 0; root < ranks; ++root) append(out, values_of<float>(root, 70001));
  constexpr std::size_t kCount = 10007;
  std::vector<float> gathered;
  for (int r = 0; r < ranks && rank == 0; ++r) {
    const auto all = values_of<float>(r, kCount);
    for (std::size_t i = begin_of(kCount, r, ranks); i < begin_of(kCount, r + 1, ranks); ++i)
      gathered.push_back(all[i]);
  }
  append(out, gathered);
  const auto first = values_of<float>(0, kCount);
  append(out,
         std::vector<float>(first.begin() + static_cast<std::ptrdiff_t>(begin_of(kCount, rank, ranks)),
                            first.begin() + static_cast<std::ptrdiff_t>(begin_of(kCount, rank + 1, ranks))));
  return out + "any" + "no";
}

std::vector<Process> start(const TemporaryFolder& folder, const std::string& scenario, int ranks,
                           int timeout_ms, int port) {
  return start_ranks(folder, {RLHF_RANK_PROGRAM, scenario, std::to_string(timeout_ms)}, ranks, port);
}

// Sends bytes to a port of this machine, as somebody who does not belong there; the connection stays open.
int intrude(int port, const std::string& bytes) {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = htons(static_cast<std::uint16_t>(port));
  for (int i = 0; i < 2000; ++i) {
    if (connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0) break;
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  (void)!::send(fd, bytes.data(), bytes.size(), MSG_NOSIGNAL);
  return fd;
}

}  // namespace

TEST_CASE("slices cover a buffer in order, are equal but for a rest, and begin on multiples of 64") {
  CHECK(slice_of(1001, 0, 3).size() == 320);
  CHECK(slice_of(1001, 2, 3).size() == 361);
  CHECK(slice_of(7, 0, 2).size() == 3);
  CHECK(slice_of(7, 1, 2).size() == 4);
  for (const std::size_t count : {0u, 1u, 7u, 8u, 191u, 1001u})
    for (const int ranks : {1, 2, 3, 8}) {
      std::size_t end = 0;
      for (int r = 0; r < ranks; ++r) {
        const Slice slice = slice_of(count, r, ranks);
        CHECK(slice.begin == end);
        CHECK(slice.begin == begin_of(count, r, ranks));
        if (r < ranks - 1) CHECK(slice.size() == divide(count, ranks).each);
        end = slice.end;
      }
      CHECK(end == count);
    }
  CHECK_THROWS_WITH(slice_of(4, 2, 2), ContainsSubstring("rank 2 of 2"));
}

TEST_CASE("shares are balanced, complete and the same every time") {
  CHECK(balanced_shares(std::vector<double>{5, 3, 3, 2, 2, 1}, 2) == std::vector<int>{0, 1, 1, 0, 1, 0});
  CHECK(balanced_shares(std::vector<double>{1, 1, 1}, 4) == std::vector<int>{0, 1, 2});
  CHECK(balanced_shares(std::vector<double>{}, 2).empty());
  // No rank has more than the mean and the largest item.
  const auto numbers = values_of<double>(1, 500);
  for (const int ranks : {1, 3, 7}) {
    std::vector<double> costs, loads(static_cast<std::size_t>(ranks));
    for (const double number : numbers) costs.push_back(std::abs(number));
    const auto shares = balanced_shares(costs, ranks);
    for (std::size_t i = 0; i < costs.size(); ++i) loads.at(static_cast<std::size_t>(shares[i])) += costs[i];
    double sum = 0, largest = 0;
    for (const double cost : costs) {
      sum += cost;
      largest = std::max(largest, cost);
    }
    for (const double load : loads) CHECK(load <= sum / ranks + largest);
  }
}

TEST_CASE("one process exchanges with nobody") {
  std::vector<float> values = {1, 2};
  Collective& alone = one_process();
  alone.all_reduce(std::span(values));
  alone.reduce_scatter(std::span(values));
  alone.all_gather(std::span(values));
  alone.broadcast(std::span(values), 0);
  alone.barrier();
  CHECK(values == std::vector<float>{1, 2});
  CHECK(alone.all_gather_bytes("a") == std::vector<std::string>{"a"});
  CHECK(alone.is_first());
}

TEST_CASE("two, three and four ranks get the sums, slices and texts that were computed here, bit for bit") {
  if (is_without_gloo()) return;
  for (const int ranks : {2, 3, 4}) {
    const TemporaryFolder folder;
    auto processes = start(folder, "exchange", ranks, 20000, free_port());
    for (int r = 0; r < ranks; ++r) {
      Process& process = processes[static_cast<std::size_t>(r)];
      CHECK(process.wait() == 0);
      INFO("rank " << r << " of " << ranks << ": " << process.err());
      // Not compared by ==, whose message would be megabytes.
      const bool equal = process.out() == expected_of(r, ranks);
      CHECK(equal);
    }
  }
}

TEST_CASE("a killed rank ends all others with an error that says so") {
  if (is_without_gloo()) return;
  for (const int victim : {0, 2}) {
    const TemporaryFolder folder;
    // Long: a closed connection is noticed before any time limit.
    auto processes = start(folder, "repeat", 3, 120000, free_port());
    for (Process& process : processes)
      for (int i = 0; i < 4000 && process.err().find("begun") == std::string::npos; ++i)
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
    processes[static_cast<std::size_t>(victim)].signal(SIGKILL);
    for (int r = 0; r < 3; ++r) {
      Process& process = processes[static_cast<std::size_t>(r)];
      const int code = process.wait(30);
      INFO("rank " << r << ": " << process.err());
      CHECK(code == (r == victim ? 128 + SIGKILL : 1));
      if (r != victim)
        CHECK_THAT(process.err(), ContainsSubstring("rank " + std::to_string(r) + " of 3 lost rank "));
    }
  }
}

TEST_CASE("a rank that does not answer is an error after the time-out") {
  if (is_without_gloo()) return;
  const TemporaryFolder folder;
  auto processes = start(folder, "wait", 3, 700, free_port());
  for (int r = 0; r < 2; ++r) {
    CHECK(processes[static_cast<std::size_t>(r)].wait(20) == 1);
    CHECK_THAT(processes[static_cast<std::size_t>(r)].err(),
               ContainsSubstring("did not answer within 0.7 s"));
  }
}

TEST_CASE("ranks that do not come, or do not fit, end the meeting for all") {
  if (is_without_gloo()) return;
  const Words words = {RLHF_RANK_PROGRAM, "exchange", "1000"};
  const auto errors = [&](const std::vector<Variables>& ranks) {
    const TemporaryFolder folder;
    std::vector<Process> processes;
    for (const Variables& variables : ranks)
      processes.emplace_back(folder, "p" + std::to_string(processes.size()), words, variables);
    std::vector<std::string> errors;
    for (Process& process : processes) {
      CHECK(process.wait(20) == 1);
      errors.push_back(process.err());
    }
    return errors;
  };
  const int port = free_port();
  for (const std::string& error : errors({rank_variables(0, 4, port), rank_variables(2, 4, port)}))
    CHECK_THAT(error, ContainsSubstring("2 of 4 ranks did not come to 127.0.0.1:" + std::to_string(port) +
                                        " within 1 s: 1, 3"));
  CHECK_THAT(errors({rank_variables(1, 2, port)})[0],
             ContainsSubstring("rank 1 of 2: rank 0 does not answer at 127.0.0.1:" + std::to_string(port) +
                               " within 1 s: Connection refused"));
  const auto twice =
      errors({rank_variables(0, 3, port), rank_variables(1, 3, port), rank_variables(1, 3, port)});
  CHECK_THAT(twice[0], ContainsSubstring("two processes say that they are rank 1"));
  for (const std::string& error : errors({rank_variables(0, 3, port), rank_variables(1, 2, port)}))
    CHECK_THAT(error, ContainsSubstring("rank 1 counts 2 ranks and rank 0 counts 3"));
}

TEST_CASE("strangers at the meeting point are passed over") {
  if (is_without_gloo()) return;
  const TemporaryFolder folder;
  const int port = free_port();
  std::vector<Process> processes;
  const Words words = {RLHF_RANK_PROGRAM, "exchange", "20000"};
  processes.emplace_back(folder, "rank0", words, rank_variables(0, 2, port));
  std::vector<int> open;
  open.push_back(intrude(port, "GET / HTTP/1.0\r\n\r\n"));
  open.push_back(intrude(port, ""));
  open.push_back(intrude(port, "rlhf"));
  open.push_back(intrude(port, std::string("rlhf-rv1") + std::string(3, '\1')));
  open.push_back(intrude(port, std::string(100000, '\xff')));
  close(intrude(port, "rlhf-rv1"));
  processes.emplace_back(folder, "rank1", words, rank_variables(1, 2, port));
  for (int r = 0; r < 2; ++r) {
    CHECK(processes[static_cast<std::size_t>(r)].wait() == 0);
    INFO(processes[static_cast<std::size_t>(r)].err());
    const bool equal = processes[static_cast<std::size_t>(r)].out() == expected_of(r, 2);
    CHECK(equal);
  }
  for (const int fd : open) close(fd);
}

TEST_CASE("a program without Gloo says how to get it") {
  if (has_gloo()) return;
  Launch launch{"torchrun", 0, 2, "127.0.0.1", 29500, ""};
  CHECK_THROWS_WITH(connect(launch, std::chrono::milliseconds(100)), ContainsSubstring("built without Gloo"));
}
