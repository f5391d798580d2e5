"""Between text and token ids: tokenizers, prompts, completions, chat templates, stop tokens, and back to text."""

from tether.tokens.decode import common_prefix, completion_text, fragments
from tether.tokens.encode import (
    Messages,
    encode_answer,
    encode_completion,
    encode_conversation,
    encode_prompt,
    encode_prompts,
    encode_texts,
    render_chat,
)
from tether.tokens.tokenizer import check_vocabulary, load_tokenizer, looks_local, stop_token_ids

__all__ = [
    "Messages",
    "check_vocabulary",
    "common_prefix",
    "completion_text",
    "encode_answer",
    "encode_completion",
    "encode_conversation",
    "encode_prompt",
    "encode_prompts",
    "encode_texts",
    "fragments",
    "load_tokenizer",
    "looks_local",
    "render_chat",
    "stop_token_ids",
]
