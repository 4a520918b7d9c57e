// K and V in Float8: the numbers against a table in double, and what is appended and attended to on every
// device against plain loops over the numbers that the codes stand for.
#include "tests/cuda/attention_cases.h"

using namespace rlhf;

namespace {

// Numbers of the 256 codes by the definition of E4M3; NaN where there is none.
std::vector<double> table_of_codes() {
  std::vector<double> numbers;
  for (int code = 0; code < 256; ++code) {
    const int exponent = code / 8 % 16, mantissa = code % 8;
    double number = exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
    if (code % 128 == 127) number = NAN;
    numbers.push_back(code < 128 ? number : -number);
  }
  return numbers;
}

// The code nearest to x of those with its sign; the even one of two.
int nearest_code(double x) {
  static const std::vector<double> numbers = table_of_codes();
  const int sign = std::signbit(x) ? 128 : 0;
  int best = sign;
  for (int code = sign; code < sign + 127; ++code) {
    const double distance = std::abs(numbers[index_of(code)] - x),
                 least = std::abs(numbers[index_of(best)] - x);
    if (distance < least || (distance == least && code % 2 == 0)) best = code;
  }
  return best;
}

// The smallest power of two from 2^-126 on with which `largest` is not beyond 448.
double scale_of(double largest) {
  double scale = 0x1p-126;
  while (largest / scale > 448) scale *= 2;
  return scale;
}

struct Codes {
  std::vector<std::uint8_t> codes;
  double scale;
};
// A head by brute force.
Codes codes_of(const double* x, std::int64_t H) {
  double largest = 0;
  for (std::int64_t h = 0; h < H; ++h) largest = std::max(largest, std::abs(x[h]));
  Codes out{{}, scale_of(largest)};
  for (std::int64_t h = 0; h < H; ++h)
    out.codes.push_back(static_cast<std::uint8_t>(nearest_code(x[h] / out.scale)));
  return out;
}

std::uint8_t scale_code(double scale) {
  return static_cast<std::uint8_t>(127 + std::ilogb(scale));
}

std::int64_t stride_of(const AttentionShape& shape) {
  return kernels::block_elements<Float8>(shape.G, shape.H);
}

// k or v [T, G, H] in blocks of codes, and the numbers that these stand for.
struct StoredCodes {
  std::vector<Float8> blocks;
  std::vector<double> numbers;

  // Slots without a token hold NaN.
  template <class Offset>
  StoredCodes(const AttentionCase& rows, const AttentionShape& shape, const std::vector<double>& values,
              const Offset& offset)
      : blocks(index_of(rows.packed().num_blocks() * stride_of(shape)), Float8{0xFF}),
        numbers(values.size()) {
    const std::vector<double> table = table_of_codes();
    const std::int64_t H = shape.H;
    rows.for_slots([&](std::int64_t t, std::int64_t block, std::int64_t slot) {
      for (std::int64_t g = 0; g < shape.G; ++g) {
        const std::int64_t from = (t * shape.G + g) * H,
                           to = kernels::head_offset<Float8>(block, stride_of(shape), g, H);
        const Codes head = codes_of(values.data() + from, H);
        blocks[index_of(to + kernels::scale_offset(slot, H))] = {scale_code(head.scale)};
        for (std::int64_t h = 0; h < H; ++h) {
          const std::uint8_t code = head.codes[index_of(h)];
          blocks[index_of(to + offset(slot, h))] = {code};
          numbers[index_of(from + h)] = table[code] * head.scale;
        }
      }
    });
  }
};

template <class T>
struct Fp8Inputs {
  AttentionShape shape;
  Values<T> q;
  StoredCodes k, v;

  Fp8Inputs(const AttentionCase& rows, const AttentionShape& s)
      : shape(s),
        q(random_rounded<T>(rows.rows() * s.N * s.H, 1)),
        k(rows, s, spread(rows.rows() * s.G, s.H, 2), kernels::key_offset),
        v(rows, s, spread(rows.rows() * s.G, s.H, 3),
          [&](std::int64_t slot, std::int64_t h) { return kernels::value_offset(slot, h, s.H); }) {}
  // Heads of sizes from 1/4 to 2, so that their scales differ.
  static std::vector<double> spread(std::int64_t heads, std::int64_t H, std::uint64_t stream) {
    std::vector<double> x = random_rounded<float>(heads * H, stream).exact;
    for (std::int64_t i = 0; i < heads * H; ++i)
      x[index_of(i)] *= std::ldexp(1, static_cast<int>(i / H % 4) - 2);
    return x;
  }
  AttentionReference reference(const AttentionCase& rows) const {
    return {&rows, shape, q.exact, k.numbers, v.numbers};
  }

