// Attention over blocks and the log-prob kernels against plain loops in double; gradients against central
// differences of those loops.
#include <algorithm>
#include <array>

#include "tests/kernels/support.h"

using namespace rlhf;

namespace {

constexpr std::int64_t kB = kernels::kBlockTokens;

std::size_t at(std::int64_t i) {
  return static_cast<std::size_t>(i);
}

// One query over keys [first, keys) of one sequence, keys and values as plain [key][G][H] arrays.
struct AttentionReference {
  std::int64_t N, G, H, keys, first;
  double scale, softcap;
  std::vector<double> q, k, v;

  std::vector<double> forward(std::vector<double>* lse) const {
    std::vector<double> out(at(N * H));
    for (std::int64_t n = 0; n < N; ++n) {
      const std::int64_t g = n / (N / G);
      std::vector<double> p;
      double total = 0;
      for (std::int64_t key = first; key < keys; ++key) {
        double score = 0;
        for (std::int64_t h = 0; h < H; ++h) score += q[at(n * H + h)] * k[at((key * G + g) * H + h)];
        score *= scale;
        if (softcap > 0) score = softcap * std::tanh(score / softcap);
        p.push_back(std::exp(score));
        total += p.back();
      }
      for (std::int64_t key = first; key < keys; ++key)
        for (std::int64_t h = 0; h < H; ++h)
          out[at(n * H + h)] += p[at(key - first)] / total * v[at((key * G + g) * H + h)];
      if (lse) lse->push_back(std::log(total));
    }
    return out;
  }
};

// The same keys and values in the blocks the kernels read, through a block table that is not in order. Slots
// that hold no key are full of large numbers, as a block that was used before may be.
template <class T>
struct Blocks {
  std::vector<T> k, v, dk, dv;
  std::vector<std::int32_t> table;
  std::int64_t stride;

  explicit Blocks(const AttentionReference& r) : stride(r.G * r.H * kB) {
    const std::int64_t count = (r.keys + kB - 1) / kB;
    for (std::int64_t b = 0; b < count; ++b) table.push_back(static_cast<std::int32_t>((b * 3 + 2) % 7));
    k.assign(at(7 * stride), 1000);
    v.assign(at(7 * stride), -1000);
    dk.assign(k.size(), 1);
    dv.assign(v.size(), 2);
    for (std::int64_t key = 0; key < r.keys; ++key)
      for (std::int64_t g = 0; g < r.G; ++g)
        for (std::int64_t h = 0; h < r.H; ++h) {
          k[k_slot(r, key, g, h)] = static_cast<T>(r.k[at((key * r.G + g) * r.H + h)]);
          v[v_slot(r, key, g, h)] = static_cast<T>(r.v[at((key * r.G + g) * r.H + h)]);
        }
  }
  std::size_t k_slot(const AttentionReference& r, std::int64_t key, std::int64_t g, std::int64_t h) const {
    return at(table[at(key / kB)] * stride + (g * r.H + h) * kB + key % kB);
  }
  std::size_t v_slot(const AttentionReference& r, std::int64_t key, std::int64_t g, std::int64_t h) const {
    return at(table[at(key / kB)] * stride + (g * kB + key % kB) * r.H + h);
  }
};

template <class T>
AttentionReference make_reference(std::int64_t N, std::int64_t G, std::int64_t H, std::int64_t keys,
                                  std::int64_t first, double softcap) {
  // Values pass through T, so that reference and kernel see the same numbers.
  const auto q = random_values<T>(N * H, 61), k = random_values<T>(keys * G * H, 62),
             v = random_values<T>(keys * G * H, 63);
  return {N,
          G,
          H,
          keys,
          first,
          1 / std::sqrt(static_cast<double>(H)),
          softcap,
          to_double(q),
          to_double(k),
          to_double(v)};
}

template <class T>
std::vector<T> cast(const std::vector<double>& values) {
  std::vector<T> out;
  for (double value : values) out.push_back(static_cast<T>(value));
  return out;
}

struct Window {
  std::int64_t first, keys;
};
constexpr Window kWindows[] = {{0, 1},   {0, 2},   {0, 15},  {0, 16},  {0, 17},  {0, 50},  {3, 9},
                               {15, 16}, {16, 17}, {16, 50}, {17, 33}, {31, 48}, {44, 96}, {0, 100}};

}  // namespace

