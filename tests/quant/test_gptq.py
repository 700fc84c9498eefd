"""quant/gptq.py: GPTQ against its definition solved column by column, the grid of the base, and the moments."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from qlora.lora.targets import linear_layers
from qlora.model.load import load_base_model
from qlora.quant.gptq import (
    DAMPING,
    FACTORS,
    Feedback,
    choose_codes,
    input_moments,
    requantize,
    rescaled,
    round_with_feedback,
)
from qlora.quant.weight import (
    QuantConfig,
    block_scales,
    dequantize_weight,
    quantization_of,
    quantize_weight,
)
from qlora.system.errors import InputError
from tests import reference
from tests.models import save_tiny_llama
from tests.reference import relative_error

QUANTS = [QuantConfig(), QuantConfig("fp4"), QuantConfig(double_quant=False), QuantConfig(block_size=128)]


def correlated_inputs(num: int, width: int, seed: int = 0) -> Tensor:
    """(num, width) fp32, as hidden states are: correlated, and a few features far larger than the rest."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(num, width // 4, generator=generator) @ torch.randn(width // 4, width, generator=generator)
    inputs = few + 0.3 * torch.randn(num, width, generator=generator)
    inputs[:, 3] *= 20
    return inputs


def output_error(actual: Tensor, expected: Tensor, inputs: Tensor) -> float:
    return ((actual - expected) @ inputs.T).square().sum().item()


def small_update(weight: Tensor, inputs: Tensor, size: float = 0.003) -> Tensor:
    """A rank-2 update far below half a step of the grid that reads what the inputs have, as gradients make it."""
    generator = torch.Generator().manual_seed(5)
    update = torch.randn(len(weight), 2, generator=generator) @ inputs[:2]
    return size * update / update.square().mean().sqrt()


def obq(target: Tensor, scales: Tensor, values: Tensor, H: Tensor) -> Tensor:
    """Optimal brain quantization in a fixed order, by its definition (arXiv 2210.17323, equation 2): after each
    column the others move by -e (H_FF^-1)_:q / (H_FF^-1)_qq, F the columns that are still free, inverted anew."""
    weight, chosen = target.clone(), torch.zeros(target.shape, dtype=torch.int64)
    free = H.diagonal().argsort(descending=True, stable=True).tolist()
    while free:
        inverse = torch.linalg.inv(H[free][:, free])
        q = free[0]
        distance = (weight[:, q, None] - values * scales[:, q, None]).abs()
        chosen[:, q] = distance.argmin(1)
        error = weight[:, q] - values[chosen[:, q]] * scales[:, q]
        weight[:, free] -= error[:, None] * (inverse[:, 0] / inverse[0, 0])
        free = free[1:]
    return chosen


def test_against_the_definition() -> None:
    """In fp64 every choice is the same, over more columns than one group has."""
    inputs = correlated_inputs(400, 150).double()
    moment = inputs.T @ inputs / len(inputs)
    generator = torch.Generator().manual_seed(1)
    target = 0.1 * torch.randn(20, 150, generator=generator, dtype=torch.float64)
    scales = (0.2 + 0.1 * torch.rand(20, 3, generator=generator, dtype=torch.float64)).repeat_interleave(50, 1)
    values = torch.tensor(reference.NF4, dtype=torch.float64)
    H = moment + 0.01 * moment.diagonal().mean() * torch.eye(150)
    expected = obq(target, scales, values, H)
    actual = round_with_feedback(target, scales, values, Feedback.of(moment, 0.01))
    assert torch.equal(actual.long(), expected)
    nearest = (target[..., None] / scales[..., None] - values).abs().argmin(-1)
    assert (actual != nearest).double().mean() > 0.2  # the errors did go somewhere


@pytest.mark.parametrize("quant", QUANTS, ids=str)
def test_an_update_survives(quant: QuantConfig) -> None:
    """Rounding to the nearest gives the base back; with feedback the layer computes what the update was for."""
    base = quantize_weight(0.1 * torch.randn(48, 192, generator=torch.Generator().manual_seed(0)), quant)
    dense = dequantize_weight(base, torch.float32)
    inputs, held_out = correlated_inputs(700, 192).split([600, 100])
    target = dense + small_update(dense, inputs)
    scales = block_scales(base.quant_state).repeat_interleave(quant.block_size).view(48, 192)
    values = torch.tensor(reference.TABLES[quant.quant_type]) * scales[..., None]
    plain = values.gather(-1, (values - target[..., None]).abs().argmin(-1, keepdim=True))[..., 0]
    assert (plain == dense).float().mean() > 0.9
    result = requantize(target, base, inputs.T @ inputs / len(inputs))
    error = output_error(dequantize_weight(result, torch.float32), target, held_out)
    assert error < 0.1 * output_error(plain, target, held_out)


