"""What a student's code may do to the machine it is graded on: compute, and read Python and this package.

    shut(seconds, megabytes)    called once in the process that is about to run a submission; there is no way back
    held()                      what holds it on this platform, in words

On Linux the kernel holds it, without any rights of an administrator:

- Landlock (since 5.13): no file can be made, changed or removed anywhere; only Python, its packages and this package can
  be read. Not the solutions, not other submissions, not the home folder.
- seccomp: no network, no further process or program, no signal to another process (nor its limits or priority), no change of
  a file's rights or length.
- limits: seconds of CPU, memory (its own, not what processes can share), and no core dump. The grader stops the process by
  the clock as well.

What cannot be had (an old kernel, another system) is replaced as far as it goes by an audit hook in Python, which stops
accidents and simple attacks, but not a determined one. Graders of strangers' code use Linux, or a virtual machine.
"""

import ctypes
import os
import platform
import resource
import struct
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
NO_NEW_PRIVILEGES, SET_SECCOMP, FILTER = 38, 22, 2  # of prctl(2)
RULESET, RULE, RESTRICT = 444, 445, 446  # system calls of Landlock, the same on all machines
EXECUTE, READ_FILE, READ_DIR = 1 << 0, 1 << 2, 1 << 3
FILE_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1}  # by version; 5 adds ioctl

ALLOW, EPERM, ENOSYS = 0x7FFF0000, 0x00050001, 0x00050026  # what a filter answers
MACHINES = {  # audit number, then the numbers of the calls that are refused
    "x86_64": (0xC000003E, dict(clone=56, clone3=435, prlimit=302, fcntl=72, ioctl=16), (
        57, 58, 59, 322,  # fork, vfork, execve, execveat
        62, 200, 234, 129, 297, 424, 434, 438,  # kill, tkill, tgkill, *sigqueueinfo, pidfd_*
        41, 42, 43, 44, 46, 49, 50, 288, 307, 425, 426, 427,  # socket ... sendmmsg, io_uring
        101, 310, 311, 321, 250, 248, 249, 298, 323,  # ptrace, process_vm_*, bpf, keys, perf_event_open, userfaultfd
        90, 91, 92, 93, 94, 260, 268, 452, 188, 189, 190, 197, 198, 199, 132, 235, 261, 280,  # chmod, chown, xattr, utime
        165, 166, 155, 161, 272, 308, 428, 429, 430, 431, 432, 442,  # mount and its relatives, unshare, setns
        29, 30, 31, 64, 65, 66, 68, 69, 71, 240, 241,  # shared memory, semaphores, message queues
        76, 141)),  # truncate, setpriority
    "aarch64": (0xC00000B7, dict(clone=220, clone3=435, prlimit=261, fcntl=25, ioctl=29), (
        221, 281, 129, 130, 131, 138, 240, 424, 434, 438, 198, 200, 201, 202, 203, 206, 211, 242, 269, 425, 426, 427,
        117, 270, 271, 280, 217, 218, 219, 241, 282, 52, 53, 54, 55, 452, 5, 6, 7, 14, 15, 16, 88,
        40, 39, 41, 51, 97, 268, 428, 429, 430, 431, 432, 442, 180, 181, 182, 183, 186, 189, 190, 193, 194, 196,
        45, 140)),
}
THREAD = 0x10000  # clone(2) with this flag makes a thread
OWNER = {"fcntl": (8, 10, 15), "ioctl": (0x8901, 0x8902)}  # F_SETOWN, F_SETSIG, F_SETOWN_EX; FIOSETOWN, SIOCSPGRP: whom to send a signal
REFUSED = {  # of Python's audit events, or their first words
    "socket", "subprocess", "shutil", "ctypes", "pty", "fcntl", "webbrowser", "urllib", "os.system", "os.exec", "os.fork",
    "os.forkpty", "os.posix_spawn", "os.spawn", "os.kill", "os.killpg", "os.remove", "os.rename", "os.rmdir", "os.mkdir",
    "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown", "os.utime", "os.setxattr", "os.removexattr",
    "signal.pthread_kill"}


def _call(name: str, *numbers) -> int:
    """A function of the C library; OSError where it returns less than zero."""
    library = ctypes.CDLL(None, use_errno=True)
    result = getattr(library, name)(*(ctypes.c_long(n) if isinstance(n, int) else n for n in numbers))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def landlock_version() -> int:
    """0 where the kernel has none."""
    if sys.platform != "linux":
        return 0
    try:
        return _call("syscall", RULESET, None, 0, 1)
    except OSError:
        return 0


def seccomp_known() -> bool:
    return sys.platform == "linux" and platform.machine() in MACHINES and sys.maxsize > 2**32


def readable() -> list[Path]:
    """What the code may read: Python, its packages, this package, and the system's libraries."""
    import torch
    places = (sys.prefix, sys.base_prefix, sys.exec_prefix, Path(torch.__file__).parent.parent, PACKAGE, "/usr", "/lib",
              "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/dev/null", "/dev/urandom", "/dev/zero",
              "/sys/devices/system/cpu")
    return sorted({Path(place).resolve() for place in places if Path(place).exists()})


