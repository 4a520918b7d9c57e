#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>

namespace rlhf {

/// Who lies where in one allocation: equal slabs from its top, pieces of any size from its bottom, one
/// boundary between them. Knows offsets in bytes and no memory; not thread-safe.
///
///     0      pieces, first fit      top()   ...   boundary()   slab n-1 ... slab 1   slab 0    capacity()
class ArenaLayout {
 public:
  static constexpr std::size_t kAlignment = 64;  ///< of pieces

  ArenaLayout() = default;
  /// @throws InvalidArgument for slabs of no bytes, or of no multiple of kAlignment.
  ArenaLayout(std::size_t capacity, std::size_t slab_bytes);

  std::size_t capacity() const { return capacity_; }
  std::size_t slab_bytes() const { return slab_bytes_; }
  std::int64_t slabs() const { return slabs_; }
  std::size_t boundary() const { return capacity_ - static_cast<std::size_t>(slabs_) * slab_bytes_; }
  /// End of the highest piece.
  std::size_t top() const;
  /// Slabs that the pieces leave room for.
  std::int64_t most_slabs() const { return static_cast<std::int64_t>((capacity_ - top()) / slab_bytes_); }
  /// Moves the boundary. @return false, and nothing has changed, when a piece is in the way or the number is
  /// negative
  bool try_set_slabs(std::int64_t slabs);

  /// Offset of a new piece in the lowest gap that holds it; nothing when there is none below the boundary.
  std::optional<std::size_t> try_allocate(std::size_t bytes);
  /// @throws InternalError when no piece begins there.
  void release(std::size_t offset);
  /// Bytes of all pieces, rounded up to kAlignment.
  std::size_t piece_bytes() const { return piece_bytes_; }
  /// Most bytes that pieces, gaps between them and slabs have taken together; never above the capacity.
  std::size_t peak_bytes() const { return peak_bytes_; }

 private:
  void note_peak();

  std::size_t capacity_ = 0, slab_bytes_ = kAlignment;
  std::int64_t slabs_ = 0;
  std::map<std::size_t, std::size_t> pieces_;  ///< end by offset
  std::size_t piece_bytes_ = 0, peak_bytes_ = 0;
};

}  // namespace rlhf
