"""The activation store: one Zarr group a tensor, one array a layer, readable with xarray.

    activations.zarr/{tensor}/layer_000   [token, channel]
    activations.zarr/text/ids             [sequence, position]

Names of groups and shapes of arrays are those of `layout`. bfloat16 has no Zarr type: its bits are stored
as uint16 and the attribute `dtype` says so. A tensor is complete when its group's attributes say so: Zarr
may leave out chunks, so their presence shows nothing.
"""

from __future__ import annotations

import shutil
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import zarr
from zarr.codecs import BloscCodec

from sparsity_atlas.activations.layout import Shape
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.models.memory import CHUNK_BYTES

# What Zarr and Blosc raise for metadata or a chunk that is not as it was written. A damaged size of a
# chunk is a SystemError where it is negative, and a MemoryError where it is huge.
_DAMAGE = (
    *(ValueError, LookupError, TypeError, AttributeError, OSError, RuntimeError),
    *(SystemError, MemoryError),
)


T = TypeVar("T")
_LAYER = "layer_"


def layer_name(layer: int) -> str:
    """Name of a layer's array."""
    return f"{_LAYER}{layer:03d}"


def chunk_sequences(sequence_bytes: int, batch: int, sequences: int) -> int:
    """Sequences in a chunk: near CHUNK_BYTES, dividing a batch or a multiple of it.

    Args:
        sequence_bytes: bytes of one sequence in the widest array.
        batch: sequences a forward pass.
        sequences: of the whole store.
    """
    fitting = max(1, CHUNK_BYTES // sequence_bytes)
    if fitting >= batch:
        return min(fitting - fitting % batch, -(-sequences // batch) * batch)
    return next(size for size in range(fitting, 0, -1) if batch % size == 0)


def check_space(path: Path, needed: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        AtlasError: fewer than `needed` bytes and 2 % more are free.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if needed * 1.02 > free:
        raise AtlasError(
            f"{path}: needs {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free; "
            "capture fewer tokens (capture.tokens) or make room"
        )


def read_ahead(read: Callable[[slice], T], parts: Iterable[slice]) -> Iterator[tuple[slice, T]]:
    """Each part and what it holds, the next one being read while the caller works on this one."""
    with ThreadPoolExecutor(1, thread_name_prefix="reader") as pool:
        coming: deque[tuple[slice, Future[T]]] = deque()
        for part in parts:
            coming.append((part, pool.submit(read, part)))
            if len(coming) > 1:
                before, values = coming.popleft()
                yield before, values.result()
        for last, values in coming:
            yield last, values.result()


class Rows:
    """A layer's rows, read as they are asked for: `rows[start:stop]` is float32 [rows, channel].

    Attributes:
        shape: (rows, channels).
        each: rows of a token.
        experts: of how many some are named; 0: of none.
        chunk: rows that are stored together; reading multiples of it reads nothing twice.
    """

    def __init__(self, array: zarr.Array[Any]) -> None:
        self._array = array
        self._dtype = str(array.attrs["dtype"])
        rows, channels = array.shape
        self.shape = (rows, channels)
        self.each = _each(array)
        self.experts = int(str(array.attrs.get("experts", 0)))
        self.chunk: int = array.chunks[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        return decode(np.asarray(self._array[rows]), self._dtype)


class ActivationStore:
    """A store on disk. `create` and `write` are for one process at a time; reading is free."""

    def __init__(self, path: Path, *, writable: bool = False) -> None:
        """Open a store.

        Raises:
            AtlasError: it is not there (for reading), or damaged.
        """
        self.path = path
        if not writable and not (path / "zarr.json").is_file():
            raise AtlasError(f"{path}: no activation store; run its capture again")
        try:
            self.root = zarr.open_group(path, mode="a" if writable else "r")
        except _DAMAGE as error:
            raise self._damaged(error) from None

    def complete(self, tensor: str) -> dict[str, Any] | None:
        """What `finish` recorded for a tensor; None if it is not complete."""
        try:
            attributes: dict[str, Any] = (
                dict(self.root[tensor].attrs) if tensor in self.root else {}
            )
        except _DAMAGE as error:
            raise self._damaged(error) from None
        return attributes.get("complete")

    def create(
        self,
        tensor: str,
        shapes: Mapping[int, Shape],
        tokens: int,
        chunk: int,
        dtype: str,
    ) -> None:
        """Make a tensor's arrays, without content, in place of any older ones.

        Args:
            tensor: its name, as all names here that of its group.
            shapes: by layer.
            tokens: of each array.
            chunk: tokens of a chunk.
            dtype: float32, float16, bfloat16 or int32.
        """
        if tensor in self.root:
            del self.root[tensor]
        group = self.root.create_group(tensor)
        same = len(set(shapes.values())) == 1
        for layer, (each, width, experts) in shapes.items():
            row = "token" if each == 1 else f"token_x_{each}"
            routed = {"rows_of_a_token": each} if each > 1 else {}
            group.create_array(
                layer_name(layer),
                shape=(tokens * each, width),
                chunks=(chunk * each, width),
                dtype="uint16" if dtype == "bfloat16" else dtype,
                compressors=BloscCodec(cname="lz4", clevel=1, shuffle="bitshuffle"),
                dimension_names=(row, "channel" if same else f"channel_{layer}"),
                attributes={
                    **{"dtype": dtype, **routed},
                    **({"experts": experts} if experts else {}),
                },
            )

    def check(self, tensor: str) -> None:
        """Compare every block of a complete tensor with the CRC-32 that its capture recorded.

        Raises:
            AtlasError: it is not complete, cannot be read, or is not what was captured.
        """
        try:
            record = self.complete(tensor)
            if record is None:
                raise AtlasError(f"{self.path}: '{tensor}' is not complete; run its capture again")
            for layer, place, same in self._blocks(tensor, record):
                if not same:
                    raise AtlasError(
                        f"{self.path}: '{tensor}', layer {layer}, tokens from {place:,} on are not what "
                        f"was captured; delete {self.path.name} and capture/ beside it, and run again"
                    )
        except _DAMAGE as error:
            raise self._damaged(error) from None

    def _blocks(self, tensor: str, record: dict[str, Any]) -> Iterator[tuple[int, int, bool]]:
        """Layer, first token and soundness of each block."""
        for place, layer in enumerate(record.get("layers", range(len(record["blocks"][0])))):
            array = self._array(tensor, layer)
            each, rows = _each(array), record["rows"] * _each(array)
            starts = range(0, array.shape[0], rows)
            for start, checksums in zip(starts, record["blocks"], strict=True):
                values = np.ascontiguousarray(array[start : start + rows])
                yield layer, start // each, zlib.crc32(values.data) == checksums[place]

    def _damaged(self, error: Exception) -> AtlasError:
        return AtlasError(
            f"{self.path}: damaged activation store ({error}); delete it and capture/ beside it, and "
            "run again"
        )

    def put(self, tensor: str, layer: int, token: int, values: np.ndarray) -> int:
        """Write whole chunks of rows from those of `token` on; returns their CRC-32."""
        # What `create` chose is no part of an array's metadata. Looking for chunks of zeros takes time.
        array = self._array(tensor, layer).with_config({"write_empty_chunks": True})
        start = token * _each(array)
        array[start : start + len(values)] = values
        return zlib.crc32(np.ascontiguousarray(values).data)

    def put_ids(self, ids: np.ndarray) -> None:
        """Keep the token ids that the activations belong to; those that are there already stay."""
        if "text/ids" in self.root and np.array_equal(np.asarray(self.root["text/ids"]), ids):
            return  # another job may be reading them
        self.root.create_array(
            "text/ids",
            data=ids,
            overwrite=True,
            dimension_names=("sequence", "position"),
            attributes={"crc32": zlib.crc32(np.ascontiguousarray(ids).data)},
        )

    def ids(self) -> np.ndarray:
        """The token ids that the activations belong to, int64 [sequence, position].

        Raises:
            AtlasError: they are not there, or not what was captured.
        """
        try:
            array = self.root["text/ids"]
            ids = np.ascontiguousarray(array)
            if zlib.crc32(ids.data) != array.attrs["crc32"]:
                raise ValueError("the token ids are not those of the capture")
        except _DAMAGE as error:
            raise self._damaged(error) from None
        return ids

    def finish(self, tensor: str, record: dict[str, Any]) -> None:
        """Declare a tensor complete."""
        self.root[tensor].attrs["complete"] = record

    def _group(self, tensor: str) -> zarr.Group:
        found = self.root[tensor]
        if not isinstance(found, zarr.Group):
            raise TypeError(f"'{tensor}' is an array, where its layers should be")
        return found

    def _array(self, tensor: str, layer: int) -> zarr.Array[Any]:
        found = self._group(tensor)[layer_name(layer)]
        if not isinstance(found, zarr.Array):
            raise TypeError(f"'{tensor}', layer {layer}, is a group, where an array should be")
        return found

    def layers(self, tensor: str) -> list[int]:
        """The layers that have a tensor."""
        return sorted(int(name.removeprefix(_LAYER)) for name in self._group(tensor).array_keys())

    def read(self, tensor: str, layer: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows of a layer as float32 (exact for every stored type of numbers), [rows, channel]."""
        return self.rows(tensor, layer)[start:stop]

    def rows(self, tensor: str, layer: int) -> Rows:
        """A layer's rows, without reading any."""
        return Rows(self._array(tensor, layer))

    def shape(self, tensor: str, layer: int) -> tuple[int, int]:
        """(rows, channels) of a layer."""
        return self.rows(tensor, layer).shape

    def sweep(self) -> None:
        """Remove what a killed writer left of unfinished chunk files."""
        for path in self.path.rglob("*.partial"):
            path.unlink()


def _each(array: zarr.Array[Any]) -> int:
    """Rows of a token."""
    return int(str(array.attrs.get("rows_of_a_token", 1)))


def decode(stored: np.ndarray, dtype: str) -> np.ndarray:
    """Stored values as float32; experts' numbers as they are."""
    if dtype == "int32":
        return stored
    if dtype == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32, copy=False)
