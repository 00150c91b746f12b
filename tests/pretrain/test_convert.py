"""Weights in and out: checkpoints of any layout to Hugging Face's folders, and back from what others publish."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoModelForPreTraining, AutoTokenizer, BertConfig, pipeline

from data_prep.text.tokenizer import load_tokenizer
from data_prep.text.vocab_files import SPECIAL_TOKENS
from pretrain import convert
from pretrain.checkpoint_reader import find_checkpoint, tensor_reader
from pretrain.layout import init_layout
from pretrain.model import BertForPreTraining
from pretrain.model_config import ModelConfig
from pretrain.parameter_table import HEADS, POSITIONS, rank_shape, tensor_table
from pretrain.weights import missing_heads, open_weights, start_weights, write_safetensors
from tests.pretrain.test_train import CONFIG, arguments, prepare, run_training
from tests.ranks import run_ranks

VOCABULARIES = Path(__file__).parents[3] / "shared" / "data" / "vocab"
SHAPE = BertConfig(
    vocab_size=500, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
    max_position_embeddings=64,
)  # fmt: skip
KINDS = ("BertForPreTraining", "BertForMaskedLM", "BertModel")


@pytest.fixture(scope="module")
def exported(shard_folders, tmp_path_factory):
    """A run of four ranks, tensor parallel 2 x data parallel 2, ZeRO 2, and its Hugging Face folder."""
    folder = tmp_path_factory.mktemp("convert")
    (folder / "ds.json").write_text(json.dumps(CONFIG | {"zero_optimization": {"stage": 2}}))
    more = ["--tensor-parallel", "2", "--steps", "2"]
    run_ranks(run_training, 4, arguments(shard_folders, folder / "ds.json", folder / "run", *more))
    run_ranks(convert.main, 1, ["--checkpoint", str(folder / "run"), "--output", str(folder / "hf")])
    return folder / "run", folder / "hf"


def test_the_weights_are_the_checkpoints(exported):
    run, folder = exported
    theirs = AutoModelForPreTraining.from_pretrained(folder).state_dict()
    names, read = tensor_reader(find_checkpoint(run))
    for name in names:
        assert torch.equal(theirs[name], read(name)[: len(theirs[name])]), name


def logits_of_checkpoint(run: Path, ids: np.ndarray) -> np.ndarray:
    """Our masked-language-model logits [B, S, V], straight from a checkpoint."""
    from pretrain.data import pack_sequences
    from pretrain.model import load_weights

    weights = open_weights(run)
    model = BertForPreTraining(weights.config, init_layout())
    load_weights(model, weights)
    lengths = np.full(len(ids), ids.shape[1])
    hidden = model.bert(pack_sequences(ids.reshape(-1), lengths, lengths))
    logits = model.cls.predictions(hidden, model.bert.embeddings.word_embeddings.weight)
    return logits[:, : weights.config.vocab_size].view(*ids.shape, -1).detach().numpy()


def test_its_logits_are_ours(exported):
    """Measured: 3.3e-7 on logits of at most 0.8."""
    run, folder = exported
    ids = np.random.default_rng(1).integers(0, 500, (3, 40))
    (ours,) = run_ranks(logits_of_checkpoint, 1, run, ids)
    with torch.no_grad():
        theirs = AutoModelForMaskedLM.from_pretrained(folder).eval()(input_ids=torch.from_numpy(ids)).logits.numpy()
    difference = np.abs(ours - theirs).max()
    print(f"largest difference {difference:.1e}, largest logit {np.abs(theirs).max():.1f}")
    assert difference < 1e-5


def test_the_tokenizer_gives_our_ids(exported):
    _, folder = exported
    theirs, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    texts = ["The  function returns\ta new list.", "x = a[0] + 3.14e-5", "naïve café – “quoted” 中文", " leading", ""]
    for text in texts:
        assert theirs(text)["input_ids"] == [ours.cls_id, *ours.encode(text), ours.sep_id], text


@pytest.mark.skipif(not VOCABULARIES.is_dir(), reason="no public vocabularies beside the repository")
@pytest.mark.parametrize("name", ["uncased", "cased", "chinese"])
def test_public_vocabularies_give_berts_ids(name, tmp_path):
    """Against the tokenizer that transformers itself makes of the vocabulary."""
    vocab = VOCABULARIES / f"bert-base-{name}-vocab.txt"
    tokenizer = load_tokenizer(vocab)
    convert.save_tokenizer(tokenizer, tmp_path, max_length=512)
    ours = AutoTokenizer.from_pretrained(tmp_path)
    theirs = transformers.BertTokenizer(str(vocab), do_lower_case=name != "cased")
    for text in (
        "Paris is the Capital of France, isn't it?",
        "naïve CAFÉ",
        "北京是中国的首都。",
        "unaffable  \t words",
    ):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], text


def test_fill_mask_answers(exported):
    fill_mask = pipeline("fill-mask", model=str(exported[1]))
    answers = fill_mask(f"The value of the {fill_mask.tokenizer.mask_token} is returned.")
    assert len(answers) == 5 and all(np.isfinite(answer["score"]) for answer in answers)


def anonymous_mib() -> float:
    """This process's own memory; pages of mapped files are the system's to drop."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


