"""A Config object, and a switch that goes round (newer Metaflow only)."""

from metaflow import Config, FlowSpec, step


class ReadersConfig(FlowSpec):
    cfg = Config("cfg", default_value='{"lr": 0.1, "names": ["a", {"b": 1}]}')

    @step
    def start(self):
        self.rate = self.cfg.lr
        self.turns = 0
        self.next(self.loop)

    @step
    def loop(self):
        self.turns += 1
        self.go = "again" if self.turns < 3 else "stop"
        self.next({"again": self.loop, "stop": self.fin}, condition="go")

    @step
    def fin(self):
        self.next(self.end)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    ReadersConfig()
