"""A module's own forward as a graph, and all that this graph depends on.

torch.fx's proxies record what a forward does with its inputs; what it does besides, they would silently leave
out or take for a constant. So a forward is traced here only if there is nothing of the kind. It runs on a
shadow of its module, where every attribute that it reads is noted, and the code that it can reach is looked
through before it runs. Where something noted has changed, the graph is not used.
"""

import builtins
import dis
import inspect
import operator
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, fx, nn

from fastmlp.chain import ROLES, run

__all__ = ["Refused", "Trace", "is_sequential", "original_class", "trace"]


class Refused(Exception):
    """Why a forward is not traced, as the end of a sentence that begins with "its forward"."""


# ---- what a forward may do

_FORBIDDEN = {
    "STORE_ATTR": "sets an attribute",
    "DELETE_ATTR": "deletes an attribute",
    "STORE_SUBSCR": "assigns to an item",
    "STORE_SLICE": "assigns to a slice",
    "DELETE_SUBSCR": "deletes an item",
    "STORE_GLOBAL": "assigns to a global variable",
    "DELETE_GLOBAL": "deletes a global variable",
    "BEFORE_WITH": "has a with block",
    "BEFORE_ASYNC_WITH": "has a with block",
    "PUSH_EXC_INFO": "has a try block",
    "IMPORT_NAME": "imports a module",
    "LOAD_BUILD_CLASS": "defines a class",
    "MATCH_CLASS": "matches a pattern",
    "MATCH_MAPPING": "matches a pattern",
    "MATCH_SEQUENCE": "matches a pattern",
}
_BUILTINS: frozenset[Any] = frozenset(
    {abs, bool, enumerate, float, getattr, int, len, list, max, min, range, reversed, round, slice, str}
    | {sum, super, tuple, zip}
)
#: Called by Python itself, past __getattribute__.
_IMPLICIT = ("__bool__", "__contains__", "__getitem__", "__iter__", "__len__")
_MISSING = object()


@cache
def _recorded() -> frozenset[int]:
    """The ids of the functions of torch that a proxy records."""
    return frozenset(id(f) for fs in torch.overrides.get_overridable_functions().values() for f in fs)


def _is_constant(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_constant, value))
    return value is None or type(value) in (bool, int, float, complex, str, torch.dtype, torch.device)


def _same(value: object, noted: object) -> bool:
    if value is noted:
        return True
    if type(value) is not type(noted) or not _is_constant(noted):
        return False
    if isinstance(noted, tuple):
        assert isinstance(value, tuple)
        return len(value) == len(noted) and all(map(_same, value, noted))
    return value == noted


def original_class(module: nn.Module) -> type[nn.Module]:
    """The module's class before :func:`fastmlp.fuse`."""
    cls = type(module)
    unfused: type[nn.Module] = vars(cls).get("_unfused", cls)
    return unfused


# ---- recording


class _Value(fx.Proxy):
    """A proxy that records `x += y` as what it is; fx would make it x + y, and x would stay as it was."""

    def __getattr__(self, name: str) -> "_Attribute":
        if not hasattr(Tensor, name):  # getattr(x, name, None) would find what is not there
            raise Refused(f"reads {name} of a value that may have none")
        return _Attribute(self, name)


class _Attribute(fx.proxy.Attribute, _Value):
    """The same for x.name, which x.name() is too until it is called."""


def in_place(operation: str, x: Any, y: Any) -> Any:
    """The operator of that name, "iadd" for `x += y`."""
    return getattr(operator, operation)(x, y)


def _records(operation: str) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    return lambda x, y: x.tracer.create_proxy("call_function", in_place, (operation, x, y), {})


for _operation in (
    *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"),
    *("iand", "ior", "ixor", "ilshift", "irshift"),
):
    setattr(_Value, f"__{_operation}__", _records(_operation))