def test_never_worse_than_rounding_to_the_nearest() -> None:
    """Of an update that the inputs hardly see and feedback would bury in noise: output by output, the better."""
    base = quantize_weight(0.1 * torch.randn(48, 192, generator=torch.Generator().manual_seed(0)), QuantConfig())
    dense, inputs = dequantize_weight(base, torch.float32), correlated_inputs(600, 192)
    target = dense + 0.002 * torch.randn(48, 192, generator=torch.Generator().manual_seed(1))
    moment = inputs.T @ inputs / len(inputs)
    result = dequantize_weight(requantize(target, base, moment), torch.float32)
    scales = block_scales(base.quant_state).repeat_interleave(64).view(48, 192)
    values = torch.tensor(reference.NF4)
    fed_back = values[round_with_feedback(target, scales, values, Feedback.of(moment, DAMPING)).int()] * scales
    nearest = values[(target[..., None] - values * scales[..., None]).abs().argmin(-1)] * scales
    errors = [((weight - target) @ inputs.T).square().sum(1) for weight in (result, fed_back, nearest)]
    assert (errors[0] <= torch.minimum(errors[1], errors[2]) * 1.001).all()
    assert (errors[1] < errors[2]).any() and (errors[1] > errors[2]).any()  # one or the other


@pytest.mark.parametrize("quant", QUANTS, ids=str)
@pytest.mark.parametrize("shape", [(16, 128), (5, 48), (3, 75)], ids=str)
def test_on_the_grid_of_the_base(quant: QuantConfig, shape: tuple[int, int]) -> None:
    """Each new weight is a table value times the base's own scale, as it is dequantized; nothing else changes.
    Rows of any length: blocks run over the flattened weight, whose number of codes may be odd."""
    base = quantize_weight(0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(2)), quant)
    dense = dequantize_weight(base, torch.float32)
    before = base.data.clone()
    inputs = correlated_inputs(300, shape[1])
    result = requantize(dense + small_update(dense, inputs), base, inputs.T @ inputs / len(inputs))
    assert torch.equal(base.data, before) and not torch.equal(result.data, before)
    assert result.data.shape == base.data.shape and result.quant_state.shape == shape
    assert torch.equal(block_scales(result.quant_state), block_scales(base.quant_state))
    assert torch.equal(result.quant_state.absmax, base.quant_state.absmax)
    stored = reference.dequantize(result)
    assert torch.equal(dequantize_weight(result, torch.float32), stored)
    scales = reference.dequantize_scales(base.quant_state).repeat_interleave(quant.block_size)[: stored.numel()]
    values = torch.tensor(reference.TABLES[quant.quant_type]) * scales.view(*shape, 1)
    assert ((stored[..., None] - values).abs().amin(-1) == 0).all()


def test_an_update_that_outgrows_the_scales() -> None:
    """As large as the weights themselves: new scales, and the error of any 4-bit weight, not of a cut one."""
    base = quantize_weight(0.1 * torch.randn(48, 192, generator=torch.Generator().manual_seed(0)), QuantConfig())
    target = 0.3 * torch.randn(48, 192, generator=torch.Generator().manual_seed(1))
    result = dequantize_weight(requantize(target, base, torch.eye(192)), torch.float32)
    assert relative_error(result, target) < 0.11  # 0.09 for Gaussian weights in NF4
    assert dequantize_weight(base, torch.float32).abs().max() < 0.8 * target.abs().max()


@pytest.mark.parametrize("quant", QUANTS, ids=str)
def test_no_update_changes_nothing(quant: QuantConfig) -> None:
    base = quantize_weight(0.1 * torch.randn(24, 96, generator=torch.Generator().manual_seed(3)), quant)
    inputs = correlated_inputs(300, 96)
    dense = dequantize_weight(base, torch.float32)
    result = requantize(dense, base, inputs.T @ inputs / len(inputs))
    assert torch.equal(dequantize_weight(result, torch.float32), dense)
    if quant.quant_type == "nf4":  # FP4 has two codes for zero
        assert torch.equal(result.data, base.data)


@pytest.mark.parametrize(
    "moment", [torch.zeros(64, 64), torch.ones(64, 64), 1e-30 * torch.eye(64)], ids="none one tiny".split()
)
def test_inputs_that_say_little(moment: Tensor) -> None:
    """No inputs at all, one direction only, tiny ones: the result is finite and no worse than a grid step."""
    base = quantize_weight(0.1 * torch.randn(8, 64, generator=torch.Generator().manual_seed(4)), QuantConfig())
    dense = dequantize_weight(base, torch.float32)
    result = dequantize_weight(requantize(dense + 0.001, base, moment), torch.float32)
    assert result.isfinite().all() and relative_error(result, dense) < 0.5
    if not moment[0, 1]:  # nothing to make up for an error with: plain rounding
        assert torch.equal(result, dense)


