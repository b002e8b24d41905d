"""lm-eval's own command with the model `sparsity-atlas`: a Hugging Face model, sparsified or dense.

    sparsity-atlas harness run --model sparsity-atlas --tasks arc_easy \\
        --model_args pretrained=models/my-model,criterion=topp,site=intermediate,level=0.9

Importing this module registers the model, so that `lm_eval.simple_evaluate` knows it too. For a study
use the workflow: it resumes, keeps every sample and computes no node twice.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval.api.registry import register_model

from sparsity_atlas.criteria import check_level, create
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.lm import AtlasLM
from sparsity_atlas.models import check_sites, load, load_tokenizer, resolve
from sparsity_atlas.outcome import sparsity
from sparsity_atlas.prompts import PromptSettings
from sparsity_atlas.sites import find_ffns
from sparsity_atlas.sparsify import counted, slots_of, sparsified

if TYPE_CHECKING:
    from collections.abc import Callable

    from lm_eval.api.instance import Instance

    from sparsity_atlas.sparsify import Counter
    from sparsity_atlas.usage import Usage


class _Memory:
    """A journal that lasts as long as this process."""

    def __init__(self) -> None:
        self.records: list[Any] = []

    def append(self, record: Any) -> None:
        self.records.append(record)


@register_model("sparsity-atlas")
class HarnessLM(AtlasLM):
    """`AtlasLM` as lm-eval makes one from `--model_args`.

    Args:
        pretrained: a local folder, or a repository of the Hub.
        criterion: a built-in rule, or a Python file with one; without it the model stays dense.
        site: where it is applied.
        level: at which level.
        revision: of the Hub repository.
        batch_size: sequences a forward pass.
        max_length: longest sequence in tokens; None: the model's own limit.
        add_bos_token: begin each request with the BOS token; None: as the tokenizer does.
        dtype: computation type; `auto`: float32 on the CPU, the checkpoint's own elsewhere.
        device: auto, cpu, cuda or mps; lm-eval's command says cuda:0 where the user says nothing, which
            is taken as auto.
        parameters: of the criterion.
    """

    def __init__(
        self,
        pretrained: str,
        criterion: str | None = None,
        site: str | None = None,
        level: float | None = None,
        revision: str | None = None,
        batch_size: int | str = 16,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        dtype: str = "auto",
        device: str = "auto",
        max_batch_size: int | None = None,
        **parameters: Any,
    ) -> None:
        if not str(batch_size).isdigit():
            raise AtlasError(f"batch_size: expected a number, found {batch_size!r}")
        local = Path(pretrained).is_dir()
        source = (
            {"path": pretrained} if local else {"hub": pretrained, "revision": revision or "main"}
        )
        checkpoint, _ = resolve(source)
        model = load(checkpoint, dtype=dtype, device="auto" if device == "cuda:0" else device)
        super().__init__(
            model,
            load_tokenizer(checkpoint, add_bos_token=add_bos_token),
            batch_size=int(batch_size),
            max_length=max_length,
            prompts=PromptSettings(add_bos_token=add_bos_token),
        )
        self._ffns = find_ffns(model)
        self._node = {"criterion": criterion, "site": site, "level": level, **parameters}
        self._usages: list[Usage] = []
        self._rule = None
        if criterion is not None:
            kind = "file" if criterion.endswith(".py") else "rule"
            self._rule = create({kind: criterion, **parameters})
            if site is None or level is None:
                raise AtlasError(f"criterion={criterion}: site and level are missing")
            check_sites(pretrained, [site], list(self._ffns[0].sites()))
            check_level(self._rule, str(level))

    def _attached(self) -> contextlib.AbstractContextManager[Counter]:
        if self._rule is None:
            return counted(self.model, self._ffns)
        site, level = self._node["site"], float(self._node["level"])
        return sparsified(self.model, self._ffns, site, self._rule, level)

    def _run(self, kind: str, requests: list[Instance], answer: Callable) -> Any:
        work = self.work({kind: requests}, {kind: self.encode(kind, requests)})
        with self._attached() as counter:
            self.start(_Memory(), counter, work)
            answers = answer(requests)
        self._usages.append(self.usage)
        return answers

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """See `AtlasLM.loglikelihood`."""
        return self._run("loglikelihood", requests, super().loglikelihood)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """See `AtlasLM.loglikelihood_rolling`."""
        return self._run("loglikelihood_rolling", requests, super().loglikelihood_rolling)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """See `AtlasLM.generate_until`."""
        return self._run("generate_until", requests, super().generate_until)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes of the model beside its results: the node, and its induced sparsity."""
        slots = slots_of(self._ffns, self._node["site"] if self._rule else None)
        return {
            **super().get_model_info(),
            **self._node,
            "sparsity": sparsity(self._usages, slots) if self._usages else None,
        }


def main() -> None:
    """lm-eval's command line."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
