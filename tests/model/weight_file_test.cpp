#include "rlhf/model/weight_file.h"

#include <sys/resource.h>

#include <cmath>
#include <csignal>
#include <cstring>
#include <thread>

#include "rlhf/core/error.h"
#include "rlhf/core/random.h"
#include "rlhf/model/gguf.h"
#include "rlhf/model/safetensors.h"
#include "tests/catch.h"
#include "tests/model/golden.h"

using namespace rlhf;
using model_test::golden;
using model_test::message_of;
using model_test::ScratchFolder;
using model_test::write_bytes;

namespace {

std::vector<float> read_all(const WeightFile& weights, std::string_view name) {
  const TensorInfo* info = weights.find(name);
  REQUIRE(info != nullptr);
  std::vector<float> values(static_cast<std::size_t>(info->num_elements()));
  weights.read(name, values);
  return values;
}

template <typename T>
std::string raw(T value) {
  std::string out(sizeof(T), '\0');
  std::memcpy(out.data(), &value, sizeof(T));
  return out;
}

std::string safetensors(const std::string& header, const std::string& data) {
  return raw<std::uint64_t>(header.size()) + header + data;
}

std::string gguf_string(std::string_view text) {
  return raw<std::uint64_t>(text.size()) + std::string(text);
}

std::string open_error(const ScratchFolder& folder, const std::string& bytes) {
  const auto path = folder / "file.bin";
  write_bytes(path, bytes);
  return message_of<IoError>([&] { WeightFile::open(path); });
}

}  // namespace

TEST_CASE("half and bfloat16 conversions are exact both ways") {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    const float value = half_to_float(half);
    if (std::isnan(value)) {
      REQUIRE(std::isnan(half_to_float(float_to_half(value))));
      REQUIRE(std::isnan(bfloat16_to_float(float_to_bfloat16(value))));
      continue;
    }
    REQUIRE(float_to_half(value) == half);
    const float wide = bfloat16_to_float(half);
    if (!std::isnan(wide)) REQUIRE(float_to_bfloat16(wide) == half);
  }
  // Known values: sign, exponent and fraction of each range; ties go to even.
  REQUIRE(half_to_float(0x3c00) == 1.0f);
  REQUIRE(half_to_float(0x0001) == 0x1p-24f);
  REQUIRE(half_to_float(0xfbff) == -65504.0f);
  REQUIRE(float_to_half(65519.0f) == 0x7bff);
  REQUIRE(float_to_half(65520.0f) == 0x7c00);
  REQUIRE(float_to_half(1.0f + 0x1p-11f) == 0x3c00);
  REQUIRE(float_to_half(1.0f + 3 * 0x1p-11f) == 0x3c02);
  REQUIRE(float_to_half(0x1p-25f) == 0x0000);
  REQUIRE(float_to_half(-1.5f * 0x1p-24f) == 0x8002);
  REQUIRE(float_to_bfloat16(1.0f + 0x1p-8f) == 0x3f80);
  REQUIRE(float_to_bfloat16(1.0f + 3 * 0x1p-8f) == 0x3f82);
}

TEST_CASE("GGUF rows equal the golden dequantised rows") {
  const auto expected = read_json_file(golden("gguf_llama/expected.json"));
  std::size_t rows = 0;
  for (const auto& [file, content] : expected["files"].items()) {
    const auto gguf = GgufFile::open(golden("gguf_llama") / file);
    for (const auto& [name, row] : content["dequantised"].items()) {
      INFO(file << " " << name);
      const GgufTensor* tensor = gguf->find_tensor(name);
      REQUIRE(tensor != nullptr);
      REQUIRE(tensor_type_name(tensor->type) == row["ggml_type"].get<std::string>());
      const auto columns = static_cast<std::size_t>(tensor->shape[1]);
      const std::size_t row_bytes = tensor->data.size() / static_cast<std::size_t>(tensor->shape[0]);
      std::vector<float> values(columns);
      dequantise(tensor->type, tensor->data.data() + row["row"].get<std::size_t>() * row_bytes, columns,
                 values.data());
      REQUIRE(values == row["values"].get<std::vector<float>>());
      ++rows;
    }
  }
  REQUIRE(rows == 15);
}

