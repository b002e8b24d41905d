"""Bad configurations end in one clause that names the key and what would be right."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sparsity_atlas.config import grid, record
from sparsity_atlas.config.schema import parse
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.rules.inputs import check_inputs, locate
from sparsity_atlas.spelling import canonical_level

BASE: dict[str, Any] = {
    "models": {"small": {"path": "models/small"}, "large": {"path": "models/large"}},
    "criteria": {"topp": {"power": 1}, "topk": None},
    "texts": {"prose": {"file": "prose.jsonl"}},
    "tasks": {"pairs": {}, "pages": {"metric": "loss"}},
    "run": [{"models": ["small"], "levels": [0.9, "0.5"]}],
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """BASE with the key at a dotted path set to a value."""
    data = copy.deepcopy(BASE)
    *parents, last = path.split(".")
    place: Any = data
    for key in parents:
        key = int(key) if isinstance(place, list) else key
        if isinstance(place, dict) and place.get(key) is None:
            place[key] = {}
        place = place[key]
    place[int(last) if isinstance(place, list) else last] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("sede", 3, r"sede: unknown key \(did you mean 'seed'\?\)"),
        ("models.small.pth", "x", r"models.small.pth: unknown key \(did you mean 'path'\?\)"),
        ("run.0.level", [1], r"run.0.level: unknown key \(did you mean 'levels'\?\)"),
        (
            "run.0.speed",
            {"device": "cpu", "tokns": [1]},
            r"run.0.speed.tokns: unknown key \(did you mean 'tokens'\?\)",
        ),
        ("search.levels", 3, "search.levels: unknown key"),
        ("search.ppl", [1, 0], "search.ppl.1: .*greater than 0, found 0"),
        ("search.ppl", [100], "search.ppl.0: .*less than 100, found 100"),
        ("search.ppl", [5, 5], "search.ppl: "),
        ("models.small.hub", "a/b", "models.small: give either `path` .* or `hub` "),
        ("models.small.path", None, "models.small: give either `path` "),
        ("models.small.revision", "main", "models.small: `revision` belongs to `hub`"),
        ("models.small.batch_size", 0, "models.small.batch_size: .*greater than 0, found 0"),
        (
            "models.small.dtype",
            "int8",
            "models.small.dtype: input should be 'auto', .*found 'int8'",
        ),
        (
            "models.small.sites",
            ["inputs"],
            "models.small.sites.0: .*'all_linear_inputs', found 'inputs'",
        ),
        ("models.dense", {"path": "x"}, "models.dense: 'dense' is the name of a folder"),
        ("models.a/b", {"path": "x"}, "models.a/b: names are letters, digits"),
        (
            "models.small.chat_template_args",
            {"enable_thinking": False},
            "models.small: `chat_template_args` needs `apply_chat_template: true`",
        ),
        (
            "models.small.gen_kwargs",
            {"max_new_tokens": 9},
            "models.small: gen_kwargs: max_new_tokens: say max_gen_toks",
        ),
        (
            "models.small.gen_kwargs",
            {"temperature": 0.6},
            "models.small: gen_kwargs: temperature without do_sample",
        ),
        ("models.small.system_instruction", "", "models.small.system_instruction: .*1 character"),
        ("chat_date", "tomorrow", "chat_date: .*found 'tomorrow'"),
        ("criteria.topp.file", "x.py", None),
        ("criteria.mine", {"rule": "topp", "file": "x.py"}, "criteria.mine: give either `rule`"),
        ("texts.prose.hub", "a/b", "texts.prose: give either `file`"),
        ("tasks.pairs.limit", 0, "tasks.pairs.limit: .*greater than 0, found 0"),
        ("tasks.pairs.limit", True, "tasks.pairs.limit: a number is wanted, found True"),
        ("seed", True, "seed: a number is wanted, found True"),
        ("bars", [0.9, True], "bars: a number is wanted"),
        (
            "models.small.max_length",
            False,
            "models.small.max_length: a number is wanted, found Fal",
        ),
        ("capture", [], "capture: a mapping is wanted$"),
        ("tasks.pairs", "acc", "tasks.pairs: a mapping is wanted, found 'acc'"),
        ("run", [], "run: the list is empty"),
        ("run.0.models", ["tiny"], r"run.0.models: unknown 'tiny'; known: small, large$"),
        ("run.0.models", [], "run.0.models: the list is empty"),
        ("run.0.models", ["small", "small"], "run.0.models: given twice: small"),
        (
            "run.0.criteria",
            ["topq"],
            r"run.0.criteria: unknown 'topq' \(did you mean 'topp'\?\); known",
        ),
        ("run.0.tasks", ["blimp"], "run.0.tasks: unknown 'blimp'; known: pairs, pages"),
        ("run.0.sites", ["down"], "run.0.sites.0: input should be 'input', .*found 'down'"),
        ("run.0.sites", [], "run.0.sites: the list is empty"),
        ("run.0.parts", ["attention"], "run.0.parts.0: .*'experts', found 'attention'"),
        ("run.0.parts", [], "run.0.parts: the list is empty"),
        ("run.0.parts", ["ffn", "ffn"], "run.0.parts: given twice: ffn"),
        ("run.0.levels", [], "run.0.levels: the list is empty"),
        ("run.0.levels", [0.9, "0.90"], "run.0.levels: given twice: 0.9"),
        ("run.0.levels", [1, 1.0], "run.0.levels: given twice: 1"),
        ("run.0.levels", "atuo", "run.0.levels: 'auto' or a list of levels .*found 'atuo'"),
        ("run.0.levels", 0.9, "run.0.levels: 'auto' or a list of levels .*found 0.9"),
        ("run.0.levels", ["half"], "run.0.levels.0: a level is a number.*found 'half'"),
        ("run.0.levels", [True], "run.0.levels.0: a level is a number.*found True"),
        ("run.0.levels", [float("nan")], "run.0.levels.0: a level is a finite number, found nan"),
        ("capture.text", "verse", "capture.text: unknown 'verse'; known: prose"),
        ("capture.tokens", 0, "capture.tokens: .*greater than 0, found 0"),
        ("bars", [0.95], "bars: values between 0 and 1, 0.99"),
        ("bars", [0.99, 1.0], "bars: values between 0 and 1, 0.99"),
        ("models", {}, "run.0.models: unknown 'small'; known: none"),
        ("device", "gpu", "device: input should be 'auto', .*found 'gpu'"),
        (
            "compare",
            [["small", "lrage"]],
            r"compare.0: unknown 'lrage' \(did you mean 'large'\?\); known: small, large$",
        ),
        ("compare", [["small", "small"]], r"compare.0: \[small, small\]: a model with itself"),
        (
            "compare",
            [["small", "large"], ["large", "small"]],
            r"compare.1: \[large, small\]: there twice",
        ),
        ("compare", [["small"]], "compare.0: .*at least 2"),
        ("compare", [["small", "large", "small"]], "compare.0: .*at most 2"),
    ],
)
def test_one_mistake_is_one_clause(path: str, value: Any, message: str | None) -> None:
    if message is None:  # a parameter of the criterion
        parse(changed(path, value))
        return
    with pytest.raises(AtlasError, match=f"^config: {message}") as caught:
        parse(changed(path, value))
    text = str(caught.value).removeprefix("config: ")
    assert len([clause for clause in text.split("; ") if not clause.startswith("known:")]) == 1
    assert "\n" not in text


@pytest.mark.parametrize("name", ["a..b", ".a", "", "a b", "ä", "-a", "logs"])
def test_names_that_make_no_folder(name: str) -> None:
    data = {**BASE, "tasks": {**BASE["tasks"], name: {}}}
    with pytest.raises(AtlasError, match="config: tasks"):
        parse(data)


@pytest.mark.parametrize("key", ["models", "criteria", "texts", "tasks", "run"])
def test_missing_keys(key: str) -> None:
    data = {name: value for name, value in BASE.items() if name != key}
    with pytest.raises(AtlasError, match=f"config: {key}: missing"):
        parse(data)


def test_two_mistakes_are_both_told() -> None:
    data = changed("models.small.batch_size", 0)
    data["seed"] = -1
    with pytest.raises(AtlasError, match=r"config: seed: .*; models\.small\.batch_size: "):
        parse(data)


@pytest.mark.parametrize(
    ("value", "spelled"),
    [
        *((0.90, "0.9"), (1.0, "1"), (1, "1"), ("1.00", "1"), (1e-3, "0.001"), ("0.5", "0.5")),
        *(
            ("5e-1", "0.5"),
            (0.1, "0.1"),
            (-0.0, "0"),
            ("0.000", "0"),
            (100, "100"),
            ("-2.50", "-2.5"),
        ),
        *((1e-7, "0.0000001"), (0.1 + 0.2, "0.30000000000000004")),
    ],
)
def test_canonical_levels(value: Any, spelled: str) -> None:
    assert canonical_level(value) == spelled


@given(st.floats(allow_nan=False, allow_infinity=False, width=32))
def test_canonical_levels_keep_the_number(number: float) -> None:
    spelled = canonical_level(number)
    assert float(spelled) == number
    assert canonical_level(spelled) == spelled
    assert "e" not in spelled


@pytest.mark.parametrize("value", [True, None, [], "0,9", "inf", float("nan"), ""])
def test_no_levels(value: Any) -> None:
    with pytest.raises(ValueError, match="a level is a"):
        canonical_level(value)


def test_levels_out_of_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prose.jsonl").write_text("{}")
    check_inputs(parse(BASE))
    for level in (1.01, -0.5):
        with pytest.raises(
            AtlasError, match=rf"run: levels: {level} is out of range for 'topp' \(0 to 1\)"
        ):
            check_inputs(parse(changed("run.0.levels", [level])))
    with pytest.raises(AtlasError, match=r"run: sensitivity: 2 is out of range for 'topp'"):
        check_inputs(parse(changed("run.0.sensitivity", [0.5, 2])))


def test_masks_of_prompts_need_a_criterion_that_keeps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prose.jsonl").write_text("{}")
    asked = {**BASE, "studies": {"prompt_reuse": ["given"]}}
    with pytest.raises(AtlasError, match=r"^studies: prompt_reuse: no criterion of the run takes"):
        check_inputs(parse(asked))
    keeps = {**BASE["criteria"], "mine": {"rule": "prompt_mask", "prompt_share": 0.3}}
    block = {**BASE["run"][0], "criteria": ["mine"], "sites": ["gate"]}
    check_inputs(parse({**asked, "criteria": keeps, "run": [block]}))


def test_files_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AtlasError, match=r"texts\.prose: file: prose\.jsonl: no such file"):
        check_inputs(parse(BASE))
    with pytest.raises(AtlasError, match=r"tasks\.pairs: include: there: no such folder"):
        check_inputs(parse(changed("tasks.pairs.include", "there")))
    data = changed("criteria.mine", {"file": "mine.py"})
    data["run"][0]["criteria"] = ["mine"]
    with pytest.raises(AtlasError, match=r"criteria: mine\.py: no such file"):
        check_inputs(parse(data))
    data["criteria"]["mine"] = {"rule": "best"}
    with pytest.raises(
        AtlasError, match=r"criteria: unknown rule 'best'; built in: .*maxp, .*topk, topp"
    ):
        check_inputs(parse(data))


def test_paths_beside_the_workflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workflow, here = tmp_path / "workflow", tmp_path / "here"
    (workflow / "models" / "small").mkdir(parents=True)
    (here / "models" / "large").mkdir(parents=True)
    monkeypatch.chdir(here)
    found = locate(BASE, workflow)["models"]
    assert found["small"]["path"] == "../workflow/models/small"
    assert found["large"]["path"] == "models/large"


# What a job depends on


def test_blocks_that_overlap_are_one_curve() -> None:
    data = copy.deepcopy(BASE)
    data["run"] = [
        {"models": ["small"], "sites": ["up"], "levels": [0.5, 0.9], "tasks": ["pages"]},
        {"models": ["small", "large"], "sites": ["up"], "levels": [0.9, 1], "tasks": ["pairs"]},
        {"models": ["small"], "sites": ["up"], "levels": "auto"},
        {"models": ["small"], "sites": ["up"], "levels": [1], "sensitivity": [0.5, 0.9]},
        {"models": ["small"], "sites": ["up"], "sensitivity": [0.90, 0.7]},
    ]
    first, second = grid.curves(parse(data))
    assert (first.sensitivity, second.sensitivity) == (("0.9", "0.7", "0.5"), ())
    assert (first.model, first.levels, first.auto) == ("small", ("1", "0.9", "0.5"), True)
    assert first.tasks == ("pairs", "pages")
    assert (second.model, second.levels, second.auto) == ("large", ("1", "0.9"), False)


def test_parts_of_a_layer_are_another_curve() -> None:
    data = copy.deepcopy(BASE)
    data["run"] = [
        {"models": ["small"], "sites": ["up"], "levels": [0.5], "parts": parts}
        for parts in (None, ["experts"], ["experts", "shared"], ["experts", "shared", "ffn"])
    ]
    config = parse(data)
    sites = ("up", "up@experts", "up@shared+experts")
    assert tuple(curve.site for curve in grid.curves(config)) == sites
    assert grid.model_sites(config, "small") == sites
    assert grid.stored_sites(config, "small") == ("up",)


def test_some_layers_are_another_curve() -> None:
    data = copy.deepcopy(BASE)
    block = {"models": ["small"], "sites": ["up", "o_input"], "levels": [0.5]}
    data["run"] = [
        {**block, "layers": [3, 0, 1]},
        {**block, "layers": [[0], [3, 2]], "sites": ["up"], "parts": ["experts"]},
        {**block, "layers": [1, 0, 3], "levels": [0.9]},
    ]
    config = parse(data)
    sites = ("up@layers0-1+3", "o_input@layers0-1+3")
    sites += ("up@experts@layers0", "up@experts@layers2-3")
    assert grid.model_sites(config, "small") == sites
    assert grid.stored_sites(config, "small") == ("up", "o_input")
    assert [curve.levels for curve in grid.curves(config)][:2] == [("0.9", "0.5")] * 2
    with pytest.raises(AtlasError, match=r"^texts\.prose: file"):  # behind what is said of sites
        check_inputs(config)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "run.0.layers: the list is empty"),
        ([1, 1], "run.0.layers: given twice: 1"),
        ([[1], [1]], "run.0.layers: given twice"),
        ([[2, 1], [1, 2]], "run.0.layers: given twice"),
        ([[1], []], "run.0.layers.1: the list is empty"),
        ([-1], "run.0.layers.0: .*greater than or equal to 0, found -1"),
        ([True], "run.0.layers.0: the number of a layer is wanted, found True"),
        ([[0], 1], "run.0.layers.1: .*list"),
        ("all", "run.0.layers: .*list, found 'all'"),
    ],
)
def test_bad_layers_are_told_in_one_line(layers: Any, message: str) -> None:
    data = copy.deepcopy(BASE)
    data["run"] = [{"models": ["small"], "levels": [0.5], "layers": layers}]
    with pytest.raises(AtlasError, match=f"^config: {message}") as caught:
        parse(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value", "slices"),
    [
        ("models.large.batch_size", 3, set()),
        ("models.small.batch_size", 3, {"evaluation", "capture", "sensitivity"}),
        ("models.small.dtype", "bfloat16", {"evaluation", "capture", "sensitivity", "error"}),
        ("models.small.apply_chat_template", True, {"evaluation"}),
        ("models.small.lm_eval_prefix", True, {"evaluation"}),
        ("models.small.system_instruction", "Be brief.", {"evaluation"}),
        ("models.small.gen_kwargs", {"max_gen_toks": 9}, {"evaluation"}),
        ("models.small.think_end_token", "</think>", {"evaluation"}),
        ("models.small.add_bos_token", True, {"evaluation", "capture"}),
        ("chat_date", "2025-01-01", set()),  # there is no chat
        ("models.small.path", "elsewhere", {"fetch"}),
        ("seed", 9, {"evaluation", "curve", "sensitivity", "truthfulness"}),
        ("replicates", 200, {"curve", "sensitivity", "truthfulness"}),
        ("bars", [0.99], {"curve"}),
        ("tasks.pages.metric", "word_perplexity", {"curve", "search"}),
        ("tasks.pages.limit", 3, {"evaluation"}),
        ("capture.tokens", 9, {"capture"}),
        ("texts.prose.column", "page", {"capture"}),
        ("search.max_levels", 5, {"search"}),
        ("search", {"ppl": [1, 5]}, {"search"}),  # 0.95 is one of the default bars
        ("search", {"ppl": [10]}, {"search", "curve"}),
        ("studies", {"coactivation": 8}, {"error"}),
        ("studies", {"lid": 500}, set()),
        ("studies", {"prompt_reuse": ["given"]}, {"error"}),
        ("studies", {"truthfulness": {"tasks": ["pairs"]}}, {"answers", "truthfulness"}),
        ("criteria.topp.power", 2, {"criterion"}),
        ("criteria.topk", {"extra": 2}, set()),
    ],
)
def test_a_slice_holds_what_its_job_depends_on(path: str, value: Any, slices: set[str]) -> None:
    def all_slices(data: dict[str, Any]) -> dict[str, str]:
        config = parse(data)
        tasks = tuple(config.tasks)
        return {
            "fetch": grid.fetch_slice(config, "small"),
            "capture": grid.capture_slice(config, "small"),
            "evaluation": grid.evaluation_slice(config, "small", tasks),
            "search": grid.search_slice(config, tasks),
            "curve": grid.curve_slice(config, tasks),
            "sensitivity": grid.sensitivity_slice(config, "small"),
            "error": grid.error_slice(config, "small"),
            "answers": grid.answers_slice(config, tasks[0]),
            "truthfulness": grid.truthfulness_slice(config),
            "criterion": grid.criterion_slice(config, "topp"),
        }

    before, after = all_slices(BASE), all_slices(changed(path, value))
    assert {name for name in before if before[name] != after[name]} == slices
    for text in after.values():
        json.loads(text)


def test_every_p_that_is_searched_for_is_a_bar() -> None:
    config = parse(changed("search", {"ppl": [10, 1, 0.5]}))
    assert config.every_bar == [0.995, 0.99, 0.98, 0.95, 0.9]
    assert config.search.further == (0.995, 0.9)
    assert (config.search.most_levels, parse(BASE).search.most_levels) == (12, 6)


# Answers that are studied


TRUTH = {"tasks": ["pairs"], "nodes": ["topp/input/0.90"]}


def test_models_and_tasks_whose_answers_are_studied() -> None:
    data = changed("studies", {"truthfulness": TRUTH})
    data["run"].append({"models": ["large"], "levels": [0.5], "tasks": ["pairs"]})
    config = parse(data)
    assert grid.truthfulness(config) == (("small", "pairs"), ("large", "pairs"))
    assert config.studies.truthfulness.nodes == ["topp/input/0.9"]
    alone = {**data, "studies": {"truthfulness": {**TRUTH, "models": ["large"]}}}
    assert grid.truthfulness(parse(alone)) == (("large", "pairs"),)
    assert grid.truthfulness(parse(BASE)) == ()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ["pair"]}, "studies.truthfulness.tasks: unknown 'pair' .did you mean 'pairs'"),
        ({"models": ["larg"]}, "studies.truthfulness.models: unknown 'larg'"),
        ({"models": ["large"]}, "studies.truthfulness.tasks: no run block asks 'pairs' of these"),
        ({"nodes": ["topp/input"]}, "studies.truthfulness.nodes.0: a node is criterion/site/level"),
        ({"nodes": ["top/input/1"]}, "studies.truthfulness.nodes: top/input/1: unknown 'top'"),
        ({"neighbours": 3}, "studies.truthfulness.neighbours: .*greater than or equal to 4"),
        ({"tensors": ["output"]}, "studies.truthfulness.tensors.0: input should be 'residual', "),
    ],
)
def test_a_study_of_answers_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(AtlasError, match=message):
        parse(changed("studies", {"truthfulness": {**TRUTH, **settings}}))


# What is written down


def write_down(data: dict[str, Any], output: Path) -> None:
    arguments = ["--config", json.dumps(data), "--output", str(output)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["x", *arguments])
        record.main()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"rule": "nm", "group": 0}, "nm: group: "),
        ({"rule": "topp", "power": 0.5}, "topp: power: expected a number of at least 1, found 0.5"),
        ({"rule": "topk", "powr": 2}, "topk: unknown parameter 'powr'; it takes none"),
    ],
)
def test_a_bad_parameter_ends_the_run_at_its_beginning(
    tmp_path: Path, entry: dict[str, Any], message: str
) -> None:
    data = changed("criteria.mine", entry)
    # Of no concern as long as no block asks for it.
    write_down(data, tmp_path / "run_config.yaml")
    assert yaml.safe_load((tmp_path / "run_config.yaml").read_text())["criteria"]["mine"] == entry
    data["run"][0]["criteria"] = ["mine"]
    with pytest.raises(AtlasError, match=message) as caught:
        write_down(data, tmp_path / "other.yaml")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "other.yaml").exists()


def test_maps_with_masks_of_their_own_are_another_curve() -> None:
    data = copy.deepcopy(BASE)
    block = {"models": ["small"], "levels": [0.5], "by_projection": True}
    data["run"] = [{**block, "sites": ["input", "qkv_input"], "layers": [2, 1]}]
    sites = ("input@projections@layers1-2", "qkv_input@projections@layers1-2")
    assert grid.model_sites(parse(data), "small") == sites
    assert grid.stored_sites(parse(data), "small") == ("input", "qkv_input")
    data["run"] = [{**block, "sites": ["intermediate"]}]
    with pytest.raises(
        AtlasError, match=r"^run: by_projection: one map reads 'intermediate'; several"
    ):
        check_inputs(parse(data))
