"""How far above its own folder code looks, by its syntax tree.

A path begins at `__file__` (or at what `inspect` says of a module's file) and rises by `.parent`,
`.parents[n]`, `dirname` and `..`; it is followed through names, attributes, arguments and results of the
file's functions. Of a path that somebody else gives, an argument or an imported name, nobody here knows where
it begins: where such a one rises twice, or by `..`, all that it may mean counts. Nothing else rises: a node's
or a scratch file's `.parent.parent` is no business of the code's folder.
"""

from __future__ import annotations

import ast
import builtins
import sys
from collections.abc import Iterable, Iterator
from typing import NamedTuple

# Folders above the code's own that a path may lie in whose beginning or whose steps are not known.
FAR = 3
_OF_MODULES = {
    "__file__": 0,
    "co_filename": 0,
    "origin": 0,
    "__path__": 1,
    "submodule_search_locations": 1,
}
_ASKS = {"getfile": 0, "getsourcefile": 0, "getabsfile": 0, "files": 1}
# What cuts a path as text.
_CUTS = {"split", "rsplit", "rpartition", "partition", "parts"}
# Methods of texts to which `..` is two dots.
_OF_TEXTS = {
    *("replace", "strip", "lstrip", "rstrip", "startswith", "endswith", "count", "find", "index"),
    *("split", "rsplit", "partition", "rpartition", "print", "sub", "compile", "search", "match"),
}
# Methods that give what they are called on a part more.
_ADDS = {"append", "add", "insert", "extend", "update", "setdefault"}
_JOINS = {"join", "joinpath", "Path", "PurePath", "PosixPath"}
_BUILT_IN = {name for name in dir(builtins) if not name.startswith("__")}
_Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


class _Place(NamedTuple):
    """Where a value may lie, if it is a path.

    Attributes:
        steps: up from the code's file: 1 is its own folder; None of what is no path of it.
        known: whether it begins at the code's file.
        dots: steps of `..` that are not yet joined to a path.
    """

    steps: int | None = None
    known: bool = True
    dots: int = 0


_GIVEN = _Place(0, known=False)


def rise(tree: ast.AST, most: int) -> int:
    """Folders above the code's own that its paths may lie in.

    Args:
        tree: of one Python file.
        most: as many as there are.

    Returns:
        0 where it looks nowhere above its folder.
    """
    try:
        found = _Paths(tree, most + 1).highest() - 1
    except RecursionError:  # code that a program wrote; then it may look anywhere
        found = FAR
    return min(found, most)