TEST_CASE("block formats that no golden file has equal numbers of the gguf package") {
  // {type: {bytes: [...], values: [...]}}, two random blocks each.
  const auto expected = read_json_file(golden("gguf_blocks.json"));
  for (const TensorType type :
       {TensorType::kQ5_0, TensorType::kQ5_1, TensorType::kQ4_K, TensorType::kQ5_K, TensorType::kQ6_K,
        TensorType::kQ4_0, TensorType::kQ4_1, TensorType::kQ8_0, TensorType::kBf16}) {
    INFO(tensor_type_name(type));
    const auto& block = expected["blocks"][std::string(tensor_type_name(type))];
    const auto bytes = block["bytes"].get<std::vector<std::uint8_t>>();
    const auto values = block["values"].get<std::vector<float>>();
    std::vector<float> decoded(values.size());
    dequantise(type, reinterpret_cast<const std::byte*>(bytes.data()), values.size(), decoded.data());
    REQUIRE(decoded == values);
    std::vector<double> wide(values.size());
    dequantise(type, reinterpret_cast<const std::byte*>(bytes.data()), values.size(), wide.data());
    REQUIRE(std::equal(values.begin(), values.end(), wide.begin()));
  }
}

TEST_CASE("an unquantised GGUF holds the tensors of its checkpoint under the same names") {
  const auto original = WeightFile::open(golden("model_llama_gqa_untied"));
  const auto gguf = WeightFile::open(golden("gguf_llama/llama_F32.gguf"));
  const auto config = load_model_config(golden("gguf_llama/llama_F32.gguf"));
  for (const auto& spec : expected_tensors(config)) {
    INFO(spec.name);
    REQUIRE(gguf->find(spec.name)->shape == spec.shape);
    REQUIRE(read_all(*gguf, spec.name) == read_all(*original, spec.name));
  }
  REQUIRE(config.num_kv_heads == 2);
  REQUIRE_FALSE(config.tied_embeddings);
}

TEST_CASE("shards, bfloat16 and missing prefixes are read") {
  const auto sharded = WeightFile::open(golden("model_llama_sharded"));
  REQUIRE(read_all(*sharded, "lm_head.weight").size() == 96 * 32);
  const auto narrow = WeightFile::open(golden("model_llama_bf16"));
  REQUIRE(narrow->find("model.norm.weight")->type == TensorType::kBf16);
  for (const float value : read_all(*narrow, "model.embed_tokens.weight")) {
    REQUIRE(bfloat16_to_float(float_to_bfloat16(value)) == value);
  }
  const ScratchFolder folder;
  const std::vector<float> values{1, 2};
  save_safetensors(folder / "bare.safetensors",
                   std::vector<OutputTensor>{{"norm.weight", {2}, std::span<const float>(values)}});
  const auto bare = WeightFile::open(folder / "bare.safetensors");
  REQUIRE(read_all(*bare, "model.norm.weight") == values);
}

TEST_CASE("written tensors come back, doubles exactly") {
  const ScratchFolder folder;
  const std::vector<double> doubles{1.0 / 3, -2e-300, 0, 1e300};
  const std::vector<float> floats{0.1f, -2.5f, 3e38f};
  const auto path = folder / "model.safetensors";
  save_safetensors(path, std::vector<OutputTensor>{
                             {"d", {2, 2}, std::span<const double>(doubles), TensorType::kF64},
                             {"f", {3}, std::span<const float>(floats)},
                             {"b", {3, 1}, std::span<const float>(floats), TensorType::kBf16},
                             {"h", {3}, std::span<const float>(floats), TensorType::kF16},
                             {"empty", {0, 4}, std::span<const float>()},
                         });
  const auto weights = WeightFile::open(folder.path());
  std::vector<double> read(4);
  weights->read("d", read);
  REQUIRE(read == doubles);
  REQUIRE(read_all(*weights, "f") == floats);
  REQUIRE(read_all(*weights, "b")[1] == -2.5f);
  REQUIRE(std::isinf(read_all(*weights, "h")[2]));
  REQUIRE(weights->find("empty")->num_elements() == 0);
  std::vector<double> widened(3);
  weights->read("f", widened);
  REQUIRE(widened[0] == static_cast<double>(0.1f));
  // No temporary file is left behind.
  REQUIRE(std::distance(std::filesystem::directory_iterator(folder.path()), {}) == 1);
}

