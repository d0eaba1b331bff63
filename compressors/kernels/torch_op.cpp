// torch.ops.tightrope.quant_linear, quantize and dequantize on the CPU, through the C interface that torch keeps stable
// (torch/csrc/stable). Its functions are looked up in the running process: neither building nor importing the kernels
// needs torch. A Python implementation would cost some six microseconds more a call.
#include "torch_op.h"

#include <dlfcn.h>

#include <array>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "require.h"

namespace tightrope {
namespace {

using Value = std::uint64_t;  // an argument or result on torch's stack
using Handle = void*;         // a tensor, owned
using Error = std::int32_t;

struct Torch {
  Error (*delete_tensor)(Handle);
  Error (*data_ptr)(Handle, void**);
  Error (*dim)(Handle, std::int64_t*);
  Error (*numel)(Handle, std::int64_t*);
  Error (*sizes)(Handle, std::int64_t**);
  Error (*strides)(Handle, std::int64_t**);
  Error (*dtype)(Handle, std::int32_t*);
  Error (*is_contiguous)(Handle, bool*);
  Error (*empty_strided)(std::int64_t, const std::int64_t*, const std::int64_t*, std::int32_t, std::int32_t,
                         std::int32_t, Handle*);
  Error (*get_num_threads)(std::uint32_t*);
  std::int32_t float32, uint8, cpu;
} torch;

struct Tensor {
  Handle handle = nullptr;
  Tensor() = default;
  explicit Tensor(Value value) { std::memcpy(&handle, &value, sizeof handle); }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  ~Tensor() {
    if (handle != nullptr) torch.delete_tensor(handle);
  }

