"""torch's own Transformer modules, which evaluate by a fused operator that reads weights past the layers."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stompp_hf import (
    BinaryLinear,
    Progression,
    StoMPPConfig,
    binarize_model,
    calibrate,
    get_plan,
    pack_model,
    restore_model,
)
from stompp_hf.modules.torch_encoder import UnfusedTransformerEncoder, UnfusedTransformerEncoderLayer, module_by_module

STEPS = 4


class Encoder(nn.Module):
    """An embedding, an encoder of two layers, a head."""

    def __init__(self, kind: type = nn.TransformerEncoderLayer, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = kind(16, 4, 24, dropout=0.0, **{"batch_first": True, **options})
        nested = not {"norm_first", "batch_first", "bias"} & options.keys()  # torch warns that it makes none there
        self.stem, self.head = nn.Linear(8, 16), nn.Linear(16, 2)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.head(self.encoder(self.stem(x), src_key_padding_mask=padding))  # type: ignore[no-any-return]


class Scaled(nn.TransformerEncoderLayer):
    """A subclass that adds something."""

    def forward(self, src: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(2 * src, *args, **kwargs)


X, PADDING = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(3, 5, dtype=torch.bool)
PADDING[0, 3:] = True
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "norm first": {"norm_first": True},
    "gelu": {"activation": "gelu"},
    "a module, absorbed": {"activation": nn.ReLU()},
    "sequence first": {"batch_first": False},
    "without bias": {"bias": False},
    "a subclass": {"kind": Scaled},
}
every_kind = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())


def names(model: nn.Module) -> list[str]:
    return [entry.name for entry in get_plan(model).entries]


def frozen(model: nn.Module, *args: Any) -> nn.Module:
    """After a whole progression in training mode."""
    progression = Progression(model, STEPS)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    progression.attach(optimizer)
    model.train()
    for step in range(STEPS):
        progression.step(step)
        model(*args).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    progression.step(STEPS)
    return model.eval()


@every_kind
def test_evaluation_is_binary(options: dict[str, Any]) -> None:
    model, plain = Encoder(**options), Encoder(**options).eval()
    padding = PADDING if options.get("batch_first", True) else torch.arange(15).reshape(5, 3) == 2
    binarize_model(model, StoMPPConfig(), example_inputs=X)
    assert names(model) == [f"encoder.layers.{index}.linear{number}" for index in (0, 1) for number in (1, 2)]
    with torch.no_grad():
        assert torch.equal(model.eval()(X), plain(X))  # by the fused operator, as before
        assert torch.equal(model(X, padding), plain(X, padding))
    frozen(model, X)
    for args in ((X,), (X, padding)):
        with_gradients = model(*args).detach()  # torch fuses nothing then
        with torch.no_grad():
            torch.testing.assert_close(model(*args), with_gradients)  # attention itself may be fused, and rounds
            seen = model(*args)
        with torch.inference_mode():
            assert torch.equal(model(*args), seen)

    with torch.no_grad():
        seen = model(X, padding)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), pack_model(copy.deepcopy(model))):
            assert torch.equal(copied(X, padding), seen)
        restore_model(model)
        for name, tensor in plain.state_dict().items():
            model.state_dict()[name].copy_(tensor)
        assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
        assert torch.equal(model(X, padding), plain(X, padding))


@pytest.mark.parametrize("relu", ["absorb", "drop", "rprelu"])
def test_what_becomes_of_the_activation_counts_from_the_start(relu: str) -> None:
    model = binarize_model(Encoder(activation=nn.ReLU()), StoMPPConfig(relu=relu), example_inputs=X).eval()
    with_gradients = model(X).detach()
    with torch.no_grad():
        torch.testing.assert_close(model(X), with_gradients)
    clipped = binarize_model(Encoder(), StoMPPConfig(weight_clip=0.01), example_inputs=X).eval()
    with_gradients = clipped(X).detach()
    with torch.no_grad():
        torch.testing.assert_close(clipped(X), with_gradients)


def test_calibrate_and_committed() -> None:
    model = binarize_model(Encoder(), StoMPPConfig(), example_inputs=X).eval()
    with torch.no_grad():
        real = model(X)
        with Progression(model, 10).committed([X]):
            committed = model(X)
            with module_by_module():
                torch.testing.assert_close(model(X), committed)
        assert not torch.allclose(committed, real)
        assert torch.equal(model(X), real)
        Progression(model, 10).step(10)
        assert torch.equal(calibrate(model, [X])(X), committed)


def test_a_finished_state_closes_it_however_it_gets_in() -> None:
    done = frozen(binarize_model(Encoder(), StoMPPConfig(), example_inputs=X), X)
    other = binarize_model(Encoder(), StoMPPConfig(), example_inputs=X).eval()
    with torch.no_grad():
        other(X)
        other.load_state_dict(done.state_dict())
        assert torch.equal(other(X), done(X)) and torch.equal(other(X, PADDING), done(X, PADDING))


def test_real_layers_keep_the_fused_path() -> None:
    model = binarize_model(Encoder(), StoMPPConfig(exclude_modules=["layers.1"]), example_inputs=X)
    kinds = [type(layer) for layer in model.encoder.layers]
    assert kinds == [UnfusedTransformerEncoderLayer, nn.TransformerEncoderLayer]
    assert type(model.encoder) is UnfusedTransformerEncoder
    frozen(model, X)
    model.encoder.use_nested_tensor = False  # the attributes can be set as before
    model.encoder.layers[0].activation_relu_or_gelu = 0
    assert not model.encoder.use_nested_tensor


def test_without_a_probe_it_is_closed_too() -> None:
    model = frozen(binarize_model(Encoder(), StoMPPConfig()), X)
    assert {"encoder.layers.0.linear1", "encoder.layers.1.linear2"} <= set(names(model))
    assert not any("out_proj" in name for name in names(model))  # torch's attention reads it past its forward
    assert "does not call it" in get_plan(model).left["encoder.layers.0.self_attn.out_proj"]
    with_gradients = model(X).detach()
    with torch.no_grad():
        torch.testing.assert_close(model(X), with_gradients)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, 16), nn.Linear(16, 2)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 4, 24, dropout=0.0, batch_first=True), 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.decoder(x, x))  # type: ignore[no-any-return]


def test_a_decoder() -> None:
    model = binarize_model(Decoder(), StoMPPConfig(), example_inputs=X)
    assert len(names(model)) == 4 and all(isinstance(model.get_submodule(name), BinaryLinear) for name in names(model))
    assert sum(reason.startswith("bypassed") for reason in get_plan(model).left.values()) == 4  # self and cross
    frozen(model, X)
    with_gradients = model(X).detach()
    with torch.no_grad():
        torch.testing.assert_close(model(X), with_gradients)
