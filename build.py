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

SHIV = "1.0.8"
CLICK = "8.1.8"  # the newest that runs on Python 3.9; shiv's only need at build time
EPOCH = 315532800  # 1980-01-01, the earliest time that a zip can tell
MAX_SIZE = 200_000
MAX_SIZE_UI = 1_200_000
UI_NAME = "mflocal_ui.zip"  # where mflocal looks for it: beside itself
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
    try:
        info = os.lstat(path)
    except OSError:
        return False
    return info.st_mode & 0o170022 == 0o040000 and info.st_uid == os.geteuid()


def places():
    """The folders to keep the unpacked files in, best first."""
    env = os.environ.get
    if os.path.isabs(env("SHIV_ROOT", "")):
        yield env("SHIV_ROOT")
    if os.path.isabs(env("XDG_CACHE_HOME", "")):
        yield os.path.join(env("XDG_CACHE_HOME"), "mflocal")
    if os.path.isabs(env("HOME", "")) and os.path.isdir(env("HOME")):
        yield os.path.join(env("HOME"), ".cache", "mflocal")
    for base in (env("TMPDIR", ""), "/tmp", "/var/tmp", "/dev/shm"):
        if os.path.isabs(base) and os.path.isdir(base):
            yield os.path.join(base, "mflocal-%d" % os.geteuid())


