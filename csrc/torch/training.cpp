// Reading an optimizer in the time of a few dictionary look-ups. Schedulers, load_state_dict and users change options and
// states whenever they like: nothing is kept. What is found is held: code of Python's may change anything.
#include "training.h"

#include "call.h"

namespace fastmlp {
namespace {

using Keywords = std::vector<PyObject*>;

Keywords keywords(std::initializer_list<const char*> texts) {
  Keywords words;
  for (const char* text : texts) words.push_back(interned(text));
  return words;
}

// The options in the kernels' order, but for sgd's last, which the step knows; and the states.
struct Keys {
  Keywords options, states;
};
const Keys& keys_of(const OptimizerRow& row) {
  static const Keys sgd = {keywords({"lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize"}),
                           keywords({"momentum_buffer"})};
  static const Keys adam = {
      keywords({"lr", "betas", "eps", "weight_decay", "decoupled_weight_decay", "maximize"}),
      keywords({"exp_avg", "exp_avg_sq", "max_exp_avg_sq"})};
  return row.kind == Optimizer::sgd ? sgd : adam;
}

// Borrowed. Raises KeyError, as Python does.
PyObject* required(PyObject* dict, PyObject* key) {
  if (PyObject* const found = get(dict, key)) return found;
  PyErr_SetObject(PyExc_KeyError, key);
  throw python_error();
}

bool is_true(PyObject* o) {
  const int result = PyObject_IsTrue(o);
  if (result < 0) throw python_error();
  return result;
}

// False for what only torch can use, or a GPU has.
bool push_number(PyObject* o, c10::SmallVectorImpl<double>& to) {
  if (PyFloat_Check(o) || PyLong_Check(o)) {
    to.push_back(PyFloat_AsDouble(o));
    if (PyErr_Occurred()) throw python_error();
    return true;
  }
  if (reinterpret_cast<PyObject*>(Py_TYPE(o)) != THPVariableClass) return false;
  const Tensor& t = THPVariable_Unpack(o);
  const bool is_number = t.is_cpu() && !t.requires_grad() && t.numel() == 1;
  if (is_number) to.push_back(t.item<double>());
  return is_number;
}

// Appends the options of a group; false where one is no number.
bool push_options(const OptimizerRow& row, PyObject* group, c10::SmallVectorImpl<double>& to) {
  const size_t begin = to.size();
  for (PyObject* const key : keys_of(row).options) {
    PyObject* const option = required(group, key);
    if (!is_list(option)) {
      if (!push_number(option, to)) return false;
      continue;
    }
    for (PyObject* const one : items_of(option))
      if (!push_number(one, to)) return false;
  }
  if (row.kind == Optimizer::sgd) to.push_back(false);
  return to.size() == begin + row.options;
}

// The states that a parameter of the group has.
Objects states_of(const OptimizerRow& row, PyObject* group) {
  static PyObject *const momentum = interned("momentum"), *const amsgrad = interned("amsgrad");
  const Objects all = keys_of(row).states;
  return all.slice(0, row.kind == Optimizer::sgd          ? is_true(required(group, momentum))
                      : is_true(required(group, amsgrad)) ? 3
                                                          : 2);
}

struct Group {
  THPObjectPtr own, params;
  Objects states;
  int64_t first = 0;  // the number of its options in a first step
};
using Groups = c10::SmallVector<Group, 2>;

// Finds the groups of parameters, which mostly come in the optimizer's order.
class Search {
 public:
  explicit Search(Groups& groups) : groups(groups) {}
  // -1 where the optimizer does not know it.
  int64_t operator()(PyObject* parameter) {
    for (size_t tried = 0; tried <= groups.size() && !groups.empty(); ++tried) {
      for (const Objects list = items_of(groups[group].params); at < list.size();)
        if (list[at++] == parameter) return int64_t(group);
      at = 0, group = (group + 1) % groups.size();
    }
    return -1;
  }

