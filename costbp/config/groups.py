"""Groups of entries, and the names in a study: each is an entry's or a group's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import Field

from costbp.config.catalog import Catalog, ModelEntry
from costbp.config.entries import EntryName, Strict
from costbp.config.read import Loc, Sources, blame, dotted, validate
from costbp.config.yaml_file import read_yaml
from costbp.errors import UserError, suggest

Kind = Literal["methods", "models", "tasks", "budgets"]
Groups = dict[Kind, dict[EntryName, Annotated[tuple[str, ...], Field(min_length=1)]]]
Part = TypeVar("Part", bound=Strict)


def load_groups(folder: Path, catalog: Catalog) -> Groups:
    """The groups in ``groups.yaml`` of a catalog folder; none where there is no such file.

    Raises:
        UserError: a member is no entry, or a group has an entry's name.
    """
    path = folder / "groups.yaml"
    if not path.exists():
        return {}
    data = read_yaml(path)
    groups = validate(Groups, data, [(path, data)])
    for kind, found in groups.items():
        entries = getattr(catalog, kind)
        for name, members in found.items():
            if name in entries:
                raise UserError(
                    f"{path}: {kind}.{name}: an entry of {kind}.yaml has this name, too"
                )
            for place, member in enumerate(members):
                if member not in entries:
                    raise UserError(
                        f"{path}: {dotted((kind, name, place))} = '{member}' is not in {kind}.yaml; "
                        f"{suggest(member, entries)}"
                    )
    return groups


@dataclass(frozen=True)
class Names:
    """What a study's names may stand for.

    Attributes:
        folder: of the catalog.
        sources: the study's files.
    """

    catalog: Catalog
    groups: Groups
    folder: Path
    sources: Sources

    def resolve(self, part: Part, loc: Loc, wrong: Callable[[ModelEntry], str]) -> Part:
        """``part`` of a study, at ``loc``, with entries in place of groups, each once.

        Args:
            wrong: why a model can't stand there; empty where it can.

        Raises:
            UserError: a name is neither an entry's nor a group's, or a model can't stand there.
        """
        found: dict[str, tuple[str, ...]] = {}
        for kind in KINDS:
            groups = self.groups.get(kind, {})
            names: dict[str, None] = {}
            for place, name in enumerate(getattr(part, kind, None) or ()):
                members = groups.get(name, (name,))
                names |= dict.fromkeys(members)
                self.check(kind, members, (*loc, kind, place), wrong)
            if names:
                found[kind] = tuple(names)
        if name := getattr(part, "model", None):
            self.check("models", (name,), (*loc, "model"), wrong)
        return part.model_copy(update=found)

    def check(
        self, kind: Kind, names: tuple[str, ...], loc: Loc, wrong: Callable[[ModelEntry], str]
    ) -> None:
        """Refuse names that are not in the catalog, and models that can't stand at ``loc``."""
        entries = getattr(self.catalog, kind)
        for name in names:
            where = f"{blame(self.sources, loc)}: {dotted(loc)} = '{name}'"
            if name not in entries:
                raise UserError(
                    f"{where} is not in {self.folder / kind}.yaml; "
                    f"{suggest(name, [*entries, *self.groups.get(kind, ())])}"
                )
            if kind == "models" and (why := wrong(entries[name])):
                usable = [key for key, entry in entries.items() if not wrong(entry)]
                raise UserError(f"{where} {why}; allowed: {', '.join(usable)}")


KINDS: tuple[Kind, ...] = ("models", "tasks", "methods", "budgets")
