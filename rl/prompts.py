"""From a problem to the prompt the model sees, by the tokenizer's own chat template."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rl.types import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"
ANSWER_OPEN = "<answer>"
ANSWER_CLOSE = "</answer>"

# For a base model without a chat template, after R1-Zero's (2501.12948, section 2.2 and table 1): a plain conversation
# that constrains the structure and gives no hint how to reason. The wording is ours; the tags, their order and the
# ending are the paper's.
R1_ZERO_TEMPLATE = (
    "{{ bos_token if bos_token }}"
    "This is a conversation in which a User asks and an Assistant answers. The Assistant thinks the problem through "
    "first and answers after that. Its reasoning stands between <think> and </think>, its answer between <answer> and "
    "</answer>: <think> the reasoning </think> <answer> the answer </answer>.\n"
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}Assistant: {{ message.content }}{{ eos_token }}\n"
    "{% else %}User: {{ message.content }}\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
# For a student of R1: the prompt opens the thought, as in DeepSeek-R1's advice to begin every reply with "<think>\n",
# and the assistant's message is kept as it is. In plain text, so that no token of it has an untrained row; a turn ends
# in the tokenizer's EOS.
R1_TEMPLATE = (
    "{{ bos_token if bos_token }}"
    "{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content }}\n\n"
    "{% elif message.role == 'user' %}User: {{ message.content }}\n\n"
    "{% else %}Assistant: {{ message.content }}{{ eos_token }}\n\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant: <think>\n{% endif %}"
)
TEMPLATES = {"r1-zero": R1_ZERO_TEMPLATE, "r1": R1_TEMPLATE}


def render_text(tokenizer: PreTrainedTokenizerBase, problem: Problem, suffix: str = "") -> str:
    """The prompt as text, up to and including the generation prompt. A model without a chat template gets the bare
    question followed by a newline."""
    question = problem.text + suffix
    if tokenizer.chat_template is None:
        return question + "\n"
    messages = [{"role": "user", "content": question}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert isinstance(rendered, str)
    return rendered


def render_prompt(tokenizer: PreTrainedTokenizerBase, problem: Problem, suffix: str = "") -> tuple[int, ...]:
    """The prompt as token ids. The template writes its own special tokens, so none are added on top of it."""
    text = render_text(tokenizer, problem, suffix)
    bare = tokenizer.chat_template is None
    return tuple(tokenizer(text, add_special_tokens=bare)["input_ids"])


def prefills_think(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template has already opened `<think>` when the model begins to write (as R1's students do)."""
    probe = Problem(id="probe", question=(), answer="")
    return render_text(tokenizer, probe).rstrip().endswith(THINK_OPEN)


def force_think(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make every prompt end in `<think>` and a new line, as DeepSeek-R1 advises. A template that opens the thought in
    its own way stays as it is: that is what its model was trained on."""
    if prefills_think(tokenizer):
        return
    bare = "{{ bos_token if bos_token }}{% for message in messages %}{{ message.content }}\n{% endfor %}"
    opening = "{% if add_generation_prompt %}" + THINK_OPEN + "\n{% endif %}"
    own = bare if tokenizer.chat_template is None else tokenizer.get_chat_template()  # the default one of several
    tokenizer.chat_template = own + opening


def give_template(tokenizer: PreTrainedTokenizerBase, name: str | None) -> bool:
    """Give a tokenizer that has no chat template the one of that name; whether it did. Its own always stays.

    From then on the template belongs to the tokenizer: it is saved with the model, and every later stage renders the
    prompts that the model was trained on.
    """
    if name is None or tokenizer.chat_template is not None:
        return False
    tokenizer.chat_template = TEMPLATES[name]
    return True
