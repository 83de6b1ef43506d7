// One pass per row for every norm of modeling_normconvert.py, on the CPU, without gradients.
//
// `norm` answers None for whatever it does not take; the caller then computes with torch.

#include <Python.h>

#include <ATen/Parallel.h>
#include <ATen/TracerMode.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

namespace {

constexpr int64_t kLanes = 32;           // independent sums: the additions need not wait
constexpr int64_t kNumbersPerTask = 32768;  // fewer are not worth another thread

struct Norm {
  double eps;
  int64_t size;     // d, by which the sum of squares is divided
  int64_t used;     // how many coordinates the RMS is taken of
  bool compressed;  // whether x lacks its last coordinate, minus the sum of the others
  bool expand;      // whether the output has it again
};

struct Sums {
  float squares, numbers;
};

// Σx² and, where asked for, Σx, in float32.
template <bool with_numbers>
Sums sums(const float* x, int64_t n) {
  float squares[kLanes] = {}, numbers[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      squares[lane] += x[i + lane] * x[i + lane];
      if constexpr (with_numbers) numbers[lane] += x[i + lane];
    }
  }
  for (int64_t lane = 0; i < n; ++i, ++lane) {
    squares[lane] += x[i] * x[i];
    if constexpr (with_numbers) numbers[lane] += x[i];
  }
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) {
      squares[lane] += squares[lane + half];
      if constexpr (with_numbers) numbers[lane] += numbers[lane + half];
    }
  }
  return {squares[0], numbers[0]};
}

// y = x / sqrt((Σx² [+ (Σx)²]) / d + eps) · gain + bias for one row; `out` may be `x`.
void row(const float* x, float* out, int64_t n, const float* gain, const float* bias,
         const Norm& norm) {
  const Sums found = norm.compressed ? sums<true>(x, norm.used) : sums<false>(x, norm.used);
  float squares = found.squares;
  if (norm.compressed) squares += found.numbers * found.numbers;
  const float inverse = 1.0f / std::sqrt(squares / norm.size + static_cast<float>(norm.eps));
  if (gain != nullptr && bias != nullptr) {
    for (int64_t i = 0; i < n; ++i) out[i] = x[i] * inverse * gain[i] + bias[i];
  } else if (gain != nullptr) {
    for (int64_t i = 0; i < n; ++i) out[i] = x[i] * inverse * gain[i];
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = x[i] * inverse;
    if (bias != nullptr)
      for (int64_t i = 0; i < n; ++i) out[i] += bias[i];
  }
  if (norm.expand) {
    float last = -found.numbers * inverse;
    if (gain != nullptr) last *= gain[n];
    out[n] = bias != nullptr ? last + bias[n] : last;
  }
}

// `at::vec::convert` would do, but converts float16 number by number.
template <typename scalar_t>
void widen(const scalar_t* x, float* out, int64_t n) {
  using Narrow = at::vec::Vectorized<scalar_t>;
  using Wide = at::vec::Vectorized<float>;
  for (int64_t i = 0; i < n; i += Narrow::size()) {
    const int64_t left = std::min<int64_t>(n - i, Narrow::size());
    const auto [low, high] = at::vec::convert_to_float<scalar_t>(Narrow::loadu(x + i, left));
    low.store(out + i, std::min<int64_t>(left, Wide::size()));
    if (left > Wide::size()) high.store(out + i + Wide::size(), left - Wide::size());
  }
}

template <typename scalar_t>
void narrow(const float* x, scalar_t* out, int64_t n) {
  using Narrow = at::vec::Vectorized<scalar_t>;
  using Wide = at::vec::Vectorized<float>;
  for (int64_t i = 0; i < n; i += Narrow::size()) {
    const int64_t left = std::min<int64_t>(n - i, Narrow::size());
    const auto low = Wide::loadu(x + i, std::min<int64_t>(left, Wide::size()));
    const auto high = left > Wide::size() ? Wide::loadu(x + i + Wide::size(), left - Wide::size())
                                          : Wide(0.0f);
    at::vec::convert_from_float<scalar_t>(low, high).store(out + i, left);
  }
}

