// The arena's bookkeeping against a map of bytes, and the arena over real memory.
#include "rlhf/tensor/arena.h"

#include <rapidcheck.h>

#include <cstring>
#include <thread>

#include "rlhf/core/error.h"
#include "rlhf/tensor/buffer.h"
#include "tests/catch.h"

namespace rlhf {
namespace {

constexpr std::size_t kUnit = ArenaLayout::kAlignment;

// Who owns each unit: 0 nobody, -1 a slab, else a piece.
class Units {
 public:
  Units(std::size_t units, std::size_t slab_units)
      : layout_(units * kUnit, slab_units * kUnit), slab_units_(slab_units), owner_(units) {}

  void set_slabs(std::int64_t slabs) {
    const auto begin =
        static_cast<std::int64_t>(owner_.size()) - slabs * static_cast<std::int64_t>(slab_units_);
    bool fits = slabs >= 0 && begin >= 0;
    for (std::int64_t u = std::max<std::int64_t>(0, begin); u < std::ssize(owner_); ++u)
      fits &= owner_[static_cast<std::size_t>(u)] <= 0;
    RC_ASSERT(layout_.try_set_slabs(slabs) == fits);
    if (!fits) return;
    for (std::int64_t u = 0; u < std::ssize(owner_); ++u) {
      int& owner = owner_[static_cast<std::size_t>(u)];
      if (owner <= 0) owner = u >= begin ? -1 : 0;
    }
  }
  void allocate(std::size_t bytes) {
    const std::size_t units = std::max<std::size_t>(1, (bytes + kUnit - 1) / kUnit);
    std::optional<std::size_t> first;  // the lowest run of free units
    for (std::size_t begin = 0; !first && begin + units <= owner_.size(); ++begin)
      if (std::all_of(owner_.begin() + static_cast<std::ptrdiff_t>(begin),
                      owner_.begin() + static_cast<std::ptrdiff_t>(begin + units),
                      [](int o) { return o == 0; }))
        first = begin;
    const auto offset = layout_.try_allocate(bytes);
    RC_ASSERT(offset.has_value() == first.has_value());
    if (!offset) return;
    RC_ASSERT(*offset == *first * kUnit);
    pieces_[++last_] = {*first, units};
    std::fill_n(owner_.begin() + static_cast<std::ptrdiff_t>(*first), units, last_);
  }
  void release(std::size_t which) {
    if (pieces_.empty()) return;
    const auto piece = std::next(pieces_.begin(), static_cast<std::ptrdiff_t>(which % pieces_.size()));
    layout_.release(piece->second.first * kUnit);
    std::fill_n(owner_.begin() + static_cast<std::ptrdiff_t>(piece->second.first), piece->second.second, 0);
    pieces_.erase(piece);
  }
  void check() {
    std::size_t top = 0, used = 0, slabs = 0;
    for (std::size_t u = 0; u < owner_.size(); ++u) {
      if (owner_[u] > 0) top = u + 1, ++used;
      slabs += owner_[u] < 0;
    }
    RC_ASSERT(layout_.top() == top * kUnit);
    RC_ASSERT(layout_.piece_bytes() == used * kUnit);
    RC_ASSERT(static_cast<std::size_t>(layout_.slabs()) * slab_units_ == slabs);
    RC_ASSERT(layout_.peak_bytes() >= (top + slabs) * kUnit);
    RC_ASSERT(layout_.peak_bytes() <= layout_.capacity());
    RC_ASSERT(layout_.most_slabs() == static_cast<std::int64_t>((owner_.size() - top) / slab_units_));
  }

