// Attention over paged keys and its gradient, on every device, against plain loops in double.
#include "tests/cuda/attention_cases.h"

using namespace rlhf;

namespace {

template <class V>
std::vector<V> last(const std::vector<V>& values, std::size_t count) {
  return {values.end() - static_cast<std::ptrdiff_t>(count), values.end()};
}

const std::vector<Lengths> kShort = {{0, 1}, {20, 17}, {20, 3}, {32, 16}};

}  // namespace

TEMPLATE_TEST_CASE("attention equals the plain loop on every device", "[device]", float, Bfloat16) {
  using T = TestType;
  const AttentionCase rows(kShort);
  for (const AttentionShape shape :
       {AttentionShape{1, 1, 64}, AttentionShape{3, 3, 80}, AttentionShape{6, 2, 64},
        AttentionShape{8, 2, 96, 20}, AttentionShape{7, 1, 128}, AttentionShape{2, 2, 256},
        AttentionShape{10, 2, 256, 5, 3.0}, AttentionShape{4, 4, 2}, AttentionShape{5, 1, 34, 0, 2.0},
        AttentionShape{4, 1, 128, 33}, AttentionShape{2, 2, 132}}) {
    const AttentionInputs<T> in(rows, shape);
    std::vector<double> lse;
    const std::vector<double> expected = in.reference(rows).forward(&lse);
    on_every_device<T>([&](const TestDevice<T>& device) {
      INFO(device.name << ", N " << shape.N << ", G " << shape.G << ", H " << shape.H << ", window "
                       << shape.window << ", softcap " << shape.softcap);
      const AttentionResult<T> got = run_attention(device, rows, in, RowsAre::kSingle);
      // A mean of values below 5 with weights good to some 1e-7.
      check_values(got.out, expected, 5e-6, 5e-6);
      check_values(got.lse, lse, 5e-6, 5e-6);
    });
  }
}

TEMPLATE_TEST_CASE("attention over several parts equals the plain loop on every device", "[device]", float,
                   Bfloat16) {
  using T = TestType;
  // The last rows see 3 to 4 parts.
  const AttentionCase rows({{255, 3}, {255, 515}});
  const std::int64_t first = rows.rows() - 6;
  for (const AttentionShape shape : {AttentionShape{2, 1, 4}, AttentionShape{1, 1, 4, 300}}) {
    const AttentionInputs<T> in(rows, shape);
    std::vector<double> lse;
    const std::vector<double> expected = in.reference(rows).forward(&lse);
    CHECK(rows.keys(rows.rows() - 1, 0).size() == 770);
    on_every_device<T>([&](const TestDevice<T>& device) {
      INFO(device.name << ", window " << shape.window);
      const AttentionResult<T> got = run_attention(device, rows, in, RowsAre::kSingle, first);
      check_values(got.out, last(expected, got.out.size()), 5e-6, 5e-6);
      check_values(got.lse, last(lse, got.lse.size()), 5e-6, 5e-6);
    });
  }
}

TEMPLATE_TEST_CASE("attention over a context of 100000 tokens equals the plain loop", "[device]", float) {
  using T = TestType;
  // One row at the end of a long sequence; its blocks are laid out backwards.
  const std::int64_t keys = 100'000, blocks = kernels::ceil_div(keys, kernels::kBlockTokens);
  const AttentionShape shape{2, 1, 4};
  const Values<T> q = random_rounded<T>(shape.N * shape.H, 1),
                  k = random_rounded<T>(blocks * shape.block_stride(), 2),
                  v = random_rounded<T>(blocks * shape.block_stride(), 3);
  std::vector<std::int32_t> table;
  for (std::int64_t b = blocks - 1; b >= 0; --b) table.push_back(static_cast<std::int32_t>(b));
  Rows rows;
  rows.tokens = {0};
  rows.positions = {static_cast<std::int32_t>(keys - 1)};
  rows.tables = {table.data()};
  std::vector<double> expected;
  for (std::int64_t n = 0; n < shape.N; ++n) {
    double total = 0;
    std::vector<double> sum(index_of(shape.H));
    for (std::int64_t key = 0; key < keys; ++key) {
      const std::int64_t at =
          kernels::head_offset(table[index_of(key / 16)], shape.block_stride(), 0, shape.H);
      double score = 0;
      for (std::int64_t h = 0; h < shape.H; ++h)
        score += q.exact[index_of(n * shape.H + h)] * k.exact[index_of(at + h * 16 + key % 16)];
      const double weight = std::exp(score * shape.scale());
      total += weight;
      for (std::int64_t h = 0; h < shape.H; ++h)
        sum[index_of(h)] += weight * v.exact[index_of(at + key % 16 * shape.H + h)];
    }
    for (const double value : sum) expected.push_back(value / total);
  }
  on_every_device<T>([&](const TestDevice<T>& device) {
    INFO(device.name);
    const DeviceRows view(*device.memory, rows);
    auto dq = device.put(q.stored), dk = device.put(k.stored), dv = device.put(v.stored),
         out = device.put(q.stored);
    auto workspace = device.put(
        std::vector<float>(index_of(kernels::attention_workspace(1, shape.N, shape.H, keys, 0)), NAN));
    device.ops->attention(
        {{dk.data(), dv.data(), shape.block_stride(), shape.N, shape.G, shape.H, shape.scale(), 0},
         dq.data(),
         shape.N * shape.H,
         out.data(),
         nullptr,
         0,
         workspace.data()},
        view.view(), device.queue());
    check_values(out.values(), expected, 2e-6, 1e-4);
  });
}

