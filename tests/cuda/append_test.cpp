// q/k norm, rotary embedding and K/V into their blocks, and the way back, on every device against plain
// loops.
#include "tests/cuda/attention_cases.h"

using namespace rlhf;

namespace {

struct AppendForm {
  bool norms, plus_one, rotates;
};
constexpr AppendForm kForms[] = {{false, false, true}, {true, false, true}, {true, true, false}};
constexpr double kEps = 1e-6;

// One head through norm and rotation, and a gradient back, in double.
struct HeadReference {
  std::int64_t H;
  const double* weight;  // null = no norm
  bool plus_one;
  const double* cos;  // of the row's position; null = no rotation
  const double* sin;

  double rstd(const double* x) const {
    double square = 0;
    for (std::int64_t h = 0; h < H; ++h) square += x[h] * x[h];
    return 1 / std::sqrt(square / static_cast<double>(H) + kEps);
  }
  double scale(std::int64_t h) const { return weight[h] + (plus_one ? 1 : 0); }
  std::vector<double> rotated(std::vector<double> y, double sign) const {
    if (!cos) return y;
    for (std::int64_t i = 0; i < H / 2; ++i) {
      const double a = y[index_of(i)], b = y[index_of(i + H / 2)];
      y[index_of(i)] = a * cos[i] - sign * b * sin[i];
      y[index_of(i + H / 2)] = b * cos[i] + sign * a * sin[i];
    }
    return y;
  }
  std::vector<double> forward(const double* x) const {
    std::vector<double> y(x, x + H);
    if (weight)
      for (std::int64_t h = 0; h < H; ++h) y[index_of(h)] *= rstd(x) * scale(h);
    return rotated(y, 1);
  }
  // Adds to dweight, returns d loss / d x.
  std::vector<double> backward(const double* x, const std::vector<double>& dy,
                               std::vector<double>* dweight) const {
    std::vector<double> d = rotated(dy, -1);
    if (!weight) return d;
    const double r = rstd(x);
    double dot = 0;
    for (std::int64_t h = 0; h < H; ++h) {
      if (dweight) (*dweight)[index_of(h)] += d[index_of(h)] * x[h] * r;
      dot += d[index_of(h)] * scale(h) * x[h] * r / static_cast<double>(H);
    }
    for (std::int64_t h = 0; h < H; ++h) d[index_of(h)] = r * (d[index_of(h)] * scale(h) - x[h] * r * dot);
    return d;
  }
};

std::vector<double> angles(std::int64_t positions, std::int64_t half, bool sine) {
  std::vector<double> out;
  for (std::int64_t p = 0; p < positions; ++p)
    for (std::int64_t i = 0; i < half; ++i) {
      const double angle =
          static_cast<double>(p) * std::pow(100.0, -static_cast<double>(i) / static_cast<double>(half));
      out.push_back(static_cast<double>(static_cast<float>(sine ? std::sin(angle) : std::cos(angle))));
    }
  return out;
}

template <class T>
struct AppendCase {
  AttentionShape shape;
  AppendForm form;
  std::int64_t heads, width;
  std::vector<double> cos, sin;
  Values<T> q_norm, k_norm;

  AppendCase(const AttentionShape& s, const AppendForm& f)
      : shape(s),
        form(f),
        heads(s.N + 2 * s.G),
        width(heads * s.H),
        cos(angles(100, s.H / 2, false)),
        sin(angles(100, s.H / 2, true)),
        q_norm(random_rounded<T>(s.H, 5)),
        k_norm(random_rounded<T>(s.H, 6)) {}

  HeadReference head(std::int64_t n, std::int64_t position) const {
    const bool is_v = n >= shape.N + shape.G;
    const double* weight = !form.norms || is_v ? nullptr
                           : n < shape.N       ? q_norm.exact.data()
                                               : k_norm.exact.data();
    const std::int64_t angle = position * shape.H / 2;
    const bool rotates = form.rotates && !is_v;
    return {shape.H, weight, form.plus_one, rotates ? cos.data() + angle : nullptr,
            rotates ? sin.data() + angle : nullptr};
  }
};

}  // namespace

