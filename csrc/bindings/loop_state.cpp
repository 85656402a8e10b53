#include "loop_state/loop_state.h"

#include <tuple>

#include "bindings/steps.h"

namespace lt2 {
namespace {

using namespace loop_state;

void check_status(Status status) { STD_TORCH_CHECK(status == kOk, "lt2::loop_state: ", status); }

float const* floats(Tensor const& t) { return static_cast<float const*>(t.const_data_ptr()); }
float* mutable_floats(Tensor const& t) { return static_cast<float*>(t.mutable_data_ptr()); }
int64_t const* ints(Tensor const& t) { return static_cast<int64_t const*>(t.const_data_ptr()); }

Tensor workspace(Tensor const& like, int64_t size, ScalarType dtype = ScalarType::Float) {
  return empty(like, {size}, dtype);
}

#define OP "lt2::loop_residual"

// Activation [.., D].
Shape shape_of(Tensor const& h) {
  STD_TORCH_CHECK(h.dim() >= 1, OP ": h must have shape [.., D], got ", shape_string(h));
  LT2_CHECK_ACTIVATION(OP, h, "h");
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < h.dim(); ++i) rows *= h.size(i);
  return {kernel_dtype(h), rows, h.size(h.dim() - 1)};
}

Tensor checked_like(Tensor const& t, Tensor const& h, char const* name) {
  STD_TORCH_CHECK(same_shape(t, h), OP ": ", name, " must have the shape of h ", shape_string(h), ", got ",
                  shape_string(t));
  STD_TORCH_CHECK(t.scalar_type() == h.scalar_type(), OP ": ", name, " must have the dtype of h (",
                  dtype_name(h.scalar_type()), "), got ", dtype_name(t.scalar_type()));
  STD_TORCH_CHECK(t.device() == h.device(), OP ": ", name, " and h must be on one device");
  return torch::stable::contiguous(t);
}

float const* checked_vector(Tensor const& t, Tensor const& h, int64_t size, char const* name) {
  STD_TORCH_CHECK(has_shape(t, {size}) && t.is_contiguous(), OP ": ", name, " must be contiguous of shape [",
                  size, "], got ", shape_string(t));
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, OP ": ", name, " must be float32, got ",
                  dtype_name(t.scalar_type()));
  STD_TORCH_CHECK(t.device() == h.device(), OP ": ", name, " and h must be on one device");
  return floats(t);
}

template <class Run>
Tensor residual_with(Run const& run, Tensor const& h_any, Tensor const& h_in_any, Tensor const& rho) {
  Shape const shape = shape_of(h_any);
  Tensor const h = torch::stable::contiguous(h_any), h_in = checked_like(h_in_any, h_any, "h_in");
  Tensor out = empty_as(h);
  run(ResidualParams{shape, h.const_data_ptr(), h_in.const_data_ptr(),
                     checked_vector(rho, h, shape.channels, "rho"), out.mutable_data_ptr()});
  return out;
}

template <class Run>
std::tuple<Tensor, Tensor> residual_backward_with(Run const& run, Tensor const& dout_any,
                                                  Tensor const& h_in_any, Tensor const& rho) {
  Shape const shape = shape_of(h_in_any);
  Tensor const h_in = torch::stable::contiguous(h_in_any), dout = checked_like(dout_any, h_in_any, "dout");
  Tensor dh_in = empty_as(h_in), drho = empty(h_in, {shape.channels}, ScalarType::Float);
  run(ResidualBackwardParams{shape, dout.const_data_ptr(), h_in.const_data_ptr(),
                             checked_vector(rho, h_in, shape.channels, "rho"), dh_in.mutable_data_ptr(),
                             mutable_floats(drho)},
      h_in);
  return {dh_in, drho};
}

