"""A fine-tuned model as a Hugging Face folder: what `--predict` reads, what `--checkpoint` of another task starts from,
and what transformers loads as it is (AutoModelForSequenceClassification, ...TokenClassification, ...QuestionAnswering),
with labels and tokenizer. There is no second format.
"""

from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from data_prep.cli import finished_file, write_json
from data_prep.tokenizer import Tokenizer
from evaluation.task import Task
from pretrain.config import ModelConfig
from pretrain.convert import save_tokenizer
from pretrain.tensors import is_vocabulary


@torch.no_grad()
def whole_weights(module: nn.Module) -> dict[str, Tensor]:
    """A float32 copy of all weights by Hugging Face's names, of a model on one rank, without the rows that pad the
    vocabulary; also out of ZeRO 3, which keeps them flat beside empty parameters.
    """
    weights = dict(module.named_buffers())  # sinusoidal positions: a parameter to Hugging Face
    for name, parameter in module.named_parameters():
        if hasattr(parameter, "ds_tensor"):
            parameter = parameter.ds_tensor[: parameter.ds_numel].view(parameter.ds_shape)
        weights[name] = parameter[: module.config.vocab_size] if is_vocabulary(name) else parameter
    return {name: tensor.detach().float().cpu().clone() for name, tensor in weights.items()}


def export_model(
    folder: Path, weights: dict[str, Tensor], task: Task, config: ModelConfig, tokenizer: Tokenizer, max_seq_length: int
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
    save_tokenizer(tokenizer, folder, max_seq_length)
    with finished_file(folder / "model.safetensors") as file:
        file.write(save(weights, metadata={"format": "pt"}))
