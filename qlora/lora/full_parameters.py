"""Parameters of the base that train in full beside the adapters: biases, embeddings, the head, other modules.

They belong to an adapter, not to the base: each adapter has its own copies, which replace the base's parameters
while it is active (`swap_parameters`). Switching adapters switches them too, and the base stays unchanged, bit for
bit.

Dtype: layers that cast their own parameters as they compute (linear layers, embeddings) get fp32 copies. Other
modules, norms above all, compute in their parameters' dtype, the activations': their copies keep it. Either way
the optimizer steps in fp32 (lora/optimizer.py).

Tied weights: if the base uses one tensor as embedding and head, either name trains both uses, and the gradient is
the sum of both. The one copy has both names, as in the file: PEFT expects both. (A PEFT adapter may have trained
them separately, or only one; then it has two copies, or one and the base's for the other.)

New tokens: the copies of embedding and head have more rows than the base's, unless the base has rows to spare.
A new row starts as the mean of the old tokens' rows, so that the new token's logit is at most the others'
log-mean-exp and the model's distribution hardly changes (J. Hewitt, "Initializing New Word Embeddings for
Pretrained Language Models", 2021; the mean that transformers' resize_token_embeddings samples around).

V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlora.config.lora import LoRAConfig
from qlora.lora.layer import LoRALinear
from qlora.lora.slot import slot_of
from qlora.quant.layers import FrozenMatrix
from qlora.quant.library import Params4bit
from qlora.system.errors import InputError

# ---- the base's parameters --------------------------------------------------------------------------------


def replaced_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The base's parameters that the active adapter's copies replace, by name."""
    return slot_of(model).replaced


def base_name(name: str) -> str:
    """A base parameter's name without the wrapper of an adapted layer."""
    return name.replace(".base_layer.", ".")


