"""The model that comes with the package."""

import importlib.util
from pathlib import Path

from .errors import BundleError

FILE = "pretrained/wikitext-2.sdgm"


def pretrained() -> Path:
    """Return where the bundle lies that comes with the package: a small model of English.

    It lies beside the definitions of models, which are not imported.

    >>> from sdgm_edge.runtime import Generator, pretrained
    >>> Generator.load(pretrained()).generate("The game", max_new_tokens=4, seed=1).finish_reason
    'length'

    Raises:
        BundleError: the package was built without it.
    """
    spec = importlib.util.find_spec("sdgm_edge.models")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / FILE).is_file():
            return path
    raise BundleError("no model came with this package: name one with --model, or reinstall sdgm-edge")
