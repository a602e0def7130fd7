"""A forward of a module's own, rewritten in its source: runs of calls become one, all else stays.

    x = torch.relu(self.fc1(x))              n = 0
    return self.fc2(x)                       n, y = run(PLAN, 0, x, globals(), (self,))
                                             if n == 0: x = torch.relu(self.fc1(x)); n = 1
                                             elif n == 1: x = y
                                             if n == 1: n, y = run(PLAN, 1, x, globals(), (self,))
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
import inspect
import linecache
import symtable
import threading
import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from itertools import accumulate, takewhile
from operator import length_hint
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import nn

from fastmlp import _C, functional
from fastmlp.activations import METHODS
from fastmlp.layers import (
    FUNCTIONS,
    KNOWN,
    Bound,
    Fused,
    Layers,
    Method,
    Stopped,
    apply,
    drops,
    is_unwatched,
    walk,
)

__all__ = ["Pending", "Plan", "Refused", "Rewritten", "rewrite"]


class Refused(Exception):
    """Why a function is left as it is, as the end of a sentence that begins with "its forward"."""


# ---- what runs are made of, as constants of the rewritten code: they hold names, and no object of the user's


class Path(NamedTuple):
    """`root.name.name[0]`: the root an argument (its number), a global variable, or a loop's variable."""

    root: int | str
    names: tuple[Any, ...]


_LOOP, _OTHER = -1, ""  # as roots: the loop's variable, and a variable that only its expression finds


class Arguments(NamedTuple):
    """A function with more arguments than the value: each a constant, or a path."""

    function: Path
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Statement(NamedTuple):
    """`target = f(g(input))`; or some of them, on one variable, in a loop or under a condition."""

    input: str
    target: str | None  # None in a return statement
    calls: tuple[Any, ...]  # Path, Arguments or Method, the innermost first
    may_call: bool = False  # an error of what is called would come from the right line
    over: Path | None = None  # what the loop takes its items from
    test: Path | None = None  # the condition: that this is true, or None
    asks_none: bool = False
    expected: bool = True  # or that it is not


class Plan:
    """A run of statements."""

    def __init__(self, statements: Sequence[Statement]) -> None:
        """See the class."""
        self.statements = tuple(statements)

        #: From each statement on, where no loop or condition follows: the calls, and where each one's end.
        self.calls: list[tuple[tuple[Any, ...], Sequence[int]] | None] = []
        for first in range(len(statements)):
            rest = statements[first:]
            calls = tuple(call for each in rest for call in each.calls)
            is_plain = all(each.over is each.test is None for each in rest)
            self.calls.append((calls, [*accumulate(len(each.calls) for each in rest)]) if is_plain else None)

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
_KINDS = Path, Method, *_LOOKUPS
_ITERATES = {cls: cls.__iter__ for cls in (nn.ModuleList, nn.Sequential)}


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
            if not -len(items) <= name < len(items):
                return _MISSING
            found = items[name]
    return found


def _items(container: Any) -> Sequence[Any]:
    """The modules of a list of them; none where it iterates in a way of its own."""
    fused = Fused.of(type(container))
    cls: Any = fused.original if fused else type(container)
    iterates = _ITERATES.get(cls)
    return [*container._modules.values()] if iterates is not None and cls.__iter__ is iterates else ()


def _callables(
    statement: Statement, roots: tuple[Any, ...], variables: dict[str, Any]
) -> Sequence[Any] | None:
    """What the statement calls, in its order; None where it cannot be known before."""
    if statement.test is not None:
        value = _found(statement.test, roots, variables)
        if value is _MISSING or not (statement.asks_none or type(value) in (bool, type(None))):
            return None
        if (value is None if statement.asks_none else bool(value)) is not statement.expected:
            return ()
    if statement.over is None:
        return _called(statement.calls, roots, variables)
    callables: list[Any] = []
    for item in _items(_found(statement.over, roots, variables)) or (_MISSING,):
        found = None if item is _MISSING else _called(statement.calls, (*roots, item), variables)
        if found is None:
            return None
        callables += found
    return callables


