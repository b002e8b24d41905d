"""What a process takes in host memory whose model is on a GPU: none of it grows with a batch.

Batches, logits and what is made of them are on the device. Here are the process itself, whose CUDA context
and libraries are most of it, weights on their way through, and what waits to be written or was read from a
store. Parts are upper bounds and take no margin: benchmarks/README.md, section j, holds them against the
peaks of a run on two H200 (torch 2.11).
"""

from __future__ import annotations

from sparsity_atlas.models.memory import MIB

# Python with torch, what the stage imports, a CUDA context, libraries and kernels in use: about the most that
# jobs of models of 1 to 6 million parameters took there, less those. That of `speed` is a guess.
PROCESS_MIB = {
    **{"models": 1645, "capture": 1500, "calibrate": 1500, "output_error": 1500},
    **{"sensitivity": 1500, "evaluate": 1550, "search": 1550, "answers": 1600, "dense": 1650},
    "speed": 1900,
}
# Of a process's, what `models` has only when its weights are loaded: a context, kernels. By the kernel
# SmolLM2-135M's job had 1,943 MiB, of which loading took 823, or as long as its file is not opened 1,030.
AFTER_LOADING_MIB = 300
# Blocks of a store, and what libraries for dense matrices take where a layer's masks are foretold: 180 MiB at
# a width of 256, some 500 at 1,536; without, SmolLM2-135M's job took 1,737 in all, of which 566 were loading.
BLOCK_BYTES, FORETOLD_BYTES = 64 * MIB, 448 * MIB
# Of a token of a model's tasks in requests: 48,000 of some 46 tokens took 135 MiB, and their tokens more.
REQUEST_BYTES, ASKING = 100, ("dense", "evaluate", "search", "answers")
# Copies in float32 of the widest tensor of a GGUF file while it is turned into numbers.
WIDEST_COPIES = 2


def of_loading(weights: int, file: int, widest: int | None = None) -> int:
    """Bytes of weights on their way to the device.

    Of a GGUF file of SmolLM2-135M, on a CPU, 546 MiB in bfloat16 (567 by this) and 791 in float32 (823).

    Args:
        weights: in the type of the computation.
        file: of the files, which are mapped meanwhile.
        widest: numbers of the widest tensor of a GGUF file; None for another one.
    """
    return weights + file + (0 if widest is None else WIDEST_COPIES * 4 * widest)


def of_requests(stage: str, tokens: int) -> int:
    """Bytes of the requests of a model's tasks, from the tokens that they have in all."""
    return REQUEST_BYTES * tokens if stage in ASKING else 0


def of_a_process(stage: str, beside: int) -> int:
    """MiB of a process and of what it has beside itself.

    Args:
        stage: as `PROCESS_MIB` names it.
        beside: MiB that a model costs.
    """
    later = AFTER_LOADING_MIB if stage == "models" else 0
    return PROCESS_MIB[stage] + max(beside - later, 0)


def of_running(stage: str, held: int, read: int, *, foretold: bool) -> int:
    """Bytes that a stage has in host memory beside its process, once the model is on the device.

    Args:
        stage: as `PROCESS_MIB` names it.
        held: of captured tensors that wait to be written.
        read: of a layer's captured tensor, as a calibration reads it.
        foretold: whether masks are.
    """
    error = BLOCK_BYTES + FORETOLD_BYTES * foretold
    return {"capture": held, "calibrate": read, "output_error": error}.get(stage, 0)


def of_a_job(loading: int, running: int, *, stays: bool) -> int:
    """Bytes of both, at their peak.

    Args:
        loading: of weights on their way.
        running: afterwards.
        stays: whether what loading took is not given back. Of a GGUF file, whose numbers are thousands of
            arrays for Python's allocator, 521 of 546 MiB (bfloat16) and 332 of 791 (float32) stayed; of
            safetensors' pages 13 and 114 MiB for as many parameters.
    """
    return loading + running if stays else max(loading, running)
