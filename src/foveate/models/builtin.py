"""The language model that ships with Foveate: a small Llama trained on real code, with 8192 positions.

It is small enough for a laptop and good enough that attention matters: cutting its attention to a short
window costs clearly in bits per byte, so mechanisms can be compared on it without any download. Its card
(README.md in `path()`) says what it was trained on, how, and how well it does.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

_WEIGHTS = Path(__file__).parent / "weights" / "builtin"


def path() -> Path:
    """The directory of the model, in Hugging Face format: `AutoModelForCausalLM.from_pretrained` takes it.

    >>> (path() / "model.safetensors").exists()
    True
    """
    return _WEIGHTS


def load() -> tuple[Any, Any]:
    """The model (float32, in eval mode) and its byte-level tokenizer.

    Raises ImportError, saying what to install, where transformers is missing.

    >>> model, tokenizer = load()
    >>> tokenizer.decode(tokenizer("import os").input_ids)
    'import os'
    """
    transformers = require_transformers()
    import torch

    model = transformers.AutoModelForCausalLM.from_pretrained(path(), dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(path())


def heldout_files() -> list[str]:
    """The files the model was never trained on, named relative to their distribution.

    >>> "cpython/Lib/argparse.py" in heldout_files()
    True
    """
    return (path() / "heldout.txt").read_text(encoding="utf-8").splitlines()


def heldout_text(num_bytes: int) -> str:
    """Real text the model has never seen: held-out code of the running Python's own standard library.

    Whole modules follow each other, each under its name, up to `num_bytes` bytes; there are about 800,000.
    ValueError where more is asked for than there is.

    >>> heldout_text(26)
    '# cpython/Lib/argparse.py\\n'
    """
    return read_heldout(heldout_files(), num_bytes)


def read_heldout(names: list[str], num_bytes: int) -> str:
    """The first `num_bytes` of the named files that belong to the standard library of this machine."""
    joined, size = "", 0
    for name in names:
        file = _on_this_machine(name)
        if size < num_bytes and file is not None:
            joined += f"# {name}\n{file.read_text(encoding='utf-8')}\n\n"
            size = len(joined.encode())
    if size < num_bytes:
        raise ValueError(
            f"this machine has {size:,} bytes of held-out text, {num_bytes:,} were asked for: ask for less"
        )
    return joined.encode()[:num_bytes].decode(errors="ignore")


def _on_this_machine(name: str) -> Path | None:
    file = Path(sysconfig.get_path("stdlib")) / name.removeprefix("cpython/Lib/")
    return file if name.startswith("cpython/Lib/") and file.exists() else None


def require_transformers() -> Any:
    """The transformers module, or an ImportError that says how to get it."""
    try:
        import transformers
    except ImportError as error:
        need = "Foveate's language models need transformers, tokenizers and safetensors"
        raise ImportError(f"{need}: pip install 'foveate[hf]'") from error
    return transformers
