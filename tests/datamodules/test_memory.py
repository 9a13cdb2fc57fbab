"""How much memory is free, by every limit that a process may have."""

import resource
from pathlib import Path

import pytest

from clafusion.datamodules import memory


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"memory.{name}").write_text(f"{content}\n")


def test_the_address_space_is_a_limit():
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**28, before[1]))
    try:
        assert 0.9 * 2**28 < memory.free_memory() <= 2**28
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert memory.free_memory() > 2**28


def test_the_least_of_all_limits_counts(monkeypatch):
    for name, value in {"_of_machine": 70, "_of_address_space": 60}.items():
        monkeypatch.setattr(memory, name, lambda value=value: value)
    monkeypatch.setattr(memory, "_of_groups", lambda: iter([80, 50]))
    assert memory.free_memory() == 50
    monkeypatch.setattr(memory, "_of_groups", lambda: iter([-3]))
    assert memory.free_memory() == 0


def test_groups_of_the_second_version_up_to_the_root(tmp_path):
    root, processes = tmp_path / "groups", tmp_path / "cgroup"
    processes.write_text("0::/job/step\n")
    group(root, current=10)
    group(root / "job", max=1000, current=300, stat="anon 1\ninactive_file 40")
    group(root / "job" / "step", max="max", current=100, stat="inactive_file 7")
    assert list(memory._of_groups(processes, root)) == [1000 - 300 + 40]


def test_groups_of_the_first_version(tmp_path):
    root, processes = tmp_path / "groups", tmp_path / "cgroup"
    processes.write_text("9:cpu:/x\n4:memory:/job\n0::/\n")
    statistics = "inactive_file 1\ntotal_inactive_file 5"
    group(root / "memory" / "job", limit_in_bytes=200, usage_in_bytes=50, stat=statistics)
    group(root / "memory", limit_in_bytes=900, usage_in_bytes=80, stat=statistics)
    assert list(memory._of_groups(processes, root)) == [200 - 50 + 5, 900 - 80 + 5]


@pytest.mark.parametrize("text", ["", "0::/elsewhere\n"])
def test_without_groups_there_is_no_limit(tmp_path, text):
    (tmp_path / "cgroup").write_text(text)
    assert list(memory._of_groups(tmp_path / "cgroup", tmp_path / "groups")) == []
    assert list(memory._of_groups(tmp_path / "missing", tmp_path / "groups")) == []


def test_a_container_whose_path_is_that_of_the_host_has_the_limit_at_the_top(tmp_path):
    (tmp_path / "cgroup").write_text("4:memory:/docker/abc\n")
    group(tmp_path / "groups" / "memory", limit_in_bytes=70, usage_in_bytes=20, stat="total_inactive_file 0")
    assert list(memory._of_groups(tmp_path / "cgroup", tmp_path / "groups")) == [50]
