"""What other packages publish: strategies, statistics and architectures under the entry-point groups of moeprune.

An entry point is looked up when its name is not built in. One that cannot be used is an error that names its package.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from moeprune.errors import ConfigError, first_line

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

Kind = Literal["strategy", "statistic", "architecture"]
GROUPS: dict[Kind, str] = {
    "strategy": "moeprune.strategies",
    "statistic": "moeprune.statistics",
    "architecture": "moeprune.architectures",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlugIn:
    """One thing that a package publishes.

    Attributes:
        kind: what it shall be.
        name: what users call it.
        package: name and version of the package.
        point: where the object is.
    """

    kind: Kind
    name: str
    package: str
    point: EntryPoint

    def load(self) -> object:
        """The object.

        Raises:
            ConfigError: importing it fails, in whatever way.
        """
        try:
            return self.point.load()
        except Exception as error:
            raise self.problem(f"cannot be loaded: {type(error).__name__}: {first_line(error)}") from error

    def problem(self, what: str) -> ConfigError:
        """The error that says what is wrong with it."""
        return ConfigError(
            f"the {self.kind} {self.name!r} of {self.package} {what}",
            f"it is published as {self.point.value}: repair the package, or uninstall it",
        )


def published(kind: Kind) -> list[PlugIn]:
    """All that is published of a kind, by name and package."""
    from importlib.metadata import entry_points

    found = [
        PlugIn(
            kind=kind,
            name=point.name,
            package=f"{point.dist.name} {point.dist.version}" if point.dist else "a package without a name",
            point=point,
        )
        for point in entry_points(group=GROUPS[kind])
    ]
    return sorted(found, key=lambda plug_in: (plug_in.name, plug_in.package))


def published_names(kind: Kind) -> list[str]:
    """Names of all that is published of a kind."""
    return [plug_in.name for plug_in in published(kind)]


def find_plug_in(kind: Kind, name: str) -> PlugIn | None:
    """The one that has a name; None where there is none.

    Raises:
        ConfigError: several packages publish it.
    """
    found = [plug_in for plug_in in published(kind) if plug_in.name == name]
    if len(found) > 1:
        raise ambiguous(found)
    return found[0] if found else None


def ambiguous(found: Sequence[PlugIn]) -> ConfigError:
    """The error for a name that several packages publish."""
    packages = " and ".join(plug_in.package for plug_in in found)
    return ConfigError(f"{packages} publish a {found[0].kind} {found[0].name!r} each", "uninstall all but one of them")
