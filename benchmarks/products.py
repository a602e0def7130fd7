"""Which products a GPU computes by our kernels, and which by the library's: makes fastmlp/products.csv.

Of what kernels.py has measured with FASTMLP_PRODUCTS=own, products of about the same size share a choice:
those whose operations have the same whole part of the binary logarithm. Ours is chosen where it is known to
win: on the geometric mean over torch's operations, and nowhere more than 3 % slower. Choices for other
architectures and dtypes stay as they are.
"""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import geometric_mean

from rows import merged, read_rows, write_rows

RESULTS = Path(__file__).parent / "results"
TABLE = Path(__file__).parents[1] / "fastmlp" / "products.csv"

PRODUCTS = ("forward", "dW", "dx", "chain forward", "chain backward")
# Times as fast as torch's operations: more than this on the mean, and nowhere less than that.
LEAST_MEAN, LEAST = 1.0, 0.97

Row = Mapping[str, object]


def size(row: Mapping[str, str]) -> int:
    """The whole part of log2 of the operations of a product, or of those of all layers of a chain."""
    widths = [int(row["K"]), *map(int, filter(None, row["hidden"].split("-"))), int(row["N"])]
    return (2 * int(row["M"]) * sum(k * n for k, n in pairwise(widths))).bit_length() - 1


def choices(measured: Iterable[Mapping[str, str]]) -> list[Row]:
    """A row for each class of products that has been measured."""
    classes: dict[tuple[str, str, str, int], list[Mapping[str, str]]] = {}
    for row in measured:
        if row["products"] == "own":
            key = row["architecture"], row["dtype"], row["product"], size(row)
            classes.setdefault(key, []).append(row)
    table: list[Row] = []
    for key, own in classes.items():
        over_stock = [float(row["over_stock_p50"]) for row in own if row["over_stock_p50"]]
        mean = geometric_mean(over_stock) if over_stock else 0.0
        wins = len(over_stock) == len(own) and mean > LEAST_MEAN and min(over_stock) >= LEAST
        where = ("gpu", "driver", "cuda", "torch", "fastmlp", "commit")
        table.append(
            {
                **dict(zip(("architecture", "dtype", "product", "size"), key, strict=True)),
                "choice": "own" if wins else "library",
                "over_stock": f"{mean:.4f}" if over_stock else "",
                "shapes": len(own),
                **{name: " and ".join(dict.fromkeys(row[name] for row in own)) for name in where},
            }
        )
    return table


def in_order(row: Row) -> tuple[object, ...]:
    """By architecture, dtype, product and size."""
    architecture = [*map(int, str(row["architecture"]).split("."))]
    return architecture, row["dtype"], PRODUCTS.index(str(row["product"])), int(str(row["size"]))


def ranges(sizes: Sequence[int]) -> str:
    """Sorted sizes, of which three or more in a row are written as the first and the last: 10 18-22."""
    words: list[list[int]] = []
    for value in sizes:
        if words and value == words[-1][-1] + 1:
            words[-1].append(value)
        else:
            words.append([value])
    return " ".join(f"{own[0]}-{own[-1]}" if len(own) > 2 else " ".join(map(str, own)) for own in words)


def in_words(table: Iterable[Row]) -> list[str]:
    """For each architecture and dtype, the sizes at which each product is the library's."""
    words: dict[str, dict[str, list[int]]] = {}
    for row in table:
        own = words.setdefault(f"{row['architecture']} {row['dtype']}", {})
        sizes = own.setdefault(str(row["product"]), [])
        if row["choice"] == "library":
            sizes.append(int(str(row["size"])))
    return [
        f"{name}: " + "; ".join(f"{product} {ranges(sizes) or 'none'}" for product, sizes in own.items())
        for name, own in words.items()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Brings the table up to date and prints it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--results", type=Path, default=RESULTS, metavar="DIR", help="where kernels_cuda.csv is (results/)")
    add("--output", type=Path, default=TABLE, metavar="FILE", help="the table (fastmlp/products.csv)")
    options = parser.parse_args(argv)
    new = choices(read_rows(options.results / "kernels_cuda.csv"))
    if not new:
        parser.error(f"no product that is our own is measured in {options.results}/kernels_cuda.csv")
    table = sorted(merged(read_rows(options.output), new, ("architecture", "dtype")), key=in_order)
    write_rows(options.output, table)
    print("the library's, by the binary logarithm of the operations:", *in_words(table), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
