"""Files to read, and a tokenizer that does what the byte tokenizer of the other tests does not."""

import gzip
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """write("a.jsonl", [{...}, ...]) or write("a.jsonl", b"..."); .gz is gzipped. Returns the path as a text."""

    def make(name: str, content: bytes | Iterable[Any]) -> str:
        if not isinstance(content, bytes):
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content).encode()
        path = tmp_path / name
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return str(path)

    return make


@pytest.fixture(scope="session")
def spaced_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2's: puts <s> before every text, a space too and takes it away again; unknown characters go by bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz.:<>|"]
    vocab = {piece: i for i, piece in enumerate([*pieces, "▁a", "▁t", "he", "▁the"])}
    merges = [("▁", "a"), ("▁", "t"), ("h", "e"), ("▁t", "he")]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session", params=["bytes", "spaced", "stories260K", "imdb-6M"])
def any_tokenizer(request: pytest.FixtureRequest) -> Any:
    """One tokenizer after the other: two made here, two real ones where the machine has them."""
    made = {"bytes": "tiny_tokenizer", "spaced": "spaced_tokenizer"}
    if request.param in made:
        return request.getfixturevalue(made[request.param])
    return PreTrainedTokenizerFast.from_pretrained(request.getfixturevalue("shared") / "models" / request.param)
