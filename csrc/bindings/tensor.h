// The only header that knows libtorch. Everything here is LibTorch-stable-ABI (TORCH_TARGET_VERSION).
#pragma once

#include <sys/mman.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "bindings/poison.h"
#include "common/dtype.h"
#include "common/parallel.h"
#include "common/status.h"

// Only CUDA builds of libtorch define this symbol. A weak reference keeps one binary loadable by a
// CPU-only libtorch. (TORCH_TARGET_VERSION >= 2.13 has accelerator::Stream::nativeHandle() instead.)
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** stream);
// Since torch 2.13: what was wrong in the last call of libtorch.
extern "C" __attribute__((weak)) char const* torch_exception_get_what_without_backtrace();

namespace lt2 {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline std::string shape_string(Tensor const& t) {
  std::string s = "[";
  for (int64_t i = 0; i < t.dim(); ++i) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + "]";
}

inline bool has_shape(Tensor const& t, std::initializer_list<int64_t> want) {
  if (t.dim() != static_cast<int64_t>(want.size())) return false;
  int64_t i = 0;
  for (int64_t w : want) {
    if (t.size(i++) != w) return false;
  }
  return true;
}

inline bool same_shape(Tensor const& a, Tensor const& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i) {
    if (a.size(i) != b.size(i)) return false;
  }
  return true;
}

inline std::string shape_string(std::initializer_list<int64_t> sizes) {
  std::string s = "[";
  for (int64_t n : sizes) s += (s.size() > 1 ? ", " : "") + std::to_string(n);
  return s + "]";
}

inline char const* dtype_name(ScalarType t) {
  switch (t) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return "another dtype";
  }
}

inline Dtype kernel_dtype(Tensor const& t) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      return Dtype::kFloat32;
  }
}

// libtorch's intra-op pool: honours torch.set_num_threads, never brings a second OpenMP runtime.
inline ThreadPool torch_pool() {
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](int64_t begin, int64_t end, int64_t grain, ThreadPool::Body body, void* context) {
            torch::stable::parallel_for(begin, end, grain,
                                        [&](int64_t b, int64_t e) { body(b, e, context); });
          }};
}

// malloc takes so large a tensor from the system anew each time, in pages of 4 KiB that are cleared one by
// one when they are first written; of huge pages that takes a fifth of the time. A system that refuses
// changes nothing.
struct FreshPages {
  static constexpr uintptr_t kLeast = 32 << 20, kHuge = 2 << 20;
  uintptr_t begin = 0, end = 0;

  explicit FreshPages(Tensor const& t) {
    uintptr_t const bytes = static_cast<uintptr_t>(t.numel()) * t.element_size();
    if (!t.is_cpu() || bytes < kLeast) return;
    auto const page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    auto const data = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
    begin = data / page * page;
    end = (data + bytes + page - 1) / page * page;
  }
  void ask_for_huge() const {
#if defined(MADV_HUGEPAGE)
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  }
  // For tensors of which several threads write to one page: each would clear it for itself. Instead each
  // clears its share.
  void clear() const {
#if defined(MADV_POPULATE_WRITE)
    auto const first = static_cast<int64_t>(begin / kHuge),
               last = static_cast<int64_t>((end + kHuge - 1) / kHuge);
    torch_pool().ranges(first, last, 1, [&](int64_t from, int64_t to) {
      uintptr_t const b = std::max(begin, from * kHuge), e = std::min(end, to * kHuge);
      madvise(reinterpret_cast<void*>(b), e - b, MADV_POPULATE_WRITE);
    });
#endif
  }
};

