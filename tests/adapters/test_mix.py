"""adapters/mix.py: against dense sums in fp64, against PEFT's add_weighted_adapter, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora.adapters.load import load_adapter
from qlora.adapters.mix import (
    Factors,
    add,
    distance,
    mix,
    mix_adapters,
    saved_factors,
    subtract,
    truncate,
    update_norm,
)
from qlora.adapters.model import get_lora_model
from qlora.adapters.peft_files import read_adapter
from qlora.cli.main import main
from qlora.config.lora import LoRAConfig
from qlora.model.load import load_base_model
from qlora.system.errors import InputError
from qlora.system.file_names import CONFIG, WEIGHTS
from tests.models import save_tiny_llama
from tests.reference import relative_error

IDS = torch.arange(3, 27)[None]
FACTOR_TOLERANCE = 3e-7  # fp32 factors: each is rounded at most twice, 2^-24 each time
FP32_TOLERANCE = 1e-5  # two layers of fp32 products of up to 160 terms, summed in another order

# layer -> (outputs, inputs): wide, tall, square
SHAPES = {"q": (24, 40), "v": (40, 24), "o": (32, 32), "down": (16, 48)}


def random_factors(ranks: dict[str, int], seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return {
        layer: (
            torch.randn(rank, SHAPES[layer][1], generator=generator),
            torch.randn(SHAPES[layer][0], rank, generator=generator),
        )
        for layer, rank in ranks.items()
    }


def dense(factors: Factors) -> dict[str, Tensor]:
    return {layer: B.double() @ A.double() for layer, (A, B) in factors.items()}


def dense_sum(adapters: list[Factors], weights: list[float]) -> dict[str, Tensor]:
    """The slow, obvious version: every update written out in fp64."""
    total: dict[str, Tensor] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for layer, update in dense(adapter).items():
            total[layer] = total.get(layer, torch.zeros(SHAPES[layer], dtype=torch.float64)) + weight * update
    return total


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys() and expected
    for layer in expected:
        assert relative_error(actual[layer], expected[layer]) < tolerance, layer


# Ranks that differ between adapters and layers, and layers that not all of them have.
ADAPTERS = [
    random_factors({"q": 4, "v": 4}, seed=1),
    random_factors({"q": 2, "o": 3}, seed=2),
    random_factors({"v": 1, "o": 5, "down": 4, "q": 4}, seed=3),
]
NUMBERS = [0.7, -0.3, 2.0]


# ---- against dense sums -----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3])
def test_cat_is_the_weighted_sum(count: int) -> None:
    adapters, weights = ADAPTERS[:count], NUMBERS[:count]
    mixed = mix(adapters, weights)
    assert_equal(dense(mixed), dense_sum(adapters, weights), FACTOR_TOLERANCE)
    for layer, (A, B) in mixed.items():
        assert A.shape[0] == B.shape[1] == sum(a[layer][0].shape[0] for a in adapters if layer in a)


def test_add_and_subtract() -> None:
    first, second = ADAPTERS[0], ADAPTERS[2]
    assert_equal(dense(add(first, second)), dense_sum([first, second], [1, 1]), FACTOR_TOLERANCE)
    assert_equal(dense(subtract(first, second)), dense_sum([first, second], [1, -1]), FACTOR_TOLERANCE)
    back = subtract(add(first, second), second)
    for layer in first:
        assert relative_error(dense(back)[layer], dense(first)[layer]) < 10 * FACTOR_TOLERANCE
    assert update_norm(subtract(first, first)) < FACTOR_TOLERANCE * update_norm(first) > 0


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_svd_is_the_nearest_of_its_rank(rank: int) -> None:
    """Against the SVD of the dense sum: the same matrix, and the error that Eckart and Young allow."""
    mixed = mix(ADAPTERS, NUMBERS, "svd", rank)
    expected, lost, total = {}, 0.0, 0.0
    for layer, update in dense_sum(ADAPTERS, NUMBERS).items():
        U, S, V = torch.linalg.svd(update, full_matrices=False)
        expected[layer] = U[:, :rank] * S[:rank] @ V[:rank]
        lost += S[rank:].square().sum().item()
        total += S.square().sum().item()
    assert_equal(dense(mixed), expected, 1e-6)  # the factors are rounded, singular vectors turn with them
    assert {A.shape[0] for A, _ in mixed.values()} <= set(range(1, rank + 1))
    assert lost > 1e-3 * total  # not only rounding
    assert distance(mixed, mix(ADAPTERS, NUMBERS)) == pytest.approx((lost / total) ** 0.5, rel=1e-5)


def test_svd_of_a_sufficient_rank_is_exact() -> None:
    """No more rank than the sum has, and nothing lost; without a rank, the largest one of the adapters."""
    mixed = mix(ADAPTERS, NUMBERS, "svd", 100)
    assert_equal(dense(mixed), dense_sum(ADAPTERS, NUMBERS), 1e-6)
    assert {layer: A.shape[0] for layer, (A, _) in mixed.items()} == {"q": 10, "v": 5, "o": 8, "down": 4}
    assert {A.shape[0] for A, _ in mix(ADAPTERS, NUMBERS, "svd").values()} == {5, 4}


def test_svd_of_nothing() -> None:
    """The sum of an adapter and its negative has no directions to prefer."""
    mixed = mix([ADAPTERS[0], ADAPTERS[0]], [1.0, -1.0], "svd")
    assert update_norm(mixed) < FACTOR_TOLERANCE * update_norm(ADAPTERS[0])
    assert all(factor.isfinite().all() for factors in mixed.values() for factor in factors)


def test_truncate_shares_singular_values_evenly() -> None:
    for A, B in truncate(ADAPTERS[2], 2).values():
        assert torch.allclose(A.norm(dim=1), B.norm(dim=0), rtol=1e-5)


def test_linear_is_not_the_sum() -> None:
    """Written out: sums of factors, and with two adapters the products B_1 A_2 and B_2 A_1 beside the sum."""
    first, second = random_factors({"q": 3, "v": 2}, 5), random_factors({"q": 3, "o": 4}, 6)
    mixed = mix([first, second], [0.25, -4.0], "linear")
    (A1, B1), (A2, B2) = first["q"], second["q"]
    expected = (0.5 * B1 + 2 * B2).double() @ (0.5 * A1 - 2 * A2).double()
    assert relative_error(dense(mixed)["q"], expected) < FACTOR_TOLERANCE
    exact = dense_sum([first, second], [0.25, -4.0])
    crossed = -1.0 * B1.double() @ A2.double() + B2.double() @ A1.double()
    assert relative_error(dense(mixed)["q"], exact["q"] + crossed) < FACTOR_TOLERANCE
    for layer in ("v", "o"):  # only one adapter is there: nothing to cross
        assert relative_error(dense(mixed)[layer], exact[layer]) < FACTOR_TOLERANCE


def test_norm_and_distance() -> None:
    update = torch.cat([tensor.flatten() for tensor in dense(ADAPTERS[2]).values()])
    assert update_norm(ADAPTERS[2]) == pytest.approx(update.norm().item())
    doubled = mix([ADAPTERS[2]], [3.0])
    assert distance(doubled, ADAPTERS[2]) == pytest.approx(2.0, rel=1e-6)
    assert distance(ADAPTERS[2], ADAPTERS[2]) < 1e-7


# ---- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapters", "weights", "options", "message"),
    [
        ([], [], {}, "0 weights for 0 adapters"),
        (ADAPTERS[:2], [1.0], {}, "1 weights for 2 adapters"),
        (ADAPTERS[:2], [1.0, float("nan")], {}, "weights are 1.0, nan"),
        (ADAPTERS[:2], [1.0, 1.0], {"method": "ties"}, "'ties'; choose cat, svd or linear"),
        (ADAPTERS[:2], [1.0, 1.0], {"rank": 4}, "rank is 4 with cat; only svd"),
        (ADAPTERS[:2], [1.0, 1.0], {"method": "svd", "rank": 0}, "rank is 0 with svd"),
        (ADAPTERS[:2], [1.0, 1.0], {"method": "linear"}, "q has the ranks 2 and 4.*of one rank under linear"),
    ],
)
def test_refused(adapters: list[Factors], weights: list[float], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        mix(adapters, weights, **options)


def test_every_mismatch_at_once() -> None:
    other = random_factors({"q": 2, "v": 2, "o": 3}, 9)
    other["q"] = (other["q"][0][:, :8], other["q"][1])
    other["v"][1][0, 0] = torch.inf
    with pytest.raises(InputError, match=r"q is \(24, 8\) and \(24, 40\); v holds NaN or infinity; mix adapters"):
        mix([ADAPTERS[0], other], [1.0, 1.0])


# ---- adapters on disk, and PEFT ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "llama")


def save_ours(llama: Path, directory: Path, seed: int, **settings: Any) -> Path:
    config = LoRAConfig(**{"rank": 4, "alpha": 6.0, "adapter_dtype": "float32", **settings})
    network = load_base_model(str(llama), compute_dtype="float32", cache=False)
    model = get_lora_model(network, config, base_name=str(llama))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.lora_parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    model.save(directory)
    return directory


@pytest.fixture(scope="module")
def pair(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Other layers, ranks, alphas and kinds of scaling; layers that both have, and layers that one has."""
    folder = tmp_path_factory.mktemp("pair")
    first = save_ours(llama, folder / "A", 1)
    second = save_ours(
        llama,
        folder / "B",
        2,
        use_rslora=True,
        rank=6,
        target_modules="v_proj,down_proj",
        rank_pattern="down_proj=3",
    )
    return [str(first), str(second)]


