"""Has Numba compile something, once for all forks: what it imports and registers for that takes long."""

from __future__ import annotations

import numba

numba.njit(lambda number: number + 1)(1)
