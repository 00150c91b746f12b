"""One optimizer step on the tensors of a model: LAMB against torch's AdamW and, on a GPU, DeepSpeed's FusedLamb, which
is compiled with nvcc.

    python -m benchmarks.optimizer --model base

AdamW moves 28 bytes per parameter: it reads weight, gradient and two moments, and writes all but the gradient. LAMB
moves at least 40, because the trust ratio is known only after a first pass over the whole tensor.
"""

import torch

from benchmarks.measure import compared, in_turn, parser, report
from pretrain.lamb import Lamb, param_groups
from pretrain.layout import init_layout
from pretrain.model import BertForPreTraining
from pretrain.model_config import PRESETS, load_model_config


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", default="base", choices=PRESETS, help="default: base")
    options.add_argument("--layers", type=int, help="use fewer layers than the model has, if memory is short")
    args = options.parse_args()
    rows = compared(in_turn(competitors(args.model, args.layers), args.repeats), "AdamW foreach")
    name = f"{args.model}-{args.layers}-layers" if args.layers else args.model
    report(f"optimizer-{name}", {f"One step of {name}": rows}, args.save)


def competitors(model: str, num_layers: int | None) -> dict:
    """For each optimizer a function that takes one step on a copy of the tensors with random gradients."""
    layout = init_layout(1)
    config = load_model_config(model, vocab_size=30_522)
    if num_layers:
        config = type(config)(**{**config.__dict__, "num_hidden_layers": num_layers})
    shapes = {name: tensor.shape for name, tensor in BertForPreTraining(config, layout).named_parameters()}

    def build(optimizer, **options):
        module = torch.nn.ParameterDict()  # param_groups reads the dimensions
        torch.manual_seed(0)
        for name, shape in shapes.items():
            module[name.replace(".", "_")] = torch.nn.Parameter(0.02 * torch.randn(shape, device=layout.device))
        for parameter in module.values():
            parameter.grad = torch.randn_like(parameter)
        step = optimizer(param_groups(module, 0.01), lr=1e-3, **options).step

        def run() -> None:
            step()
            if layout.device.type == "cuda":
                torch.cuda.synchronize()

        return run

    found = {
        "AdamW foreach": build(torch.optim.AdamW, foreach=True),
        "AdamW fused": build(torch.optim.AdamW, fused=True),
        "LAMB": build(Lamb),
    }
    if layout.device.type == "cuda":
        from deepspeed.ops.lamb import FusedLamb

        try:
            found["DeepSpeed's FusedLamb"] = build(FusedLamb)
        except (RuntimeError, OSError) as error:
            print(f"DeepSpeed's FusedLamb is left out because it could not be compiled here: {error}")
    return found


if __name__ == "__main__":
    main()
