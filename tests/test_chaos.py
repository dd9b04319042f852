"""A short version of `make chaos`."""

import sys

import pytest
from chaos import Campaign, kill_and_tear

TORN = {
    ("autoencoder/checkpoint-8", "written"),
    ("latents/manifest.json", "done"),
    ("metrics.jsonl", "begun"),
    ("denoiser/checkpoint-8", "done"),
}


def chosen(write) -> bool:
    return write[:2] in TORN and write[2] in (0, 9)


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and binds processes to cores")
def test_a_run_that_is_killed_in_its_writes_loses_nothing(tiny_run, tmp_path):
    campaign = Campaign(tmp_path, tiny_run, ("--trackers", "[tensorboard]")).in_writes(kill_and_tear, chosen)
    assert campaign.lost == [] and campaign.counts == {"accidents": 5, "runs": 1}
