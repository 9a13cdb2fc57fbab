"""What parents are called."""

import pytest

from clafusion.lightning_modules.commands.naming import file_names, logged_names


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/x/resnet34.ckpt", "y/resnet18.ckpt"], ["resnet34.ckpt", "resnet18.ckpt"]),
        (["r/deep/best.ckpt", "r/shallow/best.ckpt"], ["deep/best.ckpt", "shallow/best.ckpt"]),
        (["/0/deep/best.ckpt", "/1/deep/best.ckpt", "c.ckpt"], ["0/deep/best.ckpt", "1/deep/best.ckpt", "c.ckpt"]),
        (["a.ckpt", "b.ckpt", "a.ckpt", "a.ckpt"], ["a.ckpt", "b.ckpt", "a.ckpt (2)", "a.ckpt (3)"]),
        (["/saved/fused", "/saved/ensemble"], ["saved/fused", "saved/ensemble"]),  # which other rows are called
    ],
)
def test_a_file_has_its_name_with_as_many_folders_as_tell_it_apart(paths, names):
    assert file_names(paths) == names


def test_a_parent_called_fused_is_not_logged_as_the_result():
    assert logged_names(["fused.ckpt", "b.ckpt", "fused"]) == ["fused.ckpt", "b", "fused"]
