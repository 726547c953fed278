"""What scales cost and what they keep of a checkpoint's weights: one a tensor, one an output channel, one a group.

    python examples/benchmarks/group_scales.py --model PATH     # a plain checkpoint, from a folder or a hub

The weights that `binarize_model` would make binary, untrained: the error is that of s * sign(w), with s = mean |w|, as
a share of the sum of w * w; bits are those of signs and scales in float32, as packed checkpoints hold them, and in
float16, as llama.cpp's Q1_0 does. How much of the difference training makes up for, this does not say. Prints a
Markdown table.
"""

from dataclasses import dataclass, field

from transformers import AutoModel, HfArgumentParser

from stompp_hf import StoMPPConfig, binarize_model
from stompp_hf.surgery.members import binary_layers


@dataclass
class Arguments:
    """Which checkpoint, and which groups."""

    model: str = field(metadata={"help": "Folder or name of a plain checkpoint."})
    group_sizes: list[int] = field(default_factory=lambda: [512, 256, 128, 64, 32], metadata={"help": "Group sizes."})


def row(model: str, name: str, config: StoMPPConfig) -> str:
    """A line of the table."""
    layers = binary_layers(binarize_model(AutoModel.from_pretrained(model), config))
    wrong = whole = 0.0
    weights = scales = 0
    for layer in layers.values():
        layer.calibrate_weight()
        latent = layer.weight.detach()
        wrong += float((latent - layer.binary_weight()).double().square().sum())
        whole += float(latent.double().square().sum())
        weights, scales = weights + latent.numel(), scales + layer.weight_scale.numel()
    bits = [1 + size * scales / weights for size in (32, 16)]
    return f"| {name} | {wrong / whole:.4f} | {bits[0]:.3f} | {bits[1]:.3f} |"


def main() -> None:
    """Print the table."""
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    configs = {f"one a {kind}": StoMPPConfig(binarize="weights", weight_scale=kind) for kind in ("tensor", "channel")}
    for size in arguments.group_sizes:
        configs[f"one for {size}"] = StoMPPConfig(binarize="weights", weight_scale="group", group_size=size)
    print("| scales | error of the weights | bits a weight, scales in float32 | in float16 |\n|---|---|---|---|")
    for name, config in configs.items():
        print(row(arguments.model, name, config), flush=True)


if __name__ == "__main__":
    main()
