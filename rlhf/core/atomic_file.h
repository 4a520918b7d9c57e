#pragma once

#include <cstddef>
#include <filesystem>
#include <string>
#include <string_view>

namespace rlhf {

/// A file that appears under its name only when it is complete: bytes go to a temporary name in the same
/// folder, `commit` flushes them to the disk and renames. A reader, or a run that is killed, sees the old
/// file or the new one, never a half. A device or a pipe is written to as it is, and a link is followed. Not
/// thread-safe.
class AtomicFile {
 public:
  /// Opens the temporary file beside `path`, whose folder must exist.
  /// @throws IoError naming the path when it cannot be created.
  explicit AtomicFile(std::filesystem::path path);
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;
  /// Removes the temporary file unless `commit` has succeeded.
  ~AtomicFile();

  /// Appends `size` bytes. @throws IoError naming path and offset, e.g. when the disk is full.
  void write(const void* data, std::size_t size);
  void write(std::string_view text) { write(text.data(), text.size()); }

  /// Makes the content durable (fsync) and visible (rename). Call once.
  /// @throws IoError; the previous file, if any, is then untouched.
  void commit();

 private:
  [[noreturn]] void fail_with_errno(std::string_view action);

  std::filesystem::path path_;
  std::filesystem::path temporary_;  ///< empty when it writes to a device or pipe, and after commit
  std::size_t offset_bytes_ = 0;
  int descriptor_ = -1;
};

/// Replaces the file at `path` by `content` through an AtomicFile; creates missing parent folders. @throws
/// IoError.
void write_file_atomically(const std::filesystem::path& path, std::string_view content);

/// Reads a whole file. @throws IoError when it is missing, is no regular file or has more than `max_bytes`.
std::string read_text_file(const std::filesystem::path& path, std::size_t max_bytes = std::size_t{1} << 30);

}  // namespace rlhf
