"""DeepSpeed files: every wrong key and value is named, and what decides the numbers of a run."""

import json
import math

import deepspeed
import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from pretrain.deepspeed_config import (
    ENGINE_SETTINGS,
    PRECISION_DEFAULTS,
    engine_config,
    load_deepspeed_config,
    num_accumulation_steps,
    settings_of_results,
)

GOOD = {
    "train_batch_size": 32,
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "Lamb", "params": {"lr": 1e-3}},
    "scheduler": {"type": "WarmupPolynomialLR", "params": {"total_num_steps": 10}},
}


def test_what_deepspeed_is_given(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(GOOD))
    config = load_deepspeed_config(path, ["optimizer.params.lr=0.5", "zero_optimization.stage=2"])
    assert config["optimizer"]["params"]["lr"] == 0.5
    assert num_accumulation_steps(config, dp_size=2) == 4
    derived = engine_config(config)
    assert "optimizer" not in derived and "scheduler" not in derived
    assert derived["zero_optimization"] == {"stage": 2} and derived["zero_allow_untested_optimizer"]
    assert json.loads(path.read_text()) == GOOD


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[1]", "holds a list, but a dict is expected"),
        (json.dumps(GOOD | {"optimizer": 3}), "optimizer must be"),
    ],
)
def test_a_broken_deepspeed_file_is_named(text, message, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_deepspeed_config(path)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "lr=None must be a number of at least 0"),
        ({"lr": True}, "lr=True must be"),
        ({"lr": 1e-3, "betas": [0.9]}, r"betas=\[0.9\] must be two numbers"),
        ({"lr": 1e-3, "betas": [0.9, 1]}, "betas"),
        ({"lr": 1e-3, "eps": 0}, "eps=0 must be"),
        ({"lr": 1e-3, "weight_decay": "0.01"}, "weight_decay='0.01' must be"),
        ({"lr": 1e-3, "min_trust_ratio": -1}, "min_trust_ratio=-1 must be"),
        (
            {"lr": 1e-3, "min_trust_ratio": 0.5, "max_trust_ratio": 0.3},
            "max_trust_ratio=0.3 must be a number of at least 0.5",
        ),
        ({"lr": 1e-3, "momentum": 0.9}, "unknown key 'momentum'"),
    ],
)
def test_an_optimizers_wrong_value_is_named(params, message, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(GOOD | {"optimizer": {"type": "Lamb", "params": params}}))
    with pytest.raises(ValueError, match=message):
        load_deepspeed_config(path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train_batch_sise=32", "unknown key 'train_batch_sise'; did you mean 'train_batch_size'"),
        ("zero_optimization=3", "zero_optimization=3 must be an object with keys of its own: stage, "),
        ("bf16=true", "bf16=True must be an object with keys of its own: enabled, "),
        ("zero_optimization.offload_optimizer=cpu", "zero_optimization.offload_optimizer='cpu' must be an object"),
        ("zero_optimization.stge=1", "zero_optimization: unknown key 'stge'; did you mean 'stage'"),
        (
            "zero_optimization.offload_optimizer.devise=cpu",
            "offload_optimizer: unknown key 'devise'; did you mean 'dev",
        ),
        ("bf16.enable=true", "bf16: unknown key 'enable'; did you mean 'enabled'"),
        ("data_types.grad_accum_type=fp32", "did you mean 'grad_accum_dtype'"),
        ("fp16.inital_scale_power=8", "did you mean 'initial_scale_power'"),
        ("zero_optimization.stage=4", "zero_optimization.stage=4 must be one of 0, 1, 2, 3"),
        ("zero_optimization.stage=true", "stage=True must be one of"),
        ("zero_optimization.stage=null", "stage=None must be one of"),
        ("zero_optimization.reduce_bucket_size=0", "reduce_bucket_size=0 must be a whole number of at least 1"),
        ("zero_optimization.reduce_bucket_size=auto", "reduce_bucket_size='auto' must be a whole number"),
        ("zero_optimization.sub_group_size=1.5", "sub_group_size=1.5 must be a whole number of at least 0"),
        ("zero_optimization.overlap_comm=1", "overlap_comm=1 must be true or false"),
        ("zero_optimization.offload_optimizer.device=gpu", 'device=\'gpu\' must be one of "none", "cpu", "nvme"'),
        ("zero_optimization.offload_optimizer.ratio=0.5", "offload_optimizer: unknown key 'ratio'"),
        (
            "zero_optimization.offload_optimizer.device=cpu",
            "offload_optimizer does nothing at stage 0; it needs stage 1 to",
        ),
        (
            "zero_optimization.offload_param.device=cpu",
            "offload_param does nothing at stage 0; it needs stage 3, or leave",
        ),
        ("bf16.enabled=yes", "bf16.enabled='yes' must be true or false"),
        ("gradient_clipping=abc", "gradient_clipping='abc' must be a number of at least 0"),
        ("gradient_clipping=-1", "gradient_clipping=-1 must be"),
        ("gradient_clipping=NaN", "gradient_clipping=nan must be"),
        ("gradient_clipping=true", "gradient_clipping=True must be"),
        ("gradient_accumulation_steps=0", "gradient_accumulation_steps=0 must be a whole number of at least 1"),
        ("prescale_gradients=0", "prescale_gradients=0 must be true or false"),
        ("communication_data_type=fp64", 'communication_data_type=\'fp64\' must be one of null, "fp32", "fp16"'),
        ("data_types.grad_accum_dtype=bf16", "grad_accum_dtype at zero_optimization.stage=0 can only be 'fp32'"),
        ("optimizer.params.lr=1e999", "lr=inf must be a number"),
        ("optimizer.type=[1]", r"optimizer.type=\[1\] is unknown; choose Lamb, AdamW"),
        ("scheduler.params.end_lr=NaN", "end_lr=nan must be a number of at least 0"),
    ],
)
def test_a_wrong_key_or_value_of_any_depth_is_named(override, message, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(GOOD))
    with pytest.raises(ValueError, match=message):
        load_deepspeed_config(path, [override])


