// csrc/bindings_cuda.cpp for tensors of a CPU, whose ops run the emulated kernels: its
// registrations go to `fastalps_emulated`, for tests/ops_emulator.py.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

namespace torch::stable::accelerator {

struct NoGuard {
  explicit NoGuard(int32_t) {}
};

}  // namespace torch::stable::accelerator

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(library, device, m) \
  _STABLE_TORCH_LIBRARY_IMPL(fastalps_emulated, CPU, m, 0)
#define aoti_torch_get_current_cuda_stream(device, stream) ((void)(device), *(stream) = nullptr, 0)
#define is_cuda is_cpu
#define DeviceGuard NoGuard

#include "../../csrc/bindings_cuda.cpp"
