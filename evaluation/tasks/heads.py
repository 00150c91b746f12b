"""What fine-tuning puts on top of the pretrained encoder, under the names of Hugging Face's classes, so that export is
a copy; and their losses.

Shapes follow the legend in `pretrain.model`; L is the number of outputs: one per class, 1 for a score, 2 for the first
and the last token of an answer. A loss is one number for each thing to be learnt, not reduced: the loop takes the mean.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.layers import Sequences, dropout, sub_seed
from pretrain.layout import Layout
from pretrain.model import BertModel
from pretrain.model_config import ModelConfig


class BertForSequenceClassification(nn.Module):
    """Pooled [CLS], dropout, linear: a class or a score for a sentence or a pair (Devlin et al. 2019, section 4.1).

    Parameters are `bert.*`, `classifier.weight` [L, H] and `classifier.bias` [L]; `pretrain.model.init_weights` fills
    them.
    """

    def __init__(self, config: ModelConfig, layout: Layout, num_outputs: int):
        super().__init__()
        self.config = config
        self.bert = BertModel(config, layout)
        self.classifier = nn.Linear(config.hidden_size, num_outputs)

    def forward(self, sequences: Sequences, dropout_seed: tuple | None = None) -> Tensor:
        """Logits [B, L] in float32. `dropout_seed` makes the dropout masks; None switches dropout off."""
        pooled = self.bert.pool(self.bert(sequences, dropout_seed), sequences.cu_seqlens)  # [B, H]
        pooled = dropout(pooled, self.config.hidden_dropout_prob, sub_seed(dropout_seed, "classifier"))
        return self.classifier(pooled).float()


class BertForTokenClassification(nn.Module):
    """Dropout and linear on each token: a class for each word (Devlin et al. 2019, section 5.3). There is no pooler.

    Parameters are `bert.*`, `classifier.weight` [L, H] and `classifier.bias` [L].
    """

    def __init__(self, config: ModelConfig, layout: Layout, num_outputs: int):
        super().__init__()
        self.config = config
        self.bert = BertModel(config, layout, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, num_outputs)

    def forward(self, sequences: Sequences, dropout_seed: tuple | None = None) -> Tensor:
        """Logits [T, L] in float32. `dropout_seed` makes the dropout masks; None switches dropout off."""
        hidden = self.bert(sequences, dropout_seed)  # [T, H]
        hidden = dropout(hidden, self.config.hidden_dropout_prob, sub_seed(dropout_seed, "classifier"))
        return self.classifier(hidden).float()


class BertForQuestionAnswering(nn.Module):
    """Linear on each token: how well an answer begins there, and ends (Devlin et al. 2019, section 4.2). No pooler.

    Parameters are `bert.*`, `qa_outputs.weight` [2, H] and `qa_outputs.bias` [2].
    """

    def __init__(self, config: ModelConfig, layout: Layout, num_outputs: int = 2):
        super().__init__()
        self.config = config
        self.bert = BertModel(config, layout, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, num_outputs)

    def forward(self, sequences: Sequences, dropout_seed: tuple | None = None) -> Tensor:
        """Logits [T, 2] in float32. `dropout_seed` makes the dropout masks; None switches dropout off."""
        return self.qa_outputs(self.bert(sequences, dropout_seed)).float()


def sequence_loss(logits: Tensor, labels: Tensor, sequences: Sequences) -> Tensor:
    """[B] Cross entropy in nats for int64 class indices [B], squared error for float32 scores [B]. logits: [B, L]."""
    if labels.is_floating_point():
        return F.mse_loss(logits.squeeze(1), labels, reduction="none")
    return F.cross_entropy(logits, labels, reduction="none")


def token_loss(logits: Tensor, labels: Tensor, sequences: Sequences) -> Tensor:
    """[n] Cross entropy in nats of the n tokens that have a label. logits: [T, L], labels: [T], -100 for none."""
    labelled = labels != -100
    return F.cross_entropy(logits[labelled], labels[labelled], reduction="none")


def span_loss(logits: Tensor, labels: Tensor, sequences: Sequences) -> Tensor:
    """[B] Mean of the cross entropies of an answer's first and last token, in nats. logits: [T, 2], labels: [B, 2].

    The softmax is over the tokens of the sequence. In google-research/bert and Hugging Face it is over the padding too,
    so there it depends on what else is in the batch.
    """
    num_places = sequences.num_sequences * sequences.max_seqlen
    padded = logits.new_full((num_places, 2), float("-inf"))
    index = sequences.padded_index
    padded = logits if index is None else padded.index_copy(0, index.to(logits.device), logits)  # [B * S, 2]
    padded = padded.view(sequences.num_sequences, sequences.max_seqlen, 2)
    first, last = (F.cross_entropy(padded[:, :, side], labels[:, side], reduction="none") for side in (0, 1))
    return torch.add(first, last) / 2
