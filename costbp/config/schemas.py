"""JSON schemas for editors, generated from the pydantic models (a test keeps them in step)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

from pydantic import TypeAdapter

from costbp.config.catalog import Catalog
from costbp.config.claims import Claims
from costbp.config.groups import Groups
from costbp.config.study import Study
from costbp.files import write_text


def schemas() -> dict[str, str]:
    """File name -> JSON schema text, for the study, the claims and each file of the catalog."""
    models: dict[str, TypeAdapter[Any]] = {
        "study": TypeAdapter(Study),
        "claims": TypeAdapter(Claims),
        "groups": TypeAdapter(Groups),
    }
    for kind, field in Catalog.model_fields.items():
        models[kind] = TypeAdapter(dict[str, get_args(field.annotation)[1]])  # type: ignore[arg-type, misc]
    return {
        f"{name}.schema.json": json.dumps(adapter.json_schema(), indent=2) + "\n"
        for name, adapter in models.items()
    }


def write(folder: Path) -> list[Path]:
    """Write all schemas to ``folder``; returns their paths."""
    paths = []
    for name, text in schemas().items():
        path = folder / name
        write_text(path, text)
        paths.append(path)
    return paths
