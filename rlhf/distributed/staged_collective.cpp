#include <algorithm>
#include <utility>
#include <vector>

#include "rlhf/distributed/device_collective.h"

namespace rlhf {
namespace {

class StagedCollective : public DeviceCollective {
 public:
  StagedCollective(Collective& collective, DeviceMemory& memory, const std::string& reason,
                   std::size_t piece_elements)
      : collective_(collective),
        memory_(memory),
        text_("through the host's memory (" + reason + ")"),
        // Pieces divide evenly over the ranks, as the whole does but for its rest.
        part_(std::max<std::size_t>(piece_elements / ranks() / 64, 1) * 64) {}

  const std::string& text() const override { return text_; }
  Collective& host() const override { return collective_; }

  void reduce_scatter(float* values, std::size_t count) override {
    const Division division = divide(count, collective_.world_size());
    for_parts(division, [&](std::size_t begin, std::size_t size) {
      for (std::size_t r = 0; r < ranks(); ++r) download(r * size, values + r * division.each + begin, size);
      collective_.reduce_scatter(std::span(pieces_).first(ranks() * size));
      upload(values + own() * division.each + begin, own() * size, size);
    });
    if (division.rest == 0) return;
    float* const rest = values + ranks() * division.each;
    pieces_.resize(division.rest);
    download(0, rest, division.rest);
    collective_.all_reduce(std::span(pieces_));
    if (is_last()) upload(rest, 0, division.rest);
  }

  void all_gather(void* values, std::size_t count, std::size_t element_bytes) override {
    char* const bytes = static_cast<char*>(values);
    const Slice own = slice(count);
    const std::size_t longest =
        slice_of(count, collective_.world_size() - 1, collective_.world_size()).size();
    for (std::size_t begin = 0; begin < longest; begin += part_) {
      std::string gift(part_of(own, begin).size() * element_bytes, '\0');
      memory_.download(gift.data(), bytes + part_of(own, begin).begin * element_bytes, gift.size());
      const std::vector<std::string> gifts = collective_.all_gather_bytes(gift);
      for (int r = 0; r < collective_.world_size(); ++r) {
        const Slice theirs = part_of(slice_of(count, r, collective_.world_size()), begin);
        const std::string& got = gifts[static_cast<std::size_t>(r)];
        if (r != collective_.rank())
          memory_.upload(bytes + theirs.begin * element_bytes, got.data(), got.size());
      }
    }
  }

  void wait() override { memory_.synchronize(); }

 private:
  std::size_t ranks() const { return static_cast<std::size_t>(collective_.world_size()); }
  std::size_t own() const { return static_cast<std::size_t>(collective_.rank()); }
  bool is_last() const { return own() == ranks() - 1; }

  // Of a slice what begins at `begin` and is no longer than a part.
  Slice part_of(const Slice& slice, std::size_t begin) const {
    const std::size_t first = slice.begin + std::min(begin, slice.size());
    return {first, std::min(first + part_, slice.end)};
  }
  // Calls fn(begin, size) on parts of a slice, with room for that part of every rank's slice in `pieces_`.
  template <class Fn>
  void for_parts(const Division& division, const Fn& fn) {
    for (std::size_t begin = 0; begin < division.each; begin += part_) {
      const std::size_t size = std::min(part_, division.each - begin);
      pieces_.resize(ranks() * size);
      fn(begin, size);
    }
  }
  void download(std::size_t to, const float* from, std::size_t size) {
    memory_.download(pieces_.data() + to, from, size * sizeof(float));
  }
  void upload(float* to, std::size_t from, std::size_t size) {
    memory_.upload(to, pieces_.data() + from, size * sizeof(float));
  }

  Collective& collective_;
  DeviceMemory& memory_;
  std::string text_;
  std::size_t part_;
  std::vector<float> pieces_;
};

}  // namespace

std::unique_ptr<DeviceCollective> make_staged_collective(Collective& collective, DeviceMemory& memory,
                                                         const std::string& reason,
                                                         std::size_t piece_elements) {
  return std::make_unique<StagedCollective>(collective, memory, reason, piece_elements);
}

}  // namespace rlhf