def _called(
    calls: tuple[Any, ...], roots: tuple[Any, ...], variables: dict[str, Any]
) -> Sequence[Any] | None:
    found: list[Any] | None = _C.find(calls, roots, variables, _KINDS)  # where all are plain
    if found is None:
        found = [_callable(call, roots, variables) for call in calls]
        return None if any(each is _MISSING for each in found) else found
    return found


def _callable(call: Any, roots: tuple[Any, ...], variables: dict[str, Any]) -> Any:
    if type(call) is Path:
        return _found(call, roots, variables)
    if type(call) is Method:
        return call
    function, args, kwargs = call

    def value(argument: Any) -> Any:
        return _found(argument, roots, variables) if type(argument) is Path else argument

    bound = Bound(
        value(function), tuple(map(value, args)), {key: value(each) for key, each in kwargs.items()}
    )
    parts = bound.function, *bound.args, *bound.kwargs.values()
    return _MISSING if any(each is _MISSING for each in parts) else bound


# ---- the helpers


def run(
    plan: Plan, first: int, value: Any, variables: dict[str, Any], roots: tuple[Any, ...]
) -> tuple[int, Any]:
    """Runs statements from the first on; the number of the next, and the value that the last has assigned."""
    callables, ends = _known(plan, first, roots, variables)
    try:
        output = _C.apply(KNOWN, callables, value)
    except Exception:  # which will be raised again, by the statement that it comes from
        if _saved_tensors_are_watched():
            raise
        output = NotImplemented
    if output is not NotImplemented:
        return first + len(ends), output
    if not is_unwatched(value):
        return first, value
    begun = first
    while ends:  # no code of the user's has run yet: what has been found is still what would be
        layers: Layers = ([], [], [])
        called = iter(callables)
        output = walk(called, value, layers)
        count, at, dropout = len(ends), len(callables), None
        if type(output) is Stopped:
            output, at = output.input, at - length_hint(called) - 1
            if at + 1 in ends and drops(callables[at]):
                at, dropout = at + 1, callables[at]
            count = bisect_right(ends, at)
            if count == 0:
                if first > begun or not plan.statements[first].may_call:
                    break
                return first + 1, apply(callables[: ends[0]], value)
            if at > ends[count - 1]:  # a statement has begun that will not be done
                at, layers = ends[count - 1], ([], [], [])
                output = walk(callables[:at], value, layers)
        try:
            if layers[0]:
                output = functional.network(output, *layers)
            if dropout is not None:
                output = dropout.forward(output)
        except Exception:  # the statement that it comes from will raise it again
            if _saved_tensors_are_watched():
                raise
            break
        first, value = first + count, output
        callables, ends = callables[at:], [end - at for end in ends[count:]]
    return first, value


def _saved_tensors_are_watched() -> bool:
    """Whether an exception may be a hook's: checkpoint ends a second forward pass by one, as no error."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _known(
    plan: Plan, first: int, roots: tuple[Any, ...], variables: dict[str, Any]
) -> tuple[Sequence[Any], Sequence[int]]:
    """What the statements from the first on call, as far as that is known, and where each one's calls end."""
    if (plain := plan.calls[first]) is not None:
        found = _C.find(plain[0], roots, variables, _KINDS)
        if found is not None:
            return found, plain[1]
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
    value, functions = items[-1], items[-2::-1]
    output = apply(functions, value)
    if output is not NotImplemented:
        return output
    for function in functions:
        value = function(value)
    return value


def run_later(
    plan: Plan, first: int, value: Any, variables: dict[str, Any], roots: tuple[Any, ...]
) -> tuple[int, Any]:
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
        fused = Fused.of(type(method.__self__))
        rewritten = fused and fused.functions.get(method.__func__)
        if rewritten and rewritten.is_current():
            return MethodType(rewritten.as_original(), method.__self__)
    return method


# ---- the source


#: Functions of whose further arguments something is known.
_KNOWN = {name.__name__ for name in FUNCTIONS}
#: What of torch's a chain may hold although it is no layer: methods that only look at a tensor otherwise.
_VIEWS = {"view", "flatten", "reshape"}
_SEES_FRAMES = {"locals", "vars", "dir", "eval", "exec", "_getframe", "currentframe", "stack"}
_SCOPES = (
    *(ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef),
    *(ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp),
)

