// Attention of tiles of rows on tensor cores, on every device, against plain loops in double.
#include "tests/cuda/attention_cases.h"

using namespace rlhf;

namespace {

// Runs of 1, 63, 9, 16, 17, 32, 64, 65, 8 and 105 rows: in tiles and, below 16, one by one. They begin at
// positions 0, 40, 32 and 46: inside a block, at the end of one, and just before.
const std::vector<Lengths> kRuns = {{0, 1},   {40, 23}, {40, 9},  {40, 16}, {0, 17},
                                    {32, 32}, {32, 64}, {32, 65}, {46, 2},  {46, 105}};

// Each term of a sum has one factor that was rounded to bf16, by 2^-9 or less of its size, or 2^-8 where its
// mantissa is near 1; everything else is good to some 1e-6 of the terms.
void check_sums(const std::vector<double>& got, const std::vector<double>& expected,
                const std::vector<double>& magnitudes, double rounding) {
  REQUIRE(got.size() == expected.size());
  std::size_t off = 0, first = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    const double allowed =
        0x1p-8 * magnitudes[i] + (rounding + 1e-5) * std::abs(expected[i]) + 2e-5 * (1 + magnitudes[i]);
    if (std::abs(got[i] - expected[i]) <= allowed) continue;
    if (off++ == 0) first = i;
  }
  INFO(off << " of " << got.size() << " elements off; element " << first << " is " << got[first]
           << ", expected " << expected[first]);
  CHECK(off == 0);
}

std::string text_of(const AttentionShape& shape) {
  return "N " + std::to_string(shape.N) + ", G " + std::to_string(shape.G) + ", H " +
         std::to_string(shape.H) + ", window " + std::to_string(shape.window) + ", softcap " +
         std::to_string(shape.softcap);
}

const std::vector<AttentionShape> kShapes = {{1, 1, 64},          {3, 1, 96},     {7, 1, 32, 50},
                                             {4, 2, 128},         {2, 1, 64, 17}, {3, 3, 32, 0, 2.0},
                                             {2, 2, 128, 70, 3.0}};

template <class V>
std::vector<V> last(const std::vector<V>& values, std::size_t count) {
  return {values.end() - static_cast<std::ptrdiff_t>(count), values.end()};
}

}  // namespace

TEST_CASE("rows are cut into tiles of one table with ascending positions") {
  const std::int32_t a = 0, b = 0;
  Rows rows;
  const auto add = [&](const std::int32_t* table, std::int32_t position, int count) {
    for (int i = 0; i < count; ++i) {
      rows.tokens.push_back(0);
      rows.positions.push_back(position + i);
      rows.tables.push_back(table);
    }
  };
  CHECK(find_tiles(rows).tiles.empty());
  add(&a, 0, 15);    // rows 0 to 14: too few
  add(&a, 20, 16);   // 15 to 30
  add(&b, 36, 150);  // 31 to 180: another table though the positions go on
  add(&b, 185, 1);
  add(&a, 186, 64);  // 182 to 245
  const RowTiles found = find_tiles(rows);
  CHECK(found.tiles == std::vector<std::int32_t>{15, 16, 31, 64, 95, 64, 159, 22, 182, 64});
  std::vector<std::int32_t> single;
  for (std::int32_t t = 0; t < 15; ++t) single.push_back(t);
  single.push_back(181);
  CHECK(found.single_rows == single);
}

TEST_CASE("attention of tiles of rows equals the plain loop on every device", "[device]") {
  using T = Bfloat16;
  const AttentionCase rows(kRuns);
  for (const AttentionShape& shape : kShapes) {
    const AttentionInputs<T> in(rows, shape);
    std::vector<double> lse, magnitudes;
    const std::vector<double> expected = in.reference(rows).forward(&lse, &magnitudes);
    on_every_device<T>([&](const TestDevice<T>& device) {
      INFO(device.name << ", " << text_of(shape));
      const AttentionResult<T> got = run_attention(device, rows, in, RowsAre::kTiled);
      check_sums(exact(got.out), expected, magnitudes, kRounding<T>);
      check_values(got.lse, lse, 1e-5, 1e-5);
    });
  }
}

