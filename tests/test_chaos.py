"""A short version of `make chaos`."""

import sys

import pytest
from chaos import FULL, chaos

NUMBERS = dict(zip(FULL, (4, 4, 16, 16), strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and binds processes to cores")
def test_no_accident_loses_anything(tmp_path):
    for kind, campaign in chaos(tmp_path, NUMBERS).items():
        assert campaign.done["accidents"] >= 2 and campaign.done["runs"] >= 2, kind
        assert campaign.lost == [], kind
