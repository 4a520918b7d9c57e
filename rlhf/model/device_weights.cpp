#include "rlhf/model/device_weights.h"

#include <vector>

#include "rlhf/model/map_weights.h"

namespace rlhf {

template <class T>
DeviceWeights<T>::DeviceWeights(DeviceMemory& memory, const DecoderWeights<float>& host) : memory_(&memory) {
  weights_ = map_weights<T>(
      host, [&](const float* at, std::int64_t count) { return place(at, count); },
      [&](const float* at, std::int64_t count) {
        Buffer<Wide<T>>& buffer = gradients_[at];
        if (buffer.size() == 0) buffer = Buffer<Wide<T>>(static_cast<std::size_t>(count), memory_);
        return buffer.data();
      });
}

template <class T>
const T* DeviceWeights<T>::place(const float* host, std::int64_t count) {
  Buffer<T>& buffer = values_[host];
  if (buffer.size() == 0) {
    std::vector<T> rounded;
    for (std::int64_t i = 0; i < count; ++i) rounded.push_back(from_float<T>(host[i]));
    buffer = Buffer<T>(rounded.size(), memory_);
    memory_->upload(buffer.data(), rounded.data(), rounded.size() * sizeof(T));
  }
  return buffer.data();
}

template <class T>
const Wide<T>* DeviceWeights<T>::gradient_of(const float* host) const {
  const auto found = gradients_.find(host);
  return found == gradients_.end() ? nullptr : found->second.data();
}

template <class T>
std::size_t DeviceWeights<T>::bytes() const {
  std::size_t total = 0;
  for (const auto& [host, buffer] : values_) total += buffer.bytes();
  for (const auto& [host, buffer] : gradients_) total += buffer.bytes();
  return total;
}

template class DeviceWeights<float>;
template class DeviceWeights<Bfloat16>;

}  // namespace rlhf
