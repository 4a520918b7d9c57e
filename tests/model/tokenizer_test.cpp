#include "rlhf/model/tokenizer.h"

#include <thread>

#include "rlhf/core/error.h"
#include "rlhf/core/random.h"
#include "rlhf/model/byte_level.h"
#include "rlhf/model/utf8.h"
#include "rlhf/model/verify_files.h"
#include "tests/catch.h"
#include "tests/model/golden.h"

using namespace rlhf;
using model_test::golden;
using model_test::message_of;
using model_test::ScratchFolder;

namespace {

using Ids = std::vector<TokenId>;

// The golden SmolLM-style tokenizer with another tokenizer.json: `change` edits the parsed file.
template <typename F>
Tokenizer changed_tokenizer(const ScratchFolder& folder, F&& change,
                            const char* base = "tokenizer_smollm_style") {
  auto json = read_json_file(golden(base) / "tokenizer.json");
  change(json);
  model_test::write_bytes(folder / "tokenizer.json", json.dump());
  return Tokenizer::load(folder / "tokenizer.json");
}

template <typename F>
std::string load_error(F&& change) {
  const ScratchFolder folder;
  return message_of<IoError>([&] { changed_tokenizer(folder, change); });
}

std::string random_text(RandomStream& random) {
  static const std::vector<std::string> kParts{
      "hello",      " ",           "  ",   "\n", "\t",       "12",  "7",
      "é",          "e\xcc\x81",   "你好", "😀",  "'s",       "'LL", "<|im_start|>",
      "<|im_end|>", "<tool_call>", "<|",   "x",  "A",        "،",   "\r\n",
      "\xc2\xa0",   "ﬁ",           "½",    "_",  "#include", "...", "\xe1\xa0\x8e"};
  std::string text;
  for (std::uint64_t i = 1 + random.below(12); i > 0; --i) text += kParts[random.below(kParts.size())];
  return text;
}

}  // namespace

TEST_CASE("golden tokenizers match in every case") {
  const auto folders = model_test::golden_folders("tokenizer_");
  REQUIRE(folders.size() == 4);
  for (const auto& folder : folders) {
    const VerifyResult result = verify_tokenizer(folder / "expected.json", {});
    INFO(folder << " " << (result.messages.empty() ? "" : result.messages.front()));
    REQUIRE(result.cases == 300);
    REQUIRE(result.failures == 0);
  }
}

TEST_CASE("the SmolLM2 GGUF tokenizer matches in every case") {
  const auto gguf = model_test::smollm2_gguf();
  if (!gguf) {
    WARN("skipped: no SmolLM2 GGUF (set RLHF_SMOLLM2_GGUF or run scripts/quickstart.sh)");
    return;
  }
  const VerifyResult result = verify_tokenizer(golden("tokenizer_smollm2.json"), {*gguf});
  INFO((result.messages.empty() ? "" : result.messages.front()));
  REQUIRE(result.cases == 400);
  REQUIRE(result.failures == 0);
  const Tokenizer tokenizer = Tokenizer::load(*gguf);
  REQUIRE(tokenizer.vocab_size() == 49152);
  REQUIRE(tokenizer.eos() == 2);
  REQUIRE(tokenizer.missing_bytes() ==
          std::vector<std::uint8_t>{0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2});
}

TEST_CASE("a verification notices a wrong id and a wrong text") {
  const ScratchFolder folder;
  std::filesystem::copy(golden("tokenizer_gpt2_style"), folder.path(),
                        std::filesystem::copy_options::recursive);
  auto json = read_json_file(folder / "expected.json");
  json["cases"][5]["ids"].push_back(0);
  json["cases"][6]["decoded"] = "other";
  model_test::write_bytes(folder / "expected.json", json.dump());
  const VerifyResult result = verify_tokenizer(folder / "expected.json", {});
  REQUIRE(result.failures == 2);
  REQUIRE_THAT(result.messages.at(0), ContainsSubstring("case 5"));
}

