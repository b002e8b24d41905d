"""Mixtures of experts on a GPU, by the tests' own references: python tests/experts_on_device.py.

CI has none. What the unit tests show on the CPU is shown here in float32 and in bfloat16: every class of
experts against a float64 loop; zeros by token and by expert against the definition, applied to what each
expert has; shared contexts, generation, captures; and a node against a loop over requests. Minutes; ends with
1 if anything differs.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

UNIT = Path(__file__).parent / "unit"
ROOMS = ("activations", "evaluation", "lm", "sites/experts", "sparsify")
sys.path[:0] = [str(UNIT / room) for room in ROOMS]
for name in ("XDG_CACHE_HOME", "HF_DATASETS_CACHE", "HF_MODULES_CACHE"):
    os.environ[name] = tempfile.mkdtemp(prefix="experts-")
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

import test_captured_experts as captures  # noqa: E402
import test_each_expert as each_expert  # noqa: E402
import test_expert_table as nodes  # noqa: E402
import test_families as families  # noqa: E402
import test_mixture as mixture  # noqa: E402
import test_scaled_inputs as scaled  # noqa: E402
import test_shared_mixtures as shared  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from mixtures import WIDE, Alone, by_hand, routing, tiny_mixture, wide_mixture  # noqa: E402
from on_device import failures  # noqa: E402
from sparsity_atlas.criteria import create  # noqa: E402
from sparsity_atlas.criteria.place import Place  # noqa: E402
from sparsity_atlas.sites.experts.implementation import chosen, installed  # noqa: E402
from sparsity_atlas.sites.experts.mixture import Experts  # noqa: E402
from sparsity_atlas.sites.find import Vectors, find_parts, observe_places  # noqa: E402
from sparsity_atlas.sparsify.attach import sparsified  # noqa: E402

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
FAMILIES = (*mixture.FAMILIES, "llama4_text")
# Site, rule and level.
RULES = (
    *(("intermediate", "topp", 0.8), ("input", "topp", 0.9), ("up", "topk", 0.5)),
    *(("gate", "topk", 0.3), ("intermediate", "maxp", 0.1)),
    *(("intermediate", "wina", 0.4), ("input", "wina", 0.4)),
)
IDS = torch.randint(3, 90, (4, 8), generator=torch.Generator().manual_seed(1))


def tiny(family: str, dtype: torch.dtype, device: torch.device) -> Any:
    """A random model of a family on the device."""
    changes = {"num_experts_per_tok": 1} if family == "llama4_text" else {}
    return tiny_mixture(family, **changes).to(dtype).to(device)


def off(found: Tensor, wanted: Tensor) -> float:
    """Relative error."""
    found, wanted = found.double().cpu(), wanted.double().cpu()
    return float((found - wanted).norm() / wanted.norm())


def one_class(family: str, name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Ours and the class's own against a loop; ours has the bits of transformers' default."""
    model = Alone(family, name).to(dtype)
    x, index, weights = routing(12)
    x, weights = x.to(dtype), weights.to(dtype)
    wanted = by_hand(model.experts.double(), x, index, weights)
    model.to(dtype).to(device)
    made = {}
    for how in ("eager", "grouped_mm"):
        with torch.no_grad(), chosen(model, how):
            made[how] = model(*(one.to(device) for one in (x, index, weights)))
    with torch.no_grad(), installed(model):
        ours = model(*(one.to(device) for one in (x, index, weights)))
    assert torch.equal(ours, made["grouped_mm"])
    for found in (ours, made["eager"]):
        assert off(found, wanted) <= ALLOWED[dtype], off(found, wanted)


def kept(rule: str, level: float, row: Tensor, norms: Tensor | None) -> Tensor:
    """The definition of a rule, of one row."""
    scores = (row.float().abs() if norms is None else row.float().abs() * norms).double()
    if rule == "maxp":
        return scores >= level * scores.max()
    order = scores.sort(descending=True).values
    if rule == "topp":
        last = int((order.cumsum(0) < level * order.sum()).sum())
    else:
        last = int(level * len(order) + 1e-9) - 1
    return scores >= order[min(last, len(order) - 1)]


def counts(family: str, dtype: torch.dtype, device: torch.device) -> None:
    """Zeros by token and by expert, of each layer's experts alone."""
    model, ids = tiny(family, dtype, device), IDS.to(device)
    for part in find_parts(model):
        if not isinstance(part, Experts):
            continue
        seen: dict[str, Tensor] = {}
        places = [(part, name) for name in part.observable]

        def keep(vectors: Vectors, seen: dict[str, Tensor] = seen) -> None:
            seen[vectors.tensor] = vectors.in_order().cpu()

        with torch.no_grad(), observe_places(model, places, keep):
            model(input_ids=ids, use_cache=False)
        index = seen["index"].long()
        for site, rule, level in RULES:
            with (
                torch.no_grad(),
                sparsified(model, [part], site, create({"rule": rule}), level) as counter,
            ):
                counter.expect(torch.ones_like(ids, dtype=torch.bool))
                model(input_ids=ids, use_cache=False)
                zeros = counter.take()[0][0].flatten().cpu()
                (sums,) = (one.cpu() for one in counter.by_expert.take())
            of_tokens = site == "input" and rule != "wina"  # one mask for all of a token's experts
            tokens, by_expert = torch.zeros(len(index)), torch.zeros(part.routed.count)
            for token, experts in enumerate(index.tolist()):
                for place, expert in enumerate(experts):
                    number = token if site == "input" else token * len(experts) + place
                    row, norms = seen[site][number], None
                    if rule == "wina":
                        norms = Place(part.experts[expert], site).column_norms().cpu()
                    count = int((~kept(rule, level, row, norms) | (row == 0)).sum())
                    by_expert[expert] += count
                    tokens[token] += 0 if of_tokens and place else count
            assert torch.equal(zeros.float(), tokens), (site, rule)
            assert torch.equal(sums[0].sum(0).float(), by_expert), (site, rule)


