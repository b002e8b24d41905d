"""How long a whole token of a model takes, dense and where zeros are left out of its maps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sparsity_atlas import cli
from sparsity_atlas.decoding.trial import Time
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.lm.continuous.able import refusal_of_model
from sparsity_atlas.lm.continuous.ring_proof import proved
from sparsity_atlas.speed.decoder import ROUNDS, STEPS, Decoder, records
from sparsity_atlas.speed.part_times import weights_met
from sparsity_atlas.speed.replaced import replaced
from sparsity_atlas.speed.speed_table import TOKEN
from sparsity_atlas.speed.timed_rows import Dense, Point, refused

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from sparsity_atlas.lm.forward import Masks
    from sparsity_atlas.sites.part import Part
    from sparsity_atlas.speed.text_vectors import Seen, Text

# Seconds of a timing, as `rounds_of` counts them, and of one of its rounds, where the fewest steps take less.
LONGEST, ROUND, FEWEST_STEPS = {"cuda": 0.7, "cpu": 5.0}, 1.0, 4


@dataclass(frozen=True, eq=False)
class Whole:
    """A model that is to be timed as a whole.

    Attributes:
        model: the model.
        parts: those that the site is in.
        site: one of `SITES`.
        weights: that a token reads.
    """

    model: PreTrainedModel
    parts: Sequence[Part]
    site: str
    weights: int

    def unread(self, seen: Seen, groups: Sequence[Tensor]) -> float:
        """Share of the model's weights that no token of a group wants, mean over the groups."""
        spared = 0.0
        for part in self.parts:
            for place in seen.kept:
                if (place.layer, place.part) == (part.layer, part.name):
                    met = weights_met(part, place.tensor) * part.size(place.tensor)
                    spared += met * seen.unread(place, groups)
        return spared / self.weights


def token_rows(
    whole: Whole,
    text: Text,
    ids: Tensor,
    points: Sequence[Point],
    contexts: Sequence[int],
    tokens: Sequence[int],
) -> Iterator[dict[str, Any]]:
    """Rows of the table, of whole tokens; one that says why where there are none.

    Each row of a batch has a piece of the text as its prompt, of as many tokens as the context is to have,
    and goes on by its likeliest tokens.

    Args:
        whole: what is timed.
        text: that its zeros are counted in.
        ids: int64 [positions], of some text.
        points: sparsities, with the text's vectors there; the first leaves the model as it is.
        contexts: tokens before the one that is timed.
        tokens: numbers of tokens, of a row each, that are decoded together.
    """
    for context in contexts:
        size = context + STEPS
        masks, why = _masks(whole.model, ids, size)
        if masks is None:
            yield {**refused(TOKEN, why), "context": context}
            continue
        for count in tokens:
            try:
                first = (context, count) == (contexts[0], tokens[0])
                yield from _of_batch(whole, text, ids, points, context, count, masks, first=first)
            except AtlasError as error:
                yield {**refused(TOKEN, str(error)), "context": context}
                break
            except torch.OutOfMemoryError:
                why = f"no memory is left for copies of its maps, {count} together"
                yield {**refused(TOKEN, why), "context": context}
                break


def made_for(model: PreTrainedModel) -> int | None:
    """Tokens of a sequence that a model is made for at most; None: its configuration does not say."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return most if isinstance(most, int) else None


def _masks(model: PreTrainedModel, ids: Tensor, size: int) -> tuple[Masks | None, str]:
    """How the model is told who sees whom, or why it cannot be decoded with."""
    why = refusal_of_model(model)
    if why is not None:
        return None, why
    most = made_for(model)
    if most is not None and size > most:
        return None, f"the model is made for {most} tokens, and {size} are wanted"
    proof = proved(model, ids.tolist()[:size], size)
    return proof.masks, f"with keys and values in fixed places {proof.fault}"


def _of_batch(
    whole: Whole,
    text: Text,
    ids: Tensor,
    points: Sequence[Point],
    context: int,
    count: int,
    masks: Masks,
    *,
    first: bool,
) -> Iterator[dict[str, Any]]:
    decoder = Decoder(whole.model, count, context + STEPS, masks=masks)

    def timed(steps: int) -> Time:
        decoder.changed()
        if whole.model.device.type == "cuda":
            torch.cuda.empty_cache()  # what graphs and copies before it had
        return decoder.timed(context, ROUNDS, steps, LONGEST[whole.model.device.type])

    groups = text.groups(count)
    dense, rows = Dense(), []
    with torch.no_grad():
        decoder.prompt(_pieces(ids, context, count).to(whole.model.device))
        fewest = min(FEWEST_STEPS, STEPS)
        steps = int(ROUND * 1e6 / decoder.timed(context, 2, fewest).median)
        steps = min(STEPS, max(fewest, steps))
        if first:
            _say_joined(whole.model, decoder.joined)
        dense.add("library", timed(steps))
        mildest = points[0]
        begin = mildest.bound, mildest.seen.level
        within = replaced(whole.model, whole.parts, whole.site, *begin)
        with within as maps:
            for point in points:
                for way in point.ways:
                    share = whole.unread(way.seen, groups)
                    maps.use(way.bound, point.seen.level, way.seen.dropped)
                    rows.append(
                        {
                            **{"timed": TOKEN, "context": context, "tokens": count},
                            **{"copies_bytes": maps.copies},
                            **point.row(way, timed(steps), share),
                            "layers": decoder.joined if records(whole.model.device) else None,
                        }
                    )
        # Once more: what else a machine did meanwhile may have come or gone.
        dense.add("library", timed(steps))
    yield from dense.finished(rows, whole.weights * whole.model.dtype.itemsize)


def _say_joined(model: PreTrainedModel, count: int) -> None:
    """Name layers whose steps are recorded as they are, in dense steps and in sparse ones."""
    layers = getattr(model.get_decoder(), "layers", ())
    if records(model.device) and count < len(layers):
        kinds = ", ".join(dict.fromkeys(type(one).__name__ for one in layers))
        cli.logger.info(
            "whole tokens: %d of %d layers (%s) are timed as the model has them, the others with their small "
            "steps joined, dense and sparse alike",
            *(len(layers) - count, len(layers), kinds),
        )


def _pieces(ids: Tensor, length: int, count: int) -> Tensor:
    """Pieces of a text, [count, length], from evenly spread places; a short one begins anew."""
    starts = torch.arange(count) * len(ids) // count
    return ids[(starts[:, None] + torch.arange(length)) % len(ids)]
