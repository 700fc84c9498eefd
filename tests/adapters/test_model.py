"""adapters/model.py: the life of a LoRAModel with one adapter and with several."""

from __future__ import annotations

import copy
import json
import tracemalloc
import weakref
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora.adapters.load import load_adapter
from qlora.adapters.mix import mix_adapters
from qlora.adapters.model import LoRAModel, get_lora_model
from qlora.adapters.peft_files import save_adapter
from qlora.config.lora import LoRAConfig
from qlora.lora.adapter import inject_lora, lora_layers
from qlora.lora.trainable import freeze_base, unfreeze
from qlora.model.load import load_base_model
from qlora.system.errors import InputError
from qlora.system.file_names import CONFIG, WEIGHTS
from tests.adapters.test_peft_files import adapted, logits, randomize
from tests.models import save_tiny_llama
from tests.reference import relative_error

IDS = torch.arange(3, 27)[None]
FP32_TOLERANCE = 1e-5  # two layers of fp32 products of up to 160 terms, summed in another order


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "llama")


def base(directory: Path, use_4bit: bool = True) -> Any:
    return load_base_model(str(directory), use_4bit, compute_dtype="float32", cache=False)


@pytest.fixture
def saved(llama: Path, tmp_path: Path) -> Path:
    adapted(llama).save(tmp_path / "saved")
    return tmp_path / "saved"


def damage(directory: Path) -> None:
    """One tensor missing, one not a number, another alpha."""
    state = load_file(directory / WEIGHTS)
    first, second, *_ = sorted(state)
    del state[first]
    state[second][0, 0] = torch.nan
    save_file(state, directory / WEIGHTS)
    description = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps({**description, "lora_alpha": 77.0}))


def assert_same_files(actual: Path, expected: Path) -> None:
    assert sorted(path.name for path in actual.iterdir()) == [CONFIG, WEIGHTS] and load_file(actual / WEIGHTS)
    assert all((actual / name).read_bytes() == (expected / name).read_bytes() for name in (CONFIG, WEIGHTS))


# ---- one adapter ------------------------------------------------------------------------------------------


def test_defaults(llama: Path) -> None:
    """q_proj and v_proj of every layer, rank 8, B zero: the adapted model is the base until it trains."""
    plain = logits(base(llama))
    model = get_lora_model(base(llama))
    assert isinstance(model, LoRAModel)
    assert {name.rpartition(".")[2] for name in lora_layers(model)} == {"q_proj", "v_proj"}
    assert torch.equal(logits(model), plain)
    assert {p.dtype for p in model.lora_parameters()} == {torch.bfloat16}


def test_what_trains(llama: Path) -> None:
    """Adapters alone, each once: 2 layers x (q: 64 + 64, v: 64 + 32 wide) x rank 4 = 1792 numbers."""
    model = adapted(llama)
    trainable = list(model.trainable_parameters())
    assert {id(p) for p in trainable} == {id(p) for p in model.lora_parameters()}
    assert sum(p.numel() for p in trainable) == 2 * 4 * (64 + 64 + 64 + 32) == 1792
    names = dict(model.named_parameters())
    assert len(list(model.parameters())) == len(names) > len(trainable)
    assert {name for name, p in names.items() if p.requires_grad} == {n for n in names if ".lora_" in n}
    summary = model.summary()
    assert (summary.trainable, summary.adapted_layers) == (1792, 4)
    assert summary.total == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(llama).parameters()) + 1792
    assert str(summary).startswith(f"1,792 trainable of {summary.total:,} parameters (")


def test_it_learns(llama: Path) -> None:
    """A few steps lower the loss and move no byte of the base."""
    model = get_lora_model(base(llama), LoRAConfig(target_modules="all-linear", adapter_dtype="float32")).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    after = dict(model.named_parameters())
    assert before and all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_life_cycle(llama: Path, tmp_path: Path) -> None:
    """save, change, load, merge, unmerge: each leaves the logits it should."""
    model = adapted(llama)
    first = logits(model)
    model.save(tmp_path / "adapter")
    randomize(model, seed=3)
    second = logits(model)
    assert relative_error(second, first) > 0.01
    assert not model.is_merged
    model.merge()
    assert model.is_merged and relative_error(logits(model), second) < FP32_TOLERANCE
    model.unmerge()
    assert not model.is_merged and torch.equal(logits(model), second)
    model.load(tmp_path / "adapter")
    assert torch.equal(logits(model), first)
    tokens = model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert tokens.shape[1] > IDS.shape[1] and torch.equal(tokens[:, : IDS.shape[1]], IDS)


