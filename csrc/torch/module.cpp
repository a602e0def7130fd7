// The extension module: what is not a tensor op. Importing it also registers the ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <iterator>
#include <string>
#include <tuple>
#include <vector>

#include "../cuda/plan.h"
#include "../cuda/step_plan.h"
#include "../kernels.h"
#include "activations.h"
#include "call.h"
#include "library.h"
#include "lookup.h"

#ifdef FASTMLP_WITH_CUDA
#include <c10/cuda/CUDAFunctions.h>
#endif

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

#ifdef FASTMLP_WITH_CUDA
namespace cuda = fastmlp::cuda;

// The number of a name among those that are known.
template <size_t count>
int number(const char* what, const std::string& name, const char* const (&names)[count]) {
  const auto found = std::find(names, names + count, name);
  if (found == std::end(names)) throw py::value_error(what + (": unknown name '" + name + "'"));
  return int(found - names);
}

using MeasuredRow = std::tuple<int, std::string, std::string, int, std::string>;

void use_products(const std::string& owner, const std::vector<MeasuredRow>& rows) {
  static constexpr const char* owners[] = {"table", "own", "library"};
  static constexpr const char* dtypes[] = {"float32", "bfloat16", "float16", "tf32"};
  static constexpr const char* kinds[] = {"forward", "dW", "dx", "chain forward", "chain backward"};
  std::vector<cuda::Measured> table;
  for (const auto& [architecture, dtype, kind, size, choice] : rows) {
    const int number_of_dtype = number("dtype", dtype, dtypes);
    table.push_back({.architecture = architecture,
                     .dtype = fastmlp::Dtype(number_of_dtype % 3),
                     .reduced = number_of_dtype == 3,
                     .kind = cuda::Kind(number("product", kind, kinds)),
                     .size = size,
                     .owner = cuda::Owner(number("choice", choice, owners))});
  }
  const auto library = [](const cuda::Product& p) {
    fastmlp::multiply(p, c10::Device(c10::kCUDA, c10::cuda::current_device()));
  };
  cuda::set_products(library, cuda::Owner(number("products", owner, owners)), table.data(),
                     int64_t(table.size()));
}
#endif

// What a GPU would launch for a network of ReLUs whose parameters are trained.
using PlanRow =
    std::tuple<std::string, int64_t, std::string, std::array<int64_t, 8>, double, int64_t, double>;

std::vector<PlanRow> plan(const std::vector<int64_t>& sizes, int64_t batch, const std::string& dtype_name,
                          int64_t shared_bytes, bool own) {
  using namespace fastmlp;
  static constexpr const char* launches[] = {
      "forward", "chain forward", "g", "dz", "chain backward", "dx", "dW", "x"};
  const Dtype dtype = dtype_name == "float32"    ? Dtype::float32
                      : dtype_name == "bfloat16" ? Dtype::bfloat16
                                                 : Dtype::float16;
  static char wanted;  // an address for what is not null
  std::vector<Forward> forwards;
  std::vector<Backward> backwards;
  const int64_t count = int64_t(sizes.size()) - 1;
  for (int64_t i = 0; i < count; ++i) {
    const Activation g{i + 1 < count ? Activation::relu : Activation::identity};
    Forward f{};
    Backward back{};
    f.dtype = back.dtype = dtype, f.activation = back.activation = g;
    f.M = back.M = batch, f.N = back.N = sizes[i + 1], f.K = back.K = back.ldx = sizes[i];
    back.grad_weight = back.grad_bias = &wanted;
    forwards.push_back(f);
    backwards.insert(backwards.begin(), back);
  }
  std::vector<PlanRow> rows;
  const auto add = [&](const auto& layers, bool is_forward) {
    const auto owner = [&](cuda::Kind, Dtype, bool, double operations) {
      return own ? cuda::Owner::kernels : cuda::owner_of(operations);
    };
    for (const cuda::Planned& p : cuda::plan(layers.data(), count, owner, shared_bytes)) {
      const cuda::Numbers n = cuda::numbers_of(p, layers.data(), count);
      rows.emplace_back(launches[int(p.launch)], is_forward ? p.layer : count - 1 - p.layer,
                        p.owner == cuda::Owner::kernels ? "own" : "library",
                        std::array<int64_t, 8>{n.rows, n.columns, n.K, n.cut.size, n.cut.tiles, n.cut.splits,
                                               n.cut.steps, n.blocks},
                        n.fill, n.bytes, cuda::microseconds(p, n, dtype));
    }
  };
  add(forwards, true), add(backwards, false);
  return rows;
}