def edit(directory: Path | str, **values: Any) -> None:
    file = Path(directory) / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits


def dense_base(llama: Path) -> Any:
    """transformers' own model, in fp32, with the weights of a 16-bit base of ours."""
    ours = load_base_model(str(llama), use_4bit=False, compute_dtype="float32", cache=False)
    twin = AutoModelForCausalLM.from_pretrained(llama, attn_implementation="eager")
    twin.load_state_dict({name: value.float() for name, value in ours.state_dict().items()})
    return twin.eval()


@torch.no_grad()
def logits_of_sum(llama: Path, directories: list[str], weights: list[float]) -> Tensor:
    """A dense model with W + sum w_i s_i B_i A_i, each read off the files by hand."""
    network = dense_base(llama)
    for directory, weight in zip(directories, weights, strict=True):
        description, state = (
            json.loads((Path(directory) / CONFIG).read_text()),
            load_file(f"{directory}/{WEIGHTS}"),
        )
        for key in state:
            if key.endswith("lora_A.weight"):
                A, B = state[key], state[key.replace("lora_A", "lora_B")]
                rank = A.shape[0]
                scale = description["lora_alpha"] / (rank**0.5 if description["use_rslora"] else rank)
                name = key.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
                network.get_parameter(name).data += weight * scale * (B @ A)
    return logits(network)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, -0.3)])
