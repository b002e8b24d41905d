"""lm-eval runs our model under its own name, and gets what the pipeline gets."""

from __future__ import annotations

import functools
import inspect
import json
import sys
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from sparsity_atlas.code_version import code_version
from sparsity_atlas.criteria import create, rule_names, source_file
from sparsity_atlas.criteria.calibration_file import read_calibration, write_calibration
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.evaluation import harness
from sparsity_atlas.evaluation.evaluate import evaluate_node
from sparsity_atlas.evaluation.harness_arguments import _INSTEAD, Arguments
from sparsity_atlas.evaluation.node import Node
from sparsity_atlas.loading.checkpoint import Checkpoint
from tiny_lm import (
    CHOICE,
    GENERATION,
    ROLLING,
    choice_documents,
    open_session,
    rolling_documents,
    save_model,
    tiny_tokenizer,
    write_task,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tasks(tmp_path: Path) -> dict[str, dict[str, Any]]:
    """One task of each kind."""
    folder = tmp_path / "tasks"
    return {
        "choice": write_task(folder, "choice", choice_documents(), **CHOICE),
        "pages": write_task(folder, "pages", rolling_documents(), **ROLLING),
        "words": write_task(folder, "words", rolling_documents(5, 4), **GENERATION),
    }


@pytest.mark.parametrize("level", [None, "0.6"])
@pytest.mark.parametrize("task", ["choice", "pages", "words"])
def test_simple_evaluate_gives_the_node_s_numbers(
    manifest: Path, model_folder: Path, tasks: dict, tmp_path: Path, task: str, level: str | None
) -> None:
    node = Node.make({"rule": "topp", "power": 2}, "all_inputs", level) if level else None
    session = open_session(manifest, {task: tasks[task]})
    ours = evaluate_node(session, node, tmp_path / "node")["tasks"][task]
    arguments = f"pretrained={model_folder},device=cpu"
    if level:
        arguments += f",criterion=topp,power=2,site=all_inputs,level={level}"
    theirs = lm_eval.simple_evaluate(
        model="sparsity-atlas",
        model_args=arguments,
        tasks=[task],
        batch_size=4,
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
    )
    for key, value in ours["scores"][task].items():
        if value is not None:
            assert theirs["results"][task][key] == value
    assert theirs["config"]["sparsity"] == ours["sparsity"]
    assert theirs["config"]["level"] == (float(level) if level else None)


def test_the_command(
    model_folder: Path, tasks: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without the index of lm-eval's own tasks, which takes seconds.
    monkeypatch.setattr(
        lm_eval.tasks, "TaskManager", functools.partial(TaskManager, include_defaults=False)
    )
    arguments = f"pretrained={model_folder},criterion=topk,site=intermediate,level=0.5"
    command = [
        *("harness", "run", "--model", "sparsity-atlas", "--model_args", arguments),
        *("--tasks", "choice", "--include_path", str(tmp_path / "tasks")),
        *("--device", "cpu", "--batch_size", "4", "--output_path", str(tmp_path / "out")),
    ]
    monkeypatch.setattr(sys, "argv", command)
    harness.main()
    (path,) = (tmp_path / "out").rglob("results_*.json")
    content = json.loads(path.read_text())
    assert content["config"]["criterion"] == "topk"
    assert content["config"]["sparsity"]["intermediate"]["total"] == pytest.approx(0.5)


CALIBRATED = {"criterion": "teal", "site": "intermediate", "level": 0.5}


def calibration_at(path: Path, model_folder: Path, **changes: Any) -> Path:
    """A calibration of `teal` for the tiny model."""
    table = torch.linspace(0, 2, 10_001)
    about = {
        **{"model": Checkpoint(model_folder).digest(), "site": "intermediate"},
        **{"criterion": {"rule": "teal"}, "tokens": 3, "text": "digest"},
        **{"content": "a text that no task has", "code": teal_code()},
    }
    states = {f"intermediate.{layer}": {"table": table * (1 + layer)} for layer in (0, 1)}
    write_calibration(path, states, {**about, **changes})
    return path


def teal_code() -> str:
    return code_version("calibrate", str(source_file({"rule": "teal"})))


@pytest.mark.parametrize("calibrated", [True, False])
def test_criteria_that_need_more_than_a_level(
    manifest: Path, model_folder: Path, tasks: dict, tmp_path: Path, calibrated: bool
) -> None:
    """One with a calibration, and one whose mask depends on which tokens are run together."""
    path = calibration_at(tmp_path / "c.safetensors", model_folder) if calibrated else None
    rule = "teal" if calibrated else "prompt_mask"
    node = Node.make(
        {"rule": rule}, "intermediate", "0.5", read_calibration(path) if path else None
    )
    session = open_session(manifest, {"choice": tasks["choice"]})
    ours = evaluate_node(session, node, tmp_path / "node")["tasks"]["choice"]
    theirs = lm_eval.simple_evaluate(
        model="sparsity-atlas",
        model_args={
            **{"pretrained": str(model_folder), "device": "cpu"},
            **{**CALIBRATED, "criterion": rule},
            **({"calibration": str(path)} if path else {}),
        },
        tasks=["choice"],
        batch_size=4,
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
    )
    assert theirs["results"]["choice"]["acc,none"] == ours["scores"]["choice"]["acc,none"]
    assert theirs["config"]["sparsity"] == ours["sparsity"]
    if path:
        assert theirs["config"]["calibration"] == node.calibration.digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"site": "gate"}, "its site is gate, not intermediate"),
        ({"criterion": {"rule": "teal", "allocation": "greedy"}}, "its criterion is .*greedy.*"),
        ({"model": "0" * 64}, "its model is another one"),
        ({"code": "0" * 16}, "its code is another one"),
    ],
)
def test_a_calibration_for_something_else(
    model_folder: Path, tmp_path: Path, change: dict, message: str
) -> None:
    path = calibration_at(tmp_path / "c.safetensors", model_folder, **change)
    with pytest.raises(AtlasError, match=f"calibration: .*{message}; make it again"):
        make(model_folder, **CALIBRATED, calibration=str(path))


