"""A fine-tuned model as a Hugging Face folder, the only format in which weights are kept.

`evaluation.predict` reads it, `--checkpoint` of another task starts from it, and transformers loads it with labels and
tokenizer (AutoModelForSequenceClassification, ...TokenClassification, ...QuestionAnswering).
"""

from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from data_prep.files import finished_file, write_json
from data_prep.text.tokenizer import Tokenizer
from data_prep.text.tokenizer_json import save_tokenizer
from evaluation.tasks.task import Task
from pretrain.layout import Layout
from pretrain.model_config import ModelConfig
from pretrain.parameter_table import is_vocabulary


@torch.no_grad()
def whole_weights(module: nn.Module, layout: Layout) -> dict[str, Tensor]:
    """A float32 copy of all weights by Hugging Face's names, without the rows that pad the vocabulary.

    Collective; returns {} on all ranks but the first. Under ZeRO 3, the parameters themselves are empty, and each rank
    holds a flat part of their values.
    """
    weights = {}
    tensors = [*module.named_buffers(), *module.named_parameters()]  # sinusoidal positions are a buffer
    for name, tensor in tensors:
        if hasattr(tensor, "ds_tensor"):
            parts = layout.gather(tensor.ds_tensor.cpu())
            tensor = torch.cat(parts)[: tensor.ds_numel].view(tensor.ds_shape)
        if layout.rank == 0:
            whole = tensor[: module.config.vocab_size] if is_vocabulary(name) else tensor
            weights[name] = whole.float().cpu().clone()
    return weights


def export_model(
    folder: Path, weights: dict[str, Tensor], task: Task, config: ModelConfig, tokenizer: Tokenizer, seq_length: int
) -> None:
    """Write config.json, the tokenizer's files and, last, model.safetensors."""
    folder.mkdir(exist_ok=True)
    family = "MegatronBert" if config.pre_layer_norm else "Bert"
    names = task.labels or [f"LABEL_{index}" for index in range(task.num_outputs)]
    head = {
        "architectures": [task.head.__name__.replace("Bert", family)],
        "pad_token_id": tokenizer.pad_id,
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }
    if task.num_outputs == 1:
        head["problem_type"] = "regression"
    write_json(folder / "config.json", config.to_json() | head)
    save_tokenizer(tokenizer, folder, seq_length)
    with finished_file(folder / "model.safetensors") as file:
        file.write(save(weights, metadata={"format": "pt"}))
