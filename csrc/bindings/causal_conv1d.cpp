#include "causal_conv1d/causal_conv1d.h"

#include "bindings/tensor.h"

namespace lt2 {
namespace {

using namespace causal_conv1d;

#define OP "lt2::causal_conv1d"

Tokens tokens_of(Tensor const& x) { return {x.data_ptr(), x.stride(0), x.stride(1)}; }
State state_of(Tensor const& s) { return {s.data_ptr(), s.stride(0), s.stride(1), s.stride(2)}; }
float const* floats(OptionalTensor const& t) {
  return t ? static_cast<float const*>(t->const_data_ptr()) : nullptr;
}

void check_tokens(Tensor const& x) {
  LT2_CHECK_DIM(OP, x, 3);
  bool const half_ok = x.scalar_type() == ScalarType::Half && x.is_cuda();
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16 || half_ok,
                  OP ": x must be float32 or bfloat16 (or float16 on CUDA), got ",
                  dtype_name(x.scalar_type()));
}

void check_taps(Tensor const& x, Tensor const& weight, OptionalTensor const& optional_bias) {
  LT2_CHECK_DIM(OP, weight, 2);
  LT2_CHECK_SHAPE(OP, weight, "[D, W]", x.size(2), weight.size(1));
  STD_TORCH_CHECK(weight.size(1) >= 1 && weight.size(1) <= kMaxWidth,
                  OP ": weight must have 1 <= W <= ", kMaxWidth, ", got shape ", shape_string(weight));
  LT2_CHECK_DTYPE(OP, weight, ScalarType::Float);
  LT2_CHECK_CONTIGUOUS(OP, weight);
  LT2_CHECK_SAME_DEVICE(OP, weight, x);
  if (!optional_bias) return;
  Tensor const& bias = *optional_bias;
  LT2_CHECK_SHAPE(OP, bias, "[D]", x.size(2));
  LT2_CHECK_DTYPE(OP, bias, ScalarType::Float);
  LT2_CHECK_CONTIGUOUS(OP, bias);
  LT2_CHECK_SAME_DEVICE(OP, bias, x);
}

void check_state(Tensor const& state, Tensor const& x, int64_t sequences, int64_t width) {
  LT2_CHECK_SHAPE(OP, state, "[N, D, W]", sequences, x.size(2), width);
  LT2_CHECK_DTYPE(OP, state, x.scalar_type());
  LT2_CHECK_SAME_DEVICE(OP, state, x);
}

// The kernels trust the offsets, so on the CPU their values are checked here.
template <class Int>
void check_offsets(Int const* offsets, int64_t sequences, int64_t tokens) {
  for (int64_t i = 0; i <= sequences; ++i) {
    int64_t const lowest = i == 0 ? 0 : offsets[i - 1];
    STD_TORCH_CHECK(offsets[i] >= lowest && offsets[i] <= tokens,
                    OP ": cu_seqlens must ascend within [0, T = ", tokens, "], got ", offsets[i],
                    " at position ", i);
  }
}

Inputs inputs_of(Tensor const& x, Tensor const& weight, OptionalTensor const& bias,
                 OptionalTensor const& initial_state, OptionalTensor const& cu_seqlens, bool silu) {
  check_tokens(x);
  check_taps(x, weight, bias);
  Inputs p{};
  p.dtype = kernel_dtype(x);
  p.batch = x.size(0);
  p.tokens = x.size(1);
  p.channels = x.size(2);
  p.sequences = p.batch;
  p.width = static_cast<int>(weight.size(1));
  p.silu = silu;
  p.x = tokens_of(x);
  p.weight = static_cast<float const*>(weight.const_data_ptr());
  p.bias = floats(bias);
  if (cu_seqlens) {
    Tensor const& offsets = *cu_seqlens;
    STD_TORCH_CHECK(p.batch == 1, OP ": x must have B = 1 with cu_seqlens, got shape ", shape_string(x));
    STD_TORCH_CHECK(offsets.dim() == 1 && offsets.size(0) >= 1,
                    OP ": cu_seqlens must have shape [N + 1], got ", shape_string(offsets));
    p.cu_seqlens_int64 = offsets.scalar_type() == ScalarType::Long;
    STD_TORCH_CHECK(p.cu_seqlens_int64 || offsets.scalar_type() == ScalarType::Int,
                    OP ": cu_seqlens must be int32 or int64, got ", dtype_name(offsets.scalar_type()));
    LT2_CHECK_CONTIGUOUS(OP, offsets);
    LT2_CHECK_SAME_DEVICE(OP, offsets, x);
    p.sequences = offsets.size(0) - 1;
    p.cu_seqlens = offsets.const_data_ptr();
    if (x.is_cpu() && p.cu_seqlens_int64)
      check_offsets(static_cast<int64_t const*>(p.cu_seqlens), p.sequences, p.tokens);
    if (x.is_cpu() && !p.cu_seqlens_int64)
      check_offsets(static_cast<int32_t const*>(p.cu_seqlens), p.sequences, p.tokens);
  }
  if (initial_state) {
    check_state(*initial_state, x, p.sequences, p.width);
    p.initial_state = state_of(*initial_state);
  }
  return p;
}

using Outputs = std::tuple<Tensor, Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class Run>
Outputs forward(Run const& run, Tensor const& x_any, Tensor const& weight, OptionalTensor const& bias,
                OptionalTensor const& initial_state, OptionalTensor const& cu_seqlens, bool silu,
                bool output_final_state) {
  Tensor const x = with_unit_last_stride(x_any);
  ForwardParams p{inputs_of(x, weight, bias, initial_state, cu_seqlens, silu), {}, {}};
  Tensor y = empty(x, {p.batch, p.tokens, p.channels}, x.scalar_type());
  Tensor final_state = output_final_state ? empty(x, {p.sequences, p.channels, p.width}, x.scalar_type())
                                          : empty(x, {0}, x.scalar_type());
  p.y = tokens_of(y);
  if (output_final_state) p.final_state = state_of(final_state);
  run(p);
  return {y, final_state};
}

template <class Run>
Gradients backward(Run const& run, Tensor const& dy_any, OptionalTensor const& dfinal_state,
                   Tensor const& x_any, Tensor const& weight, OptionalTensor const& bias,
                   OptionalTensor const& initial_state, OptionalTensor const& cu_seqlens, bool silu) {
  Tensor const x = with_unit_last_stride(x_any), dy = with_unit_last_stride(dy_any);
  BackwardParams p{inputs_of(x, weight, bias, initial_state, cu_seqlens, silu), {}, {}, {}, {}, {}, {}};
  LT2_CHECK_SHAPE(OP, dy, "[B, T, D]", p.batch, p.tokens, p.channels);
  LT2_CHECK_DTYPE(OP, dy, x.scalar_type());
  LT2_CHECK_SAME_DEVICE(OP, dy, x);
  p.dy = tokens_of(dy);
  if (dfinal_state) {
    check_state(*dfinal_state, x, p.sequences, p.width);
    p.dfinal_state = state_of(*dfinal_state);
  }
  Tensor dx = empty(x, {p.batch, p.tokens, p.channels}, x.scalar_type());
  Tensor dweight = empty(x, {p.channels, p.width}, ScalarType::Float);
  Tensor dbias = empty(x, {bias ? p.channels : 0}, ScalarType::Float);
  Tensor dinitial_state = initial_state ? empty(x, {p.sequences, p.channels, p.width}, x.scalar_type())
                                        : empty(x, {0}, x.scalar_type());
  p.dx = tokens_of(dx);
  p.dweight = static_cast<float*>(dweight.mutable_data_ptr());
  if (bias) p.dbias = static_cast<float*>(dbias.mutable_data_ptr());
  if (initial_state) p.dinitial_state = state_of(dinitial_state);
  run(p, x);
  return {dx, dweight, dbias, dinitial_state};
}

template <class Run>
Tensor step(Run const& run, Tensor const& state, Tensor const& x_any, Tensor const& weight,
            OptionalTensor const& bias, OptionalTensor const& optional_slots, bool silu) {
  Tensor const x = with_unit_last_stride(x_any);
  check_tokens(x);
  check_taps(x, weight, bias);
  LT2_CHECK_DIM(OP, state, 3);
  check_state(state, x, state.size(0), weight.size(1));
  Tensor y = empty(x, {x.size(0), x.size(1), x.size(2)}, x.scalar_type());
  StepParams p{};
  p.dtype = kernel_dtype(x);
  p.batch = x.size(0);
  p.tokens = x.size(1);
  p.channels = x.size(2);
  p.slots = state.size(0);
  p.width = static_cast<int>(weight.size(1));
  p.silu = silu;
  p.x = tokens_of(x);
  p.y = tokens_of(y);
  p.weight = static_cast<float const*>(weight.const_data_ptr());
  p.bias = floats(bias);
  p.state = state_of(state);
  if (optional_slots) {
    Tensor const& slots = *optional_slots;
    LT2_CHECK_SHAPE(OP, slots, "[B]", p.batch);
    LT2_CHECK_DTYPE(OP, slots, ScalarType::Long);
    LT2_CHECK_CONTIGUOUS(OP, slots);
    LT2_CHECK_SAME_DEVICE(OP, slots, x);
    p.slot_ids = static_cast<int64_t const*>(slots.const_data_ptr());
  }
  run(p);
  return y;
}

Outputs forward_cpu(Tensor const& x, Tensor const& weight, OptionalTensor const& bias,
                    OptionalTensor const& initial_state, OptionalTensor const& cu_seqlens, bool silu,
                    bool output_final_state) {
  auto const run = [](ForwardParams const& p) { cpu::forward(p, torch_pool()); };
  return forward(run, x, weight, bias, initial_state, cu_seqlens, silu, output_final_state);
}

Gradients backward_cpu(Tensor const& dy, OptionalTensor const& dfinal_state, Tensor const& x,
                       Tensor const& weight, OptionalTensor const& bias, OptionalTensor const& initial_state,
                       OptionalTensor const& cu_seqlens, bool silu) {
  auto const run = [](BackwardParams const& p, Tensor const& like) {
    Tensor workspace = empty(like, {cpu::backward_workspace(p)}, ScalarType::Float);
    cpu::backward(p, static_cast<float*>(workspace.mutable_data_ptr()), torch_pool());
  };
  return backward(run, dy, dfinal_state, x, weight, bias, initial_state, cu_seqlens, silu);
}

Tensor step_cpu(Tensor const& state, Tensor const& x, Tensor const& weight, OptionalTensor const& bias,
                OptionalTensor const& slots, bool silu) {
  return step([](StepParams const& p) { cpu::step(p, torch_pool()); }, state, x, weight, bias, slots, silu);
}

void check_status(Status status) { STD_TORCH_CHECK(status == kOk, OP ": ", status); }

Outputs forward_cuda(Tensor const& x, Tensor const& weight, OptionalTensor const& bias,
                     OptionalTensor const& initial_state, OptionalTensor const& cu_seqlens, bool silu,
                     bool output_final_state) {
  torch::stable::accelerator::DeviceGuard const guard(x.get_device_index());
  auto const run = [&](ForwardParams const& p) {
    check_status(portable::forward(p, current_cuda_stream(x)));
  };
  return forward(run, x, weight, bias, initial_state, cu_seqlens, silu, output_final_state);
}

Gradients backward_cuda(Tensor const& dy, OptionalTensor const& dfinal_state, Tensor const& x,
                        Tensor const& weight, OptionalTensor const& bias, OptionalTensor const& initial_state,
                        OptionalTensor const& cu_seqlens, bool silu) {
  torch::stable::accelerator::DeviceGuard const guard(x.get_device_index());
  auto const run = [&](BackwardParams const& p, Tensor const& like) {
    Tensor workspace = empty(like, {portable::backward_workspace(p)}, ScalarType::Float);
    check_status(
        portable::backward(p, static_cast<float*>(workspace.mutable_data_ptr()), current_cuda_stream(x)));
  };
  return backward(run, dy, dfinal_state, x, weight, bias, initial_state, cu_seqlens, silu);
}

Tensor step_cuda(Tensor const& state, Tensor const& x, Tensor const& weight, OptionalTensor const& bias,
                 OptionalTensor const& slots, bool silu) {
  torch::stable::accelerator::DeviceGuard const guard(x.get_device_index());
  auto const run = [&](StepParams const& p) { check_status(portable::step(p, current_cuda_stream(x))); };
  return step(run, state, x, weight, bias, slots, silu);
}

#undef OP

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lt2, CPU, m) {
  m.impl("causal_conv1d_fwd", TORCH_BOX(&forward_cpu));
  m.impl("causal_conv1d_bwd", TORCH_BOX(&backward_cpu));
  m.impl("causal_conv1d_step_", TORCH_BOX(&step_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(lt2, CUDA, m) {
  m.impl("causal_conv1d_fwd", TORCH_BOX(&forward_cuda));
  m.impl("causal_conv1d_bwd", TORCH_BOX(&backward_cuda));
  m.impl("causal_conv1d_step_", TORCH_BOX(&step_cuda));
}

}  // namespace lt2
