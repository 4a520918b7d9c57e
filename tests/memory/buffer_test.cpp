// Buffers: zeros wherever their memory comes from, and only what is touched is taken from the system.
#include "rlhf/tensor/buffer.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <optional>

#include "rlhf/model/parameters.h"
#include "rlhf/tensor/arena.h"
#include "tests/catch.h"

using namespace rlhf;

namespace {

constexpr std::size_t kMiB = std::size_t{1} << 20;

// Resident set of this process.
std::size_t resident() {
  std::size_t all = 0, pages = 0;
  std::ifstream("/proc/self/statm") >> all >> pages;
  return pages * static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
}

bool is_zero(const Buffer<float>& buffer) {
  return std::all_of(buffer.data(), buffer.data() + buffer.size(), [](float x) { return x == 0; });
}

}  // namespace

TEST_CASE("a buffer is aligned, zero and its own, on either side of a large page") {
  for (const std::size_t size : {std::size_t{0}, std::size_t{1}, std::size_t{1000}, kMiB / 2 - 1, kMiB / 2,
                                 kMiB / 2 + 1, kMiB + 17, 3 * kMiB}) {
    INFO(size << " floats");
    Buffer<float> buffer(size);
    CHECK(buffer.size() == size);
    CHECK(reinterpret_cast<std::uintptr_t>(buffer.data()) % 64 == 0);
    CHECK(is_zero(buffer));
    std::fill_n(buffer.data(), size, 1.0f);
    Buffer<float> other = std::move(buffer);
    CHECK(buffer.size() == 0);
    CHECK(std::all_of(other.data(), other.data() + size, [](float x) { return x == 1; }));
    other.reserve_discard(size / 2);
    CHECK(other.size() == size);
    other.reserve_discard(2 * size + 1);
    CHECK(other.size() == 2 * size + 1);
    CHECK(is_zero(other));
  }
}

TEST_CASE("what is not touched takes no memory, and what an arena lets go returns to the system") {
  const std::size_t before = resident();
  Arena arena;
  arena.open(256 * kMiB, kMiB);
  CHECK(resident() < before + 16 * kMiB);
  REQUIRE(arena.try_set_slabs(128));
  std::memset(static_cast<char*>(arena.first_slab()) - 127 * kMiB, 1, 128 * kMiB);
  Buffer<float> piece(kMiB, &arena);
  std::fill_n(piece.data(), kMiB, 1.0f);
  CHECK(resident() > before + 124 * kMiB);
  REQUIRE(arena.try_set_slabs(8));
  arena.discard_free();
  CHECK(resident() < before + 24 * kMiB);
  CHECK(piece[kMiB - 1] == 1);
  CHECK(static_cast<char*>(arena.first_slab())[-static_cast<std::ptrdiff_t>(7 * kMiB)] == 1);
}

TEST_CASE(
    "a model that learns keeps nothing of the one it began as, and one that shares keeps what it reads") {
  ModelConfig config;
  config.vocab_size = 40000;
  config.hidden_size = 512;
  config.num_layers = 1;
  config.num_heads = config.num_kv_heads = 8;
  config.head_dim = 64;
  config.intermediate_size = 512;
  config.layer_window = {0};
  config.layer_uses_rope = {true};
  TrainableOptions frozen;
  frozen.mode = TrainableMode::kNone;
  for (const bool learns : {true, false}) {
    const std::size_t empty = resident();
    std::optional<Parameters<float>> base(std::in_place, config, frozen, nullptr);
    base->initialise(1, 0.02);
    const std::vector<float> embedding(base->weights().embedding, base->weights().embedding + 1000);
    const std::size_t bytes = base->owned_bytes();
    REQUIRE(bytes > 70 * kMiB);
    const Parameters<float> next(config, learns ? TrainableOptions() : frozen, &*base);
    CHECK(next.owned_bytes() == (learns ? bytes : 0));
    const std::size_t with_both = resident();
    CHECK(with_both > empty + (learns ? 2 : 1) * bytes - 8 * kMiB);
    base.reset();
    CHECK(resident() < with_both - (learns ? bytes : 0) + 8 * kMiB);
    CHECK(std::equal(embedding.begin(), embedding.end(), next.weights().embedding));
  }
}