def test_load_takes_over_alpha(llama: Path, tmp_path: Path) -> None:
    model, other = adapted(llama, alpha=32.0), adapted(llama, alpha=4.0)
    model.save(tmp_path / "adapter")
    other.load(tmp_path / "adapter")
    assert torch.equal(logits(other), logits(model))
    other.save(tmp_path / "again")
    assert json.loads((tmp_path / "again" / CONFIG).read_text())["lora_alpha"] == 32.0


def test_load_checks_everything_first(llama: Path, saved: Path) -> None:
    model = adapted(llama)
    before, alpha = logits(model), model.lora_config.alpha
    damage(saved)
    with pytest.raises(InputError, match="NaN"):
        model.load(saved)
    assert torch.equal(logits(model), before) and model.lora_config.alpha == alpha


def test_load_while_merged(llama: Path, saved: Path) -> None:
    """The dense weights would stay the old adapter's: an error, by either way of loading."""
    model = adapted(llama)
    model.merge()
    with pytest.raises(RuntimeError, match="merged; call unmerge"):
        model.load(saved)
    with pytest.raises((RuntimeError, InputError), match="merged"):
        load_adapter(model.model, saved)


def test_save_while_merged(llama: Path, tmp_path: Path) -> None:
    """The adapter is still there to be saved, unchanged."""
    model = adapted(llama)
    model.save(tmp_path / "before")
    model.merge()
    model.save(tmp_path / "merged")
    assert_same_files(tmp_path / "merged", tmp_path / "before")


def test_training_while_merged_is_an_error(llama: Path) -> None:
    model = adapted(llama).train()
    model.merge()
    with pytest.raises(RuntimeError, match="cannot train; call unmerge"):
        model(IDS)


def test_a_second_adapter_is_refused(llama: Path) -> None:
    with pytest.raises(InputError, match="has LoRA layers already"):
        get_lora_model(adapted(llama).model)


def test_saved_by_functions_or_by_the_object(llama: Path, tmp_path: Path) -> None:
    """inject_lora + save_adapter and LoRAModel.save write the same files."""
    config = LoRAConfig(rank=4)
    network = base(llama)
    inject_lora(network, config, seed=11)
    freeze_base(network)
    save_adapter(network, tmp_path / "functions", config, "base")
    get_lora_model(base(llama), config, seed=11, base_name="base").save(tmp_path / "object")
    assert_same_files(tmp_path / "functions", tmp_path / "object")


# ---- several adapters -------------------------------------------------------------------------------------

# Of other layers, ranks and kinds; what trains in full beside them goes along.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "wide": {"target_modules": "all-linear", "rank": 2, "use_rslora": True, "alpha": 3.0},
    "dora": {"target_modules": "q_proj,down_proj", "use_dora": True},
    "patterns": {"layers": "1", "rank_pattern": "q_proj=7", "alpha_pattern": "q_proj=2"},
    "biases": {"bias": "all"},
    "embeddings": {"modules_to_save": "embed_tokens,lm_head"},
}


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose attention has biases, so that they can train."""
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "biased", attention_bias=True)


@pytest.fixture(scope="module")
def zoo(biased: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved adapter of each kind."""
    folder = tmp_path_factory.mktemp("zoo")
    for seed, (name, settings) in enumerate(KINDS.items()):
        model = adapted(biased, **settings)
        randomize(model, seed)
        model.save(folder / name)
    return {name: folder / name for name in KINDS}


@pytest.fixture
def crowd(biased: Path, zoo: dict[str, Path]) -> LoRAModel:
    """All of them on one base, none active."""
    model = LoRAModel(base(biased), base_name=str(biased)).eval()
    for name, directory in zoo.items():
        model.load_adapter(directory, name)
    return model


