"""A forward of a module's own, rewritten in its source: runs of calls become one, all else stays.

    x = torch.relu(self.fc1(x))              n, y = run(PLAN, 0, x, globals(), self)
    return self.fc2(x)                       if n == 0: x = torch.relu(self.fc1(x)); n = 1
                                             elif n == 1: x = y
                                             if n == 1: n, y = run(PLAN, 1, x, globals(), self)
                                             if n == 1: return self.fc2(x)
                                             return y

The statements stay as they are. Before each, the helper looks how many from there on it can stand for: as
long as to find what they call runs no code but Python's own, and what is found are layers that are called
plainly. Nobody can tell then that they run as one op. Where that ends, the next statement runs as written,
and so it does where an op raises: errors come from the line that they come from. What is called in nested
calls within one line is loaded by the very expressions, in their order, and handed to another helper.

Nothing is kept from call to call.
"""

import ast
import builtins
import copy
import linecache
import threading
import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from operator import length_hint
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any, NamedTuple

from torch import nn

from fastmlp import _C, chain, functional
from fastmlp.chain import Bound, Layers, Method

__all__ = ["Pending", "Plan", "Refused", "Rewritten", "rewrite"]


class Refused(Exception):
    """Why a function is left as it is, as the end of a sentence that begins with "its forward"."""


# ---- what runs are made of, as constants of the rewritten code: they hold names, and no object of the user's


class Path(NamedTuple):
    """`root.name.name[0]`: the root an argument (its number), a global variable, or a loop's variable."""

    root: int | str
    names: tuple[Any, ...] = ()


_LOOP = -1  # as a root


class Arguments(NamedTuple):
    """A function with more arguments than the value: each a constant, or a path."""

    function: Path
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]


class Statement(NamedTuple):
    """`target = f(g(input))`; in a loop over `container`, or where `test` is as expected."""

    input: str
    target: str | None  # None in a return statement
    calls: tuple[Any, ...] = ()  # Path, Arguments or Method, the innermost first
    container: Path | None = None
    test: Path | None = None
    expects: tuple[str, bool] = ("", True)  # "none": whether it is None; "true": whether it is true
    body: tuple["Statement", ...] = ()
    may_call: bool = False  # an error of what is called would come from the right line
    has_paths_alone: bool = False  # of attributes
    has_methods_alone: bool = False


class Plan:
    """A run of statements."""

    def __init__(self, statements: Sequence[Statement]) -> None:
        """See the class."""
        self.statements = tuple(
            each._replace(
                has_paths_alone=all(
                    type(call) is Path and {*map(type, call.names)} <= {str} for call in each.calls
                ),
                has_methods_alone={*map(type, each.calls)} == {Method},
            )
            for each in statements
        )

        #: From each statement on, where that is all there is: the paths, and where each statement's end.
        self.paths: list[tuple[tuple[Any, ...], Sequence[int]]] = []
        for first in range(len(statements)):
            rest = self.statements[first:]
            are_paths = all(each.has_paths_alone and each.container is each.test is None for each in rest)
            self.paths.append(
                (
                    tuple(call for each in rest for call in each.calls),
                    list(accumulate(len(each.calls) for each in rest)) if are_paths else (),
                )
            )

    @property
    def returns(self) -> bool:
        """Whether the run ends by returning."""
        return self.statements[-1].target is None


class Pending(NamedTuple):
    """What a forward returns instead of a chain's output, to who asks for the chain."""

    input: Any
    callables: list[Any]


# ---- finding what a path leads to, where that runs no code of the user's

_MISSING: Any = object()
_LOOKUPS = vars(nn.Module)["__getattr__"], vars(object)["__getattribute__"]


def _found(path: Path, roots: tuple[Any, ...], variables: dict[str, Any]) -> Any:
    root, names = path
    found = variables.get(root, _MISSING) if isinstance(root, str) else roots[root]
    for name in names:
        if type(name) is str:
            found = _C.attribute(found, name, *_LOOKUPS)
            if found is NotImplemented:
                return _MISSING
        else:
            items = _items(found)
            try:
                found = _MISSING if items is None else list(items)[name]
            except IndexError:
                return _MISSING
    return found


_ITERATES = {cls: cls.__iter__ for cls in (nn.ModuleList, nn.Sequential)}


def _items(container: Any) -> Any:
    cls = type(container)
    cls = cls.__dict__.get("_unfused", cls)
    iterates = _ITERATES.get(cls)
    return container._modules.values() if iterates is not None and cls.__iter__ is iterates else None


