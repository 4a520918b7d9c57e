#include "rlhf/distributed/rendezvous.h"

#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <list>
#include <thread>
#include <utility>

#include "rlhf/distributed/collective.h"

namespace rlhf {
// Named, as Rendezvous::Impl is made of it.
namespace meeting {

using Deadline = std::chrono::steady_clock::time_point;

// What a rank sends: magic, rank, world size, length, bytes. What rank 0 answers: magic, status, length,
// bytes, which are either a message or every rank's text behind its length. Numbers as this machine has them.
constexpr char kMagic[8] = {'r', 'l', 'h', 'f', '-', 'r', 'v', '1'};
constexpr std::size_t kMostBytes = 1 << 20;  // of one text
constexpr std::size_t kMostVisitors = 1024;  // connections that have not said who they are
constexpr auto kRetry = std::chrono::milliseconds(50);

class Socket {
 public:
  explicit Socket(int fd = -1) : fd_(fd) {}
  Socket(Socket&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Socket& operator=(Socket&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Socket() {
    if (fd_ >= 0) ::close(fd_);
  }
  int fd() const { return fd_; }
  bool open() const { return fd_ >= 0; }

 private:
  int fd_;
};

// Milliseconds for poll.
int left(Deadline deadline) {
  const auto ms =
      std::chrono::duration_cast<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now())
          .count();
  return static_cast<int>(std::clamp<std::int64_t>(ms, 0, 1 << 30));
}

// Whether the socket is ready before the deadline.
bool wait_for(int fd, short events, Deadline deadline) {
  pollfd item{fd, events, 0};
  int ready = 0;
  do ready = ::poll(&item, 1, left(deadline));
  while (ready < 0 && errno == EINTR && std::chrono::steady_clock::now() < deadline);
  return ready > 0;
}

bool send_all(int fd, const std::string& bytes, Deadline deadline) {
  std::size_t sent = 0;
  while (sent < bytes.size()) {
    const auto n = ::send(fd, bytes.data() + sent, bytes.size() - sent, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n > 0)
      sent += static_cast<std::size_t>(n);
    else if ((errno != EAGAIN && errno != EINTR) || !wait_for(fd, POLLOUT, deadline))
      return false;
  }
  return true;
}

bool receive_all(int fd, char* out, std::size_t size, Deadline deadline) {
  while (size > 0) {
    const auto n = ::recv(fd, out, size, MSG_DONTWAIT);
    if (n == 0) return false;
    if (n > 0) {
      out += n;
      size -= static_cast<std::size_t>(n);
    } else if ((errno != EAGAIN && errno != EINTR) || !wait_for(fd, POLLIN, deadline)) {
      return false;
    }
  }
  return true;
}

void put(std::string& out, std::uint32_t number) {
  out.append(reinterpret_cast<const char*>(&number), sizeof number);
}
std::uint32_t get(const char* in) {
  std::uint32_t number;
  std::memcpy(&number, in, sizeof number);
  return number;
}
std::string head(std::initializer_list<std::uint32_t> numbers) {
  std::string out(kMagic, sizeof kMagic);
  for (const std::uint32_t number : numbers) put(out, number);
  return out;
}

// A resolved address and its list.
class Addresses {
 public:
  Addresses(const std::string& host, int port) {
    addrinfo hints{};
    hints.ai_family = AF_UNSPEC;
    hints.ai_socktype = SOCK_STREAM;
    error_ = ::getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &list_);
  }
  ~Addresses() {
    if (list_) ::freeaddrinfo(list_);
  }
  Addresses(const Addresses&) = delete;
  Addresses& operator=(const Addresses&) = delete;
  const addrinfo* first() const { return list_; }
  const char* error() const { return error_ ? ::gai_strerror(error_) : nullptr; }

