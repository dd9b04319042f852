"""A short version of `make chaos`."""

import sys

import pytest
from chaos import Campaign, fill_disk, kill_and_tear

CHOSEN = {
    ("autoencoder/checkpoint-8", "written", 0),
    ("latents/manifest.json", "done", 0),
    ("metrics.jsonl", "begun", 1),
    ("denoiser/checkpoint-8", "begun", 0),
    ("denoiser/checkpoint-12", "done", 0),
}


def strike(moment, path):
    (fill_disk if path.name == "checkpoint-8" and moment == "begun" else kill_and_tear)(moment, path)


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_run_that_is_killed_and_finds_no_room_loses_nothing(tiny_run, tmp_path):
    campaign = Campaign(tmp_path, tiny_run, ("--trackers", "[tensorboard]")).in_writes(
        strike, CHOSEN.__contains__
    )
    assert campaign.lost == [] and campaign.counts == {"accidents": 5, "disk full": 1, "runs": 1}