class _Shadow:
    """Stands for a module while a forward runs: reading it is noted, calling it recorded."""

    def __init_subclass__(cls) -> None:
        """Keeps the subclass from classes that register theirs."""

    def __getattribute__(self, name: str) -> Any:
        own = object.__getattribute__(self, "__dict__")
        return own["tracer"].read(self, own["module"], own["path"], name)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise Refused(f"sets the attribute {name}")

    def __call__(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        own = object.__getattribute__(self, "__dict__")
        proxy: fx.Proxy = own["tracer"].create_proxy("call_module", own["path"], args, kwargs)
        return proxy


def _shadow_class(cls: type[nn.Module]) -> type[_Shadow]:
    metaclass: Any = type(cls)
    shadow: type[_Shadow] = metaclass(f"_{cls.__name__}", (_Shadow, cls), {})
    return shadow


class _Tracer(fx.proxy.GraphAppendingTracer):
    def __init__(self, module: nn.Module, forward: Any) -> None:
        super().__init__(fx.Graph())
        self.forward = forward
        self.modules: dict[str, nn.Module] = {"": module}
        self.shadows: dict[str, _Shadow] = {}
        self.tensors: dict[str, fx.Proxy] = {}
        self.attributes: dict[tuple[str, str], object] = {}
        self.methods: dict[tuple[str, str], object] = {}
        self.variables: dict[tuple[int, str], tuple[dict[str, Any] | CellType, str, object]] = {}
        self.scanned: set[tuple[FunctionType, Any]] = set()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor):
            raise Refused("uses a tensor that is no input, parameter or buffer")
        return super().create_arg(a)

    # ---- reading attributes

    def shadow(self, path: str, module: nn.Module) -> _Shadow:
        if path not in self.shadows:
            cls = original_class(module)
            for name in ("__getattr__", "__getattribute__"):
                if getattr(cls, name) is not getattr(nn.Module, name):
                    raise Refused(f"reads {path or cls.__name__}, whose class defines {name}")
            for name in _IMPLICIT:
                function = inspect.getattr_static(cls, name, None)
                if isinstance(function, FunctionType):
                    self.scan(function, cls)
            shadow = object.__new__(_shadow_class(cls))
            object.__getattribute__(shadow, "__dict__").update(tracer=self, module=module, path=path)
            self.modules[path] = module
            self.shadows[path] = shadow
        return self.shadows[path]

    def read(self, shadow: _Shadow, module: nn.Module, path: str, name: str) -> Any:
        """What `shadow.name` is: looked up as Python does, then as nn.Module.__getattr__."""
        if name == "__class__":
            return original_class(module)
        where = f"{path}.{name}" if path else name
        own, static = module.__dict__, inspect.getattr_static(original_class(module), name, _MISSING)
        if name == "_modules":
            self.attributes[path, name] = (original_class(module), *module._modules)
            return {key: self._child(path, key, child) for key, child in module._modules.items()}
        if isinstance(static, property):
            assert static.fget is not None
            self.scan(static.fget, original_class(module))
            self.methods[path, name] = static
            return static.fget(shadow)
        if name in own:
            return self._noted(path, name, own[name])
        if isinstance(static, FunctionType):
            self.scan(static, original_class(module))
            if static.__module__ != nn.modules.container.__name__:
                self.methods[path, name] = static
            return MethodType(static, shadow)
        if isinstance(static, staticmethod):
            return self._noted(path, name, static.__func__)
        if static is not _MISSING:
            return self._noted(path, name, static)
        for tensors in (module._parameters, module._buffers):
            if name in tensors:
                if tensors[name] is None:
                    return self._noted(path, name, None)
                if where not in self.tensors:
                    self.tensors[where] = self.create_proxy("get_attr", where, (), {})
                return self.tensors[where]
        if name in module._modules:
            return self._child(path, name, module._modules[name])
        raise Refused(f"looks for {where}, which is not there")

    def _child(self, path: str, name: str, child: nn.Module | None) -> _Shadow | None:
        if child is None:
            self.attributes[path, name] = None
            return None
        return self.shadow(f"{path}.{name}" if path else name, child)

    def _noted(self, path: str, name: str, value: Any) -> Any:
        where = f"self.{path}.{name}" if path else f"self.{name}"
        if not (_is_constant(value) or id(value) in _recorded()):
            if not isinstance(value, FunctionType):
                raise Refused(f"reads {where}, a {type(value).__name__}")
            self.scan(value, None)
        self.attributes[path, name] = value
        return value

    # ---- looking through code

    def scan(self, function: FunctionType | Callable[..., Any], cls: type[nn.Module] | None) -> None:
        """Refuses a function for what it may do, or what the functions may do that it can reach."""
        if not isinstance(function, FunctionType):
            raise Refused(f"calls {getattr(function, '__name__', function)}, which is not a Python function")
        if (function, cls) in self.scanned or function.__module__ == nn.modules.container.__name__:
            return
        self.scanned.add((function, cls))
        if function.__module__ == nn.Module.__module__:
            raise Refused(f"calls nn.Module.{function.__name__}")
        defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        if not all(map(_is_constant, defaults)):
            raise Refused(f"takes defaults in {function.__name__} that may change")
        closure = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        self._scan_code(function.__code__, function.__globals__, closure, cls, cls is not None)

    def _scan_code(
        self,
        code: CodeType,
        variables: dict[str, Any],
        closure: dict[str, CellType],
        cls: type[nn.Module] | None,
        is_method: bool,
    ) -> None:
        instructions = list(dis.get_instructions(code))
        for instruction in instructions:
            if instruction.opname in _FORBIDDEN:
                raise Refused(_FORBIDDEN[instruction.opname])
        for index, instruction in enumerate(instructions):
            name, argument = instruction.opname, instruction.argval
            if name == "STORE_DEREF" and argument in code.co_freevars:
                raise Refused(f"assigns to {argument}, a variable of another function")
            if name == "IS_OP" or name.endswith(("IF_NONE", "IF_NOT_NONE")):
                self._scan_identity(code, instructions, index, is_method)
            elif name in ("LOAD_GLOBAL", "LOAD_NAME"):
                holder = variables if argument in variables else vars(builtins)
                following = [i for i in instructions[index + 1 : index + 5] if i.opname != "PUSH_NULL"]
                self._scan_name(holder, argument, following, variables, cls)
                if argument == "super":
                    self._scan_parents(code, cls)
            elif name == "LOAD_DEREF" and argument in closure:
                if argument == "__class__" and instructions[index - 1].argval == "super":
                    continue
                cell = closure[argument]
                self._admit(cell.cell_contents, argument)
                self.variables[id(cell), argument] = cell, argument, cell.cell_contents
            elif isinstance(argument, CodeType):
                self._scan_code(argument, variables, closure, cls, False)

    def _scan_name(
        self,
        holder: dict[str, Any],
        name: str,
        following: Sequence[dis.Instruction],
        variables: dict[str, Any],
        cls: type[nn.Module] | None,
    ) -> None:
        """A global variable, and the attributes of modules (torch.nn.functional.relu) that follow it."""
        if name not in holder:
            raise Refused(f"uses {name}, which is not defined")
        value, words = holder[name], name
        for instruction in following:
            if not isinstance(value, ModuleType) or instruction.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
                break
            name = instruction.argval
            holder, words = vars(value), f"{words}.{name}"
            value = getattr(value, name, None)
        if isinstance(value, type) and cls is not None and value in cls.__mro__ and holder is variables:
            if any(i.opname in ("LOAD_ATTR", "LOAD_METHOD") for i in following[:1]):
                raise Refused(f"reads an attribute of {words}")
            return  # as in super(Net, self)
        self._admit(value, words)
        if name in holder and (_is_constant(value) or (value, None) in self.scanned):
            self.variables[id(holder), name] = holder, name, value

    def _admit(self, value: Any, words: str) -> None:
        if isinstance(value, type):
            known = value in _BUILTINS or issubclass(value, Exception)
        elif isinstance(value, BuiltinFunctionType):
            known = value in _BUILTINS or id(value) in _recorded() or value.__module__ == "math"
        else:
            known = _is_constant(value) or id(value) in _recorded()
        if isinstance(value, FunctionType) and not known:
            self.scan(value, None)
        elif not known:
            raise Refused(f"{'calls' if callable(value) else 'uses'} {words}")

    def _scan_parents(self, code: CodeType, cls: type[nn.Module] | None) -> None:
        """What super() may find: its look-up is not seen by the shadow."""
        if cls is None:
            raise Refused("calls super() in a function that is no method")
        for parent in cls.__mro__:
            for name in code.co_names:
                found = vars(parent).get(name)
                if isinstance(found, FunctionType) and parent is not nn.Module:
                    self.scan(found, cls)
                elif found is not None and parent is not nn.Module:
                    raise Refused(f"may reach {parent.__name__}.{name} by super()")

    def _scan_identity(
        self, code: CodeType, instructions: Sequence[dis.Instruction], index: int, is_method: bool
    ) -> None:
        """`x is None` says nothing of a proxy: x is to be an argument of forward, or an attribute of self."""
        before = [i for i in instructions[max(index - 4, 0) : index] if i.opname != "CACHE"]
        if instructions[index].opname == "IS_OP" and (not before or before.pop().argval is not None):
            raise Refused("compares identities")
        arguments = code.co_varnames[1 : code.co_argcount] if code is self.forward.__code__ else ()
        if before and before[-1].opname == "LOAD_ATTR":
            before.pop()
            arguments = code.co_varnames[:1] if is_method else ()
        if before and before[-1].opname == "LOAD_FAST" and before[-1].argval in arguments:
            for instruction in instructions:
                if instruction.opname.startswith("STORE_FAST") and before[-1].argval in instruction.argrepr:
                    break
            else:
                return
        raise Refused("asks of a value whether it is None")


