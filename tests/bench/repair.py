"""The repair workflow on portraits that a stand-in for an instruction editor edited.

    python tests/bench/repair.py --json tests/bench/results/repair.json

The editor makes the true edit, zooms and shifts the picture by 1 to 3 % and tints it; Change Mask
and Composite Edit, at their defaults, keep the edit and restore the rest. "outside" is the PSNR
against the source where the true edit changes nothing, at most 100 dB; "kept" the share of the
true edit that is in the picture, 1 less the absolute error in parts of the edit.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from torch import Tensor

from bench.lab import Row, arguments, report
from host import base, inprocess
from host.repairs import Repair, repairs

sizes = (128, 256)
wanted_psnr, wanted_share = 40.0, 0.95
columns = [
    *("method", "size", "outside", "least_outside", "from_40_db"),
    *("kept", "least_kept", "from_95", "bit_exact"),
]


def row(method: str, size: int, cases: list[Repair], images: list[Tensor]) -> Row:
    """Figures of one method: means, the worst, and how many are as wanted."""
    pairs = list(zip(cases, images, strict=True))
    outside = [case.outside(image) for case, image in pairs]
    kept = [case.kept(image) for case, image in pairs]
    exact = [float((image == case.source).all(1).float().mean()) for case, image in pairs]
    return {
        "method": method,
        "size": size,
        "outside": statistics.mean(outside),
        "least_outside": min(outside),
        "from_40_db": sum(value >= wanted_psnr for value in outside),
        "kept": statistics.mean(kept),
        "least_kept": min(kept),
        "from_95": sum(value >= wanted_share for value in kept),
        "bit_exact": statistics.mean(exact),
    }


def main() -> None:
    """Edit, repair, and judge."""
    options = arguments(__doc__.splitlines()[0], 100)
    inprocess.start(base.make_base(Path(tempfile.mkdtemp(prefix="pinpoint-bench-"))))
    rows = []
    for size in sizes:
        cases = repairs("held-out", options.seed, options.count, size)
        rows.append(row("edited", size, cases, [case.edited for case in cases]))
        unaligned = repairs(
            "held-out", options.seed, options.count, size, align="none", match_colors=False
        )
        rows.append(row("not aligned", size, cases, [case.repaired for case in unaligned]))
        rows.append(row("repaired", size, cases, [case.repaired for case in cases]))
    report(rows, columns, options.json, notes)


notes = f"""Of "outside" and "kept" the mean and the worst; "from_40_db" and "from_95" count the
portraits that reach {wanted_psnr:g} dB and {wanted_share:.0%}; "bit_exact" is the mean share of
pixels that are the source's to the last bit. "not aligned" is Change Mask without registration."""


if __name__ == "__main__":
    main()
