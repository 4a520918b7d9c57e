#include "reward/remote/http_reward.h"

#include <arpa/inet.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <nlohmann/json.hpp>

#include "reward/scoring/composition.h"
#include "tests/catch.h"
#include "tests/reward/http_server.h"

namespace rlhf {

SlowServer::SlowServer(std::string first) {
  listener_ = ::socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(address);
  REQUIRE(::bind(listener_, reinterpret_cast<sockaddr*>(&address), size) == 0);
  REQUIRE(::listen(listener_, 8) == 0);
  REQUIRE(::getsockname(listener_, reinterpret_cast<sockaddr*>(&address), &size) == 0);
  port_ = ntohs(address.sin_port);
  thread_ = std::thread([this, first = std::move(first)] { serve(first); });
}

SlowServer::~SlowServer() {
  ending_ = true;
  thread_.join();
  ::close(listener_);
}

void SlowServer::serve(const std::string& first) {
  std::vector<int> connections;
  while (!ending_) {
    pollfd waiting{listener_, POLLIN, 0};
    if (::poll(&waiting, 1, 20) > 0) {
      connections.push_back(::accept(listener_, nullptr, nullptr));
      ::send(connections.back(), first.data(), first.size(), MSG_NOSIGNAL);
    }
    for (const int connection : connections) ::send(connection, "x", 1, MSG_NOSIGNAL);
  }
  for (const int connection : connections) ::close(connection);
}

namespace {

using std::chrono::steady_clock;

double seconds_since(steady_clock::time_point begin) {
  return std::chrono::duration<double>(steady_clock::now() - begin).count();
}

HttpRewardOptions asking(const std::string& url, double timeout_s = 30, std::int64_t attempts = 1) {
  HttpRewardOptions options;
  options.url = url;
  options.timeout_s = timeout_s;
  options.attempts = attempts;
  return options;
}

Prompt make_prompt() {
  Prompt prompt;
  prompt.id = 7;
  prompt.text = "2 + 2 = ";
  prompt.task = "sums";
  prompt.reference = R"({"answer": 4})";
  return prompt;
}

double ask(const HttpReward& reward, const std::string& text = "four") {
  const Prompt prompt = make_prompt();
  const Sample sample;
  return reward.score({prompt, sample, text});
}

TEST_CASE("a server gets OpenRLHF's message and its number is the score") {
  nlohmann::json seen;
  std::string type, token;
  const RewardServer server([&](const httplib::Request& request, httplib::Response& response) {
    seen = nlohmann::json::parse(request.body);
    type = request.get_header_value("Content-Type");
    token = request.get_header_value("Authorization");
    response.set_content(R"({"rewards": [-2.5], "extra_logs": {"x": [1]}})", "application/json");
  });
  setenv("RLHF_TEST_TOKEN", "secret", 1);
  HttpRewardOptions options = asking(server.url());
  options.token_variable = "RLHF_TEST_TOKEN";
  CHECK(ask(HttpReward(options), "four \"\xff\"") == -2.5);
  CHECK(type == "application/json");
  CHECK(token == "Bearer secret");
  // What is no UTF-8 is sent as U+FFFD.
  CHECK(seen == nlohmann::json::parse(R"({"query": ["2 + 2 = four \"\ufffd\""], "prompts": ["2 + 2 = "],
      "labels": [{"answer": 4}], "responses": ["four \"\ufffd\""], "tasks": ["sums"]})"));
  options.token_variable = "RLHF_TEST_NO_TOKEN";
  REQUIRE_THROWS_WITH(HttpReward(options), ContainsSubstring("RLHF_TEST_NO_TOKEN"));
}

TEST_CASE("requests are sent side by side, as many as the options say") {
  std::atomic<int> now{0}, most{0};
  const RewardServer server([&](const httplib::Request& request, httplib::Response& response) {
    const int others = ++now;
    for (int seen = most; others > seen && !most.compare_exchange_weak(seen, others);) continue;
    std::this_thread::sleep_for(std::chrono::milliseconds(30));
    --now;
    const auto text = nlohmann::json::parse(request.body)["responses"][0].get<std::string>();
    response.set_content("{\"rewards\": [" + std::to_string(text.size()) + "]}", "application/json");
  });
  HttpRewardOptions options = asking(server.url());
  options.max_in_flight = 3;
  const HttpReward reward(options);
  const Prompt prompt = make_prompt();
  const Sample sample;
  std::vector<std::shared_future<double>> scores;
  for (std::size_t n = 0; n < 12; ++n) {
    const std::string text(n, 'a');
    scores.push_back(reward.begin({prompt, sample, text}));
  }
  for (std::size_t n = 0; n < 12; ++n) CHECK(scores[n].get() == static_cast<double>(n));
  CHECK(most == 3);
}

TEST_CASE("a server that fails for a moment is asked again, one that refuses is not") {
  std::atomic<int> calls{0};
  int status = 503;
  const RewardServer server([&](const httplib::Request&, httplib::Response& response) {
    response.status = ++calls < 3 ? status : 200;
    response.set_content(response.status == 200 ? R"({"rewards": [1]})" : "no room", "application/json");
  });
  CHECK(ask(HttpReward(asking(server.url(), 30, 3))) == 1);
  CHECK(calls == 3);
  calls = 0;
  REQUIRE_THROWS_WITH(ask(HttpReward(asking(server.url(), 30, 2))),
                      ContainsSubstring(server.url()) && ContainsSubstring("HTTP 503 \"no room\"") &&
                          ContainsSubstring("2 attempts"));
  calls = 0;
  status = 404;
  REQUIRE_THROWS_AS(ask(HttpReward(asking(server.url(), 30, 3))), RewardUnavailable);
  CHECK(calls == 1);
}

TEST_CASE("answers that are no reward are refused") {
  std::string answer;
  const RewardServer server([&](const httplib::Request&, httplib::Response& response) {
    response.set_content(answer, "application/json");
  });
  const HttpReward reward(asking(server.url(), 30, 3));
  for (const char* text : {"", "[1]", "{}", R"({"rewards": 1})", R"({"rewards": [1, 2]})",
                           R"({"rewards": ["1"]})", R"({"rewards": [nan]})", R"({"rewards": [null]})"}) {
    answer = text;
    INFO(answer);
    REQUIRE_THROWS_WITH(ask(reward), ContainsSubstring("expected {\"rewards\": [number]}"));
  }
  answer = std::string(2 << 20, ' ');
  REQUIRE_THROWS_WITH(ask(reward), ContainsSubstring("more than 1048576 bytes"));
}

TEST_CASE("a server that never answers, or never ends, meets the time-out") {
  for (const char* first :
       {"", "HTTP/1.1 200 OK\r\nX-Header: ", "HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n"}) {
    INFO(first);
    const SlowServer server(first);
    const auto begin = steady_clock::now();
    REQUIRE_THROWS_WITH(ask(HttpReward(asking(server.url(), 0.3, 2))),
                        ContainsSubstring("gave no answer within 0.3 s") && ContainsSubstring("2 attempts"));
    CHECK(seconds_since(begin) > 0.6);
    CHECK(seconds_since(begin) < 20);
  }
}

TEST_CASE("nobody listens") {
  std::string url;
  { url = SlowServer("").url(); }
  REQUIRE_THROWS_WITH(ask(HttpReward(asking(url, 30, 2))),
                      ContainsSubstring("cannot be asked") && ContainsSubstring(url));
}

TEST_CASE("a reward that is let go ends its requests") {
  const SlowServer server("");
  const auto begin = steady_clock::now();
  std::shared_future<double> score;
  {
    HttpRewardOptions options = asking(server.url(), 3600, 5);
    options.max_in_flight = 2;
    const HttpReward reward(options);
    const Prompt prompt = make_prompt();
    const Sample sample;
    for (int i = 0; i < 5; ++i) score = reward.begin({prompt, sample, "text"});
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  }
  CHECK(seconds_since(begin) < 60);
  CHECK_THROWS(score.get());
}

TEST_CASE("a URL is checked before anything is sent") {
  for (const char* url :
       {"", "localhost:80", "ftp://host/", "http://", "https:///path", "http://a b/c", "http://user@host/"})
    REQUIRE_THROWS_WITH(HttpReward(asking(url)),
                        ContainsSubstring("url") && ContainsSubstring("expected http://HOST"));
}

// ---- what a composition makes of a missing score ----

class Unavailable : public RewardTerm {
 public:
  std::string_view name() const override { return "remote"; }
  double score(const ScoredSample& scored) const override {
    if (scored.text == "lost") fail<RewardUnavailable>("nobody there");
    return 3;
  }
};

Score score_of(const RewardComposition& rules, const char* text) {
  const Prompt prompt = make_prompt();
  const Sample sample;
  return rules.score({prompt, sample, text});
}

TEST_CASE("a missing score ends the step, counts, or drops the response") {
  RewardComposition stopping, counting, dropping;
  stopping.add(std::make_unique<Unavailable>(), {});
  counting.add(std::make_unique<Unavailable>(),
               {.weight = 2, .on_failure = OnFailure::kScore, .failure_score = -1});
  dropping.add(std::make_unique<Unavailable>(), {.on_failure = OnFailure::kDrop});
  REQUIRE_THROWS_WITH(
      score_of(stopping, "lost"),
      ContainsSubstring("reward term \"remote\", prompt 7 (sums)") && ContainsSubstring("nobody there"));
  const Score counted = score_of(counting, "lost");
  CHECK(counted.total == -2);
  CHECK_FALSE(counted.dropped);
  CHECK(counted.reasons == std::vector<std::string>{"nobody there"});
  CHECK(score_of(dropping, "lost").dropped);
  CHECK_FALSE(score_of(dropping, "there").dropped);
  const auto statistics = counting.summarise(
      std::vector<Score>{counted, score_of(counting, "there"), score_of(counting, "there"), counted});
  CHECK(statistics[0].failed == 0.5);
  CHECK(statistics[0].mean == 3);
  CHECK(statistics[0].min == 3);
  RewardComposition refusing;
  REQUIRE_THROWS_WITH(refusing.add(std::make_unique<Unavailable>(),
                                   {.normalize = TermNormalization::kGroup, .on_failure = OnFailure::kDrop}),
                      ContainsSubstring("on_failure"));
}

}  // namespace
}  // namespace rlhf
