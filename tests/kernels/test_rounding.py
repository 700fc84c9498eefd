"""kernels/rounding.py: GPTQ's inner loop in C against the same in torch."""

from __future__ import annotations

import pytest
import torch

from qlora.kernels.rounding import round_group
from qlora.quant.gptq import round_group_plainly
from tests import reference

VALUES = torch.tensor(reference.NF4)


@pytest.mark.parametrize("group", [1, 5, 64])
@pytest.mark.parametrize("outputs", [1, 63, 64, 130])
def test_against_torch(group: int, outputs: int) -> None:
    """Codes, errors and the feedback left in the weight, for a part of a larger U and over odd sizes."""
    generator = torch.Generator().manual_seed(0)
    weight, scales = (
        torch.randn(group, outputs, generator=generator),
        1 + torch.rand(group, outputs, generator=generator),
    )
    U = torch.randn(group + 3, group + 3, generator=generator).triu() * 0.1 + torch.eye(group + 3)
    ours, theirs = weight.clone(), weight.clone()
    found = round_group(ours, scales, U[:group, :group], VALUES)
    if found is None:
        pytest.skip("no C compiler")
    codes, errors = round_group_plainly(theirs, scales, U[:group, :group], VALUES)
    same = found[0] == codes
    assert same.double().mean() > 0.995  # but for near ties: C fuses products and sums
    columns = same.all(0)
    torch.testing.assert_close(found[1][:, columns], errors[:, columns], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours[:, columns], theirs[:, columns], atol=1e-4, rtol=1e-4)


def test_what_does_not_fit_is_refused() -> None:
    weight, scales, U = torch.randn(4, 8), torch.ones(4, 8), torch.eye(4)
    if round_group(weight.clone(), scales, U, VALUES) is None:
        pytest.skip("no C compiler")
    for wrong in (
        (weight, scales[:3], U, VALUES),
        (weight, scales, torch.eye(5), VALUES),
        (weight, scales, U, VALUES[:9]),
    ):
        with pytest.raises(ValueError, match="does not fit"):
            round_group(*wrong)
    assert round_group(weight.double(), scales, U, VALUES) is None
    assert round_group(weight, scales, torch.eye(8)[:, ::2][:4], VALUES) is None
