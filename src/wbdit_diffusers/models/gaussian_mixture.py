"""The optimal denoiser of a Gaussian mixture in closed form: teacher and control of the network."""

import math
import warnings

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from ..sampling.schedulers import signal_and_noise
from .composition import Composed, Composition
from .loading import SafetensorsModel


PSEUDO_CELLS = 20  # weight of the covariance pooled within labels in the covariance of a component, in cells
MAX_COMPONENTS = 32  # per combination of labels
COMPONENTS = [2, 3, 4, 6, 8, 12, 16, 24, 32]  # numbers to try after 1
MANY_CELLS = 2000  # above this, one validation set of a quarter of the cells replaces four-fold cross-validation
SMALLEST_VARIANCE = 1e-3  # of a direction of the standardised latents
MAX_COMBINATIONS = 500  # that are measured, for others to be composed from them
NOISE_OF_NEAREST = 0.3  # standard deviation: another dataset is never quite like the training cells
UNSEEN_LOG_WEIGHT = -30.0  # of composed components: only cells with these labels are drawn from them


class GaussianMixtureDenoiser(SafetensorsModel, ConfigMixin):
    r"""
    The optimal denoiser if the latents of each combination of labels are a Gaussian mixture. It can take the place of
    [`WhiteBoxDiTModel`] in a pipeline.

    With noise (`a² = ᾱ_t`, `s² = 1 - ᾱ_t`), a component `N(μ, U diag(λ) Uᵀ)` becomes `N(a μ, U diag(a² λ + s²) Uᵀ)`.
    The expected velocity of a noisy cell `x` in it is `s (a U diag((1 - λ) / (a² λ + s²)) Uᵀ (x - a μ) - μ)`. The
    prediction is the average over components, weighted by the probability that `x` belongs to each. It is exact.

    Args:
        sample_size (`int`): Number of latents per cell.
        num_components (`int`): Number of components of all labels together.
        condition_sizes (`tuple[int]`, defaults to `()`): Number of categories of each label key.
        num_train_timesteps (`int`, defaults to 1000): Number of timesteps of the noise schedule.
        num_composed (`int`, defaults to 0):
            Number of combinations of labels that were not measured and have components all the same.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int,
        num_components: int,
        condition_sizes: tuple[int, ...] = (),
        num_train_timesteps: int = 1000,
        num_composed: int = 0,
    ):
        super().__init__()
        fitted = {
            "means": torch.zeros(num_components, sample_size),
            "directions": torch.eye(sample_size).repeat(num_components, 1, 1),  # U, in columns
            "variances": torch.ones(num_components, sample_size),  # λ
            "log_weights": torch.full((num_components,), -math.log(num_components)),
        }
        for name, value in fitted.items():
            self.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))
        self.register_buffer("component_labels", torch.zeros(num_components, len(condition_sizes), dtype=torch.long))
        null_label = torch.tensor(tuple(condition_sizes), dtype=torch.long)  # one past the last category of each key
        self.register_buffer("null_label", null_label, persistent=False)
        self.register_buffer("alphas_cumprod", torch.ones(num_train_timesteps))
        # Combinations that were not measured, the measured ones that they start from, the size of the change from
        # there, and its error when measured combinations are left out
        for name in ("composed_labels", "composed_bases"):
            self.register_buffer(name, torch.zeros(num_composed, len(condition_sizes), dtype=torch.long))
        for name in ("composed_changes", "composed_errors"):
            self.register_buffer(name, torch.zeros(num_composed))

    @classmethod
    def fit(
        cls,
        latents: torch.Tensor,
        class_labels: torch.Tensor,
        condition_sizes: tuple[int, ...],
        noise_scheduler: DDPMScheduler,
        max_components: int = MAX_COMPONENTS,
        seed: int = 0,
        metric: torch.Tensor | None = None,
    ) -> "GaussianMixtureDenoiser":
        """
        Fits full covariances to latents `(cells, sample_size)` with labels `(cells, num_label_keys)`. The number of
        components of each combination of labels, at most `max_components`, maximises the likelihood of validation
        cells. Covariances are shrunk towards the one pooled within labels with a weight of 20 cells.

        With the codec's [`~ProgramCodec.metric`] and two or more label keys, combinations that were not measured are
        composed ([`Composition`]): they have the components of their base, moved by the change. They add no more
        components than the measured ones have. Raises a `ValueError` unless the scheduler has
        `prediction_type="v_prediction"`.
        """
        if noise_scheduler.config.prediction_type != "v_prediction":
            raise ValueError("The closed form predicts the velocity: use prediction_type='v_prediction'.")
        values, codes = latents.double().cpu().numpy(), class_labels.cpu().numpy()
        combinations, index = np.unique(codes, axis=0, return_inverse=True)
        index = np.zeros(len(values), dtype=int) if codes.shape[1] == 0 else index.ravel()
        pooled = within_labels(values, index)
        pooled_covariance = pooled.T @ pooled / len(pooled)
        means, covariances, log_weights, labels = [], [], [], []  # an entry for each combination
        for i, combination in enumerate(combinations):
            own = values[index == i]
            shares = mixture_responsibilities(own, pooled, seed, max_components)
            own_means, own_covariances = weighted_gaussians(own, shares, pooled_covariance)
            means.append(own_means)
            covariances.append(own_covariances)
            log_weights.append(np.log(shares.sum(axis=0) / len(values)))
            labels.append(combination)
        composed = []
        if metric is not None and codes.shape[1] > 1 and len(combinations) <= MAX_COMBINATIONS:
            centers = np.stack([values[index == i].mean(axis=0) for i in range(len(combinations))])
            composed = compose_unseen(combinations, centers, np.bincount(index), metric, [len(own) for own in means])
        for one in composed:
            means.append(means[one.base] + one.change)
            covariances.append(covariances[one.base])
            log_weights.append(log_weights[one.base] + UNSEEN_LOG_WEIGHT)
            labels.append(one.labels)
        model = cls(
            sample_size=values.shape[1],
            num_components=sum(map(len, means)),
            condition_sizes=tuple(condition_sizes),
            num_train_timesteps=noise_scheduler.config.num_train_timesteps,
            num_composed=len(composed),
        )
        model.component_labels.copy_(torch.from_numpy(np.repeat(labels, [len(own) for own in means], axis=0)))
        model.alphas_cumprod.copy_(noise_scheduler.alphas_cumprod)
        for i, one in enumerate(composed):
            model.composed_labels[i] = torch.from_numpy(one.labels)
            model.composed_bases[i] = torch.from_numpy(combinations[one.base])
            model.composed_changes[i], model.composed_errors[i] = one.size, one.error
        parts = map(np.concatenate, (means, covariances, log_weights))
        return model._set(*parts, SMALLEST_VARIANCE)

    @torch.no_grad()
    def sample(self, class_labels: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Draws clean latents `(cells, sample_size)` of cells with labels `(cells, num_label_keys)`."""
        log_weights = self.log_weights.float() + self._mask(class_labels, len(class_labels))
        chosen = torch.multinomial(log_weights.softmax(-1), 1, generator=generator)[:, 0]  # a component per cell
        means, directions, variances = (values[chosen] for values in self._fitted())
        noise = torch.randn(means.shape, generator=generator, device=means.device)
        return means + torch.einsum("bed,bd->be", directions, variances.sqrt() * noise)

    @torch.no_grad()
    def nearest_labels(self, latents: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        """
        The most likely measured combination of each cell, `(cells, num_label_keys)`, among those with its labels
        `(cells, num_label_keys)`, where -1 allows any.
        """
        a, s = torch.ones(1, 1).to(self.means), torch.full((1, 1), NOISE_OF_NEAREST).to(self.means)
        labels = torch.where(class_labels < 0, self.null_label.cpu(), class_labels)
        nearest = []
        for rows in torch.arange(len(latents)).split(256):
            responsibilities = self._responsibilities(latents[rows].to(self.means), a, s, labels[rows])[2]
            nearest.append(self.component_labels[responsibilities.argmax(-1)].cpu())
        return torch.cat(nearest)

    def find_composed(self, labels: torch.Tensor) -> int | None:
        """The position of a combination `(num_label_keys,)`, where -1 allows any label, among the composed ones."""
        labels = labels.to(self.composed_labels)
        found = ((self.composed_labels == labels) | (labels < 0)).all(1).nonzero()
        return int(found[0]) if len(found) else None

    def _set(
        self, means: np.ndarray, covariances: np.ndarray, log_weights: np.ndarray, floor: float
    ) -> "GaussianMixtureDenoiser":
        """Sets the components; no variance is below `floor`."""
        variances, directions = np.linalg.eigh(covariances)
        self.means.copy_(torch.from_numpy(means))
        self.directions.copy_(torch.from_numpy(directions))
        self.variances.copy_(torch.from_numpy(np.maximum(variances, floor)))
        self.log_weights.copy_(torch.from_numpy(log_weights))
        return self.eval()

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
        label_index: torch.Tensor | None = None,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predicts the velocity of noisy latents; see [`WhiteBoxDiTModel.forward`] for the arguments."""
        if class_labels is not None and label_index is not None:
            class_labels = class_labels.reshape(len(class_labels), -1)[label_index]
        a, s = signal_and_noise(self, timestep, hidden_states)  # (batch or 1, 1) each
        projected, total, responsibilities = self._responsibilities(hidden_states.float(), a, s, class_labels)
        means, directions, variances = self._fitted()
        shrunk = (1 - variances) / total * projected  # (batch, components, sample_size)
        back = torch.einsum("bkd,ked->bke", shrunk, directions)
        velocities = s[..., None] * (a[..., None] * back - means)  # (batch, components, sample_size)
        sample = (responsibilities[..., None] * velocities).sum(1).to(hidden_states.dtype)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean `(sample_size,)` and covariance `(sample_size, sample_size)` of all cells, in double precision."""
        weights, means = self.log_weights.double().softmax(0), self.means.double()
        deviations = means - weights @ means
        within = (self.directions * self.variances[:, None]).double() @ self.directions.double().mT
        between = deviations[:, :, None] * deviations[:, None]
        return weights @ means, (weights[:, None, None] * (within + between)).sum(0)

    def given(
        self,
        precision: torch.Tensor,
        shift: torch.Tensor,
        labels: torch.Tensor | None = None,
        noisy: torch.Tensor | None = None,
        timestep: torch.Tensor | int = 0,
        clean: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        The components of clean cells `z` that have a Gaussian likelihood `exp(shift · z - ½ zᵀ precision z)`. Products
        of Gaussians are Gaussians again: the result is exact.

        Args:
            precision (`torch.Tensor` of shape `(cells or 1, sample_size, sample_size)`): Precision of the likelihood.
            shift (`torch.Tensor` of shape `(cells or 1, sample_size)`): Precision times the mean of the likelihood.
            labels (`torch.LongTensor` of shape `(num_label_keys,)`, *optional*): Labels of all cells. Default: any.
            noisy (`torch.Tensor` of shape `(cells, sample_size)`, *optional*):
                Noisy cells at `timestep`, if they are known too.
            clean (`torch.Tensor` of shape `(cells, sample_size)`, *optional*):
                A better expectation of the clean cells given the noisy ones. The components move with it.

        Returns means `(cells, components, sample_size)`, labels `(components, num_label_keys)` and log weights
        `(cells, components)`. In double precision.
        """
        chosen = self._mask(None if labels is None else labels[None], 1)[0].isfinite()
        means, directions, variances = (parameter[chosen].double() for parameter in self._fitted())
        means, log_weights = means[None], self.log_weights[chosen].double()[None]  # (1, components, ...)
        if noisy is not None:
            a, s = (value.double()[..., None] for value in signal_and_noise(self, timestep, noisy))
            projected = torch.einsum("bke,ked->bkd", noisy.double()[:, None] - a * means, directions)
            total = a**2 * variances + s**2
            log_weights = (log_weights - 0.5 * (projected**2 / total + total.log()).sum(-1)).log_softmax(-1)
            means = means + torch.einsum("bkd,ked->bke", a * variances / total * projected, directions)
            variances = (s**2 * variances / total)[0]  # all cells have one timestep
            if clean is not None:
                means = means + (clean - (log_weights.exp()[..., None] * means).sum(1))[:, None]
        prior = (directions / variances[:, None]) @ directions.transpose(1, 2)  # (components, e, e)
        cholesky = torch.linalg.cholesky(prior + precision.double()[:, None])  # (cells, components, e, e)
        prior_shift = torch.einsum("kef,bkf->bke", prior, means)
        new_shift = prior_shift + shift.double()[:, None]
        new_means = torch.cholesky_solve(new_shift[..., None], cholesky)[..., 0]
        quadratic = 0.5 * ((new_shift * new_means).sum(-1) - (prior_shift * means).sum(-1))
        determinant = cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 0.5 * variances.log().sum(-1)
        new_log_weights = (log_weights + quadratic - determinant).log_softmax(-1)
        return new_means, self.component_labels[chosen], new_log_weights

    def _fitted(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Means, directions and variances in float32: half precision would lose differences of likelihoods."""
        return self.means.float(), self.directions.float(), self.variances.float()

    def _mask(self, class_labels: torch.Tensor | None, batch: int) -> torch.Tensor:
        """0 for the components of a cell's labels, else -inf. Null labels and unseen combinations allow all."""
        allowed = torch.ones(batch, self.config.num_components, dtype=torch.bool, device=self.means.device)
        if class_labels is not None and self.config.condition_sizes:
            labels = class_labels.reshape(batch, -1).to(self.means.device)
            is_null = labels == self.null_label
            matches = (labels[:, None] == self.component_labels) | is_null[:, None]  # (batch, components, keys)
            allowed = matches.all(-1)
            allowed = allowed | ~allowed.any(1, keepdim=True)
        return torch.where(allowed, 0.0, -math.inf)

    def _responsibilities(self, x: torch.Tensor, a: torch.Tensor, s: torch.Tensor, class_labels: torch.Tensor | None):
        """`Uᵀ (x - a μ)`, `a² λ + s²`, both `(batch, components, sample_size)`, and the responsibilities."""
        means, directions, variances = self._fitted()
        deviation = x[:, None] - a[..., None] * means
        projected = torch.einsum("bke,ked->bkd", deviation, directions)
        total = a[..., None] ** 2 * variances + s[..., None] ** 2
        log_likelihood = -0.5 * (projected**2 / total + total.log()).sum(-1)
        log_joint = log_likelihood + self.log_weights.float() + self._mask(class_labels, len(x))
        return projected, total, log_joint.softmax(-1)


def compose_unseen(
    combinations: np.ndarray, means: np.ndarray, num_cells: np.ndarray, metric: torch.Tensor, sizes: list[int]
) -> list[Composed]:
    """All combinations one label away from a measured one, the dependable ones first, until components double."""
    composition = Composition(combinations, means, num_cells, metric.double().cpu().numpy())
    candidates = {tuple(row) for row in combinations.tolist()}
    for key, labels in enumerate(combinations.T):
        for label in set(labels.tolist()):
            candidates.update((*row[:key], label, *row[key + 1 :]) for row in composition.places)
    unseen = [composition.compose(np.array(row)) for row in sorted(candidates - set(composition.places))]
    composed = sorted([one for one in unseen if one is not None], key=lambda one: one.error / max(one.size, 1e-9))
    return composed[: int(np.searchsorted(np.cumsum([sizes[one.base] for one in composed]), sum(sizes), "right"))]


def within_labels(values: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Deviations `(cells, values)` from the mean of the cells with the same combination of labels."""
    within = values.copy()
    for code in np.unique(codes):
        within[codes == code] -= within[codes == code].mean(axis=0)
    return within


def weighted_gaussians(
    own: np.ndarray, responsibilities: np.ndarray, pooled_covariance: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Means `(components, sample_size)` and shrunk covariances `(components, sample_size, sample_size)`."""
    means, covariances = [], []
    for share in responsibilities.T:
        number = share.sum()
        mean = share @ own / number
        scatter = (own - mean).T @ (share[:, None] * (own - mean))
        means.append(mean)
        covariances.append((scatter + PSEUDO_CELLS * pooled_covariance) / (number + PSEUDO_CELLS))
    return np.stack(means), np.stack(covariances)


def mixture_responsibilities(
    own: np.ndarray, pooled: np.ndarray, seed: int, max_components: int = MAX_COMPONENTS
) -> np.ndarray:
    """
    Fits a mixture to the latents of one combination of labels, trying larger numbers of components until the
    likelihood of validation cells no longer grows. `pooled` are deviations of all cells from their label's mean.
    Returns the probability that a cell belongs to each component, `(cells, components)`.
    """
    from scipy.stats import multivariate_normal
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture  # slow to import
    from sklearn.model_selection import KFold, train_test_split

    # A component with fewer cells than dimensions is little more than the pooled covariance.
    most = max(1, min(max_components, len(own) // (own.shape[1] + 1)))
    if most == 1:
        return np.ones((len(own), 1))
    floor = 0.01 * pooled.var(axis=0).mean() + 1e-12
    pooled_covariance = pooled.T @ pooled / len(pooled) + floor * np.eye(own.shape[1])

    def fit(cells: np.ndarray, components: int, tol: float) -> np.ndarray:
        if components == 1:
            return np.ones((len(cells), 1))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # an imperfect fit is good enough to compare
            mixture = GaussianMixture(components, tol=tol, reg_covar=floor, random_state=seed).fit(cells)
        shares = mixture.predict_proba(cells)
        return shares[:, shares.sum(axis=0) > 1e-6]  # identical cells leave components empty

    if len(own) > MANY_CELLS:
        splits = [train_test_split(np.arange(len(own)), test_size=0.25, random_state=seed)]
    else:
        splits = list(KFold(4, shuffle=True, random_state=seed).split(own))

    def likelihood(components: int) -> float:
        """Log-likelihood of the validation cells."""
        total = 0.0
        for kept, validation in splits:
            shares = fit(own[kept], components, tol=0.01)
            means, covariances = weighted_gaussians(own[kept], shares, pooled_covariance)
            parts = [
                np.log(weight) + np.atleast_1d(multivariate_normal.logpdf(own[validation], mean, covariance))
                for weight, mean, covariance in zip(shares.mean(axis=0), means, covariances)
            ]
            total += np.logaddexp.reduce(parts, axis=0).sum()
        return total

    best, best_likelihood = 1, likelihood(1)
    for components in [number for number in COMPONENTS if number <= most]:
        if not (now := likelihood(components)) > best_likelihood:
            break
        best, best_likelihood = components, now
    return fit(own, best, tol=0.001)
