// A chain of modules as one network, in the time of a few dictionary look-ups: what layers.walk finds in Python, where all
// parts are layers that the kernels know. Where one is not, nothing has been done.
#include "chain.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/grad_mode.h>
#include <ATen/record_function.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cstdlib>
#include <new>
#include <vector>

#include "call.h"
#include "network.h"
#include "together.h"

namespace fastmlp {
namespace {

// What Python knows, as layers.py has put it together.
struct Known {
  // That of a tuple, taken apart once: there is one.
  static const Known& of(PyObject* tuple) {
    static Known known;
    if (known.tuple != tuple) known = Known(tuple);
    return known;
  }

  // What is to be as it is in a module of torch's.
  struct Row {
    PyObject* dict;
    Key key;
    PyObject* value;
  };
  PyObject* tuple = nullptr;                 // held
  PyObject *roles, *functions, *composites;  // dicts: by class, by function, by name
  Objects hooks;                             // the dicts of hooks for all modules
  std::vector<Row> torchs;
  PyObject *seen, *activation, *drops;  // functions, for what is rarer

 private:
  Known() = default;
  explicit Known(PyObject* tuple) : tuple(Py_NewRef(tuple)) {
    TORCH_CHECK_TYPE(PyTuple_Check(tuple) && PyTuple_GET_SIZE(tuple) == 9, "known: expected 9 items");
    const Objects items = items_of(tuple);
    roles = items[0], functions = items[1], composites = items[2], hooks = items_of(items[3]);
    seen = items[5], activation = items[6], drops = items[7];
    for (PyObject* const row : items_of(items[4])) {
      PyObject* const dict = PyModule_GetDict(PyTuple_GET_ITEM(row, 0));
      torchs.push_back({dict, key_in(dict, PyTuple_GET_ITEM(row, 1)), PyTuple_GET_ITEM(row, 2)});
    }
  }

  static Key key_in(PyObject* dict, PyObject* name) {
    PyObject* found;
    for (Py_ssize_t place = 0, next = 0; PyDict_Next(dict, &next, &found, nullptr); place = next)
      if (PyUnicode_Check(found) && PyUnicode_Compare(found, name) == 0) return {Py_NewRef(found), place};
    return {name, 0};
  }
};

bool is_empty(PyObject* dict) { return dict && PyDict_Check(dict) && PyDict_GET_SIZE(dict) == 0; }

THPObjectPtr called(PyObject* function, std::initializer_list<PyObject*> arguments) {
  THPObjectPtr result(PyObject_Vectorcall(function, std::data(arguments), arguments.size(), nullptr));
  if (!result) throw python_error();
  return result;
}

// Whether there are no hooks for all modules, and torch is what it has been.
bool is_untouched(const Known& known) {
  return std::all_of(known.hooks.begin(), known.hooks.end(), is_empty) &&
         std::all_of(known.torchs.begin(), known.torchs.end(),
                     [](const Known::Row& row) { return get(row.dict, row.key) == row.value; });
}

// Whether the owner's forward and call are still the role's.
bool holds(PyObject* role) {
  static PyObject *const forward = interned("forward"), *const call = interned("__call__");
  auto* const owner = reinterpret_cast<PyTypeObject*>(PyTuple_GET_ITEM(role, 1));
  return _PyType_Lookup(owner, forward) == PyTuple_GET_ITEM(role, 2) &&
         _PyType_Lookup(owner, call) == PyTuple_GET_ITEM(role, 3);
}

// The attributes of a module, where to call it is to call its forward; else null.
THPObjectPtr attributes_of(PyObject* module) {
  static const Key hooks[] = {Key("_forward_hooks", 7), Key("_forward_pre_hooks", 10),
                              Key("_backward_hooks", 5), Key("_backward_pre_hooks", 4)};
  static PyObject* const forward = interned("forward");
  THPObjectPtr own(PyObject_GenericGetDict(module, nullptr));
  if (!own) throw python_error();
  const bool is_plainly_called = std::all_of(std::begin(hooks), std::end(hooks),
                                             [&](const Key& key) { return is_empty(get(own, key)); });
  return is_plainly_called && !get(own, forward) ? std::move(own) : THPObjectPtr();
}

// The role of a class; null where it has none, None where that is not what it was. What is found is kept for as long as the
// version of the class, which Python changes with any of its attributes and its bases', and uses for no other class.
PyObject* role_of(PyTypeObject* type, const Known& known) {
  static PyObject* const of_fused = interned("__fastmlp__");
  static struct {
    PyTypeObject* type;
    unsigned version;
    PyObject* role;
  } kept[64];
  auto& own = kept[reinterpret_cast<uintptr_t>(type) / 64 % std::size(kept)];
  if (own.type == type && own.version == type->tp_version_tag && own.version) return own.role;
  PyObject* role = get(known.roles, reinterpret_cast<PyObject*>(type));
  if (!role)
    if (PyObject* const fused = get(type->tp_dict, of_fused)) role = PyTuple_GET_ITEM(fused, 1);
  if (!role || role == Py_None) return nullptr;
  if (!holds(role)) return Py_None;
  _PyType_Lookup(type, of_fused);  // gives it a version
  own = {type, type->tp_version_tag, role};
  return role;
}

// Its functions tell whether all of it are layers, after what reshapes their input. What is found is held: code of Python's
// may change anything.
class Walk {
 public:
  Walk(const Known& known, Chain& chain) : known(known), chain(chain) {}

