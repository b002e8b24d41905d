"""Prompts with a text before them: in a chat behind the system's message, else at their beginning."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sparsity_atlas.errors import TaskFailure

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from sparsity_atlas.lm.prompts import PromptLM
    from sparsity_atlas.lm.work import Encoding

Template = Callable[[list[dict[str, str]], bool], str]


def opened(template: Template, inserted: str) -> Template:
    """A chat template that puts a text at the beginning of the user's first message."""

    def render(history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        first = next((i for i, one in enumerate(history) if one["role"] == "user"), None)
        if inserted and first is not None:
            own = {**history[first], "content": inserted + history[first]["content"]}
            history = [*history[:first], own, *history[first + 1 :]]
        return template(history, add_generation_prompt)

    return render


def behind(lm: PromptLM, kind: str, requests: list[Instance], inserted: str) -> list[Encoding]:
    """Token ids of requests with a text before each prompt.

    Of a whole document, and of an answer without a prompt, nothing stands between the text and what is
    scored: there its tokens are put before the others, so that these stay what they are.

    Raises:
        TaskFailure: of an answer the tokens would be others.
    """
    plain = lm.encode(kind, requests)
    opening = lm.tok_encode(inserted, add_special_tokens=False)
    if kind == "loglikelihood_rolling":
        return [(*one, opening) for one in plain]
    prompted = [request for request in requests if request.args[0] != ""]
    for request in prompted:
        request.arguments = (inserted + request.args[0], *request.args[1:])
    read = iter(lm.encode(kind, prompted) if prompted else ())
    found: list[Encoding] = []
    for request, before in zip(requests, plain, strict=True):
        if request.args[0] == "":
            found.append((before[0] + opening, *before[1:]))
            continue
        found.append(next(read))
        if before[1:] != found[-1][1:]:
            raise TaskFailure(
                f"'{request.task_name}', document {request.doc_id}: inserted: the tokens of "
                f"{request.args[1]!r} would be others behind it"
            )
    return found
