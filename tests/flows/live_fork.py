"""User code that forks a child, which holds the task's sockets open and outlives it."""

import os
import time
from pathlib import Path

from live_notes import hold, note
from metaflow import FlowSpec, Parameter, current, step


def leave_a_child():
    """Forks; the child is detached from the output but not from the sockets, and stays until told."""
    attempt = current.retry_count
    if os.fork():
        return
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    note("child-%d" % attempt)
    until = time.monotonic() + 120
    while not (Path(os.environ["NOTES"]) / "end-children").exists() and time.monotonic() < until:
        time.sleep(0.05)
    os._exit(0)


class LiveFork(FlowSpec):
    how = Parameter("how", default="finish", help="how the task goes on: finish or hold")

    @step
    def start(self):
        if current.retry_count == 0:
            leave_a_child()
        if self.how == "hold":
            hold()
        self.next(self.end)

    @step
    def end(self):
        if self.how == "finish":
            hold()


if __name__ == "__main__":
    LiveFork()
