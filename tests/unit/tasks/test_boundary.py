"""What a task's author or user may get wrong is that task's failure, in one line; the others have results."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sparsity_atlas.errors import AtlasError, TaskFailure
from sparsity_atlas.evaluation.evaluate import Session, evaluate_node
from sparsity_atlas.evaluation.node import Node
from sparsity_atlas.tasks import load as loading
from sparsity_atlas.tasks import request_cache
from sparsity_atlas.tasks.load import load_tasks
from tiny_lm import (
    CHOICE,
    GENERATION,
    LAST_WORD,
    choice_documents,
    letter_documents,
    open_session,
    rolling_documents,
    save_model,
    tiny_tokenizer,
    write_model_manifest,
    write_task,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def choice(reason: str, documents: list[dict[str, Any]] | None = None, **config: Any) -> tuple:
    return reason, documents or choice_documents(8), {**CHOICE, **config}, ""


def helped(reason: str, key: str, code: str) -> tuple:
    """With a function of the task's own."""
    return (
        reason,
        choice_documents(8),
        {one: CHOICE[one] for one in CHOICE if one != key},
        (key, code),
    )


def generated(reason: str, **options: Any) -> tuple:
    config = {**GENERATION, "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, **options}}
    return reason, rolling_documents(3), config, ""


def documents(**changed: Any) -> list[dict[str, Any]]:
    """Eight, of which the fourth is odd."""
    found = choice_documents(8)
    found[3] = {**found[3], **changed}
    return found


NO_OPTIONS = {key: value for key, value in GENERATION.items() if key != "generation_kwargs"}
METRIC = [{"metric": "exact_mach", "aggregation": "mean", "higher_is_better": True}]
REGEX = {"function": "regex", "regex_pattern": "("}
BAD = {
    "template": choice(
        r"'template', document 0: cannot be loaded: template: 'nosuch' is undefined; "
        r"a document has context, choices, label",
        doc_to_text="{{nosuch}}",
    ),
    "template_syntax": choice(
        r"'template_syntax', document 0: cannot be loaded: TemplateSyntaxError: .*",
        doc_to_text="{{context",
    ),
    "template_later": choice(
        r"'template_later', document 3: its requests cannot be built: template: .*",
        documents(context=None),
        doc_to_text="{{context.strip()}}",
    ),
    "no_choices": choice(
        r"'no_choices', document 3: its requests cannot be built: TypeError: .*; the document has nothing "
        r"in choices",
        documents(choices=None),
    ),
    "labels": choice(
        r"'labels': no document has a label among its options; document 0: label -1, \d options",
        [{**one, "label": -1} for one in choice_documents(8)],
    ),
    "first_label": choice(
        r"'first_label', document 0: cannot be loaded: label 9, and there are \d options",
        [{**one, "label": 9} for one in choice_documents(8)],
    ),
    "shots": choice(
        r"'shots', document 0: its requests cannot be built: num_fewshot: 20 examples are wanted, and "
        r"there are 8, the document itself among them",
        fewshot_split="test",
        num_fewshot=20,
    ),
    "split": choice(
        r"'split': cannot be loaded: its data have no split 'exam'; they have test",
        test_split="exam",
    ),
    "metric": choice(
        r"metric_list: lm-eval has no metric 'accuracy'; close names: acc.*",
        metric_list=[{"metric": "accuracy"}],
    ),
    "metrics_as_names": choice(r"metric_list: expected items .*", metric_list=["acc"]),
    "aggregation": choice(
        r"metric_list: 'acc': lm-eval has no aggregation 'meen'; close names: mean.*",
        metric_list=[{"metric": "acc", "aggregation": "meen"}],
    ),
    "filter": choice(
        r"'filter': cannot be loaded: filter_list: lm-eval has no filter 'take_frist'; close names: "
        r"take_first.*",
        filter_list=[{"name": "x", "filter": [{"function": "take_frist"}]}],
    ),
    "output_type": choice(
        r"'output_type': cannot be loaded: ValueError: Got invalid output_type 'multiple'.*",
        output_type="multiple",
    ),
    "unknown_key": choice(
        r"'unknown_key': cannot be loaded: its YAML has a key that lm-eval does not know: 'doc_to_txt'; "
        r"close names: doc_to_text.*",
        doc_to_txt="{{context}}",
    ),
    "data_as_text": choice(
        r"dataset_kwargs: expected a mapping, found 'test'", dataset_kwargs="test"
    ),
    "data_as_number": choice(r"dataset_path: expected a text, found '3'", dataset_path=3),
    "no_data": choice(
        r"dataset_path: expected the name of its data, found nothing", dataset_path=None
    ),
    "delimiter": choice(r"target_delimiter: expected a text, found nothing", target_delimiter=None),
    "shots_as_text": choice(
        r"num_fewshot: expected a whole number, found 'two'", num_fewshot="two"
    ),
    "shots_as_list": choice(
        r"fewshot_config: expected a mapping, found '\['a'\]'", fewshot_config=["a"]
    ),
    "repeats_as_text": choice(r"repeats: expected a whole number, found 'two'", repeats="two"),
    "no_repeats": choice(r"repeats: expected 1 or more, found 0", repeats=0),
    "filter_as_name": choice(
        r"filter_list: expected items like .*, found 'take_first'", filter_list=["take_first"]
    ),
    "filter_without_function": choice(
        r"filter_list: expected items like .*", filter_list=[{"name": "x", "filter": ["a"]}]
    ),
    "text_as_list": choice(
        r"'text_as_list', document 0: cannot be loaded: doc_to_text: expected a template, a field or "
        r"a function, found list",
        doc_to_text=["a"],
    ),
    "options_as_text": choice(
        r"'options_as_text', document 0: cannot be loaded: doc_to_choice: expected a template that "
        r"gives a list, found '{{context}}'",
        doc_to_choice="{{context}}",
    ),
    "options_as_numbers": choice(
        r"'options_as_numbers', document 0: cannot be loaded: doc_to_choice: expected texts, found .*",
        doc_to_choice=[1, 2, 3, 4],
    ),
    "empty_option": choice(
        r"'empty_option', document 0: cannot be loaded: doc_to_choice: an option is empty",
        doc_to_choice=["A", "", "C", "D"],
    ),
    "syntax": helped(
        r"cannot be loaded: SyntaxError: [a-z ]+ \(syntax_u\.py, line 1\)",
        "doc_to_text",
        "def f(:\n",
    ),
    "no_function": helped(
        r"cannot be loaded: AttributeError: Module '.*' has no function 'f'.*",
        "doc_to_text",
        "def g(d):\n    return ''\n",
    ),
    "no_module": helped(
        r"cannot be loaded: ModuleNotFoundError: No module named 'nosuch' \(no_module_u\.py, line 1\)",
        "doc_to_text",
        "import nosuch\nf = None\n",
    ),
    "exits": helped(
        r"'exits', document 0: cannot be loaded: RuntimeError: no message \(exits_u\.py, line 2\)",
        "doc_to_text",
        "def f(d):\n    raise RuntimeError\n",
    ),
    "leaves": helped(
        r"'leaves', document 0: cannot be loaded: SystemExit: 0 \(leaves_u\.py, line 3\)",
        "doc_to_text",
        "import sys\ndef f(d):\n    sys.exit(0)\n",
    ),
    "leaves_late": helped(
        r"'leaves_late', document 0: cannot be evaluated: SystemExit: no message .*line 2\)",
        "process_results",
        "def f(d, results):\n    raise SystemExit\n",
    ),
    "leaves_at_once": helped(
        r"cannot be loaded: SystemExit: bye \(leaves_at_once_u\.py, line 1\)",
        "doc_to_text",
        "raise SystemExit('bye')\n",
    ),
    "no_exception": helped(
        r"'no_exception', document 0: cannot be loaded: Odd: x \(no_exception_u\.py, line 3\)",
        "doc_to_text",
        "class Odd(BaseException): pass\ndef f(d):\n    raise Odd('x')\n",
    ),
    "speechless": helped(
        r"'speechless', document 0: cannot be loaded: Mute: .*failed.* \(speechless_u\.py, line 4\)",
        "doc_to_text",
        "class Mute(Exception):\n    def __str__(self): raise ValueError\ndef f(d):\n    raise Mute\n",
    ),
    "forever": helped(
        r"'forever', document 0: cannot be loaded: RecursionError: .* \(forever_u\.py, line 2\)",
        "doc_to_text",
        "def f(d):\n    return f(d)\n",
    ),
    "a_field": helped(
        r"'a_field', document 0: cannot be loaded: the document has no field 'text'; it has context, "
        r"choices, label \(a_field_u\.py, line 2\)",
        "doc_to_text",
        "def f(d):\n    return d['text']\n",
    ),
    "no_text": helped(
        r"'no_text', document 0: its requests cannot be built: AssertionError: Context is not a .*",
        "doc_to_text",
        "def f(d):\n    return None\n",
    ),
    "stops": helped(
        r"'stops', document 0: cannot be loaded: StopIteration: .* \(stops_u\.py, line 2\)",
        "doc_to_text",
        "def f(d):\n    return next(iter('')) or StopIteration\n",
    ),
    "results": helped(
        r"'results', document 0: cannot be evaluated: the document has no field 'nosuch'.*",
        "process_results",
        "def f(d, results):\n    return {'acc': d['nosuch']}\n",
    ),
    "no_results": helped(
        r"'no_results', document 0: cannot be evaluated: AttributeError: 'NoneType' .*",
        "process_results",
        "def f(d, results):\n    pass\n",
    ),
    "beams": generated(
        r"'beams': generation_kwargs: num_beams: 2 found, only 1 can be counted; .*", num_beams=2
    ),
    "option": generated(
        r"'option': cannot be evaluated: ValueError: The following `model_kwargs` are not used by the "
        r"model: \['max_tokes'\].*",
        max_tokes=3,
    ),
    "temperature": generated(
        r"'temperature': cannot be evaluated: ValueError: .*temperature.*",
        do_sample=True,
        temperature=-1.0,
    ),
    "until": generated(
        r"'until': generation_kwargs: until: expected a text or a list of texts, found 3", until=3
    ),
    "nothing_to_do": generated(
        r"'nothing_to_do': generation_kwargs: max_gen_toks: expected 1 or more, found 0",
        max_gen_toks=0,
    ),
    "cache": generated(
        r"'cache': generation_kwargs: use_cache: it cannot be set here; leave it out",
        use_cache=False,
    ),
    "guidance": generated(
        r"'guidance': generation_kwargs: guidance_scale: 3.0 found, only 1 can be counted; .*",
        guidance_scale=3.0,
    ),
    "clock": generated(
        r"'clock': generation_kwargs: max_time: 60 found, only none can be counted; .*",
        max_time=60,
    ),
    "no_prompt": (
        r"'no_prompt', document 0: its prompt is empty, and nothing can be generated from it .*",
        rolling_documents(3),
        {**GENERATION, "doc_to_text": ""},
        "",
    ),
    "pattern": (
        r"'pattern': cannot be evaluated: filter_list: error: missing \), .*",
        rolling_documents(3),
        {**GENERATION, "filter_list": [{"name": "x", "filter": [REGEX]}]},
        "",
    ),
    "argument": (
        r"'argument', document 0: cannot be evaluated: TypeError: .*unexpected keyword argument 'nosuch'",
        rolling_documents(3),
        {**GENERATION, "metric_list": [{**GENERATION["metric_list"][0], "nosuch": 3}]},
        "",
    ),
    "kind_of_metric": (
        r"'kind_of_metric': cannot be evaluated: metric_list: the aggregation of 'acc': TypeError: .*",
        rolling_documents(3),
        {**GENERATION, "metric_list": [{"metric": "acc"}]},
        "",
    ),
    "whole_context": generated(
        r"'whole_context': generation_kwargs: max_gen_toks: 48 tokens to generate .*takes 48 .*",
        max_gen_toks=48,
    ),
    "no_settings": (
        r"'no_settings': generation_kwargs: max_gen_toks: 256 tokens .*override.*",
        rolling_documents(3),
        NO_OPTIONS,
        "",
    ),
    "no_metric": (
        r"'no_metric': metric_list: neither lm-eval nor the library `evaluate` has 'exact_mach'; "
        r"close names: exact_match",
        rolling_documents(3),
        {**GENERATION, "metric_list": METRIC},
        "",
    ),
    "runs_code": choice(r"'runs_code' runs code .* `allow_code: true` .*", unsafe_code=True),
}


def write(folder: Path, name: str, case: tuple) -> dict[str, Any]:
    _, found, config, function = case
    entry = write_task(folder, name, found, **config)
    if function:
        key, code = function
        (folder / f"{name}_u.py").write_text(code)
        with (folder / f"{name}.yaml").open("a") as file:
            file.write(f"{key}: !function {name}_u.f\n")
    return entry


@pytest.fixture(scope="module")
def outcome(
    manifest: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Everything that is bad, and something good before and after it: eval.json, and the good alone."""
    folder = tmp_path_factory.mktemp("bad")
    good = write_task(folder / "good", "good", letter_documents(4), **CHOICE)
    last = write_task(folder / "good", "last", rolling_documents(4), **LAST_WORD)
    (folder / "malformed").mkdir()
    malformed = write(folder / "malformed", "malformed", choice(""))
    included = write(folder / "included", "included", choice(""))
    with (folder / "included" / "included.yaml").open("a") as file:
        file.write("include: gone.yaml\n")
    with (folder / "malformed" / "malformed.jsonl").open("a") as file:
        file.write("{not json\n")
    entries = {name: write(folder / name, name, case) for name, case in BAD.items()}
    session = open_session(
        manifest,
        {
            **{"good": good, **entries, "malformed": malformed, "included": included, "last": last},
            **{"clustered": {**good, "cluster": "kind"}, "unknown": {**good, "task": "goood"}},
            "elsewhere": {**good, "include": str(folder / "nowhere")},
        },
    )
    evaluate_node(session, None, folder / "results")
    alone = evaluate_node(
        open_session(manifest, {"good": good, "last": last}), None, folder / "alone"
    )
    return json.loads((folder / "results" / "eval.json").read_text())["tasks"], alone["tasks"]


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Any:
    """Without lm-eval's own catalogue, which takes seconds; it is asked where a name is not found."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "built_in_tasks", dict)
        yield


@pytest.mark.parametrize("name", BAD)
def test_a_bad_task_says_what_is_wrong(outcome: tuple, name: str) -> None:
    found = outcome[0][name]
    assert found["status"] == "failed", found
    assert re.fullmatch(BAD[name][0], found["reason"]), found["reason"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("malformed", r"'malformed': cannot be loaded: .*JSON.* \(malformed\.jsonl, line 9\)"),
        (
            "clustered",
            r"cluster: documents have no field 'kind'; they have context, choices, label",
        ),
        ("included", r".*included\.yaml: FileNotFoundError: .*gone\.yaml.*"),
        ("unknown", r"lm-eval has no task 'goood'; close names: good"),
        ("elsewhere", r"include: .*nowhere: no such folder"),
    ],
)
def test_so_do_those_with_bad_data_and_entries(outcome: tuple, name: str, reason: str) -> None:
    assert re.fullmatch(reason, outcome[0][name]["reason"]), outcome[0][name]["reason"]


def test_the_good_ones_have_their_results(outcome: tuple) -> None:
    together, alone = outcome
    for name in ("good", "last"):
        assert together[name] == alone[name]
        assert alone[name]["status"] == "ok"


def broken(message: str) -> Callable:
    def call(*_: Any, **__: Any) -> Any:
        raise ValueError(message)

    return call


def test_a_mistake_of_ours_is_none_of_the_task(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In our own code, called by us or by lm-eval."""
    entry = write_task(tmp_path, "good", letter_documents(4), **CHOICE)
    for place in ("sparsity_atlas.lm.forward.scores", "sparsity_atlas.lm.forest.pack"):
        session: Session = open_session(manifest, {"good": entry})
        with monkeypatch.context() as patch:
            patch.setattr(request_cache.Beside, "read", lambda *_: None)
            patch.setattr(place, lambda *_, **__: [][1])
            with pytest.raises(IndexError):
                evaluate_node(session, None, tmp_path / place)


@pytest.mark.parametrize(
    "end",
    [MemoryError(), torch.OutOfMemoryError("CUDA"), OSError(28, "No space"), KeyboardInterrupt()],
)
def test_what_is_nobodys_fault_ends_the_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: BaseException
) -> None:
    entry = write_task(tmp_path, "good", letter_documents(4), **CHOICE)

    def load(*_: Any, **__: Any) -> Any:
        raise end

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(type(end)):
        load_tasks({"good": entry}, 1)


def test_a_metric_that_the_hub_does_not_give_ends_the_node(tmp_path: Path) -> None:
    """The next run may get it: no result of the task's."""
    case = helped("", "doc_to_text", "import evaluate\nevaluate.load('no/such-metric')\n")
    entry = write(tmp_path, "fetches", case)
    with pytest.raises(
        AtlasError, match=r"tasks\.fetches: cannot be loaded: .*no/such-metric"
    ) as found:
        load_tasks({"fetches": entry}, 1)
    assert not isinstance(found.value, TaskFailure)


def test_mislabelled_documents_are_counted(manifest: Path, tmp_path: Path) -> None:
    found = documents(label=7)
    found[5]["label"] = -1
    entry = write_task(tmp_path, "some", found, **CHOICE)
    result = evaluate_node(open_session(manifest, {"some": entry}), None, tmp_path / "results")
    assert result["tasks"]["some"]["mislabelled"] == 2


# Models whose generation cannot be counted


def words_of(folder: Path, path: Path, tmp_path: Path) -> dict[str, Any]:
    entries = {
        "good": write_task(tmp_path / "tasks", "good", letter_documents(4), **CHOICE),
        "words": write_task(tmp_path / "tasks", "words", rolling_documents(3), **GENERATION),
    }
    manifest = write_model_manifest(folder, path)
    found = evaluate_node(open_session(manifest, entries), None, tmp_path / "results")["tasks"]
    assert found["good"]["status"] == "ok"
    return found["words"]


def test_a_model_that_searches_beams_by_itself(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_beams": 3}))
    found = words_of(folder, tmp_path / "model.json", tmp_path)
    assert found["reason"].startswith(
        "'words': the model's generation_config.json: num_beams: 3 found, only 1 can be counted"
    )


def test_a_model_without_a_cache(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "openai-gpt", vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=64
    )
    torch.manual_seed(0)
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    found = words_of(folder, tmp_path / "model.json", tmp_path)
    assert "keeps no keys and values from token to token" in found["reason"]


def test_a_model_whose_steps_mix_the_rows_of_a_batch(tmp_path: Path) -> None:
    """transformers' RWKV adds the state of each row to each row's new token."""
    config = AutoConfig.for_model(
        "rwkv",
        vocab_size=300,
        hidden_size=24,
        attention_hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
    )
    torch.manual_seed(0)
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    found = words_of(folder, tmp_path / "model.json", tmp_path)
    assert re.match(
        r"'words': it generates, and rwkv\..*: found a tensor of shape", found["reason"]
    )


# Code that the model writes

RUNS = """
import os

if os.environ.get("HF_ALLOW_CODE_EVAL") != "1":
    raise ValueError("not allowed: HF_ALLOW_CODE_EVAL")


def runs(references, predictions):
    scope = {}
    exec(references[0], scope)
    return float(scope["answer"] == 2)
"""


@pytest.mark.parametrize("marked", [True, False])
def test_code_runs_where_it_is_allowed(manifest: Path, tmp_path: Path, marked: bool) -> None:
    """A task says so by itself, as lm-eval's do, or its metric finds that it may not."""
    config = {**GENERATION, "doc_to_target": "answer = 1 + 1", "unsafe_code": marked}
    del config["metric_list"]
    entry = write_task(tmp_path / "tasks", "code", rolling_documents(3), **config)
    (tmp_path / "tasks" / "metric.py").write_text(RUNS)
    with (tmp_path / "tasks" / "code.yaml").open("a") as file:
        file.write(
            "metric_list: [{metric: !function metric.runs, aggregation: mean, higher_is_better: true}]\n"
        )
    entries = {"refused": entry, "allowed": {**entry, "allow_code": True}}
    found = evaluate_node(open_session(manifest, entries), None, tmp_path / "results")["tasks"]
    assert "`allow_code: true` in the task's entry" in found["refused"]["reason"]
    assert found["allowed"]["scores"]["code"]["runs,none"] == 1.0


# Metrics of the configuration

OWN = """
def some(document, results):
    rare = {"rare": 1.0} if document["label"] == 0 else {}
    return {"acc": 1.0, "wild": float("nan") if rare else 1.0, **rare}
"""


@pytest.mark.parametrize(
    ("task", "metric", "before", "message"),
    [
        (
            *("plain", "accc"),
            True,
            r"tasks\.plain: metric: no 'accc' among its metrics: acc,none, acc_norm,none",
        ),
        (
            *("plain", "acc,strict"),
            True,
            r"tasks\.plain: metric: no 'acc,strict' among its metrics: acc,none.*",
        ),
        (
            "own",
            "rair",
            True,
            r"tasks\.own: metric: no 'rair' among .*: acc,none, rare,none, wild,none",
        ),
        (
            "own",
            "rare",
            True,
            r"tasks\.own: metric: 'rare,none' is missing in \d of 8 documents; .*",
        ),
        (
            "own",
            "wild",
            False,
            r"tasks\.own: metric: 'wild,none' is NaN or infinite in \d of 8 documents",
        ),
    ],
)
def test_a_metric_that_there_is_not(
    manifest: Path, tmp_path: Path, task: str, metric: str, before: bool, message: str
) -> None:
    """Known before any node's first forward pass, or, where it is no number, from the dense baseline."""
    plain = write_task(tmp_path / "tasks", "plain", choice_documents(8), **CHOICE)
    config = {
        **CHOICE,
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True}
            for name in ("acc", "rare", "wild")
        ],
    }
    own = write_task(tmp_path / "tasks", "own", choice_documents(8), **config)
    (tmp_path / "tasks" / "own_u.py").write_text(OWN)
    with (tmp_path / "tasks" / "own.yaml").open("a") as file:
        file.write("process_results: !function own_u.some\n")
    session = open_session(manifest, {"plain": plain, "own": own})
    wanted = {"plain": "acc", "own": "acc", task: metric}
    if before:
        node = Node.make({"rule": "topk"}, "input", "0.5")
        with pytest.raises(AtlasError, match=message):
            evaluate_node(session, node, tmp_path / "node", wanted)
        assert not (tmp_path / "node" / "samples.parquet").exists()
    folder = tmp_path / "dense"
    with pytest.raises(AtlasError, match=message):
        evaluate_node(session, None, folder, wanted)
    assert (folder / "samples.parquet").exists() != before
    assert not (folder / "eval.json").exists()
    evaluate_node(session, None, folder, {"plain": "acc_norm", "own": None})
    assert (folder / "eval.json").exists()
