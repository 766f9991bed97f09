"""A tokenizer that needs no download: all bytes, plus the special tokens of the chat template at
hand."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "<|begin|>{% for m in messages %}<|header|>{{ m['role'] }}<|/header|>\n\n{{ m['content']"
    " }}<|eot|>{% endfor %}{% if add_generation_prompt %}<|header|>assistant<|/header|>\n\n{%"
    " endif %}"
)
GEMMA = (
    "<bos>{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported')"
    " }}{% endif %}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant'"
    " else m['role'] }}\n{{ m['content'] }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt"
    " %}<start_of_turn>model\n{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if"
    " add_generation_prompt %}assistant: {% endif %}"
)
NOT_PREFIX_STABLE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if"
    " add_generation_prompt %}<think>{% endif %}"
)
# an empty think block where the answer has none, and one that it has in a form of its own
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and"
    " loop.last %}<think>\n{% if '</think>' in m['content'] %}{{"
    " m['content'].split('</think>')[0].split('<think>')[-1].strip('\n') }}{% endif %}{{ '\n'"
    " }}</think>\n\n{{ m['content'].split('</think>')[-1].lstrip('\n') }}{% else %}{{ m['content']"
    " }}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{%"
    " endif %}"
)
STRIPPING = LLAMA3.replace("{{ m['content'] }}", "{{ m['content'] | trim }}")
SPACED = (  # a space before an answer that is no part of the generation prompt
    "<bos>{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{%"
    " else %} {{ m['content'] }}<|eot|>{% endif %}{% endfor %}"
)
TWO_ENDS = CHATML + "{% if not add_generation_prompt %}<|eot|>{% endif %}"
UNASKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)
CHANNELS = (  # the name of a channel between the generation prompt and the answer
    "{% for m in messages %}<|begin|>{{ m['role'] }}{{ '<|header|>final' if m['role'] =="
    " 'assistant' else '' }}<|/header|>{{ m['content'] }}{{ '<|eot|>' if m['role'] == 'assistant'"
    " else '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}<|begin|>assistant{% endif %}"
)
NO_SYSTEM = CHATML.replace(
    "{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "gemma": GEMMA,
    "no_end": NO_END,
    "not_prefix_stable": NOT_PREFIX_STABLE,
    "thinking": THINKING,
    "stripping": STRIPPING,
    "spaced": SPACED,
    "two_ends": TWO_ENDS,
    "unasked": UNASKED,
    "channels": CHANNELS,
    "no_system": NO_SYSTEM,
    "none": None,
}
SPECIAL = [
    "<|im_start|>",
    "<|im_end|>",
    "<|begin|>",
    "<|header|>",
    "<|/header|>",
    "<|eot|>",
    "<bos>",
    "<start_of_turn>",
    "<end_of_turn>",
]


def make_tokenizer(template: str = "chatml", kind: str = "bytes") -> PreTrainedTokenizerFast:
    """A tokenizer with one of the chat templates above. `bytes`: a token a byte; `joining`: and
    tokens of several line breaks or a space with a letter; `pieces`: characters with spaces made
    visible and bytes for what is rare, as sentencepiece has them."""
    tokenizer = _pieces() if kind == "pieces" else _bytes(joining=kind == "joining")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", additional_special_tokens=SPECIAL
    )
    fast.chat_template = TEMPLATES[template]
    return fast


def _bytes(joining: bool) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("ĊĊ", "ĊĊ"), ("Ċ", "ĊĊ"), ("Ġ", "n"), ("Ġ", "Ġ")] if joining else []
    merges.sort(key=lambda pair: len(pair[0] + pair[1]))
    vocab = {token: i for i, token in enumerate([*alphabet, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pieces() -> Tokenizer:
    vocab = {f"<0x{i:02X}>": i for i in range(256)}
    merges = [("\n", "\n"), ("▁", "n"), ("▁", "▁")]
    for token in ["<unk>", "▁", "\n", *map(chr, range(33, 127)), *(a + b for a, b in merges)]:
        vocab[token] = len(vocab)
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(autouse=True, scope="module")
def _one_thread_of_a_cpu(request):
    """One thread, which other tests of this process may have changed. And no GPU, in this process
    and in those that it starts, but for modules that say SEES_GPUS."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        if not getattr(request.module, "SEES_GPUS", False):
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
            # which a process that has looked for GPUs no longer reads
            patch.setattr(torch.cuda, "is_available", lambda: False)
            patch.setattr(torch.cuda, "device_count", lambda: 0)
        yield