TEMPLATE_TEST_CASE("attention equals the plain loop", "", float, double) {
  ThreadPool pool(1);
  struct Heads {
    std::int64_t N, G, H;
  };
  for (const auto isa : supported_isas())
    for (const Heads heads :
         {Heads{1, 1, 2}, Heads{4, 2, 6}, Heads{3, 3, 16}, Heads{9, 3, 24}, Heads{8, 1, 34}})
      for (const Window window : kWindows)
        for (const double softcap : {0.0, 2.0}) {
          const Compute<TestType> compute(pool, isa);
          const auto reference =
              make_reference<TestType>(heads.N, heads.G, heads.H, window.keys, window.first, softcap);
          const Blocks<TestType> blocks(reference);
          const auto q = cast<TestType>(reference.q);
          std::vector<TestType> out(q.size(), 77), lse(at(heads.N), 77);
          const kernels::AttentionArgs<TestType> args{blocks.k.data(), blocks.v.data(), blocks.stride,
                                                      heads.N,         heads.G,         heads.H,
                                                      reference.scale, softcap};
          const kernels::AttentionRow<TestType> row{q.data(),     out.data(), lse.data(), blocks.table.data(),
                                                    window.first, window.keys};
          for (std::int64_t g = 0; g < heads.G; ++g) compute.table().attention(args, &row, 1, g);
          INFO(compute.table().isa << ", N " << heads.N << ", G " << heads.G << ", H " << heads.H
                                   << ", keys [" << window.first << ", " << window.keys << "), softcap "
                                   << softcap);
          std::vector<double> expected_lse;
          const auto expected = reference.forward(&expected_lse);
          // A mean of up to 100 values below 4 with weights good to a few 1e-7 in float.
          const double tolerance = sizeof(TestType) == 4 ? 5e-6 : 1e-13;
          check_close(out, expected, tolerance, tolerance);
          check_close(lse, expected_lse, tolerance, tolerance);
          std::vector<TestType> without(q.size());
          kernels::AttentionRow<TestType> second = row;
          second.out = without.data();
          second.lse = nullptr;
          for (std::int64_t g = 0; g < heads.G; ++g) compute.table().attention(args, &second, 1, g);
          CHECK(without == out);
        }
}

TEMPLATE_TEST_CASE("attention gradients equal central differences and touch visible keys only", "", float,
                   double) {
  ThreadPool pool(1);
  for (const auto isa : supported_isas())
    for (const Window window : {Window{0, 1}, Window{0, 16}, Window{0, 37}, Window{5, 35}, Window{18, 33}})
      for (const double softcap : {0.0, 2.0}) {
        const std::int64_t N = 6, G = 2, H = 6;
        const Compute<TestType> compute(pool, isa);
        auto reference = make_reference<TestType>(N, G, H, window.keys, window.first, softcap);
        Blocks<TestType> blocks(reference);
        const auto q = cast<TestType>(reference.q), dout = random_values<TestType>(N * H, 64);
        std::vector<TestType> out(q.size()), lse(at(N)), dq(q.size(), 55);
        const kernels::AttentionArgs<TestType> args{blocks.k.data(), blocks.v.data(), blocks.stride, N, G, H,
                                                    reference.scale, softcap};
        const kernels::AttentionRow<TestType> row{q.data(),     out.data(), lse.data(), blocks.table.data(),
                                                  window.first, window.keys};
        const kernels::AttentionGradRow<TestType> grad_row{q.data(),     out.data(), dout.data(),
                                                           lse.data(),   dq.data(),  blocks.table.data(),
                                                           window.first, window.keys};
        for (std::int64_t g = 0; g < G; ++g) compute.table().attention(args, &row, 1, g);
        for (std::int64_t g = 0; g < G; ++g)
          compute.table().attention_grad(args, &grad_row, 1, blocks.dk.data(), blocks.dv.data(), g);
        const auto loss = [&] {
          const auto result = reference.forward(nullptr);
          double sum = 0;
          for (std::size_t i = 0; i < result.size(); ++i) sum += result[i] * static_cast<double>(dout[i]);
          return sum;
        };
        INFO(compute.table().isa << ", keys [" << window.first << ", " << window.keys << "), softcap "
                                 << softcap);
        // Central differences are good to 1e-8.
        const double tolerance = sizeof(TestType) == 4 ? 1e-5 : 2e-8;
        std::vector<double> slopes;
        for (double& value : reference.q) slopes.push_back(slope_of(value, loss));
        check_close(dq, slopes, tolerance, tolerance);
        // dk and dv are added to; slots without a visible key keep what was there.
        std::vector<double> dk(blocks.dk.size(), 1), dv(blocks.dv.size(), 2);
        for (std::int64_t key = window.first; key < window.keys; ++key)
          for (std::int64_t g = 0; g < G; ++g)
            for (std::int64_t h = 0; h < H; ++h) {
              const std::size_t plain = at((key * G + g) * H + h);
              dk[blocks.k_slot(reference, key, g, h)] += slope_of(reference.k[plain], loss);
              dv[blocks.v_slot(reference, key, g, h)] += slope_of(reference.v[plain], loss);
            }
        check_close(blocks.dk, dk, tolerance, tolerance);
        check_close(blocks.dv, dv, tolerance, tolerance);
      }
}

