"""Text for the examples: what every machine has, or what the user names; a tokenizer; batches of token windows."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import random
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

LICENCES, DOCS = Path("/usr/share/common-licenses"), Path("/usr/share/doc")
EOS = "<|end|>"


class UsageError(Exception):
    """Something the user named is not there or not usable; the message says what was expected."""


# ---------------------------------------------------------------------------------------------------------------- text


def _read(path: Path) -> str | None:
    """The file's text, or None where it is not UTF-8 text."""
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return None
    return None if "\0" in text else text


def python_source(limit: int, seed: int) -> list[str]:
    """About ``limit`` characters of the standard library's modules, whole files in an order drawn from ``seed``."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__"}
    files = sorted(p for p in root.rglob("*.py") if not skip.intersection(p.relative_to(root).parts))
    random.Random(seed).shuffle(files)
    return _take((text for p in files if (text := _read(p))), limit)


def _prose_files() -> Iterator[Path]:
    if LICENCES.is_dir():
        yield from sorted(p for p in LICENCES.iterdir() if p.is_file() and not p.is_symlink())
    if DOCS.is_dir():
        found = (
            p for p in DOCS.rglob("*") if p.suffix in (".txt", ".md", ".rst") or p.name.startswith(("README", "NEWS"))
        )
        yield from sorted(p for p in found if p.is_file() and not p.is_symlink() and p.suffix != ".gz")
    for package in sorted(importlib.metadata.distributions(), key=lambda d: str(d.metadata["Name"])):
        for file in package.files or []:
            if re.match(r"(licen[cs]e|copying|notice|readme)", file.name, re.IGNORECASE):
                yield Path(str(file.locate()))


def prose(limit: int) -> list[str]:
    """About ``limit`` characters of licence and documentation texts of this machine, each paragraph once."""
    texts = (text for p in _prose_files() if (text := _read(p)))
    return _take(_distinct_paragraphs(texts), limit)


def _distinct_paragraphs(texts: Iterable[str]) -> Iterator[str]:
    """The texts without paragraphs seen before: licences quote each other, and held-out text must be new."""
    seen: set[str] = set()
    for text in texts:
        kept = []
        for paragraph in re.split(r"\n\s*\n", text):
            key = " ".join(paragraph.lower().split())
            if key and key not in seen:
                seen.add(key)
                kept.append(paragraph.strip("\n"))
        if kept:
            yield "\n\n".join(kept)


def _take(texts: Iterable[str], limit: int) -> list[str]:
    taken, left = [], limit
    for text in texts:
        taken.append(text[:left])
        left -= len(taken[-1])
        if left <= 0:
            break
    return taken


def _jsonl(path: Path) -> Iterator[str]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UsageError(f"--data: expected JSON on every line of {path}, got line {number}: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            keys = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise UsageError(
                f'--data: expected a string under "text" on every line of {path}, got line {number}: {keys}'
            )
        yield row["text"]


def user_texts(name: str) -> list[str]:
    """The texts of a file, of all text files under a folder, or of the ``"text"`` fields of a jsonl file."""
    path = Path(name).expanduser()
    if not path.exists():
        raise UsageError(f"--data: expected a text file, a folder or a .jsonl file, got {name!r}, which does not exist")
    if path.is_dir():
        texts = [text for p in sorted(path.rglob("*")) if p.is_file() and (text := _read(p))]
        what = "a folder with UTF-8 text files"
    elif path.suffix in (".jsonl", ".ndjson"):
        texts, what = list(_jsonl(path)), 'lines with a "text"'
    else:
        text = _read(path)
        if text is None:
            raise UsageError(f"--data: expected UTF-8 text, got {name!r}, which is not")
        texts, what = [text], "text"
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise UsageError(f"--data: expected {what}, got {name!r}, where there is none")
    return texts


def hold_out(texts: list[str], every: int = 10, block: int = 2000) -> tuple[list[str], list[str]]:
    """``(train, held out)``: of each run of ``every`` blocks of whole paragraphs (lines, where there are none) of about
    ``block`` characters, the last is held out."""
    blocks: list[str] = []
    for text in texts:
        parts = re.split(r"(?<=\n\n)", text) if "\n\n" in text else text.splitlines(keepends=True)
        current = ""
        for part in parts:
            current += part
            if len(current) >= block:
                blocks.append(current)
                current = ""
        if current.strip():
            blocks.append(current)
    held = blocks[every - 1 :: every] or blocks[-1:]
    return [b for i, b in enumerate(blocks) if i % every != every - 1], held


def digest(texts: Iterable[str]) -> str:
    """A short fingerprint of the texts, for naming what was made from them."""
    sha = hashlib.sha256()
    for text in texts:
        sha.update(text.encode("utf-8", "replace") + b"\0")
    return sha.hexdigest()[:16]


# -------------------------------------------------------------------------------------------------------------- tokens


def train_tokenizer(texts: list[str], vocab: int):
    """A byte-level BPE of ``vocab`` entries as a transformers tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # any text can be encoded, whatever the training text held
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, bos_token=EOS, pad_token=EOS)


def encode(tokenizer, texts: list[str]) -> torch.Tensor:
    """The texts as one stream of token ids, the end token after each."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    for text in texts:
        ids += tokenizer.encode(text, add_special_tokens=False, verbose=False) + end
    return torch.tensor(ids, dtype=torch.long)


def samples(tokenizer, texts: list[str], count: int, longest: int, seed: int) -> list[torch.Tensor]:
    """``count`` samples of 8 to ``longest`` tokens: whole paragraphs, cut where they are longer, in an order drawn from
    ``seed``."""
    paragraphs = [p for text in texts for p in re.split(r"\n\s*\n", text) if len(p) > 40]
    random.Random(seed).shuffle(paragraphs)
    made: list[torch.Tensor] = []
    for paragraph in paragraphs:
        ids = tokenizer.encode(paragraph, add_special_tokens=False, verbose=False)[:longest]
        if len(ids) >= 8:
            made.append(torch.tensor(ids, dtype=torch.long))
        if len(made) == count:
            return made
    raise UsageError(f"text: expected at least {count} paragraphs of 8 tokens, got {len(made)}")


def random_windows(stream: torch.Tensor, steps: int, batch: int, seq: int, seed: int, what: str) -> list[torch.Tensor]:
    """``steps`` batches ``[batch, seq]`` of windows at places drawn from ``seed``."""
    if len(stream) < seq + 1:
        raise UsageError(f"{what}: expected at least {seq + 1} tokens for --seq {seq}, got {len(stream)}")
    starts = torch.randint(0, len(stream) - seq, (steps, batch), generator=torch.Generator().manual_seed(seed))
    return [torch.stack([stream[s : s + seq] for s in row.tolist()]) for row in starts]


def consecutive_windows(stream: torch.Tensor, most: int, batch: int, seq: int, what: str) -> list[torch.Tensor]:
    """Up to ``most`` batches of windows that cover the stream evenly without overlap; the last may be smaller."""
    count = min(len(stream) // seq, most * batch)
    if count < 1:
        raise UsageError(f"{what}: expected at least {seq} held-out tokens for --seq {seq}, got {len(stream)}")
    step = len(stream) // count  # at least seq
    windows = torch.stack([stream[i * step : i * step + seq] for i in range(count)])
    return list(windows.split(batch))
