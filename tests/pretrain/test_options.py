"""The trainer's command line: wrong input refused before anything is written, and what makes two runs the same."""

import json
import shutil

import pytest

from data_prep.files import sha256_file
from data_prep.shards import make_manifest
from pretrain.options import claimed_run_folder
from pretrain.train import main
from tests.pretrain.test_train import (
    CONFIG,
    SMALL_MODEL,
    arguments,
    config_file,  # noqa: F401 (a fixture)
    prepare,
    with_folders,
    with_setting,
)


@pytest.mark.parametrize(
    ("more", "world_size", "message"),
    [
        (["--tensor-parallel", "3"], 3, "num_attention_heads=2 cannot be split over --tensor-parallel 3"),
        (["--tensor-parallel", "2"], 3, "3 ranks cannot form groups"),
        (
            ["--sequence-parallel"],
            1,
            "splits tokens over the ranks of --tensor-parallel, which is 1",
        ),
        (["--set", "train_batch_size=15"], 2, "train_batch_size=15 is not a multiple"),
        (["--set", "gradient_cliping=1"], 1, "did you mean 'gradient_clipping'"),
        (["--set", "optimizer.params.learning_rate=1"], 1, "unknown key 'learning_rate'"),
        (["--set", "optimizer.type=Lamp"], 1, "did you mean 'Lamb'"),
        (["--set", "optimizer.params.lr=fast"], 1, "optimizer.params.lr='fast'"),
        (["--set", "train_batch_size"], 1, "expected KEY=VALUE"),
        (["--set", "fp16.enabled=true"], 1, "fp16.enabled=true needs a GPU, but none is available; enable bf16"),
        (["--set", "bf16.enabled=true", "zero_optimization.stage=0"], 1, "choose stage 1"),
        (["--model", "tny"], 1, "did you mean 'tiny'"),
        (["--steps", "0"], 1, "argument --steps: 0 is below 1"),
        (["--timeout", "inf"], 1, "argument --timeout: inf is not finite"),
        (["--spike-factor", "nan"], 1, "argument --spike-factor: nan is not finite"),
        (["--seed", "-1"], 1, "argument --seed: -1 is below 0"),
        (["--timeout", "-0.5"], 1, "argument --timeout: -0.5 is not above 0"),
        (["--spike-factor", "1"], 1, "argument --spike-factor: 1 is not above 1"),
        (["--skip-spikes"], 1, "--skip-spikes needs --spike-factor to say what a spike is"),
        (["--data", "nowhere"], 1, "nowhere does not exist"),
        (["--data", "{train}=1", "nowhere=1"], 1, "nowhere does not exist"),
        (
            ["--data", "{train}", "{heldout}=1"],
            1,
            "--data .*/train: its weight is missing; several data sets are given",
        ),
        (["--data", "{train}=1", "{heldout}=much"], 1, "heldout=much: 'much' is not a number; several data sets are"),
        (["--data", "{train}=1", "{heldout}=1/0"], 1, "'1/0' is not a number"),
        (["--data", "{train}=1", "{heldout}=0"], 1, "heldout=0: a weight must be above 0; to exclude a folder"),
        (["--data", "{train}=1", "{heldout}=-2"], 1, "heldout=-2: a weight must be above 0"),
        (["--data", "{train}=1", "{train}/../train=1"], 1, "twice; give it once, with the sum of the weights"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_written(
    more,
    world_size,
    message,
    shard_folders,
    config_file,  # noqa: F811
    tmp_path,
):
    more = with_folders(more, shard_folders)
    with pytest.raises(ValueError, match=message):
        prepare(arguments(shard_folders, config_file, tmp_path / "run", *more), world_size)
    assert not (tmp_path / "run").exists()


def test_a_missing_key_is_named(shard_folders, config_file, tmp_path):  # noqa: F811
    config_file.write_text(json.dumps({key: value for key, value in CONFIG.items() if key != "train_batch_size"}))
    with pytest.raises(ValueError, match="'train_batch_size' is missing"):
        prepare(arguments(shard_folders, config_file, tmp_path / "run"))


def test_another_runs_folder_is_refused_and_left_as_it_is(shard_folders, config_file, tmp_path):  # noqa: F811
    output = tmp_path / "run"
    with claimed_run_folder(prepare(arguments(shard_folders, config_file, output))):
        pass
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    with pytest.raises(ValueError, match="holds another run"):
        main(arguments(shard_folders, config_file, output, "--seed", "9"))
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--set", "optimizer.params.lr=0.1"], "deepspeed.optimizer.params.lr: 0.005 there, 0.1 requested"),
        (["--set", "bf16.enabled=true"], r"run \(deepspeed.precision: 'fp32' there, 'bf16' requested\); choose"),
        (["--set", "data_types.grad_accum_dtype=bf16"], "deepspeed.grad_accum_dtype: None there, 'bf16' requested"),
        (["--set", "communication_data_type=bf16"], "deepspeed.communication_data_type: None there, 'bf16'"),
        (["--set", "prescale_gradients=true"], "deepspeed.prescale_gradients: False there, True requested"),
        (["--eval-data", "{train}"], "eval_data: '[0-9a-f]{64}' there, '[0-9a-f]{64}' requested"),
        (["--dropout", "0"], "model.attention_probs_dropout_prob: 0.1 there, 0.0 requested"),
        (["--masks", "dynamic"], "masks: None there, 'dynamic' requested"),
    ],
    ids=str,
)
def test_a_resume_with_other_numbers_is_refused_by_its_key(change, message, shard_folders, config_file, tmp_path):  # noqa: F811
    argv = arguments(shard_folders, config_file, tmp_path / "run")
    with claimed_run_folder(prepare(argv)):
        pass
    other = prepare([*argv, *with_folders(change, shard_folders)])
    with pytest.raises(ValueError, match=message) as caught, claimed_run_folder(other):
        pass
    others = ("params.eps", "betas", "train_batch_size", "hidden_size", "seed")
    assert not [key for key in others if key in str(caught.value)]


def test_a_list_that_is_given_twice_is_one_list(shard_folders, config_file, tmp_path):  # noqa: F811
    more = [
        "--data",
        "{train}=3",
        "--set",
        "gradient_clipping=2",
        "--data",
        "{heldout}=1",
        "--set",
        "optimizer.params.lr=1",
    ]
    run = prepare(arguments(shard_folders, config_file, tmp_path / "run", *with_folders(more, shard_folders)))
    assert [shards.folder for shards, _ in run.data] == list(shard_folders)
    assert (run.deepspeed["gradient_clipping"], run.deepspeed["optimizer"]["params"]["lr"]) == (2, 1)
    assert prepare(arguments(shard_folders, config_file, tmp_path / "run")).options.overrides == ()


def test_shards_with_another_vocabulary_are_refused(shard_folders, config_file, tmp_path):  # noqa: F811
    other = tmp_path / "other"
    shutil.copytree(shard_folders[0], other)
    (vocabulary,) = other.glob("*.model")
    vocabulary.write_bytes(vocabulary.read_bytes() + b"x")
    with pytest.raises(ValueError, match="vocabulary"):
        prepare(arguments((other, shard_folders[1]), config_file, tmp_path / "run"))


@pytest.mark.parametrize(("key", "value"), [("seq_length", 128), ("pair_task", "sop"), ("masked_lm_prob", 0.2)])
def test_only_data_sets_of_one_kind_are_mixed(key, value, shard_folders, config_file, tmp_path):  # noqa: F811
    other = with_setting(shard_folders[1], tmp_path / "other", key, value)
    more = ["--data", f"{shard_folders[0]}=1", f"{other}=1"]
    with pytest.raises(ValueError, match=f"other has {key}={value}, but .*/train has {key}=.*; build both with the"):
        prepare(arguments(shard_folders, config_file, tmp_path / "run", *more))


def test_data_sets_of_two_vocabularies_are_not_mixed(shard_folders, config_file, tmp_path):  # noqa: F811
    other = shutil.copytree(shard_folders[1], tmp_path / "other")
    (vocabulary,) = other.glob("*.model")
    vocabulary.write_bytes(vocabulary.read_bytes() + b"x")
    held = json.loads((other / "manifest.json").read_text())
    vocab = held["vocab"] | {"sha256": sha256_file(vocabulary)}
    manifest = make_manifest(held["config"], vocab, held["corpus"], held["shards"])
    (other / "manifest.json").write_text(json.dumps(manifest))
    more = ["--data", f"{shard_folders[0]}=1", f"{other}=1"]
    with pytest.raises(ValueError, match="other and .*/train have different vocabularies; build both with the same"):
        prepare(arguments(shard_folders, config_file, tmp_path / "run", *more))


def test_data_sets_that_fold_text_differently_are_not_mixed(shard_folders, config_file, tmp_path):  # noqa: F811
    other = shutil.copytree(shard_folders[1], tmp_path / "other")
    held = json.loads((other / "manifest.json").read_text())
    case = held["vocab"]["lower_case"]
    manifest = make_manifest(held["config"], held["vocab"] | {"lower_case": not case}, held["corpus"], held["shards"])
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=f"other has lower_case={not case}, but .*/train has lower_case={case}"):
        prepare(
            arguments(shard_folders, config_file, tmp_path / "run", "--data", f"{shard_folders[0]}=1", f"{other}=1")
        )


