"""One task that waits for a word of the test, or sleeps; it asks the service for nothing meanwhile."""

import time

from live_notes import hold, note
from metaflow import FlowSpec, Parameter, current, step


class LiveSleep(FlowSpec):
    seconds = Parameter("seconds", default=-1.0, help="how long to sleep; negative: until told")

    @step
    def start(self):
        if self.seconds < 0:
            hold()
        else:
            note("start-%d" % current.retry_count, current.pathspec)
            time.sleep(self.seconds)
        self.next(self.end)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    LiveSleep()