namespace {

// Rows of two sequences in one call: ends of prompts, whole responses, a window. Rows of a sequence are
// neighbours.
template <class T>
struct ManyRows {
  static constexpr std::int64_t N = 6, G = 2, H = 20;
  std::vector<AttentionReference> sequences;
  std::vector<Blocks<T>> blocks;
  std::vector<std::pair<std::size_t, Window>> rows;
  std::vector<T> q, dout;

  ManyRows() {
    for (const std::int64_t keys : {70, 33}) {
      sequences.push_back(make_reference<T>(N, G, H, keys, 0, 0));
      blocks.emplace_back(sequences.back());
    }
    for (std::int64_t keys = 11; keys <= 70; ++keys) rows.push_back({0, {keys > 40 ? keys - 30 : 0, keys}});
    for (std::int64_t keys = 1; keys <= 33; ++keys) rows.push_back({1, {0, keys}});
    rows.push_back({0, {0, 64}});
    q = random_values<T>(static_cast<std::int64_t>(rows.size()) * N * H, 71);
    dout = random_values<T>(static_cast<std::int64_t>(rows.size()) * N * H, 72);
    // One K and V array, as in a run: the second sequence's blocks behind the first's.
    for (std::int32_t& block : blocks[1].table) block += 7;
    for (auto member : {&Blocks<T>::k, &Blocks<T>::v, &Blocks<T>::dk, &Blocks<T>::dv})
      (blocks[0].*member)
          .insert((blocks[0].*member).end(), (blocks[1].*member).begin(), (blocks[1].*member).end());
  }
  kernels::AttentionArgs<T> args() const {
    return {blocks[0].k.data(), blocks[0].v.data(), blocks[0].stride, N, G, H, sequences[0].scale, 0};
  }
  std::vector<kernels::AttentionRow<T>> forward_rows(std::vector<T>& out, std::vector<T>& lse) const {
    std::vector<kernels::AttentionRow<T>> result;
    for (std::size_t t = 0; t < rows.size(); ++t)
      result.push_back({q.data() + t * at(N * H), out.data() + t * at(N * H), lse.data() + t * at(N),
                        blocks[rows[t].first].table.data(), rows[t].second.first, rows[t].second.keys});
    return result;
  }
};

}  // namespace

TEMPLATE_TEST_CASE("a row's attention does not depend on the rows beside it, bit for bit", "", float,
                   double) {
  ThreadPool pool(1);
  const ManyRows<TestType> many;
  for (const auto isa : supported_isas()) {
    const Compute<TestType> compute(pool, isa);
    std::vector<TestType> out(many.q.size()), lse(many.rows.size() * at(many.N)), alone_out(out.size()),
        alone_lse(lse.size());
    const auto together = many.forward_rows(out, lse), alone = many.forward_rows(alone_out, alone_lse);
    for (std::int64_t g = 0; g < many.G; ++g) {
      compute.table().attention(many.args(), together.data(), static_cast<std::int64_t>(together.size()), g);
      for (const auto& row : alone) compute.table().attention(many.args(), &row, 1, g);
    }
    INFO(compute.table().isa);
    CHECK(out == alone_out);
    CHECK(lse == alone_lse);
  }
}

TEMPLATE_TEST_CASE("gradients of many rows are the sums of each row's", "", float, double) {
  ThreadPool pool(1);
  for (const auto isa : supported_isas()) {
    ManyRows<TestType> many;
    const Compute<TestType> compute(pool, isa);
    std::vector<TestType> out(many.q.size()), lse(many.rows.size() * at(many.N)), dq(out.size(), 5),
        alone_dq(out.size(), 6);
    auto dk = many.blocks[0].dk, dv = many.blocks[0].dv, alone_dk = dk, alone_dv = dv;
    const auto rows = many.forward_rows(out, lse);
    std::vector<kernels::AttentionGradRow<TestType>> together, alone;
    for (std::size_t t = 0; t < rows.size(); ++t) {
      together.push_back({rows[t].q, rows[t].out, many.dout.data() + t * at(many.N * many.H), rows[t].lse,
                          dq.data() + t * at(many.N * many.H), rows[t].blocks, rows[t].first_key,
                          rows[t].num_keys});
      alone.push_back(together.back());
      alone.back().dq = alone_dq.data() + t * at(many.N * many.H);
    }
    for (std::int64_t g = 0; g < many.G; ++g) {
      compute.table().attention(many.args(), rows.data(), static_cast<std::int64_t>(rows.size()), g);
      compute.table().attention_grad(many.args(), together.data(), static_cast<std::int64_t>(together.size()),
                                     dk.data(), dv.data(), g);
      for (const auto& row : alone)
        compute.table().attention_grad(many.args(), &row, 1, alone_dk.data(), alone_dv.data(), g);
    }
    INFO(compute.table().isa);
    // Sums of some 90 terms below 10 in two orders.
    const double tolerance = sizeof(TestType) == 4 ? 2e-5 : 1e-13;
    check_close(dq, to_double(alone_dq), tolerance, tolerance);
    check_close(dk, to_double(alone_dk), tolerance, tolerance);
    check_close(dv, to_double(alone_dv), tolerance, tolerance);
  }
}

