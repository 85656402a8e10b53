#include "block_ops/block_ops.h"

#include <tuple>

#include "bindings/steps.h"

namespace lt2 {
namespace {

using namespace block_ops;

void check_status(Status status) { STD_TORCH_CHECK(status == kOk, "lt2::block_ops: ", status); }

float const* floats(Tensor const& t) { return static_cast<float const*>(t.const_data_ptr()); }
float* mutable_floats(Tensor const& t) { return static_cast<float*>(t.mutable_data_ptr()); }

// A view of [.., D] as rows with a contiguous last axis; `copy` holds the data of a tensor that has none.
struct RowsOf {
  Tensor copy;
  Rows rows;

  explicit RowsOf(Tensor const& t) : copy(with_unit_last_stride(t)) {
    if (!two_strides(copy, rows)) {
      copy = torch::stable::contiguous(copy);
      two_strides(copy, rows);
    }
    rows.data = copy.const_data_ptr();
  }

  // The axes before the last one as an inner group with one stride, and the others with one stride.
  static bool two_strides(Tensor const& t, Rows& rows) {
    rows = {nullptr, 1, t.size(t.dim() - 1), 0};
    int64_t outer = 1;
    bool inside = true;
    for (int64_t i = t.dim() - 2; i >= 0; --i) {
      int64_t const size = t.size(i), stride = t.stride(i);
      if (size == 1) continue;
      if (inside && rows.inner == 1) {
        rows.inner = size;
        rows.stride = stride;
      } else if (inside && stride == rows.inner * rows.stride) {
        rows.inner *= size;
      } else if (outer == 1) {
        inside = false;
        rows.outer = stride;
        outer = size;
      } else if (stride == outer * rows.outer) {
        outer *= size;
      } else {
        return false;
      }
    }
    return true;
  }
};

// Of t [.., D].
Shape shape_of(Tensor const& t) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) rows *= t.size(i);
  return {kernel_dtype(t), rows, t.size(t.dim() - 1)};
}