TEMPLATE_TEST_CASE("append writes normed and rotated heads where attention reads them", "[device]", float,
                   Bfloat16) {
  using T = TestType;
  const AttentionCase rows({{0, 1}, {20, 13}, {20, 3}, {32, 1}});
  for (const AppendForm form : kForms)
    for (const AttentionShape shape :
         {AttentionShape{1, 1, 2}, AttentionShape{6, 2, 80}, AttentionShape{3, 3, 256}}) {
      const AppendCase<T> c(shape, form);
      const std::int64_t N = shape.N, G = shape.G, H = shape.H;
      const Values<T> qkv = random_rounded<T>(rows.rows() * c.width, 1);
      std::vector<double> expected = qkv.exact,
                          k_expected(index_of(rows.packed().num_blocks() * shape.block_stride()), 7),
                          v_expected = k_expected, q_expected;
      for (std::int64_t t = 0; t < rows.rows(); ++t)
        for (std::int64_t n = 0; n < N + G; ++n) {
          const auto y = c.head(n, rows.packed().rows().positions[index_of(t)])
                             .forward(qkv.exact.data() + t * c.width + n * H);
          std::copy(y.begin(), y.end(), expected.begin() + t * c.width + n * H);
        }
      for (std::int64_t t = 0; t < rows.rows(); ++t)
        q_expected.insert(q_expected.end(), expected.begin() + t * c.width,
                          expected.begin() + t * c.width + N * H);
      rows.for_slots([&](std::int64_t t, std::int64_t block, std::int64_t slot) {
        for (std::int64_t g = 0; g < G; ++g)
          for (std::int64_t h = 0; h < H; ++h) {
            const std::int64_t at = kernels::head_offset(block, shape.block_stride(), g, H);
            k_expected[index_of(at + kernels::key_offset(slot, h))] =
                expected[index_of(t * c.width + (N + g) * H + h)];
            v_expected[index_of(at + kernels::value_offset(slot, h, H))] =
                expected[index_of(t * c.width + (N + G + g) * H + h)];
          }
      });
      on_every_device<T>([&](const TestDevice<T>& device) {
        INFO(device.name << ", H " << H << ", norms " << form.norms << ", rotates " << form.rotates);
        const DeviceRows view(*device.memory, rows.packed().rows());
        auto x = device.put(qkv.stored), q_norm = device.put(c.q_norm.stored),
             k_norm = device.put(c.k_norm.stored), q = device.put(std::vector<T>(q_expected.size())),
             k = device.put(std::vector<T>(k_expected.size(), round_to<T>(7))), v = device.put(k.values());
        auto cos = device.put(std::vector<float>(c.cos.begin(), c.cos.end())),
             sin = device.put(std::vector<float>(c.sin.begin(), c.sin.end()));
        device.ops->append(
            {x.data(), q.data(), k.data(), v.data(), shape.block_stride(), N, G, H,
             form.norms ? q_norm.data() : nullptr, form.norms ? k_norm.data() : nullptr, kEps, form.plus_one,
             form.rotates ? cos.data() : nullptr, form.rotates ? sin.data() : nullptr},
            view.view(), device.queue());
        check_values(x.values(), expected, 2e-6, 2e-6);
        check_values(q.values(), q_expected, 2e-6, 2e-6);
        check_values(k.values(), k_expected, 2e-6, 2e-6);
        check_values(v.values(), v_expected, 0, 0);
      });
    }
}

