// The decoder's programs, forward and backward over sequences with a common head, on the CPU in double
// against the same on every other device.
#include <algorithm>

#include "rlhf/model/decoder.h"
#include "rlhf/model/device_weights.h"
#include "rlhf/model/parameters.h"
#include "rlhf/model/weight_file.h"
#include "tests/cuda/devices.h"

using namespace rlhf;

namespace {

// The tree this was built in, or, where the program was carried to another machine, the one it runs in.
std::filesystem::path source_folder() {
  return std::filesystem::exists(RLHF_SOURCE_DIR) ? RLHF_SOURCE_DIR : std::filesystem::current_path();
}

// A model of tests/golden as the reference has it, and as devices get it.
struct GoldenModel {
  explicit GoldenModel(const std::string& name)
      : folder(source_folder() / "tests" / "golden" / name),
        config(load_model_config(folder)),
        exact(config, {}, nullptr),
        rounded(config, {}, nullptr) {
    exact.load(*WeightFile::open(folder));
    rounded.load(*WeightFile::open(folder));
  }
  std::filesystem::path folder;
  ModelConfig config;
  Parameters<double> exact;
  Parameters<float> rounded;
};

struct Result {
  std::vector<double> hidden, dx;
  std::vector<std::vector<double>> gradients;  ///< of the parameters' entries
};

template <class T>
std::vector<double> download(DeviceMemory& memory, const T* data, std::size_t count) {
  std::vector<T> values(count);
  memory.download(values.data(), data, count * sizeof(T));
  std::vector<double> out;
  for (const T value : values)
    if constexpr (sizeof(T) == 8)
      out.push_back(value);
    else
      out.push_back(exact(value));
  return out;
}

// Hidden states behind the final norm, and what `upstream`, the gradient in front of it, gives.
template <class T>
Result run(DecoderRunner<T>& runner, DeviceMemory& memory, const DecoderWeights<T>& weights,
           const PackedRows& packed, const std::vector<double>& upstream) {
  const ModelConfig& config = weights.config;
  const std::int64_t rows = packed.rows().size(), layers = config.num_layers;
  const auto elements = static_cast<std::size_t>(rows * config.hidden_size);
  DeviceMemory* const place = &memory;
  Buffer<T> x(elements, place), hidden(elements, place);
  KvStore<T> store(config, layers, packed.num_blocks(), place);
  std::vector<LayerActivations<T>> kept;
  while (static_cast<std::int64_t>(kept.size()) < layers) kept.emplace_back(place);
  runner.embed(weights, packed.rows(), x.data());
  runner.forward_layers(weights, packed.rows(), 0, layers, store, 0, x.data(), &kept);
  runner.final_norm(weights, rows, x.data(), hidden.data(), nullptr, nullptr);
  Result result;
  result.hidden = download(memory, hidden.data(), elements);
  std::vector<T> rounded;
  for (const double value : upstream) rounded.push_back(round_to<T>(value));
  memory.upload(x.data(), rounded.data(), elements * sizeof(T));
  runner.backward_layers(weights, packed, 0, layers, store, 0, x.data(), kept);
  runner.backward_embed(weights, packed.rows(), x.data());
  result.dx = download(memory, x.data(), elements);
  return result;
}

double norm_of(const std::vector<double>& values) {
  double square = 0;
  for (const double value : values) square += value * value;
  return std::sqrt(square);
}

// |got - expected| / |expected|
double distance(const std::vector<double>& got, const std::vector<double>& expected) {
  REQUIRE(got.size() == expected.size());
  std::vector<double> difference;
  for (std::size_t i = 0; i < got.size(); ++i) difference.push_back(got[i] - expected[i]);
  return norm_of(difference) / (norm_of(expected) + 1e-30);
}

}  // namespace

