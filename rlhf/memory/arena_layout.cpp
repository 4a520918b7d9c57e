#include "rlhf/memory/arena_layout.h"

#include <algorithm>

#include "rlhf/core/error.h"

namespace rlhf {

ArenaLayout::ArenaLayout(std::size_t capacity, std::size_t slab_bytes)
    : capacity_(capacity / kAlignment * kAlignment), slab_bytes_(slab_bytes) {
  RLHF_CHECK(slab_bytes > 0 && slab_bytes % kAlignment == 0, "arena: slabs of ", slab_bytes,
             " bytes, expected a multiple of ", kAlignment);
}

std::size_t ArenaLayout::top() const {
  return pieces_.empty() ? 0 : pieces_.rbegin()->second;
}

bool ArenaLayout::try_set_slabs(std::int64_t slabs) {
  if (slabs < 0 || slabs > most_slabs()) return false;
  slabs_ = slabs;
  note_peak();
  return true;
}

std::optional<std::size_t> ArenaLayout::try_allocate(std::size_t bytes) {
  if (bytes > capacity_) return std::nullopt;  // so that rounding up cannot overflow
  bytes = std::max(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  std::size_t begin = 0;
  for (const auto& [offset, end] : pieces_) {
    if (offset - begin >= bytes) break;
    begin = end;
  }
  if (begin + bytes > boundary()) return std::nullopt;
  pieces_.emplace(begin, begin + bytes);
  piece_bytes_ += bytes;
  note_peak();
  return begin;
}

void ArenaLayout::release(std::size_t offset) {
  const auto piece = pieces_.find(offset);
  if (piece == pieces_.end()) fail<InternalError>("arena: no piece begins at byte ", offset);
  piece_bytes_ -= piece->second - piece->first;
  pieces_.erase(piece);
}

void ArenaLayout::note_peak() {
  peak_bytes_ = std::max(peak_bytes_, top() + capacity_ - boundary());
}

}  // namespace rlhf