def learned(model: LoRAModel) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def test_each_computes_as_if_alone(biased: Path, zoo: dict[str, Path], crowd: LoRAModel) -> None:
    """Bit for bit, in any order, there and back, and the base is the base in between."""
    plain = logits(base(biased))
    alone = {}
    for name, directory in zoo.items():
        network = base(biased)
        load_adapter(network, directory)
        alone[name] = logits(network)
        assert relative_error(alone[name], plain) > 0.01, name
    assert crowd.adapters == list(KINDS) and crowd.active_adapter is None
    assert torch.equal(logits(crowd), plain)
    for name in [*KINDS, *reversed(KINDS), "dora", "embeddings", "biases", "plain"]:
        crowd.set_adapter(name)
        assert crowd.active_adapter == name
        assert torch.equal(logits(crowd), alone[name]), name
        with crowd.disable_adapter():
            assert crowd.active_adapter is None and torch.equal(logits(crowd), plain)
        assert torch.equal(logits(crowd), alone[name]), name
    crowd.set_adapter(None)
    assert torch.equal(logits(crowd), plain)


def test_only_the_active_one_trains(crowd: LoRAModel) -> None:
    """It alone is among the parameters and takes a gradient; the base's own stay frozen in every state."""
    assert not list(crowd.trainable_parameters()) and crowd.summary().trainable == 0
    for name in KINDS:
        crowd.set_adapter(name)
        active = {id(p) for p in crowd.lora_parameters()}
        assert active == {id(p) for p in crowd.trainable_parameters()} and active
        crowd.train()(IDS, labels=IDS).loss.backward()
        for other, adapter in crowd._adapters.items():
            own = [*(p for w in adapter.layers.values() for p in w.parameters()), *adapter.trained.values()]
            assert own and {p.requires_grad for p in own} == {other == name}
            assert all((p.grad is not None) == (other == name) for p in own), (name, other)
        crowd.zero_grad()
    crowd.set_adapter(None)
    assert not [n for n, p in crowd.named_parameters() if p.requires_grad]


def test_an_unfrozen_base_is_frozen(biased: Path) -> None:
    """The parameters too in whose place an adapter's copies are: they come back frozen."""
    network = base(biased, use_4bit=False)
    unfreeze(network)
    model = LoRAModel(network, LoRAConfig(modules_to_save="lm_head"))
    assert {id(p) for p in model.trainable_parameters()} == {id(p) for p in model.lora_parameters()}
    model.set_adapter(None)
    assert not list(model.trainable_parameters())


def train(model: LoRAModel, optimizer: torch.optim.Optimizer, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(3, 300, (1, 16), generator=generator)
    optimizer.zero_grad()
    model.train()(ids, labels=ids).loss.backward()
    optimizer.step()


def test_training_is_as_if_never_switched(biased: Path) -> None:
    """Two adapters trained by turns, with a question to the base in between: each as when trained by itself."""
    settings = {
        "first": LoRAConfig(rank=4, adapter_dtype="float32", modules_to_save="lm_head"),
        "second": LoRAConfig(
            rank=2, adapter_dtype="float32", target_modules="all-linear", bias="all", use_dora=True
        ),
    }
    alone = {}
    for name, config in settings.items():
        model = LoRAModel(base(biased), config, seed=5)
        optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=1e-2)
        for step in range(3):
            train(model, optimizer, step)
        alone[name] = learned(model)
    both, optimizers = LoRAModel(base(biased)), {}
    for name, config in settings.items():
        both.add_adapter(name, config, seed=5)
        both.set_adapter(name)
        optimizers[name] = torch.optim.AdamW(both.trainable_parameters(), lr=1e-2)
    for step in range(3):
        for name in settings:
            both.set_adapter(name)
            train(both, optimizers[name], step)
            with both.disable_adapter():
                logits(both)
    for name in settings:
        both.set_adapter(name)
        after = learned(both)
        assert after.keys() == alone[name].keys() and after
        assert all(torch.equal(after[key], value) for key, value in alone[name].items())


