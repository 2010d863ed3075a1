"""Compare this library with what an original implementation answered.

    python tests/parity/run.py LAYOUT.json OUTPUTS.npz
    python tests/parity/run.py - OUTPUTS.npz             # operators, assignment, preprocessing: no weights needed

The layout is filled with the seed that the outputs name, written as the original's kind of file, and read back through
`maskwright.load`. Prints a line per recorded array with its relative error; exits with 1 if one is above its bound or
was not checked, with 2 if the pair cannot be run at all. A recording may have only some of the arrays of an original:
what it does not have is not compared, and arrays whose comparison needs absent ones are listed as skipped.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from maskwright.systems import System
from tests.parity import checkers
from tests.parity.ledger import Ledger, part
from tests.parity.weights import write_checkpoint


@contextmanager
def first_in_order():
    """The references' samples are the first in index order: their `torch.randperm` was `torch.arange`."""
    original = torch.randperm
    torch.randperm = lambda n, **keywords: torch.arange(n, **{k: v for k, v in keywords.items() if k != "generator"})
    try:
        yield
    finally:
        torch.randperm = original


def stated(ledger: Ledger) -> dict[str, Any]:
    """Options that no file of weights holds and that the outputs state: the epsilon of torchvision's frozen norms, 0 or
    1e-5 whichever way they were made; how much of the backbone was frozen while gradients were taken."""
    backbone: dict[str, Any] = {}
    epsilon = ledger.about.get("frozen_bn_eps")
    if isinstance(epsilon, int | float):
        backbone["norm_eps"] = float(epsilon)
    if "no_grad_names" in ledger.arrays:
        frozen = frozen_parts([str(n) for n in ledger.arrays["no_grad_names"]])
        if frozen is not None:
            backbone["frozen"] = frozen
    return ({"backbone": backbone} if backbone else {}) | checkers.stated(ledger.about)


def frozen_parts(names: list[str]) -> int | None:
    """How many parts of a ResNet these parameters without a gradient are: the stem and the stages after it, as
    detectron2 and torchvision name them. None if they are another network's."""
    trunk = r"backbone\.(?:bottom_up\.|body\.)?(?:(stem|conv1|bn1)|res(\d)|layer(\d))\."
    found = [re.match(trunk, n) for n in names if n]
    if not all(found):
        return None
    parts = {0 if m[1] else int(m[2]) - 1 if m[2] else int(m[3]) for m in found if m}
    return len(parts) if parts == set(range(len(parts))) else None


def load(layout: Path, ledger: Ledger, folder: Path) -> System:
    """The system that the outputs are of, read from a file such as the original's."""
    import maskwright

    about, options = ledger.about, stated(ledger)
    overrides = about.get("overrides") or about.get("weights_override") or {}
    if isinstance(overrides, str):  # in words: the recording beside it has the values
        overrides = Ledger(ledger.path.with_name(ledger.path.name.replace("-grad", ""))).about["overrides"]
    path = write_checkpoint(layout, folder, int(about.get("seed", about.get("weights_seed")) or 0), overrides)
    torch.manual_seed(0)
    return maskwright.load(path, **options)


def run(layout: Path | None, outputs: Path, system: System | None = None) -> Ledger:
    """All comparisons of one pair; the ledger holds the lines. `system`: already loaded, for several outputs of one."""
    ledger = Ledger(outputs)
    with tempfile.TemporaryDirectory() as folder, first_in_order():
        whole(system, layout, ledger, Path(folder))
    ledger.finish()
    if not ledger.lines or ledger.skipped == len(ledger.lines):
        needs = f": it needs {', '.join(ledger.missing)}" if ledger.missing else ""
        raise LookupError(f"nothing of it can be compared{needs}")
    return ledger


@part
def whole(system: System | None, layout: Path | None, ledger: Ledger, folder: Path) -> None:
    if layout is None:
        return checkers.without_weights(ledger)
    checkers.with_weights(system or load(layout, ledger, folder), layout, ledger)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layout", help="keys and shapes of a checkpoint, or - for none")
    parser.add_argument("outputs", type=Path, help="what the original answered")
    arguments = parser.parse_args()
    try:
        ledger = run(None if arguments.layout == "-" else Path(arguments.layout), arguments.outputs)
    except (OSError, LookupError, ValueError) as error:
        print(f"{arguments.outputs}: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        from maskwright.errors import MaskwrightError

        if not isinstance(error, MaskwrightError):
            raise
        print(error, file=sys.stderr)
        return 2
    print("\n".join(ledger.lines))
    print(f"{outputs_line(ledger)}")
    return int(ledger.failed > 0)


def outputs_line(ledger: Ledger) -> str:
    compared = len(ledger.lines) - ledger.skipped
    skipped = f", {ledger.skipped} without their inputs" if ledger.skipped else ""
    return f"{ledger.name}: {compared - ledger.failed} of {compared} within bounds{skipped}"


if __name__ == "__main__":
    sys.exit(main())
