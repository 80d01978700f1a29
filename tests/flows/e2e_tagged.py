"""A run that tags itself when it has run for a while."""

import time

from metaflow import FlowSpec, Run, current, namespace, step


class TaggedFlow(FlowSpec):
    @step
    def start(self):
        time.sleep(1)
        namespace(None)
        Run("%s/%s" % (current.flow_name, current.run_id)).add_tag("from-within")
        self.next(self.end)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    TaggedFlow()