def test_written_mix_loads_here_and_in_peft(
    llama: Path, pair: list[str], tmp_path: Path, weights: tuple[float, ...]
) -> None:
    """Weights 1, 1 are a stack: both active at once."""
    from peft import PeftModel

    assert mix_adapters(pair, weights, str(tmp_path / "mixed")) < FACTOR_TOLERANCE
    expected = logits_of_sum(llama, pair, list(weights))
    ours = load_base_model(str(llama), use_4bit=False, compute_dtype="float32", cache=False)
    plain = logits(ours)
    load_adapter(ours, tmp_path / "mixed")
    theirs = PeftModel.from_pretrained(dense_base(llama), tmp_path / "mixed").eval()
    assert relative_error(logits(ours), expected) < FP32_TOLERANCE
    assert relative_error(logits(theirs), expected) < FP32_TOLERANCE
    assert relative_error(plain, expected) > 0.01


def test_what_is_written(llama: Path, pair: list[str], tmp_path: Path) -> None:
    """Base and its quantization travel along; ranks that differ are a pattern, and alpha = rank everywhere."""
    mix_adapters(pair, [1.0, 1.0], str(tmp_path / "mixed"))
    saved = read_adapter(tmp_path / "mixed")
    assert saved.description["base_model_name_or_path"] == str(llama)
    with safe_open(tmp_path / "mixed" / WEIGHTS, "pt") as new, safe_open(Path(pair[0]) / WEIGHTS, "pt") as old:
        assert new.metadata() == old.metadata() and "nf4" in new.metadata()["base_quantization"]
    ranks = {layer.rpartition(".")[2]: saved.config.rank_of(layer) for layer in saved.adapted_layers}
    assert ranks == {"q_proj": 4, "v_proj": 10, "down_proj": 3}
    assert {saved.config.scaling_of(layer, saved.config.rank_of(layer)) for layer in saved.adapted_layers} == {1.0}


def test_transposed_layers_stay_marked(pair: list[str], tmp_path: Path) -> None:
    """GPT-2's Conv1D: PEFT wants to be told."""
    transposed = shutil.copytree(pair[0], tmp_path / "transposed")
    edit(transposed, fan_in_fan_out=True)
    for directory, marked in ((pair[0], False), (str(transposed), True)):
        mix_adapters([directory], [0.5], str(tmp_path / str(marked)))
        assert read_adapter(tmp_path / str(marked)).description["fan_in_fan_out"] is marked


def test_subtracting_an_adapter_from_itself_gives_the_base(llama: Path, pair: list[str], tmp_path: Path) -> None:
    mix_adapters([pair[1], pair[1]], [1.0, -1.0], str(tmp_path / "zero"))
    network = load_base_model(str(llama), compute_dtype="float32", cache=False)
    plain = logits(network)
    load_adapter(network, tmp_path / "zero")
    assert relative_error(logits(network), plain) < FP32_TOLERANCE