def _callables(
    statement: Statement, roots: tuple[Any, ...], variables: dict[str, Any]
) -> Sequence[Any] | None:
    """What the statement calls, in its order; None where it cannot be known before."""
    if statement.container is not None:
        callables: list[Any] = []
        for item in _items(_found(statement.container, roots, variables)) or (_MISSING,):
            found = None if item is _MISSING else _called_in(statement, (*roots, item), variables)
            if found is None:
                return None
            callables += found
        return callables
    if statement.test is not None:
        value, (kind, expected) = _found(statement.test, roots, variables), statement.expects
        if value is _MISSING or (kind == "true" and type(value) not in (bool, type(None))):
            return None
        callables = []
        for part in (
            statement.body if ((value is None) if kind == "none" else bool(value)) is expected else ()
        ):
            found = _callables(part, roots, variables)
            if found is None:
                return None
            callables += found
        return callables
    return _called_in(statement, roots, variables)


def _called_in(
    statement: Statement, roots: tuple[Any, ...], variables: dict[str, Any]
) -> Sequence[Any] | None:
    if statement.has_paths_alone:
        return _C.find(statement.calls, roots, variables, *_LOOKUPS)
    if statement.has_methods_alone:
        return statement.calls
    callables = []
    for call in statement.calls:
        callables.append(_callable(call, roots, variables))
        if callables[-1] is _MISSING:
            return None
    return callables


def _callable(call: Any, roots: tuple[Any, ...], variables: dict[str, Any]) -> Any:
    if type(call) is Path:
        return _found(call, roots, variables)
    if type(call) is Method:
        return call
    function, args, kwargs = call
    args = tuple(_found(each, roots, variables) if type(each) is Path else each for each in args)
    kwargs = {k: _found(each, roots, variables) if type(each) is Path else each for k, each in kwargs}
    function = _found(function, roots, variables)
    if any(each is _MISSING for each in (function, *args, *kwargs.values())):
        return _MISSING
    return Bound(function, args, kwargs)


# ---- the helpers


def run(plan: Plan, first: int, value: Any, variables: dict[str, Any], *roots: Any) -> tuple[int, Any]:
    """Runs statements from the first on; the number of the next, and the value that the last has assigned."""
    if not chain.is_unwatched(value):
        return first, value
    callables, ends = _known(plan, first, roots, variables)
    layers: Layers = ([], [], [])
    called = iter(callables)
    output = chain.walk(called, value, layers, chain.stop)
    if type(output) is chain.Stopped:
        count = len(callables) - length_hint(called) - 1
        done = bisect_right(ends, count)
        if done == 0:
            if not plan.statements[first].may_call:
                return first, value
            return first + 1, callables[0](value) if ends[0] == 1 else chain.run(callables[: ends[0]], value)
        ends = ends[:done]
        output = output.input
        if count > ends[-1]:  # a statement has begun that will not be done
            layers = ([], [], [])
            output = chain.walk(callables[: ends[-1]], value, layers, chain.stop)
    if layers[0]:
        try:
            output = functional.network(output, *layers)
        except Exception:
            return first, value  # the statement that it comes from will raise it again
    return first + len(ends), output


def _known(
    plan: Plan, first: int, roots: tuple[Any, ...], variables: dict[str, Any]
) -> tuple[Sequence[Any], Sequence[int]]:
    """What the statements from the first on call, as far as that is known, and where each one's calls end."""
    paths, ends = plan.paths[first]
    if ends:
        found = _C.find(paths, roots, variables, *_LOOKUPS)
        if found is not None:
            return found, ends
    callables: list[Any] = []
    ends = []
    for statement in plan.statements[first:]:
        known = _callables(statement, roots, variables)
        if known is None:
            break
        callables += known
        ends.append(len(callables))
    return callables, ends


def call(*items: Any) -> Any:
    """`f(g(h(x)))`, of f, g, h and x."""
    value = items[-1]
    if chain.is_unwatched(value):
        return chain.run(items[-2::-1], value)
    for function in items[-2::-1]:
        value = function(value)
    return value


def run_later(plan: Plan, first: int, value: Any, variables: dict[str, Any], *roots: Any) -> tuple[int, Any]:
    """As `run`, but what is left up to the return statement is returned as it is, still to be done."""
    found: list[Any] = []
    for statement in plan.statements[first:]:
        callables = _callables(statement, roots, variables)
        if callables is None:
            return first, value
        found += callables
    return len(plan.statements), Pending(value, found)


def call_later(*items: Any) -> Pending:
    """As `call`, still to be done."""
    return Pending(items[-1], list(items[-2::-1]))


