"""lm-eval's own command with the model `sparsity-atlas`: a Hugging Face model, sparsified or dense.

    sparsity-atlas harness run --model sparsity-atlas --tasks arc_easy \\
        --model_args pretrained=models/my-model,criterion=topp,site=intermediate,level=0.9

Importing this module registers the model, so that `lm_eval.simple_evaluate` knows it too. For a study
use the workflow: it resumes, keeps every sample and computes no node twice.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from sparsity_atlas.code_version import code_version
from sparsity_atlas.criteria import check_level, create, source_file
from sparsity_atlas.criteria.calibration_file import Calibration, check_disjoint, read_calibration
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.evaluation.harness_arguments import Arguments, parse
from sparsity_atlas.evaluation.outcome import sparsity
from sparsity_atlas.lm.by_kind import language_model
from sparsity_atlas.lm.prompts import PromptLM, PromptSettings
from sparsity_atlas.lm.usage import Usage
from sparsity_atlas.loading.layouts import layout_in
from sparsity_atlas.loading.pretrained import load, load_tokenizer
from sparsity_atlas.loading.source import resolve
from sparsity_atlas.models import working_sizes
from sparsity_atlas.models.causality import describe_kind, kind_of
from sparsity_atlas.models.memory import Sizes
from sparsity_atlas.models.positions import check_positions
from sparsity_atlas.models.tokenizer_check import check_tokenizer, embedding_rows
from sparsity_atlas.sites.available import Available
from sparsity_atlas.sites.experts.mixture import met
from sparsity_atlas.sites.find import find_parts
from sparsity_atlas.sites.part import chosen, measure
from sparsity_atlas.sparsify.attach import counted, sparsified
from sparsity_atlas.sparsify.counted_vectors import slots_of
from sparsity_atlas.terms import CAUSAL, plain

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedModel

    from sparsity_atlas.criteria import Criterion
    from sparsity_atlas.loading.checkpoint import Checkpoint
    from sparsity_atlas.sparsify.attach import Counter


class _Memory:
    """A journal that lasts as long as this process."""

    def __init__(self) -> None:
        self.records: list[Any] = []

    def append(self, record: Any) -> None:
        self.records.append(record)


@register_model("sparsity-atlas")
class HarnessLM(PromptLM):
    """A model of either kind as lm-eval makes one from `--model_args`.

    It makes prompts, as lm-eval asks for them, and has the class for its kind answer.
    """

    def __init__(self, **given: Any) -> None:
        """Load the model, and make its criterion.

        Args:
            given: see `harness_arguments.Arguments`; beside a criterion also its parameters.

        Raises:
            AtlasError: an argument is unknown, incomplete or not supported, or the model cannot be used.
        """
        arguments, parameters = parse(given, HFLM)
        self._rule, spec = None, {}
        if arguments.criterion is not None:
            kind = "file" if arguments.criterion.endswith(".py") else "rule"
            spec = {kind: arguments.criterion, **parameters}
            self._rule = _rule(arguments, spec)
        source = _source(arguments)
        checkpoint, commit = resolve(source)
        self._calibration = _calibration(arguments, spec, checkpoint)
        model = load(
            checkpoint,
            dtype=arguments.dtype,
            device=arguments.device,
            device_map=arguments.device_map,
        )
        files = _tokenizer_files(arguments) or checkpoint
        tokenizer = load_tokenizer(files, add_bos_token=arguments.add_bos_token)
        rows = embedding_rows(model)
        check_tokenizer(tokenizer, files.words, rows)
        _check_prefix(arguments.prefix_token_id, rows)
        options: dict[str, Any] = {
            "batch_size": arguments.batch_size,
            "max_length": arguments.max_length,
            "prompts": PromptSettings.of(arguments.prompts()),
        }
        super().__init__(model, tokenizer, **options)
        check_positions(model, self.max_length, "max_length")
        about = _kind(arguments, checkpoint, model)
        diffusion = None if about["kind"] == CAUSAL else arguments.diffusion()
        self._lm = language_model(about, model, tokenizer, diffusion=diffusion, **options)
        for lm in (self, self._lm):
            lm.custom_prefix_token_id = arguments.prefix_token_id
        self._parts = find_parts(model, arguments.modules)
        self._lm.sizes = Sizes(
            parameters=sum(one.numel() for one in model.parameters()),
            **measure(self._parts),
            **working_sizes.describe(model),
            routed=met(self._parts),
        )
        if arguments.site is not None:
            Available.in_parts(self._parts).check(arguments.pretrained, arguments.site)
        level = None if arguments.level is None else float(arguments.level)
        self._node = {
            **{"criterion": arguments.criterion, "site": arguments.site, "level": level},
            **({"calibration": self._calibration.digest} if self._calibration else {}),
            **parameters,
            **({} if diffusion is None else {"diffusion": diffusion}),
            **{"model_revision": source.get("revision"), "model_sha": commit},
        }
        self._usages: list[Usage] = []
        self._thinks = bool(arguments.enable_thinking)

    def set_cache_hook(self, cache_hook: object) -> None:
        """Refuse lm-eval's cache of answers, whose keys do not know the model or its level.

        Raises:
            AtlasError: always.
        """
        raise AtlasError(
            "use_cache: an answer from lm-eval's cache may be another level's, and is not counted; "
            "leave it out, or use the workflow, which runs nothing twice"
        )

    def _attached(self) -> contextlib.AbstractContextManager[Counter]:
        if self._rule is None:
            return counted(self.model, self._parts)
        site, level = self._node["site"], self._node["level"]
        states = self._calibration.states if self._calibration else None
        parts, plain_site = chosen(self._parts, site)
        # lm-eval's results have no place for what masks do from step to step.
        return sparsified(self.model, parts, plain_site, self._rule, level, states, by_step=False)

    def _run(self, kind: str, requests: list[Instance]) -> list[Any]:
        if self._calibration is not None:
            documents: dict[str, list[dict[str, Any]]] = {}
            for request in requests:
                documents.setdefault(request.task_name, []).append(request.doc)
            for task, own in documents.items():
                check_disjoint(self._calibration, task, own)
        # As `evaluate` does: such a rule's mask depends on which tokens are run together.
        share = self._rule is None or not self._rule.sees_sequences
        lm = self._lm
        encodings = {kind: lm.encode(kind, requests)}
        work = lm.work({kind: requests}, lambda: encodings, share=share)
        with self._attached() as counter:
            lm.start(_Memory(), counter, work)
            answers: list[Any] = getattr(lm, kind)(requests)
        self._usages.append(lm.usage)
        return answers

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """See `HFLM.loglikelihood`.

        Raises:
            AtlasError: a chain of thought is asked for, which an answer option cannot follow.
        """
        if self._thinks:
            raise AtlasError(
                f"model_args: enable_thinking: '{requests[0].task_name}' scores given answers, "
                "which no chain of thought precedes; leave it out, as lm-eval demands, too"
            )
        return self._run("loglikelihood", requests)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """See `HFLM.loglikelihood_rolling`."""
        return self._run("loglikelihood_rolling", requests)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """See `HFLM.generate_until`."""
        return self._run("generate_until", requests)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes of the model beside its results: the node, and its induced sparsity."""
        site = self._node["site"] if self._rule else None
        parts, site = chosen(self._parts, site) if site else (self._parts, None)
        slots = slots_of(parts, site, self._rule)
        return {
            **super().get_model_info(),
            **self._node,
            "sparsity": sparsity(self._usages, slots) if self._usages else None,
        }


