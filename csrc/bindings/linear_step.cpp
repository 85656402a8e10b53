#include <vector>

#include "bindings/tensor.h"
#include "block_ops/block_ops.h"

namespace lt2 {
namespace {

using namespace block_ops;

#define OP "lt2::linear_step"

std::vector<Tensor> linear_step(Tensor const& x_any, std::vector<Tensor> const& weights,
                                OptionalTensor const& norm, OptionalTensor const& added, double eps,
                                bool swiglu, bool settled, int64_t floats) {
  STD_TORCH_CHECK(x_any.dim() >= 1, OP ": x must have shape [.., K], got ", shape_string(x_any));
  LT2_CHECK_ACTIVATION(OP, x_any, "x");
  Tensor const x = torch::stable::contiguous(x_any);
  ScalarType const dtype = x.scalar_type();
  int64_t const K = x.size(x.dim() - 1), rows = K == 0 ? 0 : x.numel() / K;
  STD_TORCH_CHECK(rows <= kMostStepRows && K >= 1 && K <= INT32_MAX, OP ": x must have up to ", kMostStepRows,
                  " rows of channels, got ", shape_string(x));
  size_t const most = swiglu ? 2 : kMostLinears;
  STD_TORCH_CHECK(weights.size() >= (swiglu ? 2 : 1) && weights.size() <= most, OP ": weights must be ",
                  swiglu ? "2" : "1 to 8", " tensors, got ", weights.size());
  int64_t const most_floats = swiglu ? 0 : static_cast<int64_t>(weights.size());
  STD_TORCH_CHECK(floats >= 0 && floats <= most_floats, OP ": floats must be in 0..", most_floats, ", got ",
                  floats);
  LinearStepParams p{};
  p.dtype = kernel_dtype(x);
  p.rows = static_cast<int>(rows);
  p.channels = static_cast<int>(K);
  p.count = static_cast<int>(weights.size());
  p.x = x.const_data_ptr();
  p.eps = static_cast<float>(eps);
  p.swiglu = swiglu;
  p.settled = settled;
  std::vector<Tensor> outputs;
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  for (int i = 0; i < p.count; ++i) {
    Tensor const& weight = weights[i];
    STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == K && weight.size(0) <= INT32_MAX / 2,
                    OP ": weights[", i, "] must have shape [N, K] with K = ", K, ", got ",
                    shape_string(weight));
    STD_TORCH_CHECK(weight.scalar_type() == dtype, OP ": weights[", i, "] must have the dtype of x (",
                    dtype_name(dtype), "), got ", dtype_name(weight.scalar_type()));
    STD_TORCH_CHECK(weight.device() == x.device(), OP ": weights[", i, "] and x must be on one device");
    STD_TORCH_CHECK(weight.is_contiguous(), OP ": weights[", i, "] must be contiguous, got shape ",
                    shape_string(weight));
    p.parts[i] = {weight.const_data_ptr(), nullptr, static_cast<int>(weight.size(0)), false};
    if (swiglu && i == 1) {
      STD_TORCH_CHECK(weight.size(0) == p.parts[0].outputs,
                      OP ": weights[1] must have the shape of weights[0] ", shape_string(weights[0]),
                      ", got ", shape_string(weight));
      continue;
    }
    shape.back() = weight.size(0);
    p.parts[i].float_out = i >= p.count - floats;
    outputs.push_back(torch::stable::new_empty(x, shape, p.parts[i].float_out ? ScalarType::Float : dtype));
    p.parts[i].out = outputs.back().mutable_data_ptr();
  }
  if (norm) {
    Tensor const& norm_weight = *norm;
    LT2_CHECK_SHAPE(OP, norm_weight, "[K]", K);
    p.float_norm_weight = norm_weight.scalar_type() == ScalarType::Float;
    STD_TORCH_CHECK(p.float_norm_weight || norm_weight.scalar_type() == dtype,
                    OP ": norm_weight must be float32 or have the dtype of x (", dtype_name(dtype), "), got ",
                    dtype_name(norm_weight.scalar_type()));
    LT2_CHECK_CONTIGUOUS(OP, norm_weight);
    LT2_CHECK_SAME_DEVICE(OP, norm_weight, x);
    p.norm_weight = norm_weight.const_data_ptr();
  }
  Tensor const residual = added ? torch::stable::contiguous(*added) : x;
  if (added) {
    STD_TORCH_CHECK(outputs.size() == 1 && floats == 0,
                    OP ": residual must be None with several or float32 outputs, got ",
                    shape_string(residual));
    bool same = residual.dim() == x.dim();
    for (int64_t i = 0; same && i < x.dim(); ++i) same = residual.size(i) == shape[i];
    STD_TORCH_CHECK(same, OP ": residual must have the shape of the output ", shape_string(outputs[0]),
                    ", got ", shape_string(residual));
    LT2_CHECK_DTYPE(OP, residual, dtype);
    LT2_CHECK_SAME_DEVICE(OP, residual, x);
    p.residual = residual.const_data_ptr();
  }
  if (x.is_cuda()) {
    torch::stable::accelerator::DeviceGuard const guard(x.get_device_index());
    Status status = portable::linear_step_supports(p);
    STD_TORCH_CHECK(status == kOk, OP ": ", status, ", got ", dtype_name(dtype), " ", shape_string(x));
    status = portable::linear_step(p, current_cuda_stream(x));
    STD_TORCH_CHECK(status == kOk, OP ": ", status);
  } else {
    Tensor const workspace = empty(x, {rows * K}, ScalarType::Float);
    cpu::linear_step(p, static_cast<float*>(workspace.mutable_data_ptr()), torch_pool());
  }
  return outputs;
}

#undef OP

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lt2, CPU, m) { m.impl("linear_step", TORCH_BOX(&linear_step)); }
STABLE_TORCH_LIBRARY_IMPL(lt2, CUDA, m) { m.impl("linear_step", TORCH_BOX(&linear_step)); }

}  // namespace lt2