def test_what_was_calibrated_on_is_not_evaluated(model_folder: Path, tmp_path: Path) -> None:
    document = rolling_documents(1, 4)[0]
    path = calibration_at(tmp_path / "c.safetensors", model_folder, content=document["page"])
    lm = make(model_folder, **CALIBRATED, calibration=str(path))
    request = Instance(
        request_type="loglikelihood_rolling",
        doc=document,
        arguments=(document["page"],),
        idx=0,
        metadata=("pages", 0, 1),
    )
    assert len(document["page"]) > 60
    with pytest.raises(AtlasError, match=r"tasks\.pages: document 0 is part of the text"):
        lm.loglikelihood_rolling([request])


def test_arguments_that_lm_eval_has_too(model_folder: Path, tmp_path: Path) -> None:
    """Obeyed where it costs nothing, and no obstacle where they ask for nothing."""
    other = tiny_tokenizer(bos=True)
    other.save_pretrained(tmp_path / "tokenizer")
    lm = make(
        model_folder,
        **{"tokenizer": str(tmp_path / "tokenizer"), "prefix_token_id": 7},
        **{"think_end_token": "</think>", "enable_thinking": True, "device": "cuda:0"},
        **{
            "device_map": "auto",
            "peft": None,
            "parallelize": False,
            "logits_cache": True,
            "trust_remote_code": True,
        },
    )
    assert lm.tokenizer.encode("the")[0] == 1 != tiny_tokenizer().encode("the")[0]
    assert lm.prefix_token_id == 7
    assert lm.think_end_token == "</think>"
    assert lm.chat_template_args == {"enable_thinking": True}


def test_a_folder_below_home(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(model_folder.parent))
    lm = harness.HarnessLM(pretrained="~/tiny/", device="cpu")
    assert lm.get_model_info()["model_sha"] is None


WHOLE = {"criterion": "topp", "site": "input", "level": 0.5}


