"""Whether a file is this user's own: to open a library is to run it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

MOST_LINKS = 40  # followed, one after the other


def distrusted(path: Path) -> str | None:
    """Why somebody else could have put there, or could exchange, what is at an absolute path; None if nobody could.

    All folders and links down to it, and what is there, must belong to this user or to the system, and be writable by
    nobody else. Folders above it may be so if they are sticky, as temporary ones are: there nobody touches what belongs
    to another.

    >>> distrusted(Path("/"))
    """
    parts, at, links = list(path.parts[1:]), Path(path.anchor), 0
    while True:
        try:
            facts = at.lstat()
        except OSError as error:
            return f"{at}: {error.strerror}"
        if reason := _fault(at, facts, is_above=bool(parts)):
            return reason
        if stat.S_ISLNK(facts.st_mode):
            links += 1
            if links > MOST_LINKS:
                return f"{at} is a link to itself"
            target = at.parent / os.readlink(at)
            parts, at = [*target.parts[1:], *parts], Path(target.anchor)
        elif parts:
            name = parts.pop(0)
            at = at.parent if name == ".." else at / name
        else:
            return None


def _fault(at: Path, facts: os.stat_result, is_above: bool) -> str | None:
    if facts.st_uid not in (0, os.getuid()):
        return f"{at} belongs to somebody else"
    if stat.S_ISLNK(facts.st_mode) or (is_above and facts.st_mode & stat.S_ISVTX):
        return None
    by_group = facts.st_mode & stat.S_IWGRP and not _is_of_one(facts.st_gid)
    return f"others may write to {at}" if by_group or facts.st_mode & stat.S_IWOTH else None


def _is_of_one(group: int) -> bool:
    """Whether a group is this user's alone, as many systems give everybody one, or the system's."""
    import grp
    import pwd

    try:
        user, known = pwd.getpwuid(os.getuid()), grp.getgrgid(group)
    except KeyError:
        return False
    return known.gr_name in (user.pw_name, "root") and {*known.gr_mem} <= {user.pw_name, "root"}