TEMPLATE_TEST_CASE("a row of attention has the same bits alone and in any batch", "[device]", float,
                   Bfloat16) {
  using T = TestType;
  const AttentionShape shape{6, 2, 16};
  const AttentionCase rows({{0, 3}, {0, 300}});
  const AttentionInputs<T> in(rows, shape);
  on_every_device<T>([&](const TestDevice<T>& device) {
    INFO(device.name);
    const AttentionResult<T> batch = run_attention(device, rows, in, RowsAre::kSingle, rows.rows() - 20),
                             alone = run_attention(device, rows, in, RowsAre::kSingle, rows.rows() - 1);
    CHECK(exact(last(batch.out, alone.out.size())) == exact(alone.out));
    CHECK(last(batch.lse, alone.lse.size()) == alone.lse);
  });
}

TEMPLATE_TEST_CASE("blocks of keys that do not start at multiples of 16 bytes are refused", "[device]", float,
                   Bfloat16) {
  using T = TestType;
  const AttentionShape shape{1, 1, 8};
  on_every_device<T>([&](const TestDevice<T>& device) {
    if (std::string(device.name) == "cpu") return;  // takes any address
    const auto blocks = device.put(std::vector<T>(index_of(shape.block_stride() + 1)));
    const kernels::AttentionArgs<T> cache = {blocks.data() + 1, blocks.data(), shape.block_stride(),
                                             shape.N,           shape.G,       shape.H,
                                             shape.scale(),     shape.softcap};
    CHECK_THROWS_WITH(device.ops->attention({cache, nullptr, 8, nullptr, nullptr, 0, nullptr},
                                            kernels::PassRows{}, device.queue()),
                      ContainsSubstring("blocks of K and V must start at multiples of 16 bytes"));
  });
}

TEMPLATE_TEST_CASE("attention gradients equal the plain loop on every device", "[device]", float, Bfloat16) {
  using T = TestType;
  const AttentionCase rows(kShort);
  for (const AttentionShape shape :
       {AttentionShape{1, 1, 64}, AttentionShape{6, 2, 8, 20, 3.0}, AttentionShape{3, 1, 80},
        AttentionShape{10, 2, 34}, AttentionShape{2, 1, 256, 7}}) {
    const std::int64_t width = shape.N * shape.H, stride = width + 3;
    const AttentionInputs<T> in(rows, shape);
    const Values<T> dout = random_rounded<T>(rows.rows() * width, 4);
    const AttentionReference reference = in.reference(rows);
    std::vector<double> lse;
    std::vector<T> out;
    for (const double value : reference.forward(&lse)) out.push_back(round_to<T>(value));
    const std::vector<float> stored_lse(lse.begin(), lse.end());
    const AttentionReference::Gradients expected = reference.backward(exact(out), dout.exact);
    std::vector<double> dq(index_of(rows.rows() * stride), 5);
    for (std::int64_t i = 0; i < rows.rows() * width; ++i)
      dq[index_of(i / width * stride + i % width)] = expected.dq[index_of(i)];
    on_every_device<T>([&](const TestDevice<T>& device) {
      INFO(device.name << ", N " << shape.N << ", G " << shape.G << ", H " << shape.H << ", window "
                       << shape.window);
      const AttentionGradResult<T> got =
          run_attention_grad(device, rows, in, RowsAre::kSingle, out, dout.stored, stored_lse, stride);
      CHECK(got.rest_is_zero);
      check_values(got.dq, dq, 1e-5, 1e-5);
      check_values(got.dk, expected.dk, 2e-5, 2e-5);
      check_values(got.dv, expected.dv, 2e-5, 2e-5);
    });
  }
}