template <class Run>
std::tuple<Tensor, Tensor, Tensor> residual_norm_with(Run const& run, Tensor const& h_any,
                                                      Tensor const& h_in_any, OptionalTensor const& rho,
                                                      Tensor const& weight, double eps) {
  Shape const shape = shape_of(h_any);
  Tensor const h = torch::stable::contiguous(h_any), h_in = checked_like(h_in_any, h_any, "h_in");
  Tensor out = empty_as(h), normed = empty_as(h);
  Tensor rstd = empty(h, {shape.rows}, ScalarType::Float);
  ResidualNormParams p{};
  static_cast<Shape&>(p) = shape;
  p.h = h.const_data_ptr();
  p.h_in = h_in.const_data_ptr();
  if (rho) p.rho = checked_vector(*rho, h, shape.channels, "rho");
  p.out = out.mutable_data_ptr();
  p.weight = checked_vector(weight, h, shape.channels, "weight");
  p.eps = static_cast<float>(eps);
  p.normed = normed.mutable_data_ptr();
  p.rstd = mutable_floats(rstd);
  run(p);
  return {out, normed, rstd};
}

template <class Run>
std::tuple<Tensor, Tensor, Tensor, Tensor> residual_norm_backward_with(
    Run const& run, Tensor const& dh_out_any, Tensor const& dnormed_any, Tensor const& h_out_any,
    Tensor const& rstd, OptionalTensor const& h_in_any, OptionalTensor const& rho, Tensor const& weight) {
  Shape const shape = shape_of(h_out_any);
  STD_TORCH_CHECK(h_in_any.has_value() == rho.has_value(), OP ": h_in must be given with rho only, got ",
                  h_in_any ? "h_in without rho" : "rho without h_in");
  Tensor const h_out = torch::stable::contiguous(h_out_any);
  Tensor const dh_out = checked_like(dh_out_any, h_out_any, "dh_out");
  Tensor const dnormed = checked_like(dnormed_any, h_out_any, "dnormed");
  OptionalTensor const h_in = rho ? OptionalTensor(checked_like(*h_in_any, h_out_any, "h_in")) : std::nullopt;
  Tensor dh = empty_as(h_out);
  Tensor dh_in = rho ? empty_as(h_out) : empty(h_out, {0}, h_out.scalar_type());
  Tensor drho = empty(h_out, {rho ? shape.channels : 0}, ScalarType::Float);
  Tensor dweight = empty(h_out, {shape.channels}, ScalarType::Float);
  ResidualNormBackwardParams p{};
  static_cast<Shape&>(p) = shape;
  p.dh_out = dh_out.const_data_ptr();
  p.dnormed = dnormed.const_data_ptr();
  p.h_out = h_out.const_data_ptr();
  p.rstd = checked_vector(rstd, h_out, shape.rows, "rstd");
  p.weight = checked_vector(weight, h_out, shape.channels, "weight");
  p.dh = dh.mutable_data_ptr();
  if (rho) {
    p.h_in = h_in->const_data_ptr();
    p.rho = checked_vector(*rho, h_out, shape.channels, "rho");
    p.dh_in = dh_in.mutable_data_ptr();
    p.drho = mutable_floats(drho);
  }
  p.dweight = mutable_floats(dweight);
  run(p, h_out);
  return {dh, dh_in, drho, dweight};
}

#undef OP
#define OP "lt2::loop_decode_attention"

Cache cache_of(Tensor const& t) {
  int64_t const first = t.dim() - 4;  // 1 with a loop axis
  return {t.const_data_ptr(), first == 1 ? t.stride(0) : 0, t.stride(first), t.stride(first + 1),
          t.stride(first + 2)};
}

int64_t const* checked_rows(Tensor const& t, Tensor const& q, char const* name) {
  STD_TORCH_CHECK(has_shape(t, {q.size(0)}) && t.is_contiguous(), OP ": ", name,
                  " must be contiguous of shape [B] = [", q.size(0), "], got ", shape_string(t));
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long, OP ": ", name, " must be int64, got ",
                  dtype_name(t.scalar_type()));
  STD_TORCH_CHECK(t.device() == q.device(), OP ": ", name, " and q must be on one device");
  return ints(t);
}

