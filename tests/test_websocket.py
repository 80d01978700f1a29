"""Section 9: frames by the categories of the Autobahn suite, another implementation, fuzz, a real client."""

from __future__ import annotations

import asyncio
import random
import signal
import tracemalloc
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest

import mflocal
from mflocal import Close, Ping, Pong, Problem, Text, WebSocketProtocol

CONT, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
MASK = b"\x37\xfa\x21\x3d"
LIMIT = mflocal.WS_MAX_MESSAGE
LEGAL_CODES = {*range(1000, 1004), *range(1007, 1015), *range(3000, 5000)}


def frame(
    opcode: int,
    payload: bytes = b"",
    *,
    fin: bool = True,
    rsv: int = 0,
    mask: bytes | None = MASK,
    form: int | None = None,
) -> bytes:
    """A client's frame. `form` forces the length field: 7, 16 or 64 bits."""
    size = len(payload)
    form = form or (7 if size < 126 else 16 if size < 65536 else 64)
    short = {7: size, 16: 126, 64: 127}[form]
    head = bytes((fin << 7 | rsv << 4 | opcode, (mask is not None) << 7 | short))
    head += b"" if form == 7 else size.to_bytes(form // 8, "big")
    if mask is None:
        return head + payload
    return head + mask + bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))


def declared(opcode: int, size: int, *, form: int, fin: bool = True) -> bytes:
    """A head that declares `size` bytes, without mask and payload."""
    return bytes((fin << 7 | opcode, 0x80 | {16: 126, 64: 127}[form])) + size.to_bytes(
        form // 8, "big"
    )


def text(data: str | bytes, **options: Any) -> bytes:
    return frame(TEXT, data.encode() if isinstance(data, str) else data, **options)


def fragments(data: bytes, size: int, between: bytes = b"") -> bytes:
    """A text message in frames of `size` bytes, `between` after each frame but the last."""
    parts = [data[i : i + size] for i in range(0, len(data), size)]
    last = len(parts) - 1
    return between.join(
        frame(CONT if i else TEXT, part, fin=i == last) for i, part in enumerate(parts)
    )


def closing(code: int, reason: bytes = b"") -> bytes:
    return frame(CLOSE, code.to_bytes(2, "big") + reason)


def shape(events: list[Any]) -> list[Any]:
    """A Close for a broken rule becomes its code: our reasons are free text, the clients' begin with `:`."""
    return [
        event.code
        if isinstance(event, Close) and event.reason and event.reason[0] != ":"
        else event
        for event in events
    ]


GREEK = "κόσμε"
A = text("a")
P = frame(PING, b"p")

INVALID_UTF8 = """
80 bf 8080 c0 fe ff feffff c080 c1bf e08080 e09fbf f0808080 f08fbfbf f8888080 fc8480808080
f4908080 f7bfbfbf fbbfbfbfbf eda080 edbfbf eda080edb080 c3 e282 f09f98 f5
"""

