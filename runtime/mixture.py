"""The Gaussian mixture over mixing vectors, at run time: how typical a context is, and draws that steer.

    log p(c) = log Σ_g  w_g · N(c; μ_g, diag σ²_g)

c mixing vector, w weights, μ means, σ² variances, z a draw. T vectors, G components, M numbers in a vector.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import BundleError, ParameterError

Array = NDArray[np.float64]


class ComponentReport(NamedTuple):
    """What one component of a mixture stands for, on some text."""

    component: int
    """Its number, as `steer` takes it."""
    weight: float
    """Its weight in the mixture."""
    share: float
    """The part of the tokens that is its own, by responsibility."""
    tokens: tuple[tuple[int, float], ...]
    """Typical tokens with their lift: how many times more frequent they are here than in the text."""
    spread: float
    """Root mean variance: the size of a typical deviation from the mean, per number."""


class Mixture:
    """A Gaussian mixture with diagonal covariances.

    >>> mixture = Mixture([1.0], [[0.0, 0.0]], [[1.0, 1.0]])
    >>> round(float(mixture.log_density([[0.0, 0.0]])[0]), 4)
    -1.8379
    """

    def __init__(self, weights: ArrayLike, means: ArrayLike, variances: ArrayLike) -> None:
        """Weights (G,), means (G, M), variances (G, M). Raises BundleError where they make no mixture."""
        self.weights_G, self.means_GM, self.variances_GM = (
            np.array(array, np.float64) for array in (weights, means, variances)
        )
        if problem := self._problem():
            raise BundleError(f"mixture: {problem}; gmm.npz is damaged: export the bundle again")
        with np.errstate(divide="ignore"):  # a component of weight 0 is one that is never drawn
            self._log_weights_G = np.log(self.weights_G)
        self._deviations_GM = np.sqrt(self.variances_GM)
        self._precisions_MG = (1 / self.variances_GM).T
        self._pulls_MG = (self.means_GM / self.variances_GM).T
        self._constants_G = -0.5 * (
            (self.means_GM**2 / self.variances_GM).sum(axis=1)
            + np.log(self.variances_GM).sum(axis=1)
            + self.size * math.log(2 * math.pi)
        )

    def _problem(self) -> str | None:
        shapes = [array.shape for array in (self.weights_G, self.means_GM, self.variances_GM)]
        if self.weights_G.ndim != 1 or self.means_GM.ndim != 2 or not self.means_GM.size:
            return f"expected weights (G,), means (G, M), variances (G, M), got {shapes}"
        if shapes[1] != shapes[2] or shapes[0] != shapes[1][:1]:
            return f"expected weights (G,), means (G, M), variances (G, M), got {shapes}"
        for name in ("weights_G", "means_GM", "variances_GM"):
            if not np.isfinite(getattr(self, name)).all():
                return f"expected finite {name.partition('_')[0]}, got NaN or infinity"
        if not (self.variances_GM > 0).all():
            return f"expected positive variances, got {self.variances_GM.min():g}"
        if (self.weights_G < 0).any() or abs(self.weights_G.sum() - 1) > 1e-4:
            return f"expected weights of at least 0 with the sum 1, got the sum {self.weights_G.sum():g}"
        return None

    @property
    def num_components(self) -> int:
        """G."""
        return len(self.weights_G)

    @property
    def size(self) -> int:
        """M, the length of a mixing vector."""
        return int(self.means_GM.shape[1])

    def with_atoms(self, num_atoms: int, kept: int) -> "Mixture":
        """The mixture over the first of all atoms: of diagonal Gaussians, what is left is the marginal."""

        def first(array_GM: Array) -> Array:
            G = self.num_components
            return array_GM.reshape(G, -1, num_atoms)[..., :kept].reshape(G, -1)

        return Mixture(self.weights_G, first(self.means_GM), first(self.variances_GM))

    def _log_joint(self, c_TM: ArrayLike) -> Array:
        """log (w_g · N(c_t; μ_g, σ²_g)), (T, G)."""
        c_TM = np.asarray(c_TM, np.float64)
        if c_TM.ndim != 2 or c_TM.shape[1] != self.size:
            raise ParameterError(
                f"mixing vectors: expected shape (T, {self.size}), got {c_TM.shape}; give those of this model"
            )
        distances_TG = (c_TM**2) @ self._precisions_MG - 2 * (c_TM @ self._pulls_MG)
        return np.asarray(self._log_weights_G + self._constants_G - 0.5 * distances_TG)

    def log_density(self, c_TM: ArrayLike) -> Array:
        """log p(c) of each vector, (T,): its typicality."""
        return _log_sum_exp(self._log_joint(c_TM))[:, 0]

    def responsibilities(self, c_TM: ArrayLike) -> Array:
        """The probability of each component given each vector, (T, G)."""
        joint_TG = self._log_joint(c_TM)
        return np.asarray(np.exp(joint_TG - _log_sum_exp(joint_TG)))

    def draw(
        self,
        c_M: ArrayLike,
        rng: "np.random.Generator",
        mode: str = "posterior",
        steer: Mapping[int, float] | int | None = None,
    ) -> NDArray[np.float32]:
        """Draw a mixing vector z, (M,).

        Its component is drawn from the responsibilities for c ("posterior") or from the weights ("prior").
        `steer` pins a component, or multiplies the probabilities of some before the draw. Raises
        ParameterError.
        """
        self.check_steer(steer)
        if steer is None or isinstance(steer, Mapping):
            component = self._draw_component(c_M, rng, mode, steer or {})
        else:
            component = steer
        noise_M = rng.standard_normal(self.size)
        z_M = self.means_GM[component] + self._deviations_GM[component] * noise_M
        return np.asarray(z_M, np.float32)

    def _draw_component(
        self, c_M: ArrayLike, rng: "np.random.Generator", mode: str, factors: Mapping[int, float]
    ) -> int:
        if mode not in ("posterior", "prior"):
            raise ParameterError(
                f"mode: expected 'posterior' or 'prior', got {mode!r}; 'prior' ignores context"
            )
        logits_G = (
            self._log_weights_G.copy() if mode == "prior" else self._log_joint(np.asarray(c_M)[None])[0]
        )
        for component, factor in factors.items():
            logits_G[component] += math.log(factor) if factor > 0 else -math.inf
        mass_G = np.exp(logits_G - logits_G.max()).cumsum()
        return int(
            min(mass_G.searchsorted(rng.random() * mass_G[-1], "right"), mass_G.searchsorted(mass_G[-1]))
        )

    def check_steer(self, steer: Mapping[int, float] | int | None) -> None:
        """Raise ParameterError where `steer` names no component of this mixture, or excludes all of them."""
        factors = {} if steer is None else steer if isinstance(steer, Mapping) else {steer: 1.0}
        for component in factors:
            if not 0 <= component < self.num_components:
                raise ParameterError(
                    f"steer: expected a component from 0 to {self.num_components - 1}, got {component}; "
                    "`sdgm-edge inspect --mixture` tells what each stands for"
                )
        if all(factors.get(component) == 0 for component in np.flatnonzero(self.weights_G).tolist()):
            raise ParameterError(
                f"steer: expected a component that can be drawn, got {dict(factors)}; "
                "give one of them a factor above 0"
            )

    def report(
        self,
        c_TM: ArrayLike,
        tokens_T: Sequence[int] | NDArray[Any],
        num_tokens: int = 8,
        prior_count: float = 5.0,
    ) -> list[ComponentReport]:
        """Tell what each component stands for, the heaviest first, from the tokens at the vectors' places.

        Lifts are drawn towards 1 as if each token had been seen `prior_count` times more, shared out among
        the components as all tokens are: a token seen once is not the most typical of all. Raises
        ParameterError.
        """
        responsibilities_TG = self.responsibilities(c_TM)
        if len(tokens_T) != len(responsibilities_TG) or not len(tokens_T):
            raise ParameterError(
                f"tokens: expected one for each of {len(responsibilities_TG)} mixing vectors, and some, got "
                f"{len(tokens_T)}; give the tokens of the same text"
            )
        ids_U, places_T, counts_U = np.unique(tokens_T, return_inverse=True, return_counts=True)
        reports = []
        for component in np.argsort(-self.weights_G, kind="stable"):
            mine_T = responsibilities_TG[:, component]
            mine_U = np.bincount(places_T, mine_T, len(ids_U))
            share = float(mine_T.mean())
            lift_U = (mine_U / (share or 1.0) + prior_count) / (counts_U + prior_count)
            best = np.argsort(-lift_U, kind="stable")[:num_tokens]
            reports.append(
                ComponentReport(
                    component=int(component),
                    weight=float(self.weights_G[component]),
                    share=share,
                    tokens=tuple((int(ids_U[i]), float(lift_U[i])) for i in best),
                    spread=float(np.sqrt(self.variances_GM[component].mean())),
                )
            )
        return reports


def _log_sum_exp(x_TG: Array) -> Array:
    top = x_TG.max(axis=1, keepdims=True)
    return np.asarray(top + np.log(np.exp(x_TG - top).sum(axis=1, keepdims=True)))
