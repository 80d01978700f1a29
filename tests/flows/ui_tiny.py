"""A parameter, a foreach, a retry: what the rows of the UI are made of."""

from metaflow import FlowSpec, Parameter, current, retry, step


class UiTinyFlow(FlowSpec):
    n = Parameter("n", default=3, type=int)
    fail = Parameter("fail", default=False, type=bool)

    @step
    def start(self):
        print("hello from start")
        self.items = list(range(self.n))
        self.next(self.unit, foreach="items")

    @retry(times=1, minutes_between_retries=0)
    @step
    def unit(self):
        self.x = self.input
        if self.input == 0 and current.retry_count == 0:
            raise ValueError("once")
        self.next(self.join)

    @step
    def join(self, inputs):
        self.total = sum(i.x for i in inputs)
        if self.fail:
            raise RuntimeError("asked for")
        self.next(self.end)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    UiTinyFlow()