# (name, bytes of the client, events); a number stands for a Close because of a broken rule
CASES: list[tuple[str, bytes, list[Any]]] = [
    # 1 framing
    ("1.1.1 empty text", text(""), [Text("")]),
    *[
        (f"1.1 text of {n}", text("*" * n), [Text("*" * n)])
        for n in (1, 125, 126, 127, 128, 65535, LIMIT)
    ],
    ("1.1 zero mask", text("abcdefg", mask=bytes(4)), [Text("abcdefg")]),
    ("1.1 sixteen-bit length for 125", text("x" * 125, form=16), [1002]),
    ("1.1 sixteen-bit length for 0", text("", form=16), [1002]),
    ("1.1 64-bit length for 126", text("x" * 126, form=64), [1002]),
    ("1.1 64-bit length for 5", text("hello", form=64), [1002]),
    ("1.1 64-bit length for 65535, head only", declared(TEXT, 65535, form=64), [1002]),
    ("1.1 length with top bit", declared(TEXT, 1 << 63, form=64), [1002]),
    ("1.1 all bits of the length", declared(TEXT, (1 << 64) - 1, form=64), [1002]),
    ("1.1 unmasked text", text("a", mask=None), [1002]),
    ("1.1 unmasked after masked", A + text("b", mask=None), [Text("a"), 1002]),
    ("1.1 unmasked ping", frame(PING, mask=None), [1002]),
    ("1.2.1 empty binary", frame(BINARY), [1003]),
    ("1.2.2 binary", A + frame(BINARY, b"\xfe" * 125), [Text("a"), 1003]),
    ("1.2.7 binary over the limit", declared(BINARY, 1 << 40, form=64), [1003]),
    # 2 pings and pongs
    ("2.1 empty ping", frame(PING), [Ping(b"")]),
    ("2.2 ping", frame(PING, b"still there?"), [Ping(b"still there?")]),
    ("2.3 ping, no UTF-8", frame(PING, b"\x00\xff\xfe\xfd\xfc"), [Ping(b"\x00\xff\xfe\xfd\xfc")]),
    ("2.4 ping of 125", frame(PING, b"\xfe" * 125), [Ping(b"\xfe" * 125)]),
    ("2.5 ping of 126", frame(PING, b"\xfe" * 126), [1002]),
    ("2.5 ping, 64-bit length", frame(PING, b"", form=64), [1002]),
    ("2.7 pong", frame(PONG), [Pong(b"")]),
    ("2.8 pong with payload", frame(PONG, b"unsolicited"), [Pong(b"unsolicited")]),
    ("2.9 pong, ping", frame(PONG, b"u") + P, [Pong(b"u"), Ping(b"p")]),
    (
        "2.10 ten pings",
        b"".join(frame(PING, b"%d" % i) for i in range(10)),
        [Ping(b"%d" % i) for i in range(10)],
    ),
    # 3 reserved bits
    ("3.1 RSV3", text("a", rsv=1), [1002]),
    ("3.2 RSV2", A + text("a", rsv=2) + P, [Text("a"), 1002]),
    ("3.3 RSV2 and 3", A + text("a", rsv=3) + P, [Text("a"), 1002]),
    ("3.4 RSV1, as if compressed", A + text("a", rsv=4) + P, [Text("a"), 1002]),
    ("3.5 RSV on binary", frame(BINARY, b"\xff", rsv=5), [1002]),
    ("3.6 RSV on ping", frame(PING, b"a", rsv=6), [1002]),
    ("3.7 RSV on close", frame(CLOSE, rsv=7), [1002]),
    ("3 RSV on continuation", text("a", fin=False) + frame(CONT, b"b", rsv=4), [1002]),
    # 4 opcodes
    *[(f"4.1 opcode {n}", A + frame(n, b"x") + P, [Text("a"), 1002]) for n in range(3, 8)],
    *[(f"4.2 opcode {n}", A + frame(n) + P, [Text("a"), 1002]) for n in range(11, 16)],
    ("4 opcode 3 in a message", text("a", fin=False) + frame(3), [1002]),
    # 5 fragmentation
    ("5.1 ping in fragments", frame(PING, b"a", fin=False) + frame(CONT, b"b"), [1002]),
    ("5.2 pong in fragments", frame(PONG, b"a", fin=False) + frame(CONT, b"b"), [1002]),
    ("5 close in fragments", frame(CLOSE, b"\x03\xe8", fin=False), [1002]),
    ("5.3 two fragments", fragments(b"ab", 1), [Text("ab")]),
    ("5.6 ping between", fragments(b"ab", 1, P), [Ping(b"p"), Text("ab")]),
    ("5 pong between", fragments(b"abc", 1, frame(PONG)), [Pong(b""), Pong(b""), Text("abc")]),
    ("5.9 final continuation of nothing", frame(CONT, b"x") + A, [1002]),
    ("5.12 continuation of nothing", frame(CONT, b"x", fin=False) + A, [1002]),
    (
        "5.15 continuation after the end",
        fragments(b"ab", 1) + frame(CONT, b"x", fin=False) + A,
        [Text("ab"), 1002],
    ),
    ("5.18 text in text", text("a", fin=False) + text("b"), [1002]),
    ("5 binary in text", text("a", fin=False) + frame(BINARY, b"b"), [1002]),
    ("5.19 five with pings", fragments(b"12345", 1, P + P), [*[Ping(b"p")] * 8, Text("12345")]),
    ("5 two messages", fragments(b"abcd", 3) + fragments(b"efgh", 2), [Text("abcd"), Text("efgh")]),
    # 6 UTF-8
    (
        "6.1.2 three empty fragments",
        text("", fin=False) + frame(CONT, fin=False) + frame(CONT),
        [Text("")],
    ),
    (
        "6.1.3 one of three",
        text("", fin=False) + frame(CONT, b"m", fin=False) + frame(CONT),
        [Text("m")],
    ),
    ("6.2.1 valid", text("Größe: 10 µm, ½ €!"), [Text("Größe: 10 µm, ½ €!")]),
    ("6.2.3 in octets", fragments(GREEK.encode(), 1), [Text(GREEK)]),
    (
        "6.2 ping inside a code point",
        fragments("€".encode(), 1, P),
        [Ping(b"p"), Ping(b"p"), Text("€")],
    ),
    ("6.3.1 invalid", text(GREEK.encode() + b"\xed\xa0\x80tail"), [1007]),
    ("6.3.2 invalid in octets", fragments(GREEK.encode() + b"\xed\xa0\x80tail", 1), [1007]),
    ("6.4.1 fails fast, over the maximum", text(GREEK.encode() + b"\xf4\x90", fin=False), [1007]),
    ("6.4 code point unfinished", text("€".encode()[:2]), [1007]),
    ("6.4 unfinished, then empty final", text("€".encode()[:2], fin=False) + frame(CONT), [1007]),
    (
        "6.4 unfinished, next message starts afresh",
        A + text(b"\xc3") + text(b"\xa4"),
        [Text("a"), 1007],
    ),
    *[
        (f"6.7-6.11 valid {c!r}", text(c), [Text(c)])
        for c in "\0\x7f\x80\u07ff\u0800\ud7ff\ue000\ufdd0\ufffd\ufffe\uffff\U00010000\U0010ffff"
    ],
    *[
        (f"6.8-6.21 invalid {c.hex()}", text(c + b"."), [1007])
        for c in map(
            bytes.fromhex,
            INVALID_UTF8.split(),
        )
    ],
    # 7 closing
    ("7.1.1 text, close", A + closing(1000), [Text("a"), Close(1000, "")]),
    ("7.1.2 two closes", closing(1000) + closing(1001), [Close(1000, "")]),
    ("7.1.3 ping after close", closing(1000) + P, [Close(1000, "")]),
    ("7.1.4 text after close", closing(1000) + A, [Close(1000, "")]),
    ("7.1.4 garbage after close", closing(1000) + b"\xff" * 40, [Close(1000, "")]),
    (
        "7.1.5 close inside a message",
        text("a", fin=False) + closing(1000) + frame(CONT),
        [Close(1000, "")],
    ),
    ("7.3.1 no code", frame(CLOSE), [Close(1005, "")]),
    ("7.3.2 half a code", frame(CLOSE, b"\x03"), [1002]),
    ("7.3.4 reason", closing(1000, b":bye"), [Close(1000, ":bye")]),
    ("7.3.5 longest reason", closing(1000, b":" * 123), [Close(1000, ":" * 123)]),
    ("7.3.6 too long", closing(1000, b":" * 124), [1002]),
    ("7.5.1 reason not UTF-8", closing(1000, b":\xce\xba\xed\xa0\x80"), [1007]),
    ("7.5 reason cut in a code point", closing(1000, b":\xe2\x82"), [1007]),
    *[
        (f"7.7 code {n}", closing(n), [Close(n, "")])
        for n in (
            1000,
            1001,
            1002,
            1003,
            1007,
            1008,
            1009,
            1010,
            1011,
            1012,
            1013,
            1014,
            3000,
            3999,
            4000,
            4999,
        )
    ],
    *[
        (f"7.9 code {n}", closing(n, b":r"), [1002])
        for n in (0, 1, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535)
    ],
    # 9 limits
    ("9.1 over the limit, head only", declared(TEXT, LIMIT + 1, form=64), [1009]),
    ("9.1 2**62, head only", declared(TEXT, 1 << 62, form=64), [1009]),
    (
        "9.3 sum over fragments",
        text("x" * 9, fin=False) + declared(CONT, LIMIT - 8, form=16),
        [1009],
    ),
    (
        "9.3 exactly the limit",
        text("x" * 9, fin=False) + frame(CONT, b"x" * (LIMIT - 9)),
        [Text("x" * LIMIT)],
    ),
    ("9.5 fragments of 64", fragments(b"x" * 4096, 64), [Text("x" * 4096)]),
    (
        "9.7 many messages",
        b"".join(text(str(i)) for i in range(100)),
        [Text(str(i)) for i in range(100)],
    ),
]


