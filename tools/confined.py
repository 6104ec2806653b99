"""Run a foreign program so that nothing of it stays: its time is limited, and all its processes are ended.

On Linux with Landlock the program can create files in its own folder and in shared memory only, and open
nothing but these, GPUs and what the machine's software is made of. It can make no POSIX message queue. What
it leaves in shared memory, in System V memory, queues and semaphores, in the kernel's keyrings or in the
limits of this process is reported. If the kernel holds some of these beforehand, or shared memory more than
FEW_BYTES, the program is not confined.

Landlock does not close the network, the limits and priorities of other processes, and the metadata of files:
names, sizes, times and attributes are seen, and those of its own user's files changed. By these a program
could still leave word for its next run, and find what somebody put among the software or into a message queue
before.
"""
import contextlib
import ctypes
import errno
import os
import resource
import signal
import site
import stat
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Iterable, Mapping, NamedTuple

SYSTEM = "/bin /sbin /usr /lib /lib32 /lib64 /libx32 /etc /opt /nix /sys /proc /var/lib".split()
SYSTEM += "/run/current-system /run/opengl-driver /run/nvidia-persistenced /run/systemd/resolve".split()
DEVICES = "null zero full random urandom nvidia* dri infiniband".split()  # of /dev, and all that is in them
SHARED_MEMORY = Path("/dev/shm")  # where compilers lock; what a program leaves there is reported
FEW_BYTES = 4096  # that may lie there beforehand: locks of other programs
READ, LIST = 0b1101, 0b1000  # Landlock's bits: execute, read files, list folders
WRITE = 0b0010 | 1 << 14  # write and truncate files
ANY = (1 << 15) - 1  # and create, remove, rename
NO_NEW_PRIVILEGES, CHILD_SUBREAPER = 38, 36  # of prctl
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # system calls

libc = ctypes.CDLL(None, use_errno=True)


class Ended(NamedTuple):
    """How a program ended."""
    status: int | None  # None: it ran out of time
    last_words: str  # the last line of what it wrote to stderr
    left: list[str]  # what it left or changed where its next run could find that
    confined: bool


def run(command: list, environment: Mapping[str, str], folder: Path, timeout: float,
        confine: bool = True) -> Ended:
    """Run a command in a folder, where its output will be in out.txt and err.txt; ends what it started."""
    before, shared, objects, mine = children(), shared_files(), kernel_objects(), own_limits()
    if sys.platform == "linux":
        libc.prctl(CHILD_SUBREAPER, 1, 0, 0, 0)  # processes that lose their parent become this one's children
    rules = ruleset(folder) if confine else None

    def give_up_access():
        resource.setrlimit(resource.RLIMIT_MSGQUEUE, (0, 0))
        if rules is not None:
            libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
            if libc.syscall(RESTRICT_SELF, rules, 0):
                os._exit(126)

    status = None
    try:
        with open(folder / "out.txt", "wb") as out, open(folder / "err.txt", "wb") as err:
            process = subprocess.Popen(command, env=environment, cwd=folder, start_new_session=True,
                                       stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                                       preexec_fn=give_up_access)
            try:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = process.wait(timeout)
            finally:
                end_all(process, before)
    finally:
        if rules is not None:
            os.close(rules)
    left = {path for path, *_ in shared_files() - shared} | (kernel_objects() - objects)
    left |= {f"the audit's own {name}" for name, value in own_limits().items() if value != mine[name]}
    nothing_before = not objects and sum(size for *_, size in shared) <= FEW_BYTES
    return Ended(status, last_line(folder / "err.txt"), sorted(left), rules is not None and nothing_before)


def read_regular(path: Path, most: int = 1 << 32) -> bytes:
    """The bytes of a file that a foreign program wrote; OSError if it is none, but a link, pipe or device."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        kind = os.fstat(descriptor)
        if not stat.S_ISREG(kind.st_mode) or kind.st_size > most:
            raise OSError(errno.EINVAL, "it is not a file, or too large", str(path))
        return file.read(kind.st_size)


def last_line(path: Path) -> str:
    """The last line of a text that a foreign program wrote, if it can be read."""
    lines = []
    with contextlib.suppress(OSError):
        lines = read_regular(path).decode(errors="replace").strip().splitlines()
    return lines[-1][:1000] if lines else ""


def end_all(process: subprocess.Popen, before: set[int]):
    """End a program with all that it started. `before`: this process's children that are none of these."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    while orphans := children() - before:  # their own children become ours in turn
        for pid in orphans:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        time.sleep(0.01)