def test_a_model_has_one_precision(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(GOOD | {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}))
    assert load_deepspeed_config(path, ["fp16.enabled=false"])
    with pytest.raises(ValueError, match="bf16 and fp16 are both enabled; disable one"):
        load_deepspeed_config(path, ["fp16.enabled=true"])


def test_offload_to_a_disk_needs_its_place(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(GOOD | {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}))
    with pytest.raises(ValueError, match="zero_optimization.offload_param.device='nvme' needs nvme_path"):
        load_deepspeed_config(path)
    assert load_deepspeed_config(path, ["zero_optimization.offload_param.nvme_path=/mnt/nvme"])


def test_a_key_given_twice_is_refused(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"bf16": {"enabled": true, "enabled": false}}')
    with pytest.raises(ValueError, match="ds.json .*the key 'enabled' is given twice"):
        load_deepspeed_config(path)


OTHERS = {"zenflow", "leaf_module", "legacy_stage1", "save_muon_momentum_buffer_in_memory", "compute_grad_norm"}
OTHERS |= {f"{kind}_master_weights_and_grads" for kind in ("bf16", "fp16")} | {"bf16_optimizer_states"}
OTHERS |= {"ratio", "super_offload", "cpuadam_cores_perc"}


def test_the_known_keys_kinds_and_defaults_are_deepspeeds(tmp_path):
    """Except for what is deprecated or would replace the optimizer. A familiar value passes our check too."""
    ours, theirs = ENGINE_SETTINGS, deepspeed.DeepSpeedConfig({"train_batch_size": 1})
    for block, name in (("bf16", "bfloat16_config"), ("fp16", "float16_config"), ("zero_optimization", "zero_config")):
        fields = type(getattr(theirs, name)).model_fields
        deprecated = [key for key, field in fields.items() if (field.json_schema_extra or {}).get("deprecated")]
        names = {key: field.alias or key for key, field in fields.items() if key not in deprecated}
        assert set(ours[block]) == set(names.values()) - OTHERS
        defaults = PRECISION_DEFAULTS.get(block, {})
        for key, alias in names.items():
            rule, default = ours[block].get(alias, {}), fields[key].default
            assert defaults.get(alias, default) == default, alias
            if not isinstance(rule, dict | tuple) and alias != "overlap_comm":
                kind = rule if isinstance(rule, type) else type(rule)
                kinds = (int, float) if kind is float else (kind,)  # a default of 0.0 is written as 0
                assert isinstance(default, kinds) and isinstance(default, bool) == (kind is bool), alias
    for block in ("offload_param", "offload_optimizer"):
        (model,) = [
            kind for kind in DeepSpeedZeroConfig.model_fields[block].annotation.__args__ if kind is not type(None)
        ]
        assert ours["zero_optimization"][block].keys() == model.model_fields.keys() - OTHERS
    assert ours["flops_profiler"].keys() == vars(theirs.flops_profiler_config).keys()
    assert ours["aio"].keys() == theirs.aio_config.keys()
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(GOOD | {"zero_optimization": {"stage": 1, "reduce_bucket_size": 5e8}}))
    assert math.isclose(load_deepspeed_config(path)["zero_optimization"]["reduce_bucket_size"], 5e8)


def test_a_stated_default_changes_nothing_and_every_number_does(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(GOOD | {"zero_optimization": {"stage": 1}}))

    def settings(*overrides: str) -> dict:
        return settings_of_results(load_deepspeed_config(path, list(overrides)))

    defaults = [
        *("optimizer.params.min_trust_ratio=0", "optimizer.params.max_trust_ratio=null", "scheduler.params.degree=1"),
        *("gradient_clipping=0", "prescale_gradients=false", "communication_data_type=fp32", "bf16.enabled=false"),
        *("data_types.grad_accum_dtype=fp32", "scheduler.params.warmup_num_steps=0", "fp16.loss_scale=128"),
    ]
    layout = ["zero_optimization.stage=3", "train_micro_batch_size_per_gpu=2", "zero_optimization.overlap_comm=true"]
    for override in (*defaults, *layout):
        assert settings(override) == settings(), override
    changes = [
        *("optimizer.params.eps=1e-8", "optimizer.type=AdamW", "scheduler.params.degree=2", "gradient_clipping=1"),
        *("prescale_gradients=true", "communication_data_type=bf16", "data_types.grad_accum_dtype=bf16"),
        *("bf16.enabled=true", "fp16.enabled=true", "zero_optimization.zero_quantized_gradients=true"),
    ]
    for override in changes:
        assert settings(override) != settings(), override
    fp16 = "fp16.enabled=true"
    assert settings(fp16, "fp16.hysteresis=2") == settings(fp16) != settings(fp16, "fp16.loss_scale=128")
