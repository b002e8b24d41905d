"""What is evaluated: a criterion at a site at a level."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sparsity_atlas.criteria import check_level, create
from sparsity_atlas.errors import AtlasError

if TYPE_CHECKING:
    from sparsity_atlas.criteria import Criterion
    from sparsity_atlas.criteria.calibration_file import Calibration


@dataclass(frozen=True)
class Node:
    """A criterion at a site at a level."""

    criterion: dict[str, Any]  # its configuration, as `criteria.create` takes it
    site: str
    level: str
    rule: Criterion = field(compare=False)
    calibration: Calibration | None = field(default=None, compare=False)

    @classmethod
    def make(
        cls,
        criterion: dict[str, Any],
        site: str,
        level: str,
        calibration: Calibration | None = None,
    ) -> Node:
        """Make a node.

        Raises:
            AtlasError: unusable criterion, a level outside its range, or no calibration where it
                needs one.
        """
        rule = create(criterion)
        check_level(rule, level)
        if rule.calibrated and calibration is None:
            raise AtlasError(f"criteria: {type(rule).__name__} needs a calibration; found none")
        return cls(criterion, site, level, rule, calibration)

    def identity(self) -> dict[str, Any]:
        """What distinguishes the node; a criterion's own file counts by its code, not its path."""
        criterion = {key: value for key, value in self.criterion.items() if key != "file"}
        calibration = {"calibration": self.calibration.identity()} if self.calibration else {}
        return {"criterion": criterion, "site": self.site, "level": self.level, **calibration}
