"""Every small change of a module: the operators of mutation testing, on its syntax tree.

Left out are annotations, docstrings, imports, `__all__`, what an exception says, whatever only a
type checker reads, zip's `strict`, which is an assertion, and the one function that only CUDA runs.
"""

from __future__ import annotations

import ast
import copy
from collections import Counter
from collections.abc import Iterator
from types import CodeType
from typing import Any, NamedTuple

SWAPS: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.LShift: ast.RShift,
    ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitAnd,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
PAIRS = (
    "min max", "amin amax", "floor ceil", "exp log", "sum mean", "any all", "cos sin",
    "zeros ones", "zeros_like ones_like", "logsumexp sum", "repeat_interleave tile",
)  # fmt: skip
NAMES = {a: b for pair in PAIRS for a, b in (pair.split(), pair.split()[::-1])}


class Mutant(NamedTuple):
    """parent.field (or parent.field[index]) becomes `new`; what: in words; where: its statement."""

    tree: ast.Module
    parent: ast.AST
    field: str
    index: int | None
    new: Any
    line: int
    what: str
    where: str

    def __str__(self) -> str:
        """Without the line number, which moves."""
        return self.what if self.what.startswith(self.where) else f"{self.what} in {self.where}"


def mutants(source: str) -> list[Mutant]:
    """All of them, in the order of the text. They share one tree: `changed` changes it."""
    tree, seen = ast.parse(source), Counter[str]()
    found = [
        Mutant(tree, parent, field, index, new, old.lineno, _describe(old, new), where)
        for parent, field, index, old, where in _places(tree, "")
        for new in _variants(field, old)
        if isinstance(new, ast.Pass) or ast.dump(new) != ast.dump(old)
    ]
    for i, mutant in enumerate(found):  # the same change twice in a statement
        seen[str(mutant)] += 1
        if seen[str(mutant)] > 1:
            found[i] = mutant._replace(what=f"{mutant.what} ({seen[str(mutant)]})")
    return found


def changed(found: list[Mutant], number: int) -> CodeType:
    """The code with one change. To be called once in a process: the tree is not put back."""
    m = found[number]
    if m.index is None:
        setattr(m.parent, m.field, m.new)
    else:
        getattr(m.parent, m.field)[m.index] = m.new
    return compile(ast.fix_missing_locations(m.tree), "<mutant>", "exec")


def _describe(old: Any, new: Any) -> str:
    after = "left out" if isinstance(new, ast.Pass) else ast.unparse(new)
    return f"{ast.unparse(old).splitlines()[0]} -> {after.splitlines()[0]}"


def _places(node: ast.AST, where: str) -> Iterator[tuple[ast.AST, str, int | None, ast.AST, str]]:
    """(parent, field, index, node, statement) of all that may be changed."""
    if isinstance(node, ast.stmt):
        where = ast.unparse(node).splitlines()[0]
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "type_comment"):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST) or _left_out(child):
                continue
            yield node, field, index, child, where or ast.unparse(child).splitlines()[0]
            if not isinstance(child, ast.Raise):
                yield from _places(child, where)


def _left_out(node: ast.AST) -> bool:
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant)  # docstrings
    if isinstance(node, ast.Assign):
        target, value = node.targets[0], node.value
        names = ("__all__", "Word", "KL")
        literal = isinstance(value, ast.Subscript) and ast.unparse(value.value) == "Literal"
        return literal or isinstance(target, ast.Name) and target.id in names
    if isinstance(node, ast.FunctionDef):
        return node.name == "_on_stream"
    if isinstance(node, ast.If):
        return ast.unparse(node.test) == "TYPE_CHECKING"
    if isinstance(node, ast.keyword):
        return node.arg == "strict"
    return isinstance(node, (ast.Import, ast.ImportFrom, ast.JoinedStr, ast.expr_context))


def _variants(field: str, node: ast.AST) -> Iterator[ast.AST]:
    match node:
        case ast.BinOp(op=op) if type(op) in SWAPS:
            yield _with(node, op=SWAPS[type(op)]())
            yield node.left  # a term or factor left out
        case ast.BoolOp(op=op):
            yield _with(node, op=SWAPS[type(op)]())
        case ast.Compare(ops=ops):
            for i, op in enumerate(ops):
                yield _with(node, ops=[*ops[:i], SWAPS[type(op)](), *ops[i + 1 :]])
        case ast.UnaryOp(operand=operand):
            yield operand
        case ast.AugAssign(op=op):
            yield _with(node, op=SWAPS[type(op)]())
            yield ast.copy_location(ast.Pass(), node)
        case ast.Constant(value=bool() as value):
            yield _with(node, value=not value)
        case ast.Constant(value=int() | float() as value):
            yield _with(node, value=value + 1)
            if isinstance(value, int) and value:
                yield _with(node, value=value - 1)
            elif isinstance(value, float) and value:
                yield _with(node, value=value * 1.001)
        case ast.Constant(value=str() as value):
            yield _with(node, value=value + "x")
        case ast.Name(id=name, ctx=ast.Load()) if name in NAMES and field == "func":
            yield _with(node, id=NAMES[name])
        case ast.Attribute(attr=name) if name in NAMES and field == "func":
            yield _with(node, attr=NAMES[name])
        case ast.Call(func=func, args=args, keywords=keywords):
            for i, keyword in enumerate(keywords):
                if keyword.arg != "strict":
                    yield _with(node, keywords=keywords[:i] + keywords[i + 1 :])
            commutes = ast.unparse(func) in ("min", "max")
            starred = any(isinstance(a, ast.Starred) for a in args[:2])
            if len(args) > 1 and not commutes and not starred:
                yield _with(node, args=[args[1], args[0], *args[2:]])
            if isinstance(func, ast.Attribute) and not _is_module(func.value):
                yield func.value  # x.method(...) -> x
        case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test):
            if not isinstance(test, (ast.Compare, ast.UnaryOp)):
                yield _with(node, test=ast.copy_location(ast.UnaryOp(ast.Not(), test), test))
            if isinstance(node, ast.If) and not node.orelse:
                yield ast.copy_location(ast.Pass(), node)
            elif isinstance(node, ast.IfExp):
                yield from (node.body, node.orelse)
        case ast.Slice(lower=lower, upper=upper):
            if lower is not None:
                yield _with(node, lower=None)
            if upper is not None:
                yield _with(node, upper=None)
        case ast.Expr() | ast.Raise() | ast.Continue() | ast.Break():
            yield ast.copy_location(ast.Pass(), node)
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield ast.copy_location(ast.Pass(), node)
        case ast.Return(value=ast.AST()):
            yield _with(node, value=ast.copy_location(ast.Constant(None), node))


def _is_module(node: ast.AST) -> bool:
    """Whether x in x.f(...) is a module, or part of one: torch, math, F, torch.special, ..."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name) and node.id in ("torch", "math", "F", "native", "forward_ad")


def _with(node: Any, **fields: Any) -> Any:
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new
