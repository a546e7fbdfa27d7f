"""figures.json: every single figure of a run, written as they come, so that a run that is stopped keeps them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.places import BenchError

FILE = "figures.json"


class Figures:
    """The document of one run and the folder it is in. `document` is what the report is made from."""

    def __init__(self, folder: Path, document: dict[str, Any]) -> None:
        self.folder = folder
        self.document = document

    @classmethod
    def resumed(cls, folder: Path, options: dict[str, Any]) -> Figures:
        """Those of a run that was stopped. They must have been measured with the same options."""
        try:
            document: dict[str, Any] = json.loads((folder / FILE).read_text())
        except (OSError, ValueError) as error:
            raise BenchError(f"--resume: {folder / FILE} cannot be read: {error}") from error
        # what went through JSON: tuples have become lists
        if document.get("options") != json.loads(json.dumps(options)):
            raise BenchError(f"--resume: {folder} was measured with other options: {document.get('options')}")
        document.pop("incomplete", None)
        return cls(folder, document)

    def save(self) -> None:
        """Write the file anew; a reader sees the old one or the new one whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".{FILE}.tmp"
        temporary.write_text(json.dumps(self.document, indent=1) + "\n")
        temporary.rename(self.folder / FILE)

    def rows(self, key: str) -> list[dict[str, Any]]:
        """A list in the document that grows."""
        rows: list[dict[str, Any]] = self.document.setdefault(key, [])
        return rows

    def complete(self, key: str, count: int, **cell: object) -> bool:
        """Whether the rows of one cell are all there. Those of a cell that was stopped in between are removed."""
        rows = self.rows(key)
        found = [row for row in rows if all(row[name] == value for name, value in cell.items())]
        if len(found) >= count:
            return True
        rows[:] = [row for row in rows if row not in found]
        return False

    @property
    def empty(self) -> bool:
        return not any(
            self.document.get(key)
            for key in ("samples", "first_packets", "north_south", "pods", "policy", "cni", "control_plane")
        )
