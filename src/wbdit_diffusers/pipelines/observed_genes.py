"""`ObservedGenes`: what the measured genes of a cell say about its latents."""

import torch
import torch.nn.functional as F

from ..models.codec_programs import ProgramCodec
from ..models.gaussian_mixture import GaussianMixtureDenoiser
from ..sampling.guidance import GaussianGuide


NUM_STEPS, MAX_STEP = 12, 2.0  # of the search; norm of a step in latent space
KNOWN = 1e4  # precision of a library size that is given


class ObservedGenes(GaussianGuide):
    """
    A guide to cells in which some genes have the values that were measured.

    The likelihood of the values is a function of the latents. A Gaussian takes its place (Laplace's method), with the
    gradient and the Fisher information at the most likely latents. The prior of their search is one Gaussian for all
    cells. `latents` holds the result of the search, `(cells, num_features)`.

    Args:
        codec ([`ProgramCodec`]): Maps latents to the distribution of a cell.
        counts (`torch.Tensor` of shape `(cells, genes)`): Counts, or log values. Those of other genes are not read.
        gene_mask (`torch.Tensor` of shape `(genes,)`): Whether a modelled gene was measured.
        library_size (`torch.Tensor` of shape `(cells,)`, *optional*):
            Total counts over all genes. By default they follow from the counts of the measured genes.
        gaussian_mixture ([`GaussianMixtureDenoiser`]): Distribution of the latents.
        class_labels (`torch.LongTensor` of shape `(cells, num_label_keys)`, *optional*): Labels; -1 is unknown.
        log_factors (`torch.Tensor` of shape `(genes,)`, *optional*):
            Log of each gene's measured counts relative to the model's, for cells of another technology.
    """

    def __init__(
        self,
        codec: ProgramCodec,
        counts: torch.Tensor,
        gene_mask: torch.Tensor,
        library_size: torch.Tensor | None = None,
        *,
        gaussian_mixture: GaussianMixtureDenoiser,
        class_labels: torch.Tensor | None = None,
        log_factors: torch.Tensor | None = None,
    ):
        mean, covariance = gaussian_mixture.moments()
        prior = torch.linalg.inv(covariance)
        known, known_shift = torch.zeros_like(prior), torch.zeros(len(counts), len(mean)).to(prior)
        if library_size is not None:
            known[-1, -1] = KNOWN
            known_shift[:, -1] = KNOWN * (library_size.log() - codec.latents_mean[-1]) / codec.latents_std[-1]
        latents, last, rate = mean.expand(len(counts), -1), -torch.inf, torch.ones(len(counts), 1).to(prior)
        for _ in range(NUM_STEPS):
            with torch.enable_grad():
                leaf = latents.float().requires_grad_()
                distribution = codec.decode(leaf, None, class_labels)
                if log_factors is not None:
                    distribution.log_proportions = distribution.log_proportions + F.pad(log_factors, (0, 1))
                log_prob = distribution.log_prob(counts, gene_mask)  # (cells,)
                gradient = torch.autograd.grad(log_prob.sum(), leaf)[0].double()
            information = codec.information(distribution, gene_mask).double()
            self.precision, self.latents = information + known, latents.float()
            self.shift = gradient + known_shift + (information @ latents[..., None])[..., 0]
            objective = (
                log_prob.detach()
                + (known_shift * latents).sum(1)
                - 0.5 * (((latents @ known) * latents).sum(1) + (((latents - mean) @ prior) * (latents - mean)).sum(1))
            )
            rate = torch.where(objective > last, rate.T, rate.T / 2).T  # a step went too far
            last = objective
            target = torch.linalg.solve(self.precision + prior, (self.shift + prior @ mean)[..., None])[..., 0]
            step = rate * (target - latents)
            latents = latents + step * (MAX_STEP / step.norm(dim=1, keepdim=True).clamp(min=MAX_STEP))
        self.gaussian_mixture = gaussian_mixture