def run(pieces: list[bytes]) -> tuple[WebSocketProtocol, list[Any]]:
    protocol = WebSocketProtocol()
    return protocol, [event for piece in pieces for event in protocol.feed(piece)]


@pytest.mark.parametrize(
    ("data", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_frames(data: bytes, expected: list[Any]) -> None:
    protocol, events = run([data])
    assert shape(events) == expected
    assert shape(run([data[i : i + 1] for i in range(len(data))])[1]) == expected
    size = len(data)
    for cut in (
        range(1, size)
        if size < 700
        else (1, 2, 3, 4, 7, 8, 9, 10, 13, 14, 15, 16, 17, size // 2, size - 1)
    ):
        assert shape(run([data[:cut], data[cut:]])[1]) == expected, cut
    for step in (2, 3, 5, 997):  # 1.1.8 and 9.5: pieces that never fall on the ends of frames
        assert shape(run([data[i : i + step] for i in range(0, size, step)])[1]) == expected, step

    if not events or not isinstance(events[-1], Close):
        assert protocol.state == "open"
        return
    close = events[-1]
    assert protocol.state == "closing"
    assert protocol.feed(A + P + closing(1001)) == []
    assert protocol.send_text("late") == protocol.ping() == protocol.pong(b"late") == b""
    answer = protocol.close(close.code, close.reason)
    expected_payload = (
        b"" if close.code == 1005 else close.code.to_bytes(2, "big") + close.reason.encode()
    )
    assert answer == bytes((0x88, len(expected_payload))) + expected_payload
    assert protocol.state == "closed"
    assert protocol.close(1000) == b""


@pytest.mark.parametrize(
    ("data", "kept", "code"),
    [
        (text("a", rsv=4), 1, 1002),
        (frame(7, b"x" * 200), 1, 1002),
        (frame(CONT, b"x"), 1, 1002),
        (frame(PING, fin=False), 1, 1002),
        (text("a", mask=None), 2, 1002),
        (frame(BINARY, b"x" * 200), 2, 1003),
        (frame(PING, b"x" * 126), 2, 1002),
        (text("x" * 125, form=16), 4, 1002),
        (text("x" * (LIMIT + 1)), 10, 1009),  # before the mask, let alone the payload
        (text("x" * 300 + "y" * 300, form=64), 10, 1002),
        (text(GREEK.encode() + b"\xf4\x90" + b"z" * 50), 6 + len(GREEK.encode()) + 2, 1007),
        (text(b"\xff" + b"z" * 1000), 9, 1007),
    ],
)
def test_fails_at_the_first_byte_that_tells(data: bytes, kept: int, code: int) -> None:
    protocol, events = run([data[i : i + 1] for i in range(kept - 1)])
    assert events == [] and protocol.state == "open"
    assert shape(protocol.feed(data[kept - 1 : kept])) == [code]


def test_fragment_count_is_limited() -> None:
    empty = frame(CONT, fin=False)
    protocol = WebSocketProtocol(max_fragments=50)
    assert protocol.feed(text("", fin=False) + empty * 48 + frame(CONT)) == [Text("")]
    assert protocol.feed(text("", fin=False) + empty * 49) == []
    assert shape(protocol.feed(frame(CONT))) == [1009]
    protocol = WebSocketProtocol()
    assert protocol.feed(text("", fin=False) + empty * (mflocal.WS_MAX_FRAGMENTS - 1) + P) == [
        Ping(b"p")
    ]
    assert shape(protocol.feed(empty)) == [1009]


def test_message_limit_is_per_message_and_leaves_control_frames_alone() -> None:
    protocol = WebSocketProtocol(max_message=4)
    for _ in range(3):
        assert protocol.feed(
            text("ab", fin=False) + frame(PING, b"x" * 125) + frame(CONT, b"cd")
        ) == [
            Ping(b"x" * 125),
            Text("abcd"),
        ]
    assert shape(
        protocol.feed(text("ab", fin=False) + frame(CONT, b"c", fin=False) + frame(CONT, b"de"))
    ) == [1009]


@pytest.mark.parametrize("first", [closing(1000), frame(BINARY)])
def test_discarded_bytes_are_not_kept(first: bytes) -> None:
    protocol = WebSocketProtocol()
    protocol.feed(first)
    block = bytes(1 << 16)
    tracemalloc.start()
    try:
        for _ in range(64):
            assert protocol.feed(block) == []
        assert tracemalloc.get_traced_memory()[0] < len(block)
    finally:
        tracemalloc.stop()


def test_our_close_first() -> None:
    protocol = WebSocketProtocol()
    assert protocol.close(1001, "shutdown") == b"\x88\x0a\x03\xe9shutdown"
    assert protocol.state == "closing"
    assert protocol.close(1001, "shutdown") == b"" == protocol.send_text("x") == protocol.ping()
    assert protocol.feed(A + P + frame(PONG)) == []  # too late for these
    assert protocol.feed(closing(1001, b":shutdown")) == [Close(1001, ":shutdown")]
    assert protocol.state == "closed"
    assert protocol.close(1001) == b"" and protocol.feed(A) == []

    protocol = WebSocketProtocol()
    protocol.close()
    assert shape(protocol.feed(text("a", mask=None))) == [1002]  # rules hold to the end
    assert protocol.state == "closed" and protocol.close(1002) == b""


def test_server_frames() -> None:
    protocol = WebSocketProtocol()
    assert protocol.send_text("") == b"\x81\x00"
    assert protocol.send_text("ä") == b"\x81\x02\xc3\xa4" == protocol.send_text("ä".encode())
    assert protocol.send_text(b"x" * 125) == b"\x81\x7d" + b"x" * 125
    assert protocol.send_text(b"x" * 126) == b"\x81\x7e\x00\x7e" + b"x" * 126
    assert protocol.send_text(b"x" * 65535) == b"\x81\x7e\xff\xff" + b"x" * 65535
    assert (
        protocol.send_text(b"x" * 65536)
        == b"\x81\x7f\x00\x00\x00\x00\x00\x01\x00\x00" + b"x" * 65536
    )
    assert protocol.ping() == b"\x89\x00" and protocol.ping(b"x" * 125) == b"\x89\x7d" + b"x" * 125
    assert protocol.pong(b"\xff") == b"\x8a\x01\xff"
    for make in (protocol.ping, protocol.pong):
        with pytest.raises(ValueError):
            make(b"x" * 126)
    for code in (0, 999, 1004, 1006, 1015, 2999, 5000):
        with pytest.raises(ValueError):
            protocol.close(code)
    assert protocol.state == "open"
    assert WebSocketProtocol().close() == b"\x88\x02\x03\xe8"
    assert WebSocketProtocol().close(1005, "not sent") == b"\x88\x00"
    cut = WebSocketProtocol().close(1000, "€" * 42)  # 126 bytes; 41 characters are exactly 123
    assert cut == b"\x88\x7d\x03\xe8" + "€".encode() * 41
    assert (
        WebSocketProtocol().close(1000, "x" + "€" * 41) == b"\x88\x7b\x03\xe8x" + "€".encode() * 40
    )


# The opening handshake

HANDSHAKE = {
    "host": "127.0.0.1:8080",
    "connection": "Upgrade",
    "upgrade": "websocket",
    "sec-websocket-version": "13",
    "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
}


def make_request(
    method: str = "GET", http10: bool = False, body: bytes = b"", **headers: str | None
) -> mflocal.Request:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    merged = {name: value for name, value in {**HANDSHAKE, **given}.items() if value is not None}
    return mflocal.Request(method, "/ws", "", merged, body, http10=http10)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"connection": "keep-alive, Upgrade"},
        {"connection": "UPGRADE ,x"},
        {"upgrade": "WebSocket"},
        {
            "sec_websocket_extensions": "permessage-deflate; client_max_window_bits",
            "sec_websocket_protocol": "chat",
        },
    ],
)
def test_handshake(headers: dict[str, Any]) -> None:
    answer = mflocal.websocket_handshake(make_request(**headers))
    head = mflocal.Response(101, headers=answer).encode()
    assert (
        head.startswith(b"HTTP/1.1 101 ")
        and head.endswith(b"\r\n\r\n")
        and head.count(b"\r\n\r\n") == 1
    )
    fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
    assert fields[b"Upgrade"] == b"websocket" and fields[b"Connection"] == b"Upgrade"
    # key and digest are the example of RFC 6455, 1.3
    assert fields[b"Sec-WebSocket-Accept"] == b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
    assert not {b"Sec-WebSocket-Extensions", b"Sec-WebSocket-Protocol", b"Content-Length"} & set(
        fields
    )