  bool all(PyObject* parts) {
    if (parts && PyDict_CheckExact(parts)) {
      PyObject *key, *value;
      for (Py_ssize_t next = 0; PyDict_Next(parts, &next, &key, &value);)
        if (!part(THPObjectPtr::dup(value))) return false;
      return true;
    }
    THPObjectPtr items(parts ? PySequence_Fast(parts, "parts: expected a list") : nullptr);
    if (!items) {
      if (parts) throw python_error();
      return false;
    }
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(items.get()); ++i)
      if (!part(PySequence_Fast_GET_ITEM(items.get(), i))) return false;
    return true;
  }

  bool part(PyObject* o) {
    PyTypeObject* const type = Py_TYPE(o);
    if (type == &PyFunction_Type || type == &PyCFunction_Type) return function(o);
    PyObject* const role = role_of(type, known);
    if (!role) return other(o);
    THPObjectPtr own = role == Py_None ? THPObjectPtr() : attributes_of(o);
    return own && named(PyTuple_GET_ITEM(role, 0), own, PyTuple_GET_ITEM(role, 4), o);
  }

 private:
  bool function(PyObject* o) {
    static PyObject* const no_arguments = PyDict_New();
    PyObject* const name = get(known.functions, o);
    // F.tanh, say, calls the method: one that is there, and not in its base, is not torch's.
    const bool is_exchanged = name && get(reinterpret_cast<PyTypeObject*>(THPVariableClass)->tp_dict, name);
    return name && !is_exchanged && named(name, no_arguments, nullptr, o);
  }

  bool other(PyObject* o) {
    THPObjectPtr found = called(known.seen, {o});
    PyObject* name = PyTuple_GET_ITEM(found.get(), 0);
    if (name == Py_None) return false;
    Py_INCREF(name);
    PyUnicode_InternInPlace(&name);
    const THPObjectPtr held(name);
    return named(name, PyTuple_GET_ITEM(found.get(), 1), nullptr, o);
  }

  // With its attributes or arguments, or its parts.
  bool named(PyObject* name, PyObject* own, PyObject* inner, PyObject* o) {
    static PyObject *const linear = interned("linear"), *const layer = interned("layer"),
                           *const identity = interned("identity"), *const dropout = interned("dropout"),
                           *const sequential = interned("sequential"), *const is_chain = interned("chain"),
                           *const view = interned("view");
    // Where nn.Module's __init__, and nn.Linear's and ours, have them.
    static const Key parameters("_parameters", 1), modules("_modules", 16), activation("activation", 19),
        weight("weight", 0), bias("bias", 1);
    static PyObject* const watched[] = {interned("relu"), interned("tanh"), interned("sigmoid")};
    if (name == linear || name == layer) {
      PyObject* const tensors = get(own, parameters);
      return push(get(tensors, weight), get(tensors, bias), name == layer ? get(own, activation) : Py_None);
    }
    if (name == identity) return true;
    if (name == view) return chain.weights.empty() && push_view(o);
    if (name == dropout) return called(known.drops, {own}) == Py_False;
    if (name == sequential) return all(get(own, modules));
    if (name == is_chain) return inner && inner != Py_None ? all(called(inner, {o})) : all(own);
    const bool is_known = std::find(std::begin(watched), std::end(watched), name) != std::end(watched);
    if (!(is_known || get(known.composites, name)) || chain.weights.empty() ||
        chain.activations.back() != Py_None)
      return false;
    THPObjectPtr found = is_known ? THPObjectPtr::dup(name) : called(known.activation, {name, own});
    Py_DECREF(chain.activations.back());
    chain.activations.back() = found.release();
    return chain.activations.back() != Py_None;
  }

