"""The files that a program may read outside its folder."""

import os
import sys

SYSTEM_FILES = ("/etc/ld.so.cache", "/etc/localtime", "/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_SYSTEM_FOLDERS = ("/usr", "/lib", "/lib64", "/etc/alternatives")  # the last one has links to numeric libraries on Debian


def system_folders() -> list[str]:
    return [path for path in _SYSTEM_FOLDERS if os.path.isdir(path)]


def python_folders() -> list[str]:
    """The folders of the standard library and of installed packages, as in sys.path."""
    packages = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    every = {*packages, sys.prefix, sys.base_prefix, sys.exec_prefix}
    return sorted(path for path in every if os.path.isdir(path))
