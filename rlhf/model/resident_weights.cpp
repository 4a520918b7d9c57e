#include "rlhf/model/resident_weights.h"

#include <algorithm>
#include <cstring>
#include <functional>

#include "rlhf/core/error.h"
#include "rlhf/distributed/device_collective.h"
#include "rlhf/kernels/float_hash.h"
#include "rlhf/model/map_weights.h"

namespace rlhf {
namespace {

// Elements that are rounded on the host at a time.
constexpr std::size_t kChunk = std::size_t{4} << 20;

bool holds(std::span<const float> range, const float* at) {
  return !std::less<>()(at, range.data()) && std::less<>()(at, range.data() + range.size());
}

std::span<const float> host_of(const FrozenWeights& frozen) {
  return {frozen.host.data(), frozen.host.size()};
}

}  // namespace

ResidentWeights::ResidentWeights(const Accelerator& accelerator, const DecoderWeights<float>& weights,
                                 Host host)
    : accelerator_(accelerator),
      host_(std::move(host)),
      slice_(accelerator.ranks ? accelerator.ranks->slice(host_.learning.size())
                               : Slice{0, host_.learning.size()}),
      master_(slice_.size(), accelerator.memory),
      shadow_(host_.learning.size(), accelerator.memory) {
  if (!host_.host_layers.empty())
    stream_ = std::make_unique<LayerStream>(*accelerator.memory, host_.host_layers);
  for (const auto& frozen : host_.frozen)
    if (frozen->device.size() == 0)
      frozen->device = Buffer<Bfloat16>(num_on_device(*frozen), accelerator.memory);
  hold_gradient();
  map(weights);
}

void ResidentWeights::hold_gradient() {
  gradient_ = {};
  if (host_.gradient_parts)
    sliced_ = std::make_unique<SlicedGradient>(*host_.gradient_parts, accelerator_);
  else
    gradient_ = Buffer<float>(host_.gradient.size(), accelerator_.memory);
}

void ResidentWeights::slice_gradient(const DecoderWeights<float>& weights, GradientParts parts) {
  host_.gradient_parts = std::move(parts);
  hold_gradient();
  map(weights);
}

// The host's addresses say which element is meant.
void ResidentWeights::map(const DecoderWeights<float>& weights) {
  const auto value = [&](const float* at, std::int64_t) -> const Bfloat16* {
    if (holds(host_.learning, at)) return shadow_.data() + (at - host_.learning.data());
    for (const auto& frozen : host_.frozen)
      if (holds(host_of(*frozen), at))
        return frozen_address(*frozen, static_cast<std::size_t>(at - frozen->host.data()));
    fail<InternalError>("a tensor lies in none of its model's buffers");
  };
  weights_ = map_weights<Bfloat16>(weights, value, [&](const float* at, std::int64_t) {
    const auto i = static_cast<std::size_t>(at - host_.gradient.data());
    return sliced_ ? sliced_->address(i) : gradient_.data() + i;
  });
  weights_.stream = stream_.get();
  weights_.gradient_sink = sliced_.get();
}

std::size_t ResidentWeights::num_on_device(const FrozenWeights& frozen) const {
  const bool is_own = &frozen == host_.frozen.back().get();
  return frozen.host.size() - (is_own && stream_ ? stream_->num_elements() : 0);
}

// What lies behind the layers that stay on the host moves up.
const Bfloat16* ResidentWeights::frozen_address(FrozenWeights& frozen, std::size_t i) {
  if (!stream_ || &frozen != host_.frozen.back().get()) return frozen.device.data() + i;
  if (stream_->range_of(i)) return stream_->address_of(i);
  return frozen.device.data() + (i < stream_->first() ? i : i - stream_->num_elements());
}

std::size_t ResidentWeights::frozen_bytes() const {
  return host_.frozen.back()->device.bytes() + (stream_ ? stream_->bytes() : 0);
}

const DecoderWeights<Bfloat16>& ResidentWeights::weights() {
  const std::lock_guard lock(mutex_);
  upload();
  return weights_;
}

void ResidentWeights::upload() {
  for (const auto& frozen : host_.frozen) {
    if (!frozen->device_is_old) continue;
    const std::lock_guard lock(frozen->uploading);
    if (!frozen->device_is_old) continue;
    upload_frozen(*frozen);
    frozen->device_is_old = false;
  }
  if (!device_is_old_ || size() == 0) return;
  device_is_old_ = false;
  accelerator_.memory->upload(master_.data(), slice_.of(host_.learning).data(), master_.bytes());
  if (slice_.size() < size()) return upload_rounded(shadow_.data(), host_.learning);
  accelerator_.kernels->narrow(shadow_.data(), master_.data(), static_cast<std::int64_t>(size()),
                               accelerator_.memory->queue());
  accelerator_.memory->synchronize();
}

void ResidentWeights::upload_frozen(FrozenWeights& frozen) {
  const std::span<const float> all = host_of(frozen);
  if (!stream_ || &frozen != host_.frozen.back().get()) return upload_rounded(frozen.device.data(), all);
  stream_->set(all);
  upload_rounded(frozen.device.data(), all.first(stream_->first()));
  upload_rounded(frozen.device.data() + stream_->first(),
                 all.subspan(stream_->first() + stream_->num_elements()));
}

void ResidentWeights::upload_rounded(Bfloat16* to, std::span<const float> from) {
  std::vector<Bfloat16> rounded;
  for (std::size_t begin = 0; begin < from.size(); begin += kChunk) {
    const auto part = from.subspan(begin, std::min(kChunk, from.size() - begin));
    rounded.resize(part.size());
    std::ranges::transform(part, rounded.begin(), [](float value) { return from_float<Bfloat16>(value); });
    accelerator_.memory->upload(to + begin, rounded.data(), rounded.size() * sizeof(Bfloat16));
  }
  accelerator_.memory->synchronize();
}

float* ResidentWeights::own_gradient() {
  if (sliced_) return sliced_->values().data();
  if (accelerator_.ranks) accelerator_.ranks->reduce_scatter(gradient_.data(), size());
  return gradient_.data() + slice_.begin;
}

void ResidentWeights::zero_gradient() {
  if (sliced_) return sliced_->zero();
  if (gradient_.size() > 0) accelerator_.memory->zero(gradient_.data(), gradient_.bytes());
}

void ResidentWeights::update_host() {
  if (!host_is_old_.exchange(false)) return;
  accelerator_.memory->download(slice_.of(host_.learning).data(), master_.data(), master_.bytes());
  if (accelerator_.ranks) accelerator_.ranks->host().all_gather(host_.learning);
}

std::uint64_t ResidentWeights::learned_hash() const {
  if (device_is_old_) return kernels::hash_floats(host_.learning);
  Buffer<std::uint64_t> numbers(1 + static_cast<std::size_t>(kernels::kSumPartials), accelerator_.memory);
  accelerator_.kernels->hash_floats(numbers.data(), numbers.data() + 1, master_.data(),
                                    static_cast<std::int64_t>(master_.size()), slice_.begin,
                                    accelerator_.memory->queue());
  std::uint64_t hash = 0;
  accelerator_.memory->download(&hash, numbers.data(), sizeof(hash));
  if (!accelerator_.ranks) return hash;
  std::uint64_t all = 0;
  const std::string own(reinterpret_cast<const char*>(&hash), sizeof(hash));
  for (const std::string& bytes : accelerator_.ranks->host().all_gather_bytes(own)) {
    RLHF_CHECK(bytes.size() == sizeof(hash), "learned_hash: a rank sent ", bytes.size(), " bytes");
    std::memcpy(&hash, bytes.data(), sizeof(hash));
    all += hash;
  }
  return all;
}

void ResidentWeights::copy_from(ResidentWeights& other) {
  RLHF_CHECK(size() == other.size(), "a model with ", size(),
             " learning weights cannot take those of one with ", other.size());
  other.weights();
  if (size() == 0) return;
  accelerator_.memory->copy(master_.data(), other.master_.data(), master_.bytes());
  accelerator_.memory->copy(shadow_.data(), other.shadow_.data(), shadow_.bytes());
  device_is_old_ = false;
  device_written();
}

const DecoderWeights<Bfloat16>& resident_weights(const DecoderWeights<float>& weights) {
  RLHF_CHECK(weights.resident,
             "a pass runs on an accelerator and the model does not: call Parameters::place_on first");
  return weights.resident->weights();
}

}  // namespace rlhf
