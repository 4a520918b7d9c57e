// The collective over Gloo's connections: Gloo connects, frames and notices who has gone; the algorithms are
// direct exchanges. Each rank sends every other what that one needs and adds up what it gets in the order of
// the ranks. That moves as many bytes as a ring, leaves the order of the sums to nobody, and tells which rank
// is missing.
#include "rlhf/distributed/gloo_collective.h"

#include <gloo/context.h>
#include <gloo/transport/context.h>
#include <gloo/transport/pair.h>
#include <gloo/transport/tcp/device.h>
#include <gloo/transport/unbound_buffer.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <thread>

#include "rlhf/distributed/rendezvous.h"

namespace rlhf {
namespace {

constexpr std::size_t kChunkBytes = 1 << 20;  // of one peer's part in flight while sums are taken
constexpr std::size_t kSmallBytes = 1 << 14;  // up to here everybody gets everything and adds up itself

// A connection between every two ranks. Gloo's own way there differs from version to version in what it
// keeps in a key-value store; its addresses need no more than one exchange.
class Mesh : public gloo::Context {
 public:
  Mesh(Rendezvous& rendezvous, const Launch& launch, std::chrono::milliseconds timeout)
      : gloo::Context(launch.rank, launch.world_size) {
    gloo::transport::tcp::attr attributes;
    if (launch.interface.empty())
      attributes.hostname = rendezvous.local_address();
    else
      attributes.iface = launch.interface;
    device_ = gloo::transport::tcp::CreateDevice(attributes);
    setTimeout(timeout);
    auto transport = device_->createContext(rank, size);
    transport->setTimeout(timeout);
    // Each pair has an address of its own: behind its length, in the order of the ranks.
    std::string own;
    for (int peer = 0; peer < size; ++peer) {
      if (peer == rank) continue;
      const std::vector<char> address = transport->createPair(peer)->address().bytes();
      const auto length = static_cast<std::uint32_t>(address.size());
      own.append(reinterpret_cast<const char*>(&length), sizeof length);
      own.append(address.begin(), address.end());
    }
    const std::vector<std::string> all = rendezvous.exchange(own);
    for (int peer = 0; peer < size; ++peer)
      if (peer != rank)
        transport->getPair(peer)->connect(
            address_of(all[static_cast<std::size_t>(peer)], rank < peer ? rank : rank - 1));
    transportContext_ = std::move(transport);
  }

 private:
  // The address that a rank has made for its `index`th peer.
  static std::vector<char> address_of(const std::string& addresses, int index) {
    std::size_t at = 0;
    std::uint32_t length = 0;
    for (int i = 0; i <= index; ++i) {
      at += i > 0 ? length : 0;
      RLHF_CHECK(at + sizeof length <= addresses.size(), "a rank has sent ", addresses.size(),
                 " bytes of addresses");
      std::memcpy(&length, addresses.data() + at, sizeof length);
      at += sizeof length;
    }
    const std::string address = addresses.substr(at, length);
    return {address.begin(), address.end()};
  }
};

// Gloo writes to a connection that may just have been closed; it expects an error for that, not a signal.
void ignore_broken_pipes() {
  struct sigaction current {};
  sigaction(SIGPIPE, nullptr, &current);
  if (current.sa_handler == SIG_DFL) signal(SIGPIPE, SIG_IGN);
}

// Ends a wait to receive now and then, so that who waits can look whether the connection is still there.
class Waker {
 public:
  Waker() = default;
  ~Waker() {
    {
      const std::lock_guard lock(mutex_);
      stopped_ = true;
    }
    changed_.notify_all();
    if (thread_.joinable()) thread_.join();
  }
  Waker(const Waker&) = delete;

  void watch(gloo::transport::UnboundBuffer* buffer) {
    const std::lock_guard lock(mutex_);
    if (!thread_.joinable()) thread_ = std::thread([this] { run(); });
    buffer_ = buffer;
  }