  /// Attention of the rows from `first` on.
  AttentionResult<T> run(const TestDevice<T>& device, const AttentionCase& all, RowsAre how,
                         std::int64_t first = 0) const {
    const DeviceRows rows(*device.memory, all.rows_from(first));
    const std::int64_t width = shape.N * shape.H, count = rows.view().count;
    auto queries = device.put(q.stored);
    auto keys = device.put(k.blocks), values = device.put(v.blocks);
    auto out = device.put(std::vector<T>(index_of(count * width), round_to<T>(NAN)));
    auto lse = device.put(std::vector<float>(index_of(count * shape.N), NAN));
    auto workspace = device.put(std::vector<float>(
        index_of(kernels::attention_workspace(count, shape.N, shape.H, rows.view().max_keys, shape.window)),
        NAN));
    device.ops->attention_fp8({{keys.data(), values.data(), stride_of(shape), shape.N, shape.G, shape.H,
                                shape.scale(), shape.softcap},
                               queries.data() + first * width,
                               width,
                               out.data(),
                               lse.data(),
                               shape.window,
                               workspace.data()},
                              view_of(rows, how), device.queue());
    return {out.values(), lse.values()};
  }
};

template <class V>
std::vector<V> last(const std::vector<V>& values, std::size_t count) {
  return {values.end() - static_cast<std::ptrdiff_t>(count), values.end()};
}

std::string text_of(const AttentionShape& shape) {
  return "N " + std::to_string(shape.N) + ", G " + std::to_string(shape.G) + ", H " +
         std::to_string(shape.H) + ", window " + std::to_string(shape.window) + ", softcap " +
         std::to_string(shape.softcap);
}

}  // namespace

TEST_CASE("the 256 codes of Float8 are the numbers of E4M3") {
  const std::vector<double> numbers = table_of_codes();
  CHECK(numbers[0x7E] == 448);
  CHECK(numbers[0x01] == 0x1p-9);
  for (int code = 0; code < 256; ++code) {
    INFO("code " << code);
    const float got = to_float(Float8{static_cast<std::uint8_t>(code)});
    if (code % 128 == 127) {
      CHECK(std::isnan(got));
      CHECK(from_float<Float8>(got).bits % 128 == 127);
    } else {
      CHECK(static_cast<double>(got) == numbers[index_of(code)]);
      CHECK(std::signbit(got) == (code >= 128));
      CHECK(from_float<Float8>(got).bits == code);
    }
  }
}

TEST_CASE("a float becomes the nearest Float8, the even one of two") {
  const std::vector<double> numbers = table_of_codes();
  std::vector<float> inputs = {0, -0.0F, 0x1p-149F, 0x1p-126F, 0x1p-11F, 449, 463.99997F};
  for (int code = 0; code + 1 < 127; ++code) {
    const auto middle =
        static_cast<float>((numbers[index_of(code)] + numbers[index_of(code + 1)]) / 2);  // exact in float
    for (const float x : {middle, std::nextafter(middle, 0.0F), std::nextafter(middle, 1000.0F)})
      inputs.push_back(x);
  }
  RandomStream random(8, 1);
  for (int i = 0; i < 20000; ++i)
    inputs.push_back(static_cast<float>(random.normal() * std::ldexp(1, i % 20 - 12)));
  for (const float x : inputs)
    for (const float signed_x : {x, -x}) {
      if (std::abs(x) > 464) continue;
      if (from_float<Float8>(signed_x).bits != nearest_code(static_cast<double>(signed_x)))
        FAIL(signed_x << " becomes " << int{from_float<Float8>(signed_x).bits});
    }
  CHECK(from_float<Float8>(464.0F).bits == 0x7E);  // a tie with 480, which is not a number here
  for (const float x : {464.00003F, 1e30F, INFINITY, NAN}) {
    CHECK(from_float<Float8>(x).bits == 0x7F);
    CHECK(from_float<Float8>(-x).bits % 128 == 0x7F);
  }
}

