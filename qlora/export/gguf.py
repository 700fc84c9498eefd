"""Write a model, or a LoRA adapter alone, as a .gguf file for llama.cpp, Ollama and LM Studio.

    model      dequantize one tensor -> merge the adapter into it -> permute q and k -> encode -> write -> next
    adapter    `<tensor>.lora_a` (rank, in) and `<tensor>.lora_b` (out, rank); llama.cpp computes
               W x + (adapter.lora.alpha / rank) lora_b lora_a x

Names, sizes and encodings come from the gguf package. Norms and other one-dimensional tensors stay in fp32. In
4-bit and 5-bit files the embedding and the output head, which lose most, are q8_0. Only encodings that the gguf
package can write are offered; for K-quants run llama.cpp's llama-quantize on an f16 or bf16 file.

llama.cpp's llama architecture expects the rows of q and k in the order of its own rotary embedding, which pairs
(2i, 2i + 1) where Hugging Face pairs (i, i + d/2); qwen2 and qwen3 keep Hugging Face's order.

Source: llama.cpp, conversion/base.py, conversion/llama.py and convert_lora_to_gguf.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from qlora.adapters.load import check_adapter
from qlora.adapters.peft_files import read_adapter
from qlora.adapters.provenance import trained_base
from qlora.data.chat_template import fallback_template
from qlora.data.tokenizer_files import read_tokenizer_files
from qlora.export.gguf_vocabulary import add_vocabulary, plain_templates
from qlora.lora.targets import head_name
from qlora.lora.variants import variant_of
from qlora.model.attention import head_counts
from qlora.model.families import FAMILIES, GGUFForm, family_of
from qlora.model.resolve import resolve_model
from qlora.model.rotary import interleave
from qlora.model.skeleton import empty_model, weight_shapes
from qlora.model.tokenizer import load_tokenizer
from qlora.model.weights import dequantized_weights
from qlora.system.errors import InputError
from qlora.system.files import new_file

TEMPLATE = "tokenizer.chat_template"  # its name in a .gguf file
Encoding = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]
ADAPTER_ENCODINGS = ("f32", "f16", "bf16", "q8_0")


def export_gguf(
    model: str,
    output: str | Path,
    encoding: Encoding = "f16",
    adapter: str | None = None,
    pre_tokenizer: str | None = None,
) -> None:
    """Write a model, with an optional adapter merged into it, as one .gguf file.

    Memory stays near one tensor in fp32. The adapter is merged into the weights it was trained on
    (`trained_base`). Metadata of a .gguf base, with its tokenizer, is copied.

    Args:
        model: a Hugging Face directory, a hub id or a .gguf file, of a family that has a GGUF form.
        output: must not exist; written atomically.
        encoding: of the matrices; a tensor whose rows are not a multiple of 32 is written in f16 instead.
        adapter: adapter directory.
        pre_tokenizer: llama.cpp's name for the tokenizer's splitter, if it is not recognized.
    Raises:
        InputError: llama.cpp does not support the architecture, tokenizer or a setting; or the adapter does not
            fit.
    """
    network = empty_model(model)
    form = _gguf_form(network.config)
    lora = None if adapter is None else read_adapter(adapter)
    shapes = weight_shapes(network)
    if lora is not None:
        check_adapter(lora, network)
        grown = [name for name, value in lora.trained.items() if shapes.get(name) != tuple(value.shape)]
        if lora.base_shift or lora.config.init == "pissa" or grown:
            raise InputError(
                f"The adapter {adapter} changes the base or the vocabulary (PiSSA, LoftQ, new tokens); "
                "merge it first, then export the merged model."
            )
    quant = None if adapter is None else trained_base(adapter, model).quantization
    weights = dequantized_weights(model, quant)
    names = gguf_names(shapes, form.architecture, network.config.num_hidden_layers)
    with _new_gguf(output, form.architecture) as writer:
        _add_metadata(writer, model, network.config, encoding, pre_tokenizer, adapter)
        rope_freqs = _add_rope(writer, network.config, form)
        encodings = {name: _encoding_of(names[name], shape, encoding) for name, shape in shapes.items()}
        if rope_freqs is not None:
            _announce(writer, "rope_freqs.weight", tuple(rope_freqs.shape), "f32")
        for name, shape in shapes.items():
            _announce(writer, names[name], shape, encodings[name])
        _write_header(writer)
        if rope_freqs is not None:
            _write(writer, "rope_freqs.weight", rope_freqs, "f32")
        for name, weight in weights:
            merged = weight if lora is None else lora.merge_into(name, weight)
            _write(writer, name, permute_rows(name, merged, network.config), encodings[name])


def export_adapter(model: str, adapter: str, output: str | Path, encoding: Encoding = "f16") -> None:
    """Write an adapter alone as a .gguf file, for use with a .gguf of its base.

    Scalings other than alpha / rank (rsLoRA, per-layer ranks and alphas) are folded into B, since llama.cpp
    applies alpha / rank; a plain adapter keeps its B.

    Args:
        model: the base; only its config is read.
        encoding: f32, f16, bf16 or q8_0; a tensor whose rows are not a multiple of 32 is written in f16 instead.
    Raises:
        InputError: the adapter has more than low-rank updates, or does not fit the base.
    """
    if encoding not in ADAPTER_ENCODINGS:
        raise InputError(
            f"An adapter of --type {encoding} would lose too much; choose {', '.join(ADAPTER_ENCODINGS)}."
        )
    network = empty_model(model)
    config = network.config
    architecture = _gguf_form(config).architecture
    lora = read_adapter(adapter)
    check_adapter(lora, network)
    variant = variant_of(lora.config)
    beyond = "" if variant is None else variant.beyond
    trained = [*lora.trained, *lora.rows]
    if beyond or trained:
        extra = beyond or f"trained parameters ({trained[0]})"
        raise InputError(
            f"The adapter {adapter} has {extra}, which a LoRA .gguf cannot hold; export the merged model instead "
            "(without --adapter-only)."
        )
    if config.tie_word_embeddings and head_name(network) in lora.adapted_layers:
        raise InputError(
            f"The adapter {adapter} adapts the head, which this base has tied to its embedding: its .gguf has no "
            "such matrix. Export the merged model instead (without --adapter-only)."
        )
    adapted = [f"{layer}.weight" for layer in lora.adapted_layers]
    names = gguf_names(adapted, architecture, config.num_hidden_layers)
    with _new_gguf(output, architecture) as writer:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", lora.config.alpha)
        _add_file_type(writer, encoding)
        tensors = []
        for layer in lora.adapted_layers:
            name = f"{layer}.weight"
            A, B = lora.low_rank(layer)
            B = permute_rows(name, B * (len(A) / lora.config.alpha), config)
            tensors += [(f"{names[name]}.lora_a", A), (f"{names[name]}.lora_b", B)]
        encodings = {name: _encoding_of(name, tuple(t.shape), encoding) for name, t in tensors}
        for name, tensor in tensors:
            _announce(writer, name, tuple(tensor.shape), encodings[name])
        _write_header(writer)
        for name, tensor in tensors:
            _write(writer, name, tensor, encodings[name])


# ---- names and rows ---------------------------------------------------------------------------------------


def _gguf_form(config: Any) -> GGUFForm:
    """The llama.cpp form that computes the same.

    Raises:
        InputError: there is none.
    """
    form = family_of(config).gguf
    rope = config.rope_parameters if form else {}
    reasons = [f"has hidden_act {config.hidden_act}"] if getattr(config, "hidden_act", "silu") != "silu" else []
    reasons += ["rotates only part of each head"] if rope.get("partial_rotary_factor", 1.0) != 1.0 else []
    reasons += ["has attention biases"] if form and not form.has_biases and config.attention_bias else []
    if form is None or reasons:
        known = [kind for kind, family in FAMILIES.items() if family.gguf]
        reasons = reasons if form else [f"is a {config.model_type} model"]
        raise InputError(
            f"The model {' and '.join(reasons)}; models like {', '.join(known)} can be exported as GGUF."
        )
    return form


def gguf_names(names: Iterable[str], architecture: str, num_layers: int) -> dict[str, str]:
    """Map parameter names to names in a .gguf file."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next(key for key, value in MODEL_ARCH_NAMES.items() if value == architecture)
    name_map = get_tensor_name_map(arch, num_layers)
    found: dict[str, str] = {}
    for name in names:
        stored = name_map.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored is None:
            raise InputError(f"{name} has no place in a {architecture} .gguf file; export a plain model.")
        found[name] = stored
    return found


