"""What --profile takes."""

import pytest

from pretrain.loop.profiled_steps import ProfiledSteps


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("steps=10-12", ProfiledSteps(10, 12)),
        ("steps=20", ProfiledSteps(20, 20)),
        ("steps=1-20,ranks=all,memory", ProfiledSteps(1, 20, memory=True, all_ranks=True)),
    ],
)
def test_steps_are_read(text: str, wanted: ProfiledSteps) -> None:
    assert ProfiledSteps.parse(text, 20) == wanted


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("10-12", r"^write steps=A-B\[,memory\]\[,ranks=all\], such as steps=10-12"),
        ("steps=10-", r"^write steps="),
        ("steps=2-3,all", r"^write steps="),
        ("steps=0-3", r"^steps are counted from 1"),
        ("steps=5-4", r"^step 4 comes before step 5$"),
        ("steps=5-201", r"^the run ends with step 200 \(training\.steps\)$"),
        ("steps=1-101", r"^at most 100 steps"),
    ],
)
def test_what_is_wrong_is_said(text: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        ProfiledSteps.parse(text, 200)
