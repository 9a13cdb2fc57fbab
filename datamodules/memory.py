"""How much memory this process can still take."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

#: Files of the two versions of control groups with their limit, with what is taken, and with the line of `memory.stat`
#: that counts what the kernel gives back on demand.
_GROUPS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def free_memory() -> int:
    """Return the bytes that this process can still take: the least that any limit leaves.

    The limits are the memory of the machine, those of its control groups (containers, SLURM jobs, systemd) and that of
    its address space (`ulimit -v`). Where a system does not tell, there is none.
    """
    return max(0, min([_of_machine(), _of_address_space(), *_of_groups()]))


def _of_machine() -> int:
    """Return what the kernel estimates to be available; without `/proc` all memory of the machine."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return sys.maxsize


def _of_address_space() -> int:
    """Return what is left of the address space that the process may have."""
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit == resource.RLIM_INFINITY:
            return sys.maxsize
        return limit - int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (ImportError, AttributeError, OSError):
        return sys.maxsize


def _of_groups(processes: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """Yield what the limits of the process's control groups leave, from its own group up to the root.

    Args:
        processes: The kernel's list of the groups of this process.
        root: Where the groups are mounted.
    """
    try:
        entries = [line.split(":", 2) for line in processes.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in entries:
        if controllers not in ("", "memory"):
            continue
        top = root / controllers
        group = top / path.lstrip("/")
        # In a container the path may be that of the host, of which only the top is mounted.
        for folder in [above for above in (group, *group.parents) if above.is_relative_to(top) and above.is_dir()]:
            yield from _left(folder)


def _left(folder: Path) -> Iterator[int]:
    """Yield what the limit of one group leaves, if it has one."""
    for limit, taken, reclaimable in _GROUPS:
        try:
            most, now = (int((folder / name).read_text()) for name in (limit, taken))
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # another version of control groups, or "max"
            continue
        yield most - now + int(statistics.get(reclaimable, 0))