def test_inputs_that_are_not_finite() -> None:
    """No damping mends them: the search for one went on for ever."""
    base = quantize_weight(torch.randn(4, 64, generator=torch.Generator().manual_seed(0)), QuantConfig())
    with pytest.raises(InputError, match="not finite on the calibration texts"):
        requantize(torch.ones(4, 64), base, torch.full((64, 64), torch.nan))


def test_a_block_of_zeros() -> None:
    """Its scale is zero, and so is every weight that its codes can say."""
    weight = 0.1 * torch.randn(4, 128, generator=torch.Generator().manual_seed(6))
    weight[1, :64] = 0
    base = quantize_weight(weight, QuantConfig(double_quant=False))
    inputs = correlated_inputs(300, 128)
    dense = dequantize_weight(base, torch.float32)
    target = dense + small_update(dense, inputs) * (weight != 0)
    result = dequantize_weight(requantize(target, base, inputs.T @ inputs), torch.float32)
    assert result.isfinite().all() and not result[1, :64].any() and result[1, 64:].any()


def test_input_moments(tmp_path: Path) -> None:
    """E x^T x of what each layer is called with, whatever fits into memory at a time; no hook stays."""
    network = load_base_model(str(save_tiny_llama(tmp_path / "llama")), compute_dtype="float32", cache=False)
    texts = [[5, 6, 7, 8, 9], [30, 31], [77, 12, 60]]
    layers = [name for name in linear_layers(network) if name.endswith(("q_proj", "down_proj"))]
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    handles = [
        network.get_submodule(name).register_forward_hook(lambda _m, args, _y, n=name: seen[n].append(args[0][0]))
        for name in layers
    ]
    with torch.no_grad():
        for ids in texts:
            network(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    for limit, runs in ((2**30, 1), (4 * 64**2, len(layers))):
        calls: list[int] = []
        counter = network.model.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        found = list(input_moments(network, layers, texts, limit))
        counter.remove()
        assert [name for name, _ in found] == layers and len(calls) == runs * len(texts)
        for name, moment in found:
            x = torch.cat(seen[name]).double()
            assert len(x) == 10 and relative_error(moment, x.T @ x / 10) < 1e-6
    hooked = {name for name, module in network.named_modules() if module._forward_pre_hooks}
    assert hooked == {"model.embed_tokens"}, "the loader's own check of token ids"


@pytest.mark.parametrize("quant", QUANTS, ids=str)
def test_scales_that_clip(quant: QuantConfig) -> None:
    """Block by block the best of the factors, by the weighted error of the nearest codes, in plain loops."""
    generator = torch.Generator().manual_seed(2)
    target = 0.1 * torch.randn(6, 256, generator=generator)
    importance = 0.1 + torch.rand(256, generator=generator)
    base = quantize_weight(target, quant)
    table, size = torch.tensor(reference.TABLES[quant.quant_type]), quant.block_size
    expected, before = [], block_scales(base.quant_state)
    for number, block in enumerate(target.view(-1, size)):
        weights = importance[number * size % 256 :][:size]
        levels = [before[number] * factor * table for factor in FACTORS]
        errors = [((block[:, None] - level).abs().amin(1).square() * weights).sum() for level in levels]
        expected.append(before[number] * FACTORS[int(torch.stack(errors).argmin())])
    result = rescaled(target, base, importance)
    assert torch.equal(result.data, base.data) and quantization_of(result) == quant
    assert relative_error(block_scales(result.quant_state), torch.stack(expected)) < (
        0.02 if quant.double_quant else 1e-6
    )
    assert (torch.stack(expected) < before).double().mean() > 0.5
    ragged = quantize_weight(target[:, :75], quant)
    assert rescaled(target[:, :75], ragged, importance[:75]) is ragged


def test_slabs_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs are independent: pieces of a weight give the codes of the whole."""
    inputs = correlated_inputs(600, 192)
    target = 0.1 * torch.randn(48, 192, generator=torch.Generator().manual_seed(0))
    base, feedback = quantize_weight(target, QuantConfig()), Feedback.of(inputs.T @ inputs / 600, 0.1)
    whole = choose_codes(target, base, feedback, inputs)
    monkeypatch.setattr("qlora.quant.gptq.SLAB", 10 * 192)
    pieces = choose_codes(target, base, feedback, inputs)
    assert whole is not None and pieces is not None and torch.equal(whole.data, pieces.data)
