// Attention over paged keys and its gradient, on every device, against plain loops in double.
#include "tests/cuda/attention_cases.h"

using namespace rlhf;

namespace {

template <class T>
struct Inputs {
  AttentionShape shape;
  Values<T> q, k, v;

  Inputs(const AttentionCase& rows, const AttentionShape& s)
      : shape(s),
        q(random_rounded<T>(rows.rows() * s.N * s.H, 1)),
        k(random_rounded<T>(rows.rows() * s.G * s.H, 2)),
        v(random_rounded<T>(rows.rows() * s.G * s.H, 3)) {}
  AttentionReference reference(const AttentionCase& rows) const {
    return {&rows, shape, q.exact, k.exact, v.exact};
  }
  std::vector<T> k_blocks(const AttentionCase& rows, double filler) const {
    return rows.blocks(k.stored, shape, filler, kernels::key_offset);
  }
  std::vector<T> v_blocks(const AttentionCase& rows, double filler) const {
    return rows.blocks(v.stored, shape, filler, [&](std::int64_t slot, std::int64_t h) {
      return kernels::value_offset(slot, h, shape.H);
    });
  }
};

template <class T>
kernels::AttentionArgs<T> cache_args(const AttentionShape& shape, const T* k, const T* v) {
  return {k, v, shape.block_stride(), shape.N, shape.G, shape.H, shape.scale(), shape.softcap};
}

template <class T>
struct ForwardResult {
  std::vector<T> out;
  std::vector<float> lse;
};

// Attention of the rows from `first` on.
template <class T>
ForwardResult<T> run_forward(const TestDevice<T>& device, const AttentionCase& all, const Inputs<T>& in,
                             std::int64_t first = 0) {
  const AttentionShape& shape = in.shape;
  const DeviceRows rows(*device.memory, all.rows_from(first));
  const std::int64_t width = shape.N * shape.H, count = rows.view().count;
  auto q = device.put(in.q.stored), k = device.put(in.k_blocks(all, NAN)),
       v = device.put(in.v_blocks(all, NAN)),
       out = device.put(std::vector<T>(index_of(count * width), round_to<T>(NAN)));
  auto lse = device.put(std::vector<float>(index_of(count * shape.N), NAN));
  auto workspace = device.put(std::vector<float>(
      index_of(kernels::attention_workspace(count, shape.N, shape.H, rows.view().max_keys, shape.window)),
      NAN));
  device.ops->attention(
      {cache_args(shape, static_cast<const T*>(k.data()), static_cast<const T*>(v.data())),
       q.data() + first * width, width, out.data(), lse.data(), shape.window, workspace.data()},
      rows.view(), device.queue());
  return {out.values(), lse.values()};
}

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
    const Inputs<T> in(rows, shape);
    std::vector<double> lse;
    const std::vector<double> expected = in.reference(rows).forward(&lse);
    on_every_device<T>([&](const TestDevice<T>& device) {
      INFO(device.name << ", N " << shape.N << ", G " << shape.G << ", H " << shape.H << ", window "
                       << shape.window << ", softcap " << shape.softcap);
      const ForwardResult<T> got = run_forward(device, rows, in);
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
    const Inputs<T> in(rows, shape);
    std::vector<double> lse;
    const std::vector<double> expected = in.reference(rows).forward(&lse);
    CHECK(rows.keys(rows.rows() - 1, 0).size() == 770);
    on_every_device<T>([&](const TestDevice<T>& device) {
      INFO(device.name << ", window " << shape.window);
      const ForwardResult<T> got = run_forward(device, rows, in, first);
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
        {cache_args(shape, static_cast<const T*>(dk.data()), static_cast<const T*>(dv.data())), dq.data(),
         shape.N * shape.H, out.data(), nullptr, 0, workspace.data()},
        view.view(), device.queue());
    check_values(out.values(), expected, 2e-6, 1e-4);
  });
}

TEMPLATE_TEST_CASE("a row of attention has the same bits alone and in any batch", "[device]", float,
                   Bfloat16) {
  using T = TestType;
  const AttentionShape shape{6, 2, 16};
  const AttentionCase rows({{0, 3}, {0, 300}});
  const Inputs<T> in(rows, shape);
  on_every_device<T>([&](const TestDevice<T>& device) {
    INFO(device.name);
    const ForwardResult<T> batch = run_forward(device, rows, in, rows.rows() - 20),
                           alone = run_forward(device, rows, in, rows.rows() - 1);
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
    CHECK_THROWS_WITH(device.ops->attention({cache_args<T>(shape, blocks.data() + 1, blocks.data()), nullptr,
                                             8, nullptr, nullptr, 0, nullptr},
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
    const std::int64_t N = shape.N, G = shape.G, H = shape.H, T_rows = rows.rows();
    const Inputs<T> in(rows, shape);
    const Values<T> dout = random_rounded<T>(T_rows * N * H, 4);
    const AttentionReference reference = in.reference(rows);
    std::vector<double> lse, dq(in.q.exact.size()), dk(in.k.exact.size()), dv(in.v.exact.size());
    const std::vector<double> out = reference.forward(&lse);
    // The kernel takes the rounded output, so delta must be computed from the same.
    std::vector<T> stored_out;
    for (const double value : out) stored_out.push_back(round_to<T>(value));
    for (std::int64_t t = 0; t < T_rows; ++t)
      for (std::int64_t n = 0; n < N; ++n) {
        const std::int64_t g = n / (N / G), at = (t * N + n) * H;
        const AttentionReference::Head head = reference.head(t, n);
        double delta = 0;
        for (std::int64_t h = 0; h < H; ++h)
          delta += dout.exact[index_of(at + h)] * exact(stored_out[index_of(at + h)]);
        for (std::size_t j = 0; j < head.keys.size(); ++j) {
          const std::int64_t kv = (head.keys[j] * G + g) * H;
          double slope =
              head.p[j] *
              (AttentionReference::dot(dout.exact.data() + at, reference.value(head.keys[j], g), H) - delta) *
              shape.scale();
          if (shape.softcap > 0) slope *= 1 - std::pow(head.scores[j] / shape.softcap, 2);
          for (std::int64_t h = 0; h < H; ++h) {
            dq[index_of(at + h)] += slope * in.k.exact[index_of(kv + h)];
            dk[index_of(kv + h)] += slope * in.q.exact[index_of(at + h)];
            dv[index_of(kv + h)] += head.p[j] * dout.exact[index_of(at + h)];
          }
        }
      }
    std::vector<float> stored_lse(lse.begin(), lse.end());
    on_every_device<T>([&](const TestDevice<T>& device) {
      INFO(device.name << ", N " << N << ", G " << G << ", H " << H << ", window " << shape.window);
      const DeviceRows view(*device.memory, rows.packed().rows());
      const DeviceBlockUses uses(*device.memory, rows.packed());
      auto q = device.put(in.q.stored), k = device.put(in.k_blocks(rows, 1000)),
           v = device.put(in.v_blocks(rows, -1000)), attended = device.put(stored_out),
           upstream = device.put(dout.stored);
      auto lses = device.put(stored_lse);
      const std::int64_t stride = N * H + 3;
      auto dqs = device.put(std::vector<T>(index_of(T_rows * stride), round_to<T>(5)));
      const std::size_t elements = index_of(rows.packed().num_blocks() * shape.block_stride());
      auto dks = device.put(std::vector<float>(elements, NAN)),
           dvs = device.put(std::vector<float>(elements, NAN));
      device.ops->attention_grad(
          {cache_args(shape, static_cast<const T*>(k.data()), static_cast<const T*>(v.data())), q.data(),
           attended.data(), upstream.data(), lses.data(), dqs.data(), stride, dks.data(), dvs.data(),
           shape.window, uses.view(), rows.packed().row_trees()},
          view.view(), device.queue());
      std::vector<double> strided(index_of(T_rows * stride), 5);
      for (std::int64_t i = 0; i < T_rows * N * H; ++i)
        strided[index_of(i / (N * H) * stride + i % (N * H))] = dq[index_of(i)];
      check_values(dqs.values(), strided, 1e-5, 1e-5);
      // A row's gradient is the sum over the places that hold its key.
      const std::vector<float> k_blocks = dks.values(), v_blocks = dvs.values();
      std::vector<float> dk_got(dk.size()), dv_got(dv.size());
      rows.for_slots([&](std::int64_t t, std::int64_t block, std::int64_t slot) {
        for (std::int64_t g = 0; g < G; ++g)
          for (std::int64_t h = 0; h < H; ++h) {
            const std::int64_t from = kernels::head_offset(block, shape.block_stride(), g, H);
            dk_got[index_of((t * G + g) * H + h)] += k_blocks[index_of(from + kernels::key_offset(slot, h))];
            dv_got[index_of((t * G + g) * H + h)] +=
                v_blocks[index_of(from + kernels::value_offset(slot, h, H))];
          }
      });
      check_values(dk_got, dk, 2e-5, 2e-5);
      check_values(dv_got, dv, 2e-5, 2e-5);
    });
  }
}
