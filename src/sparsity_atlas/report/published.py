"""Critical sparsities that arXiv 2509.00454 publishes, to stand beside our own.

Average over the paper's nine tasks at 99 % of dense accuracy, top-p, in percent. Only what was
printed or drawn: nothing here is computed.
"""

from __future__ import annotations

from dataclasses import dataclass

SECOND_HAND = "arXiv 2509.00454v1, Table 1, copied second-hand"
FROM_FIGURE = (
    "read off a figure of the authors' blog, ±1 point; "
    "that its four markers are Gemma 3 is inferred"
)
ROUGHLY = f"{FROM_FIGURE}; this marker is hard to read"


@dataclass(frozen=True)
class Published:
    """One published value.

    percent: critical sparsity.
    source: where it is from and how far to trust it.
    """

    percent: float
    source: str


def _table(values: dict[str, tuple[float, ...]]) -> dict[str, dict[str, Published]]:
    sites = ("intermediate", "input", "gate", "up")
    return {
        model: {s: Published(v, SECOND_HAND) for s, v in zip(sites, row, strict=True)}
        for model, row in values.items()
    }


def _figure(values: dict[str, tuple[float, ...]]) -> dict[str, dict[str, Published]]:
    sites = ("intermediate", "input", "gate", "up", "all_inputs")
    return {
        model: {s: Published(v, FROM_FIGURE) for s, v in zip(sites, row, strict=True)}
        for model, row in values.items()
    }


# By Hub id and site.
PUBLISHED = _table(
    {
        "Qwen/Qwen2.5-0.5B": (46.54, 42.01, 17.16, 29.20),
        "Qwen/Qwen2.5-1.5B": (50.49, 40.12, 25.93, 35.50),
        "Qwen/Qwen2.5-3B": (71.16, 39.40, 39.58, 43.46),
        "Qwen/Qwen2.5-7B": (60.98, 47.89, 37.25, 43.05),
        "Qwen/Qwen2.5-14B": (71.66, 47.39, 48.04, 52.25),
        "Qwen/Qwen2.5-32B": (65.66, 54.08, 40.20, 52.46),
        "Qwen/Qwen2.5-0.5B-Instruct": (43.92, 32.80, 24.60, 32.12),
        "Qwen/Qwen2.5-1.5B-Instruct": (52.93, 32.50, 27.63, 32.99),
        "Qwen/Qwen2.5-3B-Instruct": (59.80, 44.16, 36.90, 36.32),
        "Qwen/Qwen2.5-7B-Instruct": (59.95, 47.01, 32.58, 40.62),
        "Qwen/Qwen2.5-14B-Instruct": (69.35, 50.10, 41.87, 49.04),
        "Qwen/Qwen2.5-32B-Instruct": (68.77, 55.17, 40.54, 57.35),
    }
) | _figure(
    {
        "google/gemma-3-1b-pt": (49.9, 31.9, 23.1, 30.1, 35.9),
        "google/gemma-3-4b-pt": (62.5, 42.1, 35.7, 40.7, 47.7),
        "google/gemma-3-12b-pt": (78.6, 50.6, 55.4, 54, 61.4),
        "google/gemma-3-27b-pt": (83.8, 59.5, 68.0, 57, 74.1),
    }
)
for _model in ("google/gemma-3-12b-pt", "google/gemma-3-27b-pt"):
    PUBLISHED[_model]["up"] = Published(PUBLISHED[_model]["up"].percent, ROUGHLY)
