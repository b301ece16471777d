"""The filter of system calls that a generated program runs under: seccomp-BPF, written as data.

It refuses calls that reach beyond the sandbox's namespaces and limits: sockets of families other than unix and
internet, keyrings, memory that no limit of a process counts, namespaces and mounts, other processes' memory, and
io_uring, which makes system calls that no filter sees. Everything else is allowed.
"""

import errno
import platform
import struct

from lewis.errors import InputError

FAMILIES = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6
_NAMESPACES = 0x7E020080  # flags of clone: all CLONE_NEW*

# Numbers of linux/unistd.h, for x86_64 and aarch64; None where it has no such call.
_REFUSED = {
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "io_uring_setup": (425, 425),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "fanotify_init": (300, 262),
    "modify_ldt": (154, None),
}
KEYCTL = _REFUSED["keyctl"][platform.machine() == "aarch64"]
"""The number of the system call `keyctl`."""

_SOCKET, _SOCKETPAIR, _CLONE, _CLONE3 = (41, 198), (53, 199), (56, 220), (435, 435)
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # index above, AUDIT_ARCH_*
_X32 = 0x40000000  # x86_64 has a second set of numbers from here on

# Instructions of classic BPF, and what the filter returns.
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCHITECTURE, _FIRST = 0, 4, 16  # offsets in bytes; of the first argument: its low half


def seccomp_filter(machine: str = "") -> bytes:
    """The filter as an array of `struct sock_filter`, for `prctl(PR_SET_SECCOMP)`.

    Args:
        machine: as `platform.machine()` names it; empty: this one.

    Raises:
        InputError: if the numbers of this machine's system calls are not known here.
    """
    machine = machine or platform.machine()
    if machine not in _ARCHITECTURES:
        raise InputError(
            f"sandbox: expected one of {', '.join(_ARCHITECTURES)}, got the machine {machine}, whose system calls are "
            "not known; evaluate generated programs on another machine"
        )
    column, architecture = _ARCHITECTURES[machine]
    refuse = (_RETURN, 0, 0, _ERROR | errno.EPERM)
    program = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _X32),
        refuse,
    ]
    for numbers in _REFUSED.values():
        if (number := numbers[column]) is not None:
            program += [(_EQUAL, 0, 1, number), refuse]
    # glibc falls back to clone, whose flags can be read here, if there is no clone3.
    program += [(_EQUAL, 0, 1, _CLONE3[column]), (_RETURN, 0, 0, _ERROR | errno.ENOSYS)]
    program += [(_EQUAL, 0, 4, _CLONE[column]), (_LOAD, 0, 0, _FIRST), (_ANY_BIT, 0, 1, _NAMESPACES), refuse]
    program += [(_RETURN, 0, 0, _ALLOW)]
    for call in (_SOCKET, _SOCKETPAIR):
        families = [(_EQUAL, len(FAMILIES) - i, 0, family) for i, family in enumerate(FAMILIES)]
        body = [(_LOAD, 0, 0, _FIRST), *families, refuse, (_RETURN, 0, 0, _ALLOW)]
        program += [(_EQUAL, 0, len(body), call[column]), *body]
    program += [(_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
