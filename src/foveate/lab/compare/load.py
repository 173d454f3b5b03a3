"""From a folder to what is compared on: a model of text, of the kind that its configuration names."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from foveate.lab.compare.subject import CausalModel, Encoder, EncoderDecoder, MaskedModel, Subject
from foveate.lab.measure.workload import frame_of, shown

BUILTIN = "builtin"
LOCAL = {"local_files_only": True, "trust_remote_code": False}  # neither a network nor the model's own code
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
LONGEST_REASON = 400  # letters of a reason that another library gives
TOLD = 4  # weights that are named where many are missing


def load(model: str | Path, *, device: str = "cpu", dtype: str = "float32") -> Subject:
    """The built-in model, or the model of text of a directory in Hugging Face format.

    ValueError, in one sentence, for a directory that is missing or does not hold a whole model with safetensors
    weights, for a model that does not read text, and for a device or dtype that is not there.
    """
    from foveate.models import builtin

    transformers = builtin.require_transformers()
    place, number = _device(device), _dtype(dtype)
    if str(model) == BUILTIN:
        with _quiet(transformers):
            network, tokenizer = builtin.load()
        return _moved(CausalModel(BUILTIN, network, tokenizer, _digest(builtin.path())), place, number)
    folder = Path(model).expanduser()
    _check_folder(folder)
    network, tokenizer = _read(transformers, folder, number)
    kind, frame = _kind(transformers, type(network).__name__), frame_of(tokenizer)
    subject = kind(shown(folder.resolve().name), network, tokenizer, _digest(folder), frame)
    subject = _moved(subject, place, number)
    if isinstance(subject, MaskedModel) and tokenizer.mask_token_id is None:
        raise ValueError(f"the tokenizer in {folder} has no mask token, which a masked language model is judged with")
    if isinstance(subject, CausalModel):
        subject.check_causal()
    return subject


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name} cannot be used here: {_reason(error)}") from None
    return device


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"dtype is one of {', '.join(DTYPES)}; got {name!r}")
    return DTYPES[name]


def _moved(subject: Subject, device: torch.device, dtype: torch.dtype) -> Subject:
    subject.model.eval().to(device=device, dtype=dtype)
    return subject


def _read(transformers: Any, folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    architecture = _architecture(transformers, folder)
    try:
        with _quiet(transformers):
            network, told = architecture.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **LOCAL
            )
    except MemoryError:
        raise ValueError(f"there is not enough memory for the model in {folder}") from None
    except Exception as error:  # whatever a damaged file makes of other people's readers
        raise ValueError(f"cannot load {architecture.__name__} from {folder}: {_reason(error)}") from error
    _check_whole(folder, architecture.__name__, told)
    return network, _tokenizer(transformers, folder)


def _tokenizer(transformers: Any, folder: Path) -> Any:
    try:
        with _quiet(transformers):
            return transformers.AutoTokenizer.from_pretrained(folder, **LOCAL)
    except Exception as error:  # as above
        if not (folder / "tokenizer.json").exists():
            raise ValueError(f"{folder} has no tokenizer.json, a fast tokenizer's file") from error
        raise ValueError(f"cannot load the tokenizer from {folder}: {_reason(error)}") from error


def _check_whole(folder: Path, architecture: str, told: dict[str, Any]) -> None:
    """Refuse a model of which a part would be random."""
    missing = sorted(map(str, [*told.get("missing_keys", ()), *told.get("mismatched_keys", ())]))
    if missing:
        more = f" and {len(missing) - TOLD} more" if len(missing) > TOLD else ""
        raise ValueError(
            f"the weights in {folder} are not all of {architecture}'s: {', '.join(missing[:TOLD])}{more} are "
            "missing or of another shape, and would be random numbers"
        )


def _architecture(transformers: Any, folder: Path) -> Any:
    """The class that config.json names."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    names = config.get("architectures") if isinstance(config, dict) else None
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise ValueError(f"{file} names no architecture (as in 'architectures': ['LlamaForCausalLM'])")
    found: Any = getattr(transformers, names[0], None) if names[0].isidentifier() else None
    known = inspect.isclass(found) and issubclass(found, transformers.PreTrainedModel)
    if not known:
        raise ValueError(f"{file} names {names[0]!r}, which transformers {transformers.__version__} does not know")
    if found.main_input_name != "input_ids":
        raise ValueError(f"{names[0]} reads {found.main_input_name}: `foveate compare` measures models of text")
    return found


def _kind(transformers: Any, architecture: str) -> type[Subject]:
    """What a model of this class is judged by."""
    from transformers.models.auto import modeling_auto as auto

    def listed(*tables: str) -> bool:
        return any(architecture in _names(getattr(auto, f"MODEL_FOR_{table}_MAPPING_NAMES", {})) for table in tables)

    if listed("SEQ_TO_SEQ_CAUSAL_LM"):
        return EncoderDecoder
    if listed("MASKED_LM"):
        return MaskedModel
    if listed("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"):
        return CausalModel
    return Encoder


def _names(table: dict[str, str | tuple[str, ...]]) -> set[str]:
    return {name for names in table.values() for name in ((names,) if isinstance(names, str) else names)}


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Inside, transformers shows neither bars nor tables: what matters of them is said in words."""
    logging = transformers.logging
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a directory: give 'builtin' or the directory of a model")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: it is not a model in Hugging Face format")
    if any(folder.glob("*.safetensors")):
        return
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise ValueError(f"{folder} has its weights as pickles, which can run code: convert them to safetensors")
    raise ValueError(f"{folder} has no weights (*.safetensors)")


def _digest(folder: Path) -> str:
    """Names the model by its configuration and weights."""
    total = hashlib.sha256()
    for file in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        with file.open("rb") as opened:
            total.update(hashlib.file_digest(opened, "sha256").digest())
    return total.hexdigest()[:16]


def _reason(error: BaseException) -> str:
    """What an error says, on one line, and of a long one the first sentences."""
    said = " ".join(str(error).split()) or type(error).__name__
    if len(said) <= LONGEST_REASON:
        return said
    end = said.rfind(". ", 0, LONGEST_REASON)
    return said[: end + 1] if end > 0 else f"{said[:LONGEST_REASON].rpartition(' ')[0]} ..."
