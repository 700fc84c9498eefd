"""What makes two runs the same: their data and their base."""

from __future__ import annotations

from pathlib import Path

from qlora.model.load import load_base_model
from qlora.training.fingerprint import base_fingerprint, data_fingerprint
from tests.models import save_tiny_llama
from tests.training.test_checkpoint import adapted
from tests.training.test_loop import make_examples


def test_the_data_fingerprint_sees_content_masks_and_order() -> None:
    examples = make_examples(4)
    same, reordered = data_fingerprint(make_examples(4)), data_fingerprint(examples[::-1])
    masked = make_examples(4)
    masked[0].targets[-1] = -100
    assert data_fingerprint(examples) == same
    assert len({same, reordered, data_fingerprint(masked)}) == 3


def test_the_base_fingerprint_sees_weights_and_quantization_but_not_the_adapter(tmp_path: Path) -> None:
    from qlora.quant.weight import QuantConfig

    one, other = (str(save_tiny_llama(tmp_path / str(seed), seed=seed)) for seed in (0, 1))
    base = base_fingerprint(adapted(one, seed=1))
    assert base_fingerprint(adapted(one, seed=2)) == base
    assert base_fingerprint(load_base_model(one, compute_dtype="float32", cache=False)) != ""
    changed = {
        base_fingerprint(adapted(other)),
        base_fingerprint(load_base_model(one, quant=QuantConfig("fp4", True), cache=False)),
        base_fingerprint(load_base_model(one, quant=QuantConfig("nf4", False), cache=False)),
        base_fingerprint(load_base_model(one, use_4bit=False, cache=False)),
    }
    assert len(changed | {base}) == 5