TEST_CASE("a scale is the smallest power of two that clips nothing") {
  const auto code = [](float largest) {
    return float8_scale(__builtin_bit_cast(std::uint32_t, largest)).bits;
  };
  RandomStream random(8, 2);
  std::vector<float> inputs = {448, 448.00003F, 447.99997F, 896, 1, 0x1p-9F, 3e38F, 0x1p-118F, 1e-40F, 0};
  for (int i = 0; i < 2000; ++i)
    inputs.push_back(static_cast<float>(std::abs(random.normal()) * std::ldexp(1, i % 200 - 110)));
  for (const float largest : inputs) {
    const double expected = scale_of(static_cast<double>(largest));
    if (code(largest) != scale_code(expected)) FAIL(largest << " has the scale " << int{code(largest)});
    const Float8Scale scale{code(largest)};
    if (static_cast<double>(scale_value(scale)) != expected) FAIL("value of scale " << int{scale.bits});
    if (inverse_scale(scale) * scale_value(scale) != 1) FAIL("inverse of scale " << int{scale.bits});
  }
  CHECK(code(INFINITY) == 255);
  CHECK(code(NAN) == 255);
  CHECK(std::isnan(scale_value({255})));
}

TEST_CASE("blocks in Float8 have a place for every element and scale, beyond 2^32 too") {
  const std::int64_t G = 3, H = 6, stride = kernels::block_elements<Float8>(G, H);
  CHECK(stride == 3 * 7 * 16);
  CHECK(kernels::block_elements(G, H) == 3 * 6 * 16);
  for (const bool is_v : {false, true}) {
    std::vector<int> used(index_of(stride));
    for (std::int64_t g = 0; g < G; ++g)
      for (std::int64_t slot = 0; slot < 16; ++slot) {
        const std::int64_t head = kernels::head_offset<Float8>(5, stride, g, H) - 5 * stride;
        ++used[index_of(head + kernels::scale_offset(slot, H))];
        for (std::int64_t h = 0; h < H; ++h)
          ++used[index_of(head + (is_v ? kernels::value_offset(slot, h, H) : kernels::key_offset(slot, h)))];
      }
    CHECK(used == std::vector<int>(index_of(stride), 1));
  }
  const std::int64_t wide = kernels::block_elements<Float8>(8, 128);
  CHECK(kernels::head_offset<Float8>(2'000'003, wide, 5, 128) == 2'000'003LL * 8 * 129 * 16 + 5LL * 129 * 16);
}

TEMPLATE_TEST_CASE("append rounds K and V to the nearest codes, each head with its scale", "[device]", float,
                   Bfloat16) {
  using T = TestType;
  const AttentionCase rows({{0, 1}, {20, 13}, {20, 3}, {32, 1}});
  for (const AttentionShape shape :
       {AttentionShape{1, 1, 2}, AttentionShape{6, 2, 80}, AttentionShape{3, 3, 256}}) {
    const std::int64_t N = shape.N, G = shape.G, H = shape.H, width = (N + 2 * G) * H,
                       elements = rows.packed().num_blocks() * stride_of(shape);
    // Without norm and rotation, what is rounded is known exactly.
    const Values<T> qkv = random_rounded<T>(rows.rows() * width, 1, 3);
    std::vector<std::uint8_t> k_expected(index_of(elements), 0x55), v_expected = k_expected;
    rows.for_slots([&](std::int64_t t, std::int64_t block, std::int64_t slot) {
      for (std::int64_t g = 0; g < G; ++g) {
        const std::int64_t at = kernels::head_offset<Float8>(block, stride_of(shape), g, H);
        const double* row = qkv.exact.data() + t * width;
        const Codes k = codes_of(row + (N + g) * H, H), v = codes_of(row + (N + G + g) * H, H);
        k_expected[index_of(at + kernels::scale_offset(slot, H))] = scale_code(k.scale);
        v_expected[index_of(at + kernels::scale_offset(slot, H))] = scale_code(v.scale);
        for (std::int64_t h = 0; h < H; ++h) {
          k_expected[index_of(at + kernels::key_offset(slot, h))] = k.codes[index_of(h)];
          v_expected[index_of(at + kernels::value_offset(slot, h, H))] = v.codes[index_of(h)];
        }
      }
    });
    on_every_device<T>([&](const TestDevice<T>& device) {
      INFO(device.name << ", H " << H);
      const DeviceRows view(*device.memory, rows.packed().rows());
      auto x = device.put(qkv.stored), q = device.put(std::vector<T>(index_of(rows.rows() * N * H)));
      auto k = device.put(std::vector<Float8>(index_of(elements), Float8{0x55})), v = device.put(k.values());
      device.ops->append_fp8({x.data(), q.data(), k.data(), v.data(), stride_of(shape), N, G, H, nullptr,
                              nullptr, 1e-6, false, nullptr, nullptr},
                             view.view(), device.queue());
      CHECK(exact(x.values()) == qkv.exact);
      const auto bits = [](const std::vector<Float8>& codes) {
        std::vector<std::uint8_t> out;
        for (const Float8 code : codes) out.push_back(code.bits);
        return out;
      };
      CHECK(bits(k.values()) == k_expected);
      CHECK(bits(v.values()) == v_expected);
    });
  }
}

