// The extension module: what is not a tensor op. Importing it also registers the ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "../kernels.h"
#include "activations.h"
#include "call.h"
#include "lookup.h"

namespace py = pybind11;

namespace {

std::string names(const char* separator) {
  std::string text;
  for (const char* name : fastmlp::cpu::instruction_sets)
    text += (text.empty() ? "" : separator) + std::string(name);
  return text;
}

void use(const std::string& name) {
  if (!fastmlp::cpu::use(name.c_str()))
    throw py::value_error("instruction set: expected one of " + names(", ") +
                          " that this processor has, got '" + name + "'");
}

PyCFunction fast(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef functions[] = {
    {"attribute", fast(fastmlp::attribute), METH_FASTCALL, nullptr},
    {"batch", fast(fastmlp::batch), METH_FASTCALL, nullptr},
    {"clip_grad_norm", fast(fastmlp::clip_grad_norm), METH_FASTCALL, nullptr},
    {"count_up_numbers", fast(fastmlp::count_up_numbers), METH_FASTCALL, nullptr},
    {"find", fast(fastmlp::find), METH_FASTCALL, nullptr},
    {"is_unchanged", fast(fastmlp::is_unchanged), METH_FASTCALL, nullptr},
    {"leave", fast(fastmlp::leave), METH_FASTCALL, nullptr},
    {"network", fast(fastmlp::network), METH_FASTCALL, nullptr},
    {"optimize", fast(fastmlp::optimize), METH_FASTCALL, nullptr},
    {"places", fast(fastmlp::places), METH_FASTCALL, nullptr},
    {"states", fast(fastmlp::states), METH_FASTCALL, nullptr},
    {"train_step", fast(fastmlp::train_step), METH_FASTCALL, nullptr},
    {"differentiate_down_to", fast(fastmlp::differentiate_down_to), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  PyModule_AddFunctions(m.ptr(), functions);
  m.def("instruction_set", [] { return std::string(fastmlp::cpu::instruction_set()); });
  m.def("instruction_sets", [] {
    py::list supported;
    for (const char* name : fastmlp::cpu::instruction_sets)
      if (fastmlp::cpu::supports(name)) supported.append(name);
    return supported;
  });
  m.def("use_instruction_set", use, py::arg("name"));
  py::dict activations;  // each with the defaults of its parameters
  for (const fastmlp::ActivationFormula& formula : fastmlp::formulas)
    activations[py::str(std::string(formula.name))] = py::tuple(py::cast(formula.defaults));
  m.attr("activations") = activations;
  m.attr("size_of_numbers") = sizeof(fastmlp::StepNumbers);  // of a parameter, in bytes
  m.attr("compiler") = "gcc " __VERSION__;
#ifdef FASTMLP_WITH_CUDA
  m.attr("cuda") = fastmlp::cuda::toolkit();
  m.attr("cuda_architectures") = fastmlp::cuda::architectures();
#else
  m.attr("cuda") = py::none();
  m.attr("cuda_architectures") = py::none();
#endif
}
