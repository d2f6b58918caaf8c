"""Random tiny models of every supported architecture, with a real byte-level tokenizer, written as Hugging Face
directories. Small enough for a second per test, real enough for Megatron and vLLM."""

import json
from pathlib import Path

import torch

VOCAB_SIZE = 512
KINDS = ("llama", "qwen2", "qwen3")  # tied embeddings; bias on q, k, v; norms on q and k
EXPERTS = "qwen3_moe"
"""Two of eight experts for each token."""
FEW_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_tokenizer(folder: Path) -> None:
    """Byte-level tokenizer of 256 bytes and three special tokens (`<|im_end|>` ends a response)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index + 3 for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|pad|>", "<|im_start|>", "<|im_end|>"])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
    )
    fast.save_pretrained(folder)


def write_tiny_model(
    kind: str, folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides
) -> Path:
    """Write a random model of `kind` to `folder` (returned); `overrides` go to its Hugging Face config."""
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

    write_tokenizer(folder)
    eos = json.loads((folder / "tokenizer_config.json").read_text())["eos_token"]
    assert eos == "<|im_end|>", "the tokenizer above"
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    shape = dict(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=0.1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config_class, own = {
        "llama": (LlamaConfig, {"tie_word_embeddings": True}),
        "qwen2": (Qwen2Config, {"tie_word_embeddings": False}),
        "qwen3": (Qwen3Config, {"tie_word_embeddings": False}),
        EXPERTS: (Qwen3MoeConfig, {"tie_word_embeddings": False, **FEW_EXPERTS}),
    }[kind]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_class(**{**shape, **own, **overrides}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):  # defaults (1 and 0) would hide a swapped or missing one
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    return folder