 private:
  Groups& groups;
  size_t group = 0, at = 0;
};

// Borrowed; null where there is none. Tensors hash by identity, and to ask them runs Python for each parameter.
PyObject* state_in(PyObject* states, PyObject* parameter) {
#if PY_VERSION_HEX < 0x030D0000
  if (PyDict_Check(states))
    if (PyObject* const found =
            _PyDict_GetItem_KnownHash(states, parameter, reinterpret_cast<Py_hash_t>(parameter)))
      return found;
  if (PyErr_Occurred()) throw python_error();
#endif
  return get(states, parameter);
}

const OptimizerRow& row_of(PyObject* rule) { return optimizer_row(string_of(PyTuple_GET_ITEM(rule, 0))); }

PyObject* rule_of(PyObject* optimizers, PyObject* optimizer) {
  TORCH_CHECK_TYPE(PyTuple_Check(optimizers) && PyTuple_GET_SIZE(optimizers) == 2,
                   "optimizers: expected 2 items");
  return get(PyTuple_GET_ITEM(optimizers, 0), reinterpret_cast<PyObject*>(Py_TYPE(optimizer)));
}

THPObjectPtr dict_of(PyObject* o) {
  THPObjectPtr own(PyObject_GenericGetDict(o, nullptr));
  if (!own) throw python_error();
  return own;
}

const Tensor& nothing() {
  static const Tensor& none = *new Tensor(at::detail::empty_cpu({0}, at::kFloat));
  return none;
}

}  // namespace

std::string why_not_known(PyObject* optimizers, PyObject* optimizer) {
  static const Keywords hooks = keywords({"_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"});
  if (!rule_of(optimizers, optimizer))
    return std::string("optimizer: the kernels know SGD, Adam and AdamW, and not ") +
           Py_TYPE(optimizer)->tp_name;
  THPObjectPtr own = dict_of(optimizer);
  bool has_hooks = false;
  for (PyObject* const name : hooks) has_hooks |= is_true(required(own, name));
  for (PyObject* const of_all : items_of(PyTuple_GET_ITEM(optimizers, 1))) has_hooks |= is_true(of_all);
  return has_hooks ? "optimizer: it has step hooks" : "";
}

std::string Training::collect(PyObject* optimizers, PyObject* of, Objects parameters, bool knows_all,
                              Numbers rates) {
  static const Keywords names =
      keywords({"param_groups", "state", "differentiable", "params", "made", "step"});
  std::string why = why_not_known(optimizers, of);
  if (!why.empty()) return why;
  optimizer = THPObjectPtr::dup(of);
  THPObjectPtr rule = THPObjectPtr::dup(rule_of(optimizers, of)), own = dict_of(of);
  row = &row_of(rule);
  THPObjectPtr list = THPObjectPtr::dup(required(own, names[0])),
               all_states = THPObjectPtr::dup(required(own, names[1]));
  Groups groups;
  bool has_numbers = true;
  for (PyObject* const group : items_of(list)) {
    if (is_true(required(group, names[2]))) return "optimizer: it is differentiable";
    has_numbers = push_options(*row, group, options) && has_numbers;
    groups.push_back(
        {THPObjectPtr::dup(group), THPObjectPtr::dup(required(group, names[3])), states_of(*row, group)});
  }
  TORCH_CHECK_VALUE(rates.size() <= 1 || rates.size() == groups.size(), "rates: expected one for each of ",
                    groups.size(), " groups of the optimizer, got ", rates.size());
  if (!has_numbers) return "optimizer: an option is neither a number nor a tensor of one on the CPU";
  set_rates(rates);

  const auto has = [](PyObject* hooks) { return hooks && is_true(hooks); };
  Search search(groups);
  bool is_trained = false;
  for (PyObject* const p : parameters) {
    if (!is_plain(p)) return "model: a parameter is a tensor of a type of its own";
    const auto* const variable = reinterpret_cast<THPVariable*>(p);
    if (has(variable->backward_hooks) || has(variable->post_accumulate_grad_hooks))
      return "model: a parameter has hooks";
    const Tensor& t = THPVariable_Unpack(p);
    int64_t number = t.requires_grad() ? search(p) : -1;
    if (number < 0 && t.requires_grad() && knows_all)
      return "optimizer: it does not know all gradients that are clipped together";
    is_trained |= number >= 0;
    params.push_back(t);
    THPObjectPtr state;
    Objects keys;
    if (number >= 0 && !groups[size_t(number)].states.empty()) {
      Group& group = groups[size_t(number)];
      keys = group.states;
      state = THPObjectPtr::dup(state_in(all_states, p));
      PyObject* const first = get(state, keys[0]);
      if (!first || first == Py_None) {
        state = PyObject_CallMethodObjArgs(rule, names[4], p, group.own.get(), nullptr);
        if (!state) throw python_error();
        made.emplace_back(THPObjectPtr::dup(p), THPObjectPtr::dup(state));
        if (!row->counts) {
          if (group.first == 0) {
            group.first = int64_t(options.size() / row->options);
            for (size_t i = 0; i < row->options; ++i) options.push_back(options[row->options * number + i]);
            options.back() = true;
          }
          number = group.first;
        }
      }
    }
    const auto push = [&](PyObject* key, c10::SmallVectorImpl<Tensor>& to) {
      PyObject* const found = required(state, key);
      if (is_plain(found)) to.push_back(THPVariable_Unpack(found));
      return is_plain(found);
    };
    bool is_known = true;
    for (size_t i = 0; i < row->states; ++i)
      if (i < keys.size()) is_known &= push(keys[i], states);
      else states.push_back(nothing());
    if (row->counts && state) is_known &= push(names[5], counts);
    else if (row->counts) counts.push_back(nothing());
    if (!is_known) return "optimizer: a state is no tensor, or of a type of its own";
    numbers.push_back(number);
  }
  return is_trained ? "" : "optimizer: it trains none of the last layers' parameters";
}

bool Training::has_state(size_t number) const { return !states[number].is_same(nothing()); }

void Training::set_rates(Numbers rates) {
  if (rates.empty()) return;
  for (size_t i = 0; i * row->options < options.size(); ++i)
    if (rates.size() == 1 || i < rates.size()) options[i * row->options] = rates[rates.size() == 1 ? 0 : i];
}

void Training::finish() {
  static const Keywords names = keywords({"state", "update", "_opt_called"});
  if (!made.empty()) {
    THPObjectPtr all_states = THPObjectPtr::dup(required(dict_of(optimizer), names[0]));
    for (auto& [parameter, state] : made) {
      THPObjectPtr own(PyObject_GetItem(all_states, parameter));
      if (!own || !THPObjectPtr(PyObject_CallMethodObjArgs(own, names[1], state.get(), nullptr)))
        throw python_error();
    }
  }
  if (PyObject_SetAttr(optimizer, names[2], Py_True)) throw python_error();  // which schedulers look at
}

PyObject* why_not_trained(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 2 || (count == 4 && is_list(arguments[2])),
                   "why_not_trained: expected what is known, an optimizer, and a list of parameters");
  const std::string why = count == 2 ? why_not_known(arguments[0], arguments[1])
                                     : Training().collect(arguments[0], arguments[1], items_of(arguments[2]),
                                                          arguments[3] == Py_True);
  if (why.empty()) Py_RETURN_NONE;
  return PyUnicode_FromStringAndSize(why.data(), Py_ssize_t(why.size()));
  END_HANDLE_TH_ERRORS
}