template <typename scalar_t>
void rows(const at::Tensor& x, at::Tensor& out, const float* gain, const float* bias,
          const Norm& norm) {
  const int64_t n = x.size(-1), wide = out.size(-1), count = n == 0 ? 0 : x.numel() / n;
  const scalar_t* from = x.const_data_ptr<scalar_t>();
  scalar_t* to = out.mutable_data_ptr<scalar_t>();
  at::parallel_for(0, count, std::max<int64_t>(1, kNumbersPerTask / wide),
                   [&](int64_t begin, int64_t end) {
    if constexpr (std::is_same_v<scalar_t, float>) {
      for (int64_t i = begin; i < end; ++i)
        row(from + i * n, to + i * wide, n, gain, bias, norm);
    } else {
      std::vector<float> buffer(wide);
      for (int64_t i = begin; i < end; ++i) {
        widen(from + i * n, buffer.data(), n);
        row(buffer.data(), buffer.data(), n, gain, bias, norm);
        narrow(buffer.data(), to + i * wide, wide);
      }
    }
  });
}

// Whether the numbers behind x may be read without anybody noticing that no operation ran.
bool takes(const at::Tensor& x) {
  using c10::DispatchKey;
  static const c10::DispatchKeySet plain(
      {DispatchKey::CPU, DispatchKey::AutogradCPU, DispatchKey::ADInplaceOrView,
       DispatchKey::AutocastCPU});
  const auto type = x.scalar_type();
  return (type == at::kFloat || type == at::kBFloat16 || type == at::kHalf) && x.dim() > 0 &&
         x.is_contiguous() && (x.key_set() | plain) == plain &&
         !(c10::GradMode::is_enabled() && x.requires_grad());
}

// A gain or a bias in float32: its own numbers where they are that already.
struct Factors {
  const float* numbers = nullptr;
  std::vector<float> copy;

  // False if the argument is not to be taken; None is, and leaves `numbers` empty.
  bool read(PyObject* argument, double offset, int64_t length) {
    if (argument == Py_None) return true;
    if (!THPVariable_Check(argument)) return false;
    const at::Tensor& tensor = THPVariable_Unpack(argument);
    if (!takes(tensor) || tensor.numel() != length) return false;
    if (tensor.scalar_type() == at::kFloat && offset == 0.0) {
      numbers = tensor.const_data_ptr<float>();
      return true;
    }
    copy.resize(length);
    switch (tensor.scalar_type()) {
      case at::kFloat: std::copy_n(tensor.const_data_ptr<float>(), length, copy.data()); break;
      case at::kHalf: widen(tensor.const_data_ptr<at::Half>(), copy.data(), length); break;
      default: widen(tensor.const_data_ptr<at::BFloat16>(), copy.data(), length);
    }
    for (float& number : copy) number += static_cast<float>(offset);
    numbers = copy.data();
    return true;
  }
};

// norm(x, gain, bias, offset, eps, size, used, compressed, expand)
PyObject* norm(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 9) {
    PyErr_SetString(PyExc_TypeError, "norm takes 9 arguments");
    return nullptr;
  }
  const double offset = PyFloat_AsDouble(arguments[3]);
  const Norm wanted{PyFloat_AsDouble(arguments[4]), PyLong_AsLongLong(arguments[5]),
                    PyLong_AsLongLong(arguments[6]), arguments[7] == Py_True,
                    arguments[8] == Py_True};
  if (PyErr_Occurred()) return nullptr;
  if (!THPVariable_CheckExact(arguments[0]) || at::tracer::impl::is_dispatch_enabled() ||
      c10::impl::dispatch_mode_enabled())
    Py_RETURN_NONE;
  const at::Tensor& x = THPVariable_Unpack(arguments[0]);
  if (!takes(x) || wanted.used > x.size(-1)) Py_RETURN_NONE;
  auto shape = x.sizes().vec();
  shape.back() += wanted.expand ? 1 : 0;
  Factors gain, bias;
  if (!gain.read(arguments[1], offset, shape.back()) || !bias.read(arguments[2], 0.0, shape.back()))
    Py_RETURN_NONE;
  at::Tensor out;
  {
    pybind11::gil_scoped_release unlocked;
    out = at::empty(shape, x.options());
    switch (x.scalar_type()) {
      case at::kFloat: rows<float>(x, out, gain.numbers, bias.numbers, wanted); break;
      case at::kHalf: rows<at::Half>(x, out, gain.numbers, bias.numbers, wanted); break;
      default: rows<at::BFloat16>(x, out, gain.numbers, bias.numbers, wanted);
    }
  }
  return THPVariable_Wrap(out);
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {
    {"norm", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(norm)), METH_FASTCALL,
     "norm(x, gain, bias, offset, eps, size, used, compressed, expand) -> Tensor or None"},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "normconvert_fused_norm", nullptr, -1, methods,
                      nullptr,               nullptr,                  nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_normconvert_fused_norm() { return PyModule_Create(&module); }