TEST_CASE("a failed save leaves the earlier file and names the reason") {
  const ScratchFolder folder;
  const auto path = folder / "model.safetensors";
  write_bytes(path, "earlier");
  const std::vector<float> values{1, 2};
  const std::vector<OutputTensor> wrong{{"w", {3}, std::span<const float>(values)}};
  REQUIRE_THAT(message_of<InvalidArgument>([&] { save_safetensors(path, wrong); }),
               ContainsSubstring("the shape has 3 elements, the data 2"));
  const std::vector<OutputTensor> twice{{"w", {2}, std::span<const float>(values)},
                                        {"w", {2}, std::span<const float>(values)}};
  REQUIRE_THAT(message_of<InvalidArgument>([&] { save_safetensors(path, twice); }),
               ContainsSubstring("occurs twice"));
  REQUIRE(read_text_file(path) == "earlier");
  const std::vector<OutputTensor> good{{"w", {2}, std::span<const float>(values)}};
  REQUIRE_THAT(message_of<IoError>([&] { save_safetensors(folder / "none/model.safetensors", good); }),
               ContainsSubstring("cannot create"));
  REQUIRE(std::distance(std::filesystem::directory_iterator(folder.path()), {}) == 1);
}

TEST_CASE("a disk that is full in the middle of a save leaves the earlier file") {
  const ScratchFolder folder;
  const auto path = folder / "model.safetensors";
  write_bytes(path, "earlier");
  const std::vector<float> values(1 << 18);
  const std::vector<OutputTensor> tensors{{"w", {1 << 18}, std::span<const float>(values)}};
  // A file size limit makes write() fail in the same way at a known place.
  rlimit before{};
  getrlimit(RLIMIT_FSIZE, &before);
  const auto old_handler = std::signal(SIGXFSZ, SIG_IGN);
  const rlimit small{1 << 16, before.rlim_max};
  setrlimit(RLIMIT_FSIZE, &small);
  const std::string message = message_of<IoError>([&] { save_safetensors(path, tensors); });
  setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, old_handler);
  REQUIRE_THAT(message, ContainsSubstring("cannot write at offset 65536"));
  REQUIRE(read_text_file(path) == "earlier");
  REQUIRE(std::distance(std::filesystem::directory_iterator(folder.path()), {}) == 1);
}

TEST_CASE("reading several tensors from several threads gives the same numbers") {
  const auto weights = WeightFile::open(golden("gguf_llama/llama_Q4_1.gguf"));
  const auto expected = read_all(*weights, "model.embed_tokens.weight");
  std::vector<std::vector<float>> results(4, std::vector<float>(expected.size()));
  std::vector<std::thread> threads;
  for (auto& result : results) {
    threads.emplace_back([&weights, &result] {
      for (int i = 0; i < 50; ++i) weights->read("model.embed_tokens.weight", result);
    });
  }
  for (auto& thread : threads) thread.join();
  for (const auto& result : results) REQUIRE(result == expected);
}

TEST_CASE("wrong uses of a weight file are named") {
  const auto weights = WeightFile::open(golden("model_gpt2"));
  std::vector<float> buffer(3);
  REQUIRE_THAT(message_of<InvalidArgument>([&] { weights->read("transformer.ln_f.weight", buffer); }),
               ContainsSubstring("has 32 elements, the buffer 3"));
  REQUIRE_THAT(message_of<IoError>([&] { weights->read("nothing", buffer); }),
               ContainsSubstring("has no tensor nothing"));
  REQUIRE_THAT(message_of<IoError>([] { WeightFile::open("/no/such/file"); }),
               ContainsSubstring("no such file"));
  const ScratchFolder folder;
  REQUIRE_THAT(message_of<IoError>([&] { WeightFile::open(folder.path()); }),
               ContainsSubstring("expected model.safetensors"));
}

