// Times the operations of a device's table one by one: one JSON line each, with the bytes an operation must
// move (every input once, every output once) and its floating-point operations. `--small` is for trying the
// program out.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <functional>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <vector>

#include "rlhf/core/random.h"
#include "rlhf/core/thread_pool.h"
#include "rlhf/kernels/adamw.h"
#include "rlhf/kernels/cuda_device.h"
#include "rlhf/kernels/ops.h"
#include "rlhf/model/device_rows.h"
#include "rlhf/model/packed_rows.h"

namespace rlhf {
namespace {

template <class T>
class Bench {
 public:
  Bench(const kernels::DeviceKernels<T>& ops, DeviceMemory& memory, std::string dtype, bool small)
      : ops_(ops), memory_(memory), dtype_(std::move(dtype)), shrink_(small ? 16 : 1) {}

  /// @param only name of a group, or empty for all
  void run(const std::string& only) {
    const auto group = [&](const std::string& name, void (Bench::*times)()) {
      if (only.empty() || only == name) (this->*times)();
    };
    group("rows", &Bench::rows);
    group("products", &Bench::products);
    group("few_rows", &Bench::few_rows);
    group("attention", &Bench::attention);
    group("sequences", &Bench::attention_of_sequences);
    group("logits", &Bench::logits);
    group("optimizer", &Bench::optimizer);
  }

 private:
  // Random numbers, not zeros: zeros can run faster. One table of them is repeated.
  template <class V>
  DeviceBuffer<V> random(std::int64_t count) {
    RandomStream stream(1);
    std::vector<V> table(4099), values(static_cast<std::size_t>(count));
    for (V& value : table) value = from_float<V>(static_cast<float>(0.1 * stream.normal()));
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = table[i % table.size()];
    return {memory_, values};
  }
  std::int64_t smaller(std::int64_t n) const { return std::max<std::int64_t>(1, n / shrink_); }
  static double bytes_of(std::int64_t elements) { return static_cast<double>(elements) * sizeof(T); }

  void time(const std::string& name, nlohmann::ordered_json shape, double bytes, double flops,
            const std::function<void()>& once) {
    const auto seconds = [&](int repeats) {
      memory_.synchronize();
      const auto begin = std::chrono::steady_clock::now();
      for (int i = 0; i < repeats; ++i) once();
      memory_.synchronize();
      return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() / repeats;
    };
    once();
    const int repeats = static_cast<int>(std::clamp(0.05 / seconds(1), 1.0, 200.0));
    std::vector<double> samples;
    for (int i = 0; i < 5; ++i) samples.push_back(seconds(repeats));
    std::ranges::sort(samples);
    nlohmann::ordered_json line = {{"op", name},
                                   {"device", ops_.name},
                                   {"dtype", dtype_},
                                   {"shape", std::move(shape)},
                                   {"median_us", samples[2] * 1e6},
                                   {"min_us", samples[0] * 1e6},
                                   {"max_us", samples[4] * 1e6},
                                   {"gb_per_s", bytes / samples[2] / 1e9},
                                   {"gflop_per_s", flops / samples[2] / 1e9}};
    std::cout << line.dump() << std::endl;
  }

  void rows() {
    const std::int64_t T_rows = smaller(8192), D = 4096, F = 11008;
    auto x = random<T>(T_rows * D), y = random<T>(T_rows * D), weight = random<T>(D),
         gate = random<T>(T_rows * 2 * F), hidden = random<T>(T_rows * F);
    time("norm", {{"rows", T_rows}, {"D", D}}, bytes_of(2 * T_rows * D), 0, [&] {
      ops_.norm({x.data(), weight.data(), nullptr, y.data(), nullptr, nullptr, D, 1e-5, false, false}, T_rows,
                memory_.queue());
    });
    time("activation", {{"rows", T_rows}, {"F", F}}, bytes_of(3 * T_rows * F), 0, [&] {
      ops_.activation({gate.data(), hidden.data(), F, kernels::GluKind::kSilu}, T_rows, memory_.queue());
    });
  }