template <class Run>
Tensor decode_with(Run const& run, Tensor const& q_any, Tensor const& k_cache, Tensor const& v_cache,
                   Tensor const& lengths, OptionalTensor const& slots, OptionalTensor const& indices,
                   OptionalTensor const& loop_map, double scale) {
  STD_TORCH_CHECK(q_any.dim() == 4, OP ": q must have shape [B, t, HQ, D], got ", shape_string(q_any));
  Tensor const q = torch::stable::contiguous(q_any);
  LT2_CHECK_ACTIVATION(OP, q, "q");
  int64_t const axes = loop_map ? 5 : 4, first = axes - 4;
  for (auto const& [cache, name] : {std::pair{&k_cache, "k_cache"}, std::pair{&v_cache, "v_cache"}}) {
    STD_TORCH_CHECK(cache->dim() == axes, OP ": ", name, " must have ", axes, " dimensions ",
                    loop_map ? "with" : "without", " loop_map, got shape ", shape_string(*cache));
    STD_TORCH_CHECK(cache->scalar_type() == q.scalar_type(), OP ": ", name, " must have the dtype of q (",
                    dtype_name(q.scalar_type()), "), got ", dtype_name(cache->scalar_type()));
    STD_TORCH_CHECK(cache->size(axes - 1) <= 1 || cache->stride(axes - 1) == 1, OP ": ", name,
                    " must have a contiguous last axis");
    STD_TORCH_CHECK(cache->device() == q.device(), OP ": ", name, " and q must be on one device");
    for (int64_t i = 0; i + 1 < axes; ++i) {
      STD_TORCH_CHECK(cache->size(i) == k_cache.size(i), OP ": v_cache must have the shape of k_cache ",
                      shape_string(k_cache), " but for the last axis, got ", shape_string(v_cache));
    }
  }
  int64_t const heads = k_cache.size(first + 2);
  STD_TORCH_CHECK(k_cache.size(first + 3) == q.size(3), OP ": k_cache must have head dimension ", q.size(3),
                  ", got shape ", shape_string(k_cache));
  STD_TORCH_CHECK(heads > 0 && q.size(2) % heads == 0, OP ": q must have a multiple of ", heads,
                  " heads, got shape ", shape_string(q));
  STD_TORCH_CHECK(has_shape(lengths, {q.size(0)}) && lengths.is_contiguous(),
                  OP ": lengths must be contiguous of shape [B] = [", q.size(0), "], got ",
                  shape_string(lengths));
  bool const wide = lengths.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(wide || lengths.scalar_type() == ScalarType::Int,
                  OP ": lengths must be int32 or int64, got ", dtype_name(lengths.scalar_type()));
  LT2_CHECK_SAME_DEVICE(OP, lengths, q);

  Tensor o = empty(q, {q.size(0), q.size(1), q.size(2), v_cache.size(first + 3)}, q.scalar_type());
  DecodeParams p{};
  p.dtype = kernel_dtype(q);
  p.batch = q.size(0);
  p.tokens = q.size(1);
  p.capacity = k_cache.size(first + 1);
  p.slots = k_cache.size(first);
  p.loops = loop_map ? k_cache.size(0) : 1;
  p.query_heads = static_cast<int>(q.size(2));
  p.heads = static_cast<int>(heads);
  p.key_dim = static_cast<int>(q.size(3));
  p.value_dim = static_cast<int>(o.size(3));
  p.scale = static_cast<float>(scale);
  p.q = q.const_data_ptr();
  p.k = cache_of(k_cache);
  p.v = cache_of(v_cache);
  p.lengths = lengths.const_data_ptr();
  p.lengths_int64 = wide;
  if (slots) p.slot_ids = checked_rows(*slots, q, "slots");
  if (loop_map) p.loop_map = checked_rows(*loop_map, q, "loop_map");
  if (indices) {
    STD_TORCH_CHECK(indices->dim() == 3 && indices->size(0) == p.batch && indices->size(1) == p.tokens &&
                        indices->is_contiguous(),
                    OP ": indices must be contiguous of shape [B, t, topk] = [", p.batch, ", ", p.tokens,
                    ", topk], got ", shape_string(*indices));
    STD_TORCH_CHECK(indices->scalar_type() == ScalarType::Int, OP ": indices must be int32, got ",
                    dtype_name(indices->scalar_type()));
    STD_TORCH_CHECK(indices->device() == q.device(), OP ": indices and q must be on one device");
    p.indices = static_cast<int32_t const*>(indices->const_data_ptr());
    p.topk = indices->size(2);
  }
  p.o = o.mutable_data_ptr();
  run(p, q);
  return o;
}

