"""A part of a capture: the sequences between two records of its journal, written while the model runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import Future

import numpy as np
import torch

from sparsity_atlas.activations.layout import Group, group_name
from sparsity_atlas.activations.spool import HostCopy, Writer, as_stored
from sparsity_atlas.activations.store import ActivationStore
from sparsity_atlas.errors import NumericalFailure
from sparsity_atlas.sites.find import Vectors


class CapturedPart:
    """Takes the tensors of some batches, and has each layer's written as soon as it is whole."""

    def __init__(
        self,
        store: ActivationStore,
        missing: Mapping[str, Group],
        dtype: str,
        token: int,
        batches: int,
    ) -> None:
        """Begin with nothing.

        Args:
            store: where the tensors go.
            missing: tensors to capture, by name.
            dtype: the model's.
            token: the part's first, counted over all sequences.
            batches: how many it has.
        """
        self._store, self._missing, self._dtype = store, missing, dtype
        self._token, self._batches = token, batches
        self._arrived: dict[tuple[str, int], list[HostCopy]] = defaultdict(list)
        self._written: dict[tuple[str, int], Future[int]] = {}

    def keep(
        self,
        vectors: Vectors,
        writer: Writer,
        stream: Callable[[torch.device], torch.cuda.Stream | None],
    ) -> None:
        """Take a batch's tensor of a layer.

        Args:
            vectors: the tensor.
            writer: has it written.
            stream: gives that for the copies from a device.
        """
        layer, name = vectors.part.layer, group_name(vectors.part.name, vectors.tensor)
        values = vectors.in_order()
        self._arrived[name, layer].append(HostCopy(values, stream(values.device)))
        # As soon as it is whole: a large model's part is one batch of one layer.
        if len(self._arrived[name, layer]) == self._batches:
            copies = self._arrived.pop((name, layer))
            self._written[name, layer] = writer.submit(self._write, layer, name, copies)

    def _write(self, layer: int, name: str, copies: list[HostCopy]) -> int:
        values = _stored(copies, layer, name, self._missing[name].dtype(self._dtype))
        return self._store.put(name, layer, self._token, values)

    def checksums(self) -> dict[str, list[int]]:
        """Those of each tensor's layers, when all of them are written."""
        return {
            name: [self._written[name, layer].result() for layer in group.shapes]
            for name, group in self._missing.items()
        }


def _stored(copies: list[HostCopy], layer: int, name: str, dtype: str) -> np.ndarray:
    """[rows, channel] of some batches in the store's type; bfloat16 as its bits."""
    if not all(copy.is_finite() for copy in copies):
        raise NumericalFailure(f"NaN or infinity in '{name}' of layer {layer}")
    batches = [copy.wait() for copy in copies]
    return as_stored(batches[0] if len(batches) == 1 else torch.cat(batches), dtype)