def make(model_folder: Path, **arguments: Any) -> harness.HarnessLM:
    return harness.HarnessLM(**{"pretrained": str(model_folder), "device": "cpu", **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"criterion": "topp"}, "criterion=topp: site and level missing"),
        ({"criterion": "topp", "site": "input"}, "criterion=topp: level missing"),
        ({"site": "input", "level": 0.5}, "site: without a criterion, the model would stay dense"),
        ({"level": 0.5}, "level: without a criterion"),
        ({"calibration": "a.safetensors"}, "calibration: without a criterion"),
        ({"criteria": "topp", "site": "input", "level": 0.5}, "unknown argument 'criteria'; known"),
        ({"foo": "bar"}, "unknown argument 'foo'"),
        ({"power": 2}, "unknown argument 'power'"),
        ({"prefix_token_id": 99_999}, r"prefix_token_id: expected 0 to \d+, found 99999$"),
        ({"prefix_token_id": -1}, r"prefix_token_id: expected 0 to \d+, found -1$"),
        ({**WHOLE, "powr": 2}, "topp: unknown parameter 'powr'; it takes power"),
        ({**WHOLE, "power": 0.5}, "topp: power: expected a number of at least 1"),
        ({**WHOLE, "allocation": "greedy"}, "topp: unknown parameter 'allocation'"),
        ({**WHOLE, "criterion": "topq"}, "unknown rule 'topq'"),
        ({**WHOLE, "criterion": "mine.py"}, "mine.py: no such file"),
        ({**WHOLE, "level": 2}, "levels: 2 is out of range"),
        ({**WHOLE, "level": "half"}, "level: a level is a number, such as 0.9, found 'half'"),
        ({**WHOLE, "level": True}, "level: a level is a number"),
        ({**WHOLE, "site": "nowhere"}, "site: expected input, .*found 'nowhere'"),
        (
            {**WHOLE, "site": "gate", "criterion": "tda"},
            "not defined at 'gate'|needs a calibration",
        ),
        ({**WHOLE, "criterion": "prompt_mask"}, "'prompt_mask' is not defined at 'input'"),
        (CALIBRATED, "criterion=teal needs a calibration; say calibration=.*which `snakemake"),
        ({**CALIBRATED, "calibration": "none.safetensors"}, "none.safetensors: no such file"),
        ({**WHOLE, "calibration": "c.safetensors"}, "calibration: criterion=topp has none"),
        ({**WHOLE, "site": "input@experts"}, "no part 'experts' in this model; it has ffn"),
        ({"peft": "no adapter"}, "models: adapter: no adapter.*not the name of a repository"),
        ({"gguf_file": "a.gguf"}, r"a\.gguf: no such file"),
        ({"load_in_4bit": True}, "load_in_4bit: not supported.*quantised"),
        ({"parallelize": True}, "parallelize: not supported.*device_map=auto spreads the model"),
        ({"device_map": "balanced"}, "device_map: input should be 'auto'.*found 'balanced'"),
        ({"attn_implementation": "eager"}, "attn_implementation: not supported"),
        ({"softmax_dtype": "float32"}, "softmax_dtype: not supported"),
        ({"max_batch_size": 8}, "max_batch_size: not supported.*batch_size=auto"),
        ({"batch_size": "auto"}, "batch_size: a number of sequences is wanted.*found 'auto'"),
        ({"batch_size": "auto:4"}, "batch_size: a number of sequences is wanted"),
        ({"batch_size": 0}, "batch_size: a number of sequences is wanted"),
        ({"device": "cuda:1"}, "device: input should be .*found 'cuda:1'"),
        ({"dtype": "int4"}, "dtype: input should be"),
        ({"max_length": "long"}, "max_length: "),
        ({"add_bos_token": "perhaps"}, "add_bos_token: "),
        ({"enable_thinking": True}, "enable_thinking: think_end_token is missing"),
        ({"revision": "main"}, "revision: .* is a local folder"),
        ({"tokenizer": "/nowhere/at/all"}, "nowhere"),
        ({"pretrained": "/nowhere/at/all"}, "nowhere"),
        ({"pretrained": None}, "pretrained: "),
    ],
)
def test_what_is_refused(model_folder: Path, arguments: dict, message: str) -> None:
    with pytest.raises(AtlasError, match=message) as caught:
        make(model_folder, **arguments)
    assert "\n" not in str(caught.value)


def test_thinking_before_an_answer_that_is_given_is_refused(model_folder: Path) -> None:
    model = make(model_folder, enable_thinking=True, think_end_token="</think>")
    request = Instance("loglikelihood", {}, ("a", " b"), 0, metadata=("choice", 0, 1))
    with pytest.raises(AtlasError, match="enable_thinking: 'choice' scores given answers"):
        model.loglikelihood([request])


def test_models_that_the_pipeline_refuses(tmp_path: Path) -> None:
    """There is no stage `models` before lm-eval's command."""
    save_model(tmp_path / "all", is_causal=False)
    with pytest.raises(AtlasError, match="not causal"):
        make(tmp_path / "all")
    folder = save_model(tmp_path / "more")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["cat"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(AtlasError, match="'cat' has id 300"):
        make(folder)


def test_the_cache_of_answers_is_refused(model_folder: Path, tasks: dict, tmp_path: Path) -> None:
    with pytest.raises(AtlasError, match="use_cache: an answer from lm-eval's cache"):
        lm_eval.simple_evaluate(
            model="sparsity-atlas",
            model_args={"pretrained": str(model_folder), "device": "cpu"},
            tasks=["choice"],
            use_cache=str(tmp_path / "cache"),
        )


def test_no_rule_has_a_parameter_of_an_argument_s_name() -> None:
    hidden = {*Arguments.model_fields, *_INSTEAD, *inspect.signature(HFLM).parameters}
    for rule in rule_names():
        assert hidden.isdisjoint(inspect.signature(type(create({"rule": rule}))).parameters)
