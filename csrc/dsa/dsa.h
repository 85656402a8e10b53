// Contract of sparse attention by selection: the lightning indexer scores keys,
//   I[t, s] = sum_j w[t, j] act(scale q_idx[t, j] . k_idx[s]),
// and selects the topk visible keys of each query; attention is over a selection, whoever made it.
// The only header shared by bindings and kernels: POD parameters, raw pointers, an opaque stream.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/parallel.h"
#include "common/status.h"

namespace lt2::dsa {

// int32 or int64 offsets of packed sequences; data null: not packed.
struct Offsets {
  void const* data;
  bool int64;

  int64_t operator[](int64_t i) const {
    return int64 ? static_cast<int64_t const*>(data)[i] : static_cast<int32_t const*>(data)[i];
  }
};

// [B, T, H, D] with a contiguous last axis; strides in elements.
struct Heads {
  void* data;
  int64_t batch, token, head;
};

// Who sees whom. Sequence n is batch row n, or queries [cu_seqlens[n], cu_seqlens[n + 1]) and keys
// [cu_seqlens_k[n], cu_seqlens_k[n + 1]) of the only row. Its query t stands at q_offset[n] + t (q_offset
// null: its keys less its queries) and sees its keys [0, position]; a key's index counts from the sequence's
// first.
struct Sequences {
  int64_t batch, tokens, keys, sequences;
  Offsets cu_seqlens, cu_seqlens_k;
  int64_t const* q_offset;  // [N] or null
};

struct IndexerParams : Sequences {
  Dtype dtype;  // of q and k
  int64_t heads, dim, topk;
  // pool > 0: only keys of the query's newest block of `pool` keys (they count from the sequence's first) and
  // of `blocks` older ones are eligible: those whose mean key has the best scores, of equals the first; NaN
  // counts as -inf.
  int64_t pool, blocks;
  float scale;
  bool relu;
  Heads q;        // [B, T, HI, DI]
  Heads k;        // [B, S, 1, DI]
  Heads weights;  // fp32 [B, T, HI]: no last axis; data null: ones
  // [B, T, topk]: ascending, unique, then -1. Of equal scores the smaller index wins, NaN is never selected.
  int32_t* indices;
};

// Query head h reads key head h / (query_heads / key_heads). Indices of keys that a query does not see are
// ignored, whatever their value; a key named twice counts twice. Without any key left o = 0, lse = -inf.
struct AttentionParams : Sequences {
  Dtype dtype;  // of q, k, v, o and their gradients
  int64_t query_heads, key_heads, dim, value_dim, topk;
  float scale;
  Heads q, k, v;           // [B, T, HQ, D], [B, S, H, D], [B, S, H, DV]
  int32_t const* indices;  // [B, T, topk]
  bool dense;              // instead of indices the newest topk keys that a query sees
};

struct AttentionForwardParams : AttentionParams {
  Heads o;
  float* lse;  // [B, T, HQ]
};

struct AttentionBackwardParams : AttentionParams {
  float const *lse, *dlse;  // [B, T, HQ]; dlse may be null
  Heads o;                  // of the forward pass; only CUDA kernels read it
  Heads dout, dq, dk, dv;
  int64_t splits;  // set by attention_backward()
};

// KL(p || softmax of the indexer's scores, with relu) of each query over the keys that it selects; p is the
// mean over heads of e^(scale q.k - lse). A key named twice counts twice.
struct LossParams : AttentionParams {  // value_dim = 0 and no v; dtype is also of the index operands
  int64_t index_heads, index_dim;
  float index_scale;
  Heads index_q, index_k, weights;  // as q, k, weights of IndexerParams
  float const* lse;                 // [B, T, HQ]
  // What the forward pass leaves to the backward pass. [B, T]: log sum e^I and sum p of a query, 0 and -1
  // without any key; [1]: how many queries have one.
  float *log_sums, *masses, *rows;
};

struct LossForwardParams : LossParams {
  float* losses;  // [B, T]
  float* mean;    // over the queries that have a key, 0 without any
};

struct LossBackwardParams : LossParams {
  float const* dmean;
  Heads dq, dk, dweights;  // dweights may be null
};

namespace cpu {
// Floats of workspace for lightning_indexer() with the same parameters.
int64_t indexer_workspace(IndexerParams const& p, ThreadPool const& pool);
void lightning_indexer(IndexerParams const& p, float* workspace, ThreadPool const& pool);

int64_t attention_workspace(AttentionForwardParams const& p, ThreadPool const& pool);
void attention(AttentionForwardParams const& p, float* workspace, ThreadPool const& pool);
int64_t attention_backward_workspace(AttentionBackwardParams const& p, ThreadPool const& pool);
void attention_backward(AttentionBackwardParams const& p, float* workspace, ThreadPool const& pool);

int64_t loss_workspace(LossForwardParams const& p, ThreadPool const& pool);
void indexer_loss(LossForwardParams const& p, float* workspace, ThreadPool const& pool);
int64_t loss_backward_workspace(LossBackwardParams const& p, ThreadPool const& pool);
void indexer_loss_backward(LossBackwardParams const& p, float* workspace, ThreadPool const& pool);
}  // namespace cpu

// Hopper (sm_90a), asked before portable. supports() returns kOk or the rule that is broken; workspaces are
// in floats. The CUDA kernels clamp offsets to the tokens: wrong ones are memory-safe. Rows of attention are
// aligned to 16 bytes.
namespace sm90 {
Status indexer_supports(IndexerParams const& p);
int64_t indexer_workspace(IndexerParams const& p);
Status lightning_indexer(IndexerParams const& p, float* workspace, void* cuda_stream);
Status attention_supports(AttentionParams const& p);
int64_t attention_workspace(AttentionForwardParams const& p);
Status attention(AttentionForwardParams const& p, float* workspace, void* cuda_stream);
Status attention_backward_supports(AttentionBackwardParams const& p);
int64_t attention_backward_workspace(AttentionBackwardParams const& p);
Status attention_backward(AttentionBackwardParams const& p, float* workspace, void* cuda_stream);
Status loss_supports(LossParams const& p);
int64_t loss_workspace(LossForwardParams const& p);
Status indexer_loss(LossForwardParams const& p, float* workspace, void* cuda_stream);
int64_t loss_backward_workspace(LossBackwardParams const& p);
Status indexer_loss_backward(LossBackwardParams const& p, float* workspace, void* cuda_stream);
}  // namespace sm90

// Plain CUDA for any GPU that the build has code for.
namespace portable {
Status indexer_supports(IndexerParams const& p);
int64_t indexer_workspace(IndexerParams const& p);
Status lightning_indexer(IndexerParams const& p, float* workspace, void* cuda_stream);
Status pooled_indexer_supports(IndexerParams const& p);  // these three with pool > 0
int64_t pooled_indexer_workspace(IndexerParams const& p);
Status pooled_indexer(IndexerParams const& p, float* workspace, void* cuda_stream);
Status attention_supports(AttentionParams const& p);
int64_t attention_workspace(AttentionForwardParams const& p);
Status attention(AttentionForwardParams const& p, float* workspace, void* cuda_stream);
int64_t attention_backward_workspace(AttentionBackwardParams const& p);
Status attention_backward(AttentionBackwardParams const& p, float* workspace, void* cuda_stream);
Status loss_supports(LossParams const& p);
int64_t loss_workspace(LossForwardParams const& p);
Status indexer_loss(LossForwardParams const& p, float* workspace, void* cuda_stream);
int64_t loss_backward_workspace(LossBackwardParams const& p);
Status indexer_loss_backward(LossBackwardParams const& p, float* workspace, void* cuda_stream);
}  // namespace portable

}  // namespace lt2::dsa
