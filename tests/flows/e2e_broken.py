"""A flow whose second step fails as long as nobody mends the world."""

from pathlib import Path

from metaflow import FlowSpec, step


class BrokenFlow(FlowSpec):
    @step
    def start(self):
        self.dear = 42
        self.next(self.middle)

    @step
    def middle(self):
        if not Path("mended").exists():
            raise RuntimeError("not mended yet")
        self.dearer = self.dear + 1
        self.next(self.end)

    @step
    def end(self):
        print("got", self.dearer)


if __name__ == "__main__":
    BrokenFlow()
