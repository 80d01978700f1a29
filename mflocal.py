#!/usr/bin/env python3
"""mflocal: Metaflow's metadata service and UI backend for one machine, on local mode's own files.

One module, read top to bottom; `grep '^# ----' mflocal.py` prints the table of contents. A section uses
only sections above it. See docs/architecture.md.
"""

from __future__ import annotations

import argparse
import array
import base64
import codecs
import collections
import contextlib
import datetime
import errno
import fcntl
import functools
import gc
import glob
import heapq
import io
import itertools
import json
import math
import operator
import os
import re
import select
import shlex
import signal
import socket
import stat
import struct
import sys
import time
import zlib
from argparse import ArgumentTypeError
from functools import lru_cache
from typing import (
    IO,
    TYPE_CHECKING,
    Any,
    AsyncIterator,
    Awaitable,
    Callable,
    ClassVar,
    Collection,
    Deque,
    Dict,
    FrozenSet,
    Hashable,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    NoReturn,
    Optional,
    Protocol,
    Sequence,
    Set,
    Tuple,
    TypeVar,
    Union,
)

if TYPE_CHECKING:
    # Imported by the functions that use it: `mflocal run` must not wait for the 60 ms of asyncio.
    import asyncio


# ---- 1. Settings: limits, flags and environment, which .metaflow ----

VERSION = "0.1.0"
STATE_SCHEMA = 2  # of daemon.json; a reader that meets another number leaves the file alone

KIB = 1024
MIB = 1024 * KIB

MAX_FILE_NAME = 255  # bytes of one file name on every file system that matters

# HTTP in. The realistic attackers are a web page, another local user and a broken client: the
# numbers are far above what Metaflow's client and the UI send, far below what would hurt.
MAX_LINE = 8 * KIB  # request line (414) or one header line (431); the UI's longest query is < 4 KiB
MAX_HEADER_BYTES = 64 * KIB  # all header lines together (431), counted as bytes arrive
MAX_HEADERS = 100  # number of header lines (431); browsers send about 20
MAX_BODY = 16 * MIB  # 413 before buffering; 5,000 artifacts registered at once are about 3 MiB
MAX_CHUNK_LINE = 256  # one chunk-size line with its extensions
MAX_CHUNKS = 65536  # 16 MiB in chunks of 256 bytes; stops floods of one-byte chunks
MAX_ROWS = 100_000  # metadata or artifact rows in one body; 16 MiB of `{}` would be five million
MAX_INT_DIGITS = 4300  # CPython's own limit since 3.11; the same on 3.9 and 3.10
MAX_PATTERN = 512  # characters of a regular expression sent by a client (ReDoS)
HEADER_TIMEOUT = 10.0  # s for a whole header block, from its first byte (slowloris)
BODY_TIMEOUT = 30.0  # s without a byte of the body
LINGER_TIMEOUT = 3.0  # s that what a refused client still sends is dropped, so that it can read why
WRITE_TIMEOUT = 30.0  # s without progress while a peer does not read its answer
KEEP_ALIVE_TIMEOUT = 75.0  # s of silence between requests; never on those that stand for work
MAX_CONNECTIONS = 4096  # or RLIMIT_NOFILE - SPARE_FILES if that is less; more get 503 and close
SPARE_FILES = 96  # descriptors kept for the store, log, lock and listening socket
BACKLOG = 512  # connections queue here while the daemon still imports (the kernel may cap it)

# WebSocket. Messages from the UI are subscriptions and keep-alives, under 1 KiB.
WS_MAX_MESSAGE = 64 * KIB  # one message, its fragments together (1009)
WS_MAX_FRAGMENTS = 64  # fragments of one message (1009)
WS_MAX_SUBSCRIPTIONS = 256  # per connection; the UI holds about 10
# Bytes not yet taken by a slow client before it is dropped: a replay of 10,000 tasks is 8 MiB.
WS_MAX_QUEUE = 32 * MIB
WS_SMALL_QUEUE = 4 * MIB  # the same once all clients together have WS_ALL_QUEUES waiting
WS_ALL_QUEUES = 64 * MIB
WS_PING_INTERVAL = 20.0  # s between pings of ours
WS_PING_TIMEOUT = 10.0  # s of silence after a ping before the connection counts as dead

# Liveness and status.
RUN_CUTOFF = 60.0  # s after the last heartbeat until a run or task counts as dead
# Seconds of silence on disk until a local-mode run with an unfinished task counts as dead.
LOCAL_CUTOFF = 86_400.0

# The daemon.
IDLE_TIMEOUT = 300.0  # s without use until it leaves
IDLE_TICK = 1.0  # s: the precision of the idle stop and of noticing a vanished root
DRAIN_TIMEOUT = 10.0  # s for requests in flight at a stop
START_TIMEOUT = 30.0  # s until a start counts as failed (a cold import on a loaded CI machine: 3 s)
CONTROL_TIMEOUT = 5.0  # s for one answer of the daemon to a command
KILL_AFTER = 5.0  # s between SIGTERM and SIGKILL for CMD when the daemon cannot serve it
MAX_RESTARTS = 3  # times in RESTART_WINDOW that `run` brings a dead daemon back
RESTART_WINDOW = 60.0  # s
RETRY_PAUSE = 0.25  # s between two of its looks
# Seconds for which it tries to get the port back; Metaflow's client asks again for about 30 s.
PORT_PATIENCE = 15.0
# What read_ready() says of a daemon that was killed while it started.
NO_REPORT = "it ended without a word"
LOG_BYTES = 1 * MIB  # size at which daemon.log becomes daemon.log.1
MAX_STATE_FILE = 64 * KIB  # daemon.json is < 2 KiB; more is not ours

# The store.
# One JSON file of the tree; a metadata value of a full body is 16 MiB, escaped more.
RECORD_LIMIT = 64 * MIB
WALK_SLICE = 0.004  # s that a walk over many files may hold the event loop at a time
WRITE_TRIES = 5  # of one record; a second one is needed only if another program replaces the file
# A directory changed so recently may change again within one tick of its mtime.
RACY_NS = 50_000_000
RECHECK_AFTER = 1.0  # s for which a task of a very wide run is not stat'ed again
TASKS_KEPT = 50_000  # tasks kept in memory, about 3 KiB each; runs that are in use may have more
TASKS_REST = 60.0  # s for which a run that was asked for keeps its tasks
ROWS_KEPT = 20_000  # metadata and artifact records kept in memory, about 1 KiB each
LEASE_KEPT = 7 * 86_400  # s after which the runs of a wrapper that never said goodbye are forgotten
SIGNS_FILE = "_mflocal.json"  # in a run's or task's `_meta`; local mode reads only _self, sysmeta_* and N_artifact_*

# Status.
START_JITTER = 100  # ms between the making of a run's id and its record in local mode: 1 to 5
# The same when no task is unfinished, or one has failed: longer than cards take.
LOCAL_IDLE_CUTOFF = 300.0
FAILED_CUTOFF = 30.0  # s without a heartbeat after a failed task: two beats missed, no retry begun
# Seconds after a failed task in which a scheduler may try again; Airflow waits 5 min.
SCHEDULER_RETRY = 1800.0
MAX_TASK_ATTEMPTS = 6  # Metaflow never starts a seventh attempt (its MAX_ATTEMPTS)
FALLBACK_ATTEMPTS = 3  # attempts that @catch adds to those of @retry (its NUM_FALLBACK_RETRIES)

# Queries.
MAX_FILTER_VALUES = 1000  # values of one filter: a URL of 8 KiB holds no more useful ones
MAX_LIKE = 1000  # characters of one value of a filter
MAX_PATTERNS = 8  # regular expressions in one request or subscription; the UI sends one
MAX_PATTERN_TEXT = 100_000  # characters of a text that a regular expression looks at
MAX_PATTERN_KNOWN = 50_000  # texts of which a subscription remembers whether its pattern fits

# The reader.
# Of one pickle that is read for display or search (the real service: 4 KiB); 500 characters are shown at
# once.
ARTIFACT_BYTES = 1 * MIB
ARTIFACT_PAGE_BYTES = 8 * MIB  # of all contents of one answer; the UI asks for 50 artifacts at once
# Characters of one str(value): shared parts make a text exponentially longer than its pickle.
ARTIFACT_TEXT = 2 * MIB
FOREIGN_TEXT = 2000  # characters of an object of an unknown class; a longer one is only named
ARRAY_VALUES = 1000  # of an array that is written out, as numpy does it
FRAME_ROWS = 20  # of a pandas table that are written out
PARAMETER_BYTES = 64 * KIB  # of one: all of them go out at once, in every preview and by WebSocket
GRAPH_BYTES = 8 * MIB  # of a `_graph_info`: 10,000 steps are about 4 MiB
VALUE_DEPTH = 100  # of a parameter or graph as JSON; deeper is shown as ...
VALUE_PARTS = 200_000  # values in one parameter or graph as JSON
READER_SECONDS = 10.0  # for one request, whatever is in it; 50 usual artifacts take 10 ms
SEARCH_SECONDS = 60.0  # for one SEARCH_SLICE, with its waiting for other searches
READER_BATCH = 200  # artifacts of one worker
READER_IDLE = 60.0  # s without a request after which the child ends; a new one takes 15 ms
READ_AHEAD = 32 * MIB  # packed bytes that a worker holds
# Beyond what it has when it starts; a pickle of 1 MiB may come to 200 MiB.
WORKER_MEMORY = 512 * MIB
WORKER_CPU = 2  # s for one value or pattern: equal hashes make sets and dicts quadratic
LOG_CPU = 30  # s for a page of a log; 80 MB take half a second
DOWNLOAD_CPU = 600  # s for a whole log
LOG_SECONDS = 30.0  # for a page of a log
LOG_PATIENCE = 3.0  # s that a log is waited for when its task has just ended
LOG_HEADER = 512  # bytes at the start of a line in which its header must end; Metaflow writes 84
LOG_LINE_BYTES = 1 * MIB  # of one line in a page; the rest is in the download
LOG_PAGE_BYTES = 16 * MIB  # of all lines in a page; a page has up to 10,000 lines
LOG_PAGE_ROWS = 100_000  # of one page, also for `_limit=0`, which means all
# Of one log; 75 bytes of memory each while it is read, about 250 MB of log.
LOG_INDEX_LINES = 2_000_000
LOG_INDEX_BYTES = 1024 * MIB  # of one log: an archive can bring a sparse file of any length
CARD_BYTES = 64 * MIB  # of one card's data
CARD_LIMIT = 1000  # cards of one task; the real service's page has as many
MAX_CLONES = 10  # resumes of resumes that a card is looked for in

# HTTP out.
# Bytes of chunk extensions in one body; nobody sends them, all are ignored.
MAX_CHUNK_EXTENSIONS = 16 * KIB
# What Metaflow's client reads to choose its features; from 2.6.1 on it would switch to cursor paging.
SERVICE_VERSION = "2.5.0"

# Access.
KEY_HEADER = "x-api-key"  # what Metaflow's client sends when METAFLOW_SERVICE_AUTH_KEY is set
# What a browser that opened the one-time URL sends; good for reading only.
KEY_COOKIE = "mflocal_key"
# Says nothing but that we live, to those who do not know the key yet.
KEYLESS_PATHS = frozenset(("/ping",))
# Seconds that a browser may remember a preflight; the most that all of them honour.
PREFLIGHT_MAX_AGE = 600

# The metadata API.
PATTERN_TIMEOUT = 10.0  # s for a client's pattern, with its waiting for others
MAX_CARD_ROOTS = 16  # places outside the root where its flows have put their cards
# The URL that `mflocal run` gives its flow leads to this and the id of its lease; a header to handlers.
LEASE_PREFIX = "/_lease/"
LEASE_HEADER = "x-mflocal-lease"
REDIRECT_SECONDS = 60.0  # s for which `mflocal ui` keeps the page that leads the browser to it

# Subscriptions.
# Seconds for which changes are collected: what one request writes about one task is one frame.
COALESCE = 0.05
WATCH_INTERVAL = 1.0  # s between two looks at what no event tells of, while somebody subscribes
JUDGE_FAILED = 5.0  # s for which a failure that nothing proves is believed: the run may come back
WATCHED_RUNS = 30  # newest runs per flow that are judged for the lists of runs: a page of the UI
SETTLED_AFTER = 10_000  # ms after which the directory of a finished task is not looked at any more
# Seconds before `since` that are replayed too: the UI needs 7 s to notice that its socket is dead.
UNNOTICED = 10
REPLAY_SECONDS = 300  # how far back `since` goes, as in the real service
# Tasks up to which a run is judged with every event; larger ones once per WATCH_INTERVAL.
RUN_AT_ONCE = 300
WS_MAX_RESOURCE = 8 * KIB  # characters of a subscription's resource, as a request line
WS_MAX_UUID = 256  # characters of a subscription's uuid; it is repeated in every frame
FAILED_FOR_LONG = 600_000  # ms after which a failed run is judged again only every JUDGE_FAILED s

# The UI API.
API_PREFIX = "/api"  # the UI's default place for its API on its own origin
# Tasks per step whose artifact names are offered for completion: they hardly differ.
COMPLETED_TASKS = 25
WIDE_RUN = 200  # tasks from which on pages that follow each other do not look at each of them again
FAULTS_NAMED = 100  # objects that cannot be shown which the log names
SEARCH_SLICE = 50  # artifacts read at once by a search, between two messages of progress
CONFIG_FILE_BYTES = 4 * MIB  # of a notifications, links or plugins file
PLUGIN_FILE_BYTES = 32 * MIB  # of one file of a plugin

# The server.
READ_SIZE = 64 * KIB  # bytes that may wait behind a request that is being answered
SEND_SIZE = 256 * KIB  # longer answers leave in pieces of that size, as fast as the client reads
MAX_UNSENT = 128 * MIB  # of all long answers that clients have not taken yet; more get 503
STREAM_COST = 512 * KIB  # what a streamed answer counts for in it: one piece, and the buffers
MAX_BODIES = 64 * MIB  # of all requests together; decoded they take several times that
SMALL_BODY = 64 * KIB  # a body that is never refused for what others send
REQUESTS_IN_ROW = 16  # pipelined requests that are answered before others have their turn
UI_FILE_BYTES = 64 * MIB  # of one file of a zipped UI; the official one's largest has 5 MiB
UI_BUNDLE_BYTES = 256 * MIB  # of all of them, unpacked; a small zip can hold gigabytes
HALF_CLOSED = 1.0  # s for a handler whose client sends no more: it still reads (nc), or is dead
# S: who closes a connection so soon after its only request keeps none, and has not died.
ONE_SHOT = 1.0
SIGNS_INTERVAL = 5.0  # s between two writes of the heartbeats; half of what Metaflow's client waits
CONTROL_PREFIX = "/_mflocal/"  # the daemon's own routes (section 15)

MAX_CONFIG = 4 * MIB  # of a config.json of Metaflow
ENV_PREFIX = "METAFLOW_LOCAL_SERVICE_"
HEARTBEAT_MODES = ("auto", "connection", "sidecar")
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
METAFLOW_DIR = ".metaflow"
STATE_DIR = ".mflocal"


# -- files that others may have planted


def open_regular(
    path: str,
    flags: int = os.O_RDONLY,
    *,
    mode: int = 0o666,
    follow: bool = False,
    limit: Optional[int] = None,
    dir_fd: Optional[int] = None,
) -> int:
    """A descriptor of a regular file; never blocks on a FIFO, never opens what a device does.

    `follow` allows a symlink as the last part of the path; `limit` is the most bytes that the file may have.
    Raises OSError, also for a link (ELOOP), another kind of file (EINVAL) and a larger one (EFBIG).
    """
    # O_NONBLOCK: else opening a FIFO waits for its other end; reading a regular file is not affected.
    flags |= os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:
        fd = os.open(path, flags, mode, dir_fd=dir_fd)
    except OSError as error:
        if error.errno == errno.ELOOP and not follow:
            raise OSError(errno.ELOOP, "it is a symbolic link", path) from None
        raise
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "it is not a regular file", path)
    if limit is not None and info.st_size > limit:
        os.close(fd)
        raise OSError(errno.EFBIG, "it is larger than %d bytes" % limit, path)
    return fd


def read_regular(
    path: str, limit: int, *, follow: bool = False, dir_fd: Optional[int] = None
) -> bytes:
    """The bytes of a regular file of at most `limit` bytes; see open_regular. Raises OSError."""
    fd = open_regular(path, follow=follow, limit=limit, dir_fd=dir_fd)
    try:
        size = os.fstat(fd).st_size
        data = os.read(fd, size)
        while len(data) < size:  # network file systems and signals may cut a read short
            more = os.read(fd, size - len(data))
            if not more:
                break
            data += more
        return data
    finally:
        os.close(fd)


class SettingsError(Exception):
    """A flag, environment variable or configuration file that cannot be used: one line, names it."""


class Settings(NamedTuple):
    """All options of one daemon, checked. Immutable; `settings._replace(port=0)` makes a changed copy.

    root: resolved absolute directory that contains .metaflow; timeouts and cutoffs in s (idle_timeout 0
    = never); allowed_hosts lower case without port; allowed_origins "scheme://host[:port]" lower case;
    asked: the names of the fields that a flag or environment variable set.
    """

    root: str
    host: str = "127.0.0.1"
    port: int = 0
    idle_timeout: float = IDLE_TIMEOUT
    auth_key: Optional[str] = None
    allowed_hosts: Tuple[str, ...] = ()
    allowed_origins: Tuple[str, ...] = ()
    debug: bool = False
    heartbeats: str = "auto"
    run_cutoff: float = RUN_CUTOFF
    local_cutoff: float = LOCAL_CUTOFF
    ui_bundle: Optional[str] = None
    notifications: Optional[str] = None
    links: Optional[str] = None
    plugins: Optional[str] = None
    asked: FrozenSet[str] = frozenset()

    @property
    def metaflow_dir(self) -> str:
        """root/.metaflow, local mode's store."""
        return os.path.join(self.root, METAFLOW_DIR)

    @property
    def state_dir(self) -> str:
        """root/.metaflow/.mflocal, mflocal's own files; a folder beside it if that is another user's."""
        shared = os.path.join(self.root, METAFLOW_DIR, STATE_DIR)
        own = f"{shared}-{os.geteuid()}"
        try:
            foreign = os.lstat(shared).st_uid != os.geteuid()
        except OSError:
            foreign = False
        return own if foreign or os.path.lexists(own) else shared


def is_loopback(host: str) -> bool:
    """True for localhost, 127.0.0.0/8 and ::1 (brackets allowed)."""
    host = host.strip("[]").lower()
    if host in LOOPBACK_NAMES:
        return True
    parts = host.split(".")
    return len(parts) == 4 and parts[0] == "127" and all(_digits(p) and int(p) < 256 for p in parts)


def _digits(text: str) -> bool:
    """ASCII digits only, and few of them: int() would also take '+5', '1_0' and Arabic digits."""
    return 0 < len(text) <= 9 and text.isascii() and text.isdigit()


# What argparse's `type=` takes: the value of a text, or ArgumentTypeError saying what it must be.


def _port(text: str) -> int:
    if not _digits(text) or int(text) > 65535:
        raise ArgumentTypeError("must be a port number from 0 to 65535, not %r" % text)
    return int(text)


def _seconds(text: str) -> float:
    whole, _, part = text.partition(".")
    if not _digits(whole) or (part and not _digits(part)):
        raise ArgumentTypeError("must be a number of seconds (0 or more), not %r" % text)
    return float(text)


def _positive(text: str) -> float:
    if _seconds(text) == 0:
        raise ArgumentTypeError("must be more than 0 seconds")
    return _seconds(text)


def _switch(text: str) -> bool:
    words = {"1": True, "true": True, "yes": True, "on": True}
    words.update({"0": False, "false": False, "no": False, "off": False})
    if text.lower() not in words:
        raise ArgumentTypeError("must be 1, true, yes or 0, false, no, not %r" % text)
    return words[text.lower()]


def _mode(text: str) -> str:
    if text not in HEARTBEAT_MODES:
        raise ArgumentTypeError("must be one of %s, not %r" % (", ".join(HEARTBEAT_MODES), text))
    return text


def _key(text: str) -> str:
    # It travels in an HTTP header: anything but visible ASCII would be refused there, or altered.
    if len(text) > 512 or not all("!" <= c <= "~" for c in text):
        raise ArgumentTypeError("must be visible ASCII characters without spaces, at most 512")
    return text


def _hostname(text: str) -> str:
    host = text.strip().strip("[]").lower()
    plain = host.replace(":", "") if host.count(":") > 1 else host  # an IPv6 address has colons
    ok = plain and plain.isascii() and all(c.isalnum() or c in "-._" for c in plain)
    if host != "::" and not ok or len(host) > 253:
        raise ArgumentTypeError("must be a host name or address without port, not %r" % text)
    return host


def _bind_host(text: str) -> str:
    """An address in its usual form: `127.1` and `0` are addresses for every socket, names for nobody."""
    host = _hostname(text)
    if host == "localhost":
        return "127.0.0.1"  # it may mean two addresses; a URL only one
    try:
        if ":" in host:
            return socket.inet_ntop(socket.AF_INET6, socket.inet_pton(socket.AF_INET6, host))
        return socket.inet_ntoa(socket.inet_aton(host))
    except OSError:
        return host


def _hosts(text: str) -> List[str]:
    return [_hostname(part) for part in text.split(",") if part.strip()]


def _origins(text: str) -> List[str]:
    found: List[str] = []
    for part in filter(str.strip, text.split(",")):
        origin = part.strip().rstrip("/").lower()
        scheme, sep, rest = origin.partition("://")
        host, _, port = rest.rpartition(":")
        if not host or rest.endswith("]"):
            host, port = rest, ""
        if scheme not in ("http", "https") or not sep or (port and not _digits(port)):
            raise ArgumentTypeError("must be like http://name:3000, not %r" % part)
        _hostname(host)
        found.append(origin)
    return found


def _path(text: str) -> str:
    if "\0" in text:
        raise ArgumentTypeError("holds a NUL character")
    return os.path.abspath(os.path.expanduser(text))


class Option(NamedTuple):
    """How to set a field of Settings: a flag, the rest of an environment variable's name, or both."""

    flag: str
    variable: str
    parse: Callable[[str], Any]
    metavar: str = ""
    help: str = ""


OPTIONS: Mapping[str, Option] = {
    "host": Option(
        "--host", "", _bind_host, "HOST", "listen on (default 127.0.0.1; others need an auth key)"
    ),
    "port": Option(
        "--port", "PORT", _port, "PORT", "TCP port (default 0: this root's last, else a free one)"
    ),
    "idle_timeout": Option(
        "--idle-timeout", "IDLE_TIMEOUT", _seconds, "SECONDS",
        "stop after so long without use, 0 = never (default 300; serve: 0)",
    ),
    "auth_key": Option("", "AUTH_KEY", _key),
    "allowed_hosts": Option(
        "--allow-host", "ALLOWED_HOSTS", _hosts, "NAME", "also answer for this Host (repeatable)"
    ),
    "allowed_origins": Option(
        "--allow-origin", "ALLOWED_ORIGINS", _origins, "URL",
        "also answer pages from this origin (repeatable)",
    ),
    "debug": Option("", "DEBUG", _switch),
    "heartbeats": Option(
        "--heartbeats", "HEARTBEATS", _mode, "MODE",
        "sidecar: leave Metaflow its heartbeat processes (default auto: connections tell)",
    ),
    "run_cutoff": Option("", "RUN_CUTOFF", _positive),
    "local_cutoff": Option("", "LOCAL_CUTOFF", _positive),
    "ui_bundle": Option(
        "--bundle", "UI_BUNDLE", _path, "DIR|ZIP", "static build of the Metaflow UI to serve"
    ),
    "notifications": Option("", "NOTIFICATIONS", _path),
    "links": Option("", "LINKS", _path),
    "plugins": Option("", "PLUGINS", _path),
}  # fmt: skip


def make_settings(
    flags: Mapping[str, Any],
    environ: Mapping[str, str],
    cwd: Optional[str] = None,
    **defaults: Any,
) -> Settings:
    """Settings from flags (field -> parsed value; absent or None = not given), then the environment, then
    `defaults`. An empty variable counts as not set. Raises SettingsError naming the variable or file."""
    values: Dict[str, Any] = {}
    for field, option in OPTIONS.items():
        given = flags.get(field)
        name = ENV_PREFIX + option.variable
        if given is None and option.variable and environ.get(name):
            try:
                given = option.parse(environ[name])
            except ArgumentTypeError as error:
                raise SettingsError("%s %s" % (name, error)) from None
        if given is not None:
            values[field] = tuple(given) if isinstance(given, list) else given
    root, explicit = find_root(flags.get("root"), environ, cwd)
    asked = frozenset(values) | ({"root"} if explicit else frozenset())
    settings = Settings(root=root, asked=asked, **{**defaults, **values})
    if not is_loopback(settings.host) and not settings.auth_key:
        raise SettingsError(
            "--host %s would open the service to other machines: set %sAUTH_KEY first"
            % (settings.host, ENV_PREFIX)
        )
    return settings


class ClientConfig:
    """Metaflow's own configuration, read as Metaflow reads it but without importing it.

    Source of the rules: `from_conf` in metaflow/metaflow_config_funcs.py: the environment, then config.json
    in the nearest .metaflow upward from the current directory, then $METAFLOW_HOME/config.json (or
    config_$METAFLOW_PROFILE.json). Files are read at most once, and only when the environment is silent.
    """

    def __init__(self, environ: Mapping[str, str], cwd: str) -> None:
        self._environ = environ
        self._cwd = cwd

    def get(self, name: str) -> Any:
        """The value of e.g. METAFLOW_SERVICE_URL: a string, or what the JSON file holds; None if not set.

        Raises SettingsError naming a configuration file that cannot be read.
        """
        if name in self._environ:
            return self._environ[name]
        return self._files.get(name)

    def datastores(self) -> List[Tuple[str, str]]:
        """(type, place) for each METAFLOW_DATASTORE_SYSROOT_<TYPE>: where the user keeps artifacts."""
        prefix = "METAFLOW_DATASTORE_SYSROOT_"
        found = []
        for name in {*self._environ, *self._files}:
            place = self.get(name) if name.startswith(prefix) else None
            if place and isinstance(place, str):
                found.append((name[len(prefix) :].lower(), place))
        return found

    @functools.cached_property
    def _files(self) -> Mapping[str, Any]:
        home = self._environ.get("METAFLOW_HOME", "~/.metaflowconfig")
        profile = self._environ.get("METAFLOW_PROFILE")
        name = "config_%s.json" % profile if profile else "config.json"
        path = os.path.expanduser(os.path.join(home, name))
        if profile and not os.path.exists(path):
            raise SettingsError("METAFLOW_PROFILE is %r but there is no %s" % (profile, path))
        found = nearest_metaflow_dir(self._cwd)
        project = _json_file(os.path.join(found, "config.json")) if found else {}
        return {**_json_file(path), **project}


def _json_file(path: str) -> Mapping[str, Any]:
    """The JSON object in a file, {} if there is none that we can see (as for Metaflow)."""
    if not os.path.exists(path):
        return {}
    try:
        value = json.loads(read_regular(path, MAX_CONFIG, follow=True))
    except (OSError, ValueError, RecursionError) as error:
        raise SettingsError("cannot read Metaflow's configuration %s: %s" % (path, error)) from None
    if not isinstance(value, dict):
        raise SettingsError("Metaflow's configuration %s is not a JSON object" % path)
    return value


def nearest_metaflow_dir(cwd: str) -> Optional[str]:
    """The .metaflow that Metaflow finds from `cwd` upward, or None."""
    current = cwd
    while True:
        candidate = os.path.join(current, METAFLOW_DIR)
        if os.path.isdir(candidate):
            return candidate
        parent = os.path.dirname(current)
        if parent == current:
            return None
        current = parent


def find_root(
    flag: Optional[str], environ: Mapping[str, str], cwd: Optional[str] = None
) -> Tuple[str, bool]:
    """(resolved directory that contains .metaflow, True if --root or its variable named it).

    Nothing is created. Without flag and variable the answer is the directory that Metaflow's local mode
    would use from `cwd` (default: the current directory). Raises SettingsError.
    """
    if cwd is None:
        try:
            cwd = os.getcwd()
        except OSError as error:
            raise SettingsError(
                "the current directory cannot be used: %s" % error.strerror
            ) from None
    for name, text in (("--root", flag), (ENV_PREFIX + "ROOT", environ.get(ENV_PREFIX + "ROOT"))):
        if text:
            root = os.path.join(cwd, os.path.expanduser(text))
            _check_root(name, root)
            return real_root(root), True
    name = "METAFLOW_DATASTORE_SYSROOT_LOCAL"
    sysroot = ClientConfig(environ, cwd).get(name)
    if sysroot is not None:
        if not isinstance(sysroot, str):
            raise SettingsError("%s in Metaflow's configuration must be a path" % name)
        root = os.path.join(cwd, sysroot)  # no expanduser: Metaflow does not expand it either
        _check_root(name, root)
        return real_root(root), False
    found = nearest_metaflow_dir(cwd)
    return real_root(os.path.dirname(found) if found else cwd), False


def _check_root(name: str, root: str) -> None:
    if "\0" in root:
        raise SettingsError("%s holds a NUL character" % name)
    if os.path.basename(os.path.normpath(root)) == METAFLOW_DIR:
        raise SettingsError(
            "%s must be the directory that contains .metaflow, not .metaflow itself" % name
        )
    if os.path.exists(root) and not os.path.isdir(root):
        raise SettingsError("%s is not a directory: %s" % (name, root))


def real_root(root: str) -> str:
    """The one name of a root. A .metaflow that is a link to another project's .metaflow is that project's."""
    real = os.path.realpath(os.path.join(root, METAFLOW_DIR))
    if os.path.basename(real) == METAFLOW_DIR:
        return os.path.dirname(real)
    return os.path.realpath(root)


# ---- 2. Records: names, JSON, and the shapes that go to disk and to clients ----

if TYPE_CHECKING:
    Record = Dict[str, Any]
    PublicId = Union[int, str]

TITLES = {
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    409: "Conflict",
    413: "Content Too Large",
    414: "URI Too Long",
    416: "Range Not Satisfiable",
    417: "Expectation Failed",
    422: "Unprocessable Content",
    426: "Upgrade Required",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    501: "Not Implemented",
    503: "Service Unavailable",
    505: "HTTP Version Not Supported",
    507: "Insufficient Storage",
}


class Problem(Exception):
    """What a client did wrong, or what kept us from doing it, as an HTTP answer.

    `status` is the HTTP status, `detail` one sentence for people, `id` a stable word for programs. The UI
    shows the text of an error only when it has an `id` (ui: useResource); `close` ends the connection.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        id: str = "",
        close: bool = False,
        headers: Optional[Mapping[str, str]] = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.id = id or TITLES.get(status, "error").lower().replace(" ", "-")
        self.close = close
        self.headers = dict(headers or {})

    def body(self) -> Record:
        """The JSON answer; it never has a `data` key, which the UI would take for a log."""
        return {
            "id": self.id,
            "status": self.status,
            "title": TITLES.get(self.status, "Error"),
            "detail": self.detail,
            "type": "about:blank",
        }


def now_ms() -> int:
    """The wall clock in ms since the epoch, as `ts_epoch` has it."""
    return time.time_ns() // 1_000_000


_encode = json.JSONEncoder(ensure_ascii=True, check_circular=False).encode


def dumps(value: Any) -> bytes:
    """JSON with non-ASCII escaped, as the real service and `json.dump` of local mode write it."""
    return _encode(value).encode("ascii")


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _short_int(text: str) -> int:
    if (
        len(text) > MAX_INT_DIGITS
    ):  # older 3.9 and 3.10 would take minutes for a body full of digits
        raise ValueError(f"{text:.40}... is too long a number")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text:.40} is too large a number")
    return value


_DECODER = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite, parse_int=_short_int)
_JSON_SPACE = re.compile(r"[ \t\n\r]*")


def loads(data: bytes) -> Any:
    """Strict JSON from outside: UTF-8 without BOM, no NaN or Infinity, bounded nesting and integers.

    Of a duplicated key the last value counts, as everywhere in Python. Raises Problem(400).
    """
    try:
        return _DECODER.decode(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Problem(400, f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    except RecursionError:
        raise Problem(400, "the body is not usable JSON: nested too deeply") from None
    except ValueError as error:
        raise Problem(400, f"the body is not JSON: {error}") from None


def list_elements(data: bytes) -> Iterator[Any]:
    """The elements of a list, as loads() would give it, decoded one at a time. ValueError: loads() it to see why."""
    text = data.decode("utf-8")

    def after_space(at: int) -> int:
        match = _JSON_SPACE.match(text, at)
        return match.end() if match else at

    at = after_space(0)
    if text[at : at + 1] != "[":
        raise ValueError("no list")
    at = after_space(at + 1)
    more = text[at : at + 1] != "]"
    while more:
        value, at = _DECODER.raw_decode(text, at)
        yield value
        at = after_space(at)
        more = text[at : at + 1] == ","
        at = after_space(at + 1) if more else at
    if text[at : at + 1] != "]" or after_space(at + 1) != len(text):
        raise ValueError("more behind the list, or no end")


# -- names. What passes here may become a file name; nothing else may.

# Local mode's own.
_RESERVED = frozenset(("_meta", "data", "latest_run"))
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def is_file_name(text: str) -> bool:
    """Whether a text can be one part of a path."""
    try:
        return (
            "/" not in text
            and "\0" not in text
            and text not in ("", ".", "..")
            and len(text.encode("utf-8")) <= MAX_FILE_NAME
        )
    except UnicodeEncodeError:
        return False


def is_flow_name(text: str) -> bool:
    """Flows and steps are Python identifiers whose directory name fits."""
    return text.isidentifier() and text != "_meta" and is_file_name(text)


def is_id(text: str) -> bool:
    """Run and task ids: any one part of a path that upsets neither a terminal nor local mode's own names.

    Local mode does not see names that begin with a dot.
    """
    hidden = text in _RESERVED or text.startswith(".")
    return not hidden and is_file_name(text) and _CONTROL.search(text) is None


def is_number(text: str) -> bool:
    """True for ids that our side hands out: ASCII digits, no sign, no leading zero but `0` itself."""
    return text.isascii() and text.isdigit() and (text == "0" or text[0] != "0") and len(text) <= 18


def public_id(text: str) -> PublicId:
    """An id as clients get it: a JSON number where it is one, else the text."""
    return int(text) if is_number(text) else text


def metadata_file(field_name: str, ms: int) -> str:
    """File name of a metadata record (LocalMetadataProvider.register_metadata)."""
    return f"sysmeta_{field_name}_{ms}.json"


def artifact_file(attempt: int, name: str) -> str:
    """File name of an artifact record (LocalMetadataProvider.register_data_artifacts)."""
    return f"{attempt}_artifact_{name}.json"


LATEST_MS = 253_402_300_799_000  # the year 9999, the last that datetime knows


def moment(value: Any, latest: float = LATEST_MS) -> Optional[int]:
    """A time that a file tells, in whatever unit `latest` has; None for what cannot be one.

    Anybody may have written the file: text, NaN, a number of 400 digits.
    """
    return value if type(value) is int and 0 <= value <= latest else None


def split_metadata_file(name: str) -> Optional[Tuple[str, int]]:
    """(field name, ms) of a metadata file name, or None."""
    if not (name.startswith("sysmeta_") and name.endswith(".json")):
        return None
    field, found, ms = name[8:-5].rpartition("_")
    return (field, int(ms)) if found and ms.isascii() and ms.isdigit() and len(ms) < 16 else None


def split_artifact_file(name: str) -> Optional[Tuple[int, str]]:
    """(attempt, artifact name) of an artifact file name, or None."""
    attempt, found, rest = name.partition("_artifact_")
    if not (found and rest.endswith(".json") and attempt.isascii() and attempt.isdigit()):
        return None
    if len(attempt) > 6:
        return None
    return int(attempt), rest[:-5]


_IDS_FROM = (
    1_577_836_800_000  # 2020-01-01, so that ms * 8192 stays an integer that JavaScript can hold
)


def metadata_id(path: str, ms: int) -> int:
    """A number for a metadata row that needs no counter: its time, then a hash of its place.

    The real service numbers the rows of its table; here the file is the row, so its id follows from it.
    """
    return (
        max(ms - _IDS_FROM, 0) * 8192 + zlib.crc32(path.encode("utf-8", "surrogateescape")) % 8192
    )


# -- records as local mode writes them (metaflow/metadata_provider/metadata.py, *_to_json)


def flow_record(flow: str, body: Mapping[str, Any], ms: int) -> Record:
    """A flow's `_self.json`; the keys beyond local mode's two only when the client sent them."""
    extra = {
        key: body[key] for key in ("user_name", "tags", "system_tags") if body.get(key) is not None
    }
    return {"flow_id": flow, **extra, "ts_epoch": ms}


def object_record(ids: Mapping[str, str], flow: str, body: Mapping[str, Any], ms: int) -> Record:
    """A run's, step's or task's `_self.json`; `ids` are run_number, step_name, task_id as far as they apply."""
    return {
        **ids,
        "flow_id": flow,
        "user_name": body.get("user_name"),
        "tags": body.get("tags"),
        "system_tags": body.get("system_tags"),
        "ts_epoch": ms,
    }


def metadata_record(ids: Mapping[str, str], flow: str, row: Mapping[str, Any], ms: int) -> Record:
    """One metadata file. `value` keeps a list (the foreach stack since Metaflow 2.14.1), else it is text."""
    record: Record = {"flow_id": flow, **ids}
    record["field_name"] = row.get("field_name", " ")
    record["type"] = row.get("type", " ")
    record["value"] = row.get("value", " ")
    record["tags"] = row.get("tags") or []
    if row.get("system_tags"):
        record["system_tags"] = row["system_tags"]
    record["user_name"] = row.get("user_name", " ")
    record["ts_epoch"] = ms
    return record


def artifact_record(ids: Mapping[str, str], flow: str, row: Mapping[str, Any], ms: int) -> Record:
    """One artifact file."""
    return {
        **ids,
        "attempt_id": row["attempt_id"],
        "name": row.get("name", " "),
        "content_type": row.get("content_type", " "),
        "type": row.get("type", " "),
        "sha": row.get("sha", " "),
        "ds_type": row.get("ds_type", " "),
        "location": row.get("location", " "),
        "flow_id": flow,
        "user_name": row.get("user_name", " "),
        "tags": row.get("tags") or [],
        "system_tags": row.get("system_tags") or [],
        "ts_epoch": ms,
    }


# -- what clients send

_NAME_LIMIT = 255  # the real service's columns are varchar(255)


def text_of(value: Any, what: str, limit: int = 0) -> str:
    """A scalar of a request body as text, as PostgreSQL would store it; Problem(400) for anything else."""
    if isinstance(value, str):
        text = value
    elif isinstance(value, bool):
        text = "true" if value else "false"
    elif isinstance(value, (int, float)):
        text = str(value)
    else:
        raise Problem(400, f"{what} must be a string, not {json_kind(value)}")
    if limit and len(text) > limit:
        raise Problem(400, f"{what} is longer than {limit} characters")
    if "\0" in text:
        raise Problem(400, f"{what} contains a NUL character")
    return text


def json_kind(value: Any) -> str:
    """The JSON name of a value's type, for messages."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, (int, float)):
        return "a number"
    return {"str": "a string", "list": "a list"}.get(type(value).__name__, "an object")


def object_body(value: Any) -> Record:
    """The body of POST flow, run, step, task: an object with usable user and tags. Raises Problem(400)."""
    if not isinstance(value, dict):
        raise Problem(400, f"the body must be a JSON object, not {json_kind(value)}")
    body: Record = {}
    if value.get("user_name") is not None:
        body["user_name"] = text_of(value["user_name"], "user_name", _NAME_LIMIT)
    for key in ("tags", "system_tags"):
        if value.get(key) is not None:
            body[key] = tag_list(value[key], key)
    return body


def tag_list(value: Any, what: str) -> List[str]:
    """A list of strings, or Problem(400)."""
    if not isinstance(value, list) or not all(isinstance(tag, str) for tag in value):
        raise Problem(400, f"{what} must be a list of strings")
    if any("\0" in tag for tag in value):
        raise Problem(400, f"{what} contains a NUL character")
    return value


def metadata_body(value: Any) -> List[Record]:
    """The rows of POST metadata. No odd value of a decorator is refused: the step that sent it would fail.

    What is not text becomes text, except `value`, which keeps its JSON type as in local mode.
    """
    rows = []
    for row in _list_body(value):
        clean: Record = {}
        for key in ("field_name", "type", "user_name"):
            if row.get(key) is not None:
                clean[key] = value_text(row[key])
        if "value" in row:
            data = row["value"]
            clean["value"] = value_text(data) if isinstance(data, (int, float)) else data
        for key in ("tags", "system_tags"):
            if isinstance(row.get(key), list):
                clean[key] = [tag for tag in row[key] if isinstance(tag, str)]
        rows.append(clean)
    return rows


def artifact_body(value: Any) -> List[Record]:
    """The rows of POST artifact, checked. Raises Problem(400)."""
    rows = []
    for place, row in enumerate(_list_body(value)):
        what = f"row {place}"
        clean: Record = {}
        for key in ("name", "location", "ds_type", "sha", "type", "content_type", "user_name"):
            if row.get(key) is not None:
                clean[key] = text_of(
                    row[key], f"{what}: {key}", 0 if key == "location" else _NAME_LIMIT
                )
        for key in ("tags", "system_tags"):
            if row.get(key) is not None:
                clean[key] = tag_list(row[key], f"{what}: {key}")
        clean["attempt_id"] = attempt_number(row.get("attempt_id", 0), what)
        if not is_file_name(artifact_file(clean["attempt_id"], clean.get("name", " "))):
            raise Problem(400, f"{what}: name {clean.get('name', ' ')!r:.80} cannot be a file name")
        rows.append(clean)
    return rows


def attempt_number(value: Any, what: str = "attempt") -> int:
    """An attempt from a body or URL: 0 to 32767 (the real service's int2). Raises Problem(400)."""
    text = str(value) if isinstance(value, (int, str)) and not isinstance(value, bool) else ""
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and int(text) < 32768):
        raise Problem(
            400, f"{what}: attempt must be a whole number from 0 to 32767, not {value!r:.40}"
        )
    return int(text)


def _list_body(value: Any) -> List[Record]:
    if value == {}:
        return []  # as recorded: an empty object stores nothing
    if not isinstance(value, list):
        raise Problem(400, f"the body must be a JSON list of objects, not {json_kind(value)}")
    if len(value) > MAX_ROWS:
        raise Problem(413, f"the body has more than {MAX_ROWS} rows")
    for place, row in enumerate(value):
        if not isinstance(row, dict):
            raise Problem(400, f"row {place} must be a JSON object, not {json_kind(row)}")
    return value


# -- rows as clients get them (the key order of the real service's answers)


def flow_row(record: Mapping[str, Any]) -> Record:
    """Flow{flow_id, user_name, ts_epoch, tags, system_tags}."""
    get = record.get
    return {
        "flow_id": get("flow_id"),
        "user_name": get("user_name"),
        "ts_epoch": get("ts_epoch"),
        "tags": get("tags"),
        "system_tags": get("system_tags"),
    }


def run_row(flow: str, run_id: str, record: Mapping[str, Any], heartbeat: Optional[int]) -> Record:
    """Run{...}: `heartbeat` in whole seconds or None."""
    get = record.get
    return {
        "flow_id": flow,
        "run_number": public_id(run_id),
        "user_name": get("user_name"),
        "ts_epoch": get("ts_epoch"),
        "tags": get("tags"),
        "system_tags": get("system_tags"),
        "last_heartbeat_ts": heartbeat,
    }


def verified_user(record: Mapping[str, Any]) -> Optional[str]:
    """The user of a run if its system tags vouch for it (`user:<user_name>`), else None."""
    user = record.get("user_name")
    return (
        user if user is not None and f"user:{user}" in (record.get("system_tags") or ()) else None
    )


def step_row(flow: str, run_id: str, record: Mapping[str, Any], run: Mapping[str, Any]) -> Record:
    """Step{...}; its `run_number` is a string, its tags are the run's, as recorded."""
    get = record.get
    return {
        "flow_id": flow,
        "run_number": run_id,
        "step_name": get("step_name"),
        "user_name": get("user_name") or "",
        "ts_epoch": get("ts_epoch"),
        "tags": run.get("tags"),
        "system_tags": run.get("system_tags"),
    }


def task_row(
    flow: str,
    run_id: str,
    task_id: str,
    record: Mapping[str, Any],
    run: Mapping[str, Any],
    heartbeat: Optional[int],
) -> Record:
    """Task{...}; tags are the run's; `heartbeat` in whole seconds or None."""
    get = record.get
    return {
        "flow_id": flow,
        "run_number": public_id(run_id),
        "step_name": get("step_name"),
        "task_id": public_id(task_id),
        "user_name": get("user_name"),
        "ts_epoch": get("ts_epoch"),
        "tags": run.get("tags"),
        "system_tags": run.get("system_tags"),
        "last_heartbeat_ts": heartbeat,
    }


def metadata_row(record: Mapping[str, Any]) -> Record:
    """Metadata{id, ...}; `record` is the file's content with the "id" that the store adds."""
    get = record.get
    return {
        "id": get("id"),
        "flow_id": get("flow_id"),
        "run_number": public_id(str(get("run_number"))),
        "step_name": get("step_name"),
        "task_id": public_id(str(get("task_id"))),
        "field_name": get("field_name"),
        "value": value_text(get("value")),
        "type": get("type"),
        "user_name": get("user_name"),
        "ts_epoch": get("ts_epoch"),
        "tags": get("tags"),
        "system_tags": get("system_tags"),
    }


def artifact_row(record: Mapping[str, Any], run: Mapping[str, Any]) -> Record:
    """Artifact{...}; tags are the run's."""
    get = record.get
    return {
        "flow_id": get("flow_id"),
        "run_number": public_id(str(get("run_number"))),
        "step_name": get("step_name"),
        "task_id": public_id(str(get("task_id"))),
        "name": get("name"),
        "location": get("location"),
        "ds_type": get("ds_type"),
        "sha": get("sha"),
        "type": get("type"),
        "content_type": get("content_type"),
        "user_name": get("user_name"),
        "attempt_id": get("attempt_id"),
        "ts_epoch": get("ts_epoch"),
        "tags": run.get("tags"),
        "system_tags": run.get("system_tags"),
    }


_ARRAY_PLAIN = re.compile(r'[^ \t\n\r\v\f{},"\\]+')


def _array_item(text: Optional[str]) -> str:
    """An element as PostgreSQL writes it: in quotes where need be, newlines and tabs as they are."""
    if text is None:
        return "NULL"
    if _ARRAY_PLAIN.fullmatch(text) and text.upper() != "NULL":
        return text
    return '"%s"' % text.replace("\\", "\\\\").replace('"', '\\"')


def value_text(value: Any) -> Optional[str]:
    """A metadata value as the text clients expect; a list becomes `{a,b}` as PostgreSQL prints arrays.

    A list of lists is JSON: quotes within quotes would double with every level.
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and not any([isinstance(item, (list, dict)) for item in value]):
        return "{" + ",".join([_array_item(value_text(item)) for item in value]) + "}"
    if isinstance(value, (bool, int, float)):
        return text_of(value, "value")
    try:
        return json.dumps(value)
    except RecursionError:
        return "nested too deeply"


def truth(value: Any) -> Optional[bool]:
    """A boolean as PostgreSQL's cast reads it (`attempt_ok` is `True` or `False`); None for anything else."""
    text = str(value).strip().lower()
    if text in ("true", "t", "yes", "y", "on", "1"):
        return True
    return False if text in ("false", "f", "no", "n", "off", "0") else None


def wants_heartbeat(system_tags: Optional[List[str]]) -> bool:
    """Whether a client of this Metaflow version beats, so that its creation counts as the first beat.

    metaflow-service services/data/postgres_async_db.py: from 2.2.12 on and for 1.14 up to 2; a version that
    cannot be parsed or missing system tags count as new, system tags without a version do not.
    """
    if system_tags is None:
        return True
    versions = [tag[17:] for tag in system_tags if tag.startswith("metaflow_version:")]
    if not versions:
        return False
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", versions[0])
    if not found:
        return True
    version = tuple(int(part or 0) for part in found.groups())
    return version >= (2, 2, 12) or (1, 14, 0) <= version < (2, 0, 0)


# ---- 3. Store: local mode's own files, read and written in place ----


class AttemptFacts:
    """What the files of a task say about one attempt; times in ms, None where nothing was written."""

    __slots__ = ("started_at", "done_at", "ok", "ok_at", "task_ok_at", "task_ok_record", "lost_at")

    def __init__(self) -> None:
        self.started_at: Optional[int] = None
        self.done_at: Optional[int] = None
        self.ok: Optional[bool] = None
        self.ok_at: Optional[int] = None
        self.task_ok_at: Optional[int] = None
        self.task_ok_record: Optional[Record] = None
        self.lost_at: Optional[int] = None

    @property
    def finished(self) -> bool:
        """Whether Metaflow has written that this attempt is over."""
        return self.ok_at is not None or self.done_at is not None


class TaskFacts:
    """The few files of a task's `_meta` from which every status follows.

    created_at and changed_at (newest change of the directory) in ms, heartbeat in s, attempts by number.
    """

    __slots__ = (
        "created_at",
        "attempts",
        "heartbeat",
        "changed_at",
        "foreach_stack",
        "start_step",
        "end_step",
    )

    def __init__(self) -> None:
        self.created_at: Optional[int] = None
        self.attempts: Dict[int, AttemptFacts] = {}
        self.heartbeat: Optional[int] = None
        self.changed_at = 0
        self.foreach_stack: Any = None
        self.start_step: Optional[str] = None
        self.end_step: Optional[str] = None

    def attempt(self, number: int) -> AttemptFacts:
        """The facts of one attempt, made empty on first use."""
        found = self.attempts.get(number)
        if found is None:
            found = self.attempts[number] = AttemptFacts()
        return found


class Signs:
    """Signs of life of a run or task that outlive the daemon, in a file that local mode ignores.

    heartbeat in s; `lost` maps attempts (a run's key is 0) to the ms at which its process was seen to die;
    `lease` names the `mflocal run` that a run belongs to; `beats`: its client sends heartbeats of its own.
    """

    __slots__ = ("heartbeat", "lost", "lease", "beats")

    def __init__(self) -> None:
        self.heartbeat: Optional[int] = None
        self.lost: Dict[int, int] = {}
        self.lease: Optional[str] = None
        self.beats = False


class FlowNode:
    """A flow's directory; `record` is its `_self.json`."""

    __slots__ = ("name", "path", "record", "sig", "children", "dir_sig", "baseline", "listed")

    def __init__(self, root: str, name: str) -> None:
        self.name = name
        self.path = f"{root}/{name}"
        self.record: Optional[Record] = None
        self.sig: Any = None
        self.children: Dict[str, RunNode] = {}
        self.listed: Optional[List[RunNode]] = None
        self.dir_sig = 0
        self.baseline = False


class RunNode:
    """A run's directory, ids as text; `next_task` is the next number to hand out, None until counted.

    `used`: when its steps were last asked for (monotonic s).
    """

    __slots__ = (
        "flow", "id", "path", "record", "sig", "children", "dir_sig", "baseline", "next_task", "signs", "memo", "used",
    )  # fmt: skip

    def __init__(self, flow: FlowNode, id: str) -> None:
        self.flow = flow.name
        self.id = id
        self.path = f"{flow.path}/{id}"
        self.record: Optional[Record] = None
        self.sig: Any = None
        self.children: Dict[str, StepNode] = {}
        self.dir_sig = 0
        self.baseline = False
        self.next_task: Optional[int] = None
        self.signs: Optional[Signs] = None
        self.memo: Any = None
        self.used = 0.0

    @property
    def self_record(self) -> Record:
        """`_self.json`, {} when it was not read."""
        return self.record or {}


class StepNode:
    """A step's directory."""

    __slots__ = (
        "run",
        "name",
        "path",
        "record",
        "sig",
        "children",
        "dir_sig",
        "baseline",
        "listed",
    )

    def __init__(self, run: RunNode, name: str) -> None:
        self.run = run
        self.name = name
        self.path = f"{run.path}/{name}"
        self.record: Optional[Record] = None
        self.sig: Any = None
        self.children: Dict[str, TaskNode] = {}
        self.listed: Optional[List[TaskNode]] = None
        self.dir_sig = 0
        self.baseline = False


class TaskNode:
    """A task's directory; `facts` is kept while the directory does not change."""

    __slots__ = (
        "step",
        "id",
        "path",
        "record",
        "sig",
        "facts",
        "meta_sig",
        "read",
        "signs",
        "memo",
        "checked",
    )

    def __init__(self, step: StepNode, id: str) -> None:
        self.step = step
        self.id = id
        self.path = f"{step.path}/{id}"
        self.record: Optional[Record] = None
        self.sig: Any = None
        self.facts: Optional[TaskFacts] = None
        self.meta_sig = 0
        self.read: Set[str] = set()
        self.signs: Optional[Signs] = None
        self.memo: Any = None
        self.checked = 0.0

    @property
    def run(self) -> RunNode:
        """The run this task belongs to."""
        return self.step.run

    @property
    def self_record(self) -> Record:
        """`_self.json`, {} when it was not read."""
        return self.record or {}

    @property
    def pathspec(self) -> str:
        """Flow/run/step/task."""
        return f"{self.run.flow}/{self.run.id}/{self.step.name}/{self.id}"


if TYPE_CHECKING:
    Node = Union[FlowNode, RunNode, StepNode, TaskNode]


class Event(NamedTuple):
    """Something new in the store: `kind` is flow, run, step, task, metadata, artifact, tags or signs.

    The nodes above the one that changed are set too; `rows` are records as on disk for metadata and artifact.
    """

    kind: str
    flow: FlowNode
    run: Optional[RunNode] = None
    step: Optional[StepNode] = None
    task: Optional[TaskNode] = None
    rows: Tuple[Record, ...] = ()


class Pacer:
    """Lets a long walk on the event loop give way: `await pace()` waits for its turn once WALK_SLICE was used.

    One walk goes on per turn of the loop. If each of 20 did, a ping would wait for 20 slices.
    """

    __slots__ = ("_until",)
    _waiting: ClassVar[Deque[asyncio.Future[None]]] = collections.deque()

    def __init__(self) -> None:
        self._until = 0.0 if self._waiting else time.perf_counter() + WALK_SLICE

    async def __call__(self) -> None:
        if time.perf_counter() > self._until:
            from asyncio import get_running_loop

            loop = get_running_loop()
            turn = loop.create_future()
            self._waiting.append(turn)
            if len(self._waiting) == 1:
                loop.call_soon(self._next, loop)
            try:
                await turn
            finally:
                if turn in self._waiting:  # cancelled: its client has left
                    self._waiting.remove(turn)
            self._until = time.perf_counter() + WALK_SLICE

    @classmethod
    def _next(cls, loop: asyncio.AbstractEventLoop) -> None:
        if cls._waiting:
            turn = cls._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
        if cls._waiting:
            loop.call_soon(cls._next, loop)


# -- the file primitives


_scan = json.JSONDecoder().raw_decode


def read_record(path: str) -> Optional[Record]:
    """A JSON object file, or None when it is missing, no regular file, unreadable or not (yet) whole.

    Symlinks are not followed and a FIFO does not block: a checkout may have shipped them.
    """
    try:
        text = read_regular(path, RECORD_LIMIT).decode("utf-8").strip(" \t\r\n")
        value, end = _scan(text)  # json.loads without its guess at the encoding
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and end == len(text) else None


def disk_problem(error: OSError, path: str) -> Problem:
    """The answer for a failed write: 507 when the disk is full, else 500; both name the path."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return Problem(
        507 if full else 500,
        f"cannot write {path}: {reason}",
        id="no-space" if full else "disk-error",
    )


if TYPE_CHECKING:
    _Named = TypeVar("_Named", RunNode, StepNode, TaskNode)
    RunOrTask = Union[RunNode, TaskNode]


class Store:
    """The tree below `.metaflow`, indexed in memory and revalidated against the files by every read.

    One thread, the event loop's, uses it: there are no locks. What walks many files is async and gives way.
    The index is never the truth: a stat of the file or directory in question comes before each answer.
    """

    def __init__(
        self, metaflow_dir: str, temp_dir: str, log: Callable[[str], None] = lambda text: None
    ) -> None:
        self.root = metaflow_dir
        self._log = log
        self._torn: Set[str] = set()  # paths of records that the log has named
        self.temp_dir = temp_dir
        self._lease_dir = f"{os.path.dirname(temp_dir)}/leases"
        self.listeners: List[Callable[[Event], None]] = []
        self._flows: Dict[str, FlowNode] = {}
        self._root_sig = 0
        self._baseline = False
        self._last_run = 0
        self._tags: Dict[str, str] = {}
        self._unsaved: Set[RunOrTask] = set()
        self._rows: collections.OrderedDict[Tuple[str, str], Tuple[int, List[Record]]] = (
            collections.OrderedDict()
        )
        self._rows_held = 0

    # -- writing

    def sweep(self) -> int:
        """Makes the folder for temp files or empties it of what a killed daemon left; returns how many that were.

        A link or file in its place, as a checkout may ship it, is removed and never followed.
        """
        if not _is_directory(self.temp_dir):
            if os.path.lexists(self.temp_dir):
                os.unlink(self.temp_dir)
            os.makedirs(self.temp_dir, mode=0o700)
        os.chmod(self.temp_dir, 0o700)
        leases = self._lease_dir
        if not _is_directory(leases):
            _remove([leases])
            os.mkdir(leases, 0o700)
        for name in os.listdir(leases):
            if time.time() - os.lstat(f"{leases}/{name}").st_mtime > LEASE_KEPT:
                _remove([f"{leases}/{name}"])
        with os.scandir(self.temp_dir) as entries:
            left = [entry.path for entry in entries if not entry.is_dir(follow_symlinks=False)]
        _remove(left)
        return len(left)

    def _write(self, path: str, record: Record) -> None:
        """The one way to write a record: a new file, filled, renamed, under the user's umask. Raises Problem."""
        data = dumps(record)
        try:
            # Somebody may tidy up or replace our folder or the temp file, by tar or `sed -i` over the whole tree.
            for _ in range(WRITE_TRIES):
                try:
                    if self._publish(data, path):
                        return
                except FileNotFoundError:
                    if os.path.lexists(self.temp_dir):
                        raise
                    os.mkdir(self.temp_dir, 0o700)
            raise OSError(errno.EIO, "the file is replaced by another program all the time")
        except OSError as error:
            raise disk_problem(error, path) from None

    def _publish(self, data: bytes, path: str) -> bool:
        """Writes a file and renames it to `path`; False when another file has come to stand there."""
        # A name that no archive of this tree can hold, so that unpacking one does not touch the file.
        temp = f"{self.temp_dir}/{os.urandom(8).hex()}"
        fd = open_regular(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            written = 0
            while written < len(data):
                written += os.write(fd, data[written:])
            os.rename(temp, path)
            ours = os.fstat(fd)
            return _signature(path) == (ours.st_mtime_ns, ours.st_ino, len(data))
        except OSError:
            _remove([temp])
            raise
        finally:
            os.close(fd)

    def _make(self, node: Node, record: Record, claimed: bool = False) -> bool:
        """Makes a new object's directories and `_self.json`; False when it exists already.

        Each level by one mkdir: a `.metaflow` that the user deleted is never made again.
        """
        meta = f"{node.path}/_meta"
        made: List[str] = [node.path] if claimed else []
        for path in (meta,) if claimed else (node.path, meta):
            try:
                os.mkdir(path)
                made.append(path)
            except FileExistsError:
                if not _is_directory(path):
                    raise Problem(
                        500, f"cannot write {path}: it is not a directory", id="disk-error"
                    ) from None
            except OSError as error:
                _remove_empty(made)
                raise disk_problem(error, path) from None
        own = f"{meta}/_self.json"
        if meta not in made and os.path.lexists(
            own
        ):  # in a directory that we have just made there is none
            return False
        try:
            self._write(own, record)
        except Problem:
            _remove_empty(made)
            raise
        node.record, node.sig = _kept(node, record), _signature(own)
        return True

    def create_flow(self, name: str, body: Record) -> Optional[FlowNode]:
        """Makes a flow from a checked body; None when it exists."""
        node = FlowNode(self.root, name)
        record = flow_record(name, body, now_ms())
        if not self._make(node, record):
            return None
        self._flows[name] = node
        node.baseline = True
        self._tell(Event("flow", node))
        return node

    def create_run(
        self, flow: FlowNode, body: Record, run_id: Optional[str] = None
    ) -> Optional[RunNode]:
        """Makes a run: id microseconds since the epoch, strictly rising and exclusive by mkdir, or the client's.

        None when the client's id is taken. A first heartbeat counts from now on (api: heartbeats).
        """
        self._check_place(flow.path)
        while True:
            ms = now_ms()
            number = run_id or str(max(time.time_ns() // 1000, self._last_run + 1))
            node = RunNode(flow, number)
            record = object_record({"run_number": number}, flow.name, body, ms)
            if run_id is None:
                self._last_run = int(number)
                if not _exclusive(node.path):
                    continue
            if not self._make(node, record, claimed=run_id is None):
                return None
            break
        node.next_task = 1 if run_id is None else None
        node.baseline = True
        flow.children[number] = node
        node.signs = Signs()
        if wants_heartbeat(body.get("system_tags")):
            self.beat(node, ms // 1000)
            self._save_signs(node)
        self._tell(Event("run", flow, node))
        return node

    def create_step(self, run: RunNode, name: str, body: Record) -> Optional[StepNode]:
        """Makes a step; None when it exists."""
        self._check_place(run.path)
        node = StepNode(run, name)
        record = object_record({"run_number": run.id, "step_name": name}, run.flow, body, now_ms())
        if not self._make(node, record):
            return None
        run.children[name] = node
        node.baseline = True
        self._tell(Event("step", self._flows[run.flow], run, node))
        return node

    def create_task(
        self, step: StepNode, body: Record, task_id: Optional[str] = None
    ) -> Optional[TaskNode]:
        """Makes a task: the run's next number, exclusive by mkdir, or the client's id; None when that is taken."""
        run = step.run
        self._check_place(step.path)
        while True:
            ms = now_ms()
            number = task_id or str(self._next_task(run))
            node = TaskNode(step, number)
            ids = {"run_number": run.id, "step_name": step.name, "task_id": number}
            if task_id is None:
                run.next_task = int(number) + 1
                if not _exclusive(node.path):
                    run.next_task = None
                    continue
            if not self._make(
                node, object_record(ids, run.flow, body, ms), claimed=task_id is None
            ):
                return None
            break
        step.children[number] = node
        node.facts = TaskFacts()
        node.facts.created_at = node.facts.changed_at = ms
        node.signs = Signs()
        if wants_heartbeat(body.get("system_tags")):
            self.beat(node, ms // 1000)
        self._tell(Event("task", self._flows[run.flow], run, step, node))
        return node

    def _next_task(self, run: RunNode) -> int:
        """The next free task number of a run, seeded from disk: above every number in any step."""
        if run.next_task is None:
            highest = 0
            for step in _directories(run.path):
                for task in _directories(f"{run.path}/{step}"):
                    if is_number(task):
                        highest = max(highest, int(task))
            run.next_task = highest + 1
        self._scan(run, lambda name: StepNode(run, name), is_flow_name)
        while any(
            [os.path.lexists(f"{step.path}/{run.next_task}") for step in run.children.values()]
        ):
            run.next_task += 1
        return run.next_task

    def _check_place(self, directory: str) -> None:
        """Problem(500) where `.metaflow` or a directory below it has become a link since it was read."""
        place = self.root
        for part in directory[len(place) :].split("/"):
            place = f"{place}/{part}" if part else place
            try:
                is_link = stat.S_ISLNK(os.lstat(place).st_mode)
            except OSError:
                return  # not there: what is to be written below it fails by itself
            if is_link:
                raise Problem(500, f"cannot write {directory}: {place} is a link", id="disk-error")

    async def add_metadata(self, task: TaskNode, rows: List[Record]) -> int:
        """Writes metadata rows, all or none, one file each; returns how many.

        The times in their file names rise by 1 ms from row to row, and with them the ids: the rows keep their
        order, and no field overwrites itself as it does in local mode. Their `ts_epoch` is the same.
        """
        run, meta = task.run, f"{task.path}/_meta"
        self._check_place(meta)
        ids = {"run_number": run.id, "step_name": task.step.name, "task_id": task.id}
        ms, pace, written = now_ms(), Pacer(), []
        records: List[Record] = []
        at = ms
        try:
            for row in rows:
                record = metadata_record(ids, run.flow, row, ms)
                while os.path.lexists(path := f"{meta}/{metadata_file(record['field_name'], at)}"):
                    at += 1
                self._write(path, record)
                written.append(path)
                records.append(record)
                at += 1
                await pace()
        except Problem:
            _remove(written)
            raise
        self._tell_rows("metadata", task, records, written)
        return len(records)

    async def add_artifacts(self, task: TaskNode, rows: List[Record]) -> int:
        """Writes checked artifact rows, all or none; returns how many were new (a known name keeps its record)."""
        run, meta = task.run, f"{task.path}/_meta"
        self._check_place(meta)
        ids = {"run_number": run.id, "step_name": task.step.name, "task_id": task.id}
        ms, pace, written = now_ms(), Pacer(), []
        records: List[Record] = []
        try:
            for row in rows:
                record = artifact_record(ids, run.flow, row, ms)
                path = f"{meta}/{artifact_file(record['attempt_id'], record['name'])}"
                if not os.path.lexists(path):
                    self._write(path, record)
                    written.append(path)
                    records.append(record)
                await pace()
        except Problem:
            _remove(written)
            raise
        self._tell_rows("artifact", task, records, written)
        return len(records)

    def _tell_rows(
        self, kind: str, task: TaskNode, records: List[Record], written: List[str]
    ) -> None:
        if not records:
            return
        if task.facts is not None:
            names = [path.rpartition("/")[2] for path in written]
            for name, record in zip(names, records):
                if _is_fact(name):
                    task.read.add(name)
                    _take_fact(task.facts, name, record)
            task.facts.changed_at = max(task.facts.changed_at, now_ms())
        for record, path in zip(records, written):
            if kind == "metadata":
                record["id"] = metadata_id(path[len(self.root) :], record["ts_epoch"])
        self._tell(
            Event(kind, self._flows[task.run.flow], task.run, task.step, task, tuple(records))
        )

    def replace_tags(self, run: RunNode, tags: List[str]) -> None:
        """Rewrites a run's user tags; its ts_epoch, user and unknown keys stay (local mode would reset them)."""
        record = dict(run.self_record, tags=tags)
        path = f"{run.path}/_meta/_self.json"
        self._check_place(os.path.dirname(path))
        self._write(path, record)
        run.record, run.sig = record, _signature(path)
        self._tell(Event("tags", self._flows[run.flow], run))

    # -- signs of life

    def signs(self, node: RunOrTask) -> Signs:
        """The signs of life of a run or task, read from disk on first use."""
        if node.signs is None:
            node.signs = signs = Signs()
            saved = read_record(f"{node.path}/_meta/{SIGNS_FILE}") or {}
            lost = saved.get("lost")
            # One that is still to come would keep its run alive for ever; a day is a clock gone wrong.
            signs.heartbeat = moment(saved.get("last_heartbeat_ts"), time.time() + 86_400)
            if isinstance(saved.get("lease"), str):
                signs.lease = saved["lease"]
            signs.beats = saved.get("beats") is True
            if isinstance(lost, dict):
                signs.lost = {
                    int(k): v for k, v in lost.items() if is_number(k) and moment(v) is not None
                }
        return node.signs

    def beat(self, node: RunOrTask, at: int, own: bool = False) -> None:
        """A heartbeat at `at` (s), the client's `own` or one of ours; on disk at the next `flush_signs`."""
        signs = self.signs(node)
        if own and not signs.beats:
            signs.beats = True
            self._unsaved.add(node)
        if signs.heartbeat is None or at > signs.heartbeat:
            signs.heartbeat = at
            self._unsaved.add(node)

    def mark_lost(self, node: RunOrTask, attempt: int, at: Optional[int]) -> None:
        """Records (at in ms) or withdraws (None) that the process behind an attempt has died; on disk at once."""
        signs = self.signs(node)
        if at is None:
            if signs.lost.pop(attempt, None) is None:
                return
        elif signs.lost.get(attempt) == at:
            return
        else:
            signs.lost[attempt] = at
        self._save_signs(node)
        self._tell_signs(node)

    def set_lease(self, run: RunNode, lease: str) -> None:
        """Remembers, across restarts too, which `mflocal run` a run belongs to."""
        signs = self.signs(run)
        if signs.lease != lease:
            signs.lease = lease
            self._save_signs(run)
            try:
                fd = open_regular(self._lease_file(lease), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                try:
                    os.write(fd, f"{run.flow}/{run.id}\n".encode())
                finally:
                    os.close(fd)
            except OSError:
                pass  # only a restart under this very lease would miss it

    def _lease_file(self, lease: str) -> str:
        safe = "".join(c for c in lease if c.isalnum())[:64]
        return f"{self._lease_dir}/{safe}"

    def lease_runs(self, lease: str) -> List[RunNode]:
        """The runs of one `mflocal run`, also those that a daemon before this one has seen begin."""
        try:
            names = read_regular(self._lease_file(lease), MIB).decode("utf-8").split()
        except (OSError, ValueError):
            return []
        found = [self.run(flow, run) for flow, _, run in (name.partition("/") for name in names)]
        return [run for run in found if run is not None]

    def drop_lease(self, lease: str) -> None:
        """Forgets the runs of a wrapper that is gone."""
        _remove([self._lease_file(lease)])

    def _tell_signs(self, node: RunOrTask) -> None:
        run = node.run if isinstance(node, TaskNode) else node
        flow = self._flows.get(run.flow)
        if flow is not None:
            task = node if isinstance(node, TaskNode) else None
            self._tell(Event("signs", flow, run, task.step if task else None, task))

    def flush_signs(self) -> None:
        """Writes the heartbeats that came since the last call; a failing disk loses none that matter."""
        waiting, self._unsaved = self._unsaved, set()
        for node in waiting:
            self._save_signs(node)

    def _save_signs(self, node: RunOrTask) -> None:
        # In place and padded: one small pwrite is never torn by a kill, and the directory's mtime, by which
        # readers revalidate, stays as it is.
        signs = self.signs(node)
        self._unsaved.discard(node)
        saved: Record = {
            "last_heartbeat_ts": signs.heartbeat,
            "lost": {str(k): v for k, v in signs.lost.items()},
        }
        if signs.lease is not None:
            saved["lease"] = signs.lease
        if signs.beats:
            saved["beats"] = True
        data = dumps(saved)
        try:
            fd = open_regular(f"{node.path}/_meta/{SIGNS_FILE}", os.O_WRONLY | os.O_CREAT)
            try:
                os.pwrite(fd, data.ljust(max(128, os.fstat(fd).st_size - 1)) + b"\n", 0)
            finally:
                os.close(fd)
        except FileNotFoundError:
            return
        except OSError:
            self._unsaved.add(node)

    # -- reading single objects

    def _valid(self, node: Node) -> bool:
        """Revalidates a node's `_self.json` by one stat and reads it again when it changed."""
        path = f"{node.path}/_meta/_self.json"
        sig = _signature(path)
        if sig is None or (node.record is None and not _is_directory(f"{node.path}/_meta")):
            node.record = node.sig = None
            self._unlist(node)
            return False
        if sig != node.sig or node.record is None:
            self._unlist(node)
            changed = node.record is not None and isinstance(node, RunNode)
            record = self._read(path)
            if record is None:
                return False
            _repair(record)
            if isinstance(node, RunNode):
                record["ts_epoch"] = _true_start(node, record.get("ts_epoch"))
            self._share_tags(record)
            node.record, node.sig = _kept(node, record), sig
            if changed and isinstance(node, RunNode):
                self._tell(Event("tags", self._flows[node.flow], node))
        return True

    def _read(self, path: str) -> Optional[Record]:
        """read_record; the log names once what a power cut or a full disk has left empty or torn."""
        record = read_record(path)
        if record is None and len(self._torn) < FAULTS_NAMED and path not in self._torn:
            if not _may_grow(path):
                self._torn.add(path)
                self._log(f"{path} is no whole record: it is skipped")
        return record

    def _unlist(self, node: Node) -> None:
        """A run's or task's record came, went or changed: the sorted list that it stands in is no longer right."""
        if isinstance(node, RunNode):
            parent = self._flows.get(node.flow)
            if parent is not None:
                parent.listed = None
        elif isinstance(node, TaskNode):
            node.step.listed = None

    def _share_tags(self, record: Record) -> None:
        # Ten thousand runs carry the same few tags: one string each.
        for key in ("tags", "system_tags"):
            tags = record.get(key)
            if isinstance(tags, list):
                if len(self._tags) > 50_000:
                    self._tags.clear()
                record[key] = [
                    self._tags.setdefault(t, t) if isinstance(t, str) else t for t in tags
                ]

    def _flow_node(self, name: str) -> Optional[FlowNode]:
        node = self._flows.get(name)
        if node is None:
            if not is_flow_name(name):
                return None
            node = FlowNode(self.root, name)
            if not _is_directory(node.path) or not _is_directory(f"{node.path}/_meta"):
                return None
            self._flows[name] = node
        return node

    def flow(self, name: str) -> Optional[FlowNode]:
        """A flow by name, revalidated; None when there is none."""
        node = self._flow_node(name)
        return node if node is not None and self._valid(node) else None

    def run(self, flow: str, run_id: str) -> Optional[RunNode]:
        """A run by flow and id, revalidated; None when there is none."""
        parent = self._flow_node(flow)
        if parent is None:
            return None
        node = parent.children.get(run_id)
        if node is None:
            if not is_id(run_id):
                return None
            node = RunNode(parent, run_id)
            if not _is_directory(node.path) or not self._valid(node):
                return None
            if parent.baseline:
                self._found(parent, node)
            parent.children[run_id] = node
        elif not self._valid(node):
            return None
        return node

    def step(self, run: RunNode, name: str) -> Optional[StepNode]:
        """A step of a run, revalidated; None when there is none."""
        run.used = time.monotonic()
        node = run.children.get(name)
        if node is None:
            if not is_flow_name(name):
                return None
            node = StepNode(run, name)
            if not _is_directory(node.path) or not self._valid(node):
                return None
            run.children[name] = node
            if run.baseline:
                self._tell(Event("step", self._flows[run.flow], run, node))
        elif not self._valid(node):
            return None
        return node

    def task(self, step: StepNode, task_id: str) -> Optional[TaskNode]:
        """A task of a step, revalidated; None when there is none."""
        node = step.children.get(task_id)
        if node is None:
            if not is_id(task_id):
                return None
            node = TaskNode(step, task_id)
            if not _is_directory(node.path) or not self._valid(node):
                return None
            step.children[task_id] = node
            if step.baseline:
                self._tell(Event("task", self._flows[step.run.flow], step.run, step, node))
        elif not self._valid(node):
            return None
        return node

    def find_task(self, flow: str, run_id: str, step_name: str, task_id: str) -> Optional[TaskNode]:
        """A task by its whole pathspec; None as soon as a part is missing."""
        run = self.run(flow, run_id)
        step = self.step(run, step_name) if run else None
        return self.task(step, task_id) if step else None

    def _found(self, parent: FlowNode, node: RunNode) -> None:
        self._tell(Event("run", parent, node))

    # -- reading lists

    def _scan(
        self,
        node: Union[FlowNode, RunNode, StepNode],
        make: Callable[[str], Any],
        good: Callable[[str], bool],
    ) -> None:
        """Brings `children` up to date with the directory if its mtime changed."""
        try:
            mtime = os.stat(node.path).st_mtime_ns
            if mtime == node.dir_sig:
                return
            if not isinstance(node, RunNode):
                node.listed = None
            children: Dict[str, Any] = node.children
            seen = set()
            with os.scandir(node.path) as entries:
                for entry in entries:
                    name = entry.name
                    seen.add(name)
                    if name not in children and good(name) and entry.is_dir(follow_symlinks=False):
                        children[name] = make(name)
        except OSError:
            node.children.clear()
            node.dir_sig = 0
            if not isinstance(node, RunNode):
                node.listed = None
            return
        if len(seen) <= len(children):
            for name in [name for name in children if name not in seen]:
                del children[name]
        else:
            for name in children.keys() - seen:
                del children[name]
        node.dir_sig = _settled(mtime)

    async def flows(self) -> List[FlowNode]:
        """All flows, newest first."""
        pace, flows = Pacer(), self._flows
        mtime = os.stat(self.root).st_mtime_ns if os.path.isdir(self.root) else 0
        if mtime != self._root_sig:
            try:
                with os.scandir(self.root) as entries:
                    names = {
                        e.name
                        for e in entries
                        if is_flow_name(e.name) and e.is_dir(follow_symlinks=False)
                    }
            except (
                OSError
            ):  # for a moment, perhaps: what is known stays, and the next call looks again
                names, mtime = set(flows), 0
            for name in flows.keys() - names:
                del flows[name]
            for name in names - flows.keys():
                flows[name] = FlowNode(self.root, name)
            self._root_sig = _settled(mtime) if mtime else 0
        found = []
        for node in list(flows.values()):
            new = node.record is None
            if self._valid(node):
                found.append(node)
                if new and self._baseline:
                    self._tell(Event("flow", node))
            await pace()
        self._baseline = True
        found.sort(key=_newest_first)
        return found

    async def runs(self, flow: FlowNode) -> List[RunNode]:
        """All runs of a flow, newest first. Rows read before are not all checked again here: see `check`."""
        self._scan(flow, lambda name: RunNode(flow, name), is_id)
        if flow.listed is None:
            found = await self._readable(
                list(flow.children.values()), lambda node: self._found(flow, node), flow.baseline
            )
            flow.baseline = True
            if not flow.dir_sig or len(found) < len(flow.children):
                return found
            flow.listed = found
        return list(flow.listed)

    async def _readable(
        self, nodes: List[_Named], tell: Callable[[_Named], None], known: bool
    ) -> List[_Named]:
        """Those nodes of a directory that have a `_self.json`, newest first; new ones are told if it was `known`."""
        pace, found = Pacer(), []
        for node in nodes:
            if node.record is None:
                if not self._valid(node):
                    continue
                if known:
                    tell(node)
                await pace()
            found.append(node)
        found.sort(key=_newest_first)
        return found

    async def check(self, runs: List[RunNode]) -> List[RunNode]:
        """Revalidates the runs that are about to be shown; drops those that are gone."""
        pace, good = Pacer(), []
        for run in runs:
            if self._valid(run):
                good.append(run)
            await pace()
        return good

    def steps(self, run: RunNode) -> List[StepNode]:
        """The steps of a run in the order in which they began."""
        run.used = time.monotonic()
        self._scan(run, lambda name: StepNode(run, name), is_flow_name)
        found = []
        for node in list(run.children.values()):
            if node.record is None:
                if not self._valid(node):
                    continue
                if run.baseline:
                    self._tell(Event("step", self._flows[run.flow], run, node))
            found.append(node)
        run.baseline = True
        found.sort(key=lambda node: ((node.record or {}).get("ts_epoch") or 0, node.name))
        return found

    async def tasks(self, step: StepNode) -> List[TaskNode]:
        """The tasks of a step, newest first."""

        def tell(node: TaskNode) -> None:
            self._tell(Event("task", self._flows[step.run.flow], step.run, step, node))

        step.run.used = time.monotonic()
        self._scan(step, lambda name: TaskNode(step, name), is_id)
        if step.listed is None:
            found = await self._readable(list(step.children.values()), tell, step.baseline)
            step.baseline = True
            if not step.dir_sig or len(found) < len(step.children):
                return found
            step.listed = found
        return list(step.listed)

    def task_nodes(self, step: StepNode) -> List[TaskNode]:
        """The tasks that a step has on disk, in no order and their `_self.json` perhaps not read yet."""
        self._scan(step, lambda name: TaskNode(step, name), is_id)
        return list(step.children.values())

    def trim(
        self, held: Collection[RunNode], limit: int = TASKS_KEPT, rest: float = TASKS_REST
    ) -> int:
        """Forgets steps and tasks of the runs that were asked for the longest ago, until `limit` tasks are left.

        Not those of `held` runs, of runs asked for in the last `rest` seconds, or with signs that are not on disk
        yet: somebody may have their nodes in hand. Returns how many tasks went; the files bring them back.
        """
        busy = {node.run if isinstance(node, TaskNode) else node for node in self._unsaved}
        runs, total = [], 0
        for flow in self._flows.values():
            for run in flow.children.values():
                if run.children:
                    size = sum([len(step.children) for step in run.children.values()])
                    total += size
                    runs.append((run.used, size, run))
        gone, before = 0, time.monotonic() - rest
        if total <= limit:
            return 0
        for used, size, run in sorted(runs, key=lambda one: one[0]):
            if total - gone <= limit or used > before:
                break
            if run not in held and run not in busy:
                for step in run.children.values():
                    step.children = {}  # else they would hold each other, until a full collection
                run.children, run.dir_sig, run.baseline, run.next_task = {}, 0, False, None
                gone += size
        return gone

    async def run_tasks(self, run: RunNode) -> List[TaskNode]:
        """All tasks of a run, step by step."""
        found: List[TaskNode] = []
        for step in self.steps(run):
            found += await self.tasks(step)
        return found

    # -- what a task's files say

    def facts(self, task: TaskNode) -> TaskFacts:
        """The facts of a task; costs one stat while its directory does not change."""
        facts, first = task.facts, task.facts is None
        if facts is None:
            facts = task.facts = TaskFacts()
            task.read = set()
        meta = f"{task.path}/_meta"
        task.checked = time.monotonic()
        try:
            mtime = os.stat(meta).st_mtime_ns
            if mtime != task.meta_sig:
                whole = self._read_facts(task, facts, meta, first)
                facts.changed_at = max(facts.changed_at, mtime // 1_000_000)
                task.meta_sig = _settled(mtime) if whole else 0
        except OSError:
            pass
        facts.created_at = task.self_record.get("ts_epoch")
        signs = task.signs or self.signs(task)
        facts.heartbeat = signs.heartbeat
        for number, at in signs.lost.items():
            facts.attempt(number).lost_at = at
        for number, attempt in facts.attempts.items():
            if attempt.lost_at is not None and number not in signs.lost:
                attempt.lost_at = None
        return facts

    def _read_facts(self, task: TaskNode, facts: TaskFacts, meta: str, first: bool) -> bool:
        """Reads the records among the new names that the facts need; tells listeners unless this is the first look."""
        half = False
        fresh: List[Record] = []
        with os.scandir(meta) as entries:
            names = [entry.name for entry in entries]
        for name in names:
            if name not in task.read and _is_fact(name):
                record = self._read(f"{meta}/{name}")
                if record is None:
                    half = half or _may_grow(f"{meta}/{name}")
                    continue
                task.read.add(name)
                _take_fact(facts, name, record)
                parts = None if first else split_metadata_file(name)
                if parts:
                    record["id"] = metadata_id(f"{meta}/{name}"[len(self.root) :], parts[1])
                    fresh.append(record)
        if fresh and not first:
            flow = self._flows[task.run.flow]
            self._tell(Event("metadata", flow, task.run, task.step, task, tuple(fresh)))
        return not half

    async def run_facts(self, run: RunNode) -> List[Tuple[TaskNode, TaskFacts]]:
        """Every task of a run with its facts. Finished ones looked at a moment ago are not stat'ed again."""
        pace, found = Pacer(), []
        tasks = await self.run_tasks(run)
        fresh_from = time.monotonic() - (RECHECK_AFTER if len(tasks) > 200 else 0)
        for task in tasks:
            facts = task.facts
            if facts is None or task.checked < fresh_from:
                facts = self.facts(task)
                await pace()
            found.append((task, facts))
        return found

    def end_step(self, run: RunNode) -> str:
        """The name of a run's last step: `end` unless `_parameters` says otherwise (Metaflow 2.19.23 on)."""
        if "end" in run.children or _is_directory(f"{run.path}/end"):
            return "end"
        step = self.step(run, "_parameters")
        for name in _directories(step.path) if step else ():
            task = self.task(step, name) if step else None
            if task is not None:
                named = self.facts(task).end_step
                if named:
                    return named
        return "end"

    async def metadata(self, task: TaskNode) -> List[Record]:
        """All metadata records of a task as on disk, plus "id"; newest first (ts_epoch, then id)."""
        return await self._task_rows(task, "metadata")

    async def artifacts(self, task: TaskNode) -> List[Record]:
        """The artifact records of all attempts of a task as on disk; newest attempt first, then by name."""
        return await self._task_rows(task, "artifact")

    async def _task_rows(self, task: TaskNode, kind: str) -> List[Record]:
        meta = f"{task.path}/_meta"
        try:
            mtime = os.stat(meta).st_mtime_ns
        except OSError:
            return []
        key = (task.path, kind)
        kept = self._rows.get(key)
        if kept is not None and kept[0] == mtime:
            self._rows.move_to_end(key)
            return kept[1]
        with os.scandir(meta) as entries:
            names = sorted(entry.name for entry in entries)
        pace, rows, half = Pacer(), [], False
        for name in names:
            record = self._task_record(task, meta, name, kind)
            if record is not None:
                rows.append(record)
                await pace()
            elif (
                split_metadata_file(name) if kind == "metadata" else split_artifact_file(name)
            ) is not None:
                half = half or _may_grow(f"{meta}/{name}")
        if kind == "metadata":
            _number(rows)
            rows.sort(key=lambda r: (-r["ts_epoch"], r["id"]))
        else:
            rows.sort(key=lambda r: (-r["attempt_id"], r["name"]))
        if _settled(mtime) and not half:
            self._keep_rows(key, mtime, rows)
        return rows

    def _task_record(self, task: TaskNode, meta: str, name: str, kind: str) -> Optional[Record]:
        """One metadata or artifact file as a record that belongs to this task, whatever it claims."""
        if kind == "metadata":
            field = split_metadata_file(name)
            record = self._read(f"{meta}/{name}") if field else None
            if field is None or record is None:
                return None
            record["ts_epoch"] = moment(record.get("ts_epoch"))
            if record["ts_epoch"] is None:
                record["ts_epoch"] = field[1]
            record["id"] = metadata_id(f"{meta}/{name}"[len(self.root) :], field[1])
        else:
            artifact = split_artifact_file(name)
            record = self._read(f"{meta}/{name}") if artifact else None
            if artifact is None or record is None:
                return None
            record["attempt_id"], record["name"] = artifact
            record["ts_epoch"] = moment(record.get("ts_epoch"))
        record["flow_id"], record["run_number"] = task.run.flow, task.run.id
        record["step_name"], record["task_id"] = task.step.name, task.id
        return record

    def _keep_rows(self, key: Tuple[str, str], mtime: int, rows: List[Record]) -> None:
        old = self._rows.pop(key, None)
        self._rows_held += len(rows) - (len(old[1]) if old else 0)
        self._rows[key] = (mtime, rows)
        while self._rows_held > ROWS_KEPT and self._rows:
            _, (_, dropped) = self._rows.popitem(last=False)
            self._rows_held -= len(dropped)

    # -- watching what others write

    async def refresh(self) -> None:
        """Looks for flows and runs that local mode made; new ones are told to the listeners."""
        pace = Pacer()
        for flow in await self.flows():
            if flow.baseline:
                await self.runs(flow)
            await pace()

    def _tell(self, event: Event) -> None:
        for listener in self.listeners:
            listener(event)


# -- helpers of the store


def _signature(path: str) -> Optional[Tuple[int, int, int]]:
    try:
        info = os.lstat(path)
    except OSError:
        return None
    return (info.st_mtime_ns, info.st_ino, info.st_size) if stat.S_ISREG(info.st_mode) else None


def _settled(mtime_ns: int) -> int:
    """The mtime to remember, or 0 when it is so young that a further change might leave it as it is."""
    return mtime_ns if abs(time.time_ns() - mtime_ns) > RACY_NS else 0


def _is_directory(path: str) -> bool:
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except OSError:
        return False


def _directories(path: str) -> Iterator[str]:
    try:
        with os.scandir(path) as entries:
            yield from [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return


def _exclusive(path: str) -> bool:
    """mkdir as a claim on an id: True for exactly one caller in any process."""
    try:
        os.mkdir(path)
    except FileExistsError:
        return False
    except OSError as error:
        raise disk_problem(error, path) from None
    return True


def _remove(paths: List[str]) -> None:
    for path in paths:
        try:
            os.unlink(path)
        except OSError:
            pass


def _remove_empty(folders: List[str]) -> None:
    for path in reversed(folders):
        try:
            os.rmdir(path)
        except OSError:
            pass


def _kept(node: Node, record: Record) -> Record:
    """What stays in memory of a `_self.json`: of tasks, of which there may be many, not what the run says as well."""
    if not isinstance(node, TaskNode):
        return record
    return {key: record.get(key) for key in ("step_name", "user_name", "ts_epoch")}


def _true_start(run: RunNode, recorded: Optional[int]) -> Optional[int]:
    """When a run began (ms). Local mode writes the time of the tagging into `_self.json` of a run that is tagged.

    It also makes the run's id from its start in µs; for ids of others, `_parameters` is the first step that is
    made.
    """
    if len(run.id) == 16 and is_number(run.id):
        began = moment(int(run.id) // 1000, now_ms())
    else:
        first = read_record(f"{run.path}/_parameters/_meta/_self.json") or {}
        began = moment(first.get("ts_epoch"))
    if began is None or recorded is None:
        return recorded if began is None else began
    # the record is written a moment after the id was made: that is no difference to speak of
    return began if recorded - began > START_JITTER else recorded


def _repair(record: Record) -> None:
    """Takes out of a `_self.json` what has not the type that everybody counts on: anybody may have written it."""
    if "ts_epoch" in record:
        record["ts_epoch"] = moment(record["ts_epoch"])
    if not isinstance(record.get("user_name", ""), str):
        record["user_name"] = None
    for key in ("tags", "system_tags"):
        tags = record.get(key)
        if tags is not None and not isinstance(tags, list):
            record[key] = None
        elif tags is not None and not all([isinstance(tag, str) for tag in tags]):
            record[key] = [tag for tag in tags if isinstance(tag, str)]


def _may_grow(path: str) -> bool:
    """Whether a file that could not be read may still be on its way: a young regular one."""
    try:
        info = os.lstat(path)
    except OSError:
        return True
    return stat.S_ISREG(info.st_mode) and abs(time.time() - info.st_mtime) < 60.0


def _newest_first(node: Node) -> Tuple[int, int, str]:
    name = node.name if isinstance(node, (FlowNode, StepNode)) else node.id
    number = int(name) if is_number(name) else 0
    return (-((node.record or {}).get("ts_epoch") or 0), -number, name)


def _number(rows: List[Record]) -> None:
    """Makes the ids of one task's metadata rows unique: of two alike the later by name gets the next."""
    rows.sort(key=lambda r: r["id"])
    last = -1
    for row in rows:
        if row["id"] <= last:
            row["id"] = last + 1
        last = row["id"]


_FACT_FIELDS = (
    "sysmeta_attempt",
    "sysmeta_foreach-stack_",
    "sysmeta_start_step_",
    "sysmeta_end_step_",
)


def _is_fact(name: str) -> bool:
    return name.startswith(_FACT_FIELDS) or name.endswith("_artifact__task_ok.json")


def attempt_of_tags(tags: Any) -> Optional[int]:
    """The attempt that a metadata record's `attempt_id:N` tag names, or None."""
    for tag in tags if isinstance(tags, list) else ():
        if (
            isinstance(tag, str)
            and tag.startswith("attempt_id:")
            and tag[11:].isascii()
            and tag[11:].isdigit()
        ):
            return int(tag[11:][:6])
    return None


def _take_fact(facts: TaskFacts, name: str, record: Record) -> None:
    """Adds one record to the facts: fields `attempt`, `attempt-done`, `attempt_ok`, artifact `_task_ok`."""
    artifact = split_artifact_file(name)
    at = moment(record.get("ts_epoch")) or 0
    if artifact is not None:
        if artifact[1] == "_task_ok":
            attempt = facts.attempt(artifact[0])
            kept = (
                "name",
                "sha",
                "location",
                "ds_type",
                "content_type",
                "type",
                "run_number",
                "step_name",
                "task_id",
            )
            attempt.task_ok_at, attempt.task_ok_record = at, {key: record.get(key) for key in kept}
        return
    parts = split_metadata_file(name)
    field, value = parts[0] if parts else "", record.get("value")
    if field in ("attempt", "attempt-done"):
        if (
            isinstance(value, (str, int))
            and str(value).isascii()
            and str(value).isdigit()
            and len(str(value)) < 6
        ):
            attempt = facts.attempt(int(value))
            if field == "attempt":
                attempt.started_at = max(at, attempt.started_at or 0)
            else:
                attempt.done_at = max(at, attempt.done_at or 0)
    elif field == "attempt_ok":
        number = attempt_of_tags(record.get("tags"))
        attempt = facts.attempt(number or 0)
        if at >= (attempt.ok_at or 0):
            attempt.ok_at, attempt.ok = at, truth(value)
    elif field == "foreach-stack":
        facts.foreach_stack = value
    elif field in ("start_step", "end_step") and isinstance(value, str):
        setattr(facts, field, value)


# ---- 4. Liveness: the open connection is the heartbeat ----
#
# Metaflow's client keeps one HTTP connection open for the life of its process, and what it asks on it says
# which process that is:
# - The runtime (`flow.py run`, `resume`) is the only one that asks for a task without naming its id.
# - The process of a task writes the metadata field `attempt` first of all.
# - A scheduler's processes (`flow.py init`, `flow.py step`: Airflow, Argo and so on) name all ids themselves.
#   Each stands for its attempt, none for the run, which goes on when they end.
# - Reading, tagging and all else stands for nothing.
# When the client closes the last connection that stands for something unfinished, that process has died.
# Clients older than 2.14 open a connection per request; theirs prove nothing, nor do those that we close.

_RUN = -1  # stands where an attempt's number would, in the keys of runs
if TYPE_CHECKING:
    _Key = Tuple[str, int]


class Liveness:
    """Which runs and attempts have a living process, as far as connections and leases tell.

    A client that sends heartbeats is judged by them once its connection is gone. A living `mflocal run` (its
    lease) vouches for the runs of its command, so that a restart of the daemon kills nothing. What is
    finished never changes.
    """

    def __init__(self, store: Store, cutoff: float = RUN_CUTOFF) -> None:
        self._store = store
        self._cutoff = cutoff  # s without a heartbeat
        self._owners: Dict[_Key, Set[Hashable]] = {}  # the open connections of a run or attempt
        self._owned: Dict[Hashable, Set[_Key]] = {}  # the same the other way round
        self._nodes: Dict[_Key, RunOrTask] = {}
        self._lease_of: Dict[Hashable, str] = {}  # of connections that own something
        self._leases: Dict[str, Set[Hashable]] = {}  # those of living wrappers: their connections
        self._ended: Set[str] = set()  # leases whose command has ended by itself
        self._beating: Dict[str, RunNode] = {}  # runs whose clients send heartbeats

    # -- what clients do

    def bind_run(self, connection: Hashable, run: RunNode, lease: Optional[str]) -> None:
        """This is the connection of the run's runtime."""
        self._bind(connection, (run.path, _RUN), run, lease)
        self.set_lease(run, lease)
        self._store.mark_lost(run, 0, None)

    def bind_attempt(
        self, connection: Hashable, task: TaskNode, attempt: int, lease: Optional[str]
    ) -> None:
        """This is the connection of the process that works on this attempt."""
        self._bind(connection, (task.path, attempt), task, lease)
        self.set_lease(task.run, lease)
        self._store.mark_lost(task, attempt, None)

    def _bind(self, connection: Hashable, key: _Key, node: RunOrTask, lease: Optional[str]) -> None:
        self._owners.setdefault(key, set()).add(connection)
        self._owned.setdefault(connection, set()).add(key)
        self._nodes[key] = node
        if lease:
            self._lease_of[connection] = lease

    def set_lease(self, run: RunNode, lease: Optional[str]) -> None:
        """A request that writes to the run came from below this wrapper."""
        if lease:
            self._store.set_lease(run, lease)

    def heartbeat(self, node: RunOrTask) -> None:
        """A client's heartbeat; who was thought dead is not."""
        if isinstance(node, RunNode):
            self._beating[node.path] = node
        self._store.beat(node, int(time.time()), own=True)
        for attempt in list(self._store.signs(node).lost):
            self._store.mark_lost(node, attempt, None)

    def hold_lease(self, connection: Hashable, lease: str) -> None:
        """A wrapper lives as long as this connection."""
        self._leases.setdefault(lease, set()).add(connection)

    def connection_closed(self, connection: Hashable, by_client: bool) -> None:
        """What only this connection stood for has died if the client closed it; else its cutoff runs from now."""
        for lease in [lease for lease, held in self._leases.items() if connection in held]:
            self._leases[lease].discard(connection)
            if not self._leases[lease]:
                del self._leases[lease]
                if by_client:
                    self._store.drop_lease(lease)
        self._lease_of.pop(connection, None)
        for key in self._owned.pop(connection, ()):
            self._owners[key].discard(connection)
            if not self._owners[key]:
                node = self._forget(key)
                self._store.beat(node, int(time.time()))
                if by_client:
                    self._mark_dead(node, key[1])
                    if isinstance(node, RunNode) and self._store.signs(node).lease in self._ended:
                        self._end_run(node, None)

    def _forget(self, key: _Key) -> RunOrTask:
        for connection in self._owners.pop(key):
            self._owned[connection].discard(key)
        return self._nodes.pop(key)

    def _mark_dead(self, node: RunOrTask, attempt: int, certain: bool = False) -> None:
        if certain or not self._store.signs(node).beats:
            if not self._finished(node, attempt):
                self._store.mark_lost(node, max(attempt, 0), now_ms())

    def holds_lease(self, lease: Optional[str]) -> bool:
        """Whether a request with this lease comes from the command of a living `mflocal run`."""
        return lease in self._leases

    def command_ended(self, lease: str) -> None:
        """A wrapper's command ended by itself: what it left unfinished has died.

        So has a task whose connection a forked child still holds. Not so a flow that the command left in the
        background: its runtime's connection is open.
        """
        self._ended.add(lease)
        runs = {run.path: run for run in self._store.lease_runs(lease)}
        for node in self._nodes.values():
            run = node.run if isinstance(node, TaskNode) else node
            if self._store.signs(run).lease == lease:
                runs[run.path] = run
        for run in runs.values():
            if (run.path, _RUN) not in self._owners:
                self._end_run(run, lease)

    def _end_run(self, run: RunNode, lease: Optional[str]) -> None:
        """Marks the run dead, and its attempts that came with this lease (None: all)."""
        for key, node in list(self._nodes.items()):
            if isinstance(node, TaskNode) and node.run is run:
                leases = {self._lease_of.get(connection) for connection in self._owners[key]}
                if lease is None or leases <= {lease, None}:
                    self._forget(key)
                    self._store.beat(node, int(time.time()))
                    self._mark_dead(node, key[1], certain=True)
        if self.scheduled(run):
            return  # its next task may come from another command
        signs = self._store.signs(run)
        silent = signs.beats and time.time() - (signs.heartbeat or 0) > self._cutoff
        if 0 not in signs.lost and not silent:  # a silent one has died long before its wrapper
            self._store.beat(run, int(time.time()))
            self._mark_dead(run, _RUN, certain=True)

    # -- what the files say

    def scheduled(self, run: RunNode) -> bool:
        """Whether a scheduler drives this run by one process per task: it has named all ids itself."""
        if is_number(run.id):
            return False
        step = self._store.step(run, "_parameters")
        tasks = self._store.task_nodes(step) if step else []
        return not any([is_number(task.id) for task in tasks])

    def completed(self, run: RunNode) -> bool:
        """Whether the run's last step has been done with success."""
        step = self._store.step(run, self._store.end_step(run))
        for task in self._store.task_nodes(step) if step else ():
            attempts = self._store.facts(task).attempts
            if attempts and attempts[max(attempts)].ok:
                return True
        return False

    def _finished(self, node: RunOrTask, attempt: int) -> bool:
        if isinstance(node, RunNode):
            return self.completed(node)
        facts = self._store.facts(node)
        own = facts.attempts.get(attempt)
        return (own is not None and own.finished) or max(facts.attempts, default=0) > attempt

    # -- what is asked

    def alive(self, node: RunOrTask, attempt: int = 0) -> Optional[bool]:
        """True: a connection or lease vouches for it; False: seen to die; None: heartbeats or files must tell."""
        signs = self._store.signs(node)
        if (node.path, _RUN if isinstance(node, RunNode) else attempt) in self._owners:
            return True
        if attempt in signs.lost:
            return False
        run = node.run if isinstance(node, TaskNode) else node
        return True if self._store.signs(run).lease in self._leases and not signs.beats else None

    def last_heartbeat(self, node: RunOrTask) -> Optional[int]:
        """`last_heartbeat_ts` in s: now while a connection of the node is open and it is not finished."""
        key = (node.path, _RUN)
        if isinstance(node, TaskNode):
            key = (node.path, max(node.facts.attempts, default=0) if node.facts else 0)
        if key in self._owners and (key[1] == _RUN or not self._finished(node, key[1])):
            return int(time.time())
        return self._store.signs(node).heartbeat

    def connected(self, run: RunNode) -> bool:
        """Whether a connection is open for the run or an attempt of it that is not finished."""
        return any(
            (node is run or isinstance(node, TaskNode) and node.run is run)
            and not self._finished(node, key[1])
            for key, node in self._nodes.items()
        )

    def must_stay_open(self, connection: Hashable) -> bool:
        """Whether a connection stands for something unfinished, so that silence is no reason to close it."""
        keys = self._owned.get(connection, ())
        return any(not self._finished(self._nodes[key], key[1]) for key in keys)

    def leases(self) -> int:
        """How many wrappers live."""
        return len(self._leases)

    def busy(self) -> bool:
        """Whether a wrapper lives or a connection stands for something unfinished."""
        return bool(self._leases) or any(
            not self._finished(node, key[1]) for key, node in self._nodes.items()
        )

    def runs(self) -> Set[RunNode]:
        """The runs with a sign of life: a connection, a living wrapper, a heartbeat within the cutoff."""
        found = {node.run if isinstance(node, TaskNode) else node for node in self._nodes.values()}
        for lease in self._leases:
            found.update(self._store.lease_runs(lease))
        return found.union(self._beating.values())

    def tick(self) -> None:
        """Every few seconds: the heartbeats of what has a connection or lease, all written to disk."""
        now = int(time.time())
        for key, node in self._nodes.items():
            if not self._finished(node, key[1]):
                self._store.beat(node, now)
        for lease in self._leases:
            for run in self._store.lease_runs(lease):
                if self.alive(run) and not self.completed(run):
                    self._store.beat(run, now)
        for path, run in list(self._beating.items()):
            if now - (self._store.signs(run).heartbeat or 0) > self._cutoff:
                del self._beating[path]
        self._store.flush_signs()


# File systems of one machine's own disks: what is written there is written by its own processes.
_OWN_DISKS = frozenset(("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "overlay", "tmpfs"))


@lru_cache(maxsize=4)
def machine_booted(directory: str) -> Optional[int]:
    """When this machine booted (ms), if whoever writes to the directory must have begun since; else None.

    None on network and shared file systems, where a run may be at work on another machine, and where there
    is no /proc. A virtual machine that was asleep reckons its boot too late from its clock, so the device
    nodes count too, which were made at the boot (or, in a container, at its start) and keep their time.
    """
    kind, longest = "", -1
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
            for line in mounts:
                left, _, right = line.partition(" - ")
                place = left.split(" ")[4].rstrip("/") + "/"
                if (directory + "/").startswith(place) and len(place) >= longest:
                    kind, longest = right.split(" ")[0], len(place)
        with open("/proc/stat", encoding="ascii", errors="replace") as told:
            booted = int(told.read().partition("\nbtime ")[2].split()[0])
        null = os.stat("/dev/null")
    except (OSError, ValueError, IndexError):
        return None
    return int(min(booted, null.st_mtime, null.st_ctime) * 1000) if kind in _OWN_DISKS else None


# ---- 5. Status: what attempts, steps and runs look like to a reader ----

COMPLETED, FAILED, RUNNING, PENDING, UNKNOWN = (
    "completed",
    "failed",
    "running",
    "pending",
    "unknown",
)

# Step decorators of Metaflow's own whose retries are known; any other may bring retries of its own.
_NO_RETRIES = frozenset(
    ("batch", "card", "conda", "environment", "kubernetes", "parallel", "pypi", "pytorch_parallel")
    + ("resources", "secrets", "timeout")
)


class AttemptStatus(NamedTuple):
    """One attempt of a task as the UI shows it; times and duration in ms.

    `ok` is what Metaflow said about it (attempt_ok, else the `_task_ok` artifact), None while it has not.
    """

    attempt_id: int
    status: str
    started_at: Optional[int]
    finished_at: Optional[int]
    duration: Optional[int]
    ok: Optional[bool]


class RunStatus(NamedTuple):
    """completed, failed or running; finished_at (None while running) and duration in ms."""

    status: str
    finished_at: Optional[int]
    duration: Optional[int]


def newest(*times: Optional[int]) -> Optional[int]:
    """The latest of the times that are known, None when none is."""
    return max((t for t in times if t is not None), default=None)


def finish_of(attempt: AttemptFacts) -> Optional[int]:
    """When Metaflow said that an attempt is over (ms): latest of attempt_ok, attempt-done and _task_ok."""
    return newest(attempt.ok_at, attempt.done_at, attempt.task_ok_at)


def elapsed(start: Optional[int], end: Optional[int]) -> Optional[int]:
    """ms from start to end, never negative (heartbeats are whole seconds, clocks jump); None if unknown."""
    return None if start is None or end is None else max(end - start, 0)


def _begin_of(attempt: AttemptFacts) -> Optional[int]:
    times = (attempt.started_at, attempt.ok_at, attempt.done_at, attempt.task_ok_at)
    return min((t for t in times if t is not None), default=None)


def _to_ms(seconds: Optional[int]) -> Optional[int]:
    return None if seconds is None else seconds * 1000


def _nothing_known(number: int) -> Optional[bool]:
    return None


class _AttemptView(NamedTuple):
    """What is known around an attempt: times and cutoffs in ms, `run_ended` from run_status."""

    now: int
    alive: Callable[[int], Optional[bool]]
    run_ended: Optional[bool]
    run_finished_at: Optional[int]
    cutoff: float
    local_cutoff: float


def attempt_rows(
    facts: TaskFacts,
    now: int,
    alive: Callable[[int], Optional[bool]] = _nothing_known,
    *,
    run_ended: Optional[bool] = None,
    run_finished_at: Optional[int] = None,
    task_ok: Callable[[int], Optional[bool]] = _nothing_known,
    parameters: bool = False,
    cutoff: float = RUN_CUTOFF,
    local_cutoff: float = LOCAL_CUTOFF,
) -> List[AttemptStatus]:
    """One row per attempt of a task, oldest first; attempt 0 alone when nothing was written yet.

    now and run_finished_at in ms, cutoffs in s. alive(n): True = a connection or lease vouches for attempt n,
    False = its process was seen to die, None = not known. run_ended: what run_status says of the run (True
    completed or failed, False running), None when it was not asked. task_ok(n): the value of attempt n's
    `_task_ok` artifact where it could be read; called only for finished attempts without attempt_ok.
    parameters: this is the `_parameters` task, which never has an attempt_ok.

    The rules, first match wins (the UI backend's SQL; marked + where this goes further):
    1. attempt_ok true: completed; false: failed.
    2. finished without attempt_ok: by `_task_ok` +; `_parameters`: completed +; else unknown.
    3. a later attempt has begun: failed, finished at that moment.
    4. + alive: running, whatever the age of the heartbeat and, once begun, whatever became of the run.
    5. + seen to die (lost_at, or alive says False) and no heartbeat since: failed, finished at lost_at.
    6. + the run has ended: failed with it.
    7. task with heartbeats: running while heartbeat or start are at most `cutoff` old, also + while it waits
       for its first attempt in a run known to be running (a job queue); else failed at the last sign of life.
    8. task without heartbeats (plain local mode): + running (pending before its first start) as long as its
       run is, since a living Metaflow runtime notices at once when one of its tasks dies and then starts
       another attempt or ends the run; if the run is not known, failed after `local_cutoff` without a change.
    """
    view = _AttemptView(now, alive, run_ended, run_finished_at, cutoff * 1000, local_cutoff * 1000)
    rows: List[AttemptStatus] = []
    superseded: Optional[int] = None
    for number in sorted(facts.attempts, reverse=True) or [0]:
        attempt = facts.attempts.get(number) or AttemptFacts()
        ok, finished = attempt.ok, finish_of(attempt)
        if ok is None and finished is not None:
            ok = task_ok(number)
            if ok is None and parameters:
                ok = True
        if ok is not None or finished is not None:
            status = UNKNOWN if ok is None else COMPLETED if ok else FAILED
            finished = finished if finished is not None else superseded
        elif superseded is not None:
            status, finished = FAILED, superseded
        else:
            status, finished = _unfinished(facts, number, attempt, view)
        rows.append(
            _attempt_row(number, status, attempt.started_at, finished, ok, facts.created_at, now)
        )
        begin = _begin_of(attempt)
        superseded = superseded if begin is None else begin
    rows.reverse()
    return rows


def _attempt_row(
    number: int,
    status: str,
    started: Optional[int],
    finished: Optional[int],
    ok: Optional[bool],
    created: Optional[int],
    now: int,
) -> AttemptStatus:
    start = created if started is None else started
    if status in (RUNNING, PENDING):
        so_far = elapsed(start, now) if status == RUNNING else None
        return AttemptStatus(number, status, started, None, so_far, ok)
    if finished is not None and start is not None:
        finished = max(finished, start)
    return AttemptStatus(number, status, started, finished, elapsed(start, finished), ok)


def _unfinished(
    facts: TaskFacts, number: int, attempt: AttemptFacts, view: _AttemptView
) -> Tuple[str, Optional[int]]:
    """(status, finished_at) of an attempt that Metaflow has said nothing final about: rules 4 to 8."""
    life = view.alive(number)
    if life and not (view.run_ended and attempt.started_at is None):
        return RUNNING, None
    beat = _to_ms(facts.heartbeat)
    sign = newest(beat, attempt.started_at, facts.created_at)
    if life is False or attempt.lost_at is not None:
        lost = attempt.lost_at
        beaten_since = (
            beat is not None and lost is not None and beat > lost and view.now - beat <= view.cutoff
        )
        if not beaten_since:
            return FAILED, lost if lost is not None else sign
    if view.run_ended:
        end = view.run_finished_at
        return FAILED, end if end is not None else newest(sign, facts.changed_at or None)
    if beat is not None:
        waiting = attempt.started_at is None and view.run_ended is False
        if waiting or sign is None or view.now - sign <= view.cutoff:
            return RUNNING, None
        return FAILED, sign
    change = newest(sign, facts.changed_at or None)
    if view.run_ended is None and change is not None and view.now - change > view.local_cutoff:
        return FAILED, change
    return (PENDING if attempt.started_at is None else RUNNING), None


class Failure(NamedTuple):
    """A task whose newest attempt failed: step, number of that attempt, and when (ms)."""

    step: str
    attempt: int
    at: int


class RunSummary:
    """The facts of a run's tasks, condensed to what run_status needs; built by `add`, task by task.

    end_ok/end_ok_at: newest attempt_ok of the end step; end_started_at: its newest attempt start;
    end_done_at: its newest finish without attempt_ok (old clients). failures: tasks whose newest attempt
    failed. unfinished: tasks whose newest attempt is not over. last_start, last_finish, last_event (creation,
    start or finish), changed_at (newest change of any file): ms. heartbeat: newest of the tasks', s.
    """

    __slots__ = (
        "end_step", "tasks", "end_ok", "end_ok_at", "end_done_at", "end_started_at", "failures", "unfinished",
        "last_start", "last_finish", "last_event", "changed_at", "heartbeat",
    )  # fmt: skip

    def __init__(self, end_step: str = "end") -> None:
        self.end_step = end_step
        self.tasks = 0
        self.end_ok: Optional[bool] = None
        self.end_ok_at: Optional[int] = None
        self.end_done_at: Optional[int] = None
        self.end_started_at: Optional[int] = None
        self.failures: List[Failure] = []
        self.unfinished = 0
        self.last_start: Optional[int] = None
        self.last_finish: Optional[int] = None
        self.last_event: Optional[int] = None
        self.changed_at: Optional[int] = None
        self.heartbeat: Optional[int] = None

    def add(self, step_name: str, facts: TaskFacts) -> None:
        """Takes in one task. Order does not matter; each task once."""
        self.tasks += 1
        self.changed_at = newest(self.changed_at, facts.changed_at or None)
        self.heartbeat = newest(self.heartbeat, facts.heartbeat)
        start, finish = facts.created_at, None
        for attempt in facts.attempts.values():
            start = newest(start, attempt.started_at)
            finish = newest(finish, finish_of(attempt))
            if step_name == self.end_step:
                self._add_end(attempt)
        self.last_start = newest(self.last_start, start)
        self.last_finish = newest(self.last_finish, finish)
        self.last_event = newest(self.last_event, start, finish)
        if step_name.startswith("_"):
            return  # `_parameters` is no work of its own; old clients never finish it
        number = max(facts.attempts, default=0)
        last = facts.attempts.get(number)
        over = None if last is None else finish_of(last)
        if last is None or over is None:
            self.unfinished += 1
        elif last.ok is False:
            self.failures.append(Failure(step_name, number, over))

    def _add_end(self, attempt: AttemptFacts) -> None:
        self.end_started_at = newest(self.end_started_at, attempt.started_at)
        over = finish_of(attempt)
        if attempt.ok is None or over is None:
            self.end_done_at = newest(self.end_done_at, over)
            return
        said = over if attempt.ok_at is None else attempt.ok_at
        if self.end_ok_at is None or said >= self.end_ok_at:
            self.end_ok, self.end_ok_at = attempt.ok, said

    @property
    def settled(self) -> bool:
        """Whether the end step alone decides, so that no other task of the run needs to be read."""
        return self.end_said() is not None

    def end_said(self, task_ok: Optional[bool] = None) -> Optional[Tuple[bool, int]]:
        """(ok, ms) once the end step is over, None before and while it is tried again after a failure.

        task_ok: value of the end task's `_task_ok` artifact, wanted only where there is no attempt_ok.
        """
        began = -1 if self.end_started_at is None else self.end_started_at
        if self.end_ok is not None and self.end_ok_at is not None:
            return (
                None
                if not self.end_ok and self.end_ok_at < began
                else (self.end_ok, self.end_ok_at)
            )
        if self.end_done_at is not None and self.end_done_at >= began:
            return task_ok is not False, self.end_done_at
        return None


def sign_of_life(
    state: RunStatus,
    now: int,
    *,
    connected: bool,
    vouched: bool,
    heartbeat: Optional[int],
    cutoff: float = RUN_CUTOFF,
) -> Optional[str]:
    """How a run is known to be at work: "connection", "lease" or "heartbeat"; None when it is over or silent.

    A run that run_status calls completed or failed is not at work, whatever its processes still do.
    heartbeat and cutoff in s, now in ms; vouched: a living wrapper stands for it.
    """
    if state.status != RUNNING:
        return None
    if connected:
        return "connection"
    if vouched:
        return "lease"
    return (
        "heartbeat" if heartbeat is not None and now - heartbeat * 1000 <= cutoff * 1000 else None
    )


def _attempts_unknown(step_name: str) -> Optional[int]:
    return None


# What Metaflow's local runtime does (runtime.py): a failed attempt is followed within seconds by the next one if
# the step has retries left; else the runtime gives its other tasks 5 s, kills them, and exits. So after a
# failure without a successor nothing more will come, whatever else looks unfinished.
#
# The rules for a run, first match wins (the UI backend's SQL; marked + where this goes further):
# 1. the newest attempt_ok of the end step: completed or failed, unless the step was begun again after a
#    failure; + an end step that is done without attempt_ok counts by its `_task_ok`, else as completed.
# 2. + alive: running.
# 3. + seen to die, and neither a task begun nor a heartbeat since (a resume, a retry): failed at once,
#    finished at the later of that moment and the last finish of a task.
# 4. + a task failed its last allowed attempt: failed.
# 5. + a scheduler drives the run, and no task is unfinished or one has failed: nobody tells whether another will
#    come. Running until `local_cutoff` without a change, SCHEDULER_RETRY after a failure.
# 6. with heartbeats (run's or tasks'): running while the last sign of life (heartbeat, start or finish of a
#    task) is at most `cutoff` old, FAILED_CUTOFF after a failed task +; else failed.
# 7. + without heartbeats, that is plain local mode, only the disk can tell. A task may compute for hours and
#    write nothing, so while one is unfinished only `local_cutoff` of silence makes the run failed. If none is
#    unfinished, or one has failed, Metaflow would go on within seconds (minutes with slow cards): failed after
#    min(local_cutoff, LOCAL_IDLE_CUTOFF). Nothing survives a boot of its machine: failed at once if silent since.


def run_status(
    created_at: Optional[int],
    summary: RunSummary,
    now: int,
    *,
    heartbeat: Optional[int] = None,
    alive: Optional[bool] = None,
    lost_at: Optional[int] = None,
    allowed: Callable[[str], Optional[int]] = _attempts_unknown,
    end_task_ok: Optional[bool] = None,
    scheduled: bool = False,
    booted_at: Optional[int] = None,
    cutoff: float = RUN_CUTOFF,
    local_cutoff: float = LOCAL_CUTOFF,
) -> RunStatus:
    """Status, finish and duration of a run. created_at, now, lost_at in ms; heartbeat and cutoffs in s.

    alive: True = a connection or lease vouches for the run, False = the last one closed, None = not known.
    lost_at: when it was seen to die. allowed(step): attempts that a step may have (allowed_attempts), None if
    not known. end_task_ok: see RunSummary.end_said. scheduled, booted_at: see Liveness.scheduled and
    machine_booted.
    """
    said = summary.end_said(end_task_ok)
    if said is not None:
        return _run_over(created_at, COMPLETED if said[0] else FAILED, said[1])
    if alive:
        return RunStatus(RUNNING, None, elapsed(created_at, now))
    beat = newest(_to_ms(heartbeat), _to_ms(summary.heartbeat))
    if alive is False or lost_at is not None:
        since = newest(summary.last_start, _to_ms(heartbeat))
        if lost_at is None or since is None or since <= lost_at:
            gone = lost_at if lost_at is not None else newest(beat, summary.last_event, created_at)
            return _run_over(created_at, FAILED, newest(gone, summary.last_finish))
    for failure in summary.failures:
        limit = allowed(failure.step)
        if limit is not None and failure.attempt + 1 >= limit:
            return _run_over(created_at, FAILED, summary.last_finish)
    sign = newest(beat, summary.last_event, created_at)
    end = newest(beat, summary.last_finish)
    if scheduled and (summary.failures or not summary.unfinished):
        silence = min(local_cutoff, SCHEDULER_RETRY) if summary.failures else local_cutoff
    elif beat is not None:
        silence = min(cutoff, FAILED_CUTOFF) if summary.failures else cutoff
    else:
        sign = newest(sign, summary.changed_at)
        idle = bool(summary.failures) or not summary.unfinished
        silence = min(local_cutoff, LOCAL_IDLE_CUTOFF) if idle else local_cutoff
        end = summary.last_finish if idle else sign
        if sign is not None and booted_at is not None and sign < booted_at:
            silence = 0
    if sign is None or now - sign <= silence * 1000:
        return RunStatus(RUNNING, None, elapsed(created_at, now))
    return _run_over(created_at, FAILED, sign if end is None else end)


def _run_over(created_at: Optional[int], status: str, finished: Optional[int]) -> RunStatus:
    if finished is not None and created_at is not None:
        finished = max(finished, created_at)
    return RunStatus(status, finished, elapsed(created_at, finished))


def allowed_attempts(decorators: Sequence[Mapping[str, Any]]) -> Optional[int]:
    """How many attempts a step may have, from its `decorators` in `_graph_info`; None when that is not sure.

    `@retry` adds its `times`, `@catch` its fallbacks. A decorator that Metaflow itself does not bring may add
    some too: not sure.
    """
    retries = fallbacks = 0
    for decorator in decorators:
        name = decorator.get("name")
        if name == "retry":
            times = (decorator.get("attributes") or {}).get("times", 3)
            try:
                retries = max(retries, int(times))
            except (TypeError, ValueError):
                return None
        elif name == "catch":
            fallbacks = FALLBACK_ATTEMPTS
        elif name not in _NO_RETRIES:
            return None
    return min(1 + retries + fallbacks, MAX_TASK_ATTEMPTS)


def step_duration(
    created_at: Optional[int],
    tasks: Iterable[TaskFacts],
    now: int,
    *,
    running: bool = False,
    old: float = LOCAL_CUTOFF,
) -> Optional[int]:
    """ms that a step took so far, never negative; created_at and now in ms, `old` in s.

    running: one of its attempts runs, so the step still counts (better than the real service, which takes the
    last heartbeat). Else the time to the latest finish, loss or heartbeat of its tasks; if there is none the
    time until now, and None once the step is older than `old`.
    """
    if created_at is None or running:
        return elapsed(created_at, now)
    last: Optional[int] = None
    for facts in tasks:
        last = newest(last, _to_ms(facts.heartbeat))
        for attempt in facts.attempts.values():
            last = newest(last, finish_of(attempt), attempt.lost_at)
    if last is None:
        return None if now - created_at > old * 1000 else elapsed(created_at, now)
    return elapsed(created_at, last)


# ---- 6. Query: filters, tags, order, groups, pages and cursors ----
PAGE_LIMIT, MAX_PAGE_LIMIT = 10, 1000  # rows (or groups) of a UI page, as the UI backend has them
GROUP_LIMIT, MAX_GROUP_LIMIT = 10, 1000  # rows per group, likewise
CURSOR_LIMIT, MAX_CURSOR_LIMIT = (
    50,
    500,
)  # rows of a metadata API page, as the metadata service has them

if TYPE_CHECKING:
    Row = Mapping[str, Any]
    Args = Sequence[Tuple[str, str]]
    Predicate = Callable[[Row], bool]
    Order = Sequence[Tuple[str, bool]]  # (column, descending)


def _columns(text: str, numbers: str) -> Dict[str, str]:
    """column -> kind: str, int, json (a list of tags); also status (str whose values are checked)."""
    kinds = dict.fromkeys(text.split(), "str")
    kinds.update(dict.fromkeys(numbers.split(), "int"))
    kinds.update(tags="json", system_tags="json")
    return kinds


# What may be filtered, ordered and grouped by, per kind of row: every key of it.
UI_COLUMNS = {
    "flows": _columns("flow_id user_name", "ts_epoch"),
    "runs": _columns(
        "flow_id run_id user_name user run status",
        "run_number ts_epoch finished_at duration last_heartbeat_ts",
    ),
    "steps": _columns("flow_id run_id step_name user_name", "run_number ts_epoch duration"),
    "tasks": _columns(
        "flow_id run_id step_name task_name user_name status task_ok foreach_label",
        "run_number task_id attempt_id ts_epoch started_at finished_at duration last_heartbeat_ts",
    ),
    "metadata": _columns(
        "flow_id run_id step_name task_name field_name value type user_name",
        "id run_number task_id attempt_id ts_epoch",
    ),
    "artifacts": _columns(
        "flow_id run_id step_name task_name name location ds_type sha type content_type user_name",
        "run_number task_id attempt_id ts_epoch",
    ),
}
SERVICE_RUN_COLUMNS = _columns(
    "flow_id run_id user_name user", "run_number ts_epoch last_heartbeat_ts"
)
SERVICE_RUN_COLUMNS["status"] = "status"
SERVICE_TASK_COLUMNS = _columns("task_name user_name", "task_id ts_epoch last_heartbeat_ts")
del SERVICE_TASK_COLUMNS["tags"], SERVICE_TASK_COLUMNS["system_tags"]  # a task carries its run's
# Computed columns: the UI backend ignores them as a group.
NOT_GROUPED = frozenset(
    (
        "run",
        "status",
        "finished_at",
        "duration",
        "started_at",
        "attempt_id",
        "task_ok",
        "foreach_label",
    )
)

_STATUSES = frozenset(("running", "completed", "failed"))
_OPERATORS = frozenset(("eq", "ne", "lt", "le", "gt", "ge", "co", "sw", "ew", "li", "is"))
_EPOCHS = frozenset(("ts_epoch", "last_heartbeat_ts"))
_INTEGER = re.compile(r"(?a:\s*[+-]?[0-9]{1,19}\s*)")
_INT8 = 2**63
_LIKE = {"co": "%{}%", "sw": "{}%", "ew": "%{}", "li": "{}"}
_COMPARE: Dict[str, Callable[[Any, Any], bool]] = {
    "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt,
    "ge": operator.ge,
}  # fmt: skip


def _bad_filter(detail: str) -> Problem:
    return Problem(400, detail, id="invalid-filter")


def first_arg(args: Args, name: str) -> Optional[str]:
    """The first value of a query parameter (what the real services read when one is repeated), or None."""
    for key, value in args:
        if key == name:
            return value
    return None


# Patterns. LIKE and regular expressions come from clients and run on the event loop, so neither may
# backtrack: LIKE is cut at its %, and the leftmost place of each piece is the right one; regular expressions
# are run as an automaton whose work grows with the text only.

_LIKE_TOKEN = re.compile(r"\\(.)|(%)|(_)|(.)", re.DOTALL)


def like_matcher(pattern: str, *, ignore_case: bool = True) -> Callable[[str], bool]:
    """A test for SQL LIKE (ILIKE): % any text, _ one character, backslash quotes the next one."""
    pieces, sizes, jokers = [""], [0], False
    for quoted, many, one, plain in _LIKE_TOKEN.findall(
        pattern.lower() if ignore_case else pattern
    ):
        if many:
            pieces.append("")
            sizes.append(0)
        else:
            pieces[-1] += "." if one else re.escape(quoted or plain)
            sizes[-1] += 1
            jokers = jokers or bool(one)
    compiled = [re.compile(piece, re.DOTALL) for piece in pieces]
    first, middle, last = compiled[0], compiled[1:-1], compiled[-1]

    def matches_like(text: str) -> bool:
        if (
            jokers
        ):  # a piece with _ is tried at every place: length of the text times that of the pattern
            text = text[:MAX_PATTERN_TEXT]
        if ignore_case:
            text = text.lower()
        if len(sizes) == 1:
            return first.fullmatch(text) is not None
        at, end = sizes[0], len(text) - sizes[-1]
        if end < at or not first.match(text) or not last.match(text, end):
            return False
        for piece in middle:
            found = piece.search(text, at, end)
            if found is None:
                return False
            at = found.end()
        return True

    return matches_like


class Pattern:
    """A client's regular expression on a column. It may take for ever, so it is matched elsewhere, beforehand."""

    def __init__(self, column: str, pattern: str) -> None:
        self.column = column
        self.pattern = pattern
        self.known: Dict[str, bool] = {}

    def fits(self, value: Any) -> bool:
        """Whether a value (of a list: one of them) is known to match from its beginning."""
        return any([self.known.get(text, False) for text in _texts_of(value)])


def _texts_of(value: Any) -> List[str]:
    if value is None:
        return []
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


async def learn_patterns(
    filters: Filters, rows: Iterable[Row], match: Callable[[str, List[str]], Awaitable[List[bool]]]
) -> None:
    """Finds out, by `match`, which texts in the rows fit the patterns among the filters; call it before
    `matches`. Raises Problem 400 for a pattern that is invalid or takes too long.
    """
    for pattern in filters.patterns:
        found = {text for row in rows for text in _texts_of(row.get(pattern.column))}
        texts = sorted(found.difference(pattern.known))
        if len(pattern.known) > MAX_PATTERN_KNOWN:
            pattern.known.clear()
        pattern.known.update(zip(texts, await match(pattern.pattern, texts)))


# Filters.


class Filters(list["Predicate"]):
    """Predicates on rows, all of which must hold; `columns` are the ones they look at.

    With `patterns`, `learn_patterns` has to see the rows first.
    """

    def __init__(
        self,
        predicates: Iterable[Predicate] = (),
        columns: Iterable[str] = (),
        patterns: Iterable[Pattern] = (),
    ) -> None:
        super().__init__(predicates)
        self.columns = frozenset(columns)
        self.patterns = list(patterns)


def parse_filters(
    args: Args, columns: Mapping[str, str], *, strict: bool = False, tags: bool = True
) -> Filters:
    """The filters among query parameters, compiled: `field[:op]=v1,v2` (comma = or) and `_tags[:how]=a,b`.

    columns: column -> kind (see UI_COLUMNS). Filters on other columns and other `_x` are ignored. A row
    passes when all filters hold; a null in it fits no value but `null` (which means IS NULL whatever the
    operator). eq ne lt le gt ge compare (text by code point), co sw ew li are ILIKE, `re` is `re.match`,
    `is` takes only null. On tag lists: one of the tags fits (ne: none equals), or eq a whole JSON list.

    strict is the metadata API's flavour: an unknown operator (there is no `re`), an unknown status, and text
    operators on numbers are refused; it is not empty exactly when the real service would begin to page.
    The UI's flavour ignores unknown operators and takes text operators on numbers. Raises Problem 400 (id
    "invalid-filter") for values that do not fit their column, where the real services answer 500.
    """
    found: List[Predicate] = []
    used: Set[str] = set()
    patterns: List[Pattern] = []
    for key, value in args:
        field, _, op = key.partition(":")
        if field.startswith("_"):
            if field == "_tags" and tags:
                found.append(_tag_predicate(op, value))
                used.update(("tags", "system_tags"))
            continue
        kind = columns.get(field)
        if kind is None:
            continue
        op = op if ":" in key else "eq"
        if op not in _OPERATORS and (strict or op != "re"):
            if strict:
                raise _bad_filter("unsupported operator '%s' for field '%s'" % (op, field))
            continue
        if op == "re" and kind != "bool":
            own = [Pattern(field, one) for one in _split_values(field, value) if one != "null"]
            patterns += own
            if len(patterns) > MAX_PATTERNS:
                raise _bad_filter("a request may have at most %d patterns" % MAX_PATTERNS)
            found.append(_pattern_predicate(field, own, "null" in value.split(",")))
        else:
            found.append(_predicate(field, op, value, kind, strict))
        used.add(field)
    return Filters(found, used, patterns)


def matches(row: Row, filters: Sequence[Predicate]) -> bool:
    """Whether a row passes all filters."""
    return all([predicate(row) for predicate in filters])


def _split_values(field: str, text: str) -> List[str]:
    values = text.split(",")
    if "\0" in text:
        raise _bad_filter("the value of '%s' has a NUL character" % field)
    if len(values) > MAX_FILTER_VALUES:
        raise _bad_filter("a filter may have at most %d values" % MAX_FILTER_VALUES)
    if max(map(len, values)) > MAX_LIKE:
        raise _bad_filter("a filter value may have at most %d characters" % MAX_LIKE)
    return values


def _pattern_predicate(field: str, patterns: List[Pattern], with_null: bool) -> Predicate:
    if any(len(pattern.pattern) > MAX_PATTERN for pattern in patterns):
        raise _bad_filter("a pattern may have at most %d characters" % MAX_PATTERN)

    def fits(row: Row) -> bool:
        value = row.get(field)
        return with_null if value is None else any([one.fits(value) for one in patterns])

    return fits


def _predicate(field: str, op: str, text: str, kind: str, strict: bool) -> Predicate:
    values = _split_values(field, text)
    with_null = "null" in values
    values = [value for value in values if value != "null"]
    for value in values if strict and kind == "status" else ():
        if value not in _STATUSES:
            raise _bad_filter("unsupported status filter: %s" % value)
    if kind == "json":
        tests = _tag_list_tests(op, values, text)
    elif op == "eq":  # ids are numbers in one answer and text in another
        wanted = {str(_filter_int(field, v, strict)) if kind == "int" else v for v in values}
        tests = [lambda found: str(found) in wanted]
    else:
        tests = [_value_test(field, op, value, kind, strict) for value in values]

    def fits(row: Row) -> bool:
        value = row.get(field)
        return with_null if value is None else any([test(value) for test in tests])

    return fits


def _filter_int(field: str, text: str, strict: bool) -> int:
    if not _INTEGER.fullmatch(text) or not -_INT8 <= int(text) < _INT8:
        epoch = strict and field in _EPOCHS
        what = "integer epoch milliseconds" if epoch else "an integer of at most 64 bits"
        raise _bad_filter("invalid %s: expected %s, got '%s'" % (field, what, text))
    return int(text)


def _value_test(field: str, op: str, value: str, kind: str, strict: bool) -> Callable[[Any], bool]:
    """A test for one value of a filter on what a row holds (never None)."""
    if op == "is":
        raise _bad_filter("%s:is takes only null, not '%s'" % (field, value))
    compare = _COMPARE.get(op)
    if compare is not None and kind == "int":
        return _number_test(compare, _filter_int(field, value, strict))
    if compare is not None:
        return lambda found: bool(compare(str(found), value))
    if kind == "int" and strict:
        if field in _EPOCHS:
            _filter_int(field, value, strict)
        raise _bad_filter("unsupported operator '%s' for field '%s', a number" % (op, field))
    test = like_matcher(_LIKE[op].format(value))
    return lambda found: test(str(found))


def _number_test(compare: Callable[[Any, Any], bool], wanted: int) -> Callable[[Any], bool]:
    def fits(found: Any) -> bool:
        if isinstance(found, str) and _INTEGER.fullmatch(found):
            found = int(found)
        # an id that is text is not equal to any number, and neither more nor less
        return compare(found, wanted) if isinstance(found, int) else compare is operator.ne

    return fits


def _tag_list_tests(op: str, values: List[str], text: str) -> List[Callable[[Any], bool]]:
    """Tests for a column that holds a list of tags."""
    if op == "is" and values:
        raise _bad_filter("is takes only null, not '%s'" % values[0])
    if op in ("eq", "ne") and text.startswith("["):
        try:
            whole = sorted(map(str, loads(text.encode())))
        except (Problem, TypeError, ValueError):
            raise _bad_filter("not a JSON list: '%s'" % text) from None
        return [lambda tags: (sorted(map(str, tags)) == whole) == (op == "eq")]
    if op == "eq":
        return [lambda tags: any([value in tags for value in values])]
    if op == "ne":
        return [lambda tags: any([value not in tags for value in values])]
    tests = [_value_test("tags", op, value, "str", False) for value in values]
    return [lambda tags: any([test(tag) for test in tests for tag in tags])]


def _tag_predicate(how: str, text: str) -> Predicate:
    """`_tags`: over tags and system_tags together; all (also for an unknown `how`) or any, exact or LIKE."""
    values = _split_values("_tags", text)
    joiner: Callable[[Iterable[object]], bool] = any if how in ("any", "likeany") else all
    likes = how in ("likeany", "likeall")
    tests = [like_matcher("%" + value + "%", ignore_case=False) for value in values if likes]

    def fits(row: Row) -> bool:
        tags, system_tags = row.get("tags") or (), row.get("system_tags") or ()
        if not likes:
            return joiner([value in tags or value in system_tags for value in values])
        # PostgreSQL matches the lists as they are written
        written = '["%s"]["%s"]' % ('", "'.join(tags), '", "'.join(system_tags))
        return joiner([test(written) for test in tests])

    return fits


# Order, groups, pages.


class ListQuery(NamedTuple):
    """A parsed list request of the UI. limit 0 = all; `columns` = what filters, order and groups look at."""

    filters: Filters
    order: Order
    groups: List[str]
    group_limit: int
    page: int
    limit: int
    columns: FrozenSet[str]


def parse_list_query(
    args: Args,
    columns: Mapping[str, str],
    *,
    first: Order = (),
    default_limit: int = PAGE_LIMIT,
    max_limit: int = MAX_PAGE_LIMIT,
) -> ListQuery:
    """All of `field[:op]`, `_tags`, `_order`, `_group`, `_group_limit`, `_page`, `_limit` for a UI list.

    first: order that comes before the requested one ([("attempt_id", True)] for artifacts, attempts and a
    step's tasks). Raises Problem 400 for bad filter values; everything else that is wrong gets its default.
    """
    filters = parse_filters(args, columns)
    order = parse_order(args, columns, first=first)
    groups = [
        name
        for name in (first_arg(args, "_group") or "").split(",")
        if columns.get(name, "json") != "json" and name not in NOT_GROUPED
    ]
    page, limit = parse_page(args, default_limit=default_limit, max_limit=max_limit)
    group_limit = _limit_of(first_arg(args, "_group_limit"), GROUP_LIMIT, MAX_GROUP_LIMIT)
    used = filters.columns.union(groups, [column for column, _ in order])
    return ListQuery(filters, order, groups, group_limit, page, limit, frozenset(used))


def parse_order(args: Args, columns: Collection[str], *, first: Order = ()) -> Order:
    """`_order=+a,-b,c`: + (or the space that an unescaped + becomes) ascending, - or no sign descending.

    Unknown columns are ignored. `first` is put in front.
    """
    order = list(first)
    for item in (first_arg(args, "_order") or "").split(","):
        column = item[1:] if item[:1] in ("+", "-", " ") else item
        if column in columns:
            order.append((column, item[:1] not in ("+", " ")))
    return order


def parse_page(
    args: Args, *, default_limit: int = PAGE_LIMIT, max_limit: int = MAX_PAGE_LIMIT
) -> Tuple[int, int]:
    """(page from 1, limit with 0 = all) of `_page` and `_limit`; junk and negative values get the default."""
    page = _whole_number(first_arg(args, "_page"))
    return max(page or 1, 1), _limit_of(first_arg(args, "_limit"), default_limit, max_limit)


def _whole_number(text: Optional[str]) -> Optional[int]:
    return int(text) if text is not None and _INTEGER.fullmatch(text) else None


def _limit_of(text: Optional[str], default: int, most: int) -> int:
    number = _whole_number(text)
    return default if number is None or number < 0 else min(number, most)


def _sort_key(rows: Sequence[Row], column: str) -> Callable[[Row], Any]:
    """A key for one column: numbers before text before null, as PostgreSQL has it (null is the largest)."""
    kinds = {type(row.get(column)) for row in rows}
    if kinds <= {int} or kinds <= {str}:
        return operator.itemgetter(column)

    def key(row: Row) -> Tuple[int, Any]:
        value = row.get(column)
        if value is None:
            return 3, 0
        if isinstance(value, (int, float)):
            return 0, value
        return (1, value) if isinstance(value, str) else (2, str(value))

    return key


def sort_rows(rows: Sequence[Row], order: Order, top: Optional[int] = None) -> List[Row]:
    """Rows in the requested order, the first `top` of them (None = all).

    Rows come in their default order, newest first, and keep it where the order does not tell them apart; only
    under a leading ascending ts_epoch do equals come oldest first. Null is the largest value: last when
    ascending, first when descending (what has not finished is the newest).
    """

    if not order:
        return list(rows[:top])
    column, descending = order[0]
    if not descending and column == "ts_epoch":
        rows = rows[::-1]
    if len(order) == 1 and top is not None and top * 4 < len(rows):
        pick = heapq.nlargest if descending else heapq.nsmallest
        return pick(top, rows, key=_sort_key(rows, column))
    ordered = list(rows)
    for column, descending in reversed(order):
        ordered.sort(key=_sort_key(ordered, column), reverse=descending)
    return ordered[:top]


def arrange(rows: Sequence[Row], query: ListQuery) -> Tuple[List[Row], bool]:
    """(the rows of the requested page, whether more follow) of rows that passed the filters, newest first.

    With groups a page is `limit` groups of at most `group_limit` rows each; see group_rows.
    """
    if query.groups:
        return group_rows(rows, query)
    if not query.limit:
        return (sort_rows(rows, query.order) if query.page == 1 else []), False
    begin = (query.page - 1) * query.limit
    end = begin + query.limit
    if begin >= len(rows):
        return [], False
    return sort_rows(rows, query.order, end)[begin:end], end < len(rows)


def group_rows(rows: Sequence[Row], query: ListQuery) -> Tuple[List[Row], bool]:
    """One page of groups, one after the other, each in the requested order and cut at group_limit (0 = not).

    Groups come by their columns, ascending unless `_order` names the column with another direction; rows
    where it is null make a group of their own, the last (the real service loses them).
    """
    members: Dict[Tuple[Any, ...], List[Row]] = {}
    columns = query.groups
    for row in rows:
        members.setdefault(tuple([row.get(column) for column in columns]), []).append(row)
    labels: List[Row] = [dict(zip(columns, label)) for label in members]
    directions = dict(reversed(query.order))
    for column in reversed(columns):
        known = [label for label in labels if label[column] is not None]
        known.sort(key=_sort_key(known, column), reverse=directions.get(column, False))
        labels = known + [label for label in labels if label[column] is None]
    begin = (query.page - 1) * query.limit
    end = begin + query.limit if query.limit else len(labels)
    if not query.limit and query.page > 1:
        return [], False
    picked: List[Row] = []
    for label in labels[begin:end]:
        group = members[tuple([label[column] for column in columns])]
        picked += sort_rows(group, query.order, query.group_limit or None)
    return picked, end < len(labels)


# Answers.

_SCHEMES = frozenset(("http", "https"))
_HOST = re.compile(r"(?:[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?")


def base_url(headers: Mapping[str, str], default_scheme: str = "http") -> str:
    """scheme://host[:port] under which the client reached us; headers by lower-case name.

    The first of X-Forwarded-Proto and X-Forwarded-Host counts where it is well formed, else Host.
    """
    scheme = headers.get("x-forwarded-proto", "").split(",")[0].strip().lower()
    if scheme not in _SCHEMES:
        scheme = default_scheme
    for name in ("x-forwarded-host", "host"):
        host = headers.get(name, "").split(",")[0].strip()
        if _HOST.fullmatch(host):
            return "%s://%s" % (scheme, host)
    return "%s://localhost" % scheme


def _page_link(base: str, path: str, args: Args, page: Optional[int] = None) -> str:
    """The absolute URL of this request, all parameters kept, with another `_page`."""
    pairs = list(args)
    if page is not None:
        places = [index for index, (key, _) in enumerate(pairs) if key == "_page"]
        if places:
            pairs[places[0]] = ("_page", str(page))
            pairs = [pair for index, pair in enumerate(pairs) if index not in places[1:]]
        else:
            pairs.append(("_page", str(page)))
    query = "&".join(["%s=%s" % (_quote_query(key), _quote_query(value)) for key, value in pairs])
    return "%s%s%s" % (base, path, "?" + query if query else "")


def _quote_query(text: str) -> str:
    from urllib.parse import quote

    return quote(text, safe=":,-._~*@/!$'()", errors="surrogatepass")


def _query_echo(args: Args) -> Dict[str, str]:
    echo: Dict[str, str] = {}
    for key, value in args:
        echo.setdefault(key, value)
    return echo


def envelope(
    data: Any,
    base: str,
    path: str,
    args: Args,
    *,
    page: int = 1,
    has_more: bool = False,
    last_page: Optional[int] = None,
    status: int = 200,
) -> Dict[str, Any]:
    """The UI's envelope of a list: data, status, links, pages, query.

    base: base_url(headers); path: the request's path as it came, still quoted. links.next is null exactly
    when has_more is false: the UI asks on for ever otherwise. last_page: where the number of pages is known.
    """
    numbers: Dict[str, Optional[int]] = {
        "self": page,
        "first": 1,
        "prev": max(page - 1, 1),
        "next": page + 1 if has_more else None,
        "last": last_page,
    }
    links = {
        name: _page_link(base, path, args, number) if number is not None else None
        for name, number in numbers.items()
    }
    links["self"] = _page_link(base, path, args)
    return {
        "data": data,
        "status": status,
        "links": links,
        "pages": numbers,
        "query": _query_echo(args),
    }


def envelope_one(
    data: Any, base: str, path: str, args: Args, *, status: int = 200
) -> Dict[str, Any]:
    """The UI's envelope of a single object: data, status, links.self, query."""
    links = {"self": _page_link(base, path, args)}
    return {"data": data, "status": status, "links": links, "query": _query_echo(args)}


def wants_cursor(args: Args) -> bool:
    """Whether a metadata API request asks for paging (`_limit` or `_cursor`, even empty)."""
    return any([key in ("_limit", "_cursor") for key, _ in args])


def cursor_page(
    rows: Sequence[Row], args: Args, key_fields: Sequence[str], *, always: bool = False
) -> Tuple[List[Row], Dict[str, str]]:
    """(rows of the page, headers X-Limit and X-Next-Cursor) for the metadata API's paging.

    key_fields: ("ts_epoch", "flow_id" | "run_number" | "task_id" | "id") or ("ts_epoch", "task_id", "name");
    pages go down by them. Unless `_limit`, `_cursor` or `always` (a filter was given) ask for paging, all
    rows are returned as they are, without headers. Raises Problem 400 (ids "invalid-limit",
    "invalid-cursor") where the real service answers 500 or drops a row.
    """

    if not always and not wants_cursor(args):
        return list(rows), {}
    text = first_arg(args, "_limit") or ""
    limit = CURSOR_LIMIT if not text else _whole_number(text)
    if limit is None or limit < 0:
        raise Problem(
            400, "invalid _limit: expected an integer from 0, got '%s'" % text, id="invalid-limit"
        )
    limit = min(limit, MAX_CURSOR_LIMIT)
    headers = {"X-Limit": str(limit)}

    def key(row: Row) -> Tuple[Tuple[int, Any], ...]:
        return tuple([_ranked(row.get(field)) for field in key_fields])

    cursor = first_arg(args, "_cursor")
    if cursor:
        after = key(_decode_cursor(cursor, key_fields))
        rows = [row for row in rows if key(row) < after]
    if not limit:
        return [], headers
    page = heapq.nlargest(limit + 1, rows, key=key)
    if len(page) > limit:
        page.pop()
        record = json.dumps({field: page[-1].get(field) for field in key_fields})
        headers["X-Next-Cursor"] = base64.b64encode(record.encode()).decode()
    return page, headers


def _ranked(value: Any) -> Tuple[int, Any]:
    """Numbers before text before nothing, so that ids of both kinds can be compared."""
    if isinstance(value, int):
        return 0, value
    return (1, value) if isinstance(value, str) else (-1, 0)


def _decode_cursor(cursor: str, key_fields: Sequence[str]) -> Dict[str, Any]:

    try:
        record = loads(
            base64.b64decode(cursor.replace(" ", "+"), validate=True)
        )  # a bare + comes as a space
        values = {field: record[field] for field in key_fields}
    except (Problem, ValueError, KeyError, TypeError):
        raise Problem(400, "Invalid cursor", id="invalid-cursor") from None
    kinds = {type(values[field]) for field in key_fields[1:]}
    if type(values[key_fields[0]]) not in (int, type(None)) or not kinds <= {int, str}:
        raise Problem(400, "Invalid cursor", id="invalid-cursor")
    return values


# ---- 7. Reader: artifacts, parameters, graph, logs, cards, search, client-sent patterns ----
#
# What user code has written is never decoded inside the server:
# 1. The daemon forks one child when something is first asked for. The child closes all it inherits but the
#    socket to the daemon, decodes nothing, and ends at the end of file on that socket, whatever ended the
#    daemon. A fork needs no file of this module: the .pyz cache, or Python itself, may be gone by now.
# 2. Each request gets a socket pair. The daemon keeps one end and hands the other to the child, which forks
#    a worker for it. The worker opens the files, gives up the right to open more, decodes, and answers item
#    by item: a JSON head and raw bytes, never a pickle.
# 3. A worker ends with its limits of CPU time and memory, with the request's deadline, or as soon as the
#    daemon closes its end: a client that leaves cancels what it has asked for.

NOT_LOCAL_ID = "datastore-not-local"
TOO_LARGE_ID = "artifact-too-large"
NOT_FOUND_ID = "artifact-not-found"
UNREADABLE_ID = "artifact-unreadable"


# Files: nothing outside the given root is read, nothing anywhere is changed.


class _OverLimit(Exception):
    """A file or a value is larger than its limit; `size` in bytes when it is known."""

    def __init__(self, size: Optional[int] = None) -> None:
        super().__init__("too large")
        self.size = size


def _is_part(text: Any) -> bool:
    """Whether `text` can be one part of a path below the root."""
    return (
        isinstance(text, str) and text not in ("", ".", "..") and not set(text) & {"/", "\\", "\0"}
    )


def _is_below(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip(os.sep) + os.sep)


def _open_below(root: str, parts: Sequence[str]) -> Optional[IO[bytes]]:
    """Opens a regular file below `root`; None when there is none or when it is not really there.

    The leaf may not be a symlink; directories may, as long as what was opened lies below the root. That is
    asked after the open and compared by inode, so that nothing can be exchanged in between.
    """
    if not all(_is_part(part) for part in parts):
        return None
    path = os.path.join(root, *parts)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError):
        return None
    try:
        opened = os.fstat(descriptor)
        real = os.path.realpath(path)
        if (
            stat.S_ISREG(opened.st_mode)
            and _is_below(real, os.path.realpath(root))
            and os.path.samestat(os.lstat(real), opened)
        ):
            return os.fdopen(descriptor, "rb")
    except OSError:
        pass
    os.close(descriptor)
    return None


def _list_below(root: str, parts: Sequence[str]) -> List[str]:
    """The names in a directory that really lies below `root`; [] when there is none."""
    if not all(_is_part(part) for part in parts):
        return []
    real = os.path.realpath(os.path.join(root, *parts))
    if not _is_below(real, os.path.realpath(root)):
        return []
    try:
        return sorted(os.listdir(real))
    except (OSError, ValueError):
        return []


def is_here(metaflow_dir: str, ds_type: Any, ds_root: Any) -> bool:
    """Whether a datastore (metadata `ds-type`, `ds-root`) is that of `metaflow_dir`; None, for unknown: yes."""
    if ds_type not in (None, "", "local"):
        return False
    if not isinstance(ds_root, str) or not ds_root:
        return True
    if "://" in ds_root or "\0" in ds_root:
        return False
    try:
        return os.path.realpath(ds_root) == os.path.realpath(metaflow_dir)
    except ValueError:  # a lone surrogate: no path at all
        return False


def not_local_text(ds_type: Any, ds_root: Any) -> str:
    """What people are told about data that are somewhere else."""
    place = " (%s)" % ds_root if isinstance(ds_root, str) and ds_root else ""
    if ds_type in (None, "", "local"):
        return f"The data is not local: it is in another local datastore{place}, which this service does not open."
    return f"The data is not local: it is in the {ds_type} datastore{place}. Use Metaflow's client to read it."


# Values: a pickle is a program that calls what it names. Here a name stands for one of the plain types below,
# for a maker of plain values, or for a `Foreign` class, which keeps what it is given and does nothing.


class _ForeignType(type):
    """The type of stand-ins; its text is that of the class, function or object that was named."""

    path = "object"

    def __repr__(cls) -> str:
        import builtins

        real = getattr(builtins, cls.path, None)
        return "<%s>" % cls.path if real is None else repr(real)


class Foreign(metaclass=_ForeignType):
    """An object of a class that is not known here: the arguments, state and items that its pickle gave it."""

    def __new__(cls, *args: Any, **named: Any) -> Foreign:
        made = object.__new__(cls)
        made.args, made.named, made.state, made.items = args, named, {}, []
        return made

    def __init__(self, *args: Any, **named: Any) -> None:
        self.args: Tuple[Any, ...]
        self.named: Dict[str, Any]
        self.state: Any
        self.items: List[Any]

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def append(self, item: Any) -> None:
        """An item of a subclass of list; `add` is that of a set."""
        self.items.append(item)

    add = append

    def __repr__(self) -> str:
        known = _FOREIGN_TEXTS.get(type(self).path)
        return (known and known(self)) or self.fields_text()

    def fields_text(self) -> str:
        """Name(argument, field=value), or <module.Name> when nothing is known of it."""
        fields = dict(self.named)
        for state in self.state if isinstance(self.state, tuple) else (self.state,):
            if isinstance(state, dict):  # fields in a dict, fields in slots
                fields.update(state)
        shown = [] if fields else [repr(arg) for arg in self.args]
        shown += [repr(self.items)] if self.items else []
        shown += [f"{k}={v!r}" for k, v in fields.items() if isinstance(k, str) and k[:1] != "_"]
        name = type(self).__name__
        return "%s(%s)" % (name, ", ".join(shown)) if shown else "<%s>" % type(self).path


def _foreign_type(module: str, name: str) -> type:
    path = name if module == "builtins" else "%s.%s" % (module, name)
    return _ForeignType(name.rpartition(".")[2] or name, (Foreign,), {"path": path})


class Shown:
    """A value without parts, as str() and as repr() show it: a path, a fraction, a time stamp."""

    __slots__ = ("text", "code")

    def __init__(self, text: str, code: str) -> None:
        self.text, self.code = text, code

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return self.code


class ForeachFrame(NamedTuple):
    """Metaflow's own (tuple_util.foreach_frame_field_list; 2.12.0 has the same five fields)."""

    step: Any = None
    var: Any = None
    num_splits: Any = None
    index: Any = None
    value: Any = None

    def __setstate__(self, state: Any) -> None:
        """A frame has no state."""


class _Config(Dict[str, Any]):
    """Metaflow's ConfigValue: a dict, in some versions with its items in the state."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict) and isinstance(state.get("_data"), dict):
            self.update(state["_data"])


def _uuid_text(value: Foreign) -> str:
    number = value.state.get("int") if isinstance(value.state, dict) else None
    if type(number) is not int or not 0 <= number < 1 << 128:
        return ""
    digits = "%032x" % number
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def _trace_text(value: Foreign) -> str:
    """MetaflowExceptionWrapper: str() is its stack trace (metaflow/exception.py)."""
    state = value.state if isinstance(value.state, dict) else {}
    trace = state.get("stacktrace")
    if isinstance(trace, str) and trace:
        return trace
    return "[no stacktrace]\n%s: %s" % (state.get("type"), state.get("exception"))


def _client_text(value: Foreign) -> str:
    """Run('Flow/1') and its like (metaflow/client/core.py)."""
    state = value.state if isinstance(value.state, dict) else {}
    data = state.get("data")
    path = data[0] if isinstance(data, (list, tuple)) and data else state.get("_pathspec")
    return "%s(%r)" % (type(value).__name__, path) if isinstance(path, str) else ""


# numpy and pandas, from their pickles alone.

# Kind and size of a numpy type, as `struct` has it.
_NUMPY_CODES = {
    "b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q",
    "f2": "e", "f4": "f", "f8": "d", "c8": "ff", "c16": "dd", "M8": "q", "m8": "q",
}  # fmt: skip
_TIME_UNITS = {"D": 86_400 * 10**9, "h": 3600 * 10**9, "m": 60 * 10**9, "s": 10**9}
_TIME_UNITS.update(ms=10**6, us=1000, ns=1)
_PANDAS_UNITS = {7: "s", 8: "ms", 9: "us", 10: "ns"}  # pandas/_libs/tslibs: NPY_DATETIMEUNIT


class _Dtype:
    """numpy.dtype: `code` as in "f8", byte order and unit of time from its state."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code, self.order, self.unit = str(code), "<", "ns"

    def __setstate__(self, state: Any) -> None:
        self.order = ">" if state[1] == ">" else "<"
        if self.code in ("M8", "m8"):
            self.unit = state[-1][1][0].decode() if type(state[-1]) is tuple else "ns"

    def decode(self, data: Any, count: int) -> List[Any]:
        """`count` values as Python has them. Raises ValueError for types that are not known here."""
        kind, size = self.code[:1], int(self.code[1:] or 0)
        if kind == "O":
            return list(data)
        if kind in "US" and count and size:
            width = size * (4 if kind == "U" else 1)
            coding = ("utf-32-le" if self.order == "<" else "utf-32-be") if kind == "U" else ""
            parts = [bytes(data[i * width : (i + 1) * width]) for i in range(count)]
            if coding:
                return [part.decode(coding).rstrip("\0") for part in parts]
            return [part.rstrip(b"\0") for part in parts]
        code = _NUMPY_CODES.get(self.code)
        if code is None:
            raise ValueError("a numpy type that is not known here: %s" % self.code)
        values = list(struct.unpack(self.order + code * count, bytes(data)))
        if kind == "c":
            return [complex(a, b) for a, b in zip(values[::2], values[1::2])]
        if self.code in ("f2", "f4"):
            return [_short_float(value, code) for value in values]
        if kind in "Mm":
            return [_moment_text(kind, value, _TIME_UNITS.get(self.unit, 1)) for value in values]
        return values


def _short_float(value: float, code: str) -> float:
    """The shortest decimal number that is this float of two or four bytes: 0.1, not 0.10000000149."""
    for digits in range(3, 10):
        short = float("%.*g" % (digits, value))
        try:
            if struct.pack(code, short) == struct.pack(code, value):
                return short
        except OverflowError:  # rounded up beyond the largest one
            pass
    return value


def _moment_text(kind: str, value: Any, unit: int, zone: Any = None) -> Shown:
    """A Timestamp ("M") or Timedelta of `value` units of `unit` ns, as pandas writes them."""
    if value == -(2**63):
        return Shown("NaT", "NaT")
    seconds, nanos = divmod(value * unit, 10**9)
    fraction = (".%09d" % nanos if nanos % 1000 else ".%06d" % (nanos // 1000)) if nanos else ""
    if kind == "M":
        moment = datetime.datetime(1970, 1, 1) + datetime.timedelta(seconds=seconds)
        offset = ""
        if isinstance(zone, datetime.tzinfo):
            moment = moment.replace(tzinfo=datetime.timezone.utc).astimezone(zone)
            offset = str(moment)[19:]
        text = str(moment)[:19] + fraction + offset
        return Shown(text, "Timestamp('%s')" % text)
    days, rest = divmod(seconds, 86_400)
    clock = "%02d:%02d:%02d" % (rest // 3600, rest % 3600 // 60, rest % 60)
    text = "%d days %s%s" % (days, clock, fraction)
    return Shown(text, "Timedelta('%s')" % text)


class NumpyArray:
    """numpy.ndarray: `rows` are nested lists; a large one is only named."""

    def __init__(self, *_: Any) -> None:
        self.shape: Tuple[int, ...] = (0,)
        self.rows: List[Any] = []
        self.code = ""

    def __setstate__(self, state: Any) -> None:
        self.fill(*state[-4:])

    def fill(self, shape: Any, dtype: Any, by_column: Any, data: Any) -> NumpyArray:
        """Takes over the packed values; `by_column`: as Fortran lays them out."""
        count = math.prod(shape)
        if not isinstance(dtype, _Dtype) or not 0 <= count <= ARRAY_VALUES:
            self.shape, self.code = shape, getattr(dtype, "code", "?")
            return self
        self.shape, self.code = shape, dtype.code
        values = dtype.decode(data, count)
        if by_column and len(shape) > 1:
            flat, values = values, []
            for place in itertools.product(*(range(size) for size in shape)):
                at = 0
                for index, size in zip(reversed(place), reversed(shape)):
                    at = at * size + index
                values.append(flat[at])
        for size in reversed(shape[1:]):
            values = [values[i : i + size] for i in range(0, len(values), size)] if size else []
        self.rows = values
        return self

    def __repr__(self) -> str:
        if math.prod(self.shape) > ARRAY_VALUES:
            return "<numpy.ndarray of %s, shape %s>" % (self.code, self.shape)
        return "array(%r)" % (self.rows if self.shape else self.rows[0],)


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any, *_: Any) -> NumpyArray:
    return NumpyArray().fill(shape, dtype, order == "F", data)


def _pandas_list(value: Any) -> List[Any]:
    """The labels of an index, or the values of a column."""
    if isinstance(value, NumpyArray):
        return value.rows
    if isinstance(value, Foreign):
        for part in (*value.args, *(value.state if isinstance(value.state, tuple) else ())):
            if isinstance(part, NumpyArray):
                return part.rows
            if isinstance(part, dict) and type(part.get("stop")) is int:
                return list(range(part["start"], part["stop"], part["step"]))[: ARRAY_VALUES + 1]
            if isinstance(part, dict) and "data" in part:
                return _pandas_list(part["data"])
    raise ValueError("a pandas part that is not known here")


def _frame_text(value: Foreign) -> str:
    """A small Series or DataFrame as a table, "" when its parts are not known."""
    try:
        manager = value.state["_mgr"]
        if isinstance(manager.state, tuple):
            parts = manager.state[-1]["0.14.1"]
            axes = parts["axes"]
            blocks = [(block["values"], block["mgr_locs"]) for block in parts["blocks"]]
        else:
            axes, blocks = manager.args[1], [block.args[:2] for block in manager.args[0]]
        index = _pandas_list(axes[-1])
        columns: Dict[int, List[Any]] = {}
        for values, where in blocks:
            rows = _pandas_list(values)
            places = (
                range(where.start, where.stop, where.step)
                if isinstance(where, slice)
                else where.rows
            )
            if len(axes) == 1 or not (rows and isinstance(rows[0], list)):
                rows = [rows]
            columns.update(zip(places, rows))
        names = _pandas_list(axes[0]) if len(axes) > 1 else [""]
        table = [
            [columns[i][row] for i in range(len(names))]
            for row in range(min(len(index), FRAME_ROWS))
        ]
    except (AttributeError, KeyError, IndexError, TypeError, ValueError):
        return ""
    cells = [["", *map(str, names)]] if len(axes) > 1 else []
    cells += [[str(label), *map(str, row)] for label, row in zip(index, table)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths)).rstrip() for row in cells]
    if len(index) > len(table):
        lines += ["...", "[%d rows]" % len(index)]
    name = value.state.get("_name", value.state.get("name"))  # before pandas 2: name
    if len(axes) == 1 and name is not None:
        lines.append("Name: %s" % name)
    return "\n".join(lines)


_FOREIGN_TEXTS: Dict[str, Callable[[Foreign], str]] = {
    "uuid.UUID": lambda value: _uuid_text(value) and "UUID('%s')" % _uuid_text(value),
    "metaflow.exception.MetaflowExceptionWrapper": _trace_text,
    "pandas.Series": _frame_text,
    "pandas.DataFrame": _frame_text,
    "pandas.core.series.Series": _frame_text,
    "pandas.core.frame.DataFrame": _frame_text,
    **{f"metaflow.client.core.{name}": _client_text for name in ("Flow", "Run", "Step", "Task")},
    "metaflow.client.core.DataArtifact": _client_text,
}


# What the names in a pickle stand for. Functions, not Python classes: a pickle can change a class that it gets.


def _make_path(name: str) -> Callable[..., Shown]:
    def make(*parts: str) -> Shown:
        joined = os.path.join(*parts) if parts else "."
        if "Windows" in name:
            joined = parts[0] + "\\".join(parts[1:]) if parts else "."
        return Shown(joined, "%s(%r)" % (name, joined.replace("\\", "/")))

    return make


def _make_fraction(*parts: Any) -> Shown:
    text = parts[0] if len(parts) == 1 else "%d/%d" % parts
    over, _, under = str(text).partition("/")
    return Shown(str(text), "Fraction(%s, %s)" % (over, under or 1))


def _make_moment(kind: Any) -> Callable[..., Any]:
    """A datetime or time; without its zone when that is of a kind which is not known here."""

    def make(packed: Any, *zone: Any) -> Any:
        known = [one for one in zone if one is None or isinstance(one, datetime.tzinfo)]
        return kind(packed, *known)

    return make


def _make_timestamp(value: int, freq: Any = None, zone: Any = None, unit: int = 10) -> Shown:
    return _moment_text("M", value, _TIME_UNITS[_PANDAS_UNITS[unit]], zone)


def _make_timedelta(value: int, unit: int = 10) -> Shown:
    return _moment_text("m", value, _TIME_UNITS[_PANDAS_UNITS[unit]])


def _make_scalar(dtype: Any, data: Any = b"") -> Any:
    return dtype.decode([data] if dtype.code[:1] == "O" else data, 1)[0]


def _make_counter(*args: Any) -> Any:
    return collections.Counter(*args)


def _make_array(*args: Any) -> Any:
    return NumpyArray()


def _make_dtype(*args: Any) -> Any:
    return _Dtype(*args)


def _encode_latin(text: str, coding: Any = "latin1") -> bytes:
    """`_codecs.encode(text, "latin1")`: how protocol 2 spells bytes."""
    return text.encode("latin-1")


def _new_object(kind: Any, *args: Any) -> Any:
    """copyreg's functions, for foreign classes."""
    if not (isinstance(kind, type) and issubclass(kind, (Foreign, ForeachFrame))):
        raise ValueError("a class that cannot be made this way")
    return kind(*args)


def _reconstructed(kind: Any, base: Any, state: Any = None) -> Any:
    return _new_object(kind, *(state if isinstance(state, tuple) else ()))


def _new_with_names(kind: Any, args: Any, named: Any) -> Any:
    return _new_object(kind, *args)


@lru_cache(maxsize=1)
def _pickle_names() -> Dict[str, Any]:
    import builtins
    import decimal

    names: Dict[str, Any] = {
        "_codecs.encode": _encode_latin,
        "builtins.Ellipsis": ...,
        "builtins.NotImplemented": NotImplemented,
        "copyreg._reconstructor": _reconstructed,
        "copyreg.__newobj__": _new_object,
        "copyreg.__newobj_ex__": _new_with_names,
        "collections.Counter": _make_counter,
        "datetime.datetime": _make_moment(datetime.datetime),
        "datetime.time": _make_moment(datetime.time),
        "decimal.Decimal": decimal.Decimal,
        "fractions.Fraction": _make_fraction,
        "metaflow.user_configs.config_parameters.ConfigValue": _Config,
        "metaflow.tuple_util.ForeachFrame": ForeachFrame,
        "__main__.ForeachFrame": ForeachFrame,
        "numpy.dtype": _make_dtype,
        "numpy._core.multiarray.scalar": _make_scalar,
        "numpy._core.multiarray._reconstruct": _make_array,
        "numpy._core.numeric._frombuffer": _from_buffer,
        "pandas.NA": Shown("<NA>", "<NA>"),
        "pandas._libs.tslibs.timestamps._unpickle_timestamp": _make_timestamp,
        "pandas._libs.tslibs.timestamps.Timestamp": _make_timestamp,
        "pandas._libs.tslibs.timedeltas._timedelta_unpickle": _make_timedelta,
        "pandas._libs.tslibs.nattype._nat_unpickle": lambda *_: Shown("NaT", "NaT"),
        "pandas._libs.tslibs.nattype.__nat_unpickle": lambda *_: Shown("NaT", "NaT"),
        "pytz._UTC": lambda: datetime.timezone.utc,
    }
    for name in ("set", "frozenset", "bytes", "bytearray", "complex", "range", "slice"):
        names["builtins." + name] = getattr(builtins, name)
    for name in ("OrderedDict", "defaultdict", "deque"):
        names["collections." + name] = getattr(collections, name)
    for name in ("date", "timedelta", "timezone"):
        names["datetime." + name] = getattr(datetime, name)
    for name in ("PurePosixPath", "PosixPath", "PureWindowsPath", "WindowsPath"):
        names["pathlib." + name] = _make_path(name)
    for name, value in vars(builtins).items():
        if isinstance(value, type) and issubclass(value, BaseException):
            names["builtins." + name] = value
    return names


_OLD_MODULES = {"__builtin__": "builtins", "exceptions": "builtins", "copy_reg": "copyreg"}
_OLD_MODULES["pathlib._local"] = "pathlib"
_OLD_NAMES = {"xrange": "range", "unicode": "str", "long": "int"}


class NeedsZones(Exception):
    """The value has times of these zones, whose rules are files."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__("time zones")
        self.names = [name[:100] for name in sorted(names)[:50]]


def load_pickle(data: bytes, zones: Mapping[str, Any]) -> Any:
    """The value of a pickle. Imports nothing and calls nothing that the pickle names; raises whatever it raises.

    `zones`: time zones by name; raises NeedsZones when there are more.
    """
    import pickle

    names = _pickle_names()
    types: Dict[str, Any] = {}
    wanted: Set[str] = set()

    def zone(key: Any, *_: Any) -> Any:
        if key not in zones:
            wanted.add(str(key))
        return zones.get(key)

    def attribute(of: Any, name: str) -> Any:
        if not isinstance(of, _ForeignType):
            raise ValueError("an attribute of what is no class")
        module, _, owner = of.path.rpartition(".")
        return find(module or "builtins", "%s.%s" % (owner, name))

    own = {"builtins.getattr": attribute, "zoneinfo.ZoneInfo._unpickle": zone, "pytz._p": zone}

    def find(module: str, name: str) -> Any:
        module = _OLD_MODULES.get(module, module)
        module = module.replace("numpy.core.", "numpy._core.")
        name = _OLD_NAMES.get(name, name) if module == "builtins" else name
        path = "%s.%s" % (module, name)
        for known in (own, names, types):
            if path in known:
                return known[path]
        types[path] = _foreign_type(module, name)
        return types[path]

    class Unpickler(pickle.Unpickler):
        find_class = staticmethod(find)

        def persistent_load(self, pid: Any) -> Any:
            return _foreign_type("pickle", "persistent_id")()

    value = Unpickler(io.BytesIO(data), encoding="latin-1").load()
    if wanted:
        raise NeedsZones(wanted)
    return value


def _text_of(value: Any, size: int) -> str:
    """str(value), or "<type, N bytes>" for an object that would be a long text."""
    if isinstance(value, Foreign):
        if type(value).path == "uuid.UUID":
            return _uuid_text(value)
        text = repr(value)
        if type(value).path not in _FOREIGN_TEXTS and (text[:1] == "<" or len(text) > FOREIGN_TEXT):
            text = "<%s, %d bytes>" % (type(value).path, size)
    else:
        text = str(value)
    if len(text) > ARTIFACT_TEXT:
        raise _OverLimit(size)
    return text


class _JsonMaker:
    """Makes values that JSON can hold: keys are text, sets and tuples lists, the rest str(value); bounded."""

    def __init__(self) -> None:
        self.left = VALUE_PARTS

    def make(self, value: Any, depth: int = 0) -> Any:
        """The value, made of what JSON has. Raises _OverLimit."""
        self.left -= 1
        if self.left < 0:
            raise _OverLimit()
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float and math.isfinite(value):
            return value
        if isinstance(value, NumpyArray) and math.prod(value.shape) <= ARRAY_VALUES:
            value = value.rows
        if isinstance(value, (dict, list, tuple, set, frozenset)):
            if depth >= VALUE_DEPTH:
                return "..."
            if isinstance(value, dict):
                pairs = value.items()
                return {k if type(k) is str else str(k): self.make(v, depth + 1) for k, v in pairs}
            return [self.make(item, depth + 1) for item in value]
        return str(value)


# The graph of a flow.

_GRAPH_KEYS = frozenset(
    ("file", "start_step", "end_step", "parameters", "constants", "steps", "doc")
)
_GRAPH_KEYS |= {"graph_structure", "decorators", "extensions"}


def _graph_decorators(value: Any) -> List[Dict[str, Any]]:
    return [
        {
            **deco,
            "name": str(deco.get("name") or ""),
            "attributes": deco["attributes"] if isinstance(deco.get("attributes"), dict) else {},
            "statically_defined": bool(deco.get("statically_defined")),
        }
        for deco in (value if isinstance(value, list) else [])
        if isinstance(deco, dict)
    ]


def _graph_text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _whole_graph(info: Dict[str, Any]) -> Optional[Dict[str, Any]]:
    """`info` with every part that the UI reads of the right type: null or missing ones crash its DAG tab."""
    raw = info.get("steps")
    if not isinstance(raw, dict):
        return None
    steps: Dict[str, Any] = {name: step for name, step in raw.items() if isinstance(step, dict)}
    if not steps:
        return None
    for name, step in steps.items():
        following = step["next"] if isinstance(step.get("next"), list) else []
        kept = {key: item for key, item in step.items() if item is not None}
        kept.update(
            name=name,
            type=_graph_text(step.get("type")) or "linear",
            line=step.get("line") if type(step.get("line")) is int else 0,
            source_file=_graph_text(step.get("source_file")),
            doc=_graph_text(step.get("doc")),
            decorators=_graph_decorators(step.get("decorators")),
            next=[one for one in following if isinstance(one, str) and one in steps],
            node_info=step.get("node_info") if isinstance(step.get("node_info"), dict) else {},
        )
        steps[name] = kept
    structure = _whole_structure(info.get("graph_structure"), steps)
    graph = {key: item for key, item in info.items() if key not in _GRAPH_KEYS and item is not None}
    start, end = info.get("start_step"), info.get("end_step")
    extensions = info.get("extensions")
    return {
        "file": _graph_text(info.get("file")),
        "start_step": start
        if start in steps
        else "start"
        if "start" in steps
        else next(iter(steps)),
        "end_step": end if end in steps else "end" if "end" in steps else list(steps)[-1],
        "parameters": info["parameters"] if isinstance(info.get("parameters"), list) else [],
        "constants": info["constants"] if isinstance(info.get("constants"), list) else [],
        "steps": steps,
        "graph_structure": structure or list(steps),
        "doc": _graph_text(info.get("doc")),
        "decorators": _graph_decorators(info.get("decorators")),
        "extensions": extensions if isinstance(extensions, dict) else {},
        **graph,
    }


def _whole_structure(value: Any, steps: Mapping[str, Any]) -> List[Any]:
    """A nested list of names without those that are no steps and without empty lists."""
    kept: List[Any] = []
    for item in value if isinstance(value, list) else []:
        if isinstance(item, str) and item in steps:
            kept.append(item)
        elif isinstance(item, list):
            inner = _whole_structure(item, steps)
            if inner:
                kept.append(inner)
    return kept


def _graph_of_steps(shown: Sequence[Tuple[str, int]]) -> Dict[str, Any]:
    """A graph of the steps that exist: one line, with boxes where the foreach nesting says so."""
    names = [name for name, _ in shown]
    steps: Dict[str, Any] = {}
    for index, (name, depth) in enumerate(shown):
        following = shown[index + 1] if index + 1 < len(shown) else None
        before = shown[index - 1][1] if index else 0
        kind = "start" if index == 0 else "end" if name == "end" else "linear"
        if following is not None and following[1] > depth:
            kind = "split-foreach"
        elif depth < before:
            kind = "join"
        steps[name] = {
            "name": name,
            "type": kind,
            "line": 0,
            "source_file": "",
            "doc": "",
            "decorators": [],
        }
        steps[name].update(next=[following[0]] if following else [], node_info={})
    structure: List[Any] = []
    levels: List[Tuple[int, List[Any]]] = [(0, structure)]
    for name, depth in shown:
        if depth > levels[-1][0]:
            inner: List[Any] = []
            levels[-1][1].append([inner])
            levels.append((depth, inner))
        while depth < levels[-1][0] and len(levels) > 1:
            levels.pop()
        levels[-1][1].append(name)
    graph: Dict[str, Any] = {
        "file": "",
        "start_step": names[0],
        "end_step": names[-1],
        "parameters": [],
        "constants": [],
    }
    graph.update(steps=steps, graph_structure=structure, doc="", decorators=[], extensions={})
    return graph


# Search and foreach.


def parse_search(text: str) -> Tuple[str, bool]:
    """(what is looked for, whether it has to be all of the value): `"text"` in quotes means equal, else
    contained.
    """
    if len(text) >= 2 and text.startswith('"') and text.endswith('"'):
        return text[1:-1], True
    return text, False


def _search_row(record: Mapping[str, Any]) -> Dict[str, Any]:
    """What a match says about its task; ids are strings, the UI compares them as such."""
    flow, run, step, task = artifact_item(record)["task"]
    return {"flow_id": flow, "run_number": run, "step_name": step, "task_id": task}


def search_fits(value: str, text: str) -> bool:
    """Whether a text is what a search looks for; case does not count."""
    wanted, whole = parse_search(value)
    text, wanted = text.lower(), wanted.lower()
    return text == wanted if whole else wanted in text


def foreach_frames(value: Any) -> List[str]:
    """["variable=value", ...], outermost first, from the value of metadata `foreach-stack`.

    A JSON list since Metaflow 2.14.1, text before that; the service writes lists as {a=1,b=2}.
    """
    if isinstance(value, str):
        inside = value.strip()
        if inside[:1] == "[" and inside[-1:] == "]":
            try:
                value = json.loads(inside)
            except (ValueError, RecursionError):
                pass
        if isinstance(value, str):
            if inside[:1] + inside[-1:] in ("{}", "[]"):
                inside = inside[1:-1]
            value = [part.strip().strip("\"'") for part in inside.split(",") if part.strip()]
    return [str(part) for part in value] if isinstance(value, (list, tuple)) else []


def search_foreach(
    record: Mapping[str, Any], key: str, value: Optional[str] = None
) -> Optional[Dict[str, Any]]:
    """The match of a `foreach-stack` metadata record with a search, None when it does not match.

    `key=value` has to be part of one of its frames, or all of it when the value is in quotes; without a
    value, `key` part of one. Unlike artifacts this minds case (ui backend: api/search.py).
    """
    frames = foreach_frames(record.get("value"))
    wanted, whole = parse_search(value or "")
    text = "%s=%s" % (key, wanted) if value else key
    if not any(text == frame if whole else text in frame for frame in frames):
        return None
    return {**_search_row(record), "value": "{%s}" % ",".join(frames), "searchable": True}


def foreach_label(task_id: Any, stack: Any = None, execution_path: Any = None) -> Optional[str]:
    """`<task id>[<index in the outermost foreach>]`, None for a task in no foreach.

    `stack`: the value of the task's `_foreach_stack` artifact, whose frames have the index in fourth place
    (ui backend: task_refiner); or `execution_path`: metadata `foreach-execution-path`, "middle:0,leaf:1"
    (Metaflow 2.14 and later).
    """
    index: Any = None
    if (
        isinstance(stack, (list, tuple))
        and stack
        and isinstance(stack[0], (list, tuple))
        and len(stack[0]) >= 4
    ):
        index = stack[0][3]
    elif isinstance(execution_path, str):
        index = execution_path.split(",")[0].rpartition(":")[2]
    return (
        "%s[%s]" % (task_id, index)
        if type(index) is int or (isinstance(index, str) and index.isdigit())
        else None
    )


def foreach_depth(execution_path: Any = None, stack: Any = None) -> int:
    """How many foreach a task is in, from its metadata `foreach-execution-path` or `foreach-stack`."""
    if isinstance(execution_path, str) and execution_path:
        return execution_path.count(",") + 1
    return len(foreach_frames(stack))


class Confinement:
    """Takes from a worker what it no longer needs, so that hostile bytes can cost no more than this process."""

    def __call__(self, memory: Optional[int] = None, seconds: int = WORKER_CPU) -> None:
        import resource

        os.nice(0 if memory is None else 10)  # logs come first
        if memory is not None and os.path.exists(
            "/proc/self/statm"
        ):  # elsewhere it is not enforced
            with open("/proc/self/statm") as file:
                used = int(file.read().split()[0]) * resource.getpagesize()
            self._limit(resource.RLIMIT_AS, used + memory)
        self.seconds = seconds
        self.renew()
        for kind in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE, resource.RLIMIT_NOFILE):
            self._limit(kind, 0)

    def _limit(self, kind: int, limit: int) -> None:
        import resource

        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (limit, resource.getrlimit(kind)[1]))

    def renew(self) -> None:
        """Gives the next item its own share of CPU time."""
        import resource

        self._limit(resource.RLIMIT_CPU, int(time.process_time()) + 1 + self.seconds)


# Jobs: what a worker does with one request. Each opens its files, calls `confine`, and answers item by item.
# Layout of the local datastore (metaflow/datastore: content_addressed_store, task_datastore; the same from
# 2.12.0 to 2.19): <root>/<Flow>/data/<sha[:2]>/<sha> is gzip, or raw bytes when <sha>_meta says "cas_raw".

if TYPE_CHECKING:
    _Answer = Callable[..., None]  # (head, body=b"")

_SHA = re.compile(r"[0-9a-f]{6,128}")
_PICKLES = frozenset(["pickle-v2", "pickle-v4", "gzip+pickle-v2", "gzip+pickle-v4", "", None])


def _failure(id: str, detail: str) -> Dict[str, Any]:
    return {"error": {"id": id, "detail": detail, "traceback": None}}


def _item_too_large(item: Mapping[str, Any], size: Optional[int]) -> Dict[str, Any]:
    known = "too large to show" if size is None else "%d bytes" % size
    return {**_failure(TOO_LARGE_ID, "%s: %s" % (item["path"], known)), "size": size}


def _unreadable(item: Mapping[str, Any], why: str) -> Dict[str, Any]:
    return _failure(UNREADABLE_ID, "%s: %s" % (item["path"], why))


def _packed_file(file: IO[bytes], limit: int, packed: bool) -> bytes:
    """The bytes of a file that may unpack to `limit` bytes. Raises _OverLimit, OSError."""
    with file:
        size = os.fstat(file.fileno()).st_size
        if size > limit + (limit // 1000 + 1024 if packed else 0):  # padding, or what gzip adds
            raise _OverLimit(None if packed else size)
        return file.read(size)


def _open_item(root: str, roots: Sequence[str], item: Mapping[str, Any], limit: int) -> Any:
    """(packed, bytes) of what an item names, or the head of an answer that says why there are none."""
    include, flow, sha = item.get("include"), item["flow"], item["sha"]
    file, packed = None, True
    if item["ds_type"] not in (None, "", "local"):
        return _failure(NOT_LOCAL_ID, not_local_text(item["ds_type"], item["ds_root"]))
    try:
        if include:
            for place in roots:
                file = file or _open_below(place, (include["flow"], include["sha"]))
            if file is None:
                return _failure(NOT_LOCAL_ID, not_local_text(None, include["url"]))
        elif _SHA.fullmatch(sha):
            file = _open_below(root, (flow, "data", sha[:2], sha))
            about = _open_below(root, (flow, "data", sha[:2], sha + "_meta"))
            if about is not None:
                with about:
                    meta = json.loads(about.read(4096))
                packed = not meta.get("cas_raw", False)
                if packed and meta.get("cas_version", 1) != 1:
                    return _unreadable(item, "its encoding version is not known")
        if file is None:
            elsewhere = not is_here(root, item["ds_type"], item["ds_root"])
            if elsewhere:
                return _failure(NOT_LOCAL_ID, not_local_text(item["ds_type"], item["ds_root"]))
            return _failure(NOT_FOUND_ID, "%s: its data is not in the datastore" % item["path"])
        return packed, _packed_file(file, limit, packed)
    except _OverLimit as error:
        return _item_too_large(item, error.size)
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        return _unreadable(item, str(error) or type(error).__name__)


def _unpacked(data: bytes, limit: int) -> bytes:
    """Unpacks at most `limit` bytes. Raises _OverLimit, ValueError."""
    import gzip

    try:
        plain = gzip.GzipFile(fileobj=io.BytesIO(data)).read(limit + 1)
    except (OSError, EOFError, zlib.error):
        raise ValueError("the file is damaged") from None
    if len(plain) > limit:
        size = int.from_bytes(data[-4:], "little")  # what gzip claims: exact below 4 GiB
        raise _OverLimit(size if size > limit else None)
    return plain


_INCLUDED = re.compile(r"local://.*/([^/]+)/([0-9a-f]{40})", re.S)


def _include_of(value: Any) -> Optional[Dict[str, Any]]:
    """What an IncludedFile of Metaflow names (metaflow/includefile.py), None for any other value.

    Its url is not followed: the file is called by the sha1 of its content, which must be right, so that no
    pickle can name another file.
    """
    if not (isinstance(value, Foreign) and type(value).path == "metaflow.includefile.IncludedFile"):
        return None
    state = value.state if isinstance(value.state, dict) else {}
    about = state.get("_descriptor")
    about = about if isinstance(about, dict) else {}
    url, size = about.get("url"), about.get("size")
    found = _INCLUDED.fullmatch(url) if isinstance(url, str) else None
    known = about.get("type") in ("uploader-v1", "uploader-v2")
    return {
        "url": url if isinstance(url, str) else "unknown://",
        "flow": found.group(1) if found and known else "",
        "sha": found.group(2) if found and known else "",
        "size": size if type(size) is int else None,
        "coding": str(about.get("encoding") or "utf-8")[:20]
        if about.get("is_text", True)
        else None,
    }


def _text_coding(name: Optional[str]) -> str:
    """A text encoding that Python knows; its tables must be loaded before files are out of reach."""
    import codecs

    try:
        if name is not None and re.fullmatch(r"[A-Za-z0-9_-]{1,20}", name):
            coding = codecs.lookup(name).name
            if coding not in ("idna", "punycode"):  # quadratic
                b"a".decode(coding, "replace")  # what is no text encoding says so
                return coding
    except (LookupError, ValueError):
        pass
    return "utf-8"


def _value_of(item: Mapping[str, Any], opened: Any, limit: int, zones: Any) -> Tuple[Any, int]:
    """(value, size). Raises whatever a broken pickle raises."""
    packed, data = opened
    data = _unpacked(data, limit) if packed else data
    include = item.get("include")
    if include:
        import hashlib

        if hashlib.sha1(data, usedforsecurity=False).hexdigest() != include["sha"]:
            raise ValueError("the included file has changed")
        coding = include["coding"]
        return (data if coding is None else data.decode(coding, "replace")), len(data)
    if item["content_type"] not in _PICKLES:  # written by a serializer of an extension
        text = "<%s, %d bytes>" % (item["content_type"], len(data))
        return Shown(text, text), len(data)
    return load_pickle(data, zones), len(data)


def _answer_item(
    answer: _Answer, item: Mapping[str, Any], opened: Any, want: str, limit: int, **more: Any
) -> int:
    """Answers one artifact; returns the characters that it took."""
    size, text, body = None, "", b""
    try:
        value, size = _value_of(item, opened, limit, more["zones"])
        include = _include_of(value)
        if include:
            if include["size"] is not None and include["size"] > limit:
                head = _item_too_large(item, include["size"])
            elif not include["sha"]:
                kind = include["url"].partition("://")[0]
                kind = None if kind == "local" else kind
                head = _failure(NOT_LOCAL_ID, not_local_text(kind, include["url"]))
            else:
                head = {"include": include}
        elif want == "graph":
            graph = _whole_graph(_JsonMaker().make(value)) if isinstance(value, dict) else None
            head, body = {}, json.dumps(graph).encode()
        elif want == "json" and not isinstance(value, (Foreign, bytes)):
            head, body = {}, json.dumps(_JsonMaker().make(value)).encode()
        else:
            text = _text_of(value, size)
            if want == "match":
                head = {"hit": search_fits(more["value"], text)}
            else:
                shown = json.dumps(text) if want == "json" else text
                head, body = {}, shown.encode("utf-8", "surrogatepass")
    except NeedsZones as needs:
        head = {"zones": needs.names}
    except (_OverLimit, MemoryError) as error:
        head = _item_too_large(item, getattr(error, "size", None) or size)
    except RecursionError:
        head = _unreadable(item, "it is nested too deeply")
    except Exception as error:
        why = str(error)[:200] if isinstance(error, ValueError) else type(error).__name__
        head = _unreadable(item, why or "a broken pickle")
    answer(head, body)
    return len(text) or len(body)


def _artifacts_job(
    answer: _Answer, confine: Confinement, *, root: str, roots: Sequence[str], items: Sequence[Any],
    want: str, limit: int, left: int, zones: Sequence[str], value: str,
) -> None:  # fmt: skip
    """Values of artifacts: "text", "json", "graph", or whether they "match" a search; `left`: of all contents."""
    opened: List[Any] = []
    held = 0
    for item in items:
        opened.append(_open_item(root, roots, item, limit))
        held += len(opened[-1][1]) if type(opened[-1]) is tuple else 0
        if item.get("include") and item["include"]["coding"] is not None:
            item["include"]["coding"] = _text_coding(item["include"]["coding"])
        if held > READ_AHEAD:
            break  # the rest is asked for again
    known = _load_zones(zones)
    confine(memory=WORKER_MEMORY)
    for item, one in zip(items, opened):
        if type(one) is dict:
            answer(one)
            continue
        most = max(4096, min(limit, left))
        confine.renew()
        left -= _answer_item(answer, item, one, want, most, zones=known, value=value)


def _load_zones(names: Sequence[str]) -> Dict[str, Any]:
    """The time zones that exist among `names`; the others count as UTC."""
    zones: Dict[str, Any] = {}
    if names:
        import zoneinfo

        for name in names:
            try:
                zones[name] = zoneinfo.ZoneInfo(name)
            except (OSError, ValueError, LookupError):
                zones[name] = datetime.timezone.utc
    return zones


def _match_job(
    answer: _Answer, confine: Confinement, *, pattern: str, texts: Sequence[str], anywhere: bool
) -> None:
    """Which texts match a client's regular expression: one byte each."""
    import warnings

    confine(memory=WORKER_MEMORY)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError, ValueError, MemoryError) as error:
        answer({"error": "invalid pattern: %s" % (error or type(error).__name__)})
        return
    test = compiled.search if anywhere else compiled.match
    answer({}, bytes(test(text[:MAX_PATTERN_TEXT]) is not None for text in texts))


def _card_number(text: str) -> Optional[float]:
    value = float(text)
    return value if math.isfinite(value) else None


def _card_data_job(
    answer: _Answer, confine: Confinement, *, root: str, parts: Sequence[str]
) -> None:
    """The data of a card as strict JSON: NaN, Infinity and 1e999 are null; null while it is half written."""
    file = _open_below(root, parts)
    if file is None or os.fstat(file.fileno()).st_size > CARD_BYTES:
        answer({"large": file is not None})
        return
    raw = file.read(CARD_BYTES)
    confine()
    try:
        data = json.loads(raw, parse_constant=lambda name: None, parse_float=_card_number)
    except (ValueError, RecursionError):
        data = None
    answer({}, json.dumps(data if isinstance(data, dict) else None).encode())


# Logs. A task's lines are in <root>/<Flow>/<run>/<step>/<task>/<attempt>.<source>_<stream>.log with the
# sources runtime (what the scheduler read from the task; all there is in local mode) and task; each line
# starts with [MFLOG|0|<UTC time>Z|<source>|<id>] (metaflow/mflog/mflog.py). Before Metaflow 2.2 it was
# <attempt>.<stream>.log, plain.
#
# Order: by time, runtime before task at the same time, as mflog.merge_logs. It differs where that sorts by a
# line's random id or by its text: lines of equal time stay as written, and a line without a header stays
# behind the line before it, with no timestamp. Lines end at \n only: \r and the like are part of the line.

_LOG_HEAD = re.compile(rb"(?:\[!)?\[MFLOG\|0\|([^|\]\n]{1,40})Z\|[^|\]\n]{1,80}\|[^\]\n]{1,200}\]")


def _log_head(line: bytes) -> Tuple[Optional[int], int]:
    """(milliseconds since the epoch, where the message starts) of a line; (None, 0) without a header."""
    found = _LOG_HEAD.match(line)
    if found is None:
        return None, 0
    try:
        moment = datetime.datetime.fromisoformat(found.group(1).decode("ascii"))
        since = moment - datetime.datetime(1970, 1, 1)
        return since // datetime.timedelta(milliseconds=1), found.end()
    except (ValueError, TypeError):
        return None, 0


def _is_torn(head: bytes) -> bool:
    """Whether a last line without \\n is only the beginning of a header."""
    for mark in (b"[MFLOG|", b"[![MFLOG|"):
        if head.startswith(mark) or mark.startswith(head):
            return len(head) < LOG_HEADER and _log_head(head)[1] == 0
    return False


class _LogFile:
    """The lines of one file. starts: where each begins, and one past the last; cut: there are more."""

    def __init__(self, data: Any) -> None:
        size = len(data)
        self.data = data
        self.starts = array.array("Q", [0])
        most = min(size, LOG_INDEX_BYTES)
        ends = re.compile(rb"\n").finditer(self.data, 0, most)
        self.starts.extend(found.end() for found in itertools.islice(ends, LOG_INDEX_LINES))
        last = self.starts[-1]
        self.cut = last < size and (size > most or len(self.starts) > LOG_INDEX_LINES)
        if last < size and not self.cut and not _is_torn(self.data[last : last + LOG_HEADER]):
            self.starts.append(size + 1)  # a last line that has no \n yet

    def keys(self) -> List[bytes]:
        """The time of each line as text that sorts; of a line without a header that of the line before."""
        data, keys, last = self.data, [], b""
        for start in self.starts[:-1]:
            if data[start : start + 9] == b"[MFLOG|0|" and data[start + 28 : start + 29] == b".":
                last = data[start + 9 : start + 35]
            else:
                line = data[start : start + LOG_HEADER].partition(b"\n")[0]
                found = _LOG_HEAD.match(line)
                if found is not None and _log_head(line)[1]:
                    last = found.group(1).ljust(20, b".").ljust(26, b"0")
            keys.append(last)
        return keys


class _Log:
    """The lines of one stream of one attempt, of all its files, in order. `order`: (file, line) if not as written."""

    def __init__(self, opened: Sequence[Any]) -> None:
        self.files = [_LogFile(data) for data in opened]
        self.lines = sum(len(file.starts) - 1 for file in self.files)
        self.cut = any(file.cut for file in self.files)
        self.order: Optional[List[Tuple[int, int]]] = None
        keys = [key for file in self.files for key in file.keys()]
        if any(before > after for before, after in zip(keys, keys[1:])):
            places = [
                (i, n) for i, file in enumerate(self.files) for n in range(len(file.starts) - 1)
            ]
            self.order = [places[at] for at in sorted(range(len(keys)), key=keys.__getitem__)]

    def line(self, row: int) -> Tuple[Optional[int], Any, int, int]:
        """(milliseconds, data, start and end of the message in it)."""
        index, line = self.order[row] if self.order else self._place(row)
        file = self.files[index]
        start, end = file.starts[line], file.starts[line + 1] - 1
        when, skip = _log_head(file.data[start : min(start + LOG_HEADER, end)])
        return when, file.data, start + skip, end

    def _place(self, row: int) -> Tuple[int, int]:
        for index, file in enumerate(self.files):
            if row < len(file.starts) - 1:
                return index, row
            row -= len(file.starts) - 1
        raise IndexError(row)

    def row(self, row: int, limit: int) -> Dict[str, Any]:
        """One row as the UI has it; a long line is cut to `limit` bytes, and says so."""
        if row == self.lines:
            text = "... more lines than can be shown here: download the log to see them"
            return {"row": row, "timestamp": None, "line": text}
        when, data, start, end = self.line(row)
        text = data[start : min(end, start + limit)].decode("utf-8", "replace")
        if end - start > limit:
            text += " ... [%d more bytes: download the log to see them]" % (end - start - limit)
        return {"row": row, "timestamp": when, "line": text}

    def messages(self) -> Iterator[bytes]:
        """The messages with a newline between them, in pieces of at most 64 KiB."""
        for row in range(self.lines):
            _, data, start, end = self.line(row)
            yield b"\n" if row else b""
            for at in range(start, end, 65536):
                yield data[at : min(at + 65536, end)]
        for file in self.files:
            at = file.starts[-1]
            while file.cut and at < len(file.data):  # lines beyond the index, file by file
                end = file.data.find(b"\n", at)
                end = len(file.data) if end < 0 else end
                start = at + _log_head(file.data[at : min(at + LOG_HEADER, end)])[1]
                yield b"\n" if at or self.lines else b""
                for piece in range(start, end, 65536):
                    yield file.data[piece : min(piece + 65536, end)]
                at = end + 1


def _log_names(attempt: int, stream: str) -> List[str]:
    sources = ["%d.%s_%s.log" % (attempt, source, stream) for source in ("runtime", "task")]
    return [*sources, "%d.%s.log" % (attempt, stream)]


def _open_log(root: str, task: Sequence[str], attempt: int, stream: str) -> List[Any]:
    """The bytes of a log's files, mapped into memory; the old layout counts only when there is no other."""
    import mmap

    opened: List[Any] = []
    for name in _log_names(attempt, stream):
        file = _open_below(root, (*task, name))
        if file is not None and not (opened and name.count(".") == 2 and "_" not in name):
            with file:
                size = os.fstat(file.fileno()).st_size
                empty = b""
                opened.append(
                    mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) if size else empty
                )
    return opened


def _log_page_job(
    answer: _Answer,
    confine: Confinement,
    *,
    files: Sequence[Any],
    limit: int,
    page: int,
    reverse: bool,
) -> None:
    """Rows of a page. Pages are cut from the front; `reverse` counts them from the back, so that its page 1 is
    the short remainder, and turns their rows round (ui backend: get_log_file_action).
    """
    opened = _open_log(*files)
    confine(seconds=LOG_CPU)
    log = _Log(opened)
    total = log.lines + log.cut
    limit = min(limit or LOG_PAGE_ROWS, LOG_PAGE_ROWS)
    pages = max(-(-total // limit), 1)
    rows, left = [], LOG_PAGE_BYTES
    if 1 <= page <= pages:
        first = limit * (pages - page) if reverse else limit * (page - 1)
        for number in range(first, min(first + limit, total)):
            row = log.row(number, min(LOG_LINE_BYTES, max(left, 200)))
            left -= len(row["line"])
            rows.append(json.dumps(row))
    body = ", ".join(rows[::-1] if reverse else rows).encode()
    answer({"pages": pages, "total": total}, body)


def _log_text_job(answer: _Answer, confine: Confinement, *, files: Sequence[Any]) -> None:
    """The whole log, lines as they were printed, no newline after the last one."""
    opened = _open_log(*files)
    confine(seconds=DOWNLOAD_CPU)
    piece: List[bytes] = []
    size = 0
    for data in _Log(opened).messages():
        piece.append(data)
        size += len(data)
        if size >= 65536:
            answer({}, b"".join(piece))
            piece, size = [], 0
    answer({}, b"".join(piece))


_JOBS: Dict[str, Callable[..., None]] = {
    "artifacts": _artifacts_job,
    "match": _match_job,
    "card_data": _card_data_job,
    "log_page": _log_page_job,
    "log_text": _log_text_job,
}


# The child and its workers.

_FRAME = struct.Struct(">II")  # bytes of the head, bytes of the body; 0, 0: the job is done


def _run_worker(sock: socket.socket) -> None:
    """Reads one request from the daemon, answers it, and ends."""

    def exactly(size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            piece = sock.recv(min(size - len(data), MIB))
            if not piece:
                os._exit(0)
            data += piece
        return bytes(data)

    def answer(head: Dict[str, Any], body: bytes = b"") -> None:
        text = json.dumps(head).encode()
        sock.sendall(_FRAME.pack(len(text), len(body)) + text + body)

    name, args = json.loads(exactly(_FRAME.unpack(exactly(8))[0]))
    _JOBS[name](answer, Confinement(), **args)
    sock.sendall(_FRAME.pack(0, 0))


def _only_descriptors(*kept: int) -> None:
    """Closes all that was inherited: listening socket, connections, lock, log."""
    names = os.listdir("/dev/fd") if os.path.isdir("/dev/fd") else map(str, range(65536))
    for name in names:
        if int(name) > 2 and int(name) not in kept:
            with contextlib.suppress(OSError):
                os.close(int(name))


def _run_child(control: socket.socket) -> None:
    """Forks a worker for each socket that the daemon sends, until the daemon closes the control socket."""
    import gc
    import gzip  # noqa: F401  a confined worker could not import them any more
    import hashlib  # noqa: F401
    import mmap  # noqa: F401
    import pickle  # noqa: F401

    gc.disable()  # nothing of the daemon's may be finalized here: descriptors have other owners now
    signal.set_wakeup_fd(-1)
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)  # the daemon decides: it may still be answering
    _only_descriptors(control.fileno())
    _pickle_names()
    for coding in ("utf-32-le", "utf-32-be", "latin-1", "ascii", "raw-unicode-escape"):
        codecs.lookup(coding)
    woken, wake = socket.socketpair()
    wake.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    poll = select.poll()
    poll.register(control, select.POLLIN)
    poll.register(woken, select.POLLIN)
    workers: Dict[int, Tuple[int, socket.socket]] = {}  # by descriptor of the job's socket
    while True:
        for ready, _ in poll.poll():
            if ready == control.fileno():
                data, sockets, _, _ = socket.recv_fds(control, 1, 1)
                if not data:
                    for pid, _sock in workers.values():
                        os.kill(pid, signal.SIGKILL)
                    return
                for number in sockets:
                    sock = socket.socket(fileno=number)
                    pid = _fork_worker(
                        sock, [control, woken, wake, *(s for _, s in workers.values())]
                    )
                    workers[number] = pid, sock
                    poll.register(sock, 0)  # tells only that the daemon has closed its end
            elif ready == woken.fileno():
                woken.recv(4096)
            elif ready in workers:
                os.kill(workers[ready][0], signal.SIGKILL)
                poll.unregister(ready)
        for number, (pid, sock) in list(workers.items()):
            if os.waitpid(pid, os.WNOHANG)[0]:
                with contextlib.suppress(KeyError):
                    poll.unregister(sock)
                sock.close()
                del workers[number]


def _fork_worker(sock: socket.socket, others: Sequence[socket.socket]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for other in others:
            other.close()
        _run_worker(sock)
        status = 0
    except BaseException:
        pass  # the daemon sees the end of the socket, and names the item
    os._exit(status)


class _Request:
    """The daemon's end of one request."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._data = bytearray()

    async def send(self, name: str, args: Dict[str, Any]) -> None:
        """Says what is to be done."""
        import asyncio

        text = dumps([name, args])
        loop = asyncio.get_running_loop()
        with contextlib.suppress(ConnectionError):  # next() will tell
            await loop.sock_sendall(self._sock, _FRAME.pack(len(text), 0) + text)

    async def next(self) -> Optional[Tuple[Dict[str, Any], bytes]]:
        """The next answer, None after the last one. Raises EOFError when the worker has died."""
        head, body = _FRAME.unpack(await self._exactly(8))
        if not head:
            return None
        return json.loads(await self._exactly(head)), await self._exactly(body)

    async def _exactly(self, size: int) -> bytes:
        import asyncio

        loop = asyncio.get_running_loop()
        while len(self._data) < size:
            try:
                piece = await loop.sock_recv(self._sock, 256 * KIB)
            except ConnectionError:
                piece = b""
            if not piece:
                raise EOFError
            self._data += piece
        taken = bytes(self._data[:size])
        del self._data[:size]
        return taken


# What is done with the answers: parameters, graph, search.


def artifact_item(record: Mapping[str, Any]) -> Dict[str, Any]:
    """What a worker needs of an artifact's record. `location` is `:root:<path of a .metaflow>`."""

    def field(*names: str) -> str:
        found = [record.get(name) for name in names if record.get(name) is not None]
        return str(found[0]) if found else ""

    location = record.get("location")
    root = location[6:] if isinstance(location, str) and location.startswith(":root:") else location
    own = (
        field("flow_id"),
        field("run_id", "run_number"),
        field("step_name"),
        field("task_name", "task_id"),
    )
    coding = record.get("content_type")
    return {
        "task": own,
        "path": "/".join((*own, field("name"))),
        "flow": own[0],
        "sha": field("sha"),
        "content_type": coding if isinstance(coding, str) else None,
        "ds_type": record.get("ds_type"),
        "ds_root": root,
    }


# Cards. <card root>/<Flow>/runs/<run>/steps/<step>/tasks/<task>/cards/<type>[-<id>]-<hash>.html, and the data
# of cards that are refreshed while the task runs in .../runtime/<type>[-<id>]-<hash>.data.json
# (metaflow/plugins/cards/card_datastore.py, the same from 2.12.0 to 2.19; cards of before June 2022 have no
# steps/<step>). The card root is <.metaflow>/mf.cards, found from the directory in which the flow was
# started, or METAFLOW_CARD_LOCALROOT; it does not follow the datastore's root.


class _Card(NamedTuple):
    type: str
    id: Optional[str]
    hash: str
    root: str
    parts: Tuple[str, ...]


_CARD_NAME = re.compile(
    r"([^-/\\]{1,128})-(?:([^-/\\]{1,128})-)?([0-9A-Za-z]{1,64})\.(html|data\.json)"
)


def _attempt_of(record: Mapping[str, Any]) -> int:
    try:
        return int(record.get("attempt_id") or 0)
    except (TypeError, ValueError):
        return 0


def log_file_name(task: Sequence[str], attempt: int, stream: str) -> str:
    """The name under which a log is downloaded: stdout_Flow_run_step_task-attempt.txt."""
    where = "_".join(re.sub(r"[^\w.:-]", "_", part, flags=re.A) for part in task)
    return "%s_%s-%d.txt" % (stream, where, attempt)


class LogWindow(NamedTuple):
    """One page of a log. rows: JSON of {"row", "timestamp", "line"}, in pieces to be joined by commas; pages:
    at least 1; total: lines.
    """

    rows: List[bytes]
    pages: int
    total: int


# How many requests of a kind are worked on at once: hostile values of one client never hold up another's log.
LANES = {"values": 3, "search": 1, "patterns": 2, "logs": 4, "downloads": 8}


class Reader:
    """Reads what user code has written: plain data in, plain data out, never a foreign object.

    Artifact records need flow_id, run_number (or run_id), step_name, task_id (or task_name), name,
    attempt_id, sha, ds_type, location and content_type, as the store and `ui_artifact_row` give them. A task
    is (flow, run, step, task id). A request whose asyncio task is cancelled ends its worker.
    """

    def __init__(self, metaflow_dir: str, data_roots: Sequence[str] = ()) -> None:
        """`data_roots`: where included files are, besides <metaflow_dir>/data."""
        self.metaflow_dir = metaflow_dir
        self.data_roots = tuple(data_roots)
        self.card_roots: List[str] = []  # more places with cards than .metaflow/mf.cards
        self._control: Optional[socket.socket] = None
        self._child = 0
        self._jobs = 0
        self._idle: Optional[asyncio.TimerHandle] = None
        self._lanes: Dict[str, asyncio.Semaphore] = {}

    # -- the child

    def _start(self) -> socket.socket:
        self.close()
        ours, theirs = socket.socketpair()
        self._child = os.fork()
        if self._child == 0:
            try:
                _run_child(theirs)
            finally:
                os._exit(0)
        theirs.close()
        ours.setblocking(False)
        self._control = ours
        return ours

    def close(self) -> None:
        """Ends the child and all that it does."""
        if self._control is not None:
            self._control.close()
            self._control = None
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self._child, 0)  # it does nothing but wait, and ends at once

    def _hand_over(self, sock: socket.socket) -> None:
        """Gives one end of a socket pair to the child. Raises OSError when no child can be had."""
        if self._control is not None:
            try:
                socket.send_fds(self._control, [b"+"], [sock.fileno()])
                return
            except OSError:  # somebody has killed it
                pass
        socket.send_fds(self._start(), [b"+"], [sock.fileno()])

    @contextlib.asynccontextmanager
    async def _job(self, lane: str, name: str, **args: Any) -> AsyncIterator[_Request]:
        """One request to a worker of its own, which ends with the block, whatever it does."""
        import asyncio

        if lane not in self._lanes:
            self._lanes[lane] = asyncio.Semaphore(LANES[lane])
        self._jobs += 1
        if self._idle is not None:
            self._idle.cancel()
        try:
            async with self._lanes[lane]:
                ours, theirs = socket.socketpair()
                try:
                    ours.setblocking(False)
                    with theirs:
                        self._hand_over(theirs)
                    job = _Request(ours)
                    await job.send(name, args)
                    yield job
                finally:
                    ours.close()
        finally:
            self._jobs -= 1
            if not self._jobs:
                self._idle = asyncio.get_running_loop().call_later(READER_IDLE, self.close)

    # -- artifacts

    async def _artifacts(
        self,
        records: Iterable[Mapping[str, Any]],
        want: str,
        *,
        limit: int = ARTIFACT_BYTES,
        left: int = 1 << 62,
        value: str = "",
        lane: str = "values",
        seconds: float = READER_SECONDS,
    ) -> List[Tuple[Dict[str, Any], bytes]]:
        """(head, body) for each artifact: what `_answer_item` answers. What is not read in time says so."""
        import asyncio

        items = [artifact_item(record) for record in records]
        answers: List[Any] = [None] * len(items)
        roots = list(self.data_roots)
        own = os.path.join(self.metaflow_dir, "data")
        if _is_below(os.path.realpath(own), os.path.realpath(self.metaflow_dir)):
            roots.insert(0, own)
        args = {
            "root": self.metaflow_dir,
            "roots": roots,
            "want": want,
            "limit": limit,
            "value": value,
        }
        try:
            await asyncio.wait_for(self._fill(lane, args, items, answers, left), seconds)
        except asyncio.TimeoutError:
            pass
        except OSError as error:
            why = "the reading process cannot be started: %s" % error
            return [(_unreadable(item, why), b"") for item in items]
        late = "it takes too long to read"
        return [a or (_unreadable(item, late), b"") for a, item in zip(answers, items)]

    async def _fill(
        self, lane: str, args: Dict[str, Any], items: List[Any], answers: List[Any], left: int
    ) -> None:
        """Fills in the answers, with as many workers as it takes: one that dies takes one item with it."""
        todo: List[int] = list(range(len(items)))
        again: List[int] = []  # those that name a file or a time zone: asked for once more
        zones: List[str] = []
        while todo or again:
            if not todo:
                todo, again = again, []
            asked = [items[i] for i in todo[:READER_BATCH]]
            before = len(todo)
            async with self._job(
                lane, "artifacts", items=asked, left=left, zones=zones[:50], **args
            ) as job:
                for _ in asked:
                    try:
                        got = await job.next()
                    except EOFError:
                        why = "reading it takes more time or memory than it may"
                        place = todo.pop(0)
                        answers[place] = _unreadable(items[place], why), b""
                        break
                    if got is None:
                        break
                    place = todo.pop(0)
                    head, body = got
                    if ("include" in head or "zones" in head) and "asked" not in items[place]:
                        items[place] = {**items[place], **head, "asked": True}
                        zones += head.get("zones", ())
                        again.append(place)
                        continue
                    left -= len(body)
                    answers[place] = got
            if len(todo) == before:
                raise OSError("it answers nothing")

    async def contents(self, records: Iterable[Mapping[str, Any]]) -> List[Dict[str, Any]]:
        """For each artifact {"content": text} or {"postprocess_error": {"id", "detail", "traceback"}}."""
        return [
            {"postprocess_error": head["error"]}
            if "error" in head
            else {"content": body.decode("utf-8", "surrogatepass")}
            for head, body in await self._artifacts(records, "text", left=ARTIFACT_PAGE_BYTES)
        ]

    async def values(self, records: Iterable[Mapping[str, Any]]) -> List[Any]:
        """The value of each artifact as JSON has it (tuples are lists); None for what cannot be read."""
        answers = await self._artifacts(records, "json")
        return [None if "error" in head else json.loads(body) for head, body in answers]

    async def parameters(self, records: Iterable[Mapping[str, Any]]) -> Dict[str, Dict[str, Any]]:
        """{name: {"value": JSON value}} by name, from the records of the `_parameters` task (any attempts).

        All its artifacts count but `_…`, `name` and `script_name` (ui backend: get_parameters_action). What
        cannot be read has the reason as its value, and never null: the UI crashes on a null entry.
        """
        newest: Dict[str, Mapping[str, Any]] = {}
        for record in records:
            name = record.get("name")
            if not isinstance(name, str) or name.startswith("_") or name in ("name", "script_name"):
                continue
            if name not in newest or _attempt_of(record) >= _attempt_of(newest[name]):
                newest[name] = record
        names = sorted(newest)
        wanted = [newest[name] for name in names]
        answers = await self._artifacts(wanted, "json", limit=PARAMETER_BYTES)
        parameters = {}
        for name, (head, body) in zip(names, answers):
            shown = head["error"]["detail"] if "error" in head else json.loads(body)
            if "error" in head and head["error"]["id"] == TOO_LARGE_ID:
                shown = "Artifact too large: %s bytes" % (head["size"] or "more")
            parameters[name] = {"value": shown}
        return parameters

    async def graph(
        self, records: Iterable[Mapping[str, Any]], steps: Sequence[Tuple[str, int]] = ()
    ) -> Optional[Dict[str, Any]]:
        """The graph from `_graph_info` among the records, else from `steps`: (name, foreach depth), as they began.

        Metaflow saves it with `_parameters` when the run starts and hands it on to every task
        (metaflow/task.py). None when there is nothing to draw. Raises Problem(501) for a datastore that is
        elsewhere.
        """
        found = [record for record in records if record.get("name") == "_graph_info"]
        found.sort(
            key=lambda r: (r.get("step_name") == "_parameters", _attempt_of(r)), reverse=True
        )
        for head, body in await self._artifacts(found[:1], "graph", limit=GRAPH_BYTES):
            if "error" in head and head["error"]["id"] == NOT_LOCAL_ID:
                raise Problem(501, head["error"]["detail"], id=NOT_LOCAL_ID)
            graph: Optional[Dict[str, Any]] = json.loads(body or b"null")
            if graph is not None:
                return graph
        shown = [(name, max(0, depth)) for name, depth in steps if not name.startswith("_")]
        return _graph_of_steps(shown) if shown else None

    async def search(
        self, records: Sequence[Mapping[str, Any]], value: Optional[str]
    ) -> List[Optional[Dict[str, Any]]]:
        """For each artifact, already chosen by its name, its match with a search value; None for no match.

        Without a value every artifact matches. Compared in lower case with str(value), as `parse_search` says.
        One that cannot be read is a match with "searchable": False and "error". A content that a run hands
        on from task to task is read once.
        """
        rows = [_search_row(record) for record in records]
        if value is None:
            return [{**row, "searchable": True} for row in rows]
        keys = [(r.get("flow_id"), r.get("sha"), r.get("content_type")) for r in records]
        distinct = dict(zip(keys, records))
        answers = await self._artifacts(
            distinct.values(), "match", value=value, lane="search", seconds=SEARCH_SECONDS
        )
        known = dict(zip(distinct, answers))
        found: List[Optional[Dict[str, Any]]] = []
        for row, key in zip(rows, keys):
            head = known[key][0]
            if "error" in head:
                found.append({**row, "searchable": False, "error": head["error"]})
            else:
                found.append({**row, "searchable": True, "error": None} if head["hit"] else None)
        return found

    # -- patterns

    async def match(
        self, pattern: str, texts: Sequence[str], *, anywhere: bool = False
    ) -> List[bool]:
        """Whether each text matches a client's regular expression, from its beginning or `anywhere`.

        Raises Problem(400) for a pattern that is invalid, too long, or takes too long.
        """
        import asyncio

        if len(pattern) > MAX_PATTERN:
            raise Problem(
                400, f"a pattern may have at most {MAX_PATTERN} characters", id="invalid-filter"
            )
        if re.escape(pattern) == pattern:
            return [pattern in text if anywhere else text.startswith(pattern) for text in texts]
        try:
            args = {"pattern": pattern, "texts": list(texts), "anywhere": anywhere}
            return list(map(bool, (await self._one("patterns", "match", PATTERN_TIMEOUT, args))[1]))
        except (EOFError, asyncio.TimeoutError):
            raise Problem(
                400, f"the pattern {pattern!r:.100} takes too long", id="invalid-filter"
            ) from None

    async def _one(
        self, lane: str, name: str, seconds: float, args: Dict[str, Any]
    ) -> Tuple[Dict[str, Any], bytes]:
        """The only answer of a job. Raises EOFError, asyncio.TimeoutError, Problem(400) for what it refuses."""
        import asyncio

        async def ask() -> Any:
            async with self._job(lane, name, **args) as job:
                return await job.next()

        got = await asyncio.wait_for(ask(), seconds)
        if got is None:
            raise EOFError
        if "error" in got[0]:
            raise Problem(400, got[0]["error"], id="invalid-filter")
        return got  # type: ignore[no-any-return]

    # -- logs

    async def log_page(
        self,
        task: Sequence[str],
        attempt: int,
        stream: str,
        *,
        limit: int = 1000,
        page: int = 1,
        reverse: bool = False,
        ds_type: Any = None,
        ds_root: Any = None,
        expected: bool = False,
    ) -> LogWindow:
        """A page of "stdout" or "stderr"; `limit` 0 = all. `reverse` counts pages and rows from the end.

        expected: the task has just ended, and Metaflow writes its log now: it is waited for. Raises
        Problem(501) when there is no file and the datastore is elsewhere.
        """
        import asyncio

        files = self.metaflow_dir, list(task), attempt, stream
        args = {"files": files, "limit": limit, "page": page, "reverse": reverse}
        if not await self._wait_for_log(task, attempt, stream, expected):
            self._must_be_here(ds_type, ds_root)
            return LogWindow([], 1, 0)
        try:
            head, body = await self._one("logs", "log_page", LOG_SECONDS, args)
        except (EOFError, asyncio.TimeoutError):
            why = "the log takes too long to read: download it"
            raise Problem(500, why, id="log-error") from None
        return LogWindow([body] if body else [], head["pages"], head["total"])

    async def _wait_for_log(
        self, task: Sequence[str], attempt: int, stream: str, expected: bool
    ) -> bool:
        """Whether there is a log; an expected one is waited for."""
        import asyncio

        place = os.path.join(self.metaflow_dir, *task)
        paths = [os.path.join(place, name) for name in _log_names(attempt, stream)]
        until = time.monotonic() + (LOG_PATIENCE if expected else 0.0)
        while not any(map(os.path.exists, paths)):
            if time.monotonic() >= until:
                return False
            await asyncio.sleep(0.1)
        return True

    def _must_be_here(self, ds_type: Any, ds_root: Any) -> None:
        # 501, because the UI shows an error's text for every status but 403 and 404.
        if not is_here(self.metaflow_dir, ds_type, ds_root):
            raise Problem(501, not_local_text(ds_type, ds_root), id=NOT_LOCAL_ID)

    async def log_download(
        self,
        task: Sequence[str],
        attempt: int,
        stream: str,
        *,
        ds_type: Any = None,
        ds_root: Any = None,
        expected: bool = False,
    ) -> AsyncIterator[bytes]:
        """The whole log in pieces. Waits and raises, before the first one, as `log_page` does."""
        files = self.metaflow_dir, list(task), attempt, stream
        if not await self._wait_for_log(task, attempt, stream, expected):
            self._must_be_here(ds_type, ds_root)

        async def read() -> AsyncIterator[bytes]:
            async with self._job("downloads", "log_text", files=files) as job:
                while True:
                    got = await job.next()
                    if got is None:
                        return
                    if got[1]:
                        yield got[1]

        return read()

    # -- cards

    def _card_places(self, kind: str, task: Sequence[str]) -> Iterator[Tuple[str, Tuple[str, ...]]]:
        """(root, parts below it) of the directories that may have a task's "cards" or "runtime" data."""
        # With METAFLOW_CARD_LOCALROOT set, Metaflow 2.19 writes cards into the datastore itself.
        named = os.environ.get("METAFLOW_CARD_LOCALROOT")
        flow, run, step, task_id = task
        for root, top in (
            (self.metaflow_dir, ("mf.cards",)),  # which may be no symlink to the outside
            (self.metaflow_dir, ()),
            *((place, ()) for place in (*([named] if named else []), *self.card_roots)),
        ):
            yield root, (*top, flow, "runs", run, "steps", step, "tasks", task_id, kind)
            yield root, (*top, flow, "runs", run, "tasks", task_id, kind)

    def _find_cards(self, task: Sequence[str], kind: str) -> Iterator[_Card]:
        for root, parts in self._card_places(kind, task):
            for name in _list_below(root, parts):
                found = _CARD_NAME.fullmatch(name)
                if found and (found.group(4) == "html") == (kind == "cards"):
                    yield _Card(
                        found.group(1), found.group(2), found.group(3), root, (*parts, name)
                    )

    async def cards(self, task: Sequence[str]) -> List[Dict[str, Any]]:
        """[{"id": text or None, "hash", "type"}], those without an id first, then by type and id.

        A card of which nothing is written yet is left out: the UI asks again.
        """
        cards: Dict[str, _Card] = {}
        for card in itertools.islice(self._find_cards(task, "cards"), CARD_LIMIT):
            file = None if card.hash in cards else _open_below(card.root, card.parts)
            if file is not None:
                with file:
                    if os.fstat(file.fileno()).st_size:
                        cards[card.hash] = card
        ordered = sorted(
            cards.values(), key=lambda c: (c.id is not None, c.type, c.id or "", c.hash)
        )
        return [{"id": card.id, "hash": card.hash, "type": card.type} for card in ordered]

    async def card(self, task: Sequence[str], hash: str) -> Optional[AsyncIterator[bytes]]:
        """The HTML of a card in pieces, read as they are taken; None when there is none (yet)."""
        for card in self._find_cards(task, "cards"):
            file = _open_below(card.root, card.parts) if card.hash == hash else None
            if file is not None:
                if os.fstat(file.fileno()).st_size:
                    return _pieces_of(file)
                file.close()
        return None

    async def card_data(self, task: Sequence[str], hash: str) -> Optional[bytes]:
        """{"data", "id", "type"} of a card that is refreshed while its task runs, as JSON; None without one (yet)."""
        import asyncio

        for card in self._find_cards(task, "runtime"):
            if card.hash == hash:
                args = {"root": card.root, "parts": card.parts}
                try:
                    head, body = await self._one("values", "card_data", READER_SECONDS, args)
                except (EOFError, asyncio.TimeoutError):
                    head, body = {}, b"null"
                if head.get("large"):
                    raise Problem(422, "The data of the card is too large.", id="card-too-large")
                if body:
                    about = dumps({"id": card.id, "type": card.type})
                    return b'{"data": ' + body + b", " + about[1:]
        return None


async def _pieces_of(file: IO[bytes]) -> AsyncIterator[bytes]:
    with file:
        while True:
            piece = file.read(256 * KIB)
            if not piece:
                return
            yield piece


# ---- 8. HTTP: bytes in, request or error out ----

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"
Headers = tuple[tuple[str, str], ...]
JSON_TYPE = "application/json"
TEXT_TYPE = "text/plain; charset=utf-8"

_HTTP_REASONS = {
    **TITLES, 101: "Switching Protocols", 200: "OK", 204: "No Content", 206: "Partial Content",
    301: "Moved Permanently", 302: "Found", 303: "See Other", 304: "Not Modified", 307: "Temporary Redirect",
}  # fmt: skip
_HTTP_METHODS = frozenset("GET HEAD POST PUT PATCH DELETE OPTIONS TRACE CONNECT".split())
# Fields that mean one thing: a second one is how two readers of a message come to differ.
_HTTP_SINGLETONS = frozenset(
    """host content-length content-type content-encoding content-location transfer-encoding expect origin referer
    user-agent authorization proxy-authorization cookie from date range if-range if-modified-since
    if-unmodified-since max-forwards upgrade x-api-key x-mflocal-lease sec-websocket-key sec-websocket-version
    sec-fetch-site sec-fetch-mode sec-fetch-dest sec-fetch-user access-control-request-method""".split()
)

_TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_HTTP_TOKEN = re.compile(_TOKEN)
_HTTP_VERSION = re.compile(r"HTTP/[0-9]\.[0-9]")
_HTTP_TARGET = re.compile(r"/[!\"$-~]*")  # visible ASCII without "#"
_HTTP_ABSOLUTE = re.compile(r"[Hh][Tt][Tt][Pp]://([!\"$-.0->@-~]+)([/?][!\"$-~]*)?")
_HTTP_LENGTH = re.compile(r"[0-9]{1,19}")
_HTTP_CODINGS = re.compile(rf"{_TOKEN}(?:[ \t]*,[ \t]*{_TOKEN})*")
_HTTP_AUTHORITY = re.compile(
    r"(?:\[([0-9A-Fa-f:.]{2,45})\]|([0-9A-Za-z._-]{1,255}))(?::([0-9]{1,5}))?"
)
_HTTP_RANGE = re.compile(r"\s*bytes\s*=\s*([0-9]*)-([0-9]*)\s*")
_HTTP_BAD_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
_HTTP_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
_HTTP_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_HTTP_TEXT = bytes(c for c in range(256) if c == 9 or (c >= 32 and c != 127))  # no control
_BYTE_TOKEN = _TOKEN.encode()
_HTTP_CHUNK_LINE = re.compile(
    rb"([0-9A-Fa-f]{1,16})((?:[ \t]*;[ \t]*" + _BYTE_TOKEN + rb"(?:[ \t]*=[ \t]*(?:" + _BYTE_TOKEN
    + rb'|"(?:[\t \x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t \x21-\x7e\x80-\xff])*"))?)*)'
)  # fmt: skip
_HTTP_CHUNK_BEGUN = re.compile(rb"(?:[0-9A-Fa-f]{1,16}(?:[ \t;][\t\x20-\x7e\x80-\xff]*)?\r?)?")


@lru_cache(maxsize=256)
def split_host(value: str) -> tuple[str, int | None]:
    """Splits a Host value or the authority of a URL: "[::1]:80" -> ("::1", 80), "Name" -> ("name", None).

    The host comes lower-case, without brackets, an IPv6 address in its shortest form. Anything else than
    name|IPv4|[IPv6] with an optional port is Problem(400); no other exception is raised whatever the value.
    """
    match = _HTTP_AUTHORITY.fullmatch(value)
    if match is None:
        raise Problem(400, "the Host is malformed")
    literal, name, digits = match.groups()
    port = None if digits is None else int(digits)
    if port is not None and port > 65535:
        raise Problem(400, "the port in Host is out of range")
    if literal is None:
        return name.lower(), port
    try:
        return socket.inet_ntop(socket.AF_INET6, socket.inet_pton(socket.AF_INET6, literal)), port
    except OSError:
        raise Problem(400, "the address in Host is malformed") from None


def _host_and_port(authority: str) -> tuple[str, int]:
    host, port = split_host(authority)
    return host, 80 if port is None else port


def percent_decode(text: str, *, plus: bool = False) -> str:
    """Decodes a part of a URL once and strictly; with plus=True (query strings) "+" is a space.

    Problem(400) for a "%" without two hexadecimal digits, for %00 and for what is not UTF-8.
    """
    if plus and "+" in text:
        text = text.replace("+", " ")
    if "%" not in text:
        return text
    from urllib.parse import unquote

    if _HTTP_BAD_PERCENT.search(text) is not None:
        raise Problem(400, "the URL has a % that is not followed by two hexadecimal digits")
    try:
        text.encode("ascii")
        decoded = unquote(text, errors="strict")
    except UnicodeError:
        raise Problem(400, "the URL is not UTF-8") from None
    if "\0" in decoded:
        raise Problem(400, "the URL contains %00")
    return decoded


class Request:
    """One request.

    path and query: as sent, undecoded; authority: the Host, or that of an absolute target, "" if an HTTP/1.0
    client named none; headers: lower-case name -> value, repeated fields joined with ", "; params: path
    parameters, decoded, set by the router; connection: set by the server.
    """

    def __init__(
        self,
        method: str,
        path: str = "/",
        query: str = "",
        headers: dict[str, str] | None = None,
        body: bytes = b"",
        *,
        authority: str = "",
        http10: bool = False,
        keep_alive: bool = True,
    ) -> None:
        self.method = method
        self.path = path
        self.query = query
        self.authority = authority
        self.headers: dict[str, str] = {} if headers is None else headers
        self.body = body
        self.http10 = http10
        self.keep_alive = keep_alive
        self.connection: Any = None
        self.params: dict[str, str] = {}
        self._args: list[tuple[str, str]] | None = None

    def json(self) -> Any:
        """The body as JSON whatever Content-Type says (Metaflow's heartbeats have none); Problem(400)."""
        return loads(self.body)

    async def rows(self) -> Any:
        """json() where a list of rows is expected: a long one is decoded while others have their turns."""
        if len(self.body) <= SMALL_BODY:
            return self.json()
        pace, found = Pacer(), []
        try:
            for row in list_elements(self.body):
                found.append(row)
                await pace()
        except (ValueError, RecursionError):
            return self.json()  # no list, or no JSON: that says what is wrong
        return found

    def args(self) -> list[tuple[str, str]]:
        """The decoded (name, value) pairs of the query in their order, `a` being ("a", ""); Problem(400)."""
        if self._args is None:
            pairs = [part.partition("=") for part in self.query.split("&") if part]
            self._args = [
                (percent_decode(name, plus=True), percent_decode(value, plus=True))
                for name, _, value in pairs
            ]
        return self._args

    def arg(self, name: str, default: str | None = None) -> str | None:
        """The last value of a query parameter."""
        return dict(self.args()).get(name, default)


class RequestParser:
    """Bytes in, requests out, for one connection; no I/O.

    feed() what was read, then call next(): a request, or None when more bytes are needed. Call it again
    only when that request has been answered; read little meanwhile (`buffered` says how much waits). The
    first bad byte makes next() raise Problem with close=True; nothing behind it is looked at: from then on,
    as after a request with `Connection: close`, next() returns None and feed() does nothing (`done`).

    How it works: each state has one reader (see _HTTP_READERS), which takes from the buffer what it can use
    and says whether it has got anywhere. Lines are looked at one after the other, and caps and characters as
    bytes arrive, so that what comes out does not depend on how the bytes were cut into pieces.
    """

    def __init__(self) -> None:
        # True when the client waits for CONTINUE before it sends a body; set it to False once that is sent.
        self.wants_continue = False
        # The request whose head has begun and whose body has not ended: it can be refused before that is read.
        self.pending: Request | None = None
        self.cut_off = False  # an error has ended the parsing: more may still be coming
        self._whole: Request | None = None
        self._buf = bytearray()
        self._state = "idle"
        self._eof = False
        self._skipped = False  # the one empty line that is forgiven before a request
        self._size = 0  # bytes of the finished lines of this head, or of these trailers
        self._fields = 0  # their number
        self._need = 0  # bytes of the body, or of the chunk, still to come
        self._body = bytearray()
        self._chunks = 0
        self._extensions = 0  # bytes

    @property
    def phase(self) -> str:
        """What is waited for: "idle" (the next request), "head", "body"; or "done"."""
        if self._state == "idle" and self._buf:
            return "head"
        return self._state if self._state in ("idle", "head", "done") else "body"

    @property
    def in_message(self) -> bool:
        """True when a request has begun to arrive and is not complete."""
        return self.phase in ("head", "body")

    @property
    def done(self) -> bool:
        """True when nothing more will be parsed on this connection."""
        return self._state == "done"

    @property
    def buffered(self) -> int:
        """Bytes received and not yet used."""
        return len(self._buf)

    @property
    def held(self) -> int:
        """Bytes in memory of what is not complete."""
        return len(self._buf) + len(self._body)

    def feed(self, data: bytes) -> None:
        """Bytes as they came; next() takes requests from them."""
        if self._state != "done":
            self.wants_continue = False
            self._buf += data

    def eof(self) -> None:
        """No more bytes will come: next() still returns complete requests, then raises if one was cut off."""
        self._eof = True

    def rest(self) -> bytes:
        """Ends the parsing (another protocol takes over); returns the bytes behind the last request."""
        data = bytes(self._buf)
        self._buf.clear()
        self._body = bytearray()
        self._state = "done"
        return data

    def next(self) -> Request | None:
        """The next complete request, or None; Problem (close=True) at the first bad byte."""
        try:
            while self._whole is None and _HTTP_READERS[self._state](self):
                pass
            request, self._whole = self._whole, None
            if request is None and self._eof and self.in_message:
                raise Problem(400, "the connection was closed in the middle of a request")
            return request
        except Problem as problem:
            problem.close = True
            self.cut_off = True
            self.rest()
            self.pending = None
            self.wants_continue = False
            raise

    def _read_start(self) -> bool:
        """One empty line is forgiven, what cannot be HTTP (TLS, say) fails with its first byte."""
        buf = self._buf
        if not self._skipped and buf.startswith(b"\r\n"):
            del buf[:2]
            self._skipped = True
        if not buf or (buf == b"\r" and not self._skipped):
            return False
        if not 32 < buf[0] < 127:
            raise Problem(400, "this is not HTTP")
        self._state = "head"
        self._size = self._fields = 0
        return True

    def _line(self) -> str | None:
        """The next line of a head or of trailers; Problem as soon as one is too long or has a control character."""
        buf = self._buf
        end = buf.find(b"\r\n", 0, MAX_LINE + 2)
        text = bytes(buf[: MAX_LINE + 2] if end < 0 else buf[:end])
        room = max(min(MAX_LINE, MAX_HEADER_BYTES - self._size), 0)
        bad = _HTTP_CONTROL.search(text, 0, room + 1)
        # A CR at the end of what has come may be half of a line's end.
        if bad is not None and (bad[0] != b"\r" or end >= 0 or bad.end() < len(text)):
            raise Problem(400, "a control character, bare CR or bare LF in the head of the request")
        if len(text) > room and text[room] != 13:
            if self._state == "head" and self.pending is None:
                raise Problem(414, f"the request line is longer than {MAX_LINE} bytes")
            raise Problem(
                431, f"a header line of over {MAX_LINE} bytes, or over {MAX_HEADER_BYTES} in all"
            )
        if end < 0:
            return None
        del buf[: end + 2]
        self._size += end + 2
        return text.decode("latin-1")

    def _lines(self) -> Iterator[str]:
        """The lines that have come of a head or of trailers; the empty one behind them is the last."""
        buf = self._buf
        end = buf.find(b"\r\n\r\n", 0, MAX_LINE)
        if end > 0 and not self._size and not buf.startswith(b"\r\n"):
            block = bytes(buf[: end + 2])
            # All of it has come and is clean, as nearly always: one look instead of one at each line.
            if len(block.translate(None, _HTTP_TEXT)) == 2 * block.count(b"\r\n"):
                del buf[: end + 4]
                yield from block.decode("latin-1").split("\r\n")
                return
        line = self._line()
        while line is not None:
            yield line
            line = self._line() if line else None

    def _read_head(self) -> bool:
        for line in self._lines():
            if self.pending is None:
                self.pending = _request_line(line)
            elif line:
                self._add_field(self.pending.headers, line)
            else:
                self._frame(self.pending)
                return True
        return False

    def _add_field(self, headers: dict[str, str], line: str) -> None:
        self._fields += 1
        if self._fields > MAX_HEADERS:
            raise Problem(431, f"more than {MAX_HEADERS} header fields")
        field, colon, value = line.partition(":")
        if not colon and line[:1] not in (" ", "\t"):
            raise Problem(400, "a header line without a colon")
        name, value = _field_name(field), value.strip(" \t")
        if name in headers:
            if name in _HTTP_SINGLETONS:
                raise Problem(400, f"more than one {name} field")
            value = f"{headers[name]}, {value}"
        headers[name] = value

    def _frame(self, request: Request) -> None:
        """Checks what the header fields say together and settles how the body is framed."""
        headers = request.headers
        host = headers.get("host")
        if host is None:
            if not request.http10:
                raise Problem(400, "an HTTP/1.1 request needs a Host")
        elif not request.authority:
            split_host(host)
            request.authority = host
        elif _host_and_port(host) != _host_and_port(request.authority):
            raise Problem(400, "Host and the target of the request differ")
        tokens = [token.strip(" \t") for token in headers.get("connection", "").lower().split(",")]
        request.keep_alive = "close" not in tokens and (
            not request.http10 or "keep-alive" in tokens
        )
        self._state, self._need = "body", 0
        length, coding = headers.get("content-length"), headers.get("transfer-encoding")
        if coding is not None:
            _check_coding(coding, length, request.http10)
            self._state, self._chunks, self._extensions = "size", 0, 0
        elif length is not None:
            if _HTTP_LENGTH.fullmatch(length) is None:
                raise Problem(400, "Content-Length is not a number")
            self._need = int(length)
            if self._need > MAX_BODY:
                raise _too_large()
        expect = headers.get("expect")
        if expect is not None and not request.http10:
            if expect.lower() != "100-continue":
                raise Problem(417, "only 100-continue can be expected")
            self.wants_continue = not self._buf and (coding is not None or self._need > 0)

    def _read_body(self) -> bool:
        if len(self._buf) < self._need:
            return False
        with memoryview(self._buf) as view:
            body = bytes(view[: self._need])
        del self._buf[: self._need]
        return self._complete(body)

    def _read_size(self) -> bool:
        buf = self._buf
        end = buf.find(b"\r\n", 0, MAX_CHUNK_LINE + 2)
        if end < 0:
            begun = bytes(buf[: MAX_CHUNK_LINE + 2])
            too_long = len(begun.rstrip(b"\r")) > MAX_CHUNK_LINE
            if too_long or not _HTTP_CHUNK_BEGUN.fullmatch(begun):
                raise Problem(400, "a chunk's size line is malformed")
            return False
        match = _HTTP_CHUNK_LINE.fullmatch(bytes(buf[:end]))
        if match is None:
            raise Problem(400, "a chunk's size line is malformed")
        del buf[: end + 2]
        self._need = int(match[1], 16)
        self._chunks += 1
        self._extensions += len(match[2])
        if self._extensions > MAX_CHUNK_EXTENSIONS:
            raise Problem(400, "too many chunk extensions")
        if self._need > MAX_BODY - len(self._body):
            raise _too_large()
        if self._chunks > MAX_CHUNKS:
            raise Problem(413, f"the body comes in more than {MAX_CHUNKS} chunks")
        self._state = "data" if self._need else "trailers"
        self._size = self._fields = 0
        return True

    def _read_data(self) -> bool:
        data = self._buf[: self._need]
        del self._buf[: len(data)]
        self._body += data
        self._need -= len(data)
        if self._need:
            return False
        self._state = "data end"
        return True

    def _read_data_end(self) -> bool:
        if not b"\r\n".startswith(self._buf[:2]):
            raise Problem(400, "a chunk does not end where its size says")
        if len(self._buf) < 2:
            return False
        del self._buf[:2]
        self._state = "size"
        return True

    def _read_trailers(self) -> bool:
        """They must be well formed, and mean nothing here."""
        for line in self._lines():
            if not line:
                body, self._body = bytes(self._body), bytearray()
                return self._complete(body)
            self._add_field({}, line)
        return False

    def _complete(self, body: bytes) -> bool:
        request = self._whole = self.pending
        assert request is not None
        request.body = body
        self.pending = None
        self._skipped = False
        self._state = "idle"
        if not request.keep_alive:
            self.rest()
        return True


_HTTP_READERS: dict[str, Callable[[RequestParser], bool]] = {
    "idle": RequestParser._read_start,
    "head": RequestParser._read_head,
    "body": RequestParser._read_body,
    "size": RequestParser._read_size,
    "data": RequestParser._read_data,
    "data end": RequestParser._read_data_end,
    "trailers": RequestParser._read_trailers,
    "done": lambda parser: False,
}


def _request_line(line: str) -> Request:
    parts = line.split(" ")
    if len(parts) != 3:
        raise Problem(400, "the request line is not: method, target and version, one space between")
    method, target, version = parts
    if version not in ("HTTP/1.1", "HTTP/1.0"):
        if _HTTP_VERSION.fullmatch(version) is None:
            raise Problem(400, "the HTTP version is malformed")
        raise Problem(505, "only HTTP/1.0 and HTTP/1.1 are spoken here")
    if method not in _HTTP_METHODS:
        if _HTTP_TOKEN.fullmatch(method) is None or method != method.upper():
            raise Problem(400, "the method is malformed (methods are upper-case)")
        raise Problem(501, "the method is not implemented")
    if method == "CONNECT":
        allow = {"Allow": "GET, HEAD, POST, PATCH, OPTIONS"}
        raise Problem(405, "this is no proxy", headers=allow)
    authority = ""
    if _HTTP_TARGET.fullmatch(target) is None:
        absolute = _HTTP_ABSOLUTE.fullmatch(target)
        if absolute is not None:
            authority, target = absolute[1], absolute[2] or "/"
            split_host(authority)
            target = target if target[0] == "/" else "/" + target
        elif target != "*" or method != "OPTIONS":
            raise Problem(400, "the request target is malformed")
    path, _, query = target.partition("?")
    return Request(method, path, query, authority=authority, http10=version == "HTTP/1.0")


def _too_large() -> Problem:
    return Problem(413, f"the body is larger than {MAX_BODY} bytes")


def _check_coding(coding: str, length: str | None, http10: bool) -> None:
    if length is not None:
        raise Problem(400, "both Content-Length and Transfer-Encoding")
    if http10:
        raise Problem(400, "Transfer-Encoding in an HTTP/1.0 request")
    if coding.lower() != "chunked":
        if _HTTP_CODINGS.fullmatch(coding) is None or coding.lower().count("chunked") > 1:
            raise Problem(400, "Transfer-Encoding is malformed")
        raise Problem(501, "the only transfer coding is chunked")


@lru_cache(maxsize=512)
def _field_name(field: str) -> str:
    if field[:1] in (" ", "\t"):
        raise Problem(400, "a header field is folded over several lines")
    if _HTTP_TOKEN.fullmatch(field) is None:
        raise Problem(400, "the name of a header field is malformed")
    return field.lower()


# Framing belongs to encode(): a handler that could set these could break the connection for the next request.
_HTTP_FRAMING = frozenset(("content-length", "transfer-encoding", "connection", "content-type"))


@lru_cache(maxsize=256)
def _header_lines(headers: tuple[tuple[str, str], ...]) -> bytes:
    """The one place where header lines are made: ValueError for what could end a line or start another."""
    for name, value in headers:
        if _HTTP_TOKEN.fullmatch(name) is None or _HTTP_VALUE.fullmatch(value) is None:
            raise ValueError(f"not fit for a response header: {name!r}: {value!r}")
    return "".join([f"{name}: {value}\r\n" for name, value in headers]).encode("latin-1")


@lru_cache(maxsize=256)
def _head_start(status: int, content_type: str) -> bytes:
    """The status line and the fields that every answer of this kind has."""
    if not 100 <= status <= 599:
        raise ValueError(f"no HTTP status: {status!r}")
    headers = [("METADATA_SERVICE_VERSION", SERVICE_VERSION), ("X-Content-Type-Options", "nosniff")]
    if content_type:
        headers.append(("Content-Type", content_type))
    line = f"HTTP/1.1 {status} {_HTTP_REASONS.get(status, 'Unknown')}\r\n"
    return line.encode("ascii") + _header_lines(tuple(headers))


class Response:
    """One answer: status, content_type, and body or stream.

    stream: an async generator of pieces of at most SEND_SIZE bytes, sent as fast as the client reads, closed
    when it leaves; it goes in chunks unless `length` says how many bytes it has. close: the connection ends.
    headers is a list of (name, value); Content-Length, Transfer-Encoding and Connection are encode()'s own.
    """

    def __init__(
        self,
        status: int = 200,
        body: bytes = b"",
        content_type: str = "",
        headers: Iterable[tuple[str, str]] = (),
        stream: AsyncIterator[bytes] | None = None,
        length: int | None = None,
    ) -> None:
        self.status = status
        self.body = body
        self.content_type = content_type
        self.headers: list[tuple[str, str]] = list(headers)
        self.stream = stream
        self.length = length
        self.close = False

    def keeps_alive(self, request: Request | None) -> bool:
        """Whether another request may follow on the connection; `request` None: what came was unreadable."""
        if request is None or self.close or not request.keep_alive:
            return False
        return self.stream is None or self.length is not None or not request.http10

    @property
    def is_short(self) -> bool:
        """Whether encode() gives all of it."""
        return self.stream is None and len(self.body) <= SEND_SIZE

    @property
    def cost(self) -> int:
        """Bytes of memory that it holds while a slow client takes it; 0 if it is short."""
        return 0 if self.is_short else STREAM_COST if self.stream is not None else len(self.body)

    def encode(
        self, request: Request | None = None, *, close: bool = False, extra: Headers = ()
    ) -> bytes:
        """The answer to `request` as bytes; only the head if it is not short, and then pieces() follow.

        To HEAD no body goes. request=None answers what could not be parsed, and closes. `extra`: headers that
        many answers share (cors_headers). ValueError if a header would break the framing (answer 500 then).
        """
        status = self.status
        bodiless = status < 200 or status in (204, 304)
        names = {name.lower() for name, _ in self.headers}
        if status == 101:
            names.discard("connection")
        if names & _HTTP_FRAMING:
            raise ValueError("headers of the framing are not for handlers to set")
        start = _head_start(status, "" if bodiless else self.content_type)
        parts = [start, _header_lines(extra), _header_lines(tuple(self.headers))]
        if status >= 200:
            if close or not self.keeps_alive(request):
                parts.append(b"Connection: close\r\n")
            elif request is not None and request.http10:
                parts.append(b"Connection: keep-alive\r\n")
        length = len(self.body) if self.length is None else self.length
        if bodiless:
            parts.append(
                b"Content-Length: %d\r\n\r\n" % length if length and status == 304 else b"\r\n"
            )
        elif self.stream is not None and self.length is None:
            chunked = request is None or not request.http10
            parts.append(b"Transfer-Encoding: chunked\r\n\r\n" if chunked else b"\r\n")
        else:
            parts.append(b"Content-Length: %d\r\n\r\n" % length)
            if self.is_short and (request is None or request.method != "HEAD"):
                parts.append(self.body)
        return b"".join(parts)

    async def pieces(self, request: Request) -> AsyncIterator[bytes | memoryview]:
        """The body of an answer that is not short, as it goes over the wire."""
        if self.stream is None:
            body = memoryview(self.body)
            for start in range(0, len(body), SEND_SIZE):
                yield body[start : start + SEND_SIZE]
            return
        chunked = self.length is None and not request.http10
        sent = 0
        async for piece in self.stream:
            sent += len(piece)
            if self.length is not None and sent > self.length:
                break
            yield encode_chunk(piece) if chunked else piece
        if self.length is not None and sent != self.length:
            raise ValueError("the stream is not as long as was said: its file has changed")
        if chunked:
            yield LAST_CHUNK


def encode_chunk(data: bytes) -> bytes:
    """One piece of a stream as a chunk; an empty piece is nothing at all, as an empty chunk is the end."""
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""


def json_response(
    value: Any, status: int = 200, headers: Iterable[tuple[str, str]] = ()
) -> Response:
    """An answer in JSON."""
    return Response(status, dumps(value), JSON_TYPE, headers)


def text_response(
    text: str,
    status: int = 200,
    content_type: str = TEXT_TYPE,
    headers: Iterable[tuple[str, str]] = (),
) -> Response:
    """An answer in text, sent as UTF-8."""
    return Response(status, text.encode("utf-8"), content_type, headers)


def problem_response(problem: Problem) -> Response:
    """The JSON answer that a Problem stands for."""
    response = json_response(problem.body(), problem.status, problem.headers.items())
    response.close = problem.close
    return response


def file_response(
    request: Request,
    file: IO[bytes],
    size: int,
    content_type: str,
    headers: Iterable[tuple[str, str]] = (),
) -> Response:
    """An open file of `size` bytes, or the one range of it that was asked for; it is closed in the end."""
    try:
        span = _byte_range(request.headers.get("range", ""), size)
    except Problem:
        file.close()
        raise
    start, end = span or (0, size)
    response = Response(200 if span is None else 206, b"", content_type, headers)
    response.headers.append(("Accept-Ranges", "bytes"))
    if span is not None:
        response.headers.append(("Content-Range", f"bytes {start}-{end - 1}/{size}"))
    response.stream, response.length = _file_pieces(file, start, end - start), end - start
    return response


async def _file_pieces(file: IO[bytes], start: int, size: int) -> AsyncIterator[bytes]:
    with file:
        while start > 0:  # seek() in a zip would unpack all of it at once
            start -= len(file.read(min(start, SEND_SIZE))) or start
        while size > 0:
            piece = file.read(min(size, SEND_SIZE))
            if not piece:
                return
            size -= len(piece)
            yield piece


def _byte_range(value: str, size: int) -> tuple[int, int] | None:
    """(start, end) of the only range in a Range field (RFC 9110, 14); None to answer with everything."""
    match = _HTTP_RANGE.fullmatch(value)
    if match is None or match[1] == match[2] == "":
        return None
    first, last = match[1][:18], match[2][:18]  # no file is longer, and int() refuses long ones
    start = int(first) if first else max(size - int(last), 0)
    end = min(int(last) + 1, size) if first and last else size
    if start >= end:
        unsatisfied = {"Content-Range": f"bytes */{size}"}
        raise Problem(416, "the range lies outside the file", headers=unsatisfied)
    return start, end


# ---- 9. WebSocket: the server's side of RFC 6455, without I/O ----
#
# What differs from the Autobahn test suite: no compression (12.*, 13.*: RSV1 is an error); text only, the head
# of a binary message fails with 1003 (1.2.*, 9.2.*, 9.4.*, 9.6.*, 9.8.*); messages over WS_MAX_MESSAGE fail with
# 1009 as soon as a head declares them, as do messages in more than WS_MAX_FRAGMENTS frames (7.1.6, 9.1.*, 9.3.*,
# 9.5.*); close codes from 5000 on fail with 1002 (7.13.*); of those registered after the RFC, 1012 to 1014 are
# accepted. What the client sends after our close frame is checked, but only its close frame becomes an event.

_WS_MAX_CONTROL = (
    125  # bytes of a control frame (RFC 6455, 5.5); a close frame spends two on its code
)
_WS_GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, 1.3
_WS_KEY = re.compile(r"[A-Za-z0-9+/]{22}==")  # base64 of exactly 16 bytes
_WS_CONTINUATION, _WS_TEXT, _WS_BINARY, _WS_CLOSE, _WS_PING, _WS_PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
_WS_OPCODES = (_WS_CONTINUATION, _WS_TEXT, _WS_BINARY, _WS_CLOSE, _WS_PING, _WS_PONG)
_WS_EXTENDED = {126: 2, 127: 8}  # 7-bit length -> bytes of the length that follows


def websocket_handshake(request: Request) -> list[tuple[str, str]]:
    """Checks an opening handshake (RFC 6455, 4.2.1) and returns the headers of the 101 answer.

    Problem 405 (not GET), 400 (HTTP/1.0, a body, a missing, doubled or malformed key), 426 (no upgrade to
    websocket, another version than 13). Extensions and subprotocols that the client offers are not taken up.
    """
    import hashlib

    if request.method != "GET":
        raise Problem(405, "a WebSocket is opened with GET", headers={"Allow": "GET"})
    if request.http10:
        raise Problem(400, "a WebSocket needs HTTP/1.1")
    if request.body:  # bytes after the head would have two readings: body or frames
        raise Problem(400, "a WebSocket handshake has no body", close=True)
    headers = {name: value.strip() for name, value in request.headers.items()}
    tokens = [token.strip().lower() for token in headers.get("connection", "").split(",")]
    upgrade = "upgrade" in tokens and headers.get("upgrade", "").lower() == "websocket"
    if not upgrade or headers.get("sec-websocket-version") != "13":
        # RFC 9110 (15.5.22) wants Upgrade in it, RFC 6455 (4.4) the version that is spoken.
        wanted = {"Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
        detail = "here a request must ask for an upgrade to websocket, version 13"
        raise Problem(426, detail, headers=wanted)
    key = headers.get("sec-websocket-key", "")
    if not _WS_KEY.fullmatch(key):
        raise Problem(400, "Sec-WebSocket-Key must be there once, with 16 bytes in base64")
    digest = hashlib.sha1((key + _WS_GUID).encode("ascii"), usedforsecurity=False).digest()
    accept = base64.b64encode(digest).decode("ascii")
    return [("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Accept", accept)]


class Text(NamedTuple):
    """A whole text message."""

    data: str


class Ping(NamedTuple):
    """A ping: answer with `pong(payload)`."""

    payload: bytes


class Pong(NamedTuple):
    """The answer to a ping of ours, or an unsolicited sign of life."""

    payload: bytes


class Close(NamedTuple):
    """The last event: the client closed, or broke a rule. Send `close(code, reason)`, then end the connection.

    code: 1002, 1003, 1007 or 1009 with our reason for a broken rule; else the client's own (1005: it gave none).
    """

    code: int
    reason: str


if TYPE_CHECKING:
    WebSocketEvent = Union[Text, Ping, Pong, Close]


class _Violation(Exception):
    """The client broke a rule; the connection fails with a code (RFC 6455, 7.4.1) and a reason."""


def _unmask(data: bytes, key: bytes) -> bytes:
    """XOR with the repeated 4-byte key, as one long integer: far faster than a loop over bytes."""
    size = len(data)
    pad = (key * (size // 4 + 1))[:size]
    return (int.from_bytes(data, "little") ^ int.from_bytes(pad, "little")).to_bytes(size, "little")


def _server_frame(opcode: int, payload: bytes) -> bytes:
    """One unfragmented, unmasked frame with the shortest form of its length."""
    size = len(payload)
    if size < 126:
        return bytes((0x80 | opcode, size)) + payload
    if size < 1 << 16:
        return bytes((0x80 | opcode, 126)) + size.to_bytes(2, "big") + payload
    return bytes((0x80 | opcode, 127)) + size.to_bytes(8, "big") + payload


def _may_be_sent(code: int) -> bool:
    """Whether a close frame may carry this code (RFC 6455, 7.4, and the IANA registry: 1012 to 1014)."""
    return 1000 <= code <= 1003 or 1007 <= code <= 1014 or 3000 <= code <= 4999


def _close_event(payload: bytes) -> Close:
    """What a client's close frame says; _Violation 1002 (length, code) or 1007 (reason is not UTF-8)."""
    if not payload:
        return Close(1005, "")
    code = int.from_bytes(payload[:2], "big")
    if len(payload) == 1 or not _may_be_sent(code):
        raise _Violation(1002, f"close code {code} is not for sending")
    try:
        return Close(code, payload[2:].decode("utf-8"))
    except UnicodeDecodeError:
        raise _Violation(1007, "close reason is not UTF-8") from None


class WebSocketProtocol:
    """The frames of one open connection: `feed` takes the client's bytes, the other methods make ours.

    state: "open"; "closing" once a close frame was made or an event Close given out; "closed" after both.
    Unless open, send_text, ping and pong return b"" (a broadcast need not ask). After the event Close all
    later bytes are discarded. Timers (own pings, silence, waiting for the client's close frame) and room for
    what is written belong to the server: one read can hold thousands of empty pings.
    """

    def __init__(
        self, max_message: int = WS_MAX_MESSAGE, max_fragments: int = WS_MAX_FRAGMENTS
    ) -> None:
        self._max_message = max_message
        self._max_fragments = max_fragments
        self._buffer = bytearray()  # not yet read: at most one head and what the last feed brought
        self._sent = False  # our close frame was made
        self._ended = False  # the event Close was given out
        self._in_frame = False  # between the head of a frame and the end of its payload
        self._fin = False
        self._opcode = 0
        self._left = 0  # payload bytes of the frame still to come
        self._key = b""  # mask, turned so that it begins at the next payload byte
        self._control = bytearray()
        self._message = bytearray()
        self._fragments = 0  # frames of the unfinished message; 0 = there is none
        self._utf8 = codecs.getincrementaldecoder("utf-8")()

    @property
    def state(self) -> str:
        """One of "open", "closing" and "closed", see above."""
        return ("open", "closing", "closed")[self._sent + self._ended]

    def feed(self, data: bytes) -> list[WebSocketEvent]:
        """Takes bytes from the socket, in pieces of any size; never raises for what is in them."""
        events: list[WebSocketEvent] = []
        if self._ended:
            return events
        self._buffer += data
        try:
            while not self._ended and (self._payload(events) if self._in_frame else self._head()):
                pass
        except _Violation as violation:
            self._end(Close(*violation.args), events)
        return events

    def send_text(self, text: str | bytes) -> bytes:
        """A text message; bytes must be UTF-8 already (JSON from dumps). b"" unless open."""
        return self._send(_WS_TEXT, text.encode("utf-8") if isinstance(text, str) else text)

    def ping(self, payload: bytes = b"") -> bytes:
        """A ping; ValueError over 125 bytes. b"" unless open."""
        return self._send(_WS_PING, payload)

    def pong(self, payload: bytes = b"") -> bytes:
        """The answer to a Ping with this payload; ValueError over 125 bytes. b"" unless open."""
        return self._send(_WS_PONG, payload)

    def _send(self, opcode: int, payload: bytes) -> bytes:
        if opcode & 0x8 and len(payload) > _WS_MAX_CONTROL:
            raise ValueError(f"control frames carry at most {_WS_MAX_CONTROL} bytes")
        return b"" if self._sent or self._ended else _server_frame(opcode, payload)

    def close(self, code: int = 1000, reason: str = "") -> bytes:
        """The one close frame, to begin or to answer a closing handshake; b"" when it was made before.

        The reason is cut to the 123 bytes that fit. 1005 makes a frame without a code, the answer to one
        without. ValueError for other codes that must not be sent.
        """
        if code != 1005 and not _may_be_sent(code):
            raise ValueError(f"close code {code} must not be sent")
        if self._sent:
            return b""
        self._sent = True
        if code == 1005:
            return _server_frame(_WS_CLOSE, b"")
        text = reason.encode("utf-8", "replace")[: _WS_MAX_CONTROL - 2].decode("utf-8", "ignore")
        return _server_frame(_WS_CLOSE, code.to_bytes(2, "big") + text.encode("utf-8"))

    def _head(self) -> bool:
        """Reads the head of a frame off the buffer; False = needs more bytes. Fails as early as it can."""
        buffer = self._buffer
        if not buffer:
            return False
        self._check_first(buffer[0])
        if len(buffer) < 2:
            return False
        fin, opcode, short = bool(buffer[0] & 0x80), buffer[0] & 0x0F, buffer[1] & 0x7F
        if not buffer[1] & 0x80:
            raise _Violation(1002, "frame without a mask")
        if opcode & 0x8 and short > _WS_MAX_CONTROL:
            raise _Violation(1002, f"control frame longer than {_WS_MAX_CONTROL} bytes")
        if opcode == _WS_BINARY:
            raise _Violation(1003, "binary messages are not accepted")
        start = 2 + _WS_EXTENDED.get(short, 0)
        if len(buffer) < start:
            return False
        length = int.from_bytes(buffer[2:start], "big") if start > 2 else short
        self._check_length(opcode, short, length)
        if len(buffer) < start + 4:
            return False
        self._key = bytes(buffer[start : start + 4])
        del buffer[: start + 4]
        self._in_frame, self._fin, self._opcode, self._left = True, fin, opcode, length
        if not opcode & 0x8:
            self._fragments += 1
        return True

    def _check_first(self, first: int) -> None:
        """The first byte of a frame: FIN, reserved bits, opcode, and whether the opcode fits here."""
        opcode = first & 0x0F
        if first & 0x70:
            raise _Violation(1002, "reserved bit set")
        if opcode not in _WS_OPCODES:
            raise _Violation(1002, f"unknown opcode {opcode}")
        if opcode & 0x8:
            if not first & 0x80:
                raise _Violation(1002, "control frame in fragments")
        elif opcode == _WS_CONTINUATION:
            if not self._fragments:
                raise _Violation(1002, "continuation of nothing")
            if self._fragments >= self._max_fragments:
                raise _Violation(1009, f"message in more than {self._max_fragments} frames")
        elif self._fragments:
            raise _Violation(1002, "new message inside a fragmented one")

    def _check_length(self, opcode: int, short: int, length: int) -> None:
        """The declared length, before a byte of payload is kept."""
        if length >> 63:
            raise _Violation(1002, "length with its top bit set")
        if (short == 126 and length < 126) or (short == 127 and length < 1 << 16):
            raise _Violation(1002, "length not in its shortest form")
        if not opcode & 0x8 and len(self._message) + length > self._max_message:
            raise _Violation(1009, f"message longer than {self._max_message} bytes")

    def _payload(self, events: list[WebSocketEvent]) -> bool:
        """Takes what is there of the frame's payload; False = needs more bytes."""
        piece = _unmask(bytes(self._buffer[: self._left]), self._key)
        size = len(piece)
        del self._buffer[:size]
        self._left -= size
        self._key = self._key[size % 4 :] + self._key[: size % 4]
        control = self._opcode & 0x8
        if control:
            self._control += piece
        else:
            self._message += piece
            try:  # at once, so that invalid text fails before the rest of it has come
                self._utf8.decode(piece, self._fin and not self._left)
            except UnicodeDecodeError:
                raise _Violation(1007, "text is not UTF-8") from None
        if self._left:
            return False
        self._in_frame = False
        if control:
            payload, self._control = bytes(self._control), bytearray()
            if self._opcode == _WS_CLOSE:
                self._end(_close_event(payload), events)
            elif not self._sent:  # after our close frame nothing but the client's counts
                events.append(Ping(payload) if self._opcode == _WS_PING else Pong(payload))
        elif self._fin:
            text, self._message, self._fragments = self._message.decode("utf-8"), bytearray(), 0
            if not self._sent:
                events.append(Text(text))
        return True

    def _end(self, event: Close, events: list[WebSocketEvent]) -> None:
        self._ended = True
        for buffer in (self._buffer, self._message, self._control):
            buffer.clear()
        events.append(event)


# ---- 10. Router and access: which handler, and who may ask ----

# A handler returns a Response, an awaitable of one, or what the server takes over (a WebSocket).
if TYPE_CHECKING:
    Handler = Callable[[Request], Any]
# Methods that change nothing (RFC 9110, 9.2.1).
SAFE_METHODS = frozenset(("GET", "HEAD", "OPTIONS"))


class _Route:
    """All handlers of one shape of path, by method, each with the names of its parameters."""

    def __init__(self, segments: Sequence[str]) -> None:
        self.shape = ["{}" if segment[:1] == "{" else segment for segment in segments]
        parts = ["([^/]+)" if text == "{}" else re.escape(text) for text in self.shape]
        self.pattern = re.compile("/".join(parts))
        self.handlers: dict[str, tuple[Handler, list[str]]] = {}


class Router:
    """Finds the handler of a request by method and path.

    Paths are matched raw, segment by segment, a literal before a parameter, and what a parameter took is
    decoded exactly once into request.params: an encoded slash stays inside it, where the rules for ids
    refuse it. `fallback` (the static UI) gets the GETs and HEADs that no pattern matches.
    """

    def __init__(self) -> None:
        self._routes: dict[int, list[_Route]] = {}  # by number of segments, literals first
        self.fallback: Handler | None = None

    def add(self, method: str, pattern: str, handler: Handler) -> None:
        """Adds a route, "/flows/{flow}/runs/{run}"; ValueError for a bad pattern or one there already."""
        segments = pattern.split("/")
        names = [segment[1:-1] for segment in segments if segment[:1] == "{"]
        if segments.pop(0):
            raise ValueError(f"a pattern starts with a slash: {pattern!r}")
        new = _Route(segments)
        routes = self._routes.setdefault(len(segments), [])
        route = next((known for known in routes if known.shape == new.shape), new)
        if route is new:
            routes.append(new)
            routes.sort(key=lambda known: [text == "{}" for text in known.shape])
        if method in route.handlers or len(set(names)) < len(names):
            raise ValueError(f"there twice: {method} {pattern}")
        route.handlers[method] = (handler, names)

    def resolve(self, request: Request) -> Handler:
        """The handler; sets request.params. HEAD is answered through GET, OPTIONS by naming the methods.

        A preflight (admitted before, see below) is answered for any path, so that the page learns of a 404.
        Problem 404 (no such path; also for a trailing slash), 405 with Allow, 400 (bad percent-encoding).
        """
        if is_preflight(request):
            return preflight
        method, path = request.method, request.path
        allowed: set[str] = set()
        for route in self._routes.get(path.count("/"), ()):
            match = route.pattern.fullmatch(path, 1)
            if match is None:
                continue
            handlers = route.handlers
            found = handlers.get(method) or (handlers.get("GET") if method == "HEAD" else None)
            if found is not None:
                taken = [percent_decode(text) for text in match.groups()]
                request.params = dict(zip(found[1], taken))
                return found[0]
            allowed.update(handlers)
        if self.fallback is not None and not allowed and path.startswith("/"):
            if method in ("GET", "HEAD"):
                return self.fallback
            allowed = {"GET"} if method == "OPTIONS" else allowed
        if path == "*":
            allowed = {"GET", "POST", "PATCH"}
        if not allowed:
            raise Problem(404, f"there is nothing at {path:.200}")
        allow = ", ".join(sorted({*allowed, "OPTIONS"} | ({"HEAD"} if "GET" in allowed else set())))
        if method == "OPTIONS":
            return lambda request: Response(204, headers=[("Allow", allow)])
        detail = f"{method} is not answered here, only {allow}"
        raise Problem(405, detail, headers={"Allow": allow})

    def dispatch(self, request: Request) -> Any:
        """Calls the handler: resolve(request)(request)."""
        return self.resolve(request)(request)


def take_lease(request: Request) -> None:
    """Turn the lease that stands before the path in the URLs of `mflocal run` into its header."""
    if request.path.startswith(LEASE_PREFIX):
        lease, _, path = request.path[len(LEASE_PREFIX) :].partition("/")
        request.headers[LEASE_HEADER] = lease
        request.path = "/" + path


# Access: admit() is the one place where it is decided, for every request, upgrades to WebSocket included.
#
# 1. The Host must be known, or a name of an attacker's DNS that leads to 127.0.0.1 would pass (rebinding).
# 2. Pages of other origins read nothing; pages of any origin write nothing, unless it was named: cards are
#    programs, and they run on our own origin.
# 3. With a key, whoever has it may ask, and our own pages may read with a cookie made from it.
# 4. Without one, the process at the other end must be of our user (or root), where the system can tell.


@lru_cache(maxsize=256)
def host_allowed(authority: str, allowed_hosts: tuple[str, ...], bound_host: str) -> bool:
    """Whether a Host names this machine's loopback, the address that was connected to, or a configured name.

    The port does not matter: it may be forwarded. `*.localhost` is loopback by RFC 6761, and nobody can
    register a name in it. A wildcard address names no host. Problem(400) if the authority is malformed.
    """
    host, _ = split_host(authority)
    if is_loopback(host) or host.endswith(".localhost"):
        return True
    names = {name.strip("[]").lower() for name in (*allowed_hosts, bound_host)}
    return host in names - {"0.0.0.0", "::", ""}


def check_host(
    request: Request, allowed_hosts: tuple[str, ...] = (), bound_host: str = "127.0.0.1"
) -> None:
    """Problem 403 for a Host that is not on the allow-list, 400 for none (HTTP/1.0) or a malformed one."""
    if not request.authority:
        raise Problem(400, "the request names no Host")
    if not host_allowed(request.authority, allowed_hosts, bound_host):
        host = split_host(request.authority)[0]
        raise Problem(
            403, f"the host name {host!r} is not allowed; start mflocal with --allow-host {host}"
        )


def _split_origin(origin: str) -> tuple[str, int] | None:
    """(host, port) of an http or https origin, None for any other ("null", an extension, nonsense)."""
    scheme, _, authority = origin.partition("://")
    if scheme not in ("http", "https"):
        return None
    try:
        host, port = split_host(authority)
    except Problem:
        return None
    return host, port if port is not None else 443 if scheme == "https" else 80


def same_origin(origin: str, authority: str) -> bool:
    """Whether an Origin is that of the Host the request went to (which check_host has let pass).

    Without a port on either side the scheme does not matter: a forwarder (Codespaces, a reverse proxy) may
    speak https to the browser and http to us.
    """
    parts = _split_origin(origin)
    if parts is None or not authority:
        return False
    host, port = split_host(authority)
    default = 443 if origin.startswith("https:") else 80
    return parts == (host, default if port is None else port)


def _is_named(origin: str, allowed_origins: tuple[str, ...]) -> bool:
    """Whether --allow-origin names it. "null" (sandboxed frames, files) is nobody's, whatever was named."""
    names = [known.rstrip("/").lower() for known in allowed_origins]
    return origin != "null" and origin.lower() in names


@lru_cache(maxsize=256)
def allowed_origin(origin: str, allowed_origins: tuple[str, ...], authority: str) -> bool:
    """Whether pages of this origin may read: loopback on any port, our own (`authority`), those named."""
    if _is_named(origin, allowed_origins):
        return True
    parts = _split_origin(origin)
    if parts is None:
        return False
    local = is_loopback(parts[0]) or parts[0].endswith(".localhost")
    return local or same_origin(origin, authority)


def check_browser(request: Request, allowed_origins: tuple[str, ...] = ()) -> str | None:
    """Problem 403 for what no page may make a browser send; else the Origin, or None if there is none.

    Browsers name the Origin of every write and every WebSocket, and send Sec-Fetch-Site with everything;
    Metaflow's client and curl send neither. Links and address bars send no Origin: a navigation may read
    (a link in a chat may lead here), <script src> and <img> of another site may not. Content-Type is not
    looked at: Metaflow's heartbeats have none.
    """
    origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site")
    if request.method not in SAFE_METHODS:
        if origin is not None or site is not None:
            if origin is None or not _is_named(origin, allowed_origins):
                raise Problem(403, "pages may not write here; --allow-origin names one that may")
        return origin
    if origin is not None:
        if not allowed_origin(origin, allowed_origins, request.authority):
            raise Problem(403, f"pages of {origin!r} may not use this service; see --allow-origin")
        return origin
    navigates = request.headers.get("sec-fetch-mode") == "navigate"
    if not navigates and site not in (None, "same-origin", "same-site", "none"):
        raise Problem(403, "a page of another site may not load this")
    return None


def is_plugin_file(request: Request) -> bool:
    """Whether this reads a file of a UI plugin.

    The UI puts plugins into frames with sandbox="allow-scripts". Such a frame has no origin: what it loads
    comes with `Origin: null` or as from another site, and never with the cookie.
    """
    prefix = f"{API_PREFIX}/plugin/"
    path = request.path
    return (
        path.startswith(prefix) and "/" in path[len(prefix) :] and request.method in ("GET", "HEAD")
    )


@lru_cache(maxsize=64)
def cors_headers(origin: str | None) -> Headers:
    """The headers of every answer, given what check_browser returned: only an allowed Origin is echoed.

    Never "*" and never credentials. Other origins cannot even embed the answer, so that JSON is of no use
    as a script (Cross-Origin-Resource-Policy). Meant for Response.encode(extra=...).
    """
    if origin is None:
        return (("Vary", "Origin"), ("Cross-Origin-Resource-Policy", "same-origin"))
    return (
        ("Vary", "Origin"),
        ("Access-Control-Allow-Origin", origin),
        ("Access-Control-Expose-Headers", "METADATA_SERVICE_VERSION, X-Limit, X-Next-Cursor"),
        ("Cross-Origin-Resource-Policy", "cross-origin"),
    )


def is_preflight(request: Request) -> bool:
    """Whether a browser asks, before a request of a page, if that request may be made."""
    names = ("origin", "access-control-request-method")
    return request.method == "OPTIONS" and all(name in request.headers for name in names)


def preflight(request: Request) -> Response:
    """The answer to a preflight whose Origin check_browser let pass; cors_headers come on top."""
    headers = [
        ("Access-Control-Allow-Methods", "GET, HEAD, POST, PATCH"),
        ("Access-Control-Allow-Headers", f"content-type, {KEY_HEADER}"),
        ("Access-Control-Max-Age", str(PREFLIGHT_MAX_AGE)),
    ]
    if request.headers.get("access-control-request-private-network") == "true":
        headers.append(("Access-Control-Allow-Private-Network", "true"))
    return Response(204, headers=headers)


def cookie_value(auth_key: str) -> str:
    """What the cookie holds: derived from the key, because cookies go to every port of a host."""
    import hmac  # here and below: brings OpenSSL with it, which a command need not wait for

    return hmac.new(auth_key.encode("utf-8"), KEY_COOKIE.encode("ascii"), "sha256").hexdigest()


def key_cookie(auth_key: str) -> tuple[str, str]:
    """The Set-Cookie header that lets a browser read: not for scripts, not on requests from other sites."""
    return "Set-Cookie", f"{KEY_COOKIE}={cookie_value(auth_key)}; Path=/; HttpOnly; SameSite=Strict"


def _same_secret(given: str, expected: str) -> bool:
    import hmac

    return hmac.compare_digest(given.encode("utf-8"), expected.encode("utf-8"))


def _from_own_page(request: Request) -> bool:
    """Whether no other origin had a hand in it; SameSite alone would let in all ports of this host."""
    origin = request.headers.get("origin")
    if origin is not None:
        return same_origin(origin, request.authority)
    return request.headers.get("sec-fetch-site", "none") in ("same-origin", "none")


def check_key(request: Request, auth_key: str | None) -> None:
    """Problem 401 unless the request has the key, or for reading (WebSocket too) on our own pages the cookie.

    Nothing is checked without a configured key, and for preflights, with which browsers send no key.
    """
    if auth_key is None or request.path in KEYLESS_PATHS or is_preflight(request):
        return
    if _same_secret(request.headers.get(KEY_HEADER, ""), auth_key):
        return
    if request.method in ("GET", "HEAD") and _from_own_page(request):
        for cookie in request.headers.get("cookie", "").split(";"):
            name, _, value = cookie.strip().partition("=")
            if name == KEY_COOKIE and _same_secret(value, cookie_value(auth_key)):
                return
    raise Problem(
        401,
        f"this service needs its key in {KEY_HEADER} (METAFLOW_SERVICE_AUTH_KEY)",
        headers={"WWW-Authenticate": KEY_HEADER},
    )


# A connection from loopback whose other end belongs to another user is a stranger's: no key, no service.
# The system tells who that is, in 30 us by netlink (a read of /proc/net/tcp takes 5 ms, and more with many
# sockets). An end whose process has closed it belongs to nobody any more (inode 0, and uid 0 with it), so
# that who writes and leaves at once must not pass for root.

_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, _NLMSG_ERROR = 4, 20, 1, 2


def other_user(local: tuple[Any, ...], peer: tuple[Any, ...]) -> int | None:
    """The uid of another user (root excepted) at the other end of a connection from loopback, else None.

    -1: that end has been closed already. None also where the system cannot tell (macOS).
    """
    if not is_loopback(peer[0]):
        return None
    try:
        found = _socket_owner(peer, local)
        if found is None:
            return None if _socket_owner(local, peer) is None else -1
    except (OSError, struct.error):
        return None
    uid, inode = found
    if not inode:
        return -1
    return None if uid in (0, os.geteuid()) else uid


def _socket_owner(near: tuple[Any, ...], far: tuple[Any, ...]) -> tuple[int, int] | None:
    """(uid, inode) of the socket with these two addresses, None if there is none. OSError: nobody tells."""
    family = socket.AF_INET6 if ":" in near[0] else socket.AF_INET
    ends = [socket.inet_pton(family, end[0]) for end in (near, far)]
    if not hasattr(socket, "AF_NETLINK"):
        raise OSError(errno.ENOSYS, "no netlink")
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as netlink:
            netlink.settimeout(1.0)
            # struct nlmsghdr, inet_diag_req_v2, inet_diag_sockid (linux/inet_diag.h); no cookie, any state
            request = struct.pack("=BBBxI", family, socket.IPPROTO_TCP, 0, 0xFFFFFFFF)
            request += struct.pack("!HH16s16s", near[1], far[1], *ends)
            request += struct.pack("=III", 0, 0xFFFFFFFF, 0xFFFFFFFF)
            size = 16 + len(request)
            netlink.send(
                struct.pack("=IHHII", size, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0) + request
            )
            answer = netlink.recv(4096)
        if struct.unpack_from("=H", answer, 4)[0] != _NLMSG_ERROR:
            uid, inode = struct.unpack_from("=II", answer, 80)
            return uid, inode
        if struct.unpack_from("=i", answer, 16)[0] == -errno.ENOENT:
            return None
    except OSError:
        pass  # a kernel or a sandbox without it: the table of all sockets says the same
    return _socket_owner_in_table(family, [(a, end[1]) for a, end in zip(ends, (near, far))])


def _socket_owner_in_table(family: int, ends: list[tuple[bytes, int]]) -> tuple[int, int] | None:
    words = [
        "".join("%08X" % word for word in struct.unpack(f"={len(address) // 4}I", address))
        + ":%04X" % port
        for address, port in ends
    ]
    with open("/proc/net/tcp6" if family == socket.AF_INET6 else "/proc/net/tcp") as table:
        for line in table:
            fields = line.split()
            if fields[1:3] == words:
                return int(fields[7]), int(fields[9])
    return None


def check_user(other_user: int | None) -> None:
    """Problem 403 for another user of this machine (see other_user())."""
    if other_user is not None:
        who = f"user {other_user}" if other_user >= 0 else "a process that has ended"
        raise Problem(
            403,
            f"this service belongs to user {os.geteuid()}, and the request comes from {who}: start mflocal"
            f" with {ENV_PREFIX}AUTH_KEY set, and give the other user the key that `mflocal env` prints",
        )


def admit(
    request: Request,
    *,
    allowed_hosts: tuple[str, ...] = (),
    allowed_origins: tuple[str, ...] = (),
    bound_host: str = "127.0.0.1",
    auth_key: str | None = None,
    other_user: int | None = None,
) -> Headers:
    """All checks in their order. Returns the headers for the answer (for Response.encode's extra).

    other_user: what other_user() says, where there is no key that could be brought.
    Problem 400, 401, 403: these have such headers already, so that an allowed page can read why.
    """
    origin = None
    try:
        check_host(request, allowed_hosts, bound_host)
        if is_plugin_file(request):
            check_user(other_user)
            return cors_headers("null")
        origin = check_browser(request, allowed_origins)
        check_key(request, auth_key)
        if request.path not in KEYLESS_PATHS:
            check_user(other_user)
    except Problem as problem:
        problem.headers.update(cors_headers(origin))
        raise
    return cors_headers(origin)


# ---- 11. Rows: what lists answer and subscriptions push ----


class Target(NamedTuple):
    """One kind of row below a flow, run, step or task; None is any. `newest`: only a task's newest attempt."""

    kind: str
    flow: Optional[str] = None
    run: Optional[str] = None
    step: Optional[str] = None
    task: Optional[str] = None
    newest: bool = False


class Made(NamedTuple):
    """A row as clients get it, with what names it within its object, and when it last changed (ms)."""

    key: Any
    changed_at: int
    row: Record


def is_below(place: str, root: str) -> bool:
    """Whether a path or URL is `root` or below it, whatever `..` it holds."""
    if "://" in root:
        return ".." not in place.split("/") and f"{place}/".startswith(f"{root.rstrip('/')}/")
    return any(
        f"{os.path.normpath(place)}/".startswith(f"{path.rstrip('/')}/")
        for path in (os.path.normpath(root), os.path.realpath(root))
    )


class Site:
    """All there is to know about one root; `rows` makes the rows of lists and of what subscriptions push.

    Rows are made of nodes: those of metadata, artifacts and attempts of their tasks, parameters of their run.
    """

    def __init__(
        self,
        store: Store,
        liveness: Liveness,
        settings: Settings,
        log: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.store = store
        self.liveness = liveness
        self.settings = settings
        # Metaflow puts included files beside .metaflow/data.
        self.reader = Reader(settings.metaflow_dir, [os.path.join(settings.root, "data")])
        self._log = log
        self._faults: Set[str] = set()
        # In a directory like /tmp others have their files below our root too.
        shared = os.path.isdir(settings.root) and os.stat(settings.root).st_mode & stat.S_IWOTH
        self._datastores = [("local", settings.metaflow_dir if shared else settings.root)]
        try:
            self._datastores += ClientConfig(os.environ, settings.root).datastores()
        except SettingsError:
            pass  # whoever starts a flow is told

    def check_place(self, location: Any, ds_type: Any = None) -> None:
        """Problem(400) unless artifacts may be at a `location` or `ds-root`.

        Metaflow's client unpickles what it finds there, so whoever names the place runs code as its user.
        """
        if not isinstance(location, str) or not location.strip():
            return
        place = location[len(":root:") :] if location.startswith(":root:") else location
        for kind, root in self._datastores:
            if ds_type in (None, " ", "", kind) and is_below(place, root):
                return
        raise Problem(
            400,
            f"{location!r:.200} is neither below {self.settings.root} nor in a datastore that "
            "METAFLOW_DATASTORE_SYSROOT_* names where mflocal runs",
        )

    def log_once(self, text: str) -> None:
        """A line for the daemon's log, unless it is there already."""
        if text not in self._faults and len(self._faults) < FAULTS_NAMED:
            self._faults.add(text)
            self._log(text)

    async def nodes(self, target: Target, most: Optional[int] = None) -> List[Any]:
        """What the rows of a target are made of, newest first; at least the newest `most` of several runs."""
        store, kind = self.store, target.kind
        flows = await store.flows() if target.flow is None else _if_any(store.flow(target.flow))
        if kind == "flows":
            return flows
        if target.run is None:
            runs: List[RunNode] = []
            for flow in flows:
                runs += (await store.runs(flow))[:most]
            if len(flows) > 1:
                runs.sort(key=_run_created, reverse=True)
            return runs
        run = store.run(target.flow or "", target.run)
        if run is None or kind in ("runs", "parameters"):
            return _if_any(run)
        step = target.step
        steps = store.steps(run)[::-1] if step is None else _if_any(store.step(run, step))
        if kind == "steps":
            return steps
        if target.task is not None:
            return [task for at in steps for task in _if_any(store.task(at, target.task))]
        tasks: List[TaskNode] = []
        for at in steps:
            tasks += await store.tasks(at)
        return tasks

    async def rows(self, target: Target) -> List[Made]:
        """The rows of a target, newest first."""
        nodes = await self.nodes(target)
        state = None
        if nodes and target.kind in ("steps", "tasks"):
            state = await run_state(self, nodes[0].run)
        # The UI asks for page after page of a wide run: what was looked at a moment ago still holds.
        known_since = time.monotonic() - (RECHECK_AFTER if len(nodes) > WIDE_RUN else 0)
        pace, made = Pacer(), []
        for node in nodes:
            made += await self.rows_of(target.kind, node, state, known_since)
            await pace()
        if target.run is not None and target.kind in ("tasks", "metadata"):
            made.sort(key=_made_created, reverse=True)
        return made

    async def rows_of(
        self,
        kind: str,
        node: Any,
        state: Optional[RunStatus] = None,
        known_since: Optional[float] = None,
    ) -> List[Made]:
        """The rows of one node, newest first; none of one that cannot be read. `state`: its run's, if known.

        Facts looked at after `known_since` (monotonic s) are not looked at again.
        """
        try:
            if kind == "tasks":
                facts = node.facts
                if facts is None or known_since is None or node.checked < known_since:
                    facts = self.store.facts(node)
                if state is None and not attempt_is_over(facts):
                    state = await run_state(self, node.run)
                return _task_rows(self, node, facts, state)
            if kind == "runs":
                run = await self.store.check([node])
                return [await _made_run(self, node)] if run else []
            if kind == "metadata":
                return _metadata_rows(node, await self.store.metadata(node))
            if kind == "artifacts":
                return _artifact_rows(node, await self.store.artifacts(node))
            if kind == "parameters":
                row = await self.reader.parameters(await parameter_records(self, node))
                return [Made("", now_ms(), row)] if row else []
            if kind == "steps":
                return [await _made_step(self, node, state or await run_state(self, node.run))]
            return [Made("", _ms(node.record or {}), flow_row(node.record or {}))]
        except Exception as error:
            # A directory deleted meanwhile, a record that is not what it should be, one that may not be read:
            # all other rows are right, and the log names this one once.
            if os.path.exists(node.path):
                self.log_once(f"no {kind} of {node.path}: {type(error).__name__}: {error}")
            return []

    async def details(self, task: TaskNode, made: List[Made]) -> List[Made]:
        """Rows of a task with what its artifacts add: `unknown` settled by `_task_ok`, `foreach_label`."""
        facts, memo = task.facts, task.memo
        if facts is None or not made:
            return made
        for _, _, row in made:
            number = row["attempt_id"]
            attempt = facts.attempts.get(number)
            if (
                row["status"] == UNKNOWN
                and number not in memo.ok
                and attempt is not None
                and attempt.task_ok_record
            ):
                record = {**attempt.task_ok_record, "flow_id": task.run.flow, "attempt_id": number}
                value = (await self.reader.values([record]))[0]
                memo.ok[number] = value if isinstance(value, bool) else None
                memo.made = []
        if not memo.made:
            made = _task_rows(self, task, facts, await run_state(self, task.run))
        label = await _foreach_label(self, task, facts)
        if not label:
            return made
        return [one._replace(row={**one.row, "foreach_label": label}) for one in made]


def _if_any(node: Any) -> List[Any]:
    return [] if node is None else [node]


async def encode_rows(rows: Iterable[Mapping[str, Any]]) -> List[bytes]:
    """Rows as JSON, without those that cannot be told in JSON; gives way, so that a long list stalls nobody."""
    pace, parts = Pacer(), []
    for row in rows:
        try:
            parts.append(dumps(row))
        except (ValueError, RecursionError):
            continue
        await pace()
    return parts


def plain_values(args: Args, field: str) -> Optional[Set[str]]:
    """The values that a filter `field=a,b` leaves possible, None when there is no such filter."""
    values = [set(value.split(",")) for name, value in args if name in (field, field + ":eq")]
    return set.intersection(*values) if values else None


def narrowed(target: Target, args: Args) -> Target:
    """The target within the one step that a filter names, so that a wide run's other tasks are not read."""
    steps = plain_values(args, "step_name")
    if target.run and not target.step and steps is not None and len(steps) == 1:
        if target.kind in ("tasks", "metadata", "artifacts"):
            return target._replace(step=steps.pop())
    return target


def asks_for_local_artifacts(target: Target, args: Args) -> bool:
    """Whether this is the UI's question if a run keeps its artifacts locally (`?ds_type=local&_limit=1`).

    It warns that they cannot be shown when the answer is not empty. Here they can, so the answer to exactly
    this question, on a run, is that there are none.
    """
    local = [("_limit", "1"), ("ds_type", "local")]
    return target.kind == "artifacts" and not target.step and sorted(args) == local


class _RunMemo:
    """What is kept of a run between two answers.

    state is a final status as long as `proof`, the facts of the end step's tasks, holds; a failure that no
    end step proves is believed until `until` (monotonic s) unless another heartbeat than `beat` comes.
    limits: attempts allowed per step, read from the graph when first needed.
    """

    __slots__ = ("state", "proof", "until", "beat", "limits")

    def __init__(self) -> None:
        self.state: Optional[RunStatus] = None
        self.proof: List[Tuple[TaskNode, Tuple[int, int]]] = []
        self.until = 0.0
        self.beat: Optional[int] = None
        self.limits: Optional[Dict[str, Optional[int]]] = None


def facts_stamp(task: TaskNode, facts: TaskFacts) -> Tuple[int, int]:
    """Changes whenever the facts do: every fact is a file of its own."""
    return facts.changed_at, len(task.read)


def _still_true(site: Site, run: RunNode, memo: _RunMemo, cheap: bool) -> bool:
    if memo.proof:
        if cheap and memo.state is not None and memo.state.status == COMPLETED:
            return True
        return all(
            [facts_stamp(task, site.store.facts(task)) == stamp for task, stamp in memo.proof]
        )
    if site.liveness.alive(run) or site.store.signs(run).heartbeat != memo.beat:
        return False
    return time.monotonic() < memo.until


async def run_state(site: Site, run: RunNode, *, cheap: bool = False) -> RunStatus:
    """Status, finish and duration of a run by the rules of section 5, remembered where nothing can change it.

    A completed run costs one stat; `cheap` saves that too, for judging thousands of runs by a filter whose
    page is then judged again.
    """
    memo = run.memo
    if not isinstance(memo, _RunMemo):
        memo = run.memo = _RunMemo()
    if memo.state is not None and _still_true(site, run, memo, cheap):
        return memo.state
    end_name = site.store.end_step(run)
    summary, end = RunSummary(end_name), site.store.step(run, end_name)
    proof = []
    for task in await site.store.tasks(end) if end else []:
        facts = site.store.facts(task)
        summary.add(end_name, facts)
        proof.append((task, facts_stamp(task, facts)))
    settled = summary.settled
    if not settled:
        pace, summary = Pacer(), RunSummary(end_name)
        for task, facts in await site.store.run_facts(run):
            summary.add(task.step.name, facts)
            await pace()
    alive = site.liveness.alive(run)

    def judge() -> RunStatus:
        """The status by what is known now; asked again once the attempts allowed are known too."""
        limits = memo.limits or {}
        return run_status(
            run.self_record.get("ts_epoch"),
            summary,
            now_ms(),
            heartbeat=site.liveness.last_heartbeat(run),
            alive=alive,
            lost_at=site.store.signs(run).lost.get(0),
            allowed=limits.get,
            scheduled=site.liveness.scheduled(run),
            booted_at=machine_booted(site.store.root),
            cutoff=site.settings.run_cutoff,
            local_cutoff=site.settings.local_cutoff,
        )

    state = judge()
    if state.status == RUNNING and summary.failures and not alive and memo.limits is None:
        memo.limits = await _attempt_limits(site, run)
        state = judge()
    lasting = state.status != RUNNING and now_ms() - (state.finished_at or 0) > FAILED_FOR_LONG
    memo.state = state if settled or lasting else None
    memo.proof = proof if settled else []
    memo.beat, memo.until = site.store.signs(run).heartbeat, time.monotonic() + JUDGE_FAILED
    return state


async def _attempt_limits(site: Site, run: RunNode) -> Optional[Dict[str, Optional[int]]]:
    """How many attempts each step of the run's graph may have; None while there is no graph."""
    records = await parameter_records(site, run)
    try:
        graph = await site.reader.graph(records)
    except Problem:
        return {}
    if graph is None:
        return None
    return {name: allowed_attempts(step["decorators"]) for name, step in graph["steps"].items()}


async def parameter_records(site: Site, run: RunNode) -> List[Record]:
    """The artifact records of a run's `_parameters` task (parameters and graph), [] when there are none."""
    step = site.store.step(run, "_parameters")
    records: List[Record] = []
    for task in await site.store.tasks(step) if step else []:
        records += await site.store.artifacts(task)
    return records


def _text(value: Any) -> Optional[str]:
    return value if isinstance(value, str) else None


def _texts(value: Any) -> List[str]:
    return [text for text in value if isinstance(text, str)] if isinstance(value, list) else []


def _ms(record: Record) -> int:
    at = record.get("ts_epoch")
    return at if type(at) is int else 0


def _made_created(made: Made) -> int:
    return made.row["ts_epoch"] or 0


def _run_created(run: RunNode) -> int:
    return _ms(run.self_record)


def _id_text(id: str) -> Optional[str]:
    """`run_id` or `task_name`: the text of an id that is no number, None for a number."""
    return None if is_number(id) else id


# How each column of a row of /runs is made. Only those of JUDGED need the run's tasks to be read.
RUN_COLUMNS: Mapping[str, Callable[[Site, RunNode, RunStatus], Any]] = {
    "flow_id": lambda site, run, state: run.flow,
    "run_number": lambda site, run, state: public_id(run.id),
    "run_id": lambda site, run, state: _id_text(run.id),
    "user_name": lambda site, run, state: run.self_record.get("user_name"),
    "user": lambda site, run, state: verified_user(run.self_record),
    "run": lambda site, run, state: run.id,
    "status": lambda site, run, state: state.status,
    "ts_epoch": lambda site, run, state: run.self_record.get("ts_epoch"),
    "finished_at": lambda site, run, state: state.finished_at,
    "duration": lambda site, run, state: state.duration,
    "last_heartbeat_ts": lambda site, run, state: site.liveness.last_heartbeat(run),
    # Tags are a list always: the UI's header crashes on null.
    "tags": lambda site, run, state: _texts(run.self_record.get("tags")),
    "system_tags": lambda site, run, state: _texts(run.self_record.get("system_tags")),
}
JUDGED = frozenset(("status", "finished_at", "duration"))
_NOT_JUDGED = RunStatus("", None, None)


async def run_view(
    site: Site, run: RunNode, columns: Collection[str], *, cheap: bool = False
) -> Record:
    """Some columns of a run's row; `cheap` believes that a completed run still is."""
    judge = not JUDGED.isdisjoint(columns)
    state = await run_state(site, run, cheap=cheap) if judge else _NOT_JUDGED
    return {name: RUN_COLUMNS[name](site, run, state) for name in columns}


async def _made_run(site: Site, run: RunNode) -> Made:
    row = await run_view(site, run, RUN_COLUMNS)
    running = row["status"] == RUNNING
    return Made("", now_ms() if running else max(run_touched(run), row["finished_at"] or 0), row)


def run_touched(run: RunNode) -> int:
    """When a run was made or its tags were changed (ms)."""
    written = run.sig[0] // 1_000_000 if run.sig else 0
    return max(_run_created(run), written)


async def _made_step(site: Site, step: StepNode, state: RunStatus) -> Made:
    """A row of .../steps. run_id is the text of the run's number here, as the real service has it."""
    pace, known, running = Pacer(), [], False
    for task in await site.store.tasks(step):
        facts = site.store.facts(task)
        known.append(facts)
        if not running and state.status == RUNNING and not attempt_is_over(facts):
            running = _task_rows(site, task, facts, state)[0].row["status"] == RUNNING
        await pace()
    record, run = step.record or {}, step.run
    created = record.get("ts_epoch")
    row = {
        "flow_id": run.flow,
        "run_number": public_id(run.id),
        "run_id": run.id,
        "step_name": step.name,
        "user_name": record.get("user_name"),
        "ts_epoch": created,
        "duration": step_duration(created, known, now_ms(), running=running),
        "tags": _texts(run.self_record.get("tags")),
        "system_tags": _texts(run.self_record.get("system_tags")),
    }
    return Made("", created or 0, row)


class _TaskMemo:
    """What is kept of a task: the rows of one whose newest attempt is over, as long as `proof` stays.

    ok: what `_task_ok` artifacts said, by attempt. label: the foreach label, "" for none, None if not known.
    """

    __slots__ = ("proof", "made", "ok", "label")

    def __init__(self) -> None:
        self.proof: Any = None
        self.made: List[Made] = []
        self.ok: Dict[int, Optional[bool]] = {}
        self.label: Optional[str] = None


def attempt_is_over(facts: TaskFacts) -> bool:
    """Whether Metaflow wrote that the newest attempt is over: then the rows follow from the files alone."""
    if not facts.attempts:
        return False
    last = facts.attempts[max(facts.attempts)]
    return last.finished or last.ok is not None or last.task_ok_at is not None


def _task_rows(
    site: Site, task: TaskNode, facts: TaskFacts, state: Optional[RunStatus]
) -> List[Made]:
    """A row per attempt, the newest first; those of finished tasks are remembered: do not change them."""
    memo = task.memo
    if memo is None:
        memo = task.memo = _TaskMemo()
    proof = (*facts_stamp(task, facts), facts.heartbeat, task.run.record)
    if memo.made and memo.proof == proof:
        return memo.made  # type: ignore[no-any-return]
    statuses = attempt_rows(
        facts,
        now_ms(),
        lambda attempt: site.liveness.alive(task, attempt),
        run_ended=None if state is None else state.status != RUNNING,
        run_finished_at=None if state is None else state.finished_at,
        task_ok=memo.ok.get,
        parameters=task.step.name == "_parameters",
        cutoff=site.settings.run_cutoff,
        local_cutoff=site.settings.local_cutoff,
    )
    made = [_task_row(site, task, facts, status) for status in reversed(statuses)]
    memo.proof, memo.made = proof, made if attempt_is_over(facts) else []
    return made


def _task_row(site: Site, task: TaskNode, facts: TaskFacts, status: AttemptStatus) -> Made:
    run, record = task.run, task.self_record
    attempt = facts.attempts.get(status.attempt_id)
    task_ok = attempt.task_ok_record if attempt is not None and attempt.ok_at is None else None
    row = {
        **_task_columns(task),
        "user_name": record.get("user_name"),
        "status": status.status,
        "task_ok": task_ok.get("location") if task_ok else None,
        "ts_epoch": record.get("ts_epoch"),
        "started_at": status.started_at,
        "finished_at": status.finished_at,
        "duration": status.duration,
        "attempt_id": status.attempt_id,
        "tags": _texts(run.self_record.get("tags")),
        "system_tags": _texts(run.self_record.get("system_tags")),
        "last_heartbeat_ts": site.liveness.last_heartbeat(task),
    }
    if status.status in (RUNNING, PENDING):
        return Made(status.attempt_id, now_ms(), row)
    changed = max(status.started_at or row["ts_epoch"] or 0, status.finished_at or 0)
    return Made(status.attempt_id, changed, row)


def _task_columns(task: TaskNode) -> Record:
    """The columns that say which task a row belongs to."""
    run = task.run
    return {
        "flow_id": run.flow,
        "run_number": public_id(run.id),
        "run_id": _id_text(run.id),
        "step_name": task.step.name,
        "task_id": public_id(task.id),
        "task_name": _id_text(task.id),
    }


async def _foreach_label(site: Site, task: TaskNode, facts: TaskFacts) -> str:
    """`<task id>[<index>]`, "" outside of a foreach; from metadata, for older Metaflow from an artifact."""
    memo = task.memo
    if memo.label is not None:
        return str(memo.label)
    over, label = attempt_is_over(facts), None
    known = {r.get("field_name"): r.get("value") for r in await site.store.metadata(task)}
    if "foreach-execution-path" in known:
        label = foreach_label(task.id, execution_path=known["foreach-execution-path"])
    elif "origin-task-id" in known or not _tells_foreach(task.run):  # resume copies artifacts only
        for record in await site.store.artifacts(task):
            if record["name"] == "_foreach_stack":
                stack = (await site.reader.values([record]))[0]
                label = foreach_label(task.id, stack=stack)
                break
    if label is not None or over:
        memo.label = label or ""
    return label or ""


_METAFLOW_VERSION = re.compile(r"metaflow_version:(\d+)\.(\d+)\.(\d+)")


def _tells_foreach(run: RunNode) -> bool:
    """Whether the run's Metaflow writes the foreach path of every task it runs as metadata: from 2.14.1 on."""
    for tag in _texts(run.self_record.get("system_tags")):
        found = _METAFLOW_VERSION.match(tag)
        if found:
            return tuple(int(part) for part in found.groups()) >= (2, 14, 1)
    return False


def _metadata_rows(task: TaskNode, records: Iterable[Record]) -> List[Made]:
    """Rows of .../metadata; attempt_id from the record's `attempt_id:N` tag, null without one."""
    place, made = _task_columns(task), []
    for record in records:
        tags, system_tags = record.get("tags"), record.get("system_tags")
        row = {
            "id": record.get("id"),
            **place,
            "attempt_id": attempt_of_tags(tags),
            "field_name": str(record.get("field_name")),  # the UI's task page crashes on null
            "value": _metadata_value(record),
            "type": _text(record.get("type")),
            "user_name": _text(record.get("user_name")),
            "ts_epoch": _ms(record),
            "tags": None if tags is None else _texts(tags),
            "system_tags": None if system_tags is None else _texts(system_tags),
        }
        made.append(Made(row["id"], row["ts_epoch"], row))
    return made


def _metadata_value(record: Record) -> Optional[str]:
    try:
        return value_text(record.get("value"))
    except (ValueError, RecursionError):
        return None  # nested too deeply for any text


def _artifact_rows(task: TaskNode, records: Iterable[Record]) -> List[Made]:
    """Rows of .../artifacts, of all attempts; tags are the run's."""
    place, own, made = _task_columns(task), task.run.self_record, []
    tags = {name: _texts(own.get(name)) for name in ("tags", "system_tags")}
    for record in records:
        row = {**place, "name": record["name"]}
        for name in ("location", "ds_type", "sha", "type", "content_type", "user_name"):
            row[name] = _text(record.get(name))
        row.update(attempt_id=record["attempt_id"], ts_epoch=_ms(record), **tags)
        made.append(Made((row["attempt_id"], row["name"]), row["ts_epoch"], row))
    return made


# ---- 12. Metadata API: what Metaflow's client asks (metaflow-service, its metadata part) ----


async def encode_list(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """A JSON list, encoded in slices so that a long one does not hold up the other clients."""
    return b"[" + b", ".join(await encode_rows(rows)) + b"]"


# -- handlers


class MetadataApi:
    """Handlers of every route of the metadata service; each reads or writes the store and builds one answer."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.store = site.store
        self.liveness = site.liveness

    # -- finding

    def _flow(self, request: Request) -> FlowNode:
        flow = self.store.flow(request.params["flow"])
        if flow is None:
            raise Problem(404, f"there is no flow {request.params['flow']}")
        return flow

    def _run(self, request: Request) -> RunNode:
        params = request.params
        run = self.store.run(params["flow"], params["run"])
        if run is None:
            raise Problem(404, f"there is no run {params['flow']}/{params['run']}")
        return run

    def _step(self, request: Request) -> StepNode:
        run = self._run(request)
        step = self.store.step(run, request.params["step"])
        if step is None:
            raise Problem(404, f"there is no step {run.flow}/{run.id}/{request.params['step']}")
        return step

    def _task(self, request: Request) -> TaskNode:
        step = self._step(request)
        task = self.store.task(step, request.params["task"])
        if task is None:
            raise Problem(
                404,
                f"there is no task {step.run.flow}/{step.run.id}/{step.name}/{request.params['task']}",
            )
        return task

    def _maybe_step(self, request: Request) -> Optional[StepNode]:
        try:
            return self._step(request)
        except Problem:
            return None  # the real service lists nothing where the parent is missing

    def _maybe_task(self, request: Request) -> Optional[TaskNode]:
        params = request.params
        return self.store.find_task(params["flow"], params["run"], params["step"], params["task"])

    # -- rows

    def run_row(self, run: RunNode) -> Record:
        """A run as GET answers it: with `user` where the system tags vouch for it."""
        row = run_row(run.flow, run.id, run.self_record, self.liveness.last_heartbeat(run))
        user = verified_user(run.self_record)
        if user is not None:
            row["user"] = user
        return row

    def task_row(self, task: TaskNode) -> Record:
        """A task as GET and POST answer it."""
        run = task.run
        return task_row(
            run.flow,
            run.id,
            task.id,
            task.self_record,
            run.self_record,
            self.liveness.last_heartbeat(task),
        )

    # -- flows

    async def get_flows(self, request: Request) -> Response:
        """GET /flows: all flows, newest first, or a page of them."""
        rows = [flow_row(flow.record or {}) for flow in await self.store.flows()]
        return await self._listed(request, rows, ("flow_id",))

    def get_flow(self, request: Request) -> Response:
        """GET /flows/{flow}."""
        return json_response(flow_row(self._flow(request).record or {}))

    def post_flow(self, request: Request) -> Response:
        """POST /flows/{flow}: 409 when it exists."""
        name = request.params["flow"]
        if not is_flow_name(name):
            raise Problem(400, f"{name!r:.100} is not a flow name: it must be a Python identifier")
        flow = self.store.create_flow(name, object_body(request.json()))
        if flow is None:
            raise Problem(409, f"the flow {name} exists already")
        return json_response(flow_row(flow.record or {}))

    # -- runs

    async def get_runs(self, request: Request) -> Response:
        """GET /flows/{flow}/runs, filtered and paged; an unknown flow has none."""
        flow = self.store.flow(request.params["flow"])
        runs = await self.store.check(await self.store.runs(flow)) if flow else []
        filters = parse_filters(request.args(), SERVICE_RUN_COLUMNS, strict=True)
        pace, rows = Pacer(), []
        for run in runs:
            row = self.run_row(run)
            if "status" in filters.columns:
                row["status"] = (await run_state(self.site, run)).status
            if not filters or matches(
                dict(row, run_id=None if is_number(run.id) else run.id), filters
            ):
                rows.append(row)
            await pace()
        return await self._listed(request, rows, ("run_number",), paged=bool(filters))

    def get_run(self, request: Request) -> Response:
        """GET /flows/{flow}/runs/{run}."""
        return json_response(self.run_row(self._run(request)))

    def post_run(self, request: Request) -> Response:
        """POST /flows/{flow}/run: `run_number` in the body is the client's own id, which must not be a number."""
        flow = self._flow(request)
        data = request.json()
        body = object_body(data)
        run = self.store.create_run(flow, body, _own_id(data.get("run_number"), "run_number"))
        if run is None:
            raise Problem(409, f"the run {flow.name}/{data['run_number']} exists already")
        self.liveness.set_lease(run, request.headers.get(LEASE_HEADER))
        row = run_row(run.flow, run.id, run.self_record, self.liveness.last_heartbeat(run))
        return json_response(row)

    def post_run_heartbeat(self, request: Request) -> Response:
        """POST .../runs/{run}/heartbeat: never too early."""
        self.liveness.heartbeat(self._run(request))
        return _beat_answer()

    def mutate_tags(self, request: Request) -> Response:
        """PATCH .../tag/mutate: removal first, then addition; system tags are never touched."""
        run = self._run(request)
        body = request.json()
        if not isinstance(body, dict):
            raise Problem(400, f"the body must be a JSON object, not {json_kind(body)}")
        add, remove = body.get("tags_to_add", []), body.get("tags_to_remove", [])
        for name, tags in (("tags_to_add", add), ("tags_to_remove", remove)):
            if not isinstance(tags, list):
                raise Problem(400, f"{name} must be a list")
        if not all(isinstance(tag, str) for tag in add + remove):
            raise Problem(400, "All tag values must be strings")
        tag_list(add, "tags_to_add")
        record = run.self_record
        tags, system = list(record.get("tags") or []), set(record.get("system_tags") or [])
        locked = sorted(system.intersection(remove))
        if locked:
            raise Problem(422, f"Cannot remove tags that are existing system tags {locked}")
        gone = set(remove)
        kept = [tag for tag in dict.fromkeys(tags) if tag not in gone]
        held = system.union(kept)
        kept += [tag for tag in dict.fromkeys(add) if tag not in held]
        if set(kept) != set(tags):
            self.store.replace_tags(run, kept)
        return json_response({"tags": kept})

    # -- steps

    def get_steps(self, request: Request) -> Response:
        """GET .../steps, newest first; an unknown run has none."""
        run = self.store.run(request.params["flow"], request.params["run"])
        steps = self.store.steps(run) if run else []
        return json_response([self._step_row(step) for step in reversed(steps)])

    def _step_row(self, step: StepNode) -> Record:
        return step_row(step.run.flow, step.run.id, step.record or {}, step.run.self_record)

    def get_step(self, request: Request) -> Response:
        """GET .../steps/{step}."""
        return json_response(self._step_row(self._step(request)))

    def post_step(self, request: Request) -> Response:
        """POST .../steps/{step}/step: 409 when it exists."""
        run, name = self._run(request), request.params["step"]
        if not is_flow_name(name):
            raise Problem(400, f"{name!r:.100} is not a step name: it must be a Python identifier")
        step = self.store.create_step(run, name, object_body(request.json()))
        self.liveness.set_lease(run, request.headers.get(LEASE_HEADER))
        if step is None:
            raise Problem(409, f"the step {run.flow}/{run.id}/{name} exists already")
        return json_response(self._step_row(step))

    # -- tasks

    async def get_tasks(self, request: Request) -> Response:
        """GET .../tasks, filtered and paged; an unknown step has none."""
        step = self._maybe_step(request)
        filters = parse_filters(request.args(), SERVICE_TASK_COLUMNS, strict=True, tags=False)
        pace, rows = Pacer(), []
        for task in await self.store.tasks(step) if step else []:
            row = self.task_row(task)
            if not filters or matches(
                dict(row, task_name=None if is_number(task.id) else task.id), filters
            ):
                rows.append(row)
            await pace()
        return await self._listed(request, rows, ("task_id",), paged=bool(filters))

    async def get_filtered_tasks(self, request: Request) -> Response:
        """GET .../filtered_tasks: pathspecs of the tasks with a metadata record that fits, by task id."""
        step = self._maybe_step(request)
        field, pattern = request.arg("metadata_field_name"), request.arg("pattern")
        values: List[Tuple[str, List[str]]] = []
        pace = Pacer()
        for task in await self.store.tasks(step) if step else []:
            rows = await self.store.metadata(task)
            texts = [
                value_text(r.get("value")) or ""
                for r in rows
                if not field or r.get("field_name") == field
            ]
            if texts:
                values.append((task.pathspec, texts))
            await pace()
        values.sort(key=lambda item: _pathspec_order(item[0]))
        if not pattern:
            return json_response([pathspec for pathspec, _ in values])
        texts = sorted({text for _, own in values for text in own})
        found = await self.site.reader.match(pattern, texts, anywhere=True)
        fitting = {text for text, hit in zip(texts, found) if hit}
        return json_response([path for path, own in values if not fitting.isdisjoint(own)])

    def get_task(self, request: Request) -> Response:
        """GET .../tasks/{task}."""
        return json_response(self.task_row(self._task(request)))

    def post_task(self, request: Request) -> Response:
        """POST .../steps/{step}/task: `task_id` in the body is the client's own id, which must not be a number."""
        step = self._step(request)
        data = request.json()
        body = object_body(data)
        own_id = _own_id(data.get("task_id"), "task_id")
        task = self.store.create_task(step, body, own_id)
        lease = request.headers.get(LEASE_HEADER)
        if own_id is None:
            self.liveness.bind_run(request.connection, step.run, lease)
        else:
            self.liveness.set_lease(step.run, lease)
        if wants_heartbeat(body.get("system_tags")):
            self.store.beat(step.run, now_ms() // 1000)
        if task is None:
            raise Problem(
                409,
                f"the task {step.run.flow}/{step.run.id}/{step.name}/{data['task_id']} exists already",
            )
        return json_response(self.task_row(task))

    def post_task_heartbeat(self, request: Request) -> Response:
        """POST .../tasks/{task}/heartbeat: beats for the run too."""
        task = self._task(request)
        self.liveness.heartbeat(task.run)
        self.liveness.heartbeat(task)
        return _beat_answer()

    # -- metadata

    async def get_task_metadata(self, request: Request) -> Response:
        """GET .../tasks/{task}/metadata, newest first."""
        task = self._maybe_task(request)
        rows = [metadata_row(record) for record in await self.store.metadata(task)] if task else []
        return await self._listed(request, rows, ("id",))

    async def get_run_metadata(self, request: Request) -> Response:
        """GET .../runs/{run}/metadata, newest first."""
        run = self.store.run(request.params["flow"], request.params["run"])
        pace, rows = Pacer(), []
        for task in await self.store.run_tasks(run) if run else []:
            rows += [metadata_row(record) for record in await self.store.metadata(task)]
            await pace()
        rows.sort(key=lambda row: (-row["ts_epoch"], row["id"]))
        return await self._listed(request, rows, ("id",))

    async def post_metadata(self, request: Request) -> Response:
        """POST .../tasks/{task}/metadata: all rows but those that cannot be files."""
        task = self._maybe_task(request)
        if task is None:
            return _not_registered()
        rows = []
        for row in metadata_body(await request.rows()):
            if row.get("field_name") == "ds-root":
                self._check_place(request, row.get("value"))
            name = row.get("field_name", " ")
            if is_file_name(metadata_file(name, now_ms())):
                rows.append(row)
            else:
                self.site.log_once(
                    f"metadata field {name!r:.100} cannot be a file name: not stored"
                )
        created = await self.store.add_metadata(task, rows)
        for row in rows:
            if row.get("field_name") == "attempt":
                value = row.get("value")
                if (
                    isinstance(value, str)
                    and value.isascii()
                    and value.isdigit()
                    and len(value) < 6
                ):
                    lease = request.headers.get(LEASE_HEADER)
                    self.liveness.bind_attempt(request.connection, task, int(value), lease)
        return json_response({"metadata_created": created})

    # -- artifacts

    async def get_task_artifacts(self, request: Request) -> Response:
        """GET .../tasks/{task}/artifacts: those of the newest attempt that has any."""
        task = self._maybe_task(request)
        return await self._artifacts(request, [task] if task else [])

    async def get_step_artifacts(self, request: Request) -> Response:
        """GET .../steps/{step}/artifacts: the newest attempt's of every task."""
        step = self._maybe_step(request)
        return await self._artifacts(request, await self.store.tasks(step) if step else [])

    async def get_run_artifacts(self, request: Request) -> Response:
        """GET .../runs/{run}/artifacts: the newest attempt's of every task."""
        run = self.store.run(request.params["flow"], request.params["run"])
        return await self._artifacts(request, await self.store.run_tasks(run) if run else [])

    async def _artifacts(self, request: Request, tasks: List[TaskNode]) -> Response:
        pace, rows = Pacer(), []
        for task in tasks:
            records = _latest(await self.store.artifacts(task))
            rows += [artifact_row(record, task.run.self_record) for record in records]
            await pace()
        return await self._listed(request, rows, ("task_id", "name"))

    async def get_attempt_artifacts(self, request: Request) -> Response:
        """GET .../attempt/{attempt}/artifacts: those of one attempt."""
        task = self._maybe_task(request)
        attempt = _attempt_asked(request)
        records = await self.store.artifacts(task) if task else []
        chosen = [record for record in records if record["attempt_id"] == attempt]
        return json_response(
            [artifact_row(record, task.run.self_record) for record in chosen] if task else []
        )

    async def get_artifact(self, request: Request) -> Response:
        """GET .../artifacts/{name}[/attempt/{attempt}]: without an attempt that of the task's newest attempt."""
        task = self._task(request)
        name = request.params["name"]
        records = await self.store.artifacts(task)
        if "attempt" in request.params:
            attempt = _attempt_asked(request)
            records = [record for record in records if record["attempt_id"] == attempt]
        else:
            records = _latest(records)
        for record in records:
            if record["name"] == name:
                return json_response(artifact_row(record, task.run.self_record))
        raise Problem(404, f"there is no artifact {task.pathspec}/{name}")

    async def post_artifacts(self, request: Request) -> Response:
        """POST .../tasks/{task}/artifact: all rows or none; a name known for its attempt is not counted."""
        task = self._maybe_task(request)
        if task is None:
            return _not_registered()
        rows = artifact_body(await request.rows())
        for row in rows:
            self._check_place(request, row.get("location"), row.get("ds_type"))
        created = await self.store.add_artifacts(task, rows)
        return json_response({"artifacts_created": created})

    def _check_place(self, request: Request, place: Any, ds_type: Any = None) -> None:
        # A command under `mflocal run` is the user's own, and may have other settings than the daemon.
        if not self.liveness.holds_lease(request.headers.get(LEASE_HEADER)):
            self.site.check_place(place, ds_type)

    # -- paging

    async def _listed(
        self, request: Request, rows: List[Record], key: Tuple[str, ...], paged: bool = False
    ) -> Response:
        """A list answer, whole, or one cursor page when `_limit`, `_cursor` or a filter asks for that."""
        page, headers = cursor_page(rows, request.args(), ("ts_epoch",) + key, always=paged)
        return Response(200, await encode_list(page), JSON_TYPE, headers.items())


def _latest(records: List[Record]) -> List[Record]:
    """The records of the newest attempt; the store gives the newest first."""
    return [record for record in records if record["attempt_id"] == records[0]["attempt_id"]]


def _attempt_asked(request: Request) -> int:
    text = request.params["attempt"]
    if text.startswith("-") and text[1:].isdigit():
        return -1  # as recorded: a negative attempt is one that has nothing
    return attempt_number(text)


def _pathspec_order(pathspec: str) -> Tuple[int, str]:
    task = pathspec.rpartition("/")[2]
    return (int(task) if is_number(task) else 1 << 62, task)


def _own_id(value: Any, what: str) -> Optional[str]:
    """An id that the client chose, or None; Problem(400) for numbers, which are ours to give, and for bad names."""
    if value is None:
        return None
    if not isinstance(value, str) or value.isnumeric():
        raise Problem(
            400, f"the provided {what} may not be a number: numbers are given by the service"
        )
    if not is_id(value):
        raise Problem(
            400, f"{what} {value!r:.100} cannot be the name of a directory of at most 255 bytes"
        )
    return value


def _not_registered() -> Response:
    # The real service's `message`, beside what every error of ours has.
    text = "need to register run_id and task_id first"
    return json_response({**Problem(400, text).body(), "message": text}, 400)


_BEAT = Response(200, rb'"{\"wait_time_in_seconds\": 10}"', JSON_TYPE)


def _beat_answer() -> Response:
    # A JSON string that holds JSON: Metaflow's heartbeat.py decodes the answer twice.
    return _BEAT


# -- routes

_TASK_PATH = "/flows/{flow}/runs/{run}/steps/{step}/tasks/{task}"


def register_metadata_routes(router: Router, api: MetadataApi) -> None:
    """Adds every route of the metadata service; the reading ones also below the UI's prefix, as the real one does."""
    routes: List[Tuple[str, str, Callable[[Request], Any]]] = [
        ("GET", "/flows", api.get_flows),
        ("GET", "/flows/{flow}", api.get_flow),
        ("POST", "/flows/{flow}", api.post_flow),
        ("GET", "/flows/{flow}/runs", api.get_runs),
        ("GET", "/flows/{flow}/runs/{run}", api.get_run),
        ("POST", "/flows/{flow}/run", api.post_run),
        ("POST", "/flows/{flow}/runs/{run}/heartbeat", api.post_run_heartbeat),
        ("PATCH", "/flows/{flow}/runs/{run}/tag/mutate", api.mutate_tags),
        ("GET", "/flows/{flow}/runs/{run}/metadata", api.get_run_metadata),
        ("GET", "/flows/{flow}/runs/{run}/artifacts", api.get_run_artifacts),
        ("GET", "/flows/{flow}/runs/{run}/steps", api.get_steps),
        ("GET", "/flows/{flow}/runs/{run}/steps/{step}", api.get_step),
        ("POST", "/flows/{flow}/runs/{run}/steps/{step}/step", api.post_step),
        ("GET", "/flows/{flow}/runs/{run}/steps/{step}/artifacts", api.get_step_artifacts),
        ("GET", "/flows/{flow}/runs/{run}/steps/{step}/tasks", api.get_tasks),
        ("GET", "/flows/{flow}/runs/{run}/steps/{step}/filtered_tasks", api.get_filtered_tasks),
        ("POST", "/flows/{flow}/runs/{run}/steps/{step}/task", api.post_task),
        ("GET", _TASK_PATH, api.get_task),
        ("POST", f"{_TASK_PATH}/heartbeat", api.post_task_heartbeat),
        ("GET", f"{_TASK_PATH}/metadata", api.get_task_metadata),
        ("POST", f"{_TASK_PATH}/metadata", api.post_metadata),
        ("GET", f"{_TASK_PATH}/artifacts", api.get_task_artifacts),
        ("POST", f"{_TASK_PATH}/artifact", api.post_artifacts),
        ("GET", f"{_TASK_PATH}/attempt/{{attempt}}/artifacts", api.get_attempt_artifacts),
        ("GET", f"{_TASK_PATH}/artifacts/{{name}}", api.get_artifact),
        ("GET", f"{_TASK_PATH}/artifacts/{{name}}/attempt/{{attempt}}", api.get_artifact),
    ]
    for method, pattern, handler in routes:
        router.add(method, pattern, handler)
        if method == "GET":
            router.add(method, f"/api/metadata{pattern}", handler)
    pong = text_response("pong")
    version = text_response(SERVICE_VERSION)
    up = json_response('{"status": "UP"}')
    for prefix in ("", "/api/metadata"):
        router.add("GET", f"{prefix}/ping", lambda request: pong)
        router.add("GET", f"{prefix}/version", lambda request: version)
        router.add("GET", f"{prefix}/healthcheck", lambda request: up)


# ---- 13. Live: subscriptions to what changes ----
#
# 1. A subscription is a query asked again. All subscriptions to one target share a Watch, which holds the rows
#    that its subscribers know and compares them with the rows as they are now: only differences are pushed.
# 2. An event of the store marks an object; its rows are made again COALESCE s later, so that what one request
#    writes about one task is one frame, and no frame is older than the one before it.
# 3. No event tells what local mode writes and what time alone changes: every WATCH_INTERVAL s the rows of what
#    is not settled are made again, and objects that were not there before are found.


if TYPE_CHECKING:

    class UiSocket(Protocol):
        """What the live engine and the search need of an open WebSocket."""

        @property
        def request(self) -> Request:
            """The request that opened it."""

        async def receive(self) -> Optional[str]:
            """The next text message, None when closed."""

        def send_text(self, text: str) -> bool:
            """Queues a message without waiting; False when the client is gone or, over WS_MAX_QUEUE, dropped."""

        def close(self, code: int = 1000, reason: str = "") -> None:
            """Begins the closing handshake."""


_OF_RUN = frozenset(("steps", "tasks", "metadata", "artifacts", "parameters"))


def _target(kind: str, ids: Sequence[str], newest: bool = False) -> Target:
    flow, run, step, task = (*ids, None, None, None, None)[:4]
    return Target(kind, flow, run, step, task, newest)


def parse_resource(path: str) -> Optional[Target]:
    """The target of a subscription, None for a path of which nothing is ever told. Raises Problem(400)."""
    parts = [percent_decode(part) for part in path.split("/")]
    if parts.pop(0) or not all(parts):
        return None
    names, ids = parts[0::2], parts[1::2]
    whole = len(ids) == len(names)  # the path ends with an id, not with a kind
    if names == ["flows"] or parts == ["runs"]:
        return _target(names[0], ids)
    if names[:2] != ["flows", "runs"]:
        return None
    if len(names) == 2:
        return _target("runs", ids)
    if len(names) == 3 and names[2] in _OF_RUN and (names[2] == "steps" or not whole):
        return _target(names[2], ids)
    if names[2] == "steps" and len(names) == 4 and names[3] in ("tasks", "artifacts"):
        if not whole:
            return _target(names[3], ids)
        return _target("tasks", ids, newest=True) if names[3] == "tasks" else None
    if names[2:4] == ["steps", "tasks"] and len(names) == 5 and not whole:
        kind = "tasks" if names[4] == "attempts" else names[4]
        return _target(kind, ids) if kind in ("tasks", "metadata", "artifacts") else None
    return None


class Client:
    """One WebSocket and what it subscribes to, by uuid."""

    def __init__(self, socket: UiSocket) -> None:
        self.socket = socket
        self.subscriptions: Dict[str, _Subscription] = {}


class _Subscription:
    """One SUBSCRIBE: `resource` without its query; `target` None where nothing is ever told."""

    def __init__(self, client: Client, uuid: str, resource: str) -> None:
        path, _, query = resource.partition("?")
        args = Request("GET", path, query).args()
        self.client = client
        self.uuid = uuid
        self.resource = path
        self.active = True
        self.target = parse_resource(path)
        if self.target is not None:
            local = asks_for_local_artifacts(self.target, args)
            self.target = None if local else narrowed(self.target, args)
        self.filters = parse_filters(
            args, UI_COLUMNS.get(self.target.kind, {}) if self.target else {}
        )

    def send(self, kind: str, row: Record, text: str) -> None:
        """Sends a row (`text` = its JSON) if it passes the filters."""
        if self.active and matches(row, self.filters):
            frame = '{"type": "%s", "uuid": %s, "resource": %s, "data": %s}' % (
                kind, dumps(self.uuid).decode(), dumps(self.resource).decode(), text,
            )  # fmt: skip
            self.active = self.client.socket.send_text(frame)


class Watch:
    """What the subscribers to one target know, and what of it may have changed.

    known: the rows of each node by key; None where nobody has looked at a node that was there at the beginning.
    settled: nodes of which nothing changes without an event. replays: subscriptions with the ms from which on.
    """

    def __init__(self, target: Target, wake: asyncio.Event) -> None:
        self.target = target
        self.subscriptions: Dict[_Subscription, None] = {}
        self.known: Dict[Any, Optional[Dict[Any, Record]]] = {}
        self.settled: Set[Any] = set()
        self.dirty: Dict[Any, None] = {}
        self.replays: List[Tuple[_Subscription, int]] = []
        self.begun = now_ms()
        self.primed = False
        self.wake = wake
        self.task: Optional[asyncio.Task[None]] = None
        self.next_look = 0.0
        self.state: Optional[RunStatus] = None  # of the run, as it was at `judged` (monotonic s)
        self.judged = 0.0

    @property
    def status(self) -> Optional[str]:
        """The last known status of the run."""
        return self.state.status if self.state else None

    def mark(self, event: Event) -> None:
        """Notes the object of an event whose rows may differ now."""
        kind, run, step, task = self.target.kind, event.run, event.step, event.task
        node: Any = None
        if kind == "flows":
            node = event.flow if event.kind == "flow" else None
        elif kind == "runs":
            node = run if run is not None and _moves_run(event) else None
        elif kind == "steps":
            node = step if event.kind == "step" else None
        elif kind == "parameters":
            node = run if step is not None and _tells_parameters(event) else None
        elif kind == "tasks" or event.kind in (kind, kind[:-1]):
            node = task
        if event.kind == "signs":
            self.judged = 0.0
            if kind == "tasks" and task is None:
                self.dirty.update(dict.fromkeys(self.unfinished()))
        if node is None or self.target.step not in (None, step and step.name):
            return
        if self.target.task in (None, task and task.id):
            self.dirty[node] = None

    def unfinished(self) -> List[Any]:
        """The tasks with an attempt that was not over."""
        return [
            node
            for node, rows in self.known.items()
            if rows and any([row["finished_at"] is None for row in rows.values()])
        ]


def _moves_run(event: Event) -> bool:
    """Whether a run's row may differ; a large run, whose status takes long to find, waits for the next look."""
    if event.kind in ("run", "tags", "signs"):
        return True
    run = event.run
    if run is None or event.kind not in ("task", "metadata"):
        return False
    if sum([len(step.children) for step in run.children.values()]) <= RUN_AT_ONCE:
        return True
    last = event.step is not None and event.step.name == "end"
    return any(
        row.get("field_name") == "attempt_ok" and (last or truth(row.get("value")) is False)
        for row in event.rows
    )


def _tells_parameters(event: Event) -> bool:
    named = event.step is not None and event.step.name == "_parameters"
    return event.kind == "artifact" if named else event.kind == "step"


class Subscriptions:
    """The clients of the UI's WebSocket. Without subscriptions an event costs one comparison."""

    def __init__(self, site: Site, log: Callable[[str], None] = lambda text: None) -> None:
        self._site = site
        self._log = log
        self._watches: Dict[Tuple[Optional[str], Optional[str]], Dict[Target, Watch]] = {}
        site.store.listeners.append(self._listen)

    def runs(self) -> Set[RunNode]:
        """The runs that somebody has open."""
        found = [self._site.store.run(*place) for place in self._watches if all(place)]  # type: ignore[arg-type]
        return {run for run in found if run is not None}

    def _listen(self, event: Event) -> None:
        if not self._watches:
            return
        flow = event.flow.name
        run = event.run.id if event.run is not None else None
        for place in {(None, None), (flow, None), (flow, run)}:
            for watch in self._watches.get(place, {}).values():
                watch.mark(event)
                if watch.dirty:
                    watch.wake.set()

    # -- clients

    def disconnect(self, client: Client) -> None:
        """Ends all subscriptions of a client."""
        for subscription in list(client.subscriptions.values()):
            self._remove(subscription)

    def receive(self, client: Client, text: str) -> None:
        """One message: `__ping__`, SUBSCRIBE or UNSUBSCRIBE; anything else is ignored."""
        if text == "__ping__":
            client.socket.send_text("__pong__")
            return
        try:
            message = loads(text.encode("utf-8", "replace"))
            if not isinstance(message, dict) or not isinstance(message.get("uuid"), str):
                return
            uuid, resource = message["uuid"], message.get("resource")
            subscribes = message.get("type") == "SUBSCRIBE" and isinstance(resource, str)
            if not subscribes and message.get("type") != "UNSUBSCRIBE":
                return
            if uuid in client.subscriptions:
                self._remove(client.subscriptions[uuid])
            if subscribes and isinstance(resource, str):
                small = len(uuid) <= WS_MAX_UUID and len(resource) <= WS_MAX_RESOURCE
                if small and len(client.subscriptions) < WS_MAX_SUBSCRIPTIONS:
                    subscription = _Subscription(client, uuid, resource)
                    self._add(subscription, message.get("since"))
        except Problem:
            return

    def _add(self, subscription: _Subscription, since: Any) -> None:
        import asyncio

        subscription.client.subscriptions[subscription.uuid] = subscription
        target = subscription.target
        if target is None:
            return
        watches = self._watches.setdefault((target.flow, target.run), {})
        watch = watches.get(target)
        if watch is None:
            watch = watches[target] = Watch(target, asyncio.Event())
            watch.task = asyncio.ensure_future(self._follow(watch))
        watch.subscriptions[subscription] = None
        begin = _since_seconds(since)
        if begin is not None:
            begin = max(begin - UNNOTICED, time.time() - REPLAY_SECONDS)
            watch.replays.append((subscription, int(min(begin, time.time()) * 1000)))
        watch.wake.set()

    def _remove(self, subscription: _Subscription) -> None:
        subscription.active = False
        subscription.client.subscriptions.pop(subscription.uuid, None)
        target = subscription.target
        watches = self._watches.get((target.flow, target.run), {}) if target else {}
        watch = watches.get(target) if target else None
        if watch is None or target is None:
            return
        watch.subscriptions.pop(subscription, None)
        if not watch.subscriptions:
            del watches[target]
            if not watches:
                del self._watches[target.flow, target.run]
            if watch.task is not None:
                watch.task.cancel()

    def stop(self) -> None:
        """Ends all watching."""
        for watches in self._watches.values():
            for watch in watches.values():
                if watch.task is not None:
                    watch.task.cancel()
        self._watches = {}

    # -- watching

    async def _follow(self, watch: Watch) -> None:
        """The life of a Watch: waits for an event or the next look, and pushes what has become different."""
        import asyncio
        import traceback

        loop = asyncio.get_running_loop()
        while True:
            timer = loop.call_later(WATCH_INTERVAL, watch.wake.set)
            await watch.wake.wait()
            timer.cancel()
            await asyncio.sleep(COALESCE)
            watch.wake.clear()
            try:
                if not watch.primed:
                    await self._prime(watch)
                while watch.replays:
                    await self._replay(watch, *watch.replays.pop(0))
                while watch.dirty:
                    node = next(iter(watch.dirty))
                    del watch.dirty[node]
                    await self._refresh(watch, node)
                if time.monotonic() >= watch.next_look:
                    await self._look(watch)
                    watch.next_look = time.monotonic() + WATCH_INTERVAL
            except Exception:  # one that goes wrong goes on with the next look
                self._log(traceback.format_exc())

    async def _prime(self, watch: Watch) -> None:
        """Takes what is there for known: subscribers have read it, or will. What an event marked they may not have."""
        pace = Pacer()
        for node, shown in await self._nodes(watch.target):
            if node not in watch.dirty:
                watch.known[node] = None
                if shown and not self._needs_events_only(watch, node):
                    made = await self._made(watch, node)
                    if node not in watch.dirty:
                        self._compare(watch, node, made)
                else:
                    watch.settled.add(node)
            await pace()
        watch.primed = True

    async def _nodes(self, target: Target) -> List[Tuple[Any, bool]]:
        """(node, whether it is worth looking at) of a target: of runs in general the newest of each flow."""
        nodes = await self._site.nodes(target)
        if target.kind != "runs" or target.run is not None:
            return [(node, True) for node in nodes]
        counts: collections.Counter[str] = collections.Counter()
        found = []
        for run in nodes:
            counts[run.flow] += 1
            found.append((run, counts[run.flow] <= WATCHED_RUNS))
        return found

    def _needs_events_only(self, watch: Watch, node: Any) -> bool:
        """Whether new metadata or artifacts of a task come with an event, or not at all."""
        if watch.target.kind not in ("metadata", "artifacts"):
            return False
        return self._is_ours(node.run) or self._is_settled(node, self._site.store.facts(node))

    async def _look(self, watch: Watch) -> None:
        """Makes again what no event tells of."""
        pace, nodes = Pacer(), await self._nodes(watch.target)
        if watch.target.kind == "runs":
            await self._site.store.check([node for node, shown in nodes if shown])
        if watch.target.kind == "tasks" and nodes:
            await self._state(watch, nodes[0][0].run)
        for node, _ in reversed(nodes):  # the oldest first, as they came
            if node not in watch.settled or node not in watch.known:
                await self._refresh(watch, node)
            await pace()
        for node in watch.known.keys() - {node for node, _ in nodes}:
            del watch.known[node]
            watch.settled.discard(node)

    async def _refresh(self, watch: Watch, node: Any) -> None:
        """Makes the rows of a node again and pushes those that differ."""
        fresh = self._compare(watch, node, await self._made(watch, node))
        for kind, row in await self._with_contents(watch, fresh):
            self._push(list(watch.subscriptions), kind, row)

    async def _with_contents(
        self, watch: Watch, fresh: List[Tuple[str, Record]]
    ) -> List[Tuple[str, Record]]:
        """Artifact rows with their values: the UI does not ask for those of artifacts that were pushed."""
        if watch.target.kind != "artifacts" or not fresh:
            return fresh
        try:
            contents = await self._site.reader.contents([row for _, row in fresh])
        except Problem:
            return fresh  # they say at least that the artifacts are there
        return [(kind, {**row, **content}) for (kind, row), content in zip(fresh, contents)]

    async def _made(self, watch: Watch, node: Any) -> List[Made]:
        """The rows of a node, the newest first, as this target shows them."""
        kind, state = watch.target.kind, None
        if kind == "tasks":
            facts = self._site.store.facts(node)
            state = None if attempt_is_over(facts) else await self._state(watch, node.run)
        made = await self._site.rows_of(kind, node, state)
        if kind == "tasks":
            made = await self._site.details(node, made)
        if self._settles(watch, node, made):
            watch.settled.add(node)
        else:
            watch.settled.discard(node)
        return made[:1] if watch.target.newest else made

    async def _state(self, watch: Watch, run: RunNode) -> RunStatus:
        """The status of a watched run, at most a second old."""
        if watch.state is None or time.monotonic() - watch.judged > 1.0:
            before, watch.judged = watch.status, time.monotonic()
            watch.state = await run_state(self._site, run)
            if before not in (
                None,
                watch.status,
            ):  # what was unfinished has ended with the run, or goes on
                watch.settled = {task for task in watch.settled if attempt_is_over(task.facts)}
        return watch.state

    def _compare(self, watch: Watch, node: Any, made: List[Made]) -> List[Tuple[str, Record]]:
        """("INSERT" or "UPDATE", row) of the rows that the subscribers do not know, oldest first; now they do."""
        kind, known = watch.target.kind, watch.known.get(node)
        unread = node in watch.known and known is None
        rows = watch.known[node] = {} if known is None else known
        appends = kind in ("metadata", "artifacts")
        fresh = []
        for key, _, row in reversed(made):
            before = rows.get(key)
            began = _began(row)
            if before is None:
                rows[key] = row if kind in ("runs", "tasks", "parameters") else {}
                if not watch.primed or (appends and (unread or not known) and began < watch.begun):
                    continue
                new = kind != "parameters" and (known is not None or began >= watch.begun)
                fresh.append(("INSERT" if new or appends else "UPDATE", row))
            elif before and _lasting(before) != _lasting(row):
                rows[key] = row
                fresh.append(("UPDATE", row))
        return fresh

    def _settles(self, watch: Watch, node: Any, made: List[Made]) -> bool:
        """Whether nothing of a node changes any more but by an event."""
        kind = watch.target.kind
        if kind in ("flows", "steps"):
            return True
        if kind == "parameters":
            return len(self._site.store.steps(node)) > 1  # what comes after them has begun
        if kind in ("metadata", "artifacts"):
            return self._needs_events_only(watch, node)
        if not made:
            return False
        if kind == "runs":
            return bool(made[0].row["status"] == COMPLETED)
        if kind == "tasks" and not attempt_is_over(node.facts):
            return made[0].row["finished_at"] is not None and watch.status not in (None, RUNNING)
        return self._is_ours(node.run) or self._is_settled(node, self._site.store.facts(node))

    def _is_settled(self, task: TaskNode, facts: TaskFacts) -> bool:
        """Whether a task finished so long ago that local mode writes nothing more about it."""
        if not attempt_is_over(facts):
            return False
        failed = facts.attempts[max(facts.attempts)].ok is False
        return _long_ago(facts.changed_at, FAILED_FOR_LONG if failed else SETTLED_AFTER)

    def _is_ours(self, run: RunNode) -> bool:
        """Whether a run is written through this service, so that every change comes as an event."""
        signs = self._site.store.signs(run)
        return (
            signs.heartbeat is not None
            or signs.lease is not None
            or self._site.liveness.alive(run) is True
        )

    # -- pushing

    def _push(self, subscriptions: Iterable[_Subscription], kind: str, row: Record) -> None:
        import asyncio

        try:
            text = dumps(row).decode("ascii")
        except (ValueError, RecursionError):
            return  # no row that could be told
        for subscription in subscriptions:
            if subscription.filters.patterns:
                asyncio.ensure_future(self._push_matching(subscription, kind, row, text))
                continue
            subscription.send(kind, row, text)
            if not subscription.active:
                self.disconnect(subscription.client)

    async def _push_matching(
        self, subscription: _Subscription, kind: str, row: Record, text: str
    ) -> None:
        """Pushes a row to a subscription with patterns, which are matched in another process."""
        try:
            await learn_patterns(subscription.filters, [row], self._site.reader.match)
        except Problem:
            return  # a pattern that is invalid or takes too long fits nothing
        subscription.send(kind, row, text)

    async def _replay(self, watch: Watch, subscription: _Subscription, begin: int) -> None:
        """Sends the rows, as they are now, of what changed since then (ms), while a client was away."""
        kind, found, pace = watch.target.kind, [], Pacer()
        for node, shown in await self._nodes(watch.target):
            known = watch.known.get(node) or {}
            if shown or known or (kind == "runs" and run_touched(node) >= begin):
                for made in await self._made(watch, node):
                    # What an event marked and nobody knows is pushed to everybody in a moment.
                    comes = node in watch.dirty and made.key not in known
                    if made.changed_at >= begin and not (comes and _began(made.row) >= watch.begun):
                        found.append(made)
            await pace()
        found.sort(key=lambda made: made.changed_at)
        fresh = [
            ("INSERT" if kind != "parameters" and _began(row) >= begin else "UPDATE", row)
            for _, _, row in found
        ]
        for change, row in await self._with_contents(watch, fresh):
            self._push([subscription], change, row)
            await pace()


def _began(row: Record) -> int:
    return row.get("started_at") or row.get("ts_epoch") or 0


def _lasting(row: Record) -> Record:
    """A row without what changes with every second of a running object."""
    if "last_heartbeat_ts" not in row:
        return row
    return {**row, "last_heartbeat_ts": None, "duration": row["finished_at"] and row["duration"]}


def _long_ago(at: Optional[int], ms: int) -> bool:
    return at is not None and now_ms() - at > ms


def _since_seconds(since: Any) -> Optional[float]:
    """The moment (s) that a SUBSCRIBE wants to be told from; None for 0 and for what is no number."""
    if isinstance(since, str) and is_number(since):
        since = int(since)
    return float(since) if type(since) in (int, float) and 0 < since < 1e15 else None


async def ui_socket(subscriptions: Subscriptions, socket: UiSocket) -> None:
    """Serves one WebSocket of the UI until it closes."""
    client = Client(socket)
    try:
        while True:
            text = await socket.receive()
            if text is None:
                return
            subscriptions.receive(client, text)
    finally:
        subscriptions.disconnect(client)


# ---- 14. UI API: what the official Metaflow UI asks (metaflow-service, its UI backend) ----
LOG_LIMIT, MAX_LOG_LIMIT = 1000, 10_000  # rows of a log page, as the UI backend has them

FEATURES = {
    "FEATURE_RUN_GROUPS": True,
    "FEATURE_ARTIFACT_TABLE": True,
    "FEATURE_ARTIFACT_SEARCH": True,
    "FEATURE_FOREACH_VAR_SEARCH": True,
}
# What the UI backend answers when nobody has configured links.
DEFAULT_LINKS = [
    {"href": "https://docs.metaflow.org/", "label": "Documentation"},
    {"href": "http://chat.metaflow.org/", "label": "Help"},
]
SEARCH_PATTERNS = (
    f"{API_PREFIX}/search/flows/{{flow}}/runs/{{run}}",
    f"{API_PREFIX}/flows/{{flow}}/runs/{{run}}/search",
)
_NEWEST_ATTEMPT: Order = (("attempt_id", True),)
_BY_TIME: Order = (("ts_epoch", True),)


def ui_list(
    request: Request,
    parts: Sequence[bytes],
    *,
    page: int = 1,
    has_more: bool = False,
    last_page: Optional[int] = None,
) -> Response:
    """The UI's envelope around rows that are JSON already."""
    shell = envelope(
        [],
        base_url(request.headers),
        request.path,
        request.args(),
        page=page,
        has_more=has_more,
        last_page=last_page,
    )
    del shell["data"]
    return Response(200, b'{"data": [' + b", ".join(parts) + b"], " + dumps(shell)[1:], JSON_TYPE)


def ui_one(request: Request, data: Any) -> Response:
    """The UI's envelope of a single object; what is missing (None) is {} with 404, as the UI backend has it."""
    status = 404 if data is None else 200
    base, args = base_url(request.headers), request.args()
    shell = envelope_one({} if data is None else data, base, request.path, args, status=status)
    return json_response(shell, status)


def _target_of(request: Request, kind: str) -> Target:
    """What a request's path asks for, within the step that a filter names."""
    get = request.params.get
    return narrowed(Target(kind, get("flow"), get("run"), get("step"), get("task")), request.args())


class UiApi:
    """Handlers of every route of the UI backend: the site makes the rows, filters and pages are of section 6."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.store = site.store
        self.settings = site.settings
        self.reader = site.reader

    # -- lists of rows and single ones

    async def _page(
        self, request: Request, kind: str, rows: Iterable[Row], first: Order = ()
    ) -> Tuple[List[Row], int, bool]:
        """(rows, number of the page, whether more follow): filtered, in order, cut."""
        query = parse_list_query(request.args(), UI_COLUMNS[kind], first=first)
        rows = list(rows) if query.filters.patterns else rows
        await learn_patterns(query.filters, rows, self.reader.match)
        pace, kept = Pacer(), []
        for row in rows:
            if matches(row, query.filters):
                kept.append(row)
            await pace()
        picked, more = arrange(kept, query)
        return picked, query.page, more

    def list_handler(self, kind: str, first: Order = ()) -> Callable[[Request], Any]:
        """GET of a list of flows, steps or metadata."""

        async def get_list(request: Request) -> Response:
            made = await self.site.rows(_target_of(request, kind))
            rows, page, more = await self._page(request, kind, (one.row for one in made), first)
            return ui_list(request, await encode_rows(rows), page=page, has_more=more)

        return get_list

    def one_handler(self, kind: str) -> Callable[[Request], Any]:
        """GET of a flow, run, step or task; of a task the newest attempt, whatever `attempt_id` says."""

        async def get_one(request: Request) -> Response:
            nodes = await self.site.nodes(_target_of(request, kind))
            made = await self.site.rows_of(kind, nodes[0]) if nodes else []
            if kind == "tasks" and request.arg("postprocess") == "true" and made:
                made = await self.site.details(nodes[0], made)
            return ui_one(request, made[0].row if made else None)

        return get_one

    async def get_artifacts(self, request: Request) -> Response:
        """GET .../artifacts of a task, step or run, of all attempts; with `postprocess=true` their values."""
        target = _target_of(request, "artifacts")
        if "step" not in request.params and asks_for_local_artifacts(target, request.args()):
            return ui_list(request, [])
        made = await self.site.rows(target)
        rows, page, more = await self._page(
            request, "artifacts", (one.row for one in made), _NEWEST_ATTEMPT
        )
        if request.arg("postprocess") == "true":
            contents = await self.reader.contents(rows)
            rows = [{**row, **content} for row, content in zip(rows, contents)]
        return ui_list(request, await encode_rows(rows), page=page, has_more=more)

    def tasks_handler(self, first: Order = ()) -> Callable[[Request], Any]:
        """GET of tasks, a row per attempt; the UI asks for some more of a run's by `taskId=1,2`."""

        async def get_tasks(request: Request) -> Response:
            rows: List[Row] = [
                made.row for made in await self.site.rows(_target_of(request, "tasks"))
            ]
            wanted = plain_values(request.args(), "taskId")
            if wanted is not None:
                rows = [row for row in rows if str(row["task_id"]) in wanted]
            picked, page, more = await self._page(request, "tasks", rows, first)
            if request.arg("postprocess") == "true":
                picked = [await self._detailed(row) for row in picked]
            return ui_list(request, await encode_rows(picked), page=page, has_more=more)

        return get_tasks

    async def _detailed(self, row: Row) -> Row:
        task = self.store.find_task(
            row["flow_id"],
            str(row["run_id"] or row["run_number"]),
            row["step_name"],
            str(row["task_name"] or row["task_id"]),
        )
        for made in (
            await self.site.details(task, await self.site.rows_of("tasks", task)) if task else ()
        ):
            if made.key == row["attempt_id"]:
                return made.row
        return row

    # -- runs

    async def _runs(
        self, flow: Optional[str], args: Args = (), most: Optional[int] = None
    ) -> List[RunNode]:
        """The runs of one flow, of those that a filter names, or of all; newest first, at least `most`."""
        named = plain_values(args, "flow_id")
        if flow is not None or named is None:
            return await self.site.nodes(Target("runs", flow), most)
        runs: List[RunNode] = []
        for name in named:
            runs += await self.site.nodes(Target("runs", name), most)
        return sorted(runs, key=lambda run: run.self_record.get("ts_epoch") or 0, reverse=True)

    async def get_runs(self, request: Request) -> Response:
        """GET /runs, /flows/{flow}/runs: finds the runs of the page, then makes their rows."""
        args = request.args()
        query = parse_list_query(args, UI_COLUMNS["runs"])
        by_time = not query.groups and tuple(query.order) in ((), _BY_TIME)
        enough = query.page * query.limit + 1 if by_time and query.limit else None
        most = None if query.filters else enough
        runs = await self._runs(request.params.get("flow"), args, most)
        views = await self._run_views(runs, query, enough)
        picked, more = arrange(views, query._replace(order=()) if by_time else query)
        made = [one for view in picked for one in await self.site.rows_of("runs", view[""])]
        parts = await encode_rows([one.row for one in made])
        return ui_list(request, parts, page=query.page, has_more=more)

    async def _run_views(
        self, runs: List[RunNode], query: ListQuery, enough: Optional[int]
    ) -> List[Row]:
        """The columns that the query looks at of the first `enough` runs that pass; the run itself is column ""."""
        columns, pace = [name for name in RUN_COLUMNS if name in query.columns], Pacer()
        if enough and not query.filters:
            columns = []  # they come in this order
        views: List[Row] = []
        if query.filters.patterns:
            every = [await run_view(self.site, run, columns, cheap=True) for run in runs]
            await learn_patterns(query.filters, every, self.reader.match)
        for run in runs:
            if query.filters and not await self.store.check([run]):
                continue
            view = await run_view(self.site, run, columns, cheap=True)
            view[""] = run
            if matches(view, query.filters):
                views.append(view)
                if len(views) == enough:
                    break
            await pace()
        return views

    async def get_parameters(self, request: Request) -> Response:
        """GET .../runs/{run}/parameters: an object {name: {"value"}}."""
        nodes = await self.site.nodes(_target_of(request, "parameters"))
        if not nodes:
            where = f"{request.params['flow']}/{request.params['run']}"
            raise Problem(404, f"there is no run {where}", id="run-not-found")
        made = await self.site.rows_of("parameters", nodes[0])
        return ui_one(request, made[0].row if made else {})

    async def get_dag(self, request: Request) -> Response:
        """GET .../runs/{run}/dag: `_graph_info`, or without one a graph of the steps that have begun."""
        run = self.store.run(request.params["flow"], request.params["run"])
        if run is None:
            return ui_one(request, None)
        records = await parameter_records(self.site, run)
        steps, pace, graph = [], Pacer(), None
        if any(record["name"] == "_graph_info" for record in records):
            graph = await self.reader.graph(records)
        if graph is None:
            for step in self.store.steps(run):
                tasks = await self.store.tasks(step)
                if tasks:
                    records = records + await self.store.artifacts(tasks[-1])
                    stack = self.store.facts(tasks[-1]).foreach_stack
                    steps.append((step.name, foreach_depth(stack=stack)))
                await pace()
            graph = await self.reader.graph(records, steps)
        return ui_one(request, graph)

    # -- logs

    def _task(self, request: Request) -> Optional[TaskNode]:
        params = request.params
        return self.store.find_task(params["flow"], params["run"], params["step"], params["task"])

    async def _log_of(
        self, request: Request
    ) -> Optional[Tuple[Tuple[str, str, str, str], int, Dict[str, Any]]]:
        """(task, attempt, where its datastore is) of a log request, None when there is no such attempt."""
        task = self._task(request)
        if task is None:
            return None
        attempts, text = self.store.facts(task).attempts, request.arg("attempt_id")
        attempt = max(attempts, default=0)
        if text is not None:
            if not is_number(text) or int(text[:6]) not in {0, *attempts}:
                return None
            attempt = int(text)
        facts = self.store.facts(task).attempts.get(attempt)
        ended = max(facts.ok_at or 0, facts.done_at or 0) if facts else 0
        place: Dict[str, Any] = {"ds_type": None, "ds_root": None}
        for record in await self.store.metadata(task):
            field = str(record.get("field_name")).replace("-", "_")
            if field in place and place[field] is None:
                if attempt_of_tags(record.get("tags")) in (attempt, None):
                    place[field] = record.get("value")
        place["expected"] = now_ms() - ended < LOG_PATIENCE * 1000
        return _path_of(task), attempt, place

    def log_handler(self, stream: str) -> Callable[[Request], Any]:
        """GET .../logs/out or .../logs/err: a page of rows; stream is "stdout" or "stderr"."""

        async def get_log(request: Request) -> Response:
            found = await self._log_of(request)
            if found is None:
                return json_response({"data": []}, 404)  # the UI shows an empty log
            task, attempt, place = found
            args = request.args()
            page, limit = parse_page(args, default_limit=LOG_LIMIT, max_limit=MAX_LOG_LIMIT)
            reverse = ("row", True) in list(parse_order(args, ("row",)))[:1]
            log = await self.reader.log_page(
                task, attempt, stream, limit=limit, page=page, reverse=reverse, **place
            )
            more = page < log.pages
            return ui_list(request, log.rows, page=page, has_more=more, last_page=log.pages)

        return get_log

    def download_handler(self, stream: str) -> Callable[[Request], Any]:
        """GET .../logs/{out,err}/download: the whole log as a file."""

        async def get_download(request: Request) -> Response:
            found = await self._log_of(request)
            if found is None:
                return json_response({"data": []}, 404)
            task, attempt, place = found
            pieces = await self.reader.log_download(task, attempt, stream, **place)
            name = log_file_name(task, attempt, stream)
            headers = [("Content-Disposition", f"Attachment;filename={name}")]
            return Response(200, b"", "application/octet-stream", headers, stream=pieces)

        return get_download

    # -- cards

    async def _card_tasks(self, request: Request) -> List[Tuple[str, str, str, str]]:
        """The task, and those that it is a clone of by `resume`: Metaflow clones no cards."""
        task = self._task(request)
        places: List[Tuple[str, str, str, str]] = []
        while task is not None and len(places) < MAX_CLONES:
            flow, step = task.run.flow, task.step.name
            places.append(_path_of(task))
            origin = {
                str(r.get("field_name")): str(r.get("value"))
                for r in await self.store.metadata(task)
            }
            run_id, task_id = origin.get("origin-run-id"), origin.get("origin-task-id")
            run = self.store.run(flow, run_id) if run_id and task_id else None
            place = self.store.step(run, step) if run else None
            task = self.store.task(place, task_id) if place and task_id else None
        return places

    async def get_cards(self, request: Request) -> Response:
        """GET .../cards: always with the envelope, since the UI reads `status` in it."""
        cards: List[Record] = []
        places = await self._card_tasks(request)
        if not places:
            return json_response({"data": []}, 404)
        for place in places:
            cards = cards or await self.reader.cards(place)
        page, limit = parse_page(request.args(), default_limit=MAX_PAGE_LIMIT)
        limit = limit or max(len(cards), 1)
        last = max(-(-len(cards) // limit), 1)
        parts = await encode_rows(cards[(page - 1) * limit : page * limit])
        return ui_list(request, parts, page=page, has_more=page < last, last_page=last)

    async def get_card(self, request: Request) -> Response:
        """GET .../cards/{hash}: the card's HTML, which only pages of this machine and allowed ones may frame."""
        places, html = await self._card_tasks(request), None
        if not places:
            return text_response("There is no such task.", 404)
        for place in places:
            html = html or await self.reader.card(place, request.params["hash"])
        if html is None:
            return text_response("There is no such card yet. It may still be in the making.", 404)
        local = ("'self'", "http://localhost:*", "http://127.0.0.1:*")
        ancestors = " ".join([*local, *self.settings.allowed_origins])
        headers = [
            ("Cache-Control", "no-cache"),
            ("Content-Security-Policy", f"frame-ancestors {ancestors}"),
        ]
        return Response(200, b"", "text/html; charset=utf-8", headers, stream=html)

    async def get_card_data(self, request: Request) -> Response:
        """GET .../cards/{hash}/data: what a card that changes while its task runs shows now."""
        data = None
        for place in await self._card_tasks(request):
            data = data or await self.reader.card_data(place, request.params["hash"])
        if data is None:
            return json_response({"error": "there is no data for this card yet"}, 404)
        return Response(200, data, JSON_TYPE)

    # -- tags and completion

    async def _all_tags(self) -> List[str]:
        tags: Set[str] = set()
        pace = Pacer()
        for run in await self.store.check(await self._runs(None)):
            record = run.self_record
            for key in ("tags", "system_tags"):
                tags.update([tag for tag in record.get(key) or () if isinstance(tag, str)])
            await pace()
        return sorted(tags)

    async def get_tags(self, request: Request) -> Response:
        """GET /tags: a bare list of all tags and system tags of runs."""
        return json_response(await self._all_tags())

    async def _complete(self, request: Request, column: str, values: Sequence[str]) -> Response:
        """A page of the values that pass the filters on `column`: bare strings in the envelope."""
        query = parse_list_query(request.args(), {column: "str"})
        pace, found = Pacer(), []
        every = [{column: value} for value in values]
        await learn_patterns(query.filters, every, self.reader.match)
        for row in every:
            if matches(row, query.filters):
                found.append(row)
            await pace()
        picked, more = arrange(found, query._replace(order=(), groups=[]))
        parts = [dumps(row[column]) for row in picked]
        return ui_list(request, parts, page=query.page, has_more=more)

    async def complete_tags(self, request: Request) -> Response:
        """GET /tags/autocomplete?tag:co=x."""
        return await self._complete(request, "tag", await self._all_tags())

    async def complete_flows(self, request: Request) -> Response:
        """GET /flows/autocomplete?flow_id:co=x."""
        names = sorted([flow.name for flow in await self.store.flows()])
        return await self._complete(request, "flow_id", names)

    async def complete_runs(self, request: Request) -> Response:
        """GET /flows/{flow}/runs/autocomplete?run:co=x, newest first."""
        runs = await self._runs(request.params["flow"])
        return await self._complete(request, "run", [run.id for run in runs])

    async def complete_steps(self, request: Request) -> Response:
        """GET .../steps/autocomplete?step_name:co=x."""
        steps = await self.site.nodes(_target_of(request, "steps"))
        return await self._complete(request, "step_name", sorted([step.name for step in steps]))

    async def complete_artifacts(self, request: Request) -> Response:
        """GET .../artifacts/autocomplete?name:co=x: from some tasks of every step."""
        names: Set[str] = set()
        for step in await self.site.nodes(_target_of(request, "steps")):
            for task in (await self.store.tasks(step))[:COMPLETED_TASKS]:
                for made in await self.site.rows_of("artifacts", task):
                    names.add(made.row["name"])
        return await self._complete(request, "name", sorted(names))

    # -- the UI's own configuration

    def get_notifications(self, request: Request) -> Response:
        """GET /notifications: a bare list from a file, filtered by `field[:op]=`; null passes every test."""
        found = [_notification(entry) for entry in read_json_list(self.settings.notifications)]
        args = request.args()
        rows = [row for row in found if row is not None and all(_announced(row, a) for a in args)]
        return json_response(rows)

    def get_links(self, request: Request) -> Response:
        """GET /links: a bare list of {href, label} from the links file."""
        if not self.settings.links:
            return json_response(DEFAULT_LINKS)
        entries = read_json_list(self.settings.links)
        texts = [(entry.get("href"), entry.get("label")) for entry in entries]
        good = [isinstance(href, str) and isinstance(label, str) for href, label in texts]
        return json_response([entry for entry, is_link in zip(entries, good) if is_link])

    def get_plugins(self, request: Request) -> Response:
        """GET /plugin: a bare list; the UI dies of anything else."""
        return json_response([plugin for plugin, _ in self._plugins()])

    def _plugins(self) -> Iterator[Tuple[Record, str]]:
        """(what is told, directory) of each {"path", "name"?, "parameters"?} in the plugins file."""
        base = os.path.dirname(self.settings.plugins or "")
        for entry in read_json_list(self.settings.plugins):
            if not isinstance(entry.get("path"), str):
                continue
            folder = os.path.realpath(os.path.join(base, entry["path"]))
            try:
                paths = {name: os.path.join(folder, name) for name in os.listdir(folder)}
                files = sorted(name for name, path in paths.items() if os.path.isfile(path))
                manifest = os.path.join(folder, "manifest.json")
                config = json.loads(read_regular(manifest, CONFIG_FILE_BYTES, follow=True))
            except (OSError, ValueError, RecursionError):
                continue
            if isinstance(config, dict) and isinstance(config.get("name", entry.get("name")), str):
                name = entry.get("name") if isinstance(entry.get("name"), str) else config["name"]
                told = {
                    "identifier": name, "name": name, "repository": None, "ref": None,
                    "parameters": entry.get("parameters") or {}, "config": config, "files": files,
                }  # fmt: skip
                yield told, folder

    def get_plugin(self, request: Request) -> Response:
        """GET /plugin/{name} and /plugin/{name}/{file}: no links, and nothing below the plugin's directory."""
        file = request.params.get("file")
        for plugin, folder in self._plugins():
            if plugin["name"] == request.params["name"]:
                if file is None:
                    return json_response(plugin)
                if file not in plugin["files"]:
                    return text_response("File not found", 404)
                return _plugin_file(request, os.path.join(folder, file))
        return json_response("Plugin not found", 404)


def _path_of(task: TaskNode) -> Tuple[str, str, str, str]:
    return task.run.flow, task.run.id, task.step.name, task.id


def read_json_list(path: Optional[str]) -> List[Record]:
    """The objects of a JSON file that holds a list; [] without a file and for one that cannot be used.

    Never an error: the UI does not start with one here.
    """
    try:
        value = json.loads(read_regular(path, CONFIG_FILE_BYTES, follow=True)) if path else []
    except (OSError, ValueError, RecursionError):
        return []
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _notification(entry: Record) -> Optional[Record]:
    """A notification with all its fields; None without a message or a time."""
    import hashlib

    created = entry.get("created", entry.get("start"))
    message = entry.get("message")
    if not isinstance(message, str) or type(created) not in (int, float):
        return None
    own = hashlib.sha1(dumps([message, created]), usedforsecurity=False).hexdigest()
    return {
        "id": str(entry.get("id") or own),
        "type": entry.get("type") or "info",
        "contentType": entry.get("contentType") or "text",
        "message": message,
        "url": entry.get("url"),
        "urlText": entry.get("urlText"),
        "created": created,
        "start": entry.get("start"),
        "end": entry.get("end"),
    }


_ANNOUNCED = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}


def _announced(row: Record, arg: Tuple[str, str]) -> bool:
    """Whether a notification passes one query parameter; unknown fields and operators test nothing."""
    field, _, op = arg[0].partition(":")
    value, test = row.get(field), _ANNOUNCED.get(op or "eq")
    if value is None or test is None:
        return True
    try:
        return bool(test(value, arg[1] if isinstance(value, str) else float(arg[1])))
    except ValueError:
        return False


def _plugin_file(request: Request, path: str) -> Response:
    import mimetypes

    kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
    try:
        file = os.fdopen(open_regular(path, limit=PLUGIN_FILE_BYTES), "rb", buffering=0)
    except OSError:
        return text_response("File not found", 404)
    return file_response(request, file, os.fstat(file.fileno()).st_size, kind)


# -- search


class _Search:
    """One search over its WebSocket: messages of progress, then one result."""

    def __init__(self, site: Site, socket: UiSocket, run: Optional[RunNode]) -> None:
        self.store = site.store
        self.reader = site.reader
        self.socket = socket
        self.run = run
        self.fraction = 0.0

    def say(self, **event: Any) -> bool:
        """Sends one event; False when nobody listens any more."""
        return self.socket.send_text(dumps({"event": event}).decode("ascii"))

    def progress(self, done: int, total: int) -> bool:
        """Tells how far the search is, in steps of at least 5 %."""
        fraction = done / total if total else 1.0
        if fraction < 1.0 and fraction - self.fraction < 0.05:
            return True
        self.fraction = fraction
        return self.say(type="progress", fraction=fraction)

    async def matches(
        self, scopes: Sequence[str], key: str, value: Optional[str]
    ) -> Optional[List[Record]]:
        """The first match of each task, a searchable one if there is one; None when the client has gone."""
        found = await self.foreach(key, value) if "FOREACH_VARIABLE" in scopes else []
        artifacts = await self.artifacts(key, value) if "ARTIFACT" in scopes else []
        if artifacts is None:
            return None
        tasks: Dict[Tuple[str, str], Record] = {}
        for match in found + artifacts:
            place = (match["step_name"], match["task_id"])
            if place not in tasks or (match["searchable"] and not tasks[place]["searchable"]):
                tasks[place] = match
        return list(tasks.values())

    async def artifacts(self, key: str, value: Optional[str]) -> Optional[List[Record]]:
        """Matches among the newest attempts' artifacts called `key`; None when the client has gone."""
        tasks = await self.store.run_tasks(self.run) if self.run else []
        found: List[Record] = []
        waiting: List[Record] = []
        for place, task in enumerate(tasks, 1):
            records = await self.store.artifacts(task)
            newest = records[0]["attempt_id"] if records else 0
            waiting += [r for r in records if r["name"] == key and r["attempt_id"] == newest]
            if len(waiting) >= SEARCH_SLICE or place == len(tasks):
                hits = await self.reader.search(waiting, value)
                found += [hit for hit in hits if hit is not None]
                waiting = []
            if not self.progress(place, len(tasks)):
                return None
        return found

    async def foreach(self, key: str, value: Optional[str]) -> List[Record]:
        """Matches among the foreach variables of tasks."""
        found = []
        for task, facts in await self.store.run_facts(self.run) if self.run else []:
            if facts.foreach_stack is not None:
                flow, run, step, id = _path_of(task)
                record = {
                    "flow_id": flow, "run_number": run, "step_name": step, "task_id": id,
                    "value": facts.foreach_stack,
                }  # fmt: skip
                match = search_foreach(record, key, value)
                if match is not None:
                    found.append(match)
        return found


async def search_socket(site: Site, socket: UiSocket) -> None:
    """Serves one search: ?key=NAME[&value=V][&scope=ARTIFACT,FOREACH_VARIABLE]."""
    import asyncio

    request = socket.request
    run = site.store.run(request.params["flow"], request.params["run"])
    search = _Search(site, socket, run)
    key, value = request.arg("key"), request.arg("value")
    scopes = (request.arg("scope") or "ARTIFACT").split(",")
    if not key or not {"ARTIFACT", "FOREACH_VARIABLE"}.intersection(scopes):
        detail = "the scope is ARTIFACT or FOREACH_VARIABLE" if key else "the search needs a key"
        search.say(type="error", message=detail, id="invalid-search", traceback=None, key=key)
        socket.close(1000 if key else 1011, detail)
        return
    # Pings are answered, and the end of the client is noticed, only while somebody reads.
    closed = asyncio.ensure_future(_until_closed(socket))
    work = asyncio.ensure_future(search.matches(scopes, key, value))
    try:
        await asyncio.wait((closed, work), return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            found = work.result()
            if found is not None:
                search.say(type="result", matches=found)
                socket.close(1000)
    finally:
        closed.cancel()
        work.cancel()
        await asyncio.wait((closed, work))


async def _until_closed(socket: UiSocket) -> None:
    """Reads, and drops, what the client of a search sends."""
    try:
        while await socket.receive() is not None:
            pass
    except Exception:
        pass  # whatever it was: the client cannot be heard any more


# -- routes


def register_ui_routes(router: Router, site: Site) -> None:
    """Adds every route of the UI backend but the WebSockets and /metadata."""
    api = UiApi(site)
    run, step = "/flows/{flow}/runs/{run}", "/flows/{flow}/runs/{run}/steps/{step}"
    task = step + "/tasks/{task}"
    features, config = json_response(FEATURES), json_response({})
    version = text_response(f"{SERVICE_VERSION}-mflocal-{VERSION}")
    pong = text_response("pong")
    routes: List[Tuple[str, Callable[[Request], Any]]] = [
        ("/flows", api.list_handler("flows")),
        ("/flows/autocomplete", api.complete_flows),
        ("/flows/{flow}", api.one_handler("flows")),
        ("/runs", api.get_runs),
        ("/flows/{flow}/runs", api.get_runs),
        ("/flows/{flow}/runs/autocomplete", api.complete_runs),
        (run, api.one_handler("runs")),
        (run + "/parameters", api.get_parameters),
        (run + "/dag", api.get_dag),
        (run + "/metadata", api.list_handler("metadata")),
        (run + "/artifacts", api.get_artifacts),
        (run + "/artifacts/autocomplete", api.complete_artifacts),
        (run + "/tasks", api.tasks_handler()),
        (run + "/steps", api.list_handler("steps")),
        (run + "/steps/autocomplete", api.complete_steps),
        (step, api.one_handler("steps")),
        (step + "/artifacts", api.get_artifacts),
        (step + "/tasks", api.tasks_handler(_NEWEST_ATTEMPT)),
        (task, api.one_handler("tasks")),
        (task + "/attempts", api.tasks_handler(_NEWEST_ATTEMPT)),
        (task + "/metadata", api.list_handler("metadata")),
        (task + "/artifacts", api.get_artifacts),
        (task + "/logs/out", api.log_handler("stdout")),
        (task + "/logs/err", api.log_handler("stderr")),
        (task + "/logs/out/download", api.download_handler("stdout")),
        (task + "/logs/err/download", api.download_handler("stderr")),
        (task + "/cards", api.get_cards),
        (task + "/cards/{hash}", api.get_card),
        (task + "/cards/{hash}/data", api.get_card_data),
        ("/tags", api.get_tags),
        ("/tags/autocomplete", api.complete_tags),
        ("/features", lambda request: features),
        ("/config", lambda request: config),
        ("/ping", lambda request: pong),
        ("/version", lambda request: version),
        ("/links", api.get_links),
        ("/notifications", api.get_notifications),
        ("/plugin", api.get_plugins),
        ("/plugin/{name}", api.get_plugin),
        ("/plugin/{name}/{file}", api.get_plugin),
    ]
    for pattern, handler in routes:
        router.add("GET", API_PREFIX + pattern, handler)


# ---- 15. Server: connections, deadlines, access, draining ----
#
# 1. A Connection parses what its client sends and answers one request at a time, in order; meanwhile little
#    more is read. An answer that is ready and short leaves at once; for all else there is a task, which waits
#    for the handler and then sends as fast as the client reads.
# 2. What reads for a client that has gone is cancelled; what writes is finished.
# 3. Each connection has one deadline, by what it waits for. Bodies and unsent answers also have bounds over all
#    connections together.
# 4. Every end that the client causes (of its bytes, a reset, an error while writing to it) is told to Liveness
#    as the client's, whatever was going on; what we end ourselves says nothing about the client.

# What a build of the UI consists of; the system's own table differs from machine to machine.
UI_TYPES = {
    "html": "text/html; charset=utf-8", "js": "text/javascript; charset=utf-8", "css": "text/css; charset=utf-8",
    "txt": "text/plain; charset=utf-8", "json": "application/json", "webmanifest": "application/manifest+json",
    "svg": "image/svg+xml", "png": "image/png", "ico": "image/x-icon", "jpg": "image/jpeg", "gif": "image/gif",
    "webp": "image/webp", "woff": "font/woff", "woff2": "font/woff2", "ttf": "font/ttf",
}  # fmt: skip


class Takeover(NamedTuple):
    """What a handler returns instead of a Response when it wants the connection for a WebSocket."""

    run: Callable[[WebSocket], Awaitable[None]]


class Connection:
    """One client's TCP connection, an asyncio protocol."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._parser = RequestParser()
        self._transport: Any = None
        self.websocket: Optional[WebSocket] = None
        self.other_user: Optional[int] = None  # who is at the other end, if it must bring the key
        self.address = ""  # ours, as this client reached it
        self.is_lease = False  # no limit on silence
        self.working = False  # a request that counts as use is being answered
        self._task: Optional[asyncio.Task[None]] = None  # waits for a handler, or sends
        self._handling: Optional[Request] = None  # whose handler the task waits for
        self._room: Optional[asyncio.Future[None]] = None  # while what was written waits in memory
        self._ended = False  # the client has sent its last byte
        self._parting = False  # nothing more is read; what is left is being sent
        self._lost = False  # it is over
        self._closed_by_us = False  # so that its end says nothing about the client
        self._answers = 0
        self._first_answer = 0.0  # monotonic s
        self._held = 0  # bytes of request bodies counted in the service's sum
        self._unsent = -1  # bytes that waited for a slow reader at the last deadline
        self._deadline = 0.0  # monotonic s
        self._timer: Optional[asyncio.TimerHandle] = None

    # -- what asyncio calls

    def connection_made(self, transport: Any) -> None:
        """The client has connected."""
        self._transport = transport
        address = str(transport.get_extra_info("sockname")[0]).partition("%")[0]
        self.address = address[7:] if address.startswith("::ffff:") else address
        self.expect(KEEP_ALIVE_TIMEOUT)
        if len(self._service.connections) >= self._service.limit:
            problem = Problem(503, "too many connections", close=True)
            transport.write(problem_response(problem).encode(None))
            return self._close()
        self._service.connections.add(self)
        if self._service.settings.auth_key is None:
            self.other_user = other_user(
                transport.get_extra_info("sockname"), transport.get_extra_info("peername")
            )

    def data_received(self, data: bytes) -> None:
        """Bytes came."""
        if self._parting:
            return
        if self.websocket is not None:
            self.websocket.feed(data)
        else:
            self._parser.feed(data)
            if self._task is None:
                self._advance()
            elif self._parser.buffered > READ_SIZE:
                self._transport.pause_reading()

    def eof_received(self) -> bool:
        """The client sends no more; it may still read (True keeps the connection open for that)."""
        self._ended = True
        self._parser.eof()
        if self.websocket is not None:
            self.websocket.end()
        elif self._task is None and not self._parting:
            self._advance()
        elif self._handling is not None:
            self.expect(HALF_CLOSED)
        return not self._parting

    def connection_lost(self, error: Optional[Exception]) -> None:
        """The end, whoever caused it."""
        service, liveness = self._service, self._service.liveness
        service.connections.discard(self)
        self._lost = True
        self._count_body(0)
        if self._timer is not None:
            self._timer.cancel()
        if self.websocket is not None:
            self.websocket.end()
        elif self._task is not None and (self._handling is None or self._cancellable()):
            self._task.cancel()
        ours = self._closed_by_us or service.draining or self._made_one_request()
        liveness.connection_closed(self, by_client=not ours)

    def pause_writing(self) -> None:
        """More waits for the client than should."""
        self._room = self._service.loop.create_future()

    def resume_writing(self) -> None:
        """The client has read."""
        if self._room is not None and not self._room.done():
            self._room.set_result(None)
        self._room = None
        if self.websocket is not None:
            self.websocket.room()
        else:
            self.expect(WRITE_TIMEOUT)

    # -- requests

    def _advance(self) -> None:
        """Answers what has come, in order, until more bytes or more time are needed."""
        for _ in range(REQUESTS_IN_ROW):
            if self._task is not None or self.is_over:
                return
            try:
                request = self._parser.next()
                self._count_body(self._parser.held if request is None else len(request.body))
            except Problem as problem:
                return self._close() if self._ended else self._refuse(problem)
            if request is None:
                return self._await_bytes()
            self._answer(request)
        self._service.loop.call_soon(self._advance)  # others have their turn

    def _await_bytes(self) -> None:
        """Sets the deadline by what is awaited; a head has one for the whole of it."""
        parser = self._parser
        if self._ended or parser.done:
            return self._close()
        if parser.wants_continue and parser.pending is not None:
            parser.wants_continue = False
            try:
                self._service.admit(parser.pending, self)
            except Problem as problem:
                return self._refuse(problem)
            self._transport.write(CONTINUE)
        phase = parser.phase
        if phase == "body":
            self.expect(BODY_TIMEOUT)
        elif phase == "idle":
            self.expect(KEEP_ALIVE_TIMEOUT)
        elif self._deadline > time.monotonic() + HEADER_TIMEOUT:
            self.expect(HEADER_TIMEOUT)

    def _count_body(self, size: int) -> None:
        """Counts the bytes of bodies that are here and not answered; Problem 503 beyond what all may have."""
        service = self._service
        service.bodies += size - self._held
        self._held = size
        if size > SMALL_BODY and service.bodies > MAX_BODIES:
            raise Problem(
                503, "too many large requests at once", close=True, headers={"Retry-After": "1"}
            )

    def _answer(self, request: Request) -> None:
        """Calls the handler."""
        service = self._service
        request.connection = self
        # What the daemon is asked about itself is no use of it.
        self.working = not request.path.startswith(CONTROL_PREFIX)
        self.expect(WRITE_TIMEOUT)
        extra: Headers = ()
        began = time.perf_counter()
        try:
            extra = service.admit(request, self)
            result = service.router.dispatch(request)
        except Exception as error:
            result = service.failure(request, error)
        if isinstance(result, Response) and result.is_short and self._room is None:
            self._answered(request, self._write(request, result, extra), result.status, began)
        else:
            self._task = service.loop.create_task(self._complete(request, result, extra, began))

    async def _complete(self, request: Request, result: Any, extra: Headers, began: float) -> None:
        """Waits for the handler's answer and sends it as fast as the client reads."""
        import traceback

        keep, status = False, 0
        try:
            if not isinstance(result, (Response, Takeover)):
                self._handling = request
                try:
                    result = await result
                except Exception as error:
                    result = self._service.failure(request, error)
                finally:
                    self._handling = None
            if isinstance(result, Takeover):
                try:
                    headers = websocket_handshake(request)
                except Problem as problem:
                    result = problem_response(problem)
                else:
                    return await self._serve_websocket(request, result, [*headers, *extra])
            status = result.status
            keep = await self._send(request, result, extra)
        except Exception:  # the answer has begun: it can only be cut off
            self._service.log(f"{request.method} {request.path}\n{traceback.format_exc()}")
            self.abort()
        finally:
            self._task = None
            self._answered(request, keep, status, began)
            if not self.is_over:
                self._transport.resume_reading()
                self._service.loop.call_soon(self._advance)

    def _write(self, request: Request, response: Response, extra: Headers) -> bool:
        """Writes an answer, or its head if it is not short; False when the connection must end with it."""
        close = self._service.draining
        try:
            data = response.encode(request, close=close, extra=extra)
        except ValueError as error:  # a header that would break the framing
            self._service.log(f"{request.method} {request.path}: {error}")
            problem = Problem(500, "the answer cannot be sent; see `mflocal logs`")
            response.body, response.stream, response.headers = dumps(problem.body()), None, []
            response.status, response.content_type = problem.status, JSON_TYPE
            data = response.encode(request, close=close)
        self._transport.write(data)
        return response.keeps_alive(request) and not close

    async def _send(self, request: Request, response: Response, extra: Headers) -> bool:
        """Sends an answer piece by piece; False when the connection must end with it."""
        service, cost = self._service, response.cost
        close_stream = getattr(response.stream, "aclose", None)
        if cost and service.unsent and service.unsent + cost > MAX_UNSENT:
            detail = "too many long answers wait for clients that do not read"
            problem = Problem(503, detail, headers={"Retry-After": "1"})
            response, cost = problem_response(problem), 0
        service.unsent += cost
        try:
            if self._lost:
                return False
            keep = self._write(request, response, extra)
            if not response.is_short and request.method != "HEAD":
                async for piece in response.pieces(request):
                    await self._drained()
                    self._transport.write(piece)
            await self._drained()
            return keep
        finally:
            service.unsent -= cost
            if close_stream is not None:
                await close_stream()

    async def _drained(self) -> None:
        if self._room is not None:
            await self._room

    def _answered(self, request: Request, keep: bool, status: int, began: float) -> None:
        self.working = False
        self._count_body(0)
        self._answers += 1
        if self._answers == 1:
            self._first_answer = time.monotonic()
        service = self._service
        if service.settings.debug:
            took = (time.perf_counter() - began) * 1e3
            service.log(f"{request.method} {request.path} {status} {took:.1f} ms")
        if not keep:
            self._close(linger=self.websocket is not None)

    async def _serve_websocket(
        self, request: Request, takeover: Takeover, headers: List[Tuple[str, str]]
    ) -> None:
        self.websocket = websocket = WebSocket(self, self._transport, self._service, request)
        self._transport.write(Response(101, headers=headers).encode())
        websocket.feed(self._parser.rest())
        try:
            await takeover.run(websocket)
        finally:
            websocket.close(1000)
            self._service.touch()

    # -- deadlines and ends

    def expect(self, seconds: float) -> None:
        """Sets the deadline. A timer that is set already is left alone if it comes earlier."""
        self._deadline = time.monotonic() + seconds
        if self._lost:
            return
        if self._timer is None or self._timer.when() > self._deadline:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._service.loop.call_at(self._deadline, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        left = self._deadline - time.monotonic()
        if left > 0:
            self.expect(left)
        elif self.websocket is not None and not self._parting:
            self.websocket.on_silence()
        else:
            self._on_deadline()

    def _on_deadline(self) -> None:
        """Ends what has been waited for too long, unless the client has read something meanwhile."""
        unsent = self.unsent
        if unsent and unsent != self._unsent:
            self._unsent = unsent
            self.expect(WRITE_TIMEOUT)
        elif self._parting or unsent:
            self.abort()
        elif self._task is not None:
            if self._ended and self._cancellable():
                self._task.cancel()
            else:
                self.expect(WRITE_TIMEOUT)
        elif self._parser.phase != "idle":
            self._refuse(Problem(408, "the request did not arrive in time", close=True))
        elif self.is_lease or self._service.liveness.must_stay_open(self):
            self.expect(KEEP_ALIVE_TIMEOUT)
        else:
            self._close()

    def _cancellable(self) -> bool:
        """Whether a handler is at work that only reads: what writes is never left half done."""
        return self._handling is not None and self._handling.method in SAFE_METHODS

    def _refuse(self, problem: Problem) -> None:
        """The last answer to a client that may still be sending."""
        self._parser.rest()
        self._count_body(0)
        self._transport.write(problem_response(problem).encode(None))
        self._close(linger=True)

    def _close(self, linger: bool = False) -> None:
        """Ends the connection once all is sent.

        To close while the client still sends is a reset, which would overtake the answer that says why:
        with `linger`, what it sends is dropped for a while.
        """
        self._closed_by_us = self._closed_by_us or not self._ended
        self._parting = True
        if linger and not self._ended and not self._transport.is_closing():
            self._transport.resume_reading()
            self._transport.write_eof()
            self.expect(LINGER_TIMEOUT)
        else:
            self._transport.close()
            self.expect(WRITE_TIMEOUT)

    def abort(self) -> None:
        """Ends the connection at once, by our own decision."""
        self._closed_by_us = True
        self._parting = True
        self._transport.abort()

    def drain(self) -> None:
        """Ends the connection as soon as what has begun is done."""
        self._closed_by_us = True
        if self._parting:
            return
        if self.websocket is not None:
            self.websocket.close(1001, "the service stops")
        elif self._task is None and not self._parser.in_message:
            self._close()

    @property
    def is_over(self) -> bool:
        """Whether nothing can be written any more."""
        return self._parting or bool(self._transport.is_closing())

    @property
    def unsent(self) -> int:
        """Bytes that were written and wait for the client."""
        return int(self._transport.get_write_buffer_size())

    def _made_one_request(self) -> bool:
        """Whether the client made one request and left, as clients do that keep no connections (curl)."""
        cut_off = self._parser.cut_off or self._parser.in_message
        recent = time.monotonic() - self._first_answer < ONE_SHOT
        return self._answers == 1 and recent and not cut_off


class WebSocket:
    """An open WebSocket, as the handlers of the UI use it."""

    def __init__(
        self, connection: Connection, transport: Any, service: Service, request: Request
    ) -> None:
        self.request = request
        self._connection = connection
        self._transport = transport
        self._service = service
        self._protocol = WebSocketProtocol()
        self._texts: collections.deque[str] = collections.deque()
        self._waiter: Optional[asyncio.Future[None]] = None  # of receive()
        self._over = False  # nothing more will come
        self._pong: Optional[bytes] = None  # payload of a ping that is answered when there is room
        self._pinged = False
        self._unsent = 0  # bytes that waited for the client when it was last looked at
        connection.expect(WS_PING_INTERVAL)

    async def receive(self) -> Optional[str]:
        """The next text message, None when the socket is closed."""
        while not self._texts:
            if self._over:
                return None
            self._transport.resume_reading()
            self._waiter = self._service.loop.create_future()
            await self._waiter
        return self._texts.popleft()

    def feed(self, data: bytes) -> None:
        """Takes what the client has sent."""
        if not data or self._over:
            return
        self._pinged = False
        self._connection.expect(WS_PING_INTERVAL)
        for event in self._protocol.feed(data):
            if isinstance(event, Text):
                self._texts.append(event.data)
            elif isinstance(event, Ping):
                self._pong = event.payload
            elif isinstance(event, Close):
                self._transport.write(self._protocol.close(event.code, event.reason))
                self._over = True
        if self._connection.unsent <= SEND_SIZE:
            self.room()
        if self._texts and not self._over:
            self._transport.pause_reading()  # until the handler has taken them
        self._wake()

    def room(self) -> None:
        """The client has read: the newest of its pings is answered (RFC 6455, 5.5.3)."""
        if self._pong is not None and not self._connection.is_over:
            self._transport.write(self._protocol.pong(self._pong))
        self._pong = None

    def end(self) -> None:
        """The client sends no more."""
        self._over = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def send_text(self, text: Union[str, bytes]) -> bool:
        """Queues a message without waiting; False when the client is gone, or too slow and therefore dropped."""
        if self._connection.is_over:
            return False
        self._transport.write(self._protocol.send_text(text))
        size = self._connection.unsent
        if size > WS_MAX_QUEUE or (
            size > WS_SMALL_QUEUE and self._service.bytes_waiting() > WS_ALL_QUEUES
        ):
            self._connection.abort()
            return False
        return True

    def close(self, code: int = 1000, reason: str = "") -> None:
        """Begins or answers the closing handshake."""
        if not self._connection.is_over:
            self._transport.write(self._protocol.close(code, reason))

    def on_silence(self) -> None:
        """Pings a silent client; drops one that neither answers nor reads (pings wait behind what it has to read)."""
        unsent = self._connection.unsent
        if self._pinged and unsent >= self._unsent:
            return self._connection.abort()
        if not self._pinged:
            self._transport.write(self._protocol.ping(b""))
            self._pinged = True
        self._unsent = self._connection.unsent
        self._connection.expect(WS_PING_TIMEOUT)


class Bundle:
    """A static build of the official UI: a directory with index.html, or a zip with one (further down, perhaps).

    Nothing of it is kept in memory but a zip's directory, so that a bundle that is replaced in place is seen
    with the next request. SettingsError: it cannot be used.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._stamp: Tuple[int, ...] = ()  # of the zip whose directory is in _zip and _files
        self._zip: Any = None
        self._files: Dict[str, Any] = {}
        self._find("index.html")

    def _find(self, name: str) -> Optional[Tuple[IO[bytes], int]]:
        """A file of the bundle and its size, None if there is no such file; SettingsError: no bundle at all."""
        import zipfile

        try:
            info = os.stat(self.path)
            if stat.S_ISDIR(info.st_mode):
                return self._find_in_folder(name)
            stamp = (info.st_dev, info.st_ino, info.st_mtime_ns, info.st_size)
            if stamp != self._stamp:
                self._read_zip()
                self._stamp = stamp
            member = self._files.get(name)
            return None if member is None else (self._zip.open(member), member.file_size)
        except (
            OSError,
            zipfile.BadZipFile,
            RuntimeError,
        ) as error:  # RuntimeError: it has a password
            raise SettingsError(f"the UI bundle {self.path} cannot be read: {error}") from None

    def _find_in_folder(self, name: str) -> Optional[Tuple[IO[bytes], int]]:
        root = os.path.realpath(self.path)
        if not os.path.isfile(os.path.join(root, "index.html")):
            raise SettingsError(f"the UI bundle {self.path} has no index.html")
        full = os.path.realpath(os.path.join(root, name))
        if not full.startswith(root + os.sep) or not os.path.isfile(full):
            return None
        file = os.fdopen(open_regular(full), "rb", buffering=0)
        return file, os.fstat(file.fileno()).st_size

    def _read_zip(self) -> None:
        """Reads the zip's directory, and refuses one that would unpack to more than any UI has."""
        import zipfile

        self._zip = zipfile.ZipFile(os.fdopen(open_regular(self.path, follow=True), "rb"))
        members = [member for member in self._zip.infolist() if not member.is_dir()]
        largest = max([member.file_size for member in members], default=0)
        total = sum([member.file_size for member in members])
        if largest > UI_FILE_BYTES or total > UI_BUNDLE_BYTES:
            raise SettingsError(
                f"the UI bundle {self.path} unpacks to {total // MIB} MiB, no UI does"
            )
        indexes = [m.filename for m in members if m.filename.rpartition("/")[2] == "index.html"]
        if not indexes:
            raise SettingsError(f"the UI bundle {self.path} has no index.html")
        top = min(indexes, key=len)[: -len("index.html")]
        self._files = {m.filename[len(top) :]: m for m in members if m.filename.startswith(top)}

    def answer(self, request: Request) -> Response:
        """A file of the bundle; index.html for every path that is a page of the UI and no file."""
        name = percent_decode(request.path)[1:]
        try:
            found = None if name.endswith((".map", "/")) or not name else self._find(name)
            if found is None:
                if name.startswith(("static/", "api/", "flows/")):
                    raise Problem(404, f"there is nothing at {request.path:.200}")
                name = "index.html"
                found = self._find(name)
        except SettingsError as error:
            raise Problem(404, str(error)) from None
        if found is None:
            raise Problem(404, f"the UI bundle {self.path} has no index.html")
        hashed = name.startswith("static/")
        headers = [
            ("Cache-Control", "public, max-age=31536000, immutable" if hashed else "no-cache"),
            ("X-Frame-Options", "SAMEORIGIN"),
        ]
        kind = UI_TYPES.get(name.rpartition(".")[2].lower(), "application/octet-stream")
        return file_response(request, *found, kind, headers)


class Service:
    """The server of one root: owns the store and all connections; `router` takes more routes from above.

    identity: what `/_mflocal/id` tells; log: takes one line for the daemon's log.
    """

    def __init__(
        self, settings: Settings, identity: Dict[str, Any], log: Callable[[str], None]
    ) -> None:
        self.settings = settings
        self.identity = identity
        self.log = log
        self.store = Store(
            os.path.realpath(settings.metaflow_dir), os.path.join(settings.state_dir, "tmp"), log
        )
        try:
            self.store.sweep()
        except OSError as error:  # what is there can be served all the same
            log(f"nothing can be written: {error}")
        self.liveness = Liveness(self.store, settings.run_cutoff)
        self.site = Site(self.store, self.liveness, settings, log)
        self.subscriptions = Subscriptions(self.site, log)
        self.router = Router()
        register_metadata_routes(self.router, MetadataApi(self.site))
        register_ui_routes(self.router, self.site)
        live = functools.partial(ui_socket, self.subscriptions)
        search = functools.partial(search_socket, self.site)
        self.router.add("GET", f"{API_PREFIX}/ws", lambda request: Takeover(live))
        for pattern in SEARCH_PATTERNS:
            self.router.add("GET", pattern, lambda request: Takeover(search))
        self.bundle: Optional[Bundle] = None
        try:
            self.bundle = Bundle(settings.ui_bundle) if settings.ui_bundle else None
        except SettingsError as error:
            if "ui_bundle" in settings.asked:
                raise
            log(f"no UI: {error}")  # nobody named it: no reason to serve nothing at all
        self.router.fallback = self._static
        self.connections: Set[Connection] = set()
        self.draining = False
        self.limit = MAX_CONNECTIONS
        self._hosts = (*settings.allowed_hosts, settings.host)
        self.bodies = 0  # bytes of request bodies that are here and not answered
        self.unsent = 0  # bytes of long answers that are being sent
        self.loop: Any = None
        self._stopped: Optional[asyncio.Event] = None
        self._hurry = False
        self._used = time.monotonic()

    # -- life

    async def serve(self, sock: socket.socket, ready: Callable[[], None]) -> None:
        """Serves on a bound socket until `stop`, then drains (at most DRAIN_TIMEOUT s) and returns."""
        import asyncio

        self.loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        self.limit = _connection_limit()
        # A full collection walks the whole index, 0.5 to 2 s for 100,000 tasks, and finds next to nothing: what
        # is dropped from the index is freed by reference counts. So it happens only while no client is connected.
        gc.set_threshold(gc.get_threshold()[0], 10, 1_000_000)
        # Here `backlog` is how many connections are accepted at one go.
        server = await self.loop.create_server(lambda: Connection(self), sock=sock, backlog=8)
        sock.listen(BACKLOG)
        tasks = [
            self.loop.create_task(repeat(SIGNS_INTERVAL, self.liveness.tick, self.log)),
            self.loop.create_task(repeat(TASKS_REST, self._trim, self.log)),
        ]
        ready()
        try:
            await self._stopped.wait()
        finally:
            server.close()
            await self._drain()
            for task in tasks:
                task.cancel()
            self.store.flush_signs()
            self.site.reader.close()

    def stop(self, now: bool = False) -> None:
        """Begins to drain; `now`, or a second call, does not wait for requests in flight."""
        self._hurry = self._hurry or now or self.draining
        self.draining = True
        if self._stopped is not None:
            self._stopped.set()

    async def _drain(self) -> None:
        import asyncio

        until = time.monotonic() + DRAIN_TIMEOUT
        self.liveness.tick()
        self.subscriptions.stop()
        for connection in list(self.connections):
            connection.drain()
        while self.connections and not self._hurry and time.monotonic() < until:
            if all(connection.websocket is not None for connection in self.connections):
                until = min(until, time.monotonic() + 1.0)
            await asyncio.sleep(0.02)
        for connection in list(self.connections):
            connection.abort()
        await asyncio.sleep(0)

    def _trim(self) -> None:
        self.store.trim(self.liveness.runs() | self.subscriptions.runs())
        if not self.connections:
            gc.collect()

    # -- idleness

    def touch(self) -> None:
        """Marks the service as used."""
        self._used = time.monotonic()

    def idle_left(self) -> Optional[float]:
        """Seconds until the idle stop; None while something keeps the daemon or it never idles out."""
        timeout = self.settings.idle_timeout
        if not timeout:
            return None
        if self.liveness.busy() or any(
            connection.websocket is not None or connection.working
            for connection in self.connections
        ):
            self.touch()
            return None
        return max(0.0, self._used + timeout - time.monotonic())

    def hold_lease(self, connection: Any, lease: str) -> None:
        """A wrapper says that it lives as long as this connection."""
        connection.is_lease = True
        self.liveness.hold_lease(connection, lease)

    def end_lease(self, lease: str) -> None:
        """A wrapper's command has ended by itself, not by a signal."""
        self.liveness.command_ended(lease)

    async def active_runs(self) -> List[Dict[str, Any]]:
        """The runs at work: flow_id, run_number, how that is known (see sign_of_life), since (ms)."""
        found = []
        for run in self.liveness.runs():
            how = sign_of_life(
                await run_state(self.site, run),
                now_ms(),
                connected=self.liveness.connected(run),
                vouched=self.liveness.alive(run) is True,
                heartbeat=self.liveness.last_heartbeat(run),
                cutoff=self.settings.run_cutoff,
            )
            if how is not None:
                number, since = public_id(run.id), run.self_record.get("ts_epoch")
                found.append(
                    {"flow_id": run.flow, "run_number": number, "how": how, "since": since}
                )
        return found

    # -- what every connection asks

    def admit(self, request: Request, connection: Connection) -> Headers:
        """Whether the client may ask this (Problem if not); the headers that every answer to it has."""
        take_lease(request)
        settings = self.settings
        control = request.path.startswith(CONTROL_PREFIX)  # asks for the daemon's own secret
        headers = admit(
            request,
            allowed_hosts=self._hosts,
            allowed_origins=settings.allowed_origins,
            bound_host=connection.address,
            auth_key=None if control else settings.auth_key,
            other_user=None if control else connection.other_user,
        )
        if self.draining:
            raise Problem(503, "the service is stopping", close=True, headers={"Retry-After": "1"})
        if not control and request.path != "/ping":
            self._used = time.monotonic()
        return headers

    def failure(self, request: Request, error: Exception) -> Response:
        """The answer for what a handler raised; what is no Problem is a bug, and is logged."""
        import traceback

        if isinstance(error, Problem):
            return problem_response(error)
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        self.log(f"{request.method} {request.path} failed\n{text}")
        return problem_response(
            Problem(500, "the service failed on this request; see `mflocal logs`")
        )

    def bytes_waiting(self) -> int:
        """Bytes written to connections that their clients have not taken yet."""
        return sum(connection.unsent for connection in self.connections)

    def _static(self, request: Request) -> Response:
        if self.bundle is None:
            raise Problem(
                404, f"there is nothing at {request.path}; `mflocal ui` serves the UI here"
            )
        return self.bundle.answer(request)


async def repeat(seconds: float, action: Callable[[], Any], log: Callable[[str], None]) -> None:
    """Calls `action` every so many seconds; one that fails is logged, and the next comes all the same."""
    import asyncio
    import traceback

    while True:
        await asyncio.sleep(seconds)
        try:
            action()
        except Exception:
            log(traceback.format_exc())


def _connection_limit() -> int:
    """Raises the soft limit of open files to the hard one; returns how many connections then are bearable."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited, wanted = resource.RLIM_INFINITY, MAX_CONNECTIONS + SPARE_FILES
    if soft != unlimited and soft < wanted:
        try:
            more = wanted if hard == unlimited else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))
        except (ValueError, OSError):
            pass
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    room = MAX_CONNECTIONS if soft == unlimited else soft - SPARE_FILES
    return max(8, min(MAX_CONNECTIONS, room))


# ---- 16. Daemon: one per .metaflow; state files, locks, start, stop, control routes, log ----
#
# How a command finds the daemon of a root, or starts it:
#
# 1. The state lies in `.metaflow/.mflocal` (ours, 0700), in `.metaflow/.mflocal-<uid>` where the first is another
#    user's, or in a private runtime directory where .metaflow cannot be written or has no locks.
# 2. A daemon is alive as long as it holds its locks there: one on the directory itself, which no tool that
#    unpacks or copies files over it replaces, and one on the file `lock`, for file systems that cannot
#    lock directories.
# 3. `daemon.json` says where the daemon listens and which file has its secrets. That file lies outside of
#    .metaflow: whoever packs .metaflow while the daemon lives does not pack the key.
# 4. Before anything is sent to whoever listens there, it proves by a MAC of our nonce that it knows the
#    secret, serves this very .metaflow and holds the lock of this very state directory.
# 5. If nobody holds a lock: take the one on `lock`, bind and listen, spawn the daemon with lock and socket
#    inherited, write daemon.json, let it go on. Its first clients wait in the socket's queue meanwhile.
# 6. If somebody holds a lock and proves nothing: it starts, stops or is stuck. Wait, then say what to do.

LOCK_FILE = "lock"  # also holds the port that this root had last
STATE_FILE = "daemon.json"
LOG_FILE = "daemon.log"
CARDS_FILE = (
    "cards.json"  # directories outside the root in which wrappers' flows have put their cards
)
STATE_FILES = {  # keep the state out of commits and backups
    ".gitignore": "*\n",
    "CACHEDIR.TAG": "Signature: 8a477f597d28d172789f06886806bc55\n# State of a running mflocal.\n",
}
LOGIN_SECONDS = 300.0  # s that the one-time URL of `mflocal ui` is good for
LOCK_POLL = 0.02  # s between two tries to get a lock or an answer
LEASE_PATIENCE = 60.0  # s that a signalled daemon serves living `run`s; systemd kills after 90
RELOCK_TRIES = 3  # ticks for which a lock of ours may be held by somebody who only asks
KEPT_OPTIONS = (
    "host", "idle_timeout", "allowed_hosts", "allowed_origins", "debug", "run_cutoff", "local_cutoff", "notifications",
    "links", "plugins",
)  # fmt: skip


class DaemonError(Exception):
    """The daemon cannot start, be found or be stopped: one line for the user (exit code 3)."""


class _Unusable(Exception):
    """A directory cannot hold the state: not writable, no locks that exclude, no private files."""


# -- private files --


def _private_dir(path: str) -> None:
    """Make sure `path` is a directory of ours with mode 0700, not a link. Its parent must exist."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass
    info = os.lstat(path)
    if not stat.S_ISDIR(info.st_mode):
        raise DaemonError(f"{path} is not a directory: move it away")
    if info.st_uid != os.geteuid():
        raise DaemonError(f"{path} belongs to {_user(info.st_uid)}: have it removed")
    if stat.S_IMODE(info.st_mode) != 0o700:
        os.chmod(path, 0o700)
        if stat.S_IMODE(os.lstat(path).st_mode) & 0o077:  # drvfs, vfat: modes are not kept
            raise _Unusable("its file system keeps no file modes")


def _open_private(path: str, flags: int) -> int:
    """A descriptor of a regular file of ours, mode 0600 from here on. Raises OSError."""
    fd = open_regular(path, flags, mode=0o600)
    info = os.fstat(fd)
    if info.st_uid != os.geteuid():
        os.close(fd)
        raise OSError(errno.EPERM, "it is another user's file", path)
    if stat.S_IMODE(info.st_mode) != 0o600:  # somebody ran chmod over the project
        os.fchmod(fd, 0o600)
    return fd


def _read_private(path: str) -> Dict[str, Any]:
    """The JSON object in a private file; {} if there is none, or it is half or not ours."""
    try:
        with open(_open_private(path, os.O_RDONLY), "rb") as file:
            found = json.loads(file.read(MAX_STATE_FILE))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_private(path: str, record: Mapping[str, Any]) -> None:
    """Replace a private file at once: readers see the old or the new one, never a half. Raises OSError."""
    temp = f"{path}.{os.urandom(6).hex()}.tmp"
    try:
        with open(_open_private(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "w") as file:
            json.dump(record, file, indent=1)
        os.replace(temp, path)
    except BaseException:
        _unlink(temp)
        raise


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass


def _user(uid: int) -> str:
    import pwd

    try:
        return f"user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"user {uid}"


# -- where state and secrets are --


def _runtime_dirs(fixed_first: bool) -> List[str]:
    """Private directories outside of .metaflow, best first.

    `fixed_first` prefers those that every process of this user finds whatever is in its environment.
    """
    uid, env = os.geteuid(), os.environ.get
    fixed = [f"/run/user/{uid}/mflocal", f"/tmp/mflocal-{uid}"]
    chosen = [(env("XDG_RUNTIME_DIR", ""), "mflocal"), (env("TMPDIR", ""), f"mflocal-{uid}")]
    named = [os.path.join(base, name) for base, name in chosen if os.path.isabs(base)]
    return fixed + named if fixed_first else named + fixed


def state_dirs(settings: Settings) -> Iterator[str]:
    """The directories that may hold this root's state: its own, then those used where that cannot."""
    yield settings.state_dir
    place = _place(settings.metaflow_dir)
    if place:
        for base in _runtime_dirs(fixed_first=True):
            yield os.path.join(base, "%x-%x" % tuple(place))


def _place(path: Union[str, int]) -> List[int]:
    """[device, inode] of a path or descriptor: what a copy has not in common with it; [] for one that is gone."""
    try:
        info = os.stat(path)
    except OSError:
        return []
    return [info.st_dev, info.st_ino]


def _secret_file(directory: str, instance: str) -> str:
    """Where the secrets of a new daemon go; those of daemons that were killed are removed there."""
    for base in _runtime_dirs(fixed_first=False):
        try:
            _private_dir(base)
            for path in (os.path.join(base, name) for name in os.listdir(base)):
                owner = str(_read_private(path).get("directory")) if path.endswith(".json") else ""
                if owner == directory or owner and not lock_is_held(owner):
                    _unlink(path)
            return os.path.join(base, f"{instance}.json")
        except (OSError, DaemonError, _Unusable):
            continue
    return os.path.join(directory, "secret.json")


class State:
    """What daemon.json and the file of secrets say, checked: our own private files, with sane types.

    record: as in daemon.json, with the members of the file of secrets ("token", "auth_key").
    """

    SECRETS = ("token", "auth_key")

    def __init__(self, directory: str, record: Dict[str, Any]) -> None:
        self.directory = directory
        self.record = record
        self.instance = str(record["instance"])  # random id of this one daemon process
        self.token = str(record["token"])  # the control routes ask for it, proofs are made with it
        self.pid = int(record["pid"])  # never proof of life: pids are used again
        self.port = int(record["port"])
        self.options: Dict[str, Any] = record["options"]  # it was started with: as in Settings
        address = str(record["address"])  # a wildcard is none to connect to
        self.address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)
        host = f"[{self.address}]" if ":" in self.address else self.address
        self.url = f"http://{host}:{self.port}"

    def proof(self, nonce: str, served: List[int], locked: List[int]) -> str:
        """What only a process that has read the token can answer to `nonce`.

        served, locked: device and inode of the .metaflow that is served and of the locked directory.
        """
        import hmac

        message = json.dumps([nonce, self.port, served, locked])
        return hmac.new(self.token.encode(), message.encode(), "sha256").hexdigest()

    def _files(self) -> Dict[str, Dict[str, Any]]:
        """The content of each of our two files."""
        secrets: Dict[str, Any] = {name: self.record[name] for name in self.SECRETS}
        secrets.update(instance=self.instance, directory=self.directory)
        public = {name: self.record[name] for name in self.record if name not in self.SECRETS}
        return {self.record["secrets"]: secrets, os.path.join(self.directory, STATE_FILE): public}

    def save(self) -> None:
        """Write the secrets, then daemon.json. Raises OSError."""
        if not os.path.isdir(os.path.dirname(self.record["secrets"])):  # e.g. its user logged out
            self.record["secrets"] = _secret_file(self.directory, self.instance)
        for path, content in self._files().items():
            _write_private(path, content)

    def is_saved(self) -> bool:
        """Whether both files say what they should."""
        files = json.loads(json.dumps(self._files()))
        return all(_read_private(path) == content for path, content in files.items())

    def is_ours(self) -> bool:
        """True if daemon.json still is this instance's."""
        path = os.path.join(self.directory, STATE_FILE)
        return bool(_read_private(path).get("instance") == self.instance)

    def remove(self) -> None:
        """Delete daemon.json, unless it is another instance's."""
        if self.is_ours():
            _unlink(os.path.join(self.directory, STATE_FILE))


def read_state(directory: str) -> Optional[State]:
    """What daemon.json in `directory` says, or None if it is absent, half or not ours.

    Raises DaemonError if it is of another version of mflocal.
    """
    try:
        info = os.lstat(directory)
        if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid():
            return None
        if stat.S_IMODE(info.st_mode) != 0o700:
            os.chmod(directory, 0o700)
    except OSError:
        return None
    record = _read_private(os.path.join(directory, STATE_FILE))
    if record.get("schema", STATE_SCHEMA) != STATE_SCHEMA and lock_is_held(directory):
        version, pid = record.get("version"), record.get("pid")
        raise DaemonError(
            f"a daemon of mflocal {version} (pid {pid}) has {directory}; `mflocal stop --force` ends it"
        )
    try:
        secrets = _read_private(os.path.join("/", record["secrets"]))
        record.update({name: secrets[name] for name in State.SECRETS})
        state = State(directory, record)
    except (LookupError, TypeError, ValueError):
        return None
    return state if secrets["instance"] == state.instance and 0 < state.port < 65536 else None


def read_card_roots(directory: str) -> List[str]:
    """What cards.json names; [] when there is none of ours, or it came with a copied project."""
    found = _read_private(os.path.join(directory, CARDS_FILE))
    roots = found.get("roots")
    if found.get("place") != _place(directory) or not isinstance(roots, list):
        return []
    return [root for root in roots if isinstance(root, str)][-MAX_CARD_ROOTS:]


def machine() -> Dict[str, str]:
    """What tells this machine (or container), since it was booted, from others."""
    try:
        boot = read_regular("/proc/sys/kernel/random/boot_id", KIB).decode().strip()
    except OSError:
        boot = ""
    return {"hostname": os.uname().nodename, "boot_id": boot}


# -- locks --


def _flock(fd: int, kind: int = fcntl.LOCK_EX) -> bool:
    """Whether we have the lock now. Raises OSError where there are none."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def _is_locked(path: str) -> bool:
    """Whether somebody has the exclusive lock of a file or directory. Makes nothing."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return not _flock(fd, fcntl.LOCK_SH)
    except OSError:
        return False  # no locks here
    finally:
        os.close(fd)


def lock_is_held(directory: str) -> bool:
    """Whether a daemon, or a start, lives in this state directory. Makes nothing."""
    return _is_locked(directory) or _is_locked(os.path.join(directory, LOCK_FILE))


def _lock_file(directory: str) -> Optional[int]:
    """Take the lock on `lock`: its descriptor, or None while somebody has it. Raises _Unusable, DaemonError."""
    path = os.path.join(directory, LOCK_FILE)
    try:
        _private_dir(directory)
        for name, text in STATE_FILES.items():
            if not os.path.lexists(os.path.join(directory, name)):
                with open(os.path.join(directory, name), "x", opener=_open_private) as file:
                    file.write(text)
        fd = _open_private(path, os.O_RDWR | os.O_CREAT)
    except FileExistsError:
        return None  # another start is at the same point
    except OSError as error:
        if error.errno in (errno.EROFS, errno.EACCES):
            raise _Unusable(f"cannot write: {error.strerror}") from None
        raise DaemonError(f"cannot write in {directory}: {error.strerror}") from None
    try:
        # Another inode has the name if the file was replaced meanwhile: look again.
        if _flock(fd) and os.path.samestat(os.fstat(fd), os.stat(path)):
            if _is_locked(path):
                return fd
            raise _Unusable(
                "its file system grants one lock twice"
            )  # as some network file systems do
    except OSError as error:
        raise _Unusable(f"its file system has no locks ({error.strerror})") from None
    os.close(fd)
    return None


def lock_directory(directory: str) -> Optional[int]:
    """A descriptor of the state directory with its lock, if there are such locks; None if another has it."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    for _ in range(50):  # those who only ask have it for a moment
        try:
            if _flock(fd):
                return fd
        except OSError:
            return fd  # NFS: the lock on the file must do
        time.sleep(LOCK_POLL)
    os.close(fd)
    return None


def take_lock(settings: Settings) -> Optional[Tuple[int, str]]:
    """(descriptor of `lock`, state directory), or None while another process lives there.

    Where the root cannot hold the state, a private runtime directory takes its place, and a line on stderr
    says so. Raises DaemonError.
    """
    reason = ""
    for directory in state_dirs(settings):
        try:
            if reason:
                _private_dir(os.path.dirname(directory))
            fd = _lock_file(directory)
        except (OSError, _Unusable, DaemonError) as error:
            if isinstance(error, DaemonError) and not reason:
                raise
            reason = reason or f"{directory}: {error}"
            continue
        if fd is None or _is_locked(directory):
            if fd is not None:
                os.close(fd)
            return None
        if reason:
            complain(f"state goes to {directory}, because of {reason}")
        elif foreign_daemon(settings):
            os.close(fd)
            raise DaemonError(foreign_daemon(settings))
        return fd, directory
    raise DaemonError(f"no place for the state of a daemon: {reason}")


def foreign_daemon(settings: Settings) -> str:
    """A line that says whose daemon serves this root, if another user's does; else "".

    Their state directories are closed to us, but /proc/locks tells which inodes are locked. Where there is
    no such file, nothing is known.
    """
    try:
        with open("/proc/locks") as file:
            locks = [line.split() for line in file if "FLOCK  ADVISORY  WRITE" in line]
        names = [name for name in os.listdir(settings.metaflow_dir) if name.startswith(STATE_DIR)]
    except OSError:
        return ""
    for name in names:
        info = os.lstat(os.path.join(settings.metaflow_dir, name))
        if info.st_uid == os.geteuid() or not stat.S_ISDIR(info.st_mode):
            continue
        major, minor = os.major(info.st_dev), os.minor(info.st_dev)
        for words in locks:
            device, _, inode = words[5].rpartition(":")
            # A device without major number (btrfs, overlay) may have another number here.
            if inode == str(info.st_ino) and (device == f"{major:02x}:{minor:02x}" or not major):
                who = f"a daemon of {_user(info.st_uid)} (pid {words[4]})"
                return f"{who} serves {settings.root}: only that user can use or stop it"
    return ""


def lock_holders(directory: str) -> List[int]:
    """The processes that hold a lock of this state directory, as far as we may know them."""
    paths = [directory, os.path.join(directory, LOCK_FILE)]
    if not os.path.isdir("/proc/self/fdinfo"):
        import subprocess

        told = subprocess.run(["lsof", "-t", *paths], stdout=subprocess.PIPE).stdout
        return [int(word) for word in told.split() if int(word) != os.getpid()]
    places = [_place(path) for path in paths]
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            for fd in os.listdir(f"/proc/{pid}/fd"):
                if _place(f"/proc/{pid}/fd/{fd}") in places:
                    with open(f"/proc/{pid}/fdinfo/{fd}") as file:
                        if " FLOCK " in file.read():
                            found.append(int(pid))
        except OSError:
            continue  # it has gone, or is not ours
    return [pid for pid in found if pid != os.getpid()]


# -- talking to a daemon --


class Link:
    """One keep-alive HTTP connection to a daemon. http.client takes 20 ms to import; this nothing."""

    def __init__(self, state: State, timeout: float = CONTROL_TIMEOUT) -> None:
        """Connect. Raises OSError."""
        self._state = state
        self.due = 0  # answers not read yet
        self.sock = socket.create_connection((state.address, state.port), timeout)
        self._file = self.sock.makefile("rb")

    def send(self, method: str, path: str, body: Any = None, secret: bool = True) -> None:
        """Send one request with a body of JSON; `secret` adds the control token. Raises OSError."""
        data = b"" if body is None else json.dumps(body).encode()
        host = self._state.url[len("http://") :]
        lines = [f"{method} {path} HTTP/1.1", f"host: {host}", f"content-length: {len(data)}"]
        lines += ["content-type: application/json"] * bool(data)
        lines += [f"x-mflocal-token: {self._state.token}"] * secret
        self.sock.sendall("\r\n".join([*lines, "", ""]).encode("ascii") + data)
        self.due += 1

    def receive(self) -> Tuple[int, Any]:
        """(status, what its JSON holds) of the next answer. Raises OSError, and ValueError for what is none."""
        status, length = self._file.readline(MAX_LINE)[9:12], 0
        while True:
            name, colon, value = self._file.readline(MAX_LINE).partition(b":")
            if name.lower() == b"content-length":
                length = min(int(value), MAX_BODY)
            if not colon:
                break
        body = self._file.read(length)
        if not status or len(body) < length:
            raise ConnectionError("the daemon closed the connection")
        self.due -= 1
        return int(status), json.loads(body) if body else None

    def ask(self, method: str, path: str, body: Any = None) -> Tuple[int, Any]:
        """(status, what its JSON holds) of the answer to a request. Raises as receive()."""
        self.send(method, path, body)
        return self.receive()

    def close(self) -> None:
        """Close the connection."""
        self._file.close()
        self.sock.close()


def _prove(settings: Settings, link: Link, state: State, use: bool = False) -> bool:
    """Whether the other end of `link` is the daemon of `state` and serves this very .metaflow.

    `use` announces a user: the daemon does not idle out between this answer and the lease.
    """
    import hmac

    nonce = os.urandom(16).hex()
    try:
        link.send("GET", f"/_mflocal/id?nonce={nonce}{'&use=1' * use}", secret=False)
        status, body = link.receive()
        wanted = state.proof(nonce, _place(settings.metaflow_dir), _place(state.directory))
        return status == 200 and hmac.compare_digest(str(body["proof"]).encode(), wanted.encode())
    except (OSError, ValueError, LookupError, TypeError):
        return False


def find_daemon(
    settings: Settings, use: bool = False, patience: float = CONTROL_TIMEOUT
) -> Optional[Tuple[State, Link]]:
    """The running daemon of this root and an open connection to it; None if none runs. Creates nothing.

    Waits for one that starts or stops. Raises DaemonError for one that does not answer for `patience` s;
    with 0 it looks once and does not wait.
    """
    began = time.monotonic()
    while True:
        held = next((path for path in state_dirs(settings) if lock_is_held(path)), None)
        if held is None:
            return None
        state = read_state(held)
        try:
            if state:
                link = Link(state)
                if _prove(settings, link, state, use):
                    return state, link
                link.close()
        except OSError:
            pass
        record = _read_private(os.path.join(held, STATE_FILE))
        quick = record.get("state") == "ready" or not patience
        limit = patience if quick else START_TIMEOUT + DRAIN_TIMEOUT
        if time.monotonic() - began > limit:
            if record and not machine().items() <= record.items():
                host = record.get("hostname")
                raise DaemonError(f"a daemon on host {host} has {held}: stop it there")
            raise DaemonError(
                f"the daemon of {settings.root} (pid {record.get('pid')}) does not answer; "
                "end it with `mflocal stop --force`"
            )
        time.sleep(LOCK_POLL)


def ask_daemon(
    settings: Settings, method: str, path: str, body: Any = None
) -> Optional[Tuple[State, int, Any]]:
    """(daemon, status 200 or 409, JSON) of a control route; None if none runs. Raises DaemonError.

    A daemon that begins to stop between its proof and its answer is waited for.
    """
    while True:
        found = find_daemon(settings)
        if not found:
            return None
        state, link = found
        name, stopping = f"the daemon (pid {state.pid})", False
        try:
            status, answer = link.ask(method, path, body)
        except ConnectionError:
            stopping = True
        except (OSError, ValueError) as error:
            raise DaemonError(f"{name} does not answer: {error}") from None
        finally:
            link.close()
        if not stopping and status in (200, 409):
            return state, status, answer
        if not stopping and status != 503:
            raise DaemonError(f"{name} answered {status}: {answer}")
        if not wait_gone(state, DRAIN_TIMEOUT + CONTROL_TIMEOUT):
            raise DaemonError(f"{name} is still draining")


def none_runs(settings: Settings) -> str:
    """The line for a user who wants a daemon where none of his runs."""
    return foreign_daemon(settings) or f"no daemon runs for {settings.root}"


# -- starting --


class Running(NamedTuple):
    """A daemon to use, with an open connection to it. how: "started" (by us) or "reused".
    ready_fd: the pipe on which a daemon started by us reports, see wait_ready(); -1 once it has."""

    state: State
    how: str
    link: Link
    ready_fd: int = -1


def _make_metaflow_dir(settings: Settings) -> None:
    """With the user's umask, as local mode itself would make it."""
    try:
        os.makedirs(settings.metaflow_dir, exist_ok=True)
    except OSError as error:
        raise DaemonError(f"cannot make {settings.metaflow_dir}: {error.strerror}") from None


def ensure(settings: Settings, last_port: int = 0) -> Running:
    """The daemon of this root: the one that runs, or a new one. Of many callers at once one starts it.

    A started daemon need not be ready: what is sent on its connection waits until it is. `last_port` is the
    port to insist on (a flow has its URL frozen in); else settings.port, else the port this root had last,
    else any. Raises DaemonError.
    """
    _make_metaflow_dir(settings)
    while True:
        found = find_daemon(settings, use=True, patience=START_TIMEOUT)
        if found:
            version, python = (str(found[0].record.get(name)) for name in ("version", "python"))
            if version != VERSION:
                complain(f"the daemon is mflocal {version}, this is {VERSION}: `mflocal restart`")
            elif not os.path.exists(python):
                complain(f"the Python of the daemon is gone ({python}): `mflocal restart`")
            return Running(found[0], "reused", found[1])
        taken = take_lock(settings)
        if taken:
            try:
                return _launch(settings, taken[0], taken[1], last_port)
            finally:
                os.close(taken[0])
        time.sleep(LOCK_POLL)


def listen(settings: Settings, lock_fd: int, last_port: int = 0) -> socket.socket:
    """A listening socket by the rules of ensure(). Notes the port in the lock file. Raises DaemonError."""
    firm = last_port or settings.port
    text = os.pread(lock_fd, 16, 0).strip()
    last = int(text) if text.isdigit() and int(text) < 65536 and not firm else 0
    for port in [firm] if firm else [last, 0] if last else [0]:
        try:
            found = socket.getaddrinfo(settings.host, port, type=socket.SOCK_STREAM)[0]
            # It sets SO_REUSEADDR: else a port would be unusable for a minute after its daemon went.
            both = settings.host == "::" and socket.has_dualstack_ipv6()  # IPv4 too
            sock = socket.create_server(
                found[4][:2], family=found[0], backlog=BACKLOG, dualstack_ipv6=both
            )
            break
        except OSError as error:
            problem = f"cannot listen on {settings.host} port {port}: {error.strerror or error}"
            if error.errno == errno.EADDRINUSE:
                taken = f"port {port} on {settings.host} is taken by another program"
                problem = f"{taken} (--port 0 takes a free one)"
    else:
        raise DaemonError(problem)
    try:
        os.pwrite(lock_fd, b"%-6d\n" % sock.getsockname()[1], 0)
    except OSError:
        pass  # only a wish for the next start
    return sock


def new_state(settings: Settings, directory: str, sock: socket.socket, pid: int) -> State:
    """The state of a daemon about to start."""
    for name in os.listdir(directory):
        if name.endswith(".tmp"):  # what a start killed half-way left behind
            _unlink(os.path.join(directory, name))
    instance = os.urandom(16).hex()
    address, port = sock.getsockname()[:2]
    record: Dict[str, Any] = {
        "schema": STATE_SCHEMA,
        "instance": instance,
        "token": os.urandom(24).hex(),
        "auth_key": settings.auth_key,
        "secrets": _secret_file(directory, instance),
        "pid": pid,
        "port": port,
        "host": settings.host,
        "address": address,
        "root": settings.root,
        "started_at": round(time.time(), 3),
        "version": VERSION,
        "python": sys.executable,
        **machine(),
        "state": "starting",
        "ui": settings.ui_bundle,
        "options": {name: getattr(settings, name) for name in KEPT_OPTIONS},
    }
    return State(directory, record)


def _launch(settings: Settings, lock_fd: int, directory: str, last_port: int) -> Running:
    """Bind, listen, spawn the daemon, write daemon.json, let it go on. We hold the lock."""
    sock = listen(settings, lock_fd, last_port)
    fds = [*os.pipe(), *os.pipe()]
    ready_r, ready_w, config_r, config_w = fds
    try:
        log = os.path.join(directory, LOG_FILE)
        fds.append(_open_private(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND))
        keep = (lock_fd, sock.fileno(), ready_w)
        state = new_state(settings, directory, sock, _spawn(settings.root, config_r, fds[-1], keep))
        state.save()
        # Our own socket still listens: this connection can only be to it, and needs no proof.
        link = Link(state)
        config = {
            "settings": {**settings._asdict(), "asked": sorted(settings.asked)},
            "state": state.record,
            "directory": directory,
            "fds": keep,
        }
        # The daemon waits for these bytes: if we die before, it reads an empty pipe and ends.
        os.write(config_w, json.dumps(config).encode())
        fds.remove(ready_r)
        return Running(state, "started", link, ready_r)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DaemonError(f"cannot start the daemon in {directory}: {reason}") from None
    finally:
        sock.close()
        for fd in fds:
            os.close(fd)


def _spawn(root: str, stdin: int, log: int, keep: Tuple[int, ...]) -> int:
    """Start the daemon process: own session, no client settings, no descriptor but its own. Returns the pid."""
    import subprocess

    if not sys.executable:
        raise DaemonError("this Python does not know its own executable (sys.executable is empty)")
    # A link to this file may have any name, and no module beside it.
    here = os.path.realpath(__file__)
    name, kind = os.path.splitext(os.path.basename(here))
    folder, archive = os.path.dirname(here), os.path.abspath(sys.argv[0] or ".")
    if not os.path.exists(here) and os.path.isfile(archive):  # the .pyz's cache was tidied up
        folder = os.path.join(archive, "site-packages")
    # Importing by name uses the cached bytecode, which running the file would not. The module's folder goes
    # last: in a site-packages nothing may come before the standard library.
    code = f"import sys; sys.path.append({folder!r}); import {name} as m; m.daemon_main()"
    if kind not in (".py", ".pyc") or not name.isidentifier():  # no module by its name
        code = f"import runpy; runpy.run_path({here!r}, run_name='mflocal')['daemon_main']()"
    command = [sys.executable, "-s" if "PYTHONHOME" in os.environ else "-I", "-S"]
    command += ["-X", f"utf8={sys.flags.utf8_mode}", "-c", code, "mflocal daemon", root]
    # Of Metaflow's settings only those that say where artifacts may be: Site.check_place.
    scrubbed = ("METAFLOW_", "PYTHON", "SHIV_")
    kept = ("METAFLOW_DATASTORE_SYSROOT_", "METAFLOW_HOME", "METAFLOW_PROFILE", "PYTHONHOME")
    env = {k: v for k, v in os.environ.items() if not k.startswith(scrubbed) or k.startswith(kept)}
    process = subprocess.Popen(
        command, stdin=stdin, stdout=log, stderr=log, env=env, pass_fds=keep, start_new_session=True
    )
    process.returncode = 0  # not waited for: it outlives us, and whoever stays reaps it by its pid
    return process.pid


def read_ready(fd: int) -> Optional[str]:
    """The daemon's report from its pipe, which is closed then: None = ready, else why it did not start.

    NO_REPORT: it was killed before it could say.
    """
    with open(fd, "rb") as pipe:
        data = pipe.readline()
    try:
        report = json.loads(data)
        return None if report.get("ready") else str(report.get("error"))
    except (ValueError, AttributeError):
        return NO_REPORT


def wait_ready(settings: Settings, running: Running) -> Running:
    """The same daemon, once it answers. Raises DaemonError with its reason."""
    if running.ready_fd < 0:
        return running
    state = running.state
    poll = select.poll()
    poll.register(running.ready_fd, select.POLLIN)
    if not poll.poll(START_TIMEOUT * 1000):
        os.close(running.ready_fd)
        raise DaemonError(f"the daemon (pid {state.pid}) is not ready after {START_TIMEOUT:.0f} s")
    problem = read_ready(running.ready_fd)
    if not problem and not _prove(settings, running.link, state, use=True):
        problem = "it went away at once"
    if problem:
        wait_gone(state, CONTROL_TIMEOUT)  # so that whoever tries again does not meet it
        raise DaemonError(start_problem(state, problem))
    return running._replace(ready_fd=-1)


def start_problem(state: State, problem: str) -> str:
    """The line that tells a user why a daemon did not start."""
    log = os.path.join(state.directory, LOG_FILE)
    return f"the daemon could not start: {problem} (see {log})"


# -- stopping --


def wait_gone(state: State, seconds: float) -> bool:
    """Wait until the daemon of `state` has let its locks go; False if it has not after `seconds`."""
    deadline = time.monotonic() + seconds
    while lock_is_held(state.directory):
        current = _read_private(os.path.join(state.directory, STATE_FILE)).get("instance")
        if current not in (None, state.instance):
            return True  # a successor holds the lock
        if time.monotonic() > deadline:
            return False
        time.sleep(LOCK_POLL)
    return True


class Stopped(NamedTuple):
    """What came of a stop. state: the daemon in question; refused: the active runs that keep it alive."""

    state: Optional[State]
    refused: List[Dict[str, Any]]
    killed: Tuple[int, ...] = ()


def stop_daemon(settings: Settings, force: bool) -> Optional[Stopped]:
    """Stop the daemon of a root and wait for its end; None if none runs. Raises DaemonError.

    `force` stops it whatever it is doing, and kills what holds the lock whatever it answers.
    """
    lived = any(lock_is_held(directory) for directory in state_dirs(settings))
    state: Optional[State] = None
    try:
        told = ask_daemon(settings, "POST", "/_mflocal/stop", {"force": force})
        if not told:
            return Stopped(None, []) if lived else None  # it was stopping already
        state, status, body = told
        if status == 409 and not force:
            return Stopped(state, body["active_runs"])
        if not wait_gone(state, DRAIN_TIMEOUT + CONTROL_TIMEOUT):
            raise DaemonError(f"the daemon (pid {state.pid}) is still draining")
        return Stopped(state, [])
    except (DaemonError, OSError, ValueError, LookupError, TypeError) as error:
        if not force:
            hint = "" if "--force" in str(error) else "; `mflocal stop --force` ends it"
            raise DaemonError(f"{error}{hint}") from None
    return Stopped(state, [], _kill_holders(settings))


def _kill_holders(settings: Settings) -> Tuple[int, ...]:
    """SIGKILL for whatever holds the locks of this root."""
    killed: List[int] = []
    for directory in filter(lock_is_held, list(state_dirs(settings))):
        pids = lock_holders(directory)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + CONTROL_TIMEOUT
        while lock_is_held(directory):
            if time.monotonic() > deadline:
                raise DaemonError(
                    f"cannot find what holds the lock in {directory}; `fuser -k {directory}` may"
                )
            time.sleep(LOCK_POLL)
        _unlink(os.path.join(directory, STATE_FILE))
        killed += pids
    return tuple(killed)


def complain(text: str) -> None:
    """One line on stderr, as every message of ours: `mflocal: ...`."""
    try:
        sys.stderr.write("mflocal: %s\n" % " ".join(text.split()))
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
        pass  # no stderr is no reason to fail


# -- the daemon process --


class Log:
    """Lines with a time stamp, to daemon.log (at most two files of LOG_BYTES) or, without path, to stderr.

    Descriptors 1 and 2 follow the file, so that a traceback of the interpreter itself lands there too.
    """

    def __init__(self, path: Optional[str]) -> None:
        self._path = path
        self._size = 0
        self.reopen()

    def reopen(self) -> None:
        """Write to the file that has our name now."""
        if self._path:
            fd = _open_private(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            self._size = os.fstat(fd).st_size
            os.dup2(fd, 1)
            os.dup2(fd, 2)
            os.close(fd)

    def __call__(self, text: str) -> None:
        """Write `text` as one line. Never raises: a full disk must not stop the daemon."""
        now = time.time()
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
        line = "%s.%03d %s\n" % (stamp, now % 1 * 1000, text.rstrip("\n"))
        data = line.encode("utf-8", "backslashreplace")
        try:
            if self._path and self._size + len(data) > LOG_BYTES:
                os.replace(self._path, self._path + ".1")
                self.reopen()
            os.write(2, data)
        except OSError:
            pass
        self._size += len(data)


def daemon_main() -> NoReturn:
    """The spawned process: read what the starter hands over on descriptor 0, then serve until stopped."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # whatever the caller had
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with open(0, "rb", closefd=False) as pipe:
        data = pipe.read()
    if not data:
        os._exit(0)  # the starter died: somebody else will start a daemon
    config = json.loads(data)
    lock_fd, sock_fd, ready_fd = config["fds"]
    for fd in config["fds"]:
        os.set_inheritable(fd, False)
    with open(os.devnull) as null:
        os.dup2(null.fileno(), 0)
    os.chdir("/")
    state = State(config["directory"], config["state"])
    log = Log(os.path.join(state.directory, LOG_FILE))
    daemon = Daemon(Settings(**config["settings"]), state, lock_fd, log, ready_fd)
    os._exit(daemon.run(socket.socket(fileno=sock_fd)))  # no thread may keep the locks


class Daemon:
    """What keeps a Service running: signals, idle stop, locks and state files, control routes.

    ready_fd: the pipe on which the starter waits for our report; problem: why we could not start.
    """

    def __init__(
        self, settings: Settings, state: State, lock_fd: int, log: Log, ready_fd: int = -1
    ) -> None:
        self._settings = settings
        self._state = state
        self._lock_fd = lock_fd
        self._directory_fd = -1
        self._relocks = 0  # ticks in which a lock that we had lost could not be taken
        self._log = log
        self._ready_fd = ready_fd
        self.problem = ""
        self._served = _place(settings.metaflow_dir)
        self._started = time.monotonic()
        self._ending = False  # signalled, and still serving the wrappers that live
        self._stopping = False
        self._ready = False
        self._unsaved = ""  # why the state files could not be written
        self._logins: Dict[str, float] = {}  # one-time words of ui_url -> when they end (monotonic)

    def run(self, sock: socket.socket) -> int:
        """Serve on `sock` until stopped. Returns the exit code: 0, or 1 after a failure."""
        import asyncio
        import traceback

        record = self._state.record
        names = ("instance", "pid", "port", "host", "root", "version", "started_at")
        identity = {**{name: record[name] for name in names}, "url": self._state.url}
        try:
            directory_fd = lock_directory(self._state.directory)
            if directory_fd is None:
                raise DaemonError(f"another daemon holds the lock of {self._state.directory}")
            self._directory_fd = directory_fd
            self.service = Service(self._settings, identity, self._log)
            self.service.site.reader.card_roots += read_card_roots(self._state.directory)
            # Not asyncio.run, which waits for threads: the process ends right after this.
            asyncio.new_event_loop().run_until_complete(self._serve(sock))
        except Exception as error:
            self._log("failed: " + traceback.format_exc())
            if not self._ready:
                ours = isinstance(error, (SettingsError, DaemonError))
                self.problem = ("" if ours else type(error).__name__ + ": ") + str(error)
                self._report({"error": self.problem})
            return 1
        finally:
            if not self._stopping:
                self._forget()
        self._log("stopped")
        return 0

    async def _serve(self, sock: socket.socket) -> None:
        import asyncio

        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        add = self.service.router.add
        add("GET", "/_mflocal/id", self._id)
        add("GET", "/_mflocal/status", self._status)
        add("POST", "/_mflocal/stop", self._stop)
        add("POST", "/_mflocal/lease", self._lease)
        add("POST", "/_mflocal/ui", self._ui)
        add("GET", "/_mflocal/login", self._login)
        watch = loop.create_task(self._watch())
        try:
            await self.service.serve(sock, ready=self._on_ready)
        finally:
            watch.cancel()

    def _on_ready(self) -> None:
        self._ready = True
        self._state.record["state"] = "ready"
        self._save()
        took = time.monotonic() - self._started
        self._log(
            f"mflocal {VERSION} serves {self._state.record['root']} on {self._state.url}, "
            f"pid {os.getpid()}, ready after {took:.2f} s"
        )
        self._report({"ready": True})

    def _report(self, report: Dict[str, Any]) -> None:
        try:
            os.write(self._ready_fd, json.dumps(report).encode() + b"\n")
            os.close(self._ready_fd)
        except OSError:
            pass  # there is no starter, or it did not wait for it

    # -- ends

    def begin_stop(self, why: str, now: bool = False) -> None:
        """Drain and stop; a second call, or `now`, does not wait for requests in flight."""
        now = now or self._stopping
        self._log(f"stopping{' now' if now else ''}: {why}")
        if not self._stopping:
            self._stopping = True
            self._forget()  # first, so that the next `start` waits for the lock and not for us
        self.service.stop(now=now)

    def _forget(self) -> None:
        """Remove our state files. daemon.json stays if it tells living wrappers to bring the daemon back."""
        if not self._ending or not self.service.liveness.leases():
            self._state.remove()
        _unlink(self._state.record["secrets"])

    def _on_signal(self, number: int) -> None:
        """Stop. But a whole job may have been signalled: flows of its `run`s still write what they clean up."""
        import asyncio

        name = signal.Signals(number).name
        leases = self.service.liveness.leases()
        if self._ending or self._stopping or not leases:
            self.begin_stop(name, now=self._ending)
            return
        self._log(f"{name}: serving {leases} `mflocal run` for at most {LEASE_PATIENCE:.0f} s more")
        self._ending = True
        self._state.record["state"] = "stopping"
        self._save()
        asyncio.get_running_loop().call_later(LEASE_PATIENCE, self.begin_stop, "out of patience")

    async def _watch(self) -> None:
        import asyncio

        while not self._stopping:
            wait = IDLE_TICK
            try:
                wait = self._tick()
            except Exception as error:
                self._log(f"watch: {type(error).__name__}: {error}")
            await asyncio.sleep(wait)

    def _tick(self) -> float:
        """Vanished root, lost locks and files, idle stop. Returns s until the next look."""
        if _place(self._settings.metaflow_dir) != self._served:
            self.begin_stop(f"{self._settings.metaflow_dir} is gone or another directory")
            return IDLE_TICK
        if self._ready:
            self._keep_state()
        if self._ending and not self.service.liveness.leases():
            self.begin_stop("signalled, and the last `mflocal run` has ended")
        left = self.service.idle_left() if self._ready else None
        if left is not None and left <= 0 and not self._stopping:
            self.begin_stop(f"idle for {self._settings.idle_timeout:g} s")
        return IDLE_TICK if left is None else min(IDLE_TICK, max(left, 0.01))

    def _keep_state(self) -> None:
        """Whoever unpacks, copies or deletes files in .metaflow may meet ours: put them right again."""
        directory = self._state.directory
        locked = {directory: self._directory_fd, os.path.join(directory, LOCK_FILE): self._lock_fd}
        lost = [path for path, fd in locked.items() if _place(path) != _place(fd)]
        if lost:
            fd: Optional[int] = None
            place: Optional[int] = -1
            try:
                fd = _lock_file(directory)
                place = lock_directory(directory) if fd is not None and directory in lost else -1
            except (OSError, _Unusable, DaemonError) as error:
                self._log(f"cannot take the lock of {directory} anew: {error}")
            if fd is None or place is None:
                self._relocks += 1
                if self._relocks >= RELOCK_TRIES:
                    self.begin_stop(f"another daemon holds the lock of {directory}")
                return
            self._lock_fd, self._relocks = fd, 0  # the old ones stay open, and locked
            self._directory_fd = self._directory_fd if place == -1 else place
            self._log.reopen()
            self._log(f"took the lock of {directory} anew")
        _private_dir(directory)
        if not self._state.is_saved():
            self._save()

    def _save(self) -> None:
        try:
            self._state.save()
            self._unsaved = ""
        except OSError as error:
            if str(error) != self._unsaved:  # it is tried again with every tick
                self._unsaved = str(error)
                self._log(f"cannot write {STATE_FILE}: {error}")

    # -- control routes; each but /id and /login needs the token from our private file

    def _body(self, request: Request) -> Dict[str, Any]:
        """The request's JSON object, after its token was checked."""
        import hmac

        given = request.headers.get("x-mflocal-token", "").encode("latin-1", "replace")
        if not hmac.compare_digest(given, self._state.token.encode()):
            raise Problem(403, f"the control routes need the token that {STATE_FILE} leads to")
        body = request.json() if request.body else {}
        if not isinstance(body, dict):
            raise Problem(400, "the body must be a JSON object")
        return body

    def _id(self, request: Request) -> Response:
        """Proves who we are, where `nonce` is given; `use` comes from those who will take a lease."""
        nonce = request.arg("nonce") or ""
        if not nonce.isalnum() or len(nonce) > 64:
            raise Problem(400, "nonce must be 1 to 64 letters and digits")
        if request.arg("use"):
            self.service.touch()  # from here on the idle stop is as far away as it can be
        served = _place(self._settings.metaflow_dir)
        return json_response(
            {"proof": self._state.proof(nonce, served, _place(self._directory_fd))}
        )

    async def _status(self, request: Request) -> Response:
        self._body(request)
        left = self.service.idle_left()
        told = ("pid", "port", "root", "version", "state", "started_at", "ui", "python")
        status = {name: self._state.record[name] for name in told}
        status.update(
            url=self._state.url,
            uptime=round(time.monotonic() - self._started, 1),
            idle_timeout=self._settings.idle_timeout,
            idle_left=None if left is None else round(left, 1),
            active_runs=await self.service.active_runs(),
            log=os.path.join(self._state.directory, LOG_FILE),
        )
        return json_response(status)

    async def _stop(self, request: Request) -> Response:
        import asyncio

        runs = [] if self._body(request).get("force") else await self.service.active_runs()
        if runs:
            return json_response({"stopping": False, "active_runs": runs}, 409)
        self._ending = False  # who asks us to stop wants nobody to bring us back
        # A moment later, so that this answer is out before the server drains.
        asyncio.get_running_loop().call_later(0.01, self.begin_stop, "asked by `mflocal stop`")
        return json_response({"stopping": True, "active_runs": runs})

    def _learn_cards(self, place: Any) -> None:
        """Where a wrapper's flows put their cards: remembered across restarts, for runs looked at later."""
        known = self.service.site.reader.card_roots
        if isinstance(place, str) and os.path.isabs(place) and place not in known:
            known.append(place)
            del known[:-MAX_CARD_ROOTS]
            path = os.path.join(self._state.directory, CARDS_FILE)
            try:
                _write_private(path, {"place": _place(self._state.directory), "roots": known})
            except OSError as error:
                self._log(f"cannot write {CARDS_FILE}: {error}")

    def _lease(self, request: Request) -> Response:
        """A wrapper lives as long as this connection; with "ended" its command has ended by itself."""
        body = self._body(request)
        lease = body.get("lease")
        if not isinstance(lease, str) or not lease.isalnum() or len(lease) > 64:
            raise Problem(400, "lease must be 1 to 64 letters and digits")
        if body.get("ended"):
            self.service.end_lease(lease)
        else:
            self.service.hold_lease(request.connection, lease)
            self._learn_cards(body.get("cards"))
        return json_response(
            {"instance": self._state.instance, "ui": bool(self._state.record.get("ui"))}
        )

    def _ui(self, request: Request) -> Response:
        bundle = self._body(request).get("bundle")
        if bundle is not None:
            if not isinstance(bundle, str) or not os.path.isabs(bundle):
                raise Problem(400, "bundle must be an absolute path")
            try:
                self.service.bundle = Bundle(bundle)
            except SettingsError as error:
                raise Problem(400, str(error)) from None
            self._state.record["ui"] = bundle
            self._save()
        if self.service.bundle is None:
            raise Problem(404, "no UI bundle is served")
        if not self._settings.auth_key:
            return json_response({"url": self._state.url + "/"})
        # A browser cannot send a key: it gets a cookie for a one-time word.
        now = time.monotonic()
        self._logins = {word: end for word, end in self._logins.items() if end > now}
        word = os.urandom(16).hex()
        self._logins[word] = now + LOGIN_SECONDS
        return json_response({"url": f"{self._state.url}/_mflocal/login?once={word}"})

    def _login(self, request: Request) -> Response:
        end = self._logins.pop(request.arg("once") or "", 0.0)
        if end < time.monotonic() or not self._settings.auth_key:
            raise Problem(
                403, "this link has been used or is too old: `mflocal ui` makes a new one"
            )
        cookie = key_cookie(self._settings.auth_key)
        return Response(303, headers=[("Location", "/"), cookie, ("Cache-Control", "no-store")])


def serve_here(settings: Settings) -> int:
    """`mflocal serve`: be the daemon, in this process, with the log on stderr. Returns the exit code.

    Raises DaemonError when it cannot start, also when a daemon serves this root already.
    """
    _make_metaflow_dir(settings)
    taken = None
    while taken is None:
        found = find_daemon(settings)
        if found:
            state = found[0]
            raise DaemonError(f"pid {state.pid} serves {settings.root} already, on {state.url}")
        taken = take_lock(settings)
    lock_fd, directory = taken
    sock = listen(settings, lock_fd)
    state = new_state(settings, directory, sock, os.getpid())
    try:
        state.save()
    except OSError as error:
        raise DaemonError(f"cannot write in {directory}: {error.strerror}") from None
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    daemon = Daemon(settings, state, lock_fd, Log(None))
    code = daemon.run(sock)
    if daemon.problem:
        raise DaemonError("could not start: " + daemon.problem)
    return code


# ---- 17. CLI: commands, the environment of CMD, the wrapper around it ----

EXIT_NONE = 1  # no daemon runs
EXIT_USAGE = 2
EXIT_DAEMON = 3  # the daemon could not start, or be reached
EXIT_REFUSED = 4  # runs are active
LOCAL_NAMES = "127.0.0.1,localhost"
UI_IMAGE = "docker run -p 3000:3000 -e METAFLOW_SERVICE=%s/api netflix/metaflow-ui:latest"
UI_BUNDLE_INSIDE = "mflocal_ui.zip"  # where build.py puts a bundle: beside this module

if TYPE_CHECKING:
    _Words = argparse.Namespace
    _Flag = Callable[[argparse.ArgumentParser], Any]
    _Function = Callable[[_Words], int]


class _UsageError(Exception):
    """Wrong words on the command line: one line, exit code 2."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _UsageError("%s (see %s --help)" % (message, self.prog))

    def _print_message(self, message: str, file: Any = None) -> None:
        (file or sys.stdout).write(message)  # argparse would swallow that nobody can read it


_COMMANDS: Dict[str, Tuple[_Function, Tuple[_Flag, ...]]] = {}


def command(name: str, *flags: _Flag) -> Callable[[_Function], _Function]:
    """Makes a function the command `name` with these flags; its docstring is the help."""

    def register(function: _Function) -> _Function:
        _COMMANDS[name] = (function, flags)
        return function

    return register


def _flag(*names: str, **how: Any) -> _Flag:
    return lambda parser: parser.add_argument(*names, **how)


def _setting(field: str) -> _Flag:
    option = OPTIONS[field]
    how = {"type": option.parse, "metavar": option.metavar, "help": option.help, "dest": field}
    if field in ("allowed_hosts", "allowed_origins"):
        how["action"] = "extend"
    return _flag(option.flag, **how)


_ROOT = _flag(
    "--root", "--metaflow-root", metavar="DIR",
    help="the directory that contains .metaflow (default: as Metaflow's local mode finds it)",
)  # fmt: skip
_SERVER = (_ROOT,) + tuple(
    _setting(field)
    for field in ("port", "host", "idle_timeout", "allowed_hosts", "allowed_origins", "ui_bundle")
)
_FORCE = _flag(
    "--force",
    action="store_true",
    help="also when runs are active, or when the daemon does not answer",
)


def _settings(args: _Words, **defaults: Any) -> Settings:
    """Settings from the command line and the environment."""
    settings = make_settings(vars(args), os.environ, **defaults)
    if settings.ui_bundle:
        problem = bundle_problem(settings.ui_bundle)
        if problem:
            name = "--bundle" if args.ui_bundle else ENV_PREFIX + "UI_BUNDLE"
            raise SettingsError("%s: %s" % (name, problem))
    return settings


def _server_settings(args: _Words, **defaults: Any) -> Settings:
    """The same, with the UI bundle that a daemon would serve."""
    settings = _settings(args, **defaults)
    return settings if settings.ui_bundle else settings._replace(ui_bundle=find_bundle())


# -- the UI bundle --


def bundle_problem(path: str) -> str:
    """Why `path` is no static build of the UI; "" if it looks like one (the server looks closer)."""
    if os.path.isdir(path):
        if os.path.isfile(os.path.join(path, "index.html")):
            return ""
        return "%s has no index.html" % path
    if not os.path.isfile(path):
        return "there is no %s" % path
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"PK\3\4":
                return "%s is neither a folder nor a zip" % path
            file.seek(max(0, os.path.getsize(path) - 65_557))
            # The table comes last: a download that broke off has none.
            return "" if b"PK\5\6" in file.read() else "%s is not a whole zip" % path
    except OSError as error:
        return "cannot read %s: %s" % (path, error.strerror)


def find_bundle() -> Optional[str]:
    """A UI bundle that nobody named: metaflow-ui*.zip beside the .pyz or in ~/.cache/mflocal (the last by
    name), or the one that build.py put into the .pyz. Only of owners whom we trust with code."""
    places = [os.path.join(os.path.expanduser("~"), ".cache", "mflocal")]
    trusted = {0, os.geteuid()}
    program = os.path.realpath(sys.argv[0] or ".")
    if program.endswith(".pyz") and os.path.isfile(program):
        places.insert(0, os.path.dirname(program))
        trusted.add(os.stat(program).st_uid)
    for place in places:
        for path in sorted(glob.glob(os.path.join(glob.escape(place), "metaflow-ui*.zip")))[::-1]:
            try:
                owners = {os.lstat(path).st_uid, os.stat(path).st_uid}
            except OSError:
                continue
            if owners <= trusted and not bundle_problem(path):
                return path
    inside = os.path.join(os.path.dirname(os.path.abspath(__file__)), UI_BUNDLE_INSIDE)
    return inside if os.path.isfile(inside) else None


# -- the environment of clients --


def no_proxy(environ: Mapping[str, str], address: str = "") -> str:
    """Both spellings of NO_PROXY in one, and our own address: requests prefers the lower-case one."""
    if (environ.get("no_proxy") or environ.get("NO_PROXY", "")).strip() == "*":
        return "*"  # everything, but only where it stands alone
    texts = (environ.get("NO_PROXY", ""), environ.get("no_proxy", ""), LOCAL_NAMES, address)
    words = [word.strip() for text in texts for word in text.split(",")]
    return ",".join(dict.fromkeys(filter(None, words)))


def client_environment(
    settings: Settings, state: State, config: ClientConfig, lease: str = ""
) -> Dict[str, str]:
    """The variables that make Metaflow's client use this daemon, on behalf of a wrapper's lease."""
    env = {"METAFLOW_SERVICE_URL": state.url, "METAFLOW_DEFAULT_METADATA": "service"}
    if lease:
        # Clients name the lease by their URL. What Metaflow writes into the templates of an orchestrator
        # (argo-workflows create) are its headers and this other URL.
        env["METAFLOW_SERVICE_URL"] += LEASE_PREFIX + lease
        if not config.get("METAFLOW_SERVICE_INTERNAL_URL"):
            env["METAFLOW_SERVICE_INTERNAL_URL"] = state.url
    key = state.record.get("auth_key")
    if key:
        env["METAFLOW_SERVICE_AUTH_KEY"] = str(key)
    if state.record.get("ui"):
        env["METAFLOW_UI_URL"] = state.url
    elif config.get("METAFLOW_UI_URL"):
        env["METAFLOW_UI_URL"] = ""  # it shows the runs of another service
    env["NO_PROXY"] = env["no_proxy"] = no_proxy(os.environ, state.address)
    user = login_name(os.environ)
    if user:
        env["METAFLOW_USER"] = user
    if "root" in settings.asked:
        # Metadata, artifacts and cards must not part ways.
        if config.get("METAFLOW_DATASTORE_SYSROOT_LOCAL") is None:
            env["METAFLOW_DATASTORE_SYSROOT_LOCAL"] = settings.root
        # Cards go to the nearest .metaflow unless told otherwise; and told, Metaflow 2.19 cannot read them itself.
        parted = nearest_metaflow_dir(os.getcwd()) != settings.metaflow_dir
        if parted and config.get("METAFLOW_CARD_LOCALROOT") is None:
            env["METAFLOW_CARD_LOCALROOT"] = os.path.join(settings.metaflow_dir, "mf.cards")
    return env


def cards_elsewhere(
    settings: Settings, config: ClientConfig, env: Mapping[str, str]
) -> Optional[str]:
    """Where CMD's cards go if not below our root: they follow the current directory, not the datastore.

    Source: CardDatastore.get_storage_root in metaflow/plugins/cards/card_datastore.py.
    """
    place = config.get("METAFLOW_CARD_LOCALROOT")
    if "METAFLOW_CARD_LOCALROOT" in env:
        return None
    if not isinstance(place, str):
        nearest = nearest_metaflow_dir(os.getcwd()) or os.path.join(os.getcwd(), METAFLOW_DIR)
        place = os.path.join(nearest, "mf.cards")
    place = os.path.abspath(place)
    return None if place == os.path.join(settings.metaflow_dir, "mf.cards") else place


def has_user_name(environ: Mapping[str, str]) -> bool:
    """Whether Metaflow finds a user name that it takes (get_username in metaflow/util.py)."""
    names = ("METAFLOW_USER", "SUDO_USER", "USERNAME", "USER")
    return any(environ.get(name, "root") not in ("", "root") for name in names)


def login_name(environ: Mapping[str, str]) -> Optional[str]:
    """A user name for Metaflow where the environment has none. None for root, whom Metaflow refuses on purpose."""
    if has_user_name(environ) or not os.geteuid():
        return None
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return "uid%d" % os.geteuid()


def _remarks(config: ClientConfig, settings: Settings, url: str) -> str:
    """What of the user's configuration `run` sets aside, or cannot serve, for our line on stderr."""
    text = ""
    other = str(config.get("METAFLOW_SERVICE_URL") or url)
    if other.rstrip("/") != url and not other.startswith(url + LEASE_PREFIX):
        text += ", overrides METAFLOW_SERVICE_URL=%s" % other
    datastore = config.get("METAFLOW_DEFAULT_DATASTORE")
    if datastore and datastore != "local":
        text += ", default datastore %s is not local" % datastore
    sysroot = config.get("METAFLOW_DATASTORE_SYSROOT_LOCAL")
    if isinstance(sysroot, str) and real_root(os.path.join(os.getcwd(), sysroot)) != settings.root:
        text += ", but METAFLOW_DATASTORE_SYSROOT_LOCAL keeps artifacts in %s" % sysroot
    if not has_user_name(os.environ) and not os.geteuid():
        text += ", Metaflow runs no flow of root without a name: set METAFLOW_USER=NAME"
    return text


def _compare(settings: Settings, running: Running) -> None:
    """Say so if a running daemon has other options than the ones asked for."""
    if running.how != "reused":
        return
    state, other = running.state, []
    for field in sorted(settings.asked - {"root", "heartbeats", "ui_bundle"}):
        wanted = getattr(settings, field)
        own = field in ("port", "auth_key", "host")
        has = state.record.get(field) if own else state.options.get(field, wanted)
        if field == "port" and not wanted:
            continue
        if (list(wanted) if isinstance(wanted, tuple) else wanted) != has:
            name = OPTIONS[field].flag or ENV_PREFIX + OPTIONS[field].variable
            other.append(name + ("" if field == "auth_key" else " is %s" % (has,)))
    if other:
        complain(
            "the running daemon keeps its options (%s); `mflocal restart` changes them"
            % ", ".join(other)
        )


# -- run --


@command(
    "run",
    *_SERVER,
    _setting("heartbeats"),
    _flag("words", nargs=argparse.REMAINDER, metavar="CMD", help="the command and its arguments"),
)
def _run(args: _Words) -> int:
    """run CMD with the service in its environment"""
    words = args.words[1:] if args.words[:1] == ["--"] else args.words
    if not words:
        raise _UsageError("run needs a command, as in: mflocal run python flow.py run")
    settings = _server_settings(args)
    config = ClientConfig(os.environ, os.getcwd())
    lease = os.urandom(8).hex()
    running = ensure(settings)
    env = client_environment(settings, running.state, config, lease)
    environ = {name: value for name, value in {**os.environ, **env}.items() if name}
    if settings.heartbeats == "sidecar":
        if environ.get("METAFLOW_ENABLED_SIDECAR") == "":
            del environ["METAFLOW_ENABLED_SIDECAR"]  # from a `mflocal run` around this one
    elif config.get("METAFLOW_ENABLED_SIDECAR") is None:
        environ["METAFLOW_ENABLED_SIDECAR"] = ""
    wrapper = _Wrapper(settings, running, lease, cards_elsewhere(settings, config, env))
    try:
        if not args.quiet:
            state = running.state
            place = (state.url, state.record["root"], running.how, state.pid)
            complain("%s, root %s, %s, pid %d" % place + _remarks(config, settings, state.url))
            _compare(settings, running)
        return wrapper.run(words, environ, args.closed)
    finally:
        wrapper.close()


# Signals that are not for us to hand on: ours alone, from our own faults, or (SIGTTIN, SIGTTOU) sent by the
# kernel to the whole group.
_NOT_FORWARDED = {
    signal.SIGCHLD, signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE, signal.SIGXFSZ, signal.SIGTTIN,
    signal.SIGTTOU, signal.SIGILL, signal.SIGTRAP, signal.SIGBUS, signal.SIGFPE, signal.SIGSEGV,
    signal.SIGSYS,
}  # fmt: skip
SIGNAL_SPREAD = 0.01  # s that a sender who signals one process after the other gets to reach all
WITNESS_TIMEOUT = 1.0  # s for its answer; it may have been stopped
SIGNAL_MEMORY = 0.1  # s for which a signal of the group explains one of the same number that we got


class _Witness:
    """A process of our group that only notices which signals the whole group gets.

    Ctrl-C, `kill -- -PGID` and systemd send a signal to CMD as well as to us; `kill PID` means CMD but
    reaches us alone. Nothing that comes with a signal tells which it was, on any system.
    """

    def __init__(self, numbers: Collection[int]) -> None:
        self._numbers = numbers
        self._seen: Dict[int, float] = {}  # signal number -> monotonic time
        ask_r, self._ask = os.pipe()
        self._told, told_w = os.pipe()
        if os.fork():
            os.close(ask_r)
            os.close(told_w)
            return
        try:
            os.closerange(0, 3)
            os.close(self._ask)
            os.set_blocking(told_w, False)
            signal.set_wakeup_fd(told_w, warn_on_full_buffer=False)
            for number in numbers:
                signal.signal(number, _no_handler)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
            while os.read(ask_r, 1):  # ends with the wrapper
                os.write(told_w, b"\0")
        finally:
            os._exit(0)

    def saw(self, number: int) -> bool:
        """Whether the signal that we have just got went to the whole group."""
        # The next signal waits for its turn: two who ask at once would take each other's answers.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, self._numbers)
        told = b""
        try:
            time.sleep(SIGNAL_SPREAD)
            os.write(self._ask, b"?")
            while b"\0" not in told and select.select([self._told], [], [], WITNESS_TIMEOUT)[0]:
                told += os.read(self._told, 256) or b"\0"
        except OSError:
            pass  # somebody has ended it: every signal counts as ours alone
        now = time.monotonic()
        self._seen.update(dict.fromkeys(told, now))
        by_group = now - self._seen.get(number, -SIGNAL_MEMORY) < SIGNAL_MEMORY
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return by_group


def _no_handler(_number: int, _frame: Any) -> None:
    """The number has gone into the wake-up pipe. (A handler, not SIG_IGN, which CMD would inherit.)"""


class _Ended(Exception):
    """CMD cannot go on: its daemon is gone for good."""


class _Wrapper:
    """CMD, its lease, and its daemon: waits for all three at once, without polling."""

    def __init__(
        self, settings: Settings, running: Running, lease: str, cards: Optional[str] = None
    ) -> None:
        self._settings = settings
        self._running = running
        self._lease = lease
        self._cards = cards
        self._link: Optional[Link] = running.link
        self._ready_fd = running.ready_fd
        self._granted = False  # whether the daemon has ever had our lease
        self._retry_at: Optional[float] = None  # monotonic: when to look for our daemon again
        self._lost_at = 0.0  # monotonic
        self._restarts: List[float] = []
        self._pid = 0
        self._early: List[int] = []  # signals that came before CMD was there
        self._status: Optional[int] = None
        self._wake_r, self._wake_w = os.pipe()
        os.set_blocking(self._wake_r, False)
        os.set_blocking(self._wake_w, False)

    def close(self) -> None:
        """Let the lease go. If CMD ended by itself, say so first: then its runs have ended with it.

        A daemon that is not ready yet has seen no run, and is not waited for.
        """
        if not self._link:
            return
        try:
            # A shell reports the signal that ended its flow as 128 + N.
            if self._ready_fd < 0 and self._status is not None and 0 <= self._code() < 128:
                self._link.sock.settimeout(1.0)
                self._say({"lease": self._lease, "ended": True})
                while self._link.due:
                    self._link.receive()
        except (OSError, ValueError, IndexError):
            pass
        self._link.close()

    def _say(self, body: Mapping[str, Any]) -> None:
        assert self._link is not None
        self._link.send("POST", "/_mflocal/lease", body)

    def run(self, words: Sequence[str], env: Mapping[str, str], closed: Sequence[int]) -> int:
        """Run CMD to its end, with the descriptors `closed` closed. Returns the exit code, or -N for signal N."""
        self._take_lease()
        mask = self._catch_signals()
        try:
            self._pid = _spawn_command(words, env, closed, mask)
        except (OSError, ValueError) as error:
            code = getattr(error, "errno", errno.ENOENT)  # ValueError: no name, or a NUL in it
            complain("cannot run %s: %s" % (words[0] or "''", os.strerror(code)))
            return 127 if code in (errno.ENOENT, errno.ENOTDIR) else 126
        for number in self._early:
            self._forward(number, False)
        try:
            while not self._reap():
                self._wait()
        except (_Ended, DaemonError) as error:
            complain("%s; ending the command" % error)
            return self._end_command()
        return self._code()

    def _code(self) -> int:
        status = self._status or 0
        return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)

    # -- signals --

    def _catch_signals(self) -> Collection[int]:
        """Hear every signal, blocked ones too. Returns the mask that CMD is to inherit."""
        numbers = {
            number
            for number in signal.valid_signals() - _NOT_FORWARDED
            if signal.getsignal(number) != signal.SIG_IGN  # nohup stays nohup
        }
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
        self._witness = _Witness(numbers)
        signal.set_wakeup_fd(self._wake_w, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, _no_handler)
        for number in numbers:
            signal.signal(number, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {*numbers, signal.SIGCHLD})
        return mask

    def _on_signal(self, number: int, _frame: Any) -> None:
        if not self._pid:
            self._early.append(number)
        elif self._status is None:
            self._forward(number, self._witness.saw(number))

    def _forward(self, number: int, by_group: bool) -> None:
        """Hand a signal to CMD, which has got it already if it went to the process group that we share."""
        try:
            group = os.getpgid(self._pid)
            if by_group and group == self._pid:
                os.killpg(group, number)  # Ctrl-C for a command that leads a group of its own
            elif not by_group or group != os.getpgrp():
                os.kill(self._pid, number)
        except OSError:
            pass
        if number == signal.SIGTSTP:
            # The shell waits for us to stop; after SIGCONT we go on behind kill().
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            signal.signal(number, self._on_signal)

    def _reap(self) -> bool:
        """Reap what has ended: CMD, daemons that we started, as PID 1 every orphan. True once CMD has ended."""
        try:
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    break
                if pid == self._pid:
                    self._status = status
        except ChildProcessError:
            pass
        return self._status is not None

    def _wait(self) -> None:
        """Sleep until CMD ends, a signal comes, or something happens to the daemon; then deal with it."""
        poll = select.poll()
        poll.register(self._wake_r, select.POLLIN)
        if self._link:
            poll.register(self._link.sock, select.POLLIN)
        if self._ready_fd >= 0:
            poll.register(self._ready_fd, select.POLLIN)
        pause = None
        if self._retry_at is not None:
            pause = max(0.0, self._retry_at - time.monotonic()) * 1000
        events = [fd for fd, _ in poll.poll(pause)]
        if self._wake_r in events:
            os.read(self._wake_r, 4096)
        if self._reap():
            return
        if self._ready_fd in events:
            fd, self._ready_fd = self._ready_fd, -1
            problem = read_ready(fd)
            if problem == NO_REPORT and len(self._restarts) < MAX_RESTARTS:
                self._lost()  # killed while it started: the next one may live
            elif problem:
                raise _Ended(start_problem(self._running.state, problem))
        if self._link and self._link.sock.fileno() in events:
            self._lease_event(self._link)
        if self._retry_at is not None and time.monotonic() >= self._retry_at:
            self._find_again()

    # -- the daemon --

    def _take_lease(self) -> None:
        """Ask for the lease on a connection that stays open; the answer may come when it comes."""
        try:
            if self._link:
                self._say({"lease": self._lease, "cards": self._cards})
        except OSError:
            if self._ready_fd < 0:
                self._lost()

    def _lease_event(self, link: Link) -> None:
        """The lease connection has something: the answer, or its end."""
        try:
            if link.due and link.receive()[0] == 200:
                self._granted = True
                return
        except (OSError, ValueError, IndexError):
            pass
        if self._ready_fd < 0:
            self._lost()
            return
        link.close()  # it ends while it starts: its report, or the end of the pipe, says why
        self._link = None

    def _lost(self) -> None:
        """The daemon is gone. daemon.json tells: still its own means it crashed, else it was asked to go."""
        if self._link:
            self._link.close()
            self._link = None
        now = time.monotonic()
        self._retry_at = self._lost_at = now

    def _find_again(self) -> None:
        """Bring a crashed daemon back on its port; after a `restart` go over to the new one."""
        state = self._running.state
        if self._granted and not state.is_ours():
            self._adopt(state)
            return
        now = time.monotonic()
        self._restarts = [t for t in self._restarts if now - t < RESTART_WINDOW]
        if len(self._restarts) >= MAX_RESTARTS:
            self._retry_at = self._restarts[0] + RESTART_WINDOW
            return
        settings = _as_started(self._settings, state)
        try:
            self._running = ensure(settings, last_port=state.port)
        except DaemonError:
            # A connection of another program may have the port for a moment; CMD's client asks again for long.
            if now > self._lost_at + PORT_PATIENCE:
                raise
            self._retry_at = now + RETRY_PAUSE
            return
        self._restarts.append(now)
        if self._running.state.port != state.port:
            raise _Ended(
                "the daemon came back on port %d, not %d" % (self._running.state.port, state.port)
            )
        self._settings = settings
        self._retry_at = None
        self._link = self._running.link
        self._ready_fd = self._running.ready_fd
        if self._running.how == "started":
            new = self._running.state.pid
            complain("the daemon (pid %d) died; started it again, pid %d" % (state.pid, new))
        self._take_lease()

    def _adopt(self, old: State) -> None:
        """The daemon was asked to go. If another one comes on the same port within a minute, hold on to it."""
        try:
            found = find_daemon(self._settings, use=True, patience=0)
        except DaemonError:  # it starts or stops
            found = None
        if found and found[0].port == old.port:
            self._running = Running(found[0], "reused", link=found[1])
            self._link = found[1]
            self._retry_at = None
            self._take_lease()
            return
        if found:
            found[1].close()
        now = time.monotonic()
        self._retry_at = now + RETRY_PAUSE if now < self._lost_at + RESTART_WINDOW else None

    def _end_command(self) -> int:
        """SIGTERM, and SIGKILL when that does not help."""
        self._forward(signal.SIGTERM, False)
        deadline = time.monotonic() + KILL_AFTER
        poll = select.poll()
        poll.register(self._wake_r, select.POLLIN)
        while not self._reap():
            left = deadline - time.monotonic()
            if left <= 0:
                self._forward(signal.SIGKILL, False)
                os.waitpid(self._pid, 0)
                break
            if poll.poll(left * 1000):
                os.read(self._wake_r, 4096)
        return EXIT_DAEMON


def _spawn_command(
    words: Sequence[str], env: Mapping[str, str], closed: Sequence[int], mask: Collection[int]
) -> int:
    """Start CMD as execvp would; its pid. Raises OSError, and ValueError for words that name no program."""
    how: Any = {
        "file_actions": [(os.POSIX_SPAWN_CLOSE, fd) for fd in closed],
        "setsigmask": mask,
        "setsigdef": (signal.SIGPIPE, signal.SIGXFSZ),  # which Python ignores
    }
    try:
        return os.posix_spawnp(words[0], list(words), env, **how)
    except OSError as error:
        if error.errno != errno.ENOEXEC:
            raise
    import shutil

    # A script without #! is the shell's.
    script = shutil.which(words[0]) or words[0]
    return os.posix_spawn("/bin/sh", ["sh", script, *words[1:]], env, **how)


def _as_started(settings: Settings, state: State) -> Settings:
    """Our settings with the options that the daemon of `state` had: a daemon brought back keeps them."""
    options = state.options.items()
    values: Dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in options if k in KEPT_OPTIONS
    }
    values.update(
        auth_key=state.record.get("auth_key"), ui_bundle=state.record.get("ui"), port=state.port
    )
    # The bundle may be gone by now: that must not keep the daemon from coming back.
    return settings._replace(asked=settings.asked - {"ui_bundle"}, **values)


# -- start, env, ui --


def _ensure_ready(args: _Words, settings: Settings) -> Running:
    running = wait_ready(settings, ensure(settings))
    if not args.quiet:
        _compare(settings, running)
    return running


def _exports(settings: Settings, state: State) -> str:
    env = client_environment(settings, state, ClientConfig(os.environ, os.getcwd()))
    return "".join("export %s=%s\n" % (name, shlex.quote(value)) for name, value in env.items())


def _where(state: State) -> str:
    seconds = state.options.get("idle_timeout", IDLE_TIMEOUT)
    idle = "stops after %g s without use" % seconds if seconds else "never stops by itself"
    return "%s, root %s, %s" % (state.url, state.record["root"], idle)


def _print_started(settings: Settings, running: Running) -> None:
    state = running.state
    how = running.how if running.how == "started" else "runs already"
    ui = UI_IMAGE % state.url
    if state.record.get("ui"):
        ui = "mflocal ui" if state.record.get("auth_key") else state.url
    print("mflocal %s: pid %d, %s" % (how, state.pid, _where(state)))
    print("%sUI: %s" % (_exports(settings, state), ui))


@command("start", *_SERVER)
def _start(args: _Words) -> int:
    """start the daemon in the background"""
    settings = _server_settings(args)
    _print_started(settings, _ensure_ready(args, settings))
    return 0


@command("env", *_SERVER)
def _env(args: _Words) -> int:
    """print export lines for eval "$(mflocal env)"; starts the daemon"""
    settings = _server_settings(args)
    state = _ensure_ready(args, settings).state
    print(_exports(settings, state), end="")
    if not args.quiet:
        complain(_where(state))
    return 0


@command("ui", *_SERVER, _flag("--no-open", action="store_true", help="do not open the browser"))
def _ui(args: _Words) -> int:
    """serve the Metaflow UI and open it in the browser"""
    asked = _settings(args)
    if not os.path.isdir(asked.metaflow_dir) and "root" not in asked.asked:
        raise SettingsError(
            "there is no .metaflow in %s or above it: go to your project, or name it with --root"
            % asked.root
        )
    settings = _server_settings(args)
    running = _ensure_ready(args, settings)
    link, state = running.link, running.state
    bundle = asked.ui_bundle or (None if state.record.get("ui") else settings.ui_bundle)
    status, body = link.ask("POST", "/_mflocal/ui", {"bundle": bundle})
    if not args.quiet:
        complain(_where(state))
    if status == 404:
        print(
            "No UI bundle found (--bundle DIR|ZIP, %sUI_BUNDLE, metaflow-ui*.zip beside the .pyz or in\n"
            "~/.cache/mflocal). With Docker:\n%s" % (ENV_PREFIX, UI_IMAGE % state.url)
        )
        return 0
    if status != 200:
        raise DaemonError("the daemon refused the bundle: %s" % (_detail(body) or status))
    print(body["url"], flush=True)
    if not args.no_open:
        import webbrowser

        webbrowser.open(_redirect(body["url"]) if "?" in body["url"] else body["url"])
    return 0


def _redirect(url: str) -> str:
    """A private page that leads to `url`, for a minute: `ps` shows everybody what a browser is told to open."""
    import tempfile

    page = '<meta charset="utf-8"><meta http-equiv="refresh" content="0;url=%s">\n' % url
    with tempfile.NamedTemporaryFile(
        "w", prefix="mflocal-ui-", suffix=".html", delete=False
    ) as file:
        file.write(page)
    if os.fork() == 0:
        try:
            os.setsid()
            os.closerange(0, 3)  # nobody waits for our end on a pipe
            time.sleep(REDIRECT_SECONDS)
            os.unlink(file.name)
        finally:
            os._exit(0)
    return "file://" + file.name


def _detail(body: Any) -> str:
    return str(body.get("detail", "")) if isinstance(body, dict) else ""


# -- stop, restart, status, url, logs, serve --


def _none_runs(settings: Settings) -> int:
    complain(none_runs(settings))
    return EXIT_NONE


def _run_lines(body: Mapping[str, Any]) -> List[str]:
    return [
        "%s/%s (%s)" % (run.get("flow_id"), run.get("run_number"), run.get("how"))
        for run in body.get("active_runs", [])
    ]


def _stop_daemon(settings: Settings, force: bool) -> Tuple[int, Optional[State]]:
    """(exit code, the daemon that was stopped or refused to)."""
    stopped = stop_daemon(settings, force)
    if stopped is None:
        return EXIT_NONE, None
    for line in _run_lines({"active_runs": stopped.refused}):
        complain("active: " + line)
    if stopped.refused:
        complain("not stopped, because runs are active; --force stops anyway")
        return EXIT_REFUSED, stopped.state
    for pid in stopped.killed:
        complain("killed the daemon (pid %d), which did not answer" % pid)
    return 0, stopped.state


@command("stop", _ROOT, _FORCE)
def _stop(args: _Words) -> int:
    """stop it; refused while runs are active"""
    settings = _settings(args)
    code, state = _stop_daemon(settings, args.force)
    if code == EXIT_NONE:
        return _none_runs(settings)
    if code == 0 and not args.quiet:
        print("mflocal stopped" + (": pid %d, %s" % (state.pid, state.url) if state else ""))
    return code


@command("restart", *_SERVER, _FORCE)
def _restart(args: _Words) -> int:
    """stop, then start on the same port"""
    settings = _server_settings(args)
    code, state = _stop_daemon(settings, args.force)
    if code == EXIT_REFUSED:
        return code
    if state:  # what nobody asks for anew stays as it was
        same: Dict[str, Any] = {
            name: getattr(settings, name) for name in settings.asked if name != "port"
        }
        if settings.port:
            same["port"] = settings.port
        settings = _as_started(settings, state)._replace(**same, asked=settings.asked)
    _print_started(settings, wait_ready(settings, ensure(settings)))
    return 0


@command("status", _ROOT, _flag("--json", action="store_true", help="print JSON"))
def _status(args: _Words) -> int:
    """what runs, on which port, which runs are active"""
    settings = _settings(args)
    told = ask_daemon(settings, "GET", "/_mflocal/status")
    if not told:
        if not args.json:
            return _none_runs(settings)
        print(json.dumps({"running": False, "root": settings.root}))
        return EXIT_NONE
    body = told[2]
    if args.json:
        print(json.dumps({"running": True, **body}, indent=2))
        return 0
    left = body["idle_left"]
    never = "not while in use" if body.get("idle_timeout") else "never"
    runs = _run_lines(body)
    rows = [(name, body[name]) for name in ("pid", "url", "port", "root", "version")]
    rows.append(("uptime", "%d s" % body["uptime"]))
    rows.append(("idle stop", never if left is None else "in %.0f s" % left))
    rows.append(("log", body["log"]))
    rows.append(("active runs", len(runs) or "none"))
    rows += [("", line) for line in runs]
    print("\n".join("%-12s %s" % row for row in rows))
    return 0


@command("url", _ROOT)
def _url(args: _Words) -> int:
    """print the URL"""
    settings = _settings(args)
    found = find_daemon(settings)
    if not found:
        return _none_runs(settings)
    print(found[0].url)
    return 0


@command(
    "logs",
    _ROOT,
    _flag("-f", "--follow", action="store_true", help="keep printing what is added"),
)
def _print_logs(args: _Words) -> int:
    """print the daemon's log"""
    paths = [os.path.join(d, LOG_FILE) for d in state_dirs(_settings(args))]
    path = next((p for p in paths if os.path.exists(p)), paths[0])
    out = sys.stdout.buffer
    old = _read_log(path + ".1", 0)[0]
    text, where = _read_log(path, 0)
    if not old and not text:
        complain("there is no log in %s" % os.path.dirname(path))
    out.write(old + text)
    out.flush()
    while args.follow:
        time.sleep(0.2)
        inode = where[0]
        text, where = _read_log(path, where[1], inode)
        if where[0] != inode:  # rotated: the rest of the old file, then the new one
            text = _read_log(path + ".1", where[2], inode)[0] + text
        out.write(text)
        out.flush()
    return 0


def _read_log(path: str, offset: int, inode: int = 0) -> Tuple[bytes, Tuple[int, int, int]]:
    """(text from offset, (inode, new offset, the offset asked for)); from 0 if it is another file by now."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return b"", (inode, offset, offset)
    with open(fd, "rb") as file:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            return b"", (inode, offset, offset)
        file.seek(0 if inode and info.st_ino != inode else offset)
        text = file.read()
        return text, (info.st_ino, file.tell(), offset)


@command("serve", *_SERVER)
def _serve(args: _Words) -> int:
    """be the daemon, in the foreground"""
    return serve_here(_server_settings(args, idle_timeout=0.0))


@command("help", _flag("name", nargs="?", metavar="COMMAND", choices=list(_COMMANDS)))
def _help(args: _Words) -> int:
    """print the options of a command"""
    return main([args.name, "--help"] if args.name else ["--help"])


# -- main --


def _parser() -> _Parser:
    # argparse makes a formatter for each flag; to ask for the terminal's width it would load shutil, 3 ms.
    layout = functools.partial(argparse.HelpFormatter, width=80)
    parser = _Parser(
        "mflocal",
        usage="mflocal [-q] COMMAND [options]",
        allow_abbrev=False,
        formatter_class=layout,
    )
    parser.add_argument("-V", "--version", action="version", version="mflocal " + VERSION)
    quiet: Any = {"action": "store_true", "help": "no line of our own on stderr"}
    parser.add_argument("-q", "--quiet", **quiet)
    commands = parser.add_subparsers(prog="mflocal", dest="command", metavar="COMMAND")
    for name, (function, flags) in _COMMANDS.items():
        usage = "mflocal %s [options]%s" % (name, " CMD ..." if name == "run" else "")
        one = commands.add_parser(
            name,
            usage=usage,
            help=function.__doc__,
            description=function.__doc__,
            allow_abbrev=False,
            formatter_class=layout,
        )
        one.set_defaults(function=function)
        one.add_argument("-q", "--quiet", **quiet, default=argparse.SUPPRESS)
        for add in flags:
            add(one)
    return parser


def _encode_anyway(error: UnicodeError) -> Tuple[Union[str, bytes], int]:
    """An error handler of codecs for output: names that are no text pass as the bytes that they are, and
    characters that the terminal does not have as escapes."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)


def _open_streams() -> List[int]:
    """Makes descriptors 0 to 2 and sys.stdout usable. Returns the descriptors that our caller had closed:
    pipes and sockets of ours must not land there."""
    closed = []
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            closed.append(os.open(os.devnull, os.O_RDWR))
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")
    codecs.register_error("mflocal", _encode_anyway)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="mflocal")
    return closed


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The program: `mflocal COMMAND ...`. Returns the exit code, or -N for an end by signal N."""
    name = "mflocal"
    args = argparse.Namespace(closed=_open_streams())
    try:
        try:
            parser = _parser()
            parser.parse_args(argv, args)
            name = args.command
            if not name:
                parser.print_help()
            code = args.function(args) if name else EXIT_USAGE
        except SystemExit as done:  # --help and --version
            code = int(done.code or 0)
        sys.stdout.flush()
        return code
    except (_UsageError, SettingsError) as error:
        complain(str(error))
        return EXIT_USAGE
    except DaemonError as error:
        complain(str(error))
        return EXIT_DAEMON
    except KeyboardInterrupt:
        return -signal.SIGINT
    except OSError as error:
        # The disk under our output is full, its reader left (`mflocal logs | head`), the daemon went while it
        # was asked. Nothing may be flushed to stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if isinstance(error, BrokenPipeError):
            return -signal.SIGPIPE
        complain("%s: %s" % (name, error))
        return EXIT_DAEMON


def _die(number: int) -> NoReturn:
    """End by a signal: a shell's loop goes on after Ctrl-C unless it sees that the signal has ended us."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the command has left its own core file
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
    os.kill(os.getpid(), number)
    os._exit(128 + number)  # PID 1 of a container outlives its own signals


def console() -> NoReturn:
    """Entry point of the console scripts and of the .pyz."""
    code = main()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
        pass
    if code < 0:
        _die(-code)
    os._exit(code)  # taking this large module apart would cost 5 ms of every command


if __name__ == "__main__":
    console()
