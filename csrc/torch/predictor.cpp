// A snapshot of a network, and the shortest way from an array to what the network makes of it: no dispatcher, no autograd,
// and of a NumPy array no tensor either.
#include <torch/csrc/utils/object_ptr.h>

#include <memory>

#include "call.h"
#include "chain.h"

namespace fastmlp {
namespace {

struct Snapshot {
  std::vector<Tensor> memory;   // the parameters
  std::vector<Forward> layers;  // complete but for the rows and the ends
  int64_t K, N;

  void run(const float* x, int64_t ldx, float* y, int64_t rows) const {
    c10::SmallVector<Forward, 8> own(layers.begin(), layers.end());
    for (Forward& layer : own) layer.M = rows;
    own.front().x = x, own.front().ldx = ldx, own.back().y = y;
    run_here(own.data(), int64_t(own.size()));
  }
};

constexpr const char* capsule_name = "fastmlp.snapshot";

// Where an array of float32 is, and how it lies: of a tensor, or of what has a buffer.
struct Array {
  float* data = nullptr;
  c10::SmallVector<int64_t, 4> sizes;
  int64_t ld = 0;  // between rows of the last dimension, whose elements are adjacent
  Py_buffer view{};
  Tensor tensor;

  Array() = default;
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() { PyBuffer_Release(&view); }

  // False where it is another kind of array, or one that is laid out otherwise.
  bool read(PyObject* o, bool writable) {
    if (is_plain(o)) return read_tensor(THPVariable_Unpack(o));
    if (PyObject_GetBuffer(o, &view, PyBUF_STRIDES | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0))) {
      PyErr_Clear();
      return false;
    }
    if (view.itemsize != 4 || !view.format || std::string_view(view.format) != "f" || view.ndim == 0)
      return false;
    data = static_cast<float*>(view.buf);
    c10::SmallVector<int64_t, 4> strides;
    for (int i = 0; i < view.ndim; ++i) {
      if (view.strides[i] % 4) return false;
      sizes.push_back(view.shape[i]), strides.push_back(view.strides[i] / 4);
    }
    return has_rows(strides);
  }

  bool read_tensor(const Tensor& t) {
    if (!t.is_cpu() || t.scalar_type() != at::kFloat || why_not_plain(t) || t.dim() == 0) return false;
    tensor = t;
    data = static_cast<float*>(const_cast<void*>(t.const_data_ptr()));
    sizes.append(t.sizes().begin(), t.sizes().end());
    return has_rows(t.strides());
  }

  int64_t rows() const { return c10::multiply_integers(sizes.begin(), sizes.end() - 1); }
  Memory memory() const {
    const int64_t last = rows() > 0 ? (rows() - 1) * ld + sizes.back() : 0;
    const char* const begin = reinterpret_cast<const char*>(data);
    return {begin, begin + last * int64_t{sizeof(float)}};
  }

 private:
  // Whether all but the last dimension can be taken together.
  bool has_rows(at::IntArrayRef strides) {
    const int64_t columns = sizes.back();
    if (columns > 1 && strides.back() != 1) return false;
    ld = columns;
    int64_t expected = -1;
    for (size_t i = sizes.size() - 1; i-- > 0;) {
      if (sizes[i] == 1) continue;
      if (expected < 0) ld = strides[i];
      else if (strides[i] != expected) return false;
      expected = strides[i] * sizes[i];
    }
    return ld >= 0;
  }
};

PyObject* new_array(at::IntArrayRef sizes) {
  static PyObject* const numpy = PyImport_ImportModule("numpy");
  static PyObject* const make = numpy ? PyObject_GetAttrString(numpy, "empty") : nullptr;
  static PyObject* const dtype = numpy ? PyObject_GetAttrString(numpy, "float32") : nullptr;
  if (!make || !dtype) throw python_error();
  THPObjectPtr shape(PyTuple_New(Py_ssize_t(sizes.size())));
  for (size_t i = 0; shape && i < sizes.size(); ++i)
    PyTuple_SET_ITEM(shape.get(), Py_ssize_t(i), PyLong_FromLongLong(sizes[i]));
  if (!shape) throw python_error();
  PyObject* const arguments[] = {shape.get(), dtype};
  return PyObject_Vectorcall(make, arguments, 2, nullptr);
}

}  // namespace

PyObject* snapshot(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 3 && is_list(arguments[0]) && is_list(arguments[1]) && is_list(arguments[2]),
                   "snapshot: expected lists of weights, biases and activations");
  auto own = std::make_unique<Snapshot>();
  const NamedActivations named(items_of(arguments[2]));
  const LayerActivations activations = parse_activations(named.names, named.parameters);
  const auto weights = items_of(arguments[0]), biases = items_of(arguments[1]);
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor weight = THPVariable_Unpack(weights[i]);
    const OptionalTensor bias = tensor_or_none(biases[i]);
    own->layers.push_back({.dtype = Dtype::float32,
                           .reduced = false,
                           .activation = activations[i].kernel_for(at::kFloat),
                           .M = 0,
                           .N = weight.size(0),
                           .K = weight.size(1),
                           .x = nullptr,
                           .ldx = weight.size(1),
                           .weight = weight.const_data_ptr(),
                           .ldw = weight.size(1),
                           .bias = bias ? bias->const_data_ptr() : nullptr,
                           .y = nullptr});
    own->memory.push_back(weight);
    if (bias) own->memory.push_back(*bias);
  }
  own->K = own->layers.front().K, own->N = own->layers.back().N;
  PyObject* const capsule = PyCapsule_New(own.get(), capsule_name, [](PyObject* o) {
    delete static_cast<Snapshot*>(PyCapsule_GetPointer(o, capsule_name));
  });
  if (capsule) own.release();
  return capsule;
  END_HANDLE_TH_ERRORS
}

PyObject* predict(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 3, "predict: expected a snapshot, x, and out or None");
  const auto* const own = static_cast<const Snapshot*>(PyCapsule_GetPointer(arguments[0], capsule_name));
  if (!own) throw python_error();
  Array x, out;
  if (!x.read(arguments[1], false)) Py_RETURN_NOTIMPLEMENTED;
  TORCH_CHECK_VALUE(x.sizes.back() == own->K, "x: expected shape [..., ", own->K, "], got ",
                    at::IntArrayRef(x.sizes));
  auto sizes = x.sizes;
  sizes.back() = own->N;
  THPObjectPtr result = THPObjectPtr::dup(arguments[2]);
  if (arguments[2] == Py_None) {
    result = is_plain(arguments[1]) ? THPVariable_Wrap(at::detail::empty_cpu(sizes, at::kFloat))
                                    : new_array(sizes);
    if (!result) throw python_error();
  }
  TORCH_CHECK_VALUE(out.read(result, true) && at::IntArrayRef(out.sizes) == at::IntArrayRef(sizes) &&
                        (out.ld == own->N || out.rows() <= 1),
                    "out: expected an array of float32 on the CPU, of shape ", at::IntArrayRef(sizes),
                    ", without gaps");
  if (arguments[2] != Py_None) {
    TORCH_CHECK_VALUE(!overlap({x.memory(), out.memory()}), "out: expected memory that x does not use");
    if (out.tensor.defined()) out.tensor.unsafeGetTensorImpl()->bump_version();
  }
  own->run(x.data, x.ld, out.data, x.rows());
  return result.release();
  END_HANDLE_TH_ERRORS
}

}  // namespace fastmlp
