"""Three steps, a parameter, artifacts, and what a task sees of its surroundings."""

import os

from metaflow import FlowSpec, Parameter, Run, Task, current, step


class LinearFlow(FlowSpec):
    greeting = Parameter("greeting", default="hello")

    @step
    def start(self):
        self.text = self.greeting + " world"
        self.next(self.middle)

    @step
    def middle(self):
        self.env = {
            k: v
            for k, v in os.environ.items()
            if k.startswith("METAFLOW_") or k.lower() == "no_proxy"
        }
        self.length = len(self.text)
        self.next(self.end)

    @step
    def end(self):
        mine = Run("%s/%s" % (current.flow_name, current.run_id))
        self.seen = sorted(s.id for s in mine)
        self.finished_while_running = mine.finished
        self.before = Task("%s/middle/%s" % (mine.pathspec, list(mine["middle"])[0].id)).data.length
        print("the end of", self.text)


if __name__ == "__main__":
    LinearFlow()
