// Work in several queues of one device, where each queue's runs as late, or as early, as it may: what changes
// hands between them is in order.
#include "rlhf/model/layer_stream.h"
#include "rlhf/train/moment_stream.h"
#include "tests/device/accelerators.h"
#include "tests/rollout/support.h"

using namespace rlhf;

namespace {

constexpr std::int64_t kBlocks = 24;

// An engine in one queue and an arena that another queue uses as well.
struct SharedArena {
  LooseQueue train{std::make_shared<GuardedSpace>(std::size_t{1} << 28)};
  std::unique_ptr<DeviceMemory> generate = train.new_queue(true);
  Accelerator device = emulated_accelerator(*generate);
  LanguageModel model = make_model();
  ThreadPool pool{1};
  Arena arena;
  std::unique_ptr<RolloutEngine> engine;

  SharedArena() {
    const Compute<float> compute(pool, kernels::detect_cpu_isa(), &device);
    model.parameters().place_on(device);
    const std::size_t slab = RolloutEngine::slab_bytes(model.config(), compute, 0);
    arena.open(static_cast<std::size_t>(kBlocks) * slab + ArenaLayout::kAlignment, slab, &train);
    RolloutEngineOptions options;
    options.max_sequences = 6;
    options.max_tokens_per_step = 40;
    options.num_blocks = kBlocks;
    options.arena = &arena;
    engine = std::make_unique<RolloutEngine>(
        model.config(), compute, options, [this](TokenId id) { return model.tokenizer().token_bytes(id); });
  }

  // Queues a write of all that the cache has not.
  void* write_free_memory() {
    const ArenaLayout layout = arena.layout();
    const std::size_t bytes =
        (layout.boundary() - layout.top()) / ArenaLayout::kAlignment * ArenaLayout::kAlignment;
    void* const place = arena.allocate(bytes);
    const std::vector<char> garbage(bytes, 0x3f);
    arena.upload(place, garbage.data(), bytes);
    return place;
  }
};

std::vector<GenerationRequest> requests() {
  std::vector<GenerationRequest> out;
  for (PromptId i = 0; i < 8; ++i) out.push_back(make_request(i, 9 + 7 * i, 6 + 5 * (i % 4)));
  for (GenerationRequest& request : out) request.num_samples = 2;
  return out;
}

}  // namespace

TEST_CASE("blocks that an engine gives to another queue's work, and takes back, are not written by both",
          "[device]") {
  if (!wants_device("emulated")) return;
  std::map<Key, Sample> expected;
  {
    SharedArena undisturbed;
    expected = run(*undisturbed.engine, undisturbed.model, requests());
  }
  for (const bool late_writer : {false, true}) {
    INFO((late_writer ? "the other's write runs late" : "the other's write runs at once"));
    SharedArena shared;
    RandomStream random(8);
    std::map<Key, Sample> samples;
    for (const GenerationRequest& request : requests()) shared.engine->submit(request);
    for (int steps = 0; shared.engine->busy(); ++steps) {
      REQUIRE(steps < 2000);
      if (steps % 3 == 2) {
        // Enough for the longest, so that somebody goes on.
        shared.engine->set_block_limit(6 + static_cast<std::int64_t>(random.below(8)));
        void* const place = shared.write_free_memory();
        if (!late_writer) shared.train.synchronize();
        shared.arena.release(place);
        shared.engine->set_block_limit(kBlocks);
      }
      shared.engine->step(shared.model.parameters().weights(), 0);
      shared.train.synchronize();
      while (auto sample = shared.engine->try_take())
        samples.emplace(Key{sample->prompt_id, sample->sample_index}, std::move(*sample));
    }
    REQUIRE(samples.size() == expected.size());
    for (const auto& [key, sample] : samples) CHECK(sample.tokens == expected.at(key).tokens);
  }
}

