// Python module lt2_ext._C: loading it registers torch.ops.lt2; it answers questions about the build.
#include <pybind11/pybind11.h>

#include "common/cpu_isa.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts of lt2_ext; the operators live in torch.ops.lt2.";
  m.def(
      "cpu_isa", [] { return lt2::name(lt2::cpu_isa()); }, "Instruction set that the CPU kernels run with.");
  m.attr("cpu_isas") = LT2_CPU_ISAS;      // those built, separated by ';'
  m.attr("cuda_archs") = LT2_CUDA_ARCHS;  // "" when built without CUDA kernels
}
