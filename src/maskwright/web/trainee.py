"""The process that trains for the annotation page: `python -m maskwright.web.trainee PLAN.json PARENT`.

It ends when the server that has started it ends, however that ends.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from maskwright.errors import MaskwrightError


def watch(parent: int, every: float = 1.0) -> None:
    """End this process when the process `parent` has ended."""
    while os.getppid() == parent:
        time.sleep(every)
    os.kill(os.getpid(), signal.SIGTERM if sys.platform != "win32" else signal.SIGINT)
    time.sleep(30)  # time to save, then the end anyway
    os._exit(1)


def main(arguments: list[str]) -> int:
    """Train as a plan says; returns the exit code."""
    plan: dict[str, Any] = json.loads(Path(arguments[0]).read_bytes())
    threading.Thread(target=watch, args=(int(arguments[1]),), daemon=True).start()
    from maskwright.training import train

    try:
        train(plan["system"], plan["data"], out=plan["out"], val=plan["val"], **plan["recipe"])
    except MaskwrightError as error:
        Path(plan["out"]).mkdir(parents=True, exist_ok=True)
        (Path(plan["out"]) / "problem.txt").write_text(str(error), "utf-8", "backslashreplace")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
