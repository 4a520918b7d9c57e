#include "rlhf/core/atomic_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include "rlhf/core/error.h"

namespace rlhf {
namespace {

// Permissions a plain open(…, 0666) would have given; mkstemp makes 0600 files.
mode_t default_file_mode() {
  const mode_t mask = umask(0);
  umask(mask);
  return 0666 & ~mask;
}

// A rename is durable only when the folder that holds the name is.
void sync_folder(const std::filesystem::path& folder) {
  const int descriptor = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (descriptor < 0) return;
  ::fsync(descriptor);
  ::close(descriptor);
}

}  // namespace

AtomicFile::AtomicFile(std::filesystem::path path) : path_(std::move(path)) {
  std::error_code error;
  const auto status = std::filesystem::status(path_, error);
  if (std::filesystem::is_other(status)) {
    // A device or pipe is written to; a file in its place would take it away from everybody.
    descriptor_ = ::open(path_.c_str(), O_WRONLY | O_CLOEXEC);
    if (descriptor_ < 0) fail_with_errno("open");
    return;
  }
  // A link stays one.
  if (std::filesystem::is_regular_file(status) && std::filesystem::is_symlink(path_, error))
    path_ = std::filesystem::canonical(path_, error);
  const std::string pattern = path_.string() + ".tmp-XXXXXX";
  std::vector<char> name(pattern.begin(), pattern.end());
  name.push_back('\0');
  descriptor_ = ::mkostemp(name.data(), O_CLOEXEC);
  if (descriptor_ < 0) fail_with_errno("create");
  temporary_ = name.data();
}

AtomicFile::~AtomicFile() {
  if (descriptor_ >= 0) ::close(descriptor_);
  if (!temporary_.empty()) ::unlink(temporary_.c_str());
}

void AtomicFile::fail_with_errno(std::string_view action) {
  const int code = errno;
  fail<IoError>(path_.string(), ": cannot ", action, " at offset ", offset_bytes_, ": ", std::strerror(code),
                code == ENOSPC ? " (free some space or choose another folder)" : "");
}

void AtomicFile::write(const void* data, std::size_t size) {
  RLHF_CHECK(descriptor_ >= 0, path_.string(), ": write after commit");
  const char* bytes = static_cast<const char*>(data);
  while (size > 0) {
    const ssize_t written = ::write(descriptor_, bytes, size);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) fail_with_errno("write");
    bytes += written;
    size -= static_cast<std::size_t>(written);
    offset_bytes_ += static_cast<std::size_t>(written);
  }
}

void AtomicFile::commit() {
  RLHF_CHECK(descriptor_ >= 0, path_.string(), ": committed twice");
  if (temporary_.empty()) {
    if (::close(std::exchange(descriptor_, -1)) != 0) fail_with_errno("close");
    return;
  }
  if (::fchmod(descriptor_, default_file_mode()) != 0) fail_with_errno("set permissions");
  if (::fsync(descriptor_) != 0) fail_with_errno("flush");
  const int closed = ::close(std::exchange(descriptor_, -1));
  if (closed != 0) fail_with_errno("close");
  if (::rename(temporary_.c_str(), path_.c_str()) != 0) fail_with_errno("rename into place");
  temporary_.clear();
  sync_folder(path_.has_parent_path() ? path_.parent_path() : std::filesystem::path("."));
}

void write_file_atomically(const std::filesystem::path& path, std::string_view content) {
  if (path.has_parent_path()) {
    std::error_code error;
    std::filesystem::create_directories(path.parent_path(), error);
    if (error) fail<IoError>(path.parent_path().string(), ": cannot create the folder: ", error.message());
  }
  AtomicFile file(path);
  file.write(content);
  file.commit();
}

std::string read_text_file(const std::filesystem::path& path, std::size_t max_bytes) {
  std::error_code error;
  const auto status = std::filesystem::status(path, error);
  if (!std::filesystem::exists(status)) fail<IoError>(path.string(), ": no such file");
  if (!std::filesystem::is_regular_file(status)) fail<IoError>(path.string(), ": expected a regular file");
  std::ifstream file(path, std::ios::binary);
  if (!file) fail<IoError>(path.string(), ": cannot be opened for reading");
  std::string text;
  char buffer[1 << 16];
  while (file.read(buffer, sizeof buffer) || file.gcount() > 0) {
    text.append(buffer, static_cast<std::size_t>(file.gcount()));
    if (text.size() > max_bytes)
      fail<IoError>(path.string(), ": larger than the limit of ", max_bytes, " bytes");
  }
  if (file.bad()) fail<IoError>(path.string(), ": read error at offset ", text.size());
  return text;
}

}  // namespace rlhf