  void products() {
    const std::int64_t N = 4096, K = 4096;
    auto w = random<T>(N * K);
    for (const std::int64_t M : {std::int64_t{1}, std::int64_t{64}, smaller(4096)}) {
      auto x = random<T>(M * K), y = random<T>(M * N);
      time("linear", {{"M", M}, {"N", N}, {"K", K}}, bytes_of(N * K + M * (N + K)),
           2.0 * static_cast<double>(M) * static_cast<double>(N * K), [&] {
             ops_.linear({x.data(), K, w.data(), nullptr, y.data(), N, K, false}, M, N, memory_.queue());
           });
    }
  }

  // Products of a decode step, every call of another layer: together they exceed the second-level cache.
  void few_rows() {
    if (!ops_.few_rows_linear) return;
    struct Shape {
      std::int64_t N, K;
      bool gated, norm;
    };
    constexpr std::int64_t kLayers = 12;
    for (const Shape shape :
         {Shape{1152, 896, false, true}, Shape{896, 896, false, false}, Shape{4864, 896, true, true},
          Shape{896, 4864, false, false}, Shape{4608, 3584, false, true}, Shape{18944, 3584, true, true}}) {
      const std::int64_t N = smaller(shape.N), K = shape.K, rows = shape.gated ? 2 * N : N;
      auto w = random<T>(kLayers * rows * K), weight = random<T>(K);
      for (const std::int64_t M : {1, 8, 16}) {
        auto x = random<T>(M * K), normed = random<T>(M * K), wide = random<T>(M * rows),
             y = random<T>(M * N);
        const double bytes = bytes_of(rows * K + M * (N + K)),
                     flops = 2.0 * static_cast<double>(M) * static_cast<double>(rows * K);
        std::int64_t layer = 0;
        const auto next = [&] { return w.data() + layer++ % kLayers * rows * K; };
        const kernels::NormArgs<T> norm = {x.data(), weight.data(), nullptr, normed.data(), nullptr, nullptr,
                                           K,        1e-5,          false,   false};
        const nlohmann::ordered_json name = {
            {"M", M}, {"N", N}, {"K", K}, {"gated", shape.gated}, {"norm", shape.norm}};
        time("few_rows_linear", name, bytes, flops, [&] {
          kernels::FewRowsArgs<T> args = {{x.data(), K, next(), nullptr, y.data(), N, K, false}, M};
          if (shape.norm) args.norm = norm;
          args.gated = shape.gated;
          ops_.few_rows_linear(args, N, memory_.queue());
        });
        time("norm, linear, activation", name, bytes, flops, [&] {
          if (shape.norm) ops_.norm(norm, M, memory_.queue());
          ops_.linear({shape.norm ? normed.data() : x.data(), K, next(), nullptr,
                       shape.gated ? wide.data() : y.data(), rows, K, false},
                      M, rows, memory_.queue());
          if (shape.gated)
            ops_.activation({wide.data(), y.data(), N, kernels::GluKind::kSilu}, M, memory_.queue());
        });
      }
    }
  }

  // Rows that decode: one of each sequence, whose blocks are laid out backwards.
  struct DecodeRows {
    std::vector<std::int32_t> table;
    Rows rows;
    std::int64_t blocks;

    DecodeRows(std::int64_t batch, std::int64_t context) {
      const std::int64_t per_row = kernels::ceil_div(context, kernels::kBlockTokens);
      blocks = batch * per_row;
      for (std::int64_t i = 0; i < blocks; ++i) table.push_back(static_cast<std::int32_t>(blocks - 1 - i));
      for (std::int64_t b = 0; b < batch; ++b) {
        rows.tokens.push_back(0);
        rows.positions.push_back(static_cast<std::int32_t>(context - 1));
        rows.tables.push_back(table.data() + b * per_row);
      }
    }
  };

