"""What plain lm-eval makes of a model and a task, beside what the pipeline makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from sparsity_atlas.evaluation.evaluate import Session, evaluate_node
from sparsity_atlas.evaluation.node import Node


def through_atlas(
    session: Session, node: Node | None, folder: Path, patch: pytest.MonkeyPatch
) -> dict[str, dict[str, Any]]:
    """lm-eval's outcome of each task, as the pipeline obtained it."""
    outcomes = []
    original = evaluator.evaluate

    def spy(*arguments: Any, **options: Any) -> Any:
        options["log_samples"] = True
        outcomes.append(original(*arguments, **options))
        return outcomes[-1]

    with patch.context() as context:
        context.setattr(evaluator, "evaluate", spy)
        result = evaluate_node(session, node, folder)
    assert result["status"] == "ok"
    return dict(zip(session.tasks, outcomes, strict=True))


def plainly(
    session: Session, task: str | dict | list, folder: Path, batch_size: int, **options: Any
) -> dict[str, Any]:
    """lm-eval's outcome with its own model class over the same folder, as its command is used."""
    lm = HFLM(
        pretrained=session.lm.tokenizer.name_or_path,
        device="cpu",
        dtype="float32",
        batch_size=batch_size,
        **options.pop("lm", {}),
    )
    tasks = task if isinstance(task, list) else [task]
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return evaluator.simple_evaluate(
        model=lm, tasks=tasks, task_manager=manager, bootstrap_iters=0, **options
    )


def answers(outcome: dict[str, Any]) -> dict[tuple, tuple[list, dict[str, Any]]]:
    """Responses and metrics of each sample."""
    return {
        (leaf, sample["doc_id"], sample["filter"]): (
            sample["resps"],
            {name: sample[name] for name in sample["metrics"]},
        )
        for leaf, samples in outcome["samples"].items()
        for sample in samples
    }


def flat(value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return [one for part in value for one in flat(part)]
    return [value]


def assert_same(ours: dict[str, Any], plain: dict[str, Any]) -> None:
    mine, theirs = answers(ours), answers(plain)
    assert mine.keys() == theirs.keys()
    assert mine
    for key in mine:
        for left, right in zip(mine[key], theirs[key], strict=True):
            left, right = (
                flat(list(v.items())) if isinstance(v, dict) else flat(v) for v in (left, right)
            )
            assert len(left) == len(right)
            for one, other in zip(left, right, strict=True):
                if isinstance(one, float) and not isinstance(one, bool):
                    assert one == pytest.approx(other, abs=1e-4)
                else:
                    assert one == other
    for name, scores in plain["results"].items():
        for key, value in scores.items():
            if isinstance(value, float):
                tolerance = 0 if key.startswith(("acc", "exact_match")) else 1e-4
                assert ours["results"][name][key] == pytest.approx(value, rel=tolerance, abs=0)
    assert ours.get("groups") == plain.get("groups")


def merged(outcomes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The outcomes of tasks as one, as if they had been run together."""
    keys = ("results", "samples")
    return {key: {k: v for one in outcomes.values() for k, v in one[key].items()} for key in keys}


def assert_same_prompts(ours: dict[str, Any], plain: dict[str, Any]) -> None:
    """What lm-eval passed to the model, and what came back."""
    for task, samples in plain["samples"].items():
        pairs = zip(ours["samples"][task], samples, strict=True)
        assert all(one["arguments"] == other["arguments"] for one, other in pairs)
    assert_same(ours, plain)