TEST_CASE("stream decoding gives the text of whole decoding, whatever the ids") {
  const Tokenizer tokenizer = Tokenizer::load(golden("tokenizer_llama3_style"));
  RandomStream random(5);
  for (int round = 0; round < 500; ++round) {
    Ids ids = tokenizer.encode(random_text(random));
    // Random ids make sequences that are no UTF-8.
    for (int i = 0; i < 5; ++i)
      ids.push_back(static_cast<TokenId>(random.below(static_cast<std::uint64_t>(tokenizer.vocab_size()))));
    for (const bool skip : {false, true}) {
      StreamDecoder decoder(tokenizer, {skip});
      std::string text;
      for (const TokenId id : ids) {
        const std::string now = decoder.push(id);
        REQUIRE_FALSE(utf8::find_invalid(now));
        text += now;
      }
      REQUIRE(text + decoder.finish() == tokenizer.decode(ids, {skip}));
    }
  }
}

TEST_CASE("encoding and decoding returns NFC-stable text") {
  RandomStream random(6);
  for (const char* name : {"tokenizer_gpt2_style", "tokenizer_llama3_style", "tokenizer_smollm_style"}) {
    const Tokenizer tokenizer = Tokenizer::load(golden(name));
    REQUIRE(tokenizer.missing_bytes().empty());
    for (int round = 0; round < 300; ++round) {
      const std::string text = random_text(random);
      REQUIRE(tokenizer.decode(tokenizer.encode(text)) == text);
      REQUIRE(tokenizer.decode(tokenizer.encode(text, {false, false})) == text);
    }
  }
}

TEST_CASE("special tokens are plain text where they must not count") {
  const Tokenizer tokenizer = Tokenizer::load(golden("tokenizer_smollm_style"));
  const TokenId start = *tokenizer.find("<|im_start|>"), call = *tokenizer.find("<tool_call>");
  REQUIRE(tokenizer.encode("<|im_start|>").size() == 1);
  const Ids plain = tokenizer.encode("<|im_start|><tool_call>", {false, false});
  REQUIRE(std::count(plain.begin(), plain.end(), start) == 0);
  REQUIRE(std::count(plain.begin(), plain.end(), call) == 1);
  // The offset lies inside the second one only.
  const std::vector<std::size_t> literal{13};
  EncodeOptions options;
  options.literal_offsets = literal;
  const Ids mixed = tokenizer.encode("<|im_start|><|im_start|>", options);
  REQUIRE(mixed.front() == start);
  REQUIRE(std::count(mixed.begin(), mixed.end(), start) == 1);
  REQUIRE(tokenizer.decode(mixed) == "<|im_start|><|im_start|>");
  REQUIRE(tokenizer.decode(mixed, {true}) == "<|im_start|>");
}

TEST_CASE("added tokens follow their strip and word rules") {
  const ScratchFolder folder;
  const Tokenizer tokenizer = changed_tokenizer(folder, [](auto& json) {
    const auto add = [&](int id, const char* text, const char* rule) {
      nlohmann::json token{{"id", id}, {"content", text}, {"special", true}, {"normalized", false}};
      token[rule] = true;
      json["added_tokens"].push_back(token);
    };
    add(804, "<L>", "lstrip");
    add(805, "<R>", "rstrip");
    add(806, "word", "single_word");
  });
  REQUIRE(tokenizer.encode("  <L>").size() == 1);
  REQUIRE(tokenizer.encode("<R> \n").size() == 1);
  REQUIRE(tokenizer.encode("word") == Ids{806});
  const Ids inside = tokenizer.encode("swords");
  REQUIRE(std::count(inside.begin(), inside.end(), 806) == 0);
  // Two tokens may want the same spaces: the first one has them.
  REQUIRE(tokenizer.encode("<R>  <L>") == Ids{805, 804});
}