RAW = (
    b"GET /ws HTTP/1.1\r\n"
    + "".join(f"{n.title()}: {v}\r\n" for n, v in HANDSHAKE.items()).encode()
)


def test_frames_right_behind_the_handshake() -> None:
    parser = mflocal.RequestParser()
    parser.feed(RAW + b"\r\n" + A + P)
    request = parser.next()
    assert request is not None
    mflocal.websocket_handshake(request)
    assert WebSocketProtocol().feed(parser.rest()) == [Text("a"), Ping(b"p")]


@pytest.mark.parametrize(
    "more",
    [
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n",
        b"Sec-WebSocket-Version: 8\r\n",
        b"Upgrade: h2c\r\n",
        b"Content-Length: 1\r\n",
    ],
)
def test_handshake_with_one_field_too_many(more: bytes) -> None:
    parser = mflocal.RequestParser()
    with pytest.raises(Problem) as caught:
        parser.feed(RAW + more + b"\r\nx")
        request = parser.next()
        assert request is not None
        mflocal.websocket_handshake(request)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("status", "change"),
    [
        (405, {"method": "POST"}),
        (405, {"method": "HEAD"}),
        (400, {"http10": True}),
        (400, {"body": b"x"}),
        (426, {"connection": None}),
        (426, {"connection": "keep-alive"}),
        (426, {"connection": "upgraded"}),
        (426, {"upgrade": None}),
        (426, {"upgrade": "h2c"}),
        (426, {"sec_websocket_version": None}),
        (426, {"sec_websocket_version": "8"}),
        (426, {"sec_websocket_version": "13, 8"}),
        (426, {"sec_websocket_version": "013"}),
        (400, {"sec_websocket_key": None}),
        (400, {"sec_websocket_key": ""}),
        (400, {"sec_websocket_key": "dGhlIHNhbXBsZSBub25jZQ"}),
        (400, {"sec_websocket_key": "dGhlIHNhbXBsZSBub25jZQ=="[2:]}),
        (400, {"sec_websocket_key": "dGhlIHNhbXBsZSBub25jZTA="}),  # 17 bytes
        (400, {"sec_websocket_key": "dGhlIHNhbXBsZSBub25j-_=="}),
        (400, {"sec_websocket_key": "dGhlIHNhbXBsZSBub25jZQ==, dGhlIHNhbXBsZSBub25jZQ=="}),
    ],
)
def test_handshake_refused(status: int, change: dict[str, Any]) -> None:
    with pytest.raises(Problem) as caught:
        mflocal.websocket_handshake(make_request(**change))
    assert caught.value.status == status
    if status == 426:
        assert caught.value.headers == {"Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    if status == 405:
        assert caught.value.headers == {"Allow": "GET"}


# Random frames


@pytest.fixture
def deadline() -> Iterator[None]:
    """Kill a loop that never ends, rather than hang with it."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("hangs"))
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


def random_payload(rng: random.Random) -> bytes:
    size = rng.choice(
        (0, 1, 2, 3, 4, 5, 7, 8, rng.randrange(130), rng.randrange(130), rng.randrange(700))
    )
    kind = rng.random()
    if kind < 0.03:
        return rng.randbytes(size)
    if kind < 0.06:
        return bytes(rng.choice(b"\x80\xbf\xc3\xe2\x82\xac\xed\xa0\xf4\x90a") for _ in range(size))
    return "".join(rng.choice("aäß€\U0001f600") for _ in range(size // 3)).encode()


def random_frames(rng: random.Random) -> bytes:
    """Mostly legal frames, so that many get past the head; then some bytes are changed or cut away."""
    data, rest, inside = bytearray(), b"", False
    for _ in range(rng.randrange(1, 12)):
        opcode = rng.choice((TEXT, TEXT, TEXT, PING, PONG, CLOSE if rng.random() < 0.3 else PING))
        opcode = CONT if opcode == TEXT and inside else opcode
        opcode = rng.randrange(16) if rng.random() < 0.02 else opcode
        payload = random_payload(rng)
        fin = opcode >= 8 or rng.random() < 0.6
        if opcode == CLOSE and rng.random() < 0.8:
            payload = (
                rng.choice((1000, 1001, 3000, rng.randrange(65536))).to_bytes(2, "big") + payload
            )
        if opcode < 8:  # a code point may lie across two frames
            payload, inside = rest + payload, not fin
            cut = len(payload) if fin else rng.randrange(len(payload) + 1)
            payload, rest = payload[:cut], payload[cut:]
        elif rng.random() < 0.9:
            payload = (
                payload[:125].decode("utf-8", "ignore").encode()
                if opcode != CLOSE
                else payload[:125]
            )
        rsv = rng.randrange(8) if rng.random() < 0.01 else 0
        mask = None if rng.random() < 0.01 else rng.randbytes(4)
        form = 64 if rng.random() < 0.01 else None
        data += frame(opcode, payload, fin=fin, rsv=rsv, mask=mask, form=form)
    for _ in range(rng.choice((0, 0, 0, 0, 1, 3))):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data[: rng.randrange(len(data))] if rng.random() < 0.1 else data)


def check_server_frame(data: bytes, opcode: int) -> bytes:
    """Read one frame as a client would; its payload."""
    assert data[0] == 0x80 | opcode and data[1] < 126
    assert len(data) == 2 + data[1]
    return data[2:]


@pytest.mark.parametrize("seed", range(8))
def test_fuzz(seed: int, deadline: None) -> None:
    rng = random.Random(seed)
    codes: Counter[int] = Counter()
    texts = 0
    for _ in range(400):
        data = random_frames(rng)
        protocol, events = run([data])
        cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randrange(12)))
        pieces = [data[i:j] for i, j in zip([0, *cuts], [*cuts, len(data)])]
        assert run(pieces)[1] == events, data.hex()
        assert all(isinstance(event, (Text, Ping, Pong)) for event in events[:-1])
        texts += sum(isinstance(event, Text) for event in events)
        if events and isinstance(events[-1], Close):
            code = events[-1].code
            codes[code] += 1
            assert code in LEGAL_CODES or code == 1005, data.hex()
            payload = check_server_frame(protocol.close(code, events[-1].reason), CLOSE)
            assert payload[:2] == (b"" if code == 1005 else code.to_bytes(2, "big"))
            payload[2:].decode("utf-8")
            assert protocol.feed(rng.randbytes(50)) == [] and protocol.state == "closed"
        else:
            assert protocol.state == "open"
    assert texts > 250 and min(codes[code] for code in (1000, 1002, 1007)) > 3, (
        codes
    )  # else it tests little


@pytest.mark.parametrize("seed", range(4))
def test_against_another_implementation(seed: int, deadline: None) -> None:
    """Frames without the known differences (binary, long lengths, UTF-8 and closing inside a message)."""
    frames = pytest.importorskip("websockets.frames")
    module = pytest.importorskip("websockets.protocol")
    rng = random.Random(seed)
    codes: set[int] = set()
    for _ in range(500):
        data, inside = b"", False
        for _ in range(rng.randrange(1, 8)):
            opcode = rng.choice(
                (
                    CONT,
                    TEXT,
                    PING,
                    PONG,
                    CLOSE,
                    CONT if inside else TEXT,
                    rng.choice((0, 3, 11, 15)),
                )
            )
            if opcode == CLOSE and inside:
                opcode = PING
            payload = b"x" * rng.choice((0, 1, 2, 60, 126 if opcode < 8 else 125))
            if opcode == CLOSE:
                code = rng.choice((1000, 1005, 1014, 1015, 2999, 4999)).to_bytes(2, "big")
                payload = rng.choice((b"", b"\x03", code + b":r"))
            elif rng.random() < 0.02:
                opcode, payload = PING, b"x" * 126
            fin = (opcode >= 8 and rng.random() < 0.95) or rng.random() < 0.5
            inside = inside if opcode >= 8 else not fin
            rsv = rng.choice((1, 2, 4)) if rng.random() < 0.05 else 0
            data += frame(
                opcode,
                payload,
                fin=fin,
                rsv=rsv,
                mask=None if rng.random() < 0.03 else rng.randbytes(4),
            )
        other = module.Protocol(module.Side.SERVER, max_size=LIMIT)
        other.receive_data(data)
        expected: list[Any] = []
        message = b""
        for got in other.events_received():
            if got.opcode in (frames.Opcode.TEXT, frames.Opcode.CONT):
                message += bytes(got.data)
                if got.fin:
                    expected.append(Text(message.decode()))
                    message = b""
            elif got.opcode is frames.Opcode.PING:
                expected.append(Ping(bytes(got.data)))
            elif got.opcode is frames.Opcode.PONG:
                expected.append(Pong(bytes(got.data)))
        if other.close_rcvd_then_sent:
            expected.append(
                Close(int(other.close_rcvd.code), ":r" if other.close_rcvd.reason else "")
            )
        elif other.close_sent is not None:
            expected.append(int(other.close_sent.code))
        events = run([data])[1]
        assert shape(events) == expected, data.hex()
        codes.update(event.code for event in events if isinstance(event, Close))
    assert {1000, 1002, 1005, 1014, 4999} <= codes


# A real client over a real socket


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Handshake, then send every text back; "ping me" and "close me" make the server act."""
    try:
        parser = mflocal.RequestParser()
        while (request := parser.next()) is None:
            data = await reader.read(1 << 16)
            if not data:
                return
            parser.feed(data)
        writer.write(mflocal.Response(101, headers=mflocal.websocket_handshake(request)).encode())
        protocol, data = WebSocketProtocol(), parser.rest()
        while True:
            for event in protocol.feed(data):
                if isinstance(event, Close):
                    writer.write(protocol.close(event.code, event.reason))
                elif isinstance(event, Ping):
                    writer.write(protocol.pong(event.payload))
                elif isinstance(event, Pong):
                    writer.write(protocol.send_text("pong " + event.payload.decode()))
                elif event.data == "ping me":
                    writer.write(protocol.ping(b"42"))
                elif event.data == "close me":
                    writer.write(protocol.close(1001, "going away"))
                else:
                    writer.write(protocol.send_text(event.data))
            await writer.drain()
            data = await reader.read(1 << 16) if protocol.state != "closed" else b""
            if not data:
                break
    finally:
        writer.close()


def with_client(
    scenario: Callable[[Any], Awaitable[None]], monkeypatch: pytest.MonkeyPatch, **options: Any
) -> None:
    client = pytest.importorskip("websockets.asyncio.client")
    for name in ("http_proxy", "https_proxy", "all_proxy", "socks_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)

    async def main() -> None:
        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        try:
            async with client.connect(f"ws://127.0.0.1:{port}/ws", **options) as connection:
                await scenario(connection)
        finally:
            server.close()
            await server.wait_closed()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_client_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(connection: Any) -> None:
        assert connection.protocol.extensions == []  # the client did offer compression
        texts = ["", "{}", "κόσμε € \U0001f600"] + [
            "x" * n for n in (125, 126, 127, 4096, 65535, 65536)
        ]
        for sent in texts:
            await connection.send(sent)
            assert await connection.recv() == sent

        async def parts() -> AsyncIterator[str]:
            for part in ("in ", "three ", "frames €"):
                yield part

        await connection.send(parts())
        assert await connection.recv() == "in three frames €"
        for i in range(300):  # many in flight
            await connection.send(str(i))
        assert [await connection.recv() for i in range(300)] == [str(i) for i in range(300)]

    with_client(scenario, monkeypatch)


def test_client_pings_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(connection: Any) -> None:
        for payload in (b"", b"\x00\xff", b"x" * 125):
            await asyncio.wait_for(await connection.ping(payload), 10)
        await connection.send("ping me")
        assert await connection.recv() == "pong 42"

    with_client(scenario, monkeypatch)


@pytest.mark.parametrize("code", [1000, 1001, 3000, 4999])
def test_client_closes(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    async def scenario(connection: Any) -> None:
        await connection.close(code, "enough")
        assert connection.protocol.close_rcvd.code == code
        assert connection.protocol.close_rcvd.reason == "enough"
        assert connection.protocol.close_rcvd_then_sent is False

    with_client(scenario, monkeypatch)


@pytest.mark.parametrize(
    ("message", "code"),
    [("x" * (LIMIT + 1), 1009), (b"binary", 1003), ("close me", 1001), ("big", 1009)],
)
def test_server_closes(monkeypatch: pytest.MonkeyPatch, message: Any, code: int) -> None:
    exceptions = pytest.importorskip("websockets.exceptions")

    async def scenario(connection: Any) -> None:
        async def parts() -> AsyncIterator[str]:
            for _ in range(LIMIT // 4096 + 1):
                yield "x" * 4096

        await connection.send(parts() if message == "big" else message)
        with pytest.raises(exceptions.ConnectionClosed) as caught:
            await connection.recv()
        assert caught.value.rcvd.code == code

    with_client(scenario, monkeypatch)
