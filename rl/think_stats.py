"""How many tokens of a completion are thought, and how many answer: places in a text, counted in tokens.

A completion on disk is ids and a text, and a text has no token boundaries, so these numbers need the tokenizer that
made it. Where `</think>` is one token (R1's students, the tiny world) it is looked up among the ids; else the prefixes
of the ids are decoded, about log2(T) of them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rl.budget import thought_end
from rl.prompts import THINK_CLOSE
from rl.types import Completion

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def thought_counter(tokenizer: PreTrainedTokenizerBase) -> Callable[[Completion], int]:
    """A function that gives the tokens of a completion's thought, up to its first `</think>` and with it.

    What follows is the answer, its EOS with it. A completion that never closes its thought is thought from end to end:
    it has no answer. Example, tokens in bars: "|4|=|4|</think>|4|EOS|" has 4 of thought and 2 of answer.
    """
    whole = tokenizer.encode(THINK_CLOSE, add_special_tokens=False)
    single = whole[0] if len(whole) == 1 else None

    def thought_tokens(completion: Completion) -> int:
        ids = completion.token_ids
        if THINK_CLOSE not in completion.text:
            return len(ids)
        if single is not None and single in ids:
            return ids.index(single) + 1
        end = thought_end(tokenizer, ids)
        return len(ids) if end is None else end.closed

    return thought_tokens


def tokens_until(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], characters: int) -> int:
    """How many tokens it takes until their text has so many characters; all of them if it never has.

    Example, tokens in bars: of "|12|+|3|" 3 characters take 2 tokens, 4 take 3.
    """

    def long_enough(count: int) -> bool:
        text = tokenizer.decode(list(token_ids[:count]), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return len(text) >= characters

    return min(bisect_left(range(len(token_ids)), True, key=long_enough), len(token_ids))
