"""``report.md``: a comparison as a page of Markdown, for a repository."""

from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.leaderboard import Line, about_merger, accuracy_text, beyond, by_label


def report_markdown(
    lines: Sequence[Line], meta: Mapping[str, Any], pictures: Mapping[str, str]
) -> str:
    """The table, pictures, gates and the protocol.

    Args:
        lines: Rows with their differences.
        meta: What ``leaderboard.meta.json`` holds.
        pictures: File of each picture, beside the page -> its caption.

    Returns:
        Text that ends in a line break.
    """
    sizes = sorted({line.scored.members for line in lines})
    families = len(lines[0].scored.accuracies)
    last = next(line for line in lines if line.scored.members == sizes[-1])
    spread = f", mean ± standard deviation over {families} families" if families > 1 else ""
    task, images = meta["task"]["name"], meta["images"]
    heads = ["method", "images", *(f"K={size}" for size in sizes), "s"]
    heads.append(f"beyond {last.difference.against}, K={sizes[-1]}")
    parts = [
        f"# {task}: one network out of K",
        "",
        f"Accuracy in % on {images['test']:,} test images{spread}. *Controls in italics*, "
        "**mergers in bold**; images: what a row was given at merge time; s: seconds per family.",
        *(f"\n{note}" for note in meta["notes"]),
        "",
        f"| {' | '.join(heads)} |",
        f"|{'---|' * len(heads)}",
        *(_row(row, sizes, meta) for row in by_label(lines)),
        "",
    ]
    for file, caption in pictures.items():
        parts += [f"![{caption}]({file})", "", caption, ""]
    parts += ["## Mergers", ""]
    parts += [f"- {line}" for name in meta["mergers"] for line in _about(name, meta)]
    parts += ["", "## Protocol", ""]
    parts += [f"- {name}: {text}" for name, text in meta["protocol"].items()]
    counted = ", ".join(f"{part} {count:,}" for part, count in images.items())
    parts += [f"- images: {counted}; no image is in two parts"]
    parts += ["", "## Again", "", "```", meta["command"], "```"]
    return "\n".join(parts) + "\n"


def _about(name: str, meta: Mapping[str, Any]) -> list[str]:
    return about_merger(name, meta["mergers"][name])


def _row(row: Mapping[int, Line], sizes: Sequence[int], meta: Mapping[str, Any]) -> str:
    one, last = next(iter(row.values())).scored, row.get(sizes[-1])
    marks = "*" if one.control else "**" if one.method in meta["mergers"] else ""
    cells = [f"{marks}{_plain(one.method)}{marks}", one.data]
    cells += [accuracy_text(row.get(size)) for size in sizes]
    if last is None:
        return f"| {' | '.join([*cells, '', ''])} |"
    star = r"\*" if last.difference.significant else ""
    points = beyond(last.difference).rstrip("* ")
    return f"| {' | '.join([*cells, f'{last.scored.seconds:.2f}', f'{points}{star}'])} |"


def _plain(text: str) -> str:
    """Text that does not end a cell or start a mark."""
    for sign in ("\\", "|", "*", "<", "`", "_"):
        text = text.replace(sign, f"\\{sign}")
    return text.replace("\n", " ")
