"""Run a foreign program with a time limit, and leave nothing of it behind but one folder.

On Linux all processes that it started are ended, elsewhere those of its process group. On Linux it also
runs in namespaces of its own, by unshare(1). Its root holds the machine's software and /sys, which it
cannot change, GPUs, an empty /tmp and /dev/shm, and the one folder whose content outlasts it. It sees no
other process, no network, and no shared memory, message queue or semaphore of others; what it makes of
these goes with it. It has no capabilities. A filter of system calls keeps it from the kernel's keyrings,
from sockets that no namespace holds, and from io_uring. Where a container or a kernel forbids any of this,
it runs without, and is not confined.

What remains: it can find what somebody put among the software, and some hundred kilobytes can pass from one
run to the next by what is cached, such as which pages of which files are in memory; less by counters of the
kernel and the state of a device.
"""
import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import platform
import signal
import site
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Mapping, NamedTuple

SYSTEM = "/bin /sbin /usr /lib /lib32 /lib64 /libx32 /etc /opt /nix /sys /var/lib".split()
SYSTEM += "/run/current-system /run/opengl-driver /run/nvidia-persistenced /run/systemd/resolve".split()
DEVICES = "null zero full random urandom nvidia*".split()  # in /dev; folders with their content
UNSHARE = "unshare --user --map-root-user --mount --pid --ipc --net --uts --cgroup".split()
MOUNT_SETATTR, IO_URING_SETUP = 442, 425  # system calls; these have one number on all machines
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8  # of mount, and of mount_setattr
MS_BIND, MS_REC, MS_PRIVATE = 1 << 12, 1 << 14, 1 << 18
MNT_DETACH, AT_RECURSIVE = 2, 0x8000
SET_FLAGS, IFF_UP = 0x8914, 1  # of a network device
CHILD_SUBREAPER, NO_NEW_PRIVILEGES, SECCOMP, DROP_CAPABILITY = 36, 38, 22, 24  # of prctl
LOAD, IF_EQUAL, IF_AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06  # of the filter's language, BPF
ALLOW, FORBID = 0x7FFF0000, 0x00050000 | errno.EPERM

libc = ctypes.CDLL(None, use_errno=True)


class Machine(NamedTuple):
    """A type of machine: its number for filters of system calls, and those of some calls."""
    audit_arch: int
    pivot_root: int
    add_key: int  # request_key and keyctl follow
    socket: int


MACHINES = {"x86_64": Machine(0xC000003E, 155, 248, 41), "aarch64": Machine(0xC00000B7, 41, 217, 198)}


class Ended(NamedTuple):
    """How a program ended."""
    status: int | None  # None: it ran out of time
    last_words: str  # the last line of what it wrote to stderr
    confined: bool


def run(command: list, environment: Mapping[str, str], folder: Path, timeout: float,
        confine: bool = True) -> Ended:
    """Run a command in a folder, where its output will be in out.txt and err.txt; ends what it started."""
    before = children()
    confine = confine and is_possible()
    if sys.platform == "linux":
        libc.prctl(CHILD_SUBREAPER, 1, 0, 0, 0)  # processes that lose their parent become this one's children
    status = None
    with open(folder / "out.txt", "wb") as out, open(folder / "err.txt", "wb") as err:
        command = confined_command(folder, command) if confine else command
        process = subprocess.Popen(command, env=environment, cwd=folder, start_new_session=True,
                                   stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(timeout)
        finally:
            end_all(process, before)
    return Ended(status, last_line(folder / "err.txt"), confine)


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


def software() -> list[str]:
    """Folders of the machine's software: the system's, this Python's, and what the search paths name.

    Left out are this folder and the user's own packages, where an earlier program could have written.
    """
    paths = [path for name in ("PATH", "LD_LIBRARY_PATH") for path in os.environ.get(name, "").split(":")]
    left_out = str(Path(__file__).parent), site.getusersitepackages()
    packages = [path for path in sys.path if path and path not in left_out]
    paths += [sys.prefix, sys.base_prefix]
    return [*SYSTEM, *filter(os.path.isabs, paths + packages)]


def can_read(path: Path) -> bool:
    """Whether a file lies among what every confined program can read."""
    return any(path.resolve().is_relative_to(Path(folder).resolve()) for folder in software())


@functools.cache
def is_possible() -> bool:
    """Whether this machine lets a program be confined."""
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(OSError):
        command = confined_command(Path(folder).resolve(), [sys.executable, "-I", "-c", ""])
        return subprocess.run(command, capture_output=True).returncode == 0
    return False


def confined_command(folder: Path, command: list) -> list:
    """The command that runs a command in namespaces of its own, by `main` below."""
    prepare = [sys.executable, "-I", __file__, folder, *software(), "--"]
    return [*UNSHARE, "--fork", "--kill-child", *prepare, *command]


# ---- Inside the namespaces, before the program starts ------------------------------------------------------


def call(function, *arguments):
    """Call a function of libc; OSError if it fails."""
    arguments = [os.fsencode(value) if isinstance(value, (str, Path)) else value for value in arguments]
    if function(*arguments) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(arguments))


