"""A tokenizer small enough to read, built in code: byte-level BPE, ChatML, no download and no training."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>", "<s>")  # ids 0 to 4

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# In the byte alphabet of GPT-2, Ġ is a space and Ċ a newline. "ĊĊ" merges across the prompt's end on purpose:
# an answer that begins with a newline would share a token with `<|im_start|>assistant\n` before it.
MERGES = (("Ċ", "Ċ"), ("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "n"), ("a", "n"), ("an", "d"), ("e", "r"))


def tiny_tokenizer(chat_template: bool = True, add_bos: bool = False, pad_is_eos: bool = False):
    """A PreTrainedTokenizerFast of 269 tokens: 5 specials, 256 bytes, 8 merges. Any text round-trips.

    Args:
        chat_template: True gives ChatML without a default system message, False none, as in a base model.
        add_bos:       True puts `<s>` before every text tokenized with special tokens, as LLaMA does.
        pad_is_eos:    True makes `<|im_end|>` the pad token too, else `<|pad|>` is.

    The eos token is `<|im_end|>` (id 2), the bos token `<s>` (id 4).
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*SPECIAL_TOKENS, *alphabet, *(left + right for left, right in MERGES)]
    backend = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, list(MERGES)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    if add_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", words.index("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>" if pad_is_eos else "<|pad|>",
        model_max_length=2048,
    )
    tokenizer.chat_template = CHATML_TEMPLATE if chat_template else None
    return tokenizer