  template <typename T>
  T ask(Error (*question)(Handle, T*)) const {
    T answer{};
    require(question(handle, &answer) == 0, "torch failed on a tensor");
    return answer;
  }
  bool is(std::int32_t dtype) const { return ask(torch.dtype) == dtype; }
  template <typename T>
  T* data() const {
    return static_cast<T*>(ask(torch.data_ptr));
  }
};

template <typename T>
T scalar(Value value) {
  T result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}

// An optional tensor comes as null or as a value on the heap that is ours to free.
Value optional(Value value) {
  if (value == 0) return 0;
  Value* const inside = scalar<Value*>(value);
  const Value result = *inside;
  delete inside;
  return result;
}

void quant_linear(Value* stack, std::uint64_t, std::uint64_t) {
  const Tensor x(stack[0]), packed(stack[1]), bias(optional(stack[2]));
  const auto n = scalar<std::int64_t>(stack[3]), bits = scalar<std::int64_t>(stack[4]),
             group = scalar<std::int64_t>(stack[5]);
  const auto activation = scalar<std::int64_t>(stack[6]), x_zero = scalar<std::int64_t>(stack[8]),
             y_zero = scalar<std::int64_t>(stack[10]);
  const auto x_scale = scalar<double>(stack[7]), y_scale = scalar<double>(stack[9]);

  const bool codes = x.is(torch.uint8), out_codes = y_scale != 0.0;
  require(codes || x.is(torch.float32), "x must be float32 or uint8");
  const auto dims = static_cast<std::size_t>(x.ask(torch.dim));
  require(dims >= 1 && x.ask(torch.is_contiguous), "x must be contiguous, [..., k]");
  require(packed.is(torch.uint8) && packed.ask(torch.is_contiguous), "packed must be contiguous uint8");
  require(
      bias.handle == nullptr || (bias.is(torch.float32) && bias.ask(torch.is_contiguous) && bias.ask(torch.numel) == n),
      [&] { return "bias must be contiguous float32 of n = " + std::to_string(n) + " elements"; });

  std::array<std::int64_t, 64> shape, strides;
  require(dims <= shape.size(), "x must have at most 64 dimensions");
  std::memcpy(shape.data(), x.ask(torch.sizes), dims * sizeof(std::int64_t));
  const std::int64_t k = shape[dims - 1];
  shape[dims - 1] = n;
  std::int64_t size = 1;
  for (std::size_t d = dims; d-- > 0; size *= shape[d]) strides[d] = size;

  Linear call{};
  call.w = packed_layout(n, k, bits, group, static_cast<std::size_t>(packed.ask(torch.numel)));
  call.packed = packed.data<std::uint8_t>();
  call.bias = bias.handle == nullptr ? nullptr : bias.data<float>();
  call.m = static_cast<std::size_t>(x.ask(torch.numel) / k);
  if (codes)
    call.x_codes = x.data<std::uint8_t>();
  else
    call.x = x.data<float>();
  set_checked(call, activation, x_scale, x_zero, codes, y_scale, y_zero, out_codes);

  Tensor y;
  const std::int32_t dtype = out_codes ? torch.uint8 : torch.float32;
  require(torch.empty_strided(static_cast<std::int64_t>(dims), shape.data(), strides.data(), dtype, torch.cpu, 0,
                              &y.handle) == 0,
          "torch could not allocate the result");
  if (out_codes)
    call.y_codes = y.data<std::uint8_t>();
  else
    call.y = y.data<float>();
  std::uint32_t threads = 1;
  torch.get_num_threads(&threads);
  linear(kernels(), call, static_cast<int>(threads));

  stack[0] = 0;
  std::memcpy(stack, &y.handle, sizeof y.handle);
  y.handle = nullptr;  // torch's now
}

int threads() {
  std::uint32_t count = 1;
  torch.get_num_threads(&count);
  return static_cast<int>(count);
}

// Strides of a tensor whose elements lie in memory without gap or overlap, in whatever order of dimensions.
const std::int64_t* dense_strides(const Tensor& x, const char* name) {
  const auto dims = static_cast<std::size_t>(x.ask(torch.dim));
  const std::int64_t *const sizes = x.ask(torch.sizes), *const strides = x.ask(torch.strides);
  std::int64_t expected = 1;
  for (std::size_t found = 0; found < dims; ++found)  // the dimension that comes next, from the fastest on
    for (std::size_t d = 0; d < dims; ++d)
      if (strides[d] == expected && sizes[d] != 1) {
        expected *= sizes[d];
        break;
      }
  const std::int64_t numel = x.ask(torch.numel);
  require(numel == 0 || expected == numel,
          [&] { return std::string(name) + " must be dense: call contiguous() first"; });
  return strides;
}

// The result of an elementwise operator: of the shape and strides of `x`.
Handle like(const Tensor& x, const std::int64_t* strides, std::int32_t dtype) {
  Handle y = nullptr;
  require(torch.empty_strided(x.ask(torch.dim), x.ask(torch.sizes), strides, dtype, torch.cpu, 0, &y) == 0,
          "torch could not allocate the result");
  return y;
}

void quantize(Value* stack, std::uint64_t, std::uint64_t) {
  const Tensor x(stack[0]);
  const auto scale = scalar<double>(stack[1]);
  const auto zero = scalar<std::int64_t>(stack[2]);
  require(x.is(torch.float32), "x must be float32");
  require(scale > 1e-30 && scale < 1e30,
          [&] { return "scale must lie in (1e-30, 1e30), got " + std::to_string(scale); });
  require(zero >= 0 && zero <= 255, [&] { return "zero must lie in [0, 255], got " + std::to_string(zero); });
  Tensor y;
  y.handle = like(x, dense_strides(x, "x"), torch.uint8);
  quantize(kernels(), x.data<float>(), static_cast<std::size_t>(x.ask(torch.numel)), static_cast<float>(scale),
           static_cast<int>(zero), y.data<std::uint8_t>(), threads());
  stack[0] = 0;
  std::memcpy(stack, &y.handle, sizeof y.handle);
  y.handle = nullptr;
}

void dequantize(Value* stack, std::uint64_t, std::uint64_t) {
  const Tensor codes(stack[0]);
  const auto scale = scalar<double>(stack[1]);
  const auto zero = scalar<std::int64_t>(stack[2]);
  require(codes.is(torch.uint8), "codes must be uint8");
  require(zero >= 0 && zero <= 255, [&] { return "zero must lie in [0, 255], got " + std::to_string(zero); });
  Tensor y;
  y.handle = like(codes, dense_strides(codes, "codes"), torch.float32);
  dequantize(kernels(), codes.data<std::uint8_t>(), static_cast<std::size_t>(codes.ask(torch.numel)),
             static_cast<float>(scale), static_cast<int>(zero), y.data<float>(), threads());
  stack[0] = 0;
  std::memcpy(stack, &y.handle, sizeof y.handle);
  y.handle = nullptr;
}

template <typename Function>
void find(void* library, const char* name, Function*& function) {
  void* const address = dlsym(library, name);
  if (address == nullptr)
    throw std::runtime_error(std::string("this torch lacks ") + name + "; torch >= 2.10 is needed");
  std::memcpy(&function, &address, sizeof address);
}

}  // namespace

void register_torch_op(const char* torch_library) {
  void* const library = dlopen(torch_library, RTLD_NOW | RTLD_NOLOAD);
  if (library == nullptr) throw std::runtime_error(std::string(torch_library) + " is not loaded: import torch first");
  std::int32_t (*constant)();
  const auto value = [&](const char* name) {
    find(library, name, constant);
    return constant();
  };
  find(library, "aoti_torch_delete_tensor_object", torch.delete_tensor);
  find(library, "aoti_torch_get_data_ptr", torch.data_ptr);
  find(library, "aoti_torch_get_dim", torch.dim);
  find(library, "aoti_torch_get_numel", torch.numel);
  find(library, "aoti_torch_get_sizes", torch.sizes);
  find(library, "aoti_torch_get_strides", torch.strides);
  find(library, "aoti_torch_get_dtype", torch.dtype);
  find(library, "aoti_torch_is_contiguous", torch.is_contiguous);
  find(library, "aoti_torch_empty_strided", torch.empty_strided);
  find(library, "torch_get_num_threads", torch.get_num_threads);
  torch.float32 = value("aoti_torch_dtype_float32");
  torch.uint8 = value("aoti_torch_dtype_uint8");
  torch.cpu = value("aoti_torch_device_type_cpu");

  Error (*init)(const char*, const char*, const char*, std::uint32_t, void**);
  Error (*implement)(void*, const char*, void (*)(Value*, std::uint64_t, std::uint64_t));
  find(library, "aoti_torch_library_init_impl", init);
  find(library, "aoti_torch_library_impl", implement);
  void* handle = nullptr;  // kept as long as the process lives
  if (init("tightrope", "CPU", __FILE__, __LINE__, &handle) != 0 ||
      implement(handle, "quant_linear", quant_linear) != 0 || implement(handle, "quantize", quantize) != 0 ||
      implement(handle, "dequantize", dequantize) != 0)
    throw std::runtime_error("torch refused the implementation of an operator of tightrope's");
}

}  // namespace tightrope