def inherited(method: Any) -> Any:
    """`super().forward`, rewritten, where it belongs to a module whose class holds that."""
    if type(method) is MethodType:
        rewritten = type(method.__self__).__dict__.get("_inherited", {}).get(method.__func__)
        if rewritten is not None and rewritten.is_current():
            return MethodType(rewritten.bound_as_original(), method.__self__)
    return method


class _With:
    """Binds constant arguments to a function that an expression has found."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs

    def __call__(self, function: Any) -> Bound:
        return Bound(function, self.args, self.kwargs)


# ---- the source


#: Functions of whose further arguments something is known.
_KNOWN = {name.__name__ for name in chain.FUNCTIONS}
#: What of torch's a chain may hold although it is no layer: methods that only look at a tensor otherwise.
_VIEWS = {"view", "flatten", "reshape"}
_SEES_FRAMES = {"locals", "vars", "dir", "eval", "exec", "_getframe", "currentframe", "stack"}
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef, ast.ListComp, ast.SetComp)
_SCOPES += (ast.DictComp, ast.GeneratorExp)  # type: ignore[assignment]


def _constant(node: ast.AST) -> bool:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node = node.operand
    if isinstance(node, ast.Tuple):
        return all(map(_constant, node.elts))
    return isinstance(node, ast.Constant)


class _Rewriter(ast.NodeTransformer):
    """Rewrites one function; `plans` holds what it has found, `constants` what its markers stand for."""

    def __init__(self, function: ast.FunctionDef, free: Sequence[str], later: bool) -> None:
        self.later = later
        self.constants: dict[str, Any] = {}
        self.plans: list[Plan] = []
        self.ending: Plan | None = None
        arguments = function.args
        named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        every = [*named, *(each for each in (arguments.vararg, arguments.kwarg) if each)]
        nodes = [node for each in function.body for node in ast.walk(each)]
        names = [node for node in nodes if isinstance(node, ast.Name)]
        self.loads = Counter(node.id for node in names if isinstance(node.ctx, ast.Load))
        stored = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
        stored |= {
            str(node.name)
            for node in nodes
            if isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar)
        }
        stored |= {
            each.asname or each.name.split(".")[0]
            for node in nodes
            if isinstance(node, ast.Import | ast.ImportFrom)
            for each in node.names
        }
        stored |= {node.name for node in nodes if isinstance(node, (*_SCOPES[:2], ast.ClassDef))}
        stored |= {str(node.rest) for node in nodes if isinstance(node, ast.MatchMapping)}
        self.deleted = {node.id for node in names if isinstance(node.ctx, ast.Del)}
        #: Names that other functions see too.
        self.shared = {
            name.id
            for node in nodes
            if isinstance(node, _SCOPES)
            for name in ast.walk(node)
            if isinstance(name, ast.Name)
        } | {name for node in nodes if isinstance(node, ast.Global | ast.Nonlocal) for name in node.names}
        self.roots = [each.arg for each in named if each.arg not in stored | self.shared]
        self.parameters = {each.arg for each in every}
        self.local = stored | self.parameters | set(free)
        used = {node.id for node in names} | {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        if seen := sorted(used & _SEES_FRAMES):
            raise Refused(f"uses {seen[0]}, which may see its variables")
        if any(isinstance(node, ast.Await | ast.Yield | ast.YieldFrom) for node in nodes):
            raise Refused("is a generator")
        body = function.body
        has_text = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
        count = len(body) - has_text
        function.body = self.block(body, set(self.parameters), False, True)
        self.is_whole = bool(
            self.ending
            and len(self.ending.statements) == count
            and isinstance(body[-1], ast.Return)
            and [self.ending.statements[0].input] == [each.arg for each in every][1:]
            and not arguments.defaults
            and self.roots[:1] == [each.arg for each in every][:1]
        )

    # ---- expressions: nested calls, within one line

    def visit_Call(self, node: ast.Call) -> ast.AST:
        nested = self.nested(node, call)
        if nested is not None:
            return nested
        self.generic_visit(node)
        method = node.func
        owner = (
            method.value.func
            if isinstance(method, ast.Attribute) and type(method.value) is ast.Call
            else None
        )
        if isinstance(owner, ast.Name) and owner.id == "super":
            node.func = self.call_of(inherited, [method], method)
        return node

    def visit(self, node: ast.AST) -> Any:
        """Leaves functions within the function alone."""
        return node if isinstance(node, _SCOPES) else super().visit(node)

    def nested(self, node: ast.AST, helper: Callable[..., Any], least: int = 2) -> ast.AST | None:
        """The helper called with what the calls call, and with what the innermost is called with."""
        functions, calls, inner = self.calls(node)
        if len(functions) < least:
            return None
        self.plans.append(Plan([Statement("", None, tuple(calls[::-1]))]))
        return self.call_of(helper, [*functions, self.visit(inner)], node)

    def calls(self, node: Any) -> tuple[list[ast.expr], list[Any], ast.AST]:
        """What nested calls call, as expressions and constants, the outermost first; the argument of all."""
        functions: list[ast.expr] = []
        calls: list[Any] = []
        line, are_layers = node.lineno, 0
        while isinstance(node, ast.Call) and node.end_lineno == node.lineno == line:
            function = node.func
            if isinstance(function, ast.Attribute) and self.is_method(node) and function.attr not in _VIEWS:
                calls.append(Method(function.attr))
                functions.append(self.marker(calls[-1]))
                node = function.value
                continue
            path = self.path(function, any_local=True)
            if path is None or not node.args or isinstance(node.args[0], ast.Starred):
                break
            name = path.names[-1] if path.names else path.root
            is_global = bool(path.root) and type(path.root) is str and name not in _KNOWN
            if is_global and (path.names or hasattr(builtins, str(path.root))):
                break  # of another module, whose functions may ask who calls them
            more = [*node.args[1:], *(each.value for each in node.keywords)]
            if more:
                if (
                    name not in _KNOWN
                    or not all(map(_constant, more))
                    or any(not k.arg for k in node.keywords)
                ):
                    break
                bound = _With(
                    tuple(map(ast.literal_eval, node.args[1:])),
                    {str(each.arg): ast.literal_eval(each.value) for each in node.keywords},
                )
                functions.append(self.call_of(bound, [function], function))
            else:
                functions.append(function)
            are_layers += name not in _KNOWN
            calls.append(path)
            node = node.args[0]
        return (functions, calls, node) if are_layers else ([], [], node)

    def marker(self, value: Any) -> ast.Constant:
        marker = f"\0fastmlp {len(self.constants)}"
        self.constants[marker] = value
        return ast.Constant(marker)

    def call_of(self, helper: Any, arguments: Sequence[ast.expr], node: ast.AST) -> ast.Call:
        called = ast.Call(self.marker(helper), list(arguments), [])
        ast.copy_location(called, node)
        return ast.fix_missing_locations(called)

    def is_method(self, node: ast.Call) -> bool:
        """Whether it is `value.relu()`, say."""
        function = node.func
        if not isinstance(function, ast.Attribute) or node.keywords:
            return False
        if isinstance(function.value, ast.Name) and function.value.id not in self.local - set(self.roots[:1]):
            return False
        if function.attr in _VIEWS:
            return bool(node.args) and all(map(_constant, node.args))
        return function.attr.removesuffix("_") in functional.COMPOSITES and not node.args

    def path(self, node: ast.AST, loop: str | None = None, any_local: bool = False) -> Path | None:
        names: list[Any] = []
        while not isinstance(node, ast.Name):
            if isinstance(node, ast.Attribute) and not (node.attr[:2] == "__" != node.attr[-2:]):
                names.insert(0, node.attr)
                node = node.value
            elif (
                isinstance(node, ast.Subscript)
                and _constant(node.slice)
                and not isinstance(node.slice, ast.Tuple)
            ):
                index = ast.literal_eval(node.slice)
                if type(index) is not int:
                    return None
                names.insert(0, index)
                node = node.value
            else:
                return None
        if node.id == loop:
            return Path(_LOOP, tuple(names))
        if node.id in self.roots:
            return Path(self.roots.index(node.id), tuple(names))
        if node.id in self.local:
            return Path("", tuple(names)) if any_local else None  # what no variable is called
        return Path(node.id, tuple(names))

    # ---- statements

    def unrolled(self, node: ast.AST, loop: str | None = None) -> tuple[list[Any], str] | None:
        """The calls of an expression, the innermost first, and the variable that they are called with."""
        calls: list[Any] = []
        while isinstance(node, ast.Call):
            if self.is_method(node):
                assert isinstance(node.func, ast.Attribute)
                calls.insert(0, Method(node.func.attr, tuple(map(ast.literal_eval, node.args))))
                node = node.func.value
                continue
            path = self.path(node.func, loop)
            if path is None or not node.args or isinstance(node.args[0], ast.Starred):
                return None
            if len(node.args) > 1 or node.keywords:
                if not path.names or path.names[-1] not in _KNOWN:
                    return None
                values = [self.argument(each) for each in node.args[1:]]
                keywords = [(str(each.arg), self.argument(each.value)) for each in node.keywords]
                if _MISSING in values or any(value is _MISSING for _, value in keywords):
                    return None
                if any(each.arg is None for each in node.keywords):
                    return None
                calls.insert(0, Arguments(path, tuple(values), tuple(keywords)))
            else:
                calls.insert(0, path)
            node = node.args[0]
        return (calls, node.id) if isinstance(node, ast.Name) else None

    def argument(self, node: ast.AST) -> Any:
        if _constant(node):
            return ast.literal_eval(node)
        path = self.path(node)
        return _MISSING if path is None else path

    def statement(self, node: ast.stmt, loop: str | None = None) -> Statement | None:
        if isinstance(node, ast.Return) and node.value is not None:
            found = self.unrolled(node.value)
            return found and Statement(
                found[1], None, tuple(found[0]), may_call=node.end_lineno == node.lineno
            )
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            found = self.unrolled(node.value, loop)
            if not found or not found[0]:
                return None
            one_line = node.end_lineno == node.lineno
            return Statement(found[1], node.targets[0].id, tuple(found[0]), may_call=one_line)
        if isinstance(node, ast.For) and not node.orelse and isinstance(node.target, ast.Name):
            variable, container = node.target.id, self.path(node.iter)
            inner = sum(
                isinstance(n, ast.Name) and n.id == variable and isinstance(n.ctx, ast.Load)
                for n in ast.walk(node)
            )
            body = self.body(node.body, variable)
            if (
                container
                and body
                and inner == self.loads[variable]
                and variable not in self.shared | self.parameters
            ):
                calls = tuple(each for part in body for each in part.calls)
                return Statement(body[0].input, body[0].target, calls, container=container)
        if isinstance(node, ast.If) and not node.orelse:
            test: Any = node.test
            expects = ("true", True)
            if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
                test, expects = test.operand, ("true", False)
            elif (
                isinstance(test, ast.Compare)
                and isinstance(test.ops[0], ast.Is | ast.IsNot)
                and ast.dump(ast.Tuple(test.comparators)) == ast.dump(ast.Tuple([ast.Constant(None)]))
            ):
                test, expects = test.left, ("none", isinstance(test.ops[0], ast.Is))
            path, body = self.path(test), self.body(node.body, None)
            if path and path.names and body:
                return Statement(body[0].input, body[0].target, test=path, expects=expects, body=tuple(body))
        return None

    def body(self, nodes: Sequence[ast.stmt], loop: str | None) -> list[Statement]:
        """The statements of a loop or a branch, if all of them are `x = f(x)`."""
        found = [self.statement(node, loop) if isinstance(node, ast.Assign) else None for node in nodes]
        statements = [each for each in found if each is not None]
        names = {name for each in statements for name in (each.input, each.target)}
        return statements if len(statements) == len(found) and len(names) == 1 else []

    def block(self, nodes: Sequence[ast.stmt], bound: set[str], in_try: bool, ends: bool) -> list[ast.stmt]:
        """A block of statements, rewritten. `ends` says whether its last may end the function as a chain."""
        result: list[ast.stmt] = []
        index = 0
        while index < len(nodes):
            group = self.group(nodes[index:], in_try) if self.can_begin(nodes[index], bound) else []
            if sum(len(each.calls) + 2 * bool(each.container or each.test) for each in group) > 1:
                result += self.run(group, nodes[index : index + len(group)], bound, in_try, ends)
                index += len(group)
            else:
                node = nodes[index]
                result.append(self.compound(node, bound, in_try, ends))
                index += 1
            for node in nodes[:index]:
                if isinstance(node, ast.Assign):
                    bound |= {each.id for each in node.targets if isinstance(each, ast.Name)}
        return result

    def can_begin(self, node: ast.stmt, bound: set[str]) -> bool:
        statement = self.statement(node)
        return statement is not None and statement.input in bound - self.deleted

    def group(self, nodes: Sequence[ast.stmt], in_try: bool) -> list[Statement]:
        group: list[Statement] = []
        for node in nodes:
            statement = self.statement(node)
            if statement is None or (group and not self.follows(statement, group[-1], in_try)):
                break
            group.append(statement)
            if statement.target is None:
                break
        return group

    def follows(self, statement: Statement, before: Statement, in_try: bool) -> bool:
        """Whether the second takes the first one's value, which nobody else sees."""
        name = before.target
        if statement.input != name or name is None:
            return False
        if statement.target == name:
            return True
        return name not in self.shared and not in_try and (statement.target is None or self.loads[name] == 1)

    def compound(self, node: ast.stmt, bound: set[str], in_try: bool, ends: bool) -> ast.stmt:
        if isinstance(node, _SCOPES):
            return node
        if isinstance(node, ast.Return) and node.value is not None:
            _, calls, inner = self.calls(node.value)
            if ends and calls:
                input = inner.id if isinstance(inner, ast.Name) else ""
                self.ending = Plan([Statement(input, None, tuple(calls[::-1]))])
            nested = self.nested(node.value, call_later, 1) if self.later and ends else None
            if nested is not None:
                node.value = nested  # type: ignore[assignment]  # an expression
                return node
        is_in_try = in_try or isinstance(node, ast.Try | ast.TryStar)
        goes_on = ends and isinstance(node, ast.If)
        for name in ("body", "orelse", "finalbody"):
            if block := getattr(node, name, None):
                setattr(node, name, self.block(block, set(bound), is_in_try, goes_on))
        for name in ("handlers", "cases"):
            for part in getattr(node, name, ()):
                part.body = self.block(part.body, set(bound), is_in_try, goes_on)
        for name, value in ast.iter_fields(node):
            if name not in ("body", "orelse", "finalbody", "handlers", "cases"):
                if isinstance(value, ast.AST):
                    setattr(node, name, self.visit(value))
                elif isinstance(value, list):
                    value[:] = [self.visit(each) if isinstance(each, ast.AST) else each for each in value]
        return node

    def run(
        self, group: list[Statement], nodes: Sequence[ast.stmt], bound: set[str], in_try: bool, ends: bool
    ) -> list[ast.stmt]:
        """The statements, each with the helper before it."""
        plan = Plan(group)
        self.plans.append(plan)
        helper = run_later if self.later and plan.returns and ends else run
        number, value = f".n{len(self.plans)}", f".x{len(self.plans)}"

        def attempt(index: int, node: ast.stmt) -> ast.stmt:
            arguments: list[ast.expr] = [
                self.marker(plan),
                ast.Constant(index),
                ast.Name(group[index].input, ast.Load()),
                self.call_of(globals, [], node),
                *(ast.Name(name, ast.Load()) for name in self.roots),
            ]
            targets = ast.Tuple([ast.Name(number, ast.Store()), ast.Name(value, ast.Store())], ast.Store())
            made = ast.Assign([targets], self.call_of(helper, arguments, node))
            return ast.fix_missing_locations(ast.copy_location(made, node))

        def where(index: int, body: list[ast.stmt], orelse: list[ast.stmt], node: ast.stmt) -> ast.stmt:
            test = ast.Compare(ast.Name(number, ast.Load()), [ast.Eq()], [ast.Constant(index)])
            return ast.fix_missing_locations(ast.copy_location(ast.If(test, body, orelse), node))

        def assign(name: str, to: ast.expr, node: ast.stmt) -> ast.stmt:
            made = ast.Assign([ast.Name(name, ast.Store())], to)
            return ast.fix_missing_locations(ast.copy_location(made, node))

        result: list[ast.stmt] = []
        for index, (statement, node) in enumerate(zip(group, nodes, strict=True)):
            tried = attempt(index, node)
            result.append(where(index, [tried], [], node) if index else tried)
            written = self.compound(node, bound, in_try, ends)
            if statement.target is None:
                done = ast.Return(ast.Name(value, ast.Load()))
                result += [
                    where(index, [written], [], node),
                    ast.fix_missing_locations(ast.copy_location(done, node)),
                ]
            else:
                result.append(
                    where(
                        index,
                        [written, assign(number, ast.Constant(index + 1), node)],
                        [
                            where(
                                index + 1,
                                [assign(statement.target, ast.Name(value, ast.Load()), node)],
                                [],
                                node,
                            )
                        ],
                        node,
                    )
                )
        if plan.returns and ends:
            self.ending = plan
        if not plan.returns:
            result.append(assign(value, ast.Constant(None), nodes[-1]))  # which holds a tensor else
        return result