def permute_rows(name: str, tensor: Tensor, config: Any) -> Tensor:
    """Reorder the rows of q and k to llama.cpp's rotary order (interleaved halves) if the architecture needs it.

    Args:
        tensor: (rows, ...) weight, bias or lora_B of q_proj or k_proj; any other tensor is returned unchanged.
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    form = family_of(config).gguf
    if heads is None or form is None or form.rotary == "halves":
        return tensor
    return interleave(tensor, heads)


# ---- metadata ---------------------------------------------------------------------------------------------


def _add_metadata(
    writer: Any, model: str, config: Any, encoding: Encoding, pre_tokenizer: str | None, adapter: str | None
) -> None:
    """Write all metadata except tensors and rotary embedding, with the adapter's chat template if it has one."""
    path = resolve_model(model)
    writer.add_type("model")
    _add_file_type(writer, encoding)
    window = getattr(config, "sliding_window", None)
    # llama.cpp computes these architectures without a window; up to the window's length both are the same.
    writer.add_context_length(min(config.max_position_embeddings, window or config.max_position_embeddings))
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    *_, head_dim = head_counts(config)
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if path.suffix == ".gguf":
        _copy_vocabulary(writer, path, model, adapter)
    else:
        add_vocabulary(writer, load_tokenizer(model, adapter), config.vocab_size, pre_tokenizer)


