"""What was found in a user's file: everything that refuses it, told at once, and notes."""

from __future__ import annotations

from dataclasses import dataclass, field

from metamerge.errors import ConfigError, ZooError

_MOST_LINES = 100


@dataclass
class Findings:
    """Problems and notes of one file, collected while it is read and checked.

    Attributes:
        where: The file, as the user named it.
        counting: How its rows are counted.
        options: Problems with what the user asked for.
        problems: Problems with what the file holds.
        notes: What loading changed or noticed.
    """

    where: str
    counting: str
    options: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def refuse(self) -> None:
        """Raise one error that lists every problem, if there are any.

        Raises:
            ConfigError: If nothing is wrong but the options.
            ZooError: If the file holds something that no network should be trained on.
        """
        lines = self.options + self.problems
        if not lines:
            return
        number = f"{len(lines)} problem{'s' * (len(lines) > 1)}"
        text = f"load_task({self.where!r}): {number}; {self.counting}."
        text += "".join(f"\n  - {line}" for line in lines[:_MOST_LINES])
        if len(lines) > _MOST_LINES:
            text += f"\n  - and {len(lines) - _MOST_LINES} more."
        raise ZooError(text) if self.problems else ConfigError(text)
