"""The batches of a task that generates, with the prompts of later ones running as soon as a row is free."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.utils import handle_stop_sequences

from sparsity_atlas.lm.continuous.able import refusal
from sparsity_atlas.lm.continuous.called import Called
from sparsity_atlas.lm.continuous.ends import Ends
from sparsity_atlas.lm.continuous.engine import Engine

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from sparsity_atlas.lm.forward import Masks
    from sparsity_atlas.lm.generation import GeneratingLM, Text
    from sparsity_atlas.sparsify.attach import Counter


class Generator:
    """Texts of batches, in their order."""

    def __init__(
        self,
        lm: GeneratingLM,
        counter: Counter,
        masks: Masks,
        batches: list[list[Instance]],
        tell: Callable[[str], None],
    ) -> None:
        """Begin with nothing.

        Args:
            lm: the model.
            counter: of what is attached to it.
            masks: how it is told who sees whom; see `ring_proof`.
            batches: of the task; those behind each other with equal options run together.
            tell: called with the reason why some are left to transformers.
        """
        self._lm, self._counter, self._masks = lm, counter, masks
        self._batches, self._tell = batches, tell
        self._running: Iterator[list[Text]] = iter(())
        self._until = 0  # the first batch that is not among those that run

    def texts(self, number: int) -> list[Text] | None:
        """Of a batch; None: it is left to transformers.

        Args:
            number: of the batch; each behind the last one that was asked for.

        Raises:
            TaskFailure: options that cannot be counted.
            NumericalFailure: NaN or an infinity came up.
        """
        if number >= self._until:
            self._running, self._until = self._begun(number)
        return next(self._running, None)

    def _begun(self, first: int) -> tuple[Iterator[list[Text]], int]:
        """Begin some batches; those behind them begin later."""
        options = self._batches[first][0].args[1]
        group = []
        for batch in self._batches[first:]:
            if batch[0].args[1] != options:
                break
            group.append(batch)
        until = first + len(group)
        known = self._lm.options_of(group[0][0])
        why = refusal(self._lm.model, self._counter, known)
        if why is None:
            try:
                return self._run(group, known), until
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        self._tell(why)
        return iter(()), until

    def _run(self, group: list[list[Instance]], options: dict[str, Any]) -> Iterator[list[Text]]:
        """The texts of each of some batches.

        Raises:
            RuntimeError: a step cannot be recorded.
        """
        lm, budget = self._lm, options["max_gen_toks"]
        longest = lm.max_length - budget
        prompts = [tokens for batch in group for tokens in lm.prompt_tokens(batch, longest)]
        # As HFLM does, which adds the end token's text to the stop strings.
        end = lm.tok_decode(lm.eot_token_id, skip_special_tokens=False)
        engine = Engine(
            Called(lm.model),
            self._counter,
            Ends(lm.tokenizer, handle_stop_sequences(options["until"], eos=end), lm.end_tokens()),
            rows=max(map(len, group)),
            size=max(map(len, prompts)) + budget,
            budget=budget,
            padding=lm.padding_id,
            masks=self._masks,
        )
        return _in_order(engine.run(prompts), [len(batch) for batch in group])


def _in_order(texts: Iterator[Text], sizes: list[int]) -> Iterator[list[Text]]:
    """Texts by batch, each as soon as it and those before it are there.

    Args:
        texts: as they end.
        sizes: of the batches.
    """
    ended: dict[int, Text] = {}
    first = 0
    for size in sizes:
        numbers = range(first, first + size)
        while not all(number in ended for number in numbers):
            text = next(texts)
            ended[text.number] = text
        yield [ended.pop(number) for number in numbers]
        first += size