  void attention() {
    for (const std::int64_t batch : {std::int64_t{1}, smaller(64)})
      for (const std::int64_t context : {std::int64_t{256}, smaller(4096)}) {
        decode_attention<T>("attention", batch, context, {32, 8, 128}, 1, false);
        decode_attention<Float8>("attention_fp8", batch, context, {32, 8, 128}, 1, false);
      }
    // Where K and V of a step's layers lie, every call the next layer's: a block's together, as in the
    // engine's slabs, or layer by layer.
    const HeadShape narrow = {14, 2, 64};
    decode_attention<T>("attention_in_slabs", smaller(256), 320, narrow, 24, true);
    decode_attention<T>("attention_by_layer", smaller(256), 320, narrow, 24, false);
    decode_attention<Float8>("attention_fp8_in_slabs", smaller(256), 320, narrow, 24, true);
  }

  struct HeadShape {
    std::int64_t N, G, H;
  };
  void attend(const kernels::PassAttentionArgs<T>& args, const kernels::PassRows& rows) {
    ops_.attention(args, rows, memory_.queue());
  }
  void attend(const kernels::PassAttentionArgs<T, Float8>& args, const kernels::PassRows& rows) {
    ops_.attention_fp8(args, rows, memory_.queue());
  }

  // K and V in E; in Float8 the scales are random, too.
  template <class E>
  void decode_attention(const char* name, std::int64_t batch, std::int64_t context, HeadShape shape,
                        std::int64_t layers, bool in_slabs) {
    const auto [N, G, H] = shape;
    const DecodeRows decode(batch, context);
    const DeviceRows view(memory_, decode.rows);
    const std::int64_t block = kernels::block_elements<E>(G, H), blocks = decode.blocks;
    const std::int64_t stride = in_slabs ? 2 * layers * block : block,
                       values = in_slabs ? block : blocks * block;
    auto kv = random<E>(2 * layers * blocks * block);
    auto q = random<T>(batch * N * H), out = random<T>(batch * N * H);
    auto workspace = random<Wide<T>>(kernels::attention_workspace(batch, N, H, context, 0));
    std::int64_t layer = 0;
    time(name, {{"batch", batch}, {"context", context}, {"N", N}, {"G", G}, {"H", H}, {"layers", layers}},
         static_cast<double>(2 * blocks * block) * sizeof(E),
         4.0 * static_cast<double>(batch * context * N * H), [&] {
           const E* k = kv.data() + layer * 2 * values;
           layer = (layer + 1) % layers;
           attend(kernels::PassAttentionArgs<T, E>{{k, k + values, stride, N, G, H, 0.088, 0},
                                                   q.data(),
                                                   N * H,
                                                   out.data(),
                                                   nullptr,
                                                   0,
                                                   workspace.data()},
                  view.view());
         });
  }

