"""Run a model on a small batch and leave no trace: what it is called with, and what is put back."""

import contextlib
import inspect
import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy
import torch
from torch import nn

from ..integrations.torch import buffers_of


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
def random_states_kept() -> Iterator[None]:
    """Put back every global random state: loaders draw from torch's even in order, collators from any of them."""
    drawn, drawn_by_numpy = random.getstate(), numpy.random.get_state()
    cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=cuda):
            yield
    finally:
        random.setstate(drawn)
        numpy.random.set_state(drawn_by_numpy)


@contextlib.contextmanager
def undisturbed(model: nn.Module, except_for: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Run the model in eval mode without gradients, then put back its modes, its buffers and the random states.

    The buffers of the modules in `except_for` keep what the run made of them.
    """
    changing = {id(buffer) for module in except_for for buffer in module.buffers()}
    training = {module: module.training for module in model.modules()}
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if id(buffer) not in changing
    ]
    try:
        with random_states_kept(), torch.no_grad():
            model.eval()
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
        with torch.no_grad():
            for module, name, buffer, before in buffers:
                if (held := buffers_of(module)).get(name) is not buffer:  # replaced, and not written to
                    held[name] = buffer
                if buffer.shape == before.shape:
                    buffer.copy_(before)


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """As `undisturbed`, and what modules keep in attributes (a cache, a counter) is put back, too."""
    kept = [(module, type(module), dict(vars(module))) for module in model.modules()]
    try:
        with undisturbed(model):
            yield
    finally:
        for module, kind, attributes in kept:
            if type(module) is kind:  # a lazy module is another one after its first run
                vars(module).clear()
                vars(module).update(attributes)


def run(model: nn.Module, inputs: Any) -> Any:
    """Call the model on a mapping, a tuple or list, or a single value."""
    if isinstance(inputs, dict) or hasattr(inputs, "keys"):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)
