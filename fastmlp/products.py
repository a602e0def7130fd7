"""Whose the products of a GPU are: the kernels' own, or torch's library's with our passes around them.

products.csv tells which was measured to be faster, by compute capability, dtype, product and size (the power
of two that its operations reach). What it does not know is the library's from 0.1 GFLOP on. Nothing is tried
out while a model runs: its bits would change from run to run.
"""

import csv
import os
from pathlib import Path

from fastmlp import _C

__all__ = ["OWNERS", "TABLE", "choose"]

OWNERS = ("own", "library", "table")
TABLE = Path(__file__).with_name("products.csv")


def choose(owner: str | None = None) -> None:
    """Pins all products to one owner, or leaves each to the table's.

    Args:
        owner: "own", "library" or "table"; None for what FASTMLP_PRODUCTS says, or else the table.

    Raises:
        ValueError: for another name.
    """
    owner = os.environ.get("FASTMLP_PRODUCTS", "table") if owner is None else owner
    if owner not in OWNERS:
        raise ValueError(f"FASTMLP_PRODUCTS: expected one of {', '.join(OWNERS)}, got {owner!r}")
    if _C.cuda is None:
        return
    with TABLE.open(newline="") as file:
        rows = [
            (
                int(row["architecture"].replace(".", "")),
                row["dtype"],
                row["product"],
                int(row["size"]),
                row["choice"],
            )
            for row in csv.DictReader(file)
        ]
    _C.use_products(owner, rows)