# ---- the graph

_RELU, _RELU_IN_PLACE, _SIGMOID, _TANH = nn.ReLU(), nn.ReLU(inplace=True), nn.Sigmoid(), nn.Tanh()
_IDENTITY = nn.Identity()
_METHODS = {"relu": _RELU, "relu_": _RELU_IN_PLACE, "sigmoid": _SIGMOID, "tanh": _TANH}
_FUNCTIONS: dict[Any, nn.Module] = {torch.relu: _RELU, torch.sigmoid: _SIGMOID, torch.tanh: _TANH}

_Part = str | nn.Module  # the path of a child, or an activation that forward applies by itself


def _role(cls: type[nn.Module]) -> str | None:
    return ROLES[cls].name if cls in ROLES else None


class _Run(NamedTuple):
    """Nodes of which each takes the last one's output, and nobody else does."""

    nodes: list[fx.Node]
    parts: list[_Part]

    def is_worth_it(self, modules: dict[str, nn.Module]) -> bool:
        """Whether more happens together than in the modules by themselves."""
        children = [modules[part] for part in self.parts if isinstance(part, str)]
        if any(_role(type(child)) in ("linear", "layer") for child in children):
            return True
        return len(self.parts) > 1 and any(isinstance(m, nn.Linear) for c in children for m in c.modules())


