"""When layers look at the data: from where a window opens until something reaches the layer, at the latest its end."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import NotCalibratedError
from ..integrations.sharding import write_after_forward
from ..integrations.torch import remove_all
from ..method.windows import Window
from ..modules import Member
from ..modules.calibration import Observer, Watch, padding_masks, reduced

logger = logging.getLogger(__name__)

SAW_NO_RUN, SAW_NOTHING, SAW_PADDING, SAW_ROWS = range(4)


class _Around:
    """The hooks of a model that tell its observers what it was called with. A copy of the model takes its own along."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.watch.masks[:] = padding_masks(kwargs)
        self.watch.trains = module.training and torch.is_grad_enabled()
        self.watch.ran |= self.watch.trains

    def leave(self, *_: Any) -> None:
        self.watch.trains = False


class Observation:
    """Gives layers an observer when their window opens, and their activation values from what it saw.

    Args:
        model: what is called in training.
        layers: its members by name.
        windows: theirs, followed as they change.
        total_steps: of the run.
    """

    def __init__(
        self, model: nn.Module, layers: Mapping[str, Member], windows: Mapping[str, Window], total_steps: int
    ) -> None:
        self.model, self.layers, self.windows, self.total_steps = model, layers, windows, total_steps
        self._handles: list[Any] = []

    @property
    def is_on(self) -> bool:
        """Whether any layer looks now."""
        return bool(self._handles)

    def begin(self, step: int) -> None:
        """Let the layers look whose window is open, and that have no values yet."""
        due = [
            layer
            for name, layer in self.layers.items()
            if self.windows[name].observed_at <= step and not layer.always_real
            and layer.stompp_config.binary_activations and layer.needs_activation_values and not layer.activation_ready
        ]  # fmt: skip
        if all(layer.observer is None for layer in self.layers.values()):
            remove_all(self._handles)
        if not due:
            return
        watch = Watch()  # one for all, which the model's hooks keep current
        for layer in due:
            layer.observer = layer.observer or Observer()
            layer.observer.watch = watch
        around = _Around(watch)
        remove_all(self._handles)
        self._handles.append(self.model.register_forward_pre_hook(around.enter, with_kwargs=True))
        self._handles.append(self.model.register_forward_hook(around.leave, always_call=True))
        self._handles += write_after_forward(self.model, [layer for layer in due if layer.frozen_share > 0.0])

    def take(self, step: int) -> None:
        """Set the values of the layers that saw something, and of those whose window is over.

        Raises:
            NotCalibratedError: nothing but padding reached a layer while its stage froze.
        """
        looking = {name: layer for name, layer in self.layers.items() if layer.observer is not None}
        if looking:
            # A layer that ran on any process takes its values on all of them: they are summed over processes.
            seen = [_seen_by(layer.observer) for layer in looking.values() if layer.observer is not None]
            device = next(iter(looking.values())).stompp_state.device
            seen = reduced(torch.tensor(seen, device=device), "max").tolist()
            for (name, layer), what in zip(looking.items(), seen, strict=True):
                if what == SAW_ROWS:
                    if not layer.activation_ready:  # else its first call decided, and the optimizer went on from there
                        layer.calibrate_observed(layer.observer)  # type: ignore[arg-type]
                    layer.observer = None
                elif what != SAW_NO_RUN and step >= self._closes(name):
                    self._close_unseen(name, layer, what)

    def end(self) -> None:
        """Let nothing look any more."""
        for layer in self.layers.values():
            layer.observer = None
        remove_all(self._handles)

    def _closes(self, name: str) -> int:
        """The step before which a layer must have seen something; one that is committed at once has the whole run."""
        window = self.windows[name]
        return window.end if window.end > window.begin else self.total_steps

    def _close_unseen(self, name: str, layer: Member, what: int) -> None:
        """A window is over, the model was trained meanwhile, and nothing that counts reached the layer."""
        if what == SAW_PADDING:
            raise NotCalibratedError(
                f"{name}: its stage froze before step {self._closes(name)}, and until then it saw nothing but padding: "
                "its activation values have nothing to start from. Look at the attention_mask of the data, or give the "
                "stage more steps (fewer stages, a longer run)."
            )
        logger.warning(
            "%s: no input reached it while its stage froze (an expert that got no token?). It starts from values that "
            "follow from its weights.", name,
        )  # fmt: skip
        layer.calibrate_unseen()
        layer.observer = None


def _seen_by(observer: Observer) -> int:
    """What an observer saw, in the order of what counts most over processes."""
    if observer.rows:
        return SAW_ROWS
    return SAW_PADDING if observer.hidden else SAW_NOTHING if observer.watch.ran else SAW_NO_RUN
