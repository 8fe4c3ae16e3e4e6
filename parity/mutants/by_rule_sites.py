"""What a rule may change in a function: its places, each with what stands there and what would.

Rules, one kind of mistake each:
    arithmetic  + and −, * and /, ** and *, // and *, % and //, << and >>, the operands of @
    compare     < and <=, > and >=, == and !=, and the sense of < and >
    boolean     and and or, & and |, a lost `not` or ~
    constant    c + 1, c − 1, 2c and 0 for c
    flag        True and False of an argument
    axis        another axis, two axes of a permutation exchanged
    slice       a bound one further or one nearer, an end left out
    index       the neighbour of a fixed index
    range       one turn more or less of range()
    transpose   a transposition left out
    negation    a minus sign left out
    cast        a change of dtype left out
    gradient    detach or stop_gradient left out
    operands    the last two arguments of where, the two of matmul and their like exchanged
    function    max for min, sum for mean, sin for cos, and so on

What only words, checks of arguments or types do is left alone: docstrings, annotations, defaults, messages, raise and
assert statements, an `if` that only raises, and calls of checking functions.
"""

from __future__ import annotations

import ast
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["RULES", "Site", "sites"]

RULES = (
    "arithmetic", "compare", "boolean", "constant", "flag", "axis", "slice", "index", "range", "transpose", "negation",
    "cast", "gradient", "operands", "function",
)  # fmt: skip

