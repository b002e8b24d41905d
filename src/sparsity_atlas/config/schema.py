"""The configuration: its only schema, its defaults and its cross-checks.

Catalogues (`models`, `criteria`, `texts`, `tasks`) are mappings and say what exists; the selection
(`run`) is a list of blocks and says what is done. Snakemake merges the mappings of a second
`--configfile` and replaces lists, so a selection never leaks from one run into another.
"""

from __future__ import annotations

from datetime import date
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    ValidationError,
    model_validator,
)

from sparsity_atlas.config.findings import explain
from sparsity_atlas.config.inserted_text import InsertedText, resolved
from sparsity_atlas.config.model_entry import ModelEntry
from sparsity_atlas.config.revisions import expanded, replaced, revision_names
from sparsity_atlas.config.run_block import RunBlock
from sparsity_atlas.config.search_settings import SearchSettings
from sparsity_atlas.config.strict import Strict, some
from sparsity_atlas.config.study_settings import StudySettings
from sparsity_atlas.credentials import places
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.spelling import Name, Repository, Revision, check_name


class CriterionEntry(BaseModel):
    """A criterion: a built-in rule (by default the one of the same name) or a user's own file.

    Any further key is a parameter of the rule, for instance `power` of `topp`.
    """

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    rule: str | None = None
    """Built-in rule: topp, topk or maxp."""
    file: str | None = None
    """Python file with a class that derives from `sparsity_atlas.criteria.Criterion`."""

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if self.rule is not None and self.file is not None:
            raise ValueError("give either `rule` (built in) or `file` (your own), not both")
        return self


class TextEntry(Strict):
    """Running text: a local file or a Hub data set."""

    file: str | None = None
    """Local file: .txt (one document, blank lines or not), or a table with a document a row: .jsonl or
    .ndjson, .json, .csv, .tsv, .parquet, .arrow. Each may be compressed: .gz, .bz2, .xz, .zst."""
    hub: Repository | None = None
    """Hub data set, for instance Salesforce/wikitext."""
    subset: str | None = None
    """Configuration of the Hub data set."""
    revision: Revision | None = None
    """Hub revision: commit, tag or branch. It is resolved to a commit, which is recorded."""
    split: str = "train"
    """Split of the Hub data set."""
    column: str = "text"
    """Field with the text, in tables and in Hub data sets."""
    documents: list[NonNegativeInt] | None = Field(default=None, min_length=2, max_length=2)
    """First document and the one after the last, counted from 0. Unset: all of them."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.file is None) == (self.hub is None):
            raise ValueError("give either `file` (local) or `hub` (a Hub data set)")
        if self.documents is not None and self.documents[0] >= self.documents[1]:
            raise ValueError("documents: the first must lie before the second, as in [45, 69]")
        return self


class TaskEntry(Strict):
    """An lm-eval task or group."""

    task: str | None = None
    """Name in lm-eval. Unset: the key of this entry."""
    include: str | None = None
    """Folder with the YAML of tasks that are not part of lm-eval; it is searched first."""
    metric: str | None = None
    """Metric of the curves, `name` or `name,filter`. Unset: acc, else exact_match, em, f1 or pass@1, else
    the loss."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Solved examples in the prompt. Unset: as the task says."""
    limit: int | None = Field(default=None, gt=0)
    """First so many documents only."""
    max_gen_toks: int | None = Field(default=None, gt=0)
    """Tokens that an answer of a task that generates may have; those that are cut there are counted. A
    model's `gen_kwargs` outweigh it. Unset: as the task says, else 256."""
    cluster: str | None = None
    """Document field that names items made alike (a template); the bootstrap resamples these."""
    allow_code: bool = False
    """Let the task run code that the model writes (HumanEval, MBPP), with all that you may do on this
    machine; best in a container."""
    inserted: InsertedText | None = None
    """A text put before the prompts of another entry: `{before: cloze, text: "/ ", times: 40}`."""
    override: dict[str, Any] = Field(default_factory=dict)
    """Keys of the task's own YAML to replace, for instance `dataset_path` and `dataset_kwargs`."""


class CaptureSettings(Strict):
    """How activations are captured."""

    text: str = "prose"
    """Entry of `texts` that is run through the models."""
    tokens: int = Field(default=4096, gt=0)
    """Tokens captured; effective rank and all metrics are taken at exactly this number."""
    sequence_length: int = Field(default=256, gt=1)
    """Tokens a sequence."""


