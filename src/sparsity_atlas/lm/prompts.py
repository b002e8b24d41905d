"""How lm-eval's requests become token ids: HFLM's way, with one BOS and a date that stands still."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import has_bos_prefix

from sparsity_atlas import cli
from sparsity_atlas.errors import AtlasError, TaskFailure
from sparsity_atlas.files.whole import digest
from sparsity_atlas.lm import chat
from sparsity_atlas.models.bos import begins_with_bos

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsity_atlas.lm.work import Encoding


# So that the tokenizer's own records of them stay small.
TEXTS_AT_ONCE = 1000


@dataclass(frozen=True)
class PromptSettings:
    """What a model's entry says of prompts and of generation; see `model_entry.ModelEntry`.

    chat_date: the day that a chat template prints, in ISO format.
    """

    add_bos_token: bool | None = None
    lm_eval_prefix: bool = False
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = True
    chat_template_args: dict[str, Any] = field(default_factory=dict)
    chat_date: str = "2024-07-26"
    system_instruction: str | None = None
    gen_kwargs: dict[str, Any] = field(default_factory=dict)
    think_end_token: str | int | None = None

    @classmethod
    def of(cls, settings: dict[str, Any]) -> PromptSettings:
        """Those among other settings, as `grid.evaluation_slice` gives them."""
        return cls(**{one.name: settings[one.name] for one in fields(cls) if one.name in settings})


class PromptLM(HFLM):
    """HFLM over a loaded model, as far as it makes token ids of requests.

    Attributes:
        prompts: its settings.
        bos: whether BOS is put before a text, unless the text begins with it.
        denoises: whether it generates by steps of denoising.
    """

    denoises = False

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        max_length: int | None = None,
        prompts: PromptSettings | None = None,
    ) -> None:
        """Take a loaded model.

        Args:
            model: on its device.
            tokenizer: as `pretrained.load_tokenizer` loads it for the settings' `add_bos_token`.
            batch_size: sequences a forward pass.
            max_length: longest sequence in tokens; None: the model's own limit.
            prompts: unset: as lm-eval does by itself, but for the second BOS.

        Raises:
            AtlasError: settings that this tokenizer or its chat template cannot follow.
        """
        self.prompts = prompts or PromptSettings()
        self.bos = begins_with_bos(tokenizer, self.prompts.add_bos_token)
        # Where a tokenizer has none of these, HFLM adds a token, which the model has no embedding of.
        tokens = (tokenizer.pad_token, tokenizer.unk_token, tokenizer.eos_token)
        self._lacks_padding = not any(tokens)
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=batch_size,
            max_length=max_length,
            add_bos_token=self.prompts.add_bos_token,
            chat_template_args=self.prompts.chat_template_args,
            think_end_token=self.prompts.think_end_token,
        )
        self._together: dict[str, list[int]] = {}  # texts whose tokens were found in one go
        ends = self.prompts.think_end_token
        if isinstance(ends, int) and not 0 <= ends < len(tokenizer):
            raise AtlasError(
                f"{tokenizer.name_or_path}: think_end_token: {ends} found, and its tokens are 0 to "
                f"{len(tokenizer) - 1}"
            )
        self._template: str | None = None
        self._no_system: str | None = None  # why a system message is left out
        if self.prompts.apply_chat_template:
            self._template = chat.template_of(tokenizer)
            self._no_system = self._system_fault()

    def _system_fault(self) -> str | None:
        instruction = self.prompts.system_instruction
        fault = chat.system_fault(
            self.tokenizer, instruction or "A system message.", self.chat_template_args
        )
        if instruction and fault:
            raise AtlasError(
                f"{self.tokenizer.name_or_path}: system_instruction: the chat template takes no "
                f"system message ({fault})"
            )
        return fault

    def identity(self) -> dict[str, Any]:
        """What prompts and generation depend on beside the tokenizer and the task."""
        prompts = self.prompts
        optional = {
            "chat_template_args": prompts.chat_template_args,
            "system_instruction": prompts.system_instruction,
            "gen_kwargs": prompts.gen_kwargs,
            "think_end_token": prompts.think_end_token,
        }
        if not prompts.fewshot_as_multiturn:
            optional["fewshot_as_multiturn"] = False
        if self._template is not None and chat.asks_for_date(self._template):
            optional["chat_date"] = prompts.chat_date
        return {
            "add_bos_token": prompts.add_bos_token,
            "bos": self.bos,
            "prefix_token": self.prefix_token_id,
            "lm_eval_prefix": prompts.lm_eval_prefix,
            "chat_template": digest(self._template) if self._template is not None else None,
            **{name: value for name, value in optional.items() if value not in (None, {})},
        }

    # Special tokens

    @property
    def prefix_token_id(self) -> int | None:
        """What the first token of a text is predicted from: BOS, else EOS; the model's if need be."""
        own = super().prefix_token_id
        return self._of_model("bos_token_id", "eos_token_id") if own is None else own

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text: the tokenizer's, else the model's; None if neither has one."""
        own = super().eot_token_id
        return self._of_model("eos_token_id") if own is None else own

    @property
    def padding_id(self) -> int:
        """What stands where a batch's row has no token; the tokenizer's, unless it has none."""
        if not self._lacks_padding:
            padding: int = self.tokenizer.pad_token_id
            return padding
        # What follows an end token is cut with it; where there is none, rows end at a stop string.
        return self.eot_token_id or 0

    def _of_model(self, *names: str) -> int | None:
        """The first of these ids that the model's own configuration gives, and the tokenizer knows."""
        for name in names:
            for config in (self.model.generation_config, self.model.config.get_text_config()):
                found = getattr(config, name, None)
                first = found[0] if isinstance(found, list) and found else found
                if isinstance(first, int) and self.tokenizer.decode(first) != "":
                    return first
        return None

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **options: Any,
    ) -> list[int]:
        """Token ids of a text; see `HFLM.tok_encode`, which needs a BOS or EOS token."""
        as_set = add_special_tokens is None and left_truncate_len is None and not options
        if as_set and string in self._together:
            return self._together[string]
        if add_special_tokens is None and super().prefix_token_id is None:
            # There is no BOS that the text could begin with.
            add_special_tokens = self.add_bos_token is not False
        tokens: list[int] = super().tok_encode(
            string, add_special_tokens, left_truncate_len, **options
        )
        return tokens

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str | None:
        """The text of token ids; see `HFLM.tok_decode`. None for no token: there is no end token."""
        return None if tokens is None else super().tok_decode(tokens, skip_special_tokens)

    def tok_batch_encode(self, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Padded token ids of texts and their mask; see `HFLM.tok_batch_encode`."""
        ids, mask = super().tok_batch_encode(*arguments, **options)
        return ids.masked_fill(mask == 0, self.padding_id), mask

    # Requests

    def encode(self, kind: str, requests: list[Instance]) -> list[Encoding]:
        """Token ids of requests of one kind (lm-eval's request type).

        Raises:
            TaskFailure: a request that needs a BOS or EOS token where there is none, or an empty one.
        """
        with self._tokenised(_texts(kind, requests)):
            if kind == "generate_until":
                return [(self._prompt(request),) for request in requests]
            if kind == "loglikelihood_rolling":
                return [(self._whole(request),) for request in requests]
            for request in requests:
                if request.args[0] == "":
                    self._check_alone(request)
            pairs: list[Encoding] = super().loglikelihood(requests, disable_tqdm=True)
            return pairs

    @contextlib.contextmanager
    def _tokenised(self, texts: list[str]) -> Iterator[None]:
        """Have `tok_encode` know these texts: a tokenizer reads many at once in a fraction of the time."""
        prefix = self.prefix_token_id
        # Code of a repository's own may read one text in another way than many.
        known = type(self.tokenizer).__module__.startswith("transformers.")
        if known and self.tokenizer.is_fast and prefix is not None:
            # A text that begins with BOS is read in another way; it is left to HFLM, one by one.
            bos = self.tokenizer.decode(prefix)
            plain = [text for text in dict.fromkeys(texts) if not has_bos_prefix(text, bos)]
            special = (
                {} if self.add_bos_token is None else {"add_special_tokens": self.add_bos_token}
            )
            for start in range(0, len(plain), TEXTS_AT_ONCE):
                some = plain[start : start + TEXTS_AT_ONCE]
                found = self.tokenizer(some, return_attention_mask=False, **special)["input_ids"]
                self._together.update(zip(some, found, strict=True))
        try:
            yield
        finally:
            self._together = {}

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[Encoding]:
        # HFLM ends here with tokenised requests; `encode` wants no more of it.
        return [(context, continuation) for _, context, continuation in requests]

    def _prompt(self, request: Instance) -> list[int]:
        """What is to be continued; of nothing no token follows."""
        tokens = self.tok_encode(request.args[0])
        if not tokens:
            raise TaskFailure(
                f"'{request.task_name}', document {request.doc_id}: its prompt is empty, and nothing "
                "can be generated from it (add_bos_token: true in the model's entry begins it with BOS)"
            )
        return tokens

    def prompt_tokens(self, batch: list[Instance], longest: int) -> list[list[int]]:
        """What is to be continued, as HFLM makes it of a batch, and cuts it to its end.

        Args:
            batch: the requests, in their order.
            longest: tokens of a prompt at most.
        """
        ids, mask = self.tok_batch_encode(
            [one.args[0] for one in batch], left_truncate_len=longest, truncation=self.truncation
        )
        return [row[known.bool()].tolist() for row, known in zip(ids, mask, strict=True)]

    def _whole(self, request: Instance) -> list[int]:
        """A whole text, without a BOS of its own: the prefix token, which is BOS, stands before it."""
        self._check_prefix(request)
        (text,) = request.args
        tokens = self.tok_encode(text)
        if self.prompts.lm_eval_prefix or tokens[:1] != [self.prefix_token_id]:
            return tokens
        written = has_bos_prefix(text, self.tokenizer.decode(self.prefix_token_id))
        return tokens[1:] if self.bos or written else tokens

    def _check_prefix(self, request: Instance) -> None:
        if self.prefix_token_id is None:
            raise TaskFailure(
                f"'{request.task_name}', document {request.doc_id}: its first token is predicted from "
                "BOS or EOS, and neither the tokenizer nor the model's configuration names one "
                "(bos_token in tokenizer_config.json, bos_token_id in generation_config.json)"
            )

    def _check_alone(self, request: Instance) -> None:
        """Whether a continuation without context can be scored."""
        self._check_prefix(request)
        if not self.tok_encode(request.args[1], add_special_tokens=False):
            raise TaskFailure(
                f"'{request.task_name}', document {request.doc_id}: nothing to score: "
                f"the continuation {request.args[1]!r} comes to no token"
            )

    # Chat

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Messages as a prompt; see `HFLM.apply_chat_template`.

        Raises:
            TaskFailure: the template cannot render these messages.
        """
        if chat_history[0]["role"] == "system" and self._no_system is not None:
            cli.logger.info(
                "the chat template takes no system message (%s): descriptions of tasks are left out, "
                "as lm-eval leaves them out",
                self._no_system,
            )
            self._no_system = None  # said once
        try:
            with chat.on(self.prompts.chat_date):
                prompt: str = super().apply_chat_template(chat_history, add_generation_prompt)
        except chat.REFUSALS as error:
            raise chat.refused(error) from None
        return prompt


def _texts(kind: str, requests: list[Instance]) -> list[str]:
    """What `HFLM` will have tokenised of some requests, as far as it is known before."""
    if kind != "loglikelihood":
        return [request.args[0] for request in requests]
    pairs = [request.args for request in requests if request.args[0] != ""]
    # It moves spaces at the end of a context to what is scored.
    return [text for context, answer in pairs for text in (context.rstrip(), context + answer)]