def lock_files() -> None:
    """Landlock: read only, and only what `readable` says."""
    version = landlock_version()
    handled = FILE_RIGHTS.get(version, (1 << 16) - 1)
    attributes = struct.pack("QQQ", handled, 0b11 if version >= 4 else 0, 0b11 if version >= 6 else 0)  # network; signals
    size = 8 if version < 4 else 16 if version < 6 else 24
    rules = _call("syscall", RULESET, ctypes.create_string_buffer(attributes, 24), size, 0)
    for place in readable():
        folder = os.open(place, os.O_PATH | os.O_CLOEXEC)
        rights = READ_FILE | READ_DIR | EXECUTE if place.is_dir() else READ_FILE
        rule = struct.pack("=Qi", rights, folder)
        _call("syscall", RULE, rules, 1, ctypes.create_string_buffer(rule, len(rule)), 0)
        os.close(folder)
    _call("prctl", NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    _call("syscall", RESTRICT, rules, 0)
    os.close(rules)


def lock_calls() -> None:
    """seccomp: the system calls of MACHINES are refused; clone makes threads only."""
    machine, special, refused = MACHINES[platform.machine()]

    def step(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:  # one instruction of a filter
        return struct.pack("HBBI", code, yes, no, value)

    load, equal, any_bit, greater, answer = 0x20, 0x15, 0x45, 0x35, 0x06
    program = [step(load, 4), step(equal, machine, 1, 0), step(answer, EPERM), step(load, 0)]
    program += [step(greater, 0x40000000, 0, 1), step(answer, EPERM)]  # the other numbering of x86_64
    program += [step(equal, special["clone3"], 0, 1), step(answer, ENOSYS)]  # the C library then takes clone
    program += [step(equal, special["clone"], 0, 4), step(load, 16), step(any_bit, THREAD, 1, 0), step(answer, EPERM),
                step(answer, ALLOW)]
    program += [step(equal, special["prlimit"], 0, 4), step(load, 16), step(equal, 0, 1, 0), step(answer, EPERM),
                step(answer, ALLOW)]  # of process 0, which is itself
    for name, commands in OWNER.items():
        program += [step(equal, special[name], 0, len(commands) + 3), step(load, 24)]
        program += [step(equal, command, len(commands) - i, 0) for i, command in enumerate(commands)]
        program += [step(answer, ALLOW), step(answer, EPERM)]
    for number in refused:
        program += [step(equal, number, 0, 1), step(answer, EPERM)]
    program.append(step(answer, ALLOW))
    code = ctypes.create_string_buffer(b"".join(program))
    whole = struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code))
    _call("prctl", NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    _call("prctl", SET_SECCOMP, FILTER, ctypes.create_string_buffer(whole, len(whole)), 0, 0)


def lock_python() -> None:
    """The substitute: refuse, from within Python, what the kernel does not."""
    places = [str(place) for place in readable()]

    def allowed(path) -> bool:
        try:
            where = os.path.realpath(os.fsdecode(path))
        except TypeError:
            return isinstance(path, int)  # a file that is open already
        return any(where == place or where.startswith(place + os.sep) for place in places)

    def hook(event: str, args: tuple) -> None:
        if event == "open":
            path, mode, flags = args
            writes = (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            if writes or not allowed(path):
                raise PermissionError(f"{path!r} may not be opened here")
        elif event in ("os.listdir", "os.scandir"):
            if not allowed("." if args[0] is None else args[0]):
                raise PermissionError(f"{args[0]!r} may not be listed here")
        elif event in REFUSED or event.split(".")[0] in REFUSED:
            raise PermissionError(f"{event} is not allowed here")

    sys.addaudithook(hook)


def shut(seconds: float, megabytes: int) -> None:
    """From here on this process computes and reads Python's files, and nothing else."""
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 2, int(seconds) + 3))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    memory = resource.RLIMIT_DATA if sys.platform == "linux" else resource.RLIMIT_AS
    try:
        resource.setrlimit(memory, (megabytes << 20, megabytes << 20))
    except (OSError, ValueError):
        pass  # macOS takes no limit of memory: `held` says so
    if landlock_version():
        lock_files()
    if seccomp_known():
        lock_calls()
    if not (landlock_version() and seccomp_known()):
        lock_python()


def held() -> list[str]:
    """What `shut` holds on this platform, and what it does not, a line each."""
    files, calls = landlock_version(), seccomp_known()
    substitute = "NOT held by the kernel, only by a hook in Python, which ctypes gets round"
    return [
        "marks: held; another process computes them, and gets nothing from the submission's but values",
        "time and CPU: held; each answer has a process of its own, which is stopped by the clock",
        f"memory: {'held, but for what processes can share' if sys.platform == 'linux' else 'NOT held, this system takes no such limit'}",
        f"files: {f'held by the kernel (Landlock {files})' if files >= 3 or files and calls else substitute}",
        f"network, processes, signals: {'held by the kernel (seccomp)' if calls else substitute}",
        "not held: faults of the kernel or the processor, load on cores that others use, copied work",
    ]