def _kind(arguments: Arguments, checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, Any]:
    """What a manifest would say of a model's kind.

    Raises:
        AtlasError: it is neither kind, or there are arguments of the other kind.
    """
    kind = kind_of(model, arguments.mask_token_id)
    if kind == CAUSAL and (said := arguments.of_diffusion()):
        raise AtlasError(
            f"model_args: {said[0]}: it is for masked-diffusion models, and {arguments.pretrained} is "
            "causal; leave it out"
        )
    shifted = arguments.shifted_logits
    if shifted is None:
        layout = layout_in(checkpoint.folder)
        shifted = layout is not None and layout.shifted
    return describe_kind(model, kind, arguments.mask_token_id, shifted)


def _source(arguments: Arguments) -> dict[str, Any]:
    """Where the model comes from, as `source.resolve` takes it."""
    given = arguments.model_dump(
        include={"trust_remote_code", "allow_pickle", "code_revision", "dequantise"},
        exclude_none=True,
    )
    folder = os.path.expanduser(arguments.pretrained)
    if arguments.gguf_file is not None:
        given["gguf"] = arguments.gguf_file
    if arguments.peft is not None:
        adapter = os.path.expanduser(arguments.peft)
        given["adapter" if os.path.isdir(adapter) else "adapter_hub"] = adapter
    if not os.path.isdir(folder):
        return {"hub": folder, "revision": arguments.revision or "main", **given}
    if arguments.revision is not None:
        raise AtlasError(f"model_args: revision: {folder} is a local folder, which has none")
    return {"path": folder, **given}


