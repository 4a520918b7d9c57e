#include "rlhf/report/tensorboard_writer.h"

#include <bit>
#include <string_view>
#include <utility>

#include "rlhf/core/error.h"
#include "rlhf/report/crc32c.h"

namespace rlhf {
namespace {

// Protobuf field numbers of tensorflow.Event, tensorflow.Summary and Summary.Value.
constexpr int kEventWallTime = 1, kEventStep = 2, kEventFileVersion = 3, kEventSummary = 5;
constexpr int kSummaryValue = 1;
constexpr int kValueTag = 1, kValueSimpleValue = 2;

enum WireType { kVarint = 0, kFixed64 = 1, kBytes = 2, kFixed32 = 5 };

template <class T>
void append_little_endian(std::string& out, T value) {
  for (std::size_t i = 0; i < sizeof(T); ++i) out += static_cast<char>((value >> (8 * i)) & 0xff);
}

void append_varint(std::string& out, std::uint64_t value) {
  for (; value >= 0x80; value >>= 7) out += static_cast<char>(0x80 | (value & 0x7f));
  out += static_cast<char>(value);
}

void append_key(std::string& out, int field, WireType type) {
  append_varint(out, static_cast<std::uint64_t>(field) << 3 | static_cast<std::uint64_t>(type));
}

void append_bytes(std::string& out, int field, std::string_view bytes) {
  append_key(out, field, kBytes);
  append_varint(out, bytes.size());
  out += bytes;
}

std::string event_header(double wall_time) {
  std::string event;
  append_key(event, kEventWallTime, kFixed64);
  append_little_endian(event, std::bit_cast<std::uint64_t>(wall_time));
  return event;
}

std::string summary_value(const std::string& tag, double value) {
  std::string out;
  append_bytes(out, kValueTag, tag);
  append_key(out, kValueSimpleValue, kFixed32);
  append_little_endian(out, std::bit_cast<std::uint32_t>(static_cast<float>(value)));
  return out;
}

}  // namespace

TensorBoardWriter::TensorBoardWriter(const std::filesystem::path& folder, WallClock clock)
    : clock_(std::move(clock)) {
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) fail<IoError>(folder.string(), ": cannot create the folder: ", error.message());
  const double now = clock_();
  // A second writer within the same second gets a name of its own.
  for (int number = 0; path_.empty() || std::filesystem::exists(path_); ++number) {
    path_ = folder / concat("events.out.tfevents.", static_cast<std::int64_t>(now), ".rlhf.", number);
  }
  file_.open(path_, std::ios::binary);
  if (!file_) fail<IoError>(path_.string(), ": cannot be opened for writing");
  std::string event = event_header(now);
  append_bytes(event, kEventFileVersion, "brain.Event:2");
  write_record(event);
}

void TensorBoardWriter::write(const std::string& prefix, std::int64_t step, const Metrics& metrics) {
  std::string summary;
  for (const auto& [name, value] : metrics) {
    append_bytes(summary, kSummaryValue,
                 summary_value(prefix.empty() ? name : concat(prefix, '/', name), value));
  }
  std::string event = event_header(clock_());
  append_key(event, kEventStep, kVarint);
  append_varint(event, static_cast<std::uint64_t>(step));
  append_bytes(event, kEventSummary, summary);
  write_record(event);
}

void TensorBoardWriter::write_record(const std::string& event) {
  std::string length;
  append_little_endian(length, static_cast<std::uint64_t>(event.size()));
  std::string record = length;
  append_little_endian(record, masked_crc32c(length));
  record += event;
  append_little_endian(record, masked_crc32c(event));
  file_.write(record.data(), static_cast<std::streamsize>(record.size()));
  file_.flush();
  if (!file_) fail<IoError>(path_.string(), ": cannot write an event (disk full?)");
}

}  // namespace rlhf
