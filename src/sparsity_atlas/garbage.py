"""How often Python looks for garbage: hardly while libraries are imported, whose objects all stay.

Of torch, transformers and lm-eval, which every stage with a model imports, that is a twentieth of the time.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
from collections.abc import Iterator

_USUAL = gc.get_threshold()
# Objects that come up between two searches: all of the libraries' are some twice as many.
_HARDLY = (500_000, 50, 1000)

# Libraries look for what is left of them when the process ends.
atexit.register(gc.unfreeze)


def look_hardly() -> None:
    """Until `look_as_usual`: a stage begins."""
    gc.set_threshold(*_HARDLY)


def look_as_usual() -> None:
    """From here on: what is garbage now may hold tensors."""
    gc.set_threshold(*_USUAL)


@contextlib.contextmanager
def kept_as_it_is() -> Iterator[None]:
    """Look for no garbage: among objects that all stay, each search takes longer than the one before.

    It was half of the time that requests take which lie in the cache. What was made is not looked at later
    either, until `load_tasks` begins with others.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
