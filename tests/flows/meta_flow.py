"""Parameters, a foreach with a retry, odd artifact names, metadata of many kinds: read back by the tests."""

from metaflow import FlowSpec, Parameter, current, retry, step


class MetaFlow(FlowSpec):
    alpha = Parameter("alpha", default=3)

    @step
    def start(self):
        self.items = ["a", "b c"]
        self.next(self.body, foreach="items")

    @retry(times=1, minutes_between_retries=0)
    @step
    def body(self):
        self.value = self.input * self.alpha
        if self.input == "a" and current.retry_count == 0:
            self.only_in_first = True
            raise ValueError("the first attempt fails")
        self.next(self.join)

    @step
    def join(self, inputs):
        self.values = sorted(i.value for i in inputs)
        self.größe = {"ä": 1}
        setattr(self, "col a-b", 7)
        self.next(self.end)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    MetaFlow()
