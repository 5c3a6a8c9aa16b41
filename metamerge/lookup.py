"""Records of one kind, by name: taken up once, and looked up with a suggestion."""

from dataclasses import dataclass, field
from importlib import import_module
from typing import Generic, TypeVar

from metamerge.declaration import Record, origin, suggestion
from metamerge.errors import ConfigError

AnyRecord = TypeVar("AnyRecord", bound=Record)


@dataclass(frozen=True)
class Register(Generic[AnyRecord]):
    """Records of one kind, by name.

    Attributes:
        kind: What they are records of, such as ``merge method``.
        argument: The argument by which users choose among them.
        package: What has to be imported for all of them to be there.
        expected: How messages say what the argument may be, in front of the names.
        records: Name -> record.
    """

    kind: str
    argument: str
    package: str
    expected: str = "one of"
    records: dict[str, AnyRecord] = field(default_factory=dict)

    def enter(self, record: AnyRecord) -> None:
        """Take up a record.

        Args:
            record: The record; that of a module that runs a second time replaces the first.

        Raises:
            ConfigError: If another function has the name.
        """
        known = self.records.get(record.name)
        if known is not None and origin(known.function) != origin(record.function):
            raise ConfigError(
                f"{origin(record.function)}: there is a {self.kind} {record.name!r} already, "
                f"{origin(known.function)}. Give one of the two another name."
            )
        self.records[record.name] = record

    def names(self) -> list[str]:
        """All names, sorted."""
        import_module(self.package)
        return sorted(self.records)

    def get(self, name: str) -> AnyRecord:
        """Look up a record.

        Args:
            name: Its name.

        Returns:
            The record.

        Raises:
            ConfigError: If there is none; suggests what could have been meant.
        """
        known = self.names()
        if name not in known:
            raise ConfigError(
                f"{self.argument}: got {name!r}.{suggestion(name, known)} Expected {self.expected} "
                f"{', '.join(map(repr, known))}."
            )
        return self.records[name]