 private:
  ArenaLayout layout_;
  std::size_t slab_units_;
  std::vector<int> owner_;
  std::map<int, std::pair<std::size_t, std::size_t>> pieces_;
  int last_ = 0;
};

TEST_CASE("slabs and pieces never meet, whatever comes and goes") {
  REQUIRE(rc::check([](const std::vector<std::pair<std::uint8_t, std::uint16_t>>& history) {
    Units units(1 + *rc::gen::inRange<std::size_t>(0, 60), 1 + *rc::gen::inRange<std::size_t>(0, 5));
    for (const auto& [what, value] : history) {
      if (what % 4 == 0) units.set_slabs(value % 14 - 1);
      if (what % 4 == 1 || what % 4 == 2) units.allocate(value % 700);
      if (what % 4 == 3) units.release(value);
      units.check();
    }
  }));
}

TEST_CASE("wrong use of an arena is refused") {
  CHECK_THROWS_AS(ArenaLayout(1000, 0), InvalidArgument);
  CHECK_THROWS_WITH(ArenaLayout(1000, 65), ContainsSubstring("slabs of 65 bytes"));
  ArenaLayout layout(1000, 64);
  CHECK(layout.capacity() == 960);
  CHECK_FALSE(layout.try_allocate(std::numeric_limits<std::size_t>::max()));
  CHECK_FALSE(layout.try_set_slabs(16));
  CHECK(layout.try_set_slabs(15));
  CHECK_FALSE(layout.try_allocate(1));
  CHECK_THROWS_AS(layout.release(64), InternalError);
}

TEST_CASE("buffers out of an arena keep what is written while slabs come and go") {
  Arena arena;
  arena.open(64 * 1024, 4096);
  auto* const slab = static_cast<char*>(arena.first_slab());
  REQUIRE(arena.try_set_slabs(4));
  for (int i = 0; i < 4; ++i) std::memset(slab - i * 4096, 'a' + i, 4096);
  {
    Buffer<float> one(1000, &arena), two(5000, &arena);
    CHECK(reinterpret_cast<std::uintptr_t>(two.data()) % 64 == 0);
    CHECK(two[4999] == 0);
    std::fill_n(one.data(), 1000, 1.0f);
    std::fill_n(two.data(), 5000, 2.0f);
    CHECK(arena.layout().piece_bytes() >= one.bytes() + two.bytes());
    CHECK(one[999] == 1);
    CHECK_FALSE(arena.try_set_slabs(11));
    CHECK(arena.try_set_slabs(10));
    CHECK_THROWS_WITH(Buffer<float>(1000, &arena), ContainsSubstring("no room for 4032 bytes"));
    two.reserve_discard(100);  // large enough
    CHECK(two.size() == 5000);
  }
  CHECK(arena.layout().piece_bytes() == 0);
  for (int i = 0; i < 4; ++i) CHECK(slab[-i * 4096 + 4095] == 'a' + i);
  CHECK(arena.try_set_slabs(16));
}

TEST_CASE("an arena without room asks for it, and says so when there is none to make") {
  Arena arena;
  arena.open(64 * 1024, 4096);
  REQUIRE(arena.try_set_slabs(12));
  std::vector<std::size_t> asked;
  arena.set_make_room([&](std::size_t bytes) {
    asked.push_back(bytes);
    const auto less = static_cast<std::int64_t>((bytes + 4095) / 4096);
    return less <= arena.layout().slabs() - 3 && arena.try_set_slabs(arena.layout().slabs() - less);
  });
  const Buffer<char> fits(16 * 1024, &arena);
  CHECK(asked.empty());
  const Buffer<char> more(10'000, &arena);
  REQUIRE(asked.size() == 1);
  CHECK(arena.layout().slabs() == 9);
  CHECK(asked[0] >= 10'000);
  CHECK_THROWS_AS(Buffer<char>(40'000, &arena), MemoryError);
  CHECK(arena.layout().slabs() == 9);
}

TEST_CASE("an arena that the system cannot give is an error") {
  Arena arena;
  CHECK_THROWS_AS(arena.open(std::size_t{1} << 62, 64), MemoryError);
}

}  // namespace
}  // namespace rlhf
