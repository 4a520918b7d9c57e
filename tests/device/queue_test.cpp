// An engine in a queue of its own beside another user of its arena: memory that changes hands is in order
// between the queues. On the emulator, where each queue's work runs as late as it may.
#include "tests/device/accelerators.h"
#include "tests/rollout/support.h"

using namespace rlhf;

namespace {

constexpr std::int64_t kBlocks = 24;

// An engine in one queue and an arena that another queue uses as well.
struct SharedArena {
  LateQueue train{std::make_shared<GuardedSpace>(std::size_t{1} << 28)};
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