def streamed_peak(run: Path, output: Path) -> tuple[float, float]:
    """(largest growth while a checkpoint is written as safetensors, size of its weights), both in MiB."""
    weights, before, peak = open_weights(run), anonymous_mib(), 0.0
    readers = dict(weights.readers)

    def watched(name: str) -> torch.Tensor:
        nonlocal peak
        tensor = readers[name]()
        peak = max(peak, anonymous_mib())
        return tensor

    weights.readers.update({name: (lambda name=name: watched(name)) for name in readers})
    write_safetensors(output, weights)
    return peak - before, output.stat().st_size / 2**20


def test_a_conversion_holds_one_tensor_at_a_time(shard_folders, tmp_path):
    """`mini` with four layers: 13 MiB of weights, 26 of moments; the largest tensor has 1 MiB. Measured: 1.0 MiB."""
    (tmp_path / "ds.json").write_text(json.dumps(CONFIG))
    more = ["--model", "mini", "--steps", "1", "--tensor-parallel", "2"]
    run_ranks(run_training, 2, arguments(shard_folders, tmp_path / "ds.json", tmp_path / "run", *more))
    ((growth, size),) = run_ranks(streamed_peak, 1, tmp_path / "run", tmp_path / "model.safetensors")
    assert size > 12
    print(f"growth {growth:.2f} MiB")
    assert growth < 5


