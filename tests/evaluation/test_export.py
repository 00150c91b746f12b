"""Kept models as transformers loads them: each head, each kind of BERT, labels and tokenizer."""

import numpy as np
import pytest
import torch
import transformers

from data_prep.text.tokenizer import load_tokenizer
from evaluation.export import export_model, whole_weights
from evaluation.tasks.classification import TextTask, text_task
from evaluation.tasks.features import gather_batch
from evaluation.tasks.ner import ner_task
from evaluation.tasks.squad import squad_task
from pretrain.layout import init_layout
from pretrain.model import init_weights
from pretrain.model_config import ModelConfig
from tests.evaluation.test_heads import make_features

LABELS = ("no", "yes", "perhaps")
TASKS = {
    "AutoModelForSequenceClassification": text_task(TextTask("own", ("sentence",), "label", LABELS, ("accuracy",))),
    "AutoModelForTokenClassification": ner_task("ner", "train.txt", "dev.txt", "iob2", ["O", "B-X", "I-X"]),
    "AutoModelForQuestionAnswering": squad_task("squad1"),
}
KINDS = [{}, {"model_type": "megatron-bert"}, {"position_embedding_type": "sinusoidal"}]


@pytest.mark.parametrize("kind", KINDS, ids=["bert", "megatron", "sinusoidal"])
@pytest.mark.parametrize("name", TASKS)
def test_transformers_gives_the_same_logits(tmp_path, name, kind):
    task = TASKS[name]
    config = ModelConfig(100, 32, 2, 4, 64, max_position_embeddings=24, initializer_range=0.2, **kind)
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(95))]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    layout = init_layout()
    model = task.head(config, layout, task.num_outputs)
    init_weights(model, seed=3)
    tokenizer = load_tokenizer(tmp_path / "vocab.txt")
    export_model(tmp_path / "model", whole_weights(model, layout), task, config, tokenizer, 24)

    theirs, loading = getattr(transformers, name).from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    if task.labels:
        assert theirs.config.id2label == dict(enumerate(task.labels))
    features = make_features(None, lengths=[12])
    features.token_ids[:] %= 100
    sequences, _ = gather_batch(features, np.array([0]))
    output = theirs.eval()(input_ids=sequences.token_ids[None], token_type_ids=sequences.segment_ids[None])
    expected = (
        torch.stack([output.start_logits[0], output.end_logits[0]], -1)
        if name.endswith("Answering")
        else output.logits.view(-1, 3)
    )
    torch.testing.assert_close(model(sequences), expected, rtol=0, atol=1e-5)  # measured: 1.2e-6

    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert loaded("w1 w2", "w3")["token_type_ids"] == [0, 0, 0, 0, 1, 1]
    assert loaded.model_max_length == 24
