"""Special tokens that objectives need, added to a tokenizer after all ids that it has."""

from __future__ import annotations

from collections.abc import Sequence

import tokenizers
from tokenizers import AddedToken

from configs.errors import UserError


def with_special_tokens(text: str, names: Sequence[str], origin: str) -> str:
    """The JSON `text` of a tokenizer with `names` as special tokens; those that it has stay where they are.

    UserError if it has one as an ordinary token, or if new ones would not come last.
    """
    if not names:
        return text
    try:
        inner = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"{origin}: is not a tokenizer file of the tokenizers library: {error}") from error
    known = inner.get_vocab(with_added_tokens=True)
    special = {token.content for token in inner.get_added_tokens_decoder().values() if token.special}
    for name in names:
        if name in known and name not in special:
            raise UserError(f"{origin}: has {name} as an ordinary token, so --special-tokens cannot make it a special one")
    new = [name for name in names if name not in known]
    if not new:
        return text
    inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in new])
    first = max(known.values()) + 1
    if [inner.token_to_id(name) for name in new] != list(range(first, first + len(new))):
        raise UserError(f"{origin}: leaves out ids below its largest, so --special-tokens cannot add to it")
    return inner.to_str(pretty=True)