# ---- the code


class Rewritten(NamedTuple):
    """A function, and what has been made of it."""

    original: Any  # functions, all three; as such mypy would bind them
    code: CodeType  # the original's
    function: Any
    later: Any  # returns a Pending, where the function ends by returning a chain
    plans: tuple[Plan, ...]
    ending: Plan | None
    is_whole: bool  # whether it does nothing but that
    is_method: bool  # whether the first root is the first argument
    within: "Rewritten | None" = None  # what it decorates, where only that has been rewritten

    def holds(self, cls: Any, name: str) -> bool:
        """Whether it is still made of the function that the class has under the name."""
        found: Any = getattr(cls, name, None)
        return found is self.original and self.is_current()

    def is_current(self) -> bool:
        """Whether it is still what the original does."""
        if self.original.__code__ is not self.code:
            return False
        within = self.within
        return within is None or (
            any(each is within.original for each in _contents(self.original)) and within.is_current()
        )

    def names(self) -> tuple[str, ...]:
        """The names of attributes and global variables in its source."""
        return self.code.co_names if self.within is None else self.within.names()

    def callables(self, plan: Plan, module: nn.Module) -> list[list[Any]]:
        """What each statement of a run calls, None for what is not known but in the run."""
        if self.within is not None:
            return self.within.callables(plan, module)
        roots = (module if self.is_method else _MISSING, *(_MISSING,) * self.code.co_argcount)
        variables = self.original.__globals__
        found: list[list[Any]] = []
        for statement in plan.statements:
            if statement.container or statement.test:
                known = _callables(statement, roots, variables)
                found.append([None] if known is None else [*known])
            else:
                found.append([self._likely(call, roots, variables) for call in statement.calls])
        return found

    def bound_as_original(self) -> Any:
        """The rewritten function, with the defaults that the original has by now."""
        original, function = self.original, self.function
        if original.__defaults__ is not function.__defaults__:
            function.__defaults__ = original.__defaults__
        if original.__kwdefaults__ is not function.__kwdefaults__:
            function.__kwdefaults__ = original.__kwdefaults__
        if self.within is not None:
            self.within.bound_as_original()
        return function

    def _likely(self, call: Any, roots: tuple[Any, ...], variables: dict[str, Any]) -> Any:
        """What a call would call, as far as that can be told without running a __getattr__, say."""
        found = _callable(call, roots, variables)
        if found is _MISSING and type(call) is Path and call.root == 0:
            found = roots[0]
            for name in call.names:
                found = getattr(found, "__dict__", {}).get("_modules", {}).get(name)
        return None if found is _MISSING else found

    def parts(self, module: nn.Module) -> list[Any] | None:
        """What it calls, one after the other, where it does nothing but that."""
        if not self.is_whole or self.ending is None or self.original.__code__ is not self.code:
            return None
        parts: list[Any] = []
        for statement in self.ending.statements:
            callables = _callables(statement, (module, _MISSING), self.original.__globals__)
            if callables is None:
                return None
            parts += callables
        return parts


