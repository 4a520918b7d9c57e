#pragma once
// A reward server on loopback, in a thread of its own.
#include <httplib.h>

#include <atomic>
#include <functional>
#include <string>
#include <thread>

namespace rlhf {

class RewardServer {
 public:
  using Handler = std::function<void(const httplib::Request&, httplib::Response&)>;

  explicit RewardServer(Handler handler) {
    // Handlers that sleep must not keep others waiting.
    server_.new_task_queue = [] { return new httplib::ThreadPool(64); };
    server_.Post("/score", std::move(handler));
    port_ = server_.bind_to_any_port("127.0.0.1");
    thread_ = std::thread([this] { server_.listen_after_bind(); });
    while (!server_.is_running()) std::this_thread::yield();
  }
  ~RewardServer() {
    server_.stop();
    thread_.join();
  }
  std::string url() const { return "http://127.0.0.1:" + std::to_string(port_) + "/score"; }

 private:
  httplib::Server server_;
  int port_ = 0;
  std::thread thread_;
};

/// A listener that accepts a connection, sends `first`, and then a byte now and then, until the end.
class SlowServer {
 public:
  explicit SlowServer(std::string first);
  ~SlowServer();
  std::string url() const { return "http://127.0.0.1:" + std::to_string(port_) + "/score"; }

 private:
  void serve(const std::string& first);

  int listener_ = -1, port_ = 0;
  std::atomic<bool> ending_{false};
  std::thread thread_;
};

}  // namespace rlhf