def test_switching_copies_and_allocates_nothing(crowd: LoRAModel) -> None:
    """No tensor moves, and memory does not grow with the number of switches."""

    def places() -> dict[str, list[int]]:
        base_tensors = [p.data_ptr() for p in crowd.parameters()]
        own = {
            name: [p.data_ptr() for w in adapter.layers.values() for p in w.parameters()]
            + [p.data_ptr() for p in adapter.trained.values()]
            for name, adapter in crowd._adapters.items()
        }
        return {**own, "base": base_tensors}

    def switch(times: int) -> None:
        for _ in range(times):
            for name in [*KINDS, None]:
                crowd.set_adapter(name)

    switch(3)
    before = places()
    sizes = []
    tracemalloc.start()
    for _ in range(8):
        switch(20)
        sizes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert places() == before and len(before) == len(KINDS) + 1
    # Python keeps freed objects for reuse, so one round may grow; what is never freed grows in every round.
    assert min(later - earlier for earlier, later in pairwise(sizes)) < 140  # a byte for each of its switches


def test_copies_of_a_model_switch_apart(crowd: LoRAModel) -> None:
    crowd.set_adapter("plain")
    expected = logits(crowd)
    twin = copy.deepcopy(crowd)
    assert twin.active_adapter == "plain" and torch.equal(logits(twin), expected)
    twin.set_adapter("wide")
    assert not torch.equal(logits(twin), expected)
    assert crowd.active_adapter == "plain" and torch.equal(logits(crowd), expected)


def test_adapters_at_rest_move_along(biased: Path) -> None:
    """`to` and the like reach them too, and the base's own parameters while a trained copy is in their place."""
    model = LoRAModel(base(biased, use_4bit=False))
    for name, settings in {"a": {"modules_to_save": "lm_head"}, "b": {"use_dora": True}}.items():
        model.add_adapter(name, LoRAConfig(rank=2, **settings))
    model.set_adapter("a")
    model.to(torch.float64)
    for name in ("a", "b", None):
        model.set_adapter(name)
        assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.float64}
    assert model.summary().trainable == 0


def test_saved_from_rest(biased: Path, zoo: dict[str, Path], crowd: LoRAModel, tmp_path: Path) -> None:
    """By name, whether active or not, as when it was saved by itself."""
    crowd.set_adapter("plain")
    for name in KINDS:
        crowd.save(tmp_path / name, name)
        assert crowd.active_adapter == "plain"
        one, other = load_file(tmp_path / name / WEIGHTS), load_file(zoo[name] / WEIGHTS)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
        fresh = base(biased)
        load_adapter(fresh, tmp_path / name)
        with crowd._using(crowd._adapters[name]):
            assert torch.equal(logits(fresh), logits(crowd)), name
    crowd.save(tmp_path / "active")
    assert_same_files(tmp_path / "active", tmp_path / "plain")


def test_delete(biased: Path, crowd: LoRAModel) -> None:
    """At rest or active; the active one leaves the base alone, and its memory is given back."""
    weights = weakref.ref(next(iter(crowd._adapters["wide"].layers.values())))
    crowd.set_adapter("wide")
    crowd.delete_adapter("plain")
    assert crowd.active_adapter == "wide" and "plain" not in crowd.adapters
    crowd.delete_adapter("wide")
    assert crowd.active_adapter is None and "wide" not in crowd.adapters and weights() is None
    assert torch.equal(logits(crowd), logits(base(biased)))
    with pytest.raises(InputError, match=r"Unknown adapter 'wide'; this model has dora, patterns"):
        crowd.set_adapter("wide")
    crowd.add_adapter("wide", LoRAConfig())


def test_disabling_ends_with_the_block(crowd: LoRAModel) -> None:
    """By an error too, and what was frozen by hand stays frozen."""
    crowd.set_adapter("plain")
    for parameter in crowd.lora_parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ZeroDivisionError), crowd.disable_adapter():
        raise ZeroDivisionError
    assert crowd.active_adapter == "plain" and not list(crowd.trainable_parameters())


