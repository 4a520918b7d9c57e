#include "rlhf/verify/record_rows.h"

#include "rlhf/core/error.h"

namespace rlhf::verify {

void PaddedRows::add_row(std::size_t length) {
  RLHF_CHECK(length <= width, "a row of ", length, " positions in a matrix of ", width, " columns");
  offsets.push_back(offsets.back() + length);
}

std::vector<double> PaddedRows::pad(std::span<const double> flat, double fill) const {
  RLHF_CHECK(flat.size() == offsets.back(), flat.size(), " values for rows of ", offsets.back(),
             " positions");
  std::vector<double> matrix(rows() * width, fill);
  for (std::size_t row = 0; row < rows(); ++row)
    for (std::size_t t = 0; t < length(row); ++t) matrix[row * width + t] = flat[offsets[row] + t];
  return matrix;
}

std::vector<double> PaddedRows::strip(const Tensor& matrix) const {
  RLHF_CHECK(matrix.shape.size() == 2 && matrix.shape[0] == rows() && matrix.shape[1] == width,
             "expected a matrix of ", rows(), " x ", width);
  std::vector<double> flat;
  for (std::size_t row = 0; row < rows(); ++row)
    for (std::size_t t = 0; t < length(row); ++t) flat.push_back(matrix.values[row * width + t]);
  return flat;
}

std::vector<double> PaddedRows::narrow(const PaddedRows& wide, std::span<const double> flat) const {
  RLHF_CHECK(wide.rows() == rows() && flat.size() == wide.offsets.back(), "rows that do not fit");
  std::vector<double> values;
  for (std::size_t row = 0; row < rows(); ++row) {
    RLHF_CHECK(length(row) <= wide.length(row), "row ", row, " is longer than the one it is taken from");
    for (std::size_t t = 0; t < length(row); ++t) values.push_back(flat[wide.offsets[row] + t]);
  }
  return values;
}

std::vector<double> PaddedRows::widen(const PaddedRows& narrow, std::span<const double> flat) const {
  return strip({{narrow.rows(), narrow.width}, narrow.pad(flat, 0)});
}

PaddedRows PaddedRows::select(const std::vector<std::size_t>& chosen) const {
  PaddedRows selection{width};
  for (const std::size_t row : chosen) {
    RLHF_CHECK(row < rows(), "row ", row, " of ", rows(), " does not exist");
    selection.add_row(length(row));
  }
  return selection;
}

std::vector<TokenId> token_row(const Tensor& matrix, std::size_t row) {
  std::vector<TokenId> tokens;
  for (const double id : matrix.row(row)) tokens.push_back(static_cast<TokenId>(id));
  return tokens;
}

namespace {

std::vector<std::vector<TokenId>> join(const std::vector<RecordResponse>& responses) {
  std::vector<std::vector<TokenId>> sequences;
  for (const RecordResponse& r : responses) {
    RLHF_CHECK(!r.prompt.empty(), "response ", sequences.size(), " has no prompt");
    sequences.push_back(r.prompt);
    sequences.back().insert(sequences.back().end(), r.response.begin(), r.response.end());
  }
  return sequences;
}

std::vector<std::span<const TokenId>> spans(const std::vector<std::vector<TokenId>>& sequences) {
  return {sequences.begin(), sequences.end()};
}

}  // namespace

SequenceBatch::SequenceBatch(const std::vector<RecordResponse>& responses)
    : tokens_(join(responses)), packed_(spans(tokens_)) {
  for (std::size_t s = 0; s < responses.size(); ++s) {
    prompt_lengths_.push_back(static_cast<std::int64_t>(responses[s].prompt.size()));
    for (std::size_t t = 0; t < responses[s].response.size(); ++t)
      targets_.push_back({row_before(s, t), responses[s].response[t]});
  }
}

}  // namespace rlhf::verify