def _copy_vocabulary(writer: Any, file: Path, model: str, adapter: str | None) -> None:
    """Copy tokenizer, chat template, license and rotary settings of a .gguf base unchanged."""
    from gguf import GGUFReader

    fields: dict[str, Any] = dict(GGUFReader(file).fields)
    has_own = adapter is not None and bool(read_tokenizer_files(Path(adapter)))
    if has_own:
        fields = {name: field for name, field in fields.items() if name != TEMPLATE}
    for name, field in fields.items():
        if name.startswith(("tokenizer.", "general.license", "general.languages")) or ".rope.scaling." in name:
            value = field.contents()
            if value not in ("", []):
                writer.add_key_value(
                    name, value, field.types[0], field.types[-1] if len(field.types) > 1 else None
                )
    if TEMPLATE not in fields:
        tokenizer = load_tokenizer(model, adapter)
        writer.add_chat_template(plain_templates(tokenizer) if has_own else fallback_template(tokenizer))


def _add_file_type(writer: Any, encoding: Encoding) -> None:
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    writer.add_file_type(LlamaFileType["ALL_F32" if encoding == "f32" else f"MOSTLY_{encoding.upper()}"])
    writer.add_quantization_version(GGML_QUANT_VERSION)


def _add_rope(writer: Any, config: Any, form: GGUFForm) -> Tensor | None:
    """Write base and scaling of the rotary embedding.

    Returns:
        (head_dim / 2,) divisors of the frequencies for LLaMA 3's scaling, which llama.cpp reads as a tensor.
    Raises:
        InputError: llama.cpp does not support the scaling.
    """
    from gguf import RopeScalingType
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    # llama.cpp reads no other YaRN settings for these architectures.
    usual = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True, "mscale": None, "mscale_all_dim": None}
    unusual = [key for key, value in usual.items() if rope.get(key, value) not in (value, None)]
    writer.add_rope_freq_base(rope["rope_theta"])
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "yarn" and not unusual:
        attention = 0.1 * math.log(rope["factor"]) + 1.0 if rope["factor"] > 1 else 1.0
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(
            rope.get("original_max_position_embeddings") or config.max_position_embeddings
        )
        # llama.cpp multiplies the usual factor by this one; in Hugging Face it replaces the usual one.
        writer.add_rope_scaling_attn_factors((rope.get("attention_factor") or attention) / attention)
    elif kind == "llama3" and form.has_rope_freqs:
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        pairs = torch.arange(len(scaled), dtype=torch.float32) / len(scaled)
        return 1.0 / (rope["rope_theta"] ** pairs * scaled)
    elif kind != "default":
        what = " with ".join([repr(kind)[:60], *unusual])
        raise InputError(
            f"The model has rope_type {what}, which {form.architecture} files cannot hold; export the adapter "
            "alone (--adapter-only)."
        )
    return None


# ---- writing ----------------------------------------------------------------------------------------------


@contextmanager
def _new_gguf(output: str | Path, architecture: str) -> Iterator[Any]:
    """Yield a GGUFWriter on a file that becomes `output` when complete."""
    from gguf import GGUFWriter

    target = Path(output)
    if target.suffix != ".gguf":
        raise InputError(f"--output {target} does not end in .gguf; choose a name that does.")
    if target.exists():
        raise InputError(f"--output {target} exists already; remove it or choose another.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with new_file(target) as staging:
        writer = GGUFWriter(staging, architecture)
        writer.add_name(target.stem)
        try:
            yield writer
        finally:
            writer.close()


def _encoding_of(name: str, shape: tuple[int, ...], encoding: Encoding) -> Encoding:
    """The encoding of a tensor with this name and shape in a file of `encoding`."""
    if len(shape) < 2 or name.endswith("_norm.weight"):
        return "f32"
    if encoding not in ("f32", "f16", "bf16") and shape[-1] % 32:
        return "f16"
    if encoding.startswith(("q4", "q5")) and name in ("token_embd.weight", "output.weight"):
        return "q8_0"
    return encoding


def _announce(writer: Any, name: str, shape: tuple[int, ...], encoding: Encoding) -> None:
    """Add a tensor to the header; its data is written later, in the same order."""
    import numpy as np
    from gguf import GGMLQuantizationType, quant_shape_to_byte_shape

    kind = GGMLQuantizationType[encoding.upper()]
    stored = quant_shape_to_byte_shape(shape, kind)
    dtype = {"f32": np.float32, "f16": np.float16}.get(encoding, np.uint8)
    writer.add_tensor_info(name, stored if dtype is np.uint8 else shape, np.dtype(dtype), math.prod(stored), kind)


def _write_header(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _write(writer: Any, name: str, tensor: Tensor, encoding: Encoding) -> None:
    """Encode a tensor and append its data."""
    import numpy as np
    from gguf import GGMLQuantizationType, quantize

    array = tensor.detach().float().contiguous().numpy()
    with np.errstate(over="ignore"):  # reported below
        data = quantize(array, GGMLQuantizationType[encoding.upper()])
    if not np.isfinite(array).all() or (encoding == "f16" and not np.isfinite(data).all()):
        raise InputError(f"{name} has values outside the range of {encoding}; choose --type bf16.")
    writer.write_tensor_data(data)
