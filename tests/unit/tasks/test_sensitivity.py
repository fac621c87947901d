from __future__ import annotations

import pytest

from tasks.sensitivity import fewest


@pytest.mark.parametrize("most", [0, 1, 5, 32])
@pytest.mark.parametrize("needed", [0, 1, 2, 3, 5, 6, 31, 32, 33])
def test_the_fewest_groups_that_pass_are_found_in_few_tries_and_no_more_than_half_are_kept(most, needed):
    tries = []

    def passes(count):
        tries.append(count)
        return count >= needed

    assert fewest(passes, most) == (needed if needed <= most else None)
    assert max(tries) <= most
    assert len(tries) <= 2 * max(1, most).bit_length() + 1
