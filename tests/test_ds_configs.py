"""The shipped DeepSpeed files: each passes the check of the trainer, and its batch divides as its README says."""

from pathlib import Path

import pytest

from pretrain.deepspeed_config import load_deepspeed_config, num_accumulation_steps

DS_CONFIGS = Path(__file__).parents[1] / "ds_configs"
FILES = sorted(path.name for path in DS_CONFIGS.glob("*.json"))


@pytest.mark.parametrize("name", FILES)
def test_a_shipped_config_is_complete_and_explained(name):
    load_deepspeed_config(DS_CONFIGS / name)
    assert f"`{name}`" in (DS_CONFIGS / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "dp_size", "num_steps"),
    [
        *[("mini.json", 2, 1), ("mini.json", 1, 2), ("large_lamb_phase1.json", 256, 4)],
        *[("large_lamb_phase2.json", 256, 16), ("large_lamb_deepspeed_phase1.json", 64, 16)],
        *[("base_adamw.json", 8, 1), ("1.3b_tp_zero2.json", 4, 16), ("3.9b_tp_zero3_offload.json", 8, 16)],
    ],
)
def test_what_is_left_over_is_accumulated(name, dp_size, num_steps):
    assert num_accumulation_steps(load_deepspeed_config(DS_CONFIGS / name), dp_size) == num_steps
