#pragma once

#include <cstddef>
#include <filesystem>
#include <span>
#include <string>

namespace rlhf {

/// A whole file mapped read-only into memory; pages are read from disk when touched. Move-only; safe to read
/// from several threads. The file must not be shortened while it is mapped (the system would end the
/// process).
class MappedFile {
 public:
  /// @throws IoError when the file is missing, not a regular file or not readable.
  explicit MappedFile(std::filesystem::path path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;

  /// Empty for an empty file.
  std::span<const std::byte> bytes() const { return {data_, size_}; }
  const std::filesystem::path& path() const { return path_; }

 private:
  void unmap() noexcept;

  std::filesystem::path path_;
  const std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace rlhf
