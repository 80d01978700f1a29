"""Parameters, artifacts of many kinds, a nested foreach and logs."""

import collections
import datetime
import decimal
import os
import pathlib
import sys
import uuid

from metaflow import FlowSpec, IncludeFile, JSONType, Parameter, retry, step

Point = collections.namedtuple("Point", "x y")


class Opaque:
    def __init__(self):
        self.inside = list(range(100))


class ReadersData(FlowSpec):
    """A flow to read back."""

    text = Parameter("text", default="hällo")
    count = Parameter("count", default=3, type=int)
    ratio = Parameter("ratio", default=2.5)
    flag = Parameter("flag", default=True, type=bool)
    shape = Parameter("shape", type=JSONType, default='{"k": [1, 2, null]}')
    nothing = Parameter("nothing", default=None, type=str)
    dashed = Parameter("dashed-name", default="dash")
    included = IncludeFile(
        "included", default=os.path.join(os.path.dirname(os.path.abspath(__file__)), "include.txt")
    )
    constant = ["c", 1]

    @step
    def start(self):
        """Makes things."""
        self.number = 12
        self.whole = 2**100
        self.unicode = "é 世界 😀"
        self.nested = {
            "a": [1, 2, {"b": None}],
            "t": (1,),
            "f": 1.5,
            "s": {3},
            "z": frozenset(),
            "y": b"\x00q",
        }
        self.moment = datetime.datetime(2026, 11, 21, 22, 30, 1, 5)
        self.zoned = datetime.datetime(2026, 11, 21, tzinfo=datetime.timezone.utc)
        self.day = datetime.date(2026, 11, 21)
        self.span = datetime.timedelta(hours=3)
        self.money = decimal.Decimal("12.30")
        self.ident = uuid.UUID(int=7)
        self.path = pathlib.PurePosixPath("a/b")
        self.ordered = collections.OrderedDict([("b", 1), ("a", 2)])
        self.counter = collections.Counter("aab")
        self.default = collections.defaultdict(list, {"k": [1]})
        self.ring = collections.deque([1, 2], maxlen=5)
        self.z = complex(1, -2)
        self.error = ValueError("bad", 3)
        self.point = Point(1, 2)
        self.opaque = Opaque()
        self.mixed = [1, Opaque(), "x"]
        self.big = "z" * 20000
        self.huge = "z" * (3 << 20)
        self.outer = ["a", "b"]
        for i in range(12):
            print("line %d" % i)
        print("unicode é 世界 😀 \u2028 not a line end")
        print("long:" + "x" * 70000)
        print("")
        print("carriage\rreturn")
        print("err ☃", file=sys.stderr)
        print("no newline at the end", end="")
        self.next(self.middle, foreach="outer")

    @step
    def middle(self):
        self.inner = [self.input + "1", self.input + "2"]
        self.next(self.leaf, foreach="inner")

    @step
    def leaf(self):
        self.made = self.input.upper()
        self.next(self.gather)

    @step
    def gather(self, inputs):
        self.seen = [i.made for i in inputs]
        self.next(self.join)

    @step
    def join(self, inputs):
        self.seen = [i.seen for i in inputs]
        self.next(self.end)

    @retry(times=1, minutes_between_retries=0)
    @step
    def end(self):
        from metaflow import current

        print("attempt %d" % current.retry_count)
        self.tried = current.retry_count
        if current.retry_count == 0:
            raise RuntimeError("once")


if __name__ == "__main__":
    ReadersData()