TEMPLATE_TEST_CASE("append's gradient collects the blocks and goes back through rotation and norm",
                   "[device]", float, Bfloat16) {
  using T = TestType;
  const AttentionCase rows({{0, 1}, {20, 13}, {20, 3}, {32, 1}});
  for (const AppendForm form : kForms)
    for (const AttentionShape shape :
         {AttentionShape{2, 1, 4}, AttentionShape{6, 2, 80}, AttentionShape{2, 2, 256}}) {
      const AppendCase<T> c(shape, form);
      const std::int64_t N = shape.N, G = shape.G, H = shape.H, T_rows = rows.rows();
      const Values<T> raw = random_rounded<T>(T_rows * c.width, 1),
                      d = random_rounded<T>(T_rows * c.width, 2);
      const std::int64_t elements = rows.packed().num_blocks() * shape.block_stride();
      const Values<float> dk = random_rounded<float>(elements, 3), dv = random_rounded<float>(elements, 4);
      std::vector<double> dy = d.exact, expected, dq_norm(index_of(H), 1), dk_norm(index_of(H), 2);
      for (std::int64_t t = 0; t < T_rows; ++t) std::fill_n(dy.begin() + t * c.width + N * H, 2 * G * H, 0);
      rows.for_slots([&](std::int64_t t, std::int64_t block, std::int64_t slot) {
        for (std::int64_t g = 0; g < G; ++g)
          for (std::int64_t h = 0; h < H; ++h) {
            const std::int64_t at = kernels::head_offset(block, shape.block_stride(), g, H);
            dy[index_of(t * c.width + (N + g) * H + h)] +=
                dk.exact[index_of(at + kernels::key_offset(slot, h))];
            dy[index_of(t * c.width + (N + G + g) * H + h)] +=
                dv.exact[index_of(at + kernels::value_offset(slot, h, H))];
          }
      });
      for (std::int64_t t = 0; t < T_rows; ++t)
        for (std::int64_t n = 0; n < c.heads; ++n) {
          const std::int64_t at = t * c.width + n * H;
          const std::vector<double> part(dy.begin() + at, dy.begin() + at + H);
          const auto x = c.head(n, rows.packed().rows().positions[index_of(t)])
                             .backward(raw.exact.data() + at, part, n < N ? &dq_norm : &dk_norm);
          expected.insert(expected.end(), x.begin(), x.end());
        }
      on_every_device<T>([&](const TestDevice<T>& device) {
        INFO(device.name << ", H " << H << ", norms " << form.norms << ", rotates " << form.rotates);
        const DeviceRows view(*device.memory, rows.packed().rows());
        auto dqkv = device.put(d.stored), x = device.put(raw.stored), q_norm = device.put(c.q_norm.stored),
             k_norm = device.put(c.k_norm.stored);
        auto dks = device.put(dk.stored), dvs = device.put(dv.stored);
        auto dq_norms = device.put(std::vector<float>(index_of(H), 1)),
             dk_norms = device.put(std::vector<float>(index_of(H), 2));
        auto cos = device.put(std::vector<float>(c.cos.begin(), c.cos.end())),
             sin = device.put(std::vector<float>(c.sin.begin(), c.sin.end()));
        auto workspace = device.put(std::vector<float>(index_of(kernels::head_norm_workspace(H)), NAN));
        device.ops->append_grad(
            {dqkv.data(), x.data(), dks.data(), dvs.data(), shape.block_stride(), N, G, H,
             form.norms ? q_norm.data() : nullptr, form.norms ? k_norm.data() : nullptr,
             form.norms ? dq_norms.data() : nullptr, form.norms ? dk_norms.data() : nullptr, kEps,
             form.plus_one, form.rotates ? cos.data() : nullptr, form.rotates ? sin.data() : nullptr,
             workspace.data()},
            view.view(), device.queue());
        // In bfloat16 the gradient of the normed head is stored between two kernels, and heads of few
        // elements have large rstd.
        const double tolerance = sizeof(T) == 2 && form.norms ? 5e-2 : 2e-5;
        check_values(dqkv.values(), expected, tolerance, tolerance);
        if (!form.norms) return;
        // Sums of some hundred such errors.
        check_values(dq_norms.values(), dq_norm, 4 * tolerance, tolerance);
        check_values(dk_norms.values(), dk_norm, 4 * tolerance, tolerance);
      });
    }
}

TEST_CASE("heads that are too wide for the kernels are refused") {
  const kernels::AppendArgs<float> args{nullptr, nullptr, nullptr, nullptr, 0,     1,       1,
                                        258,     nullptr, nullptr, 0,       false, nullptr, nullptr};
  CHECK_THROWS_WITH(emulated_kernels<float>().append(args, {}, nullptr),
                    "CUDA: heads are 258 wide, expected an even number up to 256");
}
