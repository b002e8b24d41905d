"""What scripts that are run by hand on a device share: each check is told, and the next one tried."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from typing import Any


def failures(checks: Mapping[str, Callable[[], Any]], only: str) -> int:
    """Run the checks with `only` in their name, and say how each ends; how many failed."""
    failed = 0
    for name, check in checks.items():
        if only not in name:
            continue
        try:
            check()
        except Exception:  # noqa: BLE001 (each is told, and the next one tried)
            failed += 1
            print(f"FAILED {name}\n{traceback.format_exc()}", flush=True)  # noqa: T201
        else:
            print(f"ok     {name}", flush=True)  # noqa: T201
    return failed
