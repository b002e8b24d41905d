"""How often Python looks for garbage: hardly while libraries are imported, whose objects all stay.

Of torch, transformers and lm-eval, which every stage with a model imports, that is a twentieth of the time.
"""

from __future__ import annotations

import gc

_USUAL = gc.get_threshold()
# Objects that come up between two searches: all of the libraries' are some twice as many.
_HARDLY = (500_000, 50, 1000)


def look_hardly() -> None:
    """Until `look_as_usual`: a stage begins."""
    gc.set_threshold(*_HARDLY)


def look_as_usual() -> None:
    """From here on: what is garbage now may hold tensors."""
    gc.set_threshold(*_USUAL)
