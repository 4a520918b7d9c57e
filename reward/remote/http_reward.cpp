#include "reward/remote/http_reward.h"

#include <httplib.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <list>
#include <mutex>
#include <nlohmann/json.hpp>
#include <thread>

#include "rlhf/core/worker_pool.h"

namespace rlhf {
namespace {

using SteadyClock = std::chrono::steady_clock;
constexpr std::size_t kMostAnswerBytes = 1 << 20;

// Scheme, host and port; and the path. Empty where it is not the URL of a server.
std::pair<std::string, std::string> split(const std::string& url) {
  const bool known = url.starts_with("http://") || url.starts_with("https://");
  const std::size_t host = known ? url.find("://") + 3 : 0;
  const std::size_t path = std::min(url.find('/', host), url.size());
  // A user before the host would be sent nowhere: tokens go by token_variable.
  if (!known || path == host || url.find('@') < path || url.find_first_of(" \t\r\n#") != std::string::npos)
    return {};
  return {url.substr(0, path), path == url.size() ? "/" : url.substr(path)};
}

SteadyClock::duration seconds(double value) {
  return std::chrono::duration_cast<SteadyClock::duration>(std::chrono::duration<double>(value));
}

std::string excerpt(const std::string& text) {
  return nlohmann::json(text.substr(0, 200)).dump(-1, ' ', true, nlohmann::json::error_handler_t::replace);
}

double read_reward(const std::string& answer) {
  const nlohmann::json json = nlohmann::json::parse(answer, nullptr, false);
  if (json.is_object() && json.contains("rewards")) {
    const nlohmann::json& rewards = json["rewards"];
    if (rewards.is_array() && rewards.size() == 1 && rewards[0].is_number()) return rewards[0].get<double>();
  }
  fail<RewardUnavailable>("answered ", excerpt(answer), ", expected {\"rewards\": [number]}");
}

std::string to_body(const ScoredSample& scored) {
  const std::string text(scored.text);
  nlohmann::json label = scored.prompt.reference;
  if (auto parsed = nlohmann::json::parse(scored.prompt.reference, nullptr, false); !parsed.is_discarded())
    label = std::move(parsed);
  const auto one = [](nlohmann::json value) { return nlohmann::json::array({std::move(value)}); };
  const nlohmann::json body = {{"query", one(scored.prompt.text + text)},
                               {"prompts", one(scored.prompt.text)},
                               {"labels", one(label)},
                               {"responses", one(text)},
                               {"tasks", one(scored.prompt.task)}};
  return body.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

httplib::Headers authorization(const std::string& variable) {
  if (variable.empty()) return {};
  const char* token = std::getenv(variable.c_str());
  RLHF_CHECK(token, "http reward: the environment variable ", variable, " (token_variable) is not set");
  return {{"Authorization", std::string("Bearer ") + token}};
}

}  // namespace

void HttpRewardOptions::validate(config::Problems& problems) const {
  if (split(url).first.empty())
    problems.add("url", "is \"" + url + "\", expected http://HOST:PORT/PATH or https://HOST:PORT/PATH");
}

/// The connections to the server. A client's own time-outs are of single reads, so a guard ends what is late
/// as a whole.
class HttpReward::Requests {
 public:
  explicit Requests(const HttpRewardOptions& options)
      : options_(options),
        url_(split(options.url)),
        headers_(authorization(options.token_variable)),
        guard_([this] { end_late_ones(); }),
        pool_(static_cast<int>(options.max_in_flight)) {}
  ~Requests() {
    {
      const std::lock_guard lock(mutex_);
      closing_ = true;
    }
    changed_.notify_all();
    guard_.join();
  }

  std::shared_future<double> add(std::string body) {
    auto promise = std::make_shared<std::promise<double>>();
    pool_.add([this, promise, body = std::move(body)] {
      try {
        promise->set_value(ask(body));
      } catch (...) {
        promise->set_exception(std::current_exception());
      }
    });
    return promise->get_future().share();
  }

 private:
  struct Attempt {
    httplib::Client& client;
    SteadyClock::time_point deadline;
  };
  /// Another attempt may succeed.
  class Transient : public RewardUnavailable {
    using RewardUnavailable::RewardUnavailable;
  };