def save_hugging_face(folder: Path, kind: str, vocabulary: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    """A random model of transformers as a folder with a vocabulary; its tensors."""
    torch.manual_seed(seed)
    model = getattr(transformers, kind)(SHAPE)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder)
    shutil.copy(vocabulary, folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(("tensor_parallel", "stage"), [pytest.param(4, 0, marks=pytest.mark.slow), (2, 3)])
def test_hugging_face_to_us_and_back_is_byte_identical(tensor_parallel, stage, shard_folders, vocabulary, tmp_path):
    """A step of learning rate 0 on four ranks leaves the weights as they came."""
    original = save_hugging_face(tmp_path / "hf", "BertForPreTraining", vocabulary)
    (tmp_path / "ds.json").write_text(json.dumps(CONFIG | {"zero_optimization": {"stage": stage}}))
    more = ["--model", str(tmp_path / "hf/config.json"), "--init-from", str(tmp_path / "hf"), "--steps", "1"]
    more += ["--tensor-parallel", str(tensor_parallel), "--set", "optimizer.params.lr=0"]
    run_ranks(run_training, 4, arguments(shard_folders, tmp_path / "ds.json", tmp_path / "run", *more))
    run_ranks(convert.main, 1, ["--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "back")])
    back = load_file(tmp_path / "back/model.safetensors")
    assert back.keys() == original.keys()
    assert all(back[name].numpy().tobytes() == original[name].numpy().tobytes() for name in original)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", ["safetensors", "bin", "bin of 2018"])
def test_every_kind_of_folder_is_read(kind, format, vocabulary, tmp_path):
    original = save_hugging_face(tmp_path, kind, vocabulary)
    if format != "safetensors":
        old = format == "bin of 2018"
        names = {name: name.replace("LayerNorm.weight", "LayerNorm.gamma") if old else name for name in original}
        tensors = {names[name]: tensor for name, tensor in original.items()}
        tensors["embeddings.position_ids" if kind == "BertModel" else "bert.embeddings.position_ids"] = torch.arange(64)
        torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not old)
        (tmp_path / "model.safetensors").unlink()
    weights = open_weights(tmp_path)
    prefix = "bert." if kind == "BertModel" else ""
    assert weights.keys() == {prefix + name for name in original}
    assert all(torch.equal(weights[prefix + name], original[name]) for name in original)
    missing = missing_heads(weights)
    lacks = {"BertForPreTraining": 0, "BertForMaskedLM": 4, "BertModel": 7}  # pooler and pair head; all of cls
    assert len(missing) == lacks[kind] and all(name.startswith(HEADS) for name in missing)


def test_fresh_heads_are_drawn_and_told(shard_folders, vocabulary, tmp_path):
    original = save_hugging_face(tmp_path / "hf", "BertModel", vocabulary)
    (tmp_path / "ds.json").write_text(json.dumps(CONFIG))
    more = ["--model", str(tmp_path / "hf/config.json"), "--steps", "1", "--set", "optimizer.params.lr=0"]
    for name, start in (("drawn", []), ("started", ["--init-from", str(tmp_path / "hf")])):
        run_ranks(run_training, 1, arguments(shard_folders, tmp_path / "ds.json", tmp_path / name, *more, *start))
    drawn, started = open_weights(tmp_path / "drawn"), open_weights(tmp_path / "started")
    for name in started:
        expected = drawn[name] if name.startswith("cls.") else original[name.removeprefix("bert.")]
        assert torch.equal(started[name], expected), name


def edit(folder: Path, change) -> None:
    """Rewrites a folder's tensors after `change`."""
    from safetensors.torch import save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("bert.encoder.layer.1.output.dense.bias"), "lacks 1 tensors.*layer.1.output.dense.bias"),
        (
            lambda t: t.update({"qa_outputs.bias": torch.zeros(2)}),
            "that do not belong to BERT: qa_outputs.bias",
        ),
        (lambda t: t.update({"cls.predictions.decoder.weight": torch.zeros(500, 64)}), "untied decoder"),
    ],
)
def test_wrong_tensors_are_named(change, message, shard_folders, vocabulary, tmp_path):
    save_hugging_face(tmp_path / "hf", "BertForPreTraining", vocabulary)
    edit(tmp_path / "hf", change)
    refuse(shard_folders, tmp_path, message, model=tmp_path / "hf/config.json")


def test_another_shape_is_named(shard_folders, vocabulary, tmp_path):
    save_hugging_face(tmp_path / "hf", "BertForPreTraining", vocabulary)
    refuse(shard_folders, tmp_path, "hidden_size=64, the model has 128", model="tiny")


def test_another_vocabulary_is_named(shard_folders, vocabulary, tmp_path):
    save_hugging_face(tmp_path / "hf", "BertForPreTraining", vocabulary)
    (tmp_path / "hf" / vocabulary.name).write_bytes(vocabulary.read_bytes() + b" ")
    refuse(shard_folders, tmp_path, "ids would refer to other tokens", model=tmp_path / "hf/config.json")