def is_sequential(module: nn.Module) -> bool:
    """Whether the module runs its children one after the other, as nn.Sequential does."""
    cls: Any = original_class(module)
    return (
        isinstance(module, nn.Sequential)
        and cls.__iter__ is nn.Sequential.__iter__
        and cls.__call__ is nn.Module.__call__
        and any(_role(base) == "sequential" and cls.forward is base.forward for base in cls.__mro__)
    )


def _part(node: fx.Node, modules: dict[str, nn.Module]) -> _Part | None:
    """What the node is in a run, given that its first argument is what the run has come to."""
    if node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
        child = modules[str(node.target)]
        if type(child) in ROLES or is_sequential(child):
            return str(node.target)
    elif node.op == "call_method" and len(node.args) == 1 and not node.kwargs:
        return _METHODS.get(str(node.target))
    elif node.op == "call_function" and node.target is nn.functional.relu and len(node.args) == 1:
        return _RELU_IN_PLACE if node.kwargs.get("inplace") else _RELU
    elif node.op == "call_function" and node.target is nn.functional.dropout and len(node.args) == 1:
        return None if node.kwargs.get("training", True) else _IDENTITY
    elif node.op == "call_function" and len(node.args) == 1 and not node.kwargs:
        return _FUNCTIONS.get(node.target)
    return None