  bool push_view(PyObject* o) {
    chain.views.push_back(Py_NewRef(o));
    return true;
  }

  bool push(PyObject* weight, PyObject* bias, PyObject* activation) {
    if (!weight || !bias || !activation) return false;
    chain.weights.push_back(Py_NewRef(weight));
    chain.biases.push_back(Py_NewRef(bias));
    chain.activations.push_back(Py_NewRef(activation));
    return true;
  }

  const Known& known;
  Chain& chain;
};

// The input of the layers; null where to reshape it raises, which will be raised again where it belongs.
THPObjectPtr reshaped(PyObject* input, const Chain& chain) {
  THPObjectPtr value = THPObjectPtr::dup(input);
  for (PyObject* const view : chain.views) {
    PyObject* const arguments[] = {value};
    value = PyObject_Vectorcall(view, arguments, 1, nullptr);
    if (!value) {
      PyErr_Clear();
      break;
    }
  }
  return value;
}

// ---- the op network, of objects

// Whether the dispatcher would call the op's kernel for the CPU, with nobody to see it, and nothing to be differentiated.
bool is_unseen(const Tensor& input, Objects weights, Objects biases) {
  c10::DispatchKeySet keys = input.key_set();
  bool has_gradient = input.requires_grad() || input._fw_grad(0).defined();
  for (const Objects list : {weights, biases})
    for (PyObject* const o : list) {
      if (o == Py_None) continue;
      const Tensor& t = THPVariable_Unpack(o);
      keys = keys | t.key_set();
      has_gradient |= t.requires_grad() || t._fw_grad(0).defined();
    }
  const auto local = c10::impl::tls_local_dispatch_key_set();
  const c10::DispatchKeySet autograd = c10::autograd_dispatch_keyset - local.excluded_;
  const bool has_autograd = !((keys | local.included_) & autograd).empty();
  const bool is_differentiated = has_gradient && at::GradMode::is_enabled() && has_autograd;
  return !is_differentiated && nobody_sees(keys);
}

// An output. The aligned memory of torch's allocator takes as long as a small network's first layer, malloc's a fifth of
// that. What is large, or comes from an allocator that somebody has set, is torch's.
Tensor new_output(at::IntArrayRef sizes, const at::TensorOptions& options) {
  constexpr size_t most = 4096, line = 64;  // bytes
  struct Small final : c10::Allocator {
    c10::DataPtr allocate(size_t bytes) override {
      void* const memory = std::malloc(bytes + line);
      if (!memory) throw std::bad_alloc();
      const uintptr_t data = (reinterpret_cast<uintptr_t>(memory) + line - 1) / line * line;
      return {reinterpret_cast<void*>(data), memory, &std::free, at::Device(at::kCPU)};
    }
    void copy_data(void* to, const void* from, size_t bytes) const override {
      default_copy_data(to, from, bytes);
    }
  };
  static Small small;
  const at::ScalarType dtype = options.dtype().toScalarType();
  if (size_t(c10::multiply_integers(sizes)) * c10::elementSize(dtype) > most ||
      c10::GetCPUAllocator() != c10::GetDefaultCPUAllocator())
    return empty(sizes, options);
  return at::detail::empty_generic(sizes, &small, c10::DispatchKeySet(c10::DispatchKey::CPU), dtype,
                                   std::nullopt);
}

}  // namespace

