"""What is tried again, how often, and what is not."""

import pytest

from artifacts.errors import StoreError, UnavailableError
from tasks.errors import BackendError
from tasks.patience import patiently


class Store:
    """Fails as often as it has errors, then answers."""

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.asked = list(errors), 0

    def __call__(self) -> str:
        self.asked += 1
        if self.errors:
            raise self.errors.pop(0)
        return "answer"


def test_a_store_that_does_not_answer_is_asked_again_after_longer_and_longer_waits():
    store, waits, said = Store(*[UnavailableError("away")] * 3), [], []
    assert patiently(store, 4, warn=said.append, wait=lambda seconds: waits.append(seconds) or False) == "answer"
    assert (waits, len(said)) == ([2, 8, 32], 3)
    assert said[0] == "away; tried again in 2 s"


def test_at_last_its_own_words_are_raised():
    store = Store(*[UnavailableError(f"away {count}") for count in range(9)])
    with pytest.raises(UnavailableError, match="away 4"):
        patiently(store, 4, wait=lambda _seconds: False)
    assert store.asked == 5


@pytest.mark.parametrize(
    "error", [StoreError("access denied"), BackendError("bad data", "no array", "name it"), ValueError("no such width")]
)
def test_what_trying_again_cannot_mend_fails_at_once(error: Exception):
    store = Store(error)
    with pytest.raises(type(error)):
        patiently(store, 4, wait=lambda _seconds: pytest.fail("nothing is waited for"))
    assert store.asked == 1


def test_who_cancels_is_not_kept_waiting():
    store = Store(*[UnavailableError("away")] * 9)
    with pytest.raises(UnavailableError):
        patiently(store, 4, wait=lambda _seconds: True)
    assert store.asked == 1