  // Prefill and training: whole sequences, FLOPs of the keys that rows see. Backward computes scores and dout
  // V^T again and three more products: 2.5 times forward.
  void attention_of_sequences() {
    struct Case {
      std::int64_t sequences, length, N, G, H;
    };
    for (const Case c : {Case{8, 1024, 14, 2, 64}, Case{1, 8192, 14, 2, 64}, Case{8, 1024, 32, 8, 128},
                         Case{1, 8192, 32, 8, 128}}) {
      if (sizeof(T) > 2 && c.length > 1024) continue;  // minutes without tensor cores
      const std::int64_t length = smaller(c.length), stride = c.G * c.H * kernels::kBlockTokens;
      std::vector<std::vector<TokenId>> tokens;
      for (std::int64_t s = 0; s < c.sequences; ++s)
        tokens.emplace_back(static_cast<std::size_t>(length), static_cast<TokenId>(s));
      const PackedRows packed(std::vector<std::span<const TokenId>>(tokens.begin(), tokens.end()));
      const DeviceRows rows(memory_, packed.rows());
      const DeviceBlockUses uses(memory_, packed);
      const std::int64_t count = rows.view().count, elements = count * c.N * c.H;
      const std::int64_t kv = packed.num_blocks() * stride;
      auto q = random<T>(elements), out = random<T>(elements), dout = random<T>(elements),
           dq = random<T>(elements), k = random<T>(kv), v = random<T>(kv);
      auto lse = random<Wide<T>>(count * c.N), dk = random<Wide<T>>(kv), dv = random<Wide<T>>(kv),
           workspace = random<Wide<T>>(
               std::max(count * c.N, kernels::attention_workspace(count, c.N, c.H, length, 0)));
      const kernels::AttentionArgs<T> cache = {
          k.data(), v.data(), stride, c.N, c.G, c.H, 1 / std::sqrt(static_cast<double>(c.H)), 0};
      const double keys = static_cast<double>(c.sequences * length) * static_cast<double>(length + 1) / 2;
      const double flops = 4 * keys * static_cast<double>(c.N * c.H);
      const nlohmann::ordered_json shape = {
          {"sequences", c.sequences}, {"length", length}, {"N", c.N}, {"G", c.G}, {"H", c.H}};
      time("attention_sequences", shape, bytes_of(2 * elements + 2 * kv), flops, [&] {
        ops_.attention({cache, q.data(), c.N * c.H, out.data(), lse.data(), 0, workspace.data()}, rows.view(),
                       memory_.queue());
      });
      const std::int64_t codes = packed.num_blocks() * kernels::block_elements<Float8>(c.G, c.H);
      auto k_codes = random<Float8>(codes), v_codes = random<Float8>(codes);
      time("attention_sequences_fp8", shape, bytes_of(2 * elements) + 2 * static_cast<double>(codes), flops,
           [&] {
             ops_.attention_fp8({{k_codes.data(), v_codes.data(), kernels::block_elements<Float8>(c.G, c.H),
                                  c.N, c.G, c.H, cache.scale, 0},
                                 q.data(),
                                 c.N * c.H,
                                 out.data(),
                                 lse.data(),
                                 0,
                                 workspace.data()},
                                rows.view(), memory_.queue());
           });
      time("attention_sequences_grad", shape, bytes_of(4 * elements + 2 * kv) + 8 * static_cast<double>(kv),
           2.5 * flops, [&] {
             ops_.attention_grad({cache, q.data(), out.data(), dout.data(), lse.data(), dq.data(), c.N * c.H,
                                  dk.data(), dv.data(), 0, uses.view(), packed.row_trees(), workspace.data()},
                                 rows.view(), memory_.queue());
           });
    }
  }

  void logits() {
    const std::int64_t rows = smaller(64), V = 128256;
    auto values = random<Wide<T>>(rows * V);
    DeviceBuffer<TokenId> targets(memory_, std::vector<TokenId>(static_cast<std::size_t>(rows), 7)),
        drawn(memory_, std::vector<TokenId>(static_cast<std::size_t>(rows)));
    DeviceBuffer<kernels::LogitsRow> statistics(memory_, static_cast<std::size_t>(rows));
    DeviceBuffer<kernels::DrawKey> keys(
        memory_, std::vector<kernels::DrawKey>(static_cast<std::size_t>(rows), {1, 2, 3, 4, 1, false}));
    DeviceBuffer<double> workspace(memory_, static_cast<std::size_t>(kernels::logits_workspace(rows, V)));
    const double bytes = static_cast<double>(rows * V) * sizeof(Wide<T>);
    time("logits", {{"rows", rows}, {"V", V}}, bytes, 0, [&] {
      ops_.logits(
          {values.data(), V, 1, 0, targets.data(), statistics.data(), nullptr, nullptr, workspace.data()},
          rows, memory_.queue());
    });
    time("draw", {{"rows", rows}, {"V", V}}, bytes, 0, [&] {
      ops_.draw({values.data(), V, keys.data(), drawn.data(), nullptr, workspace.data()}, rows,
                memory_.queue());
    });
    time("draw with statistics", {{"rows", rows}, {"V", V}}, bytes, 0, [&] {
      ops_.draw({values.data(), V, keys.data(), drawn.data(), statistics.data(), workspace.data()}, rows,
                memory_.queue());
    });
    // In place, so that from the second time on most of the row is removed already: it reads as much.
    DeviceBuffer<kernels::RowFilter> filters(
        memory_, std::vector<kernels::RowFilter>(static_cast<std::size_t>(rows), {50, 0.9}));
    DeviceBuffer<double> lse(memory_, static_cast<std::size_t>(rows));
    time("filter by top-k and top-p", {{"rows", rows}, {"V", V}}, bytes, 0, [&] {
      ops_.filter({values.data(), V, keys.data(), filters.data(), lse.data()}, rows, memory_.queue());
    });
    // In place as well: the numbers run away, the work is the same.
    const std::int64_t listed = smaller(1000);
    std::vector<kernels::LogitEdit> edits(static_cast<std::size_t>(rows * listed));
    for (std::int64_t i = 0; i < rows * listed; ++i)
      edits[static_cast<std::size_t>(i)] = {static_cast<TokenId>(i % listed * (V / listed)), 0, 0, 1.1F};
    DeviceBuffer<kernels::LogitEdit> lists(memory_, edits);
    std::vector<kernels::RowEdits> each;
    for (std::int64_t r = 0; r < rows; ++r) each.push_back({lists.data() + r * listed, listed, nullptr, 0});
    DeviceBuffer<kernels::RowEdits> row_edits(memory_, each);
    time("edit 1000 tokens", {{"rows", rows}, {"V", V}}, bytes, 0, [&] {
      ops_.edit({values.data(), V, keys.data(), row_edits.data(), lse.data(), workspace.data()}, rows,
                memory_.queue());
    });
  }

