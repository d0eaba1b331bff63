#pragma once

namespace tightrope {

// Implements tightrope::quant_linear, quantize and dequantize, defined before, for CPU tensors. `torch_library` is the
// path of libtorch_cpu, which must be loaded. To be called once. Throws std::runtime_error.
void register_torch_op(const char* torch_library);

}  // namespace tightrope
