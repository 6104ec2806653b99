"""Give this process a root of its own, take away what reaches beyond that, and become a program.

    unshare --user --map-root-user --mount --pid ... python sandbox.py FOLDER SOFTWARE... -- PROGRAM...

The root holds the machine's software and /sys, which cannot be changed, GPUs, an empty /tmp and /dev/shm,
and the one folder whose content outlasts it. There are no other processes, no network, and no shared
memory, message queue or semaphore of others; what is made of these goes with it. There are no capabilities
and no further namespaces in which there would be some. A filter of system calls closes the kernel's
keyrings, sockets that no namespace holds, and io_uring.

What remains: a program can find what somebody put among the software, and some hundred kilobytes can pass
from one run to the next by what is cached, such as which pages of which files are in memory; less by
counters of the kernel, numbers of new files, the time at which it ends, and the state of a device.
"""
import ctypes
import errno
import fcntl
import os
import platform
import socket
import struct
import sys
from pathlib import Path
from typing import NamedTuple

DEVICES = "null zero full random urandom nvidia*".split()  # in /dev; folders with their content
MOUNT_SETATTR, IO_URING_SETUP = 442, 425  # system calls; these have one number on all machines
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8  # of mount, and of mount_setattr
MS_BIND, MS_REC, MS_PRIVATE = 1 << 12, 1 << 14, 1 << 18
MNT_DETACH, AT_RECURSIVE = 2, 0x8000
SET_FLAGS, IFF_UP = 0x8914, 1  # of a network device
NO_NEW_PRIVILEGES, SECCOMP, DROP_CAPABILITY = 38, 22, 24  # of prctl
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


def call(function, *arguments):
    """Call a function of libc; OSError if it fails."""
    arguments = [os.fsencode(value) if isinstance(value, str) else value for value in arguments]
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
    Path("/proc/sys/user/max_user_namespaces").write_text("0")  # in others it would have capabilities again
    for entry in Path("/proc").iterdir():  # all but that of its own processes, which CUDA writes to
        if not entry.name.isdigit() and not entry.is_symlink():
            bind(str(entry), MS_RDONLY, entry)
    os.dup2(os.open("/dev/null", os.O_RDWR), 0)  # in place of the old root's, whose times could be changed
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
