import pytest
import torch

from qlora_trainer.memory.log import ALLOCATE, FREE
from qlora_trainer.memory.simulate import simulate
from qlora_trainer.memory.tracker import AllocationTracker, UnforeseeableOperator


def sizes(log, kind):
    return [log.allocations[index].size_bytes for k, index in log.events if k == kind]


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_each_storage_is_born_once_and_dies_when_its_last_view_does(device):
    tracker = AllocationTracker(device)
    with tracker:
        whole = torch.zeros(256, device=device)
        view = whole.view(16, 16).t()
        del whole
        assert sizes(tracker.log, FREE) == []
        del view
    assert sizes(tracker.log, ALLOCATE) == sizes(tracker.log, FREE) == [1024]


def test_other_devices_are_not_counted():
    tracker = AllocationTracker("meta")
    with tracker:
        torch.zeros(4)
    assert tracker.log.allocations == []


def test_an_allocation_names_the_line_that_made_it():
    tracker = AllocationTracker("meta")
    with tracker:
        kept = torch.zeros(4, device="meta")
    assert "test_tracker.py" in tracker.log.allocations[0].where
    del kept


def test_views_of_tensors_made_outside_are_no_births():
    outside = torch.zeros(4, device="meta")
    tracker = AllocationTracker("meta")
    with tracker:
        view = outside.detach().view(2, 2)
    assert tracker.log.allocations == []
    del view


def test_the_engine_accumulates_in_place_as_without_a_mode():
    x = torch.zeros(1000, device="meta", requires_grad=True)
    tracker = AllocationTracker("meta")
    with tracker:
        y = x * 2  # used twice: the engine adds two gradients
        (y.sin() + y.cos()).sum().backward()
    adds = [a for a in tracker.log.allocations if a.operator.startswith("add")]
    assert len(adds) == 1  # the forward's own


def test_a_branch_on_a_value_is_refused_by_line():
    def program(_tracker):
        if torch.zeros(1, device="meta").all():
            raise AssertionError

    with pytest.raises(UnforeseeableOperator, match=r"test_tracker\.py:\d+ in program"):
        simulate(program, None)


def test_a_branch_with_a_known_answer_takes_it():
    def is_plain(tensor):
        return bool(tensor.all())

    answered = []

    def program(_tracker):
        answered.append(is_plain(torch.zeros(1, device="meta")))

    simulate(program, None, answers={"is_plain": True})
    assert answered == [True]


def test_repeated_shapes_give_the_same_log_as_torchs_own_shape_functions():
    def program(tracker):
        for _ in range(3):
            x = torch.zeros(8, 4, device="meta")
            y = (x @ x.t()).softmax(-1).to(torch.bfloat16)
            del x, y

    log = simulate(program, None).log
    third = len(log.allocations) // 3
    first, last = log.allocations[:third], log.allocations[-third:]
    assert [(a.size_bytes, a.operator) for a in first] == [(a.size_bytes, a.operator) for a in last]


def test_views_that_do_not_say_so_are_no_births_the_second_time_either():
    def program(_tracker):
        for _ in range(2):
            torch.ops.aten._unsafe_view(torch.zeros(4, 4, device="meta"), [16])

    assert len(simulate(program, None).log.allocations) == 2


def test_a_remembered_in_place_operator_still_refuses_what_cannot_be():
    with AllocationTracker("meta"):
        kept = torch.zeros(4, 8, device="meta")
        for _ in range(3):
            assert kept.add_(torch.zeros(8, device="meta")) is kept
        with pytest.raises(RuntimeError, match="broadcast"):
            kept.add_(torch.zeros(3, device="meta"))
        kept.t_()
        kept.t_()
        kept.t_()
        assert kept.shape == (8, 4)


def test_an_operator_without_weightless_form_is_named_and_its_memory_bounded():
    def program(_tracker):
        found = torch.nonzero(torch.zeros(1000, device="meta"))
        assert found.shape == (1000, 1)

    trace = simulate(program, None)
    made = 1000 * 8
    assert trace.log.bounded == {"aten.nonzero.default": 1000 * 4 + made}
    peak = trace.live().peak_bytes
    least = 1000 * 4 + made
    assert least <= peak <= least + sum(trace.log.bounded.values())


def test_an_operator_that_cannot_be_stood_in_for_is_named():
    def program(_tracker):
        weights = torch.zeros(2**15, 2**15, device="meta")
        torch.nonzero(weights)

    with pytest.raises(UnforeseeableOperator, match="nonzero"):
        simulate(program, None)


@torch.library.custom_op("qlora_test::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def test_an_operator_of_a_package_is_stood_in_for():
    def program(_tracker):
        made = doubled(torch.zeros(8, 4, device="meta"))
        assert made.is_meta
        assert made.shape == (8, 4)

    assert simulate(program, None).log.bounded == {"qlora_test.doubled.default": 2 * 8 * 4 * 4}
