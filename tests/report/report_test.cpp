#include <cmath>
#include <cstring>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>

#include "rlhf/core/atomic_file.h"
#include "rlhf/core/error.h"
#include "rlhf/core/random.h"
#include "rlhf/report/crc32c.h"
#include "rlhf/report/interval.h"
#include "rlhf/report/metrics_writer.h"
#include "rlhf/report/progress.h"
#include "rlhf/report/run_report.h"
#include "rlhf/report/tensorboard_writer.h"
#include "rlhf/report/trace_writer.h"
#include "tests/catch.h"
#include "tests/data/temporary_folder.h"

namespace rlhf {
namespace {

TEST_CASE("CRC-32C known answers (RFC 3720, appendix B.4)") {
  CHECK(crc32c("") == 0);
  CHECK(crc32c("123456789") == 0xe3069283U);
  CHECK(crc32c(std::string(32, '\0')) == 0x8a9136aaU);
  CHECK(crc32c(std::string(32, '\xff')) == 0x62a8ab43U);
  std::string ascending;
  for (char c = 0; c < 32; ++c) ascending += c;
  CHECK(crc32c(ascending) == 0x46dd794eU);
  // Masking by hand: 0x00000000 rotates to itself.
  CHECK(masked_crc32c("") == 0xa282ead8U);
}

TEST_CASE("metrics: one flushed line a step, null for what JSON lacks") {
  TemporaryFolder folder;
  const auto path = folder.path() / "metrics.jsonl";
  auto writer = MetricsWriter::create(path);
  writer.write("ppo", 1, {{"reward/mean", 0.5}, {"kl", NAN}, {"loss", INFINITY}});
  CHECK(read_text_file(path, 1000) ==
        "{\"stage\":\"ppo\",\"step\":1,\"reward/mean\":0.5,\"kl\":null,\"loss\":null}\n");
  CHECK_THROWS_WITH(writer.write("ppo", 2, {{"a", 1}, {"a", 2}}), ContainsSubstring("a is given twice"));
  CHECK_THROWS_WITH(writer.write("ppo", 2, {{"step", 1}}), ContainsSubstring("step is given twice"));
  CHECK_THROWS_AS(MetricsWriter::create("/proc/none/metrics.jsonl"), IoError);
}

TEST_CASE("trace: Chrome trace events, readable also without the closing bracket") {
  TemporaryFolder folder;
  const auto path = folder.path() / "trace.json";
  std::string unfinished;
  {
    TraceWriter trace(path, 10.0);
    trace.span("train lane", "score", 10.5, 10.75, {{"samples", 4}});
    trace.span("generate lane", "generate", 10.0, 10.5);
    trace.span("train lane", "train", 10.75, 11.0);
    trace.counter("resident MiB", 11.0, 512);
    unfinished = read_text_file(path, 10000);
  }
  const auto events = nlohmann::json::parse(read_text_file(path, 10000));
  CHECK(nlohmann::json::parse(unfinished + "]") == events);
  // A track is named once, before its first span.
  std::vector<std::string> kinds;
  for (const auto& event : events) kinds.push_back(event["ph"].get<std::string>());
  CHECK(kinds == std::vector<std::string>{"M", "X", "M", "X", "X", "C"});
  CHECK(events[0]["args"]["name"] == "train lane");
  CHECK(events[1]["tid"] == events[0]["tid"]);
  CHECK(events[1]["ts"] == 500000.0);
  CHECK(events[1]["dur"] == 250000.0);
  CHECK(events[1]["args"]["samples"] == 4.0);
  CHECK(events[4]["tid"] == events[0]["tid"]);
  CHECK(events[3]["tid"] != events[0]["tid"]);
  CHECK(events[5]["args"]["value"] == 512.0);
  CHECK_THROWS_AS(TraceWriter("/proc/none/trace.json", 0.0), IoError);
}

TEST_CASE("metrics: a resumed file drops what will be done again, and torn lines") {
  TemporaryFolder folder;
  const auto path = folder.path() / "metrics.jsonl";
  {
    auto writer = MetricsWriter::create(path);
    writer.write("sft", 9, {{"loss", 1}});
    for (int step = 1; step <= 4; ++step) writer.write("ppo", step, {{"loss", 2}});
  }
  std::ofstream(path, std::ios::app) << "{\"stage\":\"pp";
  auto writer = MetricsWriter::resume(path, "ppo", 2);
  writer.write("ppo", 3, {});
  CHECK(read_text_file(path, 1000) ==
        "{\"stage\":\"sft\",\"step\":9,\"loss\":1.0}\n{\"stage\":\"ppo\",\"step\":1,\"loss\":2.0}\n"
        "{\"stage\":\"ppo\",\"step\":2,\"loss\":2.0}\n{\"stage\":\"ppo\",\"step\":3}\n");
  MetricsWriter::resume(folder.path() / "new.jsonl", "ppo", 2).write("ppo", 3, {});
  CHECK(read_text_file(folder.path() / "new.jsonl", 100) == "{\"stage\":\"ppo\",\"step\":3}\n");
}

template <class T>
T little_endian(const std::string& bytes, std::size_t offset) {
  T value = 0;
  for (std::size_t i = 0; i < sizeof(T); ++i) {
    value |= static_cast<T>(static_cast<unsigned char>(bytes.at(offset + i))) << (8 * i);
  }
  return value;
}

TEST_CASE("TensorBoard: framing and protobuf bytes by hand") {
  TemporaryFolder folder;
  double now = 1000.5;
  TensorBoardWriter writer(folder.path() / "tb", [&] { return now; });
  writer.write("ppo", 300, {{"kl", 0.25}});
  const std::string file = read_text_file(writer.path(), 10000);
  std::vector<std::string> events;
  for (std::size_t offset = 0; offset < file.size();) {
    const auto length = little_endian<std::uint64_t>(file, offset);
    REQUIRE(offset + 16 + length <= file.size());
    CHECK(little_endian<std::uint32_t>(file, offset + 8) == masked_crc32c(file.substr(offset, 8)));
    events.push_back(file.substr(offset + 12, length));
    CHECK(little_endian<std::uint32_t>(file, offset + 12 + length) == masked_crc32c(events.back()));
    offset += 16 + length;
  }
  REQUIRE(events.size() == 2);
  // double 1000.5 = 0x408f440000000000
  const std::string time("\x09\0\0\0\0\0\x44\x8f\x40", 9);
  CHECK(events[0] == time + "\x1a\x0d" + "brain.Event:2");
  // step 300 = ac 02; summary of 15 bytes: value of 13 bytes: tag "ppo/kl", float 0.25 = 0x3e800000
  CHECK(events[1] ==
        time + "\x10\xac\x02\x2a\x0f\x0a\x0d\x0a\x06" + "ppo/kl" + std::string("\x15\0\0\x80\x3e", 5));
  TensorBoardWriter second(folder.path() / "tb", [&] { return now; });
  CHECK(second.path() != writer.path());
}

TEST_CASE("Wilson interval against published values") {
  // Newcombe (1998), table I: 81/263 -> 0.2553, 0.3662; 15/148 -> 0.0624, 0.1605; 0/20 -> 0, 0.1611; 1/29 ->
  // 0.0061, 0.1718
  CHECK(wilson_interval(81, 263).low == Approx(0.2553).margin(5e-5));
  CHECK(wilson_interval(81, 263).high == Approx(0.3662).margin(5e-5));
  CHECK(wilson_interval(15, 148).low == Approx(0.0624).margin(5e-5));
  CHECK(wilson_interval(15, 148).high == Approx(0.1605).margin(5e-5));
  CHECK(wilson_interval(0, 20).low == Approx(0).margin(1e-12));
  CHECK(wilson_interval(0, 20).high == Approx(0.1611).margin(5e-5));
  CHECK(wilson_interval(1, 29).low == Approx(0.0061).margin(5e-5));
  CHECK(wilson_interval(1, 29).high == Approx(0.1718).margin(5e-5));
  CHECK(wilson_interval(0, 0).high == 1);
  CHECK_THROWS_AS(wilson_interval(2, 1), InvalidArgument);
}

TEST_CASE("bootstrap intervals agree with the normal approximation, and pairing helps") {
  RandomStream random(5);
  std::vector<double> before, after;
  for (int i = 0; i < 400; ++i) {
    before.push_back(random.normal());
    after.push_back(before.back() + 0.1 + 0.05 * random.normal());
  }
  const Interval interval = bootstrap_mean_interval(before, 1);
  // Half width 1.96 / sqrt(400) = 0.098; the bootstrap with 2000 resamples is within a tenth of it.
  CHECK((interval.high - interval.low) / 2 == Approx(0.098).epsilon(0.1));
  CHECK(bootstrap_mean_interval(before, 1).low == interval.low);
  const Interval difference = paired_difference_interval(before, after, 1);
  CHECK(difference.low > 0.08);
  CHECK(difference.high < 0.12);
  const std::vector<double> one = {0.5};
  CHECK(bootstrap_mean_interval(one, 1).high == 0.5);
  CHECK_THROWS_AS(bootstrap_mean_interval({}, 1), InvalidArgument);
  CHECK_THROWS_AS(bootstrap_mean_interval(std::vector<double>{NAN}, 1), InvalidArgument);
  CHECK_THROWS_WITH(paired_difference_interval(one, before, 1), ContainsSubstring("1 and 400 values"));
}

TEST_CASE("progress in a terminal rewrites one line") {
  double now = 0;
  std::string shown;
  {
    Progress progress(
        {Progress::Style::kTerminal, 0.1, 5, 60}, [&] { return now; },
        [&](std::string_view text) { shown += text; });
    progress.begin_stage("ppo", 10);
    now = 1;
    progress.update({1, {}, {}, {}, {}});
    shown.clear();
    now = 2;
    progress.update({2, 1234.4, {}, 0.5, 0.01});
    CHECK(shown == "\r\x1b[Kppo 2/10  ETA 8.0s  1234 tok/s  reward 0.500  KL 0.0100");
    now = 2.05;
    shown.clear();
    progress.update({3, {}, {}, {}, {}});
    CHECK(shown.empty());  // too soon
    progress.message("careful");
    CHECK(shown == "\r\x1b[Kcareful\nppo 2/10  ETA 8.0s  1234 tok/s  reward 0.500  KL 0.0100");
    shown.clear();
    progress.update({10, {}, 1.0, {}, {}});
    CHECK(shown == "\r\x1b[Kppo 10/10  loss 1.0000");
    shown.clear();
    now = 65;
    progress.end_stage();
    CHECK(shown == "\nppo done in 1m 05s\n");
    shown.clear();
    progress.begin_stage("eval", 10);  // resumed: begins with iteration 9
    now = 66;
    progress.update({9, {}, {}, {}, {}});
    CHECK(shown == "\r\x1b[Keval 9/10  ETA 1.0s");
    shown.clear();
  }
  CHECK(shown == "\n");
}

TEST_CASE("progress elsewhere prints plain lines, not too many") {
  double now = 0;
  std::vector<std::string> lines;
  Progress progress(
      {}, [&] { return now; }, [&](std::string_view text) { lines.emplace_back(text); });
  progress.begin_stage("sft", 100);
  for (int i = 1; i <= 100; ++i) {
    now += 0.2;
    progress.update({i, {}, 2.0, {}, {}});
  }
  REQUIRE(lines.size() == 5);
  CHECK(lines[0] == "sft 1/100  ETA 19.8s  loss 2.0000\n");
  CHECK(lines.back() == "sft 100/100  loss 2.0000\n");
  CHECK(format_duration(7500) == "2h 05m");
  CHECK(format_duration(NAN) == "?");
}

RunReport example_report() {
  RunReport report;
  report.name = "desk";
  report.version = "0.1.0";
  report.seed = 7;
  report.metrics = {{"greedy", 1.0}, {"broken", NAN}};
  TaskReport task;
  task.task = "view";
  task.stages = {{"sft", 0.6, {0.5, 0.7}, 200, 0.55, 0.9, 3.5, 0.1, {}},
                 {"ppo", 0.8, {0.75, 0.85}, 200, {}, {}, {}, 0.4, 0.02}};
  task.baselines = {{"majority", 0.33}};
  task.comparisons = {{"sft", "ppo", 0.2, {0.1, 0.3}}};
  report.tasks = {task};
  report.timings = {{"sft", "train", 12.5}, {"ppo", "generate", 70}};
  report.peak_memory_bytes = 3 << 20;
  report.memory_bytes = {{"weights", 1 << 20}};
  report.warnings = {"something odd"};
  report.transcripts = {{"view", "a | b\nc", "bullish", {{"sft", "bear|ish\xff", 0}, {"ppo", "bullish", 1}}}};
  return report;
}

TEST_CASE("summary.json holds what scripts read") {
  const auto summary = nlohmann::json::parse(to_summary_json(example_report()));
  CHECK(summary["seed"] == 7);
  CHECK(summary["metrics"]["greedy"] == 1.0);
  CHECK(summary["metrics"]["broken"].is_null());
  const auto& sft = summary["tasks"]["view"]["stages"]["sft"];
  CHECK(sft["score"] == 0.6);
  CHECK(sft["low"] == 0.5);
  CHECK(sft["count"] == 200);
  CHECK(sft["well_formed"] == 0.9);
  CHECK_FALSE(sft.contains("kl"));
  CHECK(summary["tasks"]["view"]["baselines"]["majority"] == 0.33);
  CHECK(summary["tasks"]["view"]["comparisons"][0]["low"] == 0.1);
  CHECK(summary["timings_s"]["ppo"]["generate"] == 70.0);
  CHECK(summary["peak_memory_bytes"] == 3 << 20);
  CHECK(summary["memory_bytes"]["weights"] == 1 << 20);
  CHECK(summary["warnings"][0] == "something odd");
}

TEST_CASE("report.md shows stages side by side") {
  const std::string text = to_report_markdown(example_report());
  CHECK_THAT(text,
             ContainsSubstring("| sft | 0.600 | 0.500 to 0.700 | 200 | 0.550 | 0.900 | 3.5 | 0.100 | - |"));
  CHECK_THAT(text, ContainsSubstring("ppo against sft: 0.200 (0.100 to 0.300), better beyond the interval."));
  CHECK_THAT(text, ContainsSubstring("always the majority answer | 0.330"));
  CHECK_THAT(text, ContainsSubstring("a \\| b c"));
  CHECK_THAT(text, ContainsSubstring("> Warning: something odd"));
  CHECK_THAT(text, ContainsSubstring("Together 1m 23s"));
  CHECK_THAT(text, ContainsSubstring("| broken | n/a |"));
}

TEST_CASE("both files are written; the proxy alarm needs both halves") {
  TemporaryFolder folder;
  write_run_report(folder.path() / "run", example_report());
  CHECK(std::filesystem::exists(folder.path() / "run" / "summary.json"));
  CHECK(std::filesystem::exists(folder.path() / "run" / "report.md"));
  StageScore before, after;
  before.interval = {0.5, 0.6};
  after.interval = {0.3, 0.4};
  CHECK_FALSE(proxy_diverges(before, after));
  before.reward_model = 1;
  after.reward_model = 2;
  CHECK(proxy_diverges(before, after));
  after.interval = {0.3, 0.55};
  CHECK_FALSE(proxy_diverges(before, after));
}

}  // namespace
}  // namespace rlhf
