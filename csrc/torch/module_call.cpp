// Calls of modules that are layers alone, past nn.Module's call and forward, which are Python and take longer than a small
// network.
//
// The slot tp_call of a class is what Python's `module(x)` runs; `type(module).__call__` stays nn.Module's own function, which
// torch.compile and others read. Where one is assigned, as torch.fx does for a while, Python itself fills the slots of all
// derived classes anew. A class derived from one of these has an ordinary slot.
#include <ATen/record_function.h>

#include "call.h"
#include "chain.h"

namespace fastmlp {
namespace {

PyObject* known;       // what layers.py knows
ternaryfunc ordinary;  // the slot of classes written in Python: it calls __call__

// Whether nn.Module's call would do nothing but to call forward, hooks aside, and nobody would see that it does: no tracer
// of torch.jit, which keeps the names of modules; no profiler, whether of torch or of Python, and no debugger.
bool only_calls_forward(PyObject* module) {
  const PyThreadState* const thread = PyThreadState_Get();
  if (thread->c_profilefunc || thread->c_tracefunc ||
      c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::Tracer) ||
      at::getStepCallbacksUnlessEmpty(at::RecordScope::FUNCTION))
    return false;
  THPObjectPtr own(PyObject_GenericGetDict(module, nullptr));
  if (!own) throw python_error();
  const Objects rows = items_of(PyTuple_GET_ITEM(known, 8));
  return std::all_of(rows.begin(), rows.end(), [&](PyObject* row) {
    PyObject* const name = PyTuple_GET_ITEM(row, 0);
    return _PyType_Lookup(Py_TYPE(module), name) == PyTuple_GET_ITEM(row, 1) && !get(own, name);
  });
}

PyObject* call(PyObject* module, PyObject* args, PyObject* kwargs) {
  HANDLE_TH_ERRORS
  if (PyTuple_GET_SIZE(args) == 1 && (!kwargs || PyDict_GET_SIZE(kwargs) == 0) &&
      only_calls_forward(module)) {
    Chain chain;
    THPObjectPtr x = find_unwatched(known, module, PyTuple_GET_ITEM(args, 0), chain);
    if (THPObjectPtr y = x ? run_chain(x, chain) : THPObjectPtr()) return y.release();
  }
  return ordinary(module, args, kwargs);
  END_HANDLE_TH_ERRORS
}

}  // namespace

PyObject* call_directly(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 2 || !PyTuple_Check(arguments[0]) || !PyType_Check(arguments[1]))
    return PyErr_Format(PyExc_TypeError, "call_directly: expected what is known and a class");
  auto* const type = reinterpret_cast<PyTypeObject*>(arguments[1]);
  if (!ordinary) ordinary = type->tp_call;
  Py_XSETREF(known, Py_NewRef(arguments[0]));
  if (type->tp_call == ordinary) type->tp_call = call;
  Py_RETURN_NONE;
}

}  // namespace fastmlp
