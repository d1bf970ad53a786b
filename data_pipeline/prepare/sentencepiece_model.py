"""SentencePiece models, as the JSON of a tokenizer of the tokenizers library that gives the same ids.

Not every model can be converted: the library normalises some text in a way of its own. So the ids of both are compared, on
sample texts and on the user's own text before any of it is encoded.

A unigram model takes the segmentation with the highest sum of scores. SentencePiece adds them in float32, the library in
float64, so of those with equal sums, such as the orders of pieces in a row of dashes, or almost equal ones in a long text,
they may take different ones. The library's must then have the same text and the same or a higher sum.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from itertools import chain
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers

from configs.errors import UserError, shortened

_SPACE = "\u2581"  # how pieces write a space
_FIRST_PIECE = re.compile(rb"\n[\x00-\x7f]\n([\x00-\x7f])")  # a message with a name, up to the length of the name
_UNIGRAM, _BPE = 1, 2  # kinds of models
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6  # kinds of pieces
_LONGEST_SHOWN = 60


def is_model(content: bytes) -> bool:
    """True of a SentencePiece model: it begins with a piece, a name and, as a float, its score."""
    found = _FIRST_PIECE.match(content)
    return found is not None and content[4 + found[1][0] :][:1] == b"\x15"


def from_sentencepiece(content: bytes, origin: str) -> str:
    """The JSON of a tokenizer that is to give the ids of a model. UserError if it cannot be converted."""
    tree = _parsed(content, origin)
    for fault in _faults(tree):
        raise UserError(f"{origin}: {fault}")
    model = _unigram(tree) if tree.trainer_spec.model_type == _UNIGRAM else _bpe(tree)
    inner = tokenizers.Tokenizer(model)
    inner.normalizer = _normalizer(tree.normalizer_spec)
    parts: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if tree.normalizer_spec.add_dummy_prefix:
        parts.append(decoders.Strip(content=" ", left=1))
    inner.decoder = decoders.Sequence(parts)
    hidden = [piece.piece for piece in tree.pieces if piece.type in (_UNKNOWN, _CONTROL)]
    inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in hidden])
    inner.add_tokens([AddedToken(piece.piece, normalized=False) for piece in tree.pieces if piece.type == _USER_DEFINED])
    return inner.to_str()


def check_ids(content: bytes, encode: Callable[[str], list[int]], origin: str, samples: Iterable[str]) -> None:
    """UserError unless `encode` gives the ids of a model for all samples, or equally good ones."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    tree = _parsed(content, origin)
    for line in chain.from_iterable(map(_lines, samples)):
        expected, found = processor.encode(line), encode(line)
        if expected == found:
            continue
        if processor.decode(expected) != processor.decode(found) or not _as_good(tree, found, expected, line):
            at = next(n for n in range(len(expected) + 1) if expected[: n + 1] != found[: n + 1])
            raise UserError(
                f"{origin}: cannot be used: tokenizers gives other ids than sentencepiece, for "
                f"{shortened(repr(line), _LONGEST_SHOWN)} {found[at : at + 3]} instead of {expected[at : at + 3]} "
                f"from token {at + 1} on"
            )


def _as_good(tree: Any, found: list[int], expected: list[int], text: str) -> bool:
    """True if a unigram model gives `found` the same or a higher sum of scores, with bytes for the same characters.

    Names of special tokens and bytes in a text must be cut apart (see Tokenizer), so there the sum may be lower.
    """
    if tree.trainer_spec.model_type != _UNIGRAM:
        return False
    if any(piece.piece in text for piece in tree.pieces if piece.type in (_UNKNOWN, _CONTROL, _BYTE)):
        return True
    sums = [sum(tree.pieces[number].score for number in ids) for ids in (found, expected)]
    bytes_of = [[number for number in ids if tree.pieces[number].type == _BYTE] for ids in (found, expected)]
    return bytes_of[0] == bytes_of[1] and sums[0] >= sums[1] - 1e-9 * len(expected)


def _lines(text: str) -> Iterator[str]:
    """The text, and its lines, which show more beginnings and ends."""
    yield text
    yield from text.splitlines()


def _parsed(content: bytes, origin: str) -> Any:
    try:
        tree = import_module("sentencepiece.sentencepiece_model_pb2").ModelProto()
        damaged = import_module("google.protobuf.message").DecodeError
    except ImportError as error:
        raise UserError(
            f"{origin}: is a SentencePiece model; it needs the packages sentencepiece and protobuf, which are not "
            f"installed for {sys.executable}; pip install 'manyheads[data]', or run `make install`"
        ) from error
    try:
        tree.ParseFromString(content)
    except damaged as error:
        raise UserError(f"{origin}: is a SentencePiece model that is cut off or damaged") from error
    return tree


def _faults(tree: Any) -> Iterator[str]:
    """Why a model cannot be converted."""
    trainer, normalizer = tree.trainer_spec, tree.normalizer_spec
    if trainer.model_type not in (_UNIGRAM, _BPE):
        yield "is a SentencePiece model of words or characters; only unigram and BPE models can be used"
    if not trainer.byte_fallback:
        yield (
            "is a SentencePiece model without byte fallback, so characters that it does not know would be lost; "
            "train it with byte_fallback=true, or let prepare.py train one"
        )
    if trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        yield "is a SentencePiece model that writes spaces after words, or as they are; it must write ▁ before words"
    if tree.denormalizer_spec.precompiled_charsmap:
        yield "is a SentencePiece model that changes decoded text; only those without a denormaliser can be used"
    own = [piece.piece for piece in tree.pieces if piece.type == _USER_DEFINED]
    if own and (normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces):
        yield (
            f"is a SentencePiece model with symbols of its own ({own[0]}) that also changes spaces at the ends of a text, "
            "which tokenizers would do beside each symbol; train it without add_dummy_prefix and remove_extra_whitespaces"
        )


def _unigram(tree: Any) -> Any:
    return models.Unigram([(piece.piece, piece.score) for piece in tree.pieces], tree.trainer_spec.unk_id, byte_fallback=True)


def _bpe(tree: Any) -> Any:
    """SentencePiece merges the two neighbours that make the piece with the highest score, the library by a list of pairs."""
    vocabulary = {piece.piece: number for number, piece in enumerate(tree.pieces)}
    ordinary = {piece.piece: piece.score for piece in tree.pieces if piece.type == _NORMAL}
    merges = []
    for name in sorted(ordinary, key=lambda name: (-ordinary[name], vocabulary[name])):
        pairs = [(name[:place], name[place:]) for place in range(1, len(name))]
        found = [pair for pair in pairs if pair[0] in ordinary and pair[1] in ordinary]
        merges += sorted(found, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    unknown = tree.pieces[tree.trainer_spec.unk_id].piece
    return models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)


def _normalizer(spec: Any) -> Any:
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
