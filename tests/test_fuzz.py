"""A few hundred damaged files; `python -m tests.fuzzing --seconds 600` reads more of them."""

import pytest

from clafusion import FusionError
from tests.fuzzing import Watch, fuzz, read, seeds


@pytest.mark.filterwarnings("ignore")  # PyTorch's advice on pickles that it does not know
@pytest.mark.parametrize("seed", [11, 12])
def test_damaged_files_are_read_or_refused_in_one_line(tmp_path, seed):
    counts = fuzz(tmp_path, seed, 0, lambda number: number < 150)
    assert sum(counts.values()) == 150 and not counts["broken"]


@pytest.mark.filterwarnings("ignore")
def test_the_intact_files_are_read(tmp_path):
    for name, (_, readers) in seeds(tmp_path).items():
        for reader in readers:
            assert read(reader, tmp_path / name) == "read", name


def test_a_reader_that_breaks_the_rule_is_noticed(tmp_path):
    watch = Watch(tmp_path)
    with pytest.raises(AssertionError, match="took .* bytes of memory"), watch.over(10):
        bytearray(600 * 2**20)  # much, as the system may take back pages of this process meanwhile
    with pytest.raises(AssertionError, match="os.system"), watch.over(10):
        __import__("os").system("true")
    with pytest.raises(AssertionError, match="wrote /dev/null"), watch.over(10), open("/dev/null", "w"):
        pass
    with pytest.raises(AssertionError, match="says"):
        read(lambda path: (_ for _ in ()).throw(FusionError("two\nlines")), tmp_path)
    with pytest.raises(KeyError):
        read(lambda path: {}["x"], tmp_path)
