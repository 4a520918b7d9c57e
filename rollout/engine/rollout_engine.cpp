// Shape legend: T rows of a step, S of them sampled, D width, V vocabulary.
#include "rollout/engine/rollout_engine.h"

#include <algorithm>
#include <cmath>
#include <exception>
#include <span>
#include <utility>

#include "rlhf/core/error.h"
#include "rlhf/kernels/accelerator.h"
#include "rollout/engine/check_request.h"

namespace rlhf {
namespace {

using kernels::kBlockTokens;

// How long a step sleeps for a reply where every sample waits for one; it then looks at time limits.
constexpr double kReplyWait_s = 0.01;

SchedulerOptions scheduler_options(const RolloutEngineOptions& options, bool on_accelerator) {
  SchedulerOptions out;
  out.max_sequences = static_cast<std::int32_t>(options.max_sequences);
  out.max_tokens_per_step = step_tokens(options.max_tokens_per_step, on_accelerator);
  out.num_blocks = static_cast<std::int32_t>(options.num_blocks);
  out.block_tokens = static_cast<std::int32_t>(kBlockTokens);
  out.ageing_steps = options.ageing_steps;
  out.max_finished = options.max_finished;
  out.share_prefixes = options.decoding == Decoding::kPaged;
  out.keep_kv = options.decoding != Decoding::kUncached;
  return out;
}

std::unique_ptr<Arena> make_arena(std::int64_t num_blocks, std::size_t slab_bytes,
                                  const Accelerator* accelerator) {
  auto arena = std::make_unique<Arena>();
  arena->open(to_size(num_blocks) * slab_bytes, slab_bytes, accelerator ? accelerator->memory : nullptr);
  return arena;
}

}  // namespace

RolloutEngine::RolloutEngine(const ModelConfig& config, Compute<float> compute,
                             const RolloutEngineOptions& options,
                             std::function<std::string(TokenId)> token_bytes)
    : config_(config),
      options_(options),
      compute_(compute),
      own_arena_(options.arena ? nullptr
                               : make_arena(options.num_blocks, block_bytes(), compute.accelerator())),
      arena_(options.arena ? *options.arena : *own_arena_),
      program_(make_step_program(config, compute, arena_, options.trunk_layers, options.kv)),
      scheduler_(scheduler_options(options, compute.accelerator() != nullptr)),
      has_text_(static_cast<bool>(token_bytes)),
      setting_{std::move(token_bytes), config.vocab_size, std::make_shared<TurnMailbox>()} {
  RLHF_CHECK(arena_.layout().slab_bytes() == block_bytes(), "rollout: an arena with slabs of ",
             arena_.layout().slab_bytes(), " bytes, expected ", block_bytes());
  set_slabs(options.num_blocks);
}

RolloutEngine::~RolloutEngine() = default;

std::int64_t RolloutEngine::blocks_for(std::int64_t num_sequences, std::int64_t max_tokens) {
  return num_sequences * ((max_tokens + kBlockTokens - 1) / kBlockTokens + 1);
}

// ---- requests ----

RequestId RolloutEngine::submit(GenerationRequest spec) {
  check_request(spec, config_, has_text_);
  RLHF_CHECK(
      options_.decoding == Decoding::kPaged || (spec.deadline.steps == 0 && spec.deadline.seconds == 0),
      "generation request for prompt ", spec.prompt_id, ": a deadline needs Decoding::kPaged");
  const auto room = config_.max_positions - static_cast<std::int64_t>(spec.prompt.size());
  spec.stop.max_new_tokens = std::min(spec.stop.max_new_tokens, room);
  ScheduledRequest scheduled;
  if (options_.max_draft_rows > 0) lookahead_.add(spec.prompt, 0);
  scheduled.prompt = std::move(spec.prompt);
  scheduled.num_samples = spec.num_samples;
  scheduled.max_new_tokens = spec.stop.max_new_tokens;
  scheduled.priority = spec.priority;
  if (spec.deadline.steps > 0) scheduled.expires_step = scheduler_.step() + spec.deadline.steps;
  if (spec.deadline.seconds > 0) scheduled.expires_s = options_.clock() + spec.deadline.seconds;
  RequestId id = 0;
  try {
    id = scheduler_.submit(std::move(scheduled));
  } catch (const InvalidArgument& error) {
    fail<InvalidArgument>("generation request for prompt ", spec.prompt_id, ": ", error.what());
  }
  auto request = std::make_unique<SubmittedRequest>();
  request->unfinished = spec.num_samples;
  if (!spec.constraint.choices.empty()) request->choices.emplace(spec.constraint.choices);
  request->spec = std::move(spec);
  requests_.emplace(id, std::move(request));
  return id;
}

std::size_t RolloutEngine::cancel(RequestId id) {
  release_ended();
  const auto dropped = scheduler_.cancel(id);
  for (const DroppedSample& sample : dropped) hand_out(sample, FinishReason::kCancelled);
  return dropped.size();
}

void RolloutEngine::cancel_all() {
  ended_.clear();
  scheduler_.cancel_all();
  responses_.clear();
  requests_.clear();
}

// Drops a request without handing out its samples: an error has taken their place.
void RolloutEngine::drop(RequestId id) {
  for (const DroppedSample& sample : scheduler_.cancel(id)) responses_.erase(sample.sequence);
  requests_.erase(id);
}

void RolloutEngine::hand_out(const DroppedSample& dropped, FinishReason reason) {
  const auto response = responses_.find(dropped.sequence);
  finished_.push_back(response == responses_.end()
                          ? make_sample(*requests_.at(dropped.request), dropped.index)
                          : std::move(response->second->sample));
  finished_.back().finish_reason = reason;
  if (response != responses_.end()) responses_.erase(response);
  end_request_sample(dropped.request);
}

void RolloutEngine::end_request_sample(RequestId id) {
  const auto request = requests_.find(id);
  if (--request->second->unfinished == 0) requests_.erase(request);
}

Sample RolloutEngine::make_sample(const SubmittedRequest& request, std::uint32_t index) const {
  Sample sample;
  sample.prompt_id = request.spec.prompt_id;
  sample.tag = request.spec.tag;
  sample.sample_index = request.spec.first_sample_index + index;
  return sample;
}

Response& RolloutEngine::response_of(Sequence& sequence) {
  auto& response = responses_[sequence.id];
  if (!response) {
    const SubmittedRequest& request = *requests_.at(sequence.request);
    response = std::make_unique<Response>(request, setting_, sequence, make_sample(request, sequence.index),
                                          options_.clock());
  }
  return *response;
}

std::optional<Sample> RolloutEngine::try_take() {
  if (finished_.empty()) return std::nullopt;
  Sample sample = std::move(finished_.front());
  finished_.pop_front();
  return sample;
}

// ---- memory ----

void RolloutEngine::set_block_limit(std::int64_t limit) {
  RLHF_CHECK(limit >= 0 && limit <= cache().num_blocks(), "rollout: a block limit of ", limit,
             ", expected 0 to ", cache().num_blocks());
  const bool grows = limit > cache().limit();
  program_->copy_blocks(scheduler_.set_block_limit(static_cast<std::int32_t>(limit)));
  set_slabs(limit);
  if (own_arena_) own_arena_->discard_free();
  // Whoever gets the memory goes on once what is queued has left it.
  if (DeviceMemory* const queue = program_->queue())
    grows ? queue->wait_for(arena_) : arena_.wait_for(*queue);
}

void RolloutEngine::set_slabs(std::int64_t slabs) {
  if (arena_.try_set_slabs(slabs)) return;
  const ArenaLayout layout = arena_.layout();
  fail<MemoryError>("rollout: no room for ", slabs, " K/V blocks of ", layout.slab_bytes(),
                    " bytes: the arena has ", layout.capacity(), " bytes, and others lie up to byte ",
                    layout.top());
}

// ---- one step ----

bool RolloutEngine::step(const DecoderWeights<float>& weights, WeightVersion version) {
  if (paused_) return false;
  const double begin = options_.clock();
  const bool delivered = take_replies(version);
  const bool ended = end_overdue(begin);
  const bool computed = run_step(weights, version, begin);
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  if (computed || delivered || ended) return true;
  if (scheduler_.num_parked() == 0) return false;
  setting_.mailbox->wait(kReplyWait_s);
  return true;
}

// An error in a reply costs its own request only.
bool RolloutEngine::take_replies(WeightVersion version) {
  const auto deliveries = setting_.mailbox->take();
  for (const auto& [ticket, reply] : deliveries) {
    const auto found = responses_.find(ticket);
    if (found == responses_.end() || !found->second->awaits_reply()) continue;
    Response& response = *found->second;
    const RequestId request = response.sequence().request;
    try {
      const std::size_t before = response.sample.tokens.size();
      const Response::Status status = response.reply(reply, version);
      const auto added = std::span<const TokenId>(response.sample.tokens).subspan(before);
      scheduler_.resume(response.sequence(), added);
      const std::vector<TokenId>& tokens = response.sequence().tokens;
      if (options_.max_draft_rows > 0) lookahead_.add(tokens, tokens.size() - added.size());
      if (status == Response::Status::kEnded) end_response(response);
    } catch (const std::exception&) {
      if (!error_) error_ = std::current_exception();
      drop(request);
    }
  }
  return !deliveries.empty();
}

bool RolloutEngine::end_overdue(double now_s) {
  std::vector<SequenceId> overdue;
  for (const auto& [id, response] : responses_)
    if (response->overdue(now_s)) overdue.push_back(id);
  std::ranges::sort(overdue);
  for (SequenceId id : overdue) {
    Response& response = *responses_.at(id);
    response.sample.finish_reason = FinishReason::kDeadline;
    end_response(response);
  }
  return !overdue.empty();
}

// Hands a sample out that ends by itself.
void RolloutEngine::end_response(Response& response) {
  Sequence& sequence = response.sequence();
  // Without the last token, and a preempted one's are gone.
  if (sequence.holds_blocks() && sequence.uncomputed() == 1)
    response.sample.trunk = program_->kept_states(sequence.table, sequence.computed);
  finished_.push_back(std::move(response.sample));
  if (options_.decoding == Decoding::kPaged)
    release(sequence);
  else
    ended_.push_back(&sequence);
}

void RolloutEngine::release(Sequence& sequence) {
  const RequestId request = sequence.request;
  responses_.erase(sequence.id);
  scheduler_.finish(sequence);
  end_request_sample(request);
}

// ---- decoding that does not let go ----

bool RolloutEngine::has_ended(const Sequence& sequence) const {
  return std::ranges::find(ended_, &sequence) != ended_.end();
}

// Of a sample that has ended, as far as the context reaches.
void RolloutEngine::go_on(Sequence& sequence, TokenId token) {
  if (sequence.length() < config_.max_positions) scheduler_.append(sequence, {{token}});
}

void RolloutEngine::release_ended() {
  for (Sequence* sequence : std::exchange(ended_, {})) release(*sequence);
}

// Computes what the scheduler plans. @return false when there was nothing to compute
bool RolloutEngine::run_step(const DecoderWeights<float>& weights, WeightVersion version, double begin) {
  guesses_.clear();
  draft_rows_ = 0;
  DraftProposer proposer;
  if (options_.max_draft_rows > 0)
    proposer = [this](Sequence& sequence, std::int64_t most) {
      propose(sequence, most, scheduler_.num_running());
    };
  const StepPlan& plan = scheduler_.plan(begin, static_cast<std::int64_t>(finished_.size()), proposer);
  for (const DroppedSample& sample : plan.expired) hand_out(sample, FinishReason::kDeadline);
  if (plan.chunks.empty()) {
    if (scheduler_.stalled())
      fail<MemoryError>("rollout: nothing can run with ", cache().limit(),
                        " K/V blocks: the next sample needs ",
                        scheduler_.blocks_now(*scheduler_.first_in_rank()),
                        "; raise the limit with set_block_limit, or pause the engine");
    return !plan.expired.empty();
  }
  program_->copy_blocks(plan.copies);
  place_rows(plan);
  compute(weights);
  ++statistics_.steps;
  const auto drawn = static_cast<std::int64_t>(sampled_rows_.size());
  const std::int64_t taken = accept_rows(weights, version);
  if (static_cast<std::int64_t>(ended_.size()) == scheduler_.num_running()) release_ended();
  const double seconds = options_.clock() - begin;
  statistics_.decode_tokens += taken;
  statistics_.prefill_tokens += rows_.size() - drawn;
  statistics_.draft_tokens += draft_rows_;
  statistics_.seconds += seconds;
  if (rows_.size() == drawn) {
    statistics_.decode_only_seconds += seconds;
    statistics_.decode_only_tokens += taken;
  }
  return true;
}

// As many guesses as promise more than they cost, while there are rows.
void RolloutEngine::propose(Sequence& sequence, std::int64_t most, std::int64_t num_decoding) {
  most = std::min(most, options_.max_draft_rows - num_decoding - draft_rows_);
  if (most <= 0 || requests_.at(sequence.request)->choices) return;
  std::vector<Lookahead::Guess>& guesses = guesses_[sequence.id];
  lookahead_.guess(sequence.tokens, to_size(most), guesses);
  // A step brings num_decoding tokens; a row must bring its share of them.
  const double least = options_.draft_row_cost * static_cast<double>(num_decoding);
  double chance = 1;
  for (const Lookahead::Guess& guess : guesses) {
    chance *= guess.chance;
    if (chance < least) break;
    sequence.drafts.push_back(guess.token);
  }
  draft_rows_ += static_cast<std::int64_t>(sequence.drafts.size());
}

void RolloutEngine::place_rows(const StepPlan& plan) {
  rows_.tokens.clear();
  rows_.positions.clear();
  rows_.tables.clear();
  sampled_rows_.clear();
  draft_rows_ = 0;
  for (const StepPlan::Chunk& chunk : plan.chunks) {
    for (std::int64_t t = chunk.begin; t < chunk.end; ++t) {
      rows_.tokens.push_back(chunk.sequence->tokens[to_size(t)]);
      rows_.positions.push_back(static_cast<std::int32_t>(t));
      rows_.tables.push_back(chunk.sequence->table.data());
    }
    if (!chunk.samples()) continue;
    Response& response = response_of(*chunk.sequence);
    sampled_rows_.push_back({chunk.sequence, &response, rows_.size() - 1, 0});
    draft_rows_ += static_cast<std::int64_t>(chunk.sequence->drafts.size());
    for (std::size_t j = 0; j < chunk.sequence->drafts.size(); ++j) {
      rows_.tokens.push_back(chunk.sequence->drafts[j]);
      rows_.positions.push_back(static_cast<std::int32_t>(chunk.end + static_cast<std::int64_t>(j)));
      rows_.tables.push_back(chunk.sequence->table.data());
      sampled_rows_.push_back({chunk.sequence, &response, rows_.size() - 1, j + 1});
    }
  }
}

// Runs the rows and draws drawn_[S] for the sampled ones.
void RolloutEngine::compute(const DecoderWeights<float>& weights) {
  std::vector<StepProgram::Draw> draws;
  std::deque<std::vector<TokenId>> with_drafts;
  for (const SampledRow& sampled : sampled_rows_) {
    const Response& response = *sampled.response;
    const SubmittedRequest& request = response.request();
    std::span<const TokenId> tokens = sampled.sequence->tokens;
    if (sampled.num_drafts > 0) {
      std::vector<TokenId>& all = with_drafts.emplace_back(tokens.begin(), tokens.end());
      const auto& drafts = sampled.sequence->drafts;
      all.insert(all.end(), drafts.begin(), drafts.begin() + static_cast<std::ptrdiff_t>(sampled.num_drafts));
      tokens = all;
    }
    draws.push_back({sampled.row,
                     {request.spec, response.sample.sample_index, tokens,
                      tokens.subspan(to_size(sampled.sequence->prompt_tokens)),
                      request.choices ? &*request.choices : nullptr, response.node()}});
  }
  drawn_.resize(draws.size());
  program_->step(weights, rows_, draws, drawn_);
}

// Every row takes its token before the first error is thrown, so that a bad request costs no other one
// anything. Rows behind a wrong guess are passed over. @return tokens taken from the model
std::int64_t RolloutEngine::accept_rows(const DecoderWeights<float>& weights, WeightVersion version) {
  std::vector<RequestId> failed;
  std::int64_t taken = 0;
  bool right = true;  // all guesses before row i
  for (std::size_t i = 0; i < sampled_rows_.size(); ++i) {
    if (sampled_rows_[i].num_drafts == 0) right = true;
    if (!right) continue;
    right = false;
    if (has_ended(*sampled_rows_[i].sequence)) {
      go_on(*sampled_rows_[i].sequence, drawn_[i].token);
      continue;
    }
    const RequestId request = sampled_rows_[i].sequence->request;
    try {
      ++taken;
      right = accept_row(i, weights, version);
    } catch (const std::exception&) {
      failed.push_back(request);
      if (!error_) error_ = std::current_exception();
    }
  }
  for (RequestId request : failed) drop(request);
  return taken;
}

// @return whether the token is the guess that the next row rests on
bool RolloutEngine::accept_row(std::size_t index, const DecoderWeights<float>& weights,
                               WeightVersion version) {
  const auto& [sequence, response, row, num_drafts] = sampled_rows_[index];
  const DrawnToken& drawn = drawn_[index];
  if (!std::isfinite(drawn.log_prob)) fail_not_finite(sampled_rows_[index], weights, version);
  const std::size_t before = response->sample.tokens.size();
  const Response::Status status = response->accept(drawn, version);
  const auto& tokens = response->sample.tokens;
  const bool guessed = num_drafts < sequence->drafts.size();
  const bool right = guessed && tokens.size() == before + 1 && tokens.back() == sequence->drafts[num_drafts];
  if (guessed) lookahead_.judge(guesses_.at(sequence->id)[num_drafts], right);
  scheduler_.append(*sequence, std::span<const TokenId>(tokens).subspan(before));
  if (options_.max_draft_rows > 0)
    lookahead_.add(sequence->tokens, to_size(sequence->prompt_tokens) + before);
  if (status == Response::Status::kGoesOn && right) {
    ++statistics_.accepted_drafts;
    scheduler_.accept_draft(*sequence);
    return true;
  }
  if (status == Response::Status::kAwaitsReply) scheduler_.park(*sequence);
  if (status == Response::Status::kEnded) end_response(*response);
  return false;
}

// ---- errors and statistics ----

void RolloutEngine::fail_not_finite(const SampledRow& row, const DecoderWeights<float>& weights,
                                    WeightVersion version) {
  Rows rows;
  rows.tokens = {row.sequence->tokens.back()};
  rows.positions = {static_cast<std::int32_t>(row.sequence->length() - 1)};
  rows.tables = {row.sequence->table.data()};
  const std::string where = program_->first_not_finite(weights, rows);
  const Sample& sample = row.response->sample;
  fail<Error>("rollout: logits of prompt ", sample.prompt_id, ", sample ", sample.sample_index, ", token ",
              sample.tokens.size(), " are not finite, first in ", where, " (weights version ", version, ")");
}

GenerationStatistics RolloutEngine::statistics() const {
  GenerationStatistics out = statistics_;
  out.matmul_flops = program_->matmul_flops();
  const SchedulerStatistics& scheduled = scheduler_.statistics();
  out.cached_prefix_tokens = scheduled.cached_prefix_tokens;
  out.preemptions = scheduled.preemptions;
  out.recomputed_tokens = scheduled.recomputed_tokens;
  return out;
}

}  // namespace rlhf
