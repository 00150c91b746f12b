"""The layers that fine-tuning adds to the pretrained encoder, and their losses. Classes and parameters have Hugging
Face's names, so that export is a copy.

Shapes follow the legend in `pretrain.model`. L is the number of outputs: one per class, 1 for a score, 2 for the first
and the last token of an answer. Logits are float32. In each `forward`, `dropout_seed` determines the dropout masks;
None switches dropout off. Losses are not reduced: the loop takes the mean.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.layers import Sequences, dropout, sub_seed
from pretrain.layout import Layout
from pretrain.model import BertModel
from pretrain.model_config import ModelConfig


class BertForSequenceClassification(nn.Module):
    """A class or score for one or two texts: dropout and linear layer on the pooled [CLS] (Devlin et al. 2019, 4.1)."""

    def __init__(self, config: ModelConfig, layout: Layout, num_outputs: int):
        super().__init__()
        self.config = config
        self.bert = BertModel(config, layout)
        self.classifier = nn.Linear(config.hidden_size, num_outputs)

    def forward(self, sequences: Sequences, dropout_seed: tuple | None = None) -> Tensor:
        """Logits [B, L]."""
        pooled = self.bert.pool(self.bert(sequences, dropout_seed), sequences.cu_seqlens)  # [B, H]
        pooled = dropout(pooled, self.config.hidden_dropout_prob, sub_seed(dropout_seed, "classifier"))
        return self.classifier(pooled).float()


class BertForTokenClassification(nn.Module):
    """A class for each token: dropout and linear layer, without a pooler (Devlin et al. 2019, section 5.3)."""

    def __init__(self, config: ModelConfig, layout: Layout, num_outputs: int):
        super().__init__()
        self.config = config
        self.bert = BertModel(config, layout, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, num_outputs)

    def forward(self, sequences: Sequences, dropout_seed: tuple | None = None) -> Tensor:
        """Logits [T, L]."""
        hidden = self.bert(sequences, dropout_seed)  # [T, H]
        hidden = dropout(hidden, self.config.hidden_dropout_prob, sub_seed(dropout_seed, "classifier"))
        return self.classifier(hidden).float()


class BertForQuestionAnswering(nn.Module):
    """Start and end logits of an answer: linear layer on each token, without a pooler (Devlin et al. 2019, 4.2)."""

    def __init__(self, config: ModelConfig, layout: Layout, num_outputs: int = 2):
        super().__init__()
        self.config = config
        self.bert = BertModel(config, layout, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, num_outputs)

    def forward(self, sequences: Sequences, dropout_seed: tuple | None = None) -> Tensor:
        """Logits [T, 2]."""
        return self.qa_outputs(self.bert(sequences, dropout_seed)).float()


def sequence_loss(logits: Tensor, labels: Tensor, sequences: Sequences) -> Tensor:
    """[B] Cross entropy in nats for class indices [B], squared error for float32 scores [B]. logits: [B, L]."""
    if labels.is_floating_point():
        return F.mse_loss(logits.squeeze(1), labels, reduction="none")
    return F.cross_entropy(logits, labels, reduction="none")


def token_loss(logits: Tensor, labels: Tensor, sequences: Sequences) -> Tensor:
    """[n] Cross entropy in nats of the n tokens that have a label. logits: [T, L], labels: [T], -100 for none."""
    labelled = labels != -100
    return F.cross_entropy(logits[labelled], labels[labelled], reduction="none")


def span_loss(logits: Tensor, labels: Tensor, sequences: Sequences) -> Tensor:
    """[B] Mean of the cross entropies, in nats, of an answer's first and last token. logits: [T, 2], labels: [B, 2].

    The softmax is over the tokens of the sequence. In google-research/bert and Hugging Face it includes the padding, so
    the loss there depends on the other sequences of the batch.
    """
    index = sequences.padded_index
    padded = logits
    if index is not None:
        padded = logits.new_full((sequences.num_sequences * sequences.max_seqlen, 2), float("-inf"))
        padded = padded.index_copy(0, index.to(logits.device), logits)
    padded = padded.view(sequences.num_sequences, sequences.max_seqlen, 2)  # [B, S, 2]
    first, last = (F.cross_entropy(padded[:, :, side], labels[:, side], reduction="none") for side in (0, 1))
    return (first + last) / 2
