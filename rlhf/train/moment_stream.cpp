#include "rlhf/train/moment_stream.h"

#include <algorithm>

namespace rlhf {

MomentStream::MomentStream(DeviceMemory& memory, std::span<float> first, std::span<float> second,
                           std::size_t piece_elements)
    : memory_(memory),
      moments_{first, second},
      piece_elements_(std::clamp<std::size_t>(piece_elements, 1, std::max<std::size_t>(1, first.size()))),
      num_pieces_((first.size() + piece_elements_ - 1) / piece_elements_),
      coming_(memory.new_queue(false)),
      going_(memory.new_queue(false)),
      pinned_{PinnedMemory(memory, first.data(), first.size_bytes()),
              PinnedMemory(memory, second.data(), second.size_bytes())},
      places_(std::min(num_pieces_, kPlaces) * 2 * piece_elements_, &memory) {
  coming_->wait_for(memory_);  // the places are zeroed there
}

MomentStream::~MomentStream() {
  wait();
}

std::size_t MomentStream::count_of(std::size_t piece) const {
  return std::min(piece_elements_, moments_[0].size() - piece * piece_elements_);
}

float* MomentStream::place_of(std::size_t piece, int moment) {
  return places_.data() + (2 * (piece % kPlaces) + static_cast<std::size_t>(moment)) * piece_elements_;
}

void MomentStream::bring(std::size_t piece) {
  for (const int moment : {0, 1})
    coming_->queue_upload(place_of(piece, moment),
                          moments_[static_cast<std::size_t>(moment)].data() + piece * piece_elements_,
                          count_of(piece) * sizeof(float));
}

void MomentStream::take_back(std::size_t piece) {
  for (const int moment : {0, 1})
    going_->queue_download(moments_[static_cast<std::size_t>(moment)].data() + piece * piece_elements_,
                           place_of(piece, moment), count_of(piece) * sizeof(float));
}

void MomentStream::fetch() {
  if (fetched_ || num_pieces_ == 0) return;
  coming_->wait_for(*going_);  // of the step before
  bring(0);
  fetched_ = true;
}

// The next piece takes the place of the one before this, once that has gone back.
void MomentStream::pass(const Update& update) {
  fetch();
  for (std::size_t piece = 0; piece < num_pieces_; ++piece) {
    memory_.wait_for(*coming_);
    update(piece * piece_elements_, count_of(piece), place_of(piece, 0), place_of(piece, 1));
    if (piece + 1 < num_pieces_) {
      coming_->wait_for(*going_);
      bring(piece + 1);
    }
    going_->wait_for(memory_);
    take_back(piece);
  }
  fetched_ = false;
}

void MomentStream::wait() {
  going_->synchronize();
  coming_->synchronize();
  fetched_ = false;
}

}  // namespace rlhf