Tensor run_unseen(const Tensor& input, Objects weights, Objects biases, Objects activations) {
  const at::ScalarType dtype = input.scalar_type();
  if (weights.empty() || biases.size() != weights.size() || activations.size() != weights.size() ||
      !is_unseen(input, weights, biases) || input.dim() == 0 || why_not_multiplied(input))
    return {};
  const auto is_vector = [&](const Tensor& t, int64_t size) {
    return t.scalar_type() == dtype && t.dim() == 1 && t.size(0) == size && (size <= 1 || t.stride(0) == 1);
  };
  const auto is_matrix = [&](const Tensor& t, int64_t columns) {
    return t.scalar_type() == dtype && t.dim() == 2 && t.size(1) == columns &&
           (columns <= 1 || t.stride(1) == 1);
  };
  int64_t K = input.size(-1);
  if (!is_matrix(input, K) && !input.is_contiguous()) return {};
  const int64_t M = rows_of(input);
  const bool reduced = is_reduced(input);
  c10::SmallVector<Forward, 8> layers;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& weight = THPVariable_Unpack(weights[i]);
    const Tensor* const bias = biases[i] == Py_None ? nullptr : &THPVariable_Unpack(biases[i]);
    if (!is_matrix(weight, K) || (bias && !is_vector(*bias, weight.size(0)))) return {};
    const GivenActivation activation(activations[i]);
    layers.push_back({.dtype = dtype_of(input),
                      .reduced = reduced,
                      .activation = kernel_for(dtype, activation.name, activation.numbers),
                      .M = M,
                      .N = weight.size(0),
                      .K = K,
                      .x = nullptr,
                      .ldx = K,
                      .weight = weight.const_data_ptr(),
                      .ldw = weight.stride(0),
                      .bias = bias ? bias->const_data_ptr() : nullptr,
                      .y = nullptr});
    K = weight.size(0);
  }
  at::DimVector sizes(input.sizes());
  sizes.back() = K;
  const Tensor y = new_output(sizes, input.options());
  layers.front().x = input.const_data_ptr();
  if (input.dim() == 2) layers.front().ldx = input.stride(0);
  layers.back().y = y.mutable_data_ptr();
  if (Together::current) Together::current->add(layers.data(), layers.size(), {});
  else run_here(layers.data(), int64_t(layers.size()));
  return y;
}

THPObjectPtr run_chain(PyObject* input, const Chain& chain) {
  const Objects weights = chain.weights, biases = chain.biases;
  const auto is_bias = [](PyObject* o) { return o == Py_None || is_plain(o); };
  if (!is_plain(input) || !std::all_of(weights.begin(), weights.end(), is_plain) ||
      !std::all_of(biases.begin(), biases.end(), is_bias))
    return {};
  const Tensor x = THPVariable_Unpack(input);
  Tensor y = run_unseen(x, weights, biases, chain.activations);
  if (y.defined()) return THPObjectPtr(THPVariable_Wrap(std::move(y)));
  const NamedActivations named(chain.activations);
  c10::SmallVector<Tensor, 4> weight_tensors;
  OptionalTensors bias_tensors;
  bias_tensors.reserve(biases.size());
  for (PyObject* const weight : weights) weight_tensors.push_back(THPVariable_Unpack(weight));
  for (PyObject* const bias : biases) bias_tensors.push_back(tensor_or_none(bias));
  {
    const pybind11::gil_scoped_release no_gil;
    y = call_network(x, weight_tensors, bias_tensors, named.names, named.parameters);
  }
  return THPObjectPtr(THPVariable_Wrap(std::move(y)));
}

THPObjectPtr attributes_of(PyObject* role, PyObject* module) {
  return holds(role) ? attributes_of(module) : THPObjectPtr();
}

THPObjectPtr find_unwatched(PyObject* known_tuple, PyObject* parts, PyObject* input, Chain& chain) {
  const Known& known = Known::of(known_tuple);
  if (!is_plain(input) || at::impl::PythonTorchFunctionTLS::stack_len() > 0 || !is_untouched(known))
    return {};
  Walk walk(known, chain);
  const bool are_many = is_list(parts) || PyDict_CheckExact(parts);
  if (!(are_many ? walk.all(parts) : walk.part(parts)) || chain.weights.empty()) return {};
  return reshaped(input, chain);
}

