"""The criteria: one small file each, found by name; a user's own file joins in the same way.

Start with `base`, which says what a criterion is, and a rule in `built_in`.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsity_atlas.criteria import dense_prompt
from sparsity_atlas.criteria.in_experts import KEYS, check_keys
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.terms import SITES

if TYPE_CHECKING:
    from types import ModuleType

    from sparsity_atlas.criteria.base import Criterion

__all__ = [
    "Criterion",
    "check_level",
    "create",
    "declared",
    "level_range",
    "rule_names",
    "source_file",
]

# What is no parameter of a rule.
_BESIDE = ("rule", "file", *KEYS, *dense_prompt.KEYS)
BUILT_IN = Path(__file__).with_name("built_in")


def __getattr__(name: str) -> Any:
    # Snakemake's process asks for file names only and must not pay for torch.
    if name == "Criterion":
        from sparsity_atlas.criteria.base import Criterion

        return Criterion
    raise AttributeError(name)


def rule_names() -> list[str]:
    """Names of the built-in rules."""
    return sorted(path.stem for path in BUILT_IN.glob("*.py") if path.stem != "__init__")


def source_file(spec: dict[str, Any]) -> Path:
    """The file that defines a criterion.

    Args:
        spec: `{"rule": name, ...}` or `{"file": path, ...}` with the rule's parameters beside it.

    Raises:
        AtlasError: no such rule or file.
    """
    if "file" in spec:
        path = Path(spec["file"])
        if not os.path.isfile(path):
            raise AtlasError(f"criteria: {path}: no such file")
        return path
    if spec["rule"] not in rule_names():
        raise AtlasError(
            f"criteria: unknown rule '{spec['rule']}'; built in: {', '.join(rule_names())}; "
            "a rule of your own is named by `file`"
        )
    return BUILT_IN / f"{spec['rule']}.py"


def declared(spec: dict[str, Any]) -> dict[str, Any]:
    """The constants of a criterion, read from its source without importing torch.

    Returns:
        lowest, highest, sites, calibrated, by_channel and not_in_experts; where the file names none, as the
        base class has them. And allocated: whether it takes an allocation.

    Raises:
        AtlasError: no such rule or file, the file is not Python, or a constant is no plain literal.
    """
    path = source_file(spec)
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError as error:
        raise AtlasError(f"{path}: line {error.lineno}: {error.msg}") from None
    found: dict[str, Any] = {
        **{"lowest": 0.0, "highest": 1.0, "sites": ()},
        **{"calibrated": False, "allocated": False},
        **{"by_channel": False, "not_in_experts": ""},
    }
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    for node in (statement for one in classes for statement in one.body):
        if isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            targets, value = [node.target], node.value
        else:
            continue
        for target in targets:
            if isinstance(target, ast.Name) and target.id in found:
                found[target.id] = _literal(path, target.id, value)
    return found


def level_range(spec: dict[str, Any]) -> tuple[float, float]:
    """Lowest and highest level; see `declared`."""
    constants = declared(spec)
    return constants["lowest"], constants["highest"]


_PLAIN = {
    "lowest": "a plain number",
    "highest": "a plain number",
    "sites": f"a tuple of {', '.join(SITES)}",
    "calibrated": "True or False",
    "allocated": "True or False",
    "by_channel": "True or False",
    "not_in_experts": "a text",
}


def _literal(path: Path, name: str, value: ast.expr) -> Any:
    try:
        found = ast.literal_eval(value)
    except ValueError:
        found = None
    if name == "sites":
        right = isinstance(found, tuple) and set(found) <= set(SITES)
    elif name in ("calibrated", "allocated", "by_channel"):
        right = isinstance(found, bool)
    elif name == "not_in_experts":
        right = isinstance(found, str)
    else:
        right = isinstance(found, int | float) and not isinstance(found, bool)
    if not right:
        raise AtlasError(f"{path}: line {value.lineno}: {name}: expected {_PLAIN[name]}")
    return float(found) if name in ("lowest", "highest") else found


def create(spec: dict[str, Any]) -> Criterion:
    """Make a criterion from its configuration.

    Raises:
        AtlasError: unknown rule, unusable or incomplete file, unknown or bad parameter, or masks of a user's
            own rule that depend on more than the row.
    """
    path = source_file(spec)
    constants = declared(spec)
    module = (
        _import(path)
        if "file" in spec
        else importlib.import_module(f"{__name__}.built_in.{path.stem}")
    )
    from sparsity_atlas.criteria.base import Criterion

    classes = [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, Criterion)
        and value.__module__ == module.__name__
    ]
    if len(classes) != 1:
        raise AtlasError(f"{path}: expected one subclass of Criterion, found {len(classes)}")
    name = f"criteria: {spec.get('rule', path)}"
    check_keys(name, spec, constants["calibrated"])
    stays = dense_prompt.read(name, spec)
    parameters = {key: value for key, value in spec.items() if key not in _BESIDE}
    _check_parameters(spec.get("rule", path), classes[0], parameters)
    try:
        criterion = classes[0](**parameters)
    except (TypeError, ValueError) as error:
        raise AtlasError(f"criteria: {spec.get('rule', path)}: {error}") from None
    for key in KEYS:
        if key in spec:
            setattr(criterion, key, spec[key])
    if stays is not None:
        if criterion.sees_sequences:
            raise AtlasError(f"{name}: dense_prompt: this rule looks at prompts itself")
        criterion.dense_prompt = stays
    _check(path, criterion)
    del constants["allocated"]  # asked of the configuration alone
    for name, value in constants.items():
        if getattr(criterion, name) != value:
            raise AtlasError(
                f"{path}: {type(criterion).__name__}: {name} is {getattr(criterion, name)!r} by "
                "inheritance; the file itself must say so, since it is read without being run"
            )
    if "file" in spec:
        criterion.file = str(path)
        # What is bound to a place first is tried there, see `binding.bind_all`.
        _try(criterion)
    return criterion


def _try(criterion: Criterion, levels: tuple[float, ...] | None = None) -> None:
    """Try a user's rule, unless it is bound first: then that is done there."""
    from sparsity_atlas.criteria.base import Criterion

    if criterion.file is None or type(criterion).bind is not Criterion.bind or criterion.calibrated:
        return
    import torch

    from sparsity_atlas.criteria.check import WIDTH, check_masks

    check_masks(criterion, criterion.file, WIDTH, torch.device("cpu"), levels)


