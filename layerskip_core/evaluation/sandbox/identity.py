"""The user that a program runs as: under root a user id of its own. It cannot gain privileges."""

import os
import struct
from contextlib import suppress
from pathlib import Path

from .kernel import LINUX, call, prctl, system_call

NOBODY = 65534
_FIRST_IDENTITY = 1_879_048_192
_KEEP_CAPABILITIES, _NO_NEW_PRIVILEGES = 8, 38  # prctl(2)
_READ_ANY_FILE = 1 << 2  # CAP_DAC_READ_SEARCH, capabilities(7)
_KEYCTL = {"x86_64": 250, "aarch64": 219}
_JOIN_SESSION_KEYRING = 1


def own_identity() -> int | None:
    """Under root: an otherwise unused user id, so that the limit of processes counts the program's alone.

    `nobody` if that id is not mapped in this user namespace. None for other users, who cannot change their id.
    """
    if not LINUX or os.getuid() != 0:
        return None
    candidate = _FIRST_IDENTITY + os.getpid() % 65536
    try:
        mapped = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
    except OSError:
        return NOBODY
    return candidate if any(int(start) <= candidate < int(start) + int(count) for start, _, count in mapped) else NOBODY


def leave_session_keyring(machine: str | None) -> None:
    """Gives this process and its descendants a new, empty session keyring instead of the user's."""
    if machine:
        with suppress(OSError):  # containers refuse this call, and all other uses of keyrings
            system_call(_KEYCTL[machine], _JOIN_SESSION_KEYRING, 0)


def gain_no_privileges() -> None:
    prctl(_NO_NEW_PRIVILEGES, 1)


def become(identity: int, folder: str, keep_reading: bool) -> None:
    """Changes from root to an unprivileged user, who gets `folder`.

    `keep_reading` keeps root's right to read any file: an interpreter under /root could not load its library otherwise.
    Landlock must restrict that right.
    """
    os.chown(folder, identity, identity)
    prctl(_KEEP_CAPABILITIES, 1)
    os.setgroups([])
    os.setresgid(identity, identity, identity)
    os.setresuid(identity, identity, identity)
    try:
        _set_capabilities(_READ_ANY_FILE if keep_reading else 0)
    except OSError:  # in a container without this capability
        drop_capabilities()


def drop_capabilities() -> None:
    _set_capabilities(0)


def readable_by_all(paths: list[str]) -> bool:
    """Whether any user can reach and list these folders."""
    folders = {parent for path in paths for parent in (Path(path), *Path(path).parents)}
    return all(folder.stat().st_mode & 0o5 == 0o5 for folder in folders if folder.is_dir())


def _set_capabilities(bits: int) -> None:
    """Sets the effective and permitted capabilities; none are inheritable."""
    call("capset", struct.pack("Ii", 0x20080522, 0), struct.pack("6I", bits, bits, 0, 0, 0, 0))
