"""Chat templates that give the same prompt on every day, and what they do with a system message."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self
from unittest.mock import patch

import jinja2
from transformers.utils import chat_template_utils

from sparsity_atlas.errors import AtlasError, TaskFailure

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# How transformers and a template say that they cannot render some messages; a template is a program, too.
REFUSALS = (
    *(jinja2.TemplateError, ValueError, TypeError),
    *(ArithmeticError, AttributeError, LookupError, RuntimeError),
)


def template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template that lm-eval renders with: the only one, or the one named `default`.

    Raises:
        AtlasError: there is none.
    """
    try:
        return tokenizer.get_chat_template()
    except (ValueError, NotImplementedError):
        names = ", ".join(tokenizer.chat_template or ())
        found = f"only {names}, and none of them is the default" if names else "none"
        raise AtlasError(
            f"{tokenizer.name_or_path}: apply_chat_template: expected a tokenizer with a chat "
            f"template, found {found}"
        ) from None


def asks_for_date(template: str) -> bool:
    """Whether a template prints the day (`strftime_now`)."""
    return "strftime_now" in template


@contextmanager
def on(date: str) -> Iterator[None]:
    """While it lasts, templates take `date` (ISO, at midnight) for now."""

    class Standing(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Self:
            return cls.fromisoformat(date)

    # transformers gives templates its own clock, and no argument can replace it.
    with patch.object(chat_template_utils, "datetime", Standing):
        yield


def system_fault(
    tokenizer: PreTrainedTokenizerBase, content: str, options: dict[str, Any]
) -> str | None:
    """Why a template leaves a system message out; None if it prints it.

    Args:
        tokenizer: with the template.
        content: of the message.
        options: what the template gets besides.
    """
    messages = [{"role": "system", "content": content}, {"role": "user", "content": "?"}]
    try:
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except REFUSALS as error:
        return first_line(error)
    return None if content.strip() in prompt else "it does not print it"


def refused(error: Exception) -> TaskFailure:
    """A failure that says why a template could not be applied."""
    return TaskFailure(f"the chat template cannot be applied: {first_line(error)}")


def first_line(error: Exception) -> str:
    """The beginning of what an error says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