#undef OP
#define OP "lt2::loop_state"

// Inside a slot: a contiguous tail, and before it axes that are one axis with one stride.
Pool pool_of(Tensor const& state) {
  STD_TORCH_CHECK(state.dim() >= 1, OP ": state must have shape [slots, ..], got ", shape_string(state));
  int64_t const bytes = static_cast<int64_t>(state.element_size());
  Pool pool{static_cast<char*>(state.data_ptr()), state.size(0), state.stride(0) * bytes, 1, 0, bytes};
  STD_TORCH_CHECK(state.size(0) <= 1 || pool.slot_stride != 0, OP ": the slots of state must not overlap");
  bool tail = true;
  for (int64_t i = state.dim() - 1; i > 0; --i) {
    int64_t const size = state.size(i), stride = state.stride(i) * bytes;
    if (size == 1) continue;
    if (tail && stride == pool.row_bytes) {
      pool.row_bytes *= size;
      continue;
    }
    STD_TORCH_CHECK(tail || stride == pool.row_stride * pool.rows,
                    OP ": state may have one strided axis inside a slot before contiguous ones, got shape ",
                    shape_string(state));
    if (tail) pool.row_stride = stride;
    tail = false;
    pool.rows *= size;
  }
  return pool;
}

int64_t const* checked_ids(Tensor const& ids, Tensor const& state, int64_t count, char const* name) {
  STD_TORCH_CHECK(has_shape(ids, {count}) && ids.is_contiguous(), OP ": ", name,
                  " must be contiguous of shape [", count, "], got ", shape_string(ids));
  STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Long, OP ": ", name, " must be int64, got ",
                  dtype_name(ids.scalar_type()));
  STD_TORCH_CHECK(ids.device() == state.device(), OP ": ", name, " and state must be on one device");
  return ints(ids);
}

ZeroParams zero_params(Tensor const& state, Tensor const& slots) {
  int64_t const count = slots.numel();
  return {pool_of(state), count, checked_ids(slots, state, count, "slots")};
}

CopyParams copy_params(Tensor const& state, Tensor const& src, Tensor const& dst) {
  int64_t const count = src.numel();
  return {pool_of(state), count, checked_ids(src, state, count, "src"),
          checked_ids(dst, state, count, "dst")};
}

#undef OP

Tensor residual_cpu(Tensor const& h, Tensor const& h_in, Tensor const& rho) {
  return residual_with([](ResidualParams const& p) { cpu::residual(p, torch_pool()); }, h, h_in, rho);
}

std::tuple<Tensor, Tensor> residual_backward_cpu(Tensor const& dout, Tensor const& h_in, Tensor const& rho) {
  auto const run = [](ResidualBackwardParams const& p, Tensor const& like) {
    Tensor const w = workspace(like, cpu::residual_backward_workspace(p));
    cpu::residual_backward(p, mutable_floats(w), torch_pool());
  };
  return residual_backward_with(run, dout, h_in, rho);
}