 private:
  addrinfo* list_ = nullptr;
  int error_ = 0;
};

std::string number_of(const sockaddr* address, socklen_t size) {
  char host[NI_MAXHOST] = "";
  ::getnameinfo(address, size, host, sizeof host, nullptr, 0, NI_NUMERICHOST);
  return host;
}

std::string host_name() {
  char name[256] = "";
  ::gethostname(name, sizeof name - 1);
  return name;
}

// A connection that has not said yet, or not completely, who it is.
struct Visitor {
  Socket socket;
  std::string bytes;
};

// What a rank does to meet the others.
struct Meeting {
  Launch launch;
  std::chrono::milliseconds timeout;
  Deadline deadline;
  Socket socket;  // rank 0: listens; else: to rank 0
  std::string local;
  std::vector<Socket> peers;       // rank 0, by rank
  std::vector<std::string> texts;  // rank 0, by rank
  std::list<Visitor> visitors;     // rank 0

  std::string place() const { return concat(launch.address, ":", launch.port); }
  std::string who() const { return concat("rank ", launch.rank, " of ", launch.world_size); }
  double seconds() const { return std::chrono::duration<double>(timeout).count(); }

  void listen();
  bool try_listen(const addrinfo& address, bool everywhere, int& error);
  void connect();
  bool try_connect(const addrinfo& address, int& error);
  std::vector<std::string> collect(const std::string& own);
  void accept();
  bool read(Visitor& visitor);
  bool admit(Visitor& visitor);
  [[noreturn]] void refuse(const std::string& message, int fd);
  std::vector<std::string> ask(const std::string& own);
};

bool Meeting::try_listen(const addrinfo& address, bool everywhere, int& error) {
  Socket made(::socket(address.ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!made.open()) return error = errno, false;
  const int on = 1;
  ::setsockopt(made.fd(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  sockaddr_storage where{};
  std::memcpy(&where, address.ai_addr, address.ai_addrlen);
  if (everywhere && address.ai_family == AF_INET)
    reinterpret_cast<sockaddr_in*>(&where)->sin_addr.s_addr = INADDR_ANY;
  if (everywhere && address.ai_family == AF_INET6)
    reinterpret_cast<sockaddr_in6*>(&where)->sin6_addr = IN6ADDR_ANY_INIT;
  if (::bind(made.fd(), reinterpret_cast<const sockaddr*>(&where), address.ai_addrlen) != 0 ||
      ::listen(made.fd(), 128) != 0)
    return error = errno, false;
  socket = std::move(made);
  local = everywhere ? host_name() : number_of(address.ai_addr, address.ai_addrlen);
  return true;
}

// On the address itself, so that what is for this machine alone stays there; on all of them where it is not
// one of this machine's (behind a forwarded port).
void Meeting::listen() {
  const Addresses addresses(launch.address, launch.port);
  if (addresses.error())
    fail<CollectiveError>(who(), ": MASTER_ADDR ", launch.address, " is no known host: ", addresses.error());
  int error = 0;
  for (const bool everywhere : {false, true}) {
    for (const addrinfo* a = addresses.first(); a; a = a->ai_next)
      if (try_listen(*a, everywhere, error)) return;
    if (error != EADDRNOTAVAIL) break;
  }
  fail<CollectiveError>(who(), ": cannot listen on ", place(), ": ", std::strerror(error),
                        "; MASTER_PORT must be a free port, MASTER_ADDR an address of the machine of rank 0");
}

bool Meeting::try_connect(const addrinfo& address, int& error) {
  Socket made(::socket(address.ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!made.open()) return error = errno, false;
  if (::connect(made.fd(), address.ai_addr, address.ai_addrlen) != 0) {
    if (errno != EINPROGRESS) return error = errno, false;
    if (!wait_for(made.fd(), POLLOUT,
                  std::min(deadline, std::chrono::steady_clock::now() + std::chrono::seconds(5))))
      return error = ETIMEDOUT, false;
    socklen_t size = sizeof error;
    ::getsockopt(made.fd(), SOL_SOCKET, SO_ERROR, &error, &size);
    if (error != 0) return false;
  }
  sockaddr_storage own{}, other{};
  socklen_t size = sizeof own, other_size = sizeof other;
  ::getsockname(made.fd(), reinterpret_cast<sockaddr*>(&own), &size);
  ::getpeername(made.fd(), reinterpret_cast<sockaddr*>(&other), &other_size);
  // Where nobody listens yet, a connection inside one machine can be given the port it asks for as its own.
  if (size == other_size && std::memcmp(&own, &other, size) == 0) return error = ECONNREFUSED, false;
  local = number_of(reinterpret_cast<const sockaddr*>(&own), size);
  socket = std::move(made);
  return true;
}

void Meeting::connect() {
  std::string problem;
  do {
    const Addresses addresses(launch.address, launch.port);
    if (addresses.error()) problem = addresses.error();
    int error = 0;
    for (const addrinfo* a = addresses.first(); a; a = a->ai_next) {
      if (try_connect(*a, error)) return;
      problem = std::strerror(error);
    }
    std::this_thread::sleep_for(kRetry);
  } while (std::chrono::steady_clock::now() < deadline);
  fail<CollectiveError>(who(), ": rank 0 does not answer at ", place(), " within ", seconds(),
                        " s: ", problem);
}

// ---- rank 0 ----

// Tells everybody who has come, and the newcomer, why there will be no run.
void Meeting::refuse(const std::string& message, int fd) {
  const std::string answer = head({1, static_cast<std::uint32_t>(message.size())}) + message;
  const Deadline soon = std::chrono::steady_clock::now() + std::chrono::seconds(1);
  send_all(fd, answer, soon);
  for (const Socket& peer : peers)
    if (peer.open()) send_all(peer.fd(), answer, soon);
  fail<CollectiveError>(message);
}

void Meeting::accept() {
  while (true) {
    Socket made(::accept4(socket.fd(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (!made.open()) return;
    if (visitors.size() == kMostVisitors) visitors.pop_front();
    visitors.push_back({std::move(made), {}});
  }
}

// Takes what has come. False when it is nobody of ours.
bool Meeting::read(Visitor& visitor) {
  char buffer[4096];
  while (true) {
    const auto n = ::recv(visitor.socket.fd(), buffer, sizeof buffer, MSG_DONTWAIT);
    if (n == 0) return false;
    if (n < 0) return errno == EAGAIN || errno == EINTR;
    visitor.bytes.append(buffer, static_cast<std::size_t>(n));
    const std::size_t known = std::min(visitor.bytes.size(), sizeof kMagic);
    if (visitor.bytes.compare(0, known, kMagic, known) != 0) return false;
    if (visitor.bytes.size() > sizeof kMagic + 12 + kMostBytes) return false;
  }
}

// Takes a visitor whose text is complete as the rank it says it is. False when it is not complete.
bool Meeting::admit(Visitor& visitor) {
  constexpr std::size_t kHead = sizeof kMagic + 12;
  const std::string& bytes = visitor.bytes;
  if (bytes.size() < kHead) return false;
  const std::uint32_t rank = get(bytes.data() + 8), size = get(bytes.data() + 12),
                      length = get(bytes.data() + 16);
  if (bytes.size() < kHead + length) return false;
  const int fd = visitor.socket.fd();
  if (size != static_cast<std::uint32_t>(launch.world_size))
    refuse(concat("rank ", rank, " counts ", size, " ranks and rank 0 counts ", launch.world_size,
                  "; WORLD_SIZE must be the same for all"),
           fd);
  if (rank == 0 || rank >= size) refuse(concat("a second process says that it is rank ", rank), fd);
  if (peers[rank].open()) refuse(concat("two processes say that they are rank ", rank), fd);
  texts[rank] = bytes.substr(kHead, length);
  peers[rank] = std::move(visitor.socket);
  return true;
}

std::vector<std::string> Meeting::collect(const std::string& own) {
  const auto n = static_cast<std::size_t>(launch.world_size);
  peers.resize(n);
  texts.resize(n);
  texts[0] = own;
  std::size_t missing = n - 1;
  while (missing > 0) {
    if (std::chrono::steady_clock::now() >= deadline) {
      std::string ranks;
      for (std::size_t r = 1; r < n; ++r)
        if (!peers[r].open()) ranks += concat(ranks.empty() ? "" : ", ", r);
      refuse(concat(missing, " of ", n, " ranks did not come to ", place(), " within ", seconds(),
                    " s: ", ranks),
             -1);
    }
    std::vector<pollfd> items = {{socket.fd(), POLLIN, 0}};
    for (const Visitor& visitor : visitors) items.push_back({visitor.socket.fd(), POLLIN, 0});
    ::poll(items.data(), items.size(), std::min(left(deadline), 1000));
    for (auto visitor = visitors.begin(); visitor != visitors.end();) {
      const bool ours = read(*visitor);
      const bool admitted = ours && admit(*visitor);
      missing -= admitted;
      visitor = !ours || admitted ? visitors.erase(visitor) : std::next(visitor);
    }
    accept();
  }
  std::string all;
  for (const std::string& text : texts) {
    put(all, static_cast<std::uint32_t>(text.size()));
    all += text;
  }
  const std::string answer = head({0, static_cast<std::uint32_t>(all.size())}) + all;
  for (std::size_t r = 1; r < n; ++r)
    if (!send_all(peers[r].fd(), answer, deadline))
      fail<CollectiveError>("rank ", r, " went away while the ranks met");
  return std::move(texts);
}

// ---- other ranks ----

std::vector<std::string> Meeting::ask(const std::string& own) {
  const std::string question =
      head({static_cast<std::uint32_t>(launch.rank), static_cast<std::uint32_t>(launch.world_size),
            static_cast<std::uint32_t>(own.size())}) +
      own;
  char begin[sizeof kMagic + 8];
  // Rank 0 has as long for the last rank to come; its answer follows.
  const Deadline patient = std::chrono::steady_clock::now() + timeout + std::chrono::seconds(5);
  if (!send_all(socket.fd(), question, deadline) || !receive_all(socket.fd(), begin, sizeof begin, patient))
    fail<CollectiveError>(who(), ": rank 0 at ", place(), " went away while the ranks met");
  if (std::memcmp(begin, kMagic, sizeof kMagic) != 0)
    fail<CollectiveError>(who(), ": what listens at ", place(),
                          " is not rank 0 of this program; choose another MASTER_PORT");
  const std::uint32_t status = get(begin + 8), size = get(begin + 12);
  std::string bytes(std::min<std::size_t>(size, kMostBytes * static_cast<std::size_t>(launch.world_size)),
                    '\0');
  if (bytes.size() != size || !receive_all(socket.fd(), bytes.data(), bytes.size(), patient))
    fail<CollectiveError>(who(), ": the answer of rank 0 at ", place(), " is incomplete");
  if (status != 0) fail<CollectiveError>(who(), ": ", bytes);
  std::vector<std::string> all;
  for (std::size_t at = 0; at + 4 <= bytes.size();) {
    const std::uint32_t length = get(bytes.data() + at);
    all.push_back(bytes.substr(at + 4, length));
    at += 4 + length;
  }
  if (all.size() != static_cast<std::size_t>(launch.world_size))
    fail<CollectiveError>(who(), ": the answer of rank 0 at ", place(), " has ", all.size(), " texts");
  return all;
}

}  // namespace meeting

struct Rendezvous::Impl : meeting::Meeting {};

Rendezvous::Rendezvous(const Launch& launch, std::chrono::milliseconds timeout)
    : impl_(std::make_unique<Impl>()) {
  impl_->launch = launch;
  impl_->timeout = timeout;
  impl_->deadline = std::chrono::steady_clock::now() + timeout;
  if (launch.rank == 0)
    impl_->listen();
  else
    impl_->connect();
}

Rendezvous::~Rendezvous() = default;

const std::string& Rendezvous::local_address() const {
  return impl_->local;
}

std::vector<std::string> Rendezvous::exchange(const std::string& own) {
  RLHF_CHECK(own.size() <= meeting::kMostBytes, "Rendezvous: a text of ", own.size(), " bytes, at most ",
             meeting::kMostBytes);
  return impl_->launch.rank == 0 ? impl_->collect(own) : impl_->ask(own);
}

}  // namespace rlhf
