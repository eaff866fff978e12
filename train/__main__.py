"""`python -m train` is `jmoe-train`."""

import logging
import os
import sys
import warnings

from train.cli import main as run


def main() -> None:
    """Runs the program and ends the process with its exit code."""
    _quiet_failed_saves()
    code = run()
    if code == 2:
        # What a failed save left running would print tracebacks while the interpreter shuts down.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _quiet_failed_saves() -> None:
    """Keeps stderr to one line when a checkpoint cannot be written: that of the error which is raised.

    Orbax gives up at the first write that fails, logs it, and closes its event loop. The writes still under
    way then find the loop closed, and the interpreter prints a traceback for each.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", r"coroutine .* was never awaited", RuntimeWarning)

    def report(unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = report


if __name__ == "__main__":
    main()