TEST_CASE("append in Float8 rounds what append in float stores, after norm and rotation", "[device]") {
  using T = float;
  const AttentionCase rows({{0, 1}, {20, 13}, {20, 3}});
  const AttentionShape shape{6, 2, 80};
  const std::int64_t N = shape.N, G = shape.G, H = shape.H, width = (N + 2 * G) * H,
                     blocks = rows.packed().num_blocks();
  const Values<T> qkv = random_rounded<T>(rows.rows() * width, 1), q_weight = random_rounded<T>(H, 2),
                  k_weight = random_rounded<T>(H, 3), angles = random_rounded<T>(100 * H / 2, 4);
  std::vector<float> cosines, sines;
  for (const double angle : angles.exact) {
    cosines.push_back(static_cast<float>(std::cos(angle)));
    sines.push_back(static_cast<float>(std::sin(angle)));
  }
  on_every_device<T>([&](const TestDevice<T>& device) {
    INFO(device.name);
    const DeviceRows view(*device.memory, rows.packed().rows());
    auto x = device.put(qkv.stored), x8 = device.put(qkv.stored), q_norm = device.put(q_weight.stored),
         k_norm = device.put(k_weight.stored), cos = device.put(cosines), sin = device.put(sines),
         q = device.put(std::vector<T>(index_of(rows.rows() * N * H))), q8 = device.put(q.values()),
         k = device.put(std::vector<T>(index_of(blocks * shape.block_stride()))), v = device.put(k.values());
    auto k8 = device.put(std::vector<Float8>(index_of(blocks * stride_of(shape)))),
         v8 = device.put(k8.values());
    device.ops->append({x.data(), q.data(), k.data(), v.data(), shape.block_stride(), N, G, H, q_norm.data(),
                        k_norm.data(), 1e-6, true, cos.data(), sin.data()},
                       view.view(), device.queue());
    device.ops->append_fp8({x8.data(), q8.data(), k8.data(), v8.data(), stride_of(shape), N, G, H,
                            q_norm.data(), k_norm.data(), 1e-6, true, cos.data(), sin.data()},
                           view.view(), device.queue());
    CHECK(x8.values() == x.values());
    CHECK(q8.values() == q.values());
    const std::vector<T> k_values = k.values(), v_values = v.values();
    const std::vector<Float8> k_codes = k8.values(), v_codes = v8.values();
    std::size_t off = 0, compared = 0;
    rows.for_slots([&](std::int64_t, std::int64_t block, std::int64_t slot) {
      for (std::int64_t g = 0; g < G; ++g)
        for (const bool is_v : {false, true}) {
          const auto offset = [&](std::int64_t h) {
            return is_v ? kernels::value_offset(slot, h, H) : kernels::key_offset(slot, h);
          };
          const std::int64_t from = kernels::head_offset(block, shape.block_stride(), g, H),
                             to = kernels::head_offset<Float8>(block, stride_of(shape), g, H);
          std::vector<double> head;
          for (std::int64_t h = 0; h < H; ++h)
            head.push_back(exact((is_v ? v_values : k_values)[index_of(from + offset(h))]));
          const Codes expected = codes_of(head.data(), H);
          const std::vector<Float8>& codes = is_v ? v_codes : k_codes;
          off += codes[index_of(to + kernels::scale_offset(slot, H))].bits != scale_code(expected.scale);
          for (std::int64_t h = 0; h < H; ++h, ++compared)
            off += codes[index_of(to + offset(h))].bits != expected.codes[index_of(h)];
        }
    });
    CHECK(compared > 10000);
    CHECK(off == 0);
  });
}