@pytest.mark.parametrize("weights", [[0.7, 0.3], [1.0, -0.5]])
@pytest.mark.parametrize("method", ["cat", "svd", "linear"])
def test_against_peft(llama: Path, tmp_path: Path, method: Any, weights: list[float]) -> None:
    """Their mix of two adapters of theirs, and ours of the files they save: the same updates."""
    from peft import LoraConfig, get_peft_model

    settings = dict(r=4, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(llama), LoraConfig(lora_alpha=6, **settings), "one"
    )
    model.add_adapter("two", LoraConfig(lora_alpha=20, **{**settings, "target_modules": ["v_proj", "o_proj"]}))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path)
    options = {"svd_rank": 3} if method == "svd" else {}
    model.add_weighted_adapter(["one", "two"], weights, "mix", combination_type=method, **options)
    adapters = [saved_factors(read_adapter(tmp_path / name)) for name in ("one", "two")]
    ours = dense(mix(adapters, weights, method, 3 if method == "svd" else None))
    theirs = {
        name.removeprefix("base_model.model."): layer.get_delta_weight("mix").detach()
        for name, layer in model.named_modules()
        if "mix" in getattr(layer, "lora_A", ())
    }
    assert len(theirs) == 6
    assert_equal(ours, theirs, 1e-5)  # theirs is an fp32 SVD of an fp32 product


@pytest.mark.parametrize("setting", [{"use_dora": True}, {"modules_to_save": "lm_head"}])
def test_no_low_rank_sum(llama: Path, pair: list[str], tmp_path: Path, setting: dict[str, Any]) -> None:
    other = save_ours(llama, tmp_path / "other", 3, **setting)
    with pytest.raises(InputError, match="which no low-rank update expresses; merge it into its base"):
        mix_adapters([pair[0], str(other)], [1.0, 1.0], str(tmp_path / "mixed"))
    assert not (tmp_path / "mixed").exists()


def test_another_base(llama: Path, pair: list[str], tmp_path: Path) -> None:
    """By its name, and by how it was quantized."""
    other = save_ours(llama, tmp_path / "other", 3)
    edit(other, base_model_name_or_path="somebody/else")
    with pytest.raises(InputError, match=r"more than one base .*llama.*somebody/else"):
        mix_adapters([pair[0], str(other)], [1.0, 1.0], str(tmp_path / "mixed"))
    edit(other, base_model_name_or_path="/elsewhere/llama")
    save_file(load_file(other / WEIGHTS), other / WEIGHTS, {"base_quantization": "null"})
    with pytest.raises(InputError, match=r"more than one quantization of the base .*nf4.*null"):
        mix_adapters([pair[0], str(other)], [1.0, 1.0], str(tmp_path / "mixed"))
    save_file(load_file(other / WEIGHTS), other / WEIGHTS)  # as other tools write it: nothing said
    mix_adapters([pair[0], str(other)], [1.0, 1.0], str(tmp_path / "mixed"))


def test_damaged_files(llama: Path, tmp_path: Path) -> None:
    """Without the base: what is missing, and shapes that are of no rank, all at once."""
    other = save_ours(llama, tmp_path / "other", 3)
    state = load_file(other / WEIGHTS)
    first, second, third, *_ = sorted(key for key in state if "lora_B" in key)
    del state[first]
    state[second], state[third] = torch.ones(64, 5), torch.ones(64)
    save_file(state, other / WEIGHTS)
    with pytest.raises(InputError, match=r"is damaged: missing .*q_proj.lora_B.weight; .*\(64, 5\).*; .*\(64,\)"):
        mix_adapters([str(other)], [1.0], str(tmp_path / "mixed"))


# ---- the command line -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "printed"),
    [
        (["--weights", "0.7", "-0.3"], "the exact weighted sum"),
        (["--method", "svd", "--rank", "2"], "of the norm of the weighted sum kept"),
    ],
)
def test_command(pair: list[str], tmp_path: Path, capsys: Any, flags: list[str], printed: str) -> None:
    main(["mix", "--adapters", *pair, *flags, "--output-dir", str(tmp_path / "mixed")])
    assert printed in capsys.readouterr().out
    options = {"method": "svd", "rank": 2} if "svd" in flags else {}
    expected = mix(
        [saved_factors(read_adapter(one)) for one in pair], [0.7, -0.3] if not options else [1, 1], **options
    )
    assert distance(saved_factors(read_adapter(tmp_path / "mixed")), expected) < FACTOR_TOLERANCE
    with pytest.raises(InputError, match="exists already"):
        main(["mix", "--adapters", *pair, "--output-dir", str(tmp_path / "mixed")])


def test_command_says_what_linear_is(llama: Path, pair: list[str], tmp_path: Path, capsys: Any) -> None:
    other = str(save_ours(llama, tmp_path / "other", 3))
    main(["mix", "--adapters", pair[0], other, "--method", "linear", "--output-dir", str(tmp_path / "mixed")])
    assert "which differs from the weighted sum by" in capsys.readouterr().out


def test_command_without_adapters() -> None:
    with pytest.raises(InputError, match="pass --adapters"):
        main(["mix"])
