"""What was found out about a model, kept in the user's cache for the next process that loads it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from sparsity_atlas import cli
from sparsity_atlas.files.whole import cache_folder, canonical, digest, write_text
from sparsity_atlas.lm.forward import Masks


@dataclass(frozen=True)
class Proof:
    """Whether requests may share rows, or rows begin at different times.

    Attributes:
        length: tokens of the longest sequence that it was tried with.
        masks: how the model is told who sees whom; None: it cannot be told.
        fault: why not.
    """

    length: int
    masks: Masks | None
    fault: str = ""


class Answers:
    """Answers about one model under one set of conditions.

    Attributes:
        selects: what is wrong with showing the head a few tokens, "" for nothing; None: not tried.
        proofs: what was tried of requests that share rows.
        rings: what was tried of rows that begin at different times.
    """

    def __init__(self, made_of: dict[str, Any] | None = None) -> None:
        """Read what is known.

        Args:
            made_of: all that the answers depend on; None: they are kept in memory alone.
        """
        self.selects: str | None = None
        self.proofs: list[Proof] = []
        self.rings: list[Proof] = []
        self._made_of = made_of
        if made_of is not None:
            self._path = cache_folder("abilities") / f"{digest(made_of)}.json"
            self._read()

    def _read(self) -> None:
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return  # none, or not whole: found out again
        # A digest of its content, so that no damaged answer is believed.
        if not isinstance(content, dict) or content.pop("digest", None) != digest(content):
            return
        self.selects = content["selects"]
        self.proofs, self.rings = (
            [
                Proof(one["length"], Masks(one["masks"]) if one["masks"] else None, one["fault"])
                for one in content[name]
            ]
            for name in ("proofs", "rings")
        )

    def about(self, length: int) -> Proof | None:
        """What is known of requests of up to `length` tokens that share rows."""
        return _about(self.proofs, length)

    def about_rings(self, length: int) -> Proof | None:
        """What is known of rows of up to `length` tokens that begin at different times."""
        return _about(self.rings, length)

    def add_selects(self, fault: str | None) -> None:
        """Note what is wrong with showing the head a few tokens; None: nothing."""
        self.selects = fault or ""
        self._write()

    def add(self, proof: Proof) -> None:
        """Note what was found of requests that share rows."""
        self.proofs.append(proof)
        self._write()

    def add_ring(self, proof: Proof) -> None:
        """Note what was found of rows that begin at different times."""
        self.rings.append(proof)
        self._write()

    def _write(self) -> None:
        if self._made_of is None:
            return
        content = {
            "made_of": self._made_of,
            "selects": self.selects,
            "proofs": [asdict(one) for one in self.proofs],
            "rings": [asdict(one) for one in self.rings],
        }
        content = json.loads(canonical(content))
        try:
            write_text(self._path, canonical({**content, "digest": digest(content)}))
        except OSError as error:
            cli.logger.info("what the model does right is not kept: %s", error)


def _about(proofs: list[Proof], length: int) -> Proof | None:
    for proof in proofs:
        if proof.masks is not None and length <= proof.length:
            return proof
    for proof in proofs:
        # What goes wrong with shorter sequences is not tried again with longer ones.
        if proof.masks is None and length >= proof.length:
            return proof
    return None