TEST_CASE("hostile safetensors headers are errors with a place") {
  const ScratchFolder folder;
  const auto error = [&](const std::string& bytes) { return open_error(folder, bytes); };
  REQUIRE_THAT(error(""), ContainsSubstring("offset 0"));
  REQUIRE_THAT(error(raw<std::uint64_t>(UINT64_MAX)),
               ContainsSubstring("header length 18446744073709551615"));
  REQUIRE_THAT(error(safetensors("[]", "")), ContainsSubstring("JSON object"));
  const auto entry = [](const std::string& fields) { return "{\"w\":{" + fields + "}}"; };
  REQUIRE_THAT(error(safetensors(entry(R"("dtype":"F32","shape":[2],"data_offsets":[0,8])"), "1234")),
               ContainsSubstring("truncated"));
  REQUIRE_THAT(error(safetensors(entry(R"("dtype":"F32","shape":[1],"data_offsets":[0,8])"), "12345678")),
               ContainsSubstring("a range of 4 bytes"));
  REQUIRE_THAT(error(safetensors(entry(R"("dtype":"F32","shape":[1],"data_offsets":[4,8])"), "12345678")),
               ContainsSubstring("gap"));
  REQUIRE_THAT(error(safetensors(entry(R"("dtype":"Q9","shape":[1],"data_offsets":[0,4])"), "1234")),
               ContainsSubstring("dtype: \"Q9\""));
  REQUIRE_THAT(error(safetensors(entry(R"("dtype":"F32","shape":[-1],"data_offsets":[0,4])"), "1234")),
               ContainsSubstring("shape"));
  REQUIRE_THAT(
      error(safetensors(entry(R"("dtype":"F32","shape":[1099511627776,1099511627776],"data_offsets":[0,4])"),
                        "1234")),
      ContainsSubstring("2^48"));
  REQUIRE_THAT(
      error(safetensors(
          R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})",
          "1234")),
      ContainsSubstring("overlap"));
  REQUIRE_THAT(
      error(safetensors(
          R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})",
          "12345678")),
      ContainsSubstring("occurs twice"));
  REQUIRE(error(safetensors(entry(R"("dtype":"I64","shape":[1],"data_offsets":[0,8])"), "12345678")).empty());
}

TEST_CASE("an index that leads elsewhere or lies is an error") {
  const ScratchFolder folder;
  const auto error = [&](const std::string& text) {
    write_bytes(folder / "model.safetensors.index.json", text);
    return message_of<IoError>([&] { WeightFile::open(folder.path()); });
  };
  REQUIRE_THAT(error(R"({"weight_map":{"a":"../x.safetensors"}})"), ContainsSubstring("same directory"));
  REQUIRE_THAT(error(R"({"weight_map":{}})"), ContainsSubstring("weight_map"));
  REQUIRE_THAT(error(R"({"weight_map":{"a":"none.safetensors"}})"), ContainsSubstring("cannot open"));
  const std::vector<float> values{1};
  save_safetensors(folder / "s.safetensors",
                   std::vector<OutputTensor>{{"b", {1}, std::span<const float>(values)}});
  REQUIRE_THAT(error(R"({"weight_map":{"a":"s.safetensors"}})"),
               ContainsSubstring("weight_map.a: expected this tensor in s.safetensors"));
}