TEST_CASE("bytes without a token are counted, or become the unknown token") {
  const auto without_x = [](auto& json) {
    auto& vocabulary = json["model"]["vocab"];
    vocabulary["unused-letter"] = vocabulary["x"];
    vocabulary.erase("x");
    auto& merges = json["model"]["merges"];
    merges.erase(std::remove_if(merges.begin(), merges.end(),
                                [](const auto& m) { return m.dump().find('x') != std::string::npos; }),
                 merges.end());
  };
  const ScratchFolder folder;
  const Tokenizer dropping = changed_tokenizer(folder, without_x);
  REQUIRE(dropping.missing_bytes() == std::vector<std::uint8_t>{'x'});
  const Encoding encoding = dropping.encode_with_report("1x1xx");
  REQUIRE(encoding.dropped_bytes == 3);
  REQUIRE(encoding.ids.size() == 2);
  // The word cache must not hide it the second time.
  REQUIRE(dropping.encode_with_report("xx").dropped_bytes == 2);
  REQUIRE(dropping.encode_with_report("xx").dropped_bytes == 2);
  const Tokenizer unknown = changed_tokenizer(folder, [&](auto& json) {
    without_x(json);
    json["model"]["unk_token"] = "!";
    json["model"]["fuse_unk"] = true;
  });
  REQUIRE(unknown.encode("xx") == Ids{*unknown.find("!")});
}

TEST_CASE("long runs take neither long nor much stack") {
  const Tokenizer tokenizer = Tokenizer::load(golden("tokenizer_llama3_style"));
  for (const std::string unit : {"a", " ", "\n", "1", "!", "\xe4\xbd\xa0", "a ", " \n", "\xcc\x81"}) {
    std::string text;
    while (text.size() < 300000) text += unit;
    REQUIRE(tokenizer.decode(tokenizer.encode(text)) == text);
  }
}

TEST_CASE("threads share one tokenizer") {
  const Tokenizer tokenizer = Tokenizer::load(golden("tokenizer_qwen2_style"));
  const std::string text = "The quick brown fox jumps over 13 lazy dogs. <|im_end|>";
  const Ids expected = Tokenizer::load(golden("tokenizer_qwen2_style")).encode(text);
  std::vector<int> wrong(4);
  std::vector<std::thread> threads;
  for (int& count : wrong) {
    threads.emplace_back([&] {
      for (int i = 0; i < 200; ++i) count += tokenizer.encode(text) != expected;
    });
  }
  for (auto& thread : threads) thread.join();
  REQUIRE(wrong == std::vector<int>(4));
}

TEST_CASE("what is no byte-level BPE tokenizer is named") {
  REQUIRE_THAT(load_error([](auto& j) { j["model"]["type"] = "Unigram"; }),
               ContainsSubstring("model.type: \"Unigram\": expected BPE"));
  REQUIRE_THAT(load_error([](auto& j) { j["pre_tokenizer"] = nullptr; }),
               ContainsSubstring("expected one that holds ByteLevel"));
  REQUIRE_THAT(load_error([](auto& j) {
                 j["pre_tokenizer"] = {{"type", "Metaspace"}};
               }),
               ContainsSubstring("pre_tokenizer.type: \"Metaspace\""));
  REQUIRE_THAT(load_error([](auto& j) {
                 j["normalizer"] = {{"type", "Lowercase"}};
               }),
               ContainsSubstring("expected one of NFC, NFD, NFKC, NFKD"));
  REQUIRE_THAT(load_error([](auto& j) { j["model"]["byte_fallback"] = true; }),
               ContainsSubstring("byte_fallback"));
  REQUIRE_THAT(load_error([](auto& j) { j["model"]["merges"] = {"q"}; }),
               ContainsSubstring("expected \"left right\""));
  REQUIRE_THAT(load_error([](auto& j) { j["model"]["merges"] = {"zq9 zq9"}; }),
               ContainsSubstring("in the vocabulary"));
  REQUIRE_THAT(load_error([](auto& j) { j["model"]["vocab"]["huge"] = 4000000000u; }),
               ContainsSubstring("expected an id below"));
  REQUIRE_THAT(load_error([](auto& j) { j["model"]["vocab"]["again"] = 5; }),
               ContainsSubstring("is given to both"));
  REQUIRE_THAT(load_error([](auto& j) { j["added_tokens"][0]["id"] = 2000000000; }),
               ContainsSubstring("added_tokens.id"));
  REQUIRE_THAT(
      load_error([](auto& j) {
        j["pre_tokenizer"] = {{"type", "Split"}, {"pattern", {{"Regex", "(["}}}, {"behavior", "Isolated"}};
        j["pre_tokenizer"] = {{"type", "Sequence"},
                              {"pretokenizers", {j["pre_tokenizer"], {{"type", "ByteLevel"}}}}};
      }),
      ContainsSubstring("pattern (["));
  REQUIRE_THAT(message_of<IoError>([] { Tokenizer::load(golden("gguf_llama/llama_F32.gguf")); }),
               ContainsSubstring("tokenizer.ggml.model: llama: expected gpt2"));
  REQUIRE_THAT(message_of<IoError>([] { Tokenizer::load(golden("model_gpt2")); }),
               ContainsSubstring("expected tokenizer.json"));
  const Tokenizer tokenizer = Tokenizer::load(golden("tokenizer_gpt2_style"));
  REQUIRE_THAT(message_of<InvalidArgument>([&] { tokenizer.encode("ab\xff"); }),
               ContainsSubstring("offset 2: expected UTF-8"));
  REQUIRE_THAT(message_of<InvalidArgument>([&] { tokenizer.decode(Ids{902}); }),
               ContainsSubstring("token id 902: expected 0 to 901"));
  REQUIRE_THAT(message_of<InvalidArgument>([&] { tokenizer.token_text(-1); }),
               ContainsSubstring("token id -1"));
}

