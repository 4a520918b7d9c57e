// The CPU kernels of every instruction set this machine has, against ATen's operators and autograd in double.
// Tolerance: sums of at most 300 float products, so 300 roundings of 6e-8 each at the very worst.

#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/full.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/layer_norm.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/rms_norm.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tanh.h>

#include "rlhf/kernels/adamw.h"
#include "rlhf/kernels/ops.h"
#include "tests/torch/tensors.h"

namespace rlhf::torch_test {
namespace {

constexpr double kTolerance = 2e-5;

template <class Check>
void for_each_isa(Check check) {
  ThreadPool pool(2);
  for (const auto isa : {kernels::CpuIsa::kBaseline, kernels::CpuIsa::kAvx2, kernels::CpuIsa::kAvx512}) {
    if (!kernels::cpu_supports(isa)) continue;
    const Compute<float> compute(pool, isa);
    INFO("instruction set " << compute.table().isa);
    check(compute);
  }
}

std::vector<float> zeros(std::int64_t count) {
  return std::vector<float>(static_cast<std::size_t>(count), 0.0f);
}

TEST_CASE("linear computes x W^T + b as at::linear") {
  struct Shape {
    std::int64_t M, K, N;
  };
  for (const Shape& shape : {Shape{1, 64, 48}, {3, 37, 29}, {8, 300, 129}, {33, 96, 70}, {130, 50, 17}}) {
    const std::int64_t M = shape.M, K = shape.K, N = shape.N;
    INFO("M " << M << " K " << K << " N " << N);
    const auto x = normal(M * K, 1), w = normal(N * K, 2), bias = normal(N, 3), y0 = normal(M * N, 4);
    const auto expected = at::linear(tensor(x, {M, K}), tensor(w, {N, K}), tensor(bias, {N}));
    for_each_isa([&](const Compute<float>& compute) {
      auto y = y0;
      compute.linear({x.data(), K, w.data(), bias.data(), y.data(), N, K, false}, M, N);
      CHECK(difference(y, expected) < kTolerance);
      y = y0;
      compute.linear({x.data(), K, w.data(), nullptr, y.data(), N, K, true}, M, N);
      CHECK(difference(y, expected - tensor(bias, {N}) + tensor(y0, {M, N})) < kTolerance);
    });
  }
}

TEST_CASE("gemm computes A B and A^T B as at::matmul") {
  const std::int64_t M = 45, K = 131, N = 83;
  const auto a = normal(M * K, 1), b = normal(K * N, 2), c0 = normal(M * N, 3);
  for_each_isa([&](const Compute<float>& compute) {
    auto c = c0;
    compute.gemm({a.data(), K, 1, b.data(), N, c.data(), N, M, N, K, false});
    CHECK(difference(c, at::matmul(tensor(a, {M, K}), tensor(b, {K, N}))) < kTolerance);
    c = c0;
    compute.gemm({a.data(), 1, M, b.data(), N, c.data(), N, M, N, K, true});
    CHECK(difference(c, at::matmul(tensor(a, {K, M}).t(), tensor(b, {K, N})) + tensor(c0, {M, N})) <
          kTolerance);
  });
}

TEST_CASE("norms and their gradients agree with at::rms_norm and at::layer_norm") {
  const std::int64_t T = 11, D = 70;
  const double eps = 1e-5;
  const auto x = normal(T * D, 1), weight = normal(D, 2), bias = normal(D, 3), dy = normal(T * D, 4);
  for (const bool layer : {false, true})
    for (const bool plus_one : {false, true}) {
      if (layer && plus_one) continue;  // no model has it
      INFO("layer norm " << layer << ", plus one " << plus_one);
      const auto x_ = leaf(x, {T, D}), weight_ = leaf(weight, {D}), bias_ = leaf(bias, {D});
      const auto y_ = layer ? at::layer_norm(x_, {D}, weight_, bias_, eps)
                            : at::rms_norm(x_, {D}, plus_one ? weight_ + 1 : weight_, eps);
      (y_ * tensor(dy, {T, D})).sum().backward();
      for_each_isa([&](const Compute<float>& compute) {
        auto y = zeros(T * D), mean = zeros(T), rstd = zeros(T);
        compute.norm({x.data(), weight.data(), layer ? bias.data() : nullptr, y.data(), mean.data(),
                      rstd.data(), D, eps, layer, plus_one},
                     T);
        CHECK(difference(y, y_) < kTolerance);
        auto dx = zeros(T * D), dweight = zeros(D), dbias = zeros(D);
        compute.norm_grad({dy.data(), x.data(), weight.data(), mean.data(), rstd.data(), dx.data(),
                           dweight.data(), layer ? dbias.data() : nullptr, T, D, layer, plus_one});
        CHECK(difference(dx, x_.grad()) < kTolerance);
        CHECK(difference(dweight, weight_.grad()) < kTolerance);
        if (layer) CHECK(difference(dbias, bias_.grad()) < kTolerance);
      });
    }
}

TEST_CASE("activations and their gradients agree with at::silu and at::gelu") {
  using kernels::GluKind;
  const std::int64_t T = 5, F = 53;
  const auto dy = normal(T * F, 2);
  for (const GluKind kind : {GluKind::kSilu, GluKind::kGeluTanh, GluKind::kGeluTanhPlain}) {
    const bool gated = kind != GluKind::kGeluTanhPlain;
    const std::int64_t width = gated ? 2 * F : F;
    INFO("kind " << static_cast<int>(kind));
    const auto x = normal(T * width, 1);
    const auto x_ = leaf(x, {T, width});
    const auto gate = x_.narrow(1, 0, F);
    auto y_ = kind == GluKind::kSilu ? at::silu(gate) : at::gelu(gate, "tanh");
    if (gated) y_ = y_ * x_.narrow(1, F, F);
    (y_ * tensor(dy, {T, F})).sum().backward();
    for_each_isa([&](const Compute<float>& compute) {
      auto y = zeros(T * F), dx = zeros(T * width);
      compute.activation({x.data(), y.data(), F, kind}, T);
      compute.activation_grad({x.data(), dy.data(), dx.data(), F, kind}, T);
      CHECK(difference(y, y_) < kTolerance);
      CHECK(difference(dx, x_.grad()) < kTolerance);
    });
  }
}

TEST_CASE("log-probs, entropies and their gradients agree with at::log_softmax") {
  const std::int64_t V = 301;
  const TokenId target = 17;
  for (const double softcap : {0.0, 3.0})
    for (const double temperature : {1.0, 0.7}) {
      INFO("softcap " << softcap << ", temperature " << temperature);
      auto raw = normal(V, 5);
      for (float& logit : raw) logit *= 4;
      const auto raw_ = leaf(raw, {V});
      const auto capped = softcap > 0 ? at::tanh(raw_ / softcap) * softcap : raw_;
      const auto log_probs = at::log_softmax(capped / temperature, 0);
      const auto log_prob = log_probs[target];
      const auto entropy = -(log_probs.exp() * log_probs).sum();
      (log_prob * 1.3 + entropy * -0.4).backward();
      for_each_isa([&](const Compute<float>& compute) {
        auto logits = raw;
        const auto row = compute.table().logits_row(logits.data(), V, 1 / temperature, softcap, target);
        CHECK(row.logprob == Approx(log_prob.item<double>()).epsilon(kTolerance));
        CHECK(row.entropy == Approx(entropy.item<double>()).epsilon(kTolerance));
        compute.table().logits_row_grad(logits.data(), V, 1 / temperature, softcap, target, row, 1.3, -0.4);
        CHECK(difference(logits, raw_.grad()) < kTolerance);
      });
    }
}

// Causal attention of one sequence written out with matmul and softmax.
at::Tensor attend(const at::Tensor& q_TNH, const at::Tensor& k_TGH, const at::Tensor& v_TGH, double scale,
                  double softcap, std::int64_t window) {
  const std::int64_t T = q_TNH.size(0), N = q_TNH.size(1), G = k_TGH.size(1);
  std::vector<at::Tensor> rows;
  for (std::int64_t t = 0; t < T; ++t) {
    const std::int64_t first = window > 0 ? std::max<std::int64_t>(0, t + 1 - window) : 0;
    std::vector<at::Tensor> heads;
    for (std::int64_t n = 0; n < N; ++n) {
      const std::int64_t g = n / (N / G);
      const auto keys = k_TGH.select(1, g).narrow(0, first, t + 1 - first);
      auto scores = at::matmul(keys, q_TNH[t][n]) * scale;
      if (softcap > 0) scores = at::tanh(scores / softcap) * softcap;
      heads.push_back(at::matmul(at::softmax(scores, 0), v_TGH.select(1, g).narrow(0, first, t + 1 - first)));
    }
    rows.push_back(at::stack(heads));
  }
  return at::stack(rows);
}

TEST_CASE("attention over K/V blocks and its gradient agree with softmax attention") {
  constexpr std::int64_t kB = kernels::kBlockTokens;
  const std::int64_t T = 37, N = 4, G = 2, H = 24, num_blocks = (T + kB - 1) / kB;
  const double scale = 0.3;
  const auto q = normal(T * N * H, 1), k = normal(T * G * H, 2), v = normal(T * G * H, 3),
             dout = normal(T * N * H, 4);
  const std::vector<std::int32_t> table = {2, 0, 1};  // blocks need not lie in order
  REQUIRE(static_cast<std::int64_t>(table.size()) == num_blocks);
  struct Variant {
    double softcap;
    std::int64_t window;
  };
  for (const Variant& variant : {Variant{0, 0}, {2, 0}, {0, 10}}) {
    const double softcap = variant.softcap;
    const std::int64_t window = variant.window;
    INFO("softcap " << softcap << ", window " << window);
    const auto q_ = leaf(q, {T, N, H}), k_ = leaf(k, {T, G, H}), v_ = leaf(v, {T, G, H});
    const auto out_ = attend(q_, k_, v_, scale, softcap, window);
    (out_ * tensor(dout, {T, N, H})).sum().backward();

    // K block: [G][H][kB], V block: [G][kB][H].
    const std::int64_t stride = G * H * kB;
    const auto k_at = [&](std::int64_t t, std::int64_t g, std::int64_t h) {
      return static_cast<std::size_t>(table[static_cast<std::size_t>(t / kB)] * stride + (g * H + h) * kB +
                                      t % kB);
    };
    const auto v_at = [&](std::int64_t t, std::int64_t g, std::int64_t h) {
      return static_cast<std::size_t>(table[static_cast<std::size_t>(t / kB)] * stride +
                                      (g * kB + t % kB) * H + h);
    };
    auto k_blocks = zeros(num_blocks * stride), v_blocks = k_blocks;
    const auto for_each_key = [&](auto visit) {
      for (std::int64_t t = 0; t < T; ++t)
        for (std::int64_t g = 0; g < G; ++g)
          for (std::int64_t h = 0; h < H; ++h)
            visit(static_cast<std::size_t>((t * G + g) * H + h), k_at(t, g, h), v_at(t, g, h));
    };
    for_each_key([&](std::size_t flat, std::size_t in_k, std::size_t in_v) {
      k_blocks[in_k] = k[flat];
      v_blocks[in_v] = v[flat];
    });
    for_each_isa([&](const Compute<float>& compute) {
      const kernels::AttentionArgs<float> args{k_blocks.data(), v_blocks.data(), stride, N, G, H,
                                               scale,           softcap};
      auto out = zeros(T * N * H), lse = zeros(T * N), dq = zeros(T * N * H);
      auto dk_blocks = zeros(num_blocks * stride), dv_blocks = dk_blocks;
      std::vector<kernels::AttentionRow<float>> rows;
      std::vector<kernels::AttentionGradRow<float>> grad_rows;
      for (std::int64_t t = 0; t < T; ++t) {
        const std::int64_t first = window > 0 ? std::max<std::int64_t>(0, t + 1 - window) : 0;
        const std::int64_t at = t * N * H;
        rows.push_back({q.data() + at, out.data() + at, lse.data() + t * N, table.data(), first, t + 1});
        grad_rows.push_back({q.data() + at, out.data() + at, dout.data() + at, lse.data() + t * N,
                             dq.data() + at, table.data(), first, t + 1});
      }
      for (std::int64_t g = 0; g < G; ++g) compute.table().attention(args, rows.data(), T, g);
      for (std::int64_t g = 0; g < G; ++g)
        compute.table().attention_grad(args, grad_rows.data(), T, dk_blocks.data(), dv_blocks.data(), g);
      auto dk = zeros(T * G * H), dv = dk;
      for_each_key([&](std::size_t flat, std::size_t in_k, std::size_t in_v) {
        dk[flat] = dk_blocks[in_k];
        dv[flat] = dv_blocks[in_v];
      });
      CHECK(difference(out, out_) < kTolerance);
      CHECK(difference(dq, q_.grad()) < kTolerance);
      CHECK(difference(dk, k_.grad()) < kTolerance);
      CHECK(difference(dv, v_.grad()) < kTolerance);
    });
  }
}

TEST_CASE("AdamW agrees with at::_fused_adamw_ over several steps") {
  const std::int64_t count = 1003;
  auto weights = normal(count, 1), first = zeros(count), second = zeros(count);
  const auto weights_ = tensor(weights, {count}), first_ = tensor(first, {count}),
             second_ = tensor(second, {count}), step_ = at::full({}, 0, at::kDouble);
  AdamwStep step;
  step.learning_rate = 0.01;
  step.beta2 = 0.95;
  step.weight_decay = 0.1;
  for (step.step = 1; step.step <= 5; ++step.step) {
    const auto gradient = normal(count, 10 + static_cast<unsigned>(step.step));
    adamw_update<float>(step, {weights, gradient, first, second, {}});
    step_.add_(1);
    at::_fused_adamw_({weights_}, {tensor(gradient, {count})}, {first_}, {second_}, {}, {step_},
                      step.learning_rate, step.beta1, step.beta2, step.weight_decay, step.epsilon, false,
                      false);
  }
  // Elementwise: a few roundings a step.
  CHECK(difference(weights, weights_) < 2e-6);
  CHECK(difference(first, first_) < 2e-6);
  CHECK(difference(second, second_) < 2e-6);
}

}  // namespace
}  // namespace rlhf::torch_test
