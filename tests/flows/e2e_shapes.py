"""Branch, join, foreach, @retry and @catch in one flow."""

from metaflow import FlowSpec, catch, current, retry, step


class ShapesFlow(FlowSpec):
    @step
    def start(self):
        self.next(self.left, self.right)

    @step
    def left(self):
        self.side = "left"
        self.next(self.merge)

    @retry(times=2, minutes_between_retries=0)
    @step
    def right(self):
        self.attempt = current.retry_count
        self.side = "right"
        if self.attempt == 0:
            raise ValueError("the first attempt fails")
        self.next(self.merge)

    @step
    def merge(self, inputs):
        self.sides = sorted(branch.side for branch in inputs)
        self.right_attempt = inputs.right.attempt
        self.next(self.spread)

    @step
    def spread(self):
        self.items = ["a", "b", "c"]
        self.next(self.each, foreach="items")

    @catch(var="problem", print_exception=False)
    @step
    def each(self):
        self.upper = None
        if self.input == "b":
            raise KeyError("b is not wanted")
        self.upper = self.input.upper()
        self.next(self.gather)

    @step
    def gather(self, inputs):
        self.merge_artifacts(inputs, exclude=["upper", "problem"])
        self.caught = [bool(task.problem) for task in inputs]
        self.uppers = [None if task.problem else task.upper for task in inputs]
        self.next(self.end)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    ShapesFlow()