def test_what_is_read_and_in_which_shares_makes_a_run(shard_folders, config_file, tmp_path):  # noqa: F811
    """The scale of the weights does not, nor the name of a lone folder, which may hold a sign of its own."""

    def identity(*data: str) -> dict:
        more = ["--data", *with_folders(data, (shard_folders[0], tmp_path / "a=b"))]
        return prepare(arguments(shard_folders, config_file, tmp_path / "run", *more)).identity()

    shutil.copytree(shard_folders[0], tmp_path / "a=b")
    assert identity("{train}") == identity("{train}=7") == identity("{heldout}") == identity("{heldout}=2")
    shutil.rmtree(tmp_path / "a=b")
    shutil.copytree(shard_folders[1], tmp_path / "a=b")
    mixed = identity("{train}=3", "{heldout}=1")
    assert mixed == identity("{train}=0.6", "{heldout}=0.2")
    assert mixed["data"] not in (identity("{train}=1", "{heldout}=1")["data"], identity("{train}")["data"])
    assert [share for _, share in mixed["data"]] == ["3/4", "1/4"]


def test_a_model_too_short_for_the_shards_is_refused(shard_folders, config_file, tmp_path):  # noqa: F811
    path = tmp_path / "model.json"
    path.write_text(json.dumps(SMALL_MODEL | {"max_position_embeddings": 32}))
    with pytest.raises(ValueError, match="max_position_embeddings=32"):
        prepare(arguments(shard_folders, config_file, tmp_path / "run", "--model", str(path)))