class _Paths:
    """The paths of one file of code."""

    def __init__(self, tree: ast.AST, most: int) -> None:
        """Nothing is followed yet.

        Args:
            tree: of the file.
            most: steps that there can be.
        """
        self._tree, self._most = tree, most
        self._functions: dict[str, list[_Function]] = {}
        self._places: dict[str, _Place] = {}
        self._highest = 1
        nodes = list(ast.walk(tree))
        for node in nodes:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                self._functions.setdefault(node.name, []).append(node)
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
                for one in node.targets:
                    self._functions.setdefault(getattr(one, "id", ""), []).append(node.value)
            elif isinstance(node, ast.ClassDef):
                own = (one for one in node.body if isinstance(one, ast.FunctionDef))
                self._functions.setdefault(node.name, []).extend(
                    one for one in own if one.name == "__init__"
                )
        self._bound = {*_BUILT_IN, *self._functions, *_of_python(nodes)}
        self._bound |= {
            node.id
            for node in nodes
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        }

    def highest(self) -> int:
        """Steps of the path that rises most, 1 at least."""
        roots = [node for node in ast.walk(self._tree) if isinstance(node, ast.stmt)]
        # Each round carries places one name further; steps are bounded, so it ends.
        while True:
            before = dict(self._places)
            for node in roots:
                self._statement(node)
            if before == self._places:
                return self._highest

    def _statement(self, node: ast.stmt) -> None:
        for child in self._children(node):
            self._loose(self._of(child))
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign) and node.value is not None:
            place = self._of(node.value)
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                self._bind(target, place)
        elif isinstance(node, ast.For | ast.AsyncFor):
            self._bind(node.target, self._of(node.iter))
        elif isinstance(node, ast.With | ast.AsyncWith):
            for item in node.items:
                if item.optional_vars is not None:
                    self._bind(item.optional_vars, self._of(item.context_expr))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inside = (
                one
                for one in ast.walk(node)
                if isinstance(one, ast.Return | ast.Yield | ast.YieldFrom)
            )
            values = [self._of(one.value) for one in inside if one.value is not None]
            self._pass(node, self._together(self._of(one) for one in self._children(node.args)))
            self._meet(f"{node.name}()", self._together(values))

    def _loose(self, place: _Place) -> None:
        """Note `..` that no known path goes before: it may be joined to one out of sight."""
        if place.steps is None and place.dots:
            self._highest = max(self._highest, FAR + 1)

    def _bind(self, target: ast.expr, place: _Place) -> None:
        for one in ast.walk(target):
            if isinstance(one, ast.Name):
                self._meet(one.id, place)
            elif isinstance(one, ast.Attribute):
                self._meet(f".{one.attr}", place)

    def _pass(self, function: _Function, place: _Place) -> None:
        """A function's arguments are this as well."""
        for one in ast.walk(function.args):
            if isinstance(one, ast.arg):
                self._meet(one.arg, place._replace(dots=0))

    def _meet(self, name: str, place: _Place) -> None:
        """A name is this as well; the higher of both counts."""
        self._places[name] = self._higher([self._places.get(name, _Place()), place])

    def _higher(self, places: Iterable[_Place]) -> _Place:
        places = list(places)
        some = [one for one in places if one.steps is not None]
        dots = max((one.dots for one in places), default=0)
        if not some:
            return _Place(dots=dots)
        steps = max(one.steps for one in some if one.steps is not None)
        return _Place(steps, all(one.known for one in some), dots)

    def _together(self, places: Iterable[_Place], *, joined: bool = False) -> _Place:
        """What is made of several values: the highest, and above it by `..`.

        Args:
            places: of the values.
            joined: whether one goes on where another ends, so that what is given goes on from a known one.
        """
        places = list(places)
        if joined and any(one.steps is not None and one.known for one in places):
            places = [one if one.known else _Place(dots=one.dots) for one in places]
        found = self._higher(places)._replace(dots=0)
        dots = min(sum(one.dots for one in places), self._most)
        if not dots or found.steps is None:
            return found._replace(dots=dots)
        return self._up(found, dots if found.known else FAR + 1)

    def _up(self, place: _Place, steps: int) -> _Place:
        if place.steps is None:
            return place
        total = place.steps + steps
        if not place.known and total > 1:
            total = max(total, FAR + 1)
        total = min(total, self._most)
        self._highest = max(self._highest, total)
        return place._replace(steps=total)

    def _of(self, node: ast.AST) -> _Place:
        """Where an expression's value may lie."""
        if isinstance(node, ast.Constant) and node.value == "__file__":
            return _Place(0)  # of `globals()` or `getattr`
        if isinstance(node, ast.Constant):
            # Of a text that goes on after it, `../texts`, what it names is looked for as it stands.
            parts = node.value.rstrip("/").split("/") if isinstance(node.value, str) else [""]
            return _Place(dots=parts.count("..") if parts[-1] == ".." else 0)
        if isinstance(node, ast.Name):
            if node.id in _OF_MODULES:
                return _Place(_OF_MODULES[node.id])
            if node.id == "pardir":
                return _Place(dots=1)
            given = [] if node.id in self._bound else [_GIVEN]
            return self._higher([self._places.get(node.id, _Place()), *given])
        if isinstance(node, ast.Attribute):
            return self._attribute(node)
        if isinstance(node, ast.Subscript) and getattr(node.value, "attr", "") == "parents":
            assert isinstance(node.value, ast.Attribute)
            index = node.slice
            steps = self._most
            if isinstance(index, ast.Constant) and isinstance(index.value, int):
                steps = index.value + 1
            return self._up(self._of(node.value.value), steps)
        if isinstance(node, ast.Call):
            return self._call(node)
        if isinstance(node, ast.Compare):
            return self._higher(self._of(one)._replace(dots=0) for one in self._children(node))
        if isinstance(node, ast.NamedExpr):
            place = self._of(node.value)
            self._bind(node.target, place)
            return place
        if isinstance(node, ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp):
            for one in node.generators:
                self._bind(one.target, self._of(one.iter))
        joined = isinstance(node, ast.BinOp | ast.JoinedStr)
        return self._together((self._of(one) for one in self._children(node)), joined=joined)

    def _attribute(self, node: ast.Attribute) -> _Place:
        if node.attr == "pardir":
            return _Place(dots=1)
        if node.attr in _OF_MODULES:
            return _Place(_OF_MODULES[node.attr])
        own = self._higher(
            self._places.get(name, _Place())
            for name in (node.attr, f".{node.attr}", f"{node.attr}()")
        )
        place = self._of(node.value)
        if own.steps is not None and getattr(node.value, "id", "") in ("self", "cls"):
            place = _Place()
        if node.attr == "parent":
            return self._up(place, 1)
        if node.attr == "parents":
            return self._up(place, self._most)
        if node.attr in _CUTS:
            return self._cut(place)
        return self._higher([place, own])

    def _cut(self, place: _Place) -> _Place:
        """Of a path that is cut as a text it is not known how much is left."""
        if place.steps is None or not place.known:
            return place
        return self._up(place, FAR)

    def _call(self, node: ast.Call) -> _Place:
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        if name in _ASKS:
            return _Place(_ASKS[name])
        arguments = [*node.args, *(one.value for one in node.keywords)]
        places = [self._of(one) for one in arguments]
        if name in _OF_TEXTS:
            places = [one._replace(dots=0) for one in places]
        passed = self._higher(places)._replace(dots=0)
        called = [name, *(one.id for one in arguments if isinstance(one, ast.Name))]
        functions = [one for own in called for one in self._functions.get(own, [])]
        functions += [one for one in (function, *arguments) if isinstance(one, ast.Lambda)]
        for one in functions:
            self._pass(one, passed)
        owner = []
        if isinstance(function, ast.Attribute):
            if name in _ADDS:
                self._bind(function.value, passed)
            # Of a text's methods only `format` makes a path of it.
            if not isinstance(function.value, ast.Constant) or name == "format":
                owner = [self._of(function)]
        results = [self._places.get(f"{own}()", _Place()) for own in called]
        results += [self._places.get(own, _Place()) for own in called if own in self._functions]
        if name in _CUTS:
            places = [self._cut(one) for one in places]
        found = self._together([*places, *owner, *results], joined=name in _JOINS)
        return self._up(found, 1) if name == "dirname" else found

    def _children(self, node: ast.AST) -> list[ast.expr]:
        """Expressions right inside one, also those in between that are none (comprehensions)."""
        found: list[ast.expr] = []
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                found.append(child)
            elif not isinstance(child, ast.stmt):
                found += self._children(child)
        return found


def _of_python(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """Names that come from Python's own modules, which give no path of the code."""
    for node in nodes:
        if isinstance(node, ast.Import):
            whole = [(one.name, one.asname or one.name.partition(".")[0]) for one in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            whole = [(node.module or "", one.asname or one.name) for one in node.names]
        else:
            continue
        yield from (own for of, own in whole if of.partition(".")[0] in sys.stdlib_module_names)
