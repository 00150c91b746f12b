"""What fine-tuning puts on top of the pretrained encoder, under the names of Hugging Face's classes, so that export is
a copy.

Shapes follow the legend in `pretrain.model`; L is the number of outputs: one per class, or 1 for a score.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config import ModelConfig
from pretrain.layers import Sequences, dropout
from pretrain.layout import Layout
from pretrain.model import BertModel


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
        pooled = dropout(pooled, self.config.hidden_dropout_prob, dropout_seed and (*dropout_seed, "classifier"))
        return self.classifier(pooled).float()


def sequence_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean loss over the batch: cross entropy in nats for int64 class indices [B], squared error for float32 scores
    [B].
    """
    if labels.is_floating_point():
        return F.mse_loss(logits.squeeze(1), labels)
    return F.cross_entropy(logits, labels)
