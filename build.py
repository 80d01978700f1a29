#!/usr/bin/env python3
"""Makes dist/mflocal.pyz: mflocal in one file that every Python from 3.9 runs. Needs nothing but pip.

    python build.py                  dist/mflocal.pyz
    python build.py --ui DIR|ZIP     the same with a static build of the official Metaflow UI inside
    python build.py --output FILE

shiv packs the archive, and its contents are then written again in one fixed form: the same bytes whatever
the time, the umask, the folder and the Python (a Python built with another zlib may compress differently).
The launcher is ours, because shiv's insists on a writable HOME; see LAUNCHER.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import io
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

SHIV = ("shiv==1.0.8", "click==8.1.8")  # the newest that run on Python 3.9
EPOCH = 315532800  # 1980-01-01, the earliest time that a zip can tell
MAX_SIZE = 200_000
MAX_SIZE_UI = 1_200_000
UI_NAME = "mflocal_ui.zip"  # where mflocal looks for it: beside itself
TOP = "site-packages/"
HERE = Path(__file__).resolve().parent

LAUNCHER = '''\
"""Starts mflocal from this archive.

It is unpacked once into a private folder, so that Python can keep its compiled form; where no such folder
can be written it runs out of the archive. Each file appears whole, by a rename: several first starts do not
disturb each other. Nothing is left in the environment.
"""
import os
import sys

BUILD = "@BUILD@"
FILES = @FILES@
TOP = "site-packages/"


def ours(path):
    """Whether a folder is private: nobody else may put code there."""
    info = os.lstat(path)
    return info.st_mode & 0o170022 == 0o040000 and info.st_uid == os.geteuid()


def places():
    """The folders to keep the unpacked files in, best first."""
    env = os.environ.get
    yield env("SHIV_ROOT", "")
    yield env("XDG_CACHE_HOME") and os.path.join(env("XDG_CACHE_HOME"), "mflocal")
    if os.path.isdir(env("HOME", "")):
        yield os.path.join(env("HOME"), ".cache", "mflocal")
    for base in (env("TMPDIR", ""), "/tmp", "/var/tmp", "/dev/shm"):
        if os.path.isdir(base):
            yield os.path.join(base, "mflocal-%d" % os.geteuid())


def unpack(place, target):
    """Write what is missing or cut off in `target`, a folder in `place`. Raises OSError."""
    for path in (place, target):
        os.makedirs(path, 0o700, exist_ok=True)
        if not ours(path):
            raise OSError(path + " is not private")
    for name, size in FILES.items():
        path = os.path.join(target, name)
        if os.path.isfile(path) and os.path.getsize(path) == size:
            continue
        temp = "%s.%s.tmp" % (path, os.urandom(6).hex())
        try:
            with open(os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(__loader__.get_data(os.path.join(__loader__.archive, TOP + name)))
            os.replace(temp, path)
        finally:
            if os.path.exists(temp):
                os.unlink(temp)


def start():
    if os.environ.get("SHIV_INTERPRETER"):
        from _bootstrap import bootstrap

        bootstrap()
    before = sys.dont_write_bytecode
    sys.path[0] = archive = os.path.join(__loader__.archive, TOP.rstrip("/"))
    for place in filter(os.path.isabs, filter(None, places())):
        target = os.path.join(place, "mflocal-" + BUILD)
        try:
            unpack(place, target)
        except OSError:
            continue
        sys.path[0] = target
        sys.dont_write_bytecode = False  # the folder is for nothing else
        break
    try:
        import mflocal
    except Exception:
        if sys.path[0] == archive:
            raise
        # A crash of the machine has left bytes that are no Python: the next start unpacks them anew.
        import shutil

        shutil.rmtree(sys.path[0], ignore_errors=True)
        sys.path[0] = archive
        import mflocal
    sys.dont_write_bytecode = before
    del sys.path[0]
    mflocal.console()


start()
'''


def read_ui(source: Path) -> bytes:
    """A zip of a UI build without its source maps; index.html at its top. Raises SystemExit."""
    if source.is_dir():
        paths = [path for path in source.rglob("*") if path.is_file()]
        files = {path.relative_to(source).as_posix(): path.read_bytes() for path in paths}
    elif zipfile.is_zipfile(source):
        files = read_zip(source)
    else:
        raise SystemExit(f"build.py: {source} is neither a folder nor a zip")
    pages = [name for name in files if name.split("/")[-1] == "index.html"]
    if not pages:
        raise SystemExit(f"build.py: there is no index.html in {source}")
    top = min(pages, key=len)[: -len("index.html")]
    hidden = [n for n in files if any(p.startswith((".", "__MACOSX")) for p in n.split("/"))]
    kept = [n for n in files if n.startswith(top) and n not in hidden and not n.endswith(".map")]
    return write_zip({name[len(top) :]: files[name] for name in kept})


def read_zip(path: Path) -> dict[str, bytes]:
    """The files in a zip."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}


