"""A trained checkpoint of two tensor-parallel ranks as a Hugging Face folder: same weights, same ids, same answers."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

from data_prep.tokenizer import load_tokenizer
from pretrain import convert
from pretrain.checkpoint import find_checkpoint, read_tensors
from tests.pretrain.test_train import CONFIG, arguments, run_training
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def exported(shard_folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("convert")
    (folder / "ds.json").write_text(json.dumps(CONFIG))
    more = ["--tensor-parallel", "2", "--steps", "2"]
    run_ranks(run_training, 2, arguments(shard_folders, folder / "ds.json", folder / "run", *more))
    run_ranks(convert.main, 1, ["--checkpoint", str(folder / "run"), "--output", str(folder / "hf")])
    return folder / "run", folder / "hf"


def test_the_weights_are_the_checkpoints(exported):
    run, folder = exported
    theirs = AutoModelForMaskedLM.from_pretrained(folder).state_dict()
    for name, tensor in read_tensors(find_checkpoint(run)):
        if name in theirs:  # the masked-language model has neither pooler nor pair head
            assert torch.equal(theirs[name], tensor[: len(theirs[name])]), name


def test_the_tokenizer_gives_our_ids(exported, shard_folders):
    _, folder = exported
    theirs, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    texts = ["The  function returns\ta new list.", "x = a[0] + 3.14e-5", "naïve café – “quoted” 中文", " leading", ""]
    for text in texts:
        assert theirs(text)["input_ids"] == [ours.cls_id, *ours.encode(text), ours.sep_id], text


def test_fill_mask_answers(exported):
    fill_mask = pipeline("fill-mask", model=str(exported[1]))
    answers = fill_mask(f"The value of the {fill_mask.tokenizer.mask_token} is returned.")
    assert len(answers) == 5 and all(np.isfinite(answer["score"]) for answer in answers)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint here"):
        convert.main(["--checkpoint", str(tmp_path), "--output", str(tmp_path / "hf")])
    assert not (tmp_path / "hf").exists()