TEST_CASE("moments that stay on the host are updated as on the device", "[device]") {
  if (!wants_device("emulated")) return;
  const auto& kernels = emulated_kernels<float>();
  for (const auto further : {FurtherQueues::kLate, FurtherQueues::kEarly})
    for (const std::size_t piece : {std::size_t{64}, std::size_t{100}, std::size_t{300}, std::size_t{1000}}) {
      INFO("pieces of " << piece << ", queues " << static_cast<int>(further));
      LooseQueue memory(std::make_shared<GuardedSpace>(std::size_t{1} << 20), further);
      std::vector<float> first(300), second(300);
      for (std::size_t i = 0; i < first.size(); ++i) {
        first[i] = static_cast<float>(i);
        second[i] = static_cast<float>(i % 7);
      }
      std::vector<float> expected_first = first, expected_second = second;
      MomentStream stream(memory, first, second, piece);
      for (int step = 0; step < 4; ++step) {
        std::size_t seen = 0;
        if (step == 1) stream.fetch();  // ahead
        stream.pass([&](std::size_t begin, std::size_t count, float* m, float* v) {
          CHECK(begin == seen);
          seen += count;
          kernels.scale(m, 0.5, static_cast<std::int64_t>(count), memory.queue());
          kernels.add(v, m, static_cast<std::int64_t>(count), memory.queue());
        });
        CHECK(seen == first.size());
        for (std::size_t i = 0; i < first.size(); ++i) expected_second[i] += expected_first[i] *= 0.5F;
        if (step == 0) continue;  // the next step follows at once
        stream.wait();
        CHECK(first == expected_first);
        CHECK(second == expected_second);
        first[5] = expected_first[5] = 3;  // the host may write now
      }
    }
}

TEST_CASE("layers that stay on the host are there when they are used", "[device]") {
  if (!wants_device("emulated")) return;
  constexpr std::size_t kSize = 24;
  RandomStream random(5);
  for (const auto further : {FurtherQueues::kLate, FurtherQueues::kEarly}) {
    INFO("queues " << static_cast<int>(further));
    LooseQueue memory(std::make_shared<GuardedSpace>(std::size_t{1} << 20), further);
    std::vector<float> flat(10 + 5 * kSize + 3);
    for (float& value : flat) value = static_cast<float>(random.below(200));  // exact in bfloat16
    std::vector<ElementRange> layers(6);                                      // layer 0 is elsewhere
    for (std::size_t l = 1; l < 6; ++l) layers[l] = {10 + (l - 1) * kSize, 10 + l * kSize};
    LayerStream stream(memory, layers);
    CHECK(stream.num_elements() == 5 * kSize);
    std::vector<std::int64_t> used;
    for (int round = 0; round < 3; ++round) {
      stream.set(flat);
      used.clear();
      for (std::int64_t l = 0; l < 6; ++l) used.push_back(l);
      for (std::int64_t l = 3; l < 6; ++l) used.push_back(l);
      for (int i = 0; i < 20; ++i) used.push_back(static_cast<std::int64_t>(random.below(6)));
      Buffer<Bfloat16> seen(used.size() * kSize, &memory);
      for (std::size_t i = 0; i < used.size(); ++i) {
        stream.use(used[i]);
        const ElementRange& range = layers[static_cast<std::size_t>(used[i])];
        if (range.size() == 0) continue;
        memory.copy(seen.data() + i * kSize, stream.address_of(range.begin), kSize * sizeof(Bfloat16));
      }
      std::vector<Bfloat16> got(seen.size());
      memory.download(got.data(), seen.data(), seen.bytes());
      for (std::size_t i = 0; i < used.size(); ++i) {
        const ElementRange& range = layers[static_cast<std::size_t>(used[i])];
        for (std::size_t j = 0; j < range.size(); ++j)
          REQUIRE(to_float(got[i * kSize + j]) == flat[range.begin + j]);
      }
      for (float& value : flat) value = static_cast<float>(random.below(200));
    }
  }
}
