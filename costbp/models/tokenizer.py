"""Token ids for texts: a model's own tokenizer or, for random weights, hashed words or bytes."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from costbp.errors import UserError, first_line

FIRST, LAST, RESERVED = 1, 2, 3


class Hashed:
    """Words and punctuation marks hashed (CRC-32) into ``size`` ids; 0 pads, 1 and 2 frame.

    Attributes:
        pad: token id of padding.
        end: token id that ends a text; None where there is none.
    """

    pad = 0
    end: int | None = LAST

    def __init__(self, size: int) -> None:
        self.span = size - RESERVED

    def plain(self, text: str) -> list[int]:
        """Token ids of a text without special tokens."""
        words = re.findall(r"\w+|[^\w\s]", text.lower())
        return [RESERVED + zlib.crc32(word.encode()) % self.span for word in words]

    def rows(self, texts: Sequence[str], contexts: Sequence[str] | None = None) -> list[list[int]]:
        """Token ids of texts, or of pairs, framed by special tokens."""
        pairs = zip(texts, contexts or [""] * len(texts), strict=True)
        return [
            [FIRST, *self.plain(text), LAST, *([*self.plain(context), LAST] if context else [])]
            for text, context in pairs
        ]

    def text(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        return " ".join(f"<{token}>" for token in ids if token >= RESERVED)

    def chat(self, content: str, image: bool) -> str:
        """A user's message, and the opening of the answer, as the model's chat template has it.

        Raises:
            UserError: there is no template.
        """
        raise UserError(
            "a model with random weights has no chat template: set source.chat to false"
        )


class Bytes(Hashed):
    """UTF-8 bytes as tokens: 0 pads, 1 and 2 frame."""

    def __init__(self, size: int) -> None:
        if size < 256 + RESERVED:
            raise UserError(f"source.config.vocab_size = {size}: bytes as tokens need 259")

    def plain(self, text: str) -> list[int]:
        return [RESERVED + byte for byte in text.encode()]

    def text(self, ids: Sequence[int]) -> str:
        kept = bytes(token - RESERVED for token in ids if RESERVED <= token < 256 + RESERVED)
        return kept.decode(errors="replace")


class Pretrained:
    """The tokenizer saved in a transformers folder; its methods are those of ``Hashed``.

    Raises:
        UserError: there is none, or it has nothing to pad with.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        try:
            self.inner: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            reason = first_line(error)
            raise UserError(f"{folder}: no tokenizer that can be read ({reason})") from error
        inner = self.inner
        self.end = inner.eos_token_id if inner.eos_token_id is not None else inner.sep_token_id
        if inner.pad_token_id is None and self.end is None:
            raise UserError(
                f"{folder}: its tokenizer has neither a pad token nor one that ends a text; set "
                "pad_token in tokenizer_config.json"
            )
        self.pad = inner.pad_token_id if inner.pad_token_id is not None else self.end

    def rows(self, texts: Sequence[str], contexts: Sequence[str] | None = None) -> list[list[int]]:
        pairs = [list(texts)] if contexts is None else [list(texts), list(contexts)]
        found: list[list[int]] = self.inner(*pairs, verbose=False)["input_ids"]
        return found

    def plain(self, text: str) -> list[int]:
        found: list[int] = self.inner(text, add_special_tokens=False, verbose=False)["input_ids"]
        return found

    def text(self, ids: Sequence[int]) -> str:
        found: str = self.inner.decode(list(ids), skip_special_tokens=True)
        return found

    def chat(self, content: str, image: bool) -> str:
        if self.inner.chat_template is None:
            raise UserError(
                f"{self.inner.name_or_path}: its tokenizer has no chat template: set source.chat "
                "to false"
            )
        parts: Any = content
        if image:
            parts = [{"type": "image"}, {"type": "text", "text": content}]
        message = [{"role": "user", "content": parts}]
        found: str = self.inner.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True
        )
        return found


Tokenizer = Hashed | Pretrained
