"""What the soak calls growth, on series that are flat, that grow, and that jump up and down as kills do.

Run: pytest tests/faults
"""

from dataclasses import replace

import pytest
from soak import Life, grown

FLAT = [
    replace(Life(0, 1320.0, 1325.0, 34, 12, 1812.0, 8, 20), batches=400 * i, shared=12 * (i % 2)) for i in range(12)
]


def test_flat_is_flat():
    assert grown(FLAT) == []


@pytest.mark.parametrize(
    ('name', 'a_life'), [('last_mib', 10.0), ('handles', 1), ('shared', 12), ('disk_kib', 40.0), ('files', 1)]
)
def test_what_grows_by_the_life_is_named(name, a_life):
    lives = [replace(life, **{name: getattr(life, name) + a_life * i}) for i, life in enumerate(FLAT)]
    assert [line.split()[0] for line in grown(lives)] == [name]


def test_what_grows_within_a_life_is_named():
    assert grown([replace(life, first_mib=1000.0) for life in FLAT]) == ['memory grew by 32.5 % within a life (median)']