_lock = threading.RLock()  # the tree of a file is changed while it is compiled


@lru_cache(maxsize=4)
def _parsed(filename: str, source: str) -> tuple[ast.Module, CodeType]:
    tree = ast.parse(source, filename)
    return tree, compile(tree, filename, "exec", dont_inherit=True)


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _is_same(a: CodeType, b: CodeType) -> bool:
    """Whether two functions do the same, line for line."""
    inner_a, inner_b = ([c for c in code.co_consts if isinstance(c, CodeType)] for code in (a, b))
    return (
        a == b
        and (a.co_exceptiontable, a.co_linetable, a.co_qualname)
        == (b.co_exceptiontable, b.co_linetable, b.co_qualname)
        and len(inner_a) == len(inner_b)
        and all(map(_is_same, inner_a, inner_b))
    )


def _definitions(tree: ast.AST, code: CodeType) -> list[tuple[list[Any], int, ast.FunctionDef]]:
    """The functions that the code may be of, and where they stand."""
    found: list[tuple[list[Any], int, ast.FunctionDef]] = []
    for name in ("body", "orelse", "finalbody", "handlers", "cases"):
        block: Any = getattr(tree, name, None)
        for index, node in enumerate(block if isinstance(block, list) else ()):
            if isinstance(node, ast.FunctionDef) and node.name == code.co_name:
                first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
                if first == code.co_firstlineno:
                    found.append((block, index, node))
            found += _definitions(node, code)
    return found