TEMPLATE_TEST_CASE("a key or value that is not finite gives a result that is not finite", "[device]", float,
                   Bfloat16) {
  using T = TestType;
  const std::int64_t H = 32;
  const AttentionCase rows({{0, 3}});
  for (const float bad : {NAN, INFINITY, -INFINITY})
    for (const std::int64_t head : {1, 2}) {  // of k, of v
      Values<T> qkv = random_rounded<T>(rows.rows() * 3 * H, 1);
      qkv.stored[index_of(3 * H + head * H + 5)] = round_to<T>(static_cast<double>(bad));  // of row 1
      on_every_device<T>([&](const TestDevice<T>& device) {
        INFO(device.name << ", " << bad << " in head " << head);
        const DeviceRows view(*device.memory, rows.packed().rows());
        auto x = device.put(qkv.stored), out = device.put(std::vector<T>(index_of(rows.rows() * H)));
        auto k = device.put(std::vector<Float8>(
            index_of(rows.packed().num_blocks() * kernels::block_elements<Float8>(1, H)), Float8{0xFF}));
        auto v = device.put(k.values());
        auto workspace = device.put(std::vector<float>(
            index_of(kernels::attention_workspace(rows.rows(), 1, H, view.view().max_keys, 0))));
        const std::int64_t stride = kernels::block_elements<Float8>(1, H);
        device.ops->append_fp8({x.data(), nullptr, k.data(), v.data(), stride, 1, 1, H, nullptr, nullptr,
                                1e-6, false, nullptr, nullptr},
                               view.view(), device.queue());
        device.ops->attention_fp8({{k.data(), v.data(), stride, 1, 1, H, 1, 0},
                                   x.data(),
                                   3 * H,
                                   out.data(),
                                   nullptr,
                                   0,
                                   workspace.data()},
                                  view.view(), device.queue());
        const std::vector<double> got = exact(out.values());
        for (std::int64_t h = 0; h < H; ++h) {
          CHECK(std::isfinite(got[index_of(h)]));  // row 0 does not see it
          CHECK_FALSE(std::isfinite(got[index_of(H + h)]));
          CHECK_FALSE(std::isfinite(got[index_of(2 * H + h)]));
        }
      });
    }
}

TEMPLATE_TEST_CASE("attention over Float8 equals the plain loop over its numbers", "[device]", float,
                   Bfloat16) {
  using T = TestType;
  const AttentionCase rows({{0, 1}, {20, 17}, {20, 3}, {32, 16}});
  for (const AttentionShape shape :
       {AttentionShape{1, 1, 64}, AttentionShape{3, 3, 80}, AttentionShape{6, 2, 64},
        AttentionShape{8, 2, 96, 20}, AttentionShape{7, 1, 128}, AttentionShape{2, 2, 256},
        AttentionShape{10, 2, 256, 5, 3.0}, AttentionShape{4, 4, 2}, AttentionShape{5, 1, 34, 0, 2.0},
        AttentionShape{4, 1, 128, 33}, AttentionShape{2, 2, 132}}) {
    const Fp8Inputs<T> in(rows, shape);
    std::vector<double> lse;
    const std::vector<double> expected = in.reference(rows).forward(&lse);
    on_every_device<T>([&](const TestDevice<T>& device) {
      INFO(device.name << ", " << text_of(shape));
      const AttentionResult<T> got = in.run(device, rows, RowsAre::kSingle);
      // A mean of values below 10 with weights good to some 1e-7.
      check_values(got.out, expected, 1e-5, 5e-6);
      check_values(got.lse, lse, 1e-5, 5e-6);
    });
  }
}