_ATTEMPT = """
if NUMBER == INDEX:
    NUMBER, VALUE = RUN(PLAN, INDEX, INPUT, GLOBALS(), ROOTS)
if NUMBER == INDEX:
    WRITTEN
"""
_ASSIGNED = """
    NUMBER = NEXT
elif NUMBER == NEXT:
    TARGET = VALUE
"""


def _filled(template: str, at: ast.stmt, **parts: Any) -> list[ast.stmt]:
    """Statements at the place of another: of a template, whose names stand for expressions or a statement."""

    class Fill(ast.NodeTransformer):
        def visit_Expr(self, node: ast.Expr) -> ast.AST:
            statement: ast.AST = parts[node.value.id]  # type: ignore[attr-defined]
            return statement

        def visit_Name(self, node: ast.Name) -> ast.AST:
            part: Any = parts[node.id]
            return ast.copy_location(ast.Name(part, node.ctx) if isinstance(part, str) else part, at)

    made = ast.parse(template)
    for node in ast.walk(made):
        if "lineno" in node._attributes:
            ast.copy_location(node, at)
    return [ast.fix_missing_locations(Fill().visit(each)) for each in made.body]


def _constant(node: ast.AST) -> bool:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node = node.operand
    if isinstance(node, ast.Tuple):
        return all(map(_constant, node.elts))
    return isinstance(node, ast.Constant)


def _is_private(name: str) -> bool:
    """Whether a class makes another name of it."""
    return name[:2] == "__" != name[-2:]


class _Link(NamedTuple):
    """One of the calls of `f(g(x))`: what it calls, and the node of what that is called with."""

    call: Path | Arguments | Method
    node: ast.Call
    input: ast.expr


