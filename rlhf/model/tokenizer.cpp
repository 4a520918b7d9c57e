#include "rlhf/model/tokenizer.h"

#include <algorithm>

#include "rlhf/core/atomic_file.h"
#include "rlhf/core/error.h"
#include "rlhf/model/added_tokens.h"
#include "rlhf/model/byte_level.h"
#include "rlhf/model/byte_pairs.h"
#include "rlhf/model/json_file.h"
#include "rlhf/model/pre_tokenizer.h"
#include "rlhf/model/utf8.h"

namespace rlhf {
namespace {

std::vector<AddedToken> select_added(const TokenizerSpec& spec, bool normalized) {
  std::vector<AddedToken> selected;
  for (AddedToken token : spec.added) {
    if (token.normalized != normalized) continue;
    // These are searched in normalised text, so their own text must be normalised too.
    for (const UnicodeForm form : spec.normalizers) {
      if (normalized) token.text = normalize_unicode(token.text, form);
    }
    selected.push_back(std::move(token));
  }
  return selected;
}

TextMap<TokenId> index_vocabulary(const TokenizerSpec& spec) {
  TextMap<TokenId> ids;
  ids.reserve(spec.vocabulary.size());
  for (std::size_t id = 0; id < spec.vocabulary.size(); ++id) {
    const std::string& token = spec.vocabulary[id];
    if (token.empty()) continue;
    if (!ids.emplace(token, static_cast<TokenId>(id)).second) {
      fail<IoError>(spec.source, ": token ", token, " occurs twice in the vocabulary");
    }
  }
  return ids;
}

// 0xC0, 0xC1 and 0xF5 to 0xFF never occur in UTF-8.
bool occurs_in_utf8(unsigned byte) {
  return byte != 0xC0 && byte != 0xC1 && byte < 0xF5;
}

void copy_whole_file(const std::filesystem::path& from, const std::filesystem::path& to) {
  if (std::filesystem::exists(to) && std::filesystem::equivalent(from, to)) return;
  write_file_atomically(to, read_text_file(from));
}

// Length of the longest prefix of `bytes` that ends at a character boundary, counting ill-formed bytes as
// characters.
std::size_t complete_prefix(std::string_view bytes) {
  std::size_t position = 0;
  while (position < bytes.size()) {
    const utf8::Decoded next = utf8::decode(bytes.substr(position));
    if (next.truncated) break;
    position += next.size;
  }
  return position;
}

}  // namespace

struct Tokenizer::Impl {
  explicit Impl(TokenizerSpec given)
      : spec(std::move(given)),
        ids(index_vocabulary(spec)),
        pairs(spec, ids),
        pre_tokenizer(spec),
        raw_added(select_added(spec, false)),
        normalized_added(select_added(spec, true)) {
    for (const std::string& token : spec.vocabulary) bytes.push_back(byte_level::unspell(token));
    special.resize(spec.vocabulary.size());
    for (const AddedToken& token : spec.added) special[static_cast<std::size_t>(token.id)] = token.special;
    for (unsigned byte = 0; byte < 256; ++byte) {
      if (pairs.byte_ids()[byte] < 0 && occurs_in_utf8(byte))
        missing.push_back(static_cast<std::uint8_t>(byte));
    }
    bos = find_optional(spec.bos_token);
    eos = find_optional(spec.eos_token);
    pad = find_optional(spec.pad_token);
  }

  std::optional<TokenId> find(std::string_view token) const {
    const auto found = ids.find(token);
    return found == ids.end() ? std::nullopt : std::optional(found->second);
  }
  std::optional<TokenId> find_optional(const std::optional<std::string>& token) const {
    return token ? find(*token) : std::nullopt;
  }

  void encode_plain(std::string_view text, Encoding& out) const {
    std::deque<std::string> storage;
    for (const std::string_view piece : pre_tokenizer.split(text, storage)) {
      out.dropped_bytes += pairs.encode(piece, out.ids);
    }
  }

  void encode_normalized(std::string_view text, const AddedTokenFinder::Rules& rules, Encoding& out) const {
    std::string normal;
    for (const UnicodeForm form : spec.normalizers) text = normal = normalize_unicode(text, form);
    for (const TextPart& part : normalized_added.split(text, rules)) {
      if (part.id >= 0) {
        out.ids.push_back(part.id);
      } else {
        encode_plain(text.substr(part.begin, part.end - part.begin), out);
      }
    }
  }

  std::size_t index_of(TokenId id) const {
    RLHF_CHECK(id >= 0 && static_cast<std::size_t>(id) < spec.vocabulary.size(), spec.source, ": token id ",
               id, ": expected 0 to ", spec.vocabulary.size() - 1);
    return static_cast<std::size_t>(id);
  }

