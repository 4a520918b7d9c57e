// Index functions beyond 2^31 elements, and the numbers that host and GPU must agree on.
#include <set>

#include "rlhf/kernels/layout.h"
#include "tests/cuda/devices.h"

using namespace rlhf;
using namespace rlhf::kernels;

TEST_CASE("offsets are exact beyond 2^31 and 2^32 elements") {
  const std::int64_t G = 8, H = 128, stride = G * H * kBlockTokens;
  // 2 million blocks of a layer: 3.4e10 elements, 64 GiB in bf16.
  const std::int64_t block = 2'000'003, base = 2'000'003LL * 8 * 128 * 16;
  CHECK(base > (1LL << 32));
  CHECK(head_offset(block, stride, 5, H) == base + 5LL * 128 * 16);
  CHECK(matrix_offset(300'000, 151'935, 151'936) == 300'000LL * 151'936 + 151'935);
  CHECK(matrix_offset(300'000, 151'935, 151'936) > (1LL << 35));
  CHECK(part_offset(100'000, 31, 390, 32, 391, 256) == ((100'000LL * 32 + 31) * 391 + 390) * 258);
  CHECK(attention_workspace(100'000, 32, 128, 100'000, 0) == 100'000LL * 32 * 391 * 130);
}

TEST_CASE("a block's offsets cover it once") {
  const std::int64_t G = 3, H = 6, stride = G * H * kBlockTokens;
  std::set<std::int64_t> keys, values;
  for (std::int64_t g = 0; g < G; ++g)
    for (std::int64_t slot = 0; slot < kBlockTokens; ++slot)
      for (std::int64_t h = 0; h < H; ++h) {
        keys.insert(head_offset(2, stride, g, H) + key_offset(slot, h));
        values.insert(head_offset(2, stride, g, H) + value_offset(slot, h, H));
      }
  CHECK(keys.size() == static_cast<std::size_t>(stride));
  CHECK(keys == values);
  CHECK(*keys.begin() == 2 * stride);
  CHECK(*keys.rbegin() == 3 * stride - 1);
}

TEST_CASE("parts cover the visible keys, and the workspace holds the most that a row has") {
  for (const std::int64_t window : {0, 1, 100, 256, 257, 700})
    for (std::int64_t position = 0; position < 2000; ++position) {
      const std::int64_t first = first_visible_key(position, window);
      CHECK_FALSE((first < 0 || first > position || (window > 0 && position - first >= window)));
      const PartRange parts = visible_parts(first, position + 1);
      const bool covers = parts.first * kKeysPerPart <= first && first < (parts.first + 1) * kKeysPerPart &&
                          position < (parts.first + parts.count) * kKeysPerPart &&
                          position >= (parts.first + parts.count - 1) * kKeysPerPart;
      if (!covers || parts.count > max_attention_parts(position + 1, window))
        FAIL("position " << position << ", window " << window);
    }
  CHECK(max_attention_parts(100'000, 0) == 391);
}

TEST_CASE("bfloat16 rounds to the nearest, ties to even") {
  CHECK(from_float<Bfloat16>(1.0F).bits == 0x3F80);
  CHECK(to_float(from_float<Bfloat16>(1.00390625F)) == 1.0F);       // 1 + 2^-8: a tie, down to even
  CHECK(to_float(from_float<Bfloat16>(1.01171875F)) == 1.015625F);  // 1 + 3 * 2^-8: a tie, up to even
  CHECK(to_float(from_float<Bfloat16>(1.0039064F)) == 1.0078125F);
  CHECK(to_float(from_float<Bfloat16>(3.4e38F)) == INFINITY);
  CHECK(std::isnan(to_float(from_float<Bfloat16>(__builtin_bit_cast(float, 0x7F800001U)))));
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float value = to_float(Bfloat16{static_cast<std::uint16_t>(bits)});
    if (!std::isnan(value) && from_float<Bfloat16>(value).bits != bits)
      FAIL("bits " << bits << " do not survive");
  }
}
