"""What a task's Python code asks of its surroundings, beside files.

An environment variable counts by its value, or by the file that it names. What is another at each call
(the time, the machine, chance without a seed) cannot count: a task that asks for it is known by the
requests that came of it.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterable, Iterator

from sparsity_atlas.files.whole import digest

# Variables that say who somebody is; an answer does not depend on them, and they are nobody's business.
_SECRET = re.compile(r"(?i)token|key|secret|passw|credential")
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
_IN_TEXT = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_GETTERS = {"get", "pop", "setdefault"}
# Calls whose answer is another each time or on each machine, by the last part of their name.
_UNSTEADY = {
    *("now", "today", "utcnow", "time_ns", "localtime", "gmtime", "ctime"),
    *("getcwd", "cwd", "gethostname", "getfqdn", "getuser", "getlogin", "getpid", "uname"),
    *("uuid1", "uuid4", "urandom", "SystemRandom", "randbelow", "token_hex", "token_bytes"),
    *("token_urlsafe", "urlopen", "urlretrieve"),
}
# The same by their whole name.
_OF_MODULES = {"time.time", "time.strftime", "platform.node", "requests.get", "requests.post"}
# Generators of random numbers, which take a seed.
_SEEDED = {"default_rng", "Random", "RandomState"}


def variables(tree: ast.AST) -> set[str]:
    """Names of the environment variables that code asks for.

    A name that is computed may be any text of the code that is spelled like one.
    """
    asked = list(_asked(tree))
    found = {text for node in asked if (text := _text(node)) is not None}
    if any(_text(node) is None for node in asked):
        texts = (_text(node) for node in ast.walk(tree))
        found |= {text for text in texts if text and _VARIABLE.fullmatch(text)}
    if any(_name(node).endswith("expandvars") for node in ast.walk(tree)):
        whole = (_text(node) or "" for node in ast.walk(tree))
        found |= {one or other for text in whole for one, other in _IN_TEXT.findall(text)}
    return {name for name in found if not _SECRET.search(name)}


def values(names: Iterable[str]) -> dict[str, str | None]:
    """Digests of environment variables; None of one that is not set, or names a file, which counts itself."""
    found = {name: os.environ.get(name) for name in sorted(names)}
    return {
        name: None if value is None or os.path.isfile(value) else digest(value)
        for name, value in found.items()
    }


def is_unsteady(tree: ast.AST) -> bool:
    """Whether code asks for what is another at each call."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = _name(node)
        last = name.rpartition(".")[2]
        if last in _UNSTEADY or name in _OF_MODULES or name == "hash":
            return True
        if last in _SEEDED and not (node.args or node.keywords):
            return True
    return False


def _asked(tree: ast.AST) -> Iterator[ast.AST]:
    """Expressions that name a variable."""
    for node in ast.walk(tree):
        match node:
            case ast.Subscript(value=owner, slice=name) if _dotted(owner).endswith("environ"):
                yield name
            case ast.Compare(left=name, comparators=[owner]) if _dotted(owner).endswith("environ"):
                yield name
            case ast.Call(func=ast.Attribute(value=owner, attr=getter), args=[name, *_]) if (
                getter in _GETTERS and _dotted(owner).endswith("environ")
            ):
                yield name
            case ast.Call(args=[name, *_]) if _name(node).endswith("getenv"):
                yield name


def _text(node: ast.AST) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _name(node: ast.AST) -> str:
    """Dotted name of what is called; empty where nothing is called."""
    return _dotted(node.func) if isinstance(node, ast.Call) else ""


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}".lstrip(".")
    return node.id if isinstance(node, ast.Name) else ""