// Uninitialised contiguous tensor on the device of `like`, without a dispatched operator, which takes longer
// than a small kernel. An error says how much was asked for, in words that are known of an allocator without
// memory.
inline Tensor empty(Tensor const& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i > 1; --i)
    strides[i - 2] = strides[i - 1] * std::max<int64_t>(1, sizes[i - 1]);
  int32_t device = 0, index = 0;
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  auto const rank = static_cast<int64_t>(sizes.size());
  if (aoti_torch_empty_strided(rank, sizes.data(), strides.data(), static_cast<int32_t>(dtype), device, index,
                               &made) != AOTI_TORCH_SUCCESS) {
    std::string shape;
    for (int64_t n : sizes) shape += (shape.empty() ? "" : ", ") + std::to_string(n);
    char const* const reason = torch_exception_get_what_without_backtrace != nullptr
                                   ? torch_exception_get_what_without_backtrace()
                               : like.is_cuda() ? "CUDA out of memory."
                                                : "DefaultCPUAllocator: can't allocate memory";
    STD_TORCH_CHECK(false, "lt2_ext: cannot allocate a tensor [", shape, "] of ", dtype_name(dtype), ": ",
                    reason);
  }
  Tensor const t(made);
  if (poison_memory && t.is_cpu()) {
    std::memset(t.mutable_data_ptr(), 0xff, static_cast<size_t>(t.numel()) * t.element_size());
    ++poisoned_tensors;
  }
  FreshPages(t).ask_for_huge();
  return t;
}
inline Tensor empty(Tensor const& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), dtype);
}
inline Tensor empty_as(Tensor const& t) { return empty(t, t.sizes(), t.scalar_type()); }

inline Tensor with_unit_last_stride(Tensor const& t) {
  return t.dim() == 0 || t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1
             ? t
             : torch::stable::contiguous(t);
}

// t[i] for i in rows int64; of a row that t has not, the nearest.
inline Tensor rows_of(Tensor const& t, Tensor const& rows) {
  auto const call = [](char const* name, auto const&... x) {
    std::array stack{torch::stable::detail::from(x)...};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
  };
  Tensor const first = torch::stable::fill_(torch::stable::empty_like(rows), 0.);
  Tensor const last =
      torch::stable::fill_(torch::stable::empty_like(rows), static_cast<double>(t.size(0) - 1));
  Tensor const there = call("aten::minimum", call("aten::maximum", rows, first), last);
  return call("aten::index_select", t, int64_t{0}, there);
}

inline void* current_cuda_stream(Tensor const& t) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "lt2_ext: this torch was built without CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return stream;
}

}  // namespace lt2

#define LT2_CHECK_DIM(op, t, n)                                                             \
  STD_TORCH_CHECK((t).dim() == (n), op, ": " #t " must have " #n " dimensions, got shape ", \
                  ::lt2::shape_string(t))
// Names the rule in symbols and in numbers: "q must have shape [B, T, H, K] = [1, 8, 2, 4], got [1, 8, 4]".
#define LT2_CHECK_SHAPE(op, t, rule, ...)                                                         \
  STD_TORCH_CHECK(::lt2::has_shape(t, {__VA_ARGS__}), op, ": " #t " must have shape " rule " = ", \
                  ::lt2::shape_string({__VA_ARGS__}), ", got ", ::lt2::shape_string(t))
#define LT2_CHECK_DTYPE(op, t, ty)                                                                     \
  STD_TORCH_CHECK((t).scalar_type() == (ty), op, ": " #t " must be ", ::lt2::dtype_name(ty), ", got ", \
                  ::lt2::dtype_name((t).scalar_type()))
// An activation, of a type that kernels take.
#define LT2_CHECK_ACTIVATION(op, t, name)                                                                \
  STD_TORCH_CHECK((t).scalar_type() == ScalarType::Float || (t).scalar_type() == ScalarType::BFloat16 || \
                      ((t).scalar_type() == ScalarType::Half && (t).is_cuda()),                          \
                  op ": ", name, " must be float32 or bfloat16 (or float16 on CUDA), got ",              \
                  ::lt2::dtype_name((t).scalar_type()))
#define LT2_CHECK_CONTIGUOUS(op, t) \
  STD_TORCH_CHECK((t).is_contiguous(), op, ": " #t " must be contiguous, got shape ", ::lt2::shape_string(t))
#define LT2_CHECK_SAME_DEVICE(op, t, u) \
  STD_TORCH_CHECK((t).device() == (u).device(), op, ": " #t " and " #u " must be on one device")