// The blocks of a training step in one launch, none where it is not one; its barriers of the grid, and its microseconds.
std::tuple<int64_t, int64_t, double> plan_step(const std::vector<int64_t>& sizes, int64_t batch, bool clips,
                                               int64_t multiprocessors, int64_t shared_bytes) {
  using namespace fastmlp::cuda::whole_step;
  const int64_t layers = int64_t(sizes.size()) - 1;
  if (layers > most_layers) return {};
  Shape shape{batch, layers, {}, clips};
  std::copy(sizes.begin(), sizes.end(), shape.widths);
  const Plan p = plan(shape, {multiprocessors, shared_bytes});
  return {p.blocks, p.barriers, p.microseconds};
}

PyCFunction fast(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef functions[] = {
    {"apply", fast(fastmlp::apply), METH_FASTCALL, nullptr},
    {"attribute", fast(fastmlp::attribute), METH_FASTCALL, nullptr},
    {"batch", fast(fastmlp::batch), METH_FASTCALL, nullptr},
    {"call_directly", fast(fastmlp::call_directly), METH_FASTCALL, nullptr},
    {"clip_grad_norm", fast(fastmlp::clip_grad_norm), METH_FASTCALL, nullptr},
    {"collect", fast(fastmlp::collect), METH_FASTCALL, nullptr},
    {"count_up_numbers", fast(fastmlp::count_up_numbers), METH_FASTCALL, nullptr},
    {"ensemble", fast(fastmlp::ensemble), METH_FASTCALL, nullptr},
    {"find", fast(fastmlp::find), METH_FASTCALL, nullptr},
    {"find_layers", fast(fastmlp::find_layers), METH_FASTCALL, nullptr},
    {"is_unchanged", fast(fastmlp::is_unchanged), METH_FASTCALL, nullptr},
    {"is_untouched", fast(fastmlp::is_untouched), METH_FASTCALL, nullptr},
    {"keys", fast(fastmlp::keys), METH_FASTCALL, nullptr},
    {"known_loss", fast(fastmlp::known_loss), METH_FASTCALL, nullptr},
    {"leave", fast(fastmlp::leave), METH_FASTCALL, nullptr},
    {"network", fast(fastmlp::network), METH_FASTCALL, nullptr},
    {"optimize", fast(fastmlp::optimize), METH_FASTCALL, nullptr},
    {"options", fast(fastmlp::options), METH_FASTCALL, nullptr},
    {"places", fast(fastmlp::places), METH_FASTCALL, nullptr},
    {"predict", fast(fastmlp::predict), METH_FASTCALL, nullptr},
    {"snapshot", fast(fastmlp::snapshot), METH_FASTCALL, nullptr},
    {"train_ensemble", fast(fastmlp::train_ensemble), METH_FASTCALL, nullptr},
    {"train_step", fast(fastmlp::train_step), METH_FASTCALL, nullptr},
    {"why_not_trained", fast(fastmlp::why_not_trained), METH_FASTCALL, nullptr},
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
  m.def("plan_step", plan_step, py::arg("sizes"), py::arg("batch"), py::arg("clips"),
        py::arg("multiprocessors"), py::arg("shared_bytes"));
  m.def("plan", plan, py::arg("sizes"), py::arg("batch"), py::arg("dtype"), py::arg("shared_bytes"),
        py::arg("own"));
  py::dict activations;  // each with the defaults of its parameters
  for (const fastmlp::ActivationFormula& formula : fastmlp::formulas)
    activations[py::str(std::string(formula.name))] = py::tuple(py::cast(formula.defaults));
  m.attr("activations") = activations;
  m.attr("size_of_numbers") = sizeof(fastmlp::StepNumbers);  // of a parameter, in bytes
  m.attr("compiler") = "gcc " __VERSION__;
#ifdef FASTMLP_WITH_CUDA
  m.def("use_products", use_products, py::arg("owner"), py::arg("rows"));
  m.attr("cuda") = fastmlp::cuda::toolkit();
  m.attr("cuda_architectures") = fastmlp::cuda::architectures();
#else
  m.attr("cuda") = py::none();
  m.attr("cuda_architectures") = py::none();
#endif
}
