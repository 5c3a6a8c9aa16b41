"""``report.html``: a comparison as one page that needs no other file and no network."""

import base64
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from matplotlib.figure import Figure

from evaluation.leaderboard import Line, about_merger, beyond, by_label

PAGES = Path(__file__).parent / "pages"


def report_page(
    lines: Sequence[Line],
    meta: Mapping[str, Any],
    figures: Mapping[str, Figure],
    captions: Mapping[str, str],
) -> str:
    """The page as text.

    Args:
        lines: Rows with their differences.
        meta: What ``leaderboard.meta.json`` holds.
        figures: Name -> picture, in the order in which they are shown.
        captions: Name -> what stands below.

    Returns:
        HTML with pictures, style and script inline.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sizes = sorted({line.scored.members for line in lines})
    last = [line for line in lines if line.scored.members == sizes[-1]]
    return environment.get_template("report.html").render(
        meta=meta,
        sizes=sizes,
        families=len(lines[0].scored.accuracies),
        seeded=any(line.scored.by_seed for line in lines),
        against=last[0].difference.against,
        rows=[_row(row, sizes, meta) for row in by_label(lines)],
        differences={size: _differences(lines, size) for size in sizes if len(sizes) > 1},
        summary=_summary(lines, sizes, meta),
        mergers={name: about_merger(name, told) for name, told in meta["mergers"].items()},
        pictures=[(captions[name], picture_source(figure)) for name, figure in figures.items()],
    )


def picture_source(figure: Figure) -> str:
    """A figure as the source of an image: SVG in base64, which no page has to fetch.

    Args:
        figure: The figure.

    Returns:
        A ``data:`` address.
    """
    buffer = BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "metamerge"}):  # the same bytes for the same figure
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _row(row: Mapping[int, Line], sizes: Sequence[int], meta: Mapping[str, Any]) -> dict[str, Any]:
    """Cells of the large table, each with what it is sorted by."""
    one = next(iter(row.values())).scored
    last = row.get(sizes[-1])
    kind = "control" if one.control else "merger" if one.method in meta["mergers"] else "merge"
    return {
        "method": one.method,
        "data": one.data,
        "kind": kind,
        "accuracies": [_accuracy(row.get(size)) for size in sizes],
        "last": None if last is None else last.record(),
        "beyond": "" if last is None else beyond(last.difference),
    }


def _accuracy(line: Line | None) -> dict[str, float] | None:
    if line is None:
        return None
    record = line.record()
    return {"mean": 100 * record["accuracy_mean"], "std": 100 * record["accuracy_std"]}


def _differences(lines: Sequence[Line], size: int) -> list[dict[str, Any]]:
    """Rows of the table of differences at one number of members."""
    return [
        {"label": line.scored.label, "beyond": beyond(line.difference), **line.record()}
        for line in lines
        if line.scored.members == size
    ]


def _summary(
    lines: Sequence[Line], sizes: Sequence[int], meta: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """For every number of members what mergers reach with weights alone, and what they have to."""
    found = []
    for size in sizes:
        own = [line.scored for line in lines if line.scored.members == size]
        bare = [one for one in own if one.data == "none"]
        chosen = [one for one in bare if one.method in meta["mergers"]]
        chosen += [one for one in bare if one.method in ("soft-vote ensemble", "average, aligned")]
        told = [{"method": s.method, "mean": 100 * float(s.accuracies.mean())} for s in chosen]
        found.append({"members": size, "rows": told})
    return found