PyObject* collect(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 4 && is_list(arguments[2]),
                   "collect: expected what is known, an optimizer, a list of parameters, and a bool");
  Training own;
  std::string why = own.collect(arguments[0], arguments[1], items_of(arguments[2]), arguments[3] == Py_True);
  if (why.empty() && own.begins()) why = "until the optimizer has its states, a step is the loop";
  if (!why.empty()) return PyUnicode_FromStringAndSize(why.data(), Py_ssize_t(why.size()));
  const auto append = [](PyObject* list, PyObject* item) {
    const THPObjectPtr owned(item);
    if (!item || PyList_Append(list, item)) throw python_error();
  };
  THPObjectPtr lists[5];  // of parameters, states, counts, options and their numbers
  for (THPObjectPtr& list : lists)
    if (list = PyList_New(0); !list) throw python_error();
  for (const double option : own.options) append(lists[3], PyFloat_FromDouble(option));
  for (size_t i = 0; i < own.params.size(); ++i) {
    if (own.numbers[i] < 0) continue;
    THPObjectPtr states(PyList_New(0));
    if (!states) throw python_error();
    for (size_t k = own.row->states * i; k < own.row->states * (i + 1); ++k)
      if (own.has_state(k)) append(states, THPVariable_Wrap(own.states[k]));
    append(lists[0], THPVariable_Wrap(own.params[i]));
    append(lists[1], PyList_AsTuple(states));
    if (own.row->counts) append(lists[2], THPVariable_Wrap(own.counts[i]));
    append(lists[4], PyLong_FromLongLong(own.numbers[i]));
  }
  return Py_BuildValue("sOOO(OO)", own.row->name, lists[0].get(), lists[1].get(), lists[2].get(),
                       lists[3].get(), lists[4].get());
  END_HANDLE_TH_ERRORS
}

PyObject* options(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 2, "options: expected a name and a group");
  c10::SmallVector<double, 8> numbers;
  const bool has_numbers = push_options(optimizer_row(string_of(arguments[0])), arguments[1], numbers);
  if (!has_numbers) return Py_BuildValue("[O]", Py_None);
  THPObjectPtr list(PyList_New(Py_ssize_t(numbers.size())));
  for (size_t i = 0; list && i < numbers.size(); ++i)
    PyList_SET_ITEM(list.get(), Py_ssize_t(i), PyFloat_FromDouble(numbers[i]));
  return list.release();
  END_HANDLE_TH_ERRORS
}

PyObject* keys(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 2, "keys: expected a name and a group");
  const Objects names = states_of(optimizer_row(string_of(arguments[0])), arguments[1]);
  THPObjectPtr tuple(PyTuple_New(Py_ssize_t(names.size())));
  for (size_t i = 0; tuple && i < names.size(); ++i)
    PyTuple_SET_ITEM(tuple.get(), Py_ssize_t(i), Py_NewRef(names[i]));
  return tuple.release();
  END_HANDLE_TH_ERRORS
}

}  // namespace fastmlp
