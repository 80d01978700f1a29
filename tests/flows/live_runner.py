"""A program that starts a run with Metaflow's Runner, as a notebook would."""

import sys
from pathlib import Path

from metaflow import Runner

if __name__ == "__main__":
    with Runner(str(Path(__file__).with_name("live_sleep.py")), show_output=False).run() as running:
        print(running.run.pathspec, running.status, running.run.successful)
        sys.exit(running.status != "successful")