def _tokenizer_files(arguments: Arguments) -> Checkpoint | None:
    """The files of a tokenizer that is not the model's own."""
    if arguments.tokenizer is None:
        return None
    folder = os.path.expanduser(arguments.tokenizer)
    source = {"path": folder} if os.path.isdir(folder) else {"hub": folder}
    allowed = {"trust_remote_code": arguments.trust_remote_code}
    return resolve({**source, **allowed}, weights=False)[0]


def _rule(arguments: Arguments, spec: dict[str, Any]) -> Criterion:
    """The criterion, checked to be defined at its site and level, and to have its calibration.

    Raises:
        AtlasError: it is not.
    """
    rule = create(spec)
    assert arguments.level is not None, "`Arguments` wants one beside a criterion"
    check_level(rule, arguments.level)
    name, site = arguments.criterion, arguments.site
    if rule.sites and site is not None and plain(site) not in rule.sites:
        raise AtlasError(
            f"model_args: site: '{name}' is not defined at '{plain(site)}'; its sites are "
            f"{', '.join(rule.sites)}"
        )
    if rule.calibrated and arguments.calibration is None:
        path = f"results/<model>/{name}/{site}/calibration.safetensors"
        raise AtlasError(
            f"model_args: criterion={name} needs a calibration; say calibration={path}, which "
            f"`snakemake --cores all {path}` makes"
        )
    if not rule.calibrated and arguments.calibration is not None:
        raise AtlasError(f"model_args: calibration: criterion={name} has none")
    return rule


def _calibration(
    arguments: Arguments, spec: dict[str, Any], checkpoint: Checkpoint
) -> Calibration | None:
    """The criterion's calibration, checked to be of this model, site, criterion and code.

    Raises:
        AtlasError: it cannot be read, or is another one.
    """
    if arguments.calibration is None:
        return None
    path = Path(arguments.calibration).expanduser()
    calibration = read_calibration(path)
    wanted = {
        "criterion": {key: value for key, value in spec.items() if key != "file"},
        "site": arguments.site,
        "model": checkpoint.digest(),
        "code": code_version("calibrate", str(source_file(spec))),
    }
    for key, value in wanted.items():
        found = calibration.about[key]
        if found != value:
            shown = "another one" if key in ("model", "code") else f"{found}, not {value}"
            raise AtlasError(
                f"model_args: calibration: {path}: its {key} is {shown}; make it again for this run"
            )
    return calibration


def _check_prefix(token: int | None, rows: int | None) -> None:
    """Refuse a token before requests that the model's embedding does not have."""
    if token is not None and (token < 0 or (rows is not None and token >= rows)):
        most = "" if rows is None else f" to {rows - 1}"
        raise AtlasError(f"model_args: prefix_token_id: expected 0{most}, found {token}")


def main() -> None:
    """lm-eval's command line."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
