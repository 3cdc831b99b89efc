"""The model that comes with the package."""

import importlib
import os
from pathlib import Path

from .errors import BundleError

NAME = "wikitext-2"
FILE = f"pretrained/{NAME}.sdgm"


def pretrained() -> Path:
    """Return where the bundle lies that comes with the package: a small model of English.

    It lies beside the definitions of models, which are not imported.

    >>> from sdgm_edge.runtime import Generator, pretrained
    >>> Generator.load(pretrained()).generate("The game", max_new_tokens=4, seed=1).finish_reason
    'length'

    Raises:
        BundleError: the package was built without it.
    """
    spec = importlib.import_module("importlib.util").find_spec("sdgm_edge.models")  # not loaded in vain
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / FILE).is_file():
            return path
    raise BundleError("no model came with this package: name one with --model, or reinstall sdgm-edge")


def named(path: Path) -> Path:
    """Return the path, or that of the bundle in the package where its name is given and no file has it."""
    return pretrained() if str(path) == NAME and not os.path.lexists(path) else path
