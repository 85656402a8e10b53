#include <vector>

#include "bindings/steps.h"
#include "block_ops/block_ops.h"

namespace lt2 {
namespace {

using namespace block_ops;

// What messages call an operator and its arguments; weights null: "weights[i]".
struct Names {
  char const *op, *x;
  char const* const* weights;

  std::string weight(int i) const {
    return weights == nullptr ? "weights[" + std::to_string(i) + "]" : weights[i];
  }
};

std::vector<Tensor> step(Names const& names, Tensor const& x_any, std::vector<Tensor> const& weights,
                         OptionalTensor const& norm, OptionalTensor const& added, double eps, bool swiglu,
                         bool settled, int64_t floats) {
  STD_TORCH_CHECK(x_any.dim() >= 1, names.op, ": ", names.x, " must have shape [.., K], got ",
                  shape_string(x_any));
  bool const half = x_any.scalar_type() == ScalarType::Half && x_any.is_cuda();
  STD_TORCH_CHECK(
      half || x_any.scalar_type() == ScalarType::Float || x_any.scalar_type() == ScalarType::BFloat16,
      names.op, ": ", names.x, " must be float32 or bfloat16 (or float16 on CUDA), got ",
      dtype_name(x_any.scalar_type()));
  Tensor const x = torch::stable::contiguous(x_any);
  ScalarType const dtype = x.scalar_type();
  int64_t const K = x.size(x.dim() - 1), rows = K == 0 ? 0 : x.numel() / K;
  STD_TORCH_CHECK(rows <= kMostStepRows && K >= 1 && K <= INT32_MAX, names.op, ": ", names.x,
                  " must have up to ", kMostStepRows, " rows of channels, got ", shape_string(x));
  size_t const most = swiglu ? 2 : kMostLinears;
  STD_TORCH_CHECK(weights.size() >= (swiglu ? 2 : 1) && weights.size() <= most, names.op,
                  ": weights must be ", swiglu ? "2" : "1 to 8", " tensors, got ", weights.size());
  int64_t const most_floats = swiglu ? 0 : static_cast<int64_t>(weights.size());
  STD_TORCH_CHECK(floats >= 0 && floats <= most_floats, names.op, ": floats must be in 0..", most_floats,
                  ", got ", floats);
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
    STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == K && weight.size(0) <= INT32_MAX / 2, names.op,
                    ": ", names.weight(i), " must have shape [N, K] with K = ", K, ", got ",
                    shape_string(weight));
    STD_TORCH_CHECK(weight.scalar_type() == dtype, names.op, ": ", names.weight(i),
                    " must have the dtype of ", names.x, " (", dtype_name(dtype), "), got ",
                    dtype_name(weight.scalar_type()));
    STD_TORCH_CHECK(weight.device() == x.device(), names.op, ": ", names.weight(i), " and ", names.x,
                    " must be on one device");
    STD_TORCH_CHECK(weight.is_contiguous(), names.op, ": ", names.weight(i),
                    " must be contiguous, got shape ", shape_string(weight));
    p.parts[i] = {weight.const_data_ptr(), nullptr, static_cast<int>(weight.size(0)), false};
    if (swiglu && i == 1) {
      STD_TORCH_CHECK(weight.size(0) == p.parts[0].outputs, names.op, ": ", names.weight(1),
                      " must have the shape of ", names.weight(0), " ", shape_string(weights[0]), ", got ",
                      shape_string(weight));
      continue;
    }
    shape.back() = weight.size(0);
    p.parts[i].float_out = i >= p.count - floats;
    outputs.push_back(empty(x, shape, p.parts[i].float_out ? ScalarType::Float : dtype));
    p.parts[i].out = outputs.back().mutable_data_ptr();
  }
  if (norm) {
    Tensor const& norm_weight = *norm;
    LT2_CHECK_SHAPE(names.op, norm_weight, "[K]", K);
    p.float_norm_weight = norm_weight.scalar_type() == ScalarType::Float;
    STD_TORCH_CHECK(p.float_norm_weight || norm_weight.scalar_type() == dtype, names.op,
                    ": norm_weight must be float32 or have the dtype of ", names.x, " (", dtype_name(dtype),
                    "), got ", dtype_name(norm_weight.scalar_type()));
    LT2_CHECK_CONTIGUOUS(names.op, norm_weight);
    LT2_CHECK_SAME_DEVICE(names.op, norm_weight, x);
    p.norm_weight = norm_weight.const_data_ptr();
  }
  Tensor const residual = added ? torch::stable::contiguous(*added) : x;
  if (added) {
    STD_TORCH_CHECK(outputs.size() == 1 && floats == 0, names.op,
                    ": residual must be None with several or float32 outputs, got ", shape_string(residual));
    bool same = residual.dim() == x.dim();
    for (int64_t i = 0; same && i < x.dim(); ++i) same = residual.size(i) == shape[i];
    STD_TORCH_CHECK(same, names.op, ": residual must have the shape of the output ", shape_string(outputs[0]),
                    ", got ", shape_string(residual));
    LT2_CHECK_DTYPE(names.op, residual, dtype);
    LT2_CHECK_SAME_DEVICE(names.op, residual, x);
    p.residual = residual.const_data_ptr();
  }
  if (x.is_cuda()) {
    torch::stable::accelerator::DeviceGuard const guard(x.get_device_index());
    Status status = portable::linear_step_supports(p);
    STD_TORCH_CHECK(status == kOk, names.op, ": ", status, ", got ", dtype_name(dtype), " ", shape_string(x));
    status = portable::linear_step(p, current_cuda_stream(x));
    STD_TORCH_CHECK(status == kOk, names.op, ": ", status);
  } else {
    Tensor const workspace = empty(x, {rows * K}, ScalarType::Float);
    cpu::linear_step(p, static_cast<float*>(workspace.mutable_data_ptr()), torch_pool());
  }
  return outputs;
}

}  // namespace

std::vector<Tensor> linear_step(Tensor const& x, std::vector<Tensor> const& weights,
                                OptionalTensor const& norm, OptionalTensor const& residual, double eps,
                                bool swiglu, bool settled, int64_t floats) {
  return step({"lt2::linear_step", "x", nullptr}, x, weights, norm, residual, eps, swiglu, settled, floats);
}

// What a block does after its mixer.
Tensor mlp_step(Tensor const& o, Tensor const& residual, Tensor const& output, Tensor const& norm_weight,
                Tensor const& gate, Tensor const& up, Tensor const& down, double eps) {
  constexpr char const *op = "lt2::mlp_step", *names[] = {"output", "gate", "up", "down"};
  Tensor const h = step({op, "o", names}, o, {output}, {}, residual, eps, false, true, 0)[0];
  Tensor const x = step({op, "o", names + 1}, h, {gate, up}, norm_weight, {}, eps, true, true, 0)[0];
  STD_TORCH_CHECK(down.dim() == 2 && down.size(0) == output.size(0), op,
                  ": down must have shape [K, N] with K = ", output.size(0), ", got ", shape_string(down));
  return step({op, "o", names + 3}, x, {down}, {}, h, eps, false, true, 0)[0];
}

STABLE_TORCH_LIBRARY_IMPL(lt2, CPU, m) {
  m.impl("linear_step", TORCH_BOX(&linear_step));
  m.impl("mlp_step", TORCH_BOX(&mlp_step));
}
STABLE_TORCH_LIBRARY_IMPL(lt2, CUDA, m) {
  m.impl("linear_step", TORCH_BOX(&linear_step));
  m.impl("mlp_step", TORCH_BOX(&mlp_step));
}

}  // namespace lt2
