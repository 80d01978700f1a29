"""The flow that the README runs: a list, one task for each of its items, and their sum."""

from metaflow import FlowSpec, Parameter, step


class HelloFlow(FlowSpec):
    """Squares a few numbers in parallel tasks."""

    upto = Parameter("upto", default=3, help="how many numbers")

    @step
    def start(self):
        """Decides what there is to do."""
        self.numbers = list(range(1, self.upto + 1))
        self.next(self.square, foreach="numbers")

    @step
    def square(self):
        """One task per number."""
        self.result = self.input**2
        print(f"{self.input} squared is {self.result}")
        self.next(self.join)

    @step
    def join(self, inputs):
        """Brings the results together."""
        self.total = sum(task.result for task in inputs)
        self.next(self.end)

    @step
    def end(self):
        """Tells the sum."""
        print(f"the sum of the squares is {self.total}")


if __name__ == "__main__":
    HelloFlow()
