"""Two cards on one task, one of them refreshed while it runs."""

from metaflow import FlowSpec, card, current, step
from metaflow.cards import Markdown


class ReadersCards(FlowSpec):
    @card(type="blank", id="mine")
    @card
    @step
    def start(self):
        current.card["mine"].append(Markdown("# Hello ☃"))
        current.card["mine"].refresh({"i": 1})
        self.next(self.end)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    ReadersCards()