def confine_this_process(folder: str, paths: list[str], machine: Machine):
    """Give this process a root with software and a folder, and take away what reaches beyond that."""
    shown = {path: os.path.realpath(path) for path in paths if os.path.exists(path)}
    # The new root is mounted on /tmp and then changes places with the old one, from which parts are taken.
    call(libc.mount, None, "/", None, MS_REC | MS_PRIVATE, None)
    call(libc.mount, "tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, None)
    os.mkdir("/tmp/old")
    call(libc.syscall, machine.pivot_root, "/tmp", "/tmp/old")
    for name in "tmp", "dev/shm", "proc":
        os.makedirs(f"/{name}")
    for path in sorted(shown.values()):
        if not os.path.lexists(path):  # it is not in a folder that came before it
            bind(path, MS_RDONLY | MS_NOSUID | MS_NODEV)
    for path, true_path in shown.items():
        if not os.path.lexists(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.symlink(true_path, path)
    for device in (device for name in DEVICES for device in Path("/old/dev").glob(name)):
        bind(f"/dev/{device.name}", MS_RDONLY)  # its mode and times; the device itself can be written to
    for name, target in dict(fd="", stdin="/0", stdout="/1", stderr="/2").items():
        os.symlink(f"/proc/self/fd{target}", f"/dev/{name}")
    bind(folder, MS_NOSUID | MS_NODEV)
    call(libc.mount, "proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, None)
    for entry in Path("/proc").iterdir():  # all but that of its own processes, which CUDA writes to
        if not entry.name.isdigit() and not entry.is_symlink():
            bind(str(entry), MS_RDONLY, entry)
    call(libc.umount2, "/old", MNT_DETACH)
    os.rmdir("/old")
    os.chdir(folder)
    with socket.socket() as any_socket:  # the loopback device, by which ranks meet
        fcntl.ioctl(any_socket, SET_FLAGS, struct.pack("16sh14x", b"lo", IFF_UP))
    for capability in range(64):  # what the program could have; those that are unknown fail
        libc.prctl(DROP_CAPABILITY, capability, 0, 0, 0)
    call(libc.prctl, NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    forbid_calls(machine)


def bind(path: str, attributes: int, source: Path | None = None):
    """Make what the old root has at a path, or a source, visible there in the new one."""
    old = str(source or f"/old{path}")
    if os.path.isdir(old):
        os.makedirs(path, exist_ok=True)
    elif not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Path(path).touch()
    call(libc.mount, old, path, None, MS_BIND | MS_REC, None)
    change = struct.pack("4Q", attributes, 0, 0, 0)
    call(libc.syscall, MOUNT_SETATTR, -1, path, AT_RECURSIVE, change, len(change))


def forbid_calls(machine: Machine):
    """Let what no namespace holds fail, here and in all that starts: keys, sockets of odd families, io_uring.

    A filter of system calls, by their numbers, in BPF: code, how many lines to skip if so and if not, value.
    """
    x32, after_netlink = 0x40000000, 17  # numbers of another ABI, families in no namespace begin there
    program = [
        (LOAD, 0, 0, 4),
        (IF_EQUAL, 0, 9, machine.audit_arch),  # no: forbid
        (LOAD, 0, 0, 0),
        (IF_AT_LEAST, 7, 0, x32),  # yes: forbid
        (IF_EQUAL, 6, 0, IO_URING_SETUP),  # yes: forbid
        (IF_EQUAL, 2, 0, machine.socket),  # yes: look at the family
        (IF_AT_LEAST, 0, 3, machine.add_key),  # no: allow
        (IF_AT_LEAST, 2, 3, machine.add_key + 3),  # yes: allow; no: forbid
        (LOAD, 0, 0, 16),
        (IF_AT_LEAST, 1, 0, after_netlink),  # yes: forbid
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, FORBID),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    filter_program = struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code))
    call(libc.prctl, SECCOMP, 2, filter_program, 0, 0)


def main(folder: str, *arguments: str):
    end = arguments.index("--")
    command = arguments[end + 1 :]
    try:
        confine_this_process(folder, list(arguments[:end]), MACHINES[platform.machine()])
        os.execvp(command[0], command)
    except (OSError, KeyError) as error:  # KeyError: a machine of another type
        print(f"it cannot be confined here: {error!r}", file=sys.stderr)
        sys.exit(126)


if __name__ == "__main__":
    main(*sys.argv[1:])