  double ask(const std::string& body) {
    double pause = 0.1;
    for (std::int64_t left = options_.attempts - 1;; --left, pause = std::min(2 * pause, 5.0)) {
      try {
        return read_reward(post(body));
      } catch (const Transient& error) {
        std::unique_lock lock(mutex_);
        if (left > 0 && !changed_.wait_for(lock, seconds(pause), [&] { return closing_; })) continue;
        fail<RewardUnavailable>(options_.url, " ", error.what(), " (", options_.attempts - left,
                                " attempts)");
      } catch (const RewardUnavailable& error) {
        fail<RewardUnavailable>(options_.url, " ", error.what());
      }
    }
  }

  std::string post(const std::string& body) {
    httplib::Client client(url_.first);
    const auto limit = std::chrono::duration_cast<std::chrono::microseconds>(seconds(options_.timeout_s));
    client.set_connection_timeout(limit);
    client.set_read_timeout(limit);
    client.set_write_timeout(limit);
    client.set_tcp_nodelay(true);  // head and body are sent one by one
    std::string answer;
    httplib::Request request;
    request.method = "POST";
    request.path = url_.second;
    request.headers = headers_;
    request.set_header("Content-Type", "application/json");
    request.body = body;
    request.content_receiver = [&](const char* data, std::size_t size, std::uint64_t, std::uint64_t) {
      answer.append(data, size);
      return answer.size() <= kMostAnswerBytes;
    };
    const auto deadline = SteadyClock::now() + seconds(options_.timeout_s);
    const httplib::Result result = send(client, request, deadline);
    if (answer.size() > kMostAnswerBytes)
      fail<RewardUnavailable>("answered more than ", kMostAnswerBytes, " bytes");
    if (!result && SteadyClock::now() >= deadline)
      fail<Transient>("gave no answer within ", options_.timeout_s, " s (timeout_s)");
    if (!result) fail<Transient>("cannot be asked: ", httplib::to_string(result.error()));
    if (result->status == 429 || result->status >= 500)
      fail<Transient>("answered HTTP ", result->status, " ", excerpt(answer));
    if (result->status != 200)
      fail<RewardUnavailable>("answered HTTP ", result->status, " ", excerpt(answer), ", expected 200");
    return answer;
  }

  httplib::Result send(httplib::Client& client, const httplib::Request& request,
                       SteadyClock::time_point deadline) {
    const auto attempt = [&] {
      const std::lock_guard lock(mutex_);
      if (closing_) fail<RewardUnavailable>("is not asked any more");
      return attempts_.insert(attempts_.end(), {client, deadline});
    }();
    changed_.notify_all();
    httplib::Result result = client.send(request);
    const std::lock_guard lock(mutex_);
    attempts_.erase(attempt);
    return result;
  }

  // Until closing, and then until nothing is under way. A client that has not connected yet ignores stop(),
  // hence again and again.
  void end_late_ones() {
    std::unique_lock lock(mutex_);
    while (!closing_ || !attempts_.empty()) {
      const auto now = SteadyClock::now();
      auto next = SteadyClock::time_point::max();
      for (Attempt& attempt : attempts_) {
        const bool late = closing_ || attempt.deadline <= now;
        if (late) attempt.client.stop();
        next = std::min(next, late ? now + std::chrono::milliseconds(20) : attempt.deadline);
      }
      if (attempts_.empty())
        changed_.wait(lock);
      else
        changed_.wait_until(lock, next);
    }
  }

  const HttpRewardOptions options_;
  const std::pair<std::string, std::string> url_;
  const httplib::Headers headers_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::list<Attempt> attempts_;
  bool closing_ = false;
  std::thread guard_;
  WorkerPool pool_;
};

HttpReward::HttpReward(const HttpRewardOptions& options) {
  config::Problems problems;
  options.validate(problems);
  for (const auto& problem : problems.all())
    fail<InvalidArgument>("http reward: ", problem.key, " ", problem.message);
  requests_ = std::make_unique<Requests>(options);
}

HttpReward::~HttpReward() = default;

std::shared_future<double> HttpReward::begin(const ScoredSample& scored) const {
  return requests_->add(to_body(scored));
}

}  // namespace rlhf