  void optimizer() {
    const std::int64_t n = smaller(100'000'000);
    auto master = random<Wide<T>>(n), gradient = random<Wide<T>>(n);
    DeviceBuffer<Wide<T>> first(memory_, std::vector<Wide<T>>(static_cast<std::size_t>(n))),
        second(memory_, std::vector<Wide<T>>(static_cast<std::size_t>(n)));
    auto shadow = random<T>(n);
    time("adamw", {{"n", n}}, static_cast<double>(n) * (7 * sizeof(Wide<T>) + sizeof(T)), 0, [&] {
      ops_.adamw(
          adamw_factors({}),
          {master.data(), shadow.data(), gradient.data(), first.data(), second.data(), nullptr, n, nullptr},
          memory_.queue());
    });
  }

  const kernels::DeviceKernels<T>& ops_;
  DeviceMemory& memory_;
  std::string dtype_;
  std::int64_t shrink_;
};

int run(const std::string& device, bool small, const std::string& only) {
  if (device == "cpu") {
    ThreadPool pool;
    Compute<float> compute(pool, kernels::detect_cpu_isa());
    HostMemory memory(&compute);
    Bench<float>(kernels::cpu_device_kernels<float>(), memory, "float32", small).run(only);
    return 0;
  }
  const auto cuda = CudaDevice::open();
  std::cerr << cuda_status().text << '\n';
  Bench<Bfloat16>(cuda_device_kernels<Bfloat16>(), *cuda, "bfloat16", small).run(only);
  Bench<float>(cuda_device_kernels<float>(), *cuda, "float32", small).run(only);
  return 0;
}

}  // namespace
}  // namespace rlhf

int main(int argc, char** argv) {
  CLI::App app("Times the operations of a device");
  std::string device = "cuda", only;
  bool small = false;
  app.add_option("--device", device, "cpu or cuda")->check(CLI::IsMember({"cpu", "cuda"}));
  app.add_flag("--small", small, "A sixteenth of the sizes");
  app.add_option("--only", only, "One group of operations")
      ->check(
          CLI::IsMember({"rows", "products", "few_rows", "attention", "sequences", "logits", "optimizer"}));
  CLI11_PARSE(app, argc, argv);
  try {
    return rlhf::run(device, small, only);
  } catch (const std::exception& error) {
    std::cerr << "device_bench: " << error.what() << '\n';
    return 1;
  }
}