TEST_CASE("damaged tokenizer files never crash") {
  const ScratchFolder folder;
  const std::string original = read_text_file(golden("tokenizer_llama3_style/tokenizer.json"));
  RandomStream random(9);
  for (int round = 0; round < 300; ++round) {
    std::string bytes = original;
    for (std::uint64_t flips = 1 + random.below(3); flips > 0; --flips) {
      bytes[random.below(round % 2 ? bytes.size() : 2500)] = static_cast<char>(32 + random.below(95));
    }
    if (round % 7 == 0) bytes.resize(random.below(bytes.size()));
    model_test::write_bytes(folder / "tokenizer.json", bytes);
    try {
      Tokenizer::load(folder.path()).encode("some text 123 <|eot_id|>");
    } catch (const IoError&) {
    }
  }
  SUCCEED();
}

TEST_CASE("a generated tokenizer.json gives the same ids as its source") {
  RandomStream random(11);
  for (const auto& folder : model_test::golden_folders("tokenizer_")) {
    INFO(folder);
    const Tokenizer original = Tokenizer::load(folder);
    TokenizerSpec spec = original.spec();
    spec.folder.reset();
    const ScratchFolder out;
    Tokenizer(spec).save(out.path(), 4096);
    const Tokenizer written = Tokenizer::load(out.path());
    REQUIRE(written.eos() == original.eos());
    for (int round = 0; round < 200; ++round) {
      const std::string text = random_text(random);
      REQUIRE(written.encode(text, {true}) == original.encode(text, {true}));
    }
    // A tokenizer with a home is copied.
    const ScratchFolder copy;
    original.save(copy.path(), 4096);
    REQUIRE(read_text_file(copy / "tokenizer.json") == read_text_file(folder / "tokenizer.json"));
  }
}

TEST_CASE("UTF-8 replacement follows the maximal-subpart rule") {
  const std::string mark = "\xef\xbf\xbd";
  REQUIRE(utf8::replace_invalid("a\xff\xfe") == "a" + mark + mark);
  REQUIRE(utf8::replace_invalid("\xe4\xbd") == mark);
  REQUIRE(utf8::replace_invalid("\xe4\x41") == mark + "A");
  REQUIRE(utf8::replace_invalid("\xed\xa0\x80") == mark + mark + mark);
  REQUIRE(utf8::replace_invalid("\xf0\x9f\x98") == mark);
  REQUIRE(utf8::replace_invalid("\xf4\x90\x80\x80") == mark + mark + mark + mark);
  REQUIRE(utf8::replace_invalid("\xc0\xaf") == mark + mark);
  REQUIRE(byte_level::spell(" \n") == "\xc4\xa0\xc4\x8a");
  REQUIRE(byte_level::unspell("\xc4\xa0x") == " x");
}