def test_a_broken_file_is_named(shard_folders, vocabulary, tmp_path):
    save_hugging_face(tmp_path / "hf", "BertForPreTraining", vocabulary)
    path = tmp_path / "hf/model.safetensors"
    os.truncate(path, path.stat().st_size - 4)
    refuse(shard_folders, tmp_path, "model.safetensors: no weights can be read", model=tmp_path / "hf/config.json")


def refuse(shard_folders, folder: Path, message: str, model: Path | str) -> None:
    (folder / "ds.json").write_text(json.dumps(CONFIG))
    more = ["--model", str(model), "--init-from", str(folder / "hf")]
    with pytest.raises(ValueError, match=message):
        prepare(arguments(shard_folders, folder / "ds.json", folder / "run", *more))
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["bert.pooler.dense.weight"].fill_(torch.nan), "bert.pooler.dense.weight has values that are NaN"),
        (lambda t: t["cls.predictions.bias"][7:8].fill_(-torch.inf), "cls.predictions.bias has values that are NaN"),
        (lambda t: t["cls.predictions.transform.LayerNorm.weight"].mul_(1e7), "differs from the checkpoint by"),
    ],
)
def test_what_fails_a_check_is_never_taken_for_finished(change, message, vocabulary, tmp_path, capsys):
    """Values that are not finite, and values so large that two programs' rounding differs by more than is allowed."""
    save_hugging_face(tmp_path / "hf", "BertForPreTraining", vocabulary)
    edit(tmp_path / "hf", change)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            convert.main(["--checkpoint", str(tmp_path / "hf"), "--output", str(tmp_path / "out")])
        assert not (tmp_path / "out/model.safetensors").exists()
    assert "reused" not in capsys.readouterr().out


