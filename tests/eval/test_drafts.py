import pytest

from hfsparse_eval.tasks.draft import insert, largest, mean_depth


@pytest.mark.parametrize(("limit", "expected"), [(0, None), (1, 1), (6, 6), (10, 10), (99, 10)])
def test_largest_bisects_to_the_last_that_fits(limit, expected):
    assert largest(lambda n: n <= limit, 1, 10) == expected


def test_needles_go_before_their_units_and_spans_leave_out_blanks_at_the_end():
    context, spans = insert(["a", "b"], [0, 1, 1], ["X ", "Y", "Z"], "\n")
    assert context == "X \na\nY\nZ\nb"
    assert [context[low:high] for low, high in spans] == ["X", "Y", "Z"]


def test_mean_depth_is_in_percent():
    assert mean_depth([0, 1], 3) == 16.7
