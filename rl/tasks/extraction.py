"""Where the final answer stands in a completion's text: shared by every task that reads one. Standard library only.

The answer is looked for in what follows the last `</think>`. A thought that was opened and never closed has no answer,
however many boxes it holds: a model that is cut off in mid-thought has not answered.
"""

from __future__ import annotations

import re

from rl.types import Completion, FinishReason


def final_part(text: str) -> str | None:
    """The text after the last `</think>`; None if a thought was opened and not closed.

    `final_part("a</think>4") == "4"`, `final_part("4") == "4"`, `final_part("<think>4") is None`
    """
    _, _, answer = text.rpartition("</think>")
    return None if "<think>" in answer else answer


def last_box(text: str) -> str | None:
    """The content of the last `\\boxed{...}` whose braces balance, in one pass.

    `last_box(r"\\boxed{3}. Wait, \\boxed{\\frac{1}{2}}") == r"\\frac{1}{2}"`
    """
    open_braces: list[tuple[int, bool]] = []  # where the content starts, whether it is a box
    best: tuple[int, int] | None = None
    box_starts = {match.end() for match in re.finditer(r"\\boxed[ ]{0,3}\{", text)}
    for match in re.finditer(r"\\\\|\\[{}]|[{}]", text):
        brace, end = match.group(), match.end()
        if brace == "{":
            open_braces.append((end, end in box_starts))
        elif brace == "}" and open_braces:
            start, boxed = open_braces.pop()
            if boxed and (best is None or start > best[0]):
                best = (start, match.start())
    return text[best[0] : best[1]] if best is not None else None


def last_answer_tag(text: str) -> str | None:
    """`last_answer_tag("<answer>4</answer>") == "4"`; None without a closed tag."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    return text[start + len("<answer>") : end] if start >= 0 else None


def marked_answer(completion: Completion) -> str | None:
    """The answer that a completion marks as such: its last balanced box, else its last answer tag, else what stands
    after the last `####`; None if there is none. Of a completion that was cut off only a closed box or tag after
    `</think>` counts.

    `marked_answer` of "<think>5+2</think> It is \\boxed{7}." is "7", of "It is 7." None.
    """
    text, cut_off = completion.text, completion.finish_reason is not FinishReason.STOP
    if cut_off and "</think>" not in text:
        return None
    answer = final_part(text)
    if answer is None:
        return None
    for found in (last_box(answer), last_answer_tag(answer)):
        if found is not None:
            return found.strip()
    _, marked, after = answer.rpartition("####")
    if marked and not cut_off:
        return (after.strip().splitlines() or [""])[0].strip()
    return None


def no_answer_reason(completion: Completion, missing: str = "no final answer") -> str:
    """Why a completion without an answer has none: "the thought never ended (finish reason length)"."""
    finish = completion.finish_reason
    ended = final_part(completion.text) is not None and (finish is FinishReason.STOP or "</think>" in completion.text)
    return f"{missing if ended else 'the thought never ended'} (finish reason {finish})"
