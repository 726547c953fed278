"""One forward pass before anything is converted: execution order, layers that never run, what feeds which layer."""

import contextlib
import inspect
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .dataflow import DataFlow

logger = logging.getLogger(__name__)


@dataclass
class Trace:
    """What the probe saw. Times count the calls of hooked modules, from 0."""

    flow: DataFlow
    first_call: dict[str, int] = field(default_factory=dict)
    producers: dict[str, str] = field(default_factory=dict)

    def order(self) -> list[str]:
        """Names by first call."""
        return sorted(self.first_call, key=lambda name: self.first_call[name])


def example_inputs_of(model: nn.Module, seed: int = 0) -> dict[str, Any] | None:
    """Small inputs made from a transformers model's config, by its `main_input_name`; None if there is no way."""
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", None)
    if config is None or main is None:
        return None
    generator = torch.Generator().manual_seed(seed)
    weight = next(model.parameters(), torch.zeros(()))
    device, dtype = weight.device, weight.dtype if weight.is_floating_point() else torch.float32
    accepted = inspect.signature(model.forward).parameters
    vision = getattr(config, "vision_config", config)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    inputs: dict[str, Any] = {}

    def tokens() -> torch.Tensor:
        ids = torch.randint(1, max(2, int(text.vocab_size)), (1, 8), generator=generator)
        if isinstance(getattr(text, "eos_token_id", None), int):
            ids[ids == text.eos_token_id] = 1 if text.eos_token_id != 1 else 2
            ids[:, -1] = text.eos_token_id  # some classifiers read the position of the last end-of-sequence token
        return ids.to(device)

    if main == "input_ids" or ("input_ids" in accepted and main == "pixel_values"):
        if not isinstance(getattr(text, "vocab_size", None), int):
            return None
        inputs["input_ids"] = tokens()
        if "attention_mask" in accepted:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
            inputs["decoder_input_ids"] = inputs["input_ids"].clone()
    if main == "pixel_values" or "pixel_values" in accepted:
        size = getattr(vision, "image_size", None) or 64
        height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
        channels = getattr(vision, "num_channels", None) or 3
        shape = (1, channels, height, width)
        inputs["pixel_values"] = torch.randn(shape, generator=generator).to(device, dtype)
    if main == "input_values":
        inputs["input_values"] = torch.randn((1, 4000), generator=generator).to(device, dtype)
    if main == "input_features":
        bins = getattr(config, "num_mel_bins", None) or 80
        frames = 2 * (getattr(config, "max_source_positions", None) or 100)
        inputs["input_features"] = torch.randn((1, bins, frames), generator=generator).to(device, dtype)
    return inputs or None


@contextlib.contextmanager
def undisturbed(model: nn.Module, except_for: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Run the model in eval mode without gradients, then put back its modes, its buffers and the random state.

    The buffers of the modules in `except_for` keep what the run made of them.
    """
    changing = {id(buffer) for module in except_for for buffer in module.buffers()}
    training = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers() if id(buffer) not in changing]
    cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=cuda), torch.no_grad():
            model.eval()
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
        with torch.no_grad():
            for buffer, before in buffers:
                if buffer.shape == before.shape:
                    buffer.copy_(before)


def run(model: nn.Module, inputs: Any) -> Any:
    """Call the model on a mapping, a tuple or list, or a single value."""
    if isinstance(inputs, dict) or hasattr(inputs, "keys"):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def probe(model: nn.Module, candidates: dict[str, nn.Module], example_inputs: Any = None) -> Trace | None:
    """Run one batch through the model and note when each candidate is called, and on whose output.

    Args:
        model: the unconverted model.
        candidates: the layers to watch, by name.
        example_inputs: keyword arguments, a tuple of arguments, or one tensor; made from the config if None.

    Returns:
        The trace, or None (with a warning) when no inputs could be made or the model did not run on made-up ones.

    Raises:
        Exception: whatever the model raises on inputs that the caller gave.
    """
    inputs = example_inputs_of(model) if example_inputs is None else example_inputs
    if inputs is None:
        logger.warning("no probe of %s: %s", type(model).__name__, _ADVICE)
        return None
    trace, clock = Trace(DataFlow(candidates)), 0
    names = {id(module): name for name, module in candidates.items()}
    made: dict[tuple[int, torch.Size], tuple[str, torch.Tensor]] = {}  # keeps tensors alive: an address is not reused

    def tensor_key(tensor: torch.Tensor) -> tuple[int, torch.Size]:
        return tensor.data_ptr(), tensor.shape

    def before(module: nn.Module, args: Any) -> None:
        nonlocal clock
        name = names[id(module)]
        trace.first_call.setdefault(name, clock)
        clock += 1
        if args and isinstance(args[0], torch.Tensor):
            source = made.get(tensor_key(args[0]))
            trace.producers[name] = source[0] if source and source[0] != "Dropout" else trace.producers.get(name, "")

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            kind = type(module).__name__
            if isinstance(module, nn.Dropout) and args and isinstance(args[0], torch.Tensor):
                source = made.get(tensor_key(args[0]))  # in eval mode a dropout only passes its input on
                kind = source[0] if source else kind
            made[tensor_key(output)] = (kind, output)

    handles = [module.register_forward_pre_hook(before) for module in candidates.values()]
    handles += [module.register_forward_hook(after) for module in model.modules() if not list(module.children())]
    handles += trace.flow.watch(model)
    try:
        with undisturbed(model), trace.flow:
            trace.flow.close(run(model, inputs))
    except Exception as error:
        if example_inputs is not None:
            raise
        kind = type(model).__name__
        logger.warning("the probe of %s failed (%s: %s): %s", kind, type(error).__name__, error, _ADVICE)
        return None
    finally:
        for handle in handles:
            handle.remove()
    return trace


_ADVICE = (
    "layers are ordered by registration, and layers that the model bypasses cannot be found; pass "
    "binarize_model(model, config, example_inputs=...) one small batch to have both right"
)