#define CHECK_FIRST(op, t)                                                                       \
  STD_TORCH_CHECK((t).dim() >= 1, op ": " #t " must have shape [.., D], got ", shape_string(t)); \
  LT2_CHECK_ACTIVATION(op, t, #t)
#define CHECK_LIKE(op, t, first)                                                                        \
  STD_TORCH_CHECK(same_shape(t, first), op ": " #t " must have the shape of " #first " ",               \
                  shape_string(first), ", got ", shape_string(t));                                      \
  STD_TORCH_CHECK((t).scalar_type() == (first).scalar_type(),                                           \
                  op ": " #t " must have the dtype of " #first " (", dtype_name((first).scalar_type()), \
                  "), got ", dtype_name((t).scalar_type()));                                            \
  LT2_CHECK_SAME_DEVICE(op, t, first)
#define CHECK_VECTOR(op, t, size, rule, like) \
  LT2_CHECK_SHAPE(op, t, rule, size);         \
  LT2_CHECK_DTYPE(op, t, ScalarType::Float);  \
  LT2_CHECK_CONTIGUOUS(op, t);                \
  LT2_CHECK_SAME_DEVICE(op, t, like)

template <class Params>
Params with_shape(Shape const& shape) {
  Params p{};
  static_cast<Shape&>(p) = shape;
  return p;
}

template <class Run>
Tensor swiglu_with(Run const& run, Tensor const& gate, Tensor const& up) {
  CHECK_FIRST("lt2::swiglu", gate);
  CHECK_LIKE("lt2::swiglu", up, gate);
  RowsOf const gates(gate), ups(up);
  Tensor out = empty_as(gate);
  auto p = with_shape<SwigluParams>(shape_of(gate));
  p.gate = gates.rows;
  p.up = ups.rows;
  p.out = out.mutable_data_ptr();
  run(p);
  return out;
}

template <class Run>
std::tuple<Tensor, Tensor> swiglu_backward_with(Run const& run, Tensor const& dout, Tensor const& gate,
                                                Tensor const& up) {
  CHECK_FIRST("lt2::swiglu", gate);
  CHECK_LIKE("lt2::swiglu", up, gate);
  CHECK_LIKE("lt2::swiglu", dout, gate);
  RowsOf const douts(dout), gates(gate), ups(up);
  Tensor dgate = empty_as(gate), dup = empty_as(gate);
  auto p = with_shape<SwigluBackwardParams>(shape_of(gate));
  p.dout = douts.rows;
  p.gate = gates.rows;
  p.up = ups.rows;
  p.dgate = dgate.mutable_data_ptr();
  p.dup = dup.mutable_data_ptr();
  run(p);
  return {dgate, dup};
}

template <class Run>
std::tuple<Tensor, Tensor> gated_norm_with(Run const& run, Tensor const& o, Tensor const& z,
                                           Tensor const& weight, double eps) {
  CHECK_FIRST("lt2::gated_rmsnorm", o);
  CHECK_LIKE("lt2::gated_rmsnorm", z, o);
  auto p = with_shape<GatedNormParams>(shape_of(o));
  CHECK_VECTOR("lt2::gated_rmsnorm", weight, p.channels, "[D]", o);
  RowsOf const os(o), zs(z);
  Tensor out = empty_as(o), rstd = empty(o, {p.rows}, ScalarType::Float);
  p.o = os.rows;
  p.z = zs.rows;
  p.weight = floats(weight);
  p.eps = static_cast<float>(eps);
  p.out = out.mutable_data_ptr();
  p.rstd = mutable_floats(rstd);
  run(p);
  return {out, rstd};
}

template <class Run>
std::tuple<Tensor, Tensor, Tensor> gated_norm_backward_with(Run const& run, Tensor const& dout,
                                                            Tensor const& o, Tensor const& z,
                                                            Tensor const& rstd, Tensor const& weight) {
  CHECK_FIRST("lt2::gated_rmsnorm", o);
  CHECK_LIKE("lt2::gated_rmsnorm", z, o);
  CHECK_LIKE("lt2::gated_rmsnorm", dout, o);
  auto p = with_shape<GatedNormBackwardParams>(shape_of(o));
  CHECK_VECTOR("lt2::gated_rmsnorm", weight, p.channels, "[D]", o);
  CHECK_VECTOR("lt2::gated_rmsnorm", rstd, p.rows, "[rows]", o);
  RowsOf const douts(dout), os(o), zs(z);
  Tensor d_o = empty_as(o), dz = empty_as(o);
  Tensor dweight = empty(o, {p.channels}, ScalarType::Float);
  p.dout = douts.rows;
  p.o = os.rows;
  p.z = zs.rows;
  p.rstd = floats(rstd);
  p.weight = floats(weight);
  p.d_o = d_o.mutable_data_ptr();
  p.dz = dz.mutable_data_ptr();
  p.dweight = mutable_floats(dweight);
  run(p, o);
  return {d_o, dz, dweight};
}

#define OP "lt2::rope_cache_"

Heads heads_of(Tensor const& t) { return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

}  // namespace

RopeOperands rope_operands(Tensor const& k_cache, Tensor const& v_cache, Tensor const& q_any,
                           Tensor const& k_any, Tensor const& v_any, Tensor const& cos, Tensor const& sin,
                           Tensor const& places, OptionalTensor const& slots) {
  LT2_CHECK_DIM(OP, k_cache, 4);
  STD_TORCH_CHECK(q_any.dim() == 4, OP ": q must have shape [B, t, HQ, D], got ", shape_string(q_any));
  Tensor const q = with_unit_last_stride(q_any), k = with_unit_last_stride(k_any),
               v = with_unit_last_stride(v_any);
  LT2_CHECK_ACTIVATION(OP, q, "q");
  int64_t const B = q.size(0), t = q.size(1), D = q.size(3), H = k_cache.size(2);
  STD_TORCH_CHECK(D % 2 == 0, OP ": q must have an even D, got shape ", shape_string(q));
  LT2_CHECK_SHAPE(OP, k_cache, "[slots, S, H, D]", k_cache.size(0), k_cache.size(1), H, D);
  LT2_CHECK_SHAPE(OP, k, "[B, t, H, D]", B, t, H, D);
  LT2_CHECK_DIM(OP, v_cache, 4);
  int64_t const DV = v_cache.size(3);
  LT2_CHECK_SHAPE(OP, v_cache, "[slots, S, H, DV]", k_cache.size(0), k_cache.size(1), H, DV);
  LT2_CHECK_SHAPE(OP, v, "[B, t, H, DV]", B, t, H, DV);
  STD_TORCH_CHECK(DV % 2 == 0, OP ": v must have an even DV, got shape ", shape_string(v));
  for (auto const& [x, name] :
       {std::pair{&k, "k"}, {&v, "v"}, {&k_cache, "k_cache"}, {&v_cache, "v_cache"}}) {
    STD_TORCH_CHECK(x->scalar_type() == q.scalar_type(), OP ": ", name, " must have the dtype of q (",
                    dtype_name(q.scalar_type()), "), got ", dtype_name(x->scalar_type()));
    STD_TORCH_CHECK(x->device() == q.device(), OP ": ", name, " and q must be on one device");
    STD_TORCH_CHECK(x->size(3) <= 1 || x->stride(3) == 1, OP ": ", name, " must have a contiguous last axis");
  }
  int64_t const angle_rows = cos.dim() == 3 && cos.size(0) == 1 ? 1 : B;
  LT2_CHECK_SHAPE(OP, cos, "[B or 1, t, D / 2]", angle_rows, t, D / 2);
  LT2_CHECK_SHAPE(OP, sin, "[B or 1, t, D / 2]", angle_rows, t, D / 2);
  for (auto const& [x, name] : {std::pair{&cos, "cos"}, {&sin, "sin"}}) {
    STD_TORCH_CHECK(x->scalar_type() == ScalarType::Float, OP ": ", name, " must be float32, got ",
                    dtype_name(x->scalar_type()));
    STD_TORCH_CHECK(x->is_contiguous(), OP ": ", name, " must be contiguous, got shape ", shape_string(*x));
    STD_TORCH_CHECK(x->device() == q.device(), OP ": ", name, " and q must be on one device");
  }
  LT2_CHECK_SHAPE(OP, places, "[B, t]", B, t);
  LT2_CHECK_DTYPE(OP, places, ScalarType::Long);
  LT2_CHECK_CONTIGUOUS(OP, places);
  LT2_CHECK_SAME_DEVICE(OP, places, q);
  RopeCacheParams p{};
  if (slots) {
    STD_TORCH_CHECK(has_shape(*slots, {B}) && slots->is_contiguous() &&
                        slots->scalar_type() == ScalarType::Long && slots->device() == q.device(),
                    OP ": slots must be contiguous int64 of shape [B] = [", B, "] on the device of q, got ",
                    dtype_name(slots->scalar_type()), " ", shape_string(*slots));
    p.slot_ids = static_cast<int64_t const*>(slots->const_data_ptr());
  }
  Tensor q_out = empty(q, {B, t, q.size(2), D}, q.scalar_type());
  p.dtype = kernel_dtype(q);
  p.batch = B;
  p.tokens = t;
  p.slots = k_cache.size(0);
  p.capacity = k_cache.size(1);
  p.query_heads = static_cast<int>(q.size(2));
  p.heads = static_cast<int>(H);
  p.dim = static_cast<int>(D);
  p.value_dim = static_cast<int>(DV);
  p.q = heads_of(q);
  p.k = heads_of(k);
  p.v = heads_of(v);
  p.k_cache = heads_of(k_cache);
  p.v_cache = heads_of(v_cache);
  p.cos = floats(cos);
  p.sin = floats(sin);
  p.angle_row = angle_rows == 1 ? 0 : t * D / 2;
  p.places = static_cast<int64_t const*>(places.const_data_ptr());
  p.q_out = q_out.mutable_data_ptr();
  return {q, k, v, q_out, p};
}

void run_rope(RopeOperands const& x) {
  if (!x.q.is_cuda()) return cpu::rope_cache(x.p, torch_pool());
  torch::stable::accelerator::DeviceGuard const guard(x.q.get_device_index());
  check_status(portable::rope_cache(x.p, current_cuda_stream(x.q)));
}

namespace {

Tensor swiglu_cpu(Tensor const& gate, Tensor const& up) {
  return swiglu_with([](SwigluParams const& p) { cpu::swiglu(p, torch_pool()); }, gate, up);
}

std::tuple<Tensor, Tensor> swiglu_backward_cpu(Tensor const& dout, Tensor const& gate, Tensor const& up) {
  return swiglu_backward_with([](SwigluBackwardParams const& p) { cpu::swiglu_backward(p, torch_pool()); },
                              dout, gate, up);
}

std::tuple<Tensor, Tensor> gated_norm_cpu(Tensor const& o, Tensor const& z, Tensor const& weight,
                                          double eps) {
  return gated_norm_with([](GatedNormParams const& p) { cpu::gated_norm(p, torch_pool()); }, o, z, weight,
                         eps);
}

std::tuple<Tensor, Tensor, Tensor> gated_norm_backward_cpu(Tensor const& dout, Tensor const& o,
                                                           Tensor const& z, Tensor const& rstd,
                                                           Tensor const& weight) {
  auto const run = [](GatedNormBackwardParams const& p, Tensor const& like) {
    Tensor const w = empty(like, {cpu::gated_norm_backward_workspace(p)}, ScalarType::Float);
    cpu::gated_norm_backward(p, mutable_floats(w), torch_pool());
  };
  return gated_norm_backward_with(run, dout, o, z, rstd, weight);
}

using Guard = torch::stable::accelerator::DeviceGuard;

Tensor swiglu_cuda(Tensor const& gate, Tensor const& up) {
  Guard const guard(gate.get_device_index());
  auto const run = [&](SwigluParams const& p) {
    check_status(portable::swiglu(p, current_cuda_stream(gate)));
  };
  return swiglu_with(run, gate, up);
}

std::tuple<Tensor, Tensor> swiglu_backward_cuda(Tensor const& dout, Tensor const& gate, Tensor const& up) {
  Guard const guard(gate.get_device_index());
  auto const run = [&](SwigluBackwardParams const& p) {
    check_status(portable::swiglu_backward(p, current_cuda_stream(gate)));
  };
  return swiglu_backward_with(run, dout, gate, up);
}

void check_gated_norm(Shape const& p) {
  Status const status = portable::gated_norm_supports(p);
  STD_TORCH_CHECK(status == kOk, "lt2::gated_rmsnorm: ", status, ", got D = ", p.channels);
}

std::tuple<Tensor, Tensor> gated_norm_cuda(Tensor const& o, Tensor const& z, Tensor const& weight,
                                           double eps) {
  Guard const guard(o.get_device_index());
  auto const run = [&](GatedNormParams const& p) {
    check_gated_norm(p);
    check_status(portable::gated_norm(p, current_cuda_stream(o)));
  };
  return gated_norm_with(run, o, z, weight, eps);
}

std::tuple<Tensor, Tensor, Tensor> gated_norm_backward_cuda(Tensor const& dout, Tensor const& o,
                                                            Tensor const& z, Tensor const& rstd,
                                                            Tensor const& weight) {
  Guard const guard(o.get_device_index());
  auto const run = [](GatedNormBackwardParams const& p, Tensor const& like) {
    check_gated_norm(p);
    Tensor const w = empty(like, {portable::gated_norm_backward_workspace(p)}, ScalarType::Float);
    check_status(portable::gated_norm_backward(p, mutable_floats(w), current_cuda_stream(like)));
  };
  return gated_norm_backward_with(run, dout, o, z, rstd, weight);
}

}  // namespace

Tensor rope_cache_(Tensor const& k_cache, Tensor const& v_cache, Tensor const& q, Tensor const& k,
                   Tensor const& v, Tensor const& cos, Tensor const& sin, Tensor const& places,
                   OptionalTensor const& slots) {
  RopeOperands const x = rope_operands(k_cache, v_cache, q, k, v, cos, sin, places, slots);
  run_rope(x);
  return x.q_out;
}

STABLE_TORCH_LIBRARY_IMPL(lt2, CPU, m) {
  m.impl("swiglu_fwd", TORCH_BOX(&swiglu_cpu));
  m.impl("swiglu_bwd", TORCH_BOX(&swiglu_backward_cpu));
  m.impl("gated_rmsnorm_fwd", TORCH_BOX(&gated_norm_cpu));
  m.impl("gated_rmsnorm_bwd", TORCH_BOX(&gated_norm_backward_cpu));
  m.impl("rope_cache_", TORCH_BOX(&rope_cache_));
}

STABLE_TORCH_LIBRARY_IMPL(lt2, CUDA, m) {
  m.impl("swiglu_fwd", TORCH_BOX(&swiglu_cuda));
  m.impl("swiglu_bwd", TORCH_BOX(&swiglu_backward_cuda));
  m.impl("gated_rmsnorm_fwd", TORCH_BOX(&gated_norm_cuda));
  m.impl("gated_rmsnorm_bwd", TORCH_BOX(&gated_norm_backward_cuda));
  m.impl("rope_cache_", TORCH_BOX(&rope_cache_));
}

}  // namespace lt2
