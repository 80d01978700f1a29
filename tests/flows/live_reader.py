"""A program that reads a run with the Client, tags it, keeps its connection, and waits for a word."""

import os
import sys
import time
from pathlib import Path

from live_notes import note
from metaflow import Run, namespace

if __name__ == "__main__":
    pathspec, notes = sys.argv[1], Path(os.environ["NOTES"])
    namespace(None)
    run = Run(pathspec)
    assert not run.finished
    run.add_tag("seen")
    for task in run["start"]:
        assert task.metadata_dict["attempt"] == "0"
    note("reader")
    until = time.monotonic() + 60
    while not (notes / "end-reader").exists() and time.monotonic() < until:
        time.sleep(0.02)