def test_deleted_while_disabled(crowd: LoRAModel) -> None:
    """The model went on computing with an adapter that was gone from its list."""
    with crowd.disable_adapter():
        expected = logits(crowd)
    crowd.add_adapter("gone", LoRAConfig())
    crowd.set_adapter("gone")
    randomize(crowd.model)
    assert not torch.equal(logits(crowd), expected)
    with crowd.disable_adapter():
        crowd.delete_adapter("gone")
    assert crowd.active_adapter is None and torch.equal(logits(crowd), expected)


def test_names(crowd: LoRAModel, zoo: dict[str, Path]) -> None:
    for call in (
        lambda: crowd.add_adapter("plain", LoRAConfig()),
        lambda: crowd.load_adapter(zoo["plain"], "plain"),
        lambda: crowd.add_weighted_adapter(["plain"], [1.0], "plain"),
    ):
        with pytest.raises(InputError, match="an adapter 'plain' already; delete it first"):
            call()
    for call in (
        lambda: crowd.set_adapter("none"),
        lambda: crowd.delete_adapter("none"),
        lambda: crowd.save("nowhere", "none"),
        lambda: crowd.add_weighted_adapter(["none"], [1.0], "new"),
    ):
        with pytest.raises(InputError, match="Unknown adapter 'none'; this model has plain, wide"):
            call()


