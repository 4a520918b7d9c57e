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
    std::vector<Slice> slices;
    for (int r = 0; r < collective_.world_size(); ++r)
      slices.push_back(slice_of(count, r, collective_.world_size()));
    reduce_parts(values, slices);
  }

  void reduce_parts(float* values, const std::vector<Slice>& parts) override {
    const std::size_t longest = std::ranges::max(parts, {}, &Slice::size).size();
    for (std::size_t begin = 0; begin < longest; begin += part_) {
      std::vector<Slice> places;  // of the parts' pieces, side by side on the host
      for (const Slice& part : parts) {
        const std::size_t at = places.empty() ? 0 : places.back().end;
        places.push_back({at, at + part_of(part, begin).size()});
      }
      pieces_.resize(places.back().end);
      for (std::size_t r = 0; r < parts.size(); ++r)
        memory_.download(pieces_.data() + places[r].begin, values + part_of(parts[r], begin).begin,
                         places[r].size() * sizeof(float));
      collective_.reduce_parts(pieces_, places);
      memory_.upload(values + part_of(parts[own()], begin).begin, pieces_.data() + places[own()].begin,
                     places[own()].size() * sizeof(float));
    }
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

  // Of a slice what begins at `begin` and is no longer than a part.
  Slice part_of(const Slice& slice, std::size_t begin) const {
    const std::size_t first = slice.begin + std::min(begin, slice.size());
    return {first, std::min(first + part_, slice.end)};
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
