#include "rlhf/model/layer_stream.h"

#include <algorithm>

#include "rlhf/core/error.h"

namespace rlhf {

LayerStream::LayerStream(DeviceMemory& memory, std::vector<ElementRange> layers)
    : memory_(memory), layers_(std::move(layers)), coming_(memory.new_queue(false)) {
  std::size_t end = 0;
  for (const ElementRange& range : layers_) {
    if (range.size() == 0) continue;
    if (end == 0) first_ = range.begin;
    RLHF_CHECK(end == 0 || range.begin == end, "layers that stay on the host are not one behind the other");
    end = range.end;
    largest_ = std::max(largest_, range.size());
  }
  rounded_.resize(end - first_);
  pinned_ = PinnedMemory(memory, rounded_.data(), rounded_.size() * sizeof(Bfloat16));
  places_ = Buffer<Bfloat16>(kPlaces * largest_, &memory);
}

LayerStream::~LayerStream() {
  coming_->synchronize();
}

const ElementRange* LayerStream::range_of(std::size_t i) const {
  const auto found = std::ranges::find_if(layers_, [&](const ElementRange& range) { return range.holds(i); });
  return found == layers_.end() ? nullptr : &*found;
}

const Bfloat16* LayerStream::address_of(std::size_t i) const {
  const ElementRange* range = range_of(i);
  RLHF_CHECK(range, "place ", i, " is in no layer that stays on the host");
  return places_.data() + place_of(static_cast<std::size_t>(range - layers_.data())) * largest_ +
         (i - range->begin);
}

void LayerStream::set(std::span<const float> flat) {
  coming_->synchronize();
  const auto from = flat.subspan(first_, rounded_.size());
  std::ranges::transform(from, rounded_.begin(), [](float value) { return from_float<Bfloat16>(value); });
  there_.fill(-1);
}

// It takes the place of a layer that all work queued so far may read.
void LayerStream::bring(std::size_t layer) {
  const ElementRange range = layers_[layer];
  coming_->wait_for(memory_);
  coming_->queue_upload(places_.data() + place_of(layer) * largest_, rounded_.data() + range.begin - first_,
                        range.size() * sizeof(Bfloat16));
  there_[place_of(layer)] = static_cast<std::int64_t>(layer);
}

void LayerStream::use(std::int64_t layer) {
  const auto now = static_cast<std::size_t>(layer), next = now + 1;
  if (layers_[now].size() == 0) return;
  if (!is_there(now)) bring(now);
  memory_.wait_for(*coming_);
  if (next < layers_.size() && !is_there(next)) bring(next);
}

}  // namespace rlhf
