import contextlib
import threading

from hypothesis import given
from hypothesis import strategies as st

from qlora_trainer.training.windows import Windows
from tests.training.tiny import Epoch


class Numbers:
    def __init__(self, epoch: int, count: int) -> None:
        self.epoch, self.count = epoch, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):  # type: ignore[no-untyped-def]
        assert 0 <= index < self.count
        return (self.epoch, index)


@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=5), accumulation=st.integers(1, 4))
def test_every_micro_batch_is_in_one_window_in_order_whatever_the_epochs_lengths(
    counts: list[int], accumulation: int
) -> None:
    windows = Windows(lambda e: Numbers(e, counts[e]), accumulation)
    steps = windows.steps_of(len(counts))
    seen = [item for step in range(steps) for item in windows.window(step)]
    assert seen == [(e, i) for e, count in enumerate(counts) for i in range(count)]
    assert all(len(windows.window(s)) <= accumulation for s in range(steps))
    fresh = Windows(lambda e: Numbers(e, counts[e]), accumulation)
    assert fresh.window(steps - 1) == windows.window(steps - 1)  # no way through earlier ones
    assert windows.position(steps) == len(counts)


def test_numbered_micro_batches_go_on_through_the_epochs() -> None:
    windows = Windows.numbered(3, lambda number: number, 2)  # type: ignore[arg-type, return-value]
    assert [windows.window(s) for s in range(4)] == [[0, 1], [2], [3, 4], [5]]


def test_real_batches_are_collated_only_when_asked() -> None:
    assert len(Windows(lambda e: Epoch(e, 10**9, 1), 4).window(5)) == 4


def test_several_threads_may_look_for_places_at_a_time() -> None:
    counts, together = [3, 5], threading.Barrier(2)

    def batches(epoch: int) -> Numbers:
        with contextlib.suppress(threading.BrokenBarrierError):
            together.wait(0.3)  # for the other thread, where it may come as far
        return Numbers(epoch, counts[epoch])

    windows = Windows(batches, 1)
    other = threading.Thread(target=windows.position, args=(1,))
    other.start()
    windows.window(0)
    other.join()
    assert windows.steps_of(2) == 8
    assert windows.window(3) == [(1, 0)]
