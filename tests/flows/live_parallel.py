"""Two nodes of one @parallel step; locally they are processes of the first."""

from live_notes import hold
from metaflow import FlowSpec, current, parallel, step


class LiveParallel(FlowSpec):
    @step
    def start(self):
        self.next(self.work, num_parallel=2)

    @parallel
    @step
    def work(self):
        hold("-%d" % current.parallel.node_index)
        self.node = current.parallel.node_index
        self.next(self.join)

    @step
    def join(self, inputs):
        self.nodes = sorted(task.node for task in inputs)
        self.next(self.end)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    LiveParallel()