def unpack(place, target):
    """Write what is missing in `target`, a folder in `place`. Raises OSError."""
    os.makedirs(place, 0o700, exist_ok=True)
    if not os.path.lexists(target):
        try:
            os.mkdir(target, 0o700)
        except FileExistsError:
            pass
    if not (ours(place) and ours(target)):
        raise OSError(target + " is not private")
    for name in FILES:
        path = os.path.join(target, name)
        if os.path.isfile(path):
            continue
        temp = "%s.%s.tmp" % (path, os.urandom(6).hex())
        try:
            with open(os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(__loader__.get_data(os.path.join(__loader__.archive, TOP + name)))
            os.replace(temp, path)
        except OSError:
            if os.path.exists(temp):
                os.unlink(temp)
            raise


def folder():
    """(where to import mflocal from, whether that is an unpacked copy)."""
    for place in places():
        target = os.path.join(place, "mflocal-" + BUILD)
        try:
            paths = [os.path.join(target, name) for name in FILES]
            if not (ours(place) and ours(target) and all(map(os.path.isfile, paths))):
                unpack(place, target)
            return target, True
        except OSError:
            continue
    return os.path.join(__loader__.archive, TOP.rstrip("/")), False


def start():
    if os.environ.get("SHIV_INTERPRETER"):
        from _bootstrap import bootstrap

        bootstrap()
    path, cached = folder()
    before = sys.dont_write_bytecode
    sys.path[0] = path
    if cached:
        sys.dont_write_bytecode = False  # the folder is for nothing else
    import mflocal

    sys.dont_write_bytecode = before
    del sys.path[0]
    mflocal.console()


start()
'''


def read_ui(source: Path) -> bytes:
    """A zip of a UI build without its source maps; index.html at its top. Raises SystemExit."""
    files: dict[str, bytes] = {}
    if source.is_dir():
        for path in source.rglob("*"):
            if path.is_file():
                files[path.relative_to(source).as_posix()] = path.read_bytes()
    elif zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            files = {
                info.filename: archive.read(info)
                for info in archive.infolist()
                if not info.is_dir()
            }
    else:
        raise SystemExit(f"build.py: {source} is neither a folder nor a zip")
    pages = [name for name in files if name.split("/")[-1] == "index.html"]
    if not pages:
        raise SystemExit(f"build.py: there is no index.html in {source}")
    top = min(pages, key=len)[: -len("index.html")]
    kept = {}
    for name, data in files.items():
        hidden = any(part.startswith((".", "__MACOSX")) for part in name.split("/"))
        if name.startswith(top) and not hidden and not name.endswith(".map"):
            kept[name[len(top) :]] = data
    return write_zip(kept)


def write_zip(files: dict[str, bytes], prefix: bytes = b"") -> bytes:
    """A zip of `files` in one fixed form: sorted, one time stamp, one mode. `prefix` goes before it."""
    buffer = io.BytesIO()
    buffer.write(prefix)
    with zipfile.ZipFile(buffer, "a" if prefix else "w") as archive:
        # The launcher first: Python looks for it in the directory at the end anyway, people look at the head.
        for name in sorted(files, key=lambda name: (name != "__main__.py", name)):
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            info.create_system = 3
            info.external_attr = 0o100644 << 16
            archive.writestr(info, files[name], zipfile.ZIP_DEFLATED, 9)
    return buffer.getvalue()


def shiv_environment(scratch: Path) -> dict[str, str]:
    """The environment in which `python -m shiv` is the pinned one; fetches it if this Python has another."""
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(EPOCH), "PYTHONWARNINGS": "ignore"}
    try:
        if importlib.metadata.version("shiv") == SHIV:
            return environment
    except importlib.metadata.PackageNotFoundError:
        pass
    target = scratch / "shiv"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
    ]
    done = subprocess.run([*command, "--target", str(target), f"shiv=={SHIV}", f"click=={CLICK}"])
    if done.returncode:
        raise SystemExit("build.py: pip could not fetch shiv")
    return {**environment, "PYTHONPATH": str(target)}


def pack(stage: Path, scratch: Path) -> dict[str, bytes]:
    """What shiv makes of a folder of site-packages: the files of its archive."""
    output = scratch / "shiv.pyz"
    command = [sys.executable, "-m", "shiv", "--site-packages", str(stage), "--reproducible"]
    command += ["--entry-point", "mflocal:console", "--output-file", str(output)]
    done = subprocess.run(command, env=shiv_environment(scratch))
    if done.returncode:
        raise SystemExit("build.py: shiv failed")
    with zipfile.ZipFile(output) as archive:
        return {
            info.filename: archive.read(info) for info in archive.infolist() if not info.is_dir()
        }


def launcher(files: dict[str, bytes]) -> bytes:
    """__main__.py for an archive of `files`."""
    top = "site-packages/"
    names = sorted(name[len(top) :] for name in files if name.startswith(top))
    digest = hashlib.sha256()
    for name in names:
        digest.update(b"%s\0%d\0" % (name.encode(), len(files[top + name])) + files[top + name])
    text = LAUNCHER.replace("@BUILD@", digest.hexdigest()[:16]).replace("@FILES@", repr(names))
    return text.encode("ascii")


def build(ui: Path | None) -> bytes:
    """The bytes of mflocal.pyz."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        stage = scratch / "site-packages"
        stage.mkdir()
        # Line ends as in the repository, whatever git made of them in this checkout.
        (stage / "mflocal.py").write_bytes(
            (HERE / "mflocal.py").read_bytes().replace(b"\r\n", b"\n")
        )
        if ui is not None:
            (stage / UI_NAME).write_bytes(read_ui(ui))
        files = pack(stage, scratch)
    environment = json.loads(files["environment.json"])
    files["environment.json"] = json.dumps(environment, indent=1, sort_keys=True).encode() + b"\n"
    files["__main__.py"] = launcher(files)
    return write_zip(files, b"#!/usr/bin/env python3\n")


def main() -> int:
    """Build, write, report."""
    parser = argparse.ArgumentParser(description="Makes mflocal.pyz.")
    parser.add_argument(
        "--ui", type=Path, metavar="DIR|ZIP", help="static build of the UI to put inside"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", default=HERE / "dist" / "mflocal.pyz"
    )
    arguments = parser.parse_args()
    data = build(arguments.ui)
    limit = MAX_SIZE if arguments.ui is None else MAX_SIZE_UI
    if len(data) > limit:
        raise SystemExit(f"build.py: {len(data)} bytes are more than the {limit} allowed")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    temporary = arguments.output.with_name(arguments.output.name + ".tmp")
    temporary.write_bytes(data)
    temporary.chmod(0o755)
    temporary.replace(arguments.output)
    print(f"{arguments.output}: {len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
