"""Methods that Snakemake calls for every job."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Generic, TypeVar

Answer = TypeVar("Answer")


class question(Generic[Answer]):
    """A method that a rule names as the function of one of its items.

    Snakemake inspects such a function's signature at each call, several times a job; for a bound method
    that takes longer than the answer. Here both are made once for each object.
    """

    def __init__(self, method: Callable[..., Answer]) -> None:
        self._method = method
        self.__doc__ = method.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Callable[..., Answer]:
        answer = functools.partial(self._method, instance)
        vars(answer)["__signature__"] = inspect.signature(self._method.__get__(instance))
        # Found before this descriptor from now on.
        instance.__dict__[self._name] = answer
        return answer