class _Rewriter(ast.NodeTransformer):
    """Rewrites one function; `plans` holds what it has found, `constants` what its markers stand for."""

    def __init__(self, function: ast.FunctionDef, code: CodeType, assigned: set[str]) -> None:
        self.constants: dict[str, tuple[Any, Any]] = {}  # and what they stand for where the ending is pending
        self.plans: list[Plan] = []
        self.ending: Plan | None = None
        self.ends = True  # whether a return statement here may end the function as a chain
        nodes = [node for each in function.body for node in ast.walk(each)]
        names = [node for node in nodes if isinstance(node, ast.Name)]
        used = {node.id for node in names} | {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        if seen := sorted(used & _SEES_FRAMES):
            raise Refused(f"uses {seen[0]}, which may see its variables")
        if any(isinstance(node, ast.Await | ast.Yield | ast.YieldFrom) for node in nodes):
            raise Refused("is a generator")
        self.loads = Counter(node.id for node in names if isinstance(node.ctx, ast.Load))
        self.deleted = {node.id for node in names if isinstance(node.ctx, ast.Del)}
        self.shared = {*code.co_cellvars, *code.co_freevars}  # with other functions
        packed = (code.co_flags & inspect.CO_VARARGS > 0) + (code.co_flags & inspect.CO_VARKEYWORDS > 0)
        self.parameters = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + packed]
        self.roots = [name for name in self.parameters if name not in assigned]
        self.local = {*code.co_varnames, *self.shared}
        self.owner = ("", *code.co_qualname.split("."))[-2].lstrip("_")
        body = function.body
        has_text = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
        count, last = len(body) - has_text, body[-1]
        self.bound = set(self.parameters)
        function.body = self.block(body)
        self.is_whole = bool(
            self.ending
            and len(self.ending.statements) == count
            and isinstance(last, ast.Return)
            and (self.ending.statements[0].input,) == self.parameters[1:]
            and not function.args.defaults
            and self.roots[:1] == list(self.parameters[:1])
        )

    def visit(self, node: ast.AST) -> Any:
        """Leaves functions within the function alone."""
        return node if isinstance(node, _SCOPES) else super().visit(node)

    def generic_visit(self, node: ast.AST) -> ast.AST:
        """Rewrites the blocks of a statement as blocks."""
        ends, self.ends = self.ends, self.ends and isinstance(node, ast.If | ast.Return)
        for name, value in ast.iter_fields(node):
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                setattr(node, name, self.block(value))
            elif isinstance(value, list):
                value[:] = [self.visit(each) if isinstance(each, ast.AST) else each for each in value]
            elif isinstance(value, ast.AST):
                setattr(node, name, self.visit(value))
        self.ends = ends
        return node

    def marker(self, value: Any, pending: Any = None) -> ast.Constant:
        marker = f"\0fastmlp {len(self.constants)}"
        self.constants[marker] = value, pending or value
        return ast.Constant(marker)

    def call_of(self, helper: ast.expr, arguments: Sequence[ast.expr], node: ast.AST) -> ast.Call:
        called = ast.copy_location(ast.Call(helper, list(arguments), []), node)
        return ast.fix_missing_locations(called)

    # ---- calls

    def path(self, node: ast.AST, loop: str | None = None) -> Path | None:
        names: list[Any] = []
        while not isinstance(node, ast.Name):
            if isinstance(node, ast.Attribute):
                names.append(
                    f"_{self.owner}{node.attr}" if _is_private(node.attr) and self.owner else node.attr
                )
            elif isinstance(node, ast.Subscript) and _constant(node.slice):
                names.append(ast.literal_eval(node.slice))
            else:
                return None
            node = node.value
        if not {*map(type, names)} <= {str, int} or _is_private(node.id):
            return None
        root: int | str = node.id
        if node.id == loop:
            root = _LOOP
        elif node.id in self.roots:
            root = self.roots.index(node.id)
        elif node.id in self.local:
            root = _OTHER
        return Path(root, tuple(names[::-1]))

    def argument(self, node: ast.AST) -> Any:
        """A constant, or a path; _MISSING for what is neither."""
        return ast.literal_eval(node) if _constant(node) else self.path(node) or _MISSING

    def links(self, node: ast.AST, loop: str | None = None) -> list[_Link]:
        """Nested calls, the outermost first."""
        links: list[_Link] = []
        while isinstance(node, ast.Call) and (link := self.link(node, loop)):
            links.append(link)
            node = link.input
        return links

    def link(self, node: ast.Call, loop: str | None) -> _Link | None:
        function, more = node.func, [self.argument(each) for each in node.args[1:]]
        if self.is_method(node):
            assert isinstance(function, ast.Attribute)
            return _Link(Method(function.attr, tuple(map(ast.literal_eval, node.args))), node, function.value)
        path = self.path(function, loop)
        if path is None or not node.args or isinstance(node.args[0], ast.Starred):
            return None
        keywords = {str(each.arg): self.argument(each.value) for each in node.keywords}
        if not more and not keywords:
            return _Link(path, node, node.args[0])
        if not _is_known(path) or "None" in keywords or _MISSING in (*more, *keywords.values()):
            return None
        return _Link(Arguments(path, tuple(more), keywords), node, node.args[0])

    def is_method(self, node: ast.Call) -> bool:
        """Whether it is `value.relu()`, say."""
        function = node.func
        if not isinstance(function, ast.Attribute) or node.keywords:
            return False
        if isinstance(function.value, ast.Name) and function.value.id not in self.local - set(self.roots[:1]):
            return False
        if function.attr in _VIEWS:
            return bool(node.args) and all(map(_constant, node.args))
        return function.attr.removesuffix("_") in METHODS and not node.args

    # ---- expressions: nested calls, within one line

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if nested := self.nested(node, call):
            return nested
        self.generic_visit(node)
        match node.func:
            case ast.Attribute(value=ast.Call(func=ast.Name(id="super"))):
                node.func = self.call_of(self.marker(inherited), [node.func], node.func)
        return node

    def nested(self, node: ast.AST, helper: Any, later: Any = None) -> ast.AST | None:
        """The helper called with what the calls call, and with what the innermost is called with."""

        def may_be_called(link: _Link) -> bool:
            call, line = link.call, node.lineno  # type: ignore[attr-defined]
            may = call.name not in _VIEWS if isinstance(call, Method) else not _is_foreign(_paths(call)[0])
            return may and len(_paths(call)) <= 1 and link.node.lineno == link.node.end_lineno == line

        links = list(takewhile(may_be_called, self.links(node)))
        if not any(type(link.call) is Path and not _is_known(link.call) for link in links):
            return None
        statement = self.statement_of(links, None)
        if len(links) > 1:
            self.plans.append(Plan([statement]))
        elif not later:
            return None
        if later:
            self.ending = Plan([statement])
        functions = [self.function(link) for link in links]
        return self.call_of(self.marker(helper, later), [*functions, self.visit(links[-1].input)], node)

    def function(self, link: _Link) -> ast.expr:
        """The expression of what is called, as it stands."""
        if isinstance(link.call, Method):
            return self.marker(link.call)
        if isinstance(link.call, Path):
            return link.node.func
        bound = partial(Bound, args=link.call.args, kwargs=link.call.kwargs)
        return self.call_of(self.marker(bound), [link.node.func], link.node.func)

    def visit_Return(self, node: ast.Return) -> ast.AST:
        if self.ends and node.value and (nested := self.nested(node.value, call, call_later)):
            node.value = nested  # type: ignore[assignment]  # an expression
            return node
        return self.generic_visit(node)

    # ---- statements

    def statement(self, node: ast.AST) -> Statement | None:
        match node:
            case ast.Return(value=ast.expr() as value):
                return self.statement_in(value, None)
            case ast.Assign(targets=[ast.Name(id=target)], value=value) if not _is_private(target):
                return self.statement_in(value, target)
            case ast.For(target=ast.Name(id=loop), iter=items, body=body, orelse=[]):
                inside = Counter(n.id for n in ast.walk(node) if isinstance(n, ast.Name) and _is_load(n))
                over, inner = self.path(items), self.together(body, loop)
                if not over or over.root == _OTHER or not inner or inside[loop] != self.loads[loop]:
                    return None
                is_local = loop in self.local - self.shared - set(self.parameters)
                return inner._replace(over=over) if is_local else None
            case ast.If(test=test, body=body, orelse=[]):
                is_none, expected = False, True
                match test:
                    case ast.UnaryOp(op=ast.Not(), operand=test):
                        expected = False
                    case ast.Compare(left=test, ops=[ast.Is() | ast.IsNot() as op], comparators=[none]):
                        if not isinstance(none, ast.Constant) or none.value is not None:
                            return None
                        is_none, expected = True, isinstance(op, ast.Is)
                path, inner = self.path(test), self.together(body)
                if path and path.names and path.root != _OTHER and inner:
                    return inner._replace(test=path, asks_none=is_none, expected=expected)
        return None

    def statement_in(self, value: ast.expr, target: str | None, loop: str | None = None) -> Statement | None:
        links = self.links(value, loop)
        if any(type(each) is Path and each.root == _OTHER for link in links for each in _paths(link.call)):
            return None
        statement = self.statement_of(links, target, value)
        return statement if statement.input and (links or target is None) else None

    def statement_of(self, links: list[_Link], target: str | None, value: ast.AST | None = None) -> Statement:
        input = links[-1].input if links else value
        name = input.id if isinstance(input, ast.Name) and not _is_private(input.id) else ""
        may_call = all(
            link.node.lineno == link.node.end_lineno == links[0].node.lineno
            and not any(map(_is_foreign, _paths(link.call)[:1]))
            for link in links
        )
        return Statement(name, target, tuple(link.call for link in links[::-1]), may_call)

    def together(self, nodes: Sequence[ast.stmt], loop: str | None = None) -> Statement | None:
        """The statements of a loop or a branch as one, if all of them are `x = f(x)`."""
        calls: list[Any] = []
        names = set()
        for node in nodes:
            match node:
                case ast.Assign(targets=[ast.Name(id=target)], value=value):
                    part = self.statement_in(value, target, loop)
                case _:
                    part = None
            if part is None:
                return None
            calls += part.calls
            names |= {part.input, part.target}
        return Statement(part.input, part.target, tuple(calls)) if part and len(names) == 1 else None

    def block(self, nodes: list[ast.stmt]) -> list[ast.stmt]:
        """A block of statements, rewritten."""
        bound, self.bound = self.bound, set(self.bound)
        result: list[ast.stmt] = []
        index = 0
        while index < len(nodes):
            group = self.group(nodes[index:])
            if sum(len(each.calls) + 2 * bool(each.over or each.test) for each in group) > 1:
                count = len(group)
                result += self.run(group, nodes[index : index + count])
            else:
                count = 1
                result.append(self.visit(nodes[index]))
            for node in nodes[index : index + count]:
                if isinstance(node, ast.Assign):
                    self.bound |= {each.id for each in node.targets if isinstance(each, ast.Name)}
            index += count
        self.bound = bound
        return result

    def group(self, nodes: Sequence[ast.stmt]) -> list[Statement]:
        """The statements from here on, while each takes the value of the one before, which no other sees."""
        group: list[Statement] = []
        for statement in map(self.statement, nodes):
            if statement is None:
                break
            if not group and statement.input not in self.bound - self.deleted:
                break
            if group and not self.follows(statement, group[-1]):
                break
            group.append(statement)
            if statement.target is None:
                break
        return group

    def follows(self, statement: Statement, before: Statement) -> bool:
        name = before.target
        is_seen = name in self.shared or (statement.target is not None and self.loads[str(name)] > 1)
        return statement.input == name and (statement.target == name or not is_seen)

    def run(self, group: list[Statement], nodes: Sequence[ast.stmt]) -> list[ast.stmt]:
        """The statements, each with the helper before it."""
        plan = Plan(group)
        self.plans.append(plan)
        is_ending = plan.returns and self.ends
        number, value = f".n{len(self.plans)}", f".x{len(self.plans)}"
        begin = "NUMBER = INDEX"
        result = _filled(begin, nodes[0], NUMBER=number, INDEX=ast.Constant(0))
        for index, (statement, node) in enumerate(zip(group, nodes, strict=True)):
            template = _ATTEMPT + ("return VALUE" if statement.target is None else _ASSIGNED)
            result += _filled(
                template,
                node,
                NUMBER=number,
                VALUE=value,
                INDEX=ast.Constant(index),
                NEXT=ast.Constant(index + 1),
                RUN=self.marker(run, run_later if is_ending else run),
                PLAN=self.marker(plan),
                INPUT=statement.input,
                GLOBALS=self.marker(globals),
                ROOTS=ast.Tuple([ast.Name(name, ast.Load()) for name in self.roots], ast.Load()),
                TARGET=statement.target,
                WRITTEN=self.visit(node),
            )
        if is_ending:
            self.ending = plan
        if not plan.returns:  # it holds a tensor else
            result += _filled("VALUE = None", nodes[-1], VALUE=value)
        return result


