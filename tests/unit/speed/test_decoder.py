"""A decoder gives the tokens that a model gives without a cache, for as long as there is room."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sparsity_atlas.criteria import create
from sparsity_atlas.criteria.binding import bind_all
from sparsity_atlas.decoding.backend import Cpu
from sparsity_atlas.decoding.vector import Vector
from sparsity_atlas.kernels.definition import Threshold
from sparsity_atlas.lm.continuous.recorded_step import Step
from sparsity_atlas.sites.find import find_parts, random_ids
from sparsity_atlas.speed import decoder as decoder_module
from sparsity_atlas.speed.decoder import STEPS, Decoder
from sparsity_atlas.speed.joined import _Joined
from sparsity_atlas.speed.replaced import put, replaced
from sparsity_atlas.speed.timed_rows import Constant
from sparsity_atlas.terms import TENSORS, PlaceKey
from tiny_models import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("rows", [1, 3])
def test_greedy_tokens(rows: int) -> None:
    model = tiny_model("llama", initializer_range=0.3)
    ids = random_ids(model, (rows, 7))
    decoder = Decoder(model, rows, 40)
    found = [decoder.prompt(ids)[None], decoder.go_on(20), decoder.go_on(3)]
    for _ in range(24):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(torch.cat(found).T, ids[:, 7:])


def test_times_are_of_one_step_and_of_the_tokens_that_follow() -> None:
    model = tiny_model("llama", initializer_range=0.3)
    ids = random_ids(model, (2, 7))
    texts = []
    for rounds in (0, 3):
        decoder = Decoder(model, 2, 7 + STEPS)
        decoder.prompt(ids)
        if rounds:
            took = decoder.timed(8, rounds)
            assert took.median > 0
            assert took.spread >= 0
        texts.append(decoder.go_on(STEPS))
    assert torch.equal(*texts)


@pytest.mark.parametrize("steps", [STEPS, 4])
def test_a_round_has_as_many_steps_as_it_is_told(
    steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", initializer_range=0.3)
    decoder = Decoder(model, 1, 7 + STEPS)
    decoder.prompt(random_ids(model, (1, 7)))
    run, ran = Step.run, []

    def counted(step: Step) -> None:
        ran.append(step)
        run(step)

    monkeypatch.setattr(Step, "run", counted)
    decoder.timed(8, 5, steps)
    assert len(ran) == 5 * steps
    ran.clear()
    # No more rounds than have to be.
    decoder.timed(8, 5, steps, longest=0.0)
    assert len(ran) == 3 * steps


class _Read(TorchDispatchMode):
    """Tensors that operations read within, but for what is made within: a recorded step knows addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[int, weakref.ref[torch.Tensor]] = {}
        self._made: dict[int, weakref.ref[torch.Tensor]] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        # What a kernel for the CPU made in NumPy comes in by this one.
        if func is not torch.ops.aten.lift_fresh.default:
            for one in pytree.arg_tree_leaves(*args, **(kwargs or {})):
                known = self._made.get(id(one))
                if isinstance(one, torch.Tensor) and (known is None or known() is not one):
                    self.of[id(one)] = weakref.ref(one)
        for one in pytree.tree_leaves(found):
            if isinstance(one, torch.Tensor):
                self._made[id(one)] = weakref.ref(one)
        return found


def _recorded_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, model: Any, around: Any = contextlib.nullcontext
) -> None:
    """Have a step that is recorded go through what stood in modules' places then, as a graph does."""

    def record(step: Step) -> None:
        then = {
            one: one.__dict__["forward"] for one in model.modules() if "forward" in one.__dict__
        }

        def replay() -> None:
            with contextlib.ExitStack() as stack:
                for module, forward in then.items():
                    put(stack, module, forward)
                step._run()

        before = [one.clone() for one in step._state()]
        with around():
            step._run()
        step._reset(before)
        step._replay = replay

    monkeypatch.setattr(decoder_module, "records", lambda device: True)
    monkeypatch.setattr(Step, "record", record)


@pytest.mark.parametrize("site", [None, "gate", "all_linear_inputs"])
def test_what_a_recorded_step_reads_is_held_on_to(
    site: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", initializer_range=0.3)
    parts = find_parts(model)
    read, product = _Read(), Cpu.by_inputs

    def by_inputs(self: Cpu, vector: Vector, transposed: torch.Tensor, bias: Any) -> torch.Tensor:
        read.of[id(transposed)] = weakref.ref(transposed)
        return product(self, vector, transposed, bias)

    _recorded_on_a_cpu(monkeypatch, model, lambda: read)
    monkeypatch.setattr(Cpu, "by_inputs", by_inputs)
    decoder = Decoder(model, 1, 24)
    decoder.prompt(random_ids(model, (1, 7)))
    around: Any = contextlib.nullcontext()
    if site is not None:
        keys = [
            PlaceKey(part.layer, part.name, tensor)
            for part in parts
            for tensor in TENSORS[site]
            if tensor in part.tensors
        ]
        rule = Constant(Threshold("fixed", constants=torch.tensor([0.4])))
        around = replaced(model, parts, site, dict.fromkeys(keys, rule), 0.5)
    with around:
        decoder._record()
    decoder._step.forget()
    del around
    gc.collect()
    assert len(read.of) > 10
    assert all(one() is not None for one in read.of.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_joined_layers_that_give_other_logits_are_not_used(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Found out by a whole step: the trial of each layer is passed."""
    model = tiny_model("llama", initializer_range=0.3).to(dtype)
    ids = random_ids(model, (2, 7))
    plain = Decoder(model, 2, 24)
    plain.prompt(ids)
    wanted = plain.go_on(2)
    right, wrong = (Decoder(model, 2, 24) for _ in range(2))
    _recorded_on_a_cpu(monkeypatch, model)
    for one in (right, wrong):
        one.prompt(ids)
    own = _Joined.forward
    taken = []

    def forward(self: _Joined, x: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        taken.append(self)
        return own(self, x, *arguments, **options)

    monkeypatch.setattr(_Joined, "forward", forward)
    tokens = right.go_on(2)
    assert dtype == torch.bfloat16 or torch.equal(tokens, wanted)
    assert taken
    assert right.joined == 2
    assert not caplog.messages

    def late(self: _Joined, x: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        made = own(self, x, *arguments, **options)
        return made if self.first else made.flip(-1)

    monkeypatch.setattr(_Joined, "forward", late)
    assert torch.equal(wrong.go_on(2), wanted)
    assert wrong.joined == 0
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(
        "joined layers give other logits than the model's own: relat"
    )
    # What is decided is not asked again.
    wrong.changed()
    wrong.go_on(1)
    assert len(caplog.messages) == 1


def test_a_step_of_replaced_maps_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry at its threshold goes either way, and what follows is far off."""
    model = tiny_model("llama", initializer_range=0.3)
    _recorded_on_a_cpu(monkeypatch, model)

    def fail(model: object) -> None:
        raise AssertionError

    monkeypatch.setattr(decoder_module, "_rounded_once_more", fail)
    decoder = Decoder(model, 1, 24)
    decoder.prompt(random_ids(model, (1, 7)))
    bound = bind_all(create({"rule": "topp"}), find_parts(model), "intermediate")
    with replaced(model, find_parts(model), "intermediate", bound, 0.6):
        decoder.go_on(1)
    decoder.changed()
    with pytest.raises(AssertionError):
        decoder.go_on(1)
