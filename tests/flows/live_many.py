"""A foreach whose first tasks are slow in beginning: many connections come and go."""

from live_notes import hold
from metaflow import FlowSpec, Parameter, step


class LiveMany(FlowSpec):
    width = Parameter("width", default=12)

    @step
    def start(self):
        self.numbers = list(range(self.width))
        self.next(self.work, foreach="numbers")

    @step
    def work(self):
        if self.input == 0:
            hold("-0")
        self.square = self.input**2
        self.next(self.join)

    @step
    def join(self, inputs):
        self.total = sum(task.square for task in inputs)
        self.next(self.end)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    LiveMany()
