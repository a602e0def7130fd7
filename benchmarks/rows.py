"""CSV files of results: read, written, and brought up to date. It needs nothing but Python."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """A CSV file of one or more rows, which all have the columns of the first."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def merged(
    old: Sequence[Mapping[str, object]], new: Sequence[Mapping[str, object]], keys: Sequence[str]
) -> list[Mapping[str, object]]:
    """The new rows, one or more, after those of the old ones that agree with none of them in all keys.

    All have the columns of the new rows.
    """

    def key(row: Mapping[str, object]) -> tuple[str, ...]:
        return tuple(str(row.get(name, "")) for name in keys)

    replaced = {key(row) for row in new}
    kept = [row for row in old if key(row) not in replaced]
    return [*({name: row.get(name, "") for name in new[0]} for row in kept), *new]


def update_rows(path: Path, rows: Sequence[Mapping[str, object]], keys: Sequence[str]) -> None:
    """Puts one or more rows into a CSV file, in the place of those that agree with one in all keys."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")  # who is stopped here leaves the file as it was
    write_rows(unfinished, merged(read_rows(path), rows, keys))
    unfinished.replace(path)