bool nobody_sees(c10::DispatchKeySet keys) {
  const auto local = c10::impl::tls_local_dispatch_key_set();
  keys = (keys | local.included_) - local.excluded_;
  const c10::DispatchKeySet passed = c10::autograd_dispatch_keyset_with_ADInplaceOrView |
                                     c10::DispatchKeySet(c10::DispatchKey::BackendSelect);
  return keys - passed == c10::DispatchKeySet(c10::DispatchKey::CPU) &&
         !at::getStepCallbacksUnlessEmpty(at::RecordScope::FUNCTION);
}

bool find_chains(PyObject* known, PyObject* parts, std::vector<Chain>& chains) {
  const Known& own = Known::of(known);
  const Objects items = items_of(parts);
  chains = std::vector<Chain>(items.size());
  if (at::impl::PythonTorchFunctionTLS::stack_len() > 0 || !is_untouched(own)) return false;
  for (size_t i = 0; i < items.size(); ++i)
    if (!Walk(own, chains[i]).part(items[i])) return false;
  return true;
}

void run_here(Forward* layers, int64_t count) {
  struct alignas(64) Line {
    char bytes[64];
  };
  constexpr int64_t most_kept = 1 << 20;
  double work = 0;
  for (const Forward* p = layers; p != layers + count; ++p)
    work += double(p->M) * double(p->N) * double(p->K);
  const Unlocked unlocked(work >= long_enough);
  const int threads = at::get_num_threads();
  const int64_t bytes = cpu::forward_workspace(layers, count, threads);
  if (bytes > most_kept) {
    const Tensor workspace = empty({bytes}, at::kByte);
    return cpu::forward(layers, count, workspace.mutable_data_ptr(), threads);
  }
  static thread_local std::vector<Line> kept;
  if (const size_t lines = size_t(bytes) / sizeof(Line) + 1; kept.size() < lines) kept.resize(lines);
  cpu::forward(layers, count, kept.data(), threads);
}

PyObject* network(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 4 && is_list(arguments[1]) && is_list(arguments[2]) && is_list(arguments[3]),
                   "network: expected input and lists of weights, biases and activations");
  PyObject* const input = arguments[0];
  Chain chain;
  for (auto* const list : {&chain.weights, &chain.biases, &chain.activations})
    for (PyObject* const o : items_of(*++arguments)) list->push_back(Py_NewRef(o));
  THPObjectPtr y = run_chain(input, chain);
  return y ? y.release() : Py_NewRef(Py_NotImplemented);
  END_HANDLE_TH_ERRORS
}

PyObject* apply(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 3, "apply: expected what is known, parts and an input");
  Chain chain;
  THPObjectPtr input = find_unwatched(arguments[0], arguments[1], arguments[2], chain);
  THPObjectPtr y = input ? run_chain(input, chain) : THPObjectPtr();
  return y ? y.release() : Py_NewRef(Py_NotImplemented);
  END_HANDLE_TH_ERRORS
}

PyObject* find_layers(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 4 && PyTuple_Check(arguments[3]) && PyTuple_GET_SIZE(arguments[3]) == 3,
                   "find_layers: expected what is known, parts, an input and three lists");
  const Known& known = Known::of(arguments[0]);
  Chain chain;
  if (!Walk(known, chain).all(arguments[1])) Py_RETURN_NOTIMPLEMENTED;
  THPObjectPtr input = reshaped(arguments[2], chain);
  if (!input) Py_RETURN_NOTIMPLEMENTED;
  const Chain::Objects* const found[] = {&chain.weights, &chain.biases, &chain.activations};
  for (Py_ssize_t i = 0; i < 3; ++i)
    for (PyObject* const o : *found[i])
      if (PyList_Append(PyTuple_GET_ITEM(arguments[3], i), o)) throw python_error();
  return input.release();
  END_HANDLE_TH_ERRORS
}

PyObject* is_untouched(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 1, "is_untouched: expected what is known");
  return PyBool_FromLong(is_untouched(Known::of(arguments[0])));
  END_HANDLE_TH_ERRORS
}

}  // namespace fastmlp
