import pytest
from intervals import gain_interval, share_interval


def pairs(both, lost, won, neither):
    """Answers before and after as two lists, from the counts of the 2 x 2 table."""
    table = [(True, True)] * both + [(True, False)] * lost
    table += [(False, True)] * won + [(False, False)] * neither
    return [old for old, _ in table], [new for _, new in table]


def test_wilson_interval_is_the_published_one():
    # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3
    for right, rows, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605)):
        interval = share_interval(right, rows)
        assert (round(interval.low, 4), round(interval.high, 4)) == (low, high)


def test_wilson_interval_stays_inside_zero_and_one_at_the_ends():
    assert share_interval(0, 20).low == 0.0
    assert round(share_interval(0, 20).high, 4) == 0.1611  # Newcombe 1998, table I
    assert share_interval(20, 20).high == 1.0


def test_paired_gain_interval_is_the_published_one():
    # Newcombe 1998, Statistics in Medicine 17:2635, table III, method 10: 36, 12, 2, 0 of 50
    after, before = pairs(both=36, lost=12, won=2, neither=0)
    interval = gain_interval(before, after)
    assert round(interval.estimate, 4) == 0.2
    assert (round(interval.low, 4), round(interval.high, 4)) == (0.0569, 0.3404)


def test_pairs_that_agree_narrow_the_interval_of_the_gain():
    agreeing = gain_interval(*pairs(both=50, lost=0, won=20, neither=30))
    opposed = gain_interval(*pairs(both=20, lost=30, won=50, neither=0))
    assert agreeing.estimate == pytest.approx(opposed.estimate)
    assert agreeing.high - agreeing.low < opposed.high - opposed.low


def test_a_share_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="21 of 20 is no share"):
        share_interval(21, 20)
    with pytest.raises(ValueError, match="no pairs"):
        gain_interval([True], [True, False])