def _check_parameters(name: Any, kind: type[Criterion], given: dict[str, Any]) -> None:
    known = inspect.signature(kind).parameters
    if any(one.kind is one.VAR_KEYWORD for one in known.values()):
        return
    for key in given:
        if key not in known:
            takes = ", ".join(known) or "none"
            raise AtlasError(f"criteria: {name}: unknown parameter '{key}'; it takes {takes}")


def _import(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"_criterion_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise AtlasError(f"{path}: a criterion is a .py file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise AtlasError(f"{path}: line {error.lineno}: {error.msg}") from None
    except (ImportError, NameError, AttributeError, TypeError, ValueError) as error:
        raise AtlasError(f"{path}: {type(error).__name__}: {error}") from None
    return module


def _check(path: Path, criterion: Criterion) -> None:
    """What a search relies on, and only a user's own file can get wrong."""
    from sparsity_atlas.criteria.base import Criterion as base
    from sparsity_atlas.spelling import canonical_level

    kind, name = type(criterion), type(criterion).__name__
    if kind.mask is base.mask and kind.threshold is base.threshold:
        raise AtlasError(f"{path}: {name}: expected a method `threshold` or `mask`, found neither")
    ends = (criterion.lowest, criterion.highest)
    dense = getattr(criterion, "dense_level", None)
    if dense not in ends:
        raise AtlasError(
            f"{path}: {name}: dense_level: expected the lowest or the highest level "
            f"({ends[0]:g} or {ends[1]:g}), found {dense}"
        )
    coarse = getattr(criterion, "coarse_levels", None)
    if not isinstance(coarse, tuple | list) or not coarse:
        raise AtlasError(
            f"{path}: {name}: coarse_levels: expected a tuple of levels, found {coarse}"
        )
    for level in coarse:
        try:
            spelled = isinstance(level, str) and canonical_level(level) == level
        except ValueError:
            spelled = False
        if not spelled or not ends[0] <= float(level) <= ends[1]:
            raise AtlasError(
                f"{path}: {name}: coarse_levels: expected the shortest decimals between "
                f"{ends[0]:g} and {ends[1]:g} as text, for instance '0.9', found {level!r}"
            )


def check_level(criterion: Criterion, level: str) -> float:
    """The level as a number.

    Raises:
        AtlasError: it lies outside the criterion's range, or a user's own rule looks beyond a row there.
    """
    number = float(level)
    if not criterion.lowest <= number <= criterion.highest:
        raise AtlasError(
            f"levels: {level} is out of range for {type(criterion).__name__} "
            f"({criterion.lowest:g} to {criterion.highest:g})"
        )
    _try(criterion, (number,))
    return number