TEST_CASE("hostile GGUF headers are errors with an offset") {
  const ScratchFolder folder;
  const auto error = [&](const std::string& bytes) { return open_error(folder, "GGUF" + bytes); };
  const auto head = [](std::uint64_t tensors, std::uint64_t keys) {
    return raw<std::uint32_t>(3) + raw(tensors) + raw(keys);
  };
  REQUIRE_THAT(error(""), ContainsSubstring("offset 4: truncated"));
  REQUIRE_THAT(error(raw<std::uint32_t>(1)), ContainsSubstring("GGUF version 1: expected 2 or 3"));
  REQUIRE_THAT(error(head(UINT64_MAX, 0)), ContainsSubstring("18446744073709551615 tensors"));
  REQUIRE_THAT(error(head(0, 1u << 30)), ContainsSubstring("metadata keys"));
  const auto key = [&](std::uint32_t type, const std::string& value) {
    return head(0, 1) + gguf_string("k") + raw(type) + value;
  };
  REQUIRE_THAT(error(key(99, "12345678")), ContainsSubstring("value type 99"));
  REQUIRE_THAT(error(key(8, raw<std::uint64_t>(1ull << 60))),
               ContainsSubstring("string of 1152921504606846976 bytes"));
  REQUIRE_THAT(error(key(8, gguf_string("\xff\xfe"))), ContainsSubstring("UTF-8"));
  REQUIRE_THAT(error(key(9, raw<std::uint32_t>(4) + raw<std::uint64_t>(1ull << 62))),
               ContainsSubstring("array elements"));
  REQUIRE_THAT(error(key(9, raw<std::uint32_t>(9) + raw<std::uint64_t>(1))),
               ContainsSubstring("array of type 9"));
  REQUIRE_THAT(error(key(7, std::string(1, '\x02') + "pad")), ContainsSubstring("boolean 2"));
  const std::string pair = gguf_string("k") + raw<std::uint32_t>(0) + "x";
  REQUIRE_THAT(error(head(0, 2) + pair + pair), ContainsSubstring("occurs twice"));
  const auto tensor = [&](std::uint32_t type, std::uint64_t size, std::uint64_t offset) {
    return gguf_string("t") + raw<std::uint32_t>(1) + raw(size) + raw(type) + raw(offset);
  };
  REQUIRE_THAT(error(head(1, 0) + tensor(0, 4, 0)), ContainsSubstring("truncated"));
  REQUIRE_THAT(error(head(1, 0) + tensor(77, 4, 0)), ContainsSubstring("type 77 is not supported"));
  REQUIRE_THAT(error(head(1, 0) + tensor(2, 33, 0)), ContainsSubstring("multiple of 32"));
  REQUIRE_THAT(error(head(1, 0) + tensor(0, 4, 5)), ContainsSubstring("expected a multiple of 32"));
  REQUIRE_THAT(error(head(1, 0) + tensor(0, 1ull << 63, 0)), ContainsSubstring("size 9223372036854775808"));
  REQUIRE_THAT(error(head(0, 0)), ContainsSubstring("general.architecture: missing"));
}

namespace {

// Opens and reads everything; whatever the bytes are, the only way out is success or an Error.
void try_everything(const std::filesystem::path& path) {
  try {
    const auto weights = WeightFile::open(path);
    for (const TensorInfo& info : weights->tensors()) {
      std::vector<float> values(static_cast<std::size_t>(info.num_elements()));
      if (info.type != TensorType::kOther) weights->read(info.name, values);
    }
  } catch (const IoError&) {
  }
}

void mutate_and_open(const std::filesystem::path& source, std::uint64_t seed, int rounds) {
  const ScratchFolder folder;
  const std::string original = read_text_file(source);
  RandomStream random(seed);
  for (int round = 0; round < rounds; ++round) {
    std::string bytes = original;
    // Mostly the header, where the structure is.
    const std::size_t area = round % 4 == 0 ? bytes.size() : std::min<std::size_t>(bytes.size(), 4096);
    for (std::uint64_t flips = 1 + random.below(4); flips > 0; --flips) {
      bytes[random.below(area)] = static_cast<char>(random.below(256));
    }
    if (round % 5 == 0) bytes.resize(random.below(bytes.size()));
    write_bytes(folder / "mutant", bytes);
    try_everything(folder / "mutant");
  }
}

}  // namespace

TEST_CASE("damaged files never crash") {
  REQUIRE_NOTHROW(mutate_and_open(golden("gguf_llama/llama_Q4_0.gguf"), 1, 3000));
  REQUIRE_NOTHROW(mutate_and_open(golden("model_llama_bf16/model.safetensors"), 2, 3000));
}
