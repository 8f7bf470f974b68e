"""The registration of drafts with transformers' Auto classes, without loading transformers or torch.

Registering a class needs the class, and the class needs torch, which takes seconds: too long for every `import
hf_longspec` and every `--help`. So `announce` puts a stand-in into AutoConfig's table, and the stand-in fetches the
real classes when someone asks it for a config. If AutoConfig is not loaded yet, a finder on `sys.meta_path` waits for
that one module and then goes away. Nothing of this package is imported while transformers imports itself, so no order
of imports can go in circles.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

MODEL_TYPE = "longspec"
AUTO_CONFIG_MODULE = "transformers.models.auto.configuration_auto"


def announce() -> None:
    """Put the stand-in into AutoConfig's table, now or as soon as the table exists."""
    module = sys.modules.get(AUTO_CONFIG_MODULE)
    if module is not None and hasattr(module, "CONFIG_MAPPING"):
        module.CONFIG_MAPPING.register(MODEL_TYPE, ConfigStandIn(), exist_ok=True)
    else:
        sys.meta_path.insert(0, AutoConfigWatcher())


def register() -> dict[str, type]:
    """Load the real classes, register them and return them by name.

    The draft's class gets `push_to_hub` here, because a draft's repository carries no code that uploads.
    """
    import transformers.pipelines  # replaces the module `transformers`: must precede the assignment to it
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    from .hub.push_to_hub import push_to_hub
    from .modeling.configuration_longspec import LongSpecConfig
    from .modeling.modeling_longspec import LongSpecForCausalLM
    from .tokenizer import DraftTokenizer

    LongSpecForCausalLM.push_to_hub = push_to_hub
    AutoConfig.register(MODEL_TYPE, LongSpecConfig, exist_ok=True)
    for auto_class in (AutoModel, AutoModelForCausalLM):
        auto_class.register(LongSpecConfig, LongSpecForCausalLM, exist_ok=True)
    AutoTokenizer.register(LongSpecConfig, fast_tokenizer_class=DraftTokenizer, exist_ok=True)
    # `pipeline(assistant_model="folder")` asks no Auto class: it looks up the architecture's name in `transformers`
    transformers.LongSpecForCausalLM = LongSpecForCausalLM
    return {"LongSpecConfig": LongSpecConfig, "LongSpecForCausalLM": LongSpecForCausalLM}


class ConfigStandIn:
    """The stand-in for `LongSpecConfig` in AutoConfig's table; its first use puts the real class in its place."""

    def __init__(self) -> None:
        self.__name__ = "LongSpecConfig"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return register()["LongSpecConfig"](*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(register()["LongSpecConfig"], name)


class AutoConfigWatcher(MetaPathFinder):
    """A finder of AutoConfig's module alone, once; after the module is loaded, `announce` fills its table."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != AUTO_CONFIG_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        loader, load = spec.loader, spec.loader.exec_module

        def load_then_announce(module: Any) -> None:
            load(module)
            announce()

        loader.exec_module = load_then_announce  # type: ignore[method-assign]
        return spec
