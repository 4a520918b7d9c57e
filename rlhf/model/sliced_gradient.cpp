#include "rlhf/model/sliced_gradient.h"

#include <algorithm>
#include <iterator>

#include "rlhf/core/error.h"
#include "rlhf/distributed/device_collective.h"
#include "rlhf/kernels/accelerator.h"

namespace rlhf {
namespace {

std::size_t num_elements(const std::vector<Slice>& places) {
  std::size_t count = 0;
  for (const Slice& place : places) count += place.size();
  return count;
}

std::size_t longest_layer(const GradientParts& parts) {
  std::size_t longest = 0;
  for (const auto& layer : parts.layers) longest = std::max(longest, num_elements(layer));
  return longest;
}

// How many elements of the places come before `end` in the flat buffer.
std::size_t num_before(const std::vector<Slice>& places, std::size_t end) {
  std::size_t count = 0;
  for (const Slice& place : places) count += std::clamp(end, place.begin, place.end) - place.begin;
  return count;
}

// What each rank owns of a buffer that holds the places side by side. They ascend, so it is one stretch.
std::vector<Slice> owned_parts(const std::vector<Slice>& places, std::size_t count, int world_size) {
  std::vector<Slice> parts;
  for (int rank = 0; rank < world_size; ++rank) {
    const Slice slice = slice_of(count, rank, world_size);
    parts.push_back({num_before(places, slice.begin), num_before(places, slice.end)});
  }
  return parts;
}

}  // namespace

std::size_t GradientParts::size() const {
  std::size_t count = num_elements(rest);
  for (const auto& layer : layers) count += num_elements(layer);
  return count;
}

SlicedGradient::SlicedGradient(GradientParts parts, Collective& ranks, const Accelerator* device)
    : parts_(std::move(parts)),
      ranks_(ranks),
      device_(device),
      count_(parts_.size()),
      slice_(slice_of(count_, ranks.rank(), ranks.world_size())),
      sums_(slice_.size(), device ? device->memory : nullptr),
      layer_(longest_layer(parts_), device ? device->memory : nullptr),
      rest_(num_elements(parts_.rest), device ? device->memory : nullptr) {}

SlicedGradient::SlicedGradient(GradientParts parts, Collective& ranks)
    : SlicedGradient(std::move(parts), ranks, nullptr) {}

SlicedGradient::SlicedGradient(GradientParts parts, const Accelerator& device)
    : SlicedGradient(std::move(parts), device.ranks->host(), &device) {}

float* SlicedGradient::address(std::size_t i) {
  const auto find = [&](const std::vector<Slice>& places, Buffer<float>& buffer) -> float* {
    const bool found =
        std::ranges::any_of(places, [&](const Slice& place) { return i >= place.begin && i < place.end; });
    return found ? buffer.data() + num_before(places, i) : nullptr;
  };
  for (const auto& layer : parts_.layers)
    if (float* const at = find(layer, layer_)) return at;
  float* const at = find(parts_.rest, rest_);
  RLHF_CHECK(at, "SlicedGradient: element ", i, " is in no part of a gradient of ", count_);
  return at;
}

void SlicedGradient::layer_done(std::int64_t layer) {
  add_sums(parts_.layers.at(static_cast<std::size_t>(layer)), layer_);
}

void SlicedGradient::pass_done() {
  add_sums(parts_.rest, rest_);
}

void SlicedGradient::skip_pass() {
  for (auto layer = std::ssize(parts_.layers); layer-- > 0;) layer_done(layer);
  pass_done();
}

void SlicedGradient::zero() {
  set_zero(sums_.data(), sums_.size());
}

// Sums a part over the ranks, adds what this one owns of it to the slice, and leaves zeros.
void SlicedGradient::add_sums(const std::vector<Slice>& part, Buffer<float>& buffer) {
  const std::size_t count = num_elements(part);
  if (count == 0) return;
  const std::vector<Slice> owned = owned_parts(part, count_, ranks_.world_size());
  if (device_)
    device_->ranks->reduce_parts(buffer.data(), owned);
  else
    ranks_.reduce_parts({buffer.data(), count}, owned);
  const float* from = buffer.data();
  for (const Slice& place : part) {
    const std::size_t begin = std::clamp(slice_.begin, place.begin, place.end),
                      end = std::clamp(slice_.end, place.begin, place.end);
    if (begin < end) add(sums_.data() + (begin - slice_.begin), from + (begin - place.begin), end - begin);
    from += place.size();
  }
  set_zero(buffer.data(), count);
  if (device_) device_->ranks->wait();
}

void SlicedGradient::add(float* to, const float* from, std::size_t count) {
  if (device_)
    return device_->kernels->add_wide(to, from, static_cast<std::int64_t>(count), device_->memory->queue());
  for (std::size_t i = 0; i < count; ++i) to[i] += from[i];
}

void SlicedGradient::set_zero(float* at, std::size_t count) {
  if (device_) return device_->memory->zero(at, count * sizeof(float));
  std::fill_n(at, count, 0.0f);
}

}  // namespace rlhf