class CalibrationSettings(Strict):
    """What calibrated criteria may look at: the beginning of the captured text."""

    tokens: int = Field(gt=0)
    """Captured tokens, the first ones, that thresholds are found on; output errors are measured on the
    others. No task may evaluate this text."""


class Config(Strict):
    """The whole configuration of a run."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where models run. `auto`: CUDA, else Apple's MPS, else the CPU."""
    chat_date: date = date(2024, 7, 26)
    """The day that chat templates print which ask for it, so that prompts stay the same; by default the one
    that Llama's print where they have no clock."""
    seed: int = Field(default=1234, ge=0)
    """Seed of few-shot draws and of what tasks draw while they are loaded (1234: as lm-eval does by
    itself), and of the bootstrap."""
    replicates: int = Field(default=10_000, ge=100)
    """Bootstrap replicates. Another seed moves an interval's end by 1 to 2 % of its distance from the value
    (1,000: 4 to 6 %); ends are rounded to the digits that this leaves."""
    bars: Annotated[list[float], AfterValidator(some)] = Field(default=[0.995, 0.99, 0.98, 0.95])
    """Retained accuracy at which critical sparsity is read; 0.99 is the headline. A loss task's bar is
    the matching rise in perplexity: 0.99 stands for PPL + 1 %."""
    keep_texts: bool = False
    """Keep each request's prompt, continuation, generated text and answer beside the samples of each node, in
    `texts.parquet`, which nobody but you may read. Nodes that have none are run again for them."""
    capture: CaptureSettings = CaptureSettings()
    calibration: CalibrationSettings | None = None
    """Needed by criteria that are calibrated."""
    search: SearchSettings = SearchSettings()
    studies: StudySettings = StudySettings()
    models: dict[Name, ModelEntry]
    criteria: dict[Name, CriterionEntry]
    texts: dict[Name, TextEntry]
    tasks: dict[Name, TaskEntry]
    run: Annotated[list[RunBlock], AfterValidator(some)]
    compare: list[Annotated[list[str], Field(min_length=2, max_length=2)]] = Field(
        default_factory=list
    )
    """Pairs of models that are set side by side wherever the run has curves of both at one criterion and
    site, for instance `[[base, instruct]]`: what the second one loses more than the first."""

    @property
    def every_bar(self) -> list[float]:
        """The bars, and those that levels are searched for beside them."""
        return list(dict.fromkeys([*self.bars, *self.search.further]))

    @model_validator(mode="before")
    @classmethod
    def _empty_entries(cls, data: Any) -> Any:
        """`topk:` with nothing after it is an entry with every default."""
        if isinstance(data, dict):
            for key in ("models", "criteria", "texts", "tasks"):
                if isinstance(data.get(key), dict):
                    data = {**data, key: {k: {} if v is None else v for k, v in data[key].items()}}
            if isinstance(data.get("tasks"), dict):
                data = {**data, "tasks": resolved(data["tasks"])}
        return data

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        for key in ("models", "criteria", "texts", "tasks"):
            known: dict[str, str] = {}
            for name in getattr(self, key):
                other = known.setdefault(name.lower(), name)
                if other != name:
                    raise ValueError(
                        f"{key}: '{other}' and '{name}' differ by capitals alone, which some file "
                        "systems do not tell apart"
                    )
        return self

    @model_validator(mode="after")
    def _revisions_have_names(self) -> Self:
        known = {name.lower(): f"models.{name}" for name in self.models}
        for name, models in revision_names(self.models).items():
            for model in models:
                key = f"models.{name}.revisions.{model.removeprefix(name + '-')}"
                try:
                    check_name(model)
                except ValueError as error:
                    raise ValueError(f"{key}: '{model}': {error}") from None
                if (other := known.setdefault(model.lower(), key)) != key:
                    raise ValueError(f"{key}: '{model}' is the name of {other}, too")
        return self

    @model_validator(mode="after")
    def _selections_exist(self) -> Self:
        if any(not 0 < bar < 1 for bar in self.bars) or 0.99 not in self.bars:
            raise ValueError("bars: values between 0 and 1, 0.99 (the headline) among them")
        if self.capture.text not in self.texts:
            raise ValueError(_unknown("capture.text", self.capture.text, self.texts))
        if self.calibration is not None:
            self._check_calibration(self.calibration)
        self._check_pairs()
        self._check_truthfulness()
        for number, block in enumerate(self.run):
            for key in ("models", "criteria", "tasks"):
                catalogue = dict(getattr(self, key))
                if key == "models":
                    catalogue |= dict.fromkeys(replaced(catalogue, revision_names(self.models)))
                for name in getattr(block, key) or ():
                    if name not in catalogue:
                        raise ValueError(_unknown(f"run.{number}.{key}", name, catalogue))
        return self

    def _check_pairs(self) -> None:
        known: set[frozenset[str]] = set()
        models = dict.fromkeys(replaced(self.models, revision_names(self.models)))
        for number, pair in enumerate(self.compare):
            for name in pair:
                if name not in models:
                    raise ValueError(_unknown(f"compare.{number}", name, models))
            if frozenset(pair) in known or pair[0] == pair[1]:
                why = "a model with itself" if pair[0] == pair[1] else "there twice"
                raise ValueError(f"compare.{number}: [{', '.join(pair)}]: {why}")
            known.add(frozenset(pair))

    def _check_truthfulness(self) -> None:
        asked = self.studies.truthfulness
        if asked is None:
            return
        key = "studies.truthfulness"
        for name in asked.models or ():
            if name not in self.models:
                raise ValueError(_unknown(f"{key}.models", name, self.models))
        for name in asked.tasks:
            if name not in self.tasks:
                raise ValueError(_unknown(f"{key}.tasks", name, self.tasks))
            blocks = [one for one in self.run if name in (one.tasks or self.tasks)]
            if not {one for block in blocks for one in block.models} & set(
                asked.models or self.models
            ):
                raise ValueError(f"{key}.tasks: no run block asks '{name}' of these models")
        for node in asked.nodes:
            criterion = node.split("/")[0]
            if criterion not in self.criteria:
                raise ValueError(_unknown(f"{key}.nodes: {node}", criterion, self.criteria))

    def _check_calibration(self, calibration: CalibrationSettings) -> None:
        length = self.capture.sequence_length
        if calibration.tokens % length:
            raise ValueError(
                f"calibration.tokens: {calibration.tokens} is no multiple of "
                f"capture.sequence_length ({length})"
            )
        if calibration.tokens >= self.capture.tokens:
            raise ValueError(
                f"calibration.tokens: {calibration.tokens} of capture.tokens "
                f"({self.capture.tokens}) leave none to measure output errors on"
            )