def own_tests(family: str, dtype: torch.dtype, device: torch.device) -> None:
    """Those of the experts as parts of a layer."""
    model = tiny(family, dtype, device)
    parts = find_parts(model)
    with device:
        mixture.test_every_tensor_is_shown_once(model, parts)
        mixture.test_nothing_dropped_changes_no_bit(model, parts)
        mixture.test_counts_are_of_all_entries(model, parts)
        mixture.test_generation_is_counted(model, parts)
        for site in ("input", "up", "gate", "intermediate", "all_inputs"):
            if dtype == torch.float32:
                mixture.test_batch_size_changes_no_count(model, parts, site)
                mixture.test_an_output_by_itself_is_what_the_model_makes(model, parts, site)


def scaled_inputs(device: torch.device) -> None:
    """Those of Llama 4's form."""
    model = tiny("llama4_text", torch.float32, device)
    parts = find_parts(model)
    with device:
        for site in scaled.SITES:
            scaled.test_is_what_a_loop_makes(model, parts, site)
        scaled.test_nothing_dropped_changes_nothing(model, parts)
        scaled.test_generation_and_batch_size(model, parts)
    scaled.test_contexts_are_shared(model)


def weighted(family: str, device: torch.device) -> None:
    """Those of rules that differ from expert to expert."""
    model = tiny(family, torch.float32, device)
    experts = [part for part in find_parts(model) if isinstance(part, Experts)]
    with device:
        for rule, site, keep, level in each_expert.CASES:
            each_expert.test_weighted_rules(model, experts, rule, site, keep, level)


def sharing(family: str, hidden: int, dtype: torch.dtype, device: torch.device) -> None:
    """Contexts are proved to be shared."""
    model = wide_mixture(family, hidden, dtype).to(device)
    assert shared.abilities(model, shared.questions()) == (shared.ABLE, {})


def captured(family: str, device: torch.device) -> None:
    """What the store has, by a plain loop on the CPU."""
    work = captures.made(family, Path(tempfile.mkdtemp()))
    for site in work.sites.split(","):
        captures.capture(work, site, device=device.type)
    captures.test_rows_are_those_of_a_plain_loop(work)


def node(site: str | None, device: torch.device) -> None:
    """A node's table by expert, by a float64 loop over its requests."""
    folder = Path(tempfile.mkdtemp())
    model = nodes.save_model(folder / "olmoe", **nodes.MIXTURE)
    manifest = nodes.write_model_manifest(model, folder / "results" / "model.json")
    nodes.open_session = partial(nodes.open_session, device=device.type)
    sampled = nodes.GENERATION | {"repeats": 2}
    tasks = {
        "choice": nodes.write_task(folder, "choice", nodes.choice_documents(6), **nodes.CHOICE),
        "pages": nodes.write_task(folder, "pages", nodes.rolling_documents(2), **nodes.ROLLING),
        "words": nodes.write_task(folder, "words", nodes.rolling_documents(5, 4), **sampled),
    }
    nodes.test_as_a_loop_over_tokens_and_experts_counts(
        manifest, model, tasks, folder / "node", site
    )


def checks(device: torch.device) -> dict[str, Callable[[], None]]:
    """All of them, by what they are of."""
    found: dict[str, Callable[[], None]] = {}
    for type_name, dtype in TYPES.items():
        for family, name in families.CLASSES:
            found[f"{name} {type_name}"] = partial(one_class, family, name, dtype, device)
        for family in FAMILIES:
            found[f"counts {family} {type_name}"] = partial(counts, family, dtype, device)
        for family in mixture.FAMILIES:
            found[f"tests {family} {type_name}"] = partial(own_tests, family, dtype, device)
        for family in WIDE:
            for hidden in (128, 256):
                what = f"sharing {family} {hidden} {type_name}"
                found[what] = partial(sharing, family, hidden, dtype, device)
    found["tests llama4_text"] = partial(scaled_inputs, device)
    for family in ("qwen2_moe", "gpt_oss"):
        found[f"weighted {family}"] = partial(weighted, family, device)
    for family in captures.FACTORS:
        found[f"capture {family}"] = partial(captured, family, device)
    for site in ("all_inputs", "gate", None):
        found[f"node {site}"] = partial(node, site, device)
    return found


def main() -> None:
    """Run them, and say what fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="", help="those with this in their name")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    for module, ids in ((mixture, IDS), (scaled, IDS), (each_expert, each_expert.IDS)):
        module.IDS = ids.to(device)
        for call in ("logits", "attached"):
            function: Any = getattr(module, call, None)
            if function is not None:
                function.__defaults__ = (module.IDS,)
    failed = failures(checks(device), arguments.only)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
