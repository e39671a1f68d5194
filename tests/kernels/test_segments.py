"""Token ownership and context limits, on examples small enough to read."""

import torch
from span_kernels.segments import narrow, owners, valid_labels


def test_owners_of_windows_in_any_order_with_gaps_and_empty_windows():
    segments_B2 = torch.tensor([(5, 2), (1, 3), (5, 0), (9, 1), (0, 0)])
    nobody = 5
    assert owners(segments_B2, 11).tolist() == [
        nobody, 1, 1, 1, nobody, 0, 0, nobody, nobody, 3, nobody,
    ]  # fmt: skip


def test_owners_of_an_empty_batch_and_of_no_tokens():
    assert owners(torch.zeros(0, 2, dtype=torch.int32), 3).tolist() == [0, 0, 0]
    assert owners(torch.zeros(2, 2, dtype=torch.int32), 0).tolist() == []


def test_labels_are_valid_inside_their_own_window_only():
    segments_B2 = torch.tensor([(0, 3), (3, 0)])
    labels_B2, valid_B2 = valid_labels(
        segments_B2, torch.tensor([2, 0]), torch.tensor([3, -1], dtype=torch.int32)
    )
    assert labels_B2.tolist() == [[2, 3], [0, -1]]
    assert valid_B2.tolist() == [[True, False], [False, False]]


def test_limits_cut_the_window_and_shift_its_labels():
    segments_B2 = torch.tensor([(10, 8), (20, 8), (30, 8), (40, 8)])
    limits_B2 = torch.tensor([(2, 6), (-3, 99), (5, 2), (9, 12)], dtype=torch.int32)
    labels_B = torch.tensor([3, 7, 5, 0])
    inner_B2, starts_B, ends_B = narrow(segments_B2, labels_B, labels_B, limits_B2)
    # Limits past the window or turned round leave nothing.
    assert inner_B2.tolist() == [[12, 4], [20, 8], [35, 0], [48, 0]]
    assert starts_B.tolist() == ends_B.tolist() == [1, 7, 0, -8]


def test_without_limits_nothing_is_copied():
    segments_B2, labels_B = torch.tensor([(0, 3)]), torch.tensor([1])
    assert narrow(segments_B2, labels_B, labels_B, None) == (segments_B2, labels_B, labels_B)
