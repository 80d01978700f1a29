"""A program that reads a run with the Client, tags it, keeps its connection, and waits for a word."""

import sys
import time
from pathlib import Path

from metaflow import Run, namespace

if __name__ == "__main__":
    pathspec, notes = sys.argv[1], Path(sys.argv[2])
    namespace(None)
    run = Run(pathspec)
    assert not run.finished
    run.add_tag("seen")
    for task in run["start"]:
        assert task.metadata_dict["attempt"] == "0"
    (notes / "reader").write_text("reads")
    until = time.monotonic() + 60
    while not (notes / "end-reader").exists() and time.monotonic() < until:
        time.sleep(0.02)