def test_a_vocabulary_larger_than_the_embedding_is_refused(tmp_path):
    words = tmp_path / "tokens.txt"
    words.write_text("\n".join([*SPECIAL_TOKENS, *(f"w{i}" for i in range(496))]) + "\n", encoding="utf-8")
    save_hugging_face(tmp_path / "hf", "BertModel", words)
    with pytest.raises(ValueError, match="vocab_size=500 is less than the 501 tokens of tokens.txt"):
        convert.main(["--checkpoint", str(tmp_path / "hf"), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_folder_with_added_tokens_and_no_vocab_txt_keeps_all_of_them(tmp_path):
    """As transformers 5 saves it; converted, it gives the same ids, and so does the result saved again."""
    words = tmp_path / "tokens.txt"
    words.write_text("\n".join([*SPECIAL_TOKENS, *(f"w{i}" for i in range(490))]) + "\n", encoding="utf-8")
    tokenizer = transformers.BertTokenizer(str(words), do_lower_case=True, strip_accents=False)
    tokenizer.add_tokens(["[E1]"], special_tokens=True)
    tokenizer.add_tokens(["[URL]", "acute pain"])
    folder = tmp_path / "hf"
    save_hugging_face(folder, "BertForPreTraining", words)
    (folder / "tokens.txt").unlink()
    tokenizer.save_pretrained(folder)
    texts = ["W1 w2 [URL] Acute pain [E1] x", "[MASK] w3[URL]w4", "acute  pain"]
    out = tmp_path / "out"
    convert.main(["--checkpoint", str(folder), "--vocab", str(folder / "tokenizer.json"), "--output", str(out)])
    assert not (out / "unchecked").exists()
    again = AutoTokenizer.from_pretrained(out)
    again.save_pretrained(tmp_path / "again")
    for found in (out, tmp_path / "again"):
        for text in texts:
            assert AutoTokenizer.from_pretrained(found)(text)["input_ids"] == tokenizer(text)["input_ids"], text
    ours = load_tokenizer(out)
    assert ours.vocab_size == 498
    assert ours.encode("w1 [url] Acute pain") == tokenizer("w1 [url] Acute pain", add_special_tokens=False)["input_ids"]


def test_a_vocabulary_is_known_by_its_tokens_where_the_kind_of_file_differs(shard_folders, vocabulary, tmp_path):
    """A folder that transformers has saved holds tokenizer.json alone, and the shards have the SentencePiece model."""
    folder = tmp_path / "hf"
    save_hugging_face(folder, "BertForPreTraining", vocabulary)
    convert.save_tokenizer(load_tokenizer(vocabulary), folder / "..", 64)
    (folder / vocabulary.name).unlink()
    (tmp_path / "tokenizer.json").rename(folder / "tokenizer.json")
    assert start_weights(folder, open_weights(folder).config, vocabulary).home == folder
    other = json.loads((folder / "tokenizer.json").read_text())
    other["model"]["vocab"][7:9] = other["model"]["vocab"][8:6:-1]
    (folder / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="ids would refer to other tokens"):
        start_weights(folder, open_weights(folder).config, vocabulary)


def test_weights_that_fold_text_differently_are_refused(tmp_path):
    """The same vocab.txt, but the shards are uncased and the model is cased."""
    for folder, lower_case in ((tmp_path / "hf", False), (tmp_path / "shards", True), (tmp_path / "cased", False)):
        folder.mkdir()
        tokens = [*SPECIAL_TOKENS, *(f"w{n}" for n in range(SHAPE.vocab_size - len(SPECIAL_TOKENS)))]
        (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens))
        settings = {"do_lower_case": lower_case, "strip_accents": lower_case}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    transformers.BertForPreTraining(SHAPE).save_pretrained(tmp_path / "hf")
    config = open_weights(tmp_path / "hf").config
    with pytest.raises(ValueError, match="lower_case=False .* shards were built with lower_case=True .* --vocab .*hf"):
        start_weights(tmp_path / "hf", config, tmp_path / "shards" / "vocab.txt")
    assert start_weights(tmp_path / "hf", config, tmp_path / "cased" / "vocab.txt").home == tmp_path / "hf"


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint here"):
        convert.main(["--checkpoint", str(tmp_path), "--output", str(tmp_path / "hf")])
    assert not (tmp_path / "hf").exists()


def parameter_shapes(config, tensor_parallel: int) -> dict[str, tuple[int, ...]]:
    model = BertForPreTraining(config, init_layout(tensor_parallel))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("tensor_parallel", [1, 2, 4])
@pytest.mark.parametrize(
    "variant",
    [{}, {"model_type": "megatron-bert"}, {"position_embedding_type": "sinusoidal", "pair_task": "none"}],
    ids=str,
)
def test_the_table_of_tensors_is_the_models(tensor_parallel, variant):
    config = ModelConfig(500, 64, 2, 4, 128, max_position_embeddings=64, **variant)
    shapes = run_ranks(parameter_shapes, tensor_parallel, config, tensor_parallel)[0]
    table = tensor_table(config)
    assert shapes == {name: rank_shape(name, whole, config, tensor_parallel) for name, whole in table.items()}
    assert list(shapes) == list(table)


@pytest.mark.parametrize(
    "variant", [{"model_type": "megatron-bert"}, {"position_embedding_type": "sinusoidal"}], ids=str
)
def test_other_kinds_of_bert_are_exported(variant, shard_folders, tmp_path):
    """`convert` compares all outputs with transformers before it ends."""
    config = ModelConfig(500, 64, 2, 4, 128, max_position_embeddings=64, **variant)
    (tmp_path / "model.json").write_text(json.dumps(config.to_json()))
    (tmp_path / "ds.json").write_text(json.dumps(CONFIG))
    more = ["--model", str(tmp_path / "model.json"), "--steps", "1", "--tensor-parallel", "2"]
    run_ranks(run_training, 2, arguments(shard_folders, tmp_path / "ds.json", tmp_path / "run", *more))
    run_ranks(convert.main, 1, ["--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "hf")])
    assert open_weights(tmp_path / "hf").keys() == {*tensor_table(config), POSITIONS}


# Names as they stand in google-research/bert's modeling.py and run_pretraining.py and in its released files.
