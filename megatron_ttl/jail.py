"""Close doors of this process for good: the network, files, other processes, time and memory. Linux; nothing else is asked.

What a process has given up here, it and the programs it turns into cannot get back. `python -I -S jail.py SETTINGS`
gives up all of it and becomes a Python that runs a program nobody trusts; it imports nothing of the package.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress

_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000  # CLONE_* of unshare(2)
_DEATH_SIGNAL, _SET_SECCOMP, _DROP_BOUND, _NO_NEW_PRIVILEGES = 1, 22, 24, 38  # PR_* of prctl(2)
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000  # SECCOMP_RET_*
_EPERM, _EACCES, _ENOTTY, _ENOSYS = 1, 13, 25, 38
_THREAD = 0x00010000  # CLONE_THREAD
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of the numbers below, AUDIT_ARCH_*
_ABSENT = -1
# What a program that computes and prints needs; numbers of x86_64 and of aarch64 (asm/unistd_64.h, asm-generic/unistd.h).
_ALLOWED = {
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67), "close": (3, 57),
    "lseek": (8, 62), "fstat": (5, 80), "newfstatat": (262, 79), "statx": (332, 291), "stat": (4, _ABSENT),
    "lstat": (6, _ABSENT), "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "mremap": (25, 216),
    "brk": (12, 214), "madvise": (28, 233), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "rt_sigpending": (127, 136), "rt_sigtimedwait": (128, 137), "sigaltstack": (131, 132),
    "dup": (32, 23), "dup2": (33, _ABSENT), "dup3": (292, 24), "pipe": (22, _ABSENT), "pipe2": (293, 59),
    "poll": (7, _ABSENT), "ppoll": (271, 73), "select": (23, _ABSENT), "pselect6": (270, 72), "access": (21, _ABSENT),
    "faccessat": (269, 48), "faccessat2": (439, 439), "getdents64": (217, 61), "readlink": (89, _ABSENT),
    "readlinkat": (267, 78), "getcwd": (79, 17), "chdir": (80, 49), "statfs": (137, 43), "fstatfs": (138, 44),
    "umask": (95, 166), "futex": (202, 98), "set_robust_list": (273, 99), "rseq": (334, 293),
    "set_tid_address": (218, 96), "gettid": (186, 178), "getpid": (39, 172), "getppid": (110, 173),
    "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177), "getpgid": (121, 155),
    "getpgrp": (111, _ABSENT), "getsid": (124, 156), "getgroups": (115, 158), "getresuid": (118, 148),
    "getresgid": (120, 150), "sched_yield": (24, 124), "sched_getaffinity": (204, 123), "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115), "clock_gettime": (228, 113), "clock_getres": (229, 114), "gettimeofday": (96, 169),
    "time": (201, _ABSENT), "times": (100, 153), "getrandom": (318, 278), "getrusage": (98, 165), "sysinfo": (99, 179),
    "uname": (63, 160), "getrlimit": (97, 163), "membarrier": (324, 283), "exit": (60, 93), "exit_group": (231, 94),
    "execve": (59, 221), "arch_prctl": (158, _ABSENT), "restart_syscall": (219, 128), "getitimer": (36, 102),
    "setitimer": (38, 103), "alarm": (37, _ABSENT), "pause": (34, _ABSENT),
}
_IOCTL, _FCNTL, _PRLIMIT, _KILL_CALL, _TGKILL = (16, 29), (72, 25), (302, 261), (62, 129), (234, 131)
_OPEN, _OPENAT, _CLONE = (2, _ABSENT), (257, 56), (56, 220)
_TERMINAL_QUESTIONS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FI(O)CLEX
# F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC. Not F_SETOWN: its signals reach other processes.
_DESCRIPTOR_QUESTIONS = (0, 1, 2, 3, 4, 1030)
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446  # the same everywhere
_EXECUTE, _READ_FILE, _READ_DIRECTORY = 1, 4, 8  # LANDLOCK_ACCESS_FS_*


def leave_the_network(keep_rights: bool = True) -> bool:
    """Move to a network without any interface; not every system permits it. Before any thread is started.

    Args:
        keep_rights: try first to stay the user this process is; otherwise become nobody, with no rights over others.
    """
    libc = ctypes.CDLL(None)
    _no_new_privileges(libc)
    ways = (_NEW_NETWORK, _NEW_USER | _NEW_NETWORK)
    return any(libc.unshare(flags) == 0 for flags in (ways if keep_rights else ways[::-1]))


def die_with_parent(parent: int | None = None) -> None:
    """Be killed when the parent dies. After a change of user, which would undo it.

    Args:
        parent: its number, where it could have died before.
    """
    ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def set_limits(limits: dict[int, int]) -> None:
    """Set resource limits (`resource.RLIMIT_*` -> most), or keep what is narrower; they cannot be raised again."""
    for what, most in limits.items():
        hard = resource.getrlimit(what)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))


def read_only_these(paths: Iterable[str]) -> bool:
    """Let the kernel refuse every file but these and what lies below, writing even these, and signals to others.

    Returns:
        False where the kernel has no Landlock (Linux 5.13, and switched on).
    """
    libc = ctypes.CDLL(None)
    version = libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    rights = 13 + sum(version >= first for first in (2, 3, 5))  # REFER, TRUNCATE, IOCTL_DEV came later
    words = [(1 << rights) - 1, 3, 3][: 1 + (version >= 4) + (version >= 6)]  # files; TCP; sockets and signals of others
    attributes = struct.pack(f"={len(words)}Q", *words)
    ruleset = libc.syscall(_LANDLOCK_CREATE, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        return False
    for path in paths:
        with suppress(FileNotFoundError):
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            right = _EXECUTE | _READ_FILE | (_READ_DIRECTORY if os.path.isdir(path) else 0)
            added = libc.syscall(_LANDLOCK_ADD, ruleset, 1, struct.pack("=Qi", right, place), 0)
            os.close(place)
            if added:
                return False
    _no_new_privileges(libc)
    done = libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0) == 0
    os.close(ruleset)
    return done


def refuse_system_calls() -> bool:
    """Let the kernel refuse what computing and printing do not need: sockets, new processes, writing, others' affairs.

    Threads are allowed. A refused call fails with an error, it does not kill.

    Returns:
        False where the kernel has no seccomp, or its calls are not known here (x86_64 and aarch64 are).
    """
    if sys.platform != "linux" or platform.machine() not in _ARCHITECTURES or sys.maxsize < 1 << 32:
        return False
    column, architecture = _ARCHITECTURES[platform.machine()]
    code = b"".join(_filter(column, architecture, os.getpid()))
    libc = ctypes.CDLL(None)
    _no_new_privileges(libc)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))  # struct sock_fprog
    return libc.prctl(_SET_SECCOMP, 2, ctypes.c_char_p(program), 0, 0) == 0


def _no_new_privileges(libc: ctypes.CDLL) -> None:
    libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    for right in range(64):  # root would get all of them back with the next program
        libc.prctl(_DROP_BOUND, right, 0, 0, 0)


def _filter(column: int, architecture: int, own: int) -> Iterator[bytes]:
    """Yield the instructions of the filter (struct sock_filter, BPF); see seccomp(2)."""
    def instruction(code: int, value: int, if_so: int = 0, if_not: int = 0) -> bytes:
        return struct.pack("=HBBI", code, if_so, if_not, value)

    load, equal, common, answer = 0x20, 0x15, 0x45, 0x06  # LD|W|ABS, JMP|JEQ, JMP|JSET, RET

    def only_for(call: tuple[int, int], block: list[bytes]) -> list[bytes]:
        return [instruction(equal, call[column], 0, len(block)), *block] if call[column] != _ABSENT else []

    def one_of(call: tuple[int, int], argument: int, values: Iterable[int], error: int) -> list[bytes]:
        tests = [step for value in values for step in (instruction(equal, value, 0, 1), instruction(answer, _ALLOW))]
        return only_for(call, [instruction(load, 16 + 8 * argument), *tests, instruction(answer, _ERROR | error)])

    def bits(call: tuple[int, int], argument: int, mask: int, wanted: bool, error: int) -> list[bytes]:
        return only_for(call, [instruction(load, 16 + 8 * argument), instruction(common, mask, not wanted, wanted),
                               instruction(answer, _ALLOW), instruction(answer, _ERROR | error)])

    yield instruction(load, 4)
    yield instruction(equal, architecture, 1, 0)
    yield instruction(answer, _KILL)
    yield instruction(load, 0)
    for numbers in _ALLOWED.values():
        yield from only_for(numbers, [instruction(answer, _ALLOW)])
    yield from one_of(_IOCTL, 1, _TERMINAL_QUESTIONS, _ENOTTY)
    yield from one_of(_FCNTL, 1, _DESCRIPTOR_QUESTIONS, _EPERM)
    yield from one_of(_PRLIMIT, 0, (0, own), _EPERM)
    yield from one_of(_KILL_CALL, 0, (own,), _EPERM)
    yield from one_of(_TGKILL, 0, (own,), _EPERM)
    yield from bits(_OPEN, 1, _WRITES, False, _EACCES)
    yield from bits(_OPENAT, 2, _WRITES, False, _EACCES)
    yield from bits(_CLONE, 0, _THREAD, True, _EPERM)
    yield instruction(answer, _ERROR | _ENOSYS)  # the answer of a kernel that is too old: libraries know what to do then


def python_files() -> list[str]:
    """Return what a Python without site-packages reads: itself, its library, shared libraries, zones of time."""
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as handle:
        mapped = {line.split(maxsplit=5)[-1].strip() for line in handle}
    shared = {os.path.dirname(path) for path in mapped if path.startswith("/") and ".so" in os.path.basename(path)}
    fixed = ("/lib64", "/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo", "/dev/null", "/dev/urandom")
    return sorted({os.path.realpath(sys.executable), os.path.dirname(os.__file__), *shared, *fixed})


def close_all(read: Iterable[str], limits: dict[int, int], parent: int) -> dict[str, bool]:
    """Give up everything that can be given up, and say what was."""
    closed = {"network": leave_the_network(keep_rights=False)}
    die_with_parent(parent)
    files = [*python_files(), *read]
    closed["files"] = read_only_these(files)
    set_limits(limits)
    closed["calls"] = refuse_system_calls()
    return closed


def main(settings: str) -> None:
    """Give up everything, then become the Python that runs `program`; without one, say what could be given up."""
    wanted = json.loads(settings)
    program, limits = wanted["program"], {int(what): most for what, most in wanted["limits"].items()}
    closed = close_all([program] if program else [], limits, wanted["parent"])
    if not program:
        print(json.dumps(closed))
    elif closed["calls"]:
        python = os.path.realpath(sys.executable)
        # Not -I, which would leave the order of sets to chance: the environment is what is given here.
        os.execve(python, [python, "-P", "-s", "-S", "-B", "-X", "utf8", program],
                  {"PYTHONHASHSEED": "0", "PYTHONCOERCECLOCALE": "0"})
    else:
        sys.exit("the kernel does not refuse system calls")


if __name__ == "__main__":
    main(sys.argv[1])