def _tree(function: Any) -> ast.Module:
    """The file that a function is from, which is what it says.

    Raises:
        Refused: where it is not.
    """
    code = function.__code__
    linecache.checkcache(code.co_filename)
    source = "".join(linecache.getlines(code.co_filename, function.__globals__))
    if not source:
        raise Refused("has no source that can be found")
    try:
        tree, whole = _parsed(code.co_filename, source)
    except (SyntaxError, ValueError):
        raise Refused("is not what its source says") from None
    if not _is_same(_only(_same_place(whole, code)), code):
        raise Refused("is not what its source says")
    return tree


def _same_place(whole: CodeType, code: CodeType) -> list[CodeType]:
    return [
        each
        for each in _codes(whole)
        if each.co_name == code.co_name and each.co_firstlineno == code.co_firstlineno
    ]


def _only(found: list[Any]) -> Any:
    if len(found) != 1:
        raise Refused("is not what its source says")
    return found[0]


def _marked(code: CodeType, constants: dict[str, Any]) -> CodeType:
    return code.replace(co_consts=tuple(constants.get(c, c) if type(c) is str else c for c in code.co_consts))


def rewrite(function: Any) -> Rewritten:
    """The function with its runs rewritten.

    Raises:
        Refused: where that cannot be done, or would do nothing.
    """
    if type(function) is not FunctionType:
        raise Refused("is not a Python function")
    code = function.__code__
    decorated = vars(function).get("__wrapped__")
    with _lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the user has seen them, and markers are called
        tree = _tree(function)
        if type(decorated) is FunctionType:
            return _around(function, decorated, _only(_definitions(tree, code))[2])
        made, rewriter = _compiled(tree, code, later=False)
        later = _compiled(tree, code, later=True)[0] if rewriter.ending else None
    return Rewritten(
        function,
        code,
        _function(made, function),
        later and _function(later, function),
        tuple(rewriter.plans),
        rewriter.ending,
        rewriter.is_whole,
        rewriter.roots[:1] == list(code.co_varnames[:1]),
    )


