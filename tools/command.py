"""What the commands in tools/ and data/ share: how they begin and how they end. It needs Python alone.

Whatever ends a command early is one line on stderr: a mistake, a missing package, Ctrl-C, a full disk. A
console that is gone ends nothing but its output.
"""
import contextlib
import ctypes
import errno
import hashlib
import os
import signal
import sys
from pathlib import Path
from typing import Any, Callable, Iterator, NoReturn


def one_line(text: Any) -> str:
    """The text in one line; what no console shows, as in the names of some files, is escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def note(text: Any) -> None:
    """Say something on stderr, in one line."""
    with contextlib.suppress(OSError):  # the console may be gone
        print(one_line(text), file=sys.stderr, flush=True)


def report(problem: Any) -> int:
    """Say on stderr what was wrong; returns the exit status of a mistake."""
    if isinstance(problem, OSError) and problem.strerror:
        problem = f"{problem.strerror}: {problem.filename}" if problem.filename else problem.strerror
    note(f"error: {problem}")
    return 2


def say(text: Any) -> None:
    """Print; when whoever read it has gone, the work goes on without."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        silence()


def silence() -> None:
    """Let nothing more reach stdout, not even what Python still holds of it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def end_with_parent() -> None:
    """Let Linux end this process when the one that started it is killed, so that it frees its GPU."""
    if LIBC:
        LIBC.prctl(1, signal.SIGKILL)


def interrupted() -> NoReturn:
    """End the process at once, whatever other threads are doing."""
    report("interrupted")
    os._exit(130)


@contextlib.contextmanager
def imports(requirements: str = "requirements.txt") -> Iterator[None]:
    """Where packages are imported that may be missing."""
    try:
        yield
    except ImportError as error:
        raise SystemExit(report(f"{error}: pip install -r {requirements}")) from None
    except KeyboardInterrupt:
        interrupted()


def run(main: Callable[[], int | None]) -> NoReturn:
    """Call a command's main and end the process with the status that it returns."""
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # names of files need not be text
    status = None
    try:
        try:
            status = main()
        except SystemExit as end:  # argparse's, after --help or a wrong argument
            status = end.code
        sys.stdout.flush()
    except KeyboardInterrupt:
        interrupted()
    except BrokenPipeError:
        silence()
        status = status or 141  # as SIGPIPE ends programs
    except OSError as error:  # the console's; a command reports its own
        silence()
        status = status or report(error)
    sys.exit(status)


def write_whole(path: Path, data: bytes) -> None:
    """Write all of a file, through to the disk, or nothing; OSError if that fails."""
    path = path.resolve()
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is not a file", str(path))
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Hold a folder for this process alone; OSError if another process holds it.

    The system lets go of the lock with its process, however that ends.
    """
    with imports():
        import filelock
    path = folder / ".lock"
    lock = filelock.FileLock(path, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        problem = "another prepare.py or download.py is at work there"
        raise BlockingIOError(errno.EAGAIN, problem, str(folder)) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        lock.release()