def write_zip(files: dict[str, bytes], prefix: bytes = b"") -> bytes:
    """A zip of `files` in one fixed form: sorted, one time stamp, one mode. `prefix` goes before it."""
    buffer = io.BytesIO()
    buffer.write(prefix)
    with zipfile.ZipFile(buffer, "a" if prefix else "w") as archive:
        # The launcher first: Python looks at the directory at the end anyway, people look at the head.
        for name in sorted(files, key=lambda name: (name != "__main__.py", name)):
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            info.create_system = 3
            info.external_attr = 0o100644 << 16
            archive.writestr(info, files[name], zipfile.ZIP_DEFLATED, 9)
    return buffer.getvalue()


def run(problem: str, *words: str | Path, **environ: str) -> None:
    """Run a module of this Python. Raises SystemExit."""
    command = [sys.executable, "-m", *map(str, words)]
    if subprocess.run(command, env={**os.environ, **environ}).returncode:
        raise SystemExit(f"build.py: {problem}")


def pack(stage: Path, scratch: Path) -> dict[str, bytes]:
    """What the pinned shiv makes of a folder of site-packages: the files of its archive."""
    environ = {"SOURCE_DATE_EPOCH": str(EPOCH), "PYTHONWARNINGS": "ignore"}
    installed = {path.metadata["Name"]: path.version for path in importlib.metadata.distributions()}
    if "shiv==" + installed.get("shiv", "") != SHIV[0]:
        environ["PYTHONPATH"] = str(scratch / "shiv")
        words = ("pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps")
        run("pip could not fetch shiv", *words, "--target", scratch / "shiv", *SHIV)
    shiv = ("shiv", "--reproducible", "--entry-point", "mflocal:console")
    run("shiv failed", *shiv, "--site-packages", stage, "-o", scratch / "shiv.pyz", **environ)
    return read_zip(scratch / "shiv.pyz")


def build(ui: Path | None) -> bytes:
    """The bytes of mflocal.pyz."""
    with tempfile.TemporaryDirectory() as name:
        stage = Path(name, "site-packages")
        stage.mkdir()
        # Line ends as in the repository, whatever git made of them in this checkout.
        module = (HERE / "mflocal.py").read_bytes().replace(b"\r\n", b"\n")
        (stage / "mflocal.py").write_bytes(module)
        if ui is not None:
            (stage / UI_NAME).write_bytes(read_ui(ui))
        files = pack(stage, Path(name))
    environment = json.loads(files["environment.json"])
    files["environment.json"] = json.dumps(environment, indent=1, sort_keys=True).encode() + b"\n"
    parts = {name[len(TOP) :]: files[name] for name in sorted(files) if name.startswith(TOP)}
    digest = hashlib.sha256()
    for name, data in parts.items():
        digest.update(b"%s\0%d\0" % (name.encode(), len(data)) + data)
    sizes = {name: len(data) for name, data in parts.items()}
    text = LAUNCHER.replace("@BUILD@", digest.hexdigest()[:16]).replace("@FILES@", repr(sizes))
    files["__main__.py"] = text.encode("ascii")
    return write_zip(files, b"#!/usr/bin/env python3\n")


def main() -> None:
    """Build, write, report."""
    parser = argparse.ArgumentParser(description="Makes mflocal.pyz.")
    parser.add_argument("--ui", type=Path, metavar="DIR|ZIP", help="build of the UI to put inside")
    output = HERE / "dist" / "mflocal.pyz"
    parser.add_argument("--output", type=Path, metavar="FILE", default=output)
    args = parser.parse_args()
    data = build(args.ui)
    limit = MAX_SIZE if args.ui is None else MAX_SIZE_UI
    if len(data) > limit:
        raise SystemExit(f"build.py: {len(data)} bytes are more than the {limit} allowed")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    temporary = args.output.with_name(args.output.name + ".tmp")
    temporary.write_bytes(data)
    temporary.chmod(0o755)
    temporary.replace(args.output)
    print(f"{args.output}: {len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}")


if __name__ == "__main__":
    main()