def _begins_run(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    child = modules[str(node.target)] if node.op == "call_module" else None
    return child is not None and (_role(type(child)) in ("linear", "layer") or is_sequential(child))


def _segments(graph: fx.Graph, modules: dict[str, nn.Module]) -> Iterator[fx.Node | _Run]:
    """The graph's operations in their order, runs of them together."""
    current: _Run | None = None
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            continue
        source = node.args[0] if node.args and node.op != "output" else None
        part = _part(node, modules) if isinstance(source, fx.Node) else None
        if current is not None:
            last = current.nodes[-1]
            if part is not None and source is last and list(last.users) == [node]:
                current.nodes.append(node)
                current.parts.append(part)
                continue
            yield current
            current = None
        if part is not None and _begins_run(node, modules):
            current = _Run([node], [part])
        else:
            yield node


class Trace:
    """A traced forward: a function, and on what it depends that it is what forward computes.

    Attributes:
        inputs: how many tensors it takes.
        layers: the paths of the linear layers that it runs.
        fuses: whether there is more in it to fuse than in the module's children by themselves.
    """

    def __init__(self, tracer: _Tracer) -> None:
        """Takes over what the tracer has recorded; of the modules their places alone."""
        graph, modules = tracer.graph, tracer.modules
        self._segments = list(_segments(graph, modules))
        self._placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        self._getters = [node for node in graph.nodes if node.op == "get_attr"]
        self.inputs = len(self._placeholders)
        runs = [segment for segment in self._segments if isinstance(segment, _Run)]
        self.layers = {part for run in runs for part in run.parts if isinstance(part, str)}
        self.fuses = any(run.is_worth_it(modules) for run in runs)

        indices = {path: index for index, path in enumerate(modules)}

        def placed(path: str) -> tuple[int, str]:
            head, _, name = path.rpartition(".")
            return indices[head], name

        self._indices = indices
        self._children = [placed(path) for path in modules if path]
        self._tensors = [placed(str(node.target)) for node in self._getters]
        self._attributes = [(indices[path], name, value) for (path, name), value in tracer.attributes.items()]
        self._methods = [(indices[path], name, value) for (path, name), value in tracer.methods.items()]
        self._variables = list(tracer.variables.values())
        self.function = self._compiled(self._segments)
        self._before: Callable[..., Any] | None = None

    def modules(self, module: nn.Module) -> list[nn.Module] | None:
        """The module and those that its forward reads; None where forward may be another function by now."""
        found = [module]
        for parent, name in self._children:
            child = found[parent]._modules.get(name)
            if child is None:
                return None
            found.append(child)
        for index, name, value in self._attributes:
            owner = found[index]
            if name == "_modules":
                if (original_class(owner), *owner._modules) != value:
                    return None
            elif not _same(getattr(owner, name, _MISSING), value):
                return None
        for index, name, value in self._methods:
            owner = found[index]
            if name in owner.__dict__ or getattr(original_class(owner), name, None) is not value:
                return None
        for holder, name, value in self._variables:
            now = holder.get(name, _MISSING) if isinstance(holder, dict) else holder.cell_contents
            if not _same(now, value):
                return None
        return found

    def arguments(self, module: nn.Module) -> list[nn.Module | Tensor] | None:
        """What `function` takes before the inputs; None where forward may be another function by now."""
        found = self.modules(module)
        if found is None:
            return None
        arguments: list[nn.Module | Tensor] = [*found]
        for index, name in self._tensors:
            owner = found[index]
            tensor: Tensor | None = owner._parameters.get(name)
            if tensor is None:
                tensor = owner._buffers.get(name)
            if tensor is None:
                return None
            arguments.append(tensor)
        return arguments

    def chain(self, module: nn.Module) -> tuple[Callable[[Tensor], Tensor] | None, list[nn.Module]] | None:
        """What forward does with its input first, if anything, and the modules of the run that is the rest.

        None where it is more than that. What it does first has no parameters.
        """
        found = self.modules(module)
        if found is None or self.inputs != 1 or self._tensors or len(self._segments) < 2:
            return None
        *first, chain, end = self._segments
        if not isinstance(chain, _Run) or not isinstance(end, fx.Node) or end.args[0] is not chain.nodes[-1]:
            return None
        for node in first:
            if isinstance(node, _Run):
                return None
            if node.op == "call_module" and type(self._module(node.target, found)) not in _WITHOUT_PARAMETERS:
                return None
        parts = [self._module(part, found) for part in chain.parts]
        if not first:
            return None, parts
        if self._before is None:
            self._before = self._compiled(first, chain.nodes[0].args[0])
        return partial(self._before, *found), parts

    def _module(self, part: Any, found: list[nn.Module]) -> nn.Module:
        return found[self._indices[part]] if isinstance(part, str) else part

    def _compiled(self, segments: Sequence[fx.Node | _Run], result: Any = None) -> Callable[..., Any]:
        """The segments as a function of modules, tensors and inputs; returns `result`, or forward's own."""
        graph = fx.Graph()
        modules = [graph.placeholder(f"module_{index}") for index in range(len(self._indices))]
        copies = {node: graph.placeholder(f"tensor_{i}") for i, node in enumerate(self._getters)}
        copies |= {node: graph.placeholder(f"input_{i}") for i, node in enumerate(self._placeholders)}
        constants: dict[str, nn.Module] = {}

        def part_node(part: _Part) -> fx.Node:
            if isinstance(part, str):
                return modules[self._indices[part]]
            name = f"{type(part).__name__.lower()}_{len(constants)}"
            constants[name] = part
            return graph.create_node("get_attr", name)

        for segment in segments:
            if isinstance(segment, _Run):
                source = segment.nodes[0].args[0]
                assert isinstance(source, fx.Node)
                parts = tuple(part_node(part) for part in segment.parts)
                copies[segment.nodes[-1]] = graph.call_function(run, (parts, copies[source]))
            elif segment.op == "call_module":
                child = modules[self._indices[str(segment.target)]]
                args, kwargs = fx.map_arg((segment.args, segment.kwargs), copies.__getitem__)
                copies[segment] = graph.call_function(operator.call, (child, *args), kwargs)
            elif segment.op != "output":
                copies[segment] = graph.node_copy(segment, copies.__getitem__)
        end = segments[-1]
        if result is None and isinstance(end, fx.Node):
            result = end.args[0]
        graph.output(fx.map_arg(result, copies.__getitem__))
        compiled = fx.GraphModule(constants, graph)
        compiled.__dict__.update(constants)  # found at once, not by Module.__getattr__
        forward: Callable[..., Any] = compiled.forward
        return forward


_WITHOUT_PARAMETERS = (nn.Flatten, nn.Identity)


def trace(module: nn.Module) -> Trace:
    """Traces the module's forward, with the default arguments and its children as they are.

    Raises:
        Refused: where forward does what a graph cannot, or depends on what cannot be watched.
    """
    cls = original_class(module)
    forward = inspect.getattr_static(cls, "forward")
    tracer = _Tracer(module, forward)
    try:
        tracer.scan(forward, cls)
        tracer.methods["", "forward"] = forward
        inputs = []
        for parameter in list(inspect.signature(forward).parameters.values())[1:]:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            if parameter.default is not parameter.empty:
                continue
            if parameter.kind is parameter.KEYWORD_ONLY:
                raise Refused(f"needs {parameter.name} by keyword")
            inputs.append(tracer.create_proxy("placeholder", parameter.name, (), {}))
        if not inputs:
            raise Refused("takes no tensor")
        output = forward(tracer.shadow("", module), *inputs)
        tracer.create_node("output", "output", (tracer.create_arg(output),), {})
    except Refused:
        raise
    except Exception as error:  # whatever Python raises where a proxy is not what forward expects
        raise Refused(f"cannot be traced: {str(error).splitlines()[0] if str(error) else error!r}") from error
    return Trace(tracer)