ARITHMETIC = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"), ast.Pow: ("**", "*"),
    ast.FloorDiv: ("//", "*"), ast.Mod: ("%", "//"), ast.LShift: ("<<", ">>"), ast.RShift: (">>", "<<"),
}  # fmt: skip
BITS = {ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&")}
COMPARE = {
    ast.Lt: ("<", ("<=", ">")), ast.LtE: ("<=", ("<", ">=")), ast.Gt: (">", (">=", "<")), ast.GtE: (">=", (">", "<=")),
    ast.Eq: ("==", ("!=",)), ast.NotEq: ("!=", ("==",)),
}  # fmt: skip
KEPT = {ast.Is: "is", ast.IsNot: "is not", ast.In: "in", ast.NotIn: "not in"}
AXES = ("axis", "dim", "axis1", "axis2", "dim1", "dim2", "dims", "start_dim", "end_dim", "axes")
BY_AXIS = {
    "transpose", "swapaxes", "permute", "movedim", "moveaxis", "unsqueeze", "squeeze", "expand_dims", "flatten",
    "concatenate", "cat", "stack", "size",
}  # fmt: skip
"""Their integers are axes."""
TRANSPOSED = {"transpose", "swapaxes", "permute", "movedim", "moveaxis"}
CASTS = {"astype", "to", "float", "double", "long", "int", "bool", "type_as"}
STOPS = {"detach", "stop_gradient"}
OPERANDS = {"where", "matmul", "subtract", "divide", "power", "pow", "arctan2", "atan2", "outer", "dot"}
FUNCTIONS = {
    left: right
    for pair in (
        ("max", "min"), ("maximum", "minimum"), ("amax", "amin"), ("argmax", "argmin"), ("any", "all"),
        ("sum", "mean"), ("sin", "cos"), ("floor", "ceil"), ("tril", "triu"), ("zeros", "ones"),
        ("zeros_like", "ones_like"), ("sqrt", "square"), ("rsqrt", "sqrt"), ("exp", "expm1"), ("log", "log2"),
        ("add_", "sub_"), ("mul_", "div_"), ("addcmul_", "addcdiv_"), ("sqrt_", "square_"), ("logaddexp", "maximum"),
        ("cumsum", "cumprod"), ("silu", "sigmoid"), ("gelu", "relu"), ("log10", "log"), ("log1p", "log"),
    )
    for left, right in (pair, pair[::-1])
    if left not in ("relu", "sigmoid", "expm1", "log2") and (left, right) != ("sqrt", "rsqrt")
}  # fmt: skip
NAMESPACES = {"jnp", "jax", "lax", "np", "torch", "F", "nnx", "math"}
CHECKS = ("check_", "_check", "validate", "_validate", "warn", "print", "isinstance", "issubclass", "getattr", "cast")


@dataclass(frozen=True)
class Site:
    """At these bytes of a function's source, `new` for what is there."""

    rule: str
    old: str
    """In short, as the table shows it: "*", "axis=-1", "a:b"."""
    short: str
    start: int
    end: int
    new: str
    first: int
    last: int
    """Lines of the function, from 1."""


def sites(source: str) -> Iterator[Site]:
    """Every change of every rule, from the top of the function's source down."""
    tree = ast.parse(source)
    finder = _Finder(source)
    function = tree.body[0]
    assert isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
    for statement in function.body:
        finder.visit(statement)
    seen = set()
    for site in sorted(finder.found, key=lambda s: (s.start, -s.end, RULES.index(s.rule))):
        key = site.start, site.end, site.new
        if key not in seen:
            seen.add(key)
            yield site


class _Finder(ast.NodeVisitor):
    def __init__(self, source: str):
        self.bytes, self.found, self.taken = source.encode(), list[Site](), set[int]()
        lengths = [len(line) for line in self.bytes.splitlines(keepends=True)]
        self.lines = [sum(lengths[:i]) for i in range(len(lengths))]

    # --- text

    def span(self, node: ast.expr | ast.Slice) -> tuple[int, int]:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self.lines[node.lineno - 1] + node.col_offset, self.lines[node.end_lineno - 1] + node.end_col_offset

    def text(self, node: ast.expr | ast.Slice) -> str:
        start, end = self.span(node)
        return self.bytes[start:end].decode()

    def add(self, rule: str, node: ast.expr | ast.Slice, new: str, old: str = "", short: str = "") -> None:
        start, end = self.span(node)
        old = " ".join((old or self.text(node)).split())
        self.found.append(
            Site(rule, old, " ".join((short or new).split()), start, end, new, node.lineno, node.end_lineno or 0)
        )

    # --- what is left alone

    def visit_Raise(self, node: ast.Raise) -> None:
        pass

    def visit_Assert(self, node: ast.Assert) -> None:
        pass

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        pass

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for statement in node.body:
            self.visit(statement)

    def visit_If(self, node: ast.If) -> None:
        if isinstance(node.body[-1], ast.Raise):
            for statement in node.orelse:
                self.visit(statement)
        else:
            self.generic_visit(node)

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> None:
        pass

    # --- operators

    def visit_BinOp(self, node: ast.BinOp) -> None:
        self.generic_visit(node)
        left, right = self.text(node.left), self.text(node.right)
        if isinstance(node.op, ast.MatMult):
            self.add("operands", node, f"(({right}) @ ({left}))", "a @ b", "b @ a")
            return
        rule = "boolean" if type(node.op) in BITS else "arithmetic"
        found = (ARITHMETIC | BITS).get(type(node.op))
        if found and not any(isinstance(side, ast.Constant) and isinstance(side.value, str) for side in _sides(node)):
            self.add(rule, node, f"(({left}) {found[1]} ({right}))", *found)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.visit(node.value)
        found = ARITHMETIC.get(type(node.op))
        if found:
            start, end = self.span(node.target)[1], self.span(node.value)[0]
            at = self.bytes.index(f"{found[0]}=".encode(), start, end)
            self.found.append(
                Site("arithmetic", f"{found[0]}=", f"{found[1]}=", at, at + len(found[0]), found[1], node.lineno,
                     node.end_lineno or node.lineno)
            )  # fmt: skip

    def visit_Compare(self, node: ast.Compare) -> None:
        self.generic_visit(node)
        parts = [f"({self.text(part)})" for part in (node.left, *node.comparators)]
        kinds = [COMPARE[type(op)][0] if type(op) in COMPARE else KEPT[type(op)] for op in node.ops]
        for i, op in enumerate(node.ops):
            for other in COMPARE.get(type(op), ("", ()))[1]:
                signs = [*kinds[:i], other, *kinds[i + 1 :]]
                new = parts[0] + "".join(f" {sign} {part}" for sign, part in zip(signs, parts[1:], strict=True))
                self.add("compare", node, f"({new})", kinds[i], other)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        self.generic_visit(node)
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        self.add("boolean", node, f"({f' {new} '.join(f'({self.text(v)})' for v in node.values)})", old, new)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        value = _number(node)
        if value is not None:
            self.constant(node, value)
            return
        self.generic_visit(node)
        operand = f"({self.text(node.operand)})"
        if isinstance(node.op, ast.USub):
            self.add("negation", node, operand, "-x", "x")
        elif isinstance(node.op, (ast.Not, ast.Invert)):
            self.add("boolean", node, operand, "not x" if isinstance(node.op, ast.Not) else "~x", "x")

    # --- numbers

    def visit_Constant(self, node: ast.Constant) -> None:
        value = _number(node)
        if value is not None:
            self.constant(node, value)

    def constant(self, node: ast.expr, value: int | float) -> None:
        if id(node) in self.taken:
            return
        tried = {value}
        for other in (value + 1, value - 1, 2 * value, type(value)(0)):
            if other not in tried:
                tried.add(other)
                self.add("constant", node, f"({other!r})", short=repr(other))

    def axis(self, node: ast.expr, name: str) -> None:
        """An axis, or the first two of several exchanged."""
        value = _number(node)
        if isinstance(value, int):
            self.taken.add(id(node))
            other = {0: 1, -1: -2}.get(value, value - 1 if value > 0 else value + 1)
            self.add("axis", node, f"({other})", f"{name}{value}", f"{name}{other}")
        elif isinstance(node, (ast.Tuple, ast.List)) and all(_number(x) is not None for x in node.elts):
            self.taken.update(id(x) for x in node.elts)
            texts = [self.text(x) for x in node.elts]
            for i in range(len(texts) - 1):
                swapped = [*texts[:i], texts[i + 1], texts[i], *texts[i + 2 :]]
                brackets = "({})" if isinstance(node, ast.Tuple) else "[{}]"
                self.add("axis", node, brackets.format(", ".join(swapped)))

    def visit_Subscript(self, node: ast.Subscript) -> None:
        for part in node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]:
            value = _number(part)
            if isinstance(part, ast.Slice):
                self.slice(part)
            elif isinstance(value, int):
                self.taken.add(id(part))
                other = value + 1 if value >= 0 else value - 1
                self.add("index", part, f"({other})", f"[{value}]", f"[{other}]")
        self.generic_visit(node)

    def slice(self, node: ast.Slice) -> None:
        lower, upper = node.lower, node.upper
        for bound, name in ((lower, "{}:"), (upper, ":{}")):
            if bound is None:
                continue
            self.taken.add(id(bound))
            text = self.text(bound)
            for sign in "+-":
                value, step = _number(bound), 1 if sign == "+" else -1
                if (value, step) in ((0, -1), (-1, 1)):
                    continue  # the other end of the sequence: not off by one
                other = f"({text}) {sign} 1" if value is None else str(value + step)
                self.add("slice", bound, other, name.format(text), name.format(other))
        if (lower is None) != (upper is None) and node.step is None:
            self.add("slice", node, f"1:{self.text(upper)}" if upper else f"{self.text(lower or node)}:-1")

    # --- calls

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name.startswith(CHECKS) or name.endswith(("Error", "Warning")):
            return
        method = isinstance(node.func, ast.Attribute) and not _is_module(node.func.value)
        plain = [a for a in node.args if not isinstance(a, ast.Starred)]
        subject = node.func.value if method else plain[0] if plain else None  # pyright: ignore
        for keyword in node.keywords:
            if keyword.arg in AXES:
                self.axis(keyword.value, f"{keyword.arg}=")
            elif keyword.arg == "strict":  # of zip: a check of lengths
                pass
            elif isinstance(keyword.value, ast.Constant) and isinstance(keyword.value.value, bool):
                other = not keyword.value.value
                old, new = f"{keyword.arg}={keyword.value.value}", f"{keyword.arg}={other}"
                self.add("flag", keyword.value, str(other), old, new)
        if name in BY_AXIS:
            own = plain if method else plain[1:]
            if name == "permute" and all(_number(a) is not None for a in own) and len(own) > 1:
                for one, next_ in itertools.pairwise(own):
                    self.pair(node, one, next_, name)
                self.taken.update(map(id, own))
            for argument in own:
                if id(argument) not in self.taken:
                    self.axis(argument, f"{name} ")
        if subject is not None:
            whole = f"({self.text(subject)})"
            if name in TRANSPOSED:
                self.add("transpose", node, whole, f"{name}(x)", "x")
            elif name in CASTS and method:
                self.add("cast", node, whole, f".{name}({', '.join(self.text(a) for a in node.args)})", " ")
            elif name in STOPS:
                self.add("gradient", node, whole, f"{name}(x)", "x")
        if name in OPERANDS and not method and len(node.args) == len(plain) >= 2:
            self.pair(node, plain[-2], plain[-1], name)
        if name == "range" and plain:
            end = plain[0] if len(plain) == 1 else plain[1]
            for sign in "+-":
                self.add("range", end, f"({self.text(end)}) {sign} 1", short=f"{self.text(end)} {sign} 1")
            self.taken.add(id(end))
        # The module math has few of them; a name that is not there would only crash.
        if name in FUNCTIONS and (not self.text(node.func).startswith("math.") or hasattr(math, FUNCTIONS[name])):
            start, end = self.span(node.func)
            new = f"{self.text(node.func)[: -len(name)]}{FUNCTIONS[name]}"
            self.found.append(
                Site("function", name, FUNCTIONS[name], start, end, new, node.lineno, node.end_lineno or node.lineno)
            )
        self.generic_visit(node)

    def pair(self, node: ast.Call, one: ast.expr, other: ast.expr, name: str) -> None:
        """Two arguments exchanged."""
        (start, cut), (begin, end) = self.span(one), self.span(other)
        new = self.text(other) + self.bytes[cut:begin].decode() + self.text(one)
        rule = "axis" if name in BY_AXIS else "operands"
        old, short = f"{name}({self.text(one)}, {self.text(other)})", f"{name}({self.text(other)}, {self.text(one)})"
        self.found.append(
            Site(rule, " ".join(old.split()), " ".join(short.split()), start, end, new, node.lineno,
                 node.end_lineno or node.lineno)
        )  # fmt: skip


def _sides(node: ast.BinOp) -> tuple[ast.expr, ast.expr]:
    return node.left, node.right


def _number(node: ast.expr) -> int | float | None:
    """The value of a literal number, signed or not."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _number(node.operand)
        return None if value is None or value < 0 else -value
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value  # pyright: ignore[reportReturnType]
    return None


def _is_module(node: ast.expr) -> bool:
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name) and node.id in NAMESPACES