std::tuple<Tensor, Tensor, Tensor> residual_norm_cpu(Tensor const& h, Tensor const& h_in,
                                                     OptionalTensor const& rho, Tensor const& weight,
                                                     double eps) {
  auto const run = [](ResidualNormParams const& p) { cpu::residual_norm(p, torch_pool()); };
  return residual_norm_with(run, h, h_in, rho, weight, eps);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_norm_backward_cpu(
    Tensor const& dh_out, Tensor const& dnormed, Tensor const& h_out, Tensor const& rstd,
    OptionalTensor const& h_in, OptionalTensor const& rho, Tensor const& weight) {
  auto const run = [](ResidualNormBackwardParams const& p, Tensor const& like) {
    Tensor const w = workspace(like, cpu::residual_norm_backward_workspace(p));
    cpu::residual_norm_backward(p, mutable_floats(w), torch_pool());
  };
  return residual_norm_backward_with(run, dh_out, dnormed, h_out, rstd, h_in, rho, weight);
}

Tensor decode_cpu(Tensor const& q, Tensor const& k_cache, Tensor const& v_cache, Tensor const& lengths,
                  OptionalTensor const& slots, OptionalTensor const& indices, OptionalTensor const& loop_map,
                  double scale) {
  auto const run = [](DecodeParams const& p, Tensor const& like) {
    ThreadPool const pool = torch_pool();
    Tensor const w = workspace(like, cpu::decode_workspace(p, pool));
    cpu::decode(p, mutable_floats(w), pool);
  };
  return decode_with(run, q, k_cache, v_cache, lengths, slots, indices, loop_map, scale);
}

void zero_cpu(Tensor const& state, Tensor const& slots) {
  cpu::zero(zero_params(state, slots), torch_pool());
}

void copy_cpu(Tensor const& state, Tensor const& src, Tensor const& dst) {
  CopyParams const p = copy_params(state, src, dst);
  Tensor const w = workspace(state, cpu::copy_workspace(p), ScalarType::Byte);
  cpu::copy(p, static_cast<char*>(w.mutable_data_ptr()), torch_pool());
}

using Guard = torch::stable::accelerator::DeviceGuard;

void check_channels(Shape const& p) {
  Status const status = portable::supports(p);
  STD_TORCH_CHECK(status == kOk, "lt2::loop_residual: ", status, ", got D = ", p.channels);
}

Tensor residual_cuda(Tensor const& h, Tensor const& h_in, Tensor const& rho) {
  Guard const guard(h.get_device_index());
  auto const run = [&](ResidualParams const& p) {
    check_channels(p);
    check_status(portable::residual(p, current_cuda_stream(h)));
  };
  return residual_with(run, h, h_in, rho);
}

std::tuple<Tensor, Tensor> residual_backward_cuda(Tensor const& dout, Tensor const& h_in, Tensor const& rho) {
  Guard const guard(h_in.get_device_index());
  auto const run = [](ResidualBackwardParams const& p, Tensor const& like) {
    check_channels(p);
    Tensor const w = workspace(like, portable::residual_backward_workspace(p));
    check_status(portable::residual_backward(p, mutable_floats(w), current_cuda_stream(like)));
  };
  return residual_backward_with(run, dout, h_in, rho);
}

std::tuple<Tensor, Tensor, Tensor> residual_norm_cuda(Tensor const& h, Tensor const& h_in,
                                                      OptionalTensor const& rho, Tensor const& weight,
                                                      double eps) {
  Guard const guard(h.get_device_index());
  auto const run = [&](ResidualNormParams const& p) {
    check_channels(p);
    check_status(portable::residual_norm(p, current_cuda_stream(h)));
  };
  return residual_norm_with(run, h, h_in, rho, weight, eps);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_norm_backward_cuda(
    Tensor const& dh_out, Tensor const& dnormed, Tensor const& h_out, Tensor const& rstd,
    OptionalTensor const& h_in, OptionalTensor const& rho, Tensor const& weight) {
  Guard const guard(h_out.get_device_index());
  auto const run = [](ResidualNormBackwardParams const& p, Tensor const& like) {
    check_channels(p);
    Tensor const w = workspace(like, portable::residual_norm_backward_workspace(p));
    check_status(portable::residual_norm_backward(p, mutable_floats(w), current_cuda_stream(like)));
  };
  return residual_norm_backward_with(run, dh_out, dnormed, h_out, rstd, h_in, rho, weight);
}

Tensor decode_cuda(Tensor const& q, Tensor const& k_cache, Tensor const& v_cache, Tensor const& lengths,
                   OptionalTensor const& slots, OptionalTensor const& indices, OptionalTensor const& loop_map,
                   double scale) {
  Guard const guard(q.get_device_index());
  auto const run = [](DecodeParams const& p, Tensor const& like) {
    if (sm90::supports(p) == kOk) return check_status(sm90::decode(p, current_cuda_stream(like)));
    Status const status = portable::supports(p);
    STD_TORCH_CHECK(status == kOk, "lt2::loop_decode_attention: ", status, ", got D = ", p.key_dim,
                    ", DV = ", p.value_dim);
    Tensor const w = workspace(like, portable::decode_workspace(p));
    check_status(portable::decode(p, mutable_floats(w), current_cuda_stream(like)));
  };
  return decode_with(run, q, k_cache, v_cache, lengths, slots, indices, loop_map, scale);
}

void zero_cuda(Tensor const& state, Tensor const& slots) {
  Guard const guard(state.get_device_index());
  check_status(portable::zero(zero_params(state, slots), current_cuda_stream(state)));
}

void copy_cuda(Tensor const& state, Tensor const& src, Tensor const& dst) {
  Guard const guard(state.get_device_index());
  CopyParams const p = copy_params(state, src, dst);
  Tensor const w = workspace(state, portable::copy_workspace(p), ScalarType::Byte);
  check_status(portable::copy(p, static_cast<char*>(w.mutable_data_ptr()), current_cuda_stream(state)));
}

}  // namespace

Tensor loop_decode_attention(Tensor const& q, Tensor const& k_cache, Tensor const& v_cache,
                             Tensor const& lengths, OptionalTensor const& slots,
                             OptionalTensor const& indices, OptionalTensor const& loop_map, double scale) {
  return (q.is_cuda() ? decode_cuda : decode_cpu)(q, k_cache, v_cache, lengths, slots, indices, loop_map,
                                                  scale);
}

STABLE_TORCH_LIBRARY_IMPL(lt2, CPU, m) {
  m.impl("loop_residual_fwd", TORCH_BOX(&residual_cpu));
  m.impl("loop_residual_bwd", TORCH_BOX(&residual_backward_cpu));
  m.impl("loop_residual_rmsnorm_fwd", TORCH_BOX(&residual_norm_cpu));
  m.impl("loop_residual_rmsnorm_bwd", TORCH_BOX(&residual_norm_backward_cpu));
  m.impl("loop_decode_attention", TORCH_BOX(&loop_decode_attention));
  m.impl("loop_state_zero_", TORCH_BOX(&zero_cpu));
  m.impl("loop_state_copy_", TORCH_BOX(&copy_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(lt2, CUDA, m) {
  m.impl("loop_residual_fwd", TORCH_BOX(&residual_cuda));
  m.impl("loop_residual_bwd", TORCH_BOX(&residual_backward_cuda));
  m.impl("loop_residual_rmsnorm_fwd", TORCH_BOX(&residual_norm_cuda));
  m.impl("loop_residual_rmsnorm_bwd", TORCH_BOX(&residual_norm_backward_cuda));
  m.impl("loop_decode_attention", TORCH_BOX(&loop_decode_attention));
  m.impl("loop_state_zero_", TORCH_BOX(&zero_cuda));
  m.impl("loop_state_copy_", TORCH_BOX(&copy_cuda));
}

}  // namespace lt2
