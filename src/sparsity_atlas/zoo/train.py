"""Train the embedded models: `sparsity-atlas zoo train --model large --corpus ...`."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel
from transformers.models.olmoe.modeling_olmoe import OlmoeForCausalLM
from transformers.utils.logging import disable_progress_bar

from sparsity_atlas.activations.text_files import local_documents
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.loading.checkpoint import Checkpoint
from sparsity_atlas.loading.pretrained import load, moved
from sparsity_atlas.zoo import batches, bound, card, corpus, expert_training, loss, recipe
from sparsity_atlas.zoo.fit import Curve, build_model, fit
from sparsity_atlas.zoo.sparse import zeros
from sparsity_atlas.zoo.sparse.course import Course, base_name, cut_small
from sparsity_atlas.zoo.sparse.penalty import Stages
from sparsity_atlas.zoo.sparse.state import State
from sparsity_atlas.zoo.sparse.variants import ACTIVATIONS, RECTIFIED, variant
from sparsity_atlas.zoo.tokenizer import as_pretrained, load_tokenizer, train_tokenizer

log = logging.getLogger("sparsity_atlas.zoo.train")


@dataclass(frozen=True)
class Texts:
    """What models are trained and measured on; `source` says in words what the training text is.

    `prose` holds the token ids of documents that are measured, too, each by itself.
    """

    tokenizer: Tokenizer
    train: batches.Tokens
    valid: batches.Tokens
    source: str
    prose: tuple[np.ndarray, ...] = ()


def train_model(
    name: str,
    shape: recipe.Architecture,
    training: recipe.Training,
    texts: Texts,
    folder: Path,
    device: torch.device,
    course: Course | None = None,
    state: State | None = None,
    asked: card.Asked | None = None,
) -> card.Record:
    """Train one model and write its folder: weights (bfloat16), tokenizer, configuration, card.

    The losses in the returned record are measured on the saved weights, computed in float32. With
    checkpoints there is a folder of each of these in it, and of the end, and the tokenizer beside them.
    AtlasError when the folder cannot be made, the corpus is too small, or the training diverges.

    Args:
        name: what the model is called.
        shape: what it is.
        training: the settings.
        texts: what it is trained and measured on.
        folder: its own.
        device: where it is trained.
        course: what the training does beside the recipe.
        state: where it is kept, and goes on from.
        asked: the command that trains it, for the card.
    """
    course = course or Course()
    course.check(shape, training)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AtlasError(f"--out: cannot make the folder {folder} ({error.strerror})") from error

    def place(steps: int) -> Path:
        return folder / f"step-{steps}" if course.checkpoints else folder

    def keep(steps: int, curve: Curve) -> card.Record:
        if course.fatrelu is not None:
            cut_small(model, course.fatrelu)
        weights = moved(deepcopy(model), "cpu", torch.bfloat16)
        weights.save_pretrained(place(steps))
        record = card.Record(
            name=name if steps == training.steps else f"{name}, step {steps}",
            architecture=shape,
            training=training,
            source=texts.source,
            total_parameters=sum(weight.numel() for weight in weights.parameters()),
            corpus_tokens=len(texts.train.ids),
            device=device.type,
            curve=curve,
            steps_done=steps,
            course=course.facts(),
            asked=asked or card.Asked(name),
            **losses(place(steps), shape, training, texts, device),
        )
        card.write(record, place(steps))
        return record

    model = build_model(shape, training)
    masks = isinstance(shape, recipe.MaskedDiffusion)
    tokenizer = as_pretrained(texts.tokenizer, training.context, masks=masks)
    tokenizer.save_pretrained(folder)
    # Less than half as long as it is written by itself.
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    curve = fit(model, texts.train, shape, training, device, course, keep, state)
    record = keep(training.steps, curve)
    if state is not None:
        state.path.unlink(missing_ok=True)
    return record


def losses(
    folder: Path,
    shape: recipe.Architecture,
    training: recipe.Training,
    texts: Texts,
    device: torch.device,
) -> dict[str, Any]:
    """What a record says of a folder's weights, computed in float32."""
    saved = moved(load(Checkpoint(folder), dtype="float32", device="cpu"), device)
    context = measured_context(shape, training)
    valid = batches.evaluation_blocks(texts.valid.ids, context)
    # About as much of the training text as there is validation text, from all over it.
    stride = max(1, len(texts.train.ids) // len(texts.valid.ids))
    train = batches.evaluation_blocks(texts.train.ids, context, stride)
    documents = [batches.evaluation_blocks(ids, context) for ids in texts.prose]
    prose = [np.concatenate(arrays) for arrays in zip(*documents, strict=True)]
    sizes = batches.token_bytes(texts.tokenizer)
    routed = isinstance(saved, OlmoeForCausalLM)
    rectified = shape.activation in RECTIFIED and not routed
    return {
        "train": measured(saved, *train, sizes),
        "valid": measured(saved, *valid, sizes),
        "prose": measured(saved, prose[0], prose[1], sizes) if prose else None,
        "load": expert_training.load(saved, *valid) if routed else None,
        "zeros": zeros.measure(saved, *valid) if rectified else None,
    }


def measured_context(shape: recipe.Architecture, training: recipe.Training) -> int:
    """Tokens of a block that is measured: where each is seen, the one that begins it takes a place."""
    return training.context - isinstance(shape, recipe.MaskedDiffusion)


def measured(
    model: PreTrainedModel, inputs: np.ndarray, targets: np.ndarray, sizes: np.ndarray
) -> loss.Loss:
    """The loss over blocks of `evaluation_blocks`, or its bound where a model fills masks in."""
    mask = getattr(model.config, "mask_token_id", None)
    if mask is None:
        return loss.measure(model, inputs, targets, sizes)
    return bound.measure(model, targets, sizes, mask)


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU; AtlasError for a CUDA that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise AtlasError(
            "--device: found cuda, but torch sees no CUDA device; expected auto or cpu"
        )
    return torch.device(name)


def read_texts(arguments: argparse.Namespace, training: recipe.Training) -> Texts:
    """Read and encode both texts, with the tokenizer trained on the way unless one is given."""
    valid = corpus.paragraphs(corpus.read_text(arguments.valid))
    if arguments.corpus_hub is None:
        origin = arguments.corpus.name
        train = corpus.paragraphs(corpus.read_text(arguments.corpus))
    else:
        origin = arguments.corpus_hub
        train = corpus.paragraphs(corpus.read_hub(origin, arguments.hub_column))
    for option, found in (("--valid", valid), ("--corpus", train)):
        if not found:
            raise AtlasError(f"{option}: no text in it, expected paragraphs between blank lines")
    if arguments.tokenizer is None:
        tokenizer = train_tokenizer(train, training.vocab_size)
    else:
        tokenizer = load_tokenizer(arguments.tokenizer, training.vocab_size)
    tokens = batches.encode_cached(tokenizer, train, arguments.cache)
    log.info("corpus: %d paragraphs, %.1f M tokens", len(train), len(tokens.ids) / 1e6)
    documents = local_documents(arguments.prose, "text") if arguments.prose else ()
    prose = (tokenizer.encode(text, add_special_tokens=False).ids for text in documents)
    return Texts(
        tokenizer,
        tokens,
        batches.encode(tokenizer, valid),
        arguments.source or origin,
        tuple(np.array(ids, dtype=np.uint16) for ids in prose if ids),
    )


def run(arguments: argparse.Namespace) -> None:
    """Train the named models one after another on the same encoded texts."""
    overrides = {
        key: value
        for key in ("steps", "seed", "batch_tokens")
        if (value := getattr(arguments, key)) is not None
    }
    training = recipe.Training(**overrides)
    course = Course(
        base=arguments.base,
        l1=None if arguments.l1 is None else Stages.parse(arguments.l1),
        fatrelu=arguments.fatrelu,
        checkpoints=tuple(sorted(set(arguments.checkpoints))),
    )
    if arguments.name is not None and len(arguments.model) > 1:
        raise AtlasError(
            f"--name: found {len(arguments.model)} models, expected one to be called so"
        )
    wanted: dict[str, tuple[card.Asked, recipe.Architecture]] = {}
    for model in arguments.model:
        shape = recipe.architecture(model)
        name, shape = variant(model, shape, arguments.activation, arguments.ungated)
        if arguments.learning_rate is not None:
            shape = replace(shape, learning_rate=arguments.learning_rate)
        course.check(shape, training)
        given = None if arguments.name == name else arguments.name
        wanted[given or name] = card.Asked(model, options(arguments, given)), shape
    device = choose_device(arguments.device)
    texts = read_texts(arguments, training)
    for name, (asked, shape) in wanted.items():
        folder = arguments.out / name
        state = None
        if arguments.state is not None:
            settings = {"shape": asdict(shape), **asdict(training), **course.facts()}
            state = State(arguments.state / f"{name}.pt", settings)
        record = train_model(name, shape, training, texts, folder, device, course, state, asked)
        sys.stdout.write(
            f"{name}: train {record.train.nats_per_token:.4f}, "
            f"valid {record.valid.nats_per_token:.4f} nats/token "
            f"({record.valid.bits_per_byte:.4f} bits/byte) -> {folder}\n"
        )


def options(arguments: argparse.Namespace, name: str | None) -> tuple[str, ...]:
    """What a command says that the recipe does not, an option each; the base by its name.

    Args:
        arguments: of the command.
        name: what the model is called, if not as it would be by itself.
    """
    base = None if arguments.base is None else base_name(arguments.base).upper()
    values = {
        "name": name,
        "activation": arguments.activation,
        "from": base,
        "learning-rate": arguments.learning_rate,
        "l1": arguments.l1,
        "fatrelu": arguments.fatrelu,
        "checkpoints": arguments.checkpoints,
    }
    found = ["--ungated"] if arguments.ungated else []
    for option, value in values.items():
        words = value if isinstance(value, list) else [] if value is None else [value]
        if words:
            found.append(shlex.join([f"--{option}", *map(str, words)]))
    return tuple(found)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    defaults = recipe.Training()
    command = argparse.ArgumentParser(prog="sparsity-atlas zoo train", description=__doc__)
    command.add_argument(
        "--model", nargs="+", required=True, metavar="NAME", help=", ".join(recipe.ARCHITECTURES)
    )
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--corpus", type=Path, help="training text, .txt or .txt.xz")
    source.add_argument("--corpus-hub", metavar="ID", help="training text as a Hub data set")
    command.add_argument("--hub-column", default="text", help="its text column (%(default)s)")
    command.add_argument("--source", help="what the training text is, for the model card")
    command.add_argument("--valid", type=Path, required=True, help="validation text")
    command.add_argument(
        "--prose", type=Path, help="documents (.jsonl) to measure the loss on, too, each by itself"
    )
    command.add_argument("--out", type=Path, required=True, help="each model goes to OUT/NAME")
    command.add_argument(
        "--activation", choices=ACTIVATIONS, help="nonlinearity of the FFN (the model's own)"
    )
    command.add_argument(
        "--ungated", action="store_true", help="an FFN without a gate, half as wide again"
    )
    command.add_argument("--name", help="what the model is called (NAME, the activation, ungated)")
    command.add_argument(
        "--from", dest="base", type=Path, metavar="FOLDER", help="begin with that model's weights"
    )
    command.add_argument(
        "--l1",
        nargs="+",
        metavar="STEP:WEIGHT",
        help="penalise |intermediate| by a weight that rises from one to the next along a sine",
    )
    command.add_argument(
        "--fatrelu",
        type=float,
        metavar="T",
        help="put FATReLU, x if x >= T else 0, in relu's place",
    )
    command.add_argument(
        "--checkpoints",
        nargs="+",
        type=int,
        default=[],
        metavar="STEP",
        help="keep the model after these steps, too: OUT/NAME/step-STEP",
    )
    command.add_argument("--learning-rate", type=float, help="its peak (the model's own)")
    command.add_argument(
        "--state", type=Path, help="folder that keeps an unfinished training, to go on with it"
    )
    command.add_argument(
        "--tokenizer", type=Path, help="folder with a trained tokenizer (trained when left out)"
    )
    command.add_argument("--cache", type=Path, help="folder that keeps the encoded corpus")
    command.add_argument("--steps", type=int, help=f"optimizer steps ({defaults.steps})")
    command.add_argument("--seed", type=int, help=f"weights and data order ({defaults.seed})")
    command.add_argument(
        "--batch-tokens", type=int, help=f"tokens in a step ({defaults.batch_tokens})"
    )
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return command


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    disable_progress_bar()
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True
    )
    run(parser().parse_args(argv))