def _is_load(node: ast.Name) -> bool:
    return isinstance(node.ctx, ast.Load)


def _paths(call: Path | Arguments | Method) -> list[Path]:
    """What a call finds: the function first, then its arguments."""
    if type(call) is Arguments:
        return [call.function, *(each for each in (*call.args, *call.kwargs.values()) if type(each) is Path)]
    return [call] if type(call) is Path else []


def _is_known(path: Path) -> bool:
    """Whether it is called as a function of torch's is."""
    return (path.names[-1] if path.names else path.root) in _KNOWN


def _is_foreign(path: Any) -> bool:
    """Whether it is of another module, whose functions may ask who calls them."""
    is_global = type(path.root) is str and path.root != _OTHER
    return is_global and not _is_known(path) and bool(path.names or hasattr(builtins, str(path.root)))


# ---- the code


class Rewritten(NamedTuple):
    """A function, and what has been made of it."""

    original: Any  # functions, all three; as such mypy would bind them
    code: CodeType  # the original's
    function: Any
    later: Any  # returns a Pending, where the function ends by returning a chain; else None
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
        if self.within is None:
            return True
        held = any(each is self.within.original for each in _cells(self.original).values())
        return held and self.within.is_current()

    def names(self) -> tuple[str, ...]:
        """The names of attributes and global variables in its source."""
        return self.code.co_names if self.within is None else self.within.names()

    def as_original(self, later: bool = False) -> Any:
        """The rewritten function, with the defaults that the original has by now."""
        original, function = self.original, self.later if later else self.function
        if original.__defaults__ is not function.__defaults__:
            function.__defaults__ = original.__defaults__
        if original.__kwdefaults__ is not function.__kwdefaults__:
            function.__kwdefaults__ = original.__kwdefaults__
        if self.within is not None:
            self.within.as_original()
        return function

    def callables(self, plan: Plan, module: nn.Module) -> list[list[Any]]:
        """What each statement of a run calls, None for what is not known but in the run."""
        if self.within is not None:
            return self.within.callables(plan, module)
        roots = (module if self.is_method else _MISSING, *(_MISSING,) * self.code.co_argcount)
        variables = self.original.__globals__
        found: list[list[Any]] = []
        for statement in plan.statements:
            if statement.over or statement.test:
                known = _callables(statement, roots, variables)
                found.append([None] if known is None else [*known])
            else:
                found.append([self._likely(call, roots, variables) for call in statement.calls])
        return found

    def _likely(self, call: Any, roots: tuple[Any, ...], variables: dict[str, Any]) -> Any:
        """What a call would call, as far as that can be told without running a __getattr__, say."""
        found = _callable(call, roots, variables)
        if found is _MISSING and type(call) is Path and call.root == 0:
            found = roots[0]
            for name in call.names:
                found = getattr(found, "__dict__", {}).get("_modules", {}).get(name)
        return None if found is _MISSING else found

    def parts(self, module: nn.Module) -> list[Any]:
        """What it calls, one after the other; [None] where it does more, or that is not known."""
        if not self.is_whole or self.ending is None or not self.is_current():
            return [None]
        parts: list[Any] = []
        for statement in self.ending.statements:
            callables = _callables(statement, (module, _MISSING), self.original.__globals__)
            if callables is None:
                return [None]
            parts += callables
        return parts