def children() -> set[int]:
    """Processes whose parent is this one."""
    found = set()
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = file.read_text(errors="replace").rpartition(")")[2].split()[1]
            if int(parent) == os.getpid():
                found.add(int(file.parent.name))
    return found


def shared_files() -> set[tuple[str, int, int]]:
    """All that is in shared memory, links and folders too: path, time of change in ns, bytes."""
    found = set()
    for folder, folders, files in os.walk(SHARED_MEMORY):
        for name in folders + files:
            path = os.path.join(folder, name)
            with contextlib.suppress(OSError):
                status = os.lstat(path)
                found.add((path, status.st_ctime_ns, status.st_size))
    return found


def own_limits() -> dict[str, object]:
    """What another process of the same user can set of this one."""
    names = [name for name in dir(resource) if name.startswith("RLIMIT_")]
    limits = {name: resource.getrlimit(getattr(resource, name)) for name in names}
    limits["priority"] = os.getpriority(os.PRIO_PROCESS, 0)
    if sys.platform == "linux":
        limits |= {"processors": os.sched_getaffinity(0), "scheduler": os.sched_getscheduler(0),
                   "oom_score_adj": rows("/proc/self/oom_score_adj")}
    return limits


def kernel_objects() -> set[str]:
    """What programs keep in the kernel: System V memory, queues and semaphores, and keys."""
    found = set()
    for kind in "shm", "msg", "sem":
        found |= {f"{kind} {' '.join(row[:2])}" for row in rows(f"/proc/sysvipc/{kind}")[1:]}
    for row in filter(None, rows("/proc/keys")):
        number, flags, *_, kind, description = (row + [" "] * 8)[:9]  # a description may hold ends of lines
        is_the_kernels = kind == "keyring" and description[0] in "._"
        if not set("RDi") & set(flags) and not is_the_kernels:  # it is neither revoked nor dead
            found.add(f"key {number} {description}".strip())
    return found


def rows(path: str) -> list[list[str]]:
    """The words of every line of a file; none if there is no such file."""
    with contextlib.suppress(OSError):
        return [line.split() for line in Path(path).read_text(errors="replace").splitlines()]
    return []


def software() -> list[str]:
    """Folders of the machine's software: the system's, this Python's, and what the search paths name.

    What the user installed for themselves alone is none: a program could know that folder.
    """
    paths = [path for name in ("PATH", "LD_LIBRARY_PATH") for path in os.environ.get(name, "").split(":")]
    left_out = str(Path(__file__).parent), site.getusersitepackages()
    packages = [path for path in sys.path if path and path not in left_out]
    paths += [sys.prefix, sys.base_prefix]
    return [*SYSTEM, *filter(os.path.isabs, paths + packages)]


def can_read(path: Path) -> bool:
    """Whether a file lies among what every confined program can read."""
    return any(path.resolve().is_relative_to(Path(folder).resolve()) for folder in software())


def ruleset(folder: Path) -> int | None:
    """A Landlock ruleset, as a file descriptor, that closes all but a folder; None without Landlock."""
    version = libc.syscall(CREATE_RULESET, None, 0, 1) if sys.platform == "linux" else -1
    if version < 1:
        return None
    known = (1 << {1: 13, 2: 14}.get(version, 15)) - 1
    handled = struct.pack("Q", known)
    rules = libc.syscall(CREATE_RULESET, handled, len(handled), 0)
    allow(rules, software(), READ)
    allow(rules, ["/dev"], LIST)
    allow(rules, [device for name in DEVICES for device in Path("/dev").glob(name)], (READ | WRITE) & known)
    allow(rules, [folder, SHARED_MEMORY], ANY & known)
    return rules


def allow(rules: int, paths: Iterable, access: int):
    """Let a ruleset allow such access to files and to all that lies in folders; some may not exist."""
    for path in paths:
        with contextlib.suppress(OSError):
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            possible = access if os.path.isdir(path) else access & ~LIST
            libc.syscall(ADD_RULE, rules, 1, struct.pack("=Qi", possible, place), 0)
            os.close(place)