TEST_CASE("a chunk of a long sequence in tiles equals the plain loop on every device", "[device]") {
  using T = Bfloat16;
  const AttentionCase rows({{0, 400}});
  for (const AttentionShape shape : {AttentionShape{1, 1, 64}, AttentionShape{1, 1, 128, 130}}) {
    const AttentionInputs<T> in(rows, shape);
    std::vector<double> lse, magnitudes;
    const std::vector<double> expected = in.reference(rows).forward(&lse, &magnitudes);
    on_every_device<T>([&](const TestDevice<T>& device) {
      INFO(device.name << ", " << text_of(shape));
      const AttentionResult<T> got = run_attention(device, rows, in, RowsAre::kTiled, 307);
      check_sums(exact(got.out), last(expected, got.out.size()), last(magnitudes, got.out.size()),
                 kRounding<T>);
      check_values(got.lse, last(lse, got.lse.size()), 1e-5, 1e-5);
    });
  }
}

TEST_CASE("a row has the same bits in any tile", "[device]") {
  using T = Bfloat16;
  const AttentionCase rows({{0, 20}, {0, 230}});
  for (const AttentionShape shape :
       {AttentionShape{2, 1, 64}, AttentionShape{1, 1, 128}, AttentionShape{1, 1, 32, 40}}) {
    const AttentionInputs<T> in(rows, shape);
    on_every_device<T>([&](const TestDevice<T>& device) {
      INFO(device.name << ", " << text_of(shape));
      const AttentionResult<T> batch = run_attention(device, rows, in, RowsAre::kTiled),
                               few = run_attention(device, rows, in, RowsAre::kTiled, rows.rows() - 37),
                               single = run_attention(device, rows, in, RowsAre::kSingle, rows.rows() - 37);
      CHECK(exact(last(batch.out, few.out.size())) == exact(few.out));
      CHECK(last(batch.lse, few.lse.size()) == few.lse);
      // The other way differs where there are tensor cores, so they were used.
      CHECK(exact(single.out) != exact(few.out));
    });
  }
}

TEST_CASE("gradients of attention of tiles of rows equal the plain loop on every device", "[device]") {
  using T = Bfloat16;
  const AttentionCase rows(kRuns);
  for (const AttentionShape& shape : kShapes) {
    const std::int64_t width = shape.N * shape.H, stride = width + 3;
    const AttentionInputs<T> in(rows, shape);
    const Values<T> dout = random_rounded<T>(rows.rows() * width, 4);
    const AttentionReference reference = in.reference(rows);
    std::vector<double> lse;
    std::vector<T> out;
    for (const double value : reference.forward(&lse)) out.push_back(round_to<T>(value));
    const std::vector<float> stored_lse(lse.begin(), lse.end());
    AttentionReference::Gradients magnitudes;
    const AttentionReference::Gradients expected = reference.backward(exact(out), dout.exact, &magnitudes);
    on_every_device<T>([&](const TestDevice<T>& device) {
      INFO(device.name << ", " << text_of(shape));
      const AttentionGradResult<T> got =
          run_attention_grad(device, rows, in, RowsAre::kTiled, out, dout.stored, stored_lse, stride);
      std::vector<double> dq, between;
      for (std::int64_t i = 0; i < rows.rows() * stride; ++i)
        (i % stride < width ? dq : between).push_back(exact(got.dq[index_of(i)]));
      CHECK(between == std::vector<double>(between.size(), 5.0));
      CHECK(got.rest_is_zero);
      check_sums(dq, expected.dq, magnitudes.dq, kRounding<T>);
      check_sums(exact(got.dk), expected.dk, magnitudes.dk, 0);
      check_sums(exact(got.dv), expected.dv, magnitudes.dv, 0);
      if (shape.N > 1) return;
      // The other way differs, so tensor cores were used.
      const AttentionGradResult<T> single =
          run_attention_grad(device, rows, in, RowsAre::kSingle, out, dout.stored, stored_lse, stride);
      CHECK(got.dk != single.dk);
      CHECK(got.dv != single.dv);
      CHECK(exact(got.dq) != exact(single.dq));
    });
  }
}