def named_base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of the base, whichever adapter is active; a tied one under each of its names."""
    replaced = replaced_parameters(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if ".lora." not in name:
            yield base_name(name), replaced.get(base_name(name), parameter)


def vocabulary_names(model: nn.Module) -> list[str]:
    """Names of the input embedding and of the output head, if the model has them."""
    getters: list[Any] = [getattr(model, f"get_{end}_embeddings", lambda: None) for end in ("input", "output")]
    ends = [module for module in (get() for get in getters) if module is not None]
    return [f"{name}.weight" for end in ends for name, module in model.named_modules() if module is end]


def trained_names(model: nn.Module, config: LoRAConfig, adapted: Collection[str], tied: bool = True) -> list[str]:
    """Names of the base's parameters that `config` trains, in model order.

    Args:
        adapted: names of the layers that get an adapter, whose biases bias="lora_only" means.
        tied: include the other names of tied parameters; False: only the names in `config` (PEFT's meaning).
    Raises:
        InputError: modules_to_save matches nothing in this model, or a weight that cannot train in full.
    """
    parameters = dict(named_base_parameters(model))
    chosen: set[str] = set()
    if config.bias == "all":
        chosen |= {name for name in parameters if name.endswith(".bias")}
    elif config.bias == "lora_only":
        chosen |= {f"{layer}.bias" for layer in adapted} & parameters.keys()
    if config.new_tokens:
        chosen |= set(vocabulary_names(model))
    for module in config.modules_to_save:
        own = {name for name in parameters if f".{name}".rpartition(".")[0].endswith(f".{module}")}
        for name in sorted(own):
            _check_trainable(model, name, module, adapted)
        if not own:
            names = {name.rpartition(".")[0].rpartition(".")[2] for name in parameters}
            raise InputError(
                f"modules_to_save names {module!r:.60}, but no module of this model with weights of its own is "
                f"called so; it has {', '.join(sorted(names))}."
            )
        chosen |= own
    if tied:
        uses = {id(parameters[name]) for name in chosen}
        chosen |= {name for name, parameter in parameters.items() if id(parameter) in uses}
    both = [layer for layer in adapted if f"{layer}.weight" in chosen]
    if both:  # the head, by new tokens or a tied embedding; others are refused above
        raise InputError(f"{both[0]} would train whole and with LoRA; leave it out of target_modules.")
    return [name for name in parameters if name in chosen]


def _check_trainable(model: nn.Module, name: str, asked: str, adapted: Collection[str]) -> None:
    """Refuse a weight whose layer gives it no gradient, or that would train twice."""
    from transformers.pytorch_utils import Conv1D

    owner, leaf = _owner(model, name)
    layer = name.rpartition(".")[0]
    if isinstance(owner._parameters[leaf], Params4bit):
        raise InputError(
            f"modules_to_save wants {layer} to train whole, which is in 4 bits; adapt it with LoRA, or pass "
            "--no-4bit."
        )
    if isinstance(owner, (Conv1D, FrozenMatrix)):
        kind = "a Conv1D" if isinstance(owner, Conv1D) else "an expert's matrix"
        raise InputError(f"modules_to_save names {asked}, but {layer} is {kind}, which is never trained whole.")
    if layer in adapted:
        raise InputError(f"modules_to_save and target_modules both name {layer}; leave it out of one of them.")


def trained_problems(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """Why saved values cannot replace this base's parameters, one clause per problem.

    Embedding and head may have more rows than the base's: new tokens.

    Args:
        model: the base; may be on the meta device.
    """
    shapes, vocabulary, problems = base_shapes(model), vocabulary_names(model), []
    for name, tensor in tensors.items():
        shape, wanted = tuple(tensor.shape), shapes.get(name)
        if wanted is None:
            problems.append(f"{name} is not a fully trainable parameter of this model")
        elif name in vocabulary and len(shape) == 2 and shape[1] == wanted[1] and shape[0] < wanted[0]:
            problems.append(f"{name} has {shape[0]} rows, fewer than the {wanted[0]} tokens of this base")
        elif shape != wanted and (name not in vocabulary or len(shape) != 2 or shape[1] != wanted[1]):
            problems.append(f"{name} is {shape} but this base has {wanted}")
        elif not torch.isfinite(tensor).all():
            problems.append(f"{name} holds NaN or infinity")
    return problems


def base_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of the base by name, tied ones under each name, without packed ones."""
    named = named_base_parameters(model)
    return {name: tuple(p.shape) for name, p in named if not isinstance(p, Params4bit)}


# ---- an adapter's copies ----------------------------------------------------------------------------------


def copy_trained(model: nn.Module, values: Mapping[str, Tensor] | Sequence[str]) -> dict[str, nn.Parameter]:
    """An adapter's own copies, on the device of the base's parameters and in the dtype that fits their module.

    Args:
        values: by parameter name, or only names to copy the base's values. Names that are tied in
            the base share one copy if their values are equal.
    """
    base = dict(named_base_parameters(model))
    tensors = values if isinstance(values, Mapping) else {name: base[name] for name in values}
    copies: dict[str, nn.Parameter] = {}
    shared: dict[int, tuple[Tensor, nn.Parameter]] = {}  # base parameter -> the value it got, and the copy
    for name, tensor in tensors.items():
        known = shared.get(id(base[name]))
        if known is None or not (known[0] is tensor or torch.equal(known[0], tensor)):
            dtype = torch.float32 if _casts(model, name) else base[name].dtype
            copy = nn.Parameter(tensor.detach().to(base[name].device, dtype, copy=True))
            known = shared[id(base[name])] = (tensor, copy)
        copies[name] = known[1]
    return copies


def _casts(model: nn.Module, name: str) -> bool:
    """Whether the module casts this parameter to the activations' dtype as it computes."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(_owner(model, name)[0], (nn.Linear, nn.Embedding, Conv1D))


def swap_parameters(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Put `parameters` in place by name; returns those they replaced, to undo it."""
    replaced = {}
    resized = False
    for name, parameter in parameters.items():
        owner, leaf = _owner(model, name)
        old = owner._parameters[leaf]
        assert old is not None
        replaced[name], owner._parameters[leaf] = old, parameter
        if old.shape != parameter.shape:  # embedding or head: nothing else may differ
            size_name = "num_embeddings" if isinstance(owner, nn.Embedding) else "out_features"
            owner.__dict__[size_name] = len(parameter)
            resized = True
    if resized:
        network: Any = model
        network.config.vocab_size = len(network.get_input_embeddings().weight)
    return replaced


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a base parameter, and the parameter's name there."""
    module, _, leaf = name.rpartition(".")
    owner: Any = model.get_submodule(module)
    return owner.base_layer if isinstance(owner, LoRALinear) else owner, leaf


def saved_modules(model: nn.Module, config: LoRAConfig, trained: Collection[str]) -> list[str]:
    """`modules_to_save` in PEFT's terms, where `norm` would match every name that ends so.

    Args:
        trained: names of the parameters that the adapter holds copies of.
    """
    asked = config.modules_to_save
    modules = [name.rpartition(".")[0] for name in trained]
    wanted = [
        name
        for name in dict.fromkeys(modules)
        if any(f".{name}".endswith(f".{module}") for module in asked)
        or f"{name}.weight" in vocabulary_names(model)
    ]
    endings = dict.fromkeys(name.rpartition(".")[2] for name in wanted)
    everywhere = [base_name(name + ".").removesuffix(".") for name, _ in model.named_modules()]
    exact = [end for end in endings if {n for n in everywhere if n.endswith(end)} <= set(wanted)]
    return exact + [name for name in wanted if name.rpartition(".")[2] not in exact]


def start_new_tokens(
    model: nn.Module, trained: dict[str, nn.Parameter], token_ids: Sequence[int]
) -> dict[str, nn.Parameter]:
    """Copy embedding and head with a row for each new token, set to the mean of the old rows.

    Args:
        trained: an adapter's copies; not changed.
        token_ids: of the new tokens. Spare rows of the base (vocabularies are padded) are used first.
    Returns:
        `trained` with the larger copies, tied ones still tied.
    """
    first, size = min(token_ids), max(token_ids) + 1
    names = set(vocabulary_names(model)) & trained.keys()
    grown = {}
    for parameter in {id(trained[name]): trained[name] for name in names}.values():
        old = parameter.detach()
        rows = old.new_empty(max(size, len(old)), old.shape[1])
        rows[: len(old)] = old
        rows[min(first, len(old)) : size] = old[:first].mean(dim=0)
        grown[id(parameter)] = nn.Parameter(rows)
    return {name: grown.get(id(parameter), parameter) for name, parameter in trained.items()}