TEMPLATE_TEST_CASE("attention over Float8 in several parts equals the plain loop, with one order of sums",
                   "[device]", float, Bfloat16) {
  using T = TestType;
  const AttentionCase rows({{255, 3}, {255, 515}});  // the last rows see 3 to 4 parts
  const std::int64_t first = rows.rows() - 6;
  for (const AttentionShape shape : {AttentionShape{2, 1, 16}, AttentionShape{1, 1, 4, 300}}) {
    const Fp8Inputs<T> in(rows, shape);
    std::vector<double> lse;
    const std::vector<double> expected = in.reference(rows).forward(&lse);
    on_every_device<T>([&](const TestDevice<T>& device) {
      INFO(device.name << ", " << text_of(shape));
      const AttentionResult<T> got = in.run(device, rows, RowsAre::kSingle, first),
                               alone = in.run(device, rows, RowsAre::kSingle, rows.rows() - 1);
      check_values(got.out, last(expected, got.out.size()), 1e-5, 5e-6);
      check_values(got.lse, last(lse, got.lse.size()), 1e-5, 5e-6);
      CHECK(exact(last(got.out, alone.out.size())) == exact(alone.out));
      CHECK(last(got.lse, alone.lse.size()) == alone.lse);
    });
  }
}

TEST_CASE("tiles of rows have the same bits over Float8 as over its numbers in bfloat16", "[device]") {
  using T = Bfloat16;
  const AttentionCase rows({{0, 1}, {40, 23}, {40, 9}, {40, 16}, {32, 64}, {46, 105}});
  for (const AttentionShape shape :
       {AttentionShape{1, 1, 64}, AttentionShape{3, 1, 96}, AttentionShape{7, 1, 32, 50},
        AttentionShape{4, 2, 128}, AttentionShape{2, 1, 64, 17}, AttentionShape{2, 2, 128, 70, 3.0}}) {
    const Fp8Inputs<T> in(rows, shape);
    AttentionInputs<T> wide(rows, shape);
    wide.q = in.q;
    for (auto [values, numbers] : {std::pair(&wide.k, &in.k.numbers), {&wide.v, &in.v.numbers}}) {
      for (std::size_t i = 0; i < numbers->size(); ++i) values->stored[i] = round_to<T>((*numbers)[i]);
      REQUIRE(exact(values->stored) == *numbers);  // no rounding
    }
    on_every_device<T>([&](const TestDevice<T>& device) {
      INFO(device.name << ", " << text_of(shape));
      const AttentionResult<T> expected = run_attention(device, rows, wide, RowsAre::kTiled),
                               got = in.run(device, rows, RowsAre::kTiled);
      const RowTiles tiles = find_tiles(rows.packed().rows());
      REQUIRE(tiles.tiles.size() >= 8);
      const auto width = index_of(shape.N * shape.H);
      for (std::size_t i = 0; i < tiles.tiles.size(); i += 2)
        for (std::int32_t t = tiles.tiles[i]; t < tiles.tiles[i] + tiles.tiles[i + 1]; ++t) {
          const auto row = [&](const std::vector<T>& out) {
            return exact(std::vector<T>(out.begin() + static_cast<std::ptrdiff_t>(index_of(t) * width),
                                        out.begin() + static_cast<std::ptrdiff_t>(index_of(t + 1) * width)));
          };
          if (row(got.out) != row(expected.out)) FAIL("row " << t);
        }
      // Rows by themselves sum in another order.
      check_values(got.out, exact(expected.out), 1e-5, 2 * kRounding<T>);
    });
  }
}

TEMPLATE_TEST_CASE("blocks in Float8 that do not start at multiples of 16 bytes are refused", "[device]",
                   float, Bfloat16) {
  using T = TestType;
  const std::int64_t stride = kernels::block_elements<Float8>(1, 8);
  on_every_device<T>([&](const TestDevice<T>& device) {
    if (std::string(device.name) == "cpu") return;  // takes any address
    const auto blocks = device.put(std::vector<Float8>(index_of(stride + 1)));
    CHECK_THROWS_WITH(device.ops->attention_fp8({{blocks.data() + 1, blocks.data(), stride, 1, 1, 8, 1, 0},
                                                 nullptr,
                                                 8,
                                                 nullptr,
                                                 nullptr,
                                                 0,
                                                 nullptr},
                                                kernels::PassRows{}, device.queue()),
                      ContainsSubstring("blocks of K and V must start at multiples of 16 bytes"));
  });
}
