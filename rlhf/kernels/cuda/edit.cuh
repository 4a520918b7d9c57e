#pragma once
// Edits of rows of logits before a draw: penalties, biases, allowed tokens. Of a row that changes, a block
// has a part, as in logits.cuh: it sums the part as it is and removes what is not allowed, by a byte of
// shared memory for each of its tokens. Then a block has a row: it merges the sums and changes the listed
// tokens. A row that does not change costs empty blocks. Bound: reading the row once, and writing it where
// tokens are removed.

#include <cmath>

#include "rlhf/kernels/cuda/logits.cuh"

namespace rlhf::kernels::RLHF_GPU {

constexpr std::size_t kEditSharedBytes = kPartSharedBytes + kLogitsPart;

template <class T>
__global__ void edit_parts_kernel(EditArgs<T> args, std::int64_t parts) {
  const std::int64_t row = blockIdx.x, part = blockIdx.y, begin = part * kLogitsPart;
  const RowEdits edits = args.edits[row];
  if (!edits.changes()) return;
  float* const logits = args.logits + matrix_offset(row, begin, args.V);
  const PartShare share = interleaved_share(part_tokens(args.V, part));
  float values[kThreadLogits];
  load_share(values, logits, share);
  sum_part(values, draw_scale(args.keys[row]), parts_of_row(args.workspace, row, parts) + part);
  if (edits.num_allowed == 0) return;
  unsigned char* const is_allowed = block_shared<unsigned char>() + kPartSharedBytes;
  for (std::int64_t i = threadIdx.x; i < kLogitsPart; i += kLogitsThreads) is_allowed[i] = 0;
  __syncthreads();
  for (std::int64_t i = threadIdx.x; i < edits.num_allowed; i += kLogitsThreads) {
    const std::int64_t at = edits.allowed[i] - begin;
    if (at >= 0 && at < share.count) is_allowed[at] = 1;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kThreadLogits; ++i) {
    const std::int64_t at = share.first + i / kVector<float> * share.step + i % kVector<float>;
    if (at < share.count && is_allowed[at] == 0) values[i] = -INFINITY;
  }
  store_share(logits, values, share);
}

template <class T>
__global__ void edit_rows_kernel(EditArgs<T> args, std::int64_t parts) {
  const std::int64_t row = blockIdx.x;
  const RowEdits edits = args.edits[row];
  if (!edits.changes()) return;
  const float scale = draw_scale(args.keys[row]);
  const PartSums sums = merge_parts(parts_of_row(args.workspace, row, parts), parts, scale,
                                    merged_parts(block_shared<double>(), parts));
  if (threadIdx.x == 0) args.unedited[row] = sums.maximum * static_cast<double>(scale) + log(sums.sum);
  float* const logits = args.logits + matrix_offset(row, 0, args.V);
  for (std::int64_t i = threadIdx.x; i < edits.num_edits; i += kLogitsThreads) {
    const LogitEdit edit = edits.edits[i];
    const float was = logits[edit.token];
    logits[edit.token] = edited_logit(edit, was);
    edits.edits[i].bias = was;
  }
}

/// A warp has a row and looks for the drawn token in its list.
template <class T>
__global__ void unedited_logprobs_kernel(EditArgs<T> args, const TokenId* tokens) {
  const std::int64_t row = blockIdx.x;
  const RowEdits edits = args.edits[row];
  if (!edits.changes()) return;
  const TokenId token = tokens[row];
  float logit = -INFINITY;  // which a token that was drawn did not have
  for (std::int64_t i = lane_id(); i < edits.num_edits; i += kWarp)
    if (edits.edits[i].token == token) logit = edits.edits[i].bias;
  logit = warp_max(logit);
  if (lane_id() != 0) return;
  if (token < 0)
    logit = NAN;
  else if (logit == -INFINITY)
    logit = args.logits[matrix_offset(row, token, args.V)];
  args.unedited[row] =
      static_cast<double>(logit) * static_cast<double>(draw_scale(args.keys[row])) - args.unedited[row];
}

template <class T>
void edit(const EditArgs<T>& args, std::int64_t rows, void* queue) {
  const std::int64_t parts = logits_parts(args.V);
  launch("edit_parts", edit_parts_kernel<T>, blocks_for_parts(rows, args.V), kLogitsThreads, kEditSharedBytes,
         queue, args, parts);
  launch("edit_rows", edit_rows_kernel<T>, dim3(static_cast<unsigned>(rows)), kLogitsThreads,
         static_cast<std::size_t>(3 * parts) * sizeof(double), queue, args, parts);
}
template <class T>
void unedited_logprobs(const EditArgs<T>& args, const TokenId* tokens, std::int64_t rows, void* queue) {
  launch("unedited_logprobs", unedited_logprobs_kernel<T>, dim3(static_cast<unsigned>(rows)), kWarp, 0, queue,
         args, tokens);
}

}  // namespace rlhf::kernels::RLHF_GPU
