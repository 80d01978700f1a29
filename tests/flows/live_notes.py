"""What the test flows share: notes that tell the tests which process runs what, and a place to wait."""

import os
import time
from pathlib import Path

from metaflow import current


def note(name, text=""):
    """Leaves NOTES/name, whole at once: this process, its parent, and a text."""
    folder = Path(os.environ["NOTES"])
    hidden = folder / ("." + name)
    hidden.write_text("%d %d %s" % (os.getpid(), os.getppid(), text))
    hidden.rename(folder / name)


def hold(what="", limit=120):
    """Notes STEP[what]-ATTEMPT and sleeps until the test says so by a file `go` or `go-` and that name."""
    name = "%s%s-%d" % (current.step_name, what, current.retry_count)
    note(name, current.pathspec)
    folder, until = Path(os.environ["NOTES"]), time.monotonic() + limit
    while not (folder / "go").exists() and not (folder / ("go-" + name)).exists():
        if time.monotonic() > until:
            raise SystemExit("nobody said go")
        time.sleep(0.02)