 private:
  void run() {
    std::unique_lock lock(mutex_);
    while (!stopped_) {
      changed_.wait_for(lock, std::chrono::seconds(1));
      if (buffer_ && !stopped_) buffer_->abortWaitRecv();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  bool stopped_ = false;
  gloo::transport::UnboundBuffer* buffer_ = nullptr;
  std::thread thread_;
};

class GlooCollective : public Collective {
 public:
  GlooCollective(const Launch& launch, std::chrono::milliseconds timeout)
      : rank_(launch.rank), size_(launch.world_size), timeout_(timeout) {
    ignore_broken_pipes();
    Rendezvous rendezvous(launch, timeout);
    try {
      context_ = std::make_shared<Mesh>(rendezvous, launch, timeout);
    } catch (const CollectiveError&) {
      throw;
    } catch (const std::exception& error) {
      fail<CollectiveError>(who(), ": cannot connect to the other ranks: ", error.what());
    }
  }

  // Who is still in the last exchange waits for its answers.
  ~GlooCollective() override {
    if (failed_) return;
    try {
      for (const Message& answer : answers_) wait_send(answer);
    } catch (const Error&) {  // it has gone; nobody is left to be told
    }
  }

  int rank() const override { return rank_; }
  int world_size() const override { return size_; }

  void all_reduce(std::span<float> values) override { reduce_all(values); }
  void all_reduce(std::span<double> values) override { reduce_all(values); }
  void reduce_scatter(std::span<float> values) override { reduce_slices(values); }
  void reduce_scatter(std::span<double> values) override { reduce_slices(values); }
  void reduce_parts(std::span<float> values, const std::vector<Slice>& parts) override {
    RLHF_CHECK(parts.size() == ranks(), "reduce_parts: ", parts.size(), " parts for ", size_, " ranks");
    reduce_each(values, parts);
  }
  void all_gather(std::span<float> values) override { gather_slices(values); }
  void all_gather(std::span<double> values) override { gather_slices(values); }

  std::vector<std::string> all_gather_bytes(const std::string& own) override {
    std::vector<std::uint64_t> lengths(ranks());
    lengths[at(rank_)] = own.size();
    Exchange sizes(*this);
    for (int peer : peers()) {
      sizes.send(peer, &lengths[at(rank_)], sizeof(std::uint64_t));
      sizes.receive(peer, &lengths[at(peer)], sizeof(std::uint64_t));
    }
    sizes.wait();
    std::vector<std::string> all(ranks());
    Exchange texts(*this);
    for (int peer : peers()) {
      all[at(peer)].resize(lengths[at(peer)]);
      texts.send(peer, own.data(), own.size());
      texts.receive(peer, all[at(peer)].data(), all[at(peer)].size());
    }
    texts.wait();
    all[at(rank_)] = own;
    return all;
  }

  void broadcast(std::span<std::byte> bytes, int root) override {
    RLHF_CHECK(root >= 0 && root < size_, "broadcast: root ", root, " of ", size_, " ranks");
    Exchange exchange(*this);
    if (rank_ != root) exchange.receive(root, bytes.data(), bytes.size());
    if (rank_ == root)
      for (int peer : peers()) exchange.send(peer, bytes.data(), bytes.size());
    exchange.wait();
  }

  void barrier() override { all_gather_bytes(""); }
  void check_alive() override {
    for (int peer : peers()) look_for(peer);
  }

 private:
  struct Message {
    int peer;
    std::unique_ptr<gloo::transport::UnboundBuffer> buffer;
  };

  // Messages to and from other ranks that are under way together; buffers stay until `wait` is done.
  //
  // A rank that waits to receive learns at once that a connection is closed, one that waits to send may not:
  // Gloo lets it wait for its time limit. So what is sent is acknowledged, and only then is its send waited
  // for.
  class Exchange {
   public:
    explicit Exchange(GlooCollective& owner) : owner_(owner), slot_(owner.next_slot_++) {}

    void send(int peer, const void* data, std::size_t bytes) {
      if (bytes == 0) return;
      acknowledgements_.push_back(owner_.start_receive(peer, &owner_.acknowledgement_, 1, slot_ | kAnswer));
      sends_.push_back(owner_.start_send(peer, data, bytes, slot_));
    }
    void receive(int peer, void* data, std::size_t bytes) {
      if (bytes > 0) receives_.push_back(owner_.start_receive(peer, data, bytes, slot_));
    }
    void wait() {
      for (const Message& message : receives_) owner_.wait_receive(message);
      std::vector<Message> answers;
      for (const Message& message : receives_)
        answers.push_back(owner_.start_send(message.peer, &owner_.acknowledgement_, 1, slot_ | kAnswer));
      for (const Message& message : acknowledgements_) owner_.wait_receive(message);
      for (const Message& message : sends_) owner_.wait_send(message);
      for (const auto* heard : {&receives_, &acknowledgements_})
        for (const Message& message : *heard) owner_.end_answers(message.peer);
      for (Message& answer : answers) owner_.answers_.push_back(std::move(answer));
      receives_.clear();
      acknowledgements_.clear();
      sends_.clear();
    }

   private:
    static constexpr std::uint64_t kAnswer = std::uint64_t{1} << 63;

    GlooCollective& owner_;
    std::uint64_t slot_;
    std::vector<Message> receives_, acknowledgements_, sends_;
  };

  Message start_send(int peer, const void* data, std::size_t bytes, std::uint64_t slot) {
    Message message{peer, nullptr};
    guard(peer, [&] {
      message.buffer = context_->createUnboundBuffer(const_cast<void*>(data), bytes);
      message.buffer->send(peer, slot);
    });
    return message;
  }
  Message start_receive(int peer, void* data, std::size_t bytes, std::uint64_t slot) {
    Message message{peer, nullptr};
    guard(peer, [&] {
      message.buffer = context_->createUnboundBuffer(data, bytes);
      message.buffer->recv(peer, slot);
    });
    return message;
  }
  void wait_send(const Message& message) {
    bool done = false;
    guard(message.peer, [&] { done = message.buffer->waitSend(timeout_); });
    if (!done) lost(message.peer, "aborted");
  }
  void wait_receive(const Message& message) {
    using std::chrono::steady_clock;
    const auto deadline = steady_clock::now() + timeout_;
    for (bool done = false; !done;) {
      const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - steady_clock::now());
      waker_.watch(message.buffer.get());
      const auto unwatch =
          std::unique_ptr<Waker, void (*)(Waker*)>(&waker_, [](Waker* w) { w->watch(nullptr); });
      guard(message.peer,
            [&] { done = message.buffer->waitRecv(std::max(left, std::chrono::milliseconds(1))); });
      if (!done) look_for(message.peer);
    }
  }
  // A connection that closes at the moment when a receive is begun on it does not always tell that receive.
  // It does tell the next one, which nobody answers.
  void look_for(int peer) { start_receive(peer, &nothing_, sizeof nothing_, kNobody); }
  // A rank that has gone on to this exchange has the answers of those before it.
  void end_answers(int peer) {
    for (const Message& answer : answers_)
      if (answer.peer == peer) wait_send(answer);
    std::erase_if(answers_, [&](const Message& answer) { return answer.peer == peer; });
  }

  static std::size_t at(int rank) { return static_cast<std::size_t>(rank); }
  std::size_t ranks() const { return at(size_); }
  std::vector<int> peers() const {
    std::vector<int> peers;
    // Beginning behind this rank, so that not all send to the same one first.
    for (int k = 1; k < size_; ++k) peers.push_back((rank_ + k) % size_);
    return peers;
  }
  std::string who() const { return concat("rank ", rank_, " of ", size_); }

  [[noreturn]] void lost(int peer, const std::string& what) {
    failed_ = true;
    fail<CollectiveError>(who(), " lost rank ", peer,
                          ", which has ended, has lost another rank, or did not answer within ",
                          std::chrono::duration<double>(timeout_).count(), " s (", what, ")");
  }
  template <class Fn>
  void guard(int peer, const Fn& fn) {
    try {
      fn();
    } catch (const Error&) {
      throw;
    } catch (const std::exception& error) {
      // Without Gloo's own file and line.
      const std::string text = error.what();
      const std::size_t end = text.starts_with('[') ? text.find("] ") : std::string::npos;
      lost(peer, end == std::string::npos ? text : text.substr(end + 2));
    }
  }

  // Sums what all ranks have in one place of each slice; `parts[r]` is what goes to rank r.
  template <class T>
  void add_up(const std::vector<std::span<T>>& parts) {
    const std::span<T> own = parts[at(rank_)];
    std::vector<T>& received = scratch<T>();
    received.resize(ranks() * own.size());
    Exchange exchange(*this);
    for (int peer : peers()) {
      exchange.receive(peer, received.data() + at(peer) * own.size(), own.size_bytes());
      exchange.send(peer, parts[at(peer)].data(), parts[at(peer)].size_bytes());
    }
    exchange.wait();
    std::copy(own.begin(), own.end(), received.begin() + static_cast<std::ptrdiff_t>(at(rank_) * own.size()));
    std::copy_n(received.begin(), own.size(), own.begin());
    for (std::size_t r = 1; r < ranks(); ++r)
      for (std::size_t i = 0; i < own.size(); ++i) own[i] += received[r * own.size() + i];
  }

  template <class T>
  void reduce_slices(std::span<T> values) {
    std::vector<Slice> slices;
    for (int r = 0; r < size_; ++r) slices.push_back(slice_of(values.size(), r, size_));
    reduce_each(values, slices);
  }

  template <class T>
  void reduce_each(std::span<T> values, const std::vector<Slice>& parts) {
    constexpr std::size_t kChunk = kChunkBytes / sizeof(T);
    const std::size_t longest = std::ranges::max(parts, {}, &Slice::size).size();
    for (std::size_t begin = 0; begin < longest; begin += kChunk) {
      std::vector<std::span<T>> chunks;
      for (const Slice& part : parts) {
        const std::size_t first = std::min(begin, part.size());
        chunks.push_back(part.of(values).subspan(first, std::min(kChunk, part.size() - first)));
      }
      add_up(chunks);
    }
  }

  template <class T>
  void gather_slices(std::span<T> values) {
    const auto own = slice_of(values.size(), rank_, size_).of(values);
    Exchange exchange(*this);
    for (int peer : peers()) {
      const auto theirs = slice_of(values.size(), peer, size_).of(values);
      exchange.receive(peer, theirs.data(), theirs.size_bytes());
      exchange.send(peer, own.data(), own.size_bytes());
    }
    exchange.wait();
  }

  template <class T>
  void reduce_all(std::span<T> values) {
    if (values.size_bytes() > kSmallBytes) {
      reduce_slices(values);
      return gather_slices(values);
    }
    add_up(std::vector<std::span<T>>(ranks(), values));
  }

  template <class T>
  std::vector<T>& scratch() {
    if constexpr (std::is_same_v<T, float>)
      return floats_;
    else
      return doubles_;
  }

  int rank_, size_;
  std::chrono::milliseconds timeout_;
  std::shared_ptr<gloo::Context> context_;
  static constexpr std::uint64_t kNobody = std::uint64_t{1} << 62;  ///< a slot that nothing is sent to
  std::uint8_t nothing_ = 0;
  Waker waker_;
  std::uint64_t next_slot_ = 1;
  std::vector<Message> answers_;  ///< under way, of the last exchange with each rank
  char acknowledgement_ = 1;      ///< what an answer says
  bool failed_ = false;
  std::vector<float> floats_;
  std::vector<double> doubles_;
};

}  // namespace

bool has_gloo() {
  return true;
}

std::unique_ptr<Collective> connect(const Launch& launch, std::chrono::milliseconds timeout) {
  if (launch.world_size == 1) return make_one_process();
  return std::make_unique<GlooCollective>(launch, timeout);
}

}  // namespace rlhf