namespace {

struct LogitsReference {
  std::vector<double> logits;
  double temperature, softcap;
  TokenId target;

  std::vector<double> capped() const {
    std::vector<double> out = logits;
    if (softcap > 0)
      for (double& value : out) value = softcap * std::tanh(value / softcap);
    return out;
  }
  kernels::LogitsRow row() const {
    kernels::LogitsRow row;
    const auto z = capped();
    row.max = *std::max_element(z.begin(), z.end()) / temperature;
    double total = 0;
    for (double value : z) total += std::exp(value / temperature - row.max);
    row.lse = row.max + std::log(total);
    for (double value : z) {
      const double log_p = value / temperature - row.lse;
      row.entropy -= std::exp(log_p) * log_p;
    }
    row.logprob = z[static_cast<std::size_t>(target)] / temperature - row.lse;
    return row;
  }
};

}  // namespace

TEMPLATE_TEST_CASE("log-prob, entropy and their gradient equal the plain loop", "", float, double) {
  ThreadPool pool(1);
  for (const auto isa : supported_isas())
    for (std::int64_t V : {1, 2, 17, 100, 2049, 5003})
      for (const double temperature : {1.0, 0.7})
        for (const double softcap : {0.0, 4.0}) {
          const Compute<TestType> compute(pool, isa);
          auto logits = random_values<TestType>(V, 71, 3);
          LogitsReference reference{to_double(logits), temperature, softcap, static_cast<TokenId>(V * 2 / 3)};
          const auto expected = reference.row();
          INFO(compute.table().isa << ", V " << V << ", temperature " << temperature << ", softcap "
                                   << softcap);
          const auto row =
              compute.table().logits_row(logits.data(), V, 1 / temperature, softcap, reference.target);
          // Logits reach 12 and are rounded to T before the subtraction; exp_approx is good to 2e-7.
          const double tolerance = sizeof(TestType) == 4 ? 1e-5 : 1e-12;
          CHECK(row.logprob == Approx(expected.logprob).margin(tolerance).epsilon(tolerance));
          CHECK(row.entropy == Approx(expected.entropy).margin(tolerance).epsilon(tolerance));
          CHECK(row.lse == Approx(expected.lse).margin(tolerance).epsilon(tolerance));
          CHECK(row.max == Approx(expected.max).margin(tolerance).epsilon(tolerance));
          check_close(logits, reference.capped(), tolerance, tolerance);
          if (V > 200) continue;  // central differences cost V^2
          const double dlogprob = 1.5, dentropy = -0.4;
          compute.table().logits_row_grad(logits.data(), V, 1 / temperature, softcap, reference.target, row,
                                          dlogprob, dentropy);
          const auto loss = [&] {
            const auto at_row = reference.row();
            return dlogprob * at_row.logprob + dentropy * at_row.entropy;
          };
          std::vector<double> slopes;
          for (double& value : reference.logits) slopes.push_back(slope_of(value, loss));
          check_close(logits, slopes, tolerance + 1e-9, tolerance);
        }
}

TEMPLATE_TEST_CASE("log-probs of far apart logits are finite and exact", "", float, double) {
  ThreadPool pool(1);
  for (const auto isa : supported_isas()) {
    const Compute<TestType> compute(pool, isa);
    std::vector<TestType> logits(37, -500);
    logits[5] = 500;
    auto copy = logits;
    CHECK(compute.table().logits_row(copy.data(), 37, 1, 0, 5).logprob == 0);
    copy = logits;
    const auto row = compute.table().logits_row(copy.data(), 37, 1, 0, 6);
    CHECK(row.logprob == -1000);
    CHECK(row.entropy == Approx(0).margin(1e-12));
    // Equal logits: log V, whatever their size.
    std::vector<TestType> equal(4099, 300);
    const auto flat = compute.table().logits_row(equal.data(), 4099, 1, 0, 4098);
    CHECK(flat.logprob == Approx(-std::log(4099.0)).epsilon(1e-6));
    CHECK(flat.entropy == Approx(std::log(4099.0)).epsilon(1e-6));
  }
}