def _contents(function: Any) -> list[Any]:
    """What the variables of enclosing functions hold."""
    contents = []
    for cell in function.__closure__ or ():
        try:
            contents.append(cell.cell_contents)
        except ValueError:  # nothing by now
            contents.append(None)
    return contents


#: What a decorator may do with a function besides calling it, for another to be as good.
_PARTIAL, _SAME_NAMES = ("partial", "functools.partial"), ("__name__", "__qualname__", "__doc__")


def _around(function: Any, decorated: FunctionType, definition: ast.FunctionDef) -> Rewritten:
    """A function made by a decorator with functools.wraps, around what it decorates, rewritten."""
    contents = _contents(function)
    names = [
        name
        for name, content in zip(function.__code__.co_freevars, contents, strict=True)
        if content is decorated
    ]
    nodes = list(ast.walk(definition))
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    known = {id(node.func) for node in calls}
    known |= {id(node.args[0]) for node in calls if node.args and ast.unparse(node.func) in _PARTIAL}
    known |= {id(n.value) for n in nodes if isinstance(n, ast.Attribute) and n.attr in _SAME_NAMES}
    body = [node for each in definition.body for node in ast.walk(each)]
    used = [node for node in body if isinstance(node, ast.Name) and [node.id] == names]
    if not used or not all(id(node) in known for node in used):
        raise Refused(f"is decorated by {function.__code__.co_name}, which may do more than to call it")
    within = rewrite(decorated)
    cells = [
        CellType(within.function) if content is decorated else cell
        for cell, content in zip(function.__closure__, contents, strict=True)
    ]
    made = _function(function.__code__, function, tuple(cells))
    return Rewritten(
        function, function.__code__, made, None, within.plans, None, False, within.is_method, within
    )


def _compiled(tree: ast.Module, code: CodeType, later: bool) -> tuple[CodeType, _Rewriter]:
    block, index, node = _only(_definitions(tree, code))
    block[index] = copy.deepcopy(node)
    try:
        rewriter = _Rewriter(block[index], code.co_freevars, later)
        whole = compile(tree, code.co_filename, "exec", dont_inherit=True)
    finally:
        block[index] = node
    made = _only(_same_place(whole, code))
    if made.co_freevars != code.co_freevars or made.co_cellvars != code.co_cellvars:
        raise Refused("has variables that do not stay what they are")
    return _marked(made, rewriter.constants), rewriter


def _function(code: CodeType, original: FunctionType, closure: Any = None) -> FunctionType:
    """A function of that code which is the original in all else."""
    made = FunctionType(
        code,
        original.__globals__,
        original.__name__,
        original.__defaults__,
        original.__closure__ if closure is None else closure,
    )
    for name in (
        "__kwdefaults__",
        "__annotations__",
        "__doc__",
        "__module__",
        "__qualname__",
        "__type_params__",
    ):
        if hasattr(original, name):
            setattr(made, name, getattr(original, name))
    made.__dict__ = original.__dict__
    return made