  TokenizerSpec spec;
  TextMap<TokenId> ids;
  BytePairEncoder pairs;
  PreTokenizer pre_tokenizer;
  AddedTokenFinder raw_added, normalized_added;
  std::vector<std::string> bytes;
  std::vector<bool> special;
  std::vector<std::uint8_t> missing;
  std::optional<TokenId> bos, eos, pad;
};

Tokenizer::Tokenizer(TokenizerSpec spec) : impl_(std::make_shared<const Impl>(std::move(spec))) {}

Tokenizer Tokenizer::load(const std::filesystem::path& path) {
  if (!std::filesystem::exists(path)) fail<IoError>(path.string(), ": no such file or directory");
  if (!std::filesystem::is_directory(path)) {
    return path.extension() == ".json" ? Tokenizer(read_tokenizer_json(path))
                                       : Tokenizer(read_gguf_tokenizer(*GgufFile::open(path)));
  }
  if (std::filesystem::exists(path / "tokenizer.json"))
    return Tokenizer(read_tokenizer_json(path / "tokenizer.json"));
  std::vector<std::filesystem::path> found;
  for (const auto& entry : std::filesystem::directory_iterator(path)) {
    if (entry.path().extension() == ".gguf") found.push_back(entry.path());
  }
  if (found.size() != 1)
    fail<IoError>(path.string(), ": expected tokenizer.json or one GGUF file, found ", found.size(),
                  " GGUF files");
  return load(found.front());
}

Encoding Tokenizer::encode_with_report(std::string_view text, const EncodeOptions& options) const {
  if (const auto bad = utf8::find_invalid(text)) {
    fail<InvalidArgument>(impl_->spec.source, ": text to encode: offset ", *bad, ": expected UTF-8");
  }
  Encoding out;
  if (options.add_special_tokens) out.ids = impl_->spec.prefix_ids;
  for (const TextPart& part :
       impl_->raw_added.split(text, {options.parse_special, options.literal_offsets})) {
    if (part.id >= 0) {
      out.ids.push_back(part.id);
      continue;
    }
    // Offsets mean nothing after normalisation: a part with literal text in it gets no special tokens at all.
    const auto& literal = options.literal_offsets;
    const auto first = std::lower_bound(literal.begin(), literal.end(), part.begin);
    const bool has_literal = first != literal.end() && *first < part.end;
    impl_->encode_normalized(text.substr(part.begin, part.end - part.begin),
                             {options.parse_special && !has_literal, {}}, out);
  }
  if (options.add_special_tokens)
    out.ids.insert(out.ids.end(), impl_->spec.suffix_ids.begin(), impl_->spec.suffix_ids.end());
  return out;
}

std::vector<TokenId> Tokenizer::encode(std::string_view text, const EncodeOptions& options) const {
  return encode_with_report(text, options).ids;
}

std::string Tokenizer::decode(std::span<const TokenId> ids, const DecodeOptions& options) const {
  std::string bytes;
  for (const TokenId id : ids) {
    const std::size_t index = impl_->index_of(id);
    if (!options.skip_special || !impl_->special[index]) bytes += impl_->bytes[index];
  }
  return utf8::replace_invalid(bytes);
}

std::int64_t Tokenizer::vocab_size() const {
  return static_cast<std::int64_t>(impl_->spec.vocabulary.size());
}
const std::string& Tokenizer::token_text(TokenId id) const {
  return impl_->spec.vocabulary[impl_->index_of(id)];
}
const std::string& Tokenizer::token_bytes(TokenId id) const {
  return impl_->bytes[impl_->index_of(id)];
}
std::optional<TokenId> Tokenizer::find(std::string_view token) const {
  return impl_->find(token);
}
bool Tokenizer::is_special(TokenId id) const {
  return impl_->special[impl_->index_of(id)];
}
std::optional<TokenId> Tokenizer::bos() const {
  return impl_->bos;
}
std::optional<TokenId> Tokenizer::eos() const {
  return impl_->eos;
}
std::optional<TokenId> Tokenizer::pad() const {
  return impl_->pad;
}
const std::vector<std::uint8_t>& Tokenizer::missing_bytes() const {
  return impl_->missing;
}
const TokenizerSpec& Tokenizer::spec() const {
  return impl_->spec;
}

void Tokenizer::save(const std::filesystem::path& directory, std::int64_t max_positions) const {
  const TokenizerSpec& spec = impl_->spec;
  if (spec.folder) {
    for (const char* name :
         {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"}) {
      if (std::filesystem::exists(*spec.folder / name))
        copy_whole_file(*spec.folder / name, directory / name);
    }
    return;
  }
  write_file_atomically(directory / "tokenizer.json", to_tokenizer_json(spec));
  write_file_atomically(directory / "tokenizer_config.json", to_tokenizer_config_json(spec, max_positions));
  if (spec.chat_template) write_file_atomically(directory / "chat_template.jinja", *spec.chat_template);
}

StreamDecoder::StreamDecoder(Tokenizer tokenizer, DecodeOptions options)
    : tokenizer_(std::move(tokenizer)), options_(options) {}

std::string StreamDecoder::push(TokenId id) {
  if (options_.skip_special && tokenizer_.is_special(id)) return "";
  pending_ += tokenizer_.token_bytes(id);
  const std::size_t complete = complete_prefix(pending_);
  std::string text = utf8::replace_invalid(std::string_view(pending_).substr(0, complete));
  pending_.erase(0, complete);
  return text;
}

std::string StreamDecoder::finish() {
  std::string text = utf8::replace_invalid(pending_);
  pending_.clear();
  return text;
}

}  // namespace rlhf
