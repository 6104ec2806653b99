"""Run a foreign program with a time limit, and leave nothing of it behind but one folder.

On Linux all processes that it started are ended, elsewhere those of its process group. On Linux it also
runs in namespaces of its own, by unshare(1) and sandbox.py: it sees the machine's software, GPUs and its
folder. Where a container or a kernel forbids that, it runs without, and is not confined.
"""
import contextlib
import errno
import functools
import os
import signal
import site
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Iterator, Mapping, NamedTuple

import command

SYSTEM = "/bin /sbin /usr /lib /lib32 /lib64 /libx32 /etc /opt /sys".split()  # no folder with sockets
SYSTEM += "/nix/store /run/current-system /run/opengl-driver".split()
UNSHARE = ("unshare --user --map-root-user --mount --pid --ipc --net --uts --cgroup --fork "
           "--kill-child").split()
SANDBOX = Path(__file__).with_name("sandbox.py")
SEARCH_PATHS = "PATH", "LD_LIBRARY_PATH"
CHILD_SUBREAPER = 36  # of prctl


class Ended(NamedTuple):
    """How a program ended."""
    status: int | None  # None: it ran out of time
    last_words: str  # the last line of what it wrote to stderr
    confined: bool


def run(program: list, environment: Mapping[str, str], folder: Path, timeout: float,
        confine: bool = True) -> Ended:
    """Run a program in a folder, where its output will be in out.txt and err.txt; ends what it started."""
    confine = confine and not obstacle()
    if confine:
        program = confined_command(folder, program)
    elif command.LIBC:  # processes that lose their parent become this one's children
        command.LIBC.prctl(CHILD_SUBREAPER, 1, 0, 0, 0)
    before = children(os.getpid())
    status = None
    with open(folder / "out.txt", "wb") as out, open(folder / "err.txt", "wb") as err:
        process = subprocess.Popen(program, env=environment, cwd=folder, start_new_session=True,
                                   stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                                   preexec_fn=command.end_with_parent)
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(timeout)
        finally:
            if confine:
                end_namespace(process)
            else:
                end_all(process, before)
    return Ended(status, last_line(folder / "err.txt"), confine)


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A new folder, without links in its path; removed at the end, however deep what a program left in it."""
    folder = Path(tempfile.mkdtemp(prefix="scores-")).resolve()
    try:
        yield folder
    finally:
        remove(folder)


def remove(folder: Path):
    """Remove a folder, also where a program took its owner's rights in it."""
    rm = ["rm", "-rf", "--", folder]
    if subprocess.run(rm, stderr=subprocess.DEVNULL).returncode:
        closed = ["find", folder, "-type", "d", "!", "-perm", "-700"]
        subprocess.run([*closed, "-exec", "chmod", "u+rwx", "{}", ";"], stderr=subprocess.DEVNULL)
        subprocess.run(rm, stderr=subprocess.DEVNULL)


def read_regular(path: Path, most: int = 1 << 32) -> bytes:
    """The bytes of a file that a foreign program wrote; OSError if it is none, but a link, pipe or device."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > most:
            raise OSError(errno.EINVAL, "it is not a file, or too large", str(path))
        return file.read(status.st_size)


def last_line(path: Path) -> str:
    """The last line of a text that a foreign program wrote, if it can be read."""
    lines = []
    with contextlib.suppress(OSError):
        lines = read_regular(path, 1 << 26).decode(errors="replace").strip().splitlines()
    return lines[-1][:1000] if lines else ""


def end_namespace(process: subprocess.Popen):
    """End unshare's child, which is the first process of its namespace, and with it all others there."""
    while process.poll() is None:
        for pid in children(process.pid) or {process.pid}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def end_all(process: subprocess.Popen, before: set[int]):
    """End a program with all that it started. `before`: this process's children that are none of these."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    while orphans := children(os.getpid()) - before:  # their own children become ours in turn
        for pid in orphans:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        time.sleep(0.01)


def children(parent: int) -> set[int]:
    """Processes that a process has started, or taken over."""
    found = set()
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(file.read_text(errors="replace").rpartition(")")[2].split()[1]) == parent:
                found.add(int(file.parent.name))
    return found


def search_path(name: str) -> list[str]:
    """The folders that a search path names, if they exist; what is no absolute path is left out."""
    paths = os.environ.get(name, "").split(":")
    return [path for path in paths if os.path.isabs(path) and os.path.isdir(path)]


def software() -> list[str]:
    """Folders of the machine's software: the system's, this Python's, and what the search paths name.

    Left out are this folder and the user's own packages, where an earlier program could have written.
    """
    paths = [path for name in SEARCH_PATHS for path in search_path(name)]
    left_out = str(Path(__file__).parent), site.getusersitepackages()
    packages = [path for path in sys.path if path and path not in left_out]
    paths += [sys.prefix, sys.base_prefix]
    return [*SYSTEM, *(path for path in paths + packages if os.path.isabs(path) and path != "/")]


def way_to(path: Path) -> str:
    """How every confined program can read a file, or something in a folder; empty if it cannot."""
    path, folders = path.resolve(), [Path(folder).resolve() for folder in software()]
    for folder in folders:
        if path.is_relative_to(folder):
            return f"{path}, which lies among the software: {folder}"
    return next((f"{folder}, software in {path}" for folder in folders if folder.is_relative_to(path)), "")


@functools.cache
def obstacle() -> str:
    """Why this machine does not let a program be confined; empty if it does."""
    try:
        with temporary_folder() as folder:
            nothing = confined_command(folder, [sys.executable, "-I", "-c", ""])
            done = subprocess.run(nothing, capture_output=True, text=True, errors="replace")
    except OSError as error:
        return str(error)
    return (done.stderr.strip() or f"unshare: status {done.returncode}") if done.returncode else ""


def confined_command(folder: Path, program: list) -> list:
    """The command that runs a program in namespaces of its own, where sandbox.py prepares them."""
    return [*UNSHARE, sys.executable, "-I", SANDBOX, folder, *software(), "--", *program]
