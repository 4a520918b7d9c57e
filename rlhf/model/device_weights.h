#pragma once

#include <cstddef>
#include <cstdint>
#include <unordered_map>

#include "rlhf/model/decoder_weights.h"
#include "rlhf/tensor/buffer.h"

namespace rlhf {

/// A copy of a decoder's weights in a device's memory, rounded to T, with zeroed gradients of its own for
/// those that learn. Tensors that the host's weights share (a tied head) are shared here, too. For comparing
/// devices; models that learn have ResidentWeights.
template <class T>
class DeviceWeights {
 public:
  DeviceWeights(DeviceMemory& memory, const DecoderWeights<float>& host);

  const DecoderWeights<T>& weights() const { return weights_; }
  /// The device's gradient of the tensor whose gradient on the host starts at `host`; null when there is
  /// none.
  const Wide<T>* gradient_of(const float* host) const;
  std::size_t bytes() const;

 private:
  const T* place(const float* host, std::int64_t count);

  DeviceMemory* memory_;
  std::unordered_map<const float*, Buffer<T>> values_;
  std::unordered_map<const float*, Buffer<Wide<T>>> gradients_;
  DecoderWeights<T> weights_;
};

}  // namespace rlhf