def _unknown(key: str, name: str, catalogue: dict[str, Any]) -> str:
    near = get_close_matches(name, catalogue, 1, cutoff=0.7)
    meant = f" (did you mean '{near[0]}'?)" if near else ""
    return f"{key}: unknown '{name}'{meant}; known: {', '.join(catalogue) or 'none'}"


def _with_revisions(config: Config) -> Config:
    """The configuration with a model for each revision, and all of them where their entry is chosen."""
    becomes = revision_names(config.models)
    content = config.model_dump(exclude_unset=True)
    for block, own in zip(config.run, content["run"], strict=True):
        own["models"] = replaced(block.models, becomes)
    studied = config.studies.truthfulness
    if studied is not None and studied.models is not None:
        content["studies"]["truthfulness"]["models"] = replaced(studied.models, becomes)
    return Config.model_validate({**content, "models": expanded(config.models)})


def parse(data: dict[str, Any]) -> Config:
    """Validate a merged configuration.

    Keys at the top that begin with `x-` are the user's own, for YAML anchors.

    Raises:
        AtlasError: one line that names the key, what was found and what would be right.
    """
    data = {key: value for key, value in data.items() if not str(key).startswith("x-")}
    for place in places(data):
        raise AtlasError(
            f"config: {place}: holds a password or token, which would be written to results/; "
            "set HF_TOKEN in the environment, or `hf auth login`"
        )
    try:
        config = Config.model_validate(data)
        return _with_revisions(config) if revision_names(config.models) else config
    except ValidationError as error:
        found = "; ".join(explain(item, Config) for item in error.errors())
        raise AtlasError(f"config: {found}") from None
