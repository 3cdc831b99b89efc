"""The Gaussian mixture over mixing vectors: collected while training, fitted with scikit-learn.

Shapes: N vectors, M numbers in each, G components.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from sdgm_edge.losses import Objective

Arrays = dict[str, NDArray[np.float32]]


class Reservoir:
    """A bounded collection of mixing vectors: each step adds a few, and the oldest give way."""

    def __init__(self, size: int, num_mixing: int) -> None:
        self.vectors = torch.zeros(size, num_mixing)
        self.num_added = 0

    def add(self, mixing_TBM: Tensor, seed: int, count: int = 64) -> None:
        """Take `count` vectors at places chosen by `seed` alone, so that a resumed run chooses alike."""
        flat = mixing_TBM.detach().flatten(0, 1)
        places = np.random.default_rng(seed).integers(0, len(flat), count)
        chosen = flat[torch.from_numpy(places).to(flat.device)].float().cpu()
        slots = (self.num_added + torch.arange(count)) % len(self.vectors)
        self.vectors[slots] = chosen
        self.num_added += count

    def collected(self) -> NDArray[np.float32]:
        """Return what is there, (N, M)."""
        vectors: NDArray[np.float32] = self.vectors[: min(self.num_added, len(self.vectors))].numpy()
        return vectors


def fit_mixture(
    vectors_NM: NDArray[np.float32], num_components: int, start: Arrays | None = None, seed: int = 0
) -> Arrays:
    """Fit a diagonal Gaussian mixture, from an earlier one where there is one.

    A component's variance has a floor of a thousandth of the data's, so that none collapses onto one vector.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    floor = 1e-3 * float(vectors_NM.var()) + 1e-8
    mixture = GaussianMixture(
        min(num_components, len(vectors_NM)),
        covariance_type="diag",
        reg_covar=floor,
        max_iter=30,
        tol=1e-2,
        random_state=seed,
        weights_init=None
        if start is None
        else start["weights"].astype(np.float64) / start["weights"].sum(dtype=np.float64),
        means_init=None if start is None else start["means"],
        precisions_init=None if start is None else 1 / start["variances"],
    )
    with warnings.catch_warnings():  # a few rounds are enough here: the next refit goes on from this one
        warnings.simplefilter("ignore", ConvergenceWarning)
        mixture.fit(vectors_NM.astype(np.float64))
    fitted = {"weights": mixture.weights_, "means": mixture.means_, "variances": mixture.covariances_}
    return {name: np.asarray(array, np.float32) for name, array in fitted.items()}


def install(objective: Objective, arrays: Arrays) -> None:
    """Put a fitted mixture into the loss."""
    objective.prior_log_weights.copy_(torch.from_numpy(np.log(arrays["weights"] + 1e-12)))
    objective.prior_means.copy_(torch.from_numpy(arrays["means"]))
    objective.prior_variances.copy_(torch.from_numpy(arrays["variances"]))