TEMPLATE_TEST_CASE("the decoder's forward and backward programs agree on every device", "[device]", float,
                   Bfloat16) {
  using T = TestType;
  for (const char* name :
       {"model_llama_gqa_untied", "model_qwen3", "model_gemma2", "model_gpt2", "model_mistral"}) {
    GoldenModel model(name);
    const ModelConfig& config = model.config;
    std::vector<TokenId> first(23, 5), second;
    for (std::size_t i = 0; i < first.size(); ++i) first[i] = static_cast<TokenId>((i * 7 + 3) % 20 + 3);
    second.assign(first.begin(), first.begin() + 18);
    second.insert(second.end(), {4, 9, 4});
    const PackedRows packed({first, second});
    RandomStream random(5);
    std::vector<double> upstream;
    for (std::int64_t i = 0; i < packed.rows().size() * config.hidden_size; ++i)
      upstream.push_back(random.normal());

    ThreadPool pool(2);
    Compute<double> compute(pool, kernels::detect_cpu_isa());
    HostMemory host(&compute);
    DecoderRunner<double> reference(config, compute);
    const Result expected = run(reference, host, model.exact.weights(), packed, upstream);
    on_every_device<T>([&](const TestDevice<T>& device) {
      INFO(name << ", " << device.name);
      const DeviceWeights<T> weights(*device.memory, model.rounded.weights());
      CHECK(weights.bytes() > 0);
      DecoderRunner<T> runner(config, DeviceOps<T>(*device.ops, *device.memory));
      const Result got = run(runner, *device.memory, weights.weights(), packed, upstream);
      // Float: some hundred roundings. Bfloat16: weights and states have 8 bits, so errors of 2^-9 at every
      // operation.
      const double tolerance = sizeof(T) == 2 ? 0.05 : 2e-5;
      CHECK(distance(got.hidden, expected.hidden) < tolerance);
      CHECK(distance(got.dx, expected.dx) < tolerance);
      std::size_t gradients = 0;
      for (std::size_t i = 0; i < model.rounded.entries().size(); ++i) {
        const auto& entry = model.rounded.entries()[i];
        const Wide<T>* gradient = weights.gradient_of(entry.gradient);
        if (!gradient) continue;  // inside another tensor (k and v), or untouched by this backward pass
        const auto count = static_cast<std::size_t>(entry.spec.num_elements());
        const double* exact_gradient = model.exact.entries()[i].gradient;
        const std::vector<double> values(exact_gradient, exact_gradient + count);
        if (norm_of(values) == 0) continue;
        ++gradients;
        INFO(entry.spec.name);
        CHECK(distance(download(*device.memory, gradient, count), values) < tolerance);
      }
      CHECK(gradients > static_cast<std::size_t>(5 * config.num_layers));
    });
  }
}

namespace {

// Hidden states behind the final norm, of rows that nothing is kept of.
template <class T>
std::vector<double> decode(const DeviceOps<T>& ops, DeviceMemory& memory, const DecoderWeights<T>& weights,
                           const PackedRows& packed) {
  const std::int64_t rows = packed.rows().size(), layers = weights.config.num_layers;
  const auto elements = static_cast<std::size_t>(rows * weights.config.hidden_size);
  DecoderRunner<T> runner(weights.config, ops);
  Buffer<T> x(elements, &memory), hidden(elements, &memory);
  KvStore<T> store(weights.config, layers, packed.num_blocks(), &memory);
  runner.embed(weights, packed.rows(), x.data());
  runner.forward_layers(weights, packed.rows(), 0, layers, store, 0, x.data(), nullptr);
  runner.final_norm(weights, rows, x.data(), hidden.data(), nullptr, nullptr);
  return download(memory, hidden.data(), elements);
}

const kernels::DeviceKernels<Bfloat16>* counted_kernels = nullptr;
std::int64_t few_rows_products = 0;

}  // namespace

TEST_CASE("a decoder that prefers products of few rows computes the same", "[device]") {
  for (const char* name : {"model_llama_gqa_untied", "model_qwen3", "model_gemma2", "model_gpt2"}) {
    GoldenModel model(name);
    const ModelConfig& config = model.config;
    const std::vector<TokenId> tokens = {5, 9, 4, 7, 11, 3, 8, 6, 12, 4, 9};
    const PackedRows packed({tokens});
    ThreadPool pool(2);
    Compute<double> compute(pool, kernels::detect_cpu_isa());
    HostMemory host(&compute);
    const auto expected = decode(DeviceOps<double>(compute), host, model.exact.weights(), packed);
    on_every_device<Bfloat16>([&](const TestDevice<Bfloat16>& device) {
      INFO(name << ", " << device.name);
      kernels::DeviceKernels<Bfloat16> table = *device.ops;
      table.prefers_few_rows = true;
      counted_kernels = device.ops;
      few_rows_products = 0;
      table.few_rows_linear = [](const kernels::FewRowsArgs<Bfloat16>& args, std::int64_t N, void* queue) {
        ++few_rows_products;
        counted_kernels->few_rows_linear(args, N, queue);
      };
      const DeviceWeights<Bfloat16> weights(*device.memory, model.rounded.weights());
      const auto got =
          decode(DeviceOps<Bfloat16>(table, *device.memory), *device.memory, weights.weights(), packed);
      CHECK(distance(got, expected) < 0.05);
      CHECK(few_rows_products == 4 * config.num_layers);  // q, k and v; out; gate and up; down
    });
  }
}
