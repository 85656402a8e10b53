#include "common/cuda/overlap.cuh"
#include "dsa/cuda/sm90/indexer_launch.h"

namespace lt2::dsa::sm90 {
namespace {

bool in_pieces_of_16_bytes(void const* data, int64_t size, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && (size <= 1 || (stride > 0 && stride % 8 == 0));
}

}  // namespace

Status indexer_supports(IndexerParams const& p) {
  if (p.dtype == Dtype::kFloat32) return "the Hopper kernels take bfloat16 and float16";
  if (p.dim != 64 && p.dim != 128) return "the Hopper kernels take DI = 64 or 128";
  if (p.heads > 16) return "the Hopper kernels take HI in 1..16";
  if (!(p.scale > 0)) return "the Hopper kernels take a positive scale";
  if (p.batch == 0 || p.tokens == 0 || p.keys == 0)
    return "the Hopper kernels take at least one query and key";
  if (p.keys > INT32_MAX / 2) return "the Hopper kernels take S up to 2^30";
  if (p.batch > INT32_MAX) return "the Hopper kernels take B up to 2^31 - 1";
  for (Heads const& x : {p.q, p.k}) {
    bool const q = x.data == p.q.data;
    if (!in_pieces_of_16_bytes(x.data, p.batch, x.batch) ||
        !in_pieces_of_16_bytes(x.data, q ? p.tokens : p.keys, x.token) ||
        !in_pieces_of_16_bytes(x.data, q ? p.heads : 1, x.head)) {
      return "the Hopper kernels take q_idx, k_idx with strides of multiples of 8 elements";
    }
  }
  return cuda::runs_sm90_code() ? kOk : "the Hopper kernels need compute capability 9.0";
}

int64_t indexer_workspace(IndexerParams const& p) {
  return p.dtype == Dtype::kFloat16 ? indexer::workspace<Dtype::kFloat16>(p)
                                    : indexer::workspace<Dtype::kBFloat16>(p);
}

Status lightning_indexer(IndexerParams const& p, float* workspace, void* stream) {
  return p.dtype == Dtype::kFloat16 ? indexer::run<Dtype::kFloat16>(p, workspace, stream)
                                    : indexer::run<Dtype::kBFloat16>(p, workspace, stream);
}

}  // namespace lt2::dsa::sm90