_lock = threading.RLock()  # the tree of a file is changed while it is compiled


@lru_cache(maxsize=4)
def _parsed(filename: str, source: str) -> tuple[ast.Module, CodeType, symtable.SymbolTable]:
    tree = ast.parse(source, filename)
    whole = compile(tree, filename, "exec", dont_inherit=True)
    return tree, whole, symtable.symtable(source, filename, "exec")


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


def _the_code(whole: CodeType, code: CodeType) -> CodeType:
    """The code in a file's that stands where the other does."""
    same: CodeType = _only(
        each
        for each in _codes(whole)
        if each.co_name == code.co_name and each.co_firstlineno == code.co_firstlineno
    )
    return same


def _assigned(table: symtable.SymbolTable) -> set[str]:
    """The arguments of a function that are assigned to, also by functions within it."""
    own = {each.get_name() for each in table.get_symbols() if each.is_assigned() or each.is_imported()}
    inner = [child for child in _tables(table) if child is not table]
    return own | {s.get_name() for child in inner for s in child.get_symbols() if s.is_nonlocal()}


def _tables(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    yield table
    for child in table.get_children():
        yield from _tables(child)


def _only(found: Any) -> Any:
    each, *others = [*found] or [None]
    if each is None or others:
        raise Refused("is not what its source says")
    return each


def _source(function: Any) -> tuple[ast.Module, symtable.SymbolTable, ast.FunctionDef]:
    """The file that a function is from, and where it stands there; Refused where it is not what that says."""
    code = function.__code__
    linecache.checkcache(code.co_filename)
    source = "".join(linecache.getlines(code.co_filename, function.__globals__))
    if not source:
        raise Refused("has no source that can be found")
    try:
        tree, whole, table = _parsed(code.co_filename, source)
    except (SyntaxError, ValueError):
        raise Refused("is not what its source says") from None
    if not _is_same(_the_code(whole, code), code):
        raise Refused("is not what its source says")
    functions = [each for each in ast.walk(tree) if isinstance(each, ast.FunctionDef)]
    same = (
        each for each in functions if (each.name, _first_line(each)) == (code.co_name, code.co_firstlineno)
    )
    return tree, table, _only(same)


def _first_line(definition: ast.FunctionDef) -> int:
    return min([definition.lineno, *(each.lineno for each in definition.decorator_list)])


def rewrite(function: Any) -> Rewritten:
    """The function with its runs rewritten.

    Raises:
        Refused: where that cannot be done, or would do nothing.
    """
    if type(function) is not FunctionType:
        raise Refused("is not a Python function")
    code, decorated = function.__code__, vars(function).get("__wrapped__")
    with _lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the user has seen them, and markers are called
        tree, table, node = _source(function)
        if type(decorated) is FunctionType:
            return _around(function, decorated, node)
        name_and_line = code.co_name, node.lineno
        scope = _only(
            each for each in _tables(table) if (each.get_name(), each.get_lineno()) == name_and_line
        )
        body, node.body = node.body, copy.deepcopy(node.body)
        try:
            rewriter = _Rewriter(node, code, _assigned(scope))
            made = _the_code(compile(tree, code.co_filename, "exec", dont_inherit=True), code)
        finally:
            node.body = body
    if made.co_freevars != code.co_freevars or made.co_cellvars != code.co_cellvars:
        raise Refused("has variables that do not stay what they are")
    now, pending = (_filled_in(made, {k: v[i] for k, v in rewriter.constants.items()}) for i in (0, 1))
    return Rewritten(
        original=function,
        code=code,
        function=_function(now, function),
        later=_function(pending, function) if rewriter.ending else None,
        plans=tuple(rewriter.plans),
        ending=rewriter.ending,
        is_whole=rewriter.is_whole,
        is_method=rewriter.roots[:1] == list(code.co_varnames[:1]),
    )


def _cells(function: Any) -> dict[str, Any]:
    """What the variables of enclosing functions hold; None for nothing by now."""
    cells = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            cells[name] = cell.cell_contents
        except ValueError:
            cells[name] = None
    return cells


#: What a decorator may do with a function besides calling it, for another to be as good.
_PARTIAL, _SAME_NAMES = ("partial", "functools.partial"), ("__name__", "__qualname__", "__doc__")


def _around(function: Any, decorated: FunctionType, definition: ast.FunctionDef) -> Rewritten:
    """A function made by a decorator with functools.wraps, around what it decorates, rewritten."""
    cells = _cells(function)
    nodes = list(ast.walk(definition))
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    known = {id(node.func) for node in calls}
    known |= {id(node.args[0]) for node in calls if node.args and ast.unparse(node.func) in _PARTIAL}
    known |= {id(n.value) for n in nodes if isinstance(n, ast.Attribute) and n.attr in _SAME_NAMES}
    names = [name for name, content in cells.items() if content is decorated]
    body = [node for each in definition.body for node in ast.walk(each)]
    used = [node for node in body if isinstance(node, ast.Name) and [node.id] == names]
    if not used or not all(id(node) in known for node in used):
        raise Refused(f"is decorated by {function.__code__.co_name}, which may do more than to call it")
    within = rewrite(decorated)
    closure = (
        CellType(within.function) if name in names else cell
        for name, cell in zip(cells, function.__closure__, strict=True)
    )
    return Rewritten(
        original=function,
        code=function.__code__,
        function=_function(function.__code__, function, tuple(closure)),
        later=None,
        plans=within.plans,
        ending=None,
        is_whole=False,
        is_method=within.is_method,
        within=within,
    )


def _filled_in(code: CodeType, constants: dict[str, Any]) -> CodeType:
    return code.replace(co_consts=tuple(constants.get(c, c) if type(c) is str else c for c in code.co_consts))


def _function(code: CodeType, original: FunctionType, closure: Any = None) -> FunctionType:
    """A function of that code which is the original in all else."""
    cells = original.__closure__ if closure is None else closure
    made = FunctionType(code, original.__globals__, original.__name__, original.__defaults__, cells)
    for name in ("kwdefaults", "annotations", "doc", "module", "qualname", "type_params"):
        if hasattr(original, f"__{name}__"):
            setattr(made, f"__{name}__", getattr(original, f"__{name}__"))
    made.__dict__ = original.__dict__
    return made