def test_nothing_is_active(crowd: LoRAModel, zoo: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No adapter is active"):
        crowd.save(tmp_path)
    with pytest.raises(InputError, match="No adapter is active"):
        crowd.load(zoo["plain"])
    with pytest.raises(InputError, match="No adapter is active"):
        _ = crowd.lora_config
    assert not list(tmp_path.iterdir())


def test_merged_models_do_not_switch(crowd: LoRAModel, zoo: dict[str, Path], tmp_path: Path) -> None:
    """Every way to another adapter is an error that changes nothing; saving the active one is none."""
    crowd.set_adapter("plain")
    crowd.merge()
    expected = logits(crowd)
    for call in (
        lambda: crowd.set_adapter("wide"),
        lambda: crowd.set_adapter(None),
        lambda: crowd.disable_adapter().__enter__(),
        lambda: crowd.load_adapter(zoo["wide"], "new"),
        lambda: crowd.add_adapter("new", LoRAConfig()),
        lambda: crowd.delete_adapter("plain"),
        lambda: crowd.save(tmp_path / "wide", "wide"),
    ):
        with pytest.raises(RuntimeError, match="merged; call unmerge before switching"):
            call()
        assert crowd.adapters == list(KINDS) and crowd.active_adapter == "plain"
        assert torch.equal(logits(crowd), expected)
    crowd.save(tmp_path / "plain")
    crowd.unmerge()
    crowd.set_adapter("wide")
    assert relative_error(logits(crowd), expected) > 0.01


@pytest.mark.parametrize("active", [None, "plain"])
def test_a_bad_adapter_changes_nothing(
    llama: Path, crowd: LoRAModel, saved: Path, tmp_path: Path, active: str | None
) -> None:
    """Damaged, every mismatch named; made for another base; no adapter at all."""
    crowd.set_adapter(active)
    modules, expected = [name for name, _ in crowd.named_modules()], logits(crowd)
    damage(saved)
    other = save_tiny_llama(tmp_path / "other", hidden_size=128)
    adapted(other, target_modules="gate_proj").save(tmp_path / "foreign")
    for directory, message in (
        (saved, r"missing .*lora_A.weight.*NaN"),
        (tmp_path / "foreign", "was made for another base"),
        (tmp_path / "nowhere", "check the path"),
    ):
        with pytest.raises(InputError, match=message):
            crowd.load_adapter(directory, "new")
        assert crowd.adapters == list(KINDS) and crowd.active_adapter == active
        assert [name for name, _ in crowd.named_modules()] == modules
        assert torch.equal(logits(crowd), expected)


def test_a_changed_base_is_not_shared(llama: Path, saved: Path, tmp_path: Path) -> None:
    """PiSSA takes its start out of the base: alone it works, beside others it is refused, and nothing changes."""
    model = LoRAModel(base(llama), LoRAConfig(rank=2, init="pissa")).eval()
    expected = logits(model)
    for call in (
        lambda: model.load_adapter(saved, "other"),
        lambda: model.add_adapter("other", LoRAConfig()),
        lambda: model.add_weighted_adapter(["default"], [1.0], "other"),
        lambda: model.set_adapter(None),
    ):
        with pytest.raises(InputError, match="base was changed for a PiSSA"):
            call()
        assert model.adapters == ["default"] and torch.equal(logits(model), expected)
    model.save(tmp_path / "pissa")
    ordinary = adapted(llama)
    with pytest.raises(InputError, match="changes its base and so shares it with no other"):
        ordinary.load_adapter(tmp_path / "pissa", "other")
    with pytest.raises(InputError, match="is for the adapter that a LoRAModel is made with"):
        ordinary.add_adapter("other", LoRAConfig(init="pissa"))
    alone = LoRAModel(base(llama)).eval()
    alone.load_adapter(tmp_path / "pissa", "alone")
    assert alone.active_adapter == "alone" and torch.equal(logits(alone), expected)
    assert ordinary.adapters == ["default"] and torch.equal(logits(ordinary), logits(adapted(llama)))


# ---- mixes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "rank"), [("cat", None), ("svd", 3), ("linear", None)])
def test_mixes_equal_those_on_disk(llama: Path, tmp_path: Path, method: Any, rank: int | None) -> None:
    """In memory and through files: equal logits, whatever is active meanwhile, and the parts stay as they were."""
    model = adapted(llama)
    model.save(tmp_path / "default")
    model.add_adapter("other", LoRAConfig(rank=4, alpha=2.0, target_modules="v_proj,o_proj"), seed=7)
    model.set_adapter("other")
    randomize(model, seed=8)
    model.save(tmp_path / "other")
    before = logits(model)
    model.add_weighted_adapter(["default", "other"], [0.7, -1.5], "mix", method, rank)
    assert model.adapters == ["default", "other", "mix"]
    assert model.active_adapter == "other" and torch.equal(logits(model), before)
    model.set_adapter("mix")
    directories = [str(tmp_path / name) for name in ("default", "other")]
    mix_adapters(directories, [0.7, -1.5], str(tmp_path / "mixed"), method, rank)
    fresh = base(llama)
    load_adapter(fresh, tmp_path / "mixed")
    assert relative_error(logits(model), logits(fresh)) < 1e-6  # scaled in another order in fp32
    model.save(tmp_path / "again")
    assert load_file(tmp_path / "again" / WEIGHTS).keys() == load_file(tmp_path / "mixed" / WEIGHTS).keys()
    descriptions = [json.loads((tmp_path / name / CONFIG).read_text()) for name in ("again", "mixed")]
    assert descriptions[0] == descriptions[1]


def test_a_stack_is_both_at_once(llama: Path) -> None:
    """Weights 1 and 1: each layer puts out its base's output and the updates of both."""
    model = adapted(llama)
    model.add_adapter("other", LoRAConfig(rank=2, alpha=6.0, adapter_dtype="float32"), seed=1)
    model.set_adapter("other")
    randomize(model, seed=2)
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both")
    layer, outputs = model.model.get_submodule("model.layers.0.self_attn.q_proj"), {}
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
    for name in (None, "default", "other", "both"):
        model.set_adapter(name)
        outputs[name] = layer(x).detach()
    stacked = outputs["default"] + outputs["other"] - outputs[None]
    assert relative_error(outputs["both"], stacked) < 1e-6
    assert relative_error(outputs["default"], stacked) > 0.01 < relative_error(outputs["other"], stacked)


def test_subtracting_gives_the_base_back(llama: Path) -> None:
    model = adapted(llama)
    model.add_weighted_adapter(["default", "default"], [1.0, -1.0], "nothing")
    model.set_adapter("nothing")
    assert relative_error(logits(model), logits(base(llama))) < FP32_TOLERANCE


@pytest.mark.parametrize("name", ["dora", "biases", "embeddings"])
def test_what_cannot_be_mixed(crowd: LoRAModel, name: str) -> None:
    with pytest.raises(InputError, match="no low-rank update expresses; merge it"):
        crowd.add_weighted_adapter(["plain", name], [1.0, 1.0], "mix")
    assert crowd.adapters == list(KINDS)
