"""Compare this library with what an original implementation answered.

    python tests/parity/run.py LAYOUT.json OUTPUTS.npz
    python tests/parity/run.py - OUTPUTS.npz             # operators, assignment, preprocessing: no weights needed

The layout is filled with the seed that the outputs name, written as the original's kind of file, and read back through
`maskwright.load`. Prints a line per recorded array with its relative error; exits with 1 if one is above its bound or
was not checked, with 2 if the pair cannot be run at all.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from tests.parity import checkers
from tests.parity.ledger import Ledger
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


def run(layout: Path | None, outputs: Path) -> Ledger:
    """All comparisons of one pair; the ledger holds the lines."""
    ledger = Ledger(outputs)
    with tempfile.TemporaryDirectory() as folder, first_in_order():
        if layout is None:
            checkers.without_weights(ledger)
        else:
            import maskwright

            about = ledger.about
            overrides = about.get("overrides") or about.get("weights_override") or {}
            path = write_checkpoint(layout, Path(folder), int(about.get("seed") or 0), overrides)
            torch.manual_seed(0)
            checkers.with_weights(maskwright.load(path), path, ledger)
    ledger.finish()
    return ledger


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
    return f"{ledger.name}: {len(ledger.lines) - ledger.failed} of {len(ledger.lines)} within bounds"


if __name__ == "__main__":
    sys.exit(main())
