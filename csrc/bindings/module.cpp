// Python module lt2_ext._C: loading it registers torch.ops.lt2; it answers questions about the build.
#include <pybind11/pybind11.h>

#include <utility>

#include "bindings/poison.h"
#include "common/cpu_isa.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts of lt2_ext; the operators live in torch.ops.lt2.";
  m.def(
      "cpu_isa", [] { return lt2::name(lt2::cpu_isa()); }, "Instruction set that the CPU kernels run with.");
  m.def(
      "poison_memory",
      [](bool on) {
        lt2::poison_memory = on;
        return std::exchange(lt2::poisoned_tensors, 0);
      },
      "For tests: fill what operators allocate on the CPU with NaN; how many tensors were since the last "
      "call.");
  m.attr("cpu_isas") = LT2_CPU_ISAS;      // those built, separated by ';'
  m.attr("cuda_archs") = LT2_CUDA_ARCHS;  // "" when built without CUDA kernels
}
