#include <numeric>

#include "rlhf/schedule/policy.h"

namespace rlhf::schedule {

void SerialPolicy::run(Recorder& recorder) {
  while (recorder.num_finished() < recorder.num_samples()) recorder.generate();
  // Batch order, not the order of finishing, which depends on timing and batch composition.
  std::vector<SampleIndex> samples(recorder.num_samples());
  std::iota(samples.begin(), samples.end(), SampleIndex{0});
  recorder.score(samples);
  recorder.compute_advantages();
  for (std::size_t step = 0; step < recorder.num_optimizer_steps(); ++step) {
    const std::size_t num_micro_batches = recorder.num_micro_batches(step);
    for (std::size_t i = 0; i < num_micro_batches; ++i) recorder.train(step, i);
    recorder.optimize(step);
  }
  recorder.publish();
}

IterationTimes run_iteration(Policy& policy, IterationTasks& tasks, std::int64_t iteration,
                             const Clock& clock, const TraceSink& sink) {
  Recorder recorder(tasks, iteration, clock, sink);
  policy.run(recorder);
  return recorder.finish();
}

}  // namespace rlhf::schedule
