"""Google's TensorFlow checkpoints of BERT (google-research/bert), read tensor by tensor under Hugging Face's names.

A released folder holds bert_config.json, vocab.txt and `bert_model.ckpt.{index,data-00000-of-00001,meta}`. Only this
module needs TensorFlow: `pip install -e '.[tensorflow]'`. The optimizer's moments (adam_m, adam_v) are not read.
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

CONFIG_FILE = "bert_config.json"
GOOGLE_NAMES = {  # applied in this order
    r"\.layer\.(\d+)": r".layer_\1",
    r"(_embeddings)\.weight$": r"\1",
    r"LayerNorm\.weight$": "LayerNorm.gamma",
    r"LayerNorm\.bias$": "LayerNorm.beta",
    r"cls\.(predictions|seq_relationship)\.bias$": r"cls.\1.output_bias",
    r"seq_relationship\.weight$": "seq_relationship.output_weights",
    r"\.weight$": ".kernel",
}


def find_google_checkpoint(path: Path) -> Path | None:
    """The prefix of a checkpoint, such as DIR/bert_model.ckpt, given the prefix or its folder; None if there is none.

    Raises ValueError for a folder with several checkpoints or without bert_config.json.
    """
    found = sorted(path.glob("*.ckpt*.index")) if path.is_dir() else sorted(path.parent.glob(f"{path.name}.index"))
    if not found:
        return None
    if len(found) > 1:
        names = ", ".join(index.name.removesuffix(".index") for index in found)
        raise ValueError(f"{path} holds several TensorFlow checkpoints ({names}); name one of them")
    if not (found[0].parent / CONFIG_FILE).is_file():
        raise ValueError(f"{found[0].parent}: the TensorFlow checkpoint has no {CONFIG_FILE}; copy it there too")
    return found[0].with_suffix("")


def google_readers(prefix: Path, names: list[str]) -> dict[str, Callable[[], Tensor]]:
    """Readers of those tensors among `names` (Hugging Face's) that the checkpoint holds."""
    try:
        import tensorflow
    except ImportError:
        raise ValueError(
            f"{prefix} is a TensorFlow checkpoint; to read it, install TensorFlow: pip install -e '.[tensorflow]'"
        ) from None
    checkpoint = tensorflow.train.load_checkpoint(str(prefix))
    return {name: partial(_read, checkpoint, name) for name in names if checkpoint.has_tensor(google_name(name))}


def _read(checkpoint, name: str) -> Tensor:
    """One tensor. TensorFlow's kernels are [in, out], so they are transposed."""
    tensor = torch.from_numpy(checkpoint.get_tensor(google_name(name)))
    return tensor.t().contiguous() if google_name(name).endswith("/kernel") else tensor


def google_name(name: str) -> str:
    """Google's name of a tensor: bert.encoder.layer.0.output.dense.weight -> bert/encoder/layer_0/output/dense/kernel.

    Embeddings have no suffix, and the output layers of the two heads have names of their own.
    """
    for pattern, replacement in GOOGLE_NAMES.items():
        name = re.sub(pattern, replacement, name)
    return name.replace(".", "/")
