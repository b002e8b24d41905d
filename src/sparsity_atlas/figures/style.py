"""How figures look: sizes for print, colours and marks that also read without colour."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.typing import RcKeyType
from PIL import Image

from sparsity_atlas.files.whole import write_atomically
from sparsity_atlas.terms import BESIDE, layers_named, parts_named, plain

# Inches: one and two columns of a printed page, and the height of its text.
NARROW, WIDE, TALL = 3.5, 7.2, 9.4
GREY = "0.35"
SUFFIXES = ("svg", "png")
SCREEN_DPI, SCREEN_COLORS = 110, 64

RC: dict[RcKeyType, Any] = {
    "font.family": "DejaVu Sans",  # comes with Matplotlib, so that figures are the same everywhere
    "font.size": 7.5,
    "axes.titlesize": 7.5,
    "axes.labelsize": 7.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "text.parse_math": False,  # a $ in a name is a $
    "savefig.dpi": 200,
    "svg.fonttype": "path",
    "svg.hashsalt": "sparsity-atlas",
}


Dashes = Literal["-", "--", "-.", ":"] | tuple[float, tuple[float, ...]]


@dataclass(frozen=True)
class Mark:
    """Colour, marker and dashes of one line."""

    color: tuple[float, float, float]
    marker: str
    dashes: Dashes


_COLORS = sns.color_palette("colorblind")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
_DASHES: tuple[Dashes, ...] = (
    "-",
    "--",
    "-.",
    ":",
    (0, (5, 1, 1, 1, 1, 1)),
    (0, (1, 1)),
    (0, (7, 2)),
)


def _mark(index: int) -> Mark:
    return Mark(
        _COLORS[index % len(_COLORS)],
        _MARKERS[index % len(_MARKERS)],
        _DASHES[index % len(_DASHES)],
    )


# Fixed, so that a site looks the same in every figure of every run.
SITE_MARKS = {
    "intermediate": _mark(0),
    "input": _mark(1),
    "gate": _mark(2),
    "up": _mark(4),
    "all_inputs": _mark(3),
    "qkv_input": _mark(5),
    "o_input": _mark(7),
    "all_linear_inputs": _mark(9),
}


def marks(names: Sequence[str]) -> dict[str, Mark]:
    """Marks of sites, or of criteria in the run's order."""
    return {name: _site_mark(name) or _mark(index) for index, name in enumerate(names)}


def _site_mark(name: str) -> Mark | None:
    """A site's mark; confined to parts or layers, in the site's colour with another marker and dashes."""
    mark = SITE_MARKS.get(plain(name))
    parts, layers = parts_named(name), layers_named(name)
    if mark is None or not (parts or layers):
        return mark
    place = sum(2**index for index, part in enumerate(BESIDE) if part in parts)
    place += 1 + layers[0] + len(layers) if layers else 0
    return Mark(
        mark.color,
        _MARKERS[(_MARKERS.index(mark.marker) + place) % len(_MARKERS)],
        _DASHES[(_DASHES.index(mark.dashes) + place) % len(_DASHES)],
    )


@contextmanager
def styled() -> Iterator[None]:
    """Draw with our settings and no others."""
    matplotlib.use("agg")
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(RC)
        yield


def shorten(name: str, width: int) -> str:
    """A name cut in its middle where it is too long; ends tell versions and sizes apart."""
    if len(name) <= width:
        return name
    head = (width - 1) // 2
    return f"{name[:head]}…{name[head + 1 - width :]}"


def heading(*parts: str, width: int = 27) -> str:
    """A panel's title: its parts on one line if they fit, else each on its own."""
    line = " · ".join(parts)
    return line if len(line) <= width else "\n".join(shorten(part, width) for part in parts)


def broken(name: str, width: int) -> str:
    """A name on lines of at most `width` characters, where `_`, `@` and `+` in it allow that."""
    lines = [""]
    for piece in re.split(r"(?<=[_@+])", name):
        if lines[-1] and len(lines[-1] + piece) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(lines)


def wrap(text: str, width: int) -> str:
    """Words on lines of at most `width` characters."""
    return "\n".join(textwrap.wrap(text, width))


# Nothing in a file that another day or another release of Matplotlib would write differently.
# How the SVG of a figure for what a run did not measure says so, for the report to leave it out.
NOTHING = "nothing to show"
_METADATA = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}


class NothingToShow(Figure):
    """A figure for what the run did not measure: it only says why."""


def shows_nothing(svg: bytes) -> bool:
    """Whether a saved figure is a `NothingToShow`."""
    return f"<dc:description>{NOTHING}</dc:description>".encode() in svg


def arrange(figure: Figure) -> None:
    """Lay the figure out once and for all, so that it costs no second time to save it again."""
    engine = figure.get_layout_engine()
    if engine is not None and figure.axes:
        # The second pass sees the labels that the first one made room for.
        engine.execute(figure)
        engine.execute(figure)
    # Not "none", which is a layout of its own: before it is saved, all is drawn for that once more.
    figure.set_layout_engine(None)


def save(figure: Figure, path: Path) -> None:
    """Write a figure in the format of the path's suffix; the same figure gives the same bytes."""
    suffix = path.suffix.removeprefix(".")
    metadata: dict[str, str | None] = {**_METADATA[suffix]}
    if isinstance(figure, NothingToShow):
        metadata["Description"] = NOTHING
    write_atomically(path, lambda file: figure.savefig(file, format=suffix, metadata=metadata))


def to_svg(figure: Figure) -> bytes:
    """A figure as the bytes of an SVG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata=_METADATA["svg"])
    return buffer.getvalue()


def to_screen(figure: Figure) -> bytes:
    """A figure as the bytes of a small PNG file, for a screen."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata=_METADATA["png"], dpi=SCREEN_DPI)
    return fewer_colors(buffer.getvalue())


def fewer_colors(content: bytes) -> bytes:
    """A PNG file in few colours, a third of its size."""
    buffer = io.BytesIO()
    image = Image.open(io.BytesIO(content)).convert("RGB")
    image.quantize(SCREEN_COLORS).save(buffer, "png", optimize=True)
    return buffer.getvalue()
