"""What does not fit into memory is said before it starts, with what would."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.loading import free_memory
from sparsity_atlas.loading.checkpoint import Checkpoint
from sparsity_atlas.loading.pretrained import load

CPU = torch.device("cpu")
SETTINGS = (("batch_size", 16), ("max_length", 1000))


def left(monkeypatch: pytest.MonkeyPatch, gib: float) -> None:
    monkeypatch.setattr(
        free_memory,
        "free",
        lambda device: (int(gib * free_memory.GIB), 9 * free_memory.GIB, "this job was given"),
    )


def twenty(share: float) -> int:
    """Of 20 GiB two are there at any size."""
    return int((2 + 18 * share) * free_memory.GIB)


@pytest.mark.parametrize(
    ("gib", "fitting"),
    [
        (12.0, "batch_size: 8 would fit"),
        (3.5, "batch_size: 1 would fit"),
        (2.5, "max_length: 15 would fit"),
        (1.0, "no batch_size or max_length would fit"),
    ],
)
def test_what_would_fit_is_named(gib: float, fitting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    left(monkeypatch, gib)
    with pytest.raises(AtlasError) as refusal:
        free_memory.check(CPU, twenty, "'prose': batches of 9 tokens", SETTINGS)
    assert str(refusal.value) == (
        "'prose': batches of 9 tokens: needs about 20.0 GiB beside what is in memory already, and this "
        f"job was given 9.0 GiB, of which {gib:.1f} are left; {fitting}"
    )


def test_what_is_close_is_said_and_tried(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    left(monkeypatch, 17)
    free_memory.check(CPU, twenty, "x", SETTINGS)
    assert "needs about 20.0 GiB" in caplog.text
    assert "batch_size: 8 would fit" in caplog.text
    caplog.clear()
    left(monkeypatch, 21)
    free_memory.check(CPU, twenty, "x", SETTINGS)
    assert not caplog.text


def test_the_narrowest_limit_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SLURM_MEM_PER_NODE", raising=False)
    monkeypatch.setattr(free_memory, "_group_limits", list)
    machine, whose = free_memory.host_limit()
    assert whose == "this machine has"
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "100")
    assert free_memory.host_limit() == (100 * 2**20, "this job was given")
    monkeypatch.setattr(free_memory, "_group_limits", lambda: [50 * 2**20, 2**63])
    assert free_memory.host_limit() == (50 * 2**20, "this job was given")
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "0")  # all of the machine's
    monkeypatch.setattr(free_memory, "_group_limits", lambda: [2**63])
    assert free_memory.host_limit() == (machine, "this machine has")


def test_control_groups_above_count_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    inner = tmp_path / "job" / "step"
    inner.mkdir(parents=True)
    (inner / "memory.max").write_text("max\n")
    (tmp_path / "job" / "memory.max").write_text("4096\n")
    (tmp_path / "cgroup").write_text("0::/job/step\n")
    monkeypatch.setattr(free_memory, "_GROUPS", ((str(tmp_path), "memory.max"),))
    monkeypatch.setattr(free_memory, "_OWN_GROUPS", str(tmp_path / "cgroup"))
    assert free_memory._group_limits() == [4096]
    monkeypatch.setattr(free_memory, "_OWN_GROUPS", str(tmp_path / "nothing"))
    assert free_memory._group_limits() == []


@pytest.mark.parametrize(
    ("share", "fitting"), [(0.7, "dtype: bfloat16 would fit"), (0.3, "no dtype would fit")]
)
def test_weights_that_do_not_fit(
    share: float, fitting: str, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(model_folder)
    size = sum(path.stat().st_size for path in checkpoint.weight_files())
    monkeypatch.setattr(
        free_memory, "host_limit", lambda: (int(size * share), "this job was given")
    )
    with pytest.raises(AtlasError, match=fitting):
        load(checkpoint, dtype="float32", device="cpu")
